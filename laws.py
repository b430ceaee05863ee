r"""Power laws through finished runs: what loss, which size and how many tokens at a budget that nobody has trained yet.

Symbols: N parameters without embeddings and head, D tokens, C = 6 N D training FLOPs (Kaplan 2020, 2.1), L the final
loss in nats per token. A run is a dict with n_params, n_tokens, flops, loss.

IsoFLOP (Hoffmann 2022, approach 2). At one budget, small models see much and learn little of it, large ones see little:

    loss  \                      .      The handout takes the lowest dot of each budget and fits ln N against ln C:
           \                   .        `best_of_each_budget`. It can only answer with a size of the grid, and a grid
            o                o          off centre moves every budget's answer the same way, so the error does not
              `o         o´             average out. The parabola through the dots has its minimum between them:
                 `o - o´  <- minimum    `fit_isoflop`.
            ----------------- ln N

The parametric law (approach 3): L = E + A / N^alpha + B / D^beta on all runs at once, `fit_parametric`. At its best
model neither term can be traded for the other. Put D = C / 6N, so dD/dN = -D/N, and set dL/dN = 0:

    alpha A / N^alpha = beta B / D^beta  ->  N = n0 C^a, a = beta / (alpha + beta), L - E = k C^-gamma, gamma = alpha a

So D / N is constant ("20 tokens a parameter") only where alpha = beta. Intervals: the middle 90 % of fits with each run
counted by a random weight of mean 1 (Rubin's Bayesian bootstrap): redrawing the runs, but none is lost. Hoffmann is
2203.15556, Kaplan 2001.08361, the re-fit Besiroglu 2404.10102.
"""
import math

import numpy as np

from gauss_newton import HUBER, gauss_newton, huber, law_terms  # noqa: F401

RECORD = ("n_params", "n_tokens", "flops", "loss")           # what every run record holds
LAW = ("E", "A", "B", "alpha", "beta")
# Fits to web text that others published, up to 3e21 FLOPs: Hoffmann's approach 3, and its re-fit.
PUBLISHED = {"hoffmann": (1.69, 406.4, 410.7, 0.34, 0.28), "besiroglu": (1.8172, 482.01, 2085.43, 0.3478, 0.3658)}


# --- runs and fits ---

def columns(runs: list[dict]) -> np.ndarray:
    """ln N, ln D, ln C, ln L of the runs, (4, n). Raises ValueError for missing, non-positive or non-finite numbers."""
    for number, run in enumerate(runs):
        for key in RECORD:
            value = run.get(key) if isinstance(run, dict) else run
            if not isinstance(value, (int, float, np.number)) or not 0 < value < math.inf:
                raise ValueError(f"run {number} has {key}={value!r}; a run has {', '.join(RECORD)}, numbers above 0")
    return np.log([[float(run[key]) for run in runs] for key in RECORD])


def budgets_of(log_c) -> list:
    """Indices of the runs of each budget; runs within 10 % of each other's FLOPs are one budget."""
    order = np.argsort(log_c)
    return np.split(order, np.flatnonzero(np.diff(log_c[order]) > 0.1) + 1)


class Fit(dict):
    """Numbers by name, as fit["alpha"] and as fit.alpha; NAME_low and NAME_high are their 90 % interval."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}")
        return self[name]

    def add(self, **estimates) -> "Fit":
        """Store column[0] of each estimate, and the interval that its column spans; returns itself."""
        for name, column in estimates.items():
            low, high = np.quantile(column, (0.05, 0.95))
            self[name] = float(column[0])
            self[f"{name}_low"], self[f"{name}_high"] = float(min(low, column[0])), float(max(high, column[0]))
        return self


def make_fit(method: str, law) -> Fit:
    """The Fit of laws (S, 5), each ln A, alpha, ln B, beta, ln E: the estimate, then those of redrawn runs."""
    (log_a, alpha, log_b, beta, log_e), (_, a, gamma, _) = law.T, frontier(law)
    return Fit(method=method, law=law).add(E=np.exp(log_e), A=np.exp(log_a), B=np.exp(log_b), alpha=alpha, beta=beta,
                                           a=a, b=1 - a, gamma=gamma)


def frontier(law) -> tuple:
    """ln n0, a, gamma, ln k of the best N = n0 C^a and its L = E + k C^-gamma (2203.15556, eq. 4); law (S, 5)."""
    log_a, alpha, log_b, beta, _ = law.T
    a = beta / (alpha + beta)
    n0 = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta) - a * math.log(6)
    return n0, a, alpha * a, np.logaddexp(log_a - alpha * n0, log_b + beta * (n0 + math.log(6)))


def published(name: str) -> Fit:
    """A law of PUBLISHED as a Fit, without intervals."""
    e, a, b, alpha, beta = PUBLISHED[name]
    return make_fit(f"published, {name}", np.array([[math.log(a), alpha, math.log(b), beta, math.log(e)]]))


def power_law(log_x, log_y) -> tuple:
    """(ln c, p) of y = c x^p: level and slope of the least-squares line in logarithms. Both (..., n)."""
    centred = log_x - log_x.mean(-1, keepdims=True)
    slope = (log_y * centred).sum(-1) / (centred ** 2).sum(-1)
    return log_y.mean(-1) - slope * log_x.mean(-1), slope


# --- IsoFLOP ---

def best_of_each_budget(runs: list[dict], flops: float) -> float:
    """The handout's IsoFLOP: N of the best run of each budget, a straight line in logarithms, read at `flops`."""
    log_n, _, log_c, log_l = columns(runs)
    best = [group[log_l[group].argmin()] for group in budgets_of(log_c)]
    slope, height = np.polyfit(log_c[best], log_n[best], 1)
    return math.exp(height + slope * math.log(flops))


def parabola(log_n, log_l, weights) -> tuple:
    """(ln N, ln L, runs that counted) at the minimum of a parabola through one budget's runs. weights: (n,)."""
    centre = log_n[log_l.argmin()]
    for _ in range(3):
        u = log_n - centre
        near = np.exp(-u * u / 2)        # runs beyond a factor e count little: the true curve is steeper on one side
        p2, p1, p0 = np.polyfit(u, log_l, 2, w=np.sqrt(near * weights + 1e-9))
        step = np.clip(-p1 / (2 * p2), u.min(), u.max()) if p2 > 0 else 0.0
        centre = centre + step
    return centre, p0 + p1 * step + p2 * step * step, near.sum() ** 2 / (near ** 2).sum()


def fit_isoflop(runs: list[dict], resamples: int = 100) -> Fit:
    """Approach 2: power laws through the minima of 3 or more budgets with 4 or more sizes each (2203.15556, 3.2).

    A parabola is not quite the curve's shape: its minima of the fitted law's own losses at these N and D lie beside
    that law's best N. So far they are moved, and the law is fitted again.
    """
    log_n, log_d, log_c, log_l = columns(runs)
    groups = [group for group in budgets_of(log_c) if len(np.unique(log_n[group].round(6))) >= 4]
    if len(groups) < 3:
        raise ValueError(f"{len(groups)} budgets with 4 or more sizes are too few: an IsoFLOP fit needs 3, better 5")
    for x, y in ((log_n[group], log_l[group]) for group in groups):
        rises = np.corrcoef(x, y)[0, 1]                                      # ±1: a straight line in ln N
        if abs(rises) > 0.93 and x[y.argmin()] in (x.min(), x.max()):
            raise ValueError(f"the runs of one budget, N up to {math.exp(x.max()):.3g}, are all on one side of the "
                             f"minimum; add {'smaller' if rises > 0 else 'larger'} models")
    draws, once = np.random.default_rng(0).exponential(size=(resamples, len(runs))), np.ones((1, len(runs)))
    best_n, lowest = minima(groups, log_n, log_l, np.vstack([once, draws]))  # (S, budgets) each
    budgets = np.array([log_c[group].mean() for group in groups])
    law = law_through(budgets, best_n, lowest)
    by_parabola, _ = minima(groups, log_n, law_terms(law[0], log_n, log_d)[0], once)
    n0, a, *_ = frontier(law[:1])
    return make_fit("isoflop", law_through(budgets, best_n - (by_parabola - n0 - a * budgets), lowest))


def minima(groups, log_n, log_l, weights) -> np.ndarray:
    """(2, S, budgets): ln N and ln L at the minimum of each budget, for runs that count by weights (S, n)."""
    found = []
    for group in groups:
        n, loss, used = np.array([parabola(log_n[group], log_l[group], drawn[group]) for drawn in weights]).T
        # A parabola bends its three numbers towards the noise: the scatter of its minima understates the error.
        spread = math.sqrt(used[0] / max(used[0] - 3, 1))
        found.append((n[0] + spread * (n - n[0]), loss[0] + spread * (loss - loss[0])))
    return np.array(found).transpose(1, 2, 0)


def law_through(log_c, best_n, lowest) -> np.ndarray:
    """The law (S, 5) whose frontier, N = n0 C^a and L = E + k C^-gamma, passes through minima (S, m)."""
    n0, a = power_law(log_c, best_n)
    if not 0.05 < a[0] < 0.95 or power_law(log_c, lowest[0])[1] >= 0:
        raise ValueError(f"isoflop: the best N goes as C^{a[0]:.2f}, or the lowest loss does not fall with C, which no "
                         "law of N and D does; give more runs around each minimum, trained to their end")
    a, (log_e, log_k, gamma) = np.clip(a, 0.05, 0.95), floor_and_power(log_c, np.exp(lowest))
    # On the frontier A / N^alpha = a k C^-gamma, and B / D^beta = (1 - a) k C^-gamma.
    alpha, beta = gamma / a, gamma / (1 - a)
    log_a, log_b = np.log(a) + log_k + alpha * n0, np.log(1 - a) + log_k - beta * (n0 + math.log(6))
    return np.stack([log_a, alpha, log_b, beta, log_e], 1)


def floor_and_power(log_c, losses) -> tuple:
    """(ln E, ln k, gamma) of L = E + k C^-gamma: a line for each of 600 gammas. log_c (m,), losses (S, m)."""
    gammas, middle = np.geomspace(0.01, 1.0, 600), log_c.mean()
    x = np.exp(-gammas[:, None, None] * (log_c - middle))                    # (gammas, 1, m)
    e, k = power_law(x, losses)                                              # level and slope, (gammas, S) each
    wrong = ((e[..., None] + k[..., None] * x - losses) ** 2).sum(-1)
    wrong[(e <= 0.01 * losses.min(-1)) | (k <= 0)] = np.inf
    best, rows = wrong.argmin(0), np.arange(len(losses))
    e, k = np.maximum(e[best, rows], 1e-9), np.maximum(k[best, rows], 1e-9)
    return np.log(e), np.log(k) + gammas[best] * middle, gammas[best]


# --- the parametric law ---

def fit_parametric(runs: list[dict], resamples: int = 100) -> Fit:
    """Approach 3: L = E + A / N^alpha + B / D^beta on all runs, by the Huber loss of ln L, summed (2203.15556, 3.3)."""
    x, y, _, target = columns(runs)
    if len(x) < 6 or np.ptp(x - y) < 0.1 or np.ptp(x + y) < 0.1:
        raise ValueError(f"{len(x)} runs are fewer than 6, of one budget or one number of tokens per parameter: that "
                         "cannot tell five parameters apart; give several sizes at each of several budgets")
    x0, y0, lowest = x.mean(), y.mean(), math.exp(target.min())
    x, y = x - x0, y - y0                                    # centred, A and alpha are no longer one and the same
    starts = [[math.log((1 - e) * lowest / 2), alpha, math.log((1 - e) * lowest / 2), beta, math.log(e * lowest)]
              for e in (0.2, 0.6, 0.9) for alpha in (0.15, 0.35, 0.7) for beta in (0.15, 0.35, 0.7)]
    law, value = gauss_newton(np.array(starts), x, y, target, 1.0, 200)
    law = law[[value.argmin()]]
    if min(law[0, 1], law[0, 3]) < 1e-3:
        raise ValueError(f"the loss of these runs does not fall with N and D both (alpha {law[0, 1]:.2g}, beta "
                         f"{law[0, 3]:.2g}); give runs that differ in both, trained to their end")
    draws = np.random.default_rng(0).exponential(size=(resamples, len(x)))
    again, _ = gauss_newton(np.repeat(law, resamples, 0), x, y, target, draws, 60)
    # The five parameters have bent towards the noise: the scatter of the fits understates the error by n / (n - 5).
    law = np.vstack([law, law + (again - law) * math.sqrt(len(x) / (len(x) - 5))])
    law[:, 0], law[:, 2] = law[:, 0] + law[:, 1] * x0, law[:, 2] + law[:, 3] * y0
    law[:, [1, 3]] = np.maximum(law[:, [1, 3]], 1e-3)                # as the fit itself is refused below that
    return make_fit("parametric", law)


def fit_kaplan(runs: list[dict]) -> dict:
    """{"N", "D", "C": (X_c, p)} of L = (X_c / X)^p (2001.08361, 1.1 to 1.3) through runs that no smaller X beats."""
    *axes, log_l = columns(runs)
    laws = {}
    for name, x in zip("NDC", axes):
        order = np.lexsort((log_l, x))
        best = order[log_l[order] <= np.minimum.accumulate(log_l[order])]
        if np.ptp(x[best]) > 0:
            level, slope = power_law(x[best], log_l[best])
            if slope < -abs(level) / 700:                            # else X_c is no number
                laws[name] = (math.exp(-level / slope), -slope)
    return laws


def predict(fit: Fit, flops: float) -> Fit:
    """The best model for a budget of 6 N D: n_params, n_tokens, loss, tokens_per_param, and each's _low and _high."""
    if not 0 < flops < math.inf:
        raise ValueError(f"flops={flops!r} must be a finite number above 0")
    n0, a, gamma, log_k = frontier(fit.law)
    log_n = n0 + a * math.log(flops)
    log_d = math.log(flops / 6) - log_n
    loss = np.exp(fit.law[:, 4]) + np.exp(log_k - gamma * math.log(flops))
    return Fit(flops=flops).add(n_params=np.exp(log_n), n_tokens=np.exp(log_d), loss=loss,
                                tokens_per_param=np.exp(log_d - log_n))
