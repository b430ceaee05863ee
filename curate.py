"""The functions of clean.py over archives by the million pages.

    0.warc.gz ─┐ curate_file: one archive a task, on any executor      curate_collection: all documents, in memory
    1.warc.gz ─┼─▶ shards/*.jsonl  texts that passed            ─┬─▶ near duplicates ─▶ lines that occur again
    2.warc.gz ─┘   shards/*.npy    their MinHash signatures      │     ─▶ documents.jsonl ─▶ corpus.txt, shuffled
                   counts/*.json   what was dropped, with samples┴─▶ report.json, report.html

A line of a shard: {"id": "http://…", "language": "en", "score": 0.98, "text": "The lighthouse of Øst …"}

An archive that has its counts is not read again, so a killed job goes on where it was; every executor gives the same
bytes. Near duplicates go before lines, or a page fetched twice would lose its lines in both places. That needs all
documents in memory (16,000 pages of 3 KB took 160 MB); for more, run the archives in parts.
"""
import concurrent.futures
import contextlib
import ctypes
import functools
import html
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import clean
from archive import Extractor, expand, read_archive
from checkpoint import write_atomically, write_text
from classify import SEPARATOR, load_classifier

SAMPLES, EXCERPT_CHARS = 5, 300                  # of documents in the report
PAGES_AT_ONCE = 200
# What the labels of known models call the thing they look for; ours say `positive`.
MODELS = {"hate": ("positive", "toxic", "hate"), "adult": ("positive", "nsfw", "adult"),
          "quality": ("positive", "hq", "wiki", "high")}


@dataclass
class CurateConfig:
    """What `python data.py curate` can be told."""
    out: str = "data/crawl"              # folder of shards, reports and token files
    workers: int | None = None           # processes; none = one per core
    scheduler: str | None = None         # tcp://HOST:PORT of a Dask cluster that sees the same files and these scripts
    seed: int = 0                        # of MinHash and of the order of documents
    languages: str | None = "en"         # ISO 639-1 codes to keep, with commas between; none = all
    language_score: float = 0.5          # least score of the language
    gopher: bool = True                  # Gopher's rules of quality and of repetition
    hate: str | None = None              # model (ours or fastText's .bin) of hateful text
    adult: str | None = None             # model of pornographic text
    quality: str | None = None           # model of good text
    harm_threshold: float = 0.5          # hate or adult from this probability on is dropped
    quality_threshold: float = 0.5       # quality below this probability is dropped
    num_hashes: int = 128                # of MinHash
    num_bands: int = 16                  # of the signature
    ngrams: int = 5                      # words to a shingle
    threshold: float = 0.8               # Jaccard similarity of near duplicates
    vocab_size: int | None = 4096        # of the tokenizer; none = no token files


# --- rules ---

class Page:
    """A text on its way: where it comes from, what is known of it and, once a rule asks, its words as numbers."""

    def __init__(self, address: str, text: str, failure: str = ""):
        self.address, self.text, self.facts = address, text, {}
        self.failure = failure or ("" if text.strip() else "no text")

    @functools.cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, lengths) of the normalised words, (n,) each."""
        return clean.hash_words(clean.normalize(self.text))


def load_models(config: CurateConfig) -> dict:
    """{name: function of a text that gives (label, probability)} of the models named. Raises ValueError for others."""
    models = {}
    for name in MODELS:
        if path := getattr(config, name):
            models[name], labels = load_classifier(path)
            if not set(labels) & set(MODELS[name]):
                raise ValueError(f"{path} gives {', '.join(map(str, labels[:5]))}; a model for {name} must have one of "
                                 f"the labels {', '.join(MODELS[name])}")
    return models


def make_rules(config: CurateConfig, counts: dict) -> list:
    """[(step, function of a page that gives why it must go, or an empty string), …] in their order."""
    models = load_models(config)

    def language(page: Page) -> str:
        code, score = clean.identify_language(page.text)
        counts["languages"][code] += 1
        page.facts |= {"language": code, "score": round(score, 4)}
        keep = not config.languages or code in config.languages.split(",") and score >= config.language_score
        return "" if keep else f"{code} {score:.2f}"

    def masks(page: Page) -> str:                # drops nothing
        for mask in (clean.mask_emails, clean.mask_phone_numbers, clean.mask_ips):
            page.text, n = mask(page.text)
            counts["masked"][mask.__name__] += n
        return ""

    def ask_model(name: str, page: Page) -> str:
        label, score = page.facts[name] = models[name](page.text)
        p = score if label in MODELS[name] else 1 - score
        drop = p < config.quality_threshold if name == "quality" else p >= config.harm_threshold
        return f"{label} {score:.3f}" if drop else ""

    rules = [("text", lambda page: page.failure), ("language", language), ("masks", masks)]
    if config.gopher:
        rules += [("gopher", lambda page: clean.gopher_reason(page.text)),
                  ("repetition", lambda page: clean.repetition_reason(page.text, *page.words))]
    return rules + [(name, functools.partial(ask_model, name)) for name in models]


# --- one archive ---

def passes(page: Page, step: str, reason: str, counts: dict) -> bool:
    """True without a reason. Pages that pass a step are counted, the first that do not kept to look at."""
    passed = counts["funnel"].setdefault(step, [0, 0])
    samples = counts["samples"].setdefault(f"{step}: dropped", [])
    if not reason:
        passed[0] += 1
        passed[1] += len(page.text if page.text.isascii() else page.text.encode("utf-8", "replace"))
    elif len(samples) < SAMPLES:
        samples.append([page.address, reason, page.text[:EXCERPT_CHARS]])
    return not reason


def read_pages(path: str, extract, counts: dict):
    """Yield the pages of an archive as text, and count what could not be read."""
    archive = counts["funnel"]["archive"]
    for address, content, is_html in read_archive(path, counts["damage"]):
        archive[0] += 1
        archive[1] += len(content)
        page = Page(address, *(extract(content) if is_html else (content.decode("utf-8", "replace"), "")))
        if page.failure:
            counts["damage"][page.failure] += 1
        yield page


def curate_file(path: str, out_dir: str, config: CurateConfig) -> dict:
    """Read one archive, judge every page, write its shard, its signatures and, last, its counts, which are returned.

    Raises ValueError for a file of which nothing can be read.
    """
    out, name = Path(out_dir), Path(path).name
    counts = {"damage": Counter(), "masked": Counter(), "languages": Counter(), "samples": {},
              "funnel": {"archive": [0, 0]}}
    lines, signatures, rules = [], [], make_rules(config, counts)
    with contextlib.closing(Extractor()) as extract:
        pages = read_pages(path, extract, counts)
        # One rule over many pages, then the next: its code and tables stay in the cache, which saves a third.
        while batch := list(itertools.islice(pages, PAGES_AT_ONCE)):
            for step, rule in rules:
                batch = [page for page in batch if passes(page, step, rule(page), counts)]
            for page in batch:                   # nothing speaks against these
                lines.append(json.dumps({"id": page.address} | page.facts | {"text": page.text}, ensure_ascii=False))
                grams = clean.hash_ngrams(page.words[0], config.ngrams)
                signatures.append(clean.minhash(grams, config.num_hashes, config.seed))
    if not counts["funnel"]["archive"][0] and not counts["damage"]["no page"]:
        raise ValueError(f"{path}: no page could be read of its {os.path.getsize(path):,} bytes "
                         f"({dict(counts['damage']) or 'no records'}); is it a WARC or WET file, gzip, zstd or plain?")
    array = np.array(signatures, dtype=np.uint32).reshape(-1, config.num_hashes)
    write_text(out / "shards" / f"{name}.jsonl", *(f"{line}\n" for line in lines))
    write_atomically(out / "shards" / f"{name}.npy", lambda file: np.save(file, array))
    write_text(out / "counts" / f"{name}.json", json.dumps(counts, ensure_ascii=False))
    return counts


# --- all archives ---

def curate_archives(paths, out_dir, executor=None, **settings) -> dict:
    """Clean documents from web archives; returns what report.json holds. The arguments are those of data.curate."""
    config, out = CurateConfig(out=str(out_dir), **settings), Path(out_dir)
    chosen = check_settings(config)
    patterns = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    paths = {path for pattern in map(str, patterns) for path in expand(pattern)}
    paths, shards = clean.output_names(sorted(paths, key=os.path.basename), out / "shards")
    (out / "counts").mkdir(exist_ok=True)
    begun, now = out / "settings.json", json.dumps(chosen, indent=1, sort_keys=True)
    free = {"vocab_size": None}                  # it decides nothing before the token files
    if (begun.exists() and json.loads(begun.read_text(encoding="utf-8")) | free != json.loads(now) | free
            and any((out / "counts").iterdir())):
        raise ValueError(f"{out} was begun with other settings ({begun}); give another --out, or delete the folder")
    write_text(begun, now)
    counts = [out / "counts" / f"{path.name}.json" for path in paths]
    run_archives([path for path, done in zip(paths, counts) if not done.exists()], out, config, executor)
    report = merge([json.loads(path.read_text(encoding="utf-8")) for path in counts]) | {"settings": chosen}
    curate_collection(shards, out, config, report)
    return report


def check_settings(config: CurateConfig) -> dict:
    """The settings that decide what comes out. Raises ValueError."""
    clean.check_bands(config.num_hashes, config.num_bands, config.ngrams, config.threshold)
    if config.workers is not None and config.workers < 1 or config.seed < 0:
        raise ValueError(f"workers={config.workers} must be at least 1 or none, seed={config.seed} at least 0")
    if config.vocab_size and config.vocab_size < 257:
        raise ValueError(f"vocab_size={config.vocab_size} must be at least 257, the bytes and <|endoftext|>, or none")
    load_models(config)                          # a mistake is known before the first archive is read
    config.languages = (config.languages or "").replace(" ", "").lower() or None
    for code in config.languages.split(",") if config.languages else ():
        if code not in load_classifier(None)[1]:
            raise ValueError(f"languages={config.languages}: {code!r} is no language of the model; codes are those of "
                             "ISO 639-1, such as en, de or zh")
    return {key: value for key, value in vars(config).items() if key not in ("out", "workers", "scheduler")}


def end_too() -> None:
    """In a worker: ask Linux to end it when its parent is killed; else the worker would wait for work for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)       # 1: PR_SET_PDEATHSIG


def run_archives(paths: list[Path], out: Path, config: CurateConfig, executor) -> None:
    """Run curate_file over the archives. Raises ValueError naming all that could not be read."""
    failures = []
    with contextlib.ExitStack() as stack:
        if executor is None and config.scheduler:
            from distributed import Client
            executor = stack.enter_context(Client(config.scheduler)).get_executor()
        elif executor is None:
            executor = stack.enter_context(concurrent.futures.ProcessPoolExecutor(config.workers, initializer=end_too))
        # By absolute paths: a worker on another machine, or of an older cluster, need not stand in this folder.
        jobs = [executor.submit(curate_file, str(path.resolve()), str(out.resolve()), config) for path in paths]
        try:
            for job in tqdm(concurrent.futures.as_completed(jobs), total=len(jobs), unit="file", disable=None):
                try:
                    job.result()
                except ValueError as error:      # the others are read all the same
                    failures.append(str(error))
        finally:
            for job in jobs:
                job.cancel()                     # after an error or Ctrl-C; finished ones do not mind
    if failures:
        raise ValueError("; ".join(sorted(failures)))


def merge(counts: list[dict]) -> dict:
    """The sum of the counts of all archives, with the first few samples of what each step dropped."""
    report = {"files": len(counts), "funnel": {}, "samples": {}}
    for step in max((one["funnel"] for one in counts), key=len):
        title = f"{step}: dropped"
        report["funnel"][step] = np.sum([one["funnel"].get(step, (0, 0)) for one in counts], axis=0).tolist()
        report["samples"][title] = [sample for one in counts for sample in one["samples"].get(title, ())][:SAMPLES]
    for key in ("damage", "masked", "languages"):
        report[key] = dict(sum((Counter(one[key]) for one in counts), Counter()))
    return report


# --- the whole collection ---

def curate_collection(shards: list[Path], out: Path, config: CurateConfig, report: dict) -> None:
    """Near duplicates, lines that occur again, order: what needs all documents at once. Fills `report`."""
    n, n_bytes = list(report["funnel"].values())[-1]
    print(f"{out}: {n:,} documents come into memory: about {(2.5 * n_bytes + 2000 * n) / 1e6:,.0f} MB")
    documents = [json.loads(line) for shard in shards
                 for line in Path(f"{shard}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    signatures = np.concatenate([np.load(f"{shard}.npy") for shard in shards])
    clusters = clean.near_duplicates(signatures, lambda i: documents[i]["text"], config.num_bands, config.ngrams,
                                     config.threshold)
    report["clusters"] = len(clusters)
    dropped = {i for cluster in clusters for i in cluster[1:]}
    documents = [document for i, document in enumerate(documents) if i not in dropped]
    sizes = [len(document["text"].encode()) for document in documents]
    report["funnel"]["near duplicates"] = [len(sizes), sum(sizes)]
    documents = drop_lines(documents, config, report)
    write_text(out / "documents.jsonl", *(json.dumps(document, ensure_ascii=False) + "\n" for document in documents))
    # A page that spells the separator must not end a document.
    texts = [document["text"].replace(SEPARATOR, "<| endoftext |>") + SEPARATOR for document in documents]
    np.random.default_rng(config.seed).shuffle(texts)
    write_text(out / "corpus.txt", *texts)


def drop_lines(documents: list[dict], config: CurateConfig, report: dict) -> list[dict]:
    """The documents without lines that occur again; what is left must still be a document. Blank lines stay."""
    report["funnel"]["lines"], kept = [0, 0], []
    drop = iter(clean.duplicate_lines(
        line for document in documents for line in document["text"].encode().split(b"\n")))
    for document in documents:
        lines = [line for line in document["text"].split("\n") if not next(drop) or not line.strip()]
        document["text"] = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        page = Page(document["id"], document["text"])
        if not page.failure and config.gopher:
            page.failure = clean.gopher_reason(page.text)
        if passes(page, "lines", page.failure, report):
            kept.append(document)
    return kept


# --- the report ---

def write_report(report: dict, out: Path) -> None:
    """report.json, and report.html: funnel, counts, samples of what every rule dropped, without an outside file."""
    def table(title: str, rows, head=("", "")) -> str:
        lines = ["".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in (head, *rows)]
        return f"<h2>{title}</h2><table><tr>" + "<tr>".join(lines) + "</table>"

    funnel, before = [], report["funnel"]["archive"][0]
    for step, (documents, n_bytes) in report["funnel"].items():
        funnel.append((step, f"{documents:,}", f"{n_bytes:,}", f"{1 - documents / max(before, 1):.1%}"))
        before = documents
    parts = ["<!doctype html><meta charset=utf-8><title>report</title><style>body{font:15px sans-serif;margin:2em} "
             "td{padding:2px 1em;vertical-align:top}</style>",
             table("Funnel", funnel, ("after", "documents", "bytes", "dropped here"))]
    for title in ("damage", "masked", "languages"):
        parts.append(table(title, Counter(report[title]).most_common()))
    for title, samples in report["samples"].items():
        parts.append(table(title, samples, ("document", "reason", "beginning")))
    write_text(out / "report.html", "\n".join(parts))
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    print(f"{out}: {before:,} of {report['funnel']['archive'][0]:,} documents are left; {out / 'report.html'} says why")
