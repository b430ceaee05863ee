"""One row times a matrix on a GPU: what decoding one text does seven times in every block, each weight read once.

A product of one row makes two FLOPs of each weight; in the time that it takes to come from memory a GPU could do
hundreds. So its speed is bandwidth over bytes, and rounded weights are faster only if nothing wider than they are is
ever written to memory.

    y[r] = sum of w[r, i] x[i]      bfloat16   w is loaded, multiplied, added, all in float32
                                    int8       the same, and the sum times the row's scale
                                    int4       a word is loaded, its eight numbers are cut out in registers

A program makes ROWS numbers of y: the row x is small and stays in the caches, and all of the program's loads of w are
on their way before its first sum. compress.py rounds; the order of int4, and RoundedLinear, which calls this, are in
onetoken.py.

    python bench.py decode llama-1.5b --graph=true --dtype=bfloat16       tokens/s, share of the bandwidth (CUDA)
"""
import torch
from torch import Tensor

from kernels import as_operator, constexpr, jit, launch, load, tl, triton, use_triton    # noqa: F401

ROWS = 4                             # 4 rows of 2,048 bfloat16 weights: 16 KB on their way for each program


@jit
def _one_row(x, w, scale, y, R, C: constexpr, SCALED: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """ROWS numbers of y (R,) = scale (R,) · w (R, C) x (C,); a scale only where SCALED."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, C, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        acc += load(w + row[:, None] * C + i, (row[:, None] < R) & (i < C)) * load(x + i, i < C)
    total = tl.sum(acc, axis=1)
    if SCALED:
        total *= load(scale + row, row < R)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < R)


@jit
def _one_row_int4(x, w, scale, y, R, C: constexpr, WORDS: constexpr, ROWS: constexpr, BLOCK: constexpr):
    """The same of int4: w (R, WORDS), scale (R, 2, C / 64), a row's scales, then its shifts. Bits 4 k … 4 k + 3 of
    word j hold number 128 (j // 16) + 16 k + j % 16, which stands for s (number - 8) + t: so with X the sum of four x,
    the four numbers of a group add s · sum((number - 8) x) + t X."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WORDS, BLOCK):
        j = start + tl.arange(0, BLOCK)[None, :]
        mask = (row[:, None] < R) & (j < WORDS)
        words = tl.load(w + row[:, None] * WORDS + j, mask=mask, other=0)
        for half in tl.static_range(2):                            # a word has four numbers of each of two groups
            group = j // 16 * 2 + half
            s = scale + row[:, None] * (2 * (C // 64)) + group
            known = mask & (group < C // 64)                       # the last word's second group may be padding
            weighted, plain = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
            for k in tl.static_range(4):
                i = group * 64 + 16 * k + j % 16
                values = load(x + i, i < C)
                # 0x4B000000 are the bits of 2^23 in float32; with n in their last places they are 2^23 + n, cheaper
                # than a conversion. 8388616 is 2^23 + 8: what is left is n - 8.
                number = ((words >> (16 * half + 4 * k)) & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
                weighted += number * values
                plain += values
            acc += load(s, known) * weighted + load(s + C // 64, known) * plain
    tl.store(y + row, tl.sum(acc, axis=1).to(y.dtype.element_ty), mask=row < R)


@as_operator
def one_row(x: Tensor, q: Tensor, scale: Tensor | None) -> Tensor:
    """x (1, C) times the matrix, (1, R) in x's dtype, without gradients. q and scale as in onetoken.RoundedLinear:
    q (R, C) int8 with scale (R, 1), or int32 (R, words) with scale (R, 2, C / 64), or floats with None."""
    (R, width), C, x = q.shape, x.shape[1], x.contiguous()
    y, grid = x.new_empty(1, R), (-(-R // ROWS),)
    if q.dtype == torch.int32:
        block = min(triton.next_power_of_2(width), 256)            # 8 numbers each
        launch(_one_row_int4, grid, x, q, scale, y, R, C=C, WORDS=width, ROWS=ROWS, BLOCK=block)
    else:
        block = min(triton.next_power_of_2(C), 2048)
        launch(_one_row, grid, x, q, q if scale is None else scale, y, R, C=C, SCALED=scale is not None, ROWS=ROWS,
               BLOCK=block)
    return y
