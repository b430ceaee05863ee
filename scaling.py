"""scaling.py"""
import contextlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from accounting import count_params, flops_per_token
from configurator import command_line, fail
from model import ModelConfig

# `real`: budgets in exact FLOPs, and the shapes (d_model, n_layers, n_heads) trained at each, around the best one.
REAL_GRID = {5.0e11: [(24, 2, 1), (32, 2, 1), (40, 2, 1), (48, 2, 1), (64, 2, 2)],
             1.5e12: [(24, 2, 1), (32, 2, 1), (48, 2, 1), (64, 2, 2), (64, 4, 2)],
             4.5e12: [(48, 2, 1), (64, 2, 2), (64, 4, 2), (96, 3, 3), (96, 4, 3)]}
REAL_CHECK_SHAPES = [(128, 4, 4), (128, 6, 4), (160, 4, 5), (192, 4, 6), (192, 6, 6), (256, 4, 8)]
REAL_RECIPE = dict(context_length=256, batch_tokens=1024, optimizer="muon", qk_norm=True,
                   zero_init=True, schedule="wsd", decay_fraction=0.7, min_lr_factor=0.02, eval_every=0,
                   checkpoint_every=500)


def size(config: ModelConfig) -> int:
    """N, the non-embedding parameters of a model: all but the embeddings and the head (Kaplan 2020, section 2.1)."""
    counts = count_params(config)
    return counts["total"] - counts["token_embeddings"] - counts["position_embeddings"] - counts["lm_head"]


# --- real runs ---

def real_run(job: dict) -> dict:
    """Train one small model through train.py, or go on with it, and return its run record.

    job: name, d_model, n_layers, n_heads, steps, seed, vocab_size, data_dir, out_dir, device, dtype, threads.
    """
    torch.set_num_threads(job["threads"])
    out_dir = Path(job["out_dir"]) / job["name"]
    shape = {key: job[key] for key in ("d_model", "n_layers", "n_heads")}
    rate = (64 / job["d_model"]) ** 0.5    # peak rates fall with the width
    config = train.TrainConfig(**REAL_RECIPE | shape | {
        "lr": 0.012 * rate, "muon_lr": 0.04 * rate,
        "data_dir": job["data_dir"], "out_dir": str(out_dir), "max_steps": job["steps"], "seed": job["seed"],
        "warmup_steps": max(10, job["steps"] // 20), "log_every": max(1, job["steps"] // 50), "device": job["device"],
        "dtype": job["dtype"], "resume": (out_dir / "ckpt.pt").exists()})
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        figures = train.main(config)       # its log.jsonl has all that it prints
    if figures["interrupted"] is not None:
        raise KeyboardInterrupt(f"{job['name']} was stopped and saved; the same command goes on")
    model = config.model_config(job["vocab_size"])
    n_params, n_tokens = size(model), figures["tokens"]
    exact = flops_per_token(model, model.context_length, training=True)["total"] * n_tokens
    curve = [[line["step"] * config.batch_tokens, line["loss"]] for line in train.read_log(out_dir / "log.jsonl")
             if "norm" in line]
    return {"name": job["name"], "n_params": n_params, "n_tokens": n_tokens, "flops": 6 * n_params * n_tokens,
            "loss": figures["val_loss"], "flops_exact": exact, "budget": job["budget"], "seed": job["seed"], **shape,
            "dtype": job["dtype"], "seconds": round(figures["seconds"], 1), "curve": curve}


def real_jobs(settings) -> list[dict]:
    """The grid as jobs, cheapest first; the smallest budget twice, with another seed, to see the noise."""
    meta = train.data.read_meta(settings.data_dir)
    device = train.pick_device(settings.train_device)
    common = {"vocab_size": meta["vocab_size"], "data_dir": settings.data_dir, "out_dir": settings.out_dir,
              "device": device, "dtype": settings.dtype or train.pick_dtype(None, device)}
    jobs = []
    for number, (budget, shapes) in enumerate(REAL_GRID.items()):
        for seed in (1, 2) if number == 0 else (1,):
            jobs += [real_job(shape, budget * settings.scale, seed, common) for shape in shapes]
    return jobs


def real_job(shape: tuple, budget: float, seed: int, common: dict) -> dict:
    """The job that spends `budget` exact FLOPs on one shape."""
    values = dict(zip(("d_model", "n_layers", "n_heads"), shape))
    model = ModelConfig(**values, vocab_size=common["vocab_size"], context_length=REAL_RECIPE["context_length"],
                        qk_norm=True)
    per_step = flops_per_token(model, model.context_length, training=True)["total"] * REAL_RECIPE["batch_tokens"]
    steps = max(1, round(budget / per_step))
    return common | values | {"name": f"{shape[0]}x{shape[1]}_{steps}_seed{seed}", "budget": budget, "steps": steps,
                              "seed": seed}


def train_missing(jobs: list[dict], path: Path, workers: int) -> list[dict]:
    """Run what `path` does not hold yet, `workers` at a time, saving each record as it comes; returns all records."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {record["name"] for record in records}
    todo = [job | {"threads": max(1, (os.cpu_count() or 1) // workers)} for job in jobs if job["name"] not in done]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {path}, {len(todo)} to train", flush=True)
    # Spawned, not forked: a forked copy of torch's thread pool hangs.
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        for record in (pool.imap_unordered(real_run, todo) if pool else map(real_run, todo)):
            records.append(record)
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(records, indent=None).replace("}, {", "},\n {"), encoding="utf-8")
            os.replace(temporary, path)
            print(f"{record['name']:<20} N {record['n_params']:>9,}  D {record['n_tokens']:>9,}  exact FLOPs "
                  f"{record['flops_exact']:.2e}  loss {record['loss']:.4f}  {record['seconds']:.0f} s", flush=True)
    return [record for record in records if record["name"] in {job["name"] for job in jobs}]


@dataclass
class Settings:
    data_dir: str = "data/shakespeare"
    out_dir: str = "out/scaling"
    results_dir: str = "results"
    train_device: str | None = None
    dtype: str | None = None
    scale: float = 1.0
    workers: int = 2


def real(settings) -> None:
    jobs = real_jobs(settings)
    runs = train_missing(jobs, Path(settings.results_dir) / "scaling_runs.json", settings.workers)


if __name__ == "__main__":
    verb, files, settings, _ = command_line(Settings, sys.argv[1:], "usage", verbs=("real",))
    real(settings)
