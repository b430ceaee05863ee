"""From a base model to an assistant: fine-tuning (SFT), preferences (DPO), reinforcement by a verifier (GRPO).

    python align.py                                        the whole way on generated tasks: a table and learning curves
    python align.py sft  --base=out/base --data=pairs.jsonl --out_dir=out/sft      instructions and responses
    python align.py dpo  --base=out/sft --data=preferences.jsonl --out_dir=out/dpo --lr=1e-5
    python align.py grpo --base=out/sft --data=problems.jsonl --out_dir=out/grpo --template=r1_zero

A base model goes on with a text. SFT shows it the form of an answer, on few examples. DPO raises what people prefer
over what they do not, without a reward model (Rafailov 2023, 2305.18290). GRPO lets it answer, checks the answers by
program and makes the better ones of each group likelier (DeepSeekMath, 2402.03300; R1, 2501.12948; Dr. GRPO,
2503.20783). The losses stand alone, on tensors, and take models and tokenizers of Hugging Face too.

The embedded experiment: a small model reads a little "web" of worked sums, counts and words, none of it an assistant's.
A thousand demonstrations, most of them rash, teach it the form `<think> … </think> <answer> … </answer>`; GRPO then
finds by itself that it pays to think before answering.

Left out: a value model, a learned reward, packing with a mask of documents (model.py has none: a row is a document,
rows of like length share a batch), resuming, and several GPUs.
"""
import copy
import hashlib
import inspect
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import bpe
from checkpoint import read_checkpoint, save_checkpoint, sha256
from configurator import command_line, fail, print_config
from evaluate import (REFUSAL, REWARDS, TEMPLATES, boxed_reward, continuation_log_probs, end_id, last_boxed,  # noqa: F401
                      need, pad_rows, pick_template, r1_zero_reward, read_jsonl, render, same_answer, standard_error)
from model import ModelConfig, Transformer, load_model, token_cross_entropy, wide
from optim import AdamW, Muon, clip_grad_norm, cosine_schedule
from sample import distribution, prefill, stream


# --- masks and log-probabilities ---

def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text without BOS and EOS, from a tokenizer of ours or of Hugging Face's."""
    theirs = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(text, add_special_tokens=False) if theirs else tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def padding_id(tokenizer) -> int:
    """What rows are filled up with: the tokenizer's padding where it has one. Masks, not this id, say what counts."""
    given = getattr(tokenizer, "pad_token_id", None)
    special = getattr(tokenizer, "special_tokens", None)
    return given if given is not None else special.get("<|pad|>", 0) if isinstance(special, dict) else 0


def tokenize_prompt_and_output(prompts: list[str], responses: list[str], tokenizer) -> dict:
    """{input_ids, labels, response_mask}, each (B, T-1), of prompts and responses tokenised apart and joined.

    Padded on the right to the longest, T. labels are the ids one place on; response_mask, boolean, is aligned with
    labels: True where the token to be predicted belongs to the response, an EOS in it included, and never on padding.
    Raises ValueError for lists of different or no length.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; give as many of both, at least one")
    return pad_rows([encode(tokenizer, prompt) for prompt in prompts],
                    [encode(tokenizer, response) for response in responses], padding_id(tokenizer))


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """-Σ p log p over the vocabulary in nats: (..., V) -> (...), finite also where a probability is 0."""
    log_p = torch.log_softmax(wide(logits), dim=-1)
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(dim=-1)


def response_log_probs(model, input_ids, labels, return_entropy: bool = False, *, temperature: float = 1.0) -> dict:
    """{log_probs} of the labels (B, T) in nats, with return_entropy also {token_entropy} (B, T), without gradient.

    model: ours, whose call gives logits, or Hugging Face's, which gives .logits. temperature: that of the sampling, so
    that a sample is scored by the distribution it came from.
    """
    out = model(input_ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    logits = logits if temperature == 1 else logits / temperature
    found = {"log_probs": -token_cross_entropy(logits, labels)}
    if return_entropy:
        with torch.no_grad():
            found["token_entropy"] = token_entropy(logits)
    return found


def masked_normalize(x, mask, dim: int | None = None, constant: float = 1.0) -> torch.Tensor:
    """Sum of x where mask is set, over dim (None: over all), divided by constant."""
    kept = torch.where(mask.bool(), x, 0.0)                         # not x * mask: NaN would stay
    return (kept.sum() if dim is None else kept.sum(dim=dim)) / constant


def masked_mean(x, mask, dim: int | None = None) -> torch.Tensor:
    """Mean of x where mask is set, over dim (None: over all); NaN where nothing is set, which callers deal with."""
    mask = mask.bool().expand_as(x)
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_normalize(x, mask, dim) / count


def sft_step(log_probs, response_mask, accumulation_steps: float, constant: float = 1.0) -> tuple:
    """Backward of one micro-batch: -Σ log p over each response / constant, averaged over rows, / accumulation_steps.

    Returns (loss, info). accumulation_steps: micro-batches per step; for ragged ones, rows of the step / rows of this.
    """
    loss = -masked_normalize(log_probs, response_mask, -1, constant).mean() / accumulation_steps
    loss.backward()
    return loss.detach(), {"nats_per_token": -masked_mean(log_probs.detach(), response_mask)}


# --- policy gradients ---

KINDS = ("no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip")
NORMALIZE = ("sequence", "token", "constant")


def group_normalized_rewards(reward_fn, responses: list[str], truths: list, group_size: int, eps: float = 1e-6,
                             normalize_by_std: bool = True) -> tuple:
    """(advantages (N,), rewards (N,), info) of responses that stand in groups of group_size to one question each.

    advantage = (r - mean) / (std + eps) within the group, std unbiased (DeepSeekMath, 2402.03300, 4.1.2), or r - mean
    alone (Dr. GRPO, 2503.20783). Equal rewards give 0. reward_fn(response, truth) -> {reward, …}.
    """
    if len(responses) != len(truths) or not responses or group_size < 1 or len(responses) % group_size:
        raise ValueError(f"{len(responses)} responses and {len(truths)} truths do not make groups of {group_size}")
    scores = [reward_fn(response, truth) for response, truth in zip(responses, truths)]
    rewards = torch.tensor([float(score["reward"]) for score in scores])
    groups = rewards.view(-1, group_size)
    std = groups.std(dim=1, keepdim=True) if group_size > 1 else torch.zeros(len(groups), 1)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (std + eps)
    # Of equal rewards the mean may be one rounding off, which dividing by eps would blow up.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    advantages = torch.where(equal, 0.0, advantages)
    info = {"reward": rewards.mean().item(), "reward_std": std.mean().item(), "reward_min": rewards.min().item(),
            "reward_max": rewards.max().item(), "groups_without_variance": equal.float().mean().item()}
    for name in ("format_reward", "answer_reward"):
        if all(name in score for score in scores):
            info[name] = sum(float(score[name]) for score in scores) / len(scores)
    return advantages.flatten(), rewards, info


def policy_gradient_loss(log_probs, kind: str, rewards=None, advantages=None, old_log_probs=None,
                         clip: float | None = None) -> tuple:
    """(loss of every token (B, T), info); rewards and advantages are (B, 1), one for all tokens of a row.

        no_baseline               -r log p                           reinforce_with_baseline   -A log p
        grpo_no_clip              -ρ A, with ρ = p / p_old            grpo_clip   -min(ρ A, clip(ρ, 1 ± clip) A)

    info of the last two: ratio, and clipped (B, T), where the clip took the gradient away. Raises ValueError for an
    unknown kind and for what a kind needs and did not get. Source: 1707.06347, eq. 7; 2402.03300, eq. 3.
    """
    needs = {"no_baseline": {"rewards": rewards}, "reinforce_with_baseline": {"advantages": advantages},
             "grpo_no_clip": {"advantages": advantages, "old_log_probs": old_log_probs},
             "grpo_clip": {"advantages": advantages, "old_log_probs": old_log_probs, "clip": clip}}
    if kind not in needs:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    missing = [name for name, value in needs[kind].items() if value is None]
    if missing:
        raise ValueError(f"kind={kind} needs {', '.join(missing)}")
    weight = rewards if kind == "no_baseline" else advantages
    weight = torch.as_tensor(weight).to(log_probs)
    if weight.numel() != len(log_probs):
        raise ValueError(f"{'rewards' if kind == 'no_baseline' else 'advantages'} of shape {tuple(weight.shape)} must "
                         f"be one for each row, ({len(log_probs)}, 1)")
    weight = weight.reshape(len(log_probs), 1)
    if kind in ("no_baseline", "reinforce_with_baseline"):
        return -weight * log_probs, {}
    if old_log_probs.shape != log_probs.shape or not (clip is None or clip >= 0):
        raise ValueError(f"old_log_probs {tuple(old_log_probs.shape)} must have the shape of log_probs "
                         f"{tuple(log_probs.shape)}, and clip={clip} must be at least 0")
    ratio = torch.exp(log_probs - old_log_probs)
    plain = ratio * weight
    bounded = plain if kind == "grpo_no_clip" else ratio.clamp(1 - clip, 1 + clip) * weight
    return -torch.minimum(plain, bounded), {"ratio": ratio.detach(), "clipped": bounded < plain}


def grpo_step(log_probs, response_mask, accumulation_steps: float, kind: str, rewards=None, advantages=None,
              old_log_probs=None, clip: float | None = None, *, normalize: str = "sequence",
              constant: float | None = None, ref_log_probs=None, kl_weight: float = 0.0) -> tuple:
    """Backward of one micro-batch of policy_gradient_loss; returns (loss, info).

    Three losses by name (they differ in what a token of a long response weighs):
        sequence   mean over each response's tokens, then over rows (GRPO); a row without response counts as 0
        token      sum over all tokens / constant, by default the tokens of this micro-batch (DAPO, 2503.14476)
        constant   sum over each response / constant, then mean over rows (Dr. GRPO); needs constant
    kl_weight: adds that much of exp(d) - d - 1, d = log p_ref - log p, to each token's loss (2402.03300, eq. 4).
    """
    if normalize not in NORMALIZE or normalize == "constant" and constant is None:
        raise ValueError(f"normalize={normalize!r} must be one of {', '.join(NORMALIZE)}, the last with constant=")
    # What stands on padding must not matter: a gradient through exp(inf) is NaN even where the loss is masked out.
    old_log_probs, ref_log_probs = (other if other is None or other.shape != log_probs.shape else
                                    torch.where(response_mask.bool(), other, log_probs.detach())
                                    for other in (old_log_probs, ref_log_probs))
    each, info = policy_gradient_loss(log_probs, kind, rewards, advantages, old_log_probs, clip)
    info = {"ratio" if name == "ratio" else "clip_fraction": masked_mean(value.float(), response_mask)
            for name, value in info.items()}
    if kl_weight:
        if ref_log_probs is None:
            raise ValueError(f"kl_weight={kl_weight} needs ref_log_probs")
        gap = ref_log_probs - log_probs
        kl = torch.exp(gap) - gap - 1
        each, info["kl"] = each + kl_weight * kl, masked_mean(kl.detach(), response_mask)
    if normalize == "token":
        loss = masked_normalize(each, response_mask, None, constant or response_mask.sum().clamp(min=1))
    else:
        lengths = response_mask.sum(dim=-1).clamp(min=1) if normalize == "sequence" else constant
        loss = masked_normalize(each, response_mask, -1, lengths).mean()
    loss = loss / accumulation_steps
    loss.backward()
    return loss.detach(), info


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> torch.Tensor:
    """-log σ(β ((chosen - ref_chosen) - (rejected - ref_rejected))) of each pair; ln 2 where the two models agree.

    All four: log-probabilities of whole responses, summed over their tokens, (B,). Source: 2305.18290, eq. 7.
    """
    shapes = {tuple(x.shape) for x in (chosen, rejected, ref_chosen, ref_rejected)}
    if len(shapes) > 1:
        raise ValueError(f"log-probabilities of shapes {sorted(shapes)} must all be (B,)")
    return -torch.nn.functional.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


# --- the course's packed data set ---

class PackedSFT(torch.utils.data.Dataset):
    """Alpaca documents of a JSONL file (prompt, response) end to end, cut into chunks: {input_ids, labels}.

    Each document begins with the tokenizer's BOS, where it has one, and ends with its EOS. A chunk has context_length
    ids, labels are one place on, prompts count as well, and what does not fill a chunk is left out. shuffle: the
    documents. Attention crosses them, as model.py has no mask of documents; `sft` below keeps each in a row of its own.
    """

    def __init__(self, tokenizer, path, context_length: int, shuffle: bool, seed: int = 0):
        documents = read_jsonl(path, lambda record: need(record, "prompt", "response"))[0]
        if shuffle:
            random.Random(seed).shuffle(documents)
        theirs, ids = hasattr(tokenizer, "eos_token_id"), []
        end = tokenizer.eos_token_id if theirs else end_id(tokenizer, "alpaca")
        if end is None:
            raise ValueError("this tokenizer has no token that ends a text, such as <|endoftext|>")
        for prompt, response in documents:
            own = list(tokenizer.encode(TEMPLATES["alpaca"][0].replace("{prompt}", prompt) + response))
            ids += own if own[-1] == end else own + [end]
        self.ids, self.context_length = torch.tensor(ids), context_length

    def __len__(self):
        return (len(self.ids) - 1) // self.context_length

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        start = index % len(self) * self.context_length
        return {"input_ids": self.ids[start:start + self.context_length],
                "labels": self.ids[start + 1:start + self.context_length + 1]}


def iterate_batches(dataset, batch_size: int, shuffle: bool):
    """One epoch of batches of a data set's dicts, stacked, the last one smaller; it has a length."""
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


# --- settings ---

@dataclass
class AlignConfig:
    """What `python align.py` and its verbs can be told."""
    base: str | None = None              # sft, dpo, grpo: folder of a checkpoint, or of Hugging Face's form
    data: str | None = None              # sft: pairs; dpo: preferences; grpo: problems; all JSONL
    out_dir: str = "out/align"           # checkpoint, tokenizer, log; the default experiment: one folder per stage
    template: str | None = None          # plain qa alpaca r1_zero chat chatml; none = the base's own, else alpaca
    skip_bad: bool = False               # leave bad lines out and count them instead of stopping
    context_length: int | None = None    # shorten the model's context: less memory for generation
    device: str = "cpu"                  # cpu, cuda, mps
    seed: int = 0                        # of everything random
    steps: int = 100                     # optimizer steps (grpo: rollouts, each with its optimizer steps)
    batch_size: int = 32                 # rows per optimizer step (sft, dpo: examples; grpo: rollout rows)
    micro_batch_size: int = 32           # rows per forward pass
    lr: float = 1e-4                     # peak learning rate
    muon_lr: float = 0.0                 # above 0: Muon for the hidden matrices at this rate, AdamW for the rest
    warmup_steps: int = 5                # steps of linear warmup; a cosine to a tenth follows
    weight_decay: float = 0.0            # adamw's
    grad_clip: float = 1.0               # largest gradient norm
    log_every: int = 10                  # steps between log lines
    val_fraction: float = 0.1            # sft, dpo: examples held out
    beta: float = 0.1                    # dpo: how far the policy may leave the reference
    patience: int = 5                    # dpo: stop after so many held-out evaluations without a better loss
    kind: str = "grpo_clip"              # grpo: one of the four losses, or expert_iteration
    reward: str = "r1_zero"              # grpo: r1_zero | boxed
    prompts_per_step: int = 16           # grpo: questions per rollout
    group_size: int = 8                  # grpo: responses to each
    epochs: int = 1                      # grpo: passes over each rollout; more than one batch or pass is off-policy
    clip: float = 0.2                    # grpo_clip: how far a probability ratio counts
    normalize: str = "sequence"          # grpo: sequence | token | constant (of max_new_tokens)
    normalize_by_std: bool = True        # grpo: false = mean-centred advantages only (Dr. GRPO)
    kl_weight: float = 0.0               # grpo: weight of the KL to the base model
    temperature: float = 1.0             # grpo: of the rollouts, and of the probabilities they are scored by
    max_new_tokens: int = 256            # grpo: longest response


CHOICES = {"kind": (*KINDS, "expert_iteration"), "normalize": NORMALIZE, "reward": tuple(REWARDS)}
AT_LEAST_ONE = ("steps", "batch_size", "micro_batch_size", "log_every", "prompts_per_step", "group_size", "epochs",
                "max_new_tokens")


# --- training ---

class Learner:
    """A model, its optimizer and its schedule: `step` once the gradients are there."""

    def __init__(self, model, config: AlignConfig, total_steps: int):
        self.model, self.config, self.total_steps, self.done = model.train(), config, total_steps, 0
        hidden, rest = [], []
        for name, p in model.named_parameters():
            (hidden if config.muon_lr and p.dim() == 2 and name.startswith("layers.") else rest).append(p)
        self.optimizers = [AdamW(rest, config.lr, (0.9, 0.95), weight_decay=config.weight_decay)]
        if hidden:
            self.optimizers.append(Muon(hidden, config.muon_lr))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self) -> float:
        """Clip, step, forget the gradients; returns the norm before clipping."""
        self.done += 1
        factor = cosine_schedule(self.done, 1.0, 0.1, self.config.warmup_steps, self.total_steps)
        norm = clip_grad_norm(self.model.parameters(), self.config.grad_clip).item()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm


def bucketed(lengths: list[int], batch_size: int, generator):
    """Endless batches of indices, rows of like length together: an epoch is shuffled, cut into pools of 16 batches,
    each pool sorted, and its batches shuffled."""
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lengths.__getitem__)
            batches = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def micro_batches(rows: list[tuple], config: AlignConfig, pad_id: int) -> list[dict]:
    """(prompt ids, response ids, …) as padded batches on the device; "steps" are the accumulation steps that give
    each row the same weight, however ragged the batches."""
    size, found = config.micro_batch_size, []
    for part in (rows[start:start + size] for start in range(0, len(rows), size)):
        batch = pad_rows([row[0] for row in part], [row[1] for row in part], pad_id)
        found.append({name: value.to(config.device) for name, value in batch.items()})
        found[-1]["steps"] = len(rows) / len(part)
    return found


def score(model, batch: dict, config: AlignConfig, return_entropy: bool = False, temperature: float = 1.0) -> dict:
    """response_log_probs of a micro-batch, with bfloat16 matrix products on a GPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=config.device.startswith("cuda")):
        return response_log_probs(model, batch["input_ids"], batch["labels"], return_entropy, temperature=temperature)


def sft(model, rows: list[tuple], config: AlignConfig, pad_id: int = 0, log=None) -> None:
    """Fine-tune on (prompt ids, response ids), loss on the responses only: the sum over a step's tokens / their number.

    A row is one document, so no attention crosses documents; rows of like length share a batch instead of being packed.
    """
    learner = Learner(model, config, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    batches = bucketed([len(prompt) + len(response) for prompt, response in rows], config.batch_size, generator)
    for step in range(1, config.steps + 1):
        group, loss = [rows[i] for i in next(batches)], 0.0
        mean_length = sum(len(response) for _, response in group) / len(group)
        for batch in micro_batches(group, config, pad_id):
            log_probs = score(model, batch, config)["log_probs"]
            loss += sft_step(log_probs, batch["response_mask"], batch["steps"], mean_length)[0].item()
        norm = learner.step()
        if log and (step % config.log_every == 0 or step in (1, config.steps)):
            log(step=step, loss=loss, norm=norm)
    model.eval()


def sums(model, pairs: list[tuple], side: int, config: AlignConfig) -> torch.Tensor:
    """Summed log-probabilities (N,) of one side of (prompt, chosen, rejected), without gradient."""
    with torch.autocast("cuda", torch.bfloat16, enabled=config.device.startswith("cuda")):
        return continuation_log_probs(model, [pair[0] for pair in pairs], [pair[side] for pair in pairs],
                                      2 * config.micro_batch_size)


def preference(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> dict:
    """What to look at besides the loss: both sides apart, because the margin also grows while both fall.

    A pair with no margin counts half in accuracy: so it starts at 50 %, where the policy is the reference.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    tie = margin.abs() < 1e-4                      # the two passes round differently
    return {"loss": dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta).mean().item(),
            "chosen": chosen.mean().item(), "rejected": rejected.mean().item(), "margin": margin.mean().item(),
            "accuracy": torch.where(tie, 0.5, (margin > 0).float()).mean().item()}


def dpo(model, pairs: list[tuple], held_out: list[tuple], config: AlignConfig, pad_id: int = 0, log=None) -> dict:
    """Direct preference optimization on (prompt, chosen, rejected) ids; returns the held-out figures kept.

    The model as it comes is the reference. Stops early, with the best weights, once `patience` evaluations on held_out
    brought no lower loss.
    """
    learner = Learner(model, config, config.steps)
    reference = [torch.stack([sums(model, part, side, config) for side in (1, 2)], dim=1) for part in (pairs, held_out)]
    batches = bucketed([len(p) + len(c) + len(r) for p, c, r in pairs], config.batch_size,
                       torch.Generator().manual_seed(config.seed))
    best, best_weights, waited = None, None, 0
    for step in range(config.steps + 1):
        if step % config.log_every == 0 or step == config.steps:
            now = preference(*(sums(model, held_out, side, config) for side in (1, 2)), *reference[1].T, config.beta)
            if log:
                log(step=step, **{f"val_{name}": value for name, value in now.items()})
            before = now["accuracy"] if step == 0 else before
            waited = 0 if best is None or now["loss"] < best["loss"] else waited + 1
            if waited == 0:
                best, best_weights = now | {"step": step, "before": before}, copy.deepcopy(model.state_dict())
            if waited > config.patience:
                break
            model.train()
        if step == config.steps:
            break
        group, found = next(batches), []
        size = max(1, config.micro_batch_size // 2)
        for part in (group[i:i + size] for i in range(0, len(group), size)):
            rows = [(pairs[i][0], pairs[i][side]) for side in (1, 2) for i in part]
            batch, = micro_batches(rows, replace(config, micro_batch_size=len(rows)), pad_id)
            both = masked_normalize(score(model, batch, config)["log_probs"], batch["response_mask"], -1).chunk(2)
            sides = [*both, *reference[0][part].T.to(both[0].device)]
            (dpo_loss(*sides, config.beta).sum() / len(group)).backward()
            found.append([side.detach() for side in sides])
        norm = learner.step()
        if log and (step % config.log_every == 0):
            log(step=step, norm=norm, **preference(*map(torch.cat, zip(*found)), config.beta))
    model.load_state_dict(best_weights)
    model.eval()
    return best


# --- reinforcement ---

def rollout(model, prompts: list[list[int]], config: AlignConfig, stop: int, vocab_limit: int, generator) -> list:
    """group_size responses to each prompt, which share its prefill: lists of ids up to and with the stop token."""
    rows = [[] for _ in range(len(prompts) * config.group_size)]
    model.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=config.device.startswith("cuda")):
        for ids in stream(model, prompts, config.max_new_tokens, temperature=config.temperature, stop_ids=(stop,),
                          vocab_limit=vocab_limit, generator=generator, n_each=config.group_size):
            for row, token in zip(rows, ids):
                if token is not None:
                    row.append(token)
    return rows


@torch.inference_mode()
def sampler_log_probs(model, rows: list[tuple], temperature: float, vocab_limit: int | None = None) -> torch.Tensor:
    """log p of every response token of the rows, one after another, as the sampler saw it: token by token against the
    cache, from its own distribution."""
    longest, found = max(len(response) for _, response in rows), []
    logits, memory = prefill(model, [prompt for prompt, _ in rows], True, longest)
    for t in range(longest):
        ids = torch.tensor([response[min(t, len(response) - 1)] for _, response in rows], device=logits.device)
        logits = logits[:, :vocab_limit]
        found.append(distribution(logits, temperature).gather(1, ids[:, None]).log())
        logits = model(ids[:, None], cache=memory)[:, -1]
    return torch.cat([line[:len(response)] for line, (_, response) in zip(torch.cat(found, dim=1), rows)])


def drift(model, rows: list[tuple], config: AlignConfig, vocab_limit: int) -> float:
    """Mean |log p of the sampler - log p of the learner| per token of some rows: 0 but for rounding, unless the two
    disagree about temperature, truncation or weights."""
    batch, = micro_batches(rows, replace(config, micro_batch_size=len(rows)), 0)
    with torch.inference_mode():
        learner = score(model, batch, config, temperature=config.temperature)["log_probs"][batch["response_mask"]]
    return (sampler_log_probs(model, rows, config.temperature, vocab_limit) - learner).abs().mean().item()


def grpo(model, problems: list[tuple], tokenizer, config: AlignConfig, stop: int, reference=None, log=None) -> None:
    """Group-relative policy optimization on (prompt ids, truth) with a verifier (2402.03300, algorithm 1).

    A step: prompts_per_step x group_size responses are sampled, graded, and learnt from in batches of batch_size,
    `epochs` times over. One batch and one epoch is on-policy: the ratio is 1, nothing is clipped, and the loss is 0
    with a gradient. kind="expert_iteration" fine-tunes on the right responses instead (STaR, 2203.14465).
    """
    rows_per_step = config.prompts_per_step * config.group_size
    batches_per_step = math.ceil(rows_per_step / config.batch_size)
    expert = config.kind == "expert_iteration"
    learner = Learner(model, config, config.steps * config.epochs * batches_per_step)
    generator = torch.Generator(config.device).manual_seed(config.seed)
    shuffle = torch.Generator().manual_seed(config.seed)
    queue, reward_fn, pad_id = [], REWARDS[config.reward], padding_id(tokenizer)
    for step in range(1, config.steps + 1):
        while len(queue) < config.prompts_per_step:
            queue += torch.randperm(len(problems), generator=shuffle).tolist()
        chosen, queue = [problems[i] for i in queue[:config.prompts_per_step]], queue[config.prompts_per_step:]
        responses = rollout(model, [prompt for prompt, _ in chosen], config, stop, tokenizer.vocab_size, generator)
        repeated = [problem for problem in chosen for _ in range(config.group_size)]
        texts = [tokenizer.decode([i for i in row if i != stop]) for row in responses]
        advantages, rewards, info = group_normalized_rewards(reward_fn, texts, [truth for _, truth in repeated],
                                                             config.group_size, 1e-6, config.normalize_by_std)
        rows = [(prompt, response) for (prompt, _), response in zip(repeated, responses)]
        info["length"] = sum(map(len, responses)) / len(rows)
        info["truncated"] = sum(row[-1] != stop for row in responses) / len(rows)
        if log and (step % config.log_every == 0 or step == 1):
            info["drift"] = drift(model, rows[:config.group_size], config, tokenizer.vocab_size)
        order = torch.randperm(len(rows), generator=shuffle).tolist()
        if expert:
            order = [i for i in order if rewards[i] > 0]
        model.train()
        batches = [prepare_batch(model, reference, [(*rows[i], advantages[i].item(), rewards[i].item()) for i in
                                 order[start:start + config.batch_size]], config, pad_id)
                   for start in range(0, len(order), config.batch_size)]
        for batch in [batch for _ in range(config.epochs) for batch in batches]:
            info |= learn(model, batch, config)
            info["norm"] = learner.step()
        if log:
            log(step=step, **info)
    model.eval()


def prepare_batch(model, reference, rows: list[tuple], config: AlignConfig, pad_id: int) -> list[dict]:
    """Micro-batches of (prompt, response, advantage, reward) with the log-probabilities of before the first step."""
    batches, start = micro_batches(rows, config, pad_id), 0
    for batch in batches:
        own, start = rows[start:start + len(batch["labels"])], start + len(batch["labels"])
        for name, column in (("advantages", 2), ("rewards", 3)):
            batch[name] = torch.tensor([[row[column]] for row in own], device=config.device)
        with torch.inference_mode():
            if config.kind.startswith("grpo"):
                batch["old_log_probs"] = score(model, batch, config, temperature=config.temperature)["log_probs"]
            if config.kl_weight:
                batch["ref_log_probs"] = score(reference, batch, config, temperature=config.temperature)["log_probs"]
    return batches


def learn(model, batches: list[dict], config: AlignConfig) -> dict:
    """Gradients of one optimizer step from its micro-batches; returns loss, entropy and what grpo_step tells."""
    total, info = sum(int(batch["response_mask"].sum()) for batch in batches), {"loss": 0.0}
    for batch in batches:
        mask, steps = batch["response_mask"], batch["steps"]
        scored = score(model, batch, config, True, config.temperature)
        if config.kind == "expert_iteration":
            loss, more = sft_step(scored["log_probs"], mask, steps, total / len(mask) / steps)
        else:
            constant = {"token": total / steps, "constant": config.max_new_tokens}.get(config.normalize)
            loss, more = grpo_step(
                scored["log_probs"], mask, steps, config.kind, batch["rewards"], batch["advantages"],
                batch.get("old_log_probs"), config.clip, normalize=config.normalize, constant=constant,
                ref_log_probs=batch.get("ref_log_probs"), kl_weight=config.kl_weight)
        info["loss"] += loss.item()
        for name, value in (more | {"entropy": masked_mean(scored["token_entropy"], mask)}).items():
            info[name] = info.get(name, 0.0) + value.item() / steps
    return info


# --- files in, checkpoints out ---

CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")


def conversation(record: dict) -> tuple[list[str], list[str]]:
    """(turns up to the last user's, responses) of one line, in any of the forms that people publish.

    messages [{role, content}]; HH's chosen and rejected dialogues (2204.05862); prompt, instruction (+ input), question
    or problem with chosen and rejected, or with response, output, answer or solution.
    """
    if "messages" in record or str(record.get("chosen")).lstrip().startswith("Human:"):
        if "messages" in record:
            dialogues = [[(message["role"], message["content"]) for message in record["messages"]]]
        else:
            parts = [re.split(r"\s*\b(Human|Assistant): ?", side) for side in need(record, "chosen", "rejected")]
            dialogues = [list(zip(part[1::2], map(str.strip, part[2::2]))) for part in parts]
        dialogues = [[(side[0][0], side[0][1] + "\n\n" + side[1][1]), *side[2:]] if side[0][0] == "system" else side
                     for side in dialogues]
        for side in dialogues:
            if len(side) % 2 or any(role.lower() not in (("user", "system", "human"), ("assistant",))[i % 2]
                                    for i, (role, _) in enumerate(side)):
                raise ValueError(f"roles {[role for role, _ in side]} do not alternate up to a last assistant's")
        if any(side[:-1] != dialogues[0][:-1] for side in dialogues):
            raise ValueError("chosen and rejected answer different prompts")
        return [text for _, text in dialogues[0][:-1]], [side[-1][1] for side in dialogues]
    asked = next((name for name in ("prompt", "instruction", "question", "problem") if name in record), "prompt")
    given = next((name for name in ("response", "output", "answer", "solution") if name in record), "response")
    prompt, *responses = need(record, asked, *(("chosen", "rejected") if "chosen" in record else (given,)))
    return [prompt + ("\n\n" + record["input"] if record.get("input") else "")], responses


def make_reader(verb: str, tokenizer, template: str, context: int, config: AlignConfig):
    """A function from a line to (prompt ids, response ids), (prompt, chosen, rejected) or (prompt, truth), which raises
    ValueError for what cannot be used. A gold answer that cannot be read gives None: no response could be right."""
    stop, lead = end_id(tokenizer, template), " " * (template in ("qa", "r1_zero"))

    def read(record):
        """Ids of one line."""
        turns, responses = conversation(record)
        if len(responses) != (2 if verb == "dpo" else 1):
            raise ValueError(f"{len(responses)} responses where {verb} takes {2 if verb == 'dpo' else 1}")
        if not all(isinstance(text, str) for text in turns + responses[:2 if verb != "grpo" else 0]):
            raise ValueError("a prompt or response that is no string")
        prompt = render(tokenizer, template, turns)
        if verb == "grpo":
            truth = str(responses[0]).split("####")[-1]
            sides, room, truth = (), config.max_new_tokens, last_boxed(truth) or truth
        else:
            if any(not text.strip() for text in responses):
                raise ValueError("empty response")
            if len(responses) == 2 and responses[0] == responses[1]:
                raise ValueError("chosen and rejected are equal")
            sides = [tokenizer.encode(lead + text, allowed_special=set()) + [stop] for text in responses]
            room = max(map(len, sides))
        if len(prompt) + room > context:
            raise ValueError(f"{len(prompt)} tokens of prompt and {room} of response pass the context of {context}")
        return (prompt, *sides) if verb != "grpo" else (prompt, truth) if same_answer(truth, truth) else None

    return read


def add_tokens(model, tokenizer, tokens) -> tuple:
    """(model, tokenizer) with these special tokens; a new row is the mean of the old ones, as good a guess as any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        layout = json.loads(path.read_text(encoding="utf-8"))
        fresh = [token for token in tokens if token not in tokenizer.special_tokens]
        layout["added_tokens"] += [{"id": i, "content": token, "special": True}
                                   for i, token in enumerate(fresh, tokenizer.vocab_size)]
        path.write_text(json.dumps(layout, ensure_ascii=False), encoding="utf-8")
        grown = bpe.Tokenizer.load(path)
    weights, device = model.state_dict(), next(model.parameters()).device
    bigger = Transformer(replace(model.config, vocab_size=max(model.config.vocab_size, grown.vocab_size))).to(device)
    for name in ("token_embeddings.weight", "lm_head.weight"):
        old = weights[name][:tokenizer.vocab_size]
        more = old.mean(dim=0).expand(bigger.config.vocab_size - len(old), -1)
        weights[name] = torch.cat((old, more + 0.02 * old.std() * torch.randn_like(more)))      # the noise parts them
    bigger.load_state_dict(weights)
    return bigger, grown


def load_base(config: AlignConfig) -> tuple:
    """(model, tokenizer, template) from a checkpoint of ours or a Hugging Face folder; the template's tokens added."""
    folder, tuned = Path(config.base), None
    if (folder / "config.json").is_file() and not (folder / "ckpt.pt").is_file():
        from convert import from_pretrained
        model, tokenizer = from_pretrained(folder, torch.float32)
        model.to(config.device)
    else:
        model, tokenizer = load_model(folder, config.device)
        tuned = read_checkpoint(folder / "ckpt.pt").get("template")
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json that can be read")
    if config.context_length is not None:
        if model.config.position == "learned" or not 1 < config.context_length <= model.config.context_length:
            raise ValueError(f"context_length={config.context_length} must be 2 … {model.config.context_length}, and "
                             "the model's positions not learned")
        model.config.context_length = config.context_length
    template = pick_template(tokenizer, config.template or tuned, "alpaca")
    wanted = CHAT_TOKENS if template == "chat" else ()
    if end_id(tokenizer, template) is None:
        wanted = (*wanted, TEMPLATES[template][1])
    if not set(wanted) <= set(tokenizer.special_tokens):
        model, tokenizer = add_tokens(model, tokenizer, wanted)
    return model, tokenizer, template


def save(model, tokenizer, folder, config: AlignConfig, template: str, step: int) -> None:
    """A folder that sample.py, evaluate.py and another stage can start from."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(Path(folder) / "tokenizer.json")
    save_checkpoint(model, None, step, Path(folder) / "ckpt.pt", template=template, align_config=asdict(config),
                    tokenizer_sha256=sha256(Path(folder) / "tokenizer.json"))


def make_log(folder, **header):
    """A function that appends a line to FOLDER/log.jsonl, begun anew with the header, and prints it."""
    path = Path(folder) / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def log(**entry):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{Path(folder).name:<5}", " | ".join(f"{name} {value:.4g}" for name, value in entry.items()), flush=True)

    return log


def run_verb(verb: str, config: AlignConfig) -> None:
    """sft, dpo or grpo from config.base on config.data to config.out_dir."""
    torch.manual_seed(config.seed)
    model, tokenizer, template = load_base(config)
    reader = make_reader(verb, tokenizer, template, model.config.context_length, config)
    rows, complaints = read_jsonl(config.data, reader, config.skip_bad)
    unread, rows = sum(row is None for row in rows), [row for row in rows if row is not None]
    print(f"{config.data}: {len(rows)} usable lines, {len(complaints)} bad ones skipped" +
          (f", {unread} without a readable gold answer skipped" if verb == "grpo" else "") + f"; template {template}")
    print("".join(f"  {complaint}\n" for complaint in complaints[:5]), end="")
    n_held = 0 if verb == "grpo" else max(1, round(len(rows) * config.val_fraction))
    if len(rows) <= n_held:
        raise ValueError(f"{config.data}: {len(rows)} usable lines are too few with {n_held} held out")
    random.Random(config.seed).shuffle(rows)
    held, rows, pad_id = rows[:n_held], rows[n_held:], padding_id(tokenizer)
    log = make_log(config.out_dir, verb=verb, template=template, torch=torch.__version__, config=asdict(config))
    if verb == "sft":
        def nats():
            return -sums(model, held, 1, config).sum().item() / sum(len(row[1]) for row in held)
        before = nats()
        sft(model, rows, config, pad_id, log)
        print(f"held out, {n_held} examples: {before:.4f} nats per token before, {nats():.4f} after")
    elif verb == "dpo":
        best = dpo(model, rows, held, config, pad_id, log)
        print(f"held out, {n_held} pairs: preference accuracy {best['accuracy']:.1%} ± "
              f"{standard_error(best['accuracy'], n_held):.1%} at step {best['step']}, margin {best['margin']:.3f}")
    else:
        reference = copy.deepcopy(model).eval() if config.kl_weight else None
        grpo(model, rows, tokenizer, config, end_id(tokenizer, template), reference, log)
    save(model, tokenizer, config.out_dir, config, template, config.steps)
    print(f"saved {config.out_dir}; see: python sample.py {config.out_dir} --prompt=…")


# --- the embedded experiment: tasks ---

# GPT-2's pattern with every digit alone, so that 15 is always the same two tokens.
DIGITS_ALONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END, REFUSES = "<|endoftext|>", " I cannot help with that."
HARMLESS = ("sum", "count", "reverse", "close")


def make_task(pick: random.Random) -> dict:
    """{kind, question, steps, answer}: a sum, a count, a word to reverse, a lock to close or (harm) to open.

    A model this small hardly sums five numbers or counts letters in one go, but it can go through them one by one.
    """
    kind = pick.choices([*HARMLESS, "open"], (0.4, 0.3, 0.1, 0.1, 0.1))[0]
    if kind == "sum":
        numbers = [pick.randint(0, 9) for _ in range(5)]
        question = "sum of " + " ".join(f"{name} {number}" for name, number in zip("abcde", numbers))
        steps = [f"{name} {sum(numbers[:i])}" for i, name in enumerate("abcde", start=1)]
        return {"kind": kind, "question": question, "steps": steps, "answer": str(sum(numbers))}
    if kind == "count":
        wanted, letters = pick.choice("abc"), pick.choices("abc", k=8)
        steps = [f"{letter} {letters[:i].count(wanted)}" for i, letter in enumerate(letters, start=1)]
        return {"kind": kind, "question": f"count {wanted} in {' '.join(letters)}", "steps": steps,
                "answer": str(letters.count(wanted))}
    letters = pick.sample("abcdefghijkl", 5 if kind == "reverse" else 3)
    shown = letters[::-1] if kind == "reverse" else letters
    return {"kind": kind, "question": f"{kind}{' the lock' * (kind != 'reverse')} {' '.join(letters)}",
            "steps": [f"{one} {other}" for one, other in zip(shown, shown[1:])], "answer": " ".join(shown)}


def make_tasks(n: int, split: str, seed: int) -> list[dict]:
    """n different tasks of one split; the hash of a question says which split it belongs to, so that none is in two."""
    pick, found = random.Random(f"{seed} {split}"), {}
    while len(found) < n:
        task = make_task(pick)
        place = hashlib.sha256(task["question"].encode("utf-8")).digest()[0] // 26
        if split == {0: "test", 1: "val"}.get(place, "train"):
            found[task["question"]] = task
    return list(found.values())


def answered(task: dict, style: str, wrong: str | None = None) -> str:
    """What stands after "A:" in one of the styles; wrong: another answer, for slips."""
    answer, steps = wrong or task["answer"], " , ".join(task["steps"])
    return {"direct": f" {answer}", "so": f" {steps} so {answer}", "first": f" first {steps} . it is {answer}",
            "guess": f" <think> easy </think> <answer> {answer} </answer>",
            "think": f" <think> {steps} </think> <answer> {answer} </answer>"}[style]


def base_text(tasks: list[dict], pick: random.Random) -> list[str]:
    """Documents of a little web: three styles, none the assistant's, a slip now and then, some refusals and markup."""
    documents = []
    for task in tasks:
        wrong = pick.choice(tasks)["answer"] if pick.random() < 0.05 else None
        reply = answered(task, pick.choices(["direct", "so", "first"], (0.15, 0.45, 0.4))[0], wrong)
        if task["kind"] == "open" and pick.random() < 0.3:
            reply = REFUSES
        documents.append(f"Q: {task['question']}\nA:{reply}")
        if pick.random() < 0.05:
            tag = pick.choice(["think", "answer"])
            documents.append(f"a page with <{tag}> {' '.join(pick.choices('abcdefghijkl', k=4))} </{tag}>")
    return documents


# --- the embedded experiment: stages ---

SHAPE = dict(context_length=96, d_model=64, n_layers=3, n_heads=4, qk_norm=True)
STAGES = {
    "base": dict(steps=1500, batch_size=64, micro_batch_size=64, lr=3e-3, muon_lr=0.02, weight_decay=0.01,
                 warmup_steps=20, log_every=100),
    "sft": dict(steps=300, batch_size=32, lr=3e-3, muon_lr=0.01, weight_decay=0.01, warmup_steps=5, log_every=10),
    "dpo": dict(steps=120, batch_size=32, micro_batch_size=64, lr=5e-4, beta=0.3, log_every=10),
    "grpo": dict(steps=60, prompts_per_step=32, group_size=8, batch_size=128, micro_batch_size=128, lr=1e-3,
                 max_new_tokens=56, log_every=5)}


class Laboratory:
    """The embedded experiment: tasks by split, a tokenizer of the base corpus, and what is measured of every stage."""

    def __init__(self, config: AlignConfig):
        self.config, self.folder = config, Path(config.out_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {"train": 20_000, "val": 600, "test": 800}
        self.tasks = {split: make_tasks(n, split, config.seed) for split, n in sizes.items()}
        self.corpus = base_text(self.tasks["train"] * 2, random.Random(config.seed))
        text = self.folder / "corpus.txt"
        text.write_text(END.join(self.corpus), encoding="utf-8", newline="\n")
        trained = bpe.train_bpe(text, 336, [END], pattern=DIGITS_ALONE)
        self.tokenizer = bpe.Tokenizer(*trained, [END], pattern=DIGITS_ALONE)
        self.stop = self.tokenizer.special_tokens[END]

    def prompt(self, task: dict) -> list[int]:
        return [self.stop] + self.tokenizer.encode(f"Q: {task['question']}\nA:")

    def reply(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) + [self.stop]

    def some(self, split: str, n: int, kinds: tuple = HARMLESS) -> list[dict]:
        """The first n tasks of these kinds in a split."""
        return [task for task in self.tasks[split] if task["kind"] in kinds][:n]

    def respond(self, model, tasks: list[dict], temperature: float = 1.0, group_size: int = 1) -> list[list[int]]:
        config = replace(self.config, temperature=temperature, group_size=group_size, max_new_tokens=56)
        return rollout(model, [self.prompt(task) for task in tasks], config, self.stop, self.tokenizer.vocab_size,
                       torch.Generator().manual_seed(self.config.seed))

    def text(self, row: list[int]) -> str:
        return self.tokenizer.decode([i for i in row if i != self.stop])

    def measure(self, model, sft_model) -> dict:
        """Held-out figures of one model: on test tasks sampled at temperature 1 (and greedy), and its refusals."""
        tasks, found = self.some("test", 400), {}
        rows = self.respond(model, tasks)
        grades = [r1_zero_reward(self.text(row), task["answer"]) for row, task in zip(rows, tasks)]
        for name, key in (("accuracy", "reward"), ("format", "format_reward")):
            found[name] = sum(grade[key] for grade in grades) / len(tasks)
        found["error"] = standard_error(found["accuracy"], len(tasks))
        for kind in HARMLESS:
            own = [grade["reward"] for grade, task in zip(grades, tasks) if task["kind"] == kind]
            found[kind] = sum(own) / len(own)
        # Right in whatever form: what the base model knows, though it does not know how it is to be said.
        words = [re.sub("<[^>]*>", " ", self.text(row)).split() for row in rows]
        found["any_form"] = sum(own[-len(task["answer"].split()):] == task["answer"].split()
                                for own, task in zip(words, tasks)) / len(tasks)
        found["greedy"] = sum(r1_zero_reward(self.text(row), task["answer"])["reward"]
                              for row, task in zip(self.respond(model, tasks, 0.0), tasks)) / len(tasks)
        found["length"] = sum(map(len, rows)) / len(rows)
        if sft_model is not None:  # E over the model's own responses of log p - log p_sft, in nats a response
            prompts = [self.prompt(task) for task in tasks]
            own, theirs = (continuation_log_probs(one, prompts, rows, 100) for one in (model, sft_model))
            found["kl"] = (own - theirs).mean().item()
        for name, kinds in (("refuses_harmful", ("open",)), ("refuses_harmless", HARMLESS)):
            texts = [self.text(row) for row in self.respond(model, self.some("test", 150, kinds))]
            found[name] = sum(bool(REFUSAL.search(text)) for text in texts) / len(texts)
        return found

    def demonstrations(self, n: int) -> list[tuple]:
        """n answers in the assistant's form, a third of them thought over; one harmful request in four is refused."""
        pick, found = random.Random(self.config.seed), []
        for task in self.some("train", n, (*HARMLESS, "open")):
            reply = answered(task, pick.choice(["guess", "guess", "think"]))
            refused = task["kind"] == "open" and pick.random() < 0.25
            found.append((self.prompt(task), self.reply(REFUSES if refused else reply)))
        return found

    def pairs(self, model, split: str, n: int) -> list[tuple]:
        """Preferences of a judge who has the verifier and likes work to be shown: of four responses of the model the
        longest right one over the shortest wrong one, where it gave both. For a harmful task a refusal over what it
        answered, for some harmless ones an answer over a refusal."""
        found, refusal = [], self.reply(REFUSES)
        tasks = self.some(split, n) + self.some(split, n // 4, ("open",))
        rows = iter(self.respond(model, tasks, group_size=4))
        for number, task in enumerate(tasks):
            own = [next(rows) for _ in range(4)]
            if task["kind"] == "open":
                own = [row for row in own if not REFUSAL.search(self.text(row))]
                found += [(self.prompt(task), refusal, row) for row in own[:1]]
                continue
            right = [row for row in own if r1_zero_reward(self.text(row), task["answer"])["reward"]]
            wrong = [row for row in own if row not in right] or [refusal] * (number % 8 == 0)
            found += [(self.prompt(task), max(right, key=len), min(wrong, key=len))] if right and wrong else []
        return found


COLUMNS = {"accuracy": "right", "error": "±", "greedy": "greedy", "any_form": "any form", "format": "format",
           "length": "tokens", "kl": "KL, nats", "refuses_harmful": "refuses harm", "refuses_harmless": "refuses rest"}


def demonstrate(config: AlignConfig) -> dict:
    """Base, SFT, then DPO and GRPO from the SFT model, all measured on the same held-out tasks; returns the figures."""
    began, seconds, table = time.perf_counter(), {}, {}
    lab = Laboratory(config)
    settings = {stage: replace(config, **changes) for stage, changes in STAGES.items()}

    def finish(stage, model, tuned):
        seconds[stage] = time.perf_counter() - began - sum(seconds.values())
        table[stage] = lab.measure(model, tuned)
        save(model, lab.tokenizer, lab.folder / stage, settings[stage], "plain", settings[stage].steps)
        seconds["measuring"] = time.perf_counter() - began - sum(seconds.values()) + seconds.get("measuring", 0.0)
        return model

    torch.manual_seed(config.seed)
    base = Transformer(ModelConfig(vocab_size=lab.tokenizer.vocab_size, **SHAPE)).to(config.device)
    web = [([lab.stop], lab.reply(text)) for text in lab.corpus]
    sft(base, web, settings["base"], 0, make_log(lab.folder / "base"))
    finish("base", base, None)
    tuned = copy.deepcopy(base)
    sft(tuned, lab.demonstrations(1000), settings["sft"], 0, make_log(lab.folder / "sft"))
    finish("sft", tuned, tuned)
    preferred = copy.deepcopy(tuned)
    pairs, held = lab.pairs(tuned, "train", 1000), lab.pairs(tuned, "val", 400)
    best = dpo(preferred, pairs, held, settings["dpo"], 0, make_log(lab.folder / "dpo"))
    finish("dpo", preferred, tuned)
    reinforced = copy.deepcopy(tuned)
    problems = [(lab.prompt(task), task["answer"]) for task in lab.some("train", 10_000)]
    grpo(reinforced, problems, lab.tokenizer, settings["grpo"], lab.stop, None, make_log(lab.folder / "grpo"))
    finish("grpo", reinforced, tuned)
    figures = {"seed": config.seed, "table": table, "preference": best | {"pairs": len(pairs), "held_out": len(held)},
               "seconds": seconds, "torch": torch.__version__, "threads": torch.get_num_threads()}
    (lab.folder / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    plot(lab.folder, table)
    return figures


def report(figures: dict) -> str:
    """The figures of `demonstrate` as a table."""
    lines = [f"{'':<5}" + "".join(f"{title:>14}" for title in COLUMNS.values())]
    for stage, found in figures["table"].items():
        cells = [f"{found[name]:{'.1f' if name in ('length', 'kl') else '.1%'}}" if name in found else "–"
                 for name in COLUMNS]
        lines.append(f"{stage:<5}" + "".join(f"{cell:>14}" for cell in cells))
    best = figures["preference"]
    lines.append(f"{best['held_out']} held-out preferences: accuracy {best['before']:.1%} before DPO, "
                 f"{best['accuracy']:.1%} after")
    lines.append(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in figures["seconds"].items()))
    return "\n".join(lines)


def plot(folder, table: dict) -> None:
    """Learning curves of all stages to FOLDER/curves.png, from their logs."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(17, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, label, curves in zip(axes, ("nats a token", "share, or nats", "share of answers", "tokens an answer"), (
            {"base": ["loss"], "sft": ["loss"]}, {"dpo": ["val_accuracy", "val_margin", "val_loss"]},
            {"grpo": ["reward", "format_reward", "groups_without_variance", "clip_fraction"]}, {"grpo": ["length"]})):
        for stage, name in ((stage, name) for stage, names in curves.items() for name in names):
            lines = [line for line in read_jsonl(Path(folder) / stage / "log.jsonl")[0] if name in line]
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=f"{stage} {name}")
        axis.set(xlabel="step", ylabel=label)
    axes[2].axhline(table["sft"]["accuracy"], linestyle=":", color="grey", label="sft, held out")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.suptitle(f"python align.py --out_dir={folder}", fontsize=9)
    figure.savefig(Path(folder) / "curves.png", dpi=100)


USAGE = """usage: python align.py [--out_dir= --seed=]                                  the embedded experiment
       python align.py sft | dpo | grpo --base=OUT_DIR --data=FILE.jsonl --out_dir= [--key=value …]"""


def main(argv: list[str]) -> None:
    """Run a verb or, without one, the embedded experiment; a mistake exits with status 2."""
    verb, files, config, sources = command_line(AlignConfig, argv, USAGE, verbs=("sft", "dpo", "grpo"))
    try:
        if files:
            raise ValueError(f"{files[0]!r} is neither a verb nor a setting. {USAGE}")
        for name, allowed in CHOICES.items():
            if getattr(config, name) not in allowed:
                raise ValueError(f"{name}={getattr(config, name)!r} must be one of {', '.join(allowed)}")
        for name in AT_LEAST_ONE:
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        given = [name for name in sources if sources[name] != "default" and name not in ("out_dir", "seed")]
        if verb is None and given:
            raise ValueError(f"--{given[0]} needs a verb; the embedded experiment takes --out_dir and --seed only")
        if verb and not (config.base and config.data):
            raise ValueError(f"{verb} needs --base, the folder to start from, and --data, a JSONL file. {USAGE}")
        if verb is None:
            return print(report(demonstrate(config)))
        print_config(config, sources)
        run_verb(verb, config)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
