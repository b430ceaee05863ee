"""What machines do: the verbs of bench.py that measure steps, memory, kernels and ranks."""
import dataclasses
import functools
import os
import statistics
import time

import torch

from configurator import ConfigError, command_line
from machine import DTYPES, pick_device, pick_dtype

# --- kernels: their errors, and their times beside what they replace ---


@dataclasses.dataclass
class KernelConfig:
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
        for dtype in self.dtypes.split(","):
            if dtype not in DTYPES:
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
    def plain(q, k, v, is_causal):
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
        return torch.softmax(flash.scores_of(q, k, is_causal), dim=-1) @ v

    def own(q, k, v, is_causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    def ours(q, k, v, is_causal):
        return flash.FlashAttentionPyTorch.apply(q, k, v, is_causal)

    inputs = [torch.randn(1, heads, T, D, device=device).requires_grad_() for heads in (H, K, K)]
    return [(f"{name} {'causal' if is_causal else 'full'}",
             *(functools.partial(f, is_causal=is_causal) for f in (function, plain, own)), inputs)
            for name, function in (("PyTorch", ours), ("Triton", flash.flash_attention)) for is_causal in (True, False)]


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


def time_ms(run) -> float:
    """Median time of run() in ms; on CUDA with the L2 cache emptied before each."""
    if torch.cuda.is_available():
        import triton
        return triton.testing.do_bench(run, rep=200, return_mode="median")
    times = []
    for _ in range(7):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def print_times(cases, title: str, dtype) -> None:
    """A line a kernel: ms of a forward pass, of forward and backward together, and on CUDA MB at the peak of both."""
    gpu = torch.cuda.is_available()
    print(f"\n{title}, {str(dtype)[6:]}: ms forward, forward + backward{', MB at its peak' * gpu}\n{'':24}"
          + "".join(f"{name:>28}" for name in ("ours", "plain", "compiled", "torch's own")))
    for name, ours, plain, own, inputs in cases:
        line = f"{name:24}"
        for function in (ours, plain, torch.compile(plain) if gpu else None, own):
            try:
                with torch.no_grad():
                    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
                    forward = time_ms(lambda: function(*given))
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                both = time_ms(lambda: outputs_and_gradients(function, inputs, dtype))
                peak = f"{torch.cuda.max_memory_allocated() / 1e6:9,.0f}" if gpu else ""
                line += f"{forward:9.3f} {both:9.3f}{peak}".rjust(28)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                line += f"{str(error)[:26]:>28}"
            except TypeError:                              # there is no such function
                line += f"{'-':>28}"
        print(line, flush=True)


def kernels(argv: list[str]) -> None:
    """Every kernel's error beside plain PyTorch's, then the times: on the CPU only those of attention by tiles."""
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


def profile(argv: list[str]) -> None:
    """One training step by phase (clipping has its own) and by region, and its ten largest kernels; writes trace.json.

    Random tokens stand for the data. The step is one micro-batch, not compiled: the regions are modules, and a compiled
    model has none. A forward operation belongs to the module that it runs in, a backward one to that of the forward
    operation which it differentiates: autograd's sequence numbers tell. Under a CUDA profiler the same regions are NVTX
    ranges, and only steps after the warm-up are captured:
    nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx python bench.py profile config_x.py
    """
    import data
    import train
    from model import Transformer
    _, _, config, _ = command_line(train.TrainConfig, argv, "python bench.py profile config_x.py [--key=value ...]")
    device = pick_device(config.device)
    dtype = DTYPES[pick_dtype(config.dtype, device)]
    meta = data.read_meta(config.data_dir) if os.path.isdir(config.data_dir) else {}
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
        return
    with torch.profiler.profile() as profiler:             # the CPU, and CUDA where there is one
        wall_ms = sum(step())
    report(profiler, wall_ms, device.startswith("cuda"))
    os.makedirs(config.out_dir, exist_ok=True)
    trace = os.path.join(config.out_dir, "trace.json")
    profiler.export_chrome_trace(trace)
    print(f"trace: {trace}, to open in https://ui.perfetto.dev")


def make_step(model, optimizers, batch, dtype, grad_clip, region):
    """A function that takes one training step and gives the ms of its four phases."""
    from optim import clip_grad_norm
    device = batch[0].device.type

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()                       # else the clock would stop before the GPU does
        return time.perf_counter() * 1e3

    def step() -> list[float]:
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


def report(profiler, wall_ms: float, on_gpu: bool) -> None:
    """Print the time of one profiled step by region, and its ten largest kernels (operators on the CPU)."""
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


VERBS = {"kernels": kernels, "profile": profile}
