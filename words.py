"""Text as characters, bytes or words: the three vocabularies that BPE replaces, and the words that it starts from.

    "I'll  go"    characters    I ' l l ␠ ␠ g o      a small vocabulary, long text, unknown characters
                  bytes         49 27 6c 6c 20 …     256 ids, nothing unknown, longer still
                  words         I | 'll | ␠ | ␠go    short text, an endless vocabulary, every new word unknown

The words are GPT-2's, cut by a regex: contractions; letters, numbers or other signs, each with one space before them;
and white space. bpe.py merges bytes inside such words.
"""
import operator
import re
from collections import Counter

import regex

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# OpenAI's first spelling of it, which cuts alike.
GPT2_PATTERNS = (
    GPT2_PATTERN, r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
GPT4_PATTERNS = tuple(    # Llama 3 and GPT-4 take three digits together, Qwen 2 one
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+""" % digits for digits in ("{1,3}", ""))

# --- cutting text into words ---

def pieces(pattern, text):
    """The words of `text`, which merges stay inside: the matches of a compiled pattern and what lies between.

    >>> pieces(regex.compile(GPT2_PATTERN), "I'll  go")
    ['I', "'ll", ' ', ' go']
    """
    if isinstance(pattern, tuple):               # several: each cuts what the one before has left
        parts = [text]
        for one in pattern:
            parts = [piece for part in parts for piece in pieces(one, part)]
        return parts
    words = [] if pattern.groups else pattern.findall(text)
    if sum(map(len, words)) == len(text):
        return words if all(words) else list(filter(None, words))
    words, end = [], 0
    for match in pattern.finditer(text):
        words += text[end:match.start()], match[0]
        end = match.end()
    return list(filter(None, [*words, text[end:]]))


def compile_pattern(pattern):
    """A pattern or a tuple of patterns, compiled."""
    return tuple(map(regex.compile, pattern)) if isinstance(pattern, tuple) else regex.compile(pattern)


def splitter_of(tokens):
    """A pattern for any of the byte strings, longest first, in a group so that split keeps them; None for none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")") if tokens else None


def utf8(text):
    """`text` as UTF-8. Raises UnicodeError, a ValueError, for half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnicodeError(f"text holds half a surrogate pair, {text[error.start]!r} at character {error.start}, "
                         "which UTF-8 cannot write; replace it first") from None


def check_utf8(data, path, start=0):
    """The text of `data`, which stands at byte `start` of the file `path`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start} "
                         f"({error.reason}); convert the file to UTF-8 first") from None


def check_specials(special_tokens):
    """The list of special tokens. Raises ValueError for an empty one and one given twice."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens is the string {special_tokens!r}; give a list of strings")
    special_tokens = list(special_tokens or [])
    for token in special_tokens:
        if not token or special_tokens.count(token) > 1:
            raise ValueError(f"special token {token!r} is empty or given twice: give each once")
    return special_tokens


def read_range(path, start, end):
    """The bytes start … end of a file, which must be UTF-8."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    check_utf8(data, path, start)
    return data


class Remembered(dict):
    """{word: make(its UTF-8)}, made when first asked for. It holds `size` words and then starts afresh."""
    LONG_WORD = 64    # results longer than this are not kept, so that memory stays small

    def __init__(self, make, size):
        self.make, self.size = make, size

    def __missing__(self, word):
        result = tuple(self.make(utf8(word)))    # smaller than a list
        if len(result) < self.LONG_WORD:
            if len(self) >= self.size:
                self.clear()
            self[word] = result
        return result


# --- the three that BPE replaces ---

class CharTokenizer:
    """One id a character: those of `text` in order, and one more for the unknown; without text, the code point."""

    def __init__(self, text=None):
        self.characters = None if text is None else [*sorted(set(text)), "\ufffd"]
        self.vocab_size = 0x110000 if text is None else len(self.characters)
        self.unknown_id = None if text is None else self.vocab_size - 1

    def encode(self, text):
        if self.characters is None:
            return list(map(ord, text))
        ids = {c: i for i, c in enumerate(self.characters[:-1])}
        return [ids.get(c, self.unknown_id) for c in text]

    def decode(self, ids):
        return "".join(self.characters[i] if self.characters else chr(i) for i in _checked(ids, self.vocab_size))


class ByteTokenizer:
    """One id a byte of UTF-8: nothing is ever unknown, and nothing is ever short."""
    vocab_size, unknown_id = 256, None

    def encode(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return bytes(_checked(ids, 256)).decode("utf-8", errors="replace")


class WordTokenizer:
    """One id a word of `text`, the most frequent first; id 0 stands for every word never seen."""
    unknown_id = 0

    def __init__(self, text="", vocab_size=None, *, pattern=GPT2_PATTERN):
        self._regex = compile_pattern(pattern)
        counts = Counter(pieces(self._regex, text)).most_common(None if vocab_size is None else vocab_size - 1)
        self.words = ["<unk>", *(word for word, _ in counts)]
        self.vocab_size = len(self.words)

    def encode(self, text):
        ids = {word: i for i, word in enumerate(self.words) if i}
        return [ids.get(word, self.unknown_id) for word in pieces(self._regex, text)]

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
    return len(utf8(text)) / len(tokenizer.encode(text))
