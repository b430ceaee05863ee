"""The course's smaller experiments, a verb of bench.py each: ten minutes of two cores, all of `align` two hours.

    python bench.py toy                       SGD on one quadratic at learning rates 1 … 1,000
    python bench.py sweeps ablations          one grid of training runs on the default corpus, by name
    python bench.py ngrams data/shakespeare   what models reach that only count: is my loss normal?
    python bench.py intervals                 how often intervals of scaling predictions hold the truth
    python bench.py precision                 sums in half precision; which tensor has which dtype under autocast
    python bench.py align --experiments=…     alignment on the demonstration's tasks, by name

Of `align`: one base model and one SFT model of align_demo.py serve all runs; a run changes one thing and is measured on
the same 400 held-out tasks. Finished runs stand in OUT/results.json and are not run again.

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
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import align
import align_demo
import laws
from accounting import table
from align_losses import group_advantages
from checkpoint import open_tokens, read_meta, write_atomically
from configurator import command_line, fail
from layers import LayerNorm, Linear, cross_entropy
from machine import pick_device
from model import bits_per_byte
from optim import SGD


# --- learning rates on a toy, and grids of real runs ---

def toy(words: list[str]) -> None:
    """SGD on the mean of squares of 100 weights, learning rate α / √(t + 1): the loss after steps 1 … 10."""
    print(f"{'α':>6}" + "".join(f"{step:>10}" for step in range(1, 11)))
    for rate in (1.0, 10.0, 100.0, 1000.0):
        weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
        optimizer, losses = SGD([weights], lr=rate, momentum=0.0), []
        for step in range(10):
            loss = (weights ** 2).mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.param_groups[0]["lr"] = rate / (step + 1) ** 0.5
            optimizer.step()
            optimizer.zero_grad()
        print(f"{rate:>6g}" + "".join(f"{loss:>10.3g}" for loss in losses))
    print("A step multiplies every weight by 1 - 2 α / (100 √(t + 1)): it shrinks while that is within ±1, so α up to "
          "100 converges (100 in one step: 1 - 2 = -1, the same loss once, then less), and 1,000 diverges.")


STEPS = "--max_minutes=none --eval_every=0 --num_samples=0 --max_steps=300 --warmup_steps=30"
SWEEPS = {              # name -> command lines of `train.py sweep`: of equal tokens; width and depth of equal time
    "ablations": ["", "smear=false", "norm=none", "norm=none muon_lr=0.003 lr=0.0008 embedding_lr=0.016",
                  "norm_position=post", "position=none", "qk_norm=false", "ffn=silu d_ff=512"],
    "learning_rate": ["lr=1e-3,3e-3,1e-2,1e-1,30 --optimizer=adamw --embedding_lr=none"],
    "batch": ["batch_tokens=256 max_steps=2400 warmup_steps=240", "batch_tokens=1024 max_steps=600 warmup_steps=60",
              "batch_tokens=2048", "batch_tokens=4096 max_steps=150 warmup_steps=15",
              "batch_tokens=16384 max_steps=38 warmup_steps=4", "batch_tokens=65536 max_steps=10 warmup_steps=2"],
    "muon": ["muon_lr=0.02,0.03,0.04"], "muon_steps": ["muon_steps=2,3,5"],
    "embedding": ["embedding_lr=0.008,0.04,0.16,0.64"],
    "width": ["d_model=96 max_steps=403 warmup_steps=40", "d_model=128", "d_model=192 max_steps=170 warmup_steps=17"],
    "depth": ["n_layers=2 max_steps=492 warmup_steps=49", "n_layers=4", "n_layers=6 max_steps=221 warmup_steps=22"]}


@dataclass
class SweepsConfig:
    """What `python bench.py sweeps NAME…` can be told."""
    seeds: str = "1"                          # with commas between
    out: str = "out"                          # a folder per sweep in it, with sweep.txt


def sweeps(words: list[str]) -> None:
    """Grids of training runs on the default corpus by name; runs that have ended are not run again."""
    usage = f"usage: python bench.py sweeps NAME… [--seeds=1,2,3]     NAME: {', '.join(SWEEPS)}"
    _, names, config, _ = command_line(SweepsConfig, words, usage)
    if not names or not set(names) <= set(SWEEPS):
        sys.exit(usage)
    for name in names:
        for line in SWEEPS[name]:
            axes, given = line.split(), STEPS.split()
            keys = {word.split("=")[0] for word in axes}
            given = [flag for flag in given if flag[2:].split("=")[0] not in keys]
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "sweep", *axes,
                       f"seed={config.seeds}", *given, f"--out_dir={config.out}/{name}"]
            print("$", " ".join(command[1:]), flush=True)
            subprocess.run(command, check=True)


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
    meta = read_meta(words[0])
    print(f"{words[0]}: {meta['val_tokens']:,} tokens of validation, vocabulary {meta['vocab_size']:,}\n"
          f"{'':<24}{'nats a token':>14}{'bits per byte':>15}\n{'any byte alike':<24}{'':>14}{8.0:>15.3f}")
    for name, loss in counting_losses(words[0]).items():
        print(f"{name:<24}{loss:>14.3f}{bits_per_byte(loss, meta['val_tokens'], meta['val_bytes']):>15.3f}")


# --- precision ---

def precision(words: list[str]) -> None:
    """A thousand times 0.01 summed in float32, float16 and mixed; dtypes of a small model under autocast."""
    hundredth = {dtype: torch.tensor(0.01, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    sums = [(dtype, dtype) for dtype in hundredth] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    for total, part in sums:
        result = torch.tensor(0.0, dtype=total)
        for _ in range(1000):
            result += hundredth[part]
        print(f"1,000 x 0.01 in {str(part)[6:]:<9} summed in {str(total)[6:]:<9} {result.item():.4f}")
    device, seen = pick_device(None), {}
    torch.manual_seed(0)
    first, norm, last = Linear(8, 16).to(device), LayerNorm(16).to(device), Linear(16, 4).to(device)
    x, targets = torch.randn(32, 8, device=device), torch.randint(4, (32,), device=device)
    with torch.autocast(device.split(":")[0], torch.bfloat16):
        seen["output of Linear"] = hidden = first(x)
        seen["output of LayerNorm"] = normed = norm(hidden.relu())
        seen["logits"] = logits = last(normed)
        seen["loss"] = loss = cross_entropy(logits, targets)
    loss.backward()
    seen |= {"weight of Linear": first.weight, "its gradient": first.weight.grad}
    print(f"under autocast to bfloat16 on {device}: "
          + ", ".join(f"{name} {str(tensor.dtype)[6:]}" for name, tensor in seen.items()))


# --- are intervals honest? ---

@dataclass
class IntervalsConfig:
    """What `python bench.py intervals` can be told."""
    worlds: int = 100                         # seeds of noise


def law_runs(law: tuple, noise: float, seed: int) -> list[dict]:
    """54 runs of a law with noise: nine sizes, a fifth to five times the best one, at each of six budgets."""
    (e, a, b, alpha, beta), draws, runs = law, np.random.default_rng(seed), []
    for flops in np.geomspace(1e18, 1e20, 6):
        best = (alpha * a / (beta * b) * (flops / 6) ** beta) ** (1 / (alpha + beta))          # of 6 N D = C
        for n in best * np.geomspace(0.2, 5, 9):
            loss = (e + a / n ** alpha + b / (flops / 6 / n) ** beta) * np.exp(noise * draws.normal())
            runs.append({"n_params": n, "n_tokens": flops / 6 / n, "flops": flops, "loss": loss})
    return runs


def intervals(words: list[str]) -> None:
    """Of 100 worlds, how many 90 % intervals of N, D and loss hold the truth, and how wide they are."""
    _, _, config, _ = command_line(IntervalsConfig, words, "usage: python bench.py intervals [--key=value …]")
    target, keys = 30 * 1e20, ("n_params", "n_tokens", "loss")
    print(f"54 runs, six budgets up to 1e20, prediction at {target:.0e} FLOPs, {config.worlds} worlds; held, of them, "
          f"and median high / low\n{'fit':<16}{'law':<11}{'noise':>7}" + "".join(f"{key:>16}" for key in keys))
    for fit in (laws.fit_isoflop, laws.fit_parametric):
        for name, law in laws.PUBLISHED.items():
            truth = laws.predict(laws.published(name), target)
            for noise in (0.002, 0.003, 0.01, 0.03):
                made = [laws.predict(fit(law_runs(law, noise, seed)), target)
                        for seed in range(config.worlds)]
                cells = []
                for key in keys:
                    held = sum(one[f"{key}_low"] <= truth[key] <= one[f"{key}_high"] for one in made)
                    width = statistics.median(one[f"{key}_high"] / one[f"{key}_low"] for one in made)
                    cells.append(f"{held:>9}{width:>7.3f}")
                print(f"{fit.__name__:<16}{name:<11}{noise:>7.1%}" + "".join(cells), flush=True)


# --- alignment ---

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
    names = config.experiments.split(",")
    if not set(names) <= set(EXPERIMENTS):
        fail(f"experiments={config.experiments}: give some of {', '.join(EXPERIMENTS)}, with commas between")
    experiments = {name: EXPERIMENTS[name] for name in names}
    bench = Bench(config)
    bench.run("sft", "none", 0, lambda: bench.figures(bench.base))
    for experiment, runs in experiments.items():
        for name, seed, measure in runs(bench):
            bench.run(experiment, name, seed, measure)
        show(bench)
        draw(bench)
    print(show(bench))
