"""How good is a model? Bits per byte of text, multiple choice, free answers.

    python evaluate.py out/shakespeare                     the run's own validation split
    python evaluate.py out/a out/b --data=notes.txt        any text or .bin; several checkpoints in one table
    python evaluate.py mmlu out/a --data=mmlu --shots=5    Hendrycks' folder of dev/ and test/ CSV files (2009.03300)
    python evaluate.py hellaswag | arc out/a --data=FILE.jsonl                   (1905.07830, 1803.05457)
    python evaluate.py gsm8k out/a --data=test.jsonl --shots_data=train.jsonl --shots=4         (2110.14168)
    python evaluate.py instructions out/a                  what a program can check, as in IFEval (2311.07911)
    python evaluate.py alpaca | safety out/a --data=FILE   answers in the form their judges read, and refusals counted

Bits per byte: a token of one tokenizer is not a token of another, so the loss is divided by what is the same for all,
the bytes of the text. 3.0 nats a token of 4 bytes are 3.0 / ln 2 / 4 = 1.08 bits a byte. Windows overlap by half, so
that no token is predicted from next to nothing:

    |-------- window 1 --------|
    |          counts          |-------- window 2 --------|
                  |   read     |   counts     |

A base model is asked for the likelihood of each choice, because it need not know how to answer; an assistant writes,
and a parser reads (answers.py). An option's log-likelihood is divided by its bytes, or the shortest would win. A share
p of n questions has the standard error √(p (1 − p) / n): 100 questions cannot tell 50 % from 55 %. Every answer goes
to OUT_DIR/VERB.jsonl. Judges are left out: who wins an AlpacaEval another model decides, elsewhere.
"""
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import compress
from answers import (LETTERS, REFUSAL, REWARDS, boxed_reward, gold_answer, need, parse_gsm8k, parse_mmlu,  # noqa: F401
                     r1_zero_reward, read_choices, read_jsonl, read_mmlu, read_prompts, read_text, same_answer)
from checkpoint import claim_file, open_tokens, read_checkpoint, read_meta, sha256, write_text
from configurator import command_line, fail
from decoding import check_numbers, evaluating, generate
from machine import Threads, pick_device
from model import bits_per_byte, perplexity_of, token_cross_entropy, token_losses
from sample import CHATS, conversation

# What stands around a prompt, and the token that ends a turn. alpaca: Taori 2023. r1_zero: 2501.12948, table 1.
TEMPLATES = {
    "plain": ("{prompt}", "<|endoftext|>"),
    "qa": ("Question: {prompt}\nAnswer:", "<|endoftext|>"),
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n{prompt}\n\n### Response:\n", "<|endoftext|>"),
    "r1_zero": ("A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
                "Assistant first thinks about the reasoning process in the mind and then provides the User with the "
                "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
                "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer "
                "here </answer>.\nUser: {prompt}\nAssistant: <think>", "<|endoftext|>"), **CHATS}


@dataclass
class OpenConfig:
    """What every verb can be told: how the model is opened and run."""
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation
    quantize: str | None = None          # int8 | int4: what smaller weights cost, see compress.py
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    batch_size: int = 16                 # rows per forward pass

    def __post_init__(self):
        # One check a setting, whichever verb has it; none stands for no limit.
        for name in ("batch_size", "limit", "max_new_tokens", "stride"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if getattr(self, "shots", 0) < 0:
            raise ValueError(f"shots={self.shots} must be at least 0")


@dataclass
class ReadConfig(OpenConfig):
    """What `python evaluate.py OUT_DIR …` can be told."""
    data: str | None = None              # a text (.txt) or token file (.bin); none = val.bin of the run
    stride: int | None = None            # windows move on by so many tokens; none = half a context


@dataclass
class ChooseConfig(OpenConfig):
    """What `hellaswag` and `arc` can be told."""
    data: str | None = None              # the file of questions
    limit: int | None = None             # questions to ask; none = all
    shots: int = 0                       # worked examples before each question
    shots_data: str | None = None        # the file that they come from; never the questions themselves

    def __post_init__(self):
        super().__post_init__()
        same = self.shots_data and self.data and Path(self.shots_data).resolve() == Path(self.data).resolve()
        if bool(self.shots) != bool(self.shots_data) or same:
            raise ValueError(f"shots={self.shots} and shots_data={self.shots_data} go together: examples come from a "
                             "file of their own, such as the training split, never from the questions asked")


@dataclass
class WriteConfig(OpenConfig):
    """What `instructions` can be told, and every other verb whose answers are written, greedily."""
    limit: int | None = None             # questions to ask; none = all (instructions: 60)
    template: str | None = None          # plain qa alpaca r1_zero chat chatml; none = what the run was tuned with
    max_new_tokens: int = 256            # longest answer


@dataclass
class OpenEndedConfig(WriteConfig):
    data: str | None = None              # the file of prompts


@dataclass
class GSM8KConfig(WriteConfig, ChooseConfig):
    pass


@dataclass
class MMLUConfig(WriteConfig):
    data: str | None = None              # the folder that holds dev/ and test/
    shots: int = 0                       # worked examples before each question, from dev/
    by: str = "letter"                   # letter (the likeliest) | generate (write, then parse)

    def __post_init__(self):
        super().__post_init__()
        if self.by not in ("letter", "generate"):
            raise ValueError(f"by={self.by!r} must be letter or generate")
        if self.by == "letter" and (self.template, self.max_new_tokens) != (None, 256):
            raise ValueError("template and max_new_tokens need by=generate, not letter")


# --- loss of a text ---

def perplexity(model, tokens, n_bytes: int | None = None, stride: int | None = None, batch_size: int = 16) -> dict:
    """Loss (nats per token), perplexity, bits_per_byte (None without n_bytes) and tokens of a sequence of ids.

    tokens: (n,) ids. n_bytes: bytes of UTF-8 that all of them stand for. The first token is not predicted; the others
    have at least context_length - stride tokens before them, as far as the text has so many.
    """
    with evaluating(model):
        loss = check_numbers(token_losses(model, tokens, stride, batch_size).double().mean()).item()
    return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": len(tokens),
            "bits_per_byte": bits_per_byte(loss, len(tokens), n_bytes) if n_bytes else None}


def read_tokens(path, tokenizer, tokenizer_sha256: str | None = None):
    """(ids, bytes of text) of a text or of a .bin; the bytes are None where no tokenizer tells them.

    tokenizer_sha256: of the model's tokenizer.json; a .bin whose meta.json names another one is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a text or a token file (.bin)")
    if path.suffix == ".bin":
        made_with = read_meta(path.parent).get("tokenizer_sha256")
        if made_with and tokenizer_sha256 and made_with != tokenizer_sha256:
            raise ValueError(f"{path} was made with another tokenizer than the model's: give the text itself")
        ids = open_tokens(path.parent, path.stem)
        if tokenizer is None:
            return ids, None
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        return ids, sum(int(counts[token]) * len(piece) for token, piece in tokenizer.vocab.items())
    if tokenizer is None:
        raise ValueError(f"{path} is text, and this run has no tokenizer.json to read it with")
    text = read_text(path)
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    if len(ids) < 2:
        raise ValueError(f"{path} has {len(ids)} tokens; a loss needs at least 2")
    return ids, len(text.encode("utf-8"))


# --- prompts ---

def pick_template(tokenizer, wanted: str | None = None, otherwise: str = "plain") -> str:
    """The template asked for, else the chat form whose tokens the tokenizer has, else `otherwise`."""
    for name, mark in (("chatml", "<|im_start|>"), ("chat", "<|user|>")):
        otherwise = name if mark in tokenizer.special_tokens else otherwise
    if wanted is not None and wanted not in TEMPLATES:
        raise ValueError(f"template={wanted!r} must be one of {', '.join(TEMPLATES)}")
    return wanted or otherwise


def end_id(tokenizer, template: str) -> int | None:
    """The id that ends a response under this template; None when the tokenizer has none."""
    ends = (TEMPLATES[template][1], "<|endoftext|>", "<|end_of_text|>", "</s>", "<|end|>")
    return next((tokenizer.special_tokens[end] for end in ends if end in tokenizer.special_tokens), None)


def render(tokenizer, template: str, turns: list[str]) -> list[int]:
    """Ids of user's and assistant's turns in alternation, the user's last, up to where the answer begins.

    Only the template may name control tokens: what people wrote is plain text, even where it reads "<|end|>".
    """
    form, end = TEMPLATES[template]
    ids = tokenizer.encode("<|begin_of_text|>") if "<|begin_of_text|>" in tokenizer.special_tokens else []
    return ids + conversation(tokenizer, form, end if template in CHATS else "\n\n", turns)


def with_shots(model, tokenizer, shots: list[str], question: str) -> str:
    """Worked examples, then the question; the first ones are left out until a quarter of the context is free."""
    for first in range(len(shots)):
        text = "\n\n".join([*shots[first:], question])
        if len(tokenizer.encode(text, allowed_special=set())) <= 3 * model.config.context_length // 4:
            return text
    return question


# --- likelihood ---

def pad_rows(prompts: list[list[int]], responses: list[list[int]], pad_id: int = 0) -> dict:
    """Prompts and responses as one batch: {input_ids, labels, response_mask}, each (B, T-1), padded on the right.

    labels[:, i] follows input_ids[:, i]; the mask marks labels that belong to a response, so never padding.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long)
    starts, ends = (torch.tensor([len(row) for row in side])[:, None] for side in (prompts, rows))
    places = torch.arange(1, width)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": (places >= starts) & (places < ends)}


@torch.inference_mode()
def continuation_log_probs(model, prompts, responses, batch_size: int = 16) -> torch.Tensor:
    """log p(response | prompt) in nats, summed over tokens, (N,). A prompt past the context loses its beginning."""
    context, device = model.config.context_length, next(model.parameters()).device
    prompts = [prompt[max(0, len(prompt) + len(end) - context - 1):] for prompt, end in zip(prompts, responses)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))   # like lengths pad less
    sums = torch.zeros(len(prompts))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            group = order[start:start + batch_size]
            batch = pad_rows([prompts[i] for i in group], [responses[i] for i in group])
            losses = token_cross_entropy(model(batch["input_ids"].to(device)), batch["labels"].to(device)).float().cpu()
            sums[group] = -torch.where(batch["response_mask"], losses, 0.0).sum(dim=1)
    return check_numbers(sums)


def say_cut(lengths: list[int], room: int) -> None:
    n = sum(length > room for length in lengths)
    if n:
        print(f"{n} of {len(lengths)} prompts are longer than the {room} tokens of room and lost their beginning")


def choose(model, tokenizer, items: list[dict], letters: bool, batch_size: int) -> list[dict]:
    """Items {prompt, options, answer} with {scores, chosen, right}: the likeliest letter, or the likeliest option."""
    rows = []                                                     # (item, text of one of its options)
    for item in items:
        options = LETTERS[:len(item["options"])] if letters else item["options"]
        rows += [(item, " " + option.strip()) for option in options]
        item["scores"] = []
    prompts = [tokenizer.encode(item["prompt"], allowed_special=set()) for item, _ in rows]
    responses = [tokenizer.encode(text, allowed_special=set()) for _, text in rows]
    for (item, text), ids in zip(rows, responses):
        if len(ids) > model.config.context_length:
            raise ValueError(f"an option of {len(ids)} tokens passes the context of {model.config.context_length}: "
                             f"{text.strip()!r:.60}, of {item['prompt']!r:.60}")
    sums = continuation_log_probs(model, prompts, responses, batch_size).tolist()
    for (item, text), log_p in zip(rows, sums):
        item["scores"].append(log_p if letters else log_p / len(text.encode("utf-8")))
    for item in items:
        item["chosen"] = LETTERS[item["scores"].index(max(item["scores"]))]
        item["right"] = item["chosen"] == item["answer"]
    say_cut([len(p) + len(r) - 1 for p, r in zip(prompts, responses)], model.config.context_length)
    return items


# --- verbs: each gives a list of answers {…, output or chosen, right} ---

def write_answers(model, tokenizer, template: str, prompts: list[str], config) -> list[str]:
    """A greedy answer to each prompt: what the prompt leaves of the context, max_new_tokens at most.

    Longer ones would push the question out of the window. A prompt that leaves less than max_new_tokens and less than a
    quarter of the context loses its beginning, and the number of such prompts is printed.
    """
    context, stop = model.config.context_length, end_id(tokenizer, template)
    ids = [render(tokenizer, template, [prompt]) for prompt in prompts]
    longest = context - max(1, min(config.max_new_tokens, context // 4))
    say_cut([len(row) for row in ids], longest)
    ids = [row[-longest:] for row in ids]
    texts, order = [""] * len(ids), sorted(range(len(ids)), key=lambda i: len(ids[i]))     # like lengths, like rooms
    for start in range(0, len(order), config.batch_size):
        batch = order[start:start + config.batch_size]
        n_new = min(config.max_new_tokens, context - len(ids[batch[0]]))
        rows = generate(model, [ids[i] for i in batch], n_new, temperature=0, vocab_limit=tokenizer.vocab_size,
                        stop_ids=() if stop is None else (stop,))
        for i, row in zip(batch, rows):
            texts[i] = tokenizer.decode([token for token in row[:context - len(ids[i])] if token != stop])
    return texts


def ask_mmlu(model, tokenizer, template, config) -> list[dict]:
    """MMLU: the options are shown, and the likeliest letter is the answer, or the one that is written."""
    def ask(item):
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, item["options"]))
        return item["question"] + options + "\nAnswer:"

    items = read_mmlu(config.data, "test")[:config.limit]
    examples = read_mmlu(config.data, "dev") if config.shots else []
    for item in items:
        header = f"The following are multiple choice questions (with answers) about {item['subject']}.\n\n"
        shots = [f"{ask(shot)} {shot['answer']}" for shot in examples if shot["subject"] == item["subject"]]
        item["prompt"] = header + with_shots(model, tokenizer, shots[:config.shots], ask(item))
    if config.by != "generate":
        return choose(model, tokenizer, items, True, config.batch_size)
    texts = write_answers(model, tokenizer, template, [item["prompt"] for item in items], config)
    for item, text in zip(items, texts):
        chosen = parse_mmlu(item, text)
        item.update(output=text, chosen=chosen, right=chosen == item["answer"])
    return items


def ask_choices(model, tokenizer, template, config) -> list[dict]:
    """HellaSwag and ARC: the option that is the likeliest, byte for byte, to follow the question."""
    items, shots = read_jsonl(config.data, read_choices)[0][:config.limit], []
    if config.shots:
        shots = [f"{item['question']} {item['options'][LETTERS.index(item['answer'])].strip()}"
                 for item in read_jsonl(config.shots_data, read_choices)[0][:config.shots]]
    for item in items:
        item["prompt"] = with_shots(model, tokenizer, shots, item["question"])
    return choose(model, tokenizer, items, False, config.batch_size)


def ask_gsm8k(model, tokenizer, template, config) -> list[dict]:
    """GSM8K: each question with the number its answer ends in."""
    def pair(record):
        question, answer = map(str, need(record, "question", "answer"))
        if parse_gsm8k(gold_answer(answer) or "") is None:
            raise ValueError(f"no number after #### in the answer {answer[:80]!r}")
        return question, answer

    items = read_jsonl(config.data, pair)[0][:config.limit]
    prompts = [question for question, _ in items]
    if config.shots:
        shots = [f"Question: {q}\nAnswer: {a}" for q, a in read_jsonl(config.shots_data, pair)[0][:config.shots]]
        prompts = [with_shots(model, tokenizer, shots, f"Question: {question}\nAnswer:") for question in prompts]
        template = config.template or "plain"
    # A base model goes on with a next question, whose numbers are not this one's answer.
    texts = [text.split("\nQuestion:")[0] for text in write_answers(model, tokenizer, template, prompts, config)]
    return [{"question": question, "answer": answer, "output": text, "chosen": parse_gsm8k(text),
             "right": same_answer(parse_gsm8k(text), gold_answer(answer))}
            for (question, answer), text in zip(items, texts)]


def instructions(n: int, seed: int = 0) -> list[tuple]:
    """n pairs (instruction, check(answer) -> bool) drawn by seed: exact counts, a keyword, case, no comma."""
    pick, pairs = random.Random(seed), []
    for i in range(n):
        topic, word = pick.choice(["the sea", "a town", "winter", "music"]), pick.choice(["river", "green"])
        count = pick.randint(2, 6)
        pairs.append([
            (f"Write about {topic} in exactly {count} sentences.",
             lambda text, n=count: len(re.findall(r"[.!?](?=\s|$)", text)) == n),
            (f"Write exactly {count} words about {topic}.", lambda text, n=count: len(text.split()) == n),
            (f"Write about {topic} and use the word \"{word}\" exactly {count} times.",
             lambda text, n=count, w=word: len(re.findall(rf"\b{w}\b", text, re.IGNORECASE)) == n),
            (f"Write about {topic} in upper case letters only.", lambda text: text.isupper()),
            (f"Write about {topic} without a comma.", lambda text: bool(text.strip()) and "," not in text)][i % 5])
    return pairs


def ask_instructions(model, tokenizer, template, config) -> list[dict]:
    """Instructions whose following a program can check."""
    pairs = instructions(config.limit or 60)
    texts = write_answers(model, tokenizer, template, [instruction for instruction, _ in pairs], config)
    return [{"instruction": instruction, "output": text, "right": check(text)}
            for (instruction, check), text in zip(pairs, texts)]


def ask_open(model, tokenizer, template, config) -> list[dict]:
    """AlpacaEval's JSON list, SimpleSafetyTests' CSV or any JSONL with `prompt`: answers, and whether they refuse."""
    items, field = read_prompts(config.data)
    items = items[:config.limit]
    texts = write_answers(model, tokenizer, template, [str(item[field]) for item in items], config)
    return [item | {"output": text, "right": bool(REFUSAL.search(text))} for item, text in zip(items, texts)]


# --- the command ---

def standard_error(p: float, n: int) -> float:
    """Of a share p of n questions."""
    return math.sqrt(p * (1 - p) / n)


VERBS = {None: (None, ReadConfig), "mmlu": (ask_mmlu, MMLUConfig), "hellaswag": (ask_choices, ChooseConfig),
         "arc": (ask_choices, ChooseConfig), "gsm8k": (ask_gsm8k, GSM8KConfig), "alpaca": (ask_open, OpenEndedConfig),
         "instructions": (ask_instructions, WriteConfig), "safety": (ask_open, OpenEndedConfig)}


def open_model(out_dir: str, config, threads: Threads) -> tuple:
    """(model, tokenizer, what else the checkpoint holds) of a folder, with weights as small as config.quantize says.
    On a CPU `threads` watches each pass through the blocks: a core may get busy in the middle of the questions."""
    model, tokenizer = compress.load(out_dir, pick_device(config.device), config.checkpoint, config.quantize)
    if model.token_embeddings.weight.device.type == "cpu":
        began = []
        model.layers[0].register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        model.layers[-1].register_forward_hook(lambda *_: threads.watch(time.perf_counter() - began.pop()))
    return model, tokenizer, read_checkpoint(Path(out_dir) / config.checkpoint, map_location="meta")


def ask(verb: str, out_dir: str, config, threads: Threads) -> str:
    """One model's answers to OUT_DIR/VERB.jsonl (alpaca: the judge's VERB.json), and the line that reports them."""
    if verb != "instructions" and config.data is None:
        raise ValueError(f"{verb} needs --data={'FOLDER' if verb == 'mmlu' else 'FILE'}, the questions")
    model, tokenizer, state = open_model(out_dir, config, threads)
    if tokenizer is None:
        raise ValueError(f"{out_dir} has no tokenizer.json to ask questions with")
    template = getattr(config, "template", None) or state.get("template")
    template = pick_template(tokenizer, template, "qa" if verb == "gsm8k" else "plain")
    path, started = claim_file(Path(out_dir) / f"{verb}.jsonl"), time.perf_counter()
    answers = VERBS[verb][0](model, tokenizer, template, config)
    write_text(path, *(json.dumps(answer) + "\n" for answer in answers))
    if verb == "alpaca":
        path = path.with_suffix(".json")
        write_text(path, json.dumps([answer | {"generator": out_dir} for answer in answers], indent=1))
    n, share = len(answers), sum(answer["right"] for answer in answers) / len(answers)
    line = (f"{out_dir}: {verb}, {n} questions, {time.perf_counter() - started:.0f} s | "
            f"{'refused' if verb in ('alpaca', 'safety') else 'right'} {share:.1%} ± {standard_error(share, n):.1%}")
    unreadable = sum(answer.get("chosen", "") is None for answer in answers)
    return f"{line} | unreadable {unreadable} | {path}"


def read(out_dir: str, config: ReadConfig, threads: Threads) -> str:
    """The line that reports one model's loss on a text."""
    model, tokenizer, state = open_model(out_dir, config, threads)
    data_dir = (state.get("train_config") or {}).get("data_dir")
    if config.data is None and data_dir is None:
        raise ValueError(f"{out_dir} does not say what it was trained on; name a text with --data=FILE")
    path = config.data or Path(data_dir) / "val.bin"
    file = Path(out_dir) / "tokenizer.json"
    tokens, n_bytes = read_tokens(path, tokenizer, sha256(file) if file.is_file() else state.get("tokenizer_sha256"))
    started = time.perf_counter()
    figures = perplexity(model, tokens, n_bytes, config.stride, config.batch_size)
    bits = "n/a" if n_bytes is None else f"{figures['bits_per_byte']:.4f}"
    return (f"{path}: {figures['tokens']:,} tokens, {time.perf_counter() - started:.1f} s | "
            f"loss {figures['loss']:.4f} | perplexity {figures['perplexity']:.2f} | bits per byte {bits}")


USAGE = f"usage: python evaluate.py [{' | '.join(filter(None, VERBS))}] OUT_DIR … [--data=FILE] [--key=value …]"


def main(argv: list[str]) -> None:
    """Score the folders of one or several runs, one line each; a mistake exits with status 2."""
    verb, files, config, _ = command_line({name: kind for name, (_, kind) in VERBS.items()}, argv, USAGE)
    if not files:
        fail(f"give the folder of a training run. {USAGE}")
    try:
        for out_dir in files:
            with Threads() as threads:   # fewer where another program keeps a core busy
                line = ask(verb, out_dir, config, threads) if verb else read(out_dir, config, threads)
            print(line if verb or len(files) == 1 else f"{out_dir:<24} {line}")
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
