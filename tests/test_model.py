"""Claims about attention.py and model.py."""
import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch

from common import SWITCHES, TOY, ids, rng, toy
import attention
import bpe
import checkpoint
import sharded
from accounting import PRESETS, preset
from model import Attention, Block, ModelConfig, Transformer, cross_entropy, load_model, sinusoids, token_losses


# --- the cache ---

@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_full_forward(switch):
    """In one piece, token by token, in odd pieces, for ragged rows, and after going back: at every position."""
    model, tokens = toy(switch).double().eval(), ids(3, 19)
    full = model(tokens)

    def read(cache, starts, n):
        """The next n tokens of each row, from where it stands, have the full pass' logits."""
        part = model(torch.stack([row[i:i + n] for row, i in zip(tokens, starts)]), cache=cache)
        expected = torch.stack([row[i:i + n] for row, i in zip(full, starts)])
        assert (part - expected).abs().max() < 1e-10, (starts, n)
    for pieces in ([1] * 19, [7, 1, 1, 5, 1, 4], [19]):
        cache = model.new_cache(3)
        for n in pieces:
            read(cache, [cache.length] * 3, n)
    lengths, cache = [3, 9, 6], model.new_cache(3)
    read(cache, [0] * 3, 9)
    cache.set_lengths(lengths)                                     # rows 0 and 2 were padded
    for step, n in ((0, 3), *((i, 1) for i in range(3, 8))):
        read(cache, [length + step for length in lengths], n)
    cache = model.new_cache(3)
    read(cache, [0] * 3, 10)
    model((tokens[:, 10:14] + 1) % 61, cache=cache)
    cache.set_lengths(10)                                          # a draft that was turned down
    read(cache, [10] * 3, 9)


@torch.no_grad()
def test_half_of_the_numbers_of_shifted_keys_are_those_of_the_position_before():
    attn = Attention(ModelConfig(**TOY | dict(shift_keys=True, n_kv_heads=2, position="none"))).double()
    plain = Attention(ModelConfig(**TOY | dict(n_kv_heads=2, position="none"))).double()
    plain.load_state_dict(attn.state_dict())
    x = torch.randn(1, 5, 48, dtype=torch.float64, generator=rng())
    keys = [plain.k_proj(x[0, t]).tolist() for t in range(5)]
    shifted = torch.tensor([[(keys[t - 1][i] if t else 0) if i % 2 == 0 else keys[t][i] for i in range(24)]
                            for t in range(5)], dtype=torch.float64)
    del plain.k_proj
    plain.k_proj = lambda x: shifted[None]                         # plain attention on keys that were shifted by hand
    torch.testing.assert_close(attn(x), plain(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_cache_rows_are_cut_chosen_and_copied_and_survive_an_error():
    model, tokens = toy("smear window", shift_keys=True).eval(), ids(3, 12)
    full, cache = model(tokens), model.new_cache(3, max_length=12)
    model(tokens[:, :9], cache=cache)
    cache.set_lengths([9, 2, 5])                                   # further back than any window
    cache.select([2, 1, 1])
    assert cache.lengths == [5, 2, 2] and cache.length == 5 and cache.batch_size == 3
    hook = model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)         # as memory that runs out would
    with pytest.raises(ZeroDivisionError):
        model(ids(3, 2, seed=4), cache=cache)
    hook.remove()
    after = model(torch.stack([tokens[2, 5:7], tokens[1, 2:4], tokens[1, 2:4]]), cache=cache)
    assert torch.allclose(after, torch.stack([full[2, 5:7], full[1, 2:4], full[1, 2:4]]), atol=1e-5)
    for lengths in (8, [7, 4, 5], [1, 1], -1):
        with pytest.raises(ValueError, match="only be cut"):
            cache.set_lengths(lengths)
    with pytest.raises(ValueError, match="13 tokens .7 cached. pass the cache of 12"):
        model(ids(3, 6), cache=cache)
    assert cache.lengths == [7, 4, 4]
    latent = toy("mla").new_cache(1, 100)                          # c_kv of 4 x 12, a rotary key of 6
    assert sum(t.numel() for t in latent.k + latent.v) == 3 * 100 * (48 + 6)


@torch.no_grad()
def test_a_windowed_layer_reads_its_window_only():
    model = toy("all windows").eval()
    cache = model.new_cache(1)
    model(ids(1, 12), cache=cache)
    for store in cache.k + cache.v:
        store[:, :, :12 - 4] = torch.nan                           # a window of 5: the next token sees four before it
    assert model(ids(1, 1), cache=cache).isfinite().all()


def test_blocks_and_attention_are_called_alone():
    model, x = toy("window"), torch.randn(2, 9, TOY["d_model"], generator=rng())
    for kind in (Attention, Block):
        layer = kind(model.config, 1)
        assert torch.equal(layer(x), layer(x, torch.arange(9)))
        moved = layer(x, torch.tensor([[3], [40]]) + torch.arange(9))          # (B, T) positions: only distances count
        assert torch.allclose(layer(x), moved, atol=1e-5)


def test_odd_inputs_of_the_model():
    model = toy().eval()
    assert model(ids(2, 0)).shape == (2, 0, TOY["vocab_size"]) and model(ids(0, 3)).shape == (0, 3, TOY["vocab_size"])
    with pytest.raises(ValueError, match="must be .B, T."):
        model(ids(5))
    with pytest.raises(ValueError, match="25 tokens .* pass the context of 24"):
        model(ids(1, 25))
    with pytest.raises(ValueError, match="pass the context of 24"):
        learned = toy("gpt2")
        learned(ids(1, 25), cache=learned.new_cache(1, 30))        # there is no row for a later position
    for tokens in (ids(30).tolist(), ids(30).numpy().astype("uint16")):
        assert torch.equal(token_losses(model, ids(30)), token_losses(model, tokens))
    assert model(ids(8, 24), ids(8, 24, seed=2))[1].item() == pytest.approx(math.log(61), abs=0.5)     # knows nothing


# --- values and gradients ---

WAYS = {"naive": (dict(attention_backend="naive"), ["qwen3", "window", "mla window"]),
        "triton": (dict(attention_backend="triton"), ["mqa", "window", "mla"]),
        "fused loss": (dict(fused_loss=True), ["tied", "mtp", "2017"]),
        "compiled": ({}, ["gpt2", "mla window", "smear window"]),
        "compiled kernels": (dict(fused_loss=True, attention_backend="triton"), ["plain"])}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compute_gives_the_same_loss_and_gradients(way):
    settings, switches = WAYS[way]
    if "attention_backend" in settings and way != "naive":
        pytest.importorskip("triton", reason="Triton is not on this platform")
    torch._dynamo.reset()
    for switch in switches:
        plain, other, (tokens, targets) = toy(switch).train(), toy(switch, **settings).train(), ids(2, 2, 13)
        run = torch.compile(other, backend="aot_eager", fullgraph=True) if "compiled" in way else other
        (logits, loss), (expected_logits, expected) = run(tokens, targets), plain(tokens, targets)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for (name, p), q in zip(other.named_parameters(), plain.named_parameters(), strict=True):
            assert (p.grad - q[1].grad).abs().max() <= 2e-5 * max(1, q[1].grad.abs().max()), (switch, name)
        if "fused_loss" in settings:
            assert logits is None
            logits = other.eval()(tokens, targets)[0]
        assert (logits - expected_logits).abs().max() <= 2e-5 * max(1, expected_logits.abs().max())
    if way == "fused loss":
        with pytest.raises(ValueError, match="parallel=fsdp divides"):
            sharded.Strategy("fsdp").divide(other)


def test_short_bfloat16_contexts_on_a_cpu_are_attended_to_by_either_way_alike(monkeypatch):
    results = []
    for longest in (attention.SHORT_CONTEXT, 0):                   # plain products, torch's fused kernel
        monkeypatch.setattr(attention, "SHORT_CONTEXT", longest)
        results.append(toy("qwen3").bfloat16()(ids(2, 13)).float())
    assert (results[0] - results[1]).abs().max() < 2e-2 * results[0].abs().max()             # 8 bits


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_in_ten_lines(interleaved):
    """Normed and rotated queries and keys, two query heads to a key head, a window of four."""
    c = ModelConfig(**TOY | dict(n_kv_heads=2, qk_norm=True, sliding_window=4, rope_interleaved=interleaved))
    layer, x, scores = Attention(c).double(), torch.randn(2, 9, 48, dtype=torch.float64, generator=rng()), 1
    turns = torch.polar(torch.ones(9, 6), torch.arange(9.)[:, None] * c.rope_theta ** (-torch.arange(0, 12, 2) / 12))
    for project, norm in ((layer.q_proj, layer.q_norm), (layer.k_proj, layer.k_norm)):
        t = project(x).view(2, 9, -1, 12).transpose(1, 2)
        t = torch.nn.functional.rms_norm(t, (12,), torch.nn.init.normal_(norm.weight), c.norm_eps)
        t = t.unflatten(-1, (6, 2)) if interleaved else t.unflatten(-1, (2, 6)).mT
        t = torch.view_as_real(torch.view_as_complex(t.contiguous()) * turns).flatten(-2)  # the same product
        scores = scores * t if t.shape[1] == 4 else scores @ t.repeat_interleave(2, dim=1).mT / 12 ** 0.5
    seen = torch.ones(9, 9, dtype=torch.bool).tril() & ~torch.ones(9, 9, dtype=torch.bool).tril(-4)
    v = layer.v_proj(x).view(2, 9, 2, 12).transpose(1, 2).repeat_interleave(2, dim=1)
    y = scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ v
    ours, theirs = layer(x), layer.o_proj(y.transpose(1, 2).reshape(2, 9, 48))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_by_finite_differences(switch):
    """The derivative of the training loss along a random direction, in float64, at an odd shape."""
    model, tokens = toy(switch).double().train(), ids(2, 7)
    model(tokens, ids(2, 7, seed=2))[1].backward()
    parameters, values = list(model.parameters()), []
    assert all(p.grad is not None for p in parameters)
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=rng(i)) for i, p in enumerate(parameters)]
    with torch.no_grad():
        for step in (1e-6, -2e-6):                                 # to x + step, then to x - step
            for p, d in zip(parameters, direction):
                p += step * d
            values.append(model(tokens, ids(2, 7, seed=2))[1].item())
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction)).item()
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_block_is_torchs(order):
    """LayerNorm, GELU, biases, before and after the sum, against torch.nn's encoder layer."""
    block = Block(ModelConfig(**TOY | SWITCHES["gpt2"] | dict(norm_position=order, position="none"))).double()
    theirs = torch.nn.TransformerEncoderLayer(
        48, 4, 96, dropout=0.0, activation=lambda x: torch.nn.functional.gelu(x, approximate="tanh"), batch_first=True,
        norm_first=order == "pre").double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    a, f = block.attn, block.ffn
    weights = {"self_attn.in_proj_weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
               "self_attn.in_proj_bias": torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])}
    pairs = {"self_attn.out_proj": a.o_proj, "linear1": f.w1, "linear2": f.w2, "norm1": block.ln1, "norm2": block.ln2}
    for their, our in pairs.items():
        weights |= {f"{their}.weight": our.weight, f"{their}.bias": our.bias}
    theirs.load_state_dict(weights)
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    assert (block(x) - theirs(x, src_mask=torch.ones(9, 9, dtype=torch.bool).triu(1))).abs().max() < 1e-6


def test_softcap_and_sinusoids():
    capped, free = toy("softcap").eval(), toy().eval()
    assert (capped(ids(1, 5)) - 5 * torch.tanh(free(ids(1, 5)) / 5)).abs().max() < 1e-6
    table = sinusoids(torch.arange(5), 6)                          # 1706.03762, section 3.5, entry by entry
    for p, i in itertools.product(range(5), range(3)):
        angle = p / 10_000 ** (2 * i / 6)
        assert table[p, 2 * i:2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_mla_is_deepseeks(q_lora_rank):
    transformers = pytest.importorskip("transformers", reason="a reference for tests only")
    config = transformers.DeepseekV3Config(
        vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=28, qk_rope_head_dim=6, qk_nope_head_dim=12,
        v_head_dim=12, first_k_dense_replace=3, rms_norm_eps=1e-6, rope_interleave=True, max_position_embeddings=24,
        attn_implementation="eager")
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    ours = toy("mla", q_lora_rank=q_lora_rank, kv_lora_rank=28, rope_head_dim=6, rope_interleaved=True,
               norm_eps=1e-6).eval()
    names = {"embed_tokens": "token_embeddings", "norm": "ln_final", "lm_head": "lm_head", "input_layernorm": "ln1",
             "post_attention_layernorm": "ln2", "q_proj": "attn.q_proj", "q_a_proj": "attn.q_down_proj",
             "q_a_layernorm": "attn.q_norm", "q_b_proj": "attn.q_proj", "kv_b_proj": "attn.kv_up_proj",
             "kv_a_proj_with_mqa": "attn.kv_down_proj", "kv_a_layernorm": "attn.kv_norm", "o_proj": "attn.o_proj",
             "gate_proj": "ffn.w1", "up_proj": "ffn.w3", "down_proj": "ffn.w2"}
    weights = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.split(".")
        layer = f"layers.{parts[2]}." if "layers" in parts else ""
        weights[f"{layer}{names[parts[-2]]}.weight"] = tensor
    ours.load_state_dict(weights)
    with torch.no_grad():
        assert (ours(ids(2, 17)) - theirs(ids(2, 17)).logits).abs().max() < 1e-5


# --- training losses ---

def test_expert_bias_and_parts_of_the_training_loss():
    model, tokens, targets = toy("moe bias").train(), ids(4, 24), ids(4, 24, seed=3)
    spread = []
    for _ in range(300):
        model(tokens)
        spread.append(sum(layer.ffn.tokens_per_expert.float().std().item() for layer in model.layers))
        model.balance_experts()
    assert spread[-1] < 0.35 * spread[0] and not model.layers[0].ffn.tokens_per_expert.any(), spread[::50]
    for switch, name, weight in (("moe", "balance", 0.01), ("mtp", "mtp", 0.5)):
        model = toy(switch).train()
        loss, parts = model(tokens, targets)[1].item(), model.losses
        assert loss == pytest.approx((parts["cross_entropy"] + weight * parts[name]).item(), rel=1e-6)
        assert len(parts) == 2
        assert model.eval()(tokens, targets)[1].item() == pytest.approx(parts["cross_entropy"].item(), rel=1e-6)
        copy.deepcopy(model)


def test_multi_token_prediction_by_hand_and_as_a_draft():
    model, text = toy("mtp").double().train(), ids(2, 12)
    tokens, targets = text[:, :-1], text[:, 1:]
    model(tokens, targets)
    hidden, embed, losses = model.hidden(tokens), model.token_embeddings, []
    for depth, future in enumerate(model.mtp, start=1):  # h_i^k from h_i^(k-1) and token i+k; it predicts i+k+1
        rows = hidden.shape[1] - 1
        both = torch.cat((future.hidden_norm(hidden[:, :rows]), future.token_norm(embed(text[:, depth:depth + rows]))),
                         dim=-1)
        hidden = future.block(future.proj(both))
        losses.append(cross_entropy(model.lm_head(model.ln_final(hidden)), text[:, depth + 1:depth + 1 + rows]))
    assert model.losses["mtp"].item() == pytest.approx((sum(losses) / 2).item(), rel=1e-9)
    hidden, cache = model.hidden(tokens), model.new_cache(2, draft=True)
    full = model.draft(hidden, targets)
    pieces = [model.draft(hidden[:, i:i + n], targets[:, i:i + n], cache) for i, n in ((0, 5), (5, 1), (6, 5))]
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-10
    with pytest.raises(ValueError, match="mtp_depth=0"):
        toy().draft(hidden.float(), targets)


# --- the config, and folders ---

@pytest.mark.parametrize("words, settings", {
    "norm='batch'": dict(norm="batch"), "n_kv_heads=3": dict(n_kv_heads=3), "d_model=50": dict(d_model=50),
    "7 must be even": dict(head_dim=7), "RX": dict(rope_pattern="RX"),
    "rope_pattern='N'": dict(rope_pattern="N", attention="mla"), "SX": dict(window_pattern="SX", sliding_window=3),
    "needs sliding_window": dict(window_pattern="SL"), "qk_norm": dict(attention="mla", qk_norm=True),
    "need n_experts": dict(n_shared_experts=1), "n_experts=2": dict(n_experts=2, n_experts_per_token=3),
    "never has the logits": dict(fused_loss=True, logit_softcap=1.0), "rope_factor=0.5": dict(rope_factor=0.5),
    "rope_low_freq=5": dict(rope_low_freq=5.0), "rope_scaling='linear'": dict(rope_scaling="linear"),
    "rope_theta=0.0 must be above 0": dict(rope_theta=0.0), "norm_eps=-1.0": dict(norm_eps=-1.0),
    "balance_weight=-1.0": dict(balance_weight=-1.0), "need attention=mla": dict(kv_lora_rank=8),
    "vocab_size=N": dict(vocab_size=None), "mtp_depth=24": dict(mtp_depth=24),
    "n_heads=2.0": dict(n_heads=2.0)}.items())
def test_shapes_that_cannot_be_are_refused(words, settings):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**TOY | settings)


def test_configs_survive_a_round_trip_and_derive_again_what_was_not_given():
    for config in [preset(name) for name in PRESETS] + [ModelConfig(**TOY | more) for more in SWITCHES.values()]:
        stored = dataclasses.asdict(config)
        assert ModelConfig(**stored) == config
        assert {type(value) for value in stored.values()} <= {int, float, str, bool, type(None)}
        assert {type(value) for value in vars(config.plain()).values()} <= {int, float, str, bool, type(None)}
    change, given = dataclasses.replace, dict(head_dim=32, d_ff=1344, n_kv_heads=16)
    wider = change(ModelConfig(), d_model=1024)
    assert wider == ModelConfig(d_model=1024) and (wider.d_ff, change(wider, n_layers=2).head_dim) == (2752, 64)
    more = dict(d_model=1024, n_heads=32)
    assert change(ModelConfig(**given), **more) == ModelConfig(**given, **more)
    assert change(ModelConfig(**TOY | SWITCHES["mla"]), d_model=96).kv_lora_rank == 96
    assert change(ModelConfig(**TOY | SWITCHES["moe"]), n_experts=0).d_ff_expert is None


def test_load_model_keeps_the_stored_dtype_and_draws_nothing(tmp_path, bpe_trained):
    for switch in ("tied", "moe bias"):
        model = toy(switch, rope_factor=2.0).bfloat16().eval()
        config = dataclasses.asdict(model.config) | {"rope_scaling": "llama3"}               # as the first edition did
        weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.save_checkpoint(weights, None, 3, tmp_path / "best.pt", model_config=config)
        before = torch.get_rng_state()
        loaded, tokenizer = load_model(tmp_path, name="best.pt")
        assert tokenizer is None and torch.equal(before, torch.get_rng_state()) and not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert torch.equal(loaded(ids(2, 9)), model(ids(2, 9)))
        assert len(list(loaded.parameters())) == len(list(model.parameters()))               # a tied matrix is one
        loaded.train()(ids(2, 9), ids(2, 9))[1].backward()
    for changed, words in ((config | {"n_layers": 4}, "layers.3"), (config | {"d_ff_expert": 33}, "ffn"),
                           (config | {"colour": 1}, "colour"), (None, "no model_config")):
        checkpoint.save_checkpoint(model.state_dict(), None, 3, tmp_path / "ckpt.pt", model_config=changed)
        with pytest.raises(ValueError, match=f"ckpt.pt.*{words}"):
            load_model(tmp_path)


def test_a_model_and_its_tokenizer_belong_together(tmp_path, bpe_trained):
    bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]).save(tmp_path / "tokenizer.json")
    save = functools.partial(checkpoint.save_checkpoint, optimizer=None, step=3, path=tmp_path / "ckpt.pt",
                             tokenizer_sha256=checkpoint.sha256(tmp_path / "tokenizer.json"))
    save(toy(vocab_size=340))
    assert load_model(tmp_path, "cpu")[1].vocab_size == 340
    save(toy())
    with pytest.raises(ValueError, match="340 ids, the model only 61"):
        load_model(tmp_path)
    bpe.Tokenizer(*bpe_trained, ["<|end|>"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="not the tokenizer"):
        load_model(tmp_path)
