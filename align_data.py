"""Lines of published data sets as ids to learn from: dialogues of people, preferences, problems with an answer.

    {"prompt": "2+2?", "response": "4"}                               also instruction (+ input), question, problem,
                                                                      with output, answer, solution
    {"messages": [{"role": "user", "content": "2+2?"}, …]}            a dialogue that ends in an answer
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}                preferences
    {"chosen": "\\n\\nHuman: 2+2?\\n\\nAssistant: 4", "rejected": …}      HH's dialogues (2204.05862)
    {"question": "2+2?", "answer": "two and two #### 4"}              problems: GSM8K's form, or the last \\boxed{4}

Packing against padding. Documents a, b, c of 3, 5 and 2 tokens in rows of 5:

    packed   a a a b b | b b b c c       nothing is wasted; b is cut, and attention crosses from a to b
    padded   a a a . . | b b b b b | c c . . .      each document whole and alone; dots cost time, so sort by length

`PackedSFT` is the course's packed data set; the loops of align.py pad, with rows of like length together (`bucketed`).
"""
import random
import re

import torch

from answers import gold_answer, need, read_jsonl, same_answer
from evaluate import TEMPLATES, end_id, pad_rows, render


# --- the course's packed data set ---

class PackedSFT(torch.utils.data.Dataset):
    """Alpaca documents of a JSONL file (prompt, response) end to end, cut into chunks: {input_ids, labels}.

    Each document is the tokenizer's own encoding, with the BOS it may add, and its end of text. Labels are one place
    on, prompts count as well, and what does not fill a chunk of context_length ids is left out. shuffle: the documents.
    """

    def __init__(self, tokenizer, path, context_length: int, shuffle: bool, seed: int = 0):
        documents = read_jsonl(path, lambda record: need(record, "prompt", "response"))[0]
        if shuffle:
            random.Random(seed).shuffle(documents)
        hugging_face, ids = hasattr(tokenizer, "eos_token_id"), []
        end = tokenizer.eos_token_id if hugging_face else end_id(tokenizer, "alpaca")
        if end is None:
            raise ValueError("this tokenizer has no token that ends a text, such as <|endoftext|>")
        for prompt, response in documents:
            document = list(tokenizer.encode(TEMPLATES["alpaca"][0].replace("{prompt}", prompt) + response))
            ids += document if document[-1] == end else document + [end]
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


# --- dialogues ---

def read_messages(messages) -> list[tuple[str, str]]:
    """[(role, text)] of a list of {role, content}."""
    turns = [(message["role"], message["content"]) for message in messages]
    for role, text in turns:
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise ValueError(f"a message has a role, system, user or assistant, and a text, not {role!r}: {text!r:.80}")
    return turns


def read_hh(text: str) -> list[tuple[str, str]]:
    """[(role, text)] of HH's form. A turn begins after an empty line only: people write "Human:" inside a message."""
    parts = re.split(r"\n\n(Human|Assistant): ", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[name], words.strip()) for name, words in zip(parts[1::2], parts[2::2])]


def split_dialogue(turns: list[tuple[str, str]]) -> tuple[list[str], str]:
    """(turns up to the last user's, the answer); a system message becomes the beginning of the first user's turn."""
    if len(turns) > 1 and turns[0][0] == "system":
        turns = [(turns[1][0], turns[0][1] + "\n\n" + turns[1][1]), *turns[2:]]
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"roles {roles} do not alternate from user to assistant")
    return texts[:-1], texts[-1]


def first_of(record: dict, *names) -> str:
    # When it has none, the first is left for `need` to miss.
    return next((name for name in names if name in record), names[0])


def read_pair(record: dict) -> tuple[list[str], object]:
    """(turns up to the last user's, response) of a line in any of the layouts above."""
    if "messages" in record:
        return split_dialogue(read_messages(record["messages"]))
    response, = need(record, first_of(record, "response", "output", "answer", "solution"))
    return read_prompt(record), response


def read_prompt(record: dict) -> list[str]:
    """The one turn of a record's prompt."""
    prompt, = need(record, first_of(record, "prompt", "instruction", "question", "problem"))
    parts = [prompt] + ([record["input"]] if record.get("input") else [])
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"a prompt that is no text: {parts!r:.80}")
    return ["\n\n".join(parts)]


def read_preference(record: dict) -> tuple[list[str], str, str]:
    """(turns up to the last user's, chosen, rejected) of a line in any of the layouts above."""
    chosen, rejected = need(record, "chosen", "rejected")
    if "prompt" in record:
        return read_prompt(record), chosen, rejected
    (prompt, chosen), (other_prompt, rejected) = (split_dialogue(read_hh(side)) for side in (chosen, rejected))
    if prompt != other_prompt:
        raise ValueError("chosen and rejected answer different prompts")
    return prompt, chosen, rejected


def read_truth(record: dict) -> tuple[list[str], str | None]:
    """(turns, answer) of a problem: a solution's gold_answer, or the answer as it stands; None: unreadable."""
    turns, response = read_pair(record)
    answer = gold_answer(str(response))
    if answer is None and "solution" != first_of(record, "answer", "response", "output", "solution"):
        answer = str(response).split("####")[-1].strip()
    return turns, answer if same_answer(answer, answer) else None


# --- lines to ids ---

def make_reader(verb: str, tokenizer, template: str, context: int, max_new_tokens: int = 0):
    """A function from a record to (prompt ids, response ids), (prompt, chosen, rejected) or (prompt, truth).

    It raises ValueError for what cannot be used; a gold answer that cannot be read gives None: none could be right.
    """
    def response_ids(text):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an empty response, or none that is text: {text!r:.80}")
        lead = " " if template in ("qa", "r1_zero") else ""          # the template ends in a word
        return tokenizer.encode(lead + text, allowed_special=set()) + [end_id(tokenizer, template)]

    def read(record):
        """The row of one line of the file."""
        if verb == "sft":
            turns, *texts = read_pair(record)
        elif verb == "dpo":
            turns, *texts = read_preference(record)
            if texts[0] == texts[1]:
                raise ValueError("chosen and rejected are equal")
        else:
            (turns, truth), texts = read_truth(record), []
        responses = [response_ids(text) for text in texts]
        ids, room = render(tokenizer, template, turns), max(map(len, responses), default=max_new_tokens)
        if len(ids) + room > context:
            raise ValueError(f"{len(ids)} tokens of prompt and {room} of response pass the context of {context}")
        if verb == "grpo":
            return None if truth is None else (ids, truth)
        return ids, *responses
    return read


def read_rows(verb: str, config, tokenizer, template: str, context: int) -> tuple[list, list]:
    """(rows, held out rows) of config.data in an order drawn by the seed; what was left out is printed."""
    reader = make_reader(verb, tokenizer, template, context, getattr(config, "max_new_tokens", 0))
    rows, complaints = read_jsonl(config.data, reader, config.skip_bad)
    unread, rows = sum(row is None for row in rows), [row for row in rows if row is not None]
    print(f"{config.data}: {len(rows)} usable lines, {len(complaints)} bad ones skipped, {unread} without a readable "
          f"gold answer skipped; template {template}", *complaints[:5], sep="\n  ")
    n_held = 0 if verb == "grpo" else max(1, round(len(rows) * config.val_fraction))
    if len(rows) <= n_held:
        raise ValueError(f"{config.data}: {len(rows)} usable lines are too few with {n_held} held out")
    random.Random(config.seed).shuffle(rows)
    return rows[n_held:], rows[:n_held]


# --- rows to batches ---

def bucketed(lengths: list[int], batch_size: int, generator):
    """Endless batches of indices, rows of like length together: an epoch is shuffled, cut into pools of 16 batches,
    each pool sorted, and its batches shuffled."""
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lengths.__getitem__)
            batches = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]


def padded(rows: list[tuple], config, pad_id: int) -> dict:
    """(prompt ids, response ids) of rows as one batch on the device."""
    batch = pad_rows([row[0] for row in rows], [row[1] for row in rows], pad_id)
    return {name: tensor.to(config.device) for name, tensor in batch.items()}
