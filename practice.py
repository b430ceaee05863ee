"""The pages as exercises: write a function yourself, checked by the tests of this project.

    python practice.py                          the exercises in the course's order, and how far you are
    python practice.py start rope               practice/rope/layers.py: layers.py without the body of rope
    python practice.py check rope               the tests of rope with your page in place of ours; a hint more each time
    python practice.py check rope --hint=true   two hints more
    python practice.py check all                all that you have begun
    python practice.py show rope                ours
    python practice.py reset rope               begin again; what you wrote moves to practice/saved/
    python practice.py predict [NAME]           experiments: say what comes out, then see what came out

    layers.py ──start──> practice/rope/layers.py ──you──> practice/rope/layers.py ──check──> passed, or
    def rope(x, …):      def rope(x, …):                  def rope(x, …):                    what failed
        '''x (..., T,        '''x (..., T,                    '''x (..., T,                  and a hint
        cos, sin = …         raise NotImplementedError        c, s = …

Every exercise has a folder with a copy of its page, all else in it ours; no command changes what you wrote. `check`
puts that folder before ours on Python's path: every page that imports layers gets yours. Exercises: exercises.toml.
"""
import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from configurator import command_line, fail, nearest

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "practice"                   # a folder for each exercise, and saved/
SECONDS = 60                                 # tests that take longer are ended


@dataclass
class NoConfig:
    """What all verbs but check can be told: nothing."""


@dataclass
class CheckConfig:
    hint: bool = False                       # true = one hint more than usual when it fails


# --- the table, and functions of a page ---

def read_table() -> tuple[dict, dict]:
    """(exercises, experiments) of exercises.toml, each {name: entry} in the course's order."""
    table = tomllib.loads((ROOT / "exercises.toml").read_text(encoding="utf-8"))
    return table, table.pop("predict")


def functions_of(text: str, names: list[str]) -> list[ast.FunctionDef]:
    """Functions of a page, top to bottom: "rope", "Linear.forward", or "Linear" for all methods of it."""
    functions = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            functions |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    return [node for name, node in functions.items() if name in names or name.split(".")[0] in names]


def page_to_fill(name: str, entry: dict) -> str:
    """The page of an exercise with an error in place of the bodies that are asked for; signature and docstring stay."""
    text = (ROOT / entry["page"]).read_text(encoding="utf-8")
    lines = text.split("\n")
    if entry.get("empty"):
        return "\n".join(lines[:ast.parse(text).body[0].end_lineno]) + "\n"
    for node in reversed(functions_of(text, entry["functions"])):        # from below: line numbers above stay true
        first = node.body[0]
        kept = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        lines[kept:node.end_lineno] = [" " * first.col_offset + f'raise NotImplementedError("practice: {name}")']
    return "\n".join(lines)


# --- verbs ---

def read_progress(name: str, entry: dict) -> dict:
    """{"hints": how many were shown, "state": "not begun", "begun" or, as the last check ended, "passed"}."""
    if not (FOLDER / name / entry["page"]).exists():
        return {"hints": 0, "state": "not begun"}
    return json.loads((FOLDER / name / "progress.json").read_text(encoding="utf-8"))


def write_progress(name: str, hints: int, state: str) -> None:
    """Note how far an exercise is."""
    (FOLDER / name / "progress.json").write_text(json.dumps({"hints": hints, "state": state}), encoding="utf-8")


def say(label: str, text: str) -> None:
    """Print a text in lines of 110, a label of six letters in front."""
    print(textwrap.fill(" ".join(text.split()), 110, initial_indent=f"{label:<7}", subsequent_indent=" " * 7,
                        break_long_words=False, break_on_hyphens=False))


def show_list(exercises: dict) -> None:
    """A line an exercise; what to do next goes to standard error, so that every line is an exercise."""
    states = {}
    for name, entry in exercises.items():
        states[name] = read_progress(name, entry)["state"]
        print(f"{name:<20} {entry['page']:<16} {entry['problem']:<34} {entry['minutes']:>3} min   {states[name]}")
    following = next((name for name in states if states[name] != "passed"), "NAME")
    print(f"{list(states.values()).count('passed')} of {len(exercises)} passed. Next: python practice.py start "
          f"{following}; experiments: python practice.py predict", file=sys.stderr)


def start(name: str, entry: dict, anew: bool) -> None:
    """Write the page that a learner fills, unless it is there, and say what is asked. anew: what is there is moved."""
    folder = FOLDER / name
    if anew and folder.exists():
        saved = FOLDER / "saved" / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        saved.parent.mkdir(exist_ok=True)
        folder.rename(saved)                             # an error, and nothing lost, where there is such a folder
        print(f"what you had is now practice/saved/{saved.name}/{entry['page']}")
    print(f"{name}: practice/{name}/{entry['page']}, about {entry['minutes']} minutes")
    if (folder / entry["page"]).exists():
        say("kept", f"the page as you left it; python practice.py reset {name} begins again and saves what is there")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_progress(name, 0, "begun")                 # first: a page has a progress.json beside it
        (folder / entry["page"]).write_text(page_to_fill(name, entry), encoding="utf-8")
    say("write", ", ".join(entry["functions"]))
    say("read", entry["read"])
    say("do", entry["task"])
    print(f"then   python practice.py check {name}")


def show(entry: dict) -> None:
    """The functions as they stand in our page."""
    text = (ROOT / entry["page"]).read_text(encoding="utf-8")
    for node in functions_of(text, entry["functions"]):
        print("\n".join(text.split("\n")[node.lineno - 1:node.end_lineno]) + "\n")


def show_outcome(entry: dict) -> None:
    """What came out of an experiment, why, and the figures that results/ has of it."""
    say(entry["right"], f"{entry['outcomes'][entry['right']]}. {entry['why']}")
    print(f"{entry['file']}, by {entry['command']}:")
    for line in (ROOT / entry["file"]).read_text(encoding="utf-8").splitlines():
        if any(words in line for words in entry["lines"]):
            print("  " + line.strip())


# --- check: in a process of its own ---

def environment(folder: Path) -> dict:
    """What the process of a check gets: a folder's pages before ours, whoever starts what; Triton interpreted."""
    paths = [str(folder), str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # SAFEPATH: a script's own folder would come before PYTHONPATH, and a test that starts one would run our pages.
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1",
                         "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                         "PRACTICE_FOLDER": str(folder)}


def run_limited(words: list[str], folder: Path) -> tuple[int | None, list[str]]:
    """(exit status, or None where it was ended; the lines it printed) of Python with the pages of this folder."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=FOLDER,
                               env=environment(folder), encoding="utf-8", errors="replace", start_new_session=True)
    try:
        said, _ = process.communicate(timeout=SECONDS)
        return process.returncode, said.strip().splitlines()
    except subprocess.TimeoutExpired:
        return None, [f"ended after {SECONDS} s: it does not come to an end, or is far too slow"]
    finally:
        if process.poll() is None:                       # too slow, or Ctrl-C: it ends with all that it has started
            if os.name == "nt":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            else:
                os.killpg(process.pid, signal.SIGKILL)


def check(name: str, entry: dict, n_hints: int) -> bool:
    """Run an exercise's tests, say what came of it, and show n_hints hints more; returns whether they hold."""
    progress = read_progress(name, entry)
    if progress["state"] == "not begun":
        print(f"{name} is not begun: python practice.py start {name}")
        return False
    # All that is printed comes from tests/explain.py; its exit status is not 0 either when every test was skipped.
    words = ["-m", "pytest", "--maxfail=1", "--rootdir", str(ROOT), "-p", "explain", "-p", "no:terminal",
             "-p", "no:cacheprovider", *(str(ROOT / "tests" / test) for test in entry["tests"])]
    status, said = run_limited(words, FOLDER / name)
    passed, failed = status == 0, status in (1, None)    # neither: the page cannot be imported, and no hint helps
    print("\n  ".join([f"{name}: passed"] if passed else [f"{name}: not yet", *said[-20 if failed else -4:]]))
    if failed and n_hints:
        progress["hints"] = min(progress["hints"] + n_hints, len(entry["hints"]))
        for number, text in enumerate(entry["hints"][:progress["hints"]], 1):
            say(f"hint {number}", text)
        if progress["hints"] == len(entry["hints"]):
            print(f"no more hints; ours: python practice.py show {name}")
    write_progress(name, progress["hints"], "passed" if passed else "begun")
    if passed and n_hints and "speed" in entry:
        for whose, folder in (("yours", FOLDER / name), ("ours", ROOT)):
            _, said = run_limited(["-m", "timeit", "-u", "msec", "-s", entry["setup"], entry["speed"]], folder)
            say(whose, f"{entry['speed']}: {said[-1]}")
    return passed


# --- the command ---

USAGE = "usage: python practice.py [start NAME | check NAME | check all | show NAME | reset NAME | predict [NAME]]"
VERBS = {"start": NoConfig, "check": CheckConfig, "show": NoConfig, "reset": NoConfig, "predict": NoConfig}


def main(argv: list[str]) -> int:
    """Run a command; the exit status."""
    verb, words, config, _ = command_line(VERBS if argv else {None: NoConfig}, argv, USAGE)
    exercises, experiments = read_table()
    table, name = experiments if verb == "predict" else exercises, " ".join(words)
    if verb is None:
        show_list(exercises)
    elif verb == "check" and name == "all":
        results = [check(name, exercises[name], 0) for name in exercises if (FOLDER / name).exists()]
        if not results:
            fail("nothing is begun: python practice.py start NAME")
        return 0 if all(results) else 1
    elif verb == "predict" and not words:
        for name, entry in experiments.items():
            say(f"{name}: ", entry["question"])
            say("", "; ".join(f"{letter}) {outcome}" for letter, outcome in entry["outcomes"].items()))
    elif name not in table:
        fail(f"{name!r} must be one NAME of the list.{nearest(name, table)} {USAGE}")
    elif verb == "check":
        return 0 if check(name, exercises[name], 2 if config.hint else 1) else 1
    elif verb == "show":
        show(exercises[name])
    elif verb == "predict":
        show_outcome(experiments[name])
    else:
        start(name, exercises[name], anew=verb == "reset")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")             # a console without Σ or ᵀ shows a question mark
    sys.exit(main(sys.argv[1:]))
