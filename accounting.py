"""The bill before the run: parameters, FLOPs, bytes and seconds of a model, each by part.

    python accounting.py gpt2-xl                              a preset (below), a config_x.py, or --d_model=… alone
    python accounting.py config_owt.py --vocab_size=32000 --tokens=3e9 --n_devices=8

Where 6 N D comes from. A product of (m, k) with (k, n) takes 2 m n k FLOPs, so a matrix of n numbers costs a token 2 n.
A block of GPT-2 has four projections of C x C and a feed-forward of C x 4C and 4C x C, 12 C² numbers: forward 24 C² a
token, and 4 T C more for q·k and the weighted sum of T values. Backward costs twice that, one product for the gradient
of the inputs and one for that of the weights. Three times 2 N is 6 N a token, 6 N D for D tokens (2001.08361).

    GPT-2 small, C 768, T 1,024, V 50,257, 12 layers      numbers     MFLOP a token, forward   with backward
    attention projections       12 · 4 C²                 28,311,552                    56.6           169.9
    feed-forward                12 · 8 C²                 56,623,104                   113.2           339.7
    attention scores            12 · 4 T C                         0                    37.7           113.2
    logits (tied embedding)     V C                       38,597,376                    77.2           231.6
    all; 6 N = 746.6 (N = 124,439,808) has no scores                                   284.8           854.4

Scores count over the whole T x T square, as in the literature; a causal flash kernel does half. Left out: norms,
softmax and activation functions (a percent of the arithmetic), temporaries of the backward pass, the allocator's waste.
The roofline (Williams 2009): a chip of F FLOP/s that reads W bytes/s is busy only from F / W FLOPs a byte on (H100:
295). Decoding one sequence in bfloat16 does 2 FLOPs for the 2 bytes of a weight: a larger batch is nearly free.
"""
import math
import sys
from dataclasses import dataclass

from configurator import command_line, fail, nearest, read_config_file
from machine import DEVICES
from model import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = {"adamw": 2, "muon": 1, "sgd": 1, "adagrad": 1, "rmsprop": 1}    # float32 numbers kept for each parameter

# Published shapes. gpt2: Radford 2019. llama: 2407.21783. qwen3: 2505.09388. small … 10b: CS336 (2026), assignment 2.
_GPT2 = dict(vocab_size=50_257, norm="layer", position="learned", ffn="gelu", bias=True, tie_embeddings=True)
PRESETS = {
    "gpt2": _GPT2 | dict(context_length=1024, d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": _GPT2 | dict(context_length=1024, d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": _GPT2 | dict(context_length=1024, d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": _GPT2 | dict(context_length=1024, d_model=1600, n_layers=48, n_heads=25),
    "llama-3.1-8b": dict(vocab_size=128_256, context_length=131_072, d_model=4096, n_layers=32, n_heads=32,
                         n_kv_heads=8, d_ff=14_336, rope_theta=5e5, rope_factor=8.0),
    "qwen3-0.6b": dict(vocab_size=151_936, context_length=40_960, d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8,
                       head_dim=128, d_ff=3072, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tie_embeddings=True),
    "small": dict(context_length=512, d_model=768, d_ff=3072, n_layers=12, n_heads=12),
    "medium": dict(context_length=512, d_model=1024, d_ff=4096, n_layers=24, n_heads=16),
    "large": dict(context_length=512, d_model=1280, d_ff=5120, n_layers=36, n_heads=20),
    "xl": dict(context_length=512, d_model=2560, d_ff=10_240, n_layers=32, n_heads=32),
    "10b": dict(context_length=512, d_model=4608, d_ff=12_288, n_layers=50, n_heads=36)}


def preset(name: str, **changes) -> ModelConfig:
    """The published shape of that name, with changes: preset("gpt2", context_length=512)."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return ModelConfig(**PRESETS[name] | changes)


def count_params(config: ModelConfig) -> dict:
    """Trained numbers by part, and their "total". A tied head counts once, under token_embeddings."""
    c, C = config, config.d_model
    norm = {"rms": C, "layer": C * (1 + c.bias), "none": 0}[c.norm]
    block = _block_params(c) | {"norms": 2 * norm}
    parts = {"token_embeddings": c.vocab_size * C, "smear_gate": C * c.smear,
             "position_embeddings": c.context_length * C if c.position == "learned" else 0}
    parts |= {name: c.n_layers * n for name, n in block.items()}
    parts["norms"] += norm * (c.norm_position == "pre")
    parts["mtp"] = c.mtp_depth * (sum(block.values()) + 2 * C + 2 * C * C)
    parts["lm_head"] = 0 if c.tie_embeddings else c.vocab_size * C
    return parts | {"total": sum(parts.values())}


def _block_params(c: ModelConfig, active: bool = False) -> dict:
    """Numbers of one block by part; vectors: biases and QK-norms. active: only those experts that one token meets."""
    C, H, K, D = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
    if c.attention == "mla":
        R, P, Q = c.kv_lora_rank, c.rope_head_dim, c.q_lora_rank or 0
        queries = Q * (C + H * (D + P)) if Q else C * H * (D + P)
        attention = queries + C * (R + P) + R * H * 2 * D + H * D * C
        vectors = R + Q + c.bias * (R + P + C + Q)
    else:
        attention = C * (H + 2 * K) * D + H * D * C
        vectors = 2 * D * c.qk_norm + (H + 2 * K) * D * (c.bias or c.qkv_bias) + C * c.bias
    experts = c.n_experts_per_token if active else c.n_experts
    shared = [c.n_shared_experts * c.d_ff_expert] if c.n_shared_experts else []
    widths = [c.d_ff_expert] * experts + shared if c.n_experts else [c.d_ff]
    n = 3 if c.ffn == "swiglu" else 2          # matrices; all but the last have a bias as wide as the layer
    vectors += c.bias * sum((n - 1) * width + C for width in widths)
    return {"attention": attention, "router": C * c.n_experts, "feed_forward": n * C * sum(widths), "vectors": vectors}


def flops_per_token(config: ModelConfig, context_length: int, training: bool = False) -> dict:
    """FLOPs of one token in a sequence of context_length, by part, and their "total": forward only; with training=True
    forward and backward, three times that, and the multi-token prediction heads."""
    c, T = config, context_length
    blocks = [_block_flops(c, min(window or T, T)) for window in c.windows]
    parts = {name: sum(block[name] for block in blocks) for name in blocks[0]}
    parts["logits"] = 2 * c.d_model * c.vocab_size
    if training:
        if c.mtp_depth:
            block = sum(_block_flops(c, T).values())
            parts["mtp"] = c.mtp_depth * (4 * c.d_model ** 2 + block + parts["logits"])
        parts = {name: 3 * n for name, n in parts.items()}
    return parts | {"total": sum(parts.values())}


def _block_flops(c: ModelConfig, keys: int) -> dict:
    """Forward FLOPs of a token in one block, whose query meets so many keys."""
    matrices = _block_params(c, active=True)
    rotary = c.rope_head_dim if c.attention == "mla" else 0
    return {"attention_projections": 2 * matrices["attention"],
            "feed_forward": 2 * (matrices["feed_forward"] + matrices["router"]),
            "attention_scores": 2 * keys * c.n_heads * (2 * c.head_dim + rotary)}


def memory_bytes(config: ModelConfig, batch_size: int = 1, context_length: int | None = None, dtype: str = "float32",
                 optimizer: str = "adamw") -> dict:
    """Bytes of a training step by part, and their "total". dtype: of the activations, by autocast; all else is float32.
    Muon keeps one moment of the blocks' matrices; the embedding, the head and vectors run AdamW and keep two."""
    c, n, params = config, count_params(config)["total"], _block_params(config)
    moments = n * STATES[optimizer]
    if optimizer == "muon":
        moments += n - (c.n_layers + c.mtp_depth) * (sum(params.values()) - params["vectors"])
    block, outside = activation_bytes(c, dtype)
    parts = {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * moments,
             "activations": batch_size * (context_length or c.context_length) * (c.n_layers * block + outside)}
    return parts | {"total": sum(parts.values())}


def activation_bytes(config: ModelConfig, dtype: str = "float32") -> tuple[int, int]:
    """Bytes that autograd keeps of one token for backward, with sdpa: (in each block, outside). Source: 2205.05198.
    Left out: routing, further heads, and that latent attention (MLA) keeps more than the standard one."""
    c, low, C = config, BYTES[dtype], config.d_model
    H, K, D = c.n_heads, c.n_kv_heads, c.head_dim
    # A norm's input and factor, in float32 also under autocast; its output in the dtype of the next product.
    norm = {"rms": 4 * C + 4, "layer": 8 * C + 4, "none": 0}[c.norm] + C * low
    attention = low * (2 * H + 2 * K) * D + 4 * H                # q, k, v, the output and its log-sum-exp
    attention += c.qk_norm * (H + K) * (D * low + 4)
    width = c.d_ff if not c.n_experts else (c.n_experts_per_token + c.n_shared_experts) * c.d_ff_expert
    kept = {"swiglu": 3, "silu": 3, "gelu": 3, "relu2": 2}[c.ffn]                    # swiglu: gate, up, their product
    logits = c.vocab_size * low * (1 if c.logit_softcap is None else 2) + 4
    if c.fused_loss:
        logits = C * low                                 # only the gradient of the head's input, made at once
    final = norm if c.norm_position == "pre" else C * low
    return 2 * norm + attention + kept * width * low, 4 * C * c.smear + final + logits


def kv_cache_bytes(config: ModelConfig, length: int, dtype: str = "bfloat16") -> int:
    """Bytes of a sequence's keys (shift_keys: twice) and values, or MLA's latent and rotary key, in all layers."""
    c = config
    width = c.kv_lora_rank + c.rope_head_dim if c.attention == "mla" else (2 + c.shift_keys) * c.n_kv_heads * c.head_dim
    return sum(min(length, window or length) for window in c.windows) * width * BYTES[dtype]


def largest_batch(config: ModelConfig, memory: float, **more) -> int:
    """Most sequences whose training step fits `memory` bytes; 0 when none does. more: as of memory_bytes."""
    none, one = (memory_bytes(config, n, **more)["total"] for n in (0, 1))
    return max(0, int((memory - none) // (one - none)))


def checkpoint_plan(n_layers: int, levels: int, block_bytes: float, input_bytes: float) -> dict:
    """The nesting of checkpoints in equal groups, at most `levels` deep, that needs least memory (1604.06174).

    A checkpoint keeps a group's input and computes the inside again in backward. Of groups of k1 > k2 > … blocks N/k1
    inputs are kept; while one group is in backward, those of its k1/k2 subgroups too; in the smallest, k blocks.

        no level         N blocks                                        3 passes: forward 1, backward 2
        one level        N/k inputs + k blocks, k near sqrt(N i/b)       4 passes
        log2 N levels    halves of halves: log2 N inputs + 1 block       3 + log2 N passes at most

    block_bytes, input_bytes: what autograd keeps of a block, b, and its input alone, i. Returns sizes, outermost first;
    bytes; recomputed, blocks computed again; flops, where 1 is a step without checkpoints.
    """
    plans = [{"sizes": (), "bytes": n_layers * block_bytes, "recomputed": 0}]
    divisors = [k for k in range(1, n_layers) if n_layers % k == 0] if levels else []
    for k in divisors:
        group, n_groups = checkpoint_plan(k, levels - 1, block_bytes, input_bytes), n_layers // k
        # A first subgroup's input is the group's. The last is not run when the group is entered: torch stops before it.
        last = group["sizes"][0] if group["sizes"] else 0
        plans.append({"sizes": (k, *group["sizes"]), "bytes": group["bytes"] + (n_groups - 1) * input_bytes,
                      "recomputed": n_groups * (k - last + group["recomputed"])})
    best = min(plans, key=lambda plan: (plan["bytes"], plan["recomputed"]))
    return best | {"flops": 1 + best["recomputed"] / (3 * n_layers)}


def training_hours(config: ModelConfig, tokens: float, device: str, mfu: float = 0.4, n_devices: int = 1) -> float:
    """Hours to train on `tokens` when the share `mfu` of the devices' peak goes into the model's FLOPs (2204.02311)."""
    flops = flops_per_token(config, config.context_length, training=True)["total"] * tokens
    return flops / (DEVICES[device].flops * mfu * n_devices) / 3600


def data_parallel_cost(work, batch_tokens, ranks, *machine) -> dict:
    """DDP all-reduces its gradients in backward, two rounds. Arithmetic falls as 1/N, messages do not: they hide while
    N <= 1 + B W / C (a SwiGLU layer, 2 bytes a number), however large the layer. machine: as of fsdp_cost."""
    return fsdp_cost(work, batch_tokens, ranks, *machine, rounds=(0, 2))


def tensor_parallel_cost(work, batch_tokens, ranks, *machine) -> dict:
    """Tensor parallelism all-reduces (B, d_model) a layer in each pass (Megatron's f and g), two layers a block;
    embedding and head send nothing and count as divided. B cancels out: N <= 1 + 3 d_ff W / 2 C."""
    return fsdp_cost(work, batch_tokens, 1, *machine, tp=ranks, rounds=(0, 0))


def fsdp_cost(work, batch_tokens, ranks, flops_per_s, link_bytes_per_s, dtype="bfloat16", tp=1, rounds=(1, 2)) -> dict:
    """A step on one rank: what it computes, what it sends, and from where on the first hides the second.

    work: a ModelConfig, or (d_model, d_ff) for one SwiGLU layer. B: batch_tokens of all N ranks. C: flops_per_s that a
    rank reaches. W: link_bytes_per_s that it can send. dtype: of messages. rounds: how often all weights (or gradients)
    go round the ring in forward and in backward, (N-1)/N of their bytes each time (1910.02054); FSDP gathers weights in
    forward, and in backward again, where it also reduces gradients. tp: each rank is a group of so many, which divides
    the matrices; both kinds of message travel at the same time, and most_ranks is FSDP's.
    Returns {"forward", "backward", "step"}, each with flops, bytes, compute_s, communication_s, seconds (the longer of
    the two), and the smallest_batch and most_ranks that hide the messages. A step adds its passes up.
    """
    if isinstance(work, ModelConfig):
        params, flops = count_params(work)["total"], flops_per_token(work, work.context_length)["total"]
        reduced = 2 * work.n_layers * work.d_model       # numbers a token that tensor parallelism all-reduces in a pass
    else:
        params, flops, reduced = 3 * work[0] * work[1], 6 * work[0] * work[1], work[0]
    ways, share = [], batch_tokens / (ranks * tp)
    for passes, times in ((1, rounds[0]), (2, rounds[1])):
        # Seconds: the arithmetic of a token on one rank; to send all weights round a long ring, and a token's numbers.
        compute = passes * flops / flops_per_s
        weights = times * params * BYTES[dtype] / link_bytes_per_s
        activations = 2 * reduced * BYTES[dtype] / link_bytes_per_s
        send = weights * (ranks - 1) / (ranks * tp), share * activations * (tp - 1)
        # Weights hide from a batch on. Activations grow with it as arithmetic does: they hide always or never.
        smallest = weights * (ranks - 1) / compute if activations * (tp - 1) <= compute else math.inf
        message = weights if any(rounds) else batch_tokens * activations
        ways.append({"flops": share * passes * flops, "bytes": sum(send) * link_bytes_per_s, "smallest_batch": smallest,
                     "compute_s": share * compute, "communication_s": max(send), "seconds": max(share * compute, *send),
                     "most_ranks": 1 + batch_tokens * compute / message if message else math.inf})
    step = {key: sum(way[key] for way in ways) for key in ways[0]}
    step["smallest_batch"] = max(way["smallest_batch"] for way in ways)
    step["most_ranks"] = min(way["most_ranks"] for way in ways)
    return {"forward": ways[0], "backward": ways[1], "step": step}


def best_mix(work, batch_tokens, ranks, *machine) -> tuple:
    """(fsdp, tp, its cost): the division of `ranks` whose step takes least time, and of those sends least."""
    mixes = [(ranks // tp, tp, fsdp_cost(work, batch_tokens, ranks // tp, *machine, tp=tp))
             for tp in range(1, ranks + 1) if ranks % tp == 0]
    return min(mixes, key=lambda mix: (mix[2]["step"]["seconds"], mix[2]["step"]["bytes"]))


@dataclass
class Bill(ModelConfig):
    """A model and what it is to be used for."""
    batch_size: int = 1              # sequences at a time
    dtype: str = "bfloat16"          # float32 | bfloat16 | float16, of activations, messages and caches
    optimizer: str = "adamw"         # adamw | muon | sgd | adagrad | rmsprop
    device: str = "H100"             # see DEVICES in machine.py
    n_devices: int = 1               # how many of it
    tokens: float | None = None      # to train on; none = 20 a parameter (2203.15556)
    mfu: float = 0.4                 # share of the peak that goes into the model's FLOPs
    batch_tokens: int = 524_288      # of one training step over all devices
    link_gb_per_s: float = 450.0     # what a device can send: NVLink 4 (H100 data sheet) 450, InfiniBand NDR 50

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("device", DEVICES), ("dtype", BYTES), ("optimizer", STATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name in ("batch_size", "n_devices", "mfu", "batch_tokens", "link_gb_per_s", "tokens"):
            value, most = getattr(self, name), 1 if name == "mfu" else sys.float_info.max
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{name}={value} must be above 0 and {'at most 1' if most == 1 else 'finite'}")


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print right-aligned columns under a title."""
    rows = [[cell if isinstance(cell, str) else f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}"
             for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}")
    for name, *cells in rows:
        print(f"  {name:<{widths[0]}}", *(f" {cell:>{width}}" for cell, width in zip(cells, widths[1:])))


def print_bill(bill: Bill) -> None:
    """Parameters, FLOPs and bytes by part; what checkpoints save; what parallel ranks send; hours."""
    T, chip, kinds = bill.context_length, DEVICES[bill.device], {"dtype": bill.dtype, "optimizer": bill.optimizer}
    fits, cache = largest_batch(bill, chip.memory_bytes, **kinds), kv_cache_bytes(bill, T, bill.dtype)
    step = (f"GB of a training step at batch {bill.batch_size}, {bill.dtype}, {bill.optimizer}; one {bill.device} fits "
            f"{fits}; cache of one sequence {cache / 1e6:,.4g} MB")
    work = f"TFLOP of a forward pass over {T:,} tokens (backward: 2 x)"
    for title, parts, unit in (("parameters", count_params(bill), 1), (work, flops_per_token(bill, T), 1e12 / T),
                               (step, memory_bytes(bill, bill.batch_size, **kinds), 1e9)):
        rows = [[name, n if unit == 1 else n / unit, f"{100 * n / parts['total']:.1f} %"] for name, n in parts.items()]
        table(title, ["part", "number", "share"], [row for row in rows if row[1]])
    tokens = bill.batch_size * T
    block, one_input = tokens * activation_bytes(bill, bill.dtype)[0], tokens * 4 * bill.d_model
    plans = [checkpoint_plan(bill.n_layers, n, block, one_input) for n in range(2 + int(math.log2(bill.n_layers)))]
    rows = {plan["sizes"]: [" > ".join(map(str, plan["sizes"])), plan["bytes"] / 1e9, plan["flops"]] for plan in plans}
    table("activations of the blocks, with groups of blocks computed again in backward",
          ["groups of", "GB", "FLOPs, times"], list(rows.values()))
    ranks = max(2, bill.n_devices)
    rates = bill.batch_tokens, ranks, chip.flops * bill.mfu, bill.link_gb_per_s * 1e9
    fsdp, tp, mixed = best_mix(bill, *rates, bill.dtype)
    costs = {"DDP, float32": data_parallel_cost(bill, *rates, "float32"), "FSDP": fsdp_cost(bill, *rates, bill.dtype),
             "tensor parallel": tensor_parallel_cost(bill, *rates, bill.dtype), f"best: fsdp {fsdp} x tp {tp}": mixed}
    steps = [(name, cost["step"]) for name, cost in costs.items()]
    table(f"one of {ranks} ranks in a step of {bill.batch_tokens:,} tokens, {bill.link_gb_per_s:g} GB/s, and where its "
          "messages hide", ["", "MB sent", "ms", "ms of arithmetic", "from tokens", "up to ranks"],
          [[name, step["bytes"] / 1e6, 1e3 * step["communication_s"], 1e3 * step["compute_s"], step["smallest_batch"],
            step["most_ranks"]] for name, step in steps])
    tokens = bill.tokens or 20 * count_params(bill)["total"]
    hours = training_hours(bill, tokens, bill.device, bill.mfu, bill.n_devices)
    print(f"\ntraining on {tokens:.4g} tokens: {hours:,.2f} hours on {bill.n_devices} {bill.device} at "
          f"{100 * bill.mfu:.0f} % MFU")


def main(argv: list[str]) -> None:
    """Print the bill of one command line."""
    usage = f"usage: python accounting.py CONFIG_OR_PRESET [--key=value …]\npresets: {', '.join(PRESETS)}"
    name, settings = " ".join(word for word in argv if not word.startswith("-")), {}
    try:
        if name.endswith(".py"):
            settings = read_config_file(name)
        elif name and preset(name):
            settings = PRESETS[name]
        # What a config file says of training alone (lr, data_dir, …) costs nothing here; as a flag it is a mistake.
        words = [f"--{key}={value}" for key, value in settings.items() if key in Bill.__dataclass_fields__]
        _, _, bill, _ = command_line(Bill, words + [word for word in argv if word.startswith("-")], usage)
        print_bill(bill)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
