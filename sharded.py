r"""A model that no rank holds whole: its matrices (tensor parallel) or layers (Pipeline) divided; a strategy by name.

Tensor parallel: every rank has some columns of one matrix and the matching rows of the next, so that only the sum at
the end needs a message. Megatron's f is the identity forward and an all-reduce backward, g the reverse:

    x --f-- x W1[:, part 0] -- act -- h0 W2[part 0, :] --g-- y     q, k, v, w1, w3 are cut by columns (whole heads),
       \--- x W1[:, part 1] -- act -- h1 W2[part 1, :] --/         o, w2 by rows: 4 all-reduces of (B, T, C) a block

Pipeline: stage s of p has 1/p of the layers, the first also the embedding, the last the head. Micro-batches follow one
another; activations travel forward, their gradients back, point to point: few bytes, but stages wait for each other.
Two stages, four micro-batches; a digit is a forward, two letters its backward, which takes twice as long:

    gpipe    stage 0   0 1 2 3 . . . a a b b c c d d      1f1b    stage 0   0 1 . . a a 2 b b 3 c c . d d
             stage 1   . 0 1 2 3 a a b b c c d d . .              stage 1   . 0 a a 1 b b 2 c c 3 d d . .
             holds the activations of 4 micro-batches             holds those of 2 and 1, however many there are

Either way a stage is idle for p - 1 of m + p - 1 slots, the bubble: more micro-batches make it small, and 1F1B, which
begins a backward as soon as it can, has the memory for more of them. FSDP, the third division, is in fsdp.py.

Papers: Shoeybi 2019 (Megatron-LM, 1909.08053), Huang 2018 (GPipe, 1811.06965), Narayanan 2019 (PipeDream, doi
10.1145/3341301.3359646) and 2021 (1F1B with a flush, as here, 2104.04473, section 2.2). Left out: a divided vocabulary,
sequence parallelism, interleaved stages, stages of measured size (the last has the head besides its layers).

    torchrun --standalone --nproc_per_node=4 train.py --pp=2               two pipelines of two stages; --tp=2 likewise
    torchrun --standalone --nproc_per_node=2 bench.py parallel             the bubble beside the formula
"""
import contextlib
import copy
import math
import os

import torch
import torch.distributed as dist
from torch import nn

import parallel
from fsdp import (FSDP, Cut, cuts_of, full_optimizer_state, full_state_dict, gather_like, take_like,  # noqa: F401
                  take_optimizer_state, take_state_dict)
from machine import pick_device
from parallel import DDP, ShardedOptimizer, broadcast, make_mesh, reduce, start, wait, world


# --- matrices divided: tensor parallel ---

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


class ColumnParallelLinear(nn.Module):
    """x @ weightᵀ, rank r computing the r-th part of the outputs: x (..., d_in) -> (..., d_out / W). weight: (d_out /
    W, d_in), drawn on rank 0; or weight and bias are undivided parameters to take over. copy_input=False: x has been
    through f already (one f for q, k and v together)."""
    dim = 0

    def __init__(self, d_in: int, d_out: int, group=None, weight=None, bias=None, copy_input: bool = True):
        super().__init__()
        if weight is None:
            weight = nn.Parameter(torch.randn(d_out, d_in) * math.sqrt(2 / (d_in + d_out)))
            broadcast([weight], group)
        self.weight, self.bias, self.group, self.copy_input = weight, bias, group, copy_input
        Cut(self.dim, weight.shape[self.dim], group).apply(weight)
        if self.dim == 0 and bias is not None:                 # each output has its bias; inputs have none
            Cut(0, len(bias), group).apply(bias)

    def forward(self, x):
        y = (CopyToRanks.apply(x, self.group) if self.copy_input else x) @ self.weight.T
        return y if self.bias is None else y + self.bias


class RowParallelLinear(ColumnParallelLinear):
    """x @ weightᵀ, rank r having the r-th part of the inputs: x (..., d_in / W), a ColumnParallelLinear's output ->
    (..., d_out), the same on all ranks. weight: (d_out, d_in / W)."""
    dim = 1

    def forward(self, x):
        y = SumOverRanks.apply(x @ self.weight.T, self.group)
        return y if self.bias is None else y + self.bias


# Embedding, head, norms and a router stay whole on every rank: they then need no message.
LAYERS = {"q_proj": ColumnParallelLinear, "k_proj": ColumnParallelLinear, "v_proj": ColumnParallelLinear,
          "o_proj": RowParallelLinear, "w1": ColumnParallelLinear, "w3": ColumnParallelLinear, "w2": RowParallelLinear}


def tensor_parallel(model: nn.Module, group=None) -> nn.Module:
    """`model`, a Transformer, its attention heads and feed-forward columns divided in place over the ranks of `group`.
    Rank 0's weights count. It works as before, on the same tokens on all ranks, without a cache; names of parameters
    stay. Raises ValueError when heads or widths do not divide by the number of ranks, or attention is latent."""
    size, c = world(group)[1], model.config
    for name in ("n_heads", "n_kv_heads", "d_ff", "d_ff_expert"):
        if (getattr(c, name) or 0) % size:
            raise ValueError(f"{name}={getattr(c, name)} cannot be divided among tp={size} ranks; choose another tp")
    if c.attention != "standard":
        raise ValueError(f"attention={c.attention!r} shares one latent among all heads; tp={size} needs standard")
    broadcast([*model.parameters(), *model.buffers()], group)
    for parent in list(model.modules()):
        names = [name for name, _ in parent.named_children() if name in LAYERS]
        for name in names:
            linear = getattr(parent, name)
            setattr(parent, name, LAYERS[name](*linear.weight.T.shape, group, linear.weight, linear.bias, False))
        if names:                                   # one f for all the columns that read the same x
            parent.register_forward_pre_hook(lambda _, args: (CopyToRanks.apply(args[0], group), *args[1:]))
        if "q_proj" in names:
            parent.config = copy.copy(c)            # not replace, which would derive head_dim from n_heads anew
            parent.config.n_heads, parent.config.n_kv_heads = c.n_heads // size, c.n_kv_heads // size
            for norm in (parent.q_norm, parent.k_norm) if c.qk_norm else ():
                # Its weight serves all heads, of which a rank sees only its own.
                if norm.weight.requires_grad:
                    norm.weight.register_hook(lambda grad: reduce(grad.clone(), group))
    return model


# --- layers divided: pipeline ---

def order_of_work(schedule: str, stage: int, n_stages: int, n: int) -> list[tuple[str, int]]:
    """What a stage does with n micro-batches, in order: some forwards ahead, then a backward and a forward in turn.

    >>> order_of_work("1f1b", stage=1, n_stages=2, n=2)
    [('forward', 0), ('backward', 0), ('forward', 1), ('backward', 1)]
    """
    ahead = n if schedule == "gpipe" else min(n_stages - stage, n)
    order = [("forward", i) for i in range(ahead)]
    for i in range(n):
        order.append(("backward", i))
        if i + ahead < n:
            order.append(("forward", i + ahead))
    return order


class Pipeline(nn.Module):
    """A Transformer whose layers are divided among the ranks of `group`, in place; rank 0's weights count.

        pipeline = Pipeline(model, group, n_micro_batches=8); optimizer = AdamW(pipeline.parameters())
        loss = pipeline.step(tokens, targets); optimizer.step()

    n_micro_batches: parts of a batch that follow one another, of about equal numbers of rows. schedule: gpipe | 1f1b.
    `parameters()` are this stage's. `model` keeps all names, but what stands on another stage is on the meta device
    and takes no memory. A tied embedding is on the first and the last stage, with one gradient, the sum. Raises
    ValueError for fewer layers than ranks, and for what needs the whole model: mtp_depth, a balance of experts.
    """
    def __init__(self, model: nn.Module, group=None, n_micro_batches: int = 4, schedule: str = "1f1b"):
        super().__init__()
        self.stage, self.n_stages = world(group)
        c = model.config
        if schedule not in ("gpipe", "1f1b"):
            raise ValueError(f"schedule={schedule!r} must be gpipe or 1f1b")
        if c.n_layers < self.n_stages:
            raise ValueError(f"n_layers={c.n_layers} cannot be divided among pp={self.n_stages} stages; lower pp")
        if self.n_stages > 1 and (c.mtp_depth or c.n_experts and c.balance != "none"):
            raise ValueError(f"pp={self.n_stages} has no mtp_depth, and experts only with balance=none; choose pp=1")
        self.module, self.group, self.config = model, group, c
        self.n_micro_batches, self.schedule = n_micro_batches, schedule
        self.first, self.last = self.stage == 0, self.stage == self.n_stages - 1
        self.autocast = contextlib.nullcontext      # train.py's mixed precision, around forward passes only
        self.most_held = 0                          # micro-batches whose activations waited for backward, at most
        broadcast([*model.parameters(), *model.buffers()], group)
        self._cut(model)
        if self.n_stages > 1:           # gradients in a group of their own: NCCL sends one message of a group at a time
            self.backward_group = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)

    def _cut(self, model) -> None:
        """Keep this stage's parameters; the others become meta tensors, their layers let x through."""
        def stage_of(name):
            if name.startswith("layers."):
                return int(name.split(".")[1]) * self.n_stages // self.config.n_layers
            return self.n_stages - 1 if name.startswith(("ln_final", "lm_head")) else 0

        stages, here, self.tied = {}, {}, None      # p -> stages that have it, what stands for it on this one
        for name, p in model.named_parameters(remove_duplicate=False):
            stages.setdefault(p, set()).add(stage_of(name))
        self.first_is_frozen = self.n_stages > 1 and not any(p.requires_grad and 0 in at for p, at in stages.items())
        for p, places in stages.items():
            here[p] = p
            if self.stage not in places:
                here[p] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                here[p].cuts = cuts_of(p)
            elif len(places) > 1 and p.requires_grad:
                self.tied = p
            here[p].stage = self.group, min(places)              # who saves it; see fsdp.full_state_dict
            here[p].repeated = self.stage != min(places)
        for module in model.modules():
            module._parameters.update((name, here[p]) for name, p in module._parameters.items() if p is not None)
        model.embed = self._embed
        for i, layer in enumerate(model.layers):
            if stage_of(f"layers.{i}.") != self.stage:
                layer.forward = lambda x, *_: x

    def named_parameters(self, *args, **kwargs):
        """Those of this stage, by their names in the model."""
        return ((name, p) for name, p in self.module.named_parameters(*args, **kwargs) if not p.is_meta)

    def _embed(self, tokens, cache, plan):
        """Instead of the model's own: a later stage goes on from what the stage before has sent."""
        return type(self.module).embed(self.module, tokens, cache, plan) if self.first else self.received

    def _layers(self, tokens):
        """(what the stage before has sent, None on the first; the residual stream after this stage's layers)."""
        self.received = None
        if not self.first:
            self.received = torch.empty(*tokens.shape, self.config.d_model, device=tokens.device)
            wait(dist.irecv(self.received, group=self.group, group_src=self.stage - 1))
            self.received.requires_grad_(torch.is_grad_enabled())
        return self.received, self.module.hidden(tokens)

    def _send(self, y):
        return dist.isend(y.detach().contiguous(), group=self.group, group_dst=self.stage + 1)

    def _forward(self, i, tokens, targets, weight, loss_of):
        """One micro-batch; returns its loss times weight on the last stage, elsewhere 0."""
        with self.autocast():
            x, y = self._layers(tokens)
            y = loss_of(*self.module.head_loss(y, targets), tokens) * weight if self.last else y.float()
        self.held[i] = x, y, None if self.last else self._send(y)
        self.most_held = max(self.most_held, len(self.held))
        return y.detach() if self.last else 0.0

    def _backward(self, i, scale: float):
        x, y, sent = self.held.pop(i)
        grad = torch.full_like(y, scale)
        if not self.last:
            wait(dist.irecv(grad, group=self.backward_group, group_src=self.stage + 1))
            wait(sent)
        y.backward(grad)
        if not self.first:
            wait(self.returning[0])                 # beside the gradient, which must live until it is sent
            self.returning = dist.isend(x.grad, group=self.backward_group, group_dst=self.stage - 1), x.grad

    def step(self, tokens, targets, loss_of=lambda logits, loss, tokens: loss, scale: float = 1.0) -> torch.Tensor:
        """Forward and backward of a batch of (B, T) ids, equal on all stages; gives the mean loss on all. Collective.
        Gradients, times scale, are added to `.grad`. loss_of(logits, loss, tokens): the loss of a micro-batch, on the
        last stage. Micro-batches count by their rows, also ragged ones."""
        if self.first_is_frozen:
            raise ValueError(f"all that the first of {self.n_stages} stages holds is frozen; freeze less, or lower pp")
        n, total = min(self.n_micro_batches, len(tokens)), torch.zeros((), device=tokens.device)
        parts = [(x, y, len(x) / len(tokens)) for x, y in zip(tokens.tensor_split(n), targets.tensor_split(n))]
        self.held, self.returning, self.most_held, earlier = {}, (None, None), 0, None
        if self.tied is not None:
            earlier, self.tied.grad = self.tied.grad, None
        for kind, i in order_of_work(self.schedule, self.stage, self.n_stages, n):
            if kind == "forward":
                total += self._forward(i, *parts[i], loss_of)
            else:
                self._backward(i, scale)
        wait(self.returning[0])
        if self.tied is not None:                   # both ends add the other's gradient to theirs
            there, peer = torch.empty_like(self.tied.grad), self.n_stages - 1 - self.stage
            sent = dist.isend(self.tied.grad.clone(), group=self.group, group_dst=peer)
            wait(dist.irecv(there, group=self.group, group_src=peer))
            wait(sent)
            self.tied.grad += there
            if earlier is not None:
                self.tied.grad += earlier
        return reduce(total, self.group)

    @torch.no_grad()
    def forward(self, tokens, targets=None):
        """The model without gradients, stage after stage: logits (B, T, V), or (None, mean loss); on all stages."""
        with self.autocast():
            x = self._layers(tokens)[1].float()
            if not self.last:
                wait(self._send(x))
                x = x.new_zeros(()) if targets is not None else x.new_empty(*tokens.shape, self.config.vocab_size)
            else:
                x = self.module.head(x).float() if targets is None else self.module.head_loss(x, targets)[1]
        if targets is not None:
            return None, reduce(x, self.group)
        broadcast([x], self.group, [self.n_stages - 1])
        return x


# --- by name ---

class Strategy:
    """What train.py needs of all this: a strategy by name, which in a single process is the plain thing.

        strategy = Strategy("zero1", pp=2); strategy.divide(model, dtype); optimizer = strategy.optimizer(AdamW, groups)
        loss = strategy.forward_backward(inputs, targets, micro_batch_size, loss_of, scale)
        norm = strategy.clip_grad_norm(model.parameters(), 1.0); optimizer.step()

    name: ddp | zero1 | fsdp, along the data. tp: ranks that share each matrix; pp: stages of layers; the others (dp)
    divide the data. Raises ValueError when tp · pp does not divide the number of ranks, and for fsdp with pp.
    """
    def __init__(self, name: str, tp: int = 1, device: str | None = None, pp: int = 1):
        if name not in ("ddp", "zero1", "fsdp"):
            raise ValueError(f"parallel={name!r} must be ddp, zero1 or fsdp")
        if name == "fsdp" and pp > 1:
            raise ValueError(f"parallel=fsdp with pp={pp} would gather layers anew for each micro-batch; choose zero1")
        self.device = device
        if "RANK" in os.environ and not dist.is_initialized():
            there = device is None or device.startswith("cuda") and torch.cuda.is_available()
            self.device = str(start(device if there else pick_device(device)))      # which refuses what is not there
        self.rank, self.size = world()
        self.name, self.tp, self.pp, self.dp = name, tp, pp, self.size // max(tp * pp, 1)
        self.mesh = make_mesh(self.dp, tp, pp)

    def divide(self, model: nn.Module, dtype=None, compile: bool = False, logits: bool = True) -> None:
        """Make `model`, in place, this rank's part. dtype: what its products compute in (autocast, and FSDP's). logits:
        whether loss_of reads them; a compiled model that returns them adds a gradient of zeros to theirs."""
        if model.config.fused_loss and self.name == "fsdp":
            raise ValueError("fused_loss=true reads the head's matrix, which parallel=fsdp divides; choose one of them")
        kind = next(model.parameters()).device.type
        self.autocast = contextlib.nullcontext if dtype is None else lambda: torch.autocast(kind, dtype)
        if self.tp > 1:
            tensor_parallel(model, self.mesh.tp)
        self.model = self.forward = model           # what evaluation calls; what training calls
        if self.pp > 1:
            self.model = Pipeline(model, self.mesh.pp)
            self.model.autocast = self.autocast
        elif compile:
            compiled = torch.compile(model if logits else lambda x, y: model(x, y)[1])
            self.forward = compiled if logits else lambda x, y: (None, compiled(x, y))
        self.wrapper = FSDP(model, dtype, self.mesh.dp) if self.name == "fsdp" else DDP(model, group=self.mesh.dp)

    def optimizer(self, cls, params, **kwargs):
        """cls(params, **kwargs), its state divided if the strategy says so."""
        return ShardedOptimizer(params, cls, self.mesh.dp, **kwargs) if self.name == "zero1" else cls(params, **kwargs)

    def micro_batches(self, inputs, targets, size: int):
        """This rank's rows of a batch that all ranks have drawn alike, as (x, y, share of all rows times dp ranks). All
        ranks get equally many micro-batches, as a pass may be collective: who has no row left has one that counts 0."""
        x, y = (ids.tensor_split(self.dp)[self.mesh.dp_rank] for ids in (inputs, targets))
        for i in range(0, math.ceil(len(inputs) / self.dp), size):
            part = x[i:i + size]
            if len(part):
                yield part, y[i:i + size], len(part) * self.dp / len(inputs)
            else:
                yield inputs[:1], targets[:1], 0.0

    def forward_backward(self, inputs, targets, micro_batch_size: int | None = None,
                         loss_of=lambda logits, loss, inputs: loss, scale: float = 1.0) -> torch.Tensor:
        """Add the gradients of a batch that all ranks have drawn alike, times `scale`, to `.grad`, averaged; gives its
        mean loss. Every micro-batch counts by its rows, also a ragged one: no mean of means. Collective.
        micro_batch_size: rows of a forward pass; None is all of a rank's rows, in a pipeline 1/(4 pp) of them, so that
        the bubble is at most a fifth. loss_of(logits, loss, inputs): the loss of a micro-batch, under autocast."""
        total, size = 0.0, micro_batch_size or len(inputs)
        if self.pp > 1:
            (x, y, share), = self.micro_batches(inputs, targets, len(inputs))
            self.model.n_micro_batches = math.ceil(len(x) / micro_batch_size) if micro_batch_size else 4 * self.pp
            with self.wrapper.no_sync():
                total = self.model.step(x, y, loss_of, scale * share) * share
        else:
            batches = list(self.micro_batches(inputs, targets, size))
            for i, (x, y, share) in enumerate(batches, start=1):
                with self.autocast():
                    loss = loss_of(*self.forward(x, y), x) * share
                waits = i < len(batches) and self.name != "fsdp"       # FSDP has no room to keep whole gradients
                with self.wrapper.no_sync() if waits else contextlib.nullcontext():
                    (loss * scale).backward()
                total = total + loss.detach()
        self.wrapper.finish_gradient_synchronization()
        return self.mean(total)

    def clip_grad_norm(self, params, max_norm: float) -> torch.Tensor:
        """parallel.clip_grad_norm over the whole model, all stages of it."""
        return parallel.clip_grad_norm(params, max_norm, stages=self.mesh.pp if self.pp > 1 else None)

    @torch.no_grad()
    def evaluate(self, inputs, targets) -> torch.Tensor:
        """Mean loss of a batch that all ranks have drawn alike, and whose rows they share; collective."""
        (x, y, share), = self.micro_batches(inputs, targets, len(inputs))
        with self.autocast():
            return self.mean(self.model(x, y)[1] * share)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of a number over the ranks along the data."""
        return reduce(x.clone(), self.mesh.dp) / self.dp

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
