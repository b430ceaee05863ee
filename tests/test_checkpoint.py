"""Claims about checkpoint.py."""
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common import ROOT, random_model
import checkpoint
import optim
from model import ModelConfig


@pytest.mark.parametrize("target", ["path", "file object"])
def test_checkpoint_brings_everything_back(tmp_path, target):
    model = random_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    x = torch.arange(16).view(1, 16)
    model(x, x)[1].backward()
    optimizer.step()
    place = tmp_path / "ckpt.pt" if target == "path" else io.BytesIO()
    checkpoint.save_checkpoint(model, optimizer, 2, place, tokens=99)
    copy = random_model()
    copy_optimizer = optim.AdamW(copy.parameters(), lr=0.5)
    assert checkpoint.load_checkpoint(place, copy, copy_optimizer) == 2
    for one, opt in ((model, optimizer), (copy, copy_optimizer)):        # the next step is the same as well
        opt.zero_grad()
        one(x, x)[1].backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters()))
    entries = checkpoint.read_checkpoint(place)
    assert ModelConfig(**entries["model_config"]) == model.config and entries["tokens"] == 99
    parts = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})     # no wrapper
    checkpoint.save_checkpoint(parts, None, 0, target := io.BytesIO())
    checkpoint.load_checkpoint(target, parts)
    wrapped = torch.compile(torch.nn.ModuleDict({"module": model}))                      # a data-parallel one, compiled
    checkpoint.save_checkpoint(wrapped, None, 0, target := io.BytesIO())
    assert checkpoint.read_checkpoint(target)["model"].keys() == model.state_dict().keys()


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_kill_inside_a_checkpoint_write_leaves_a_whole_one(tmp_path):
    code = ("import sys, torch, checkpoint\nfor step in range(10**6):\n    checkpoint.save_checkpoint("
            "{'w': torch.full((8_000_000,), float(step))}, None, step, sys.argv[1])")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "ckpt.pt"], cwd=ROOT)
    deadline = time.monotonic() + 100
    while not (tmp_path / "ckpt.pt").exists() or not (tmp_path / "ckpt.pt.tmp").exists():
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.wait()
    entries = checkpoint.read_checkpoint(tmp_path / "ckpt.pt")
    assert (entries["model"]["w"] == entries["step"]).all()
    assert (tmp_path / "ckpt.pt.tmp").exists(), "the kill came too late to prove anything"


def test_what_could_not_be_read_again_is_refused_and_a_full_disk_leaves_the_old_file(tmp_path):
    path, model = tmp_path / "ckpt.pt", random_model()
    optimizer, entries = optim.AdamW(model.parameters(), lr=1e-3), {"nested": {"a": [(1, None)]}, "kind": torch.float16}
    checkpoint.save_checkpoint(model, [optimizer], np.int64(4), path, **entries)
    back = checkpoint.read_checkpoint(path)
    assert checkpoint.load_checkpoint(path, model, [optimizer]) == 4 and back | entries == back
    for entry, code in ((model.config, "ModelConfig"), (len, "len"), ({"a": [np.float64(1)]}, "numpy")):
        with pytest.raises(ValueError, match=rf"ckpt.pt.* holds pickled code \(\S*{code}"):
            checkpoint.save_checkpoint(model, None, 5, path, more=entry)
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))    # the system refuses every byte after these
        with pytest.raises(OSError, match="ckpt.pt could not be written.*unchanged"):
            checkpoint.save_checkpoint(random_model(), None, 6, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoint.load_checkpoint(path) == 4 and [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_bad_checkpoints_are_told_apart_and_named(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    (tmp_path / "best.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"ckpt.pt \(there is best.pt\)"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(random_model(), None, 1, path)
    for shape, words in (({"vocab_size": 51}, "token_embeddings.weight"), ({"n_layers": 3}, "Missing .*layers.2")):
        with pytest.raises(ValueError, match=f"ckpt.pt does not fit this model: .*{words}"):
            checkpoint.load_checkpoint(path, random_model(**shape))
    with pytest.raises(ValueError, match="ckpt.pt holds no state of this SGD"):
        checkpoint.load_checkpoint(path, None, optim.SGD(random_model().parameters()))
    for entries, words in ((path.read_bytes()[:-30], "is cut short"), ([1], "is not a checkpoint"),
                           ({"model": {}, "step": len}, "pickled code .*len")):
        if isinstance(entries, bytes):
            path.write_bytes(entries)
        else:
            torch.save(entries, path)
        with pytest.raises(ValueError, match=f"ckpt.pt.*{words}"):
            checkpoint.load_checkpoint(path)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.read_checkpoint(path, map_location="cuda")


def test_token_files_with_and_without_meta(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")      # nanoGPT's own, as they are
    assert checkpoint.open_tokens(tmp_path, "train")[999] == 999
    (tmp_path / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match="val.bin has 3 bytes"):
        checkpoint.open_tokens(tmp_path, "val")
    (tmp_path / "meta.json").write_text('{"dtype": "uint32", "vocab_size": 70000}', encoding="utf-8")
    assert len(checkpoint.open_tokens(tmp_path, "train")) == 500
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    foreign = json.dumps({"dtype": "uint16", "vocab_size": 9, "tokenizer_sha256": "0" * 64})
    for meta, words in (("\xff", "Unicode"), ("[1]", "TypeError"), ('{"dtype": "uint16"}', "'vocab_size'"),
                        ('{"dtype": "int8", "vocab_size": 9}', "dtype 'int8'"), (foreign, "another tokenizer")):
        (tmp_path / "meta.json").write_bytes(meta.encode("latin-1"))
        with pytest.raises(ValueError, match=f"meta.json.*{words}"):
            checkpoint.open_tokens(tmp_path, "train")
