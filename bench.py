"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value ...]`. Nobody imports this page.

Verbs for machines (profile, memory, kernels, parallel, gpu) stand in bench_systems.py and are reached from here too.
"""
import statistics
import sys
import tempfile
import time

import torch

import bench_systems
from convert import architecture_of, save_pretrained
from model import load_model

# --- the verbs: each takes the words after it ---


def hf(words: list[str]) -> None:
    """Forward and backward of a trained model beside transformers' own on the same weights: hf OUT_DIR."""
    if len(words) != 1:
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


VERBS = {"hf": hf}


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
