"""Training in fifteen lines: what train.py does, without all that makes it safe, fast and divided among ranks.

    repeat   x, y = a random batch              recipe.get_batch
             loss = model(x, y)                 forward: how surprised is the model by what comes next?
             gradients of the loss              backward
             clip them to a norm of 1           optim.clip_grad_norm: one bad batch must not throw the model off
             the learning rate of this step     optim.cosine_schedule: up, then down along a cosine
             a step against the gradients       optim.AdamW

What train.py adds to it: batches in parts that fit the memory, dtypes and torch.compile, several optimizers, evaluation
on text that is not trained on, a log, a clock, checkpoints after which a run goes on bit for bit, and ranks. Each of
these is a few lines; the loop in the middle stays this one.

`python practice.py start train_loop` asks you to write it from an empty file:

    train(model, tokens, steps, batch_size=16, lr=0.01, seed=0) -> list of float, the loss of every step in nats

model: a model.Transformer, trained in place. tokens: (n,) ids, more than the model's context_length. seed: of the
batches.
"""
import torch

from optim import AdamW, clip_grad_norm, cosine_schedule
from recipe import get_batch


def train(model, tokens, steps: int, batch_size: int = 16, lr: float = 0.01, seed: int = 0) -> list[float]:
    """Train `model` on random windows of `tokens` (n,); returns the loss of every step, in nats a token."""
    generator, losses = torch.Generator().manual_seed(seed), []
    optimizer = AdamW(model.parameters(), lr)
    model.train()
    for step in range(1, steps + 1):                     # from 1: at step 0 of the schedule the rate is 0
        x, y = get_batch(tokens, batch_size, model.config.context_length, "cpu", generator)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, lr, 0.1 * lr, steps // 10, steps)
        optimizer.step()
        losses.append(loss.item())
    return losses
