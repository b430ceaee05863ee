"""Machines: a GPU in one command of a quarter of an hour, and what ranks cost under torchrun.

    python bench.py gpu --out=results/h100                          everything; --only=kernels one stage again
    torchrun --standalone --nproc_per_node=2 bench.py parallel      messages, ways of dividing a model; a timeline

`gpu`: six stages of commands that can also be run alone, each a process with what is left of its stage's time. What a
command says is on the disk at once, OUT/STAGE.NAME.txt: one that fails or is ended keeps what it has, the next begins.
OUT/stages.txt says how each ended. On a CPU all runs at toy sizes, kernels interpreted. Nothing is downloaded.

    correct       errors of all kernels against float64, tests, memcheck: side by side
    kernels       attention and memory-bound kernels beside torch's, as shares of a roof
    training      tokens/s and MFU of GPT-2 beside transformers; the parts of a step, its memory; loss curves
    decoding      tokens/s, share of the bandwidth; CUDA graphs, int8, int4
    distributed   a world of one over NCCL: copies; FSDP, DDP, … train as the plain model does
    loss          bits per byte of two configs, 40 s each
"""
import contextlib
import functools
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import fsdp
import parallel
import runs
import sharded
from bench_kernels import TOLERANCE
from bench_step import on, seconds_of
from configurator import command_line, fail
from machine import pick_device
from model import ModelConfig, Transformer
from optim import AdamW

# --- one GPU ---

RUNS = Path("out/bench_gpu")
LIMITS = {"correct": 100, "kernels": 110, "training": 350, "decoding": 240, "distributed": 30, "loss": 130}    # seconds
GPT2 = "--norm=layer --position=learned --ffn=gelu --bias=true --tie_embeddings=true"
# What a GPU measures, and what shows on a CPU that the command works.
GPU = dict(shape=f"--d_model=768 --n_layers=12 --n_heads=12 --context_length=1024 --batch_tokens=8192 {GPT2}",
           rates={"plain": "--compile=false --micro_batch_size=16", "compiled": "--micro_batch_size=64",
                  "triton": "--micro_batch_size=64 --attention_backend=triton",
                  "fused": "--micro_batch_size=64 --fused_loss=true --reference=true"},
           step="--vocab_size=50304", curve="--max_steps=200 --lr=6e-4", loss="--max_minutes=0.66",
           small="--micro_batch_size=16", owt="--vocab_size=32000",
           models=("llama-1.5b", "gpt2"), decode="--batch=8,64", attention="", pages=None)
TOY = dict(shape=f"--d_model=32 --d_ff=64 --n_layers=1 --n_heads=2 --context_length=32 --batch_tokens=256 {GPT2}",
           rates={"triton": "--attention_backend=triton --reference=true"}, attention="--toy=true", small="",
           owt="--vocab_size=300 --d_model=32 --n_layers=1 --n_heads=2 --micro_batch_size=1", curve="--max_steps=3",
           step="--vocab_size=300", models=("toy",), decode="--batch=2", pages=8)
TOY["loss"] = f"{TOY['shape']} --micro_batch_size=8 --max_minutes=none --max_steps=3"


@dataclass
class GpuConfig:
    """What `python bench.py gpu` can be told."""
    out: str = "results/gpu"           # folder of the tables and pictures
    only: str = "all"                  # one stage: correct | kernels | training | decoding | distributed | loss
    device: str | None = None          # cuda, cpu; none = the best there is


def corpus(n: int | None) -> Path:
    """A data folder: the default corpus if it has been prepared, else Python's own library, n pages or all."""
    if n is None and Path("data/shakespeare/meta.json").exists():
        return Path("data/shakespeare")
    folder = RUNS / f"library_{n or 'all'}"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(Path(os.__file__).parent.glob("*.py"))[:n]
        pages = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        (folder / "text.txt").write_text("<|endoftext|>".join(pages), encoding="utf-8", newline="")
        data.prepare(folder / "text.txt", vocab_size=2048, data_dir=folder)
    return folder


def stages(device: str, out: Path) -> dict:
    """{stage: {name: command}}."""
    gpu, on_it = device.startswith("cuda"), f"--device={device}"
    size = GPU if gpu else TOY
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    correct = {"flash": "python bench.py kernels --page=flash"}
    if gpu:
        correct = {dtype: f"python bench.py kernels --long=true --dtypes={dtype}" for dtype in TOLERANCE}
        correct["tests"] = "python test_all.py kernels flash onerow"
        if os.path.exists(sanitizer):
            correct["memcheck"] = f"{sanitizer} --tool=memcheck --error-exitcode=9 python bench.py kernels"
    train = f"--data_dir={corpus(size['pages'])} {on_it} --eval_every=0 --num_samples=0 --overwrite=1 --out_dir={RUNS}"
    curve = f"{size['shape']} {size['curve']} --compile=false --max_minutes=none --log_every=1"
    step = f"{size['shape']} {size['step']} --dtype=bfloat16 {on_it} --out_dir={out}"
    return {
        "correct": correct,
        "kernels": {"attention": f"python bench.py attention {size['attention']} {on_it}",
                    "others": "python bench.py kernels --times=true"},
        "training": {
            **{name: f"python bench.py profile {step} {flags}" for name, flags in size["rates"].items()},
            "owt": f"python bench.py profile config_owt.py {size['owt']} --dtype=bfloat16 {on_it} --out_dir={out}",
            "memory": f"python bench.py memory {step} {size['small']}",
            **{f"loss_{name}": f"python train.py {curve} --attention_backend={name} {train}/{name}"
               for name in ("sdpa", "triton")},
            "curves": f"python train.py plot {RUNS}/sdpa {RUNS}/triton --out_dir={out}"},
        "decoding": {model: f"python bench.py decode {model} {size['decode']} --dtype=bfloat16 --graph=true "
                            f"--reference=true {on_it}" for model in size["models"]},
        "distributed": {"parallel": "python -m torch.distributed.run --standalone --nproc_per_node=1 bench.py parallel "
                                    f"--toy=true --out_dir={out}"},
        "loss": {name: f"python train.py config_{name}.py {size['loss']} {train}/{name}"
                 for name in ("shakespeare", "tinystories")}}


def run_stage(name: str, jobs: dict, limit: float, out: Path, environment: dict, head: list[str]) -> list[str]:
    """Run a stage's commands, each a process that writes a file below the lines of `head`; returns how each ended."""
    end = time.monotonic() + limit

    def job(label: str) -> str:
        began, here = time.monotonic(), Path(__file__).parent
        command = [sys.executable if word == "python" else str(here / word) if word.endswith(".py") else word
                   for word in jobs[label].split()]
        with open(out / f"{name}.{label}.txt", "w", encoding="utf-8") as file:
            print(*head, f"$ {jobs[label]}", sep="\n", file=file, flush=True)
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                       start_new_session=True)
            try:
                status = process.wait(max(1.0, end - began))
                how = "done" if status == 0 else f"failed with status {status}"
            except subprocess.TimeoutExpired:
                how = f"ended at its limit of {limit:.0f} s"
            with contextlib.suppress(ProcessLookupError, PermissionError):       # all that it has started: compilers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        line = f"{name:<12} {label:<12} {how}, {time.monotonic() - began:.1f} s"
        print(line, flush=True)
        return line
    with ThreadPoolExecutor(len(jobs) if name == "correct" else 1) as pool:
        return list(pool.map(job, jobs))


def gpu(argv: list[str]) -> None:
    """Measure everything on this GPU: tables and pictures in OUT."""
    config = command_line(GpuConfig, argv, "usage: python bench.py gpu [--key=value …]")[2]
    if config.only not in ("all", *LIMITS):
        fail(f"only={config.only!r} must be all, {', '.join(LIMITS)}")
    device, out, environment = pick_device(config.device), Path(config.out), dict(os.environ)
    out.mkdir(parents=True, exist_ok=True)
    environment.pop("TRITON_INTERPRET", None)
    lines, head = [], runs.header()
    if not device.startswith("cuda"):
        lines = ["CPU, toy sizes: this proves the command, not the figures"]
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    lines.append(f"{on(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python "
                 f"{head['python']}, commit {(head['commit'] or 'unknown')[:12]}")
    ended = []
    for name, jobs in stages(device, out).items():
        if config.only in ("all", name):
            ended += run_stage(name, jobs, LIMITS[name], out, environment, lines)
            (out / "stages.txt").write_text("\n".join(lines + ended) + "\n", encoding="utf-8")
    pictures(out)
    failed = sum(" done, " not in line for line in ended)
    if failed:
        sys.exit(f"{out / 'stages.txt'}: {failed} commands failed or were ended")


def pictures(out: Path) -> None:
    """Draw OUT/pictures.png from the tables there: roofline, attention over its length, phases of a training step."""
    from matplotlib.figure import Figure
    texts = {path.stem: path.read_text(encoding="utf-8").replace(",", "") for path in sorted(out.glob("*.*.txt"))}
    roofline, attention, training = Figure(figsize=(19, 6), layout="constrained").subplots(1, 3)
    for copy, product in re.findall(r"copy (\S+) GB/s product in bfloat16 (\S+)", texts.get("kernels.others", "")):
        x = [10 ** (i / 10) for i in range(-10, 51)]
        roofline.loglog(x, [min(float(copy) * one / 1000, float(product)) for one in x], "k", label="measured roof")
    points = {}                                            # by axes and label; a line of bench_kernels.row is a point
    for name, *cells, unit in re.findall(r"^(.+?) +(\S+) +\S+ +(\S+)(?: +\S+){6}  (GB|TFLOP)/s$",
                                         "\n".join(texts.values()), re.M):
        x, rate = map(float, cells)
        y = rate * x / 1000 if unit == "GB" else rate
        label, T, D = re.fullmatch(r"(.+?)(?: (\d+) x (\d+))?", name).groups()
        if T:
            points.setdefault((attention, f"{label}, width {D}"), []).append((int(T), y))
        else:
            kernel, label = name.split(" ", 1)
            roofline.annotate(kernel if label == "ours" else "", (x, y), fontsize=7)
        points.setdefault((roofline, label), []).append((x, y))
    for (axes, label), line in points.items():
        axes.loglog(*zip(*line), "o-" if axes is attention else "o", label=label)
        axes.legend(fontsize=7)
    for name in GPU["rates"]:
        phases = re.findall(r"^(?:forward|backward|clip|optimizer) +(\S+)", texts.get(f"training.{name}", ""), re.M)
        for i, ms in enumerate(map(float, phases)):        # four of ours, then perhaps four of transformers'
            before = phases[i // 4 * 4:i]
            training.barh("transformers" if i > 3 else name, ms, left=sum(map(float, before)), color=f"C{i % 4}")
    roofline.set(xlabel="FLOPs a byte, forward", ylabel="TFLOP/s", title="roofline, bfloat16")
    attention.set(xlabel="tokens", ylabel="TFLOP/s", title="causal attention, forward")
    training.set(xlabel="ms: forward, backward, clip, optimizer", title="a training step of GPT-2")
    roofline.figure.savefig(out / "pictures.png", dpi=110)


# --- many ranks ---

@dataclass
class ParallelConfig:
    """What `torchrun … bench.py parallel` can be told."""
    toy: bool = False                # a tiny model: do all strategies train alike?
    out_dir: str = "out/parallel"    # where table and timeline go


def message_times(max_mb: int, device) -> list[str]:
    """Lines: time and bandwidth of each collective by message size, the best of six; on a GPU those of copies. An
    all-reduce is a reduce-scatter and an all-gather: two passes, in each (size - 1) / size of the message is sent."""
    size, lines, copies = parallel.world()[1], ["collective         MB        ms   GB/s sent per rank"], []
    for mb in [4 ** i for i in range(10) if 4 ** i <= max_mb]:
        n = int(mb * 1e6) // 4 // size
        whole, part = torch.ones(n * size, device=device), torch.ones(n, device=device)
        for kind, passes, call in (("all-reduce", 2, lambda: parallel.reduce(whole)),
                                   ("all-gather", 1, lambda: parallel.wait(parallel.all_gather(whole, part))),
                                   ("reduce-scatter", 1, lambda: parallel.reduce_scatter(whole)())):
            seconds = []
            for _ in range(6):
                torch.distributed.barrier()
                began = time.perf_counter()
                call()
                parallel.reduce(torch.ones(1, device=device)).item()               # also the GPU has done it then
                seconds.append(time.perf_counter() - began)
            sent = passes * (size - 1) / size * whole.nbytes
            lines.append(f"{kind:<14}{mb:>7}{1000 * min(seconds):>10.2f}{sent / min(seconds) / 1e9:>8.2f}")
        if device.type == "cuda":
            other, pageable, pinned = whole.clone(), whole.cpu(), whole.cpu().pin_memory()
            for name, target, source in (("on the device", other, whole), ("pinned to it", whole, pinned),
                                         ("pageable to it", whole, pageable), ("from it to pinned", pinned, whole)):
                target.copy_(source)
                seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device, 5)
                copies.append(f"copy {name:<20}{mb:>5} MB{whole.nbytes / seconds / 1e9:>10.1f} GB/s")
    return lines + copies


def strategies(shape, device) -> dict:
    """name -> (wrapped model, optimizer)."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def torch_fsdp(model):
        for module in [*model.layers, model]:
            fully_shard(module)
        return model
    wraps = {"one rank alone": lambda model: model, "NaiveDDP": parallel.NaiveDDP,
             "DDP bucket_mb=0": lambda model: parallel.DDP(model, 0),
             "DDP bucket_mb=inf": lambda model: parallel.DDP(model, math.inf), "DDP bucket_mb=8": parallel.DDP,
             "torch DDP": DistributedDataParallel, "DDP + ZeRO-1": parallel.DDP, "FSDP": sharded.FSDP,
             "torch fully_shard": torch_fsdp, "tensor parallel": sharded.tensor_parallel}
    for schedule, n in (("gpipe", 2), ("1f1b", 2), ("gpipe", 4), ("1f1b", 4)):
        wraps[f"{schedule} m={n}"] = functools.partial(sharded.Pipeline, n_micro_batches=n, schedule=schedule)
    makes = {"DDP + ZeRO-1": lambda params: parallel.ShardedOptimizer(params, AdamW),
             "torch fully_shard": torch.optim.AdamW}
    even, made = replace(shape, vocab_size=256, n_layers=2 * parallel.world()[1]), {}      # a large head: the last's
    for name, wrap in wraps.items():
        torch.manual_seed(0)
        wrapper = wrap(Transformer(even if " m=" in name else shape).to(device))
        made[name] = wrapper, makes.get(name, AdamW)(wrapper.parameters())
    return made


def train_step(wrapper, optimizer, x, y) -> float:
    """A training step; returns its loss."""
    if isinstance(wrapper, sharded.Pipeline):
        loss = wrapper.step(x, y)
    else:
        loss = wrapper(x, y)[1]
        loss.backward()
        if hasattr(wrapper, "finish_gradient_synchronization"):                         # torch's finish in backward
            wrapper.finish_gradient_synchronization()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def strategy_times(shape, sequences: int, steps: int, device, trace: Path | None) -> list[str]:
    """Lines of a table; the strategies take turns, so that all see the same machine. trace: a file for a timeline."""
    made, size, waits, wait = strategies(shape, device), parallel.world()[1], [], parallel.wait
    parallel.wait = fsdp.wait = sharded.wait = lambda work: waits.append(seconds_of(lambda: wait(work)))
    # The same rows on every rank, so all should have the same loss; tensor parallel and pipelines do them all together.
    ids = torch.randint(256, (sequences, 129), generator=torch.Generator().manual_seed(0)).to(device)
    seconds, waited, losses = {name: [] for name in made}, {}, {}
    # The first turn makes buffers and moments, one after the timed ones is recorded.
    for turn in range(steps + 1 + bool(trace)):
        last = turn == steps + 1
        with torch.profiler.profile() if last else contextlib.nullcontext() as profiler:
            for name in made if turn % 2 else reversed(made):
                batch = ids.repeat(size, 1) if name == "tensor parallel" or " m=" in name else ids
                torch.distributed.barrier()
                waits.clear()
                began = time.perf_counter()
                with torch.profiler.record_function(name):
                    losses[name] = train_step(*made[name], batch[:, :-1], batch[:, 1:])
                if turn and not last:
                    seconds[name].append(time.perf_counter() - began)
                    waited[name] = torch.tensor(sum(waits) / seconds[name][-1], device=device)
    if trace and parallel.world()[0] == 0:
        profiler.export_chrome_trace(str(trace))
    lines = ["", f"{size * sequences} sequences, {sequences} a rank; tensor parallel and pipelines: all on every rank; "
             f"pipelines of\n{2 * size} layers and 256 words; waiting (mean over ranks) and loss: of the last step", "",
             "strategy            median ms   waiting   bubble (p-1)/(m+p-1)   held   MB held       loss"]
    for name, (wrapper, optimizer) in made.items():
        row = ""
        if " m=" in name:
            bubble = (size - 1) / (wrapper.n_micro_batches + size - 1)
            row = f"{100 * bubble:>23.0f} %{wrapper.most_held:>7}"
        states = getattr(optimizer, "local", optimizer).state.values()
        held = [*wrapper.parameters()] * 2 + [t for state in states for t in state.values() if torch.is_tensor(t)]
        held_mb = sum(getattr(t, "_local_tensor", t).nbytes for t in held) / 1e6           # a DTensor shows the whole
        lines.append(f"{name:<20}{1000 * statistics.median(seconds[name]):>9.1f}"
                     f"{100 * parallel.reduce(waited[name]).item() / size:>8.0f} %{row:<33}{held_mb:>9.1f}"
                     f"{losses[name]:>11.5f}")
    return lines


def bench_parallel(argv: list[str]) -> None:
    """Under torchrun: collectives, strategies beside torch's, a pipeline's bubble, a timeline for ui.perfetto.dev."""
    usage = "usage: torchrun --standalone --nproc_per_node=N bench.py parallel [--key=value …]"
    config = command_line(ParallelConfig, argv, usage)[2]
    with parallel.ending():
        device = parallel.start()
        rank, size = parallel.world()
        lines = [f"{size} ranks, {torch.distributed.get_backend()}; {on(device.type)}, {os.cpu_count()} CPU cores", ""]
        # A toy on a card still measures the bandwidth of large copies.
        shape, sequences, steps, max_mb = ModelConfig(8192, 128, 512, 4, n_heads=8), 2, 12, 256
        if config.toy:
            shape, sequences, steps = ModelConfig(256, 128, 64, 2, n_heads=8), 4, 5
            max_mb = 1024 if device.type == "cuda" else 1
        path = Path(config.out_dir) / f"parallel_{device.type}_{size}_ranks.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines += message_times(max_mb, device)
        lines += strategy_times(shape, sequences, steps, device, None if config.toy else path.with_suffix(".json"))
        if rank == 0:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
