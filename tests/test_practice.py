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
            places = {(entry["page"], node.lineno) for node in practice.functions_of(ours(name), [function])}
            assert places and not places & taken, f"{name}: {function} does not exist, or another exercise has it"
            taken |= places
        assert len(entry["hints"]) >= 3 and entry["read"] and entry["task"] and 5 <= entry["minutes"] <= 120, name
        assert entry["problem"] == "-" or re.search(rf"\b{entry['problem']}\b", course), (name, entry["problem"])


@forks
def test_a_page_to_fill_is_ours_but_for_the_bodies_and_fails_the_tests(tmp_path):
    texts = {name: practice.page_to_fill(name, entry) for name, entry in EXERCISES.items()}
    for (name, text), (status, said) in zip(texts.items(), run_tests(tmp_path, [*texts.items()]), strict=True):
        assert status == 1, f"the tests of {name} pass without it, or do not exist: {said[-1000:]}"
        if "empty" in EXERCISES[name]:
            continue
        assert f"NotImplementedError: practice: {name}\n" in said, f"{name} fails elsewhere: {said[-1000:]}"
        before, after = (practice.functions_of(page, EXERCISES[name]["functions"]) for page in (ours(name), text))
        assert [ast.get_docstring(node) for node in before] == [ast.get_docstring(node) for node in after]
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
TO_FILL = practice.page_to_fill("softmax", EXERCISES["softmax"])
MINE = TO_FILL.replace(STUB, "    return torch.exp(x) / torch.exp(x).sum(dim, keepdim=True)   # ﬁrst try, ünfinished")


def test_a_start_keeps_what_a_learner_wrote_and_a_reset_saves_it(folder, capsys):
    page = folder / "softmax" / "layers.py"
    assert run("start softmax") == 0
    said = capsys.readouterr().out
    assert "write  softmax" in said and "check softmax" in said and EXERCISES["softmax"]["read"] in said
    assert page.read_text(encoding="utf-8") == TO_FILL
    page.write_text(MINE, encoding="utf-8")
    assert run("start softmax") == run("start rope") == 0
    assert "kept" in capsys.readouterr().out and page.read_text(encoding="utf-8") == MINE
    assert run("reset softmax") == 0
    saved, = (folder / "saved").glob("*/layers.py")
    assert f"practice/saved/{saved.parent.name}/layers.py" in capsys.readouterr().out
    assert saved.read_text(encoding="utf-8") == MINE and page.read_text(encoding="utf-8") == TO_FILL


def test_a_check_passes_ours_and_explains_what_fails(folder, capsys):
    page = folder / "softmax" / "layers.py"
    assert run("check softmax") == 1 and "not begun" in capsys.readouterr().out
    assert run("start softmax") == run("start linear") == 0
    page.write_text(MINE, encoding="utf-8")
    assert run("check softmax") == 1
    said = capsys.readouterr().out
    assert "test_softmax_does_not_overflow" in said and "hint 1" in said and "hint 2" not in said
    assert "ours: shape (2, 3) float32 [nan" in said and " where tensor" not in said
    page.write_text(ours("softmax"), encoding="utf-8")
    assert run("check softmax") == 0
    assert re.search(r"yours .* msec per loop\s+ours .* msec per loop", capsys.readouterr().out) and run("") == 0
    states = {line.split()[0]: line.rsplit("   ", 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert list(states) == list(EXERCISES)
    assert states["softmax"] == "passed" and states["linear"] == "begun" and states["rope"] == "not begun"
    page.write_text(TO_FILL.replace(STUB, "    return x +"), encoding="utf-8")
    assert run("check softmax --hint=true") == run("check all") == 1
    said = capsys.readouterr().out
    assert said.count("SyntaxError: invalid syntax") == 2 and "linear: not yet" in said
    assert "hint" not in said, "no test has run"


@forks
def test_tests_that_hang_are_ended_with_all_that_they_started(folder, capsys, monkeypatch):
    monkeypatch.setattr(practice, "SECONDS", 8)
    assert run("start bytes") == 0
    alive = folder / "alive"
    hanging = f"import os, time\nos.fork()\nwhile True:\n    open({str(alive)!r}, 'a').write('.')\n    time.sleep(0.1)"
    (folder / "bytes" / "words.py").write_text(hanging, encoding="utf-8")
    assert run("check bytes") == 1 and "ended after 8 s" in capsys.readouterr().out
    size = alive.stat().st_size if alive.exists() else 0      # 0 where this machine needs 8 s to come that far
    time.sleep(0.5)
    assert size == (alive.stat().st_size if alive.exists() else 0)


@pytest.mark.parametrize("words, told", [
    ("start ropee", "Did you mean rope?"), ("start", "one NAME"), ("strat rope", "mean start?"),
    ("check rope --hints=true", "mean hint?"), ("predict no_rop", "mean no_rope?"), ("check all", "nothing is begun")])
def test_mistakes_name_the_nearest(words, told, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(words)
    assert told in capsys.readouterr().err and not folder.exists()


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
