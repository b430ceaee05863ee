"""Memory over the time of one training step: `python bench.py memory [config_x.py] [--key=value]`.

Every tensor that torch's operations make is watched from its birth to its end and counted by kind: weights, gradients,
moments, activations by region, temporaries. A table, a picture in out/memory/, and on CUDA torch's own snapshot file.
"""
import functools
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import train
from accounting import table
from configurator import command_line
from machine import DTYPES, pick_device, pick_dtype
from model import Transformer
from optim import clip_grad_norm

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
