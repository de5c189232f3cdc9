"""Writes test/data/splits.txt: how the `tokenizers` package cuts texts into words.

    python3 test/make_splits.py > test/data/splits.txt
    python3 test/make_splits.py 100000 > /tmp/many.txt     # that many random texts

The patterns are the regular expressions that the makers of the vocabularies published, those of
`falcon` and `default` as engines that read GGUF have them. tokenizers==0.23.3. For each
text a line `text HEX`, then a line `PATTERN n,n,...` for each pattern: the bytes of each word.
"""
import random
import sys

from make_unicode import DEEPSEEK_LETTERS
from tokenizers import Regex, pre_tokenizers

ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
MODERN = ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s"
         rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
         r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {  # each expression cuts what the ones before left
    "gpt-2": [GPT2],
    "llama-bpe": [MODERN % r"\p{N}{1,3}"],
    "qwen2": [MODERN % r"\p{N}"],
    "qwen35": [ENDING + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+"],
    "gpt-4o": [CASED % (ENDING + "?", ENDING + "?", r"\p{N}{1,3}")],
    "tekken": [CASED % ("", "", r"\p{N}")],
    "smollm": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "deepseek-llm": [r"[\r\n]", rf"\s?[{DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
                     "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
                    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
                    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""],
}
TEXTS = [
    "Hello, world! It's the DOG'S 2nd day; we'll see, they'VE gone, I'd've said O'Neill's.",
    "Die Straße ist groß, schöne Grüße aus Köln.", "L'été dernier, à Noël, où ça ?",
    "El niño comió piña mañana, ¿verdad?", "Zażółć gęślą jaźń.", "Příliš žluťoučký kůň.",
    "Съешь ещё этих мягких французских булок.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Խաղաղություն բոլորին։", "შეიყვარე მოყვასი შენი.", "שָׁלוֹם עֲלֵיכֶם, מה נשמע?",
    "السَّلامُ عَلَيْكُم ١٢٣٤", "سلام دنیا ۱۲۳۴۵", "नमस्ते दुनिया, १२३४ क्षत्रिय", "ওহে বিশ্ব ১২৩",
    "ਸਤ ਸ੍ਰੀ ਅਕਾਲ", "નમસ્તે દુનિયા", "வணக்கம் உலகம் ௧௨௩", "హలో ప్రపంచం", "ನಮಸ್ಕಾರ", "നമസ്കാരം ലോകം",
    "ආයුබෝවන් ලෝකය", "สวัสดีชาวโลก ๑๒๓", "ສະບາຍດີ", "བཀྲ་ཤིས་བདེ་ལེགས།", "မင်္ဂလာပါ ၁၂၃", "ជំរាបសួរ",
    "ሰላም ዓለም", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꮳꮃꭹ", "Ꭰꭰ", "你好，世界！一二三123", "漢字かな交じり文ｶﾀｶﾅ「テスト」。",
    "안녕하세요 세계 123", "Xin chào thế giới", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐨 𝟙𝟚𝟛", "ǅungla ǈubav ŉ ſs",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 🏴‍☠️ ❤️‍🔥 1️⃣2️⃣", "e\u0301a\u0300 \u0301 \u0301x \u03011 x\u0301\u0302Y \u0301\u0301A",
    "def f(x):\n\tif x != 0x1F:\n\t\treturn x**2  # square\n\n\nclass A_b:\n    pass\n",
    "int main(void) { printf(\"%d\\n\", a[i]->b); /* c */ }\r\n\r\n// end\r\n",
    "camelCase HTTPServer XMLHttpRequest iPhone McDonald's USA's ÉCOLEs", "path/to/file.txt//\n/x http://a.b/c?d=e&f",
    "1 12 123 1234 12345 1234567.89 ½ Ⅷ ①②③④ x1y22z333 ٣٤٥٦",
    "  two   three    four\ttab \t mixed\n  \n \r\n\r  end   ", "\n", " ", "  ", "\t", "\r\n", " \n", "\n ", "a ", " a", "  a",
    "\u00a0\u00a0x \u3000\u3000y\u3000 \u2003z\u2028\u2029w\u0085v", "a\u200bb\ufeffc\u00add", "\x00\x01\x7f a\x00",
    "!!!\n\n\n???\r\n ...\n//\n", "'s 'S 'll'LL 'x ''s s'", "don't DON'T can'tx we're'VE I'M", "Aa aA AAa aAA Aaa'sB",
    "ʰʱA ʰa Aʰ aʰA 漢A漢a A漢 a漢A", "\u0301", "\u03011", "\u0301\n", "(\u0301a", "\u00aaA\u00bab",
]
POINTS = list("aabcsStTmMdDlLrReEvVZ''''  \t\n\r//..,!-_019") + [
    "\u00e9", "\u00c9", "\u00df", "\u0301", "\u0302", "\u00a0", "\u3000", "\u2028", "\u0085", "\u4e2d",
    "\u6587", "\u3042", "\u0431", "\u0411", "\u01c5", "\u02b0", "\u0e01", "\u0e31", "\u0660", "\u00bd",
    "\u2167", "\u200d", "\ufe0f", "\U0001f600", "\U0001f3fd", "\U0001d7d9", "\U00010400", "\x00", "\x7f",
    "\u0903", "\u20dd",
    "$", "+", "`", "~", "|", "^", "=", "\u20ac", "\u00b4", "\u2014", "\u201c", "\u3002", "\uff01", "\u0531", "\u0561",
    "\u10d0", "\u1f7d", "\u2126", "\u212a", "\uac00", "\ud7fb", "\u4dff", "\u07ff", "\u0e01", "\u30ff",
    "\u0378", "\ufb01", "\U0001e900",
]


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    source = random.Random(5)
    texts = TEXTS + ["".join(source.choice(POINTS) for _ in range(source.randint(1, 24)))
                     for _ in range(count)]
    cutters = {name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated")
                                              for expression in expressions])
               for name, expressions in PATTERNS.items()}
    for text in texts:
        print("text", text.encode("utf-8").hex())
        for name, cutter in cutters.items():
            pieces = [piece for piece, _ in cutter.pre_tokenize_str(text)]
            assert "".join(pieces) == text
            print(name, ",".join(str(len(piece.encode("utf-8"))) for piece in pieces))


if __name__ == "__main__":
    main()
