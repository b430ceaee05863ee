"""What the tests of parallel.py and sharded.py share: a small model, one process as reference, ranks that check."""
import datetime
import os
import re
import traceback
from pathlib import Path

import torch

from common import adamw, ragged, steps
import optim
import parallel
import sharded
from model import ModelConfig, Transformer

SHAPE = dict(vocab_size=51, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=64, qk_norm=True)
# Other orders of summation: 1e-7 of a gradient, of which AdamW (lr 1e-2, eps 1e-3) makes at most 10 times that a step.
CLOSE = 2e-5


def small(seed=0, frozen=None, **more):
    """frozen: a pattern of the names that do not train."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SHAPE | more))
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or not re.search(frozen, name))
    return model


def one_process(which=range(5), **more):
    """(model, gradient norms) after these steps without ranks."""
    model = small(**more)
    return model, steps(model, adamw(list(model.parameters())), which, clip=optim.clip_grad_norm)


class Wrapped:
    """A model of train.py's kind under a strategy, for `train`: Strategy as it is, its group made by the test."""

    def __init__(self, name, seed=0, tp=1, pp=1, **more):
        self.strategy, self.model = sharded.Strategy(name, tp=tp, pp=pp), small(seed, **more)
        self.strategy.divide(self.model)
        self.optimizer = self.strategy.optimizer(optim.AdamW, list(self.model.parameters()), lr=1e-2, eps=1e-3,
                                                 weight_decay=0.1)

    def train(self, which):
        norms = []
        for step in which:
            x, y, _ = ragged(step)
            self.optimizer.zero_grad()
            self.strategy.forward_backward(x, y, 3)
            norms.append(self.strategy.clip_grad_norm(self.model.parameters(), 1.0).item())
            self.optimizer.step()
        return torch.tensor(norms)

    def state(self):
        return sharded.full_state_dict(self.model), sharded.full_optimizer_state(self.optimizer)

    def load(self, weights, state):
        self.model.load_state_dict(sharded.take_state_dict(self.model, weights))
        self.optimizer.load_state_dict(sharded.take_optimizer_state(self.optimizer, state))


def furthest(state, reference):
    """The largest difference between two state dicts."""
    assert list(state) == list(reference), (list(state)[:3], list(reference)[:3])
    return max((state[name] - reference[name]).abs().max().item() for name in reference)


def run_rank(rank, size, checks, tmp):
    """One rank: every check in turn; what each said goes to a file. After a failure the ranks are out of step: end."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=Path(tmp, f"ranks{size}").as_uri(), rank=rank,
                                         world_size=size, timeout=datetime.timedelta(seconds=60))
    for check in checks:
        try:
            check(rank, size, tmp)
            said = "passed"
        except BaseException:
            said = traceback.format_exc()
        Path(tmp, f"{check.__name__}.{size}.{rank}").write_text(said, encoding="utf-8")
        if said != "passed":
            os._exit(1)
    parallel.reduce(torch.ones(1))
    torch.distributed.destroy_process_group()
    os._exit(0)                  # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


def run_checks(checks: dict, tmp):
    """checks: number of ranks -> functions (rank, size, folder), run one after the other by that many processes."""
    for size, functions in checks.items():
        started = [torch.multiprocessing.get_context("spawn").Process(target=run_rank,
                                                                      args=(rank, size, functions, str(tmp)))
                   for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            process.kill()
    return tmp


def selected(request, checks: dict) -> dict:
    """Of these checks those that this run of pytest asks for, as test_ranks[2-check_fsdp]; else all."""
    items = [item for item in request.session.items if "ranks" in item.fixturenames and item.path == request.path]
    if any(item.originalname != "test_ranks" for item in items):
        return checks
    asked = {(item.callspec.params["size"], item.callspec.params["check"]) for item in items}
    return {size: functions for size, group in checks.items()
            if (functions := [check for check in group if (size, check.__name__) in asked])}


def assert_passed(tmp, size, check):
    files = [Path(tmp, f"{check}.{size}.{rank}") for rank in range(size)]
    said = [file.read_text(encoding="utf-8") if file.exists() else "did not come to an end" for file in files]
    # The rank that failed first says why; the others only that it is gone.
    assert said == ["passed"] * size, "\n".join(said)
