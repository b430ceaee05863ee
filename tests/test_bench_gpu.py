"""Claims about `python bench.py gpu`: every stage's lines at toy sizes, and what is kept of one that fails."""
import contextlib
import io
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

import bench
import bench_gpu
import bench_systems
import decoding
import train
from common import toy

pytest.importorskip("transformers")


def run(stage, tmp_path, monkeypatch, **more):
    """The text of a stage run here at toy sizes, what is missing in it, and its pictures."""
    monkeypatch.chdir(tmp_path)
    sheet = bench_gpu.Sheet(bench_gpu.GpuConfig(only=stage, out=str(tmp_path), device="cpu"))
    sheet.size = sheet.size | more
    bench_gpu.STAGES[stage](sheet)
    return sheet.path.read_text(encoding="utf-8"), sheet.missing, {path.stem for path in tmp_path.glob("*.png")}


def test_one_stage_as_a_command_writes_its_file_and_says_what_it_is_of(tmp_path, capsys, monkeypatch):
    assert list(bench_gpu.LIMITS)[-1] == "loss" and sum(bench_gpu.LIMITS.values()) < bench_gpu.ALL_SECONDS == 540
    monkeypatch.setattr(bench_gpu, "LIMITS", {"distributed": 60})
    bench.main(["gpu", f"--out={tmp_path}", "--device=cpu"])
    text = (tmp_path / "distributed.txt").read_text(encoding="utf-8")
    assert text.startswith("CPU, toy sizes: this proves the command, not the figures\n") and "commit" in text
    losses = [float(line.split()[-1]) for line in text[text.index("strategy "):].splitlines()[1:15]]
    assert losses == pytest.approx([losses[0]] * 14, abs=1e-4) and "1 ranks, gloo" in text, text
    assert "1 of 1 stages done" in capsys.readouterr().out


def test_a_stage_that_fails_and_one_past_its_limit_keep_their_lines_and_are_recorded(tmp_path):
    begin = f"open({str(tmp_path)!r} + '/a.txt', 'w').write('half a table\\n'); print('last words', flush=True); "
    for code, limit, ending in (("raise SystemExit(3)", 30, "failed with status 3"),
                                ("import time; time.sleep(60)", 1.5, "ended at its limit of 2 s")):
        assert not bench_gpu.run_stage("a", [sys.executable, "-c", begin + code], limit, tmp_path)
        text, stages = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a.txt", "stages.txt"))
        assert text.startswith("half a table\n") and ending in text and "last words" in text and ending in stages


def test_within_a_stage_an_error_or_too_little_time_costs_one_figure(tmp_path):
    sheet = bench_gpu.Sheet(bench_gpu.GpuConfig(str(tmp_path), "training", "cpu", until=time.time() + 35))
    sheet.size, tried = sheet.size | {"batches": (8, 4, 2)}, []

    def step(batch):
        if tried.append(len(batch[0])) or len(batch[0]) > 4:
            raise torch.OutOfMemoryError("full")
    assert len(bench_gpu.largest_batch(sheet, step)[0]) == 4 and tried == [8, 4, 4]
    sheet.size["batches"] = (8,)
    assert sheet.attempt("large", lambda: bench_gpu.largest_batch(sheet, step)) is None
    assert sheet.attempt("slow", int, needs=60) is None and sheet.attempt("good", lambda: 7, needs=20) == 7
    text = (tmp_path / "training.txt").read_text(encoding="utf-8")
    assert sheet.missing == ["large", "slow"] and "large: OutOfMemoryError: no" in text and "slow: Timeout" in text


def test_a_wrong_kernel_fails_the_table_of_errors(kernels, monkeypatch):
    cases = bench_systems.layer_cases
    monkeypatch.setattr(bench_systems, "layer_cases", lambda device, *sizes: cases(device, 5, 24, 33, 2, 1, 16))
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * torch.sigmoid(gate) * up * 1.1)
    monkeypatch.setattr(kernels, "rms_norm", lambda x, w: x / 0 * w)                    # not finite is not small
    with pytest.raises(SystemExit, match="4 of the kernels"):
        bench.main(["kernels", "--page=kernels", "--dtypes=float32,bfloat16"])


def test_kernels_and_training_beside_torchs_and_transformers_and_drawn(kernels, tmp_path, monkeypatch):
    text, missing, _ = run("kernels", tmp_path, monkeypatch, lengths=(8,))
    assert missing == ["cuDNN 8 16"] and all(words in text for words in ("swiglu, ours", "rope, eager", "plain 8 16"))
    monkeypatch.delitem(bench_gpu.CASES, "triton compiled")           # slow, and there are others of each kind
    monkeypatch.delitem(bench_gpu.CASES, "triton compiled, fused loss")
    text, missing, pictures = run("training", tmp_path, monkeypatch)
    assert not missing and all(words in text for words in (
        "transformers compiled", "losses of 2 steps", "profile of one step", "activations: attention")), text
    assert pictures == {"roofline", "attention", "training_step"}


def test_the_decoding_and_loss_stages(tmp_path, monkeypatch):
    text, missing, _ = run("decoding", tmp_path, monkeypatch)
    assert not missing and text.count("4 of 4 ids as generate's") == 3 == text.count("8 of 8 ids"), text
    assert len(re.findall(r"transformers +[12] +\d", text)) == 2, text

    def in_this_process(command, limit):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.run_command_line(command[2:])
        return "done", said.getvalue().splitlines()
    monkeypatch.setattr(bench_gpu, "run_process", in_this_process)
    text, missing, _ = run("loss", tmp_path, monkeypatch)
    assert not missing and text.count("val bits per byte") == 2 and "tok/s" in text, text


@torch.no_grad()
def test_the_graph_of_a_step_is_recorded_after_warm_up_and_replayed_and_one_compiled_block_serves_all(monkeypatch):
    """CUDA by stand-ins: recording must compute nothing, and each replay is one step from the right position."""
    prompts, model = torch.randint(61, (3, 5)).tolist(), toy("qwen3").eval()
    expected, decoder = decoding.generate(model, prompts, 9, temperature=0), bench.Decoder(model, prompts, 9)
    assert decoder.run(9) == expected == decoder.run(9), "a second run begins anew"
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
    decoder = bench.Decoder(model, [[3, 1, 4, 1]], 8)
    decoder.on_cuda = True
    decoder.run_block = torch.compile(bench.run_block, backend=counter, dynamic=False)
    decoder.record()
    assert decoder.run(8) == decoding.generate(model, [[3, 1, 4, 1]], 8, temperature=0)
    assert calls == ["wait", "wait", "record"] + ["replay"] * 7 and counter.frame_count == 1
