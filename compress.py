"""The same model in fewer bytes: int8 and int4 weights, pruning, distillation.

    python compress.py quantize out/shakespeare out/int8 --kind=int8             or --kind=int4
    python compress.py prune out/shakespeare out/pruned --kind=width --share=0.5
    python train.py --init_from=out/pruned --teacher=out/shakespeare --data_dir=data/shakespeare --out_dir=out/distilled

Decoding reads every weight once for every token, so its speed is bandwidth over bytes. Ways to fewer bytes:

    full        w w w w w w      4 bytes a weight, or 2
    int8        b b b b b b  s   1 byte a weight and a scale for each row
    int4        bbb sz bbb sz    half a byte, and a scale and a shift for every 64 weights of a row
    magnitude   w 0 w 0 0 w      the smallest weights become zero; a dense matrix with zeros in it, as large as before
    width       w w w            whole heads and neurons leave, and a smaller dense model remains

How a row is rounded, w = (0.423, -1.270, 0.056, 0.808); errors are at most s / 2, but for s and z in bfloat16:

    int8   s = max|w| / 127 = 0.01         q = round(w / s) = (42, -127, 6, 81)
           s q = (0.42, -1.27, 0.06, 0.81)
    int4   s = (max - min) / 15 = 0.1385   z = min + 8 s = -0.162   q = round((w - z) / s) + 8 = (12, 0, 10, 15)
           s (q - 8) + z = (0.392, -1.270, 0.115, 0.808)

One large weight makes s large for its whole row, which is why int4 cuts rows into groups. Pruning breaks the model;
training it further repairs it, best on the unpruned model's distribution (distillation), which says something about
every token of the vocabulary. Every page opens a quantised ckpt.pt; `load` here keeps it rounded in memory too.

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

from checkpoint import claim_out_dir, forget_former, open_tokens, read_checkpoint, save_checkpoint
from configurator import command_line, fail
from model import Linear, Transformer, load_model
from onetoken import GROUP, RoundedLinear


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
        if self.data is not None and (self.kind != "width" or not self.data.endswith(".bin")):
            raise ValueError(f"data={self.data}: only kind=width ranks anything, on a .bin file; leave it out")


# --- rounding ---

def round_int8(weight) -> dict:
    """{q, scale} of a matrix (R, C), w ≈ scale q: q int8 (R, C), scale bfloat16 (R, 1)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30).bfloat16()
    return {"q": (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}


def round_int4(weight) -> dict:
    """{q, scale, shift} of a matrix (R, C), w ≈ scale (q - 8) + shift, for every GROUP of a row. q: uint8 (R, C / 2),
    two numbers 0 … 15 in a byte, the first in its upper half. scale, shift: (R, C / GROUP)."""
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
    return round_int4(weight) if kind == "int4" and weight.shape[1] % GROUP == 0 else round_int8(weight)


def matrices(model) -> dict:
    """{name: Linear} of what rounding takes: not routers, whose small errors would choose other experts, nor MLA's
    kv_up_proj, which decoding uses as a matrix."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, Linear) and not name.endswith(("router", "kv_up_proj"))}


def quantize(model, kind: str, stored: dict | None = None):
    """Round the model's matrices to int8 or int4 in place, for inference; returns the model. ValueError for another
    kind. stored: matrices that are rounded already, by name."""
    for name, layer in matrices(model).items():
        parts = (stored or {}).get(f"{name}.weight") or round_weight(layer.weight, kind)
        model.set_submodule(name, RoundedLinear(parts, layer.bias))
    return model


def load(out_dir, device=None, name: str = "ckpt.pt", kind: str | None = None, dtype=None):
    """load_model's (model, tokenizer), rounded where `kind` or the checkpoint says so; dtype is of the others."""
    model, tokenizer = load_model(out_dir, device, name)
    model.to(dtype)
    stored = read_checkpoint(Path(out_dir) / name, map_location=model.token_embeddings.weight.device).get("quantized")
    if stored is not None and kind in (None, stored["kind"]):
        quantize(model, stored["kind"], stored["weights"])
    elif kind:
        quantize(model, kind)
    return model, tokenizer


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
    if any(isinstance(module, RoundedLinear) for module in model.modules()):
        raise ValueError("this model's weights are rounded already; prune it first, then quantize it")
    if kind == "width":
        return prune_width(model, share, data)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            flat = module.weight.view(-1)
            flat[flat.abs().topk(round(share * len(flat)), largest=False).indices] = 0
    return model


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
        groups = heads.square().view(c.n_kv_heads, -1).sum(dim=-1).topk(n_groups).indices.sort().values
        neurons = neurons.topk(d_ff).indices.sort().values
        queries, keys = ((groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()
                         for width in (per_group * c.head_dim, c.head_dim))      # a group's numbers stand together
        rows = {"attn.q_proj": queries, "attn.k_proj": keys, "attn.v_proj": keys, "ffn.w1": neurons, "ffn.w3": neurons}
        columns = {"attn.o_proj": queries, "ffn.w2": neurons}
        for name in [name for name in state if name.startswith(f"layers.{i}.")]:
            module, _, kind = name.removeprefix(f"layers.{i}.").rpartition(".")  # attn.q_proj, weight or bias
            if module in rows:
                state[name] = state[name][rows[module]]
            elif module in columns and kind == "weight":
                state[name] = state[name][:, columns[module]]
    small = Transformer(small_config).to(model.token_embeddings.weight)          # its device and dtype
    small.load_state_dict(state)
    return small.train(model.training)


def column_sizes(model, data=None) -> list[tuple]:
    """For each block, the L2 norm of what enters each column of o_proj (H D,) and of w2 (F,) over 64 windows of `data`;
    without data, that of the columns."""
    layers = [(block.attn.o_proj, block.ffn.w2) for block in model.layers]
    if data is None:
        return [tuple(layer.weight.float().norm(dim=0) for layer in pair) for pair in layers]
    squares, length = {layer: 0.0 for pair in layers for layer in pair}, min(model.config.context_length, len(data))

    def add(layer, inputs):
        squares[layer] += inputs[0].float().square().flatten(0, -2).sum(dim=0)
    hooks = [layer.register_forward_pre_hook(add) for layer in squares]
    for start in np.linspace(0, len(data) - length, 64, dtype=int):
        window = np.asarray(data[start:start + length], dtype=np.int64)
        model(torch.from_numpy(window)[None].to(model.token_embeddings.weight.device))
    for hook in hooks:
        hook.remove()
    return [(squares[o_proj].sqrt(), squares[w2].sqrt()) for o_proj, w2 in layers]


# --- distillation ---

def distillation_loss(logits, teacher_logits, temperature: float = 1.0):
    """T² KL(teacher || student) of softmax(logits / T), in nats per token; a scalar (1503.02531, section 2). Both
    (..., V). T² keeps the gradient's size the same for every T. None flows to the teacher."""
    student, teacher = (x.float() / temperature for x in (logits, teacher_logits.detach()))
    student = student - student.logsumexp(dim=-1, keepdim=True)
    teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    return temperature ** 2 * (teacher.exp() * (teacher - student)).sum(dim=-1).mean()


# --- commands ---

USAGE = """usage: python compress.py quantize OUT_DIR NEW_OUT_DIR [--kind=int8|int4]
       python compress.py prune OUT_DIR NEW_OUT_DIR [--kind=magnitude|width --share=0.5 --data=FILE]"""


def main(argv: list[str]) -> None:
    """Write a smaller checkpoint with what the old one says of data and tokenizer; a mistake exits with status 2."""
    verb, files, config, _ = command_line({"quantize": QuantizeConfig, "prune": PruneConfig}, argv, USAGE)
    if verb is None or len(files) != 2:
        fail(f"give a verb and two folders. {USAGE}")
    out_dir, new_out_dir = map(Path, files)
    try:
        claim_out_dir(new_out_dir, config.overwrite, inputs=[out_dir])
        model, _ = load_model(out_dir, "cpu", config.checkpoint)
        entries = read_checkpoint(out_dir / config.checkpoint, map_location="meta")
        more = {k: entries[k] for k in ("train_config", "tokenizer_sha256", "tokens", "template") if k in entries}
        if verb == "prune":
            path = Path(config.data or Path((more.get("train_config") or {}).get("data_dir", "")) / "train.bin")
            ranks = config.kind == "width" and (config.data or path.is_file())
            small = prune(model, config.share, config.kind, open_tokens(path.parent, path.stem) if ranks else None)
            old, new = (sum(int((p != 0).sum()) for p in m.parameters()) for m in (model, small))
            by = f", ranked on {path}" if ranks else ""
            print(f"heads {model.config.n_heads} -> {small.config.n_heads}, neurons {model.config.d_ff:,} -> "
                  f"{small.config.d_ff:,}, parameters that are not zero {old:,} -> {new:,}{by}")
            model, weights = small, small.state_dict()
        else:
            # A head that is the embedding table stays: a table's rows are looked up. `load` rounds a copy of it.
            rounded = {f"{name}.weight": round_weight(layer.weight, config.kind)
                       for name, layer in matrices(model).items()
                       if layer.weight is not model.token_embeddings.weight}
            weights = {name: tensor for name, tensor in model.state_dict().items() if name not in rounded}
            more["quantized"] = {"kind": config.kind, "weights": rounded}
        new_out_dir.mkdir(parents=True, exist_ok=True)
        (new_out_dir / "tokenizer.json").unlink(missing_ok=True)
        if (out_dir / "tokenizer.json").is_file():
            shutil.copyfile(out_dir / "tokenizer.json", new_out_dir / "tokenizer.json")
        save_checkpoint(weights, None, entries["step"], new_out_dir / "ckpt.pt", model_config=asdict(model.config),
                        **more)
        forget_former(new_out_dir)
        before, after = (path.stat().st_size / 1e6 for path in (out_dir / config.checkpoint, new_out_dir / "ckpt.pt"))
        print(f"{out_dir}: {before:.2f} MB -> {new_out_dir}: {after:.2f} MB")
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
