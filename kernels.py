"""Triton kernels for what a language model spends its time on, each beside the few lines of PyTorch that say the same.

A GPU has two limits: how many multiplications a second, and how many bytes a second its memory delivers. Whatever does
less than about 200 FLOPs for each byte (an H200's bfloat16 peak over its bandwidth) waits for memory, and gets faster
only by moving fewer bytes: that is all that fusing means. A matrix product reuses each tile it has loaded, so it is
bound by arithmetic. Attention is a matrix product, a softmax and another product, and the T x T matrix between them
would make it wait for memory; FlashAttention keeps that matrix on the chip, a tile at a time.

Read matmul first (tiles, L2 grouping, autotuning: the lesson), then FlashAttention-2 in plain PyTorch, then in Triton.

Where they run: on CUDA; on the CPU through Triton's interpreter when TRITON_INTERPRET=1 is set before this file is
imported (slow, exact, for tests); elsewhere the PyTorch reference takes over and says so in one line.

Left out: dropout, arbitrary masks, second derivatives, fp8, and Hopper's own TMA, which would hide the algorithm.

Papers: FlashAttention 2205.14135, FlashAttention-2 2307.08691, online softmax 1805.02867, RMSNorm 1910.07467,
SwiGLU 2002.05202, RoPE 2104.09864, chunked linear cross entropy 2410.10989 (Liger), split-K decoding 2311.01282.

    python kernels.py                         every kernel against float64; on CUDA also the benchmarks, into results/
    python kernels.py profile config_x.py     where the time of one training step goes
"""
import contextlib
import functools
import math
import os
import sys

import torch
from torch import Tensor

if __name__ == "__main__" and sys.argv[1:2] != ["profile"] and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when a kernel is decorated, hence before the import
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr              # an argument that a kernel is compiled for: a value, a kernel
except ImportError:                                    # macOS, Windows: the kernels stay text, the references run
    triton, constexpr = None, float

INTERPRET = triton is not None and bool(triton.knobs.runtime.interpret)
LOG2E = constexpr(math.log2(math.e))                   # exp(x) = 2^(x log2 e), and 2^x is one instruction


# --- plumbing: decorating, choosing, launching ---

def jit(fn=None, **options):
    """triton.jit, or nothing where Triton is missing."""
    if fn is None:
        return functools.partial(jit, **options)
    return triton.jit(fn, **options) if triton else fn


def autotuned(key, small, large):
    """Decorate a kernel to be timed with each tile in `large` at the first call for each value of `key`, the best kept.

    A tile is (block sizes by name, warps, pipeline stages). The interpreter takes `small`: uneven blocks, so that
    a test of 130 tokens crosses every kind of border. A tile that does not fit the chip's shared memory is
    dropped by Triton itself.
    """
    def decorate(fn):
        if triton is None:
            return fn
        tiles = [(small, 4, 1)] if INTERPRET else large
        configs = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in tiles]
        return triton.autotune(configs=configs, key=key, prune_configs_by={"early_config_prune": fitting})(fn)
    return decorate


def fitting(configs, arguments, **constants):
    """The tiles worth timing. R rows of a padded head of D numbers are R x D float32 sums in the warps' registers; past
    16,384 for 4 warps they spill. IEEE float32 products hold their inputs there too: eight times earlier, and the
    worst of those that spill take ten seconds to compile."""
    exact = constants.get("PRECISION") == "ieee"
    def cost(config):
        rows = max(size for name, size in config.kwargs.items() if name.startswith("BLOCK"))
        return rows * constants.get("D_PAD", 32) * (8 if exact else 4 / config.num_warps)
    return [config for config in configs if cost(config) <= 128 * 128] or [min(configs, key=cost)]


@functools.cache
def announce(reason: str) -> None:
    print(f"kernels.py: {reason}; the PyTorch references take over", flush=True)


def use_triton(x: Tensor) -> bool:
    """Whether x goes to a kernel; says once why it does not. float64 never does."""
    if x.dtype == torch.float64:
        return False
    if triton is not None and (x.is_cuda or INTERPRET):
        return True
    if not torch.compiler.is_compiling():
        announce("Triton is not installed" if triton is None else
                 f"no kernel runs on {x.device.type} (TRITON_INTERPRET=1, set before the import, interprets them)")
    return False


def launch(kernel, grid, x, *arguments, **constants):
    """Run `grid` programs of a kernel on x's device, which need not be the current one. An empty grid runs nothing."""
    if not isinstance(x, torch._subclasses.FakeTensor) and (callable(grid) or grid[0]):
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[grid](*arguments, **constants)


def opaque(fn):
    """fn as a single operator under torch.compile, whose tracer should not look into a launch; else fn itself.

    What shapes fn gives torch.compile learns by calling it with tensors without data, for which `launch` does nothing.
    """
    operator = torch.library.custom_op(f"kernels::{fn.__name__}", fn, mutates_args=())
    operator.register_fake(fn)
    return functools.wraps(fn)(lambda *arguments: (operator if torch.compiler.is_compiling() else fn)(*arguments))


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two from n and `least` up: power_of_2(80) = 128. Triton's tiles have such sides."""
    return max(least, 1 << max(int(n) - 1, 0).bit_length())


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; 2 for the interpreter, so that the loops over blocks do loop."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def rows_of(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N), contiguous; copied only when it has to be."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


@jit
def _tile(base, start, stride, count, ROWS: constexpr, WIDTH: constexpr, PADDED: constexpr, CHECK: constexpr):
    """Rows start … start + ROWS of a (count, WIDTH) matrix as a (ROWS, PADDED) tile; what lies outside is zero.

    The offset of `start` is 64-bit: T x stride passes 2^31 in long contexts. Within the tile 32 bits do.
    CHECK is off where the caller knows that the rows exist: an unmasked load is one vector instruction.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (row * stride + column)
    if CHECK:
        tile = tl.load(pointers, mask=(start + row < count) & (column < WIDTH), other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=column < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@jit
def _put(base, start, stride, count, value, ROWS: constexpr, WIDTH: constexpr, PADDED: constexpr):
    """Store the part of a (ROWS, PADDED) tile that lies inside a (count, WIDTH) matrix, in its dtype."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (row * stride + column)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(start + row < count) & (column < WIDTH))


@jit
def _dot(a, b, acc, PRECISION: constexpr):
    """acc + a @ b, summed in float32. See dot_precision for PRECISION."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


def dot_precision(x: Tensor) -> str:
    """How tl.dot multiplies: float32 as IEEE (Triton's own default is TF32, ten bits), half precision on tensor cores.

    The interpreter keeps bfloat16 as 16-bit integers and would multiply those, hence "upcast" there.
    """
    if x.dtype == torch.float32:
        return "ieee"
    return "upcast" if INTERPRET else "tf32"


# --- matrix product: the lesson ---

MATMUL_TILES = [({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages) for m, n, k, warps, stages in (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 4, 4), (64, 128, 32, 4, 4),
    (64, 64, 32, 4, 3), (32, 64, 32, 4, 3))]


@autotuned(["M", "N", "K", "PRECISION"], {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}, MATMUL_TILES)
@jit
def _matmul(a, b, c, M, N, K, a_row, a_col, b_row, b_col, c_row, PRECISION: constexpr, GROUP: constexpr,
            BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """One program computes one BLOCK_M x BLOCK_N tile of c (M, N) = a (M, K) b (K, N), walking along K.

    Programs run in about the order of their numbers. Row by row, a wave of them would read all of b for a few rows of
    a; taken in bands of GROUP rows of tiles, the wave covers a near-square patch of c, whose a and b fit in L2.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    band = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)                          # the last band may be lower
    tile_m = band * GROUP + (pid % (GROUP * tiles_n)) % height
    tile_n = (pid % (GROUP * tiles_n)) // height
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    inner = tl.arange(0, BLOCK_K).to(tl.int64)
    a_pointers = a + row * a_row + inner[None, :] * a_col                       # (BLOCK_M, BLOCK_K)
    b_pointers = b + inner[:, None] * b_row + column * b_col                    # (BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a_tile = tl.load(a_pointers, mask=(row < M) & (inner[None, :] < K - k0), other=0.0)
        b_tile = tl.load(b_pointers, mask=(inner[:, None] < K - k0) & (column < N), other=0.0)
        acc = _dot(a_tile, b_tile, acc, PRECISION)
        a_pointers += BLOCK_K * a_col
        b_pointers += BLOCK_K * b_row
    tl.store(c + row * c_row + column, acc.to(c.dtype.element_ty), mask=(row < M) & (column < N))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N), summed in float32, in a's dtype; transposed views are read in place. Forward only.

    2MNK FLOPs over at least (MK + KN + MN) elements: from a few hundred rows up bound by arithmetic. A tile makes
    BLOCK_M BLOCK_N products for each BLOCK_M + BLOCK_N numbers loaded, which is why tiles are large and square.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(f"matmul takes (M, K) and (K, N) of one dtype, not {tuple(a.shape)} {a.dtype} "
                         f"and {tuple(b.shape)} {b.dtype}")
    if not use_triton(a):
        return a @ b
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N)
    launch(_matmul, lambda tile: (-(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]),), a, a, b, c, M, N, K,
           *a.stride(), *b.stride(), c.stride(0), PRECISION=dot_precision(a), GROUP=8)
    return c


# --- FlashAttention-2 in PyTorch: the algorithm to read ---

def attention_reference(q, k, v, is_causal=False, window=None):
    """softmax(q kᵀ / √D) v with the whole score matrix in memory: what the tiled versions must equal."""
    group = check_attention(q, k, v, is_causal, window)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    seen = visible(torch.arange(q.shape[-2], device=q.device), torch.arange(k.shape[-2], device=q.device),
                   k.shape[-2] - q.shape[-2], is_causal, window)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~seen, torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1).masked_fill(~seen, 0.0) @ v


def visible(rows, columns, shift, is_causal, window):
    """Which key each query sees, (rows, columns) of bool. `shift` is Tk - Tq: the last query sees the last key."""
    distance = (rows[:, None] + shift) - columns[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen


def check_attention(q, k, v, is_causal, window) -> int:
    """Query heads per key/value head. Raises ValueError for shapes, dtypes or windows that make no sense."""
    if min(q.dim(), k.dim()) < 2 or q.dim() != k.dim() or k.shape != v.shape:
        raise ValueError(f"attention takes q (..., T, D) and k, v (..., Tk, D) of one rank, not {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1] or not q.shape[-1]:
        raise ValueError(f"head width {q.shape[-1]} of q must be that of k and v, {k.shape[-1]}, and at least 1")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if window is not None and not (is_causal and isinstance(window, int) and window >= 1):
        raise ValueError(f"window={window!r} must be a whole number of at least 1, and needs is_causal=True")
    query_heads, key_heads = (1, 1) if q.dim() == 2 else (q.shape[-3], k.shape[-3])
    if q.shape[:-3] != k.shape[:-3] or (query_heads != key_heads and (not key_heads or query_heads % key_heads)):
        raise ValueError(f"k and v must have q's leading dimensions {tuple(q.shape[:-2])}, or a divisor of the last of "
                         f"them (grouped queries), not {tuple(k.shape[:-2])}")
    return query_heads // key_heads if key_heads else 1


TILE = 64


def flash_forward_tiled(q, k, v, is_causal, window):
    """(o, L) by FlashAttention-2's forward pass (2307.08691, algorithm 1). L (..., Tq): log of the sum of exp(scores).

    For a tile of queries, walk over the tiles of keys holding three things: the largest score so far m, the sum l of
    exp(score - m), and the sum acc of exp(score - m) v. When a new tile raises m, both sums shrink by exp(old - new):
    the result is exact, and no more than TILE x TILE scores ever exist. Tiles that no query sees are never touched.
    """
    group, (Tq, D), Tk = check_attention(q, k, v, is_causal, window), q.shape[-2:], k.shape[-2]
    shift, dtype = Tk - Tq, torch.float64 if q.dtype == torch.float64 else torch.float32
    n = math.prod(k.shape[:-2])
    # The query heads of a group are so many more rows against one key/value head: nothing is repeated.
    q4, k3, v3 = q.reshape(n, group, Tq, D).to(dtype), k.reshape(n, Tk, D).to(dtype), v.reshape(n, Tk, D).to(dtype)
    o, lse = torch.zeros_like(q4), q4.new_full(q4.shape[:-1], -math.inf)
    for rows, tiles in tile_pairs(Tq, Tk, is_causal, window, q.device):
        q_tile = q4[:, :, rows].flatten(1, 2) / math.sqrt(D)                    # (n, group * rows, D)
        m, l = q_tile.new_full(q_tile.shape[:-1], -math.inf), q_tile.new_zeros(q_tile.shape[:-1])
        acc = torch.zeros_like(q_tile)
        for columns, mask in tiles:
            s = (q_tile @ k3[:, columns].mT).masked_fill(~mask.repeat(group, 1), -math.inf)
            m_new = torch.maximum(m, s.amax(dim=-1))
            m_safe = m_new.masked_fill(m_new == -math.inf, 0.0)                 # -inf - -inf would be NaN
            p, shrink = torch.exp(s - m_safe[..., None]), torch.exp(m - m_safe)
            l, acc, m = l * shrink + p.sum(dim=-1), acc * shrink[..., None] + p @ v3[:, columns], m_new
        o[:, :, rows] = (acc / l.masked_fill(l == 0, 1.0)[..., None]).view_as(o[:, :, rows])
        lse[:, :, rows] = (m + l.log()).view_as(lse[:, :, rows])
    return o.to(q.dtype).reshape(q.shape), lse.reshape(q.shape[:-1])


def flash_backward_tiled(q, k, v, o, lse, do, is_causal, window):
    """(dq, dk, dv) by FlashAttention-2's backward pass (algorithm 2), with P = exp(S - L) computed again tile by tile.

    dV = Pᵀ dO;  dP = dO Vᵀ;  dS = P ∘ (dP - delta) with delta = rowsum(dO ∘ O);  dQ = dS K / √D;  dK = dSᵀ Q / √D.
    """
    (Tq, D), Tk, n = q.shape[-2:], k.shape[-2], math.prod(k.shape[:-2])
    group, dtype = math.prod(q.shape[:-2]) // n if n else 1, lse.dtype
    q4, o4, do4 = (t.reshape(n, group, Tq, D).to(dtype) for t in (q, o, do))
    k3, v3, lse3 = k.reshape(n, Tk, D).to(dtype), v.reshape(n, Tk, D).to(dtype), lse.reshape(n, group, Tq)
    delta = (do4 * o4).sum(dim=-1)
    dq, dk, dv = torch.zeros_like(q4), torch.zeros_like(k3), torch.zeros_like(v3)
    for rows, tiles in tile_pairs(Tq, Tk, is_causal, window, q.device):
        q_tile, do_tile = q4[:, :, rows].flatten(1, 2) / math.sqrt(D), do4[:, :, rows].flatten(1, 2)
        row_lse, row_delta = lse3[:, :, rows].flatten(1)[..., None], delta[:, :, rows].flatten(1)[..., None]
        row_lse = row_lse.masked_fill(row_lse == -math.inf, 0.0)
        dq_tile = torch.zeros_like(q_tile)
        for columns, mask in tiles:
            s = (q_tile @ k3[:, columns].mT).masked_fill(~mask.repeat(group, 1), -math.inf)
            p = torch.exp(s - row_lse)
            ds = p * (do_tile @ v3[:, columns].mT - row_delta)
            dv[:, columns] += p.mT @ do_tile
            dk[:, columns] += ds.mT @ q_tile
            dq_tile += ds @ k3[:, columns] / math.sqrt(D)
        dq[:, :, rows] = dq_tile.view_as(dq[:, :, rows])
    return tuple(d.to(t.dtype).reshape(t.shape) for d, t in ((dq, q), (dk, k), (dv, v)))


def tile_pairs(Tq, Tk, is_causal, window, device):
    """For each slice of queries, the slices of keys that any of them sees, each with its (rows, columns) mask."""
    every_row, every_column = torch.arange(Tq, device=device), torch.arange(Tk, device=device)
    for i in range(0, Tq, TILE):
        last = min(i + TILE, Tq) - 1 + Tk - Tq                                  # the last key of the last query
        end = min(Tk, last + 1) if is_causal else Tk
        first = 0 if window is None else max(0, i + Tk - Tq - window + 1)       # the first key of the first query
        rows, starts = slice(i, min(i + TILE, Tq)), range(first // TILE * TILE, max(end, 0), TILE)
        yield rows, [(slice(j, min(j + TILE, end)), visible(every_row[rows], every_column[j:min(j + TILE, end)],
                                                            Tk - Tq, is_causal, window)) for j in starts]


class FlashAttentionPyTorch(torch.autograd.Function):
    """o (..., Tq, D) = softmax(q kᵀ / √D) v by tiles, in plain PyTorch; see flash_forward_tiled.

    apply(q, k, v, is_causal=False, window=None): q (..., Tq, D); k and v (..., Tk, D) with q's leading dimensions, or
    with a divisor of the last of them (grouped queries). Causal: query i sees the keys up to i + Tk - Tq (the diagonal
    ends bottom right), with window=w only the last w of those; a query that sees none gives zeros.
    """

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, window=None):
        o, lse = flash_forward_tiled(q, k, v, is_causal, window)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.is_causal, ctx.window = is_causal, window
        return o

    @staticmethod
    def backward(ctx, do):
        return *flash_backward_tiled(*ctx.saved_tensors, do, ctx.is_causal, ctx.window), None, None


# --- FlashAttention-2 in Triton ---

QUERY_TILES = [({"BLOCK_Q": q, "BLOCK_K": k}, warps, stages) for q, k, warps, stages in (
    (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 32, 4, 3),
    (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1))]
KEY_TILES = [({"BLOCK_Q": q, "BLOCK_K": k}, warps, stages) for q, k, warps, stages in (
    (64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 8, 2),
    (32, 64, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1))]
FLASH_KEY = ["T_BUCKET", "D", "CAUSAL", "WINDOW", "PRECISION"]
NOT_SPECIALIZED = ["heads", "Tq", "Tk", "window"]      # a length of 1 or a multiple of 16 must not mean another kernel


@jit
def _seen(query, key, Tk, shift, window, CAUSAL: constexpr, WINDOW: constexpr):
    """Which keys of a tile the queries see; query and key are (R, 1) and (1, C), or the other way round."""
    seen = key < Tk
    if CAUSAL:
        seen = seen & (key <= query + shift)
    if WINDOW:
        seen = seen & (key > query + shift - window)
    return seen


@jit
def _key_range(q0, Tk, shift, window, CAUSAL: constexpr, WINDOW: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """(lo, a, b, hi) for queries q0 … q0 + BLOCK_Q: only the keys from lo to hi are seen by any of them, and those from
    a to b by all of them, so that only the tiles in lo … a and b … hi need a mask."""
    lo, a, hi = 0, 0, Tk
    b = Tk // BLOCK_K * BLOCK_K
    if CAUSAL:
        hi = tl.minimum(Tk, tl.maximum(0, q0 + BLOCK_Q + shift))
        b = tl.minimum(b, tl.maximum(0, q0 + shift + 1) // BLOCK_K * BLOCK_K)
    if WINDOW:
        lo = tl.maximum(0, q0 + shift - window + 1) // BLOCK_K * BLOCK_K
        a = tl.minimum(tl.cdiv(tl.maximum(0, q0 + BLOCK_Q + shift - window), BLOCK_K) * BLOCK_K, hi)
    return lo, a, tl.maximum(a, b), hi


@jit
def _row(base, index, count, CHECK: constexpr):
    """The numbers at `index` of a row of `count`, zero past its end; CHECK is off where the caller knows better."""
    if CHECK:
        numbers = tl.load(base + index, mask=index < count, other=0.0)
    else:
        numbers = tl.load(base + index)
    return numbers


@jit
def _walk(MASKED: constexpr, BOTH: constexpr, lo, a, b, hi):
    """(first, last) of a loop over tiles: the whole ones from a to b, or the MASKED ones from b to hi and, if BOTH ends
    may be cut, from lo to a. Those are one loop, which counts on from a as if the tiles from a to b were not there."""
    return (a, b) if not MASKED else ((lo, hi - (b - a)) if BOTH else (b, hi))


@jit
def _start(i, MASKED: constexpr, BOTH: constexpr, a, b):
    """Where the tile that a _walk counts as i starts."""
    if MASKED and BOTH:
        i = tl.where(i < a, i, i + (b - a))
    return i


@autotuned(FLASH_KEY, {"BLOCK_Q": 64, "BLOCK_K": 32}, QUERY_TILES)
@jit(do_not_specialize=NOT_SPECIALIZED)
def _flash_forward(q, k, v, o, lse, q_b, q_h, q_t, k_b, k_h, k_t, heads, Tq, Tk, window, scale, T_BUCKET,
                   GROUP: constexpr, D: constexpr, D_PAD: constexpr, CAUSAL: constexpr, WINDOW: constexpr,
                   PRECISION: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """One program: BLOCK_Q queries of one head. q, o (B, H, Tq, D) share strides, so do k, v (B, K, Tk, D);
    lse is (B, H, Tq).

    Programs next to each other work on one head, so that its keys and values are read from memory once and then from
    L2. The longest rows of the causal triangle come first: what finishes last should be short. `scale` holds
    log2(e) / √D: scores are in base 2.
    """
    blocks, pid = tl.cdiv(Tq, BLOCK_Q), tl.program_id(0)
    q0 = (blocks - 1 - pid % blocks) * BLOCK_Q
    row = (pid // blocks).to(tl.int64)                                          # batch * heads + head
    q_offset = row // heads * q_b + row % heads * q_h
    k_offset = row // heads * k_b + row % heads // GROUP * k_h
    q_tile = _tile(q + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, True)
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D_PAD), tl.float32)
    query, shift = q0 + tl.arange(0, BLOCK_Q), Tk - Tq
    lo, a, b, hi = _key_range(q0, Tk, shift, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    # Two loops: over the tiles that all queries see, without a mask, and over those cut by window, diagonal or end.
    for MASKED in tl.static_range(2):
        first, last = _walk(MASKED, WINDOW, lo, a, b, hi)
        for i in range(first, last, BLOCK_K):
            k0 = _start(i, MASKED, WINDOW, a, b)
            k_tile = _tile(k + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, MASKED)
            s = _dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION)
            if MASKED:
                key = k0 + tl.arange(0, BLOCK_K)
                s = tl.where(_seen(query[:, None], key[None, :], Tk, shift, window, CAUSAL, WINDOW), s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)               # -inf - -inf would be NaN
            p, shrink = tl.exp2(s * scale - m_safe[:, None]), tl.exp2(m - m_safe)
            v_tile = _tile(v + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, MASKED)
            acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
            l, m = l * shrink + tl.sum(p, axis=1), m_new
    l_safe = tl.where(l == 0.0, 1.0, l)                                         # a row without keys: 0, L = -inf
    _put(o + q_offset, q0, q_t, Tq, acc / l_safe[:, None], BLOCK_Q, D, D_PAD)
    tl.store(lse + row * Tq + query, (m + tl.log2(l_safe)) / LOG2E, mask=query < Tq)


@autotuned(FLASH_KEY, {"BLOCK_Q": 64, "BLOCK_K": 32}, QUERY_TILES)
@jit(do_not_specialize=NOT_SPECIALIZED)
def _flash_backward_queries(q, k, v, o, do, lse, lse2, delta, dq, q_b, q_h, q_t, k_b, k_h, k_t, heads, Tq, Tk, window,
                            scale, T_BUCKET, GROUP: constexpr, D: constexpr, D_PAD: constexpr, CAUSAL: constexpr,
                            WINDOW: constexpr, PRECISION: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """One program: dQ = dS K / √D of BLOCK_Q queries of one head; walks over the keys as the forward pass does.

    It also leaves what the kernel for the keys would otherwise compute once for each tile: delta (B, H, Tq) =
    rowsum(dO ∘ O) = rowsum(dP ∘ P), which the softmax's gradient subtracts from each row of dP, and lse2, L in base 2
    with 0 for a row that saw no key. So this one runs first.
    """
    blocks, pid = tl.cdiv(Tq, BLOCK_Q), tl.program_id(0)
    q0 = (blocks - 1 - pid % blocks) * BLOCK_Q
    row = (pid // blocks).to(tl.int64)
    q_offset = row // heads * q_b + row % heads * q_h
    k_offset = row // heads * k_b + row % heads // GROUP * k_h
    q_tile = _tile(q + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, True)
    do_tile = _tile(do + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, True)
    query, shift = q0 + tl.arange(0, BLOCK_Q), Tk - Tq
    row_lse = tl.load(lse + row * Tq + query, mask=query < Tq, other=0.0) * LOG2E
    row_lse = tl.where(row_lse == -float("inf"), 0.0, row_lse)                  # exp2(-inf - 0) is 0, and not NaN
    o_tile = _tile(o + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, True)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1)
    tl.store(lse2 + row * Tq + query, row_lse, mask=query < Tq)
    tl.store(delta + row * Tq + query, row_delta, mask=query < Tq)
    dq_tile = tl.zeros((BLOCK_Q, D_PAD), tl.float32)
    lo, a, b, hi = _key_range(q0, Tk, shift, window, CAUSAL, WINDOW, BLOCK_Q, BLOCK_K)
    for MASKED in tl.static_range(2):
        first, last = _walk(MASKED, WINDOW, lo, a, b, hi)
        for i in range(first, last, BLOCK_K):
            k0 = _start(i, MASKED, WINDOW, a, b)
            k_tile = _tile(k + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, MASKED)
            s = _dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION)
            if MASKED:
                key = k0 + tl.arange(0, BLOCK_K)
                s = tl.where(_seen(query[:, None], key[None, :], Tk, shift, window, CAUSAL, WINDOW), s, -float("inf"))
            p = tl.exp2(s * scale - row_lse[:, None])
            v_tile = _tile(v + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, MASKED)
            dp = _dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), PRECISION)
            dq_tile = _dot((p * (dp - row_delta[:, None])).to(k_tile.dtype), k_tile, dq_tile, PRECISION)
    _put(dq + q_offset, q0, q_t, Tq, dq_tile * (scale / LOG2E), BLOCK_Q, D, D_PAD)


@autotuned(FLASH_KEY, {"BLOCK_Q": 32, "BLOCK_K": 64}, KEY_TILES)
@jit(do_not_specialize=NOT_SPECIALIZED)
def _flash_backward_keys(q, k, v, do, lse2, delta, dk, dv, q_b, q_h, q_t, k_b, k_h, k_t, heads, Tq, Tk, window, scale,
                         T_BUCKET, GROUP: constexpr, D: constexpr, D_PAD: constexpr, CAUSAL: constexpr,
                         WINDOW: constexpr, PRECISION: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """One program: dK and dV of BLOCK_K keys of one key/value head, summed over its query heads in a fixed order.

    dV = Pᵀ dO and dK = dSᵀ Q / √D over the queries that see the keys. Scores stand transposed, (keys, queries), so that
    P and dS enter the second products as they lie in registers. No atomics: the same inputs give the same bits.
    The price is a second pass over P for dQ, 7 products instead of 5.
    """
    blocks, pid = tl.cdiv(Tk, BLOCK_K), tl.program_id(0)
    k0, row = pid % blocks * BLOCK_K, (pid // blocks).to(tl.int64)              # row: batch * key heads + key head
    batch, key_head = row // (heads // GROUP), row % (heads // GROUP)
    k_offset = batch * k_b + key_head * k_h
    k_tile = _tile(k + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, True)
    v_tile = _tile(v + k_offset, k0, k_t, Tk, BLOCK_K, D, D_PAD, True)
    dk_tile = tl.zeros((BLOCK_K, D_PAD), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, D_PAD), tl.float32)
    key, shift = k0 + tl.arange(0, BLOCK_K), Tk - Tq
    # As _key_range, from the keys' side: queries lo … hi see any of these keys, a … b see all.
    lo, a, hi = 0, 0, Tq
    b = Tq // BLOCK_Q * BLOCK_Q
    if WINDOW:
        hi = tl.minimum(Tq, tl.maximum(0, k0 + BLOCK_K - 1 - shift + window))
        b = tl.minimum(b, tl.maximum(0, k0 - shift + window) // BLOCK_Q * BLOCK_Q)
    if CAUSAL:
        lo = tl.maximum(0, k0 - shift) // BLOCK_Q * BLOCK_Q
        a = tl.minimum(tl.cdiv(tl.maximum(0, k0 + BLOCK_K - 1 - shift), BLOCK_Q) * BLOCK_Q, hi)
    b = tl.maximum(a, b)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q_offset, row_offset = batch * q_b + head * q_h, (batch * heads + head) * Tq
        for MASKED in tl.static_range(2):
            first, last = _walk(MASKED, CAUSAL, lo, a, b, hi)
            for i in range(first, last, BLOCK_Q):
                q0 = _start(i, MASKED, CAUSAL, a, b)
                query = q0 + tl.arange(0, BLOCK_Q)
                q_tile = _tile(q + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, MASKED)
                s = _dot(k_tile, tl.trans(q_tile), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION)
                if MASKED:
                    # Queries past the end need no mask: their rows of q and dO are zero.
                    seen = _seen(query[None, :], key[:, None], Tk, shift, window, CAUSAL, WINDOW)
                    s = tl.where(seen, s, -float("inf"))
                p = tl.exp2(s * scale - _row(lse2 + row_offset, query, Tq, MASKED)[None, :])
                do_tile = _tile(do + q_offset, q0, q_t, Tq, BLOCK_Q, D, D_PAD, MASKED)
                dv_tile = _dot(p.to(do_tile.dtype), do_tile, dv_tile, PRECISION)
                dp = _dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), PRECISION)
                ds = p * (dp - _row(delta + row_offset, query, Tq, MASKED)[None, :])
                dk_tile = _dot(ds.to(q_tile.dtype), q_tile, dk_tile, PRECISION)
    _put(dk + k_offset, k0, k_t, Tk, dk_tile * (scale / LOG2E), BLOCK_K, D, D_PAD)
    _put(dv + k_offset, k0, k_t, Tk, dv_tile, BLOCK_K, D, D_PAD)


def as_heads(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x (..., T, D) as (B, H, T, D) with the strides of `like`, or dense when that is not given, D contiguous.

    Copied only where it differs. In practice nothing is: q, k and v are projections (B, T, H, D) seen as (B, H, T, D),
    and so are their gradients.
    """
    x = x.reshape(-1, *((1,) * (3 - x.dim()) + x.shape[-3:]))
    x = x if x.stride(-1) == 1 else x.contiguous()
    like = torch.empty_like(x, device="meta") if like is None else like
    if x.stride() == like.stride():
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def flash_arguments(q, k, is_causal, window):
    """(strides and sizes, constants) common to the kernels. T_BUCKET: lengths that share one autotuned tile. A window
    of Tk is no limit, and a larger one might not fit 32 bits."""
    (_, H, Tq, D), Tk = q.shape, k.shape[2]
    return (*q.stride()[:3], *k.stride()[:3], H, Tq, Tk, min(window or 0, Tk), math.log2(math.e) / math.sqrt(D)), dict(
        T_BUCKET=min(max(power_of_2(max(Tq, Tk)), 512), 8192), GROUP=H // k.shape[1], D=D, D_PAD=power_of_2(D, 16),
        CAUSAL=bool(is_causal), WINDOW=window is not None, PRECISION=dot_precision(q))


@opaque
def flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """(o like q, L (..., Tq) in float32) from the forward kernel."""
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), lse.fill_(-math.inf)
    q4, k4 = as_heads(q), as_heads(k)
    v4 = as_heads(v, k4)
    o4, (sizes, constants) = torch.empty_like(q4), flash_arguments(q4, k4, is_causal, window)
    B, H, Tq, _ = q4.shape
    launch(_flash_forward, lambda tile: (-(-Tq // tile["BLOCK_Q"]) * B * H,), q, q4, k4, v4, o4, lse, *sizes,
           **constants)
    return o4.view(q.shape), lse


@opaque
def flash_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, is_causal: bool,
                   window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the query kernel and then the key kernel."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q4, k4 = as_heads(q), as_heads(k)
    o4, do4, v4 = as_heads(o, q4), as_heads(do, q4), as_heads(v, k4)
    dq, dk, dv = torch.empty_like(q4), torch.empty_like(k4), torch.empty_like(v4)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    (B, H, Tq, _), (_, K, Tk, _) = q4.shape, k4.shape
    sizes, constants = flash_arguments(q4, k4, is_causal, window)
    launch(_flash_backward_queries, lambda tile: (-(-Tq // tile["BLOCK_Q"]) * B * H,), q, q4, k4, v4, o4, do4, lse,
           lse2, delta, dq, *sizes, **constants)
    launch(_flash_backward_keys, lambda tile: (-(-Tk // tile["BLOCK_K"]) * B * K,), q, q4, k4, v4, do4, lse2, delta,
           dk, dv, *sizes, **constants)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


class FlashAttentionTriton(torch.autograd.Function):
    """o = softmax(q kᵀ / √D) v in Triton: FlashAttentionPyTorch in float32, float16 or bfloat16, summed in float32.

    Saved for backward: q, k, v, o and L (..., Tq), the natural log of the sum of exp(scores); P is computed again.
    Gradient: see flash_backward_tiled. Forward 4 Tq Tk D FLOPs a head, backward 10 (ours 14, P twice), half if causal;
    bytes: q, k, v, o once: bound by arithmetic from a few hundred keys up.

    Raises ValueError for shapes and windows that make no sense, another dtype, or a head wider than 256.
    """

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, window=None):
        check_attention(q, k, v, is_causal, window)
        if q.shape[-1] > 256:
            raise ValueError(f"head width {q.shape[-1]} is more than 256, the most whose tiles fit in shared memory; "
                             "use more heads, or FlashAttentionPyTorch")
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype {q.dtype} must be float32, float16 or bfloat16; "
                             "FlashAttentionPyTorch takes float64")
        ctx.is_causal, ctx.window, ctx.kernels = is_causal, window, use_triton(q)
        o, lse = (flash_forward if ctx.kernels else flash_forward_tiled)(q, k, v, is_causal, window)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        backward = flash_backward if ctx.kernels else flash_backward_tiled
        return *backward(*ctx.saved_tensors, do, ctx.is_causal, ctx.window), None, None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, window: int | None = None) -> Tensor:
    """FlashAttentionTriton with keywords, for q (B, H, Tq, D) and k, v (B, K, Tk, D); under autocast in its dtype."""
    q, k, v = autocast(q, k, v)
    return FlashAttentionTriton.apply(q, k, v, is_causal, window)


def autocast(*tensors):
    """The tensors in autocast's dtype where it is on: inside a custom function autocast casts nothing by itself."""
    kind = tensors[0].device.type
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors] if torch.is_autocast_enabled(kind) else tensors


# --- RMSNorm ---

def rms_norm_reference(x, weight, eps=1e-5, residual=None):
    """float32 (or float64) inside, x's dtype outside."""
    h = x if residual is None else x + residual
    h32 = h.to(torch.promote_types(h.dtype, torch.float32))
    y = (h32 * torch.rsqrt(h32.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)
    return y if residual is None else (y, h)


@jit(do_not_specialize=["rows"])
def _rms_forward(x, residual, weight, y, h, rstd, rows, eps, N: constexpr, RESIDUAL: constexpr, ROWS: constexpr,
                 N_PAD: constexpr):
    """ROWS rows a program, each whole in registers. x, residual, y, h (rows, N); weight (N,); rstd (rows,) float32."""
    start = tl.program_id(0) * ROWS
    row = _tile(x, start, N, rows, ROWS, N, N_PAD, True)
    if RESIDUAL:
        row = (row.to(tl.float32) + _tile(residual, start, N, rows, ROWS, N, N_PAD, True).to(tl.float32)).to(row.dtype)
        _put(h, start, N, rows, row, ROWS, N, N_PAD)
    row = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=1) / N + eps)
    w = _tile(weight, 0, N, 1, 1, N, N_PAD, True).to(tl.float32)                # (1, N_PAD)
    _put(y, start, N, rows, row * scale[:, None] * w, ROWS, N, N_PAD)
    index = start + tl.arange(0, ROWS)
    tl.store(rstd + index, scale, mask=index < rows)


@jit(do_not_specialize=["rows"])
def _rms_backward(h, weight, rstd, dy, dh, dx, dweight, rows, N: constexpr, RESIDUAL: constexpr, ROWS: constexpr,
                  N_PAD: constexpr):
    """Each program takes every num_programs-th block of rows and sums its share of dweight (programs, N) as it goes."""
    w = _tile(weight, 0, N, 1, 1, N, N_PAD, True).to(tl.float32)
    dw = tl.zeros((N_PAD,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        index = start + tl.arange(0, ROWS)
        scale = tl.load(rstd + index, mask=index < rows, other=0.0)[:, None]
        unit = _tile(h, start, N, rows, ROWS, N, N_PAD, True).to(tl.float32) * scale
        grad = _tile(dy, start, N, rows, ROWS, N, N_PAD, True).to(tl.float32)
        dw += tl.sum(grad * unit, axis=0)
        grad *= w
        grad = (grad - unit * (tl.sum(grad * unit, axis=1) / N)[:, None]) * scale
        if RESIDUAL:
            grad += _tile(dh, start, N, rows, ROWS, N, N_PAD, True).to(tl.float32)
        _put(dx, start, N, rows, grad, ROWS, N, N_PAD)
    _put(dweight, tl.program_id(0), N, tl.num_programs(0), dw[None, :], 1, N, N_PAD)


def row_tile(N: int) -> dict:
    """Whole rows of N numbers, about 4,096 numbers and 16 to 32 a thread in each program."""
    return dict(N=N, N_PAD=power_of_2(N), ROWS=max(1, 4096 // power_of_2(N)),
                num_warps=4 if N <= 4096 else 8 if N <= 8192 else 16)


@opaque
def rms_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd); h is empty without a residual."""
    x2, tile = rows_of(x), row_tile(x.shape[-1])
    y, rstd = torch.empty_like(x2), x2.new_empty(len(x2), dtype=torch.float32)
    h, added = (x2.new_empty(0), x2) if residual is None else (torch.empty_like(x2), rows_of(residual))
    launch(_rms_forward, (-(-len(x2) // tile["ROWS"]),), x, x2, added, weight.contiguous(), y, h, rstd, len(x2), eps,
           RESIDUAL=residual is not None, **tile)
    return y.view(x.shape), h if residual is None else h.view(x.shape), rstd


@opaque
def rms_backward(h: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor]:
    h2, tile = rows_of(h), row_tile(h.shape[-1])
    # Enough programs to fill the chip, few enough that their partial sums of dweight are nothing.
    programs = min(-(-len(h2) // tile["ROWS"]), 4 * processors(h))
    dx, dweight, dy2 = torch.empty_like(h2), h2.new_empty(programs, h2.shape[1], dtype=torch.float32), rows_of(dy)
    launch(_rms_backward, (programs,), h, h2, weight.contiguous(), rstd, dy2, dy2 if dh is None else rows_of(dh), dx,
           dweight, len(h2), RESIDUAL=dh is not None, **tile)
    return dx.view(h.shape), dweight.sum(0).to(weight.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        y, h, rstd = rms_forward(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        dx, dweight = rms_backward(*ctx.saved_tensors, dy, dh)
        return dx, dweight, None, None if dh is None else dx


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; with a residual (y, h), h = x + residual normed.

    x: (..., N), weight: (N,), N up to 65,536. Inside float32, out x's dtype. Gradient, u = h rstd and g = dy weight:
    dh = rstd (g - u mean(g u)) [+ the gradient of h], dweight = sum over rows of dy u.
    Forward reads and writes x once (2 N elements a row, 4 with a residual), backward 3; about 4 and 10 FLOPs an
    element: bound by bandwidth by a factor of a hundred. Unfused, a norm reads and writes its row about six times.
    """
    if weight.shape != x.shape[-1:] or x.shape[-1] > 65536 or (residual is not None and residual.shape != x.shape):
        raise ValueError(f"rms_norm takes x (..., N), weight (N,) with N up to 65536 and a residual like x, not "
                         f"{tuple(x.shape)}, {tuple(weight.shape)}, "
                         f"{residual if residual is None else tuple(residual.shape)}")
    return (RMSNorm.apply if use_triton(x) else rms_norm_reference)(x, weight, eps, residual)


# --- SwiGLU ---

def swiglu_reference(gate, up):
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


@jit
def _swiglu_forward(gate, up, y, count, BLOCK: constexpr):
    """y = gate sigmoid(gate) up over flat arrays of `count` numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=i < count)


@jit
def _swiglu_backward(gate, up, dy, dgate, dup, count, BLOCK: constexpr):
    """With s = sigmoid(gate): dup = dy gate s;  dgate = dy up s (1 + gate (1 - s))."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    grad = tl.load(dy + i, mask=i < count, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + i, (grad * g * s).to(dup.dtype.element_ty), mask=i < count)
    tl.store(dgate + i, (grad * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=i < count)


@opaque
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    launch(_swiglu_forward, (-(-gate.numel() // 2048),), gate, gate, up, y, gate.numel(), BLOCK=2048, num_warps=8)
    return y


@opaque
def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    launch(_swiglu_backward, (-(-gate.numel() // 2048),), gate, gate, up, dy, dgate, dup, gate.numel(),
           BLOCK=2048, num_warps=8)
    return dgate, dup


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        return swiglu_backward(*ctx.saved_tensors, dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of the SwiGLU feed-forward layer (2002.05202, eq. 6); two tensors of one shape.

    Forward moves 3 elements for about 6 FLOPs, backward 5 for about 12: bound by bandwidth.
    Gradient: see _swiglu_backward.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu takes two tensors of one shape and dtype, not {tuple(gate.shape)} {gate.dtype} "
                         f"and {tuple(up.shape)} {up.dtype}")
    return (SwiGLU.apply if use_triton(gate) else swiglu_reference)(gate, up)


# --- RoPE ---

def apply_rope_reference(q, k, cos, sin, interleaved=False):
    """Each pair (a, b) of q and of k becomes (a cos - b sin, a sin + b cos)."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                           # one table for all heads
    def turn(x):
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        return (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)
    return turn(q), turn(k)


@jit
def _turn(x, out, cos, sin, x_h, HEADS: constexpr, HEADS_PAD: constexpr, HALF: constexpr, HALF_PAD: constexpr,
          INTERLEAVED: constexpr):
    """Rotate all heads of one token: x and out point at its first number, cos and sin (1, HALF_PAD)."""
    head, i = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, HALF_PAD)[None, :]
    mask, rows = (head < HEADS) & (i < HALF), head.to(tl.int64)
    first, second = (2 * i, 2 * i + 1) if INTERLEAVED else (i, i + HALF)
    a = tl.load(x + rows * x_h + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + rows * x_h + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * x_h + first, (a * cos - b * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(out + rows * x_h + second, (a * sin + b * cos).to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["T"])
def _rope(q, k, q_out, k_out, cos, sin, q_b, q_h, q_t, k_b, k_h, k_t, cos_b, cos_t, T, H: constexpr, H_PAD: constexpr,
          K: constexpr, K_PAD: constexpr, HALF: constexpr, HALF_PAD: constexpr, INTERLEAVED: constexpr,
          INVERSE: constexpr):
    """One program turns q (B, H, T, D) and k (B, K, T, D) of one token. INVERSE turns back: that is the gradient."""
    pid = tl.program_id(0).to(tl.int64)
    batch, t, i = pid // T, pid % T, tl.arange(0, HALF_PAD)[None, :]
    c = tl.load(cos + batch * cos_b + t * cos_t + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + batch * cos_b + t * cos_t + i, mask=i < HALF, other=0.0)
    if INVERSE:
        s = -s
    q_first, k_first = batch * q_b + t * q_t, batch * k_b + t * k_t
    _turn(q + q_first, q_out + q_first, c, s, q_h, H, H_PAD, HALF, HALF_PAD, INTERLEAVED)
    _turn(k + k_first, k_out + k_first, c, s, k_h, K, K_PAD, HALF, HALF_PAD, INTERLEAVED)


@opaque
def rope_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
              inverse: bool) -> tuple[Tensor, Tensor]:
    """q and k turned, or turned back, by one launch."""
    q, k = as_heads(q), as_heads(k)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    (B, H, T, D), K = q.shape, k.shape[1]
    launch(_rope, (B * T,), q, q, k, q_out, k_out, cos, sin, *q.stride()[:3], *k.stride()[:3],
           cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2), T, H=H, H_PAD=power_of_2(H), K=K,
           K_PAD=power_of_2(K), HALF=D // 2, HALF_PAD=power_of_2(D // 2), INTERLEAVED=interleaved, INVERSE=inverse,
           num_warps=min(8, power_of_2(H * D // 512)))                          # 8 numbers, 16 bytes, a thread
    return q_out, k_out


class RoPE(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so only the tables are saved."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rope_both(q, k, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx, dq, dk):
        return *rope_both(dq, dk, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False):
    """(q, k) with rotary positions (2104.09864, eq. 34) from one launch.

    q: (B, H, T, D), k: (B, K, T, D), D even. cos, sin: (T, D/2) or (B, T, D/2), float32, as model.rope_tables makes.
    Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved. Moves each element in and out once for 3 FLOPs: bound
    by bandwidth. Unfused, the halves are cut, multiplied, added and joined in about ten passes.
    """
    tables = (q.shape[-2], q.shape[-1] // 2)
    if q.dim() != 4 or k.dim() != 4 or q.shape[-1] % 2 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) \
            or cos.shape != sin.shape or tuple(cos.shape) not in (tables, (q.shape[0], *tables)):
        raise ValueError(f"apply_rope takes q (B, H, T, D), k (B, K, T, D), D even, tables ([B,] T, D/2), not "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}")
    if not use_triton(q):
        return apply_rope_reference(q, k, cos, sin, interleaved)
    return RoPE.apply(q, k, cos.float().contiguous(), sin.float().contiguous(), interleaved)


# --- softmax ---

def softmax_reference(x):
    """exp(x - max) over its sum."""
    e = torch.exp(x.to(torch.promote_types(x.dtype, torch.float32)) - x.amax(dim=-1, keepdim=True))
    return (e / e.sum(dim=-1, keepdim=True)).to(x.dtype)


@jit
def _row_max_sum(x, N, BLOCK: constexpr):
    """(max, sum of exp(x - max)) of one row of N numbers in one pass (1805.02867, algorithm 3)."""
    m, l = tl.full((), -float("inf"), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = tl.load(x + i, mask=i < N, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(tile, axis=0))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.exp(m - m_safe) + tl.sum(tl.exp(tile - m_safe), axis=0)
        m = m_new
    return m, l


@jit
def _softmax_forward(x, y, N, BLOCK: constexpr):
    """A row a program: once for max and sum, once to write; the second read comes from cache. x, y (rows, N)."""
    row = tl.program_id(0).to(tl.int64) * N
    m, l = _row_max_sum(x + row, N, BLOCK)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = tl.load(x + row + i, mask=i < N, other=0.0).to(tl.float32)
        tl.store(y + row + i, (tl.exp(tile - m) / l).to(y.dtype.element_ty), mask=i < N)


@jit
def _softmax_backward(y, dy, dx, N, BLOCK: constexpr):
    """dx = y (dy - sum(y dy)), a row a program."""
    row = tl.program_id(0).to(tl.int64) * N
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = tl.load(y + row + i, mask=i < N, other=0.0).to(tl.float32)
        total += tile * tl.load(dy + row + i, mask=i < N, other=0.0).to(tl.float32)
    inner = tl.sum(total, axis=0)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = tl.load(y + row + i, mask=i < N, other=0.0).to(tl.float32)
        grad = tl.load(dy + row + i, mask=i < N, other=0.0).to(tl.float32)
        tl.store(dx + row + i, (tile * (grad - inner)).to(dx.dtype.element_ty), mask=i < N)


def row_block(N: int) -> int:
    """Numbers of a row held at a time; the interpreter takes small blocks so that rows of a test span several."""
    return min(power_of_2(N), 64 if INTERPRET else 4096)


@opaque
def softmax_rows(x: Tensor, dy: Tensor | None) -> Tensor:
    """softmax(x), or with dy the gradient through it, x then being softmax's own output."""
    x2 = rows_of(x)
    out, N = torch.empty_like(x2), x2.shape[1]
    tensors = (x2, out) if dy is None else (x2, rows_of(dy), out)
    launch(_softmax_forward if dy is None else _softmax_backward, (len(x2),), x, *tensors, N, BLOCK=row_block(N),
           num_warps=8)
    return out.view(x.shape)


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = softmax_rows(x, None)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return softmax_rows(*ctx.saved_tensors, dy)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last dimension, of any width; x (..., N).

    Gradient: see _softmax_backward. Moves 2 elements (backward 3) for about 5 FLOPs: bound by bandwidth.
    """
    return Softmax.apply(x) if use_triton(x) else softmax_reference(x)


# --- cross entropy ---

def check_targets(shape, vocab_size, targets, ignore_index, reduction) -> None:
    """Raises ValueError for shapes or a reduction that make no sense, IndexError for ids outside the vocabulary.

    On CUDA looking at the ids would wait for the device: there such a row's loss is NaN, and nothing is read for it.
    """
    if tuple(targets.shape) != tuple(shape) or targets.is_floating_point():
        raise ValueError(f"targets must be whole numbers of shape {tuple(shape)}, not {targets.dtype} "
                         f"{tuple(targets.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be mean, sum or none")
    if not targets.is_cuda and not torch.compiler.is_compiling():
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        if wrong.numel():
            raise IndexError(f"target {int(wrong[0])} is not an id of 0 to {vocab_size - 1}, nor "
                             f"ignore_index={ignore_index}")


def reduce_losses(losses, targets, ignore_index, reduction):
    """Losses per token to what was asked for. The mean is over the tokens that count: NaN if none, as in torch."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def cross_entropy_reference(logits, targets, ignore_index=-100, reduction="mean"):
    """logsumexp(logits) - logits[target], 0 where the target is ignored."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keep = targets != ignore_index
    picked = x.gather(-1, targets.masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1)
    return reduce_losses((x.logsumexp(dim=-1) - picked).masked_fill(~keep, 0.0), targets, ignore_index, reduction)


@jit(do_not_specialize=["ignore_index"])
def _cross_entropy_forward(logits, targets, losses, lse, row_stride, V, ignore_index, BLOCK: constexpr):
    """A row a program. logits (N, V), targets (N,), losses and lse (N,) in float32."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    top, total = _row_max_sum(logits + row * row_stride, V, BLOCK)
    log_sum = tl.log(total) + top
    inside = (target >= 0) & (target < V)
    picked = tl.load(logits + row * row_stride + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, log_sum - picked))
    tl.store(lse + row, log_sum)


@jit(do_not_specialize=["ignore_index"])
def _cross_entropy_backward(logits, dlogits, targets, lse, upstream, row_stride, V, ignore_index, BLOCK: constexpr):
    """One tile of dlogits = (softmax(logits) - onehot(target)) * upstream[row]; may be written over the logits."""
    tiles = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    tile = tl.load(logits + row * row_stride + i, mask=i < V, other=0.0).to(tl.float32)
    grad = (tl.exp(tile - tl.load(lse + row)) - tl.where(i == target, 1.0, 0.0)) * tl.load(upstream + row)
    # A choice and not a product: an ignored row may hold infinities, and 0 x inf is NaN.
    grad = tl.where(target == ignore_index, 0.0, grad)
    tl.store(dlogits + row * row_stride + i, grad.to(dlogits.dtype.element_ty), mask=i < V)


@opaque
def token_losses(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(losses, lse) of logits (N, V), each (N,) in float32."""
    if not use_triton(logits):
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy_reference(x, targets, ignore_index, "none"), x.logsumexp(dim=-1)
    (N, V), losses = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
    lse = torch.empty_like(losses)
    launch(_cross_entropy_forward, (N,), logits, logits, targets, losses, lse, logits.stride(0), V, ignore_index,
           BLOCK=row_block(V), num_warps=8)
    return losses, lse


@opaque
def logits_gradient(logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, ignore_index: int,
                    overwrite: bool) -> Tensor:
    """(softmax - onehot) * upstream per row of logits (N, V), in new memory or over the logits."""
    out = logits if overwrite else torch.empty_like(logits)
    if not use_triton(logits):
        keep = targets != ignore_index
        grad = (logits - lse[:, None]).exp_()
        grad[torch.arange(len(grad), device=grad.device), targets.masked_fill(~keep, 0)] -= 1
        return out.copy_((grad * upstream[:, None]).masked_fill_(~keep[:, None], 0.0))
    (N, V), block = logits.shape, row_block(logits.shape[1])
    launch(_cross_entropy_backward, (N * -(-V // block),), logits, logits, out, targets, lse, upstream,
           logits.stride(0), V, ignore_index, BLOCK=block, num_warps=8)
    return out


def per_token(grad, targets, ignore_index, reduction):
    """The gradient that reaches each token's loss, (N,), from that of the reduced loss."""
    if reduction == "none":
        return grad.reshape(-1).contiguous()
    return (grad if reduction == "sum" else grad / (targets != ignore_index).sum()).expand(len(targets)).contiguous()


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index, reduction, overwrite):
        x, t = rows_of(logits), targets.reshape(-1).contiguous()
        losses, lse = token_losses(x, t, ignore_index)
        ctx.save_for_backward(x, t, lse)
        ctx.options, ctx.shape, ctx.spent = (ignore_index, reduction, overwrite), logits.shape, False
        return reduce_losses(losses.view(targets.shape), targets, ignore_index, reduction)

    @staticmethod
    def backward(ctx, grad):
        (x, t, lse), (ignore_index, reduction, overwrite) = ctx.saved_tensors, ctx.options
        if ctx.spent:
            raise RuntimeError("cross_entropy(overwrite=True) has put the gradient where the logits were: "
                               "backward runs once")
        ctx.spent = overwrite
        upstream = per_token(grad, t, ignore_index, reduction)
        dlogits = logits_gradient(x, t, lse, upstream, ignore_index, overwrite and not torch.compiler.is_compiling())
        return dlogits.view(ctx.shape), None, None, None, None


def cross_entropy(logits, targets, ignore_index: int = -100, reduction: str = "mean", overwrite: bool = False):
    """-log softmax(logits)[target] in nats, float32: mean or sum over the tokens that are not ignored, or none: (...).

    logits: (..., V), targets: (...) of ids. Neither the probabilities nor, with overwrite=True, the gradient ever exist
    beside the logits: a tile of them at a time is made on the chip, and backward writes it over the logits, which
    are then gone. Without it backward writes a new tensor. Gradient: (softmax - onehot) times the row's upstream.
    Forward reads the logits once for about 5 FLOPs an element, backward reads and writes them: bound by bandwidth.
    Eager torch makes float32 copies and a log-softmax: about 20 bytes an element of bfloat16 instead of 6.
    """
    check_targets(logits.shape[:-1], logits.shape[-1], targets, ignore_index, reduction)
    return CrossEntropy.apply(logits, targets, ignore_index, reduction, overwrite)


# --- linear layer and cross entropy, in chunks ---

def linear_cross_entropy_reference(x, weight, targets, ignore_index=-100, reduction="mean"):
    """cross_entropy(x weightᵀ, targets), all logits at once."""
    return cross_entropy_reference(x @ weight.T, targets, ignore_index, reduction)


def chunked_losses(x, weight, targets, ignore_index, chunk, upstream):
    """(losses (N,), dx, dweight) of x (N, C), weight (V, C), `chunk` rows of logits at a time; gradients if asked."""
    losses = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    dx = None if upstream is None else torch.empty_like(x)
    # Summed over the chunks in float32: a hundred bfloat16 additions would lose the small ones.
    dweight = None if upstream is None else torch.zeros_like(weight, dtype=losses.dtype)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        logits = x[part] @ weight.T                                             # (chunk, V), the largest thing alive
        losses[part], lse = token_losses(logits, targets[part], ignore_index)
        if upstream is not None:
            dlogits = logits_gradient(logits, targets[part], lse, upstream[part], ignore_index,
                                      not torch.compiler.is_compiling())
            dx[part] = dlogits @ weight
            dweight += dlogits.T @ x[part]
    return losses, dx, None if upstream is None else dweight.to(weight.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """With mean or sum the upstream gradient is one number, known to be a factor of everything: the gradients are made
    at once in the forward pass, while each chunk's logits are there, and backward multiplies (2410.10989, section 3.2).
    With none it differs by row: backward then computes the logits again.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, reduction, chunk):
        upstream = None
        if reduction != "none" and any(ctx.needs_input_grad[:2]):
            upstream = per_token(torch.ones((), device=x.device), targets, ignore_index, reduction)
        losses, dx, dweight = chunked_losses(x, weight, targets, ignore_index, chunk, upstream)
        ctx.save_for_backward(*((x, weight) if reduction == "none" else (dx, dweight)), targets)
        ctx.options = ignore_index, reduction, chunk
        return reduce_losses(losses, targets, ignore_index, reduction)

    @staticmethod
    def backward(ctx, grad):
        (first, second, targets), (ignore_index, reduction, chunk) = ctx.saved_tensors, ctx.options
        if reduction == "none":
            _, dx, dweight = chunked_losses(first, second, targets, ignore_index, chunk, grad.contiguous())
        else:
            dx, dweight = first * grad.to(first.dtype), second * grad.to(second.dtype)
        return dx, dweight, None, None, None, None


def linear_cross_entropy(x, weight, targets, ignore_index: int = -100, reduction: str = "mean",
                         chunk_tokens: int | None = None):
    """cross_entropy(x @ weightᵀ, targets) without ever holding the (tokens, V) logits; also without Triton.

    x: (..., C), weight: (V, C), targets: (...). chunk_tokens: rows of logits alive at a time; when not given as many
    as fill 256 MB on CUDA, 32 MB elsewhere. At GPT-2's vocabulary and 64 x 1,024 tokens the bfloat16 logits alone
    would be 6.6 GB, with their gradient 13. 6 N V C FLOPs forward and backward together (8 with reduction none, which
    computes the logits twice): three matrix products, bound by arithmetic; the kernels between them by bandwidth.
    """
    check_targets(x.shape[:-1], len(weight), targets, ignore_index, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight {tuple(weight.shape)} must be (V, {x.shape[-1]}) to follow x {tuple(x.shape)}")
    x, weight = autocast(x, weight)
    if chunk_tokens is None:
        chunk_tokens = max(128, (2 ** 28 if x.is_cuda else 2 ** 25) // (len(weight) * x.element_size()) // 128 * 128)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    with torch.autocast(x.device.type, enabled=False):
        loss = LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight.to(x.dtype),
                                        targets.reshape(-1).contiguous(), ignore_index, reduction, chunk_tokens)
    return loss.view(targets.shape) if reduction == "none" else loss


# --- decoding: one query against a long cache, and int8 weights ---

def decode_reference(q, k, v, lengths=None):
    """Attention of one query a head, q (B, H, D), to the first lengths[b] of k and v (B, K, T, D)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    lengths = torch.full((1,), k.shape[2], device=q.device) if lengths is None else lengths
    past = (torch.arange(k.shape[2], device=q.device) >= lengths[:, None])[:, None]       # (B, 1, T)
    scores = torch.einsum("bhd,bhtd->bht", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(past, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.einsum("bht,bhtd->bhd", weights.masked_fill(past, 0.0), v)


@jit(do_not_specialize=["K", "splits", "span"])
def _decode_split(q, k, v, lengths, part, part_lse, q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, K, splits, span, scale,
                  GROUP: constexpr, GROUP_PAD: constexpr, D: constexpr, D_PAD: constexpr, PRECISION: constexpr,
                  BLOCK_K: constexpr):
    """One program: `span` keys of one key/value head against its GROUP query heads, padded to the 16 rows tl.dot needs.

    part (B, H, splits, D) and part_lse (B, H, splits), float32: each share's own softmax, and its weight in base 2.
    """
    pid = tl.program_id(0)
    split, row = pid % splits, (pid // splits).to(tl.int64)
    batch, key_head = row // K, row % K
    q_tile = _tile(q + batch * q_b + key_head * GROUP * q_h, 0, q_h, GROUP, GROUP_PAD, D, D_PAD, True)
    length = tl.load(lengths + batch).to(tl.int32)
    m = tl.full((GROUP_PAD,), -float("inf"), tl.float32)
    l = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    for k0 in range(split * span, tl.minimum(split * span + span, length), BLOCK_K):
        k_tile = _tile(k + batch * k_b + key_head * k_h, k0, k_t, length, BLOCK_K, D, D_PAD, True)
        s = _dot(q_tile, tl.trans(k_tile), tl.zeros((GROUP_PAD, BLOCK_K), tl.float32), PRECISION) * scale
        s = tl.where((k0 + tl.arange(0, BLOCK_K) < length)[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))                                # finite: key k0 is before `length`
        p, shrink = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
        v_tile = _tile(v + batch * v_b + key_head * v_h, k0, v_t, length, BLOCK_K, D, D_PAD, True)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
        l, m = l * shrink + tl.sum(p, axis=1), m_new
    l_safe = tl.where(l == 0.0, 1.0, l)
    first = row * GROUP * splits + split                                        # of head key_head * GROUP
    _put(part + first * D, 0, splits * D, GROUP, acc / l_safe[:, None], GROUP_PAD, D, D_PAD)
    member = tl.arange(0, GROUP_PAD)
    tl.store(part_lse + first + member * splits, m + tl.log2(l_safe), mask=member < GROUP)


@jit(do_not_specialize=["splits"])
def _decode_reduce(part, part_lse, o, splits, D: constexpr, D_PAD: constexpr, SPLITS_PAD: constexpr):
    """o (B, H, D): the shares of one head added, each weighted by 2^(its lse - the largest)."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, SPLITS_PAD)
    weight = tl.load(part_lse + row * splits + share, mask=share < splits, other=-float("inf"))
    top = tl.max(weight, axis=0)
    weight = tl.exp2(weight - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    tile = _tile(part + row * splits * D, 0, D, splits, SPLITS_PAD, D, D_PAD, True)
    mean = tl.sum(tile * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    _put(o, row, D, row + 1, mean[None, :], 1, D, D_PAD)


def decode_attention(q, k, v, lengths=None):
    """Attention of one new token to its cache: q (B, H, D), k and v (B, K, T, D) -> (B, H, D). No gradient.

    lengths: (B,) of how many keys count in each row of the batch; all of T when not given; 0 gives zeros.
    One query leaves a flash kernel a single tile per head, and most of the chip idle: here the keys are split over
    enough programs to fill it, each leaves its own softmax, and a second kernel joins them (2311.01282).
    Bytes: the cache once, 2 B K T D elements, for 4 B H T D FLOPs: H / K a byte in bfloat16: bound by bandwidth.
    """
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or q.shape[1] % max(k.shape[1], 1) \
            or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1] or q.shape[-1] > 256 \
            or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"decode_attention takes q (B, H, D) and k, v (B, K, T, D), H a multiple of K, D at most 256, "
                         f"of one dtype, not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if not use_triton(q):
        return decode_reference(q, k, v, lengths)
    (B, H, D), (_, K, T, _) = q.shape, k.shape
    group, D_PAD = H // K, power_of_2(D, 16)
    block = max(16, min(32 if INTERPRET else 64, 2 ** 14 // (D_PAD * q.element_size())))   # 16 KB of keys and of values
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lengths = torch.full((B,), T, device=q.device, dtype=torch.int32) if lengths is None else lengths.clamp(0, T)
    # Two programs a multiprocessor, each with at least a few tiles to stream.
    splits = max(1, min(-(-2 * processors(q) // max(B * K, 1)), -(-T // (4 * block)), 128))
    span = -(-T // (splits * block)) * block
    part = q.new_empty(B, H, splits, D, dtype=torch.float32)
    part_lse, o = part.new_empty(B, H, splits), torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(_decode_split, (B * K * splits,), q, q, k, v, lengths, part, part_lse, *q.stride()[:2], *k.stride()[:3],
           *v.stride()[:3], K, splits, span, math.log2(math.e) / math.sqrt(D), GROUP=group,
           GROUP_PAD=power_of_2(group, 16), D=D, D_PAD=D_PAD, PRECISION=dot_precision(q), BLOCK_K=block,
           num_warps=4, num_stages=2)
    launch(_decode_reduce, (B * H,), q, part, part_lse, o, splits, D=D, D_PAD=D_PAD, SPLITS_PAD=power_of_2(splits))
    return o


def quantize_int8(weight: Tensor):
    """(int8 (R, C), scale (R,) float32) with weight ≈ int8 * scale: each row's largest number becomes 127."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def int8_matvec_reference(x, weight, scale):
    """x @ (weight * scale)ᵀ."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) @ weight.to(dtype).T * scale).to(x.dtype)


@jit
def _int8_matvec(x, weight, scale, y, R, C, blocks, BLOCK_R: constexpr, BLOCK_C: constexpr):
    """One program: BLOCK_R numbers of y (M, R) from one row of x (M, C). weight (R, C) int8, scale (R,)."""
    row = (tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = (row[:, None] < R) & (column[None, :] < C)
        w = tl.load(weight + row[:, None] * C + column[None, :], mask=mask, other=0)
        acc += w.to(tl.float32) * tl.load(x + m * C + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1) * tl.load(scale + row, mask=row < R, other=0.0)
    tl.store(y + m * R + row, total.to(y.dtype.element_ty), mask=row < R)


def int8_matvec(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., C) times int8 weights: (..., R) in x's dtype, for the few rows of decoding. No gradient.

    weight: (R, C) int8, scale: (R,), from quantize_int8. Reads R C bytes for each row of x and does 2 R C FLOPs: bound
    by bandwidth, and so twice as fast as bfloat16 at best. Many rows at once belong in a matrix product.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or scale.shape != weight.shape[:1] \
            or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"int8_matvec takes x (..., C), int8 weight (R, C), scale (R,), not {tuple(x.shape)}, "
                         f"{weight.dtype} {tuple(weight.shape)} and {tuple(scale.shape)}")
    if not use_triton(x):
        return int8_matvec_reference(x, weight, scale)
    x2, (R, C) = rows_of(x), weight.shape
    y, rows = x.new_empty(len(x2), R), 16
    launch(_int8_matvec, (len(x2) * -(-R // rows),), x, x2, weight.contiguous(), scale, y, R, C, -(-R // rows),
           BLOCK_R=rows, BLOCK_C=min(power_of_2(C), 512), num_warps=4)
    return y.view(*x.shape[:-1], R)


# --- the measurements: correctness, speed, one training step ---

class Work:
    """A kernel with what it is compared to: functions of the same inputs, the first `wanted` of which get gradients.

    flops and moved (bytes) are the least for (a forward pass, forward and backward together), None without backward.
    """

    def __init__(self, name, ours, reference, inputs, wanted, flops, moved, **fused):
        self.name, self.ours, self.reference, self.inputs, self.wanted = name, ours, reference, inputs, wanted
        self.flops, self.moved, self.fused = flops, moved, fused

    def runner(self, function, inputs, backward):
        """A call without arguments that lists the outputs of function(*inputs), then with `backward` the gradients."""
        xs, ups = [x.detach().requires_grad_(backward and i < self.wanted) for i, x in enumerate(inputs)], []
        def run():
            outs = function(*xs)
            outs = list(outs) if isinstance(outs, tuple) else [outs]
            if not backward:
                return outs
            if not ups:                                # drawn in bfloat16: the same numbers whatever the dtype
                generator = torch.Generator(outs[0].device).manual_seed(1)
                ups.extend(torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.bfloat16).to(o.dtype)
                           for o in outs)
            return outs + list(torch.autograd.grad(outs, xs[:self.wanted], ups))
        return run


def workloads(device, dtype, T=130, D=64, B=1, H=4, K=2, C=256, V=1000):
    """Every kernel at T tokens: attention of B sequences and H heads of D, layers of width C, V ids. Random inputs."""
    generator, e = torch.Generator(device).manual_seed(0), dtype.itemsize
    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)
    def backend(name):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        def run(q, k, v):
            with sdpa_kernel(getattr(SDPBackend, name)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        return run
    def both(forward, backward):
        return forward, forward + backward
    q, k, v = randn(B, H, T, D), randn(B, K, T, D), randn(B, K, T, D)
    x, y, weight, head = randn(T, C), randn(T, C), randn(C), randn(V, C) / math.sqrt(C)
    logits, targets = randn(T, V), torch.randint(V, (T,), generator=generator, device=device)
    angles = torch.rand(T, D // 2, generator=generator, device=device)
    quantised, scale = quantize_int8(head.float())
    pairs, qkvo, n, z = B * H * T * T / 2, 2 * B * T * D * (H + K) * e, T * C * e, T * V * e
    qk = B * T * D * (H + K)
    return [
        Work("attention", flash_attention, lambda q, k, v: attention_reference(q, k, v, True), (q, k, v), 3,
             both(4 * D * pairs, 10 * D * pairs), both(qkvo, 2 * qkvo),
             flash=backend("FLASH_ATTENTION"), cudnn=backend("CUDNN_ATTENTION")),
        Work("rms_norm", rms_norm, rms_norm_reference, (x, weight), 2, both(4 * T * C, 10 * T * C), both(2 * n, 3 * n),
             torch=lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5)),
        Work("rms_norm+residual", lambda x, w, r: rms_norm(x, w, 1e-5, r),
             lambda x, w, r: rms_norm_reference(x, w, 1e-5, r), (x, weight, y), 3, both(5 * T * C, 11 * T * C),
             both(4 * n, 4 * n)),
        Work("swiglu", swiglu, swiglu_reference, (x, y), 2, both(6 * T * C, 12 * T * C), both(3 * n, 5 * n)),
        Work("rope", apply_rope, apply_rope_reference, (q, k, angles.cos(), angles.sin()), 2,
             both(3 * qk, 3 * qk), both(2 * qk * e, 2 * qk * e)),
        Work("softmax", softmax, softmax_reference, (logits,), 1, both(5 * T * V, 4 * T * V), both(2 * z, 3 * z),
             torch=lambda x: torch.softmax(x, dim=-1)),
        Work("cross_entropy", cross_entropy, cross_entropy_reference, (logits, targets), 1, both(5 * T * V, 5 * T * V),
             both(z, 2 * z), torch=torch.nn.functional.cross_entropy),
        Work("linear+cross_entropy",
             lambda x, w, t: linear_cross_entropy(x, w, t, chunk_tokens=48 if INTERPRET else None),
             linear_cross_entropy_reference, (x, head, targets), 2, both(2 * T * V * C, 4 * T * V * C),
             both(n + V * C * e, 2 * n + 2 * V * C * e)),
        Work("decode", decode_attention, decode_reference, (q[:, :, 0], k, v), 0, (4 * B * H * T * D, None),
             (2 * B * K * T * D * e, None)),
        Work("int8_matvec", int8_matvec, int8_matvec_reference, (x[:1], quantised, scale), 0, (2 * V * C, None),
             (V * C, None)),
        Work("matmul", matmul, torch.matmul, (x, head.T), 0, (2 * T * V * C, None), (n + V * C * e + z, None))]


def check(device) -> None:
    """Print every kernel's largest error against its reference in float64, beside that of the reference itself."""
    print(f"largest error against float64, relative to the largest entry (at least 1), on {device}"
          f"{' through the interpreter' if INTERPRET else ''}\n"
          f"{'':22}{'dtype':10}{'forward':>9}{'backward':>9}   reference in that dtype")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for work in workloads(device, dtype):
            exact = [x.double() if x.is_floating_point() else x for x in work.inputs]
            right = work.runner(work.reference, exact, work.wanted > 0)()
            row = ""
            for function in (work.ours, work.reference):
                found = work.runner(function, work.inputs, work.wanted > 0)()
                errors = [((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
                          for a, b in zip(found, right)]
                cut = len(errors) - work.wanted
                row += f"{max(errors[:cut]):9.1e}" + (f"{max(errors[cut:]):9.1e}  " if work.wanted else f"{'-':>9}  ")
            print(f"{work.name:22}{str(dtype)[6:]:10}{row.rstrip()}", flush=True)


def time_ms(run) -> float:
    """Median time of run() on the GPU in ms, with the L2 cache emptied before each and the launches queued ahead."""
    return triton.testing.do_bench(run, rep=300, return_mode="median")


def roofs(dtype) -> tuple[float, float]:
    """(FLOP/s of torch's own matrix product of 8,192³, bytes/s of a copy of 1 GB, read and written): the two limits."""
    a, big = torch.randn(8192, 8192, device="cuda").to(dtype), torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(big)
    return 2 * 8192 ** 3 / time_ms(lambda: a @ a) * 1e3, 2 * big.numel() / time_ms(lambda: other.copy_(big)) * 1e3


def measure(work, backend, function, backward, peaks) -> dict:
    """One row of the benchmark table; ms is None and `why` says it where the backend cannot do the work."""
    row = dict(kernel=work.name, backend=backend, **{"pass": "forward+backward" if backward else "forward"})
    torch.cuda.empty_cache()
    try:
        with torch.set_grad_enabled(backward):
            run = work.runner(function, work.inputs, backward)
            run()                                      # compiles and tunes, whose memory does not count
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            row["ms"] = ms = time_ms(run)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return row | dict(ms=None, why=str(error).splitlines()[0][:100])
    flops, moved = work.flops[backward], work.moved[backward]
    return row | dict(tflops=flops / ms / 1e9, gb_per_s=moved / ms / 1e6, flops_per_byte=flops / moved,
                      share_of_roof=max(flops / peaks[0], moved / peaks[1]) * 1e3 / ms)


def benchmark(tokens, only, out) -> None:
    """Time every kernel over `tokens` in bfloat16; the figures go to kernels.json and kernels.png in the folder out."""
    import datetime
    import json
    import subprocess
    peaks, rows = roofs(torch.bfloat16), []
    smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                         text=True)
    about = dict(card=torch.cuda.get_device_name(), driver=smi.stdout.split()[0] if smi.stdout else "unknown",
                 torch=torch.__version__, triton=triton.__version__, date=datetime.date.today().isoformat(),
                 dtype="bfloat16", command=" ".join(["python kernels.py", *sys.argv[1:]]),
                 peak_tflops=peaks[0] / 1e12, peak_gb_per_s=peaks[1] / 1e9)
    print(about, flush=True)
    os.makedirs(out, exist_ok=True)
    for D, T in ((D, T) for D in (64, 128) for T in tokens):
        # 16,384 tokens or one sequence, 2,048 wide, as the papers of FlashAttention measure; GPT-2's vocabulary.
        for work in workloads("cuda", torch.bfloat16, T, D, max(1, 16384 // T), 2048 // D, 2048 // D, 2048, 50304):
            if (D == 128 and work.name not in ("attention", "rope", "decode")) or (only and work.name not in only):
                continue
            torch._dynamo.reset()
            functions = {"ours": work.ours, "eager": work.reference, "compile": torch.compile(work.reference),
                         **work.fused}
            for backward in (False, True)[:1 + bool(work.wanted)]:
                for backend, function in functions.items():
                    rows.append(row := measure(work, backend, function, backward, peaks) | dict(tokens=T, D=D))
                    figures = f"n/a: {row['why']}" if row["ms"] is None else (
                        f"{row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s {row['gb_per_s']:7.0f} GB/s "
                        f"{row['share_of_roof']:6.1%} of the roof {row['peak_mb']:8.0f} MB")
                    print(f"{work.name:21}{row['pass']:17}{T:6} D {D:3} {backend:8}{figures}", flush=True)
            with open(os.path.join(out, "kernels.json"), "w", encoding="utf-8") as file:       # as far as it has come
                json.dump(about | {"rows": rows}, file, indent=1)
    draw(rows, about, os.path.join(out, "kernels.png"))


def draw(rows, about, path) -> None:
    """Attention's speed over the length; the roofline: each kernel a dot at its longest input, under the two limits."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    done = [row for row in rows if row["ms"] is not None]
    for axis, D in zip(axes, (64, 128)):
        for line in dict.fromkeys((r["backend"], r["pass"]) for r in done):
            points = [(r["tokens"], r["tflops"]) for r in done
                      if (r["backend"], r["pass"], r["kernel"], r["D"]) == (*line, "attention", D)]
            if points:
                axis.plot(*zip(*points), "o-" if line[1] == "forward" else "s--", label=" ".join(line))
        axis.set(xscale="log", xlabel="tokens in a sequence", ylabel="TFLOP/s", title=f"causal attention, D = {D}")
        axis.legend(fontsize=7)
    intensity, roof = [2.0 ** i for i in range(-2, 16)], axes[2]
    limit = [min(about["peak_tflops"], x * about["peak_gb_per_s"] / 1e3) for x in intensity]
    roof.plot(intensity, limit, "k-", label="measured roof")
    for name in dict.fromkeys(r["kernel"] for r in done):
        last = [r for r in done if r["kernel"] == name and r["backend"] == "ours" and r["pass"] == "forward"]
        if last:
            roof.plot(last[-1]["flops_per_byte"], last[-1]["tflops"], "o", label=name)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title="roofline, forward passes")
    roof.legend(fontsize=7)
    figure.suptitle(f"{about['card']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}, "
                    f"{about['date']}: {about['command']}", fontsize=9)
    figure.savefig(path, dpi=120)


def profile(argv) -> None:
    """Time one training step of a config by phase, then by region under torch.profiler; trace.json goes to its out_dir.

    Random tokens stand for the data (GPT-2's 50,304 ids where neither the config nor the data says how many), and the
    step is one micro-batch, not compiled: the regions are modules, and a compiled model has none.
    A forward operation belongs to the module it runs in, a backward one to that of the forward operation which it
    differentiates: autograd's sequence numbers tell.
    """
    import itertools
    import statistics
    import time
    import train
    from configurator import command_line
    from model import Transformer
    _, _, config, _ = command_line(train.TrainConfig, argv, "python kernels.py profile config_x.py [--key=value …]")
    device = train.pick_device(config.device)
    dtype = train.DTYPES[train.pick_dtype(config.dtype, device)]
    meta = train.data.read_meta(config.data_dir) if os.path.isdir(config.data_dir) else {}
    on_gpu, vocab_size = device.startswith("cuda"), config.vocab_size or meta.get("vocab_size") or 50304
    model = Transformer(config.model_config(vocab_size)).to(device)
    optimizers = train.make_optimizers(model, config, lambda cls, groups, **settings: cls(groups, **settings))
    size = (config.micro_batch_size or config.batch_tokens // config.context_length, config.context_length)
    x, y = torch.randint(vocab_size, size, device=device), torch.randint(vocab_size, size, device=device)

    region = torch.profiler.record_function

    def clock():
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def step():
        marks = [clock()]
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(x, y)[1]
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        with region("optimizer"):
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        marks.append(clock())
        return [after - before for before, after in itertools.pairwise(marks)]

    times = [step() for _ in range(13)][3:]                                     # the first three warm up
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocab_size:,} ids, {size[0]} x {size[1]} "
          f"tokens, {dtype}, {device}\n"
          f"{'':14}{'mean ms':>9}{'std ms':>8}   over 10 steps after 3")
    for name, column in zip(("forward", "backward", "optimizer"), zip(*times)):
        print(f"{name:14}{statistics.mean(column):9.2f}{statistics.stdev(column):8.2f}")
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        kind = {"attn": "attention", "ffn": "feed-forward", "ln_final": "norm", "ln1": "norm", "ln2": "norm"}.get(name)
        if kind:
            module.forward = region(kind)(module.forward)
    model.head_loss = region("loss")(model.head_loss)                           # the norm in it remains a norm
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        wall_ms = sum(step())
    report(profiler, wall_ms, on_gpu)
    os.makedirs(config.out_dir, exist_ok=True)
    trace = os.path.join(config.out_dir, "trace.json")
    profiler.export_chrome_trace(trace)
    print(f"trace: {trace}, to open in https://ui.perfetto.dev")


def report(profiler, wall_ms, on_gpu) -> None:
    """Print the time of one profiled step by region, and its ten largest kernels (operators on the CPU)."""
    labels = ("attention", "feed-forward", "norm", "loss", "optimizer")
    by_sequence, totals = {}, dict.fromkeys((*labels, "other"), 0.0)
    def region_of(event):
        while event is not None:
            if event.name in labels:
                return event.name
            if event.name.startswith("autograd::engine::evaluate_function"):
                return by_sequence.get(event.sequence_nr, "other")
            event = event.cpu_parent
        return "other"
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(events, key=lambda e: e.time_range.start):              # forward comes before its backward
        where = region_of(event)
        if event.sequence_nr >= 0 and where != "other":
            by_sequence.setdefault(event.sequence_nr, where)
        totals[where] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
    totals["idle"] = max(0.0, wall_ms - sum(totals.values()))
    print(f"\none step under the profiler: {wall_ms:.1f} ms, forward and backward together\n" + "\n".join(
        f"{name:14}{ms:9.2f} ms {ms / wall_ms:6.1%}" for name, ms in totals.items()))
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"\nthe ten largest {'kernels' if on_gpu else 'operators'}")
    for event in sorted(averages, key=lambda e: -getattr(e, key))[:10]:
        print(f"{getattr(event, key) / 1e3:9.2f} ms {event.count:5} x  {event.key[:90]}")


def main(argv) -> None:
    """`python kernels.py [--tokens=512,4096] [--only=attention,rope] [--out=results]`, or `profile config_x.py`."""
    if argv[:1] == ["profile"]:
        return profile(argv[1:])
    import argparse
    parser = argparse.ArgumentParser(prog="python kernels.py", description=__doc__.splitlines()[0],
                                     epilog="python kernels.py profile config_x.py profiles a training step")
    parser.add_argument("--tokens", default="512,1024,2048,4096,8192,16384,32768,65536", help="lengths to time")
    parser.add_argument("--only", default="", help="kernels to time, by name; all when empty")
    parser.add_argument("--out", default="results", help="folder for kernels.json and kernels.png")
    options = parser.parse_args(argv)
    check("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        benchmark([int(n) for n in options.tokens.split(",")], [name for name in options.only.split(",") if name],
                  options.out)
    else:
        print("left out: times, memory and roofline, which need a CUDA device")


if __name__ == "__main__":
    main(sys.argv[1:])
