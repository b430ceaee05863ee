"""Claims about bench.py's verbs: data, the course's experiments, alignment; each from end to end, tiny."""
import re

import numpy as np
import pytest
import torch

from common import corpus_text, warc_record
import align_demo
import bench
import bench_course
import checkpoint


def test_bigram_is_the_formula_pair_by_pair(corpus, monkeypatch):
    train, val = (np.array(checkpoint.open_tokens(corpus, split))[:9000] for split in ("train", "val"))
    unigram, losses = (np.bincount(train, minlength=512) + 1) / (len(train) + 512), []
    for a, b in zip(val[:200], val[1:201]):
        after = train[1:][train[:-1] == a].tolist()
        followers = len(set(after))
        losses.append(-np.log((after.count(b) + followers * unigram[b]) / (len(after) + followers) if after
                              else unigram[b]))
    monkeypatch.setattr(bench_course, "open_tokens", lambda folder, split: train if split == "train" else val[:201])
    assert bench_course.counting_losses(corpus)["bigram (Witten-Bell)"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_small_experiments(tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for i, path in enumerate(texts):
        path.write_text(corpus_text()[60_000 * i:60_000 * (i + 1)], encoding="utf-8", newline="")

    def says(*words):
        bench.main([str(word) for word in words])
        return capsys.readouterr().out
    said = says("bpe", *texts, "--vocab_size=300,600")
    rates = {row[:2]: float(row[2]) for row in re.findall(r"^ +(a|b) by (a|b)'s, ours +([\d.]+)", said, re.M)}
    assert len(rates) == 4 and rates["a", "b"] > rates["a", "a"] > 1, "more merges, more bytes a token"
    assert len(re.findall(r"ids, (?:ours|Hugging Face)(?: +[\d.,]+){3}$", said, re.M)) == 4, said
    final = dict(re.findall(r"^ +(10*) .* (\S+)$", says("toy"), re.M))
    assert float(final["1000"]) > 1e10 > float(final["1"]) > float(final["10"]) > float(final["100"])
    page = b"<html><body><p>" + b"We have to be in it. " * 60
    (tmp_path / "pages.warc").write_bytes(b"".join(warc_record(f"http://a.b/{i}", page) for i in range(9)))
    assert re.search(r"times the extraction alone(.|\n)+archive +9 ", says("pages", tmp_path / "pages.warc"))
    assert "tiles in PyTorch, 16 x 8" in says("attention", "--toy=true", "--device=cpu")


def test_alignments_experiments_are_stored_one_by_one(tmp_path, monkeypatch, capsys):
    tiny = {name: bench_course.replace(stage, steps=2) for name, stage in align_demo.STAGES.items()}
    monkeypatch.setattr(align_demo, "STAGES", tiny)
    laboratory = align_demo.Laboratory
    monkeypatch.setattr(align_demo, "Laboratory", lambda folder, seed: laboratory(folder, seed, (300, 40, 40)))
    small = dict(prompts_per_step=2, group_size=2, batch_size=4)
    monkeypatch.setitem(bench_course.GRPO, "on_policy", {"grpo": small, "root_mean": small | dict(
        normalizer="none", estimator=bench_course.root_mean)})
    monkeypatch.chdir(tmp_path)
    flags = ["align", "--experiments=prompts,on_policy", "--seeds=2"]
    bench.main(flags)
    said = capsys.readouterr().out
    assert len(re.findall(r"^  root_mean +2(?: +[\d.na]+){9}$", said, re.M)) == 1 and "step 2, reward " in said, said
    bench.main(flags)
    assert "seed 1" not in capsys.readouterr().out and (tmp_path / "out/bench_align/experiments.png").is_file()


def test_our_estimator_divides_by_the_root_of_the_mean():
    advantages, _ = bench_course.root_mean(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 4, "mean", "none")
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, *[0.25 / 0.75 ** 0.5] * 3, -0.75 / 0.75 ** 0.5])
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)


def test_a_graph_of_a_model_that_looks_at_the_token_before_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(bench.SHAPES, "toy", dict(vocab_size=61, context_length=32, d_model=16, n_heads=1, smear=True))
    with pytest.raises(SystemExit):
        bench.main("decode toy --graph=true --device=cpu".split())
    assert "looks at the token before" in capsys.readouterr().err
