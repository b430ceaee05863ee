"""Where a step of the default model goes, and AdamW's step beside torch's: `python results/step_shares.py [--key=…]`.

Medians over 60 steps after 5 that warm up; the loader's time is what a step waits for its batch, which a thread has
made meanwhile, and beside it what making a batch takes. Both AdamW step the same tensors in turns, 200 times.
"""
import statistics
import sys
import time
from pathlib import Path

here = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(here))
import torch  # noqa: E402

import optim  # noqa: E402
import train  # noqa: E402
from configurator import command_line  # noqa: E402


def timed(function, times: list):
    def call(*arguments, **keywords):
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        times.append(1000 * (time.perf_counter() - start))
        return result
    return call


def main() -> None:
    _, _, config, _ = command_line(train.TrainConfig, [str(here / "config_shakespeare.py"), *sys.argv[1:]], __doc__)
    run, parts = train.Run(config), {"step": [], "waiting for the batch": [], "making a batch": []}
    run.loader.next = timed(run.loader.next, parts["waiting for the batch"])
    run.loader.draw = timed(run.loader.draw, parts["making a batch"])
    for optimizer in run.optimizers:
        parts[type(optimizer).__name__] = []
        optimizer.step = timed(optimizer.step, parts[type(optimizer).__name__])
    step = timed(run.train_step, parts["step"])
    for _ in range(65):
        step()
    whole = statistics.median(parts["step"][5:])
    print(f"{run.n_params:,} parameters, {run.sequences} x {config.context_length} tokens, {run.dtype}, {run.device}, "
          f"{torch.get_num_threads()} threads")
    for name, times in parts.items():
        print(f"{name:<22}{statistics.median(times[5:]):>9.3f} ms{100 * statistics.median(times[5:]) / whole:>8.2f} %")

    tensors = {}
    for name, make in (("optim.AdamW", optim.AdamW), ("torch.optim.AdamW", torch.optim.AdamW)):
        copies = [p.detach().clone().requires_grad_() for p in run.model.parameters()]
        for p in copies:
            p.grad = torch.randn_like(p)
        tensors[name] = make(copies, lr=1e-3), []
    for _ in range(210):
        for optimizer, times in tensors.values():
            timed(optimizer.step, times)()
    for name, (_, times) in tensors.items():
        print(f"{name:<22}{statistics.median(times[10:]):>9.3f} ms on all parameters")


if __name__ == "__main__":
    main()
