"""Everything that is to be known of a GPU, in one command of nine minutes: `python bench.py gpu --out=results/h100`.

Six stages, each a process of its own with a time limit. A line is on the disk as soon as it is known, so that a stage
that fails or is ended keeps what it has; it is recorded with its last words, and the next one begins.

    stage         limit, s   OUT/stage.txt says                                            picture
    correct             85   errors of all kernels against float64, tests, memcheck
    kernels             80   attention and memory-bound kernels beside torch's             attention.png, roofline.png
    training           175   tokens/s and MFU of GPT-2 beside transformers; a step's parts  training.png
    decoding            65   tokens/s, share of the bandwidth; CUDA graphs, int8, int4
    distributed         25   a world of one over NCCL: copies, FSDP and DDP
    loss               108   bits per byte after two minutes each, or what the others leave of nine

Two roofs are measured on the card first, its copy bandwidth and a large product; each share is one of these, and MFU is
of the data sheet. figures.jsonl has every number for the pictures. On a CPU all runs at toy sizes, the kernels through
Triton's interpreter: that proves the command and not the figures. Nothing is downloaded; transformers if installed.

    python bench.py gpu --out=results/h100 --only=kernels       one stage again, with nine minutes for itself
    python bench.py gpu --only=tiles                            a seventh: flash.py's tiles, each timed beside others

The models' stages stand in bench_gpu_models.py, those of kernels and ranks in bench_gpu_kernels.py.
"""
import contextlib
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import bench_systems
import runs
from accounting import PRESETS
from configurator import ConfigError, command_line
from machine import DTYPES, pick_device

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
        profile_batch=16, prompt=128, new=64, rows=(1, 8, 64), messages_mb=(1, 16, 256, 1024), flags=(),
        corpus_bytes=8_000_000, vocabulary=10_000),
    "cpu": dict(
        attention=[(5, 17, 16, 1, 2, True)], layers=[(5, 24, 33, 2, 1, 16)],
        lengths=(8, 16), widths=(16,), attention_tokens=16, attention_width=16, plain_length=8,
        layer=(8, 16, 48, 2, 1, 8), copy_bytes=2 ** 20, product=64,
        gpt2=GPT2 | TOY | {"n_layers": 1}, llama=TOY | {"d_ff": 64}, batches=(1,), rounds=1, steps=1, curve_batch=1,
        curve_steps=2, profile_batch=1, prompt=5, new=4, rows=(1, 2), messages_mb=(1,),
        flags=("--d_model=32", "--d_ff=64", "--n_layers=1", "--n_heads=2", "--context_length=32", "--batch_tokens=256",
               "--micro_batch_size=8", "--max_steps=3"), corpus_bytes=60_000, vocabulary=300)}


@dataclass
class GpuConfig:
    """What `python bench.py gpu` can be told."""
    out: str = "results/gpu"           # folder of the tables and pictures
    only: str = "all"                  # one stage: correct | kernels | training | decoding | distributed | loss | tiles
    device: str | None = None          # cuda, cpu; none = the best there is
    minutes: float = 2.0               # of each training run of the stage loss, less where the nine minutes leave less

    def __post_init__(self):
        if self.only not in ("all", "tiles", *LIMITS):
            raise ConfigError(f"only={self.only!r} must be all, tiles, {', '.join(LIMITS)}")
        if not self.minutes > 0:
            raise ConfigError(f"minutes={self.minutes} must be above 0")


@dataclass
class StageConfig(GpuConfig):
    """What a stage's process is told: `python bench_gpu_models.py STAGE`."""
    until: float | None = None         # the clock, time.time(), when it is ended; it begins nothing that takes longer
    dtypes: str = "float32,float16,bfloat16"      # those whose errors are measured


# --- the stages' processes ---

def run_stage(name: str, command: list[str], limit: float, folder: Path, device: str = "cpu") -> str:
    """Run a stage's process and note in FOLDER/stages.txt how it ended, if not well with its last lines.

    Returns "done" or what went wrong. Whatever the stage has started ends with it.
    """
    environment, log, began = dict(os.environ), folder / f"{name}.log", time.monotonic()
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            status = process.wait(limit)
            how = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            how = f"ended at its limit of {limit:.0f} s"
        finally:
            end_group(process)
    lines = [f"{name:<12}{how}, {time.monotonic() - began:.1f} s"]
    if how == "done":
        log.unlink()
    else:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        lines += [f"    {line[:200]}" for line in last]
        append(folder / f"{name}.txt", *lines)
    append(folder / "stages.txt", *lines)
    return how


def end_group(process) -> None:
    """Kill a process with all that it has started (compilers, tests), which are of its process group."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


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
    ended = {}
    for name in LIMITS if config.only == "all" else [config.only]:
        limit = ALL_SECONDS            # alone a stage may take all the time, and leaves nothing out for lack of it
        if config.only == "all":
            limit = LIMITS[name]
        if name == "loss":             # the last one: its limit, or what the others have left
            limit = max(limit, ALL_SECONDS - (time.monotonic() - began))
        forget(folder / "figures.jsonl", name)
        command = [sys.executable, str(HERE / "bench_gpu_models.py"), name, f"--out={folder}", f"--device={device}",
                   f"--until={time.time() + limit}", f"--minutes={config.minutes}"]
        ended[name] = run_stage(name, command, limit, folder, device)
        if (folder / f"{name}.txt").exists():
            print((folder / f"{name}.txt").read_text(encoding="utf-8"), flush=True)
        try:
            draw(folder)
        except Exception as error:     # pictures come last: a table is worth more
            append(folder / "stages.txt", f"no pictures: {type(error).__name__}: {error}")
    wrong = [name for name, how in ended.items() if how != "done"]
    print(f"{folder}: {len(ended) - len(wrong)} of {len(ended)} stages done in {time.monotonic() - began:.0f} s")
    if wrong:
        sys.exit(1)


# --- what a stage writes ---

def machine(device: str) -> list[str]:
    """Card, driver, versions, date and commit, for the head of a table."""
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}"
    lines = ["CPU, toy sizes: this proves the command, not the figures"]
    if device.startswith("cuda"):
        driver = "driver unknown"
        with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
            query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
            driver = f"driver, power limit, highest clock: {said[torch.device(device).index or 0]}"
        card = torch.cuda.get_device_properties(device)
        memory = f"{card.total_memory / 2 ** 30:.1f} GiB"
        lines = [f"{card.name}, {memory}, {card.multi_processor_count} multiprocessors, {driver}"]
    cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, " if torch.version.cuda else ""
    head = runs.header()
    return lines + [f"torch {torch.__version__}, {cuda}{version('triton')}, {version('transformers')}, Python "
                    f"{head['python']}, {time.strftime('%Y-%m-%d %H:%M')}, commit {(head['commit'] or 'unknown')[:12]}"]


class Sheet:
    """The table of one stage, OUT/stage.txt, a line at a time; its sizes, and the time that is left."""

    def __init__(self, stage: str, config: StageConfig):
        self.stage, self.config, self.device = stage, config, pick_device(config.device)
        self.on_cuda = self.device.startswith("cuda")
        self.size, self.folder = SIZES["cuda" if self.on_cuda else "cpu"], Path(config.out)
        self.end, self.missing = (config.until or time.time() + ALL_SECONDS) - 3, []       # 3 s to end by itself
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{stage}.txt"
        self.path.write_text("", encoding="utf-8")
        self(*machine(self.device), f"python bench.py gpu --only={stage}", "")

    def __call__(self, *lines: str) -> None:
        append(self.path, *lines)

    def figure(self, kind: str, **values) -> None:
        """A line of figures.jsonl, from which the pictures are drawn."""
        with open(self.folder / "figures.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps({"stage": self.stage, "kind": kind} | values), file=file)

    def left(self) -> float:
        """Seconds until the stage should end."""
        return self.end - time.time()

    def attempt(self, what: str, run, needs: float = 0.0):
        """run(); or None, noted as missing, and a line says why: no time (needs: seconds), no memory, an error."""
        self.missing.append(what)
        if self.left() < needs:
            self(f"{what}: not measured, it may need {needs:.0f} s and {self.left():.0f} are left")
            return None
        try:
            result = run()
            self.missing.remove(what)
            return result
        except Exception as error:     # whatever it is, the figures after it are wanted too
            reason = (str(error).splitlines() or [""])[0][:120]
            self(f"{what}: {type(error).__name__}: {reason}")
            traceback.print_exc()
        finally:
            free(self.device)
        return None


def free(device: str) -> None:
    """Give unused memory back to the card."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Until the card has done all it was asked for: else a clock would stop before it does."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds_of(run, device: str, n: int) -> float:
    """Mean seconds of one run() of n in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(n):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / n


def forget(path: Path, stage: str) -> None:
    """Take a stage's former figures out of figures.jsonl."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if f'"stage": "{stage}"' not in line]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


# --- correct ---

def error_cases(sheet: Sheet):
    """(name, kernel, reference, inputs) of all kernels at all sizes; attention's reference is flash.py's in PyTorch."""
    import flash
    for size in sheet.size["layers"]:
        for name, ours, plain, _, inputs in bench_systems.layer_cases(sheet.device, *size):
            yield f"{name}, {size[0]} tokens, width {size[1]}, V {size[2]}, D {size[5]}", ours, plain, inputs
    for Tq, Tk, D, key_heads, group, causal in sheet.size["attention"]:
        shapes = (group * key_heads, Tq), (key_heads, Tk), (key_heads, Tk)
        inputs = [torch.randn(1, heads, T, D, device=sheet.device).requires_grad_() for heads, T in shapes]
        ours, tiled = (lambda q, k, v, f=f, causal=causal: f(q, k, v, causal)
                       for f in (flash.flash_attention, flash.FlashAttentionPyTorch.apply))
        yield f"attention {Tq} x {Tk}, D {D}, {group} to {key_heads}, causal {causal}", ours, tiled, inputs


def errors(sheet: Sheet) -> None:
    """The largest errors of all kernels against float64 on the same rounded numbers; exits with 1 for one too large."""
    import flash
    torch.manual_seed(0)
    wrong, tile = 0, flash.TILE
    flash.TILE = 2048                                                # few large tiles: 64 would take a minute here
    for name, ours, reference, inputs in error_cases(sheet):
        for dtype in sheet.config.dtypes.split(","):
            def compare():
                rounded = [x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in inputs]
                exact = bench_systems.outputs_and_gradients(reference, rounded, torch.float64)
                results = bench_systems.outputs_and_gradients(ours, rounded, DTYPES[dtype])
                pairs = [[(x - y).abs().max() / y.abs().max().clamp(min=1) for x, y in zip(a, b)]
                         for a, b in zip(results, exact)]
                return [torch.stack(pair).max().item() for pair in pairs]      # Python's max could miss a NaN
            both = sheet.attempt(f"WRONG {dtype} {name}", compare, needs=5)
            good = both is not None and all(error < TOLERANCE[dtype] for error in both)          # not so for NaN
            wrong += not good
            if both is not None:
                sheet(f"{'ok' if good else 'WRONG':<6}{dtype:<9} output {both[0]:.0e} gradient {both[1]:.0e}  {name}")
    flash.TILE = tile
    if wrong:
        sys.exit(f"{wrong} of the kernels' errors are too large, or were not measured")


def correct(sheet: Sheet) -> None:
    """Errors in each dtype, the GPU's tests, and memcheck on small shapes: processes that run side by side."""
    stage = [sys.executable, str(HERE / "bench_gpu_models.py"), "errors", f"--device={sheet.device}",
             f"--until={sheet.end - 2}"]
    test = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider"]
    jobs = {f"errors in {dtypes}": [*stage, f"--dtypes={dtypes}", f"--out={sheet.folder / f'errors_{i}'}"]
            for i, dtypes in enumerate(TOLERANCE if sheet.on_cuda else ["float32,bfloat16"])}
    if sheet.on_cuda:
        jobs |= {f"tests of {page}": [*test, str(HERE / "tests" / f"test_{page}.py")] for page in ("kernels", "flash")}
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if os.path.exists(sanitizer):
            jobs["memcheck"] = [sanitizer, "--tool=memcheck", "--error-exitcode=9", sys.executable,
                                str(HERE / "bench.py"), "kernels", "--times=false"]
        else:
            sheet("memcheck: not measured, there is no compute-sanitizer")
    started, failed = {}, []
    for i, (name, command) in enumerate(jobs.items()):
        file = open(sheet.folder / f"job_{i}.log", "w+", encoding="utf-8")
        started[name] = file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    while started:
        for name, (file, process) in list(started.items()):
            if process.poll() is None and sheet.left() > 0:
                continue
            status = "not finished" if process.poll() is None else f"status {process.returncode}"
            end_group(process)
            file.seek(0)
            lines = [line for line in file.read().splitlines() if line.strip()]
            file.close()
            os.unlink(file.name)
            sheet("", f"{name}: {'all right' if status == 'status 0' else status}", *lines[-80:])
            failed += [name] if status != "status 0" else []
            del started[name]
        time.sleep(0.1)
    for folder in sheet.folder.glob("errors_*"):
        shutil.rmtree(folder)
    if failed:
        sys.exit(f"not right: {', '.join(failed)}")


# --- pictures ---

def draw(folder: Path) -> None:
    """roofline.png, attention.png and training.png of the figures that there are."""
    from matplotlib.figure import Figure
    figures = runs.read_log(folder / "figures.jsonl") if (folder / "figures.jsonl").exists() else []
    kinds = {kind: [one for one in figures if one["kind"] == kind]
             for kind in ("roofs", "layer", "attention", "training", "parts")}
    card = (folder / "stages.txt").read_text(encoding="utf-8").split(",")[0].splitlines()[0]
    if kinds["roofs"] and kinds["layer"]:
        axes, roof = Figure(figsize=(8, 5), layout="constrained").subplots(), kinds["roofs"][-1]
        x = [10 ** (i / 10) for i in range(-10, 41)]
        axes.loglog(x, [min(one * roof["copy"], roof["product"]) / 1e12 for one in x], "k", label="roof, measured")
        for label in dict.fromkeys(one["label"] for one in kinds["layer"]):
            points = [one for one in kinds["layer"] if one["label"] == label]
            axes.loglog([one["intensity"] for one in points], [one["flops_per_s"] / 1e12 for one in points], "o",
                        label=label)
        for one in kinds["layer"]:
            if one["label"] == "ours":
                axes.annotate(one["name"], (one["intensity"], one["flops_per_s"] / 1e12), fontsize=8)
        axes.set(xlabel="FLOPs a byte, forward and backward", ylabel="TFLOP/s", title=f"{card}: kernels in bfloat16")
        save(axes, folder / "roofline.png")
    if kinds["attention"]:
        panels = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2, sharey=True)
        for axes, way, title in zip(panels, ("forward", "both"), ("forward", "forward and backward")):
            for i, name in enumerate(dict.fromkeys(one["name"] for one in kinds["attention"])):
                for D, style in zip(sorted({one["D"] for one in kinds["attention"]}), ("o-", "s--")):
                    line = [one for one in kinds["attention"] if (one["name"], one["D"]) == (name, D)]
                    axes.semilogx([one["T"] for one in line], [one[way] / 1e12 for one in line], style, base=2,
                                  color=f"C{i}", label=f"{name}, D {D}")
            axes.set(xlabel="tokens", ylabel="TFLOP/s", title=f"{card}: causal attention, {title}")
        save(axes, folder / "attention.png")
    if kinds["training"] or kinds["parts"]:
        left, right = Figure(figsize=(11, 4.5), layout="constrained").subplots(1, 2)
        left.barh([one["name"] for one in kinds["training"]], [one["rate"] for one in kinds["training"]])
        left.set(xlabel="tokens per second", title=f"{card}: GPT-2, training")
        for parts in kinds["parts"][-1:]:
            names = [name for name in parts if name not in ("stage", "kind")]
            right.barh(names, [parts[name] for name in names])
        right.set(xlabel="ms", title="one step, not compiled, by region")
        save(left, folder / "training.png")


def save(axes, path: Path) -> None:
    """Write an axes' figure, with a legend where there is something to name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)
    axes.figure.savefig(path, dpi=110)
