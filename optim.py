"""Optimizers, learning-rate schedules and gradient clipping, each as its paper writes it.

    SGD        p -= lr · g                         one step size for all: the steepest direction bounds it
    momentum   p -= lr · m                         m sums past gradients: directions that keep their sign gain speed
    AdaGrad    p -= lr · g / √(sum of g²)          each number has its own step size; all steps shrink for ever
    RMSProp    p -= lr · g / √(mean of recent g²)  … and no longer shrink
    Adam(W)    p -= lr · m / √(mean of recent g²)  both; AdamW leaves weight decay out of the division
    Muon       P -= lr · U Vᵀ                      a matrix as a matrix: the gradient U S Vᵀ with all of S set to 1

`python optim.py` lets five of them compete and draws the losses and a gradient's singular values before and after Muon.
"""
import math
import sys
from pathlib import Path

import torch


@torch.no_grad()
def adamw_step(params, moments, t: int, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) -> None:
    """Step number t (from 1) of AdamW, to read; `AdamW` below does the same faster. moments: a pair (m, v) a parameter.
    Source: Adam 1412.6980, algorithm 1; decoupled decay 1711.05101, algorithm 2. The decay uses lr as it is given."""
    for p, (m, v) in zip(params, moments):
        m.copy_(betas[0] * m + (1 - betas[0]) * p.grad)              # first moment: the mean of recent gradients
        v.copy_(betas[1] * v + (1 - betas[1]) * p.grad ** 2)         # second moment: how large they usually are
        m_hat = m / (1 - betas[0] ** t)                              # both began at 0 and are too small by this much
        v_hat = v / (1 - betas[1] ** t)
        p -= lr * m_hat / (v_hat.sqrt() + eps)
        p -= lr * weight_decay * p


class _Optimizer(torch.optim.Optimizer):
    """What all share: the decay. A subclass's update(group, params, grads, states) steps against the gradients."""

    def __init__(self, params, **settings):
        if not 0 <= settings["lr"] < math.inf:
            raise ValueError(f"lr={settings['lr']} must be at least 0")
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the loss of closure(), if one is given."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                self.update(group, params, [p.grad for p in params], [self.state[p] for p in params])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        return loss


def state_tensors(params, states, name: str) -> list[torch.Tensor]:
    """What each parameter's state keeps under `name`; zeros before its first step."""
    return [state[name] if name in state else state.setdefault(name, torch.zeros_like(p))
            for p, state in zip(params, states)]


class SGD(_Optimizer):
    """m = momentum · m + g;  p = p - lr · m (Polyak 1964)."""

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        for p, g, m in zip(params, grads, state_tensors(params, states, "momentum_buffer")):
            m.mul_(group["momentum"]).add_(g)
            p -= group["lr"] * m


class AdaGrad(_Optimizer):
    """s = s + g²;  p = p - lr · g / (√s + eps) (Duchi 2011, JMLR 12): rare features get larger steps."""

    def __init__(self, params, lr: float = 0.01, eps: float = 1e-10, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        for p, g, s in zip(params, grads, state_tensors(params, states, "sum")):
            s.add_(g * g)
            p -= group["lr"] * g / (s.sqrt() + group["eps"])


class RMSProp(_Optimizer):
    """s = beta · s + (1 - beta) · g²;  p = p - lr · g / (√s + eps) (Hinton 2012, lecture 6e): AdaGrad that forgets."""

    def __init__(self, params, lr: float = 0.01, beta: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, beta=beta, eps=eps, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        for p, g, s in zip(params, grads, state_tensors(params, states, "square_avg")):
            s.mul_(group["beta"]).add_((1 - group["beta"]) * g * g)
            p -= group["lr"] * g / (s.sqrt() + group["eps"])


def in_order(x, p):
    """x with its numbers in p's order in memory: the fused kernel walks over all tensors as they lie there."""
    return x if x.stride() == p.stride() else torch.empty_like(p).copy_(x)


class AdamW(_Optimizer):
    """`adamw_step` in one pass over the numbers, by torch's fused kernel. Its state_dict is torch's: both read both."""

    def __init__(self, params, lr=1e-3, betas: tuple = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    def update(self, group, params, grads, states):
        for p, state in zip(params, states):
            state["step"] = state.get("step", torch.tensor(0.0)).to(p.device)          # an idle expert's lags behind
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = in_order(state[name], p) if name in state else torch.zeros_like(p)
        m, v, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        if any(x.stride() != p.stride() for x, p in zip(m, params)):
            raise ValueError("AdamW cannot step a parameter with gaps in memory, a slice of another: give it a clone")
        lists = [params, [in_order(g, p) for p, g in zip(params, grads)], m, v, steps]
        for (params, grads, m, v, steps), _ in self._group_tensors_by_device_and_dtype(lists).values():    # torch's own
            torch._fused_adamw_(params, grads, m, v, [], steps, eps=group["eps"], lr=float(group["lr"]), amsgrad=False,
                                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=0.0, maximize=False)


JORDAN = (3.4445, -4.7750, 2.0315)
# Together they send singular values of 0.032 … 1 to within 0.37 of 1 (2505.16932); two of Jordan's send 0.032 to 0.37.
TWO_ROUNDS = ((7.3089, -20.5328, 14.9934), (2.8429, -2.0524, 0.4336))


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U Vᵀ of each matrix's SVD U S Vᵀ, roughly. matrices: (..., rows, columns).
    Newton-Schulz, products in bfloat16 only: X -> a X + (b A + c A²) X with A = X Xᵀ keeps U, V and sends a singular
    value s to a s + b s³ + c s⁵: a small one grows 3.4-fold a round, one near 1 stays within 0.3 of it."""
    x = matrices.bfloat16().flatten(0, -3) if matrices.dim() > 2 else matrices.bfloat16()[None]
    tall = x.shape[-2] > x.shape[-1]                              # then Xᵀ X is the smaller one, and stands behind X
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)    # all singular values below 1, with room for rounding
    for a, b, c in TWO_ROUNDS if steps == 2 else [JORDAN] * steps:
        gram = x.mT @ x if tall else x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)   # beta · first + alpha · second · third
        x = torch.baddbmm(x, x, gram, beta=a) if tall else torch.baddbmm(x, gram, x, beta=a)
    return x.reshape(matrices.shape)


class Muon(_Optimizer):
    """MomentUm Orthogonalized by Newton-schulz, for the hidden matrices of a network.

        m = momentum · m + g
        u = orthogonalize(g + momentum · m)               Nesterov
        p = p - lr · max(1, rows/columns)^½ · u

    A gradient matrix has a few large singular values and many small ones; Adam follows the large. Here all directions
    move alike. Embeddings, head and norms belong to AdamW. Source: Jordan 2024, kellerjordan.github.io/posts/muon."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0, ns_steps: int = 5):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)

    def update(self, group, params, grads, states):
        same_shape = {}
        for p, g, m in zip(params, grads, state_tensors(params, states, "momentum_buffer")):
            m.mul_(group["momentum"]).add_(g)
            same_shape.setdefault(p.shape, []).append((p, g + group["momentum"] * m))
        for shape, pairs in same_shape.items():                   # equal shapes share one batched product
            if len(shape) < 2:
                raise ValueError(f"Muon takes matrices, not a shape of {tuple(shape)}; give that one to AdamW")
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            updates = orthogonalize(torch.stack([u for _, u in pairs]), group["ns_steps"])
            torch._foreach_add_([p for p, _ in pairs], list(updates.to(pairs[0][0].dtype)), alpha=-group["lr"] * scale)


def cosine_schedule(step, max_lr, min_lr, warmup_steps, cosine_steps) -> float:
    """Up linearly from 0, down along half a cosine until cosine_steps, then min_lr (1608.03983, equation 5)."""
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    done = min((step - warmup_steps) / max(cosine_steps - warmup_steps, 1), 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (max_lr - min_lr)


def wsd_schedule(step, max_lr, min_lr, warmup_steps, stable_steps, decay_steps) -> float:
    """Warmup, stable, decay (2404.06395): a run can be prolonged, and only its decay need be trained again."""
    if step < warmup_steps:
        return step / warmup_steps * max_lr
    return max_lr + min(max(step - warmup_steps - stable_steps, 0) / max(decay_steps, 1), 1) * (min_lr - max_lr)


def norms(grads) -> list[torch.Tensor]:
    """The L2 norm of each, a float32 scalar: in float16 one above 65,504 would be infinite."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return [norm.float() for norm in torch._foreach_norm(grads, 2, wide)]


@torch.no_grad()
def clip_grad_norm(params, max_norm: float, eps: float = 1e-6) -> torch.Tensor:
    """Scale all gradients in place by max_norm / (norm + eps) when their common L2 norm is above max_norm; a norm that
    is not finite leaves them. Returns it, before clipping, a float32 scalar (0 without any gradient)."""
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    if any(getattr(p, "cuts", None) for p in params):
        raise ValueError("the norm of divided parameters needs all ranks: use parallel.clip_grad_norm")
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    norm = torch.stack(norms(grads)).norm()
    # A factor of 1 and no branch: asking on the host whether to clip would wait for the GPU.
    torch._foreach_mul_(grads, torch.where(norm.isfinite(), torch.clamp(max_norm / (norm + eps), max=1.0), 1.0))
    return norm


def main(path="out/optimizers.png", steps: int = 300) -> None:
    """A network of 32 × 64 × 16 imitates another, whose inputs differ 100-fold in size, by each optimizer at its best
    learning rate of 3^-6 … 3. Print the share of the targets' variance that is left, and draw it to `path`."""
    from matplotlib.figure import Figure
    losses, values = Figure(figsize=(12, 4.5), layout="constrained").subplots(1, 2)
    torch.manual_seed(0)
    sizes = torch.logspace(0, -2, 32)
    inputs = torch.randn(1024, 32) * sizes
    targets = torch.relu(inputs @ (torch.randn(32, 64) / sizes[:, None])) @ torch.randn(64, 16)
    starts = [torch.randn(n, m) / n ** 0.5 for n, m in ((32, 64), (64, 16))]
    print("optimizer      lr   step 30       100       300")
    for make, lr in ((SGD, 3), (AdaGrad, 1 / 9), (RMSProp, 1 / 81), (AdamW, 1 / 9), (Muon, 1 / 3)):
        first, second = params = [start.clone().requires_grad_() for start in starts]
        optimizer, curve = make(params, lr, weight_decay=0.0), []
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = cosine_schedule(step, lr, 0.0, 0, steps)
            optimizer.zero_grad()
            loss = (torch.relu(inputs @ first) @ second - targets / targets.std()).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        print(f"{make.__name__:<10}{lr:>7.2g}" + "".join(f"{curve[steps // n - 1]:>10.4f}" for n in (10, 3, 1)))
        losses.semilogy(curve, label=f"{make.__name__}, lr {lr:.2g}")
    for rounds in (0, 2, 5):                                      # 0: the gradient itself, of Frobenius norm 1
        matrix = orthogonalize(first.grad, rounds) if rounds else first.grad / first.grad.norm()
        values.semilogy(torch.linalg.svdvals(matrix.float()), ".-", label=f"{rounds} rounds of Muon")
    losses.set(xlabel="step", ylabel="share of the targets' variance left", title="python optim.py")
    values.set(xlabel="singular value", ylabel="size", title="one gradient before and after Muon")
    losses.legend()
    values.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    losses.figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    if sys.argv[1:]:
        print("usage: python optim.py      (no settings; it draws out/optimizers.png)")
        sys.exit(0 if sys.argv[1] in ("--help", "-h") else 2)
    main()
