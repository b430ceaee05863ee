"""Optimizers, learning-rate schedules and gradient clipping, each as its paper writes it and then batched.

SGD -> momentum -> AdaGrad -> RMSProp -> Adam -> AdamW is one line of thought: divide the step by how large the gradient
usually is. Muon leaves it: it treats a weight as a matrix and makes every direction of the update equally large.

All are `torch.optim.Optimizer` subclasses, so that parameter groups, state_dict and schedulers work as everybody
expects; the arithmetic is ours. It runs through torch._foreach_*, which hands a whole list of tensors to one call: a
model of 40 tensors would otherwise pay for some 400 small operations a step.

Papers: Kingma & Ba 2014 (Adam, 1412.6980), Loshchilov & Hutter 2017 (decoupled decay, 1711.05101; cosine, 1608.03983),
Jordan 2024 (Muon, kellerjordan.github.io/posts/muon), Liu 2025 (Muon's scale and decay, 2502.16982), Hu 2024 (WSD,
2404.06395).
"""
import math

import torch

# Quintic whose repeated application drives singular values from (0, 1] to about 1 (Jordan 2024). Not the Taylor
# coefficients: these give up exactness (they end in 0.7 … 1.2) for the steepest slope at 0, hence few steps.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value < high:
        raise ValueError(f"{name}={value} must be at least {low}" + (f" and below {high}" if high < math.inf else ""))


class _Optimizer(torch.optim.Optimizer):
    """The part all share: gather each group's tensors that have a gradient, then call `update(group, params, grads,
    states)`.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params, [p.grad for p in params], [self.state[p] for p in params])
        return loss

    def update(self, group, params, grads, states):
        raise NotImplementedError


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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            _check(name, value, 0.0)
        for i in range(2):
            _check(f"betas[{i}]", betas[i], 0.0, 1.0)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def update(self, group, params, grads, states):
        for p, state in zip(params, states):
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        # Parameters without a gradient in some steps (an idle expert) lag behind, so each tensor has its own t.
        steps = [s["step"].item() for s in states]
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2 ** t) for t in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, [1 - beta1 ** t for t in steps])
        torch._foreach_addcdiv_(params, m, denominators, -group["lr"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U Vᵀ of each matrix's SVD U S Vᵀ, roughly: singular values go to 0.7 … 1.2. matrices: (..., rows, columns).

    Newton-Schulz in bfloat16: X -> a X + (b A + c A²) X with A = X Xᵀ. Only matrix products, no SVD; whatever rounding
    does to the singular vectors is far below the noise of a gradient.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                       # A is then the smaller of the two Gram matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)  # all singular values at most 1, with room for rounding
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


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
        _check("lr", lr, 0.0)
        _check("momentum", momentum, 0.0, 1.0)
        _check("weight_decay", weight_decay, 0.0)
        _check("ns_steps", ns_steps, 1)
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() < 2:
                raise ValueError(
                    f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}; give that one to AdamW")

    def update(self, group, params, grads, states):
        for p, state in zip(params, states):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
        buffers = [s["momentum_buffer"] for s in states]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        looked_ahead = torch._foreach_add(grads, buffers, alpha=group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        same_shape = {}
        for p, u in zip(params, looked_ahead):
            same_shape.setdefault(p.shape, []).append((p, u))
        for shape, pairs in same_shape.items():                   # equal shapes share one batched product
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            updates = orthogonalize(torch.stack([u for _, u in pairs]), group["ns_steps"])
            torch._foreach_add_([p for p, _ in pairs], [u.to(p.dtype) for (p, _), u in zip(pairs, updates)],
                                alpha=-group["lr"] * scale)


# --- schedules: step number to learning rate ---

def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, cosine_steps: int) -> float:
    """Learning rate at `step`: up linearly from 0, down along half a cosine, then flat (1608.03983, eq. 5).

        1. step < warmup_steps:              step / warmup_steps · max_lr
        2. warmup_steps <= step <= cosine_steps:   min_lr + ½ (1 + cos(π · done)) (max_lr - min_lr)
        3. step > cosine_steps:              min_lr

    >>> [cosine_schedule(t, 1.0, 0.1, 2, 6) for t in (0, 1, 2, 4, 6, 9)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    if step > cosine_steps:
        return min_lr
    done = (step - warmup_steps) / max(cosine_steps - warmup_steps, 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def wsd_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, stable_steps: int,
                 decay_steps: int) -> float:
    """Warmup, stable, decay (2404.06395): up linearly, flat for stable_steps, down linearly over decay_steps, then
    min_lr.

    The flat part has no end in mind: a run can be prolonged, and only the decay need be trained again.
    """
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    into_decay = step - warmup_steps - stable_steps
    if into_decay <= 0:
        return max_lr
    if into_decay >= decay_steps:
        return min_lr
    return max_lr + into_decay / decay_steps * (min_lr - max_lr)


# --- clipping ---

@torch.no_grad()
def clip_grad_norm(params, max_norm: float, eps: float = 1e-6) -> torch.Tensor:
    """Scale all gradients in place by max_norm / (norm + eps) when their common L2 norm is above max_norm.

    One norm over all tensors, so that the direction of the step is kept; parameters without a gradient are left out.
    Returns the norm before clipping, a float32 scalar tensor (0 when there is no gradient).
    """
    grads = [p.grad for p in ([params] if isinstance(params, torch.Tensor) else params) if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    norms = torch._foreach_norm(grads)
    norm = torch.stack([n.float().to(norms[0].device) for n in norms]).norm()
    # A factor of 1 rather than a branch: asking on the host whether to clip would wait for the GPU.
    torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + eps), max=1.0))
    return norm
