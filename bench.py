"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value ...]`. No page imports this one.

Verbs for machines (profile, memory, kernels, parallel, gpu) stand in bench_systems.py and are reached from here too.
"""
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import bench_systems
import bpe
from configurator import command_line

# --- the verbs: each takes the words after it ---


@dataclass
class BpeConfig:
    vocab_size: int = 32000            # of the vocabulary that is trained
    tokenizer: str = ""                # a tokenizer.json with GPT-2's pattern, to encode with instead of training
    megabytes: float = 10.0            # how much of FILE is encoded
    repeats: int = 5                   # how often, in turns


def bench_bpe(words):
    """Tokenizer FILE: training beside Hugging Face's, encoding beside Hugging Face's and tiktoken's; ids must agree."""
    import tiktoken
    import tokenizers
    _, files, config, _ = command_line(BpeConfig, words, "python bench.py bpe FILE [--key=value ...]")
    path, seconds = files[0], {}

    def clock(name, run):
        begin = time.perf_counter(), time.process_time()
        result = run()
        seconds.setdefault(name, []).append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        return result

    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, {bpe.cpus()} CPUs, {path}: "
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


VERBS = {"bpe": bench_bpe}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    verbs = VERBS | bench_systems.VERBS
    if not argv or argv[0] not in verbs:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in verbs.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    verbs[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
