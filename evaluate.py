"""How good is a model? Loss, perplexity and bits per byte over a whole text.

    python evaluate.py out/shakespeare                     the run's own validation split
    python evaluate.py out/shakespeare --data=notes.txt    any text, or a .bin of the run's tokenizer

Loss and perplexity count per token, and a token of one tokenizer is not a token of another; bits per byte divides by
what is the same for all, the bytes of the text, and is how compression is measured. None of them says whether
the model is of any use.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import load_model, read_checkpoint
from configurator import command_line, fail
from model import bits_per_byte, token_losses


@dataclass
class EvaluateConfig:
    """What `python evaluate.py OUT_DIR` can be told."""
    data: str | None = None              # a text (.txt) or token file (.bin); none = val.bin of the run's data_dir
    stride: int | None = None            # windows move on by so many tokens; none = half a context
    device: str = "cpu"                  # cpu, cuda, mps
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


def perplexity(model, tokens, n_bytes: int | None = None, stride: int | None = None, batch_size: int = 16) -> dict:
    """Loss (nats per token), perplexity, bits_per_byte (None without n_bytes) and tokens of a sequence of ids.

    tokens: (n,) ids. n_bytes: bytes of UTF-8 that all of them stand for. The first token has nothing before it and is
    not predicted; the others have at least context_length - stride tokens before them, as far as the text has so many.
    """
    was_training = model.training
    losses = token_losses(model.eval(), tokens, stride, batch_size).double()
    model.train(was_training)
    loss = losses.mean().item()
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": len(tokens),
            "bits_per_byte": bits_per_byte(loss, len(tokens), n_bytes) if n_bytes else None}


def read_tokens(path, tokenizer, meta_dtype: str | None = None):
    """(ids, bytes of text) of a text or of a .bin. Raises OSError or ValueError naming the path."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a text (.txt) or a token file (.bin)")
    if path.suffix == ".bin":
        dtype = meta_dtype or ("uint16" if tokenizer is None or tokenizer.vocab_size <= 65_536 else "uint32")
        ids = np.fromfile(path, dtype=np.dtype(dtype).newbyteorder("<"))
        n_bytes = None
        if tokenizer is not None:
            if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
                raise ValueError(
                    f"{path} holds id {ids.max()}, the tokenizer has {tokenizer.vocab_size}: made with another one"
                )
            size_of = np.zeros(tokenizer.vocab_size, dtype=np.int64)
            for token, piece in tokenizer.vocab.items():
                size_of[token] = len(piece)
            n_bytes = int(size_of[ids].sum())
        return ids, n_bytes
    if tokenizer is None:
        raise ValueError(f"{path} is text, and this run has no tokenizer.json to read it with")
    raw = path.read_bytes()
    try:
        return np.array(tokenizer.encode(raw.decode("utf-8")), dtype=np.int64), len(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None


USAGE = "usage: python evaluate.py OUT_DIR [--data=FILE] [--key=value …]"


def main(argv: list[str]) -> None:
    """Score the folder of a run; a mistake exits with status 2."""
    _, files, config, _ = command_line(EvaluateConfig, argv, USAGE)
    if len(files) != 1:
        fail(f"give one folder of a training run. {USAGE}")
    try:
        model, tokenizer = load_model(files[0], config.device, config.checkpoint)
        path = config.data
        if path is None:
            trained = read_checkpoint(Path(files[0]) / config.checkpoint).get("train_config") or {}
            path = Path(trained.get("data_dir", "")) / "val.bin"
        tokens, n_bytes = read_tokens(path, tokenizer)
        started = time.perf_counter()
        figures = perplexity(model, tokens, n_bytes, config.stride)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    bits = figures["bits_per_byte"]
    print(f"{path}: {figures['tokens']:,} tokens, {time.perf_counter() - started:.1f} s | loss {figures['loss']:.4f} | "
          f"perplexity {figures['perplexity']:.2f} | bits per byte {'n/a' if bits is None else f'{bits:.4f}'}")


if __name__ == "__main__":
    main(sys.argv[1:])
