"""Runs on record: the log of one, the picture of several, the table of a grid.

A run writes OUT_DIR/log.jsonl, one JSON object a line, and each line is on the disk when it is written:

    {"commit": ..., "torch": ..., "device": ..., "seed": ..., "config": {every setting}, ...}      the header
    {"step": 100, "seconds": 8.1, "loss": 5.02, "lr": 0.008, "norm": 0.31, "ms": 80.4, ...}        a logging step
    {"step": 200, "seconds": 16.2, "val_loss": 4.61, "val_bits_per_byte": 2.31}                    an evaluation

Everything else is read from there: `plot` draws the curves of some runs, `sweep` trains a grid of settings and seeds
and draws up what came of it. One seed proves little: give seed=1,2,3, and read a difference beside the spread.

    python train.py plot out/a out/b
    python train.py sweep lr=1e-3,3e-3 seed=1,2,3 --max_steps=500 --out_dir=out/rates
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
    """What a reader needs to repeat a run: `settings`, and this program's commit."""
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {"commit": commit or None, "python": platform.python_version()} | settings


def _same(header: dict, before: dict) -> bool:
    plain = [{**line, "step": 0, "config": {key: value for key, value in line["config"].items() if key not in PER_START}}
             for line in (header, before)]
    return plain[0] == plain[1]


class Log:
    """OUT_DIR/log.jsonl, open for further lines; with out_dir None (a rank that does not speak) they go nowhere.

    resume_step: go on behind the lines up to this step. Those after it were written by steps that will be taken again;
    a header of its own follows if a setting has changed. Without it the log starts anew, and beside the checkpoint of
    a former run as log.new.jsonl, until `replace_former`.
    """

    def __init__(self, out_dir, header: dict, resume_step: int | None = None):
        if out_dir is None:
            self.file = open(os.devnull, "w", encoding="utf-8")
            return
        self.path, lines = Path(out_dir) / "log.jsonl", [header]
        self.writing = self.path
        if resume_step is not None and self.path.exists():
            lines = [line for line in read_log(self.path) if line.get("step", 0) <= resume_step]
            headers = [line for line in lines if "config" in line]
            if not headers or not _same(header, headers[-1]):
                lines.append({"step": resume_step} | header)
        elif resume_step is None and any((self.path.with_name(name)).exists() for name in ("ckpt.pt", "best.pt")):
            self.writing = self.path.with_name("log.new.jsonl")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.writing, lambda file: file.write(text.encode()))
        self.file = open(self.writing, "a", encoding="utf-8", buffering=1)            # a line at a time

    def write(self, **entry) -> None:
        """One line. Raises OSError naming the file when the disk is full."""
        try:
            print(json.dumps(entry), file=self.file)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the run's log cannot be written", str(self.writing)) from error

    def replace_former(self) -> None:
        """The former run's checkpoint is gone: this log takes the place of its log."""
        self.file.close()
        os.replace(self.writing, self.path)
        self.writing = self.path
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        self.file.close()


def read_log(path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a kill cut short is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def plot(out_dirs, folder=None) -> Path:
    """Draw losses and learning rate of runs, by step and by second, to FOLDER/loss.png (the first run's); its path.

    What holds no log is skipped. Raises ValueError when nothing is left.
    """
    from matplotlib.figure import Figure
    runs = [out_dir for out_dir in out_dirs if (Path(out_dir) / "log.jsonl").is_file()]
    if not runs:
        raise ValueError(f"no log.jsonl in {', '.join(map(str, out_dirs)) or 'nothing'}; plot needs the folders of runs: "
                         "python train.py plot out/a out/b")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 1))
    for number, out_dir in enumerate(runs):
        log = read_log(Path(out_dir) / "log.jsonl")
        for key, row, name, style in (("loss", 0, "train", {"alpha": 0.4}), ("lr", 1, None, {}),
                                      ("val_loss", 0, "validation", {"marker": "o", "markersize": 3})):
            for axis, x in zip(axes[row], ("step", "seconds")):
                lines = [line for line in log if key in line and x in line]
                axis.plot([line[x] for line in lines], [line[key] for line in lines], color=f"C{number}", linewidth=1,
                          label=name and f"{Path(out_dir).name} {name}", **style)
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[0, 0].legend()
    axes[1, 0].set(xlabel="step", ylabel="learning rate")
    axes[1, 1].set_xlabel("training time, seconds")
    command = "python train.py plot " + " ".join(map(str, runs))
    figure.suptitle(command if len(command) < 150 else command[:147] + " …", fontsize=9)
    path = Path(folder or runs[0]) / "loss.png"
    figure.savefig(path, dpi=110)
    return path


# --- a grid of runs ---

def grid(config_class: type, words: list[str]) -> list[dict]:
    """The settings of each point that words such as `lr=1e-3,3e-3` and `seed=1,2` span; the last word moves fastest.

    Raises ConfigError for a word that is no setting with values.
    """
    hints, axes = typing.get_type_hints(config_class), []
    for word in words:
        key, _, values = word.partition("=")
        if not values or key not in hints or key in ("out_dir", *PER_START):
            raise ConfigError(f"{word!r} spans no axis; write key=a,b with a setting as key.{nearest(key, hints)} "
                              "--help lists them all")
        axes.append([(key, coerce(key, value, hints[key])) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def points(config, words: list[str]) -> list:
    """The config of each point of a grid, in its own folder below config.out_dir; what was interrupted goes on.

    Raises ValueError for a point that cannot be, and for a folder that holds a run with other settings.
    """
    configs = []
    for point in grid(type(config), words) if words else []:
        name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{key}={value}" for key, value in point.items()))
        folder = Path(config.out_dir) / name
        saved = (folder / "ckpt.pt").exists()
        configs.append(replace(config, **point, out_dir=folder.as_posix(), num_samples=0, resume=saved,
                               overwrite=not saved))
    for one in configs:
        log = read_log(Path(one.out_dir) / "log.jsonl") if (Path(one.out_dir) / "log.jsonl").exists() else []
        for key, value in asdict(one).items() if log else ():
            before = log[0]["config"].get(key, value)
            if key not in ("out_dir", *PER_START) and before != value:
                raise ValueError(f"{one.out_dir} holds a run with {key}={before}, now it is {value}; give another "
                                 "--out_dir, or delete that folder")
    return configs


def has_ended(out_dir) -> bool:
    """Whether a run has come to its end, be it a score or a divergence."""
    path = Path(out_dir) / "log.jsonl"
    last = (read_log(path) if path.exists() else [{}])[-1]
    return "split" in last or "diverged" in last


def sweep(config, words: list[str], main) -> int | None:
    """Train the points of the grid one by one with main(config); then draw up all runs below config.out_dir.

    A point that has ended is not run again. Without words only the table is made: several sweeps into one folder share
    it. Returns the signal that stopped it, or None.
    """
    for one in points(config, words):
        if has_ended(one.out_dir):
            print(f"\n{one.out_dir}: done before")
            continue
        print(f"\n{one.out_dir}:")
        try:
            interrupted = main(one)["interrupted"]
        except FloatingPointError as error:
            print(error)
            continue
        if interrupted is not None:
            return interrupted
    if os.environ.get("RANK", "0") != "0":
        return None                        # one of torchrun's ranks draws up for all
    target, rows = Path(config.out_dir) / "sweep", sweep_rows(config.out_dir)
    text = sweep_table(rows)
    target.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    target.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    if any(row["scores"] for row in rows):
        plot_sweep(rows, target.with_suffix(".png"))
        print(f"\n{target.with_suffix('.png')}")
    else:
        print("\nno run came to an end without diverging, so there is nothing to draw; try smaller learning rates")


def sweep_rows(out_dir) -> list[dict]:
    """One dict for each setting among the runs below out_dir, its seeds side by side; best first, diverged last."""
    rows = {}
    for path in sorted(Path(out_dir).glob("*/log.jsonl")):
        if not has_ended(path.parent):
            continue
        log, parts = read_log(path), path.parent.name.split(",")
        setting = ",".join(part for part in parts if not part.startswith("seed=")) or "as configured"
        row = rows.setdefault(setting, {"setting": setting, "measure": None, "mean": None, "spread": None,
                                        "scores": {}, "diverged": {}})
        last, seed, shape = log[-1], log[0]["seed"], log[0]["model_config"]
        sequences = log[0]["config"]["batch_tokens"] // shape["context_length"]
        row["steps"], row["seconds"] = last["step"], last["seconds"]
        row["tokens"] = last["step"] * sequences * shape["context_length"]
        if "diverged" in last:
            row["diverged"][seed] = last["step"]
            continue
        in_bits = last["val_bits_per_byte"] is not None
        row["scores"][seed] = last["val_bits_per_byte"] if in_bits else last["val_loss"]
        row["measure"] = "bits per byte" if in_bits else "nats per token"
    for row in rows.values():
        scores = list(row["scores"].values())
        row["mean"] = statistics.mean(scores) if scores else None
        row["spread"] = statistics.stdev(scores) if len(scores) > 1 else None
    if not rows:
        raise ValueError(f"no run below {out_dir} has ended; give the axes of a sweep, such as lr=1e-3,3e-3")
    return sorted(rows.values(), key=lambda row: math.inf if row["mean"] is None else row["mean"])


def sweep_table(rows: list[dict]) -> str:
    """The rows as text in columns."""
    measure = next((row["measure"] for row in rows if row["measure"]), "score")
    cells = [["setting", measure, "spread", "seeds", "steps", "tokens", "seconds", ""]]
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "spread")]
        lost = ", ".join(f"seed {seed} diverged at step {step}" for seed, step in row["diverged"].items())
        cells.append([row["setting"], *numbers, str(len(row["scores"])), f"{row['steps']:,}", f"{row['tokens']:,}",
                      f"{row['seconds']:.0f}", lost])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
             for line in cells]
    return "spread: standard deviation over the seeds\n" + "\n".join(line.rstrip() for line in lines)


def plot_sweep(rows: list[dict], path) -> None:
    """Every run's score as a dot and each setting's mean as a bar; in the order of the settings' numbers."""
    from matplotlib.figure import Figure

    def by_numbers(row):
        return [float(number) for number in re.findall(r"=([-+.\de]+)(?=,|$)", row["setting"])]

    rows = sorted((row for row in rows if row["scores"]), key=by_numbers, reverse=True)
    axis = Figure(figsize=(7.5, 1.5 + 0.35 * len(rows)), layout="constrained").subplots()
    for y, row in enumerate(rows):
        axis.plot(list(row["scores"].values()), [y] * len(row["scores"]), "o", alpha=0.5, color="C0")
        axis.plot(row["mean"], y, "|", markersize=14, color="C1")
    axis.set(yticks=range(len(rows)), yticklabels=[row["setting"] for row in rows])
    axis.set_xlabel("validation, " + rows[0]["measure"])
    axis.set_title(f"python train.py sweep --out_dir={Path(path).parent.as_posix()}", fontsize=9)
    axis.figure.savefig(path, dpi=110)
