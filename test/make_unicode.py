#!/usr/bin/env python3
"""Writes lib/unicode.h: which code points are letters, marks, numbers, signs, spaces.

    python3 test/make_unicode.py > lib/unicode.h

Python's own unicodedata is the source, so the table has the Unicode version of the Python that ran
this; the version is written into the file. Letters are the categories L*: capitals (Lu, Lt), small
ones (Ll) and those without case (Lm, Lo); marks are M*, numbers N*, punctuation P*, symbols S*, and
white space is the property White_Space: the separators Z* and six control characters.
"""

import sys
import unicodedata

WHITE_CONTROLS = (0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x85)
LINE_LENGTH = 100
CLASS_OF_CATEGORY = {
    "Lu": "UPPER", "Lt": "UPPER", "Ll": "LOWER", "Lm": "LETTER", "Lo": "LETTER",
    "Mn": "MARK", "Mc": "MARK", "Me": "MARK", "Nd": "NUMBER", "Nl": "NUMBER", "No": "NUMBER",
    "Zs": "SPACE", "Zl": "SPACE", "Zp": "SPACE",
    **{category: "PUNCTUATION" for category in ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po")},
    **{category: "SYMBOL" for category in ("Sm", "Sc", "Sk", "So")},
}


def class_of(code):
    if code in WHITE_CONTROLS:
        return "SPACE"
    return CLASS_OF_CATEGORY.get(unicodedata.category(chr(code)))


def ranges():
    """Yields (first, last, class) in rising order; neighbours of one class are one range."""
    first, current = 0, None
    for code in range(sys.maxunicode + 2):
        found = class_of(code) if code <= sys.maxunicode else None
        if found == current:
            continue
        if current:
            yield first, code - 1, current
        first, current = code, found


def main():
    entries = [f"{{0x{a:x}, 0x{b:x}, UNICODE_{kind}}}," for a, b, kind in ranges()]
    version = unicodedata.unidata_version
    print(
        f"""/* unicode.h: letters, marks, numbers, signs and white space of Unicode {version}.
 * Written by test/make_unicode.py; a code point in no range is of class UNICODE_OTHER. */
#ifndef UNICODE_TABLE_H
#define UNICODE_TABLE_H

#include <stdint.h>

enum unicode_class {{
    UNICODE_OTHER,
    UNICODE_UPPER,
    UNICODE_LOWER,
    UNICODE_LETTER, /* without case */
    UNICODE_MARK,
    UNICODE_NUMBER,
    UNICODE_SPACE,
    UNICODE_PUNCTUATION,
    UNICODE_SYMBOL
}};

struct unicode_range {{
    uint32_t first, last; /* both are inside */
    enum unicode_class kind;
}};

/* clang-format off */
static const struct unicode_range unicode_ranges[] = {{"""
    )
    line = ""
    for entry in entries:
        if len(line) + len(entry) > LINE_LENGTH - 4:
            print("   " + line)
            line = ""
        line += " " + entry
    print("   " + line)
    print(
        """};
/* clang-format on */

static inline enum unicode_class unicode_class_of(uint32_t code) {
    int low = 0, high = sizeof unicode_ranges / sizeof *unicode_ranges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (code < unicode_ranges[middle].first) {
            high = middle;
        } else if (code > unicode_ranges[middle].last) {
            low = middle + 1;
        } else {
            return unicode_ranges[middle].kind;
        }
    }
    return UNICODE_OTHER;
}

#endif"""
    )


if __name__ == "__main__":
    main()
