"""The five numbers of L = E + A / N^alpha + B / D^beta that pass best through runs: damped Gauss-Newton.

A residual r = ln L of the law - ln L of the run. Where the law is nearly straight in its parameters p, the Jacobian J
(n, 5) says how all residuals move, and the squares Σ r² are least after the step that solves (JᵀJ) step = -Jᵀr:
Newton's step, with JᵀJ in the place of second derivatives. Two things make it safe for runs:

    loss |      | squares         Huber: beyond HUBER a loss is a straight line, so that one diverged run does not bend
         |     / ,· Huber         the law. Its squares count HUBER / |r|, which is how Gauss-Newton takes it in.
         |   ,/·
         |_-´______ |r|           Damping: E, A and alpha trade against each other in a narrow valley; (JᵀJ + λI) takes
                                  shorter steps, λ grows after one that failed and shrinks after one that helped.

Parameters are ln A, alpha, ln B, beta, ln E: A, B and E stay above 0. Hoffmann 2022, 2203.15556, section 3.3;
Marquardt 1963; that Huber's losses are summed and not averaged matters (2404.10102): the solver stopped too early.
"""
import numpy as np

HUBER = 1e-3                         # on ln L, summed over runs (2203.15556, section 3.3)


def law_terms(law, x, y) -> tuple:
    """ln L, (..., n), and each term's share of L, (3, ..., n), at ln N = x, ln D = y. law: (..., 5)."""
    a, alpha, b, beta, e = np.moveaxis(law[..., None], -2, 0)
    terms = np.stack([a - alpha * x, b - beta * y, e + 0 * x])
    log_loss = np.logaddexp.reduce(terms)
    return log_loss, np.exp(terms - log_loss)


def huber(law, x, y, target, weights):
    """The weighted Huber loss of each law, (S,): squares up to HUBER, straight lines beyond."""
    off = np.abs(law_terms(law, x, y)[0] - target)
    return (weights * np.where(off <= HUBER, off * off / 2, HUBER * (off - HUBER / 2))).sum(-1)


def gauss_newton(law, x, y, target, weights, steps: int) -> tuple:
    """(laws, losses) of many fits at once after so many steps. law (S, 5): where they start; weights 1 or (S, n)."""
    damping, best = np.full(len(law), 1e-3), huber(law, x, y, target, weights)
    for _ in range(steps):
        log_loss, (in_n, in_d, in_e) = law_terms(law, x, y)
        jacobian = np.stack([in_n, -x * in_n, in_d, -y * in_d, in_e], 1)     # (S, 5, n)
        residual = log_loss - target
        weighted = jacobian * (weights * HUBER / np.maximum(np.abs(residual), HUBER))[:, None]
        hessian, gradient = weighted @ jacobian.swapaxes(1, 2), weighted @ residual[..., None]
        ridge = damping * np.trace(hessian, axis1=1, axis2=2) / 5 + 1e-14
        trial = law - np.linalg.solve(hessian + ridge[:, None, None] * np.eye(5), gradient)[..., 0]
        value = huber(trial, x, y, target, weights)
        better = value < best                                                # False where it is no number
        law, best = np.where(better[:, None], trial, law), np.where(better, value, best)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e6)
    return law, best
