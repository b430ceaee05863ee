"""The parts of a Transformer, each a few lines over `nn.Parameter`; next come attention.py and model.py.

    ids (B, T) ─ Embedding ─> (B, T, C) ─ [norm, attention, norm, feed-forward] × L ─ norm ─ Linear ─> logits (B, T, V)

Each part stands here as its paper has it. Cross entropy, RMSNorm and SwiGLU run on a CPU by a hand-written gradient in
fused.py, equal by test; torch.compile gets the version here, which it fuses itself. In float32, whatever comes in:
softmax and losses (a sum of 10,000 bfloat16 numbers of 8 bits stops growing), the mean of squares in a norm, RoPE's
angles (bfloat16 cannot tell position 1,000 from 1,001), the scores of a router. Matrix products run as autocast says.

Shape letters: B batch, T time, C d_model, D head_dim, V vocabulary, E experts, N rows.
"""
import math

import torch
from torch import nn

import fused
from fused import fast, wide

# --- softmax, and what rests on it ---

def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """exp(x) normalised to sum to 1 along `dim`. Less the maximum the ratio is the same, and exp() cannot overflow."""
    if not x.numel():                                              # the maximum of nothing is an error
        return x
    exponentials = torch.exp(wide(x) - x.amax(dim=dim, keepdim=True))
    p = exponentials / exponentials.sum(dim=dim, keepdim=True)
    return p.to(x.dtype) if x.is_floating_point() else p


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits)[target] in nats, float32. logits: (..., V), any float dtype. targets: (...). A model
    that knows nothing gives every token 1 / V: a loss of ln V, 9.2 for 10,000 tokens. Check it before training."""
    return token_cross_entropy(logits, targets).mean()


def token_cross_entropy(logits, targets):
    """-log softmax(logits)[target] of every position, (...)."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}; "
                         "they need one id for every row of logits")
    return fast(fused.CrossEntropy, simple_cross_entropy, logits, targets.long())


def simple_cross_entropy(logits, targets):
    """logsumexp(logits) - logits[target], both less the maximum: nothing overflows, and large logits lose no digits."""
    logits, targets = wide(logits), targets.unsqueeze(-1)
    if torch.compiler.is_compiling():            # one more sum for the same pass; gather's gradient scatters into zeros
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.logsumexp(dim=-1) - torch.where(ids == targets, logits, 0.0).sum(dim=-1)
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return logits.logsumexp(dim=-1) - logits.gather(-1, targets).squeeze(-1)


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v (1706.03762, eq. 1), (..., Tq, Dv); a query that may attend to nothing gets zeros, not NaN.
    q: (..., Tq, D). k: (..., Tk, D). v: (..., Tk, Dv). mask: boolean, broadcastable to (..., Tq, Tk), True = attend."""
    scores = wide(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))            # (..., Tq, Tk)
    if mask is None:
        return softmax(scores, dim=-1).to(v.dtype) @ v
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~mask, 0.0).to(v.dtype) @ v


# --- linear and embedding ---

def truncated_normal(shape, std: float) -> torch.Tensor:
    """N(0, std²) cut at three standard deviations."""
    return nn.init.trunc_normal_(torch.empty(shape), mean=0.0, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Module):
    """x @ weightᵀ, plus a bias if asked. weight: (d_out, d_in), from N(0, 2 / (d_in + d_out)) (Glorot & Bengio 2010):
    numbers keep about their size on the way forward (which asks for 1 / d_in) and back (1 / d_out)."""
    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((d_out, d_in), std=math.sqrt(2 / (d_in + d_out))))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):                                          # (..., d_in) -> (..., d_out)
        if self.bias is None:
            return x @ self.weight.T
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight.T)          # product and sum in one
        return y.view(*x.shape[:-1], y.shape[-1])


class Embedding(nn.Module):
    """A row of a table for every id. weight: (vocab_size, d_model), from N(0, 1) cut at three deviations."""
    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((vocab_size, d_model), std=1.0))

    def forward(self, tokens):                                     # (...) -> (..., C)
        # weight[tokens], but a negative id is an error and not a row from the end.
        return self.weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, self.weight.shape[1])


def lowered(x):
    """x in the dtype that autocast wants for matrix products: cast once here instead of once a product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# --- norms ---

def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (1910.07467, eq. 4). In float32: from 256 on squares
    are infinite in float16, and a sum of bfloat16 numbers stops growing."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """See rms_norm: float32 inside, the dtype that came in outside. weight: (d_model,), ones."""
    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        return fast(fused.RMSNorm, rms_norm, x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32 (1607.06450, eq. 4)."""
    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.eps = eps

    def forward(self, x):
        y = wide(x)
        y = y - y.mean(dim=-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def make_norm(config) -> nn.Module:
    """The norm that a ModelConfig asks for, over the residual stream."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)


# --- feed-forward ---

def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise (Hendrycks & Gimpel 2016, 1606.08415)."""
    return x * torch.sigmoid(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Φ(x) by the formula that GPT-2 was trained with (1606.08415, section 2); (1 + tanh z) / 2 is sigmoid(2 z)."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)² (Primer, 2109.08668)."""
    return torch.relu(x).square()


def swiglu(gate, up):
    """silu(gate) * up (2002.05202, eq. 5)."""
    return silu(gate) * up


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 is the gate, w3 the way up, w2 the way down (2002.05202, eq. 6)."""
    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff, bias), Linear(d_ff, d_model, bias)
        self.w3 = Linear(d_model, d_ff, bias)

    def forward(self, x):                                          # (..., C) -> (..., F) -> (..., C)
        x = lowered(x)
        return self.w2(fast(fused.SwiGLU, swiglu, self.w1(x), self.w3(x)))


class MLP(nn.Module):
    """w2(f(w1 x)) with f = silu, gelu or relu2: two matrices where SwiGLU has three."""
    def __init__(self, d_model: int, d_ff: int, kind: str, bias: bool = False):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff, bias), Linear(d_ff, d_model, bias)
        self.activation = {"silu": silu, "gelu": gelu, "relu2": relu2}[kind]

    def forward(self, x):
        return self.w2(self.activation(self.w1(lowered(x))))


def feed_forward(config, d_ff: int) -> nn.Module:
    """The feed-forward layer that a ModelConfig asks for, d_ff wide."""
    sizes = (config.d_model, d_ff)
    layer = SwiGLU(*sizes, config.bias) if config.ffn == "swiglu" else MLP(*sizes, config.ffn, config.bias)
    if config.zero_init:
        nn.init.zeros_(layer.w2.weight)
    return layer


# --- rotary positions ---
# RoPE turns each pair of numbers of a query or key, a point in the plane, by position × frequency. Why that works:
#     ⟨R(m) q, R(n) k⟩ = ⟨q, R(m)ᵀ R(n) k⟩ = ⟨q, R(n - m) k⟩: a score depends on contents and on the distance alone.
# Which numbers make a pair is a convention; the two in use are different models with the same shapes (D = 8):
#     interleaved: the paper, the course         (0 1) (2 3) (4 5) (6 7)
#     halves: GPT-NeoX, Qwen, Llama's HF files   (0 4) (1 5) (2 6) (3 7)
# Permuting the rows of W_q and W_k within each head turns one into the other. Hugging Face did that once, to Meta's
# interleaved Llama files. We turn halves like them, so an import permutes nothing (the classic bug: llama2.c#321).

def rope_tables(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0, config=None):
    """(cos, sin) of positions x frequencies, each (..., T, D/2) in float32. Frequency i is theta^(-2i/D), i = 0 …
    D/2 - 1 (2104.09864, section 3.2.2): the first pair turns by one radian a position, the last by about 1 / theta.
    config: a ModelConfig whose rope_factor stretches them, or none."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta ** -exponents
    if config is not None and config.rope_factor != 1:
        # Turns over the original context: few turns are stretched, many stay, between the two a straight line.
        turns = config.rope_original_context * frequencies / (2 * math.pi)
        kept = ((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / config.rope_factor
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin, interleaved: bool = False):
    """Turn each pair of numbers of x (..., D) by its angle; cos, sin: (..., D/2), broadcastable to x. See above."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def rope(x, positions, theta: float = 10_000.0, interleaved: bool = False):
    """x (..., T, D), D even, with rotary positions (T,), or (B, T) for x (B, H, T, D) or (B, T, D)."""
    if x.shape[-1] % 2:
        raise ValueError(f"rope needs an even last dimension, it is {x.shape[-1]}")
    cos, sin = rope_tables(positions, x.shape[-1], theta)
    while 1 < positions.dim() and cos.dim() < x.dim():             # (B, T, D/2) -> (B, 1, T, D/2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(x, cos, sin, interleaved)


# --- experts ---

def balance_loss(scores, counts):
    """E Σ_e f_e P_e with f_e the share of tokens sent to e and P_e its mean score (2101.03961, eq. 4-6). Where all are
    equally busy it is least: the number of experts a token. scores: (N, E). counts: (E,)."""
    return scores.shape[-1] * (counts / len(scores) * scores.mean(dim=0)).sum()


class MixtureOfExperts(nn.Module):
    """Of E feed-forward experts, each token goes through its best few, weighted by a router (2401.04088, section 2.1).

    No token is dropped and none is padded: tokens are sorted by expert, and each expert gets its own in one piece.
    balance=loss: softmax scores. balance=bias: sigmoid scores; a bias per expert joins them for the choice only, not
    for the weights (2408.15664, eq. 3; 2412.19437, eq. 16).
    """
    def __init__(self, config):
        super().__init__()
        self.n_chosen, self.by_bias = config.n_experts_per_token, config.balance == "bias"
        self.router = Linear(config.d_model, config.n_experts)
        self.experts = nn.ModuleList(feed_forward(config, config.d_ff_expert) for _ in range(config.n_experts))
        if config.n_shared_experts:
            self.shared = feed_forward(config, config.n_shared_experts * config.d_ff_expert)
        if self.by_bias:
            self.register_buffer("expert_bias", torch.zeros(config.n_experts))
        # How many tokens each expert got in training since the last rebalance(), over all micro-batches.
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_experts, dtype=torch.long), persistent=False)

    def forward(self, x, losses: list | None = None):              # (B, T, C) -> (B, T, C)
        """losses: in training this layer's balance_loss is appended to it."""
        flat = lowered(x.reshape(-1, x.shape[-1]))                 # (N, C), N = B T
        logits = wide(self.router(flat))                           # (N, E)
        scores = torch.sigmoid(logits) if self.by_bias else softmax(logits, dim=-1)
        ranked = scores + self.expert_bias if self.by_bias else scores
        chosen = ranked.topk(self.n_chosen, dim=-1).indices        # (N, n_chosen)
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=scores.shape[-1])
        if self.training:
            self.tokens_per_expert += counts
            if losses is not None:
                losses.append(balance_loss(scores, counts))
        order = chosen.flatten().argsort(stable=True)              # all of expert 0's, then all of 1's, …
        # An expert without tokens runs on no rows: its gradient is 0 rather than missing on one of many ranks.
        parts = flat[order // self.n_chosen].split(counts.tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        y = y[order.argsort()].view(len(flat), self.n_chosen, -1)  # back to the tokens' order
        y = (y * weights.unsqueeze(-1)).sum(dim=1).to(y.dtype)
        return (y + self.shared(flat) if hasattr(self, "shared") else y).view(x.shape)

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Count anew (all ranks' tokens); with balance=bias first move each bias by `rate` towards an equal load
        (2408.15664, algorithm 1)."""
        counts = self.tokens_per_expert
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if self.by_bias:
            self.expert_bias += rate * torch.sign(counts.float().mean() - counts)
        counts.zero_()
