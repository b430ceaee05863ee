"""The pages as exercises: write a function yourself, checked by the tests of this project.

    python practice.py                          the exercises in the course's order, and how far you are
    python practice.py start rope               practice/layers.py: layers.py without the bodies of rope
    python practice.py check rope               the tests of rope with your page in place of ours; a hint more each time
    python practice.py check rope --hint=true   two hints more
    python practice.py check all                all that you have begun
    python practice.py show rope                ours
    python practice.py reset rope               begin again; your page is copied to practice/saved/ first
    python practice.py predict [NAME]           experiments: say what comes out (--answer=a), see what came out

    layers.py ──start──> practice/layers.py ──you──> practice/layers.py ──check──> passed, or
    def rope(x, …):      def rope(x, …):             def rope(x, …):               what failed
        '''x (..., T,        '''x (..., T,               '''x (..., T,             and a hint
        cos, sin = …         raise NotImplementedError   c, s = …

A second exercise of the same page takes its functions out of the copy that is there; what you wrote stays. `check` puts
your page before ours on Python's path: every page that imports layers gets yours. Exercises: exercises.toml. To begin a
page anew, or to stop, delete the file, or practice/.
"""
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from checkpoint import write_text
from configurator import command_line, fail, nearest

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "practice"                   # the learner's pages, progress.json, saved/
STUB = 'raise NotImplementedError("practice: '  # NAME"): what stands in a function that an exercise asks for
SECONDS = 60                                 # tests that take longer are ended


@dataclass
class PracticeConfig:
    overwrite: bool = False                  # of start: true = as reset does
    hint: bool = False                       # of check: true = one hint more than usual when it fails
    answer: str | None = None                # of predict: the letter of what you expect


# --- the table, and functions of a page ---

def read_table() -> tuple[dict, dict]:
    """(exercises, experiments) of exercises.toml, each {name: entry} in the course's order."""
    table = tomllib.loads((ROOT / "exercises.toml").read_text(encoding="utf-8"))
    return table, table.pop("predict")


def read_page(path: Path, names: list[str] | None = None) -> tuple[list[str], dict[str, ast.FunctionDef]]:
    """(lines, functions from top to bottom) of a page. names: "rope", "Linear.forward", "Linear" for all its methods.

    Raises SyntaxError where Python cannot read it.
    """
    text, functions = path.read_text(encoding="utf-8-sig"), {}
    for node in ast.parse(text, path.name).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                name = part.name if part is node else f"{node.name}.{part.name}"
                functions.pop(name, None)                # of two by a name the lower counts, in Python too
                functions[name] = part
    chosen = [name for name in functions if names is None or name in names or name.split(".")[0] in names]
    return text.split("\n"), {name: functions[name] for name in chosen}


def span(node: ast.AST) -> slice:
    """Where a function stands among the lines of its page."""
    return slice(node.lineno - 1, node.end_lineno)


def take_out(page: Path, name: str, entry: dict, anew: bool = False) -> tuple[str, list[str]]:
    """(the page with an error in place of the bodies that are asked for, functions that the learner wrote and keeps).

    Signature and docstring stay. anew: the learner keeps none. Raises ValueError where a function is gone.
    """
    our_lines, ours = read_page(ROOT / entry["page"], entry["functions"])
    if entry.get("empty"):
        return "\n".join(our_lines[span(ast.parse("\n".join(our_lines)).body[0])]) + "\n", []
    (lines, theirs), kept = read_page(page, list(ours)), []
    if len(theirs) < len(ours):
        raise ValueError(f"{', '.join(ours.keys() - theirs.keys())} is gone: write its first line again")
    for function in reversed(theirs):                    # from below: line numbers above stay true
        node, part, first = ours[function], span(theirs[function]), ours[function].body[0]
        if anew or lines[part] == our_lines[span(node)]:
            end = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
            lines[part] = [*our_lines[node.lineno - 1:end], f'{" " * first.col_offset}{STUB}{name}")']
        elif STUB not in "\n".join(lines[part]):
            kept.append(function)
    return "\n".join(lines), kept


# --- verbs ---

def read_progress(exercises: dict) -> dict:
    """{name: {"hints": how many were shown, "state": "begun" or, as the last check ended, "passed"}} of what is begun.

    Nothing of a page is begun any more when the page was deleted.
    """
    path = FOLDER / "progress.json"
    try:
        progress = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it; your pages stay") from None
    return {name: progress[name] for name, entry in exercises.items()
            if name in progress and (FOLDER / entry["page"]).exists()}


def say(label: str, text: str) -> None:
    """Print a text in lines of 110, a label of six letters in front."""
    print(textwrap.fill(" ".join(text.split()), 110, initial_indent=f"{label:<7}", subsequent_indent=" " * 7,
                        break_long_words=False, break_on_hyphens=False))


def show_list(exercises: dict) -> None:
    """A line an exercise; what to do next goes to standard error, so that every line is an exercise."""
    states = dict.fromkeys(exercises, "not begun")
    states |= {name: done["state"] for name, done in read_progress(exercises).items()}
    for name, entry in exercises.items():
        print(f"{name:<20} {entry['page']:<16} {entry['problem']:<34} {entry['minutes']:>3} min   {states[name]}")
    following = next((name for name in states if states[name] != "passed"), "NAME")
    print(f"{list(states.values()).count('passed')} of {len(exercises)} passed. Next: python practice.py start "
          f"{following}; experiments: python practice.py predict", file=sys.stderr)


def start(name: str, exercises: dict, anew: bool) -> None:
    """Take an exercise out of the learner's page, unless it was begun before, and say what is asked. anew: always."""
    entry, progress = exercises[name], read_progress(exercises)
    page, kept = FOLDER / entry["page"], entry["functions"]
    if anew or not (name in progress or (entry.get("empty") and page.exists())):
        text, kept = take_out(page if page.exists() else ROOT / entry["page"], name, entry, anew)
        (FOLDER / "saved").mkdir(parents=True, exist_ok=True)
        if anew and page.exists():
            saved = FOLDER / "saved" / f"{page.stem}_{time.strftime('%Y-%m-%d_%H-%M-%S')}.py"
            with open(saved, "xb") as file:              # x: an error, and nothing lost, where there is such a file
                file.write(page.read_bytes())
            print(f"what you had is saved as practice/saved/{saved.name}")
        write_text(page, text)                           # at once: a full disk leaves the page as it was
    if anew or name not in progress:
        progress[name] = {"hints": 0, "state": "begun"}
        write_text(FOLDER / "progress.json", json.dumps(progress))
    print(f"{name}: practice/{entry['page']}, about {entry['minutes']} minutes")
    if kept:
        say("kept", f"{', '.join(kept)} as in your page; python practice.py reset {name} begins again and saves it")
    say("write", ", ".join(entry["functions"]))
    say("read", entry["read"])
    say("do", entry["task"])
    print(f"then   python practice.py check {name}")


def show(entry: dict) -> None:
    """The functions as they stand in our page."""
    lines, functions = read_page(ROOT / entry["page"], entry["functions"])
    for node in functions.values():
        print("\n".join(lines[span(node)]) + "\n")


def show_outcome(entry: dict, answer: str | None) -> None:
    """What came out of an experiment, why, and the figures that results/ has of it. answer: what a learner expects."""
    if answer is not None:
        print("yes" if answer == entry["right"] else "no")
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
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
                               env=environment(folder), encoding="utf-8", errors="replace", start_new_session=True)
    try:
        said, _ = process.communicate(timeout=SECONDS)
        return process.returncode, said.replace(str(folder), "practice").strip().splitlines()
    except subprocess.TimeoutExpired:
        return None, [f"ended after {SECONDS} s: it does not come to an end, or is far too slow"]
    finally:
        if process.poll() is None:                       # too slow, or Ctrl-C: it ends with all that it has started
            if os.name == "nt":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            else:
                os.killpg(process.pid, signal.SIGKILL)


def write_checked(name: str, page: str, folder: Path) -> None:
    """The learner's page in a folder, with ours of what other exercises have taken out and nobody has written yet."""
    # Ours is longer than what it replaces, and moves the lines below: lines.json has the number of each line in the
    # learner's page, 0 for a line of ours, and tests/explain.py prints that.
    (our_lines, ours), (lines, theirs) = read_page(ROOT / page), read_page(FOLDER / page)
    numbers = [*range(1, len(lines) + 1)]
    for function in reversed(theirs):                    # from below
        part = span(theirs[function])
        source = "\n".join(lines[part])
        if STUB in source and f'{STUB}{name}"' not in source and function in ours:
            lines[part] = our_lines[span(ours[function])]
            numbers[part] = [0] * len(our_lines[span(ours[function])])
    (folder / page).write_text("\n".join(lines), encoding="utf-8")
    (folder / "lines.json").write_text(json.dumps(numbers), encoding="utf-8")


def check(name: str, exercises: dict, n_hints: int) -> bool:
    """Run an exercise's tests, say what came of it, and show n_hints hints more; returns whether they hold."""
    entry, done = exercises[name], read_progress(exercises).get(name)
    if done is None:
        print(f"{name} is not begun: python practice.py start {name}")
        return False
    # All that is printed comes from tests/explain.py; its exit status is not 0 either when every test was skipped.
    words = ["-m", "pytest", "--maxfail=1", "--rootdir", str(ROOT), "-p", "explain", "-p", "no:terminal",
             "-p", "no:cacheprovider", *(str(ROOT / "tests" / test) for test in entry["tests"])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            write_checked(name, entry["page"], Path(folder))
            status, said = run_limited(words, folder)
        except (SyntaxError, ValueError) as error:
            status, said = 2, [f"practice/{entry['page']} cannot be read: {error}"]
        passed, failed = status == 0, status in (1, None)    # neither: it cannot be imported, and no hint helps
        print("\n  ".join([f"{name}: passed"] if passed else [f"{name}: not yet", *said[-20 if failed else -4:]]))
        if failed and n_hints:
            done["hints"] = min(done["hints"] + n_hints, len(entry["hints"]))
            for number, text in enumerate(entry["hints"][:done["hints"]], 1):
                say(f"hint {number}", text)
            if done["hints"] == len(entry["hints"]):
                print(f"no more hints; ours: python practice.py show {name}")
        if passed and n_hints and "speed" in entry:
            for whose, place in (("yours", folder), ("ours", ROOT)):
                _, said = run_limited(["-m", "timeit", "-u", "msec", "-s", entry["setup"], entry["speed"]], place)
                say(whose, f"{entry['speed']}: {said[-1]}")
    progress = read_progress(exercises) | {name: done | {"state": "passed" if passed else "begun"}}
    write_text(FOLDER / "progress.json", json.dumps(progress))
    return passed


# --- the command ---

USAGE = "usage: python practice.py [start NAME | check NAME | check all | show NAME | reset NAME | predict [NAME]]"
SETTINGS = {"start": "overwrite", "check": "hint", "show": None, "reset": None, "predict": "answer"}


def main(argv: list[str]) -> int:
    """Run a command; the exit status."""
    verbs = dict.fromkeys(SETTINGS if argv else [None], PracticeConfig)
    verb, words, config, sources = command_line(verbs, argv, USAGE)
    exercises, experiments = read_table()
    table, name = experiments if verb == "predict" else exercises, " ".join(words)
    for key in sources:
        if sources[key] == "flag" and key != SETTINGS[verb]:
            fail(f"--{key} is no setting of {verb}. {USAGE}")
    if verb is None:
        show_list(exercises)
    elif verb == "check" and name == "all":
        results = [check(name, exercises, 0) for name in read_progress(exercises)]
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
        return 0 if check(name, exercises, 2 if config.hint else 1) else 1
    elif verb == "predict" and config.answer not in (None, *experiments[name]["outcomes"]):
        fail(f"--answer={config.answer} must be one of {', '.join(experiments[name]['outcomes'])}")
    elif verb == "show":
        show(exercises[name])
    elif verb == "predict":
        show_outcome(experiments[name], config.answer)
    else:
        try:
            start(name, exercises, anew=verb == "reset" or config.overwrite)
        except (SyntaxError, ValueError, OSError) as error:
            print(f"practice/{exercises[name]['page']} stays as it is: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")             # a console without Σ or ᵀ shows a question mark
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        fail(error)
    except BrokenPipeError:                              # what reads the list has seen enough
        os._exit(0)
