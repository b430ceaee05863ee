"""The course's smaller experiments, a verb of bench.py each: ten minutes of two cores, all of `align` two hours.

    python bench.py toy                       SGD on one quadratic at learning rates 1 … 1,000
    python bench.py ngrams data/shakespeare   what models reach that only count: is my loss normal?
    python bench.py bpe A.txt B.txt           BPE of each text beside Hugging Face's and tiktoken: time, memory, speed
    python bench.py pages ARCHIVE.warc.gz     all steps of curation beside the extraction alone
    python bench.py align --experiments=…     alignment on the demonstration's tasks, by name

Of `align`: one base model and one SFT model of align_demo.py serve all runs; a run changes one thing and is measured on
the same 400 held-out tasks. Finished runs stand in out/bench_align/results.json and are not run again.

    experiment   what it asks                                              course problem
    prompts      a base model asked in four ways                           math_baseline, prompting_baselines
    sft          fine-tuning on 32 … 1,000 demonstrations                  sft_experiment
    expert       expert iteration over rollouts and epochs                 expert_iteration_experiment
    on_policy    GRPO (also by a constant), Dr. GRPO, RFT, MaxRL …         grpo_experiments_variants_on_policy, …
    off_policy   no ratio, no clip, clip, GSPO, 4 seeds                    grpo_experiments_off_policy, …_clip_ablation
    rates        learning rates                                            grpo_learning_rate
    parts        baseline, deviation, length normalization, group size     grpo_baselines, grpo_length_normalization, …
    epochs       passes over a rollout and rows a step                     grpo_off_policy_sweep
    asked        GRPO under three prompts                                  grpo_prompt_ablation

Our own estimator divides r - p by the root of p, p the group's mean. The sum over prompts of ∇p / √p is the gradient of
2 √p: between Dr. GRPO, which counts all prompts alike (∇p), and MaxRL (∇p / p), whose rare successes count G times.
"""
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import align
import align_demo
import bpe
import clean
import curate
from accounting import table
from align_losses import group_advantages
from bench_step import alternate
from checkpoint import open_tokens, read_meta, write_text
from configurator import command_line, fail
from model import bits_per_byte
from optim import SGD


# --- learning rates on a toy ---

def toy(words: list[str]) -> None:
    """SGD on the mean of squares of 100 weights, learning rate α / √(t + 1): the loss before steps 1 … 10."""
    print(f"{'α':>6}" + "".join(f"{step:>10}" for step in range(1, 11)))
    for rate in (1.0, 10.0, 100.0, 1000.0):
        weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
        optimizer, losses = SGD([weights], lr=rate, momentum=0.0), []
        for step in range(10):
            loss = (weights ** 2).mean()         # a step multiplies every weight by 1 - 2 α / (100 √(t + 1))
            losses.append(loss.item())
            loss.backward()
            optimizer.param_groups[0]["lr"] = rate / (step + 1) ** 0.5
            optimizer.step()
            optimizer.zero_grad()
        print(f"{rate:>6g}" + "".join(f"{loss:>10.3g}" for loss in losses))


# --- what counting reaches ---

def counting_losses(data_dir) -> dict:
    """Loss in nats a token of validation by models that only count the training split: uniform, unigram, bigram."""
    V, (train, val) = read_meta(data_dir)["vocab_size"], (np.array(open_tokens(data_dir, split), dtype=np.int64)
                                                          for split in ("train", "val"))
    unigram = np.bincount(train, minlength=V) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    asked = val[:-1] * V + val[1:]
    place = np.clip(np.searchsorted(pairs, asked), 0, len(pairs) - 1)
    seen = np.where(pairs[place] == asked, counts[place], 0)
    before = np.bincount(train[:-1], minlength=V)[val[:-1]]
    followers = np.bincount(pairs // V, minlength=V)[val[:-1]]          # different tokens seen after the one before
    # Witten and Bell: a new follower comes as often as new ones came so far, and is drawn from the unigram.
    bigram = (seen + followers * unigram[val[1:]]) / np.maximum(before + followers, 1)
    bigram = np.where(before > 0, bigram, unigram[val[1:]])
    return {"uniform": float(np.log(V)), "unigram": float(-np.log(unigram[val[1:]]).mean()),
            "bigram (Witten-Bell)": float(-np.log(bigram).mean())}


def ngrams(words: list[str]) -> None:
    """Bits per byte of the validation split by uniform, unigram, bigram models, counts of the training split."""
    if len(words) != 1:
        sys.exit("usage: python bench.py ngrams DATA_DIR")
    meta, rows = read_meta(words[0]), [["any byte alike", "-", 8.0]]
    for name, loss in counting_losses(words[0]).items():
        rows.append([name, loss, bits_per_byte(loss, meta["val_tokens"], meta["val_bytes"])])
    table(f"{words[0]}: {meta['val_tokens']:,} tokens of validation, vocabulary {meta['vocab_size']:,}",
          ["", "nats a token", "bits per byte"], rows)


# --- tokenizers ---

PILE_BYTES = 825e9                             # 2101.00027


def cpu_seconds(run):
    """(CPU seconds of run() and of the processes it has waited for, what it gives)."""
    def spent() -> float:
        return time.process_time() + os.times().children_user + os.times().children_system
    began = spent()
    result = run()
    return spent() - began, result


@dataclass
class BpeConfig:
    """What `python bench.py bpe FILE…` can be told."""
    vocab_size: str = "32000"            # of each file's tokenizer; with commas between, the last also for the rest


GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
TRAIN = """import json, resource, sys, time, bpe, tokenizers
who, path, vocab_size, out, special = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4], ["<|endoftext|>"]
began, cpu = time.perf_counter(), time.process_time()
if who == "ours":
    bpe.Tokenizer(*bpe.train_bpe(path, vocab_size, special), special).save(out)
else:
    level, rival = tokenizers.pre_tokenizers.ByteLevel, tokenizers.Tokenizer(tokenizers.models.BPE())
    rival.pre_tokenizer = level(add_prefix_space=False)
    rival.train([path], tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special,
                                                       show_progress=False, initial_alphabet=level.alphabet()))
seconds, children = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = time.process_time() - cpu + children.ru_utime + children.ru_stime
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])     # ru_maxrss begins at the parent's
print(json.dumps([seconds, cpu, max(peak, children.ru_maxrss) / 1024]))"""


def bench_bpe(words: list[str]) -> None:
    """BPE trained on each FILE, beside Hugging Face's; then each on 10 MB of each, beside tiktoken with equal ids."""
    import tiktoken
    usage = "usage: python bench.py bpe FILE… [--vocab_size=32000]"
    _, files, config, _ = command_line(BpeConfig, words, usage)
    if not files:
        sys.exit(usage)
    sizes, trained, rows = config.vocab_size.split(","), [], []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_files = {path: f"{folder}/{number}.json" for number, path in enumerate(files)}
        for (path, out), size in zip(tokenizer_files.items(), sizes + sizes[-1:] * len(files)):
            for who in ("ours", "Hugging Face"):
                # A process of its own, so that its peak of memory is training's.
                command = [sys.executable, "-c", TRAIN, who, os.path.abspath(path), size, out]
                output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE,
                                        cwd=Path(__file__).parent).stdout
                trained.append([f"{Path(path).stem}, {size} ids, {who}", *json.loads(output)])
            longest = sorted(bpe.Tokenizer.load(out).vocab.values(), key=len)[:-4:-1]
            print(f"{path}: longest tokens", *(repr(token.decode("utf-8", "replace")) for token in longest))
        table(f"training, {os.cpu_count()} CPUs", ["", "s", "CPU s", "MB a process"], trained)
        for (name, out), path in itertools.product(tokenizer_files.items(), files):
            tokenizer, text = bpe.Tokenizer.load(out), Path(path).read_bytes()[:10_000_000].decode("utf-8", "ignore")
            plain = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
            theirs = tiktoken.Encoding("bench", pat_str=GPT2, mergeable_ranks=plain, special_tokens={})
            runs = alternate({"ours": partial(cpu_seconds, partial(tokenizer.encode, text, set())),
                              "tiktoken": partial(cpu_seconds, partial(theirs.encode_ordinary, text))}, 5)
            ids, size = runs["ours"][0][1], len(text.encode("utf-8"))
            for who, results in runs.items():
                if any(result != ids for _, result in results):
                    raise ValueError(f"ids of {who} differ from our first ones")
                speeds = [size / seconds / 1e6 for seconds, _ in results]
                rows.append([f"{Path(path).stem} by {Path(name).stem}'s, {who}", size / len(ids), speeds[0],
                             statistics.median(speeds), PILE_BYTES / speeds[0] / 3.6e9])
    table("encoding in one process, the same ids; MB per CPU second, the first time and the median of five",
          ["", "bytes/token", "first", "median", "hours for the Pile"], rows)


# --- curation ---

def pages(words: list[str]) -> None:
    """All steps of curation beside the extraction alone, CPU seconds of one core: pages ARCHIVE.warc.gz."""
    if len(words) != 1:
        sys.exit("usage: python bench.py pages ARCHIVE.warc.gz")

    def extraction():
        for _, content, _ in curate.read_archive(words[0], Counter()):
            clean.extract_text(content, main_content=True)
    with tempfile.TemporaryDirectory() as out:
        for name in ("shards", "counts"):
            (Path(out) / name).mkdir()
        everything = partial(curate.curate_file, words[0], out, curate.CurateConfig())
        funnel = everything()["funnel"]
        runs = alternate({"extraction": partial(cpu_seconds, extraction),
                          "everything": partial(cpu_seconds, everything)}, rounds=3)
    alone, whole = (min(seconds for seconds, _ in results) for results in runs.values())
    table(f"{funnel['archive'][0] / whole:.0f} documents per CPU second, {whole / alone:.2f} times the extraction "
          "alone", ["after", "documents", "MB"], [[step, n, size / 1e6] for step, (n, size) in funnel.items()])


# --- alignment: what a run changes ---

def root_mean(rewards, group_size: int, baseline: str, normalizer: str):
    """Advantages (N,) of our own: (r - p) / √p in each group, and the info of `group_advantages`."""
    advantages, info = group_advantages(rewards, group_size, "mean", "none")
    means = rewards.view(-1, group_size).mean(1, keepdim=True)
    return (advantages.view(-1, group_size) / (means + 1e-6).sqrt()).view(-1), info


OFF_POLICY = dict(reweight="grpo", batch_size=32)                    # 8 optimizer steps a rollout of 256 rows, not one
GRPO = {                                                             # experiment -> run -> settings
    "on_policy": {"grpo": {}, "constant": dict(normalize="constant"),
                  "dr_grpo": dict(normalize="constant", normalizer="none"),
                  "rft": dict(baseline="none", normalizer="none"), "maxrl": dict(normalizer="mean"),
                  "root_mean": dict(normalizer="none", estimator=root_mean)},
    "off_policy": {"no ratio": OFF_POLICY | dict(reweight="none"), "no clip": OFF_POLICY | dict(reweight="noclip"),
                   "clip": OFF_POLICY, "gspo": OFF_POLICY | dict(reweight="gspo", clip=0.05)},
    "rates": {f"lr {lr:g}": dict(lr=lr) for lr in (1e-4, 3e-4, 3e-3, 1e-2)},
    "parts": {"no baseline": dict(baseline="none", normalizer="none"), "no deviation": dict(normalizer="none"),
              "by tokens": dict(normalize="token"),
              "groups of 2": dict(group_size=2, prompts_per_step=128),
              "groups of 4": dict(group_size=4, prompts_per_step=64)},
    "epochs": {f"{epochs} x {rows} rows": OFF_POLICY | dict(epochs=epochs, batch_size=rows)
               for epochs, rows in ((1, 64), (1, 128), (2, 64), (2, 256), (4, 256))},
    "asked": {"think opened": dict(asked="Q: {}\nA: <think>"), "question alone": dict(asked="{}\n")}}
ASKED = "Q: {}\nA:"                                                  # the laboratory's own form
# Right, in form, right in whatever form, right when greedy: shares; mean tokens of an answer. Of a GRPO run's last
# rollout: entropy, tokens clipped, groups without any difference.
FIGURES = {"accuracy": "right", "format": "form", "any_form": "any form", "greedy": "greedy", "length": "length",
           "entropy": "entropy", "clip_fraction": "clipped", "dead_groups": "dead"}


def ask(lab, form: str = ASKED) -> None:
    """Ask in this form from now on, in training and in measuring."""
    lab.prompt = lambda task: [lab.stop] + lab.tokenizer.encode(form.format(task["question"]))


def fine_tuned(model, rows: list, steps: int | None = None):
    """A copy of the model after SFT on these rows."""
    model, settings = copy.deepcopy(model), align_demo.STAGES["sft"]
    align.sft(model, rows, replace(settings, steps=steps or settings.steps))
    return model.eval()


# --- the experiments: each yields (name of a run, seed, function that gives its figures) ---

def prompts(lab, base, tuned, seeds: int):
    """The base model, never fine-tuned, asked plainly, with the form opened, and after two examples in either form."""
    forms = {"plain": ASKED, "form opened": ASKED + " <think>"}
    for name, style in (("two answers shown", "direct"), ("two in form shown", "guess")):
        forms[name] = "".join(f"Q: {task['question']}\nA:{align_demo.answered(task, style)}\n"
                              for task in lab.pick("train", 2, ("count",))) + ASKED
    for name, form in forms.items():
        ask(lab, form)
        yield name, 0, lambda: lab.measure(base)


def sft(lab, base, tuned, seeds: int):
    """Fine-tuning on more and more demonstrations, 300 steps each."""
    rows = lab.demonstrations(1000)
    yield "none", 0, lambda: lab.measure(base)
    for n in (32, 64, 128, 256, 512, 1000):
        yield f"{n} shown", 0, lambda: lab.measure(fine_tuned(base, rows[:n]))


def expert(lab, base, tuned, seeds: int):
    """Expert iteration: sample answers, fine-tune on the right ones, again; 3 rounds of 512 questions."""
    def iterate(group_size: int, epochs: int) -> dict:
        model, tasks = tuned, lab.pick("train", 3 * 512)
        for start in (0, 512, 1024):
            asked = [task for task in tasks[start:start + 512] for _ in range(group_size)]
            answers = zip(asked, *lab.texts(model, tasks[start:start + 512], group_size=group_size))
            right = [(lab.prompt(task), row) for task, row, text in answers
                     if align.r1_zero_reward(text, task["answer"])["reward"]]
            steps = max(1, epochs * len(right) // align_demo.STAGES["sft"].batch_size)
            model = fine_tuned(model, right, steps)
        return lab.measure(model)
    for group_size, epochs in ((2, 1), (8, 1), (2, 4), (8, 4)):
        yield f"{group_size} answers, {epochs} epochs", 0, lambda: iterate(group_size, epochs)


def reinforce(experiment: str, lab, base, tuned, seeds: int):
    """The GRPO runs of one experiment, seed after seed so that a short session has one of each first."""
    for seed in range(seeds if "policy" in experiment else 1):       # the others: one, as the course asks
        for name, changes in GRPO[experiment].items():
            settings = dict(reweight="none", batch_size=256) | changes
            ask(lab, settings.pop("asked", ASKED))
            yield name, seed, lambda: grpo_run(lab, copy.deepcopy(tuned), settings, seed, name == "grpo" and seed == 0)


def grpo_run(lab, model, changes: dict, seed: int, talks: bool) -> dict:
    """One GRPO run from the SFT model: its figures; one that talks shows answers on the way."""
    entries, estimator = [], changes.pop("estimator", group_advantages)

    def log(**entry):
        entries.append(entry)
        shown = lab.pick("val", 3)
        for task, row, text in zip(shown, *lab.texts(model, shown)) if talks else ():
            reward = align.r1_zero_reward(text, task["answer"])["reward"]
            print(f"step {entry['step']}, reward {reward:.0f}, {len(row)} tokens, entropy of the rollout "
                  f"{entry['entropy']:.3f} | {task['question']} |{text}")
    settings = replace(align_demo.STAGES["grpo"], seed=seed, log_every=20, **changes)
    align.grpo(model, lab.problems(), lab.tokenizer, settings, lab.stop, log, estimator=estimator)
    return entries[-1] | lab.measure(model)


EXPERIMENTS = {"prompts": prompts, "sft": sft, "expert": expert} | {name: partial(reinforce, name) for name in GRPO}


@dataclass
class AlignBenchConfig:
    """What `python bench.py align` can be told."""
    experiments: str = ",".join(EXPERIMENTS)      # those to run
    seeds: int = 4                                # at most, of each run


def align_bench(argv: list[str]) -> None:
    """Alignment's experiments from one SFT model: prompts, amounts of data, expert iteration, GRPO's variants."""
    config = command_line(AlignBenchConfig, argv, "usage: python bench.py align [--key=value …]")[2]
    names = config.experiments.split(",")
    if not set(names) <= set(EXPERIMENTS):
        fail(f"experiments={config.experiments}: give some of {', '.join(EXPERIMENTS)}, with commas between")
    lab = align_demo.Laboratory("out/bench_align", 0)
    base = align_demo.train_base(lab, align_demo.STAGES["base"]).eval()
    tuned, path = fine_tuned(base, lab.demonstrations(1000)), lab.folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for experiment in names:
        for name, seed, measure in EXPERIMENTS[experiment](lab, base, tuned, config.seeds):
            done = results.setdefault(experiment, {}).setdefault(name, {})
            if str(seed) not in done:                                # JSON's keys are strings
                figures = measure()
                done[str(seed)] = {key: figures[key] for key in FIGURES if key in figures}
                write_text(path, json.dumps(results, indent=1))
                print(f"{experiment}, {name}, seed {seed}: {figures['accuracy']:.1%} right", flush=True)
        ask(lab)
        rows = []
        for name, runs in results[experiment].items():
            columns = {key: [run[key] for run in runs.values() if key in run] for key in FIGURES}
            spread = f"{statistics.stdev(columns['accuracy']):.3f}" if len(runs) > 1 else "-"
            rows.append([name, len(runs), spread, *(f"{statistics.mean(column):.3f}" if column else "-"
                                                    for column in columns.values())])
        table(experiment, ["", "seeds", "spread", *FIGURES.values()], rows)
    draw(results, lab.folder / "experiments.png")


def draw(results: dict, path) -> None:
    """A panel a figure, a row for each run of more than one seed: its mean a bar, every seed a dot."""
    from matplotlib.figure import Figure
    rows = {name: list(seeds.values()) for runs in results.values() for name, seeds in runs.items() if len(seeds) > 1}
    figure = Figure(figsize=(15, 4), layout="constrained")
    keys = ("accuracy", "entropy", "length", "clip_fraction", "dead_groups")
    for axis, key in zip(figure.subplots(1, len(keys), sharey=True), keys):
        for name, seeds in rows.items():
            axis.barh(name, statistics.mean(run[key] for run in seeds), color="lightgrey")
            axis.plot([run[key] for run in seeds], [name] * len(seeds), "o", ms=4)
        axis.set(title=FIGURES[key])
        axis.margins(x=0.05)
    axis.invert_yaxis()
    figure.suptitle("python bench.py align: runs of several seeds, each seed a dot", fontsize=9)
    figure.savefig(path, dpi=80)
