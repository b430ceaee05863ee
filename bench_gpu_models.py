"""The models' stages of `python bench.py gpu`: training and decoding; and what a stage's process runs.

A training step of GPT-2 is products, so MFU counts, the share of the data sheet's FLOP/s (PaLM, 2204.02311).
"""
import contextlib
import io
import statistics
import sys
import tempfile

import torch

import bench
import bench_gpu
import train
from accounting import flops_per_token
from bench_gpu import GpuConfig, Sheet, free
from bench_step import seconds_of
from configurator import command_line
from convert import their_config
from machine import peak_flops
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


def said(sheet: Sheet, verb: str, words: list[str]):
    """What a verb of bench.py gives; what it says goes to the table."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        result = bench.VERBS[verb](words)
    sheet("", f"python bench.py {verb} {' '.join(words)}", *text.getvalue().splitlines())
    return result


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
        parts = sheet.attempt("profile", lambda: said(sheet, "profile", words), needs=10)
        sheet.attempt("memory", lambda: said(sheet, "memory", words), needs=10)
    for region, ms in (parts or {}).items():
        sheet.point("training_step", "", region, ms)


# --- decoding ---

def decoding(sheet: Sheet) -> None:
    """Tokens per second by shape, batch, weights and way of launching, as a share of the bandwidth."""
    sheet("gpt-fast, Llama-2-7B on an A100 that reads 1,700 GB/s, batch 1: 0.82, int8 0.63, int4 0.51 (its README)")
    for shape, changes in sheet.size["decode"].items():
        words = [shape, *changes, "--dtype=bfloat16", "--graph=true", "--reference=true", f"--device={sheet.device}"]
        sheet.attempt(f"decode {shape}", lambda: said(sheet, "decode", words), needs=25)


# --- a stage's process ---

STAGES = {"correct": bench_gpu.correct, "kernels": bench_gpu.kernels, "training": training, "decoding": decoding,
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
