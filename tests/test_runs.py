"""Claims about runs.py: logs, pictures, grids."""
import dataclasses

import pytest

from common import TINY
import runs
import train


def test_a_resumed_log_has_each_step_once_and_records_changed_settings(tmp_path):
    first = runs.header(seed=1, config={"lr": 0.1, "resume": False})
    path, log = tmp_path / "log.jsonl", runs.Log(tmp_path, first)
    for step in (1, 2, 3):
        log.write(step=step, loss=5.0 - step)
    log.file.write('{"step": 4, "lo')                                # a kill in the middle of a line
    log.close()
    runs.Log(tmp_path, {**first, "config": {"lr": 0.1, "resume": True}}, resume_step=2).close()
    assert [line.get("step") for line in runs.read_log(path)] == [None, 1, 2], "nothing has changed"
    log = runs.Log(tmp_path, {**first, "config": {"lr": 0.2, "resume": True}}, resume_step=2)
    log.write(step=3, loss=1.5)
    lines = runs.read_log(path)
    assert [line.get("step") for line in lines] == [None, 1, 2, 2, 3] and lines[3]["config"]["lr"] == 0.2


def test_plot_skips_what_is_no_run(tmp_path):
    for name in ("a", "empty"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="no log.jsonl in .*empty"):
        runs.plot([tmp_path / "empty"])
    runs.Log(tmp_path / "a", {"config": {}}).write(step=1, seconds=0.5, loss=2.0, lr=0.1)
    (tmp_path / "b").mkdir()
    runs.Log(tmp_path / "b", {"config": {}}).write(step=1, loss=2.0)             # align.py's has no clock
    train.run_command_line(["plot", *map(str, sorted(tmp_path.iterdir())), f"--out_dir={tmp_path}"])
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_grid_spans_its_points_last_word_fastest(tmp_path):
    config = train.TrainConfig(out_dir=str(tmp_path))
    assert [(one.lr, one.n_heads, one.out_dir) for one in runs.grid(config, ["lr=1e-3,2e-3", "n_heads=1,2"])] == [
        (lr, heads, f"{tmp_path}/lr={lr},n_heads={heads}") for lr in (1e-3, 2e-3) for heads in (1, 2)]
    for word, message in (("sede=1", "Did you mean seed"), ("resume=true", "spans no axis"), ("lr=1 lr=2", "once"),
                          ("lr=fast", "lr='fast'")):
        with pytest.raises(ValueError, match=message):
            runs.grid(config, word.split())


def test_a_sweep_draws_up_seeds_survives_divergence_and_goes_on(corpus, tmp_path, capsys):
    config = train.TrainConfig(**TINY | dict(data_dir=str(corpus), out_dir=str(tmp_path), max_steps=6, grad_clip=1e9))
    words = ["lr=1e-3,1e6", "seed=1,2"]
    runs.sweep(config, words, train.main)
    assert capsys.readouterr().out.count("val perplexity") == 2
    best, lost = runs.sweep_rows(tmp_path)
    a, b = best["scores"][1], best["scores"][2]
    assert best["mean"] == pytest.approx((a + b) / 2) and best["spread"] == pytest.approx(abs(a - b) / 2 ** 0.5)
    assert best["setting"] == "lr=0.001" and lost["diverged"].keys() == {1, 2}
    table = (tmp_path / "sweep.txt").read_text(encoding="utf-8")
    log = tmp_path / "lr=0.001,seed=1" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").rpartition('{"step"')[0], encoding="utf-8")      # killed at the end
    runs.sweep(config, words, train.main)
    assert (out := capsys.readouterr().out).count("done before") == 3 and "resumed" in out
    assert (tmp_path / "sweep.txt").read_text(encoding="utf-8").split() == table.split() and "diverged at" in table
    for changes, words, message in (({}, ["seed=7", "n_heads=1,3"], "no multiple of n_heads=3"),
                                    ({"n_heads": 1}, words, "holds a run with another n_heads")):
        with pytest.raises(ValueError, match=message):
            runs.sweep(dataclasses.replace(config, **changes), words, train.main)
    assert not list(tmp_path.glob("seed=7*")), "no point is trained before all are known to be possible"
    everything = dataclasses.replace(config, out_dir=str(tmp_path / "all"))
    assert runs.sweep(everything, ["lr=1e6,1e7"], train.main) is None
    assert capsys.readouterr().out.count("diverged at step") == 2, "a table of nothing else"
