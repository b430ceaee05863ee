"""Claims about the repository as a whole: arrows between pages, lengths, settings, the commands that the texts show."""
import ast
import contextlib
import dataclasses
import importlib
import io
import re
import shlex

import pytest

import bench
from common import ROOT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py") if not path.stem.startswith("config_")}
TEXTS = [ROOT / "README.md", ROOT / "COURSE.md", *(path for path in sorted((ROOT / "results").glob("*.md"))
                                                   if path.stem != "first_edition")]


def imports_of(source: str) -> set:
    """Names of modules imported anywhere in a source, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_no_circle_of_imports():
    arrows = {page: imports_of(source) & set(PAGES) for page, source in PAGES.items()}
    while leaves := {page for page, below in arrows.items() if not below}:
        arrows = {page: below - leaves for page, below in arrows.items() if page not in leaves}
    assert not arrows, f"these import each other: {sorted(arrows)}"
    assert not any("bench" in page for name, source in PAGES.items() if not name.startswith("bench")
                   for page in imports_of(source)), "nobody imports the measurements"


def test_the_map_in_the_readme_has_every_page_below_what_it_imports():
    rows = re.findall(r"^\| \[`(\w+)\.py`\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == {page for page in PAGES if not page.startswith(("bench", "test_all"))}
    wrong = [(page, other) for i, page in enumerate(rows) for other in imports_of(PAGES[page]) & set(rows[i + 1:])]
    assert not wrong, wrong


def test_pages_are_short():
    lengths = sorted(((source.count("\n"), page) for page, source in PAGES.items()), reverse=True)
    assert lengths[0][0] < 600 and [entry for entry in lengths if entry[0] > 500][3:] == [], lengths[:5]
    assert (ROOT / "README.md").stat().st_size <= 16_384
    long = {path.name: n for path in (ROOT / "results").glob("*.md") if path.stem != "first_edition"
            and (n := path.read_text(encoding="utf-8").count("\n")) > 80}
    assert not long, "a page of results has at most 80 lines"


def test_every_setting_is_read_somewhere():
    code = "\n".join(PAGES.values())
    for page in PAGES:
        if page == "test_all":
            continue
        for name, kind in vars(importlib.import_module(page)).items():
            if dataclasses.is_dataclass(kind) and kind.__module__ == page and kind.__name__.endswith(("Config", "Settings")):
                for field in dataclasses.fields(kind):
                    assert re.search(rf"\.{field.name}\b|[\"']{field.name}[\"']", code), (page, name, field.name)


def commands() -> list:
    """(file, command) of every `python …` and `torchrun …` in code blocks and code spans of the texts."""
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [line for block in blocks for line in block.replace("\\\n", " ").split("\n")] + spans:
            line = re.split(r" {2,}#| &&|…\n", line.removeprefix("$ "))[-1 if "&&" in line else 0].strip()
            if re.match(r"([A-Z_]+=\S+ )*(python|torchrun)3? .*\b\w+\.py", line):
                found.append((path.name, line))
    return found


class Parsed(Exception):
    """The command line was read to its end."""


@pytest.fixture
def parse_only(monkeypatch):
    """Every page's command_line ends the command once it has been read."""
    from configurator import command_line

    def stop(*args, **more):
        command_line(*args, **more)
        raise Parsed
    for page in PAGES:
        module = importlib.import_module(page) if page != "test_all" else None
        if hasattr(module, "command_line"):
            monkeypatch.setattr(module, "command_line", stop)


def test_every_command_in_the_texts_can_be_read(parse_only, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown, wrong = commands(), []
    assert len(shown) > 40
    for file, line in shown:
        words = shlex.split(line)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        # What stands for something is no value; "sft | dpo" are two commands, of which the first is tried.
        words = [words[script], *(word for word in words[script + 1:] if word not in ("…", "|", "..."))]
        if "|" in line:
            words = words[:2] + [word for word in words[2:] if word.startswith("--")]
        if words[0] == "bench.py" and words[1] in bench.VERBS and not any(word.startswith("--") for word in words):
            continue                                       # a verb without settings would run
        if words[0] == "SCRIPT.py":
            continue
        if not (ROOT / words[0]).is_file():
            wrong.append((file, line, "no such page"))
            continue
        if words[0] in ("test_all.py", "kernels.py", "flash.py", "optim.py") or "--help" in words or "config_x.py" in words:
            continue
        module = importlib.import_module(words[0][:-3])
        run, errors = getattr(module, "run_command_line", None) or module.main, io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            try:
                run([word for word in words[1:] if not word.startswith("--KEY")])
            except Parsed:
                continue
            except SystemExit as end:
                if end.code in (0, None):
                    continue
            except (ValueError, OSError) as error:
                errors.write(str(error))
        wrong.append((file, line, errors.getvalue()[-200:]))
    assert not wrong, "\n".join(map(str, wrong))
