"""Claims about archive.py."""
import contextlib
import gzip
import os
import zlib
from collections import Counter

import pytest

from common import warc_record
import archive


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_an_archive_gives_its_pages_and_counts_what_is_none(tmp_path, pack, monkeypatch):
    page, damage = b"<p>" + os.urandom(400).hex().encode(), Counter()

    def read(*members):
        (tmp_path / "x.warc").write_bytes(b"".join(members))
        damage.clear()
        return "".join(a[-1] for a, body, html in archive.read_archive(tmp_path / "x.warc", damage)), dict(damage)
    a, b, d = (pack(warc_record(f"http://a/{i}", page)) for i in (0, 1, 3))
    assert read(a, b, d) == ("013", {}) and read() == ("", {})
    assert read(a, b[:-40]) == ("0", {"truncated": 1}) and read(a, bytes(99), d) == ("03", {"damaged": 1})
    wet = pack(b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: w\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n")
    assert read(a, wet, d) == ("0w3", {})
    assert read(a, pack(warc_record("x", page, kind=b"image/png")), d) == ("03", {"no page": 1})
    assert read(a, pack(warc_record("x", page, status=b"404 No")), d) == ("03", {"no page": 1})
    monkeypatch.setattr(archive, "MAX_PAGE_BYTES", len(page) - 1)
    assert read(a, b) == ("", {"too large": 2})


def chunks(body: bytes) -> bytes:
    """A body as `Transfer-Encoding: chunked` sends it."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:40], body[40:])) + b"0\r\n\r\n"


PAGE = "<p>Eine Straße in Zürich, 300 Wörter lang. ".encode() * 20
CH, GZ, BR = b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Content-Encoding: br"
BROTLI = bytes.fromhex("0b058068656c6c6f20776f726c6403")                 # "hello world", by the brotli package


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
@pytest.mark.parametrize("name, body, headers, page", [
    ("packed and chunked", chunks(gzip.compress(PAGE)), [CH, GZ], PAGE), ("empty", b"", [GZ, CH], b""),
    ("brotli, chunked", chunks(BROTLI), [CH, BR], b"hello world"), ("not brotli", PAGE, [BR], PAGE),
    ("zlib", zlib.compress(PAGE), [b"Content-Encoding: deflate"], PAGE), ("neither", PAGE, [CH, GZ], PAGE),
    ("bare deflate", zlib.compress(PAGE)[2:-4], [b"Content-Encoding: deflate"], PAGE),
    ("joined before", gzip.compress(PAGE), [CH, GZ], PAGE), ("cut in a chunk", chunks(PAGE)[:-30], [CH], PAGE[:-23]),
    ("two members", gzip.compress(PAGE) * 2, [GZ], PAGE * 2), ("no such coding", PAGE, [b"Content-Encoding: UTF-8"], PAGE),
    ("with extensions", b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n", [CH], b"hello"), ("upper case", PAGE, [], PAGE),
    ("begins like a chunk", b"a\r\n" + PAGE, [CH], b"a\r\n" + PAGE),
    ("charset", "안녕 똠".encode("cp949"), [], "안녕 똠".encode())])
def test_pages_are_unpacked_as_they_are_not_as_they_say(tmp_path, pack, name, body, headers, page):
    whole, damage = warc_record("http://a/z", PAGE), Counter()
    kind = {"upper case": b"Text/HTML", "charset": b"text/html; charset=EUC-KR"}.get(name, b"text/html")
    record = warc_record("http://a/x", body, kind, headers=headers)
    (tmp_path / "x").write_bytes(pack(whole) + pack(record) + pack(whole) * 2)
    pages = [content for _, content, _ in archive.read_archive(tmp_path / "x", damage)]
    assert pages == [PAGE, page, PAGE, PAGE] and not damage, name


@pytest.mark.parametrize("name, between, pages, damaged", [
    ("an empty member", gzip.compress(b""), 3, 1), ("noise", os.urandom(5000), 3, 1),
    ("a member cut short", gzip.compress(warc_record("http://a/x", os.urandom(900)))[:500], 3, 1),
    ("a length too short", gzip.compress(warc_record("http://a/x", PAGE, length=300)), 4, 1),
    ("a length too long", gzip.compress(warc_record("http://a/x", PAGE, length=9000)), 3, 1),
    ("no WARC", gzip.compress(b"hello\r\n" * 99), 3, 1), ("a broken head", b"\x1f\x8b\x08\x00" * 30, 3, 1),
    ("ten of them", (gzip.compress(b"") + bytes(9)) * 10, 3, 1), ("before the first", b"\xef\xbb\xbf noise", 3, 1)])
def test_reading_goes_on_behind_what_cannot_be_read(tmp_path, name, between, pages, damaged):
    a, b, c = (gzip.compress(warc_record(f"http://a/{i}", PAGE + b"%d" % i)) for i in range(3))
    (tmp_path / "x").write_bytes(a + between + b + c)
    if name == "before the first":
        (tmp_path / "x").write_bytes(between + a + b + c)
    damage = Counter()
    addresses = [address[-1] for address, *_ in archive.read_archive(tmp_path / "x", damage)]
    assert len(addresses) == pages and addresses[0] == "0" and addresses[-2:] == ["1", "2"], (name, addresses)
    assert damage["damaged"] == damaged and set(damage) <= {"damaged", "truncated"}, damage


def hanging(page, main_content):
    """For the extraction process of the next test."""
    if page == b"hang":
        __import__("time").sleep(10**4)
    return page.decode("utf-8") if page != b"die" else os._exit(1)


def test_a_page_that_hangs_or_kills_its_parser_costs_one_page():
    with contextlib.closing(archive.Extractor(function=hanging, seconds=1.0)) as extract:
        answers = [extract(page) for page in (b"a", b"hang", b"b", b"die", b"\xff", b"c" * 10**6, b"d")]
    assert answers == [("a", ""), ("", "too slow"), ("b", ""), ("", "crashed"), ("", "not parsed: UnicodeDecodeError"),
                       ("c" * 10**6, ""), ("d", "")]
