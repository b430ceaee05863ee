"""Kernels and attention: the verbs of bench.py that measure their errors and their times.

    python bench.py kernels         errors of every kernel; --times=true what the memory-bound ones reach of a roof
    python bench.py attention       plain, compiled, tiled, torch's and Triton's attention over lengths and widths

A kernel is bound by one of two roofs (Williams 2009), measured first: few FLOPs a byte (RMSNorm, SwiGLU, RoPE, cross
entropy) by the bandwidth of a copy, many (attention, linear + cross entropy) by the FLOP/s of a large product.
"""
import itertools
import os
import shutil
import statistics
import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_step import on, seconds_of
from configurator import command_line, fail
from machine import DTYPES, pick_device


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
    times: bool = False                       # instead what kernels.py's reach of the machine's roofs, beside torch's

    def __post_init__(self):
        if not {*self.dtypes.split(",")} <= TOLERANCE.keys():
            raise ValueError(f"dtypes={self.dtypes!r} must be of {', '.join(TOLERANCE)}")


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
            "Triton": lambda q, k, v: flash.FlashAttentionTriton.apply(q, k, v, causal)}


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


def kernels(argv: list[str]) -> None:
    """The largest error of every kernel beside plain PyTorch's, by dtype; exits with 1 for one that is too large."""
    config = command_line(KernelConfig, argv, "usage: python bench.py kernels [--page=kernels | flash | both]")[2]
    if config.page not in ("kernels", "flash", "both"):
        fail(f"page={config.page} must be kernels, flash or both")
    gpu, long, cases, wrong = torch.cuda.is_available(), config.long, [], 0
    device = "cuda" if gpu else "cpu"
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")     # read when kernels.py is imported
    if config.times:
        kernel_times(device)
        return
    import flash
    torch.manual_seed(0)
    for sizes in () if config.page == "flash" else LONG_LAYERS if long else [(50, 256, 200, 4, 2, 64)]:
        cases += [(f"{name} {sizes[0]}, {sizes[1]}", *case) for name, *case in layer_cases(device, *sizes)]
    if long:
        flash.TILE = 2048                                  # few large tiles: 64 would take a minute
    shapes = LONG_ATTENTION if long else [(70, 70, 64, 2, 2, True), (70, 70, 64, 2, 2, False)]
    for Tq, Tk, D, K, group, causal in () if config.page == "kernels" else shapes:
        functions, inputs = attention_functions(causal, group), attention_inputs(device, 1, group * K, K, Tq, Tk, D)
        reference = functions["tiles in PyTorch" if long else "plain"]       # the long ones have no room for T x T
        for kind in ("tiles in PyTorch", "Triton")[long:]:
            name = f"{kind} {Tq} x {Tk}, {D} {'causal' if causal else 'full'}"
            cases.append((name, functions[kind], reference, None, inputs))
    print(f"largest error against float64 on {torch.cuda.get_device_name() if gpu else 'the CPU, kernels interpreted'}")
    print(f"{'':48}{'ours':20}plain PyTorch\n{'':48}" + f"{'output':10}{'gradient':10}" * 2)
    for name, ours, plain, _, inputs in cases:
        for dtype in config.dtypes.split(","):
            values = [error for function in (ours, plain) for error in errors(function, plain, inputs, DTYPES[dtype])]
            bad = not all(error < TOLERANCE[dtype] for error in values[:2])        # NaN is not below either
            wrong += bad
            print(f"{name:38}{dtype:10}" + "".join(f"{error:<10.0e}" for error in values) + "WRONG" * bad, flush=True)
    if wrong:
        sys.exit(f"{wrong} of the kernels' errors are too large")


# --- their times, and what bounds them ---

def roofs(device, dtype) -> tuple[float, float]:
    """(bytes/s of a copy, reads and writes counted; FLOP/s of a large product in this dtype), measured."""
    n_bytes, size = (2 ** 31, 8192) if device.startswith("cuda") else (2 ** 26, 512)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    a, target = torch.randn(size, size, device=device).to(dtype), torch.empty_like(source)
    torch.mm(a, a)                                         # the first one loads the library
    return (2 * n_bytes / min(seconds_of(lambda: target.copy_(source), device, 10) for _ in range(3)),
            2 * size ** 3 / min(seconds_of(lambda: torch.mm(a, a), device, 10) for _ in range(3)))


def timed(function, inputs) -> tuple[float, float, float, float]:
    """(ms forward, ms of both passes, MB kept between them, on CUDA MB beside the inputs at the peak of both)."""
    def outputs() -> tuple:
        result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    def both():
        return torch.autograd.grad(outputs(), trained, upstream)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def median_ms(run) -> float:
        if inputs[0].is_cuda:
            import triton
            return triton.testing.do_bench(run, rep=70, return_mode="median")    # the L2 cache emptied before each
        return 1e3 * statistics.median(seconds_of(run) for _ in range(5))
    forward, kept, trained = torch.no_grad()(outputs), {}, [x for x in inputs if x.requires_grad]
    upstream = [torch.randn_like(y) for y in forward()]
    both()                                                 # compiles
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        both()
    peak = torch.cuda.max_memory_allocated() - before or float("nan")              # nobody counts it on a CPU
    return median_ms(forward), median_ms(both), sum(kept.values()) / 1e6, peak / 1e6


HEAD = f"{'forward, then both ways':34}{'FLOPs/B':>9}" + f"{'ms':>12}{'rate':>9}{'roof':>6}" * 2 + "  MB kept  at peak"


def row(name: str, function, inputs, work, roof: float, scale: float) -> None:
    """Print what a forward pass, and both passes, reach. work: their FLOPs or bytes; a forward pass's FLOPs a byte."""
    try:
        times = timed(function, inputs)
    except RuntimeError as error:                          # out of memory is one
        print(f"{name:34}{str(error).splitlines()[0][:80]}", flush=True)
        return
    rates = [1e3 * amount / ms for amount, ms in zip(work[:2], times)]
    cells = "".join(f"{ms:>12.3f}{rate / scale:>9,.2f}{rate / roof:>6.2f}" for ms, rate in zip(times, rates))
    mb = "".join(f"{number:>9,.1f}" for number in times[2:])
    print(f"{name:34}{work[2]:>9,.2f}{cells}{mb}  {'TFLOP/s' if scale == 1e12 else 'GB/s'}", flush=True)


def kernel_times(device: str) -> None:
    """The kernels of kernels.py beside eager, compiled and torch's own, in bfloat16."""
    T, C, V, H, K, D = (65536, 4096, 50304, 32, 8, 128) if device == "cuda" else (8, 16, 48, 2, 1, 8)
    copy, product = roofs(device, torch.bfloat16)
    print(f"{on(device)}; roofs: copy {copy / 1e9:,.0f} GB/s, product in bfloat16 {product / 1e12:,.1f} TFLOP/s\n{T:,} "
          f"tokens, width {C}, vocabulary {V:,}, {H} and {K} heads of {D}\n{HEAD}")
    # Bytes that a forward pass must read and write, those of both passes (one is bound by its FLOPs); FLOPs a byte.
    work = {"swiglu": (6 * T * C, 16 * T * C, 1), "rms_norm": (4 * T * C, 10 * T * C, 1),
            "rope": (4 * T * (H + K) * D, 8 * T * (H + K) * D, 0.75), "cross_entropy": (2 * T * V, 6 * T * V, 2.5),
            "linear+cross_entropy": (2 * T * C * V, 6 * T * C * V, T * V / (T + V))}
    for name, ours, plain, own, inputs in layer_cases(device, T, C, V, H, K, D):
        if name not in work:                                         # matmul is there to be read
            continue
        roof, scale = (product, 1e12) if name == "linear+cross_entropy" else (copy, 1e9)
        inputs = leaves(inputs, torch.bfloat16)
        for label, function in {"ours": ours, "eager": plain, "torch's own": own,
                                "compiled": torch.compile(plain) if device == "cuda" else None}.items():
            if function is not None:
                row(f"{name}, {label}", function, inputs, work[name], roof, scale)


# --- attention over lengths and widths ---

@dataclass
class AttentionConfig:
    """What `python bench.py attention` can be told."""
    toy: bool = False                         # one tiny shape: does it run?
    device: str | None = None                 # cpu, cuda; none = the best there is


def attention(words: list[str]) -> None:
    """Times, rates and MB kept for backward of causal attention: plain, compiled, tiled, torch's own, Triton's."""
    config = command_line(AttentionConfig, words, "usage: python bench.py attention [--key=value …]")[2]
    device, functions = pick_device(config.device), attention_functions(causal=True)
    gpu, dtype = device.startswith("cuda"), torch.float32
    widths, lengths = ((64, 128), (1024, 4096, 16384, 65536)) if gpu else ((16, 64, 128), (128, 512, 2048))
    if config.toy:
        widths, lengths = (8,), (16,)
    elif gpu or shutil.which("g++") or shutil.which("clang++"):
        functions["plain, compiled"] = torch.compile(functions["plain"])
    if gpu:
        dtype, own = torch.bfloat16, functions.pop("torch's sdpa")
        functions["torch's flash"] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)(own)
        functions["cuDNN"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(own)
    else:
        del functions["Triton"]                            # interpreted it has no time worth knowing
    product = roofs(device, dtype)[1]
    print(f"{on(device)}, {dtype}, causal; roof: {product / 1e12:,.2f} TFLOP/s of a large product\n{HEAD}")
    for D, T in itertools.product(widths, lengths):
        B, H = (max(1, 16384 // T), 2048 // D) if gpu else (8, 1)
        inputs, flops = leaves(attention_inputs(device, B, H, H, T, T, D), dtype), 2 * B * H * T * T * D
        for name, function in functions.items():
            if gpu and (T > 4096 and "plain" in name or T > 1024 and ("tiles" in name or "compiled" in name)):
                continue
            # A causal forward counts 2 T² D FLOPs a head, a backward 2.5 times that (2307.08691, section 4.1).
            row(f"{name}, {T} x {D}", function, inputs, (flops, 3.5 * flops, T / 2 / dtype.itemsize), product, 1e12)
