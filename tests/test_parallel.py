"""Claims about parallel.py."""
import pytest
import torch

from common import ROOT, adamw, ragged, steps, torchrun
import optim
import parallel
from ranks import CLOSE, assert_passed, furthest, one_process, run_checks, selected, small


def wrap(name, model):
    if name == "naive":
        return parallel.NaiveDDP(model)
    return parallel.DDP(model, bucket_mb={"alone": 0, "flat": float("inf"), "buckets": 0.02}[name])


DATA_PARALLEL = ("naive", "alone", "flat", "buckets")


def check_five_steps(rank, size, tmp):
    """Ranks with unequal numbers of rows, weights of rank 0; tied matrices travel once."""
    more = dict(tie_embeddings=True, n_kv_heads=2, vocab_size=53)
    reference, norms = one_process(**more)
    for name in DATA_PARALLEL:
        model = wrap(name, small(seed=rank, **more))
        optimizer = adamw(list(model.parameters()))
        got = steps(model, optimizer, range(5), rank, size, finish=model.finish_gradient_synchronization)
        worst = furthest(model.module.state_dict(), reference.state_dict())
        assert worst < CLOSE, f"{name}: weights are {worst} from one process's"
        assert torch.allclose(got, norms, rtol=1e-4), f"{name}: norms {got}, one process {norms}"


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
    """Two micro-batches, of which the first sends nothing and leaves nothing but `.grad`; twice without zeroing."""
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    reference = Odd()
    for i in range(size):
        (2 * reference(x[i:i + 1], i % 2 == 0).square().sum() / size).backward()
    sent, send = [], parallel.send
    parallel.send = lambda kind, *args, **more: (sent.append(kind), send(kind, *args, **more))[1]
    for name in DATA_PARALLEL[1:]:
        torch.manual_seed(rank)
        model = wrap(name, Odd())
        assert torch.equal(model.module.frozen.bias, reference.frozen.bias), "frozen parameters come from rank 0"
        for turn in range(2):
            sent.clear()
            with model.no_sync():
                model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            assert not sent and not model.works, f"{name}: sent {sent} under no_sync"
            model(x[rank:rank + 1], rank % 2 == 0).square().sum().backward()
            model.finish_gradient_synchronization()
            for (key, p), q in zip(model.module.named_parameters(), reference.parameters()):
                grad = torch.zeros_like(q) if q.grad is None else q.grad * (turn + 1)
                assert not p.requires_grad or torch.allclose(p.grad, grad, atol=1e-6), f"{name}, {turn}: {key}"
        model(x[rank:rank + 1], True).sum().backward()
        with pytest.raises(RuntimeError, match="a second backward reached a gradient"):
            model(x[rank:rank + 1], True).sum().backward()
        model.finish_gradient_synchronization()
    held = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in model.parameters()
            if p.grad is not None}
    assert sum(held.values()) == sum(p.nbytes for p in model.parameters() if p.requires_grad), "a buffer besides .grad"
    parallel.send = send


def check_sharded_optimizer(rank, size, tmp):
    """Several groups and changing rates; state divided, whole again on rank 0; the step of one undivided optimizer,
    also for parameters that are not contiguous."""
    params = [torch.nn.Parameter(torch.arange(12.0).view(3, 4).t() * i) for i in range(2 * size)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, float(i))
    parallel.ShardedOptimizer(params, optim.SGD, lr=1.0, momentum=0.0).step()
    assert all(torch.equal(p, torch.arange(12.0).view(3, 4).t() * i - i) for i, p in enumerate(params))
    for cls in (torch.optim.AdamW, optim.Muon):
        models, optimizers = (small(), small()), []
        for model, sharding in zip(models, (False, True)):
            named = [(name, p) for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
            groups = [{"params": [p for _, p in named[:5]]}, {"params": [p for _, p in named[5:9]], "lr": 0.1}]
            optimizers.append(parallel.ShardedOptimizer(groups, cls, lr=0.01) if sharding else cls(groups, lr=0.01))
            optimizers[-1].add_param_group({"params": [p for _, p in named[9:]], "weight_decay": 0.5})
        plain, divided = optimizers
        for step in range(4):
            for model, optimizer in zip(models, optimizers):
                x, y, _ = ragged(step)
                model.zero_grad()
                model(x, y)[1].backward()
                optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
                optimizer.step()
        worst = furthest(models[1].state_dict(), models[0].state_dict())
        assert worst < (1e-6 if cls is not optim.Muon else 1e-3), f"{cls}: {worst}"       # Muon's products are bfloat16
        held, whole = (sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
                       for optimizer in (divided, plain))
        largest = max(p.numel() for g in plain.param_groups for p in g["params"])
        assert held <= whole / size + 2 * largest and held < whole, f"{cls}: {held} of {whole} on one of {size} ranks"
        assert divided.state_dict()["state"].keys() == (plain.state_dict()["state"].keys() if rank == 0 else set())


def check_mesh(rank, size, tmp):
    with pytest.raises(ValueError, match=f"dp=3 x pp=1 x tp=2 = 6 ranks, but {size} are running"):
        parallel.make_mesh(3, 2)
    mesh = parallel.make_mesh(size // 2, 2)
    assert (mesh.dp_rank, mesh.pp_rank, mesh.tp_rank) == (rank // 2, 0, rank % 2)
    assert torch.distributed.get_process_group_ranks(mesh.tp) == [rank // 2 * 2, rank // 2 * 2 + 1]
    mesh = parallel.make_mesh(1, 2, size // 2)
    assert torch.distributed.get_process_group_ranks(mesh.pp) == list(range(rank % 2, size, 2))


CHECKS = {4: (check_mesh, check_five_steps, check_sharded_optimizer),
          2: (check_five_steps, check_odd_modules, check_sharded_optimizer)}


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    return run_checks(selected(request, CHECKS), tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("size, check", [(size, check.__name__) for size, checks in CHECKS.items() for check in checks])
def test_ranks(ranks, size, check):
    assert_passed(ranks, size, check)


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


def test_one_process_needs_no_group(monkeypatch):
    reference, _ = one_process(range(2))
    for name in DATA_PARALLEL:
        model = wrap(name, small())
        optimizer = parallel.ShardedOptimizer(list(model.parameters()), optim.AdamW, lr=1e-2, eps=1e-3,
                                              weight_decay=0.1)
        steps(model, optimizer, range(2), finish=model.finish_gradient_synchronization)
        assert furthest(model.module.state_dict(), reference.state_dict()) < 1e-6
    with pytest.raises(ValueError, match="bucket_mb=-1 must be at least 0"):
        parallel.DDP(small(), bucket_mb=-1)
    monkeypatch.setenv("WORLD_SIZE", "2")                      # torchrun started two, and nobody made the group
    with pytest.raises(RuntimeError, match="call parallel.start"):
        parallel.DDP(small())
