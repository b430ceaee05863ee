"""Claims about kernels.py."""
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import ROOT, python, sdpa, steps# noqa: F401
import optim
from model import ModelConfig, Transformer

FLASH_CASES = [                    # Tq, Tk, D, query heads a key head, causal, window
    (1, 1, 16, 1, True, None), (1, 130, 80, 4, True, None), (1, 17, 64, 2, False, None), (7, 7, 80, 2, True, 3),
    (7, 65, 16, 4, False, None), (17, 17, 64, 1, True, None), (17, 7, 32, 2, True, None), (17, 127, 16, 1, True, 17),
    (64, 64, 16, 2, True, 64), (64, 17, 80, 1, True, 7), (64, 130, 32, 4, True, None), (65, 65, 32, 1, True, 17),
    (65, 64, 64, 4, True, None), (65, 130, 80, 2, False, None), (127, 127, 64, 2, True, 1),
    (127, 64, 16, 1, False, None), (127, 130, 32, 4, True, 65), (130, 130, 80, 1, True, None),
    (130, 127, 32, 2, True, 33), (130, 7, 16, 4, True, None), (130, 97, 16, 1, True, 2 ** 31 - 1),
    (17, 40, 128, 2, True, 9), (33, 18, 256, 1, False, None)]


TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # a few roundings at the size of the largest entry


@pytest.fixture
def cuda_kernels(kernels):
    if kernels.INTERPRET:
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET unset")
    return kernels


def assert_like_float64(function, reference, *inputs, exact=None):
    """Outputs and every gradient of function(*inputs) against reference in float64 on the same (rounded) numbers."""
    def run(f, xs):
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]
        outs = f(*xs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(1)
        ups = [torch.randn(o.shape, generator=generator, device="cpu").to(o.device, o.dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], ups)]
    tolerance = exact or TOLERANCE[str(inputs[0].dtype)[6:]]
    found = run(function, inputs)
    right = run(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.shape == b.shape and a.isfinite().all(), f"result {i}: shape {tuple(a.shape)}, or not finite"
        error = (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error < tolerance, f"result {i} of {len(found)}: error {error:.1e}, allowed {tolerance}"


def flash_inputs(Tq, Tk, D, group, dtype=None):
    torch.manual_seed(Tq * 1000 + Tk)
    shapes = (1, 2 * group, Tq, D), (1, 2, Tk, D), (1, 2, Tk, D)
    return (torch.randn(shape).to(dtype or torch.float32) for shape in shapes)


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


@pytest.mark.parametrize("shape", [(4096, 4096, 128, 4, None), (1000, 5000, 64, 2, 700), (2048, 2048, 256, 1, None)],
                         ids=str)
def test_flash_attention_of_long_sequences_on_cuda(cuda_kernels, shape):
    *sizes, window = shape
    for dtype in (torch.float32, torch.bfloat16):
        assert_like_float64(lambda q, k, v: cuda_kernels.flash_attention(q, k, v, window=window),
                            lambda q, k, v: sdpa(q, k, v, True, window), *flash_inputs(*sizes, dtype))


def test_training_with_our_attention_follows_sdpa(kernels):
    steps, shape = (200, (8, 256)) if not kernels.INTERPRET else (3, (1, 40))
    config = ModelConfig(vocab_size=64, context_length=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)
    curves = []
    for backend in ("sdpa", "triton"):
        torch.manual_seed(0)
        model = Transformer(dataclasses.replace(config, attention_backend=backend)).to(torch.get_default_device())
        optimizer, losses = optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(steps):
            tokens = (torch.randint(64, (shape[0], 1)) + torch.arange(shape[1] + 1) ** 2) % 64
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert steps == 3 or curves[1][-1] < curves[1][0]
    assert np.abs(np.subtract(*curves)).max() < (1e-4 if steps == 3 else 0.05), curves


def test_kernels_under_torch_compile_are_one_graph(kernels):
    torch.manual_seed(0)
    cos, sin, targets = torch.rand(20, 4), torch.rand(20, 4), torch.randint(0, 30, (2, 20))
    def network(x, weight, head):
        y, h = kernels.rms_norm(x, weight, 1e-5, x * 2)
        q = y.view(2, 20, 4, 8).transpose(1, 2)
        q, k = kernels.apply_rope(q, q[:, :2], cos, sin)
        o = kernels.flash_attention(q, k, k * 2, window=7).transpose(1, 2).reshape(2, 20, 32)
        y = kernels.swiglu(o, kernels.softmax(h))
        fused = kernels.linear_cross_entropy(y, head, targets, chunk_tokens=15)
        return fused + kernels.cross_entropy(y @ head.T, targets)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 20, 32), (32,), (30, 32))]
    eager = network(*inputs)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs)):
        torch.testing.assert_close(a, b)


def test_flash_attention_strides_and_leading_dimensions(kernels):
    flash = kernels.FlashAttentionTriton.apply
    q, k, v = flash_inputs(17, 17, 16, 2)
    want = flash(q, k, v, True)
    def strided(x):                                          # (B, T, H, D) memory, NaN between the heads
        room = torch.full((x.shape[0], x.shape[2], x.shape[1], 24), float("nan"))
        return room.transpose(1, 2)[..., 4:20].copy_(x)
    assert torch.equal(flash(strided(q), strided(k), strided(v), True), want)
    assert torch.equal(flash(q[0], k[0], v[0], True), want[0])
    k5, v5 = (t[:, :, None, None].repeat_interleave(2, 1) for t in (k, v))
    assert torch.equal(flash(q[:, :, None, None], k5, v5, True)[:, :, 0, 0], want)
    assert torch.equal(flash(q[0, 0], k[0, 0], v[0, 0], True), want[0, 0])


@pytest.mark.parametrize("name", ["FlashAttentionTriton", "FlashAttentionPyTorch"])
def test_flash_attention_saves_the_log_sum_exp_and_rows_without_keys_are_zero(kernels, name):
    q, k, v = (t.requires_grad_() for t in flash_inputs(9, 5, 16, 2))           # queries 0 to 3 see no key
    o = getattr(kernels, name).apply(q, k, v, True)
    saved = o.grad_fn.saved_tensors
    lse, = [t for t in saved if t.shape == q.shape[:-1]]
    unseen = ~torch.ones(9, 5, dtype=torch.bool).tril(-4)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(unseen, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert len(saved) == 5, f"{len(saved)} tensors saved; q, k, v, o and L are enough"
    o.sum().backward()
    assert not o[:, :, :4].any() and not q.grad[:, :, :4].any() and q.grad[:, :, 5:].any()
    empty = getattr(kernels, name).apply(q, k[:, :, :0], v[:, :, :0], False)
    assert empty.shape == q.shape and not empty.any()


def test_flash_attention_never_touches_keys_out_of_sight(kernels):
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, 64:] = v[:, :, 64:] = float("nan")               # past the diagonal for the first 64 queries
    assert kernels.flash_attention(q, k, v)[:, :, :64].isfinite().all()
    q, k, v = flash_inputs(130, 130, 16, 1)
    k[:, :, :64] = v[:, :, :64] = float("nan")               # before the window of query 74 on
    assert kernels.flash_attention(q, k, v, window=10)[:, :, 128:].isfinite().all()


def test_flash_attention_refuses_what_it_cannot_do(kernels):
    q = torch.zeros(2, 4, 8, 16)
    for text, arguments in [("257", [torch.zeros(2, 8, 257)] * 3), ("float64", [q.double()] * 3),
                            ("window=0", [q, q, q, True, 0]), ("is_causal=True", [q, q, q, False, 4]),
                            ("divisor", [q, q[:, :3], q[:, :3]]), ("rank", [q, q[0], q[0]]),
                            ("head width 16", [q, q[..., :8], q[..., :8]]),
                            ("one floating dtype", [q, q.half(), q.half()])]:
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
        if dtype == "float32":                               # in half precision the sum itself is rounded
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
        assert_like_float64(lambda q, k: kernels.apply_rope(q, k, angle.cos(), angle.sin(), interleaved),
                            by_complex(interleaved), q, k)


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
            made = torch.utils._pytree.tree_leaves(out)
            largest.extend(t.nbytes for t in made if isinstance(t, torch.Tensor))
            return out
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with Watch():
        kernels.linear_cross_entropy(x, weight, torch.arange(64), chunk_tokens=16).backward()
    assert max(largest) == 16 * 300 * 4, f"a tensor of {max(largest)} bytes; a chunk has {16 * 300 * 4}"


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
            def alone(b, n):                                 # row b of the batch with its own n keys
                cache = [t[b:b + 1, :, :n].double() for t in (k, v)]
                return sdpa(q[b:b + 1, :, None].double(), *cache, False, None)[:, :, 0] if n else torch.zeros(1, H, D)
            want = [alone(b, n).double() for b, n in enumerate(lengths.tolist())]
            close(kernels.decode_attention(q, k, v, lengths), torch.cat(want))
    weight = torch.randn(100, 70)
    quantised, scale = kernels.quantize_int8(weight)
    assert ((quantised * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()
    x = randn(2, 3, 70)
    close(kernels.int8_matvec(x, quantised, scale), x.double() @ (quantised.double() * scale[:, None].double()).T)
    for M, K, N in ((1, 1, 1), (70, 100, 90), (33, 17, 129)):
        a, b = randn(M, K), randn(N, K).T
        close(kernels.matmul(a, b), a.double() @ b.double())


def test_offsets_beyond_32_bits(kernels):
    """Rows 2^24 numbers apart, in 6 GB of memory of which next to nothing is touched; in a process of its own, as a
    wrong offset reads from anywhere."""
    code = """if True:
        import torch, kernels
        torch.manual_seed(0)
        device = "cpu" if kernels.INTERPRET else "cuda"
        room = torch.empty(180 << 24, dtype=torch.bfloat16, device=device)
        q, rows = torch.randn(1, 2, 16, device=device).bfloat16(), torch.randn(180, 16, device=device).bfloat16()
        k, v = (room.as_strided((1, 1, 180, 16), (1, 1, 1 << 24, 1), start) for start in (0, 16))
        k.copy_(rows), v.copy_(rows.flip(1))
        found, right = kernels.decode_attention(q, k, v), kernels.decode_reference(*(x.double() for x in (q, k, v)))
        assert (found.double() - right).abs().max() < 0.02, "decode"
        found, right = kernels.matmul(k[0, 0], rows.T), rows.double() @ rows.double().T
        assert (found.double() - right).abs().max() < 0.2, "matmul"
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr or done.returncode


def test_kernels_write_every_number_and_nothing_outside(kernels, monkeypatch):
    launch, pad, wall = kernels.launch, 64, {torch.int64: 1 << 40, torch.int32: 1 << 30, torch.int8: 77}
    def walled(kernel, grid, x, *arguments, **constants):
        """The launch on copies between two walls of NaN, which reads would spread and writes would breach."""
        rooms = {}
        def move(t):
            key = (t.data_ptr(), t.shape, t.stride())
            if key not in rooms:
                span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
                room = torch.full((span + 2 * pad,), wall.get(t.dtype, float("nan")), dtype=t.dtype)
                rooms[key] = t, room, room.as_strided(t.shape, t.stride(), pad).copy_(t)
            return rooms[key][2]
        launch(kernel, grid, x, *(move(t) if isinstance(t, torch.Tensor) else t for t in arguments), **constants)
        for t, room, inside in rooms.values():
            for side in (room[:pad], room[-pad:]):
                breached = ~side.isnan() if t.is_floating_point() else side != wall[t.dtype]
                assert not breached.any(), f"{kernel} wrote outside a tensor of shape {tuple(t.shape)}"
            t.data.copy_(inside)
    monkeypatch.setattr(kernels, "launch", walled)
    # Fresh memory holds NaN in this mode, so that a number left unwritten spreads as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        q, k, v = (t.requires_grad_() for t in flash_inputs(70, 65, 24, 2))
        x, weight = torch.randn(37, 33, requires_grad=True), torch.randn(33, requires_grad=True)
        outs = [kernels.flash_attention(q, k, v, window=9), kernels.rms_norm(x, weight), kernels.swiglu(x, x),
                kernels.softmax(x), *kernels.apply_rope(q, q, torch.rand(70, 12), torch.rand(70, 12)),
                kernels.cross_entropy(x, torch.arange(37) % 33, reduction="none"),
                kernels.linear_cross_entropy(x, torch.randn(50, 33), torch.arange(37), chunk_tokens=10)]
        results = [*outs, *torch.autograd.grad([o.sum() for o in outs], [q, k, v, x, weight]),
                   kernels.decode_attention(q[:, :, 0].detach(), k.detach(), v.detach()),
                   kernels.matmul(x.detach(), x.detach().T)]
    finally:
        torch.use_deterministic_algorithms(False)
    for i, result in enumerate(results):
        assert result.isfinite().all(), f"result {i} has numbers that nobody wrote"


def test_the_benchmark_of_kernels_writes_table_and_plot(kernels, tmp_path, monkeypatch, capsys):
    """All of it but the GPU: small workloads on the tests' device, and every call said to take 2 ms."""
    small = kernels.workloads

    def two_ms(run):
        run()
        return 2.0
    monkeypatch.setattr(kernels, "workloads", lambda device, dtype, T, D, *sizes: small(
        torch.get_default_device(), dtype, T, D, 1, 2, 2, 32, 40))
    monkeypatch.setattr(kernels, "time_ms", two_ms)
    monkeypatch.setattr(kernels, "roofs", lambda dtype: (1e12, 1e11))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    if not torch.cuda.is_available():
        for name, value in (("get_device_name", "none"), ("reset_peak_memory_stats", None),
                            ("max_memory_allocated", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "580.1\n"))
    kernels.benchmark([17], [], str(tmp_path))
    said = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    rows = {(r["kernel"], r["pass"], r["backend"], r["D"]): r for r in said["rows"]}
    row = rows["attention", "forward", "ours", 64]
    assert row["tflops"] == pytest.approx(4 * 64 * 2 * 17 * 17 / 2 / 2e-3 / 1e12) and row["ms"] == 2
    assert row["share_of_roof"] == pytest.approx(max(row["tflops"], row["gb_per_s"] / 100))
    assert rows["attention", "forward+backward", "cudnn", 128]["ms"] is None or torch.cuda.is_available()
    assert len({kernel for kernel, *_ in rows}) == 11 and ("swiglu", "forward", "ours", 128) not in rows
    assert (said["driver"], said["card"]) == ("580.1", torch.cuda.get_device_name())
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert "% of the roof" in capsys.readouterr().out


@pytest.mark.parametrize("fused_loss", ["false", "true"])
def test_profile_of_a_training_step_by_region(tmp_path, capsys, fused_loss):
    import kernels
    kernels.main(["profile", f"--out_dir={tmp_path}", f"--data_dir={tmp_path}/none", "--d_model=32", "--n_layers=2",
                  "--n_heads=2", "--vocab_size=50", "--context_length=16", "--batch_tokens=64", "--device=cpu",
                  f"--fused_loss={fused_loss}"])
    said = capsys.readouterr().out
    shares = dict(re.findall(r"^(attention|feed-forward|norm|loss|optimizer|other|idle) .* ([\d.]+)%$", said, re.M))
    assert len(shares) == 7 and 95 < sum(map(float, shares.values())) < 105, said
    assert all(float(shares[name]) > 0 for name in ("attention", "feed-forward", "norm", "loss", "optimizer")), said
    assert any(event.get("name") == "attention" for event in json.loads(
        (tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"])


def test_kernels_compile_for_a_hopper_gpu_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = python("results/kernels_sm90.py", "D=64", "dtypes=bfloat16", "tiles=1")
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^(\w+ bfloat16(?: [a-zD]+(?:=\d+)?)*) +(\d.*)", done.stdout, re.M))
    assert len(lines) == 21, done.stdout
    # Triton 3.6 serialises matmul, and one kernel with a window spills.
    recent = torch.torch_version.TorchVersion(importlib.metadata.version("triton")) >= "3.7"
    for name, line in lines.items():
        assert "TOO LARGE" not in line and (" 0 B spilled" in line or not recent), f"{name}: {line}"
        assert "SERIALISED" not in line or name.startswith("matmul") and not recent, f"{name}: {line}"
        assert ("wgmma" in line) == name.startswith(("flash", "matmul")), f"{name}: {line}"


def test_tiles_worth_timing():
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("triton")
    def sizes(tiles, **constants):
        configs = [kernels.triton.Config(blocks, num_warps=warps, num_stages=n) for blocks, warps, n in tiles]
        return [tuple(config.kwargs.values()) for config in kernels.fitting(configs, {}, **constants)]
    assert len(sizes(kernels.MATMUL_TILES, PRECISION="tf32")) == len(kernels.MATMUL_TILES)
    assert sizes(kernels.MATMUL_TILES, PRECISION="ieee") == [(64, 64, 32), (32, 64, 32)]
    assert max(sizes(kernels.QUERY_TILES, PRECISION="tf32", D_PAD=128)) == (128, 128)
    assert set(sizes(kernels.KEY_TILES, PRECISION="ieee", D_PAD=64)) == {(32, 32), (16, 16)}
    assert sizes(kernels.KEY_TILES, PRECISION="ieee", D_PAD=256) == [(16, 16)]


def test_kernels_import_quietly_and_fall_back_with_one_line(tmp_path):
    code = "import torch, kernels\n" \
           "assert not torch.cuda.is_initialized()\n" \
           "print('imported')\n" \
           "q = torch.randn(1, 2, 9, 16, requires_grad=True)\n" \
           "for _ in range(2): kernels.flash_attention(q, q, q).sum().backward()\n" \
           "x = torch.randn(4, 16, requires_grad=True)\n" \
           "y = kernels.swiglu(kernels.rms_norm(x, torch.ones(16)), kernels.softmax(x))\n" \
           "kernels.linear_cross_entropy(y, torch.randn(20, 16), torch.arange(4), chunk_tokens=3).backward()\n" \
           "kernels.decode_attention(q[:, :, 0], q, q)\n" \
           "kernels.int8_matvec(x, *kernels.quantize_int8(torch.randn(3, 16)))\n" \
           "assert x.grad.abs().sum() > 0 and q.grad.abs().sum() > 0"
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    here = str(ROOT)
    for path, reason in ((f"{tmp_path}{os.pathsep}{here}", "not installed"), (here, "no kernel runs on cpu")):
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        if reason != "not installed":
            pytest.importorskip("triton")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                              timeout=120)
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[0] == "imported" and len(lines) == 2 and reason in lines[1], lines
