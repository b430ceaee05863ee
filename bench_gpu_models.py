"""The models' stages of `python bench.py gpu`: training, decoding, time to loss; and what a stage's process runs.

Training and decoding meet the two roofs of a card. A training step of GPT-2 is products, so MFU counts, the share of
the data sheet's FLOP/s (PaLM, 2204.02311). One step of decoding reads every weight for one row of products, so the
share of the bandwidth counts. In between stands the host: GPT-2 in eager mode launches 400 kernels for a token, 5 µs
each, where reading its weights takes 80 µs. A CUDA graph launches them all at once, if nothing in the step depends on
the host. So here every position works on the whole cache, and a mask hides what is not written yet:

    decoding.stream    a step for 130 keys, then for 131, 132 …     the host knows the length, and waits for each token
    Decoder            a step for 192 keys, each time the same      position and tokens are numbers on the card

    python bench_gpu_models.py STAGE [--key=value …]      one stage in this process
"""
import contextlib
import copy
import io
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import bench_gpu
import bench_gpu_kernels
import bench_memory
import bench_systems
import compress
import data
import decoding
import train
from accounting import flops_per_token, kv_cache_bytes
from bench_gpu import HERE, Sheet, StageConfig, free, seconds_of
from configurator import command_line
from layers import rope_tables
from machine import bandwidth, peak_flops
from model import ModelConfig, Transformer
from optim import clip_grad_norm

def built(shape: dict, device: str, dtype=torch.float32, **more) -> Transformer:
    """A Transformer with random weights, drawn on the card: on the host 1.5e9 of them take half a minute."""
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(ModelConfig(**shape | more)).to(dtype)


def random_batch(shape: dict, rows: int, device: str, seed: int = 0):
    """(inputs, targets) of real ids, small ones more often, as in text: a model can learn their frequencies."""
    generator = torch.Generator(device).manual_seed(seed)
    u = torch.rand(rows, shape["context_length"] + 1, device=device, generator=generator)
    ids = (min(shape["vocab_size"], 50_257) ** u).long() - 1
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_model(shape: dict, device: str, dtype=torch.float32):
    """transformers' model of a shape, with random weights; ImportError where it is not installed."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
    torch.manual_seed(0)
    names = dict(vocab_size=shape["vocab_size"], bos_token_id=0, eos_token_id=None)
    if shape.get("norm") == "layer":
        config = GPT2Config(n_positions=shape["context_length"], n_embd=shape["d_model"], n_layer=shape["n_layers"],
                            n_head=shape["n_heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **names)
    else:
        config = LlamaConfig(max_position_embeddings=shape["context_length"], hidden_size=shape["d_model"],
                             num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"],
                             intermediate_size=shape["d_ff"], **names)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)


# --- training ---

def compiled(function, device: str):
    """torch.compile as train.py uses it; on a CPU without a compiler's work, to prove the same lines."""
    return torch.compile(function, backend="inductor" if device.startswith("cuda") else "aot_eager", dynamic=False)


def our_step(sheet: Sheet, compile: bool = False, **more):
    """A function of (inputs, targets) that takes one of our training steps on GPT-2; returns the loss."""
    model = built(sheet.size["gpt2"], sheet.device, **more)
    optimizers, params = train.make_optimizers(model, train.TrainConfig()), list(model.parameters())
    forward = compiled(model, sheet.device) if compile else model

    def step(x, y):
        with torch.autocast(sheet.device.split(":")[0], torch.bfloat16):
            loss = forward(x, y)[1]
        loss.backward()
        clip_grad_norm(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def their_step(sheet: Sheet):
    """The same by transformers' GPT-2 with torch.compile and torch's fused AdamW."""
    model = transformers_model(sheet.size["gpt2"], sheet.device).train()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=sheet.on_cuda)

    def loss_of(x, y):
        logits = model(input_ids=x, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    forward = compiled(loss_of, sheet.device)

    def step(x, y):
        with torch.autocast(sheet.device.split(":")[0], torch.bfloat16):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def largest_batch(sheet: Sheet, step):
    """(rows, batch) of the largest batch that fits, after two steps of it: those compile and make the moments."""
    for rows in sheet.size["batches"]:
        batch = random_batch(sheet.size["gpt2"], rows, sheet.device)
        try:
            step(*batch), step(*batch)
            return rows, batch
        except torch.OutOfMemoryError:
            pass                                         # outside this block, when its traceback holds no tensor
        free(sheet.device)
    raise torch.OutOfMemoryError(f"no batch of {sheet.size['batches']} rows fits")


def training_rates(sheet: Sheet) -> None:
    """Tokens per second and MFU by attention, loss and compile, beside transformers; the last table alternates."""
    shape, T = sheet.size["gpt2"], sheet.size["gpt2"]["context_length"]
    flops = flops_per_token(ModelConfig(**shape), T, training=True)["total"]
    peak, ready, rates = peak_flops(sheet.device, "bfloat16"), {}, {}
    cases = {"sdpa": lambda: our_step(sheet), "triton": lambda: our_step(sheet, attention_backend="triton"),
             "triton compiled": lambda: our_step(sheet, True, attention_backend="triton"),
             "transformers compiled": lambda: their_step(sheet),
             "triton compiled, fused loss": lambda: our_step(sheet, True, attention_backend="triton", fused_loss=True),
             "sdpa compiled": lambda: our_step(sheet, True),
             "sdpa, fused loss": lambda: our_step(sheet, fused_loss=True)}

    def line(name, rows, rate, peak_gb=None):
        mfu = "n/a" if peak is None else f"{rate * flops / peak:.1%}"
        memory = "" if peak_gb is None else f"{peak_gb:>9.1f}"
        sheet(f"{name:30}{rows:>6}{rate:>12,.0f}{mfu:>8}{memory}")

    sheet(f"GPT-2, {flops / 1e9:.3f} GFLOP a token, context {T}, bfloat16 by autocast, AdamW, clipping; MFU of "
          f"{(peak or 0) / 1e12:.0f} TFLOP/s", f"{'':30}{'rows':>6}{'tokens/s':>12}{'MFU':>8}{'peak GB':>9}")
    for name, make in cases.items():
        def prepare(make=make):
            before = 0                                   # what the cases before it hold
            if sheet.on_cuda:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            step = make()
            rows, batch = largest_batch(sheet, step)
            rate = rows * T / seconds_of(lambda: step(*batch), sheet.device, sheet.size["steps"])
            line(name, rows, rate, (torch.cuda.max_memory_allocated() - before) / 1e9 if sheet.on_cuda else 0.0)
            return step, rows, batch
        ready[name] = sheet.attempt(name, prepare, needs=75 if "compiled" in name else 10)
        rates[name] = []
    for _ in range(sheet.size["rounds"]):                # in turn: a card that grows hot slows all of them
        for name, case in ready.items():
            if case is not None and sheet.left() > 35:
                step, rows, batch = case
                seconds = seconds_of(lambda: step(*batch), sheet.device, sheet.size["steps"])
                rates[name].append(rows * T / seconds)
    sheet("", "the same in turn, medians")
    for name, values in rates.items():
        if values:
            rate = sorted(values)[len(values) // 2]
            line(name, ready[name][1], rate)
            sheet.figure("training", name=name, rate=rate, mfu=rate * flops / peak if peak else None)


def curves(sheet: Sheet) -> None:
    """Losses of the same steps with our attention and with sdpa, on new ids in every step."""
    losses = {}
    for backend in ("sdpa", "triton"):
        step, losses[backend] = our_step(sheet, attention_backend=backend), []
        for i in range(sheet.size["curve_steps"]):
            batch = random_batch(sheet.size["gpt2"], sheet.size["curve_batch"], sheet.device, seed=i)
            losses[backend].append(step(*batch))
        losses[backend] = torch.stack(losses[backend]).float().tolist()
        free(sheet.device)
    n, pairs = sheet.size["curve_steps"], list(zip(losses["sdpa"], losses["triton"]))
    sheet("", f"losses of {n} steps of {sheet.size['curve_batch']} rows: sdpa, triton; the largest difference "
              f"{max(abs(a - b) for a, b in pairs):.4f}")
    sheet(*(f"{i + 1:>8}{pairs[i][0]:>10.4f}{pairs[i][1]:>10.4f}" for i in sorted({0, n // 20, n // 4, n // 2, n - 1})))
    sheet.figure("curves", **losses)


def parts_of_a_step(sheet: Sheet) -> None:
    """The course's tables of one step, not compiled: its time by region, its memory by kind."""
    shape, rows = sheet.size["gpt2"], sheet.size["profile_batch"]
    with tempfile.TemporaryDirectory() as folder:
        settings = shape | dict(attention_backend="triton", batch_tokens=rows * shape["context_length"],
                                data_dir="none", out_dir=folder, device=sheet.device, dtype="bfloat16")
        words = [f"--{key}={value}" for key, value in settings.items()]
        for name, verb in (("profile", bench_systems.profile), ("memory", bench_memory.memory)):
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                result = sheet.attempt(name, lambda verb=verb: verb(words), needs=10)
            sheet("", f"{name} of one step of {rows} rows", *text.getvalue().splitlines())
            if name == "profile" and result is not None:
                sheet.figure("parts", **result)


def training(sheet: Sheet) -> None:
    """GPT-2's training step: rates beside transformers, two loss curves, the parts of a step."""
    training_rates(sheet)
    free(sheet.device)
    sheet.attempt("loss curves", lambda: curves(sheet), needs=15)
    parts_of_a_step(sheet)


# --- decoding ---

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

    For models without windows, experts, latent attention or smear. compile: fuse each block's small operations; with
    one row inductor then also makes products of its own, in which int8 weights are widened as they are read.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], n_new: int, compile: bool = False):
        c, self.model, self.T = model.config, model, len(prompts[0])
        if set(c.windows) != {None} or c.n_experts or c.attention != "standard" or c.smear:
            raise ValueError("Decoder has no sliding_window, n_experts, attention=mla or smear; use decoding.stream")
        device, self.length = model.token_embeddings.weight.device, -(-(self.T + n_new) // 64) * 64
        logits, memory = decoding.prefill(model, prompts, True, n_new)
        self.layers = []
        for k, v in zip(memory.k, memory.v):
            stores = [torch.zeros(*t.shape[:2], self.length, t.shape[3], dtype=t.dtype, device=device) for t in (k, v)]
            for store, t in zip(stores, (k, v)):
                store[:, :, :self.T] = t[:, :, :self.T]
            self.layers.append(Layer(*stores))
        self.blocks = [numbered_zero(block) for block in model.layers]
        self.on_cuda, self.run_block = device.type == "cuda", run_block
        if compile:
            torch.compiler.reset()                       # else the ninth program of a function would not be made
            options = {"coordinate_descent_tuning": True} if self.on_cuda and len(prompts) == 1 else None
            self.run_block = torch.compile(run_block, backend="inductor" if self.on_cuda else "aot_eager",
                                           options=options, dynamic=False)
        self.keys = torch.arange(self.length, device=device)
        self.tokens = torch.zeros(len(prompts), self.length + 1, dtype=torch.long, device=device)
        self.tokens[:, :self.T] = torch.tensor(prompts, device=device)
        self.tokens[:, self.T] = logits.argmax(-1)
        self.position, self.graph = torch.tensor([self.T], device=device), None

    def step(self) -> None:
        """The token after the one at `position`, and one position on; no number of it is seen by the host."""
        plan = Step(self.model.config, self.position, self.keys)
        x = self.model.embed(self.tokens.index_select(1, self.position), None, plan)
        for block, layer in zip(self.blocks, self.layers):
            x = self.run_block(block, x, layer, plan)
        self.position += 1
        self.tokens.index_copy_(1, self.position, self.model.head(x[:, -1]).argmax(-1, keepdim=True))

    def record(self) -> None:
        """On a card: record one step as a graph; before it, three steps on a side stream, which also compile."""
        if not self.on_cuda:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.position.fill_(self.T)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.position.fill_(self.T)                      # recording computes nothing, but says so nowhere

    def run(self, n: int) -> list[list[int]]:
        """The next n ids of every row, from the first position on."""
        self.position.fill_(self.T)
        for _ in range(n - 1):                           # the first one is prefill's
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
        return self.tokens[:, self.T:self.T + n].tolist()


def decode_cases(sheet: Sheet, shape: dict) -> list[tuple]:
    """(name, kind of weights, rows, how) in the order of what is most wanted."""
    many = sheet.size["rows"]
    cases = [("stream, eager", None, many[0], "stream"), ("graph", None, many[0], "graph"),
             ("graph, compiled", None, many[0], "compiled"), ("int8, compiled", "int8", many[0], "compiled"),
             ("int4, compiled", "int4", many[0], "compiled"), ("transformers", None, many[0], "transformers")]
    for rows in many[1:]:
        cases += [("stream, eager", None, rows, "stream"), ("graph", None, rows, "graph"),
                  ("graph, compiled", None, rows, "compiled"), ("transformers", None, rows, "transformers")]
    return cases


@torch.no_grad()
def decode_rate(sheet: Sheet, model, shape: dict, rows: int, how: str) -> tuple[float, str]:
    """(steps per second, a remark) of one case."""
    n, vocab = sheet.size["new"], min(shape["vocab_size"], 50_257)
    prompts = torch.randint(vocab, (rows, sheet.size["prompt"]), generator=torch.Generator().manual_seed(rows)).tolist()
    if how == "stream":
        list(decoding.stream(model, prompts, 3, temperature=0))
        prefill = seconds_of(lambda: list(decoding.stream(model, prompts, 1, temperature=0)), sheet.device, 2)
        whole = seconds_of(lambda: list(decoding.stream(model, prompts, n, temperature=0)), sheet.device, 1)
        return (n - 1) / max(whole - prefill, 1e-9), ""
    if how == "transformers":
        theirs = transformers_model(shape, sheet.device, torch.bfloat16).eval()
        ids = torch.tensor(prompts, device=sheet.device)

        def generate(length):
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=length,
                                   max_new_tokens=length)
        generate(2)
        prefill, whole = (seconds_of(lambda k=k: generate(k), sheet.device, 1) for k in (1, n))
        return (n - 1) / max(whole - prefill, 1e-9), ""
    decoder = Decoder(model, prompts, n, compile=how == "compiled")
    decoder.record()
    ids = decoder.run(n)
    expected = decoding.generate(model, prompts, n, temperature=0)
    equal = sum(a == b for row, other in zip(ids, expected) for a, b in zip(row, other))
    seconds = min(seconds_of(lambda: decoder.run(n), sheet.device, 1) for _ in range(3))
    return (n - 1) / seconds, f"{equal} of {n * rows} ids as generate's"


def decoding_stage(sheet: Sheet) -> None:
    """Tokens per second by shape, batch, weights and way of launching, as a share of the bandwidth."""
    roof = max(bandwidth(sheet.device) for _ in range(2))
    sheet(f"reading {roof / 1e9:,.0f} GB/s; prompt {sheet.size['prompt']}, {sheet.size['new']} new, greedy, bfloat16",
          "gpt-fast, Llama-2-7B on an A100 that reads 1,700 GB/s, batch 1: 0.82, int8 0.63, int4 0.51 (its README)",
          f"{'':28}{'rows':>6}{'tokens/s':>11}{'ms a step':>11}{'GB a step':>11}{'share':>7}")
    for label in ("llama", "gpt2"):
        shape = sheet.size[label]
        model = built(shape, sheet.device, torch.bfloat16).eval().requires_grad_(False)
        sheet(f"{label}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f}M parameters")
        for name, kind, rows, how in decode_cases(sheet, shape):
            if label == "gpt2" and how == "compiled" and (rows > 1 or kind):
                continue                                 # the same blocks, narrower: nothing new for its time
            def measure(kind=kind, rows=rows, how=how):
                one = compress.quantize(copy.deepcopy(model), kind) if kind else model
                cache = kv_cache_bytes(model.config, sheet.size["prompt"] + sheet.size["new"], "bfloat16")
                rate, remark = decode_rate(sheet, one, shape, rows, how)
                return rate, remark, compress.weight_bytes(one) + rows * cache
            result = sheet.attempt(f"{name} {rows}", measure, needs=14 if how == "compiled" else 6)
            if result is not None:
                rate, remark, n_bytes = result
                sheet(f"  {name:26}{rows:>6}{rows * rate:>11,.1f}{1e3 / rate:>11.3f}{n_bytes / 1e9:>11.3f}"
                      f"{rate * n_bytes / roof:>7.2f}  {remark}")
                sheet.figure("decoding", shape=label, name=name, rows=rows, rate=rows * rate,
                             share=rate * n_bytes / roof)
        del model
        free(sheet.device)


# --- time to loss ---

def offline_corpus(sheet: Sheet, name: str, vocab_size: int) -> str:
    """A data folder: data/NAME where it is prepared, else one made of Python's own library, text of every machine."""
    if (Path("data") / name / "meta.json").exists():
        return f"data/{name}"
    folder, text = Path("out/bench_gpu") / f"library_{vocab_size}", io.StringIO()
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if "site-packages" not in path.parts and text.tell() < sheet.size["corpus_bytes"]:
                text.write(path.read_text(encoding="utf-8", errors="replace") + "<|endoftext|>")
        source = folder.with_suffix(".txt")
        source.write_text(text.getvalue(), encoding="utf-8", newline="")
        data.prepare(source, vocab_size=vocab_size, data_dir=folder)
        source.unlink()
    return str(folder)


def loss(sheet: Sheet) -> None:
    """Bits per byte of the default run and of the TinyStories shape, two minutes each, without a network."""
    for left, config, corpus, vocab in ((2, "config_shakespeare.py", "shakespeare", 2048),
                                        (1, "config_tinystories.py", "tinystories", sheet.size["vocabulary"])):
        folder = sheet.attempt(corpus, lambda: offline_corpus(sheet, corpus, min(vocab, sheet.size["vocabulary"])))
        if folder is None:
            continue
        # 17 s of each half of the time are for the start and the evaluation, which max_minutes does not count.
        minutes = min(sheet.config.minutes, max(0.05, (sheet.left() / left - 17) / 60))
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, str(HERE / "train.py"), str(HERE / config), f"--data_dir={folder}",
                       f"--out_dir={out}", "--overwrite=true", f"--device={sheet.device}",
                       f"--max_minutes={minutes:.3f}", "--num_samples=0", "--eval_every=0",
                       "--checkpoint_every=1000000", *sheet.size["flags"]]
            sheet("", f"{config} on {folder}, {minutes:.2f} minutes")

            def run():
                done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, sheet.left()))
                lines = done.stdout.splitlines()
                steps = [line for line in lines if re.match(r" *\d+/", line)]
                sheet(*[line for line in lines if line.startswith(("model:", "device:"))], *steps[-1:], *lines[-1:])
                if done.returncode:
                    raise RuntimeError(f"status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
                score = re.search(r"bits per byte ([\d.]+)", lines[-1])
                sheet.figure("loss", config=config, data=folder, minutes=minutes,
                             bits_per_byte=float(score[1]) if score else None)
            sheet.attempt(config, run)


# --- a stage's process ---

STAGES = {"correct": bench_gpu.correct, "errors": bench_gpu.errors, "kernels": bench_gpu_kernels.kernels,
          "tiles": bench_gpu_kernels.tiles, "training": training, "decoding": decoding_stage,
          "distributed": bench_gpu_kernels.distributed, "loss": loss}


def main(argv: list[str]) -> None:
    """Run one stage here; its table ends with what is missing in it."""
    verbs = dict.fromkeys(STAGES, StageConfig)
    stage, _, config, _ = command_line(verbs, argv, "usage: python bench_gpu_models.py STAGE [--key=value …]")
    sheet = Sheet(stage, config)
    STAGES[stage](sheet)
    if sheet.missing:
        sheet("", f"missing: {', '.join(' '.join(what.split()) for what in sheet.missing)}")
    sys.stdout.flush()
    if stage == "distributed":
        os._exit(0)                      # torch 2.13 with gloo sometimes aborts in the interpreter's own exit


if __name__ == "__main__":
    main(sys.argv[1:])
