"""Train a Transformer on token files: `python train.py` is a whole run on a laptop, from raw text to samples.

    python train.py                                            config_shakespeare.py, under 3 minutes on two CPU cores
    python train.py config_tinystories.py --max_minutes=60     another corpus and model, same code
    python train.py --resume=true                              go on from out/shakespeare/ckpt.pt
    python train.py plot out/a out/b                           losses of several runs in one picture
    python train.py sweep lr=1e-3,3e-3 seed=1,2,3 --max_steps=500 --out_dir=out/rates      a grid; table and plot of it

The loop is nanoGPT's idea of one: draw a batch, forward, backward, clip, step, and now and then evaluate, log and save.
Three departures. The step is configured in tokens (`batch_tokens`); micro-batches follow from it. A run may be limited
by the clock instead of by steps, and then the learning-rate schedule is fitted to the clock. And nothing of a run is
lost: every random draw has its own generator, all of it is in the checkpoint, and a signal saves before it stops.

Papers: Kaplan 2020 (2001.08361) for the shape of it, Chowdhery 2022 (PaLM, 2204.02311, appendix B) for the MFU.
"""
import contextlib
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute

import accounting
import data
import optim
import parallel
from checkpoint import (load_checkpoint, load_model, load_optimizer, load_weights, read_checkpoint,  # noqa: F401
                        save_checkpoint, write_atomically)
from compress import distillation_loss
from configurator import command_line, fail, grid, print_config
from machine import DTYPES, Stop, keep_freed_memory, peak_flops, pick_device, pick_dtype
from model import ModelConfig, Transformer, bits_per_byte, perplexity_of, token_losses

DEFAULT_CONFIG = "config_shakespeare.py"
DEFAULT_MINUTES = 2.0                    # when neither max_steps nor max_minutes is given
BAD_IN_A_ROW = 10                        # bad steps that skip_bad_steps takes for accidents; more are a divergence
OTHERS = {"sgd": optim.SGD, "adagrad": optim.AdaGrad, "rmsprop": optim.RMSProp}
@dataclass
class TrainConfig(ModelConfig):
    """Every setting of a training run, the model's included."""
    vocab_size: int | None = None            # rows of the embedding; none = as many as the tokenizer has
    data_dir: str = "data/shakespeare"  # token files; a corpus that data.py knows by this name is prepared when missing
    out_dir: str = "out/shakespeare"         # checkpoint, log and plot
    max_steps: int | None = None             # stop after so many steps
    max_minutes: float | None = None         # stop after so much training, evaluation and checkpoints not counted
    batch_tokens: int = 8192                 # tokens per optimizer step
    micro_batch_size: int | None = None      # sequences per forward pass; none = the whole step at once
    loader: str = "random"                   # random windows | epochs (windows side by side, shuffled anew each epoch)
    optimizer: str = "adamw"                 # adamw | muon (for matrices in blocks) | sgd | adagrad | rmsprop
    lr: float = 1e-3                         # peak learning rate of all but muon
    muon_lr: float = 0.02                    # muon's peak learning rate
    muon_steps: int = 5                      # muon's rounds of matrix products: fewer are faster, less orthogonal
    embedding_lr: float | None = None        # peak learning rate of the embedding tables; none = lr
    weight_decay: float = 0.1                # of matrices, but for muon's
    muon_weight_decay: float = 0.0           # of muon
    beta1: float = 0.9                       # adamw's decay of the first moment
    beta2: float = 0.95                      # adamw's and rmsprop's decay of the second moment
    momentum: float = 0.95                   # muon's and sgd's
    schedule: str = "cosine"                 # cosine | wsd | constant, after the warmup
    warmup_steps: int = 50                   # learning rate rises linearly from 0 over these
    decay_fraction: float = 0.3              # wsd: the last part of the run, in which the rate falls linearly
    min_lr_factor: float = 0.1               # the rate ends at this share of its peak
    grad_clip: float = 1.0                   # largest global gradient norm
    skip_bad_steps: bool = False             # leave out a step whose loss or gradient is not finite instead of stopping
    eval_every: int = 200                    # steps between evaluations; 0 = only at the end
    eval_steps: int = 20                     # batches of an evaluation during training
    log_every: int = 20                      # steps between log lines
    checkpoint_every: int | None = None      # steps between checkpoints; none = at every evaluation
    teacher: str | None = None               # OUT_DIR of a trained model to learn from besides the text (distillation)
    teacher_weight: float = 1.0              # weight of the divergence from the teacher in the training loss
    teacher_temperature: float = 2.0         # logits of both are divided by this for it
    num_samples: int = 0                     # texts that sample.py writes at the end
    resume: bool = False                     # go on from OUT_DIR/ckpt.pt
    seed: int = 1337                         # of weights and batches
    device: str | None = None                # cpu, cuda, cuda:1, mps; none = the best there is
    dtype: str | None = None  # float32 | bfloat16 | float16 of the matrix products; none = what the device is fast at
    activation_checkpointing: bool = False   # keep only each block's input for backward and compute the rest again
    parallel: str = "ddp"                    # under torchrun: ddp | zero1 | fsdp, what ranks divide; see parallel.py
    tp: int = 1                              # ranks that share every matrix (tensor parallel); the rest divide the data
    compile: bool | None = None              # torch.compile; none = on CUDA only

    def __post_init__(self):
        """Check what is not the model's; ModelConfig checks the rest once the vocabulary is known."""
        allowed = {"optimizer": ("adamw", "muon", *OTHERS), "schedule": ("cosine", "wsd", "constant"),
                   "dtype": (None, *DTYPES), "parallel": ("ddp", "zero1", "fsdp"), "loader": ("random", "epochs")}
        for name, options in allowed.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, options))}")
        for name in "batch_tokens log_every eval_steps micro_batch_size max_steps checkpoint_every tp".split():
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        divided = f"parallel={self.parallel}" if self.parallel == "fsdp" else f"tp={self.tp}" if self.tp > 1 else None
        for wrong, message in (
            (not (self.max_minutes or 1) > 0, f"max_minutes={self.max_minutes} must be more than 0"),
            (self.embedding_lr is not None and not 0 < self.embedding_lr < math.inf,
             f"embedding_lr={self.embedding_lr} must be above 0, or none to be lr"),
            (not self.grad_clip > 0, f"grad_clip={self.grad_clip} must be above 0; inf clips nothing"),
            (min(self.warmup_steps, self.eval_every, self.num_samples) < 0, f"warmup_steps={self.warmup_steps}, "
             f"eval_every={self.eval_every} and num_samples={self.num_samples} must be at least 0"),
            (not (0 <= self.min_lr_factor <= 1 and 0 <= self.decay_fraction <= 1),
             f"min_lr_factor={self.min_lr_factor} and decay_fraction={self.decay_fraction} must be from 0 to 1"),
            (divided and self.optimizer == "muon", f"{divided} cuts matrices and optimizer=muon needs whole ones; "
             "choose optimizer=adamw, or parallel=ddp or zero1 with tp=1"),
            (divided and self.compile, f"{divided} sends from within the forward pass, which compile=true cannot "
             "follow; leave one of the two out"),
            (self.parallel == "fsdp" and self.activation_checkpointing, "parallel=fsdp lets weights go after a layer "
             "and activation_checkpointing=true needs them again; leave one of the two out"),
            (not self.teacher_weight > 0, f"teacher_weight={self.teacher_weight} must be above 0"),
            (not self.teacher_temperature > 0, f"teacher_temperature={self.teacher_temperature} must be above 0"),
            (self.teacher and self.fused_loss, "fused_loss=true never has the logits that a teacher is compared with; "
             "leave one out"),
            (self.teacher and self.tp > 1, f"tp={self.tp} cuts the logits, which a teacher needs whole; leave one out"),
            (self.batch_tokens < self.context_length,
             f"batch_tokens={self.batch_tokens} is less than one sequence of context_length={self.context_length}"),
        ):
            if wrong:
                raise ValueError(message)
        if self.max_steps is None and self.max_minutes is None:
            self.max_minutes = DEFAULT_MINUTES

    def model_config(self, vocab_size: int) -> ModelConfig:
        values = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        return ModelConfig(**values | {"vocab_size": vocab_size})


# --- batches ---

def get_batch(tokens, batch_size: int, context_length: int, device, generator=None, starts=None):
    """Random windows of a long sequence of ids: (inputs, targets), each (batch_size, context_length) int64 on `device`.

    tokens: (n,) ids, a NumPy array, a memory map, a list or a tensor on the CPU. The starts are uniform over
    0 … n - context_length - 1, all of which leave room for the target one further on; or those given. Raises
    ValueError when there is no room for one.
    """
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context_length} and the token after; "
                         "give more data or a shorter context_length")
    if starts is None:
        starts = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    tokens = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
    ids = torch.from_numpy(tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        ids = ids.pin_memory()                     # from there the copy runs beside the GPU's arithmetic
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Loader:
    """The training batches, in an order fixed by the seed: a thread makes the next one while this one is computed.

    `position` (in sequences) and `state` (of the random windows' generator) are those of the batches handed out,
    whatever the thread has made since.
    """

    def __init__(self, tokens, config: TrainConfig, sequences: int, device):
        self.tokens, self.epochs, self.seed = tokens, config.loader == "epochs", config.seed + 1
        self.shape = sequences, config.context_length, device
        self.n_windows = max(1, (len(tokens) - 1) // config.context_length)
        self.thread, self.coming = ThreadPoolExecutor(1), None
        self.generator = torch.Generator().manual_seed(self.seed)
        self.position, self.state = 0, self.generator.get_state()
        self.shuffled = functools.lru_cache(2)(
            lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n_windows))

    def next(self):
        batch, self.state = (self.coming or self.thread.submit(self.draw, self.position)).result()
        self.position += self.shape[0]
        self.coming = self.thread.submit(self.draw, self.position)
        return batch

    def draw(self, position: int):
        """(batch, state of the generator after it)."""
        starts = None
        if self.epochs:
            places = [divmod(place, self.n_windows) for place in range(position, position + self.shape[0])]
            starts = np.array([self.shuffled(epoch)[i] * self.shape[1] for epoch, i in places])
        return get_batch(self.tokens, *self.shape, self.generator, starts), self.generator.get_state()


def check_vocabulary(config: TrainConfig, meta: dict, splits: dict) -> int:
    """The vocabulary size of the run, after one look at every id. Raises ValueError when an id has no row."""
    step = 1 << 24  # a memory map read in one go would sit in memory whole
    largest = max(int(ids[i:i + step].max()) for ids in splits.values() for i in range(0, len(ids), step))
    vocab_size = config.vocab_size or meta.get("vocab_size") or (largest // 64 + 1) * 64
    if largest >= vocab_size:
        raise ValueError(f"{config.data_dir} holds id {largest}, but vocab_size is {vocab_size}; the tokens were made "
                         "with another tokenizer: prepare them again, or leave vocab_size to the data")
    return vocab_size


# --- distillation ---

def load_teacher(config: TrainConfig, vocab_size: int, tokenizer_sha256: str | None, device: str) -> Transformer:
    """The model of config.teacher, frozen. Raises ValueError when it reads other ids than the student."""
    theirs = read_checkpoint(Path(config.teacher) / "ckpt.pt").get("tokenizer_sha256")
    model = load_model(config.teacher, device)[0].requires_grad_(False)
    if theirs != tokenizer_sha256 or model.config.vocab_size != vocab_size:
        raise ValueError(
            f"teacher={config.teacher} was trained with another tokenizer (SHA-256 {str(theirs)[:12]}, vocabulary "
            f"{model.config.vocab_size:,}) than {config.data_dir} was made with ({str(tokenizer_sha256)[:12]}, "
            f"{vocab_size:,}); its logits mean other ids. Give a teacher trained on this data")
    return model


# --- the machine ---

# --- optimizers ---

def make_optimizers(model: Transformer, config: TrainConfig, make=lambda cls, groups, **more: cls(groups, **more)):
    """One or two optimizers in a list; each group keeps its peak rate as `peak_lr`, which the schedule scales.

    Matrices decay, vectors (norm weights) do not: a norm pulled to zero has nothing to win. An embedding is a table
    of vectors and is not decayed either; its rows start at size 1 a number and most get a gradient in few steps only,
    so they can do with a far larger rate. make(class, groups, **settings): parallel.Strategy.optimizer.
    """
    hidden, other, vectors, tables = [], [], [], []
    for name, parameter in model.named_parameters():
        in_block = ".attn." in name or ".ffn." in name
        (tables if "embeddings" in name else vectors if parameter.dim() < 2 else hidden if in_block
         else other).append(parameter)
    matrices = other if config.optimizer == "muon" else hidden + other
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0},
              {"params": tables, "weight_decay": 0.0, "lr": config.embedding_lr or config.lr}]
    settings = {"sgd": {"momentum": config.momentum}, "rmsprop": {"beta": config.beta2}, "adagrad": {}}
    optimizers = [make(OTHERS.get(config.optimizer, optim.AdamW), [group for group in groups if group["params"]],
                       lr=config.lr, **settings.get(config.optimizer, {"betas": (config.beta1, config.beta2)}))]
    if config.optimizer == "muon":
        optimizers.append(make(optim.Muon, hidden, lr=config.muon_lr, momentum=config.momentum,
                               weight_decay=config.muon_weight_decay, ns_steps=config.muon_steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def print_parameters(model: Transformer, optimizers: list, lr: float) -> None:
    """A line for all parameters of one shape that are treated alike, with their learning rate as a factor of `lr`."""
    names = {id(p): re.sub(r"\.\d+", ".*", name.removesuffix(".weight")) for name, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        kind = type(getattr(optimizer, "local", optimizer)).__name__             # local: what ZeRO-1 divides
        for group in optimizer.param_groups:
            treated = kind, f"{group['peak_lr'] / lr:.3g}" if lr else "-", f"{group['weight_decay']:g}"
            for p in group["params"]:
                found.setdefault((tuple(parallel.full_shape(p)), treated), []).append(names[id(p)])
    rows = []
    for (shape, treated), same in found.items():
        shown, before = "", None                                                 # a path is written once for many
        for path, dot, word in (name.rpartition(".") for name in dict.fromkeys(same)):
            shown += ", " * bool(shown) + (word if path == before else path + dot + word)
            before = path
        rows.append([shown, str(shape), len(same), *treated])
    accounting.table(f"peak learning rates as factors of lr={lr:g}:",
                     ["parameters (* = every layer)", "shape", "count", "optimizer", "factor", "decay"], rows)


def lr_factor(config: TrainConfig, step: int, total_steps: float) -> float:
    """The learning rate at `step` (from 1) of a run of total_steps, as a share of its peak."""
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        return optim.cosine_schedule(step, 1.0, config.min_lr_factor, warmup, total_steps)
    decay = total_steps * config.decay_fraction if config.schedule == "wsd" else 0
    end = math.inf if config.schedule == "constant" or math.isinf(total_steps) else max(total_steps - decay - warmup, 0)
    return optim.wsd_schedule(step, 1.0, config.min_lr_factor, warmup, end, max(decay, 1))


# --- the run ---

class Run:
    """The state of one training run: everything a checkpoint must bring back, and the steps that change it."""
    GROW_EVERY = 2000                          # good steps after which loss_scale doubles

    def __init__(self, config: TrainConfig, strategy: parallel.Strategy | None = None):
        self.config = config
        self.strategy = strategy or parallel.Strategy(config.parallel, config.tp, config.device)
        self.device = pick_device(self.strategy.device)
        if self.device == "cpu":
            keep_freed_memory()
        self.dtype = self.strategy.same(pick_dtype(config.dtype, self.device))
        self.meta = data.read_meta(config.data_dir)
        self.splits = {split: data.open_tokens(config.data_dir, split) for split in ("train", "val")}
        for split, tokens in self.splits.items():
            if self.meta.get(f"{split}_tokens", len(tokens)) != len(tokens):
                raise ValueError(f"{config.data_dir}/{split}.bin has {len(tokens):,} tokens, its meta.json says "
                                 f"{self.meta[f'{split}_tokens']:,}: of two preparations; run data.py prepare again")
            if len(tokens) <= config.context_length:
                raise ValueError(f"{config.data_dir}/{split}.bin has {len(tokens):,} tokens, too few for one window of "
                                 f"context_length={config.context_length} and the token after; give more text, or less")
        vocab_size = check_vocabulary(config, self.meta, self.splits)
        torch.manual_seed(config.seed)
        self.model = Transformer(config.model_config(vocab_size)).to(self.device)
        if config.activation_checkpointing:
            for block in self.model.layers:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = accounting.flops_per_token(self.model.config, config.context_length, True)["total"]
        # From here on self.model may hold only this rank's part.
        self.strategy.divide(self.model, None if self.dtype == "float32" else DTYPES[self.dtype])
        self.optimizers = make_optimizers(self.model, config, self.strategy.optimizer)
        cut = config.parallel == "fsdp" or config.tp > 1
        use_compile = self.device.startswith("cuda") and not cut if config.compile is None else config.compile
        self.forward = torch.compile(self.model) if use_compile else self.model
        self.sequences = config.batch_tokens // config.context_length
        self.loader = Loader(self.splits["train"], config, self.sequences, self.device)
        self.step, self.seconds, self.best_val_loss = 0, 0.0, math.inf
        # float16 has no numbers below 6e-8: the loss is scaled up before backward (1710.03740, section 3.2), for the
        # others by 1. A gradient that overflows costs the step and halves the scale, GROW_EVERY good steps double it.
        self.loss_scale, self.good_steps = 2.0 ** 16 if self.dtype == "float16" else 1.0, 0
        self.skipped = self.bad_in_a_row = 0
        self.tokenizer_sha256 = self.meta.get("tokenizer_sha256")
        self.teacher = load_teacher(config, vocab_size, self.tokenizer_sha256, self.device) if config.teacher else None

    def autocast(self):
        kind, dtype = self.device.split(":")[0], DTYPES[self.dtype]
        return torch.autocast(kind, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is further."""
        by_step = self.step / self.config.max_steps if self.config.max_steps else 0.0
        by_clock = self.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return max(by_step, by_clock)

    def total_steps(self) -> float:
        """Steps of the whole run: given, or foreseen from the share of time that those so far have taken."""
        if not self.config.max_minutes:
            return self.config.max_steps
        return self.step / self.progress() if self.step and self.progress() else math.inf

    def train_step(self):
        """One optimizer step over `sequences` sequences of all ranks; returns (loss, gradient norm, learning rate).

        Every rank draws the whole batch and takes its rows: so the run does not depend on the number of ranks. Each
        micro-batch counts by its share of the sequences, also a ragged one: no mean of means.
        """
        config = self.config
        factor = lr_factor(config, self.step + 1, self.total_steps())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        inputs, targets = self.loader.next()
        micro = config.micro_batch_size or self.sequences
        loss, batches = 0.0, list(self.strategy.micro_batches(inputs, targets, micro))
        for i, (x, y, share) in enumerate(batches, start=1):
            with self.autocast():
                logits, micro_loss = self.forward(x, y)
                if self.teacher is not None:
                    with torch.no_grad():
                        wanted = self.teacher(x)
                    micro_loss = micro_loss + config.teacher_weight * distillation_loss(logits, wanted,
                                                                                        config.teacher_temperature)
            micro_loss = micro_loss * share
            self.strategy.backward(micro_loss * self.loss_scale, last=i == len(batches))
            loss = loss + micro_loss.detach()
        loss = self.strategy.mean(loss)
        if self.loss_scale != 1:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], 1 / self.loss_scale)
        norm = parallel.clip_grad_norm(self.model.parameters(), config.grad_clip)
        self.step += 1
        # Asking waits for the device, once a step; in return a bad step is known before it has touched a weight.
        if self.is_good(loss.item(), norm.item(), config.lr * factor):
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if config.n_experts and config.balance == "bias":
            self.model.balance_experts()
        return loss, norm, config.lr * factor

    def is_good(self, loss: float, norm: float, lr: float) -> bool:
        """Whether the step may be taken. Raises FloatingPointError when it may not and no setting allows to skip it."""
        good = math.isfinite(loss) and math.isfinite(norm)
        self.good_steps = self.good_steps + 1 if good else 0
        overflow = self.loss_scale > 1 and math.isfinite(loss) and not good
        if self.loss_scale > 1:
            self.loss_scale *= 0.5 if overflow else 2 if good and self.good_steps % self.GROW_EVERY == 0 else 1
        self.bad_in_a_row = 0 if good or overflow else self.bad_in_a_row + 1
        if not self.bad_in_a_row:
            return good
        sizes = {name: p.grad.abs().max().item() for name, p in self.model.named_parameters() if p.grad is not None}
        largest = sorted(sizes, key=lambda name: sizes[name] if math.isfinite(sizes[name]) else math.inf)[:-4:-1]
        message = (f"loss {loss:.4g} and gradient norm {norm:.4g} at step {self.step}, learning rate {lr:.2e}; largest "
                   "gradients: " + ", ".join(f"{name} {sizes[name]:.2g}" for name in largest))
        if self.config.skip_bad_steps and self.bad_in_a_row <= BAD_IN_A_ROW:
            self.skipped += 1
            print(f"skipped: {message}", flush=True)
            return False
        saved = Path(self.config.out_dir) / "ckpt.pt"
        skip = (f"{BAD_IN_A_ROW} steps in a row were skipped before" if self.config.skip_bad_steps else
                "or skip single bad steps with --skip_bad_steps=true")
        raise FloatingPointError(
            f"{message}: the run has diverged. The last good state is {saved if saved.exists() else 'not saved yet'}; "
            f"lower --lr (or --muon_lr), raise --warmup_steps; {skip}")

    @torch.no_grad()
    def estimate_loss(self) -> float:
        """Mean loss over eval_steps validation batches, the same ones every time, from their own generator.

        Ranks along the data take turns. All make equally many passes, as a pass may be collective: who has none left
        makes one that counts 0.
        """
        self.model.eval()
        generator, total = torch.Generator().manual_seed(self.config.seed + 2), 0.0
        size, steps = self.config.micro_batch_size or self.sequences, self.config.eval_steps
        ranks, rank = self.strategy.dp, self.strategy.mesh.dp_rank
        for first in range(0, steps, ranks):
            batches = [get_batch(self.splits["val"], size, self.config.context_length, self.device, generator)
                       for _ in range(min(ranks, steps - first))]
            with self.autocast():
                loss = self.model(*batches[rank % len(batches)])[1]
            total += loss.item() if rank < len(batches) else 0.0
        self.model.train()
        return self.strategy.same(self.strategy.total(total) / steps)

    def full_loss(self) -> float:
        """Mean loss over the whole validation split, every token predicted with at least half a context before it."""
        self.model.eval()
        with self.autocast():
            losses = token_losses(self.model, self.splits["val"])
        self.model.train()
        return losses.double().mean().item()

    def bits_per_byte(self, loss: float) -> float | None:
        """Nats per token as bits per byte of text, which does not depend on the tokenizer; None without meta.json."""
        known = "val_bytes" in self.meta
        return bits_per_byte(loss, self.meta["val_tokens"], self.meta["val_bytes"]) if known else None

    def save(self, name: str = "ckpt.pt") -> None:
        """Write the whole, undivided state, so that any number of ranks can go on from it; collective."""
        weights = parallel.full_state_dict(self.model)
        states = [parallel.full_optimizer_state(optimizer) for optimizer in self.optimizers]
        if self.strategy.rank:
            return
        save_checkpoint(
            weights, states, self.step, Path(self.config.out_dir) / name, model_config=asdict(self.model.config),
            train_config=asdict(self.config), tokens=self.step * self.sequences * self.config.context_length,
            rng={"batches": self.loader.state, "torch": torch.get_rng_state()}, data_position=self.loader.position,
            loss_scale=self.loss_scale, good_steps=self.good_steps, skipped=self.skipped, seconds=self.seconds,
            best_val_loss=self.best_val_loss, tokenizer_sha256=self.tokenizer_sha256)

    def restore(self) -> None:
        """Become the run that OUT_DIR/ckpt.pt holds. Raises ValueError naming the file when it does not fit."""
        path = Path(self.config.out_dir) / "ckpt.pt"
        entries = read_checkpoint(path, map_location=self.device)
        if entries.get("tokenizer_sha256") != self.tokenizer_sha256:
            raise ValueError(f"{path} was trained with another tokenizer than {self.config.data_dir} was made with; "
                             "give the data_dir it was trained on, or another out_dir")
        trained_by = (entries.get("train_config") or {}).get("optimizer", self.config.optimizer)
        if trained_by != self.config.optimizer:
            raise ValueError(f"{path} was trained with optimizer={trained_by}, whose state optimizer="
                             f"{self.config.optimizer} cannot go on with; give that one, or another out_dir")
        load_weights(self.model, parallel.take_state_dict(self.model, entries["model"]), path)
        wanted = [[{name: value for name, value in group.items() if name != "params"} for group in
                   optimizer.param_groups] for optimizer in self.optimizers]
        states = entries["optimizer"]
        if isinstance(states, list) and len(states) == len(self.optimizers):      # load_optimizer refuses all else
            states = [parallel.take_optimizer_state(*pair) for pair in zip(self.optimizers, states)]
        load_optimizer(self.optimizers, states, path)
        for optimizer, settings in zip(self.optimizers, wanted):    # what is asked for on resuming wins over the saved
            for group, new in zip(optimizer.param_groups, settings):
                group.update(new)
        self.loader.position, self.loader.state = entries["data_position"], entries["rng"]["batches"].cpu()
        self.loader.generator.set_state(self.loader.state)
        torch.set_rng_state(entries["rng"]["torch"].cpu())
        for name in ("step", "seconds", "best_val_loss", "good_steps", "skipped"):
            setattr(self, name, entries.get(name, 0))
        if self.dtype == "float16":
            self.loss_scale = entries.get("loss_scale", self.loss_scale)


# --- the log ---

def open_log(out_dir, header: dict, resume_step: int | None):
    """log.jsonl, open for further lines: a header, then a line a logging step or evaluation. out_dir None: nowhere."""
    if out_dir is None:
        return open(os.devnull, "w", encoding="utf-8")
    path, kept = Path(out_dir) / "log.jsonl", [header]
    if resume_step is not None and path.exists():
        # Lines past the checkpoint were written by steps that will be taken again.
        kept = [line for line in read_log(path) if line.get("step", 0) <= resume_step] or kept
    write_atomically(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))
    return open(path, "a", encoding="utf-8", buffering=1)                     # a line is on its way when it is written


def write(log, run, **entry) -> None:
    print(json.dumps({"step": run.step, "seconds": run.seconds} | entry), file=log)


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a kill cut short is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def plot(out_dirs, path) -> None:
    """Draw losses and learning rate of one or several runs, against steps and against seconds, to a PNG file."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 1))
    for number, out_dir in enumerate(out_dirs):
        log = read_log(Path(out_dir) / "log.jsonl")
        for key, row, name, style in (("loss", 0, "train", {"alpha": 0.4}), ("lr", 1, None, {}),
                                      ("val_loss", 0, "validation", {"marker": "o", "markersize": 3})):
            for axis, x in zip(axes[row], ("step", "seconds")):
                lines = [line for line in log if key in line and x in line]
                axis.plot([line[x] for line in lines], [line[key] for line in lines], color=f"C{number}", linewidth=1,
                          label=name and f"{Path(out_dir).name} {name}", **style)
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[0, 0].legend()
    axes[1, 0].set(xlabel="step", ylabel="learning rate")
    axes[1, 1].set_xlabel("training time, seconds")
    figure.suptitle("python train.py plot " + " ".join(str(out_dir) for out_dir in out_dirs), fontsize=9)
    figure.savefig(path, dpi=110)


# --- main ---

def main(config: TrainConfig) -> dict:
    """Train as `config` says and return the final figures.

    Returns step, tokens, seconds (of training), loss (the last logged), val_loss (nats per token), val_bits_per_byte
    (None without meta.json), out_dir, and interrupted (the signal's number, or None).
    Raises ValueError or OSError for settings, data or a checkpoint that cannot be used, FloatingPointError when the
    loss is no longer a number.
    """
    strategy = parallel.Strategy(config.parallel, config.tp, config.device)
    pick_device(strategy.device), config.model_config(config.vocab_size or 256)    # mistakes, before hours of preparing
    head = strategy.rank == 0              # who prepares, logs, draws and writes; all ranks train and evaluate
    folder, out = Path(config.data_dir), Path(config.out_dir)
    # Token files without either were made by others, as nanoGPT's; with a tokenizer alone, prepare was cut short.
    theirs = (folder / "train.bin").exists() and not (folder / "tokenizer.json").exists()
    if head and folder.name in data.NAMES and not theirs and not (folder / "meta.json").exists():
        data.prepare(folder.name, data_dir=folder, context_length=config.context_length)
    strategy.same(None)                    # nobody goes on before the files are there
    run = Run(config, strategy)
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        run.restore()
    elif head:                             # of another run that was here before: neither this one's nor lost
        for name in ("ckpt", "best"):
            if (out / f"{name}.pt").exists():
                os.replace(out / f"{name}.pt", out / f"{name}.old.pt")
                print(f"{out} holds a run already: its {name}.pt is kept as {name}.old.pt")
    if head and (folder / "tokenizer.json").exists():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    elif head and not config.resume:
        (out / "tokenizer.json").unlink(missing_ok=True)       # of another run that was here before
    log = open_log(out if head else None, header(run), run.step if config.resume else None)
    print_start(run)
    with log:
        with Stop() as stop:
            last_loss = train(run, log, stop)
        if stop.agreed is None:
            val_loss = run.full_loss()
            bits = run.bits_per_byte(val_loss)
            write(log, run, val_loss=val_loss, val_bits_per_byte=bits, split="all of val.bin")
    if head:
        plot([out], out / "loss.png")
    figures = {"step": run.step, "tokens": run.step * run.sequences * config.context_length, "seconds": run.seconds,
               "loss": last_loss, "out_dir": config.out_dir, "interrupted": stop.agreed}
    if stop.agreed is not None:
        print(f"stopped at step {run.step}, saved. Go on with the same command and --resume=true, or see what it "
              f"writes: python sample.py {config.out_dir}")
        return figures
    if head and (out / "tokenizer.json").exists():
        show_samples(config)
    elif head and config.num_samples:
        print(f"no samples: {folder} has no tokenizer.json to write text with")
    in_bits = "n/a" if bits is None else f"{bits:.4f}"
    print(f"step {run.step}, {run.seconds:.1f} s of training | val loss {val_loss:.4f} | "
          f"val perplexity {perplexity_of(val_loss):.2f} | val bits per byte {in_bits}")
    return figures | {"val_loss": val_loss, "val_bits_per_byte": bits}


def header(run: Run) -> dict:
    """What a reader of the log needs to repeat the run."""
    here, commit = Path(__file__).parent, None
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    return {"commit": commit or None, "torch": torch.__version__,
            "python": platform.python_version(), "device": run.device, "dtype": run.dtype, "seed": run.config.seed,
            "config": asdict(run.config), "model_config": asdict(run.model.config)}


def print_start(run: Run) -> None:
    """What is trained, where, and how a step is made up."""
    config, c, ranks = run.config, run.model.config, run.strategy.dp
    rows = math.ceil(run.sequences / ranks)
    micro = min(config.micro_batch_size or rows, rows)
    print(f"model: {run.n_params:,} parameters, {c.n_layers} layers of {c.d_model}, vocabulary {c.vocab_size:,}, "
          f"context {c.context_length}\n"
          f"device: {run.device}, {run.dtype}, {torch.get_num_threads()} CPU threads\n"
          f"step: {run.sequences * c.context_length:,} tokens = {run.sequences} sequences of {c.context_length}, "
          f"{math.ceil(rows / micro)} micro-batches of up to {micro}" + (f" on each of {ranks} ranks" * (ranks > 1)))
    print_parameters(run.model, run.optimizers, config.lr)
    if run.strategy.size > 1:
        print(f"ranks: {run.strategy.size} = dp {ranks} x tp {config.tp}, parallel={config.parallel}")
    if config.resume:
        print(f"resumed {config.out_dir}/ckpt.pt at step {run.step}, {run.seconds:.1f} s")
        if run.progress() >= 1:
            print("that run is at its end; give a larger --max_steps or --max_minutes to train it further")


def train(run: Run, log, stop: Stop) -> float | None:
    """Step until the run is done or a signal comes; returns the last logged loss."""
    config, last_loss, since = run.config, None, (run.step, run.seconds)
    peak, flops = peak_flops(run.device, run.dtype), run.flops_per_token / run.strategy.size
    if peak:
        source = "measured just now on a matrix product" if run.device == "cpu" else "by the data sheet"
        print(f"mfu is of {peak / 1e12:.3g} TFLOP/s a rank, {source}")
    step_tokens, saved_at, out = run.sequences * config.context_length, None, Path(config.out_dir)
    while run.progress() < 1 and stop.agreed is None:
        began = time.perf_counter()
        try:
            loss, norm, lr = run.train_step()
        except FloatingPointError:
            write(log, run, diverged=True)
            raise
        due = run.step % config.log_every == 0 or run.step == 1
        # The clock and a signal end a run: all ranks must see the same ones, or some would wait for the rest for ever.
        run.seconds, caught = run.strategy.largest(run.seconds + time.perf_counter() - began, stop.signal or 0)
        stop.agreed = int(caught) or None
        if due or run.progress() >= 1:
            last_loss = loss.item()
            ms = 1000 * (run.seconds - since[1]) / (run.step - since[0])
            mfu = flops * step_tokens / ms * 1000 / peak if peak else None
            since = (run.step, run.seconds)
            extra = {"loss_scale": run.loss_scale} if run.dtype == "float16" else {}
            write(log, run, loss=last_loss, lr=lr, norm=norm.item(), ms=ms, tokens_per_s=1000 * step_tokens / ms,
                  mfu=mfu, skipped=run.skipped, **extra)
            end = config.max_steps or max(round(run.total_steps()), run.step)
            print(f"{run.step:>6}/{end} | loss {last_loss:.4f} | "
                  f"lr {lr:.2e} | norm {norm:.2f} | {ms:.0f} ms | {1000 * step_tokens / ms:,.0f} tok/s | "
                  f"mfu {'n/a' if mfu is None else f'{100 * mfu:.1f} %'} | "
                  f"eta {max(run.seconds * (1 / run.progress() - 1), 0):.0f} s", flush=True)
        if config.eval_every and run.step % config.eval_every == 0 and run.progress() < 1:
            val_loss = run.estimate_loss()
            bits = run.bits_per_byte(val_loss)
            write(log, run, val_loss=val_loss, val_bits_per_byte=bits)
            in_bits = f" | val bits per byte {bits:.4f}" if bits else ""
            print(f"{run.step:>6} | val loss {val_loss:.4f}{in_bits}", flush=True)
            if val_loss < run.best_val_loss:
                run.best_val_loss = val_loss
                run.save("best.pt")
            if run.strategy.rank == 0:
                plot([out], out / "loss.png")
        every = config.checkpoint_every or config.eval_every
        if every and run.step % every == 0:
            run.save()
            saved_at = run.step
    if saved_at != run.step:
        run.save()
    return last_loss


def show_samples(config: TrainConfig) -> None:
    """Let sample.py write, from the files alone, and say what to try next."""
    if not config.num_samples:
        return
    sys.stdout.flush()
    flags = f"--num_samples={config.num_samples} --seed={config.seed} --max_new_tokens=100".split()
    subprocess.run([sys.executable, Path(__file__).with_name("sample.py"), config.out_dir, *flags], check=False)
    print(f"\nnext: python sample.py {config.out_dir} --prompt='ROMEO' --temperature=0.8\n"
          f"      python evaluate.py {config.out_dir}\n"
          f"      the same command with --resume=true --max_minutes=10 to train it on; plot: {config.out_dir}/loss.png")


# --- sweep ---

def sweep(config: TrainConfig, words: list[str]) -> int | None:
    """Train the points of the grid one by one, each in its own folder below config.out_dir; then draw up all of them.

    A point that is finished or diverged is not run again, one that was interrupted goes on. Without words only the
    table is made: several sweeps into one folder share it. Returns the signal that stopped it, or None.
    Raises ValueError when a folder holds a run with other settings, or no run has ended.
    """
    runs = []
    for point in grid(TrainConfig, words) if words else []:
        folder = Path(config.out_dir) / re.sub(r"[^\w.+=,-]", "_", ",".join(f"{k}={v}" for k, v in point.items()))
        one = replace(config, **point, out_dir=folder.as_posix(), num_samples=0, resume=(folder / "ckpt.pt").exists())
        one.model_config(one.vocab_size or 256)    # a point that cannot be is known before the first is trained
        runs.append((folder, one))
    for folder, one in runs:
        log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
        for key, value in asdict(one).items() if log else ():
            if key not in ("resume", "out_dir") and log[0]["config"].get(key, value) != value:
                raise ValueError(f"{folder} holds a run with {key}={log[0]['config'][key]}, now it is {value}; give "
                                 "another --out_dir, or delete that folder")
        print(f"\n{folder}:" + " done before" * ended(log))
        try:
            if not ended(log) and (interrupted := main(one)["interrupted"]) is not None:
                return interrupted
        except FloatingPointError as error:
            print(error)
    if os.environ.get("RANK", "0") != "0":
        return None                        # one of torchrun's ranks draws up for all
    target, rows = Path(config.out_dir) / "sweep.json", sweep_rows(config.out_dir)
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with open(target.with_suffix(".txt"), "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print_sweep(rows)
    print_sweep(rows)
    plot_sweep(rows, target.with_suffix(".png"))
    print(f"\n{target.with_suffix('.png')}")


def ended(log: list[dict]) -> bool:
    return bool(log) and ("split" in log[-1] or "diverged" in log[-1])


def sweep_rows(out_dir) -> list[dict]:
    """One dict for each setting among the runs below out_dir, its seeds side by side; best first, diverged last."""
    rows = {}
    for path in sorted(Path(out_dir).glob("*/log.jsonl")):
        log, parts = read_log(path), path.parent.name.split(",")
        if ended(log):
            setting = ",".join(part for part in parts if not part.startswith("seed=")) or "as configured"
            row = rows.setdefault(setting, dict(setting=setting, mean=None, spread=None, scores={}, diverged={}))
            last, scores = log[-1], row["scores"]
            step, context = log[0]["config"]["batch_tokens"], log[0]["config"]["context_length"]
            row |= {"steps": last["step"], "tokens": last["step"] * (step // context * context),
                    "seconds": last["seconds"]}
            if "diverged" in last:
                row["diverged"][log[0]["seed"]] = last["step"]
            else:
                scores[log[0]["seed"]] = last["val_bits_per_byte"] or last["val_loss"]
                row |= {"measure": "bits per byte" if last["val_bits_per_byte"] else "nats per token",
                        "mean": statistics.mean(scores.values())}
                row["spread"] = statistics.stdev(scores.values()) if len(scores) > 1 else None
    if not rows:
        raise ValueError(f"no run below {out_dir} has ended; give the axes of a sweep, such as lr=1e-3,3e-3")
    return sorted(rows.values(), key=lambda row: row["mean"] or math.inf)


def print_sweep(rows: list[dict]) -> None:
    cells = []
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "spread")] + [len(row["scores"])]
        lost = ", ".join(f"seed {seed} diverged at step {step}" for seed, step in row["diverged"].items())
        cells.append([row["setting"], *numbers, row["steps"], row["tokens"], round(row["seconds"]), lost])
    header = ["setting", rows[0].get("measure", ""), "spread", "seeds", "steps", "tokens", "seconds", ""]
    accounting.table("spread: standard deviation over the seeds", header, cells)


def plot_sweep(rows: list[dict], path) -> None:
    """Every run's score as a dot and each setting's mean as a bar; by the settings' numbers, or else best first.

    Scores half as large again as the best, of runs that have all but diverged, are arrows at the edge.
    """
    from matplotlib.figure import Figure
    rows = sorted((row for row in rows if row["scores"]), reverse=True,
                  key=lambda row: [float(number) for number in re.findall(r"=([-+.\de]+)(?=,|$)", row["setting"])])
    axis = Figure(figsize=(7.5, 1.5 + 0.35 * len(rows)), layout="constrained").subplots()
    edge = 1.5 * min(score for row in rows for score in row["scores"].values())
    for y, row in enumerate(rows):
        for score in row["scores"].values():
            axis.plot(min(score, edge), y, "o" if score <= edge else ">", alpha=0.5, color="C0")
        if row["mean"] <= edge:
            axis.plot(row["mean"], y, "|", markersize=14, color="C1")
        axis.set_xlabel("validation, " + row["measure"])
    axis.set(yticks=range(len(rows)), yticklabels=[row["setting"] for row in rows])
    axis.set_title(f"python train.py sweep --out_dir={Path(path).parent.as_posix()}", fontsize=9)
    axis.figure.savefig(path, dpi=110)


USAGE = f"""usage: python train.py [config_x.py] [--key=value …]      train ({DEFAULT_CONFIG} when no config is given)
       python train.py plot OUT_DIR … [--out_dir=FOLDER]   draw the losses of runs to FOLDER/loss.png
       python train.py sweep [config_x.py] key=a,b …       train a grid; table and plot of all runs below out_dir"""


def run_command_line(argv: list[str]) -> None:
    """What `python train.py ARGV` does; a mistake exits with 2, a run that a signal stopped with 128 + its number."""
    if not any(word.endswith(".py") for word in argv) and "plot" not in argv[:1]:
        argv = [*argv, str(Path(__file__).with_name(DEFAULT_CONFIG))]
    verb, files, config, sources = command_line(TrainConfig, argv, USAGE, verbs=("plot", "sweep"))
    if verb is None and files:
        fail(f"{files[0]!r} is neither a setting (--key=value), a config_*.py nor a verb. {USAGE}")
    try:
        if verb == "plot":
            if not files:
                raise ValueError("plot needs the folders of the runs: python train.py plot out/a out/b")
            target = Path(config.out_dir if sources["out_dir"] == "flag" else files[0]) / "loss.png"
            plot(files, target)
            return print(target)
        by_steps = config.max_steps and sources["max_steps"] == "flag" or "max_steps=" in " ".join(files)
        no_limit = sources["max_minutes"] != "flag" or re.search("--max.minutes=none", " ".join(argv), re.IGNORECASE)
        if by_steps and no_limit:
            config.max_minutes = None  # asked for steps: a time limit from the file is not meant
        print_config(config, sources)
        interrupted = sweep(config, files) if verb == "sweep" else main(config)["interrupted"]
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:              # a second one, or one after training, when all is saved
        interrupted = signal.SIGINT
    if interrupted is not None:
        sys.exit(128 + interrupted)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        run_command_line(sys.argv[1:])
    else:                                  # one of torchrun's: one rank speaks, a failed one ends all
        with parallel.ending(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            with contextlib.redirect_stdout(nowhere if os.environ["RANK"] != "0" else sys.stdout):
                run_command_line(sys.argv[1:])
