"""Write with a trained model: prefill the prompt once, then decode one token at a time against the cache.

    python sample.py out/shakespeare --prompt="ROMEO" --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py out/shakespeare --num_samples=3 --seed=7
    python sample.py out/shakespeare --interactive=true

The prompt goes through the model in one pass (prefill: many tokens, bound by arithmetic); every token after it is a
pass of its own (decode: all weights read for one token, bound by memory bandwidth). The two are timed apart. The
folder alone is enough: ckpt.pt and the tokenizer.json beside it.

Top-k: Fan 2018 (1805.04833). Top-p (nucleus): Holtzman 2019 (1904.09751).
"""
import codecs
import sys
import time
from dataclasses import dataclass

import torch

from checkpoint import load_model
from configurator import command_line, fail

END_OF_TEXT = "<|endoftext|>"


@dataclass
class SampleConfig:
    """What `python sample.py OUT_DIR` can be told."""
    prompt: str = ""                     # text to go on from; empty = the beginning of a document
    max_new_tokens: int = 200            # tokens to write at most; the end of the document ends earlier
    temperature: float = 0.8             # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int | None = None             # sample from the k likeliest tokens only
    top_p: float | None = None           # sample from the fewest tokens whose probabilities sum to p
    num_samples: int = 1                 # continuations of the one prompt
    seed: int | None = None              # none = another text every time
    cache: bool = True                   # false = run the whole text through the model for every token
    interactive: bool = False            # ask for prompts until an empty line
    device: str = "cpu"                  # cpu, cuda, mps
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


# --- picking one token ---

def distribution(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Probabilities (B, V) that the next token is drawn from: temperature, then top-k, then top-p.

    top_p keeps the fewest tokens whose sum reaches p, at least one. Ties at the k-th place are all kept.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is needed while those before it do not reach p yet; so the first one always is.
        needed = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered * needed)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def pick(logits, temperature, top_k, top_p, generator):
    """One id per row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(distribution(logits, temperature, top_k, top_p), 1, generator=generator).squeeze(-1)


def check_sampling(model, rows, max_new_tokens, temperature, top_k, top_p) -> None:
    """Raise ValueError for anything that cannot be sampled, before anything is computed."""
    if temperature < 0 or temperature != temperature:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to sample from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; leave it out to sample from all tokens")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(
                f"prompt {number} is empty; a model needs one token to go on from, for example {END_OF_TEXT}")
        if not 0 <= min(row) <= max(row) < model.config.vocab_size:
            raise ValueError(
                f"prompt {number} holds an id outside 0 … {model.config.vocab_size - 1}; "
                "the tokenizer is not this model's")


# --- generation ---

@torch.inference_mode()
def stream(model, prompts, max_new_tokens: int, *, temperature=1.0, top_k=None, top_p=None, stop_ids=(), cache=True,
           generator=None, vocab_limit=None, n_each: int = 1, timing: dict | None = None):
    """Yield, token by token, a list with the new id of every row, None for a row that has ended.

    prompts: lists of ids, of any lengths. n_each: rows per prompt, which share its prefill. vocab_limit: ids from here
    on are padding of the vocabulary and never drawn. timing: gets prefill_s, prefill_tokens, decode_s, decode_tokens.

    A text that outgrows the context goes on from its last half context, read anew, with or without the cache; so both
    see the same window at every token, and the cost of reading is spread over half a context of new tokens.
    """
    check_sampling(model, prompts, max_new_tokens, temperature, top_k, top_p)
    context, device = model.config.context_length, next(model.parameters()).device
    timing = {} if timing is None else timing
    timing.update(prefill_s=0.0, prefill_tokens=0, decode_s=0.0, decode_tokens=0)
    rows = [list(prompt) for prompt in prompts]
    starts = [max(0, len(row) - context) for row in rows]           # each row's window begins here
    alive, memory, stop_ids = None, None, set(stop_ids)
    for _ in range(max_new_tokens):
        began = time.perf_counter()
        for i in alive if alive is not None else ():
            if len(rows[i]) - starts[i] > context:
                starts[i], memory = len(rows[i]) - max(1, context // 2), None
        phase = "decode"
        if alive is None:  # the prompts, once each, however many rows they give
            phase = "prefill"
            logits, memory = prefill(model, [row[start:] for row, start in zip(rows, starts)], cache)
            source = [i for i in range(len(prompts)) for _ in range(n_each)]
            rows, starts = [list(rows[i]) for i in source], [starts[i] for i in source]
            alive, logits = list(range(len(rows))), logits[source]
            if memory is not None and n_each > 1:
                memory.select(source)
        elif memory is None:
            logits, memory = prefill(model, [rows[i][starts[i]:] for i in alive], cache)
        else:
            last = torch.tensor([[rows[i][-1]] for i in alive], device=device)
            logits = model(last, cache=memory)[:, -1]
        if vocab_limit is not None and vocab_limit < logits.shape[-1]:
            logits = logits[:, :vocab_limit]
        ids = pick(logits, temperature, top_k, top_p, generator).tolist()
        timing[f"{phase}_s"] += time.perf_counter() - began
        timing[f"{phase}_tokens"] += sum(map(len, prompts)) if phase == "prefill" else len(ids)
        given = [None] * len(rows)
        for i, token in zip(alive, ids):
            rows[i].append(token)
            given[i] = token
        yield given
        left = [n for n, token in enumerate(ids) if token not in stop_ids]
        if len(left) < len(alive):
            alive = [alive[n] for n in left]
            if not alive:
                return
            if memory is not None:
                memory.select(left)


def prefill(model, windows: list[list[int]], cache: bool):
    """Read windows of ids in one pass: (logits of each one's last token (B, V), a cache that holds them or None)."""
    lengths, device = [len(window) for window in windows], next(model.parameters()).device
    # Padding stands on the right, where a causal model cannot see it from the left; the cache then forgets it.
    tokens = torch.tensor([window + [0] * (max(lengths) - len(window)) for window in windows], device=device)
    memory = model.new_cache(len(windows)) if cache else None
    logits = model(tokens, cache=memory)
    if memory is not None:
        memory.set_lengths(lengths)
    return logits[torch.arange(len(windows)), torch.tensor(lengths) - 1], memory


def generate(model, prompt_ids, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, stop_ids=(), cache: bool = True, generator=None,
             vocab_limit: int | None = None):
    """The new ids after a prompt (a list of int), or a list of them for a list of prompts of any lengths.

    temperature: 0 is greedy. top_k, then top_p cut the distribution. stop_ids end a row and are the last id given.
    generator: a torch.Generator; the same seed gives the same ids, with the cache or without.
    Raises ValueError for an empty prompt, ids the model does not have, or a setting out of range.
    """
    single = len(prompt_ids) == 0 or not isinstance(prompt_ids[0], (list, tuple))
    prompts = [list(map(int, prompt)) for prompt in ([prompt_ids] if single else prompt_ids)]
    new = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for ids in stream(model, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                          stop_ids=stop_ids, cache=cache, generator=generator, vocab_limit=vocab_limit):
            for row, token in zip(new, ids):
                if token is not None:
                    row.append(token)
    finally:
        model.train(was_training)
    return new[0] if single else new


# --- command line ---

def write(model, tokenizer, prompt: str, config: SampleConfig, generator) -> dict:
    """Print continuations of one prompt: a single one as it is made, several one after another; returns the timing."""
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    if not prompt and end is None:
        raise ValueError(f"this tokenizer has no {END_OF_TEXT} to start a text from; give a --prompt")
    ids = tokenizer.encode(prompt) if prompt else [end]
    timing, rows = {}, [[] for _ in range(config.num_samples)]
    # Bytes of one character may come in two tokens: the decoder holds the first half back.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    live = config.num_samples == 1
    if live:
        print(prompt, end="", flush=True)
    for given in stream(model, [ids], config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                        top_p=config.top_p, stop_ids=() if end is None else (end,), cache=config.cache,
                        generator=generator, vocab_limit=tokenizer.vocab_size, n_each=config.num_samples,
                        timing=timing):
        for row, token in zip(rows, given):
            if token is not None and token != end:
                row.append(token)
                if live:
                    print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    if live:
        print(decoder.decode(b"", final=True))
    for number, row in enumerate(rows if not live else []):
        print(f"--- sample {number + 1} ---\n{prompt}{tokenizer.decode(row)}")
    return timing


def print_timing(timing: dict) -> None:
    rates = []
    for phase in ("prefill", "decode"):
        n, seconds = timing[f"{phase}_tokens"], max(timing[f"{phase}_s"], 1e-9)
        rates.append(f"{phase} {n} tokens, {n / seconds:,.0f} tok/s")
    print("--- " + "; ".join(rates) + " ---")


USAGE = "usage: python sample.py OUT_DIR [--prompt=TEXT] [--key=value …]"


def main(argv: list[str]) -> None:
    """Load the folder of a run and write; a mistake exits with status 2."""
    _, files, config, _ = command_line(SampleConfig, argv, USAGE)
    if len(files) != 1:
        fail(f"give one folder of a training run. {USAGE}")
    try:
        if config.num_samples < 1:
            raise ValueError(f"num_samples={config.num_samples} must be at least 1")
        model, tokenizer = load_model(files[0], config.device, config.checkpoint)
        if tokenizer is None:
            raise ValueError(f"{files[0]} has no tokenizer.json: its ids cannot be turned into text")
        generator = None
        if config.seed is not None:
            generator = torch.Generator(config.device).manual_seed(config.seed)
        if not config.interactive:
            return print_timing(write(model, tokenizer, config.prompt, config, generator))
        while prompt := input("prompt> "):
            print_timing(write(model, tokenizer, prompt, config, generator))
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
