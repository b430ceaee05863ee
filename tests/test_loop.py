"""Claims about loop.py."""
import math
from collections import Counter

import pytest
import torch

from common import random_model
import loop

SONG = "the wheels on the bus go round and round, round and round, all through the town. "
TOKENS = [ord(letter) % 50 for letter in SONG * 20]


def test_a_loop_of_a_few_lines_learns_a_text():
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = loop.train(model, TOKENS, 150)
    assert len(losses) == 150 and all(isinstance(loss, float) for loss in losses)
    assert losses[0] == pytest.approx(math.log(50), abs=0.6), "an untrained model knows nothing"
    share = [n / len(TOKENS) for n in Counter(TOKENS).values()]
    unigram = -sum(p * math.log(p) for p in share)
    assert sum(losses[-10:]) / 10 < 0.5 < unigram, (losses[-10:], unigram)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_same_seed_is_the_same_run():
    one, two, other = (loop.train(random_model(), TOKENS, 4, seed=seed) for seed in (1, 1, 2))
    assert one == two != other
