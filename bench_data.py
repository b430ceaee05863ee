"""The verbs of bench.py for data: tokenizers beside others', a small web from HTML to a model, curation's speed.

    python bench.py bpe FILE                    BPE of ours, of Hugging Face and tiktoken: the same ids, their speed
    python bench.py tokenizers A.txt B.txt      BPE of 10,000 and of 32,000, each on both: time, memory, bytes per token
    python bench.py web FOLDER_OF_HTML          archive, curation, what was dropped and why, tokens, two models compared
    python bench.py pages FOLDER_OF_HTML        all steps of curation beside the extraction alone
    python bench.py minhash                     near duplicates beside datasketch
"""
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import bpe
import clean
import curate
import data
import train
from accounting import table
from bench_step import alternate
from configurator import command_line, resolve
from evaluate import perplexity
from model import load_model

PILE_BYTES = 825e9                             # 2101.00027


def cpu_seconds(run):
    """(CPU seconds of run() and of the processes it has waited for, what it gives)."""
    def spent() -> float:
        return time.process_time() + os.times().children_user + os.times().children_system
    began = spent()
    result = run()
    return spent() - began, result


# --- the tokenizer beside others ---

@dataclass
class BpeConfig:
    """What `python bench.py bpe FILE` can be told."""
    vocab_size: int = 32000            # of the vocabulary that is trained
    tokenizer: str = ""                # a tokenizer.json with GPT-2's pattern, to encode with instead of training
    megabytes: float = 10.0            # how much of FILE is encoded


def bench_bpe(words: list[str]) -> None:
    """Training and encoding of FILE beside Hugging Face's tokenizers and tiktoken; ids must agree."""
    usage = "usage: python bench.py bpe FILE [--key=value ...]"
    _, files, config, _ = command_line(BpeConfig, words, usage)
    if len(files) != 1:
        sys.exit(usage)
    import tiktoken
    import tokenizers
    path, special = files[0], ["<|endoftext|>"]
    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, {bpe.cpus()} CPUs, {path}: "
          f"{os.path.getsize(path) / 1e6:.1f} MB")
    if config.tokenizer:
        tok = bpe.Tokenizer.load(config.tokenizer)
    else:
        began = time.perf_counter()
        tok = bpe.Tokenizer(*bpe.train_bpe(path, config.vocab_size, special), special)
        ours, level = time.perf_counter() - began, tokenizers.pre_tokenizers.ByteLevel
        rival = tokenizers.Tokenizer(tokenizers.models.BPE())
        rival.pre_tokenizer = level(add_prefix_space=False)
        began = time.perf_counter()
        rival.train([path], tokenizers.trainers.BpeTrainer(
            vocab_size=config.vocab_size, special_tokens=special, show_progress=False,
            initial_alphabet=level.alphabet()))
        print(f"training, vocabulary {config.vocab_size:,}: ours {ours:.2f} s, Hugging Face "
              f"{time.perf_counter() - began:.2f} s")
    text = Path(path).read_bytes()[:int(config.megabytes * 1e6)].decode("utf-8", errors="ignore")
    with tempfile.TemporaryDirectory() as folder:
        tok.save(f"{folder}/tokenizer.json")
        theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        theirs.encode_special_tokens = True              # as plain text, like encode_ordinary
        tok = bpe.Tokenizer.load(f"{folder}/tokenizer.json")
    plain = {token: i for i, token in tok.vocab.items() if i not in tok.special_tokens.values()}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    tik = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=plain, special_tokens=tok.special_tokens)
    runs = alternate({"ours": lambda: cpu_seconds(lambda: tok.encode(text, set())),
                      "tiktoken": lambda: cpu_seconds(lambda: tik.encode_ordinary(text)),
                      "Hugging Face": lambda: cpu_seconds(lambda: theirs.encode_batch_fast(
                          [text], add_special_tokens=False)[0].ids)}, 5)
    ids, size = runs["ours"][0][1], len(text.encode("utf-8")) / 1e6
    for name, results in runs.items():
        if any(result != ids for _, result in results):
            raise ValueError(f"ids of {name} differ from our first ones")
    print(f"encoding {size:.1f} MB, vocabulary {tok.vocab_size:,}, one process, {len(ids):,} equal ids, MB per CPU s")
    for name, results in runs.items():
        speeds = [size / seconds for seconds, _ in results]
        print(f"  {name:14} first {speeds[0]:6.1f}   median {statistics.median(speeds):6.1f}   best {max(speeds):6.1f}")


# --- two tokenizers, two corpora ---

@dataclass
class TokenizersConfig:
    """What `python bench.py tokenizers A.txt B.txt` can be told."""
    vocab_a: int = 10_000                # of the tokenizer trained on A
    vocab_b: int = 32_000                # of B's


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
    made, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for path, vocab_size in zip(files, (config.vocab_a, config.vocab_b)):
            # A process of its own, so that its peak of memory is training's.
            output = subprocess.run([sys.executable, "-c", TRAIN, path, str(vocab_size), f"{folder}/one.json"],
                                    check=True, text=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent).stdout
            seconds, cpu, peak_kb = json.loads(output)
            made[path] = bpe.Tokenizer.load(f"{folder}/one.json")
            longest = sorted(made[path].vocab.values(), key=len)[:-4:-1]
            print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, vocabulary {made[path].vocab_size:,} trained in "
                  f"{seconds:.2f} s ({cpu:.1f} s of CPU), peak {peak_kb / 1024:.0f} MB a process; longest tokens "
                  + ", ".join(repr(token.decode("utf-8", "replace")) for token in longest), flush=True)
        sample = Path(folder) / "sample.txt"
        for path in files:
            text = Path(path).read_bytes()[:5_000_000].decode("utf-8", "ignore")
            sample.write_text(text, encoding="utf-8", newline="")
            size = sample.stat().st_size
            for name, tokenizer in made.items():
                seconds, n = cpu_seconds(lambda: tokenizer.encode_file(sample, f"{folder}/ids.bin", workers=1))
                rows.append([Path(path).stem, Path(name).stem, size / n, size / seconds / 1e6,
                             PILE_BYTES / (size / seconds) / 3600, n])
    table("one process, a file read from disk, uint16 ids written",
          ["text", "tokenizer", "bytes/token", "MB/CPU s", "hours for the Pile", "tokens"], rows)


# --- a small web ---

@dataclass
class WebConfig:
    """What `python bench.py web FOLDER_OF_HTML` can be told."""
    steps: int = 400                     # of training on each text
    vocab_size: int = 4096               # of the one tokenizer, trained on the raw text
    held_out: int = 200                  # pages, of which those that pass every rule are the validation text
    workers: int | None = None           # of curation
    out: str = "out/web"                 # archive, texts, report.html, models, table.txt


def packed(paths, archive: Path) -> Path:
    """A WARC file of HTML pages."""
    with open(archive, "wb") as file:
        for path in paths:
            http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + path.read_bytes()
            file.write(f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: file:{path}\r\nContent-Type: "
                       f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n".encode())
            file.write(http + b"\r\n\r\n")
    return archive


def by_eye(archive: Path, n: int, report: dict) -> list[str]:
    """Three of the n records, as they come and as text; up to three documents that each rule dropped, with its reason,
    and three that were kept."""
    lines = ["three records, as they come and as text:"]
    for number, (address, content, _) in enumerate(curate.read_archive(archive, Counter())):
        if number % max(1, -(-n // 3)) == 0:
            text = " / ".join(clean.extract_text(content, main_content=True).split("\n"))
            lines += [f"  {Path(address).name}", f"    {len(content):,} bytes: {content[:150]!r}",
                      f"    {len(text):,} characters: {text[:220]}"]
    lines.append("what each rule dropped, and what was kept:")
    with open(archive.with_name("kept") / "documents.jsonl", encoding="utf-8") as file:
        kept = [(one["id"], "-", one["text"]) for one in map(json.loads, itertools.islice(file, 3))]
    for kind, samples in (report["samples"] | {"kept": kept}).items():
        lines += [f"  {kind:<20} {Path(address).name[:40]} | {reason} | {' '.join(text.split())[:130]}"
                  for address, reason, text in samples[:3]]
    return lines


def web(words: list[str]) -> None:
    """From HTML to a model: an archive, curation, its funnel, what it dropped, tokens, raw against curated text."""
    usage = "usage: python bench.py web FOLDER_OF_HTML [--key=value …]"
    _, files, config, _ = command_line(WebConfig, words, usage)
    if len(files) != 1 or not Path(files[0]).is_dir():
        sys.exit(usage)
    out = Path(config.out)
    paths = sorted(Path(files[0]).rglob("*.html"), key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    for name in ("held", "kept"):
        (out / name).mkdir(parents=True, exist_ok=True)
    held = packed(paths[:config.held_out], out / "held.warc")
    archive = packed(paths[config.held_out:], out / "pages.warc")
    began = time.perf_counter()
    report = curate.curate_archives([archive], out / "kept", workers=config.workers)
    seconds = time.perf_counter() - began
    data.write_report(report, out / "kept")
    curate.curate_archives([held], out / "held", workers=config.workers)
    lines = [f"{len(paths):,} pages of {files[0]}, {archive.stat().st_size / 1e6:.0f} MB packed, "
             f"{time.strftime('%Y-%m-%d')}", *by_eye(archive, len(paths) - config.held_out, report),
             f"\ncuration: {seconds:.1f} s, {len(paths) / seconds:.0f} documents per second; documents and MB after "
             "each step:", *(f"  {step:<18}{n:>7,}{size / 1e6:>9.1f}" for step, (n, size) in report["funnel"].items())]
    texts = {"raw": out / "raw.txt", "curated": out / "kept" / "corpus.txt"}
    with open(texts["raw"], "w", encoding="utf-8", errors="replace", newline="\n") as file:
        for _, content, _ in curate.read_archive(archive, Counter()):
            file.write(clean.extract_text(content) + curate.SEPARATOR)
    lines += compare(texts, out / "held" / "corpus.txt", config, out)
    (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(*lines, sep="\n")


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
    source = Path(words[0])
    with tempfile.TemporaryDirectory() as out:
        for name in ("shards", "counts"):
            (Path(out) / name).mkdir()
        archive = source if source.is_file() else packed(sorted(source.rglob("*.html")), Path(out) / "pages.warc")

        def extraction():
            for _, content, _ in curate.read_archive(archive, Counter()):
                clean.extract_text(content, main_content=True)

        everything = partial(curate.curate_file, str(archive), out, curate.CurateConfig())
        funnel = everything()["funnel"]
        runs = alternate({"extraction": partial(cpu_seconds, extraction),
                          "everything": partial(cpu_seconds, everything)}, rounds=3)
    best, n = {name: min(seconds for seconds, _ in results) for name, results in runs.items()}, funnel["archive"][0]
    print(f"{n:,} pages, {funnel['archive'][1] / 1e6:.1f} MB: "
          + ", ".join(f"{name} {value:.2f} s of CPU ({n / value:.0f} documents/s)" for name, value in best.items())
          + f"; ratio {best['everything'] / best['extraction']:.2f}")
    print("after each step:", ", ".join(f"{step} {size[0]:,}" for step, size in funnel.items()))


def minhash(words: list[str]) -> None:
    """MinHash and LSH beside datasketch, CPU seconds of one core, over made-up texts of 1 KB: minhash [DOCUMENTS]."""
    from datasketch import MinHash, MinHashLSH
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

    runs = alternate({"ours": partial(cpu_seconds, ours), "datasketch": partial(cpu_seconds, datasketch)}, rounds=2)
    for name, results in runs.items():
        print(f"{name:<10} {len(texts):,} documents, {results[0][1]:,} duplicates: "
              + ", ".join(f"{seconds:.2f} s" for seconds, _ in results))
    print("datasketch / ours = " + ", ".join(f"{theirs / own:.1f}" for (own, _), (theirs, _) in zip(*runs.values())))
