"""Spend a budget of FLOPs: small runs are trained, laws fitted (laws.py), the large run predicted and checked.

A run that costs a thousand pilots cannot be tuned, so it is predicted. The order in which the money goes:

    settings     learning rates at four sizes, shapes at one, batches at six lengths: a twelfth of the budget
    IsoFLOPs     seven sizes at each of four small budgets, each set around the best size of the budget before
    long shots   a few runs at the largest budgets that can be paid, near the best size: they hold the law's far end
    prediction   the parametric law read at the target, with its 90 % interval

N is the parameters without embeddings and head, and C = 6 N D. That leaves out attention scores and the head, most of
the bill at d_model 64; `real` budgets with accounting.py's exact count.

    python scaling.py                                   a simulated service explored, fitted, scored; pictures
    python scaling.py fit RUNS.json --flops=1e21        all fits of one's own runs, and what they say at a budget
    python scaling.py plan --flops=1e18 --device=h100   writes config_plan.py, ready for train.py
    python scaling.py real                              trains 20 small models, predicts a larger one, trains that

Left out: laws for repeated data (2305.16264), sparsity, precision; muP.
"""
import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import train
from accounting import DEVICES, count_params, flops_per_token, largest_batch, training_hours
from configurator import command_line, fail
from explorer import Explorer, TrainingAPI, score, shape_for
from laws import (LAW, Fit, best_of_each_budget, budgets_of, columns, fit_isoflop, fit_kaplan, fit_parametric,
                  law_terms, parabola, predict, published)
from model import ModelConfig

# `real`: budgets in exact FLOPs, and the shapes (d_model, n_layers, n_heads) trained at each, around the best one.
REAL_GRID = {5.0e11: [(24, 2, 1), (32, 2, 1), (40, 2, 1), (48, 2, 1), (64, 2, 2)],
             1.5e12: [(24, 2, 1), (32, 2, 1), (48, 2, 1), (64, 2, 2), (64, 4, 2)],
             4.5e12: [(48, 2, 1), (64, 2, 2), (64, 4, 2), (96, 3, 3), (96, 4, 3)]}
REAL_CHECK = (128, 4, 4)             # predicted, then trained: near the best shape for 8 times the largest budget
REAL_RECIPE = dict(context_length=256, batch_tokens=1024, optimizer="muon", qk_norm=True, zero_init=True,
                   schedule="wsd", decay_fraction=0.7, min_lr_factor=0.02, eval_every=0, checkpoint_every=500)


# --- pictures and tables ---

def draw(fit: Fit, runs: list[dict], target: float, path, command: str, key: str = "flops", marks=()) -> None:
    """Three panels: loss against N at equal `key`, the best N and D against C, the loss against C.

    marks: (label, record) of points beside the prediction. Solid: the law, a ring at its minimum; dotted: a parabola.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    figure = Figure(figsize=(15, 5), layout="constrained")
    curves, sizes, losses = figure.subplots(1, 3)
    log_n, log_d, log_c, log_l = columns(runs)
    counts = np.array([run[key] for run in runs])
    for number, group in enumerate(budgets_of(np.log(counts))):
        color, label = f"C{number % 10}", f"{counts[group].mean():.1e} FLOPs"
        curves.plot(np.exp(log_n[group]), np.exp(log_l[group]), "o", color=color, ms=4, label=label)
        if len(group) > 2:
            x = np.linspace(log_n[group].min() - 0.2, log_n[group].max() + 0.2, 100)
            per_token = np.interp(x, *np.array(sorted(zip(log_n[group], (log_n + log_d)[group]))).T)
            y = np.exp(law_terms(fit.law[0], x, per_token - x)[0])          # along the budget's own N and D
            curves.plot(np.exp(x), y, color=color, linewidth=1)
            curves.plot(math.exp(x[y.argmin()]), y.min(), "o", color=color, ms=9, fillstyle="none")
        if len(np.unique(log_n[group].round(6))) > 3:
            centre, *_ = parabola(log_n[group], log_l[group], np.ones(len(group)))
            near = np.exp(-(log_n[group] - centre) ** 2 / 4)                # as laws.parabola weighs
            bent = np.polyfit(log_n[group] - centre, log_l[group], 2, w=near)
            curves.plot(np.exp(x), np.exp(np.polyval(bent, x - centre)), ":", color=color)
    budgets = np.geomspace(math.exp(log_c.min()), target, 60)
    along = [predict(fit, c) for c in budgets]
    for axis, name in ((sizes, "n_params"), (sizes, "n_tokens"), (losses, "loss")):
        axis.fill_between(budgets, *([one[name + end] for one in along] for end in ("_low", "_high")), alpha=0.25)
        axis.loglog(budgets, [one[name] for one in along], label=f"best {name}, 90 % interval")
    sizes.loglog(budgets, np.sqrt(budgets / 120), "k--", linewidth=0.8, label="D = 20 N")
    sizes.loglog(budgets, 20 * np.sqrt(budgets / 120), "k--", linewidth=0.8)
    losses.loglog(np.exp(log_c), np.exp(log_l), ".", color="grey", label="runs")
    for label, record in marks:
        for axis, x, y in ((sizes, "flops", "n_params"), (losses, "flops", "loss"), (curves, "n_params", "loss")):
            axis.plot(record[x], record[y], "r*", ms=10, label=label)
    losses.plot([], [], " ", label=", ".join(f"{name} {fit[key]:.3g}" for name, key in zip("EABαβ", LAW)))
    curves.set(xscale="log", xlabel="N, non-embedding parameters", ylabel="final loss, nats per token")
    sizes.set(xlabel="C = 6 N D, FLOPs", ylabel="parameters, tokens")
    losses.set(xlabel="C = 6 N D, FLOPs", ylabel="final loss, nats per token")
    losses.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    for axis in (curves, sizes, losses):
        axis.legend(fontsize=7)
    figure.suptitle(f"{command} (solid: {fit.method} fit; dotted: each budget's parabola)", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")


def show_fits(runs: list[dict], flops: float) -> Fit:
    """Print every fit that the runs allow and what it predicts at `flops`, with 90 % intervals; returns the last."""
    fits = []
    for fit in (fit_isoflop, fit_parametric):
        try:
            fits.append(fit(runs))
        except ValueError as error:
            print(f"left out: {error}")
    if not fits:
        raise ValueError(f"no fit is possible with these {len(runs)} runs, for the reasons above")
    print("Kaplan: " + ", ".join(f"L({x}) = ({c:.3g} / {x})^{p:.3f}" for x, (c, p) in fit_kaplan(runs).items()))
    print(f"best run of each budget, no parabola: N {best_of_each_budget(runs, flops):.3g}")
    print(f"{f'at {flops:.3g} FLOPs':<22}{'a':>6}{'b':>6}{'E':>6}{'N':>10}  {'90 % interval':<20}{'D':>10}{'D/N':>7}"
          f"{'loss':>7}  90 % interval")
    for fit in fits:
        p = predict(fit, flops)
        interval = f"{p.n_params_low:.3g} … {p.n_params_high:.3g}"
        print(f"{fit.method:<22}{fit.a:>6.3f}{fit.b:>6.3f}{fit.E:>6.2f}{p.n_params:>10.3g}  {interval:<20}"
              f"{p.n_tokens:>10.3g}{p.tokens_per_param:>7.1f}{p.loss:>7.3f}  {p.loss_low:.3f} … {p.loss_high:.3f}")
    return fits[-1]


def fit_file(settings: "FitSettings", path: str) -> None:
    """All fits of the runs in a file, and what they say at settings.flops (none: ten times the largest budget)."""
    runs = read_runs(path)
    if not runs:
        raise ValueError(f"{path} holds no runs")
    flops = 10 * math.exp(max(columns(runs)[2])) if settings.flops is None else settings.flops
    if not 0 < flops < math.inf:
        raise ValueError(f"flops={flops!r} must be a finite number above 0")
    draw(show_fits(runs, flops), runs, flops, f"{settings.out_dir}/fit.png", f"python scaling.py fit {path}")


def demonstrate(settings: "DemoSettings") -> None:
    """A world explored, each fit beside the hidden truth, a picture."""
    target = settings.flops
    explorer = Explorer(TrainingAPI(2e18, settings.seed), target)
    submission = explorer.spend()
    result = score(submission, settings.seed)
    print(f"world {settings.seed}: {len(explorer.api.runs)} runs, {explorer.api.used_flops:.3g} of 2e18 FLOPs")
    show_fits(explorer.runs, target)
    print(f"{'the hidden truth':<40}{result['best_n_params']:>10.3g}{result['best']:>46.3f}")
    print("submission: " + ", ".join(f"{key} {value:.4g}" for key, value in submission.items()))
    print(f"scored: prediction {result['prediction_error']:+.2f} % off the truth, model {result['excess']:.2f} % "
          "above the best loss")
    truth = {"n_params": result["best_n_params"], "loss": result["best"], "flops": target}
    draw(explorer.fit, explorer.runs, target, f"{settings.out_dir}/scaling.png", "python scaling.py",
         marks=[("the hidden truth", truth)])


# --- a config for train.py ---

def plan(settings: "PlanSettings") -> Path:
    """Write a config for train.py that spends settings.flops at its best, and say what to expect; returns its path.

    The law is the re-fit of Hoffmann's; learning rate and batch are DeepSeek's for AdamW (2401.02954, eq. 1).
    """
    device = settings.device.upper()
    if device not in DEVICES:
        raise ValueError(f"device={settings.device!r} is not known; there are {', '.join(DEVICES)}")
    flops, T, fit = settings.flops, settings.context_length, published("besiroglu")
    best = predict(fit, flops)
    shape = shape_for(best.n_params, 64.0, step=64, widest=8192)
    shape["n_heads"] = shape["d_model"] // 64                # widths are multiples of 64, and so heads are 64 wide
    config = ModelConfig(**shape, vocab_size=settings.vocab_size, context_length=T, qk_norm=True)
    n_params, batch = size(config), T * max(1, round(0.2920 * flops ** 0.3271 / T))
    steps = max(1, round(flops / (6 * n_params * batch)))
    exact, hours = exact_flops(config) * steps * batch, training_hours(config, steps * batch, device)
    loss = math.exp(law_terms(fit.law, np.log([n_params]), np.log([steps * batch]))[0].item())
    micro = largest_batch(config, DEVICES[device].memory_bytes, dtype="bfloat16")
    if not micro:
        raise ValueError(f"device={device} cannot hold one sequence of {n_params:.3g} parameters; give fewer flops")
    values = {"data_dir": settings.data_dir, "out_dir": "out/plan", "context_length": T, **shape,
              "qk_norm": True, "batch_tokens": batch, "micro_batch_size": min(batch // T, micro, 64),
              "max_steps": steps, "lr": float(f"{min(0.3118 * flops ** -0.125, 1e-2):.3g}"),
              "warmup_steps": min(2000, max(1, steps // 20)), "eval_every": max(1, steps // 20)}
    text = f'''"""{flops:.3g} FLOPs well spent: `python train.py {settings.config}`, by `python scaling.py plan`.

N {n_params:,} (best {best.n_params:.3g}), D {steps * batch:,} tokens, {steps * batch / n_params:.0f} a parameter, by
the re-fit of Chinchilla's law (2404.10102). Expected loss {loss:.2f} nats a token with that law's data and tokenizer.
With head and attention {exact:.3g} FLOPs: {hours:.3g} hours on one {device} at an assumed 40 % of its peak.
"""
''' + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    Path(settings.config).write_text(text, encoding="utf-8")
    print(text)
    return Path(settings.config)


# --- real runs ---

def size(config: ModelConfig) -> int:
    """N: the parameters of a model without its embeddings and its head."""
    counts = count_params(config)
    return counts["total"] - counts["token_embeddings"] - counts["position_embeddings"] - counts["lm_head"]


def exact_flops(config: ModelConfig) -> float:
    """FLOPs of training on one token, head and attention included."""
    return flops_per_token(config, config.context_length, training=True)["total"]


def read_runs(path) -> list[dict]:
    """The runs in a JSON file. Raises ValueError naming the file when it holds anything else."""
    try:
        return list(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON list of runs ({error}); give another file") from None


def real_job(shape: tuple, budget: float, seed: int, vocab_size: int) -> tuple:
    """(settings of a run that spends `budget` exact FLOPs on one shape, the record that lacks only its loss)."""
    model = dict(zip(("d_model", "n_layers", "n_heads"), shape))
    config = ModelConfig(**model, vocab_size=vocab_size, context_length=REAL_RECIPE["context_length"], qk_norm=True)
    tokens = max(1, round(budget / (exact_flops(config) * REAL_RECIPE["batch_tokens"]))) * REAL_RECIPE["batch_tokens"]
    steps = tokens // REAL_RECIPE["batch_tokens"]
    rate = (64 / config.d_model) ** 0.5            # peak rates fall with the width, as pilots at 32, 64 and 96 had it
    record = {"name": f"{shape[0]}x{shape[1]}_{steps}_seed{seed}", "n_params": size(config), "n_tokens": tokens,
              "flops": 6 * size(config) * tokens, "flops_exact": exact_flops(config) * tokens, "budget": budget,
              "seed": seed}
    return REAL_RECIPE | model | {"lr": 0.012 * rate, "muon_lr": 0.04 * rate, "max_steps": steps, "seed": seed,
                                  "warmup_steps": max(10, steps // 20)}, record


def train_missing(jobs: list[tuple], path: Path, out_dir: str, data_dir: str) -> list[dict]:
    """Train, or go on with, what `path` does not hold yet, saving each record as it comes; the jobs' records."""
    records = read_runs(path) if path.exists() else []
    done = {record["name"] for record in records}
    print(f"{sum(record['name'] in done for _, record in jobs)} of {len(jobs)} runs are in {path}", flush=True)
    for settings, record in jobs:
        if record["name"] in done:
            continue
        folder = Path(out_dir) / record["name"]
        # A folder with a log alone is of a run that was stopped before it saved: it begins again.
        resume = (folder / "ckpt.pt").exists()
        config = train.TrainConfig(**settings, data_dir=data_dir, out_dir=str(folder), resume=resume,
                                   overwrite=not resume)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            figures = train.main(config)           # its log.jsonl has all that it prints
        if figures["interrupted"] is not None:
            raise ValueError(f"{record['name']} was stopped and saved; the same command goes on")
        records.append(record | {"loss": figures["val_loss"], "seconds": round(figures["seconds"], 1)})
        checkpoint.write_text(path, json.dumps(records).replace("}, {", "},\n {") + "\n")
        print(f"{record['name']:<20} N {record['n_params']:>9,}  D {record['n_tokens']:>9,}  exact FLOPs "
              f"{record['flops_exact']:.2e}  loss {figures['val_loss']:.4f}  {figures['seconds']:.0f} s", flush=True)
    return [record for _, job in jobs for record in records if record["name"] == job["name"]]


def real(settings: "RealSettings") -> dict:
    """The grid, the fit, and a run of 8 times the largest budget, predicted before it is trained; returns figures."""
    folder, data_dir = Path(settings.results_dir), settings.data_dir or "data/shakespeare_4096"
    folder.mkdir(parents=True, exist_ok=True)
    if settings.data_dir is None and not (Path(data_dir) / "meta.json").exists():
        train.data.prepare("shakespeare", 4096, data_dir, REAL_RECIPE["context_length"])
    meta = checkpoint.read_meta(data_dir)
    # Seed 2 at the smallest budget only, to see the noise.
    jobs = [real_job(shape, budget, seed, meta["vocab_size"]) for budget, shapes in REAL_GRID.items()
            for seed in ((1, 2) if budget == min(REAL_GRID) else (1,)) for shape in shapes]
    path, count = folder / "scaling_runs.json", len(REAL_GRID[min(REAL_GRID)])
    runs = train_missing(jobs, path, settings.out_dir, data_dir)
    fit = fit_parametric(runs)
    print(f"fit of {len(runs)} runs: " + ", ".join(f"{key} {fit[key]:.4g} ({fit[key + '_low']:.4g} … "
                                                   f"{fit[key + '_high']:.4g})" for key in LAW))
    gaps = [math.log(one["loss"] / two["loss"]) for one, two in zip(runs[:count], runs[count:2 * count])]
    job = real_job(REAL_CHECK, 8.2 * max(REAL_GRID), 1, meta["vocab_size"])
    guesses = law_terms(fit.law, *np.log([[job[1]["n_params"]], [job[1]["n_tokens"]]]))[0]                  # (S, 1)
    figures = Fit().add(predicted=np.exp(guesses[:, 0]))
    print("predicted for {}: {predicted:.4f} ({predicted_low:.4f} … {predicted_high:.4f})".format(
        job[1]["name"], **figures), flush=True)
    check, = train_missing([job], path, settings.out_dir, data_dir)
    figures.update(measured=check["loss"], error_percent=100 * (figures.predicted / check["loss"] - 1),
                   seed_noise_percent=100 * math.sqrt(sum(gap ** 2 for gap in gaps) / 2 / len(gaps)),
                   times_exact=check["flops_exact"] / max(run["flops_exact"] for run in runs),
                   times_6nd=check["flops"] / max(run["flops"] for run in runs), law={key: fit[key] for key in LAW})
    checkpoint.write_text(folder / "scaling_real.json", json.dumps(figures) + "\n")
    print("measured {measured:.4f}: the prediction is {error_percent:+.2f} % off, at {times_exact:.1f} times the "
          "largest run's exact FLOPs; the seed alone moves a loss by {seed_noise_percent:.2f} %".format(**figures))
    draw(fit, runs, 2 * check["flops"], folder / "scaling_real.png", "python scaling.py real", "budget",
         marks=[("predicted, then trained", check)])
    return figures


# --- the command ---

@dataclass
class DemoSettings:
    """python scaling.py"""
    flops: float = 1e19              # the budget to predict for
    seed: int = 0                    # which simulated world
    out_dir: str = "out/scaling"     # where the picture goes


@dataclass
class FitSettings:
    """python scaling.py fit RUNS.json"""
    flops: float | None = None       # the budget to predict for; none = 10 times the largest budget of the runs
    out_dir: str = "out/scaling"     # where the picture goes


@dataclass
class PlanSettings:
    """python scaling.py plan"""
    flops: float = 1e18              # the budget to spend
    device: str = "H100"             # what to train on, a name of machine.py's DEVICES
    config: str = "config_plan.py"   # the file to write
    context_length: int = 512        # tokens of a sequence
    vocab_size: int = 32_000         # of the tokenizer, for the hours
    data_dir: str = "data/owt"       # token files that the config will name


@dataclass
class RealSettings:
    """python scaling.py real"""
    data_dir: str | None = None      # token files; none = Shakespeare in 4,096 tokens, prepared when missing
    out_dir: str = "out/scaling"     # checkpoints of the runs
    results_dir: str = "results"     # where runs, figures and picture are kept


USAGE = "usage: python scaling.py [fit RUNS.json | plan | real] [--key=value …]"
SETTINGS = {None: DemoSettings, "fit": FitSettings, "plan": PlanSettings, "real": RealSettings}


def main(argv: list[str]) -> None:
    """What `python scaling.py ARGV` does; a mistake exits with status 2."""
    verb, files, settings, _ = command_line(SETTINGS, argv, USAGE)
    if len(files) != (verb == "fit"):
        fail(f"{'give one file of runs' if verb == 'fit' else f'{files[0]!r} is no verb'}. {USAGE}")
    try:
        if verb == "fit":
            fit_file(settings, files[0])
        else:
            {None: demonstrate, "plan": plan, "real": real}[verb](settings)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
