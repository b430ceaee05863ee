"""Claims about laws.py."""
import math
from collections import Counter

import numpy as np
import pytest

import laws

LAWS = [*laws.PUBLISHED.values(), (1.5, 300.0, 5000.0, 0.3, 0.45)]


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
    fit, isoflop = laws.fit_parametric(law_runs(law), 9), laws.fit_isoflop(law_runs(law), 9)
    assert [fit[key] for key in laws.LAW] == pytest.approx(law, rel=1e-3) and fit.alpha == fit["alpha"]
    assert (isoflop.a, isoflop.E) == pytest.approx((law[4] / (law[3] + law[4]), law[0]), abs=0.005)
    for one, tolerance in ((fit, 1e-3), (isoflop, 2e-3)):          # the parabola's own error is taken off
        guess = laws.predict(one, 1e21)
        assert [guess.n_params, guess.n_tokens, guess.loss] == pytest.approx(best_by_hand(law, 1e21), rel=tolerance)
        assert 6 * guess.n_params * guess.n_tokens == pytest.approx(1e21)


@pytest.mark.parametrize("fit", [laws.fit_parametric, laws.fit_isoflop])
def test_intervals_hold_the_truth_nine_times_in_ten_and_are_of_use(fit):
    held, truth = Counter(), dict(zip(("n_params", "n_tokens", "loss"), best_by_hand(LAWS[1], 1e21))) | dict(
        zip(laws.LAW, LAWS[1]))
    for seed in range(16):
        made = fit(law_runs(noise=0.01, seed=seed), resamples=50)
        made.update(laws.predict(made, 1e21))
        held.update(key for key in truth if made[f"{key}_low"] <= truth[key] <= made[f"{key}_high"])
    assert all(11 <= held[key] for key in truth), held            # 14.4 expected; 11 is three sigma of a binomial below
    for seed in (3, 6, 13, 37):                      # few and very noisy: some redrawn exponents come out below 0
        guess = laws.predict(fit(law_runs(noise=0.03, sizes=4, budgets=(1e18, 1e19, 1e20), seed=seed)), 1e21)
        assert np.isfinite([*guess.values()]).all()
    guess = laws.predict(fit(law_runs(noise=0.003, budgets=np.geomspace(1e18, 1e20, 6))), 3e21)
    assert guess.n_params_high / guess.n_params_low <= 2.5


@pytest.mark.parametrize("name, n, d", [("hoffmann", 3.22e10, 2.98e12), ("besiroglu", 7.22e10, 1.33e12)])
def test_published_laws_at_gophers_budget(name, n, d):
    guess, law = laws.predict(laws.published(name), 5.76e23), laws.PUBLISHED[name]
    assert (guess.n_params, guess.n_tokens) == pytest.approx((n, d), rel=0.01)
    by_hand = best_by_hand(law, 5.76e23)
    assert (guess.n_params, guess.loss) == (pytest.approx(by_hand[0], rel=1e-3), pytest.approx(by_hand[2], rel=1e-9))


def test_arg_min_is_biased_by_the_grid_and_the_parabola_is_not():
    runs = law_runs(budgets=np.geomspace(1e18, 1e21, 7), spread=8, sizes=5, shift=1.45)
    truth = best_by_hand(LAWS[1], 1e21)[0]
    plain, parabola = laws.best_of_each_budget(runs, 1e21), laws.predict(laws.fit_isoflop(runs, 9), 1e21).n_params
    assert abs(parabola / truth - 1) < 0.05 < 0.15 < abs(plain / truth - 1), (plain, parabola, truth)


def test_the_handouts_isoflop_by_hand():
    """Budgets of 1e18, 1e19 and 1e20 whose best run of three has 1e7, 1e7.5 and 1e8 parameters: N = 0.01 √C."""
    runs = [{"n_params": 10 ** (power / 2 - 2 + step / 4), "n_tokens": 10 ** (power / 2 + 2 - step / 4) / 6,
             "flops": 10 ** power, "loss": 40 / power + step ** 2 / 10}
            for power in (18, 19, 20) for step in (-1, 0, 1)]
    assert laws.best_of_each_budget(runs, 1e24) == pytest.approx(1e10, rel=1e-6)
    x = np.linspace(1, 5, 7)
    level, slope = laws.power_law(x, np.stack([3 - 0.5 * x, 1 + 2 * x]))
    assert level == pytest.approx([3, 1]) and slope == pytest.approx([-0.5, 2])
    centre, lowest, used = laws.parabola(x, 2 + 0.1 * (x - 3.2) ** 2, np.ones(7))
    near = np.exp(-(x - 3.2) ** 2 / 2)
    assert (centre, lowest) == pytest.approx((3.2, 2), rel=1e-6)
    assert used == pytest.approx(near.sum() ** 2 / (near ** 2).sum(), rel=1e-3)


def test_the_loss_of_a_fit_by_hand():
    law = np.array([[math.log(400), 0.34, math.log(410), 0.28, math.log(1.7)], [0.0, 0.3, 0.0, 0.3, 0.0]])
    n, d = np.array([1e8, 1e9, 1e9]), np.array([1e9, 1e10, 1e11])
    losses = np.stack([law_loss((1.7, 400, 410, 0.34, 0.28), n, d), law_loss((1, 1, 1, 0.3, 0.3), n, d)])
    log_loss, shares = laws.law_terms(law, np.log(n), np.log(d))
    assert log_loss == pytest.approx(np.log(losses)) and shares.sum(0) == pytest.approx(np.ones((2, 3)))
    assert shares[2] == pytest.approx(np.array([[1.7], [1.0]]) / losses)
    target, weights = log_loss[0] + np.array([0.0, 5e-4, -3e-3]), np.array([1.0, 2.0, 4.0])
    exact = 2 * 5e-4 ** 2 / 2 + 4 * laws.HUBER * (3e-3 - laws.HUBER / 2)      # HUBER 1e-3: a square, a straight line
    assert laws.huber(law, np.log(n), np.log(d), target, weights)[0] == pytest.approx(exact)


def test_kaplans_law_behind_runs_that_follow_it():
    pure = [run | {"loss": (8.8e13 / run["n_params"]) ** 0.076} for run in law_runs()]
    assert laws.fit_kaplan(pure)["N"] == pytest.approx((8.8e13, 0.076))
    for losses in ((3, 2.9999, 2.9998), (3, 3, 3)):                  # an X_c above any float
        flat = [run | {"loss": loss} for run, loss in zip(law_runs(sizes=3, budgets=(1e18,)), losses)]
        assert laws.fit_kaplan(flat) == {}


@pytest.mark.parametrize("fit, runs, words", [
    (laws.fit_isoflop, law_runs(budgets=(1e18, 1e19)), "2 budgets with 4 or more sizes are too few"),
    (laws.fit_isoflop, law_runs(spread=3, shift=4), "one side of the minimum; add smaller models"),
    (laws.fit_parametric, law_runs(budgets=(1e18,)), "of one budget"),
    (laws.fit_parametric, law_runs()[:5], "5 runs are fewer than 6"),
    (laws.fit_parametric, [*law_runs(), law_runs()[0] | {"loss": math.nan}], "loss=nan"),
    (lambda runs: laws.predict(laws.published("besiroglu"), runs), -1, "flops=-1")])
def test_what_cannot_be_fitted_says_what_is_missing(fit, runs, words):
    with pytest.raises(ValueError, match=words):
        fit(runs)
