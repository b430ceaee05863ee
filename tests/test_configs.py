"""Claims about the three config files: they resolve, and what their docstrings count is what accounting counts."""
import ast
import re

import pytest

from accounting import count_params, flops_per_token
from common import ROOT
from configurator import resolve
from train import TrainConfig

VOCABULARIES = {"shakespeare": 2048, "tinystories": 10_000, "owt": 32_000}      # data.py's for these corpora


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_config_resolves_and_its_docstring_counts_right(name):
    path = ROOT / f"config_{name}.py"
    config, sources = resolve(TrainConfig, {}, str(path))
    assert sources["lr"] == str(path) and config.data_dir == f"data/{name}" and config.out_dir == f"out/{name}"
    model = config.model_config(VOCABULARIES[name])
    counts, words = count_params(model), ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for line in ("Hardware:", "Time:", "Target:", "Size:", "Batch:"):
        assert re.search(rf"^{line}", words, re.MULTILINE), line
    millions = f"{counts['total'] / 1e6:.1f} million parameters"
    assert re.search(rf"^Size: {re.escape(millions)}", words, re.MULTILINE), millions
    if "GFLOP a token" in words:
        gflop = flops_per_token(model, config.context_length, training=True)["total"] / 1e9
        assert f"{gflop:.3f} GFLOP a token" in words
    sequences = config.batch_tokens // config.context_length
    assert f"Batch: {sequences} sequences of {config.context_length} = {config.batch_tokens:,} tokens" in words
