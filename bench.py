"""Measurements, a verb each: `python bench.py VERB [--key=value …]`; --help lists them.
Models that write and the laptop's record stand here, the other verbs in bench_*.py.

A step of decoding reads every weight for one row of products, so the share of the bandwidth counts. Before it stands
the host: GPT-2 in eager mode launches 400 kernels for a token, 5 µs each, where reading its weights takes 80 µs on an
H100. A CUDA graph launches them all at once, if nothing in the step depends on the host. So every position works on the
whole cache, and a mask hides what is not written yet:

    decoding.stream    a step for 130 keys, then for 131, 132 …    the host knows the length, and waits for each token
    Decoder            a step for 192 keys, each time the same     position and tokens are numbers on the card
"""
import copy
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench_course
import bench_gpu
import bench_kernels
import bench_step
import compress
from accounting import PRESETS, kv_cache_bytes, table
from bench_step import alternate, on, seconds_of
from configurator import command_line, fail
from convert import save_pretrained
from decoding import generate, prefill, speculate, stream
from layers import rope_tables
from machine import DTYPES, bandwidth, pick_device
from model import ModelConfig, Transformer, bits_per_byte
from onetoken import RoundedLinear
from runs import read_log

# --- a decoding step that a CUDA graph can replay ---

@dataclass
class Layer:
    """One layer's keys and values (B, K, S, D) for all positions there will be, in KVCache's place."""
    k: torch.Tensor
    v: torch.Tensor

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


def run_block(block, x, layer: Layer, step: Step):
    """One block; compiled once, it serves all layers, which differ in tensors only."""
    return block(x, None, layer, step)


class Decoder:
    """Greedy decoding by steps that are all alike, so that a CUDA graph can replay one: tokens stay on the card.

    There torch.compile fuses each block's small operations; with one row inductor also makes products of its own, in
    which int8 weights are widened as they are read.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], n_new: int):
        c, self.model, self.T = model.config, model, len(prompts[0])
        device, length = model.token_embeddings.weight.device, min(c.context_length, -(-(self.T + n_new) // 64) * 64)
        logits, memory = prefill(model, prompts, True, length - self.T)
        self.layers, self.blocks = [Layer(k, v) for k, v in zip(memory.k, memory.v)], []
        for block in model.layers:                       # all as first layers: else a program for each number
            block = copy.copy(block)
            block._modules = dict(block._modules) | {"attn": copy.copy(block.attn)}
            block.layer = block.attn.layer = 0
            self.blocks.append(block)
        self.on_cuda, self.run_block, self.replay = device.type == "cuda", run_block, self.step
        if self.on_cuda:
            torch.compiler.reset()                       # else the ninth program of a function would not be made
            options = {"coordinate_descent_tuning": True} if len(prompts) == 1 else None
            self.run_block = torch.compile(run_block, options=options, dynamic=False)
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()                                  # recording computes nothing
        self.replay = graph.replay

    def run(self, n: int) -> list[list[int]]:
        """The next n ids of every row, from the first position on."""
        self.position.fill_(self.T)
        for _ in range(n - 1):                           # the first one is prefill's
            self.replay()
        return self.tokens[:, self.T:self.T + n].tolist()


def by_rows(model):
    """The same weights, not copied, in layers whose one row on a GPU is onerow.py's."""
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for name, layer in compress.matrices(model).items():
        model.set_submodule(name, RoundedLinear({"q": layer.weight.detach()}, layer.bias))
    return model


# --- decoding: tokens per second and their roof ---

LLAMA = dict(context_length=1024, tie_embeddings=True)
SHAPES = PRESETS | {"llama-30m": LLAMA | dict(vocab_size=32_000, d_model=512, n_layers=6, n_heads=8, d_ff=1376),
                    "llama-124m": LLAMA | dict(vocab_size=50_257, d_model=768, n_layers=12, n_heads=12, d_ff=2048),
                    "llama-1.5b": LLAMA | dict(vocab_size=50_304, d_model=2048, n_layers=24, n_heads=16, d_ff=6144),
                    "toy": LLAMA | dict(vocab_size=61, d_model=32, n_layers=2, n_heads=2, d_ff=64)}


@dataclass
class DecodeConfig:
    """What `python bench.py decode` can be told."""
    batch: str = "16"                    # prompts at once, beside one alone; with commas between
    graph: bool = False                  # also Decoder: on a GPU CUDA graphs of its steps; int8, int4 for one row only
    reference: bool = False              # also transformers' generate with the same weights
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    dtype: str = "float32"               # float32, bfloat16, float16

    def __post_init__(self):
        numbers = [part.strip() for part in self.batch.split(",")]
        if self.dtype not in DTYPES or not all(part.isdecimal() and int(part) for part in numbers):
            raise ValueError(f"batch={self.batch!r} must be numbers above 0, dtype={self.dtype!r} one of {[*DTYPES]}")


def seconds_after_first(pieces) -> float:
    """Seconds that a generator takes for all pieces but the first, which is prefill's."""
    next(pieces)
    return seconds_of(lambda: list(pieces))


def time_graph(kind: str, model, prompts, n: int):
    """A function that times the Decoder, after its ids have been compared with generate's."""
    decoder = Decoder(model, prompts, n)
    if decoder.on_cuda:
        decoder.record()
    expected = generate(model, prompts, n, temperature=0)
    equal = sum(a == b for row, other in zip(decoder.run(n), expected) for a, b in zip(row, other))
    print(f"{kind}, graph: {equal} of {n * len(prompts)} ids as generate's")
    return lambda: seconds_of(partial(decoder.run, n), decoder.tokens.device)


def transformers_timer(model):
    """A function of prompts and n: seconds that transformers' generate with these weights takes longer than for one."""
    from transformers import AutoModelForCausalLM
    weight = model.token_embeddings.weight
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype).eval().to(weight.device)
    theirs.generation_config.eos_token_id = None

    def seconds(prompts, n: int) -> float:
        tokens = torch.tensor(prompts, device=weight.device)
        first, whole = (seconds_of(lambda: theirs.generate(tokens, do_sample=False, min_new_tokens=length,
                                                           max_new_tokens=length), weight.device) for length in (1, n))
        return whole - first
    return seconds


@torch.inference_mode()
def decode(argv: list[str]) -> None:
    """Tokens per second of one prompt and many, int8, int4, drafts, transformers, beside the roof."""
    usage = "usage: python bench.py decode [OUT_DIR or SHAPE] [--key=value …]     SHAPE: llama-30m, llama-124m, gpt2, …"
    _, files, config, _ = command_line(DecodeConfig, argv, usage)
    name, device = files[0] if files else "llama-30m", pick_device(config.device)
    torch.manual_seed(0)
    with torch.device(device):                           # drawn there: on a host 1.5e9 weights take half a minute
        model = Transformer(ModelConfig(**SHAPES[name])) if name in SHAPES else compress.load(name)[0]
    if config.graph and (model.config.smear or model.config.shift_keys):
        fail(f"{name} looks at the token before (smear, shift_keys), which the steps of --graph=true do not keep")
    model = model.to(device, DTYPES[config.dtype]).eval().requires_grad_(False)
    sizes, (T, n) = [1, *map(int, config.batch.split(","))], (5, 4) if name == "toy" else (128, 64)
    prompts = torch.randint(model.config.vocab_size, (max(sizes), T)).tolist()
    models = {"plain": model} | {kind: compress.quantize(copy.deepcopy(model), kind) for kind in ("int8", "int4")}
    if device.startswith("cuda"):
        models["onerow"] = by_rows(model)
    theirs, runs = transformers_timer(model) if config.reference else None, {}
    for size in sizes:
        rows = prompts[:size]
        for kind, one in models.items():
            if size > 1 and (kind == "onerow" or config.graph and kind != "plain"):     # each is a program to compile
                continue
            runs[kind, size] = lambda one=one, rows=rows: seconds_after_first(stream(one, rows, n, temperature=0))
            if config.graph:
                runs[f"{kind}, graph", size] = time_graph(kind, one, rows, n)
        if theirs:
            runs["transformers", size] = partial(theirs, rows, n)
    runs["n-grams", 1] = lambda: seconds_after_first(speculate(model, "ngram", prompts[0], n, temperature=0))
    results = alternate(runs | {"roof": partial(bandwidth, device)}, rounds=3)
    roof, lines = statistics.median(results.pop("roof")), []
    for (label, size), seconds in results.items():
        cache = size * kv_cache_bytes(model.config, T + n // 2, config.dtype)
        limit = size * roof / (compress.weight_bytes(models.get(label.split(",")[0], model)) + cache)
        speed = size * (n - 1) / statistics.median(seconds)
        lines.append([label, size, speed, limit, f"{speed / limit:.2f}"])
    table(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.dtype}, prompt "
          f"{T}, {n} new; medians of 3 rounds; {on(device)}, {roof / 1e9:.1f} GB/s",
          ["", "rows", "tok/s", "roof tok/s", "share"], lines)
    if device.startswith("cuda"):
        print("  gpt-fast's README, Llama-2 7B, A100: of 1,700 GB/s bfloat16 0.82, int8 0.63, int4 0.51 at one row")


# --- the record of the laptop ---

def nanogpt(clone, data_dir, minutes: float) -> tuple[float, int, float]:
    """(bits per byte of val.txt, iterations, ms each) of nanoGPT's CPU quick start, trained so long on train.txt."""
    texts = {split: (Path(data_dir) / f"{split}.txt").read_text(encoding="utf-8") for split in ("train", "val")}
    letters = sorted(set("".join(texts.values())))
    with tempfile.TemporaryDirectory() as scratch:
        copied = shutil.copytree(clone, Path(scratch) / "nanoGPT", ignore=shutil.ignore_patterns(".git"))
        data = copied / "data" / "plays"
        data.mkdir()
        for split, text in texts.items():
            np.array([letters.index(letter) for letter in text], np.uint16).tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters)}))

        def run(n: int, eval_iters: int) -> str:         # the flags of its README
            flags = dict(dataset="plays", out_dir=data, device="cpu", compile=False, eval_iters=eval_iters,
                         eval_interval=n, log_interval=1, block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128,
                         max_iters=n, lr_decay_iters=n, dropout=0.0)
            command = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
            command += [f"--{key}={value}" for key, value in flags.items()]
            return subprocess.run(command, cwd=copied, check=True, capture_output=True, text=True).stdout

        ms = statistics.median(map(float, re.findall(r"time ([\d.]+)ms", run(200, 1))))
        n = int(60_000 * minutes / ms)
        loss = float(re.findall(r"val loss ([\d.]+)", run(n, 200))[-1])
    return bits_per_byte(loss, len(texts["val"]), len(texts["val"].encode("utf-8"))), n, ms


def record(words: list[str]) -> None:
    """Bits per byte of the default run, seed by seed: record [SEEDS [MINUTES [a clone of nanoGPT, run in turns]]]."""
    seeds, minutes, clone = (*words, *("3", "2.4", None)[len(words):])
    lines, scores = [], []
    for seed in range(1, int(seeds) + 1):
        command = [sys.executable, str(Path(__file__).with_name("train.py")), f"--seed={seed}", "--overwrite=true",
                   f"--max_minutes={minutes}", f"--out_dir=out/record/{seed}", "--num_samples=0", "--eval_every=0"]
        subprocess.run(command, check=True)
        log = read_log(f"out/record/{seed}/log.jsonl")
        last = log[-1]
        scores.append(last["val_bits_per_byte"])
        lines.append([f"ours, seed {seed}", f"{scores[-1]:.4f}", last["step"], 1000 * last["seconds"] / last["step"]])
        if clone:
            bits, n, ms = nanogpt(clone, log[0]["config"]["data_dir"], float(minutes))
            lines.append([f"nanoGPT, beside it; ratio {scores[-1] / bits:.3f}", f"{bits:.4f}", n, ms])
    spread = f"{min(scores):.4f} … {max(scores):.4f}"
    table(f"{minutes} minutes of training each; ours {statistics.mean(scores):.4f}, {spread}; {on('cpu')}",
          ["", "bits per byte", "steps", "ms"], lines)


# --- the verbs: each takes the words after it ---

VERBS = {"decode": decode, "record": record, "profile": bench_step.profile, "memory": bench_step.memory,
         "kernels": bench_kernels.kernels, "attention": bench_kernels.attention, "gpu": bench_gpu.gpu,
         "parallel": bench_gpu.bench_parallel, "bpe": bench_course.bench_bpe,
         "pages": bench_course.pages, "toy": bench_course.toy, "ngrams": bench_course.ngrams,
         "align": bench_course.align_bench}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    if not argv or argv[0] not in VERBS:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in VERBS.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    if argv[0] in ("record", "ngrams", "pages", "toy") and {"--help", "-h"} & {*argv}:         # words, no settings
        print(f"usage: python bench.py {argv[0]} …\n{VERBS[argv[0]].__doc__}")
        sys.exit(0)
    if argv[0] == "toy" and argv[1:]:
        fail(f"bench.py toy has no settings, but got {' '.join(argv[1:])}")
    try:
        VERBS[argv[0]](argv[1:])
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
