"""Claims about the repository as a whole: arrows between pages, lengths, settings, the commands that the texts show."""
import ast
import contextlib
import dataclasses
import importlib
import io
import re
import shlex

import bench
import bench_gpu
from common import ROOT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")
         if not path.stem.startswith(("config_", "test_all"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*.md")}
TEXTS = {"README.md": README, "COURSE.md": (ROOT / "COURSE.md").read_text(encoding="utf-8")} | RESULTS


def imports_of(source: str) -> set:
    """Names of our pages imported anywhere in a source, also inside functions."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return (names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}) & set(PAGES)


def test_no_circle_of_imports_and_the_readme_lists_every_page_below_what_it_imports():
    arrows = {page: imports_of(source) for page, source in PAGES.items()}
    rows = re.findall(r"^\| \[`(\w+)\.py`\]", README, re.MULTILINE)
    assert set(rows) == {page for page in PAGES if not page.startswith("bench")}
    wrong = [(page, other) for i, page in enumerate(rows) for other in arrows[page] & set(rows[i + 1:])]
    assert not wrong, wrong
    assert not [page for page in rows if any(other.startswith("bench") for other in arrows[page])], "nobody measures"
    while leaves := {page for page, below in arrows.items() if not below}:
        arrows = {page: below - leaves for page, below in arrows.items() if page not in leaves}
    assert not arrows, f"these import each other: {sorted(arrows)}"


def test_pages_are_short():
    lengths = sorted(((source.count("\n"), page) for page, source in PAGES.items()), reverse=True)
    assert lengths[0][0] < 600 and [entry for entry in lengths if entry[0] > 500][3:] == [], lengths[:5]
    assert (ROOT / "README.md").stat().st_size <= 16_384
    assert not {name: text.count("\n") for name, text in RESULTS.items() if text.count("\n") > 80}, "at most 80 lines"


def test_every_file_of_results_is_linked():
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (
        *ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.toml"), *(ROOT / "results").glob("*.md")))
    assert not [path.name for path in (ROOT / "results").iterdir() if path.name not in texts]


def test_every_setting_is_read_somewhere():
    code = "\n".join(PAGES.values())
    for page in PAGES:
        for name, kind in vars(importlib.import_module(page)).items():
            if dataclasses.is_dataclass(kind) and kind.__module__ == page and name.endswith(("Config", "Settings")):
                for field in dataclasses.fields(kind):
                    assert re.search(rf"\.{field.name}\b|[\"']{field.name}[\"']", code), (page, name, field.name)


def commands(texts: dict) -> list:
    """(file, words from the script on) of every `python …` and `torchrun …` in code blocks and spans of the texts."""
    found = []
    for name, text in texts.items():
        blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [line for block in blocks for line in block.replace("\\\n", " ").split("\n")] + spans:
            line = re.split(r" {2,}#| &&|…\n", line.removeprefix("$ "))[-1 if "&&" in line else 0].strip()
            if re.match(r"([A-Z_]+=\S+ )*(python|torchrun)3? .*\b\w+\.py", line):
                words = shlex.split(line)
                words = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
                # What stands for something is no value; "sft | dpo" are two commands, of which the first is tried.
                flags = [word for word in words if word.startswith("--") and not word.startswith("--KEY")]
                files = [word for word in words if not word.startswith("--") and word not in ("…", "|", "...")]
                found.append((name, (files[:2] if "|" in line else files) + flags))
    return found


class Parsed(Exception):
    """The command line was read to its end."""


def test_every_command_in_the_texts_and_of_the_gpus_stages_can_be_read(monkeypatch):
    from configurator import command_line

    def stop(*args, **more):
        command_line(*args, **more)
        raise Parsed
    for page in PAGES:
        monkeypatch.setattr(importlib.import_module(page), "command_line", stop, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench_gpu, "corpus", lambda n: "data/library")
    jobs = [job for device in ("cpu", "cuda") for stage in bench_gpu.stages(device, ROOT / "out").values()
            for job in stage.values()]
    shown, wrong = commands(TEXTS | {"python bench.py gpu": "\n".join(["```", *jobs, "```"])}), []
    assert len(shown) > 40 + len(jobs)
    for file, (script, *words) in shown:
        no_settings = script in ("SCRIPT.py", "test_all.py", "kernels.py", "flash.py", "optim.py") or "--help" in words
        if script == "bench.py" and words[0] in bench.VERBS and not any(word.startswith("--") for word in words):
            no_settings = True                             # a verb without settings would run
        if no_settings or "config_x.py" in words:
            continue
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                module = importlib.import_module(script[:-3])
                (getattr(module, "run_command_line", None) or module.main)(words)
            except Parsed:
                continue
            except SystemExit as end:
                if end.code in (0, None):
                    continue
            except (ImportError, ValueError, OSError) as error:
                said.write(str(error))
        wrong.append((file, script, words, said.getvalue()[-200:]))
    assert not wrong, "\n".join(map(str, wrong))
