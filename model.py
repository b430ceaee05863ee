"""A Transformer language model from `nn.Parameter` up, which a few switches turn from 2017 into GPT-2, Llama, Qwen3,
Mixtral and DeepSeek: every switch is a field of ModelConfig with its paper beside it, and a few lines below.

Token ids go in, logits come out. Everything between is on this page, bottom up: softmax, cross entropy, linear,
embedding, norms, feed-forward, rotary positions, attention, cache, experts, block, model. Where a hand-written gradient
is clearly faster on a CPU, it stands below the simple version, equal by test; torch.compile gets the simple one,
which it fuses itself. Left out: dropout (one pass over the data does not need it), encoders, a first dense layer
before experts.

Shape letters, used in every comment below:
    B batch   T time (query positions)   S source (key positions)   C d_model   H heads   K key/value heads
    D head_dim                           F d_ff                     V vocab     E experts

    norm_position=post norm=layer position=sinusoidal ffn=relu2     close to Vaswani 2017 (1706.03762), whose ffn is
    relu norm=layer position=learned ffn=gelu bias=true                  GPT-2 (Radford 2019) (defaults)
    Llama (2302.13971) qk_norm=true n_kv_heads=2                                       Qwen3 (2505.09388) n_experts=8
    Mixtral (2401.04088) attention=mla n_experts=8 n_shared_experts=1 balance=bias mtp_depth=1      DeepSeek-V3
    (2412.19437)

The loss of `model(tokens, targets)` is the mean next-token cross entropy. In training mode, and only there, the losses
of load balancing and of multi-token prediction are added, each once, with the weights of the config; `model.losses`
holds the parts.
"""
import contextlib
import math
from dataclasses import dataclass

import torch
from torch import nn

from checkpoint import load_model  # noqa: F401
from machine import (CrossEntropy, FastRMSNorm, FastRotate, FastSwiGLU, SHORT_CONTEXT, fast, in_blocks,  # noqa: F401
                     product, short_attention, wide)


# --- configuration ---

CHOICES = {"norm": ("rms", "layer", "none"), "norm_position": ("pre", "post"),
           "position": ("rope", "learned", "sinusoidal", "none"), "rope_scaling": ("none", "linear", "llama3"),
           "ffn": ("swiglu", "silu", "gelu", "relu2"), "attention": ("standard", "mla"),
           "balance": ("loss", "bias", "none"), "attention_backend": ("naive", "sdpa", "triton")}


@dataclass
class ModelConfig:
    """The shape of a model. Its defaults are the course's plain model; config files choose more."""
    vocab_size: int = 10_000         # rows of the embedding and of the head
    context_length: int = 256        # longest sequence the model is trained on, tokens
    d_model: int = 512               # width of the residual stream
    n_layers: int = 4                # blocks
    n_heads: int = 16                # query heads
    n_kv_heads: int | None = None  # key/value heads; none = n_heads (MHA); fewer: GQA (2305.13245); 1: MQA (1911.02150)
    head_dim: int | None = None      # width of a head; none = d_model / n_heads
    d_ff: int | None = None  # width of the feed-forward layer; none = 8/3 d_model (swiglu; multiple of 64) or 4 d_model
    norm: str = "rms"                # rms (1910.07467) | layer (1607.06450) | none
    norm_eps: float = 1e-5           # inside the norms' root
    norm_position: str = "pre"       # pre (2002.04745) | post (the sum is normed, 1706.03762; then no final norm)
    qk_norm: bool = False            # RMSNorm over each head's query and key (2010.04245, 2302.05442)
    position: str = "rope"  # rope (2104.09864) | learned (GPT-2) | sinusoidal (1706.03762, 3.5) | none (2305.19466)
    rope_theta: float = 10_000.0     # base of the rotary frequencies
    rope_interleaved: bool = False  # rotate pairs (2i, 2i+1) as the paper does instead of (i, i + D/2) as Llama's files
    rope_scaling: str = "none"  # none | linear (2306.15595) | llama3 (2407.21783): RoPE stretched to longer contexts
    rope_factor: float = 1.0         # rope_scaling: how many times longer
    rope_low_freq: float = 1.0       # llama3: wavelengths over rope_original_context / this are stretched in full
    rope_high_freq: float = 4.0      # llama3: wavelengths under rope_original_context / this stay
    rope_original_context: int = 8192      # llama3: the context length before stretching
    ffn: str = "swiglu"              # swiglu (2002.05202) | silu | gelu (tanh form, 1606.08415) | relu2 (2109.08668)
    bias: bool = False               # a bias in every linear layer but the head, and in LayerNorm (GPT-2)
    qkv_bias: bool = False           # a bias in the query, key and value projections only (Qwen2, 2407.10671)
    tie_embeddings: bool = False     # the head is the embedding matrix (1608.05859)
    smear: bool = False  # add to each embedding the one before it, times a gate for each number (cf. RWKV, 2305.13048)
    zero_init: bool = False          # each block's last matrices start at 0, so that the model starts as the identity
    logit_softcap: float | None = None     # logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118)
    sliding_window: int | None = None  # a position sees this many positions, itself included (2310.06825); none = all
    window_pattern: str = "S"  # which layers slide, repeated over them: S sliding, L full (SSSL: every fourth full)
    attention: str = "standard"  # standard | mla: keys and values through one narrow latent (DeepSeek-V2, 2405.04434)
    kv_lora_rank: int | None = None  # mla: width of that latent; none = 4 head_dim
    q_lora_rank: int | None = None   # mla: queries through a latent of this width too; none = directly
    rope_head_dim: int | None = None       # mla: width of the extra, shared key that carries RoPE; none = head_dim / 2
    n_experts: int = 0               # feed-forward experts in every layer, 0 = one dense layer (1701.06538, 2401.04088)
    n_experts_per_token: int = 2     # experts that work on a token
    n_shared_experts: int = 0        # experts that work on every token besides (2401.06066)
    d_ff_expert: int | None = None   # width of one expert; none = d_ff
    balance: str = "loss"  # loss (2101.03961, eq. 4) | bias (2408.15664) | none: how experts are kept equally busy
    balance_weight: float = 0.01     # balance=loss: its weight in the training loss
    balance_rate: float = 0.001      # balance=bias: how far a step moves an expert's bias
    mtp_depth: int = 0  # further tokens predicted in training by extra heads (DeepSeek-V3, 2412.19437, 2.2)
    mtp_weight: float = 0.3          # weight of their mean loss in the training loss
    attention_backend: str = "sdpa"  # naive (ours, to read) | sdpa (torch's fused one) | triton (ours, kernels.py)
    fused_loss: bool = False         # train by kernels.linear_cross_entropy: logits in chunks, never whole (2410.10989)

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}; choose one of them")
        mla = self.attention == "mla"
        whole = ["vocab_size", "context_length", "d_model", "n_layers", "n_heads"]
        self._check_whole(whole)
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; change one, or set head_dim")
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.head_dim = self.d_model // self.n_heads if self.head_dim is None else self.head_dim
        if self.d_ff is None:
            self.d_ff = max(64, round(8 / 3 * self.d_model / 64) * 64) if self.ffn == "swiglu" else 4 * self.d_model
        self.d_ff_expert = self.d_ff if self.n_experts and self.d_ff_expert is None else self.d_ff_expert
        if mla:
            self.kv_lora_rank = 4 * self.head_dim if self.kv_lora_rank is None else self.kv_lora_rank
            self.rope_head_dim = max(2, self.head_dim // 2) if self.rope_head_dim is None else self.rope_head_dim
        optional = ("sliding_window", "kv_lora_rank", "q_lora_rank", "rope_head_dim", "d_ff_expert")
        self._check_whole(["n_kv_heads", "head_dim", "d_ff", "n_experts_per_token", "rope_original_context"]
                          + [name for name in optional if getattr(self, name) is not None])
        self._check_whole(["n_experts", "n_shared_experts", "mtp_depth"], least=0)
        self._check_combinations(mla)

    def _check_whole(self, names, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")

    def _check_combinations(self, mla: bool) -> None:
        """What fits together. Every setting that would have no effect is refused rather than ignored."""
        rotary = self.rope_head_dim if mla else self.head_dim
        for wrong, message in (
            (self.n_heads % self.n_kv_heads,
             f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"),
            (self.position == "rope"
             and rotary % 2, f"the rotated width {rotary} must be even: RoPE turns pairs of numbers"),
            (set(self.window_pattern) - set("SL") or not self.window_pattern,
             f"window_pattern={self.window_pattern!r} must be made of S (sliding) and L (full), such as SSSL"),
            (self.window_pattern != "S" and self.sliding_window is None,
             f"window_pattern={self.window_pattern!r} needs sliding_window, the number of positions to see"),
            (self.logit_softcap is not None
             and self.logit_softcap <= 0, f"logit_softcap={self.logit_softcap} must be above 0, or none"),
            (self.fused_loss and self.logit_softcap is not None,
             "fused_loss=true never has the logits that logit_softcap bends; choose one"),
            (self.rope_scaling != "none" and (self.position != "rope" or self.rope_factor < 1),
             f"rope_scaling={self.rope_scaling} needs position=rope and rope_factor >= 1, not {self.rope_factor}"
             ),
            (self.rope_scaling == "none"
             and self.rope_factor != 1, f"rope_factor={self.rope_factor} needs rope_scaling=linear or llama3"),
            (self.rope_scaling == "llama3" and not 0 < self.rope_low_freq < self.rope_high_freq,
             f"rope_low_freq={self.rope_low_freq} must be above 0 and below rope_high_freq={self.rope_high_freq}"),
            (mla and (self.position != "rope" or self.qk_norm or self.n_kv_heads != self.n_heads or self.qkv_bias),
             "attention=mla needs position=rope and no qk_norm, qkv_bias or n_kv_heads: its latent replaces them"
             ),
            (mla and self.attention_backend == "triton",
             "attention_backend=triton has no attention=mla, whose keys and values differ in width; use sdpa"),
            (not mla and any((self.kv_lora_rank, self.q_lora_rank, self.rope_head_dim)),
             "kv_lora_rank, q_lora_rank and rope_head_dim need attention=mla"),
            (self.n_experts and self.n_experts_per_token > self.n_experts,
             f"n_experts_per_token={self.n_experts_per_token} is more than n_experts={self.n_experts}"),
            (not self.n_experts and (self.n_shared_experts or self.d_ff_expert),
             "n_shared_experts and d_ff_expert need n_experts of at least 1"),
            (self.mtp_depth
             >= self.context_length, f"mtp_depth={self.mtp_depth} must be below context_length={self.context_length}"),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def windows(self) -> tuple:
        """The window of each layer, None where it sees everything."""
        pattern = self.window_pattern
        return tuple(self.sliding_window if pattern[i % len(pattern)] == "S" else None for i in range(self.n_layers))


# Published shapes. gpt2: Radford 2019. course: CS336 assignment 2, table 1 (and its 10B). llama: 2307.09288,
# 2407.21783 and the 3.2 model card. qwen3: 2505.09388, table 1.
_GPT2 = dict(vocab_size=50_257, context_length=1024, norm="layer", position="learned", ffn="gelu", bias=True,
             tie_embeddings=True)
_LLAMA3 = dict(vocab_size=128_256, context_length=131_072, rope_theta=500_000.0, rope_scaling="llama3", n_kv_heads=8)
_QWEN3 = dict(vocab_size=151_936, context_length=40_960, rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True,
              head_dim=128, n_kv_heads=8)
PRESETS = {
    "gpt2": _GPT2 | dict(d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": _GPT2 | dict(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": _GPT2 | dict(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": _GPT2 | dict(d_model=1600, n_layers=48, n_heads=25),
    "llama-2-7b": dict(vocab_size=32_000, context_length=4096, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008),
    "llama-3.2-1b": _LLAMA3
    | dict(d_model=2048, n_layers=16, n_heads=32, d_ff=8192, rope_factor=32.0, tie_embeddings=True),
    "llama-3.1-8b": _LLAMA3 | dict(d_model=4096, n_layers=32, n_heads=32, d_ff=14_336, rope_factor=8.0),
    "qwen3-0.6b": _QWEN3 | dict(d_model=1024, n_layers=28, n_heads=16, d_ff=3072, tie_embeddings=True),
    "qwen3-1.7b": _QWEN3 | dict(d_model=2048, n_layers=28, n_heads=16, d_ff=6144, tie_embeddings=True),
    "qwen3-4b": _QWEN3 | dict(d_model=2560, n_layers=36, n_heads=32, d_ff=9728, tie_embeddings=True),
    "qwen3-8b": _QWEN3 | dict(d_model=4096, n_layers=36, n_heads=32, d_ff=12_288),
    "small": dict(d_model=768, d_ff=3072, n_layers=12, n_heads=12),
    "medium": dict(d_model=1024, d_ff=4096, n_layers=24, n_heads=16),
    "large": dict(d_model=1280, d_ff=5120, n_layers=36, n_heads=20),
    "xl": dict(d_model=1600, d_ff=6400, n_layers=48, n_heads=25),
    "2.7b": dict(d_model=2560, d_ff=10_240, n_layers=32, n_heads=32),
    "10b": dict(d_model=4608, d_ff=12_288, n_layers=50, n_heads=36), }


def preset(name: str, **changes) -> ModelConfig:
    """The published shape of that name (PRESETS), with changes: preset("gpt2", context_length=512)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ModelConfig(**(PRESETS[name] | changes))


# --- functions ---

def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """exp(x) normalised to sum to 1 along `dim`; any shape, any size of numbers.

    The maximum is subtracted first: the ratio stays the same and exp() cannot overflow.
    """
    if not x.numel():
        return x                                                                # the maximum of nothing is an error
    exponentials = torch.exp(x - x.amax(dim=dim, keepdim=True))
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise (Hendrycks & Gimpel 2016, 1606.08415)."""
    return x * torch.sigmoid(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Φ(x) by the tanh formula that GPT-2 was trained with (1606.08415, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)² (Primer, 2109.08668)."""
    return torch.relu(x).square()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits)[target] in nats, a scalar in float32 (float64 for float64 logits).

    logits: (..., V), any float dtype. targets: (...), integer ids. Raises ValueError when the shapes differ.
    """
    return token_cross_entropy(logits, targets).mean()


def token_cross_entropy(logits, targets):
    """-log softmax(logits)[target] of every position, (...)."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}; "
                         "they need one id for every row of logits")
    return fast(CrossEntropy, simple_cross_entropy, logits, targets.long())


def simple_cross_entropy(logits, targets):
    """logsumexp(logits) - logits[target]: a probability is never formed, and its logarithm never overflows."""
    logits = wide(logits)
    return logits.logsumexp(dim=-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v (1706.03762, eq. 1).

    q: (..., Tq, D). k: (..., Tk, D). v: (..., Tk, Dv). mask: boolean, broadcastable to (..., Tq, Tk), True = may
    attend. Returns (..., Tq, Dv). A query that may attend to nothing gets zeros, not NaN.
    """
    scores = wide(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))            # (..., Tq, Tk)
    if mask is None:
        return softmax(scores, dim=-1).to(v.dtype) @ v
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~mask, 0.0).to(v.dtype) @ v


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32 (1910.07467, eq. 4)."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


def swiglu(gate, up):
    """silu(gate) * up (2002.05202, eq. 5)."""
    return silu(gate) * up


def rotate(x, cos, sin, interleaved: bool = False):
    """Turn each pair of numbers of x (..., D) by its angle; cos, sin: (..., D/2), broadcastable to x.

    A pair is (x[i], x[i + D/2]) as in GPT-NeoX, Llama on Hugging Face and Qwen, or (x[2i], x[2i+1]) as in the paper
    when interleaved: two different models with the same shapes.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


# --- the same with their gradients written out ---
# Autograd keeps and allocates an intermediate for every operation, and fresh memory is what a CPU is slow at.

def lowered(x):
    """x in the dtype that autocast wants for matrix products: cast once here instead of once a product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# --- layers ---

def truncated_normal(shape, std: float) -> torch.Tensor:
    """N(0, std²) cut at three standard deviations."""
    return nn.init.trunc_normal_(torch.empty(shape), mean=0.0, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Module):
    """x @ weightᵀ, plus a bias if asked. weight: (d_out, d_in), from N(0, 2 / (d_in + d_out)) (Glorot & Bengio 2010).
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((d_out, d_in), std=math.sqrt(2 / (d_in + d_out))))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):                                                       # (..., d_in) -> (..., d_out)
        y = product(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(nn.Module):
    """A row of a table for every id. weight: (vocab_size, d_model), from N(0, 1)."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((vocab_size, d_model), std=1.0))

    def forward(self, tokens):                                                  # (...) -> (..., C)
        # weight[tokens], but a negative id is an error and not a row from the end.
        return self.weight.index_select(0, tokens.reshape(-1)).view(*tokens.shape, self.weight.shape[1])


class RMSNorm(nn.Module):
    """See rms_norm: float32 inside, the dtype that came in outside. weight: (d_model,), ones."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        return fast(FastRMSNorm, rms_norm, x, self.weight, self.eps)


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


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config asks for, over the residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.d_model, config.norm_eps, config.bias)
    return RMSNorm(config.d_model, config.norm_eps) if config.norm == "rms" else nn.Identity()


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 is the gate, w3 the way up, w2 the way down (2002.05202, eq. 6)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff, bias), Linear(d_ff, d_model, bias)
        self.w3 = Linear(d_model, d_ff, bias)

    def forward(self, x):
        x = lowered(x)
        return self.w2(fast(FastSwiGLU, swiglu, self.w1(x), self.w3(x)))


class MLP(nn.Module):
    """w2(f(w1 x)) with f = silu, gelu or relu2: two matrices where SwiGLU has three."""

    def __init__(self, d_model: int, d_ff: int, kind: str, bias: bool = False):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff, bias), Linear(d_ff, d_model, bias)
        self.activation = {"silu": silu, "gelu": gelu, "relu2": relu2}[kind]

    def forward(self, x):
        return self.w2(self.activation(self.w1(lowered(x))))


def feed_forward(config: ModelConfig, d_ff: int) -> nn.Module:
    layer = SwiGLU(config.d_model, d_ff, config.bias) if config.ffn == "swiglu" else \
        MLP(config.d_model, d_ff, config.ffn, config.bias)
    if config.zero_init:
        nn.init.zeros_(layer.w2.weight)
    return layer


class MixtureOfExperts(nn.Module):
    """Of E feed-forward experts, each token goes through its best few, weighted by the router (2401.04088, section
    2.1).

    No token is dropped and none is padded: tokens are sorted by expert, and each expert gets its own in one piece.
    balance=loss: softmax scores. balance=bias: sigmoid scores; a bias per expert joins them for the choice only, not
    for the weights (2408.15664, eq. 3; 2412.19437, eq. 16).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_chosen, self.by_bias = config.n_experts_per_token, config.balance == "bias"
        self.router = Linear(config.d_model, config.n_experts)
        self.experts = nn.ModuleList(feed_forward(config, config.d_ff_expert) for _ in range(config.n_experts))
        if config.n_shared_experts:
            self.shared = feed_forward(config, config.n_shared_experts * config.d_ff_expert)
        if self.by_bias:
            self.register_buffer("expert_bias", torch.zeros(config.n_experts))
        # How many tokens each expert got in training since the last balance_experts(), over all micro-batches.
        self.register_buffer("tokens_per_expert", torch.zeros(config.n_experts, dtype=torch.long), persistent=False)

    def forward(self, x, plan=None):
        flat = lowered(x.reshape(-1, x.shape[-1]))                              # (N, C)
        logits = wide(self.router(flat))                                        # (N, E)
        scores = torch.sigmoid(logits) if self.by_bias else softmax(logits, dim=-1)
        ranked = scores + self.expert_bias if self.by_bias else scores
        chosen = ranked.topk(self.n_chosen, dim=-1).indices                     # (N, n_chosen)
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=scores.shape[-1])
        if self.training:
            self.tokens_per_expert += counts
            if plan is not None:
                plan.balance.append(balance_loss(scores, counts))
        order = chosen.flatten().argsort(stable=True)                           # all of expert 0's, then all of 1's, …
        # An expert without tokens still runs, on no rows: its gradient is 0 rather than missing on one of many ranks.
        parts = flat[order // self.n_chosen].split(counts.tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        y = y[order.argsort()].view(len(flat), self.n_chosen, -1)               # back to the tokens' order
        y = (y * weights.unsqueeze(-1)).sum(dim=1).to(y.dtype)
        return (y + self.shared(flat) if hasattr(self, "shared") else y).view(x.shape)

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Move each expert's bias by `rate` towards an equal load, by the sign of its error (2408.15664, algorithm
        1).
        """
        counts = self.tokens_per_expert
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if self.by_bias:
            load = counts.to(self.expert_bias.dtype)
            self.expert_bias += rate * torch.sign(load.mean() - load)
        counts.zero_()


def balance_loss(scores, counts):
    """E Σ_e f_e P_e with f_e the share of tokens sent to e and P_e its mean score (2101.03961, eq. 4-6).

    scores: (N, E). counts: (E,). With several experts a token, f sums to that number, as in Mixtral: so does the
    least loss.
    """
    return scores.shape[-1] * (counts / len(scores) * scores.mean(dim=0)).sum()


# --- positions ---

def rope_tables(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0, config: ModelConfig | None = None):
    """(cos, sin) of positions x frequencies, each (..., T, D/2) in float32.

    Frequency i is theta^(-2i/D) for i = 0 … D/2 - 1 (2104.09864, section 3.2.2), stretched as the config's
    rope_scaling says.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta ** -exponents
    if config is not None and config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    if config is not None and config.rope_scaling == "llama3":
        # Turns over the original context: few turns are stretched, many stay, between the two a straight line.
        turns = config.rope_original_context * frequencies / (2 * math.pi)
        kept = ((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / config.rope_factor
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def rope(x, positions, theta: float = 10_000.0, interleaved: bool = False):
    """x with rotary position embedding: the product of a query and a key then depends on their distance only.

    x: (..., T, D), D even. positions: (T,), or (B, T) for x of (B, H, T, D) or (B, T, D), the same for all heads.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rope needs an even last dimension, it is {x.shape[-1]}")
    cos, sin = rope_tables(positions, x.shape[-1], theta)
    while 1 < positions.dim() and cos.dim() < x.dim():                          # (B, T, D/2) -> (B, 1, T, D/2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(x, cos, sin, interleaved)


def sinusoids(positions, d_model: int):
    """sin and cos of position / 10000^(2i/C), side by side in each pair (1706.03762, section 3.5). (..., T, C)."""
    cos, sin = rope_tables(positions, d_model)
    return torch.stack((sin, cos), dim=-1).flatten(-2)


# --- cache ---

class KVCache:
    """Keys and values of the positions seen so far, preallocated for every layer.

    Rows may hold different numbers of positions, so that a batch of ragged prompts, padded on the right, decodes each
    as if alone: see `set_lengths`. A full layer keeps position p in slot p. A sliding layer keeps the last window and
    what came in since, and now and then moves the window to the front: memory stays near two windows however long the
    text. MLA keeps its latent in place of keys and its rotary key in place of values, one "head" each (2405.04434,
    2.1.2).
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device, dtype,
                 windows: tuple | None = None, spare: int = 0):
        mla = config.attention == "mla"
        heads = 1 if mla else config.n_kv_heads
        self.widths = (config.kv_lora_rank, config.rope_head_dim) if mla else (config.head_dim, config.head_dim)
        self.windows = config.windows if windows is None else windows
        self.max_length, self.batch_size, self.spare = max_length, batch_size, spare
        slots = [max_length if window is None else min(max_length, 2 * window + spare) for window in self.windows]
        # Zeros, not empty memory: a slot not yet filled is masked out, but 0 times NaN would be NaN.
        self.k, self.v = ([torch.zeros(batch_size, heads, n, width, device=device, dtype=dtype) for n in slots]
                          for width in self.widths)
        self.starts = [0] * len(slots)             # the position in slot 0 of each layer
        self.ids = None                            # (batch_size, max_length), for `before`
        if config.smear and windows is None:
            self.ids = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
        self.device = torch.device(device)
        self._rows = [0] * batch_size              # positions held by each row
        self._alone = {}                           # the same for layers that are called one by one
        self._count()

    def _count(self) -> None:
        self.length, self.shortest = max(self._rows), min(self._rows)
        same = self.length == self.shortest
        self.lengths = None if same else torch.tensor(self._rows, device=self.device)

    @property
    def n_bytes(self) -> int:
        """Bytes of memory it takes."""
        return sum(t.numel() * t.element_size() for t in [*self.k, *self.v, *([] if self.ids is None else [self.ids])])

    @property
    def bytes_read(self) -> int:
        """Bytes of keys and values that one more token of every row reads: a sliding layer's last window only."""
        return sum(t[:, :, :min(self.length, window or self.length)].numel() * t.element_size()
                   for stores in (self.k, self.v) for t, window in zip(stores, self.windows))

    def set_lengths(self, lengths) -> None:
        """Say how many positions of each row count; the rest will be overwritten. An int cuts all rows to that length.

        Raises ValueError for lengths past what a row holds, and for lengths so far back that a sliding layer has
        dropped positions they would see. The last call of the model can always be taken back.
        """
        lengths = [lengths] * self.batch_size if isinstance(lengths, int) else [int(n) for n in lengths]
        if len(lengths) != self.batch_size or not all(0 <= n <= held for n, held in zip(lengths, self._rows)):
            raise ValueError(f"lengths {lengths} do not fit a cache of {self.batch_size} rows that hold {self._rows} "
                             "positions; a row can only be cut")
        for window, start in zip(self.windows, self.starts):
            if window is not None and start > max(0, min(lengths) - window + 1):
                raise ValueError(f"cannot go back to {min(lengths)} positions: a layer with a window of {window} has "
                                 f"dropped those before {start}; start again from an empty cache")
        self._rows, self._alone = lengths, {}
        self._count()

    def positions(self, n_new: int) -> torch.Tensor:
        """Positions of the next n_new tokens: (T,), or (B, T) when the rows differ. Raises ValueError past the end."""
        if self.length + n_new > self.max_length:
            raise ValueError(
                f"{self.length} cached and {n_new} new tokens pass the cache's {self.max_length} positions; "
                "make it longer: new_cache(batch_size, max_length)")
        if self.lengths is None:
            return torch.arange(self.length, self.length + n_new, device=self.device)
        return self.lengths[:, None] + torch.arange(n_new, device=self.device)

    def first(self, window: int | None) -> int:
        """The first position that a layer of this window returns: what the next token of the shortest row still sees.
        """
        return 0 if window is None else max(0, self.shortest - window + 1)

    def append(self, layer: int, k, v, positions):
        """Store k and v (B, K, T, D) at `positions`; return all from first(window) on, (B, K, S, D) each."""
        end, low = self.length + k.shape[-2], self.first(self.windows[layer])
        if end - self.starts[layer] > self.k[layer].shape[2]:
            self._slide(layer, max(self.starts[layer], low - self.spare), end)
        start = self.starts[layer]
        held = self.k[layer], self.v[layer]
        if self.lengths is None:
            for store, new in zip(held, (k, v)):
                store[:, :, self.length - start:end - start] = new
        else:
            rows = torch.arange(self.batch_size, device=self.device)[:, None]
            for store, new in zip(held, (k, v)):
                store[rows, :, positions - start] = new.transpose(1, 2).to(store.dtype)
        return tuple(store[:, :, low - start:end - start] for store in held)

    def before(self, tokens, positions):
        """The ids one position before each of `tokens` (B, T), -1 before the first; keeps tokens for the next call."""
        positions = positions.expand_as(tokens)
        self.ids.scatter_(1, positions, tokens.to(self.ids.dtype))
        return self.ids.gather(1, (positions - 1).clamp(min=0)).masked_fill(positions == 0, -1)

    def _slide(self, layer: int, low: int, end: int) -> None:
        """Give a sliding layer room up to `end` and one window more, keeping positions from `low` on."""
        kept = slice(low - self.starts[layer], self.length - self.starts[layer])
        for stores in (self.k, self.v):
            old = stores[layer]
            stores[layer] = old.new_zeros(*old.shape[:2], end - low + self.windows[layer], old.shape[3])
            stores[layer][:, :, :self.length - low] = old[:, :, kept]
        self.starts[layer] = low

    def select(self, rows) -> None:
        """Keep these rows, in this order; a row named twice is copied, so that samples of one prompt share its
        prefill.
        """
        rows = torch.as_tensor(rows, device=self.device)
        self.k, self.v = [store[rows] for store in self.k], [store[rows] for store in self.v]
        self.ids = None if self.ids is None else self.ids[rows]
        self._rows = [self._rows[row] for row in rows.tolist()]
        self.batch_size = len(self._rows)
        self._count()

    def advance(self, n_new: int) -> None:
        """Count n_new tokens as cached, after every layer has stored them."""
        self._rows, self._alone = [n + n_new for n in self._rows], {}
        self._count()

    @contextlib.contextmanager
    def alone(self, layer: int, n_new: int):
        """Around a layer called by itself: it counts its own positions, and the cache those that all layers have."""
        shared, mine = self._rows, self._alone.get(layer, self._rows)
        self._rows = mine
        self._count()
        yield
        self._alone[layer] = [n + n_new for n in mine]
        every = [self._alone.get(i, shared) for i in range(len(self.k))]
        self._rows = [min(rows) for rows in zip(*every)]
        self._count()


class Plan:
    """What all layers of one forward share, made once: rotary tables and the mask of each window."""

    def __init__(self, config: ModelConfig, x, positions=None, cache=None, windows: tuple | None = None):
        T, device = x.shape[1], x.device
        if positions is None:
            positions = torch.arange(T, device=device) if cache is None else cache.positions(T)
        self.positions, self.balance = positions, []
        self.fresh = cache is None or not cache.length                          # nothing came before: a plain triangle
        self.cos = self.sin = None
        if config.position == "rope":
            width = config.rope_head_dim if config.attention == "mla" else config.head_dim
            tables = rope_tables(positions, width, config.rope_theta, config)
            self.cos, self.sin = (table.unsqueeze(-2) for table in tables)  # ([B,] T, 1, D/2): the same for all heads
        windows = set(config.windows if windows is None else windows)
        self.masks = {window: self.mask(window, T, cache, config.attention_backend) for window in windows}

    def mask(self, window, T: int, cache, backend: str):
        """([B, 1,] T, S), True = may attend; None where the triangle (fresh) or everything (one new token) is meant."""
        device = self.positions.device
        if self.fresh:
            if window is None or window >= T or backend == "triton":            # our kernel knows windows by itself
                return None
            keys = torch.arange(T, device=device)
            queries = keys.unsqueeze(-1)
        elif T == 1 and cache.lengths is None:
            return None
        else:
            keys = torch.arange(cache.first(window), cache.length + T, device=device)
            queries = self.positions.unsqueeze(-1)
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        return mask.unsqueeze(1) if mask.dim() == 3 else mask


# --- attention ---

class Layer(nn.Module):
    """Attention, or a block with it: what looks at other positions. The window is the config's for this layer."""

    def __init__(self, config: ModelConfig, layer: int = 0, window: int | None | str = "config"):
        super().__init__()
        self.config, self.layer = config, layer
        self.window = config.windows[layer] if window == "config" else window

    def forward(self, x, positions=None, cache=None, plan=None):
        """x: (B, T, C) -> (B, T, C). positions: (T,) or (B, T), counted on from the cache when not given.

        plan: what the layers share, when the caller has it already; Transformer makes it once for all layers.
        """
        if plan is not None:
            return self.run(x, cache, plan)
        with contextlib.nullcontext() if cache is None else cache.alone(self.layer, x.shape[1]):
            return self.run(x, cache, Plan(self.config, x, positions, cache, (self.window,)))


def attend(config: ModelConfig, q, k, v, mask, causal: bool, window: int | None):
    """The chosen backend. q: (B, H, T, D), k and v: (B, K, S, D), each key head serving H / K query heads in a row.

    causal: the plain triangle, T = S. mask: None, or boolean; then causal is False. window counts for triton only: the
    others find it in the mask. One token after a cached past goes through sdpa there: it has no tiles to save.
    """
    (B, H, T, D), K = q.shape, k.shape[1]
    if k.dtype != q.dtype:                                                      # a cache kept in another dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
    if config.attention_backend == "triton" and causal:
        from kernels import flash_attention      # here: Triton is not on every platform
        return flash_attention(q, k, v, True, window)
    if H != K and T == 1 and mask is None:  # one query a head: the group becomes time
        return attend(config, q.view(B, K, H // K, D), k, v, None, False, None).view(B, H, 1, -1)
    short_bf16 = q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= SHORT_CONTEXT
    if config.attention_backend == "sdpa" and causal and short_bf16:
        return short_attention(q, k, v)
    if config.attention_backend != "naive":
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=H != K)
    if H != K:
        k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
    if causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return attention(q, k, v, mask)


class Attention(Layer):
    """Causal self-attention, H query heads over K key/value heads."""

    def __init__(self, config: ModelConfig, layer: int = 0, window: int | None | str = "config"):
        super().__init__(config, layer, window)
        c, bias = config, config.bias or config.qkv_bias
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, bias)
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, c.bias)
        if c.zero_init:
            nn.init.zeros_(self.o_proj.weight)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)

    def run(self, x, cache, plan):
        c, (B, T, C) = self.config, x.shape
        x = lowered(x)
        q = self.q_proj(x).view(B, T, c.n_heads, c.head_dim)  # heads last but one: contiguous for norm and RoPE
        k = self.k_proj(x).view(B, T, c.n_kv_heads, c.head_dim)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.position == "rope":
            q, k = (fast(FastRotate, rotate, t, plan.cos, plan.sin, c.rope_interleaved) for t in (q, k))
        q, k = q.transpose(1, 2), k.transpose(1, 2)                             # (B, H, T, D)
        if cache is not None:
            stored = cache.append(self.layer, k, v, plan.positions)
            k, v = (k, v) if plan.fresh else stored
        mask = plan.masks[self.window]
        y = attend(c, q, k, v, mask, plan.fresh and mask is None, self.window)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, c.n_heads * c.head_dim))


class LatentAttention(Layer):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1 and appendix C).

    Keys and values are grown from one narrow latent, which alone is cached; a further key, shared by all heads, carries
    RoPE, since a rotated latent could no longer be grown afterwards.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, window: int | None | str = "config"):
        super().__init__(config, layer, window)
        c = config
        q_width = c.d_model if c.q_lora_rank is None else c.q_lora_rank
        queries = c.n_heads * (c.head_dim + c.rope_head_dim)
        if c.q_lora_rank is not None:
            self.q_down_proj, self.q_norm = Linear(c.d_model, q_width, c.bias), RMSNorm(q_width, c.norm_eps)
        self.q_proj = Linear(q_width, queries)
        self.kv_down_proj = Linear(c.d_model, c.kv_lora_rank + c.rope_head_dim, c.bias)
        self.kv_norm = RMSNorm(c.kv_lora_rank, c.norm_eps)
        self.kv_up_proj = Linear(c.kv_lora_rank, c.n_heads * 2 * c.head_dim)    # for each head its key, then its value
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, c.bias)
        if c.zero_init:
            nn.init.zeros_(self.o_proj.weight)

    def run(self, x, cache, plan):
        c, (B, T, C) = self.config, x.shape
        D, R, P = c.head_dim, c.kv_lora_rank, c.rope_head_dim
        x = lowered(x)
        q = self.q_proj(x if c.q_lora_rank is None else self.q_norm(self.q_down_proj(x))).view(B, T, c.n_heads, D + P)
        latent, k_rope = self.kv_down_proj(x).unsqueeze(2).split((R, P), dim=-1)  # (B, T, 1, R), (B, T, 1, P)
        latent = self.kv_norm(latent).transpose(1, 2)                                              # (B, 1, T, R)
        q, q_rope = q.split((D, P), dim=-1)
        q_rope, k_rope = (fast(FastRotate, rotate, t, plan.cos, plan.sin, c.rope_interleaved).transpose(1, 2)
                          for t in (q_rope, k_rope))
        q = q.transpose(1, 2)                                                                      # (B, H, T, D)
        if cache is not None:
            stored = cache.append(self.layer, latent, k_rope, plan.positions)
            latent, k_rope = (latent, k_rope) if plan.fresh else stored
        mask = plan.masks[self.window]
        causal = plan.fresh and mask is None
        if plan.fresh:
            # In training, growing keys and values is cheaper than attending in the wide latent.
            k, v = self.kv_up_proj(latent.squeeze(1)).view(B, -1, c.n_heads, 2 * D).transpose(1, 2).chunk(2, dim=-1)
            k = torch.cat((k, k_rope.expand(-1, c.n_heads, -1, -1)), dim=-1)
            # Fused attention wants one width for keys and values: zeros beside the values, cut off again.
            v = v if c.attention_backend == "naive" else nn.functional.pad(v, (0, P))
            y = attend(c, torch.cat((q, q_rope), dim=-1), k, v, mask, causal, None)[..., :D]       # (B, H, T, D)
        else:
            # After a past, never grow it again: q·(U c) = (Uᵀq)·c, so the query moves into the latent instead.
            up_k, up_v = self.kv_up_proj.weight.to(q.dtype).view(c.n_heads, 2 * D, R).chunk(2, dim=1)  # (H, D, R) each
            q = torch.cat((q @ up_k, q_rope), dim=-1) * math.sqrt((R + P) / (D + P))  # the scale is still √(D+P)
            y = attend(c, q, torch.cat((latent, k_rope), dim=-1), latent, mask, causal, None) @ up_v.transpose(1, 2)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, c.n_heads * D))


# --- the model ---

class Block(Layer):
    """x + attn(ln1(x)), then x + ffn(ln2(x)): pre-norm leaves the residual stream untouched end to end (2002.04745).

    Post-norm, the original: ln1(x + attn(x)), then ln2(x + ffn(x)).
    """

    def __init__(self, config: ModelConfig, layer: int = 0, window: int | None | str = "config"):
        super().__init__(config, layer, window)
        self.ln1, self.ln2 = make_norm(config), make_norm(config)
        self.attn = (LatentAttention if config.attention == "mla" else Attention)(config, layer, window)
        self.ffn = MixtureOfExperts(config) if config.n_experts else feed_forward(config, config.d_ff)
        self.post = config.norm_position == "post"

    def run(self, x, cache, plan):
        if self.post:
            x = self.ln1(x + self.attn(x, None, cache, plan))
            return self.ln2(x + self.feed(x, plan))
        x = x + self.attn(self.ln1(x), None, cache, plan)
        return x + self.feed(self.ln2(x), plan)

    def feed(self, x, plan):
        return self.ffn(x, plan) if isinstance(self.ffn, MixtureOfExperts) else self.ffn(x)


class FutureToken(nn.Module):
    """One depth of multi-token prediction: from a hidden state and the next token, the hidden state one further.

    block(M [norm(h_i), norm(embedding of token i+1)]), read by the model's own final norm and head (2412.19437, eq.
    21-24).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_norm, self.token_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.proj = Linear(2 * config.d_model, config.d_model)
        self.block = Block(config, window=None)

    def forward(self, hidden, embedded, cache=None, plan=None):
        both = torch.cat((self.hidden_norm(hidden), self.token_norm(embedded)), dim=-1)
        return self.block(self.proj(lowered(both)).to(hidden.dtype), None, cache, plan)


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, V); with targets (B, T) also the mean loss in nats."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        if config.smear:
            self.smear_gate = nn.Parameter(torch.zeros(config.d_model))
        if config.position == "learned":
            self.position_embeddings = Embedding(config.context_length, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_final = nn.Identity() if config.norm_position == "post" else make_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            # One matrix in two places: N(0, 1) rows would give logits of size sqrt(C), so the head's smaller scale
            # rules.
            self.token_embeddings.weight = self.lm_head.weight
        if config.mtp_depth:
            self.mtp = nn.ModuleList(FutureToken(config) for _ in range(config.mtp_depth))
        self.losses = {}             # the parts of the last training loss, without gradient

    def forward(self, tokens, targets=None, cache=None):
        """tokens: (B, T) ids; targets: (B, T) ids, the same sequence one step on.

        Returns logits (B, T, V), or (logits, loss); with fused_loss in training (None, loss). With a cache, tokens
        follow what it holds and are added to it, and the logits are those of the given tokens. Raises ValueError for a
        sequence longer than the context.
        """
        plan = self.plan(tokens, cache)
        x = self.hidden(tokens, cache, plan)
        if targets is None:
            return self.head(x)
        logits, loss = self.head_loss(x, targets)
        return logits, self.training_loss(loss, x, targets, plan) if self.training else loss

    def plan(self, tokens, cache=None) -> Plan:
        if tokens.dim() != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} must be (B, T): for one sequence add tokens[None]")
        c, T, past = self.config, tokens.shape[-1], cache.length if cache else 0
        limit = cache.max_length if cache else c.context_length
        if c.position == "learned":
            limit = min(limit, c.context_length)                                # there is no row for a later position
        if past + T > limit:
            raise ValueError(
                f"{past + T} tokens ({past} cached) pass the {'cache' if cache else 'context'} of {limit}; "
                "give fewer, or a model or cache with room for more")
        return Plan(c, tokens, None, cache)

    def hidden(self, tokens, cache=None, plan=None):
        """The residual stream after the last block, (B, T, C): what `head` turns into logits and `draft` continues."""
        plan = plan or self.plan(tokens, cache)
        x = self.token_embeddings(tokens)                                       # (B, T, C)
        if self.config.smear:
            x = self.smeared(x, tokens, cache, plan)
        if self.config.position == "learned":
            x = x + self.position_embeddings(plan.positions)
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(plan.positions, self.config.d_model).to(x.dtype)
        for block in self.layers:
            x = block(x, None, cache, plan)
        if cache is not None:
            cache.advance(tokens.shape[-1])
        return x

    def smeared(self, x, tokens, cache, plan):
        """x_t + sigmoid(g) ∘ x_(t-1), x the embeddings (B, T, C): the first layer then sees pairs of tokens, for which
        attention would need a layer.
        """
        if cache is None:
            before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            ids = cache.before(tokens, plan.positions)
            before = self.token_embeddings(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)
        return x + torch.sigmoid(self.smear_gate).to(x.dtype) * before

    def head(self, x):
        """Logits (B, T, V) of a residual stream (B, T, C)."""
        logits, cap = self.lm_head(lowered(self.ln_final(x))), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head_loss(self, x, targets):
        """(logits, their mean cross entropy) of a residual stream; with fused_loss in training (None, the same)."""
        if self.config.fused_loss and self.training:
            from kernels import linear_cross_entropy
            return None, linear_cross_entropy(lowered(self.ln_final(x)), self.lm_head.weight, targets)
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)

    def training_loss(self, loss, x, targets, plan):
        """`loss`, the cross entropy, and the weighted losses of the switches that have one; each noted in
        self.losses.
        """
        c, parts, T = self.config, {"cross_entropy": loss}, targets.shape[-1]
        if c.mtp_depth:
            depths = []
            for k, future in enumerate(self.mtp, start=1):
                # x[:, i] has seen tokens up to i; with token i+k = targets[i+k-1] it predicts targets[i+k].
                x = future(x[:, :T - k], self.token_embeddings(targets[:, k - 1:T - 1]))
                depths.append(self.head_loss(x, targets[:, k:])[1])
            parts["mtp"] = sum(depths) / c.mtp_depth                            # eq. 25
            loss = loss + c.mtp_weight * parts["mtp"]
        if c.n_experts and c.balance == "loss":
            # The mean over layers, each judged alone: a sum over all would let one layer's favourite hide another's.
            parts["balance"] = sum(plan.balance) / len(plan.balance)
            loss = loss + c.balance_weight * parts["balance"]
        self.losses = {name: part.detach() for name, part in parts.items()}
        return loss

    def draft(self, hidden, next_tokens, cache=None):
        """Logits (B, T, V) for the token after `next_tokens` (B, T), by the first extra head: a draft for sampling.

        hidden: (B, T, C), from `hidden`, at the positions before next_tokens. cache: new_cache(…, draft=True), or none.
        Raises ValueError for a model without mtp_depth.
        """
        if not self.config.mtp_depth:
            raise ValueError(
                "mtp_depth=0: this model has no head for a further token; train one with mtp_depth of 1 or more")
        return self.head(self.mtp[0](hidden, self.token_embeddings(next_tokens), cache))

    def new_cache(self, batch_size: int, max_length: int | None = None, draft: bool = False,
                  spare: int = 0) -> KVCache:
        """An empty cache for batch_size rows of up to max_length tokens (the context length when not given).

        draft: for `draft` instead of the model itself. spare: tokens before the last call that can be taken back too.
        """
        weight = self.token_embeddings.weight
        return KVCache(self.config, batch_size, max_length or self.config.context_length, weight.device, weight.dtype,
                       (None,) if draft else None, spare)

    def experts(self) -> list:
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def tokens_per_expert(self) -> torch.Tensor:
        """(layers, E): tokens each expert got in training since balance_experts() was last called."""
        return torch.stack([layer.tokens_per_expert for layer in self.experts()])

    def balance_experts(self) -> None:
        """After an optimizer step: move the routers' biases (balance=bias) and count anew. Nothing without experts.

        Collective when torch.distributed is initialised: the counts of all ranks are summed.
        """
        for layer in self.experts():
            layer.rebalance(self.config.balance_rate)


# --- evaluation ---

@torch.inference_mode()
def token_losses(model, tokens, stride: int | None = None, batch_size: int = 16) -> torch.Tensor:
    """-log p in nats of tokens 1 … n-1, each predicted once, (n-1,) float32 on the CPU.

    tokens: (n,) ids, a tensor or a NumPy array (memory-mapped is fine). Windows of the context length move on by
    `stride` (half a context when not given) and only their last `stride` predictions count: so every token but those
    of the first window has at least context_length - stride tokens before it, where windows side by side
    would ask for the first token of each from nothing.
    """
    context = model.config.context_length
    stride = stride or max(1, context // 2)
    if len(tokens) < 2 or not 1 <= stride <= context:
        raise ValueError(
            f"{len(tokens)} tokens and stride {stride}: needs at least 2 tokens and a stride of 1 to {context}")
    if isinstance(tokens, (list, tuple)):
        tokens = torch.tensor(tokens)
    device, last = next(model.parameters()).device, len(tokens) - 1
    losses = torch.empty(last)
    # A window starting at s predicts s+1 … s+context; the last one is moved back so that it is whole as well.
    starts = list(range(0, max(last - context, 0), stride)) + [max(last - context, 0)]
    length = min(context, last)
    for i in range(0, len(starts), batch_size):
        group = starts[i:i + batch_size]
        windows = torch.stack([torch.as_tensor(tokens[s:s + length + 1].astype("int64") if hasattr(tokens, "astype")
                                               else tokens[s:s + length + 1].long()) for s in group]).to(device)
        logits = model(windows[:, :-1])
        each = token_cross_entropy(logits, windows[:, 1:]).float().cpu()
        for s, row in zip(group, each):
            fresh = 0 if s == 0 else length - stride
            losses[s + fresh:s + length] = row[fresh:]
    return losses


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats per token; inf where that is more than a float can be."""
    return math.inf if loss > 700 else math.exp(loss)


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """A mean loss in nats per token as bits per byte of the text: comparable between tokenizers, which the loss is not.

    >>> round(bits_per_byte(math.log(2), n_tokens=100, n_bytes=400), 6)
    0.25
    """
    return loss / math.log(2) * n_tokens / n_bytes
