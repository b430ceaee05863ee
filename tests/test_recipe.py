"""Claims about recipe.py: settings, batches, optimizers, the learning rate."""
import math
import shutil

import numpy as np
import pytest
import torch

import recipe
import train


@pytest.mark.parametrize("settings, words", [
    ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw"), ({"batch_tokens": 16}, "batch_tokens=16 is less"),
    ({"seed": -5}, "seed=-5 must be at least 0"), ({"max_minutes": 0.0}, "max_minutes=0.0 must be above 0"),
    ({"vocab_size": 0}, "vocab_size=0 must be at least 1"), ({"lr": math.nan}, "lr=nan"), ({"beta1": 1.5}, "beta1=1.5"),
    ({"n_heads": 5}, "no multiple of n_heads=5"), ({"teacher": "out/a", "fused_loss": True}, "teacher=out/a needs"),
    ({"parallel": "fsdp", "optimizer": "muon"}, "parallel=fsdp.* optimizer=muon needs whole ones"),
    ({"tp": 2, "compile": True}, "tp=2.* sends")], ids=str)
def test_settings_that_cannot_be_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        recipe.TrainConfig(**settings)


def test_batches_are_windows_with_the_next_token_and_start_anywhere():
    x, y = recipe.get_batch(np.arange(17, dtype=np.uint16), 20_000, 7, "cpu", torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (20_000, 7) and x.dtype == torch.int64 and torch.equal(x + 1, y)
    counts = torch.bincount(x[:, 0])
    assert len(counts) == 10 and y.max() == 16                            # 0 … n - m - 1, the last one included
    assert ((counts - 2000).abs() < 5 * 2000 ** 0.5).all(), counts         # five sigma of a binomial, seeded


def test_batches_that_cannot_be_made():
    with pytest.raises(ValueError, match="7 tokens are too few for windows of 7"):
        recipe.get_batch(np.arange(7), 1, 7, "cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        recipe.get_batch(np.arange(100), 1, 7, "cuda:99")
    with pytest.raises(ValueError, match="the data holds id 99, but vocab_size is 99"):
        recipe.get_batch(np.array([99] * 9), 1, 7, "cpu", vocab_size=99)


def test_epochs_show_every_window_once_and_random_windows_follow_their_generator():
    tokens = np.arange(101, dtype=np.uint16)
    loader = recipe.Loader(tokens, 4, 10, "cpu", seed=3, epochs=True)     # 10 windows of 10: 5 batches are 2 epochs
    batches = [loader.next() for _ in range(10)]
    starts = torch.cat([x[:, 0] for x, _ in batches])
    assert all(sorted(epoch.tolist()) == list(range(0, 100, 10)) for epoch in starts.split(10))
    assert not torch.equal(starts[:10], starts[10:20]) and all(torch.equal(x + 1, y) for x, y in batches)
    again = recipe.Loader(tokens, 4, 10, "cpu", seed=3, epochs=True)
    again.position = loader.position - 4                                  # all that a checkpoint keeps
    assert torch.equal(again.next()[0], batches[-1][0])
    generator, loader = torch.Generator().manual_seed(3), recipe.Loader(tokens, 4, 10, "cpu", seed=3, epochs=False)
    assert all(torch.equal(recipe.get_batch(tokens, 4, 10, "cpu", generator)[0], loader.next()[0]) for _ in range(5))


def test_token_files_that_do_not_fit_together_are_refused(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "data")
    assert recipe.open_data(folder, 32)[2] == 512 and recipe.open_data(folder, 32, 600)[2] == 600
    for context, vocab_size, words in ((32, 9, "val.bin holds id"), (10 ** 6, None, "train.bin has .* too few")):
        with pytest.raises(ValueError, match=words):
            recipe.open_data(folder, context, vocab_size)
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-2])         # a copy that was cut short
    with pytest.raises(ValueError, match="val.bin has .* its meta.json says"):
        recipe.open_data(folder, 32)
    (folder / "meta.json").unlink()
    assert recipe.open_data(folder, 32)[2] == 50_304, "as nanoGPT's token files, which have no meta.json"


def test_each_kind_of_parameter_gets_its_own_rate_decay_and_optimizer():
    model = train.Transformer(train.ModelConfig(vocab_size=64, context_length=8, d_model=16, n_layers=1, n_heads=2,
                                                position="learned"))
    names = {id(p): name for name, p in model.named_parameters()}
    config = recipe.TrainConfig(context_length=8, optimizer="muon", lr=0.01, muon_lr=0.03, muon_steps=3,
                                embedding_lr=0.2, weight_decay=0.5)
    optimizers = recipe.make_optimizers(model, config)
    treated = {names[id(p)]: (type(optimizer).__name__, group["peak_lr"], group["weight_decay"])
               for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(treated) == len(names) and optimizers[1].param_groups[0]["ns_steps"] == 3
    assert treated["token_embeddings.weight"] == treated["position_embeddings.weight"] == ("AdamW", 0.2, 0.0)
    assert treated["lm_head.weight"] == ("AdamW", 0.01, 0.5)
    assert treated["layers.0.ln1.weight"] == treated["ln_final.weight"] == ("AdamW", 0.01, 0.0)
    assert treated["layers.0.attn.q_proj.weight"] == treated["layers.0.ffn.w2.weight"] == ("Muon", 0.03, 0.0)
    plain = recipe.make_optimizers(model, recipe.TrainConfig(context_length=8, lr=0.01))
    assert {group["peak_lr"] for optimizer in plain for group in optimizer.param_groups} == {0.01}


def test_the_rate_rises_stays_falls_and_needs_no_warmup():
    config = recipe.TrainConfig(schedule="wsd", warmup_steps=10, max_steps=100, min_lr_factor=0.1)
    rates = [recipe.lr_factor(config, step, 100) for step in (5, 10, 70, 85, 100)]
    assert rates == pytest.approx([0.5, 1, 1, 0.55, 0.1])
    config = recipe.TrainConfig(schedule="wsd", warmup_steps=0, max_minutes=1.0)
    assert recipe.lr_factor(config, 1, math.inf) == 1.0, "a run that the clock limits does not know its length yet"
    config = recipe.TrainConfig(schedule="wsd", warmup_steps=0, decay_fraction=0.0)
    assert {recipe.lr_factor(config, step, 100) for step in range(1, 101)} == {1.0}


def test_the_loss_scale_falls_to_one_and_grows_again(monkeypatch):
    monkeypatch.setattr(recipe.LossScale, "GROW_EVERY", 3)
    scale = recipe.LossScale(on=True)
    for _ in range(40):
        scale.update(finite=False)
    assert scale.scale == 1.0
    for finite in (True, True, False, True, True, True):
        scale.update(finite)
    assert scale.scale == 2.0, "three good steps in a row double it"
    off = recipe.LossScale(on=False)
    off.update(finite=True)
    assert off.scale == 1.0 and off.good_steps == 0
