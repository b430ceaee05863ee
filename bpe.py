"""Byte-pair encoding: learn a vocabulary from text, turn text into token ids and back.

Why: characters make long sequences, words leave unknown ones; pairs of bytes merged by how often they occur give
short sequences and can write every text. This is GPT-2's kind: a regex cuts text into pre-tokens (words with their
space), merges stay inside them, and special tokens such as <|endoftext|> are cut out before anything else.

How: each job stands here twice. The version to read is the regex and one word at a time (`_count_by_regex`,
`_encode_by_regex`, `merge_steps`); the version that runs does whole blocks of text in NumPy and gives the same ids.
Any pattern but GPT-2's takes the first. Left out: sentencepiece models, dropout, normalizers other than NFC (by
Python's Unicode tables). Ids are those of tiktoken and Hugging Face, but in a letter that is too new for the regex
module's Unicode tables, or for theirs.

Papers: Sennrich et al., arXiv 1508.07909, algorithm 1 (BPE for words); Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2.2 (bytes, and merges kept inside character categories).

Measured on two cores of an AMD EPYC (results/bpe_bench.txt):
    python bpe.py train FILE --vocab_size=32000 --out=tokenizer.json    100 MB in 6.0 s, Hugging Face's trainer 21.4 s
    python bpe.py encode tokenizer.json FILE --out=x.bin
    python bpe.py show tokenizer.json "the cat in the hat"
    python bpe.py compare FILE
    python bpe.py bench FILE --tokenizer=gpt2.json    GPT-2's vocabulary: 42 MB/s, the first time 19; tiktoken 12
"""
import argparse
import contextlib
import difflib
import hashlib
import heapq
import inspect
import json
import operator
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import Counter

import numpy as np
import regex
from tqdm import tqdm

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BLOCK_BYTES = 4 << 20          # a worker's unit of work; a file of fewer than four blocks starts no worker unless asked
FAST_BLOCK_BYTES = 256 << 10   # what the NumPy path does at once: its arrays then stay in the second-level cache
FAST_BYTES = 2000              # shorter text goes through the regex, which has less to set up
STREAM_CHARS = 8192            # encode_iterable looks for a safe cut each time it holds this much
CACHED_WORDS = 2048            # merged words the regex path remembers, about 0.4 MB

# --- cutting text into pre-tokens ---

# Spellings of GPT-2's pattern that cut alike: the course's, OpenAI's first, tiktoken's possessive one.
_GPT2_SPELLINGS = (
    GPT2_PATTERN,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""")
_GPT4_SPELLINGS = tuple(    # Llama 3 and GPT-4 take three digits together, Qwen 2 one
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+""" % digits for digits in ("{1,3}", ""))
# A byte that ends a character other than white space: ASCII, or a continuation byte in which no Unicode space ends.
_SOLID = rb"(?<=[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf])"
# Where each pattern surely starts a pre-token, whatever stands further off. GPT-4's glues newlines to punctuation.
_CUTS = {**dict.fromkeys(_GPT2_SPELLINGS, _SOLID + rb"(?=[ \t\n\r])"),
         **dict.fromkeys(_GPT4_SPELLINGS, _SOLID + rb"(?= )|(?<=[A-Za-z0-9])(?=[\t\n\r])")}


def _pretokens(compiled, text):
    """The pieces of `text` that merges stay inside: the matches, and what lies between them, so that nothing is lost.

    >>> _pretokens(regex.compile(GPT2_PATTERN), "I'll  go")
    ['I', "'ll", ' ', ' go']
    """
    pieces = [] if compiled.groups else compiled.findall(text)
    if sum(map(len, pieces)) != len(text):
        pieces, end = [], 0
        for match in compiled.finditer(text):
            pieces += text[end:match.start()], match[0]
            end = match.end()
        pieces.append(text[end:])
    return list(filter(None, pieces))


def _alternatives(tokens):
    """A pattern for any of the byte strings, longest first, in a group so that split keeps them; None for none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")") if tokens else None


class _Cutter:
    """Finds places where text can be cut so that the two sides, encoded apart, give the ids of the whole.

    After a pattern that we know that is a boundary of `_CUTS`. Of any other we only know that a special token stands
    alone, so text without one is not cut at all. No cut may cross a special token.
    """

    def __init__(self, pattern, tokens):
        self.tokens = [t for t in tokens if len(t) > 1]
        place = _CUTS.get(pattern) or (b"(?=" + b"|".join(map(re.escape, tokens)) + b")" if tokens else b"(?!)")
        self.forward, self.backward = regex.compile(place), regex.compile(b"(?r)" + place)
        self.reach = max(map(len, self.tokens), default=1) - 1    # bytes after a cut that may still spoil it

    def _crossed(self, data, cut):
        return any(data.find(t, max(0, cut - len(t) + 1), cut + len(t) - 1) >= 0 for t in self.tokens)

    def last(self, data):
        """Last safe cut of `data`, which begins at one and will go on; 0 when there is none."""
        for match in self.backward.finditer(data):
            if 0 < match.start() <= len(data) - self.reach and not self._crossed(data, match.start()):
                return match.start()
        return 0

    def blocks(self, data, size=FAST_BLOCK_BYTES):
        """`data` in pieces of about `size` bytes; one without a safe cut doubles, so that the search stays linear."""
        start, end = 0, size
        while end < len(data):
            cut = start + self.last(data[start:end])
            if cut > start:
                yield data[start:cut]
            start, end = cut, cut + (size if cut > start else 2 * (end - start))
        yield data[start:]

    def ranges(self, path):
        """(start, end) of blocks of a file, of BLOCK_BYTES and a little more: reads only near their ends."""
        start, near, total, window = 0, BLOCK_BYTES, os.path.getsize(path), 1 << 16
        with open(path, "rb") as file:
            while near < total:
                begin = max(0, near - self.reach - 1)
                file.seek(begin)
                data = file.read(near - begin + window + self.reach)
                cuts = (m.start() for m in self.forward.finditer(data, near - begin))
                cut = next((c for c in cuts if c < near - begin + window and not self._crossed(data, c)), None)
                if cut is not None:
                    yield start, begin + cut
                    start = begin + cut
                near = near + window if cut is None else start + BLOCK_BYTES
        yield start, total


# --- the same pre-tokens in NumPy, at ten times the speed ---

# Class of a byte. Each byte of a longer character carries the character's class. TOKEN: part of a special token.
SPACE, WHITE, LETTER, NUMBER, OTHER, TOKEN = range(6)


def _starts_one(before, here, after):
    """Whether a pre-token starts at a byte of class `here`: all of GPT-2's pattern but the contractions."""
    if here >= LETTER:    # a run of one class, and one plain space in front belongs to it
        return before not in (here, SPACE)
    # A run of white space, and again its last character when text follows: \s+(?!\S) leaves that one out.
    return before >= LETTER or LETTER <= after <= OTHER


def _classify(characters):
    """Class of each character, by the Unicode tables of the regex module (tiktoken's may be older or newer)."""
    classes = dict.fromkeys(characters, OTHER)
    for pattern, kind in (r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", WHITE), (" ", SPACE):
        classes.update(dict.fromkeys(regex.findall(pattern, characters), kind))
    return classes


_ASCII = bytes(_classify("".join(map(chr, range(128)))).values()) + bytes([OTHER] * 128)
_STARTS = bytes(k < 216 and _starts_one(k // 36, k // 6 % 6, k % 6) for k in range(256))  # 36 before + 6 here + after
_SINGLE = np.isin(np.arange(256), list(b"sdmt"))
_unicode = np.zeros(0, np.uint8)    # class of each code point, 255 where not yet asked for; 1.1 MB made on first use


def _classes_beyond_ascii(block, classes):
    """Fill in the classes of longer characters; gives the places and lengths of those that are white space."""
    global _unicode
    if not len(_unicode):
        _unicode = np.full(0x110000, 255, np.uint8)
    codes = np.frombuffer(block.decode("utf-8").encode("utf-32-le"), "<u4")
    codes = codes[codes >= 128]
    new = np.unique(codes[_unicode[codes] == 255]).tolist()
    if new:
        _unicode[new] = list(_classify("".join(map(chr, new))).values())
    lead = np.flatnonzero(np.frombuffer(block, np.uint8) >= 0xC0)
    kinds, lengths = _unicode[codes], 2 + (codes >= 0x800) + (codes >= 0x10000)
    for i in range(4):
        classes[lead[lengths > i] + i] = kinds[lengths > i]
    return lead[kinds == WHITE], lengths[kinds == WHITE]


def _boundaries(block, tokens=()):
    """Byte offsets at which pre-tokens of GPT-2's pattern start; `tokens` are the (start, end) of special tokens.

    A byte's class and its neighbours' make a number below 216, and a table of that many answers tell whether a
    pre-token starts there: two passes of bytes.translate and a few of NumPy, 1.5 ns a byte. Contractions come last.
    """
    padded = np.frombuffer(bytearray([TOKEN]) + block.translate(_ASCII) + bytes([TOKEN] * 3), np.uint8)
    classes = padded[1:-3]
    white = None if block.isascii() else _classes_beyond_ascii(block, classes)
    for start, end in tokens:
        classes[start:end] = TOKEN
    code = padded[:-4] * np.uint8(36)
    code += classes * np.uint8(6)
    code += padded[2:-2]
    flags = np.frombuffer(bytearray(code.tobytes().translate(_STARTS)) + bytes(4), np.bool_)
    if white:    # to the table each byte of a long space was a character of its own
        outside = classes[white[0]] == WHITE
        lead, length = white[0][outside], white[1][outside]
        for i in 1, 2:
            flags[lead + np.minimum(i, length - 1)] = False
        after = padded[1:][lead + length]
        flags[lead] |= (after >= LETTER) & (after <= OTHER)
    for start, _ in tokens:
        flags[start] = True
    quote = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("'"))
    quote = quote[flags[quote] & (padded[quote + 1] == OTHER) & (padded[quote + 2] == LETTER)]
    if len(quote):
        text = np.frombuffer(block + bytes(2), np.uint8)
        first, second = text[quote + 1], text[quote + 2]
        pair = (((first == ord("l")) & (second == ord("l"))) | (((first == ord("v")) | (first == ord("r")))
                & (second == ord("e")))) & (padded[quote + 3] == LETTER)
        single = _SINGLE[first]
        flags[quote[single | pair] + 1] = False
        flags[quote[single] + 2] = True
        flags[quote[pair] + 3] = True
    return np.flatnonzero(flags[:len(block)])


class _Table:
    """Numbers for pairs of uint64, whole arrays at a time: an exact hash table, linear probing, at most half full."""

    def __init__(self, bits=13):
        self.bits, self.used = bits, 0
        self.lo, self.hi = np.zeros(1 << bits, np.uint64), np.zeros(1 << bits, np.uint64)
        self.number = np.full(1 << bits, -1, np.int32)    # -1 in an empty slot

    def _slots(self, lo, hi):
        mixed = lo * np.uint64(0x9E3779B97F4A7C15) + hi * np.uint64(0xC2B2AE3D27D4EB4F)
        return (mixed >> np.uint64(64 - self.bits)).view(np.int64)

    def find(self, lo, hi):
        """The number of each pair, -1 where it has none. (0, 0) never has one."""
        slots = self._slots(lo, hi)
        numbers = self.number.take(slots)
        wrong = np.flatnonzero((self.lo.take(slots) != lo) | (self.hi.take(slots) != hi))
        while len(wrong := wrong[numbers[wrong] >= 0]):
            slots[wrong] = at = (slots[wrong] + 1) & (len(self.number) - 1)
            numbers[wrong] = self.number[at]
            wrong = wrong[(self.lo[at] != lo[wrong]) | (self.hi[at] != hi[wrong])]
        return numbers

    def add(self, lo, hi, numbers):
        """Add pairs that are distinct and not there yet."""
        if 2 * (self.used + len(lo)) > len(self.number):
            full = self.number >= 0
            old = self.lo[full], self.hi[full], self.number[full]
            self.__init__((2 * (self.used + len(lo))).bit_length())
            self.add(*old)
        self.used += len(lo)
        slots, left = self._slots(lo, hi), np.arange(len(lo))
        while len(left):
            free = self.number[slots[left]] < 0
            self.number[slots[left[free]]] = numbers[left[free]]    # of several that want one slot the last has it
            won = self.number[slots[left]] == numbers[left]
            self.lo[slots[left[won]]], self.hi[slots[left[won]]] = lo[left[won]], hi[left[won]]
            left = left[~won]
            slots[left] = (slots[left] + 1) & (len(self.number) - 1)


_LOW = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(16)], np.uint64)
_HIGH = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(16)], np.uint64)


class _Words:
    """Numbers distinct pre-tokens in order of arrival. Two uint64 hold up to 15 bytes, and their length on top; longer
    ones, one in a hundred, go through a dictionary."""

    def __init__(self, first=0):
        self.table, self.long, self.count = _Table(), {}, first

    def number(self, block, starts, lengths):
        """(number of each, -1 for length 0; lo and hi of the new short words; the new long words)."""
        text = np.ndarray(len(block) + 8, "<u8", block + bytes(16), strides=1)    # the eight bytes from each offset on
        kept = np.where(lengths > 15, 0, lengths)
        lo = text.take(starts) & _LOW[kept]
        hi = text.take(starts + 8) & _HIGH[kept] | kept.astype(np.uint64) << np.uint64(56)
        numbers = self.table.find(lo, hi)
        fresh = np.flatnonzero((numbers < 0) & (kept > 0))
        order = fresh[np.lexsort((lo[fresh], hi[fresh]))]
        lo, hi = lo[order], hi[order]
        first = np.ones(len(order), bool)
        first[1:] = (lo[1:] != lo[:-1]) | (hi[1:] != hi[:-1])
        numbers[order] = self.count - 1 + np.cumsum(first)
        lo, hi = lo[first], hi[first]
        self.table.add(lo, hi, np.arange(self.count, self.count + len(lo), dtype=np.int32))
        self.count += len(lo)
        long = []
        for i in np.flatnonzero(lengths > 15).tolist():
            word = block[starts[i]:starts[i] + lengths[i]]
            if word not in self.long:
                self.long[word] = self.count
                self.count += 1
                long.append(word)
            numbers[i] = self.long[word]
        return numbers, lo, hi, long


def _grown(array, size):
    """The array itself if it has room for `size` entries, else a copy of at least twice the length."""
    if size <= len(array):
        return array
    bigger = np.zeros(max(size, 2 * len(array)), array.dtype)
    bigger[:len(array)] = array
    return bigger


def _token_spans(block, splitter, tokens):
    return [m.span() for m in splitter.finditer(block)] if any(t in block for t in tokens) else []


# --- work shared among processes ---

def _in_order(task, path, ranges, workers, *more):
    """Yield what `task(path, ranges, *more)`, a generator, yields; shared among processes the order is that of ranges.

    The processes are plain ones that run this file. Unlike multiprocessing's they neither import the caller's script,
    which may lack its `if __name__ == "__main__"`, nor fork a process with threads; and a pipe holds back a fast one.
    """
    if workers == 1:
        yield from task(path, ranges, *more)
        return
    command = [sys.executable, os.path.abspath(__file__), "_work"]
    jobs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(workers)]
    try:
        for k, job in enumerate(jobs):
            pickle.dump((task.__name__, path, ranges[k::workers], *more), job.stdin)
            job.stdin.close()
        running = list(jobs)
        while running:
            for job in list(running):
                try:
                    kind, value = pickle.load(job.stdout)
                except EOFError:
                    raise RuntimeError(f"a worker on {path} died; its message is above; try workers=1") from None
                if kind == "error":
                    raise value
                if kind == "end":
                    running.remove(job)
                else:
                    yield value
    finally:
        for job in jobs:
            job.kill()
            job.stdout.close()
            job.wait()


def _work():
    """A worker's side of _in_order."""
    task, *arguments = pickle.load(sys.stdin.buffer)
    try:
        for value in globals()[task](*arguments):
            pickle.dump(("value", value), sys.stdout.buffer)
            sys.stdout.buffer.flush()
        pickle.dump(("end", None), sys.stdout.buffer)
    except (ValueError, TypeError, OSError) as error:
        pickle.dump(("error", error), sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _plan(path, cutter, workers):
    """(ranges, workers) for a file: None workers means all cores for one of four blocks and more."""
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers is {workers!r}; give a number from 1, or None to let the file's size decide")
    ranges = list(cutter.ranges(path))
    if workers is None:
        workers = (os.cpu_count() or 1) if len(ranges) >= 4 else 1
    return ranges, min(workers, len(ranges))


def _blocks_of(path, ranges):
    """The bytes of each range, checked to be UTF-8."""
    with open(path, "rb") as file:
        for start, end in ranges:
            file.seek(start)
            data = file.read(end - start)
            _check_utf8(data, path, start)
            yield data


def _check_utf8(data, path, start=0):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start} "
                         f"({error.reason}); convert the file to UTF-8 first") from None


# --- training ---

def _check_specials(special_tokens):
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens is the string {special_tokens!r}; give a list of strings")
    special_tokens = list(special_tokens or [])
    for token in special_tokens:
        if not isinstance(token, str):
            raise TypeError(f"a special token must be a string, got {token!r}")
        if not token or special_tokens.count(token) > 1:
            raise ValueError(f"special token {token!r} is {'given twice' if token else 'empty'}: "
                             "give every special token once, none of them empty")
    return special_tokens


def _compile(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def train_bpe(input_path, vocab_size, special_tokens=("<|endoftext|>",), *, pattern=GPT2_PATTERN, workers=None):
    """Learn a vocabulary from a UTF-8 file: (vocab: {id: bytes}, merges: pairs of bytes in the order learnt).

    vocab_size counts the 256 bytes, the merges and the special tokens, which get ids in this order. Of equally frequent
    pairs the greatest as raw bytes is merged. workers: processes that count words; None: all cores from four blocks of
    BLOCK_BYTES on. The result is the same for any number. Memory follows the number of distinct words.
    Raises ValueError (sizes, special tokens, not UTF-8), TypeError, OSError; warns when no pair is left to merge.
    """
    specials = [t.encode("utf-8") for t in _check_specials(special_tokens)]
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)):
        raise TypeError(f"vocab_size must be an int, got {vocab_size!r}")
    n_merges = int(vocab_size) - 256 - len(specials)
    if n_merges < 0:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {256 + len(specials)}: "
                         f"256 bytes and {len(specials)} special tokens")
    _compile(pattern)
    if not os.path.getsize(input_path):
        raise ValueError(f"{input_path} is empty: there is nothing to train on")
    counts = _count_words(input_path, specials, pattern, workers)
    vocab, merges = {i: bytes([i]) for i in range(256)}, []
    merger = _Merger(list(counts), list(counts.values()))
    del counts
    for a, b in tqdm(merger.run(n_merges), total=n_merges, desc="merging", unit=" merges", disable=None, leave=False):
        merges.append((vocab[a], vocab[b]))
        vocab[len(vocab)] = vocab[a] + vocab[b]
    if len(merges) < n_merges:
        warnings.warn(f"no pair is left to merge: the vocabulary has {len(vocab) + len(specials)} entries, "
                      f"not the {vocab_size} asked for; give more text or a smaller vocab_size", stacklevel=2)
    vocab.update(enumerate(specials, len(vocab)))
    return vocab, merges


def _count_words(path, specials, pattern, workers):
    """{pre-token: how often}, special tokens left out."""
    counts = Counter()
    ranges, workers = _plan(path, _Cutter(pattern, specials), workers)
    count = _count_fast if pattern in _GPT2_SPELLINGS else _count_by_regex
    with tqdm(total=ranges[-1][1], desc="counting", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for value in _in_order(count, path, ranges, workers, specials, pattern):
            if isinstance(value, int):
                bar.update(value)
            else:
                counts.update(value)
    return counts


def _count_by_regex(path, ranges, specials, pattern):
    """Yields the bytes of each range when it is done, and last a Counter. The version to read."""
    counts, compiled, split = Counter(), _compile(pattern), _alternatives(specials)
    for data in _blocks_of(path, ranges):
        for piece in split.split(data)[::2] if split else [data]:
            counts.update(_pretokens(compiled, piece.decode("utf-8")))
        yield len(data)
    yield Counter({word.encode("utf-8"): n for word, n in counts.items()})


def _count_fast(path, ranges, specials, pattern):
    """The same in NumPy: words become numbers, and numbers are counted."""
    words, totals, names = _Words(), np.zeros(1 << 12, np.int64), []
    cutter, splitter = _Cutter(pattern, specials), _alternatives(specials)
    for data in _blocks_of(path, ranges):
        for block in cutter.blocks(data):
            spans = _token_spans(block, splitter, specials)
            starts = _boundaries(block, spans)
            lengths = np.diff(starts, append=len(block))
            lengths[np.searchsorted(starts, [s for s, _ in spans])] = 0
            numbers, lo, hi, long = words.number(block, starts, lengths)
            raw = np.stack([lo, hi], 1).astype("<u8").tobytes()
            names += (raw[16 * i:16 * i + n] for i, n in enumerate((hi >> np.uint64(56)).tolist()))
            names += long
            totals = _grown(totals, words.count)
            np.add.at(totals, numbers[numbers >= 0], 1)
        yield len(data)
    yield Counter(dict(zip(names, totals.tolist())))


class _Merger:
    """Yields the most frequent pair of neighbouring symbols, merges it everywhere, and again.

    Distinct words lie end to end in one array, linked by `nxt` and `prv`, parted by the symbol -1. Two facts keep it
    small. A pair comes into being at one moment, when the later of its two symbols is made, so its places are listed
    once. And from then on it only gets rarer, so a heap of counts that are too high is enough: the top is counted
    again when it is reached. The pairs of one moment wait in the heap as one entry, and most never leave it.
    """

    def __init__(self, words, counts):
        lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
        self.sym = np.frombuffer(b"\0" + b"".join(word + b"\0" for word in words), np.uint8).astype(np.int32)
        self.sym[0] = self.sym[np.cumsum(lengths)] = -1
        self.freq = np.concatenate([[0], np.repeat(np.array(counts, np.int64), lengths)])
        self.nxt, self.prv = np.arange(1, len(self.sym) + 1), np.arange(-1, len(self.sym) - 1)
        # Ties go to the greatest pair of byte strings, heapq gives the least: bytes upside down, and an end above all.
        self.order = [chr(255 - i) + "\u0100" for i in range(256)]
        self.heap = []
        first = np.flatnonzero((self.sym[:-1] >= 0) & (self.sym[1:] >= 0))
        self._add_pairs((self.sym[first] * 256 + self.sym[first + 1]).astype(np.uint16), first)    # 16 bits: radix sort

    def run(self, n_merges):
        """Yield up to n_merges pairs of symbols; the new symbols are 256, 257, …"""
        for _ in range(n_merges):
            pair = self._pop()
            if pair is None:
                return
            a, b, places = pair
            self.order.append(self.order[a][:-1] + self.order[b])
            self._merge(a, b, places)
            yield a, b

    def _pop(self):
        """(a, b, places) of the pair with the largest true count, or None when there is none."""
        while self.heap:
            count, order, a, b, places = heapq.heappop(self.heap)
            if not order:
                self._take_apart(a, b, places)
                continue
            places = places[(self.sym[places] == a) & (self.sym[self.nxt[places]] == b)]
            now = int(self.freq[places].sum())
            if now == -count:
                return a, b, places
            if now:
                heapq.heappush(self.heap, (-now, order, a, b, places))

    def _merge(self, a, b, places):
        sym, nxt, prv, new = self.sym, self.nxt, self.prv, len(self.order) - 1
        if a == b:    # in "aaa" the pairs overlap: every other one of a run, from its left
            breaks = np.flatnonzero(np.concatenate([[True], places[1:] != nxt[places[:-1]]]))
            runs = np.arange(len(places)) - np.repeat(breaks, np.diff(breaks, append=len(places)))
            places = places[runs % 2 == 0]
        second = nxt[places]
        after = nxt[second]
        sym[places], sym[second] = new, -2
        nxt[places], prv[after] = after, places
        before = prv[places]
        left, right = sym[before].astype(np.int64), sym[after].astype(np.int64)
        # New neighbours: (left, new) and (new, right); (new, new) is seen once, from its left.
        keys = np.concatenate([left * len(self.order) + new, new * len(self.order) + right])
        where = np.concatenate([before, places])
        keep = np.concatenate([(left >= 0) & (left != new), right >= 0])
        self._add_pairs(keys[keep], where[keep])

    def _add_pairs(self, keys, where):
        """List the places of new pairs; the key of (a, b) is a · (number of symbols) + b."""
        if not len(keys):
            return
        by_key = np.argsort(keys, kind="stable")
        keys, where = keys[by_key], where[by_key]
        del by_key    # at first as large as the words
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        ends = np.append(starts[1:], len(where))
        counts = np.add.reduceat(self.freq[where], starts)
        self._wait(len(self.order), where, np.stack([counts, keys[starts], starts, ends]))

    def _wait(self, n_symbols, where, table):
        # Without an order it comes before the pairs of its largest count, and is taken apart in time.
        heapq.heappush(self.heap, (-int(table[0].max()), "", n_symbols, where, table))

    def _take_apart(self, n_symbols, where, table):
        """Put the pairs that have half the largest count into the heap by themselves; the others wait on."""
        often = 2 * table[0] >= table[0].max()
        for count, key, start, end in table[:, often].T.tolist():
            a, b = divmod(key, n_symbols)
            heapq.heappush(self.heap, (-count, self.order[a] + self.order[b], a, b, where[start:end]))
        if not often.all():
            self._wait(n_symbols, where, table[:, ~often])


# --- the tokenizer ---

def _gpt2_alphabet():
    """GPT-2 writes bytes as printable characters: those that are one as themselves, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_TO_CHAR = _gpt2_alphabet()
_TO_BYTE = {c: b for b, c in _TO_CHAR.items()}


def _to_text(token):
    return "".join(map(_TO_CHAR.__getitem__, token))


def _to_bytes(text):
    return bytes(map(_TO_BYTE.__getitem__, text))


class _FastEncoder:
    """Encodes with GPT-2's pattern in NumPy. A distinct word is merged once, all the new ones of a block together."""
    KEPT_WORDS = 1 << 20    # then it starts afresh, so that endless text needs no endless memory

    def __init__(self, tokenizer, splitter, tokens):
        self.tokenizer, self.splitter, self.tokens = tokenizer, splitter, tokens
        self.lock = threading.Lock()
        self.byte_ids = np.array([tokenizer._id[bytes([b])] for b in range(256)], np.int32)
        self.products = np.array([new for _, new in tokenizer._ranks.values()] + [-1], np.int32)
        self.pairs = _Table()
        pairs = np.array(list(tokenizer._ranks), np.uint64).reshape(-1, 2)
        self.pairs.add(pairs[:, 0], pairs[:, 1] + np.uint64(1), np.arange(len(pairs), dtype=np.int32))
        self.byte_pairs = self._ranks(self.byte_ids[:, None].repeat(256, 1).ravel(), np.tile(self.byte_ids, 256))
        self.byte_pairs = self.byte_pairs.astype(np.int32).reshape(256, 256)
        self._forget()

    def _forget(self):
        # Word number n has the ids flat[offset[n]:offset[n] + count[n]]. The first numbers are the special tokens'.
        self.numbers = {token: n for n, token in enumerate(self.tokens)}
        self.words, self.n_flat = _Words(first=len(self.tokens)), len(self.tokens)
        self.flat = np.array(list(self.tokens.values()), np.int32)
        self.offset, self.count = np.arange(len(self.tokens)), np.ones(len(self.tokens), np.int64)

    def encode(self, data):
        with self.lock:
            return np.concatenate([self._encode(block) for block in self.tokenizer._cutter.blocks(data)])

    def _encode(self, block):
        if self.words.count > self.KEPT_WORDS:
            self._forget()
        spans = _token_spans(block, self.splitter, self.tokens)
        starts = _boundaries(block, spans)
        lengths = np.diff(starts, append=len(block))
        at = np.searchsorted(starts, [start for start, _ in spans])
        lengths[at] = 0
        known = self.words.count
        numbers, lo, hi, long = self.words.number(block, starts, lengths)
        numbers[at] = [self.numbers[block[start:end]] for start, end in spans]
        if self.words.count > known:
            self._learn(known, lo, hi, long)
        counts = self.count.take(numbers)
        ends = np.cumsum(counts)
        shift = self.offset.take(numbers) - ends + counts
        return self.flat.take(np.repeat(shift, counts) + np.arange(ends[-1] if len(ends) else 0))

    def _learn(self, known, lo, hi, long):
        ids, counts = self._merge_short(lo, hi)
        long_ids = [self.tokenizer._merge_word(word) for word in long]
        counts = np.concatenate([counts, np.fromiter(map(len, long_ids), np.int64, len(long_ids))])
        ids = np.concatenate([ids, np.array([i for word in long_ids for i in word], np.int32)])
        self.flat = _grown(self.flat, self.n_flat + len(ids))
        self.flat[self.n_flat:self.n_flat + len(ids)] = ids
        self.offset, self.count = _grown(self.offset, self.words.count), _grown(self.count, self.words.count)
        self.offset[known:self.words.count] = self.n_flat + np.cumsum(counts) - counts
        self.count[known:self.words.count] = counts
        self.n_flat += len(ids)

    def _ranks(self, a, b):
        found = self.pairs.find(a.astype(np.uint64), (b + 1).astype(np.uint64))
        return np.where(found < 0, len(self.products), found)

    def _merge_short(self, lo, hi):
        """(ids one word after another, their number for each word). Each round merges, in every word that has a pair
        left to merge, the leftmost one of lowest rank: what _merge_word does, for all of them at once."""
        columns, none = np.arange(16), len(self.products)
        text = np.stack([lo, hi], 1).astype("<u8").view(np.uint8)
        lengths = text[:, 15:]
        symbols = np.where(columns < lengths, self.byte_ids[text], -1)
        ranks = np.full(symbols.shape, none, np.int32)    # of the symbol and the one after it
        ranks[:, :-1] = np.where(columns[1:] < lengths, self.byte_pairs[text[:, :-1], text[:, 1:]], none)
        active = np.arange(len(symbols))
        while len(active):
            place = ranks[active].argmin(1)
            best = ranks[active, place]
            going = best < none
            active, place, best = active[going], place[going], best[going]
            rows = np.arange(len(active))
            moved = np.minimum(columns + (columns > place[:, None]), 15) + 16 * active[:, None]
            now, rank = symbols.take(moved), ranks.take(moved)
            now[rows, place] = merged = self.products[best]
            rank[rows, place] = self._ranks(merged, now[rows, place + 1])
            inner = np.flatnonzero(place)
            rank[inner, place[inner] - 1] = self._ranks(now[inner, place[inner] - 1], merged[inner])
            symbols[active], ranks[active] = now, rank
        return symbols[symbols >= 0], (symbols >= 0).sum(1)


class Tokenizer:
    """Text to ids and back with a given vocabulary and merges.

    vocab: {id: bytes}; merges: pairs of bytes, first learnt first. Special tokens that the vocabulary lacks are
    appended; of those that overlap in a text the longest wins. Raises ValueError for one that is empty or given twice.
    """

    def __init__(self, vocab, merges, special_tokens=None, *, pattern=GPT2_PATTERN):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(m) for m in merges], pattern
        self._id, last = {}, {}
        for i, token in self.vocab.items():
            if not isinstance(token, bytes) or isinstance(i, bool) or not isinstance(i, (int, np.integer)):
                raise TypeError(f"vocab must map int to bytes, got {i!r}: {token!r}")
            if not 0 <= i < 2 ** 31 or not token:
                raise ValueError(f"vocab entry {i}: {token!r}: ids run from 0 to 2**31 - 1 and no token is empty")
            self._id.setdefault(token, int(i))
            last[token] = int(i)
        self.special_tokens, self.vocab_size = {}, max(self.vocab, default=-1) + 1    # so ids with gaps fit too
        for text in _check_specials(special_tokens):
            token = text.encode("utf-8")
            if token not in last:
                last[token] = self.vocab_size
                self.vocab[self.vocab_size] = token
                self.vocab_size += 1
            self.special_tokens[text] = last[token]
        self._ranks = {}    # (id, id) -> (rank, id of the two together)
        for rank, (a, b) in enumerate(self.merges):
            missing = [t for t in (a, b, a + b) if t not in self._id]
            if missing or (self._id[a], self._id[b]) in self._ranks:
                raise ValueError(f"merge {rank}, of {a!r} and {b!r}: "
                                 + (f"{missing[0]!r} is not in the vocabulary" if missing else "it stands there twice"))
            self._ranks[self._id[a], self._id[b]] = rank, self._id[a + b]
        self._added = {}              # text -> id, found in any text: Hugging Face's added tokens that are not special
        self._normalizer = None       # None or "NFC"
        self._ignore_merges = False   # Llama 3: a pre-token that is in the vocabulary is one token
        self._post_processor = None   # only kept, for save
        self._prepare()

    def _prepare(self):
        self._regex = _compile(self.pattern)
        self._cutter = _Cutter(self.pattern, [t.encode("utf-8") for t in (*self.special_tokens, *self._added)])
        self._cache, self._splitters, self._fast = {}, {}, {}
        self._alone = bytearray(max(self.vocab_size, 1))    # 1 where a token is known to encode to itself
        self._can_be_fast = (self.pattern in _GPT2_SPELLINGS and not self._normalizer and not self._ignore_merges
                             and all(bytes([b]) in self._id for b in range(256)))

    def __getstate__(self):
        return {**self.__dict__, "_fast": {}}    # which holds a lock

    # -- encoding --

    def encode(self, text, allowed_special="all"):
        """The ids of `text`, a list. allowed_special: "all", or the set of special tokens that may become control ids;
        the others are plain text. Raises ValueError for half a surrogate pair, and for a byte the vocabulary lacks."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a string, got {type(text).__name__}")
        allowed = self.special_tokens.keys() if allowed_special == "all" else allowed_special
        if isinstance(allowed, str) or not set(allowed) <= self.special_tokens.keys():
            raise ValueError(f'allowed_special is {allowed_special!r}; give "all" or a set of those that there are: '
                             f"{sorted(self.special_tokens)}")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds half a surrogate pair, {text[error.start]!r} at character {error.start}, "
                             "which UTF-8 cannot write; replace it first") from None
        ids = self._encode_bytes(data, frozenset(allowed))
        return ids if isinstance(ids, list) else ids.tolist()

    def _tokens(self, allowed):
        """(pattern of the special tokens in `allowed` and of all added ones, or None; {bytes: id})."""
        if allowed not in self._splitters:
            tokens = {t.encode("utf-8"): i for t, i in self.special_tokens.items() if t in allowed}
            tokens.update((t.encode("utf-8"), i) for t, i in self._added.items())
            self._splitters[allowed] = _alternatives(tokens), tokens
        return self._splitters[allowed]

    def _encode_bytes(self, data, allowed):
        """The ids as a list, or from the fast path as an array."""
        if not self._can_be_fast or len(data) < FAST_BYTES:
            return self._encode_by_regex(data, allowed)
        if allowed not in self._fast:
            self._fast[allowed] = _FastEncoder(self, *self._tokens(allowed))
        return self._fast[allowed].encode(data)

    def _encode_by_regex(self, data, allowed):
        """The version to read: special tokens split the text, the regex cuts it, each piece is merged by itself."""
        ids, cache, alone, (splitter, tokens) = [], self._cache, self._alone, self._tokens(allowed)
        for i, part in enumerate(splitter.split(data) if splitter else [data]):
            if i % 2:
                ids.append(tokens[part])
                continue
            text = part.decode("utf-8")
            for piece in _pretokens(self._regex, unicodedata.normalize("NFC", text) if self._normalizer else text):
                found = cache.get(piece)
                if found is None:
                    word = piece.encode("utf-8")
                    token = self._id.get(word, 0)
                    if alone[token] and self.vocab[token] == word:
                        ids.append(token)
                        continue
                    found = self._merge_word(word)
                    if len(found) == 1:
                        alone[found[0]] = 1
                    elif len(word) < 64:
                        if len(cache) >= CACHED_WORDS:
                            cache.clear()
                        cache[piece] = found
                ids += found
        return ids

    def _merge_word(self, word):
        """Ids of one pre-token: merge the leftmost pair of lowest rank, again and again.

        The heap holds the mergeable pairs, the symbols are a linked list, so n bytes cost O(n log n).
        """
        if self._ignore_merges and word in self._id:
            return [self._id[word]]
        try:
            ids = [self._id[word[i:i + 1]] for i in range(len(word))]
        except KeyError as error:
            raise ValueError(f"the vocabulary has no token for the byte {error.args[0]!r} of {word[:50]!r}") from None
        ranks, n = self._ranks, len(ids)
        nxt, prv = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(ranks[pair], i, pair) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            (_, new), i, (a, b) = heapq.heappop(heap)
            j = nxt[i]
            if ids[i] != a or j == n or ids[j] != b:
                continue    # one of the two was merged with its other neighbour in the meantime
            ids[i], ids[j], nxt[i] = new, -1, nxt[j]
            if nxt[i] < n:
                prv[nxt[i]] = i
            for left, right in ((prv[i], i), (i, nxt[i])):
                if left >= 0 and right < n and (pair := (ids[left], ids[right])) in ranks:
                    heapq.heappush(heap, (ranks[pair], left, pair))
        return [i for i in ids if i >= 0]

    def encode_iterable(self, chunks):
        """Yield the ids of the joined strings, holding back only what a later chunk could change.

        Memory does not grow with the text (test: under 1 MB for 5 MB), so this takes the small regex path; `encode` is
        faster. A pre-token is held whole, and with a pattern that is neither GPT-2's nor GPT-4's everything up to the
        next special token is.
        """
        held, size, enough, allowed = [], 0, STREAM_CHARS, frozenset(self.special_tokens)
        for chunk in chunks:
            if not isinstance(chunk, str):
                raise TypeError(f"encode_iterable takes strings, got {type(chunk).__name__}")
            for start in range(0, len(chunk), STREAM_CHARS):
                held.append(chunk[start:start + STREAM_CHARS])
                size += len(held[-1])
                if size >= enough:
                    data = "".join(held).encode("utf-8")
                    cut = self._cutter.last(data)
                    yield from self._encode_by_regex(data[:cut], allowed)
                    held = [data[cut:].decode("utf-8")]
                    size = len(held[0])
                    enough = max(STREAM_CHARS, 2 * size)    # doubling: text without a cut is still looked at O(1) times
        yield from self._encode_by_regex("".join(held).encode("utf-8"), allowed)

    def encode_file(self, text_path, bin_path, *, workers=None):
        """Write the ids of a UTF-8 file as raw little-endian uint16, or uint32 above 65,536 ids; returns their number.

        The same ids as encode of the whole text, its line ends kept. Streamed, by all cores when the file has four
        blocks or more and workers is None; bin_path appears whole or not at all. Raises ValueError if it is not UTF-8.
        """
        dtype, total = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4"), 0
        ranges, workers = _plan(text_path, self._cutter, workers)
        with (_whole_file(bin_path) as out,
              tqdm(total=ranges[-1][1], desc="encoding", unit="B", unit_scale=True, disable=None, leave=False) as bar):
            for size, ids in _in_order(_encode_ranges, text_path, ranges, workers, self, dtype):
                out.write(ids)
                total += len(ids) // dtype.itemsize
                bar.update(size)
        return total

    # -- decoding --

    def decode_bytes(self, ids):
        """The bytes of `ids`, integers of any kind, NumPy's and torch's too."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join(map(self.vocab.__getitem__, map(operator.index, ids)))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in the vocabulary: "
                             f"ids run from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids):
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -- files --

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """From GPT-2's vocab.json and merges.txt, which keep their own ids."""
        vocab = _read_json(vocab_path)
        with open(merges_path, "rb") as file:
            lines = _check_utf8(file.read(), merges_path).splitlines()
        try:
            merges = _merges_from_text([line for line in lines if line and not line.startswith("#version")])
            return cls(_vocab_from_text(vocab, special_tokens or []), merges, special_tokens)
        except ValueError as error:
            raise ValueError(f"{vocab_path} and {merges_path} are no vocab.json and merges.txt: {error}") from None

    @classmethod
    def load(cls, path):
        """From a tokenizer.json in Hugging Face's layout: byte-level BPE as GPT-2, Llama 3 or Qwen 2 have it.

        A post_processor is kept but not applied: the ids are those of encode(..., add_special_tokens=False).
        Raises ValueError naming the path and the part that would change ids and is not understood.
        """
        layout = _read_json(path)
        try:
            return _from_layout(cls, layout)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no tokenizer.json that this tokenizer understands: {what}") from None

    def save(self, path):
        """Write tokenizer.json, which Hugging Face's tokenizers reads and gives the same ids."""
        added = {**self.special_tokens, **self._added}
        names, vocab = {i: text for text, i in added.items()}, {}
        for i, token in sorted(self.vocab.items()):
            name = names.get(i) or _to_text(token)
            if name in vocab:
                raise ValueError(f"tokens {vocab[name]} and {i} are both {name!r}; tokenizer.json can hold it once")
            vocab[name] = i
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        layout = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": text in self.special_tokens}
                             for i, text in sorted(names.items())],
            "normalizer": {"type": self._normalizer} if self._normalizer else None,
            "pre_tokenizer": level if self.pattern in _GPT2_SPELLINGS else
                {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]},
            "post_processor": self._post_processor, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": self._ignore_merges, "vocab": vocab,
                      "merges": [f"{_to_text(a)} {_to_text(b)}" for a, b in self.merges]}}
        with _whole_file(path) as file:
            file.write(json.dumps(layout, ensure_ascii=False, indent=1).encode("utf-8"))


def _encode_ranges(path, ranges, tokenizer, dtype):
    """(bytes of text, bytes of ids) of each range."""
    for data in _blocks_of(path, ranges):
        ids = tokenizer._encode_bytes(data, frozenset(tokenizer.special_tokens))
        yield len(data), np.asarray(ids, dtype).tobytes()


@contextlib.contextmanager
def _whole_file(path):
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# --- files of others ---

def _read_json(path):
    with open(path, "rb") as file:
        text = _check_utf8(file.read(), path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _vocab_from_text(vocab, added):
    """{text in GPT-2's alphabet: id} -> {id: bytes}; the texts in `added` are written plainly."""
    tokens = {}
    if not isinstance(vocab, dict):
        raise ValueError(f"the vocabulary is a {type(vocab).__name__}, not an object of text and id")
    for text, i in vocab.items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0 or i in tokens:
            raise ValueError(f"vocabulary entry {text!r} has the id {i!r}: ids are integers from 0, each given once")
        try:
            tokens[i] = text.encode("utf-8") if text in added else _to_bytes(text)
        except KeyError as error:
            raise ValueError(f"vocabulary entry {text!r} (id {i}) holds {error.args[0]!r}, which is no byte in "
                             "GPT-2's alphabet: not a byte-level vocabulary") from None
    return tokens


def _merges_from_text(merges):
    """["a b", …] or [["a", "b"], …] -> pairs of bytes."""
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            a, b = map(_to_bytes, pair)
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"merge {len(pairs)} is {merge!r}; it must be two tokens in GPT-2's alphabet") from None
        pairs.append((a, b))
    return pairs


def _only(part, value, *allowed):
    """`value` if it is one of `allowed`; anything else would change ids, so it is refused by name."""
    if value not in allowed:
        raise ValueError(f"{part} is {value!r}; understood: {' or '.join(map(repr, allowed))}")
    return value


def _layout_pattern(section):
    """The pattern of a pre_tokenizer section."""
    steps = section["pretokenizers"] if section["type"] == "Sequence" else [section]
    _only("pre_tokenizer", [s["type"] for s in steps], ["ByteLevel"], ["Split", "ByteLevel"])
    _only("pre_tokenizer's add_prefix_space", steps[-1].get("add_prefix_space", True), False)
    _only("pre_tokenizer's use_regex", steps[-1].get("use_regex", True), len(steps) == 1)
    if len(steps) == 1:
        return GPT2_PATTERN
    _only("pre_tokenizer's Split behavior", steps[0]["behavior"], "Isolated")
    _only("pre_tokenizer's Split invert", steps[0].get("invert", False), False)
    pattern = steps[0]["pattern"]
    return pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])


def _from_layout(cls, layout):
    """A Tokenizer from the parsed tokenizer.json."""
    model, added = layout["model"], layout.get("added_tokens") or []
    _only("model's type", model.get("type", "BPE"), "BPE")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        _only(f"model's {key}", model.get(key) or None, None)
    for key in ("truncation", "padding"):
        _only(key, layout.get(key), None)
    normalizer = layout.get("normalizer")
    while normalizer and normalizer["type"] == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = (normalizer["normalizers"] or [None])[0]
    normalizer = normalizer and _only("normalizer", normalizer["type"], "NFC")
    if layout.get("decoder"):
        _only("decoder", layout["decoder"]["type"], "ByteLevel")
    for token in added:
        # Found before normalising or after is the same only where nothing is normalised.
        for key in ("single_word", "lstrip", "rstrip", *(["normalized"] if normalizer else [])):
            _only(f"{key} of the added token {token['content']!r}", token.get(key, False), False)
    vocab = _vocab_from_text(model["vocab"], {t["content"] for t in added})
    for token in added:
        _only(f"id {token['id']}, which added_tokens give to {token['content']!r}, in the vocabulary",
              vocab.setdefault(token["id"], token["content"].encode("utf-8")), token["content"].encode("utf-8"))
    special = [t["content"] for t in added if t.get("special")]
    pattern = _layout_pattern(layout["pre_tokenizer"])
    tokenizer = cls(vocab, _merges_from_text(model["merges"]), special, pattern=pattern)
    tokenizer._added = {t["content"]: t["id"] for t in added if not t.get("special")}
    tokenizer._normalizer, tokenizer._ignore_merges = normalizer, bool(model.get("ignore_merges"))
    tokenizer._post_processor = layout.get("post_processor")
    tokenizer._prepare()
    return tokenizer


# --- the three that BPE replaces ---

class CharTokenizer:
    """One id a character: those of `text` in order, and one more for the unknown; without text, the code point."""

    def __init__(self, text=None):
        self.characters = None if text is None else sorted(set(text))
        self.vocab_size = 0x110000 if text is None else len(self.characters) + 1
        self.unknown_id = None if text is None else len(self.characters)
        self._ids = None if text is None else {c: i for i, c in enumerate(self.characters)}

    def encode(self, text):
        return [ord(c) for c in text] if self._ids is None else [self._ids.get(c, self.unknown_id) for c in text]

    def decode(self, ids):
        table = None if self._ids is None else [*self.characters, "\ufffd"]
        return "".join(chr(i) if table is None else table[i] for i in _checked(ids, self.vocab_size))


class ByteTokenizer:
    """One id a byte of UTF-8: nothing is ever unknown, and nothing is ever short."""
    vocab_size, unknown_id = 256, None

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(_checked(ids, 256)).decode("utf-8", errors="replace")


class WordTokenizer:
    """One id a pre-token of `text`, the most frequent first; id 0 stands for every word never seen."""
    unknown_id = 0

    def __init__(self, text="", vocab_size=None, *, pattern=GPT2_PATTERN):
        self._regex = _compile(pattern)
        counts = Counter(_pretokens(self._regex, text)).most_common(None if vocab_size is None else vocab_size - 1)
        self.words = ["<unk>", *(word for word, _ in counts)]
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words) if i}

    def encode(self, text):
        return [self._ids.get(word, self.unknown_id) for word in _pretokens(self._regex, text)]

    def decode(self, ids):
        return "".join(self.words[i] for i in _checked(ids, self.vocab_size))


def _checked(ids, vocab_size):
    ids = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"id {i} is not in the vocabulary: ids run from 0 to {vocab_size - 1}")
    return ids


def compression_ratio(text, tokenizer):
    """Bytes of UTF-8 per token.

    >>> compression_ratio("I love LLM", CharTokenizer())
    1.0
    """
    if not text:
        raise ValueError("compression_ratio of empty text: give at least one character")
    return len(text.encode("utf-8")) / len(tokenizer.encode(text))


# --- command line ---

def cmd_train(file, *, vocab_size=32000, out="tokenizer.json", special_tokens="<|endoftext|>", workers=0):
    """learn a vocabulary from FILE and write it as tokenizer.json"""
    specials = [t for t in special_tokens.split(",") if t]
    begin = time.perf_counter()
    vocab, merges = train_bpe(file, vocab_size, specials, workers=workers or None)
    Tokenizer(vocab, merges, specials).save(out)
    print(f"{out}: {len(vocab)} tokens, {len(merges)} merges, {time.perf_counter() - begin:.2f} s")


def cmd_encode(tokenizer, file, *, out="", workers=0):
    """write the ids of FILE as uint16 or uint32, by default to FILE.bin"""
    begin, size, out = time.perf_counter(), os.path.getsize(file), out or f"{file}.bin"
    n = Tokenizer.load(tokenizer).encode_file(file, out, workers=workers or None)
    seconds = time.perf_counter() - begin
    print(f"{out}: {n:,} tokens, {size / max(n, 1):.3f} bytes per token, {size / seconds / 1e6:.1f} MB/s")


def cmd_show(tokenizer, text):
    """print the pieces of TEXT in colour with their ids, and the merges that made them, step by step"""
    tok, painted = Tokenizer.load(tokenizer), []
    for n, i in enumerate(tok.encode(text)):
        piece = tok.vocab[i].decode("utf-8", errors="replace").replace("\n", "\\n")
        painted.append(f"\x1b[30;48;5;{(153, 157, 223, 217, 183)[n % 5]}m{piece}\x1b[0m" + f" {i} ")
    print("".join(painted))
    splitter, _ = tok._tokens(frozenset(tok.special_tokens))
    parts = splitter.split(text.encode("utf-8"))[::2] if splitter else [text.encode("utf-8")]
    for word in dict.fromkeys(w for part in parts for w in _pretokens(tok._regex, part.decode("utf-8"))):
        print()
        for rank, symbols in merge_steps(tok, word.encode("utf-8")):
            print("bytes      " if rank is None else f"merge {rank:<5}", " ".join(map(_to_text, symbols)))


def merge_steps(tokenizer, word):
    """Yield (rank, pieces) from the bytes of one pre-token on, a merge at a time: BPE as one says it, in O(n²)."""
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    pieces, rank = [word[i:i + 1] for i in range(len(word))], None
    while True:
        yield rank, pieces
        found = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:])) if pair in ranks]
        if not found:
            return
        rank, i = min(found)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2:]]


def cmd_compare(file, *, sizes="300,1000,4000,16000"):
    """one table: characters, bytes, words and BPE, made on nine tenths of FILE, measured on the last"""
    with open(file, "rb") as source:
        text = _check_utf8(source.read(), file)
    known, rest = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    if not rest:
        raise ValueError(f"{file} is empty: give a text to compare on")
    rows = [("characters", CharTokenizer(known)), ("bytes", ByteTokenizer()), ("words", WordTokenizer(known))]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "known.txt")
        with open(path, "wb") as out:
            out.write(known.encode("utf-8"))
        rows += [(f"BPE {size}", Tokenizer(*train_bpe(path, int(size), []))) for size in sizes.split(",")]
    gpt2 = _tiktoken_gpt2()
    rows += [("GPT-2 (tiktoken)", gpt2)] if gpt2 else []
    print(f"{'tokenizer':18}{'vocabulary':>11}{'tokens':>12}{'bytes/token':>13}{'unknown':>9}{'encode MB/s':>13}")
    for name, tok in rows:
        begin = time.perf_counter()
        ids = tok.encode(rest) if hasattr(tok, "vocab_size") else tok.encode_ordinary(rest)
        speed = len(rest.encode("utf-8")) / (time.perf_counter() - begin) / 1e6
        unknown = getattr(tok, "unknown_id", None)
        share = sum(i == unknown for i in ids) / len(ids)
        size = tok.vocab_size if hasattr(tok, "vocab_size") else tok.n_vocab
        print(f"{name:18}{size:11,}{len(ids):12,}{len(rest.encode('utf-8')) / len(ids):13.2f}{share:9.2%}{speed:13.1f}")


def _tiktoken_gpt2():
    """GPT-2's encoding if tiktoken is installed and has it in its cache; it is never fetched."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), "data-gym-cache")
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    if not os.path.exists(os.path.join(folder, hashlib.sha1(address.encode()).hexdigest())):
        return print(f"GPT-2 left out: not in tiktoken's cache {folder}")
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except (ImportError, OSError) as error:
        return print(f"GPT-2 left out: {error}")


def cmd_bench(file, *, vocab_size=32000, tokenizer="", megabytes=10, repeats=5):
    """time training on FILE, then encoding of its first MEGABYTES, beside Hugging Face and tiktoken; ids must agree"""
    import platform
    import tiktoken
    import tokenizers
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, tiktoken {tiktoken.__version__}, "
          f"tokenizers {tokenizers.__version__}, {os.cpu_count()} cores, {file}: {os.path.getsize(file) / 1e6:.1f} MB")
    tok = Tokenizer.load(tokenizer) if tokenizer else _bench_training(file, vocab_size, tokenizers)
    if tok.pattern not in _GPT2_SPELLINGS or tok._normalizer:
        raise ValueError(f"{tokenizer} has the pattern {tok.pattern!r}; bench is for GPT-2's")
    with open(file, "rb") as source:
        text = source.read(int(megabytes * 1e6)).decode("utf-8", errors="ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tokenizer.json")
        tok.save(path)
        theirs = tokenizers.Tokenizer.from_file(path)
        theirs.encode_special_tokens = True    # as plain text, like encode_ordinary
        tok = Tokenizer.load(path)    # a fresh one: its first run has every word to merge
    plain = {token: i for i, token in tok.vocab.items() if i not in tok.special_tokens.values()}
    rival = tiktoken.Encoding("bench", pat_str=_GPT2_SPELLINGS[2], mergeable_ranks=plain,
                              special_tokens=tok.special_tokens)
    runs = {"ours": lambda: tok.encode(text, set()), "tiktoken": lambda: rival.encode_ordinary(text),
            "Hugging Face": lambda: theirs.encode_batch_fast([text], add_special_tokens=False)[0].ids}
    seconds, reference = {name: [] for name in runs}, None
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            ids = run()
            seconds[name].append(time.perf_counter() - begin)
            reference = reference or ids
            if ids != reference:
                raise ValueError(f"{name}'s ids differ from ours")
    size = len(text.encode("utf-8")) / 1e6
    print(f"encoding {size:.1f} MB, vocabulary {tok.vocab_size:,}, one process, {len(reference):,} equal ids")
    for name, times in seconds.items():
        first, median, best = (size / t for t in (times[0], sorted(times)[len(times) // 2], min(times)))
        print(f"  {name:14} first {first:6.1f} MB/s   median {median:6.1f} MB/s   best {best:6.1f} MB/s")


def _bench_training(file, vocab_size, tokenizers):
    begin = time.perf_counter()
    vocab, merges = train_bpe(file, vocab_size, ["<|endoftext|>"])
    ours, peak = time.perf_counter() - begin, "unknown on this system"
    if sys.platform != "win32":
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        own, child = (resource.getrusage(who).ru_maxrss * unit / 1e6
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        peak = f"{own:.0f} MB, and {child:.0f} MB in the largest worker"
    rival = tokenizers.Tokenizer(tokenizers.models.BPE())
    rival.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    begin = time.perf_counter()
    rival.train([file], trainer)
    theirs = time.perf_counter() - begin
    print(f"training, vocabulary {vocab_size:,}\n  ours          {ours:6.2f} s, peak memory {peak}\n"
          f"  Hugging Face  {theirs:6.2f} s, {theirs / ours:.1f} times as long")
    return Tokenizer(vocab, merges, ["<|endoftext|>"])


COMMANDS = {name[4:]: value for name, value in list(globals().items()) if name.startswith("cmd_")}
KEYS = {"vocab_size": "bytes, merges and special tokens together", "out": "file to write",
        "special_tokens": "comma between them", "workers": "processes; 0 lets the file's size decide",
        "sizes": "vocabulary sizes, comma between them", "tokenizer": "a tokenizer.json to use",
        "megabytes": "how much of FILE is encoded", "repeats": "how often, in turns"}


def main(arguments=None):
    """Run VERB ARGUMENTS --key=value. Exits with 1 for a bad file or value, 2 for a bad command line."""
    parser = argparse.ArgumentParser(prog="bpe.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs, keys = parser.add_subparsers(dest="verb", required=True, metavar="VERB"), {}
    for verb, command in COMMANDS.items():
        sub = verbs.add_parser(verb, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        for p in inspect.signature(command).parameters.values():
            if p.default is p.empty:
                sub.add_argument(p.name, metavar=p.name.upper())
            else:
                sub.add_argument(f"--{p.name}", default=p.default, type=type(p.default), metavar="VALUE",
                                 help=f"{KEYS[p.name]} (default: {p.default})")
                keys.setdefault(verb, []).append(f"--{p.name}")
        parser.epilog = (parser.epilog or "") + "\n" + sub.format_help()
    options, unknown = parser.parse_known_args(arguments)
    options = vars(options)
    verb = options.pop("verb")
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], keys.get(verb, []), 1, 0)
        parser.error(f"{verb} does not know {unknown[0]!r}; the nearest is {near or 'nothing: it takes no keys'}")
    try:
        COMMANDS[verb](**options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"bpe.py {verb}: {error}")


if __name__ == "__main__":
    for stream in sys.stdout, sys.stderr:    # what a terminal cannot show becomes a question mark
        stream.reconfigure(errors="replace")
    _work() if sys.argv[1:] == ["_work"] else main()
