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

from checkpoint import write_text
from configurator import coerce, nearest

PER_START = ("resume", "overwrite")      # settings that say how a run is started, not what it is


# --- the log of one run ---

def header(**settings) -> dict:
    """What a reader needs to repeat a run: `settings`, and the commit of this program."""
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "python": platform.python_version()} | settings


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
            write_text(self.writing, *(json.dumps(line) + "\n" for line in lines))
        self.file = open(self.writing, "a", encoding="utf-8", buffering=1)            # a line at a time

    def write(self, **entry) -> None:
        """Add a line."""
        print(json.dumps(entry), file=self.file)

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
            raise ValueError(f"{word!r} spans no axis; write key=a,b with a setting as key.{nearest(key, hints)}")
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
        before = log[0]["config"] if log else {}
        changed = [key for key, value in asdict(one).items() if before.get(key, value) != value
                   and key not in ("out_dir", *PER_START)]
        if changed:
            raise ValueError(f"{folder} holds a run with another {', '.join(changed)}; give another --out_dir")
        configs.append(one)
    return configs


def last_line(folder) -> dict:
    """The line that ends the log of a run that has come to an end, be it a score or a divergence; else an empty one."""
    log = read_log(Path(folder) / "log.jsonl")
    return log[-1] if log and ("split" in log[-1] or "diverged" in log[-1]) else {}


def sweep(config, words: list[str], main) -> int | None:
    """Train the points that have not ended one by one with main(config); then draw up all runs below config.out_dir
    in sweep.txt and sweep.png (without words only that). Returns the signal that stopped it, or None."""
    for one in points(config, words):
        ended = last_line(one.out_dir)
        print(f"\n{one.out_dir}:", "done before" if ended else "")
        try:
            interrupted = None if ended else main(one)["interrupted"]
        except FloatingPointError as error:
            print(error)
            continue
        if interrupted is not None:
            return interrupted
    rows, table = sweep_rows(config.out_dir), Path(config.out_dir) / "sweep.txt"
    write_text(table, sweep_table(rows) + "\n")
    print(sweep_table(rows))
    if any(row["scores"] for row in rows):
        plot_sweep(rows, table.with_suffix(".png"))


def sweep_rows(out_dir) -> list[dict]:
    """One dict for each setting among the runs below out_dir, its seeds side by side; best first, diverged last."""
    rows = {}
    for path in sorted(Path(out_dir).glob("*/log.jsonl")):
        last = last_line(path.parent)
        if last:
            setting = ",".join(part for part in path.parent.name.split(",") if not part.startswith("seed="))
            row = rows.setdefault(setting, {"setting": setting or "as configured", "scores": {}, "diverged": {}})
            row |= {"steps": last["step"], "seconds": last["seconds"]}
            if "diverged" in last:
                row["diverged"][read_log(path)[0]["seed"]] = last["step"]
            else:
                row["scores"][read_log(path)[0]["seed"]] = last["val_bits_per_byte"] or last["val_loss"]
                row["measure"] = "bits per byte" if last["val_bits_per_byte"] else "nats per token"
    if not rows:
        raise ValueError(f"no run below {out_dir} has ended; give the axes of a sweep, such as lr=1e-3,3e-3")
    for row in rows.values():
        scores = list(row["scores"].values())
        row["mean"] = statistics.mean(scores) if scores else math.inf
        row["spread"] = statistics.stdev(scores) if len(scores) > 1 else math.nan
    return sorted(rows.values(), key=lambda row: row["mean"])


def sweep_table(rows: list[dict]) -> str:
    """The rows as text in columns, under what they are and what the spread is."""
    cells = [["setting", rows[0].get("measure", ""), "spread", "seeds", "steps", "seconds", ""]]
    for row in rows:
        lost = ", ".join(f"seed {seed} diverged at step {step}" for seed, step in row["diverged"].items())
        cells.append([row["setting"], f"{row['mean']:.4f}", f"{row['spread']:.4f}", str(len(row["scores"])),
                      f"{row['steps']:,}", f"{row['seconds']:.0f}", lost])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join(["spread: standard deviation over the seeds", *lines])


def plot_sweep(rows: list[dict], path) -> None:
    """Every run's score as a dot and each setting's mean as a bar, the best below."""
    from matplotlib.figure import Figure
    rows = [row for row in rows if row["scores"]]
    axis = Figure(figsize=(7.5, 1.5 + 0.35 * len(rows)), layout="constrained").subplots()
    for y, row in enumerate(rows):
        axis.plot(list(row["scores"].values()), [y] * len(row["scores"]), "o", alpha=0.5, color="C0")
        axis.plot(row["mean"], y, "|", markersize=14, color="C1")
    axis.set(yticks=range(len(rows)), yticklabels=[row["setting"] for row in rows])
    axis.set_xlabel("validation, " + rows[0]["measure"])
    axis.set_title(f"python train.py sweep --out_dir={Path(path).parent.as_posix()}", fontsize=9)
    axis.figure.savefig(path, dpi=110)
    print(f"\n{path}")
