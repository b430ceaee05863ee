"""Claims about checkpoint.py."""
import os

import pytest
import torch

from common import ROOT  # noqa: F401
import checkpoint
import optim
from model import ModelConfig, Transformer

def toy_model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=2, n_heads=2))


def test_checkpoint_brings_everything_back(tmp_path):
    model = toy_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    x = torch.arange(16).view(1, 16)
    for _ in range(2):
        model(x, x)[1].backward()
        optimizer.step()
    checkpoint.save_checkpoint(model, optimizer, 2, tmp_path / "ckpt.pt", tokens=99)
    other = toy_model()
    other_optimizer = optim.AdamW(other.parameters(), lr=0.5)
    assert checkpoint.load_checkpoint(tmp_path / "ckpt.pt", other, other_optimizer) == 2
    for one, opt in ((model, optimizer), (other, other_optimizer)):      # the next step is the same as well
        opt.zero_grad()
        one(x, x)[1].backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert ModelConfig(**torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_config"]) == model.config


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save_checkpoint(toy_model(), None, 1, path)

    def cut_short(file):
        file.write(b"half a check")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, cut_short)
    assert checkpoint.load_checkpoint(path, toy_model()) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(toy_model(), None, 1, path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="does not fit this model: token_embeddings.weight"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=51, context_length=16, d_model=16, n_layers=2, n_heads=2)))
    with pytest.raises(ValueError, match="missing .'layers.2"):
        checkpoint.load_checkpoint(
            path, Transformer(ModelConfig(vocab_size=50, context_length=16, d_model=16, n_layers=3, n_heads=2)))
    for content in (whole[:len(whole) // 2], whole[:100], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ckpt.pt"):
            checkpoint.load_checkpoint(path)
    torch.save({"model": {}, "step": Evil()}, path)
    with pytest.raises(ValueError, match="ckpt.pt"):
        checkpoint.load_checkpoint(path)
