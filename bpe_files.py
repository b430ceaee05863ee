"""How others keep a byte-level BPE vocabulary: Hugging Face's tokenizer.json, GPT-2's vocab.json and merges.txt.

Both write a byte as a printable character: "␠the" is "Ġthe". What a file says and this project does not do is refused
by name where it would change ids.
"""
import json
from pathlib import Path

import regex

from words import GPT2_PATTERN, GPT2_PATTERNS, check_utf8, utf8


def _gpt2_alphabet():
    """GPT-2 writes bytes as printable characters: those that are one as themselves, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(hidden)}


_TO_CHAR = _gpt2_alphabet()
_TO_BYTE = {c: b for b, c in _TO_CHAR.items()}


def to_text(token):
    """Bytes in GPT-2's alphabet."""
    return "".join(map(_TO_CHAR.__getitem__, token))


def read_json(path):
    """The content of a JSON file."""
    text = check_utf8(Path(path).read_bytes(), path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def vocab_from_text(vocab, added):
    """{text in GPT-2's alphabet: id} -> {id: bytes}; the texts in `added` are written plainly."""
    tokens = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or not 0 <= i < 2 ** 31 or i in tokens:
            raise ValueError(f"vocabulary entry {text!r} has the id {i!r}: ids are integers from 0, each given once")
        try:
            tokens[i] = utf8(text) if text in added else bytes(map(_TO_BYTE.__getitem__, text))
        except KeyError as error:
            raise ValueError(f"vocabulary entry {text!r} (id {i}) holds {error.args[0]!r}, which is no byte in "
                             "GPT-2's alphabet: not a byte-level vocabulary") from None
    return tokens


def merges_from_text(merges):
    """["a b", …] or [["a", "b"], …] -> pairs of bytes."""
    pairs = []
    for merge in merges:
        try:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((bytes(map(_TO_BYTE.__getitem__, a)), bytes(map(_TO_BYTE.__getitem__, b))))
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"merge {len(pairs)} is {merge!r}; it must be two tokens in GPT-2's alphabet") from None
    return pairs


def _only(part, value, *allowed):
    """`value` if it is one of `allowed`; anything else would change ids, so it is refused by name."""
    if value not in allowed:
        raise ValueError(f"{part} is {value!r}; understood: {' or '.join(map(repr, allowed))}")
    return value


def _layout_pattern(section):
    """The pattern of a pre_tokenizer section, or a tuple of them: Digits and Splits in a row, ByteLevel at the end."""
    *steps, last = section["pretokenizers"] if section["type"] == "Sequence" else [section]
    _only("the last pre_tokenizer", last["type"], "ByteLevel")
    _only("pre_tokenizer's add_prefix_space", last.get("add_prefix_space", True), False)
    patterns = tuple(map(_split_pattern, steps))
    if last.get("use_regex", True):
        patterns = (*patterns, GPT2_PATTERN)
    if not patterns:
        raise ValueError("pre_tokenizer's use_regex is False and no Split stands before it: understood with one only")
    return patterns[0] if len(patterns) == 1 else patterns


def _split_pattern(step):
    """What one step before ByteLevel cuts out as words."""
    if _only("pre_tokenizer", step["type"], "Split", "Digits") == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    text = step["pattern"]
    text = text["Regex"] if "Regex" in text else regex.escape(text["String"])
    if step.get("behavior") == "Removed" and step.get("invert"):
        # What does not match is removed: nothing, where a match can begin at any character, whatever follows.
        match, codes = regex.compile(text).match, [code for code in range(0x20000) if not 0xD800 <= code < 0xE000]
        left = [chr(code) for code in codes if not all(match(chr(code) + following) for following in ("", "a", " "))]
        if left:
            raise ValueError(f"pre_tokenizer's Split removes what its pattern leaves, such as {left[0]!r}")
        return text
    _only("pre_tokenizer's Split behavior", step["behavior"], "Isolated")
    # Here [a&&[bc]] are characters, in Hugging Face's library a set and another that it is cut with.
    if regex.search(r"\[[^\]]*(?:\[(?!:)|&&)", regex.sub(r"\\.", "", text)):
        raise ValueError(f"pre_tokenizer's Split has a set inside a set or &&: {text!r:.80}")
    return text


def read_gpt2_files(vocab_path, merges_path, special_tokens):
    """(vocab, merges) of GPT-2's two files. Raises ValueError naming them."""
    lines = check_utf8(Path(merges_path).read_bytes(), merges_path).splitlines()
    try:
        merges = merges_from_text([line for line in lines if line and not line.startswith("#version")])
        return vocab_from_text(read_json(vocab_path), special_tokens), merges
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{vocab_path} and {merges_path} are no vocab.json and merges.txt: {error}") from None


def read_tokenizer_json(path, make):
    """make(vocab, merges, special_tokens, pattern=, …) with what a tokenizer.json says. Raises ValueError naming it."""
    layout = read_json(path)
    try:
        return _from_layout(make, layout)
    except (ValueError, TypeError, KeyError, AttributeError, regex.error) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no tokenizer.json that this tokenizer understands: {what}") from None


def _from_layout(make, layout):
    """The parsed file's parts, each checked, handed to `make`."""
    model, added, normalizer = layout["model"], layout.get("added_tokens") or [], layout.get("normalizer")
    _only("model's type", model.get("type", "BPE"), "BPE")
    for key in ("byte_fallback", "dropout", "end_of_word_suffix", "continuing_subword_prefix"):
        _only(f"model's {key}", model.get(key) or None, None)
    if normalizer and normalizer["type"] == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = (normalizer["normalizers"] or [None])[0]
    if normalizer:
        normalizer = _only("normalizer", normalizer["type"], "NFC")
    if layout.get("decoder"):
        _only("decoder", layout["decoder"]["type"], "ByteLevel")
    for token in added:
        # Found before normalising or after is the same only where nothing is normalised.
        for key in ("single_word", "lstrip", "rstrip", *(["normalized"] if normalizer else [])):
            _only(f"{key} of the added token {token['content']!r}", token.get(key, False), False)
    ids = {token["content"]: token["id"] for token in added}
    if bytes_named := [text for text in ids if text in _TO_BYTE and text in model["vocab"] and not text.isascii()]:
        raise ValueError(f"{bytes_named[0]!r} is an added token and the name of byte {_TO_BYTE[bytes_named[0]]:#x}")
    vocab = vocab_from_text(model["vocab"], ids)
    for i, text in vocab_from_text(ids, ids).items():
        _only(f"id {i}, given to the added token {text.decode()!r}, in the vocabulary", vocab.setdefault(i, text), text)
    return make(vocab, merges_from_text(model["merges"]), [t["content"] for t in added if t.get("special")],
                pattern=_layout_pattern(layout["pre_tokenizer"]), normalizer=normalizer,
                added={t["content"]: t["id"] for t in added if not t.get("special")},
                ignore_merges=bool(model.get("ignore_merges")))


def tokenizer_json(tokenizer):
    """The text of a tokenizer.json, from which Hugging Face's library gives the same ids as `tokenizer`."""
    names = {i: text for text, i in (tokenizer.special_tokens | tokenizer.added).items()}
    vocab = {names.get(i) or to_text(token): i for i, token in sorted(tokenizer.vocab.items())}
    plain = {to_text(token): token for i, token in tokenizer.vocab.items() if i not in names}
    if twice := [text for text in names.values() if plain.get(text, utf8(text)) != utf8(text)]:
        raise ValueError(f"the special token {twice[0]!r} is also how the file writes other bytes; choose another")
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": text in tokenizer.special_tokens} for i, text in sorted(names.items())]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    patterns = tokenizer.pattern if isinstance(tokenizer.pattern, tuple) else (tokenizer.pattern,)
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
              for pattern in patterns]
    steps = {"type": "Sequence", "pretokenizers": [*splits, {**level, "use_regex": False}]}
    model = {"type": "BPE", "byte_fallback": False, "ignore_merges": tokenizer.ignore_merges, "vocab": vocab,
             "merges": [f"{to_text(a)} {to_text(b)}" for a, b in tokenizer.merges]}
    layout = {"version": "1.0", "added_tokens": added, "model": model, "decoder": level,
              "normalizer": {"type": tokenizer.normalizer} if tokenizer.normalizer else None,
              "pre_tokenizer": level if tokenizer.pattern in GPT2_PATTERNS else steps}
    return json.dumps(layout, ensure_ascii=False, indent=1)
