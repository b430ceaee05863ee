"""Claims about evaluate.py."""
import json
import math
import re

import numpy as np
import pytest
import torch

from common import random_model, rng# noqa: F401
import bpe
import checkpoint
import data
import evaluate
import model as model_module

def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = random_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate.perplexity(model, torch.randint(0, 50, (100,), generator=rng()), n_bytes=200)
    assert figures["perplexity"] == pytest.approx(50, rel=1e-5) and figures["bits_per_byte"] == pytest.approx(
        math.log2(50) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="needs 2 tokens"):
        evaluate.perplexity(model, [1])
    assert model_module.perplexity_of(1e5) == math.inf and math.isnan(model_module.perplexity_of(math.nan))


def test_bytes_of_a_token_file_are_those_of_its_text(corpus):
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    from_bin, from_text = (evaluate.read_tokens(corpus / f"val.{kind}", tokenizer) for kind in ("bin", "txt"))
    assert from_bin[1] == from_text[1] == (corpus / "val.txt").stat().st_size
    assert np.array_equal(from_bin[0], from_text[0])


@pytest.mark.parametrize("output, letter", [
    ("The correct answer is B. There is only one.", "B"), ("10000 polyominoes", None), ("(c) is right", "C"),
    ("D", "D"), ("The answer is **A**", "A"), ("A good question", None),
    ("I thought the answer is A, but the answer is C", "C"),
    ("The correct answer is Apple", None), ("A or B", None), ("Answer: d", "D"), ("", None)])
def test_parse_mmlu(output, letter):
    assert evaluate.parse_mmlu({"options": ["1", "10", "100", "no"]}, output) == letter


@pytest.mark.parametrize("output, number", [
    ("48/2 = 24, so 48+24 = 72 clips.", "72"), ("$1,072.50.", "1072.50"), ("none", None), ("it is -5", "-5"),
    ("10-5", "5"), ("1,2,3", "3"), (".5", ".5"), ("", None)])
def test_parse_gsm8k(output, number):
    assert evaluate.parse_gsm8k(output) == number


@pytest.mark.parametrize("answer, truth, same", [
    ("1,000", 1000, True), ("\\frac{1}{2}", "0.5", True), ("$12.50", "12.5", True), ("x + 1", "x+1", True),
    ("-3", "3", False), ("1 2", "12", False), ("\\boxed{7}", "7", True), ("", "", False), (None, None, False),
    ("1/0", "0", False)])
def test_answers_are_equal_as_numbers_or_strings(answer, truth, same):
    assert evaluate.same_answer(answer, truth) is same


@pytest.mark.parametrize("verb, data, n", [
    ("mmlu", "", 2), ("hellaswag", "hellaswag.jsonl", 1), ("arc", "arc.jsonl", 2), ("gsm8k", "gsm8k.jsonl", 2),
    ("instructions", None, 6), ("alpaca", "alpaca.json", 1), ("safety", "sst.csv", 1)])
def test_every_kind_of_question_is_asked_and_its_answers_kept(little_base, questions, verb, data, n, capsys):
    for by, shots in (("letter", 0), ("text", 1), ("generate", 1)) if verb == "mmlu" else (("letter", 1),):
        evaluate.main([verb, str(little_base), f"--by={by}", f"--shots={shots}", "--limit=6", "--max_new_tokens=8"]
                      + ([] if data is None else [f"--data={questions / data}"]))
        answers = evaluate.read_jsonl(little_base / f"{verb}.jsonl")[0]
        share = sum(answer["right"] for answer in answers) / n
        error = math.sqrt(share * (1 - share) / n)
        assert len(answers) == n and f"{share:.1%} ± {error:.1%}" in capsys.readouterr().out
    if verb == "alpaca":
        judged, = json.loads((little_base / "alpaca.json").read_text(encoding="utf-8"))
        assert {"instruction", "output", "generator", "dataset"} <= set(judged)


def test_choices_are_scored_by_the_model_s_own_log_probabilities(little_base):
    model, tokenizer = model_module.load_model(little_base)
    item = {"prompt": "the cat", "options": ["hat", "hat in the hat"], "answer": "A"}
    found, = evaluate.choose(model, tokenizer, [item], letters=False, batch_size=1)
    for option, score in zip(item["options"], found["scores"]):
        prompt, own = tokenizer.encode("the cat"), tokenizer.encode(" " + option)
        log_p = torch.log_softmax(model(torch.tensor([prompt + own])), dim=-1)[0, len(prompt) - 1:-1]
        expected = log_p.gather(1, torch.tensor(own)[:, None]).sum().item() / len(" " + option)
        assert score == pytest.approx(expected, abs=1e-4)


def test_documents_are_ranked_by_their_own_loss():
    model, tokens = random_model(), torch.randint(1, 50, (40,), generator=rng()).numpy()
    tokens[[9, 29]] = 0
    found = evaluate.document_losses(model, tokens, 0)
    losses = model_module.token_losses(model, tokens).double()
    assert [d["loss"] for d in found] == sorted(d["loss"] for d in found)
    assert {(d["start"], d["tokens"]): d["loss"] for d in found} == pytest.approx(
        {(0, 10): losses[:9].mean().item(), (10, 20): losses[9:29].mean().item(), (30, 10): losses[29:].mean().item()})


def test_instructions_can_be_followed_and_failed():
    for instruction, check in evaluate.instructions(30, 3):
        assert not check("") and not check("A, b. c, d! e? F, g; h, and so on, " * 9)
        if "upper case" in instruction:
            assert check("LOUD")
        if "JSON" in instruction:
            assert check(json.dumps(dict.fromkeys(re.findall('"([a-z]+)"', instruction), 1)))
        if "sentences" in instruction:
            assert check("It is so. " * int(re.search(r"\d", instruction)[0]))
    assert [text for text, _ in evaluate.instructions(9, 1)] == [text for text, _ in evaluate.instructions(9, 1)]
