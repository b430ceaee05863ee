"""Claims about attention.py and model.py."""
import copy
import dataclasses
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
def test_cache_gives_the_logits_of_the_full_forward(switch):
    """In one piece, token by token, in odd pieces, for ragged rows, and after going back: at every position."""
    model, tokens = toy(switch).double().eval(), ids(3, 19)
    with torch.no_grad():
        full = model(tokens)
        changed = model(torch.cat((tokens[:, :12], (tokens[:, 12:] + 1) % 61), dim=1))
        assert torch.equal(full[:, :12].round(decimals=9), changed[:, :12].round(decimals=9)), "the future was seen"
        for pieces in ([1] * 19, [7, 1, 1, 5, 1, 4], [19]):
            cache, start = model.new_cache(3), 0
            for n in pieces:
                part = model(tokens[:, start:start + n], cache=cache)
                assert (part - full[:, start:start + n]).abs().max() < 1e-10, (pieces, start)
                start += n
        lengths, cache = [3, 9, 6], model.new_cache(3)
        model(tokens[:, :9], cache=cache)
        cache.set_lengths(lengths)                                 # rows 0 and 2 were padded
        for step, n_new in ((0, 3), *((i, 1) for i in range(3, 8))):
            new = [slice(n + step, n + step + n_new) for n in lengths]
            part = model(torch.stack([row[s] for row, s in zip(tokens, new)]), cache=cache)
            assert (part - torch.stack([row[s] for row, s in zip(full, new)])).abs().max() < 1e-10, step
        cache = model.new_cache(3)
        model(tokens[:, :10], cache=cache)
        model((tokens[:, 10:14] + 1) % 61, cache=cache)
        cache.set_lengths(10)                                      # a draft that was turned down
        assert (model(tokens[:, 10:], cache=cache) - full[:, 10:]).abs().max() < 1e-10


def test_cache_rows_are_cut_chosen_and_copied():
    model, tokens = toy("window").eval(), ids(3, 12)
    with torch.no_grad():
        full, cache = model(tokens), model.new_cache(3, max_length=12)
        model(tokens[:, :9], cache=cache)
        cache.set_lengths([9, 2, 5])                               # further back than any window
        cache.select([2, 1, 1])
        assert cache.lengths == [5, 2, 2] and cache.length == 5 and cache.batch_size == 3
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


def test_a_windowed_layer_reads_its_window_only():
    model = toy("all windows").eval()
    with torch.no_grad():
        cache = model.new_cache(1)
        model(ids(1, 12), cache=cache)
        for store in cache.k + cache.v:
            store[:, :, :12 - 4] = torch.nan                       # a window of 5: the next token sees four before it
        assert model(ids(1, 1), cache=cache).isfinite().all()


def test_an_error_in_mid_pass_leaves_the_cache_as_it_was():
    model, tokens = toy("smear").eval(), ids(2, 9)
    with torch.no_grad():
        full, cache = model(tokens), model.new_cache(2)
        model(tokens[:, :4], cache=cache)
        hook = model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)     # as memory that runs out would
        with pytest.raises(ZeroDivisionError):
            model((tokens[:, 4:7] + 1) % 61, cache=cache)
        hook.remove()
        assert cache.lengths == [4, 4]
        assert torch.allclose(model(tokens[:, 4:], cache=cache), full[:, 4:], atol=1e-5)


def test_blocks_and_attention_are_called_alone():
    model, x = toy("window"), torch.randn(2, 9, TOY["d_model"], generator=rng())
    for kind in (Attention, Block):
        layer = kind(model.config, 1)
        assert torch.equal(layer(x), layer(x, torch.arange(9)))
        moved = layer(x, torch.tensor([[3], [40]]) + torch.arange(9))          # (B, T) positions: only distances count
        assert torch.allclose(layer(x), moved, atol=1e-5)
    shape = dict(vocab_size=61, context_length=24, d_model=48, n_layers=3, n_heads=4)
    assert Attention(ModelConfig(**shape))(x).shape == x.shape


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

@pytest.mark.parametrize("backend, switch", [("naive", "plain"), ("naive", "qwen3"), ("naive", "window"),
                                             ("naive", "mla window"), ("triton", "plain"), ("triton", "mqa"),
                                             ("triton", "window"), ("triton", "mla")])
def test_backends_agree(backend, switch):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not on this platform")
    tokens, results = ids(2, 13), []
    for name in (backend, "sdpa"):
        model = toy(switch, attention_backend=name)
        logits, loss = model(tokens, tokens)
        loss.backward()
        results.append((logits, model.layers[0].attn.q_proj.weight.grad))
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 2e-5 * max(1, theirs.abs().max()), (ours - theirs).abs().max()  # float32


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


@pytest.mark.parametrize("switch", ["gpt2", "qwen3", "mla window", "smear window"])
def test_compile_has_no_graph_break_and_the_same_loss(switch):
    torch._dynamo.reset()
    model, tokens = toy(switch), ids(2, 24)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, tokens)[1]
    loss.backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    plain = model(tokens, tokens)[1]
    plain.backward()
    assert abs(loss - plain) < 1e-5 and (grad - model.lm_head.weight.grad).abs().max() < 1e-5  # another order of sums


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


@pytest.mark.parametrize("switch", ["plain", "tied", "mtp", "2017"])
def test_fused_loss_is_the_loss_without_the_logits(switch):
    plain, fused = toy(switch), toy(switch, fused_loss=True)
    tokens, targets = ids(2, 7), ids(2, 7, seed=2)
    (_, want), (logits, loss) = (model.train()(tokens, targets) for model in (plain, fused))
    want.backward()
    loss.backward()
    assert logits is None and torch.allclose(loss, want, atol=1e-6)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name
    assert torch.equal(fused.eval()(tokens, targets)[0], plain.eval()(tokens))
    with pytest.raises(ValueError, match="parallel=fsdp divides"):
        sharded.Strategy("fsdp").divide(fused)


# --- the config, and folders ---

@pytest.mark.parametrize("settings, words", [
    (dict(norm="batch"), "norm='batch'"), (dict(n_kv_heads=3), "n_kv_heads=3"), (dict(d_model=50), "d_model=50"),
    (dict(head_dim=7), "7 must be even"), (dict(window_pattern="SX", sliding_window=3), "SX"),
    (dict(window_pattern="SL"), "needs sliding_window"), (dict(attention="mla", qk_norm=True), "qk_norm"),
    (dict(n_shared_experts=1), "need n_experts"), (dict(n_experts=2, n_experts_per_token=3), "n_experts=2"),
    (dict(logit_softcap=-1.0), "logit_softcap=-1"), (dict(fused_loss=True, logit_softcap=1.0), "never has the logits"),
    (dict(rope_factor=0.5), "rope_factor=0.5"), (dict(rope_factor=2.0, position="none"), "needs position=rope"),
    (dict(rope_scaling="linear"), "rope_scaling='linear'"), (dict(rope_low_freq=5.0), "rope_low_freq=5"),
    (dict(rope_theta=0.0), "rope_theta=0.0 must be above 0"), (dict(norm_eps=-1.0), "norm_eps=-1.0"),
    (dict(balance_weight=-1.0), "balance_weight=-1.0 must be at least 0"), (dict(rope_theta=math.nan), "theta=nan"),
    (dict(kv_lora_rank=8), "attention=mla"), (dict(n_layers=0), "n_layers=0"), (dict(vocab_size=None), "vocab_size=N"),
    (dict(mtp_depth=24), "mtp_depth=24"), (dict(n_heads=2.0), "n_heads=2.0"), (dict(n_heads=True), "n_heads=True")])
def test_shapes_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**TOY | settings)


def test_replace_derives_again_what_was_not_given():
    change = dataclasses.replace
    assert change(ModelConfig(), d_model=1024) == ModelConfig(d_model=1024) and ModelConfig(d_model=1024).d_ff == 2752
    assert change(change(ModelConfig(), d_model=1024), n_layers=2).head_dim == 64
    given = ModelConfig(head_dim=32, d_ff=1344, n_kv_heads=16)
    assert change(given, d_model=1024, n_heads=32) == ModelConfig(d_model=1024, n_heads=32, head_dim=32, d_ff=1344,
                                                                 n_kv_heads=16)
    assert change(ModelConfig(**TOY | SWITCHES["mla"]), d_model=96).kv_lora_rank == 96
    assert change(ModelConfig(**TOY | SWITCHES["moe"]), n_experts=0).d_ff_expert is None


def test_configs_survive_a_round_trip():
    for config in [preset(name) for name in PRESETS] + [ModelConfig(**TOY | more) for more in SWITCHES.values()]:
        stored = dataclasses.asdict(config)
        assert ModelConfig(**stored) == config and {type(value) for value in stored.values()} <= {
            int, float, str, bool, type(None)}, stored
    first_edition = dataclasses.asdict(preset("llama-3.1-8b")) | {"rope_scaling": "llama3"}
    assert ModelConfig(**first_edition) == preset("llama-3.1-8b")


def test_load_model_keeps_the_stored_dtype_and_draws_nothing(tmp_path, bpe_trained):
    for switch in ("plain", "tied", "moe bias"):
        model = toy(switch, rope_factor=2.0).bfloat16().eval()
        config = dataclasses.asdict(model.config) | {"rope_scaling": "llama3"}               # as the first edition did
        checkpoint.save_checkpoint({f"_orig_mod.{name}": t for name, t in model.state_dict().items()}, None, 3,
                                   tmp_path / "best.pt", model_config=config)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        loaded, tokenizer = load_model(tmp_path, name="best.pt")
        assert tokenizer is None and torch.equal(before, torch.get_rng_state()) and not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} == {p.dtype for p in model.parameters()}
        assert torch.equal(loaded(ids(2, 9)), model(ids(2, 9)))
        assert len(list(loaded.parameters())) == len(list(model.parameters()))               # a tied matrix is one
        loaded.train()(ids(2, 9), ids(2, 9))[1].backward()
    with pytest.raises(FileNotFoundError, match="ckpt.pt"):
        load_model(tmp_path)
    for changed, words in ((config | {"n_layers": 4}, "layers.3"), (config | {"d_ff_expert": 33}, "ffn"),
                           (config | {"colour": 1}, "colour"), (config | {"norm": "batch"}, "norm='batch'"),
                           (None, "no model_config")):
        checkpoint.save_checkpoint(model.state_dict(), None, 3, tmp_path / "ckpt.pt", model_config=changed)
        with pytest.raises(ValueError, match=f"ckpt.pt.*{words}"):
            load_model(tmp_path)
    tokenizer = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])     # 340 ids, the model has 61
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="340 ids, the model only 61"):
        load_model(tmp_path, name="best.pt")
    checkpoint.save_checkpoint(Transformer(ModelConfig(**TOY | dict(vocab_size=340))), None, 3, tmp_path / "ckpt.pt",
                               tokenizer_sha256=checkpoint.sha256(tmp_path / "tokenizer.json"))
    assert load_model(tmp_path, "cpu")[1].vocab_size == 340
    bpe.Tokenizer(*bpe_trained, ["<|end|>"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="not the tokenizer"):
        load_model(tmp_path)
