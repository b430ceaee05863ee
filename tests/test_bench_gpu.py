"""Claims about what `python bench.py gpu` runs, at toy sizes, and about what is kept of a command that fails."""
import contextlib
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

import bench
import bench_gpu
import bench_kernels
import decoding
from common import toy

pytest.importorskip("transformers")


def test_stages_run_at_toy_sizes(kernels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_gpu, "corpus", lambda n: "data/library")
    monkeypatch.setitem(bench_gpu.LIMITS, "distributed", 300)                # other tests may keep this machine busy
    decoding_at_toy_size = bench_gpu.stages("cpu", tmp_path)["decoding"]["toy"].split()[2:]
    for words in (["kernels", "--times=true"], decoding_at_toy_size,
                  ["gpu", f"--out={tmp_path}", "--device=cpu", "--only=distributed"]):
        bench.main(words)
    said = capsys.readouterr().out
    assert said.count("GB/s") > 8 and "swiglu, ours" in said
    assert said.count(" of 4 ids as generate's") == 3 and said.count(" of 8 ids as generate's") == 1
    assert len(re.findall(r"transformers +[12] ", said)) == 2
    stages = (tmp_path / "stages.txt").read_text(encoding="utf-8")
    assert stages.startswith("CPU, toy sizes: this proves the command, not the figures\n") and " done, " in stages
    table = (tmp_path / "distributed.parallel.txt").read_text(encoding="utf-8").split("       loss\n")[1]
    losses = [float(line.split()[-1]) for line in table.splitlines()[:14]]
    assert losses == pytest.approx([losses[0]] * 14, abs=1e-4), "every strategy of one rank trains as the plain model"


def test_a_command_that_fails_and_one_past_its_limit_keep_their_lines_and_the_next_begins(tmp_path):
    (tmp_path / "a.py").write_text("print('half a table', flush=True); raise SystemExit(3)", encoding="utf-8")
    (tmp_path / "b.py").write_text("print('half', flush=True); import time; time.sleep(60)", encoding="utf-8")
    jobs = {"a": f"python {tmp_path}/a.py", "b": f"python {tmp_path}/b.py", "c": "python -c pass"}
    lines = bench_gpu.run_stage("x", jobs, 2, tmp_path, dict(os.environ), ["a card"])
    assert "failed with status 3" in lines[0] and "ended at its limit" in lines[1] and len(lines) == 3
    texts = [(tmp_path / f"x.{name}.txt").read_text(encoding="utf-8") for name in "ab"]
    assert all(text.startswith("a card\n$ python") and "half" in text for text in texts)


def test_the_pictures_show_the_tables(tmp_path, monkeypatch):
    """Points and bars of rows of known times: 2 GB/s at 0.5 FLOPs a byte are 0.001 TFLOP/s."""
    figures, made = [], {"kernels.others": [("swiglu, ours", (2e6, 6e6, 0.5), 1e9)], "kernels.attention": [
        (f"plain, compiled, {T} x 64", (5e9, 9e9, T / 4), 1e12) for T in (1024, 4096)]}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **more: figures.append(figure))
    monkeypatch.setattr(bench_kernels, "timed", lambda *_: (1.0, 3.0, 5.0, float("nan")))
    for table, rows in made.items():
        with open(tmp_path / f"{table}.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            print("a card; roofs: copy 3,000 GB/s, product in bfloat16 600.0 TFLOP/s")
            for name, work, scale in rows:
                bench_kernels.row(name, None, [], work, 1e12, scale)
    (tmp_path / "training.plain.txt").write_text("forward  20.00  0.10\nbackward  41.00  0.20\nclip  1.00  0.1\n"
                                                 "optimizer  2.00  0.1\nforward  30.00  0.10\n", encoding="utf-8")
    bench_gpu.pictures(tmp_path)
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figures[0].axes]
    roof = lines[0].pop("measured roof")
    assert roof[0] == pytest.approx([0.1, 0.3]) and roof[30] == pytest.approx([100, 300]) and roof[-1] == [1e5, 600]
    assert lines[0] == {"ours": [[0.5, 0.001]], "plain compiled": [[256, 5], [1024, 5]]}
    assert lines[1] == {"plain compiled, width 64": [[1024, 5], [4096, 5]]}
    assert [(bar.get_x(), bar.get_width()) for bar in figures[0].axes[2].patches] == [
        (0, 20), (20, 41), (61, 1), (62, 2), (0, 30)]


def test_a_wrong_kernel_fails_the_table_of_errors(kernels, monkeypatch):
    cases = bench_kernels.layer_cases
    monkeypatch.setattr(bench_kernels, "layer_cases", lambda device, *sizes: cases(device, 5, 24, 33, 2, 1, 16))
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: gate * torch.sigmoid(gate) * up * 1.1)
    monkeypatch.setattr(kernels, "rms_norm", lambda x, w: x / 0 * w)                    # not finite is not small
    with pytest.raises(SystemExit, match="4 of the kernels"):
        bench.main(["kernels", "--page=kernels", "--dtypes=float32,bfloat16"])


@torch.no_grad()
def test_the_graph_of_a_step_is_recorded_after_warm_up_and_replayed_and_one_compiled_block_serves_all(monkeypatch):
    """CUDA by stand-ins: recording must compute nothing, and each replay is one step from the right position."""
    model, prompts, calls = toy("gpt2", n_layers=12).eval(), [[3, 1, 4, 1]], []
    decoder, counter = bench.Decoder(model, prompts, 8), torch._dynamo.testing.CompileCounter()
    expected = decoding.generate(model, prompts, 8, temperature=0)
    assert decoder.run(8) == expected == decoder.run(8), "a second run begins anew"

    @contextlib.contextmanager
    def graph(recorded):
        tokens, position = decoder.tokens.clone(), decoder.position.clone()
        yield calls.append("record")
        decoder.tokens.copy_(tokens), decoder.position.copy_(position)
    stream = SimpleNamespace(wait_stream=lambda other: calls.append("wait"))
    replayed = SimpleNamespace(replay=lambda: calls.append("replay") or decoder.step())
    for name, value in dict(Stream=lambda: stream, current_stream=lambda: stream, CUDAGraph=lambda: replayed,
                            graph=graph, stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    decoder.run_block = torch.compile(bench.run_block, backend=counter, dynamic=False)
    decoder.record()
    assert decoder.run(8) == expected and counter.frame_count == 1
    assert calls == ["wait", "wait", "record"] + ["replay"] * 7
