"""The pages as exercises: write a function yourself, checked by the tests of this project.

    python practice.py                          the exercises in the course's order, and how far you are
    python practice.py start rope               practice/layers.py: layers.py without the bodies of rope
    python practice.py check rope               the tests of rope with your page in place of ours; a hint more each time
    python practice.py check rope --hint=true   one further hint at once
    python practice.py show rope                ours
    python practice.py reset rope               begin again; what you wrote goes to practice/saved/ first
    python practice.py check all                all that you have begun
    python practice.py predict [NAME]           an experiment: say what comes out, then see what came out

    layers.py ──start──> practice/layers.py ──you──> practice/layers.py ──check──> passed, or
    def rope(x, …):      def rope(x, …):             def rope(x, …):               what failed
        '''x (..., T,        '''x (..., T,               '''x (..., T,             and a hint
        cos, sin = …         raise NotImplementedError   c, s = …

A second exercise of the same page takes its functions out of the copy that is there and changes nothing besides.
`check` starts Python with your page before ours on its path, in practice/checked/: every page that imports layers gets
yours. The exercises stand in exercises.toml. To begin a page anew, or to stop, delete the file, or practice/.
"""
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

from configurator import command_line, fail, nearest

ROOT = Path(__file__).resolve().parent
FOLDER = ROOT / "practice"                   # the learner's copies, progress.json, saved/
CHECKED = FOLDER / "checked"                 # the page as the last check ran it, and what that said
SECONDS = 60                                 # tests that take longer are ended


@dataclass
class NoConfig:
    """What the list, show and reset can be told: nothing."""


@dataclass
class StartConfig:
    overwrite: bool = False                  # true = take the functions out again although you have written them


@dataclass
class CheckConfig:
    hint: bool = False                       # true = one hint more than usual when it fails


@dataclass
class PredictConfig:
    answer: str | None = None                # the letter you choose


# --- the table, and a page in pieces ---

def read_table() -> tuple[dict, dict]:
    """(exercises, experiments) of exercises.toml, each {name: entry} in the course's order."""
    table = tomllib.loads((ROOT / "exercises.toml").read_text(encoding="utf-8"))
    return table, table.pop("predict")


def read_page(path: Path) -> str:
    """The text of a page. Raises ValueError with the line that Python cannot read."""
    text = path.read_text(encoding="utf-8")
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"practice/{path.name}:{error.lineno} does not parse: {error.msg}: "
                         f"{(error.text or '').strip()}") from None
    return text


def pick_functions(text: str, names: list[str]) -> dict:
    """{name: its ast node} of functions of a page: "rope" or "Linear.forward"; "Linear" gives every method of it.

    Raises ValueError naming what is not there.
    """
    nodes, chosen = {}, {}
    for node in ast.parse(text).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                nodes[part.name if part is node else f"{node.name}.{part.name}"] = part
    for name in names:
        group = {key: node for key, node in nodes.items() if key == name or key.startswith(name + ".")}
        if not group:
            raise ValueError(f"there is no {name} any more; write it again, or `python practice.py reset NAME`")
        chosen |= group
    return chosen


def source_of(text: str, node) -> str:
    """The lines of a function or class."""
    return "\n".join(text.split("\n")[node.lineno - 1:node.end_lineno])


def put(text: str, function: str, source: str) -> str:
    """`text` with this source in the place of one of its functions."""
    node, lines = pick_functions(text, [function])[function], text.split("\n")
    return "\n".join([*lines[:node.lineno - 1], source, *lines[node.end_lineno:]])


def stub(name: str) -> str:
    """What stands in a function that an exercise asks for."""
    return f'raise NotImplementedError("practice: {name}")'


def blank(text: str, node: ast.FunctionDef, name: str) -> str:
    """The source of a function with its stub in place of all but signature and docstring."""
    lines, first = text.split("\n"), node.body[0]
    end = first.end_lineno                               # lines up to this one stay as they are
    if ast.get_docstring(node) is None:
        end = first.lineno - 1
        while lines[end - 1].strip().startswith("#"):    # comments above the first statement go too
            end -= 1
    return "\n".join([*lines[node.lineno - 1:end], " " * (node.col_offset + 4) + stub(name)])


def take_out(text: str, name: str, entry: dict, overwrite: bool) -> tuple[str, list[str]]:
    """(the learner's text without the bodies of an exercise, the functions that the learner wrote and keeps).

    overwrite: take out those too.
    """
    kept, reference = [], read_page(ROOT / entry["page"])
    for function, ours in pick_functions(reference, entry["functions"]).items():
        source = source_of(text, pick_functions(text, [function])[function])
        if overwrite or source == source_of(reference, ours):
            text = put(text, function, blank(reference, ours, name))
        elif stub(name) not in source:
            kept.append(function)
    return text, kept


def complete(text: str, name: str, exercises: dict) -> str:
    """The learner's page with ours of what other exercises took out: one can be checked before another is written."""
    page = exercises[name]["page"]
    reference = read_page(ROOT / page)
    for other in [one for one in exercises if exercises[one]["page"] == page and one != name]:
        for function, ours in pick_functions(reference, exercises[other]["functions"]).items():
            if stub(other) in source_of(text, pick_functions(text, [function])[function]):
                text = put(text, function, source_of(reference, ours))
    return text


# --- verbs ---

def read_progress() -> dict:
    """{name: {"hints": shown so far, "state": "begun" or, as the last check ended, "passed"}} of what is begun."""
    path = FOLDER / "progress.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note(name: str, **values) -> None:
    """Add to the progress of an exercise."""
    progress = read_progress()
    progress[name] = progress.get(name, {"hints": 0, "state": "begun"}) | values
    (FOLDER / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")


def say(label: str, text: str) -> None:
    """Print a text in lines of 110, a label of six letters in front."""
    print(textwrap.fill(" ".join(text.split()), 110, initial_indent=f"{label:<7}", subsequent_indent=" " * 7,
                        break_long_words=False, break_on_hyphens=False))


def show_list(exercises: dict) -> None:
    """A line an exercise; what to do next goes to standard error, so that every line is an exercise."""
    states = dict.fromkeys(exercises, "not begun") | {name: done["state"] for name, done in read_progress().items()}
    for name, entry in exercises.items():
        print(f"{name:<20} {entry['page']:<16} {entry['problem']:<34} {entry['minutes']:>3} min   {states[name]}")
    following = next((name for name in states if states[name] != "passed"), "NAME")
    print(f"{list(states.values()).count('passed')} of {len(exercises)} passed. Next: python practice.py start "
          f"{following}; experiments: python practice.py predict", file=sys.stderr)


def start(name: str, entry: dict, overwrite: bool) -> None:
    """Take the functions of an exercise out of the learner's copy of its page, and say what is asked."""
    target, reference, kept = FOLDER / entry["page"], read_page(ROOT / entry["page"]), []
    begun = target.exists()
    text = read_page(target) if begun else reference
    if not entry.get("empty"):
        text, kept = take_out(text, name, entry, overwrite)
    elif begun and not overwrite:
        kept = entry["functions"]
    else:
        text = source_of(reference, ast.parse(reference).body[0]) + "\n"
    (FOLDER / "saved").mkdir(parents=True, exist_ok=True)
    if begun and overwrite:
        number = len(list((FOLDER / "saved").iterdir())) + 1
        saved = shutil.copyfile(target, FOLDER / "saved" / f"{target.stem}_{number}.py")
        print(f"what you had is saved as practice/saved/{saved.name}")
    target.write_text(text, encoding="utf-8")
    note(name, **({"hints": 0, "state": "begun"} if overwrite else {}))
    print(f"{name}: practice/{entry['page']}, about {entry['minutes']} minutes")
    if kept:
        say("kept", f"{', '.join(kept)}, as you wrote it; --overwrite=true begins again and saves what is there")
    say("write", ", ".join(entry["functions"]))
    say("read", entry["read"])
    say("do", entry["task"])
    print(f"then   python practice.py check {name}")


def show(entry: dict) -> None:
    """The reference, as it stands in the page."""
    text = read_page(ROOT / entry["page"])
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    for name in entry["functions"]:
        for node in [classes[name]] if name in classes else pick_functions(text, [name]).values():
            print(source_of(text, node) + "\n")


def predict(name: str, entry: dict, answer: str | None) -> None:
    """Ask what comes out of an experiment; with an answer, the figures that results/ has of it."""
    print(f"{name}:")
    say("", entry["question"])
    for letter, outcome in entry["outcomes"].items():
        print(f"  {letter}  {outcome}")
    if answer is None:
        print(f"then   python practice.py predict {name} --answer=LETTER")
        return
    if answer not in entry["outcomes"]:
        raise ValueError(f"answer={answer!r} must be one of {', '.join(entry['outcomes'])}")
    say("\nyes" if answer == entry["right"] else "\nno", f"{entry['right']} it was. {entry['why']}")
    print(f"\n{entry['file']}:")
    for line in (ROOT / entry["file"]).read_text(encoding="utf-8").splitlines():
        if any(words in line for words in entry["lines"]):
            print("  " + line.strip())
    say("by", f"{entry['command']} {entry.get('picture', '')}")


# --- check: in a process of its own ---

def environment(folder: Path | None) -> dict:
    """What the process of a check gets: the learner's page before ours, whoever starts what; Triton interpreted."""
    paths = [str(path) for path in (folder, ROOT, ROOT / "tests") if path] + [os.environ.get("PYTHONPATH", "")]
    # SAFEPATH: a script's own folder would come before PYTHONPATH, and a test that starts one would run our pages.
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1",
                         "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "1", "PRACTICE_FOLDER": str(folder)}


def run_limited(command: list[str], env: dict) -> tuple[int | None, str]:
    """(exit status or None where it was ended, what it printed). It ends with all that it has started."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=CHECKED,
                               encoding="utf-8", errors="replace", start_new_session=True)
    try:
        said, _ = process.communicate(timeout=SECONDS)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:                       # too slow, or Ctrl-C
            if os.name == "nt":
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def failure_of(name: str, exercises: dict) -> list[str]:
    """What fails in an exercise, in a few lines; nothing when all tests pass. Raises as read_page, pick_functions."""
    entry = exercises[name]
    text = read_page(FOLDER / entry["page"])
    if not entry.get("empty"):
        pick_functions(text, entry["functions"])
        text = complete(text, name, exercises)
    shutil.rmtree(CHECKED, ignore_errors=True)
    CHECKED.mkdir()
    (CHECKED / entry["page"]).write_text(text, encoding="utf-8")
    # All that is printed comes from tests/explain.py; its exit status is not 0 either when every test was skipped.
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "--maxfail=1",
               "-p", "explain", "-p", "no:terminal", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
               *(str(ROOT / "tests" / test) for test in entry["tests"])]
    status, said = run_limited(command, environment(CHECKED))
    if status is None:
        return [f"ended after {SECONDS} s: it does not come to an end, or is far too slow"]
    return said.strip().splitlines()[-20:] if status else []


def best_time(entry: dict, folder: Path | None) -> str:
    """Milliseconds of the exercise's `speed` statement, the best of five, with the learner's page or ours."""
    code = (f"import timeit, torch\ntorch.set_num_threads(1)\n{entry['setup']}\ntimer = timeit.Timer(lambda: "
            f"{entry['speed']})\nn, _ = timer.autorange()\nprint(min(timer.repeat(5, n)) / n * 1e3)")
    status, said = run_limited([sys.executable, "-c", code], environment(folder))
    return f"{float(said.split()[-1]):.3g} ms" if status == 0 else "not to be measured in a minute"


def check(name: str, exercises: dict, n_hints: int) -> bool:
    """Run an exercise's tests, say what came of it, and show n_hints hints more; returns whether they hold."""
    entry, progress = exercises[name], read_progress()
    if name not in progress:
        print(f"{name} is not begun: python practice.py start {name}")
        return False
    try:
        failure = failure_of(name, exercises)
    except (ValueError, OSError) as error:               # no test has run: no hint either
        failure, n_hints = [str(error)], 0
    print("\n  ".join([f"{name}: {'not yet' if failure else 'passed'}", *failure]), flush=True)
    if failure and n_hints:
        n_hints = min(progress[name]["hints"] + n_hints, len(entry["hints"]))
        for number, text in enumerate(entry["hints"][:n_hints], 1):
            say(f"hint {number}", text)
        if n_hints == len(entry["hints"]):
            print(f"no more hints; ours: python practice.py show {name}")
        note(name, hints=n_hints)
    if n_hints and not failure and "speed" in entry:
        print(f"{entry['speed']}: yours {best_time(entry, CHECKED)}, ours {best_time(entry, None)}")
    note(name, state="begun" if failure else "passed")
    return not failure


# --- the command ---

USAGE = "usage: python practice.py [start NAME | check NAME | check all | show NAME | reset NAME | predict [NAME]]"
VERBS = {None: NoConfig, "start": StartConfig, "check": CheckConfig, "show": NoConfig, "reset": NoConfig,
         "predict": PredictConfig}


def main(argv: list[str]) -> int:
    """Run a command; the exit status."""
    verb, words, config, _ = command_line(VERBS, argv, USAGE)
    exercises, experiments = read_table()
    table, name = experiments if verb == "predict" else exercises, words[0] if words else ""
    if verb == "check" and name == "all":
        results = [check(name, exercises, 0) for name in read_progress()]
        if not results:
            fail("nothing is begun: python practice.py start NAME")
        return 0 if all(results) else 1
    if verb is None and not words:
        show_list(exercises)
        return 0
    if verb == "predict" and not words:
        for name, entry in experiments.items():
            print(f"{name:<20} {' '.join(entry['question'].split())}")
        return 0
    if verb is None or len(words) != 1:
        fail(f"{' '.join(words) or verb!r}: give a verb and one NAME.{nearest(name, VERBS)} {USAGE}")
    if name not in table:
        fail(f"{name!r} is not in the list of `python practice.py{' predict' if verb == 'predict' else ''}`."
             f"{nearest(name, table)}")
    try:
        if verb == "check":
            return 0 if check(name, table, 2 if config.hint else 1) else 1
        if verb == "show":
            show(table[name])
        elif verb == "predict":
            predict(name, table[name], config.answer)
        else:
            start(name, table[name], verb == "reset" or config.overwrite)
    except (ValueError, OSError) as error:
        fail(error)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")             # a console without Σ or ᵀ shows a question mark
    sys.exit(main(sys.argv[1:]))
