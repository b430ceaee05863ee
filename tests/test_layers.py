"""Claims about layers.py, and that what a CPU runs instead (fused.py, machine.py) is the same."""
import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from attention import turn
from common import SWITCHES, TOY, rng
import fused
import layers
import machine
from model import ModelConfig
import native

# One rounding of the result, and for bfloat16 (8 bits) of the intermediates that the simple version has too.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(ours, theirs, tolerance):
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert difference <= tolerance * max(1, theirs.abs().max().item()), difference


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


@pytest.fixture(params=["C", "torch"])
def in_c_or_torch(request, monkeypatch):
    """A test with fused.c, and the same one as if there were no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(fused, "library", lambda: None)
    elif fused.library() is None:
        pytest.skip("needs a C compiler")


WEIGHT, BIAS = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)


def layer_norm(x):
    norm = layers.LayerNorm(6, eps=0.1)
    norm.load_state_dict({"weight": WEIGHT, "bias": BIAS})
    return norm(x)


FUNCTIONS = {
    "softmax": (lambda x, y: layers.softmax(x, -2), lambda x, y: F.softmax(x, -2)),
    "silu": (lambda x, y: layers.silu(x), lambda x, y: F.silu(x)),
    "relu2": (lambda x, y: layers.relu2(x), lambda x, y: F.relu(x) ** 2),
    "gelu": (lambda x, y: layers.gelu(x), lambda x, y: F.gelu(x, approximate="tanh")),
    "swiglu": (lambda x, y: layers.swiglu(x, y), lambda x, y: F.silu(x) * y),
    "rms_norm": (lambda x, y: layers.rms_norm(x, WEIGHT, 0.1), lambda x, y: F.rms_norm(x, (6,), WEIGHT.double(), 0.1)),
    "layer_norm": (lambda x, y: layer_norm(x), lambda x, y: F.layer_norm(x, (6,), WEIGHT.double(), BIAS.double(), 0.1))}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_follow_torch(name):
    ours, theirs = FUNCTIONS[name]
    for shape, dtype in itertools.product([(7,), (2, 3, 4)], TOLERANCE):
        x, y = (randn(*shape, 6, seed=i).to(dtype) * 3 for i in (0, 1))
        got = ours(x, y)
        assert got.shape == x.shape and got.dtype == dtype
        close(got, theirs(x.double(), y.double()), TOLERANCE[dtype])


def test_softmax_does_not_overflow():
    logits = torch.tensor([[1e4, 1e4 - math.log(3), -1e4], [math.log(3), 0, -1e4]])  # less its own maximum
    close(layers.softmax(logits, -1), torch.tensor([[0.75, 0.25, 0]] * 2), 1e-3)   # float32 keeps 3 digits of 1e4 - 1.1
    assert layers.softmax(torch.zeros(3, 0), -1).shape == (3, 0)
    for dtype in (torch.float16, torch.bfloat16):                                   # a sum past 65,504, or of 8 bits
        close(layers.softmax(torch.zeros(100_000, dtype=dtype), 0), torch.full((100_000,), 1e-5, dtype=dtype), 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_follows_torch(dtype, in_c_or_torch):
    """In bfloat16 the sum of 20,000 exponentials would have two digits."""
    for shape in ((7, 6), (2, 3, 4, 6), (64, 20_000)):
        x, targets = randn(*shape).to(dtype) * 3, torch.arange(math.prod(shape[:-1])).view(shape[:-1]) % 6
        exact = F.cross_entropy(x.double().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
        for losses in (layers.simple_cross_entropy, layers.token_cross_entropy):
            close(losses(x, targets), exact, min(1e-5, TOLERANCE[dtype]))
        mean = layers.cross_entropy(x, targets.int())
        close(mean, exact.mean(), min(1e-5, TOLERANCE[dtype]))
        assert mean.dtype == torch.promote_types(dtype, torch.float32) and mean.dim() == 0
        assert layers.cross_entropy(x * 1000, targets).isfinite()
    far = (torch.tensor([[0.0, 0.0], [1.0, 3.0]]) + 2.0 ** 23).requires_grad_()        # no digits after the point
    losses = layers.token_cross_entropy(far, torch.tensor([0, 0]))
    losses.sum().backward()
    close(losses, torch.tensor([math.log(2), math.log(1 + math.e ** 2)]), 1e-6)
    close(far.grad.sum(dim=-1), torch.zeros(2), 1e-6)
    with pytest.raises(ValueError, match="do not fit logits"):
        layers.cross_entropy(x, targets.unsqueeze(-1))


def test_attention_masks_leading_dimensions_and_hidden_rows():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    mask = torch.rand(5, 7, generator=rng()) < 0.6
    mask[2], mask[:2, 0] = False, True
    ours, rows = layers.attention(q, k, v, mask), mask.any(-1)
    close(ours[..., rows, :], F.scaled_dot_product_attention(q, k, v, mask)[..., rows, :], 1e-6)
    assert ours[..., ~rows, :].abs().max() == 0
    close(layers.attention(q[0, 0], k[0, 0], v[0, 0]), F.scaled_dot_product_attention(q, k, v)[0, 0], 1e-6)
    assert not layers.attention(*(torch.ones(2, n, 4) for n in (3, 0, 0))).any()
    zeros = torch.zeros(70_000, 1).half()                          # in float16 the sum of 70,000 ones is infinite
    assert layers.attention(zeros[:1], zeros, zeros + 1).item() == pytest.approx(1, rel=1e-2)


# --- what a CPU runs ---

@pytest.mark.parametrize("name", ["norm", "swiglu", "rotate", "attention", "loss"])
def test_what_a_cpu_runs_equals_the_simple_versions(name, in_c_or_torch, monkeypatch):
    """Values and gradients, at odd shapes; the loss also in pieces of two rows, of which the last is cut short."""
    def causal(q, k, v):
        k, v = (t.repeat_interleave(3, dim=1) for t in (k, v))
        return layers.attention(q, k, v, torch.ones(19, 19, dtype=torch.bool).tril())
    monkeypatch.setattr(fused.CrossEntropy, "PIECE", 2500)
    x, heads = randn(2, 5, 3, 8), [randn(2, n, 19, 8, seed=n) for n in (6, 2, 2)]
    gates, logits = randn(3, 700) * 25, randn(2, 5, 1100) * 20
    logits[0, :2, 7], logits[0, 2, -1], logits[1] = -torch.inf, 300, logits[1].sort().values
    logits[0, 3, :1030] = -torch.inf
    targets = torch.randint(1030, 1100, (5, 2), generator=rng()).T                          # they lie apart in memory
    positions = torch.tensor([[0, 1, 7, 300, 4], [9, 2, 2, 2, 5]])
    tables = [table.unsqueeze(-2) for table in layers.rope_tables(positions, 8)]
    fast, simple, tensors, more = {
        "norm": (fused.RMSNorm.apply, layers.rms_norm, [x, torch.rand(8, generator=rng()) + 0.5], [1e-5]),
        "swiglu": (fused.SwiGLU.apply, layers.swiglu, [gates, gates.flip(0)], []),
        "rotate": (lambda x, *more: turn(x, *more, False), layers.rotate, [x], tables),
        "attention": (machine.short_attention, causal, heads, []),
        "loss": (layers.token_cross_entropy, layers.simple_cross_entropy, [logits], [targets])}[name]
    for dtype in TOLERANCE:
        results = []
        for run, kind in ((fast, dtype), (simple, torch.float64)):
            inputs = [t.to(dtype).to(kind).clone().requires_grad_() for t in tensors]
            out = run(*inputs, *more)
            out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype))
            results.append([out] + [t.grad for t in inputs])
        for ours, theirs in zip(*results):
            close(ours, theirs, 3 * TOLERANCE[dtype])
        if name in ("norm", "swiglu", "loss"):                     # what is no number stays none
            broken = [t.to(dtype).clone() for t in tensors]
            broken[0].view(-1)[3] = torch.nan
            assert fast(*broken, *more).isnan().any()


@pytest.mark.parametrize("kind, reference", [(layers.RMSNorm, F.rms_norm), (layers.LayerNorm, F.layer_norm)],
                         ids=["rms", "layer"])
def test_norms_work_in_float32(kind, reference, monkeypatch):
    """The mean of squares: of float16 numbers from 256 on it would overflow, of bfloat16 it would have two digits."""
    x, large = randn(20, 768).bfloat16(), torch.tensor([300.0, -300.0]).half().repeat(4)
    exact = reference(x.double(), (768,), eps=1e-5)
    # Without gradients RMSNorm takes the simple way, without a compiler torch's.
    for training, library in ((True, fused.library), (True, lambda: None), (False, fused.library)):
        monkeypatch.setattr(fused, "library", library)
        with torch.set_grad_enabled(training):
            ours = kind(768)(x)
            assert (ours == exact.bfloat16()).float().mean() > 0.99 and ours.dtype == torch.bfloat16
            close(kind(8)(large), torch.tensor([1.0, -1.0]).repeat(4), 1e-3)
            close(kind(768).double()(x.float()), exact, 1e-5)      # weights of another dtype


# --- layers ---

def test_rope_by_hand_and_by_distance():
    """As a product of complex numbers, which is how the paper has it; in float32, as bfloat16 cannot tell position
    1,000 from 1,001."""
    x, positions = randn(2, 3, 4, 8), torch.tensor([7, 1001, 4097, 30_001])
    turns = torch.polar(torch.ones(4, 4).double(), positions[:, None] * 100.0 ** (-torch.arange(4).double() / 4))
    turned = torch.view_as_real(torch.view_as_complex(x.double().view(2, 3, 4, 4, 2)) * turns).flatten(-2)
    halves = x.view(2, 3, 4, 4, 2).mT.flatten(-2)                  # the same pairs, laid out in two halves
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 2e-2)):
            close(layers.rope(x.to(dtype), positions, 100.0, interleaved=True), turned, tolerance)
            close(layers.rope(halves.to(dtype), positions, 100.0), turned.view(2, 3, 4, 4, 2).mT.flatten(-2), tolerance)
    q, k, shift = x[:, :, :1], x[:, :, 1:2], torch.tensor([[3], [11]])
    near = (layers.rope(q, torch.tensor([2])) * layers.rope(k, torch.tensor([7]))).sum(-1)
    far = (layers.rope(q, 2 + shift) * layers.rope(k, 7 + shift)).sum(-1)       # (B, T) positions
    close(near, far, 1e-5)
    with pytest.raises(ValueError, match="even"):
        layers.rope(x[..., :3], torch.arange(4))


def test_linear_and_embedding_by_hand():
    """Truncated at three deviations, which leaves 0.9866 of the deviation."""
    linear, table = layers.Linear(300, 500), layers.Embedding(500, 300)
    for weight, std in ((linear.weight.detach(), math.sqrt(2 / 800)), (table.weight.detach(), 1)):
        assert weight.shape == (500, 300) and weight.abs().max() <= 3 * std
        assert weight.std() == pytest.approx(0.9866 * std, rel=0.01)
    x, ids = randn(2, 5, 300), torch.tensor([[4, 0, 4], [1, 2, 3]])
    close(linear(x), F.linear(x, linear.weight), 1e-5)
    biased = layers.Linear(300, 4, bias=True)
    assert linear.bias is None and torch.equal(biased.bias, torch.zeros(4))
    torch.nn.init.normal_(biased.bias)
    close(biased(x), F.linear(x, biased.weight, biased.bias), 1e-5)
    close(table(ids), table.weight[ids], 0)
    with pytest.raises(IndexError):
        table(torch.tensor([[-1]]))


def test_swiglu_by_hand():
    x, layer = randn(2, 5, 3), layers.SwiGLU(3, 8)
    gate, up, down = (getattr(layer, name).weight for name in ("w1", "w3", "w2"))
    assert gate.shape == up.shape == (8, 3) and down.shape == (3, 8) and layer.w1.bias is None
    close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, 1e-5)
    assert layers.SwiGLU(3, 8, bias=True).w2.bias.shape == (3,)


def test_experts_route_and_balance():
    """Mixtral's layer by hand in a loop, and its balancing loss; DeepSeek's bias is in the choice, not the weights."""
    x, losses = torch.randn(2, 9, 48, dtype=torch.float64), []
    layer = layers.MixtureOfExperts(ModelConfig(**TOY | SWITCHES["moe"])).double()
    y, scores = layer(x, losses).view(-1, 48), torch.softmax(x.view(-1, 48) @ layer.router.weight.T, dim=-1)
    for row, token, out in zip(scores, x.view(-1, 48), y):
        best = row.argsort(descending=True)[:2].tolist()
        close(sum(row[e] / row[best].sum() * layer.experts[e](token) for e in best), out, 1e-10)
    assert torch.equal(layer.tokens_per_expert, torch.bincount(scores.topk(2).indices.flatten(), minlength=4))
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="a reference for tests only")
    theirs = mixtral.load_balancing_loss_func((x.view(-1, 48) @ layer.router.weight.T,), 4, 2)
    assert len(losses) == 1 and losses[0].item() == pytest.approx(theirs.item(), rel=1e-6)
    biased = layers.MixtureOfExperts(ModelConfig(**TOY | SWITCHES["moe bias"])).double().eval()
    before, moved = biased(x), copy.deepcopy(biased)
    moved.expert_bias += 100                                       # the same for all: no choice changes, nor any weight
    close(moved(x), before, 1e-12)
    moved.expert_bias[3] += 100
    assert not torch.allclose(moved(x), before)


def test_router_scores_are_float32():
    layer, x = layers.MixtureOfExperts(ModelConfig(**TOY | SWITCHES["moe"])).bfloat16(), randn(3, 9, 48).bfloat16()
    layer(x, losses := [])
    scores = layer.router(x.view(-1, 48)).double().softmax(dim=-1)
    exact = layers.balance_loss(scores, layer.tokens_per_expert.double())
    assert losses[0].item() == pytest.approx(exact.item(), abs=1e-6)


def test_a_missing_compiler_is_said(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("NATIVE", raising=False)
    assert native.load("fused") is None and "no C compiler" in capsys.readouterr().err
    monkeypatch.setenv("FUSED", "0")
    assert native.load("fused") is None and not capsys.readouterr().err
