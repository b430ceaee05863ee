"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value …]`.

Verbs for machines stand in bench_systems.py, for a GPU in bench_gpu.py, for data in bench_data.py, for the course's
smaller experiments in bench_course.py, for alignment in bench_align.py, for the server in bench_serve.py; all are
reached from here.
"""
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import bench_course
import bench_data
import bench_gpu
import bench_serve
import bench_systems
import bpe
import bpe_fast
import compress
from accounting import PRESETS, kv_cache_bytes
from bench_align import align_bench
from bench_data import show
from checkpoint import open_tokens, read_checkpoint, read_meta
from configurator import command_line
from convert import architecture_of, save_pretrained
from decoding import speculate, stream
from evaluate import perplexity
from machine import DTYPES, bandwidth, pick_device
from model import ModelConfig, Transformer, load_model


# --- decoding: tokens per second and their roof ---

SHAPES = PRESETS | {
    "llama-30m": dict(vocab_size=32_000, context_length=1024, d_model=512, n_layers=6, n_heads=8, d_ff=1376,
                      tie_embeddings=True),
    "llama-124m": dict(vocab_size=50_257, context_length=1024, d_model=768, n_layers=12, n_heads=12, d_ff=2048,
                       tie_embeddings=True)}


@dataclass
class DecodeConfig:
    """What `python bench.py decode` can be told."""
    prompt_tokens: int = 128             # length of every prompt
    new_tokens: int = 64                 # tokens to write after it; the first of them is prefill's
    batch: int = 16                      # prompts at once, beside one alone
    rounds: int = 3                      # every case once a round; the median counts
    k: int = 4                           # drafts for each pass
    reference: bool = False              # also transformers' generate with the same weights
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    dtype: str = "float32"               # float32, bfloat16, float16
    out: str | None = None               # file that gets the table too


def time_stream(model, prompts, n: int, **how) -> tuple[float, float]:
    """(tokens read, tokens written) per second by `stream`; the first token of each row counts as read."""
    clock = [time.perf_counter()]
    for _ in stream(model, prompts, n, temperature=0, **how):
        clock.append(time.perf_counter())
    return len(prompts) * len(prompts[0]) / (clock[1] - clock[0]), len(prompts) * (n - 1) / (clock[-1] - clock[1])


def time_drafts(model, draft, prompt, n: int, k: int) -> tuple[float, float]:
    """The same by `speculate`."""
    clock = [time.perf_counter()]
    for _ in speculate(model, draft, prompt, n, k=k, temperature=0):
        clock.append(time.perf_counter())
    return len(prompt) / (clock[1] - clock[0]), (n - 1) / (clock[-1] - clock[1])


def time_transformers(model, prompts, n: int) -> tuple[float, float]:
    """The same by transformers' generate: once for one token, once for n."""
    tokens, seconds = torch.tensor(prompts, device=model.device), []
    for length in (1, n):
        began = time.perf_counter()
        model.generate(tokens, do_sample=False, min_new_tokens=length, max_new_tokens=length).tolist()     # a GPU's too
        seconds.append(time.perf_counter() - began)
    return tokens.numel() / seconds[0], len(prompts) * (n - 1) / (seconds[1] - seconds[0])


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
    model = Transformer(ModelConfig(**SHAPES[name])) if name in SHAPES else compress.load(name)[0]
    model = model.to(device, DTYPES[config.dtype]).eval()
    n, many = config.new_tokens, torch.randint(model.config.vocab_size, (config.batch, config.prompt_tokens)).tolist()
    int8, int4 = (compress.quantize(copy.deepcopy(model), kind) for kind in ("int8", "int4"))
    cases = [(label, one, rows, lambda one=one, rows=rows: time_stream(one, rows, n))
             for label, one in (("plain", model), ("int8", int8), ("int4", int4)) for rows in (many[:1], many)]
    cases.append(("no cache", model, many[:1], lambda: time_stream(model, many[:1], max(2, n // 8), cache=False)))
    cases.append(("n-grams", model, many[:1], lambda: time_drafts(model, "ngram", many[0], n, config.k)))
    if model.config.mtp_depth:
        cases.append(("own head", model, many[:1], lambda: time_drafts(model, "mtp", many[0], n, config.k)))
    if config.reference:
        theirs = as_transformers(model)
        cases += [("transformers", model, rows, lambda rows=rows: time_transformers(theirs, rows, n))
                  for rows in (many[:1], many)]
    rounds, roofs = [], []
    for _ in range(config.rounds):                   # in turn: what slows the machine down slows all of them
        roofs.append(bandwidth(device))
        rounds.append([run() for *_, run in cases])
    roof = statistics.median(roofs)
    lines = [f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.dtype}, prompt "
             f"{config.prompt_tokens}, {n} new; medians of {config.rounds} rounds, {torch.get_num_threads()} threads, "
             f"memory {roof / 1e9:.1f} GB/s",
             f"{'':<14}{'rows':>5} | {'prefill tok/s':>13} | {'decode tok/s':>12} | {'roof tok/s':>10} | share"]
    length = config.prompt_tokens + n // 2
    for i, (label, one, rows, _) in enumerate(cases):
        read, written = (statistics.median(results[i][phase] for results in rounds) for phase in (0, 1))
        cache = len(rows) * kv_cache_bytes(model.config, length, config.dtype)
        limit = len(rows) * roof / (compress.weight_bytes(one) + cache)
        lines.append(f"{label:<14}{len(rows):>5} | {read:>13,.0f} | {written:>12,.1f} | {limit:>10,.0f} | "
                     f"{written / limit:.2f}")
    show(lines, config.out)


# --- compression: bytes, speed, loss ---

@dataclass
class CompressConfig:
    """What `python bench.py compress OUT_DIR` can be told."""
    share: float = 0.5                   # what pruning takes away
    minutes: float = 2.4                 # of training, for the pruned model and for the small one from scratch alike
    lr_factor: float = 0.1               # the pruned model's learning rates, as a share of those it was trained with
    new_tokens: int = 128                # tokens to write when speed is measured
    rounds: int = 3                      # of that, in turn
    out: str | None = None               # file that gets the table too


def train(out_dir, minutes: float, *flags: str) -> Path:
    """A training run of so many minutes as a process of its own; returns its folder."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), f"--out_dir={out_dir}", "--overwrite=true",
               f"--max_minutes={minutes}", "--num_samples=0", "--eval_every=0", *flags]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return Path(out_dir)


def compress_table(argv: list[str]) -> None:
    """Bytes, tokens per second and bits per byte of a model in int8, int4, pruned, distilled, trained small."""
    usage = "usage: python bench.py compress [OUT_DIR] [--key=value …]"
    _, files, config, _ = command_line(CompressConfig, argv, usage)
    full = Path(files[0] if files else "out/shakespeare")
    made = {"full": full}
    for label, *words in (("int8", "quantize", "--kind=int8"), ("int4", "quantize", "--kind=int4"),
                          ("zeros", "prune", "--kind=magnitude", f"--share={config.share}"),
                          ("pruned", "prune", "--kind=width", f"--share={config.share}")):
        made[label] = full.with_name(f"{full.name}-{label}")
        compress.main([words[0], str(full), str(made[label]), *words[1:], "--overwrite=true"])
    entries = read_checkpoint(made["pruned"] / "ckpt.pt", map_location="meta")
    shape, trained = entries["model_config"], entries["train_config"]
    data_dir = trained["data_dir"]
    repair = [f"--init_from={made['pruned']}", f"--data_dir={data_dir}"]
    repair += [f"--{key}={trained[key] * config.lr_factor}" for key in ("lr", "muon_lr", "embedding_lr")
               if trained.get(key) is not None]
    made["pruned, trained"] = train(full.with_name(f"{full.name}-trained"), config.minutes, *repair)
    made["pruned, distilled"] = train(full.with_name(f"{full.name}-distilled"), config.minutes, *repair,
                                      f"--teacher={full}")
    made["from scratch"] = train(full.with_name(f"{full.name}-scratch"), config.minutes, f"--data_dir={data_dir}",
                                 *(f"--{key}={shape[key]}" for key in ("n_heads", "n_kv_heads", "head_dim", "d_ff")))
    models = {label: compress.load(folder)[0] for label, folder in made.items()}
    rates = [[time_stream(model, [[1]], config.new_tokens)[1] for model in models.values()]
             for _ in range(config.rounds)]
    tokens, n_bytes = open_tokens(data_dir, "val"), read_meta(data_dir).get("val_bytes")
    lines = [f"{full}: share {config.share}, {config.minutes} minutes of training each, {torch.get_num_threads()} "
             f"threads; speed is the median of {config.rounds} rounds of {config.new_tokens} tokens",
             f"{'':<20}{'weights, MB':>12}{'read a token, MB':>18}{'tok/s':>9}{'bits per byte':>15}"]
    for i, (label, model) in enumerate(models.items()):
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
        bits = perplexity(model, tokens, n_bytes)["bits_per_byte"]
        lines.append(f"{label:<20}{size / 1e6:>12.2f}{compress.weight_bytes(model) / 1e6:>18.2f}"
                     f"{statistics.median(round_[i] for round_ in rates):>9,.0f}{bits:>15.4f}")
    show(lines, config.out)


# --- the tokenizer beside others ---

@dataclass
class BpeConfig:
    """What `python bench.py bpe FILE` can be told."""
    vocab_size: int = 32000            # of the vocabulary that is trained
    tokenizer: str = ""                # a tokenizer.json with GPT-2's pattern, to encode with instead of training
    megabytes: float = 10.0            # how much of FILE is encoded
    repeats: int = 5                   # how often, in turns


def bench_bpe(words: list[str]) -> None:
    """Training and encoding of FILE beside Hugging Face's tokenizers and tiktoken; ids must agree."""
    _, files, config, _ = command_line(BpeConfig, words, "python bench.py bpe FILE [--key=value ...]")
    if len(files) != 1:
        sys.exit("usage: python bench.py bpe FILE [--key=value ...]")
    import tiktoken
    import tokenizers
    path, seconds = files[0], {}

    def clock(name, run):
        begin = time.perf_counter(), time.process_time()
        result = run()
        seconds.setdefault(name, []).append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        return result

    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, {bpe_fast.cpus()} CPUs, {path}: "
          f"{os.path.getsize(path) / 1e6:.1f} MB")
    special = ["<|endoftext|>"]
    if config.tokenizer:
        tok = bpe.Tokenizer.load(config.tokenizer)
    else:
        tok = bpe.Tokenizer(*clock("ours", lambda: bpe.train_bpe(path, config.vocab_size, special)), special)
        level = tokenizers.pre_tokenizers.ByteLevel
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=special,
                                                 show_progress=False, initial_alphabet=level.alphabet())
        rival = tokenizers.Tokenizer(tokenizers.models.BPE())
        rival.pre_tokenizer = level(add_prefix_space=False)
        clock("Hugging Face", lambda: rival.train([path], trainer))
        print(f"training, vocabulary {config.vocab_size:,}: " +
              ", ".join(f"{name} {times[0][0]:.2f} s" for name, times in seconds.items()))
        seconds.clear()
    text = Path(path).read_bytes()[:int(config.megabytes * 1e6)].decode("utf-8", errors="ignore")
    with tempfile.TemporaryDirectory() as folder:
        tok.save(f"{folder}/tokenizer.json")
        theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        theirs.encode_special_tokens = True              # as plain text, like encode_ordinary
        tok = bpe.Tokenizer.load(f"{folder}/tokenizer.json")
    plain = {token: i for i, token in tok.vocab.items() if i not in tok.special_tokens.values()}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    tik = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=plain, special_tokens=tok.special_tokens)
    for _ in range(config.repeats):
        ids = clock("ours", lambda: tok.encode(text, set()))
        if ids != clock("tiktoken", lambda: tik.encode_ordinary(text)):
            raise ValueError("tiktoken's ids differ from ours")
        if ids != clock("Hugging Face", lambda: theirs.encode_batch_fast([text], add_special_tokens=False)[0].ids):
            raise ValueError("Hugging Face's ids differ from ours")
    size = len(text.encode("utf-8")) / 1e6
    print(f"encoding {size:.1f} MB, vocabulary {tok.vocab_size:,}, one process, {len(ids):,} equal ids, MB per CPU s")
    for name, times in seconds.items():
        cpu = [size / used for _, used in times]
        print(f"  {name:14} first {cpu[0]:6.1f}   median {sorted(cpu)[len(cpu) // 2]:6.1f}   best {max(cpu):6.1f}")


# --- beside transformers ---

def hf(words: list[str]) -> None:
    """Forward and backward of a trained model beside transformers' own on the same weights: hf OUT_DIR."""
    if len(words) != 1 or words[0].startswith("-"):
        sys.exit("usage: python bench.py hf OUT_DIR")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        sys.exit("hf compares with transformers, which is not installed: pip install transformers")
    repeats, (ours, _) = 15, load_model(words[0])
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    ours, theirs, T = ours.float().train(), theirs.train(), ours.config.context_length
    x, y = torch.randint(0, ours.config.vocab_size, (2, max(1, 2048 // T), T))

    def their_loss():
        logits = theirs(input_ids=x, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    print(f"{architecture_of(ours.config)}, {x.shape[0]} x {T} tokens, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; ms of forward and backward, median of {repeats} in turns (fastest)")
    for dtype in (torch.float32, torch.bfloat16):
        ms = {"ours": [], "transformers": []}
        for turn in range(repeats + 2):
            for name, loss in (("ours", lambda: ours(x, y)[1]), ("transformers", their_loss)):
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = loss()
                value.backward()
                if turn > 1:                      # the first two warm up
                    ms[name].append(1000 * (time.perf_counter() - began))
        print(f"{str(dtype)[6:]:<9}", *(f"{name} {statistics.median(times):.1f} ({min(times):.1f})"
                                        for name, times in ms.items()))


# --- the verbs: each takes the words after it ---

VERBS = {"align": align_bench, "bpe": bench_bpe, "hf": hf, "decode": decode, "compress": compress_table}


def verbs() -> dict:
    """Name -> function of every verb."""
    pages = (bench_data.VERBS, bench_course.VERBS, bench_serve.VERBS, bench_systems.VERBS)
    return VERBS | {name: verb for page in pages for name, verb in page.items()} | {"gpu": bench_gpu.gpu}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    if not argv or argv[0] not in verbs():
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in verbs().items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    verbs()[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
