"""Claims about bpe.py and bpe_fast.py."""
import concurrent.futures
import json
import pickle
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch

from common import BPE_TEXT, bpe_write
import bpe
import bpe_fast

# tiktoken's GPT-2
POSSESSIVE = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LLAMA = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
         r"""\s*[\r\n]+|\s+(?!\S)|\s+""")
HANDOUT = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
POOLS = ["ab", "ab '\n", "'sdmtlvre ' \u017f", "  \t\r\na1.", "\u0085\u00a0\u180e\u200b\u200d\u3000\u2003 \u2028ax1!",
         "é日\u0301ᄀ 's😀𝒳", "a日公あカー゛・。，（　'1\n ", "\x00\x1c\x1f ab'1", None]


def random_text(rng, n):
    """Text from a small alphabet full of corner cases, or from all of Unicode."""
    pool = rng.choice(POOLS)
    if pool:
        return "".join(rng.choice(pool) for _ in range(n))
    codes = (rng.choice([rng.randrange(0x110000), rng.randrange(0x3100), rng.randrange(256)]) for _ in range(n))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def mixture(rng, n, *extra):
    """`n` pieces of text, each a random one, a part of BPE_TEXT or one of `extra`."""
    return "".join(rng.choice([random_text(rng, rng.randrange(30)), BPE_TEXT[:rng.randrange(240)], *extra])
                   for _ in range(n))


def reference(tok):
    """tiktoken with our ranks and GPT-2's pattern."""
    plain = {t: i for i, t in tok.vocab.items() if i not in tok.special_tokens.values()}
    return tiktoken.Encoding("ours", pat_str=POSSESSIVE, mergeable_ranks=plain, special_tokens=tok.special_tokens)


@pytest.fixture(params=["C", "Python"])
def both(request, monkeypatch):
    """A test with bpe.c, and the same one as if there were no compiler."""
    if request.param == "C" and bpe_fast.library() is None:
        pytest.skip("needs a C compiler")
    if request.param == "Python":
        monkeypatch.setattr(bpe_fast, "library", lambda: None)
        monkeypatch.setattr(bpe, "library", lambda: None)
    return request.param


# --- training ---

def test_bpe_handout_example(tmp_path):
    words = [word.decode() for word, n in HANDOUT.items() for _ in range(n)]
    vocab, merges = bpe.train_bpe(bpe_write(tmp_path / "t", "<|x|>".join(words)), 257 + 12, ["<|x|>"])
    assert merges == bpe.learn_merges(HANDOUT, 12)
    assert bpe.count_pairs({tuple("ababa"): 2, tuple("bb"): 1}) == {("a", "b"): 4, ("b", "a"): 4, ("b", "b"): 1}
    assert [(a + b" " + b).decode() for a, b in merges] == [
        "s t", "e st", "o w", "l ow", "w est", "n e", "ne west", "w i", "wi d", "wid est", "low e", "lowe r"]
    assert list(vocab) == list(range(269)) and vocab[97] == b"a" and vocab[256] == b"st" and vocab[268] == b"<|x|>"
    with pytest.warns(UserWarning, match="no pair is left .* 259 entries, not the 400"):
        merges = bpe.train_bpe(bpe_write(tmp_path / "t", "abc"), 400)[1]
    assert merges == [(b"b", b"c"), (b"a", b"bc")] == bpe.learn_merges({b"abc": 1}, 9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:no pair is left")
def test_bpe_trains_as_the_naive_trainer_does(seed, tmp_path, monkeypatch, both):
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 100)
    rng = random.Random(seed)
    for _ in range(5):
        text = "".join(random_text(rng, 30) + rng.choice(["", "<|e|>", " "]) for _ in range(8)) + "aaaa"
        path, n = bpe_write(tmp_path / "t", text), rng.randrange(60)
        for pattern in bpe.GPT2_PATTERN, f"(?:{bpe.GPT2_PATTERN})", LLAMA:    # the second goes through the regex
            counts = Counter(word.encode() for part in text.split("<|e|>") for word in regex.findall(pattern, part))
            vocab, merges = bpe.train_bpe(path, 257 + n, ["<|e|>"], pattern=pattern, workers=1)
            assert merges == bpe.learn_merges(counts, n)


# --- encoding ---

def test_bpe_ids_are_tiktokens(bpe_trained, monkeypatch, both):
    monkeypatch.setattr(bpe, "CACHED_WORDS", 9)
    tok, rng = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "<|endoftext|><|endoftext|>", "a b"]), random.Random(0)
    theirs = reference(tok)
    for _ in range(300):
        text = mixture(rng, 6, *tok.special_tokens)
        ids = tok.encode(text)
        assert ids == theirs.encode(text, allowed_special="all") and tok.decode(ids) == text
        assert tok.encode(text, allowed_special=set()) == theirs.encode_ordinary(text)
        assert tok.encode(text, {"a b"}) == theirs.encode(text, allowed_special={"a b"}, disallowed_special=())
    assert tok.encode("") == [] and tok.decode([]) == ""


@pytest.mark.parametrize("run", ["a", " ", "日", "'s"])
@pytest.mark.filterwarnings("ignore:no pair is left")
def test_bpe_long_runs_cost_n_log_n(run, tmp_path, monkeypatch, both):
    tok = bpe.Tokenizer(*bpe.train_bpe(bpe_write(tmp_path / "t", run * 999), 300, []))
    pops, pop = [], bpe_fast.heapq.heappop
    monkeypatch.setattr(bpe_fast.heapq, "heappop", lambda heap: pops.append(1) or pop(heap))
    text = run * 5_000
    assert tok.encode(text) == reference(tok).encode_ordinary(text)
    assert len(pops) <= 3 * len(text.encode())    # a pair of bytes each, and two new pairs a merge
    if both == "C":    # squares of millions would take hours
        assert tok.decode(tok.encode(run * 1_000_000)) == run * 1_000_000
        assert len(bpe.train_bpe(bpe_write(tmp_path / "t", run * 1_000_000), 276, [])[1]) <= 20


def test_bpe_stream_gives_the_same_ids(bpe_trained, monkeypatch):
    monkeypatch.setattr(bpe, "STREAM_CHARS", 10)
    rng, patterns = random.Random(1), (bpe.GPT2_PATTERN, LLAMA, LLAMA.replace("{1,3}", ""), r"\w+|\s", r"[^\n]*(?=\n)")
    for k in range(300):
        specials, pattern = ["<|endoftext|>", "<|endoftext|><|endoftext|>", "e c"], patterns[k % len(patterns)]
        tok, text = bpe.Tokenizer(*bpe_trained, specials, pattern=pattern), mixture(rng, 5, *specials)
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(20)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert list(tok.encode_iterable(chunks)) == tok.encode(text), (text, chunks)


@pytest.mark.parametrize("letters, end", [("abcdefghij    ", ".\n"), ("abc12", '","id":'), ("天气公园とカー", "。")])
def test_bpe_stream_memory_is_constant(letters, end, bpe_trained):
    tok, rng = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), random.Random(0)
    lines = ("".join(rng.choices(letters, k=60)) + end for _ in range(4000))
    tracemalloc.start()
    n = sum(1 for _ in tok.encode_iterable(lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 40_000 and peak < 1_000_000, peak


def test_bpe_files_by_any_number_of_workers(tmp_path, monkeypatch, bpe_trained, both):
    tok, out, specials = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), tmp_path / "x.bin", ["<|endoftext|>"]
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 100)
    assert bpe.train_bpe(bpe_write(tmp_path / "t", BPE_TEXT), 340, specials, workers=3) == bpe_trained
    text = BPE_TEXT + "\rmac\n\r\n"
    for workers in (1, 3):
        n, ids = tok.encode_file(bpe_write(tmp_path / "t", text), out, workers=workers), np.fromfile(out, "<u2")
        assert n == len(ids) and ids.tolist() == tok.encode(text) and tok.decode(ids) == text
    wide = bpe.Tokenizer({**tok.vocab, 65536: b"<|far|>"}, tok.merges, ["<|far|>"])
    wide.encode_file(bpe_write(tmp_path / "t", "a<|far|>"), tmp_path / "y.bin")
    assert np.fromfile(tmp_path / "y.bin", "<u4").tolist() == [97, 65536]
    (tmp_path / "bad").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="bad is not UTF-8: byte 0xff at offset 2"):
        tok.encode_file(tmp_path / "bad", out)
    assert np.array_equal(np.fromfile(out, "<u2"), ids)    # the old file is whole, and nothing else lies about
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "t", "x.bin", "y.bin"]


def test_bpe_decode_and_bad_arguments(bpe_trained, tmp_path):
    tok = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])
    ids = tok.encode(BPE_TEXT * 9)
    for kind in np.uint16, torch.tensor, iter, lambda x: list(torch.tensor(x)):
        assert tok.decode(kind(ids)) == BPE_TEXT * 9
    assert tok.decode([0xE6, 0x97, 97]) == "\ufffda" and tok.decode_bytes([0xE6, 97]) == b"\xe6a"
    assert pickle.loads(pickle.dumps(tok)).encode(BPE_TEXT * 9) == ids
    for bad in [340], [-1], np.array([7, 340]):
        with pytest.raises(ValueError, match=f"id {bad[-1]} .* 0 to 339"):
            tok.decode(bad)
    path = bpe_write(tmp_path / "t", "abc")
    for call, error, words in (
            (lambda: tok.decode([1.0]), TypeError, "float"), (lambda: tok.encode(b"x"), TypeError, "bytes"),
            (lambda: tok.encode("x", {"<|no|>"}), ValueError, "endoftext"),
            (lambda: bpe.Tokenizer({0: b"a"}, []).encode("b"), ValueError, "no token for the byte b'b'"),
            (lambda: bpe.Tokenizer({0: b"a"}, [(b"a", b"a")]), ValueError, "merge 0.*b'aa' is not in"),
            (lambda: bpe.train_bpe(path, 256), ValueError, "at least 257"),
            (lambda: bpe.train_bpe(path, 300, "<|x|>"), TypeError, "list"),
            (lambda: bpe.train_bpe(path, 300, ["a", "a"]), ValueError, "twice"),
            (lambda: bpe.train_bpe(bpe_write(tmp_path / "e", ""), 300), ValueError, "e is empty")):
        with pytest.raises(error, match=words):
            call()
    for call in (tok.encode, lambda x: list(tok.encode_iterable([x])), lambda x: bpe.Tokenizer({}, [], [x]),
                 bpe.ByteTokenizer().encode, lambda x: bpe.compression_ratio(x, bpe.CharTokenizer())):
        with pytest.raises(ValueError, match="half a surrogate pair.*character 1"):
            call("a\ud800")


# --- files of others ---

def test_bpe_gpt2_files(tmp_path, bpe_trained):
    order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order += [b for b in range(256) if b not in order]    # GPT-2's ids of the bytes: "!" is 0
    texts = {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)}
    merges, write = bpe_trained[1], lambda token: "".join(texts[b] for b in token)
    vocab = {write(t): i for i, t in enumerate([*(bytes([b]) for b in order), *(a + b for a, b in merges)])}
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": len(vocab)}), encoding="utf-8")
    lines = "".join(f"{write(a)} {write(b)}\n" for a, b in merges)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    tok = bpe.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", ["<|endoftext|>", "<|new|>"])
    assert tok.vocab[0] == b"!" and tok.special_tokens == {"<|endoftext|>": len(vocab), "<|new|>": len(vocab) + 1}
    assert tok.encode(BPE_TEXT * 9) == reference(tok).encode(BPE_TEXT * 9, allowed_special="all")
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="merges.txt.*'a b c'"):
        bpe.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def foreign(path, bpe_trained):
    """A file as Llama 3 and Qwen 2 have them: merges as pairs, a word that no merge makes, NFC, a token not special."""
    bpe.Tokenizer(*bpe_trained, ["<|im start|>", "<tool>", "é!"], pattern=LLAMA).save(path)
    layout = json.loads(path.read_text(encoding="utf-8"))
    layout["normalizer"], layout["model"]["ignore_merges"] = {"type": "NFC"}, True
    layout["model"]["merges"] = [merge.split(" ") for merge in layout["model"]["merges"]]
    layout["model"]["vocab"]["zebra"] = layout["model"]["vocab"].pop("<|endoftext|>")
    layout["added_tokens"][1]["special"] = False
    return layout


O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"""
            r"""[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize("steps, use_regex", [
    ("Llama 3, Qwen 2", False), ([split(O200K, "Removed", True)], False), ([split(regex) for regex in DEEPSEEK], False),
    ([{"type": "Digits", "individual_digits": True}], True), ([], True),
    ([split("l") | {"pattern": {"String": "l"}}, split(LLAMA)], False)])
def test_bpe_files_of_others_give_hugging_faces_ids(steps, use_regex, tmp_path, bpe_trained):
    path, again = tmp_path / "tokenizer.json", tmp_path / "again.json"
    layout = foreign(path, bpe_trained)
    if isinstance(steps, list):
        bpe.Tokenizer(*bpe_trained, ["<|im start|>"]).save(path)
        layout = json.loads(path.read_text(encoding="utf-8"))
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, LEVEL | {"use_regex": use_regex}]}
    path.write_text(json.dumps(layout), encoding="utf-8")
    tok, theirs, rng = bpe.Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path)), random.Random(5)
    tok.with_special([]).save(again)
    tok_again = bpe.Tokenizer.load(again)
    for _ in range(200):
        text = mixture(rng, 6, "zebra", "<|im start|>", "<tool>", "e\u0301!", "é!", "日本語カナ123", "½²٣1.5", "DON'T")
        assert tok.encode(text) == theirs.encode(text).ids == tok_again.encode(text), text
    if steps == "Llama 3, Qwen 2":
        assert 340 not in tok.encode("<|im start|>", set()) and 341 in tok.encode("<tool>", set())


@pytest.mark.parametrize("where, value, words", [
    ("model type", "WordPiece", "model's type is 'WordPiece'"), ("model vocab zebra", 3, "id 3"),
    ("model merges 0", "a", "merge 0 is 'a'"), ("normalizer type", "Lowercase", "normalizer is 'Lowercase'"),
    ("pre_tokenizer", {"type": "Metaspace"}, "last pre_tokenizer is 'Metaspace'"), ("model", None, "tokenizer.json"),
    ("pre_tokenizer pretokenizers 0", split(r"\p{L}+", "Removed", True), "removes what"),
    ("added_tokens 0 lstrip", True, "lstrip"), ("added_tokens 0 id", 0, "id 0"), ("added_tokens 0 id", 2 ** 32, "id 4"),
    ("model vocab zebra", 2 ** 31, "id 2147483648"), ("added_tokens 1 content", "é", "name of byte 0xe9"),
    ("model dropout", 0.1, "dropout is 0.1"),
    *[("pre_tokenizer pretokenizers 0", split(f"[{part}]+"), "a set inside") for part in (r"\w&&\D", "^(a|[.,!])")]])
def test_bpe_foreign_files_are_refused_by_name(where, value, words, tmp_path, bpe_trained):
    path = tmp_path / "tokenizer.json"
    part = layout = foreign(path, bpe_trained)
    *way, last = [int(key) if key.isdigit() else key for key in where.split()]
    for key in way:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(ValueError, match=f"(?s)tokenizer.json.*({words})"):
        bpe.Tokenizer.load(path)


def test_bpe_merges_step_by_step_give_the_ids(bpe_trained):
    tok = bpe.Tokenizer(*bpe_trained)
    for word in (b" newest", " Café".encode(), b"aaaaaaa", b" endoftext", b"x"):
        (first, parts), *steps = bpe.merge_steps(tok, word)
        assert first is None and parts == [word[i:i + 1] for i in range(len(word))]
        for rank, after in steps:
            assert b"".join(after) == word and len(after) == len(parts) - 1 and b"".join(tok.merges[rank]) in after
            parts = after
        assert b"|".join(parts) == b"|".join(tok.vocab[i] for i in tok.encode(word.decode())), word
        assert steps == sorted(steps, key=lambda step: step[0]), "a merge makes only pairs that were learnt after it"


# --- what it replaces, and commands ---

def test_bpe_what_it_replaces(tmp_path):
    tok = bpe.Tokenizer(*bpe.train_bpe(bpe_write(tmp_path / "t", "the cat in the hat"), 256 + 3, []))
    assert bpe.compression_ratio("the cat in the hat", tok) == 18 / 12
    words = bpe.WordTokenizer("I love LLM")
    assert words.encode("I love LLM LLMs") == [1, 2, 3, 0] and words.decode([1, 2, 3, 0]) == "I love LLM<unk>"
    for other in bpe.CharTokenizer(), bpe.CharTokenizer(BPE_TEXT), bpe.ByteTokenizer(), bpe.WordTokenizer(BPE_TEXT):
        assert other.decode(np.array(other.encode(BPE_TEXT))) == BPE_TEXT and other.encode("") == []
        with pytest.raises(ValueError, match="0 to"):
            other.decode([other.vocab_size])
    assert bpe.ByteTokenizer().decode([0xC3, 0x28]) == "\ufffd("            # 0xC3 begins a character, ( does not go on
    assert bpe.CharTokenizer("ab").encode("abc") == [0, 1, 2] and bpe.CharTokenizer("ab").decode([2]) == "\ufffd"


@pytest.mark.filterwarnings("ignore:no pair is left")
def test_bpe_commands(tmp_path, capsys):
    def run(*arguments):
        bpe.main([str(argument) for argument in arguments])
        return capsys.readouterr().out
    text, out = bpe_write(tmp_path / "t.txt", BPE_TEXT), tmp_path / "tokenizer.json"
    assert "350 tokens" in run("train", text, "--vocab_size=350", f"--out={out}")
    run("encode", out, text, f"--out={tmp_path / 'x.bin'}")
    assert bpe.Tokenizer.load(out).decode(np.fromfile(tmp_path / "x.bin", "<u2")) == BPE_TEXT
    bar = bpe.Tokenizer({**bpe.Tokenizer.load(out).vocab, 350: b"|"}, [], ["|"])                # one byte either way
    bar.save(out)
    assert bpe.Tokenizer.load(out).encode("a|b") == bar.encode("a|b")
    run("train", text, "--vocab_size=350", f"--out={out}")
    with pytest.raises(ValueError, match="'¶' is also how the file writes"):
        bpe.Tokenizer({**bpe.Tokenizer.load(out).vocab, 350: "¶".encode()}, [], ["¶"]).save(out)
    assert "t h e" in run("show", out, "the cat")
    longest = run("show", out, "--merges=1")
    assert "'<|endoftext|>'" in longest and longest.count("\n") == 1
    words = "".join(f"{word.decode()}\n" * n for word, n in HANDOUT.items())
    steps = run("show", bpe_write(tmp_path / "handout.txt", words + "<|endoftext|>" * 99), "--merges=3")
    assert "merge 0    s t   9 times" in steps and "6 times  n e w e st" in steps
    assert "BPE 300" in run("compare", text)
