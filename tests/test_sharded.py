"""Claims about sharded.py and fsdp.py."""
import copy
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from common import ragged, toy
import model as model_module
import parallel
import sharded
from ranks import CLOSE, Wrapped, assert_passed, furthest, one_process, run_checks, selected, small

TWO = (dict(name="ddp"), dict(name="zero1"), dict(name="fsdp"), dict(name="ddp", tp=2), dict(name="ddp", pp=2),
       dict(name="zero1", pp=2))
FOUR = (dict(name="zero1"), dict(name="fsdp"), dict(name="fsdp", tp=2), dict(name="zero1", pp=2),
        dict(name="ddp", pp=2, tp=2), dict(name="ddp", pp=4))
TIED = dict(n_layers=4, tie_embeddings=True, n_kv_heads=2, vocab_size=53, shift_keys=True)
GPT2 = dict(n_layers=4, bias=True, norm="layer", position="learned", ffn="gelu", d_ff=64)
EXPERTS = dict(n_experts=3, balance="none", n_shared_experts=1, mtp_depth=1, smear=True)


def check_three_steps(rank, size, tmp):
    """Every strategy ends with the weights of one process; 11 rows, so that nothing divides."""
    for more in (TIED, GPT2, EXPERTS):
        reference, norms = one_process(range(3), **more)
        for strategy in TWO:
            if more is not EXPERTS or "pp" not in strategy:
                wrapped = Wrapped(**strategy, seed=rank, **more)       # rank 0's weights must rule
                got = wrapped.train(range(3))
                worst = furthest(wrapped.state()[0], reference.state_dict())
                assert worst < CLOSE, f"{strategy}, {more}: weights are {worst} from one process's"
                assert torch.allclose(got, norms, rtol=1e-4), f"{strategy}, {more}: norms {got}, one process {norms}"


def check_frozen_parameters(rank, size, tmp):
    """What does not train stays, also where a strategy divides it, and the others end as in one process."""
    for frozen in ("attn", "norm", "token_embeddings", "w2|layers.1"):
        reference, _ = one_process(range(2), frozen=frozen, **TIED)
        for strategy in TWO:
            wrapped = Wrapped(**strategy, frozen=frozen, **TIED)
            wrapped.train(range(2))
            worst = furthest(wrapped.state()[0], reference.state_dict())
            assert worst < CLOSE, f"{strategy}, {frozen} frozen: weights are {worst} from one process's"
    for frozen in (r"embeddings|layers\.[01]", r"layers\.[23]|ln_final|lm_head"):                      # a whole stage
        model, (x, y, _) = small(frozen=frozen, n_layers=4), ragged(0)
        expected, pipeline = model(x, y)[1].detach(), sharded.Pipeline(model, None, 3)
        if "embeddings" in frozen:
            with pytest.raises(ValueError, match="first of 2 stages holds is frozen"):
                pipeline.step(x, y)
        else:
            assert abs(pipeline.step(x, y) - expected) < 1e-5


def check_checkpoints_move(rank, size, tmp):
    """3 steps on 4 ranks by each strategy, 2 more on 2 ranks by another, or in one process."""
    for number, strategy in enumerate({4: FOUR, 2: TWO, 1: [dict(name="ddp")] * len(FOUR)}[size]):
        wrapped = Wrapped(**strategy, seed=rank, **TIED)
        if size == 4:
            wrapped.train(range(3))
            state = wrapped.state()
            if rank == 0:
                torch.save(state, f"{tmp}/{number}.pt")
        else:
            wrapped.load(*torch.load(f"{tmp}/{number}.pt", weights_only=True))
            wrapped.train(range(3, 5))
            worst = furthest(wrapped.state()[0], one_process(**TIED)[0].state_dict())
            assert worst < CLOSE, f"{FOUR[number]} on 4 ranks, then {strategy} on {size}: {worst} from one process's"


class Matrices(torch.nn.Module):
    """Sizes that divide by nothing: some ranks of four hold fewer rows, or none."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = model_module.Embedding(13, 7), model_module.RMSNorm(7)
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(model_module.Linear(7, n), torch.nn.Linear(n, 7))
                                           for n in (5, 3)])
        self.head, self.unused = model_module.Linear(7, 2), model_module.Linear(7, 2).requires_grad_(False)
        self.recompute = False

    def forward(self, ids):
        x = self.norm(self.table(ids))
        for layer in self.layers:                              # hooks are run again with the layer, as train.py does
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        return self.head(x).float()


def check_fsdp(rank, size, tmp):
    ids = torch.randint(13, (size, 6), generator=torch.Generator().manual_seed(5))
    for dtype, recompute in ((None, False), (None, True), (torch.float16, False), (torch.bfloat16, False)):
        torch.manual_seed(0)
        reference = Matrices()
        divided = copy.deepcopy(reference)
        divided.recompute, model = recompute, sharded.FSDP(divided, compute_dtype=dtype)
        for turn in range(2):
            model.zero_grad()
            with torch.no_grad():
                model(ids)
            for _ in range(2):                                 # two micro-batches
                (model(ids[rank:rank + 1]).square().mean() / 2).backward()
            model.finish_gradient_synchronization()
        lowered = copy.deepcopy(reference).to(dtype or torch.float32)
        lowered.norm.float()
        lowered(ids).square().mean().backward()
        # Elements of float16 carry 11 bits, of bfloat16 8; sums over 6 positions and 3 layers lose a few of them.
        tolerance = {None: 1e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
        for (name, p), q in zip(divided.named_parameters(), lowered.parameters()):
            assert p.dim() == 1 or len(p) <= math.ceil(len(q) / size), f"{name} is not divided"
            if q.requires_grad:
                grad = sharded.take_like(p, q.grad.float())
                assert p.dtype == p.grad.dtype == torch.float32 and p.shape == p.grad.shape, name
                error = (p.grad - grad).abs().max().item() / q.grad.abs().max().item() if p.numel() else 0
                assert error < tolerance, f"{name}, {dtype}, recomputed {recompute}: {error}"
        assert furthest(model.full_state_dict(), reference.state_dict()) == 0, "nothing has stepped"
        flats = [flat for unit in model.units for flat in unit.flats.values()]
        assert not any(flat.untyped_storage().nbytes() for flat in flats), "not freed"
    model = sharded.FSDP(Matrices().requires_grad_(True))
    model(ids).sum().backward()
    with pytest.raises(RuntimeError, match="unused.weight got no gradient"):
        model.finish_gradient_synchronization()


def check_columns_and_rows(rank, size, tmp):
    column, row = sharded.ColumnParallelLinear(6, 8), sharded.RowParallelLinear(8, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    row(torch.relu(column(x))).sum().backward()
    whole = [sharded.gather_like(layer.weight, layer.weight).requires_grad_() for layer in (column, row)]
    x_whole = x.detach().clone().requires_grad_()
    (torch.relu(x_whole @ whole[0].T) @ whole[1].T).sum().backward()
    assert torch.allclose(x.grad, x_whole.grad, atol=1e-5)
    for layer, weight in zip((column, row), whole):
        assert torch.allclose(layer.weight.grad, sharded.take_like(layer.weight, weight.grad), atol=1e-5)
    with pytest.raises(ValueError, match=f"n_heads=1 cannot be divided among tp={size} ranks"):
        sharded.tensor_parallel(small(n_heads=1, n_kv_heads=1))


def check_pipeline(rank, size, tmp):
    """Loss and every gradient of both schedules, for any number of micro-batches, twice in a row without zeroing; the
    loss of a micro-batch may be any function of its logits."""
    def loss_of(logits, loss, tokens):
        return loss / 2 + logits.square().mean() * tokens.shape[1] / 100

    x, y, _ = ragged(3)
    more = dict(n_layers=5, tie_embeddings=True)
    reference = small(**more)
    loss = loss_of(*reference(x, y), x)
    (3 * loss).backward()
    for schedule, n in itertools.product(("gpipe", "1f1b"), (3, 20)):
        model = small(seed=rank, **more)
        pipeline = sharded.Pipeline(model, None, n, schedule)
        for turn in (1, 2):
            got = pipeline.step(x, y, loss_of, scale=3.0)
            assert abs(got - loss) < 1e-5, f"{schedule}, {n}: loss {got}, one process {loss}"
            for (name, p), q in zip(model.named_parameters(), reference.parameters()):
                assert p.is_meta or torch.allclose(p.grad, turn * q.grad, atol=2e-6), f"{schedule}, {n}: {name}"
        held = {"gpipe": min(n, 11), "1f1b": min(n, 11, size - rank)}[schedule]
        assert pipeline.most_held == held, f"{schedule}, {n}: {pipeline.most_held} micro-batches held"
        logits, got = pipeline(x), pipeline(x, y)[1]
        assert torch.allclose(logits, reference(x), atol=1e-5) and abs(got - reference(x, y)[1]) < 1e-5
    assert 0 < len(list(pipeline.parameters())) < len(list(reference.parameters())), "a stage has a part"
    for message, more, arguments in (("n_layers=1 cannot be divided", dict(n_layers=1), ()),
                                     ("schedule='pipedream' must be", dict(n_layers=4), (4, "pipedream")),
                                     ("no mtp_depth", dict(n_layers=4, mtp_depth=1), ())):
        with pytest.raises(ValueError, match=message):
            sharded.Pipeline(small(**more), None, *arguments)
    with pytest.raises(ValueError, match="parallel=fsdp with pp=2"):
        sharded.Strategy("fsdp", pp=2)


def check_memory_by_the_formula(rank, size, tmp):
    """Bytes of weights, gradients and moments on this rank, as the table in parallel.py says."""
    shape = dict(vocab_size=512, d_model=64, d_ff=128, n_layers=4, qk_norm=False)
    n, vocabulary = sum(p.numel() for p in small(**shape).parameters()), 512 * 64
    formulas = {"ddp": 16 * n, "zero1": (8 + 8 / size) * n, "fsdp": 16 * n / size,
                "pp": 16 * ((n - 2 * vocabulary) / size + vocabulary * ((rank == 0) + (rank == size - 1)))}
    for name, formula in formulas.items():
        wrapped = Wrapped("ddp" if name == "pp" else name, 0, pp=size if name == "pp" else 1, **shape)
        wrapped.train(range(1))
        held = sum(p.nbytes + p.grad.nbytes for p in wrapped.model.parameters() if not p.is_meta)
        states = wrapped.optimizer.state.values()
        held += sum(t.nbytes for entry in states for t in entry.values() if torch.is_tensor(t))
        if name == "zero1":                                    # it deals out whole matrices: the mean over ranks
            held = parallel.reduce(torch.tensor(float(held))).item() / size
        assert abs(held / formula - 1) < 0.05, f"{name}: {held} bytes, formula {formula}"


def check_fsdp_sends_what_it_freed_again(rank, size, tmp):
    """Bytes that a step hands to torch.distributed: weights for forward and for backward, gradients once."""
    sent, send = [], parallel.send
    parallel.send = lambda kind, call, *tensors, **more: (sent.append(tensors[0].nbytes),
                                                          send(kind, call, *tensors, **more))[1]
    module = small(n_layers=4)
    formula = 3 * 4 * sum(p.numel() for p in module.parameters())
    model = sharded.FSDP(module)
    sent.clear()
    model(*ragged(0)[:2])[1].backward()
    model.finish_gradient_synchronization()
    parallel.send = send
    # Vectors go twice, rows are padded; the embedding and the last unit are gathered once.
    assert 0.75 * formula < sum(sent) < 1.05 * formula, f"{sum(sent)} bytes, formula {formula}"


CHECKS = {4: (check_checkpoints_move, check_fsdp, check_pipeline, check_memory_by_the_formula),
          2: (check_three_steps, check_frozen_parameters, check_checkpoints_move, check_fsdp, check_pipeline,
              check_columns_and_rows, check_fsdp_sends_what_it_freed_again)}


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    return run_checks(selected(request, CHECKS), tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("size, check", [(size, check.__name__) for size, checks in CHECKS.items() for check in checks])
def test_ranks(ranks, size, check):
    assert_passed(ranks, size, check)


def test_a_checkpoint_of_four_ranks_goes_on_in_one_process(ranks):
    check_checkpoints_move(0, 1, ranks)


def test_a_stage_works_in_the_order_of_its_schedule():
    """Figure 4 of Narayanan 2021 (2104.04473) with 4 stages and 8 micro-batches, f and b for forward and backward."""
    for arguments, words in ((("1f1b", 3, 4, 3), "f0 b0 f1 b1 f2 b2"), (("gpipe", 3, 4, 2), "f0 f1 b0 b1"),
                             (("1f1b", 0, 4, 8), "f0 f1 f2 f3 b0 f4 b1 f5 b2 f6 b3 f7 b4 b5 b6 b7")):
        assert " ".join(f"{kind[0]}{i}" for kind, i in sharded.order_of_work(*arguments)) == words


@pytest.mark.parametrize("logits", [True, False])
def test_a_compiled_model_trains_as_the_plain_one_with_and_without_its_logits(monkeypatch, logits):
    compiler, graphs, gradients = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda fn: graphs.append(fn) or compiler(fn, backend="aot_eager"))
    for compiled in (False, True):
        model, strategy = toy("gpt2"), sharded.Strategy("ddp")
        strategy.divide(model, compile=compiled, logits=logits)
        ids = torch.arange(16).view(2, 8)
        loss = strategy.forward_backward(ids, ids, 1, lambda logits, loss, inputs: loss)
        gradients.append([loss, *(p.grad for p in model.parameters())])
    assert len(graphs) == 1
    torch.testing.assert_close(*gradients)


def test_one_process_needs_no_group():
    reference, norms = one_process(range(2))
    for name in ("ddp", "zero1", "fsdp"):
        wrapped = Wrapped(name)
        assert torch.allclose(wrapped.train(range(2)), norms, rtol=1e-5)
        assert furthest(wrapped.state()[0], reference.state_dict()) < 1e-6
    column, row = sharded.ColumnParallelLinear(6, 8), sharded.RowParallelLinear(8, 6)
    x = torch.randn(3, 6)
    assert torch.allclose(row(torch.relu(column(x))), torch.relu(x @ column.weight.T) @ row.weight.T, atol=1e-6)
    x, y, _ = ragged(0)
    assert abs(sharded.Pipeline(reference, None, 3).step(x, y) - reference(x, y)[1]) < 1e-5
