"""From prompt ids to new ids: the eight-line loop, then the cache, batches and drafts that make it fast.

A language model gives a distribution over the next token. Drawing one, appending it and asking again is all there is
to writing: `simple_generate` below. It reads the whole text anew for every token. But keys and values of past positions
do not change, so they are kept (KVCache in attention.py), and writing has two phases:

    prefill   the prompt in one pass: T tokens by all weights, bound by arithmetic
    decode    one token a pass: all weights are read for one row of products, bound by memory bandwidth

    tokens/s  <=  bandwidth / (bytes of weights + bytes of cache)      124M in float32 at 60 GB/s: 60 / 0.5 = 120

What makes decoding faster reads fewer bytes for a token: a batch shares one reading among its rows, drafts share one
among the tokens they get right, int8 and int4 shorten it (compress.py). `python bench.py decode` measures each beside
this roof. A few rows on a CPU go through onetoken.c where a compiler is at hand. Requests that come and go: serve.py.

Top-k: Fan 2018 (1805.04833). Top-p (nucleus): Holtzman 2019 (1904.09751). Min-p: 2407.01082. Speculative decoding:
Leviathan 2022 (2211.17192). The command that writes, chats and explains is sample.py.
"""
import codecs
import contextlib
import math
import operator
from collections import Counter

import torch

import onetoken


# --- the loop everyone starts from ---

@torch.inference_mode()
def simple_generate(model, prompt_ids, max_new_tokens: int, temperature: float = 1.0, generator=None) -> list[int]:
    """The new ids after one prompt, without cache, batch or window, as `generate` gives them; temperature: above 0."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[:, -1]                               # (1, V): after the last token
        probabilities = torch.softmax(logits / temperature, dim=-1)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
    return ids[len(prompt_ids):]


# --- picking one token ---

def check_numbers(scores):
    """`scores` as they are; ValueError when one is NaN: on a GPU, sampling from it would end the process."""
    if scores.isnan().any():
        raise ValueError("the model gives NaN: its weights are damaged or of a run that diverged, or its dtype is too "
                         "narrow; take an earlier checkpoint")
    return scores


def distribution(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, vocab_limit: int | None = None):
    """Probabilities (B, V) that the next token is drawn from: temperature, then top-k, then top-p, then min-p.

    temperature 0 puts everything on the likeliest token. top_p keeps the fewest tokens whose sum reaches p, at least
    one; min_p those with at least that share of the likeliest one's probability. Ties at the k-th place are all kept.
    vocab_limit: ids from there on pad the vocabulary and get nothing; V is then vocab_limit.
    """
    logits = logits[:, :vocab_limit].float()
    largest = check_numbers(logits.amax(dim=-1, keepdim=True))
    if temperature == 0 or top_k == 1:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    # The maximum is taken away first, and 1e-30 is the least divisor: nothing overflows however low the temperature.
    logits = (logits - largest) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is needed while those before it do not reach p yet, by more than float32's rounding; the first always.
        needed = ordered.cumsum(dim=-1) - ordered < max(top_p - 1e-6, 1e-9)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered * needed)
    if min_p is not None:
        small = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(small, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def pick(logits, generator, temperature: float = 1.0, vocab_limit: int | None = None, **how) -> list[int]:
    """One id for each row of logits (B, V); how: top_k, top_p, min_p."""
    if temperature == 0:                     # no need for a distribution over the whole vocabulary
        logits = logits[:, :vocab_limit]
        if logits.device.type == "cpu":      # NumPy's argmax takes a sixth of the time of torch's
            ids = torch.from_numpy(logits.detach().float().numpy().argmax(axis=-1))
        else:
            ids = logits.argmax(dim=-1)
        check_numbers(logits.gather(1, ids[:, None]))            # NaN counts as the largest
        return ids.tolist()
    probabilities = distribution(logits, temperature, vocab_limit=vocab_limit, **how)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1).tolist()


def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, vocab_limit=None) -> None:
    """Raise ValueError for a setting out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; leave it out for all tokens")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be 0 … 1, a share of the likeliest token's probability")
    if vocab_limit is not None and vocab_limit < 1:
        raise ValueError(f"vocab_limit={vocab_limit} must be at least 1; leave it out to sample from all ids")


def check_prompts(model, prompts, max_new_tokens, vocab_limit=None) -> None:
    """Raise ValueError for prompts that cannot be continued, before anything is computed."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    size = min(model.config.vocab_size, vocab_limit or model.config.vocab_size)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; a model needs one token to go on from, such as <|endoftext|>")
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise ValueError(f"prompt {number} holds an id outside 0 … {size - 1}; the tokenizer is not this model's")


def id_lists(prompt_ids) -> tuple[list[list[int]], bool]:
    """(prompts as lists of int, whether it was a single one) of lists, tuples, NumPy arrays or tensors of ids."""
    def plain(ids):
        return ids.tolist() if hasattr(ids, "tolist") else ids
    rows = [plain(row) for row in plain(prompt_ids)]
    single = not any(isinstance(row, (list, tuple)) for row in rows)
    return [[operator.index(i) for i in row] for row in ([rows] if single else rows)], single


class Text:
    """The text of one row as its ids come: whole characters only, and nothing that may become a stop string."""

    def __init__(self, tokenizer, stop_strings=()):
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if tokenizer is None or not all(self.stop_strings):
            raise ValueError("stop strings need a tokenizer to read the text with, and none of them may be empty")
        self.tokenizer = tokenizer
        # Bytes of one character may come in two tokens: the decoder holds the first half back.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held_back = max(map(len, self.stop_strings), default=1) - 1         # characters that may begin a stop
        self.text, self.pending, self.ended = "", "", False

    def feed(self, token: int | None) -> bool:
        """Add an id, or None for the end of the ids; True once the text has a stop string, before which it ends."""
        if self.ended:
            return True
        raw = b"" if token is None else self.tokenizer.decode_bytes([token])
        self.pending += self.decoder.decode(raw, final=token is None)
        stops = [self.pending.find(stop) for stop in self.stop_strings if stop in self.pending]
        self.ended = bool(stops)
        if stops:
            sure = min(stops)
        else:
            sure = len(self.pending) if token is None else max(0, len(self.pending) - self.held_back)
        self.text, self.pending = self.text + self.pending[:sure], "" if stops else self.pending[sure:]
        return self.ended


def ends(token: int, stop_ids, text: Text | None) -> bool:
    """Whether a row ends with this id; shows it to the row's text, unless it is a stop id."""
    return token in stop_ids or (text is not None and text.feed(token))


# --- generation: prefill, then decode ---

@contextlib.contextmanager
def evaluating(*models):
    """The models in evaluation mode, and back in the mode they were in afterwards."""
    modes = [model.training for model in models]
    try:
        yield [model.eval() for model in models]
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


def prefill(model, windows: list[list[int]], cache: bool, n_new: int):
    """Read windows of ids in one pass: (logits of each one's last token (B, V), a cache that holds them or None).

    n_new: the tokens to come, for which the cache has room, up to the context: a cache for all of it is slow to make.
    """
    lengths, device = [len(window) for window in windows], next(model.parameters()).device
    # Padding stands on the right, where a causal model cannot see it from the left; the cache then forgets it.
    tokens = torch.tensor([window + [0] * (max(lengths) - len(window)) for window in windows], device=device)
    room = min(model.config.context_length, max(lengths) + n_new)
    memory = model.new_cache(len(windows), room) if cache else None
    hidden = model.hidden(tokens, memory)                                        # (B, T, C)
    if memory is not None:
        memory.set_lengths(lengths)
        memory.in_c = onetoken.prepare(model, room)
    # The head is the largest matrix of a small model: only the last token of each window goes through it.
    return model.head(hidden[torch.arange(len(windows)), torch.tensor(lengths) - 1]), memory


def decode(model, last: list[int], memory):
    """Logits (B, V) after one more token of each row."""
    return read_on(model, torch.tensor(last, device=memory.device)[:, None], memory)[:, -1]


def read_on(model, tokens, memory):
    """Logits (B, T, V) after each of a few more tokens (B, T), which join the cache; by onetoken.c where it can."""
    if memory.in_c is None or tokens.numel() > onetoken.MAX_ROWS:
        return model(tokens, cache=memory)
    logits = memory.in_c(tokens, memory.lengths, memory, memory.k, memory.v)
    memory.grow(tokens.shape[1])
    return logits


@torch.inference_mode()
def stream(model, prompts, max_new_tokens: int, *, stop_ids=(), cache=True, generator=None, n_each: int = 1,
           texts: list[Text] | None = None, **how):
    """Yield, token by token, a list with the new id of every row, None for a row that has ended.

    prompts: lists of ids, of any lengths. n_each: rows per prompt, which share its prefill. texts: one for every row; a
    row ends with its stop string. how: temperature, top_k, top_p, min_p, vocab_limit.

    A text that outgrows the context goes on from its last half context, read anew, with or without the cache.
    """
    check_sampling(**how)
    check_prompts(model, prompts, max_new_tokens, how.get("vocab_limit"))
    if max_new_tokens == 0 or not prompts:
        return
    context, stop_ids = model.config.context_length, {int(i) for i in stop_ids}
    # 1. prefill: each prompt once, however many rows it gives
    logits, memory = prefill(model, [list(prompt[-context:]) for prompt in prompts], cache, max_new_tokens)
    source = [i for i in range(len(prompts)) for _ in range(n_each)]
    logits = logits[source]
    if memory is not None and n_each > 1:
        memory.select(source)
    rows = [list(prompts[i]) for i in source]
    starts = [max(0, len(row) - context) for row in rows]                        # each row's window begins here
    alive = list(range(len(rows)))
    # 2. decode: a token a row, then one pass for the next ones
    for left in range(max_new_tokens, 0, -1):
        given, going = [None] * len(rows), []
        for place, (i, token) in enumerate(zip(alive, pick(logits, generator, **how))):
            rows[i].append(token)
            given[i] = token
            if not ends(token, stop_ids, texts and texts[i]):
                going.append(place)
        yield given
        if left == 1 or not going:
            return
        if len(going) < len(alive):
            alive = [alive[place] for place in going]
            if memory is not None:
                memory.select(going)
        outgrown = [i for i in alive if len(rows[i]) - starts[i] > context]
        for i in outgrown:
            starts[i] = len(rows[i]) - max(1, context // 2)
        if outgrown or memory is None:
            logits, memory = prefill(model, [rows[i][starts[i]:] for i in alive], cache, left - 1)
        else:
            logits = decode(model, [rows[i][-1] for i in alive], memory)


def generate(model, prompt_ids, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, stop_ids=(), cache: bool = True, generator=None, min_p: float | None = None,
             stop_strings=(), tokenizer=None, vocab_limit: int | None = None):
    """The new ids after a prompt (a list of int), or a list of them for a list of prompts of any lengths.

    prompt_ids: lists, NumPy arrays or tensors. temperature: 0 is greedy. top_k, then top_p, then min_p cut the
    distribution; see `distribution`. stop_ids end a row and are the last id given; so does the id that completes one of
    stop_strings, for which the tokenizer is needed. generator: a torch.Generator; the same seed gives the same ids,
    with the cache or without. vocab_limit: ids from here on pad the vocabulary and are never drawn, nor those past the
    tokenizer's. Raises ValueError for an empty prompt, ids the model does not have, or a setting out of range.
    """
    prompts, single = id_lists(prompt_ids)
    texts = [Text(tokenizer, stop_strings) for _ in prompts] if stop_strings else None
    if tokenizer is not None:
        vocab_limit = min(vocab_limit or tokenizer.vocab_size, tokenizer.vocab_size)
    new = [[] for _ in prompts]
    with evaluating(model):
        for ids in stream(model, prompts, max_new_tokens, stop_ids=stop_ids, cache=cache, generator=generator,
                          texts=texts, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                          vocab_limit=vocab_limit):
            for row, token in zip(new, ids):
                if token is not None:
                    row.append(token)
    return new[0] if single else new


# --- speculative decoding ---
# A cheap draft proposes k tokens x_i, drawn from its distributions q_i; one pass of the target gives its own
# distributions p_i at all of them and after the last. Algorithm 1 of Leviathan 2022 (2211.17192), in order:
#     keep x_i with probability min(1, p_i(x_i) / q_i(x_i));
#     at the first one not kept, draw from max(0, p_i - q_i), normalised, instead, and stop;
#     with all k kept, draw one more from p_(k+1).
# Every token then has exactly the distribution p, whatever q is; a bad draft costs time and nothing else. An example:
#                                 a     b     c
#     the target's p             .6    .3    .1
#     the draft's q              .3    .6    .1
#     comes out by being kept    .3    .3    .1       q min(1, p / q) = min(p, q), .7 in all
#     in place of a refused b    .3     0     0       the .3 refused draw from max(0, p - q) = (.3, 0, 0), so always a
#     together                   .6    .3    .1       = p
# With .7 kept at every place, k = 4 drafts make 1 + .7 + .7² + .7³ + .7⁴ = 2.8 tokens a pass. Greedy is p = 1 at the
# argmax.

class Reader:
    """One text in front of a model; what the cache holds of it is not read again."""

    def __init__(self, model, size: int):
        self.model, self.memory = model, model.new_cache(1, size)
        if not model.config.mtp_depth:               # a further head drafts from hidden states, which C does not give
            self.memory.in_c = onetoken.prepare(model, size)

    def read(self, text, drafts=()):
        """Logits (1 + drafts, V) after text and after each draft. What the cache held beyond text[:-1] is forgotten."""
        self.first = min(self.memory.length, len(text) - 1)
        self.memory.set_lengths(self.first)
        tokens = torch.tensor([[*text[self.first:], *drafts]], device=self.memory.device)
        if self.memory.in_c is not None and tokens.numel() <= onetoken.MAX_ROWS:
            return read_on(self.model, tokens, self.memory)[0, -1 - len(drafts):]
        self.hidden = self.model.hidden(tokens, self.memory)                    # (1, T, C), positions first …
        return self.model.head(self.hidden[0, -1 - len(drafts):])


def draw_in_turn(text, k: int, how: dict, generator, logits_after):
    """(k ids that follow, the distributions (k, V) they were drawn from). logits_after: of a longer text, (1, V)."""
    longer, q = list(text), []
    for _ in range(k):
        q.append(distribution(logits_after(longer), **how))
        longer.append(torch.multinomial(q[-1], 1, generator=generator).item())
    return longer[len(text):], torch.cat(q)


class ModelDraft:
    """Drafts by a smaller model. A text that outgrows its context goes on from the last half."""

    def __init__(self, model, size: int):
        self.model, self.size, self.start = model, min(size, model.config.context_length), 0
        self.reader = Reader(model, self.size)

    def propose(self, text, k: int, how: dict, generator):
        """(at most k drafts after the text, their distributions (k, V)), as of every drafter here."""
        if len(text) - self.start > self.size:
            self.start = len(text) - max(1, self.size // 2)
            self.reader = Reader(self.model, self.size)
        text = text[self.start:]
        return draw_in_turn(text, min(k, self.size - len(text) + 1), how, generator, self.reader.read)


class HeadDraft:
    """Drafts by the model's own head for a further token, fed with its own output after the first (2412.19437, 2.2)."""

    def __init__(self, reader: Reader, size: int):
        self.reader, self.memory = reader, reader.model.new_cache(1, size, draft=True)

    def propose(self, text, k: int, how: dict, generator):
        """The head reads pairs of a hidden state and the token after it; only the true ones stay in its cache."""
        model, begin = self.reader.model, self.reader.first + 1
        hidden = self.reader.hidden[:, :len(text) - begin]

        def logits_after(longer):
            nonlocal hidden
            tokens = torch.tensor([longer[1 + self.memory.length:]], device=hidden.device)
            hidden = model.mtp[0](hidden, model.token_embeddings(tokens), self.memory)[:, -1:]
            return model.head(hidden[:, 0])
        drafts = draw_in_turn(text, k, how, generator, logits_after)
        self.memory.set_lengths(len(text) - 1)
        return drafts


class LookupDraft:
    """Drafts what followed the last time that the newest three tokens, or two, or one, stood in the text."""

    def __init__(self, model):
        self.model = model

    def propose(self, text, k: int, how: dict, generator):
        """No drafts, and None, where nothing came before."""
        for n in range(min(3, len(text) - 1), 0, -1):
            for i in range(len(text) - n - 1, -1, -1):
                if text[i:i + n] == text[-n:]:
                    longer = list(text)
                    for j in range(i + n, i + n + k):      # past the end it copies itself: a period goes on
                        longer.append(longer[j])
                    drafts = torch.tensor(longer[len(text):], device=next(self.model.parameters()).device)
                    size = min(self.model.config.vocab_size, how.get("vocab_limit") or self.model.config.vocab_size)
                    return drafts.tolist(), torch.nn.functional.one_hot(drafts, size).float()
        return [], None


def check_draft(target, draft) -> None:
    """Raise ValueError for what cannot draft; a Transformer of the same vocabulary, "mtp" (or None) and "ngram" can."""
    if draft in (None, "mtp"):
        if not target.config.mtp_depth:
            raise ValueError("mtp_depth=0: this model has no head to draft with; give a smaller model, or ngram")
    elif draft != "ngram" and not hasattr(draft, "new_cache"):
        raise ValueError(f"draft={draft!r} is none of: a Transformer, mtp (or None), ngram")
    elif draft != "ngram" and draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(f"the draft has a vocabulary of {draft.config.vocab_size}, the target one of "
                         f"{target.config.vocab_size}; give two of one tokenizer")


def accept(p, q, drafts: list[int], generator):
    """(how many drafts stand, the token after them), by the rule above. p: (n + 1, V), q: (n, V)."""
    for i, (token, u) in enumerate(zip(drafts, torch.rand(len(drafts), generator=generator, device=p.device).tolist())):
        if u * q[i, token].item() >= p[i, token].item():
            remainder = (p[i] - q[i]).clamp(min=0)
            # Nothing is left only where p and q differ by rounding alone: then p itself is right.
            remainder = remainder if remainder.sum() > 0 else p[i]
            return i, torch.multinomial(remainder, 1, generator=generator).item()
    return len(drafts), torch.multinomial(p[-1], 1, generator=generator).item()


@torch.inference_mode()
def speculate(target, draft, prompt_ids, max_new_tokens: int, *, k: int = 4, stop_ids=(), generator=None,
              figures: Counter | None = None, text: Text | None = None, **how):
    """Yield the new ids of one prompt in pieces, one piece for each pass of the target; see speculative_generate."""
    check_sampling(**how)
    (ids,), _ = id_lists(prompt_ids)
    check_prompts(target, [ids], max_new_tokens, how.get("vocab_limit"))
    check_draft(target, draft)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} drafts a pass must be a whole number of at least 1")
    figures = Counter() if figures is None else figures
    figures.update(prompts=1)
    end, context = len(ids) + max_new_tokens, target.config.context_length
    start = max(0, len(ids) - context)
    while len(ids) < end:                                  # one window after another, those of `stream`
        size = min(context, end - start)
        reader = Reader(target, size)
        if draft == "ngram":
            drafter = LookupDraft(target)
        else:
            drafter = HeadDraft(reader, size) if draft in (None, "mtp") else ModelDraft(draft, size)
        while len(ids) < end and len(ids) - start <= context:
            window, drafts, q = ids[start:], [], None
            limit = min(k, context - len(window), end - len(ids) - 1)
            if limit > 0 and reader.memory.length:         # a window is first read alone
                drafts, q = drafter.propose(window, limit, how, generator)
            n, token = accept(distribution(reader.read(window, drafts), **how), q, drafts, generator)
            new = drafts[:n] + [token]
            stop = next((i for i, one in enumerate(new) if ends(one, stop_ids, text)), None)
            new = new if stop is None else new[:stop + 1]
            ids += new
            figures.update(new_tokens=len(new), target_calls=1, drafted=len(drafts), accepted=n,
                           rejected=int(n < len(drafts)))
            yield new
            if stop is not None:
                return
        start = len(ids) - max(1, context // 2)


def speculative_generate(target, draft, prompt_ids, max_new_tokens: int, *, k: int = 4, temperature: float = 1.0,
                         generator=None, stop_ids=(), **how):
    """(new ids, figures): ids with exactly the distribution of generate(target, …), greedy the same, in fewer passes.

    draft: a Transformer of the same vocabulary; None or "mtp" for the target's own multi-token head; "ngram" to look
    drafts up in the text. k: drafts a pass. how: top_k, top_p, min_p, vocab_limit, of draft and target alike.
    figures: new_tokens, target_calls, drafted, accepted, rejected, and `rates`. Raises ValueError as `generate` does.
    """
    figures, new = Counter(new_tokens=0, target_calls=0, drafted=0, accepted=0, rejected=0), []
    with evaluating(target, *([draft] if hasattr(draft, "new_cache") else [])):
        for piece in speculate(target, draft, prompt_ids, max_new_tokens, k=k, stop_ids=stop_ids, generator=generator,
                               figures=figures, temperature=temperature, **how):
            new += piece
    return new, dict(figures) | rates(figures)


def rates(figures) -> dict:
    """acceptance_rate, of the drafts up to the first rejected, and tokens_per_target_call, after the prefill."""
    judged, passes = figures["accepted"] + figures["rejected"], figures["target_calls"] - figures["prompts"]
    return {"acceptance_rate": figures["accepted"] / max(1, judged),
            "tokens_per_target_call": (figures["new_tokens"] - figures["prompts"]) / max(1, passes)}
