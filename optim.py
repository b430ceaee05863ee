"""Optimizers, learning-rate schedules and gradient clipping, each as its paper writes it and then batched.

SGD -> momentum -> AdaGrad -> RMSProp -> Adam -> AdamW is one line of thought: divide the step by how large the gradient
usually is. Muon leaves it: it treats a weight as a matrix and makes every direction of the update equally large.
`python optim.py` lets five of them compete: a table and results/optimizers.png, 15 s on one core of an AMD EPYC.

All are `torch.optim.Optimizer` subclasses; the arithmetic is ours. It runs through torch._foreach_*, which hands a
whole list of tensors to one call: a model of 40 tensors would otherwise pay for some 400 small operations a step.

Papers: Duchi 2011 (AdaGrad, JMLR 12), Hinton 2012 (RMSProp, Coursera lecture 6e), Kingma & Ba 2014 (Adam, 1412.6980),
Loshchilov & Hutter 2017 (decoupled decay, 1711.05101; cosine, 1608.03983), Jordan 2024 (Muon,
kellerjordan.github.io/posts/muon), Liu 2025 (Muon's scale and decay, 2502.16982), Amsel 2025 (its polynomials,
2505.16932), Hu 2024 (WSD, 2404.06395).
"""
import functools
import math

import torch

LIMITS = {"lr": (0, math.inf), "eps": (0, math.inf), "weight_decay": (0, math.inf), "momentum": (0, 1), "beta": (0, 1),
          "betas": (0, 1), "ns_steps": (1, math.inf)}


class _Optimizer(torch.optim.Optimizer):
    """The part all share: check the settings, and call `update` with each group's tensors that have a gradient.

    Weight decay is decoupled in all of them.
    """

    def __init__(self, params, **settings):
        for name, value in settings.items():
            low, high = LIMITS[name]
            if not all(low <= number < high for number in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name}={value} must be at least {low}" + f" and below {high}" * (high < math.inf))
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params, [p.grad for p in params], [self.state[p] for p in params])
        return loss

    @staticmethod
    def kept(params, states, *names):
        """For each name the list of what the states keep under it, zeros before a parameter's first step."""
        return [[state[name] if name in state else state.setdefault(name, torch.zeros_like(p))
                 for p, state in zip(params, states)] for name in names]

    @staticmethod
    def decay(group, params):
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


class SGD(_Optimizer):
    """m = momentum · m + g;  p = p - lr · m (Polyak 1964). One step size for all: the steepest direction bounds it."""

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        m, = self.kept(params, states, "momentum_buffer")
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, grads)
        self.decay(group, params)
        torch._foreach_add_(params, m, alpha=-group["lr"])


class AdaGrad(_Optimizer):
    """s = s + g²;  p = p - lr · g / (√s + eps) (Duchi 2011): rare features get larger steps, and all steps shrink."""

    def __init__(self, params, lr: float = 0.01, eps: float = 1e-10, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        s, = self.kept(params, states, "sum")
        self.accumulate(s, grads, group)
        denominators = torch._foreach_sqrt(s)
        torch._foreach_add_(denominators, group["eps"])
        self.decay(group, params)
        torch._foreach_addcdiv_(params, grads, denominators, -group["lr"])

    @staticmethod
    def accumulate(s, grads, group):
        torch._foreach_addcmul_(s, grads, grads)


class RMSProp(AdaGrad):
    """AdaGrad that forgets: s = beta · s + (1 - beta) · g² (Hinton 2012, lecture 6e). Adam is this with momentum."""

    def __init__(self, params, lr: float = 0.01, beta: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0):
        _Optimizer.__init__(self, params, lr=lr, beta=beta, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def accumulate(s, grads, group):
        torch._foreach_mul_(s, group["beta"])
        torch._foreach_addcmul_(s, grads, grads, 1 - group["beta"])


class AdamW(_Optimizer):
    """Adam with decoupled weight decay (1711.05101, algorithm 2), in the order of the course:

        m = b1 m + (1 - b1) g                     first moment
        v = b2 v + (1 - b2) g²                    second moment
        p = p - lr · m̂ / (√v̂ + eps)               with m̂ = m / (1 - b1^t), v̂ = v / (1 - b2^t)
        p = p - lr · weight_decay · p             the plain lr: decay does not follow the bias correction
    The state has torch's keys (step, exp_avg, exp_avg_sq), so a state_dict moves between torch's AdamW and this one.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01):
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        for state in states:
            state.setdefault("step", torch.tensor(0.0)).add_(1)
        (m, v), (beta1, beta2) = self.kept(params, states, "exp_avg", "exp_avg_sq"), group["betas"]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        # Parameters without a gradient in some steps (an idle expert) lag behind, so each tensor has its own t.
        steps = [s["step"].item() for s in states]
        # lr · m̂ / (√v̂ + eps) with √(1 - b2^t) taken out above and below the line: two passes fewer over all tensors.
        roots = [math.sqrt(1 - beta2 ** t) for t in steps]
        rates = [-float(group["lr"]) * root / (1 - beta1 ** t) for root, t in zip(roots, steps)]  # lr may be a tensor
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, [group["eps"] * root for root in roots])
        torch._foreach_addcdiv_(params, m, denominators, rates)
        self.decay(group, params)


@functools.cache
def polar_express(steps: int) -> list[tuple]:
    """(a, b, c) of `steps` polynomials a x + b x³ + c x⁵ that one after the other send [10^-(steps+1)/2, 1] close to 1.

    Each is the one nearest to 1 on the interval that the last one left, and so the steepest at 0 that this interval
    allows (Amsel 2025, 2505.16932). Five steps end within 0.14 of 1, three within 0.29, two within 0.37. Jordan's
    (3.4445, -4.7750, 2.0315) for every step starts, for two steps or more, with less than half that slope.
    """
    low, high, found = max(10 ** (-(steps + 1) / 2), 1e-8), 1.0, []
    for _ in range(steps):
        # The best one touches 1 - e, 1 + e, 1 - e, 1 + e in turn: at the ends and where its slope is 0. Remez: solve
        # for these values at four points, move the inner two to where the slope is 0 now, again.
        x = torch.tensor([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high], dtype=torch.float64)
        for _ in range(20):
            powers = torch.stack((x, x ** 3, x ** 5, x.new_tensor([1, -1, 1, -1])), dim=1)
            a, b, c, error = torch.linalg.solve(powers, torch.ones_like(x)).tolist()
            root = math.sqrt(9 * b * b - 20 * a * c)
            x[1], x[2] = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        found.append((a, b, c))
        error = max(error, 0.05)                                  # what bfloat16 adds; beyond the interval they explode
        low, high = 1 - error, (1 + error) * 1.02
    return found


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U Vᵀ of each matrix's SVD U S Vᵀ, roughly. matrices: (..., rows, columns).

    Newton-Schulz in bfloat16, matrix products only: X -> a X + (b A + c A²) X with A = X Xᵀ. Singular values of at
    least 10^-(steps+1)/2 of the matrix's norm end as close to 1 as `polar_express` says, 0.86 … 1.14 in five steps; a
    large square matrix has smaller ones, which are raised as far as the slopes at 0 do. What rounding does to the
    singular vectors is far below the noise of a gradient.
    """
    x = matrices.bfloat16().flatten(0, -3) if matrices.dim() > 2 else matrices.bfloat16()[None]
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                       # A is then the smaller of the two Gram matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # all singular values at most 1, with room for rounding
    for a, b, c in polar_express(steps):                          # baddbmm adds beta times its first argument
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(_Optimizer):
    """MomentUm Orthogonalized by Newton-schulz, for the hidden matrices of a network (Jordan 2024):

        m = momentum · m + g
        u = orthogonalize(g + momentum · m)               Nesterov
        p = p · (1 - lr · weight_decay) - lr · max(1, rows/columns)^½ · u

    A gradient matrix has a few large singular values and many small ones; Adam follows the large. Here all directions
    move alike. Only for 2-D (or stacks of 2-D) parameters: embeddings, the head and norms belong to AdamW.
    Raises ValueError for a parameter with fewer than two dimensions.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, ns_steps: int = 5):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() < 2:
                raise ValueError(
                    f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}; give that one to AdamW")

    def update(self, group, params, grads, states):
        buffers, = self.kept(params, states, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        looked_ahead = torch._foreach_add(grads, buffers, alpha=group["momentum"])
        self.decay(group, params)
        same_shape = {}
        for p, u in zip(params, looked_ahead):
            same_shape.setdefault(p.shape, []).append((p, u))
        for shape, pairs in same_shape.items():                   # equal shapes share one batched product
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            updates = orthogonalize(torch.stack([u for _, u in pairs]), group["ns_steps"])
            torch._foreach_add_([p for p, _ in pairs], list(updates.to(pairs[0][0].dtype)), alpha=-group["lr"] * scale)


# --- schedules: step number to learning rate ---

def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, cosine_steps: int) -> float:
    """Learning rate at `step`: up linearly from 0, down along half a cosine, then flat (1608.03983, eq. 5).

        1. step < warmup_steps:              step / warmup_steps · max_lr
        2. warmup_steps <= step <= cosine_steps:   min_lr + ½ (1 + cos(π · done)) (max_lr - min_lr)
        3. step > cosine_steps:              min_lr
    """
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    if step > cosine_steps:
        return min_lr
    done = (step - warmup_steps) / max(cosine_steps - warmup_steps, 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def wsd_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, stable_steps: int,
                 decay_steps: int) -> float:
    """Warmup, stable, decay (2404.06395): up linearly, flat for stable_steps, down linearly over decay_steps, min_lr.

    The flat part has no end in mind: a run can be prolonged, and only the decay need be trained again.
    """
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    into_decay = step - warmup_steps - stable_steps
    if not 0 < into_decay < decay_steps:
        return max_lr if into_decay <= 0 else min_lr
    return max_lr + into_decay / decay_steps * (min_lr - max_lr)


# --- clipping ---

def norms(grads) -> list[torch.Tensor]:
    """The L2 norm of each, a float32 scalar: in float16 one above 65,504 would be infinite."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return [norm.float() for norm in torch._foreach_norm(grads, 2, wide)]


@torch.no_grad()
def clip_grad_norm(params, max_norm: float, eps: float = 1e-6) -> torch.Tensor:
    """Scale all gradients in place by max_norm / (norm + eps) when their common L2 norm is above max_norm.

    One norm over all tensors, so that the direction of the step is kept; parameters without a gradient are left out.
    Returns the norm before clipping, a float32 scalar tensor (0 when there is no gradient); where it is not finite the
    gradients stay as they are, to be looked at. Parameters that parallel.py has cut go to its own version, which sums
    over the ranks: then it is collective.
    """
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    if any(getattr(p, "cuts", None) for p in params):
        import parallel                  # here: only whoever has cut parameters has loaded it already
        return parallel.clip_grad_norm(params, max_norm, eps)
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    found = norms(grads)
    norm = torch.stack([n.to(found[0].device) for n in found]).norm()
    # A factor of 1 rather than a branch: asking on the host whether to clip would wait for the GPU.
    torch._foreach_mul_(grads, torch.where(norm.isfinite(), torch.clamp(max_norm / (norm + eps), max=1.0), 1.0))
    return norm


# --- five on one problem ---

def compete(make, lr: float, steps: int = 300) -> list[float]:
    """Losses of a two-layer network that imitates another one; directions of its inputs differ 100-fold in size."""
    torch.manual_seed(0)
    sizes = torch.logspace(0, -2, 32)
    inputs = torch.randn(1024, 32) * sizes
    targets = torch.relu(inputs @ (torch.randn(32, 64) / sizes[:, None])) @ torch.randn(64, 16)
    first, second = ((torch.randn(n, m) / n ** 0.5).requires_grad_() for n, m in ((32, 64), (64, 16)))
    optimizer, losses = make([first, second], lr, weight_decay=0.0), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, lr, 0.0, 0, steps)
        loss = (torch.relu(inputs @ first) @ second - targets / targets.std()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(path="results/optimizers.png") -> None:
    """Print each optimizer's losses at its best learning rate and draw them to `path`."""
    from matplotlib.figure import Figure
    axis = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    print("best of 8 learning rates; share of the variance left\noptimizer        lr   step 30       100       300")
    for make in (SGD, AdaGrad, RMSProp, AdamW, Muon):
        runs = {3.0 ** k: compete(make, 3.0 ** k) for k in range(-6, 2)}
        lr = min(runs, key=lambda lr: runs[lr][-1] if math.isfinite(runs[lr][-1]) else math.inf)
        print(f"{make.__name__:<10}{lr:>9.2g}" + "".join(f"{runs[lr][step - 1]:>10.4f}" for step in (30, 100, 300)))
        axis.semilogy(runs[lr], label=f"{make.__name__}, lr {lr:.2g}")
    axis.set(xlabel="step", ylabel="share of the targets' variance left", title="python optim.py")
    axis.legend()
    axis.figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
