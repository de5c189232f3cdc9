#!/usr/bin/env python3
"""Writes lib/unicode.h: which code points are letters, marks, numbers, signs, spaces.

    python3 test/make_unicode.py > lib/unicode.h

Python's own unicodedata is the source, so the table has the Unicode version of the Python that ran
this; the version is written into the file. Letters are the categories L*: capitals (Lu, Lt), small
ones (Ll) and those without case (Lm, Lo); marks are M*, numbers N*, punctuation P*, symbols S*, and
white space is the property White_Space: the separators Z* and six control characters. Besides, the
letters of one tokenizer that lists them.
"""

import re
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

# as in the expression that DeepSeek published, in rising order
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\U00010400-\U0001044f𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")


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

/* What DeepSeek's tokenizers take for letters: first and last code points, a zero ends them. */
static const uint32_t unicode_deepseek_letters[] = {""")
    letters = [f"0x{ord(sign):x}," for first, last in re.findall("(.)(?:-(.))?", DEEPSEEK_LETTERS)
               for sign in (first, last or first)]
    for at in range(0, len(letters), 10):
        print("    " + " ".join(letters[at:at + 10]))
    print(
        """    0};
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
