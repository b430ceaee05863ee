"""Claims about evaluate.py."""
import json
import math

import pytest
import torch

from common import random_model, rng
import bpe
import evaluate
import model as model_module


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate.perplexity(model, torch.randint(0, 50, (100,), generator=rng()), n_bytes=200)
    assert figures["perplexity"] == pytest.approx(50, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(50) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="needs 2 tokens"):
        evaluate.perplexity(model, [1])
    assert model_module.perplexity_of(1e5) == math.inf and math.isnan(model_module.perplexity_of(math.nan))


@pytest.mark.parametrize("verb, data, n, more", [
    ("mmlu", "", 2, ["--shots=1"]), ("mmlu", "", 2, ["--by=generate", "--max_new_tokens=8"]),
    ("hellaswag", "hellaswag.jsonl", 1, []), ("arc", "arc.jsonl", 2, ["--shots=1", "--shots_data=hellaswag.jsonl"]),
    ("gsm8k", "gsm8k.jsonl", 2, ["--shots=1", "--shots_data=train.jsonl", "--quantize=int8"]),
    ("instructions", None, 6, []), ("alpaca", "alpaca.json", 1, []), ("safety", "sst.csv", 1, [])])
def test_every_kind_of_question_is_asked_and_its_answers_kept(little_base, questions, verb, data, n, more, capsys,
                                                              monkeypatch):
    passes = []
    monkeypatch.setattr(evaluate.Threads, "watch", lambda threads, seconds: passes.append(seconds))
    (questions / "train.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n', encoding="utf-8")
    more = [word.replace("shots_data=", f"shots_data={questions}/") for word in more]
    more += [] if data is None else [f"--data={questions / data}"]
    evaluate.main([verb, str(little_base), "--limit=6", *more])
    answers = evaluate.read_jsonl(little_base / f"{verb}.jsonl")[0]
    share = sum(answer["right"] for answer in answers) / n
    error = math.sqrt(share * (1 - share) / n)
    assert len(answers) == n and f"{share:.1%} ± {error:.1%}" in capsys.readouterr().out
    assert 0 < min(passes) < max(passes) == math.inf, "a core that gets busy on the way is noticed"
    if verb == "alpaca":
        judged, = json.loads((little_base / "alpaca.json").read_text(encoding="utf-8"))
        assert {"instruction", "output", "generator", "dataset"} <= set(judged)


def test_the_answer_gets_what_the_prompt_leaves_of_the_context(little_base, monkeypatch, capsys):
    """The defaults ask for more new tokens than the context of 48 holds: the question must stay in sight."""
    model, tokenizer = model_module.load_model(little_base)
    asked, generate = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda model, ids, n, **how: asked.append((ids, n)) or generate(
        model, ids, n, **how))
    prompts, config = ["cat", "the cat in the hat " * 3, "é" * 99], evaluate.WriteConfig(batch_size=1)
    texts = evaluate.write_answers(model, tokenizer, "plain", prompts, config)
    assert all(len(ids[0]) + n == 48 for ids, n in asked) and asked[1][0][0] == tokenizer.encode(prompts[1])
    assert "1 of 3 prompts are longer than the 36 tokens" in capsys.readouterr().out
    together = evaluate.write_answers(model, tokenizer, "plain", prompts, evaluate.WriteConfig(batch_size=3))
    assert together == texts


def test_a_text_and_its_token_file_score_alike(corpus, little_base, monkeypatch, capsys):
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    from_bin, from_text = (evaluate.read_tokens(corpus / f"val.{kind}", tokenizer) for kind in ("bin", "txt"))
    assert from_bin[1] == from_text[1] == (corpus / "val.txt").stat().st_size
    assert from_bin[0].tolist() == from_text[0].tolist()
    monkeypatch.setattr(evaluate, "token_losses", lambda model, tokens, stride, rows: torch.full((9,), float(rows)))
    evaluate.main([str(little_base), f"--data={corpus / 'val.txt'}", "--batch_size=3"])
    assert "loss 3.0000" in capsys.readouterr().out


def test_choices_are_scored_by_the_model_s_own_log_probabilities(little_base):
    model, tokenizer = model_module.load_model(little_base)
    item = {"prompt": "the cat", "options": ["hat", "hat in the hat"], "answer": "A"}
    scored, = evaluate.choose(model, tokenizer, [item], letters=False, batch_size=1)
    for option, score in zip(item["options"], scored["scores"]):
        prompt, response = tokenizer.encode("the cat"), tokenizer.encode(" " + option)
        log_p = torch.log_softmax(model(torch.tensor([prompt + response])), dim=-1)[0, len(prompt) - 1:-1]
        expected = log_p.gather(1, torch.tensor(response)[:, None]).sum().item() / len(" " + option)
        assert score == pytest.approx(expected, abs=1e-4)


def test_an_option_longer_than_the_context_is_named(little_base):
    model, tokenizer = model_module.load_model(little_base)
    item = {"prompt": "q", "options": ["cat", "the cat " * model.config.context_length], "answer": "A"}
    with pytest.raises(ValueError, match="passes the context of .*'the cat the cat.*of 'q'"):
        evaluate.choose(model, tokenizer, [item], False, 4)


def test_instructions_can_be_followed_and_failed():
    texts = ["It is so. " * 4, "river " * 4, "LOUD.", "no such mark"]
    for instruction, check in evaluate.instructions(30, 3):
        assert not check("") and not check("A, b. c, d! e? F, g; h, and so on, " * 9), instruction
    followed = {text.split(" in ")[-1] for text, check in evaluate.instructions(60) if any(map(check, texts))}
    assert {"exactly 4 sentences.", "upper case letters only."} <= followed
