"""Claims about archive.py."""
import contextlib
import gzip
import os
import time
import zlib
from collections import Counter

import pytest

from common import warc_record
import archive

PAGE = "<p>Eine Straße in Zürich, 300 Wörter lang. ".encode() * 20


def read(path, *members):
    """(addresses, pages, what was counted) of an archive of these bytes."""
    path.write_bytes(b"".join(members))
    damage = Counter()
    rows = list(archive.read_archive(path, damage))
    return "".join(address[-1] for address, *_ in rows), [page for _, page, _ in rows], dict(damage)


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_an_archive_gives_its_pages_and_counts_what_is_none(tmp_path, pack, monkeypatch):
    a, b, d = (pack(warc_record(f"http://a/{i}", os.urandom(400).hex().encode())) for i in (0, 1, 3))
    wet = pack(b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: w\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n")
    png, missing = (pack(warc_record("x", PAGE, **kind)) for kind in (dict(kind=b"image/png"), dict(status=b"404 No")))
    for members, addresses, counted in (((a, b, d), "013", {}), ((), "", {}), ((a, b[:-40]), "0", {"truncated": 1}),
                                        ((a, bytes(99), d), "03", {"damaged": 1}), ((a, wet, d), "0w3", {}),
                                        ((a, png, missing, d), "03", {"no page": 2})):
        assert read(tmp_path / "x", *members)[::2] == (addresses, counted)
    monkeypatch.setattr(archive, "MAX_PAGE_BYTES", 799)
    assert read(tmp_path / "x", a, b)[::2] == ("", {"too large": 2})


def chunks(body: bytes) -> bytes:
    """A body as `Transfer-Encoding: chunked` sends it."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:40], body[40:])) + b"0\r\n\r\n"


CH, GZ, BR = b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Content-Encoding: br"
BROTLI = bytes.fromhex("0b058068656c6c6f20776f726c6403")                 # "hello world", by the brotli package


@pytest.mark.parametrize("name, body, headers, page", [
    ("packed and chunked", chunks(gzip.compress(PAGE)), [CH, GZ], PAGE), ("empty", b"", [GZ, CH], b""),
    ("brotli, chunked", chunks(BROTLI), [CH, BR], b"hello world"), ("not brotli", PAGE, [BR], PAGE),
    ("zlib", zlib.compress(PAGE), [b"Content-Encoding: deflate"], PAGE), ("neither", PAGE, [CH, GZ], PAGE),
    ("joined before", gzip.compress(PAGE), [CH, GZ], PAGE), ("cut in a chunk", chunks(PAGE)[:-30], [CH], PAGE[:-23]),
    ("with extensions", b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n", [CH], b"hello"), ("upper case", PAGE, [], PAGE),
    ("begins like a chunk", b"a\r\n" + PAGE, [CH], b"a\r\n" + PAGE),
    ("charset", "안녕 똠".encode("cp949"), [], "안녕 똠".encode())])
def test_pages_are_unpacked_as_they_are_not_as_they_say(tmp_path, name, body, headers, page):
    kind = {"upper case": b"Text/HTML", "charset": b"text/html; charset=EUC-KR"}.get(name, b"text/html")
    record, whole = warc_record("http://a/x", body, kind, headers=headers), warc_record("http://a/z", PAGE)
    _, pages, damage = read(tmp_path / "x", *map(gzip.compress, (whole, record, whole, whole)))
    assert pages == [PAGE, page, PAGE, PAGE] and not damage, name


@pytest.mark.parametrize("name, between, pages", [
    ("an empty member", gzip.compress(b""), "012"), ("noise", os.urandom(5000), "012"),
    ("a member cut short", gzip.compress(warc_record("http://a/x", os.urandom(900)))[:500], "012"),
    ("a length too short", gzip.compress(warc_record("http://a/x", PAGE, length=300)), "0x12"),
    ("a length too long", gzip.compress(warc_record("http://a/x", PAGE, length=9000)), "012"),
    ("no WARC", gzip.compress(b"hello\r\n" * 99), "012"), ("a broken head", b"\x1f\x8b\x08\x00" * 30, "012"),
    ("ten of them", (gzip.compress(b"") + bytes(9)) * 10, "012"), ("before the first", b"\xef\xbb\xbf noise", "012")])
def test_reading_goes_on_behind_what_cannot_be_read(tmp_path, name, between, pages):
    a, *rest = (gzip.compress(warc_record(f"http://a/{i}", PAGE + b"%d" % i)) for i in range(3))
    start = (between, a) if name == "before the first" else (a, between)
    addresses, _, damage = read(tmp_path / "x", *start, *rest)
    assert addresses == pages and damage.pop("damaged") == 1 and set(damage) <= {"truncated"}, (name, addresses)


def odd_parser(page):
    """For the extraction process of the next test."""
    if page == b"hang":
        time.sleep(10**4)
    return page.decode("utf-8") if page != b"die" else os._exit(1)


def test_a_page_that_hangs_or_kills_its_parser_costs_one_page():
    with contextlib.closing(archive.Extractor(odd_parser, seconds=1.0)) as extract:
        answers = [extract(page) for page in (b"a", b"hang", b"b", b"die", b"\xff", b"c" * 10**6)]
    assert answers == [("a", ""), ("", "too slow"), ("b", ""), ("", "crashed"), ("", "not parsed: UnicodeDecodeError"),
                       ("c" * 10**6, "")]
