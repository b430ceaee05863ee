"""Kernels that read each number once, in Triton, each beside the PyTorch that says the same.

Work of fewer than about 200 FLOPs a byte (an H200's bfloat16 peak over its bandwidth) waits for memory. PyTorch runs a
formula operation by operation, and each reads its inputs from memory and writes its output back: silu(gate) * up moves
8 numbers, not 3. To fuse is to load a number once, do all the arithmetic in registers, and store the result once.

    s = sigmoid(gate)    a = gate * s         y = a * up              one kernel
    read 1, write 1      read 2, write 1      read 2, write 1         read 2, write 1

The first, SwiGLU, is explained line by line; after the last comes flash.py. They run on CUDA, and on the CPU through
Triton's interpreter if TRITON_INTERPRET=1 is set before the import; elsewhere, and in float64, PyTorch does the same.
Left out: second derivatives, ignored targets, fp8, `triton.autotune` (other tiles in each process, so other sums).
Papers: Triton (Tillet et al. 2019), SwiGLU 2002.05202, RMSNorm 1910.07467, RoPE 2104.09864, online softmax 1805.02867,
chunked linear cross entropy 2410.10989 (Liger).

    python kernels.py                        every kernel's error beside PyTorch's
    python bench.py gpu --only=kernels       their times beside eager, compiled and torch's own (CUDA)
"""
import functools
import subprocess
import sys

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr              # an argument known when the kernel is compiled
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                  # macOS, Windows, Triton before 3.4: the kernels stay text, the references run
    triton, tl, constexpr, TensorDescriptor = None, None, float, None

INTERPRET = triton is not None and bool(triton.knobs.runtime.interpret)
INTERPRETED = constexpr(INTERPRET)                     # the same, as kernels may read it
print_once = functools.cache(print)


# --- how a kernel is compiled, chosen and launched ---

def jit(fn):
    """fn compiled by Triton, or as it is without. It is compiled again for whole numbers that are 1 or multiples of 16,
    whose addresses allow wider loads; not for lengths, which change all the time."""
    return triton.jit(fn, do_not_specialize=["rows", "T", "Tq", "Tk"]) if triton else fn


def use_triton(x: Tensor) -> bool:
    """Whether x goes to a kernel; says once why it does not. float64 never does."""
    runs = triton is not None and (x.is_cuda or INTERPRET)
    if not runs and not torch.compiler.is_compiling():
        print_once("kernels.py: no kernels without CUDA and Triton 3.4 (or TRITON_INTERPRET=1); PyTorch runs instead")
    return runs and x.dtype != torch.float64


@torch.compiler.disable
def launch(kernel, grid: tuple, x: Tensor, *arguments, **constants) -> None:
    """Run one program of the kernel for each cell of the grid, on x's device, which need not be the current one."""
    if all(grid) and not isinstance(x, torch._subclasses.FakeTensor):
        with torch.cuda.device_of(x):                  # does nothing for a tensor on the CPU
            kernel[grid](x, *arguments, **constants)


def as_operator(fn):
    """fn as one operator for torch.compile, which learns its shapes by a call on FakeTensors: no data, no launch."""
    operator = torch.library.custom_op(f"kernels::{fn.__name__}", fn, mutates_args=())
    operator.register_fake(fn)
    return functools.wraps(fn)(lambda *args: operator(*args) if torch.compiler.is_compiling() else fn(*args))


# --- SwiGLU: the first kernel, one number at a time ---

def swiglu_loop(gate: np.ndarray, up: np.ndarray, block: int = 1024) -> np.ndarray:
    """The next kernel as a loop in NumPy, line by line. On a GPU the programs of the loop run side by side."""
    y, count = np.empty_like(gate), gate.size
    for program in range(-(-count // block)):          # the grid: as many programs as blocks are needed
        i = program * block + np.arange(block)         # which numbers this program works on
        i = i[i < count]                               # the mask: the last block is not full
        g, u = gate[i], up[i]                          # load
        y[i] = g / (1 + np.exp(-g)) * u                # all the arithmetic; store
    return y


@jit
def _swiglu_forward(gate, up, y, count, BLOCK: constexpr):
    """y = gate sigmoid(gate) up. gate, up, y: addresses of the first of `count` numbers, in any float dtype."""
    program = tl.program_id(0)                                     # which program of the grid this is: 0, 1, 2, …
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)         # its BLOCK indices; int64 for 2^31 numbers and more
    mask = i < count                                               # false past the end: not read there, not written
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)     # gate + i: BLOCK addresses; arithmetic in float32
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u                                 # in registers; nothing goes to memory between
    tl.store(y + i, result.to(y.dtype.element_ty), mask=mask)      # rounded once, to y's dtype


@jit
def load(address, mask):
    """The numbers there in float32; 0 where the mask is false."""
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@jit
def _swiglu_backward(gate, up, dy, dgate, dup, count, BLOCK: constexpr):
    """With s = sigmoid(gate): dup = dy gate s;  dgate = dy up s (1 + gate (1 - s))."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    g, u, grad = load(gate + i, mask), load(up + i, mask), load(dy + i, mask)
    s = tl.sigmoid(g)                                              # computed again: cheaper than storing and loading it
    tl.store(dup + i, (grad * g * s).to(dup.dtype.element_ty), mask=mask)
    tl.store(dgate + i, (grad * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=mask)


class SwiGLU(torch.autograd.Function):
    """The launches: a grid of count / 2048 programs, rounded up; each has 8 warps of 32 threads, of 8 numbers each."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        y, count = torch.empty_like(gate), gate.numel()
        launch(_swiglu_forward, (triton.cdiv(count, 2048),), gate, up, y, count, BLOCK=2048, num_warps=8)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate, up), dy, count = ctx.saved_tensors, dy.contiguous(), dy.numel()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        launch(_swiglu_backward, (triton.cdiv(count, 2048),), gate, up, dy, dgate, dup, count, BLOCK=2048, num_warps=8)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of a SwiGLU layer (2002.05202, eq. 6). 3 numbers moved for 6 FLOPs, backward 5."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu takes one shape and dtype, not {gate.shape} {gate.dtype} and {up.shape} {up.dtype}")
    return SwiGLU.apply(gate.contiguous(), up.contiguous()) if use_triton(gate) else gate * torch.sigmoid(gate) * up


# --- matrix product: load a number once, use it many times ---
#
#                       b  . . [b] . .      One program makes one tile of c. It walks along K, in each step loads one
#                          . . [b] . .      tile of a and one of b, and adds their product to sums in registers.
#       [a][a][a] ->       . . [c] . .  c   A step loads 2 · 64 · 32 numbers for 64 · 64 · 32 products, 32 a number;
#     a  .  .  .           . . . . .        without tiles it would be half a product a number.

@jit
def dot(a, b, acc):
    """acc + a @ b of two tiles, summed in float32. "ieee": float32 tiles are not rounded to TF32's ten bits."""
    if INTERPRETED:                                    # it keeps bfloat16 as 16-bit whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _matmul(a, b, c, M, N, K, a_row, a_col, b_row, b_col, BLOCK: constexpr, BLOCK_K: constexpr):
    """One BLOCK x BLOCK tile of c (M, N) = a (M, K) b (K, N). a_row: how many numbers apart two rows of a are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]         # (BLOCK, 1)
    col = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]         # (1, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K).to(tl.int64)
        a_tile = tl.load(a + row * a_row + k[None, :] * a_col, mask=(row < M) & (k[None, :] < K), other=0.0)
        b_tile = tl.load(b + k[:, None] * b_row + col * b_col, mask=(k[:, None] < K) & (col < N), other=0.0)
        acc = dot(a_tile, b_tile, acc)
    tl.store(c + row * N + col, acc.to(c.dtype.element_ty), mask=(row < M) & (col < N))


class MatMul(torch.autograd.Function):
    """The gradients of a product are two products: da = dc bᵀ, db = aᵀ dc. Transposed views are not copied."""
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        (M, K), N = a.shape, b.shape[1]
        c = a.new_empty(M, N)
        launch(_matmul, (triton.cdiv(M, 64), triton.cdiv(N, 64)), a, b, c, M, N, K, *a.stride(), *b.stride(),
               BLOCK=64, BLOCK_K=32, num_warps=4, num_stages=3)        # tiles of three steps are on their way at once
        return c

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        return MatMul.apply(dc, b.T), MatMul.apply(a.T, dc)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N) in their one dtype, summed in float32. To read: torch's own is faster."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(f"matmul takes (M, K) and (K, N) of one dtype, not {a.shape} {a.dtype}, {b.shape} {b.dtype}")
    return MatMul.apply(a, b) if use_triton(a) else a @ b


# --- RMSNorm: a row a program ---

@jit
def _rms_forward(x, weight, y, eps, N: constexpr, N_PAD: constexpr):
    """y = x / sqrt(mean(x²) + eps) * weight of one row of x and y (rows, N), whole in registers. weight (N,)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N_PAD)
    values, w = load(x + row * N + i, i < N), load(weight + i, i < N)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)    # zeros past the end add nothing to the sum
    tl.store(y + row * N + i, (values * scale * w).to(y.dtype.element_ty), mask=i < N)


@jit
def _rms_backward(x, weight, dy, dx, dweight, rows, eps, N: constexpr, N_PAD: constexpr, SPAN: constexpr):
    """dx of SPAN rows, and what they add to dweight, in the program's own row of dweight (programs, N): if all added to
    one row, the order, hence the rounding, would change from run to run. PyTorch sums the rows."""
    i = tl.arange(0, N_PAD)
    w = load(weight + i, i < N)
    dw = tl.zeros((N_PAD,), tl.float32)
    first = tl.program_id(0) * SPAN
    for index in range(first, tl.minimum(first + SPAN, rows)):
        row = tl.cast(index, tl.int64)
        values, grad = load(x + row * N + i, i < N), load(dy + row * N + i, i < N)
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
        u = values * scale
        dw += grad * u
        grad = grad * w
        grad = scale * (grad - u * (tl.sum(grad * u, axis=0) / N))
        tl.store(dx + row * N + i, grad.to(dx.dtype.element_ty), mask=i < N)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * N + i, dw, mask=i < N)


class RMSNorm(torch.autograd.Function):
    """The launches of rms_norm; x is contiguous, (rows, N)."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        y, (rows, N), n_pad = torch.empty_like(x), x.shape, triton.next_power_of_2(x.shape[1])
        ctx.eps, ctx.sizes = eps, dict(N=N, N_PAD=n_pad, num_warps=min(max(n_pad // 256, 1), 8))   # 8 numbers a thread
        launch(_rms_forward, (rows,), x, weight, y, eps, **ctx.sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), dy, rows, span = ctx.saved_tensors, dy.contiguous(), len(dy), 32
        dx, dweight = torch.empty_like(x), x.new_empty(triton.cdiv(rows, span), x.shape[1], dtype=torch.float32)
        launch(_rms_backward, (len(dweight),), x, weight, dy, dx, dweight, rows, ctx.eps, SPAN=span, **ctx.sizes)
        return dx, dweight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in float32. x (..., N), weight (N,), N up to 65,536.
    With u = x / the root and g = dy weight, dx = (g - u mean(g u)) / the root, and dweight is the sum of dy u over the
    rows. 2 numbers moved for 4 FLOPs, backward 3 for 10."""
    if weight.shape != x.shape[-1:] or x.shape[-1] > 65536:
        raise ValueError(f"rms_norm takes x (..., N) and weight (N,), N up to 65536, not {x.shape} and {weight.shape}")
    if use_triton(x):
        return RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), eps).view(x.shape)
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


# --- RoPE: pairs of numbers ---

@jit
def _rope(x, y, cos, sin, T, SIGN: constexpr, HALF: constexpr, HALF_PAD: constexpr, INTERLEAVED: constexpr,
          BLOCK: constexpr):
    """BLOCK positions of one head, by SIGN times the angle. x, y (heads, T, 2 HALF); cos, sin (T, HALF)."""
    head = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, HALF_PAD)[None, :]
    mask = (t < T) & (i < HALF)
    c, s = load(cos + t * HALF + i, mask), SIGN * load(sin + t * HALF + i, mask)
    first = (head * T + t) * (2 * HALF) + (2 * i if INTERLEAVED else i)
    second = first + (1 if INTERLEAVED else HALF)
    a, b = load(x + first, mask), load(x + second, mask)
    tl.store(y + first, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
    tl.store(y + second, (a * s + b * c).to(y.dtype.element_ty), mask=mask)


def launch_rope(x, cos, sin, interleaved, sign):
    """x (B, H, T, D) turned by sign times the angles."""
    (B, H, T, D), x = x.shape, x.contiguous()
    y, block = torch.empty_like(x), max(1, 2048 // triton.next_power_of_2(D))
    launch(_rope, (B * H, triton.cdiv(T, block)), x, y, cos, sin, T, SIGN=sign, HALF=D // 2,
           HALF_PAD=triton.next_power_of_2(D // 2), INTERLEAVED=interleaved, BLOCK=block)
    return y


class RoPE(torch.autograd.Function):
    """The gradient is the rotation by minus the angle, so only the tables are saved."""
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return launch_rope(x, cos, sin, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return launch_rope(dy, *ctx.saved_tensors, ctx.interleaved, -1), None, None, None


def turned(x, cos, sin, interleaved):
    """The same in PyTorch: each pair (a, b) becomes (a cos - b sin, a sin + b cos)."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, K, T, D), D even, with rotary positions (2104.09864, eq. 34). cos, sin: (T, D/2), as
    layers.rope_tables makes them. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved. 2 numbers for 3 FLOPs."""
    for x in (q, k):
        if x.dim() != 4 or x.shape[-1] % 2 or not cos.shape == sin.shape == (x.shape[-2], x.shape[-1] // 2):
            raise ValueError("apply_rope takes q (B, H, T, D), k (B, K, T, D), D even, and tables (T, D/2), not "
                             f"{q.shape}, {k.shape}, {cos.shape} and {sin.shape}")
    turn, cos, sin = RoPE.apply if use_triton(q) else turned, cos.contiguous(), sin.contiguous()
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


# --- cross entropy: a row in pieces, softmax in one pass ---

PIECES = dict(BLOCK=64 if INTERPRET else 4096, num_warps=4)        # short pieces, so that a test's rows have several


@jit
def _log_sum_exp(logits, lse, V, BLOCK: constexpr):
    """log of the sum of exp(number) of one row, read once (1805.02867, algorithm 3). logits (rows, V), lse (rows,).
    m is the largest number so far, l the sum of exp(number - m); a larger m shrinks l by exp(old m - new m). Pieces
    (1, 3) and (5): first m = 3, l = e^-2 + 1; then m = 5, l = (e^-2 + 1) e^-2 + 1, as if 5 had been known before."""
    row = tl.program_id(0).to(tl.int64)
    m, l = tl.full((), -3e38, tl.float32), tl.zeros((), tl.float32)      # not -inf, as -inf - -inf is NaN
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        piece = tl.load(logits + row * V + i, mask=i < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(piece, axis=0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(piece - m_new), axis=0)
        m = m_new
    tl.store(lse + row, tl.log(l) + m)


@jit
def _cross_entropy_backward(logits, dlogits, targets, lse, factor, V, BLOCK: constexpr):
    """BLOCK numbers of one row: dlogits = (softmax(logits) - onehot(target)) factor, one number for all."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = tl.exp(load(logits + row * V + i, i < V) - tl.load(lse + row))
    grad = (p - tl.where(i == tl.load(targets + row), 1.0, 0.0)) * tl.load(factor)
    tl.store(dlogits + row * V + i, grad.to(dlogits.dtype.element_ty), mask=i < V)


@as_operator
def log_sum_exp(logits: Tensor) -> Tensor:
    """(N,) in float32 of contiguous logits (N, V): a row's loss is that less the target's logit."""
    if not use_triton(logits):
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1)
    lse = logits.new_empty(len(logits), dtype=torch.float32)
    launch(_log_sum_exp, (len(logits),), logits, lse, logits.shape[1], **PIECES)
    return lse


@as_operator
def logits_gradient(logits: Tensor, targets: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """(softmax - onehot) * factor of each row of contiguous logits (N, V), in their dtype. factor: (), float32."""
    if not use_triton(logits):
        grad = (logits - lse[:, None]).exp_()
        grad[torch.arange(len(grad), device=grad.device), targets] -= 1
        return grad.mul_(factor).to(logits.dtype)
    (N, V), dlogits, targets = logits.shape, torch.empty_like(logits), targets.contiguous()
    grid = (N, triton.cdiv(V, PIECES["BLOCK"]))
    launch(_cross_entropy_backward, grid, logits, dlogits, targets, lse, factor, V, **PIECES)
    return dlogits


class CrossEntropy(torch.autograd.Function):
    """The mean over rows; logits are contiguous."""
    @staticmethod
    def forward(ctx, logits, targets):
        lse = log_sum_exp(logits)
        ctx.save_for_backward(logits, targets, lse)
        return (lse - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, lse = ctx.saved_tensors
        return logits_gradient(logits, targets, lse, dloss / len(logits)), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] in nats, float32. logits (..., V), targets (...). 1 number, 5 FLOPs."""
    if targets.shape != logits.shape[:-1] or targets.is_floating_point():
        raise ValueError(f"targets must be ids of shape {logits.shape[:-1]}, not {targets.dtype} {targets.shape}")
    return CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]).contiguous(), targets.flatten().long())


# --- linear + cross entropy: logits that never exist all at once ---

class LinearCrossEntropy(torch.autograd.Function):
    """Mean loss of the logits x weightᵀ, a chunk of rows at a time (2410.10989, section 3.2).
    What comes back from the loss is one number, a factor of everything: so dx and dweight are made in the forward pass,
    while a chunk's logits are there. They are gradients of the sum, and backward divides by N, in float32: of
    (softmax - onehot) / 16,384 most is below float16's smallest number, lost before a loss scale could save it."""
    @staticmethod
    def forward(ctx, x, weight, targets, chunk):               # (N, C), (V, C), (N,)
        wide = torch.promote_types(x.dtype, torch.float32)
        total, dx, dweight = x.new_zeros((), dtype=wide), torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            logits = x[rows] @ weight.T                            # (chunk, V), the largest tensor alive
            lse = log_sum_exp(logits)
            total += (lse - logits.gather(1, targets[rows, None])[:, 0]).sum()
            dlogits = logits_gradient(logits, targets[rows], lse, torch.ones_like(total))
            dx[rows] = dlogits @ weight
            if x.is_cuda and x.dtype != wide:                      # never rounded to float16, which ends at 65,504
                dweight += torch.mm(dlogits.T, x[rows], out_dtype=wide)
            else:
                dweight += dlogits.T.to(wide) @ x[rows].to(wide)
        ctx.save_for_backward(dx, dweight)
        return total / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        factor = dloss / len(dx)
        return (dx.to(dweight.dtype) * factor).to(dx.dtype), (dweight * factor).to(dx.dtype), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """cross_entropy(x @ weightᵀ, targets) without ever holding all (tokens, V) logits: 6.6 GB in bfloat16, twice, for
    64 x 1,024 tokens of GPT-2's vocabulary. x: (..., C), weight: (V, C), targets: (...). chunk_tokens: rows of logits
    alive at a time; not given, as many as fill 1 GB on CUDA, 32 MB elsewhere."""
    fits = targets.shape == x.shape[:-1] and not targets.is_floating_point() and weight.shape[1:] == x.shape[-1:]
    if not fits or (chunk_tokens or 1) < 1:
        raise ValueError(f"linear_cross_entropy takes x (..., C), weight (V, C), ids (...), chunk_tokens above 0, not "
                         f"{x.shape}, {weight.shape}, {targets.dtype} {targets.shape}, {chunk_tokens}")
    chunk = chunk_tokens or max(128, 2 ** (30 if x.is_cuda else 25) // (len(weight) * x.element_size()))
    with torch.autocast(x.device.type, enabled=False):             # x comes in the dtype that it wants
        return LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight.to(x.dtype), targets.flatten().long(), chunk)


if __name__ == "__main__":
    bench = __file__.replace("kernels.py", "bench.py")
    sys.exit(subprocess.call([sys.executable, bench, "kernels", "--page=kernels", *sys.argv[1:]]))
