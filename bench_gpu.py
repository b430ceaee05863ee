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
import json
import math
import os
import shutil
import signal
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
import parallel
import runs
from accounting import PRESETS
from configurator import ConfigError, command_line
from machine import DTYPES, pick_device
from model import ModelConfig, Transformer
from optim import AdamW

HERE = Path(__file__).parent
LIMITS = {"correct": 85, "kernels": 80, "training": 175, "decoding": 65, "distributed": 25, "loss": 108}      # seconds
ALL_SECONDS = 9 * 60
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # the tests': some roundings of the largest entry

GPT2 = PRESETS["gpt2"] | {"vocab_size": 50_304}          # 50,257 and padding: a multiple of 64 keeps rows aligned
LLAMA = dict(vocab_size=50_304, context_length=1024, d_model=2048, n_layers=24, n_heads=16, d_ff=6144)    # 1.5e9
TOY = dict(vocab_size=60, context_length=16, d_model=32, n_layers=2, n_heads=1)
# Sizes on a card and, to prove the command, on a CPU.
SIZES = {
    "cuda": dict(
        # correct: (Tq, Tk, head width, key heads, group, causal); (tokens, width, vocabulary, heads, key heads, D)
        attention=[(1, 1, 16, 2, 1, True), (1, 130, 80, 2, 4, True), (17, 130, 64, 2, 2, False),
                   (130, 7, 32, 2, 4, True), (127, 257, 256, 1, 2, True), (1000, 5000, 128, 2, 4, True),
                   (4096, 4096, 64, 2, 2, True), (65536, 65536, 64, 1, 1, True), (16384, 16384, 128, 1, 2, True)],
        layers=[(1, 80, 7, 4, 2, 16), (50, 257, 201, 4, 1, 80), (1000, 768, 50257, 12, 4, 64),
                (65536, 1024, 256, 8, 2, 128)],
        # kernels: lengths and head widths of attention, and one shape as in layers for the others
        lengths=(1024, 4096, 16384, 65536), widths=(64, 128), attention_tokens=16384, attention_width=2048,
        plain_length=4096, layer=(16384, 4096, 50304, 32, 8, 128), copy_bytes=2 ** 31, product=8192,
        gpt2=GPT2, llama=LLAMA, batches=(64, 32, 16, 8, 4), rounds=4, steps=5, curve_batch=8, curve_steps=200,
        profile_batch=16, prompt=128, new=64, rows=(1, 8, 64), max_mb=1024, flags=(),
        corpus_bytes=8_000_000, vocabulary=10_000),
    "cpu": dict(
        attention=[(5, 17, 16, 1, 2, True)], layers=[(5, 24, 33, 2, 1, 16)], lengths=(8, 16), widths=(16,),
        attention_tokens=16, attention_width=16, plain_length=8, layer=(8, 16, 48, 2, 1, 8), copy_bytes=2 ** 20,
        product=64, gpt2=GPT2 | TOY | {"n_layers": 1}, llama=TOY | {"d_ff": 64}, batches=(1,), rounds=1, steps=1,
        curve_batch=1, curve_steps=2, profile_batch=1, prompt=5, new=4, rows=(1, 2), max_mb=1, corpus_bytes=60_000,
        flags=("--d_model=32", "--d_ff=64", "--n_layers=1", "--n_heads=2", "--context_length=32", "--batch_tokens=256",
               "--micro_batch_size=8", "--max_steps=3"), vocabulary=300)}
PICTURES = {        # OUT/NAME.png: (how it is drawn, x, y, title)
    "roofline": ("loglog", "FLOPs a byte, forward and backward", "TFLOP/s", "kernels in bfloat16"),
    "attention_forward": ("semilogx", "tokens", "TFLOP/s", "causal attention, forward"),
    "attention": ("semilogx", "tokens", "TFLOP/s", "causal attention, forward and backward"),
    "training": ("barh", "tokens per second", "", "GPT-2, training"),
    "training_step": ("barh", "ms", "", "one step of GPT-2, not compiled, by region")}


@dataclass
class GpuConfig:
    """What `python bench.py gpu` can be told; the last two are for the stages' processes."""
    out: str = "results/gpu"           # folder of the tables and pictures
    only: str = "all"                  # one stage: correct | kernels | training | decoding | distributed | loss
    device: str | None = None          # cuda, cpu; none = the best there is
    until: float | None = None         # the clock, time.time(), when a stage is ended; it begins nothing longer
    dtypes: str = "float32,float16,bfloat16"      # those whose errors are measured

    def __post_init__(self):
        if self.only not in ("all", "errors", *LIMITS):
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


def run_stage(name: str, command: list[str], limit: float, folder: Path, device: str = "cpu") -> str:
    """Run a stage's process; note in FOLDER/stages.txt how it ended, and if not well its last lines in both files."""
    environment, began = dict(os.environ), time.monotonic()
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    how, said = run_process(command, limit, env=environment, start_new_session=True)
    lines = [f"{name:<12}{how}, {time.monotonic() - began:.1f} s"]
    if how != "done":
        lines += [f"    {line[:200]}" for line in said[-15:]]
        append(folder / f"{name}.txt", *lines)
    print(*said, sep="\n")
    append(folder / "stages.txt", *lines)
    return how


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
        done += run_stage(name, command, limit, folder, device) == "done"
        try:
            draw(folder)
        except Exception as error:                 # pictures come last: a table is worth more
            append(folder / "stages.txt", f"no pictures: {type(error).__name__}: {error}")
    print(f"{folder}: {done} of {len(names)} stages done in {time.monotonic() - began:.0f} s")
    if done < len(names):
        sys.exit(1)


def draw(folder: Path) -> None:
    """The PICTURES of the points that there are in OUT/stage.jsonl."""
    from matplotlib.figure import Figure
    pictures, card = {}, (folder / "stages.txt").read_text(encoding="utf-8").splitlines()[0].split(",")[0]
    for path in (folder / f"{name}.jsonl" for name in LIMITS):
        for one in runs.read_log(path) if path.exists() else []:
            pictures.setdefault(one["picture"], {}).setdefault(one["line"], []).append((one["x"], one["y"]))
    for picture, lines in pictures.items():
        kind, x, y, title = PICTURES[picture]
        axes = Figure(figsize=(8, 5), layout="constrained").subplots()
        for label, points in lines.items():
            style = {} if kind == "barh" else dict(marker="o", label=label)
            getattr(axes, kind)(*zip(*sorted(points)), **style)
        axes.set(xlabel=x, ylabel=y, title=f"{card}: {title}")
        if kind != "barh":
            axes.legend(fontsize=7)
        axes.figure.savefig(folder / f"{picture}.png", dpi=110)


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
        self.config, self.device, self.missing = config, pick_device(config.device), []
        self.on_cuda = self.device.startswith("cuda")
        self.size = SIZES["cuda" if self.on_cuda else "cpu"]
        self.end = (config.until or time.time() + ALL_SECONDS) - 3                # 3 s to end by itself
        self.path = Path(config.out) / f"{config.only}.txt"
        if config.only == "errors":                  # a job of the stage correct, whose table it continues
            self.path = self.path.with_name("correct.txt")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self.path.with_suffix(".jsonl").unlink(missing_ok=True)
        self(*machine(self.device), f"python bench.py gpu --only={config.only}", "")

    def __call__(self, *lines: str) -> None:
        append(self.path, *lines)

    def point(self, picture: str, line: str, x, y) -> None:
        """Keep a point of a picture in OUT/stage.jsonl."""
        with open(self.path.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
            print(json.dumps({"picture": picture, "line": line, "x": x, "y": y}), file=file)

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

def error_cases(sheet: Sheet):
    """(name, kernel, reference, inputs) of all kernels at all sizes; attention's reference is flash.py's in PyTorch."""
    import flash
    for size in sheet.size["layers"]:
        for name, ours, plain, _, inputs in bench_systems.layer_cases(sheet.device, *size):
            yield f"{name}, {size[0]} tokens, width {size[1]}, V {size[2]}, D {size[5]}", ours, plain, inputs
    flash.TILE = 2048                                                # few large tiles: 64 would take a minute here
    for Tq, Tk, D, key_heads, group, causal in sheet.size["attention"]:
        shapes = (group * key_heads, Tq), (key_heads, Tk), (key_heads, Tk)
        inputs = [torch.randn(1, heads, T, D, device=sheet.device).requires_grad_() for heads, T in shapes]
        ours, tiled = (lambda q, k, v, f=f, causal=causal: f(q, k, v, causal)
                       for f in (flash.flash_attention, flash.FlashAttentionPyTorch.apply))
        yield f"attention {Tq} x {Tk}, D {D}, {group} to {key_heads}, causal {causal}", ours, tiled, inputs


def errors(sheet: Sheet) -> None:
    """The largest errors of all kernels against float64 on the same rounded numbers; exits with 1 for one too large."""
    torch.manual_seed(0)
    wrong = 0
    for name, *case in error_cases(sheet):
        for dtype in sheet.config.dtypes.split(","):
            both = sheet.attempt(f"WRONG {dtype} {name}", lambda: bench_systems.errors(*case, DTYPES[dtype]), needs=5)
            good = both is not None and all(error < TOLERANCE[dtype] for error in both)          # not so for NaN
            wrong += not good
            if both is not None:
                sheet(f"{'ok' if good else 'WRONG':<6}{dtype:<9} output {both[0]:.0e} gradient {both[1]:.0e}  {name}")
    if wrong:
        sys.exit(f"{wrong} of the kernels' errors are too large, or were not measured")


def correct(sheet: Sheet) -> None:
    """Errors in each dtype, the GPU's tests, and memcheck on small shapes: processes that run side by side."""
    stage = [sys.executable, str(HERE / "bench_gpu_models.py"), "--only=errors", f"--device={sheet.device}",
             f"--out={sheet.path.parent}", f"--until={sheet.end - 2}"]
    jobs = {f"errors in {dtypes}": [*stage, f"--dtypes={dtypes}"]
            for dtypes in (TOLERANCE if sheet.on_cuda else ["float32,bfloat16"])}
    if sheet.on_cuda:
        test = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider"]
        jobs |= {f"tests of {page}": [*test, str(HERE / f"tests/test_{page}.py")] for page in ("kernels", "flash")}
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        jobs["memcheck"] = [sanitizer, "--tool=memcheck", "--error-exitcode=9", sys.executable, str(HERE / "bench.py"),
                            "kernels", "--times=false"]
        if not os.path.exists(sanitizer):
            sheet(f"memcheck: not measured, there is no {jobs.pop('memcheck')[0]}")

    def job(name):
        how, lines = run_process(jobs[name], max(1.0, sheet.left()))
        sheet("", f"{name}: {how}", *[line for line in lines if line.strip() and not line.startswith("ok ")][-40:])
        return how
    with ThreadPoolExecutor(len(jobs)) as pool:
        failed = [name for name, how in zip(jobs, pool.map(job, jobs)) if how != "done"]
    if failed:
        sys.exit(f"not right: {', '.join(failed)}")


# --- kernels ---

def row(sheet: Sheet, name: str, function, inputs, work, roof: float, scale: float) -> list[float]:
    """A line of what a forward pass, and both passes, reach: work is their FLOPs or bytes. The two rates, or none."""
    times = sheet.attempt(name, lambda: bench_systems.timed(function, inputs, rep=70), needs=12)
    if times is None:
        return []
    rates = [1e3 * amount / ms for amount, ms in zip(work, times)]
    cells = "".join(f"{ms:>12.3f}{rate / scale:>9,.1f}{rate / roof:>6.2f}" for ms, rate in zip(times, rates))
    sheet(f"{name:34}{cells}{times[2]:>9,.0f}  {'TFLOP/s' if scale == 1e12 else 'GB/s'}")
    return rates


def kernels(sheet: Sheet) -> None:
    """Causal attention over lengths, then the memory-bound kernels, each beside torch's, in bfloat16."""
    s = sheet.size
    copy, product = bench_systems.roofs(sheet.device, s["copy_bytes"], s["product"])
    sheet(f"roofs: copy {copy / 1e9:,.0f} GB/s, product of {s['product']} in bfloat16 {product / 1e12:,.1f} TFLOP/s",
          "", f"{'':34}{'forward ms':>12}{'rate':>9}{'roof':>6}{'both ms':>12}{'rate':>9}{'roof':>6}{'peak MB':>9}")
    for x in (10 ** (i / 10) for i in range(-10, 41)):
        sheet.point("roofline", "roof, measured", x, min(x * copy, product) / 1e12)
    for D, T in itertools.product(s["widths"], s["lengths"]):
        B, H = max(1, s["attention_tokens"] // T), s["attention_width"] // D
        _, ours, plain, sdpa, inputs = bench_systems.attention_cases(sheet.device, T, H, H, D, B)[2]
        inputs, flops = bench_systems.leaves(inputs, torch.bfloat16), 2 * B * H * T * T * D
        functions = {"ours": ours, "flash": sdpa_kernel(SDPBackend.FLASH_ATTENTION)(sdpa),
                     "cuDNN": sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa), "plain": plain}
        for name, function in functions.items():
            if name == "plain" and T > s["plain_length"]:
                continue
            # A causal forward counts 2 T² D FLOPs a head, a backward 2.5 times that (2307.08691, section 4.1).
            rates = row(sheet, f"{name} {T} {D}", function, inputs, (flops, 3.5 * flops), product, 1e12)
            for picture, rate in zip(("attention_forward", "attention"), rates):
                sheet.point(picture, f"{name}, D {D}", T, rate / 1e12)
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
                for rate in rates[1:]:             # of both passes
                    sheet.point("roofline", f"{name}, {label}", flops / (2 * both), rate / amounts[1] * flops / 1e12)


# --- one rank ---

def distributed(sheet: Sheet) -> None:
    """A world of one over NCCL (gloo on a CPU): copies, messages; every strategy trains as the plain model does."""
    os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device, shape = parallel.start(None if sheet.on_cuda else "cpu"), ModelConfig(**TOY)
    sheet(f"one rank, {torch.distributed.get_backend()}, {device}", "")
    sheet(*(sheet.attempt("copies", lambda: bench_systems.copy_rates(sheet.size["max_mb"], device)) or []), "")
    sheet(*(sheet.attempt("messages", lambda: bench_systems.collective_times(sheet.size["max_mb"], device)) or []),
          "of one rank: nothing is sent, the ms are the library's own", "", "loss after five steps in float32")
    torch.manual_seed(0)
    plain, wrong, losses = Transformer(shape).to(device), [], {}
    made = {"plain": (plain, AdamW(plain.parameters()), 0)} | bench_systems.strategies(shape, device)
    ids = torch.randint(shape.vocab_size, (8, 17), generator=torch.Generator().manual_seed(0)).to(device)

    def train_five(wrapper, optimizer, _):
        for _ in range(5):
            bench_systems.traced_step(wrapper, optimizer, ids[:, :-1], ids[:, 1:])
        return wrapper(ids[:, :-1], ids[:, 1:])[1].item()
    for name in (name for name in made if " m=" not in name):      # pipelines are of another shape
        losses[name] = sheet.attempt(name, lambda: train_five(*made[name])) or math.nan
        gap = abs(losses[name] - losses["plain"])
        sheet(f"{name:20}{losses[name]:>10.6f}   from plain {gap:.1e}")
        wrong += [name] if not gap < 1e-4 else []
    torch.distributed.destroy_process_group()
    if wrong:
        sys.exit(f"not as the plain model: {', '.join(wrong)}")
