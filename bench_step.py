"""One step: of training, where its time goes and its memory; of decoding, made so that a CUDA graph can replay it.

    python bench.py profile config_x.py [--key=value]     ms by phase and by region, the largest kernels, a trace
    python bench.py memory config_x.py [--key=value]      MB by kind, the peaks, a picture in out/memory/

For the memory every tensor that torch's operations make is watched from its birth to its end and counted by kind:
weights, gradients, moments, activations by region, temporaries. On CUDA torch's own snapshot file is written too.

A step of decoding reads every weight for one row of products, so the share of the bandwidth counts. Before it stands
the host: GPT-2 in eager mode launches 400 kernels for a token, 5 µs each, where reading its weights takes 80 µs. A
CUDA graph launches them all at once, if nothing in the step depends on the host. So every position works on the whole
cache, and a mask hides what is not written yet:

    decoding.stream    a step for 130 keys, then for 131, 132 …    the host knows the length, and waits for each token
    Decoder            a step for 192 keys, each time the same     position and tokens are numbers on the card
"""
import copy
import functools
import os
import statistics
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import decoding
import train
from accounting import table
from checkpoint import read_meta
from configurator import command_line
from layers import rope_tables
from machine import DTYPES, pick_device, pick_dtype
from model import ModelConfig, Transformer
from optim import clip_grad_norm

# --- memory ---

REGIONS = {"attn": "attention", "ffn": "feed-forward", "ln1": "norms", "ln2": "norms", "ln_final": "norms",
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
                module.register_forward_pre_hook(functools.partial(self.enter, region))
                module.register_forward_hook(self.leave, always_call=True)

    def enter(self, region: str, *_) -> None:
        """A part of the model begins."""
        self.regions.append(region)

    def leave(self, *_) -> None:
        """It ends."""
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

    def forward():
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
            return model(ids, ids)[1]

    def update():
        clip_grad_norm(list(model.parameters()), config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()

    def call(phase, run):
        tracker.phase, start = phase, len(tracker.history)
        result = run()
        peaks[phase] = max(tracker.history[start:])
        return result

    forward().backward()                          # a first step makes the moments
    update()
    model.zero_grad(set_to_none=True)
    moments = [value for one in optimizers for state in one.state.values() for value in state.values()]
    for kind, tensors in (("weights", [*model.parameters(), *model.buffers()]), ("moments", moments), ("batch", [ids])):
        for tensor in filter(torch.is_tensor, tensors):
            tracker.watch(tensor, kind)
    kinds = {id(block): block["operation"] for block in tracker.blocks}
    with tracker:
        loss = call("forward", forward)
        for block in tracker.storages.values():
            kinds.setdefault(id(block), f"activations: {block['region'] or 'loss, residual'}")
        call("backward", loss.backward)
        gradients = {p.grad.untyped_storage()._cdata for p in model.parameters()}
        kinds |= {id(block): "gradients" for key, block in tracker.storages.items() if key in gradients}
        call("step", update)
    return tracker, kinds, peaks


def memory(words: list[str]) -> None:
    """Memory over one training step by kind, its peaks, its largest allocations; writes out/memory/."""
    config = command_line(train.TrainConfig, words, "python bench.py memory [config_x.py] [--key=value ...]")[2]
    device = pick_device(config.device)
    on_cuda, folder = device.startswith("cuda"), Path("out/memory")
    folder.mkdir(parents=True, exist_ok=True)
    if on_cuda:
        torch.cuda.memory._record_memory_history()
    tracker, kinds, peaks = memory_step(config, device, DTYPES[pick_dtype(config.dtype, device)])
    timeline = {kind: np.zeros(len(tracker.history) + 1) for kind in [*dict.fromkeys(kinds.values()), "temporaries"]}
    for block in tracker.blocks:
        line = timeline[kinds.get(id(block), "temporaries")]
        line[block["born"]:block["freed"]] += block["bytes"] / 1e6
    highest = np.argmax(sum(timeline.values()))
    table("MB of one step, by kind", ["", "most", "at the peak"],
          [[kind, float(line.max()), float(line[highest])] for kind, line in timeline.items()])
    table("peaks", ["", "MB"], [[phase, peak / 1e6] for phase, peak in peaks.items()])
    if on_cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))     # for pytorch.org/memory_viz
        torch.cuda.memory._record_memory_history(enabled=None)
        print(f"\nallocator's peak {torch.cuda.max_memory_allocated() / 1e6:,.1f} MB; {folder / 'snapshot.pickle'}")
    made = sorted((block for block in tracker.blocks if block["phase"]), key=lambda block: -block["bytes"])
    table("largest allocations", ["phase", "region", "operation", "kind", "MB"],
          [[block["phase"], block["region"], block["operation"], kinds.get(id(block), "temporaries"),
            block["bytes"] / 1e6] for block in made[:10]])
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axes.stackplot(range(len(tracker.history) + 1), list(timeline.values()), labels=list(timeline))
    axes.set(xlabel="operations of one training step", ylabel="MB", title="one training step, memory by kind")
    axes.legend(loc="upper left", fontsize="x-small")
    figure.savefig(folder / "memory.png", dpi=120)
    print(f"\n{folder / 'memory.png'}")


# --- profile: where the time of a training step goes ---

LABELS = ("attention", "feed-forward", "norm", "loss", "clip", "optimizer")


def profile(argv: list[str]) -> dict | None:
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
    step = make_step(model, train.make_optimizers(model, config), batch, dtype, config.grad_clip, region)
    times = [step() for _ in range(13)][3:]                # the first three warm up
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocab_size:,} ids, {size[0]} x {size[1]} "
          f"tokens, {dtype}, {device}\n{'':14}{'mean ms':>9}{'std ms':>8}   over 10 steps after 3")
    for name, column in zip(("forward", "backward", "clip", "optimizer"), zip(*times)):
        print(f"{name:14}{statistics.mean(column):9.2f}{statistics.stdev(column):8.2f}")
    kinds = {"attn": "attention", "ffn": "feed-forward", "ln_final": "norm", "ln1": "norm", "ln2": "norm"}
    for path, module in model.named_modules():
        if path.split(".")[-1] in kinds:
            module.forward = region(kinds[path.split(".")[-1]])(module.forward)
    model.head_loss = region("loss")(model.head_loss)      # the norm in it remains a norm
    if attached:
        torch.cuda.profiler.start()
        step()
        torch.cuda.profiler.stop()
        return None
    with torch.profiler.profile() as profiler:             # the CPU, and CUDA where there is one
        wall_ms = sum(step())
    totals = report(profiler, wall_ms, device.startswith("cuda"))
    os.makedirs(config.out_dir, exist_ok=True)
    trace = os.path.join(config.out_dir, "trace.json")
    profiler.export_chrome_trace(trace)
    print(f"trace: {trace}, to open in https://ui.perfetto.dev")
    return totals


def make_step(model, optimizers, batch, dtype, grad_clip, region):
    """A function that takes one training step and gives the ms of its four phases."""
    device = batch[0].device.type

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()                       # else the clock would stop before the GPU does
        return time.perf_counter() * 1e3

    def step() -> list[float]:
        """Forward, backward, clip, optimizer."""
        marks = [clock()]
        with region("forward"), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(*batch)[1]
        marks.append(clock())
        with region("backward"):
            loss.backward()
        marks.append(clock())
        with region("clip"):
            clip_grad_norm(model.parameters(), grad_clip)
        marks.append(clock())
        with region("optimizer"):
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        marks.append(clock())
        return [after - before for before, after in zip(marks, marks[1:])]
    return step


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


# --- a decoding step that a CUDA graph can replay ---

class Layer:
    """One layer's keys and values (B, K, S, D) for all positions there will be, in KVCache's place."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def append(self, layer, k, v, plan, window):
        """Store those of one new token; return all, as the mask hides what is not written."""
        self.k.index_copy_(2, plan.slots, k)
        self.v.index_copy_(2, plan.slots, v)
        return self.k, self.v


class Step:
    """What attention.Plan is for a pass, for one token at a position that only the card knows."""

    def __init__(self, config: ModelConfig, position, keys):
        self.slots = self.positions = position                           # (1,)
        self.fresh, self.balance, self.masks = False, [], {None: (keys <= position)[None]}       # (1, S)
        if config.position == "rope":
            tables = rope_tables(position, config.head_dim, config.rope_theta, config)
            self.cos, self.sin = (table.unsqueeze(-2) for table in tables)


def numbered_zero(block):
    """The same block, tensors shared, as a first layer: torch.compile would make a program for each number."""
    block = copy.copy(block)
    block._modules = dict(block._modules) | {"attn": copy.copy(block.attn)}
    block.layer = block.attn.layer = 0
    return block


def run_block(block, x, layer: Layer, step: Step):
    """One block; compiled once, it serves all layers, which differ in tensors only."""
    return block(x, None, layer, step)


class Decoder:
    """Greedy decoding by steps that are all alike, so that a CUDA graph can replay one: tokens stay on the card.

    For models without windows, experts, latent attention or smear. compile: fuse each block's small operations; with
    one row inductor then also makes products of its own, in which int8 weights are widened as they are read.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], n_new: int, compile: bool = False):
        c, self.model, self.T = model.config, model, len(prompts[0])
        if set(c.windows) != {None} or c.n_experts or c.attention != "standard" or c.smear:
            raise ValueError("Decoder has no sliding_window, n_experts, attention=mla or smear; use decoding.stream")
        device, length = model.token_embeddings.weight.device, min(c.context_length, -(-(self.T + n_new) // 64) * 64)
        logits, memory = decoding.prefill(model, prompts, True, length - self.T)
        self.layers = [Layer(k, v) for k, v in zip(memory.k, memory.v)]
        self.blocks = [numbered_zero(block) for block in model.layers]
        self.on_cuda, self.run_block, self.graph = device.type == "cuda", run_block, None
        if compile:
            torch.compiler.reset()                       # else the ninth program of a function would not be made
            options = {"coordinate_descent_tuning": True} if self.on_cuda and len(prompts) == 1 else None
            self.run_block = torch.compile(run_block, backend="inductor" if self.on_cuda else "aot_eager",
                                           options=options, dynamic=False)
        self.keys, self.position = torch.arange(length, device=device), torch.tensor([self.T], device=device)
        self.tokens = torch.zeros(len(prompts), length + 1, dtype=torch.long, device=device)
        self.tokens[:, :self.T] = torch.tensor(prompts, device=device)
        self.tokens[:, self.T] = logits.argmax(-1)

    def step(self) -> None:
        """The token after the one at `position`, and one position on; no number of it is seen by the host."""
        plan = Step(self.model.config, self.position, self.keys)
        x = self.model.embed(self.tokens.index_select(1, self.position), None, plan)
        for block, layer in zip(self.blocks, self.layers):
            x = self.run_block(block, x, layer, plan)
        self.position += 1
        self.tokens.index_copy_(1, self.position, self.model.head(x[:, -1]).argmax(-1, keepdim=True))

    def record(self) -> None:
        """On a card: record one step as a graph; before it, three steps on a side stream, which also compile."""
        if not self.on_cuda:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.fill_(self.T)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()                                  # recording computes nothing

    def run(self, n: int) -> list[list[int]]:
        """The next n ids of every row, from the first position on."""
        self.position.fill_(self.T)
        for _ in range(n - 1):                           # the first one is prefill's
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
        return self.tokens[:, self.T:self.T + n].tolist()
