"""Train a Transformer on token files: `python train.py` is a whole run on a laptop, from raw text to samples.

    python train.py                                            config_shakespeare.py, under 3 minutes on two CPU cores
    python train.py config_tinystories.py --max_minutes=60     another corpus and model, same code
    python train.py --resume=true                              go on from out/shakespeare/ckpt.pt
    python train.py --init_from=out/shakespeare --data_dir=data/mine --out_dir=out/mine      fine-tune a trained model
    python train.py plot out/a out/b                           losses of several runs in one picture
    python train.py sweep lr=1e-3,3e-3 seed=1,2,3 --max_steps=500 --out_dir=out/rates        a grid; a table

The loop is nanoGPT's: draw a batch, forward, backward, clip, step, and now and then evaluate, log and save.

    12 sequences of a step:      [ 5 rows ]   [ 5 rows ]   [ 2 rows ]     micro-batches of micro_batch_size=5
    forward and backward:        loss · 5/12  loss · 5/12  loss · 2/12    autocast; in float16 times the loss scale
    gradients add up in p.grad:  --------------- mean over ranks ----->   / scale, norm, clip, one optimizer step

A micro-batch counts by its share of the rows: losses of 3, 3 and 6 on 5, 5 and 2 rows are a loss of 3.5. The mean of
the three means, 4, would give the last two rows more weight than the others.

Three departures. The step is configured in tokens. A run may be limited by the clock, and the learning rate then
follows the clock. And no run is lost: a signal saves before it stops, a folder that holds a run is not overwritten, and
a run that was killed and resumed equals one that was not, bit for bit, as every random draw has its own generator in
the checkpoint. Only the number of CPU threads changes bits: machine.Threads lowers it while another program keeps a
core busy, and --threads=N fixes it.

Papers: Kaplan 2020 (2001.08361) for the shape of it, Micikevicius 2017 (1710.03740) for float16, Hinton 2015
(1503.02531) for learning from a teacher, Chowdhery 2022 (PaLM, 2204.02311, appendix B) for the MFU.
"""
import contextlib
import errno
import functools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute

import accounting
import data
from checkpoint import (claim_out_dir, load_optimizer, load_weights, only_writer, read_checkpoint,
                        save_checkpoint)
from compress import distillation_loss
from configurator import command_line, fail, print_config
from machine import DTYPES, Stop, Threads, keep_freed_memory, peak_flops, pick_device, pick_dtype
from model import ModelConfig, Transformer, bits_per_byte, perplexity_of, token_losses
from parallel import ending
from recipe import (OPTIMIZERS, Loader, LossScale, TrainConfig, all_groups, check_tokenizer, get_batch, lr_factor,
                    make_optimizers, open_data, take_shape)
from runs import Log, grid, header, plot, read_log, sweep  # noqa: F401
from sharded import Strategy, full_optimizer_state, full_state_dict, take_optimizer_state

DEFAULT_CONFIG = "config_shakespeare.py"
DEFAULT_MINUTES = 2.0                    # when neither max_steps nor max_minutes is given
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- one step, evaluation, save and restore ---

class Recomputed(torch.nn.ModuleList):
    """Blocks whose activations are not kept: backward computes them again from the block's input (1604.06174)."""

    def __iter__(self):
        return (functools.partial(recompute, block, use_reentrant=False) for block in super().__iter__())


class Run:
    """The state of one training run: everything a checkpoint must bring back, and the steps that change it."""

    def __init__(self, config: TrainConfig, strategy: Strategy | None = None):
        self.config = config = take_shape(config)
        self.strategy = strategy or Strategy(config.parallel, config.tp, config.device, config.pp)
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
        self.n_params = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = accounting.flops_per_token(self.model.config, config.context_length, True)["total"]
        # From here on self.model may hold only this rank's part.
        on_cuda = self.device.startswith("cuda") and not config.divided
        self.strategy.divide(self.model, None if self.dtype == "float32" else DTYPES[self.dtype],
                             on_cuda if config.compile is None else config.compile, logits=bool(config.teacher))
        if config.activation_checkpointing:
            self.model.layers = Recomputed(self.model.layers)
        self.optimizers = make_optimizers(self.model, config, self.strategy.optimizer)
        self.sequences = config.batch_tokens // config.context_length
        self.loader = Loader(self.splits["train"], self.sequences, config.context_length, self.device, config.seed + 1,
                             config.loader == "epochs", vocab_size)
        self.step, self.seconds, self.best_val_loss = 0, 0.0, math.inf
        self.loss_scale = LossScale(on=self.dtype == "float16")
        self.log, self.is_first_save = None, not config.resume
        if config.resume:
            self.restore(saved)
        self.teacher = None
        if config.teacher:
            path = Path(config.teacher) / "ckpt.pt"
            saved = self.read(path)
            self.teacher = Transformer(ModelConfig(**saved["model_config"] | {"vocab_size": vocab_size}))
            load_weights(self.teacher, saved["model"], path)
            self.teacher.to(self.device).requires_grad_(False).eval()

    def read(self, path: Path) -> dict:
        """A checkpoint of a model that reads the ids of this run's data. Raises ValueError when it reads others."""
        saved = read_checkpoint(path)
        check_tokenizer(saved, path, self.config.data_dir, self.tokenizer_sha256)
        return saved

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.loader.position * self.config.context_length

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
        # All forward and backward passes are in here: micro-batches, ranks, stages of a pipeline.
        loss = self.strategy.forward_backward(*self.loader.next(), self.config.micro_batch_size, self.loss_of,
                                              self.loss_scale.scale)
        if self.loss_scale.on:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.loss_scale.scale)
        norm = self.strategy.clip_grad_norm(self.model.parameters(), self.config.grad_clip)
        self.step += 1
        # Asking waits for the device, once a step; in return a bad step is known before it has touched a weight.
        finite = math.isfinite(loss) and math.isfinite(norm)
        may_overflow = self.loss_scale.scale > 1 and math.isfinite(loss)
        if not finite and not may_overflow:
            self.diverged(f"loss {loss:.4g}, gradient norm {norm:.4g} at learning rate {self.config.lr * factor:.2e}")
        self.loss_scale.update(finite)
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.config.n_experts and self.config.balance == "bias":
            self.model.balance_experts()
        return loss, norm, self.config.lr * factor

    def loss_of(self, logits, loss, inputs):
        """What is differentiated, of one micro-batch: the loss and, with a teacher, the distance from its logits."""
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
        return loss + distillation_loss(logits, teacher_logits, 2.0)

    def diverged(self, what: str) -> None:
        """Raises FloatingPointError, before a bad number gets into a weight or a file."""
        path = Path(self.config.out_dir) / "ckpt.pt"
        saved = f"The last good state is {path}" if path.exists() and not self.is_first_save else "Nothing is saved yet"
        raise FloatingPointError(f"step {self.step}: {what}: the run has diverged. {saved}; lower --lr (or --muon_lr) "
                                 "or raise --warmup_steps")

    @torch.no_grad()
    def estimate_loss(self) -> float:
        """Mean loss over eval_steps validation batches, the same ones every time; ranks share the rows of each."""
        self.model.eval()
        generator, total = torch.Generator().manual_seed(self.config.seed + 2), 0.0
        rows = self.config.micro_batch_size or self.sequences
        for _ in range(self.config.eval_steps):
            batch = get_batch(self.splits["val"], rows, self.config.context_length, self.device, generator)
            total = total + self.strategy.evaluate(*batch)
        self.model.train()
        return total.item() / self.config.eval_steps

    def full_loss(self) -> float:
        """Mean loss over the whole validation split, every token predicted with at least half a context before it."""
        self.model.eval()
        with self.strategy.autocast():
            losses = token_losses(self.strategy.model, self.splits["val"])
        self.model.train()
        return losses.double().mean().item()

    def record_score(self, val_loss: float, **more) -> float | None:
        """Log a validation loss; returns it in bits per byte of text, whatever the tokenizer (None: no meta.json)."""
        known = "val_bytes" in self.meta
        bits = bits_per_byte(val_loss, self.meta["val_tokens"], self.meta["val_bytes"]) if known else None
        self.log.write(step=self.step, seconds=self.seconds, val_loss=val_loss, val_bits_per_byte=bits, **more)
        return bits

    def save(self, name: str = "ckpt.pt") -> None:
        """Write the whole, undivided state, so that any number of ranks can go on from it; collective."""
        weights = full_state_dict(self.model, keep=self.strategy.rank == 0)
        states = [full_optimizer_state(optimizer) for optimizer in self.optimizers]
        if self.strategy.rank:
            return
        if not all(weight.isfinite().all() for weight in weights.values()):
            self.diverged("the weights are no numbers any more")
        out, tokenizer = Path(self.config.out_dir), Path(self.config.data_dir) / "tokenizer.json"
        if self.is_first_save:             # with it the folder alone is enough to write text
            (out / "tokenizer.json").unlink(missing_ok=True)
            if tokenizer.exists():
                shutil.copyfile(tokenizer, out / "tokenizer.json")
        save_checkpoint(
            weights, states, self.step, out / name, model_config=asdict(self.model.config), dtype=self.dtype,
            train_config=asdict(self.config), tokens=self.tokens, data_position=self.loader.position,
            rng={"batches": self.loader.generator.get_state(), "torch": torch.get_rng_state()},
            loss_scale=self.loss_scale.scale, good_steps=self.loss_scale.good_steps, seconds=self.seconds,
            best_val_loss=self.best_val_loss, tokenizer_sha256=self.tokenizer_sha256)
        if self.is_first_save:             # what a former run left goes only now that there is something in its place
            (out / ("best.pt" if name == "ckpt.pt" else "ckpt.pt")).unlink(missing_ok=True)
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
        if self.loss_scale.on and "loss_scale" in saved:
            self.loss_scale.scale, self.loss_scale.good_steps = saved["loss_scale"], saved["good_steps"]


# --- the loop ---

def train(run: Run, stop: Stop, threads: Threads) -> float | None:
    """Step until the run is done or a signal comes; returns the last logged loss."""
    config, last_loss, since, saved_at = run.config, None, (run.step, run.seconds, run.tokens), None
    peak = peak_flops(run.device, run.dtype)
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
    run.log.write(step=run.step, seconds=run.seconds, loss=loss, lr=lr, norm=norm, ms=ms, tokens_per_s=rate, mfu=mfu)
    end = run.config.max_steps or max(round(run.total_steps()), run.step)
    print(f"{run.step:>6}/{end} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {ms:.0f} ms | {rate:,.0f} tok/s | "
          f"mfu {'n/a' if mfu is None else f'{100 * mfu:.1f} %'} | "
          f"eta {max(run.seconds * (1 / run.progress() - 1), 0):.0f} s", flush=True)


# --- main ---

def main(config: TrainConfig) -> dict:
    """Train as `config` says and return the final figures.

    Returns step, tokens, seconds (of training), loss (the last logged), val_loss (nats per token), val_bits_per_byte
    (None without meta.json), out_dir, and interrupted (the signal's number, or None). Raises ValueError or OSError for
    what cannot be used, FloatingPointError when the loss is no longer a number.
    """
    if config.max_steps is None and config.max_minutes is None:
        config = replace(config, max_minutes=DEFAULT_MINUTES)
    strategy = Strategy(config.parallel, config.tp, config.device, config.pp)
    head, out = strategy.rank == 0, Path(config.out_dir)     # head: who prepares, logs, draws and writes
    pick_device(strategy.device)                             # a mistake is known before hours of preparing
    if head and not config.resume:
        claim_out_dir(out, config.overwrite, (config.init_from, config.teacher, config.data_dir))
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
        except BaseException:
            run.log.close()
            if head and run.is_first_save:                       # nothing is saved: no run that one could go on with
                run.log.writing.unlink(missing_ok=True)
            raise
        figures = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds, "loss": last_loss,
                   "out_dir": config.out_dir, "interrupted": stop.agreed}
        if stop.agreed is not None:
            print(f"stopped at step {run.step}, saved. Go on with the same command and --resume=true, or see what it "
                  f"writes: python sample.py {shlex.quote(config.out_dir)}")
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
          f"device: {run.device}, {run.dtype}; {run.strategy.size} ranks = dp {ranks}, tp {config.tp}, pp {config.pp}\n"
          f"step: {run.sequences * c.context_length:,} tokens = {run.sequences} sequences of {c.context_length}, "
          f"{math.ceil(rows / micro)} micro-batches of up to {micro} a rank")
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
        out, more = shlex.quote(config.out_dir), f"steps={2 * config.max_steps}" if config.max_steps else "minutes=10"
        print(f"\nnext: python sample.py {out} --prompt='The ' --temperature=0.8\n"
              f"      python evaluate.py {out}\n"
              f"      the same command with --resume=true --max_{more} trains on; plot: {config.out_dir}/loss.png")


@dataclass
class PlotConfig:
    """The setting of `train.py plot`."""
    out_dir: str | None = None               # folder of loss.png; none = the first run's


USAGE = f"""usage: python train.py [config_x.py] [--key=value …]      train ({DEFAULT_CONFIG} when no config is given)
       python train.py plot OUT_DIR … [--out_dir=FOLDER]   draw the losses of runs to FOLDER/loss.png
       python train.py sweep [config_x.py] key=a,b …       train a grid; a table of all runs below out_dir

optimizers:""" + "".join(f"\n  {name:<8} {what}" for name, (_, _, what) in OPTIMIZERS.items())


def run_command_line(argv: list[str]) -> None:
    """What `python train.py ARGV` does. A mistake exits with 2, a full disk with 1, a signal with 128 + its number."""
    verbs = {None: TrainConfig, "sweep": TrainConfig, "plot": PlotConfig}
    default = str(Path(__file__).with_name(DEFAULT_CONFIG))
    if argv[:1] != ["plot"] and not any(word.endswith(".py") and not word.startswith("--") for word in argv):
        argv = [*argv, default]
    verb, files, config, sources = command_line(verbs, argv, USAGE, reads_scripts=argv[:1] == ["plot"])
    if verb is None and files:
        fail(f"{files[0]!r} is neither a setting (--key=value), a config_*.py nor a verb. {USAGE}")
    interrupted = None
    try:
        if verb == "plot":
            print(plot(files, config.out_dir))
            return
        by_flag = sources["max_steps"] == "flag" and config.max_steps is not None
        by_axis = any(word.startswith("max_steps=") for word in files)
        if (by_flag or by_axis) and sources["max_minutes"] != "flag":
            config.max_minutes = None              # the time limit of the config file is not meant
        elif not by_axis and config.max_steps is None and config.max_minutes is None:
            config.max_minutes = DEFAULT_MINUTES
        given = {key for key in sources if sources[key] not in ("default", default)}
        asked, config = config, take_shape(config, given)
        sources |= {key: str(config.start) for key in sources if getattr(config, key) != getattr(asked, key)}
        print_config(config, sources)
        given |= {word.partition("=")[0] for word in files}                # the axes of a sweep
        for point in grid(config, files) if verb == "sweep" else ():       # all that cannot be, before the first is run
            take_shape(point, given)
        speaks = os.environ.get("RANK", "0") == "0" and verb is None
        with only_writer(config.out_dir) if speaks else contextlib.nullcontext():
            interrupted = (sweep(config, files, lambda point: main(take_shape(point, given))) if verb == "sweep"
                           else main(config)["interrupted"])
    except (ValueError, OSError, FloatingPointError) as error:
        if getattr(error, "errno", None) not in DISK_FULL:
            fail(error)
        print(f"error: {error}; an older checkpoint is still whole: make room and use --resume=true", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not re.search("not enough memory|out of memory|can't allocate", str(error)):
            raise
        fail(f"{str(error).splitlines()[0]}; a smaller --micro_batch_size, --activation_checkpointing=true need less")
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
