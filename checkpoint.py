"""What a stage leaves on disk, whole or not at all: training states, token files and meta.json.

    data/NAME/   train.bin val.bin     raw little-endian ids, no header       open_tokens
                 meta.json             dtype, vocab_size, sizes, tokenizer     read_meta
    out/NAME/    ckpt.pt best.pt       a training state                        save_checkpoint, load_checkpoint

A state is one dict of tensors and plain containers. It is written to `ckpt.pt.tmp`, flushed to the disk, then renamed:
a kill or a full disk leaves the old file or the new one, whole. On opening, a pickle that holds code is refused.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np                       # torch takes two seconds and is imported for states alone


def write_atomically(path, write) -> None:
    """`write(file)` on a temporary file, renamed over `path`. Raises OSError naming path, or what `write` raises."""
    path = claim_file(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__     # torch.save's own hides the disk's
        if isinstance(cause, OSError) and cause.errno:                         # without one: of what was read
            raise OSError(cause.errno, f"{path} could not be written and is unchanged: {cause.strerror}") from error
        raise


def write_text(path, *parts: str) -> None:
    """Write UTF-8, whole or not at all; halves of surrogate pairs become question marks."""
    write_atomically(path, lambda file: file.writelines(part.encode("utf-8", "replace") for part in parts))


def claim_file(path, inputs=()) -> Path:
    """A file to write, checked before hours are spent on it. Raises OSError, and ValueError for one of `inputs`."""
    path = Path(path)
    if path.resolve() in [Path(one).resolve() for one in inputs]:
        raise ValueError(f"{path} is read from and would be overwritten; give another name")
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise OSError(f"{path} cannot be written; give the name of a regular file in a folder that exists")
    return path


@contextlib.contextmanager
def only_writer(folder):
    """Make `folder` and hold it for this process, where the system has such locks: two that write there spoil both
    results. Raises ValueError when another one holds it. A folder that is still empty in the end goes again."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if os.name == "posix":
            import fcntl
            lock = [os.open(folder, os.O_RDONLY)]
            close = held.callback(lambda: lock and os.close(lock.pop()))
            os.register_at_fork(after_in_child=close)    # else a worker that outlives this process held the lock
            try:
                fcntl.flock(lock[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is being written by another process; give another folder") from None
        held.callback(lambda: os.listdir(folder) or os.rmdir(folder))
        yield


def sha256(path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def claim_out_dir(out_dir, overwrite: bool = False, inputs=()) -> None:
    """Raises ValueError for an output folder that holds a run, unless `overwrite`, or that is one of `inputs`."""
    if Path(out_dir).resolve() in [Path(folder).resolve() for folder in inputs if folder]:
        raise ValueError(f"{out_dir} is read from and would be overwritten; give another folder (--out_dir=…)")
    if not overwrite and any((Path(out_dir) / name).exists() for name in ("ckpt.pt", "best.pt", "log.jsonl")):
        raise ValueError(f"{out_dir} holds a run; give another folder, --overwrite=true or, in train.py, --resume=true")


def forget_former(folder) -> None:
    """Remove what a run that is written over left beside the ckpt.pt that has taken its place."""
    for name in ("best.pt", "log.jsonl"):
        (Path(folder) / name).unlink(missing_ok=True)


def read_meta(folder) -> dict:
    """meta.json of a data folder, or nanoGPT's convention without one, uint16. Raises ValueError if it does not fit."""
    path, tokenizer = Path(folder) / "meta.json", Path(folder) / "tokenizer.json"
    if not path.exists():
        return {"dtype": "uint16"}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["dtype"] not in ("uint16", "uint32") or int(meta["vocab_size"]) < 1:
            raise ValueError(f"dtype {meta['dtype']!r} must be uint16 or uint32, vocab_size above 0")
        if meta.get("tokenizer_sha256") and tokenizer.is_file() and sha256(tokenizer) != meta["tokenizer_sha256"]:
            raise ValueError(f"it is of another tokenizer than {tokenizer}")
        return meta
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be used: {error!r}; run data.py prepare again") from error


def open_tokens(folder, split: str) -> np.memmap:
    """The ids of FOLDER/train.bin or val.bin, (n,), memory-mapped. Raises OSError or ValueError naming the path."""
    path = Path(folder) / f"{split}.bin"
    dtype = np.dtype(read_meta(folder)["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a positive multiple of {dtype.itemsize} ({dtype.name})")
    return np.memmap(path, dtype=dtype, mode="r")


def save_checkpoint(model, optimizer, step: int, path, **more) -> None:
    """Write model (or its state dict), optimizer (one, a list, their state dicts, None), step and what else must last
    to `path`, or a binary file object. Raises OSError naming the path, ValueError for what could not be read again."""
    import torch
    while (held := [*getattr(model, "_modules", ())]) in (["module"], ["_orig_mod"]):    # of DDP, of torch.compile
        model = getattr(model, held[0])
    if any(getattr(p, "cuts", None) for p in getattr(model, "parameters", list)()):
        raise ValueError(f"{path}: this model holds one rank's part of its matrices; save full_state_dict(model)")
    things = [model, *optimizer] if isinstance(optimizer, (list, tuple)) else [model, optimizer]
    states = [one.state_dict() if hasattr(one, "state_dict") else one for one in things if one is not None]
    entries = {"format_version": 1, "model": states[0], "optimizer": states[1:], "step": int(step)}
    if dataclasses.is_dataclass(getattr(model, "config", None)):
        entries["model_config"] = dataclasses.asdict(model.config)
    if hasattr(path, "write"):
        return torch.save(entries | more, path)
    def write(file):
        torch.save(entries | more, file)
        read_checkpoint(file, "meta")    # names and shapes: only what can be read replaces the old file
    write_atomically(path, write)


def read_checkpoint(path, map_location="cpu") -> dict:
    """The dict stored at `path` or in a binary file object. Raises FileNotFoundError, ValueError naming the path."""
    import torch
    if not hasattr(path, "read") and not Path(path).is_file():
        names = ", ".join(file.name for file in Path(path).parent.glob("*")) or "nothing"
        raise FileNotFoundError(f"no checkpoint at {path} (there is {names}); train one first, or give another folder")
    if not zipfile.is_zipfile(path):     # a zip archive's directory stands at its end, so a part has none
        raise ValueError(f"{path} is cut short, or is no file of torch.save's at all")
    if hasattr(path, "seek"):
        path.seek(0)
    try:
        entries = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        code = str(error).partition("GLOBAL ")[2].split(" ")[0]
        raise ValueError(f"{path} holds pickled code ({code}), which is refused") from error
    except torch.OutOfMemoryError:
        raise                            # no fault of the file
    except RuntimeError as error:        # damaged inside
        raise OSError(f"{path} could not be read: {error}") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("model"), dict) or "step" not in entries:
        raise ValueError(f"{path} is not a checkpoint: it must hold a dict with 'model', tensors by name, and 'step'")
    if "quantized" in entries:           # what compress.py wrote: every page gets the rounded weights
        for name, parts in entries["quantized"]["weights"].items():
            entries["model"][name] = multiplied_out(parts).to(next(iter(entries["model"].values())).dtype)
    return entries


def multiplied_out(parts: dict):
    """The matrix (R, C) in float32 of {q, scale} in int8 or of {q, scale, shift} in int4; compress.py says how."""
    q, scale = parts["q"], parts["scale"].float()
    if "shift" not in parts:
        return q * scale
    numbers = q.unsqueeze(-1) >> q.new_tensor([4, 0]) & 15           # two of 4 bits in a byte
    groups = numbers.view(*scale.shape, -1).float() - 8              # (R, groups, GROUP)
    return (groups * scale.unsqueeze(-1) + parts["shift"].float().unsqueeze(-1)).flatten(1)


def load_weights(model, weights: dict, path) -> None:
    """Copy `weights` into `model`, names and shapes exactly. Raises ValueError naming path and what does not fit."""
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}         # of torch.compile
    try:
        getattr(model, "_orig_mod", model).load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this model: {' '.join(str(error).split())[:300]}") from error


def load_optimizer(optimizer, state, path) -> None:
    """Copy a saved optimizer state into one optimizer or a list of them. Raises ValueError naming the path."""
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    try:
        for one, saved in zip(optimizers, state if isinstance(state, list) else [state], strict=True):
            one.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no state of this {type(optimizers[0]).__name__}, so --init_from= instead of "
                         f"--resume: {error}") from error


def load_checkpoint(path, model=None, optimizer=None) -> int:
    """Fill `model` and `optimizer` (or None) from a path or file object; returns the step. Raises as those above."""
    entries = read_checkpoint(path)
    if model is not None:
        load_weights(model, entries["model"], path)
    if optimizer is not None:
        load_optimizer(optimizer, entries.get("optimizer"), path)
    return entries["step"]
