"""The losses of alignment, on tensors alone; align.py explains them and makes loops of them, for DPO, SFT and GRPO.

Several steps on one rollout: p has moved on from the p_old that sampled, and ρ = p / p_old reweights. A clip ends the
pull of a token that has moved far enough (ρ beyond 1 ± clip) in the direction that its advantage A pushes:

    ρ      A     loss of the token, clip 0.2     gradient
    0.5   +1     -ρ A  = -0.5                    pulls up
    1.5   +1     -1.2 A = -1.2                   0, cut
    0.5   -1     -0.8 A =  0.8                   0, cut
    1.5   -1     -ρ A  =  1.5                    pushes down

DPO reads β log(p / p_ref) as the reward of a response (2305.18290). Its loss is -log σ(margin), the chosen one's reward
less the rejected one's, and its gradient is weighted by σ(-margin): pairs that are won already hardly pull. The margin
also grows while both log-probabilities fall, so watch both. align.py has all these names too.
"""
import inspect
import math

import torch

from evaluate import pad_rows
from model import token_cross_entropy, wide
from optim import clip_grad_norm


# --- masks and log-probabilities ---

def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text without BOS and EOS, from a tokenizer of ours or of Hugging Face's."""
    hugging_face = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(text, add_special_tokens=False) if hugging_face else tokenizer.encode(text)
    return list(getattr(ids, "ids", ids))


def padding_id(tokenizer) -> int:
    """What fills rows up: the padding token, else the end of text. The mask, not this id, says what counts."""
    for name in ("pad_token_id", "eos_token_id"):                    # transformers
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    id_of = getattr(tokenizer, "token_to_id", None) or getattr(tokenizer, "special_tokens", {}).get
    ids = [id_of(token) for token in ("<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "</s>")]
    return next((i for i in ids if i is not None), 0)


def tokenize_prompt_and_output(prompts: list[str], responses: list[str], tokenizer) -> dict:
    """{input_ids, labels, response_mask}, each (B, T-1), of prompts and responses tokenised apart and joined.

    Padded on the right to the longest, T. The mask, boolean, is aligned with labels, the ids one place on: True where
    the token to be predicted belongs to the response, its EOS included, and never on padding.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; give as many of both, at least one")
    return pad_rows([encode(tokenizer, prompt) for prompt in prompts],
                    [encode(tokenizer, response) for response in responses], padding_id(tokenizer))


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """-Σ p log p over the vocabulary in nats: (..., V) -> (...), finite also where a logit is -inf, as its gradient."""
    log_p = torch.log_softmax(wide(logits), dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def response_log_probs(model, input_ids, labels, return_entropy: bool = False, *, temperature: float = 1.0) -> dict:
    """{log_probs} of the labels (B, T) in nats, with return_entropy also {token_entropy} (B, T), without gradient.

    model: ours, whose call gives logits, or Hugging Face's, which gives .logits. temperature: that of the sampling, so
    that a sample is scored by the distribution it came from. Raises ValueError unless it is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: log-probabilities are divided by it")
    out = model(input_ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    logits = logits if temperature == 1 else logits / temperature
    scored = {"log_probs": -token_cross_entropy(logits, labels)}
    if return_entropy:
        with torch.no_grad():
            scored["token_entropy"] = token_entropy(logits)
    return scored


def masked_normalize(x, mask, dim: int | None = None, constant: float = 1.0) -> torch.Tensor:
    """Sum of x where mask is set, over dim (None: over all), divided by constant."""
    return torch.where(mask.bool(), x, 0.0).sum(dim=dim) / constant          # not x * mask: NaN and -inf would stay


def masked_mean(x, mask, dim: int | None = None) -> torch.Tensor:
    """Mean of x where mask is set, over dim (None: over all); NaN where nothing is set."""
    return masked_normalize(x, mask, dim) / mask.bool().expand_as(x).sum(dim=dim)


def sft_step(log_probs, response_mask, accumulation_steps: float, constant: float = 1.0) -> tuple:
    """Backward of one micro-batch: -Σ log p over each response / constant, averaged over rows, / accumulation_steps.

    Returns (loss, info). accumulation_steps: micro-batches per step; for ragged ones, rows of the step / rows of this.
    """
    loss = -masked_normalize(log_probs, response_mask, -1, constant).mean() / accumulation_steps
    loss.backward()
    return loss.detach(), {"nats_per_token": -masked_mean(log_probs.detach(), response_mask)}


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> torch.Tensor:
    """-log σ(β ((chosen - ref_chosen) - (rejected - ref_rejected))) of each pair; ln 2 where the two models agree.

    All four: log-probabilities of whole responses, summed over their tokens, (B,); no gradient reaches the reference's.
    Source: 2305.18290, eq. 7.
    """
    margin = beta * ((chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach()))
    return -torch.nn.functional.logsigmoid(margin)


# --- policy gradients ---

BASELINES, NORMALIZERS = ("mean", "none"), ("std", "mean", "none")
REWEIGHTS, NORMALIZE = ("none", "noclip", "grpo", "gspo", "cispo"), ("sequence", "token", "constant")


def check_choice(name: str, value, allowed) -> None:
    """Raises ValueError naming the setting, its value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}")


def rollout_rewards(reward_fn, responses: list[str], truths: list) -> tuple:
    """(rewards (N,), info): reward_fn(response, truth) -> {reward, …} of each; info holds the mean of every entry."""
    if len(responses) != len(truths) or not responses:
        raise ValueError(f"{len(responses)} responses and {len(truths)} truths; give as many of both, at least one")
    scores = [reward_fn(response, truth) for response, truth in zip(responses, truths)]
    info = {name: sum(float(score[name]) for score in scores) / len(scores)
            for name in scores[0] if all(name in score for score in scores)}
    return torch.tensor([float(score["reward"]) for score in scores]), info


def group_advantages(rewards, group_size: int, baseline: str = "mean", normalizer: str = "std",
                     eps: float = 1e-6) -> tuple:
    """(advantages (N,), info) of rewards (N,) that stand in groups of group_size to one question each.

    A = (r - baseline) / (normalizer + eps), both over the group: mean and std (unbiased) are GRPO, mean and "none" Dr.
    GRPO, mean and "mean" MaxRL, "none" and "none" rejection fine-tuning. info: dead_groups, the share of groups whose
    advantages are all 0.
    """
    check_choice("baseline", baseline, BASELINES)
    check_choice("normalizer", normalizer, NORMALIZERS)
    rewards = torch.as_tensor(rewards)
    if group_size < 1 or rewards.numel() == 0 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make groups of group_size={group_size}")
    if normalizer == "std" and group_size == 1:
        raise ValueError("group_size=1 has no standard deviation; give normalizer=none, or larger groups")
    groups = rewards.double().view(-1, group_size)
    mean, advantages = groups.mean(dim=1, keepdim=True), groups
    if baseline == "mean":
        # Equal rewards give exactly 0: a mean that is one rounding off would be blown up by eps.
        advantages = torch.where((groups == groups[:, :1]).all(dim=1, keepdim=True), 0.0, groups - mean)
    if normalizer == "std":
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    if normalizer == "mean":
        advantages = advantages / (mean + eps)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    return advantages.flatten().to(dtype), {"dead_groups": (advantages == 0).all(dim=1).double().mean().item()}


def check_reweight(reweight: str, old_log_probs, clip, shape) -> None:
    """Raises ValueError for an unknown reweight, and naming what it needs and did not get."""
    check_choice("reweight", reweight, REWEIGHTS)
    if reweight == "none":
        return
    if old_log_probs is None or old_log_probs.shape != shape:
        raise ValueError(f"reweight={reweight} needs old_log_probs of shape {tuple(shape)}")
    if reweight != "noclip" and (clip is None or not clip >= 0):
        raise ValueError(f"reweight={reweight} needs clip of at least 0, got clip={clip}")


def policy_gradient_loss(log_probs, advantages, reweight: str = "none", old_log_probs=None, clip: float | None = None,
                         response_mask=None) -> tuple:
    """(loss of every token (B, T), info) from log_probs (B, T) and advantages (B,) or (B, 1), one for a whole row.

        none     -A log p
        noclip   -ρ A                                ρ = p / p_old of the token
        grpo     -min(ρ A, clip(ρ, 1 ± clip) A)      as PPO (1707.06347, eq. 7)
        gspo     the same with one ρ a row           the geometric mean of its tokens' ratios
        cispo    -A min(ρ, 1 + clip) log p           no gradient through the ratio

    info: clip_fraction, the share of tokens whose gradient or weight the clip cut. What response_mask leaves out may be
    -inf: it counts as 0 and gets no gradient; without a mask all tokens count.
    """
    check_reweight(reweight, old_log_probs, clip, log_probs.shape)
    mask = torch.ones_like(log_probs, dtype=torch.bool) if response_mask is None else response_mask.bool()
    advantages = torch.as_tensor(advantages).to(log_probs)
    if advantages.numel() != len(log_probs):
        raise ValueError(f"advantages of shape {tuple(advantages.shape)} must be one for each of {len(log_probs)} rows")
    advantages, clipped = advantages.reshape(-1, 1), torch.zeros_like(mask)
    log_probs = log_probs.masked_fill(~mask, 0.0)
    if reweight != "none":
        log_ratio = log_probs - old_log_probs.detach().masked_fill(~mask, 0.0)
        if reweight == "gspo":
            log_ratio = log_ratio.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp()
    if reweight == "none":
        loss = -advantages * log_probs
    elif reweight == "cispo":
        clipped = ratio > 1 + clip
        loss = -advantages * ratio.clamp(max=1 + clip).detach() * log_probs
    elif reweight == "noclip":
        loss = -ratio * advantages
    else:
        plain, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
        clipped = (bounded < plain).expand_as(mask)
        loss = -torch.minimum(plain, bounded).expand_as(log_probs)
    return loss, {"clip_fraction": masked_mean(clipped.float(), mask)}


def row_weights(response_mask, normalize: str, constant: float | None) -> torch.Tensor:
    """(B,): what a token of each row weighs in the loss of the batch. Raises ValueError naming what is wrong."""
    check_choice("normalize", normalize, NORMALIZE)
    if normalize == "constant" and constant is None:
        raise ValueError("normalize=constant needs constant, such as rows times the longest response")
    lengths = response_mask.sum(dim=-1)
    if normalize == "sequence":
        return 1 / (len(lengths) * lengths.clamp(min=1))
    total = lengths.sum().clamp(min=1) if normalize == "token" else constant
    return torch.ones_like(lengths, dtype=torch.float32) / total


def aggregate_loss(per_token, response_mask, normalize: str = "sequence", constant: float | None = None):
    """One loss from those of all tokens (B, T); the three weigh a token of a long response differently:

        sequence   mean over each row's response, then over rows (GRPO); a row without response counts 0
        token      sum over all / number of all response tokens (DAPO)
        constant   sum over all / constant (Dr. GRPO)
    """
    return (masked_normalize(per_token, response_mask, -1) * row_weights(response_mask, normalize, constant)).sum()


def grpo_step(log_probs, response_mask, accumulation_steps: float, advantages, reweight: str = "none",
              old_log_probs=None, clip: float | None = None, normalize: str = "sequence",
              constant: float | None = None) -> tuple:
    """Backward of one micro-batch: policy_gradient_loss, then aggregate_loss; returns (loss, info).

    "sequence" and "token" are means of the micro-batch and are divided by accumulation_steps; "constant" is not.
    """
    per_token, info = policy_gradient_loss(log_probs, advantages, reweight, old_log_probs, clip, response_mask)
    loss = aggregate_loss(per_token, response_mask, normalize, constant)
    if normalize != "constant":
        loss = loss / accumulation_steps
    loss.backward()
    return loss.detach(), info


def take_step(model, optimizers, max_norm: float | None) -> float:
    """Clip, step, forget the gradients; returns the norm before clipping. FloatingPointError when it is no number."""
    norm = clip_grad_norm(model.parameters(), math.inf if max_norm is None else max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}: the run has diverged and nothing of it is saved; lower --lr "
                                 "(or --muon_lr), and look at the base model and the data")
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return norm


def policy_step(model, optimizers, batch: dict, advantages, *, rows_at_a_time: int, max_norm: float | None = None,
                reweight: str = "none", old_log_probs=None, clip: float | None = None, normalize: str = "sequence",
                constant: float | None = None, temperature: float = 1.0) -> tuple:
    """One optimizer step on tokenised rows; returns (loss, info with entropy, norm, clip_fraction).

    Every row's weight is that in the whole batch, so the gradient does not depend on how it is divided, and rows whose
    advantage is 0, which add nothing to it, are never passed through the model.
    """
    mask = batch["response_mask"]
    check_reweight(reweight, old_log_probs, clip, mask.shape)
    weights = row_weights(mask, normalize, constant)
    advantages = advantages.to(mask.device)
    kept = ((advantages != 0) & mask.any(dim=-1)).nonzero().flatten()
    model.zero_grad(set_to_none=True)
    if len(kept) == 0:                   # no step either: momentum alone would move the model
        return torch.tensor(0.0), {"entropy": math.nan, "norm": 0.0, "clip_fraction": 0.0}
    kept = kept[mask[kept].sum(dim=-1).argsort()]                    # like lengths pad less
    loss, tokens, info = 0.0, mask[kept].sum(), {"entropy": 0.0, "clip_fraction": 0.0}
    for rows in kept.split(rows_at_a_time):
        width = int(mask[rows].any(dim=0).nonzero().max()) + 1       # without columns that hold padding only
        part = {name: tensor[rows, :width] for name, tensor in batch.items()}
        scored = response_log_probs(model, part["input_ids"], part["labels"], True, temperature=temperature)
        old = None if old_log_probs is None else old_log_probs.to(mask.device)[rows, :width]
        per_token, figures = policy_gradient_loss(scored["log_probs"], advantages[rows], reweight, old, clip,
                                                  part["response_mask"])
        part_loss = (masked_normalize(per_token, part["response_mask"], -1) * weights[rows]).sum()
        part_loss.backward()
        loss = loss + part_loss.detach()
        share = part["response_mask"].sum() / tokens
        info["entropy"] += (share * masked_mean(scored["token_entropy"], part["response_mask"])).item()
        info["clip_fraction"] += (share * figures["clip_fraction"]).item()
    return loss, info | {"norm": take_step(model, optimizers, max_norm)}


def grpo_train_step(model, tokenizer, optimizer, prompts: list[str], responses: list[str], truths: list, reward_fn,
                    group_size: int, *, accumulation_steps: int = 1, max_norm: float | None = None,
                    baseline: str = "mean", normalizer: str = "std", eps: float = 1e-6, reweight: str = "none",
                    old_log_probs=None, clip: float | None = None, normalize: str = "sequence",
                    constant: float | None = None) -> tuple:
    """A whole step over N responses, prompts and truths repeated; returns (loss, info). optimizer: one, or a list.

    accumulation_steps: at most ceil(N / accumulation_steps) rows pass through the model at a time; the gradient is the
    same. Rows of zero advantage do not; when none is left, the loss is 0 and nothing moves. old_log_probs: (N, T) of
    all rows. info: reward, format_reward, …, dead_groups, norm, clip_fraction, entropy (NaN when nothing is passed).
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps} must be at least 1")
    batch = tokenize_prompt_and_output(prompts, responses, tokenizer)
    rewards, info = rollout_rewards(reward_fn, responses, truths)
    advantages, dead = group_advantages(rewards, group_size, baseline, normalizer, eps)
    device = next(model.parameters()).device
    loss, figures = policy_step(
        model, optimizer if isinstance(optimizer, (list, tuple)) else [optimizer],
        {name: tensor.to(device) for name, tensor in batch.items()}, advantages,
        rows_at_a_time=math.ceil(len(responses) / accumulation_steps), max_norm=max_norm, reweight=reweight,
        old_log_probs=old_log_probs, clip=clip, normalize=normalize, constant=constant)
    return loss, info | dead | figures
