"""Claims about clean.py."""
import random
from collections import Counter

import numpy as np
import pytest

import clean
import data


def test_text_and_language_of_pages_in_any_encoding():
    cut = ("<p>" + "Die Straße in Zürich ist schön. " * 9).encode() + b"\xe4"
    assert "Straße in Zürich" in data.extract_text(cut)
    for text, language in (("A short text in English.", "en"), ("欢迎来到\n我们的网站", "zh"), ("", "und"),
                           ("half a pair, \ud800, in a text", "en")):
        code, score = data.identify_language(text)
        assert code == language and (0.5 < score <= 1 or not text)


META = '<html><head><meta http-equiv="Content-Type" content="text/html; charset={}"></head><body><p>'


@pytest.mark.parametrize("head, charset, text", [
    (META.format("euc-kr"), "cp949", "안녕 똠방각하"), (META.format("Shift_JIS"), "cp932", "世界①"),
    (META.format("iso-2022-jp"), "iso-2022-jp", "こんにちは、世界"), (META.format("macintosh"), "mac_roman", "à Noël, 5 €"),
    (META.format("iso-8859-15"), "iso-8859-15", "Le cœur 5 €"), (META.format("iso-8859-1"), "cp1252", "5 € à Noël"),
    ("<meta charset=gb2312><body>" + "<div></div>" * 4000 + "<p>", "gb18030", "新华社北京电镕"),         # trafilatura 541
    ('<meta content="charset=iso-8859&#8211;1"><body>', "latin-1", "Le café où naît"),                # warc2zim 417
    ('<?xml version="1.0" encoding="iso-8859-2"?><html><body>', "iso-8859-2", "Zażółć gęślą"),
    ("<meta charset=utf-8><body>", "cp1252", "Die Straße in Zürich"), ("<body>", "utf-16", "привет мир"),
    ("<p>", "koi8-r", "привет мир, как дела"), ("<script>x()</script><p>", "utf-8-sig", "Ein “Café”, 5 €")])
def test_a_declared_charset_is_read_where_utf_8_fails(head, charset, text):
    assert data.extract_text((head + text).encode(charset)) == text
    assert text in clean.decode_html((head + text).encode("utf-8"), "utf-16")      # a label that is wrong does no harm


E, P, I = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"


@pytest.mark.parametrize("mask, text, masked", [
    (data.mask_emails, f"To a.b+c@x-y.co.uk, {E} and 'q@z.org'. Not a@b.", f"To {E}, {E} and '{E}'. Not a@b."),
    (data.mask_emails, "邮箱bob@x.com请 иван@почта.рф, jörg@müller.de (фам.иван@x.org)", f"邮箱{E}请 {E}, {E} ({E})"),
    (data.mask_emails, "icon@2x.png img@1.5x.webp @b.com a@b a@@b.org", None),
    (data.mask_phone_numbers, f"2831823829 (283)-182-3829 {P} +1 283.182.3829", f"{P} {P} {P} {P}"),
    (data.mask_phone_numbers, "(283)  182  3829 or 283\u00a0 182\u20113829 or 12831823829", f"{P} or {P} or {P}"),
    (data.mask_phone_numbers, "283-182-3829x12 283\u202f182\u202f3829 +1 283 – 182 – 3829", f"{P}x12 {P} {P}"),
    (data.mask_phone_numbers, "283-182-3829ext5 283-182-3829extra", f"{P}ext5 283-182-3829extra"),
    (data.mask_phone_numbers, "283-182-3829xyz 283 -- 182 -- 3829 283   182 3829, x2831823829 28318238291", None),
    (data.mask_phone_numbers, "3.2831823829 and 2831823829.5 and 283-18-3829", None),
    (data.mask_ips, f"192.0.2.146. {I} (10.0.0.255:80)", f"{I}. {I} ({I}:80)"),
    (data.mask_ips, "256.1.1.1 and 1.2.3.4.5 and v1.2.3.4", None)])
def test_masks(mask, text, masked):
    n = masked.count("|||") // 2 - text.count("|||") // 2 if masked else 0
    assert mask(text) == (masked or text, n) and mask(mask(text)[0]) == (masked or text, 0)


@pytest.mark.parametrize("text, keep", [
    ("word " * 49, False), ("word " * 50, True), ("word " * 100_001, False), ("word. -- " * 49, False),
    ("aa " * 99, False), ("aaa, " * 99, True), ("aaaaaaaaaaa " * 60, False), ("word " * 80 + "1234 " * 20, True),
    ("word " * 79 + "1234 " * 21, False), ("é " * 20 + "añbc " * 80, True), ("привет " * 80 + "1234 " * 21, False),
    ("привет " * 80, True), ("word\n" * 70 + "word...\n" * 30, True), ("word\n" * 69 + "word…\n" * 31, False)])
def test_gopher(text, keep):
    assert data.gopher_filter(text) is data.gopher_filter(text.replace(" ", "\u3000")) is keep


@pytest.mark.parametrize("n, times", [(2, 250), (3, 150), (99, 2)])
def test_repetition_rules_against_counting_by_hand(n, times):
    def reason(text):
        return clean.repetition_reason(text, *clean.hash_words(clean.normalize(text)))
    words = [f"x{i}" for i in range(900)]
    for i in range(times):
        words[10 + i * (n + 1):10 + i * (n + 1)] = [f"w{j}" for j in range(n)]
    assert reason(" ".join(words[-500:])) == "" and "lines are duplicates" in reason("\n".join("aaaaabcdef"))
    for m, limit in clean.NGRAM_SHARES.items():
        grams = Counter(tuple(words[i:i + m]) for i in range(len(words) - m + 1))
        gram, most = max(grams.items(), key=lambda pair: (pair[1], sum(map(len, pair[0]))))
        held = {j for i in range(len(words) - m + 1) if grams[tuple(words[i:i + m])] > 1 for j in range(i, i + m)}
        size = most * sum(map(len, gram)) * (most > 1) if m < 5 else sum(len(words[j]) for j in held)
        share = size / sum(map(len, words))
        if share > limit:
            break
    assert f"{m}-gram" in reason(" ".join(words)) and f"{share:.0%}" in reason(" ".join(words))


def test_signatures_agree_as_often_as_the_sets():
    text = "to be or not to be that is the question whether tis nobler in the mind"
    shingles = set(clean.shingles_of(text, 2).tolist())
    assert len(shingles) == 14 and clean.jaccard({1, 2, 3}, {5, 2, 3, 4}) == 2 / 5
    fast = clean.minhash(np.array(sorted(shingles), dtype=np.uint64), 32, seed=3)
    assert fast.tolist() == clean.minhash_by_sets(shingles, 32, seed=3)            # the form to read and the fast one
    assert clean.minhash(np.zeros(0, np.uint64), 4).tolist() == clean.minhash_by_sets(set(), 4) == [2 ** 32 - 1] * 4
    texts = [text, "", "Ünd \0 one", "two words", text * 2000, text[5:]]           # many at once: as one by one
    one_by_one = [clean.minhash_by_sets(set(clean.shingles_of(each, 3).tolist()), 8, seed=1) for each in texts]
    assert clean.signatures_of(texts, 3, 8, seed=1).tolist() == one_by_one
    rng, n, s = np.random.default_rng(0), 300, 0.7                # pairs of sets with nearly this similarity
    shared, alone = round(200 * s / (1 + s)), round(100 * (1 - s) / (1 + s))
    sets, true = rng.integers(0, 1 << 63, (n, shared + 2 * alone), dtype=np.uint64), shared / (shared + 2 * alone)
    pairs = [part for one in sets for part in (one[:shared + alone], one[alone:])]
    signatures = np.stack([clean.minhash(part, 128) for part in pairs])
    clusters = clean.near_duplicates(signatures, lambda i: f"text {i // 2}", 16, 5, 1.0)
    for share, chance, size in (((signatures[::2] == signatures[1::2]).mean(), true, 128 * n),
                                (len(clusters) / n, 1 - (1 - true ** 8) ** 16, n)):
        assert abs(share - chance) < 4 * (chance * (1 - chance) / size) ** 0.5, (share, chance)     # four sigma


def test_only_documents_with_an_equal_band_are_compared():
    signatures = np.array([[1, 2, 3, 4], [1, 2, 8, 9], [7, 8, 3, 4], [1, 9, 3, 9]], dtype=np.uint32)    # bands of two
    asked = []
    clusters = clean.near_duplicates(signatures, lambda i: asked.append(i) or "one and the same text", 2, 2, 0.8)
    assert clusters == [[0, 1, 2]] and set(asked) == {0, 1, 2}, "the last shares as many numbers, but no band"


def test_a_group_of_near_duplicates_is_compared_in_linear_time():
    asked, texts = [], ("the same page", "the same page of cookies in every place, number 1", "number 2 of others")
    signatures = np.tile(np.arange(8, dtype=np.uint32), (600, 1))
    clusters = clean.near_duplicates(signatures, lambda i: asked.append(i) or texts[i % 3], 2, 3, 0.8)
    assert sorted(map(len, clusters)) == [200, 200, 200] and len(asked) < 3 * 600


def test_near_duplicates_leave_one_file_of_each_cluster(tmp_path):
    words = random.Random(0).choices([f"word{i}" for i in range(500)], k=200)
    texts = {"a": " ".join(words), "b": " ".join(words), "d": " ".join(words[:100]), "e": "", "f": "",
             "c": "Ünd,\n\n" + ",\t".join(words).upper()}
    paths = [tmp_path / name for name in texts]
    for path, text in zip(paths, texts.values()):
        path.write_text(text, encoding="utf-8")
    for seed in range(3):
        (cluster,) = data.dedup_minhash(paths, 100, 20, 5, 0.8, tmp_path / "out", seed=seed)
        assert cluster == [str(tmp_path / name) for name in "abc"]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*"adef"}
        assert not (tmp_path / "out" / "e").read_bytes()                   # empty files stay
    with pytest.raises(ValueError, match="input files themselves"):
        data.dedup_lines(paths, tmp_path)
    for paths, bands, words in ((paths[:1], 30, "multiple of num_bands=30"), (paths[:1] * 2, 20, "share a name")):
        with pytest.raises(ValueError, match=words):
            data.dedup_minhash(paths, 100, bands, 5, 0.8, tmp_path / "out")


def test_lines_that_stand_more_than_once_go(tmp_path):
    texts = {"a": b"only a\nmenu\r\nlast", "b": b"menu\nonly b\xff\nlast\n", "c": b"", "d": b"twice\ntwice\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    assert data.dedup_lines([tmp_path / name for name in texts], tmp_path / "out") == 6
    left = [(tmp_path / "out" / name).read_bytes() for name in texts]
    assert left == [b"only a\n", b"only b\xff\n", b"", b""]
