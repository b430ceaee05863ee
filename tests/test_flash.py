"""Claims about flash.py."""
import itertools
import math

import pytest
import torch

from common import sdpa
from test_kernels import assert_like_float64

CASES = [                          # Tq, Tk, D, query heads a key head, causal
    (1, 1, 16, 1, True), (1, 130, 80, 4, True), (7, 65, 16, 4, False), (17, 7, 32, 2, True), (64, 64, 16, 2, True),
    (65, 65, 32, 1, True), (65, 64, 64, 4, True), (65, 130, 80, 2, False), (127, 130, 32, 4, True),
    (130, 7, 16, 4, True), (17, 40, 128, 2, True), (33, 18, 256, 1, False)]
HALF = (65, 130, 80, 2, False)
BOTH = ("FlashAttentionTriton", "FlashAttentionPyTorch")


@pytest.fixture
def flash(kernels):
    import flash
    return flash


def inputs(Tq, Tk, D, group, dtype=torch.float32):
    torch.manual_seed(Tq * 1000 + Tk)
    return [torch.randn(shape).to(dtype) for shape in ((1, 2 * group, Tq, D), (1, 2, Tk, D), (1, 2, Tk, D))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_gradients_equal_float64(flash, case, monkeypatch):
    """Tiles by descriptor, as TMA takes them, and by address; the case of 130 tokens also in half precision."""
    *shape, is_causal = case
    dtypes = [torch.float32, *[torch.float16, torch.bfloat16] * (case == HALF)]
    for (name, tma), dtype in itertools.product([*itertools.product(BOTH, [False]), (BOTH[0], True)], dtypes):
        monkeypatch.setattr(flash, "uses_tma", lambda x: tma)
        assert_like_float64(lambda q, k, v: getattr(flash, name).apply(q, k, v, is_causal),
                            lambda q, k, v: sdpa(q, k, v, is_causal, None), *inputs(*shape, dtype))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_untiled_backward_equals_autograd(flash, is_causal):
    q, k, v, do = (torch.randn(3, 17, 8, dtype=torch.float64).requires_grad_() for _ in range(4))
    o = sdpa(q[None], k[None], v[None], is_causal, None)[0]
    o_ref, lse, *gradients = flash.attention_reference(q, k, v, do, is_causal)
    torch.testing.assert_close(o_ref, o)
    torch.testing.assert_close(lse, flash.scores_of(q, k, is_causal).logsumexp(-1))
    torch.testing.assert_close(tuple(gradients), torch.autograd.grad(o, (q, k, v), do))


def test_leading_dimensions_and_strides(flash):
    attend = flash.FlashAttentionTriton.apply
    q, k, v = inputs(17, 17, 16, 2)
    expected = attend(q, k, v, True)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))      # (B, T, H, D) memory
    assert torch.equal(attend(*strided, True), expected)
    assert torch.equal(attend(q[None], k[None], v[None], True)[0], expected)
    assert torch.equal(attend(q[0, 0], k[0, 0], v[0, 0], True), expected[0, 0])


@pytest.mark.parametrize("name", BOTH)
def test_only_q_k_v_o_and_the_log_sum_exp_are_saved_and_rows_without_keys_are_zero(flash, name):
    q, k, v = (t.requires_grad_() for t in inputs(9, 5, 16, 2))                 # queries 0 to 3 see no key
    o = getattr(flash, name).apply(q, k, v, True)
    saved = o.grad_fn.saved_tensors
    lse, = [t for t in saved if t.shape == q.shape[:-1]]
    unseen = ~torch.ones(9, 5, dtype=torch.bool).tril(-4)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(unseen, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert len(saved) == 5, f"{len(saved)} tensors saved; q, k, v, o and L are enough"
    o.sum().backward()
    assert not o[:, :, :4].any() and not q.grad[:, :, :4].any() and q.grad[:, :, 5:].any()
    empty = getattr(flash, name).apply(q, k[:, :, :0], v[:, :, :0], False)
    assert empty.shape == q.shape and not empty.any()


def test_keys_out_of_sight_are_never_read(flash):
    for name in BOTH:
        q, k, v = inputs(130, 130, 16, 1)
        k[:, :, 64:] = v[:, :, 64:] = float("nan")           # past the diagonal for the first 64 queries
        assert getattr(flash, name).apply(q, k, v, True)[:, :, :64].isfinite().all()


def test_very_negative_scores_do_not_become_zero_rows(flash):
    q, k, v = inputs(5, 40, 16, 1)
    q, k = q.abs() * 1e4, -k.abs() * 1e4
    for name in BOTH:
        torch.testing.assert_close(getattr(flash, name).apply(q, k, v, False), sdpa(q, k, v, False, None))


def test_what_it_cannot_do_is_refused(flash):
    q = torch.zeros(2, 4, 8, 16)
    for text, arguments in [("head width 257", [torch.zeros(2, 8, 257)] * 3), ("multiple of K", [q, *[q[:, :3]] * 2]),
                            ("16", [q, *[q[..., :8]] * 2]), ("float16", [q, q.half(), q.half()])]:
        with pytest.raises(ValueError, match=text):
            flash.FlashAttentionTriton.apply(*arguments, True)
    for attention in (flash.FlashAttentionPyTorch, flash.FlashAttentionTriton):            # as the course's interface
        x = torch.ones(1, 5, 16).requires_grad_()
        attention.apply(x, x, x).sum().backward()
        assert torch.equal(attention.apply(x, x, x), attention.apply(x, x, x, False)) and x.grad.isfinite().all()


def test_tiles_fit_the_shared_memory_of_a_consumer_card(flash, monkeypatch):
    """What a program holds at a time: its own tiles, and num_stages of those it walks over; 96 KB at most."""
    monkeypatch.setattr(flash, "INTERPRET", False)
    for dtype, D in itertools.product((torch.float32, torch.bfloat16), (16, 64, 128, 256)):
        for kernel, held, walked in (("forward", "BLOCK_Q", "BLOCK_K"), ("queries", "BLOCK_Q", "BLOCK_K"),
                                     ("keys", "BLOCK_K", "BLOCK_Q")):
            tile, tensors = flash.tiles(kernel, D, dtype), 1 if kernel == "forward" else 2
            numbers = tensors * tile[held] * D + 2 * tile["num_stages"] * tile[walked] * D
            assert numbers * dtype.itemsize <= 96 * 1024, (kernel, D, dtype, tile)
