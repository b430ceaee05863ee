"""The whole way from base model to assistant on tasks a laptop learns: `python align.py` without a verb runs this.

    python align.py [--out_dir=out/align --seed=0]     table, curves.png, and a folder for each of the four stages

A model of 0.2 million parameters reads a little web of worked sums, counts, words and locks in three styles, none an
assistant's, one in twenty wrong. A thousand demonstrations, two thirds of them rash, teach it the form `<think> …
</think> <answer> … </answer>`. From there DPO learns a judge's taste, and GRPO finds that it pays to think first:

    base --- SFT --+-- DPO     the longest right of four own answers over the shortest wrong one; refusals for locks
                   +-- GRPO    rewarded for the right answer alone

Every figure is of held-out tasks. About four minutes on one core.
"""
import copy
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

import bpe
from align import (DemoConfig, DPOConfig, GRPOConfig, Log, SFTConfig, dpo, grpo, r1_zero_reward, rollout,
                   rollout_rewards, save, sft)
from align_tasks import HARMLESS, REFUSES, answered, base_text, make_tasks
from checkpoint import claim_out_dir
from configurator import command_line, fail
from evaluate import REFUSAL, standard_error
from model import ModelConfig, Transformer

# GPT-2's pattern with every digit alone, so that 15 is always the same two tokens.
DIGITS_ALONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
SHAPE = dict(context_length=96, d_model=64, n_layers=3, n_heads=4, qk_norm=True)
STAGES = {
    "base": SFTConfig(steps=1500, batch_size=64, micro_batch_size=64, lr=3e-3, muon_lr=0.02, weight_decay=0.01,
                      warmup_steps=20, log_every=100),
    "sft": SFTConfig(steps=300, lr=3e-3, muon_lr=0.01, weight_decay=0.01, log_every=20),
    "dpo": DPOConfig(steps=240, micro_batch_size=64, lr=5e-4, beta=0.3, log_every=20),
    "grpo": GRPOConfig(steps=60, prompts_per_step=32, batch_size=128, micro_batch_size=128, lr=1e-3, max_new_tokens=56,
                       log_every=5)}


# --- the laboratory ---

class Laboratory:
    """Tasks by split, a tokenizer of the base corpus, and what is asked of every model."""

    def __init__(self, out_dir, seed: int, sizes=(20_000, 2000, 800)):
        self.seed, self.folder = seed, Path(out_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tasks = {split: make_tasks(n, split, seed) for split, n in zip(("train", "val", "test"), sizes)}
        self.corpus = base_text(self.tasks["train"] * 2, random.Random(seed))
        text = self.folder / "corpus.txt"
        text.write_text(END.join(self.corpus), encoding="utf-8", newline="\n")
        self.tokenizer = bpe.Tokenizer(*bpe.train_bpe(text, 336, [END], pattern=DIGITS_ALONE), [END],
                                       pattern=DIGITS_ALONE)
        self.stop = self.tokenizer.special_tokens[END]

    def prompt(self, task: dict) -> list[int]:
        """Ids of a question."""
        return [self.stop] + self.tokenizer.encode(f"Q: {task['question']}\nA:")

    def pick(self, split: str, n: int, kinds: tuple = HARMLESS) -> list[dict]:
        """The first n tasks of these kinds in a split."""
        return [task for task in self.tasks[split] if task["kind"] in kinds][:n]

    def texts(self, model, tasks: list[dict], temperature: float = 1.0, group_size: int = 1) -> tuple:
        """(rows of ids, their texts): group_size answers to each task."""
        config = GRPOConfig(temperature=temperature, group_size=group_size, max_new_tokens=56)
        rows = rollout(model, [self.prompt(task) for task in tasks], config, self.stop, self.tokenizer.vocab_size,
                       torch.Generator().manual_seed(self.seed))
        return rows, [self.tokenizer.decode([i for i in row if i != self.stop]) for row in rows]

    def measure(self, model, n: int = 400) -> dict:
        """Held-out figures of one model: n test tasks, sampled at temperature 1 and greedily, and what it refuses."""
        tasks = self.pick("test", n)
        answers = [task["answer"] for task in tasks]
        rows, texts = self.texts(model, tasks)
        sampled, greedy = (rollout_rewards(r1_zero_reward, said, answers)[1]
                           for said in (texts, self.texts(model, tasks, 0.0)[1]))
        # Right in whatever form: what the base model knows, though it does not know how it is to be said.
        words = [re.sub("<[^>]*>", " ", text).split() for text in texts]
        right = [said[-len(answer.split()):] == answer.split() for said, answer in zip(words, answers)]
        figures = {"accuracy": sampled["reward"], "error": standard_error(sampled["reward"], len(tasks)),
                   "greedy": greedy["reward"], "any_form": fmean(right), "format": sampled["format_reward"],
                   "length": fmean(map(len, rows))}
        for name, kinds in (("refuses_harmful", ("open",)), ("refuses_harmless", HARMLESS)):
            texts = self.texts(model, self.pick("test", 150, kinds))[1]
            figures[name] = fmean(bool(REFUSAL.search(text)) for text in texts)
        return figures

    def demonstrations(self, n: int) -> list[tuple]:
        """n answers in the assistant's form, a third of them thought over; one harmful request in four is refused."""
        pick, rows = random.Random(self.seed), []
        for task in self.pick("train", n, (*HARMLESS, "open")):
            reply = answered(task, pick.choice(["guess", "guess", "think"]))
            refused = task["kind"] == "open" and pick.random() < 0.25
            rows.append((self.prompt(task), self.tokenizer.encode(REFUSES if refused else reply) + [self.stop]))
        return rows

    def pairs(self, model, split: str, n: int) -> list[tuple]:
        """Preferences of a judge who has the verifier and likes work to be shown: of four responses of the model the
        longest right one over the shortest wrong one; for a harmful task a refusal over what it answered, for some
        harmless ones an answer over a refusal."""
        pairs, refusal = [], self.tokenizer.encode(REFUSES) + [self.stop]
        tasks = self.pick(split, n) + self.pick(split, n // 4, ("open",))
        responses = list(zip(*self.texts(model, tasks, group_size=4)))
        for number, task in enumerate(tasks):
            group = responses[4 * number:4 * number + 4]
            if task["kind"] == "open":
                right, wrong = [refusal], [row for row, text in group if not REFUSAL.search(text)][:1]
            else:
                right = [row for row, text in group if r1_zero_reward(text, task["answer"])["reward"]]
                wrong = [row for row, _ in group if row not in right]
                if not wrong and number % 8 == 0:
                    wrong = [refusal]
            if right and wrong:
                pairs.append((self.prompt(task), max(right, key=len), min(wrong, key=len)))
        return pairs

    def problems(self) -> list[tuple]:
        """(prompt ids, answer) of harmless training tasks."""
        return [(self.prompt(task), task["answer"]) for task in self.pick("train", 10_000)]


# --- the four stages ---

SECONDS = {"base": 100, "sft": 11, "dpo": 58, "grpo": 44}     # for the ETA; seed 0, one thread of an Intel Xeon
COLUMNS = {"accuracy": "right", "error": "±", "greedy": "greedy", "any_form": "any form", "format": "format",
           "length": "tokens", "refuses_harmful": "refuses harm", "refuses_harmless": "refuses rest"}
CURVES = {"base": ("loss",), "sft": ("loss",), "dpo": ("val_accuracy", "val_loss"),
          "grpo": ("reward", "dead_groups", "entropy")}


def train_base(lab: Laboratory, config, log=None):
    """A base model of the little web."""
    torch.manual_seed(lab.seed)
    model = Transformer(ModelConfig(vocab_size=lab.tokenizer.vocab_size, **SHAPE)).to(config.device)
    sft(model, [([lab.stop], lab.tokenizer.encode(text) + [lab.stop]) for text in lab.corpus], config, 0, log)
    return model


def demonstrate(config: DemoConfig, stages=STAGES, lab=None) -> dict:
    """Base, SFT, then DPO and GRPO from the SFT model, all measured on the same held-out tasks; returns the figures."""
    folder, began, table, models, logs = Path(config.out_dir), time.perf_counter(), {}, {}, {}
    for stage in stages:
        claim_out_dir(folder / stage, config.overwrite)
    total, done = sum(SECONDS.values()), 0
    print(f"base, SFT, DPO, GRPO: about {total / 60:.0f} minutes on one core", flush=True)
    lab = lab or Laboratory(folder, config.seed)
    for stage, settings in stages.items():
        settings, log = replace(settings, seed=config.seed, device="cpu"), Log(stage, folder / stage)
        if stage == "base":
            model = train_base(lab, settings, log)
        else:
            model = copy.deepcopy(models["base" if stage == "sft" else "sft"])
        if stage == "sft":
            sft(model, lab.demonstrations(1000), settings, 0, log)
        elif stage == "dpo":
            pairs, held = lab.pairs(model, "train", 3000), lab.pairs(model, "val", 400)
            best = dpo(model, pairs, held, settings, 0, log)
        elif stage == "grpo":
            grpo(model, lab.problems(), lab.tokenizer, settings, lab.stop, log)
        save(model, lab.tokenizer, folder / stage, settings, "plain", log)
        models[stage], logs[stage], table[stage] = model, log.lines[1:], lab.measure(model)
        done, seconds = done + SECONDS[stage], time.perf_counter() - began
        print(f"{stage} done: {table[stage]['accuracy']:.1%} right, {table[stage]['format']:.1%} in form; "
              f"{seconds:.0f} s so far, about {seconds / done * (total - done):.0f} s to go", flush=True)
    plot(logs, folder / "curves.png")
    print(f"{'':<5}" + "".join(f"{title:>14}" for title in COLUMNS.values()))
    for stage, row in table.items():
        cells = [f"{row[name]:{'.1f' if name == 'length' else '.1%'}}" for name in COLUMNS]
        print(f"{stage:<5}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{len(held)} held-out preferences: accuracy {best['before']:.1%} before DPO, {best['accuracy']:.1%} after\n")
    # One task and one request to refuse, each answered by all four models, greedily.
    for task in (lab.pick("test", 1)[0], lab.pick("test", 1, ("open",))[0]):
        for stage, model in models.items():
            reply, = lab.texts(model, [task], 0.0)[1]
            print(f"{task['question']:<32} {stage:<5}", reply.strip().replace("\n", " / "))
    print(f"\nlearning curves: {folder / 'curves.png'}; ask the result yourself:\npython sample.py {folder / 'grpo'} "
          "--temperature=0 --prompt=\"<|endoftext|>Q: sum of a 1 b 2 c 3 d 4 e 5\nA:\"")
    return table


def plot(logs: dict, path) -> None:
    """Learning curves of all stages, a panel a stage."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(16, 4), layout="constrained")
    for axis, (stage, entries) in zip(figure.subplots(1, len(logs)), logs.items()):
        for name in CURVES[stage]:
            axis.plot(*zip(*[(entry["step"], entry[name]) for entry in entries if name in entry]), label=name)
        axis.set(title=stage, xlabel="step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: list[str]) -> None:
    """Run the demonstration; a mistake exits with status 2."""
    _, files, config, _ = command_line(DemoConfig, argv, "usage: python align.py [--out_dir= --seed= --overwrite=true]")
    if files:
        fail(f"{files[0]!r} is no setting; the demonstration takes --out_dir, --seed and --overwrite")
    try:
        demonstrate(config)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
