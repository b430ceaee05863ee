"""Train on many ranks, the data divided: NaiveDDP, DDP with overlapped buckets, and ZeRO-1.

A rank is one process with one device. All run the same program on other rows of the batch and end with the weights
that one process would have got, up to rounding. torchrun starts them, torch.distributed carries the bytes (gloo on
CPUs, NCCL on CUDA). A model too large for one rank: fsdp.py and sharded.py.

What an all-reduce costs. Three ranks in a ring hold gradients of three parts, a b c, and want the sums. In every step
each rank sends one part to its right neighbour (rank 2's is rank 0), all at the same time:

    reduce-scatter, W - 1 steps of N/W bytes              all-gather, W - 1 steps of N/W bytes
    rank 0    a0 b0 c0 -> a0 b0 C02 -> a0 B c02           rank 0    . B .  -> A B .  -> A B C
    rank 1    a1 b1 c1 -> A01 b1 c1 -> a01 b1 C           rank 1    . . C  -> . B C  -> A B C
    rank 2    a2 b2 c2 -> a2 B12 c2 -> A b12 c2           rank 2    A . .  -> A . C  -> A B C
    (capitals: what has just arrived and been added; a letter alone is the whole sum)

Each half sends N (W-1)/W bytes a rank: the sum takes about 2 N / bandwidth, whatever the number of ranks. The two
halves, at other moments of a step, are ZeRO-1 (here) and FSDP (fsdp.py):

    bytes a parameter (float32, AdamW)   weight   gradient   state     a step sends, N = bytes of weights
    DDP                                     4         4        8       2 N (W-1)/W   all-reduce of gradients
    ShardedOptimizer (ZeRO-1)               4         4        8/W     3 N (W-1)/W   and the new weights
    FSDP (ZeRO-3)                           4/W       4/W      8/W     3 N (W-1)/W   weights twice, gradients once
    freed by     ShardedOptimizer.add_param_group: the inner optimizer is given the owned parameters only    state
                 fsdp.FSDP._gradient_arrived: a whole gradient is dropped as soon as it is sent              gradient
                 fsdp.Unit.free: the memory behind a whole matrix shrinks to 0 bytes after each use          weight

DDP hides the sending behind the rest of backward, whose last layers come first:

    NaiveDDP   backward 4 3 2 1 | send 4 | send 3 | send 2 | send 1 | step
    DDP        backward 4 3 2 1 | step                       one bucket = one message; it leaves as soon as its
               send       4 3 2 1                            last gradient is there

Papers: Li 2020 (DDP, 2006.15704), Rajbhandari 2019 (ZeRO, 1910.02054), Thakur 2005 (ring collectives, doi
10.1177/1094342005051521). Left out: buffers that change in training (batch norm), sparse gradients. Not the mean of its
parts, so another number on ranks and in micro-batches: the experts' balance=loss.

    torchrun --standalone --nproc_per_node=2 train.py --parallel=ddp
    torchrun --standalone --nproc_per_node=2 bench.py parallel        what each strategy costs, beside torch's
"""
import contextlib
import os
import sys
import traceback
from collections import namedtuple
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from optim import norms


# --- processes ---

def start(device: str | None = None) -> torch.device:
    """Join the process group that torchrun describes in the environment, else RuntimeError; returns this rank's device.

    device: "cpu" to leave GPUs alone; else each rank takes the GPU of its number on its host, where there are any.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError("RANK and WORLD_SIZE are not set: this process is no rank. Start it with "
                           f"torchrun --standalone --nproc_per_node=N {' '.join(sys.argv)}")
    if torch.device(device or "cuda").type == "cpu" or not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
        return torch.device("cpu")
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", timeout=timedelta(minutes=10))
    return gpu


@contextlib.contextmanager
def ending():
    """Around the whole of a rank's work: a failure ends all ranks, with this rank's traceback, and nothing hangs."""
    try:
        yield
    except Exception:
        print(f"rank {os.environ.get('RANK', '?')} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)       # at once, as its peers wait for it; torchrun then ends them
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)       # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


def world(group=None) -> tuple[int, int]:
    """(rank, number of ranks) in `group`; None is all ranks. Without torchrun: rank 0 of 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:    # each would train alone, unnoticed
        raise RuntimeError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no process group; "
                           "call parallel.start() first")
    return 0, 1


Mesh = namedtuple("Mesh", "dp pp tp dp_rank pp_rank tp_rank")      # this rank's groups, and its place in each


def make_mesh(dp: int, tp: int = 1, pp: int = 1) -> Mesh:
    """Arrange all ranks in a dp x pp x tp table; ValueError when they are not as many. Every rank must call it.

    Rank = (dp_rank · pp + pp_rank) · tp + tp_rank: neighbours sit in one host, on its fastest links, and so share a
    tensor-parallel group, which sends most and has nothing to hide it behind.
    """
    rank, size = world()
    if min(dp, tp, pp) < 1 or dp * pp * tp != size:
        raise ValueError(f"dp={dp} x pp={pp} x tp={tp} = {dp * pp * tp} ranks, but {size} are running; start torchrun "
                         f"with --nproc_per_node={max(dp * pp * tp, 1)} or choose dp x pp x tp = {size}")
    if size == 1:
        return Mesh(None, None, None, 0, 0, 0)
    table, groups = torch.arange(size).view(dp, pp, tp), []
    for axis in range(3):
        for line in table.movedim(axis, -1).flatten(0, 1).tolist():
            group = dist.new_group(line)            # on every rank, also those it leaves out, and in the same order
            if rank in line:
                groups.append(group)
    return Mesh(*groups, *(table == rank).nonzero()[0].tolist())


# --- collectives ---

def send(kind: str, call, *args, group=None, **more):
    """Start a collective and return its work, for `wait`; None among one rank. kind: its name in a timeline."""
    if world(group)[1] == 1:
        return None
    return call(*args, group=group, async_op=True, **more)


def wait(work) -> None:
    """Until that collective is done, on CUDA in the order of the stream."""
    if work is not None:
        work.wait()


def reduce(x: torch.Tensor, group=None, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """x, contiguous, overwritten with its sum (or another op) over the ranks."""
    wait(send("all-reduce", dist.all_reduce, x, group=group, op=op))
    return x


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous, seen as uint8: backends lack some dtypes, and what only moves data need not know them."""
    return x.view(-1).view(torch.uint8)      # view, not reshape: a copy would be sent, or received and lost


def all_gather(out: torch.Tensor, x: torch.Tensor, group=None):
    """Put every rank's x, all of one size, one after the other into `out`; returns the work."""
    if world(group)[1] == 1:
        out.copy_(x.view(out.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor       # renamed in torch 2.13
    return send("all-gather", gather, as_bytes(out), as_bytes(x), group=group)


def reduce_scatter(x: torch.Tensor, group=None):
    """Start to sum x (W · n,) over the ranks; returns a function that waits and gives this rank's n sums.

    Every rank gets its part of all x and adds them itself: a ring's bytes, N (W-1)/W, with the sum in float32 where
    float16 travels, always in the same order. (gloo's own reduce-scatter is a whole all-reduce: twice the bytes.)
    """
    size = world(group)[1]
    parts = torch.empty_like(x) if size > 1 else x
    work = send("reduce-scatter", dist.all_to_all_single, as_bytes(parts), as_bytes(x), group=group)

    def result(x=x):                                # x must live until it is sent
        wait(work)
        return parts.view(size, -1).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return result


def broadcast(tensors, group=None, sources=None) -> None:
    """Overwrite every rank's tensors with those of rank 0, or of the rank in `sources`; ranks of the group."""
    started = []
    for tensor, source in zip(tensors, sources or [0] * len(tensors)):
        if tensor.numel() and not tensor.is_meta:
            whole = tensor.detach().contiguous()    # the tensor itself, or a copy that goes back below
            work = send("broadcast", dist.broadcast, as_bytes(whole), group=group, group_src=source)
            started.append((tensor.detach(), whole, work))
    for tensor, whole, work in started:
        wait(work)
        if tensor.data_ptr() != whole.data_ptr():
            tensor.copy_(whole)


def collect(entries: dict, group=None) -> dict:
    """{key: entry} of all ranks together, tensors on the host, on the group's rank 0; elsewhere {}. Collective.

    Entry by entry: the device of rank 0 holds one more at a time, and no other host a copy.
    """
    def on_host(key):
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, entries[key])

    rank, size = world(group)
    result, keys = {key: on_host(key) for key in entries} if rank == 0 else {}, [None] * size
    if size > 1:
        dist.all_gather_object(keys, list(entries), group=group)
    for source in range(1, size):
        for key in keys[source]:
            if rank == source:
                dist.send_object_list([on_host(key)], group=group, group_dst=0)
            elif rank == 0:
                box = [None]
                dist.recv_object_list(box, group=group, group_src=source)
                result.setdefault(key, box[0])
    return result


# --- data parallel ---

def average(params, group=None):
    """Start to replace the gradients of `params` by their mean over ranks, as one message; returns its work.

    None counts as 0. Each `.grad` becomes a view of the message, and what it was is freed: N bytes of gradients and
    one bucket, not 2 N.
    """
    sizes = [p.numel() for p in params]
    flat = params[0].new_empty(sum(sizes), requires_grad=False)
    for p, part in zip(params, flat.split(sizes)):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = torch.div(grad, world(group)[1], out=part.view(p.shape))
    return send("all-reduce", dist.all_reduce, flat, group=group)


class NaiveDDP(nn.Module):
    """Data parallel in twelve lines: after backward, one all-reduce a gradient, one after the other."""

    def __init__(self, module: nn.Module, group=None):
        super().__init__()
        self.module, self.group = module, group
        broadcast([*module.parameters(), *module.buffers()], group)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def finish_gradient_synchronization(self) -> None:
        for p in self.module.parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = reduce(grad.contiguous(), self.group) / world(self.group)[1]


class DDP(NaiveDDP):
    """Data parallel: every rank has the whole module and other data; gradients are averaged while backward runs.

        model = DDP(module); …backward(); model.finish_gradient_synchronization(); optimizer.step()

    bucket_mb: megabytes of gradients that travel as one message, which leaves as soon as the last of them is there.
        0     each gradient alone: hides all it can, pays the latency of many small messages
        inf   all in one flat message when backward is through: least latency, hides nothing
        else  both (2006.15704, section 3.2.3)
    Rank 0's parameters and buffers, frozen ones too, go to all ranks here. Tied weights travel once; a parameter that
    no backward reached gets the gradient 0. For accumulation, all but the last backward run under `no_sync()`.
    """

    def __init__(self, module: nn.Module, bucket_mb: float = 8.0, group=None):
        super().__init__(module, group)
        if not bucket_mb >= 0:
            raise ValueError(f"bucket_mb={bucket_mb} must be at least 0 (each gradient alone); inf is one flat message")
        self.sync, self.buckets, filled = True, [], 0
        trained = [p for p in module.parameters() if p.requires_grad and not p.is_meta]
        for p in reversed(trained):                 # about the order in which backward reaches them
            full = filled + p.nbytes > bucket_mb * 1e6
            if not self.buckets or full or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(p)
            filled += p.nbytes
            p.register_post_accumulate_grad_hook(self._arrived)
        self.ready, self.works = set(), []          # parameters whose gradient is there; buckets that were sent

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's gradients; the next one outside sends the sum."""
        self.sync = False
        try:
            yield
        finally:
            self.sync = True

    def _arrived(self, p) -> None:
        if not self.sync:
            return
        if p in self.ready:
            raise RuntimeError("a second backward reached a gradient that is being sent; run all backwards but the "
                               "last under no_sync(), and call finish_gradient_synchronization() after that one")
        self.ready.add(p)
        # In one order on every rank, also where a layer is unused: collectives are matched by order alone.
        while len(self.works) < len(self.buckets) and self.ready.issuperset(self.buckets[len(self.works)]):
            self.works.append(average(self.buckets[len(self.works)], self.group))

    def finish_gradient_synchronization(self) -> None:
        """Call on all ranks after backward and before the step: `.grad` is then the mean over the ranks."""
        for bucket in self.buckets[len(self.works):]:          # those with a gradient that no backward reached
            self.works.append(average(bucket, self.group))
        for work in self.works:
            wait(work)
        self.ready, self.works = set(), []


# --- optimizer state divided: ZeRO-1 ---

class ShardedOptimizer(torch.optim.Optimizer):
    """`optimizer_cls` with its state divided: each rank steps the parameters it owns, then sends them to the others.

        optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=1e-3)

    Whole parameters go to ranks, largest first, each to the rank that has least: so Muon works, which needs whole
    matrices, and its products are divided too. What is set in `param_groups` (a learning rate) holds on every rank.
    Gradients must be averaged already (DDP). Source: 1910.02054, section 5.1 (there in equal flat slices).
    """

    def __init__(self, params, optimizer_cls, group=None, **kwargs):
        self.group, self.local, self.owner = group, None, {}
        self.rank, size = world(group)
        self.load = [0] * size                                 # elements owned by each rank
        self.make = lambda groups: optimizer_cls(groups, **kwargs)
        super().__init__(params, {})

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; also finds an owner for each of the new parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted(group["params"], key=lambda p: -p.numel()):        # stable, so the same on every rank
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += 0 if p.is_meta else p.numel()      # meta: of another stage of a pipeline
        owned = group | {"params": [p for p in group["params"] if self.owner[p] == self.rank]}
        if self.local is None:
            self.local = self.make([owned])
            self.state = self.local.state
        else:
            self.local.add_param_group(owned)
        group.update(settings(self.local.param_groups[-1]))

    @torch.no_grad()
    def step(self, closure=None):
        """Step this rank's parameters, then send every parameter from its owner; gives closure's loss. Collective."""
        for group, local in zip(self.param_groups, self.local.param_groups):
            local.update(settings(group))
        loss = self.local.step(closure)
        trained = [p for p in self.owner if p.requires_grad]
        broadcast(trained, self.group, [self.owner[p] for p in trained])
        return loss

    def state_dict(self) -> dict:
        """That of one undivided optimizer, on the CPU of rank 0; elsewhere its state is {}. Collective."""
        index = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        state = collect({index[p]: entry for p, entry in self.local.state.items()}, self.group)
        groups = [settings(group) | {"params": [index[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take this rank's part of an undivided state dict, saved by any number of ranks or by a plain optimizer."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for saved, group in zip(groups, self.param_groups, strict=True):
            pairs = zip(saved["params"], group["params"], strict=True)
            saved["params"] = [i for i, p in pairs if self.owner[p] == self.rank]
            group.update(settings(saved))
        ids = {i for saved in groups for i in saved["params"]}
        state = {i: entry for i, entry in state_dict["state"].items() if i in ids}
        self.local.load_state_dict({"state": state, "param_groups": groups})
        self.state = self.local.state


def settings(group: dict) -> dict:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


# --- clipping ---

@torch.no_grad()
def clip_grad_norm(params, max_norm: float, eps: float = 1e-6, stages=None) -> torch.Tensor:
    """optim.clip_grad_norm where parameters may be divided: the norm is that of the whole gradient, on every rank.

    The squares of a divided parameter (p.cuts, see fsdp.Cut) are summed over the ranks that share it. stages: the group
    of a pipeline, whose ranks hold other layers; a tied matrix at both ends (p.repeated on the second) counts once.
    Collective. Returns the norm before clipping, a float32 scalar tensor; one not finite leaves the gradients alone.
    """
    params = [p for p in params if not p.is_meta]
    total = torch.zeros((), device=params[0].device if params else "cpu")
    by_groups = {}         # ranks must agree on the collectives: one whose part has no gradient takes part with 0
    for p in params:
        grads = by_groups.setdefault(tuple(cut.group for cut in getattr(p, "cuts", ())), [])
        if p.grad is not None and not getattr(p, "repeated", False):
            grads.append(p.grad)
    for groups, grads in by_groups.items():
        square = torch.stack(norms([total.new_zeros(1), *grads])).square().sum()
        for group in groups:
            reduce(square, group)
        total += square
    if stages is not None:
        reduce(total, stages)
    norm = total.sqrt()
    factor = torch.where(norm.isfinite(), torch.clamp(max_norm / (norm + eps), max=1.0), 1.0)
    torch._foreach_mul_([p.grad for p in params if p.grad is not None], factor)
    return norm
