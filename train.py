"""Train a Transformer on token files: `python train.py` is a whole run on a laptop, from raw text to samples.

    python train.py                                            config_shakespeare.py, under 3 minutes on two CPU cores
    python train.py config_tinystories.py --max_minutes=60     another corpus and model, same code
    python train.py --resume=true                              go on from out/shakespeare/ckpt.pt
    python train.py --init_from=out/shakespeare --data_dir=data/mine --out_dir=out/mine      fine-tune a trained model
    python train.py plot out/a out/b                           losses of several runs in one picture
    python train.py sweep lr=1e-3,3e-3 seed=1,2,3 --max_steps=500 --out_dir=out/rates        a grid; table and plot

The loop is nanoGPT's idea of one: draw a batch, forward, backward, clip, step, and now and then evaluate, log and save.

    12 sequences of a step:      [ 5 rows ]   [ 5 rows ]   [ 2 rows ]     micro-batches of micro_batch_size=5
    forward and backward:        loss · 5/12  loss · 5/12  loss · 2/12    autocast; in float16 times the loss scale
    gradients add up in p.grad:  --------------- mean over ranks ----->   / scale, norm, clip, one optimizer step

A micro-batch counts by its share of the rows: losses of 3, 3 and 6 on 5, 5 and 2 rows are a loss of 3.5. The mean of the
three means, 4, would give the last two rows more weight than the others.

Three departures from nanoGPT. The step is configured in tokens. A run may be limited by the clock, and then the schedule
of the learning rate is fitted to the clock. And nothing of a run is lost: a signal saves before it stops, a folder that
holds a run is not overwritten, and a run that was killed and goes on equals one that was not, bit for bit, as every
random draw has its own generator in the checkpoint. What changes bits besides is the number of CPU threads, which
machine.Threads lowers while another program keeps a core busy; --threads=N fixes it.

Papers: Kaplan 2020 (2001.08361) for the shape of it, Micikevicius 2017 (1710.03740) for float16, Hinton 2015
(1503.02531) for learning from a teacher, Chowdhery 2022 (PaLM, 2204.02311, appendix B) for the MFU.
"""
import contextlib
import errno
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute

import accounting
import data
import optim
from batches import NANOGPT_VOCABULARY, Loader, check_tokenizer, get_batch, open_data
from checkpoint import (claim_out_dir, load_checkpoint, load_optimizer, load_weights, read_checkpoint,  # noqa: F401
                        save_checkpoint)
from compress import distillation_loss
from configurator import command_line, fail, print_config
from machine import DTYPES, Stop, Threads, keep_freed_memory, peak_flops, pick_device, pick_dtype
from model import ModelConfig, Transformer, bits_per_byte, perplexity_of, token_losses
from parallel import Strategy, clip_grad_norm, ending, full_optimizer_state, full_state_dict, take_optimizer_state
from runs import Log, header, plot, read_log, sweep  # noqa: F401

DEFAULT_CONFIG = "config_shakespeare.py"
DEFAULT_MINUTES = 2.0                    # when neither max_steps nor max_minutes is given
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SHAPE = ("attention_backend", "fused_loss", "balance_weight", "balance_rate", "mtp_weight")    # how, not what

OPTIMIZERS = {  # a new one is a class in optim.py and a line here: the class, its settings by ours, what it does
    "adamw": (optim.AdamW, {"betas": ("beta1", "beta2")}, "a step for each number, by the size of its gradients"),
    "muon": (optim.Muon, {"momentum": "momentum", "ns_steps": "muon_steps"}, "the blocks' matrices; adamw the others"),
    "sgd": (optim.SGD, {"momentum": "momentum"}, "down the gradient, with momentum"),
    "adagrad": (optim.AdaGrad, {}, "divides by all gradients so far"),
    "rmsprop": (optim.RMSProp, {"beta": "beta2"}, "divides by the recent ones")}


# --- settings ---

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
    optimizer: str = "adamw"                 # adamw | muon | sgd | adagrad | rmsprop; explained above
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
    teacher_weight: float = 1.0              # weight of the divergence from the teacher in the training loss
    teacher_temperature: float = 2.0         # logits of both are divided by this for it
    num_samples: int = 0                     # texts that sample.py writes at the end
    seed: int = 1337                         # of weights and batches
    device: str | None = None                # cpu, cuda, cuda:1, mps; none = the best there is
    dtype: str | None = None                 # float32 | bfloat16 | float16 of matrix products; none = the fast one
    threads: int | None = None               # CPU threads; none = all, fewer while another program is busy
    activation_checkpointing: bool = False   # keep only each block's input for backward and compute the rest again
    parallel: str = "ddp"                    # under torchrun: ddp | zero1 | fsdp, what ranks divide; see parallel.py
    tp: int = 1                              # ranks that share every matrix (tensor parallel); the rest divide the data
    compile: bool | None = None              # torch.compile; none = on CUDA only

    def __post_init__(self):
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", ("cosine", "wsd")), ("dtype", (None, *DTYPES)),
                              ("parallel", ("ddp", "zero1", "fsdp")), ("loader", ("random", "epochs"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        for name in ("batch_tokens", "eval_steps", "muon_steps", "tp", "vocab_size", "log_every", "micro_batch_size",
                     "max_steps", "checkpoint_every", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("seed", "warmup_steps", "eval_every", "num_samples", "lr", "muon_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("max_minutes", "embedding_lr", "grad_clip", "teacher_weight", "teacher_temperature"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("beta1", "beta2", "momentum", "min_lr_factor", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.batch_tokens < self.context_length:
            raise ValueError(f"batch_tokens={self.batch_tokens} is less than one sequence of "
                             f"context_length={self.context_length}")
        if self.teacher and (self.fused_loss or self.tp > 1):
            raise ValueError(f"teacher={self.teacher} is compared by whole logits, which fused_loss=true and tp > 1 "
                             "never have; leave one out")
        divided = "parallel=fsdp" if self.parallel == "fsdp" else f"tp={self.tp}"
        if self.divided and self.optimizer == "muon":
            raise ValueError(f"{divided} cuts matrices and optimizer=muon needs whole ones; choose optimizer=adamw, or "
                             "parallel=ddp or zero1 with tp=1")
        if self.divided and self.compile:
            raise ValueError(f"{divided} sends from within the forward pass, which compile=true cannot follow; leave "
                             "one of the two out")
        if not self.start:
            self.model_config(self.vocab_size or NANOGPT_VOCABULARY)       # its own checks; else a checkpoint says it

    @property
    def divided(self) -> bool:
        """Whether no rank holds whole matrices."""
        return self.parallel == "fsdp" or self.tp > 1

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
    """`config` with the model's shape of the checkpoint that it starts from, if any.

    given: the settings that were asked for; without, all that are not at their default. Raises ValueError for one of
    them that differs from the checkpoint's.
    """
    if not config.start:
        return config
    saved = read_checkpoint(config.start).get("model_config") or {}
    names = [field.name for field in fields(ModelConfig) if field.init and field.name not in NO_SHAPE]
    shape = {name: saved[name] for name in names if name in saved}
    if given is None:
        given = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    for name in shape.keys() & set(given):
        if getattr(config, name) not in (None, shape[name]):
            raise ValueError(f"{name}={getattr(config, name)} does not fit this model: {config.start} has {name}="
                             f"{shape[name]}; leave {name} out, or train a new model in another out_dir")
    return replace(config, **shape)


# --- optimizers ---

def make_optimizers(model: Transformer, config: TrainConfig, make=lambda cls, params, **more: cls(params, **more)):
    """One or two optimizers in a list; each group keeps its peak rate as `peak_lr`, which the schedule scales.

    Matrices decay, vectors (norm weights) do not: a norm pulled to zero has nothing to win. An embedding is a table
    of vectors and is not decayed either; its rows start at size 1 a number and most get a gradient in few steps only,
    so they can do with a far larger rate. make(class, groups, **settings): Strategy.optimizer, which may divide it.
    """
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
    jobs = [("adamw" if muon else config.optimizer, [group for group in groups if group["params"]], config.lr)]
    if muon:
        jobs.append(("muon", [{"params": hidden, "weight_decay": 0.0}], config.muon_lr))
    optimizers = []
    for name, params, lr in jobs:
        cls, names, _ = OPTIMIZERS[name]
        settings = {key: getattr(config, ours) if isinstance(ours, str) else tuple(getattr(config, one) for one in ours)
                    for key, ours in names.items()}
        optimizers.append(make(cls, params, lr=lr, **settings))
    for group in all_groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def all_groups(optimizers: list) -> list[dict]:
    """The parameter groups of all of them."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def lr_factor(config: TrainConfig, step: int, total_steps: float) -> float:
    """The learning rate at `step` (from 1) of a run of total_steps, as a share of its peak."""
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        return optim.cosine_schedule(step, 1.0, config.min_lr_factor, warmup, total_steps)
    decay = 0 if math.isinf(total_steps) else total_steps * config.decay_fraction      # inf: the clock has not begun
    return optim.wsd_schedule(step, 1.0, config.min_lr_factor, warmup, max(total_steps - decay - warmup, 0), max(decay, 1))


class LossScale:
    """What a float16 loss is multiplied by before backward, and its gradients divided by after (1710.03740, 3.2).

    float16 has no numbers below 6e-8, where many gradients lie. A gradient that overflows instead costs its step and
    halves the scale; GROW_EVERY good steps in a row double it.
    """
    GROW_EVERY = 2000

    def __init__(self, scale: float = 2.0 ** 16, good_steps: int = 0):
        self.scale, self.good_steps = scale, good_steps

    def update(self, finite: bool) -> None:
        """After a step whose gradients were finite, or not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps % self.GROW_EVERY == 0:
            self.scale *= 2


# --- one step, evaluation, save and restore ---

class Run:
    """The state of one training run: everything a checkpoint must bring back, and the steps that change it."""

    def __init__(self, config: TrainConfig, strategy: Strategy | None = None):
        self.config = config = take_shape(config)
        self.strategy = strategy or Strategy(config.parallel, config.tp, config.device)
        self.device = pick_device(self.strategy.device)
        if self.device == "cpu":
            keep_freed_memory()
        self.meta, self.splits, vocab_size = open_data(config.data_dir, config.context_length, config.vocab_size)
        self.tokenizer_sha256 = self.meta.get("tokenizer_sha256")
        saved = self.read(config.start) if config.start else {}
        dtype = config.dtype or (config.resume and saved.get("dtype")) or pick_dtype(None, self.device)
        self.dtype = self.strategy.same(dtype)
        torch.manual_seed(config.seed)
        self.model = Transformer(config.model_config(vocab_size))
        if saved:
            load_weights(self.model, saved["model"], config.start)
        self.model.to(self.device)
        if config.activation_checkpointing:
            for block in self.model.layers:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = accounting.flops_per_token(self.model.config, config.context_length, True)["total"]
        # From here on self.model may hold only this rank's part.
        self.strategy.divide(self.model, None if self.dtype == "float32" else DTYPES[self.dtype])
        self.optimizers = make_optimizers(self.model, config, self.strategy.optimizer)
        on_cuda = self.device.startswith("cuda") and not config.divided
        use_compile = on_cuda if config.compile is None else config.compile
        self.forward = torch.compile(self.model) if use_compile else self.model
        self.sequences = config.batch_tokens // config.context_length
        self.loader = Loader(self.splits["train"], self.sequences, config.context_length, self.device, config.seed + 1,
                             config.loader == "epochs", vocab_size)
        self.step, self.seconds, self.best_val_loss = 0, 0.0, math.inf
        self.loss_scale = LossScale() if self.dtype == "float16" else None
        self.log, self.is_first_save = None, not config.resume
        if config.resume:
            self.restore(saved)
        self.teacher = None
        if config.teacher:
            path = Path(config.teacher) / "ckpt.pt"
            saved = self.read(path)
            self.teacher = Transformer(ModelConfig(**saved["model_config"])).to(self.device).requires_grad_(False).eval()
            load_weights(self.teacher, saved["model"], path)

    def read(self, path: Path) -> dict:
        """A checkpoint of a model that reads the ids of this run's data. Raises ValueError when it reads others."""
        saved = read_checkpoint(path)
        check_tokenizer(saved, path, self.config.data_dir, self.tokenizer_sha256)
        return saved

    def autocast(self):
        """A context in which matrix products are of self.dtype."""
        dtype = DTYPES[self.dtype]
        return torch.autocast(self.device.split(":")[0], dtype, enabled=dtype != torch.float32)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.sequences * self.config.context_length

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

        Every rank draws the whole batch and takes its rows: so the run does not depend on the number of ranks.
        """
        factor = lr_factor(self.config, self.step + 1, self.total_steps())
        for group in all_groups(self.optimizers):
            group["lr"] = group["peak_lr"] * factor
        loss = self.forward_backward(*self.loader.next())
        if self.loss_scale:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.loss_scale.scale)
        norm = clip_grad_norm(self.model.parameters(), self.config.grad_clip)
        self.step += 1
        # Asking waits for the device, once a step; in return a bad step is known before it has touched a weight.
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflow = self.loss_scale is not None and self.loss_scale.scale > 1 and math.isfinite(loss)
        if not finite and not overflow:
            self.diverged(f"loss {loss:.4g}, gradient norm {norm:.4g} at learning rate {self.config.lr * factor:.2e}")
        if self.loss_scale:
            self.loss_scale.update(finite)
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.config.n_experts and self.config.balance == "bias":
            self.model.balance_experts()
        return loss, norm, self.config.lr * factor

    def forward_backward(self, inputs, targets) -> torch.Tensor:
        """Add up the gradients of a batch, the mean over all ranks, in p.grad; returns its mean loss."""
        config, scale, loss = self.config, self.loss_scale.scale if self.loss_scale else 1.0, 0.0
        batches = list(self.strategy.micro_batches(inputs, targets, config.micro_batch_size or self.sequences))
        for i, (x, y, share) in enumerate(batches, start=1):
            with self.autocast():
                logits, micro_loss = self.forward(x, y)
                if self.teacher is not None:
                    with torch.no_grad():
                        teacher_logits = self.teacher(x)
                    divergence = distillation_loss(logits, teacher_logits, config.teacher_temperature)
                    micro_loss = micro_loss + config.teacher_weight * divergence
            micro_loss = micro_loss * share
            self.strategy.backward(micro_loss * scale, last=i == len(batches))
            loss = loss + micro_loss.detach()
        return self.strategy.mean(loss)

    def diverged(self, what: str) -> None:
        """Raises FloatingPointError, before a bad number gets into a weight or a file."""
        path = Path(self.config.out_dir) / "ckpt.pt"
        saved = f"The last good state is {path}" if path.exists() and not self.is_first_save else "Nothing is saved yet"
        raise FloatingPointError(f"step {self.step}: {what}: the run has diverged. {saved}; lower --lr (or --muon_lr) or "
                                 "raise --warmup_steps")

    @torch.no_grad()
    def estimate_loss(self) -> float:
        """Mean loss over eval_steps validation batches, the same ones every time; ranks share the rows of each."""
        self.model.eval()
        generator, total = torch.Generator().manual_seed(self.config.seed + 2), 0.0
        rows = self.config.micro_batch_size or self.sequences
        for _ in range(self.config.eval_steps):
            batch = get_batch(self.splits["val"], rows, self.config.context_length, self.device, generator)
            for x, y, share in self.strategy.micro_batches(*batch, rows):
                with self.autocast():
                    total = total + self.model(x, y)[1] * share
        self.model.train()
        return self.strategy.mean(total).item() / self.config.eval_steps

    def full_loss(self) -> float:
        """Mean loss over the whole validation split, every token predicted with at least half a context before it."""
        self.model.eval()
        with self.autocast():
            losses = token_losses(self.model, self.splits["val"])
        self.model.train()
        return losses.double().mean().item()

    def record_score(self, val_loss: float, **more) -> float | None:
        """Log a validation loss; returns it in bits per byte of text, which no tokenizer changes (None: no meta.json)."""
        known = "val_bytes" in self.meta
        bits = bits_per_byte(val_loss, self.meta["val_tokens"], self.meta["val_bytes"]) if known else None
        self.log.write(step=self.step, seconds=self.seconds, val_loss=val_loss, val_bits_per_byte=bits, **more)
        return bits

    def save(self, name: str = "ckpt.pt") -> None:
        """Write the whole, undivided state, so that any number of ranks can go on from it; collective."""
        weights = full_state_dict(self.model)
        states = [full_optimizer_state(optimizer) for optimizer in self.optimizers]
        if self.strategy.rank:
            return
        if not all(weight.isfinite().all() for weight in weights.values()):
            self.diverged("the weights are no numbers any more")
        out, folder, scale = Path(self.config.out_dir), Path(self.config.data_dir), self.loss_scale or LossScale(1.0)
        if self.is_first_save and (folder / "tokenizer.json").exists():
            shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
        save_checkpoint(
            weights, states, self.step, out / name, model_config=asdict(self.model.config),
            train_config=asdict(self.config), tokens=self.tokens, data_position=self.loader.position,
            rng={"batches": self.loader.generator.get_state(), "torch": torch.get_rng_state()}, dtype=self.dtype,
            loss_scale=scale.scale, good_steps=scale.good_steps, seconds=self.seconds,
            best_val_loss=self.best_val_loss, tokenizer_sha256=self.tokenizer_sha256)
        if self.is_first_save:             # what a former run left here goes now, when there is something in its place
            gone = {"ckpt.pt", "best.pt"} - {name}
            gone |= set() if (folder / "tokenizer.json").exists() else {"tokenizer.json"}
            for former in gone:
                (out / former).unlink(missing_ok=True)
            if self.log:
                self.log.replace_former()
        self.is_first_save = False

    def restore(self, saved: dict) -> None:
        """Become the run that a checkpoint holds, weights aside. Raises ValueError naming the file if it does not fit.

        Settings that are given on resuming win over the saved ones: only the optimizers' moments come from there.
        """
        path, config = self.config.start, self.config
        before = (saved.get("train_config") or {}).get("optimizer", config.optimizer)
        if before != config.optimizer:
            raise ValueError(f"{path} was trained with optimizer={before}, whose state optimizer={config.optimizer} "
                             "cannot go on with; give that one, or another out_dir")
        asked = [{key: value for key, value in group.items() if key != "params"}
                 for group in all_groups(self.optimizers)]
        states = saved.get("optimizer")
        if isinstance(states, list) and len(states) == len(self.optimizers):      # load_optimizer refuses all else
            states = [take_optimizer_state(*pair) for pair in zip(self.optimizers, states)]
        load_optimizer(self.optimizers, states, path)
        for group, settings in zip(all_groups(self.optimizers), asked):
            group.update(settings)
        self.loader.position = saved["data_position"]
        self.loader.generator.set_state(saved["rng"]["batches"])
        torch.set_rng_state(saved["rng"]["torch"])
        self.step, self.seconds = saved["step"], saved.get("seconds", 0.0)
        self.best_val_loss = saved.get("best_val_loss", math.inf)
        if self.loss_scale and "loss_scale" in saved:
            self.loss_scale = LossScale(saved["loss_scale"], saved.get("good_steps", 0))


# --- the loop ---

def train(run: Run, stop: Stop, threads: Threads) -> float | None:
    """Step until the run is done or a signal comes; returns the last logged loss."""
    config, last_loss, since, saved_at = run.config, None, (run.step, run.seconds, run.tokens), None
    peak = peak_flops(run.device, run.dtype)
    if peak:
        source = "measured just now on a matrix product" if run.device == "cpu" else "by the data sheet"
        print(f"mfu is of {peak / 1e12:.3g} TFLOP/s a rank, {source}")
    while run.progress() < 1 and stop.agreed is None:
        began, before = time.perf_counter(), run.progress()
        loss, norm, lr = run.train_step()
        seconds = time.perf_counter() - began
        if run.device == "cpu":
            threads.watch(seconds)
        # The clock and a signal end a run: all ranks must see the same ones, or some would wait for the rest for ever.
        run.seconds, caught = run.strategy.largest(run.seconds + seconds, stop.signal or 0)
        stop.agreed = int(caught) or None
        if config.log_every:
            due = run.step % config.log_every == 0
        else:                                      # a line for each hundredth of the run
            due = math.floor(100 * before + 1e-6) < math.floor(100 * run.progress() + 1e-6)
        if due or run.step == 1 or run.progress() >= 1:
            last_loss = loss.item()
            log_step(run, since, peak, loss=last_loss, lr=lr, norm=norm.item())
            since = run.step, run.seconds, run.tokens
        if config.eval_every and run.step % config.eval_every == 0 and run.progress() < 1:
            val_loss = run.estimate_loss()
            bits = run.record_score(val_loss)
            print(f"{run.step:>6} | val loss {val_loss:.4f}" + (f" | val bits per byte {bits:.4f}" if bits else ""))
            if val_loss < run.best_val_loss:
                run.best_val_loss = val_loss
                run.save("best.pt")
            if run.strategy.rank == 0:
                plot([config.out_dir])
        every = config.checkpoint_every or config.eval_every
        if every and run.step % every == 0:
            run.save()
            saved_at = run.step
    if saved_at != run.step:
        run.save()
    return last_loss


def log_step(run: Run, since: tuple, peak: float | None, loss: float, lr: float, norm: float) -> None:
    """A line on the screen and in log.jsonl. since: (step, seconds, tokens) of the line before."""
    steps, seconds, tokens = run.step - since[0], run.seconds - since[1], run.tokens - since[2]
    ms, rate = 1000 * seconds / steps, tokens / seconds
    mfu = run.flops_per_token / run.strategy.size * rate / peak if peak else None
    more = {"loss_scale": run.loss_scale.scale} if run.loss_scale else {}
    run.log.write(step=run.step, seconds=run.seconds, loss=loss, lr=lr, norm=norm, ms=ms, tokens_per_s=rate, mfu=mfu,
                  **more)
    end = run.config.max_steps or max(round(run.total_steps()), run.step)
    print(f"{run.step:>6}/{end} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {ms:.0f} ms | {rate:,.0f} tok/s | "
          f"mfu {'n/a' if mfu is None else f'{100 * mfu:.1f} %'} | "
          f"eta {max(run.seconds * (1 / run.progress() - 1), 0):.0f} s", flush=True)


# --- main ---

def main(config: TrainConfig) -> dict:
    """Train as `config` says and return the final figures.

    Returns step, tokens, seconds (of training), loss (the last logged), val_loss (nats per token), val_bits_per_byte
    (None without meta.json), out_dir, and interrupted (the signal's number, or None).
    Raises ValueError or OSError for settings, data or a checkpoint that cannot be used, FloatingPointError when the
    loss is no longer a number.
    """
    if config.max_steps is None and config.max_minutes is None:
        config = replace(config, max_minutes=DEFAULT_MINUTES)
    strategy = Strategy(config.parallel, config.tp, config.device)
    head, out = strategy.rank == 0, Path(config.out_dir)     # head: who prepares, logs, draws and writes
    pick_device(strategy.device)                             # a mistake is known before hours of preparing
    if head and not config.resume:
        inputs = [folder for folder in (config.init_from, config.teacher, config.data_dir) if folder]
        claim_out_dir(out, config.overwrite, inputs)
    if head:
        prepare_data(config)
    strategy.same(None)                                      # nobody goes on before the files are there
    run = Run(config, strategy)
    out.mkdir(parents=True, exist_ok=True)
    settings = header(torch=torch.__version__, device=run.device, dtype=run.dtype, seed=config.seed,
                      config=asdict(run.config), model_config=asdict(run.model.config))
    run.log = Log(out if head else None, settings, run.step if config.resume else None)
    print_start(run)
    with contextlib.closing(run.log), Threads(config.threads) as threads:
        if config.init_from and not config.resume:
            val_loss = run.full_loss()
            print(f"{config.init_from}: {in_words(val_loss, run.record_score(val_loss, parent=config.init_from))}")
        try:
            with Stop() as stop:
                last_loss = train(run, stop, threads)
        except FloatingPointError:
            run.log.write(step=run.step, seconds=run.seconds, diverged=True)
            raise
        figures = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds, "loss": last_loss,
                   "out_dir": config.out_dir, "interrupted": stop.agreed}
        if stop.agreed is not None:
            print(f"stopped at step {run.step}, saved. Go on with the same command and --resume=true, or see what it "
                  f"writes: python sample.py {config.out_dir}")
            return figures
        val_loss = run.full_loss()
        bits = run.record_score(val_loss, split="all of val.bin")
    if head:
        plot([out])
        show_samples(config)
    print(f"step {run.step}, {run.seconds:.1f} s of training | {in_words(val_loss, bits)}")
    return figures | {"val_loss": val_loss, "val_bits_per_byte": bits}


def in_words(val_loss: float, bits: float | None) -> str:
    """The score of the whole of val.bin."""
    in_bits = "n/a" if bits is None else f"{bits:.4f}"
    return f"val loss {val_loss:.4f} | val perplexity {perplexity_of(val_loss):.2f} | val bits per byte {in_bits}"


def prepare_data(config: TrainConfig) -> None:
    """Download and tokenize a corpus that data.py knows by the name of data_dir, unless it is there."""
    folder = Path(config.data_dir)
    # Token files without either were made by others, as nanoGPT's; with a tokenizer alone, prepare was cut short.
    theirs = (folder / "train.bin").exists() and not (folder / "tokenizer.json").exists()
    if theirs or (folder / "meta.json").exists() or folder.name not in data.NAMES:
        return
    if "RANK" in os.environ:                       # the other ranks would give up waiting after ten minutes
        raise ValueError(f"{folder} is not prepared, and torchrun's ranks cannot wait for that; run this first: "
                         f"python data.py prepare {folder.name} --data_dir={folder}")
    data.prepare(folder.name, data_dir=folder, context_length=config.context_length)


def print_start(run: Run) -> None:
    """What is trained, where, and how a step is made up."""
    config, c, ranks = run.config, run.model.config, run.strategy.dp
    rows = math.ceil(run.sequences / ranks)
    micro = min(config.micro_batch_size or rows, rows)
    print(f"model: {run.n_params:,} parameters, {c.n_layers} layers of {c.d_model}, vocabulary {c.vocab_size:,}, "
          f"context {c.context_length}\n"
          f"device: {run.device}, {run.dtype}; {run.strategy.size} ranks = dp {ranks} x tp {config.tp}\n"
          f"step: {run.sequences * c.context_length:,} tokens = {run.sequences} sequences of {c.context_length}, "
          f"{math.ceil(rows / micro)} micro-batches of up to {micro} a rank")
    for optimizer in run.optimizers:
        kind = type(getattr(optimizer, "local", optimizer)).__name__               # local: what ZeRO-1 divides
        for group in optimizer.param_groups:
            print(f"{kind}: {len(group['params'])} tensors of {sum(p.numel() for p in group['params']):,} numbers, "
                  f"peak learning rate {group['peak_lr']:g}, weight decay {group['weight_decay']:g}")
    if config.resume:
        print(f"resumed {config.start} at step {run.step}, {run.seconds:.1f} s")
        if run.progress() >= 1:
            print("that run is at its end; give a larger --max_steps or --max_minutes to train it further")


def show_samples(config: TrainConfig) -> None:
    """Let sample.py write, from the files alone, and say what to try next."""
    if config.num_samples and not (Path(config.out_dir) / "tokenizer.json").exists():
        print(f"no samples: {config.data_dir} has no tokenizer.json to write text with")
    elif config.num_samples:
        sys.stdout.flush()
        flags = f"--num_samples={config.num_samples} --seed={config.seed} --max_new_tokens=100".split()
        subprocess.run([sys.executable, Path(__file__).with_name("sample.py"), config.out_dir, *flags], check=False)
        print(f"\nnext: python sample.py {config.out_dir} --prompt='The ' --temperature=0.8\n"
              f"      python evaluate.py {config.out_dir}\n"
              f"      the same command with --resume=true --max_minutes=10 trains on; plot: {config.out_dir}/loss.png")


USAGE = f"""usage: python train.py [config_x.py] [--key=value …]      train ({DEFAULT_CONFIG} when no config is given)
       python train.py plot OUT_DIR … [--out_dir=FOLDER]   draw the losses of runs to FOLDER/loss.png
       python train.py sweep [config_x.py] key=a,b …       train a grid; table and plot of all runs below out_dir

optimizers:""" + "".join(f"\n  {name:<8} {what}" for name, (_, _, what) in OPTIMIZERS.items())


def run_command_line(argv: list[str]) -> None:
    """What `python train.py ARGV` does. A mistake exits with 2, a full disk with 1, a signal with 128 + its number."""
    words, interrupted = [word for word in argv if not word.startswith("--")], None
    named = any(word.endswith(".py") for word in words)
    if not named and words[:1] != ["plot"]:
        argv = [*argv, str(Path(__file__).with_name(DEFAULT_CONFIG))]
    verb, files, config, sources = command_line(TrainConfig, argv, USAGE, verbs=("plot", "sweep"))
    if verb is None and files:
        fail(f"{files[0]!r} is neither a setting (--key=value), a config_*.py nor a verb. {USAGE}")
    try:
        if verb == "plot":
            print(plot(files, config.out_dir if sources["out_dir"] == "flag" else None))
            return
        steps = (sources["max_steps"] == "flag" and config.max_steps) or any(word.startswith("max_steps=") for word in files)
        if steps and sources["max_minutes"] != "flag":
            config.max_minutes = None              # the time limit of the config file is not meant
        given = {key for key, source in sources.items() if source == "flag" or (named and source != "default")}
        config = take_shape(config, given)
        print_config(config, sources)
        interrupted = sweep(config, files, main) if verb == "sweep" else main(config)["interrupted"]
    except (ValueError, OSError, FloatingPointError) as error:
        if getattr(error, "errno", None) not in DISK_FULL:
            fail(error)
        print(f"error: {error}; an older checkpoint is still whole: make room and use --resume=true", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:                      # a second one, or one after training, when all is saved
        interrupted = signal.SIGINT
    if interrupted is not None:
        sys.exit(128 + interrupted)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        run_command_line(sys.argv[1:])
    else:                                          # one of torchrun's: one rank speaks, a failed one ends all
        with ending(), open(os.devnull, "w", encoding="utf-8") as nowhere:
            with contextlib.redirect_stdout(nowhere if os.environ["RANK"] != "0" else sys.stdout):
                run_command_line(sys.argv[1:])
