"""Claims about sample.py."""
import functools

import pytest
import torch

from common import ids, random_model, rng, steps, toy# noqa: F401
import bpe
import checkpoint
import machine
import model as model_module
import sample

@pytest.mark.parametrize(
    "settings",
    [dict(temperature=0),
     dict(), dict(temperature=0.7, top_k=5),
     dict(top_p=0.8),
     dict(top_k=20, top_p=0.5)])
def test_the_cache_changes_no_token_not_even_past_the_context(settings):
    model = random_model()
    for prompt in ([3], list(range(10)), list(range(40))):                # the last is longer than the context of 16
        with_cache, without = (sample.generate(model, prompt, 40, cache=cache, generator=rng(), **settings)
                               for cache in (True, False))
        assert with_cache == without and len(with_cache) == 40


def test_greedy_is_the_argmax_of_the_full_forward():
    model, ids = random_model(), [1, 2, 3]
    for token in sample.generate(model, ids, 10, temperature=0):
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = ids + [token]
    assert sample.generate(model, [1, 2, 3], 10, top_k=1) == sample.generate(model, [1, 2, 3], 10,
                                                                             temperature=0) == ids[3:]


def test_a_ragged_batch_writes_what_each_prompt_writes_alone():
    model, prompts = random_model(), [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14))]
    alone = [sample.generate(model, prompt, 20, temperature=0) for prompt in prompts]
    assert sample.generate(model, prompts, 20, temperature=0) == alone
    stop = alone[1][4]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    assert sample.generate(model, prompts, 20, temperature=0, stop_ids=(stop,)) == cut != alone


@pytest.mark.skipif(not machine.ONEDNN, reason="this torch has no oneDNN product for this processor")
def test_weights_in_blocks_give_the_same_logits_and_texts_and_are_gone_afterwards():
    model = random_model(d_model=64, n_heads=4, context_length=64)
    prompts = [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14)), [9] * 3]
    kept = [hasattr(p, "blocks") for p in model.parameters()]
    for rows in (1, 3, 16, 50):
        tokens = torch.randint(model.config.vocab_size, (rows, 4), generator=rng())
        with torch.no_grad():
            plain = model(tokens)
            with machine.in_blocks(model, 16):
                assert all(hasattr(m.weight, "blocks") for m in model.modules() if isinstance(m, model_module.Linear))
                torch.testing.assert_close(model(tokens), plain, atol=1e-5, rtol=1e-5)
                assert model.lm_head.weight.blocks.is_mkldnn, "the blocks are oneDNN's"
    alone = [sample.generate(model, prompt, 40, temperature=0) for prompt in prompts]
    assert sample.generate(model, prompts, 40, temperature=0) == alone
    steps = sample.stream(model, prompts, 40)
    next(steps), next(steps)
    assert hasattr(model.lm_head.weight, "blocks")
    steps.close()                                                # as an abandoned loop does
    assert [hasattr(p, "blocks") for p in model.parameters()] == kept == [False] * len(kept)


def test_a_cache_takes_ids_of_any_integer_and_knows_what_a_token_reads():
    model, tokens = toy("smear window").eval(), ids(2, 10)
    cache = model.new_cache(2, 12)
    torch.testing.assert_close(model(tokens.int(), cache=cache), model(tokens))
    width = model.config.n_kv_heads * model.config.head_dim * 4
    assert cache.bytes_read == 2 * 2 * sum(4 if window else 10 for window in model.config.windows) * width
    assert cache.n_bytes > cache.bytes_read and model.new_cache(2, 12, draft=True).ids is None


def test_a_gate_in_float32_leaves_the_stream_in_bfloat16():
    """As under FSDP with compute_dtype=bfloat16, which casts matrices and leaves vectors."""
    model, seen = toy("smear").to(torch.bfloat16), []
    model.smear_gate = torch.nn.Parameter(model.smear_gate.detach().float())
    model.layers[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    model(ids(2, 5))
    assert seen == [torch.bfloat16]


def test_samples_of_one_prompt_share_its_prefill():
    model = random_model()
    rows = list(zip(*sample.stream(model, [[1, 2, 3]], 12, generator=rng(), n_each=3)))
    repeated = sample.generate(model, [[1, 2, 3]] * 3, 12, generator=rng())
    assert [list(row) for row in rows] == repeated


def test_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(sample.distribution(logits), torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close(sample.distribution(logits, top_k=2), torch.tensor([[0.625, 0.375, 0, 0]]))
    close(sample.distribution(logits, top_p=0.79), torch.tensor([[0.625, 0.375, 0, 0]]))      # 0.5 < 0.79 <= 0.8
    close(sample.distribution(logits, top_p=0.8), torch.tensor([[0.625, 0.375, 0, 0]]))       # reached exactly
    close(sample.distribution(torch.zeros(1, 3), top_k=1), torch.tensor([[1.0, 0, 0]]))       # a tie: one, as greedy
    close(sample.distribution(logits, top_p=0.81), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    close(sample.distribution(logits, top_p=1e-9), torch.tensor([[1.0, 0, 0, 0]]))
    close(sample.distribution(logits, temperature=0.5), torch.tensor([[0.25, 0.09, 0.0225, 0.0025]]) / 0.365)
    close(sample.distribution(logits, top_k=3, top_p=0.6), torch.tensor([[0.625, 0.375, 0, 0]]))


def test_samples_follow_the_distribution():
    model = random_model(vocab_size=8)
    expected = sample.distribution(model(torch.tensor([[1, 2]]))[:, -1], 0.9, top_p=0.9)[0]
    drawn = sample.generate(model, [[1, 2]] * 8000, 1, temperature=0.9, top_p=0.9, generator=rng())
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - 8000 * expected)[kept] ** 2 / (8000 * expected[kept])).sum().item()
    assert chi_square < 24.3, chi_square                                  # 99.9 % quantile with 7 degrees of freedom


def test_padded_vocabulary_rows_are_never_sampled():
    assert max(sample.generate(random_model(), [1], 200, temperature=5.0, vocab_limit=3, generator=rng())) == 2


@pytest.mark.parametrize("prompt, more, words", [([], {}, "empty"), ([99], {}, "outside 0 … 49"),
                                                 ([1], dict(temperature=-1), "temperature=-1"),
                                                 ([1], dict(top_k=0), "top_k=0"), ([1], dict(top_p=0.0), "top_p=0.0")])
def test_bad_sampling_is_refused_before_anything_is_computed(prompt, more, words):
    with pytest.raises(ValueError, match=words):
        sample.generate(random_model(), prompt, 5, **more)


def test_min_p_and_repetition_penalty_by_hand():
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    close(sample.distribution(logits, min_p=0.2), torch.tensor([[0.5, 0.3, 0.15, 0]]) / 0.95)
    close(sample.distribution(logits, temperature=0), torch.tensor([[1.0, 0, 0, 0]]))
    how, logits = sample.Sampling(repetition_penalty=2.0, vocab_limit=3), torch.tensor([[3.0, -1.0, 2.0, 9.0]])
    close(how.scores(logits, [[0, 1, 0]]), torch.tensor([[1.5, -2.0, 2.0]]))
    assert logits[0, 0] == 3 and sample.Sampling(0, repetition_penalty=2.0).draw(logits, [[3]], None) == [3]
    first, second = sample.generate(random_model(), [1, 2], 2, temperature=0)
    assert sample.generate(random_model(), [1, 2], 8, temperature=0, repetition_penalty=1e9)[0] == first
    assert len(set(sample.generate(random_model(), [1, 2], 40, temperature=0, repetition_penalty=1e9))) == 40


def test_text_streams_whole_characters_and_no_stop_string():
    tokenizer = bpe.Tokenizer({i: bytes([i]) for i in range(256)}, [])
    for text, stops, expected in (("aé€😀b", (), "aé€😀b"), ("one STOP two", ("STOP",), "one "), ("ST", ("STOP",), "ST"),
                                  ("aSTSTOP", ("STOP", "x"), "aST"), ("ab, abc", ("abc", "b,"), "a")):
        row, seen = sample.Text(tokenizer, stops), []
        for token in text.encode("utf-8"):
            row.feed(token)
            seen.append(row.text)
            assert expected.startswith(row.text) and "\ufffd" not in row.text, (text, row.text)
        row.feed(None)
        assert row.text == expected and row.ended == (expected != text) and seen == sorted(seen, key=len)
    broken = sample.Text(tokenizer)
    broken.feed("é".encode("utf-8")[0])
    assert broken.text == "" and not broken.feed(None) and broken.text == "\ufffd"
    model, how = random_model(vocab_size=128), dict(temperature=0, tokenizer=tokenizer)       # ids that are ASCII
    alone = [sample.generate(model, [token], 30, **how) for token in (65, 66)]
    stop = tokenizer.decode(alone[0][10:13])
    expected = [ids[:tokenizer.decode(ids).find(stop) + 3] if stop in tokenizer.decode(ids) else ids for ids in alone]
    assert sample.generate(model, [[65], [66]], 30, stop_strings=(stop,), **how) == expected != alone
    with pytest.raises(ValueError, match="need a tokenizer"):
        sample.generate(model, [65], 3, stop_strings=("x",))


SMALL = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1)


TARGETS = {"plain": {}, "windows": dict(sliding_window=3, window_pattern="SSL", n_layers=3), "mtp": dict(mtp_depth=1),
           "mla": dict(attention="mla", n_kv_heads=4), "learned": dict(position="learned", bias=True)}


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=0, repetition_penalty=1.5)])
@pytest.mark.parametrize("switch", TARGETS)
def test_speculation_is_greedy_decoding_in_fewer_passes(switch, settings):
    target = random_model(**TARGETS[switch])
    drafts = [random_model(**SMALL), random_model(**SMALL | dict(context_length=7, sliding_window=2)), target, "ngram"]
    figures = sample.speculative_generate(target, target, [1], 15, k=4, **settings)[1]
    assert figures["acceptance_rate"] == 1 and figures["tokens_per_target_call"] == 14 / 3, figures
    for draft in drafts + ["mtp", None] * (switch == "mtp"):
        for prompt, n, k in (([3], 40, 4), (list(range(10)), 3, 8), (list(range(40)), 20, 2), ([1, 2] * 6, 9, 30)):
            expected = sample.generate(target, prompt, n, **settings)   # past the context of 16, k past what is left
            ids, figures = sample.speculative_generate(target, draft, prompt, n, k=k, **settings)
            assert ids == expected, (draft, prompt, k)
            assert figures["new_tokens"] == n and figures["target_calls"] <= n
            stop = expected[len(expected) // 2]
            assert sample.speculative_generate(target, draft, prompt, n, k=k, stop_ids=(stop,), **settings)[0] == \
                expected[:expected.index(stop) + 1]


@pytest.mark.parametrize("draft", ["model", "windowed", "mtp", "ngram"])
def test_speculation_has_exactly_the_targets_distribution(draft):
    # A window of 1 lets a position see itself alone: the text is a Markov chain, its transition table is exact.
    target = random_model(vocab_size=5, sliding_window=1, context_length=64, mtp_depth=1, d_model=16, n_layers=1)
    how, states = dict(temperature=1.2, top_p=0.9), torch.arange(5)
    drafts = {"model": random_model(vocab_size=5, **SMALL), "windowed": random_model(
        vocab_size=5, **SMALL | dict(context_length=40, sliding_window=3))}
    with torch.no_grad():
        table = sample.distribution(target(states[:, None])[:, -1], **how)
    ids, figures = sample.speculative_generate(target, drafts.get(draft, draft), [0], 2500, k=3, generator=rng(), **how)
    counts = torch.zeros(5, 5).index_put_((torch.tensor([0] + ids[:-1]), torch.tensor(ids)), torch.tensor(1.0), True)
    expected = table * counts.sum(dim=1, keepdim=True)
    assert (counts[table == 0] == 0).all() and 0.05 < figures["acceptance_rate"] < 0.98, figures
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 48, (chi_square, kept.sum())          # 99.95 % quantile with at most 20 degrees of freedom


@pytest.mark.parametrize("draft, more, words", [("model", {}, "vocabulary of 49"), ("mtp", {}, "mtp_depth=0"),
                                                ("lookup", {}, "ngram"), ("ngram", dict(k=0), "k=0"),
                                                ("ngram", dict(min_p=2.0), "min_p=2.0"),
                                                ("ngram", dict(repetition_penalty=0.0), "repetition_penalty=0.0")])
def test_speculation_that_cannot_be_is_refused(draft, more, words):
    with pytest.raises(ValueError, match=words):
        sample.speculative_generate(random_model(), random_model(vocab_size=49) if draft == "model" else draft, [1], 5,
                                    **more)


@pytest.mark.parametrize("shape", [(512,), (1, 512), (1, 1, 512), (3, 5, 512), (0, 512)])
def test_inference_has_its_own_product_equal_to_the_plain_one(shape):
    weight, x = torch.randn(600, 512, generator=rng()), torch.randn(shape, generator=rng(1))
    with torch.no_grad():
        difference = machine.product(x, weight) - x @ weight.T
        assert difference.shape == (*shape[:-1], 600) and (difference.abs() < 1e-4).all(), difference.abs().max()
    x.requires_grad_()
    assert torch.equal(machine.product(x, weight), x @ weight.T)              # one that has a gradient


@pytest.mark.parametrize("kind, error", [("int8", 0.012), ("int4", 0.15)])
def test_quantised_layers_by_their_kernels_and_without(kind, error, monkeypatch):
    for d_in, bias in ((128, True), (48, False)):                        # 48 is no multiple of a group: int8 by rows
        linear = model_module.Linear(d_in, 70, bias)
        x, torch_s = torch.randn(2, 3, d_in, generator=rng()), sample.QuantizedLinear(linear, kind)
        monkeypatch.setattr(sample, "fast_int4", lambda x: False)
        ours = sample.QuantizedLinear(linear, kind)
        with torch.no_grad():
            by_kernel = torch_s(x)
            monkeypatch.setattr(sample, "fast_int8", lambda x: False)
            exact, plain = linear(x), ours(x)
        monkeypatch.undo()
        size = exact.abs().max()
        assert (by_kernel - plain).abs().max() < 0.01 * size                       # bfloat16 keeps 8 bits
        assert (plain - exact).abs().max() < error * size, (plain - exact).abs().max() / size
        if ours.kind == "int4":
            step = ours.scale[..., 0].float().amax()
            assert (ours.weight() - linear.weight).abs().max() <= 0.6 * step and ours.q.numel() == 128 * 64


@pytest.mark.parametrize("switch", ["plain", "tied", "moe", "mla", "gpt2"])
def test_a_quantised_model_still_writes(switch):
    plain, small = toy(switch, d_model=64).eval(), sample.quantize(toy(switch, d_model=64).eval(), "int8")
    text = ids(2, 12)
    assert (small(text) - plain(text)).abs().max() < 0.1 * plain(text).abs().max()
    assert sample.weight_bytes(small) < 0.45 * sample.weight_bytes(plain)
    assert len(sample.generate(small, [1, 2], 8, temperature=0)) == 8 and "int4" in str(
        {module.kind for module in sample.quantize(plain, "int4").modules() if hasattr(module, "kind")})
    with pytest.raises(ValueError, match="quantize='int2'"):
        sample.quantize(plain, "int2")


def test_the_own_heads_drafts_are_those_of_a_full_pass():
    model = random_model(mtp_depth=1, context_length=64)
    window, text = sample.Window(model, 64), [1, 2, 3, 4]
    drafter, rejected = sample.HeadDraft(window), []
    for token in (9, 10, 11):                              # the cache of the head goes on over rejected drafts
        window.fit(text)
        window.read(text, rejected)
        text.append(token)
        rejected, q = drafter.propose(text, 2, sample.Sampling(), rng())
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([text[:-1]]))
            expected = torch.softmax(model.draft(hidden, torch.tensor([text[1:]]))[0, -1], dim=-1)
        torch.testing.assert_close(q[0], expected)


def test_sample_commands(tmp_path, capsys, monkeypatch):
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    added = {256 + i: name.encode() for i, name in enumerate(specials)}
    tokenizer = bpe.Tokenizer({i: bytes([i]) for i in range(256)} | added,
                              [], specials)
    for name, width in (("big", 64), ("small", 32)):
        model = random_model(vocab_size=264, context_length=64, d_model=width)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name / "tokenizer.json")
        checkpoint.save_checkpoint(model, None, 0, tmp_path / name / "ckpt.pt")
    monkeypatch.setattr(sample, "bandwidth", lambda device: 3e10)
    typed = iter(["hi <|end|>", "you", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))

    def run(*arguments):
        sample.main([*arguments[:-1], str(tmp_path / arguments[-1])])
        return capsys.readouterr().out
    plain = run("--prompt=ab", "--temperature=0", "--max_new_tokens=12", "big")
    assert plain.startswith("ab") and "GB/s" in plain
    for more in (f"--draft={tmp_path / 'small'}", "--draft=ngram"):
        drafted = run("--prompt=ab", "--temperature=0", "--max_new_tokens=12", more, "big")
        assert drafted.split("---")[0] == plain.split("---")[0] and "of drafts accepted" in drafted
    assert run("--max_new_tokens=3", "--num_samples=2", "--quantize=int4", "big").count("--- sample") == 2
    assert run("--chat=true", "--max_new_tokens=3", "big").count("prefill") == 2
    assert sample.chat_ids(tokenizer, ["a<|end|>", "b", "c"]) == (
        [257, 97, *b"<|end|>", 259, 258, 98, 259, 257, 99, 259, 258], 259)
    told = run("explain", "--prompt=<b>", "--max_new_tokens=2", "big")
    page = (tmp_path / "big" / "explain.html").read_text(encoding="utf-8")
    assert page.count("<tr ") == 5 and "<b>&lt;</b>" in page and told.count("likeliest") == 5
    assert told.count("rank 1,") >= 2, "what the model went on with is the likeliest"
    table = run("bench", "--contexts=8", "--batches=2", "--new_tokens=4", "--rounds=1",
                f"--out={tmp_path / 'bench'}", "big")
    assert "n-grams" in table and "the same tokens" in table and "OTHER" not in table
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert (tmp_path / "bench.txt").read_text(encoding="utf-8") in table
    for bad, words in ((["--quantize=int2"], "int2"), (["--draft=ngram", "--cache=false"], "cache=true"),
                       (["--draft=mtp", "--prompt=the king"], "mtp_depth=0")):
        with pytest.raises(SystemExit):
            run(*bad, "big")
        said = capsys.readouterr()
        assert words in said.err and "the king" not in said.out
