"""Runs on record: the log of one, the picture of several, the table of a grid.

OUT_DIR/log.jsonl holds one JSON object a line, on the disk as soon as it is written:

    {"commit": ..., "torch": ..., "device": ..., "seed": ..., "config": {every setting}, ...}      the header
    {"step": 100, "seconds": 8.1, "loss": 5.02, "lr": 0.008, "norm": 0.31, "ms": 80.4, ...}        a logging step
    {"step": 200, "seconds": 16.2, "val_loss": 4.61, "val_bits_per_byte": 2.31}                    an evaluation

`plot` draws the curves of some runs. `sweep` trains a grid of settings and tabulates the scores. One seed proves
little: give seed=1,2,3, and read a difference beside the spread.
"""
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import typing
from dataclasses import asdict, replace
from pathlib import Path

from checkpoint import write_atomically
from configurator import ConfigError, coerce, nearest

PER_START = ("resume", "overwrite")      # settings that say how a run is started, not what it is


# --- the log of one run ---

def header(**settings) -> dict:
    """What a reader needs to repeat a run: `settings`, and the commit of this program."""
    commit, command = None, ["git", "rev-parse", "HEAD"]
    if shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {"commit": commit or None, "python": platform.python_version()} | settings


class Log:
    """OUT_DIR/log.jsonl, open for further lines; with out_dir None (a rank that does not speak) they go nowhere.

    resume_step: keep the lines up to this step, and add a header when a setting has changed. Otherwise the log starts
    anew; beside a former run's checkpoint as log.new.jsonl, until `replace_former`.
    """

    def __init__(self, out_dir, header: dict, resume_step: int | None = None):
        self.path = self.writing = Path(os.devnull) if out_dir is None else Path(out_dir) / "log.jsonl"
        if out_dir is not None:
            lines = [header]
            if resume_step is not None and self.path.exists():
                lines = [line for line in read_log(self.path) if line.get("step", 0) <= resume_step]
                headers = [what_it_is(line) for line in lines if "config" in line]
                if headers[-1:] != [what_it_is(header)]:
                    lines.append({"step": resume_step} | header)
            elif resume_step is None and any(self.path.with_name(name).exists() for name in ("ckpt.pt", "best.pt")):
                self.writing = self.path.with_name("log.new.jsonl")
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_atomically(self.writing, lambda file: file.write(text.encode()))
        self.file = open(self.writing, "a", encoding="utf-8", buffering=1)            # a line at a time

    def write(self, **entry) -> None:
        """Add a line. Raises OSError naming the file, as when the disk is full."""
        try:
            print(json.dumps(entry), file=self.file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.writing)) from error

    def replace_former(self) -> None:
        """Take the place of the former run's log."""
        if self.writing != self.path:
            self.file.close()
            self.writing = self.writing.replace(self.path)
            self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        self.file.close()


def what_it_is(header: dict) -> dict:
    """A header without what differs from start to start of one and the same run."""
    config = {key: value for key, value in header["config"].items() if key not in PER_START}
    return {key: value for key, value in header.items() if key != "step"} | {"config": config}


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl, none where there is no file; a last line that a kill cut short is left out."""
    entries = []
    if not Path(path).exists():
        return entries
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def plot(out_dirs, folder=None) -> Path:
    """Draw losses and learning rates to FOLDER/loss.png (the first run's); returns its path. Skips what is no run."""
    from matplotlib.figure import Figure
    runs = [out_dir for out_dir in out_dirs if (Path(out_dir) / "log.jsonl").is_file()]
    if not runs:
        raise ValueError(f"no log.jsonl in {', '.join(map(str, out_dirs)) or 'nothing'}; "
                         "plot needs the folders of runs")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 1))
    for color, out_dir in enumerate(runs):
        log, name = read_log(Path(out_dir) / "log.jsonl"), Path(out_dir).name
        for key, row, style in (("loss", 0, {"alpha": 0.4, "label": f"{name} train"}), ("lr", 1, {}),
                                ("val_loss", 0, {"marker": "o", "markersize": 3, "label": f"{name} validation"})):
            for axis, x in zip(axes[row], ("step", "seconds")):
                points = [(line[x], line[key]) for line in log if key in line]
                axis.plot(*zip(*points), color=f"C{color}", linewidth=1, **style)
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[0, 0].legend()
    axes[1, 0].set(xlabel="step", ylabel="learning rate")
    axes[1, 1].set_xlabel("training time, seconds")
    figure.suptitle(("python train.py plot " + " ".join(map(str, runs)))[:150], fontsize=9)
    path = Path(folder or runs[0]) / "loss.png"
    figure.savefig(path, dpi=110)
    return path


# --- a grid of runs ---

def grid(config_class: type, words: list[str]) -> list[dict]:
    """The settings of each point that words such as `lr=1e-3,3e-3` and `seed=1,2` span; the last word moves fastest."""
    hints, axes = typing.get_type_hints(config_class), []
    for word in words:
        key, _, values = word.partition("=")
        if not values or key not in hints or key in ("out_dir", *PER_START):
            raise ConfigError(f"{word!r} spans no axis; write key=a,b with a setting as key.{nearest(key, hints)}")
        axes.append([(key, coerce(key, value, hints[key])) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def points(config, words: list[str]) -> list:
    """The config of each point, in its own folder below config.out_dir; one that was interrupted goes on."""
    configs = []
    for point in grid(type(config), words) if words else []:
        name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{key}={value}" for key, value in point.items()))
        folder = Path(config.out_dir) / name
        saved, log = (folder / "ckpt.pt").exists(), read_log(folder / "log.jsonl")
        one = replace(config, **point, out_dir=folder.as_posix(), num_samples=0, resume=saved, overwrite=not saved)
        for key, value in asdict(one).items() if log else ():
            before = log[0]["config"].get(key, value)
            if key not in ("out_dir", *PER_START) and before != value:
                raise ValueError(f"{folder} holds a run with {key}={before}, now it is {value}; give another --out_dir")
        configs.append(one)
    return configs


def has_ended(folder) -> bool:
    """Whether a folder's run has come to an end, be it a score or a divergence."""
    return any("split" in line or "diverged" in line for line in read_log(Path(folder) / "log.jsonl")[-1:])


def sweep(config, words: list[str], main) -> int | None:
    """Train the points that have not ended one by one with main(config); then draw up all runs below config.out_dir
    (without words only that). Returns the signal that stopped it, or None."""
    for one in points(config, words):
        ended = has_ended(one.out_dir)
        print(f"\n{one.out_dir}:", "done before" if ended else "")
        try:
            interrupted = None if ended else main(one)["interrupted"]
        except FloatingPointError as error:
            print(error)
            continue
        if interrupted is not None:
            return interrupted
    if os.environ.get("RANK", "0") != "0":
        return None                        # one of torchrun's ranks draws up for all
    target, rows = Path(config.out_dir) / "sweep.json", sweep_rows(config.out_dir)
    target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    target.with_suffix(".txt").write_text(sweep_table(rows) + "\n", encoding="utf-8")
    print(sweep_table(rows))
    if all(row["mean"] is None for row in rows):
        print("every run has diverged, so there is nothing to draw; try smaller learning rates")
    else:
        plot_sweep(rows, target.with_suffix(".png"))


def sweep_rows(out_dir) -> list[dict]:
    """One dict for each setting among the runs below out_dir, its seeds side by side; best first, diverged last."""
    rows = {}
    for path in sorted(Path(out_dir).glob("*/log.jsonl")):
        if not has_ended(path.parent):
            continue
        log, parts = read_log(path), path.parent.name.split(",")
        setting = ",".join(part for part in parts if not part.startswith("seed=")) or "as configured"
        row = rows.setdefault(setting, {"setting": setting, "measure": "bits per byte", "scores": {}, "diverged": {}})
        last, seed, config = log[-1], log[0]["seed"], log[0]["config"]
        step_tokens = config["batch_tokens"] // config["context_length"] * config["context_length"]
        row |= {"steps": last["step"], "tokens": last["step"] * step_tokens, "seconds": last["seconds"]}
        if "diverged" in last:
            row["diverged"][seed] = last["step"]
        else:
            row["scores"][seed] = last["val_bits_per_byte"] or last["val_loss"]
            row["measure"] = "bits per byte" if last["val_bits_per_byte"] else "nats per token"
    if not rows:
        raise ValueError(f"no run below {out_dir} has ended; give the axes of a sweep, such as lr=1e-3,3e-3")
    for row in rows.values():
        scores = list(row["scores"].values())
        row["mean"] = statistics.mean(scores) if scores else None
        row["spread"] = statistics.stdev(scores) if len(scores) > 1 else None
    return sorted(rows.values(), key=lambda row: math.inf if row["mean"] is None else row["mean"])


def sweep_table(rows: list[dict]) -> str:
    """The rows as text in columns, under what they are and what the spread is."""
    cells = [["setting", rows[0]["measure"], "spread", "seeds", "steps", "tokens", "seconds", ""]]
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "spread")]
        lost = ", ".join(f"seed {seed} diverged at step {step}" for seed, step in row["diverged"].items())
        cells.append([row["setting"], *numbers, str(len(row["scores"])), f"{row['steps']:,}", f"{row['tokens']:,}",
                      f"{row['seconds']:.0f}", lost])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join(["spread: standard deviation over the seeds", *lines])


def plot_sweep(rows: list[dict], path) -> None:
    """Every run's score as a dot and each setting's mean as a bar, in the order of the settings' numbers."""
    from matplotlib.figure import Figure
    rows = sorted((row for row in rows if row["scores"]), reverse=True,
                  key=lambda row: [float(number) for number in re.findall(r"=([-+.\de]+)(?=,|$)", row["setting"])])
    axis = Figure(figsize=(7.5, 1.5 + 0.35 * len(rows)), layout="constrained").subplots()
    for y, row in enumerate(rows):
        axis.plot(list(row["scores"].values()), [y] * len(row["scores"]), "o", alpha=0.5, color="C0")
        axis.plot(row["mean"], y, "|", markersize=14, color="C1")
    axis.set(yticks=range(len(rows)), yticklabels=[row["setting"] for row in rows])
    axis.set_xlabel("validation, " + rows[0]["measure"])
    axis.set_title(f"python train.py sweep --out_dir={Path(path).parent.as_posix()}", fontsize=9)
    axis.figure.savefig(path, dpi=110)
    print(f"\n{path}")
