"""What a stage leaves on disk, whole or not at all: training states, token files and meta.json.

    data/NAME/   train.bin val.bin     raw little-endian ids, no header       open_tokens
                 meta.json             dtype, vocab_size, sizes, tokenizer     read_meta
    out/NAME/    ckpt.pt best.pt       a training state                        save_checkpoint, load_checkpoint

A state is one dict of tensors and plain containers. The one of `python train.py`, which accounting.py bills:

    model          5.12 MB     1.28 M weights in float32, by name
    optimizer      4.21 MB     AdamW's two moments of the embedding, the head and the norms, 0.53 M each
                   3.01 MB     Muon's momentum of the hidden matrices, 0.75 M
    and            0.05 MB     step, tokens, rng, data_position, best_val_loss, tokenizer_sha256, settings

It is written to `ckpt.pt.tmp`, flushed to the disk, then renamed over the old one. A rename is atomic: a kill or a full
disk at any moment leaves the old file or the new one, each whole. It is opened with `weights_only=True`: a pickle may
run any code while it is opened and is refused, so a stranger's checkpoint can do no harm.

Importing this page does not import torch, which takes two seconds: the processes that clean text need files only.
"""
import dataclasses
import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
COMPILE_PREFIX = "_orig_mod."        # torch.compile wraps a module and puts this before every name
RUN_FILES = ("ckpt.pt", "best.pt", "log.jsonl")


# --- files ---

def write_atomically(path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, rename it over `path`.

    When that fails the temporary file is removed and `path` is as it was. Raises OSError naming the path when the disk
    is the reason, and what `write` raises otherwise.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save turns the disk's own error into a RuntimeError about positions in its archive.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno is not None:
            kept = "; the file from before is unchanged" if path.exists() else ""
            raise OSError(cause.errno, f"{path} could not be written: {cause.strerror}{kept}") from error
        raise
    if os.name == "posix":               # the rename itself survives a power cut only once the folder is flushed too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(folder) -> str:
    """What lies in a folder, in words, for a message about a file that is missing there."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    return f"{folder} holds {', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"


def claim_out_dir(out_dir, overwrite: bool = False, inputs=()) -> None:
    """Refuse an output folder that holds a run, unless `overwrite`, or that is one of the folders `inputs`.

    Raises ValueError naming the folder and what to do instead.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; give a folder to write to")
    for folder in inputs:
        if folder is not None and Path(folder).resolve() == out_dir.resolve():
            raise ValueError(f"{out_dir} is read from and would be overwritten; give another folder (--out_dir=…)")
    files = [name for name in RUN_FILES if (out_dir / name).exists()]
    if files and not overwrite:
        resume = "; --resume=true to go on with its training" if "ckpt.pt" in files else ""
        raise ValueError(f"{out_dir} holds a run ({', '.join(files)}). Give another folder (--out_dir=…) to keep it, "
                         f"--overwrite=true to replace it{resume}")


# --- token files ---

def read_meta(folder) -> dict:
    """meta.json of a data folder, or nanoGPT's convention without one: uint16, sizes unknown.

    Raises ValueError naming the path when it is no JSON object, has an unknown dtype or no vocab_size, or when the
    tokenizer.json beside it is not the one that the ids were made with.
    """
    path, tokenizer = Path(folder) / "meta.json", Path(folder) / "tokenizer.json"
    if not path.exists():
        return {"dtype": "uint16"}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must be a JSON object, not {type(meta).__name__}")
    if meta.get("dtype") not in ("uint16", "uint32"):
        raise ValueError(f"{path}: dtype {meta.get('dtype')!r} must be uint16 or uint32")
    if type(meta.get("vocab_size")) is not int or meta["vocab_size"] < 1:
        raise ValueError(f"{path}: vocab_size {meta.get('vocab_size')!r} must be a whole number of at least 1; add it, "
                         "or remove meta.json to have the ids read as nanoGPT's uint16")
    if meta.get("tokenizer_sha256") and tokenizer.is_file() and sha256(tokenizer) != meta["tokenizer_sha256"]:
        raise ValueError(f"{path} is of another tokenizer than {tokenizer} (SHA-256 {meta['tokenizer_sha256'][:12]}… "
                         f"and {sha256(tokenizer)[:12]}…); run data.py prepare again")
    return meta


def open_tokens(folder, split: str) -> np.memmap:
    """The ids of FOLDER/train.bin or val.bin, (n,), memory-mapped. Raises OSError or ValueError naming the path."""
    path = Path(folder) / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(f"no {path} ({contents(folder)}); make it first: "
                                f"python data.py prepare NAME_OR_FILE --data_dir={folder}")
    dtype = np.dtype(read_meta(folder)["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a positive multiple of {dtype.itemsize} ({dtype.name})")
    return np.memmap(path, dtype=dtype, mode="r")


# --- training states ---

def bare(model):
    """The module itself, out of torch.compile's and of a data-parallel wrapper's hands."""
    while hasattr(model, "_orig_mod") or hasattr(model, "module"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def save_checkpoint(model, optimizer, step: int, path, **more) -> None:
    """Write model, optimizer, step and what else must survive to `path`, atomically, or to a binary file object.

    model: a module (compiled or wrapped is fine) or a state dict. optimizer: one, a list, their state dicts, or None.
    more: the other entries of the format, plain containers and tensors only. Raises OSError naming the path, ValueError
    for a model that sharded.py has divided: one rank's part is no checkpoint.
    """
    import torch
    if not isinstance(model, dict) and any(getattr(p, "cuts", None) for p in model.parameters()):
        raise ValueError(f"{path}: this model holds one rank's part of its matrices; call full_state_dict(model) on "
                         "every rank and save what it returns on one")

    def state_of(thing):
        return thing if thing is None or isinstance(thing, dict) else thing.state_dict()
    many = isinstance(optimizer, (list, tuple))
    entries = {"format_version": FORMAT_VERSION, "model": state_of(bare(model)), "step": int(step),
               "optimizer": [state_of(one) for one in optimizer] if many else state_of(optimizer)}
    config = getattr(bare(model), "config", None)
    if dataclasses.is_dataclass(config):
        entries["model_config"] = dataclasses.asdict(config)
    if hasattr(path, "write"):
        torch.save(entries | more, path)
    else:
        write_atomically(path, lambda file: torch.save(entries | more, file))


def open_archive(path, map_location) -> dict:
    """What torch.save wrote to a path or a file object. Raises ValueError saying what is wrong with it.

    Running out of memory, and a device that is not there, are not the file's fault: those errors pass through.
    """
    import torch
    if not zipfile.is_zipfile(path):     # the directory of a zip archive stands at its end, so a part of one is none
        raise ValueError(f"{path} is cut short, or is no file of torch.save's at all")
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path} holds pickled code{f' ({code[1]})' if code else ''}, which is refused: a checkpoint "
                         "is tensors and plain containers") from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(f"{path} is damaged, or not of torch.save: {str(error).splitlines()[0]}") from error


def read_checkpoint(path, map_location="cpu") -> dict:
    """The dict stored at `path` or in a binary file object, on the CPU unless said otherwise.

    Raises FileNotFoundError saying what lies there when there is none; ValueError naming the path when it is cut short,
    holds code, is no checkpoint, or has a format newer than this code.
    """
    if not hasattr(path, "read"):
        path = Path(path)
        if not path.is_file():
            folder = path if path.is_dir() else path.parent
            raise FileNotFoundError(f"no checkpoint at {path} ({contents(folder)}); "
                                    f"train one first: python train.py --out_dir={folder}")
        open(path, "rb").close()         # a file that may not be read raises its own error
    entries = open_archive(path, map_location)
    weights = entries.get("model") if isinstance(entries, dict) else None
    if not isinstance(weights, dict) or any(not hasattr(tensor, "shape") for tensor in weights.values()):
        raise ValueError(f"{path} is not a checkpoint: it must hold a dict with 'model', tensors by name, and 'step'")
    step, version = entries.get("step"), entries.get("format_version", FORMAT_VERSION)
    if not isinstance(step, int) or not isinstance(version, int):
        raise ValueError(f"{path}: step {step!r} and format_version {version!r} must be whole numbers")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, this code reads up to {FORMAT_VERSION}")
    return entries


def load_weights(model, weights: dict, path) -> None:
    """Copy `weights` into `model`, names and shapes exactly. Raises ValueError naming path and first mismatch."""
    weights = {name.removeprefix(COMPILE_PREFIX): tensor for name, tensor in weights.items()}
    state = bare(model).state_dict()
    missing, unknown = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit this model: missing {missing[:3] or 'nothing'}, "
                         f"unknown {unknown[:3] or 'nothing'} ({len(missing)} and {len(unknown)} in all)")
    for name, tensor in weights.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{path} does not fit this model: {name} has shape {tuple(tensor.shape)}, "
                             f"the model wants {tuple(state[name].shape)}")
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
    """Fill `model` and `optimizer` (either may be None) from a path or file object; returns the step it was saved at.

    Raises ValueError naming the path when anything does not fit, FileNotFoundError when there is no such file.
    """
    entries = read_checkpoint(path)
    if model is not None:
        load_weights(model, entries["model"], path)
    if optimizer is not None:
        load_optimizer(optimizer, entries.get("optimizer"), path)
    return entries["step"]


def load_model(out_dir, device="cpu", name: str = "ckpt.pt"):        # moves to model.py
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
    return model.to(device).eval(), tokenizer
