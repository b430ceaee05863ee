"""A Transformer language model that a few switches turn from the course's plain one into GPT-2, Llama, Qwen3, Mixtral
or DeepSeek-V3. Its parts are in layers.py and attention.py; here stand the switches, the block, the model.

    B batch   T time (queries)   S time (keys)   C d_model   H heads   K key/value heads   D head_dim   F d_ff   V vocab

One block, pre-norm; attention.py's Attention and Block below follow it line by line:

    x (B,T,C) ─┬─> ln1 ─┬─> q_proj (B,H,T,D) ─> RoPE ─┐
               │        ├─> k_proj (B,K,S,D) ─> RoPE ─┴─> softmax(q kᵀ / √D + causal mask) (B,H,T,S) ─┐
               │        └─> v_proj (B,K,S,D) ─────────────────────────────────────────────────────────┴─> (B,H,T,D)
               └───────────────────────────── + <── (B,T,C) ── o_proj <── heads side by side (B,T,H·D) <──────┘
    x (B,T,C) ─┬─> ln2 ──> silu(w1 x) ∘ (w3 x) (B,T,F) ──> w2 ─┐
               └───────────────────────────── + <── (B,T,C) ───┘

What makes the model someone else's (all other fields at their defaults):

    the course, Llama   (the defaults)                                                             2302.13971
    Vaswani 2017        norm_position=post norm=layer position=sinusoidal ffn=relu2 (there relu)   1706.03762
    GPT-2               norm=layer position=learned ffn=gelu bias=true tie_embeddings=true         Radford 2019
    Qwen3               qk_norm=true n_kv_heads=2                                                  2505.09388
    Mixtral             n_experts=8 n_kv_heads=2                                                   2401.04088
    DeepSeek-V3         attention=mla n_experts=8 n_shared_experts=1 balance=bias mtp_depth=1      2412.19437

`model(tokens, targets)` gives the mean next-token cross entropy, in training mode plus the weighted losses of load
balancing and of further tokens; `model.losses` holds the parts. Left out: dropout (one pass over the data does not need
it), encoders, a first dense layer before experts.
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

from attention import Attention, KVCache, LatentAttention, Plan, attend  # noqa: F401
from bpe import Tokenizer
from checkpoint import read_checkpoint, sha256
from layers import (MLP, Embedding, LayerNorm, Linear, MixtureOfExperts, RMSNorm, SwiGLU, attention,  # noqa: F401
                    balance_loss, cross_entropy, feed_forward, gelu, lowered, make_norm, relu2, rms_norm, rope,
                    rope_tables, rotate, silu, simple_cross_entropy, softmax, swiglu, token_cross_entropy,
                    wide)


# --- configuration ---

CHOICES = {"norm": ("rms", "layer", "none"), "norm_position": ("pre", "post"),
           "position": ("rope", "learned", "sinusoidal", "none"), "rope_scaling": ("none", "llama3"),
           "ffn": ("swiglu", "silu", "gelu", "relu2"), "attention": ("standard", "mla"),
           "balance": ("loss", "bias", "none"), "attention_backend": ("naive", "sdpa", "triton")}


class Derived(int):
    """A number that ModelConfig worked out itself: when `dataclasses.replace` hands it on, it is worked out anew."""
    def __deepcopy__(self, memo):                # asdict copies its values: a checkpoint holds plain numbers
        return int(self)


@dataclasses.dataclass
class ModelConfig:
    """The shape of a model; the defaults are the course's plain one. Fields described as "none = …" are filled in.
    Raises ValueError naming a setting that cannot be, and one that would have no effect."""
    # the course's model
    vocab_size: int = 10_000         # rows of the embedding and of the head
    context_length: int = 256        # longest sequence the model is trained on, tokens
    d_model: int = 512               # width of the residual stream
    n_layers: int = 4                # blocks
    n_heads: int = 16                # query heads
    n_kv_heads: int | None = None    # key/value heads; none = n_heads; fewer: GQA (2305.13245), 1: MQA (1911.02150)
    d_ff: int | None = None          # width of the feed-forward layer; none = 8/3 d_model for swiglu, else 4 d_model
    rope_theta: float = 10_000.0     # base of the rotary frequencies
    norm_eps: float = 1e-5           # inside the norms' root
    attention_backend: str = "sdpa"  # naive (ours, to read) | sdpa (torch's fused one) | triton (ours, flash.py)
    # GPT-2, Llama, Qwen
    head_dim: int | None = None      # width of a head; none = d_model / n_heads
    norm: str = "rms"                # rms (1910.07467) | layer (1607.06450) | none
    norm_position: str = "pre"       # pre (2002.04745) | post (the sum is normed, 1706.03762; then no final norm)
    qk_norm: bool = False            # RMSNorm over each head's query and key (2010.04245, 2302.05442)
    position: str = "rope"           # rope (2104.09864) | learned (GPT-2) | sinusoidal (1706.03762) | none (2305.19466)
    rope_interleaved: bool = False   # rotate pairs (2i, 2i+1) as the paper does instead of (i, i + D/2), Llama's files
    rope_pattern: str = "R"          # R: a layer with RoPE, N: one without (2501.18795), repeated over all layers
    rope_factor: float = 1.0         # RoPE for contexts so many times longer (Llama 3, 2407.21783); 1 = not stretched
    rope_low_freq: float = 1.0       # wavelengths over rope_original_context / this are stretched in full
    rope_high_freq: float = 4.0      # wavelengths under rope_original_context / this stay
    rope_original_context: int = 8192      # the context length before stretching
    ffn: str = "swiglu"              # swiglu (2002.05202) | silu | gelu (tanh form, 1606.08415) | relu2 (2109.08668)
    bias: bool = False               # a bias in every linear layer but the head, and in LayerNorm (GPT-2)
    qkv_bias: bool = False           # a bias in the query, key and value projections only (Qwen2, 2407.10671)
    tie_embeddings: bool = False     # the head is the embedding matrix (1608.05859)
    smear: bool = False              # to each embedding add the one before it, times a gate (cf. RWKV, 2305.13048)
    shift_keys: bool = False         # half of each key's numbers are those of the key before it (cf. 2209.11895)
    zero_init: bool = False          # each block's last matrices start at 0, so that the model starts as the identity
    logit_softcap: float | None = None     # logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118)
    sliding_window: int | None = None      # a position sees so many positions, itself included (2310.06825); none = all
    window_pattern: str = "S"        # layers that slide, repeated over all: S sliding, L full (SSSL: every fourth full)
    fused_loss: bool = False         # train by kernels.linear_cross_entropy: logits in chunks, never whole (2410.10989)
    # experts, latent attention, further tokens
    n_experts: int = 0               # experts in every layer, 0 = one dense feed-forward layer (1701.06538, 2401.04088)
    n_experts_per_token: int = 2     # experts that work on a token
    n_shared_experts: int = 0        # experts that work on every token besides (2401.06066)
    d_ff_expert: int | None = None   # width of one expert; none = d_ff
    balance: str = "loss"            # keeps experts equally busy: loss (2101.03961, eq. 4) | bias (2408.15664) | none
    balance_weight: float = 0.01     # balance=loss: its weight in the training loss
    balance_rate: float = 0.001      # balance=bias: how far a step moves an expert's bias
    attention: str = "standard"      # standard | mla: keys and values through one latent (DeepSeek-V2, 2405.04434)
    kv_lora_rank: int | None = None  # mla: width of that latent; none = 4 head_dim
    q_lora_rank: int | None = None   # mla: queries through a latent of this width too; none: directly
    rope_head_dim: int | None = None       # mla: width of the extra, shared key that carries RoPE; none = head_dim / 2
    mtp_depth: int = 0               # further tokens predicted in training by extra heads (DeepSeek-V3, 2412.19437)
    mtp_weight: float = 0.3          # weight of their mean loss in the training loss
    rope_scaling: str = "none"       # for older checkpoints: none | llama3, which rope_factor tells by itself

    def __post_init__(self):
        for field in dataclasses.fields(ModelConfig):
            if isinstance(getattr(self, field.name), Derived):
                setattr(self, field.name, None)
        self._check_values()
        self.rope_scaling = "none"
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is no multiple of n_heads={self.n_heads}; or set head_dim")
        self._fill("n_kv_heads", self.n_heads)
        self._fill("head_dim", self.d_model // self.n_heads)
        self._fill("d_ff", max(64, round(8 / 3 * self.d_model / 64) * 64) if self.ffn == "swiglu" else 4 * self.d_model)
        self._check_combinations()
        if self.n_experts:
            self._fill("d_ff_expert", self.d_ff)
        if self.attention == "mla":
            self._fill("kv_lora_rank", 4 * self.head_dim)
            self._fill("rope_head_dim", max(2, self.head_dim // 2))
        rotated = self.rope_head_dim if self.attention == "mla" else self.head_dim
        if self.position == "rope" and rotated % 2:
            raise ValueError(f"the rotated width {rotated} must be even: RoPE turns pairs of numbers")

    def plain(self) -> "ModelConfig":
        """A copy with ordinary numbers alone: torch.compile traces no others before torch 2.13."""
        copied = copy.copy(self)
        copied.__dict__ |= {name: int(value) for name, value in vars(self).items() if isinstance(value, Derived)}
        return copied

    def _fill(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            setattr(self, name, Derived(value))

    def _check_values(self) -> None:
        for field in dataclasses.fields(ModelConfig):
            name, value = field.name, getattr(self, field.name)
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} is none of {', '.join(CHOICES[name])}; choose one of them")
            if value is None and field.default is None:
                continue
            least = 0 if field.default == 0 else 1
            if field.type in (int, int | None) and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
            may_be_zero = name in ("balance_weight", "balance_rate", "mtp_weight")
            if field.type in (float, float | None) and not (0 < value < math.inf or may_be_zero and value == 0):
                raise ValueError(f"{name}={value} must be {'at least' if may_be_zero else 'above'} 0, and finite")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern={self.window_pattern!r} must be made of S (sliding) and L (full)")
        if not self.rope_pattern or set(self.rope_pattern) - set("RN"):
            raise ValueError(f"rope_pattern={self.rope_pattern!r} must be made of R (rotary) and N (no positions)")

    def _check_combinations(self) -> None:
        c, mla = self, self.attention == "mla"
        if c.n_heads % c.n_kv_heads:
            raise ValueError(f"n_heads={c.n_heads} is not a multiple of n_kv_heads={c.n_kv_heads}")
        if c.window_pattern != "S" and c.sliding_window is None:
            raise ValueError(f"window_pattern={c.window_pattern!r} needs sliding_window, the positions to see")
        if c.fused_loss and c.logit_softcap is not None:
            raise ValueError("fused_loss=true never has the logits that logit_softcap bends; choose one")
        if mla and c.rope_pattern != "R":
            raise ValueError(f"rope_pattern={c.rope_pattern!r} needs attention=standard: MLA rotates in every layer")
        if c.rope_factor < 1 or c.rope_factor != 1 and c.position != "rope" or c.rope_low_freq >= c.rope_high_freq:
            raise ValueError(f"rope_factor={c.rope_factor} must be at least 1 and needs position=rope, rope_low_freq="
                             f"{c.rope_low_freq} must be below rope_high_freq={c.rope_high_freq}")
        if mla and (c.position != "rope" or c.qk_norm or c.n_kv_heads != c.n_heads or c.qkv_bias or c.shift_keys):
            raise ValueError("attention=mla needs position=rope and no qk_norm, qkv_bias, n_kv_heads or shift_keys")
        if not mla and (c.kv_lora_rank or c.q_lora_rank or c.rope_head_dim):
            raise ValueError("kv_lora_rank, q_lora_rank and rope_head_dim need attention=mla")
        if c.n_experts and c.n_experts_per_token > c.n_experts:
            raise ValueError(f"n_experts_per_token={c.n_experts_per_token} is more than n_experts={c.n_experts}")
        if not c.n_experts and (c.n_shared_experts or c.d_ff_expert):
            raise ValueError("n_shared_experts and d_ff_expert need n_experts of at least 1")
        if c.mtp_depth >= c.context_length:
            raise ValueError(f"mtp_depth={c.mtp_depth} must be below context_length={c.context_length}")

    @property
    def windows(self) -> tuple:
        """The window of each layer, None where it sees everything."""
        pattern = self.window_pattern
        return tuple(self.sliding_window if pattern[i % len(pattern)] == "S" else None for i in range(self.n_layers))


# --- the model ---

def sinusoids(positions, d_model: int):
    """sin and cos of position / 10000^(2i/C), side by side in each pair (1706.03762, section 3.5). (..., T, C)."""
    cos, sin = rope_tables(positions, d_model)
    return torch.stack((sin, cos), dim=-1).flatten(-2)


class Block(nn.Module):
    """x + attn(ln1(x)), then x + ffn(ln2(x)): pre-norm leaves the residual stream untouched end to end (2002.04745).
    Post-norm, the original: ln1(x + attn(x)), then ln2(x + ffn(x))."""
    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.config, self.layer = config, layer
        self.ln1, self.ln2 = make_norm(config), make_norm(config)
        self.attn = LatentAttention(config, layer) if config.attention == "mla" else Attention(config, layer)
        self.ffn = MixtureOfExperts(config) if config.n_experts else feed_forward(config, config.d_ff)

    def forward(self, x, positions=None, cache=None, plan=None):               # (B, T, C) -> (B, T, C), see Attention
        plan = plan or Plan(self.config, x, positions, cache, self.layer)
        more = (plan.balance,) if self.config.n_experts else ()
        if self.config.norm_position == "post":
            x = self.ln1(x + self.attn(x, None, cache, plan))
            return self.ln2(x + self.ffn(x, *more))
        x = x + self.attn(self.ln1(x), None, cache, plan)
        return x + self.ffn(self.ln2(x), *more)


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, V); with targets (B, T) also the mean loss in nats."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config = config.plain()
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        if config.smear:
            self.smear_gate = nn.Parameter(torch.zeros(config.d_model))
        if config.position == "learned":
            self.position_embeddings = Embedding(config.context_length, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_final = nn.Identity() if config.norm_position == "post" else make_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            # One matrix in two places. The head's smaller scale rules: N(0, 1) rows would give logits of size √C.
            self.token_embeddings.weight = self.lm_head.weight
        if config.mtp_depth:
            self.mtp = nn.ModuleList(FutureToken(config) for _ in range(config.mtp_depth))
        self.losses = {}             # the parts of the last training loss, without gradient

    def forward(self, tokens, targets=None, cache=None, stream_only: bool = False):
        """tokens: (B, T) ids; targets: (B, T) ids, the same sequence one step on.

        Returns logits (B, T, V), or (logits, loss); with fused_loss in training (None, loss). With a cache, tokens
        follow what it holds and are added to it. stream_only: the residual stream (B, T, C), see `hidden`. Raises
        ValueError for a sequence longer than the context or the cache.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)} must be (B, T): for one sequence add tokens[None]")
        plan, limit = Plan(self.config, tokens, cache=cache), self.config.context_length
        if plan.end > limit and (cache is None or self.config.position == "learned"):
            raise ValueError(f"{plan.end} tokens ({plan.past} cached) pass the context of {limit}; give fewer")
        x = self.embed(tokens, cache, plan)                        # (B, T, C)
        for block in self.layers:
            x = block(x, None, cache, plan)
        if stream_only:
            return x
        if targets is None:
            return self.head(x)                                    # (B, T, V)
        logits, loss = self.head_loss(x, targets)
        return logits, self.training_loss(loss, x, targets, plan.balance) if self.training else loss

    def hidden(self, tokens, cache=None):
        """The residual stream after the last block, (B, T, C): what `head` turns into logits and `draft` continues."""
        return self.forward(tokens, cache=cache, stream_only=True)

    def embed(self, tokens, cache, plan):
        """What goes into the first block, (B, T, C): embeddings, and positions that are added rather than rotated."""
        x = self.token_embeddings(tokens)
        if self.config.smear:
            # x_t + sigmoid(g) ∘ x_(t-1): the first layer then sees pairs of tokens, which else would take a layer.
            if cache is None:
                before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
            else:
                slots = plan.slots.expand_as(tokens)
                cache.ids.scatter_(1, slots, tokens.long())
                before = self.token_embeddings(cache.ids.gather(1, (slots - 1).clamp(min=0)))
                before = before * (slots > 0).unsqueeze(-1)        # nothing stands before the first token
            x = x + torch.sigmoid(self.smear_gate).to(x.dtype) * before
        if self.config.position == "learned":
            x = x + self.position_embeddings(plan.positions)
        elif self.config.position == "sinusoidal":
            x = x + sinusoids(plan.positions, self.config.d_model).to(x.dtype)
        return x

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

    def training_loss(self, loss, x, targets, balance: list):
        """`loss`, the cross entropy, plus the weighted losses of the switches that have one; self.losses notes each."""
        c, parts, T = self.config, {"cross_entropy": loss}, targets.shape[-1]
        if c.mtp_depth:
            depths = []
            for k, future in enumerate(self.mtp, start=1):
                # x[:, i] has seen tokens up to i; with token i+k = targets[i+k-1] it predicts targets[i+k].
                x = future(x[:, :T - k], self.token_embeddings(targets[:, k - 1:T - 1]))
                depths.append(self.head_loss(x, targets[:, k:])[1])
            parts["mtp"] = sum(depths) / c.mtp_depth               # eq. 25
            loss = loss + c.mtp_weight * parts["mtp"]
        if c.n_experts and c.balance == "loss":
            # The mean over layers, each judged alone: a sum over all would let one layer's favourite hide another's.
            parts["balance"] = sum(balance) / len(balance)
            loss = loss + c.balance_weight * parts["balance"]
        self.losses = {name: part.detach() for name, part in parts.items()}
        return loss

    def draft(self, hidden, next_tokens, cache=None):
        """Logits (B, T, V) for the token after `next_tokens` (B, T), by the first extra head: a draft for sampling.
        hidden: (B, T, C), from `hidden`, one position before. cache: new_cache(…, draft=True), or none."""
        if not self.config.mtp_depth:
            raise ValueError("mtp_depth=0: this model has no head for a further token; train one with mtp_depth=1")
        return self.head(self.mtp[0](hidden, self.token_embeddings(next_tokens), cache))

    def new_cache(self, batch_size: int, max_length: int | None = None, draft: bool = False) -> KVCache:
        """An empty cache for batch_size rows of max_length tokens (none: the context length); draft: for `draft`."""
        c, weight = self.config, self.token_embeddings.weight
        n_layers = 1 if draft else c.n_layers
        return KVCache(c, batch_size, max_length or c.context_length, n_layers, weight.device, weight.dtype)

    def balance_experts(self) -> None:
        """After an optimizer step: move the routers' biases (balance=bias) and count anew. Nothing without experts."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.rebalance(self.config.balance_rate)


# --- further tokens ---

class FutureToken(nn.Module):
    """One depth of multi-token prediction: from a hidden state and the next token, the hidden state one further, for
    the model's own final norm and head: block(M [norm(h_i), norm(embedding of token i+1)]) (2412.19437, eq. 21-24)."""
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.hidden_norm, self.token_norm = (RMSNorm(config.d_model, config.norm_eps) for _ in range(2))
        self.proj = Linear(2 * config.d_model, config.d_model)
        self.block = Block(dataclasses.replace(config, sliding_window=None, window_pattern="S"))

    def forward(self, hidden, embedded, cache=None):               # (B, T, C) twice -> (B, T, C)
        both = torch.cat((self.hidden_norm(hidden), self.token_norm(embedded)), dim=-1)
        return self.block(self.proj(lowered(both)).to(hidden.dtype), None, cache)


# --- from a folder, and over a text ---

def with_weights(config: ModelConfig, weights: dict) -> Transformer:
    """A Transformer made of these tensors, in their dtype: built without memory, so that nothing is drawn or copied."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:                    # assigned one by one, they are two parameters on the same memory
        model.token_embeddings.weight = model.lm_head.weight
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):                   # a counter, not stored
            module.tokens_per_expert = torch.zeros(config.n_experts, dtype=torch.long)
    return model


def load_model(out_dir, device=None, name: str = "ckpt.pt"):
    """(Transformer in evaluation mode, Tokenizer or None) from the folder of a training run.

    name: `ckpt.pt` for the last state, `best.pt` for the best on validation. Weights keep the dtype they are stored in.
    Raises FileNotFoundError, or ValueError naming the path when config, weights and tokenizer do not go together.
    """
    path, tokenizer = Path(out_dir) / name, None
    entries = read_checkpoint(path)
    if not isinstance(entries.get("model_config"), dict):
        raise ValueError(f"{path} has no model_config; it was not written by train.py")
    weights = {key.removeprefix("_orig_mod."): tensor for key, tensor in entries["model"].items()}
    try:
        model = with_weights(ModelConfig(**entries["model_config"]), weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of model.py: {reason}") from error
    if path.with_name("tokenizer.json").is_file():
        file = path.with_name("tokenizer.json")
        if entries.get("tokenizer_sha256") not in (None, "", sha256(file)):
            raise ValueError(f"{file} is not the tokenizer that {path} was trained with; put that one beside it")
        tokenizer = Tokenizer.load(file)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{file} has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}; they "
                             "do not belong together")
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def token_losses(model, tokens, stride: int | None = None, batch_size: int = 16) -> torch.Tensor:
    """-log p in nats of tokens 1 … n-1, each predicted once, (n-1,) float32 on the CPU.

    tokens: (n,) ids, also memory-mapped. Windows of the context length move on by `stride` (none: half a context) and
    only their last `stride` predictions count: every token but those of the first window then has context_length -
    stride or more before it. Windows side by side would begin from nothing.
    """
    context = model.config.context_length
    stride = stride or max(1, context // 2)
    if len(tokens) < 2 or not 1 <= stride <= context:
        raise ValueError(f"{len(tokens)} tokens and stride {stride}: needs 2 tokens, a stride of 1 to {context}")
    device, last = next(model.parameters()).device, len(tokens) - 1
    losses, length = torch.empty(last), min(context, last)
    # A window starting at s predicts s+1 … s+context; the last one is moved back so that it is whole as well.
    starts = list(range(0, max(last - context, 0), stride)) + [max(last - context, 0)]
    for i in range(0, len(starts), batch_size):
        group = starts[i:i + batch_size]
        pieces = [tokens[s:s + length + 1] for s in group]
        pieces = [piece.astype("int64") if hasattr(piece, "astype") else piece for piece in pieces]    # off the disk
        windows = torch.stack([torch.as_tensor(piece).long() for piece in pieces]).to(device)
        each = token_cross_entropy(model(windows[:, :-1]), windows[:, 1:]).float().cpu()
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
