"""What machines do: the verbs of bench.py that measure steps, memory, kernels and ranks."""
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
import train
from bench_memory import memory
from checkpoint import read_meta
from configurator import ConfigError, command_line
from machine import DTYPES, pick_device, pick_dtype
from model import ModelConfig, Transformer
from optim import AdamW, clip_grad_norm


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


def attention_cases(device, T, H, K, D) -> list[tuple]:
    """The same for flash.py, causal and not."""
    import flash
    inputs, cases = [torch.randn(1, heads, T, D, device=device).requires_grad_() for heads in (H, K, K)], []

    def plain(q, k, v, causal):
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
        return torch.softmax(flash.scores_of(q, k, causal), dim=-1) @ v

    def sdpa(q, k, v, causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    for name, ours in (("PyTorch", flash.FlashAttentionPyTorch.apply), ("Triton", flash.flash_attention)):
        for kind, causal in (("causal", True), ("full", False)):
            functions = [lambda q, k, v, f=f, causal=causal: f(q, k, v, causal) for f in (ours, plain, sdpa)]
            cases.append((f"{name} {kind}", *functions, inputs))
    return cases


def outputs_and_gradients(function, inputs, dtype) -> tuple[list, list]:
    """What function(*inputs) gives in a dtype, and gradients of the inputs that require one, for fixed upstreams."""
    inputs = [x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    upstream = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], upstream))


def print_errors(cases) -> None:
    """The largest error by kernel and dtype against float64, relative to the largest entry (at least 1)."""
    print(f"{'':34}{'ours':20}plain PyTorch\n{'':34}" + f"{'output':10}{'gradient':10}" * 2)
    for name, ours, plain, _, inputs in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
            exact, errors = outputs_and_gradients(plain, rounded, torch.float64), []
            for function in (ours, plain):
                for a, b in zip(outputs_and_gradients(function, rounded, dtype), exact):
                    errors.append(max(((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(a, b)))
            print(f"{name:24}{str(dtype)[6:]:10}" + "".join(f"{error:<10.0e}" for error in errors), flush=True)


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


def print_times(cases, title: str, dtype) -> None:
    """A line a kernel: ms of a forward pass, of forward and backward together, and on CUDA MB at the peak of both."""
    gpu = torch.cuda.is_available()
    print(f"\n{title}, {str(dtype)[6:]}: ms forward, forward + backward{', MB at its peak' * gpu}\n{'':24}"
          + "".join(f"{name:>28}" for name in ("ours", "plain", "compiled", "torch's own")))
    for name, ours, plain, own, inputs in cases:
        rounded, line = [x.to(dtype) if x.is_floating_point() else x for x in inputs], f"{name:24}"
        for function in (ours, plain, torch.compile(plain) if gpu else None, own):
            if function is None:
                line += f"{'-':>28}"
                continue
            try:
                with torch.no_grad():
                    forward = time_ms(lambda: function(*rounded))
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                both = time_ms(lambda: outputs_and_gradients(function, inputs, dtype))
                peak = f"{torch.cuda.max_memory_allocated() / 1e6:9,.0f}" if gpu else ""
                line += f"{forward:9.3f} {both:9.3f}{peak}".rjust(28)
            except RuntimeError as error:                  # out of memory is one
                line += f"{str(error)[:26]:>28}"
        print(line, flush=True)


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
        lines += collective_times(config.max_mb, device)
        more, traces = strategy_times(config, device)
        if rank == 0:
            path = Path(config.out_dir) / f"parallel_{device.type}_{size}_ranks.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines + more) + "\n", encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
            draw_timeline(traces, path.with_suffix(".png"))


VERBS = {"kernels": kernels, "profile": profile, "memory": memory, "parallel": bench_parallel}
