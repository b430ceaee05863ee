"""Claims about clean.py."""
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common import ROOT
import clean
import data


def test_text_and_language_of_pages_in_any_encoding():
    assert "Straße in Zürich" in data.extract_text(("<p>" + "Die Straße in Zürich ist schön. " * 9).encode() + b"\xe4")   # cut
    for text, language in (("A short text in English.", "en"), ("欢迎来到\n我们的网站", "zh"), ("", "und"),
                           ("half a pair, \ud800, in a text", "en")):
        code, score = data.identify_language(text)
        assert code == language and (0.5 < score <= 1 or not text)


KOREAN, JAPANESE, FRENCH = "안녕하세요 똠방각하", "こんにちは、世界①", "Le cœur coûte 5 € à Noël"


@pytest.mark.parametrize("text, charset, label", [
    (KOREAN, "cp949", "euc-kr"), (KOREAN, "cp949", "ks_c_5601-1987"), (JAPANESE[:-1], "iso-2022-jp", "iso-2022-jp"),
    (JAPANESE, "cp932", "Shift_JIS"), (JAPANESE[:-1], "euc-jp", "x-euc-jp"), (FRENCH, "iso-8859-15", "ISO-8859-15"),
    (FRENCH, "mac_roman", "macintosh"), (FRENCH, "cp1252", "iso-8859-1"), ("漢字镕", "gb18030", "gb2312"), ("漢字", "big5", "Big5")])
def test_a_declared_charset_is_read_where_utf_8_fails(text, charset, label):
    page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset={label}"></head><body><p>{text}'
    assert data.extract_text(page.encode(charset)) == text
    assert data.extract_text(page.encode("utf-8")) == text                       # a label that is wrong does no harm
    bare = f"<html><body><p>{text}".encode(charset)
    assert text in clean.decode_html(bare, label) and text in clean.decode_html(page.encode(charset))
    for wrong in ("utf-8", "none", "x-user-defined", "utf-16", "unicode_escape"):
        assert text in clean.decode_html(page.encode("utf-8"), wrong)


@pytest.mark.parametrize("page, charset, text", [
    ("<meta charset=gb2312><body>" + "<div class=x></div>" * 2000 + "<p>新华社北京电", "gb2312", "新华社北京电"),     # trafilatura 541
    ('<meta content="text/html; charset=iso-8859&#8211;1"><body>Le café où naît', "latin-1", "Le café où naît"),  # warc2zim 417
    ('<?xml version="1.0" encoding="iso-8859-2"?><html><body>Zażółć gęślą', "iso-8859-2", "Zażółć gęślą"),
    ("<meta charset=utf-8><body>Die Straße in Zürich", "cp1252", "Die Straße in Zürich"), ("<body>привет мир", "utf-16", "привет мир"),
    ("<p>" + "Die Straße in Zürich. " * 9, "cp1252", ("Die Straße in Zürich. " * 9).strip()), ("<p>привет мир, как дела", "koi8-r", "привет мир, как дела"),
    ("<title>t</title><body><p>Ein “Café”, 5 €</p><script>x()</script>", "utf-8-sig", "Ein “Café”, 5 €")])
def test_encodings_of_reported_pages(page, charset, text):
    assert data.extract_text(page.encode(charset)) == text


E, P, I = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"


@pytest.mark.parametrize("mask, text, masked, n", [
    (data.mask_emails, f"To a.b+c@x-y.co.uk, {E} and 'q@z.org'. Not a@b.", f"To {E}, {E} and '{E}'. Not a@b.", 2),
    (data.mask_emails, "邮箱bob@x.com请", f"邮箱{E}请", 1),
    (data.mask_phone_numbers, f"2831823829 (283)-182-3829 (283) 182 3829, 283-182-3829. {P} +1 283.182.3829",
     f"{P} {P} {P}, {P}. {P} {P}", 5),
    (data.mask_phone_numbers, "(283)  182  3829 or 283\u00a0 182\u20113829 or 12831823829", f"{P} or {P} or {P}", 3),
    (data.mask_emails, "иван@почта.рф अजय@डाटा.भारत 이름@도메인.한국, jörg@müller.de (фам.иван@x.org)", f"{E} {E} {E}, {E} ({E})", 5),
    (data.mask_emails, "icon@2x.png a@3x.JPG img@1.5x.webp photo@2x-retina.svg @b.com a@b a@@b.org", None, 0),
    (data.mask_phone_numbers, "283-182-3829x12 283\u202f182\u202f3829 283\u2212182\u22123829 283 - 182 - 3829 +1 283 – 182 – 3829 "
     "(283) 182-3829 x12", f"{P}x12 {P} {P} {P} {P} {P} x12", 6),
    (data.mask_phone_numbers, "283-182-3829xyz 283-182-3829x1234567 283 -- 182 -- 3829 283   182 3829, x2831823829", None, 0),
    (data.mask_phone_numbers, "28318238291 and 3.2831823829 and 2831823829.5 and 283-18-3829", None, 0),
    (data.mask_ips, f"192.0.2.146. {I} (10.0.0.255:80)", f"{I}. {I} ({I}:80)", 2),
    (data.mask_ips, "256.1.1.1 and 1.2.3.4.5 and v1.2.3.4", None, 0)])
def test_masks(mask, text, masked, n):
    assert mask(text) == (masked or text, n) and mask(mask(text)[0]) == (masked or text, 0)


@pytest.mark.parametrize("text, keep", [
    ("word " * 49, False), ("word " * 50, True), ("word " * 100_001, False), ("word. -- " * 49, False), ("aa " * 99, False),
    ("aaa, " * 99, True), ("aaaaaaaaaaa " * 60, False), ("word " * 80 + "1234 " * 20, True), ("word " * 79 + "1234 " * 21, False),
    ("é " * 20 + "añbc " * 80, True), ("привет " * 80 + "1234 " * 21, False), ("word\n" * 70 + "word...\n" * 30, True),
    ("word\n" * 69 + "word…\n" * 31, False)])
def test_gopher(text, keep):
    assert data.gopher_filter(text) is keep


def repetition(text):
    return clean.repetition_reason(text, *clean.hash_words(clean.normalize(text)))


@pytest.mark.parametrize("n, times", [(2, 250), (3, 150), (99, 2)])
def test_repetition_rules_against_counting_by_hand(n, times):
    words = [f"x{i}" for i in range(900)]
    for i in range(times):
        words[10 + i * (n + 1):10 + i * (n + 1)] = [f"w{j}" for j in range(n)]
    assert repetition(" ".join(words[-500:])) == "" and "lines are duplicates" in repetition("\n".join("aaaaabcdef"))
    for m in range(2, 11):
        grams = Counter(tuple(words[i:i + m]) for i in range(len(words) - m + 1))
        gram, most = max(grams.items(), key=lambda pair: (pair[1], sum(map(len, pair[0]))))
        held = {j for i in range(len(words) - m + 1) if grams[tuple(words[i:i + m])] > 1 for j in range(i, i + m)}
        size = most * sum(map(len, gram)) * (most > 1) if m < 5 else sum(len(words[j]) for j in held)
        share = size / sum(map(len, words))
        if share > {2: 0.2, 3: 0.18, 4: 0.16, 5: 0.15}.get(m, 0.2 - 0.01 * m):
            break
    assert f"{m}-gram" in repetition(" ".join(words)) and f"{share:.0%}" in repetition(" ".join(words))


def test_words_are_hashed_one_by_one_and_alike_wherever_they_stand():
    assert clean.normalize("The Café's\nDOOR!") == b"the cafes door"
    rng = random.Random(0)
    words = [b"%x" % rng.randrange(1 << 20) for _ in range(60_000)]                # several blocks of text
    hashes, lengths = clean.hash_words(b"  ".join(words) + b" ")
    assert lengths.tolist() == [len(word) for word in words]
    assert len(set(zip(words, hashes.tolist()))) == len(set(words)) == len(set(hashes.tolist()))
    assert clean.hash_words(b"one " + b"z" * 10**6)[1].sum() == 3 + 10**6 and len(clean.hash_words(b"  ")[0]) == 0


def test_signatures_agree_as_often_as_the_sets():
    text = "to be or not to be that is the question whether tis nobler in the mind"
    shingles = set(clean.shingles_of(text, 2).tolist())
    assert len(shingles) == 14 and clean.jaccard({1, 2, 3}, {5, 2, 3, 4}) == 2 / 5
    fast = clean.minhash(np.array(sorted(shingles), dtype=np.uint64), 32, seed=3)
    assert fast.tolist() == clean.minhash_by_sets(shingles, 32, seed=3)            # the form to read and the fast one
    assert clean.minhash(np.zeros(0, np.uint64), 4).tolist() == clean.minhash_by_sets(set(), 4) == [2 ** 32 - 1] * 4
    rng, n, s = np.random.default_rng(0), 300, 0.7                # pairs of sets with nearly this similarity
    shared, alone = round(200 * s / (1 + s)), round(100 * (1 - s) / (1 + s))
    sets, true = rng.integers(0, 1 << 63, (n, shared + 2 * alone), dtype=np.uint64), shared / (shared + 2 * alone)
    pairs = [part for one in sets for part in (one[:shared + alone], one[alone:])]
    signatures = np.stack([clean.minhash(part, 128) for part in pairs])
    found = clean.near_duplicates(signatures, lambda i: f"text {i // 2}", 16, 5, 1.0)
    for share, chance, size in (((signatures[::2] == signatures[1::2]).mean(), true, 128 * n),
                                (len(found) / n, 1 - (1 - true ** 8) ** 16, n)):
        assert abs(share - chance) < 4 * (chance * (1 - chance) / size) ** 0.5, (share, chance)       # four sigma, seeded


def test_a_group_of_near_duplicates_is_compared_in_linear_time():
    asked, n = Counter(), 600
    signatures = np.tile(np.arange(8, dtype=np.uint32), (n, 1))

    def text_of(i):
        asked[i] += 1
        return f"the same page of cookies in every place, number {i % 3} of three" if i % 3 else "the same page"
    clusters = clean.near_duplicates(signatures, text_of, 2, 3, 0.8)
    assert sorted(map(len, clusters)) == [200, 200, 200]
    assert sum(asked.values()) < 3 * n


def test_near_duplicates_leave_one_file_of_each_cluster(tmp_path):
    words = random.Random(0).choices([f"word{i}" for i in range(500)], k=200)
    texts = {"a": " ".join(words), "b": " ".join(words), "d": " ".join(words[:100]), "e": "", "f": "",
             "c": "Ünd,\n\n" + ",\t".join(words).upper()}
    kept, paths = set(), [tmp_path / name for name in texts]
    for path, text in zip(paths, texts.values()):
        path.write_text(text, encoding="utf-8")
    for seed in range(6):
        (cluster,) = data.dedup_minhash(paths, 100, 20, 5, 0.8, tmp_path / f"out{seed}", seed=seed)
        left = {path.name for path in (tmp_path / f"out{seed}").iterdir()}
        assert sorted(Path(path).name for path in cluster) == list("abc") and left == {*"def", Path(cluster[0]).name}
        kept |= left
    assert len(kept) > 4 and not (tmp_path / "out0" / "e").read_bytes()     # the seed chooses; empty files stay
    with pytest.raises(ValueError, match="input files themselves"):
        data.dedup_lines(paths, tmp_path)
    for paths, bands, words in ((paths[:1], 30, "no multiple of num_bands=30"), (paths[:1] * 2, 20, "share a name")):
        with pytest.raises(ValueError, match=words):
            data.dedup_minhash(paths, 100, bands, 5, 0.8, tmp_path / "out")
    assert (tmp_path / "a").read_text(encoding="utf-8") == texts["a"]


def test_lines_that_stand_more_than_once_go(tmp_path):
    texts = {"a": b"only a\nmenu\r\nlast", "b": b"menu\nonly b\xff\nlast\n", "c": b"", "d": b"twice\ntwice\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for first, gone, left in ((False, 6, [b"only a\n", b"only b\xff\n", b"", b""]),
                              (True, 3, [texts["a"], b"only b\xff\n", b"", b"twice\n"])):
        assert data.dedup_lines([tmp_path / name for name in texts], tmp_path / "out", keep_first=first) == gone
        assert [(tmp_path / "out" / name).read_bytes() for name in texts] == left


def test_workers_start_without_torch():
    code = "import curate, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
