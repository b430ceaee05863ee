"""Claims about train.py: one step, evaluation, saving and going on, fine-tuning, the command line."""
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common import ROOT, TINY, torchrun, weights
import checkpoint
import model as model_module
import recipe
import train
from bench_course import counting_losses
from configurator import resolve


def tiny(corpus, out_dir, **more):
    return train.TrainConfig(**TINY | {"data_dir": str(corpus), "out_dir": str(out_dir), "max_steps": 30} | more)


def tiny_run(corpus, out_dir, **more):
    return train.main(tiny(corpus, out_dir, **more))


def losses(out_dir, key="loss"):
    return [(line["step"], line[key]) for line in train.read_log(Path(out_dir) / "log.jsonl") if key in line]


def assert_same_weights(one, two, atol=0.0):
    for (name, a), b in zip(weights(one).items(), weights(two).values()):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """(folder, figures) of a run of 60 steps."""
    out_dir = tmp_path_factory.mktemp("out") / "trained"
    return out_dir, tiny_run(corpus, out_dir, max_steps=60, optimizer="muon")


def test_sixty_steps_of_the_default_config_beat_a_bigram_model(corpus, tmp_path):
    given = dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps="60", max_minutes="none", eval_every="0",
                 warmup_steps="6", num_samples="0", device="cpu")
    config, _ = resolve(train.TrainConfig, given, str(ROOT / train.DEFAULT_CONFIG))
    figures, known = train.main(config), counting_losses(corpus)
    assert figures["val_loss"] < known["bigram (Witten-Bell)"] < known["unigram"] < known["uniform"], (figures, known)


def test_training_leaves_its_files(trained):
    out_dir, figures = trained
    log = train.read_log(out_dir / "log.jsonl")
    assert log[0]["seed"] == 1337 and log[0]["config"]["optimizer"] == "muon"
    files = {"ckpt.pt", "best.pt", "log.jsonl", "loss.png", "tokenizer.json"}
    assert {path.name for path in out_dir.iterdir()} == files
    saved, best = (torch.load(out_dir / name, weights_only=True) for name in ("ckpt.pt", "best.pt"))
    assert {"format_version", "model_config", "train_config", "model", "optimizer", "step", "tokens", "rng", "dtype",
            "data_position", "best_val_loss", "tokenizer_sha256"} <= saved.keys()
    assert saved["step"] == 60 and saved["tokens"] == 60 * 256 == figures["tokens"]
    lowest = min(losses(out_dir, "val_loss")[:-1], key=lambda line: line[1])
    assert (best["step"], best["best_val_loss"]) == lowest and saved["best_val_loss"] == lowest[1]


def test_final_loss_is_that_of_the_whole_split_token_by_token(trained, corpus):
    out_dir, figures = trained
    model, _ = model_module.load_model(out_dir)
    ids = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype="<u2").astype(np.int64))
    nats, done = 0.0, 1
    with torch.no_grad():                    # windows of 32 half a context apart; the last one ends with the text
        for start in [*range(0, len(ids) - 33, 16), len(ids) - 33]:
            log_p = torch.log_softmax(model(ids[None, start:start + 32])[0].double(), -1)
            nats -= log_p[done - start - 1:].gather(-1, ids[done:start + 33, None]).sum().item()
            done = start + 33
    mean, n_bytes = nats / (len(ids) - 1), len((corpus / "val.txt").read_bytes())
    assert figures["val_loss"] == pytest.approx(mean, rel=1e-4)                      # float32 sums
    assert figures["val_bits_per_byte"] == pytest.approx(mean * len(ids) / n_bytes / math.log(2), rel=1e-4)


def test_neither_micro_batches_nor_evaluations_change_what_is_trained(corpus, tmp_path):
    for name, more in (("whole", {}), ("ragged", {"micro_batch_size": 3}), ("seldom", {"eval_every": 0})):
        tiny_run(corpus, tmp_path / name, max_steps=6, **{"eval_every": 2} | more)
    assert_same_weights(tmp_path / "whole", tmp_path / "seldom")
    assert_same_weights(tmp_path / "whole", tmp_path / "ragged", atol=2e-5)                # 8 sequences as 3 + 3 + 2


@pytest.mark.parametrize("more", [{"optimizer": "adamw"}, {"optimizer": "muon", "loader": "epochs"},
                                  {"optimizer": "sgd", "dtype": "float16"}], ids=str)
def test_an_interrupted_run_equals_a_straight_one_bit_for_bit(corpus, tmp_path, more, monkeypatch):
    monkeypatch.setattr(recipe.LossScale, "GROW_EVERY", 9)                # so that the scale's own state matters, too
    tiny_run(corpus, tmp_path / "straight", checkpoint_every=13, **more)
    for steps in (13, 20):                                                # killed twice: the log is ahead each time
        run = train.Run(tiny(corpus, tmp_path / "killed", **more, resume=steps > 13))
        Path(run.config.out_dir).mkdir(exist_ok=True)
        while run.step < steps:
            run.train_step()
        run.save()
    figures = tiny_run(corpus, tmp_path / "killed", resume=True, **more)
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    one, two = (checkpoint.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("straight", "killed"))
    assert all(one[key] == two[key] for key in ("loss_scale", "good_steps", "data_position", "tokens"))
    assert torch.equal(one["rng"]["torch"], two["rng"]["torch"]), "nothing else draws from it"
    straight = dict(losses(tmp_path / "straight"))
    assert all(straight[step] == loss for step, loss in losses(tmp_path / "killed")) and figures["step"] == 30


def test_a_resume_keeps_the_dtype_takes_new_settings_and_says_so(corpus, tmp_path, monkeypatch):
    tiny_run(corpus, tmp_path, max_steps=2, weight_decay=0.1, dtype="bfloat16")
    monkeypatch.setattr(train, "pick_dtype", lambda *_: "float32")             # what another machine would choose
    more = dict(max_steps=4, resume=True, dtype=None, weight_decay=0.7, beta1=0.5, lr=0.03)
    run = train.Run(tiny(corpus, tmp_path, **more))
    group = run.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["peak_lr"]) == (0.7, (0.5, 0.95), 0.03)
    assert run.step == 2 and run.optimizers[0].state, "the moments come from the checkpoint"
    assert run.dtype == "bfloat16", "not measured anew"
    train.main(tiny(corpus, tmp_path, **more))
    headers = [line for line in train.read_log(tmp_path / "log.jsonl") if "config" in line]
    assert [line["config"]["lr"] for line in headers] == [TINY["lr"], 0.03] and headers[1]["step"] == 2
    more |= dict(max_steps=6, batch_tokens=3 * TINY["batch_tokens"])
    assert train.main(tiny(corpus, tmp_path, **more))["tokens"] == 10 * TINY["batch_tokens"]
    with pytest.raises(ValueError, match="trained with optimizer=adamw, whose state optimizer=sgd cannot"):
        train.main(tiny(corpus, tmp_path, max_steps=6, resume=True, optimizer="sgd"))


def test_an_overflow_costs_its_step_and_halves_the_scale(corpus, tmp_path):
    def step(run, gradient):
        before = [p.detach().clone() for p in run.model.parameters()]
        handle = run.model.ln_final.weight.register_hook(lambda g: torch.full_like(g, gradient))
        run.train_step()
        handle.remove()
        return all(map(torch.equal, before, run.model.parameters()))

    half = train.Run(tiny(corpus, tmp_path, dtype="float16"))
    scale = half.loss_scale.scale
    assert step(half, math.inf) and half.loss_scale.scale == scale / 2
    assert not step(half, 1.0) and half.loss_scale.scale == scale / 2
    with pytest.raises(FloatingPointError, match="step 1: .*norm inf at learning rate.*Nothing is saved yet"):
        step(train.Run(tiny(corpus, tmp_path / "new")), math.inf)


def test_a_folder_that_holds_a_run_keeps_it_until_there_is_a_better_one(corpus, tmp_path):
    tiny_run(corpus, tmp_path, max_steps=10, eval_every=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a run.*--overwrite=true.*--resume=true"):
        tiny_run(corpus, tmp_path)
    diverging = dict(lr=1e30, grad_clip=math.inf, eval_every=0)
    for fails in (diverging | {"optimizer": "sgd"}, {"n_layers": 3, "vocab_size": 100}):
        with pytest.raises((FloatingPointError, ValueError)):
            tiny_run(corpus, tmp_path, overwrite=True, **fails)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before, "failed before its first save"
    with pytest.raises(FloatingPointError, match=r"step \d+: .*run has diverged. The last good state is .*ckpt.pt"):
        tiny_run(corpus, tmp_path, **diverging, max_steps=200, resume=True, checkpoint_every=1, warmup_steps=0)
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())
    assert train.read_log(tmp_path / "log.jsonl")[-1]["diverged"]
    tiny_run(corpus, tmp_path, max_steps=3, eval_every=0, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "log.jsonl", "loss.png", "tokenizer.json"}
    assert [step for step, _ in losses(tmp_path)][-1] == 3 and checkpoint.load_checkpoint(tmp_path / "ckpt.pt") == 3


def test_fine_tuning_starts_from_the_parent_as_it_was_scored(corpus, tmp_path, trained):
    parent, figures = trained
    before = {path: path.read_bytes() for path in parent.iterdir()}
    plain = {key: value for key, value in TINY.items() if key not in ("d_model", "n_layers", "n_heads",
                                                                      "context_length")}
    child = train.main(train.TrainConfig(**plain, data_dir=str(corpus), max_steps=10, init_from=str(parent),
                                         out_dir=str(tmp_path / "child")))
    log = train.read_log(tmp_path / "child" / "log.jsonl")
    assert log[0]["config"]["n_layers"] == 2 and log[1]["step"] == 0
    assert log[1]["val_loss"] == figures["val_loss"] and child["val_loss"] < figures["val_loss"]
    for more, words in (({"out_dir": str(parent), "overwrite": True}, str(parent)),
                        ({"init_from": str(tmp_path / "none")}, "no checkpoint at")):
        with pytest.raises((ValueError, OSError), match=words):
            tiny_run(corpus, **{"out_dir": tmp_path / "never", "init_from": str(parent)} | more)
    assert {path: path.read_bytes() for path in parent.iterdir()} == before


def test_data_of_another_tokenizer_is_refused_by_all_that_read_a_checkpoint(corpus, tmp_path, trained):
    folder = shutil.copytree(corpus, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}), encoding="utf-8")
    for more in ({"init_from": str(trained[0])}, {"out_dir": trained[0], "resume": True}, {"teacher": str(trained[0])}):
        with pytest.raises(ValueError, match="was trained with another tokenizer.*000000000 by"):
            tiny_run(folder, **{"out_dir": tmp_path / "never"} | more)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="meta.json is missing"):
        tiny_run(folder, trained[0], resume=True)


def test_a_run_that_fails_before_its_first_save_leaves_the_folder_free(corpus, tmp_path):
    tiny_run(corpus, tmp_path / "teacher", max_steps=1, context_length=8)
    with pytest.raises(ValueError, match="pass the context of 8"):
        tiny_run(corpus, tmp_path / "student", teacher=str(tmp_path / "teacher"))
    tiny_run(corpus, tmp_path / "student", max_steps=1)
    assert len(train.read_log(tmp_path / "student" / "log.jsonl")) == 3


def test_a_shape_of_the_default_config_yields_and_one_that_was_asked_for_does_not(corpus, tmp_path, trained, capsys):
    words = [f"--init_from={trained[0]}", f"--data_dir={corpus}", f"--out_dir={tmp_path / 'a'}", "--max_steps=1",
             "--device=cpu", "--num_samples=0", "--eval_every=0", "--n_layers=2"]
    train.run_command_line(words)                  # the default config file has d_model = 160; an equal flag is fine
    assert weights(tmp_path / "a").keys() == weights(trained[0]).keys()
    (tmp_path / "config_wide.py").write_text("d_model = 64\n", encoding="utf-8")
    train.run_command_line([*words, f"--out_dir={tmp_path / 'short'}", "--context_length=16"])
    assert checkpoint.read_checkpoint(tmp_path / "short" / "ckpt.pt")["model_config"]["context_length"] == 16
    for more, message in ((["--n_layers=4"], "n_layers=4 does not fit"), (["--context_length=64"], "context_length=64"),
                          (["sweep", "n_heads=2,4"], "n_heads=4 does not fit"),
                          ([str(tmp_path / "config_wide.py")], "d_model=64")):
        with pytest.raises(SystemExit) as end:
            train.run_command_line([*words, f"--out_dir={tmp_path / 'b'}", *more])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_token_files_alone_train_and_say_that_no_text_can_be_written(corpus, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copy(Path(corpus) / f"{split}.bin", tmp_path)
    tiny_run(tmp_path, tmp_path / "out", max_steps=2, num_samples=2, vocab_size=512)
    said = capsys.readouterr().out
    assert "no samples" in said and said.splitlines()[-1].endswith("val bits per byte n/a")


@pytest.fixture
def seen(monkeypatch):
    """The settings that commands hand to main and to sweep."""
    seen = []
    monkeypatch.setattr(train, "main", lambda config: seen.append(config) or {"interrupted": None})
    monkeypatch.setattr(train, "sweep", lambda config, words, main: seen.append(config))
    return seen


@pytest.mark.parametrize("flags, minutes", [
    ("--max_steps=9", None), ("--max_steps=9 --max-minutes=3", 3.0), ("--max_steps=none", 2.4),
    ("sweep max_steps=3,4", None), ("sweep max_steps=3,4 --max_minutes=none", None),
    ("sweep max_steps=3 --max_minutes=1", 1.0)])
def test_a_time_limit_is_dropped_for_steps_and_only_when_it_was_not_asked_for(flags, minutes, seen):
    train.run_command_line(flags.split())
    assert seen[0].max_minutes == minutes


def test_a_sweep_without_a_limit_has_the_one_that_its_runs_record(seen, tmp_path):
    (tmp_path / "config_bare.py").write_text("d_model = 64\n", encoding="utf-8")
    train.run_command_line(["sweep", str(tmp_path / "config_bare.py"), "lr=1e-3,3e-3"])
    assert seen[0].max_minutes == train.DEFAULT_MINUTES


def test_the_default_config_yields_to_a_named_one_and_to_nothing_else(seen, tmp_path):
    (tmp_path / "config_x.py").write_text("lr = 0.5\n", encoding="utf-8")
    for word, optimizer in (("--out_dir=a.py", "muon"), (str(tmp_path / "config_x.py"), "adamw")):
        train.run_command_line([word])
        assert seen[-1].optimizer == optimizer, "a flag's value is no config file"
    assert seen[0].out_dir == "a.py" and seen[1].lr == 0.5


def test_a_run_logs_about_a_hundred_lines_whatever_its_length(corpus, tmp_path):
    for steps, lines in ((250, 101), (7, 7)):
        tiny_run(corpus, tmp_path / str(steps), max_steps=steps, log_every=None, eval_every=0, d_model=8, n_layers=1)
        assert len(losses(tmp_path / str(steps))) == lines


def test_the_clock_ends_a_run_and_its_schedule(corpus, tmp_path, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 0.5                                                     # every look at the clock takes half a second
        return now[0]
    monkeypatch.setattr(train.time, "perf_counter", clock)
    monkeypatch.setattr(train, "peak_flops", lambda *_: None)
    figures = tiny_run(corpus, tmp_path, max_steps=None, max_minutes=0.25, log_every=1, warmup_steps=5)
    rates = [lr for _, lr in losses(tmp_path, "lr")]
    assert figures["seconds"] == 15.0 and figures["step"] == len(rates) == 30
    assert max(rates) > 2.5e-3 and rates[-1] < 4e-4, "up to the peak of 3e-3 and down to a tenth"


def test_ranks_do_not_wait_for_data_to_be_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="python data.py prepare shakespeare --data_dir="):
        train.prepare_data(tiny(tmp_path / "shakespeare", tmp_path / "out"))


def test_distillation_moves_the_student_and_not_the_teacher(corpus, tmp_path, trained):
    common = dict(max_steps=3, d_model=16, micro_batch_size=3)
    run = train.Run(tiny(corpus, tmp_path, **common, teacher=str(trained[0])))
    before = copy.deepcopy(run.teacher.state_dict())
    run.train_step()
    assert all(map(torch.equal, run.teacher.state_dict().values(), before.values()))
    assert not run.teacher.training and all(p.grad is None for p in run.teacher.parameters())
    plain = train.Run(tiny(corpus, tmp_path, **common))
    plain.train_step()
    assert not all(map(torch.equal, run.model.parameters(), plain.model.parameters()))


def test_train_on_ranks_equals_one_process_and_goes_on_anywhere(corpus, tmp_path):
    """10 steps in three parts, each by another strategy, the last on another number of ranks."""
    settings = TINY | dict(data_dir=str(corpus), grad_clip=0.3, eval_every=2, micro_batch_size=3, schedule="wsd",
                           decay_fraction=0.0)                           # the rate does not depend on where it ends
    train.main(train.TrainConfig(**settings, out_dir=str(tmp_path / "one"), max_steps=10))
    config = tmp_path / "config_tiny.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()), encoding="utf-8")
    for steps, size, flags in ((4, 2, "--parallel=fsdp --activation_checkpointing=true"),
                               (7, 2, "--pp=2 --resume=true"), (10, 3, "--parallel=zero1 --resume=true")):
        done, _ = torchrun("train.py", config, f"--out_dir={tmp_path / 'ranks'}", f"--max_steps={steps}",
                           *flags.split(), size=size)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("val bits per byte") and done.stdout.count("val perplexity") == 1, "one rank speaks"
    right, on_ranks = (dict(losses(tmp_path / name, "val_loss")) for name in ("one", "ranks"))
    for step in (2, 6, 8, 10):
        assert on_ranks[step] == pytest.approx(right[step], abs=1e-4), step
    assert_same_weights(tmp_path / "one", tmp_path / "ranks", atol=5e-5)
