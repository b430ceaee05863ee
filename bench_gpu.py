"""Everything that is to be known of a GPU, in one command of nine minutes: `python bench.py gpu --out=results/h100`.

Six stages of commands that can also be run alone, each a process with what is left of its stage's time. What a command
says is on the disk at once, OUT/STAGE.NAME.txt, so one that fails or is ended keeps what it has, and the next begins;
OUT/stages.txt says how each ended.

    stage         limit, s   what
    correct             85   errors of all kernels against float64, tests, memcheck: side by side
    kernels             80   attention and memory-bound kernels beside torch's, as shares of a roof; two pictures
    training           175   tokens/s and MFU of GPT-2 beside transformers; the parts of a step, its memory; loss curves
    decoding            65   tokens/s, share of the bandwidth; CUDA graphs, int8, int4
    distributed         25   a world of one over NCCL: copies; FSDP, DDP, … train as the plain model does
    loss               110   bits per byte of two configs, 40 s each, or what the others leave of nine minutes

On a CPU all runs at toy sizes, the kernels through Triton's interpreter: that proves the command, not the figures.
Nothing is downloaded; transformers if installed.

    python bench.py gpu --out=results/h100 --only=kernels       one stage again
"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import bench_kernels
import data
import runs
from bench_step import on
from configurator import command_line
from machine import pick_device

HERE, RUNS = Path(__file__).parent, Path("out/bench_gpu")
LIMITS = {"correct": 85, "kernels": 80, "training": 175, "decoding": 65, "distributed": 25, "loss": 110}      # seconds
TOY = "--d_model=32 --d_ff=64 --n_layers=1 --n_heads=2 --context_length=32 --batch_tokens=256 --micro_batch_size=8"


@dataclass
class GpuConfig:
    """What `python bench.py gpu` can be told."""
    out: str = "results/gpu"           # folder of the tables and pictures
    only: str = "all"                  # one stage: correct | kernels | training | decoding | distributed | loss
    device: str | None = None          # cuda, cpu; none = the best there is

    def __post_init__(self):
        if self.only not in ("all", *LIMITS):
            raise ValueError(f"only={self.only!r} must be all, {', '.join(LIMITS)}")


def library(toy: bool) -> str:
    """A data folder of the text that every machine has, Python's own library."""
    folder = RUNS / ("toy" if toy else "library")
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pages = [path.read_text(encoding="utf-8", errors="replace") for path in Path(os.__file__).parent.glob("*.py")]
        text = "<|endoftext|>".join(pages)[:60_000 if toy else None]
        folder.with_suffix(".txt").write_text(text, encoding="utf-8", newline="")
        data.prepare(folder.with_suffix(".txt"), vocab_size=300 if toy else 2048, data_dir=folder)
    return str(folder)


def commands(stage: str, limit: float, out: Path, device: str) -> dict:
    """{name: command} of a stage."""
    gpu, on_it = device.startswith("cuda"), f"--device={device}"
    if stage == "correct":
        if not gpu:
            return {"flash": "python bench.py kernels --page=flash"}
        jobs = {dtype: f"python bench.py kernels --long=true --dtypes={dtype}" for dtype in bench_kernels.TOLERANCE}
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if os.path.exists(sanitizer):
            jobs["memcheck"] = f"{sanitizer} --tool=memcheck --error-exitcode=9 python bench.py kernels"
        return jobs | {"tests": "python test_all.py kernels flash -x"}
    if stage == "kernels":
        return {"times": f"python bench.py kernels --times=true --out={out}"}
    if stage == "training":
        shape = TOY
        if gpu:
            shape = "--d_model=768 --n_layers=12 --n_heads=12 --context_length=1024 --batch_tokens=8192"
        step = f"{shape} --attention_backend=triton --dtype=bfloat16 {on_it} --out_dir={out}"
        curve = (f"python train.py --data_dir={library(not gpu)} {shape} --max_steps={200 if gpu else 3} {on_it} "
                 "--compile=false --max_minutes=none --eval_every=0 --num_samples=0 --log_every=1 --overwrite=true")
        sizes = "--shapes=32x1 --context_length=16 --vocab_size=60 --batch_size=1"
        if gpu:
            sizes = "--shapes=gpt2 --context_length=1024 --vocab_size=50304 --batch_size=64,32,16,8,4 --variants=all"
        return {"profile": f"python bench.py profile {step}", "memory": f"python bench.py memory {step}",
                **{name: f"{curve} --attention_backend={name} --out_dir={RUNS}/{name}" for name in ("sdpa", "triton")},
                "curves": f"python train.py plot {RUNS}/sdpa {RUNS}/triton --out_dir={out}",
                "rates": f"python bench.py sizes {sizes} --warmup=2 --steps=5 {on_it}"}
    if stage == "decoding":
        flags = "--batch=8,64" if gpu else "--batch=2 --prompt_tokens=5 --new_tokens=4"
        return {shape: f"python bench.py decode {shape} {flags} --dtype=bfloat16 --graph=true --reference=true {on_it}"
                for shape in (("llama-1.5b", "gpt2") if gpu else ("toy",))}
    if stage == "distributed":
        return {"parallel": "python -m torch.distributed.run --standalone --nproc_per_node=1 bench.py parallel "
                            "--d_model=64 --n_layers=2 --vocab_size=256 --batch_size=4 --steps=5 "
                            f"--max_mb={1024 if gpu else 1} --out_dir={out}"}
    # 15 s of each half of the time are for the start and the evaluation, which max_minutes does not count.
    minutes = min(2.0, (limit / 2 - 15) / 60)
    flags = f"--max_minutes={minutes:.2f}" if gpu else f"{TOY} --max_minutes=none --max_steps=3"
    return {name: f"python train.py config_{name}.py --data_dir={library(not gpu)} --out_dir={RUNS}/{name} {on_it} "
                  f"--overwrite=true --eval_every=0 --num_samples=0 {flags}" for name in ("shakespeare", "tinystories")}


def run_process(command: list[str], limit: float, path: Path, environment: dict) -> str:
    """"done" or what went wrong with a process that writes to a file, ended with its group after `limit` seconds."""
    with open(path, "w", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            status = process.wait(limit)
            return "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {limit:.0f} s"
        finally:
            if hasattr(os, "killpg"):            # all that it has started: compilers, tests
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def run_stage(name: str, jobs: dict, limit: float, out: Path, environment: dict) -> list[str]:
    """Run a stage's commands; returns a line for each: how it ended, after how long."""
    end = time.monotonic() + limit

    def job(label: str) -> str:
        began = time.monotonic()
        command = [sys.executable if word == "python" else str(HERE / word) if word.endswith(".py") else word
                   for word in jobs[label].split()]
        how = run_process(command, max(1.0, end - began), out / f"{name}.{label}.txt", environment)
        line = f"{name:<12} {label:<12} {how}, {time.monotonic() - began:.1f} s"
        print(line, flush=True)
        return line
    with ThreadPoolExecutor(len(jobs) if name == "correct" else 1) as pool:
        return list(pool.map(job, jobs))


def gpu(argv: list[str]) -> None:
    """Measure everything on this GPU in nine minutes: tables and pictures in OUT."""
    config = command_line(GpuConfig, argv, "usage: python bench.py gpu [--key=value …]")[2]
    device, out, environment = pick_device(config.device), Path(config.out), dict(os.environ)
    out.mkdir(parents=True, exist_ok=True)
    environment.pop("TRITON_INTERPRET", None)
    lines = ["CPU, toy sizes: this proves the command, not the figures"]
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    head, began = runs.header(), time.monotonic()
    lines.append(f"{on(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python "
                 f"{head['python']}, commit {(head['commit'] or 'unknown')[:12]}")
    for name in LIMITS if config.only == "all" else [config.only]:
        limit = LIMITS[name]
        if name == "loss":                       # the last one: its limit, or what the others have left of nine minutes
            limit = max(limit, sum(LIMITS.values()) - (time.monotonic() - began))
        lines += run_stage(name, commands(name, limit, out, device), limit, out, environment)
        (out / "stages.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        failed = sum(" done, " not in line for line in lines if line.split()[0] in LIMITS)
    if failed:
        sys.exit(f"{out / 'stages.txt'}: {failed} commands failed or were ended")
