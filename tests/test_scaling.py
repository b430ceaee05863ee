"""Claims about scaling.py."""
import json
import math
from collections import Counter

import numpy as np
import pytest

from common import ROOT  # noqa: F401# noqa: F401
import configurator
import scaling
import train

LAWS = [*scaling.PUBLISHED.values(), (1.5, 300.0, 5000.0, 0.3, 0.45)]


def law_loss(law, n, d):
    return law[0] + law[1] / n ** law[3] + law[2] / d ** law[4]


def best_by_hand(law, c):
    """(N, D, loss) of the best model at a budget: 200,000 sizes tried."""
    n = np.geomspace(1e3, 1e14, 200_000)
    losses = law_loss(law, n, c / 6 / n)
    return n[losses.argmin()], c / 6 / n[losses.argmin()], losses.min()


def law_runs(law=LAWS[1], noise=0.0, seed=0, budgets=(1e18, 3e18, 1e19, 3e19, 1e20), spread=5, sizes=9, shift=1.0):
    """Runs that follow a law, at sizes around `shift` times the best one of each budget."""
    draws = np.random.default_rng(seed)
    return [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": law_loss(law, n, c / 6 / n) * math.exp(
        noise * draws.normal())} for c in budgets for n in shift * best_by_hand(law, c)[0] * np.geomspace(
            1 / spread, spread, sizes)]


@pytest.mark.parametrize("law", LAWS)
def test_fits_find_the_law_behind_clean_runs(law):
    fit, isoflop = scaling.fit_parametric(law_runs(law)), scaling.fit_isoflop(law_runs(law))
    assert [fit[key] for key in scaling.LAW] == pytest.approx(law, rel=1e-3) and fit.alpha == fit["alpha"]
    assert (isoflop.a, isoflop.E) == pytest.approx((law[4] / (law[3] + law[4]), law[0]), abs=0.005)
    for one, tolerance in ((fit, 1e-3), (isoflop, 0.06)):          # a parabola is not quite the curve's shape
        guess = scaling.predict(one, 1e21)
        assert [guess.n_params, guess.n_tokens, guess.loss] == pytest.approx(best_by_hand(law, 1e21), rel=tolerance)
        assert 6 * guess.n_params * guess.n_tokens == pytest.approx(1e21)


@pytest.mark.parametrize("fit", [scaling.fit_parametric, scaling.fit_isoflop])
def test_intervals_hold_the_truth_nine_times_in_ten(fit):
    held, keys = Counter(), ("n_params", "n_tokens", "loss", *scaling.LAW)
    truth = dict(zip(keys, (*best_by_hand(LAWS[1], 1e21), *LAWS[1])))
    for seed in range(30):
        found = fit(law_runs(noise=0.01, seed=seed))
        found.update(scaling.predict(found, 1e21))
        held.update(key for key in truth if found[f"{key}_low"] <= truth[key] <= found[f"{key}_high"])
    assert all(22 <= held[key] <= 30 for key in truth), held      # 27 expected; 22 is three sigma of a binomial below


@pytest.mark.parametrize("name, n, d", [("hoffmann", 3.22e10, 2.98e12), ("besiroglu", 7.22e10, 1.33e12)])
def test_published_laws_at_gophers_budget(name, n, d):
    guess = scaling.predict(scaling.published(name), 5.76e23)
    assert (guess.n_params, guess.n_tokens) == pytest.approx((n, d), rel=0.01)
    assert guess.n_params == pytest.approx(best_by_hand(scaling.PUBLISHED[name], 5.76e23)[0], rel=1e-3)


def test_arg_min_is_biased_by_the_grid_and_the_envelope_is_not():
    runs = law_runs(budgets=np.geomspace(1e18, 1e21, 7), spread=8, sizes=5, shift=1.45)
    off = [scaling.predict(scaling.fit_isoflop(runs, method), 1e21).n_params / best_by_hand(LAWS[1], 1e21)[0] - 1
           for method in ("parabola", "argmin")]
    assert abs(off[0]) < 0.05 < 0.15 < abs(off[1]), off
    curves = [{"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": law_loss(LAWS[1], n, c / 6 / n)}
              for n in np.geomspace(3e7, 3e9, 12) for c in np.geomspace(1e18, 1e21, 25)]
    assert scaling.predict(scaling.fit_envelope(curves), 1e20).n_params == pytest.approx(best_by_hand(LAWS[1], 1e20)[0],
                                                                                         rel=0.02)
    pure = [run | {"loss": (8.8e13 / run["n_params"]) ** 0.076} for run in curves]
    assert scaling.fit_kaplan(pure)["N"] == pytest.approx((8.8e13, 0.076))


def test_serving_tokens_makes_the_best_model_smaller():
    fit = scaling.published("besiroglu")
    plain, served = scaling.predict(fit, 1e21), scaling.predict(fit, 1e21, inference_tokens=2e10)
    assert served.n_params < plain.n_params and served.tokens_per_param > plain.tokens_per_param
    n = np.geomspace(1e8, 1e10, 20_000)
    losses = law_loss(LAWS[1], n, (1e21 / n - 2 * 2e10) / 6)                 # 6 N D + 2 N T = C
    assert (served.loss, served.n_params) == pytest.approx((losses.min(), n[losses.argmin()]), rel=0.01)


GOOD = {"n_params": 1e8, "n_tokens": 1e9, "flops": 6e17, "loss": 3.0}


@pytest.mark.parametrize("fit, runs, words", [
    (scaling.fit_isoflop, law_runs(budgets=(1e18, 1e19)), "2 budgets with 4 or more sizes are too few"),
    (scaling.fit_isoflop, law_runs(spread=3, shift=4), "one side of the minimum.*smaller models"),
    (scaling.fit_isoflop, law_runs(spread=3, shift=1 / 4), "one side of the minimum.*larger models"),
    (scaling.fit_parametric, law_runs(budgets=(1e18,)), "one budget"),
    (scaling.fit_parametric, law_runs()[:5], "5 runs are too few"),
    (scaling.fit_parametric, [*law_runs(), GOOD | {"loss": math.nan}], "loss=nan"),
    (scaling.fit_isoflop, [*law_runs(), GOOD | {"n_params": -1}], "n_params=-1"),
    (scaling.fit_parametric, [{"n_params": 1e8}], "n_tokens=None"),
    (lambda runs: scaling.predict(scaling.published("besiroglu"), runs), -1, "flops=-1")])
def test_what_cannot_be_fitted_says_what_is_missing(fit, runs, words):
    with pytest.raises(ValueError, match=words):
        fit(runs)


@pytest.mark.filterwarnings("error")
def test_predicting_beyond_a_thousandfold_warns():
    fit = scaling.fit_parametric(law_runs(), resamples=0)
    scaling.predict(fit, 0.9e23)
    with pytest.warns(UserWarning, match="times outside the fitted budgets"):
        scaling.predict(fit, 1.1e23)


def test_the_service_counts_remembers_and_refuses(tmp_path):
    state = tmp_path / "state.json"
    ask = dict(d_model=256, n_layers=4, n_heads=4, batch_size=128, learning_rate=6e-4, flops=1e17)
    api = scaling.TrainingAPI(1.5e17, seed=3, state_path=state)
    loss = api.query(**ask)
    assert isinstance(loss, float) and api.query(**ask) == loss and api.used_flops == 1e17 and len(api.runs) == 1
    again = scaling.TrainingAPI(1.5e17, seed=3, state_path=state)
    assert again.used_flops == 1e17 and again.query(**ask) == loss and again.runs == api.runs
    with pytest.raises(ValueError, match="5e.16 left of the budget"):
        again.query(**ask | {"n_layers": 5})
    assert again.used_flops == 1e17 and scaling.TrainingAPI(seed=4).query(**ask) != loss
    for key, value in (("d_model", 63), ("n_layers", 2.5), ("n_heads", True), ("batch_size", 200),
                       ("learning_rate", 2e-3), ("flops", 2e14), ("flops", math.nan), ("d_model", "64")):
        with pytest.raises(ValueError, match=f"{key}=.* (from|of) "):
            again.query(**ask | {key: value})
    with pytest.raises(ValueError, match="holds seed 3"):
        scaling.TrainingAPI(1.5e17, seed=5, state_path=state)


def test_the_strategy_predicts_hidden_worlds():
    services = [scaling.TrainingAPI(2e18, seed) for seed in range(5)]
    scores = [scaling.score(scaling.Explorer(api).spend(), api.seed) for api in services]
    assert all(api.used_flops <= 0.95 * 2e18 for api in services)
    assert sum(abs(s["prediction_error"]) <= 1 and 0 <= s["excess"] <= 1 for s in scores) >= 4, scores


def test_a_plan_is_ready_for_train(corpus, tmp_path, capsys):
    path = str(tmp_path / "config_p.py")
    with pytest.warns(UserWarning, match="times outside"):
        scaling.main(["plan", "--flops=1e11", "--device=h100", "--context_length=32", f"--data_dir={corpus}",
                      f"--config={path}"])
    assert "hours on one H100" in capsys.readouterr().out
    flags = {"device": "cpu", "out_dir": str(tmp_path / "p"), "max_steps": "2"}
    config, _ = configurator.resolve(train.TrainConfig, flags, path)
    assert config.d_model // config.n_heads == 64 and train.main(config)["step"] == 2


def test_the_real_grid_is_trained_once_and_its_check_predicted(corpus, tmp_path, monkeypatch, capsys):
    settings = scaling.Settings(data_dir=str(corpus), out_dir=str(tmp_path / "out"), results_dir=str(tmp_path / "r"),
                                workers=1, train_device="cpu", dtype="float32")
    truly, calls = scaling.real_run, []

    def by_law(job):                     # the first run is trained, the others follow a law exactly
        calls.append(job)
        record = truly(job | {"steps": 2}) if len(calls) == 1 else job["record"]
        return record | {"loss": 2 + 30 / record["n_params"] ** 0.3 + 900 / record["n_tokens"] ** 0.5, "seconds": 1}
    monkeypatch.setattr(scaling, "real_run", by_law)
    figures = scaling.real(settings)
    assert abs(figures["error_percent"]) < 0.1 and min(figures["times_exact"], figures["times_6nd"]) >= 8, figures
    records = json.loads((tmp_path / "r" / "scaling_runs.json").read_text(encoding="utf-8"))
    assert len(calls) == len(records) == 21 and len(records[0]["curve"]) == 2
    assert all(r["flops"] == 6 * r["n_params"] * r["n_tokens"] < r["flops_exact"] for r in records)
    assert scaling.real(settings) == figures and len(calls) == 21
    scaling.main(["fit", str(tmp_path / "r" / "scaling_runs.json"), f"--out_dir={tmp_path}"])
    assert "parametric" in capsys.readouterr().out and len(list(tmp_path.glob("fit_*.png"))) == 3
