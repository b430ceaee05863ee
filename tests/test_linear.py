"""Claim: a regular expression that reads what strangers or models wrote takes time that grows as the text does."""
import re
import time

import pytest
import regex

import align_data
import answers
import archive
import clean
import data
import evaluate
import words

CHECKS = [check for _, check in evaluate.instructions(6, 0)]
READERS = {
    "mmlu": lambda text: answers.parse_mmlu({}, text), "gsm8k": answers.parse_gsm8k, "boxed": answers.last_boxed,
    "equal": lambda text: answers.same_answer(text, "5"), "gold": answers.gold_answer,
    "refusal": answers.REFUSAL.search, "r1": lambda text: answers.r1_zero_reward(text, "5"),
    "dialogue": align_data.read_hh, "e-mail": clean.mask_emails,
    "instructions": lambda text: [check(text) for check in CHECKS], "phone": clean.mask_phone_numbers,
    "ip": clean.mask_ips, "normal form": clean.normalize, "gopher": clean.gopher_reason,
    "hashes": lambda text: clean.hash_words(clean.normalize(text)),
    "charset": lambda text: clean.META_CHARSET.findall(text.encode()), "markdown": data.strip_markdown,
    "chunks": lambda text: archive.join_chunks(text.encode()), "magic": lambda text: archive.ANY.search(text.encode()),
    "lines": lambda text: re.sub(r"\n{3,}", "\n\n", text)}
READERS |= {f"words {i}": lambda text, compiled=regex.compile(pattern): words.pieces(compiled, text)
            for i, pattern in enumerate(words.GPT2_PATTERNS + words.GPT4_PATTERNS)}
UNITS = [*" \n\ta1@.-({[\\$#<,'_*/é中\u3000\u202f\u0301", *"""a |1 |1,|1,111|1.|a.|@a.|a@|@a.a|é@é.|(1|283-|10.|
\\frac|\\frac{|\\frac{1}|\\frac 1 |\\boxed{|\\boxed |5\\text{|{}|}{|\\sqrt |####|x=|</think> <answer>|<answer>|Human:|
answer is |answer: ( |option A is |A |I |I choose |neither |<meta charset |<meta |charset=|WARC/1.|...|!? |
<|endoftext|>|'s|_*""".replace("\n", "").split("|"), " \n", "\r\n", "a\r\n", "\n\nHuman: ", "<|endoftext|>"]


@pytest.mark.parametrize("name", READERS)
def test_every_pattern_is_linear_on_its_worst_cases(name):
    """A quadratic one takes minutes for 100,000 characters; all of these cases together take seconds."""
    for unit in filter(None, UNITS):
        began = time.process_time()
        READERS[name](unit * (100_000 // len(unit)) + "!")                   # the end makes what repeats begin again
        assert time.process_time() - began < 5, unit
