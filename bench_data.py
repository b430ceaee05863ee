"""The verbs of bench.py for data: tokenizers on two corpora, a small web from HTML to a model, curation's speed.

    python bench.py tokenizers A.txt B.txt      BPE of 10,000 and of 32,000, each on both: time, memory, bytes per token
    python bench.py web FOLDER_OF_HTML          archive, curation, what was dropped and why, tokens, two models compared
    python bench.py pages FOLDER_OF_HTML        all steps of curation beside the extraction alone
    python bench.py minhash                     near duplicates beside datasketch
"""
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bpe
import clean
import curate
import data
import train
from configurator import command_line, resolve
from evaluate import perplexity
from model import load_model

PILE_BYTES = 825e9                             # 2101.00027


def show(lines: list[str], path: str | None) -> None:
    """Print a table, and write it to a file where one is named."""
    print("\n".join(lines))
    if path is not None:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


# --- two tokenizers, two corpora ---

@dataclass
class TokenizersConfig:
    """What `python bench.py tokenizers A.txt B.txt` can be told."""
    vocab_a: int = 10_000                # of the tokenizer trained on A
    vocab_b: int = 32_000                # of B's
    megabytes: float = 5.0               # of each corpus that are encoded
    out: str | None = None               # file that gets the table too


TRAIN = """import json, resource, sys, time, bpe
began = time.perf_counter()
vocab, merges = bpe.train_bpe(sys.argv[1], int(sys.argv[2]), ["<|endoftext|>"])
seconds = time.perf_counter() - began
bpe.Tokenizer(vocab, merges, ["<|endoftext|>"]).save(sys.argv[3])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([seconds, sum(one.ru_utime + one.ru_stime for one in used), max(one.ru_maxrss for one in used)]))"""


def tokenizers(words: list[str]) -> None:
    """BPE trained on two corpora: seconds, memory, longest tokens; then both on both: bytes per token, MB a second."""
    usage = "usage: python bench.py tokenizers A.txt B.txt [--key=value …]"
    _, files, config, _ = command_line(TokenizersConfig, words, usage)
    if len(files) != 2:
        sys.exit(usage)
    lines, made = [f"{bpe.cpus()} CPU cores, {time.strftime('%Y-%m-%d')}"], []
    with tempfile.TemporaryDirectory() as folder:
        for path, vocab_size in zip(files, (config.vocab_a, config.vocab_b)):
            saved = f"{folder}/{len(made)}.json"
            # A process of its own, so that its peak of memory is training's.
            output = subprocess.run([sys.executable, "-c", TRAIN, path, str(vocab_size), saved], check=True, text=True,
                                    capture_output=True, cwd=Path(__file__).parent).stdout
            seconds, cpu, peak_kb = json.loads(output)
            tokenizer = bpe.Tokenizer.load(saved)
            longest = sorted(tokenizer.vocab.values(), key=len)[-3:]
            made.append((Path(path).stem, tokenizer))
            lines.append(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, vocabulary {tokenizer.vocab_size:,} trained "
                         f"in {seconds:.2f} s ({cpu:.1f} s of CPU), peak {peak_kb / 1024:.0f} MB a process; longest "
                         "tokens " + ", ".join(repr(token.decode("utf-8", "replace")) for token in reversed(longest)))
        lines.append(f"\n{'text':<22}{'tokenizer':<22}{'bytes/token':>12}{'MB/CPU s':>10}{'hours for the Pile':>20}"
                     f"{'tokens':>12}")
        for path in files:
            text = Path(path).read_bytes()[:int(config.megabytes * 1e6)].decode("utf-8", "ignore")
            sample = Path(folder) / "sample.txt"
            sample.write_text(text, encoding="utf-8", newline="")
            for name, tokenizer in made:
                began = time.process_time()
                n = tokenizer.encode_file(sample, f"{folder}/ids.bin", workers=1)
                rate = sample.stat().st_size / (time.process_time() - began)
                lines.append(f"{Path(path).stem:<22}{name:<22}{sample.stat().st_size / n:>12.3f}{rate / 1e6:>10.1f}"
                             f"{PILE_BYTES / rate / 3600:>20.1f}{n:>12,}")
        lines.append(f"\nids are uint16: the largest is {max(t.vocab_size for _, t in made) - 1:,} of 65,535, half the "
                     "bytes of int32; encoded by one process, a file read from disk and ids written")
    show(lines, config.out)


# --- a small web ---

@dataclass
class WebConfig:
    """What `python bench.py web FOLDER_OF_HTML` can be told."""
    steps: int = 400                     # of training on each text
    vocab_size: int = 4096               # of the one tokenizer, trained on the raw text
    pages: int = 13000                   # at most, chosen by the hash of their paths
    held_out: int = 200                  # pages, of which those that pass every rule are the validation text
    workers: int | None = None           # of curation
    out: str = "out/web"                 # archive, texts, report.html, models, table.txt


def html_files(folder: Path) -> list[Path]:
    """All files below a folder that end in .html, in order."""
    return [path for path in sorted(folder.rglob("*.html")) if path.is_file()]


def packed(folder: Path, out: Path, paths=None) -> Path:
    """A WARC file of HTML pages, or of all pages below a folder; a file is taken as the archive it is."""
    if folder.is_file():
        return folder
    archive = out / "pages.warc"
    with open(archive, "wb") as file:
        for path in html_files(folder) if paths is None else paths:
            http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + path.read_bytes()
            file.write(f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: file:{path}\r\nContent-Type: "
                       f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n".encode())
            file.write(http + b"\r\n\r\n")
    return archive


def read_by_eye(archive: Path, n: int) -> list[str]:
    """Three of the n records, as they come and as the extraction leaves them."""
    lines = ["three records, as they come and as text:"]
    for number, (address, content, _) in enumerate(curate.read_archive(archive, Counter())):
        if number % max(1, -(-n // 3)) == 0:
            text = " / ".join(clean.extract_text(content, main_content=True).split("\n"))
            lines += [f"  {Path(address).name}", f"    {len(content):,} bytes: {content[:150]!r}",
                      f"    {len(text):,} characters: {text[:220]}"]
    return lines


def dropped_and_kept(report: dict) -> list[str]:
    """Up to three documents that each rule dropped, with the reason it gave, and three that were kept."""
    lines, kept = ["what each rule dropped, and what was kept:"], f"{list(report['funnel'])[-1]}: kept"
    for kind, samples in report["samples"].items():
        if kind.endswith("dropped") or kind == kept:
            lines += [f"  {kind:<20} {Path(address).name[:40]} | {reason or '-'} | {' '.join(text.split())[:130]}"
                      for address, reason, text in samples[:3]]
    return lines


def web(words: list[str]) -> None:
    """From HTML to a model: an archive, curation, its funnel, what it dropped, tokens, raw against curated text."""
    usage = "usage: python bench.py web FOLDER_OF_HTML [--key=value …]"
    _, files, config, _ = command_line(WebConfig, words, usage)
    if len(files) != 1 or not Path(files[0]).is_dir():
        sys.exit(usage)
    out, paths = Path(config.out), sorted(html_files(Path(files[0])), key=lambda path: hashlib.sha256(
        path.as_posix().encode()).digest())[:config.pages]
    out.mkdir(parents=True, exist_ok=True)
    for name in ("held", "kept"):
        (out / name).mkdir(exist_ok=True)
    held = packed(Path(files[0]), out / "held", paths[:config.held_out])
    archive = packed(Path(files[0]), out, paths[config.held_out:])
    lines = [f"{len(paths):,} pages of {files[0]}, {archive.stat().st_size / 1e6:.0f} MB packed, "
             f"{time.strftime('%Y-%m-%d')}", *read_by_eye(archive, len(paths) - config.held_out), ""]
    began = time.perf_counter()
    report = curate.curate_archives([archive], out / "kept", workers=config.workers)
    seconds = time.perf_counter() - began
    data.write_report(report, out / "kept")
    curate.curate_archives([held], out / "held" / "kept", workers=config.workers)
    lines += [f"curation: {seconds:.1f} s, {len(paths) / seconds:.0f} documents per second; documents and MB after "
              "each step:", *(f"  {step:<18}{n:>7,}{size / 1e6:>9.1f}" for step, (n, size) in report["funnel"].items()),
              "", *dropped_and_kept(report), ""]
    texts = {"raw": out / "raw.txt", "curated": out / "kept" / "corpus.txt"}
    with open(texts["raw"], "w", encoding="utf-8", errors="replace", newline="\n") as file:
        for _, content, _ in curate.read_archive(archive, Counter()):
            file.write(clean.extract_text(content) + curate.SEPARATOR)
    lines += compare(texts, out / "held" / "kept" / "corpus.txt", config, out)
    show(lines, str(out / "table.txt"))


def compare(texts: dict, validation: Path, config: WebConfig, out: Path) -> list[str]:
    """The same model trained on each text, one tokenizer, as many tokens; lines of its loss on held-out pages."""
    lines, tokenizer = [], None
    clean_text = validation.read_text(encoding="utf-8").replace(curate.SEPARATOR, "\n\n")
    if not clean_text.strip() or not texts["curated"].stat().st_size:
        raise ValueError(f"{validation}: no page passed all rules, so there is nothing to train on or to measure with")
    for name, text in texts.items():
        folder = out / f"data_{name}"
        meta = data.prepare(text, vocab_size=None if tokenizer else config.vocab_size, data_dir=folder,
                            tokenizer=tokenizer, context_length=256)
        tokenizer = tokenizer or folder / "tokenizer.json"
        flags = dict(data_dir=folder, out_dir=out / name, max_steps=config.steps, max_minutes="none", eval_every=0,
                     num_samples=1, overwrite="true")
        default = str(Path(__file__).with_name(train.DEFAULT_CONFIG))
        train.main(resolve(train.TrainConfig, {key: str(value) for key, value in flags.items()}, default)[0])
        model, reader = load_model(out / name)
        ids = np.array(reader.encode(clean_text, set()))
        scores = perplexity(model, ids, len(clean_text.encode("utf-8")))
        lines.append(f"{name:<8} {meta['train_tokens']:>12,} tokens to train on; after {config.steps} steps: "
                     f"{scores['bits_per_byte']:.4f} bits per byte of {len(ids):,} tokens of held-out clean pages")
    return lines


# --- curation and near duplicates, beside others ---

def pages(words: list[str]) -> None:
    """All steps of curation beside the extraction alone, CPU seconds of one core: pages ARCHIVE_OR_FOLDER_OF_HTML."""
    if len(words) != 1:
        sys.exit("usage: python bench.py pages ARCHIVE_OR_FOLDER_OF_HTML")
    with tempfile.TemporaryDirectory() as out:
        for name in ("shards", "counts"):
            (Path(out) / name).mkdir()
        archive = packed(Path(words[0]), Path(out))

        def extraction():
            for _, content, _ in curate.read_archive(archive, Counter()):
                clean.extract_text(content, main_content=True)

        def everything():
            return curate.curate_file(str(archive), out, curate.CurateConfig())

        def cpu_seconds():                       # of this process and of its children that have ended
            spent = os.times()
            return spent.user + spent.system + spent.children_user + spent.children_system

        funnel, seconds = everything()["funnel"], {extraction: [], everything: []}
        for function in (extraction, everything) * 3:
            began = cpu_seconds()
            function()
            seconds[function].append(cpu_seconds() - began)
    best, n = {function.__name__: min(values) for function, values in seconds.items()}, funnel["archive"][0]
    print(f"{n:,} pages, {funnel['archive'][1] / 1e6:.1f} MB: "
          + ", ".join(f"{name} {value:.2f} s of CPU ({n / value:.0f} documents/s)" for name, value in best.items())
          + f"; ratio {best['everything'] / best['extraction']:.2f}")
    print("after each step:", ", ".join(f"{step} {size[0]:,}" for step, size in funnel.items()))


def minhash(words: list[str]) -> None:
    """MinHash and LSH beside datasketch, CPU seconds of one core, over made-up texts of 1 KB: minhash [DOCUMENTS]."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        sys.exit("minhash compares with datasketch, which is not installed: pip install datasketch")
    rng, texts = random.Random(0), []
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    for i in range(int(words[0]) if words else 20_000):
        text = texts[-1].split() if i % 10 == 9 else rng.choices(vocabulary, k=155)
        for _ in range(3 if i % 10 == 9 else 0):      # every tenth is its neighbour with three words changed
            text[rng.randrange(len(text))] = rng.choice(vocabulary)
        texts.append(" ".join(text))

    def ours():
        signatures = np.stack([clean.minhash(clean.shingles_of(text, 5), 128) for text in texts])
        return sum(len(cluster) - 1 for cluster in clean.near_duplicates(signatures, texts.__getitem__, 16, 5, 0.8))

    def datasketch():
        index, n_duplicates = MinHashLSH(params=(16, 8), num_perm=128), 0
        for i, text in enumerate(texts):
            tokens, sketch = clean.normalize(text).split(), MinHash(num_perm=128)
            sketch.update_batch([b" ".join(tokens[j:j + 5]) for j in range(len(tokens) - 4)])
            n_duplicates += bool(index.query(sketch))
            index.insert(i, sketch)
        return n_duplicates

    for turn in range(2):
        seconds = []
        for function in (ours, datasketch):
            began = time.process_time()
            n_duplicates = function()
            seconds.append(time.process_time() - began)
            print(f"{function.__name__:<10} {len(texts):,} documents, {n_duplicates:,} duplicates: {seconds[-1]:.2f} s")
        print(f"datasketch / ours = {seconds[1] / seconds[0]:.1f}")


VERBS = {"tokenizers": tokenizers, "web": web, "pages": pages, "minhash": minhash}
