"""Claims about accounting.py."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from common import SWITCHES, ids, toy, weights# noqa: F401
from model import ModelConfig

def test_gpt2_xl_bill_of_the_handout():
    from accounting import count_params, flops_per_token
    from model import ModelConfig
    config = ModelConfig(vocab_size=50_257, context_length=1024, d_model=1600, n_layers=48, n_heads=25, d_ff=6400)
    assert count_params(config)["total"] == 2_127_057_600
    for T, total, shares in ((1024, 4.513e12, (66.9, 22.3, 7.1, 3.6)), (16_384, 149.5e12, (None, None, 55.2, None))):
        flops = flops_per_token(config, T)
        assert flops["total"] * T == pytest.approx(total, rel=5e-4)
        for part, share in zip(("feed_forward", "attention_projections", "attention_scores", "logits"), shares):
            assert share is None or 100 * flops[part] / flops["total"] == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("switch", SWITCHES)
def test_bills_are_what_the_model_does(switch, monkeypatch):
    """Parameters and forward FLOPs exactly, backward FLOPs within 1 %, kept activations within 1.5 %."""
    from accounting import activation_bytes, active_params, count_params, flops_per_token
    from torch.utils.flop_counter import FlopCounterMode
    big = dict(d_model=128, d_ff=320, context_length=64, vocab_size=512)
    model = toy(switch, attention_backend="naive", **big)
    counts = count_params(model.config)
    assert counts["total"] == sum(p.numel() for p in model.parameters()) == sum(counts.values()) - counts["total"]
    assert (active_params(model.config) == counts["total"]) == (
        not model.config.n_experts and not model.config.mtp_depth)
    for training, tolerance in ((False, 1e-9), (True, 0.01)):
        with FlopCounterMode(display=False) as counter:
            loss = model.train(training)(ids(2, 64), ids(2, 64))[1]
            if training:
                loss.backward()
        # Our naive backend multiplies the whole square and masks after, in sliding layers too.
        square = dict(sliding_window=None, window_pattern="S") if model.config.sliding_window else {}
        config = dataclasses.replace(model.config, **square)
        assert flops_per_token(config, 64, training)["total"] * 128 == pytest.approx(
            counter.get_total_flops(), rel=tolerance)
    model.config.attention_backend = "sdpa"
    monkeypatch.setattr("model.SHORT_CONTEXT", 0)  # the bill is for fused attention, which keeps no scores
    for dtype in ("float32", "bfloat16"):
        kept = [saved_bytes(model, ids(batch, 64), dtype)
                for batch in (2, 4)]  # the difference leaves casts of weights out
        assert 2 * activation_bytes(model.config, 64, dtype) == pytest.approx(
            kept[1] - kept[0], rel=0.05 if model.config.mtp_depth else 0.015), dtype


def saved_bytes(model, tokens, dtype) -> int:
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor                      # held, so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model.train()(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_memory_time_and_intensity_by_hand():
    import accounting as bill
    from model import preset
    config = preset("llama-3.1-8b", context_length=8192)
    assert bill.kv_cache_bytes(config, 1) == 2 * 32 * 8 * 128 * 2 == 131_072
    mla = preset("small", attention="mla", kv_lora_rank=512, rope_head_dim=64)
    assert bill.kv_cache_bytes(mla, 1) == 12 * (512 + 64) * 2 and mla.d_model == 768
    window = preset("small", sliding_window=100, window_pattern="SL", context_length=1000)
    assert bill.kv_cache_bytes(window, 1000, "float32") == 6 * (100 + 1000) * 2 * 768 * 4
    memory = bill.memory_bytes(config, 2, 1024, "bfloat16")
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] / 2 == 4 * 8_030_261_248
    assert sum(memory.values()) == 2 * memory["total"]
    fits = bill.largest_batch(config, 200e9, 1024)
    assert bill.memory_bytes(config, fits, 1024)["total"] <= 200e9 < bill.memory_bytes(config, fits + 1, 1024)["total"]
    assert bill.largest_batch(config, 1e9) == 0
    per_token = bill.flops_per_token(config, 8192, training=True)["total"]
    assert bill.training_hours(config, 1e9, "H100", mfu=0.5,
                               n_devices=8) == pytest.approx(per_token * 1e9 / (989e12 * 0.5 * 8) / 3600)
    assert bill.intensity(config, 1, 8192)["decode"] < 5 < 295 < bill.intensity(config, 1, 8192)["prefill"]
    causal, square = (bill.flops_per_token(config, 1000, causal=kind)["attention_scores"] for kind in (True, False))
    assert causal / square == pytest.approx(1001 / 2000)
    with pytest.raises(ValueError, match="dtype='int4'"):
        bill.memory_bytes(config, dtype="int4")


def test_opt_table_and_number_formats():
    from accounting import OPT, format_demonstration, number_formats, opt_shares
    for name in OPT:
        shares = opt_shares(name)
        assert np.abs(np.subtract(shares["published"],
                                  shares["refitted"])).max() <= 0.55, (name, shares)  # printed as whole percents
        assert shares["ours"][1] == pytest.approx(2 * shares["ours"][0])
    single, half, brain = number_formats()
    assert half["largest"] == 65504 and half["smallest"] == 2 ** -24 and half["spacing_at_1"] == 2 ** -10
    assert brain["spacing_at_1"] == 2 ** -7 and brain["largest"] == (2 - 2 ** -7) * 2.0 ** 127 and single["bits"] == 32
    square, _, update, total = (row[1:] for row in format_demonstration())
    assert square[0] == 90_000 and square[1] == math.inf and update[2] == 1 and total[2] == 0.5
