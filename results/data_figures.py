"""What the figures of data.py's web stage were made with; each prints what results/data_*.txt holds.

    python results/data_figures.py pack FOLDER pages.warc.gz   every .html below FOLDER becomes a WARC response
    python results/data_figures.py pages pages.warc.gz         all steps against the extraction alone, one core
    python results/data_figures.py minhash                     100,000 documents of 1 KB, ours and datasketch
    python results/data_figures.py filter FOLDER OUT           does curated text train a better model? table and plot

FOLDER: any manual in HTML, for example what Debian's linux-doc-6.1 installs: /usr/share/doc/linux-doc-6.1/html.
"""
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np  # noqa: E402

import data  # noqa: E402


def record(address: str, page: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/http; "
            f"msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n")
    return gzip.compress(head.encode() + http + b"\r\n\r\n", 6)


def pack(folder: str, path: str) -> None:
    pages = sorted(Path(folder).rglob("*.html"))
    with open(path, "wb") as file:
        for page in pages:
            file.write(record(f"http://example.org/{page.relative_to(folder).as_posix()}", page.read_bytes()))
    print(f"{path}: {len(pages):,} pages, {Path(path).stat().st_size:,} bytes")


# --- all steps against the extraction alone ---

def cpu_seconds() -> float:
    """Of this process and of its children that have ended: the extractor's child counts."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def pages(path: str) -> None:
    """Clock and CPU seconds of both, twice in turn; the file is in the cache after the first."""
    out = Path("/tmp/data_figures" if os.name == "posix" else "data_figures_tmp")
    for folder in ("shards", "counts"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    def extraction(main_content):
        for _, content, _ in data.read_archive(path, Counter()):
            data.extract_text(content, main_content)

    def everything(main_content):
        return data.curate_file(path, str(out), data.CurateConfig(main_content=main_content))
    documents = everything(True)["funnel"]["archive"][0]
    for main_content in (True, False):
        best = {}
        for function in (extraction, everything) * 2:
            clock, cpu = time.perf_counter(), cpu_seconds()
            function(main_content)
            spent = time.perf_counter() - clock, cpu_seconds() - cpu
            best[function.__name__] = min(best.get(function.__name__, (1e9, 1e9)), spent)
        for name, (clock, cpu) in best.items():
            print(f"main_content={main_content!s:<5} {name:<10} {clock:6.2f} s, {cpu:6.2f} s of CPU, "
                  f"{documents / cpu:6.0f} documents/s/core")
        clock, cpu = (best["everything"][i] / best["extraction"][i] for i in (0, 1))
        print(f"main_content={main_content!s:<5} ratio {clock:.2f} by the clock, {cpu:.2f} of CPU")


# --- MinHash against datasketch ---

def minhash_documents(n: int = 100_000) -> list[str]:
    """Texts of about 1 KB from 20,000 made-up words; every tenth is its neighbour with three words changed."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = []
    for i in range(n):
        text = texts[-1].split() if i % 10 == 9 else rng.choices(words, k=155)
        if i % 10 == 9:
            for _ in range(3):
                text[rng.randrange(len(text))] = rng.choice(words)
        texts.append(" ".join(text))
    return texts


def minhash(which: str = "both") -> None:
    """Each in its own process, so that the peak of memory is its own."""
    if which == "both":
        for name in ("ours", "datasketch"):
            subprocess.run([sys.executable, __file__, "minhash", name], check=True)
        return
    texts = minhash_documents()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if which == "ours":
        rows = (data.minhash(data.hash_ngrams(data.hash_words(data.normalize(text)), 5), 128) for text in texts)
        blocks = list(data.blocks_of(rows))
        signed = time.perf_counter() - start
        found = sum(len(cluster) - 1 for cluster in data.near_duplicates(blocks, texts.__getitem__, 16, 5, 0.8))
    else:
        from datasketch import MinHash, MinHashLSH
        index, signed, found = MinHashLSH(params=(16, 8), num_perm=128), 0.0, 0
        for i, text in enumerate(texts):
            words = [word.decode() for word in data.normalize(text)]
            one, begun = MinHash(num_perm=128), time.perf_counter()
            one.update_batch([" ".join(words[j:j + 5]).encode() for j in range(len(words) - 4)])
            signed += time.perf_counter() - begun
            found += bool(index.query(one))
            index.insert(i, one)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{which:<10} {len(texts):,} documents, {sum(map(len, texts)) / len(texts):.0f} bytes each: "
          f"{seconds:6.1f} s ({signed:.1f} s of it signatures), {found:,} duplicates, "
          f"peak {peak:,.0f} MB, of which {before:,.0f} MB are the texts and the imports", flush=True)


# --- does the filter earn its place? ---

SPAM = ("buy cheap best free casino bonus pills online now win money loan credit offer deal discount sale shop price "
        "click here today only hot new watch luxury replica poker slots bet weight loss miracle doctor secret trick "
        "order visit site web link page top rank traffic seo followers likes instant guaranteed cash prize winner and "
        "the for with your this get more all you can").split()
MENU = ("Home|About us|Contact|Sign in|Register|My account|Cart|Checkout|Privacy policy|Terms of use|Cookie settings|"
        "Accept all|Reject all|Subscribe to our newsletter|Follow us|Share on social media|Read more...|Continue...|"
        "Next page...|Previous page|Related articles|All rights reserved|Back to top").split("|")


def junk_pages(rng, n: int) -> list[str]:
    """Half keyword spam, half pages of menus and notices."""
    found = []
    for i in range(n):
        if i % 2:
            lines = [" ".join(rng.choices(SPAM, k=rng.randint(6, 18))) + rng.choice(".!?") for _ in range(60)]
        else:
            lines = [rng.choice(MENU) + rng.choice(["", "", f" {rng.randint(1, 99)}"]) for _ in range(150)]
        found.append("<html><body>" + "".join(f"<p>{line}</p>" for line in lines) + "</body></html>")
    return found


def near_copies(rng, texts: list[str]) -> list[str]:
    """Each page four more times, with a word in a hundred replaced."""
    found = []
    for text in texts:
        for _ in range(4):
            words = text.split(" ")
            for i in range(0, len(words), 100):
                words[rng.randrange(i, min(i + 100, len(words)))] = rng.choice(SPAM)
            found.append(" ".join(words))
    return found


def mix(folder: str, out: Path) -> None:
    """OUT/*.warc.gz: manual pages, junk and near copies in random order; OUT/raw and OUT/curated: token files.

    Both validate on the same held-out pages of the manual and use one tokenizer, the one trained on the raw text.
    """
    rng = random.Random(0)
    manual = [page.read_text(encoding="utf-8", errors="replace") for page in sorted(Path(folder).rglob("*.html"))]
    rng.shuffle(manual)
    held_out, sample, manual = manual[:150], manual[150:450], manual[450:]
    mixed = manual + near_copies(rng, manual[:300]) + junk_pages(rng, 4000)
    rng.shuffle(mixed)
    out.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        records = [record(f"http://example.org/{i}/{j}", page.encode()) for j, page in enumerate(mixed[i::4])]
        (out / f"part-{i}.warc.gz").write_bytes(b"".join(records))
    for name, texts in (("positive", sample), ("negative", junk_pages(random.Random(1), 300))):
        texts = [data.extract_text(text.encode(), True) for text in texts]
        (out / f"{name}.txt").write_text(data.SEPARATOR.join(texts), encoding="utf-8", newline="")
    data.train_classifier(data.ClassifyConfig(f"{out}/positive.txt", f"{out}/negative.txt", f"{out}/quality.npz"))
    data.curate([f"{out}/part-*.warc.gz"], out / "job", quality=f"{out}/quality.npz", vocab_size=None)
    clean = [json.loads(line)["text"] for line in (out / "job" / "documents.jsonl").open(encoding="utf-8")]
    raw = [data.extract_text(page.encode(), True) for page in mixed]
    val = [text for text in (data.extract_text(page.encode(), True) for page in held_out)
           if data.gopher_filter(text) and data.identify_language(text)[0] == "en"]     # a fifth of the manual is not
    for name, texts in (("raw", raw), ("curated", clean)):
        (out / name).mkdir(exist_ok=True)
        rng.shuffle(texts)
        for split, part in (("train", texts), ("val", val)):
            text = "".join(text.replace(data.SEPARATOR, "") + data.SEPARATOR for text in part)
            (out / name / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
    meta = data.tokenize(out / "raw", 2048, "mix", workers=1)
    tokenizer = data.Tokenizer.load(out / "raw" / "tokenizer.json")
    (out / "curated" / "tokenizer.json").write_bytes((out / "raw" / "tokenizer.json").read_bytes())
    for split in ("train", "val"):
        text = out / "curated" / f"{split}.txt"
        meta[f"{split}_tokens"] = tokenizer.encode_file(text, text.with_suffix(".bin"), workers=1)
        meta[f"{split}_bytes"] = text.stat().st_size
    (out / "curated" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def filter_pays(folder: str, out: str) -> None:
    """Train on both for equal tokens, two seeds each; runs that ended before are not run again."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import train
    out = Path(out)
    if not (out / "curated" / "meta.json").exists():
        mix(folder, out)
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    lines = [f"{name}: {data.read_meta(out / name)['train_tokens']:,} tokens" for name in ("raw", "curated")]
    for color, name in enumerate(("raw", "curated")):
        for seed in (1, 2):
            run = out / f"{name}-{seed}"
            if not (run / "final.json").exists():
                figures = train.main(train.TrainConfig(
                    data_dir=str(out / name), out_dir=str(run), max_steps=400, context_length=256, d_model=128,
                    n_layers=4, n_heads=2, qk_norm=True, zero_init=True, batch_tokens=2048, optimizer="muon", lr=8e-3,
                    muon_lr=0.03, schedule="wsd", decay_fraction=0.7, min_lr_factor=0.02, eval_every=50, eval_steps=10,
                    log_every=50, seed=seed, device="cpu", dtype="float32"))
                if figures["interrupted"]:
                    return
                (run / "final.json").write_text(json.dumps(figures, default=str), encoding="utf-8")
            final = json.loads((run / "final.json").read_text(encoding="utf-8"))
            lines.append(f"{name:<8} seed {seed}: {final['tokens']:,} tokens, held-out clean text "
                         f"{final['val_bits_per_byte']:.4f} bits per byte")
            log = [line for line in train.read_log(run / "log.jsonl") if "val_bits_per_byte" in line]
            axis.plot([line["step"] * 2048 for line in log], [line["val_bits_per_byte"] for line in log],
                      color=f"C{color}", marker="o", markersize=3, label=f"{name}, seed {seed}")
    axis.set(xlabel="training tokens", ylabel="bits per byte of held-out manual pages")
    axis.legend()
    figure.suptitle("python results/data_figures.py filter FOLDER OUT", fontsize=9)
    figure.savefig(Path(__file__).with_name("data_filter.png"), dpi=110)
    print("\n".join(lines))
    print(np.datetime64("today"))


if __name__ == "__main__":
    {"pack": pack, "pages": pages, "minhash": minhash, "filter": filter_pays}[sys.argv[1]](*sys.argv[2:])
