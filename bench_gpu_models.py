"""The models' stages of `python bench.py gpu`: training and decoding; and what a stage's process runs.

A training step of GPT-2 is products, so MFU counts, the share of the data sheet's FLOP/s (PaLM, 2204.02311). A step of
decoding reads every weight for one row of products, so the share of the bandwidth counts. Before it stands the host:
GPT-2 in eager mode launches 400 kernels for a token, 5 µs each, where reading its weights takes 80 µs. A CUDA graph
launches them all at once, if nothing in the step depends on the host. So every position works on the whole cache, and a
mask hides what is not written yet:

    decoding.stream    a step for 130 keys, then for 131, 132 …    the host knows the length, and waits for each token
    Decoder            a step for 192 keys, each time the same     position and tokens are numbers on the card
"""
import contextlib
import copy
import io
import itertools
import statistics
import sys
import tempfile

import torch

import bench
import bench_gpu
import bench_step
import compress
import decoding
import train
from accounting import flops_per_token, kv_cache_bytes
from bench_gpu import GpuConfig, Sheet, free
from bench_step import seconds_of
from configurator import command_line
from convert import their_config
from layers import rope_tables
from machine import bandwidth, peak_flops
from model import ModelConfig, Transformer
from optim import clip_grad_norm


def built(shape: dict, device: str, dtype=torch.float32, theirs: bool = False, **more):
    """A model with random weights, ours or transformers', drawn on the card: on the host 1.5e9 take half a minute."""
    torch.manual_seed(0)
    config = ModelConfig(**shape | more)
    with torch.device(device):
        if not theirs:
            return Transformer(config).to(dtype)
        from transformers import AutoConfig, AutoModelForCausalLM
        settings = their_config(config, dtype) | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="sdpa").to(dtype)


def random_batch(shape: dict, rows: int, device: str, seed: int = 0):
    """(inputs, targets) of real ids, small ones more often, as in text: a model can learn their frequencies."""
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(rows, shape["context_length"] + 1, device=device, generator=generator)
    ids = (min(shape["vocab_size"], 50_257) ** u).long() - 1
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# --- training ---

def training_step(sheet: Sheet, compile: bool = False, theirs: bool = False, **more):
    """A function of (inputs, targets) that takes a training step on GPT-2, ours or transformers'; returns the loss."""
    model, clip = built(sheet.size["gpt2"], sheet.device, theirs=theirs, **more).train(), clip_grad_norm

    def forward(x, y):
        if not theirs:
            return model(x, y)[1]
        return torch.nn.functional.cross_entropy(model(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())
    if theirs:
        clip, optimizers = torch.nn.utils.clip_grad_norm_, [torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=sheet.on_cuda)]
    else:
        optimizers = train.make_optimizers(model, train.TrainConfig())
    # As in train.py; on a CPU without a compiler's work, to prove the same lines.
    run = torch.compile(forward, backend="inductor" if sheet.on_cuda else "aot_eager",
                        dynamic=False) if compile else forward

    def step(x, y):
        with torch.autocast(sheet.device.split(":")[0], torch.bfloat16):
            loss = run(x, y)
        loss.backward()
        clip(list(model.parameters()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def largest_batch(sheet: Sheet, step):
    """The largest batch that fits, after two steps of it: those compile and make the moments."""
    for rows in sheet.size["batches"]:
        batch = random_batch(sheet.size["gpt2"], rows, sheet.device)
        try:
            step(*batch), step(*batch)
            return batch
        except torch.OutOfMemoryError:
            pass                                         # outside this block, when its traceback holds no tensor
        free(sheet.device)
    raise torch.OutOfMemoryError(f"no batch of {sheet.size['batches']} rows fits")


CASES = {"sdpa": {}, "triton": dict(attention_backend="triton"),
         "triton compiled": dict(compile=True, attention_backend="triton"),
         "transformers compiled": dict(compile=True, theirs=True),
         "triton compiled, fused loss": dict(compile=True, attention_backend="triton", fused_loss=True),
         "sdpa compiled": dict(compile=True), "sdpa, fused loss": dict(fused_loss=True)}


def training_rates(sheet: Sheet) -> None:
    """Tokens per second and MFU by attention, loss and compile, beside transformers; the last table alternates."""
    shape, T = sheet.size["gpt2"], sheet.size["gpt2"]["context_length"]
    flops = flops_per_token(ModelConfig(**shape), T, training=True)["total"]
    peak, ready, rates = peak_flops(sheet.device, "bfloat16"), {}, {}
    sheet(f"GPT-2, {flops / 1e9:.3f} GFLOP a token, context {T}, bfloat16 by autocast, AdamW, clipping; MFU of "
          f"{(peak or 0) / 1e12:.0f} TFLOP/s", f"{'':30}{'rows':>6}{'tokens/s':>12}{'MFU':>8}{'peak GB':>9}")

    def measure(name) -> str:
        """One more rate of a case, and the line of its median."""
        step, batch = ready[name]
        seconds = seconds_of(lambda: step(*batch), sheet.device, sheet.size["steps"])
        rates.setdefault(name, []).append(batch[0].numel() / seconds)
        rate = statistics.median(rates[name])
        mfu = "n/a" if peak is None else f"{rate * flops / peak:.1%}"
        return f"{name:30}{len(batch[0]):>6}{rate:>12,.0f}{mfu:>8}"

    def prepare(name) -> None:
        before, gb = 0, 0.0                              # what the cases before it hold
        if sheet.on_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        step = training_step(sheet, **CASES[name])
        ready[name] = step, largest_batch(sheet, step)
        line = measure(name)
        if sheet.on_cuda:
            gb = (torch.cuda.max_memory_allocated() - before) / 1e9
        sheet(f"{line}{gb:>9.1f}")
    for name in CASES:
        sheet.attempt(name, lambda: prepare(name), needs=75 if "compiled" in name else 10)
    lines = {}
    for name in sheet.size["rounds"] * list(rates):      # in turn: a card that grows hot slows all of them
        if sheet.left() > 35:
            lines[name] = measure(name)
    sheet("", "the same in turn, medians", *lines.values())


def curves(sheet: Sheet) -> None:
    """Losses of the same steps with our attention and with sdpa, on new ids in every step."""
    losses, n = {}, sheet.size["curve_steps"]
    for backend in ("sdpa", "triton"):
        step = training_step(sheet, attention_backend=backend)
        batches = (random_batch(sheet.size["gpt2"], sheet.size["curve_batch"], sheet.device, seed=i) for i in range(n))
        losses[backend] = torch.stack([step(*batch) for batch in batches]).float().tolist()
        del step
        free(sheet.device)
    pairs = list(zip(*losses.values()))
    sheet("", f"losses of {n} steps of {sheet.size['curve_batch']} rows: sdpa, triton; the largest difference "
              f"{max(abs(a - b) for a, b in pairs):.4f}")
    sheet(*(f"{i + 1:>8}{pairs[i][0]:>10.4f}{pairs[i][1]:>10.4f}" for i in sorted({0, n // 20, n // 4, n // 2, n - 1})))


def training(sheet: Sheet) -> None:
    """GPT-2's training step: rates beside transformers, two loss curves; its time by region, its memory by kind."""
    training_rates(sheet)
    free(sheet.device)
    sheet.attempt("loss curves", lambda: curves(sheet), needs=15)
    shape, rows = sheet.size["gpt2"], sheet.size["profile_batch"]
    with tempfile.TemporaryDirectory() as folder:
        settings = shape | dict(attention_backend="triton", batch_tokens=rows * shape["context_length"],
                                data_dir="none", out_dir=folder, device=sheet.device, dtype="bfloat16")
        words = [f"--{key}={value}" for key, value in settings.items()]
        for name, verb in (("profile", bench_step.profile), ("memory", bench_step.memory)):
            with contextlib.redirect_stdout(io.StringIO()) as text:
                parts = sheet.attempt(name, lambda: verb(words), needs=10)
            sheet("", f"{name} of one step of {rows} rows, not compiled", *text.getvalue().splitlines())
            for region, ms in (parts or {}).items():
                sheet.point("training_step", "", region, ms)


# --- a decoding step that a CUDA graph can replay ---

class Layer:
    """One layer's keys and values (B, K, S, D) for all positions there will be, in KVCache's place."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def append(self, layer, k, v, plan, window):
        """Store those of one new token; return all, as the mask hides what is not written."""
        self.k.index_copy_(2, plan.slots, k)
        self.v.index_copy_(2, plan.slots, v)
        return self.k, self.v


class Step:
    """What attention.Plan is for a pass, for one token at a position that only the card knows."""

    def __init__(self, config: ModelConfig, position, keys):
        self.slots = self.positions = position                           # (1,)
        self.fresh, self.balance, self.masks = False, [], {None: (keys <= position)[None]}       # (1, S)
        if config.position == "rope":
            tables = rope_tables(position, config.head_dim, config.rope_theta, config)
            self.cos, self.sin = (table.unsqueeze(-2) for table in tables)


def numbered_zero(block):
    """The same block, tensors shared, as a first layer: torch.compile would make a program for each number."""
    block = copy.copy(block)
    block._modules = dict(block._modules) | {"attn": copy.copy(block.attn)}
    block.layer = block.attn.layer = 0
    return block


def run_block(block, x, layer: Layer, step: Step):
    """One block; compiled once, it serves all layers, which differ in tensors only."""
    return block(x, None, layer, step)


class Decoder:
    """Greedy decoding by steps that are all alike, so that a CUDA graph can replay one: tokens stay on the card.

    compile: fuse each block's small operations; with one row inductor then also makes products of its own, in which
    int8 weights are widened as they are read.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], n_new: int, compile: bool = False):
        c, self.model, self.T = model.config, model, len(prompts[0])
        device, length = model.token_embeddings.weight.device, min(c.context_length, -(-(self.T + n_new) // 64) * 64)
        logits, memory = decoding.prefill(model, prompts, True, length - self.T)
        self.layers = [Layer(k, v) for k, v in zip(memory.k, memory.v)]
        self.blocks = [numbered_zero(block) for block in model.layers]
        self.on_cuda, self.run_block, self.graph = device.type == "cuda", run_block, None
        if compile:
            torch.compiler.reset()                       # else the ninth program of a function would not be made
            options = {"coordinate_descent_tuning": True} if self.on_cuda and len(prompts) == 1 else None
            self.run_block = torch.compile(run_block, backend="inductor" if self.on_cuda else "aot_eager",
                                           options=options, dynamic=False)
        self.keys, self.position = torch.arange(length, device=device), torch.tensor([self.T], device=device)
        self.tokens = torch.zeros(len(prompts), length + 1, dtype=torch.long, device=device)
        self.tokens[:, :self.T] = torch.tensor(prompts, device=device)
        self.tokens[:, self.T] = logits.argmax(-1)

    def step(self) -> None:
        """The token after the one at `position`, and one position on; no number of it is seen by the host."""
        plan = Step(self.model.config, self.position, self.keys)
        x = self.model.embed(self.tokens.index_select(1, self.position), None, plan)
        for block, layer in zip(self.blocks, self.layers):
            x = self.run_block(block, x, layer, plan)
        self.position += 1
        self.tokens.index_copy_(1, self.position, self.model.head(x[:, -1]).argmax(-1, keepdim=True))

    def record(self) -> None:
        """Record one step as a graph; before it, three steps on a side stream, which also compile."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.fill_(self.T)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()                                  # recording computes nothing

    def run(self, n: int) -> list[list[int]]:
        """The next n ids of every row, from the first position on."""
        self.position.fill_(self.T)
        for _ in range(n - 1):                           # the first one is prefill's
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
        return self.tokens[:, self.T:self.T + n].tolist()


@torch.no_grad()
def decode_rate(sheet: Sheet, shape: dict, rows: int, name: str) -> tuple[float, float, str]:
    """(steps per second, bytes that a step reads, a remark) of one case."""
    n, T, vocab = sheet.size["new"], sheet.size["prompt"], min(shape["vocab_size"], 50_257)
    prompts = torch.randint(vocab, (rows, T), generator=torch.Generator().manual_seed(rows)).tolist()
    model = built(shape, sheet.device, torch.bfloat16).eval().requires_grad_(False)
    if "int" in name:
        compress.quantize(model, name[:4])
    n_bytes = compress.weight_bytes(model) + rows * kv_cache_bytes(model.config, T + n, "bfloat16")
    if name in ("stream, eager", "transformers"):
        clock = bench.time_stream
        if name == "transformers":
            model, clock = built(shape, sheet.device, torch.bfloat16, theirs=True).eval(), bench.time_transformers
        clock(model, prompts, 3)                         # warms up
        return clock(model, prompts, n)[1] / rows, n_bytes, ""
    decoder = Decoder(model, prompts, n, compile="compiled" in name)
    if sheet.on_cuda:
        decoder.record()
    ids, expected = decoder.run(n), decoding.generate(model, prompts, n, temperature=0)
    equal = sum(a == b for row, reference in zip(ids, expected) for a, b in zip(row, reference))
    seconds = min(seconds_of(lambda: decoder.run(n), sheet.device) for _ in range(3))
    return (n - 1) / seconds, n_bytes, f"{equal} of {n * rows} ids as generate's"


def decoding_stage(sheet: Sheet) -> None:
    """Tokens per second by shape, batch, weights and way of launching, as a share of the bandwidth."""
    roof = max(bandwidth(sheet.device) for _ in range(2))
    sheet(f"reading {roof / 1e9:,.0f} GB/s; prompt {sheet.size['prompt']}, {sheet.size['new']} new, greedy, bfloat16",
          "gpt-fast, Llama-2-7B on an A100 that reads 1,700 GB/s, batch 1: 0.82, int8 0.63, int4 0.51 (its README)",
          f"{'':28}{'rows':>6}{'tokens/s':>11}{'ms a step':>11}{'GB a step':>11}{'share':>7}")
    names = ["stream, eager", "graph", "graph, compiled", "int8, compiled", "int4, compiled", "transformers"]
    for label, rows, name in itertools.product(("llama", "gpt2"), sheet.size["rows"], names):
        # Narrow weights matter with one row; of GPT-2, the same blocks but narrower, one compiled case is enough.
        if "int" in name and (rows > 1 or label == "gpt2") or (label, name) == ("gpt2", "graph, compiled") and rows > 1:
            continue
        one = sheet.attempt(f"{label}, {name} {rows}", lambda: decode_rate(sheet, sheet.size[label], rows, name),
                            needs=14 if "compiled" in name else 6)
        if one is not None:
            rate, n_bytes, remark = one
            sheet(f"{label + ', ' + name:28}{rows:>6}{rows * rate:>11,.1f}{1e3 / rate:>11.3f}{n_bytes / 1e9:>11.3f}"
                  f"{rate * n_bytes / roof:>7.2f}  {remark}")


# --- a stage's process ---

STAGES = {"correct": bench_gpu.correct, "kernels": bench_gpu.kernels, "training": training, "decoding": decoding_stage,
          "distributed": bench_gpu.distributed, "loss": bench_gpu.loss}


def main(argv: list[str]) -> None:
    """Run one stage here; its table ends with what is missing in it."""
    sheet = Sheet(command_line(GpuConfig, argv, "usage: python bench_gpu_models.py --only=STAGE [--key=value …]")[2])
    STAGES[sheet.config.only](sheet)
    sheet.draw()
    if sheet.missing:
        sheet("", f"missing: {', '.join(sheet.missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
