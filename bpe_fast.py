"""BPE's slow jobs on whole arrays: cutting text into words, counting or looking up the words, merging pairs.

Why: Python needs 100 ns for every word that it touches, and 10 MB of text hold two million. NumPy touches a byte in a
nanosecond, if the job can be said about all of them at once. bpe.py says each job for one word, and a test compares.

Cutting. GPT-2's regex looks at characters; a table can answer nearly all of its questions. Every byte gets one of six
classes, and whether a word starts at a byte depends on its own class and those of its two neighbours:

    text             I  '  l  l  ␠  ␠  g  o           L letter   O other     S space   N number
    class            L  O  L  L  S  S  L  L           W other white space    T part of a special token
    a word starts    x  x  x     x  x                 (before, here, after): 6 · 6 · 6 = 216 cases, one table
    'll is one word  x  x        x  x                 contractions are mended afterwards

    One row of the table, for here = S, a plain space:      after:   S    W    L    N    O    T
        before S or W, the middle or the end of a run                -    -    x    x    x    -
        before anything else, the start of a run                     x    x    x    x    x    x

Looking up. Every byte has a random number at every place of a word, and a word's hash is the sum of its bytes' numbers
modulo 2**64 (Zobrist 1970, "A new hashing method"), which NumPy sums for all words of a block. The top bits of the hash
name a slot, and the slot remembers the hash that it saw last and that word's number. Only a word whose slot remembers
another hash goes through Python's dictionary: a processor's cache works like this. Two words have the same hash with
probability 2**-64, whatever they are, because every process draws the numbers anew.

Measured on 10 MB of code and prose, one core, times the speed of tiktoken: 2.3 when the words are known, 0.95 the first
time. One slice of bytes and one dictionary look-up a word instead: 1.2 and 0.5.
"""
import collections
import concurrent.futures
import heapq
import multiprocessing
import os
import re
import threading

import numpy as np
import regex

LONG_WORD = 64                 # bytes, a power of two; longer words always go through the dictionary
KEPT_WORDS = 1 << 20           # an encoder that knows more starts afresh, so that endless text needs no endless memory

# --- places where text can be cut, and what is cut shared among processes ---

# A byte that ends a character other than white space: ASCII, or a continuation byte in which no Unicode space ends.
_SOLID = rb"(?<=[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf])"
GPT2_CUT = _SOLID + rb"(?=[ \t\n\r])"
GPT4_CUT = _SOLID + rb"(?= )|(?<=[A-Za-z0-9])(?=[\t\n\r])"     # its pattern glues newlines to punctuation


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
        """(start, end) of ranges of at most `size` bytes; read(a, b) gives bytes. Only the ends of ranges are read.

        A range without a safe cut is made twice as long, so that the search stays linear.
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

    def blocks(self, data, size):
        """`data` in blocks of about `size` bytes."""
        return (data[a:b] for a, b in self.ranges(lambda a, b: data[a:b], len(data), size))


def cpus() -> int:
    """CPUs that this process may use: in a container or under Slurm fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_common = ()    # in a worker: the arguments that all of its jobs share, sent once


def _begin(*common):
    global _common
    _common = common


def _run(task, job):
    return task(job, *_common)


def share(task, jobs, workers, *common):
    """Yield task(job, *common) for each job in order, made by that many processes; one worker is this process.

    The processes are spawned: a fork would copy the locks of threads, such as PyTorch's, in whatever state they are.
    """
    if workers == 1:
        yield from (task(job, *common) for job in jobs)
        return
    waiting, context = collections.deque(), multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin, common)
    try:
        for job in jobs:
            waiting.append(pool.submit(_run, task, job))
            if len(waiting) > 2 * workers:                     # a slow reader holds the workers back
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise RuntimeError("a worker process died; its message is above. A script that uses workers runs its commands "
                           'under `if __name__ == "__main__":`, because workers import it; or give workers=1') from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- cutting into words ---

# Class of a byte. Each byte of a longer character carries the character's class. TOKEN: part of a special token.
SPACE, WHITE, LETTER, NUMBER, OTHER, TOKEN = range(6)


def _starts_one(before, here, after):
    """Whether a word starts at a byte of class `here`: all of GPT-2's pattern but the contractions."""
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
_CASES = [_starts_one(before, here, after) for before in range(6) for here in range(6) for after in range(6)]
_STARTS = bytes(_CASES) + bytes(256 - len(_CASES))
_unicode = np.zeros(0, np.uint8)    # class of each code point, 255 where not yet asked for; 1.1 MB made on first use


def _classes_beyond_ascii(block, classes):
    """Fill in the classes of longer characters; returns the places and lengths of those that are white space."""
    global _unicode
    if not len(_unicode):
        _unicode = np.full(0x110000, 255, np.uint8)
    codes = np.frombuffer(block.decode("utf-8").encode("utf-32-le"), "<u4")
    codes = codes[codes >= 128]
    kinds = _unicode[codes]
    if 255 in kinds:
        new = np.unique(codes[kinds == 255]).tolist()
        _unicode[new] = list(_classify("".join(map(chr, new))).values())
        kinds = _unicode[codes]
    lead = np.flatnonzero(np.frombuffer(block, np.uint8) >= 0xC0)
    lengths = 2 + (codes >= 0x800) + (codes >= 0x10000)
    for i in range(4):
        classes[lead[lengths > i] + i] = kinds[lengths > i]
    return lead[kinds == WHITE], lengths[kinds == WHITE]


def boundaries(block: bytes, spans=()):
    """Offsets at which words of GPT-2's pattern start, int64; spans: (start, end) of special tokens in the block."""
    padded = np.frombuffer(bytearray([TOKEN]) + block.translate(_ASCII) + bytes([TOKEN] * 3), np.uint8)
    classes = padded[1:-3]
    white = None if block.isascii() else _classes_beyond_ascii(block, classes)
    for start, end in spans:
        classes[start:end] = TOKEN
    case = padded[:-4] * np.uint8(36) + classes * np.uint8(6) + padded[2:-2]
    flags = np.frombuffer(bytearray(case.tobytes().translate(_STARTS)) + bytes(4), np.bool_)
    if white:    # the table took each byte of a long space for a character
        outside = classes[white[0]] == WHITE
        lead, length = white[0][outside], white[1][outside]
        for i in 1, 2:
            flags[lead + np.minimum(i, length - 1)] = False
        after = padded[1:][lead + length]
        flags[lead] |= (after >= LETTER) & (after <= OTHER)
    for start, _ in spans:
        flags[start] = True
    _contractions(block, padded, flags)
    return np.flatnonzero(flags[:len(block)])


def _contractions(block, padded, flags):
    """Join each apostrophe that starts a word to a following s, d, m, t, ll, ve or re, which the next word loses."""
    quote = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("'"))
    quote = quote[flags[quote] & (padded[quote + 1] == OTHER) & (padded[quote + 2] == LETTER)]
    if not len(quote):
        return
    text = np.frombuffer(block + bytes(2), np.uint8)
    first, second = text[quote + 1], text[quote + 2]
    single = np.isin(first, list(b"sdmt"))
    pair = np.isin(256 * first.astype(int) + second, [256 * a + b for a, b in (b"ll", b"ve", b"re")])
    pair &= padded[quote + 3] == LETTER          # and no special token starts between the two
    flags[quote[single | pair] + 1] = False
    flags[quote[single] + 2] = True
    flags[quote[pair] + 3] = True


def token_spans(block, splitter, tokens):
    """(start, end) of each special token in the block."""
    return [match.span() for match in splitter.finditer(block)] if any(t in block for t in tokens) else []


# --- numbering words ---

class Words(dict):
    """{word: number}, numbered in order of arrival, with a table of hashes in front that whole arrays go through."""
    SLOT_BITS = 18

    def __init__(self, words=()):
        self.new = []                                          # words in order; an encoder empties it
        self.random = np.random.default_rng().integers(0, 1 << 64, LONG_WORD * 256, np.uint64)
        self.hashes = np.zeros(1 << self.SLOT_BITS, np.uint64)
        self.numbers = np.zeros(1 << self.SLOT_BITS, np.int32)
        for word in words:
            self[word]

    def __missing__(self, word):
        self[word] = number = len(self)
        self.new.append(word)
        return number

    def number(self, block, starts):
        """The number of each word of the block. starts: their offsets; the result is int32 of the same shape."""
        lengths = np.diff(starts, append=len(block))
        index = np.arange(len(block)) - np.repeat(starts, lengths)       # each byte's place in its word
        index &= LONG_WORD - 1
        index <<= 8
        index |= np.frombuffer(block, np.uint8)
        hashes = np.add.reduceat(self.random[index], starts)
        slots = (hashes >> np.uint64(64 - self.SLOT_BITS)).view(np.int64)
        numbers = self.numbers.take(slots)
        missed = np.flatnonzero((self.hashes.take(slots) != hashes) | (lengths > LONG_WORD))
        ends = (starts[missed] + lengths[missed]).tolist()
        numbers[missed] = [self[block[a:b]] for a, b in zip(starts[missed].tolist(), ends)]
        missed = missed[lengths[missed] <= LONG_WORD]
        self.hashes[slots[missed]], self.numbers[slots[missed]] = hashes[missed], numbers[missed]
        return numbers


def count_words(blocks, splitter, tokens):
    """{word: how often} over blocks of bytes, special tokens left out."""
    words, totals = Words(tokens), np.zeros(0, np.int64)
    for block in blocks:
        numbers = words.number(block, boundaries(block, token_spans(block, splitter, tokens)))
        counts = np.bincount(numbers, minlength=len(words))
        counts[:len(totals)] += totals
        totals = counts
    return collections.Counter(dict(zip(words.new[len(tokens):], totals.tolist()[len(tokens):])))


# --- merging words ---

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


class Encoder:
    """Ids of whole blocks. Every distinct word is merged once, the new ones of a block together.

    byte_ids: the 256 ids of the bytes; ranks: {(id, id): (rank, id of both)}, first merge first; tokens: {bytes: id} of
    the special tokens, splitter the regex that finds them; merge_word: what merges a word too long for this.
    """

    def __init__(self, byte_ids, ranks, tokens, splitter, merge_word):
        self.tokens, self.splitter, self.merge_word, self.lock = tokens, splitter, merge_word, threading.Lock()
        self.byte_ids, self.none, self.words = np.array(byte_ids, np.int32), len(ranks), None
        self.products = np.array([new for _, new in ranks.values()] + [-1], np.int32)     # id of both, by rank
        keys = np.array([a << 32 | b for a, b in ranks], np.int64)
        self.order = np.append(np.argsort(keys), self.none).astype(np.int32)
        self.keys = np.append(np.sort(keys), -1)               # the last one is found by pairs past all others
        self.byte_ranks = self._ranks(np.repeat(self.byte_ids, 256), np.tile(self.byte_ids, 256)).reshape(256, 256)

    def _ranks(self, a, b):
        """The rank of each pair of ids, `none` where it is not merged. b may be -1, after the end of a word."""
        keys = a.astype(np.int64) << 32 | b
        at = np.searchsorted(self.keys[:-1], keys)
        return np.where(self.keys[at] == keys, self.order[at], self.none).astype(np.int32)

    def encode(self, blocks):
        """The ids of the blocks, one int32 array."""
        with self.lock:
            return np.concatenate([self._encode(block) for block in blocks])

    def _encode(self, block):
        # Word number n has the ids flat[ends[n] - counts[n]:ends[n]]. The first numbers are the special tokens'.
        if self.words is None or len(self.words) > KEPT_WORDS:
            self.words, self.flat = Words(self.tokens), np.array(list(self.tokens.values()), np.int32)
            self.counts, self.ends = np.ones(len(self.flat), np.int64), np.arange(1, len(self.flat) + 1)
            self.words.new.clear()
        numbers = self.words.number(block, boundaries(block, token_spans(block, self.splitter, self.tokens)))
        if self.words.new:
            self._learn(self.words.new)
            self.words.new.clear()
        counts = self.counts.take(numbers)
        ends = np.cumsum(counts)
        return self.flat.take(np.repeat(self.ends.take(numbers) - ends, counts) + np.arange(ends[-1]))

    def _learn(self, new):
        """Append the ids of new words, which have the last numbers, to `flat`."""
        by_length = sorted(range(len(new)), key=lambda i: len(new[i]))      # words of one length make a full matrix
        short = sum(len(word) <= LONG_WORD for word in new)
        ids, counts = [], []
        for start in range(0, short, 1024):
            merged, sizes = self._merge([new[i] for i in by_length[start:min(short, start + 1024)]])
            ids.append(merged)
            counts += sizes
        for i in by_length[short:]:
            ids.append(self.merge_word(new[i]))
            counts.append(len(ids[-1]))
        ends = np.cumsum(counts) + len(self.flat)
        self.flat = np.concatenate([self.flat, *ids], dtype=np.int32)
        number = np.argsort(by_length)                                      # where each word's ids are in that order
        self.counts = np.concatenate([self.counts, np.array(counts)[number]])
        self.ends = np.concatenate([self.ends, ends[number]])

    def _merge(self, words):
        """(ids of the words, one after another; the list of their numbers).

        A word is a row of a matrix. Each round merges, in every row that has a pair left to merge, the leftmost pair of
        lowest rank, and moves what stands right of it one place to the left.
        """
        width = max(map(len, words)) + 1                       # so that there is always a place after the last byte
        text = np.array(words, f"S{width}").view(np.uint8).reshape(len(words), width)
        lengths = np.fromiter(map(len, words), np.int64, len(words))[:, None]
        columns = np.arange(width)
        ids = np.where(columns < lengths, self.byte_ids[text], -1)
        ranks = np.full(ids.shape, self.none, np.int32)        # of the id and the one after it
        ranks[:, :-1] = np.where(columns[1:] < lengths, self.byte_ranks[text[:, :-1], text[:, 1:]], self.none)
        active = np.arange(len(words))
        while len(active):
            place = ranks[active].argmin(1)
            best = ranks[active, place]
            left = best < self.none
            active, place, best = active[left], place[left], best[left]
            rows, new = np.arange(len(active)), self.products[best]
            moved = np.minimum(columns + (columns > place[:, None]), width - 1) + width * active[:, None]
            row, rank = ids.take(moved), ranks.take(moved)
            row[rows, place] = new
            rank[rows, place] = self._ranks(new, row[rows, place + 1])
            inner = np.flatnonzero(place)
            rank[inner, place[inner] - 1] = self._ranks(row[inner, place[inner] - 1], new[inner])
            ids[active], ranks[active] = row, rank
        return ids[ids >= 0], (ids >= 0).sum(1).tolist()


# --- learning merges ---

class Merger:
    """Finds the most frequent pair of neighbouring symbols, merges it everywhere, and again.

    Distinct words lie end to end in one array, linked by `after` and `before`, parted by the symbol -1. Two facts keep
    it small. A pair comes into being at one moment, when the later of its two symbols is made, so its places are listed
    once. And from then on it only gets rarer, so a heap of counts that are too high is enough: the top is counted again
    when it is reached. Only pairs that are frequent enough stand in the heap alone; the others of their moment wait as
    one entry, a batch, and most never leave it.

    An entry is (-count, order, pair, places), or (-largest count, "", number of symbols, places, table) for a batch:
    heapq gives the least first. `order` spells the pair so that the greatest pair of byte strings comes first among
    equals: "ab" upside down is chr(158) chr(157), and an end sorts above every byte. The empty string sorts below all.
    """

    def __init__(self, words, counts):
        lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
        self.symbols = np.frombuffer(b"\0" + b"".join(word + b"\0" for word in words), np.uint8).astype(np.int32)
        self.symbols[0] = self.symbols[np.cumsum(lengths)] = -1
        self.counts = np.concatenate([[0], np.repeat(np.array(counts, np.int64), lengths)])
        self.after, self.before = np.arange(1, len(self.symbols) + 1), np.arange(-1, len(self.symbols) - 1)
        self.order = [chr(255 - i) + "\u0100" for i in range(256)]
        self.heap = []
        first = np.flatnonzero((self.symbols[:-1] >= 0) & (self.symbols[1:] >= 0))
        # In 16 bits, which NumPy sorts by radix.
        self._add_pairs((self.symbols[first] * 256 + self.symbols[first + 1]).astype(np.uint16), first)

    def run(self, n_merges):
        """Yield up to n_merges (a, b, count): symbols a and b make the next symbol; the first new one is 256."""
        while n_merges > 0 and self.heap:
            count, order, *entry = heapq.heappop(self.heap)
            if order == "":
                self._open_batch(*entry)
                continue
            (a, b), places = entry
            places = places[(self.symbols[places] == a) & (self.symbols[self.after[places]] == b)]
            now = int(self.counts[places].sum())
            if now == -count:
                self.order.append(self.order[a][:-1] + self.order[b])
                self._merge(a, b, places)
                n_merges -= 1
                yield a, b, now
            elif now:
                heapq.heappush(self.heap, (-now, order, (a, b), places))

    def _merge(self, a, b, places):
        symbols, after, before, new = self.symbols, self.after, self.before, len(self.order) - 1
        if a == b:    # in "aaa" the pairs overlap: take every other one of a run, from its left
            runs = np.flatnonzero(np.concatenate([[True], places[1:] != after[places[:-1]]]))
            in_run = np.arange(len(places)) - np.repeat(runs, np.diff(runs, append=len(places)))
            places = places[in_run % 2 == 0]
        second = after[places]
        behind = after[second]
        symbols[places], symbols[second] = new, -2
        after[places], before[behind] = behind, places
        front = before[places]
        left, right = symbols[front].astype(np.int64), symbols[behind].astype(np.int64)
        # New neighbours: (left, new) and (new, right); (new, new) is seen once, from its left.
        keys = np.concatenate([left * len(self.order) + new, new * len(self.order) + right])
        keep = np.concatenate([(left >= 0) & (left != new), right >= 0])
        self._add_pairs(keys[keep], np.concatenate([front, places])[keep])

    def _add_pairs(self, keys, places):
        """List the places of new pairs; the key of (a, b) is a · (number of symbols) + b."""
        if not len(keys):
            return
        by_key = np.argsort(keys, kind="stable")
        keys, places = keys[by_key], places[by_key]
        del by_key    # at first as large as the words
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.add.reduceat(self.counts[places], starts)
        table = np.stack([counts, keys[starts], starts, np.append(starts[1:], len(places))])
        heapq.heappush(self.heap, (-int(counts.max()), "", len(self.order), places, table))

    def _open_batch(self, n_symbols, places, table):
        """Put the pairs that have half the largest count into the heap by themselves; the others wait on."""
        often = 2 * table[0] >= table[0].max()
        for count, key, start, end in table[:, often].T.tolist():
            a, b = divmod(key, n_symbols)
            heapq.heappush(self.heap, (-count, self.order[a] + self.order[b], (a, b), places[start:end]))
        if not often.all():
            table = table[:, ~often]
            heapq.heappush(self.heap, (-int(table[0].max()), "", n_symbols, places, table))
