"""The bill of a model before it runs: parameters, FLOPs, bytes, hours and money, each by part.

    python accounting.py gpt2-xl                              a preset of model.py, or a config_x.py, or --d_model=…
    python accounting.py config_owt.py --tokens=3e9 --device=H100 --mfu=0.4 --dollars_per_hour=2.5

What is counted. Parameters: every number that is trained. FLOPs: the multiplications and additions of matrix products,
2 m n k each, as torch.utils.flop_counter counts them; norms, activations and softmax are left out: they are a percent
of the arithmetic (and much more of the time: they wait for memory). Attention scores are counted over the whole T x T
square, as the literature does; `causal=True` counts the pairs that may attend, which is what a flash kernel computes.
The backward pass costs twice the forward: a product for the inputs' gradient and one for the weights'. Activations:
what autograd keeps between the two, tensor by tensor in the order of model.py, with its sdpa backend.

Left out: the temporaries of a backward pass, the allocator's waste, activation recomputation.

Papers: Kaplan 2020 (2001.08361, section 2.1) for the counting, Chowdhery 2022 (2204.02311, appendix B) for MFU,
Korthikanti 2022 (2205.05198, section 4) for activations, Williams 2009 (Roofline) for intensity against ridge point.
"""
import sys
from dataclasses import dataclass, fields

import torch

from configurator import fail, format_help, parse_flags, read_config_file, resolve
from machine import DEVICES, find_device
from model import PRESETS, ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = {"adamw": 2, "muon": 1, "sgd": 0}  # float32 numbers an optimizer keeps for each parameter (muon: its matrices)


# --- parameters ---

def count_params(config: ModelConfig) -> dict:
    """Trained numbers by part, and their "total". A tied head counts once, under token_embeddings."""
    c, C = config, config.d_model
    norm = {"rms": C, "layer": C * (1 + c.bias), "none": 0}[c.norm]
    block = _block_params(c) | {"norms": 2 * norm}
    parts = {
        "token_embeddings": c.vocab_size * C,
        "position_embeddings": c.context_length * C if c.position == "learned" else 0,
        "smear_gate": C * c.smear}
    parts |= {name: c.n_layers * n for name, n in block.items()}
    parts["norms"] += norm * (c.norm_position == "pre")
    parts["mtp"] = c.mtp_depth * (sum(block.values()) + 2 * C + 2 * C * C)
    parts["lm_head"] = 0 if c.tie_embeddings else c.vocab_size * C
    return parts | {"total": sum(parts.values())}


def _block_params(c: ModelConfig) -> dict:
    """Attention, feed-forward (of which router, experts) of one block."""
    C, H, K, D = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    if c.attention == "mla":
        R, P = c.kv_lora_rank, c.rope_head_dim
        q_in = c.q_lora_rank or C
        attention = q_in * H * (D + P) + C * (R + P) + R + R * H * 2 * D + H * D * C
        attention += (C * q_in + q_in if c.q_lora_rank else 0) + c.bias * (R + P + C + (c.q_lora_rank or 0))
    else:
        attention = C * (H + 2 * K) * D + H * D * C + 2 * D * c.qk_norm
        attention += (H + 2 * K) * D * (c.bias or c.qkv_bias) + C * c.bias
    if not c.n_experts:
        return {"attention": attention, "feed_forward": _ffn_params(c, c.d_ff)}
    shared = _ffn_params(c, c.n_shared_experts * c.d_ff_expert) if c.n_shared_experts else 0
    return {
        "attention": attention, "router": C * c.n_experts,
        "feed_forward": c.n_experts * _ffn_params(c, c.d_ff_expert) + shared}


def _ffn_params(c: ModelConfig, width: int) -> int:
    matrices = 3 if c.ffn == "swiglu" else 2
    return matrices * c.d_model * width + c.bias * ((matrices - 1) * width + c.d_model)


def active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts it is not sent to, and the heads used in training only."""
    counts, c = count_params(config), config
    idle = c.n_layers * (c.n_experts - c.n_experts_per_token) * _ffn_params(c, c.d_ff_expert) if c.n_experts else 0
    return counts["total"] - counts["mtp"] - idle


# --- FLOPs ---

def flops_per_token(config: ModelConfig, context_length: int, training: bool = False, causal: bool = False) -> dict:
    """FLOPs of one token in a sequence of context_length, by part, and their "total".

    Forward only; with training=True forward and backward, three times that, and the multi-token prediction heads.
    causal: count the pairs of positions that may attend instead of the whole square. A sliding layer is counted with
    its window either way.
    """
    c, T = config, context_length
    block = [_block_flops(c, _keys(T, window, causal)) for window in c.windows]
    parts = {name: sum(one[name] for one in block) for name in block[0]}
    parts["logits"] = 2 * c.d_model * c.vocab_size
    if training and c.mtp_depth:
        parts["mtp"] = 0.0
        for left in range(T - 1, T - 1 - c.mtp_depth, -1):         # positions that have a token k + 1 places on
            full = sum(_block_flops(c, _keys(left, None, causal)).values())
            parts["mtp"] += (4 * c.d_model ** 2 + full + parts["logits"]) * left / T
    parts = {name: (3 if training else 1) * n for name, n in parts.items()}
    return parts | {"total": sum(parts.values())}


def _keys(T: int, window: int | None, causal: bool) -> float:
    """How many keys a query is multiplied with, on average over a sequence of T."""
    seen = min(window or T, T)
    # The first `seen` queries see 1, 2, …, seen keys; the others all of the window.
    return (seen * (seen + 1) / 2 + (T - seen) * seen) / T if causal else seen


def _block_flops(c: ModelConfig, keys: float) -> dict:
    C, H, K, D = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    if c.attention == "mla":
        R, P = c.kv_lora_rank, c.rope_head_dim
        weights = (c.q_lora_rank or C) * H * (D + P) + C * (c.q_lora_rank or 0)
        weights += C * (R + P) + R * H * 2 * D + H * D * C
        scores = 2 * keys * H * (D + P) + 2 * keys * H * D
    else:
        weights, scores = C * (2 * H + 2 * K) * D, 4 * keys * H * D
    matrices = 3 if c.ffn == "swiglu" else 2
    width = (c.n_experts_per_token + c.n_shared_experts) * c.d_ff_expert if c.n_experts else c.d_ff
    feed_forward = 2 * matrices * C * width + 2 * C * c.n_experts
    return {"attention_projections": 2 * weights, "feed_forward": feed_forward, "attention_scores": scores}


# --- bytes ---

def memory_bytes(config: ModelConfig, batch_size: int = 1, context_length: int | None = None, dtype: str = "float32",
                 optimizer: str | None = "adamw") -> dict:
    """Bytes of a training step by part, and their "total"; with optimizer=None those of running the model only.

    dtype: of the activations, by autocast; in training, weights, gradients and optimizer state stay in float32.
    Without an optimizer the weights are in `dtype` and the cache of batch_size full contexts takes the place of
    activations. Raises ValueError for a dtype or an optimizer that is not known.
    """
    if dtype not in BYTES or optimizer not in (None, *STATES):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(BYTES)}, optimizer={optimizer!r} one of "
                         f"{', '.join(STATES)} or None")
    T, n = context_length or config.context_length, count_params(config)["total"]
    if optimizer is None:
        parts = {"weights": n * BYTES[dtype], "kv_cache": batch_size * kv_cache_bytes(config, T, dtype)}
    else:
        parts = {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * n * STATES[optimizer],
                 "activations": batch_size * activation_bytes(config, T, dtype)}
    return parts | {"total": sum(parts.values())}


def activation_bytes(config: ModelConfig, T: int, dtype: str = "float32") -> int:
    """Bytes that autograd keeps of one sequence between forward and backward, with the sdpa backend, line by line in
    order.
    """
    c, C, low = config, config.d_model, BYTES[dtype]
    stream = max(4, low)             # the residual stream and what a norm saves stay float32 under autocast
    per_token = C * stream * c.smear                              # the embedding of the token before
    for _ in range(c.n_layers + c.mtp_depth):
        per_token += 2 * _norm_bytes(c, C, stream, low) + _attention_bytes(c, low) + _ffn_bytes(c, low)
    per_token += c.mtp_depth * (2 * _norm_bytes(c, C, stream, 0) + 2 * C * low)
    logits = c.vocab_size * low + 4 + (0 if c.logit_softcap is None else c.vocab_size * low)
    if c.fused_loss:
        logits = C * low             # only the gradient with respect to the head's input, made at once
    # Every depth of multi-token prediction has its own final norm and logits.
    per_token += (1 + c.mtp_depth) * (logits +
                                      (_norm_bytes(c, C, stream, low) if c.norm_position == "pre" else C * low))
    return round(T * per_token)


def _norm_bytes(c, width: int, stream: int, low: int) -> int:
    """The norm's input and factor, and its output, which the next matrix product keeps, in that product's dtype."""
    return {"rms": width * stream + 4, "layer": 2 * width * stream + 4, "none": 0}[c.norm] + width * low


def _attention_bytes(c, low: int) -> int:
    H, K, D = c.n_heads, c.n_kv_heads, c.head_dim
    if c.attention == "mla":
        R, P = c.kv_lora_rank, c.rope_head_dim
        latents = R * low * 2 + 4 + ((c.q_lora_rank or 0) * low * 2 + 4 if c.q_lora_rank else 0)
        return latents + low * (4 * H * (D + P) + H * D) + 4 * H # values and output are padded to the keys' width
    normed = (H + K) * (D * low + 4) if c.qk_norm else 0         # q and k before their norm, kept for it
    return normed + low * (2 * H + 2 * K) * D + 4 * H            # q, k, v, the output and its log-sum-exp


def _ffn_bytes(c, low: int) -> int:
    # swiglu: gate, up and their product. The others keep what their formula goes through.
    kept = {"swiglu": 3, "silu": 3, "gelu": 5, "relu2": 2}[c.ffn]
    if not c.n_experts:
        return kept * c.d_ff * low
    routed = c.n_experts_per_token * (kept * c.d_ff_expert * low + 2 * c.d_model * low)
    routing = 12 * c.n_experts + 32 * c.n_experts_per_token      # scores, and who goes where
    return routed + kept * c.n_shared_experts * c.d_ff_expert * low + routing


def kv_cache_bytes(config: ModelConfig, length: int, dtype: str = "bfloat16") -> int:
    """Bytes that one sequence of `length` must keep: all positions in full layers, the last window in sliding ones.

    Keys and values of K heads in each layer (MHA: all H, GQA: some, MQA: one), or MLA's latent and rotary key.
    """
    c = config
    width = c.kv_lora_rank + c.rope_head_dim if c.attention == "mla" else 2 * c.n_kv_heads * c.head_dim
    return sum(min(length, window or length) for window in c.windows) * width * BYTES[dtype]


def largest_batch(config: ModelConfig, memory: float, context_length: int | None = None, dtype: str = "float32",
                  optimizer: str | None = "adamw") -> int:
    """Most sequences whose training step (or, without optimizer, whose caches) fits `memory` bytes; 0 when the
    weights alone do not.
    """
    none, one = (memory_bytes(config, n, context_length, dtype, optimizer)["total"] for n in (0, 1))
    return max(0, int((memory - none) // (one - none)))


# --- time and money ---

def training_hours(config: ModelConfig, tokens: float, device: str, mfu: float = 0.4, n_devices: int = 1,
                   context_length: int | None = None) -> float:
    """Hours to train on `tokens` when the share `mfu` of the devices' peak goes into the model's FLOPs (2204.02311,
    appendix B).
    """
    flops = flops_per_token(config, context_length or config.context_length, training=True)["total"] * tokens
    return flops / (find_device(device).flops * mfu * n_devices) / 3600


def intensity(config: ModelConfig, batch_size: int, context_length: int, dtype: str = "bfloat16") -> dict:
    """FLOPs per byte moved of prefill (a whole context) and decode (one more token a sequence).

    Either reads all weights once (with experts: those that batch_size tokens meet, all for prefill) and writes or
    reads the cache; activations are left out. Below the device's ridge point, FLOP/s over byte/s, memory is what
    takes the time.
    """
    weights = (count_params(config)["total"] - count_params(config)["mtp"]) * BYTES[dtype]
    met = weights if not config.n_experts else min(weights, batch_size * active_params(config) * BYTES[dtype])
    cache = batch_size * kv_cache_bytes(config, context_length, dtype)
    one = flops_per_token(config, context_length)["total"] * batch_size
    return {"prefill": one * context_length / (weights + cache), "decode": one / (met + cache)}


def communication(config: ModelConfig, batch_tokens: int, ranks: int, flops: float, link_bytes_per_s: float,
                  dtype: str = "bfloat16", context_length: int | None = None) -> dict:
    """What parallel.py's strategies send: {"DDP" | "FSDP" | "tensor parallel": {"bytes", "ms", "compute_ms",
    "largest"}}.

    bytes, ms: sent by one rank in one step of batch_tokens over all ranks, by rings; compute_ms: the step's
    arithmetic on one rank at `flops` FLOP/s, for comparison. largest: most ranks before sending takes longer than
    what it can hide behind (DDP: backward; FSDP: each pass its own; tensor parallel hides behind nothing, so: its own
    arithmetic). Sending grows as (W-1)/W and arithmetic falls as 1/W, so each is W - 1 <= arithmetic of one rank
    alone / bytes.

    DDP: 2 N (W-1)/W of float32 gradients. FSDP: 3 N (W-1)/W in `dtype`, two gathers and a reduce-scatter. Tensor
    parallel: 4 all-reduces a block of (tokens, C), 8 (W-1)/W times its bytes; embedding and loss left out.
    """
    c, n, low = config, count_params(config)["total"], BYTES[dtype]
    forward = flops_per_token(c, context_length or c.context_length)["total"] * batch_tokens / flops  # s on one rank
    activations = 8 * c.n_layers * batch_tokens * c.d_model * low
    costs = {
        "DDP": (2 * 4 * n, 2 * forward), "FSDP": (3 * low * n, 3 * forward),
        "tensor parallel": (activations, 3 * forward)}
    return {name: {"bytes": sent * (ranks - 1) / ranks, "ms": 1000 * sent * (ranks - 1) / ranks / link_bytes_per_s,
                   "compute_ms": 3000 * forward / ranks, "largest": 1 + int(hides * link_bytes_per_s / sent)}
            for name, (sent, hides) in costs.items()}


# --- number formats ---

def number_formats() -> list[dict]:
    """float32, float16, bfloat16: bits, largest, smallest normal and subnormal number, spacing above 1."""
    return [{
        "dtype": str(kind).removeprefix("torch."), "bits": info.bits, "largest": info.max, "smallest_normal": info.tiny,
        "smallest": info.smallest_normal * info.eps, "spacing_at_1": info.eps}
            for kind in (torch.float32, torch.float16, torch.bfloat16) for info in [torch.finfo(kind)]]


def format_demonstration() -> list[tuple[str, float, float, float]]:
    """(what, float32, float16, bfloat16): the same arithmetic in each."""
    def each(compute):
        return [float(compute(kind)) for kind in (torch.float32, torch.float16, torch.bfloat16)]

    def slow_sum(kind):
        total = torch.zeros((), dtype=kind)
        for _ in range(1000):
            total += torch.tensor(0.001, dtype=kind)
        return total
    return [("300 * 300 (a squared activation)", *each(lambda kind: torch.tensor(300.0, dtype=kind)**2)),
            ("1e-8 (a small gradient)", *each(lambda kind: torch.tensor(1e-8, dtype=kind))),
            ("1 + 0.001 (a weight and its update)",
             *each(lambda kind: torch.tensor(1.0, dtype=kind) + torch.tensor(0.001, dtype=kind))),
            ("0.001 added 1,000 times", *each(slow_sum))]


# --- the OPT table ---

# Shares of FLOPs in percent (MHA, FFN, attention, logits) that were published for OPT's sizes (S. Roller 2022; shown in
# CS336, lecture 3); layers and width are those of 2205.01068, table 1, and for 760M of GPT-3 (2005.14165, table 2.1).
OPT = {
    "760M": (24, 1536, 35, 44, 14.8, 5.8), "1.3B": (24, 2048, 32, 51, 12.7, 5.0), "2.7B": (32, 2560, 29, 56, 11.2, 3.3),
    "6.7B": (32, 4096, 24, 65, 8.1, 2.4), "13B": (40, 5120, 22, 69, 6.9, 1.6), "30B": (48, 7168, 20, 74, 5.3, 1.0),
    "66B": (64, 9216, 18, 77, 4.3, 0.6), "175B": (96, 12_288, 17, 80, 3.3, 0.3)}


def opt_shares(name: str) -> dict:
    """Percent by part, three times: "published", "ours" (2 FLOPs a weight), "refitted".

    In the published table MHA falls against FFN from 0.8 to 0.2 although both cost a multiple of d² a token (8 d² and
    16 d²), so it cannot be the four projections. All its rows are met within rounding by MHA = 2 d² + 8 T d, FFN = 16
    d², attention = 4 T d, and logits at three quarters of 2 V d, as when blocks are recomputed in the backward pass
    (four passes instead of three) and the head is not. That is our inference ("refitted"), not its author's word.
    """
    layers, d, *published = OPT[name]
    T, V = 2048, 50_272              # context and padded vocabulary of OPT
    refitted = [layers * (2 * d * d + 8 * T * d), layers * 16 * d * d, layers * 4 * T * d, 1.5 * V * d]
    # How the width is cut into heads changes no FLOP.
    config = ModelConfig(vocab_size=V, context_length=T, d_model=d, n_layers=layers, n_heads=d // 64, ffn="gelu")
    counts = flops_per_token(config, T)
    ours = [counts[part] for part in ("attention_projections", "feed_forward", "attention_scores", "logits")]
    return {
        "published": published, "ours": [100 * n / sum(ours) for n in ours],
        "refitted": [100 * n / sum(refitted) for n in refitted]}


# --- the command ---

@dataclass
class Bill(ModelConfig):
    """A model and what it is to be used for."""
    batch_size: int = 1              # sequences at a time
    dtype: str = "bfloat16"          # float32 | bfloat16 | float16, of activations and of the weights that only run
    optimizer: str = "adamw"         # adamw | muon | sgd
    device: str = "H100"             # see DEVICES in accounting.py
    n_devices: int = 1               # how many of it
    tokens: float | None = None      # to train on; none = 20 a parameter (2203.15556)
    mfu: float = 0.4                 # share of the peak that goes into the model's FLOPs
    dollars_per_hour: float | None = None    # of one device; none = no price
    batch_tokens: int = 524_288      # of one training step over all devices
    link_gb_per_s: float = 450.0     # what a device can send: NVLink 4 (H100 data sheet) 450, InfiniBand NDR 50


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print right-aligned columns under a title."""
    def text(cell):
        return cell if isinstance(cell, str) else f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}"

    cells = [header] + [[text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for first, *others in cells:
        print(f"  {first:<{widths[0]}}", *(f" {cell:>{width}}" for cell, width in zip(others, widths[1:])))


def shares(counts: dict) -> list[list]:
    return [[name, n, f"{100 * n / counts['total']:.1f} %"] for name, n in counts.items() if n]


def print_bill(bill: Bill) -> None:
    """Print every table of one model."""
    c, T, device = bill, bill.context_length, find_device(bill.device)
    counts, n = count_params(c), count_params(c)["total"]
    table(f"parameters ({active_params(c):,} of them active for a token)", ["part", "count", "share"], shares(counts))
    forward, trained = flops_per_token(c, T), flops_per_token(c, T, training=True)
    once = [forward.get(name, 0) for name in trained]
    table(f"MFLOP per token at context {T:,}", ["part", "forward", "backward", "share"],
          [[name, one / 1e6, (flops - one) / 1e6, f"{100 * flops / trained['total']:.1f} %"]
           for (name, flops), one in zip(trained.items(), once)])
    print(f"  forward over one sequence: {forward['total'] * T / 1e12:.4g} TFLOP; causal pairs only: "
          f"{flops_per_token(c, T, causal=True)['total'] * T / 1e12:.4g} TFLOP")
    kinds = ("weights", "gradients", "optimizer", "activations", "total")
    rows = []
    for kind in ("float32", "bfloat16"):
        memory = memory_bytes(c, bill.batch_size, T, kind, bill.optimizer)
        rows.append([f"train, {kind}", *(f"{memory[part] / 1e9:.3f}" for part in kinds),
                     largest_batch(c, device.memory_bytes, T, kind, bill.optimizer)])
    table(f"training memory in GB at batch {bill.batch_size}, {bill.optimizer}; largest batch in "
          f"{device.memory_bytes / 1e9:.0f} GB ({bill.device})", ["", *kinds, "largest batch"], rows)
    table(f"KV cache in {bill.dtype}",
          ["", "bytes per token", f"MB at {T:,}", f"sequences beside the weights on {bill.device}"],
          [[name, kv_cache_bytes(one, 1, bill.dtype), kv_cache_bytes(one, T, bill.dtype) / 1e6,
            largest_batch(one, device.memory_bytes, T, bill.dtype, None)] for name, one in cache_variants(c).items()])
    ridge, rows = device.flops / device.bytes_per_s, []
    for batch in sorted({1, bill.batch_size, 64, 512}):
        bounds = intensity(c, batch, T, bill.dtype).values()
        rows.append([f"batch {batch}", *(f"{x:,.1f} ({'compute' if x > ridge else 'memory'})" for x in bounds)])
    table(f"FLOPs per byte, and what bounds it; ridge point of {bill.device}: {ridge:.0f}", ["", "prefill", "decode"],
          rows)
    ranks = max(2, bill.n_devices)
    sent = communication(c, bill.batch_tokens, ranks, device.flops * bill.mfu, bill.link_gb_per_s * 1e9, bill.dtype, T)
    table(f"sent by each of {ranks} ranks in a step of {bill.batch_tokens:,} tokens over {bill.link_gb_per_s:g} GB/s; "
          "largest: most ranks before it shows", ["", "MB", "ms", "arithmetic, ms", "largest"],
          [[name, one["bytes"] / 1e6, one["ms"], one["compute_ms"], one["largest"]] for name, one in sent.items()])
    tokens = bill.tokens or 20 * n
    hours = training_hours(c, tokens, bill.device, bill.mfu, bill.n_devices, T)
    money = "" if bill.dollars_per_hour is None else f", {hours * bill.n_devices * bill.dollars_per_hour:,.0f} dollars"
    print(f"\ntraining on {tokens:.4g} tokens: {trained['total'] * tokens:.4g} FLOP, {hours:,.2f} hours on "
          f"{bill.n_devices} {bill.device} at {100 * bill.mfu:.0f} % MFU{money}")
    print(f"peak of {bill.device}: {device.flops / 1e12:.0f} TFLOP/s, {device.bytes_per_s / 1e12:.2f} TB/s "
          f"({device.source})")


def cache_variants(c: ModelConfig) -> dict:
    """The model beside itself with other kinds of attention, for its cache."""
    own = {field.name: getattr(c, field.name) for field in fields(ModelConfig)}
    variants = {"this model": c}
    if c.attention == "standard":
        for K in sorted({1, c.n_heads}):
            variants[f"with {K} key/value heads"] = ModelConfig(**own | {"n_kv_heads": K})
        if c.position == "rope" and not (c.qk_norm or c.qkv_bias):
            variants["with attention=mla"] = ModelConfig(
                **own | {"n_kv_heads": c.n_heads, "attention": "mla", "attention_backend": "sdpa"})
    return variants


def print_lessons() -> None:
    """What holds for every model: the OPT table and the number formats."""
    rows = [[name, *(" / ".join(f"{x:.1f}" for x in three) for three in zip(*opt_shares(name).values()))]
            for name in OPT]
    table("OPT, percent of FLOPs: as published / by our count / by what fits the published (see opt_shares)",
          ["", "MHA", "FFN", "attention", "logits"], rows)
    table("number formats", ["dtype", "bits", "largest", "smallest normal", "smallest", "spacing at 1"],
          [[row["dtype"], row["bits"], *(f"{row[key]:.4g}" for key in list(row)[2:])] for row in number_formats()])
    table("the same arithmetic in each", ["", "float32", "float16", "bfloat16"],
          [[what, *(f"{x:.6g}" for x in results)] for what, *results in format_demonstration()])


def main(argv: list[str]) -> None:
    """Print the bill of one command line."""
    usage = f"python accounting.py CONFIG_OR_PRESET [--key=value …]\npresets: {', '.join(PRESETS)}"
    if any(word in ("--help", "-h") for word in argv):
        print(format_help(Bill, usage))
        return
    try:
        flags, words = parse_flags(argv)
        given = PRESETS.get(words[0], {}) if len(words) == 1 else {}
        if len(words) > 1 or words and not given and not words[0].endswith(".py"):
            raise ValueError(
                f"{' '.join(words)!r} is neither one config file nor one preset; presets: {', '.join(PRESETS)}")
        if words and not given:
            given = read_config_file(words[0])
            own = {field.name for field in fields(Bill)}
            left = [key for key in given if key not in own]
            given = {key: value for key, value in given.items() if key in own}
            if left:
                print(f"settings of training that cost nothing here, left aside: {', '.join(left)}")
        bill, _ = resolve(Bill, given | flags)
        for name, allowed in (("dtype", BYTES), ("optimizer", STATES), ("device", DEVICES)):
            if getattr(bill, name) not in allowed:
                raise ValueError(f"{name}={getattr(bill, name)!r} must be one of {', '.join(allowed)}")
        if bill.batch_tokens < 1 or not bill.link_gb_per_s > 0:
            raise ValueError(
                f"batch_tokens={bill.batch_tokens} must be at least 1, link_gb_per_s={bill.link_gb_per_s} above 0")
        if not 0 < bill.mfu <= 1 or bill.n_devices < 1 or bill.batch_size < 1:
            raise ValueError(f"mfu={bill.mfu} must be above 0 and at most 1, n_devices={bill.n_devices} and "
                             f"batch_size={bill.batch_size} at least 1")
        print_bill(bill)
    except (ValueError, OSError) as error:
        fail(error)
    print_lessons()


if __name__ == "__main__":
    main(sys.argv[1:])
