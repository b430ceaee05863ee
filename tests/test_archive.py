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


def deflated(body: bytes, bits: int) -> bytes:
    """zlib's format with a window of 2^bits; the bare one below 0."""
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(body) + packer.flush()


CH, GZ, BR = b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Content-Encoding: br"
BROTLI = bytes.fromhex("0b058068656c6c6f20776f726c6403")                 # "hello world", by the brotli package


@pytest.mark.parametrize("body, headers, page", [
    (chunks(gzip.compress(PAGE)), [CH, GZ], PAGE), (b"", [GZ, CH], b""), (chunks(BROTLI), [CH, BR], b"hello world"),
    (gzip.compress(BROTLI), [b"Content-Encoding: br,gzip"], b"hello world"),
    (PAGE, [BR], PAGE), (PAGE, [CH, GZ], PAGE), (gzip.compress(PAGE), [CH, GZ], PAGE),            # not as they say
    *[(deflated(PAGE, bits), [b"Content-Encoding: deflate"], PAGE) for bits in (15, 10, -15)],
    (chunks(PAGE)[:-30], [CH], PAGE[:-23]),
    (b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n", [CH], b"hello"), (b"a\r\n" + PAGE, [CH], b"a\r\n" + PAGE)])
def test_pages_are_unpacked_as_they_are_not_as_they_say(tmp_path, body, headers, page):
    record, whole = warc_record("http://a/x", body, b"Text/HTML", headers=headers), warc_record("http://a/z", PAGE)
    korean = warc_record("http://a/k", "안녕 똠".encode("cp949"), b"text/html; charset=EUC-KR")
    _, pages, damage = read(tmp_path / "x", *map(gzip.compress, (whole, record, korean, whole)))
    assert pages == [PAGE, page, "안녕 똠".encode(), PAGE] and not damage


LENGTHS = [gzip.compress(warc_record("http://a/x", PAGE, length=length)) for length in (300, 9000)]   # both untrue


@pytest.mark.parametrize("between, pages", [
    (gzip.compress(b""), "012"), (os.urandom(5000), "012"), (LENGTHS[0], "0x12"), (LENGTHS[1], "012"),
    (gzip.compress(warc_record("http://a/x", os.urandom(900)))[:500], "012"), (gzip.compress(b"hello\r\n" * 99), "012"),
    (b"\x1f\x8b\x08\x00" * 30, "012"), ((gzip.compress(b"") + bytes(9)) * 10, "012")])
def test_reading_goes_on_behind_what_cannot_be_read(tmp_path, between, pages):
    a, b, c = (gzip.compress(warc_record(f"http://a/{i}", PAGE + b"%d" % i)) for i in range(3))
    addresses, _, damage = read(tmp_path / "x", a, between, b, c)
    assert addresses == pages and damage.pop("damaged") == 1 and set(damage) <= {"truncated"}
    assert read(tmp_path / "x", b"\xef\xbb\xbf noise", a, b, c)[::2] == ("012", {"damaged": 1})


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
