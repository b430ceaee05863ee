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
HEAVY = ("test_ranks", "test_mla", "test_convert")         # tests that start processes or import transformers
# Plain asserts, as rewriting a file of tests takes longer than running one of them; no collection of garbage after.
WORDS = ["-q", "--assert=plain", "-p", "no:unraisableexception", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]


def page_without(names) -> str:
    """A page without the bodies of these exercises, all of one page."""
    text = practice.read_page(ROOT / EXERCISES[names[0]]["page"])
    for name in names:
        text, kept = practice.take_out(text, name, EXERCISES[name], False)
        assert kept == []
    return text


def named_tests(names) -> list[str]:
    """What pytest is given for these exercises: their tests, the heavy ones only where there are no others."""
    chosen = {}
    for name in names:
        tests = EXERCISES[name]["tests"]
        quick = [test for test in tests if not any(word in test for word in HEAVY)]
        chosen |= dict.fromkeys(str(ROOT / "tests" / test) for test in quick or tests)
    return list(chosen)


@pytest.fixture(scope="module")
def runner():
    """tests/blanked.py, waiting for jobs."""
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that forks; elsewhere every job would import torch anew")
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "blanked.py")], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=practice.environment(None) | {"OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait(60)


def run_job(runner, folder, page: str, text: str, words: list[str]) -> tuple[int, dict]:
    """(exit status, {test: why it failed}) of pytest with this text as the page."""
    folder.mkdir(parents=True)
    (folder / page).write_bytes(text.encode())
    runner.stdin.write(json.dumps({"folder": str(folder), "words": [*words, *WORDS]}) + "\n")
    runner.stdin.flush()
    status = int(runner.stdout.readline())
    return status, json.loads((folder / "failures.json").read_text(encoding="utf-8"))


def test_the_table_names_what_exists(runner, tmp_path):
    course = (ROOT / "COURSE.md").read_text(encoding="utf-8")
    assert len(EXERCISES) >= 50 and len(EXPERIMENTS) == 6
    taken = set()
    for name, entry in EXERCISES.items():
        functions = practice.pick_functions(practice.read_page(ROOT / entry["page"]), entry["functions"])
        assert not taken & {(entry["page"], function) for function in functions}, f"{name}: one of another exercise"
        taken |= {(entry["page"], function) for function in functions}
        assert len(entry["hints"]) >= 3 and entry["read"] and entry["task"] and 5 <= entry["minutes"] <= 120, name
        assert entry["problem"] == "-" or re.search(rf"\b{entry['problem']}\b", course), (name, entry["problem"])
    for entry in EXPERIMENTS.values():
        results = (ROOT / entry["file"]).read_text(encoding="utf-8")
        assert entry["right"] in entry["outcomes"] and entry["lines"]
        assert all(line in results for line in entry["lines"]) and (ROOT / entry.get("picture", "results")).exists()
    named = [str(ROOT / "tests" / test) for entry in EXERCISES.values() for test in entry["tests"]]
    status, _ = run_job(runner, tmp_path / "all", "none.py", "", [*named, "--collect-only"])
    assert status == 0, (tmp_path / "all" / "said.txt").read_text(encoding="utf-8")[-2000:]


def test_a_page_without_an_exercise_fails_its_tests(runner, tmp_path):
    """All exercises of a page are taken out together, and what fails by the name of one proves that one. What others of
    the page hide is tried again without those that are proven, at last alone."""
    left, rounds = [name for name in EXERCISES if not EXERCISES[name].get("empty")], 0
    while left:
        groups, proven = {}, set()
        for name in left:
            groups.setdefault(EXERCISES[name]["page"] if rounds < 3 else name, []).append(name)
        for key, names in groups.items():
            page, folder = EXERCISES[names[0]]["page"], tmp_path / f"{key} {rounds}"
            _, failures = run_job(runner, folder, page, page_without(names), named_tests(names))
            for test, why in failures.items():
                proven |= {name for name in re.findall(r"NotImplementedError: practice: (\w+)", why)
                           if any(test.startswith(f"tests/{one}") for one in EXERCISES[name]["tests"])}
        assert rounds < 3 or proven >= set(left), f"the tests of {set(left) - proven} pass without it"
        left, rounds = [name for name in left if name not in proven], rounds + 1


WRONG = [  # exercise, what stands in ours, what somebody might write
    ("bpe_train", "(pairs[pair], pair)", "pairs[pair]"),
    ("rope", "first * sin + second * cos", "first * sin - second * cos"),
    ("softmax", "x.amax(dim=dim, keepdim=True)", "x.amax()"),
    ("attention", " / math.sqrt(q.shape[-1])", ""),
    ("attention", "weights.masked_fill(~mask, 0.0)", "weights"),
    ("multihead", "turn(k, cos, sin, c.rope_interleaved)", "k"),
    ("multihead", "plan.masks[self.window], plan.fresh", "None, plan.fresh"),
    ("cross_entropy", "wide(logits), targets", "logits, targets"),
    ("adam_loop", "1 - betas[1] ** t", "1 - betas[1]"),
    ("clipping", "(norm + eps)", "norm"),
    ("cosine", "(step - warmup_steps) /", "step /"),
    ("batches", "len(tokens) - context_length, (", "len(tokens) - context_length - 1, ("),
    ("sampling", "ordered.cumsum(dim=-1) - ordered", "ordered.cumsum(dim=-1)"),
    ("flash_kernel", "acc * shrink[:, None]", "acc"),
    ("minhash", "(shingle >> 32)", "shingle"),
    ("advantages", "groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, correction=0)"),
    ("policy_gradient", "torch.minimum(plain", "torch.maximum(plain"),
    ("aggregate", "lengths.sum().clamp(min=1)", "response_mask.numel()"),
    ("grpo", "kept = (", "mask = mask[:, :-1]; kept = ("),
    ("dpo", "ref_chosen.detach()", "ref_chosen"),
    ("speculative_rule", "(p[i] - q[i]).clamp(min=0)", "p[i]")]


def test_plausible_mistakes_and_an_empty_file_are_found(runner, tmp_path):
    missed = []
    for name in (name for name in EXERCISES if EXERCISES[name].get("empty")):
        words = named_tests([name])
        _, failures = run_job(runner, tmp_path / name, EXERCISES[name]["page"], '"""Nothing yet."""\n', words)
        assert len(failures) == len(EXERCISES[name]["tests"])
    for number, (name, right, wrong) in enumerate(WRONG):
        page, text = EXERCISES[name]["page"], practice.read_page(ROOT / EXERCISES[name]["page"])
        functions = practice.pick_functions(text, EXERCISES[name]["functions"]).values()
        source, = [source for node in functions if right in (source := practice.source_of(text, node))]
        changed = text.replace(source, source.replace(right, wrong))
        status, _ = run_job(runner, tmp_path / str(number), page, changed, [*named_tests([name]), "--maxfail=1"])
        if status != 1:
            missed.append((name, wrong))
    assert missed == [], "the tests of these exercises let a mistake through"


# --- what the commands do to a learner's files ---

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "FOLDER", tmp_path / "practice")
    monkeypatch.setattr(practice, "CHECKED", tmp_path / "practice" / "checked")
    return tmp_path / "practice"


def run(*words) -> int:
    return practice.main(list(words))


def source_in(text, name) -> str:
    return practice.source_of(text, practice.pick_functions(text, [name])[name])


def ours(page, name) -> str:
    return source_in(practice.read_page(ROOT / page), name)


def write(folder, page, name, source) -> None:
    """Put a function of the learner's in the place of the one in the copy."""
    text = practice.read_page(folder / page)
    (folder / page).write_text(text.replace(source_in(text, name), source), encoding="utf-8")


MINE = '''def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Mine."""
    return torch.exp(x) / torch.exp(x).sum(dim, keepdim=True)   # ﬁrst try, ünfinished'''


def test_a_start_keeps_what_a_learner_wrote(folder, capsys):
    assert run("start", "softmax") == 0
    said, page = capsys.readouterr().out, practice.read_page(folder / "layers.py")
    assert "write  softmax" in said and "check softmax" in said and EXERCISES["softmax"]["read"] in said
    before = ours("layers.py", "softmax")
    after = page[page.index("def softmax"):page.index("def cross_entropy")].rstrip()
    assert after.split("\n") == [*before.split("\n")[:2], '    raise NotImplementedError("practice: softmax")']
    assert page.replace(after, before) == practice.read_page(ROOT / "layers.py"), "everything else as it is"
    write(folder, "layers.py", "softmax", MINE)
    assert run("start", "rope") == 0 and run("start", "softmax") == 0
    page = practice.read_page(folder / "layers.py")
    assert "kept" in capsys.readouterr().out and MINE in page and page.count('"practice: rope"') == 3
    assert run("reset", "softmax") == 0 and "layers_1.py" in capsys.readouterr().out
    assert MINE in (folder / "saved" / "layers_1.py").read_text(encoding="utf-8")
    assert MINE not in practice.read_page(folder / "layers.py")
    assert run("start", "train_loop") == 0
    body, = ast.parse(practice.read_page(folder / "loop.py")).body
    assert isinstance(body.value, ast.Constant), "a docstring alone"


def test_a_check_passes_ours_and_explains_what_fails(folder, capsys):
    assert run("check", "softmax") == 1 and "not begun" in capsys.readouterr().out
    for name in ("softmax", "attention", "linear"):           # which the tests of softmax would need
        assert run("start", name) == 0
    write(folder, "layers.py", "softmax", MINE)
    capsys.readouterr()
    assert run("check", "softmax") == 1
    said = capsys.readouterr().out
    assert "test_softmax_does_not_overflow" in said and "hint 1" in said and "hint 2" not in said
    assert " where tensor" not in said and "ours: shape (2, 3) float32 [nan" in said
    assert "theirs: shape (2, 3) float32 [0.75, 0.25, 0, " in said
    write(folder, "layers.py", "softmax", ours("layers.py", "softmax"))
    assert run("check", "softmax") == 0
    assert re.search(r"yours [\d.e+-]+ ms, ours [\d.e+-]+ ms", capsys.readouterr().out) and run() == 0
    states = {line.split()[0]: line.rsplit("   ", 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert list(states) == list(EXERCISES)
    assert states["softmax"] == "passed" and states["linear"] == "begun" and states["rope"] == "not begun"
    write(folder, "layers.py", "softmax", "def softmax(x, dim):\n    return x +")
    assert run("check", "all") == 1
    said = capsys.readouterr().out
    assert len(re.findall(r"practice/layers.py:\d+ does not parse: invalid syntax: return x \+", said)) == 3


def test_tests_that_hang_are_ended_with_all_that_they_started(folder, capsys, monkeypatch):
    monkeypatch.setattr(practice, "SECONDS", 8)
    assert run("start", "bytes") == 0
    page = folder / "words.py"
    child = f"import time\nwhile True:\n    open({str(folder / 'alive')!r}, 'a').write('.')\n    time.sleep(0.1)"
    hanging = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True:\n    pass\n"
    page.write_text(hanging + practice.read_page(ROOT / "words.py"), encoding="utf-8")
    assert run("check", "bytes") == 1
    assert "ended after 8 s" in capsys.readouterr().out
    if (folder / "alive").exists():                       # not where this machine needs 8 s to come that far
        size = (folder / "alive").stat().st_size
        time.sleep(0.5)
        assert (folder / "alive").stat().st_size == size


@pytest.mark.parametrize("words, told", [
    ("start ropee", "Did you mean rope?"), ("start", "one NAME"), ("strat rope", "mean start?"),
    ("check rope --hints=true", "mean hint?"), ("predict no_rop", "mean no_rope?"),
    ("predict int8 --answer=z", "answer='z' must be one of a, b, c")])
def test_mistakes_name_the_nearest(words, told, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*words.split())
    assert told in capsys.readouterr().err and not folder.exists()


def test_ours_is_shown_and_predictions_are_answered_from_results(folder, capsys):
    assert run("show", "linear") == 0
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("class Linear") and shown in practice.read_page(ROOT / "layers.py")
    assert run("predict") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
    for name, entry in EXPERIMENTS.items():
        assert run("predict", name) == 0
        asked = capsys.readouterr().out
        assert all(outcome in asked for outcome in entry["outcomes"].values()) and entry["file"] not in asked
        assert run("predict", name, "--answer=b") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f" {'yes' if entry['right'] == 'b' else 'no'} {entry['right']} it was" in said and entry["file"] in said
    assert not folder.exists()


def test_what_is_taken_out_leaves_signature_and_docstring_and_comes_back_from_ours():
    pages = {}
    for name, entry in EXERCISES.items():
        if "empty" not in entry:
            pages.setdefault(entry["page"], []).append(name)
            without = page_without([name])
            for function in practice.pick_functions(without, entry["functions"]):
                *kept, stub = source_in(without, function).split("\n")
                assert ours(entry["page"], function).split("\n")[:len(kept)] == kept
                assert stub.strip() == practice.stub(name)
    for first, *others in pages.values():
        assert practice.complete(page_without([first, *others]), first, EXERCISES) == page_without([first])
