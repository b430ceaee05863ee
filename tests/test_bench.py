"""Claims about bench.py's verbs for data, the course's smaller experiments and alignment: each from end to end, tiny."""
import random
import re

import numpy as np
import pytest
import torch

from common import corpus_text
import align_demo
import bench
import bench_align
import bench_course
import checkpoint


def test_bigram_is_the_formula_pair_by_pair(corpus):
    train, val = (np.array(checkpoint.open_tokens(corpus, split)).tolist() for split in ("train", "val"))
    V, losses = 512, []
    unigram = [(train.count(i) + 1) / (len(train) + V) for i in range(V)]
    for a, b in zip(val[:200], val[1:201]):
        after = [y for x, y in zip(train, train[1:]) if x == a]
        followers = len(set(after))
        p = (after.count(b) + followers * unigram[b]) / (len(after) + followers) if after else unigram[b]
        losses.append(-np.log(p))
    folder = corpus.parent / "short"
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "meta.json", "tokenizer.json"):
        (folder / name).write_bytes((corpus / name).read_bytes())
    np.array(val[:201], dtype=np.uint16).tofile(folder / "val.bin")
    meta = (folder / "meta.json").read_text(encoding="utf-8")
    (folder / "meta.json").write_text(re.sub(r'"val_tokens": \d+', '"val_tokens": 201', meta), encoding="utf-8")
    assert bench_course.counting_losses(folder)["bigram (Witten-Bell)"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_a_web_from_pages_to_two_models(tmp_path, capfd):
    pick = random.Random(0)
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", corpus_text())))[:600]
    (tmp_path / "html").mkdir()
    for i in range(60):
        prose = " ".join(pick.choice(("The {} of that {} was {} when {}.", "We have to {} with a {}, or be {} and {}.",
                                      "It is the {} that {} for {}; {} too.", "Some {} and more {} are in {} by {}."))
                         .format(*pick.sample(words, 4)) for _ in range(25))
        body = f"<p>{prose}</p>" if i % 3 else "<p>Home | About | Contact</p>"
        (tmp_path / "html" / f"{i}.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    bench.main(["web", str(tmp_path / "html"), f"--out={tmp_path / 'web'}", "--steps=2", "--vocab_size=300",
                "--held_out=20", "--workers=1"])
    table = (tmp_path / "web" / "table.txt").read_text(encoding="utf-8")
    assert "three records" in table and re.search(r"archive +40 ", table) and "language: dropped" in table, table
    assert len(re.findall(r"after 2 steps: \d\.\d+ bits per byte", table)) == 2, table


def test_tokenizers_on_two_texts(tmp_path, capsys):
    for name, text in (("a", corpus_text()[:60_000]), ("b", corpus_text()[60_000:120_000])):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    bench.main(["tokenizers", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--vocab_a=300", "--vocab_b=600"])
    rows = re.findall(r"^(a|b) +(a|b) +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    rates = {row[:2]: float(row[2]) for row in rows}
    assert len(rates) == 4 and rates["a", "b"] > rates["a", "a"] > 1, "more merges, more bytes a token"


def test_small_experiments(capsys, monkeypatch):
    bench.main(["toy"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdecimal()]
    final = {row[0]: float(row[-1]) for row in rows if len(row) == 11}
    assert final["1000"] > 1e10 > final["1"] > final["10"] > final["100"]
    bench.main(["precision"])
    out = capsys.readouterr().out
    assert "loss float32" in out and "output of Linear bfloat16" in out and "bfloat16  4.0000" in out
    bench.main(["sizes", "--shapes=32x1", "--context_length=16", "--vocab_size=64", "--warmup=0", "--steps=2",
                "--compile=false", "--device=cpu"])
    assert "bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(bench_course, "can_compile", lambda device: False)
    bench.main(["attention", "--lengths=64", "--widths=16", "--repeats=2", "--device=cpu"])
    assert "tiles in PyTorch" in capsys.readouterr().out


def test_alignments_experiments_are_stored_one_by_one(tmp_path, monkeypatch, capsys):
    tiny = {name: bench_align.replace(stage, steps=2) for name, stage in align_demo.STAGES.items()}
    monkeypatch.setattr(align_demo, "STAGES", tiny)
    laboratory, measure = align_demo.Laboratory, align_demo.Laboratory.measure
    monkeypatch.setattr(align_demo.Laboratory, "measure", lambda lab, model: measure(lab, model, n=4))
    monkeypatch.setattr(align_demo, "Laboratory", lambda folder, seed: laboratory(folder, seed, (300, 40, 40)))
    small = dict(prompts_per_step=2, group_size=2, batch_size=4)
    monkeypatch.setitem(bench_align.GRPO, "on_policy", {"grpo": small, "root_mean": small | dict(
        normalizer="none", estimator=bench_align.root_mean)})
    flags = ["align", "--experiments=prompts,on_policy", "--seeds=1", "--steps=2", f"--out={tmp_path}"]
    bench.main(flags)
    assert "root_mean" in capsys.readouterr().out and (tmp_path / "curves.png").stat().st_size > 1000
    before = (tmp_path / "results.json").read_bytes()
    bench.main(flags)
    assert (tmp_path / "results.json").read_bytes() == before, "what has ended is not run again"


def test_our_estimator_divides_by_the_root_of_the_mean():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    advantages, _ = bench_align.root_mean(rewards, 4, "mean", "none")
    torch.testing.assert_close(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5, *[0.25 / 0.75 ** 0.5] * 3,
                                                         -0.75 / 0.75 ** 0.5]), atol=1e-4, rtol=0)
