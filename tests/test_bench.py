"""Claims about bench.py's verbs: data, the course's experiments, alignment; each from end to end, tiny."""
import random
import re

import numpy as np
import pytest
import torch

from common import corpus_text
import align_demo
import bench
import bench_course
import bench_kernels
import bench_step
import checkpoint


def test_bigram_is_the_formula_pair_by_pair(corpus, monkeypatch):
    train, val = (np.array(checkpoint.open_tokens(corpus, split)) for split in ("train", "val"))
    val, losses = val[:201], []
    unigram = (np.bincount(train, minlength=512) + 1) / (len(train) + 512)
    for a, b in zip(val, val[1:]):
        after = train[1:][train[:-1] == a].tolist()
        followers = len(set(after))
        p = (after.count(b) + followers * unigram[b]) / (len(after) + followers) if after else unigram[b]
        losses.append(-np.log(p))
    monkeypatch.setattr(bench_course, "open_tokens", lambda folder, split: {"train": train, "val": val}[split])
    assert bench_course.counting_losses(corpus)["bigram (Witten-Bell)"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_a_web_from_pages_to_two_models(tmp_path):
    pick = random.Random(0)
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", corpus_text())))[:600]
    for i in range(60):
        prose = " ".join(pick.choice(("The {} of that {} was {} when {}.", "We have to {} with a {}, or be {} and {}.",
                                      "It is the {} that {} for {}; {} too.", "Some {} and more {} are in {} by {}."))
                         .format(*pick.sample(words, 4)) for _ in range(25))
        body = f"<p>{prose}</p>" if i % 3 else "<p>Home | About | Contact</p>"
        (tmp_path / f"{i}.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    bench.main(["web", str(tmp_path), f"--out={tmp_path / 'web'}", "--steps=2", "--vocab_size=300",
                "--held_out=20", "--workers=1"])
    table = (tmp_path / "web" / "table.txt").read_text(encoding="utf-8")
    assert "three records" in table and re.search(r"archive +40 ", table) and "language: dropped" in table, table
    assert len(re.findall(r"^  kept +\d+\.html \| - \| \w", table, re.MULTILINE)) == 3, table
    assert len(re.findall(r"after 2 steps: \d\.\d+ bits per byte", table)) == 2, table


def test_small_experiments(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "can_compile", lambda device: False)
    monkeypatch.setattr(bench_kernels, "can_compile", lambda device: False)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text(corpus_text()[:60_000], encoding="utf-8", newline="")
    texts[1].write_text(corpus_text()[60_000:120_000], encoding="utf-8", newline="")

    def says(*words):
        bench.main([str(word) for word in words])
        return capsys.readouterr().out
    rows = re.findall(r"^ +(a|b) +(a|b) +([\d.]+)", says("tokenizers", *texts, "--vocab_a=300", "--vocab_b=600"), re.M)
    rates = {row[:2]: float(row[2]) for row in rows}
    assert len(rates) == 4 and rates["a", "b"] > rates["a", "a"] > 1, "more merges, more bytes a token"
    final = dict(re.findall(r"^ +(10*) .* (\S+)$", says("toy"), re.M))
    assert float(final["1000"]) > 1e10 > float(final["1"]) > float(final["10"]) > float(final["100"])
    said = says("precision")
    assert "loss float32" in said and "output of Linear bfloat16" in said and "bfloat16  4.0000" in said
    assert "bfloat16" in says("sizes", "--shapes=32x1", "--context_length=16", "--vocab_size=64", "--warmup=0",
                              "--steps=2", "--device=cpu")
    assert "tiles in PyTorch" in says("attention", "--lengths=64", "--widths=16", "--device=cpu")


def test_alignments_experiments_are_stored_one_by_one(tmp_path, monkeypatch, capsys):
    tiny = {name: bench_course.replace(stage, steps=2) for name, stage in align_demo.STAGES.items()}
    monkeypatch.setattr(align_demo, "STAGES", tiny)
    laboratory, measure = align_demo.Laboratory, align_demo.Laboratory.measure
    monkeypatch.setattr(align_demo.Laboratory, "measure", lambda lab, model: measure(lab, model, n=4))
    monkeypatch.setattr(align_demo, "Laboratory", lambda folder, seed: laboratory(folder, seed, (300, 40, 40)))
    small = dict(prompts_per_step=2, group_size=2, batch_size=4)
    monkeypatch.setitem(bench_course.GRPO, "on_policy", {"grpo": small, "root_mean": small | dict(
        normalizer="none", estimator=bench_course.root_mean)})
    flags = ["align", "--experiments=prompts,on_policy", "--seeds=1", "--steps=2", f"--out={tmp_path}"]
    bench.main(flags)
    assert "root_mean" in capsys.readouterr().out and (tmp_path / "curves.png").stat().st_size > 1000
    before = (tmp_path / "results.json").read_bytes()
    bench.main(flags)
    assert (tmp_path / "results.json").read_bytes() == before, "what has ended is not run again"


def test_our_estimator_divides_by_the_root_of_the_mean():
    advantages, _ = bench_course.root_mean(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 4, "mean", "none")
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, *[0.25 / 0.75 ** 0.5] * 3, -0.75 / 0.75 ** 0.5])
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)
