"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value …]`; --help lists them.

Models that write, models made smaller and the laptop's record stand here, the other verbs in bench_*.py.

A step of decoding reads every weight for one row of products, so the share of the bandwidth counts. Before it stands
the host: GPT-2 in eager mode launches 400 kernels for a token, 5 µs each, where reading its weights takes 80 µs on an
H100. A CUDA graph launches them all at once, if nothing in the step depends on the host. So every position works on the
whole cache, and a mask hides what is not written yet:

    decoding.stream    a step for 130 keys, then for 131, 132 …    the host knows the length, and waits for each token
    Decoder            a step for 192 keys, each time the same     position and tokens are numbers on the card
"""
import copy
import math
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bench_course
import bench_data
import bench_gpu
import bench_kernels
import bench_parallel
import bench_serve
import bench_step
import compress
from accounting import PRESETS, kv_cache_bytes, table
from bench_step import alternate, on, seconds_of
from checkpoint import open_tokens, read_checkpoint, read_meta
from configurator import command_line, fail
from convert import save_pretrained
from decoding import generate, prefill, speculate, stream
from evaluate import perplexity
from layers import rope_tables
from machine import DTYPES, bandwidth, pick_device
from model import ModelConfig, Transformer, bits_per_byte
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

    There torch.compile fuses each block's small operations; with one row inductor also makes products of its own, in
    which int8 weights are widened as they are read.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], n_new: int):
        c, self.model, self.T = model.config, model, len(prompts[0])
        device, length = model.token_embeddings.weight.device, min(c.context_length, -(-(self.T + n_new) // 64) * 64)
        logits, memory = prefill(model, prompts, True, length - self.T)
        self.layers = [Layer(k, v) for k, v in zip(memory.k, memory.v)]
        self.blocks = [numbered_zero(block) for block in model.layers]
        self.on_cuda, self.run_block, self.graph = device.type == "cuda", run_block, None
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


# --- decoding: tokens per second and their roof ---

LLAMA = dict(context_length=1024, tie_embeddings=True)
SHAPES = PRESETS | {"llama-30m": LLAMA | dict(vocab_size=32_000, d_model=512, n_layers=6, n_heads=8, d_ff=1376),
                    "llama-124m": LLAMA | dict(vocab_size=50_257, d_model=768, n_layers=12, n_heads=12, d_ff=2048),
                    "llama-1.5b": LLAMA | dict(vocab_size=50_304, d_model=2048, n_layers=24, n_heads=16, d_ff=6144),
                    "toy": LLAMA | dict(vocab_size=61, d_model=32, n_layers=2, n_heads=2, d_ff=64)}


@dataclass
class DecodeConfig:
    """What `python bench.py decode` can be told."""
    prompt_tokens: int = 128             # length of every prompt
    new_tokens: int = 64                 # tokens to write after it; the first of them is prefill's
    batch: str = "16"                    # prompts at once, beside one alone; with commas between
    graph: bool = False                  # also Decoder: on a GPU CUDA graphs of its compiled steps
    reference: bool = False              # also transformers' generate with the same weights
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    dtype: str = "float32"               # float32, bfloat16, float16


def rates(pieces, prompts, n: int) -> tuple[float, float]:
    """(tokens read, tokens written) per second by a generator of n tokens a prompt; its first piece counts as read."""
    clock = [time.perf_counter()]
    for _ in pieces:
        clock.append(time.perf_counter())
    return len(prompts) * len(prompts[0]) / (clock[1] - clock[0]), len(prompts) * (n - 1) / (clock[-1] - clock[1])


def time_stream(model, prompts, n: int, **how) -> tuple[float, float]:
    """The same of `stream`."""
    return rates(stream(model, prompts, n, temperature=0, **how), prompts, n)


def time_transformers(model, prompts, n: int) -> tuple[float, float]:
    """The same of transformers' generate: once for one token, once for n."""
    tokens = torch.tensor(prompts, device=model.device)
    first, all_of_them = (seconds_of(lambda: model.generate(tokens, do_sample=False, min_new_tokens=length,
                                                            max_new_tokens=length), model.device) for length in (1, n))
    return tokens.numel() / first, len(prompts) * (n - 1) / (all_of_them - first)


def time_graph(kind: str, model, prompts, n: int):
    """A function that times the Decoder, after its ids have been compared with generate's."""
    decoder = Decoder(model, prompts, n)
    if decoder.on_cuda:
        decoder.record()
    expected = generate(model, prompts, n, temperature=0)
    equal = sum(a == b for row, other in zip(decoder.run(n), expected) for a, b in zip(row, other))
    print(f"{kind}, graph: {equal} of {n * len(prompts)} ids as generate's")
    device = decoder.tokens.device
    return lambda: (math.nan, len(prompts) * (n - 1) / seconds_of(partial(decoder.run, n), device))


def as_transformers(model):
    """The same weights as a model of transformers."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype).eval()
    theirs.generation_config.eos_token_id = None
    return theirs.to(next(model.parameters()).device)


@torch.inference_mode()
def decode(argv: list[str]) -> None:
    """Tokens per second of one prompt and many, int8, int4, drafts, no cache, transformers, beside the roof."""
    usage = "usage: python bench.py decode [OUT_DIR or SHAPE] [--key=value …]     SHAPE: llama-30m, llama-124m, gpt2, …"
    _, files, config, _ = command_line(DecodeConfig, argv, usage)
    name, device = files[0] if files else "llama-30m", pick_device(config.device)
    torch.manual_seed(0)
    with torch.device(device):                           # drawn there: on a host 1.5e9 weights take half a minute
        model = Transformer(ModelConfig(**SHAPES[name])) if name in SHAPES else compress.load(name)[0]
    model, n = model.to(device, DTYPES[config.dtype]).eval().requires_grad_(False), config.new_tokens
    sizes = [1, *map(int, config.batch.split(","))]
    prompts = torch.randint(model.config.vocab_size, (max(sizes), config.prompt_tokens)).tolist()
    models = {"plain": model} | {kind: compress.quantize(copy.deepcopy(model), kind) for kind in ("int8", "int4")}
    runs = {(kind, size): partial(time_stream, one, prompts[:size], n)
            for kind, one in models.items() for size in sizes}
    runs["no cache", 1] = partial(time_stream, model, prompts[:1], max(2, n // 8), cache=False)
    runs["n-grams", 1] = lambda: rates(speculate(model, "ngram", prompts[0], n, temperature=0), prompts[:1], n)
    if config.graph:
        runs |= {(f"{kind}, graph", size): time_graph(kind, one, prompts[:size], n)
                 for kind, one in models.items() for size in sizes}
    if config.reference:
        theirs = as_transformers(model)
        runs |= {("transformers", size): partial(time_transformers, theirs, prompts[:size], n) for size in sizes}
    results = alternate(runs | {"roof": partial(bandwidth, device)}, rounds=3)
    roof, lines = statistics.median(results.pop("roof")), []
    for (label, rows), measured in results.items():
        read, written = map(statistics.median, zip(*measured))
        cache = rows * kv_cache_bytes(model.config, config.prompt_tokens + n // 2, config.dtype)
        limit = rows * roof / (compress.weight_bytes(models.get(label.split(",")[0], model)) + cache)
        lines.append([label, rows, read, written, limit, f"{written / limit:.2f}"])
    table(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.dtype}, prompt "
          f"{config.prompt_tokens}, {n} new; medians of 3 rounds; {on(device)}, {roof / 1e9:.1f} GB/s",
          ["", "rows", "prefill tok/s", "decode tok/s", "roof tok/s", "share"], lines)


# --- compression: bytes, speed, loss ---

def train(out_dir, minutes: str, *flags: str) -> Path:
    """A training run as a process of its own; returns its folder."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), f"--out_dir={out_dir}", "--overwrite=true",
               f"--max_minutes={minutes}", "--num_samples=0", "--eval_every=0", *flags]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return Path(out_dir)


def compress_table(words: list[str]) -> None:
    """Bytes, speed and bits per byte of a model in int8, in int4 and pruned by half: compress [OUT_DIR [MINUTES]].

    Half as wide it is also trained further, alone and by distillation, and from scratch, for MINUTES each."""
    full, minutes, made = Path(words[0] if words else "out/shakespeare"), (*words, "2.4", "2.4")[1], {}
    made["full"] = full
    for label, verb, *flags in (("int8", "quantize", "--kind=int8"), ("int4", "quantize", "--kind=int4"),
                                ("half zeros", "prune", "--kind=magnitude", "--share=0.5"),
                                ("half as wide", "prune", "--kind=width", "--share=0.5")):
        made[label] = full.with_name(f"{full.name}-{label.replace(' ', '-')}")
        compress.main([verb, str(full), str(made[label]), *flags, "--overwrite=true"])
    entries = read_checkpoint(made["half as wide"] / "ckpt.pt", map_location="meta")
    shape, trained = entries["model_config"], entries["train_config"]
    repair = [f"--init_from={made['half as wide']}", f"--data_dir={trained['data_dir']}"]
    repair += [f"--{key}={trained[key] / 10}" for key in ("lr", "muon_lr", "embedding_lr") if trained.get(key)]
    made["trained"] = train(full.with_name(f"{full.name}-trained"), minutes, *repair)
    made["distilled"] = train(full.with_name(f"{full.name}-distilled"), minutes, *repair, f"--teacher={full}")
    sizes = [f"--{key}={shape[key]}" for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")]
    made["from scratch"] = train(full.with_name(f"{full.name}-scratch"), minutes, f"--data_dir={trained['data_dir']}",
                                 *sizes)
    models, lines = {label: compress.load(folder)[0] for label, folder in made.items()}, []
    speeds = alternate({label: partial(time_stream, one, [[1]], 128) for label, one in models.items()}, rounds=3)
    for label, model in models.items():
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
        tokens, n_bytes = open_tokens(trained["data_dir"], "val"), read_meta(trained["data_dir"]).get("val_bytes")
        lines.append([label, size / 1e6, compress.weight_bytes(model) / 1e6,
                      statistics.median(written for _, written in speeds[label]),
                      f"{perplexity(model, tokens, n_bytes)['bits_per_byte']:.4f}"])
    table(f"{full}; the last three {minutes} minutes of training; speed: median of 3 rounds of 128 tokens; {on('cpu')}",
          ["", "weights, MB", "read a token, MB", "tok/s", "bits per byte"], lines)


# --- the record of the laptop ---

def nanogpt(clone, data_dir, minutes: float) -> tuple[float, int, float]:
    """(bits per byte of val.txt, iterations, ms each) of nanoGPT's CPU quick start, trained so long on train.txt."""
    texts = {split: (Path(data_dir) / f"{split}.txt").read_text(encoding="utf-8") for split in ("train", "val")}
    letters = sorted(set("".join(texts.values())))
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(clone, Path(scratch) / "nanoGPT", ignore=shutil.ignore_patterns(".git"))
        data = copy / "data" / "plays"
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
            return subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout

        ms = statistics.median(map(float, re.findall(r"time ([\d.]+)ms", run(200, 1))))
        n = int(60_000 * minutes / ms)
        loss = float(re.findall(r"val loss ([\d.]+)", run(n, 200))[-1])
    return bits_per_byte(loss, len(texts["val"]), len(texts["val"].encode("utf-8"))), n, ms


def record(words: list[str]) -> None:
    """Bits per byte of the default run, seed by seed: record [SEEDS [MINUTES [a clone of nanoGPT, run in turns]]]."""
    seeds, minutes, clone = (*words, *("3", "2.4", None)[len(words):])
    lines, scores = [], []
    for seed in range(1, int(seeds) + 1):
        log = read_log(train(f"out/record/{seed}", minutes, f"--seed={seed}") / "log.jsonl")
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

VERBS = {
    "decode": decode, "compress": compress_table, "record": record,
    "profile": bench_step.profile, "memory": bench_step.memory, "sizes": bench_step.sizes,
    "checkpoints": bench_step.checkpoints, "kernels": bench_kernels.kernels, "attention": bench_kernels.attention,
    "parallel": bench_parallel.bench_parallel, "gpu": bench_gpu.gpu, "bpe": bench_data.bench_bpe,
    "tokenizers": bench_data.tokenizers, "web": bench_data.web, "pages": bench_data.pages,
    "minhash": bench_data.minhash, "toy": bench_course.toy, "sweeps": bench_course.sweeps,
    "ngrams": bench_course.ngrams, "precision": bench_course.precision, "intervals": bench_course.intervals,
    "align": bench_course.align_bench, "serve": bench_serve.serve}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    if not argv or argv[0] not in VERBS:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in VERBS.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    if argv[1:] and argv[0] in ("checkpoints", "toy", "precision"):
        fail(f"bench.py {argv[0]} has no settings, but got {' '.join(argv[1:])}")
    VERBS[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
