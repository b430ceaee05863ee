"""Byte-pair encoding: learn a vocabulary from text, turn text into token ids and back."""
import heapq
import json
import operator
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter

import numpy as np
import regex
from tqdm import tqdm

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BLOCK_BYTES = 4 << 20    # unit of work when a file is read
STREAM_CHARS = 8192      # encode_iterable looks for a safe cut each time it holds this much
CACHED_WORDS = 2048      # merged words remembered by the regex path


# --- cutting text ---

# Spellings of GPT-2's pattern that cut alike: OpenAI's first, the course's, tiktoken's possessive one.
_GPT2_SPELLINGS = {
    GPT2_PATTERN,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
}
# A byte that ends a character that is not white space: ASCII, or a continuation byte no Unicode space ends in.
_SOLID = rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf]"


class _Cutter:
    """Finds places where text can be cut so that both sides, encoded apart, give the ids of the whole.

    After GPT-2's pattern that is wherever a solid character meets white space, whatever stands around them. Of a
    pattern that we cannot vouch for we only know that a special token stands alone. No cut may cross one.
    """

    def __init__(self, pattern, tokens):
        self.tokens = [t for t in tokens if len(t) > 1]
        if pattern in _GPT2_SPELLINGS:
            place = rb"(?<=" + _SOLID + rb")(?=[ \t\n\r])"
        elif tokens:
            place = rb"(?=" + b"|".join(map(re.escape, tokens)) + rb")"
        else:
            place = rb"(?!)"
        self.forward, self.backward = regex.compile(place), regex.compile(rb"(?r)" + place)
        self.reach = max(map(len, self.tokens), default=1) - 1    # bytes after a cut that may still spoil it

    def _crossed(self, data, cut):
        return any(data.find(t, max(0, cut - len(t) + 1), cut + len(t) - 1) >= 0 for t in self.tokens)

    def last(self, data):
        """Last safe cut of `data`, which begins at one and will go on; 0 when there is none."""
        end = len(data) - self.reach
        if end <= 0:
            return 0
        for match in self.backward.finditer(data):
            if 0 < match.start() <= end and not self._crossed(data, match.start()):
                return match.start()
        return 0


def _alternatives(tokens):
    """A compiled pattern for any of the byte strings, longest first, with a group so that split keeps them."""
    return re.compile(b"(" + b"|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + b")") if tokens else None


def _pretokens(compiled, text):
    """The pieces of `text` that merges stay inside: the matches, and what lies between them, so nothing is lost.

    >>> _pretokens(regex.compile(GPT2_PATTERN), "I'll  go")
    ['I', "'ll", ' ', ' go']
    """
    if not compiled.groups:
        pieces = compiled.findall(text)
        if sum(map(len, pieces)) == len(text):
            return [p for p in pieces if p] if "" in pieces else pieces
    pieces, end = [], 0
    for match in compiled.finditer(text):
        pieces += text[end:match.start()], match[0]
        end = match.end()
    return [p for p in (*pieces, text[end:]) if p]


# --- training ---

def _check_specials(special_tokens):
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens must be a list of strings, got the string {special_tokens!r}: put it in a list")
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


def _decode_utf8(data, what):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of a block; "
                         "convert the file to UTF-8 first") from None


def train_bpe(input_path, vocab_size, special_tokens=("<|endoftext|>",), *, pattern=GPT2_PATTERN, workers=None):
    """Learn a vocabulary from a UTF-8 file: (vocab: id -> bytes, merges: pairs of bytes in the order learnt)."""
    specials = _check_specials(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)):
        raise TypeError(f"vocab_size must be an int, got {vocab_size!r}")
    if vocab_size < 256 + len(specials):
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {256 + len(specials)}: "
                         f"256 bytes and {len(specials)} special tokens")
    with open(input_path, "rb") as file:
        data = file.read()
    if not data:
        raise ValueError(f"{input_path} is empty: there is nothing to train on")
    counts, compiled = Counter(), _compile(pattern)
    split = _alternatives([t.encode("utf-8") for t in specials])
    for piece in split.split(data)[::2] if split else [data]:
        counts.update(_pretokens(compiled, _decode_utf8(piece, input_path)))
    n_merges = int(vocab_size) - 256 - len(specials)
    vocab = {i: bytes([i]) for i in range(256)}
    merges = []
    if counts and n_merges:
        merger = _Merger([w.encode("utf-8") for w in counts], list(counts.values()))
        for a, b in tqdm(merger.run(n_merges), total=n_merges, desc="merging", disable=None, leave=False):
            merges.append((vocab[a], vocab[b]))
            vocab[len(vocab)] = vocab[a] + vocab[b]
    if len(merges) < n_merges:
        warnings.warn(f"no pair is left to merge: the vocabulary has {len(vocab) + len(specials)} entries, "
                      f"not the {vocab_size} asked for; give more text or a smaller vocab_size", stacklevel=2)
    for token in specials:
        vocab[len(vocab)] = token.encode("utf-8")
    return vocab, merges


class _Merger:
    """Yields the most frequent pair of neighbouring symbols, merges it everywhere, and again.

    Distinct words lie end to end in one array, linked by `nxt` and `prv`, parted by the symbol -1. Two facts keep it small.
    A pair of symbols comes into being at one moment, when the later of the two is made, so its places are listed
    once; and from then on it only gets rarer, so a heap of counts that are too high is enough: the top is counted
    again when it is reached. Pairs rarer than `floor` wait outside the heap, and most never enter it.
    """

    def __init__(self, words, counts):
        lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
        self.sym = np.frombuffer(b"\0" + b"\0".join(words) + b"\0", np.uint8).astype(np.int32)
        self.sym[0] = self.sym[np.cumsum(lengths)] = -1
        self.freq = np.concatenate([[0], np.repeat(np.array(counts, np.int64), lengths)])
        self.nxt, self.prv = np.arange(1, len(self.sym) + 1), np.arange(-1, len(self.sym) - 1)
        # Ties go to the greatest pair of byte strings, heapq gives the least: bytes upside down, and an end above them all.
        self.order = [chr(255 - i) + "\u0100" for i in range(256)]
        self.heap, self.cold, self.places = [], [], []
        first = np.flatnonzero((self.sym[:-1] >= 0) & (self.sym[1:] >= 0))
        keys = self.sym[first] * 256 + self.sym[first + 1]
        by_key = np.argsort(keys.astype(np.uint16), kind="stable")
        keys, first = keys[by_key], first[by_key]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        for key, count, places in zip(keys[starts].tolist(), self._sums(first, starts), np.split(first, starts[1:])):
            self._push(int(count), key >> 8, key & 255, places)
        self.floor = -self.heap[0][0] if self.heap else 1

    def _sums(self, places, starts):
        return np.add.reduceat(self.freq[places], starts) if len(starts) else np.zeros(0, np.int64)

    def _push(self, count, a, b, places):
        heapq.heappush(self.heap, (-count, self.order[a] + self.order[b], a, b, places))

    def run(self, n_merges):
        for _ in range(n_merges):
            pair = self._pop()
            if pair is None:
                return
            a, b, places = pair
            self.order.append(self.order[a][:-1] + self.order[b])
            self._merge(a, b, places, len(self.order) - 1)
            yield a, b

    def _pop(self):
        """The pair with the largest true count, or None when there is none."""
        while True:
            while not self.heap or -self.heap[0][0] < self.floor:
                if not self.heap and not self.cold:
                    return None
                self.floor //= 2
                self._warm()
            count, _, a, b, places = heapq.heappop(self.heap)
            places = places[(self.sym[places] == a) & (self.sym[self.nxt[places]] == b)]
            now = int(self.freq[places].sum())
            if now == -count:
                return a, b, places
            if now:
                self._push(now, a, b, places)

    def _merge(self, a, b, places, new):
        sym, nxt, prv = self.sym, self.nxt, self.prv
        if a == b:    # in "aaa" the pairs overlap: every other one of a run, from its left
            breaks = np.flatnonzero(np.concatenate([[True], places[1:] != nxt[places[:-1]]]))
            runs = np.arange(len(places)) - np.repeat(breaks, np.diff(breaks, append=len(places)))
            places = places[runs % 2 == 0]
        second = nxt[places]
        after = nxt[second]
        sym[places], sym[second] = new, -2
        nxt[places], prv[after] = after, places
        before = prv[places]
        left, right = sym[before], sym[after]
        # New neighbours: (left, new) gets an even key, (new, right) an odd one. (new, new) is seen once, from its left.
        keys = np.concatenate([left * 2, right * 2 + 1])
        where = np.concatenate([before, places])
        keep = np.concatenate([(left >= 0) & (left != new), right >= 0])
        keys, where = keys[keep], where[keep]
        if not len(keys):
            return
        by_key = np.argsort(keys, kind="stable")
        keys, where = keys[by_key], where[by_key]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts, keys, ends = self._sums(where, starts), keys[starts], np.append(starts[1:], len(where))
        hot = counts >= self.floor
        for i in np.flatnonzero(hot).tolist():
            self._arrive(int(counts[i]), int(keys[i]), new, where[starts[i]:ends[i]])
        if not hot.all():
            cold = ~hot
            self.cold.append((keys[cold], counts[cold], starts[cold], ends[cold],
                              np.full(cold.sum(), len(self.places))))
            self.places.append((new, where))

    def _arrive(self, count, key, new, places):
        self._push(count, *((new, key >> 1) if key & 1 else (key >> 1, new)), places)

    def _warm(self):
        """Move the waiting pairs that reach the floor into the heap."""
        if not self.cold:
            return
        columns = [np.concatenate(column) for column in zip(*self.cold)]
        hot = columns[1] >= self.floor
        for key, count, start, end, batch in zip(*(c[hot].tolist() for c in columns)):
            new, where = self.places[batch]
            self._arrive(count, key, new, where[start:end])
        self.cold = [] if hot.all() else [tuple(c[~hot] for c in columns)]


# --- the tokenizer ---

def _gpt2_alphabet():
    """GPT-2 writes each byte as a printable character: those that are one stand for themselves, others follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_TO_CHAR = _gpt2_alphabet()
_TO_BYTE = {c: b for b, c in _TO_CHAR.items()}


def _to_text(token):
    return "".join(map(_TO_CHAR.__getitem__, token))


def _to_bytes(text):
    return bytes(map(_TO_BYTE.__getitem__, text))


class Tokenizer:
    """Text to ids and back with a given vocabulary and merges."""

    def __init__(self, vocab, merges, special_tokens=None, *, pattern=GPT2_PATTERN):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(m) for m in merges], pattern
        self._id = {}
        for i, token in self.vocab.items():
            if not isinstance(token, (bytes, bytearray)) or isinstance(i, bool) or not isinstance(i, (int, np.integer)):
                raise TypeError(f"vocab must map int to bytes, got {i!r}: {token!r}")
            if i < 0 or not token:
                raise ValueError(f"vocab entry {i}: {token!r}: ids start at 0 and no token is empty")
            self._id.setdefault(bytes(token), int(i))
        last = {token: i for i, token in self.vocab.items()}
        self.special_tokens = {}
        for text in _check_specials(special_tokens):
            token = text.encode("utf-8")
            if token not in last:
                last[token] = max(self.vocab, default=-1) + 1
                self.vocab[last[token]] = token
            self.special_tokens[text] = last[token]
        self._added = {}              # text -> id, matched in any text, as Hugging Face's added tokens that are not special
        self._late = set()            # those of the above to be matched after normalising
        self._normalizer = None       # None or "NFC"
        self._ignore_merges = False   # Llama 3: a pre-token that is in the vocabulary is one token
        self._post_processor = None   # kept for save
        self._ranks = {}
        for rank, (a, b) in enumerate(self.merges):
            missing = [t for t in (a, b, a + b) if t not in self._id]
            if missing or (self._id[a], self._id[b]) in self._ranks:
                raise ValueError(f"merge {rank} of {a!r} and {b!r}: " + (
                    f"{missing[0]!r} is not in the vocabulary" if missing else "given twice"))
            self._ranks[self._id[a], self._id[b]] = rank, self._id[a + b]
        self._regex = _compile(pattern)
        self._prepare()

    def _prepare(self):
        self._cache, self._splitters = {}, {}
        tokens = [t.encode("utf-8") for t in (*self.special_tokens, *self._added)]
        self._cutter = _Cutter(self.pattern, tokens)

    @property
    def vocab_size(self):
        """One more than the largest id."""
        return max(self.vocab, default=-1) + 1

    # -- encoding --

    def encode(self, text, allowed_special="all"):
        """The ids of `text`."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a string, got {type(text).__name__}")
        if allowed_special == "all":
            allowed = self.special_tokens.keys()
        elif isinstance(allowed_special, str):
            raise ValueError(f'allowed_special is {allowed_special!r}; give "all" or a set of special tokens')
        else:
            allowed = set(allowed_special)
            if not allowed <= self.special_tokens.keys():
                raise ValueError(f"allowed_special names {sorted(allowed - self.special_tokens.keys())}; "
                                 f"the special tokens are {sorted(self.special_tokens)}")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds half a surrogate pair, {text[error.start]!r} at character {error.start}, "
                             "which UTF-8 cannot write; replace it first") from None
        ids = []
        for piece, known in self._pieces(data, frozenset(allowed)):
            if known is None:
                self._encode_plain(piece, ids)
            else:
                ids.append(known)
        return ids

    def _pieces(self, data, allowed):
        """Cut out special and added tokens: (bytes, None) for plain text, (None, id) for a token."""
        if allowed not in self._splitters:
            tokens = {**self._added, **{t: self.special_tokens[t] for t in allowed}}
            early = {t.encode("utf-8"): i for t, i in tokens.items() if t not in self._late}
            late = {t.encode("utf-8"): i for t, i in tokens.items() if t in self._late}
            self._splitters[allowed] = _alternatives(early), early, _alternatives(late), late
        early, early_ids, late, late_ids = self._splitters[allowed]
        for i, piece in enumerate(early.split(data) if early else [data]):
            if i % 2:
                yield None, early_ids[piece]
            elif piece:
                if self._normalizer:
                    piece = unicodedata.normalize(self._normalizer, piece.decode("utf-8")).encode("utf-8")
                for j, part in enumerate(late.split(piece) if late else [piece]):
                    if j % 2:
                        yield None, late_ids[part]
                    elif part:
                        yield part, None

    def _encode_plain(self, data, ids):
        cache = self._cache
        for piece in _pretokens(self._regex, data.decode("utf-8")):
            found = cache.get(piece)
            if found is None:
                if len(cache) >= CACHED_WORDS:
                    cache.clear()
                found = cache[piece] = self._merge_word(piece.encode("utf-8"))
            ids.extend(found)

    def _merge_word(self, word):
        """Ids of one pre-token, always merging the leftmost pair of lowest rank."""
        if self._ignore_merges and word in self._id:
            return [self._id[word]]
        try:
            ids = [self._id[word[i:i + 1]] for i in range(len(word))]
        except KeyError as error:
            raise ValueError(f"the vocabulary has no token for the byte {error.args[0]!r} of {word!r}") from None
        ranks, n = self._ranks, len(ids)
        nxt, prv = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(*ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heap = [(rank, i, new, ids[i], ids[i + 1]) for rank, new, i in heap]
        heapq.heapify(heap)
        while heap:
            _, i, new, a, b = heapq.heappop(heap)
            j = nxt[i]
            if ids[i] != a or j == n or ids[j] != b:
                continue    # one of the two was merged with another neighbour in the meantime
            ids[i], ids[j], nxt[i] = new, -1, nxt[j]
            if nxt[i] < n:
                prv[nxt[i]] = i
            for left, right in ((prv[i], i), (i, nxt[i])):
                if left >= 0 and right < n and (ids[left], ids[right]) in ranks:
                    rank, merged = ranks[ids[left], ids[right]]
                    heapq.heappush(heap, (rank, left, merged, ids[left], ids[right]))
        return [i for i in ids if i >= 0]

    def encode_iterable(self, chunks):
        """Yield the ids of the joined strings, holding back only what a later chunk could change."""
        held, size, enough = [], 0, STREAM_CHARS
        for chunk in chunks:
            if not isinstance(chunk, str):
                raise TypeError(f"encode_iterable takes strings, got {type(chunk).__name__}")
            for start in range(0, len(chunk), STREAM_CHARS):
                held.append(chunk[start:start + STREAM_CHARS])
                size += len(held[-1])
                if size >= enough:
                    data = "".join(held).encode("utf-8")
                    cut = self._cutter.last(data)
                    yield from self.encode(data[:cut].decode("utf-8"))
                    held = [data[cut:].decode("utf-8")]
                    size = len(held[0])
                    enough = max(STREAM_CHARS, 2 * size)    # doubling: text without a cut is still looked at O(1) times
        yield from self.encode("".join(held))

    def encode_file(self, text_path, bin_path, *, workers=None):
        """Write the ids of a UTF-8 file as raw little-endian uint16, or uint32 above 65,536 ids; returns their number."""
        dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")
        temporary, total = f"{bin_path}.tmp", 0
        try:
            with open(text_path, encoding="utf-8", newline="") as source, open(temporary, "wb") as out:
                ids = self.encode_iterable(iter(lambda: source.read(BLOCK_BYTES), ""))
                array = np.fromiter(ids, dtype)
                array.tofile(out)
                total = len(array)
            os.replace(temporary, bin_path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{text_path} is not UTF-8: {error}; convert the file to UTF-8 first") from None
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        return total

    # -- decoding --

    def decode_bytes(self, ids):
        """The bytes of `ids`, integers of any kind."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join(map(self.vocab.__getitem__, map(operator.index, ids)))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in the vocabulary: ids run from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids):
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -- files --

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """From GPT-2's vocab.json and merges.txt."""
        vocab = _read_json(vocab_path)
        if not isinstance(vocab, dict):
            raise ValueError(f"{vocab_path} holds a {type(vocab).__name__}, not the object of GPT-2's vocab.json")
        with open(merges_path, "rb") as file:
            lines = _decode_utf8(file.read(), merges_path).split("\n")
        pairs = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
        try:
            return cls(_vocab_from_text(vocab, special_tokens or []), _merges_from_text(pairs), special_tokens)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{vocab_path}, {merges_path}: {error}") from None

    @classmethod
    def load(cls, path):
        """From a tokenizer.json in Hugging Face's layout, if it is a byte-level BPE."""
        layout = _read_json(path)
        try:
            return _from_layout(cls, layout)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a tokenizer.json that this tokenizer understands: {what}") from None

    def save(self, path):
        """Write tokenizer.json, which Hugging Face's tokenizers reads and gives the same ids."""
        added = {**self.special_tokens, **self._added}
        vocab = {}
        for i, token in sorted(self.vocab.items()):
            name = next((t for t, j in added.items() if i == j), None) or _to_text(token)
            if name in vocab:
                raise ValueError(f"tokens {vocab[name]} and {i} are both written {name!r}, which tokenizer.json cannot hold")
            vocab[name] = i
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        pre_tokenizer = {**level, "use_regex": True}
        if self.pattern not in _GPT2_SPELLINGS:
            pre_tokenizer = {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False},
                {**level, "use_regex": False}]}
        layout = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": t in self._late, "special": t in self.special_tokens}
                             for t, i in sorted(added.items(), key=lambda item: item[1])],
            "normalizer": {"type": self._normalizer} if self._normalizer else None,
            "pre_tokenizer": pre_tokenizer, "post_processor": self._post_processor,
            "decoder": {**level, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": self._ignore_merges, "vocab": vocab,
                      "merges": [f"{_to_text(a)} {_to_text(b)}" for a, b in self.merges]}}
        temporary = f"{path}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            json.dump(layout, file, ensure_ascii=False, indent=1)
        os.replace(temporary, path)


def _read_json(path):
    with open(path, "rb") as file:
        data = file.read()
    try:
        return json.loads(_decode_utf8(data, path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _vocab_from_text(vocab, added):
    """{text in GPT-2's alphabet: id} -> {id: bytes}; the texts in `added` are written plainly."""
    tokens = {}
    for text, i in vocab.items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0 or i in tokens:
            raise ValueError(f"vocabulary entry {text!r} has the id {i!r}: ids are integers from 0, each given once")
        try:
            tokens[i] = text.encode("utf-8") if text in added else _to_bytes(text)
        except KeyError as error:
            raise ValueError(f"vocabulary entry {text!r} (id {i}) holds {error.args[0]!r}, which is no byte of "
                             "GPT-2's alphabet: this is not a byte-level vocabulary") from None
    return tokens


def _merges_from_text(merges):
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise ValueError(f"merge {len(pairs)} is {merge!r}: it must be two tokens")
        try:
            pairs.append((_to_bytes(pair[0]), _to_bytes(pair[1])))
        except KeyError as error:
            raise ValueError(f"merge {len(pairs)} is {merge!r}: {error.args[0]!r} is not in GPT-2's alphabet") from None
    return pairs


def _refuse(part, value, allowed):
    raise ValueError(f"{part} is {value!r}; understood is {allowed}")


def _layout_pattern(pre_tokenizer):
    """The pattern of a `pre_tokenizer` section."""
    steps = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("type") == "Sequence" else [pre_tokenizer]
    types = [(step or {}).get("type") for step in steps]
    if types not in (["ByteLevel"], ["Split", "ByteLevel"]):
        _refuse("pre_tokenizer", types, "ByteLevel, or Split then ByteLevel")
    level = steps[-1]
    if level.get("add_prefix_space", True):
        _refuse("pre_tokenizer's add_prefix_space", True, "false")
    if len(steps) == 1:
        if not level.get("use_regex", True):
            _refuse("pre_tokenizer's use_regex without a Split", False, "true")
        return GPT2_PATTERN
    if level.get("use_regex", True):
        _refuse("pre_tokenizer's use_regex after a Split", True, "false")
    split = steps[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        _refuse("pre_tokenizer's Split", {k: split.get(k) for k in ("behavior", "invert")}, "Isolated, not inverted")
    kinds = split["pattern"]
    return kinds["Regex"] if "Regex" in kinds else regex.escape(kinds["String"], special_only=True)


def _from_layout(cls, layout):
    """A Tokenizer from the parsed tokenizer.json; anything that would change ids and is not understood is refused."""
    if not isinstance(layout, dict):
        raise ValueError(f"it holds a {type(layout).__name__}")
    model = layout["model"]
    if model.get("type", "BPE") != "BPE":
        _refuse("model type", model["type"], "BPE")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _refuse(f"model's {key}", model[key], "none")
    for key in ("truncation", "padding"):
        if layout.get(key):
            _refuse(key, layout[key], "none")
    normalizer = (layout.get("normalizer") or {})
    if normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) <= 1:
        normalizer = (normalizer["normalizers"] or [{}])[0]
    if normalizer and normalizer.get("type") != "NFC":
        _refuse("normalizer", normalizer.get("type"), "NFC or none")
    if (layout.get("decoder") or {"type": "ByteLevel"}).get("type") != "ByteLevel":
        _refuse("decoder", layout["decoder"].get("type"), "ByteLevel")
    added = layout.get("added_tokens") or []
    for token in added:
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                _refuse(f"{key} of the added token {token['content']!r}", True, "false")
    vocab = _vocab_from_text(model["vocab"], {t["content"] for t in added})
    for token in added:
        content = token["content"].encode("utf-8")
        if vocab.setdefault(token["id"], content) != content:
            _refuse(f"id {token['id']} of the added token {token['content']!r}", vocab[token["id"]], "the token itself")
    special = [t["content"] for t in added if t.get("special")]
    tokenizer = cls(vocab, _merges_from_text(model["merges"]), special, pattern=_layout_pattern(layout.get("pre_tokenizer")))
    tokenizer._added = {t["content"]: t["id"] for t in added if not t.get("special")}
    tokenizer._late = {t["content"] for t in added if t.get("normalized", not t.get("special"))}
    tokenizer._normalizer = normalizer.get("type")
    tokenizer._ignore_merges = bool(model.get("ignore_merges"))
    tokenizer._post_processor = layout.get("post_processor")
    tokenizer._prepare()
    return tokenizer


# --- the three that BPE replaces ---

class CharTokenizer:
    """One id a character: those of `text` in code point order and one more for the unknown; without text, the code point."""

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

def main(arguments=None):
    import argparse
    parser = argparse.ArgumentParser(prog="bpe.py", description="Train and use a byte-level BPE tokenizer.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("file")
    train.add_argument("--vocab_size", type=int, default=32000)
    train.add_argument("--out", default="tokenizer.json")
    encode = verbs.add_parser("encode")
    encode.add_argument("tokenizer")
    encode.add_argument("file")
    encode.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    if options.verb == "train":
        vocab, merges = train_bpe(options.file, options.vocab_size, ["<|endoftext|>"])
        Tokenizer(vocab, merges, ["<|endoftext|>"]).save(options.out)
    else:
        print(Tokenizer.load(options.tokenizer).encode_file(options.file, options.out), "tokens")


if __name__ == "__main__":
    main()
