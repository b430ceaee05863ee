"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value ...]`. Nobody imports this page.

Verbs for machines (profile, memory, kernels, parallel, gpu) stand in bench_systems.py and are reached from here too.
"""
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import bench_systems
import clean
import curate
from convert import architecture_of, save_pretrained
from model import load_model

# --- the verbs: each takes the words after it ---


def hf(words: list[str]) -> None:
    """Forward and backward of a trained model beside transformers' own on the same weights: hf OUT_DIR."""
    if len(words) != 1:
        sys.exit("usage: python bench.py hf OUT_DIR")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        sys.exit("hf compares with transformers, which is not installed: pip install transformers")
    repeats, (ours, _) = 15, load_model(words[0])
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    ours, theirs, T = ours.float().train(), theirs.train(), ours.config.context_length
    x, y = torch.randint(0, ours.config.vocab_size, (2, max(1, 2048 // T), T))

    def their_loss():
        logits = theirs(input_ids=x, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    print(f"{architecture_of(ours.config)}, {x.shape[0]} x {T} tokens, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; ms of forward and backward, median of {repeats} in turns (fastest)")
    for dtype in (torch.float32, torch.bfloat16):
        ms = {"ours": [], "transformers": []}
        for turn in range(repeats + 2):
            for name, loss in (("ours", lambda: ours(x, y)[1]), ("transformers", their_loss)):
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = loss()
                value.backward()
                if turn > 1:                      # the first two warm up
                    ms[name].append(1000 * (time.perf_counter() - began))
        print(f"{str(dtype)[6:]:<9}", *(f"{name} {statistics.median(times):.1f} ({min(times):.1f})"
                                        for name, times in ms.items()))


def pages(words: list[str]) -> None:
    """All steps of curation beside the extraction alone, CPU seconds of one core: pages ARCHIVE_OR_FOLDER_OF_HTML."""
    if len(words) != 1:
        sys.exit("usage: python bench.py pages ARCHIVE_OR_FOLDER_OF_HTML")
    with tempfile.TemporaryDirectory() as out:
        for name in ("shards", "counts"):
            (Path(out) / name).mkdir()
        archive = Path(words[0])
        if archive.is_dir():
            archive = Path(out) / "pages.warc"
            with open(archive, "wb") as file:
                for path in sorted(Path(words[0]).rglob("*.html")):
                    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + path.read_bytes()
                    file.write(f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: file:{path}\r\nContent-Type: "
                               f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n".encode())
                    file.write(http + b"\r\n\r\n")

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


VERBS = {"hf": hf, "pages": pages, "minhash": minhash}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    verbs = VERBS | bench_systems.VERBS
    if not argv or argv[0] not in verbs:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in verbs.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    verbs[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
