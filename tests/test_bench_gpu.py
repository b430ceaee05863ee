"""Claims about `python bench.py gpu`: every stage's lines at toy sizes, and what is kept of one that fails."""
import contextlib
import sys
import time

import pytest
import torch
import torch._dynamo.testing

import bench
import bench_gpu
import bench_gpu_kernels
import bench_gpu_models
import decoding
from common import toy
from model import ModelConfig, Transformer


def sheet(stage, tmp_path, **more):
    settings = dict(out=str(tmp_path), device="cpu", until=time.time() + 999) | more
    return bench_gpu.Sheet(stage, bench_gpu.StageConfig(**settings))


def run(stage, tmp_path, monkeypatch, **more):
    """The text of a stage run here at toy sizes, and what is missing in it."""
    monkeypatch.chdir(tmp_path)
    table = sheet(stage, tmp_path, **more)
    bench_gpu_models.STAGES[stage](table)
    return (tmp_path / f"{stage}.txt").read_text(encoding="utf-8"), table.missing


def test_one_stage_as_a_command_writes_its_file_and_says_what_it_is_of(tmp_path, capsys):
    bench.main(["gpu", f"--out={tmp_path}", "--device=cpu", "--only=distributed"])
    text = (tmp_path / "distributed.txt").read_text(encoding="utf-8")
    assert text.startswith("CPU, toy sizes: this proves the command, not the figures\ntorch ")
    assert "commit" in text and "one rank, gloo" in text and text.count("from plain 0.0e+00") == 5
    stages = (tmp_path / "stages.txt").read_text(encoding="utf-8")
    assert "distributed done" in stages and "1 of 1 stages done" in capsys.readouterr().out
    for flag in ("--only=all the rest", "--minutes=0"):
        with pytest.raises(SystemExit) as stopped:
            bench.main(["gpu", flag])
        assert stopped.value.code == 2


def test_the_limits_of_all_stages_are_below_nine_minutes():
    assert list(bench_gpu.LIMITS)[-1] == "loss" and sum(bench_gpu.LIMITS.values()) < bench_gpu.ALL_SECONDS == 540


def test_a_stage_that_fails_and_one_past_its_limit_keep_their_lines_and_are_recorded(tmp_path):
    write = f"from pathlib import Path; Path({str(tmp_path)!r}, '%s.txt').write_text('half a table\\n'); print('%s')"
    failing = write % ("a", "its last words") + "; raise SystemExit(3)"
    sleeping = write % ("b", "asleep") + "; import sys, time; sys.stdout.flush(); time.sleep(60)"
    assert bench_gpu.run_stage("a", [sys.executable, "-c", failing], 30, tmp_path) == "failed with status 3"
    assert bench_gpu.run_stage("b", [sys.executable, "-c", sleeping], 1.5, tmp_path) == "ended at its limit of 2 s"
    assert bench_gpu.run_stage("c", [sys.executable, "-c", ""], 30, tmp_path) == "done"
    stages = (tmp_path / "stages.txt").read_text(encoding="utf-8")
    for name, how, words in (("a", "failed with status 3", "its last words"), ("b", "ended at its limit", "asleep")):
        text = (tmp_path / f"{name}.txt").read_text(encoding="utf-8")
        assert text.startswith("half a table\n") and how in text and words in text and how in stages
    assert "done" in stages.splitlines()[-1]


def test_within_a_stage_an_error_or_too_little_time_costs_one_figure(tmp_path):
    table = sheet("kernels", tmp_path, until=time.time() + 33)
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
    assert table.attempt("large", out_of_memory) is None and table.attempt("slow", int, needs=60) is None
    assert table.attempt("good", lambda: 7, needs=20) == 7 and table.missing == ["large", "slow"]
    text = (tmp_path / "kernels.txt").read_text(encoding="utf-8")
    assert "large: OutOfMemoryError: CUDA out of memory. Tried to allocate 7 GiB\n" in text and "slow: not" in text


def test_errors_of_all_kernels_and_a_wrong_one(kernels, tmp_path, monkeypatch):
    text, missing = run("errors", tmp_path, monkeypatch, dtypes="float32,bfloat16")
    rows = len(bench_gpu.SIZES["cpu"]["layers"]) * 6 + len(bench_gpu.SIZES["cpu"]["attention"])
    assert text.count("\nok ") == 2 * rows and "WRONG" not in text and not missing
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * torch.sigmoid(gate) * up * 1.1)
    monkeypatch.setattr(kernels, "rms_norm", lambda x, w: x / 0 * w)                    # not finite is not small
    with pytest.raises(SystemExit, match="2 of the kernels"):
        run("errors", tmp_path, monkeypatch, dtypes="float32")


def test_kernels_and_tiles_are_timed_beside_torchs_and_drawn(kernels, tmp_path, monkeypatch):
    text, missing = run("kernels", tmp_path, monkeypatch)
    assert missing == ["cuDNN 8 16", "cuDNN 16 16"], "a CPU has no cuDNN"
    for name in ("swiglu, ours", "rope, eager", "cross_entropy, torch's own", "ours        16   16", "plain        8"):
        assert name in text, text
    text, missing = run("tiles", tmp_path, monkeypatch)
    assert text.count("*") == 4 and not missing
    (tmp_path / "stages.txt").write_text("a card, its memory\n", encoding="utf-8")
    bench_gpu.draw(tmp_path)
    assert (tmp_path / "roofline.png").exists() and (tmp_path / "attention.png").exists()


def test_training_beside_transformers_its_curves_and_the_parts_of_a_step(kernels, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    text, missing = run("training", tmp_path, monkeypatch)
    assert not missing and "transformers compiled" in text and "losses of 2 steps" in text, text
    assert "profile of one step" in text and "memory of one step" in text and "activations: attention" in text
    (tmp_path / "stages.txt").write_text("a card\n", encoding="utf-8")
    bench_gpu.draw(tmp_path)
    assert (tmp_path / "training.png").exists()


def test_the_largest_batch_is_found_by_running_out_of_memory(tmp_path, monkeypatch):
    table, tried = sheet("training", tmp_path), []
    table.size = table.size | {"batches": (8, 4, 2)}
    def step(x, y):
        tried.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("full")
    assert bench_gpu_models.largest_batch(table, step)[0] == 4 and tried == [8, 4, 4]
    table.size["batches"] = (8,)
    with pytest.raises(torch.OutOfMemoryError, match="no batch"):
        bench_gpu_models.largest_batch(table, step)


def test_the_decoding_and_loss_stages(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    text, missing = run("decoding", tmp_path, monkeypatch)
    assert not missing and text.count("4 of 4 ids as generate's") == 6 and text.count("8 of 8 ids") == 3, text
    text, missing = run("loss", tmp_path, monkeypatch)
    assert not missing and text.count("val bits per byte") == 2 and "tok/s" in text, text


@pytest.mark.parametrize("switch", ["plain", "gpt2", "qwen3", "tied"])
def test_steps_that_are_all_alike_decode_as_generate_does(switch):
    model = toy(switch).eval()
    prompts = torch.randint(61, (3, 5)).tolist()
    expected = decoding.generate(model, prompts, 9, temperature=0)
    with torch.no_grad():
        decoder = bench_gpu_models.Decoder(model, prompts, 9)
        assert decoder.run(9) == expected == decoder.run(9), "a second run begins anew"
    assert [block.layer for block in model.layers] == [0, 1, 2], "the model itself stays as it was"
    assert decoding.generate(model, prompts, 9, temperature=0) == expected
    for more in (dict(sliding_window=4), dict(n_experts=4), dict(attention="mla"), dict(smear=True)):
        with pytest.raises(ValueError, match="Decoder has no"):
            bench_gpu_models.Decoder(toy(**more), prompts, 9)


def test_one_compiled_block_serves_all_layers(monkeypatch):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(bench_gpu_models.run_block, backend=counter, dynamic=False)
    model = Transformer(ModelConfig(vocab_size=50, context_length=32, d_model=32, n_layers=12, n_heads=2)).eval()
    with torch.no_grad():
        decoder = bench_gpu_models.Decoder(model, [[1, 2, 3]], 6)
        decoder.run_block = compiled
        assert decoder.run(6) == decoding.generate(model, [[1, 2, 3]], 6, temperature=0) and counter.frame_count == 1


def test_the_graph_of_a_step_is_recorded_after_warm_up_and_replayed(monkeypatch):
    """CUDA by stand-ins: recording must compute nothing, and each replay is one step from the right position."""
    model, calls = toy("gpt2").eval(), []

    class Stream:
        def wait_stream(self, stream):
            calls.append("wait")

    class Graph:
        def replay(self):
            calls.append("replay")
            decoder.step()

    @contextlib.contextmanager
    def graph(recorded):
        calls.append("record")
        saved = decoder.tokens.clone(), decoder.position.clone()
        yield
        decoder.tokens.copy_(saved[0]), decoder.position.copy_(saved[1])
    for name, stand_in in (("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", graph),
                           ("stream", lambda stream: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with torch.no_grad():
        decoder = bench_gpu_models.Decoder(model, [[3, 1, 4, 1]], 8)
        decoder.on_cuda = True
        decoder.record()
        assert decoder.run(8) == decoding.generate(model, [[3, 1, 4, 1]], 8, temperature=0)
    assert calls == ["wait", "wait", "record"] + ["replay"] * 7


def test_a_cards_head_and_its_peaks_by_stand_ins(tmp_path, monkeypatch):
    from types import SimpleNamespace
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2 ** 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda *words, **more: SimpleNamespace(
        stdout="580.159.04, 700.00 W, 1980 MHz\n") if "nvidia-smi" in words[0] else SimpleNamespace(stdout="abc\n"))
    first, second = bench_gpu.machine("cuda")
    assert first.startswith("NVIDIA H100 80GB HBM3, 80.0 GiB, 132 multi") and "580.159.04, 700.00 W" in first
    assert "torch " in second and "commit abc" in second
    table, seen = sheet("kernels", tmp_path), []
    table.on_cuda = True
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 1e6), ("max_memory_allocated", 9e6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(bench_gpu_kernels.bench_systems, "time_ms", lambda run, rep: seen.append(rep) or rep)
    x = torch.randn(4, requires_grad=True)
    assert bench_gpu_kernels.timed(table, torch.sin, [x]) == (60, 80, 8.0) and seen == [60, 80]
