"""The same model in fewer bytes: int8 and int4 weights, pruning, distillation.

    python compress.py quantize out/shakespeare out/int8 --kind=int8             or --kind=int4
    python compress.py prune out/shakespeare out/pruned --kind=width --share=0.5
    python train.py --init_from=out/pruned --teacher=out/shakespeare --data_dir=data/shakespeare --out_dir=out/distilled

Decoding reads every weight once for every token, so its speed is bandwidth over bytes. Four ways to fewer bytes:

    full        w w w w w w      4 bytes a weight, or 2
    int8        b b b b b b  s   1 byte a weight and a scale for each row
    int4        bbb sz bbb sz    half a byte, and a scale and a shift for every 64 weights of a row
    magnitude   w 0 w 0 0 w      the smallest weights become zero; a dense matrix with zeros in it, as large as before
    width       w w w            whole heads and neurons leave, and a smaller dense model remains

How a row is rounded, w = (0.423, -1.270, 0.056, 0.808):

    int8   s = max|w| / 127 = 0.01            q = round(w / s) = (42, -127, 6, 81)
           s q = (0.42, -1.27, 0.06, 0.81)                        errors of at most s / 2 = 0.005
    int4   s = (max - min) / 15 = 0.1385      z = min + 8 s = -0.162      q = round((w - z) / s) + 8 = (12, 0, 10, 15)
           s (q - 8) + z = (0.392, -1.270, 0.115, 0.808)          errors of at most s / 2 = 0.069

One large weight makes s large for its whole row, which is why int4 cuts rows into groups. Pruning breaks the model at
first. Training it further repairs it, best on the distribution of the unpruned model (distillation): that says
something about every token of the vocabulary, a text only about the one that came. Every page opens a quantised
ckpt.pt, multiplied out by read_checkpoint; `load` here keeps it rounded in memory too.

int8 by rows: 2208.07339, int4 by groups: 2210.17323, both without their corrections. Magnitude: Han 2015 (1506.02626).
Width: Minitron (2407.14679, section 2.2). Distillation: Hinton 2015 (1503.02531).
"""
import copy
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import onetoken
from checkpoint import claim_out_dir, forget_former, multiplied_out, open_tokens, read_checkpoint, save_checkpoint
from configurator import command_line, fail
from model import Linear, Transformer, load_model

GROUP = 64                                   # weights of a row that share a scale and a shift in int4


@dataclass
class QuantizeConfig:
    kind: str = "int8"                       # int8 (a scale for each row) | int4 (a scale and a shift for every 64)
    checkpoint: str = "ckpt.pt"              # ckpt.pt = the last state, best.pt = the best on validation
    overwrite: bool = False                  # true = write over the run that NEW_OUT_DIR holds


@dataclass
class PruneConfig(QuantizeConfig):
    kind: str = "magnitude"                  # magnitude (single weights become zero) | width (heads and neurons leave)
    share: float = 0.5                       # the part that goes, 0 … 1
    data: str | None = None                  # width: token file (.bin) to rank on; none = the train.bin of the run

    def __post_init__(self):
        if self.data is not None and self.kind != "width":
            raise ValueError(f"data={self.data}: only kind=width ranks anything; leave data out")


# --- rounding ---

def round_int8(weight) -> dict:
    """{q, scale} of a matrix (R, C), w ≈ scale q: q int8 (R, C), scale bfloat16 (R, 1)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30).bfloat16()
    return {"q": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def round_int4(weight) -> dict:
    """{q, scale, shift} of a matrix (R, C), w ≈ scale (q - 8) + shift, for every GROUP of a row.

    q: uint8 (R, C / 2), two numbers 0 … 15 in a byte, the first in its upper half. scale, shift: (R, C / GROUP).
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))                   # (R, C / GROUP, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-30).bfloat16()
    shift = (low + 8 * scale.float()).bfloat16()
    q = ((groups - shift.float()) / scale.float()).round().add(8).clamp(0, 15).to(torch.uint8).flatten(1)
    return {"q": q[:, 0::2] * 16 + q[:, 1::2], "scale": scale.squeeze(-1), "shift": shift.squeeze(-1)}


def round_weight(weight, kind: str) -> dict:
    """The matrix in int8 or int4; in int8 where its rows are no multiple of GROUP. Raises ValueError."""
    if kind not in ("int8", "int4"):
        raise ValueError(f"kind={kind!r} must be int8 or int4")
    if kind == "int4" and weight.shape[1] % GROUP == 0:
        return round_int4(weight)
    return round_int8(weight)


class Int8Linear(torch.nn.Module):
    """x @ weightᵀ + bias with weights from round_int8, which onetoken.c reads as they are for a few rows on a CPU.

    Elsewhere they are multiplied out first: beside many rows that is little; on a GPU this saves memory and no time.
    """

    def __init__(self, parts: dict, bias=None):
        super().__init__()
        self.register_buffer("q", parts["q"])
        self.register_buffer("scale", parts["scale"])
        self.bias = bias

    def parts(self) -> dict:
        """As round_int8 gives them."""
        return {"q": self.q, "scale": self.scale}

    def forward(self, x):                                                       # (..., C) -> (..., R)
        y = self.multiply(x.reshape(-1, x.shape[-1])).to(x.dtype)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x):                                                      # (N, C) -> (N, R)
        trains = x.requires_grad and torch.is_grad_enabled()       # C gives no gradient
        if 0 < len(x) <= onetoken.MAX_ROWS and not trains and x.device.type == "cpu" and onetoken.library() is not None:
            return onetoken.linear(self, x.float())
        return x @ multiplied_out(self.parts()).to(x.dtype).T


class Int4Linear(Int8Linear):
    """The same with weights from round_int4; scale holds (scale, shift) of every group, (R, C / GROUP, 2)."""

    def __init__(self, parts: dict, bias=None):
        scale = torch.stack((parts["scale"], parts["shift"]), dim=-1)
        super().__init__({"q": parts["q"], "scale": scale}, bias)

    def parts(self) -> dict:
        """As round_int4 gives them."""
        scale, shift = self.scale.unbind(-1)
        return {"q": self.q, "scale": scale, "shift": shift}


def matrices(model) -> dict:
    """{name: Linear} of what rounding takes.

    Not routers, whose small errors would choose other experts, nor MLA's kv_up_proj, which decoding uses as a matrix.
    """
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, Linear) and not name.endswith(("router", "kv_up_proj"))}


def quantize(model, kind: str, stored: dict | None = None):
    """Round the model's matrices to int8 or int4 in place, for inference; returns the model.

    Raises ValueError for another kind. stored: matrices that are rounded already, by name.
    """
    for name, layer in matrices(model).items():
        parts = (stored or {}).get(f"{name}.weight") or round_weight(layer.weight, kind)
        small = Int4Linear if "shift" in parts else Int8Linear
        model.set_submodule(name, small(parts, layer.bias))
    return model


def load(out_dir, device=None, name: str = "ckpt.pt", kind: str | None = None, dtype=None):
    """load_model's (model, tokenizer), rounded where `kind` or the checkpoint says so; dtype is of the others."""
    model, tokenizer = load_model(out_dir, device, name)
    model.to(dtype)
    path = Path(out_dir) / name
    stored = read_checkpoint(path, map_location="meta").get("quantized")        # reads names and shapes only
    if stored is None or kind not in (None, stored["kind"]):
        return (quantize(model, kind) if kind else model), tokenizer
    weights = read_checkpoint(path, map_location=model.token_embeddings.weight.device)["quantized"]["weights"]
    return quantize(model, stored["kind"], weights), tokenizer


def weight_bytes(model) -> int:
    """Bytes of weights that one token of decoding reads: the experts that work, no embeddings (but a tied head)."""
    c, total = model.config, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        share = c.n_experts_per_token / c.n_experts if ".experts." in name else 1
        if name != "token_embeddings.weight" or tensor is getattr(model.lm_head, "weight", None):
            total += share * tensor.numel() * tensor.element_size()
    return int(total)


# --- pruning ---

@torch.no_grad()
def prune(model, share: float, kind: str = "magnitude", data=None):
    """A copy of the model without `share` (0 … 1) of its weights, or of its heads and neurons; the model stays.

    kind: "magnitude": in every matrix the smallest weights become zero (1506.02626). "width": in every block that share
    of the heads (or groups of heads) and of the feed-forward neurons leaves; the result is a smaller dense Transformer.
    data: ids (n,) to rank heads and neurons on; None ranks by the size of their weights. Raises ValueError by name.
    """
    if kind not in ("magnitude", "width"):
        raise ValueError(f"kind={kind!r} must be magnitude or width")
    if not 0 <= share < 1:
        raise ValueError(f"share={share} must be at least 0 and below 1: it is the part that goes")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("this model's weights are rounded already; prune it first, then quantize it")
    if kind == "width":
        return prune_width(model, share, data)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            flat = module.weight.view(-1)
            flat[flat.abs().topk(round(share * len(flat)), largest=False).indices] = 0
    return model


@torch.no_grad()
def prune_width(model, share: float, data=None):
    """A smaller model of the heads and neurons that are largest on `data` (2407.14679, section 2.2)."""
    c = model.config
    for setting, dense in (("n_experts", 0), ("attention", "standard"), ("mtp_depth", 0)):
        if getattr(c, setting) != dense:
            raise ValueError(f"{setting}={getattr(c, setting)}: width pruning needs {setting}={dense}; "
                             "use kind=magnitude")
    per_group = c.n_heads // c.n_kv_heads                # a key/value head leaves with its queries; the last one stays
    n_groups, d_ff = (max(1, round((1 - share) * n)) for n in (c.n_kv_heads, c.d_ff))
    small_config = replace(c, n_heads=n_groups * per_group, n_kv_heads=n_groups, head_dim=int(c.head_dim),
                           d_ff=d_ff)                    # int(): no longer derived from d_model and n_heads
    state = dict(model.state_dict())
    for i, (heads, neurons) in enumerate(column_sizes(model, data)):             # heads: (H D,), neurons: (F,)
        kept = largest(heads.square().view(c.n_kv_heads, -1).sum(dim=-1), n_groups)
        queries = rows_of(kept, per_group * c.head_dim)                          # rows of q_proj, columns of o_proj
        keys = rows_of(kept, c.head_dim)                                         # rows of k_proj and v_proj
        neurons = largest(neurons, d_ff)                                         # rows of w1 and w3, columns of w2
        rows = {"attn.q_proj": queries, "attn.k_proj": keys, "attn.v_proj": keys, "ffn.w1": neurons, "ffn.w3": neurons}
        for name in [name for name in state if name.startswith(f"layers.{i}.")]:
            module, _, kind = name.removeprefix(f"layers.{i}.").rpartition(".")  # attn.q_proj, weight or bias
            if module in rows:
                state[name] = state[name][rows[module]]
            elif kind == "weight" and module in ("attn.o_proj", "ffn.w2"):
                state[name] = state[name][:, queries if module == "attn.o_proj" else neurons]
    small = Transformer(small_config).to(model.token_embeddings.weight)          # its device and dtype
    small.load_state_dict(state)
    return small.train(model.training)


def largest(sizes, n: int):
    """The places of the n largest numbers, in their old order."""
    return sizes.topk(n).indices.sort().values


def rows_of(heads, width: int):
    """Heads 0 and 2 of width 3 are rows 0 1 2 6 7 8."""
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()


def column_sizes(model, data=None) -> list[tuple]:
    """For each block, the L2 norm of what enters each column of o_proj (H D,) and of w2 (F,) over 64 windows of `data`;
    without data, that of the columns."""
    layers = [(block.attn.o_proj, block.ffn.w2) for block in model.layers]
    if data is None:
        return [tuple(layer.weight.float().norm(dim=0) for layer in pair) for pair in layers]
    data = torch.as_tensor(np.asarray(data, dtype=np.int64))
    length = min(model.config.context_length, len(data))
    if length == 0:
        raise ValueError("data holds no token to rank heads and neurons on")
    squares = {layer: 0.0 for pair in layers for layer in pair}

    def add(layer, inputs):
        squares[layer] += inputs[0].float().square().flatten(0, -2).sum(dim=0)
    hooks = [layer.register_forward_pre_hook(add) for layer in squares]
    for start in np.unique(np.linspace(0, len(data) - length, 64, dtype=int)).tolist():
        model(data[start:start + length][None].to(model.token_embeddings.weight.device))
    for hook in hooks:
        hook.remove()
    return [(squares[o_proj].sqrt(), squares[w2].sqrt()) for o_proj, w2 in layers]


# --- distillation ---

def distillation_loss(logits, teacher_logits, temperature: float = 1.0):
    """T² KL(teacher || student) of softmax(logits / T), in nats per token; a scalar (1503.02531, section 2).

    logits, teacher_logits: (..., V). T² keeps the gradient's size the same for every T. None flows to the teacher.
    """
    student, teacher = (x.float() / temperature for x in (logits, teacher_logits.detach()))
    student = student - student.logsumexp(dim=-1, keepdim=True)
    teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    return temperature ** 2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


# --- commands ---

def ranking_ids(out_dir, config: PruneConfig):
    """What kind=width ranks on: the ids of --data, or of the run's own train.bin; None, said in a line, without."""
    trained = read_checkpoint(Path(out_dir) / config.checkpoint, map_location="meta").get("train_config") or {}
    path = Path(config.data or Path(trained.get("data_dir", "")) / "train.bin")
    if config.data is None and not path.is_file():
        print(f"no --data and no {path}: heads and neurons are ranked by the size of their weights")
        return None
    return open_tokens(path.parent, path.stem)


def write(out_dir, new_out_dir, config, model_config, weights: dict, **more) -> None:
    """A checkpoint of these weights, with what the old one says of data and tokenizer, and the tokenizer beside it."""
    old, new = Path(out_dir) / config.checkpoint, Path(new_out_dir)
    entries = read_checkpoint(old, map_location="meta")
    kept = {key: entries[key] for key in ("train_config", "tokenizer_sha256", "tokens", "template") if key in entries}
    new.mkdir(parents=True, exist_ok=True)
    (new / "tokenizer.json").unlink(missing_ok=True)
    if (Path(out_dir) / "tokenizer.json").is_file():
        shutil.copyfile(Path(out_dir) / "tokenizer.json", new / "tokenizer.json")
    save_checkpoint(weights, None, entries["step"], new / "ckpt.pt", model_config=asdict(model_config), **kept, **more)
    forget_former(new)
    before, after = old.stat().st_size, (new / "ckpt.pt").stat().st_size
    print(f"{old}: {before / 1e6:.2f} MB -> {new / 'ckpt.pt'}: {after / 1e6:.2f} MB")


USAGE = """usage: python compress.py quantize OUT_DIR NEW_OUT_DIR [--kind=int8|int4]
       python compress.py prune OUT_DIR NEW_OUT_DIR [--kind=magnitude|width --share=0.5 --data=FILE]"""


def main(argv: list[str]) -> None:
    """Do what the command line says; a mistake exits with status 2."""
    verb, files, config, _ = command_line({"quantize": QuantizeConfig, "prune": PruneConfig}, argv, USAGE)
    if verb is None or len(files) != 2:
        fail(f"give a verb and two folders. {USAGE}")
    out_dir, new_out_dir = files
    try:
        claim_out_dir(new_out_dir, config.overwrite, inputs=[out_dir])
        model, _ = load_model(out_dir, "cpu", config.checkpoint)
        if verb == "quantize":
            # A head that is the embedding table stays: a table's rows are looked up. `load` rounds a copy of it.
            rounded = {f"{name}.weight": round_weight(layer.weight, config.kind)
                       for name, layer in matrices(model).items()
                       if layer.weight is not model.token_embeddings.weight}
            weights = {name: tensor for name, tensor in model.state_dict().items() if name not in rounded}
            write(out_dir, new_out_dir, config, model.config, weights,
                  quantized={"kind": config.kind, "weights": rounded})
        else:
            data = ranking_ids(out_dir, config) if config.kind == "width" else None
            small = prune(model, config.share, config.kind, data)
            old, new = (sum(p.numel() for p in m.parameters()) for m in (model, small))
            zeros = sum(int((p == 0).sum()) for p in small.parameters())
            print(f"heads {model.config.n_heads} -> {small.config.n_heads}, feed-forward neurons {model.config.d_ff:,} "
                  f"-> {small.config.d_ff:,}, parameters {old:,} -> {new:,}, {zeros:,} of them zero")
            write(out_dir, new_out_dir, config, small.config, small.state_dict())
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
