"""Claims about batching.py: each text is what generate gives alone, whatever else is written beside it."""
import threading

import pytest

from common import rng, toy
import batching
import decoding
import onetoken


class SixtyOne:
    """A tokenizer for the toy model's 61 ids: letters."""
    vocab_size = 61

    def decode_bytes(self, ids):
        return bytes(65 + i for i in ids)


def row_of(prompt, n, **how):
    return batching.Row(prompt, n, SixtyOne(), **{"how": (0, None, None, None)} | how)


def run(rows, model, meanwhile=lambda engine: None, **how):
    """An engine after its thread has written these rows; every block must be free afterwards."""
    def notify(_):
        meanwhile(engine)
        if all(row.finish for row in rows):
            ended.set()
    engine, ended = batching.Engine(model, SixtyOne(), notify, **how), threading.Event()
    for row in rows:
        engine.inbox.put(row)
    engine.thread.start()
    assert ended.wait(60), "rows were lost"
    engine.stop()
    engine.thread.join(10)
    assert len(engine.blocks.free) == engine.blocks.n_blocks and not any(engine.blocks.users)
    return engine


@pytest.mark.parametrize("switch", ["plain", "gpt2", "shift keys", "smear window", "mla window", "moe"])
def test_each_text_is_what_generate_gives_alone_whatever_else_is_written(switch, monkeypatch):
    """Greedy and sampled, long and short, over many blocks and over five, in pieces of seven tokens, with guesses."""
    model, start = toy(switch).eval(), [7, 3, 9, 1, 1, 5]
    prompts = [start + [i] for i in range(4)] + [[4], [2, 4] * 8, start * 3, [8, 9]]
    hows = [(0, None, None, None), (1.0, None, None, None), (0.7, 5, None, None), (1.3, None, 0.8, None)] * 2
    jobs, library = list(zip(range(8), prompts, hows)), onetoken.library
    alone = [decoding.generate(model, prompt, 24 - len(prompt), generator=rng(seed), stop_ids=[11],
                               **dict(zip(("temperature", "top_k", "top_p", "min_p"), how)))
             for seed, prompt, how in jobs]
    for more in (dict(max_batch=3), dict(max_batch=4), dict(max_batch=8, n_blocks=5), dict(max_batch=1, draft="ngram"),
                 dict(max_batch=1, draft=model, k=3)):
        monkeypatch.setattr(onetoken, "library", (lambda: None) if more == dict(max_batch=4) else library)
        rows = [row_of(prompt, 24 - len(prompt), how=how, seed=seed, stop_ids=[11]) for seed, prompt, how in jobs]
        engine = run(rows, model, block_size=5, budget=7, **more)
        for row, ids in zip(rows, alone):
            assert row.ids[row.n_prompt:] == ids, (switch, more)
            assert row.finish == ("stop" if ids[-1] == 11 else "length")
        assert engine.counts["preemptions"] > 0 or "n_blocks" not in more, "five blocks are not enough for eight rows"
        assert engine.counts["guessed_tokens"] > 0 or more.get("draft") is not model


def test_a_row_that_is_cancelled_while_it_waits_for_blocks_gives_none_back_twice():
    model = toy().eval()
    rows = [row_of([i, 5], 18, streams=True) for i in range(3)]

    def cancel(engine):
        if engine.counts["preemptions"]:
            rows[2].cancelled = True                       # the youngest: it was sent back
    engine = run(rows, model, cancel, block_size=5, n_blocks=9)
    assert [row.finish for row in rows] == ["length", "length", "cancelled"] and len(rows[2].ids) > 2
    for row in rows[:2]:
        assert row.ids[2:] == decoding.generate(model, row.ids[:2], 18, temperature=0)
    assert engine.counts["preemptions"] == 1


def test_equal_beginnings_are_read_once():
    first, second = batching.next_key([], [1, 2, 3, 4]), batching.next_key([], [5, 6, 7, 8])
    assert second != batching.next_key([first], [5, 6, 7, 8]), "a block is known by all that stands before it"
    rows = [row_of(list(range(10, 23)), 4) for _ in range(2)]
    run(rows, toy().eval(), max_batch=1, block_size=4)
    assert [row.shared_tokens for row in rows] == [0, 12] and rows[0].ids == rows[1].ids


def test_a_step_that_fails_ends_its_rows_and_not_the_engine():
    bad, good = row_of([1, 2], 4, how=(1.0, "five", None, None)), row_of([1, 2], 4)
    run([bad, good], toy().eval(), max_batch=1)
    assert bad.finish == "error" and "TypeError" in bad.error and good.finish == "length"


def test_a_prompt_that_is_only_read_ends_beside_a_draft():
    row = row_of([5], 0)
    run([row], toy().eval(), draft="ngram")
    assert row.finish == "length" and row.ids == [5]
