"""Claims about checkpoint.py."""
import dataclasses
import os
import re

import pytest
import torch

from common import ROOT  # noqa: F401# noqa: F401
import checkpoint
import configurator
import optim
from model import ModelConfig, Transformer

@dataclasses.dataclass
class Toy:
    width: int = 4             # how wide
    rate: float = 0.1          # how fast
    name: str | None = None    # what it is called
    loud: bool = False         # whether to shout


def test_defaults_then_file_then_flags(tmp_path):
    path = tmp_path / "config_toy.py"
    path.write_text('"""A docstring."""\nhalf = 8\n'.replace("half", "width") + "rate = width * 0.5\nname = 'a'\n",
                    encoding="utf-8")
    config, sources = configurator.resolve(Toy, {"rate": "1e-2", "loud": "1"}, str(path))
    assert config == Toy(8, 0.01, "a", True)
    assert sources == {"width": str(path), "rate": "flag", "name": str(path), "loud": "flag"}


@pytest.mark.parametrize("key, text, value", [("width", "1e4", 10_000), ("width", "-3", -3), ("rate", "3", 3.0),
                                              ("loud", "true", True), ("loud", "0", False), ("name", "none", None),
                                              ("name", "None", None), ("name", "7", "7")])
def test_values_take_the_type_of_the_field(key, text, value):
    config, _ = configurator.resolve(Toy, {key: text})
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("flags, words", [({"widht": "3"}, "Did you mean width"),
                                          ({"width": "2.5"}, "width='2.5' is not a int"),
                                          ({"loud": "perhaps"}, "loud='perhaps'"), ({"rate": "fast"}, "rate='fast'")])
def test_bad_settings_say_what_and_what_instead(flags, words):
    with pytest.raises(configurator.ConfigError, match=re.escape(words)):
        configurator.resolve(Toy, flags)


@pytest.mark.parametrize(
    "line",
    ["import os", "width = open('x')", "width = __import__('os').getpid()", "width: int = 3", "for i in x: pass"])
def test_config_files_cannot_run_code(tmp_path, line):
    path = tmp_path / "config_bad.py"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(configurator.ConfigError, match="config_bad.py:1"):
        configurator.resolve(Toy, {}, str(path))


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
