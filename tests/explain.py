"""A plugin of pytest for `python practice.py check`: what failed goes to a file, in a few lines for a learner."""
import json
import os
import re
from pathlib import Path

import numpy as np
import torch

TESTS, FOLDER = Path(__file__).resolve().parent, Path(os.environ["PRACTICE_FOLDER"])     # the learner's page
SHOWN = (int, float, str, bytes, list, tuple, dict, set, type(None), np.ndarray, torch.Tensor)
SEEN = {"passed": 0, "skipped": [], "failure": []}


def describe(value) -> str:
    """A value in one line: shape, dtype and first numbers of a tensor or array, else its repr, cut."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        numbers = ", ".join(f"{number:.4g}" for number in value.reshape(-1)[:6].tolist())
        more = ", …" if len(value.reshape(-1)) > 6 else ""
        return f"shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} [{numbers}{more}]"
    words = repr(value)
    return words if len(words) <= 100 else words[:97] + "…"


def explain(excinfo) -> list[str]:
    """Where it failed, in the test and in the learner's page, why, and the values of the names in that line."""
    frames = [entry for entry in excinfo.traceback if Path(entry.path).parent in (TESTS, FOLDER)]
    in_tests, in_page = ([frame for frame in frames if Path(frame.path).parent == folder] for folder in (TESTS, FOLDER))
    lines = []
    for frame in (*in_tests[:1], *in_tests[1:][-1:], *in_page[-1:]):     # the test, its helper, the learner's line
        folder = "practice/checked" if frame in in_page else "tests"
        statement = " ".join(str(frame.statement).split())
        lines.append(f"{folder}/{Path(frame.path).name}:{frame.lineno + 1} in {frame.name}: {statement[:160]}")
    # pytest's " + where tensor(…) = <built-in method …>": the shapes and first numbers below say more in less.
    why = [line for line in excinfo.exconly(tryshort=True).splitlines()
           if not (line.startswith(" + ") and re.search("tensor\\(|Tensor object|<built-in", line))]
    lines += why if len(why) <= 10 else why[:2] + ["…"] + why[-7:]
    if frames:
        words = set(re.findall(r"\w+", str(frames[-1].statement)))
        for name, value in frames[-1].locals.items():
            if len(lines) < 20 and isinstance(value, SHOWN) and not name.startswith("@") and (
                    name in words or hasattr(value, "shape")):
                lines.append(f"{name}: {describe(value)}")
    return lines


def pytest_exception_interact(call, report) -> None:
    """The first failure, in words; also of a page that cannot be imported."""
    if not SEEN["failure"]:
        try:
            SEEN["failure"] = explain(call.excinfo)
        except Exception as error:                       # a strange value: better the plain message than none
            SEEN["failure"] = [call.excinfo.exconly(), f"({type(error).__name__} while reading the values: {error})"]
        SEEN["failure"] += [f"it printed: {line}" for line in getattr(report, "capstdout", "").splitlines()[-5:]]


def pytest_runtest_logreport(report) -> None:
    """Count what passed: an exercise whose tests were all skipped has not passed."""
    if report.when == "call" and report.passed:
        SEEN["passed"] += 1
    if report.skipped:
        SEEN["skipped"].append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))


def pytest_sessionfinish() -> None:
    """Leave it all for the process that waits."""
    (FOLDER / "report.json").write_text(json.dumps(SEEN), encoding="utf-8")
