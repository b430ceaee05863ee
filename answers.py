"""Questions read from files, and answers read from what a model wrote: letter, number, formula, and the reward for it.

A parser decides a share of every score, so its rules are stated here and tested on the spellings that were once
misread, and an answer that cannot be read is counted as such, apart from a wrong one. Two answers are the same when
they are the same number, exactly (fractions, no floats), or the same string once LaTeX's dressing is off:

    "The answer is **B**."    parse_mmlu     B          "\\boxed{\\frac{3}{4}}"   last_boxed   \\frac{3}{4} = 0.75
    "so 48 + 24 = 72 clips"   parse_gsm8k    72         "x = 5\\text{ cm}"         same_answer  5

Left out: algebra ("(x+1)^2" is not "x^2+2x+1" here), units that are converted. Patterns stay linear on long texts.
"""
import csv
import io
import json
import re
from fractions import Fraction
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFUSAL = re.compile(r"\b(?:I (?:can(?:not|['’]t| not)|am (?:un|not )able to|won['’]t|will not|must decline|"
                     r"apologi[sz]e)|I['’]m (?:sorry|unable)|as an AI)\b", re.IGNORECASE)

# What follows a letter that is not the answer.
DENIED = (r"[\s*_)\]]{0,9}(?:(?:is|was|does|could|can)(?:n['’]?t|\s?not)|can['’]t|cannot|"
          r"(?:is|was)\s+(?:wrong|false|incorrect))\b")
# What does not change the meaning of an answer: (pattern, what stands for it), in this order.
_ARGUMENT, _TEXT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\w))", r"\\(?:text|textnormal|textbf|mbox|mathrm|mathbf)"
_FRACTION = rf"\\[cdt]?frac{_ARGUMENT}{_ARGUMENT}"


# One thing below a fraction's line: a number, letter or name with its powers, a root, f(x), dx, sin x, a bracket.
_ONE = re.compile(
    r"-?(?:[0-9][0-9.,]*|\.[0-9]+|[a-zA-Z]|\\[a-zA-Z]+)(?:[_^](?:-?(?:[0-9]+|[a-zA-Z])|\{[^{}]*\}))*!?|"
    r"\\sqrt(?:\[[^\]]*\])?\{[^{}]*\}|[fgh]?\([^()]*\)|d[a-z]|\\(?:sin|cos|tan|ln|log)\s*(?:\\?[a-z]+|[0-9]+)")


def _plain_fraction(match) -> str:
    """a/b, with brackets around a sum, and around a product below, which would divide by its first factor alone."""
    above, below = (match[1] or match[2] or "").strip(), (match[3] or match[4] or "").strip()
    if re.search(r".[+-]", above):
        above = f"({above})"
    return f"{above}/{below}" if _ONE.fullmatch(below) else f"{above}/({below})"


DRESSING = [(re.compile(pattern), plain) for pattern, plain in (
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~", " "), (r"\\[\[\]()]|\\(?:left|right|displaystyle)|\\?\$", ""),
    (r"\^?\\circ|\^\{\\circ\}|(?<=[0-9]) degrees?$", ""),
    (rf"(?<=[0-9}}])\s*{_TEXT}\{{[a-zA-Z./\s]+\}}(?:\^\{{?[23]\}}?)?\s*$", ""),                       # 5\text{ cm}^2
    (rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1"), (r"(?<=[0-9}])\s*(?:\\?%|(?:percent|percentage|pct)\.?\s*$)", ""),
    (r"^\s*[a-zA-Z]\s*(?:=(?!=)|\\in(?![a-z]))", ""), (r"(?<=[0-9])_\{?[0-9]+\}?$", ""),             # x = 5, 52_8
    (r"\\g(?:eq?|eqslant)(?![a-z])", ">="), (r"\\l(?:eq?|eqslant)(?![a-z])", "<="), (r"\\neq?(?![a-z])", "!="),
    (r"\\gt(?![a-z])", ">"), (r"\\lt(?![a-z])", "<"), (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"), (r"\^\{(-?\w+)\}", r"^\1"),
    # 1\frac{1}{2} is "1 1/2": a fraction keeps away from what stands beside it. Without braces an argument is one sign.
    (r"(?<=\w)\s*(\\[cdt]?frac)", r" \1"), (rf"({_FRACTION})(?=\w)", r"\1 "), (_FRACTION, _plain_fraction),
    (r"\\([{}])", r"\1"))]


# --- files of questions ---

def read_text(path) -> str:
    """A file's text, line ends kept, without a byte-order mark. Raises ValueError naming a file that is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None


def read_csv(path) -> list[list[str]]:
    csv.field_size_limit(1 << 24)                                 # the default refuses texts above 131 kB
    return list(csv.reader(io.StringIO(read_text(path), newline="")))


def read_prompts(path) -> tuple[list[dict], str]:
    """(records, the field that holds the prompt) of a CSV with a header, a JSON list or a JSONL file."""
    if str(path).endswith(".csv"):
        header, *rows = read_csv(path) or [[]]
        items = [dict(zip(header, row)) for row in rows]
    elif read_text(path).lstrip().startswith("["):
        try:
            items = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    else:
        items = read_jsonl(path)[0]
    for field in ("instruction", "prompts_final", "prompt"):
        if items and all(isinstance(item, dict) and item.get(field) is not None for item in items):
            return items, field
    raise ValueError(f"{path}: every record needs the same of instruction, prompts_final or prompt")


def read_jsonl(path, check=None, skip: bool = False) -> tuple[list, list[str]]:
    """(records, complaints) of a JSONL file. check(record) gives what to keep, or raises.

    A bad line is a complaint `path:line: why`. Unless `skip`, they are raised as one ValueError that counts them and
    quotes the first five.
    """
    records, complaints = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    record = json.loads(text)
                    if not isinstance(record, dict):
                        raise ValueError(f"a {type(record).__name__} where an object is wanted")
                    records.append(check(record) if check else record)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                complaints.append(f"{path}:{number}: {why}")
    if complaints and not skip:
        raise ValueError(f"{len(complaints)} bad lines; mend them, or leave them out (align.py has --skip_bad=true):"
                         + "".join("\n  " + complaint for complaint in complaints[:5]))
    if not records:
        raise ValueError(f"{path} holds no usable line" + "".join(f"; the first: {why}" for why in complaints[:1]))
    return records, complaints


def need(record: dict, *names) -> list:
    """The values of these fields. Raises ValueError naming the first that is missing."""
    for name in names:
        if record.get(name) is None:
            raise ValueError(f"no {name!r}; it has {', '.join(map(repr, record)) or 'no fields'}")
    return [record[name] for name in names]


def read_mmlu(folder, split: str) -> list[dict]:
    """{subject, question, options, answer} of each row of FOLDER/split/*_split.csv, which have no header."""
    items = []
    for path in sorted(Path(folder, split).glob(f"*_{split}.csv")):
        for number, row in enumerate(read_csv(path), start=1):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise ValueError(f"{path}, row {number}: wanted question, four options and a letter A to D, got {row}")
            items.append({"subject": path.stem.removesuffix(f"_{split}").replace("_", " "), "question": row[0],
                          "options": row[1:5], "answer": row[5]})
    if not items:
        raise ValueError(f"{Path(folder, split)} has no *_{split}.csv; --data is the folder that holds dev/ and test/")
    return items


def read_choices(record: dict) -> dict:
    """{question, options, answer} of a line of HellaSwag (ctx, endings, label), of ARC in both layouts, or with a list
    of choices and the place or letter of the answer (MMLU on the hub)."""
    if "ctx" in record:
        question, options, label = need(record, "ctx", "endings", "label")
        labels = [str(i) for i in range(len(options))]
    else:
        question, label = need(record, "question", "answer" if "answer" in record else "answerKey")
        choices, = need(question if isinstance(question, dict) else record, "choices")
        question = "Question: " + (question["stem"] if isinstance(question, dict) else question) + "\nAnswer:"
        if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
            choices = {"text": choices, "label": list(LETTERS[:len(choices)])}        # the answer: its letter or place
            label = LETTERS[label] if isinstance(label, int) else label
        if isinstance(choices, list):
            choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
        options, labels = choices["text"], [str(label) for label in choices["label"]]
    if str(label) not in labels[:len(LETTERS)]:
        raise ValueError(f"answer {label!r} is none of {labels}")
    return {"question": question, "options": options, "answer": LETTERS[labels.index(str(label))]}


# --- what is in an answer ---

def parse_mmlu(example: dict, output: str) -> str | None:
    """The letter "A".."D" that an answer names, or None.

    Taken is the last letter that follows "answer is", "option", "I choose" …; else one that the answer begins with or
    consists of; else the only capital letter that stands alone and is not denied. Capital A is the article at the
    beginning of a sentence before a word in small letters that is no verb.

    >>> parse_mmlu({}, "The answer is A since it fits."), parse_mmlu({}, "neither A nor B")
    ('A', None)
    """
    letters = LETTERS[:len(example.get("options") or "ABCD")]
    # A capital letter, or a small one that nothing but a full stop or a bracket follows: "a" is mostly the article.
    letter = rf"([{letters}](?![\w'’])|[{letters.lower()}](?=[\s*_]*(?:[.:)\]}}]|$)))"
    letter = rf"[\s*_(\[\"'$:]*(?:\\boxed{{|\\text{{)*{letter}(?!\s+(?:or|and|nor)\b)(?!{DENIED})"
    leads = (r"(?i:\banswer\s*(?:is|:)(?:\s+the\s+letter)?(?:\s+option|\s+choice)?)",
             r"(?i:\b(?:option|choice)\b(?:\s+is)?|\bI(?:'d|\s+would)?\s+(?:choose|pick|select|go\s+with|say)\b)")
    for lead in leads:
        named = re.findall(lead + letter, output)
        if named:
            return named[-1].upper()
    first = rf"[\s*_(\[]*([{letters}{letters.lower()}])[\s*_)\]]*(?:[.:)\]\n]|, (?:because|since|as)\b|$)"
    first = re.match(first, output)
    if first:
        return first[1].upper()
    named = set()
    for match in re.finditer(rf"(?<!\w)(?<!\w['’])([{letters}])(?!\w|['’]\w)", output):
        before, after = output[max(0, match.start() - 10):match.start()], output[match.end():match.end() + 20]
        denied = re.match(DENIED, after) or re.search(r"(?i)(?:\bnot|n['’]t|\bneither|\bnor) $", before)
        starts = not before.strip() or before.rstrip()[-1] in ".!?:"
        verb = re.match(r" (?:is|was|and|or|nor|because|since|as|fits|seems|matches|must|should|would)\b", after)
        article = re.match(" [A-Z][a-z]", after) or (starts and not verb and re.match(" [a-z]", after))
        if not denied and not (match[1] == "A" and article):
            named.add(match[1])
    return named.pop() if len(named) == 1 else None


def parse_gsm8k(output: str) -> str | None:
    """The last number of a text, or of the line after its first ####, without separators ("1,000", 1{,}000), or None.

    >>> parse_gsm8k("48/2 = 24 clips in May, so $1,072.50.")
    '1072.50'
    """
    marked = output.partition("####")[2].split("\n")[0]            # GSM8K's form; a base model goes on after it
    output = plain_thousands((marked if re.search("[0-9]", marked) else output).replace("\u2212", "-"))
    number = r"(?:(?<![\w).])-\$?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))"
    numbers = [match for match in re.findall(number, output) if match]
    return numbers[-1].replace(",", "").replace("$", "") if numbers else None


def plain_thousands(text: str) -> str:
    """LaTeX's separators between thousands, and narrow spaces, as commas."""
    return re.sub("(?<=[0-9])(?:\\{,\\}|,? ?\\\\[,!; ] ?|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ",", text)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} or \\fbox{…}, braces balanced, or None; also of \\boxed 5."""
    text = re.sub(r"\\(?:boxed|fbox)\s{1,9}(-?[0-9](?:[0-9.,/]*[0-9])?|[A-Z](?!\w))", r"\\boxed{\1}", text)
    opened, last = [], None
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened:
            begin = opened.pop()
            if len(begin[0]) > 1 and (last is None or begin.start() > last[0]):
                last = begin.start(), text[begin.end():brace.start()]
    return last and last[1]                                       # one that never closes, cut off, does not count


def plain_answer(answer) -> str:
    """An answer without what does not change its meaning: LaTeX's dressing, spaces, thousands separators, case."""
    text = str(answer).strip().replace("\u2212", "-").rstrip(".").strip()
    boxed = last_boxed(text)
    text = plain_thousands(text if boxed is None else boxed)
    for pattern, plain in DRESSING if len(text) <= 1000 else ():      # longer ones are prose
        text = pattern.sub(plain, text)
    text = " ".join(text.split()).casefold()
    if re.fullmatch(r"\(([^(),]*)\)", text):                      # brackets around one thing
        text = text[1:-1].strip()
    if re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?|[+-]?[0-9]{1,3}( [0-9]{3})+(\.[0-9]*)?", text):
        text = text.replace(",", "").replace(" ", "")
    return re.sub(r"(?<!\w) | (?!\w)|(?<=[0-9]) (?=[a-z])|(?<=[a-z]) (?=[0-9])", "", text)      # but "1 2" is not "12"


def number_in(text: str) -> Fraction | None:
    """The exact value of a plain answer that is an integer, decimal, fraction or mixed number, or None."""
    mixed = re.fullmatch(r"([+-]?)([0-9]{1,50}) ([0-9]{1,20}/[0-9]{1,20})", text)
    if mixed:
        part = number_in(mixed[3])
        return part if part is None else (int(mixed[2]) + part) * (-1 if mixed[1] == "-" else 1)
    # The pattern also keeps out "1e999999999", whose exact value would fill the memory.
    decimal = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,2})?(/-?[0-9]+\.?[0-9]*)?"
    above, _, below = text.partition("/")
    if len(text) > 100 or not re.fullmatch(decimal, text) or (below and not Fraction(below)):
        return None
    return Fraction(above) / Fraction(below or "1")


def same_answer(answer, truth) -> bool:
    """Equal as numbers ("1,000" and 1000, 1/2 and 0.5), part by part between commas, lists in any order, or as strings.

    Nothing equals an answer that is empty.
    """
    if answer is None or truth is None:
        return False
    left, right = plain_answer(answer), plain_answer(truth)
    values = number_in(left), number_in(right)
    if None not in values:
        return values[0] == values[1]
    parts = []
    for text in (left, right):
        parts.append([number_in(part) or part for part in re.split(r"([][(){},])", text) if part])
        if not re.search(r"[\[(]", text):                          # a list or a set, not a pair or an interval
            parts[-1].sort(key=str)
    return parts[0] == parts[1] != []


def gold_answer(text: str) -> str | None:
    """The answer in a data set's solution: what follows ####, else the last \\boxed{…}, else a number that is all."""
    answer = text.split("####")[-1].strip()
    boxed = last_boxed(answer)
    if boxed is None and "####" not in text and number_in(plain_answer(answer)) is None:
        return None
    answer = answer if boxed is None else boxed
    return answer if same_answer(answer, answer) else None


# --- rewards: the same reading, as a number to learn from (align.py) ---

def grade(answer: str | None, truth) -> dict:
    """Rewards of an answer that was read in the right form (None: it was not); truth may be several spellings."""
    truths = truth if isinstance(truth, (list, tuple)) else [truth]
    right = float(any(same_answer(answer, one) for one in truths))
    return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}


def r1_zero_reward(response: str, truth) -> dict:
    """{reward, format_reward, answer_reward}, 0 or 1 each: `</think> <answer>…</answer>` and an answer equal to truth.

    The prompt ends in <think> (2501.12948, 2.2.3). The last such answer counts, up to its closing tag; what follows is
    not read. The form alone earns no reward.
    """
    answers = re.findall(r"</think> <answer>((?:(?!<answer>).)*?)</answer>", response, re.DOTALL)
    return grade(answers[-1] if answers else None, truth)


def boxed_reward(response: str, truth) -> dict:
    """The same for a question asked without a form: the answer is the content of the last \\boxed{…}."""
    return grade(last_boxed(response), truth)


REWARDS = {"r1_zero": r1_zero_reward, "boxed": boxed_reward}
