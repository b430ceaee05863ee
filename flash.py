r"""Attention without the T x T matrix: FlashAttention-2 (2307.08691), in PyTorch tiles to read, in Triton to run.

softmax(q kᵀ / √D) v is two matrix products with a softmax between. Written out, the scores, T x T for each head, go to
memory and come back several times. Here a tile of them at a time is made, used and forgotten. Under a causal mask:

                 keys ->
       queries   [#][\][ ][ ]     #  seen by all queries of the tile: no mask
          |      [#][#][\][ ]     \  cut by the diagonal: mask
          v      [#][#][#][\]        never loaded

One program walks along one row of tiles and holds for each of its queries m, the largest score so far; l, the sum of
exp(score - m); acc, the sum of exp(score - m) v. A larger m shrinks both sums by exp(old m - new m), so the result is
exact (online softmax, 1805.02867). Scores 1 and 3 in one tile, 5 in the next:

    tile (1, 3)   m = 3   l = e^-2 + 1                          acc = e^-2 v1 + v2
    tile (5)      m = 5   l = (e^-2 + 1) e^-2 + 1 = 1.154       acc = (e^-2 v1 + v2) e^-2 + v3         o = acc / l

Kept for backward: q, k, v, o and L = m + log l, one number a query, with which P = exp(S - L) is computed again. The
softmax's gradient is dS = P ∘ (dP - delta), delta the sum of P ∘ dP over a row, of which a tile has only a part. But
dP = dO vᵀ, so sum_j P_ij dP_ij = sum_j P_ij (dO_i · v_j) = dO_i · sum_j P_ij v_j = dO_i · O_i: delta = rowsum(dO ∘ O),
known before the first tile.
Left out: dropout, masks and windows (attention.py: torch's sdpa), second derivatives, fp8, warp specialization.

    python flash.py     errors beside torch's own attention          python bench.py attention     times beside it
"""
import math
import subprocess
import sys

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import INTERPRET, TensorDescriptor, as_operator, constexpr, dot, jit, launch, tl, triton, use_triton

LOG2E = constexpr(math.log2(math.e))                   # exp(x) = 2^(x log2 e), and 2^x is one instruction
LOWEST = -1e30                                         # where the largest score starts: not -inf, as -inf - -inf is NaN
TILE = 64                                              # queries and keys of a tile in PyTorch


# --- the whole matrix, to compare with: every q is (heads, Tq, D), k and v (heads, Tk, D) here ---

def scores_of(q, k, is_causal: bool, offset: int | None = None):
    """q kᵀ / √D of a tile; if causal -inf where query i does not see a key: it sees those up to i + offset.
    None is the whole matrix, Tk - Tq: its last query sees the last key."""
    s = q @ k.mT / math.sqrt(q.shape[-1])
    if not is_causal:
        return s
    offset = s.shape[-1] - s.shape[-2] if offset is None else offset
    return s.masked_fill(~torch.ones_like(s, dtype=torch.bool).tril(offset), -math.inf)


def attention_reference(q, k, v, do, is_causal: bool):
    """(o, L (heads, Tq), dq, dk, dv) with all scores in memory; do: o's gradient. No key seen: o = 0, L = -inf."""
    s = scores_of(q, k, is_causal)
    lse = s.logsumexp(dim=-1, keepdim=True)
    p = torch.exp(s - lse.clamp(min=LOWEST))               # no key seen: exp(-inf - LOWEST) = 0, not exp(-inf + inf)
    o, dp = p @ v, do @ v.mT
    delta = (do * o).sum(dim=-1, keepdim=True)
    ds = p * (dp - delta) / math.sqrt(q.shape[-1])
    return o, lse.squeeze(-1), ds @ k, ds.mT @ q, p.mT @ do


# --- tiles in PyTorch: the algorithm to read ---

def wide(q, k, v, *more, group: int):
    """All in float32 at least; each head of k and v `group` times, once for each query head that uses it."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return [t.to(dtype) for t in (q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), *more)]


def tiled_forward(q, k, v, is_causal: bool):
    """(o, L) by FlashAttention-2's forward pass (algorithm 1). q (heads, Tq, D), k, v (key heads, Tk, D)."""
    (heads, Tq, _), Tk, dtype = q.shape, k.shape[1], q.dtype
    q, k, v = wide(q, k, v, group=heads // max(1, len(k)))
    o, lse = torch.empty_like(q), q.new_empty(heads, Tq)
    for i in range(0, Tq, TILE):
        q_i = q[:, i:i + TILE]
        last = min(Tk, i + q_i.shape[1] + Tk - Tq) if is_causal else Tk          # keys from here on: never loaded
        m, l, acc = torch.full_like(q_i[..., :1], LOWEST), torch.zeros_like(q_i[..., :1]), torch.zeros_like(q_i)
        for j in range(0, last, TILE):
            columns = slice(j, min(j + TILE, last))
            s = scores_of(q_i, k[:, columns], is_causal, i + Tk - Tq - j)
            m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
            p, shrink = torch.exp(s - m_new), torch.exp(m - m_new)
            acc = acc * shrink + p @ v[:, columns]
            l, m = l * shrink + p.sum(dim=-1, keepdim=True), m_new
        o[:, i:i + TILE] = acc / l.clamp(min=1e-30)                # no key seen: 0 / 1e-30, and L = m + log 0 = -inf
        lse[:, i:i + TILE] = (m + l.log()).squeeze(-1)
    return o.to(dtype), lse


def tiled_backward(q, k, v, o, lse, do, is_causal: bool):
    """(dq, dk, dv) by FlashAttention-2's backward pass (algorithm 2): P again, tile by tile."""
    inputs, (heads, Tq, D), (key_heads, Tk, _) = (q, k, v), q.shape, k.shape
    q, k, v, o, do = wide(q, k, v, o, do, group=heads // max(1, key_heads))
    lse, delta = lse.clamp(min=LOWEST)[..., None], (do * o).sum(dim=-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(0, Tk, TILE):
        k_j, v_j, columns = k[:, j:j + TILE], v[:, j:j + TILE], slice(j, j + TILE)
        first = max(0, j - (Tk - Tq)) if is_causal else 0          # the first query that sees a key of the tile
        for i in range(first, Tq, TILE):
            rows = slice(i, i + TILE)
            p = torch.exp(scores_of(q[:, rows], k_j, is_causal, i + Tk - Tq - j) - lse[:, rows])
            dp = do[:, rows] @ v_j.mT
            ds = p * (dp - delta[:, rows]) / math.sqrt(D)
            dv[:, columns] += p.mT @ do[:, rows]
            dk[:, columns] += ds.mT @ q[:, rows]
            dq[:, rows] += ds @ k_j
    dk, dv = (d.view(key_heads, heads // key_heads, Tk, D).sum(1) if key_heads < heads else d for d in (dk, dv))
    return tuple(d.to(t.dtype) for d, t in zip((dq, dk, dv), inputs))


# --- tiles in Triton ---

# Queries and keys of a tile; warps (of 32 threads) that share it; stages, how many of the loop's tiles are on their way
# at once. For D up to 128 and over, in the 99 KB of shared memory of consumer cards; by TMA, the best tried on an H200.
TILES = {"forward": ((128, 64, 8, 2), (64, 32, 8, 2), (64, 64, 4, 3)),
         "queries": ((64, 64, 8, 2), (32, 32, 4, 2), (64, 64, 4, 2)),
         "keys": ((32, 64, 8, 2), (32, 32, 4, 2), (64, 64, 4, 2))}


def uses_tma(x: Tensor) -> bool:
    """Whether tiles of x (heads, T, D) are moved by TMA, the unit of Hopper and B200 that copies a tile between memory
    and shared memory on one thread's order. It is told x's shape once, by a descriptor, and wants rows of 16 bytes."""
    return (x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10) and x.itemsize == 2 and x.numel() > 0
            and x.shape[-1] in range(8, 129, 8) and x.storage_offset() % 8 == 0)


def tiles(kernel: str, D: int, dtype: torch.dtype, tma: bool = False) -> dict:
    """The line of TILES for a kernel (forward, queries, keys), a padded head width and a dtype."""
    sizes = TILES[kernel][2 if tma else D > 128]
    if INTERPRET:                                      # small and uneven, so that a test of 130 tokens has every border
        sizes = (32, 64, 1, 1) if kernel == "keys" else (64, 32, 1, 1)
    elif dtype == torch.float32:                       # IEEE products take no tensor core and hold tiles in registers
        sizes = (32, 32, 4, 1) if D <= 64 else (16, 16, 4, 1)
    return dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"), sizes))


@jit
def addresses(x, head, start, T, ROWS: constexpr, D: constexpr, D_PAD: constexpr):
    """(addresses, mask) of rows start … start + ROWS of one head of x (heads, T, D), padded to D_PAD columns."""
    row, column = start + tl.arange(0, ROWS)[:, None], tl.arange(0, D_PAD)[None, :]
    return x + tl.cast(head, tl.int64) * T * D + (row.to(tl.int64) * D + column), (row < T) & (column < D)


@jit
def load_tile(x, head, start, T, ROWS: constexpr, D: constexpr, D_PAD: constexpr, TMA: constexpr):
    """Those rows as a tile, zeros outside x. TMA: x is a descriptor; else the address of its first number."""
    if TMA:
        tile = x.load([head, start, 0]).reshape(ROWS, D_PAD)
    else:
        address, mask = addresses(x, head, start, T, ROWS, D, D_PAD)
        tile = tl.load(address, mask=mask, other=0.0)
    return tile


@jit
def store_tile(x, head, start, T, tile, ROWS: constexpr, D: constexpr, D_PAD: constexpr, TMA: constexpr):
    """Store what of a (ROWS, D_PAD) tile lies inside x there, in x's dtype."""
    if TMA:
        x.store([head, start, 0], tile.to(x.dtype).reshape(1, ROWS, D_PAD))
    else:
        address, mask = addresses(x, head, start, T, ROWS, D, D_PAD)
        tl.store(address, tile.to(x.dtype.element_ty), mask=mask)


@jit
def scores(a, b, query, key, Tq, Tk, MASKED: constexpr, CAUSAL: constexpr):
    """a bᵀ of two tiles, one of queries and one of keys; if MASKED -inf where the query does not see the key. Causal
    queries before Tq see no key from Tk on; those from Tq on are zeros and nowhere stored."""
    s = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32))
    if MASKED:
        s = tl.where(key <= (query + (Tk - Tq) if CAUSAL else Tk - 1), s, -float("inf"))
    return s


@jit
def key_limits(q0, Tq, Tk, CAUSAL: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """(whole, last): before `whole` are tiles of keys that all BLOCK_Q queries from q0 on see (# at the head), no query
    of them sees a key from `last` on. Between stand the tiles that need a mask."""
    by_all = tl.minimum(Tk, tl.maximum(0, q0 + 1 + Tk - Tq)) if CAUSAL else Tk
    by_any = tl.minimum(Tk, tl.maximum(0, q0 + BLOCK_Q + Tk - Tq)) if CAUSAL else Tk
    return by_all // BLOCK_K * BLOCK_K, by_any


@jit
def _flash_forward(lse, q, k, v, o, Tq, Tk, scale, GROUP: constexpr, D: constexpr, D_PAD: constexpr,
                   CAUSAL: constexpr, TMA: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """BLOCK_Q queries of one head. q, o (heads, Tq, D); k, v (heads / GROUP, Tk, D); lse (heads, Tq) float32. scale is
    log2(e) / √D: scores are in base 2. Programs start in the order of their ids. Neighbours share a head, whose keys
    and values then come from L2; the causal triangle's longest rows go first, so that what finishes last is short."""
    blocks, pid = tl.cdiv(Tq, BLOCK_Q), tl.program_id(0)
    q0, head = (blocks - 1 - pid % blocks) * BLOCK_Q, pid // blocks
    query, key = q0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_tile = load_tile(q, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA)
    m, l = tl.full((BLOCK_Q,), -1e30, tl.float32), tl.zeros((BLOCK_Q,), tl.float32)            # from LOWEST and 0
    acc = tl.zeros((BLOCK_Q, D_PAD), tl.float32)
    whole, last = key_limits(q0, Tq, Tk, CAUSAL, BLOCK_Q, BLOCK_K)
    for MASKED in tl.static_range(2):                              # two loops: first the whole tiles, without a mask
        for k0 in range(whole if MASKED else 0, last if MASKED else whole, BLOCK_K):
            k_tile = load_tile(k, head // GROUP, k0, Tk, BLOCK_K, D, D_PAD, TMA)
            s = scores(q_tile, k_tile, query[:, None], (k0 + key)[None, :], Tq, Tk, MASKED, CAUSAL)
            m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
            p, shrink = tl.exp2(s * scale - m_new[:, None]), tl.exp2(m - m_new)        # s * scale - m: one instruction
            v_tile = load_tile(v, head // GROUP, k0, Tk, BLOCK_K, D, D_PAD, TMA)
            acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
            l, m = l * shrink + tl.sum(p, axis=1), m_new
    m, l = tl.where(l == 0.0, -float("inf"), m), tl.where(l == 0.0, 1.0, l)            # no key seen: o = 0, L = -inf
    store_tile(o, head, q0, Tq, acc / l[:, None], BLOCK_Q, D, D_PAD, TMA)
    tl.store(lse + head.to(tl.int64) * Tq + query, (m + tl.log2(l)) / LOG2E, mask=query < Tq)


@jit
def _flash_queries(lse, q, k, v, o, do, delta, dq, Tq, Tk, scale, GROUP: constexpr, D: constexpr, D_PAD: constexpr,
                   CAUSAL: constexpr, TMA: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """dQ = dS K / √D of BLOCK_Q queries of one head, walking over the keys as forward does; lse in base 2. It leaves
    delta (heads, Tq) = rowsum(dO ∘ O) for the kernel of the keys, and so runs first."""
    blocks, pid = tl.cdiv(Tq, BLOCK_Q), tl.program_id(0)
    q0, head = (blocks - 1 - pid % blocks) * BLOCK_Q, pid // blocks
    query, key = q0 + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    row = head.to(tl.int64) * Tq + query
    q_tile = load_tile(q, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA)
    do_tile = load_tile(do, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA)
    o_tile = load_tile(o, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA).to(tl.float32)
    row_delta = tl.sum(o_tile * do_tile.to(tl.float32), axis=1)
    tl.store(delta + row, row_delta, mask=query < Tq)
    row_lse = tl.load(lse + row, mask=query < Tq, other=0.0)
    acc = tl.zeros((BLOCK_Q, D_PAD), tl.float32)
    whole, last = key_limits(q0, Tq, Tk, CAUSAL, BLOCK_Q, BLOCK_K)
    for MASKED in tl.static_range(2):
        for k0 in range(whole if MASKED else 0, last if MASKED else whole, BLOCK_K):
            k_tile = load_tile(k, head // GROUP, k0, Tk, BLOCK_K, D, D_PAD, TMA)
            s = scores(q_tile, k_tile, query[:, None], (k0 + key)[None, :], Tq, Tk, MASKED, CAUSAL)
            p = tl.exp2(s * scale - row_lse[:, None])
            v_tile = load_tile(v, head // GROUP, k0, Tk, BLOCK_K, D, D_PAD, TMA)
            dp = dot(do_tile, tl.trans(v_tile), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32))
            acc = dot((p * (dp - row_delta[:, None])).to(k_tile.dtype), k_tile, acc)
    store_tile(dq, head, q0, Tq, acc * (scale / LOG2E), BLOCK_Q, D, D_PAD, TMA)            # scale / LOG2E = 1 / √D


@jit
def _flash_keys(lse, q, k, v, do, delta, dk, dv, Tq, Tk, scale, GROUP: constexpr, D: constexpr, D_PAD: constexpr,
                CAUSAL: constexpr, TMA: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr):
    """dV = Pᵀ dO and dK = dSᵀ Q / √D of BLOCK_K keys of one key head, summed over the queries of GROUP heads. Scores
    stand as (keys, queries): so P and dS enter the second products as they lie in registers. S and dP come twice, 7
    products where 5 would do: in one kernel many programs would add to a row of dQ, in another order in each run."""
    blocks, pid = tl.cdiv(Tk, BLOCK_K), tl.program_id(0)
    k0, key_head = pid % blocks * BLOCK_K, pid // blocks
    key = k0 + tl.arange(0, BLOCK_K)
    k_tile = load_tile(k, key_head, k0, Tk, BLOCK_K, D, D_PAD, TMA)
    v_tile = load_tile(v, key_head, k0, Tk, BLOCK_K, D, D_PAD, TMA)
    dk_tile, dv_tile = tl.zeros((BLOCK_K, D_PAD), tl.float32), tl.zeros((BLOCK_K, D_PAD), tl.float32)
    first = tl.maximum(0, k0 - (Tk - Tq)) // BLOCK_Q * BLOCK_Q     # the first tile of queries that see some of them
    whole = tl.minimum(tl.cdiv(tl.maximum(0, k0 + BLOCK_K - 1 - (Tk - Tq)), BLOCK_Q) * BLOCK_Q, Tq) if CAUSAL else 0
    for member in range(GROUP):
        head = key_head * GROUP + member
        for MASKED in tl.static_range(2 if CAUSAL else 1):
            for q0 in range(first if MASKED else whole, whole if MASKED else Tq, BLOCK_Q):
                query = q0 + tl.arange(0, BLOCK_Q)
                row = tl.cast(head, tl.int64) * Tq + query
                q_tile = load_tile(q, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA)
                s = scores(k_tile, q_tile, query[None, :], key[:, None], Tq, Tk, MASKED, CAUSAL)
                p = tl.exp2(s * scale - tl.load(lse + row, mask=query < Tq, other=0.0)[None, :])
                do_tile = load_tile(do, head, q0, Tq, BLOCK_Q, D, D_PAD, TMA)
                dv_tile = dot(p.to(do_tile.dtype), do_tile, dv_tile)
                dp = dot(v_tile, tl.trans(do_tile), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32))
                ds = p * (dp - tl.load(delta + row, mask=query < Tq, other=0.0)[None, :])
                dk_tile = dot(ds.to(q_tile.dtype), q_tile, dk_tile)
    store_tile(dk, key_head, k0, Tk, dk_tile * (scale / LOG2E), BLOCK_K, D, D_PAD, TMA)
    store_tile(dv, key_head, k0, Tk, dv_tile, BLOCK_K, D, D_PAD, TMA)


def launch_flash(kernel, name: str, is_causal: bool, lse, queries: dict, keys: dict, **more) -> None:
    """Launch one of the three. queries, keys: contiguous arguments (heads, Tq, D) and (key heads, Tk, D) by name."""
    (heads, Tq, D), (key_heads, Tk, _), dtype = queries["q"].shape, keys["k"].shape, queries["q"].dtype
    D_PAD = max(16, triton.next_power_of_2(D))                     # tl.dot takes no side below 16
    tma = all(uses_tma(x) for x in (queries | keys).values())
    tile = tiles(name, D_PAD, dtype, tma)
    more |= {key: TensorDescriptor.from_tensor(x, [1, tile[size], D_PAD]) if tma else x
             for size, tensors in (("BLOCK_Q", queries), ("BLOCK_K", keys)) for key, x in tensors.items()}
    rows, length, block = (key_heads, Tk, "BLOCK_K") if name == "keys" else (heads, Tq, "BLOCK_Q")
    launch(kernel, (rows * triton.cdiv(length, tile[block]),), lse, Tq=Tq, Tk=Tk, scale=math.log2(math.e) / D ** 0.5,
           GROUP=heads // max(1, key_heads), D=D, D_PAD=D_PAD, CAUSAL=is_causal, TMA=tma, **tile, **more)


@as_operator
def flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(o, L) from the forward kernel."""
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    launch_flash(_flash_forward, "forward", is_causal, lse, dict(q=q, o=o), dict(k=k, v=v))
    return o, lse


@as_operator
def flash_backward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
                   is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the kernel of the queries and then that of the keys."""
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    lse = (lse * math.log2(math.e)).clamp(min=LOWEST)              # no key seen: exp2(-inf - L) must be 0, not NaN
    launch_flash(_flash_queries, "queries", is_causal, lse, dict(q=q, o=o, do=do, dq=dq), dict(k=k, v=v), delta=delta)
    launch_flash(_flash_keys, "keys", is_causal, lse, dict(q=q, do=do), dict(k=k, v=v, dk=dk, dv=dv), delta=delta)
    return dq, dk, dv


# --- for autograd ---

def flat(x: Tensor, last: int = 2) -> Tensor:
    """x (..., T, D) as contiguous (heads, T, D): all but the last dimensions become one. Copied only if it must be."""
    return x.reshape(math.prod(x.shape[:-last]), *x.shape[-last:]).contiguous()


class FlashAttentionPyTorch(torch.autograd.Function):
    """apply(q, k, v, is_causal) -> o (..., Tq, D) = softmax(q kᵀ / √D) v by tiles, in plain PyTorch; any float dtype.
    q (..., H, Tq, D); k and v (..., K, Tk, D), H a multiple of K (grouped queries). Causal: query i sees the keys up to
    i + Tk - Tq; one that sees none gives zeros. Saved: q, k, v, o and L (..., Tq), the logsumexp of the scores."""
    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, functions=(tiled_forward, tiled_backward)):
        heads, key_heads = math.prod(q.shape[-3:-2]), math.prod(k.shape[-3:-2])        # 1 for (T, D) alone
        alike = q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.dim() == k.dim() and q.is_floating_point()
        if not alike or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1] or heads % max(1, key_heads):
            raise ValueError(f"attention takes q (..., H, Tq, D) and k, v (..., K, Tk, D) of one float dtype, H a "
                             f"multiple of K, not {q.dtype} {q.shape}, {k.dtype} {k.shape}, {v.dtype} {v.shape}")
        forward, ctx.backward_function = functions
        o, lse = forward(flat(q), flat(k), flat(v), bool(is_causal))
        o, lse, ctx.is_causal = o.view(q.shape), lse.view(q.shape[:-1]), bool(is_causal)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = ctx.backward_function(flat(q), flat(k), flat(v), flat(o), flat(lse, 1), flat(do), ctx.is_causal)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None


class FlashAttentionTriton(FlashAttentionPyTorch):
    """The same in Triton, summed in float32, for D up to 256; off CUDA and in float64 the tiles in PyTorch run. FLOPs a
    head: forward 4 Tq Tk D, backward 14, half if causal: bound by arithmetic from a few hundred keys on."""
    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        if q.shape[-1] > 256:
            raise ValueError(f"head width {q.shape[-1]} is over 256: use more heads, or FlashAttentionPyTorch")
        functions = (flash_forward, flash_backward) if use_triton(q) else (tiled_forward, tiled_backward)
        return FlashAttentionPyTorch.forward(ctx, q, k, v, is_causal, functions)


if __name__ == "__main__":
    bench = __file__.replace("flash.py", "bench.py")
    sys.exit(subprocess.call([sys.executable, bench, "kernels", "--page=flash", *sys.argv[1:]]))
