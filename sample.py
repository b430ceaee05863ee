"""Write with a trained model: prefill the prompt once, then decode one token at a time against the cache.

    python sample.py out/shakespeare --prompt="ROMEO" --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py out/shakespeare --interactive=true --quantize=int8
    python sample.py out/NAME --draft=out/SMALL                    or --draft=mtp, --draft=ngram
    python sample.py out/TUNED --chat=true                         after align.py
    python sample.py explain out/shakespeare --prompt="ROMEO:"     what the model expected at every token
    python sample.py bench llama-124m --reference=true             rates, and the roof that memory sets (two minutes)

The prompt goes through the model in one pass (prefill: many tokens, bound by arithmetic); every token after it is a
pass of its own (decode: all weights read for one token, bound by memory bandwidth). The two are timed apart. What makes
decoding faster therefore reads less for a token: a batch shares one reading, drafts share one among the tokens they
get right, and int8 or int4 make it shorter. Left out: paged caches and a scheduler for many users.

Top-k: Fan 2018 (1805.04833). Top-p (nucleus): Holtzman 2019 (1904.09751). Min-p: 2407.01082. Speculative decoding:
Leviathan 2022 (2211.17192). The folder of a run alone is enough: ckpt.pt and the tokenizer.json beside it.
"""
import codecs
import contextlib
import copy
import html
import math
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import load_model
from configurator import command_line, fail
from machine import bandwidth, product
from accounting import PRESETS
from model import Linear, ModelConfig, Transformer

END_OF_TEXT = "<|endoftext|>"
GROUP = 64                               # numbers of a row that share a scale in int4


@dataclass
class SampleConfig:
    """What `python sample.py OUT_DIR` can be told."""
    prompt: str = ""                     # text to go on from; empty = the beginning of a document
    max_new_tokens: int = 200            # tokens to write at most; the end of the document ends earlier
    temperature: float = 0.8             # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int | None = None             # sample from the k likeliest tokens only
    top_p: float | None = None           # sample from the fewest tokens whose probabilities sum to p
    min_p: float | None = None           # sample from tokens of at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0      # logits of tokens already in the text are divided by it; 1 = off
    stop: str | None = None              # a text that ends the answer, which is shown up to there
    num_samples: int = 1                 # continuations of the one prompt
    seed: int | None = None              # none = another text every time
    cache: bool = True                   # false = run the whole text through the model for every token
    interactive: bool = False            # ask for prompts until an empty line
    chat: bool = False                   # a conversation with a model that align.py tuned for it
    draft: str | None = None             # speculative decoding: folder of a smaller model | mtp (own head) | ngram
    k: int = 4                           # drafts for each pass of the model
    quantize: str | None = None          # int8 | int4: smaller weights
    device: str = "cpu"                  # cpu, cuda, mps
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


@dataclass
class BenchConfig:
    """What `python sample.py bench` can be told."""
    contexts: str = "128,512"            # lengths of the prompt
    batches: str = "1,4,16"              # prompts at once
    new_tokens: int = 32                 # tokens to decode after each prompt
    rounds: int = 3                      # every case once a round; the median counts
    draft: str | None = None             # folder of a smaller model to speculate with, beside n-grams and an own head
    k: int = 4                           # drafts for each pass of the model
    compile: bool = False                # also with torch.compile of the feed-forward layers
    reference: bool = False              # also transformers' generate with the same weights, where it is installed
    seed: int = 0                        # of random weights and prompts
    out: str = "bench"                   # OUT.txt gets the table, OUT.png the plot
    device: str = "cpu"                  # cpu, cuda, mps
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


@dataclass
class ExplainConfig:
    """What `python sample.py explain OUT_DIR` can be told."""
    prompt: str = ""                     # the text; the model's own continuation follows it
    max_new_tokens: int = 20             # tokens of that continuation, always the likeliest
    quantize: str | None = None          # int8 | int4: smaller weights
    out: str | None = None               # the HTML page; none = explain.html in OUT_DIR
    device: str = "cpu"                  # cpu, cuda, mps
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


# --- picking one token ---

def distribution(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None):
    """Probabilities (B, V) that the next token is drawn from: temperature, then top-k, then top-p, then min-p.

    temperature 0 puts everything on the likeliest token. top_p keeps the fewest tokens whose sum reaches p, at least
    one; min_p those with at least that share of the likeliest one's probability. Ties at the k-th place are all kept.
    """
    if temperature == 0 or top_k == 1:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is needed while those before it do not reach p yet, by more than float32's rounding; the first always.
        needed = ordered.double().cumsum(dim=-1) - ordered < max(top_p - 1e-6, 1e-9)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered * needed)
    if min_p is not None:
        small = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(small, 0.0)
    return probabilities if top_p is min_p is None else probabilities / probabilities.sum(dim=-1, keepdim=True)


@dataclass
class Sampling:
    """How the next token is drawn: the settings of `generate`. Raises ValueError for one out of range."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    vocab_limit: int | None = None       # ids from here on pad the vocabulary and are never drawn

    def __post_init__(self):
        for name, allowed, fits in (
            ("temperature", "0 (greedy) or more", 0 <= self.temperature < math.inf),
            ("top_k", "at least 1; leave it out to sample from all tokens", self.top_k is None or self.top_k >= 1),
            ("top_p", "above 0 and at most 1; leave it out for all tokens", self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", "0 … 1, a share of the likeliest token's", self.min_p is None or 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0; 1 = none, 1.2 is a usual one", 0 < self.repetition_penalty < math.inf)):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")

    def scores(self, logits, texts):
        """logits (B, V) without padding rows; those of ids that stand in a row's text made less likely (1909.05858)."""
        logits = logits[:, :self.vocab_limit]
        if self.repetition_penalty != 1:
            logits = logits.clone()
            for row, text in zip(logits, texts):
                seen = torch.tensor(sorted(set(text)), device=row.device)
                row[seen] = torch.where(row[seen] > 0, row[seen] / self.repetition_penalty,
                                        row[seen] * self.repetition_penalty)
        return logits

    def probabilities(self, logits, texts):
        """(B, V) that the next token of each text is drawn from."""
        return distribution(self.scores(logits, texts), self.temperature, self.top_k, self.top_p, self.min_p)

    def draw(self, logits, texts, generator):
        """One id per row of logits (B, V), as a list; texts: the ids of each row so far."""
        if self.temperature == 0:                    # no need for a distribution over the whole vocabulary
            return self.scores(logits, texts).argmax(dim=-1).tolist()
        return torch.multinomial(self.probabilities(logits, texts), 1, generator=generator).squeeze(-1).tolist()


def check_prompts(model, prompts, max_new_tokens, vocab_limit=None) -> None:
    """Raise ValueError for prompts that cannot be continued, before anything is computed."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    size = min(model.config.vocab_size, vocab_limit or model.config.vocab_size)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {number} is empty; a model needs one token to go on from, for example {END_OF_TEXT}")
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise ValueError(
                f"prompt {number} holds an id outside 0 … {size - 1}; the tokenizer is not this model's")


class Text:
    """The text of one row as its ids come: whole characters only, and nothing that may become a stop string."""

    def __init__(self, tokenizer, stop_strings=()):
        if tokenizer is None or not all(stop_strings):
            raise ValueError("stop strings need a tokenizer to read the text with, and none of them may be empty")
        self.tokenizer = tokenizer
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        # Bytes of one character may come in two tokens: the decoder holds the first half back.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.ended = "", "", False

    def feed(self, token: int | None) -> bool:
        """Add an id, or None for the end of the ids; True once a stop string stands in the text, which ends before it.
        """
        if self.ended:
            return True
        raw = b"" if token is None else self.tokenizer.decode_bytes([token])
        text = self.held + self.decoder.decode(raw, final=token is None)
        found = [text.find(stop) for stop in self.stop_strings if stop in text]
        begun = 0
        if found:
            text, self.ended = text[:min(found)], True
        elif token is not None:
            begun = max((n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])),
                        default=0)
        self.held = text[len(text) - begun:]
        self.text += text[:len(text) - begun]
        return self.ended


def ends(token: int, stop_ids, text: Text | None) -> bool:
    """Whether a row ends with this id; shows it to the row's text, unless it is a stop id."""
    return token in stop_ids or text is not None and text.feed(token)


@contextlib.contextmanager
def evaluating(*models):
    """The models in evaluation mode, and back in the mode they were in afterwards."""
    modes = [model.training for model in models]
    try:
        yield [model.eval() for model in models]
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


# --- generation ---

@torch.inference_mode()
def stream(model, prompts, max_new_tokens: int, *, stop_ids=(), cache=True, generator=None, n_each: int = 1,
           timing: dict | None = None, texts: list[Text] | None = None, **sampling):
    """Yield, token by token, a list with the new id of every row, None for a row that has ended.

    prompts: lists of ids, of any lengths. n_each: rows per prompt, which share its prefill. timing: gets prefill_s,
    prefill_tokens, decode_s, decode_tokens, decode_bytes (weights and cache read). texts: one for every row; a row ends
    with its stop string. sampling: the fields of Sampling.

    A text that outgrows the context goes on from its last half context, read anew, with or without the cache; so both
    see the same window at every token, and the cost of reading is spread over half a context of new tokens.
    """
    how = Sampling(**sampling)
    check_prompts(model, prompts, max_new_tokens, how.vocab_limit)
    context, device = model.config.context_length, next(model.parameters()).device
    timing = {} if timing is None else timing
    timing.update(prefill_s=0.0, prefill_tokens=0, decode_s=0.0, decode_tokens=0, decode_bytes=0)
    rows = [list(prompt) for prompt in prompts]
    starts = [max(0, len(row) - context) for row in rows]           # each row's window begins here
    stop_ids, n_bytes = {int(i) for i in stop_ids}, weight_bytes(model, len(prompts) * n_each)
    alive = memory = None
    n_rows = len(prompts) * n_each
    with contextlib.ExitStack() as decoding:
        for step in range(max_new_tokens):
            began = time.perf_counter()
            for i in alive if alive is not None else ():
                if len(rows[i]) - starts[i] > context:
                    starts[i], memory = len(rows[i]) - max(1, context // 2), None
            phase = "decode"
            if alive is None:  # the prompts, once each, however many rows they give
                phase = "prefill"
                windows = [row[start:] for row, start in zip(rows, starts)]
                logits, memory = prefill(model, windows, cache, max_new_tokens)
                source = [i for i in range(len(prompts)) for _ in range(n_each)]
                rows, starts = [list(rows[i]) for i in source], [starts[i] for i in source]
                alive, logits = list(range(len(rows))), logits[source]
                if memory is not None and n_each > 1:
                    memory.select(source)
            elif memory is None:
                logits, memory = prefill(model, [rows[i][starts[i]:] for i in alive], cache, max_new_tokens - step)
            else:
                timing["decode_bytes"] += n_bytes
                last = torch.tensor([[rows[i][-1]] for i in alive], device=device)
                logits = model(last, cache=memory)[:, -1]
            ids = how.draw(logits, [rows[i] for i in alive], generator)
            timing[f"{phase}_s"] += time.perf_counter() - began
            timing[f"{phase}_tokens"] += sum(map(len, prompts)) if phase == "prefill" else len(ids)
            given, left = [None] * len(rows), []
            for n, (i, token) in enumerate(zip(alive, ids)):
                rows[i].append(token)
                given[i] = token
                if not ends(token, stop_ids, texts and texts[i]):
                    left.append(n)
            yield given
            if len(left) < len(alive):
                alive = [alive[n] for n in left]
                if not alive:
                    return
                if memory is not None:
                    memory.select(left)


def prefill(model, windows: list[list[int]], cache: bool, n_new: int):
    """Read windows of ids in one pass: (logits of each one's last token (B, V), a cache that holds them or None).

    n_new: the tokens to come, for which the cache has room, up to the context: a cache for all of it is slow to make.
    """
    lengths, device = [len(window) for window in windows], next(model.parameters()).device
    # Padding stands on the right, where a causal model cannot see it from the left; the cache then forgets it.
    tokens = torch.tensor([window + [0] * (max(lengths) - len(window)) for window in windows], device=device)
    room = min(model.config.context_length, max(lengths) + n_new)
    memory = model.new_cache(len(windows), room) if cache else None
    hidden = model.hidden(tokens, memory)
    if memory is not None:
        memory.set_lengths(lengths)
    # The head is the largest matrix of a small model: only the last token of each window goes through it.
    return model.head(hidden[torch.arange(len(windows)), torch.tensor(lengths) - 1]), memory


def generate(model, prompt_ids, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, stop_ids=(), cache: bool = True, generator=None, min_p: float | None = None,
             repetition_penalty: float = 1.0, stop_strings=(), tokenizer=None, vocab_limit: int | None = None):
    """The new ids after a prompt (a list of int), or a list of them for a list of prompts of any lengths.

    temperature: 0 is greedy. top_k, then top_p, then min_p (2407.01082) cut the distribution; see `distribution`.
    repetition_penalty: logits of ids already in the text are divided by it, or multiplied where negative.
    stop_ids end a row and are the last id given; so does the id that completes one of stop_strings, for which the
    tokenizer is needed. generator: a torch.Generator; the same seed gives the same ids, with the cache or without.
    Raises ValueError for an empty prompt, ids the model does not have, or a setting out of range.
    """
    if torch.is_tensor(prompt_ids):
        prompt_ids = prompt_ids.tolist()
    single = len(prompt_ids) == 0 or not isinstance(prompt_ids[0], (list, tuple))
    prompts = [list(map(int, prompt)) for prompt in ([prompt_ids] if single else prompt_ids)]
    texts = [Text(tokenizer, stop_strings) for _ in prompts] if stop_strings else None
    new = [[] for _ in prompts]
    with evaluating(model):
        for ids in stream(model, prompts, max_new_tokens, stop_ids=stop_ids, cache=cache, generator=generator,
                          texts=texts, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                          repetition_penalty=repetition_penalty, vocab_limit=vocab_limit):
            for row, token in zip(new, ids):
                if token is not None:
                    row.append(token)
    return new[0] if single else new


# --- speculative decoding ---
# A cheap draft proposes k tokens x_i, drawn from its distributions q_i; one pass of the target gives its own
# distributions p_i at all of them and after the last. Algorithm 1 of Leviathan et al. 2023 (2211.17192), in order:
#     keep x_i with probability min(1, p_i(x_i) / q_i(x_i));
#     at the first one not kept, draw from max(0, p_i - q_i), normalised, instead, and stop;
#     with all k kept, draw one more from p_(k+1).
# Every token then has exactly the distribution p: a token x comes out by being kept, min(p(x), q(x)), or in place of
# another, and the second makes up the p(x) - min(p(x), q(x)) that is missing. That holds for any q; a bad draft costs
# time and nothing else. Greedy is the same rule: p is 1 at the argmax.

FIGURES = ("new_tokens", "target_calls", "drafted", "accepted", "rejected", "acceptance_rate", "tokens_per_target_call",
           "prefill_tokens", "prefill_s", "decode_tokens", "decode_calls", "decode_s", "draft_s")


class Window:
    """One text in front of a model, with a cache of what has been read; where the text changed, it is read anew.

    Windows of a text longer than the context move as those of `stream` do. end: the length that the text will have.
    """

    def __init__(self, model, end: int, spare: int = 0):
        self.model, self.end, self.spare, self.start, self.memory = model, end, spare, None, None

    def fit(self, ids) -> int:
        """Move the window where ids have outgrown it; how many more tokens it has room for."""
        context = self.model.config.context_length
        if self.start is None:
            self.start = max(0, len(ids) - context)
        if len(ids) - self.start > context:
            self.start, self.memory = len(ids) - max(1, context // 2), None
        return context - (len(ids) - self.start)

    def room(self) -> int:
        """Positions that a cache of this window can come to hold."""
        return min(self.model.config.context_length, self.end - self.start)

    def read(self, ids, drafts=()):
        """Logits (1 + drafts, V) after ids and after each draft. What the cache held beyond ids[:-1] is forgotten."""
        if self.memory is None:
            self.memory = self.model.new_cache(1, self.room())
        window = ids[self.start:]
        self.first = min(self.memory.length, len(window) - 1)
        self.memory.set_lengths(self.first)
        tokens = torch.tensor([[*window[self.first:], *drafts]], device=self.memory.device)
        self.hidden = self.model.hidden(tokens, self.memory)       # (1, T, C), positions first … of the window
        return self.model.head(self.hidden[0, -1 - len(drafts):])


def draw_in_turn(ids, k: int, how: Sampling, generator, logits_after):
    """(k ids that follow ids, the distributions (k, V) they were drawn from), by logits_after(text) of shape (1, V)."""
    text, q = list(ids), []
    for _ in range(k):
        q.append(how.probabilities(logits_after(text), [text]))
        text.append(torch.multinomial(q[-1], 1, generator=generator).item())
    return text[len(ids):], torch.cat(q)


class ModelDraft:
    """Drafts by a smaller model."""

    def __init__(self, model, end: int, k: int):
        self.window = Window(model, end, spare=k)    # each draft is a call of its own, and all may be taken back

    def propose(self, ids, k: int, how: Sampling, generator):
        return draw_in_turn(ids, min(k, self.window.fit(ids) + 1), how, generator, self.window.read)


class HeadDraft:
    """Drafts by the model's own head for a further token, fed with its own output after the first (2412.19437, 2.2)."""

    def __init__(self, window: Window):
        self.window, self.memory = window, None

    def propose(self, ids, k: int, how: Sampling, generator):
        model, first = self.window.model, self.window.first
        if first == 0:
            self.memory = model.new_cache(1, self.window.room(), draft=True)
        # It reads pairs of a hidden state of the model and the token after it; only the true ones stay in its cache.
        begin = self.window.start + first + 1
        self.hidden = self.window.hidden[:, :len(ids) - begin]

        def logits_after(text):
            tokens = torch.tensor([text[begin + self.memory.length - first:]], device=self.hidden.device)
            self.hidden = model.mtp[0](self.hidden, model.token_embeddings(tokens), self.memory)[:, -1:]
            return model.head(self.hidden[:, 0])
        drafts = draw_in_turn(ids, k, how, generator, logits_after)
        self.memory.set_lengths(first + len(ids) - begin)
        return drafts


class LookupDraft:
    """Drafts what followed the last time that the newest three tokens, or two, or one, stood in the text.

    It costs nothing and helps where a text repeats itself: summaries, code edits, lists.
    """

    def __init__(self, vocab_size: int, device):
        self.vocab_size, self.device = vocab_size, device

    def propose(self, ids, k: int, how: Sampling, generator):
        for n in range(min(3, len(ids) - 1), 0, -1):
            for i in range(len(ids) - n - 1, -1, -1):
                if ids[i:i + n] == ids[-n:]:
                    text = list(ids)
                    for j in range(i + n, i + n + k):      # past the end it copies itself: a period goes on
                        text.append(text[j])
                    drafts = torch.tensor(text[len(ids):], device=self.device)
                    size = min(self.vocab_size, how.vocab_limit or self.vocab_size)
                    return drafts.tolist(), torch.nn.functional.one_hot(drafts, size).float()
        return [], None


def accept(p, q, drafts: list[int], generator):
    """(how many drafts stand, the token after them), by the rule above. p: (n + 1, V), q: (n, V)."""
    for i, (token, u) in enumerate(zip(drafts, torch.rand(len(drafts), generator=generator, device=p.device).tolist())):
        if u * q[i, token].item() >= p[i, token].item():
            rest = (p[i] - q[i]).clamp(min=0)
            # Nothing is left only where p and q differ by rounding alone: then p itself is right.
            return i, torch.multinomial(rest if rest.sum() > 0 else p[i], 1, generator=generator).item()
    return len(drafts), torch.multinomial(p[-1], 1, generator=generator).item()


def check_head(model) -> None:
    """Raises ValueError where the model has no multi-token head to draft with."""
    if not model.config.mtp_depth:
        raise ValueError("mtp_depth=0: this model has no head for a further token to draft with; "
                         "give a smaller model, or ngram to look drafts up in the text")


@torch.inference_mode()
def speculate(target, draft, prompt_ids, max_new_tokens: int, *, k: int = 4, stop_ids=(), generator=None,
              figures: dict | None = None, text: Text | None = None, **sampling):
    """Yield the new ids of one prompt in pieces, one piece for each pass of the target; see speculative_generate."""
    how, ids, end = Sampling(**sampling), [int(i) for i in prompt_ids], len(prompt_ids) + max_new_tokens
    check_prompts(target, [ids], max_new_tokens, how.vocab_limit)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} drafts a pass must be a whole number of at least 1")
    window = Window(target, end)
    if draft in (None, "mtp"):
        check_head(target)
        drafter = HeadDraft(window)
    elif draft == "ngram":
        drafter = LookupDraft(target.config.vocab_size, next(target.parameters()).device)
    elif not hasattr(draft, "new_cache"):
        raise ValueError(f"draft={draft!r} is none of: a Transformer, mtp (or None), ngram")
    elif draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"the draft has a vocabulary of {draft.config.vocab_size}, the target one of "
                         f"{target.config.vocab_size}; both must be trained with the same tokenizer")
    else:
        drafter = ModelDraft(draft, end, k)
    figures = {} if figures is None else figures
    for name in FIGURES:                 # those of several texts add up
        figures.setdefault(name, 0)
    figures["prefill_tokens"] += len(ids)
    while len(ids) < end:
        began = time.perf_counter()
        limit = min(k, window.fit(ids), end - len(ids) - 1)
        drafts, q = [], None
        if limit > 0 and window.memory is not None:  # the prompt, and a window that moved, are first read as they are
            drafts, q = drafter.propose(ids, limit, how, generator)
        figures["draft_s"] += time.perf_counter() - began
        p = how.probabilities(window.read(ids, drafts), [ids + drafts[:i] for i in range(len(drafts) + 1)])
        n, token = accept(p, q, drafts, generator)
        phase = "prefill" if end - len(ids) == max_new_tokens else "decode"
        figures[f"{phase}_s"] += time.perf_counter() - began
        new = drafts[:n] + [token]
        stop = next((i for i, one in enumerate(new) if ends(one, stop_ids, text)), None)
        new = new if stop is None else new[:stop + 1]
        ids += new
        for name, count in (("target_calls", 1), ("drafted", len(drafts)), ("accepted", n), ("new_tokens", len(new)),
                            ("rejected", n < len(drafts)), ("decode_tokens", len(new) * (phase == "decode")),
                            ("decode_calls", phase == "decode")):
            figures[name] += int(count)
        figures["acceptance_rate"] = figures["accepted"] / max(1, figures["accepted"] + figures["rejected"])
        figures["tokens_per_target_call"] = figures["decode_tokens"] / max(1, figures["decode_calls"])
        yield new
        if stop is not None:
            return


def speculative_generate(target, draft, prompt_ids, max_new_tokens: int, *, k: int = 4, temperature: float = 1.0,
                         generator=None, stop_ids=(), **sampling):
    """(new ids, figures): ids with exactly the distribution of generate(target, …), greedy the same, in fewer passes.

    draft: a Transformer of the same vocabulary; None or "mtp" for the target's own multi-token head; "ngram" to look
    drafts up in the text. k: drafts a pass. sampling: top_k, top_p, min_p, repetition_penalty, vocab_limit, of which
    the distribution is kept too, since draft and target are cut alike.
    figures: FIGURES, among them acceptance_rate, of the drafts judged (those after a rejected one are not), and
    tokens_per_target_call, after the prefill. Raises ValueError for a draft of another vocabulary and for what
    `generate` refuses.
    """
    figures, new = {}, []
    with evaluating(target, *([draft] if hasattr(draft, "new_cache") else [])):
        for piece in speculate(target, draft, prompt_ids, max_new_tokens, k=k, stop_ids=stop_ids, generator=generator,
                               figures=figures, temperature=temperature, **sampling):
            new += piece
    return new, figures


# --- smaller weights ---

class QuantizedLinear(torch.nn.Module):
    """x @ weightᵀ, the weights kept in 8 or 4 bits: decoding waits for the bytes of the weights and for little else.

    int8: w ≈ s q with a scale for every row. int4: w ≈ s (q - 8) + z, a scale and a shift for every GROUP of a row.
    Scales are bfloat16, and so are x and the products in torch's CPU kernels; sums are float32. Where there is no
    kernel, or there are many rows to spread the cost over, the weights are multiplied out first.
    """

    def __init__(self, linear, kind: str):
        super().__init__()
        weight = linear.weight.detach().float()
        R, C = weight.shape
        self.bias, self.kind = linear.bias, "int8" if C % GROUP else kind
        if self.kind == "int8":
            scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
            q = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        else:
            # torch's kernel wants rows in blocks; those added are cut off again.
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -R % 64)).view(-1, C // GROUP, GROUP)
            low, high = weight.aminmax(dim=-1)
            step = ((high - low) / 15).clamp(min=1e-30).bfloat16()
            shift = (low + 8 * step.float()).bfloat16()
            q = ((weight - shift.float()[..., None]) / step.float()[..., None]).round().add(8).clamp(0, 15)
            q, scale = q.flatten(1).to(torch.uint8), torch.stack((step, shift), dim=-1)       # (R, C), (R, C/GROUP, 2)
        self.rows, self.packed = R, fast_int4(weight) and self.kind == "int4"
        if self.packed:
            q, scale = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1), scale.transpose(0, 1).contiguous()
        elif self.kind == "int4":
            q = q[:, 0::2] * 16 + q[:, 1::2]                                                     # two in a byte
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def weight(self):
        """The weights (R, C) multiplied out, in float32."""
        if self.kind == "int8":
            return self.q * self.scale.float()[:, None]
        q = torch.stack((self.q // 16, self.q % 16), dim=-1).view(*self.scale.shape[:2], GROUP)
        step, shift = self.scale.float().unsqueeze(-2).unbind(-1)
        return ((q.float() - 8) * step + shift).flatten(1)[:self.rows]

    def forward(self, x):                                                       # (..., C) -> (..., R)
        flat = x.reshape(-1, x.shape[-1])
        if self.packed:
            y = torch._weight_int4pack_mm_for_cpu(flat.bfloat16(), self.q, GROUP, self.scale)[:, :self.rows]
        elif self.kind == "int8" and 0 < len(flat) <= 128 and fast_int8(x):
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.q, self.scale)
        elif self.kind == "int8" and len(flat) <= 4 and x.device.type == "cuda":
            from kernels import int8_matvec
            y = int8_matvec(flat, self.q, self.scale.float())
        else:
            y = product(flat, self.weight().to(x.dtype))
        y = y.to(x.dtype).reshape(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias


def fast_int8(x) -> bool:
    """Whether torch has a product of bfloat16 and int8 for this tensor's device."""
    return x.device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm")


def fast_int4(x) -> bool:
    """The same for int4."""
    return x.device.type == "cpu" and hasattr(torch, "_weight_int4pack_mm_for_cpu")


def weight_bytes(model, rows: int = 1) -> int:
    """Bytes of weights that one decoding pass for so many rows reads: all but the embedding table, if that is one of
    its own, and of the experts those that are chosen at most.
    """
    total = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        share = 1.0
        if ".experts." in name:
            share = min(1.0, rows * model.config.n_experts_per_token / model.config.n_experts)
        if name != "token_embeddings.weight" or model.lm_head.weight is tensor:
            total += share * tensor.numel() * tensor.element_size()
    return int(total)


def quantize(model, kind: str):
    """Keep the model's matrices in int8 or int4 from now on, in place; returns the model. For inference alone.

    Left as they are: the embedding, whose rows are looked up, the routers of experts, and MLA's kv_up_proj, which
    decoding uses as a matrix. Rows that are no multiple of GROUP stay in int8. Raises ValueError for another kind.
    """
    if kind not in ("int8", "int4"):
        raise ValueError(f"quantize={kind!r} must be int8 (a scale for every row) or int4 (a scale for every {GROUP})")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear) and name not in ("router", "kv_up_proj"):
                setattr(module, name, QuantizedLinear(child, kind))
    return model


# --- measuring ---

SHAPES = {"llama-30m": dict(vocab_size=32_000, context_length=1024, d_model=512, n_layers=6, n_heads=8, d_ff=1376,
                            tie_embeddings=True),
          "llama-124m": dict(vocab_size=50_257, context_length=1024, d_model=768, n_layers=12, n_heads=12, d_ff=2048,
                             tie_embeddings=True)}


def run_case(model, prompts, n_new: int, draft=None, k: int = 4, cache: bool = True) -> dict:
    """One measurement: the timing of `stream`, of `speculate`, or of transformers' generate."""
    timing, began = {}, time.perf_counter()
    if draft is not None:
        new = sum(speculate(model, draft, prompts[0], n_new, k=k, temperature=0, figures=timing), [])
    elif hasattr(model, "new_cache"):
        new = [ids[0] for ids in stream(model, prompts, n_new, cache=cache, temperature=0, timing=timing)]
    else:
        how = dict(do_sample=False, min_new_tokens=n_new, max_new_tokens=n_new)
        new = model.generate(torch.tensor(prompts), **how)[0, len(prompts[0]):].tolist()
    return timing | {"new": new, "rate": len(prompts) * n_new / (time.perf_counter() - began)}


def reference(model):
    """The same weights as a model of transformers, or None, saying so, where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("reference=true: transformers is not installed (pip install transformers); left out")
        return None
    from convert import save_pretrained
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    return theirs


def bench_cases(model, draft, config) -> dict:
    """What is measured, by its row in the table: (name, context, batch) -> arguments of run_case."""
    contexts, batches = ([int(n) for n in text.split(",")] for text in (config.contexts, config.batches))
    if config.new_tokens < 2 or config.rounds < 1 or config.k < 1:
        raise ValueError(f"new_tokens={config.new_tokens} must be at least 2, of which one is prefill's; "
                         f"rounds={config.rounds} and k={config.k} at least 1")
    if max(contexts) + config.new_tokens > model.config.context_length or min(contexts + batches) < 1:
        raise ValueError(f"contexts={config.contexts} with new_tokens={config.new_tokens} must be 1 … "
                         f"{model.config.context_length}, the model's context, and batches={config.batches} at least 1")
    base, ids = contexts[0], torch.randint(model.config.vocab_size, (max(batches), max(contexts))).tolist()
    cases = {("plain", context, batch): (model, [row[:context] for row in ids[:batch]], config.new_tokens)
             for context in contexts for batch in sorted({1, *batches})}
    one = cases["plain", base, 1][1:]
    for kind in ("int8", "int4"):
        small = quantize(copy.deepcopy(model), kind)
        cases |= {(kind, *key[1:]): (small, *case[1:]) for key, case in cases.items() if key[:2] == ("plain", base)}
    for name, drafter in (("n-grams", "ngram"), ("own head", "mtp" if model.config.mtp_depth else None),
                          ("draft model", draft)):
        if drafter is not None:
            cases[name, base, 1] = (model, *one, drafter, config.k)
    cases["no cache", base, 1] = (model, one[0], max(2, config.new_tokens // 8), None, 0, False)
    if config.compile:
        compiled = copy.deepcopy(model)
        for block in compiled.layers:              # shapes without a past in them: one compilation serves every token
            block.ffn.compile()
        cases["compiled ffn", base, 1] = (compiled, *one)
    if config.reference and (theirs := reference(model)) is not None:
        cases["transformers", base, 1] = (theirs, *one)
    return cases


@torch.inference_mode()
def bench(name: str, config) -> None:
    """Print a table of prefill and decoding rates of a folder or a shape, and draw decoding under its roof."""
    torch.manual_seed(config.seed)
    tokenizer, shape = None, SHAPES.get(name) or PRESETS.get(name)
    if shape is None:
        model, tokenizer = load(name, config)
    else:
        model = Transformer(ModelConfig(**shape)).to(config.device).eval()
    draft = load_draft(config.draft, model, tokenizer, config) if config.draft else None
    cases, roofs = bench_cases(model, draft, config), []
    results = {key: [] for key in cases}
    for _ in range(config.rounds):                 # in turn: what slows the machine down slows all of them
        roofs.append(bandwidth(config.device))
        for key, case in cases.items():
            results[key].append(run_case(*case))
    roof, n_params = statistics.median(roofs), sum(p.numel() for p in model.parameters()) / 1e6
    lines = [f"{name}: {n_params:.1f}M parameters, {config.new_tokens} new tokens; medians of {config.rounds} rounds "
             f"in turn, {torch.get_num_threads()} threads, memory {roof / 1e9:.1f} GB/s",
             f"{'':<14}{'prompt':>6}{'batch':>6} | {'both, tok/s':>12}{'×':>6} | {'prefill, tok/s':>14} | "
             f"{'decode, tok/s':>13}{'GB/s':>6}{'of roof':>8}"]
    base = next(runs for runs in results.values())
    for (kind, context, batch), runs in results.items():
        rate, first = median(runs, "rate"), runs[0]
        line = f"{kind:<14}{context:>6}{batch:>6} | {rate:>12,.1f}{rate / median(base, 'rate'):>6.2f} | "
        if "decode_s" in first:
            line += f"{median(runs, 'prefill_tokens', 'prefill_s'):>14,.0f} | "
            line += f"{median(runs, 'decode_tokens', 'decode_s'):>13,.1f}"
        if first.get("decode_bytes"):
            speed = median(runs, "decode_bytes", "decode_s")
            line += f"{speed / 1e9:>6.1f}{speed / roof:>8.2f}"
        if "drafted" in first:
            line += "  {acceptance_rate:.0%} accepted, {tokens_per_target_call:.2f} tokens a pass".format(**first)
        if kind in ("transformers", "n-grams", "own head", "draft model"):
            line += ", the same tokens" if first["new"] == base[0]["new"] else ", OTHER TOKENS"
        lines.append(line)
    print("\n".join(lines))
    Path(f"{config.out}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    draw(results, roof, f"python sample.py bench {name}", f"{config.out}.png")


def median(runs: list[dict], name: str, per: str | None = None) -> float:
    return statistics.median(run[name] / (run[per] if per else 1) for run in runs)


def draw(results: dict, roof: float, command: str, path: str) -> None:
    """Decoding rates over the batch, with the roof: what the bytes of weights and cache allow."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for number, (kind, context) in enumerate(dict.fromkeys(key[:2] for key in results)):
        batches = [key[2] for key in results if key[:2] == (kind, context)]
        color, runs = f"C{number % 10}", [results[kind, context, batch] for batch in batches]
        if "decode_s" in runs[0][0]:
            axes.plot(batches, [median(one, "decode_tokens", "decode_s") for one in runs], "o-", color=color,
                      label=f"{kind}, prompt {context}")
        if runs[0][0].get("decode_bytes"):
            axes.plot(batches, [roof * one[0]["decode_tokens"] / one[0]["decode_bytes"] for one in runs], "--",
                      color=color, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="rows in the batch", ylabel="decoded tokens per second",
             title=f"{command}\ndashed: the roof, {roof / 1e9:.1f} GB/s of memory")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"{path} drawn")


# --- explaining ---

@torch.inference_mode()
def explain(folder: str, config) -> None:
    """Show how a model sees a text, token by token, in the terminal and as an HTML page."""
    model, tokenizer = load(folder, config)
    ids, end = begin(tokenizer, config.prompt)
    room = model.config.context_length - len(ids)
    if config.max_new_tokens > room:
        raise ValueError(f"{len(ids)} tokens of prompt and max_new_tokens={config.max_new_tokens} pass the model's "
                         f"context of {model.config.context_length}; explain looks at one context, give less")
    if end is not None and ids[0] != end and room > config.max_new_tokens:    # before the first token, the beginning
        ids = [end] + ids
    ids += generate(model, ids, config.max_new_tokens, temperature=0, vocab_limit=tokenizer.vocab_size)
    if len(ids) < 2:
        raise ValueError("nothing to explain: give a --prompt, or max_new_tokens of at least 1")
    log_p = torch.log_softmax(model(torch.tensor([ids[:-1]], device=config.device))[0].float(), dim=-1)
    page, line = [], []
    for i, (row, token) in enumerate(zip(log_p, ids[1:])):
        p, rank = row[token].exp().item(), int((row > row[token]).sum()) + 1
        entropy, top = -(row.exp() * row.clamp(min=-1e4)).sum().item() / math.log(2), row.topk(min(5, len(row)))
        likely = ", ".join(f"{show(tokenizer, other)} {value:.1%}"
                           for value, other in zip(top.values.exp().tolist(), top.indices.tolist()))
        text, level = show(tokenizer, token), min(5, int(-math.log10(max(p, 1e-5))))    # 0: over 10 %, 5: under 0.001 %
        about = f"p {p:.2%}, rank {rank}, entropy {entropy:.2f} bits; likeliest: {likely}"
        line.append(f"\x1b[30;48;5;{COLORS[level][0]}m{text}\x1b[0m")
        page.append(f'<tr style="background:{COLORS[level][1]}"><td>{i + 1}<td><b>{html.escape(text)}</b><td>{p:.2%}'
                    f"<td>{rank}<td>{entropy:.2f}<td>{html.escape(likely)}")
        print(f"{text:<16} {about}")
    print("".join(line))
    path = Path(config.out or Path(folder) / "explain.html")
    path.write_text('<!doctype html><meta charset="utf-8"><title>explain</title>\n<style>td{padding:0 1em;'
                    "font-family:monospace;white-space:pre}</style>\n<table><tr><th><th>token<th>probability<th>rank"
                    "<th>entropy, bits<th>five likeliest\n" + "\n".join(page) + "\n</table>\n", encoding="utf-8",
                    newline="\n")
    print(f"{path} written")


# Green to red, one step for each factor of ten of probability: the terminal's number and the page's.
COLORS = ((157, "#afffaf"), (191, "#dfff5f"), (228, "#ffff87"), (222, "#ffdf87"), (216, "#ffaf87"), (210, "#ff8787"))


def show(tokenizer, token: int) -> str:
    """A token as text on one line: part of a character as U+FFFD, no control characters."""
    if token not in tokenizer.vocab:
        return f"[{token}]"                        # a row that pads the vocabulary
    text = tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "·")
    return "".join(letter if letter.isprintable() else "�" for letter in text)


# --- command line ---

# A user's turn up to where the answer begins, and the token that ends the answer: align.py's form, and ChatML.
CHATS = {"chat": ("<|user|>{prompt}<|end|><|assistant|>", "<|end|>"),
         "chatml": ("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")}


def conversation(tokenizer, form: str, after_answer: str, turns: list[str]) -> list[int]:
    """Ids of turns (user, assistant, …, user) up to where the next answer begins. form: with {prompt} in it.

    Only the form names control tokens: what people type is plain text, even where it reads "<|end|>".
    """
    ids, (before, after) = [], form.split("{prompt}")
    for i, turn in enumerate(turns):
        left, right = (before, after) if i % 2 == 0 else ("", after_answer)
        ids += tokenizer.encode(left) + tokenizer.encode(turn, allowed_special=set()) + tokenizer.encode(right)
    return ids


def chat_ids(tokenizer, turns: list[str]):
    """(ids of a conversation in the form that the tokenizer's control tokens are of, the id that ends its answer)."""
    known = tokenizer.special_tokens
    chat = next((chat for chat in CHATS.values() if set(re.findall(r"<\|.*?\|>", chat[0])) <= set(known)), None)
    if chat is None:
        raise ValueError("chat=true needs a tokenizer with <|user|>, <|assistant|> and <|end|>, or ChatML's tokens; "
                         "tune the model for conversations first: python align.py sft")
    form, end = chat
    return conversation(tokenizer, form, end, turns), known[end]


def begin(tokenizer, prompt: str):
    """(ids to go on from, the id that ends a document or None)."""
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    if not prompt and end is None:
        raise ValueError(f"this tokenizer has no {END_OF_TEXT} to start a text from; give a --prompt")
    return (tokenizer.encode(prompt) if prompt else [end]), end


def load(folder: str, config):
    """(model, tokenizer) of a folder, as small as config.quantize says."""
    model, tokenizer = load_model(folder, config.device, config.checkpoint)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json: its ids cannot be turned into text")
    kind = getattr(config, "quantize", None)
    return (quantize(model, kind) if kind else model), tokenizer


def load_draft(name: str, model, tokenizer, config):
    """What --draft names: mtp, ngram, or the folder of a smaller model with the same tokenizer."""
    if name == "mtp":
        check_head(model)
    if name in ("mtp", "ngram"):
        return name
    draft, its_tokenizer = load_model(name, config.device, config.checkpoint)
    if tokenizer is not None and (its_tokenizer is None or its_tokenizer.vocab != tokenizer.vocab):
        raise ValueError(f"draft={name} was trained with another tokenizer; both must read the same ids")
    return draft


def write(model, tokenizer, before: str, ids, end, config, generator, draft) -> str:
    """Print what follows ids, after `before`: a single text as it is made, several one by one; returns the last."""
    how = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    how |= dict(stop_ids=() if end is None else (end,), generator=generator, vocab_limit=tokenizer.vocab_size)
    texts = [Text(tokenizer, (config.stop,) if config.stop else ()) for _ in range(config.num_samples)]
    figures, shown = {}, 0
    if len(texts) == 1:
        print(before, end="", flush=True)
    if draft is None:
        steps = stream(model, [ids], config.max_new_tokens, cache=config.cache, n_each=len(texts), timing=figures,
                       texts=texts, **how)
    else:
        steps = (piece for text in texts for piece in speculate(
            model, draft, ids, config.max_new_tokens, k=config.k, figures=figures, text=text, **how))
    for _ in steps:
        if len(texts) == 1:
            print(texts[0].text[shown:], end="", flush=True)
            shown = len(texts[0].text)
    for number, text in enumerate(texts):
        text.feed(None)
        print(text.text[shown:] if len(texts) == 1 else f"--- sample {number + 1} ---\n{before}{text.text}")
    report(figures, config)
    return texts[-1].text


def report(figures: dict, config) -> None:
    """One line: the rates of the two phases, and how near decoding came to what the memory can do."""
    line = []
    for phase in ("prefill", "decode"):
        n, seconds = figures.get(f"{phase}_tokens", 0), max(figures.get(f"{phase}_s", 0), 1e-9)
        line.append(f"{phase} {n} tokens, {n / seconds:,.0f} tok/s")
    if figures.get("decode_bytes"):
        speed, roof = figures["decode_bytes"] / figures["decode_s"], bandwidth(config.device)
        line[-1] += f", {speed / 1e9:.1f} GB/s = {speed / roof:.0%} of the memory's {roof / 1e9:.1f}"
    if "drafted" in figures:
        line.append("{acceptance_rate:.0%} of drafts accepted, {tokens_per_target_call:.2f} tokens a pass".format(
            **figures))
    print("--- " + "; ".join(line) + " ---")


def sample(folder: str, config) -> None:
    """Load the folder of a run and write."""
    if config.num_samples < 1 or config.draft and not config.cache:
        raise ValueError(
            f"num_samples={config.num_samples} must be at least 1, and draft={config.draft} needs cache=true")
    model, tokenizer = load(folder, config)
    generator = None if config.seed is None else torch.Generator(config.device).manual_seed(config.seed)
    draft = load_draft(config.draft, model, tokenizer, config) if config.draft else None
    turns, prompt = [], config.prompt
    if config.chat:
        chat_ids(tokenizer, [""])          # refuses a model that is not for it, before anything is typed
    while True:
        if (config.chat or config.interactive) and not prompt:
            prompt = input("you> " if config.chat else "prompt> ")
            if not prompt:
                return
        turns.append(prompt)
        ids, end = chat_ids(tokenizer, turns) if config.chat else begin(tokenizer, prompt)
        turns.append(write(model, tokenizer, "" if config.chat else prompt, ids, end, config, generator, draft))
        prompt = ""
        if not (config.chat or config.interactive):
            return


USAGE = """usage: python sample.py OUT_DIR [--prompt=TEXT] [--key=value …]
       python sample.py bench OUT_DIR|SHAPE [--key=value …]       SHAPE: llama-124m, gpt2, …
       python sample.py explain OUT_DIR --prompt=TEXT [--key=value …]"""
VERBS = {"bench": (BenchConfig, bench), "explain": (ExplainConfig, explain)}


def main(argv: list[str]) -> None:
    """Do what the command line says; a mistake exits with status 2."""
    config_class, do = VERBS.get(argv[0] if argv else None, (SampleConfig, sample))
    _, files, config, _ = command_line(config_class, argv, USAGE, tuple(VERBS))
    if len(files) != 1:
        fail(f"give one folder of a training run. {USAGE}")
    try:
        do(files[0], config)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:    # the last: torch without that device
        fail(error)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
