"""Everything that is to be known of a GPU, in one command of nine minutes: `python bench.py gpu --out=results/h100`.

Six stages, each a process of its own with a time limit. A line is on the disk as soon as it is known, so a stage that
fails or is ended keeps what it has; its last words are recorded, and the next one begins.

    stage         limit, s   OUT/stage.txt says; OUT has its pictures
    correct             85   errors of all kernels against float64, tests, memcheck
    kernels             80   attention and memory-bound kernels beside torch's, as shares of a roof
    training           175   tokens/s and MFU of GPT-2 beside transformers; the parts of a step
    decoding            65   tokens/s, share of the bandwidth; CUDA graphs, int8, int4
    distributed         25   a world of one over NCCL: copies; FSDP, DDP, … train as the plain model does
    loss               108   bits per byte after two minutes each, or what the others leave of nine

A kernel is bound by one of two roofs (Williams 2009), both measured on the card first: few FLOPs a byte (RMSNorm,
SwiGLU, RoPE, cross entropy) by the bandwidth of a copy, many (attention, linear + cross entropy) by the FLOP/s of a
large product. On a CPU all runs at toy sizes, the kernels through Triton's interpreter: that proves the command, not
the figures. Nothing is downloaded; transformers if installed. The models' stages stand in bench_gpu_models.py.

    python bench.py gpu --out=results/h100 --only=kernels       one stage again, with nine minutes for itself
"""
import contextlib
import gc
import importlib.metadata
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench_systems
import data
import runs
from accounting import PRESETS
from bench_step import seconds_of
from configurator import ConfigError, command_line
from machine import pick_device

HERE = Path(__file__).parent
LIMITS = {"correct": 85, "kernels": 80, "training": 175, "decoding": 65, "distributed": 25, "loss": 108}      # seconds
ALL_SECONDS = 9 * 60

GPT2 = PRESETS["gpt2"] | {"vocab_size": 50_304}          # 50,257 and padding: a multiple of 64 keeps rows aligned
TOY = dict(vocab_size=60, context_length=16, d_model=32, n_layers=1, n_heads=1)
# Sizes on a card and, to prove the command, on a CPU.
SIZES = {
    "cuda": dict(
        # kernels: lengths and head widths of attention; tokens, width, vocabulary, heads, key heads, D of the others
        lengths=(1024, 4096, 16384, 65536), widths=(64, 128), attention_tokens=16384, attention_width=2048,
        plain_length=4096, layer=(16384, 4096, 50304, 32, 8, 128), copy_bytes=2 ** 31, product=8192,
        gpt2=GPT2, batches=(64, 32, 16, 8, 4), rounds=4, steps=5, curve_batch=8, curve_steps=200,
        profile_batch=16, max_mb=1024, flags=(), corpus_bytes=8_000_000, vocabulary=10_000,
        decode={"llama-1.5b": ["--batch=8,64"], "gpt2": ["--batch=8,64"]}),
    "cpu": dict(
        lengths=(8, 16), widths=(16,), attention_tokens=16, attention_width=16, plain_length=8,
        layer=(8, 16, 48, 2, 1, 8), copy_bytes=2 ** 20, product=64, gpt2=GPT2 | TOY, batches=(1,), rounds=1, steps=1,
        curve_batch=1, curve_steps=2, profile_batch=1, max_mb=1, corpus_bytes=60_000, vocabulary=300,
        decode={"toy": ["--batch=2", "--prompt_tokens=5", "--new_tokens=4"]},
        flags=("--d_model=32", "--d_ff=64", "--n_layers=1", "--n_heads=2", "--context_length=32", "--batch_tokens=256",
               "--micro_batch_size=8", "--max_steps=3"))}
PICTURES = {        # OUT/NAME.png: (how it is drawn, x, y, title)
    "roofline": ("loglog", "FLOPs a byte, forward and backward", "TFLOP/s", "kernels in bfloat16"),
    "attention": ("semilogx", "tokens", "TFLOP/s", "causal attention, forward and backward"),
    "training_step": ("barh", "ms", "", "one step of GPT-2, not compiled, by region")}


@dataclass
class GpuConfig:
    """What `python bench.py gpu` can be told; `until` is for the stages' processes."""
    out: str = "results/gpu"           # folder of the tables and pictures
    only: str = "all"                  # one stage: correct | kernels | training | decoding | distributed | loss
    device: str | None = None          # cuda, cpu; none = the best there is
    until: float | None = None         # the clock, time.time(), when a stage is ended; it begins nothing longer

    def __post_init__(self):
        if self.only not in ("all", *LIMITS):
            raise ConfigError(f"only={self.only!r} must be all, {', '.join(LIMITS)}")


# --- the stages' processes ---

def run_process(command: list[str], limit: float, **more) -> tuple[str, list[str]]:
    """("done" or what went wrong, the lines it printed) of a process, ended with its group after `limit` seconds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **more)
        try:
            status = process.wait(limit)
            how = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            how = f"ended at its limit of {limit:.0f} s"
        finally:
            if hasattr(os, "killpg"):        # all that a stage has started: compilers, tests
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        file.seek(0)
        return how, file.read().splitlines()


def run_stage(name: str, command: list[str], limit: float, folder: Path, device: str = "cpu") -> bool:
    """Run a stage's process; note in FOLDER/stages.txt how it ended, and if not well its last lines in both files."""
    environment, began = dict(os.environ), time.monotonic()
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    how, said = run_process(command, limit, env=environment, start_new_session=True)
    print(*said, sep="\n")
    lines = [f"{name:<12}{how}, {time.monotonic() - began:.1f} s"]
    if how != "done":
        lines += [f"    {line[:200]}" for line in said[-15:]]
        append(folder / f"{name}.txt", *lines)
    append(folder / "stages.txt", *lines)
    return how == "done"


def append(path: Path, *lines: str) -> None:
    """Add lines to a file and print them."""
    with open(path, "a", encoding="utf-8") as file:
        print(*lines, sep="\n", file=file)
    print(*lines, sep="\n", flush=True)


def gpu(argv: list[str]) -> None:
    """Measure everything on this GPU in nine minutes: tables and pictures in OUT."""
    config = command_line(GpuConfig, argv, "usage: python bench.py gpu [--key=value …]")[2]
    device, folder, began = pick_device(config.device), Path(config.out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / "stages.txt", *machine(device), "")
    names, done = list(LIMITS) if config.only == "all" else [config.only], 0
    for name in names:
        limit = LIMITS[name] if config.only == "all" else ALL_SECONDS
        if name == "loss":                         # the last one: its limit, or what the others have left
            limit = max(limit, ALL_SECONDS - (time.monotonic() - began))
        command = [sys.executable, str(HERE / "bench_gpu_models.py"), f"--only={name}", f"--out={folder}",
                   f"--device={device}", f"--until={time.time() + limit}"]
        done += run_stage(name, command, limit, folder, device)
    print(f"{folder}: {done} of {len(names)} stages done in {time.monotonic() - began:.0f} s")
    if done < len(names):
        sys.exit(1)


# --- what a stage writes ---

def machine(device: str) -> list[str]:
    """Card, driver, versions, date and commit, for the head of a table."""
    lines = ["CPU, toy sizes: this proves the command, not the figures"]
    if device.startswith("cuda"):
        lines = [torch.cuda.get_device_name(device)]
        if shutil.which("nvidia-smi"):
            query = "--query-gpu=name,memory.total,driver_version,power.limit,clocks.max.sm"
            lines = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True,
                                   timeout=20).stdout.splitlines() or lines
    head, packages = runs.header(), {one.name: one.version for one in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {packages.get(name, 'none')}" for name in ("torch", "triton", "transformers"))
    return [*lines, f"{versions}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python "
                    f"{head['python']}, {time.strftime('%Y-%m-%d %H:%M')}, commit {(head['commit'] or 'unknown')[:12]}"]


class Sheet:
    """The table of one stage, OUT/stage.txt, a line at a time; its sizes, and the time that is left."""

    def __init__(self, config: GpuConfig):
        self.config, self.device, self.missing, self.points = config, pick_device(config.device), [], {}
        self.on_cuda = self.device.startswith("cuda")
        self.size = SIZES["cuda" if self.on_cuda else "cpu"]
        self.end = (config.until or time.time() + ALL_SECONDS) - 5                # 5 s to end by itself
        self.path = Path(config.out) / f"{config.only}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self(*machine(self.device), f"python bench.py gpu --only={config.only}", "")

    def __call__(self, *lines: str) -> None:
        append(self.path, *lines)

    def point(self, picture: str, line: str, x, y) -> None:
        """Keep a point of a picture."""
        self.points.setdefault(picture, {}).setdefault(line, []).append((x, y))

    def draw(self) -> None:
        """The pictures of the points that there are."""
        from matplotlib.figure import Figure
        for picture, lines in self.points.items():
            kind, x, y, title = PICTURES[picture]
            axes = Figure(figsize=(8, 5), layout="constrained").subplots()
            for label, points in lines.items():
                getattr(axes, kind)(*zip(*sorted(points)), **{} if kind == "barh" else dict(marker="o", label=label))
            axes.set(xlabel=x, ylabel=y, title=f"{machine(self.device)[0].split(',')[0]}: {title}")
            if kind != "barh":
                axes.legend(fontsize=7)
            axes.figure.savefig(self.path.parent / f"{picture}.png", dpi=110)

    def left(self) -> float:
        """Seconds until the stage should end."""
        return self.end - time.time()

    def attempt(self, what: str, run, needs: float = 0.0):
        """run(); or None, noted as missing, and a line says why: no time (needs: seconds), no memory, an error."""
        try:
            if self.left() < needs:
                raise TimeoutError(f"it may need {needs:.0f} s and {self.left():.0f} are left")
            return run()
        except Exception as error:     # whatever it is, the figures after it are wanted too
            self.missing.append(what)
            self(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
            traceback.print_exc()
        finally:
            free(self.device)


def free(device: str) -> None:
    """Give unused memory back to the card."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


# --- correct ---

def correct(sheet: Sheet) -> None:
    """Errors in each dtype, the GPU's tests, and memcheck on small shapes: processes that run side by side."""
    kernels = [sys.executable, str(HERE / "bench.py"), "kernels"]
    jobs = {"errors": kernels}
    if sheet.on_cuda:
        jobs = {f"errors in {dtype}": [*kernels, "--long=true", f"--dtypes={dtype}"]
                for dtype in bench_systems.TOLERANCE}
        jobs["tests"] = [sys.executable, str(HERE / "test_all.py"), "kernels", "flash", "-x"]
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if os.path.exists(sanitizer):
            jobs["memcheck"] = [sanitizer, "--tool=memcheck", "--error-exitcode=9", *kernels]

    def job(name):
        how, lines = run_process(jobs[name], max(1.0, sheet.left()))
        sheet("", f"{name}: {how}", *[line for line in lines if line.strip()])
        return how
    with ThreadPoolExecutor(len(jobs)) as pool:
        failed = [name for name, how in zip(jobs, pool.map(job, jobs)) if how != "done"]
    if failed:
        sys.exit(f"not right: {', '.join(failed)}")


# --- kernels ---

def roofs(device, n_bytes: int, size: int) -> tuple[float, float]:
    """(bytes/s of a copy of n_bytes, reads and writes counted; FLOP/s of a product of `size` in bfloat16), measured."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device, 10) for _ in range(3))
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    torch.mm(a, b)                                         # the first one loads the library
    return copy, 2 * size ** 3 / min(seconds_of(lambda: torch.mm(a, b), device, 10) for _ in range(3))


def time_ms(run) -> float:
    """Median ms of run(); on CUDA of 70 ms of runs, with the L2 cache emptied before each."""
    if torch.cuda.is_available():
        import triton
        return triton.testing.do_bench(run, rep=70, return_mode="median")
    return 1e3 * statistics.median(seconds_of(run) for _ in range(3))


def timed(function, inputs) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MB that both take at their peak on CUDA); upstreams are made once."""
    def forward():
        with torch.no_grad():
            outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    trained, upstream = [x for x in inputs if x.requires_grad], [torch.randn_like(y) for y in forward()]

    def both():
        outputs = function(*inputs)
        return torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), trained, upstream)
    both()                                                 # compiles
    peak = 0.0
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return time_ms(forward), time_ms(both), peak


def row(sheet: Sheet, name: str, function, inputs, work, roof: float, scale: float) -> list[float]:
    """A line of what a forward pass, and both passes, reach: work is their FLOPs or bytes. The two rates, or none."""
    times = sheet.attempt(name, lambda: timed(function, inputs), needs=12)
    if times is None:
        return []
    rates = [1e3 * amount / ms for amount, ms in zip(work, times)]
    cells = "".join(f"{ms:>12.3f}{rate / scale:>9,.1f}{rate / roof:>6.2f}" for ms, rate in zip(times, rates))
    sheet(f"{name:34}{cells}{times[2]:>9,.0f}  {'TFLOP/s' if scale == 1e12 else 'GB/s'}")
    return rates


def kernels(sheet: Sheet) -> None:
    """Causal attention over lengths, then the memory-bound kernels, each beside torch's, in bfloat16."""
    s = sheet.size
    copy, product = roofs(sheet.device, s["copy_bytes"], s["product"])
    sheet(f"roofs: copy {copy / 1e9:,.0f} GB/s, product of {s['product']} in bfloat16 {product / 1e12:,.1f} TFLOP/s",
          "", f"{'':34}{'forward ms':>12}{'rate':>9}{'roof':>6}{'both ms':>12}{'rate':>9}{'roof':>6}{'peak MB':>9}")
    for x in (10 ** (i / 10) for i in range(-10, 41)):
        sheet.point("roofline", "roof, measured", x, min(x * copy, product) / 1e12)
    for D, T in itertools.product(s["widths"], s["lengths"]):
        B, H = max(1, s["attention_tokens"] // T), s["attention_width"] // D
        inputs = bench_systems.leaves(bench_systems.attention_inputs(sheet.device, B, H, H, T, T, D), torch.bfloat16)
        causal, flops = bench_systems.attention_functions(causal=True), 2 * B * H * T * T * D
        functions = {"ours": causal["Triton"], "plain": causal["plain"],
                     "flash": sdpa_kernel(SDPBackend.FLASH_ATTENTION)(causal["torch's sdpa"]),
                     "cuDNN": sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(causal["torch's sdpa"])}
        for name, function in functions.items():
            if name == "plain" and T > s["plain_length"]:
                continue
            # A causal forward counts 2 T² D FLOPs a head, a backward 2.5 times that (2307.08691, section 4.1).
            rates = row(sheet, f"{name} {T} {D}", function, inputs, (flops, 3.5 * flops), product, 1e12)
            for rate in rates[1:]:                 # of both passes
                sheet.point("attention", f"{name}, D {D}", T, rate / 1e12)
    T, C, V, H, K, D = s["layer"]
    # Numbers that a forward pass must read and write, and those of both passes; FLOPs of both.
    work = {"swiglu": (3 * T * C, 8 * T * C, 21 * T * C), "rms_norm": (2 * T * C, 5 * T * C, 14 * T * C),
            "rope": (2 * T * (H + K) * D, 4 * T * (H + K) * D, 6 * T * (H + K) * D),
            "cross_entropy": (T * V, 3 * T * V, 7 * T * V),
            "linear+cross_entropy": (T * C + V * C, 3 * T * C + 3 * V * C, 6 * T * C * V)}
    sheet("", f"other kernels, {T:,} tokens, width {C}, vocabulary {V:,}, {H} and {K} heads of {D}")
    for name, ours, plain, own, inputs in bench_systems.layer_cases(sheet.device, T, C, V, H, K, D):
        if name not in work:                                         # matmul is there to be read
            continue
        inputs, (once, both, flops) = bench_systems.leaves(inputs, torch.bfloat16), work[name]
        amounts, roof, scale = (2 * once, 2 * both), copy, 1e9
        if name == "linear+cross_entropy":
            amounts, roof, scale = (flops / 3, flops), product, 1e12
        functions = {"ours": ours, "eager": plain, "torch's own": own,
                     "compiled": torch.compile(plain) if sheet.on_cuda else None}
        for label, function in functions.items():
            if function is not None:
                rates = row(sheet, f"{name}, {label}", function, inputs, amounts, roof, scale)
                for rate in rates[1:]:
                    sheet.point("roofline", f"{name}, {label}", flops / (2 * both), rate / amounts[1] * flops / 1e12)


# --- one rank ---

def distributed(sheet: Sheet) -> None:
    """A world of one over NCCL (gloo on a CPU): copies, and every strategy trains as one rank alone does."""
    environment = dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if not sheet.on_cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(os.cpu_count())}       # one thread
    how, lines = run_process([
        sys.executable, str(HERE / "bench.py"), "parallel", f"--max_mb={sheet.size['max_mb']}", "--d_model=64",
        "--n_layers=2", "--vocab_size=256", "--batch_size=4", "--steps=5", f"--out_dir={sheet.path.parent}"],
        max(1.0, sheet.left()), env=environment)
    sheet(*lines)
    if how != "done":
        sys.exit(how)


# --- time to loss ---

def offline_corpus(sheet: Sheet, name: str, vocab_size: int) -> str:
    """A data folder: data/NAME where it is prepared, else one of Python's own library, text that every machine has."""
    folder, library = Path("out/bench_gpu") / f"library_{vocab_size}", Path(os.__file__).parent
    if (Path("data") / name / "meta.json").exists():
        return f"data/{name}"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted([*library.glob("*.py"), *library.glob("*/*.py")])
        pages = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        source = folder.with_suffix(".txt")
        source.write_text("<|endoftext|>".join(pages)[:sheet.size["corpus_bytes"]], encoding="utf-8", newline="")
        data.prepare(source, vocab_size=vocab_size, data_dir=folder)
    return str(folder)


def loss(sheet: Sheet) -> None:
    """Bits per byte of the default run and of the TinyStories shape, two minutes each, without a network."""
    def run(parts, corpus, vocab_size):
        folder = offline_corpus(sheet, corpus, min(vocab_size, sheet.size["vocabulary"]))
        # 17 s of each half of the time are for the start and the evaluation, which max_minutes does not count.
        minutes = min(2.0, max(0.05, (sheet.left() / parts - 17) / 60))
        with tempfile.TemporaryDirectory() as out:
            how, lines = run_process([
                sys.executable, str(HERE / "train.py"), str(HERE / f"config_{corpus}.py"), f"--data_dir={folder}",
                f"--out_dir={out}", "--overwrite=true", f"--device={sheet.device}", f"--max_minutes={minutes:.3f}",
                "--num_samples=0", "--eval_every=0", "--checkpoint_every=1000000", *sheet.size["flags"]],
                max(1.0, sheet.left()))
        sheet("", f"config_{corpus}.py on {folder}, {minutes:.2f} minutes: {how}", *lines[-2:])
        if how != "done":
            raise RuntimeError(f"train.py {how}")
    sheet.attempt("shakespeare", lambda: run(2, "shakespeare", 2048))
    sheet.attempt("tinystories", lambda: run(1, "tinystories", 10_000))
