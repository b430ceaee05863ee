"""Claims about scaling.py."""
import json
import math

import pytest

import configurator
import scaling
import train


def test_the_service_counts_remembers_and_refuses():
    ask = dict(d_model=256, n_layers=4, n_heads=4, batch_size=128, learning_rate=6e-4, flops=1e17)
    api = scaling.TrainingAPI(1.5e17, seed=3)
    loss = api.query(**ask)
    assert isinstance(loss, float) and api.query(**ask) == loss and api.used_flops == 1e17 and len(api.runs) == 1
    with pytest.raises(ValueError, match="5e.16 left of the budget"):
        api.query(**ask | {"n_layers": 5})
    assert api.used_flops == 1e17 and scaling.TrainingAPI(seed=4).query(**ask) != loss
    for key, value in (("d_model", 63), ("n_layers", 2.5), ("batch_size", 200), ("learning_rate", 2e-3),
                       ("flops", 2e14), ("flops", math.nan), ("d_model", "64")):
        with pytest.raises(ValueError, match=f"{key}=.* (from|of) "):
            api.query(**ask | {key: value})


def test_the_strategy_predicts_hidden_worlds():
    services = [scaling.TrainingAPI(2e18, seed) for seed in range(3)]
    scores = [scaling.score(scaling.Explorer(api).spend(), api.seed) for api in services]
    assert all(api.used_flops <= 0.95 * 2e18 for api in services)
    assert sum(abs(s["prediction_error"]) <= 1 and 0 <= s["excess"] <= 1 for s in scores) >= 2, scores


def test_a_plan_is_ready_for_train(corpus, tmp_path, capsys):
    path = str(tmp_path / "config_p.py")
    scaling.main(["plan", "--flops=1e11", "--device=h100", "--context_length=32", f"--data_dir={corpus}",
                  f"--config={path}"])
    assert "hours on one H100" in capsys.readouterr().out
    flags = {"device": "cpu", "out_dir": str(tmp_path / "p"), "max_steps": "2"}
    config, _ = configurator.resolve(train.TrainConfig, flags, path)
    assert config.d_model // config.n_heads == 64 and train.main(config)["step"] == 2


def test_the_real_grid_is_trained_once_and_its_check_predicted(corpus, tmp_path, monkeypatch, capsys):
    settings = scaling.RealSettings(str(corpus), out_dir=str(tmp_path / "out"), results_dir=str(tmp_path / "r"))
    calls = []

    def by_law(config):                                  # each run follows a law exactly
        calls.append(config)
        model = scaling.ModelConfig(d_model=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads,
                                    vocab_size=512, context_length=config.context_length, qk_norm=True)
        loss = 2 + 30 / scaling.size(model) ** 0.3 + 900 / (config.max_steps * config.batch_tokens) ** 0.5
        return {"val_loss": loss, "seconds": 1.0, "interrupted": None}
    monkeypatch.setattr(train, "main", by_law)
    figures = scaling.real(settings)
    assert abs(figures["error_percent"]) < 0.1 and min(figures["times_exact"], figures["times_6nd"]) >= 8, figures
    path = tmp_path / "r" / "scaling_runs.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert len(calls) == len(records) == 21 and (tmp_path / "r" / "scaling_real.png").exists()
    assert all(r["flops"] == 6 * r["n_params"] * r["n_tokens"] < r["flops_exact"] for r in records)
    assert scaling.real(settings) == figures and len(calls) == 21
    scaling.main(["fit", str(path), f"--out_dir={tmp_path}"])
    assert "parametric" in capsys.readouterr().out and (tmp_path / "fit.png").exists()
