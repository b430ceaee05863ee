"""Predict the large run from small ones: for a FLOP budget, which model, how many tokens, which settings, what loss?

A run that costs a thousand pilots cannot be tuned, so it is predicted: small runs are trained, laws fitted to their
final losses and read at the large budget. Three ways (Hoffmann 2022, section 3): (1) the envelope of training curves,
(2) IsoFLOP, power laws through the minima at each budget, (3) one law for all runs, L = E + A/N^alpha + B/D^beta.

Convention: N is the parameters without embeddings and head, and C = 6 N D (Kaplan 2020, 2.1). That leaves out attention
scores and the head, most of the bill at d_model 64; `real` budgets with accounting.py's exact count, `flops_exact`.
Where D = 20 N comes from: Hoffmann's approaches 1 and 2, where N and D grow alike: 70 billion on 1.4 trillion tokens.
Their printed law (approach 3) says 93 tokens a parameter at that budget, its re-fit (2404.10102) 18. It does not hold
where alpha and beta differ (the ratio drifts with C), for other data and tokenizers, for a model that serves many
tokens (smaller, longer: predict's inference_tokens), or past four epochs of repeated data (2305.16264).

    python scaling.py                                   a simulated service explored, fitted, scored; 3 pictures; 6 s
    python scaling.py fit RUNS.json --flops=1e21        all fits of one's own runs, and what they say at a budget
    python scaling.py plan --flops=1e18 --device=h100   writes config_plan.py, ready for train.py
    python scaling.py real                              trains 20 small models, predicts a larger one, trains that

The 6 s are on one of two cores of an AMD EPYC. Left out: laws for repeated data, sparsity, precision; muP.
Papers: Kaplan 2020 (2001.08361), Hoffmann 2022 (2203.15556), Besiroglu 2024 (2404.10102), Sardana 2023 (2401.00448:
inference), DeepSeek 2024 (2401.02954: learning rate, batch), Pearce 2024 (2406.12907: Kaplan and Hoffmann differ
because of N without embeddings, at small scale).
"""
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from accounting import DEVICES, count_params, flops_per_token, largest_batch, training_hours
from configurator import command_line, fail
from model import ModelConfig

RECORD = ("n_params", "n_tokens", "flops", "loss")           # what every run record holds
LAW = ("E", "A", "B", "alpha", "beta")
HUBER = 1e-3                         # on ln L, summed over runs (2203.15556, section 3.3)
RESAMPLES = 100                      # of a bootstrap; its middle 90 % is the interval
# Fits to web text that others published, over about 6e18 to 3e21 FLOPs: Hoffmann's approach 3, and its re-fit.
PUBLISHED = {"hoffmann": (1.69, 406.4, 410.7, 0.34, 0.28), "besiroglu": (1.8172, 482.01, 2085.43, 0.3478, 0.3658)}
GOPHER_FLOPS = 5.76e23
# What the simulated service takes: the ranges of CS336's third assignment.
RANGES = {"d_model": (64, 1024), "n_layers": (2, 24), "n_heads": (2, 16), "batch_size": (128, 256),
          "learning_rate": (1e-4, 1e-3), "flops": (1e13, 1e18)}
QUERY_FLOPS = [float(f"{m}e{e}") for e in range(13, 18) for m in (1, 3, 6)] + [1e18]
# `real`: budgets in exact FLOPs, and the shapes (d_model, n_layers, n_heads) trained at each, around the best one.
REAL_GRID = {5.0e11: [(24, 2, 1), (32, 2, 1), (40, 2, 1), (48, 2, 1), (64, 2, 2)],
             1.5e12: [(24, 2, 1), (32, 2, 1), (48, 2, 1), (64, 2, 2), (64, 4, 2)],
             4.5e12: [(48, 2, 1), (64, 2, 2), (64, 4, 2), (96, 3, 3), (96, 4, 3)]}
REAL_CHECK_SHAPES = [(96, 4, 3), (128, 3, 4), (128, 4, 4), (160, 4, 5), (192, 4, 6)]
REAL_RECIPE = dict(context_length=256, batch_tokens=1024, optimizer="muon", qk_norm=True, zero_init=True,
                   schedule="wsd", decay_fraction=0.7, min_lr_factor=0.02, eval_every=0, checkpoint_every=500)


# --- runs and fits ---

def columns(runs: list[dict], purpose: str, least: int = 1) -> np.ndarray:
    """ln N, ln D, ln C, ln L of the runs, (4, n). Raises ValueError for missing, non-positive or non-finite numbers.

    Takes published IsoFLOP files too: parameters, compute_budget, final_loss, and then D = C / 6N.
    """
    rows = []
    for number, run in enumerate(runs):
        if not isinstance(run, dict):
            raise ValueError(f"run {number} is {run!r}; every run is a dict with {', '.join(RECORD)}")
        if {"parameters", "compute_budget", "final_loss"} <= run.keys():
            n, c = (value if isinstance(value, (int, float, np.number)) else math.nan
                    for value in (run["parameters"], run["compute_budget"]))
            run = {"n_params": n, "n_tokens": c / 6 / (n or math.nan), "flops": c, "loss": run["final_loss"]}
        for key in RECORD:
            value = run.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
                raise ValueError(f"run {number} has {key}={value!r}; every run needs {', '.join(RECORD)}, each a "
                                 "finite number above 0: mend or drop that run")
        rows.append([math.log(run[key]) for key in RECORD])
    if len(rows) < least:
        raise ValueError(f"{len(rows)} runs are too few for {purpose}; give at least {least}")
    return np.array(rows).T


def budgets_of(log_c) -> list:
    """Indices of the runs of each budget; runs within 10 % of each other's FLOPs are one budget."""
    order = np.argsort(log_c)
    return np.split(order, np.flatnonzero(np.diff(log_c[order]) > 0.1) + 1)


class Fit(dict):
    """Numbers by name, as fit["alpha"] and as fit.alpha; NAME_low and NAME_high are their 90 % interval.

    A fit has method, E A B alpha beta, a b gamma (N ~ C^a, D ~ C^b, L - E ~ C^-gamma), min_flops, max_flops, and `law`:
    ln A, alpha, ln B, beta, ln E, (S, 5), the estimate in row 0 and the bootstrap below it.
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}") from None

    def add(self, name: str, column) -> None:
        """Store an estimate, column[0], and the interval that the others span."""
        low, high = np.quantile(column[1:], (0.05, 0.95)) if len(column) > 1 else (column[0], column[0])
        self[name], self[f"{name}_low"], self[f"{name}_high"] = map(float, (
            column[0], min(low, column[0]), max(high, column[0])))


def make_fit(method: str, law, log_c) -> Fit:
    fit = Fit(method=method, law=law, min_flops=math.exp(min(log_c)), max_flops=math.exp(max(log_c)))
    _, a, gamma, _ = frontier(law)
    for name, column in zip(LAW + ("a", "b", "gamma"), (*np.exp(law[:, [4, 0, 2]]).T, law[:, 1], law[:, 3], a, 1 - a,
                                                        gamma)):
        fit.add(name, column)
    return fit


def frontier(law) -> tuple:
    """ln n0, a, gamma, ln k of the best N = n0 C^a and its L = E + k C^-gamma (2203.15556, eq. 4); law (S, 5).

    On 6 N D = C the sum is least where both terms pull alike: alpha A / N^alpha = beta B / D^beta.
    """
    log_a, alpha, log_b, beta, _ = law.T
    a = beta / (alpha + beta)
    n0 = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta) - a * math.log(6)
    return n0, a, alpha * a, np.logaddexp(log_a - alpha * n0, log_b + beta * (n0 + math.log(6)))


def published(name: str) -> Fit:
    """A law of PUBLISHED as a Fit, without intervals."""
    e, a, b, alpha, beta = PUBLISHED[name]
    return make_fit(f"published, {name}", np.array([[math.log(a), alpha, math.log(b), beta, math.log(e)]]),
                    np.log([6e18, 3e21]))


def power_law(log_x, log_y) -> tuple:
    """(ln c, p) of y = c x^p: the straight line of least squares in log space. log_x (n,), log_y (..., n)."""
    centred = log_x - log_x.mean()
    slope = (log_y * centred).sum(-1) / (centred ** 2).sum()
    return log_y.mean(-1) - slope * log_x.mean(), slope


def fit_minima(method: str, log_c, log_n, log_loss, all_log_c) -> Fit:
    """The law whose best models are N = n0 C^a with the given losses. log_c (m,); log_n, log_loss (S, m)."""
    n0, a = power_law(log_c, log_n)
    if not 0.05 < a[0] < 0.95:
        raise ValueError(f"{method}: the best N of these budgets goes as C^{a[0]:.2f}, which no law of N and D does; "
                         "give more runs around each minimum, or more budgets")
    a = np.clip(a, 0.05, 0.95)
    # L = E + k C^-gamma is the same kind of law with its second term switched off, here by least squares.
    log_k, gamma, _, _, log_e = law_fit(log_c, 0 * log_c, log_loss, huber=1.0, second=-700.0).T
    log_a, log_b = np.log(a) + log_k + gamma / a * n0, np.log(1 - a) + log_k - gamma / (1 - a) * (n0 + math.log(6))
    return make_fit(method, np.stack([log_a, gamma / a, log_b, gamma / (1 - a), log_e], 1), all_log_c)


# --- 1. the envelope of training curves ---

def fit_envelope(runs: list[dict], seed: int = 0) -> Fit:
    """Approach 1: which size has the lowest curve at each budget? (2203.15556, section 3.1)

    Three or more runs of equal n_params are a curve of loss against FLOPs, each point a run whose schedule ended there.
    Where the lowest curve changes from one size to the next, the best N lies between the two: power laws go through
    these points. The bootstrap draws residuals anew. Raises ValueError for fewer than 4 curves or 3 changes.
    """
    log_n, _, log_c, log_l = columns(runs, "an envelope", 6)
    sizes, counts = np.unique(log_n, return_counts=True)
    sizes, grid = sizes[counts >= 3], np.linspace(log_c.min(), log_c.max(), 1500)
    if len(sizes) < 4:
        raise ValueError(f"{len(sizes)} sizes were run at 3 or more budgets, an envelope needs 4 such curves")
    curves = np.full((len(sizes), len(grid)), np.inf)
    for row, one in zip(curves, sizes):
        x, y = np.array(sorted(zip(log_c[log_n == one], log_l[log_n == one]))).T
        row[:] = np.interp(grid, x, y, left=np.inf, right=np.inf)
    seen = np.isfinite(curves.min(0))
    grid, winner, lowest = grid[seen], curves.argmin(0)[seen], curves.min(0)[seen]
    at = np.flatnonzero(np.diff(winner))
    if len(at) < 3:
        raise ValueError(f"the lowest curve changes {len(at)} times from one size to the next, an envelope needs 3; "
                         "give curves of more sizes over the same budgets")
    samples, rng, x = [], np.random.default_rng(seed), grid[at]
    for y in ((sizes[winner[at]] + sizes[winner[at + 1]]) / 2, lowest[at]):
        c, p = power_law(x, y)
        rest = (y - c - p * x) * math.sqrt(len(y) / (len(y) - 2))
        samples.append(np.vstack([y, c + p * x + rng.choice(rest, (RESAMPLES, len(y)))]))
    return fit_minima("envelope", x, *samples, log_c)


# --- 2. IsoFLOP ---

def fit_isoflop(runs: list[dict], method: str = "parabola", seed: int = 0) -> Fit:
    """Approach 2: per budget the minimum of a parabola in ln N, then power laws through the minima (2203.15556, 3.2).

    runs: 3 or more budgets with 4 or more sizes each, on both sides of the minimum; budgets with fewer are left aside.
    method="argmin" takes the best run instead, which can only answer with a size of the grid. D = C / 6N, so that the
    laws of N and D cannot contradict each other. The bootstrap draws the parabolas' residuals anew.
    Raises ValueError saying which budget lacks what.
    """
    if method not in ("parabola", "argmin"):
        raise ValueError(f"method={method!r} must be parabola or argmin")
    log_n, _, log_c, log_l = columns(runs, "an IsoFLOP fit", 1)
    groups = budgets_of(log_c)
    usable = [g for g in groups if len(np.unique(np.round(log_n[g], 6))) >= 4]
    if len(usable) < 3:
        counts = ", ".join(f"{math.exp(log_c[g].mean()):.3g} FLOPs: {len(g)} runs" for g in groups)
        raise ValueError(f"{len(usable)} budgets with 4 or more sizes are too few ({counts}); an IsoFLOP fit needs 3, "
                         "better 5: give runs at more budgets, or more sizes at these")
    fits = [parabola(log_n[g], log_l[g], math.exp(log_c[g].mean())) for g in usable]
    pool, rng = np.concatenate([one[-1] for one in fits]), np.random.default_rng(seed)
    where, lowest = [], []
    for g, (centre, solve, fitted, _) in zip(usable, fits):
        u, y = log_n[g] - centre, np.vstack([log_l[g], fitted + rng.choice(pool, (RESAMPLES, len(g)))])
        p0, p1, p2 = solve @ y.T
        vertex = np.clip(-p1 / (2 * np.maximum(p2, 1e-9)), u.min(), u.max())
        argmin = method == "argmin"
        where.append(centre + (u[y.argmin(1)] if argmin else vertex))
        lowest.append(y.min(1) if argmin else p0 + p1 * vertex + p2 * vertex ** 2)
    return fit_minima(f"isoflop, {method}", np.array([log_c[g].mean() for g in usable]), np.stack(where, 1),
                      np.stack(lowest, 1), log_c)


def parabola(x, y, budget: float) -> tuple:
    """(centre, matrix from losses to coefficients, fitted losses, residuals near the centre) of one budget.

    After a first pass, points more than a factor e from the vertex count little: the true curve is steeper on one side,
    and a plain parabola over sizes 10 times off would move N by up to 10 %.
    """
    centre, best = x[y.argmin()], x[y.argmin()]
    for width in (math.inf, 1.0, 1.0, 1.0, 1.0):
        u = x - centre
        weight = np.exp(-(u / width) ** 2 / 2) + 1e-3
        basis = np.stack([np.ones_like(u), u, u * u], 1)
        solve = np.linalg.solve(basis.T @ (basis * weight[:, None]), (basis * weight[:, None]).T)
        p, used = solve @ y, centre
        rest = y - basis @ p
        vertex = centre - p[1] / (2 * p[2]) if p[2] > 0 else -math.inf * p[1]
        if not x.min() <= vertex <= x.max() and best in (x.min(), x.max()):
            slope = np.array([0, 1, 2 * (best - centre)])    # at the edge; by noise alone it is within its error
            error = np.linalg.norm(slope @ solve) * ((rest ** 2).sum() / (len(x) - 3)) ** 0.5
            if abs(slope @ p) > 3 * error:
                raise ValueError(f"budget {budget:.3g}: all {len(x)} runs lie on one side of the minimum, which is not "
                                 f"between N = {math.exp(x.min()):.3g} and {math.exp(x.max()):.3g}; add "
                                 f"{'smaller' if best == x.min() else 'larger'} models")
        centre = np.clip(vertex, x.min(), x.max())
    hat = np.einsum("nk,kn->n", basis, solve)                # how far each point pulls the curve to itself
    return used, solve, basis @ p, (rest / np.sqrt(np.maximum(1 - hat, 0.05)))[weight > 0.3]


# --- 3. the parametric law ---

def fit_parametric(runs: list[dict], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Approach 3: L = E + A / N^alpha + B / D^beta on all runs, by the Huber loss of ln L, summed (2203.15556, 3.3).

    Raises ValueError when the runs cannot tell the parameters apart: fewer than 6, fewer than 3 sizes or token counts,
    one budget, or one ratio of tokens to N.
    """
    x, y, log_c, target = columns(runs, "a law with 5 parameters", 6)
    for name, values in (("n_params", x), ("n_tokens", y)):
        if len(np.unique(np.round(values, 3))) < 3:
            raise ValueError(f"the runs have {len(np.unique(np.round(values, 3)))} different {name}, too few to see "
                             "how the loss depends on it; give 3 or more")
    if np.ptp(x - y) < 0.1 or np.ptp(x + y) < 0.1:
        raise ValueError("all runs have one number of tokens per parameter, or one budget: N and D cannot be told "
                         "apart; give several sizes at each of several budgets")
    law = law_fit(x, y, target[None])
    if resamples:
        fitted, rng, shape = law_terms(law, x, y)[0][0], np.random.default_rng(seed), (resamples, len(x))
        rest = (target - fitted) * math.sqrt(len(x) / (len(x) - 5))
        # Smoothed: nearly a fit of least absolute error, it passes through some runs, whose residuals are then 0.
        noise = (rng.choice(rest, shape) + rest.std() * rng.normal(size=shape)) / math.sqrt(2)
        law = law_fit(x, y, np.vstack([target, fitted + noise]), start=law)
    if not np.isfinite(law[0]).all() or min(law[0, 1], law[0, 3]) < 1e-3:
        raise ValueError(f"the loss of these runs does not fall with N and D both (alpha {law[0, 1]:.2g}, beta "
                         f"{law[0, 3]:.2g}); give runs that differ in both, trained to their end")
    return make_fit("parametric", law, log_c)


def law_fit(x, y, target, start=None, huber: float = HUBER, second: float | None = None) -> np.ndarray:
    """The laws (S, 5) of S problems ln L = target (S, n): the first from 27 starts, the others from its solution.

    second: ln B to start and, as its share is then 0, to stay with.
    """
    shift = np.array([[x.mean(), y.mean()]])                 # centred, A and alpha are no longer one and the same
    x, y, lowest = x - x.mean(), y - y.mean(), math.exp(target[0].min())
    if start is None:
        start = np.array([[math.log((1 - s) * lowest / 2), p, second or math.log((1 - s) * lowest / 2), q,
                           math.log(s * lowest)] for s in (0.2, 0.6, 0.9) for p in (0.15, 0.35, 0.7)
                          for q in (0.15, 0.35, 0.7)])
        law, value = huber_fit(start, x, y, target[:1], 20, huber)
        law, value = huber_fit(law[value.argsort()[:3]], x, y, target[:1], 150, huber)
        law = law[[value.argmin()]]
    else:
        law = start.copy()
        law[:, [0, 2]] -= law[:, [1, 3]] * shift
    if len(target) > 1:
        law = np.vstack([law, huber_fit(np.repeat(law, len(target) - 1, 0), x, y, target[1:], 25, huber)[0]])
    law[:, [0, 2]] += law[:, [1, 3]] * shift
    return law


def law_terms(law, x, y) -> tuple:
    """ln L, (..., n), and each term's share of L, (3, ..., n), at ln N = x, ln D = y. law: (..., 5)."""
    a, alpha, b, beta, e = np.moveaxis(law[..., None], -2, 0)
    terms = np.stack([a - alpha * x, b - beta * y, e + 0 * x])
    log_loss = np.logaddexp.reduce(terms)
    return log_loss, np.exp(terms - log_loss)


def law_rows(law, x, y) -> tuple:
    """ln L and its gradient by the five parameters, (..., n) and (..., n, 5)."""
    log_loss, (in_n, in_d, in_e) = law_terms(law, x, y)
    return log_loss, np.stack([in_n, -x * in_n, in_d, -y * in_d, in_e], -1)


def huber_fit(law, x, y, target, steps: int, huber: float) -> tuple:
    """(law, loss): many fits at once by L-BFGS (Nocedal & Wright, algorithm 7.4). law (S, 5), target (1 or S, n).

    The valley is narrow, E, A and alpha trade against each other, and the published fit stopped on the way down
    (2404.10102). So L-BFGS starts each step from Gauss-Newton's Hessian instead of a multiple of the identity. The
    line search tries all its lengths at once and keeps the best.
    """
    lengths, pairs, every = np.array([0.0, 4, 2, 1, 0.5, 0.25, 0.06, 0.01, 1e-3]), [], np.arange(len(law))
    gradient = moved = None
    for _ in range(steps):
        log_loss, jacobian = law_rows(law, x, y)
        rest = log_loss - target
        weighted = jacobian * (huber / np.maximum(np.abs(rest), huber))[..., None]
        before, gradient = gradient, (weighted * rest[..., None]).sum(1)
        if moved is not None:
            s, g = moved, gradient - before
            curved = (s * g).sum(-1, keepdims=True)
            pairs = pairs[-7:] + [(s, g, np.where(curved > 1e-14, 1 / np.maximum(curved, 1e-14), 0))]
        hessian, q, alphas = np.swapaxes(weighted, 1, 2) @ jacobian, gradient, []
        for s, g, rho in pairs[::-1]:
            alphas.append(rho * (s * q).sum(-1, keepdims=True))
            q = q - alphas[-1] * g
        ridge = 1e-10 * np.trace(hessian, axis1=1, axis2=2)[:, None, None] + 1e-30
        q = np.linalg.solve(hessian + ridge * np.eye(5), q[..., None])[..., 0]
        for (s, g, rho), alpha in zip(pairs, alphas[::-1]):
            q = q + s * (alpha - rho * (g * q).sum(-1, keepdims=True))
        trials = law[:, None] - lengths[:, None] * q[:, None]                                      # (S, 9, 5)
        off = np.abs(law_terms(trials, x, y)[0] - target[:, None])
        values = np.where(off <= huber, off * off / 2, huber * (off - huber / 2)).sum(-1)
        best = np.nan_to_num(values, nan=np.inf).argmin(1)
        moved, value = trials[every, best] - law, values[every, best]
        law = law + moved
        if not best.any():
            break
    return law, value


# --- Kaplan's laws, learning rate, batch size ---

def fit_kaplan(runs: list[dict]) -> dict:
    """{"N", "D", "C": (X_c, p)} of the pure power laws L = (X_c / X)^p (2001.08361, eq. 1.1 to 1.3).

    Each through the runs that no run with a smaller X beats: X held those back, not something else. Without an E the
    power falls as X grows, so they cannot be carried as far as fit_parametric's law.
    """
    log_n, log_d, log_c, log_l = columns(runs, "Kaplan's laws", 3)
    laws = {}
    for name, x in (("N", log_n), ("D", log_d), ("C", log_c)):
        order = np.lexsort((log_l, x))
        best = order[log_l[order] <= np.minimum.accumulate(log_l[order])]
        if np.ptp(x[best]) > 0:
            level, slope = power_law(x[best], log_l[best])
            laws[name] = (math.exp(-level / slope), -slope)
    return laws


def vertex(x, loss) -> float:
    """ln of the best setting x by a parabola of ln L in ln x, within the range that was tried."""
    log_x, log_l = np.log(x), np.log(loss)
    p2, p1, _ = np.polyfit(log_x - log_x.mean(), log_l, 2)
    best = log_x.mean() - p1 / (2 * p2) if p2 > 0 else log_x[log_l.argmin()]
    return float(np.clip(best, log_x.min(), log_x.max()))


def fit_settings(runs: list[dict]) -> dict:
    """How the best learning rate goes with N and the better of two batch sizes with D: fit.update() it for predict.

    learning_rate: (ln c, p) of c N^p, through the best rates of models run with 3 or more and nothing else changed.
    batch_size: (small, large, c, p), ln of L(large) / L(small) = c + p ln D, from runs that differ in it alone. A key
    is left out where there are fewer than two such groups.
    """
    found = {}
    for key, least in (("learning_rate", 3), ("batch_size", 2)):
        alike, points = {}, []
        for run in sorted(runs, key=lambda run: run[key]):
            alike.setdefault(tuple(run[k] for k in RANGES if k != key), []).append(run)
        groups = [group for group in alike.values() if len(group) >= least]
        for group in groups:
            x, loss = [run[key] for run in group], [run["loss"] for run in group]
            points.append((group[0]["n_params"], vertex(x, loss)) if least == 3 else
                          (group[0]["n_tokens"], math.log(loss[-1] / loss[0])))
        if len(points) >= 2:
            x, y = np.array(points).T
            found[key] = (*((groups[0][0][key], groups[0][-1][key]) if least == 2 else ()),
                          *map(float, power_law(np.log(x), y)))
    return found


# --- prediction ---

def predict(fit: Fit, flops: float, inference_tokens: float = 0.0, *, warn: bool = True) -> Fit:
    """The best model for a budget: n_params, n_tokens, loss, tokens_per_param, each with its _low and _high (90 %).

    flops: 6 N D of training. inference_tokens: how many the model will serve, at 2 N FLOPs each; then flops pays for
    both, and the best model is smaller and sees more (2401.00448, who fix the loss and ask for the least FLOPs: the
    same trade). learning_rate, batch_size: where the fit has them. Warns (with warn) 1,000 times outside its budgets.
    """
    if not 0 < flops < math.inf or not 0 <= inference_tokens < math.inf:
        raise ValueError(f"flops={flops!r} must be above 0, inference_tokens={inference_tokens!r} not below, finite")
    far = max(flops / fit.max_flops, fit.min_flops / flops)
    if warn and far > 1000:
        warnings.warn(f"{flops:.3g} FLOPs are {far:,.0f} times outside the fitted budgets ({fit.min_flops:.3g} to "
                      f"{fit.max_flops:.3g}): a guess; add runs nearer to it", stacklevel=2)
    n0, a, gamma, log_k = frontier(fit.law)
    log_n, log_c = n0 + a * math.log(flops), math.log(flops)
    log_d, loss = log_c - math.log(6) - log_n, np.exp(fit.law[:, 4]) + np.exp(log_k - gamma * log_c)
    if inference_tokens:
        sizes = log_n[:, None] + np.linspace(-15, 0, 3000)                   # (S, sizes); the best one is never larger
        tokens = (flops / np.exp(sizes) - 2 * inference_tokens) / 6
        logs = np.log(np.maximum(tokens, 1e-300))
        losses = np.stack([law_terms(*row)[0] for row in zip(fit.law, sizes, logs)])
        pick = losses.argmin(1)[:, None]
        log_n, log_d, loss = (np.take_along_axis(v, pick, 1)[:, 0] for v in (sizes, logs, np.exp(losses)))
    answer = Fit(flops=flops)
    for name, column in (("n_params", np.exp(log_n)), ("n_tokens", np.exp(log_d)), ("loss", loss),
                         ("tokens_per_param", np.exp(log_d - log_n))):
        answer.add(name, column)
    answer.update(settings_for(fit, log_n[0], log_d[0]))
    return answer


def settings_for(fits: dict, log_n: float, log_d: float) -> dict:
    """learning_rate and batch_size that fit_settings' laws give, as far as they are there."""
    found = {}
    if "learning_rate" in fits:
        found["learning_rate"] = math.exp(fits["learning_rate"][0] + fits["learning_rate"][1] * log_n)
    if "batch_size" in fits:
        small, large, c, p = fits["batch_size"]
        found["batch_size"] = large if c + p * log_d < 0 else small
    return found


# --- the simulated service ---

class TrainingAPI:
    """A service that trains any model within RANGES and answers with its loss, until the FLOP budget is gone.

    seed: which world, that is, which hidden law. state_path: a JSON file that keeps the runs, so that another process
    goes on where this one stopped (one at a time: there is no lock). `runs`: all so far, as records with settings.
    """

    def __init__(self, budget_flops: float = 2e18, seed: int = 0, state_path: str | Path | None = None):
        if not 0 < budget_flops < math.inf:
            raise ValueError(f"budget_flops={budget_flops!r} must be a finite number above 0, such as 2e18")
        self.budget_flops, self.seed, self.runs, self.state_path = float(budget_flops), seed, [], state_path
        if state_path and Path(state_path).exists():
            state = read_json(state_path, dict)
            if [state.get(key) for key in ("seed", "budget_flops")] != [seed, self.budget_flops] or "runs" not in state:
                raise ValueError(f"{state_path} holds seed {state.get('seed')} and budget {state.get('budget_flops')}, "
                                 f"not {seed} and {self.budget_flops:g}; give those, or another state_path")
            self.runs = state["runs"]

    @property
    def used_flops(self) -> float:
        """What the runs so far have cost."""
        return float(sum(run["flops"] for run in self.runs))

    def query(self, d_model: int, n_layers: int, n_heads: int, batch_size: int, learning_rate: float,
              flops: float) -> float:
        """Final loss of such a run (sequences of 512 tokens, N = 12 L d^2, D = C / 6N); the same again costs nothing.

        Raises ValueError for a value out of its range, and for a run that the rest of the budget does not pay for.
        """
        asked = dict(zip(RANGES, (d_model, n_layers, n_heads, batch_size, learning_rate, flops)))
        for name, value in asked.items():
            (low, high), choices = RANGES[name], {"batch_size": (128, 256), "flops": QUERY_FLOPS}.get(name)
            kind = float if name in ("learning_rate", "flops") else int
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not low <= value <= high \
                    or value != kind(value) or choices and value not in choices:
                allowed = f"one of {', '.join(f'{c:g}' for c in choices)}" if choices else \
                    f"{'a whole number' if kind is int else 'a number'} from {low:g} to {high:g}"
                raise ValueError(f"{name}={value!r} must be {allowed}")
            asked[name] = kind(value)
        for run in self.runs:
            if asked.items() <= run.items():
                return run["loss"]
        if self.used_flops + flops > self.budget_flops * (1 + 1e-9):
            raise ValueError(f"flops={flops:g} is more than the {self.budget_flops - self.used_flops:.4g} left of the "
                             f"budget of {self.budget_flops:g}; ask for less, or predict with the runs there are")
        n_params, loss = block_params(asked["d_model"], asked["n_layers"]), World(self.seed).loss(**asked, noise=True)
        self.runs.append({"n_params": n_params, "n_tokens": flops / (6 * n_params), "loss": loss} | asked)
        if self.state_path:
            write_json(self.state_path, {"seed": self.seed, "budget_flops": self.budget_flops, "runs": self.runs})
        return loss


def block_params(d_model, n_layers):
    """12 L d^2: 4 d^2 of attention and 8 d^2 of feed-forward a layer (2001.08361, table 1)."""
    return 12 * n_layers * d_model ** 2


def read_json(path, kind: type):
    """What a JSON file holds. Raises ValueError naming the file when it is not JSON, or not a `kind`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give another file") from None
    if not isinstance(value, kind) or kind is list and not all(isinstance(run, dict) for run in value):
        raise ValueError(f"{path} does not hold {'a list of runs' if kind is list else 'a state'}; give another file")
    return value


def write_json(path, value) -> None:
    """Write a JSON file whole or not at all, a line a run."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value).replace("}, {", "},\n {") + "\n", encoding="utf-8")
    os.replace(temporary, path)


# --- a strategy that spends the budget ---

def shape_for(n_params: float, aspect: float, step: int = 16, widest: int = 1024) -> dict:
    """d_model, n_layers, n_heads whose 12 L d^2 and d / L come nearest to n_params and aspect; heads of about 64."""
    d, layers = np.meshgrid(np.arange(64, widest + 1, step), np.arange(2, 25 if widest <= 1024 else 97))
    off = 10 * np.log(block_params(d, layers) / n_params) ** 2 + np.log(d / layers / aspect) ** 2
    d_model, n_layers = int(d.flat[off.argmin()]), int(layers.flat[off.argmin()])
    heads = [h for h in range(2, max(16, widest // 64) + 1) if d_model % h == 0]
    n_heads = min(heads, key=lambda h: abs(math.log(d_model / h / 64)))
    return {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}


class Explorer:
    """Spends the budget of a TrainingAPI by itself: pilots for the settings, IsoFLOP runs, then where it helps most."""
    RESERVE = 0.05                   # share of the budget that is not touched

    def __init__(self, api: TrainingAPI, target_flops: float = 1e19):
        self.api, self.target, self.aspect, self.settings, self.runs = api, target_flops, 64.0, {}, []

    def complete(self, n_params: float, flops: float, aspect: float | None = None, widest: int = 1024) -> dict:
        """A whole query for a model of n_params: its shape and the best settings known so far."""
        shape = shape_for(n_params, aspect or self.aspect, widest=widest)
        n = block_params(shape["d_model"], shape["n_layers"])
        found = {"batch_size": 128, "learning_rate": 6e-4} | settings_for(self.settings, math.log(n),
                                                                          math.log(flops / 6 / n))
        found["learning_rate"] = float(f"{np.clip(found['learning_rate'], 1e-4, 1e-3):.3g}")
        return shape | found | {"flops": flops}

    def run(self, n_params: float, flops: float, aspect: float | None = None, **fixed) -> dict:
        """One query, with the best settings known or those given; returns its record."""
        asked = self.complete(n_params, flops, aspect) | fixed
        self.api.query(**asked)
        return next(run for run in self.api.runs if asked.items() <= run.items())

    def pilot(self) -> None:
        """A twelfth of the budget: learning rates at four sizes, aspect ratio at one, batch size at six lengths."""
        for n_params, flops in ((1e6, 1e14), (4e6, 1e15), (1.5e7, 1e16), (6e7, 1e16)):
            for rate in (1e-4, 1.8e-4, 3.2e-4, 5.6e-4, 1e-3):
                self.run(n_params, flops, learning_rate=rate)
        self.settings = fit_settings(self.api.runs)
        tried = [self.run(1e7, 3e15, aspect=ratio) for ratio in (16, 32, 64, 128)]
        ratios, losses = zip(*((run["d_model"] / run["n_layers"], run["loss"]) for run in tried))
        self.aspect = math.exp(vertex(ratios, losses))
        for n_params, flops in ((3e5, 1e14), (1e6, 1e15), (3e6, 3e15), (3e6, 1e16), (1e6, 6e15), (1e7, 1e16)):
            for batch_size in (128, 256):
                self.run(n_params, flops, batch_size=batch_size)
        self.settings = fit_settings(self.api.runs)

    def isoflops(self) -> None:
        """Seven sizes at each of four budgets, a factor 1.8 apart, around the minimum that the budget before had."""
        best = 1.5e6
        for flops in (3e15, 6e15, 1e16, 3e16):
            rung = round(math.log(best / 1e5, 1.8))
            here = [self.run(1e5 * 1.8 ** max(i, 2), flops) for i in range(rung - 3, rung + 4)]
            self.runs += here
            best = 1.6 * min(here, key=lambda run: run["loss"])["n_params"]

    def most_useful(self, left: float) -> tuple | None:
        """(N, C) of the run, of those that `left` pays for, that makes the prediction at the target surest.

        In linear theory the parameters have covariance S = s^2 (J'J)^-1, J the gradients of ln L at the runs so far;
        a new row j lowers the variance of the target's ln L, g' S g, by (g' S j)^2 / (1 + j' S j).
        """
        n, c = np.array([(n, c) for c in QUERY_FLOPS if 3e16 <= c <= left for n in np.geomspace(1e6, 3e8, 30)]
                        or np.empty((0, 2))).T
        if not len(n):
            return None
        fit, (x, y, _, _) = fit_parametric(self.runs, resamples=0), columns(self.runs, "the design")
        at = predict(fit, self.target, warn=False)
        jacobian, g, j = (law_rows(fit.law[0], *point)[1] for point in (
            (x, y), np.log([[at.n_params], [at.n_tokens]]), np.log([n, c / n / 6])))
        covariance = np.linalg.inv(jacobian.T @ jacobian + 1e-9 * np.eye(5))
        best = ((j @ covariance @ g[0]) ** 2 / (1 + ((j @ covariance) * j).sum(-1))).argmax()
        return float(n[best]), float(c[best])

    def spend(self) -> dict:
        """All of it; returns the submission: shape, settings, flops, and the predicted loss with its interval."""
        self.pilot()
        self.isoflops()
        while chosen := self.most_useful(self.api.budget_flops * (1 - self.RESERVE) - self.api.used_flops):
            n_params, flops = chosen
            while (run := self.run(n_params, flops)) in self.runs:           # a run that is there would teach nothing
                n_params *= 0.85
            self.runs.append(run)
        self.fit = fit_parametric(self.runs)
        self.fit.update(self.settings)
        best = predict(self.fit, self.target, warn=False)
        return self.complete(best.n_params, self.target, widest=2048) | {
            key: best[key] for key in ("loss", "loss_low", "loss_high")}


# --- pictures and tables ---

def draw(fit: Fit, runs: list[dict], target: float, stem: str, command: str, key: str = "flops", check=None) -> str:
    """Three pictures, STEM_isoflop.png (curves at equal `key`), STEM_best.png (N and D against C), STEM_loss.png.

    check: a run that was predicted and not fitted. Returns the paths, for printing.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    pictures = {name: plt.subplots(figsize=(6.5, 4.5), layout="constrained") for name in ("isoflop", "best", "loss")}
    curves, sizes, losses = (axis for _, axis in pictures.values())
    log_n, log_d, log_c, log_l = columns(runs, "a picture")
    counts = np.log([run.get(key) or run["compute_budget"] for run in runs])
    for number, group in enumerate(budgets_of(counts)):
        group, color = group[np.argsort(log_n[group])], plt.cm.viridis(number / 8)
        n, fitted = np.exp(log_n[group]), np.exp(law_terms(fit.law[0], log_n[group], log_d[group])[0])
        curves.plot(n, np.exp(log_l[group]), "o", color=color, ms=4, label=f"{math.exp(counts[group].mean()):.1e}")
        curves.plot(n, fitted, color=color, linewidth=1)
    budgets = np.geomspace(math.exp(log_c.min()), target, 60)
    along = [predict(fit, c, warn=False) for c in budgets]
    for axis, name in ((sizes, "n_params"), (sizes, "n_tokens"), (losses, "loss")):
        axis.fill_between(budgets, *([one[name + end] for one in along] for end in ("_low", "_high")), alpha=0.25)
        axis.loglog(budgets, [one[name] for one in along], label=f"best {name}, 90 % interval")
    for factor in (1, 20):
        sizes.loglog(budgets, factor * np.sqrt(budgets / 120), "k--", linewidth=0.8, label="D = 20 N" * (factor == 1))
    losses.loglog(np.exp(log_c), np.exp(log_l), ".", color="grey", label="runs")
    if check:
        curves.plot(check["n_params"], check["loss"], "r*", ms=10, label=f"predicted, then trained: {check[key]:.1e}")
        losses.plot(check["flops"], check["loss"], "r*", ms=10, label="predicted, then trained")
    curves.set(xscale="log", xlabel="N, non-embedding parameters", ylabel="final loss, nats per token")
    sizes.set(xlabel="C = 6 N D, FLOPs", ylabel="parameters, tokens")
    losses.set(xlabel="C = 6 N D, FLOPs", ylabel="final loss, nats per token")
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for name, (figure, axis) in pictures.items():
        axis.legend(fontsize=7)
        axis.set_title(f"{command} ({fit.method} fit)", fontsize=9)
        figure.savefig(f"{stem}_{name}.png", dpi=100)
        plt.close(figure)
    return f"pictures: {stem}_{{{','.join(pictures)}}}.png"


def print_fits(fits: list[Fit], flops: float) -> None:
    """A table: each fit's exponents, and its prediction at `flops` with the 90 % interval."""
    print(f"{f'at {flops:.3g} FLOPs':<22}{'a':>6}{'b':>6}{'E':>6}{'N':>10}  {'90 % interval':<20}{'D':>10}{'D/N':>7}"
          f"{'loss':>7}  90 % interval")
    for fit in fits:
        p, known = predict(fit, flops), len(fit.law) > 1
        print(f"{fit.method:<22}{fit.a:>6.3f}{fit.b:>6.3f}{fit.E:>6.2f}{p.n_params:>10.3g}  "
              f"{f'{p.n_params_low:.3g} … {p.n_params_high:.3g}' if known else '-':<20}{p.n_tokens:>10.3g}"
              f"{p.tokens_per_param:>7.1f}{p.loss:>7.3f}  "
              + (f"{p.loss_low:.3f} … {p.loss_high:.3f}" if known else "-"))


def fit_all(runs: list[dict]) -> list[Fit]:
    """Every fit that the runs allow, Kaplan's laws printed; says why one is left out."""
    fits = []
    for fit in (fit_envelope, fit_isoflop, lambda runs: fit_isoflop(runs, "argmin"), fit_parametric):
        try:
            fits.append(fit(runs))
        except ValueError as error:
            print(f"left out: {error}")
    if not fits:
        raise ValueError(f"no fit is possible with these {len(runs)} runs, for the reasons above")
    print("Kaplan: " + ", ".join(f"L({x}) = ({c:.3g} / {x})^{p:.3f}" for x, (c, p) in fit_kaplan(runs).items()))
    return fits


def fit_file(path: str, settings) -> None:
    """All fits of the runs in a file, and what they say at settings.flops (none: ten times the largest budget)."""
    runs = read_json(path, list)
    fits = fit_all(runs)
    flops = settings.flops or 10 * fits[-1].max_flops
    print_fits(fits, flops)
    print(draw(fits[-1], runs, flops, f"{settings.out_dir}/fit", f"python scaling.py fit {path}"))


def demonstrate(settings) -> None:
    """A world explored, every fit beside the truth, 20 worlds scored, published laws, arg-min's bias, pictures."""
    target = settings.flops or 1e19
    explorer = Explorer(TrainingAPI(2e18, settings.seed), target)
    submission = explorer.spend()
    result, laws = score(submission, settings.seed), [published(name) for name in PUBLISHED]
    print(f"world {settings.seed}: {len(explorer.api.runs)} runs, {explorer.api.used_flops:.3g} of 2e18 FLOPs")
    # Whole curves would cost more than the budget: the envelope gets a service of its own.
    curves = Explorer(TrainingAPI(1e20, settings.seed))
    curves.settings, curves.aspect = explorer.settings, explorer.aspect
    fits = [fit_envelope([curves.run(n, c) for n in np.geomspace(5e5, 5e7, 12) for c in QUERY_FLOPS[6:-4]])]
    print_fits(fits + fit_all(explorer.runs), target)
    print(f"{'the hidden truth':<40}{result['best_n_params']:>10.3g}{result['best']:>46.3f}")
    served = predict(explorer.fit, target, inference_tokens=1e10)
    print(f"to serve 1e10 tokens from the same FLOPs: N {served.n_params:.3g}, {served.tokens_per_param:.0f} tokens "
          f"per parameter, loss {served.loss:.3f}")
    print("submission: " + ", ".join(f"{key} {value:.4g}" for key, value in submission.items()))
    print(f"scored: prediction {result['prediction_error']:+.2f} % off the truth, model {result['excess']:.2f} % "
          "above the best loss\n\nGopher's budget by the published laws:")
    print_fits(laws, GOPHER_FLOPS)
    c = np.repeat(np.geomspace(1e18, 1e21, 7), 6)
    n = np.array([predict(laws[1], one).n_params for one in c]) * np.tile(np.geomspace(0.05, 12, 6), 7)
    loss = np.exp(law_terms(laws[1].law[0], np.log(n), np.log(c / 6 / n))[0])
    grid = [dict(zip(RECORD, row)) for row in zip(n, c / 6 / n, c, loss)]
    off = [100 * (predict(fit_isoflop(grid, method), 1e21).n_params / predict(laws[1], 1e21).n_params - 1)
           for method in ("parabola", "argmin")]
    print(f"N at 1e21 from 6 sizes a budget, no noise: parabola {off[0]:+.1f} %, arg-min {off[1]:+.1f} %")
    scores = [score(Explorer(TrainingAPI(2e18, seed)).spend(), seed) for seed in range(20)]
    good = sum(abs(s["prediction_error"]) <= 1 and s["excess"] <= 1 for s in scores)
    print(f"20 worlds: {good} with prediction and model both within 1 %; largest errors "
          f"{max(abs(s['prediction_error']) for s in scores):.2f} % and {max(s['excess'] for s in scores):.2f} %")
    print(draw(explorer.fit, explorer.runs, target, f"{settings.out_dir}/scaling", "python scaling.py"))


# --- a config for train.py ---

def plan(settings) -> Path:
    """Write a config for train.py that spends settings.flops at its best, and say what to expect; returns its path.

    The law is the re-fit of Hoffmann's. Learning rate and batch are DeepSeek's for AdamW, 0.3118 C^-0.125 and
    0.2920 C^0.3271 tokens, fitted from 1e17 to 2e19 FLOPs (2401.02954, eq. 1).
    """
    device = next((name for name in DEVICES if name.lower() == settings.device.lower()), None)
    if device is None:
        raise ValueError(f"device={settings.device!r} is not known; there are {', '.join(DEVICES)}")
    flops, T, fit = settings.flops or 1e18, settings.context_length, published("besiroglu")
    best = predict(fit, flops)
    shape = shape_for(best.n_params, 64.0, step=64, widest=8192)
    shape["n_heads"] = shape["d_model"] // 64                # widths are multiples of 64, and so heads are 64 wide
    config = ModelConfig(**shape, vocab_size=settings.vocab_size, context_length=T, qk_norm=True)
    n_params, batch = size(config), T * max(1, round(0.2920 * flops ** 0.3271 / T))
    steps = max(1, round(flops / (6 * n_params * batch)))
    exact, hours = exact_flops(config) * steps * batch, training_hours(config, steps * batch, device)
    loss = math.exp(law_terms(fit.law, np.log([n_params]), np.log([steps * batch]))[0].item())
    micro = largest_batch(config, DEVICES[device].memory_bytes, dtype="bfloat16")
    if not micro:
        raise ValueError(f"not one sequence of a model of {n_params:.3g} parameters fits {device}; choose a larger "
                         "device or fewer flops")
    values = {"data_dir": settings.data_dir or "data/owt", "out_dir": "out/plan", "context_length": T, **shape,
              "qk_norm": True, "batch_tokens": batch, "micro_batch_size": min(batch // T, micro, 64),
              "max_steps": steps, "lr": float(f"{min(0.3118 * flops ** -0.125, 1e-2):.3g}"),
              "warmup_steps": min(2000, max(1, steps // 20)),
              "eval_every": max(1, steps // 20), "log_every": max(1, steps // 200)}
    text = f'''"""{flops:.3g} FLOPs well spent: `python train.py {settings.config}`, by `python scaling.py plan`.

N {n_params:,} (best {best.n_params:.3g}), D {steps * batch:,} tokens, {steps * batch / n_params:.0f} a parameter, by
the re-fit of Chinchilla's law (2404.10102). Expected loss {loss:.2f} nats a token with that law's data and tokenizer;
elsewhere only differences carry over. 6 N D = {6 * n_params * steps * batch:.3g}, with head and attention {exact:.3g}:
{hours:.3g} hours on one {device} at an assumed 40 % of its peak.
"""
''' + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    Path(settings.config).write_text(text, encoding="utf-8")
    print(text)
    return Path(settings.config)


# --- real runs ---

def size(config: ModelConfig) -> int:
    """N: the parameters of a model without its embeddings and its head."""
    counts = count_params(config)
    return counts["total"] - counts["token_embeddings"] - counts["position_embeddings"] - counts["lm_head"]


def exact_flops(config: ModelConfig) -> float:
    """FLOPs of training on one token, head and attention included."""
    return flops_per_token(config, config.context_length, training=True)["total"]


def real_job(shape: tuple, budget: float, seed: int, common: dict) -> dict:
    """What real_run needs to spend `budget` exact FLOPs on one shape, and the record that lacks only its loss."""
    values = dict(zip(("d_model", "n_layers", "n_heads"), shape)) | {
        "vocab_size": common["vocab_size"], "context_length": REAL_RECIPE["context_length"], "qk_norm": True}
    model, batch = ModelConfig(**values), REAL_RECIPE["batch_tokens"]
    steps = max(1, round(budget / (exact_flops(model) * batch)))
    record = {"name": f"{shape[0]}x{shape[1]}_{steps}_seed{seed}", "n_params": size(model), "n_tokens": steps * batch,
              "flops": 6 * size(model) * steps * batch, "flops_exact": exact_flops(model) * steps * batch,
              "budget": budget, "seed": seed}
    return common | {"model": values, "steps": steps, "record": record}


def real_run(job: dict) -> dict:
    """Train one small model through train.py, or go on with it; returns its run record."""
    torch.set_num_threads(job["threads"])
    record, steps, out_dir = job["record"], job["steps"], Path(job["out_dir"]) / job["record"]["name"]
    rate = (64 / job["model"]["d_model"]) ** 0.5   # peak rates fall with the width, as pilots at 32, 64 and 96 had it
    config = train.TrainConfig(**REAL_RECIPE | job["model"] | {
        "lr": 0.012 * rate, "muon_lr": 0.04 * rate, "data_dir": job["data_dir"], "out_dir": str(out_dir),
        "max_steps": steps, "seed": record["seed"], "warmup_steps": max(10, steps // 20), "device": job["device"],
        "log_every": max(1, steps // 50), "dtype": job["dtype"], "resume": (out_dir / "ckpt.pt").exists()})
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        figures = train.main(config)               # its log.jsonl has all that it prints
    if figures["interrupted"] is not None:
        raise ValueError(f"{record['name']} was stopped and saved; the same command goes on")
    curve = [[line["step"] * config.batch_tokens, line["loss"]] for line in train.read_log(out_dir / "log.jsonl")
             if "norm" in line]
    return record | {"loss": figures["val_loss"], "seconds": round(figures["seconds"], 1), "dtype": job["dtype"],
                     "curve": curve}


def train_missing(jobs: list[dict], path: Path, workers: int) -> list[dict]:
    """Run what `path` does not hold yet, `workers` at a time, saving each record as it comes; the jobs' records."""
    records = read_json(path, list) if path.exists() else []
    done, threads = {record["name"] for record in records}, max(1, torch.get_num_threads() // workers)
    todo = [job | {"threads": threads} for job in jobs if job["record"]["name"] not in done]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {path}, {len(todo)} to train", flush=True)
    workers = min(workers, len(todo))
    # Spawned, not forked: a forked copy of torch's thread pool hangs.
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        for record in (pool.imap_unordered(real_run, todo) if pool else map(real_run, todo)):
            records.append(record)
            write_json(path, records)
            print(f"{record['name']:<20} N {record['n_params']:>9,}  D {record['n_tokens']:>9,}  exact FLOPs "
                  f"{record['flops_exact']:.2e}  loss {record['loss']:.4f}  {record['seconds']:.0f} s", flush=True)
    return [record for job in jobs for record in records if record["name"] == job["record"]["name"]]


def real(settings) -> dict:
    """The grid, the fit, and a run of 8 times the largest budget, predicted before it is trained; returns figures."""
    folder, data_dir = Path(settings.results_dir), settings.data_dir or "data/shakespeare_4096"
    folder.mkdir(parents=True, exist_ok=True)
    if settings.data_dir is None and not (Path(data_dir) / "meta.json").exists():
        train.data.prepare("shakespeare", 4096, data_dir, REAL_RECIPE["context_length"])
    meta, device = train.data.read_meta(data_dir), train.pick_device(settings.train_device)
    common = {"vocab_size": meta["vocab_size"], "data_dir": data_dir, "out_dir": settings.out_dir, "device": device,
              "dtype": settings.dtype or train.pick_dtype(None, device)}
    # Seed 2 at the smallest budget only, to see the noise.
    jobs = [real_job(shape, budget, seed, common) for budget, shapes in REAL_GRID.items()
            for seed in ((1, 2) if budget == min(REAL_GRID) else (1,)) for shape in shapes]
    path = folder / "scaling_runs.json"
    runs = train_missing(jobs, path, settings.workers)
    fit, count = fit_parametric(runs), len(REAL_GRID[min(REAL_GRID)])
    print(f"fit of {len(runs)} runs: " + ", ".join(f"{key} {fit[key]:.4g} ({fit[key + '_low']:.4g} … "
                                                   f"{fit[key + '_high']:.4g})" for key in LAW))
    gaps = [math.log(one["loss"] / two["loss"]) for one, two in zip(runs[:count], runs[count:2 * count])]
    # The shape that the law likes best for the large budget, unless it would see the corpus more than three times.
    options = [real_job(shape, 8.2 * max(REAL_GRID), 1, common) for shape in REAL_CHECK_SHAPES]
    n, d = np.array([[job["record"]["n_params"], job["record"]["n_tokens"]] for job in options]).T
    guesses = np.exp(law_terms(fit.law, np.log(n)[:, None, None], np.log(d)[:, None, None])[0][..., 0])
    pick = (guesses[:, 0] + 100 * np.maximum(d / meta["train_tokens"] - 3, 0)).argmin()      # (options, 1 + resamples)
    job, figures = options[pick], Fit()
    figures.add("predicted", guesses[pick])
    print("predicted for {}: {predicted:.4f} ({predicted_low:.4f} … {predicted_high:.4f})".format(
        job["record"]["name"], **figures), flush=True)
    check, = train_missing([job], path, 1)
    figures.update(measured=check["loss"], error_percent=100 * (figures.predicted / check["loss"] - 1),
                   seed_noise_percent=100 * math.sqrt(sum(gap ** 2 for gap in gaps) / 2 / len(gaps)),
                   times_exact=check["flops_exact"] / max(run["flops_exact"] for run in runs),
                   times_6nd=check["flops"] / max(run["flops"] for run in runs), law={key: fit[key] for key in LAW})
    write_json(folder / "scaling_real.json", figures)
    print("measured {measured:.4f}: the prediction is {error_percent:+.2f} % off, at {times_exact:.1f} times the exact "
          "FLOPs ({times_6nd:.1f} times 6 N D) of the largest run fitted; the seed alone moves a loss by "
          "{seed_noise_percent:.2f} %".format(**figures))
    print(draw(fit, runs, 2 * check["flops"], f"{folder}/scaling_real", "python scaling.py real", "budget", check))
    return figures


# --- the command ---

@dataclass
class Settings:
    """What the command line can say."""
    flops: float | None = None       # the budget to predict for; none = 1e19, plan: 1e18, fit: 10 times the largest
    seed: int = 0                    # which simulated world
    out_dir: str = "out/scaling"     # pictures, and the checkpoints of real
    device: str = "H100"             # plan: what to train on, a name of accounting.py's DEVICES
    config: str = "config_plan.py"   # plan: the file to write
    context_length: int = 512        # plan: tokens of a sequence
    vocab_size: int = 32_000         # plan: of the tokenizer, for the hours
    data_dir: str | None = None      # token files; none = data/owt for plan, for real Shakespeare in 4,096 tokens
    results_dir: str = "results"     # real: where runs, figures and picture are kept
    workers: int = 2                 # real: runs at a time, which share the cores
    train_device: str | None = None  # real: cpu, cuda, mps; none = the best there is
    dtype: str | None = None         # real: float32 | bfloat16; none = what the device is fast at


USAGE = """usage: python scaling.py [fit RUNS.json | plan | real] [--key=value …]
  (nothing)   explore a simulated service, fit, predict, score; pictures in OUT_DIR
  fit         all fits of the runs in a file, and their prediction at --flops
  plan        write a config for train.py that spends --flops
  real        train a grid of small models, predict a larger one, train it, compare"""


def main(argv: list[str]) -> None:
    """What `python scaling.py ARGV` does; a mistake exits with status 2."""
    verb, files, settings, _ = command_line(Settings, argv, USAGE, verbs=("fit", "plan", "real"))
    if len(files) != (verb == "fit"):
        fail(f"{'give one file of runs' if verb == 'fit' else f'{files[0]!r} is no verb'}. {USAGE}")
    try:
        if settings.flops is not None and not 0 < settings.flops < math.inf or settings.workers < 1:
            raise ValueError(f"flops={settings.flops} must be a finite number above 0, workers={settings.workers} at "
                             "least 1")
        if verb == "fit":
            fit_file(files[0], settings)
        else:
            {"plan": plan, "real": real, None: demonstrate}[verb](settings)
    except (ValueError, OSError) as error:
        fail(error)


# --- the hidden law of the service: do not read before predicting ---

class World:
    """L = E + (A / N^alpha + B / D^beta) (1 + penalties), times seeded noise of 0.2 %.

    Drawn by seed: E, alpha, beta, and at 1e19 FLOPs the best D / N (10 … 40) and the loss above E (0.9 … 1.4).
    Penalties, quadratic in the logarithm around a best value: learning rate (falling with N), aspect ratio d / L
    (shallow, as in 2001.08361, figure 5), width of a head (64), batch (128 … 256 sequences, growing as D^0.2).
    """

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng([20260, seed])
        self.E, self.alpha, self.beta = rng.uniform(1.5, 2.1), rng.uniform(0.30, 0.38), rng.uniform(0.30, 0.40)
        ratio, above = math.exp(rng.uniform(math.log(10), math.log(40))), rng.uniform(0.9, 1.4)
        n = math.sqrt(1e19 / 6 / ratio)
        self.A = above * self.beta / (self.alpha + self.beta) * n ** self.alpha
        self.B = above * self.alpha / (self.alpha + self.beta) * (n * ratio) ** self.beta
        self.rate, self.rate_power = rng.uniform(0.006, 0.012), rng.uniform(0.16, 0.20)
        self.aspect, self.batch_tokens = rng.uniform(40, 90), math.exp(rng.uniform(math.log(1e8), math.log(3e9)))
        self.seed = seed

    def loss(self, d_model, n_layers, n_heads, batch_size, learning_rate, flops, noise: bool = False) -> float:
        n = block_params(d_model, n_layers)
        d = flops / (6 * n)
        off = (0.06 * math.log(learning_rate / (self.rate * n ** -self.rate_power)) ** 2
               + 0.015 * math.log(d_model / n_layers / self.aspect) ** 2 + 0.004 * math.log(d_model / n_heads / 64) ** 2
               + 0.03 * math.log(batch_size / min(max(180 * (d / self.batch_tokens) ** 0.2, 128), 256)) ** 2)
        loss = self.E + (self.A / n ** self.alpha + self.B / d ** self.beta) * (1 + off)
        key = f"{self.seed} {d_model} {n_layers} {n_heads} {batch_size} {learning_rate:.6e} {flops:.6e}"
        draw = np.random.default_rng(list(hashlib.sha256(key.encode()).digest())).normal()   # whatever the order
        return float(loss * math.exp(0.002 * draw)) if noise else loss


def score(submission: dict, seed: int) -> dict:
    """How a submission does in its world: errors in percent of the true loss and of the best achievable one."""
    world = World(seed)
    true = world.loss(**{key: submission[key] for key in RANGES})
    law = np.array([[math.log(world.A), world.alpha, math.log(world.B), world.beta, math.log(world.E)]])
    best = predict(make_fit("truth", law, np.log([submission["flops"]])), submission["flops"])
    return {"true": true, "best": best.loss, "best_n_params": best.n_params,
            "prediction_error": 100 * (submission["loss"] / true - 1), "excess": 100 * (true / best.loss - 1)}


if __name__ == "__main__":
    main(sys.argv[1:])
