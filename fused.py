"""What a Transformer does between its matrix products, with the gradient written out: one pass over all numbers a way.

Autograd keeps an intermediate for every operation, and fresh memory is what a CPU is slow at: of a training step of the
default model matrix products were a quarter. So cross entropy, RMSNorm, SwiGLU and RoPE stand here as one function
forward and one backward, in torch and, for float32 and bfloat16 on a CPU, in C (fused.c), which reads each number once.
Both are equal by test to the simple versions in layers.py; torch.compile gets those and fuses them itself.

A step of a model 128 wide on one core of an Intel Xeon, in turns: with C 93 to 100 ms of CPU time, without 119 to 126.
"""
import functools
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch.autograd.function import once_differentiable

import native

KINDS = {torch.float32: 0, torch.bfloat16: 1}      # as in fused.c
P, I, L, F = c_void_p, c_int, c_int64, c_float
ARGUMENTS = {
    "rms_forward": (I, P, P, P, P, L, I, F), "rms_backward": (I, P, P, P, P, P, P, L, I, I),
    "rotate": (I, P, P, P, P, L, I, I, I, I), "swiglu_forward": (I, P, P, P, L),
    "swiglu_backward": (I, P, P, P, P, P, L), "entropy_forward": (I, P, P, L, I),
    "entropy_backward": (I, P, P, P, P, P, L, I)}


@functools.cache
def library():
    """fused.c compiled for this processor, or None where it cannot be."""
    made = native.load("fused", ["-fno-trapping-math", "-fno-math-errno"], openmp=True)
    for name, arguments in ARGUMENTS.items() if made is not None else ():
        getattr(made, name).argtypes, getattr(made, name).restype = arguments, None
    return made


def in_c(x) -> bool:
    """Whether fused.c takes such a tensor."""
    return (not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype in KINDS and x.numel() > 0
            and library() is not None)


def call(name, x, *arguments):
    """A function of fused.c, with the kind of x first; contiguous tensors go as addresses."""
    getattr(library(), name)(KINDS[x.dtype], *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or as it is in float64: sums of a thousand bfloat16 numbers keep two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fast(function, simple, *arguments):
    """`function`, a torch.autograd.Function; `simple` under torch.compile, which fuses it, and for one new token, where
    the fixed cost of the function is more than the arithmetic."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() and arguments[0].numel() < 2 ** 14:
        return simple(*arguments)
    return function.apply(*arguments)


class CrossEntropy(torch.autograd.Function):
    """token_cross_entropy with the gradient softmax(logits) - onehot(target). Autograd keeps float32 copies of the
    model's largest tensor; this keeps two numbers a row and works in pieces."""
    PIECE = 2 ** 18                  # elements

    @staticmethod
    def pieces(logits, *tensors):
        # On a GPU small pieces would be a hundred thousand launches; 2^27 elements take 0.5 GB there.
        rows = max(1, (CrossEntropy.PIECE if logits.device.type == "cpu" else 2 ** 27) // logits.shape[-1])
        return zip(*(tensor.split(rows) for tensor in (logits, *tensors)))

    @staticmethod
    def forward(ctx, logits, targets):
        V = logits.shape[-1]
        flat, ids = logits.reshape(-1, V).contiguous(), targets.reshape(-1, 1).contiguous()          # C reads both
        chosen = wide(flat.gather(-1, ids))                                                        # (rows, 1)
        sums = chosen.new_empty(len(ids), 2)             # a row's greatest number m, and log Σ exp(x - m)
        if in_c(flat):
            call("entropy_forward", flat, flat, sums, len(ids), V)
        else:
            sums[:, :1] = flat.amax(dim=-1, keepdim=True)
            for x, out in CrossEntropy.pieces(flat, sums):
                out[:, 1] = (x - out[:, :1]).exp_().sum(dim=-1).log_()
        ctx.save_for_backward(logits, ids, sums)
        return (sums[:, 1:] - (chosen - sums[:, :1])).reshape(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, ids, sums = ctx.saved_tensors
        flat, grad = logits.reshape(-1, logits.shape[-1]).contiguous(), grad.reshape(-1, 1).contiguous()
        dlogits = torch.empty_like(flat)
        if in_c(flat):
            call("entropy_backward", flat, grad, flat, ids, sums, dlogits, *flat.shape)
            return dlogits.view(logits.shape), None
        for x, row, token, g, out in CrossEntropy.pieces(flat, sums, ids, grad, dlogits):
            probabilities = (x - row[:, :1]).sub_(row[:, 1:]).exp_()
            probabilities.scatter_add_(-1, token, torch.full_like(row[:, :1], -1.0))
            out.copy_(probabilities.mul_(g))
        return dlogits.view(logits.shape), None


class RMSNorm(torch.autograd.Function):
    """rms_norm, y = n w with n = x r and r = 1 / sqrt(mean(x²) + eps); dx = r (g w - n mean(g w n)), dw = sum(g n)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x, w, n = x.contiguous(), wide(weight), x.shape[-1]
        if in_c(x) and n <= 2 ** 16:             # C keeps a row on its thread's stack
            y, r = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            call("rms_forward", x, x, weight.float(), y, r, r.numel(), n, eps)
        else:
            r = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True).square_().div_(n).add_(eps).rsqrt_()
            y = (wide(x) * r).mul_(w).to(x.dtype)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        w = wide(weight)
        if in_c(x) and len(w) <= 2 ** 16:
            dx, parts = torch.empty_like(x), r.new_zeros(torch.get_num_threads(), len(w))    # of each thread
            call("rms_backward", x, grad.contiguous(), x, weight.float(), r, dx, parts, r.numel(), len(w), len(parts))
            return dx, parts.sum(dim=0).to(weight.dtype), None
        g, n = wide(grad), wide(x) * r
        gn = g * n
        dweight = gn.reshape(-1, gn.shape[-1]).sum(dim=0)
        inner = gn.mul_(w).mean(dim=-1, keepdim=True)
        dx = torch.mul(g, w, out=gn).addcmul_(n, inner, value=-1).mul_(r)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class SwiGLU(torch.autograd.Function):
    """swiglu; keeps gate and up alone, where autograd keeps five tensors."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if not in_c(gate) or gate.dtype != up.dtype:
            return torch.nn.functional.silu(gate).mul_(up)
        y = torch.empty_like(gate)
        call("swiglu_forward", gate, gate, up, y, gate.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if not in_c(gate) or gate.dtype != up.dtype:
            return torch.ops.aten.silu_backward(grad * up, gate), torch.nn.functional.silu(gate).mul_(grad)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate, grad.contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup


class Rotate(torch.autograd.Function):
    """rotate of halves, where fused.c takes x (B, T, H, D); cos, sin: (T, 1, D / 2) or (B, T, 1, D / 2), float32."""

    @staticmethod
    def forward(ctx, x, cos, sin, back=False):
        (*_, H, D), x, cos, sin = x.shape, x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        call("rotate", x, x, cos, sin, y, x.numel() // D, H, cos.numel() // (D // 2), D, back)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Rotate.apply(grad, *ctx.saved_tensors, True), None, None, None
