"""What this machine is and does fastest: devices, dtypes, peaks, threads, signals; and what a CPU wants differently.

A GPU's figures come from its data sheet, a CPU's are measured when they are needed:

    mfu = FLOP/s of the training step / peak_flops(device, dtype)        (PaLM, 2204.02311, appendix B)
    tokens/s of decoding <= bandwidth(device) / bytes of the weights     (each token reads every weight once)

The last section holds an operation that a CPU does faster in another form, equal to the simple one by test.
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
    memory_bytes: float


DEVICES = {                          # NVIDIA's data sheets, SXM; FLOPs printed there with sparsity are halved
    "V100": Device(125e12, 32e9), "A100": Device(312e12, 80e9), "H100": Device(989e12, 80e9),
    "H200": Device(989e12, 141e9), "L40S": Device(362e12, 48e9), "B200": Device(2250e12, 180e9),
    "RTX 4090": Device(165e12, 24e9)}                         # Ada architecture white paper, appendix A


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                       # and CPU time: unlike the clock, it does not ask who else is running
    low, full = (matmul_flops(dtype, 512, time.thread_time) for dtype in (torch.bfloat16, torch.float32))
    torch.set_num_threads(threads)
    return "bfloat16" if low > 1.5 * full else "float32"


def least_seconds(work, clock=time.perf_counter) -> float:
    """The least that work() takes in ten tries: others may use the machine too."""
    times = []
    for _ in range(10):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def matmul_flops(dtype: torch.dtype, size=1024, clock=time.perf_counter) -> float:
    """FLOP/s of a square matrix product on the CPU; four of them, as the clock's tick may be coarse."""
    a = b = torch.ones(size, size, dtype=dtype)      # not random: a resumed run would then draw other numbers
    return 4 * 2 * size ** 3 / least_seconds(lambda: [torch.mm(a, b) for _ in range(4)], clock)


def peak_flops(device: str, dtype: str) -> float | None:
    """FLOP/s that MFU is a share of: the data sheet's on a known GPU, a measured product on a CPU, None elsewhere."""
    if device == "cpu":
        return matmul_flops(DTYPES[dtype]) if dtype != "float16" else None
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") and dtype != "float32" else ""
    return next((chip.flops for key, chip in DEVICES.items() if key in name), None)


def bandwidth(device) -> float:
    """Bytes per second that a sum over 256 MB (on a GPU 2 GB) reads: decoding's roof, if no cache holds the weights."""
    numbers = torch.ones(2 ** (26 if torch.device(device).type == "cpu" else 29), device=device)
    return 4 * len(numbers) / least_seconds(lambda: numbers.sum().item())


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: each step asks for the same memory again, and mapping it anew page by page
    took 5 % of the default model's step, and half of one of 8,192 tokens."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)                  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-1, (1 << 31) - 1)


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
    taken, all wait for the scheduler: steps of 80 ms became 1,700 to 4,200 on two cores beside one busy loop, and 150
    with one thread. So when a step takes SLOW times the best so far, `watch` tries fewer threads, keeps the fastest
    number, and looks again later, for 1/PATIENCE of the time. The number changes bits of the training, as sums are
    split between threads: a fixed `threads` repeats a run.
    """
    SLOW, PATIENCE = 2.5, 50

    def __init__(self, threads: int | None = None, clock=time.perf_counter, rate=thread_rate):
        self.clock, self.rate, self.before = clock, rate, torch.get_num_threads()
        self.most = self.threads = threads or self.before
        self.may_change = threads is None and self.most > 1
        self.best_seconds, self.next_look, self.sure = math.inf, 0.0, False

    def __enter__(self):
        torch.set_num_threads(self.threads)
        self.watch(math.inf)             # a machine that is busy from the start shows no quick step to compare with,
        return self                      # so `watch` looks once more while it trains before it is sure of one

    def __exit__(self, *_):
        torch.set_num_threads(self.before)

    def watch(self, seconds: float) -> None:
        """Call this after every step with the time that it took."""
        if not self.may_change:
            return
        fewer, began = self.threads < self.most, self.clock()
        if (fewer or seconds > self.SLOW * self.best_seconds or not self.sure) and began >= self.next_look:
            rates = {n: self.rate(n) for n in {self.most, self.most - 1, max(self.most // 2, 1), 1}}
            fastest = max(rates, key=rates.get)
            threads = fastest if rates[fastest] > self.SLOW * rates[self.most] else self.most
            if threads != self.threads:
                why = "the machine is free again" if fewer else "another program is busy here"
                print(f"{why}: {threads} of {self.most} threads from now on", flush=True)
            self.threads, self.sure = threads, seconds < math.inf
            torch.set_num_threads(threads)
            self.next_look = self.clock() + self.PATIENCE * (self.clock() - began)
        elif not fewer:
            self.best_seconds = min(self.best_seconds, seconds)


# --- signals ---

class Stop:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning) into a flag; a second one acts at once."""

    def __enter__(self):
        self.signal, self.agreed, self.before = None, None, {}       # agreed: one that all ranks know of
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            with contextlib.suppress(AttributeError, ValueError):    # not on this system; not in the main thread
                self.before[name] = signal.signal(getattr(signal, name), self.catch)
        return self

    def catch(self, number, frame):
        self.signal = number
        self.__exit__()
        print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)


# --- what a CPU wants done differently; see also fused.py ---

SHORT_CONTEXT = 512                  # positions up to which plain products beat torch's fused kernel on a CPU


def short_attention(q, k, v):
    """Causal attention with the T x T scores written out: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if H != K:
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
    q, k, v = (t.reshape(B * H, T, t.shape[-1]) for t in (q, k, v))
    ahead = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(ahead.expand(B * H, T, T), q, k.mT, alpha=1 / math.sqrt(D))
    return (torch.softmax(scores, dim=-1) @ v).view(B, H, T, v.shape[-1])
