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
large product. Of a training step MFU counts, the share of the data sheet's FLOP/s (PaLM, 2204.02311). On a CPU all runs
at toy sizes, the kernels through Triton's interpreter: that proves the command, not the figures. Nothing is downloaded;
transformers if installed.

    python bench.py gpu --out=results/h100 --only=kernels       one stage again, with nine minutes for itself
"""
import contextlib
import gc
import io
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

import bench_step
import bench_systems
import data
import runs
import train
from accounting import PRESETS, flops_per_token
from bench_step import on, seconds_of, step_parts
from configurator import ConfigError, command_line
from convert import their_config
from machine import peak_flops, pick_device
from model import ModelConfig, Transformer

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
        gpt2=GPT2, batches=(64, 32, 16, 8, 4), rounds=4, steps=5, curve_steps=200,
        profile_batch=16, max_mb=1024, flags=(), corpus_bytes=8_000_000, vocabulary=10_000,
        decode=[("llama-1.5b", "--batch=8,64"), ("gpt2", "--batch=8,64")]),
    "cpu": dict(
        lengths=(8, 16), widths=(16,), attention_tokens=16, attention_width=16, plain_length=8,
        layer=(8, 16, 48, 2, 1, 8), copy_bytes=2 ** 20, product=64, gpt2=GPT2 | TOY, batches=(1,), rounds=1, steps=1,
        curve_steps=2, profile_batch=1, max_mb=1, corpus_bytes=60_000, vocabulary=300,
        decode=[("toy", "--batch=2", "--prompt_tokens=5", "--new_tokens=4")],
        flags=("--d_model=32", "--d_ff=64", "--n_layers=1", "--n_heads=2", "--context_length=32", "--batch_tokens=256",
               "--micro_batch_size=8", "--max_steps=3"))}

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


def run_stage(name: str, command: list[str], limit: float, folder: Path) -> bool:
    """Run a stage's process; note in FOLDER/stages.txt how it ended, and if not well its last lines in both files."""
    began = time.monotonic()
    how, said = run_process(command, limit, start_new_session=True)
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
    if config.only != "all":
        sheet = Sheet(config)
        STAGES[config.only](sheet)
        if sheet.missing:
            sheet("", f"missing: {', '.join(sheet.missing)}")
        return
    folder, began, done = Path(config.out), time.monotonic(), 0
    for name, limit in LIMITS.items():
        if name == "loss":                         # the last one: its limit, or what the others have left
            limit = max(limit, ALL_SECONDS - (time.monotonic() - began))
        command = [sys.executable, str(HERE / "bench.py"), "gpu", *argv, f"--only={name}"]
        done += run_stage(name, [*command, f"--until={time.time() + limit}"], limit, folder)
    print(f"{folder}: {done} of {len(LIMITS)} stages done in {time.monotonic() - began:.0f} s")
    if done < len(LIMITS):
        sys.exit(1)


# --- what a stage writes ---

def machine(device: str) -> list[str]:
    """Card, driver, versions, date and commit, for the head of a table."""
    lines = ["CPU, toy sizes: this proves the command, not the figures"]
    if device.startswith("cuda"):
        lines, query = [], ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        if shutil.which(query[0]):
            lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    head = runs.header()
    return [*lines, f"{on(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python "
                    f"{head['python']}, commit {(head['commit'] or 'unknown')[:12]}"]


class Sheet:
    """The table of one stage, OUT/stage.txt, a line at a time; its sizes, and the time that is left."""

    def __init__(self, config: GpuConfig):
        self.config, self.device, self.missing = config, pick_device(config.device), []
        self.on_cuda = self.device.startswith("cuda")
        if not self.on_cuda:
            os.environ.setdefault("TRITON_INTERPRET", "1")         # read when kernels.py is imported
        self.size = SIZES["cuda" if self.on_cuda else "cpu"]
        self.end = (config.until or time.time() + ALL_SECONDS) - 5                # 5 s to end by itself
        self.path = Path(config.out) / f"{config.only}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("", encoding="utf-8")
        self(*machine(self.device), f"python bench.py gpu --only={config.only}", "")

    def __call__(self, *lines: str) -> None:
        append(self.path, *lines)

    def draw(self, picture: str, kind: str, x: str, y: str, lines: dict) -> None:
        """OUT/PICTURE.png of lines {label: points}; kind: loglog, semilogx, barh."""
        from matplotlib.figure import Figure
        axes = Figure(figsize=(8, 5), layout="constrained").subplots()
        for label, points in lines.items():
            getattr(axes, kind)(*zip(*sorted(points)), **{} if kind == "barh" else dict(marker="o", label=label))
        axes.set(xlabel=x, ylabel=y, title=f"{machine(self.device)[0].split(',')[0]}: {picture.replace('_', ' ')}")
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

def row(sheet: Sheet, name: str, function, inputs, work, roof: float, scale: float) -> list[float]:
    """A line of what a forward pass, and both passes, reach: work is their FLOPs or bytes. The two rates, or none."""
    times = sheet.attempt(name, lambda: bench_systems.timed(function, inputs), needs=12)
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
    lengths, intensities = {}, [10 ** (i / 10) for i in range(-10, 41)]
    roofline = {"roof, measured": [(x, min(x * copy, product) / 1e12) for x in intensities]}
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
                lengths.setdefault(f"{name}, D {D}", []).append((T, rate / 1e12))
    sheet.draw("attention", "semilogx", "tokens", "TFLOP/s, forward and backward", lengths)
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
                    roofline[f"{name}, {label}"] = [(flops / (2 * both), rate / amounts[1] * flops / 1e12)]
    sheet.draw("roofline", "loglog", "FLOPs a byte, forward and backward", "TFLOP/s", roofline)


# --- training ---

class Theirs(torch.nn.Module):
    """transformers' GPT-2 with random weights, called as ours is."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM
        settings = their_config(config, torch.float32) | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="sdpa")

    def forward(self, x, y):
        """(None, the loss)."""
        logits = self.model(input_ids=x, use_cache=False).logits
        return None, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def random_batch(shape: dict, rows: int, device: str, seed: int = 0):
    """(inputs, targets) of real ids, small ones more often, as in text: a model can learn their frequencies."""
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(rows, shape["context_length"] + 1, device=device, generator=generator)
    ids = (min(shape["vocab_size"], 50_257) ** u).long() - 1
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_step(sheet: Sheet, compile: bool = False, theirs: bool = False, **more):
    """A function of a batch that takes a training step on GPT-2, ours or transformers'; returns the loss."""
    torch.manual_seed(0)
    config = ModelConfig(**sheet.size["gpt2"] | more)
    with torch.device(sheet.device):
        model = Theirs(config) if theirs else Transformer(config)
    if theirs:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                        fused=sheet.on_cuda)]
    else:
        optimizers = train.make_optimizers(model, train.TrainConfig())
    if compile:          # as in train.py; on a CPU without a compiler's work, to prove the same lines
        model = torch.compile(model, backend="inductor" if sheet.on_cuda else "aot_eager", dynamic=False)

    def step(batch):
        results = [run() for run in step_parts(model, optimizers, batch, torch.bfloat16).values()]
        return results[1]                                # what backward gives
    return step


def largest_batch(sheet: Sheet, step):
    """The largest batch that fits, after two steps of it: those compile and make the moments."""
    for rows in sheet.size["batches"]:
        batch = random_batch(sheet.size["gpt2"], rows, sheet.device)
        try:
            step(batch), step(batch)
            return batch
        except torch.OutOfMemoryError:
            pass                                         # outside this block, when its traceback holds no tensor
        free(sheet.device)
    raise torch.OutOfMemoryError(f"no batch of {sheet.size['batches']} rows fits")


CASES = {"sdpa": {}, "triton": dict(attention_backend="triton"),
         "triton compiled": dict(compile=True, attention_backend="triton"),
         "transformers compiled": dict(compile=True, theirs=True),
         "triton compiled, fused loss": dict(compile=True, attention_backend="triton", fused_loss=True),
         "sdpa compiled": dict(compile=True), "sdpa, fused loss": dict(fused_loss=True)}


def training_rates(sheet: Sheet) -> None:
    """Tokens per second and MFU by attention, loss and compile, beside transformers; the last table alternates."""
    shape, T = sheet.size["gpt2"], sheet.size["gpt2"]["context_length"]
    flops = flops_per_token(ModelConfig(**shape), T, training=True)["total"]
    peak, ready, rates = peak_flops(sheet.device, "bfloat16"), {}, {}
    sheet(f"GPT-2, {flops / 1e9:.3f} GFLOP a token, context {T}, bfloat16 by autocast, AdamW, clipping; MFU of "
          f"{(peak or 0) / 1e12:.0f} TFLOP/s", f"{'':30}{'rows':>6}{'tokens/s':>12}{'MFU':>8}{'peak GB':>9}")

    def measure(name) -> str:
        """One more rate of a case, and the line of its median."""
        step, batch = ready[name]
        seconds = seconds_of(lambda: step(batch), sheet.device, sheet.size["steps"])
        rates.setdefault(name, []).append(batch[0].numel() / seconds)
        rate = statistics.median(rates[name])
        mfu = "n/a" if peak is None else f"{rate * flops / peak:.1%}"
        return f"{name:30}{len(batch[0]):>6}{rate:>12,.0f}{mfu:>8}"

    def prepare(name) -> None:
        before, gb = 0, 0.0                              # what the cases before it hold
        if sheet.on_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        step = training_step(sheet, **CASES[name])
        ready[name] = step, largest_batch(sheet, step)
        line = measure(name)
        if sheet.on_cuda:
            gb = (torch.cuda.max_memory_allocated() - before) / 1e9
        sheet(f"{line}{gb:>9.1f}")
    for name in CASES:
        sheet.attempt(name, lambda: prepare(name), needs=75 if "compiled" in name else 10)
    lines = {}
    for name in sheet.size["rounds"] * list(rates):      # in turn: a card that grows hot slows all of them
        if sheet.left() > 35:
            lines[name] = measure(name)
    sheet("", "the same in turn, medians", *lines.values())


def curves(sheet: Sheet) -> None:
    """Losses of the same steps with our attention and with sdpa, on new ids in every step."""
    steps, n = [training_step(sheet, attention_backend=name) for name in ("sdpa", "triton")], sheet.size["curve_steps"]
    losses = [[step(random_batch(sheet.size["gpt2"], 8, sheet.device, seed=i)) for step in steps] for i in range(n)]
    losses = torch.tensor(losses)
    sheet("", f"losses of {n} steps: sdpa, triton; the largest difference {losses.diff(dim=1).abs().max():.4f}")
    sheet(*(f"{i + 1:>8}{losses[i][0]:>10.4f}{losses[i][1]:>10.4f}" for i in sorted({0, n // 20, n // 4, n // 2, n - 1})))


def training(sheet: Sheet) -> None:
    """GPT-2's training step: rates beside transformers, two loss curves; its time by region, its memory by kind."""
    training_rates(sheet)
    free(sheet.device)
    sheet.attempt("loss curves", lambda: curves(sheet), needs=15)
    shape, rows = sheet.size["gpt2"], sheet.size["profile_batch"]
    with tempfile.TemporaryDirectory() as folder:
        settings = shape | dict(attention_backend="triton", batch_tokens=rows * shape["context_length"],
                                data_dir="none", out_dir=folder, device=sheet.device, dtype="bfloat16")
        words = [f"--{key}={value}" for key, value in settings.items()]
        for name, verb in (("profile", bench_step.profile), ("memory", bench_step.memory)):
            with contextlib.redirect_stdout(io.StringIO()) as text:
                parts = sheet.attempt(name, lambda: verb(words), needs=10)
            sheet("", f"{name} of one step of {rows} rows, not compiled", *text.getvalue().splitlines())
            if parts:
                sheet.draw("training_step", "barh", "ms", "", {"": parts.items()})


# --- what other verbs measure, as processes ---

def verb(sheet: Sheet, *words: str, env: dict | None = None) -> None:
    """What `python bench.py …` says; RuntimeError where it fails."""
    how, lines = run_process([sys.executable, str(HERE / "bench.py"), *words], max(1.0, sheet.left()), env=env)
    sheet("", " ".join(["python bench.py", *words]), *lines)
    if how != "done":
        raise RuntimeError(how)


def decoding(sheet: Sheet) -> None:
    """Tokens per second by shape, batch, weights and way of launching, as a share of the bandwidth."""
    sheet("gpt-fast, Llama-2-7B on an A100 that reads 1,700 GB/s, batch 1: 0.82, int8 0.63, int4 0.51 (its README)")
    for words in sheet.size["decode"]:
        sheet.attempt(words[0], lambda: verb(sheet, "decode", *words, "--dtype=bfloat16", "--graph=true",
                                             "--reference=true", f"--device={sheet.device}"), needs=25)


def distributed(sheet: Sheet) -> None:
    """A world of one over NCCL (gloo on a CPU): copies, and every strategy trains as one rank alone does."""
    environment = dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if not sheet.on_cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(os.cpu_count())}       # one thread
    verb(sheet, "parallel", f"--max_mb={sheet.size['max_mb']}", "--d_model=64", "--n_layers=2", "--vocab_size=256",
         "--batch_size=4", "--steps=5", f"--out_dir={sheet.path.parent}", env=environment)


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


STAGES = {"correct": correct, "kernels": kernels, "training": training, "decoding": decoding,
          "distributed": distributed, "loss": loss}
