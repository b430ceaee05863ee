"""Of 100 seeds, how often do 90 % intervals hold the truth? `python results/scaling_intervals.py` (about 2 minutes).

Runs follow a published law with 1 % noise; N, D and loss are predicted at ten times the largest budget.
"""
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import scaling

GRIDS = [(np.geomspace(1e18, 1e20, 5), 5, 9), (np.geomspace(1e18, 1e21, 6), 10, 9), (np.geomspace(1e17, 1e19, 5), 3, 7)]


def law_runs(name, budgets, spread, sizes, seed):
    """Noisy runs at `sizes` sizes, from best / spread to best * spread, of each budget."""
    (e, a, b, alpha, beta), draws, runs = scaling.PUBLISHED[name], np.random.default_rng(seed), []
    for c in budgets:
        best = scaling.predict(scaling.published(name), c, warn=False).n_params
        for n in best * np.geomspace(1 / spread, spread, sizes):
            loss = (e + a / n ** alpha + b / (c / 6 / n) ** beta) * math.exp(0.01 * draws.normal())
            runs.append({"n_params": n, "n_tokens": c / 6 / n, "flops": c, "loss": loss})
    return runs


for fit in (scaling.fit_isoflop, scaling.fit_parametric):
    for name, law in scaling.PUBLISHED.items():
        for budgets, spread, sizes in GRIDS:
            flops, held = 10 * budgets[-1], Counter()
            truth = dict(zip(scaling.LAW, law)) | {key: value for key, value in scaling.predict(scaling.published(
                name), flops, warn=False).items() if key in ("n_params", "n_tokens", "loss")}
            for seed in range(100):
                found = fit(law_runs(name, budgets, spread, sizes, seed))
                found.update(scaling.predict(found, flops))
                held.update(key for key in truth if found[f"{key}_low"] <= truth[key] <= found[f"{key}_high"])
            grid = f"{len(budgets)} budgets from {budgets[0]:.0e}, {sizes} sizes to x{spread:<3}"
            print(f"{fit.__name__:<15}{name:<10}{grid}", *(f"{key} {held[key]}" for key in truth), flush=True)
