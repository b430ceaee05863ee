"""Train on many ranks: data (DDP), optimizer state (ZeRO-1), weights (FSDP) or matrices (tensor parallel) divided.

torch.distributed carries the bytes (gloo on CPUs, NCCL on CUDA), torchrun starts the processes; what is sent, when and
why is written here. A rank is one process with one device; all run the same program and end with the weights that one
process would have got, up to rounding.

    strategy            a rank holds                                  a step sends per rank, N = bytes of weights
    DDP                 everything                                    2 N (W-1)/W     all-reduce of gradients
    ShardedOptimizer    all but W-1 of W parts of optimizer state     3 N (W-1)/W     and a broadcast of weights
    FSDP                1/W of weights, gradients and state           3 N (W-1)/W     gather twice, reduce-scatter once
    tensor parallel     1/W of every matrix, all of the batch         4 all-reduces of (B, T, C) a block

Gradients are averaged; where ranks hold unequal numbers of tokens, scale each loss by its share of them times W.
Left out: pipelines, sequence parallelism, models that fit no single host (weights are made whole, then cut), buffers
that change in training.

Papers: Li 2020 (DDP, 2006.15704), Rajbhandari 2019 (ZeRO, 1910.02054), Zhao 2023 (FSDP, 2304.11277),
Shoeybi 2019 (Megatron-LM, 1909.08053), Thakur 2005 (ring collectives, doi 10.1177/1094342005051521).

    torchrun --standalone --nproc_per_node=2 parallel.py                 107 s on 2 AMD EPYC cores
    torchrun --standalone --nproc_per_node=4 parallel.py --dp=2 --tp=2   the same with a mesh in its last row
    torchrun --standalone --nproc_per_node=2 train.py --parallel=fsdp --optimizer=adamw
"""
import contextlib
import gc
import json
import math
import os
import sys
import time
import traceback
import types
from collections import namedtuple
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from optim import norms

TRACE = None        # a list: every collective and every wait then leaves (kind, start, end) in it, in seconds


# --- process groups ---

def start(device: str | None = None, timeout_s: float = 600.0) -> torch.device:
    """Join the process group that torchrun describes in the environment; returns this rank's device.

    device: "cpu" to leave GPUs alone; else each rank takes the GPU of its number on its host, where there are any.
    Raises RuntimeError, with the command to use, in a process that torchrun did not start.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError("RANK and WORLD_SIZE are not set: this process is no rank. Start it with "
                           f"torchrun --standalone --nproc_per_node=N {' '.join(sys.argv)}")
    on_cuda = torch.cuda.is_available() and device != "cpu"
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    return found


@contextlib.contextmanager
def ending():
    """Around the whole of a rank's work: a failure ends all ranks, with this rank's traceback, and nothing hangs.

    The failed process must go at once, not wait at exit for peers that wait for it: then torchrun ends the others.
    KeyboardInterrupt and SystemExit pass.
    """
    try:
        yield
    except Exception:
        print(f"rank {os.environ.get('RANK', '?')} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)       # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


def world(group=None) -> tuple[int, int]:
    """(rank, number of ranks) in `group`. A process that nobody asked to be one of several is rank 0 of 1.

    Raises RuntimeError when torchrun started several and no process group was made: each would train alone, unnoticed.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RuntimeError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no process group; "
                           "call parallel.start() first")
    return 0, 1


Mesh = namedtuple("Mesh", "dp tp dp_rank tp_rank")     # this rank's groups in a dp x tp table, and its place in it


def make_mesh(dp: int, tp: int) -> Mesh:
    """A dp x tp table over all ranks. Every rank must call it.

    Rank = dp_rank · tp + tp_rank: neighbours sit in one host, on its fastest links, and so share a tensor-parallel
    group, which sends most (four activations a block) and has nothing to hide it behind.
    Raises ValueError when dp · tp is not the number of ranks.
    """
    rank, size = world()
    if dp < 1 or tp < 1 or dp * tp != size:
        raise ValueError(f"dp={dp} x tp={tp} = {dp * tp} ranks, but {size} are running; start torchrun with "
                         f"--nproc_per_node={max(dp * tp, 1)} or choose dp x tp = {size}")
    if size == 1:
        return Mesh(None, None, 0, 0)
    # Every rank has to take part in making every group, also those it is not in, and in the same order.
    rows = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
    columns = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
    return Mesh(columns[rank % tp], rows[rank // tp], rank // tp, rank % tp)


# --- collectives ---

def send(kind: str, call, *args, group=None, **more):
    """Start a collective and return its work, for `wait`. Among one rank: None, there is nothing to do."""
    if world(group)[1] == 1:
        return None
    began, trace = time.perf_counter(), TRACE
    work = call(*args, group=group, async_op=True, **more)
    if trace is not None:
        work.get_future().then(lambda _: trace.append((kind, began, time.perf_counter())))
    return work


def wait(work) -> None:
    began = time.perf_counter()
    if work is not None:
        work.wait()
    if TRACE is not None:
        TRACE.append(("wait", began, time.perf_counter()))


def reduce(x: torch.Tensor, group=None, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """x, contiguous, overwritten with its sum (or so) over the ranks."""
    wait(send("all-reduce", dist.all_reduce, x, group=group, op=op))
    return x


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, seen as uint8. What only moves data so moves every dtype, whatever the backend knows of it."""
    return x.reshape(-1).view(torch.uint8)


def all_gather(out: torch.Tensor, x: torch.Tensor, group=None):
    """Put every rank's x, all of one size, one after the other into `out`; returns the work."""
    if world(group)[1] == 1:
        out.copy_(x.reshape(out.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor       # renamed in torch 2.13
    return send("all-gather", gather, as_bytes(out), as_bytes(x), group=group)


def exchange(out: torch.Tensor, x: torch.Tensor, group=None):
    """Give rank r the r-th of W equal parts of x and put what it gives into the r-th part of `out`; returns the work.

    With a sum over the W parts this is a reduce-scatter: a ring's bytes, N (W-1)/W, but the sum is ours, in float32
    when float16 travels and always in the same order. (gloo's own is a whole all-reduce: twice the bytes.)
    """
    if world(group)[1] == 1:
        out.copy_(x.reshape(out.shape))
    return send("reduce-scatter", dist.all_to_all_single, as_bytes(out), as_bytes(x), group=group)


def broadcast(tensors, group=None) -> None:
    """Overwrite every rank's tensors with those of the group's rank 0."""
    tensors = [t.detach() for t in tensors if t.numel()]
    whole = [t.contiguous() for t in tensors]
    works = [send("broadcast", dist.broadcast, as_bytes(t), group=group, group_src=0) for t in whole]
    for t, sent, work in zip(tensors, whole, works):
        wait(work)
        if t is not sent:
            t.copy_(sent)


# --- cut tensors ---

class Cut:
    """One division of a tensor of `length` along `dim` among the ranks of a group: ceil(length / W) each.

    The last ranks may get less, or nothing. A divided parameter keeps its cuts in `.cuts`, in order: state dicts,
    optimizer states and the gradient's norm follow from them.
    """

    def __init__(self, dim: int, length: int, group=None):
        self.dim, self.length, self.group = dim, length, group
        rank, self.size = world(group)
        self.step = math.ceil(length / self.size)
        self.start, self.stop = min(rank * self.step, length), min((rank + 1) * self.step, length)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part, a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank; collective."""
        part = pad(part.detach().movedim(self.dim, 0), self.step).contiguous()
        out = part.new_empty(self.size * self.step, *part.shape[1:])
        wait(all_gather(out, part, self.group))
        return out[:self.length].movedim(0, self.dim).contiguous()


def pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with zeros below, up to `rows` rows; itself when it has them."""
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def cuts_of(p) -> list:
    return getattr(p, "cuts", [])


def full_shape(p) -> list[int]:
    """Shape of the undivided parameter."""
    whole = {cut.dim: cut.length for cut in reversed(cuts_of(p))}   # of several in a dimension, the first's
    return [whole.get(dim, size) for dim, size in enumerate(p.shape)]


def gather_like(p, part: torch.Tensor) -> torch.Tensor:
    """`part`, divided as p is, made whole on every rank; collective."""
    for cut in reversed(cuts_of(p)):
        part = cut.gather(part)
    return part


def take_like(p, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, cut as p is; `whole` itself when it has not the undivided p's shape."""
    if list(whole.shape) == full_shape(p):
        for cut in cuts_of(p):
            whole = cut.take(whole)
    return whole


def full_state_dict(module: nn.Module) -> dict:
    """The state dict that the undivided module would have, on every rank; collective: call it on all, or it hangs."""
    own = dict(module.named_parameters(remove_duplicate=False))
    whole = {p: gather_like(p, p.detach()) for p in module.parameters()}       # a tied matrix travels once, stays tied
    state = module.state_dict()
    return {name: whole[own[name]] if name in own else value.detach() for name, value in state.items()}


def take_state_dict(module: nn.Module, whole: dict) -> dict:
    """This rank's part of an undivided state dict, for module.load_state_dict; what does not fit stays as it is."""
    own = dict(module.named_parameters(remove_duplicate=False))
    return {name: take_like(own[name], tensor) if name in own else tensor for name, tensor in whole.items()}


def _map_state(optimizer, state: dict, change) -> dict:
    """`state` with every tensor that belongs to a cut parameter's elements replaced by change(parameter, tensor)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    entries = dict(state["state"])
    for i, p in zip(ids, params):
        if cuts_of(p) and i in entries:
            entries[i] = {key: change(p, value) if torch.is_tensor(value) and value.dim() == p.dim() else value
                          for key, value in entries[i].items()}
    return state | {"state": entries}


def full_optimizer_state(optimizer) -> dict:
    """The state dict that `optimizer` would have over the undivided module, on every rank; collective."""
    return _map_state(optimizer, optimizer.state_dict(), lambda p, value: gather_like(p, value.to(p.device)))


def take_optimizer_state(optimizer, state: dict) -> dict:
    """This rank's part of the state of an undivided optimizer, whoever saved it, for optimizer.load_state_dict."""
    return _map_state(optimizer, state, take_like)


@torch.no_grad()
def clip_grad_norm(params, max_norm: float, eps: float = 1e-6) -> torch.Tensor:
    """optim.clip_grad_norm where parameters may be divided: the norm is that of the whole gradient, on every rank.

    Squares are summed over the ranks that share a parameter; a replicated one counts once. Collective. Returns the norm
    before clipping, a float32 scalar tensor; where it is not finite the gradients stay as they are.
    """
    grads = {}
    for p in params:       # ranks must agree on the collectives: one whose part has no gradient takes part with 0
        same = grads.setdefault(tuple(cut.group for cut in cuts_of(p)), [torch.zeros(1, device=p.device)])
        same += [p.grad] if p.grad is not None else []
    squares = [torch.zeros(())]
    for groups, same in grads.items():
        squares.append(torch.stack(norms(same)).square().sum())
        for group in groups:
            reduce(squares[-1], group)
    norm = torch.stack([square.to(squares[-1].device) for square in squares]).sum().sqrt()
    factor = torch.where(norm.isfinite(), torch.clamp(max_norm / (norm + eps), max=1.0), 1.0)
    for same in grads.values():
        torch._foreach_mul_(same, factor)
    return norm


# --- data parallel ---

class Bucket:
    """Gradients that travel as one message: laid end to end in a flat buffer, then a count per gradient.

    After the sum the counts tell whether any rank had a gradient: if none, `.grad` stays None, as with one process.
    """

    def __init__(self, params):
        self.params, self.ready, self.work = params, set(), None
        # float16 and bfloat16 gradients travel in float32: a sum over many ranks would lose their few digits.
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        # `.grad` will be views of the buffer, so it is all the memory that gradients take.
        sizes = [p.numel() for p in params] + [len(params)]
        self.buffer = torch.empty(sum(sizes), dtype=self.dtype, device=params[0].device)
        *views, self.counts = self.buffer.split(sizes)
        self.views = {p: view.view(p.shape) for p, view in zip(params, views)}

    def complete(self) -> bool:
        """Every gradient is here."""
        return len(self.ready) == len(self.params)

    def take(self, p, scale: float) -> None:
        """Move p's gradient, times scale, into the buffer: its own memory is free again at once."""
        if p.grad.dtype == self.dtype:
            torch.mul(p.grad, scale, out=self.views[p])
        else:
            self.views[p].copy_(p.grad).mul_(scale)
        p.grad = None
        self.ready.add(p)


class GradientAverage:
    """The mean over ranks of the gradients of `params`, by one all-reduce per bucket of up to bucket_bytes.

    overlap: send a bucket as soon as backward has filled it, and not only in `finish`. Buckets are filled and sent from
    the last parameter to the first, as backward comes by them, on every rank: collectives are matched by order alone,
    and ranks whose backward runs differently (an unused layer) must not pair different buckets.
    """

    def __init__(self, params, group, bucket_bytes: float, overlap: bool, one_by_one: bool = False):
        self.group, self.size, self.one_by_one = group, world(group)[1], one_by_one
        self.sync, self.sent = True, 0
        parts, filled, kind = [], 0, None
        for p in reversed(params):
            if filled + p.nbytes > bucket_bytes or (p.dtype, p.device) != kind:
                parts.append([])
                filled, kind = 0, (p.dtype, p.device)
            parts[-1].append(p)
            filled += p.nbytes
        self.buckets = [Bucket(part) for part in parts] if self.size > 1 else []
        if overlap:
            for bucket in self.buckets:
                for p in bucket.params:
                    p.register_post_accumulate_grad_hook(lambda p, bucket=bucket: self._arrived(p, bucket))

    def _arrived(self, p, bucket) -> None:
        if not self.sync:
            return
        if p in bucket.ready:       # a second backward without `finish` between: end the first round, add to its result
            self.finish()
        bucket.take(p, 1 / self.size)
        while self.sent < len(self.buckets) and self.buckets[self.sent].complete():
            self._send()

    def _send(self) -> None:
        bucket, self.sent = self.buckets[self.sent], self.sent + 1
        bucket.counts.fill_(1)
        for i, p in enumerate(bucket.params):
            if p not in bucket.ready and p.grad is not None:
                bucket.take(p, 1 / self.size)
            elif p not in bucket.ready:
                bucket.views[p].zero_()
                bucket.counts[i] = 0
        bucket.work = send("all-reduce", dist.all_reduce, bucket.buffer, group=self.group)
        if self.one_by_one:
            wait(bucket.work)

    def finish(self) -> None:
        """Send what has not gone yet, wait for all, and hand the means to `.grad`."""
        while self.sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            wait(bucket.work)
            # Reading the counts waits for the GPU, so only a rank that lacks a gradient does it.
            counts = [1] * len(bucket.params) if bucket.complete() else bucket.counts.tolist()
            for p, count in zip(bucket.params, counts):
                if count:
                    mean = bucket.views[p].to(p.dtype)
                    p.grad = mean if p.grad is None else mean.add_(p.grad)
            bucket.ready, bucket.work = set(), None
        self.sent = 0


class DDP(nn.Module):
    """Data parallel: every rank has the whole module and other data; gradients are averaged after each backward.

        model = DDP(module); …backward(); model.finish_gradient_synchronization(); optimizer.step()

    mode, from the plain to the fast; the result is the same:
        naive        after backward, an all-reduce per parameter, one after the other
        flat         after backward, one all-reduce of them all: saves the latency of many small messages
        overlapped   an all-reduce per parameter as soon as backward has its gradient: hides it behind the rest
        bucketed     one as soon as `bucket_mb` megabytes of gradients are there: both (2006.15704, section 3.2.3)
    Rank 0's parameters and buffers, frozen ones too, go to all ranks here. Tied weights are one parameter and travel
    once. One that no backward reached on some ranks counts as 0 there. For accumulation, all but the last backward run
    under `no_sync()`. Raises ValueError for another mode or bucket_mb.
    """

    MODES = ("naive", "flat", "overlapped", "bucketed")

    def __init__(self, module: nn.Module, mode: str = "bucketed", bucket_mb: float = 8.0, group=None):
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(self.MODES)}")
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb={bucket_mb} must be more than 0")
        self.module = module
        broadcast([*module.parameters(), *module.buffers()], group)
        size = {"flat": math.inf, "bucketed": bucket_mb * 1e6}.get(mode, 0)
        trained = [p for p in module.parameters() if p.requires_grad]
        self.average = GradientAverage(trained, group, size, mode in ("overlapped", "bucketed"), mode == "naive")

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's gradients; the next one outside sends the sum."""
        self.average.sync = False
        try:
            yield
        finally:
            self.average.sync = True

    def finish_gradient_synchronization(self) -> None:
        """Call on all ranks after backward and before the step: `.grad` is then the mean over the ranks."""
        self.average.finish()


# --- optimizer state divided: ZeRO-1 ---

class ShardedOptimizer(torch.optim.Optimizer):
    """`optimizer_cls` with its state divided: each rank steps the parameters it owns, then sends them to the others.

        optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)

    Whole parameters go to ranks, largest first, each to the rank that has least: so Muon works, which needs whole
    matrices, and its products are divided too. `param_groups` is complete: what is set there (a learning rate) holds on
    every rank. Gradients must be averaged already (DDP). Source: 1910.02054, section 5.1 (there in equal flat slices).
    """

    def __init__(self, params, optimizer_cls, group=None, **kwargs):
        self.group, self.local, self.owner = group, None, {}
        self.rank, size = world(group)
        self.load = [0] * size                                 # elements owned by each rank
        self.make = lambda groups: optimizer_cls(groups, **kwargs)
        super().__init__(params, {})

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; also owners are found for the new parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # The class sees all parameters first: its defaults and its complaints are then the same on every rank.
        if self.local is None:
            self.local = self.make([dict(group)])
            self.state = self.local.state
            self.defaults.update(self.local.defaults)          # schedulers look there
        else:
            self.local.add_param_group(dict(group))
        mine = self.local.param_groups[-1]
        group.update(settings(mine))
        for p in sorted(group["params"], key=lambda p: -p.numel()):        # stable, so the same on every rank
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()
            if self.owner[p] != self.rank:
                self.local.state.pop(p, None)                  # Adagrad makes its state at once, for all
        mine["params"] = [p for p in group["params"] if self.owner[p] == self.rank]

    @torch.no_grad()
    def step(self, closure=None):
        """Step the own part, then bring everybody's parameters up to date. Collective. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, mine in zip(self.param_groups, self.local.param_groups):
            mine.update(settings(group))
        self.local.step()
        works = [send("broadcast", dist.broadcast, as_bytes(p), group=self.group, group_src=owner)
                 for p, owner in self.owner.items() if p.requires_grad and p.numel()]
        for work in works:
            wait(work)
        return loss

    def state_dict(self) -> dict:
        """That of one undivided optimizer, on every rank, on the CPU; collective: call it on all, or it hangs."""
        index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        mine = {index[p]: {key: value.cpu() if torch.is_tensor(value) else value for key, value in entry.items()}
                for p, entry in self.local.state.items()}
        parts = [mine] * len(self.load)
        if len(parts) > 1:
            dist.all_gather_object(parts, mine, group=self.group)
        groups = [settings(group) | {"params": [index[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": dict(sorted(item for part in parts for item in part.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the own part of an undivided state dict, saved by any number of ranks or by a plain optimizer."""
        saved = [dict(group) for group in state_dict["param_groups"]]
        sizes = [[len(group["params"]) for group in groups] for groups in (saved, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the saved groups hold {sizes[0]} parameters, this optimizer's {sizes[1]}; "
                             "make it with the settings that it was saved with")
        for group, ours in zip(saved, self.param_groups):
            group["params"] = [i for i, p in zip(group["params"], ours["params"]) if self.owner[p] == self.rank]
            ours.update(settings(group))
        kept = {i for group in saved for i in group["params"]}
        state = {i: entry for i, entry in state_dict["state"].items() if i in kept}
        self.local.load_state_dict({"state": state, "param_groups": saved})
        self.state = self.local.state


def settings(group: dict) -> dict:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


# --- weights divided: ZeRO-3, FSDP ---

class Unit:
    """Matrices that are gathered, used and given up together: a block's, or those of one module outside the blocks.

    The parameters themselves are this rank's rows. While a module runs, it has `fulls` in their place, whose storage is
    cut to 0 bytes after use and filled again for backward: what autograd kept of them points to it.
    """

    def __init__(self, group, dtype):
        self.group, self.dtype = group, dtype
        self.slots, self.casts = [], []             # places in modules: (module, name, parameter)
        self.fulls, self.flats = {}, {}             # by parameter: what the module sees; its memory, in W equal parts
        self.works, self.whole = None, False        # being gathered; gathered
        self.calls, self.in_backward, self.sent = 0, False, False       # calls: forwards whose backward is to come
        self.lookup = True                          # of tables alone: their backward does not read them

    def add(self, module) -> None:
        """Cut all matrices of `module`."""
        for owner in module.modules():
            own = {name: p for name, p in owner._parameters.items() if p is not None}
            if not any(p.dim() > 1 for p in own.values()):
                continue
            self.lookup &= type(owner).__name__ == "Embedding"                     # torch's and model.py's
            for name, p in own.items():
                if p.dim() > 1:
                    self.slots.append((owner, name, p))
                    if p not in self.fulls:
                        self._cut(p)
                elif self.dtype is not None:        # a bias beside a matrix computes in its dtype
                    self.casts.append((owner, name, p))
            if self.dtype is not None:
                owner.register_forward_pre_hook(lambda module, args, named: torch.utils._pytree.tree_map(
                    lambda x: x.to(self.dtype) if torch.is_tensor(x) and x.is_floating_point() else x, (args, named)),
                    with_kwargs=True)

    def _cut(self, p) -> None:
        cut = Cut(0, p.shape[0], self.group)
        flat = torch.empty(cut.size * cut.step * p[0].numel(), dtype=self.dtype or p.dtype, device=p.device)
        # .data: filling the memory again must not look to autograd like a change of what it has saved.
        self.fulls[p] = nn.Parameter(flat[:p.numel()].view(p.shape).data, requires_grad=p.requires_grad)
        self.flats[p] = flat
        flat.untyped_storage().resize_(0)
        p.data = cut.take(p.data).clone()           # the same Parameter object, so that an older optimizer keeps it
        p.cuts = [*cuts_of(p), cut]

    def fetch(self) -> None:
        """Start to gather; `ready` waits for it."""
        if self.whole or self.works is not None:
            return
        self.works = []
        for p, flat in self.flats.items():
            flat.untyped_storage().resize_(flat.numel() * flat.element_size())
            mine = pad(p.detach().to(flat.dtype), p.cuts[-1].step)
            self.works.append((all_gather(flat, mine, self.group), mine))      # `mine` must live until it is sent

    def ready(self) -> None:
        """Gathered, now."""
        self.fetch()
        for work, _ in self.works or []:
            wait(work)
        self.works, self.whole = None, True

    def free(self) -> None:
        """Give the memory back."""
        if self.works is not None:                  # fetched and then not needed: it is still being written
            self.ready()
        for flat in self.flats.values():
            flat.untyped_storage().resize_(0)
        self.whole = False

    def swap(self, inside: bool) -> None:
        """Let the modules see the whole matrices, or the parts again."""
        for owner, name, p in self.slots:
            owner._parameters[name] = self.fulls[p] if inside else p
        for owner, name, p in self.casts:
            owner._parameters[name] = p.to(self.dtype) if inside else p


class FSDP(nn.Module):
    """Fully sharded data parallel: each rank keeps 1/W of every matrix, of its gradient and of its optimizer state.

        model = FSDP(module); optimizer = AdamW(model.parameters())
        …backward(); model.finish_gradient_synchronization(); optimizer.step()

    All parameters of two and more dimensions are cut by rows, ceil(rows / W) a rank, the last ranks less or none;
    vectors (norms, biases) stay whole on every rank. `parameters()` are the parts, `.grad` has a part's shape, dtype.
    compute_dtype: what travels and what the matrices compute in (float16, bfloat16); the parts stay as they are, and
    gradients are summed in float32.

    A unit (an entry of a ModuleList, or a module outside them) is gathered while the unit before it computes, given up
    after its forward, and gathered again, one ahead too, for backward; its gradients travel during the next unit's
    backward. The last unit is kept: its backward comes at once. Each backward sends, so micro-batches add up. Works
    under activation checkpointing of whole units. All ranks must run the same modules in the same order; rank 0's
    parameters go to all here. A matrix is whole only inside the forward of the module that owns it: a parent that reads
    `child.weight` by itself would read this rank's rows. Source: 1910.02054, section 5.3; 2304.11277.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None, group=None):
        super().__init__()
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(f"compute_dtype={compute_dtype} must be a floating point dtype, or None")
        self.module, self.group, self.size = module, group, world(group)[1]
        broadcast([*module.parameters(), *module.buffers()], group)
        self.units, found = [], {}
        module.register_forward_pre_hook(lambda module, args: self._restart())
        for piece in self._pieces(module):
            matrices = [p for p in piece.parameters() if p.dim() > 1]
            # A matrix in two places (tied head) makes them one unit: its gradient is complete only after both.
            unit = next((found[p] for p in matrices if p in found), None)
            if unit is None:
                unit = Unit(group, compute_dtype)
                self.units.append(unit)
            unit.add(piece)
            found.update((p, unit) for p in matrices)
            piece.register_forward_pre_hook(lambda _, args, unit=unit: self._before_forward(unit))
            piece.register_forward_hook(lambda _, args, output, unit=unit: self._after_forward(unit, output))
        self.order, self.ran = [], []               # units in the order of the last forward; of this one
        self.sending, self.had_gradient = [], {}
        module.register_forward_hook(lambda module, args, output: self._end_forward())
        vectors = [p for p in module.parameters() if p.requires_grad and p not in found]
        self.average = GradientAverage(vectors, group, math.inf, overlap=False)

    @classmethod
    def _pieces(cls, module, listed: bool = False):
        if any(p.dim() > 1 for p in module.parameters(recurse=listed)):
            yield module
        else:
            for child in module.children():
                yield from cls._pieces(child, isinstance(module, nn.ModuleList))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _restart(self) -> None:
        for unit in self.units:
            if unit.in_backward:
                self._flush(unit)
            unit.free()
        self.ran = []

    def _end_forward(self) -> None:
        self.order = list(self.ran)

    def _before_forward(self, unit) -> None:
        unit.fetch()
        if not unit.in_backward:                    # while checkpointing runs it again, backward has fetched ahead
            self.ran.append(unit)
            n = len(self.ran)
            if n < len(self.order) and self.order[:n] == self.ran:
                self.order[n].fetch()
        unit.ready()
        unit.swap(inside=True)

    def _after_forward(self, unit, output) -> None:
        unit.swap(inside=False)
        if unit.in_backward:
            return
        keep = False
        outputs = [x for x in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(x) and x.requires_grad]
        if outputs and torch.is_grad_enabled():
            unit.calls += 1
            torch.autograd.graph.register_multi_grad_hook(outputs, lambda _: self._before_backward(unit), mode="any")
            keep = self.ran == self.order
        if not keep:
            unit.free()

    def _before_backward(self, unit) -> None:
        unit.calls -= 1
        # Now, and not when its last gradient arrives, a unit is known to be done: this moment is the same on all ranks.
        for other in self.units:
            if other.in_backward and other is not unit and other.calls <= 0:
                self._flush(other)
        unit.in_backward = True
        while self.ran and self.ran.pop() is not unit:         # backward comes by them from the last to the first
            pass
        needed = [other for other in (unit, *self.ran[-1:]) if not other.lookup]
        for other in needed:                                   # the next one is on its way while this one computes
            other.fetch()
        if unit in needed:
            unit.ready()

    def _flush(self, unit) -> None:
        """Send a unit's gradients to the ranks that own them, and give up its memory."""
        before = len(self.sending)
        for p, full in unit.fulls.items():
            if not p.requires_grad:
                continue
            self.had_gradient[p] = self.had_gradient.get(p, False) or full.grad is not None
            # A unit's whole memory may be gone by now, its shape is not.
            grad = torch.zeros(full.shape, dtype=full.dtype, device=full.device) if full.grad is None else full.grad
            full.grad = None
            mine = pad(grad, p.cuts[-1].step * self.size).contiguous()
            parts = torch.empty_like(mine).view(self.size, -1)
            self.sending.append((p, exchange(parts, mine, self.group), parts, mine))
        unit.swap(inside=False)
        unit.free()
        unit.in_backward, unit.calls, unit.sent = False, 0, True
        # Those of the unit before have had this unit's backward to travel in. More in flight would hold more memory.
        for _ in range(before):
            self._receive(*self.sending.pop(0))

    def _receive(self, p, work, parts, mine) -> None:
        wait(work)
        mean = parts[0].to(p.dtype, copy=True)
        for part in parts[1:]:
            mean.add_(part)
        mean = mean.div_(self.size)[:p.numel()].view(p.shape)
        p.grad = mean if p.grad is None else p.grad.add_(mean)

    def finish_gradient_synchronization(self) -> None:
        """Call on all ranks after backward and before the step: `.grad` is then this rank's part of the mean."""
        for unit in self.units:
            if unit.in_backward or not unit.sent:
                self._flush(unit)
            unit.sent = False
        while self.sending:
            self._receive(*self.sending.pop(0))
        self.average.finish()
        flags = [float(flag) for flag in self.had_gradient.values()]
        flags = reduce(torch.tensor(flags, device=next(self.parameters()).device), self.group).tolist()
        for p, flag in zip(self.had_gradient, flags):
            if not flag:
                p.grad = None                       # no rank had one: as with one process, the optimizer skips it
        self.had_gradient = {}

    def full_state_dict(self) -> dict:
        """The undivided module's state dict, plain names, on every rank; collective: call it on all, or it hangs."""
        return full_state_dict(self.module)

    def load_full_state_dict(self, state: dict) -> None:
        """Take this rank's part of an undivided state dict."""
        self.module.load_state_dict(take_state_dict(self.module, state))


# --- single matrices divided: tensor parallel ---

class CopyToRanks(torch.autograd.Function):
    """Megatron's f: x forward; backward the sum over ranks, as every rank's part of the matrix used the same x."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class SumOverRanks(torch.autograd.Function):
    """Megatron's g: forward the sum over ranks; backward the gradient as it is."""

    @staticmethod
    def forward(ctx, x, group):
        return reduce(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class GatherColumns(torch.autograd.Function):
    """Every rank's last dimension side by side; backward this rank's part: all ranks compute the same loss from it."""

    @staticmethod
    def forward(ctx, x, cut):
        ctx.cut = cut
        return cut.gather(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.cut.take(grad), None


class Divided(nn.Module):
    """A layer with this rank's part of a weight. whole: the layer to divide, else a weight is drawn on rank 0."""

    def __init__(self, dim: int, shape, group, whole=None):
        super().__init__()
        if whole is None:
            weight = nn.Parameter(torch.randn(shape) * math.sqrt(2 / sum(shape)))
            whole = types.SimpleNamespace(weight=weight, bias=None)
            broadcast([weight], group)
        self.group, self.cut = group, Cut(dim, shape[dim], group)
        self.weight, self.bias = whole.weight, getattr(whole, "bias", None)
        for p in (self.weight, self.bias if dim == 0 else None):       # each output has its bias, each input none
            if p is not None and not any(cut.group is group for cut in cuts_of(p)):        # a tied matrix is cut once
                p.data = self.cut.take(p.data).clone()
                p.cuts = [*cuts_of(p), self.cut]

    def plus_bias(self, y):
        return y if self.bias is None else y + self.bias


class ColumnParallelLinear(Divided):
    """x @ weightᵀ, rank r computing the r-th part of the outputs. weight: (d_out / W, d_in).

    forward: x (..., d_in), the same on all ranks -> (..., d_out / W), or (..., d_out) with gather_output.
    copy_input=False: x has been through CopyToRanks already (one for q, k and v together).
    """

    def __init__(self, d_in: int, d_out: int, group=None, *, gather_output=False, copy_input=True, whole=None):
        super().__init__(0, (d_out, d_in), group, whole)
        self.gather_output, self.copy_input = gather_output, copy_input

    def forward(self, x):
        y = self.plus_bias((CopyToRanks.apply(x, self.group) if self.copy_input else x) @ self.weight.T)
        return GatherColumns.apply(y, Cut(-1, self.cut.length, self.group)) if self.gather_output else y


class RowParallelLinear(Divided):
    """x @ weightᵀ, rank r having the r-th part of the inputs. weight: (d_out, d_in / W).

    forward: x (..., d_in / W), a ColumnParallelLinear's output -> (..., d_out), the same on all ranks.
    """

    def __init__(self, d_in: int, d_out: int, group=None, *, whole=None):
        super().__init__(1, (d_out, d_in), group, whole)

    def forward(self, x):
        return self.plus_bias(SumOverRanks.apply(x @ self.weight.T, self.group))


class VocabParallelEmbedding(Divided):
    """A row of a table for every id, rank r having the r-th part of the rows. (...) -> (..., C), alike on all ranks."""

    def __init__(self, vocab_size: int, d_model: int, group=None, *, whole=None):
        super().__init__(0, (vocab_size, d_model), group, whole)

    def forward(self, tokens):
        here = (tokens >= self.cut.start) & (tokens < self.cut.stop)
        rows = pad(self.weight, max(len(self.weight), 1))[torch.where(here, tokens - self.cut.start, 0)]
        return SumOverRanks.apply(rows * here.unsqueeze(-1), self.group)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] per position, of logits divided in the last dimension: (..., V / W), (...) -> (...).

    Three numbers a position travel (maximum, sum of exponentials, target's logit), not V logits. Gradient: this rank's
    part of softmax - onehot.
    """

    @staticmethod
    def forward(ctx, logits, targets, cut):
        # One column more, of the lowest number there is: a rank may have none at all, or not the target's.
        x = nn.functional.pad(logits.float(), (0, 1), value=torch.finfo(torch.float32).min)
        here = (targets >= cut.start) & (targets < cut.stop)
        local = torch.where(here, targets - cut.start, x.shape[-1] - 1).unsqueeze(-1)
        maximum = reduce(x.amax(dim=-1), cut.group, dist.ReduceOp.MAX)
        x = x - maximum.unsqueeze(-1)
        at_target = torch.where(here, x.gather(-1, local).squeeze(-1), 0.0)
        exponentials = x.exp_()
        total, at_target = reduce(torch.stack([exponentials.sum(dim=-1), at_target]), cut.group)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), local)
        ctx.dtype = logits.dtype
        return total.log() - at_target

    @staticmethod
    def backward(ctx, grad):
        softmax, local = ctx.saved_tensors
        difference = softmax.scatter_add(-1, local, torch.full_like(local, -1.0, dtype=softmax.dtype))[..., :-1]
        return (difference * grad.unsqueeze(-1)).to(ctx.dtype), None, None


# Which layer of model.py's Transformer is divided how. What is not named (norms, a router) stays whole on every rank.
PLAN = {"token_embeddings": "vocabulary", "q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row",
        "w1": "column", "w3": "column", "w2": "row", "lm_head": "head"}


def tensor_parallel(model: nn.Module, group=None, plan: dict = PLAN) -> nn.Module:
    """Divide the matrices of `model` (a Transformer) in place over the ranks of `group`, by the plan; returns it.

    Attention heads are divided (query, key and value columns of a head lie together), feed-forward columns, and the
    vocabulary. Rank 0's weights count. `model(tokens, targets)` works as before, on the same tokens on all ranks;
    `vocab_parallel_loss` spares the gathering of logits. Names of parameters stay. No cache: sample elsewhere.
    Raises ValueError when heads or feed-forward widths do not divide by the number of ranks, or attention is latent.
    """
    size, c = world(group)[1], model.config
    for name in ("n_heads", "n_kv_heads", "d_ff", "d_ff_expert"):
        if (getattr(c, name, None) or 0) % size:
            raise ValueError(f"{name}={getattr(c, name)} cannot be divided among tp={size} ranks; "
                             "choose a tp that divides it")
    if c.attention != "standard":
        raise ValueError(f"attention={c.attention!r} shares one latent among all heads; tp={size} needs standard")
    broadcast([*model.parameters(), *model.buffers()], group)
    heads = {"n_heads": c.n_heads // size, "n_kv_heads": c.n_kv_heads // size}

    def copy(module, args):
        return CopyToRanks.apply(args[0], group), *args[1:]

    for parent in list(model.modules()):
        styles = {name: plan[name] for name, child in parent.named_children() if name in plan}
        for name, style in styles.items():
            layer = getattr(parent, name)
            d_out, d_in = full_shape(layer.weight)
            setattr(parent, name, VocabParallelEmbedding(d_out, d_in, group, whole=layer) if style == "vocabulary"
                    else RowParallelLinear(d_in, d_out, group, whole=layer) if style == "row"
                    else ColumnParallelLinear(d_in, d_out, group, whole=layer, gather_output=style == "head",
                                              copy_input=style == "head"))
        if "column" in styles.values():
            parent.register_forward_pre_hook(copy)         # one f for all the columns that read the same x
        if "q_proj" in styles:
            parent.config = types.SimpleNamespace(**vars(c) | heads)
            for norm in (parent.q_norm, parent.k_norm) if c.qk_norm else ():
                # Its weight serves all heads, of which a rank sees only its own.
                norm.weight.register_hook(lambda grad: reduce(grad.clone(), group))
    return model


def vocab_parallel_loss(model, tokens, targets) -> torch.Tensor:
    """Mean cross entropy of a divided Transformer: model(tokens, targets)[1] without gathering the logits.

    Raises ValueError for a model whose training loss has other parts, which only model(tokens, targets) knows.
    """
    c, head = model.config, model.lm_head
    if c.mtp_depth or c.n_experts and c.balance == "loss":
        raise ValueError(f"mtp_depth={c.mtp_depth}, n_experts={c.n_experts}, balance={c.balance}: this model's loss is "
                         "more than a cross entropy; use model(tokens, targets)[1]")
    head.gather_output = False
    try:
        logits = model(tokens)
    finally:
        head.gather_output = True
    return VocabParallelCrossEntropy.apply(logits, targets, head.cut).mean()


# --- by name ---

class Strategy:
    """What train.py needs of all this: a strategy by name, which in a single process is the plain thing.

    name: ddp | zero1 | fsdp. tp: ranks that share a model; the others divide the data. Joins torchrun's process group.
    Raises ValueError when tp does not divide the number of ranks.
    """

    def __init__(self, name: str, tp: int = 1, device: str | None = None):
        self.device = device
        if "RANK" in os.environ and not dist.is_initialized():
            self.device = str(start(device))
        self.rank, self.size = world()
        self.name, self.dp, self.wrapper = name, self.size // max(tp, 1), None
        self.mesh = make_mesh(self.dp, tp)

    def divide(self, model: nn.Module, dtype=None) -> None:
        """Make `model`, in place, this rank's part. dtype: what FSDP computes in."""
        fsdp = self.name == "fsdp"
        if model.config.fused_loss and (fsdp or self.size > self.dp):
            raise ValueError("fused_loss=true reads the head's whole matrix, which fsdp and tp divide; use ddp or "
                             "zero1, or fused_loss=false")
        if self.size > self.dp:
            tensor_parallel(model, self.mesh.tp)
        self.wrapper = FSDP(model, dtype, self.mesh.dp) if fsdp else DDP(model, group=self.mesh.dp)

    def optimizer(self, cls, params, **kwargs):
        """cls(params, **kwargs), its state divided if the strategy says so."""
        return ShardedOptimizer(params, cls, self.mesh.dp, **kwargs) if self.name == "zero1" else cls(params, **kwargs)

    def micro_batches(self, inputs, targets, micro: int):
        """This rank's rows of a batch that all ranks have drawn alike, as (x, y, share of all rows times dp ranks).

        Ranks may get unequal numbers of rows, but all get equally many micro-batches, as each backward may be
        collective: who has none left computes a row that counts 0.
        """
        starts = [rank * len(inputs) // self.dp for rank in range(self.dp + 1)]
        mine = slice(starts[self.mesh.dp_rank], starts[self.mesh.dp_rank + 1])
        for i in range(0, max(b - a for a, b in zip(starts, starts[1:])), micro):
            x, y = inputs[mine][i:i + micro], targets[mine][i:i + micro]
            yield (x, y, len(x) * self.dp / len(inputs)) if len(x) else (inputs[:1], targets[:1], 0.0)

    def backward(self, loss, last: bool) -> None:
        """loss.backward(), and after the last micro-batch the averaging of gradients."""
        with self.wrapper.no_sync() if self.name != "fsdp" and not last else contextlib.nullcontext():
            loss.backward()
        if last:
            self.wrapper.finish_gradient_synchronization()

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of a number over the ranks along the data."""
        return reduce(x.clone(), self.mesh.dp) / self.dp

    def total(self, number: float) -> float:
        """Its sum over the ranks along the data."""
        if self.dp == 1:
            return number
        return reduce(torch.tensor(number, dtype=torch.float64, device=self.device), self.mesh.dp).item()

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks: what they act upon must be the same on all."""
        if self.size == 1:
            return list(numbers)
        return reduce(torch.tensor(numbers, dtype=torch.float64, device=self.device), op=dist.ReduceOp.MAX).tolist()

    def same(self, value):
        """Rank 0's value, on every rank; any plain object."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


# --- measurements ---

@dataclass
class BenchConfig:
    """What `torchrun … parallel.py` measures."""
    dp: int | None = None            # ranks along the data in the last row; none = those that tp leaves
    tp: int | None = None            # ranks that share a model in the last row; none = those that dp leaves
    d_model: int = 512               # width of the model that is trained
    n_layers: int = 4                # its blocks
    vocab_size: int = 8192           # its vocabulary
    context_length: int = 128        # tokens per sequence
    batch_size: int = 2              # sequences per rank and step
    steps: int = 12                  # timed steps of each strategy, taken in turns
    max_mb: int = 256                # largest message of the bandwidth table
    out_dir: str = "results"         # where tables and the timeline go


def collective_times(max_mb: int, device) -> list[dict]:
    """Time and bandwidth of each collective by message size, beside the ring's latency + bytes sent / bandwidth.

    Latency is that of a few bytes, bandwidth the best seen: so ring_ms says how far each size is from both.
    """
    size, rows = world()[1], []
    for mb in [0] + [4 ** i for i in range(10) if 4 ** i <= max_mb]:
        n = max(int(mb * 1e6) // 4 // size, 64)
        whole, other, part = (torch.ones(length, device=device) for length in (n * size, n * size, n))
        for kind, messages, call in (("all-reduce", 2, lambda: send("all-reduce", dist.all_reduce, whole)),
                                     ("all-gather", 1, lambda: all_gather(whole, part)),
                                     ("reduce-scatter", 1, lambda: exchange(other, whole))):
            seconds = math.inf
            for _ in range(6):
                dist.barrier()
                began = time.perf_counter()
                wait(call())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = min(seconds, time.perf_counter() - began)
            sent_mb = messages * (size - 1) / size * whole.nbytes / 1e6
            rows.append({"kind": kind, "mb": mb, "sent_mb": sent_mb, "ms": 1000 * seconds,
                         "gb_per_s": sent_mb / seconds / 1000})
    for row in rows:
        same = [other for other in rows if other["kind"] == row["kind"]]
        row["ring_ms"] = same[0]["ms"] + row["sent_mb"] / max(other["gb_per_s"] for other in same)
    return [row for row in rows if row["mb"]]


def strategies(config: BenchConfig, device) -> dict:
    """name -> (maker of (model, optimizer, loss function, finish), its bytes by the formula: weights with gradients
    and moments, activations); torch's beside ours.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import model as model_file
    from accounting import activation_bytes
    from model import ModelConfig, Transformer
    from optim import AdamW
    model_file.SHORT_CONTEXT = 0     # the formula is for fused attention, which keeps no scores
    size = world()[1]
    tp = config.tp or size // (config.dp or 1)
    mesh = make_mesh(config.dp or size // tp, tp)
    shape = ModelConfig(config.vocab_size, config.context_length, config.d_model, config.n_layers, n_heads=8)

    def new():
        torch.manual_seed(0)
        return Transformer(shape).to(device)

    def parts(model, make=AdamW, loss_of=None):
        finish = getattr(model, "finish_gradient_synchronization", lambda: None)      # torch's finish in backward
        return model, make(model.parameters()), loss_of or (lambda x, y: model(x, y)[1]), finish

    def divided():
        model = tensor_parallel(new(), mesh.tp)
        return parts(DDP(model, group=mesh.dp), loss_of=lambda x, y: vocab_parallel_loss(model, x, y))

    def torch_fsdp():
        model = new()
        for module in [*model.layers, model]:
            fully_shard(module)
        return parts(model, torch.optim.AdamW)

    whole = new()
    matrices, vectors = (sum(p.nbytes for p in whole.parameters() if (p.dim() > 1) == is_matrix)
                         for is_matrix in (True, False))
    full, fsdp = 4 * (matrices + vectors), 4 * (matrices / size + vectors)     # weights, gradients, AdamW's two moments
    # A rank of tensor parallelism keeps what a model of its heads, feed-forward columns and words would keep.
    part = replace(shape, vocab_size=shape.vocab_size // tp, n_heads=shape.n_heads // tp,
                   n_kv_heads=shape.n_kv_heads // tp, d_ff=shape.d_ff // tp, head_dim=shape.head_dim)
    kept, kept_tp = (config.batch_size * activation_bytes(one, config.context_length) for one in (shape, part))
    return {f"DDP {mode}": (lambda mode=mode: parts(DDP(new(), mode)), full, kept) for mode in DDP.MODES} | {
        "torch DDP": (lambda: parts(DistributedDataParallel(new())), full, kept),
        "DDP + ZeRO-1": (lambda: parts(DDP(new()), lambda p: ShardedOptimizer(p, AdamW)), full * (0.5 + 0.5 / size),
                         kept),
        "FSDP": (lambda: parts(FSDP(new())), fsdp, kept),
        "torch fully_shard": (torch_fsdp, fsdp, kept),
        f"dp={size // tp} x tp={tp}": (divided, 4 * (matrices / tp + vectors), kept_tp)}


def live_storages() -> dict:
    """Address -> bytes of all storages that Python's tensors point to; what C++ alone holds (autograd) is missing."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    tensors = [getattr(x, "_local_tensor", x) for x in tensors]           # a DTensor is a cover around its part
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def kept_bytes(forward) -> int:
    """Bytes that autograd keeps from forward() for backward: the activations, without weights, gathered or not."""
    weights, kept = live_storages(), {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()     # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = forward()
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    loss.backward()
    return total


def step_phases(parts, batch) -> list:
    """One training step; returns its phases as (name, start, end) in seconds."""
    (_, optimizer, loss_of, finish), marks = parts, [time.perf_counter()]

    def mark():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    loss = loss_of(*batch)
    mark()
    for call in (loss.backward, finish, optimizer.step):
        call()
        mark()
    optimizer.zero_grad()
    return list(zip(("forward", "backward", "finish", "optimizer"), marks, marks[1:]))


def union(spans) -> float:
    """Length of the union of intervals.

    >>> union([(0, 2), (1, 3), (5, 6)])
    4
    """
    total, end = 0, -math.inf
    for a, b in sorted(spans):
        total += max(0, b - max(a, end))
        end = max(end, b)
    return total


def measure(config: BenchConfig, device) -> tuple[list[dict], dict]:
    """(a row per strategy, a traced step of each). They take turns, step by step: so all see the same machine."""
    global TRACE
    ids = torch.randint(config.vocab_size, (config.batch_size, config.context_length + 1),
                        generator=torch.Generator().manual_seed(0)).to(device)     # alike everywhere, as tp needs it
    batch, running, rows, traces = (ids[:, :-1], ids[:, 1:]), {}, [], {}
    for name, (make, formula, kept_formula) in strategies(config, device).items():
        before = sum(live_storages().values())
        model, optimizer, loss_of, finish = running[name] = make()
        step_phases(running[name], batch)                      # moments and buffers come with the first step
        kept = kept_bytes(lambda: loss_of(*batch))
        finish()
        held = sum(live_storages().values()) - before
        rows.append({"name": name, "held_mb": held / 1e6, "formula_mb": formula / 1e6, "kept_mb": kept / 1e6,
                     "kept_formula_mb": kept_formula / 1e6})
        optimizer.zero_grad()
    seconds = {name: [] for name in running}
    for turn in range(config.steps):
        for name in seconds if turn % 2 else reversed(seconds):
            dist.barrier()
            phases = step_phases(running[name], batch)
            seconds[name].append(phases[-1][2] - phases[0][1])
    for row in rows:
        name, TRACE = row["name"], []                          # one more step, to look at
        dist.barrier()
        phases = step_phases(running[name], batch)
        time.sleep(0.05)                                       # the backend's threads note their ends a moment later
        waits, sent = ([s for s in TRACE if (s[0] == "wait") == waiting] for waiting in (True, False))
        traces[name] = {"computing": phases, "waiting": waits, "sending": sent}
        busy, waited = union([s[1:] for s in sent]), sum(b - a for _, a, b in waits)
        row |= {"sending_ms": 1000 * busy, "waiting_ms": 1000 * waited,
                "hidden": max(0, 1 - waited / busy) if busy else None,
                "ms": 1000 * sorted(seconds[name])[config.steps // 2], "fastest_ms": 1000 * min(seconds[name])}
    TRACE = None
    return rows, traces


def report(config: BenchConfig, device, bandwidth, rows) -> str:
    """The tables as text."""
    size, words = world()[1], " ".join(sys.argv[1:])
    lines = [f"{size} ranks, {dist.get_backend()}, {torch.get_num_threads()} threads each, {device.type}, "
             f"torch {torch.__version__}, {os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}",
             f"torchrun --standalone --nproc_per_node={size} parallel.py {words}".rstrip(), "",
             "collective         MB        ms   ring ms   GB/s sent per rank"]
    lines += [f"{r['kind']:<14}{r['mb']:>7}{r['ms']:>10.2f}{r['ring_ms']:>10.2f}{r['gb_per_s']:>8.2f}"
              for r in bandwidth]
    lines += ["", f"training step: d_model {config.d_model}, {config.n_layers} layers, vocabulary {config.vocab_size}, "
              f"{config.batch_size} x {config.context_length} tokens per rank, float32, AdamW",
              f"step: median of {config.steps} taken in turns; sending, waiting, hidden: one more, traced",
              "MB held: weights, gradients, moments; MB kept: activations, from forward to backward", "",
              f"{'strategy':<20}step ms   fastest   sending   waiting  hidden   MB held   formula   MB kept   formula"]
    for r in rows:
        hidden = "    n/a" if r["hidden"] is None else f"{100 * r['hidden']:>5.0f} %"
        lines.append(f"{r['name']:<18}{r['ms']:>9.1f}{r['fastest_ms']:>10.1f}{r['sending_ms']:>10.1f}"
                     f"{r['waiting_ms']:>10.1f} {hidden}{r['held_mb']:>10.1f}{r['formula_mb']:>10.1f}"
                     f"{r['kept_mb']:>10.1f}{r['kept_formula_mb']:>10.1f}")
    return "\n".join(lines) + "\n"


def draw(traces: dict, path) -> None:
    """The traced step of each of our strategies on rank 0: what is computed, waited for and sent, when."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    kinds = ("forward", "backward", "finish", "optimizer", "all-reduce", "all-gather", "reduce-scatter", "wait",
             "broadcast")
    colors = {kind: f"C{i}" for i, kind in enumerate(kinds)}
    ours = {name: trace for name, trace in traces.items() if not name.startswith("torch")}
    figure = Figure(figsize=(11, 1.3 * len(ours) + 0.8), layout="constrained")
    axes = figure.subplots(len(ours), 1, sharex=True)
    for axis, (name, trace) in zip(axes, ours.items()):
        zero = trace["computing"][0][1]
        for row, spans in enumerate(trace.values()):
            for kind, a, b in spans:
                span = 1000 * (a - zero), 1000 * (b - a)
                axis.broken_barh([span], (2.1 - row, 0.8), color=colors[kind], alpha=0.8)
        axis.set(yticks=(2.5, 1.5, 0.5), yticklabels=list(trace), ylabel=name.replace(" ", "\n", 1))
    figure.legend([Patch(color=color) for color in colors.values()], colors, ncols=9, loc="outside upper center",
                  fontsize=8)
    axes[-1].set_xlabel("ms since the step began, rank 0; torchrun --standalone "
                        f"--nproc_per_node={world()[1]} parallel.py {' '.join(sys.argv[1:])}")
    figure.savefig(path, dpi=110)


def main(config: BenchConfig) -> None:
    """Measure, and have rank 0 write OUT_DIR/parallel_DEVICE_W_ranks.txt, .json and .png. Collective."""
    device = start()
    rank, size = world()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    bandwidth, (rows, traces) = collective_times(config.max_mb, device), measure(config, device)
    if rank == 0:
        stem = Path(config.out_dir) / f"parallel_{device.type}_{size}_ranks"
        stem.parent.mkdir(parents=True, exist_ok=True)
        text, figures = report(config, device, bandwidth, rows), {"collectives": bandwidth, "strategies": rows}
        print(text)
        stem.with_suffix(".txt").write_text(text, encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        draw(traces, stem.with_suffix(".png"))


if __name__ == "__main__":
    from configurator import command_line
    usage = "usage: torchrun --standalone --nproc_per_node=N parallel.py [--key=value …]"
    _, _, bench, _ = command_line(BenchConfig, sys.argv[1:], usage)
    with ending():
        main(bench)
