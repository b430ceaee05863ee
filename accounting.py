"""The bill before the run: parameters, FLOPs, bytes, seconds and money of a model, each by part.

    python accounting.py gpt2-xl                              a preset (below), a config_x.py, or --d_model=… alone
    python accounting.py config_owt.py --tokens=3e9 --device=H100 --mfu=0.4 --n_devices=8 --dollars_per_hour=2.5

Where 6 N D comes from. A product of (m, k) with (k, n) takes 2 m n k FLOPs, so a matrix of n numbers costs a token 2 n.
A block of GPT-2 has four projections of C x C and a feed-forward of C x 4C and 4C x C, 12 C² numbers: forward 24 C² a
token, and 4 T C more for q·k and the weighted sum of T values. Backward costs twice that, one product for the gradient
of the inputs and one for that of the weights. Three times 2 N is 6 N a token, 6 N D for D tokens.

    GPT-2 small, C 768, T 1,024, V 50,257, 12 layers      numbers     MFLOP a token, forward   with backward
    attention projections       12 · 4 C²                 28,311,552                    56.6           169.9
    feed-forward                12 · 8 C²                 56,623,104                   113.2           339.7
    attention scores            12 · 4 T C                         0                    37.7           113.2
    logits (tied embedding)     V C                       38,597,376                    77.2           231.6
    all; 6 N = 746.6 (N = 124,439,808) has no scores                                   284.8           854.4

Norms, softmax and activation functions are left out: a percent of the arithmetic, though much more of the time, as they
wait for memory. Scores count over the whole T x T square, as in the literature; causal=True counts the pairs that may
attend, which is what a flash kernel computes. Left out of the bytes: temporaries, the allocator's waste.

The roofline (Williams 2009): a chip of F FLOP/s that reads W bytes/s is busy only from F / W FLOPs a byte on, its ridge
(H100: 295). Decoding one sequence in bfloat16 does 2 FLOPs for the 2 bytes of a weight: a larger batch is nearly free.

    FLOP/s |     ______ F           left of the ridge memory is waited for: intensity x W
           |___/______________ FLOPs per byte        right of it arithmetic: F
               ^ F / W

Papers: Kaplan 2020 (2001.08361, 2.1) for the counting, Chowdhery 2022 (2204.02311, B) for MFU, Korthikanti 2022
(2205.05198, 4) for activations, Chen 2016 (1604.06174) for checkpoints, Rajbhandari 2019 (1910.02054) for messages.
"""
import functools
import math
import sys
from dataclasses import dataclass, fields

from torch.utils.checkpoint import checkpoint

from configurator import command_line, fail, nearest, read_config_file
from machine import DEVICES, find_device  # noqa: F401
from model import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = {"adamw": 2, "muon": 1, "sgd": 1, "adagrad": 1, "rmsprop": 1}    # float32 numbers kept for a parameter

# Published shapes. gpt2: Radford 2019. llama: 2307.09288, 2407.21783, model card of 3.2. qwen3: 2505.09388, table 1.
# small … 10b: CS336 (2026) assignment 2, table 1.
_GPT2 = dict(vocab_size=50_257, context_length=1024, norm="layer", position="learned", ffn="gelu", bias=True,
             tie_embeddings=True)
_LLAMA3 = dict(vocab_size=128_256, context_length=131_072, rope_theta=500_000.0, n_kv_heads=8, n_heads=32)
_QWEN3 = dict(vocab_size=151_936, context_length=40_960, rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True,
              head_dim=128, n_kv_heads=8)
PRESETS = {
    "gpt2": _GPT2 | dict(d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": _GPT2 | dict(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": _GPT2 | dict(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": _GPT2 | dict(d_model=1600, n_layers=48, n_heads=25),
    "llama-2-7b": dict(vocab_size=32_000, context_length=4096, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008),
    "llama-3.2-1b": _LLAMA3 | dict(d_model=2048, n_layers=16, d_ff=8192, rope_factor=32.0, tie_embeddings=True),
    "llama-3.1-8b": _LLAMA3 | dict(d_model=4096, n_layers=32, d_ff=14_336, rope_factor=8.0),
    "qwen3-0.6b": _QWEN3 | dict(d_model=1024, n_layers=28, n_heads=16, d_ff=3072, tie_embeddings=True),
    "qwen3-8b": _QWEN3 | dict(d_model=4096, n_layers=36, n_heads=32, d_ff=12_288),
    "small": dict(context_length=512, d_model=768, d_ff=3072, n_layers=12, n_heads=12),
    "medium": dict(context_length=512, d_model=1024, d_ff=4096, n_layers=24, n_heads=16),
    "large": dict(context_length=512, d_model=1280, d_ff=5120, n_layers=36, n_heads=20),
    "xl": dict(context_length=512, d_model=2560, d_ff=10_240, n_layers=32, n_heads=32),
    "10b": dict(context_length=512, d_model=4608, d_ff=12_288, n_layers=50, n_heads=36)}


def preset(name: str, **changes) -> ModelConfig:
    """The published shape of that name (PRESETS), with changes: preset("gpt2", context_length=512)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return ModelConfig(**(PRESETS[name] | changes))


# --- parameters ---

def count_params(config: ModelConfig) -> dict:
    """Trained numbers by part, and their "total". A tied head counts once, under token_embeddings."""
    c, C = config, config.d_model
    norm = {"rms": C, "layer": C * (1 + c.bias), "none": 0}[c.norm]
    block = _block_params(c) | {"norms": 2 * norm}
    parts = {"token_embeddings": c.vocab_size * C,
             "position_embeddings": c.context_length * C if c.position == "learned" else 0,
             "smear_gate": C * c.smear}
    parts |= {name: c.n_layers * n for name, n in block.items()}
    parts["norms"] += norm * (c.norm_position == "pre")
    parts["mtp"] = c.mtp_depth * (sum(block.values()) + 2 * C + 2 * C * C)
    parts["lm_head"] = 0 if c.tie_embeddings else c.vocab_size * C
    return parts | {"total": sum(parts.values())}


def _block_params(c: ModelConfig, active: bool = False, matrices_only: bool = False) -> dict:
    """Numbers of one block's attention, router and feed-forward; active: of those only that one token meets."""
    C, H, K, D = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    if c.attention == "mla":
        R, P, Q = c.kv_lora_rank, c.rope_head_dim, c.q_lora_rank or 0
        queries = Q * (C + H * (D + P)) if Q else C * H * (D + P)
        attention = queries + C * (R + P) + R * H * 2 * D + H * D * C
        vectors = R + Q + c.bias * (R + P + C + Q)
    else:
        attention = C * (H + 2 * K) * D + H * D * C
        vectors = 2 * D * c.qk_norm + (H + 2 * K) * D * (c.bias or c.qkv_bias) + C * c.bias
    widths = [c.d_ff]
    if c.n_experts:
        widths = [c.d_ff_expert] * (c.n_experts_per_token if active else c.n_experts)
        widths += [c.n_shared_experts * c.d_ff_expert] if c.n_shared_experts else []
    n = 3 if c.ffn == "swiglu" else 2          # matrices; all but the last have a bias as wide as the layer
    parts = {"attention": attention, "router": C * c.n_experts, "feed_forward": n * C * sum(widths)}
    if not matrices_only:
        parts["attention"] += vectors
        parts["feed_forward"] += c.bias * sum((n - 1) * width + C for width in widths)
    return parts


def active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts it is not sent to, and the heads used in training only."""
    counts = count_params(config)
    idle = sum(_block_params(config).values()) - sum(_block_params(config, active=True).values())
    return counts["total"] - counts["mtp"] - config.n_layers * idle


# --- FLOPs ---

def flops_per_token(config: ModelConfig, context_length: int, training: bool = False, causal: bool = False) -> dict:
    """FLOPs of one token in a sequence of context_length, by part, and their "total".

    Forward only; with training=True forward and backward, three times that, and the multi-token prediction heads.
    causal: count the pairs of positions that may attend instead of the whole square. A sliding layer is counted with
    its window either way.
    """
    c, T = config, context_length
    blocks = [_block_flops(c, _keys(T, window, causal)) for window in c.windows]
    parts = {name: sum(block[name] for block in blocks) for name in blocks[0]}
    parts["logits"] = 2 * c.d_model * c.vocab_size
    if not training:
        return parts | {"total": sum(parts.values())}
    if c.mtp_depth:
        block = sum(_block_flops(c, _keys(T, None, causal)).values())
        parts["mtp"] = c.mtp_depth * (4 * c.d_model ** 2 + block + parts["logits"])
    parts = {name: 3 * n for name, n in parts.items()}
    return parts | {"total": sum(parts.values())}


def _keys(T: int, window: int | None, causal: bool) -> float:
    """How many keys a query meets on average: causal, the first ones see 1, 2, …, the others all of the window."""
    seen = min(window or T, T)
    return (seen * (seen + 1) / 2 + (T - seen) * seen) / T if causal else seen


def _block_flops(c: ModelConfig, keys: float) -> dict:
    matrices = _block_params(c, active=True, matrices_only=True)
    rotary = c.rope_head_dim if c.attention == "mla" else 0
    return {"attention_projections": 2 * matrices["attention"],
            "feed_forward": 2 * (matrices["feed_forward"] + matrices["router"]),
            "attention_scores": 2 * keys * c.n_heads * (2 * c.head_dim + rotary)}


# --- bytes ---

def memory_bytes(config: ModelConfig, batch_size: int = 1, context_length: int | None = None, dtype: str = "float32",
                 optimizer: str | None = "adamw") -> dict:
    """Bytes of a training step by part, and their "total"; with optimizer=None those of running the model only.

    dtype: of the activations, by autocast; weights, gradients and optimizer state stay in float32. Muon keeps one
    moment of the blocks' matrices; the embedding, the head and vectors run AdamW and keep two. Without an optimizer the
    weights are in `dtype`, and the cache of batch_size full contexts takes the place of activations. Raises ValueError.
    """
    if dtype not in BYTES or optimizer not in (None, *STATES):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(BYTES)}, optimizer={optimizer!r} one of "
                         f"{', '.join(STATES)} or None")
    c, T, n = config, context_length or config.context_length, count_params(config)["total"]
    if optimizer is None:
        parts = {"weights": n * BYTES[dtype], "kv_cache": batch_size * kv_cache_bytes(c, T, dtype)}
        return parts | {"total": sum(parts.values())}
    moments = n * STATES[optimizer]
    if optimizer == "muon":          # the second moments of what AdamW trains there
        moments += n - (c.n_layers + c.mtp_depth) * sum(_block_params(c, matrices_only=True).values())
    parts = {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * moments,
             "activations": batch_size * activation_bytes(c, T, dtype)}
    return parts | {"total": sum(parts.values())}


def activation_bytes(config: ModelConfig, T: int, dtype: str = "float32") -> int:
    """Bytes that autograd keeps of one sequence between forward and backward, with the sdpa backend.

    Experts' routing and multi-token heads are left out.
    """
    c, low = config, BYTES[dtype]
    logits = c.vocab_size * low * (1 if c.logit_softcap is None else 2) + 4
    if c.fused_loss:
        logits = c.d_model * low     # only the gradient with respect to the head's input, made at once
    final = _norm_bytes(c, low) if c.norm_position == "pre" else c.d_model * low
    return T * (4 * c.d_model * c.smear + c.n_layers * _block_bytes(c, low) + final + logits)


def _block_bytes(c: ModelConfig, low: int) -> int:
    """What one block keeps of one token: its two norms, attention, feed-forward. low: bytes of the products' dtype."""
    H, K, D = c.n_heads, c.n_kv_heads, c.head_dim
    attention = low * (2 * H + 2 * K) * D + 4 * H                # q, k, v, the output and its log-sum-exp
    if c.qk_norm:
        attention += (H + K) * (D * low + 4)
    if c.attention == "mla":
        R, P, Q = c.kv_lora_rank, c.rope_head_dim, c.q_lora_rank or 0
        # The latents and what their norms keep; values and output are padded to the keys' width.
        attention = low * (2 * R + 2 * Q + 4 * H * (D + P) + H * D) + 4 * (1 + bool(Q) + H)
    width = c.d_ff if not c.n_experts else (c.n_experts_per_token + c.n_shared_experts) * c.d_ff_expert
    kept = {"swiglu": 3, "silu": 3, "gelu": 5, "relu2": 2}[c.ffn]                    # swiglu: gate, up, their product
    return 2 * _norm_bytes(c, low) + attention + kept * width * low


def _norm_bytes(c: ModelConfig, low: int) -> int:
    """A norm's input and factor (float32 also under autocast), and its output in the dtype of the next product."""
    return {"rms": 4 * c.d_model + 4, "layer": 8 * c.d_model + 4, "none": 0}[c.norm] + c.d_model * low


def kv_cache_bytes(config: ModelConfig, length: int, dtype: str = "bfloat16") -> int:
    """Bytes that one sequence of `length` must keep: all positions in full layers, the last window in sliding ones.

    Keys and values of K heads in each layer (MHA: all H, GQA: some, MQA: one), or MLA's latent and rotary key.
    """
    c = config
    width = c.kv_lora_rank + c.rope_head_dim if c.attention == "mla" else 2 * c.n_kv_heads * c.head_dim
    return sum(min(length, window or length) for window in c.windows) * width * BYTES[dtype]


def largest_batch(config: ModelConfig, memory: float, context_length: int | None = None, dtype: str = "float32",
                  optimizer: str | None = "adamw") -> int:
    """Most sequences whose training step (without optimizer: whose caches) fits `memory` bytes; 0 when none does."""
    none, one = (memory_bytes(config, n, context_length, dtype, optimizer)["total"] for n in (0, 1))
    return max(0, int((memory - none) // (one - none)))


# --- activation checkpoints ---

def run_checkpointed(blocks, x, sizes: tuple):
    """The blocks applied to x in order, in groups of sizes[0] that backward computes again, nested by sizes[1:]."""
    if not sizes:
        for block in blocks:
            x = block(x)
        return x
    for i in range(0, len(blocks), sizes[0]):
        x = checkpoint(run_checkpointed, blocks[i:i + sizes[0]], x, sizes[1:], use_reentrant=False)
    return x


def checkpoint_plan(n_layers: int, levels: int, block_bytes: float, input_bytes: float) -> dict:
    """The nesting of checkpoints, at most `levels` deep, that needs least memory: sizes, bytes, recomputed, flops.

    A checkpoint keeps a group's input and computes the inside again in backward. Of groups of k1 > k2 > … blocks N/k1
    inputs are kept; while one group is in backward, those of its k1/k2 subgroups too; in the smallest, k blocks.

        no level         N blocks                                        3 passes: forward 1, backward 2
        one level        N/k inputs + k blocks, k about the root of      4 passes
                         N input/block: 1 or 2
        log2 N levels    halves of halves: log2 N inputs + 1 block       3 + log2 N passes at most

    block_bytes, input_bytes: what autograd keeps of a block, and its input alone. sizes: outermost first. recomputed:
    blocks computed again (torch leaves out the last subgroup of a group that it enters for inputs). flops: 1 is a step
    without checkpoints, head left out.
    """
    @functools.lru_cache(None)
    def best(n: int, levels: int) -> tuple:
        if levels == 0:
            return n * block_bytes, 0, ()
        plans = [best(n, levels - 1)]
        for k in range(1, n):
            inside, _, sizes = best(k, levels - 1)
            sizes = k, *sizes
            # The first subgroup's input is the group's own, which the level above keeps (and the last level's block).
            plans.append((inside + (math.ceil(n / k) - 1) * input_bytes, _recomputed(n, sizes), sizes))
        return min(plans)

    n_bytes, recomputed, sizes = best(n_layers, levels)
    return {"sizes": sizes, "bytes": n_bytes, "recomputed": recomputed, "flops": 1 + recomputed / (3 * n_layers)}


def _recomputed(n: int, sizes: tuple) -> int:
    """Blocks of n that are computed again."""
    if not sizes:
        return 0
    total = 0
    for start in range(0, n, sizes[0]):
        group = min(sizes[0], n - start)
        last = (group - 1) % sizes[1] + 1 if sizes[1:] else 0
        total += group - last + _recomputed(group, sizes[1:])
    return total


# --- communication ---

def data_parallel_cost(work, batch_tokens, ranks, flops_per_s, link_bytes_per_s, dtype="bfloat16") -> dict:
    """One step of DDP on one rank: what it computes, what it sends, and from where on the first hides the second.

    Gradients, S bytes, are all-reduced in backward by a ring: each of N ranks sends 2 S (N-1)/N. Arithmetic falls as
    1/N, messages do not: hidden while N <= 1 + B W / C (a SwiGLU layer, 2 bytes a number), however large the layer.

    work: a ModelConfig, or (d_model, d_ff) for one SwiGLU layer. batch_tokens: B, of all ranks. flops_per_s: C, what a
    rank reaches. link_bytes_per_s: W, what it can send. dtype: of what is sent. Returns {"forward", "backward",
    "step"}, each with flops, bytes, compute_s, communication_s, smallest_batch and most_ranks at which that pass hides
    its messages, and hidden; the step's `seconds` are the longer of the two in each pass.
    """
    return _step_cost(work, batch_tokens, ranks, 1, flops_per_s, link_bytes_per_s, dtype, (0, 2))


def fsdp_cost(work, batch_tokens, ranks, flops_per_s, link_bytes_per_s, dtype="bfloat16", tp=1,
              shared_links=False) -> dict:
    """The same for FSDP: S (N-1)/N to gather weights in forward; in backward once more, and to reduce gradients.

    tp: each of these ranks is a group of tp that divides the matrices. Its messages overlap with FSDP's, unless
    shared_links: both wait for the same wires.
    """
    return _step_cost(work, batch_tokens, ranks, tp, flops_per_s, link_bytes_per_s, dtype, (1, 2), shared_links)


def tensor_parallel_cost(work, batch_tokens, ranks, flops_per_s, link_bytes_per_s, dtype="bfloat16") -> dict:
    """The same for tensor parallelism: an all-reduce of (B, d_model) a layer in each pass (Megatron's f and g).

    A block is two layers; embedding and head send nothing and count as divided. B cancels out: N <= 1 + 3 F W / 2 C.
    """
    return _step_cost(work, batch_tokens, 1, ranks, flops_per_s, link_bytes_per_s, dtype, (0, 0))


def _step_cost(work, batch, dp, tp, flops_per_s, link_bytes_per_s, dtype, rounds, shared_links=False) -> dict:
    """rounds: how often all weights (or gradients) go round the ring of dp ranks in forward and in backward."""
    if min(batch, dp, tp) < 1 or min(flops_per_s, link_bytes_per_s) <= 0:
        raise ValueError(f"batch_tokens={batch} and ranks {dp} x {tp} must be at least 1, FLOP/s {flops_per_s} and "
                         f"bytes/s {link_bytes_per_s} above 0")
    if isinstance(work, ModelConfig):
        params, flops = count_params(work)["total"], flops_per_token(work, work.context_length)["total"]
        reduced = 2 * work.n_layers * work.d_model       # numbers a token that tensor parallelism all-reduces in a pass
    else:
        params, flops, reduced = 3 * work[0] * work[1], 6 * work[0] * work[1], work[0]
    step, keys = {}, ("flops", "bytes", "compute_s", "communication_s")
    for name, passes, times in (("forward", 1, rounds[0]), ("backward", 2, rounds[1])):
        compute = passes * flops / flops_per_s                                       # s a token, one rank alone
        weights = times * params * BYTES[dtype] / link_bytes_per_s                   # s, in a ring of many
        activations = 2 * reduced * BYTES[dtype] / link_bytes_per_s                  # s a token, likewise
        sent_s = weights * (dp - 1) / (dp * tp), batch * activations * (tp - 1) / (dp * tp)
        cost = (batch * passes * flops / (dp * tp), sum(sent_s) * link_bytes_per_s, batch * compute / (dp * tp),
                sum(sent_s) if shared_links else max(sent_s))
        # Weights hide from a batch on. Activations grow with it as arithmetic does: they hide always or never.
        left = compute - activations * (tp - 1) * shared_links
        hides = activations * (tp - 1) <= compute and left > 0
        step[name] = dict(zip(keys, cost)) | {"smallest_batch": weights * (dp - 1) / left if hides else math.inf}
        if tp == 1 or not any(rounds):             # one kind of message: compute / N against message (N - 1) / N
            message = weights if any(rounds) else batch * activations
            step[name]["most_ranks"] = 1 + batch * compute / message if message else math.inf
    passes = list(step.values())
    step["step"] = {key: sum(one[key] for one in passes) for key in keys} | {
        "seconds": sum(max(one["compute_s"], one["communication_s"]) for one in passes),
        "smallest_batch": max(one["smallest_batch"] for one in passes),
        "most_ranks": min(one.get("most_ranks", math.inf) for one in passes)}
    return {name: cost | {"hidden": cost["smallest_batch"] <= batch} for name, cost in step.items()}


def best_mix(work, batch_tokens, ranks, *machine, shared_links=False) -> tuple:
    """(fsdp, tp, its cost): the division of `ranks` whose step takes least time, and among those sends least.

    machine: as fsdp_cost's, from flops_per_s to dtype. FSDP's bytes fall with tp, tensor parallelism's with fsdp. Most
    ranks hide both with fsdp near its limit B W / C and tp near 3 F W / 2 C; on shared wires near half of each.
    """
    grids = [(ranks // tp, tp) for tp in range(1, ranks + 1) if ranks % tp == 0]
    costs = [fsdp_cost(work, batch_tokens, fsdp, *machine, tp=tp, shared_links=shared_links) for fsdp, tp in grids]
    best = min(range(len(grids)), key=lambda i: (costs[i]["step"]["seconds"], costs[i]["step"]["bytes"]))
    return *grids[best], costs[best]


# --- time ---

def training_hours(config: ModelConfig, tokens: float, device: str, mfu: float = 0.4, n_devices: int = 1,
                   context_length: int | None = None) -> float:
    """Hours to train on `tokens` when the share `mfu` of the devices' peak goes into the model's FLOPs."""
    flops = flops_per_token(config, context_length or config.context_length, training=True)["total"] * tokens
    return flops / (find_device(device).flops * mfu * n_devices) / 3600


def intensity(config: ModelConfig, batch_size: int, context_length: int, dtype: str = "bfloat16") -> dict:
    """FLOPs per byte of prefill (a whole context) and decode (one more token a sequence), to hold against the ridge.

    Either reads the weights once (with experts: those that its tokens meet) and writes or reads the cache.
    """
    weights = (count_params(config)["total"] - count_params(config)["mtp"]) * BYTES[dtype]
    met = min(weights, batch_size * active_params(config) * BYTES[dtype]) if config.n_experts else weights
    cache = batch_size * kv_cache_bytes(config, context_length, dtype)
    flops = flops_per_token(config, context_length)["total"] * batch_size
    return {"prefill": flops * context_length / (weights + cache), "decode": flops / (met + cache)}


# --- the command ---

@dataclass
class Bill(ModelConfig):
    """A model and what it is to be used for."""
    batch_size: int = 1              # sequences at a time
    dtype: str = "bfloat16"          # float32 | bfloat16 | float16, of activations and of the weights that only run
    optimizer: str = "adamw"         # adamw | muon | sgd | adagrad | rmsprop
    device: str = "H100"             # see DEVICES in machine.py
    n_devices: int = 1               # how many of it
    tokens: float | None = None      # to train on; none = 20 a parameter (2203.15556)
    mfu: float = 0.4                 # share of the peak that goes into the model's FLOPs
    dollars_per_hour: float = 0.0    # of one device
    batch_tokens: int = 524_288      # of one training step over all devices
    link_gb_per_s: float = 450.0     # what a device can send: NVLink 4 (H100 data sheet) 450, InfiniBand NDR 50

    def __post_init__(self):
        super().__post_init__()
        memory_bytes(self, 1, None, self.dtype, self.optimizer)    # refuses dtypes and optimizers it does not know,
        find_device(self.device)                                   # and devices
        if not 0 < self.mfu <= 1 or min(self.n_devices, self.batch_size) < 1:
            raise ValueError(f"mfu={self.mfu} must be above 0 and at most 1, n_devices={self.n_devices} and "
                             f"batch_size={self.batch_size} at least 1")


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print right-aligned columns under a title."""
    def text(cell):
        return cell if isinstance(cell, str) else f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}"

    cells = [header] + [[text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for first, *others in cells:
        print(f"  {first:<{widths[0]}}", *(f" {cell:>{width}}" for cell, width in zip(others, widths[1:])))


def print_counts(bill: Bill) -> None:
    """Parameters and FLOPs."""
    T, counts = bill.context_length, count_params(bill)
    table(f"parameters ({active_params(bill):,} of them active for a token)", ["part", "count", "share"],
          [[name, n, f"{100 * n / counts['total']:.1f} %"] for name, n in counts.items() if n])
    forward, causal = flops_per_token(bill, T), flops_per_token(bill, T, causal=True)["total"]
    table(f"FLOPs of a forward pass over {T:,} tokens; causal pairs only: {causal * T:.4g}; backward: twice as many",
          ["part", "TFLOP", "share"],
          [[name, n * T / 1e12, f"{100 * n / forward['total']:.1f} %"] for name, n in forward.items()])


def print_memory(bill: Bill) -> None:
    """Bytes of training by dtype and by nesting of checkpoints, and of the cache by number of key/value heads."""
    T, room, rows = bill.context_length, find_device(bill.device).memory_bytes, []
    for dtype in ("float32", "bfloat16"):
        memory = memory_bytes(bill, bill.batch_size, T, dtype, bill.optimizer)
        rows.append([dtype, *(n / 1e9 for n in memory.values()), largest_batch(bill, room, T, dtype, bill.optimizer)])
    table(f"GB of a training step at batch {bill.batch_size}, {bill.optimizer}, and the largest batch in {bill.device}",
          ["", *memory, "largest batch"], rows)
    block, stream = _block_bytes(bill, BYTES[bill.dtype]), 4 * bill.d_model
    plans = [checkpoint_plan(bill.n_layers, levels, bill.batch_size * T * block, bill.batch_size * T * stream)
             for levels in range(2 + int(math.log2(bill.n_layers)))]
    table(f"activations of the blocks in {bill.dtype}, with groups of blocks computed again in backward",
          ["levels", "groups of", "GB", "FLOPs, times"],
          [[str(levels), " > ".join(map(str, plan["sizes"])), plan["bytes"] / 1e9, plan["flops"]]
           for levels, plan in enumerate(plans)])
    heads, rows = sorted({1, bill.n_kv_heads, bill.n_heads}), []
    for K in heads if bill.attention == "standard" else [bill.n_heads]:
        shape = {field.name: getattr(bill, field.name) for field in fields(ModelConfig)} | {"n_kv_heads": K}
        config = ModelConfig(**shape)
        rows.append([f"{K} key/value heads", kv_cache_bytes(config, 1, bill.dtype),
                     kv_cache_bytes(config, T, bill.dtype) / 1e6, largest_batch(config, room, T, bill.dtype, None)])
    table(f"KV cache, {bill.dtype}", [bill.attention, "bytes a token", f"MB at {T:,}", f"most in {bill.device}"], rows)


def print_speed(bill: Bill) -> None:
    """The roofline, what the strategies of parallel.py and sharded.py send beside their arithmetic, hours, dollars."""
    device, rows = find_device(bill.device), []
    ridge = device.flops / device.bytes_per_s
    for batch in sorted({1, bill.batch_size, 64, 512}):
        bounds = intensity(bill, batch, bill.context_length, bill.dtype).values()
        rows.append([f"batch {batch}", *(f"{x:,.1f} ({100 * min(1, x / ridge):.1f} %)" for x in bounds)])
    table(f"FLOPs per byte (share of the peak under the roof); {bill.device}: ridge {ridge:.0f}, peak "
          f"{device.flops / 1e12:.0f} TFLOP/s, {device.bytes_per_s / 1e12:.2f} TB/s ({device.source})",
          ["", "prefill", "decode"], rows)
    ranks, rows = max(2, bill.n_devices), []
    rates = bill.batch_tokens, ranks, device.flops * bill.mfu, bill.link_gb_per_s * 1e9
    fsdp, tp, mixed = best_mix(bill, *rates, bill.dtype)
    costs = {"DDP, float32": data_parallel_cost(bill, *rates, "float32"), "FSDP": fsdp_cost(bill, *rates, bill.dtype),
             "tensor parallel": tensor_parallel_cost(bill, *rates, bill.dtype), f"best: fsdp {fsdp} x tp {tp}": mixed}
    for name, cost in costs.items():
        step = cost["step"]
        rows.append([name, step["bytes"] / 1e6, 1e3 * step["communication_s"], 1e3 * step["compute_s"],
                     step["smallest_batch"], step["most_ranks"]])
    table(f"one of {ranks} ranks in a step of {bill.batch_tokens:,} tokens, {bill.link_gb_per_s:g} GB/s, and where its "
          "messages hide", ["", "MB sent", "ms", "ms of arithmetic", "from tokens", "up to ranks"], rows)
    tokens = bill.tokens or 20 * count_params(bill)["total"]
    hours = training_hours(bill, tokens, bill.device, bill.mfu, bill.n_devices)
    flops = flops_per_token(bill, bill.context_length, training=True)["total"] * tokens
    print(f"\ntraining on {tokens:.4g} tokens: {flops:.4g} FLOP, {hours:,.2f} hours on {bill.n_devices} {bill.device} "
          f"at {100 * bill.mfu:.0f} % MFU, {hours * bill.n_devices * bill.dollars_per_hour:,.0f} dollars")


def main(argv: list[str]) -> None:
    """Print the bill of one command line."""
    usage = f"python accounting.py CONFIG_OR_PRESET [--key=value …]\npresets: {', '.join(PRESETS)}"
    names = [word for word in argv if not word.startswith("-")]
    try:
        if len(names) > 1 or names and names[0] not in PRESETS and not names[0].endswith(".py"):
            raise ValueError(f"{' '.join(names)!r} is neither one config file nor one preset; presets: "
                             f"{', '.join(PRESETS)}.{nearest(names[0], PRESETS)}")
        given = {} if not names else PRESETS.get(names[0]) or read_config_file(names[0])
        # What a config file says of training alone (lr, data_dir, …) costs nothing here; as a flag it is a mistake.
        keys = {field.name for field in fields(Bill)}
        words = [f"--{key}={value}" for key, value in given.items() if key in keys]
        _, _, bill, _ = command_line(Bill, words + [word for word in argv if word.startswith("-")], usage)
        for part in (print_counts, print_memory, print_speed):
            part(bill)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
