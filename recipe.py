"""What a run is made of: its settings, its batches, an optimizer for each kind of parameter, a learning rate.

A batch is windows of one long row of ids; the targets are the same windows one further:

    ids        5  9  2  7  7  1  3  8            context_length = 4
    inputs        9  2  7  7                     the window that starts at 1
    targets          2  7  7  1                  what each position is to predict

loader=random draws the starts uniformly, as nanoGPT does; after as many tokens as the text has, about 1/e of it has not
been seen. loader=epochs cuts the text into windows side by side and shows each once before any comes again.

    kind of parameter                      decays   optimizer (optimizer=muon)   peak learning rate
    matrices in attention, feed-forward    yes      AdamW (Muon, no decay)       lr (muon_lr)
    the head                               yes      AdamW                        lr
    embedding tables                       no       AdamW                        embedding_lr
    vectors: norms, biases, gates          no       AdamW                        lr
"""
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

import optim
from checkpoint import open_tokens, read_checkpoint, read_meta
from machine import DTYPES
from model import ModelConfig, Transformer

NANOGPT_VOCABULARY = 50_304              # of token files without meta.json: GPT-2's 50,257 ids, rounded up
NO_SHAPE = ("attention_backend", "fused_loss", "balance_weight", "balance_rate", "mtp_weight")    # how, not what
OPTIMIZERS = {  # a new one is a class in optim.py and a line here: the class, its settings of ours, what it does
    "adamw": (optim.AdamW, lambda c: dict(betas=(c.beta1, c.beta2)), "a step for each number, by its gradients' size"),
    "muon": (optim.Muon, lambda c: dict(momentum=c.momentum, ns_steps=c.muon_steps), "matrices of blocks; else adamw"),
    "sgd": (optim.SGD, lambda c: dict(momentum=c.momentum), "down the gradient, with momentum"),
    "adagrad": (optim.AdaGrad, lambda c: dict(), "divides by all gradients so far"),
    "rmsprop": (optim.RMSProp, lambda c: dict(beta=c.beta2), "divides by the recent ones")}


@dataclass
class TrainConfig(ModelConfig):
    """Every setting of a training run, the model's included."""
    vocab_size: int | None = None            # rows of the embedding; none = as many as the tokenizer has
    data_dir: str = "data/shakespeare"       # token files; a corpus that data.py knows by this name is prepared
    out_dir: str = "out/shakespeare"         # checkpoint, log and plot
    init_from: str | None = None             # OUT_DIR of a model to fine-tune: its shape and weights, a new schedule
    resume: bool = False                     # go on from OUT_DIR/ckpt.pt
    overwrite: bool = False                  # put a new run in the place of the one that OUT_DIR holds
    max_steps: int | None = None             # stop after so many steps
    max_minutes: float | None = None         # stop after so much training, evaluation and checkpoints not counted
    batch_tokens: int = 8192                 # tokens per optimizer step
    micro_batch_size: int | None = None      # sequences per forward pass; none = the whole step at once
    loader: str = "random"                   # random windows | epochs (windows side by side, shuffled anew each epoch)
    optimizer: str = "adamw"                 # one of those listed above
    lr: float = 1e-3                         # peak learning rate of all but muon
    muon_lr: float = 0.02                    # muon's peak learning rate
    muon_steps: int = 5                      # muon's rounds of matrix products: fewer are faster, less orthogonal
    embedding_lr: float | None = None        # peak learning rate of the embedding tables; none = lr
    weight_decay: float = 0.1                # of matrices, but for muon's
    beta1: float = 0.9                       # adamw's decay of the first moment
    beta2: float = 0.95                      # adamw's and rmsprop's decay of the second moment
    momentum: float = 0.95                   # muon's and sgd's
    schedule: str = "cosine"                 # cosine | wsd (constant, then a linear decay), after the warmup
    warmup_steps: int = 50                   # learning rate rises linearly from 0 over these
    decay_fraction: float = 0.3              # wsd: the last part of the run, in which the rate falls; 0 = it does not
    min_lr_factor: float = 0.1               # the rate ends at this share of its peak
    grad_clip: float = 1.0                   # largest global gradient norm; inf = no clipping
    eval_every: int = 200                    # steps between evaluations; 0 = only at the end
    eval_steps: int = 20                     # batches of an evaluation during training
    log_every: int | None = None             # steps between log lines; none = about a hundred lines in all
    checkpoint_every: int | None = None      # steps between checkpoints; none = at every evaluation
    teacher: str | None = None               # OUT_DIR of a trained model to learn from besides the text (distillation)
    num_samples: int = 0                     # texts that sample.py writes at the end
    seed: int = 1337                         # of weights and batches
    device: str | None = None                # cpu, cuda, cuda:1, mps; none = the best there is
    dtype: str | None = None                 # float32 | bfloat16 | float16 of matrix products; none = the fast one
    threads: int | None = None               # CPU threads; none = all, fewer while another program is busy
    activation_checkpointing: bool = False   # keep only each block's input for backward and compute the rest again
    parallel: str = "ddp"                    # under torchrun: ddp | zero1 | fsdp, what ranks divide; see parallel.py
    tp: int = 1                              # ranks that share every matrix (tensor parallel); the rest divide the data
    pp: int = 1                              # stages of layers, each on ranks of its own (pipeline)
    compile: bool | None = None              # torch.compile; none = on CUDA only

    def __post_init__(self):
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", ("cosine", "wsd")), ("dtype", (None, *DTYPES)),
                              ("parallel", ("ddp", "zero1", "fsdp")), ("loader", ("random", "epochs"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name in ("batch_tokens", "eval_steps", "muon_steps", "tp", "pp", "vocab_size", "log_every",
                     "micro_batch_size", "max_steps", "checkpoint_every", "threads"):
            if given.get(name, 1) < 1:
                raise ValueError(f"{name}={given[name]} must be at least 1")
        for name in ("seed", "warmup_steps", "eval_every", "num_samples", "lr", "muon_lr", "weight_decay"):
            if not 0 <= given[name] < math.inf:
                raise ValueError(f"{name}={given[name]} must be at least 0")
        for name in ("max_minutes", "embedding_lr", "grad_clip"):
            if not given.get(name, 1) > 0 or given.get(name) == math.inf and name != "grad_clip":
                raise ValueError(f"{name}={given[name]} must be above 0" + " and finite" * (name != "grad_clip"))
        for name in ("beta1", "beta2", "momentum", "min_lr_factor", "decay_fraction"):
            if not 0 <= given[name] <= 1:
                raise ValueError(f"{name}={given[name]} must be from 0 to 1")
        if self.batch_tokens < self.context_length:
            raise ValueError(f"batch_tokens={self.batch_tokens} is less than context_length={self.context_length}; "
                             "give a shorter --context_length, or more --batch_tokens")
        if self.teacher and self.fused_loss:
            raise ValueError(f"teacher={self.teacher} needs logits, which fused_loss=true never makes; drop one")
        cut = f"parallel={self.parallel}, tp={self.tp}, pp={self.pp}"
        if self.optimizer == "muon" and (self.parallel == "fsdp" or self.tp > 1):
            raise ValueError(f"{cut} cuts matrices and optimizer=muon needs whole ones; choose optimizer=adamw")
        if self.divided and self.compile:
            raise ValueError(f"{cut} sends from within the forward pass, which compile=true cannot follow; drop one")
        if not self.start:                     # otherwise the shape is the checkpoint's
            self.model_config(self.vocab_size or NANOGPT_VOCABULARY)

    @property
    def divided(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.parallel == "fsdp" or self.tp > 1 or self.pp > 1

    @property
    def start(self) -> Path | None:
        """The checkpoint that the run starts from."""
        folder = self.out_dir if self.resume else self.init_from
        return Path(folder) / "ckpt.pt" if folder else None

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's part of the settings."""
        values = {field.name: getattr(self, field.name) for field in fields(ModelConfig) if field.init}
        return ModelConfig(**values | {"vocab_size": vocab_size})


def take_shape(config: TrainConfig, given=None) -> TrainConfig:
    """`config` with the model's shape of the checkpoint that it starts from, if any. given: the settings that were
    asked for; without, all that are not at their default. Raises ValueError for one that the checkpoint contradicts.
    A context_length below the checkpoint's is no contradiction, but where positions are a table of weights."""
    if not config.start or getattr(config, "shape_of", None) == config.start:      # taken before
        return config
    saved = read_checkpoint(config.start).get("model_config") or {}
    shape = {field.name: saved[field.name] for field in fields(ModelConfig)
             if field.init and field.name in saved and field.name not in NO_SHAPE}
    if given is None:
        given = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    if "context_length" in shape.keys() & set(given) and not config.resume and saved.get("position") != "learned":
        shape["context_length"] = min(config.context_length, shape["context_length"])
    for name in shape.keys() & set(given):
        if getattr(config, name) not in (None, shape[name]):
            raise ValueError(f"{name}={getattr(config, name)} does not fit this model: {config.start} has {name}="
                             f"{shape[name]}; leave {name} out, or train a new model in another out_dir")
    config, config.shape_of = replace(config, **shape), config.start
    return config


def get_batch(tokens, batch_size: int, context_length: int, device, generator=None, starts=None, vocab_size=None):
    """Random windows of a long sequence of ids: (inputs, targets), each (batch_size, context_length) int64 on `device`.
    tokens: (n,) ids, a NumPy array, a memory map, a list or a tensor on the CPU. The starts are those given, or uniform
    over 0 … n - context_length - 1. Raises ValueError when there is no room, or for ids of the vocab_size on."""
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context_length} and the token after; "
                         "give more data or a shorter context_length")
    if starts is None:
        starts = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    ids = torch.from_numpy(np.asarray(tokens)[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    if vocab_size is not None:                     # here, as a GPU would only say "device-side assert"
        check_ids(ids, vocab_size, "the data")
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        ids = ids.pin_memory()                     # from there the copy runs beside the GPU's arithmetic
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Loader:
    """The training batches; `position` counts the sequences handed out so far. epochs: windows side by side, in an
    order that follows from seed and position; random ones need the generator's state."""

    def __init__(self, tokens, sequences: int, context_length: int, device, seed: int, epochs: bool, vocab_size=None):
        self.tokens, self.sequences, self.context_length, self.device = tokens, sequences, context_length, device
        self.seed, self.epochs, self.vocab_size = seed, epochs, vocab_size
        self.generator = torch.Generator().manual_seed(seed)
        self.position, self.epoch, self.order = 0, None, None

    def next(self):
        """(inputs, targets) of the next step, each (sequences, context_length)."""
        positions = range(self.position, self.position + self.sequences)
        self.position += self.sequences
        starts = np.array([self.start(position) for position in positions]) if self.epochs else None
        return get_batch(self.tokens, self.sequences, self.context_length, self.device, self.generator, starts,
                         self.vocab_size)

    def start(self, position: int) -> int:
        """Where in the text the sequence at this position of all epochs begins."""
        n_windows = max(1, (len(self.tokens) - 1) // self.context_length)
        epoch, place = divmod(position, n_windows)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(n_windows)
        return self.order[place] * self.context_length


def check_ids(ids, vocab_size: int, where) -> None:
    """Raises ValueError when an id has no row in the embedding."""
    if ids.max() >= vocab_size:
        raise ValueError(f"{where} holds id {ids.max()}, but vocab_size is {vocab_size}; the tokens were made with "
                         "another tokenizer: prepare them again, or leave vocab_size to the data")


def open_data(data_dir, context_length: int, vocab_size: int | None = None) -> tuple[dict, dict, int]:
    """(meta.json, {"train": ids, "val": ids}, vocabulary size). Raises ValueError for files that do not fit."""
    meta, splits = read_meta(data_dir), {split: open_tokens(data_dir, split) for split in ("train", "val")}
    for split, tokens in splits.items():
        if len(tokens) <= context_length:
            raise ValueError(f"{data_dir}/{split}.bin has {len(tokens)} tokens, too few for a window of context_length="
                             f"{context_length} and the token after; give more text, or a shorter context")
        if len(tokens) != meta.get(f"{split}_tokens", len(tokens)):    # the bits per byte would be wrong, and unnoticed
            raise ValueError(f"{data_dir}/{split}.bin has {len(tokens)} tokens, its meta.json says "
                             f"{meta[f'{split}_tokens']}; copy the whole folder, or run data.py prepare again")
    vocab_size = vocab_size or meta.get("vocab_size", NANOGPT_VOCABULARY)
    check_ids(splits["val"], vocab_size, f"{data_dir}/val.bin")      # of train.bin each batch is
    return meta, splits, vocab_size


def check_tokenizer(entries: dict, path: Path, data_dir, made_with: str | None) -> None:
    """Raises ValueError when a checkpoint reads other ids than data_dir holds, made with the tokenizer of that hash."""
    trained_with = entries.get("tokenizer_sha256")
    reason = f"{data_dir}/meta.json is missing, or does not name the tokenizer of its tokens"
    if made_with is not None:
        reason = (f"{path} was trained with another tokenizer (SHA-256 {str(trained_with)[:9]}) than {data_dir} was "
                  f"made with ({made_with[:9]} by its meta.json)")
    if trained_with != made_with:
        raise ValueError(f"{reason}; give data made by data.py prepare --tokenizer={path.parent}")


def make_optimizers(model: Transformer, config: TrainConfig, make=lambda cls, params, **more: cls(params, **more)):
    """One or two optimizers in a list; each group keeps its peak rate as `peak_lr`, which the schedule scales.
    Vectors do not decay: a norm pulled to zero has nothing to win. Nor does an embedding, a table of vectors; its rows
    start at size 1 a number and most get a gradient in few steps only, so they can do with a far larger rate.
    make(class, groups, **settings): Strategy.optimizer, which may divide it."""
    hidden, others, vectors, tables = [], [], [], []
    for name, parameter in model.named_parameters():
        if "embeddings" in name:
            tables.append(parameter)
        elif parameter.dim() < 2:
            vectors.append(parameter)
        elif ".attn." in name or ".ffn." in name:
            hidden.append(parameter)
        else:
            others.append(parameter)
    muon = config.optimizer == "muon"
    groups = [{"params": others if muon else hidden + others, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0},
              {"params": tables, "weight_decay": 0.0, "lr": config.embedding_lr or config.lr}]
    jobs = {"adamw" if muon else config.optimizer: [group for group in groups if group["params"]]}
    if muon:
        jobs["muon"] = [{"params": hidden, "weight_decay": 0.0, "lr": config.muon_lr}]
    optimizers = []
    for name, groups in jobs.items():
        cls, settings, _ = OPTIMIZERS[name]
        optimizers.append(make(cls, groups, lr=config.lr, **settings(config)))
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def all_groups(optimizers: list) -> list[dict]:
    """The parameter groups of all of them."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def lr_factor(config: TrainConfig, step: int, total_steps: float) -> float:
    """The learning rate at `step` (from 1) of a run of total_steps, as a share of its peak."""
    low, warmup = config.min_lr_factor, config.warmup_steps
    if config.schedule == "cosine":
        return optim.cosine_schedule(step, 1.0, low, warmup, total_steps)
    decay = 0 if math.isinf(total_steps) else total_steps * config.decay_fraction      # inf: the clock has not begun
    return optim.wsd_schedule(step, 1.0, low, warmup, max(total_steps - decay - warmup, 0), max(decay, 1))


class LossScale:
    """What a float16 loss is multiplied by before backward, and its gradients divided by after (1710.03740, 3.2), as
    float16 has no numbers below 6e-8, where many gradients lie. One that overflows instead costs its step and halves
    the scale; GROW_EVERY good steps in a row double it. Off, for other dtypes, it is 1."""
    GROW_EVERY = 2000

    def __init__(self, on: bool):
        self.on, self.scale, self.good_steps = on, 2.0 ** 16 if on else 1.0, 0

    def update(self, finite: bool) -> None:
        if self.on:
            self.good_steps = self.good_steps + 1 if finite else 0
            if not finite:
                self.scale = max(self.scale / 2, 1.0)
            elif self.good_steps % self.GROW_EVERY == 0:
                self.scale *= 2
