"""A Transformer language model from `nn.Parameter` up: pre-norm, RMSNorm, RoPE, SwiGLU, causal attention with a KV cache.

Token ids go in, logits come out. Everything between is on this page, bottom up: softmax, cross entropy, linear,
embedding, norm, feed-forward, rotary positions, attention, block, model.

Shape letters, used in every comment below:
    B batch   T time (query positions)   S source (key positions)   C d_model   H heads   K key/value heads
    D head_dim = C / H                   F d_ff                     V vocab

Papers: Vaswani 2017 (1706.03762), Radford 2019 (GPT-2), Zhang & Sennrich 2019 (RMSNorm, 1910.07467), Shazeer 2020
(SwiGLU, 2002.05202), Su 2021 (RoPE, 2104.09864), Ainslie 2023 (GQA, 2305.13245), Henry 2020 (QK-norm, 2010.04245).
"""
import math
from dataclasses import dataclass

import torch
from torch import nn


# --- configuration ---

@dataclass
class ModelConfig:
    """The shape of a model. Its defaults are the course's plain model; config files choose more."""
    vocab_size: int = 10_000         # rows of the embedding and of the head
    context_length: int = 256        # longest sequence the model is trained on, tokens
    d_model: int = 512               # width of the residual stream
    n_layers: int = 4                # blocks
    n_heads: int = 16                # query heads; head_dim = d_model / n_heads
    n_kv_heads: int | None = None    # key/value heads: none = n_heads (MHA), fewer = GQA (2305.13245), 1 = MQA
    d_ff: int | None = None          # width of the feed-forward layer; none = 8/3 d_model to the nearest multiple of 64
    rope_theta: float = 10_000.0     # base of the rotary frequencies
    norm_eps: float = 1e-5           # inside RMSNorm's root
    qk_norm: bool = False            # RMSNorm over each head's query and key (2010.04245, 2302.05442)
    tie_embeddings: bool = False     # the head is the embedding matrix (1608.05859)
    zero_init: bool = False          # each block's last matrices start at 0, so that the model starts as the identity
    logit_softcap: float | None = None      # logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118)
    attention_backend: str = "sdpa"  # naive (ours, to read) | sdpa (torch's fused one)

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.d_ff is None:
            self.d_ff = max(64, round(8 / 3 * self.d_model / 64) * 64)
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = d_model / n_heads = {self.head_dim} must be even: RoPE turns pairs of numbers")
        if self.attention_backend not in ("naive", "sdpa"):
            raise ValueError(f"attention_backend={self.attention_backend!r} must be naive or sdpa")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


# --- functions ---

def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """exp(x) normalised to sum to 1 along `dim`; any shape, any size of numbers.

    The maximum is subtracted first: the ratio stays the same and exp() cannot overflow.
    """
    exponentials = torch.exp(x - x.amax(dim=dim, keepdim=True))
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise (Hendrycks & Gimpel 2016, 1606.08415)."""
    return x * torch.sigmoid(x)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits)[target] in nats, as a float32 scalar.

    logits: (..., V), any float dtype. targets: (...), ids. Computed as logsumexp(logits) - logits[target], so that a
    probability is never formed and its logarithm never overflows.
    """
    return CrossEntropy.apply(logits, targets).mean()


class CrossEntropy(torch.autograd.Function):
    """Loss per position, (...), with its gradient softmax(logits) - onehot(target) written out.

    Autograd would keep several float32 copies of the largest tensor of the whole model; this keeps the logits and one
    number a row, and is about twice as fast on a CPU.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        maximum = logits.amax(dim=-1, keepdim=True).float()
        log_sum = maximum + (logits.float() - maximum).exp_().sum(dim=-1, keepdim=True).log()      # (..., 1)
        ctx.save_for_backward(logits, targets, log_sum)
        return (log_sum - logits.gather(-1, targets.unsqueeze(-1)).float()).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, targets, log_sum = ctx.saved_tensors
        dlogits = (logits.float() - log_sum).exp_()                                                # softmax, (..., V)
        dlogits.scatter_add_(-1, targets.unsqueeze(-1), torch.full_like(log_sum, -1.0))
        return dlogits.mul_(grad.unsqueeze(-1)).to(logits.dtype), None


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v (1706.03762, eq. 1).

    q: (..., Tq, D). k: (..., Tk, D). v: (..., Tk, Dv). mask: boolean, broadcastable to (..., Tq, Tk), True = may attend.
    Returns (..., Tq, Dv). A query that may attend to nothing gets zeros, not NaN.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                   # (..., Tq, Tk)
    if mask is None:
        return softmax(scores.float(), dim=-1).to(v.dtype) @ v
    weights = softmax(scores.float().masked_fill(~mask, torch.finfo(torch.float32).min), dim=-1)
    return weights.masked_fill(~mask, 0.0).to(v.dtype) @ v


# --- layers ---

def truncated_normal(shape, std: float) -> torch.Tensor:
    """N(0, std²) cut at three standard deviations."""
    return nn.init.trunc_normal_(torch.empty(shape), mean=0.0, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Module):
    """x @ weightᵀ, without bias. weight: (d_out, d_in), from N(0, 2 / (d_in + d_out)) (Glorot & Bengio 2010)."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((d_out, d_in), std=math.sqrt(2 / (d_in + d_out))))

    def forward(self, x):                                                       # (..., d_in) -> (..., d_out)
        return x @ self.weight.T


class Embedding(nn.Module):
    """A row of a table for every id. weight: (vocab_size, d_model), from N(0, 1)."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((vocab_size, d_model), std=1.0))

    def forward(self, tokens):                                                  # (...) -> (..., C)
        return self.weight[tokens]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (1910.07467, eq. 4).

    In float32 inside whatever comes in: in bfloat16 the sum of a thousand squares keeps two digits.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 is the gate, w3 the way up, w2 the way down (2002.05202, eq. 6)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(d_model, d_ff), Linear(d_ff, d_model), Linear(d_model, d_ff)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


# --- positions ---

def rope_tables(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0):
    """(cos, sin) of positions x frequencies, each (..., T, D/2) in float32.

    Frequency i is theta^(-2i/D) for i = 0 … D/2 - 1 (2104.09864, section 3.2.2).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.unsqueeze(-1).float() * theta ** -exponents
    return angles.cos(), angles.sin()


def rotate(x, cos, sin, interleaved: bool = False):
    """Turn each pair of numbers of x (..., T, D) by its angle; cos, sin: (..., T, D/2).

    A pair is (x[i], x[i + D/2]) as in GPT-NeoX, Llama on Hugging Face and Qwen, or (x[2i], x[2i+1]) as in the paper when
    interleaved: two different models with the same shapes.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


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


# --- cache ---

class KVCache:
    """Keys and values of the positions seen so far, preallocated for every layer.

    lengths: (B,) positions filled in each row; row b's position p lies in slot p. Rows may differ, so that a batch of
    ragged prompts, padded on the right, decodes each as if alone: see `set_lengths`.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device, dtype):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length, self.length = max_length, 0
        self.lengths = None                        # only when rows differ: then `length` is the longest

    def set_lengths(self, lengths) -> None:
        """Say how many positions of each row count; the rest will be overwritten. An int cuts all rows to that length."""
        lengths = [lengths] * self.k.shape[1] if isinstance(lengths, int) else [int(n) for n in lengths]
        if len(lengths) != self.k.shape[1] or not all(0 <= n <= self.max_length for n in lengths):
            raise ValueError(f"lengths {lengths} do not fit a cache of {self.k.shape[1]} rows and {self.max_length} positions")
        self.length = max(lengths)
        same = min(lengths) == self.length
        self.lengths = None if same else torch.tensor(lengths, device=self.k.device)

    def positions(self, n_new: int) -> torch.Tensor:
        """Positions of the next n_new tokens: (T,), or (B, T) when the rows differ. Raises ValueError past the end."""
        if self.length + n_new > self.max_length:
            raise ValueError(f"{self.length} cached and {n_new} new tokens pass the cache's {self.max_length} positions; "
                             "make it longer: new_cache(batch_size, max_length)")
        new = torch.arange(n_new, device=self.k.device)
        return self.length + new if self.lengths is None else self.lengths[:, None] + new

    def append(self, layer: int, k, v, positions):
        """Store k and v (B, K, T, D) at `positions` and return all keys and values so far, (B, K, S, D)."""
        end = self.length + k.shape[-2]
        if self.lengths is None:
            self.k[layer, :, :, self.length:end] = k
            self.v[layer, :, :, self.length:end] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
            self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def select(self, rows) -> None:
        """Keep these rows, in this order; a row named twice is copied, so that samples of one prompt share its prefill."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        if self.lengths is not None:
            self.set_lengths(self.lengths[rows].tolist())

    def advance(self, n_new: int) -> None:
        """Count n_new tokens as cached, after every layer has stored them."""
        self.length += n_new
        if self.lengths is not None:
            self.lengths = self.lengths + n_new


# --- the model ---

class Attention(nn.Module):
    """Causal self-attention with rotary positions, H query heads over K key/value heads."""

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        c = config
        self.config, self.layer = c, layer
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim)
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model)
        if c.zero_init:
            nn.init.zeros_(self.o_proj.weight)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, positions=None, cache=None, tables=None):
        """x: (B, T, C) -> (B, T, C). positions: (T,) or (B, T), counted on from the cache when not given.

        tables: the (cos, sin) of the positions when the caller has them already; Transformer makes them once for all layers.
        """
        c, (B, T, C) = self.config, x.shape
        if positions is None:
            positions = cache.positions(T) if cache else torch.arange(T, device=x.device)
        cos, sin = tables or rope_tables(positions, c.head_dim, c.rope_theta)
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                       # (B, 1, T, D/2)
        q = self.q_proj(x).view(B, T, c.n_heads, c.head_dim).transpose(1, 2)    # (B, H, T, D)
        k = self.k_proj(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None and cache.length:
            # A query at position p sees the slots 0 … p; one new token alone sees all of them and needs no mask.
            k, v = cache.append(self.layer, k, v, positions)
            if T > 1 or cache.lengths is not None:
                mask = torch.arange(k.shape[-2], device=x.device) <= positions.unsqueeze(-1)    # ([B,] T, S)
                mask = mask if mask.dim() == 2 else mask.unsqueeze(1)
        elif cache is not None:
            cache.append(self.layer, k, v, positions)
        causal = cache is None or not cache.length
        y = self.attend(q, k, v, mask, causal and T > 1)                        # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))

    def attend(self, q, k, v, mask, causal: bool):
        """The chosen backend; both read `mask` and `causal` (the plain triangle) alike."""
        if k.dtype != q.dtype:                                                  # a cache kept in another dtype
            k, v = k.to(q.dtype), v.to(q.dtype)
        grouped = self.config.n_heads != self.config.n_kv_heads
        if self.config.attention_backend == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        if grouped:
            k, v = (t.repeat_interleave(self.config.n_heads // self.config.n_kv_heads, dim=1) for t in (k, v))
        if causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        return attention(q, k, v, mask)


class Block(nn.Module):
    """x + attn(ln1(x)), then x + ffn(ln2(x)): pre-norm, which leaves the residual stream untouched end to end."""

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.ln1, self.ln2 = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.attn = Attention(config, layer)
        self.ffn = SwiGLU(config.d_model, config.d_ff)
        if config.zero_init:
            nn.init.zeros_(self.ffn.w2.weight)

    def forward(self, x, positions=None, cache=None, tables=None):
        x = x + self.attn(self.ln1(x), positions, cache, tables)
        return x + self.ffn(self.ln2(x))


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, V); with targets (B, T) also the mean loss in nats."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_final = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            # One matrix in two places: N(0, 1) rows would give logits of size sqrt(C), so the head's smaller scale rules.
            self.token_embeddings.weight = self.lm_head.weight

    def forward(self, tokens, targets=None, cache=None):
        """tokens: (B, T) ids; targets: (B, T) ids, the same sequence one step on.

        Returns logits (B, T, V), or (logits, loss). With a cache, tokens follow what it holds and are added to it, and
        the logits are those of the given tokens. Raises ValueError for a sequence longer than the context.
        """
        T = tokens.shape[-1]
        limit = cache.max_length if cache else self.config.context_length
        past = cache.length if cache else 0
        if past + T > limit:
            raise ValueError(f"{past + T} tokens ({past} cached) pass the {'cache' if cache else 'context'} of {limit}")
        positions = cache.positions(T) if cache else torch.arange(T, device=tokens.device)
        tables = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.token_embeddings(tokens)                                       # (B, T, C)
        for block in self.layers:
            x = block(x, positions, cache, tables)
        if cache:
            cache.advance(T)
        logits = self.lm_head(self.ln_final(x))
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits if targets is None else (logits, cross_entropy(logits, targets))

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for batch_size rows of up to max_length tokens (the context length when not given)."""
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_length or self.config.context_length, weight.device, weight.dtype)


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
        raise ValueError(f"{len(tokens)} tokens and stride {stride}: needs at least 2 tokens and a stride of 1 to {context}")
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
        each = CrossEntropy.apply(logits, windows[:, 1:]).float().cpu()
        for s, row in zip(group, each):
            fresh = 0 if s == 0 else length - stride
            losses[s + fresh:s + length] = row[fresh:]
    return losses


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """A mean loss in nats per token as bits per byte of the text: comparable between tokenizers, which the loss is not.

    >>> round(bits_per_byte(math.log(2), n_tokens=100, n_bytes=400), 6)
    0.25
    """
    return loss / math.log(2) * n_tokens / n_bytes
