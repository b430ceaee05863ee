"""From a base model to an assistant: fine-tuning (SFT), preferences (DPO), reinforcement by a verifier (GRPO).

    python align.py                                        the whole way on generated tasks: align_demo.py
    python align.py sft  --base=out/base --data=pairs.jsonl --out_dir=out/sft      instructions and responses
    python align.py dpo  --base=out/sft --data=preferences.jsonl --out_dir=out/dpo
    python align.py grpo --base=out/sft --data=problems.jsonl --out_dir=out/grpo --template=r1_zero

A base model goes on with a text. SFT shows it the form of an answer, on few examples. DPO raises what people prefer
over what they do not, without a reward model. GRPO lets it answer, checks the answers by program and makes the better
ones of each group likelier. The losses on tensors are in align_losses.py, the lines of files in align_data.py.

The response mask. A model predicts the next token, so labels are the ids one place on; only the response is learnt,
its end included. "What is 2+2?" answered "4", as tokenize_prompt_and_output gives it:

    input_ids       What   is    2     +     2     ?     4     <eos>
    labels          is     2     +     2     ?     4     <eos> <pad>
    response_mask   0      0     0     0     0     1     1     0

GRPO in ten lines, each question asked G times:

    for questions, truths in draw(problems):
        responses = [sample(model, question) for question in questions for _ in range(G)]
        rewards = torch.tensor([grade(response, truth) for response, truth in zip(responses, repeat(truths, G))])
        groups = rewards.view(-1, G)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        log_p, mask = score(model, repeat(questions, G), responses)                          # (B, T) each
        per_token = -advantages.view(-1, 1) * log_p
        loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
        loss.backward()
        optimizer.step(); optimizer.zero_grad()

Where -A log p comes from. The expected reward of a response y drawn from p has a gradient that samples can estimate:

    ∇ E[r] = Σ ∇p(y) r(y) = Σ p(y) ∇log p(y) r(y) = E[r ∇log p]              because ∇log p = ∇p / p
    E[∇log p] = Σ ∇p(y) = ∇ 1 = 0, so E[(r - b) ∇log p] is the same for any baseline b, with less noise

A = r - b with the group's mean as b; log p(y) is a sum over tokens, so each token counts by A. The loss itself means
nothing: advantages sum to 0. When all responses of a group earn the same, A is 0 and the group is dead: log the share.

Words: B rows, T tokens, V vocabulary. Policy: the model. Rollout: responses sampled from it. On-policy: learnt from
before the model moves. Reference: the model as it came. Entropy: nats of freedom per token; its collapse ends learning.
Left out: a value model, a learned reward, a KL penalty, resuming, several GPUs.
Sources: GRPO 2402.03300, R1 2501.12948, Dr. GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585.
"""
import copy
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from align_data import PackedSFT, bucketed, iterate_batches, padded, read_rows  # noqa: F401
from align_losses import (BASELINES, NORMALIZE, NORMALIZERS, REWEIGHTS, aggregate_loss, check_choice,  # noqa: F401
                          dpo_loss, group_advantages, grpo_step, grpo_train_step, masked_mean, masked_normalize,
                          padding_id, policy_gradient_loss, policy_step, response_log_probs, rollout_rewards, sft_step,
                          take_step, token_entropy, tokenize_prompt_and_output)
from checkpoint import claim_out_dir, forget_former, only_writer, read_checkpoint, save_checkpoint, sha256
from configurator import command_line, fail, print_config
from evaluate import (REWARDS, TEMPLATES, boxed_reward, continuation_log_probs, end_id, pick_template,  # noqa: F401
                      r1_zero_reward, standard_error)
from machine import Threads, pick_device
from model import Transformer, load_model
from optim import AdamW, Muon, cosine_schedule
from sample import stream

DEAD_ROLLOUTS = 5                    # so many in a row without anything to learn from end the run
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


# --- settings ---

@dataclass
class DemoConfig:
    """What `python align.py` without a verb can be told: the whole way on generated tasks, align_demo.py."""
    out_dir: str = "out/align"           # one folder per stage in it, and curves.png
    seed: int = 0                        # of everything random
    overwrite: bool = False              # replace the stages of an earlier run


@dataclass
class AlignConfig:
    """What all verbs can be told."""
    base: str | None = None              # folder of a checkpoint to start from (convert.py import makes one)
    data: str | None = None              # JSONL: sft pairs, dpo preferences, grpo problems
    out_dir: str = "out/align"           # checkpoint, tokenizer, log
    overwrite: bool = False              # replace the run that out_dir holds
    template: str | None = None          # plain qa alpaca r1_zero chat chatml; none = the base's own, else alpaca
    skip_bad: bool = False               # leave bad lines out and count them instead of stopping
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    seed: int = 0                        # of everything random
    steps: int = 100                     # optimizer steps (grpo: rollouts, each with its optimizer steps)
    batch_size: int = 32                 # rows per optimizer step (sft, dpo: examples; grpo: rollout rows)
    micro_batch_size: int = 32           # rows per forward pass
    lr: float = 1e-4                     # peak learning rate
    muon_lr: float = 0.0                 # above 0: Muon for the hidden matrices at this rate, AdamW for the others
    warmup_steps: int = 5                # steps of linear warmup; a cosine to a tenth follows
    weight_decay: float = 0.0            # adamw's
    grad_clip: float = 1.0               # largest gradient norm
    log_every: int = 10                  # steps between log lines

    def __post_init__(self):
        self.device = self.device or pick_device(None)

    def check(self) -> None:
        """Raises ValueError naming a setting that cannot be used."""
        for name in ("steps", "batch_size", "micro_batch_size", "log_every", "prompts_per_step", "group_size",
                     "epochs", "max_new_tokens"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "grad_clip", "beta", "temperature", "clip"):
            if not 0 < getattr(self, name, 1.0) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("warmup_steps", "muon_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 < getattr(self, "val_fraction", 0.5) < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        for name, allowed in (("baseline", BASELINES), ("normalizer", NORMALIZERS), ("reweight", REWEIGHTS),
                              ("normalize", NORMALIZE), ("reward", REWARDS), ("template", (None, *TEMPLATES))):
            if hasattr(self, name):
                check_choice(name, getattr(self, name), allowed)


@dataclass
class SFTConfig(AlignConfig):
    """What `python align.py sft` can be told."""
    val_fraction: float = 0.1            # examples held out


@dataclass
class DPOConfig(SFTConfig):
    """What `python align.py dpo` can be told."""
    lr: float = 1e-5                     # peak learning rate
    beta: float = 0.1                    # how far the policy may leave the reference


@dataclass
class GRPOConfig(AlignConfig):
    """What `python align.py grpo` can be told."""
    lr: float = 1e-5                     # peak learning rate
    reward: str = "r1_zero"              # r1_zero | boxed
    prompts_per_step: int = 16           # questions per rollout
    group_size: int = 8                  # responses to each
    batch_size: int = 128                # rows per optimizer step; fewer than the rollout's is off-policy
    epochs: int = 1                      # passes over each rollout; more than one is off-policy
    baseline: str = "mean"               # mean | none: what is taken from a reward
    normalizer: str = "std"              # std | mean (MaxRL) | none (Dr. GRPO): what the difference is divided by
    reweight: str = "grpo"               # none | noclip | grpo | gspo | cispo: for rows of an older policy
    clip: float = 0.2                    # grpo, gspo, cispo: how far a ratio counts
    normalize: str = "sequence"          # sequence | token | constant (batch_size times max_new_tokens)
    temperature: float = 1.0             # of the rollouts, and of the probabilities they are scored by
    max_new_tokens: int = 256            # longest response


# --- what the loops share ---

def make_optimizers(model, config) -> list:
    """AdamW, or with muon_lr Muon for the matrices of the layers beside it."""
    by_muon, by_adamw = [], []
    for name, p in model.named_parameters():
        hidden = config.muon_lr > 0 and p.dim() == 2 and name.startswith("layers.")
        (by_muon if hidden else by_adamw).append(p)
    adamw = AdamW(by_adamw, config.lr, (0.9, 0.95), weight_decay=config.weight_decay)
    return [adamw, Muon(by_muon, config.muon_lr)] if by_muon else [adamw]


def set_lr(optimizers, config, step: int) -> None:
    """The learning rates of one step: up linearly over warmup_steps, then down a cosine to a tenth."""
    factor = cosine_schedule(step, 1.0, 0.1, config.warmup_steps, config.steps)
    for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = factor * peak


def counted(total: int):
    """1 … total, on fewer threads while another program keeps a core busy."""
    with Threads(None) as threads:
        for step in range(1, total + 1):
            began = time.perf_counter()
            yield step
            threads.watch(time.perf_counter() - began)


def precision(config):
    return torch.autocast("cuda", torch.bfloat16, enabled=config.device.startswith("cuda"))


# --- the three loops ---

def sft(model, rows: list[tuple], config, pad_id: int = 0, log=None) -> None:
    """Fine-tune on (prompt ids, response ids), loss on the responses only: the sum over a step's tokens / their number.

    A row is one document; rows of like length share a batch instead of being packed.
    """
    optimizers, generator = make_optimizers(model.train(), config), torch.Generator().manual_seed(config.seed)
    batches = bucketed([len(prompt) + len(response) for prompt, response in rows], config.batch_size, generator)
    for step in counted(config.steps):
        group, loss, size = [rows[i] for i in next(batches)], 0.0, config.micro_batch_size
        mean_length = sum(len(response) for _, response in group) / len(group)
        set_lr(optimizers, config, step)
        for start in range(0, len(group), size):
            batch = padded(group[start:start + size], config, pad_id)
            with precision(config):
                log_probs = response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            parts = len(group) / len(log_probs)                      # ragged micro-batches: every row counts alike
            loss += sft_step(log_probs, batch["response_mask"], parts, mean_length)[0].item()
        norm = take_step(model, optimizers, config.grad_clip)
        if log and (step % config.log_every == 0 or step in (1, config.steps)):
            log(step=step, loss=loss, norm=norm)
    model.eval()


def sums(model, pairs: list[tuple], side: int, config) -> torch.Tensor:
    """Summed log-probabilities (N,) of one side of (prompt, chosen, rejected), without gradient."""
    with precision(config):
        return continuation_log_probs(model, [pair[0] for pair in pairs], [pair[side] for pair in pairs],
                                      2 * config.micro_batch_size)


def preference(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> dict:
    """What to look at besides the loss; accuracy is the share of pairs with a margin above 0.

    A pair without a margin counts half: so it starts at 50 %, where the policy is the reference.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    tie = margin.abs() < 1e-4                      # the two passes round differently
    return {"loss": dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta).mean().item(),
            "chosen": chosen.mean().item(), "rejected": rejected.mean().item(), "margin": margin.mean().item(),
            "accuracy": torch.where(tie, 0.5, (margin > 0).float()).mean().item()}


def dpo(model, pairs: list[tuple], held_out: list[tuple], config, pad_id: int = 0, log=None) -> dict:
    """Direct preference optimization on (prompt, chosen, rejected) ids; returns the held-out figures of what is kept.

    The model as it comes is the reference. Kept are the weights of the lowest held-out loss, looked at every log_every.
    """
    optimizers, generator = make_optimizers(model, config), torch.Generator().manual_seed(config.seed)
    reference, held_reference = (torch.stack([sums(model, part, side, config) for side in (1, 2)])
                                 for part in (pairs, held_out))      # (2, N) each
    batches = bucketed([len(p) + len(c) + len(r) for p, c, r in pairs], config.batch_size, generator)

    def look(step: int, **more) -> dict:
        now = preference(*(sums(model, held_out, side, config) for side in (1, 2)), *held_reference, config.beta)
        if log:
            log(step=step, **more, **{f"val_{name}": value for name, value in now.items()})
        return now | {"step": step}

    best, best_weights = look(0), copy.deepcopy(model.state_dict())
    before, size = best["accuracy"], max(1, config.micro_batch_size // 2)
    for step in counted(config.steps):
        group, loss = next(batches), 0.0
        model.train()
        set_lr(optimizers, config, step)
        for part in (group[i:i + size] for i in range(0, len(group), size)):
            batch = padded([(pairs[i][0], pairs[i][side]) for side in (1, 2) for i in part], config, pad_id)
            with precision(config):
                log_probs = response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            sides = [*masked_normalize(log_probs, batch["response_mask"], -1).chunk(2),
                     *reference[:, part].to(log_probs.device)]
            part_loss = dpo_loss(*sides, config.beta).sum() / len(group)
            part_loss.backward()
            loss += part_loss.item()
        norm = take_step(model, optimizers, config.grad_clip)
        if step % config.log_every == 0 or step == config.steps:
            now = look(step, loss=loss, norm=norm)
            if now["loss"] < best["loss"]:
                best, best_weights = now, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    model.eval()
    return best | {"before": before}


def rollout(model, prompts: list[list[int]], config, stop: int, vocab_limit: int, generator) -> list[list[int]]:
    """group_size responses to each prompt, which share its prefill: lists of ids up to and with the stop token."""
    rows = [[] for _ in range(len(prompts) * config.group_size)]
    model.eval()
    with precision(config):
        for ids in stream(model, prompts, config.max_new_tokens, temperature=config.temperature, stop_ids=(stop,),
                          vocab_limit=vocab_limit, generator=generator, n_each=config.group_size):
            for row, token in zip(rows, ids):
                if token is not None:
                    row.append(token)
    return rows


def learn(model, optimizers, batch: dict, advantages, config, generator) -> dict:
    """`epochs` passes over one rollout in shuffled batches of batch_size; returns means over all of them."""
    old, figures = None, []
    if config.reweight != "none":        # log p (N, T) by the policy that sampled
        parts = zip(batch["input_ids"].split(config.micro_batch_size), batch["labels"].split(config.micro_batch_size))
        with torch.no_grad():
            old = torch.cat([response_log_probs(model, ids, labels, temperature=config.temperature)["log_probs"]
                             for ids, labels in parts])
    for _ in range(config.epochs):
        for rows in torch.randperm(len(advantages), generator=generator).split(config.batch_size):
            _, info = policy_step(
                model, optimizers, {name: tensor[rows] for name, tensor in batch.items()}, advantages[rows],
                rows_at_a_time=config.micro_batch_size, max_norm=config.grad_clip, reweight=config.reweight,
                old_log_probs=None if old is None else old[rows], clip=config.clip, normalize=config.normalize,
                constant=len(rows) * config.max_new_tokens, temperature=config.temperature)
            figures.append(info)
    figures = [info for info in figures if info["norm"] > 0] or figures[:1]          # batches with something to learn
    return {name: sum(info[name] for info in figures) / len(figures) for name in figures[0]}


def grpo(model, problems: list[tuple], tokenizer, config, stop: int, log=None, estimator=group_advantages) -> None:
    """Group-relative policy optimization on (prompt ids, truth) with a verifier (2402.03300, algorithm 1).

    A step: prompts_per_step x group_size responses are sampled, graded and learnt from. DEAD_ROLLOUTS in a row of dead
    groups only end it with advice. estimator: your own in the place of `group_advantages`.
    """
    optimizers = make_optimizers(model, config)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    shuffle, queue, dead_in_a_row = torch.Generator().manual_seed(config.seed), [], 0
    for step in counted(config.steps):
        while len(queue) < config.prompts_per_step:
            queue += torch.randperm(len(problems), generator=shuffle).tolist()
        chosen, queue = [problems[i] for i in queue[:config.prompts_per_step]], queue[config.prompts_per_step:]
        responses = rollout(model, [prompt for prompt, _ in chosen], config, stop, tokenizer.vocab_size, generator)
        asked = [problem for problem in chosen for _ in range(config.group_size)]
        texts = [tokenizer.decode([i for i in row if i != stop]) for row in responses]
        rewards, info = rollout_rewards(REWARDS[config.reward], texts, [truth for _, truth in asked])
        advantages, dead = estimator(rewards, config.group_size, config.baseline, config.normalizer)
        groups = [texts[i:i + config.group_size] for i in range(0, len(texts), config.group_size)]
        info |= dead | {"distinct": sum(len(set(group)) for group in groups) / len(groups),
                        "eos_rate": sum(row[-1] == stop for row in responses) / len(responses),
                        "length": sum(map(len, responses)) / len(responses)}
        set_lr(optimizers, config, step)
        model.train()
        batch = padded([(prompt, row) for (prompt, _), row in zip(asked, responses)], config, padding_id(tokenizer))
        with precision(config):
            info |= learn(model, optimizers, batch, advantages, config, shuffle)
        if log and (step % config.log_every == 0 or step in (1, config.steps)):
            log(step=step, **info)
        dead_in_a_row = dead_in_a_row + 1 if dead["dead_groups"] == 1 else 0
        if dead_in_a_row == DEAD_ROLLOUTS:
            advice = (f"{DEAD_ROLLOUTS} rollouts in a row had dead groups only (mean reward {info['reward']:.2f}, "
                      f"{info['distinct']:.1f} of {config.group_size} responses distinct): nothing to learn from. "
                      "Reward 0: teach the form first (align.py sft), take easier problems or a larger --group_size. "
                      "Reward 1: take harder ones. Few distinct: raise --temperature")
            if step == DEAD_ROLLOUTS:
                raise ValueError(advice)
            print(advice)                # what was learnt before is kept
            break
    model.eval()


# --- files in, checkpoints out ---

def add_tokens(model, tokenizer, tokens) -> tuple:
    """(model, tokenizer) with these special tokens; a new row is the mean of the old ones, as good a guess as any."""
    grown, weights, device = tokenizer.with_special(tokens), model.state_dict(), next(model.parameters()).device
    bigger = Transformer(replace(model.config, vocab_size=max(model.config.vocab_size, grown.vocab_size))).to(device)
    for name in ("token_embeddings.weight", "lm_head.weight"):
        old = weights[name][:tokenizer.vocab_size]
        new = old.mean(dim=0).expand(bigger.config.vocab_size - len(old), -1)
        weights[name] = torch.cat((old, new + 0.02 * old.std() * torch.randn_like(new)))        # noise parts them
    bigger.load_state_dict(weights)
    return bigger, grown


def load_base(config) -> tuple:
    """(model, tokenizer, template) from a checkpoint; the template's tokens are added where they are missing."""
    model, tokenizer = load_model(config.base, config.device)
    model.float()                            # bfloat16 weights would lose small steps
    if tokenizer is None:
        raise ValueError(f"{config.base} has no tokenizer.json that can be read")
    tuned = read_checkpoint(Path(config.base) / "ckpt.pt").get("template")
    template = pick_template(tokenizer, config.template or tuned, "alpaca")
    tokens = list(CHAT_TOKENS) if template == "chat" else []
    if end_id(tokenizer, template) is None:
        tokens.append(TEMPLATES[template][1])
    if not set(tokens) <= set(tokenizer.special_tokens):
        model, tokenizer = add_tokens(model, tokenizer, tokens)
    return model, tokenizer, template


def save(model, tokenizer, folder, config, template: str, log) -> None:
    """A folder that sample.py, evaluate.py and another stage can start from; never one of a diverged model."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise FloatingPointError("the weights are no numbers any more: nothing is saved; lower --lr (or --muon_lr)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    save_checkpoint(model, None, config.steps, folder / "ckpt.pt", template=template,
                    align_config=asdict(config), tokenizer_sha256=sha256(folder / "tokenizer.json"))
    forget_former(folder)
    log.path.replace(folder / "log.jsonl")


class Log:
    """Prints what a run logs and writes it to log.new.jsonl at once; `save` gives that its name beside the checkpoint,
    so that a run which fails leaves what it logged and nothing that counts as a run."""

    def __init__(self, name: str, folder, **header):
        self.name, self.path, self.lines = name, Path(folder) / "log.new.jsonl", []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.write(header)

    def write(self, entry: dict) -> None:
        """Add a line."""
        self.lines.append(entry)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps(entry), file=file)
        except OSError as error:
            raise OSError(error.errno, f"{self.path} could not be written: {error.strerror}") from error

    def __call__(self, **entry):
        entry = {name: value for name, value in entry.items() if not math.isnan(value)}
        self.write(entry)
        print(f"{self.name:<5}", " | ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)


def run_verb(verb: str, config) -> None:
    """sft, dpo or grpo from config.base on config.data to config.out_dir."""
    config.check()
    pick_device(config.device)
    claim_out_dir(config.out_dir, config.overwrite, inputs=[config.base])
    torch.manual_seed(config.seed)
    model, tokenizer, template = load_base(config)
    rows, held = read_rows(verb, config, tokenizer, template, model.config.context_length)
    pad_id = padding_id(tokenizer)
    log = Log(verb, config.out_dir, template=template, torch=torch.__version__, config=asdict(config))
    if verb == "sft":
        def nats():
            return -sums(model, held, 1, config).sum().item() / sum(len(row[1]) for row in held)
        before = nats()
        sft(model, rows, config, pad_id, log)
        print(f"held out, {len(held)} examples: {before:.4f} nats per token before, {nats():.4f} after")
    elif verb == "dpo":
        best = dpo(model, rows, held, config, pad_id, log)
        print(f"held out, {len(held)} pairs: preference accuracy {best['accuracy']:.1%} ± "
              f"{standard_error(best['accuracy'], len(held)):.1%} at step {best['step']}, margin {best['margin']:.3f}")
    else:
        grpo(model, rows, tokenizer, config, end_id(tokenizer, template), log)
    save(model, tokenizer, config.out_dir, config, template, log)
    print(f"saved {config.out_dir}; see: python sample.py {shlex.quote(config.out_dir)} --prompt=…")


CONFIGS = {None: DemoConfig, "sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}
USAGE = """usage: python align.py [--out_dir= --seed= --overwrite=true]              the whole way on generated tasks
       python align.py sft | dpo | grpo --base=OUT_DIR --data=FILE.jsonl --out_dir= [--key=value …]"""


def main(argv: list[str]) -> None:
    """Run a verb or, without one, align_demo.py; a mistake or a run that diverged exits with status 2."""
    verb, files, config, sources = command_line(CONFIGS, argv, USAGE)
    if files:
        fail(f"{files[0]!r} is neither a verb nor a setting. {USAGE}")
    if verb is None:
        sys.exit(subprocess.run([sys.executable, str(Path(__file__).with_name("align_demo.py")), *argv]).returncode)
    try:
        if not (config.base and config.data):
            raise ValueError(f"{verb} needs --base, the folder to start from, and --data, a JSONL file. {USAGE}")
        print_config(config, sources)
        with only_writer(config.out_dir):
            run_verb(verb, config)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped; nothing is saved: these runs do not resume", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
