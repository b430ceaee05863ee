"""Claims about train.py."""
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import TINY, ids, steps, torchrun, weights# noqa: F401
import checkpoint
import data
import evaluate
import sample
import scaling
import train

def tiny_run(corpus, out_dir, **more):
    return train.main(
        train.TrainConfig(**TINY | {"data_dir": str(corpus), "out_dir": str(out_dir), "max_steps": 30} | more))


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """(folder, figures) of a run of 60 steps."""
    out_dir = tmp_path_factory.mktemp("out") / "trained"
    return out_dir, tiny_run(corpus, out_dir, max_steps=60, optimizer="muon")


def test_a_model_gone_wild_is_still_scored(corpus, tmp_path):
    """No norm and a rate far too large: 10^4 nats a token, of which no float is the perplexity."""
    wild = tiny_run(corpus, tmp_path, norm="none", qk_norm=False, optimizer="sgd", lr=100.0, max_steps=10,
                    warmup_steps=0, skip_bad_steps=True)
    assert wild["val_loss"] > 710 or math.isnan(wild["val_loss"]), wild


def test_batches_are_windows_with_the_next_token():
    tokens = np.arange(100, dtype=np.uint16)
    x, y = train.get_batch(tokens, 4, 7, "cpu")
    assert x.shape == y.shape == (4, 7) and x.dtype == torch.int64 and torch.equal(x + 1, y)


def test_batch_starts_are_uniform_over_all_windows():
    x, y = train.get_batch(np.arange(17), 20_000, 7, "cpu", torch.Generator().manual_seed(0))
    counts = torch.bincount(x[:, 0])
    assert len(counts) == 10 and y.max() == 16                            # 0 … n - m - 1, the last one included
    assert ((counts - 2000).abs() < 5 * 2000 ** 0.5).all(), counts         # five sigma of a binomial, seeded


def test_batches_that_cannot_be_made():
    with pytest.raises(ValueError, match="7 tokens are too few for windows of 7"):
        train.get_batch(np.arange(7), 1, 7, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        train.get_batch(np.arange(100), 1, 7, "cuda:99")


def test_training_learns_and_leaves_its_files(trained, corpus):
    out_dir, figures = trained
    log = train.read_log(out_dir / "log.jsonl")
    assert log[0]["seed"] == 1337 and log[0]["config"]["optimizer"] == "muon"
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.7, losses          # from ln 512 = 6.2, where a model that learns nothing stays
    assert {"ckpt.pt", "best.pt", "log.jsonl", "loss.png",
            "tokenizer.json"} <= {path.name for path in out_dir.iterdir()}
    entries = torch.load(out_dir / "ckpt.pt", weights_only=True)
    assert {
        "format_version", "model_config", "train_config", "model", "optimizer", "step", "tokens", "rng",
        "data_position", "best_val_loss", "tokenizer_sha256"} <= entries.keys()
    assert entries["step"] == 60 and entries["tokens"] == 60 * 256 == figures["tokens"]
    assert figures["val_bits_per_byte"] == pytest.approx(log[-1]["val_bits_per_byte"])


def test_final_loss_is_that_of_the_whole_split_token_by_token(trained, corpus):
    out_dir, figures = trained
    model, tokenizer = checkpoint.load_model(out_dir)
    ids = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype="<u2").astype(np.int64))
    nats, context, half = 0.0, 32, 16
    with torch.no_grad():
        for position in range(1, len(ids)):  # each token from the window that should predict it
            start = max(0, (position - context - 1 + half) // half) * half
            start = min(start, len(ids) - 1 - context)
            logits = model(ids[None, start:position])[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[ids[position]].item()
    assert figures["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)     # float32 sums
    n_bytes = len((corpus / "val.txt").read_bytes())
    assert figures["val_bits_per_byte"] == pytest.approx(nats / (len(ids) - 1) * len(ids) / n_bytes / math.log(2),
                                                         rel=1e-4)


def test_ragged_micro_batches_equal_one_batch(corpus, tmp_path):
    for name, size in (("whole", None), ("ragged", 3)):                   # 8 sequences as 3 + 3 + 2
        tiny_run(corpus, tmp_path / name, max_steps=3, micro_batch_size=size)
    for (name, a), b in zip(weights(tmp_path / "whole").items(), weights(tmp_path / "ragged").values()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0,
                                   msg=lambda m: f"{name}: {m}")  # Adam divides rounding by |g|


def test_each_kind_of_parameter_gets_its_own_rate_decay_and_optimizer():
    model = train.Transformer(train.ModelConfig(vocab_size=64, context_length=8, d_model=16, n_layers=1, n_heads=2,
                                                position="learned"))
    names = {id(p): name for name, p in model.named_parameters()}
    config = train.TrainConfig(context_length=8, optimizer="muon", lr=0.01, muon_lr=0.03, muon_steps=3,
                               embedding_lr=0.2, weight_decay=0.5)
    found = {names[id(p)]: (type(o).__name__, group["peak_lr"], group["weight_decay"])
             for o in train.make_optimizers(model, config) for group in o.param_groups for p in group["params"]}
    assert len(found) == len(names)
    for name, treated in found.items():
        wanted = (("AdamW", 0.2, 0.0) if "embeddings" in name else ("AdamW", 0.01, 0.5) if name == "lm_head.weight" else
                  ("AdamW", 0.01, 0.0) if ".ln" in name or name == "ln_final.weight" else ("Muon", 0.03, 0.0))
        assert treated == wanted, name
    assert train.make_optimizers(model, config)[1].param_groups[0]["ns_steps"] == 3
    plain = train.make_optimizers(model, train.TrainConfig(context_length=8, lr=0.01))
    assert {group["peak_lr"] for o in plain for group in o.param_groups} == {0.01}
    with pytest.raises(ValueError, match="embedding_lr"):
        train.TrainConfig(embedding_lr=0.0)


@pytest.mark.parametrize("more", [{"optimizer": "adamw"}, {"optimizer": "muon", "loader": "epochs"},
                                  {"optimizer": "sgd", "dtype": "float16"}], ids=str)
def test_an_interrupted_run_equals_a_straight_one_bit_for_bit(corpus, tmp_path, more, monkeypatch):
    monkeypatch.setattr(train.Run, "GROW_EVERY", 9)                       # so that the scale's own state matters, too
    tiny_run(corpus, tmp_path / "straight", **more)
    tiny_run(corpus, tmp_path / "broken", checkpoint_every=13, **more)
    # What a kill after step 17 leaves: the checkpoint of step 13, and a log that is ahead of it.
    tiny_run(corpus, tmp_path / "first", checkpoint_every=13, **more)
    first = {"data_dir": str(corpus), "out_dir": str(tmp_path / "first"), "max_steps": 30}
    run = train.Run(train.TrainConfig(**TINY | first | more))
    while run.step < 13:
        run.train_step()
    run.save()
    tiny_run(corpus, tmp_path / "first", resume=True, **more)
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "first")[name]), name
        assert torch.equal(tensor, weights(tmp_path / "broken")[name]), f"checkpoints changed the run: {name}"
    losses = [[(line["step"], line["loss"]) for line in train.read_log(tmp_path / name / "log.jsonl") if "loss" in line]
              for name in ("straight", "first")]
    assert losses[0] == losses[1]


def test_epochs_show_every_window_once_and_the_thread_changes_nothing():
    tokens, config = np.arange(101, dtype=np.uint16), train.TrainConfig(seed=2, context_length=10, loader="epochs")
    loader = train.Loader(tokens, config, 4, "cpu")                       # 10 windows of 10: 5 batches are 2 epochs
    batches = [loader.next() for _ in range(10)]
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert all(sorted(epoch.tolist()) == list(range(0, 100, 10)) for epoch in starts.split(10))
    assert not torch.equal(starts[:10], starts[10:20]) and all(torch.equal(x + 1, y) for x, y in batches)
    generator = torch.Generator().manual_seed(3)
    loader = train.Loader(tokens, dataclasses.replace(config, loader="random"), 4, "cpu")
    for _ in range(5):
        expected, (x, _) = train.get_batch(tokens, 4, 10, "cpu", generator)[0], loader.next()
        assert torch.equal(x, expected) and torch.equal(loader.state, generator.get_state())


def test_recomputed_activations_change_no_bit(corpus, tmp_path):
    grads = []
    for switch in (False, True):
        run = train.Run(train.TrainConfig(**TINY, data_dir=str(corpus), out_dir=str(tmp_path), max_steps=1,
                                          activation_checkpointing=switch))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            logits, loss = run.model(*run.loader.next())
        loss.backward()
        grads.append([loss, sum(kept), *(p.grad for p in run.model.parameters())])
    assert grads[1].pop(1) < grads[0].pop(1) / 2
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_an_overflow_skips_the_step_and_halves_the_scale(corpus, tmp_path, capsys):
    common = dict(TINY, data_dir=str(corpus), out_dir=str(tmp_path), max_steps=9)

    def step(run, gradient):
        before = [p.detach().clone() for p in run.model.parameters()]
        handle = run.model.ln_final.weight.register_hook(lambda g: torch.full_like(g, gradient))
        run.train_step()
        handle.remove()
        return all(map(torch.equal, before, run.model.parameters()))

    half = train.Run(train.TrainConfig(**common | {"dtype": "float16"}))
    scale = half.loss_scale
    assert step(half, math.inf) and half.loss_scale == scale / 2 and half.skipped == 0
    assert not step(half, 1.0) and half.loss_scale == scale / 2
    half.save()
    entries = checkpoint.read_checkpoint(tmp_path / "ckpt.pt")
    assert entries["loss_scale"] == scale / 2 and entries["good_steps"] == 1
    single = train.Run(train.TrainConfig(**common, skip_bad_steps=True))
    single.train_step()
    assert step(single, math.nan) and single.skipped == 1 and not step(single, 1.0)
    assert "step 2, learning rate" in (out := capsys.readouterr().out) and "gradients: ln_final.weight nan" in out
    with pytest.raises(FloatingPointError, match="ln_final.weight inf.*good state is .*ckpt.pt"):
        step(train.Run(train.TrainConfig(**common)), math.inf)


def test_settings_given_on_resuming_count_and_another_optimizer_is_refused(corpus, tmp_path):
    tiny_run(corpus, tmp_path, max_steps=2, weight_decay=0.1)
    asked = TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=4, resume=True)
    run = train.Run(train.TrainConfig(**asked | dict(weight_decay=0.7, beta1=0.5, lr=0.03)))
    run.restore()
    group = run.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["peak_lr"]) == (0.7, (0.5, 0.95), 0.03)
    assert run.step == 2 and run.optimizers[0].state, "the moments come from the checkpoint"
    with pytest.raises(ValueError, match="trained with optimizer=adamw, whose state optimizer=sgd cannot"):
        train.main(train.TrainConfig(**asked | dict(optimizer="sgd")))


def test_a_fresh_run_keeps_the_checkpoints_of_another_one_apart(corpus, tmp_path, capsys):
    tiny_run(corpus, tmp_path, max_steps=10, checkpoint_every=5)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="last good state is not saved yet"):
        tiny_run(corpus, tmp_path, max_steps=30, lr=1e30, grad_clip=math.inf, optimizer="sgd", eval_every=0)
    assert not (tmp_path / "ckpt.pt").exists() and (tmp_path / "ckpt.old.pt").read_bytes() == before
    assert "its ckpt.pt is kept as ckpt.old.pt" in capsys.readouterr().out


@pytest.mark.parametrize("flags, minutes", [
    ("--max_steps=9", None), ("--max_steps=9 --max-minutes=3", 3.0), ("--max_minutes=.5 --max_steps=9", 0.5), ("", 2.4),
    ("--max_steps=9 --max_minutes=none", None), ("--max_steps=none", 2.4), ("sweep max_steps=3,4", None),
    ("sweep max_steps=3,4 --max_minutes=none", None), ("--max_minutes=1", 1.0)])
def test_a_time_limit_is_dropped_for_steps_and_only_when_it_was_not_asked_for(flags, minutes, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train, "main", lambda config: seen.append(config) or {"interrupted": None})
    monkeypatch.setattr(train, "sweep", lambda config, words: seen.append(config))
    train.run_command_line(flags.split())
    assert seen[0].max_minutes == minutes


def test_a_signal_in_the_last_evaluation_ends_the_program(corpus, tmp_path, monkeypatch, capsys, request):
    monkeypatch.setattr(train.Run, "full_loss", lambda run: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job starts without
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    settings = [f"--{name}={value}" for name, value in TINY.items()]
    with pytest.raises(SystemExit) as end:
        train.run_command_line(["sweep", "seed=1,2", "--max_steps=2", f"--data_dir={corpus}", f"--out_dir={tmp_path}",
                                *settings])
    assert end.value.code == 130 and (tmp_path / "seed=1" / "ckpt.pt").exists() and not (tmp_path / "seed=2").exists()


def test_the_rate_of_a_run_limited_by_the_clock_starts_at_its_peak_without_warmup():
    config = train.TrainConfig(schedule="wsd", warmup_steps=0, max_minutes=1.0)
    assert train.lr_factor(config, 1, math.inf) == 1.0


def test_a_sweep_draws_up_seeds_survives_divergence_and_goes_on(corpus, tmp_path, capsys):
    config = train.TrainConfig(**TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=6, grad_clip=1e9))
    words = ["learning_rate=1e-3,1e6", "n_layers=1,2", "seed=1,2"]
    train.sweep(config, words)
    assert capsys.readouterr().out.count("val perplexity") == 4
    rows = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert {row["setting"] for row in rows[:2]} == {"lr=0.001,n_layers=1", "lr=0.001,n_layers=2"}
    for row in rows[:2]:
        a, b = row["scores"]["1"], row["scores"]["2"]
        assert row["mean"] == pytest.approx((a + b) / 2) and row["spread"] == pytest.approx(abs(a - b) / 2 ** 0.5)
    assert rows[0]["mean"] < rows[1]["mean"] and rows[2]["diverged"].keys() == {"1", "2"}
    assert "seed 1 diverged at step" in (tmp_path / "sweep.txt").read_text(encoding="utf-8")
    log = tmp_path / "lr=0.001,n_layers=1,seed=1" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").rpartition('{"step"')[0], encoding="utf-8")      # killed at the end
    train.sweep(config, words)
    assert (out := capsys.readouterr().out).count("done before") == 7 and "resumed" in out
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8")) == rows
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for changes, words, message in (({}, ["sede=1"], "Did you mean seed"), ({}, ["lr"], "spans no axis"),
                                    ({}, ["seed=7", "n_heads=1,3"], "not a multiple of n_heads=3"),
                                    ({"n_heads": 1}, words, "holds a run with n_heads=2, now it is 1")):
        with pytest.raises(ValueError, match=message):
            train.sweep(dataclasses.replace(config, **changes), words)
    assert not list(tmp_path.glob("seed=7*")), "no point is trained before all are known to be possible"


def test_how_often_one_evaluates_changes_nothing(corpus, tmp_path):
    for name, every in (("often", 2), ("never", 0)):
        tiny_run(corpus, tmp_path / name, max_steps=10, eval_every=every)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "often").values(),
                                          weights(tmp_path / "never").values()))


def test_the_clock_ends_a_run_and_its_schedule(corpus, tmp_path):
    figures = tiny_run(corpus, tmp_path / "timed", max_steps=None, max_minutes=1 / 60, log_every=1)
    rates = [line["lr"] for line in train.read_log(tmp_path / "timed" / "log.jsonl") if "loss" in line]
    assert 1.0 <= figures["seconds"] < 10
    assert len(rates) < 10 or max(rates) > 2e-3 and rates[-1] < 6e-4  # up to the peak of 3e-3, down to nearly a tenth


def test_a_diverged_run_stops_and_says_where(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+, learning rate .*diverged"):
        tiny_run(corpus, tmp_path / "wild", lr=1e6, grad_clip=1e9, max_steps=200, log_every=1)


def test_smaller_weights_cost_little_and_are_asked_for_by_one_flag(trained, monkeypatch):
    seen, really = [], sample.quantize
    monkeypatch.setattr(evaluate, "quantize", lambda model, kind: seen.append(kind) or really(model, kind))
    lines = [evaluate.read(str(trained[0]), evaluate.EvaluateConfig(quantize=kind)) for kind in (None, "int8", "int4")]
    plain, int8, int4 = (float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines)
    assert abs(int8 - plain) < 0.02 and abs(int4 - plain) < 0.2 and seen == ["int8", "int4"], lines


def test_answers_that_once_were_misread():
    from align import boxed_reward, group_normalized_rewards, grpo_step, masked_mean, r1_zero_reward
    from evaluate import parse_gsm8k, parse_mmlu, same_answer
    for text, letter in (("The answer is C. Option A is wrong, option B is wrong", "C"), ("Answer: 'B'", "B"),
                         ("B, because A is wrong", "B"), ("The answer is not B", None), ("answer is option (D)", "D")):
        assert parse_mmlu({}, text) == letter, text
    for left, right in ((r"\boxed{1\frac{1}{2}}", "1.5"), (r"3\frac15", "16/5"), (r"1{,}000", "1000"),
                        ("0.00001", 1e-05)):
        assert same_answer(left, right), (left, right)
    assert not same_answer(r"\boxed{1\frac{1}{2}}", "5.5") and not same_answer(r"1\ 2", "12")
    assert parse_gsm8k("so 3.5.") == "3.5" and parse_gsm8k("-$1,072.50") == "-1072.50"
    assert r1_zero_reward("</think> <answer>42</answer> User: x </think> <answer> 4", "42")["reward"] == 1
    assert boxed_reward(r"\boxed{42} or \boxed{4", "42")["reward"] == 1
    equal = group_normalized_rewards(lambda *_: {"reward": 12.34}, ["r"] * 7, ["t"] * 7, 7)[0]
    assert not equal.any() and masked_mean(torch.ones(3, 4), torch.ones(4)) == 1
    log_probs, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([[1, 1, 0], [1, 0, 0]])
    old = torch.where(mask.bool(), log_probs.detach(), -math.inf)
    grpo_step(log_probs, mask, 1, "grpo_clip", advantages=torch.ones(2, 1), old_log_probs=old, clip=0.2)
    assert log_probs.grad.isfinite().all() and not log_probs.grad[mask == 0].any()


def test_data_and_scaling_refuse_what_once_did_harm(tmp_path):
    import scaling
    source = tmp_path / "val.txt"
    source.write_text("one line\n" * 500, encoding="utf-8")
    with pytest.raises(ValueError, match="where the split itself is written"):
        data.prepare(source, data_dir=tmp_path)
    assert source.stat().st_size == 4500
    page = "<html><body><p>" + "Die Straße in Zürich ist schön. " * 40 + "</p></body></html>"
    assert "Straße in Zürich" in data.extract_text(page.encode() + b"\xe4")
    assert "Straße in Zürich" in data.extract_text(page.encode("latin-1"))
    with pytest.raises(ValueError, match="the input files themselves"):
        data.dedup_minhash([source], 10, 5, 2, 0.8, tmp_path)
    assert data.mask_phone_numbers("call (283)\u00a0182\u20113829")[1] == 1
    flat = [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": 3.0}
            for c in (1e17, 1e18) for n in (1e7, 3e7, 1e8)]
    with pytest.raises(ValueError, match="does not fall with N and D"):
        scaling.fit_parametric(flat)
    for bad in ([1, 2, 3], [{"parameters": 1e6, "compute_budget": "1e18", "final_loss": 3.0}] * 8):
        with pytest.raises(ValueError, match="run 0"):
            scaling.fit_parametric(bad)


def test_token_files_alone_train_and_say_that_no_text_can_be_written(corpus, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copy(Path(corpus) / f"{split}.bin", tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(Path(corpus) / "tokenizer.json", tmp_path / "out")               # of a run that was there before
    figures = tiny_run(tmp_path, tmp_path / "out", max_steps=2, num_samples=2)
    said = capsys.readouterr().out
    assert "no samples" in said and said.splitlines()[-1].endswith("val bits per byte n/a")
    assert figures["val_bits_per_byte"] is None and checkpoint.load_model(tmp_path / "out")[1] is None


def test_files_of_two_preparations_are_refused(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "data" / "val.bin")
    with pytest.raises(ValueError, match="of two preparations"):
        tiny_run(tmp_path / "data", tmp_path, max_steps=2)


def test_settings_and_data_that_do_not_fit_are_refused(corpus, tmp_path, trained):
    for more, words in (({"optimizer": "adam"}, "optimizer='adam'"), ({"batch_tokens": 16}, "less than one sequence"),
                        ({"max_minutes": -1.0}, "max_minutes=-1.0"), ({"vocab_size": 100}, "holds id"),
                        ({"device": "cuda:99"}, "cuda:99"), ({"n_heads": 5}, "not a multiple")):
        with pytest.raises(ValueError, match=words):
            tiny_run(corpus, tmp_path / "never", **more)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        tiny_run(corpus, tmp_path / "never", resume=True)
    with pytest.raises(ValueError, match="does not fit this model"):
        shutil.copytree(trained[0], tmp_path / "other")
        tiny_run(corpus, tmp_path / "other", resume=True, n_layers=3, optimizer="muon")
    folder = shutil.copytree(corpus, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="another tokenizer"):
        tiny_run(folder, tmp_path / "other", resume=True, optimizer="muon")


def test_distillation_by_hand_and_a_teacher_that_stays_as_it_is(corpus, tmp_path, trained):
    student, teacher = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[2 * math.log(3), 0.0]],
                                                                                   requires_grad=True)
    loss = train.distillation_loss(student, teacher, temperature=2.0)      # softmax(teacher / 2) = 3/4, 1/4
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]]))         # T (p_student - p_teacher)
    assert teacher.grad is None
    config = train.TrainConfig(**TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=3, d_model=16,
                                             teacher=str(trained[0]), teacher_weight=2.0, micro_batch_size=3))
    run = train.Run(config)
    before = copy.deepcopy(run.teacher.state_dict())
    run.train_step()
    assert all(map(torch.equal, run.teacher.state_dict().values(), before.values()))
    assert not run.teacher.training and all(p.grad is None for p in run.teacher.parameters())
    plain = train.Run(dataclasses.replace(config, teacher=None))
    plain.train_step()
    assert not all(map(torch.equal, run.model.parameters(), plain.model.parameters()))
    foreign = shutil.copytree(trained[0], tmp_path / "foreign")
    torch.save(torch.load(foreign / "ckpt.pt", weights_only=True) | {"tokenizer_sha256": "0"}, foreign / "ckpt.pt")
    (foreign / "tokenizer.json").unlink()
    for more, words in (({"teacher": str(foreign)}, "another tokenizer"), ({"teacher_temperature": 0.0}, "ture=0.0")):
        with pytest.raises(ValueError, match=words):
            train.Run(dataclasses.replace(config, **more))


def test_train_on_ranks_equals_one_process_and_goes_on_anywhere(corpus, tmp_path):
    """10 steps, the first 5 on one number of ranks and by one strategy, the rest on another and by another."""
    config = tmp_path / "config_tiny.py"
    lines = [f"{key} = {value!r}\n" for key, value in TINY.items() if key != "eval_every"]
    config.write_text("".join(lines), encoding="utf-8")
    common = ["train.py", config, f"--data_dir={corpus}"]

    def run(out, size, steps, *flags):
        words = [*common, f"--out_dir={tmp_path / out}", f"--max_steps={steps}", "--eval_every=2",
                 "--micro_batch_size=3", "--grad_clip=0.3", *flags]
        done, _ = torchrun(*words, size=size)
        assert done.returncode == 0, done.stderr
        assert "val bits per byte" in done.stdout and done.stdout.count("val perplexity") == 1, "one rank speaks"

    tiny_run(corpus, tmp_path / "one", max_steps=10, grad_clip=0.3, eval_every=2, micro_batch_size=3)
    run("two", 2, 5, "--parallel=fsdp")                        # 5 are the warmup: the schedule of the 10 begins alike
    (tmp_path / "three").mkdir()
    shutil.copy(tmp_path / "two" / "ckpt.pt", tmp_path / "three" / "ckpt.pt")
    run("two", 2, 10, "--tp=2", "--resume=true")
    run("three", 3, 10, "--parallel=zero1", "--resume=true")   # 8 sequences and 2 evaluation batches on 3 ranks

    def losses(out):
        log = train.read_log(tmp_path / out / "log.jsonl")
        return {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
    for out, steps in (("two", (2, 4, 6, 8, 10)), ("three", (6, 8, 10))):
        found, right = losses(out), losses("one")
        assert [found[step] for step in steps] == pytest.approx([right[step] for step in steps], abs=1e-4)
        for (name, tensor), other in zip(weights(tmp_path / "one").items(), weights(tmp_path / out).values()):
            torch.testing.assert_close(tensor, other, atol=5e-5, rtol=0, msg=lambda m: f"{out}, {name}: {m}")
    with pytest.raises(ValueError, match="parallel=fsdp cuts matrices and optimizer=muon needs whole ones"):
        train.TrainConfig(**TINY, parallel="fsdp", optimizer="muon")
