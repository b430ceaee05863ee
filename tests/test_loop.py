"""Claims about loop.py."""
import math

import pytest
import torch

from common import random_model
import loop
import optim
import recipe

SONG = "the wheels on the bus go round and round, round and round, all through the town. "
TOKENS = [ord(letter) % 50 for letter in SONG * 20]


def test_a_loop_of_a_few_lines_learns_a_text_as_torchs_parts_do():
    losses = loop.train(random_model(), TOKENS, 150)
    assert len(losses) == 150 and all(isinstance(loss, float) for loss in losses)
    assert losses[0] == pytest.approx(math.log(50), abs=0.6), "an untrained model knows nothing"
    assert sum(losses[-10:]) / 10 < 0.5, "far below the 2.5 nats of counting letters"
    model, generator, expected = random_model().train(), torch.Generator().manual_seed(3), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for step in range(1, 7):
        model.zero_grad()
        loss = model(*recipe.get_batch(TOKENS, 8, 16, "cpu", generator))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = optim.cosine_schedule(step, 0.02, 0.002, 2, 20)
        optimizer.step()
        expected.append(loss.item())
    assert loop.train(random_model(), TOKENS, 20, 8, 0.02, seed=3)[:6] == pytest.approx(expected, rel=1e-4)
