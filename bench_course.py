"""The course's smaller experiments, a verb of bench.py each; every one ends within ten minutes on two CPU cores.

    python bench.py toy                       SGD on one quadratic at learning rates 1 … 1,000
    python bench.py sweeps ablations          one grid of training runs on the default corpus, by name
    python bench.py ngrams data/shakespeare   what models reach that only count: is my loss normal?
    python bench.py intervals                 how often intervals of scaling predictions hold the truth
    python bench.py precision                 sums in half precision; which tensor has which dtype under autocast
"""
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import laws
from checkpoint import open_tokens, read_meta
from configurator import command_line
from layers import LayerNorm, Linear, cross_entropy
from machine import pick_device
from model import bits_per_byte
from optim import SGD


# --- learning rates on a toy, and grids of real runs ---

def toy(words: list[str]) -> None:
    """SGD on the mean of squares of 100 weights, learning rate α / √(t + 1): the loss after steps 1 … 10."""
    print(f"{'α':>6}" + "".join(f"{step:>10}" for step in range(1, 11)))
    for rate in (1.0, 10.0, 100.0, 1000.0):
        weights = torch.nn.Parameter(5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))
        optimizer, losses = SGD([weights], lr=rate, momentum=0.0), []
        for step in range(10):
            loss = (weights ** 2).mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.param_groups[0]["lr"] = rate / (step + 1) ** 0.5
            optimizer.step()
            optimizer.zero_grad()
        print(f"{rate:>6g}" + "".join(f"{loss:>10.3g}" for loss in losses))
    print("A step multiplies every weight by 1 - 2 α / (100 √(t + 1)): it shrinks while that is within ±1, so α up to "
          "100 converges (100 in one step: 1 - 2 = -1, the same loss once, then less), and 1,000 diverges.")


STEPS = "--max_minutes=none --eval_every=0 --num_samples=0 --max_steps=300 --warmup_steps=30"
SWEEPS = {                                     # name -> command lines of `train.py sweep`, all of equal tokens
    "ablations": ["", "smear=false", "norm=none", "norm=none muon_lr=0.003 lr=0.0008 embedding_lr=0.016",
                  "norm_position=post", "position=none", "qk_norm=false", "ffn=silu d_ff=512"],
    "learning_rate": ["lr=1e-3,3e-3,1e-2,1e-1,30 --optimizer=adamw --embedding_lr=none"],
    "batch": ["batch_tokens=256 max_steps=2400 warmup_steps=240", "batch_tokens=1024 max_steps=600 warmup_steps=60",
              "batch_tokens=2048", "batch_tokens=4096 max_steps=150 warmup_steps=15",
              "batch_tokens=16384 max_steps=38 warmup_steps=4", "batch_tokens=65536 max_steps=10 warmup_steps=2"],
    "muon": ["muon_lr=0.02,0.03,0.04"], "muon_steps": ["muon_steps=2,3,5"],
    "embedding": ["embedding_lr=0.008,0.04,0.16,0.64"],
    "width": ["d_model=96 max_steps=403 warmup_steps=40", "d_model=128", "d_model=192 max_steps=170 warmup_steps=17"],
    "depth": ["n_layers=2 max_steps=492 warmup_steps=49", "n_layers=4", "n_layers=6 max_steps=221 warmup_steps=22"]}


@dataclass
class SweepsConfig:
    """What `python bench.py sweeps NAME…` can be told."""
    seeds: str = "1"                          # with commas between
    out: str = "out"                          # a folder per sweep in it, with sweep.txt and sweep.png


def sweeps(words: list[str]) -> None:
    """Grids of training runs on the default corpus by name; runs that have ended are not run again."""
    usage = f"usage: python bench.py sweeps NAME… [--seeds=1,2,3]     NAME: {', '.join(SWEEPS)}"
    _, names, config, _ = command_line(SweepsConfig, words, usage)
    if not names or not set(names) <= set(SWEEPS):
        sys.exit(usage)
    for name in names:
        for line in SWEEPS[name]:
            axes, given = line.split(), STEPS.split()
            keys = {word.split("=")[0] for word in axes}
            given = [flag for flag in given if flag[2:].split("=")[0] not in keys]
            command = [sys.executable, str(Path(__file__).with_name("train.py")), "sweep", *axes,
                       f"seed={config.seeds}", *given, f"--out_dir={config.out}/{name}"]
            print("$", " ".join(command[1:]), flush=True)
            subprocess.run(command, check=True)


# --- what counting reaches ---

def counting_losses(data_dir) -> dict:
    """Loss in nats a token of validation by models that only count the training split: uniform, unigram, bigram."""
    V, (train, val) = read_meta(data_dir)["vocab_size"], (np.array(open_tokens(data_dir, split), dtype=np.int64)
                                                          for split in ("train", "val"))
    unigram = np.bincount(train, minlength=V) + 1.0
    unigram /= unigram.sum()
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    asked = val[:-1] * V + val[1:]
    place = np.clip(np.searchsorted(pairs, asked), 0, len(pairs) - 1)
    seen = np.where(pairs[place] == asked, counts[place], 0)
    before = np.bincount(train[:-1], minlength=V)[val[:-1]]
    followers = np.bincount(pairs // V, minlength=V)[val[:-1]]          # different tokens seen after the one before
    # Witten and Bell: a new follower comes as often as new ones came so far, and is drawn from the unigram.
    bigram = (seen + followers * unigram[val[1:]]) / np.maximum(before + followers, 1)
    bigram = np.where(before > 0, bigram, unigram[val[1:]])
    return {"uniform": float(np.log(V)), "unigram": float(-np.log(unigram[val[1:]]).mean()),
            "bigram (Witten-Bell)": float(-np.log(bigram).mean())}


def ngrams(words: list[str]) -> None:
    """Bits per byte of the validation split by uniform, unigram, bigram models, counts of the training split."""
    if len(words) != 1:
        sys.exit("usage: python bench.py ngrams DATA_DIR")
    meta = read_meta(words[0])
    print(f"{words[0]}: {meta['val_tokens']:,} tokens of validation, vocabulary {meta['vocab_size']:,}\n"
          f"{'':<24}{'nats a token':>14}{'bits per byte':>15}\n{'any byte alike':<24}{'':>14}{8.0:>15.3f}")
    for name, loss in counting_losses(words[0]).items():
        print(f"{name:<24}{loss:>14.3f}{bits_per_byte(loss, meta['val_tokens'], meta['val_bytes']):>15.3f}")


# --- precision ---

def precision(words: list[str]) -> None:
    """A thousand times 0.01 summed in float32, float16 and mixed; dtypes of a small model under autocast."""
    hundredth = {dtype: torch.tensor(0.01, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    sums = [(dtype, dtype) for dtype in hundredth] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    for total, part in sums:
        result = torch.tensor(0.0, dtype=total)
        for _ in range(1000):
            result += hundredth[part]
        print(f"1,000 x 0.01 in {str(part)[6:]:<9} summed in {str(total)[6:]:<9} {result.item():.4f}")
    device, seen = pick_device(None), {}
    torch.manual_seed(0)
    first, norm, last = Linear(8, 16).to(device), LayerNorm(16).to(device), Linear(16, 4).to(device)
    x, targets = torch.randn(32, 8, device=device), torch.randint(4, (32,), device=device)
    with torch.autocast(device.split(":")[0], torch.bfloat16):
        seen["output of Linear"] = hidden = first(x)
        seen["output of LayerNorm"] = normed = norm(hidden.relu())
        seen["logits"] = logits = last(normed)
        seen["loss"] = loss = cross_entropy(logits, targets)
    loss.backward()
    seen |= {"weight of Linear": first.weight, "its gradient": first.weight.grad}
    print(f"under autocast to bfloat16 on {device}: "
          + ", ".join(f"{name} {str(tensor.dtype)[6:]}" for name, tensor in seen.items()))


# --- are intervals honest? ---

@dataclass
class IntervalsConfig:
    """What `python bench.py intervals` can be told."""
    worlds: int = 100                         # seeds of noise


def law_runs(law: tuple, noise: float, seed: int) -> list[dict]:
    """54 runs of a law with noise: nine sizes, a fifth to five times the best one, at each of six budgets."""
    (e, a, b, alpha, beta), draws, runs = law, np.random.default_rng(seed), []
    for flops in np.geomspace(1e18, 1e20, 6):
        best = (alpha * a / (beta * b) * (flops / 6) ** beta) ** (1 / (alpha + beta))          # of 6 N D = C
        for n in best * np.geomspace(0.2, 5, 9):
            loss = (e + a / n ** alpha + b / (flops / 6 / n) ** beta) * np.exp(noise * draws.normal())
            runs.append({"n_params": n, "n_tokens": flops / 6 / n, "flops": flops, "loss": loss})
    return runs


def intervals(words: list[str]) -> None:
    """Of 100 worlds, how many 90 % intervals of N, D and loss hold the truth, and how wide they are."""
    _, _, config, _ = command_line(IntervalsConfig, words, "usage: python bench.py intervals [--key=value …]")
    target, keys = 30 * 1e20, ("n_params", "n_tokens", "loss")
    print(f"54 runs, six budgets up to 1e20, prediction at {target:.0e} FLOPs, {config.worlds} worlds; held, of them, "
          f"and median high / low\n{'fit':<16}{'law':<11}{'noise':>7}" + "".join(f"{key:>16}" for key in keys))
    for fit in (laws.fit_isoflop, laws.fit_parametric):
        for name, law in laws.PUBLISHED.items():
            truth = laws.predict(laws.published(name), target, warn=False)
            for noise in (0.002, 0.003, 0.01, 0.03):
                made = [laws.predict(fit(law_runs(law, noise, seed)), target, warn=False)
                        for seed in range(config.worlds)]
                cells = []
                for key in keys:
                    held = sum(one[f"{key}_low"] <= truth[key] <= one[f"{key}_high"] for one in made)
                    width = statistics.median(one[f"{key}_high"] / one[f"{key}_low"] for one in made)
                    cells.append(f"{held:>9}{width:>7.3f}")
                print(f"{fit.__name__:<16}{name:<11}{noise:>7.1%}" + "".join(cells), flush=True)
