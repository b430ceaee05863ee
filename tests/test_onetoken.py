"""Claims about onetoken.c: the model's own pass, to rounding, whatever the weights are stored in; and when it runs."""
import copy

import pytest
import torch

import compress
import decoding
import onetoken
from model import ModelConfig, Transformer

pytestmark = pytest.mark.skipif(onetoken.library() is None, reason="needs a C compiler")
BASE = dict(vocab_size=301, context_length=48, d_model=64, n_layers=2, n_heads=4, d_ff=128)
MODELS = {
    "course": {}, "Qwen": dict(n_kv_heads=2, qk_norm=True, qkv_bias=True, tie_embeddings=True),
    "GPT-2": dict(norm="layer", bias=True, ffn="gelu", position="learned"),
    "default": dict(ffn="relu2", smear=True, shift_keys=True, n_kv_heads=2, rope_pattern="NR", logit_softcap=15.0,
                    sliding_window=6, window_pattern="SL", qk_norm=True),
    "Llama 3": dict(rope_factor=4.0, rope_original_context=32, head_dim=32, n_kv_heads=1, rope_interleaved=True),
    "bare": dict(norm="none", ffn="silu", position="sinusoidal")}


def build(seed=0, **shape) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**BASE | shape)).eval()
    for parameter in model.parameters():                 # gates, biases and norms away from 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def stored(model, kind: str):
    """(the model with weights of this kind, the same numbers in float32 in a plain model)."""
    if kind not in ("int8", "int4"):
        small = copy.deepcopy(model).to(getattr(torch, kind))
        return small, copy.deepcopy(small).float()
    small, plain = compress.quantize(copy.deepcopy(model), kind), copy.deepcopy(model)
    for name, layer in compress.matrices(plain).items():
        layer.weight.data = small.get_submodule(name).multiplied_out()
    small.token_embeddings.weight.data = plain.token_embeddings.weight.data        # a tied head is rounded with it
    return small, plain


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_the_models_own_in_float32(name, kind):
    small, plain = stored(build(**MODELS[name]), kind)
    prompts = [list(range(1, n)) for n in (5, 9, 14, 3, 20)]             # ragged, and not a multiple of four
    (_, memory), (_, cache) = (decoding.prefill(plain, prompts, True, 20) for _ in range(2))
    memory.in_c, cache.in_c = None, onetoken.Pass(small, cache.max_length, torch.float32)
    tolerance = 3e-2 if kind == "bfloat16" else 1e-4     # embeddings are added and gated in bfloat16

    def close(ours, expected):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    for step in range(8):
        ids = [(7 * step + i) % 301 for i in range(5)]
        close(decoding.decode(small, ids, cache), decoding.decode(plain, ids, memory))
    assert cache.lengths == memory.lengths == [n + 7 for n in (5, 9, 14, 3, 20)]
    three = torch.tensor([[3, 9, i] for i in range(5)])              # several tokens at once see each other in order
    close(decoding.read_on(small, three, cache), decoding.read_on(plain, three, memory))
    torch.testing.assert_close(cache.k[1], memory.k[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=0.8, top_p=0.9), dict(temperature=1.0, top_k=5)])
def test_texts_are_the_same_either_way_and_past_the_context(monkeypatch, how):
    model, texts = build(**MODELS["default"]), []
    prompts = [[1, 2, 3], [4] * 30, [5, 6] * 9]
    for name, value in (("MAX_ROWS", 64), ("MAX_ROWS", 2), ("library", lambda: None)):  # C; both; torch
        monkeypatch.setattr(onetoken, name, value)
        rng = torch.Generator().manual_seed(3)
        texts.append(decoding.generate(model, prompts, 60, generator=rng, stop_ids=[7], **how))
    assert texts[0] == texts[1] == texts[2] and max(map(len, texts[0])) > 30


@torch.inference_mode()
def test_bfloat16_caches_and_weights_that_change_between_texts():
    model = build(**MODELS["Qwen"]).bfloat16()
    bare = build(**MODELS["bare"]).bfloat16()
    caches = [decoding.prefill(bare, [[1, 2, 3]], True, 4)[1] for _ in range(2)]
    caches[1].in_c = None
    for cache in caches:
        decoding.decode(bare, [4], cache)
    assert (caches[0].k[0] == caches[1].k[0]).float().mean() > 0.95              # rounded to the nearest, as torch does
    first = decoding.generate(model, [1, 2, 3], 20, temperature=0)
    model.layers[0].attn.q_proj.weight.neg_()
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    second = decoding.generate(model, [1, 2, 3], 20, temperature=0)
    assert first != second and second == decoding.generate(copy.deepcopy(model), [1, 2, 3], 20, temperature=0)


@torch.inference_mode()
def test_a_layer_alone_equals_float64_at_any_size():
    for d_in, d_out, rows in ((64, 1, 1), (128, 7, 3), (192, 33, 4), (64, 50, 32), (8, 5, 9), (17, 3, 6)):
        torch.manual_seed(d_in)
        layer, x = compress.Linear(d_in, d_out), torch.randn(rows, 2, d_in)[:, 1]      # not in one piece
        kinds = {"float32": layer, "bfloat16": copy.deepcopy(layer).bfloat16(),
                 "int8": compress.RoundedLinear(compress.round_int8(layer.weight))}
        if d_in % 64 == 0:
            kinds["int4"] = compress.RoundedLinear(compress.round_int4(layer.weight))
        for kind, one in kinds.items():
            weight = one.multiplied_out() if kind.startswith("int") else one.weight
            expected = (x.double() @ weight.double().T).float()
            torch.testing.assert_close(onetoken.linear(one, x), expected, rtol=1e-4, atol=1e-4, msg=f"{kind} {d_in}")


def test_rounded_layers_pass_gradients_on():
    small, x = compress.RoundedLinear(compress.round_int8(torch.randn(8, 64))), torch.randn(3, 64, requires_grad=True)
    small(x).sum().backward()
    torch.testing.assert_close(x.grad, small.multiplied_out().sum(dim=0).expand(3, 64))


def test_what_it_cannot_run_and_damaged_weights():
    for name, value in (("norm_position", "post"), ("attention", "mla"), ("n_experts", 4)):
        assert onetoken.prepare(build(**{name: value}), 8) is None, name
    assert onetoken.prepare(build(), 8) and onetoken.prepare(build().double(), 8) is None
    for ffn, name in (("swiglu", "w2"), ("relu2", "w1"), ("gelu", "w1")):        # it reaches the logits from anywhere
        model = build(ffn=ffn)
        _, cache = decoding.prefill(model, [[1, 2]], True, 4)
        getattr(model.layers[1].ffn, name).weight.data[0, 0] = float("nan")
        cache.in_c = onetoken.prepare(model, 6)
        with torch.inference_mode(), pytest.raises(ValueError, match="NaN"):
            decoding.pick(decoding.decode(model, [3], cache), None, 0)
    with torch.inference_mode(), pytest.raises(ValueError, match="cache of 6"):
        [decoding.decode(model, [3], cache) for _ in range(9)]


def test_no_compiler_or_a_broken_one_leaves_it_to_torch(monkeypatch, tmp_path):
    for switch, off in (("NATIVE", True), ("ONETOKEN", True), ("FUSED", False)):
        with monkeypatch.context() as environment:
            environment.setenv(switch, "0")
            assert (onetoken.library.__wrapped__() is None) == off, switch
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "cc").chmod(0o755)
    for path in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(path))
        assert onetoken.library.__wrapped__() is None
    assert not list((tmp_path / "cache").rglob("*.so"))
