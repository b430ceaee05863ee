"""Claims about decoding.py."""
import numpy as np
import pytest
import torch
import torch.utils._python_dispatch

from common import byte_tokenizer, random_model, rng
import decoding
import onetoken


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(), dict(temperature=0.7, top_k=5),
                                      dict(top_k=20, top_p=0.5), dict(min_p=0.1)])
def test_neither_the_cache_nor_c_changes_a_token_not_even_past_the_context(settings, monkeypatch):
    model = random_model(smear=True, shift_keys=True, qk_norm=True, sliding_window=6, window_pattern="SL", ffn="relu2")
    prompts = [[3], list(range(10)), list(range(40))]                     # the last is longer than the context of 16

    def write(cache):
        return decoding.generate(model, prompts, 40, cache=cache, generator=rng(), **settings)
    with_cache = write(True)
    assert with_cache == write(False) and [len(row) for row in with_cache] == [40] * 3
    monkeypatch.setattr(onetoken, "library", lambda: None)
    assert write(True) == with_cache


def test_generate_is_the_simple_loop_and_greedy_its_argmax():
    model = random_model(context_length=64)
    for temperature in (1.0, 0.5):
        expected = decoding.simple_generate(model, [1, 2, 3], 20, temperature, rng())
        assert decoding.generate(model, [1, 2, 3], 20, temperature=temperature, generator=rng()) == expected
    greedy, text = decoding.generate(model, [1, 2, 3], 10, temperature=0), [1, 2, 3]
    for token in greedy:
        assert token == model(torch.tensor([text]))[0, -1].argmax().item()
        text = text + [token]
    for same in (dict(top_k=1), dict(temperature=1e-40), dict(temperature=1e-40, top_p=0.9)):
        assert decoding.generate(model, [1, 2, 3], 10, **same) == greedy


def test_a_batch_of_any_kind_writes_what_each_prompt_writes_alone():
    model, prompts, greedy = random_model(), [[5], [1, 2, 3, 4, 5, 6], [7, 8], list(range(14))], dict(temperature=0)
    alone = [decoding.generate(model, prompt, 20, **greedy) for prompt in prompts]
    for kind in (np.array, torch.tensor, tuple, lambda row: [torch.tensor(i) for i in row]):
        assert decoding.generate(model, [kind(row) for row in prompts], 20, **greedy) == alone
        assert decoding.generate(model, kind(prompts[1]), 20, **greedy) == alone[1]
        assert decoding.speculative_generate(model, "ngram", kind(prompts[1]), 20, **greedy)[0] == alone[1]
    for kind in (np.array, torch.tensor):
        assert decoding.generate(model, kind([prompts[1]] * 2), 20, **greedy) == [alone[1]] * 2
    stop = alone[1][4]
    cut = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    assert decoding.generate(model, prompts, 20, stop_ids=(stop,), **greedy) == cut != alone
    rows = zip(*decoding.stream(model, prompts[1:2], 12, generator=rng(), n_each=3))         # one prefill for all
    assert list(map(list, rows)) == decoding.generate(model, prompts[1:2] * 3, 12, generator=rng())


def test_weights_changed_under_an_open_stream_count_at_once():
    model, text = random_model(d_model=64), torch.tensor([[1, 2, 3]])
    steps = decoding.stream(model, [[1]] * 16, 40)
    next(steps), next(steps)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        held = model(text)
        steps.close()
        assert torch.equal(held, model(text))


@pytest.mark.parametrize("how, expected", [
    (dict(), [0.5, 0.3, 0.15, 0.05]), (dict(top_k=2), [0.625, 0.375, 0, 0]),
    (dict(top_p=0.79), [0.625, 0.375, 0, 0]), (dict(top_p=0.8), [0.625, 0.375, 0, 0]),       # reached exactly
    (dict(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]), (dict(top_p=1e-9), [1, 0, 0, 0]),
    (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    (dict(temperature=1e-50), [1, 0, 0, 0]), (dict(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
    (dict(min_p=0.2), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])])
def test_distribution_by_hand(how, expected):
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert decoding.distribution(logits, **how)[0].tolist() == pytest.approx(expected, abs=1e-6)
    equal = torch.zeros(1, 4)
    assert decoding.distribution(equal, top_k=1).tolist() == [[1, 0, 0, 0]]        # of equal ones the first, as greedy
    assert decoding.distribution(equal, min_p=1.0).tolist() == [[0.25] * 4]        # just that share stays


def test_top_p_needs_no_float64_which_mps_does_not_have():
    class NoDouble(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            out = function(*arguments, **(more or {}))
            assert not torch.is_tensor(out) or out.dtype != torch.float64, function
            return out
    logits = torch.randn(3, 50_000, generator=rng())
    with NoDouble():
        kept = decoding.distribution(logits, top_p=0.9) > 0
    ordered = torch.softmax(logits.double(), -1).sort(descending=True).values
    exact = (ordered.cumsum(-1) - ordered < 0.9).sum(-1)                  # the reference, in float64
    assert (kept.sum(-1) - exact).abs().max() <= 1


def test_padded_vocabulary_rows_are_never_sampled():
    """Not by a limit, nor past a given tokenizer's ids, which no stop string could be read from."""
    model, tokenizer = random_model(vocab_size=320), byte_tokenizer([])
    for how in (dict(vocab_limit=3), dict(tokenizer=tokenizer), dict(tokenizer=tokenizer, stop_strings=("zzz",))):
        drawn = decoding.generate(model, [1], 200, temperature=9.0, generator=rng(), **how)
        assert max(drawn) < how.get("vocab_limit", 256) and len(drawn) == 200
    assert max(decoding.speculative_generate(model, "ngram", [1], 200, temperature=9.0, vocab_limit=3)[0]) == 2


@pytest.mark.parametrize("words, prompt, more", [
    ("empty", [], {}), ("outside 0 … 49", [99], {}), ("temperature=-1", [1], dict(temperature=-1)),
    ("min_p=2.0", [1], dict(min_p=2.0)), ("top_k=0", [1], dict(top_k=0)), ("top_p=0.0", [1], dict(top_p=0.0)),
    ("vocabulary of 49", [1], dict(draft=random_model(vocab_size=49))), ("mtp_depth=0", [1], dict(draft="mtp")),
    ("ngram", [1], dict(draft="lookup")), ("k=0", [1], dict(draft="ngram", k=0))])
def test_what_cannot_be_is_refused_before_anything_is_computed(words, prompt, more):
    if "draft" not in more:
        with pytest.raises(ValueError, match=words):
            decoding.generate(random_model(), prompt, 5, **more)
    with pytest.raises(ValueError, match=words):
        more = {"draft": "ngram"} | more
        decoding.speculative_generate(random_model(), prompt_ids=prompt, max_new_tokens=5, **more)


@pytest.mark.parametrize("temperature", [0, 1e-40, 1.0])
def test_a_model_of_nan_writes_nothing(temperature):
    model = random_model()
    torch.nn.init.constant_(model.ln_final.weight, torch.nan)
    with pytest.raises(ValueError, match="the model gives NaN"):
        decoding.generate(model, [1], 5, temperature=temperature)
    with pytest.raises(ValueError, match="the model gives NaN"):
        decoding.speculative_generate(model, "ngram", [1, 2, 1], 5, temperature=temperature)


def test_text_streams_whole_characters_and_no_stop_string():
    tokenizer = byte_tokenizer([])
    for text, stops, expected in (("aé€😀b", (), "aé€😀b"), ("one STOP two", ("STOP",), "one "), ("ST", ("STOP",), "ST"),
                                  ("aSTSTOP", ("STOP", "x"), "aST"), ("ab, abc", ("abc", "b,"), "a")):
        row, seen = decoding.Text(tokenizer, stops), []
        for token in text.encode("utf-8"):
            row.feed(token)
            seen.append(row.text)
            assert expected.startswith(row.text) and "\ufffd" not in row.text, (text, row.text)
        row.feed(None)
        assert row.text == expected and row.ended == (expected != text) and seen == sorted(seen, key=len)
    broken = decoding.Text(tokenizer)
    broken.feed("é".encode("utf-8")[0])
    assert broken.text == "" and not broken.feed(None) and broken.text == "\ufffd"
    model, how = random_model(vocab_size=128), dict(temperature=0, tokenizer=tokenizer)       # ids that are ASCII
    alone = [decoding.generate(model, [token], 30, **how) for token in (65, 66)]
    stop = tokenizer.decode(alone[0][10:13])
    expected = [ids[:tokenizer.decode(ids).find(stop) + 3] if stop in tokenizer.decode(ids) else ids for ids in alone]
    assert decoding.generate(model, [[65], [66]], 30, stop_strings=(stop,), **how) == expected != alone
    with pytest.raises(ValueError, match="need a tokenizer"):
        decoding.generate(model, [65], 3, stop_strings=("x",))


SMALL = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1)
TARGETS = {"plain": {}, "windows": dict(sliding_window=3, window_pattern="SSL", n_layers=3), "mtp": dict(mtp_depth=1),
           "mla": dict(attention="mla", n_kv_heads=4), "learned": dict(position="learned", bias=True)}


@pytest.mark.parametrize("switch", TARGETS)
def test_speculation_is_greedy_decoding_in_fewer_passes(switch):
    target, how = random_model(**TARGETS[switch]), dict(temperature=0)
    drafts = [random_model(**SMALL), random_model(**SMALL | dict(context_length=7, sliding_window=2)), target, "ngram"]
    figures = decoding.speculative_generate(target, target, [1], 15, k=4, **how)[1]
    assert figures["acceptance_rate"] == 1 and figures["tokens_per_target_call"] == 14 / 3, figures
    for draft in drafts + ["mtp", None] * (switch == "mtp"):
        for prompt, n, k in (([3], 40, 4), (list(range(10)), 3, 8), (list(range(40)), 20, 2), ([1, 2] * 6, 9, 30)):
            expected = decoding.generate(target, prompt, n, **how)        # past the context of 16, k past what is left
            ids, figures = decoding.speculative_generate(target, draft, prompt, n, k=k, **how)
            assert ids == expected, (draft, prompt, k)
            assert figures["new_tokens"] == n and figures["target_calls"] <= n
            stop = expected[len(expected) // 2]
            assert decoding.speculative_generate(target, draft, prompt, n, k=k, stop_ids=(stop,), **how)[0] == \
                expected[:expected.index(stop) + 1]


@pytest.mark.parametrize("draft", ["model", "windowed", "mtp", "ngram"])
def test_speculation_has_exactly_the_targets_distribution(draft):
    # A window of 1 lets a position see itself alone: the text is a Markov chain, its transition table is exact.
    target = random_model(vocab_size=5, sliding_window=1, context_length=64, mtp_depth=1, d_model=16, n_layers=1)
    how, states = dict(temperature=1.2, top_p=0.9), torch.arange(5)
    drafts = {"model": random_model(vocab_size=5, **SMALL), "windowed": random_model(
        vocab_size=5, **SMALL | dict(context_length=40, sliding_window=3))}
    with torch.no_grad():
        table = decoding.distribution(target(states[:, None])[:, -1], **how)
    draft = drafts.get(draft, draft)
    ids, figures = decoding.speculative_generate(target, draft, [0], 2500, k=3, generator=rng(), **how)
    counts = torch.zeros(5, 5).index_put_((torch.tensor([0] + ids[:-1]), torch.tensor(ids)), torch.tensor(1.0), True)
    expected = table * counts.sum(dim=1, keepdim=True)
    assert (counts[table == 0] == 0).all() and 0.05 < figures["acceptance_rate"] < 0.98, figures
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 48, (chi_square, kept.sum())          # 99.95 % quantile with at most 20 degrees of freedom


def test_the_worked_example_of_the_rule():
    """p = .6 .3 .1 and q = .3 .6 .1: seven drafts of ten stand, and what comes out is p."""
    p, q, generator, n = torch.tensor([[0.6, 0.3, 0.1]] * 2), torch.tensor([[0.3, 0.6, 0.1]]), rng(), 20_000
    counts, stood = torch.zeros(3), 0
    for draft in torch.multinomial(q[0], n, replacement=True, generator=generator).tolist():
        accepted, token = decoding.accept(p, q, [draft], generator)
        stood += accepted
        counts[draft if accepted else token] += 1
    assert abs(stood / n - 0.7) < 0.013                                   # four standard errors
    assert ((counts / n - p[0]).abs() < 0.014).all(), counts / n


def test_the_own_heads_drafts_are_those_of_a_full_pass():
    """A head that draws from the distributions of a full pass: the same drafts, so the same rate with its own seed."""
    model = random_model(mtp_depth=1, context_length=64)
    reader, text = decoding.Reader(model, 64), [1, 2, 3, 4]
    drafter, rejected = decoding.HeadDraft(reader, 64), []
    for token in (9, 10, 11):                              # the cache of the head goes on over rejected drafts
        reader.read(text, rejected)
        text.append(token)
        rejected, q = drafter.propose(text, 2, {}, rng())
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([text[:-1]]))
            expected = torch.softmax(model.draft(hidden, torch.tensor([text[1:]]))[0, -1], dim=-1)
        torch.testing.assert_close(q[0], expected)
