"""Claims about model.py."""
import copy
import math

import pytest
import torch

from common import SWITCHES, TOY, ids, toy, weights# noqa: F401
import model as model_module
import parallel
from model import Block, ModelConfig, RMSNorm

@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_functions_follow_torch(shape, dtype):
    import model
    F, tolerance = torch.nn.functional, {torch.float64: 1e-12, torch.float32: 2e-6,
                                         torch.bfloat16: 2e-2}[dtype]  # one rounding of each
    x, y = (torch.randn(*shape, 6, generator=torch.Generator().manual_seed(i)).to(dtype) * 3 for i in (0, 1))
    weight, targets = torch.linspace(0.5, 2, 6), torch.arange(math.prod(shape)).view(shape) % 6
    for ours, theirs in ((model.softmax(x, -1),
                          F.softmax(x, -1)), (model.silu(x), F.silu(x)), (model.gelu(x), F.gelu(x, approximate="tanh")),
                         (model.rms_norm(x, weight,
                                         1e-5), F.rms_norm(x.double(), (6, ), weight.double(),
                                                           1e-5)), (model.swiglu(x,
                                                                                 y), F.silu(x.double()) * y.double()),
                         (model.cross_entropy(x, targets), F.cross_entropy(x.double().view(-1, 6), targets.view(-1)))):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * max(1, theirs.abs().max()), (ours, theirs)
    assert model.cross_entropy(x, targets.int()).dtype == torch.promote_types(dtype, torch.float32)
    assert model.cross_entropy(x * 1000, targets).isfinite()
    with pytest.raises(ValueError, match="do not fit logits"):
        model.cross_entropy(x, targets.unsqueeze(-1))


def test_attention_masks_leading_dimensions_and_hidden_rows():
    import model
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    mask = torch.rand(5, 7) < 0.6
    mask[2], mask[:2, 0] = False, True
    ours, theirs = model.attention(q, k, v, mask), torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    rows = mask.any(-1)
    assert (ours - theirs)[..., rows, :].abs().max() < 1e-6 and ours[..., ~rows, :].abs().max() == 0
    assert (model.attention(q[0, 0], k[0, 0], v[0, 0]) - model.attention(q, k, v)[0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_versions_equal_the_simple_ones(dtype):
    """Values and gradients, at odd shapes; bfloat16 differs by the rounding of each intermediate."""
    import model
    angles = torch.randn(5, 1, 4)
    logits, ids_ = torch.randn(2, 5, 400) * 4, torch.randint(0, 400, (2, 5))
    x, y = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    cases = [(model.FastRMSNorm, model.rms_norm, (x, torch.rand(8).to(dtype) + 0.5), (1e-5, )),
             (model.FastSwiGLU, model.swiglu, (x, y), ()),
             (model.CrossEntropy, model.simple_cross_entropy, (logits, ), (ids_, ))]
    cases += [(model.FastRotate, model.rotate, (x, ), (angles.cos().to(dtype), angles.sin().to(dtype), way))
              for way in (False, True)]
    for function, simple, tensors, rest in cases:
        results = []
        for run in (function.apply, simple):
            inputs = [t.to(dtype).requires_grad_() for t in tensors]
            out = run(*inputs, *rest)
            out.backward(torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype))
            results.append([out] + [t.grad for t in inputs])
        for ours, theirs in zip(*results):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.08
                                                   }[dtype] * max(1,
                                                                  theirs.abs().max())
    monkey = model.CrossEntropy.PIECE
    model.CrossEntropy.PIECE = 1000                                # pieces of two rows: the last one is cut short
    assert (model.CrossEntropy.apply(logits, ids_) - model.simple_cross_entropy(logits, ids_)).abs().max() < 1e-5
    model.CrossEntropy.PIECE = monkey


def test_rope_by_hand_and_by_distance():
    from model import rope
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    turned = torch.view_as_complex(x.view(2, 3, 9, 4, 2)) * torch.polar(torch.ones(9, 4, dtype=torch.float64),
        torch.arange(9.)[:, None].double() * 100.0 ** (-torch.arange(4).double() / 4))
    assert (rope(x, torch.arange(9), 100.0, interleaved=True) -
            torch.view_as_real(turned).flatten(-2)).abs().max() < 1e-5
    halves = x.view(2, 3, 9, 4, 2).transpose(-1, -2).flatten(-2)                # the same pairs, laid out in two halves
    ours = rope(halves, torch.arange(9), 100.0).view(2, 3, 9, 2, 4).transpose(-1, -2).flatten(-2)
    assert (ours - torch.view_as_real(turned).flatten(-2)).abs().max() < 1e-5
    q, k, shift = x[:, :, :1], x[:, :, 1:2], torch.tensor([[3], [11]])
    near = (rope(q, torch.tensor([2])) * rope(k, torch.tensor([7]))).sum(-1)
    far = (rope(q, 2 + shift) * rope(k, 7 + shift)).sum(-1)                     # (B, T) positions
    assert (near - far).abs().max() < 1e-5
    with pytest.raises(ValueError, match="even"):
        rope(x[..., :3], torch.arange(9))


def test_initial_weights_have_the_spread_of_the_handout():
    from model import Embedding, Linear
    weight = Linear(300, 500).weight
    assert weight.shape == (500, 300) and abs(weight.std() /
                                              (0.9866 * math.sqrt(2 / 800)) - 1) < 0.01  # cut at 3 sigma: 0.9866
    assert weight.abs().max() <= 3 * math.sqrt(2 / 800) and Embedding(500, 300).weight.abs().max() <= 3
    assert Linear(3, 4).bias is None and torch.equal(Linear(3, 4, bias=True).bias, torch.zeros(4))


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
        for step in range(8):
            part = model(torch.stack([tokens[b, n + step] for b, n in enumerate(lengths)])[:, None], cache=cache)
            assert max((part[b, 0] - full[b, n + step]).abs().max() for b, n in enumerate(lengths)) < 1e-10, step
        cache = model.new_cache(3)
        model(tokens[:, :10], cache=cache)
        model((tokens[:, 10:14] + 1) % 61, cache=cache)
        cache.set_lengths(10)                                      # a draft that was turned down
        assert (model(tokens[:, 10:], cache=cache) - full[:, 10:]).abs().max() < 1e-10


@pytest.mark.parametrize("switch", ["plain", "window", "mla"])
def test_layers_called_alone_count_their_own_positions(switch):
    """Attention and Block without a Transformer around them: config's window, and a cache for each to go on with."""
    model, x = toy(switch), torch.randn(2, 9, TOY["d_model"])
    for kind in (type(model.layers[0].attn), Block):
        layers = [kind(model.config, layer) for layer in range(model.config.n_layers)]
        assert [layer.window for layer in layers] == list(model.config.windows)
        whole, cache, parts = x, model.new_cache(2), []
        for layer in layers:
            whole = layer(whole)
        for part in x.split([4, 1, 4], dim=1):
            for layer in layers:
                part = layer(part, None, cache)
            parts.append(part)
        assert cache.length == 9 and torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_odd_inputs_of_the_model():
    norm = RMSNorm(8)
    norm(torch.randn(8, requires_grad=True)).sum().backward()
    assert norm.weight.grad.shape == (8,)
    model = toy().eval()
    assert model(ids(2, 0)).shape == (2, 0, TOY["vocab_size"]) and model(ids(0, 3)).shape == (0, 3, TOY["vocab_size"])
    assert not model_module.attention(*(torch.ones(2, n, 4) for n in (3, 0, 0))).any()
    with pytest.raises(IndexError):
        model(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="must be .B, T."):
        model(ids(5))
    assert torch.equal(model_module.token_losses(model, ids(9)), model_module.token_losses(model, ids(9).tolist()))


def test_sliding_windows_keep_bounded_memory_and_refuse_what_they_dropped():
    model = toy("all windows").eval()
    cache = model.new_cache(1, max_length=10_000)
    with torch.no_grad():
        for _ in range(40):
            model(ids(1, 3), cache=cache)
    assert cache.length == 120 and max(store.shape[2] for store in cache.k) <= 2 * 5 + 3
    cache.set_lengths(118)
    with pytest.raises(ValueError, match="dropped"):
        cache.set_lengths(60)
    with pytest.raises(ValueError, match="only be cut"):
        cache.set_lengths(119)
    with pytest.raises(ValueError, match="pass the context of 24"):
        model(ids(1, 25))
    latent = toy("mla").new_cache(1, 100)
    assert latent.n_bytes == 3 * 100 * (48 + 6) * 4  # c_kv of 4 x 12 and a rotary key of 6, whatever the heads


@pytest.mark.parametrize("backend, switch", [("naive", switch) for switch in SWITCHES]
                         + [("triton", switch) for switch in ("plain", "qwen3", "window", "mqa", "all windows")])
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


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradients_by_finite_differences(switch):
    """The derivative of the training loss along a random direction, in float64, at an odd shape."""
    model, tokens = toy(switch).double().train(), ids(2, 7)
    loss = model(tokens, ids(2, 7, seed=2))[1]
    loss.backward()
    parameters = list(model.parameters())
    assert all(p.grad is not None for p in parameters)
    direction = [
        torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(parameters)]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p += sign * 1e-6 * d
            values.append(model(tokens, ids(2, 7, seed=2))[1].item())
            for p, d in zip(parameters, direction):
                p -= sign * 1e-6 * d
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction)).item()
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if "moe" not in switch])
def test_compile_has_no_graph_break_and_the_same_loss(switch):
    torch._dynamo.reset()
    model, tokens = toy(switch), ids(2, 24)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, tokens)[1]
    loss.backward()
    grad = model.lm_head.weight.grad.clone()
    model.zero_grad()
    plain = model(tokens, tokens)[1]
    plain.backward()
    assert abs(loss -
               plain) < 1e-5 and (grad - model.lm_head.weight.grad).abs().max() < 1e-5  # float32, another order of sums


def test_layers_by_torch_modules():
    """Post-norm, LayerNorm, GELU, biases, learned and sinusoidal positions against torch.nn; soft-cap and relu2 by
    formula.
    """
    from model import Block, ModelConfig, relu2, sinusoids
    for position in ("pre", "post"):
        block = Block(ModelConfig(**TOY | SWITCHES["gpt2"] | dict(norm_position=position, position="none"))).double()
        theirs = torch.nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0,
                                                  activation=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
                                                  batch_first=True, norm_first=position == "pre").double()
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
        a, f = block.attn, block.ffn
        own = {"self_attn.in_proj_weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
               "self_attn.in_proj_bias": torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])}
        for their, our in {
                "self_attn.out_proj": a.o_proj, "linear1": f.w1, "linear2": f.w2, "norm1": block.ln1,
                "norm2": block.ln2}.items():
            own |= {f"{their}.weight": our.weight, f"{their}.bias": our.bias}
        theirs.load_state_dict(own)
        x = torch.randn(2, 9, 48, dtype=torch.float64)
        mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
        assert (block(x) - theirs(x, src_mask=mask)).abs().max() < 1e-6
    table = sinusoids(torch.arange(5), 6)                          # section 3.5, entry by entry
    assert all(abs(table[p, 2 * i + odd] - (math.cos if odd else math.sin)(p / 10_000 ** (2 * i / 6))) < 1e-6
               for p in range(5) for i in range(3) for odd in (0, 1))
    assert torch.equal(relu2(torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0]))
    capped, free = toy("softcap").eval(), toy().eval()
    assert (capped(ids(1, 5)) - 5 * torch.tanh(free(ids(1, 5)) / 5)).abs().max() < 1e-6
    learned = toy("gpt2").eval()
    moved = learned.position_embeddings.weight.detach().clone()
    first = learned(ids(1, 5))
    learned.position_embeddings.weight.data[3] += 1
    assert torch.equal(first[:, :3],
                       learned(ids(1, 5))[:, :3]) and not torch.equal(first[:, 3],
                                                                      learned(ids(1, 5))[:, 3]) and len(moved) == 24


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_mla_is_deepseeks(q_lora_rank):
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    config = transformers.DeepseekV3Config(vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
                                           num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora_rank,
                                           kv_lora_rank=28, qk_rope_head_dim=6, qk_nope_head_dim=12, v_head_dim=12,
                                           first_k_dense_replace=3, rms_norm_eps=1e-6, rope_interleave=True,
                                           max_position_embeddings=24, attn_implementation="eager")
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    ours = toy("mla", q_lora_rank=q_lora_rank, kv_lora_rank=28, rope_head_dim=6, rope_interleaved=True,
               norm_eps=1e-6).eval()
    names = {
        "embed_tokens": "token_embeddings", "norm": "ln_final", "lm_head": "lm_head", "input_layernorm": "ln1",
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


def test_experts_route_balance_and_report():
    """Mixtral's block and balancing loss by hand in a loop; DeepSeek's bias moves towards an equal load, outside the
    weights.
    """
    from model import MixtureOfExperts, ModelConfig, Plan, balance_loss
    config = ModelConfig(**TOY | SWITCHES["moe"])
    layer, x = MixtureOfExperts(config).double(), torch.randn(2, 9, 48, dtype=torch.float64)
    plan = Plan(config, x)
    y, scores = layer(x, plan).view(-1, 48), torch.softmax(x.view(-1, 48) @ layer.router.weight.T, dim=-1)
    for row, token, out in zip(scores, x.view(-1, 48), y):
        best = row.argsort(descending=True)[:2].tolist()
        assert (out - sum(row[e] / row[best].sum() * layer.experts[e](token) for e in best)).abs().max() < 1e-10
    chosen = scores.topk(2).indices
    assert torch.equal(layer.tokens_per_expert, torch.bincount(chosen.flatten(),
                                                               minlength=4)) and layer.tokens_per_expert.sum() == 36
    uniform = balance_loss(torch.full((8, 4), 0.25), torch.tensor([4, 4, 4, 4]))
    assert uniform == pytest.approx(2) and len(plan.balance) == 1 and plan.balance[0] > 2
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="a reference for tests only")
    theirs = mixtral.load_balancing_loss_func((x.view(-1, 48) @ layer.router.weight.T,), 4, 2)
    assert plan.balance[0].item() == pytest.approx(theirs.item(), rel=1e-6)


def test_expert_bias_and_parts_of_the_training_loss():
    model, tokens = toy("moe bias").train(), ids(4, 24)
    spread = []
    for _ in range(300):
        model(tokens)
        spread.append(model.tokens_per_expert().float().std(dim=1).mean().item())
        model.balance_experts()
    assert spread[-1] < 0.35 * spread[0] and model.tokens_per_expert().sum() == 0, spread[::50]
    for switch, extra in (("moe", {"balance": 0.01}), ("mtp", {"mtp": 0.5})):
        model = toy(switch).train()
        loss, parts = model(tokens, ids(4, 24, seed=3))[1].item(), model.losses
        weighted = parts["cross_entropy"] + sum(weight * parts[name] for name, weight in extra.items())
        assert loss == pytest.approx(weighted.item(), rel=1e-6) and parts.keys() == {"cross_entropy", *extra}
        assert model.eval()(tokens, ids(4, 24, seed=3))[1].item() == pytest.approx(parts["cross_entropy"].item(),
                                                                                   rel=1e-6)
        import copy
        copy.deepcopy(model)


def test_multi_token_prediction_by_hand_and_as_a_draft():
    from model import cross_entropy
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
        assert torch.allclose(p.grad, q.grad, atol=1e-6), f"{name}: {(p.grad - q.grad).abs().max()}"
    assert torch.equal(fused.eval()(tokens, targets)[0], plain.eval()(tokens))
    with pytest.raises(ValueError, match="fsdp and tp divide"):
        parallel.Strategy("fsdp").divide(fused)


@pytest.mark.parametrize("settings, words",
                         [(dict(norm="batch"), "norm='batch'"), (dict(n_kv_heads=3), "n_kv_heads=3"),
                          (dict(d_model=50), "d_model=50"), (dict(head_dim=7), "7 must be even"),
                          (dict(window_pattern="SX", sliding_window=3), "SX"),
                          (dict(window_pattern="SL"), "needs sliding_window"),
                          (dict(attention="mla", qk_norm=True), "qk_norm"),
                          (dict(attention="mla", attention_backend="triton"), "triton has no attention=mla"),
                          (dict(n_shared_experts=1), "need n_experts"),
                          (dict(n_experts=2, n_experts_per_token=3), "n_experts=2"),
                          (dict(logit_softcap=-1.0), "logit_softcap=-1.0"),
                          (dict(fused_loss=True, logit_softcap=1.0), "never has the logits"),
                          (dict(rope_factor=0.5), "rope_factor=0.5"),
                          (dict(kv_lora_rank=8), "attention=mla"), (dict(n_layers=0), "n_layers=0"),
                          (dict(rope_factor=2.0, rope_low_freq=5.0), "rope_low_freq=5.0"),
                          (dict(mtp_depth=24), "mtp_depth=24"), (dict(n_heads=2.0), "n_heads=2.0")])
def test_shapes_that_cannot_be_are_refused(settings, words):
    from model import ModelConfig
    with pytest.raises(ValueError, match=words):
        ModelConfig(**TOY | settings)


def test_configs_survive_a_round_trip_and_presets_have_their_published_sizes():
    from dataclasses import asdict
    from accounting import PRESETS, preset
    from model import ModelConfig
    for config in [preset(name) for name in PRESETS] + [ModelConfig(**TOY | more) for more in SWITCHES.values()]:
        assert ModelConfig(**asdict(config)) == config
    import accounting
    published = {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
        "llama-2-7b": 6_738_415_616, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
        "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360}
    for name, n in published.items():
        assert accounting.count_params(preset(name))["total"] == n, name
    with pytest.raises(ValueError, match="no preset 'gpt3'"):
        preset("gpt3")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_short_attention_is_causal_attention(dtype, tolerance):
    import model
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 19, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2))
    full = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = model.attention(full[0], *(t.repeat_interleave(3, dim=1) for t in full[1:]),
                               torch.ones(19, 19, dtype=torch.bool).tril())
    ours = model.short_attention(q, k, v)
    weight = torch.randn(ours.shape, generator=generator)
    (ours.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()
    for mine, theirs in zip((q, k, v), full):                      # bfloat16 also rounds the scores, to three digits
        assert (mine.grad.double() - theirs.grad).abs().max() < tolerance * theirs.grad.abs().max()
