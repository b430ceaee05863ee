"""Write with a trained model, chat with it, or see what it expected; how ids come out is decoding.py.

    python sample.py out/shakespeare --prompt="ROMEO" --max_new_tokens=200 --temperature=0.8 --top_k=50
    python sample.py out/shakespeare --interactive=true --quantize=int8
    python sample.py out/NAME --draft=out/SMALL                    or --draft=mtp, --draft=ngram
    python sample.py out/TUNED --chat=true                         after align.py
    python sample.py explain out/shakespeare --prompt="ROMEO:"     what the model expected at every token

The folder of a run alone is enough: ckpt.pt and the tokenizer.json beside it.
"""
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch

import compress
from configurator import command_line, fail
from decoding import (Text, check_draft, check_numbers, distribution, generate, rates, speculate,
                      speculative_generate, stream)  # noqa: F401
from machine import DTYPES, Threads, pick_device, pick_dtype

END_OF_TEXT = "<|endoftext|>"


@dataclass
class ExplainConfig:
    """What `python sample.py explain OUT_DIR` can be told."""
    prompt: str = ""                     # text to go on from; empty = the beginning of a document
    max_new_tokens: int = 20             # tokens to write at most; the end of the document ends earlier
    quantize: str | None = None          # int8 | int4: smaller weights
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    dtype: str | None = None             # float32, bfloat16, float16; none = the fastest on a GPU, as stored elsewhere
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation


@dataclass
class SampleConfig(ExplainConfig):
    """What `python sample.py OUT_DIR` can be told."""
    max_new_tokens: int = 200            # tokens to write at most; the end of the document ends earlier
    temperature: float = 0.8             # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int | None = None             # sample from the k likeliest tokens only
    top_p: float | None = None           # sample from the fewest tokens whose probabilities sum to p
    min_p: float | None = None           # sample from tokens of at least this share of the likeliest one's probability
    num_samples: int = 1                 # continuations of the one prompt
    seed: int | None = None              # none = another text every time
    interactive: bool = False            # ask for prompts until an empty line
    chat: bool = False                   # a conversation with a model that align.py tuned for it
    draft: str | None = None             # speculative decoding: folder of a smaller model | mtp (own head) | ngram
    k: int = 4                           # drafts for each pass of the model


# --- explaining ---

# 256-colour backgrounds from green to red, one step for each factor of ten of probability.
COLORS = (157, 191, 228, 222, 216, 210)


@torch.inference_mode()
def explain(folder: str, config: ExplainConfig) -> None:
    """Show for each token of a text its probability, rank, entropy and the five likeliest."""
    model, tokenizer = load(folder, config)
    ids, _ = begin(tokenizer, config.prompt)         # the same ids that a continuation of the prompt starts from
    n = len(ids) + config.max_new_tokens
    if not 2 <= n <= model.config.context_length:
        raise ValueError(f"prompt and max_new_tokens={config.max_new_tokens} make {n} tokens; explain needs 2 to "
                         f"{model.config.context_length}, the context")
    ids += generate(model, ids, config.max_new_tokens, temperature=0, vocab_limit=tokenizer.vocab_size)
    device = next(model.parameters()).device
    log_p = check_numbers(torch.log_softmax(model(torch.tensor([ids[:-1]], device=device))[0].float(), dim=-1))
    colored = ""
    for row, token in zip(log_p, ids[1:]):
        p, rank = row[token].exp().item(), int((row > row[token]).sum()) + 1
        entropy, text = torch.special.entr(row.exp()).sum().item() / math.log(2), show(tokenizer, token)
        level = min(len(COLORS) - 1, int(-math.log10(max(p, 1e-5))))
        colored += f"\x1b[30;48;5;{COLORS[level]}m{text}\x1b[0m"
        print(f"{text:<16} p {p:.2%}, rank {rank}, entropy {entropy:.2f} bits; likeliest: "
              f"{likeliest(tokenizer, row.exp())}")
    if sys.stdout.isatty():
        print(colored)
    print("the last distribution at temperature 1, at 0.5, and cut at top_k=3 and at top_p=0.5:")
    for how in (dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.5)):
        print(" ", likeliest(tokenizer, distribution(log_p[-1:], **how)[0]))


def likeliest(tokenizer, probabilities) -> str:
    """The five likeliest tokens of a distribution (V,), those without a chance left out."""
    top = probabilities.topk(min(5, len(probabilities)))
    pairs = zip(top.values.tolist(), top.indices.tolist())
    return ", ".join(f"{show(tokenizer, token)} {p:.1%}" for p, token in pairs if p > 0)


def show(tokenizer, token: int) -> str:
    """A token as text on one line: part of a character as U+FFFD, no control characters."""
    if token not in tokenizer.vocab:
        return f"[{token}]"                  # a row that pads the vocabulary
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
    for form, end in CHATS.values():
        if set(re.findall(r"<\|.*?\|>", form)) <= set(known):
            return conversation(tokenizer, form, end, turns), known[end]
    raise ValueError("chat=true needs a tokenizer with <|user|>, <|assistant|> and <|end|>, or ChatML's tokens; "
                     "tune the model for conversations first: python align.py sft")


def begin(tokenizer, prompt: str):
    """(ids to go on from, the id that ends a document or None)."""
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    if not prompt and end is None:
        raise ValueError(f"this tokenizer has no {END_OF_TEXT} to start a text from; give a --prompt")
    return (tokenizer.encode(prompt) if prompt else [end]), end


def load(folder: str, config):
    """(model, tokenizer) of a folder on the device and in the dtype that config says, as small as it says."""
    device = pick_device(config.device)
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} must be one of {', '.join(DTYPES)}")
    # On a CPU bfloat16 makes large models faster and small ones slower (1.3 times at 35M, 0.7 times at 1M parameters).
    dtype = pick_dtype(config.dtype, device) if device.startswith("cuda") else config.dtype
    model, tokenizer = compress.load(folder, device, config.checkpoint, config.quantize, DTYPES.get(dtype))
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json: its ids cannot be turned into text")
    return model, tokenizer


def load_draft(name: str, tokenizer, config):
    """What --draft names: mtp, ngram, or the folder of a smaller model with the same tokenizer."""
    if name in ("mtp", "ngram"):
        return name
    draft, its_tokenizer = load(name, config)
    if its_tokenizer.vocab != tokenizer.vocab:
        raise ValueError(f"draft={name} was trained with another tokenizer; both must read the same ids")
    return draft


class Writer:
    """A loaded model, with what the command line says of writing."""

    def __init__(self, folder: str, config: SampleConfig):
        self.config = config
        self.model, self.tokenizer = load(folder, config)
        self.draft = load_draft(config.draft, self.tokenizer, config) if config.draft else None
        if self.draft is not None:
            check_draft(self.model, self.draft)
        device = next(self.model.parameters()).device
        self.generator = None if config.seed is None else torch.Generator(device).manual_seed(config.seed)

    def passes(self, ids, end, texts, figures):
        """Let the texts, one or several that follow the same ids, grow; yields after each pass of the model."""
        c = self.config
        how = dict(temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p, generator=self.generator,
                   vocab_limit=self.tokenizer.vocab_size, stop_ids=() if end is None else (end,))
        if self.draft is None:
            for new in stream(self.model, [ids], c.max_new_tokens, n_each=len(texts), texts=texts, **how):
                figures.update(new_tokens=sum(token is not None for token in new))
                yield
            return
        for text in texts:
            for _ in speculate(self.model, self.draft, ids, c.max_new_tokens, k=c.k, figures=figures, text=text, **how):
                yield

    def write(self, before: str, ids, end) -> str:
        """Print what follows ids, after `before`: one text as it is made, several when done; returns the last."""
        n, figures, shown, times = self.config.num_samples, Counter(), 0, [time.perf_counter()]
        texts = [Text(self.tokenizer) for _ in range(n)]
        if n == 1:
            print(before, end="", flush=True)
        with Threads() as threads:
            for _ in self.passes(ids, end, texts, figures):
                times.append(time.perf_counter())
                if n == 1:
                    print(texts[0].text[shown:], end="", flush=True)
                    shown = len(texts[0].text)
                if len(times) > 3:               # between two passes of decoding
                    threads.watch(times[-1] - times[-2])
        for number, text in enumerate(texts, start=1):
            text.feed(None)
            print(text.text[shown:] if n == 1 else f"--- sample {number} ---\n{before}{text.text}")
        if len(times) > 1:                   # the first pass reads the prompt and gives the first token of each text
            written, read_s, written_s = max(0, figures["new_tokens"] - n), times[1] - times[0], times[-1] - times[1]
            line = (f"prefill {len(ids)} tokens, {len(ids) / read_s:,.0f} tok/s; "
                    f"decode {written} tokens, {written / max(written_s, 1e-9):,.0f} tok/s")
            if self.draft is not None:
                line += "; {acceptance_rate:.0%} of drafts accepted, {tokens_per_target_call:.2f} tokens a pass".format(
                    **rates(figures))
            print(f"--- {line} ---")
        return texts[-1].text


def sample(folder: str, config: SampleConfig) -> None:
    """Load the folder of a run and write."""
    if config.num_samples < 1:
        raise ValueError(f"num_samples={config.num_samples} must be at least 1")
    if config.seed is not None and abs(config.seed) >= 2 ** 63:
        raise ValueError(f"seed={config.seed} must fit 64 bits")
    writer = Writer(folder, config)
    if config.chat:
        chat_ids(writer.tokenizer, [""])     # refuses a model that is not for it, before anything is typed
    asking, turns, prompt = config.chat or config.interactive, [], config.prompt
    while True:
        if asking and not prompt:
            prompt = input("you> " if config.chat else "prompt> ").rstrip("\r")         # of a file from Windows
            if not prompt:
                return
        if config.chat:
            turns.append(prompt)
            turns.append(writer.write("", *chat_ids(writer.tokenizer, turns)))
        else:
            writer.write(prompt, *begin(writer.tokenizer, prompt))
        if not asking:
            return
        prompt = ""


USAGE = """usage: python sample.py OUT_DIR [--prompt=TEXT] [--key=value …]
       python sample.py explain OUT_DIR --prompt=TEXT [--key=value …]"""


def main(argv: list[str]) -> None:
    """Do what the command line says; a mistake exits with status 2."""
    verb, files, config, _ = command_line({None: SampleConfig, "explain": ExplainConfig}, argv, USAGE)
    if len(files) != 1:
        fail(f"give one folder of a training run. {USAGE}")
    try:
        (explain if verb else sample)(files[0], config)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
