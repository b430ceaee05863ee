"""What machines do: the verbs of bench.py that measure kernels and ranks; those of a step stand in bench_step.py."""
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
from bench_step import memory, profile
from configurator import ConfigError, command_line
from machine import DTYPES
from model import ModelConfig, Transformer
from optim import AdamW


# --- kernels: their errors, and their times beside what they replace ---

@dataclass
class KernelConfig:
    """What `python bench.py kernels` can be told."""
    page: str = "both"                        # whose kernels: kernels | flash | both
    times: bool = True                        # false: only the errors
    tokens: str = "512,2048,8192"             # lengths to time
    widths: str = "64,128"                    # head widths to time
    dtypes: str = "bfloat16,float32"          # dtypes to time

    def __post_init__(self):
        if self.page not in ("kernels", "flash", "both"):
            raise ConfigError(f"page={self.page!r} must be kernels, flash or both")
        for number in [*self.tokens.split(","), *self.widths.split(",")]:
            if not number.isdecimal() or int(number) == 0:
                raise ConfigError(f"tokens and widths must be whole numbers with commas between, not {number!r}")
        if not set(self.dtypes.split(",")) <= set(DTYPES):
            raise ConfigError(f"dtypes={self.dtypes!r} must be some of {', '.join(DTYPES)} with commas between")


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


def attention_cases(device, T, H, K, D, B=1) -> list[tuple]:
    """The same for flash.py, causal and not."""
    import flash
    inputs, cases = [torch.randn(B, heads, T, D, device=device).requires_grad_() for heads in (H, K, K)], []

    def plain(q, k, v, causal):
        if H > K:
            k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
        return torch.softmax(flash.scores_of(q, k, causal), dim=-1) @ v

    def sdpa(q, k, v, causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H > K)

    for name, ours in (("PyTorch", flash.FlashAttentionPyTorch.apply), ("Triton", flash.flash_attention)):
        for kind, causal in (("causal", True), ("full", False)):
            functions = [lambda q, k, v, f=f, causal=causal: f(q, k, v, causal) for f in (ours, plain, sdpa)]
            cases.append((f"{name} {kind}", *functions, inputs))
    return cases


def leaves(inputs, dtype) -> list:
    """The inputs in a dtype, to be differentiated where those are; whole numbers as they are."""
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def outputs_and_gradients(function, inputs, dtype) -> tuple[list, list]:
    """What function(*inputs) gives in a dtype, and gradients of the inputs that require one, for fixed upstreams."""
    inputs = leaves(inputs, dtype)
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    upstream = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream))


def errors(function, reference, inputs, dtype) -> list[float]:
    """Largest errors of (outputs, gradients) against the reference in float64 on the same rounded numbers, relative to
    the largest entry (at least 1)."""
    rounded = leaves(inputs, dtype)
    exact = outputs_and_gradients(reference, rounded, torch.float64)
    pairs = [[(x - y).abs().max() / y.abs().max().clamp(min=1) for x, y in zip(a, b)]
             for a, b in zip(outputs_and_gradients(function, rounded, dtype), exact)]
    return [torch.stack(pair).max().item() for pair in pairs]              # Python's max could miss a NaN


def print_errors(cases) -> None:
    """The largest error by kernel and dtype."""
    print(f"{'':34}{'ours':20}plain PyTorch\n{'':34}" + f"{'output':10}{'gradient':10}" * 2)
    for name, ours, plain, _, inputs in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            values = errors(ours, plain, inputs, dtype) + errors(plain, plain, inputs, dtype)
            print(f"{name:24}{str(dtype)[6:]:10}" + "".join(f"{error:<10.0e}" for error in values), flush=True)


def seconds_of(run, device, n: int) -> float:
    """Mean seconds of one run() of n in a row; the card has done all it was asked for when the clock is read."""
    def clock() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    began = clock()
    for _ in range(n):
        run()
    return (clock() - began) / n


def roofs(device, n_bytes: int, size: int) -> tuple[float, float]:
    """(bytes/s of a copy of n_bytes, reads and writes counted; FLOP/s of a product of `size` in bfloat16), measured."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device, 10) for _ in range(3))
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    torch.mm(a, b)                                         # the first one loads the library
    return copy, 2 * size ** 3 / min(seconds_of(lambda: torch.mm(a, b), device, 10) for _ in range(3))


def time_ms(run, rep: int = 200) -> float:
    """Median time of run() in ms; on CUDA of `rep` ms of runs, with the L2 cache emptied before each."""
    if torch.cuda.is_available():
        import triton
        return triton.testing.do_bench(run, rep=rep, return_mode="median")
    times, runs = [], 7 if rep >= 100 else 3
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[runs // 3:])


def timed(function, inputs, rep: int = 200) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MB that both take at their peak on CUDA); upstreams are made once."""
    def forward():
        with torch.no_grad():
            outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    trained, upstream = [x for x in inputs if x.requires_grad], [torch.randn_like(y) for y in forward()]

    def both():
        outputs = function(*inputs)
        return torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), trained, upstream)
    both()                                                 # compiles
    peak = 0.0
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return time_ms(forward, rep), time_ms(both, rep), peak


def print_times(cases, title: str, dtype) -> None:
    """A line a kernel: ms of a forward pass, of forward and backward together, MB at the peak of both."""
    gpu = torch.cuda.is_available()
    print(f"\n{title}, {str(dtype)[6:]}: ms forward, forward + backward, MB at its peak on CUDA\n{'':24}"
          + "".join(f"{name:>28}" for name in ("ours", "plain", "compiled", "torch's own")))
    for name, ours, plain, own, inputs in cases:
        cells, inputs = [], leaves(inputs, dtype)
        for function in (ours, plain, torch.compile(plain) if gpu else None, own):
            cells.append("-")
            if function is not None:
                try:
                    cells[-1] = "{:.3f} {:9.3f} {:8,.0f}".format(*timed(function, inputs))
                except RuntimeError as error:              # out of memory is one
                    cells[-1] = str(error)[:26]
        print(f"{name:24}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


def kernels(argv: list[str]) -> None:
    """Errors of every kernel beside plain PyTorch's, then times: on a CPU those of attention by tiles."""
    usage = "python bench.py kernels | kernels.py | flash.py [--key=value ...]"
    _, _, config, _ = command_line(KernelConfig, argv, usage)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")     # read when kernels.py is imported
    print(f"largest error against float64 on {torch.cuda.get_device_name() if gpu else 'the CPU, kernels interpreted'}")
    if config.page != "flash":
        print_errors(layer_cases(device, T=50, C=256, V=200, H=4, K=2, D=64))
    if config.page != "kernels":
        print_errors(attention_cases(device, T=70, H=4, K=2, D=64))
    for dtype in config.dtypes.split(",") if config.times else ():
        for D in map(int, config.widths.split(",")):
            for T in map(int, config.tokens.split(",")):
                heads = 2048 // D if gpu else 2            # 2,048 wide on a GPU, as FlashAttention's papers measure
                cases = attention_cases(device, T, heads, heads, D) if config.page != "kernels" else []
                if gpu and config.page != "flash":
                    cases += layer_cases(device, T, 2048, 50304, heads, heads, D)
                if not gpu:                                # an interpreted kernel has no time worth knowing
                    cases = [case for case in cases if "Triton" not in case[0]]
                print_times(cases, f"{T} tokens, {heads} heads of {D}", DTYPES[dtype])


# --- parallel: what each strategy costs ---


@dataclass
class ParallelConfig:
    """What `torchrun … bench.py parallel` measures."""
    d_model: int = 512               # width of the model that is trained
    n_layers: int = 4                # its blocks
    vocab_size: int = 8192           # its vocabulary
    context_length: int = 128        # tokens per sequence
    batch_size: int = 2              # sequences per rank and step
    steps: int = 12                  # timed steps of each strategy, taken in turns
    max_mb: int = 256                # largest message of the bandwidth table
    out_dir: str = "results"         # where tables and the timeline go


def collective_times(max_mb: int, device) -> list[str]:
    """Time and bandwidth of each collective by message size, the best of six, as lines of a table."""
    size, lines = parallel.world()[1], ["collective         MB        ms   GB/s sent per rank"]
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
    return lines


def copy_rates(max_mb: int, device) -> list[str]:
    """GB/s of copies by size, as lines: on the device, and between it and the host's pinned and pageable memory."""
    lines = []
    for mb in [4 ** i for i in range(10) if 4 ** i <= max_mb]:
        here, there = (torch.ones(mb * 250_000, device=device) for _ in range(2))
        pinned, pageable, rates = torch.ones(mb * 250_000, pin_memory=here.is_cuda), torch.ones(mb * 250_000), []
        for name, target, source in (("on the device", there, here), ("pinned to it", here, pinned),
                                     ("pageable to it", here, pageable), ("from it to pinned", pinned, here)):
            target.copy_(source)
            seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device, 5)
            rates.append(f"{name} {here.nbytes / seconds / 1e9:.1f}")
        lines.append(f"copies of {mb:>5} MB, GB/s: {', '.join(rates)}")
    return lines


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
    wraps = {"NaiveDDP": (parallel.NaiveDDP, AdamW, 4 * weights),
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


def traced_step(wrapper, optimizer, x, y) -> dict:
    """A training step: row -> (kind, start, end) in seconds, for what was computed, waited for and sent."""
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
        timed("computing", "step", wrapper.step, x, y)
    else:
        loss = timed("computing", "forward", wrapper, x, y)[1]
        timed("computing", "backward", loss.backward)
        if hasattr(wrapper, "finish_gradient_synchronization"):                         # torch's finish in backward
            timed("computing", "finish", wrapper.finish_gradient_synchronization)
    timed("computing", "optimizer", optimizer.step)
    optimizer.zero_grad()
    parallel.send, parallel.wait, fsdp.wait, sharded.wait = send, wait, wait, wait
    return rows


def held_bytes(wrapper, optimizer) -> int:
    """Bytes of this rank's weights, as many of gradients, and the optimizer's moments."""
    states = getattr(optimizer, "local", optimizer).state.values()
    tensors = [*wrapper.parameters()] * 2 + [t for state in states for t in state.values() if torch.is_tensor(t)]
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)             # a DTensor shows the whole


def strategy_times(config: ParallelConfig, device) -> tuple[list[str], dict]:
    """(lines of a table, a traced step of each strategy). They take turns, so that all see the same machine."""
    shape = ModelConfig(config.vocab_size, config.context_length, config.d_model, config.n_layers, n_heads=8)
    made, size = strategies(shape, device), parallel.world()[1]
    rows = config.batch_size * size                # of the whole batch, which tensor parallel and pipelines do together
    ids = torch.randint(256, (rows, config.context_length + 1),
                        generator=torch.Generator().manual_seed(0))
    traces, seconds = {}, {name: [] for name in made}
    for turn in range(config.steps + 1):
        for name in made if turn % 2 else reversed(made):
            whole = name == "tensor parallel" or " m=" in name
            batch = (ids if whole else ids[:config.batch_size]).to(device)
            torch.distributed.barrier()
            traces[name] = traced_step(*made[name][:2], batch[:, :-1], batch[:, 1:])
            if turn:                               # the first step makes buffers and moments
                phases = traces[name]["computing"]
                seconds[name].append(phases[-1][2] - phases[0][1])
    lines = ["", f"step of {rows} sequences, {rows // size} a rank; tensor parallel and pipelines: all on every rank;",
             f"pipelines of {2 * size} layers and 256 words; waiting: mean over ranks in the last step", "",
             "strategy            median ms   fastest   waiting   bubble (p-1)/(m+p-1)   held   MB held   formula"]
    for name, (wrapper, optimizer, formula) in made.items():
        times, row = sorted(seconds[name]), ""
        if " m=" in name:
            bubble = (size - 1) / (wrapper.n_micro_batches + size - 1)
            row = f"{100 * bubble:>23.0f} %{wrapper.most_held:>7}"
        phases, waits = traces[name]["computing"], traces[name]["waiting"]
        waited = torch.tensor(sum(b - a for _, a, b in waits) / (phases[-1][2] - phases[0][1]), device=device)
        waited = parallel.reduce(waited).item() / size
        lines.append(f"{name:<20}{1000 * times[len(times) // 2]:>9.1f}{1000 * times[0]:>10.1f}{100 * waited:>8.0f} %"
                     f"{row:<33}{held_bytes(wrapper, optimizer) / 1e6:>9.1f}{formula / 1e6:>10.1f}")
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
        if device.type == "cuda":
            lines += copy_rates(config.max_mb, device)
        lines += collective_times(config.max_mb, device)
        more, traces = strategy_times(config, device)
        if rank == 0:
            path = Path(config.out_dir) / f"parallel_{device.type}_{size}_ranks.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines + more) + "\n", encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
            draw_timeline(traces, path.with_suffix(".png"))


VERBS = {"kernels": kernels, "profile": profile, "memory": memory, "parallel": bench_parallel}
