"""Byte-pair encoding: learn a vocabulary from text, turn text into token ids and back.

Why: characters make long sequences, words leave unknown ones. BPE starts from the 256 bytes, so that it can write every
text, and makes a token of whatever two neighbours occur together most often, again and again. The course's example, low
5 times, lower 2, widest 3, newest 6:

    low    l o w           pairs: s t 9, e s 9, w e 8, l o 7, o w 7, …       merge 1: s t (of equals the greatest pair)
    lower  l o w e r                                                         merge 2: e st    9 times
    widest w i d e st      then: e st 9, w e 8, l o 7, o w 7, …              merge 3: o w     7 times, as often as l o
    newest n e w e st                                                        merge 4: l ow    7 times
                           then: w est 6, n e 6, …              after six merges newest is ne west, low is one token

This is GPT-2's kind: a regex cuts text into words, each with the space before it, merges stay inside them, and special
tokens are cut out before anything else. Encoding repeats the merges inside each word in the order they were learnt:

    "I'll  go<|endoftext|>"
     I'll  go | <|endoftext|>          special tokens
     I | 'll | ␠ | ␠go                 words: the last space before a word belongs to it
     I | ' l l | ␠ | ␠ g o             bytes
     I | ' ll  | ␠ | ␠ go              merge l l, merge g o
     I | 'll   | ␠ | ␠go               merge ' ll, merge ␠ go          then the number of each token

How: `learn_merges` is the trainer to read, `merge_steps` the encoder. The ones that run give the same result:
bpe_fast.py hands whole texts to C, which knows GPT-2's and GPT-4's patterns. With any other the regex cuts, and every
word goes through Python. Ids are those of tiktoken and Hugging Face, except for a letter that is too new for somebody's
Unicode tables. Left out: sentencepiece models, normalizers other than NFC.

Papers: Sennrich et al., arXiv 1508.07909, algorithm 1 (BPE for words); Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2.2 (bytes, and merges kept inside character categories).

    python bpe.py train FILE --vocab_size=32000 --out=tokenizer.json    100 MB in 1.4 CPU seconds, Hugging Face 27
    python bpe.py encode tokenizer.json FILE --out=x.bin
    python bpe.py show tokenizer.json "the cat in the hat"    its tokens and merges; without a text the longest
    python bpe.py show FILE.txt --merges=12                   training, step by step
    python bpe.py compare FILE                                characters, bytes, words and BPE in one table
"""
import dataclasses
import operator
import os
import sys
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe_files import read_gpt2_files, read_tokenizer_json, to_text, tokenizer_json
from bpe_fast import GPT2_CUT, GPT4_CUT, Cutter, Encoder, Words, can_cut, cpus, learn_fast, library, merge_ids, share
from bpe_fast import token_spans
from checkpoint import claim_file, write_atomically, write_text
from configurator import command_line, fail
from words import GPT2_PATTERN, GPT2_PATTERNS, GPT4_PATTERNS, check_specials, check_utf8, compile_pattern
from words import Remembered, pieces, read_range, splitter_of, utf8
from words import ByteTokenizer, CharTokenizer, WordTokenizer, compression_ratio  # noqa: F401

_CUTS = dict.fromkeys(GPT2_PATTERNS, GPT2_CUT) | dict.fromkeys(GPT4_PATTERNS, GPT4_CUT)

BLOCK_BYTES = 4 << 20          # what a worker takes at a time; a file of fewer than four starts no worker unless asked
STREAM_CHARS = 8192            # encode_iterable looks for a safe cut each time it holds this much
CACHED_WORDS = 4096            # merged words that the regex path remembers, about 0.6 MB


def _plan(path, cutter, workers):
    """(ranges of a file, workers): None workers means every CPU for a file of four blocks and more."""
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers is {workers!r}; give a number from 1, or None to let the file's size decide")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no regular file, which can be read in parts: write the text to one first")
    with open(path, "rb") as file:
        def read(start, end):
            file.seek(start)
            return file.read(end - start)
        ranges = list(cutter.ranges(read, os.path.getsize(path), BLOCK_BYTES))
    return ranges, min(workers or (cpus() if len(ranges) >= 4 else 1), len(ranges))


# --- training ---

def count_pairs(words):
    """{pair of neighbours: how often}, over {word as a tuple of symbols: how often}."""
    pairs = Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += n
    return pairs


def merge_pair(word, pair):
    """`word`, a tuple of symbols, with each `pair` in it made one symbol, from the left.

    >>> merge_pair((b"a", b"a", b"a", b"b"), (b"a", b"a"))
    (b'aa', b'a', b'b')
    """
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        merged.append(b"".join(word[i:i + step]))
        i += step
    return tuple(merged)


def learn_merges(counts: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first merges for {word: how often}: BPE as one says it. Every pair is counted anew each time.

    >>> learn_merges({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 2)
    [(b's', b't'), (b'e', b'st')]
    """
    words = {tuple(bytes([byte]) for byte in word): n for word, n in counts.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = count_pairs(words)
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))      # of equally frequent pairs the greatest
        merges.append(best)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return merges


def train_bpe(input_path, vocab_size, special_tokens=("<|endoftext|>",), *, pattern=GPT2_PATTERN, workers=None):
    """Learn a vocabulary from a UTF-8 file: (vocab: {id: bytes}, merges: pairs of bytes in the order learnt).

    vocab_size counts the 256 bytes, the merges and the special tokens, which get ids in this order. Of equally frequent
    pairs the greatest as raw bytes is merged. workers: threads that count words; None: every CPU from four blocks of
    BLOCK_BYTES on. The result is the same for any number. Memory follows the number of distinct words.
    Raises ValueError (sizes, special tokens, not UTF-8), OSError; warns when no pair is left to merge.
    """
    specials = [utf8(token) for token in check_specials(special_tokens)]
    n_merges = operator.index(vocab_size) - 256 - len(specials)
    if n_merges < 0:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {256 + len(specials)}: "
                         f"256 bytes and {len(specials)} special tokens")
    if not os.path.getsize(input_path):
        raise ValueError(f"{input_path} is empty: there is nothing to train on")
    ranges, workers = _plan(input_path, Cutter(_CUTS.get(pattern), specials), workers)
    def count(job):
        return _count_ranges(job, input_path, specials, pattern)

    in_c = library() is not None
    counts = Words() if in_c else Counter()
    for more in share(count, [ranges[k::workers] for k in range(workers)], workers):
        counts.update(more)
    steps = counts.learn(n_merges) if in_c else learn_fast(counts, n_merges)
    vocab, merges = {i: bytes([i]) for i in range(256)}, []
    for a, b, _ in steps:
        merges.append((vocab[a], vocab[b]))
        vocab[len(vocab)] = vocab[a] + vocab[b]
    if len(merges) < n_merges:
        warnings.warn(f"no pair is left to merge: the vocabulary has {len(vocab) + len(specials)} entries, "
                      f"not the {vocab_size} asked for; give more text or a smaller vocab_size", stacklevel=2)
    vocab.update(enumerate(specials, len(vocab)))
    return vocab, merges


def _count_ranges(ranges, path, specials, pattern):
    """How often each word occurs in these ranges of a file: Words, or a Counter."""
    splitter, texts = splitter_of(specials), (read_range(path, start, end) for start, end in ranges)
    if can_cut(pattern):
        words, no_ids = Words(), dict.fromkeys(specials, 0)
        for text in texts:
            words.count(text, token_spans(text, splitter, no_ids), pattern)
        return words
    counts, compiled = Counter(), compile_pattern(pattern)
    for text in texts:
        for part in splitter.split(text)[::2] if splitter else [text]:
            counts.update(pieces(compiled, part.decode("utf-8")))
    return Counter({word.encode("utf-8"): n for word, n in counts.items()})


# --- the tokenizer ---

def merge_steps(tokenizer, word):
    """Yield (rank, pieces) from the bytes of one word on, a merge at a time: encoding as one says it, in O(n²)."""
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    parts, rank = [word[i:i + 1] for i in range(len(word))], None
    while True:
        yield rank, parts
        candidates = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not candidates:
            return
        rank, i = min(candidates)      # the merge that was learnt first, and of its places the leftmost
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]


class Tokenizer:
    """Text to ids and back with a given vocabulary and merges.

    vocab: {id: bytes}; merges: pairs of bytes, first learnt first. Special tokens that the vocabulary lacks are
    appended; of those that overlap in a text the longest wins. What files of others may have besides:
    added: {text: id} of tokens that are found in any text, whatever encode allows;
    normalizer: None or "NFC"; ignore_merges: a word that is in the vocabulary is one token (Llama 3). A tuple of
    patterns: each cuts the pieces that the one before has left.
    """

    def __init__(self, vocab, merges, special_tokens=None, *, pattern=GPT2_PATTERN, added=None, normalizer=None,
                 ignore_merges=False):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(pair) for pair in merges], pattern
        self.added, self.normalizer, self.ignore_merges = dict(added or {}), normalizer, ignore_merges
        self._id = {}                  # of two ids for the same bytes merges mean the first, special tokens the last
        for i, token in self.vocab.items():
            self._id.setdefault(token, int(i))
        last = {token: int(i) for i, token in self.vocab.items()}
        self.special_tokens, self.vocab_size = {}, max(self.vocab, default=-1) + 1    # so ids with gaps fit too
        for text in check_specials(special_tokens):
            token = utf8(text)
            if token not in last:
                self.vocab[self.vocab_size] = token
                self.vocab_size += 1
            self.special_tokens[text] = last.get(token, self.vocab_size - 1)
        self._ranks = {}               # (id, id) -> (rank, id of the two together)
        for rank, (a, b) in enumerate(self.merges):
            missing = [t for t in (a, b, a + b) if t not in self._id]
            if missing:
                raise ValueError(f"merge {rank}, of {a!r} and {b!r}: {missing[0]!r} is not in the vocabulary")
            self._ranks.setdefault((self._id[a], self._id[b]), (rank, self._id[a + b]))
        self._regex = compile_pattern(pattern)
        self._cutter = Cutter(_CUTS.get(pattern), [utf8(t) for t in (*self.special_tokens, *self.added)])
        self._merged, self._splitters, self._encoder = Remembered(self._merge_word, CACHED_WORDS), {}, None
        byte_ids = [self._id.get(bytes([b])) for b in range(256)]
        if can_cut(pattern) and not normalizer and not ignore_merges and None not in byte_ids:
            self._encoder = Encoder(byte_ids, self._ranks)

    def with_special(self, tokens):
        """A tokenizer with these special tokens besides its own; those it lacks get the next ids."""
        new = [token for token in check_specials(tokens) if token not in self.special_tokens]
        return Tokenizer(self.vocab, self.merges, [*self.special_tokens, *new], pattern=self.pattern, added=self.added,
                         normalizer=self.normalizer, ignore_merges=self.ignore_merges)

    def encode(self, text, allowed_special="all"):
        """The ids of `text`, a list. allowed_special: "all", or the set of special tokens that may become control ids;
        the others are plain text. Raises ValueError for half a surrogate pair, and for a byte the vocabulary lacks."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes a string, got {type(text).__name__}")
        allowed = self.special_tokens.keys() if allowed_special == "all" else allowed_special
        if isinstance(allowed, str) or not set(allowed) <= self.special_tokens.keys():
            raise ValueError(f'allowed_special is {allowed_special!r}; give "all" or a set of those that there are: '
                             f"{sorted(self.special_tokens)}")
        return self._encode_bytes(utf8(text), frozenset(allowed)).tolist()

    def _tokens(self, allowed):
        """(pattern of the special tokens in `allowed` and of all added ones, or None; {bytes: id})."""
        if allowed not in self._splitters:
            tokens = {utf8(t): i for t, i in self.special_tokens.items() if t in allowed}
            tokens.update((utf8(t), i) for t, i in self.added.items())
            self._splitters[allowed] = splitter_of(tokens), tokens
        return self._splitters[allowed]

    def _encode_bytes(self, data, allowed):
        """The ids as an array."""
        if self._encoder is None:
            return np.array(self._encode_by_regex(data, allowed), np.int64)
        return self._encoder.encode(data, token_spans(data, *self._tokens(allowed)), self.pattern)

    def _encode_by_regex(self, data, allowed):
        """Special tokens split the text, the regex cuts it into words, and each word is looked up or merged."""
        ids, (splitter, tokens) = [], self._tokens(allowed)
        for i, part in enumerate(splitter.split(data) if splitter else [data]):
            if i % 2:
                ids.append(tokens[part])
                continue
            text = part.decode("utf-8")
            if self.normalizer:
                text = unicodedata.normalize("NFC", text)
            ids += chain.from_iterable(map(self._merged.__getitem__, pieces(self._regex, text)))
        return ids

    def _merge_word(self, word):
        """The ids of one word, given as bytes."""
        if self.ignore_merges and word in self._id:
            return [self._id[word]]
        try:
            ids = [self._id[word[i:i + 1]] for i in range(len(word))]
        except KeyError as error:
            raise ValueError(f"the vocabulary has no token for the byte {error.args[0]!r} of {word[:50]!r}") from None
        return merge_ids(ids, self._ranks)

    def encode_iterable(self, chunks):
        """Yield the ids of the joined strings, holding back only what a later chunk could change.

        Memory does not grow with the text. A word is held whole, and with a pattern that is neither GPT-2's nor GPT-4's
        everything up to the next special token is.
        """
        held, enough, allowed = "", STREAM_CHARS, frozenset(self.special_tokens)
        for chunk in chunks:
            if not isinstance(chunk, str):
                raise TypeError(f"encode_iterable takes strings, got {type(chunk).__name__}")
            for start in range(0, len(chunk), STREAM_CHARS):
                held += chunk[start:start + STREAM_CHARS]
                if len(held) >= enough:
                    data = utf8(held)
                    cut = self._cutter.last(data)
                    yield from self._encode_bytes(data[:cut], allowed).tolist()
                    held = data[cut:].decode("utf-8")
                    enough = max(STREAM_CHARS, 2 * len(held))   # doubling: each character is looked at twice on average
        yield from self._encode_bytes(utf8(held), allowed).tolist()

    def encode_file(self, text_path, bin_path, *, workers=None):
        """Write the ids of a UTF-8 file as raw little-endian uint16, or uint32 above 65,536 ids; returns their number.

        The same ids as encode of the whole text, its line ends kept; streamed, by every CPU for a file of four blocks
        and more unless workers is given. bin_path appears whole or not at all.
        """
        dtype, total = "<u2" if self.vocab_size <= 65536 else "<u4", 0
        ranges, workers = _plan(text_path, self._cutter, workers)
        allowed = frozenset(self.special_tokens)

        def write(file):
            nonlocal total
            encoded = share(lambda span: self._encode_bytes(read_range(text_path, *span), allowed), ranges, workers)
            for ids in tqdm(encoded, total=len(ranges), desc="encoding", unit=" blocks", disable=None, leave=False):
                file.write(ids.astype(dtype))
                total += len(ids)

        write_atomically(bin_path, write)
        return total

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

    @classmethod
    def from_files(cls, vocab_path, merges_path, special_tokens=None):
        """From GPT-2's vocab.json and merges.txt, which keep their own ids."""
        vocab, merges = read_gpt2_files(vocab_path, merges_path, special_tokens or [])
        return cls(vocab, merges, special_tokens)

    @classmethod
    def load(cls, path):
        """From a tokenizer.json in Hugging Face's layout: byte-level BPE as GPT-2, Llama 3 or Qwen 2 have it.

        The ids are those of encode(..., add_special_tokens=False): a post_processor is left out. Raises ValueError
        naming the path and the part that would change ids and is not understood.
        """
        return read_tokenizer_json(path, cls)

    def save(self, path):
        """Write tokenizer.json, which Hugging Face's tokenizers reads and gives the same ids."""
        write_text(path, tokenizer_json(self))


# --- command line ---

@dataclasses.dataclass
class TrainConfig:
    vocab_size: int = 32000                    # bytes, merges and special tokens together
    out: str = "tokenizer.json"                # file to write
    special_tokens: str = "<|endoftext|>"      # with commas between them
    workers: int | None = None                 # threads; none lets the file's size decide


@dataclasses.dataclass
class EncodeConfig:
    out: str = ""                              # file to write; empty: FILE.bin
    workers: int | None = None                 # threads; none lets the file's size decide


@dataclasses.dataclass
class ShowConfig:
    merges: int = 12                           # how many merges of a text file, or longest tokens of a tokenizer


@dataclasses.dataclass
class CompareConfig:
    """compare has no settings."""


def train(config, path):
    """Learn a vocabulary from a file and write it as tokenizer.json."""
    specials, begin = [t for t in config.special_tokens.split(",") if t], time.perf_counter()
    claim_file(config.out, [path])
    vocab, merges = train_bpe(path, config.vocab_size, specials, workers=config.workers)
    Tokenizer(vocab, merges, specials).save(config.out)
    print(f"{config.out}: {len(vocab)} tokens, {len(merges)} merges, {time.perf_counter() - begin:.2f} s")


def encode(config, tokenizer, path):
    """Write the ids of a file as uint16 or uint32."""
    begin, size = time.perf_counter(), os.path.getsize(path)
    out = claim_file(config.out or f"{path}.bin", [tokenizer, path])
    n = Tokenizer.load(tokenizer).encode_file(path, out, workers=config.workers)
    seconds = time.perf_counter() - begin
    print(f"{out}: {n:,} tokens, {size / max(n, 1):.3f} bytes per token, {size / seconds / 1e6:.1f} MB/s")


def show(config, path, text=None):
    """Print how a text is encoded, or a tokenizer's longest tokens, or how a text file's first merges are learnt."""
    if not str(path).endswith(".json"):
        if text is not None:
            raise ValueError(f"{path} is no tokenizer.json to encode {text!r:.40} with; a text file stands alone")
        show_training(check_utf8(Path(path).read_bytes(), path), config.merges)
        return
    tok = Tokenizer.load(path)
    if text is None:
        for i in sorted(tok.vocab, key=lambda i: len(tok.vocab[i]), reverse=True)[:config.merges]:
            print(f"{i:>7} {len(tok.vocab[i]):>4} bytes  {tok.decode([i])!r}")
        return
    print("  ".join(f"{tok.decode([i])!r} {i}" for i in tok.encode(text)))
    splitter, _ = tok._tokens(frozenset(tok.special_tokens))
    parts = splitter.split(utf8(text))[::2] if splitter else [utf8(text)]
    for word in dict.fromkeys(w for part in parts for w in pieces(tok._regex, part.decode("utf-8"))):
        print()
        for rank, symbols in merge_steps(tok, utf8(word)):
            print("bytes      " if rank is None else f"merge {rank:<5}", " ".join(map(to_text, symbols)))


def show_training(text, n_merges):
    """Print each merge that wins, how often its pair occurs, and words that it changes."""
    parts, pattern = text.split("<|endoftext|>"), compile_pattern(GPT2_PATTERN)
    counts = Counter(word.encode("utf-8") for part in parts for word in pieces(pattern, part))
    words = {tuple(bytes([byte]) for byte in word): n for word, n in counts.items()}
    for step, best in enumerate(learn_merges(counts, n_merges)):
        print(f"merge {step:<4} {to_text(best[0])} {to_text(best[1])}   {count_pairs(words)[best]} times")
        merged = {word: merge_pair(word, best) for word in words}
        changed = sorted((word for word in words if merged[word] != word), key=words.get, reverse=True)
        for word in changed[:2]:
            print(f"      {words[word]:>8} times  {' '.join(map(to_text, merged[word]))}")
        words = {merged[word]: n for word, n in words.items()}


def compare(config, path):
    """One table: characters, bytes, words and BPE, made on nine tenths of a file, measured on the last."""
    text = check_utf8(Path(path).read_bytes(), path)
    known, held_out = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    if not held_out:
        raise ValueError(f"{path} is empty: give a text to compare on")
    rows = [("characters", CharTokenizer(known)), ("bytes", ByteTokenizer()), ("words", WordTokenizer(known))]
    with tempfile.TemporaryDirectory() as folder:
        known_path = Path(folder) / "known.txt"
        known_path.write_bytes(known.encode("utf-8"))
        rows += [(f"BPE {n}", Tokenizer(*train_bpe(known_path, n, []))) for n in (300, 1000, 4000, 16000)]
    size = len(held_out.encode("utf-8"))
    print(f"{'tokenizer':18}{'vocabulary':>11}{'tokens':>12}{'bytes/token':>13}{'unknown':>9}")
    for name, tok in rows:
        ids = tok.encode(held_out)
        unknown = sum(i == getattr(tok, "unknown_id", None) for i in ids) / len(ids)
        print(f"{name:18}{tok.vocab_size:11,}{len(ids):12,}{size / len(ids):13.2f}{unknown:9.2%}")


USAGE = __doc__[__doc__.index("    python bpe.py train"):]
VERBS = {"train": (TrainConfig, train, (1,)), "encode": (EncodeConfig, encode, (2,)),
         "show": (ShowConfig, show, (1, 2)), "compare": (CompareConfig, compare, (1,))}    # settings, what runs, files


def main(argv: list[str]) -> None:
    """Run one verb. A bad command line, value or file exits with status 2."""
    verb, files, config, _ = command_line({verb: kind for verb, (kind, _, _) in VERBS.items()}, argv, USAGE,
                                          reads_scripts=True)
    _, run, n_files = VERBS[verb]
    try:
        if len(files) not in n_files:
            raise ValueError(f"{verb} does not take {len(files)} files: {' '.join(files)}\n{USAGE}")
        run(config, *files)
    except (ValueError, TypeError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
