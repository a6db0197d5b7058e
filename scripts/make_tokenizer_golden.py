#!/usr/bin/env python3
"""Makes what the tokenizer tests compare with, and the Unicode tables of the tokenizer.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install tokenizers gguf
    /tmp/venv/bin/python scripts/make_tokenizer_golden.py tables
    /tmp/venv/bin/python scripts/make_tokenizer_golden.py golden [--gguf SmolLM2-135M-Instruct.Q4_1.gguf]

Truth is the Hugging Face `tokenizers` library: its regex engine says which code points are letters, its
normaliser what NFC is. Needs Debian's `bible-kjv` for training text. Everything is seeded.
"""
import argparse
import json
import pathlib
import random
import subprocess
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/tokenizers"
TABLES = ROOT / "integrations/reference/tokenizer/unicode_tables.inc"
SEED = 20
NUM_STRINGS = 2000
ALL_CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]

LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")


# ---- Unicode tables ---------------------------------------------------------------------------

def matching(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    pieces = split.pre_tokenize_str("".join(map(chr, ALL_CODE_POINTS)))
    return {ord(c) for piece, _ in pieces for c in piece}


def rust_numeric():
    # Every second character is a letter, so each numeric one is a piece of its own.
    text = "x".join(map(chr, ALL_CODE_POINTS))
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(text)
    return {ord(p) for p, _ in pieces if len(p) == 1 and p != "x"}


def ranges(points):
    out = []
    for c in sorted(points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def combining_classes():
    """Python knows the value of each class, the library which characters it has one for."""
    nfd, out = normalizers.NFD(), {}
    for c in ALL_CODE_POINTS:
        ch = chr(c)
        above = nfd.normalize_str("\u0345" + ch) == ch + "\u0345"   # 0 < class < 240
        below = nfd.normalize_str(ch + "\u0334") == "\u0334" + ch   # class > 1
        value = unicodedata.combining(ch)
        if c == 0x0345 or above or below:
            assert value, hex(c)
            out[c] = value
    out[0x0334] = unicodedata.combining("\u0334")
    return out


def decompositions_and_compositions():
    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    decompose, compose = {}, {}
    for c in ALL_CODE_POINTS:
        if 0xAC00 <= c < 0xD7A4:
            continue  # Hangul is arithmetic
        full = nfd.normalize_str(chr(c))
        if full == chr(c):
            continue
        decompose[c] = [ord(x) for x in full]
        if len(full) > 1 and nfc.normalize_str(full) == chr(c):
            first = nfc.normalize_str(full[:-1])
            assert len(first) == 1, hex(c)
            compose[(ord(first), ord(full[-1]))] = c
    return decompose, compose


def write_tables():
    lines = ["// Made by scripts/make_tokenizer_golden.py tables; do not edit.", ""]

    def table(declaration, rows, per_line):
        lines.append(declaration + " = {")
        for i in range(0, len(rows), per_line):
            lines.append("    " + ", ".join(rows[i:i + per_line]) + ",")
        lines.append("};")
        lines.append("")

    for name, points in [("kLetters", matching(r"\p{L}")), ("kNumbers", matching(r"\p{N}")),
                         ("kSpaces", matching(r"\s")), ("kRustNumerics", rust_numeric())]:
        rows = ["{0x%X, 0x%X}" % (a, b) for a, b in ranges(points)]
        table(f"constexpr Range {name}[]", rows, 6)
    runs = []
    for c, value in sorted(combining_classes().items()):
        if runs and runs[-1][1] == c - 1 and runs[-1][2] == value:
            runs[-1][1] = c
        else:
            runs.append([c, c, value])
    table("constexpr ClassRange kCombiningClasses[]", ["{0x%X, 0x%X, %d}" % tuple(r) for r in runs], 5)
    decompose, compose = decompositions_and_compositions()
    assert max(map(len, decompose.values())) <= 4
    table("constexpr Decomposition kDecompositions[]",
          ["{0x%X, {%s}}" % (c, ", ".join("0x%X" % x for x in d)) for c, d in sorted(decompose.items())], 3)
    table("constexpr Composition kCompositions[]",
          ["{0x%X, 0x%X, 0x%X}" % (*pair, c) for pair, c in sorted(compose.items())], 4)
    TABLES.write_text("\n".join(lines))


# ---- training text ----------------------------------------------------------------------------

SCRIPTS = [(0x430, 0x44F), (0x3B1, 0x3C9), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939), (0xE01, 0xE2E),
           (0x4E00, 0x4F00), (0x3041, 0x3093), (0x30A1, 0x30F3), (0xAC00, 0xAD00), (0xE0, 0xFF), (0x100, 0x17F)]


def training_text():
    rng = random.Random(SEED)
    bible = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    lines = bible.splitlines()
    for licence in sorted(pathlib.Path("/usr/share/common-licenses").iterdir()):
        lines += licence.read_text(errors="ignore").splitlines()
    for low, high in SCRIPTS:
        words = ["".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))) for _ in range(200)]
        for _ in range(1500):
            lines.append(" ".join(words[int(rng.paretovariate(0.8)) % 200] for _ in range(12)))
    for _ in range(3000):
        lines.append("    " * rng.randint(0, 4) + f"x[{rng.randint(0, 99999)}] = f(\"{rng.random():.4f}\");\t\t// {rng.randint(1900, 2030)}")
    return lines


# ---- the families -----------------------------------------------------------------------------

def train(trainer, model, pre, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(training_text(), trainer)
    return json.loads(tokenizer.to_str())


def byte_level_trainer(size):
    return trainers.BpeTrainer(vocab_size=size, show_progress=False,
                               initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))


def rebuilt(spec):
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


def gpt2():
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec = train(byte_level_trainer(1500), models.BPE(), pre)
    t = rebuilt(spec)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(["<|endoftext|>"])
    return t


def llama3():
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    spec = train(byte_level_trainer(4000), models.BPE(), pre)
    # Some tokens no merge leads to, as in the real vocabulary: only ignore_merges finds them.
    spec["model"]["merges"] = [m for i, m in enumerate(spec["model"]["merges"]) if i < 3000 or i % 3]
    merged = set(json.loads(rebuilt_vocab(spec)))
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if m[0] in merged and m[1] in merged]
    spec["model"]["ignore_merges"] = True
    t = rebuilt(spec)
    t.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    t.add_special_tokens(names)
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    return t


def rebuilt_vocab(spec):
    return json.dumps(list(spec["model"]["vocab"]))


def qwen2():
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    spec = train(byte_level_trainer(4000), models.BPE(), pre, normalizers.NFC())
    t = rebuilt(spec)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    t.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False),
                  AddedToken("<left>", lstrip=True, normalized=False), AddedToken("<right>", rstrip=True, normalized=True),
                  AddedToken("<cafe\u0301>", normalized=True)])
    return t


def sentencepiece_bpe(normalizer, pre, prepend):
    first = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=first + byte_tokens, limit_alphabet=1200,
                                  show_progress=False)
    spec = train(trainer, models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
                 pre_tokenizers.Metaspace(prepend_scheme="always" if prepend else "first"))
    # Runs of spaces, as in the real vocabularies.
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for n in (1, 2, 4, 8):
        vocab["\u2581" * 2 * n] = len(vocab)
        merges.insert(0 if n == 1 else merges.index(["\u2581" * (n // 2)] * 2) + 1, ["\u2581" * n] * 2)
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["pre_tokenizer"] = None
    t = rebuilt(spec)
    t.normalizer = normalizer
    if pre:
        t.pre_tokenizer = pre
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return t


def llama2():
    return sentencepiece_bpe(normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None, True)


def mistral():
    t = sentencepiece_bpe(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), False)
    t.add_special_tokens(["[INST]", "[/INST]"])
    return t


def smollm2(gguf_path):
    import gguf
    fields = gguf.GGUFReader(gguf_path).fields
    tokens, merges, types = (fields["tokenizer.ggml." + k].contents() for k in ("tokens", "merges", "token_type"))
    specials = [t for t, kind in zip(tokens, types) if kind == 3]
    alphabet = tokens[len(specials):len(tokens) - len(merges)]
    # The vocabulary is implied by the merges, so these are all that is stored.
    assert tokens == specials + alphabet + ["".join(m.split(" ")) for m in merges]
    text = "\n".join([f"specials {len(specials)}", *specials, f"alphabet {len(alphabet)}", *alphabet,
                      f"merges {len(merges)}", *merges]) + "\n"
    (GOLDEN / "smollm2.bpe.txt").write_text(text)
    t = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(specials)
    return t


# ---- the strings ------------------------------------------------------------------------------

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>",
            "[INST]", "[/INST]", "<tool_call>", "<left>", "<right>", "<caf\u00e9>", "<cafe\u0301>", "<0x41>", "<|im_", "_end|>"]
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", " \n ", "\n  "]
CONTRACTIONS = ["'s", "'S", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'Ve", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D",
                "'\u017f", "\u2019s", "'x", "''s", "'"]
EMOJI = ["\U0001F600", "\U0001F468\u200d\U0001F469\u200d\U0001F467", "\u2764\ufe0f", "\U0001F1E9\U0001F1EA", "\U0001F44D\U0001F3FD"]
MARKS = ["\u0301", "\u0327", "\u0316", "\u0345", "\u0334", "\u093c", "\u3099", "\u05b0", "\u0651", "\u20dd"]
NUMBERS = ["0", "7", "42", "1234567890", "\u0663\u0664", "\u00b2", "\u00bd", "\u2167", "\u0967\u0968", "\U0001D7D8", "\u4e09", "\U00011DE3"]
PUNCTUATION = list("!\"#$%&()*+,-./:;<=>?@[\\]^_`{|}~") + ["\u2014", "\u201c", "\u201d", "\u2026", "\u3002", "\u2581", "\u0120", "\x00", "\x7f", "\ufffd"]


def strings():
    rng = random.Random(SEED + 1)
    bible = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    words = bible.split()
    assigned = [c for c in ALL_CODE_POINTS if unicodedata.category(chr(c)) not in ("Cn", "Co")]

    def script_word():
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 7)))

    def any_characters():
        return "".join(chr(rng.choice(assigned)) for _ in range(rng.randint(1, 8)))

    def any_plane():
        plane = rng.randint(0, 16)
        c = plane << 16 | rng.randint(0, 0xFFFF)
        return chr(c) if not 0xD800 <= c < 0xE000 else "\ud7ff"

    def marked():
        return rng.choice("aeioucnAEO\u0915\u304b\u1100\u1e0b") + "".join(rng.choice(MARKS) for _ in range(rng.randint(1, 4)))

    def hangul():
        return "".join(chr(0x1100 + rng.randint(0, 18)) + chr(0x1161 + rng.randint(0, 20)) +
                       rng.choice(["", chr(0x11A8 + rng.randint(0, 26))]) for _ in range(rng.randint(1, 3)))

    pick = lambda pool: lambda: rng.choice(pool)
    word = pick(words)
    atoms = [word, word, word, script_word, any_characters, any_plane, marked, hangul, pick(SPACES), pick(SPACES), pick(NUMBERS),
             pick(NUMBERS), pick(CONTRACTIONS), pick(EMOJI), pick(PUNCTUATION), pick(SPECIALS),
             lambda: word().upper(), lambda: word() + rng.choice(CONTRACTIONS), lambda: str(rng.randint(0, 10**rng.randint(1, 9)))]
    out = ["", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "  a", "a  ", "a\u0301", "\u00e9", "1", "12", "1234", "a1b22c333d4444",
           "I'm don't WE'LL they'Ve it'\u017f", "<s>", "<s> a", " <left> a", "a <right>  b", "\u2581a", "x" * 300, "ab" * 400,
           " " * 100, " " * 99 + "a", "\n" * 50, "=" * 200, "9" * 100, "\u0301" * 40, "a" + "\u0316\u0301" * 20,
           "".join(rng.choice("abcdefghij") for _ in range(1500)), "\u4e00" * 100]
    while len(out) < NUM_STRINGS:
        kind = rng.random()
        if kind < 0.25:    # prose
            start = rng.randrange(len(words) - 20)
            out.append(" ".join(words[start:start + rng.randint(1, 14)]))
        elif kind < 0.45:  # random code points of one sort
            source = rng.choice([any_characters, any_plane, marked, hangul, script_word])
            out.append("".join(source() for _ in range(rng.randint(1, 4))))
        elif kind < 0.7:   # atoms with nothing between
            out.append("".join(rng.choice(atoms)() for _ in range(rng.randint(1, 6))))
        else:              # atoms with whitespace between
            out.append("".join(rng.choice(atoms)() + rng.choice(SPACES + [" "] * 16) for _ in range(rng.randint(1, 7))))
    return out


def write_golden(name, t, texts, with_json):
    rng = random.Random(SEED + 2)
    if with_json:
        spec = json.loads(t.to_str())
        text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
        (GOLDEN / f"{name}.tokenizer.json").write_text(text)
    size = t.get_vocab_size(with_added_tokens=True)
    decoded = []
    while len(decoded) < 100:
        ids = [rng.randrange(size) if rng.random() < 0.9 else rng.randrange(20) for _ in range(rng.randint(1, 8))]
        pair = [t.decode(ids, skip_special_tokens=True), t.decode(ids, skip_special_tokens=False)]
        if "\ufffd" not in pair[1]:
            decoded.append([ids, *pair])
    lines = ['{"encode": [']
    lines += [json.dumps(t.encode(s).ids, separators=(",", ":")) + ("," if i + 1 < len(texts) else "") for i, s in enumerate(texts)]
    lines += ['], "decode": [']
    lines += [json.dumps(d, ensure_ascii=False, separators=(",", ":")) + ("," if i + 1 < len(decoded) else "") for i, d in enumerate(decoded)]
    (GOLDEN / f"{name}.golden.json").write_text("\n".join(lines + ["]}"]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tables", "golden"])
    parser.add_argument("--gguf", default=pathlib.Path.home() / ".cache/prehoc/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    if args.what == "tables":
        write_tables()
        return
    texts = strings()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(s, ensure_ascii=False) for s in texts)
    (GOLDEN / "strings.json").write_text(f"[{lines}]\n")
    write_golden("smollm2", smollm2(args.gguf), texts, with_json=False)
    for name, make in [("gpt2", gpt2), ("llama3", llama3), ("qwen2", qwen2), ("llama2", llama2), ("mistral", mistral)]:
        write_golden(name, make(), texts, with_json=True)


if __name__ == "__main__":
    main()
