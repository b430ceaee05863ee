"""What machines do: the verbs of bench.py that measure kernels, attention and ranks.

    python bench.py kernels                                         errors of every kernel (times: bench.py gpu)
    python bench.py attention                                       plain, compiled, tiled and torch's attention
    torchrun --standalone --nproc_per_node=2 bench.py parallel      messages, and what each strategy costs
"""
import functools
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fsdp
import parallel
import sharded
from bench_step import can_compile, on, seconds_of
from configurator import ConfigError, command_line
from machine import DTYPES, pick_device
from model import ModelConfig, Transformer
from optim import AdamW


# --- kernels: their errors ---

TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # the tests': some roundings of the largest entry
# Tokens, width, vocabulary, heads, key heads, D; and Tq, Tk, D, key heads, group, causal.
LONG_LAYERS = [(1, 80, 7, 4, 2, 16), (50, 257, 201, 4, 1, 80), (1000, 768, 50257, 12, 4, 64),
               (65536, 1024, 256, 8, 2, 128)]
LONG_ATTENTION = [(1, 1, 16, 2, 1, True), (1, 130, 80, 2, 4, True), (17, 130, 64, 2, 2, False),
                  (130, 7, 32, 2, 4, True), (127, 257, 256, 1, 2, True), (1000, 5000, 128, 2, 4, True),
                  (4096, 4096, 64, 2, 2, True), (65536, 65536, 64, 1, 1, True), (16384, 16384, 128, 1, 2, True)]


@dataclass
class KernelConfig:
    """What `python bench.py kernels` can be told."""
    page: str = "both"                        # whose kernels: kernels | flash | both
    dtypes: str = ",".join(TOLERANCE)         # with commas between
    long: bool = False                        # odd and long shapes, up to 65,536 tokens: for a GPU

    def __post_init__(self):
        if self.page not in ("kernels", "flash", "both"):
            raise ConfigError(f"page={self.page!r} must be kernels, flash or both")


def layer_cases(device, T, C, V, H, K, D) -> list[tuple]:
    """(name, ours, plain PyTorch, torch's own or None, inputs) of kernels.py: T tokens, width C, V ids, heads of D."""
    import kernels
    F, targets = torch.nn.functional, torch.randint(V, (T,), device=device)
    angles = torch.rand(T, D // 2, device=device)

    def randn(*shape):
        return torch.randn(shape, device=device).requires_grad_()
    return [("swiglu", kernels.swiglu, lambda g, u: g * torch.sigmoid(g) * u, None, (randn(T, C), randn(T, C))),
            ("matmul", kernels.matmul, torch.matmul, None, (randn(T, C), randn(C, V))),
            ("rms_norm", kernels.rms_norm, lambda x, w: x * (x.pow(2).mean(-1, True) + 1e-5).rsqrt() * w,
             lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), (randn(T, C), randn(C))),
            ("rope", kernels.apply_rope, lambda q, k, c, s: tuple(kernels.turned(x, c, s, False) for x in (q, k)), None,
             (randn(1, H, T, D), randn(1, K, T, D), angles.cos(), angles.sin())),
            ("cross_entropy", kernels.cross_entropy,
             lambda z, t: (z.logsumexp(-1) - z.gather(1, t[:, None])[:, 0]).mean(), F.cross_entropy,
             (randn(T, V), targets)),
            ("linear+cross_entropy", kernels.linear_cross_entropy, lambda x, w, t: F.cross_entropy(x @ w.T, t), None,
             (randn(T, C), randn(V, C), targets))]


def attention_functions(causal: bool, group: int = 1) -> dict:
    """name -> function of q (B, H, Tq, D), k and v (B, H / group, Tk, D): plain, in tiles, torch's own, Triton's."""
    import flash

    def plain(q, k, v):
        if group > 1:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        return torch.softmax(flash.scores_of(q, k, causal), dim=-1) @ v
    return {"plain": plain, "tiles in PyTorch": lambda q, k, v: flash.FlashAttentionPyTorch.apply(q, k, v, causal),
            "torch's sdpa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=group > 1),
            "Triton": lambda q, k, v: flash.flash_attention(q, k, v, causal)}


def attention_inputs(device, B, H, K, Tq, Tk, D) -> list:
    """q, k, v of H and K heads."""
    return [torch.randn(B, heads, T, D, device=device).requires_grad_() for heads, T in ((H, Tq), (K, Tk), (K, Tk))]


def leaves(inputs, dtype) -> list:
    """The inputs in a dtype, to be differentiated where those are; whole numbers as they are."""
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def errors(function, reference, inputs, dtype) -> list[float]:
    """Largest errors of (outputs, gradients) against the reference in float64 on the same rounded numbers, relative to
    the largest entry (at least 1); the outputs are differentiated with fixed upstreams."""
    def run(function, dtype) -> tuple:
        variables = leaves(rounded, dtype)
        outputs = function(*variables)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in outputs]
        return outputs, torch.autograd.grad(outputs, [x for x in variables if x.requires_grad], upstream)
    rounded = leaves(inputs, dtype)
    pairs = [[(x - y).abs().max() / y.abs().max().clamp(min=1) for x, y in zip(a, b)]
             for a, b in zip(run(function, dtype), run(reference, torch.float64))]
    return [torch.stack(pair).max().item() for pair in pairs]              # Python's max could miss a NaN


def kernel_cases(page: str, long: bool, device) -> list[tuple]:
    """(name, ours, reference, torch's own, inputs) at one small size, or at odd and long ones."""
    import flash
    cases, sizes = [], LONG_LAYERS if long else [(50, 256, 200, 4, 2, 64)]
    for T, C, V, H, K, D in sizes if page != "flash" else ():
        cases += [(f"{name} {T}, {C}, {V}, {D}", *case) for name, *case in layer_cases(device, T, C, V, H, K, D)]
    sizes = LONG_ATTENTION if long else [(70, 70, 64, 2, 2, True), (70, 70, 64, 2, 2, False)]
    for Tq, Tk, D, K, group, causal in sizes if page != "kernels" else ():
        functions, name = attention_functions(causal, group), f"{Tq} x {Tk}, {D} {'causal' if causal else 'full'}"
        reference = functions["tiles in PyTorch" if long else "plain"]       # the long ones have no room for T x T
        inputs = attention_inputs(device, 1, group * K, K, Tq, Tk, D)
        cases += [(f"{kind} {name}", functions[kind], reference, None, inputs)
                  for kind in ("tiles in PyTorch", "Triton")[long:]]
    if long:
        flash.TILE = 2048                                  # few large tiles: 64 would take a minute here
    return cases


def kernels(argv: list[str]) -> None:
    """The largest error of every kernel beside plain PyTorch's, by dtype; exits with 1 for one that is too large."""
    config = command_line(KernelConfig, argv, "usage: python bench.py kernels [--page=kernels | flash | both]")[2]
    gpu, wrong = torch.cuda.is_available(), 0
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")     # read when kernels.py is imported
    torch.manual_seed(0)
    print(f"largest error against float64 on {torch.cuda.get_device_name() if gpu else 'the CPU, kernels interpreted'}")
    print(f"{'':48}{'ours':20}plain PyTorch\n{'':48}" + f"{'output':10}{'gradient':10}" * 2)
    for name, ours, plain, _, inputs in kernel_cases(config.page, config.long, "cuda" if gpu else "cpu"):
        for dtype in config.dtypes.split(","):
            values = [error for function in (ours, plain) for error in errors(function, plain, inputs, DTYPES[dtype])]
            bad = not all(error < TOLERANCE[dtype] for error in values[:2])        # NaN is not below either
            wrong += bad
            print(f"{name:38}{dtype:10}" + "".join(f"{error:<10.0e}" for error in values) + "WRONG" * bad, flush=True)
    if wrong:
        sys.exit(f"{wrong} of the kernels' errors are too large")


# --- their times, and what bounds them ---

def roofs(device, n_bytes: int, size: int) -> tuple[float, float]:
    """(bytes/s of a copy of n_bytes, reads and writes counted; FLOP/s of a product of `size` in bfloat16), measured."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device, 10) for _ in range(3))
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    torch.mm(a, b)                                         # the first one loads the library
    return copy, 2 * size ** 3 / min(seconds_of(lambda: torch.mm(a, b), device, 10) for _ in range(3))


def timed(function, inputs) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MB that both take at their peak on CUDA); upstreams are made once."""
    def outputs() -> tuple:
        result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def forward():
        with torch.no_grad():
            return outputs()

    def both():
        return torch.autograd.grad(outputs(), trained, upstream)

    def median_ms(run) -> float:
        if inputs[0].is_cuda:
            import triton
            return triton.testing.do_bench(run, rep=70, return_mode="median")    # the L2 cache emptied before each
        return 1e3 * statistics.median(seconds_of(run) for _ in range(3))
    trained, upstream, peak = [x for x in inputs if x.requires_grad], [torch.randn_like(y) for y in forward()], 0.0
    both()                                                 # compiles
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return median_ms(forward), median_ms(both), peak


# --- attention over lengths and widths ---

@dataclass
class AttentionConfig:
    """What `python bench.py attention` can be told."""
    widths: str = "16,64,128"                 # of the one head
    lengths: str = ""                         # with commas between; none = by device
    dtype: str = "float32"                    # float32, bfloat16
    device: str | None = None                 # cpu, cuda; none = the best there is


def attention(words: list[str]) -> None:
    """ms forward and backward, and MB kept for backward, of causal attention: plain, compiled, tiled, torch's own."""
    config = command_line(AttentionConfig, words, "usage: python bench.py attention [--key=value …]")[2]
    device, batch, repeats = pick_device(config.device), 8, 5
    gpu = device.startswith("cuda")
    lengths = config.lengths or ("256,1024,4096,8192,16384" if gpu else "128,512,2048")
    functions = attention_functions(causal=True)
    if can_compile(device):
        functions["plain, compiled"] = torch.compile(functions["plain"])
    if not gpu:
        del functions["Triton"]                            # interpreted it has no time worth knowing
    print(f"{on(device)}; batch {batch}, one head, {config.dtype}, causal; ms, medians of {repeats}")
    print(f"{'width':>6}{'length':>8}  {'':<18}{'forward':>10}{'backward':>10}{'MB kept':>10}")
    for D in map(int, config.widths.split(",")):
        for T in map(int, lengths.split(",")):
            inputs = leaves(attention_inputs(device, batch, 1, 1, T, T, D), DTYPES[config.dtype])
            for name, function in functions.items():
                try:
                    row = attention_row(function, inputs, device, repeats)
                except RuntimeError as error:                                       # out of memory is one
                    row = f"  {str(error).splitlines()[0][:60]}"
                print(f"{D:>6}{T:>8}  {name:<18}{row}", flush=True)


def attention_row(function, inputs, device: str, repeats: int) -> str:
    """Forward and backward ms and what is saved between them, formatted."""
    kept, times = {}, []

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    for _ in range(repeats + 2):
        outputs = []
        forward = seconds_of(lambda: outputs.append(function(*inputs)), device)
        upstream = torch.ones_like(outputs[0])
        times.append((forward, seconds_of(lambda: outputs.pop().backward(upstream), device)))
    forward, backward = (1e3 * statistics.median(column) for column in zip(*times[2:]))
    return f"{forward:>10.2f}{backward:>10.2f}{sum(kept.values()) / 1e6:>10.1f}"


# --- parallel: what each strategy costs ---


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
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
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
