"""A training service with a hidden law, and a strategy that spends a budget on it: what `python scaling.py` shows.

    TrainingAPI.query    trains nothing: a hidden law and some noise give the loss, and FLOPs are counted
    Explorer             learning rates, shapes and batches first, then IsoFLOPs, then long shots; at last a prediction
    World                the law itself, at the end of the page: predict first, then read

The service has the form of CS336's third assignment, simulated: a strategy can be tried in twenty worlds in a minute.
Settings come first, since a badly tuned run bends the parabola of an IsoFLOP.
"""
import hashlib
import math

import numpy as np

from laws import fit_parametric, make_fit, power_law, predict

# What the simulated service takes: the ranges of CS336's third assignment.
RANGES = {"d_model": (64, 1024), "n_layers": (2, 24), "n_heads": (2, 16), "batch_size": (128, 256),
          "learning_rate": (1e-4, 1e-3), "flops": (1e13, 1e18)}
QUERY_FLOPS = [float(f"{m}e{e}") for e in range(13, 18) for m in (1, 3, 6)] + [1e18]


# --- the simulated service ---

class TrainingAPI:
    """Trains any model within RANGES and answers with its loss, until the FLOP budget is gone; seed: which world."""

    def __init__(self, budget_flops: float = 2e18, seed: int = 0):
        if not 0 < budget_flops < math.inf:
            raise ValueError(f"budget_flops={budget_flops!r} must be a finite number above 0, such as 2e18")
        self.budget_flops, self.seed, self.runs = float(budget_flops), seed, []

    @property
    def used_flops(self) -> float:
        """What the runs so far have cost."""
        return float(sum(run["flops"] for run in self.runs))

    def query(self, d_model: int, n_layers: int, n_heads: int, batch_size: int, learning_rate: float,
              flops: float) -> float:
        """Final loss of such a run (sequences of 512 tokens, N = 12 L d^2, D = C / 6N); the same again costs nothing.

        Raises ValueError for a value out of its range, and for a run that what is left does not pay for.
        """
        settings = dict(zip(RANGES, (d_model, n_layers, n_heads, batch_size, learning_rate, flops)))
        for name, value in settings.items():
            low, high = RANGES[name]
            kind = "whole number" if name in ("d_model", "n_layers", "n_heads") else "number"
            if isinstance(value, (str, bool)) or not low <= value <= high or kind != "number" and value != int(value):
                raise ValueError(f"{name}={value!r} must be a {kind} from {low:g} to {high:g}")
        for name, allowed in (("batch_size", (128, 256)), ("flops", QUERY_FLOPS)):
            if settings[name] not in allowed:
                raise ValueError(f"{name}={settings[name]!r} must be one of {', '.join(f'{n:g}' for n in allowed)}")
        for run in self.runs:
            if settings.items() <= run.items():
                return run["loss"]
        if self.used_flops + flops > self.budget_flops * (1 + 1e-9):
            raise ValueError(f"flops={flops:g} is more than the {self.budget_flops - self.used_flops:.4g} left of the "
                             f"budget of {self.budget_flops:g}; ask for less, or predict with the runs there are")
        n_params, loss = block_params(d_model, n_layers), World(self.seed).loss(**settings, noise=True)
        self.runs.append({"n_params": n_params, "n_tokens": flops / (6 * n_params), "loss": loss} | settings)
        return loss


def block_params(d_model, n_layers):
    """12 L d^2: 4 d^2 of attention and 8 d^2 of feed-forward a layer (2001.08361, table 1)."""
    return 12 * n_layers * d_model ** 2


# --- a strategy that spends the budget ---

def shape_for(n_params: float, aspect: float, step: int = 16, widest: int = 1024) -> dict:
    """d_model, n_layers, n_heads whose 12 L d^2 and d / L come nearest to n_params and aspect; heads of about 64."""
    d, layers = np.meshgrid(np.arange(64, widest + 1, step), np.arange(2, 25 if widest <= 1024 else 97))
    off = 10 * np.log(block_params(d, layers) / n_params) ** 2 + np.log(d / layers / aspect) ** 2
    d_model, n_layers = int(d.flat[off.argmin()]), int(layers.flat[off.argmin()])
    heads = [h for h in range(2, max(16, widest // 64) + 1) if d_model % h == 0]
    n_heads = min(heads, key=lambda h: abs(math.log(d_model / h / 64)))
    return {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads}


def vertex(x, loss) -> float:
    """ln of the best setting x by a parabola of ln L in ln x, within the range that was tried."""
    log_x, log_l = np.log(x), np.log(loss)
    p2, p1, _ = np.polyfit(log_x - log_x.mean(), log_l, 2)
    best = log_x.mean() - p1 / (2 * p2) if p2 > 0 else log_x[log_l.argmin()]
    return float(np.clip(best, log_x.min(), log_x.max()))


class Explorer:
    """Spends the budget of a TrainingAPI, and remembers what it has learnt: settings first, then the law.

    rate: (ln c, p) of the best learning rate c N^p. batch: (c, p) of ln L(256) / L(128) = c + p ln D. aspect: d / L.
    """

    def __init__(self, api: TrainingAPI, target_flops: float = 1e19):
        self.api, self.target, self.runs = api, target_flops, []
        self.aspect, self.rate, self.batch = 64.0, (math.log(6e-4), 0.0), (1.0, 0.0)

    def complete(self, n_params: float, flops: float, widest: int = 1024) -> dict:
        """A whole query for a model of about n_params: its shape, and the best settings known so far."""
        shape = shape_for(n_params, self.aspect, widest=widest)
        log_n = math.log(block_params(shape["d_model"], shape["n_layers"]))
        rate = np.clip(math.exp(self.rate[0] + self.rate[1] * log_n), 1e-4, 1e-3)
        larger_wins = self.batch[0] + self.batch[1] * (math.log(flops / 6) - log_n) < 0
        return shape | {"batch_size": 256 if larger_wins else 128, "learning_rate": float(f"{rate:.3g}"),
                        "flops": flops}

    def run(self, n_params: float, flops: float, **fixed) -> dict:
        """One query, with the best settings known or those given; returns its record."""
        query = self.complete(n_params, flops) | fixed
        self.api.query(**query)
        return next(run for run in self.api.runs if query.items() <= run.items())

    def find_settings(self) -> None:
        """A twelfth of the budget: learning rates at four sizes, aspect ratio at one, batch size at six lengths."""
        sizes, best = [], []
        for n_params, flops in ((1e6, 1e14), (4e6, 1e15), (1.5e7, 1e16), (6e7, 1e16)):
            rates = (1e-4, 1.8e-4, 3.2e-4, 5.6e-4, 1e-3)
            runs = [self.run(n_params, flops, learning_rate=rate) for rate in rates]
            sizes.append(math.log(runs[0]["n_params"]))
            best.append(vertex(rates, [run["loss"] for run in runs]))
        self.rate = power_law(np.array(sizes), np.array(best))
        tried = [self.run(1e7, 3e15, **shape_for(1e7, ratio)) for ratio in (16, 32, 64, 128)]
        ratios = [run["d_model"] / run["n_layers"] for run in tried]
        self.aspect = math.exp(vertex(ratios, [run["loss"] for run in tried]))
        lengths, gains = [], []
        for n_params, flops in ((3e5, 1e14), (1e6, 1e15), (3e6, 3e15), (3e6, 1e16), (1e6, 6e15), (1e7, 1e16)):
            small, large = (self.run(n_params, flops, batch_size=size) for size in (128, 256))
            lengths.append(math.log(small["n_tokens"]))
            gains.append(math.log(large["loss"] / small["loss"]))
        self.batch = power_law(np.array(lengths), np.array(gains))

    def isoflops(self) -> None:
        """Seven sizes at each of four budgets, a factor 1.8 apart, around the minimum that the budget before had."""
        best = 1.5e6
        for flops in (3e15, 6e15, 1e16, 3e16):
            rung = round(math.log(best / 1e5, 1.8))
            runs = [self.run(1e5 * 1.8 ** max(i, 2), flops) for i in range(rung - 3, rung + 4)]
            self.runs += runs
            best = 1.6 * min(runs, key=lambda run: run["loss"])["n_params"]

    def long_shots(self) -> None:
        """What is left, on the largest budgets: the best size by the law so far, and a third and three times that."""
        for flops, factors in ((6e17, (1.0,)), (1e17, (0.35, 2.5)), (3e17, (1.0,)), (1e17, (1.0,)), (6e16, (0.5, 1.6))):
            best = predict(fit_parametric(self.runs, resamples=0), flops).n_params
            for factor in factors:
                if self.api.used_flops + flops <= 0.95 * self.api.budget_flops:                      # a reserve
                    self.runs.append(self.run(factor * best, flops))

    def spend(self) -> dict:
        """All of it; returns the submission: shape, settings, flops, and the predicted loss with its interval."""
        self.find_settings()
        self.isoflops()
        self.long_shots()
        self.fit = fit_parametric(self.runs)
        best = predict(self.fit, self.target)
        return self.complete(best.n_params, self.target, widest=2048) | {
            key: best[key] for key in ("loss", "loss_low", "loss_high")}


# --- the hidden law of the service: do not read before predicting ---

class World:
    """L = E + (A / N^alpha + B / D^beta) (1 + penalties), times seeded noise of 0.2 %.

    Drawn by seed: E, alpha, beta, and at 1e19 FLOPs the best D / N and the loss above E. Penalties, quadratic in the
    logarithm around a best value: learning rate (falling with N), aspect ratio d / L (shallow, as in 2001.08361, figure
    5), width of a head (64), batch (128 … 256 sequences, growing as D^0.2).
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
    best = predict(make_fit("truth", law), submission["flops"])
    return {"true": true, "best": best.loss, "best_n_params": best.n_params,
            "prediction_error": 100 * (submission["loss"] / true - 1), "excess": 100 * (true / best.loss - 1)}
