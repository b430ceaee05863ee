"""Claims about curate.py."""
import contextlib
import gzip
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import ROOT
import curate
import data


def warc_record(address, body: bytes, kind=b"text/html", status=b"200 OK") -> bytes:
    """One response as it stands in a WARC file."""
    http = b"HTTP/1.1 %s\r\nContent-Type: %s\r\n\r\n%s" % (status, kind, body)
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/http; "
            f"msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n").encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_an_archive_gives_its_pages_and_counts_what_is_none(tmp_path, pack, monkeypatch):
    page, damage = b"<p>" + os.urandom(400).hex().encode(), Counter()

    def read(*members):
        (tmp_path / "x.warc").write_bytes(b"".join(members))
        damage.clear()
        return "".join(a[-1] for a, body, html in curate.read_archive(tmp_path / "x.warc", damage)), dict(damage)
    a, b, d = (pack(warc_record(f"http://a/{i}", page)) for i in (0, 1, 3))
    assert read(a, b, d) == ("013", {}) and read() == ("", {})
    assert read(a, b[:-40]) == ("0", {"truncated": 1}) and read(a, bytes(99), d)[0][0] == "0"
    wet = pack(b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: w\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n")
    assert read(a, wet, d) == ("0w3", {})
    others = pack(warc_record("x", page, kind=b"image/png")), pack(warc_record("x", page, status=b"404 No"))
    assert read(a, *others, d) == ("03", {"no page": 2})
    monkeypatch.setattr(curate, "MAX_PAGE_BYTES", len(page) - 1)
    assert read(a, b) == ("", {"too large": 2})


def hanging(page, main_content):
    """For the extraction process of the next test."""
    if page == b"hang":
        __import__("time").sleep(10**4)
    return page.decode("utf-8") if page != b"die" else os._exit(1)


def test_a_page_that_hangs_or_kills_its_parser_costs_one_page():
    with contextlib.closing(curate.Extractor(function=hanging, seconds=1.0)) as extract:
        answers = [extract(page) for page in (b"a", b"hang", b"b", b"die", b"\xff", b"c" * 10**6, b"d")]
    assert answers == [("a", ""), ("", "too slow"), ("b", ""), ("", "crashed"), ("", "not parsed: UnicodeDecodeError"),
                       ("c" * 10**6, ""), ("d", "")]


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
        "archive": 48, "text": 47, "language": 46, "masks": 46, "gopher": 45, "repetition": 44, "evaluation": 43,
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
    for languages, words in (("eng", "'eng' is no language.*Did you mean en"), ("en, xx", "'xx'")):
        with pytest.raises(ValueError, match=words):
            curated(archives, tmp_path / "5", languages=languages)


def test_an_input_of_which_nothing_can_be_read_is_named(archives, tmp_path):
    good = tmp_path / "wiki[1].warc.gz"                                    # a name, not a pattern
    good.write_bytes((archives / "0.warc.gz").read_bytes())
    for name, content in (("text.warc.gz", b"no archive at all" * 50), ("empty.warc.gz", b"")):
        (tmp_path / name).write_bytes(content)
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(ValueError, match=r"empty.warc.gz: no page.*text.warc.gz: no page"):
            data.curate(str(tmp_path / "*.warc.gz"), tmp_path / "out", executor=threads)
        assert (tmp_path / "out" / "counts" / "wiki[1].warc.gz.json").exists()     # the others are done all the same
        report = data.curate([good], tmp_path / "out", executor=threads)
    assert report["funnel"]["archive"][0] == 16


def test_curate_on_a_dask_cluster(archives, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        files = curated(archives, tmp_path / "dask", scheduler=cluster.scheduler_address)[1]
    assert files == curated(archives, tmp_path / "1")[1]
