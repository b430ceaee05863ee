"""Claims about parallel.py."""
import contextlib
import copy
import datetime
import functools
import json
import math
import os
import traceback
from pathlib import Path

import pytest
import torch

from common import ROOT, adamw, ids, ragged, steps, torchrun, weights# noqa: F401
import model as model_module
import optim
import parallel
from model import ModelConfig, Transformer

RANKS_MODEL = dict(vocab_size=51, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=64,
                   qk_norm=True)


# Other orders of summation: 1e-7 of a gradient, of which AdamW (lr 1e-2, eps 1e-3) makes at most 10 times that a step.
CLOSE = 2e-5


def ranks_model(seed=0, **more):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**RANKS_MODEL | more))


def one_process(which=range(5), make=adamw, **more):
    model = ranks_model(**more)
    optimizer = make(list(model.parameters()))
    norms = steps(model, optimizer, which, clip=optim.clip_grad_norm)
    return model, optimizer, norms


def wrapped(strategy, seed, make=adamw, **more):
    """(model, optimizer, the rest of the arguments of `steps`, undivided module)."""
    rank, size = parallel.world()
    model, loss_of, part = ranks_model(seed, **more), None, (rank, size)
    if "tp" in strategy:
        mesh = parallel.make_mesh(size // 2, 2)
        parallel.tensor_parallel(model, mesh.tp)
        module, part = model, (mesh.dp_rank, size // 2)
        model = parallel.FSDP(model, group=mesh.dp) if "fsdp" in strategy else parallel.DDP(model, group=mesh.dp)
        if not more.get("mtp_depth"):
            loss_of = lambda x, y: parallel.vocab_parallel_loss(module, x, y)      # noqa: E731
    elif strategy == "fsdp":
        model = parallel.FSDP(model)
    else:
        model = parallel.DDP(model, "bucketed" if strategy == "zero1" else strategy, bucket_mb=0.02)
    params = list(model.parameters())
    optimizer = parallel.ShardedOptimizer(params, type(make(params[:1])), lr=1e-2, eps=1e-3, weight_decay=0.1) \
        if strategy == "zero1" else make(params)
    return model, optimizer, part + (loss_of, model.finish_gradient_synchronization)


def furthest(state, wanted):
    assert list(state) == list(wanted), (list(state)[:3], list(wanted)[:3])
    return max((state[name] - wanted[name]).abs().max().item() for name in wanted)


STRATEGIES = (*parallel.DDP.MODES, "zero1", "fsdp", "tp", "fsdp tp")


def check_five_steps(rank, size, tmp):
    gpt2 = dict(bias=True, norm="layer", position="learned", ffn="gelu", d_ff=64)
    experts = dict(n_experts=3, balance="none", n_shared_experts=1, mtp_depth=1)
    for strategies, more in ((STRATEGIES, dict()), (STRATEGIES, dict(tie_embeddings=True, n_kv_heads=2, vocab_size=53)),
                             (STRATEGIES[3:], gpt2), (STRATEGIES[3:], experts)):
        reference, _, norms = one_process(**more)
        for strategy in strategies:
            model, optimizer, rest = wrapped(strategy, seed=rank, **more)      # rank 0's weights must rule
            got = steps(model, optimizer, range(5), *rest)
            worst = furthest(parallel.full_state_dict(model.module), reference.state_dict())
            assert worst < CLOSE, f"{strategy}, {more}: weights are {worst} from one process's"
            assert torch.allclose(got, norms, rtol=1e-4), f"{strategy}, {more}: norms {got}, one process {norms}"


def check_checkpoints_move(rank, size, tmp):
    """3 steps here, 2 more in one process and by every other strategy on the other number of ranks."""
    for strategy in ("zero1", "fsdp", "tp"):
        path = f"{tmp}/{strategy}.pt"
        model, optimizer, rest = wrapped(strategy, seed=rank)
        if size == 4:
            steps(model, optimizer, range(3), *rest)
            checkpoint_of = parallel.full_state_dict(model.module), parallel.full_optimizer_state(optimizer)
            if rank == 0:
                torch.save(checkpoint_of, path)
        else:
            for saved in ("zero1", "fsdp", "tp"):
                weights, state = torch.load(f"{tmp}/{saved}.pt", weights_only=True)
                model, optimizer, rest = wrapped(strategy, seed=rank)
                model.module.load_state_dict(parallel.take_state_dict(model.module, weights))
                optimizer.load_state_dict(parallel.take_optimizer_state(optimizer, state))
                steps(model, optimizer, range(3, 5), *rest)
                worst = furthest(parallel.full_state_dict(model.module), one_process()[0].state_dict())
                assert worst < CLOSE, f"{saved} on 4 ranks, then {strategy} on 2: {worst} from one process's weights"


class Odd(torch.nn.Module):
    """A frozen part, a matrix in two places, one that only even ranks use, one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6, bias=False)
        self.again, self.frozen = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 3)
        self.again.weight = self.second.weight
        self.frozen.requires_grad_(False)
        self.sometimes, self.never = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, x, sometimes):
        y = self.frozen(self.again(torch.relu(self.first(torch.relu(self.second(x))))))
        return y * self.sometimes if sometimes else y


def check_odd_modules(rank, size, tmp):
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(3))
    sent, send = [], parallel.send
    parallel.send = lambda kind, *args, **more: (sent.append(kind), send(kind, *args, **more))[1]
    for mode in (*parallel.DDP.MODES, "fsdp"):
        torch.manual_seed(0)
        reference = Odd()
        for i in range(size):                                  # two micro-batches, so that accumulation is seen too
            for _ in range(2):
                (reference(x[i:i + 1], i % 2 == 0).square().sum() / size).backward()
        torch.manual_seed(rank)
        model = parallel.FSDP(Odd()) if mode == "fsdp" else parallel.DDP(Odd(), mode, bucket_mb=1e-4)
        assert torch.equal(model.module.frozen.bias, reference.frozen.bias), "frozen parameters come from rank 0"
        ways = ["add up"] if mode == "fsdp" else ["no_sync", "add up", "finish twice"]
        for way in ways:
            model.zero_grad()
            sent.clear()
            with model.no_sync() if way == "no_sync" else contextlib.nullcontext():
                model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            assert way != "no_sync" or not sent, f"{mode}: sent {sent} under no_sync"
            if way == "finish twice":
                model.finish_gradient_synchronization()
            model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            model.finish_gradient_synchronization()
            # Twice the two trained matrices: the one in two places waits until backward has been at both.
            assert mode != "fsdp" or sent.count("reduce-scatter") == 4, sent
            for (name, p), q in zip(model.module.named_parameters(), reference.parameters()):
                wanted = None if q.grad is None else parallel.take_like(p, q.grad)
                assert (p.grad is None) == (wanted is None), f"{mode}, {way}: {name}"
                assert wanted is None or torch.allclose(p.grad, wanted, atol=1e-6), f"{mode}, {way}: {name}"
    parallel.send = send


def check_sharded_optimizer(rank, size, tmp):
    def groups(model):
        named = list(model.named_parameters())
        hidden = [p for name, p in named if p.dim() == 2 and name.startswith("layers.")]
        norms = [p for name, p in named if "ln" in name]
        return hidden, [{"params": [named[0][1]]}, {"params": norms, "lr": 0.1}], [named[-1][1]]

    for cls in (torch.optim.AdamW, optim.AdamW, torch.optim.Adagrad, optim.Muon):
        models = ranks_model(), ranks_model()
        made = []
        ways = lambda p: cls(p, lr=0.01), lambda p: parallel.ShardedOptimizer(p, cls, lr=0.01)      # noqa: E731
        for model, make in zip(models, ways):
            hidden, others, later = groups(model)
            # Adagrad of torch 2.11 does not step groups that came later.
            alone = cls is optim.Muon or cls is torch.optim.Adagrad and not torch.__version__ >= "2.12"
            made.append(make(hidden if alone else others))
            if not alone:
                made[-1].add_param_group({"params": later, "weight_decay": 0.5})
        plain, sharded = made
        assert isinstance(sharded, torch.optim.Optimizer) and sharded.param_groups[0]["lr"] == 0.01
        for step in range(4):
            for model, optimizer in zip(models, made):
                x, y, _ = ragged(step)
                optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)

                def closure():
                    model.zero_grad()
                    loss = model(x, y)[1]
                    loss.backward()
                    return loss

                assert optimizer.step(closure).item() > 0
        worst = furthest(models[1].state_dict(), models[0].state_dict())
        assert worst < (1e-6 if cls is not optim.Muon else 1e-3), f"{cls}: {worst}"       # Muon's products are bfloat16
        held = sum(t.numel() for s in sharded.state.values() for t in s.values() if t.dim())
        largest = max(p.numel() for g in plain.param_groups for p in g["params"])
        whole = sum(t.numel() for s in plain.state.values() for t in s.values() if t.dim())
        assert held <= whole / size + 2 * largest and held < whole, f"{cls}: {held} of {whole} on one of {size} ranks"
        assert sharded.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    with pytest.raises(ValueError, match="Muon takes matrices"):       # on every rank, also those that would not own it
        parallel.ShardedOptimizer([torch.nn.Parameter(torch.ones(3))], optim.Muon)


class Matrices(torch.nn.Module):
    """Sizes that divide by nothing: some ranks of four hold fewer rows, or none."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = model_module.Embedding(13, 7), model_module.RMSNorm(7)
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(model_module.Linear(7, 5), torch.nn.Linear(5, 7)),
                                           torch.nn.Sequential(model_module.Linear(7, 3), torch.nn.Linear(3, 7))])
        self.head = model_module.Linear(7, 2)
        self.checkpointing = False

    def forward(self, ids):
        x = self.norm(self.table(ids))
        for layer in self.layers:
            again = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
            x = x + (again if self.checkpointing else layer)(x)
        return self.head(x).float()


def check_fsdp(rank, size, tmp):
    ids = torch.randint(13, (size, 6), generator=torch.Generator().manual_seed(5))
    for dtype in (None, torch.bfloat16, torch.float16):
        for checkpointing in (False, True):
            torch.manual_seed(0)
            reference = Matrices()
            divided = copy.deepcopy(reference)
            model = parallel.FSDP(divided, compute_dtype=dtype)
            divided.checkpointing = checkpointing
            sizes = {name: p.shape for name, p in reference.named_parameters()}
            for turn in range(3):                              # the second and third know which unit comes next
                model.zero_grad()
                with torch.no_grad():
                    model(ids)
                model(ids[rank:rank + 1]).square().mean().backward()
                model.finish_gradient_synchronization()
            lowered = copy.deepcopy(reference).to(dtype or torch.float32)
            lowered.norm.float()
            lowered(ids).square().mean().backward()
            # Elements of float16 carry 11 bits, of bfloat16 8; sums over 6 positions and 3 layers lose a few of them.
            tolerance = {None: 1e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
            for (name, p), q in zip(divided.named_parameters(), lowered.parameters()):
                wanted = parallel.take_like(p, q.grad.float())
                assert p.dtype == p.grad.dtype == torch.float32 and p.shape == p.grad.shape, name
                assert p.dim() == 1 or len(p) <= math.ceil(sizes[name][0] / size), f"{name} is not divided"
                error = (p.grad - wanted).abs().max().item() / q.grad.abs().max().item() if p.numel() else 0
                assert error < tolerance, f"{name}, {dtype}, checkpointing {checkpointing}: {error}"
            assert furthest(model.full_state_dict(), reference.state_dict()) == 0, "nothing has stepped"
            flats = [flat for unit in model.units for flat in unit.flats.values()]
            assert not any(flat.untyped_storage().nbytes() for flat in flats), "not freed"


def check_vocabulary_parallel(rank, size, tmp):
    for vocabulary in (3, 10, 17):                             # fewer columns than ranks, and uneven parts
        logits = torch.randn(4, 5, vocabulary, generator=torch.Generator().manual_seed(1)).mul_(30).requires_grad_()
        targets = torch.randint(vocabulary, (4, 5), generator=torch.Generator().manual_seed(2))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        cut = parallel.Cut(2, vocabulary)
        mine = cut.take(logits.detach()).clone().requires_grad_()
        loss = parallel.VocabParallelCrossEntropy.apply(mine, targets, cut).mean()
        loss.backward()
        wanted.backward()
        assert torch.allclose(loss, wanted, atol=1e-5) and torch.allclose(mine.grad, cut.take(logits.grad), atol=1e-6)
    column, row = parallel.ColumnParallelLinear(6, 8), parallel.RowParallelLinear(8, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    row(torch.relu(column(x))).sum().backward()
    whole = [parallel.gather_like(layer.weight, layer.weight).requires_grad_() for layer in (column, row)]
    x_whole = x.detach().clone().requires_grad_()
    (torch.relu(x_whole @ whole[0].T) @ whole[1].T).sum().backward()
    assert torch.allclose(x.grad, x_whole.grad, atol=1e-5)
    for layer, weight in zip((column, row), whole):
        assert torch.allclose(layer.weight.grad, parallel.take_like(layer.weight, weight.grad), atol=1e-5)
    with pytest.raises(ValueError, match=f"n_heads=1 cannot be divided among tp={size} ranks"):
        parallel.tensor_parallel(ranks_model(n_heads=1, n_kv_heads=1))


def check_mesh(rank, size, tmp):
    with pytest.raises(ValueError, match=f"dp=3 x tp=2 = 6 ranks, but {size} are running"):
        parallel.make_mesh(3, 2)
    mesh = parallel.make_mesh(size // 2, 2)
    assert (mesh.dp_rank, mesh.tp_rank) == (rank // 2, rank % 2)
    assert torch.distributed.get_process_group_ranks(mesh.tp) == [rank // 2 * 2, rank // 2 * 2 + 1]


CHECKS = {4: (check_mesh, check_five_steps, check_checkpoints_move, check_fsdp, check_sharded_optimizer,
              check_vocabulary_parallel),
          2: (check_five_steps, check_checkpoints_move, check_odd_modules, check_fsdp, check_sharded_optimizer)}


def run_rank(rank, size, tmp):
    """One rank: every check in turn; what each said goes to a file. After a failure the ranks are out of step: end."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=Path(tmp, f"ranks{size}").as_uri(), rank=rank,
                                         world_size=size, timeout=datetime.timedelta(seconds=60))
    for check in CHECKS[size]:
        try:
            check(rank, size, tmp)
            said = "passed"
        except Exception:
            said = traceback.format_exc()
        Path(tmp, f"{check.__name__}.{size}.{rank}").write_text(said, encoding="utf-8")
        if said != "passed":
            os._exit(1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)                  # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("ranks")
    for size in CHECKS:
        started = [torch.multiprocessing.get_context("spawn").Process(target=run_rank, args=(rank, size, str(tmp)))
                   for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            process.kill()
    return tmp


@pytest.mark.parametrize("size, check", [(size, check.__name__) for size, checks in CHECKS.items() for check in checks])
def test_ranks(ranks, size, check):
    for rank in range(size):
        file = ranks / f"{check}.{size}.{rank}"
        assert file.exists(), f"rank {rank} of {size} did not come to an end of {check}"
        said = file.read_text(encoding="utf-8")
        assert said == "passed", f"rank {rank} of {size}: {said}"


@pytest.mark.parametrize("saved", ["zero1", "fsdp", "tp"])
def test_a_checkpoint_of_four_ranks_goes_on_in_one_process(ranks, saved):
    weights, state = torch.load(ranks / f"{saved}.pt", weights_only=True)
    model = ranks_model(seed=9)
    optimizer = adamw(model.parameters())
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    steps(model, optimizer, range(3, 5), clip=optim.clip_grad_norm)
    assert furthest(model.state_dict(), one_process()[0].state_dict()) < CLOSE


def test_a_rank_that_raises_ends_all_with_its_traceback(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import parallel, torch\n"
                      "with parallel.ending():\n"
                      "    parallel.start()\n"
                      "    if parallel.world()[0] == 1: raise ArithmeticError('this one')\n"
                      "    torch.distributed.all_reduce(torch.ones(1))\n", encoding="utf-8")
    done, seconds = torchrun(script)
    assert done.returncode and seconds < 30
    assert "rank 1 failed" in done.stderr and "ArithmeticError: this one" in done.stderr


def test_measurements_hold_what_the_formula_predicts(tmp_path):
    done, _ = torchrun("parallel.py", f"--out_dir={tmp_path}", "--steps=1", "--max_mb=1", "--d_model=64",
                       "--n_layers=2", "--vocab_size=500", "--context_length=16")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "parallel_cpu_2_ranks.json").read_text(encoding="utf-8"))["strategies"]
    assert len(rows) == 9 and (tmp_path / "parallel_cpu_2_ranks.png").stat().st_size > 10_000
    for row in rows:
        assert abs(row["held_mb"] / row["formula_mb"] - 1) < 0.05, row
        assert abs(row["kept_mb"] / row["kept_formula_mb"] - 1) < 0.05, row


def test_one_process_needs_no_group(monkeypatch):
    reference, _, _ = one_process(which=range(2))
    for strategy in ("bucketed", "zero1", "fsdp"):
        model, optimizer, rest = wrapped(strategy, seed=0)
        steps(model, optimizer, range(2), *rest)
        assert furthest(parallel.full_state_dict(model.module), reference.state_dict()) < 1e-6
    monkeypatch.setenv("WORLD_SIZE", "2")                      # torchrun started two, and nobody made the group
    with pytest.raises(RuntimeError, match="call parallel.start"):
        parallel.DDP(ranks_model())
    with pytest.raises(ValueError, match="mode='fast' must be one of naive"):
        parallel.DDP(ranks_model(), mode="fast")
