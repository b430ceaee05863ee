"""Weights that are whole only while they are used: FSDP, and a tensor of which each rank holds a part.

A rank keeps 1/W of every matrix, of its gradient and of its optimizer state (parallel.py has the bytes). A block's
matrices are gathered while the block before it computes and freed after use; for backward they are gathered again,
and a block's gradients leave, each part to the rank that owns it, when the last of them is there:

    forward    gather 1 | compute 1, gather 2 | free 1, compute 2, gather 3 | free 2, compute 3
    backward   compute 3, gather 2 | send 3, free 3, compute 2, gather 1 | send 2, free 2, compute 1 | send 1, free 1

Four hooks do it: before a block's forward (wait, gather the next), after it (free), when the gradient of its output
arrives (gather again) and when its own last gradient does (send, free).

Papers: Rajbhandari 2019 (ZeRO, 1910.02054, section 5.3), Zhao 2023 (FSDP, 2304.11277).
Left out: models that fit no single host (weights are made whole once, then cut), offloading to the host's memory.

    torchrun --standalone --nproc_per_node=2 train.py --parallel=fsdp --optimizer=adamw
"""
import math

import torch
from torch import nn

from parallel import all_gather, average, broadcast, collect, reduce_scatter, wait, world


# --- cut tensors ---

class Cut:
    """A tensor of `length` along `dim` divided among the ranks of a group: ceil(length / W) each, the last less or
    nothing. A divided parameter keeps its cuts in `.cuts`, in order."""
    def __init__(self, dim: int, length: int, group=None):
        self.dim, self.length, self.group = dim, length, group
        rank, self.size = world(group)
        self.step = math.ceil(length / self.size)
        self.start, self.stop = min(rank * self.step, length), min((rank + 1) * self.step, length)

    def apply(self, p) -> None:
        """Make the parameter p this rank's part of itself; it stays the same object."""
        p.data = self.take(p.data).clone(memory_format=torch.contiguous_format)
        p.cuts = [*cuts_of(p), self]

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
    """x with zeros below, up to `rows` rows; x itself when it has as many."""
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def cuts_of(p) -> list:
    return getattr(p, "cuts", [])


def full_shape(p) -> list[int]:
    """Shape of the undivided parameter."""
    shape = list(p.shape)
    for cut in reversed(cuts_of(p)):                # of several in a dimension the first one's counts
        shape[cut.dim] = cut.length
    return shape


def gather_like(p, part: torch.Tensor) -> torch.Tensor:
    """`part`, divided as p is, made whole on every rank; collective."""
    for cut in reversed(cuts_of(p)):
        part = cut.gather(part)
    return part


def take_like(p, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, cut as p is; `whole` itself when it has not the undivided p's shape."""
    if list(whole.shape) != full_shape(p):
        return whole
    for cut in cuts_of(p):
        whole = cut.take(whole)
    return p.detach() if p.is_meta else whole       # meta: a stage of the pipeline that is not this one has it


# --- the whole state: what checkpoints hold, so that they move between numbers of ranks and strategies ---

def full_state_dict(module: nn.Module, keep: bool = True) -> dict:
    """The state dict that the undivided module would have, on the CPU of every rank; collective: call it on all. With
    keep=False this rank takes part, tensor by tensor, and gets {}: it does not write the checkpoint."""
    named, state, whole = dict(module.named_parameters(remove_duplicate=False)), module.state_dict(), {}
    device = next((p.device for p in named.values() if not p.is_meta), None)
    for name, value in state.items():
        p = named.get(name, value)
        if p in whole:                              # a tied matrix travels once and stays tied
            continue
        if p.is_meta:                               # another stage of the pipeline has it
            tensor = torch.empty(full_shape(p), dtype=p.dtype, device=device)
        else:
            tensor = gather_like(p, p.detach())
        if hasattr(p, "stage"):
            broadcast([tensor], p.stage[0], [p.stage[1]])
        whole[p] = tensor.cpu() if keep else None
    return {name: whole[named.get(name, value)] for name, value in state.items()} if keep else {}


def take_state_dict(module: nn.Module, whole: dict) -> dict:
    """This rank's part of an undivided state dict, for module.load_state_dict; what does not fit stays as it is."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return {name: take_like(named[name], tensor) if name in named else tensor for name, tensor in whole.items()}


def map_state(optimizer, state: dict, change) -> dict:
    """The entries of an optimizer's state dict, change(p, tensor) in place of the tensors of a cut parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params, entries = dict(zip([i for group in state["param_groups"] for i in group["params"]], params)), {}
    for i, entry in state["state"].items():
        p = params[i]
        if not p.is_meta:                           # a stage of the pipeline that is not this one has it
            entries[i] = {key: change(p, value) if cuts_of(p) and torch.is_tensor(value) and value.dim() == p.dim()
                          else value for key, value in entry.items()}
    return entries


def full_optimizer_state(optimizer) -> dict:
    """The state dict that `optimizer` would have over the undivided module, on rank 0's CPU; collective. On the other
    ranks tensors are dropped as soon as they are gathered: what they return is not complete."""
    def gathered(p, value):
        whole = gather_like(p, value.to(p.device))
        return whole.cpu() if all(world(cut.group)[0] == 0 for cut in cuts_of(p)) else None

    state = optimizer.state_dict()
    entries = map_state(optimizer, state, gathered)
    stages = [p.stage[0] for group in optimizer.param_groups for p in group["params"] if hasattr(p, "stage")]
    if stages:
        entries = dict(sorted(collect(entries, stages[0]).items()))
    return state | {"state": entries}


def take_optimizer_state(optimizer, state: dict) -> dict:
    """This rank's part of the state of an undivided optimizer, whoever saved it, for optimizer.load_state_dict."""
    return state | {"state": map_state(optimizer, state, take_like)}


# --- weights divided: FSDP (ZeRO-3) ---

class Unit:
    """Matrices that are gathered, used and freed together: a block's, or those of one module outside the blocks.

    A matrix is there three times: `p`, this rank's rows, which the optimizer steps; `wholes[p]`, which the modules see
    while they run and autograd saves; `flats[p]`, the memory behind that, of 0 bytes unless gathered:

        freed (works None) --gather--> on its way (works) --wait--> whole (works []) --free--> freed

    phase: "forward" -> "backward", once the gradient of its output is there -> "sent", once its own gradients left.
    """
    def __init__(self, group, dtype):
        self.group, self.dtype = group, dtype
        self.places, self.wholes, self.flats = [], {}, {}      # places: (module, name, p) of matrices and their biases
        self.pieces, self.lookup = 0, True          # lookup: tables alone, whose backward does not read them
        self.works, self.phase = None, "forward"

    def add(self, piece: nn.Module) -> None:
        """Cut all matrices of `piece`."""
        self.pieces += 1
        for module in piece.modules():
            params = {name: p for name, p in module._parameters.items() if p is not None}
            if any(p.dim() > 1 for p in params.values()):
                self.lookup &= type(module).__name__ == "Embedding"                # torch's and ours
                self.places += [(module, name, p) for name, p in params.items()]
                for p in params.values():
                    if p.dim() > 1 and p not in self.wholes:
                        self._cut(p)
                if self.dtype is not None:
                    module.register_forward_pre_hook(self._cast_inputs, with_kwargs=True)

    def _cast_inputs(self, module, args, kwargs):
        return torch.utils._pytree.tree_map(
            lambda x: x.to(self.dtype) if torch.is_tensor(x) and x.is_floating_point() else x, (args, kwargs))

    def _cut(self, p) -> None:
        cut = Cut(0, p.shape[0], self.group)
        flat = torch.empty(cut.size * cut.step * p[0].numel(), dtype=self.dtype or p.dtype, device=p.device)
        # .data: filling the memory again must not look to autograd like a change of what it has saved.
        self.wholes[p] = nn.Parameter(flat[:p.numel()].view(p.shape).data, requires_grad=p.requires_grad)
        self.flats[p] = flat
        flat.untyped_storage().resize_(0)
        cut.apply(p)

    def gather(self) -> None:
        """Start to gather the matrices, where they are not whole or on their way."""
        if self.works is not None:
            return
        self.works = []
        for p, flat in self.flats.items():
            flat.untyped_storage().resize_(flat.numel() * flat.element_size())
            part = pad(p.detach().to(flat.dtype), p.cuts[-1].step)
            self.works.append((all_gather(flat, part, self.group), part))          # `part` must live until it is sent

    def wait(self) -> None:
        """Until they are whole."""
        self.gather()
        for work, _ in self.works:
            wait(work)
        self.works = []

    def free(self) -> None:
        if self.works:                              # gathered and then not needed: its memory is still being written
            self.wait()
        for flat in self.flats.values():
            flat.untyped_storage().resize_(0)
        self.works = None

    @torch.enable_grad()
    def swap(self, inside: bool) -> None:
        """Let the modules see the whole matrices, and biases in their dtype; or what belongs to the optimizer again."""
        for module, name, p in self.places:
            shown = p
            if inside:
                shown = self.wholes[p] if p in self.wholes else p.to(self.dtype or p.dtype)
            module._parameters[name] = shown

    def missing(self) -> list:
        """Trainable matrices whose gradient is not there yet."""
        return [p for p, whole in self.wholes.items() if whole.requires_grad and whole.grad is None]


class FSDP(nn.Module):
    """Fully sharded data parallel: each rank keeps 1/W of every matrix, of its gradient and of its optimizer state.

        model = FSDP(module); optimizer = AdamW(model.parameters())
        …backward(); model.finish_gradient_synchronization(); optimizer.step()

    Matrices are cut by rows; vectors (norms, biases) stay whole. `parameters()` are the parts, with gradients of their
    shape and dtype. compute_dtype (float16, bfloat16): what travels and what the matrices compute in; gradients are
    summed in float32. A unit is an entry of a ModuleList or a module outside them; modules that share a matrix are one
    unit, which stays whole between its uses, as does the last one, whose backward comes at once. Each backward sends,
    so micro-batches add up; whole units may be checkpointed. All ranks must run the same modules in the same order, and
    every trainable matrix must get a gradient: gathers and sends share one order.
    """
    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None, group=None):
        super().__init__()
        self.module, self.group, self.units, self.sending = module, group, [], []
        broadcast([*module.parameters(), *module.buffers()], group)
        module.register_forward_pre_hook(lambda module, args: self._free_all())
        for piece in self._pieces(module):
            matrices = {p for p in piece.parameters() if p.dim() > 1}
            unit = next((unit for unit in self.units if matrices & unit.wholes.keys()), None)
            if unit is None:
                unit = Unit(group, compute_dtype)
                self.units.append(unit)
            unit.add(piece)
            piece.register_forward_pre_hook(lambda _, args, unit=unit: self._before_forward(unit))
            piece.register_forward_hook(lambda _, args, output, unit=unit: self._after_forward(unit, output))
        for unit in self.units:
            for whole in unit.wholes.values():
                if whole.requires_grad:
                    whole.register_post_accumulate_grad_hook(lambda _, unit=unit: self._gradient_arrived(unit))
        module.register_forward_hook(lambda module, args, output: self._after_model())
        self.vectors = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]

    @classmethod
    def _pieces(cls, module, listed: bool = False):
        if any(p.dim() > 1 for p in module.parameters(recurse=listed)):
            yield module
        else:
            for child in module.children():
                yield from cls._pieces(child, isinstance(module, nn.ModuleList))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _free_all(self) -> None:
        for unit in self.units:
            if unit.phase != "backward":
                unit.free()

    def _after_model(self) -> None:
        if not torch.is_grad_enabled():
            self._free_all()

    def _before_forward(self, unit) -> None:
        first_use, i = unit.works != [], self.units.index(unit)
        unit.wait()
        if first_use and i + 1 < len(self.units):
            self.units[i + 1].gather()              # on its way while this one computes
        unit.swap(inside=True)

    def _after_forward(self, unit, output) -> None:
        if unit.phase == "backward":                # activation checkpointing runs it again, for its backward
            return
        unit.swap(inside=False)
        outputs = [x for x in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(x) and x.requires_grad]
        trained = bool(outputs) and torch.is_grad_enabled()
        if trained:
            unit.phase = "forward"
            torch.autograd.graph.register_multi_grad_hook(outputs, lambda _: self._before_backward(unit), mode="any")
        if unit.pieces == 1 and not (trained and unit is self.units[-1]):
            unit.free()

    def _before_backward(self, unit) -> None:
        if unit.phase == "backward":
            return
        unit.phase, i = "backward", self.units.index(unit)
        if not unit.lookup:
            unit.wait()
            unit.swap(inside=True)
        before = self.units[max(i - 1, 0)]
        if not before.lookup and before.phase != "sent":
            before.gather()

    def _gradient_arrived(self, unit) -> None:
        if unit.missing():
            return
        earlier, self.sending = self.sending, []
        for p, whole in unit.wholes.items():
            if whole.requires_grad:
                grad = pad(whole.grad, p.cuts[-1].step * p.cuts[-1].size).contiguous()
                whole.grad = None
                self.sending.append((p, reduce_scatter(grad, self.group)))
        # A frozen matrix gets no gradient and may still be needed: for the gradient of what the layers before gave.
        if all(whole.requires_grad for whole in unit.wholes.values()):
            unit.swap(inside=False)
            unit.free()
        unit.phase = "sent"
        # The previous unit's gradients were sent during this unit's backward. More in flight would hold more memory.
        self._receive(earlier)

    def _receive(self, sent) -> None:
        for p, result in sent:
            mean = result().div_(world(self.group)[1])[:p.numel()].view(p.shape).to(p.dtype)
            p.grad = mean if p.grad is None else p.grad.add_(mean)

    def finish_gradient_synchronization(self) -> None:
        """Call on all ranks after backward and before the step: `.grad` is then this rank's part of the mean."""
        for unit in self.units:
            unit.swap(inside=False)
            if unit.missing() and unit.phase != "sent":
                name = next(name for name, p in self.module.named_parameters() if p is unit.missing()[0])
                raise RuntimeError(f"{name} got no gradient in this backward; FSDP needs one for every trainable "
                                   "matrix on every rank: use it, or freeze it with requires_grad_(False)")
            unit.phase = "forward"
            unit.free()
        self._receive(self.sending)
        self.sending = []
        if self.vectors:
            wait(average(self.vectors, self.group))

    def full_state_dict(self) -> dict:
        """The undivided module's state dict, plain names, on every rank; collective: call it on all, or it hangs."""
        return full_state_dict(self.module)
