"""Who looks at whom, and what is remembered: attention, the cache that decoding keeps, attention through a latent.

    q·k of token t with every token before it, softmaxed, says how much of each v goes into the result of t:

        keys      the  cat  sat  on           the mask, True = may attend        with a window of 2
        the        1                          1 . . .                            1 . . .
        cat       .3   .7                     1 1 . .                            1 1 . .
        sat       .1   .6   .3                1 1 1 .                            . 1 1 .
        on        .1   .2   .4   .3           1 1 1 1                            . . 1 1

A row depends on nothing below it. So a new token adds one row and changes none: decoding keeps k and v of all tokens
so far (KVCache) and computes that row alone. What it costs is memory: 2 · layers · K · D numbers a token, which is what
GQA (fewer K), windows and MLA (a latent instead) are about. Shape letters and `config` are those of model.py.
"""
import math

import torch
from torch import nn

from layers import Linear, RMSNorm, attention, lowered, rope_tables, rotate
import fused
from machine import SHORT_CONTEXT, short_attention


# --- attention ---

class Attention(nn.Module):
    """Causal self-attention, H query heads over K key/value heads."""
    def __init__(self, config, layer: int = 0):
        super().__init__()
        c, bias = config, config.bias or config.qkv_bias
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        self.rotates = c.position == "rope" and c.rope_pattern[layer % len(c.rope_pattern)] == "R"    # R or N, repeated
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, bias)
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, c.bias)
        if c.zero_init:
            nn.init.zeros_(self.o_proj.weight)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, positions=None, cache=None, plan=None):
        """x: (B, T, C) -> (B, T, C). positions: (T,) or (B, T), none: counted on from the cache. plan: see Plan."""
        c, (B, T, _) = self.config, x.shape
        plan, x = plan or Plan(c, x, positions, cache, self.layer), lowered(x)
        q = self.q_proj(x).view(B, T, c.n_heads, c.head_dim)
        k = self.k_proj(x).view(B, T, c.n_kv_heads, c.head_dim)
        v = self.v_proj(x).view(B, T, c.n_kv_heads, c.head_dim)
        if c.shift_keys:
            k = self.shifted(k, cache, plan)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            cos, sin = plan.cos, plan.sin
            q, k = turn(q, cos, sin, c.rope_interleaved), turn(k, cos, sin, c.rope_interleaved)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)      # (B, H, T, D), and twice (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, plan, self.window)           # (B, K, S, D)
        y = attend(c.attention_backend, q, k, v, plan.masks[self.window], plan.fresh)              # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, c.n_heads * c.head_dim))

    def shifted(self, k, cache, plan):
        """Keys k (B, T, K, D), before norm and rotation, every other number of them from the position before (so both
        of a rotated pair are from one). A key then tells which token stood before it, and a name that comes again
        finds what followed it the last time. Without this two layers have to learn it together, and some seeds do not
        (induction heads, 2209.11895, whose "smeared keys" are a mean of the two)."""
        before = nn.functional.pad(k[:, :-1], (0, 0, 0, 0, 1, 0))
        if cache is not None:
            before = torch.cat((cache.key_before(self.layer, k, plan), before[:, 1:]), dim=1)
        return torch.where(torch.arange(k.shape[-1], device=k.device) % 2 == 0, before, k)


def turn(x, cos, sin, interleaved: bool):
    """layers.rotate of x (B, T, H, D) by the angles of a Plan, which are float32 and rounded only here."""
    if interleaved or not fused.in_c(x):
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype), interleaved)
    return fused.fast(fused.Rotate, rotate, x, cos, sin)


def attend(backend: str, q, k, v, mask, fresh: bool):
    """layers.attention by the backend that was chosen: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). mask:
    boolean; or None, which is the causal triangle where `fresh` (nothing came before, T = S), and else everything."""
    (B, H, T, D), K, causal = q.shape, k.shape[1], fresh and mask is None
    k, v = k.to(q.dtype), v.to(q.dtype)                            # a cache may be kept in another dtype
    if backend == "triton" and causal:           # it knows neither a past nor windows: those go to sdpa
        from flash import FlashAttentionTriton  # here: only this backend needs it
        return FlashAttentionTriton.apply(q, k, v, True)
    if backend == "sdpa" and causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and T <= SHORT_CONTEXT:
        return short_attention(q, k, v)
    if T == 1 and mask is None:                  # one query a head: those that share a key head stand in for time
        q, causal = q.view(B, K, H // K, D), False
    group = q.shape[1] // K
    if backend != "naive":
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=group > 1)
    else:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if causal else mask
        y = attention(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), mask)
    return y.view(B, H, T, -1) if T == 1 else y


# --- what a pass shares, what decoding keeps ---

class Plan:
    """What all layers of one pass share, made once: where its tokens stand, rotary tables, a mask for each window."""
    def __init__(self, config, x, positions=None, cache=None, layer: int = -1):
        T, device = x.shape[1], x.device
        self.rows = [0] if cache is None else cache.rows[layer]    # positions before this pass, of each row
        self.past, shortest = max(self.rows, default=0), min(self.rows, default=0)
        self.end, self.fresh = self.past + T, self.past == 0       # fresh: nothing came before
        if cache is not None and self.end > cache.max_length:
            raise ValueError(f"{self.end} tokens ({self.past} cached) pass the cache of {cache.max_length}")
        self.slots = torch.arange(self.past, self.end, device=device)          # (T,), for ragged rows (B, T)
        if self.past != shortest:
            self.slots = self.slots + (torch.tensor(self.rows, device=device) - self.past)[:, None]
        self.positions = self.slots if positions is None else positions
        self.balance = []                                          # losses of experts, see MixtureOfExperts
        if config.position == "rope":
            width = config.rope_head_dim if config.attention == "mla" else config.head_dim
            tables = rope_tables(self.positions, width, config.rope_theta, config)
            self.cos, self.sin = (table.unsqueeze(-2) for table in tables)     # ([B,] T, 1, D/2), for all heads
        self.first, self.masks = {}, {}                            # by window: the first key read, ([B, 1,] T, S)
        for window in set(config.windows):
            first = 0 if window is None else max(0, shortest - window + 1)
            keys, queries = torch.arange(first, self.end, device=device), self.slots.unsqueeze(-1)
            mask = keys <= queries
            if self.fresh and (window is None or window >= T) or not self.fresh and T == 1 and self.past == shortest:
                mask = None                                        # see attend
            elif window is not None:
                mask &= keys > queries - window
            self.first[window], self.masks[window] = first, mask.unsqueeze(1) if self.slots.dim() == 2 else mask


class KVCache:
    """Keys and values of all positions so far, preallocated for every layer: position p of a row lies in slot p.

    Rows may hold different numbers of positions: ragged prompts, padded on the right, each decode as if alone, see
    `set_lengths`. Each layer counts its own positions; the cache's length is the last layer's, so that after an error
    in mid-pass it is what it was. MLA keeps its latent as key and its rotary key as value, one "head" each.
    """
    def __init__(self, config, batch_size: int, max_length: int, n_layers: int, device, dtype):
        heads, widths = config.n_kv_heads, (config.head_dim, config.head_dim)
        if config.attention == "mla":
            heads, widths = 1, (config.kv_lora_rank, config.rope_head_dim)
        # Zeros, not empty memory: a slot not yet filled is masked out, but 0 times NaN would be NaN.
        self.k, self.v = ([torch.zeros(batch_size, heads, max_length, width, device=device, dtype=dtype)
                           for _ in range(n_layers)] for width in widths)
        self.ids = torch.zeros(batch_size, max_length, dtype=torch.long, device=device) if config.smear else None
        self.raw = [torch.zeros_like(k) for k in self.k] if config.shift_keys else []        # keys before shifting
        self.rows = [[0] * batch_size for _ in range(n_layers)]    # positions of each row, layer by layer
        self.batch_size, self.max_length, self.device = batch_size, max_length, torch.device(device)
        self.in_c = None                                           # the model's pass in C, see onetoken.py

    @property
    def lengths(self) -> list[int]:                                # positions that each row holds
        return list(self.rows[-1])

    @property
    def length(self) -> int:                                       # those of the longest row
        return max(self.rows[-1], default=0)

    def set_lengths(self, lengths) -> None:
        """Say how many positions of each row count (an int: of all rows), at most what it holds."""
        lengths = [lengths] * self.batch_size if isinstance(lengths, int) else [int(n) for n in lengths]
        if len(lengths) != self.batch_size or not all(0 <= n <= held for n, held in zip(lengths, self.lengths)):
            raise ValueError(f"lengths {lengths} do not fit rows that hold {self.lengths}; they can only be cut")
        self.rows = [lengths for _ in self.rows]

    def grow(self, n: int) -> None:
        """Say that n more positions of every row are filled."""
        self.rows = [[held + n for held in rows] for rows in self.rows]

    def select(self, rows) -> None:
        """Keep these rows, in this order; named twice it is copied: samples of one prompt share a prefill."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        self.k, self.v = [store[rows] for store in self.k], [store[rows] for store in self.v]
        self.raw, self.ids = [store[rows] for store in self.raw], None if self.ids is None else self.ids[rows]
        self.rows = [[held[row] for row in rows.tolist()] for held in self.rows]
        self.batch_size = len(rows)

    def key_before(self, layer: int, k, plan: Plan):
        """Keep keys k (B, T, K, D) as they are before shifting; returns those one position before, (B, 1, K, D)."""
        rows, slots = torch.arange(self.batch_size)[:, None], plan.slots.expand(self.batch_size, -1)     # (B, T)
        raw, first = self.raw[layer].transpose(1, 2), slots[:, :1]             # (B, S, K, D)
        before = raw[rows, (first - 1).clamp(min=0)] * (first > 0)[..., None, None]    # nothing stands before the first
        raw[rows, slots] = k.to(raw.dtype)
        return before.to(k.dtype)

    def append(self, layer: int, k, v, plan: Plan, window: int | None):
        """Store k and v (B, K, T, D) behind each row; return those that this layer reads, (B, K, S, D) each."""
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if plan.slots.dim() == 1:
                store[:, :, plan.past:plan.end] = new
            else:
                store[torch.arange(self.batch_size)[:, None], :, plan.slots] = new.transpose(1, 2).to(store.dtype)
        self.rows[layer] = [n + k.shape[2] for n in plan.rows]
        if plan.fresh:                                             # what was just computed, in its own dtype
            return k, v
        return tuple(store[layer][:, :, plan.first[window]:plan.end] for store in (self.k, self.v))


# --- latent attention ---

class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1 and appendix C); called as Attention is. Keys
    and values are grown from one narrow latent, R wide, which alone is cached; a further key, P wide, shared by all
    heads, carries RoPE, since a rotated latent could no longer be grown afterwards."""
    def __init__(self, config, layer: int = 0):
        super().__init__()
        c, q_width = config, config.d_model if config.q_lora_rank is None else config.q_lora_rank
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        if c.q_lora_rank is not None:
            self.q_down_proj, self.q_norm = Linear(c.d_model, q_width, c.bias), RMSNorm(q_width, c.norm_eps)
        self.q_proj = Linear(q_width, c.n_heads * (c.head_dim + c.rope_head_dim))
        self.kv_down_proj = Linear(c.d_model, c.kv_lora_rank + c.rope_head_dim, c.bias)
        self.kv_norm = RMSNorm(c.kv_lora_rank, c.norm_eps)
        self.kv_up_proj = Linear(c.kv_lora_rank, c.n_heads * 2 * c.head_dim)   # for each head its key, then its value
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, c.bias)
        if c.zero_init:
            nn.init.zeros_(self.o_proj.weight)

    def forward(self, x, positions=None, cache=None, plan=None):
        c, (B, T, _) = self.config, x.shape
        D, R, P = c.head_dim, c.kv_lora_rank, c.rope_head_dim
        plan, x = plan or Plan(c, x, positions, cache, self.layer), lowered(x)
        q = self.q_proj(x if c.q_lora_rank is None else self.q_norm(self.q_down_proj(x)))
        q, q_rope = q.view(B, T, c.n_heads, D + P).split((D, P), dim=-1)
        latent, k_rope = self.kv_down_proj(x).unsqueeze(2).split((R, P), dim=-1)       # (B, T, 1, R), (B, T, 1, P)
        cos, sin = plan.cos.to(q.dtype), plan.sin.to(q.dtype)
        q_rope, k_rope = (rotate(t, cos, sin, c.rope_interleaved).transpose(1, 2) for t in (q_rope, k_rope))
        q, latent = q.transpose(1, 2), self.kv_norm(latent).transpose(1, 2)    # (B, H, T, D), (B, 1, T, R)
        if cache is not None:
            latent, k_rope = cache.append(self.layer, latent, k_rope, plan, self.window)   # (B, 1, S, R), (B, 1, S, P)
        mask = plan.masks[self.window]
        if plan.fresh:
            # In training, growing keys and values is cheaper than attending in the wide latent.
            k, v = self.kv_up_proj(latent.squeeze(1)).view(B, -1, c.n_heads, 2 * D).transpose(1, 2).chunk(2, dim=-1)
            k = torch.cat((k, k_rope.expand(-1, c.n_heads, -1, -1)), dim=-1)
            # Fused attention wants one width for keys and values: zeros beside the values, cut off again.
            v = v if c.attention_backend == "naive" else nn.functional.pad(v, (0, P))
            y = attend(c.attention_backend, torch.cat((q, q_rope), dim=-1), k, v, mask, True)[..., :D]
        else:
            # After a past, never grow it again: q·(U c) = (Uᵀq)·c, so the query moves into the latent instead.
            up_k, up_v = self.kv_up_proj.weight.to(q.dtype).view(c.n_heads, 2 * D, R).chunk(2, dim=1)  # (H, D, R) each
            q = torch.cat((q @ up_k, q_rope), dim=-1) * math.sqrt((R + P) / (D + P))       # the scale is still √(D+P)
            y = attend(c.attention_backend, q, torch.cat((latent, k_rope), dim=-1), latent, mask, False)
            y = y @ up_v.transpose(1, 2)                           # (B, H, T, R) -> (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, c.n_heads * D))
