"""What a stage leaves on disk, whole or not at all: training states, token files and meta.json.

    data/NAME/   train.bin val.bin     raw little-endian ids, no header       open_tokens
                 meta.json             dtype, vocab_size, sizes, tokenizer     read_meta
    out/NAME/    ckpt.pt best.pt       a training state                        save_checkpoint, load_checkpoint

A state is one dict of tensors and plain containers: model, optimizer, step, tokens, rng, data_position, settings. It is
written to `ckpt.pt.tmp`, flushed to the disk, then renamed over the old one: a kill or a full disk at any moment
leaves the old file or the new one, each whole. `weights_only=True` refuses pickled code when a stranger's is opened.
torch, which takes two seconds, is imported for states alone: processes that clean text need only files.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np

RUN_FILES = ("ckpt.pt", "best.pt", "log.jsonl")


# --- files and folders ---

def write_atomically(path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, rename it over `path`.

    When that fails `path` is as it was. Raises OSError naming the path for the disk's errors, else what `write` raises.
    """
    path = claim_file(path)
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
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{path} could not be written and is unchanged: {cause.strerror}") from error


def write_text(path, *parts: str) -> None:
    """Write UTF-8, whole or not at all; halves of surrogate pairs become question marks."""
    write_atomically(path, lambda file: file.writelines(part.encode("utf-8", "replace") for part in parts))


def claim_file(path) -> Path:
    """The path of a file to write. Raises OSError, before the hours spent on what shall go there, for a folder, a
    device, which a rename would replace, and a place in no folder."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; give the name of a file")
    if not path.parent.is_dir():
        raise OSError(f"{path} cannot be written: {contents(path.parent)}; make the folder, or give another place")
    return path


@contextlib.contextmanager
def only_writer(folder):
    """Make `folder` and hold it for this process: two that write there spoil both results. An empty one goes again.

    Raises ValueError when another process holds it. The lock leaves no file; on Windows nothing is held.
    """
    folder, lock = Path(folder), None
    if folder.is_file():
        raise OSError(f"{folder} is a file; give the name of a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if os.name == "posix":
            import fcntl
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is being written by another process; wait for it, or give another "
                                 "folder") from None
            except OSError:
                pass                     # some network disks have no locks
        yield folder
    finally:
        if lock is not None:
            os.close(lock)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def sha256(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(folder) -> str:
    """What lies in a folder, in words, for a message about a file that is missing there."""
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    return f"{folder} holds {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"


def claim_out_dir(out_dir, overwrite: bool = False, inputs=(), resume: bool = False) -> None:
    """Raises ValueError for an output folder that holds a run, unless `overwrite`, or that is one of `inputs`. resume:
    whether the command could go on with that run."""
    out_dir = Path(out_dir)
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file; give the name of a folder (--out_dir=…)")
    if out_dir.resolve() in [Path(folder).resolve() for folder in inputs if folder]:
        raise ValueError(f"{out_dir} is read from and would be overwritten; give another folder (--out_dir=…)")
    files = [name for name in RUN_FILES if (out_dir / name).exists()]
    if files and not overwrite:
        resume = ", --resume=true to go on with it" if resume and "ckpt.pt" in files else ""
        raise ValueError(f"{out_dir} holds a run ({', '.join(files)}); give another folder (--out_dir=…), "
                         f"--overwrite=true to replace the run{resume}")


def forget_former(folder) -> None:
    """Remove what a run that is written over left beside the ckpt.pt that has taken its place."""
    for name in ("best.pt", "log.jsonl"):
        (Path(folder) / name).unlink(missing_ok=True)


# --- token files ---

def read_meta(folder) -> dict:
    """meta.json of a data folder, or nanoGPT's convention without one: uint16, sizes unknown. Raises ValueError naming
    the path when it cannot be used, or when the tokenizer.json beside it made other ids."""
    path, tokenizer = Path(folder) / "meta.json", Path(folder) / "tokenizer.json"
    if not path.exists():
        return {"dtype": "uint16"}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        dtype, vocab_size = meta["dtype"], meta["vocab_size"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a JSON object with dtype and vocab_size: {error}") from error
    if dtype not in ("uint16", "uint32") or type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f"{path}: dtype {dtype!r} must be uint16 or uint32, vocab_size {vocab_size!r} a whole number "
                         "from 1 on")
    if meta.get("tokenizer_sha256") and tokenizer.is_file() and sha256(tokenizer) != meta["tokenizer_sha256"]:
        raise ValueError(f"{path} is of another tokenizer than {tokenizer} (SHA-256 {meta['tokenizer_sha256'][:9]}, "
                         f"not {sha256(tokenizer)[:9]}); run data.py prepare again")
    return meta


def open_tokens(folder, split: str) -> np.memmap:
    """The ids of FOLDER/train.bin or val.bin, (n,), memory-mapped. Raises OSError or ValueError naming the path."""
    path = Path(folder) / f"{split}.bin"
    if not path.is_file():
        raise FileNotFoundError(f"no {path} ({contents(folder)}); run data.py prepare NAME_OR_FILE --data_dir={folder}")
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


def plain(thing, name: str):
    """A checkpoint's entry in the types that reading allows: NumPy's become Python's or torch's, modules states."""
    import torch
    thing = thing.state_dict() if hasattr(thing, "state_dict") else thing
    if isinstance(thing, dict):
        return {plain(key, name): plain(value, f"{name}.{key}") for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        values = [plain(value, name) for value in thing]
        return values if isinstance(thing, list) else tuple(values)
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, np.ndarray):
        return torch.from_numpy(thing.copy())
    if not isinstance(thing, (torch.Tensor, torch.dtype, torch.device, bool, int, float, str, bytes, type(None))):
        raise ValueError(f"{name} is a {type(thing).__name__}; a checkpoint holds tensors, numbers, strings, None, and "
                         "dicts and lists of them: anything else is code that reading would refuse")
    return thing


def save_checkpoint(model, optimizer, step: int, path, **more) -> None:
    """Write model, optimizer, step and what else must survive to `path`, atomically, or to a binary file object.

    model: a module (compiled or wrapped is fine) or a state dict. optimizer: one, a list, their state dicts, or None.
    Raises OSError naming the path, ValueError for an entry that could not be read again and for a divided model.
    """
    import torch
    model = bare(model)
    if hasattr(model, "parameters") and any(getattr(p, "cuts", None) for p in model.parameters()):
        raise ValueError(f"{path}: this model holds one rank's part of its matrices; save full_state_dict(model)")
    entries = {"format_version": 1, "model": model, "optimizer": optimizer, "step": int(step)}
    if dataclasses.is_dataclass(getattr(model, "config", None)):
        entries["model_config"] = dataclasses.asdict(model.config)
    entries = {name: plain(entry, f"{path}: the entry {name}") for name, entry in (entries | more).items()}
    if hasattr(path, "write"):
        torch.save(entries, path)
    else:
        write_atomically(path, lambda file: torch.save(entries, file))


def read_checkpoint(path, map_location="cpu") -> dict:
    """The dict stored at `path` or in a binary file object. Raises FileNotFoundError, ValueError naming the path."""
    import torch
    is_file = hasattr(path, "read")
    if not is_file and not Path(path).is_file():
        folder = path if Path(path).is_dir() else Path(path).parent
        raise FileNotFoundError(f"no checkpoint at {path} ({contents(folder)}); "
                                f"train one first: python train.py --out_dir={folder}")
    try:
        with contextlib.nullcontext(path) if is_file else open(path, "rb") as file:
            if not zipfile.is_zipfile(file):         # a zip archive's directory stands at its end, so a part has none
                raise ValueError(f"{path} is cut short, or is no file of torch.save's at all")
            file.seek(0)
            entries = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)|$", str(error))[1]
        raise ValueError(f"{path} holds pickled code ({code}), which is refused") from error
    except RuntimeError as error:
        if not re.search("PytorchStreamReader|inline_container", str(error)):        # out of memory, for one
            raise
        raise ValueError(f"{path} is damaged, or not of torch.save: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("model"), dict) or "step" not in entries:
        raise ValueError(f"{path} is not a checkpoint: it must hold a dict with 'model', tensors by name, and 'step'")
    if entries.get("format_version", 1) not in (0, 1):
        raise ValueError(f"{path} has format_version {entries['format_version']!r}; this code reads versions up to 1")
    weights = entries["model"]
    if "quantized" in entries:           # what compress.py wrote: every page gets the rounded weights
        for name, parts in entries["quantized"]["weights"].items():
            weights[name] = multiplied_out(parts).to(next(iter(weights.values())).dtype)
    return entries


def multiplied_out(parts: dict):
    """The matrix (R, C) in float32 of {q, scale} in int8 or of {q, scale, shift} in int4; compress.py says how."""
    import torch
    q, scale = parts["q"], parts["scale"].float()
    if "shift" not in parts:
        return q * scale
    numbers = torch.stack((q // 16, q % 16), dim=-1)                 # two of 4 bits in a byte
    groups = numbers.view(*scale.shape, -1).float() - 8              # (R, groups, GROUP)
    return (groups * scale.unsqueeze(-1) + parts["shift"].float().unsqueeze(-1)).flatten(1)


def load_weights(model, weights: dict, path) -> None:
    """Copy `weights` into `model`, names and shapes exactly. Raises ValueError naming path and what does not fit."""
    try:         # torch.compile puts _orig_mod. in front of a module's names
        bare(model).load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        reasons = str(error).partition("\n")[2].split()              # after "Error(s) in loading …", a line a reason
        raise ValueError(f"{path} does not fit this model: {' '.join(reasons)[:300]}") from error


def load_optimizer(optimizer, state, path) -> None:
    """Copy a saved optimizer state into one optimizer or a list of them. Raises ValueError naming the path."""
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    states = state if isinstance(state, list) else [state]
    try:
        if len(states) != len(optimizers) or state is None:
            raise ValueError(f"{0 if state is None else len(states)} states for {len(optimizers)} optimizers")
        for one, saved in zip(optimizers, states):
            one.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no state of this {type(optimizers[0]).__name__} ({error}); go on with the "
                         "optimizer it was trained with") from error


def load_checkpoint(path, model=None, optimizer=None) -> int:
    """Fill `model` and `optimizer` (or None) from a path or file object; returns the step. Raises as those above."""
    entries = read_checkpoint(path)
    if model is not None:
        load_weights(model, entries["model"], path)
    if optimizer is not None:
        load_optimizer(optimizer, entries.get("optimizer"), path)
    return entries["step"]
