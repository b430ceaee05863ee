"""Claims about accounting.py."""
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import accounting as bill
from accounting import preset
from common import SWITCHES, ids, toy
from model import ModelConfig, Transformer


def test_the_table_in_the_docstring_is_gpt2_small():
    config, T = preset("gpt2"), 1024
    forward, training = (bill.flops_per_token(config, T, kind) for kind in (False, True))
    names = {"attention projections": "attention_projections", "feed-forward": "feed_forward",
             "attention scores": "attention_scores", "logits (tied embedding)": "logits", "all": "total"}
    for start, part in names.items():
        line = next(line for line in bill.__doc__.splitlines() if line.strip().startswith(start))
        assert line.split()[-2:] == [f"{counts[part] / 1e6:.1f}" for counts in (forward, training)], line
    n = bill.count_params(config)["total"]
    assert f"6 N = {6 * n / 1e6:.1f} (N = {n:,})" in bill.__doc__
    xl = ModelConfig(vocab_size=50_257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=6400)
    assert bill.count_params(xl)["total"] == 2_127_057_600, "the handout's"
    assert bill.flops_per_token(xl, 1024)["total"] * 1024 == pytest.approx(4.513e12, rel=5e-4)


@pytest.mark.parametrize("switch", SWITCHES)
def test_parameters_and_flops_are_what_the_model_has_and_does(switch):
    """Parameters and forward FLOPs exactly, backward FLOPs within 1 % (multi-token heads: their last positions)."""
    from torch.utils.flop_counter import FlopCounterMode
    model = toy(switch, attention_backend="naive", d_model=128, d_ff=320, context_length=64, vocab_size=512)
    counts = bill.count_params(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(counts.values()) - counts["total"]
    # Our naive backend multiplies the whole square and masks after, in sliding layers too.
    config = dataclasses.replace(model.config, sliding_window=None, window_pattern="S")
    for training, tolerance in ((False, 1e-9), (True, 0.03 if config.mtp_depth else 0.01)):
        with FlopCounterMode(display=False) as counter:
            loss = model.train(training)(ids(2, 64), ids(2, 64))[1]
            if training:
                loss.backward()
        flops = bill.flops_per_token(config, 64, training)["total"] * 128
        assert flops == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_memory_and_time_by_hand():
    config = preset("llama-3.1-8b", context_length=8192)
    assert bill.kv_cache_bytes(config, 1) == 2 * 32 * 8 * 128 * 2
    mla = preset("small", attention="mla", kv_lora_rank=512, rope_head_dim=64)
    window = preset("small", sliding_window=100, window_pattern="SL", context_length=1000)
    assert bill.kv_cache_bytes(mla, 1) == 12 * (512 + 64) * 2
    assert bill.kv_cache_bytes(window, 1000, "float32") == 6 * (100 + 1000) * 2 * 768 * 4
    memory = bill.memory_bytes(config, 2, 1024, "bfloat16")
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] / 2 == 4 * 8_030_261_248
    fits = bill.largest_batch(config, 200e9, context_length=1024)
    assert bill.memory_bytes(config, fits, 1024)["total"] <= 200e9 < bill.memory_bytes(config, fits + 1, 1024)["total"]
    per_token = bill.flops_per_token(config, 8192, training=True)["total"]
    hours = bill.training_hours(config, 1e9, "H100", mfu=0.5, n_devices=8)
    assert hours == pytest.approx(per_token * 1e9 / (989e12 * 0.5 * 8) / 3600)


def run_checkpointed(blocks, x, sizes: tuple):
    """The blocks applied to x in order, in groups of sizes[0] that backward computes again, nested by sizes[1:]."""
    if not sizes:
        for block in blocks:
            x = block(x)
        return x
    for i in range(0, len(blocks), sizes[0]):
        x = checkpoint(run_checkpointed, blocks[i:i + sizes[0]], x, sizes[1:], use_reentrant=False)
    return x


def test_nested_checkpoints_need_what_the_plan_says(monkeypatch):
    """16 blocks: peak memory above weights falls as planned, blocks are computed again as planned, gradients stay."""
    from bench_step import MemoryTracker
    monkeypatch.setattr("attention.SHORT_CONTEXT", 0)
    shape, B = ModelConfig(vocab_size=64, context_length=64, d_model=64, n_layers=16, n_heads=4), 2
    torch.manual_seed(0)
    model, x = Transformer(shape), torch.randn(B, 64, 64, requires_grad=True)
    calls = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    given = [*model.parameters(), x]
    one_input, one_block = B * 64 * 64 * 4, B * 64 * bill.activation_bytes(shape)[0]
    above, gradients = [], []
    for levels in range(5):
        plan, tracker = bill.checkpoint_plan(16, levels, one_block, one_input), MemoryTracker()
        for tensor in given:
            tensor.grad = torch.zeros_like(tensor)
            tracker.watch(tensor, "given")
            tracker.watch(tensor.grad, "given")
        before = tracker.live
        calls.clear()
        with tracker:
            run_checkpointed(list(model.layers), x, plan["sizes"]).sum().backward()
        assert len(calls) == 16 + plan["recomputed"] and plan["flops"] == 1 + plan["recomputed"] / 48
        assert levels > 0 or plan["bytes"] == 16 * one_block
        above.append(max(tracker.history) - before - plan["bytes"])
        gradients.append(x.grad)
        assert torch.equal(gradients[0], gradients[-1])
    assert plan["sizes"] == (8, 4, 2, 1) and plan["bytes"] == one_block + 4 * one_input
    # What is above the plan is one block's temporaries in backward, the same for every nesting.
    assert max(above) - min(above) < 2 * one_input and max(above) < one_block, above


@pytest.mark.parametrize("optimizer, more", [("muon", {}), ("muon", {"mtp_depth": 1}), ("sgd", {"norm": "layer"}),
                                             ("sgd", {"ffn": "gelu", "norm": "layer", "bias": True})])
def test_a_step_holds_what_is_billed(optimizer, more, monkeypatch):
    """Weights, gradients and moments exactly, activations within 2 %: muon keeps one moment of the blocks' matrices."""
    from bench_step import memory_step
    from train import TrainConfig
    monkeypatch.setattr("attention.SHORT_CONTEXT", 0)        # the bill is for fused attention, which keeps no scores
    shape = dict(context_length=64, d_model=64, n_layers=2, n_heads=2, vocab_size=300, optimizer=optimizer)
    config, held = TrainConfig(**shape, batch_tokens=8 * 64, **more), {}
    tracker, kinds, _ = memory_step(config, "cpu", torch.float32)
    for block in tracker.blocks:
        kind = kinds.get(id(block), "temporaries").partition(":")[0]
        held[kind] = held.get(kind, 0) + block["bytes"]
    billed = bill.memory_bytes(config.model_config(300), 8, optimizer=optimizer)
    assert held["weights"] == billed["weights"] and held["gradients"] == billed["gradients"]
    assert billed["optimizer"] <= held["moments"] < billed["optimizer"] + 1000           # counters of steps
    assert "mtp_depth" in more or held["activations"] == pytest.approx(billed["activations"], rel=0.02)


def test_what_parallel_ranks_compute_and_send_by_hand():
    """One SwiGLU layer as in the course's problems: B tokens, D, F, N ranks, C FLOP/s, W bytes/s, 2 bytes a number."""
    D, F, B, N, C, W = 4096, 11_008, 65_536, 8, 4e14, 1e11
    layer, machine = (D, F), (4e14, 1e11)
    ddp = bill.data_parallel_cost(layer, B, N, *machine)
    assert ddp["forward"]["bytes"] == 0 and ddp["backward"]["flops"] == 12 * B * D * F / N
    assert ddp["backward"]["communication_s"] == pytest.approx(12 * D * F * (N - 1) / (N * W))
    assert ddp["backward"]["most_ranks"] == pytest.approx(1 + B * W / C)
    fsdp = bill.fsdp_cost(layer, B, N, *machine)
    assert fsdp["forward"]["communication_s"] == pytest.approx(6 * D * F * (N - 1) / (N * W))
    assert fsdp["backward"]["bytes"] == 2 * fsdp["forward"]["bytes"]
    assert fsdp["forward"]["most_ranks"] == fsdp["backward"]["most_ranks"] == pytest.approx(1 + B * W / C)
    tp = bill.tensor_parallel_cost(layer, B, N, *machine)
    assert tp["forward"]["communication_s"] == pytest.approx(4 * B * D * (N - 1) / (N * W))
    assert tp["forward"]["most_ranks"] == pytest.approx(1 + 3 * F * W / (2 * C))
    assert tp["backward"]["most_ranks"] == pytest.approx(1 + 3 * F * W / C)
    mixed = bill.fsdp_cost(layer, B, 4, *machine, tp=2)["forward"]
    kinds = 6 * D * F * 3 / (8 * W), 4 * B * D * 1 / (8 * W)
    assert mixed["communication_s"] == pytest.approx(max(kinds)) and mixed["compute_s"] == 6 * B * D * F / 8 / C
    at = ddp["step"]["smallest_batch"]             # there messages take as long as arithmetic
    edge = bill.data_parallel_cost(layer, at, N, *machine)["backward"]
    assert edge["compute_s"] == pytest.approx(edge["communication_s"])
    config = preset("xl")
    ranks, tp, cost = bill.best_mix(config, 2048, 8, *machine)
    every = [bill.fsdp_cost(config, 2048, 8 // t, *machine, tp=t)["step"]["seconds"] for t in (1, 2, 4, 8)]
    assert ranks * tp == 8 and cost["step"]["seconds"] == min(every)
    assert bill.best_mix(config, 10 ** 7, 8, *machine)[:2] == (8, 1), "a large batch hides FSDP: send least"


def test_the_memory_verb_draws_a_step(tmp_path, capsys):
    import bench
    bench.main(f"memory --out_dir={tmp_path} --context_length=64 --d_model=64 --n_layers=2 --n_heads=2 "
               f"--vocab_size=300 --batch_tokens=512 --device=cpu".split())
    assert "activations: attention" in capsys.readouterr().out
    assert (tmp_path / "memory.png").stat().st_size > 9999


def test_the_command_prints_a_bill_of_presets_and_config_files(capsys):
    for words in (["config_owt.py", "--n_devices=8"], ["--d_model=64", "--n_heads=2", "--optimizer=sgd"]):
        bill.main(words)
        out = capsys.readouterr().out
        assert "attention_scores" in out and "best: fsdp" in out and "hours on" in out
