"""Claims about optim.py."""
import math

import pytest
import torch

from common import rng
import optim
import parallel


def copies(n=2, dtype=torch.float32):
    first = [torch.randn(shape, generator=rng()).to(dtype) for shape in ((5, 7), (3,), (2, 2, 2))]
    return [[p.clone().requires_grad_() for p in first] for _ in range(n)]


def test_adamw_follows_torch_for_1000_steps():
    """The loop of eight lines follows both: the same sums in another order, in float64."""
    ours, theirs, loop = copies(3, torch.float64)
    a, b = optim.AdamW(ours, lr=1e-3, weight_decay=0.01), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.01)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in loop]
    for step in range(1, 1001):
        for same in zip(ours, theirs, loop):
            gradient = torch.randn(same[0].shape, generator=rng(step)).double()
            for p in same:
                p.grad = gradient.clone()
        a.step()
        b.step()
        optim.adamw_step(loop, moments, step, lr=1e-3, weight_decay=0.01)
        if step == 500:
            state = a.state_dict()
            a.load_state_dict(b.state_dict())
            b.load_state_dict(state)
    torch.testing.assert_close(ours, loop, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)           # decay after the step: lr² · decay a step


def test_adamw_of_numbers_that_lie_in_other_orders():
    """Gradients and moments of a transposed matrix; the fused kernel alone would mix them up."""
    for start in (torch.randn(3, 4), torch.randn(4, 3).T):
        p, plain = start.clone().requires_grad_(), start.contiguous().clone().requires_grad_()
        optimizer, moments = optim.AdamW([p], weight_decay=0.01), [(torch.zeros(3, 4), torch.zeros(3, 4))]
        for step in range(1, 4):
            p.grad = plain.grad = torch.randn(4, 3).T
            optimizer.step()
            optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].T.contiguous().T
            optim.adamw_step([plain], moments, step)
        torch.testing.assert_close(p, plain)
    mixed = [torch.zeros(3, dtype=dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float64)]
    for p in mixed:
        p.grad = torch.ones_like(p)
    optim.AdamW(mixed, lr=0.5).step()                # a first step is as long as the rate
    assert [p.dtype for p in mixed] == [torch.bfloat16, torch.float64]
    assert all(torch.allclose(p.double(), torch.full((3,), -0.5).double(), atol=1e-2) for p in mixed)
    gaps = torch.zeros(3, 4)[:, :2].requires_grad_()
    gaps.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="clone"):
        optim.AdamW([gaps]).step()


def test_adamw_first_step_by_hand():
    p, q = (torch.tensor([1.0], requires_grad=True) for _ in range(2))
    p.grad = q.grad = torch.tensor([4.0])
    more, moments = dict(lr=0.1, betas=(0.9, 0.999), eps=0.0, weight_decay=0.5), (torch.zeros(1), torch.zeros(1))
    optim.AdamW([p], **more).step()
    with torch.no_grad():
        optim.adamw_step([q], [moments], 1, **more)
    # m̂/√v̂ = 1 on the first step, then decay; not corrected m/√v = 0.1 / √0.001 = 3.2
    assert [p.item(), q.item()] == pytest.approx([(1.0 - 0.1) * (1 - 0.1 * 0.5)] * 2)


@pytest.mark.parametrize("name, settings, theirs", [
    ("SGD", dict(momentum=0.9), dict(momentum=0.9)), ("AdaGrad", {}, {}), ("RMSProp", dict(beta=0.9), dict(alpha=0.9))],
    ids=["SGD", "AdaGrad", "RMSProp"])
def test_the_steps_towards_adam_follow_torch(name, settings, theirs):
    mine, others = copies()
    cls = {"SGD": torch.optim.SGD, "AdaGrad": torch.optim.Adagrad, "RMSProp": torch.optim.RMSprop}[name]
    a, b = getattr(optim, name)(mine, lr=0.1, **settings), cls(others, lr=0.1, **theirs)
    for _ in range(50):
        for p, q in zip(mine, others):
            p.grad, q.grad = p.detach() - 0.5, q.detach() - 0.5
        a.step()
        b.step()
    torch.testing.assert_close(mine, others, atol=1e-5, rtol=1e-5)         # sqrt and division, 50 float32 steps
    still = torch.ones(2, requires_grad=True)
    still.grad = torch.zeros(2)
    getattr(optim, name)([still], lr=0.1, weight_decay=0.5, **settings).step()
    torch.testing.assert_close(still, torch.full((2,), 1 - 0.1 * 0.5))     # decoupled: no gradient is needed for it


@pytest.mark.parametrize("steps, low, high", [(2, 0.6, 1.42), (5, 0.65, 1.25)])
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (3, 24, 24)])
def test_muon_keeps_singular_vectors_and_levels_singular_values(shape, steps, low, high):
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=rng()), full_matrices=False)
    s = torch.logspace(0, -1, u.shape[-1])
    result = optim.orthogonalize(u * s @ vh * 7, steps).float()      # singular values spread 10-fold, any scale
    inside = u.mT @ result @ vh.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(values)).abs().max() < 0.05    # bfloat16 rounds to 1 in 256, several times
    assert low < values.min() and values.max() < high, values


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_no_singular_value_explodes_in_bfloat16(steps):
    for rank in (1, 2, 40):
        left, right = (torch.linalg.qr(torch.randn(n, rank, generator=rng(rank))).Q for n in (40, 70))
        values = torch.linalg.svdvals(optim.orthogonalize(left @ right.T, steps).float())[:rank]
        assert values.max() < 1.42, values


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
    vector = torch.zeros(3, requires_grad=True)
    vector.grad = torch.ones(3)
    with pytest.raises(ValueError, match="matrices"):
        optim.Muon([vector]).step()


def test_cosine_schedule_of_the_handout():
    values = [optim.cosine_schedule(t, 1.0, 0.1, 7, 21) for t in range(25)]
    assert values[:8] == pytest.approx([t / 7 for t in range(8)])
    assert values[14] == pytest.approx(0.55) and values[21:] == pytest.approx([0.1] * 4)
    values = [optim.wsd_schedule(t, 2.0, 0.0, 2, 4, 4) for t in range(12)]
    assert values == pytest.approx([0, 1, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0])


def test_clipping_is_global_and_skips_missing_gradients():
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))
    for size, clipped in ((1.0, 1 / (5 + 1e-6)), (1e-6, 1 / 6)):             # eps counts where the norm is as small
        a.grad, b.grad = torch.tensor([3.0, 0.0]) * size, torch.tensor([0.0, 4.0]) * size
        assert optim.clip_grad_norm([a, b, c], size).item() == pytest.approx(5 * size)
        torch.testing.assert_close(torch.cat([a.grad, b.grad]) / size, torch.tensor([3.0, 0.0, 0.0, 4.0]) * clipped)
    before = a.grad.clone()
    optim.clip_grad_norm([a, b, c], 10.0)
    assert torch.equal(a.grad, before) and c.grad is None
    b.grad = torch.tensor([0.0, math.inf])
    assert optim.clip_grad_norm([a, b], 1.0).item() == math.inf and torch.equal(a.grad, before)
    a.cuts = ("one rank's part",)
    with pytest.raises(ValueError, match="divided"):
        optim.clip_grad_norm([a, b], 1.0)
    half = torch.zeros(100_000, dtype=torch.float16, requires_grad=True)
    half.grad = torch.full_like(half, 300.0)
    for clip, norm in ((optim.clip_grad_norm, 94_868), (parallel.clip_grad_norm, 1000)):     # float16 ends at 65,504
        assert clip([half], 1000.0).item() == pytest.approx(norm, rel=2e-3)


def test_the_comparison_prints_and_draws(tmp_path, capsys):
    optim.main(tmp_path / "x.png", steps=10)
    assert "AdamW" in capsys.readouterr().out and (tmp_path / "x.png").stat().st_size > 9999
    with pytest.raises(ValueError, match="lr=nan must be"):
        optim.SGD([torch.zeros(2, requires_grad=True)], lr=math.nan)
