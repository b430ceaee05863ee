"""The course's alignment experiments on the demonstration's tasks: `python bench.py align [--experiments=… --seeds=…]`.

One base model and one SFT model of align_demo.py serve all runs; a run changes one thing and is measured on the same
400 held-out tasks. Finished runs stand in OUT/results.json and are not run again, so the command can be interrupted.

    experiment   what it asks                                              course problem
    prompts      a base model asked in four ways                           math_baseline, prompting_baselines
    sft          fine-tuning on 32 … 1,000 demonstrations                  sft_experiment
    expert       expert iteration over rollouts and epochs                 expert_iteration_experiment
    on_policy    GRPO, Dr. GRPO, RFT, MaxRL, our own, 4 seeds              grpo_experiments_variants_on_policy, …
    off_policy   no ratio, no clip, clip, GSPO, 4 seeds                    grpo_experiments_off_policy, …_clip_ablation
    rates        learning rates                                            grpo_learning_rate
    parts        baseline, deviation, length normalization, group size     grpo_baselines, grpo_length_normalization, …
    epochs       passes over a rollout and rows a step                     grpo_off_policy_sweep
    asked        GRPO under three prompts                                  grpo_prompt_ablation

Our own estimator divides r - p by the root of p, p the group's mean. The sum over prompts of ∇p / √p is the gradient of
2 √p: between Dr. GRPO, which counts all prompts alike (∇p), and MaxRL (∇p / p), whose rare successes count G times.
"""
import contextlib
import copy
import io
import json
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import align
import align_demo
from accounting import table
from align_losses import group_advantages
from checkpoint import write_atomically
from configurator import command_line


def root_mean(rewards, group_size: int, baseline: str, normalizer: str):
    """Advantages (N,) of our own: (r - p) / √p in each group, and the info of `group_advantages`."""
    advantages, info = group_advantages(rewards, group_size, "mean", "none")
    means = rewards.view(-1, group_size).mean(1, keepdim=True)
    return (advantages.view(-1, group_size) / (means + 1e-6).sqrt()).view(-1), info


ON_POLICY = dict(reweight="none", batch_size=256)                    # one optimizer step a rollout of 256 rows
OFF_POLICY = dict(reweight="grpo", batch_size=32)                    # 8 of them
GRPO = {                                                             # experiment -> run -> settings
    "on_policy": {"grpo": {}, "dr_grpo": dict(normalize="constant", normalizer="none"),
                  "rft": dict(baseline="none", normalizer="none"), "maxrl": dict(normalizer="mean"),
                  "root_mean": dict(normalizer="none", estimator=root_mean)},
    "off_policy": {"no ratio": OFF_POLICY | dict(reweight="none"), "no clip": OFF_POLICY | dict(reweight="noclip"),
                   "clip": OFF_POLICY, "gspo": OFF_POLICY | dict(reweight="gspo", clip=0.05)},
    "rates": {f"lr {lr:g}": dict(lr=lr) for lr in (1e-4, 3e-4, 3e-3, 1e-2)},
    "parts": {"no baseline": dict(baseline="none", normalizer="none"), "no deviation": dict(normalizer="none"),
              "by tokens": dict(normalize="token"), "by a constant": dict(normalize="constant"),
              "groups of 2": dict(group_size=2, prompts_per_step=128),
              "groups of 4": dict(group_size=4, prompts_per_step=64)},
    "epochs": {f"{epochs} x {rows} rows": OFF_POLICY | dict(epochs=epochs, batch_size=rows)
               for epochs, rows in ((1, 64), (1, 128), (2, 64), (2, 256), (4, 256))},
    "asked": {"think opened": dict(asked="Q: {}\nA: <think>"), "question alone": dict(asked="{}\n")}}
SEEDS = {"on_policy": 4, "off_policy": 4}                            # the others: one, as the course asks
ASKED = "Q: {}\nA:"                                                   # the laboratory's own form
# Right, in form, right in whatever form, right when greedy: shares; mean tokens of an answer.
FIGURES = ("accuracy", "format", "any_form", "greedy", "length")
LAST = ("entropy", "clip_fraction", "dead_groups")                   # of the last rollout of a GRPO run


@dataclass
class AlignBenchConfig:
    """What `python bench.py align` can be told."""
    experiments: str = ",".join(("prompts", "sft", "expert", *GRPO))      # those to run
    seeds: int = 4                                # at most, of each run
    steps: int = 60                               # rollouts of a GRPO run
    out: str = "out/bench_align"                  # results.json, table.txt, curves.png, samples.txt


class Bench:
    """The laboratory, the two models every run starts from, and the list of finished runs."""

    def __init__(self, config: AlignBenchConfig):
        self.config, self.folder = config, Path(config.out)
        self.lab = align_demo.Laboratory(self.folder, 0)
        self.path, self.results = self.folder / "results.json", []
        if self.path.exists():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
        self.base = align_demo.train_base(self.lab, align_demo.STAGES["base"]).eval()
        self.tuned = self.fine_tuned(self.lab.demonstrations(1000))

    def fine_tuned(self, rows: list, model=None, steps: int | None = None):
        """A copy of the base model, or of another, after SFT on these rows."""
        model = copy.deepcopy(model or self.base)
        settings = align_demo.STAGES["sft"]
        align.sft(model, rows, replace(settings, steps=steps or settings.steps))
        return model.eval()

    def ask(self, form: str = ASKED) -> None:
        """Ask in this form from now on, in training and in measuring."""
        self.lab.prompt = lambda task: [self.lab.stop] + self.lab.tokenizer.encode(form.format(task["question"]))

    def figures(self, model) -> dict:
        """The FIGURES of a model on held-out tasks."""
        measured = self.lab.measure(model)
        return {name: measured[name] for name in FIGURES}

    def run(self, experiment: str, name: str, seed: int, measure) -> None:
        """Store the figures that measure() gives, with the seconds it took, unless they are there."""
        key, began = dict(experiment=experiment, run=name, seed=seed), time.perf_counter()
        if not any(key.items() <= run.items() for run in self.results):
            self.results.append(key | measure() | {"seconds": time.perf_counter() - began})
            write_atomically(self.path, lambda file: file.write(json.dumps(self.results, indent=1).encode("utf-8")))
            print(f"{experiment}, {name}, seed {seed}: {self.results[-1]['accuracy']:.1%} right", flush=True)

    def runs(self, experiment: str) -> dict:
        """{name of a run: its results, one a seed} of an experiment."""
        runs = {}
        for run in self.results:
            if run["experiment"] == experiment:
                runs.setdefault(run["run"], []).append(run)
        return runs


# --- the experiments: each yields (name of a run, seed, function that gives its figures) ---

def prompts(bench: Bench):
    """The base model, never fine-tuned, asked plainly, with the form opened, and after two examples in either form."""
    forms = {"plain": ASKED, "form opened": ASKED + " <think>"}
    for name, style in (("two answers shown", "direct"), ("two in form shown", "guess")):
        forms[name] = "".join(f"Q: {task['question']}\nA:{align_demo.answered(task, style)}\n"
                              for task in bench.lab.pick("train", 2, ("count",))) + ASKED
    for name, form in forms.items():
        bench.ask(form)
        yield name, 0, lambda: bench.figures(bench.base)
    bench.ask()


def sft(bench: Bench):
    """Fine-tuning on more and more demonstrations, 300 steps each."""
    rows = bench.lab.demonstrations(1000)
    for n in (32, 64, 128, 256, 512, 1000):
        yield f"{n} shown", 0, lambda: bench.figures(bench.fine_tuned(rows[:n]))


def expert(bench: Bench):
    """Expert iteration: sample answers, fine-tune on the right ones, again; 3 rounds of 512 questions."""
    def iterate(group_size: int, epochs: int) -> dict:
        model, tasks = bench.tuned, bench.lab.pick("train", 3 * 512)
        for start in (0, 512, 1024):
            asked = tasks[start:start + 512]
            responses, texts = bench.lab.texts(model, asked, group_size=group_size)
            asked = [task for task in asked for _ in range(group_size)]
            right = [(bench.lab.prompt(task), row) for task, row, text in zip(asked, responses, texts)
                     if align.r1_zero_reward(text, task["answer"])["reward"]]
            steps = max(1, epochs * len(right) // align_demo.STAGES["sft"].batch_size)
            model = bench.fine_tuned(right, model, steps)
        return bench.figures(model)
    for group_size, epochs in ((2, 1), (8, 1), (2, 4), (8, 4)):
        yield f"{group_size} answers, {epochs} epochs", 0, lambda: iterate(group_size, epochs)


def reinforce(experiment: str, bench: Bench):
    """The GRPO runs of one experiment, seed after seed so that a short session has one of each first."""
    for seed in range(min(bench.config.seeds, SEEDS.get(experiment, 1))):
        for name, changes in GRPO[experiment].items():
            settings = dict(ON_POLICY, **changes)
            bench.ask(settings.pop("asked", ASKED))
            yield name, seed, lambda: grpo_run(bench, settings, seed, name)
    bench.ask()


def grpo_run(bench: Bench, changes: dict, seed: int, name: str) -> dict:
    """One GRPO run from the SFT model: its figures, the curve of rewards, and answers written on the way."""
    lab, model, entries = bench.lab, copy.deepcopy(bench.tuned), []
    estimator = changes.pop("estimator", group_advantages)
    settings = replace(align_demo.STAGES["grpo"], seed=seed, steps=bench.config.steps, log_every=1, **changes)

    def log(**entry):
        entries.append(entry)
        if name == "grpo" and seed == 0 and (entry["step"] == 1 or entry["step"] % 20 == 0):
            shown = lab.pick("val", 3)
            with open(bench.folder / "samples.txt", "a", encoding="utf-8") as file:
                for task, row, text in zip(shown, *lab.texts(model, shown)):
                    reward = align.r1_zero_reward(text, task["answer"])["reward"]
                    file.write(f"step {entry['step']}, reward {reward:.0f}, {len(row)} tokens, entropy of the rollout "
                               f"{entry['entropy']:.3f} | {task['question']} |{text}\n")

    align.grpo(model, lab.problems(), lab.tokenizer, settings, lab.stop, log, estimator=estimator)
    return (bench.figures(model) | {key: entries[-1].get(key, 0.0) for key in LAST}
            | {"curve": [entry["reward"] for entry in entries]})


EXPERIMENTS = {"prompts": prompts, "sft": sft, "expert": expert} | {name: partial(reinforce, name) for name in GRPO}


# --- what is shown ---

def show(bench: Bench) -> str:
    """A table an experiment: means over the seeds, and the deviation of the share right; also to OUT/table.txt."""
    parameters = sum(p.numel() for p in bench.base.parameters())
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print(f"{parameters:,} parameters, {bench.config.steps} rollouts a GRPO run, 400 held-out tasks (one standard "
              f"error: 2 points); torch {torch.__version__}, {torch.get_num_threads()} threads\nright, form, any form: "
              "sampled at temperature 1; any form: the answer stands last, whatever the form")
        for experiment in EXPERIMENTS:
            rows = []
            for name, runs in bench.runs(experiment).items():
                mean = {key: statistics.mean(run[key] for run in runs) for key in (*FIGURES, *LAST) if key in runs[0]}
                spread = statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else None
                rows.append([name, len(runs), f"{mean['accuracy']:.1%}", "-" if spread is None else f"{spread:.1%}",
                             *(f"{mean[key]:.1%}" for key in ("format", "any_form", "greedy")), mean["length"],
                             *(f"{mean[key]:.2%}" if key in mean else "-" for key in LAST[1:]),
                             mean.get("entropy", "-")])
            if rows:
                table(experiment, ["", "seeds", "right", "spread", "form", "any form", "greedy", "length", "clipped",
                                   "dead", "entropy"], rows)
    (bench.folder / "table.txt").write_text(text.getvalue(), encoding="utf-8", newline="\n")
    return text.getvalue()


def draw(bench: Bench) -> None:
    """Rewards over the rollouts, a panel an experiment, the mean of its seeds; to OUT/curves.png."""
    from matplotlib.figure import Figure
    shown = [name for name in GRPO if bench.runs(name)]
    if not shown:
        return
    figure = Figure(figsize=(4.5 * len(shown), 4), layout="constrained")
    for axis, experiment in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for name, runs in bench.runs(experiment).items():
            mean = [statistics.mean(rewards) for rewards in zip(*(run["curve"] for run in runs))]
            smooth = [statistics.mean(mean[max(0, step - 4):step + 1]) for step in range(len(mean))]
            axis.plot(range(1, len(mean) + 1), smooth, label=name)
        axis.set(xlabel="rollout", ylabel="mean reward (of 5 rollouts)", title=experiment, ylim=(0, 1))
        axis.legend(fontsize=7)
    figure.savefig(bench.folder / "curves.png", dpi=80)


def align_bench(argv: list[str]) -> None:
    """Alignment's experiments from one SFT model: prompts, amounts of data, expert iteration, GRPO's variants."""
    config = command_line(AlignBenchConfig, argv, "usage: python bench.py align [--key=value …]")[2]
    experiments = {name: EXPERIMENTS[name] for name in config.experiments.split(",")}
    bench = Bench(config)
    bench.run("sft", "none", 0, lambda: bench.figures(bench.base))
    for experiment, runs in experiments.items():
        for name, seed, measure in runs(bench):
            bench.run(experiment, name, seed, measure)
        show(bench)
        draw(bench)
    print(show(bench))
