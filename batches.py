"""From token files to batches: which windows of a long text are shown, and in what order.

A token file is one long row of ids. A training sequence is a window of it, and its target the same window one further:

    ids        5  9  2  7  7  1  3  8            context_length = 4
    inputs        9  2  7  7                     one window, starting at 1
    targets          2  7  7  1                  what each position is to predict

`random` draws the starts uniformly, as nanoGPT does: after an epoch's worth of them a share 1/e of the text has not been
seen. `epochs` cuts the text into windows side by side and shows each once before any comes again; on small corpora, seen
a few times, that is worth a little (results/train.md).

    python -c "import batches; print(batches.get_batch(range(100), 2, 8, 'cpu'))"
"""
from pathlib import Path

import numpy as np
import torch

from checkpoint import sha256
from data import open_tokens, read_meta

NANOGPT_VOCABULARY = 50_304              # of token files without meta.json: GPT-2's 50,257 ids, rounded up


def get_batch(tokens, batch_size: int, context_length: int, device, generator=None, starts=None, vocab_size=None):
    """Random windows of a long sequence of ids: (inputs, targets), each (batch_size, context_length) int64 on `device`.

    tokens: (n,) ids, a NumPy array, a memory map, a list or a tensor on the CPU. The starts are uniform over
    0 … n - context_length - 1, all of which leave room for the target one further on; or those given. Raises
    ValueError when there is no room for one, or an id is not below vocab_size.
    """
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context_length} and the token after; "
                         "give more data or a shorter context_length")
    if starts is None:
        starts = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    tokens = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
    ids = tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64)
    if vocab_size is not None:                     # here, as a GPU would only say "device-side assert"
        check_ids(ids, vocab_size, "the data")
    ids = torch.from_numpy(ids)
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        ids = ids.pin_memory()                     # from there the copy runs beside the GPU's arithmetic
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Loader:
    """The training batches, in an order fixed by the seed; `position` counts the sequences handed out so far.

    The order of an epoch depends on the seed and the epoch alone, so the position is all that a checkpoint needs; random
    windows need the generator's state besides. epochs: windows side by side instead of random ones.
    """

    def __init__(self, tokens, sequences: int, context_length: int, device, seed: int, epochs: bool, vocab_size=None):
        self.tokens, self.sequences, self.context_length, self.device = tokens, sequences, context_length, device
        self.seed, self.epochs, self.vocab_size = seed, epochs, vocab_size
        self.generator = torch.Generator().manual_seed(seed)
        self.n_windows = max(1, (len(tokens) - 1) // context_length)
        self.position, self.epoch, self.order = 0, None, None

    def next(self):
        """(inputs, targets) of the next step, each (sequences, context_length)."""
        starts = None
        if self.epochs:
            starts = np.array([self.start(self.position + i) for i in range(self.sequences)])
        self.position += self.sequences
        return get_batch(self.tokens, self.sequences, self.context_length, self.device, self.generator, starts,
                         self.vocab_size)

    def start(self, position: int) -> int:
        """Where in the text the sequence at this position of all epochs begins."""
        epoch, place = divmod(position, self.n_windows)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n_windows)
        return self.order[place] * self.context_length


# --- what must fit together ---

def check_ids(ids, vocab_size: int, where) -> None:
    """Raises ValueError when an id has no row in the embedding."""
    if ids.max() >= vocab_size:
        raise ValueError(f"{where} holds id {ids.max()}, but vocab_size is {vocab_size}; the tokens were made with "
                         "another tokenizer: prepare them again, or leave vocab_size to the data")


def open_data(data_dir, context_length: int, vocab_size: int | None = None) -> tuple[dict, dict, int]:
    """(meta.json, {"train": ids, "val": ids}, vocabulary size). Raises ValueError for files that do not fit."""
    folder, meta = Path(data_dir), read_meta(data_dir)
    splits = {split: open_tokens(folder, split) for split in ("train", "val")}
    for split, tokens in splits.items():
        if meta.get(f"{split}_tokens", len(tokens)) != len(tokens):
            raise ValueError(f"{folder}/{split}.bin has {len(tokens):,} tokens, its meta.json says "
                             f"{meta[f'{split}_tokens']:,}: of two preparations; run data.py prepare again")
        if len(tokens) <= context_length:
            raise ValueError(f"{folder}/{split}.bin has {len(tokens):,} tokens, too few for one window of "
                             f"context_length={context_length} and the token after; give more text, or less context")
    made_with, tokenizer = meta.get("tokenizer_sha256"), folder / "tokenizer.json"
    if made_with and tokenizer.exists() and sha256(tokenizer) != made_with:
        raise ValueError(f"{tokenizer} is not the tokenizer that {folder}/meta.json names (SHA-256 {made_with[:12]}…): "
                         "one of them is of another preparation; run data.py prepare again")
    if (folder / "meta.json").exists() and not (meta.get("vocab_size") or vocab_size):
        raise ValueError(f"{folder}/meta.json has no vocab_size; prepare the data again, or give --vocab_size")
    vocab_size = vocab_size or meta.get("vocab_size", NANOGPT_VOCABULARY)
    check_ids(splits["val"], vocab_size, f"{folder}/val.bin")      # train.bin may be huge: it is looked at as it is drawn
    return meta, splits, vocab_size


def check_tokenizer(entries: dict, path: Path, data_dir, made_with: str | None) -> None:
    """Raises ValueError when the checkpoint `entries` of `path` reads other ids than data_dir holds (SHA-256 made_with)."""
    trained_with = entries.get("tokenizer_sha256")
    if trained_with and made_with is None:
        raise ValueError(f"{data_dir} has no meta.json that names its tokenizer, and {path} was trained with one of SHA-256 "
                         f"{trained_with[:12]}…; give data made by data.py prepare --tokenizer={path.parent}")
    if trained_with != made_with:
        raise ValueError(f"{path} was trained with another tokenizer (SHA-256 {str(trained_with)[:12]}) than {data_dir} was "
                         f"made with ({made_with[:12]}); give data made by data.py prepare --tokenizer={path.parent}")
