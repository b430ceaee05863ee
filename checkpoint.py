"""Save a training state whole or not at all, and open one without trusting whoever wrote it.

A checkpoint is one dict of tensors and plain containers (DESIGN: format_version, model_config, train_config, model,
optimizer, step, tokens, rng, data_position, best_val_loss, tokenizer_sha256). It is written to `ckpt.pt.tmp` beside its
place, flushed to the disk and then renamed over the old one: a rename is atomic, so a kill at any moment leaves the old
checkpoint or the new one, each whole. It is opened with `weights_only=True`: a pickle that would run code is refused.
"""
import dataclasses
import os
from pathlib import Path

import torch

FORMAT_VERSION = 1
COMPILE_PREFIX = "_orig_mod."        # torch.compile wraps a module and puts this before every name


def bare(model):
    """The module itself, out of torch.compile's and of a data-parallel wrapper's hands."""
    while hasattr(model, "_orig_mod") or hasattr(model, "module"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def write_atomically(path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, rename it over `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":               # the rename itself survives a power cut only once the folder is flushed too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(model, optimizer, step: int, path, **more) -> None:
    """Write model, optimizer and step to `path`, atomically, with whatever else must survive.

    model: a module (compiled or wrapped is fine) or a state dict. optimizer: one optimizer, a list of them or of their
    state dicts, or None.
    more: the other entries of the format, plain containers and tensors only. Raises OSError naming the path, ValueError
    for a model that parallel.py has divided: one rank's part is no checkpoint.
    """
    if not isinstance(model, dict) and any(getattr(p, "cuts", None) for p in model.parameters()):
        raise ValueError(f"{path}: this model holds one rank's part of its matrices; call "
                         "parallel.full_state_dict(model) on every rank and save what it returns on one")
    weights = model if isinstance(model, dict) else bare(model).state_dict()
    if isinstance(optimizer, (list, tuple)):
        state = [one if isinstance(one, dict) else one.state_dict() for one in optimizer]
    else:
        state = None if optimizer is None else optimizer.state_dict()
    config = getattr(bare(model), "config", None)
    entries = {"format_version": FORMAT_VERSION, "model": weights, "optimizer": state, "step": int(step)}
    if dataclasses.is_dataclass(config):
        entries["model_config"] = dataclasses.asdict(config)
    write_atomically(path, lambda file: torch.save(entries | more, file))


def read_checkpoint(path, map_location="cpu") -> dict:
    """The dict stored at `path`, on the CPU unless said otherwise.

    Raises FileNotFoundError when there is none, ValueError naming the path when it is cut short, is no checkpoint, has
    a format newer than this code, or holds anything but tensors and plain containers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; train one first: python train.py --out_dir={Path(path).parent}")
    with open(path, "rb"):
        pass                                # a file that may not be read raises its own OSError here, not below
    try:
        # What a damaged file raises depends on where it is cut (zip directory, pickle, tensor): all mean the same here.
        entries = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors and plain containers ({reason}); "
                         "it is cut short or was not written by save_checkpoint") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("model"), dict) \
            or not all(torch.is_tensor(tensor) for tensor in entries["model"].values()):
        raise ValueError(f"{path} is not a checkpoint: it must hold a dict with 'model', tensors by name, and 'step'")
    if not all(isinstance(entries.get(key, FORMAT_VERSION), int) for key in ("step", "format_version")) \
            or "step" not in entries:
        raise ValueError(f"{path}: step {entries.get('step')!r} and format_version {entries.get('format_version')!r} "
                         "must be whole numbers")
    if entries.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {entries['format_version']}, this code reads up to {FORMAT_VERSION}")
    quantized = entries.get("quantized")
    if quantized is not None:            # what compress.py wrote: every page gets the rounded weights
        dtype = getattr(torch, quantized["dtype"])
        entries["model"] |= {name: multiplied_out(parts).to(dtype) for name, parts in quantized["weights"].items()}
    return entries


def multiplied_out(parts: dict):
    """The matrix (R, C) in float32 of {q, scale} in int8 or {q, scale, shift} in int4; see compress.py's rounding."""
    q, scale = parts["q"], parts["scale"].float().unsqueeze(-1)                 # scale: (R, groups, 1)
    if q.dtype == torch.uint8:                                                  # two numbers of 4 bits in a byte
        q = torch.stack((q // 16, q % 16), dim=-1).flatten(1).float() - 8
    groups = q.float().unflatten(1, (scale.shape[1], -1)) * scale
    return (groups + parts["shift"].float().unsqueeze(-1) if "shift" in parts else groups).flatten(1)


def load_weights(model, weights: dict, path) -> None:
    """Copy `weights` into `model`, names and shapes exactly. Raises ValueError naming the path and the first
    mismatch.
    """
    weights = {name.removeprefix(COMPILE_PREFIX): tensor for name, tensor in weights.items()}
    own = bare(model).state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit this model: missing {missing[:3] or 'nothing'}, "
                         f"unknown {unknown[:3] or 'nothing'} ({len(missing)} and {len(unknown)} in all)")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{path} does not fit this model: {name} has shape {tuple(tensor.shape)}, "
                             f"the model wants {tuple(own[name].shape)}")
    bare(model).load_state_dict(weights)


def load_optimizer(optimizer, state, path) -> None:
    """Copy a saved optimizer state into one optimizer or a list of them. Raises ValueError naming the path."""
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    states = state if isinstance(state, list) else [state]
    if state is None or len(states) != len(optimizers):
        held = "no optimizer state" if state is None else f"the state of {len(states)} optimizers"
        raise ValueError(f"{path} holds {held}, {len(optimizers)} wanted; resume with the settings it was trained with")
    for one, saved in zip(optimizers, states):
        try:
            one.load_state_dict(saved)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the optimizer state does not fit this {type(one).__name__}: {error}") from error


def load_checkpoint(path, model=None, optimizer=None) -> int:
    """Fill `model` and `optimizer` (either may be None) from `path` and return the step it was saved at.

    Raises ValueError naming the path when anything does not fit, FileNotFoundError when there is no such file.
    """
    entries = read_checkpoint(path)
    if model is not None:
        load_weights(model, entries["model"], path)
    if optimizer is not None:
        load_optimizer(optimizer, entries.get("optimizer"), path)
    return int(entries["step"])


def load_model(out_dir, device=None, name: str = "ckpt.pt"):
    """(Transformer in evaluation mode, Tokenizer) from the folder of a training run; the tokenizer is None without
    its file.

    name: `ckpt.pt` for the last state, `best.pt` for the best on validation.
    Raises ValueError naming the path when the tokenizer is not the one that the model was trained with.
    """
    from bpe import Tokenizer            # here, so that saving and loading states needs no stage below this one
    from model import ModelConfig, Transformer

    path = Path(out_dir) / name
    entries = read_checkpoint(path)
    if not isinstance(entries.get("model_config"), dict):
        raise ValueError(f"{path} has no model_config; it was not written by train.py")
    try:
        model = Transformer(ModelConfig(**entries["model_config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its model_config does not fit this version of model.py: {error}") from error
    load_weights(model, entries["model"], path)
    tokenizer, tokenizer_path = None, path.with_name("tokenizer.json")
    if tokenizer_path.is_file():
        trained_with = entries.get("tokenizer_sha256")
        if trained_with and sha256(tokenizer_path) != trained_with:
            raise ValueError(
                f"{tokenizer_path} is not the tokenizer that {path} was trained with (SHA-256 "
                f"{sha256(tokenizer_path)[:12]}…, wanted {trained_with[:12]}…); put the right file beside it")
        tokenizer = Tokenizer.load(tokenizer_path)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{tokenizer_path} has {tokenizer.vocab_size} ids, the model only "
                             f"{model.config.vocab_size}; they do not belong together")
    return model.to(device or "cpu").eval(), tokenizer


def sha256(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    import hashlib
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim_out_dir(out_dir, overwrite: bool = False, inputs=()) -> None:
    """Raise ValueError when out_dir is one of `inputs`, or holds a run and overwrite is false."""
    if any(Path(out_dir).resolve() == Path(one).resolve() for one in inputs):
        raise ValueError(f"out_dir={out_dir} is its own input; give another one")
    held = [name for name in ("ckpt.pt", "best.pt", "log.jsonl") if (Path(out_dir) / name).exists()]
    if held and not overwrite:
        raise ValueError(f"out_dir={out_dir} holds a run ({', '.join(held)}); give another one, or --overwrite=true")


def open_tokens(data_dir, split: str):
    """The ids of FOLDER/train.bin or val.bin."""
    from data import open_tokens
    return open_tokens(data_dir, split)
