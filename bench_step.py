"""One training step: where its time goes and its memory, over sizes and with checkpoints; and the clock of all verbs.

    python bench.py profile config_x.py [--key=value]     ms by phase and by region, the largest kernels, a trace
    python bench.py memory config_x.py [--key=value]      MB by kind, the peaks, a picture in out/memory/
    python bench.py sizes                                 ms by phase over sizes, in float32, bfloat16, compiled
    python bench.py checkpoints                           which nesting of activation checkpoints needs least memory

For the memory every tensor that torch's operations make is watched from its birth to its end and counted by kind:
weights, gradients, moments, activations by region, temporaries. On CUDA torch's own snapshot file is written too.
"""
import contextlib
import functools
import gc
import os
import shutil
import statistics
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import train
from accounting import flops_per_token, preset, table
from checkpoint import read_meta
from configurator import command_line, fail
from convert import their_config
from machine import DTYPES, peak_flops, pick_device, pick_dtype
from model import Transformer
from optim import AdamW, clip_grad_norm

# --- the clock ---


def seconds_of(run, device="cpu", n: int = 1) -> float:
    """Mean seconds of one run() of n in a row; the card has done all it was asked for when the clock is read."""
    def clock() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    began = clock()
    for _ in range(n):
        run()
    return (clock() - began) / n


def alternate(runs: dict, rounds: int) -> dict:
    """{name: what each of the calls gave}; in turn, so that what slows the machine down slows all of them."""
    results = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return results


def on(device: str) -> str:
    """One line that says what was measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def can_compile(device: str) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler on the CPU, Triton on a GPU."""
    return device.startswith("cuda") or shutil.which("g++") is not None or shutil.which("clang++") is not None


def step_parts(model, optimizers, batch, dtype, grad_clip: float = 1.0) -> dict:
    """{phase: function} of a training step, to be called in this order; backward gives the loss."""
    losses, device = [], batch[0].device.type

    def forward():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses.append(model(*batch)[1])

    def backward():
        loss = losses.pop()
        loss.backward()
        return loss.detach()

    def step():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"forward": forward, "backward": backward,
            "clip": lambda: clip_grad_norm(list(model.parameters()), grad_clip), "optimizer": step}


def step_ms(parts: dict, device, region=contextlib.nullcontext) -> list[float]:
    """ms of each phase of one step."""
    times = []
    for phase, run in parts.items():
        with region(phase):
            times.append(1e3 * seconds_of(run, device))
    return times


# --- memory ---

REGIONS = {"attn": "attention", "ffn": "feed-forward", "ln1": "norm", "ln2": "norm", "ln_final": "norm",
           "token_embeddings": "embedding", "lm_head": "head"}


class MemoryTracker(TorchDispatchMode):
    """Every storage that torch's operations make while this is active; the caller says which `phase` it is.

    blocks: dicts of bytes, born, freed (None: not yet), phase, region, operation; times count operations. storages:
    the blocks that live. history: their bytes after each operation. Scratch memory inside an operation is not seen.
    """

    def __init__(self, model=None):
        super().__init__()
        self.phase, self.regions, self.live, self.blocks, self.storages, self.history = "", [""], 0, [], {}, [0]
        # Own hooks: torch's ModuleTracker keeps what activation checkpoints compute again alive to the end of backward.
        for name, module in () if model is None else model.named_modules():
            region = REGIONS.get(name.rpartition(".")[2])
            if region:
                module.register_forward_pre_hook(lambda *_, region=region: self.regions.append(region))
                module.register_forward_hook(self.leave, always_call=True)

    def leave(self, *_) -> None:
        """A part of the model ends."""
        self.regions.pop()

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        results = operation(*arguments, **(more or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor, str(operation))
        self.history.append(self.live)
        return results

    def watch(self, tensor, operation: str) -> None:
        """Count the storage of a tensor until it is freed, unless it is empty or known (the tensor is a view)."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages and storage.nbytes():
            block = {"bytes": storage.nbytes(), "born": len(self.history), "freed": None, "phase": self.phase,
                     "region": self.regions[-1], "operation": operation}
            self.storages[storage._cdata] = block
            self.blocks.append(block)
            self.live += block["bytes"]
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key: int) -> None:
        """A storage is gone."""
        block = self.storages.pop(key)
        block["freed"] = len(self.history)
        self.live -= block["bytes"]


def memory_step(config, device: str, dtype):
    """(tracker, {id of a block: its kind}, {phase: bytes at its peak}) of one training step on random ids."""
    model = Transformer(config.model_config(config.vocab_size or 10_000)).to(device)
    if config.activation_checkpointing:
        for block in model.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    optimizers, tracker, peaks = train.make_optimizers(model, config), MemoryTracker(model), {}
    rows = config.micro_batch_size or config.batch_tokens // config.context_length
    ids = torch.randint(model.config.vocab_size, (rows, config.context_length), device=device)
    parts = step_parts(model, optimizers, (ids, ids), dtype, config.grad_clip)
    for run in parts.values():                    # a first step makes the moments
        run()
    moments = [value for one in optimizers for state in one.state.values() for value in state.values()]
    for kind, tensors in (("weights", [*model.parameters(), *model.buffers()]), ("moments", moments), ("batch", [ids])):
        for tensor in filter(torch.is_tensor, tensors):
            tracker.watch(tensor, kind)
    kinds = {id(block): block["operation"] for block in tracker.blocks}
    with tracker:
        for tracker.phase, run in parts.items():
            start = len(tracker.history)
            run()
            peaks[tracker.phase] = max(tracker.history[start:])
            if tracker.phase == "forward":
                for block in tracker.storages.values():
                    kinds.setdefault(id(block), f"activations: {block['region'] or 'loss, residual'}")
            if tracker.phase == "backward":
                gradients = {p.grad.untyped_storage()._cdata for p in model.parameters()}
                kinds |= {id(block): "gradients" for key, block in tracker.storages.items() if key in gradients}
    return tracker, kinds, peaks


def memory(words: list[str]) -> None:
    """Memory over one training step by kind, its peaks, its largest allocations; writes out/memory/."""
    from matplotlib.figure import Figure
    config = command_line(train.TrainConfig, words, "python bench.py memory [config_x.py] [--key=value ...]")[2]
    device, folder = pick_device(config.device), Path("out/memory")
    on_cuda = device.startswith("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    if on_cuda:
        torch.cuda.memory._record_memory_history()
    tracker, kinds, peaks = memory_step(config, device, DTYPES[pick_dtype(config.dtype, device)])
    if on_cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))     # for pytorch.org/memory_viz
        torch.cuda.memory._record_memory_history(enabled=None)
        print(f"allocator's peak {torch.cuda.max_memory_allocated() / 1e6:,.1f} MB; {folder / 'snapshot.pickle'}")
    timeline = {kind: np.zeros(len(tracker.history) + 1) for kind in [*dict.fromkeys(kinds.values()), "temporaries"]}
    for block in tracker.blocks:
        line = timeline[kinds.get(id(block), "temporaries")]
        line[block["born"]:block["freed"]] += block["bytes"] / 1e6
    highest = np.argmax(sum(timeline.values()))
    table("MB of one step, by kind", ["", "most", "at the peak"],
          [[kind, float(line.max()), float(line[highest])] for kind, line in timeline.items()])
    table("peaks", ["", "MB"], [[phase, peak / 1e6] for phase, peak in peaks.items()])
    made = sorted((block for block in tracker.blocks if block["phase"]), key=lambda block: -block["bytes"])
    table("largest allocations", ["phase", "region", "operation", "kind", "MB"],
          [[block["phase"], block["region"], block["operation"], kinds.get(id(block), "temporaries"),
            block["bytes"] / 1e6] for block in made[:10]])
    axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
    axes.stackplot(range(len(tracker.history) + 1), list(timeline.values()), labels=list(timeline))
    axes.set(xlabel="operations of one training step", ylabel="MB", title="one training step, memory by kind")
    axes.legend(loc="upper left", fontsize="x-small")
    axes.figure.savefig(folder / "memory.png", dpi=120)
    print(f"\n{folder / 'memory.png'}")


# --- activation checkpoints ---

def checkpoints(words: list[str]) -> None:
    """Peak of activations and time of a step with a checkpoint every 1, 2, 4, … blocks, and nested two deep."""
    device, layers = pick_device(None), 16
    shape = preset("small", vocab_size=1000, context_length=256, d_model=256, n_layers=layers, n_heads=4, d_ff=None)
    ids, positions = torch.randint(1000, (4, 256), device=device), torch.arange(256, device=device)
    print(f"{on(device)}; {layers} blocks of width 256, 4 x 256 tokens, float32\n{'':<34}{'peak MB':>9}{'step ms':>9}")

    def run_blocks(blocks, x, nesting: tuple):
        """Blocks one after another, in segments of nesting[0] blocks that are computed again, themselves divided."""
        if not nesting:
            for block in blocks:
                x = block(x, positions)
            return x
        for start in range(0, len(blocks), nesting[0]):
            segment = blocks[start:start + nesting[0]]
            x = checkpoint(run_blocks, segment, x, nesting[1:], use_reentrant=False)
        return x

    for name, nesting in {"none": (), **{f"every {n}": (n,) for n in (1, 2, 4, 8)}, "every 4, nested every 1": (4, 1),
                          "every 8, nested every 2": (8, 2)}.items():
        torch.manual_seed(0)
        model, tracker = Transformer(shape).to(device), MemoryTracker()

        def step():
            x = run_blocks(list(model.layers), model.token_embeddings(ids), nesting)
            x.float().pow(2).mean().backward()
        step()
        seconds = min(seconds_of(step, device) for _ in range(4))
        for p in model.parameters():                     # what is there before the step does not count
            tracker.watch(p, "weights")
            if p.grad is not None:
                tracker.watch(p.grad, "gradients")
        before = tracker.live
        with tracker:
            step()
        print(f"{name:<34}{(max(tracker.history) - before) / 1e6:>9.1f}{1e3 * seconds:>9.0f}", flush=True)


# --- where the time goes ---

LABELS = ("attention", "feed-forward", "norm", "loss", "clip", "optimizer")


def profile(argv: list[str]) -> None:
    """One training step by phase and by region, its ten largest kernels; writes OUT_DIR/trace.json.

    Random tokens stand for the data. The step is one micro-batch, not compiled: the regions are modules, and a compiled
    model has none. A forward operation belongs to the module that it runs in, a backward one to that of the forward
    operation which it differentiates: autograd's sequence numbers tell. Under a CUDA profiler the same regions are NVTX
    ranges, and only steps after the warm-up are captured:
    nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx python bench.py profile config_x.py
    """
    _, _, config, _ = command_line(train.TrainConfig, argv, "python bench.py profile config_x.py [--key=value ...]")
    device = pick_device(config.device)
    dtype = DTYPES[pick_dtype(config.dtype, device)]
    meta = read_meta(config.data_dir) if os.path.isdir(config.data_dir) else {}
    vocab_size = config.vocab_size or meta.get("vocab_size") or 50304
    model = Transformer(config.model_config(vocab_size)).to(device)
    size = (config.micro_batch_size or config.batch_tokens // config.context_length, config.context_length)
    batch = torch.randint(vocab_size, size, device=device), torch.randint(vocab_size, size, device=device)
    attached = device.startswith("cuda") and any(name in os.environ for name in (
        "NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH"))
    region = torch.cuda.nvtx.range if attached else torch.profiler.record_function
    parts = step_parts(model, train.make_optimizers(model, config), batch, dtype, config.grad_clip)
    times = [step_ms(parts, device, region) for _ in range(13)][3:]                # the first three warm up
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocab_size:,} ids, {size[0]} x {size[1]} "
          f"tokens, {dtype}, {device}\n{'':14}{'mean ms':>9}{'std ms':>8}   over 10 steps after 3")
    for name, column in zip(parts, zip(*times)):
        print(f"{name:14}{statistics.mean(column):9.2f}{statistics.stdev(column):8.2f}")
    for path, module in model.named_modules():
        if REGIONS.get(path.split(".")[-1]) in LABELS:
            module.forward = region(REGIONS[path.split(".")[-1]])(module.forward)
    model.head_loss = region("loss")(model.head_loss)      # the norm in it remains a norm
    if attached:
        torch.cuda.profiler.start()
        step_ms(parts, device, region)
        torch.cuda.profiler.stop()
        return
    with torch.profiler.profile() as profiler:             # the CPU, and CUDA where there is one
        wall_ms = sum(step_ms(parts, device, region))
    totals = report(profiler, wall_ms, device.startswith("cuda"))
    os.makedirs(config.out_dir, exist_ok=True)
    from matplotlib.figure import Figure
    axes = Figure(figsize=(6, 3), layout="constrained").subplots()
    axes.barh(list(totals), list(totals.values()))
    axes.set_xlabel("ms of one training step")
    axes.figure.savefig(os.path.join(config.out_dir, "step.png"), dpi=110)
    trace = os.path.join(config.out_dir, "trace.json")
    profiler.export_chrome_trace(trace)
    print(f"trace: {trace}, to open in https://ui.perfetto.dev")


def report(profiler, wall_ms: float, on_gpu: bool) -> dict:
    """Print the time of one profiled step by region, and its ten largest kernels (operators on the CPU).

    Returns {region: ms}."""
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    by_sequence, totals = {}, dict.fromkeys((*LABELS, "rest"), 0.0)

    def region_of(event) -> str:
        while event is not None:
            if event.name in LABELS:
                return event.name
            if event.name.startswith("autograd::engine::evaluate_function"):
                return by_sequence.get(event.sequence_nr, "rest")
            event = event.cpu_parent
        return "rest"
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(events, key=lambda e: e.time_range.start):         # forward comes before its backward
        label = region_of(event)
        if event.sequence_nr >= 0 and label != "rest":
            by_sequence.setdefault(event.sequence_nr, label)
        totals[label] += getattr(event, time_of) / 1e3
    totals["idle"] = max(0.0, wall_ms - sum(totals.values()))
    print(f"\none step under the profiler: {wall_ms:.1f} ms, forward and backward together")
    for name, ms in totals.items():
        print(f"{name:14}{ms:9.2f} ms {ms / wall_ms:6.1%}")
    averages = [e for e in profiler.key_averages() if (e.device_type == torch.autograd.DeviceType.CUDA) == on_gpu
                and e.key not in (*LABELS, "forward", "backward")]
    print(f"\nthe ten largest {'kernels' if on_gpu else 'operators'}")
    for event in sorted(averages, key=lambda e: -getattr(e, time_of))[:10]:
        print(f"{getattr(event, time_of) / 1e3:9.2f} ms {event.count:5} x  {event.key[:90]}")
    return totals


# --- a step over sizes and switches ---

VARIANTS = {            # switches of the model; the name says the rest
    "float32": {}, "bfloat16": {}, "bfloat16 compiled": {}, "triton compiled": dict(attention_backend="triton"),
    "transformers compiled": {}, "triton": dict(attention_backend="triton"), "fused loss": dict(fused_loss=True),
    "triton compiled, fused loss": dict(attention_backend="triton", fused_loss=True)}


@dataclass
class SizesConfig:
    """What `python bench.py sizes` can be told."""
    shapes: str | None = None                 # d_model x n_layers with commas between, or presets; none = by device
    variants: str | None = None               # all: also Triton's attention, the fused loss, transformers' GPT-2
    context_length: int = 256                 # tokens a sequence
    batch_size: str = "4"                     # sequences; with commas between: the first that fits
    vocab_size: int = 10_000                  # ids
    warmup: int = 5                           # steps before the clock starts
    steps: int = 10                           # timed steps
    device: str | None = None                 # cpu, cuda, mps; none = the best there is


class Theirs(torch.nn.Module):
    """transformers' GPT-2 with random weights, called as ours is."""

    def __init__(self, config):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM
        settings = their_config(config, torch.float32) | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="sdpa")

    def forward(self, x, y):
        """(None, the loss)."""
        logits = self.model(input_ids=x, use_cache=False).logits
        return None, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def sizes(words: list[str]) -> None:
    """ms of forward, backward and optimizer step, mean ± deviation, tokens/s, MFU over sizes, dtypes and switches."""
    config = command_line(SizesConfig, words, "usage: python bench.py sizes [--key=value …]")[2]
    device = pick_device(config.device)
    names = config.shapes or ("small,medium,large,xl" if device.startswith("cuda") else "128x4,256x6,512x8")
    if config.variants not in (None, "all"):
        fail(f"variants={config.variants} must be all or none")
    variants = list(VARIANTS) if config.variants else list(VARIANTS)[:3 if can_compile(device) else 2]
    print(f"{on(device)}; context {config.context_length}, vocabulary {config.vocab_size:,}, {config.steps} steps "
          f"after {config.warmup}; first step: without warm-up\n{'model':<12}{'params':>11}{'rows':>5} {'':<28}"
          f"{'forward':>16}{'backward':>16}{'optimizer':>16}{'first step':>12}{'tokens/s':>10}{'MFU':>7}")
    for name in names.split(","):
        changes = dict(vocab_size=config.vocab_size, context_length=config.context_length)
        if name[0].isdecimal():
            d_model, n_layers = map(int, name.split("x"))
            changes |= dict(d_model=d_model, n_layers=n_layers, n_heads=max(1, d_model // 64), d_ff=None)
        shape = preset("small" if name[0].isdecimal() else name, **changes)
        for label in variants:
            for rows in map(int, config.batch_size.split(",")):
                try:
                    print(f"{name:<12}{size_row(shape, label, rows, config, device)}", flush=True)
                    break
                except Exception as error:                   # no memory, no transformers, no Triton
                    print(f"{name:<12}{rows:>16} {label:<28}{str(error).splitlines()[0][:80]}", flush=True)
                if device.startswith("cuda"):
                    gc.collect()
                    torch.cuda.empty_cache()


def size_row(shape, label: str, rows: int, config: SizesConfig, device: str) -> str:
    """One line of `sizes`."""
    torch.manual_seed(0)
    with torch.device(device):                   # drawn there: on a host 1.5e9 weights take half a minute
        model = (Theirs(shape) if "transformers" in label else Transformer(replace(shape, **VARIANTS[label]))).train()
    make = functools.partial(torch.optim.AdamW, fused=device != "cpu") if "transformers" in label else AdamW
    dtype, ids = "float32" if label == "float32" else "bfloat16", torch.randint(
        shape.vocab_size, (rows, shape.context_length), device=device)
    net = torch.compile(model) if "compiled" in label else model
    parts = step_parts(net, [make(model.parameters(), lr=1e-4)], (ids, ids), DTYPES[dtype])
    del parts["clip"]
    first, *times = [step_ms(parts, device) for _ in range(1 + config.warmup + config.steps)]
    columns = list(zip(*times[config.warmup:]))
    rate = 1e3 * ids.numel() / sum(map(statistics.mean, columns))
    flops, peak = flops_per_token(shape, shape.context_length, training=True)["total"], peak_flops(device, dtype)
    cells = [f"{statistics.mean(column):9.1f} ± {statistics.stdev(column):<4.1f}" for column in columns]
    return (f"{sum(p.numel() for p in model.parameters()):>11,}{rows:>5} {label:<28}"
            + "".join(f"{cell:>16}" for cell in cells) + f"{sum(first):>12.1f}{rate:>10,.0f}"
            + (f"{rate * flops / peak:>7.1%}" if peak else ""))
