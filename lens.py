"""What there is to see of a model: what it thought of a token, where it looked, how a text was cut, how it learnt.

A model gives each token a probability. Two more numbers place it: its rank (1 = it was the likeliest) and the
entropy of the whole distribution, in bits: 0 = the model was sure, 1 = as open as a coin, 11 = all of 2,048 tokens
alike. Attention says which earlier tokens a head took something from; it does not say what it took.
batching.py asks `describe` for the log probabilities of what is written, serve.py shows all of it on its page.
"""
import math
import re
from pathlib import Path

import torch

import attention
from bpe import merge_steps
from decoding import distribution
from runs import read_log
from words import compile_pattern, pieces


# --- tokens ---

def readable(raw: bytes) -> str:
    """Bytes as text; where they are no whole characters as "bytes:\\xe2\\x82", which is how OpenAI writes it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_text(tokenizer, token: int) -> str:
    """A token as readable text."""
    return readable(tokenizer.vocab.get(token, b""))


def describe(logits, ids: list[int], n_top: int, vocab_limit: int) -> list[dict]:
    """What the model thought of each id: log probability (nats), rank, entropy (bits), likeliest. logits: (n, V)."""
    log_p = torch.log_softmax(logits[:, :vocab_limit].float(), dim=-1)
    chosen = log_p.gather(1, torch.tensor(ids, device=log_p.device)[:, None])
    ranks = (log_p > chosen).sum(dim=-1).add(1).tolist()
    entropies = (torch.special.entr(log_p.exp()).sum(dim=-1) / math.log(2)).tolist()
    values, indices = (t.tolist() for t in log_p.topk(min(n_top, log_p.shape[-1])))
    return [dict(token=token, logprob=p, rank=rank, entropy=entropy, top=list(zip(best, logprobs)))
            for token, (p,), rank, entropy, best, logprobs
            in zip(ids, chosen.tolist(), ranks, entropies, indices, values)]


def feed(text, token: int) -> int:
    """Add an id to a decoding.Text; returns the character that it begins at."""
    before = len(text.text) + len(text.pending)
    text.feed(token)
    # Counted from the end: half a character that was held back may come out before it.
    length = len(text.tokenizer.decode_bytes([token]).decode("utf-8", errors="ignore"))
    return before if text.ended or not length else len(text.text) + len(text.pending) - length


def likeliest(logits, how: tuple, n: int, tokenizer, vocab_limit: int) -> dict:
    """The n likeliest tokens by logits (1, V), and what `how` (temperature, top_k, top_p, min_p) makes of each."""
    plain, cut = distribution(logits, vocab_limit=vocab_limit)[0], distribution(logits, *how, vocab_limit)[0]
    top = plain.topk(min(n, len(plain))).indices
    tokens = [dict(id=i, token=token_text(tokenizer, i), p=plain[i].item(), cut=cut[i].item()) for i in top.tolist()]
    return {"tokens": tokens, "entropy": (torch.special.entr(plain).sum() / math.log(2)).item(),
            "kept": int((cut > 0).sum()), "of": len(plain)}


# --- attention ---

def attention_weights(model, ids, layer: int, head: int):
    """How much each token looks at each, (T, T): the softmax that `attend` computes in one head of one layer."""
    seen, attend = [], attention.attend

    def watch(backend, q, k, v, mask, fresh):
        seen.append((q, k, mask))
        return attend(backend, q, k, v, mask, fresh)
    attention.attend = watch                     # on the engine's thread, the only one that runs the model
    try:
        model.hidden(torch.tensor([ids], device=model.token_embeddings.weight.device))
    finally:
        attention.attend = attend
    q, k, mask = seen[layer]                                                     # (1, H, T, D), (1, K, T, D)
    q, k = q[0, head].float(), k[0, head * k.shape[1] // q.shape[1]].float()
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return torch.softmax((q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf), dim=-1)


# --- the tokenizer, and the runs ---

def cuts_of(tokenizer, text: str) -> dict:
    """The tokens of a text, and for each of its words the merges that make tokens of its bytes."""
    specials = "|".join(map(re.escape, tokenizer.special_tokens)) or "(?!)"
    words = [word for part in re.split(specials, text) for word in pieces(compile_pattern(tokenizer.pattern), part)]
    return {"tokens": [{"id": i, "token": token_text(tokenizer, i)} for i in tokenizer.encode(text)],
            "words": [{"word": word, "steps": [{"rank": rank, "parts": list(map(readable, parts))}
                                               for rank, parts in merge_steps(tokenizer, word.encode())]}
                      for word in dict.fromkeys(words) if len(word) > 1]}


def curves_beside(folder: Path) -> list[dict]:
    """Losses by step of the run in `folder`, first, and of the runs beside it; each curve thinned to 400 points."""
    runs = []
    for path in sorted(folder.parent.glob("*/log.jsonl"), key=lambda path: (path.parent != folder, path)):
        log = read_log(path)
        run = {"name": path.parent.name}
        for key in ("loss", "val_loss"):
            points = [(line["step"], line[key]) for line in log if key in line and "step" in line]
            run[key] = points[::max(1, len(points) // 400)]
        if run["loss"] or run["val_loss"]:
            runs.append(run)
    return runs
