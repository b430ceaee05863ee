"""Claims about practice.py and its exercises. That ours pass needs no test here: their tests are tests of the suite."""
import ast
import json
import os
import re
import subprocess
import sys
import time

import pytest

from common import ROOT
import practice

EXERCISES, EXPERIMENTS = practice.read_table()
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")


def ours(name: str) -> str:
    return (ROOT / EXERCISES[name]["page"]).read_text(encoding="utf-8")


def without(name: str) -> str:
    text, kept = practice.take_out(ROOT / EXERCISES[name]["page"], name, EXERCISES[name])
    assert kept == []
    return text


def run_tests(folder, texts: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """(pytest's exit status, output) of the tests of each (exercise, text in place of its page)."""
    jobs = []
    for number, (name, text) in enumerate(texts):
        (folder / str(number)).mkdir()
        (folder / str(number) / EXERCISES[name]["page"]).write_bytes(text.encode())
        jobs.append(json.dumps({"folder": str(folder / str(number)), "tests": EXERCISES[name]["tests"]}))
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "blanked.py")], input="\n".join(jobs), text=True,
                          stdout=subprocess.PIPE, env=practice.environment(ROOT), check=True)
    return [(int(status), (folder / str(number) / "said.txt").read_text(encoding="utf-8"))
            for number, status in enumerate(done.stdout.split())]


def test_the_table_names_what_exists():
    course, taken = (ROOT / "COURSE.md").read_text(encoding="utf-8"), set()
    for name, entry in EXERCISES.items():
        for function in entry["functions"]:
            places = {(entry["page"], key) for key in practice.read_page(ROOT / entry["page"], [function])[1]}
            assert places and not places & taken, f"{name}: {function} does not exist, or another exercise has it"
            taken |= places
        assert len(entry["hints"]) >= 3 and entry["read"] and entry["task"] and 5 <= entry["minutes"] <= 120, name
        assert entry["problem"] == "-" or re.search(rf"\b{entry['problem']}\b", course), (name, entry["problem"])


@forks
def test_a_page_to_fill_is_ours_but_for_the_bodies_and_fails_the_tests(tmp_path):
    texts = {name: without(name) for name in EXERCISES}
    for (name, text), (status, said) in zip(texts.items(), run_tests(tmp_path, [*texts.items()]), strict=True):
        assert status == 1, f"the tests of {name} pass without it, or do not exist: {said[-1000:]}"
        if "empty" in EXERCISES[name]:
            continue
        assert f"NotImplementedError: practice: {name}\n" in said, f"{name} fails elsewhere: {said[-1000:]}"
        (tmp_path / "page.py").write_text(text, encoding="utf-8")
        before, after = (practice.read_page(path, EXERCISES[name]["functions"])[1]
                         for path in (ROOT / EXERCISES[name]["page"], tmp_path / "page.py"))
        assert [*before] == [*after]
        assert [ast.get_docstring(before[key]) for key in before] == [ast.get_docstring(after[key]) for key in after]
        pieces = re.split(rf' +raise NotImplementedError\("practice: {name}"\)\n', text)
        assert len(pieces) == len(before) + 1 and all(piece in ours(name) for piece in pieces)


WRONG = [  # exercise, what stands in ours, what somebody might write
    ("bpe_train", "(pairs[pair], pair)", "pairs[pair]"),
    ("softmax", "x.amax(dim=dim, keepdim=True)", "x.amax()"),
    ("attention", "weights.masked_fill(~mask, 0.0)", "weights"),
    ("multihead", "plan.masks[self.window], plan.fresh", "None, plan.fresh"),
    ("cross_entropy", "wide(logits), targets", "logits, targets"),
    ("clipping", "(norm + eps), max=1.0", "norm, max=1.0"),
    ("batches", "len(tokens) - context_length, (", "len(tokens) - context_length - 1, ("),
    ("sampling", "ordered.cumsum(dim=-1) - ordered", "ordered.cumsum(dim=-1)"),
    ("advantages", "groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, correction=0)"),
    ("aggregate", "lengths.sum().clamp(min=1)", "response_mask.numel()"),
    ("grpo", "kept = (", "mask = mask[:, :-1]; kept = ("),
    ("dpo", "ref_chosen.detach()", "ref_chosen"),
    ("speculative_rule", "(p[i] - q[i]).clamp(min=0)", "p[i]")]


@forks
def test_plausible_mistakes_are_found(tmp_path):
    texts = [(name, ours(name).replace(right, wrong)) for name, right, wrong in WRONG]
    missed = [line for line, (status, _) in zip(WRONG, run_tests(tmp_path, texts), strict=True) if status != 1]
    assert not missed, "the tests of these exercises let a mistake through"


# --- what the commands do to a learner's files ---

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "FOLDER", tmp_path / "practice")
    return tmp_path / "practice"


def run(words: str) -> int:
    return practice.main(words.split())


STUB = '    raise NotImplementedError("practice: softmax")'
MINE = "    return torch.exp(x) / torch.exp(x).sum(dim, keepdim=True)   # ﬁrst try, ünfinished"


def change(page, before: str, after: str) -> str:
    """Write in the learner's page; its new text."""
    text = page.read_text(encoding="utf-8")
    assert text.count(before) == 1
    page.write_text(text.replace(before, after), encoding="utf-8")
    return text.replace(before, after)


def test_a_start_keeps_what_a_learner_wrote_and_a_reset_saves_it(folder, capsys):
    page = folder / "layers.py"
    assert run("start softmax") == 0
    said = capsys.readouterr().out
    assert "write  softmax" in said and "check softmax" in said and EXERCISES["softmax"]["read"] in said
    assert page.read_text(encoding="utf-8") == without("softmax")
    written = change(page, STUB, MINE)
    assert run("start softmax") == 0
    assert "kept   softmax" in capsys.readouterr().out and page.read_text(encoding="utf-8") == written
    written = change(page, "def silu(", "def silu_of_mine(): pass\n\n\ndef silu(")
    assert run("start linear") == run("start rope") == 0
    after = page.read_text(encoding="utf-8")
    assert MINE in after and "def silu_of_mine" in after
    assert after.count('"practice: linear"') == 2 and after.count('"practice: rope"') == 3
    assert run("start softmax --overwrite=true") == 0
    saved, = (folder / "saved").iterdir()
    assert f"practice/saved/{saved.name}" in capsys.readouterr().out and saved.read_text(encoding="utf-8") == after
    assert page.read_text(encoding="utf-8") == after.replace(MINE, STUB), "the rest of the page as it was"


def test_what_was_not_begun_but_written_stays_and_what_was_begun_stays_even_if_it_is_ours(folder, capsys):
    page = folder / "layers.py"
    assert run("start softmax") == 0
    change(page, STUB, MINE)
    (folder / "progress.json").unlink()
    assert run("start softmax") == 0 and MINE in page.read_text(encoding="utf-8")
    page.write_text(ours("softmax"), encoding="utf-8")
    assert run("start softmax") == 0 and page.read_text(encoding="utf-8") == ours("softmax")
    page.unlink()                                             # begins the page anew
    assert run("start rope") == run("start softmax") == 0 and STUB in page.read_text(encoding="utf-8")
    assert run("start train_loop") == 0
    (folder / "loop.py").write_text("def train(): ...", encoding="utf-8")
    (folder / "progress.json").unlink()
    assert run("start train_loop") == 0 and (folder / "loop.py").read_text(encoding="utf-8") == "def train(): ..."
    for name, broken, told in (("linear", "def softmax(x, dim) return x", "layers.py, line 1"),
                               ("softmax", "x = 1", "softmax is gone")):
        page.write_text(broken, encoding="utf-8")
        for verb in ("start", "reset"):
            assert run(f"{verb} {name}") == 1 and told in capsys.readouterr().err
            assert page.read_text(encoding="utf-8") == broken
            assert "linear" not in (folder / "progress.json").read_text(encoding="utf-8")
    assert not list((folder / "saved").iterdir())


def test_a_check_passes_ours_and_explains_what_fails(folder, capsys):
    page = folder / "layers.py"
    assert run("check softmax") == 1 and "not begun" in capsys.readouterr().out
    assert run("start softmax") == run("start rope") == run("start linear") == 0
    text = change(page, "import torch\n", "import torch\nfrom torch import exp\n")
    change(page, STUB, MINE)
    assert run("check softmax") == 1
    said = capsys.readouterr().out
    assert "test_softmax_does_not_overflow" in said and "hint 1" in said and "hint 2" not in said
    assert "ours: shape (2, 3) float32 [nan" in said and " where tensor" not in said
    assert run("check rope") == 1
    number = text[:text.rindex("raise NotImplementedError")].count("\n") + 1       # ours of linear, above, is longer
    assert f"practice/layers.py:{number} in rope: raise NotImplementedError" in capsys.readouterr().out
    change(page, MINE, "    return torch.softmax(x, dim)")
    assert run("check softmax") == 0
    assert re.search(r"yours .* msec per loop\s+ours .* msec per loop", capsys.readouterr().out) and run("") == 0
    states = {line.split()[0]: line.rsplit("   ", 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert list(states) == list(EXERCISES)
    assert states["softmax"] == "passed" and states["linear"] == "begun" and states["swiglu"] == "not begun"
    change(page, "torch.softmax(x, dim)", "x +")
    assert run("check softmax --hint=true") == run("check all") == 1
    said = capsys.readouterr().out
    assert said.count("invalid syntax (layers.py, line ") == 4 and "linear: not yet" in said
    assert "hint" not in said, "no test has run"
    page.write_text(ours("attention"), encoding="utf-8")
    assert run("start attention") == 0
    page.write_text(without("softmax"), encoding="utf-8")
    assert run("check attention") == 0, "softmax, which nobody has written yet, is no mistake of attention"


@forks
def test_tests_that_hang_are_ended_with_all_that_they_started(folder, capsys, monkeypatch):
    monkeypatch.setattr(practice, "SECONDS", 8)
    assert run("start bytes") == 0
    alive = folder / "alive"
    hanging = f"import os, time\nos.fork()\nwhile True:\n    open({str(alive)!r}, 'a').write('.')\n    time.sleep(0.1)"
    (folder / "words.py").write_text(hanging, encoding="utf-8")
    assert run("check bytes") == 1 and "ended after 8 s" in capsys.readouterr().out
    size = alive.stat().st_size if alive.exists() else 0      # 0 where this machine needs 8 s to come that far
    time.sleep(0.5)
    assert size == (alive.stat().st_size if alive.exists() else 0)


@pytest.mark.parametrize("words, told", [
    ("start ropee", "Did you mean rope?"), ("start", "one NAME"), ("strat rope", "mean start?"),
    ("check rope --hints=true", "mean hint?"),
    ("start rope --hint=true", "no setting of start"), ("predict int8 --answer=z", "a, b, c"),
    ("predict no_rop", "mean no_rope?"), ("check all", "nothing is begun")])
def test_mistakes_name_the_nearest(words, told, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(words)
    assert told in capsys.readouterr().err and not folder.exists()


def test_a_spoilt_list_of_what_was_passed_is_named(folder, capsys):
    run("start rope")
    page = folder / "layers.py"
    page.write_text("\ufeff" + page.read_text(encoding="utf-8"), encoding="utf-8")           # as some editors save it
    assert run("start softmax") == 0
    (folder / "progress.json").write_text("", encoding="utf-8")
    assert run("start rope") == 1 and "progress.json is no JSON" in capsys.readouterr().err
    with pytest.raises(ValueError, match="progress.json is no JSON .*delete it"):
        run("")


def test_ours_is_shown_and_experiments_are_answered_from_results(folder, capsys):
    assert run("show linear") == 0
    shown = capsys.readouterr().out.rstrip().split("\n\n")
    assert len(shown) == 2 and all(f"\n{method}\n" in ours("linear") for method in shown)
    assert run("predict") == 0
    asked = capsys.readouterr().out
    for name, entry in EXPERIMENTS.items():
        assert f"{name}: " in asked and entry["file"] not in asked and run(f"predict {name}") == 0
        said = capsys.readouterr().out
        assert entry["outcomes"][entry["right"]] in said and all(line.strip() in said for line in entry["lines"])
    assert not folder.exists()
