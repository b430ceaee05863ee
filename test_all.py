"""One pass or fail line per claim: `python test_all.py` runs pytest on this file and exits with its status.

CPU only, offline, no timing assertions. Sections stand in the order of the scripts; each piece has a
golden example worked by hand, an independent reference, a property, and its end to end.
Extra arguments go to pytest: `python test_all.py -k bpe`.
"""
import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when kernels.py decorates its kernels, so before any import of it

import bpe
import checkpoint
import configurator
import data
import evaluate
import optim
import sample
import train
from model import ModelConfig, Transformer

torch.set_num_threads(1)                 # the models here are tiny: a second thread would cost more than it brings

# --- bpe.py ---


# --- optim.py ---

def copies(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return first, [p.detach().clone().requires_grad_() for p in first]


def test_adamw_follows_torch_for_1000_steps():
    ours, theirs = copies([(5, 7), (3,), (2, 2, 2)])
    a, b = optim.AdamW(ours, lr=1e-3, weight_decay=0.01), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    largest = max((p - q).abs().max().item() for p, q in zip(ours, theirs))
    assert largest < 2e-6, largest  # decay after the step instead of before: lr² · decay a step, and float32 rounding


def test_adamw_first_step_by_hand():
    p = torch.tensor([1.0], requires_grad=True)
    optimizer = optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.5)
    p.grad = torch.tensor([4.0])
    optimizer.step()
    assert p.item() == pytest.approx((1.0 - 0.1) * (1 - 0.1 * 0.5))       # m̂/√v̂ = 1 on the first step, then decay


def test_adamw_state_moves_to_torch_and_back():
    ours, theirs = copies([(4, 3)])
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    for p, optimizer in ((ours[0], a), (theirs[0], b)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert set(a.state_dict()["state"][0]) == set(b.state_dict()["state"][0])
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    a.step()
    b.step()
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=0)


def test_parameters_without_gradient_stay():
    p, q = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    for optimizer in (optim.AdamW([p, q], lr=0.1), optim.Muon([p, q], lr=0.1)):
        optimizer.step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (3, 24, 16)])
def test_muon_update_has_singular_values_near_one(shape):
    values = torch.linalg.svdvals(
        optim.orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert 0.3 < values.min() and values.max() < 1.3, (values.min(), values.max())  # the quintic's own band, plus bf16


def test_muon_step_is_the_orthogonalized_momentum():
    p = torch.zeros(8, 4, requires_grad=True)
    gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    optimizer = optim.Muon([p], lr=0.1, momentum=0.9)
    p.grad = gradient.clone()
    optimizer.step()
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    direction = -p.detach() / (0.1 * 2 ** 0.5)                           # max(1, rows / columns)^½ = √2
    cosine = (direction * (u @ vh)).sum() / direction.norm() / (u @ vh).norm()
    assert cosine > 0.97, cosine
    with pytest.raises(ValueError, match="matrices"):
        optim.Muon([torch.zeros(3, requires_grad=True)])


def test_cosine_schedule_of_the_handout():
    values = [optim.cosine_schedule(t, 1.0, 0.1, 7, 21) for t in range(25)]
    assert values[:8] == pytest.approx([t / 7 for t in range(8)])
    assert values[14] == pytest.approx(0.55) and values[21:] == pytest.approx([0.1] * 4)


def test_wsd_schedule():
    values = [optim.wsd_schedule(t, 2.0, 0.0, 2, 4, 4) for t in range(12)]
    assert values == pytest.approx([0, 1, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0])


def test_clipping_is_global_and_skips_missing_gradients():
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert optim.clip_grad_norm([a, b, c], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([3.0, 0.0, 0.0, 4.0]) / (5.0 + 1e-6))
    before = a.grad.clone()
    optim.clip_grad_norm([a, b, c], 10.0)
    assert torch.equal(a.grad, before) and c.grad is None


@pytest.mark.parametrize("make", [lambda p: optim.AdamW(p, lr=-1), lambda p: optim.AdamW(p, betas=(1.0, 0.9)),
                                  lambda p: optim.Muon(p, momentum=1.5)])
def test_bad_optimizer_settings_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make([torch.zeros(2, 2, requires_grad=True)])


# --- kernels.py ---

FLASH_CASES = [                    # Tq, Tk, D, query heads a key head, causal, window: every value meets every neighbour
    (1, 1, 16, 1, True, None), (1, 130, 80, 4, True, None), (1, 17, 64, 2, False, None), (7, 7, 80, 2, True, 3),
    (7, 65, 16, 4, False, None), (17, 17, 64, 1, True, None), (17, 7, 32, 2, True, None), (17, 127, 16, 1, True, 17),
    (64, 64, 16, 2, True, 64), (64, 17, 80, 1, True, 7), (64, 130, 32, 4, True, None), (65, 65, 32, 1, True, 17),
    (65, 64, 64, 4, True, None), (65, 130, 80, 2, False, None), (127, 127, 64, 2, True, 1), (127, 64, 16, 1, False, None),
    (127, 130, 32, 4, True, 65), (130, 130, 80, 1, True, None), (130, 127, 32, 2, True, 33), (130, 7, 16, 4, True, None)]
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # a few roundings at the size of the largest entry


@pytest.fixture(scope="module")
def kernels():
    """kernels.py with its kernels interpreted: Triton reads TRITON_INTERPRET when it decorates them."""
    pytest.importorskip("triton")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import kernels
    if not kernels.INTERPRET and not torch.cuda.is_available():
        pytest.skip("kernels.py was imported without TRITON_INTERPRET=1, and there is no CUDA device")
    return kernels


def assert_like_float64(function, reference, *inputs, exact=None):
    """Outputs and every gradient of function(*inputs) against reference in float64 on the same (rounded) numbers."""
    def run(f, xs):
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]
        outs = f(*xs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(1)
        ups = [torch.randn(o.shape, generator=generator).to(o.dtype).to(o.device) for o in outs]
        return [*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], ups)]
    tolerance = exact or TOLERANCE[str(inputs[0].dtype)[6:]]
    found = run(function, inputs)
    right = run(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.shape == b.shape and a.isfinite().all(), f"result {i}: shape {tuple(a.shape)}, or not finite"
        error = (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error < tolerance, f"result {i} of {len(found)}: error {error:.1e} of the largest entry, allowed {tolerance}"


def flash_inputs(Tq, Tk, D, group, dtype=None):
    torch.manual_seed(Tq * 1000 + Tk)
    return (torch.randn(shape).to(dtype or torch.float32) for shape in ((1, 2 * group, Tq, D), (1, 2, Tk, D), (1, 2, Tk, D)))


def sdpa(q, k, v, is_causal, window):
    """The independent reference: torch's own attention with an explicit mask, zeros where a row sees nothing."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    if is_causal:
        mask = mask.tril(Tk - Tq)
    if window is not None:
        mask &= ~torch.ones_like(mask).tril(Tk - Tq - window)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask | ~mask.any(-1, keepdim=True), enable_gqa=True)
    return out * mask.any(-1, keepdim=True)


@pytest.mark.parametrize("case", FLASH_CASES, ids=str)
def test_flash_attention_and_its_gradients_equal_float64(kernels, case):
    *shape, is_causal, window = case
    for function in (kernels.FlashAttentionTriton, kernels.FlashAttentionPyTorch):
        assert_like_float64(lambda q, k, v: function.apply(q, k, v, is_causal, window),
                            lambda q, k, v: sdpa(q, k, v, is_causal, window), *flash_inputs(*shape))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_flash_attention_in_half_precision(kernels, dtype):
    assert_like_float64(lambda q, k, v: kernels.flash_attention(q, k, v, window=50),
                        lambda q, k, v: sdpa(q, k, v, True, 50), *flash_inputs(65, 130, 80, 2, getattr(torch, dtype)))


def test_flash_attention_strides_and_leading_dimensions(kernels):
    flash = kernels.FlashAttentionTriton.apply
    q, k, v = flash_inputs(17, 17, 16, 2)
    want = flash(q, k, v, True)
    def strided(x):                                                             # (B, T, H, D) memory, NaN between the heads
        room = torch.full((x.shape[0], x.shape[2], x.shape[1], 24), float("nan"))
        return room.transpose(1, 2)[..., 4:20].copy_(x)
    assert torch.equal(flash(strided(q), strided(k), strided(v), True), want)
    assert torch.equal(flash(q[0], k[0], v[0], True), want[0])
    assert torch.equal(flash(q[:, :, None, None], *(t[:, :, None, None].repeat_interleave(2, 1) for t in (k, v)), True)[:, :, 0, 0], want)
    assert torch.equal(flash(q[0, 0], k[0, 0], v[0, 0], True), want[0, 0])


@pytest.mark.parametrize("name", ["FlashAttentionTriton", "FlashAttentionPyTorch"])
def test_flash_attention_saves_the_log_sum_exp_and_rows_without_keys_are_zero(kernels, name):
    q, k, v = (t.requires_grad_() for t in flash_inputs(9, 5, 16, 2))           # queries 0 to 3 see no key
    o = getattr(kernels, name).apply(q, k, v, True)
    saved = o.grad_fn.saved_tensors
    lse, = [t for t in saved if t.shape == q.shape[:-1]]
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(9, 5, dtype=torch.bool).tril(-4), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert len(saved) == 5, f"{len(saved)} tensors saved; q, k, v, o and L are enough"
    o.sum().backward()
    assert not o[:, :, :4].any() and not q.grad[:, :, :4].any() and q.grad[:, :, 5:].any()
    empty = getattr(kernels, name).apply(q, k[:, :, :0], v[:, :, :0], False)
    assert empty.shape == q.shape and not empty.any()


def test_flash_attention_never_touches_keys_out_of_sight(kernels):
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, 64:] = v[:, :, 64:] = float("nan")                                  # past the diagonal for the first 64 queries
    assert kernels.flash_attention(q, k, v)[:, :, :64].isfinite().all()
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, :64] = v[:, :, :64] = float("nan")                                  # before the window of query 74 on
    assert kernels.flash_attention(q, k, v, window=10)[:, :, 128:].isfinite().all()


def test_flash_attention_refuses_what_it_cannot_do(kernels):
    q = torch.zeros(2, 4, 8, 16)
    for text, arguments in [("257", [torch.zeros(2, 8, 257)] * 3), ("float64", [q.double()] * 3), ("window=0", [q, q, q, True, 0]),
                            ("is_causal=True", [q, q, q, False, 4]), ("divisor", [q, q[:, :3], q[:, :3]]), ("rank", [q, q[0], q[0]]),
                            ("head width 16", [q, q[..., :8], q[..., :8]]), ("one floating dtype", [q, q.half(), q.half()])]:
        with pytest.raises(ValueError, match=text):
            kernels.FlashAttentionTriton.apply(*arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_layers_and_their_gradients_equal_float64(kernels, dtype):
    torch.manual_seed(0)
    def randn(*shape):
        return torch.randn(shape).to(getattr(torch, dtype))
    F = torch.nn.functional
    for shape in ((3, 7, 80), (65, 1), (5, 1000)):
        x, weight, residual = randn(*shape), randn(shape[-1]), randn(*shape)
        assert_like_float64(kernels.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5), x, weight)
        if dtype == "float32":                                                  # in half precision the sum itself is rounded
            assert_like_float64(lambda x, w, r: kernels.rms_norm(x, w, 1e-6, r),
                                lambda x, w, r: (F.rms_norm(x + r, x.shape[-1:], w, 1e-6), x + r), x, weight, residual)
        assert_like_float64(kernels.swiglu, lambda g, u: F.silu(g) * u, x, residual)
        assert_like_float64(kernels.softmax, lambda x: F.softmax(x, dim=-1), 5 * x)
    angle = torch.randn(2, 17, 8)
    q, k = randn(2, 17, 6, 16).transpose(1, 2), randn(2, 3, 17, 16)
    turn = torch.polar(torch.ones(2, 1, 17, 8, dtype=torch.float64), angle[:, None].double())
    def by_complex(interleaved):                                                # a pair of numbers is a complex one
        def rotate(x):
            pairs = x.unflatten(-1, (8, 2) if interleaved else (2, 8))
            pairs = torch.view_as_real(torch.view_as_complex((pairs if interleaved else pairs.mT).contiguous()) * turn)
            return (pairs if interleaved else pairs.mT).flatten(-2)
        return lambda q, k: (rotate(q), rotate(k))
    for interleaved in (False, True):
        assert_like_float64(lambda q, k: kernels.apply_rope(q, k, angle.cos(), angle.sin(), interleaved), by_complex(interleaved), q, k)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_alone_and_after_a_linear_layer(kernels, dtype, reduction):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 24).to(getattr(torch, dtype)), torch.randn(201, 24).to(getattr(torch, dtype))
    targets = torch.randint(0, 201, (2, 9))
    targets[0, 3], targets[1] = -100, torch.tensor([0, 200, 64, 63, -100, 5, 6, 7, 8])
    def right(logits):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss
    assert_like_float64(lambda z: kernels.cross_entropy(z, targets, reduction=reduction), right, x @ weight.T * 3)
    for chunk in (4, None):
        assert_like_float64(lambda x, w: kernels.linear_cross_entropy(x, w, targets, -100, reduction, chunk),
                            lambda x, w: right(x @ w.T), x, weight)


def test_cross_entropy_corners(kernels):
    logits, ignored = (torch.randn(4, 10) * 1000).requires_grad_(), torch.full((4,), -100)
    loss = kernels.cross_entropy(logits, ignored)
    loss.backward()
    assert loss.isnan() and not logits.grad.any()                               # a mean of nothing, as in torch
    assert kernels.cross_entropy(logits, torch.arange(4)).isfinite()
    infinite = torch.tensor([[float("-inf"), 0.0, 0.0], [float("nan")] * 3], requires_grad=True)
    kernels.cross_entropy(infinite, torch.tensor([1, -1]), ignore_index=-1, reduction="sum").backward()
    torch.testing.assert_close(infinite.grad, torch.tensor([[0, -0.5, 0.5], [0, 0, 0]]))
    leaf = torch.randn(4, 10, requires_grad=True)
    for overwrite in (False, True):
        z = leaf * 1
        loss = kernels.cross_entropy(z, torch.arange(4), overwrite=overwrite)
        dz, = torch.autograd.grad(loss, z, retain_graph=True)
        assert (dz.data_ptr() == z.data_ptr()) == overwrite, "overwrite=True must need no second (N, V) tensor"
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()
    for error, arguments in [(IndexError, (logits, torch.arange(4) + 7)), (ValueError, (logits, torch.arange(3))),
                             (ValueError, (logits, torch.arange(4), -100, "max")), (IndexError, (logits, ignored, -1))]:
        with pytest.raises(error):
            kernels.cross_entropy(*arguments)


def test_linear_cross_entropy_never_holds_all_logits(kernels):
    largest = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(max((t.nbytes for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)), default=0))
            return out
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with Watch():
        kernels.linear_cross_entropy(x, weight, torch.arange(64), chunk_tokens=16).backward()
    assert max(largest) == 16 * 300 * 4, f"a tensor of {max(largest)} bytes was made; a chunk of logits has {16 * 300 * 4}"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_int8_and_matmul(kernels, dtype):
    torch.manual_seed(0)
    def close(a, b):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert a.isfinite().all() and error < TOLERANCE[dtype], f"error {error:.1e} of the largest entry"
    def randn(*shape):
        return torch.randn(shape).to(getattr(torch, dtype))
    for H, K, T, D in ((6, 2, 300, 80), (1, 1, 1, 16), (4, 4, 130, 64)):
        q, k, v = randn(2, H, D), randn(2, K, T, D), randn(2, K, T, D)
        for lengths in (torch.tensor([T, T]), torch.tensor([0, T // 3 + 1])):
            want = [sdpa(q[b:b + 1, :, None].double(), k[b:b + 1, :, :n].double(), v[b:b + 1, :, :n].double(), False, None)[:, :, 0]
                    if n else torch.zeros(1, H, D).double() for b, n in enumerate(lengths.tolist())]
            close(kernels.decode_attention(q, k, v, lengths), torch.cat(want))
    weight = torch.randn(100, 70)
    quantised, scale = kernels.quantize_int8(weight)
    assert ((quantised * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()
    x = randn(2, 3, 70)
    close(kernels.int8_matvec(x, quantised, scale), x.double() @ (quantised.double() * scale[:, None].double()).T)
    for M, K, N in ((1, 1, 1), (70, 100, 90), (33, 17, 129)):
        a, b = randn(M, K), randn(N, K).T
        close(kernels.matmul(a, b), a.double() @ b.double())


def test_kernels_write_every_number_and_read_none_outside(kernels):
    # Fresh memory holds NaN in this mode, so that a number left unwritten, or read from beyond an edge, spreads.
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = (t.requires_grad_() for t in flash_inputs(70, 65, 24, 2))
        x, weight = torch.randn(37, 33, requires_grad=True), torch.randn(33, requires_grad=True)
        outs = [kernels.flash_attention(q, k, v, window=9), kernels.rms_norm(x, weight), kernels.swiglu(x, x), kernels.softmax(x),
                *kernels.apply_rope(q, q, torch.rand(70, 12), torch.rand(70, 12)),
                kernels.cross_entropy(x, torch.arange(37) % 33, reduction="none"),
                kernels.linear_cross_entropy(x, torch.randn(50, 33), torch.arange(37), chunk_tokens=10)]
        results = [*outs, *torch.autograd.grad([o.sum() for o in outs], [q, k, v, x, weight]),
                   kernels.decode_attention(q[:, :, 0].detach(), k.detach(), v.detach()), kernels.matmul(x.detach(), x.detach().T)]
    finally:
        torch.use_deterministic_algorithms(False)
    for i, result in enumerate(results):
        assert result.isfinite().all(), f"result {i} has numbers that nobody wrote"


def test_kernels_import_quietly_and_fall_back_with_one_line(tmp_path):
    code = "import torch, kernels\n" \
           "assert not torch.cuda.is_initialized()\n" \
           "print('imported')\n" \
           "q = torch.randn(1, 2, 9, 16, requires_grad=True)\n" \
           "for _ in range(2): kernels.flash_attention(q, q, q).sum().backward()\n" \
           "x = torch.randn(4, 16, requires_grad=True)\n" \
           "y = kernels.swiglu(kernels.rms_norm(x, torch.ones(16)), kernels.softmax(x))\n" \
           "kernels.linear_cross_entropy(y, torch.randn(20, 16), torch.arange(4), chunk_tokens=3).backward()\n" \
           "kernels.decode_attention(q[:, :, 0], q, q); kernels.int8_matvec(x, *kernels.quantize_int8(torch.randn(3, 16)))\n" \
           "assert x.grad.abs().sum() > 0 and q.grad.abs().sum() > 0"
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    here = os.path.dirname(os.path.abspath(__file__))
    for path, reason in ((f"{tmp_path}{os.pathsep}{here}", "not installed"), (here, "no kernel runs on cpu")):
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        if reason != "not installed":
            pytest.importorskip("triton")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[0] == "imported" and len(lines) == 2 and reason in lines[1], lines



# --- parallel.py ---


# --- configurator.py and checkpoint.py ---

@dataclasses.dataclass
class Toy:
    width: int = 4             # how wide
    rate: float = 0.1          # how fast
    name: str | None = None    # what it is called
    loud: bool = False         # whether to shout


def test_defaults_then_file_then_flags(tmp_path):
    path = tmp_path / "config_toy.py"
    path.write_text('"""A docstring."""\nhalf = 8\n'.replace("half", "width") + "rate = width * 0.5\nname = 'a'\n",
                    encoding="utf-8")
    config, sources = configurator.resolve(Toy, {"rate": "1e-2", "loud": "1"}, str(path))
    assert config == Toy(8, 0.01, "a", True)
    assert sources == {"width": str(path), "rate": "flag", "name": str(path), "loud": "flag"}


@pytest.mark.parametrize("key, text, value", [("width", "1e4", 10_000), ("width", "-3", -3), ("rate", "3", 3.0),
                                              ("loud", "true", True), ("loud", "0", False), ("name", "none", None),
                                              ("name", "None", None), ("name", "7", "7")])
def test_values_take_the_type_of_the_field(key, text, value):
    config, _ = configurator.resolve(Toy, {key: text})
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("flags, words", [({"widht": "3"}, "Did you mean width"),
                                          ({"width": "2.5"}, "width='2.5' is not a int"),
                                          ({"loud": "perhaps"}, "loud='perhaps'"), ({"rate": "fast"}, "rate='fast'")])
def test_bad_settings_say_what_and_what_instead(flags, words):
    with pytest.raises(configurator.ConfigError, match=re.escape(words)):
        configurator.resolve(Toy, flags)


@pytest.mark.parametrize(
    "line",
    ["import os", "width = open('x')", "width = __import__('os').getpid()", "width: int = 3", "for i in x: pass"])
def test_config_files_cannot_run_code(tmp_path, line):
    path = tmp_path / "config_bad.py"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(configurator.ConfigError, match="config_bad.py:1"):
        configurator.resolve(Toy, {}, str(path))


def toy_model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=2, n_heads=2))


def test_checkpoint_brings_everything_back(tmp_path):
    model = toy_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    x = torch.arange(16).view(1, 16)
    for _ in range(2):
        model(x, x)[1].backward()
        optimizer.step()
    checkpoint.save_checkpoint(model, optimizer, 2, tmp_path / "ckpt.pt", tokens=99)
    other = toy_model()
    other_optimizer = optim.AdamW(other.parameters(), lr=0.5)
    assert checkpoint.load_checkpoint(tmp_path / "ckpt.pt", other, other_optimizer) == 2
    for one, opt in ((model, optimizer), (other, other_optimizer)):      # the next step is the same as well
        opt.zero_grad()
        one(x, x)[1].backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert ModelConfig(**torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_config"]) == model.config


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(toy_model(), None, 1, path)

    def cut_short(file):
        file.write(b"half a check")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, cut_short)
    assert checkpoint.load_checkpoint(path, toy_model()) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(toy_model(), None, 1, path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="does not fit this model: token_embeddings.weight"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=51, context_length=16, d_model=16, n_layers=2, n_heads=2)))
    with pytest.raises(ValueError, match="missing .'layers.2"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=3, n_heads=2)))
    for content in (whole[:len(whole) // 2], whole[:100], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ckpt.pt"):
            checkpoint.load_checkpoint(path)
    torch.save({"model": {}, "step": Evil()}, path)
    with pytest.raises(ValueError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)


# --- model.py ---


# --- accounting.py ---


# --- convert.py ---


# --- data.py ---

def corpus_text() -> str:
    """Real English and real code at hand without a network: this project's own pages."""
    here = Path(__file__).parent
    return "".join(
        path.read_text(encoding="utf-8") + "<|endoftext|>" for path in sorted(here.glob("*.py"))
        if path.name != "test_all.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared data folder with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    data.prepare(folder / "text.txt", vocab_size=512, data_dir=folder / "data")
    return folder / "data"


def test_markdown_becomes_a_printed_play():
    markdown = ("# Hamlet\n\n## ACT I\n\n### SCENE I.\n\n_Enter *Ghost*_\n\n**HAMLET**  \n_\\[Aside]_  \nSpeak;  \n"
                "\\--I'll go on.\n\n\n\n**ALL**  \nHo!")
    assert data.strip_markdown(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I.\n\nEnter Ghost\n\nHAMLET\n[Aside]\nSpeak;\n--I'll go on.\n\n"
        "ALL\nHo!\n")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_documents_are_split_whole_however_they_are_chunked(tmp_path, chunk):
    documents = [f"document {i}\r\nends é{data.SEPARATOR}" for i in range(23)] + ["a last one without an end"]
    text = "".join(documents)
    n = data.split_documents((text[i:i + chunk] for i in range(0, len(text), chunk)), tmp_path / "train",
                             tmp_path / "val")
    val = [i for i in range(24) if i % 10 == 4]
    assert n == 24
    assert (tmp_path / "val").read_bytes().decode() == "".join(documents[i] for i in val)
    assert (tmp_path / "train").read_bytes().decode() == "".join(d for i, d in enumerate(documents) if i not in val)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_few_documents_are_cut_at_a_line(tmp_path, chunk):
    text = "".join(f"line {i}\n" for i in range(100))
    data.cut_text((text[i:i + chunk] for i in range(0, len(text), chunk)), len(text), tmp_path / "train",
                  tmp_path / "val")
    train, val = ((tmp_path / name).read_text(encoding="utf-8") for name in ("train", "val"))
    assert train + val == text and train.endswith("\n" if chunk >
                                                  10 else train[-1]) and 0.85 < len(train) / len(text) < 0.95


def test_prepare_writes_what_the_design_names(corpus):
    meta = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 512 and meta["source"] == "text.txt"
    assert meta["tokenizer_sha256"] == hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        text = (corpus / f"{split}.txt").read_bytes()
        assert tokenizer.decode_bytes(ids) == text and meta[f"{split}_tokens"] == len(
            ids) and meta[f"{split}_bytes"] == len(text)
    assert (corpus / "train.txt").stat().st_size > 4 * (corpus / "val.txt").stat().st_size


@pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"caf\xe9 " * 500, "is not UTF-8"),
                                            (b"too short", "fewer than one context")])
def test_texts_that_cannot_be_used_say_why(tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        data.prepare(tmp_path / "x.txt", vocab_size=300, data_dir=tmp_path / "data")
    assert "x.txt" in str(caught.value) or "train.txt" in str(caught.value)
    with pytest.raises(ValueError, match="neither a corpus"):
        data.prepare("shakespear", data_dir=tmp_path / "data")


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges and cuts the connection after `cut` bytes of every reply."""
    content, cut, ranges = b"", 10**9, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        Flaky.ranges.append(start)
        if self.path.endswith("missing.txt"):
            return self.send_error(404)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:start + self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Flaky.ranges, Flaky.cut = [], 10**9
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    Flaky.content, Flaky.cut = bytes(range(256)) * 400, 30_000
    digest = hashlib.sha256(Flaky.content).hexdigest()
    data.download(f"{server}/a.bin", tmp_path / "a.bin", digest)
    assert (tmp_path / "a.bin").read_bytes() == Flaky.content and Flaky.ranges == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "a.bin.part").exists()
    (tmp_path / "b.bin.part").write_bytes(Flaky.content[:50_000])        # left by an earlier process
    data.download(f"{server}/b.bin", tmp_path / "b.bin", digest)
    assert (tmp_path / "b.bin").read_bytes() == Flaky.content
    (tmp_path / "c.bin.part").write_bytes(Flaky.content + b"too long")   # from another file of that name
    data.download(f"{server}/c.bin", tmp_path / "c.bin", digest)
    assert (tmp_path / "c.bin").read_bytes() == Flaky.content


def test_a_download_that_fails_says_what_to_do(server, tmp_path):
    Flaky.content = b"x" * 1000
    with pytest.raises(OSError, match=r"404.*put it at .*missing.txt"):
        data.download(f"{server}/missing.txt", tmp_path / "missing.txt")
    with pytest.raises(OSError, match="SHA-256"):
        data.download(f"{server}/a.txt", tmp_path / "a.txt", "0" * 64)
    Flaky.cut = 0
    with pytest.raises(OSError, match="cut"):
        data.download(f"{server}/b.txt", tmp_path / "b.txt")
    assert not any((tmp_path / name).exists() for name in ("missing.txt", "a.txt", "b.txt"))


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_hosted_corpora_come_through_the_mirror(server, tmp_path, monkeypatch, name):
    text = corpus_text().encode()[:60_000].decode(errors="ignore").encode()
    Flaky.content, Flaky.cut = (gzip.compress(text) if name == "owt" else text), 5_000
    monkeypatch.setenv("DATA_MIRROR", server)
    meta = data.prepare(name, vocab_size=300, data_dir=tmp_path)
    assert meta["train_bytes"] == meta["val_bytes"] == len(text) and (tmp_path / "train.txt").read_bytes() == text


def test_nanogpt_token_files_load_as_they_are(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert data.read_meta(tmp_path) == {"dtype": "uint16"} and data.open_tokens(tmp_path, "train")[999] == 999
    (tmp_path / "val.bin").write_bytes(b"odd")
    for split, error in (("val", ValueError), ("test", FileNotFoundError)):
        with pytest.raises(error, match=f"{split}.bin"):
            data.open_tokens(tmp_path, split)


# --- train.py ---

TINY = dict(context_length=32, d_model=32, n_layers=2, n_heads=2, batch_tokens=8 * 32, warmup_steps=5, eval_every=10,
            eval_steps=2, log_every=5, lr=3e-3, device="cpu", dtype="float32")


def tiny_run(corpus, out_dir, **more):
    return train.main(
        train.TrainConfig(**TINY | {"data_dir": str(corpus), "out_dir": str(out_dir), "max_steps": 30} | more))


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """(folder, figures) of a run of 60 steps."""
    out_dir = tmp_path_factory.mktemp("out") / "trained"
    return out_dir, tiny_run(corpus, out_dir, max_steps=60, optimizer="muon")


def weights(out_dir) -> dict:
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)["model"]


def test_batches_are_windows_with_the_next_token():
    tokens = np.arange(100, dtype=np.uint16)
    x, y = train.get_batch(tokens, 4, 7, "cpu")
    assert x.shape == y.shape == (4, 7) and x.dtype == torch.int64 and torch.equal(x + 1, y)


def test_batch_starts_are_uniform_over_all_windows():
    x, y = train.get_batch(np.arange(17), 20_000, 7, "cpu", torch.Generator().manual_seed(0))
    counts = torch.bincount(x[:, 0])
    assert len(counts) == 10 and y.max() == 16                            # 0 … n - m - 1, the last one included
    assert ((counts - 2000).abs() < 5 * 2000 ** 0.5).all(), counts         # five sigma of a binomial, seeded


def test_batches_that_cannot_be_made():
    with pytest.raises(ValueError, match="7 tokens are too few for windows of 7"):
        train.get_batch(np.arange(7), 1, 7, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        train.get_batch(np.arange(100), 1, 7, "cuda:99")


def test_training_learns_and_leaves_its_files(trained, corpus):
    out_dir, figures = trained
    log = train.read_log(out_dir / "log.jsonl")
    assert log[0]["seed"] == 1337 and log[0]["config"]["optimizer"] == "muon"
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.9, losses          # from ln 512 = 6.2; under 5.4 it has more than unigrams
    assert {"ckpt.pt", "best.pt", "log.jsonl", "loss.png",
            "tokenizer.json"} <= {path.name for path in out_dir.iterdir()}
    entries = torch.load(out_dir / "ckpt.pt", weights_only=True)
    assert {
        "format_version", "model_config", "train_config", "model", "optimizer", "step", "tokens", "rng",
        "data_position", "best_val_loss", "tokenizer_sha256"} <= entries.keys()
    assert entries["step"] == 60 and entries["tokens"] == 60 * 256 == figures["tokens"]
    assert figures["val_bits_per_byte"] == pytest.approx(log[-1]["val_bits_per_byte"])


def test_final_loss_is_that_of_the_whole_split_token_by_token(trained, corpus):
    out_dir, figures = trained
    model, tokenizer = checkpoint.load_model(out_dir)
    ids = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype="<u2").astype(np.int64))
    nats, context, half = 0.0, 32, 16
    with torch.no_grad():
        for position in range(1, len(ids)):  # each token from the window that should predict it
            start = max(0, (position - context - 1 + half) // half) * half
            start = min(start, len(ids) - 1 - context)
            logits = model(ids[None, start:position])[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert figures["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)     # float32 sums
    n_bytes = len((corpus / "val.txt").read_bytes())
    assert figures["val_bits_per_byte"] == pytest.approx(nats / (len(ids) - 1) * len(ids) / n_bytes / math.log(2),
                                                         rel=1e-4)


def test_ragged_micro_batches_equal_one_batch(corpus, tmp_path):
    for name, size in (("whole", None), ("ragged", 3)):                   # 8 sequences as 3 + 3 + 2
        tiny_run(corpus, tmp_path / name, max_steps=3, micro_batch_size=size)
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "ragged").values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0,
                                   msg=lambda m: f"{name}: {m}")  # Adam divides rounding by |g|


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_equals_a_straight_one_bit_for_bit(corpus, tmp_path, optimizer):
    tiny_run(corpus, tmp_path / "straight", optimizer=optimizer)
    tiny_run(corpus, tmp_path / "broken", optimizer=optimizer, checkpoint_every=13, max_steps=30)
    # What a kill after step 17 leaves: the checkpoint of step 13, and a log that is ahead of it.
    tiny_run(corpus, tmp_path / "first", optimizer=optimizer, checkpoint_every=13)
    run = train.Run(
        train.TrainConfig(
            **TINY
            | {"data_dir": str(corpus), "out_dir": str(tmp_path / "first"), "max_steps": 30, "optimizer": optimizer}))
    while run.step < 13:
        run.train_step()
    run.save()
    tiny_run(corpus, tmp_path / "first", optimizer=optimizer, resume=True)
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "first")[name]), name
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), f"checkpoints changed the run: {name}"
    losses = [[(line["step"], line["loss"]) for line in train.read_log(tmp_path / name / "log.jsonl") if "loss" in line]
              for name in ("straight", "first")]
    assert losses[0] == losses[1]


def test_how_often_one_evaluates_changes_nothing(corpus, tmp_path):
    for name, every in (("often", 2), ("never", 0)):
        tiny_run(corpus, tmp_path / name, max_steps=10, eval_every=every)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "often").values(),
                                          weights(tmp_path / "never").values()))


def test_the_clock_ends_a_run_and_its_schedule(corpus, tmp_path):
    figures = tiny_run(corpus, tmp_path / "timed", max_steps=None, max_minutes=1 / 60, log_every=1)
    rates = [line["lr"] for line in train.read_log(tmp_path / "timed" / "log.jsonl") if "loss" in line]
    assert 1.0 <= figures["seconds"] < 10
    assert len(rates) < 10 or max(rates) > 2e-3 and rates[-1] < 6e-4  # up to the peak of 3e-3, down to nearly a tenth


def test_a_diverged_run_stops_and_says_where(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+, learning rate .*diverged"):
        tiny_run(corpus, tmp_path / "wild", lr=1e6, grad_clip=1e9, max_steps=200, log_every=1)


def test_settings_and_data_that_do_not_fit_are_refused(corpus, tmp_path, trained):
    for more, words in (({"optimizer": "sgd"}, "optimizer='sgd'"), ({"batch_tokens": 16}, "less than one sequence"),
                        ({"max_minutes": -1.0}, "max_minutes=-1.0"), ({"vocab_size": 100}, "holds id"),
                        ({"device": "cuda:99"}, "cuda:99"), ({"n_heads": 5}, "not a multiple")):
        with pytest.raises(ValueError, match=words):
            tiny_run(corpus, tmp_path / "never", **more)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        tiny_run(corpus, tmp_path / "never", resume=True)
    with pytest.raises(ValueError, match="does not fit this model"):
        shutil.copytree(trained[0], tmp_path / "other")
        tiny_run(corpus, tmp_path / "other", resume=True, n_layers=3, optimizer="muon")
    folder = shutil.copytree(corpus, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="another tokenizer"):
        tiny_run(folder, tmp_path / "other", resume=True, optimizer="muon")


# --- sample.py ---

def random_model(**more):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(**dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2) | more))
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=0),
     dict(), dict(temperature=0.7, top_k=5),
     dict(top_p=0.8),
     dict(top_k=20, top_p=0.5)])
def test_the_cache_changes_no_token_not_even_past_the_context(settings):
    model = random_model()
    for prompt in ([3], list(range(10)), list(range(40))):                # the last is longer than the context of 16
        with_cache, without = (sample.generate(model, prompt, 40, cache=cache, generator=rng(), **settings)
                               for cache in (True, False))
        assert with_cache == without and len(with_cache) == 40


def test_greedy_is_the_argmax_of_the_full_forward():
    model, ids = random_model(), [1, 2, 3]
    for token in sample.generate(model, ids, 10, temperature=0):
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = ids + [token]
    assert sample.generate(model, [1, 2, 3], 10, top_k=1) == sample.generate(model, [1, 2, 3], 10,
                                                                             temperature=0) == ids[3:]


def test_a_ragged_batch_writes_what_each_prompt_writes_alone():
    model, prompts = random_model(), [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14))]
    alone = [sample.generate(model, prompt, 20, temperature=0) for prompt in prompts]
    assert sample.generate(model, prompts, 20, temperature=0) == alone
    stop = alone[1][4]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    assert sample.generate(model, prompts, 20, temperature=0, stop_ids=(stop,)) == cut != alone


def test_samples_of_one_prompt_share_its_prefill():
    model = random_model()
    rows = list(zip(*sample.stream(model, [[1, 2, 3]], 12, generator=rng(), n_each=3)))
    repeated = sample.generate(model, [[1, 2, 3]] * 3, 12, generator=rng())
    assert [list(row) for row in rows] == repeated


def test_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(sample.distribution(logits), torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close(sample.distribution(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    close(sample.distribution(logits, top_p=0.79), torch.tensor([[0.625, 0.375, 0, 0]]))      # 0.5 < 0.79 <= 0.8
    close(sample.distribution(logits, top_p=0.81), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    close(sample.distribution(logits, top_p=1e-9), torch.tensor([[1.0, 0, 0, 0]]))
    close(sample.distribution(logits, temperature=0.5), torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]) / 0.365)
    close(sample.distribution(logits, top_k=3, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))


def test_samples_follow_the_distribution():
    model = random_model(vocab_size=8)
    expected = sample.distribution(model(torch.tensor([[1, 2]]))[:, -1], 0.9, top_p=0.9)[0]
    drawn = sample.generate(model, [[1, 2]] * 8000, 1, temperature=0.9, top_p=0.9, generator=rng())
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - 8000 * expected)[kept] ** 2 / (8000 * expected[kept])).sum().item()
    assert chi_square < 24.3, chi_square                                  # 99.9 % quantile with 7 degrees of freedom


def test_padded_vocabulary_rows_are_never_sampled():
    assert max(sample.generate(random_model(), [1], 200, temperature=5.0, vocab_limit=3, generator=rng())) == 2


@pytest.mark.parametrize("prompt, more, words", [([], {}, "empty"), ([99], {}, "outside 0 … 49"),
                                                 ([1], dict(temperature=-1), "temperature=-1"),
                                                 ([1], dict(top_k=0), "top_k=0"), ([1], dict(top_p=0.0), "top_p=0.0")])
def test_bad_sampling_is_refused_before_anything_is_computed(prompt, more, words):
    with pytest.raises(ValueError, match=words):
        sample.generate(random_model(), prompt, 5, **more)


# --- evaluate.py ---

def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate.perplexity(model, torch.randint(0, 50, (100,), generator=rng()), n_bytes=200)
    assert figures["perplexity"] == pytest.approx(50, rel=1e-5) and figures["bits_per_byte"] == pytest.approx(
        math.log2(50) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate.perplexity(model, [1])


def test_bytes_of_a_token_file_are_those_of_its_text(corpus):
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    from_bin, from_text = (evaluate.read_tokens(corpus / f"val.{kind}", tokenizer) for kind in ("bin", "txt"))
    assert from_bin[1] == from_text[1] == (corpus / "val.txt").stat().st_size
    assert np.array_equal(from_bin[0], from_text[0])


# --- scaling.py ---


# --- align.py ---


# --- commands, as the README shows them ---

def python(*arguments, **more):
    """Run a script of this project as a user would; returns the finished process."""
    here = Path(__file__).parent
    return subprocess.run([sys.executable, str(here / arguments[0]), *map(str, arguments[1:])], capture_output=True,
                          text=True, encoding="utf-8", timeout=120,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}, **more)


SCRIPTS = ["configurator", "checkpoint", "bpe", "optim", "model", "data", "train", "sample", "evaluate"]


def test_importing_a_script_does_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import " + ", ".join(SCRIPTS) + \
           "; import torch; assert not torch.cuda.is_initialized() and not {'matplotlib', 'tiktoken'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir()), done.stderr


def test_from_a_text_file_to_samples_by_commands(tmp_path):
    (tmp_path / "notes.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    done = python("data.py", "prepare", "notes.txt", "--vocab_size=400", cwd=tmp_path)
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    done = python("train.py", "--data_dir=data/notes", "--out_dir=out/notes", "--max_steps=20", "--n_heads=2", *flags,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--- sample 3 ---" in done.stdout and "next: python sample.py" in done.stdout
    bits = re.search(r"val bits per byte ([\d.]+)$", done.stdout.strip().splitlines()[-1])
    assert bits and 1 < float(bits[1]) < 8
    done = python("evaluate.py", "out/notes", cwd=tmp_path)
    assert float(done.stdout.split("bits per byte")[1]) == pytest.approx(float(bits[1]),
                                                                         abs=2e-3), done.stdout + done.stderr
    one, two = (python("sample.py", "out/notes", "--prompt=def é", "--seed=5", "--max_new_tokens=30", cwd=tmp_path)
                for _ in range(2))
    assert one.stdout.startswith("def é") and one.stdout.split("---")[0] == two.stdout.split(
        "---")[0] and "decode 29 tokens" in one.stdout
    done = python("train.py", "plot", "out/notes", "out/notes", "--out_dir=.", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG", done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends signals as a terminal and a scheduler do")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(corpus, tmp_path, number):
    command = [
        sys.executable,
        str(Path(__file__).parent / "train.py"), f"--data_dir={corpus}", f"--out_dir={tmp_path}/out",
        "--max_steps=100000", "--num_samples=0",
        *(f"--{key}={value}" for key, value in (TINY | {"log_every": 1, "checkpoint_every": 1}).items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.strip().startswith("25/"):
            break
    process.send_signal(number)
    rest, code = process.stdout.read(), process.wait(timeout=60)
    assert code == (-number if number == signal.SIGKILL else 128 + number), rest
    assert number == signal.SIGKILL or "--resume=true" in rest
    step = checkpoint.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert step >= 24
    done = python("sample.py", tmp_path / "out", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    done = python(*["train.py", *command[2:], f"--max_steps={step + 3}", "--resume=true"])
    assert done.returncode == 0 and f"at step {step}," in done.stdout, done.stderr
    steps = [line["step"] for line in train.read_log(tmp_path / "out" / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, step + 4))


@pytest.mark.parametrize("arguments, words", [(["train.py", "--max_stpes=3"], "Did you mean max_steps?"),
                                              (["train.py", "--max_steps"], "has no value"),
                                              (["train.py", "config_none.py"], "config_none.py"),
                                              (["train.py", "trian"], "'trian' is neither"),
                                              (["train.py", "--max_steps=many"], "max_steps='many' is not a int"),
                                              (["sample.py"], "give one folder"),
                                              (["sample.py", "out/none"], "no checkpoint at"),
                                              (["data.py", "prepare", "none.txt"], "neither a corpus"),
                                              (["data.py"], "give one corpus")])
def test_bad_command_lines_end_with_status_2_and_a_reason(tmp_path, arguments, words):
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "data.py", "bpe.py"])
def test_help_lists_every_key(script):
    done = python(script, "--help")
    assert done.returncode == 0 and script in done.stdout and "--" in done.stdout, done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
