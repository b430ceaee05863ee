"""Claims about practice.py and its exercises. That ours pass needs no test here: their tests are tests of this suite."""
import ast
import json
import os
import re
import subprocess
import sys

import pytest

from common import ROOT, python
import practice

EXERCISES, EXPERIMENTS = practice.read_table()
# No problem of the course, or one that asks for a run.
RUNS = ("- layer_norm_ablation learning_rate_tuning transformer_accounting mixed_precision_accumulation training_together "
        "main_experiment gradient_checkpointing chinchilla_isoflops scaling_laws gsm8k_baseline math_baseline").split()
HEAVY = ("test_ranks", "test_mla", "test_convert")         # tests that start processes or import transformers
WORDS = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]


def page_without(names) -> str:
    """A page without the bodies of these exercises, all of one page."""
    text = reference = practice.read_page(ROOT / EXERCISES[names[0]]["page"])
    for name in names:
        text, kept = practice.take_out(text, name, EXERCISES[name], reference, False)
        assert kept == []
    return text


def named_tests(names, light: bool = True) -> list[str]:
    """What pytest is given for these exercises; light: without the heavy tests of those that have others."""
    chosen = {}
    for name in names:
        tests = EXERCISES[name]["tests"]
        quick = [test for test in tests if not any(word in test for word in HEAVY)]
        chosen |= dict.fromkeys(str(ROOT / "tests" / test) for test in (quick or tests if light else tests))
    return list(chosen)


def run_jobs(folder, jobs: dict) -> dict:
    """{job: (exit status, {test: why it failed})} of {job: ({page: text}, arguments of pytest)}."""
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that forks; elsewhere 84 starts of torch would take minutes")
    orders = []
    for job, (pages, words) in jobs.items():
        (folder / job).mkdir()
        for page, text in pages.items():
            (folder / job / page).write_bytes(text.encode())
        orders.append({"folder": str(folder / job), "words": [*words, *WORDS]})
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "blanked.py")], input=json.dumps(orders), text=True,
                          capture_output=True, env=practice.environment(None) | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    return {job: (int(status), json.loads((folder / job / "failures.json").read_text(encoding="utf-8")))
            for job, status in zip(jobs, done.stdout.split(), strict=True)}


def test_the_table_names_what_exists(tmp_path):
    course = (ROOT / "COURSE.md").read_text(encoding="utf-8")
    assert len(EXERCISES) >= 50 and len(EXPERIMENTS) == 6
    taken = set()
    for name, entry in EXERCISES.items():
        functions = practice.pick_functions(practice.read_page(ROOT / entry["page"]), entry["functions"])
        assert not taken & {(entry["page"], function) for function in functions}, f"{name}: one of another exercise"
        taken |= {(entry["page"], function) for function in functions}
        assert len(entry["hints"]) >= 3 and entry["read"] and entry["task"] and 5 <= entry["minutes"] <= 120, name
        assert ("setup" in entry) == ("speed" in entry)
        assert entry["problem"] in RUNS or re.search(rf"\b{entry['problem']}\b", course), (name, entry["problem"])
    for entry in EXPERIMENTS.values():
        results = (ROOT / entry["file"]).read_text(encoding="utf-8")
        assert entry["right"] in entry["outcomes"] and entry["lines"]
        assert all(line in results for line in entry["lines"]) and (ROOT / entry.get("picture", "results")).exists()
    status, _ = run_jobs(tmp_path, {"all": ({}, [*named_tests(EXERCISES, light=False), "--collect-only"])})["all"]
    assert status == 0, (tmp_path / "all" / "said.txt").read_text(encoding="utf-8")[-2000:]


def test_a_page_without_an_exercise_fails_its_tests(tmp_path):
    """All exercises of a page are taken out together; a test that then fails by the name of one proves that one. What
    another of the page hides is run alone."""
    groups = {}
    for name, entry in EXERCISES.items():
        if not entry.get("empty"):
            groups.setdefault(entry["page"], []).append(name)
    jobs = {page: ({page: page_without(names)}, named_tests(names)) for page, names in groups.items()}
    proven = set()
    for page, (_, failures) in run_jobs(tmp_path, jobs).items():
        for test, why in failures.items():
            for name in re.findall(r"NotImplementedError: practice: (\w+)", why):
                if any(test.startswith(f"tests/{one}") for one in EXERCISES[name]["tests"]):
                    proven.add(name)
    alone = [name for name in EXERCISES if name not in proven]
    jobs = {name: ({EXERCISES[name]["page"]: page_without([name])}, [*named_tests([name]), "--maxfail=1"])
            for name in alone if not EXERCISES[name].get("empty")}
    jobs |= {name: ({EXERCISES[name]["page"]: '"""Nothing yet."""\n'}, named_tests([name]))
             for name in alone if EXERCISES[name].get("empty")}
    for name, (status, failures) in run_jobs(tmp_path, jobs).items():
        expected = "has no attribute" if EXERCISES[name].get("empty") else f"practice: {name}"
        assert status == 1 and any(expected in why for why in failures.values()), (name, status, failures)


WRONG = [  # exercise, what stands in ours, what somebody might write
    ("merge_pair", "i += step", "i += 1"), ("count_pairs", "+= n", "+= 1"),
    ("bpe_train", "(pairs[pair], pair)", "pairs[pair]"), ("encode_word", "min(candidates)", "max(candidates)"),
    ("linear", "std=math.sqrt(2 / (d_in + d_out))", "std=2 / (d_in + d_out)"),
    ("rmsnorm", "torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)",
     "1 / (y.square().mean(dim=-1, keepdim=True).sqrt() + eps)"),
    ("rmsnorm", "y = wide(x)", "y = x"),
    ("layernorm", "y.square().mean(dim=-1, keepdim=True)", "y.var(dim=-1, keepdim=True)"),
    ("rope", "first * sin + second * cos", "first * sin - second * cos"), ("rope", "torch.arange(0, ", "torch.arange(1, "),
    ("softmax", "x - x.amax(dim=dim, keepdim=True)", "x"),
    ("softmax", "exponentials.sum(dim=dim, ", "exponentials.sum(dim=-1, "),
    ("attention", " / math.sqrt(q.shape[-1])", ""), ("attention", "weights.masked_fill(~mask, 0.0)", "weights"),
    ("multihead", "rotate(k, cos, sin, c.rope_interleaved)", "k"), ("block", "self.ln2(x), *more", "self.ln1(x), *more"),
    ("cross_entropy", "logits = wide(logits)", "pass"), ("loss_gradient", "torch.full_like(total, -1.0)", "torch.zeros_like(total)"),
    ("adam_loop", "1 - betas[1] ** t", "1 - betas[1]"), ("adamw", "root / (1 - beta1 ** t)", "root"),
    ("cosine", "(step - warmup_steps) /", "step /"), ("clipping", ", max=1.0)", ")"),
    ("batches", "len(tokens) - context_length, (", "len(tokens) - context_length - 1, ("),
    ("checkpointing", '"optimizer": state_of(optimizer)', '"optimizer": None'),
    ("sampling", "ordered.cumsum(dim=-1) - ordered", "ordered.cumsum(dim=-1)"), ("sampling", "logits < kth", "logits <= kth"),
    ("generate", "[:, -1]", "[:, 0]"), ("count_flops", "2 * keys", "keys"), ("flash_tiles", "acc * shrink", "acc"), 
    ("flash_kernel", "acc * shrink[:, None]", "acc"), ("pipeline_order", "n_stages - stage", "n_stages - stage - 1"),
    ("isoflop", "-p1 / (2 * p2)", "-p1 / p2"), ("huber", "off - HUBER / 2", "off"), ("frontier", "beta / (alpha", "alpha / (alpha"),
    ("gopher", "50 <= len(words)", "50 < len(words)"), ("minhash", "(shingle >> 32)", "shingle"),
    ("pad_rows", "places >= starts", "places > starts"), ("entropy", "return -(", "return ("),
    ("masked_mean", "mask.sum() if dim is None else mask.sum(dim=dim)", "mask.numel()"),
    ("advantages", "groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, correction=0)"),
    ("policy_gradient", "torch.minimum(plain", "torch.maximum(plain"),
    ("policy_gradient", "mask.sum(dim=-1, keepdim=True).clamp(min=1)", "mask.shape[-1]"),
    ("aggregate", "lengths.sum().clamp(min=1)", "response_mask.numel()"), ("grpo", "kept = (", "mask = mask[:, :-1]; kept = ("),
    ("dpo", "ref_chosen.detach()", "ref_chosen"), ("speculative_rule", "(p[i] - q[i]).clamp(min=0)", "p[i]"),
    ("int8", "/ 127)", "/ 128)"), ("distillation", "temperature ** 2 * ", "")]


def test_plausible_mistakes_are_found(tmp_path):
    jobs = {}
    for number, (name, right, wrong) in enumerate(WRONG):
        page = EXERCISES[name]["page"]
        text = practice.read_page(ROOT / page)
        sources = [practice.source_of(text, node) for node in
                   practice.pick_functions(text, EXERCISES[name]["functions"]).values()]
        source, = [source for source in sources if right in source]
        changed = text.replace(source, source.replace(right, wrong))
        jobs[f"{name} {number}"] = ({page: changed}, [*named_tests([name]), "--maxfail=1"])
    missed = [job for job, (status, _) in run_jobs(tmp_path, jobs).items() if status != 1]
    assert missed == [], "the tests of these exercises let a mistake through"
