"""Claims about kernels.py and the verbs `kernels` and `profile` of bench.py."""
import os
import re
import subprocess
import sys

import pytest
import torch

from common import ROOT

F = torch.nn.functional
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}      # a few roundings at the size of the largest entry


def assert_like_float64(function, reference, *inputs):
    """Outputs and every gradient of function(*inputs) against reference in float64 on the same (rounded) numbers."""
    def run(f, xs):
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in xs]
        outs = f(*xs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(1)
        ups = [torch.randn(o.shape, generator=generator, device="cpu").to(o.device, o.dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, [x for x in xs if x.requires_grad], ups)]
    tolerance = TOLERANCE[str(inputs[0].dtype)[6:]]
    results = run(function, inputs)
    exact = run(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    for i, (a, b) in enumerate(zip(results, exact, strict=True)):
        assert a.shape == b.shape and a.isfinite().all(), f"result {i}: shape {tuple(a.shape)}, or not finite"
        error = (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error < tolerance, f"result {i} of {len(results)}: error {error:.1e}, allowed {tolerance}"


def randn(dtype, *shape):
    torch.manual_seed(sum(shape))
    return torch.randn(shape).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_rms_norm_and_matmul_equal_float64(kernels, dtype):
    for shape in ((3, 7, 80), (65, 1), (5, 1000)):
        x, weight = randn(dtype, *shape), randn(dtype, shape[-1])
        assert_like_float64(kernels.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5), x, weight)
        assert_like_float64(kernels.swiglu, lambda g, u: F.silu(g) * u, x, x.flip(0))
        looped = kernels.swiglu_loop(*x.float().cpu().view(1, -1).repeat(2, 1).numpy(), block=64)
        torch.testing.assert_close(torch.from_numpy(looped), (F.silu(x.float()) * x.float()).flatten().cpu())
    for M, K, N in ((1, 1, 1), (70, 100, 90), (33, 17, 129)):
        assert_like_float64(lambda a, b: kernels.matmul(a, b.T), lambda a, b: a @ b.T,
                            randn(dtype, M, K), randn(dtype, N, K))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_equals_a_product_of_complex_numbers(kernels, dtype):
    q, k, angle = randn(dtype, 2, 17, 6, 16).transpose(1, 2), randn(dtype, 2, 3, 17, 16), randn("float32", 17, 8)
    rotation = torch.polar(torch.ones_like(angle).double(), angle.double())
    for interleaved in (False, True):
        def by_complex(x):
            pairs = x.unflatten(-1, (8, 2)) if interleaved else x.unflatten(-1, (2, 8)).mT
            pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
            return (pairs if interleaved else pairs.mT).flatten(-2)
        assert_like_float64(lambda q, k: kernels.apply_rope(q, k, angle.cos(), angle.sin(), interleaved),
                            lambda q, k: (by_complex(q), by_complex(k)), q, k)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_alone_and_after_a_linear_layer(kernels, dtype):
    x, weight = randn(dtype, 2, 9, 24), randn(dtype, 201, 24)
    targets = torch.tensor([0, 200, 64, 63, 128, 5, 6, 7, 8] * 2).view(2, 9)
    def right(logits):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_like_float64(lambda z: kernels.cross_entropy(z, targets), right, x @ weight.T * 3)
    for chunk in (4, None):
        assert_like_float64(lambda x, w: kernels.linear_cross_entropy(x, w, targets, chunk_tokens=chunk),
                            lambda x, w: right(x @ w.T), x, weight)
    assert kernels.cross_entropy(x @ weight.T * 1000, targets).isfinite()


def test_float16_gradients_of_many_positions_survive_until_the_loss_scale(kernels, monkeypatch):
    """1/N must not enter a float16 gradient before the loss scale: at 16,384 positions most of it is below 6e-8."""
    monkeypatch.setattr(kernels, "INTERPRET", False)              # in PyTorch: 16,384 programs would take minutes
    torch.manual_seed(0)
    targets = torch.randint(0, 512, (16384,), device="cpu")
    inputs = [torch.randn(n, 16, device="cpu").half() for n in (16384, 512)]
    def gradients(loss_of, dtype):
        x, weight = (t.to(dtype).requires_grad_() for t in inputs)
        return torch.autograd.grad(loss_of(x, weight) * 65536.0, [x, weight])
    exact = gradients(lambda x, w: F.cross_entropy(x @ w.T, targets), torch.float64)
    for a, b in zip(gradients(lambda x, w: kernels.linear_cross_entropy(x, w, targets), torch.float16), exact):
        assert a.dtype == torch.float16 and (a.double() - b).norm() < 5e-3 * b.norm()


def test_linear_cross_entropy_never_holds_all_logits(kernels):
    sizes = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.nbytes for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out
    with Watch():
        kernels.linear_cross_entropy(torch.randn(64, 8), torch.randn(300, 8), torch.arange(64), chunk_tokens=16)
    assert max(sizes) == 16 * 300 * 4


def test_what_the_kernels_cannot_do_is_said(kernels):
    x, four = torch.zeros(2, 3), torch.zeros(1, 2, 5, 6)
    for name, *inputs in (("cross_entropy", x, torch.arange(3)), ("matmul", x, x), ("swiglu", x, x.half()),
                          ("rms_norm", x, torch.ones(4)), ("apply_rope", four, four, *torch.ones(2, 4, 3)),
                          ("linear_cross_entropy", x, torch.ones(9, 4), torch.arange(2)),
                          ("linear_cross_entropy", x, torch.ones(9, 3), torch.arange(2), -5)):
        with pytest.raises(ValueError, match=r"\d"):
            getattr(kernels, name)(*inputs)


def test_second_derivatives_are_refused_and_not_wrong(kernels):
    import flash
    x, weight, ids = torch.randn(5, 16).requires_grad_(), torch.rand(16), torch.arange(5)
    functions = {"swiglu": lambda: kernels.swiglu(x, x), "rms_norm": lambda: kernels.rms_norm(x, weight),
                 "apply_rope": lambda: kernels.apply_rope(x[None, None], x[None, None], *torch.rand(2, 5, 8))[0],
                 "cross_entropy": lambda: kernels.cross_entropy(x, ids),
                 "linear_cross_entropy": lambda: kernels.linear_cross_entropy(x, torch.rand(7, 16), ids),
                 "tiles": lambda: flash.FlashAttentionPyTorch.apply(x, x, x, True),
                 "Triton": lambda: flash.FlashAttentionTriton.apply(x, x, x, True)}
    for name, function in functions.items():
        gradient, = torch.autograd.grad(function().square().sum(), x, create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError as error:
            assert "differentiate twice" in str(error), name
        else:
            pytest.fail(f"{name} gave a second derivative")


def test_kernels_read_and_write_nothing_outside(kernels, monkeypatch):
    import flash
    launch = kernels.launch
    def walled(kernel, grid, *arguments, **constants):
        """The launch on copies between two walls of NaN, which reads would spread and writes would breach."""
        rooms = {}
        def move(t):
            if not isinstance(t, torch.Tensor):
                return t
            wall = float("nan") if t.is_floating_point() else 1 << 40
            room = torch.full((t.numel() + 128,), wall, dtype=t.dtype, device=t.device)
            rooms.setdefault(t.data_ptr(), (t, room, room[64:-64].as_strided(t.shape, t.stride()).copy_(t)))
            return rooms[t.data_ptr()][2]
        launch(kernel, grid, *map(move, arguments), **{name: move(value) for name, value in constants.items()})
        for t, room, inside in rooms.values():
            walls = torch.cat([room[:64], room[-64:]])
            assert (walls.isnan() if t.is_floating_point() else walls == 1 << 40).all(), f"{kernel} wrote outside"
            t.data.copy_(inside)
    monkeypatch.setattr(kernels, "launch", walled)
    monkeypatch.setattr(flash, "launch", walled)
    q, k, v = (torch.randn(1, heads, T, 24, requires_grad=True) for heads, T in ((4, 70), (2, 65), (2, 65)))
    x, weight = torch.randn(37, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    outs = [flash.FlashAttentionTriton.apply(q, k, v, True), kernels.rms_norm(x, weight), kernels.swiglu(x, x * 2),
            *kernels.apply_rope(q, q, torch.rand(70, 12), torch.rand(70, 12)), kernels.matmul(x, x.T),
            kernels.cross_entropy(x, torch.arange(37) % 33),
            kernels.linear_cross_entropy(x, torch.randn(50, 33), torch.arange(37), chunk_tokens=10)]
    for result in (*outs, *torch.autograd.grad([o.square().sum() for o in outs], [q, k, v, x, weight])):
        assert result.isfinite().all()


def test_without_triton_pytorch_runs_and_one_line_says_so(tmp_path):
    code = """if True:
        import torch, flash, kernels
        print("imported")
        x = torch.randn(1, 2, 9, 16, requires_grad=True)
        q = kernels.apply_rope(flash.FlashAttentionTriton.apply(x, x, x, True), x, *torch.rand(2, 9, 8))[0]
        y = kernels.matmul(kernels.swiglu(kernels.rms_norm(q[0, 0], torch.ones(16)), q[0, 1]), torch.randn(16, 16))
        loss = kernels.linear_cross_entropy(y, torch.randn(20, 16), torch.arange(9), chunk_tokens=4)
        (loss + kernels.cross_entropy(y, torch.arange(9))).backward()
        assert x.grad.abs().sum() > 0"""
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "imported" and len(lines) == 2 and "PyTorch runs instead" in lines[1], lines


def test_profile_of_a_training_step_by_region(tmp_path, capsys):
    import bench
    shape = ["--d_model=32", "--n_layers=2", "--n_heads=2", "--vocab_size=50", "--context_length=16"]
    bench.main(["profile", f"--out_dir={tmp_path}", f"--data_dir={tmp_path}/none", "--batch_tokens=64", "--device=cpu",
                "--fused_loss=true", *shape])
    said = capsys.readouterr().out
    shares = dict(re.findall(r"^([a-z-]+) .* ([\d.]+)%$", said, re.M))
    assert len(shares) == 8 and 95 < sum(map(float, shares.values())) < 105, said
    assert re.search(r"^clip +[\d.]+ +[\d.]+$", said, re.M), "clipping is a phase of its own: mean and deviation"
    assert '"attention"' in (tmp_path / "trace.json").read_text(encoding="utf-8")
