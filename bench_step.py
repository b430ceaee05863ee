"""One training step: how long its parts take, and its memory; and the clock of all verbs.

    python bench.py profile config_x.py [--key=value]     ms by phase and by region, the largest kernels, a trace
    python bench.py memory config_x.py [--key=value]      MB by kind, the peaks, a picture in OUT_DIR

For the memory every tensor that torch's operations make is watched from its birth to its end and counted by kind:
weights, gradients, moments, activations by region, temporaries. On CUDA torch's own snapshot file is written too.
"""
import contextlib
import functools
import os
import statistics
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import train
from accounting import flops_per_token, table
from checkpoint import read_meta
from configurator import command_line
from convert import their_config
from machine import DTYPES, peak_flops, pick_device, pick_dtype
from model import Transformer
from optim import clip_grad_norm

# --- what all verbs use ---

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


def step_ms(parts: dict, device="cpu", region=contextlib.nullcontext) -> list[float]:
    """ms of each phase of one step."""
    times = []
    for phase, run in parts.items():
        with region(phase):
            times.append(1e3 * seconds_of(run, device))
    return times


def made_step(config, device: str, dtype, reference: bool = False) -> tuple:
    """(model, optimizers, {phase: function} of a step on random ids, to be called in this order, its tokens, FLOPs).

    As in train.py; reference: transformers' GPT-2 of this shape and torch's AdamW instead.
    """
    meta = read_meta(config.data_dir) if os.path.isdir(config.data_dir) else {}
    shape = config.model_config(config.vocab_size or meta.get("vocab_size") or 10_000)
    rows = config.micro_batch_size or config.batch_tokens // config.context_length
    ids = torch.randint(shape.vocab_size, (rows, config.context_length), device=device)
    if reference:
        from transformers import AutoConfig, AutoModelForCausalLM
        settings = their_config(shape, torch.float32) | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="sdpa")
        optimizers = [torch.optim.AdamW(model.to(device).parameters(), lr=config.lr, fused=True)]
    else:
        model = Transformer(shape).to(device)
        optimizers = train.make_optimizers(model, config)
    if config.activation_checkpointing:
        for block in model.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def loss_of(x, y):
        if not reference:
            return model(x, y)[1]
        return torch.nn.functional.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
    loss_of, losses = torch.compile(loss_of) if config.compile else loss_of, []

    def forward():
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            losses.append(loss_of(ids, ids))

    def step():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {shape.vocab_size:,} ids, {rows} x "
          f"{config.context_length} tokens, {dtype}{', compiled' if config.compile else ''}; {on(device)}")
    parts = {"forward": forward, "backward": lambda: losses.pop().backward(),
             "clip": lambda: clip_grad_norm(list(model.parameters()), config.grad_clip), "optimizer": step}
    flops = flops_per_token(shape, config.context_length, training=True)["total"] * ids.numel()
    return model, optimizers, parts, ids.numel(), flops


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
    model, optimizers, parts, *_ = made_step(config, device, dtype)
    tracker, peaks = MemoryTracker(model), {}
    for run in parts.values():                    # a first step makes the moments
        run()
    moments = [value for one in optimizers for state in one.state.values() for value in state.values()]
    for kind, tensors in (("weights", [*model.parameters(), *model.buffers()]), ("moments", moments)):
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
    """Memory over one training step by kind, its peaks, its largest allocations; OUT_DIR/memory.png."""
    from matplotlib.figure import Figure
    config = command_line(train.TrainConfig, words, "python bench.py memory [config_x.py] [--key=value ...]")[2]
    device, folder, timeline = pick_device(config.device), Path(config.out_dir), {}
    if device.startswith("cuda"):
        torch.cuda.memory._record_memory_history()
    tracker, kinds, peaks = memory_step(config, device, DTYPES[pick_dtype(config.dtype, device)])
    for block in tracker.blocks:
        block["kind"] = kinds.get(id(block), "temporaries")
        line = timeline.setdefault(block["kind"], np.zeros(len(tracker.history) + 1))
        line[block["born"]:block["freed"]] += block["bytes"] / 1e6
    total = sum(timeline.values())
    table("MB of one step, by kind", ["", "most", "at the peak"],
          [[kind, float(line.max()), float(line[total.argmax()])] for kind, line in timeline.items()])
    table("peaks", ["", "MB"], [[phase, peak / 1e6] for phase, peak in peaks.items()])
    made = sorted((block for block in tracker.blocks if block["phase"]), key=lambda block: -block["bytes"])
    table("largest allocations", ["phase", "region", "operation", "kind", "MB"],
          [[block["phase"], block["region"], block["operation"], block["kind"], block["bytes"] / 1e6]
           for block in made[:10]])
    folder.mkdir(parents=True, exist_ok=True)
    axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
    axes.stackplot(range(len(total)), list(timeline.values()), labels=list(timeline))
    axes.set(xlabel="operations of one training step", ylabel="MB")
    axes.legend(loc="upper left", fontsize="x-small")
    axes.figure.savefig(folder / "memory.png", dpi=120)
    if device.startswith("cuda"):
        torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))     # for pytorch.org/memory_viz
        torch.cuda.memory._record_memory_history(enabled=None)
        print(f"allocator's peak {torch.cuda.max_memory_allocated() / 1e6:,.1f} MB")
    print(f"\npicture, and on a GPU torch's snapshot: {folder}")


# --- where the time goes ---

LABELS = ("attention", "feed-forward", "norm", "loss", "clip", "optimizer")


@dataclass
class ProfileConfig(train.TrainConfig):
    """What `python bench.py profile` can be told: every setting of train.py."""
    reference: bool = False                  # also transformers' GPT-2 of this shape, in turns


def profile(argv: list[str]) -> None:
    """One training step by phase, not compiled also by region with its ten largest kernels and OUT_DIR/trace.json.

    The step is one micro-batch of random tokens. A phase ends when the device has done it; on CUDA tokens/s are of
    whole steps, in which the host may run ahead. Regions are modules, and a compiled model has none. Under a CUDA
    profiler the regions are NVTX ranges, and only a step after the warm-up is captured: nsys profile
    --capture-range=cudaProfilerApi --trace=cuda,nvtx python bench.py profile config_x.py --compile=false
    """
    config = command_line(ProfileConfig, argv, "python bench.py profile config_x.py [--key=value ...]")[2]
    device = pick_device(config.device)
    name = pick_dtype(config.dtype, device)
    if config.compile is None:
        config.compile = device.startswith("cuda")
    attached = device.startswith("cuda") and any(key in os.environ for key in (
        "NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH"))
    region = torch.cuda.nvtx.range if attached else torch.profiler.record_function
    made = {"ours": made_step(config, device, DTYPES[name])}
    if config.reference:
        made["transformers"] = made_step(config, device, DTYPES[name], True)
    turns = {who: functools.partial(step_ms, one[2], device, region) for who, one in made.items()}
    whole = {who: functools.partial(seconds_of, functools.partial(step_ms, one[2]), device, 10)
             for who, one in made.items() if device.startswith("cuda")}
    rates = {}
    for who, (first, *times) in alternate(turns, 14).items():
        columns = list(zip(*times[3:]))                    # the first ones warm up
        print(f"{who:14}{'mean ms':>9}{'std ms':>8}   over 10 steps after 4; the first one {sum(first):,.0f} ms")
        for phase, column in zip(made[who][2], columns):
            print(f"{phase:14}{statistics.mean(column):9.2f}{statistics.stdev(column):8.2f}")
        rates[who] = [sum(map(statistics.mean, columns)) / 1e3]
    for who, seconds in (rates | alternate(whole, 2)).items():
        seconds, peak, (*_, tokens, flops) = statistics.mean(seconds), peak_flops(device, name), made[who]
        print(f"{who}: {tokens / seconds:,.0f} tokens/s" + (f", MFU {flops / seconds / peak:.1%}" if peak else ""))
    model, _, parts, *_ = made["ours"]
    if config.reference or config.compile:
        return
    for path, module in model.named_modules():
        if REGIONS.get(path.split(".")[-1]) in LABELS:
            module.forward = region(REGIONS[path.split(".")[-1]])(module.forward)
    model.head_loss = region("loss")(model.head_loss)      # the norm in it remains a norm
    if attached:
        torch.cuda.profiler.start()
        step_ms(parts, device, region)
        torch.cuda.profiler.stop()
        return
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        wall_ms = sum(step_ms(parts, device, region))
    report(profiler, wall_ms, on_gpu)
    trace = Path(config.out_dir) / "trace.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    print(f"trace: {trace}, to open in https://ui.perfetto.dev")


def report(profiler, wall_ms: float, on_gpu: bool) -> None:
    """Print the time of one profiled step by region, and its ten largest kernels (operators on the CPU).

    A forward operation belongs to the module that it runs in, a backward one to that of the forward operation which it
    differentiates: autograd's sequence numbers tell.
    """
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
    largest = sorted(averages, key=lambda e: -getattr(e, time_of))[:10]
    table(f"the ten largest {'kernels' if on_gpu else 'operators'}", ["", "calls", "ms"],
          [[event.key[:90], event.count, getattr(event, time_of) / 1e3] for event in largest])
