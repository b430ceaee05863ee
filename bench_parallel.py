"""What messages and each way of dividing a model cost, beside torch's: a verb of bench.py, under torchrun.

    torchrun --standalone --nproc_per_node=2 bench.py parallel      tables and a timeline of the last step, in results/
"""
import functools
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fsdp
import parallel
import sharded
from bench_step import seconds_of
from configurator import command_line
from model import ModelConfig, Transformer
from optim import AdamW


@dataclass
class ParallelConfig:
    """What `torchrun … bench.py parallel` measures."""
    d_model: int = 512               # width of the model that is trained
    n_layers: int = 4                # its blocks
    vocab_size: int = 8192           # its vocabulary; sequences are of 128 tokens
    batch_size: int = 2              # sequences per rank and step
    steps: int = 12                  # timed steps of each strategy, taken in turns
    max_mb: int = 256                # largest message of the bandwidth table
    out_dir: str = "results"         # where tables and the timeline go


def message_times(max_mb: int, device) -> list[str]:
    """Time and bandwidth of each collective by message size, the best of six; on a GPU those of copies: lines."""
    size, lines, copies = parallel.world()[1], ["collective         MB        ms   GB/s sent per rank"], []
    for mb in [4 ** i for i in range(10) if 4 ** i <= max_mb]:
        n = int(mb * 1e6) // 4 // size
        whole, part = torch.ones(n * size, device=device), torch.ones(n, device=device)
        for kind, halves, call in (("all-reduce", 2, lambda: parallel.reduce(whole)),
                                   ("all-gather", 1, lambda: parallel.wait(parallel.all_gather(whole, part))),
                                   ("reduce-scatter", 1, lambda: parallel.reduce_scatter(whole)())):
            seconds = []
            for _ in range(6):
                torch.distributed.barrier()
                began = time.perf_counter()
                call()
                parallel.reduce(torch.ones(1, device=device)).item()               # also the GPU has done it then
                seconds.append(time.perf_counter() - began)
            sent = halves * (size - 1) / size * whole.nbytes
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
    """name -> (wrapped model, optimizer, formula in bytes of weights, gradients and moments on a rank)."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def torch_fsdp(model):
        for module in [*model.layers, model]:
            fully_shard(module)
        return model

    def zero1(params):
        return parallel.ShardedOptimizer(params, AdamW)

    size, weights = parallel.world()[1], 4 * sum(p.numel() for p in Transformer(shape).parameters())
    vocabulary = 4 * shape.vocab_size * shape.d_model                                   # the embedding, or the head
    wraps = {"one rank alone": (lambda model: model, AdamW, 4 * weights),
             "NaiveDDP": (parallel.NaiveDDP, AdamW, 4 * weights),
             "DDP bucket_mb=0": (lambda model: parallel.DDP(model, 0), AdamW, 4 * weights),
             "DDP bucket_mb=inf": (lambda model: parallel.DDP(model, math.inf), AdamW, 4 * weights),
             "DDP bucket_mb=8": (parallel.DDP, AdamW, 4 * weights),
             "torch DDP": (DistributedDataParallel, AdamW, 4 * weights),
             "DDP + ZeRO-1": (parallel.DDP, zero1, (2 + 2 / size) * weights),
             "FSDP": (sharded.FSDP, AdamW, 4 * weights / size),
             "torch fully_shard": (torch_fsdp, torch.optim.AdamW, 4 * weights / size),
             "tensor parallel": (sharded.tensor_parallel, AdamW,
                                 4 * (2 * vocabulary + (weights - 2 * vocabulary) / size))}
    made, jobs = {}, [(name, shape, *how) for name, how in wraps.items()]
    even = replace(shape, vocab_size=256, n_layers=2 * size)       # equal stages: a large head would be the last's
    layers = 4 * sum(p.numel() for p in Transformer(even).layers.parameters())
    for schedule, n in (("gpipe", 2), ("1f1b", 2), ("gpipe", 4), ("1f1b", 4)):
        wrap = functools.partial(sharded.Pipeline, group=None, n_micro_batches=n, schedule=schedule)
        jobs.append((f"{schedule} m={n}", even, wrap, AdamW, 4 * (layers / size + 4 * 256 * shape.d_model)))
    for name, config, wrap, optimizer, formula in jobs:
        torch.manual_seed(0)
        wrapper = wrap(Transformer(config).to(device))
        made[name] = wrapper, optimizer(wrapper.parameters()), formula
    return made


def traced_step(wrapper, optimizer, x, y) -> tuple[dict, float]:
    """A training step: {row: (kind, start, end) in seconds} of what was computed, waited for and sent; its loss."""
    rows, send, wait = {"computing": [], "waiting": [], "sending": []}, parallel.send, parallel.wait

    def timed(row, kind, call, *args, **more):
        began, result = time.perf_counter(), call(*args, **more)
        rows[row].append((kind, began, time.perf_counter()))
        return result

    def traced_send(kind, *args, **more):
        began, work = time.perf_counter(), send(kind, *args, **more)
        if work is not None:
            work.get_future().then(lambda _: rows["sending"].append((kind, began, time.perf_counter())))
        return work

    parallel.send = traced_send
    parallel.wait = fsdp.wait = sharded.wait = lambda work: timed("waiting", "wait", wait, work)
    if isinstance(wrapper, sharded.Pipeline):
        loss = timed("computing", "step", wrapper.step, x, y)
    else:
        loss = timed("computing", "forward", wrapper, x, y)[1]
        timed("computing", "backward", loss.backward)
        if hasattr(wrapper, "finish_gradient_synchronization"):                         # torch's finish in backward
            timed("computing", "finish", wrapper.finish_gradient_synchronization)
    timed("computing", "optimizer", optimizer.step)
    optimizer.zero_grad()
    parallel.send, parallel.wait, fsdp.wait, sharded.wait = send, wait, wait, wait
    return rows, loss.item()


def strategy_times(config: ParallelConfig, device) -> tuple[list[str], dict]:
    """(lines of a table, a traced step of each strategy). They take turns, so that all see the same machine."""
    shape = ModelConfig(config.vocab_size, 128, config.d_model, config.n_layers, n_heads=8)
    made, size = strategies(shape, device), parallel.world()[1]
    # The same rows on every rank, so all should have the same loss; tensor parallel and pipelines do them all together.
    ids = torch.randint(256, (config.batch_size, 129), generator=torch.Generator().manual_seed(0)).to(device)
    traces, losses, seconds = {}, {}, {name: [] for name in made}
    for turn in range(config.steps + 1):
        for name in made if turn % 2 else reversed(made):
            batch = ids.repeat(size, 1) if name == "tensor parallel" or " m=" in name else ids
            torch.distributed.barrier()
            traces[name], losses[name] = traced_step(*made[name][:2], batch[:, :-1], batch[:, 1:])
            if turn:                               # the first step makes buffers and moments
                phases = traces[name]["computing"]
                seconds[name].append(phases[-1][2] - phases[0][1])
    lines = ["", f"step of {size * len(ids)} sequences, {len(ids)} a rank; tensor parallel and pipelines: all on every "
             f"rank;\npipelines of {2 * size} layers and 256 words; waiting: mean over ranks in the last step; loss: "
             "of the last step", "",
             "strategy            median ms   fastest   waiting   bubble (p-1)/(m+p-1)   held   MB held   formula"
             "       loss"]
    for name, (wrapper, optimizer, formula) in made.items():
        row, phases, waits = "", traces[name]["computing"], traces[name]["waiting"]
        if " m=" in name:
            bubble = (size - 1) / (wrapper.n_micro_batches + size - 1)
            row = f"{100 * bubble:>23.0f} %{wrapper.most_held:>7}"
        waited = torch.tensor(sum(b - a for _, a, b in waits) / (phases[-1][2] - phases[0][1]), device=device)
        waited = parallel.reduce(waited).item() / size
        states = getattr(optimizer, "local", optimizer).state.values()
        held = [*wrapper.parameters()] * 2 + [t for state in states for t in state.values() if torch.is_tensor(t)]
        held_mb = sum(getattr(t, "_local_tensor", t).nbytes for t in held) / 1e6           # a DTensor shows the whole
        lines.append(f"{name:<20}{1000 * statistics.median(seconds[name]):>9.1f}{1000 * min(seconds[name]):>10.1f}"
                     f"{100 * waited:>8.0f} %{row:<33}{held_mb:>9.1f}"
                     f"{formula / 1e6:>10.1f}{losses[name]:>11.5f}")
    return lines, traces


def draw_timeline(traces: dict, path) -> None:
    """The last step of each of our strategies on rank 0: what is computed, waited for and sent, when."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    kinds = "forward backward finish optimizer step wait all-reduce all-gather reduce-scatter broadcast".split()
    colors = {kind: f"C{i}" for i, kind in enumerate(kinds)}
    traces = {name: trace for name, trace in traces.items() if not name.startswith("torch")}
    figure = Figure(figsize=(11, 1.2 * len(traces) + 0.8), layout="constrained")
    for axis, (name, trace) in zip(figure.subplots(len(traces), 1, sharex=True), traces.items()):
        zero = trace["computing"][0][1]
        for row, spans in enumerate(trace.values()):
            for kind, a, b in spans:
                axis.broken_barh([(1000 * (a - zero), 1000 * (b - a))], (2.1 - row, 0.8), color=colors[kind], alpha=0.8)
        axis.set(yticks=(2.5, 1.5, 0.5), yticklabels=list(trace), ylabel=name.replace(" ", "\n", 1))
    figure.legend([Patch(color=color) for color in colors.values()], colors, ncols=10, loc="outside upper center",
                  fontsize=8)
    axis.set_xlabel("ms since the step began, rank 0; torchrun --standalone --nproc_per_node=N bench.py parallel")
    figure.savefig(path, dpi=110)


def bench_parallel(argv: list[str]) -> None:
    """Under torchrun: collectives, strategies beside torch's, a pipeline's bubble; writes two files to OUT_DIR."""
    usage = "usage: torchrun --standalone --nproc_per_node=N bench.py parallel [--key=value …]"
    config = command_line(ParallelConfig, argv, usage)[2]
    with parallel.ending():
        device = parallel.start()
        rank, size = parallel.world()
        lines = [f"{size} ranks, {torch.distributed.get_backend()}, {torch.get_num_threads()} threads each, "
                 f"{device.type}, torch {torch.__version__}, {os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}",
                 f"torchrun --standalone --nproc_per_node={size} bench.py parallel {' '.join(argv)}".rstrip(), ""]
        lines += message_times(config.max_mb, device)
        more, traces = strategy_times(config, device)
        if rank == 0:
            path = Path(config.out_dir) / f"parallel_{device.type}_{size}_ranks.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines + more) + "\n", encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
            draw_timeline(traces, path.with_suffix(".png"))
