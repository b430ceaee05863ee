"""Claims about answers.py: what is read out of an answer. Half of the inputs come from other projects' bug reports."""
import re

import pytest

import align_data
import answers

PHRASES = """The answer is X since it fits.|X is correct.|answer: X|X|(X)|**X**|X) one|Option X is right.|Therefore, X.
I choose X because it fits|I would go with X here.|It must be X since others fail.|The best choice is X as it is true.
So X is the answer.|Therefore X seems right.|The answer would be X.|The correct option: X|The answer is **X**.
I think it’s X.|The final answer is $\\boxed{X}$.|"X"|X, because the sky is blue.|ANSWER: X|The answer is \\text{X}
Answer - X|X, not Y|The right answer is X, not Y.|The answer is not Y but X.|Y is wrong. X is right.|Y isn't right, so X
Not Y. X!|neither Y nor Z, but X|The answer isn’t Y. It is X.|I thought the answer is Y, but the answer is X
X should be it.|Option Y is incorrect, so it has to be X.|The answer is Y? No, the answer is X.|Y cannot be, so X"""
NONE = """X or Y|X and Y|neither X nor Y|Neither X nor Y is right|X is wrong.|X is not correct.|X isn't right|X isn’t it
X cannot be right.|X can't be true.|Not X.|The answer is not X.|Both X and Y are right|X was false
The answer is X or Y|10000 polyominoes|I do not know|"""


@pytest.mark.parametrize("phrase", re.split(r"[|\n]", PHRASES + "\n" + NONE))
def test_every_letter_is_read_alike(phrase):
    for letters in ("ABC", "BCD", "CDA", "DAB"):
        text = re.sub(r"(?<![A-Za-z])[XYZ](?![A-Za-z])", lambda m: letters["XYZ".index(m[0])], phrase)
        assert answers.parse_mmlu({}, text) == (None if phrase in re.split(r"[|\n]", NONE) else letters[0]), text


@pytest.mark.parametrize("output, letter", [
    ("(c) is right", "C"), ("Answer: d", "D"), ("A good question", None), ("The correct answer is Apple", None),
    ("A man walks. I think B.", "B"), ("The answer is a bird", None), ("The answer is J", "J")])
def test_articles_small_letters_and_many_options(output, letter):
    assert answers.parse_mmlu({"options": list("0123456789") if letter == "J" else None}, output) == letter


@pytest.mark.parametrize("output, number", [
    ("48/2 = 24, so 48+24 = 72 clips.", "72"), ("$1,072.50.", "1072.50"), ("none", None), ("it is -5", "-5"),
    ("", None), ("10-5", "5"), ("1,2,3", "3"), (".5", ".5"), ("9{,}500", "9500"),
    ("10\\,000 km", "10000"), ("11,\\! 111", "11111"),
    ("72 clips\n#### 72\n\nQ: 3 cats?\n#### 5", "72"), ("#### $1,000\n2 of them", "1000"), ("7 and #### nothing", "7"),
    ("−5", "-5"), ("= $<<5+5=10>>10", "10"), ("**42**", "42"), ("1\u202f000", "1000"), ("42!", "42")])
def test_parse_gsm8k(output, number):
    assert answers.parse_gsm8k(output) == number


EQUAL = r"""1,000|1000;\frac{1}{2}|0.5;$12.50|12.5;x + 1|x+1;\boxed{7}|7;\sqrt2|\sqrt{2};5\text{ cm}|5;x=5|5
\displaystyle 5|5;\boxed 5|5;\fbox{5}|5;\frac{1}{-2}|-0.5;1\frac12|1.5;-1\frac{1}{2}|-1.5;15\,000|15000;11,\! 111|11111
1 000|1000;50\%|50;50 percent|50;90^\circ|90;90 degrees|90
5\text{ cm}^2|5;\frac{1}{3}\text{ meters}|1/3;(1,\frac92)|(1,4.5)
\left(1,2\right)|(1,2);x \geq 5|x\ge5;x\leqslant 5|x <= 5;x<3|x \lt 3;x \neq 1|x != 1;\text{(C)}|C;\dfrac34|\tfrac{3}{4}
\cfrac{1}{3}|1/3;\frac{\sqrt3}{2}|\sqrt{3}/2;\frac{x+1}{2}|(x+1)/2;x^{10}|x^10;\left(5\right)|5;x\in[0,1]|[0,1];2 x|2x
52_8|52;1,-2|-2,1;\{3,1\}|\{1,3\};\frac{1}{2}\%|1/2;5\text{ km/h}|5
\frac{3}{2\sqrt2}|3/(2\sqrt{2});\frac{x}{\pi}|x/\pi;\frac{1}{x^2}|1/x^2
\frac{1}{2^n}|1/2^n;\frac{x_1}{x_2}|x_1/x_2;\frac{1}{f(x)}|1/f(x)
\frac{1}{\sqrt[3]{2}}|1/\sqrt[3]{2};\frac{1}{\sin x}|1/\sin x
\begin{pmatrix} 1 \\ 2 \end{pmatrix}|\begin{pmatrix}1\\2\end{pmatrix}
5.0|5;+5|5;.50|0.5;−5|-5;\[ 9 \]|9;\( \frac{1}{3} \)|1/3;5{,}000{,}000|5000000;\frac{12}{24}|\frac12;\quad 5|5;5\$|5"""
UNLIKE = r"""-3|3;1 2|12;1/0|0;\sqrt2|2;1,2|12;(1,2)|(2,1);(1,2)|[1,2];\frac{a+b}{c}|a+b/c;x+1/2|\frac{x+1}{2}
x<3|x\leq 3;\infty|-\infty;0.333|1/3;3.14|\pi;A|B;2\pi|2;\overline{12}|12;5,00|500
\sqrt{23}|\sqrt23;1e999999999|1;\emptyset|0;\frac{3}{2\sqrt2}|\frac32\sqrt2
\frac{1}{2\pi}|\frac12\pi;\frac{1}{2x}|\frac12x;\frac{1}{2/3}|\frac{1}{6};\frac{1}{xy}|\frac1xy"""


@pytest.mark.parametrize("pair", re.split(r"[;\n]", EQUAL + "\n" + UNLIKE))
def test_answers_are_equal_as_math_verify_says(pair):
    answer, truth = pair.split("|")
    equal = pair in re.split(r"[;\n]", EQUAL)
    assert answers.same_answer(answer, truth) is answers.same_answer(truth, answer) is equal
    math_verify = pytest.importorskip("math_verify", reason="a reference for tests only: pip install math-verify")
    if pair in (r"\overline{12}|12", r"5,00|500", "1 000|1000", r"15\,000|15000", "0.333|1/3", "1e999999999|1",
                r"\frac{1}{2}\%|1/2"):
        return                                   # there it reads no thousands, or rounds
    gold, read = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (truth, answer))
    assert math_verify.verify(gold, read, timeout_seconds=None) is equal


def test_files_with_marks_and_long_fields_are_read(tmp_path):
    line = b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n'
    files = {"a.csv": b"\xef\xbb\xbfid,prompt\n1,\"" + b"long, " * 40_000 + b"\"\n", "a.jsonl": line,
             "a.json": b'\xef\xbb\xbf[{"prompt": "a"}]'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        items, field = answers.read_prompts(tmp_path / name)
        assert field == "prompt" and len(items[0]["prompt"]) == (240_000 if name == "a.csv" else 1), name
    (tmp_path / "dev").mkdir()
    for row, words in ((b"q,1,2,3,4,AB", "row 1"), (b"q,1,2,3,4,A\nq,1", "row 2"), (b"\xe9", "a_dev.csv is not UTF-8")):
        (tmp_path / "dev" / "a_dev.csv").write_bytes(row)
        with pytest.raises(ValueError, match=words):
            answers.read_mmlu(tmp_path, "dev")


@pytest.mark.parametrize("record, letter", [
    ({"question": "q", "choices": ["x", "y"], "answer": 1}, "B"),
    ({"ctx": "c", "endings": ["x", "y"], "label": "1"}, "B"),
    ({"question": "q", "choices": {"text": list("abcdefghijkl"), "label": list(range(12))}, "answerKey": "11"}, "L")])
def test_choices_in_every_layout(record, letter):
    assert answers.read_choices(record)["answer"] == letter
    for name in {"label", "answer", "answerKey"} & record.keys():
        with pytest.raises(ValueError, match="'' is none of"):
            answers.read_choices(record | {name: ""})


@pytest.mark.parametrize("text, box", [
    ("\\boxed 5", "5"), ("\\boxed -3.5 ", "-3.5"), ("\\fbox C here", "C"), ("5", None), ("\\boxed{1}\\boxed{}", ""),
    ("\\boxed{5}. Mark it with \\boxed notation", "5"), ("\\boxed{5} so \\boxed{", "5"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}")])
def test_the_last_box(text, box):
    assert answers.last_boxed(text) == box
    assert not any(answers.same_answer(nothing, nothing) for nothing in (None, "", "$ $", "\\boxed{}", " . "))


@pytest.mark.parametrize("record, truth", [
    ({"solution": "So \\boxed 5."}, "5"), ({"solution": "It is $\\fbox{\\frac12}$."}, "\\frac12"), ({"answer": 5}, "5"),
    ({"solution": "We add 2 and 3 and are done."}, None), ({"answer": "two #### 1,000"}, "1,000"), ({"answer": 0}, "0"),
    ({"answer": "#### "}, None), ({"answer": "x+1"}, "x+1"), ({"solution": "7"}, "7"), ({"answer": "\\boxed{}"}, None)])
def test_gold_answers_are_read_or_counted_as_unreadable(record, truth):
    assert align_data.read_truth({"problem": "q"} | record) == (["q"], truth)
