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
import statistics
import subprocess
import typing
from dataclasses import asdict, replace
from pathlib import Path

from checkpoint import write_text
from configurator import coerce, nearest

PER_START = ("resume", "overwrite", "out_dir")      # settings that say how and where a run is started, not what it is


def header(**settings) -> dict:
    """What a reader needs to repeat a run: `settings`, and the commit of this program."""
    status, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse HEAD')
    return {"commit": None if status else commit, "python": platform.python_version()} | settings


class Log:
    """OUT_DIR/log.jsonl, open for further lines; with out_dir None (a rank that does not speak) they go nowhere.

    resume_step: keep the lines up to this step, and add a header when a setting has changed. Otherwise the log starts
    anew; beside a former run's checkpoint as log.new.jsonl, until `replace_former`.
    """

    def __init__(self, out_dir, header: dict, resume_step: int | None = None):
        self.path = self.writing = Path(os.devnull) if out_dir is None else Path(out_dir) / "log.jsonl"
        lines = [header]
        if resume_step is not None and self.path.is_file():
            lines = [line for line in read_log(self.path) if line.get("step", 0) <= resume_step]
            before = [what_it_is(line) for line in lines if "config" in line]
            if before[-1:] != [what_it_is(header)]:
                lines.append({"step": resume_step} | header)
        elif resume_step is None and any(self.path.with_name(name).exists() for name in ("ckpt.pt", "best.pt")):
            self.writing = self.path.with_name("log.new.jsonl")
        if out_dir is not None:
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
    return header | {"step": None, "config": header["config"] | dict.fromkeys(PER_START)}


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl, none where there is no file; a last line that a kill cut short is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1] if Path(path).exists() else []
    return [json.loads(line) for line in lines]


def plot(out_dirs, folder=None) -> Path:
    """Draw losses over steps and time to FOLDER/loss.png (the first run's); returns its path. Skips what is no run."""
    from matplotlib.figure import Figure
    runs = [out_dir for out_dir in out_dirs if (Path(out_dir) / "log.jsonl").is_file()]
    if not runs:
        raise ValueError(f"no log.jsonl in {', '.join(map(str, out_dirs)) or 'none'}; plot needs the folders of runs")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for color, out_dir in enumerate(runs):
        log, name = read_log(Path(out_dir) / "log.jsonl"), Path(out_dir).name
        for key, style in (("loss", {"alpha": 0.4}), ("val_loss", {"marker": "o", "markersize": 3})):
            for axis, x in zip(axes, ("step", "seconds")):
                points = [(line[x], line[key]) for line in log if key in line and x in line]
                axis.plot(*zip(*points), color=f"C{color}", linewidth=1, label=f"{name} {key}", **style)
    axes[0].set(xlabel="step", ylabel="nats per token")
    axes[0].legend()
    axes[1].set_xlabel("training time, seconds")
    figure.suptitle(("python train.py plot " + " ".join(map(str, runs)))[:150], fontsize=9)
    path = Path(folder or runs[0]) / "loss.png"
    figure.savefig(path, dpi=110)
    return path


def grid(config, words: list[str]) -> list:
    """The config of each point that words such as `lr=1e-3,3e-3` and `seed=1,2` span, the last word moving fastest,
    each in its own folder below config.out_dir. One that was interrupted goes on."""
    hints, axes, configs = typing.get_type_hints(type(config)), [], []
    for word in words:
        key, _, values = word.partition("=")
        if not values or key not in hints or key in PER_START or key in [axis[0][0] for axis in axes]:
            raise ValueError(f"{word!r} spans no axis; write key=a,b, a setting as key, once.{nearest(key, hints)}")
        axes.append([(key, coerce(key, value, hints[key])) for value in values.split(",")])
    for point in itertools.product(*axes) if words else ():
        name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{key}={value}" for key, value in point))
        folder = Path(config.out_dir) / name
        saved = (folder / "ckpt.pt").exists()
        started = {"out_dir": folder.as_posix(), "num_samples": 0, "resume": saved, "overwrite": not saved}
        configs.append(replace(config, **dict(point) | started))
        for line in read_log(folder / "log.jsonl")[:1]:
            changed = [key for key, value in asdict(configs[-1]).items()
                       if key not in PER_START and line["config"].get(key, value) != value]
            if changed:
                raise ValueError(f"{folder} holds a run with another {', '.join(changed)}; give another --out_dir")
    return configs


def last_line(folder) -> dict:
    """The line that ends the log of a run that has come to an end, be it a score or a divergence; else an empty one."""
    log = read_log(Path(folder) / "log.jsonl")
    return log[-1] if log and ("split" in log[-1] or "diverged" in log[-1]) else {}


def sweep(config, words: list[str], main) -> int | None:
    """Train the points that have not ended one by one with main(config); then tabulate all runs below config.out_dir
    in sweep.txt (without words only that). Returns the signal that stopped it, or None."""
    for one in grid(config, words):
        ended = last_line(one.out_dir)
        print(f"\n{one.out_dir}:", "done before" if ended else "")
        try:
            interrupted = None if ended else main(one)["interrupted"]
        except FloatingPointError as error:
            print(error)
            continue
        if interrupted is not None:
            return interrupted
    rows = sweep_rows(config.out_dir)
    width = max(len(row["setting"]) for row in rows)
    table = ["score: validation bits per byte (without meta.json nats per token); spread: deviation over the seeds",
             f"{'setting':<{width}}     score    spread  seeds   steps  seconds"]
    for row in rows:
        lost = "".join(f"  seed {seed} diverged at step {step}" for seed, step in row["diverged"].items())
        table.append(f"{row['setting']:<{width}}  {row['mean']:8.4f}  {row['spread']:8.4f}  {len(row['scores']):5}  "
                     f"{row['steps']:6,}  {row['seconds']:7.0f}{lost}")
    print("\n".join(table))
    write_text(Path(config.out_dir) / "sweep.txt", *(line + "\n" for line in table))


def sweep_rows(out_dir) -> list[dict]:
    """One dict for each setting among the runs below out_dir, its seeds side by side; best first, diverged last."""
    rows = {}
    for path in sorted(Path(out_dir).glob("*/log.jsonl")):
        last = last_line(path.parent)
        if last:
            setting = ",".join(part for part in path.parent.name.split(",") if not part.startswith("seed="))
            row = rows.setdefault(setting, {"setting": setting or "as configured", "scores": {}, "diverged": {}})
            row |= {"steps": last["step"], "seconds": last["seconds"]}
            seed = read_log(path)[0]["seed"]
            if "diverged" in last:
                row["diverged"][seed] = last["step"]
            else:
                row["scores"][seed] = last["val_bits_per_byte"] or last["val_loss"]
    if not rows:
        raise ValueError(f"no run below {out_dir} has ended; give the axes of a sweep, such as lr=1e-3,3e-3")
    for row in rows.values():
        scores = list(row["scores"].values())
        row["mean"] = statistics.mean(scores) if scores else math.inf
        row["spread"] = statistics.stdev(scores) if len(scores) > 1 else math.nan
    return sorted(rows.values(), key=lambda row: row["mean"])
