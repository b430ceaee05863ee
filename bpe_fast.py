"""BPE's slow jobs: cutting text into words and counting them, learning merges, merging words.

Why: Python needs 100 ns for every word that it touches, and 10 MB of text hold two million. bpe.c does each job in
plain C, several times as fast as tiktoken and Hugging Face; this page hands it whole texts. Without a compiler (see
native.py), and for patterns that C does not know, regex cuts and Python merges, here and in bpe.py; tests compare.

    cutting     GPT-2's and GPT-4's patterns ask of a character only whether it is a letter, a number, white space or
                something else: a table answers for every code point, and the rest are ten lines of C a pattern.
    counting    a hash table of words; each thread has one of its own, and they are added up.
    learning    `learn_fast` has the idea in Python: only words that hold the pair are looked at after a merge, and a
                heap finds the most frequent pair. C lists a pair's places themselves, which also takes long words.
    merging     a short word is an array: find the least rank, merge there, move the rest up. In a long one that takes
                n², so a heap (`merge_ids`; in C a tree) finds the least rank in log n.
"""
import collections
import concurrent.futures
import ctypes
import functools
import heapq
import os
import re

import numpy as np
import regex

import native
from words import GPT2_PATTERNS, GPT4_PATTERNS

# --- places where text can be cut, and what is cut shared among processes ---

# A byte that ends a character other than white space: ASCII, or a continuation byte in which no Unicode space ends
# (theirs end in 80 … 8a, 9f, a0, a8, a9, af, and 85 of U+0085).
_SOLID = rb"(?<=[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf])"
# Between a letter and a sign or digit GPT-2's and GPT-4's patterns cut, whatever follows: also in JSON of one line, and
# in Chinese. Letters: ASCII's, ideographs U+5000 … 8FFF, kana. Signs: ASCII's, U+3001 … 3003, U+FF01 … FF0F, ：；？.
_LETTER = (rb"(?<=[A-Za-z]|[\xe5-\xe8][\x80-\xbf]{2}|"
           rb"\xe3(?:\x81[\x81-\xbf]|\x82[\x80-\x96\xa1-\xbf]|\x83[\x80-\xba]))")
_SIGN = rb"(?=[!-@\[-`{-~]|\xe3\x80[\x81-\x83]|\xef\xbc[\x81-\x8f\x9a\x9b\x9f])"
GPT2_CUT = _SOLID + rb"(?=[ \t\n\r])|" + _LETTER + _SIGN
GPT4_CUT = _SOLID + rb"(?= )|(?<=[A-Za-z0-9])(?=[\t\n\r])|" + _LETTER + _SIGN     # newlines stick to punctuation here


class Cutter:
    """Finds places where text can be cut so that the two sides, encoded apart, give the ids of the whole.

    rule: regex (bytes) of places where the pattern surely starts a word, or None when that is not known. Then only
    special tokens stand alone, and text without one is not cut at all. No cut crosses a special token.
    """

    def __init__(self, rule, tokens):
        self.tokens = sorted(tokens)
        self.reach = max(map(len, tokens), default=1) - 1      # bytes around a cut that may belong to a token
        if rule is None:
            rule = b"(?=" + b"|".join(map(re.escape, self.tokens)) + b")" if tokens else b"(?!)"
        self.rule = regex.compile(b"(?r)" + rule)              # (?r): the last match comes first

    def last(self, data, begin=0):
        """The last safe cut of `data`, which will go on; 0 when there is none after `begin`."""
        for match in self.rule.finditer(data):
            cut = match.start()
            if cut <= begin:
                break
            crossed = any(data.find(t, max(0, cut - len(t) + 1), cut + len(t) - 1) >= 0 for t in self.tokens)
            if cut <= len(data) - self.reach and not crossed:
                return cut
        return 0

    def ranges(self, read, total, size):
        """(start, end) of ranges of at most `size` bytes; read(a, b) gives bytes. Their last 64 KB are searched first.

        One without a safe cut is made twice as long, beyond `size`, so that the search stays linear.
        """
        start, end = 0, size
        while end < total:
            begin, cut, near = end, 0, 1 << 15
            while not cut and begin > start:
                near *= 2
                begin = max(start, end - near)
                cut = self.last(read(begin, end), self.reach if begin > start else 0)
            if cut:
                yield start, begin + cut
                start, end = begin + cut, begin + cut + size
            else:
                end += end - start
        yield start, total


def cpus() -> int:
    """CPUs that this process may use: in a container or under Slurm fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(task, jobs, workers):
    """Yield task(job) for each job in order, by that many threads. While C works, other threads may run."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(task, job))
            if len(waiting) > 2 * workers:                     # a slow reader holds the workers back
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- in Python: merging one word, and learning merges ---

def merge_ids(ids, ranks):
    """The ids of one word after all merges, from the ids of its bytes, in O(n log n) for n of them.

    ranks: {(id, id): (rank, id of both)}. The heap holds the pairs that can be merged; `after`, `before` link the ids.
    """
    ids, n = list(ids), len(ids)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(ranks[pair], i, pair) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        (_, new), i, (a, b) = heapq.heappop(heap)
        j = after[i]
        if ids[i] != a or j == n or ids[j] != b:
            continue    # one of the two was merged with its other neighbour in the meantime
        ids[i], ids[j], after[i] = new, -1, after[j]
        if after[i] < n:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n:
                pair = ids[left], ids[right]
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left, pair))
    return [i for i in ids if i >= 0]


def learn_fast(counts, n_merges):
    """Yield up to n_merges (a, b, how often): tokens a and b make the next token, the first new one is 256.

    counts: {word: how often}. After a merge only the words that hold its pair are looked at. The heap may hold a pair
    with a count that has changed since; it is pushed again with each change, so an entry that is not true is left out.
    """
    words, counts = [list(word) for word in counts], list(counts.values())
    pairs, places = collections.Counter(), collections.defaultdict(set)      # {pair: how often}, {pair: words}
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            places[pair].add(i)
    # heapq gives the least, and of equal pairs the greatest is wanted: bytes upside down, and an end above all of them.
    order = [(255 - i, 256) for i in range(256)]
    heap = [(-n, order[a], order[b], (a, b)) for (a, b), n in pairs.items()]
    heapq.heapify(heap)
    while n_merges > 0 and heap:
        count, _, _, pair = heapq.heappop(heap)
        if pairs[pair] != -count or not count:
            continue
        new, changed = len(order), set()
        order.append(order[pair[0]][:-1] + order[pair[1]])
        for i in places.pop(pair):
            word, k = words[i], 0
            for old in zip(word, word[1:]):
                pairs[old] -= counts[i]
                changed.add(old)
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == pair:
                    word[k:k + 2] = [new]
                k += 1
            for neighbours in zip(word, word[1:]):
                pairs[neighbours] += counts[i]
                places[neighbours].add(i)
                changed.add(neighbours)
        for a, b in changed:
            if pairs[a, b]:
                heapq.heappush(heap, (-pairs[a, b], order[a], order[b], (a, b)))
        n_merges -= 1
        yield *pair, -count


# --- in C: the structures of bpe.c ---

P, I, L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Rule(ctypes.Structure):
    _fields_ = [("classes", P), ("gpt4", I), ("digits", I)]


class Merges(ctypes.Structure):
    _fields_ = [("slots", P), ("mask", L), ("byte_pairs", P), ("byte_ids", P), ("products", P)]


class Words(ctypes.Structure):
    """Distinct words and how often each was counted, in C's memory."""
    _fields_ = [("n", L), ("n_bytes", L), ("room", L), ("room_bytes", L), ("words", P), ("bytes", P), ("slots", P)]

    def __init__(self):
        super().__init__()
        self.free = library().free_words                       # which is still there when the interpreter ends

    def __del__(self):
        self.free(self)

    def count(self, text, spans, pattern):
        """Count the words of a text; spans: see `token_spans`."""
        library().count_words(self, rule_of(pattern, text), text, len(text), spans.ctypes, len(spans))

    def update(self, counts):
        """Add the counts of a dict {word: how often}, or of other Words."""
        if isinstance(counts, Words):
            library().add_words(self, counts)
        else:
            for word, n in counts.items():
                library().add_word(self, word, len(word), n)

    def learn(self, n_merges):
        """What learn_fast yields, as a list."""
        if self.n + self.n_bytes >= 2 ** 31 - 1:                # C counts their places in 32 bits
            raise ValueError(f"{self.n:,} distinct words of {self.n_bytes:,} bytes: 2 GB at most; give less text")
        pairs, counts = np.empty((n_merges, 2), np.int32), np.empty(n_merges, np.int64)
        made = library().learn(self, n_merges, pairs.ctypes, counts.ctypes)
        return [(a, b, n) for (a, b), n in zip(pairs[:made].tolist(), counts[:made].tolist())]


@functools.cache
def library():
    """bpe.c, or None where it cannot be compiled."""
    made = native.load("bpe")
    if made is not None:
        text, words, rule, merges = ctypes.c_char_p, *map(ctypes.POINTER, (Words, Rule, Merges))
        made.unknown.argtypes, made.encode.argtypes = (P, text, L, L, P), (merges, rule, text, L, P, L, P)
        made.count_words.argtypes, made.learn.argtypes = (words, rule, text, L, P, L), (words, L, P, P)
        made.add_word.argtypes, made.add_words.argtypes = (words, text, I, L), (words, words)
        made.free_words.argtypes, made.fill.argtypes = (words,), (merges, P, I)
        made.learn.restype = made.encode.restype = L
    return made


# --- in C: cutting ---

WHITE, LETTER, NUMBER, OTHER, UNKNOWN = 1, 2, 3, 4, 255
_classes = np.full(0x110000, UNKNOWN, np.uint8)                # of each code point, filled as characters come
RULES = {pattern: (0, 0) for pattern in GPT2_PATTERNS} | {    # (gpt4, digits)
    pattern: (1, digits) for pattern, digits in zip(GPT4_PATTERNS, (3, 1))}


def can_cut(pattern) -> bool:
    """Whether C knows this pattern, and there is C."""
    return pattern in RULES and library() is not None


def rule_of(pattern, text):
    """What bpe.c needs to cut this text, by the Unicode tables of the regex module (tiktoken's may be older or newer).

    256 neighbouring characters are looked up when the first of them is met.
    """
    at = L(0)
    while (code := library().unknown(_classes.ctypes, text, at, len(text), ctypes.byref(at))) >= 0:
        first = code & ~255
        page = "".join(map(chr, range(first, first + 256)))
        kinds = dict.fromkeys(page, OTHER)
        for pattern_of_class, kind in (r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", WHITE):
            kinds.update(dict.fromkeys(regex.findall(pattern_of_class, page), kind))
        _classes[first:first + 256] = list(kinds.values())
    return Rule(_classes.ctypes.data, *RULES[pattern])


def token_spans(text, splitter, tokens):
    """(start, end, id) of each special token in the text, int64 (n, 3); tokens: {bytes: id}, splitter their regex."""
    found = [(*match.span(), tokens[match[0]]) for match in splitter.finditer(text)] if splitter else []
    return np.array(found, np.int64).reshape(-1, 3)


# --- in C: encoding ---

class Encoder:
    """Ids of whole texts. byte_ids: the 256 ids of the bytes; ranks: {(id, id): (rank, id of both)}, by rank."""

    def __init__(self, byte_ids, ranks):
        self.made_from = byte_ids, ranks
        pairs = np.array(list(ranks), np.int32).reshape(-1, 2)
        size = 1 << max(4, (2 * len(ranks)).bit_length())      # at most half full
        self.slots = np.empty(size, [("pair", "u8"), ("rank", "i4"), ("unused", "i4")])
        self.byte_ids, self.byte_pairs = np.array(byte_ids, np.int32), np.empty(65536, np.int32)
        self.products = np.array([new for _, new in ranks.values()], np.int32)
        self.c = Merges(self.slots.ctypes.data, size - 1, self.byte_pairs.ctypes.data, self.byte_ids.ctypes.data,
                        self.products.ctypes.data)
        library().fill(self.c, pairs.ctypes, len(pairs))

    def __reduce__(self):
        return Encoder, self.made_from                         # addresses mean nothing in another process

    def encode(self, text, spans, pattern):
        """The ids of a text (bytes) as int32."""
        ids = np.empty(len(text) + 8, np.int32)
        n = library().encode(self.c, rule_of(pattern, text), text, len(text), spans.ctypes, len(spans), ids.ctypes)
        return ids[:n]
