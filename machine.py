"""What this machine is and does fastest: devices, dtypes, peaks, threads, signals; and what a CPU wants differently.

A GPU's figures come from its data sheet, a CPU's are measured when they are needed:

    mfu = FLOP/s of the training step / peak_flops(device, dtype)        (PaLM, 2204.02311, appendix B)
    tokens/s of decoding <= bandwidth(device) / bytes of the weights     (each token reads every weight once)

The last section holds operations that a CPU does much faster in another form; each equals the simple one by test.
"""
import contextlib
import ctypes
import math
import platform
import signal
import time
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- devices ---

@dataclass
class Device:
    """What a chip can do at its best: dense, without sparsity."""
    flops: float                     # bfloat16 with float32 sums (float16 on V100), FLOP/s
    bytes_per_s: float               # of its memory
    memory_bytes: float


DEVICES = {                          # NVIDIA's data sheets, SXM; FLOPs printed there with sparsity are halved
    "V100": Device(125e12, 900e9, 32e9), "A100": Device(312e12, 2039e9, 80e9), "H100": Device(989e12, 3350e9, 80e9),
    "H200": Device(989e12, 4800e9, 141e9), "L40S": Device(362e12, 864e9, 48e9),
    "B200": Device(2250e12, 8000e9, 180e9),                   # an eighth of the DGX
    "RTX 4090": Device(165e12, 1008e9, 24e9)}                 # Ada architecture white paper, appendix A


def find_device(name: str) -> Device:
    """The entry of DEVICES, or ValueError naming those there are."""
    if name not in DEVICES:
        raise ValueError(f"device={name!r} is not known; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def pick_device(wanted: str | None) -> str:
    """`wanted`, or the best device of this machine. Raises ValueError when it is not there."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={wanted!r} cannot be used here ({str(error).splitlines()[0]}); "
                         "try --device=cpu") from None
    return wanted


def pick_dtype(wanted: str | None, device: str) -> str:
    """bfloat16 where it is native (Ampere and later; CPUs: measured), float16 on older CUDA, else float32."""
    if wanted is not None:
        return wanted
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device != "cpu":
        return "float32"
    # CPU time on one thread: unlike the clock, it does not ask who else is running. Four, as its tick may be coarse.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    low, full = (matmul_flops("cpu", dtype, 512, time.thread_time, 4) for dtype in (torch.bfloat16, torch.float32))
    torch.set_num_threads(threads)
    return "bfloat16" if low > 1.5 * full else "float32"


def matmul_flops(device: str, dtype: torch.dtype, size=1024, clock=time.perf_counter, products=1) -> float:
    """FLOP/s of a square matrix product, the best of twenty tries because others may use the machine too."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best = math.inf
    for _ in range(20):
        start = clock()
        for _ in range(products):
            torch.mm(a, b)
        best = min(best, clock() - start)
    return 2 * size ** 3 * products / best


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s that MFU is a share of: the data sheet's on a known GPU, a measured product on a CPU, None elsewhere."""
    if device == "cpu":
        return matmul_flops(device, DTYPES[dtype]) if dtype != "float16" else None
    if device.startswith("cuda") and dtype != "float32":
        name = torch.cuda.get_device_name(device)
        return next((chip.flops for key, chip in DEVICES.items() if key in name), None)
    return None


def bandwidth(device) -> float:
    """Bytes per second that a sum over far more numbers than any cache holds reads: the roof of decoding."""
    # On a GPU eight times as many: at 3 TB/s the clock's 20 µs are a fifth of 256 MB, and 1 % of 2 GB.
    numbers, times = torch.ones(2 ** (26 if torch.device(device).type == "cpu" else 29), device=device), []
    for _ in range(6):
        began = time.perf_counter()
        numbers.sum().item()
        times.append(time.perf_counter() - began)
    return numbers.numel() * numbers.element_size() / min(times)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: each step asks for the same hundred megabytes again, and mapping them anew
    page by page took a fifth of the default model's step. Elsewhere this does nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3       # the numbers are malloc.h's
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


# --- sharing the machine ---

def thread_rate(threads: int, seconds: float = 0.05) -> float:
    """Small parallel operations a second with so many threads, counted for `seconds`."""
    torch.set_num_threads(threads)
    numbers, done, began = torch.ones(2 ** 19), 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        numbers.mul_(1.0)                # one barrier each, as most operations of a training step
        done += 1
    return done / (time.perf_counter() - began)


class Threads:
    """Fewer threads while another program keeps a core busy; used as `with Threads(n) as threads`.

    Every operation ends at a barrier, where OpenMP's threads spin until the last one arrives. If that one's core is
    taken, all wait for the scheduler, thousands of times a step: steps of 80 ms became 1,700 to 4,200 ms on two cores
    beside one busy loop, and 150 with one thread. So when a step takes SLOW times the best so far, `watch` tries fewer
    threads for a moment, keeps what is fastest, and looks again later, for 1/PATIENCE of the time. Sums are split
    between threads, so their number changes bits of the training: a fixed `threads` repeats a run.
    """
    SLOW, PATIENCE = 2.5, 50

    def __init__(self, threads: int | None = None, clock=time.perf_counter, rate=thread_rate):
        self.clock, self.rate, self.before = clock, rate, torch.get_num_threads()
        self.most = self.threads = threads or self.before
        self.may_change = threads is None and self.most > 1
        self.best_seconds, self.next_look = math.inf, 0.0

    def __enter__(self):
        torch.set_num_threads(self.threads)
        if self.may_change:
            self.look()                  # a machine that is busy from the start shows no quick step to compare with
        return self

    def __exit__(self, *_):
        torch.set_num_threads(self.before)

    def watch(self, seconds: float) -> None:
        """Call this after every step with the time that it took."""
        slow = seconds > self.SLOW * self.best_seconds
        if self.threads == self.most:
            self.best_seconds = min(self.best_seconds, seconds)
        if self.may_change and (slow or self.threads < self.most) and self.clock() >= self.next_look:
            self.look()

    def look(self) -> None:
        """Try all threads and smaller numbers of them; keep all unless another number is SLOW times as fast."""
        began = self.clock()
        rates = {n: self.rate(n) for n in {self.most, self.most - 1, max(self.most // 2, 1), 1}}
        fastest = max(rates, key=rates.get)
        threads = fastest if rates[fastest] > self.SLOW * rates[self.most] else self.most
        if threads != self.threads:
            why = "the machine is free again" if threads > self.threads else "another program is busy here"
            print(f"{why}: {threads} of {self.most} threads from now on", flush=True)
        self.threads = threads
        torch.set_num_threads(threads)
        self.next_look = self.clock() + self.PATIENCE * (self.clock() - began)


# --- signals ---

class Stop:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning) into a flag; a second one acts at once."""

    def __enter__(self):
        self.signal, self.agreed, self.before = None, None, {}       # agreed: one that all ranks know of
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            with contextlib.suppress(AttributeError, ValueError):    # not on this system; not in the main thread
                self.before[getattr(signal, name)] = signal.signal(getattr(signal, name), self.catch)
        return self

    def catch(self, number, frame):
        self.signal = number
        self.__exit__()
        print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

    def __exit__(self, *_):
        while self.before:
            signal.signal(*self.before.popitem())


# --- what a CPU wants done differently; see also fused.py ---

# torch's second product with a weight as it lies in memory, oneDNN's; None where there is none.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FASTER = {}                          # (rows of x, numbers in weight), as powers of two -> whether oneDNN is faster here


def product(x, weight):
    """x @ weightᵀ; in float32 on a CPU, without gradients, by the faster of torch's two ways on this machine: that
    differs between processors (both seen), so each size is measured once a process."""
    if (ONEDNN is None or torch.is_grad_enabled() or x.device.type != "cpu" or weight.numel() <= 2 ** 16
            or not x.numel() or not x.dtype == weight.dtype == torch.float32 or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")):
        return x @ weight.T
    rows = min(x.numel() // x.shape[-1], 16)
    size = rows.bit_length(), weight.numel().bit_length()
    if size not in FASTER:
        FASTER[size] = onednn_is_faster(rows, *weight.shape)
    return ONEDNN(x, weight, None, "none", [], "") if FASTER[size] else x @ weight.T


def onednn_is_faster(rows: int, d_out: int, d_in: int) -> bool:
    """Whether oneDNN takes less time for x (rows, d_in) and weights (d_out, d_in), measured in some 20 ms."""
    d_out = min(d_out, max(1, 2 ** 21 // d_in))  # 8 MB of weights in all: they come from memory, as a model's do
    weights, x = torch.ones(max(1, 2 ** 21 // (d_out * d_in)), d_out, d_in), torch.ones(rows, d_in)
    best = {True: math.inf, False: math.inf}
    for way in (True, False) * 4:                # in turns, and the best of each: others may use the machine too
        began = time.perf_counter()
        for weight in weights:
            ONEDNN(x, weight, None, "none", [], "") if way else x @ weight.T
        best[way] = min(best[way], time.perf_counter() - began)
    return best[True] < best[False]


SHORT_CONTEXT = 512                  # positions up to which these three products beat torch's fused kernel on a CPU


def short_attention(q, k, v):
    """Causal attention with the T x T scores written out: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if H != K:
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
    q, k, v = (t.reshape(B * H, T, -1) for t in (q, k, v))
    ahead = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(ahead.expand(B * H, T, T), q, k.mT, alpha=1 / math.sqrt(D))
    return (torch.softmax(scores, dim=-1) @ v).view(B, H, T, -1)
