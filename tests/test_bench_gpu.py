"""Claims about `python bench.py gpu`: every stage's lines at toy sizes, and what is kept of one that fails."""
import contextlib
import io
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

import bench
import bench_gpu
import bench_gpu_models
import bench_step
import decoding
import train
from common import toy

pytest.importorskip("transformers")


def run(stage, tmp_path, monkeypatch, **more):
    """The text of a stage run here at toy sizes, and what is missing in it."""
    monkeypatch.chdir(tmp_path)
    sheet = bench_gpu.Sheet(bench_gpu.GpuConfig(only=stage, out=str(tmp_path), device="cpu"))
    sheet.size = sheet.size | more
    bench_gpu_models.STAGES[stage](sheet)
    return sheet.path.read_text(encoding="utf-8"), sheet.missing


def test_one_stage_as_a_command_writes_its_file_and_says_what_it_is_of(tmp_path, capsys):
    assert list(bench_gpu.LIMITS)[-1] == "loss" and sum(bench_gpu.LIMITS.values()) < bench_gpu.ALL_SECONDS == 540
    bench.main(["gpu", f"--out={tmp_path}", "--device=cpu", "--only=distributed"])
    text = (tmp_path / "distributed.txt").read_text(encoding="utf-8")
    assert text.startswith("CPU, toy sizes: this proves the command, not the figures\ntorch ") and "commit" in text
    assert "one rank, gloo" in text and text.count("   from plain ") == 10 and "from plain nan" not in text
    assert "1 of 1 stages done" in capsys.readouterr().out


def test_a_stage_that_fails_and_one_past_its_limit_keep_their_lines_and_are_recorded(tmp_path):
    begin = f"open({str(tmp_path)!r} + '/a.txt', 'w').write('half a table\\n'); print('last words', flush=True); "
    for code, limit, ending in (("raise SystemExit(3)", 30, "failed with status 3"),
                                ("import time; time.sleep(60)", 1.5, "ended at its limit of 2 s")):
        assert bench_gpu.run_stage("a", [sys.executable, "-c", begin + code], limit, tmp_path) == ending
        text, stages = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a.txt", "stages.txt"))
        assert text.startswith("half a table\n") and ending in text and "last words" in text and ending in stages


def test_within_a_stage_an_error_or_too_little_time_costs_one_figure(tmp_path):
    sheet = bench_gpu.Sheet(bench_gpu.GpuConfig(str(tmp_path), "training", "cpu", until=time.time() + 33))
    sheet.size, tried = sheet.size | {"batches": (8, 4, 2)}, []

    def step(x, y):
        if tried.append(len(x)) or len(x) > 4:
            raise torch.OutOfMemoryError("full")
    assert len(bench_gpu_models.largest_batch(sheet, step)[0]) == 4 and tried == [8, 4, 4]
    sheet.size["batches"] = (8,)
    assert sheet.attempt("large", lambda: bench_gpu_models.largest_batch(sheet, step)) is None
    assert sheet.attempt("slow", int, needs=60) is None and sheet.attempt("good", lambda: 7, needs=20) == 7
    text = (tmp_path / "training.txt").read_text(encoding="utf-8")
    assert sheet.missing == ["large", "slow"] and "large: OutOfMemoryError: no" in text and "slow: Timeout" in text


def test_errors_of_all_kernels_and_a_wrong_one(kernels, tmp_path, monkeypatch):
    import flash
    monkeypatch.setattr(flash, "TILE", flash.TILE)
    text, missing = run("errors", tmp_path, monkeypatch)
    assert text.count("ok  ") == 3 * 7 and "WRONG" not in text and not missing
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * torch.sigmoid(gate) * up * 1.1)
    monkeypatch.setattr(kernels, "rms_norm", lambda x, w: x / 0 * w)                    # not finite is not small
    with pytest.raises(SystemExit, match="6 of the kernels"):
        run("errors", tmp_path, monkeypatch)


def test_kernels_and_training_beside_torchs_and_transformers_and_drawn(kernels, tmp_path, monkeypatch):
    text, missing = run("kernels", tmp_path, monkeypatch, lengths=(8,))
    assert missing == ["cuDNN 8 16"] and all(words in text for words in ("swiglu, ours", "rope, eager", "plain 8 16"))
    monkeypatch.delitem(bench_gpu_models.CASES, "triton compiled")           # slow, and there are others of each kind
    monkeypatch.delitem(bench_gpu_models.CASES, "triton compiled, fused loss")
    text, missing = run("training", tmp_path, monkeypatch)
    assert not missing and all(words in text for words in (
        "transformers compiled", "losses of 2 steps", "profile of one step", "activations: attention")), text
    (tmp_path / "stages.txt").write_text("a card, its memory\n", encoding="utf-8")
    bench_gpu.draw(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(bench_gpu.PICTURES)


def test_the_decoding_and_loss_stages(tmp_path, monkeypatch):
    text, missing = run("decoding", tmp_path, monkeypatch)
    assert not missing and text.count("4 of 4 ids as generate's") == 6 and text.count("8 of 8 ids") == 3, text

    def in_this_process(command, limit):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.run_command_line(command[2:])
        return "done", said.getvalue().splitlines()
    monkeypatch.setattr(bench_gpu, "run_process", in_this_process)
    text, missing = run("loss", tmp_path, monkeypatch)
    assert not missing and text.count("val bits per byte") == 2 and "tok/s" in text, text


@torch.no_grad()
def test_steps_that_are_all_alike_decode_as_generate_does():
    prompts = torch.randint(61, (3, 5)).tolist()
    for model in (toy("gpt2").eval(), toy("qwen3").eval()):
        expected, decoder = decoding.generate(model, prompts, 9, temperature=0), bench_step.Decoder(model, prompts, 9)
        assert decoder.run(9) == expected == decoder.run(9), "a second run begins anew"
        assert decoding.generate(model, prompts, 9, temperature=0) == expected, "the model itself stays as it was"
    pytest.raises(ValueError, bench_step.Decoder, toy(sliding_window=4), prompts, 9)


@torch.no_grad()
def test_the_graph_of_a_step_is_recorded_after_warm_up_and_replayed_and_one_compiled_block_serves_all(monkeypatch):
    """CUDA by stand-ins: recording must compute nothing, and each replay is one step from the right position."""
    counter, calls = torch._dynamo.testing.CompileCounter(), []
    stream = SimpleNamespace(wait_stream=lambda other: calls.append("wait"))
    replayed = SimpleNamespace(replay=lambda: calls.append("replay") or decoder.step())

    @contextlib.contextmanager
    def graph(recorded):
        saved = calls.append("record"), decoder.tokens.clone(), decoder.position.clone()
        yield
        decoder.tokens.copy_(saved[1]), decoder.position.copy_(saved[2])
    for name, value in dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=lambda: replayed,
                            graph=graph, stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = toy("gpt2", n_layers=12).eval()
    decoder = bench_step.Decoder(model, [[3, 1, 4, 1]], 8)
    decoder.on_cuda, decoder.run_block = True, torch.compile(bench_step.run_block, backend=counter, dynamic=False)
    decoder.record()
    assert decoder.run(8) == decoding.generate(model, [[3, 1, 4, 1]], 8, temperature=0)
    assert calls == ["wait", "wait", "record"] + ["replay"] * 7 and counter.frame_count == 1
