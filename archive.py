"""The pages of web archives, all of them: a WARC file read past whatever is broken in it, its pages taken apart safely.

A crawl keeps what servers sent, mistakes and all. What stands in a file of a thousand million bytes, and what is done:

    record of a page ─▶ Transfer-Encoding: chunked     joined
                        Content-Encoding: gzip, br …   unpacked; a page that is not packed so is taken as it is
                        Content-Type: charset=euc-kr   read by it where it is no UTF-8, and handed on as UTF-8
    empty member, zeros, a wrong length                reading goes on at the next place that looks like a record
    a page that hangs or crashes the parser            costs that page: the parser runs in a process of its own

Whatever is left out is counted by its reason. FastWARC reads the records; its iterator ends without a word at one that
it cannot pass, such as an empty gzip member, and is started again. WARC: ISO 28500. Chunks: RFC 9112, 7.1.
"""
import contextlib
import functools
import glob
import io
import multiprocessing
import os
import re
import sys
import threading
import zlib
from collections import Counter

from clean import decode_html, extract_text

MAX_PAGE_BYTES, MAX_SECONDS = 20_000_000, 10     # a page larger, or longer in the parser, is dropped and counted
SEARCH_BYTES = 1 << 20                           # read at a time in search of the next record
# How a record begins, by how the file does: gzip members, zstd frames, or the text itself after the last one's end.
MAGIC = {b"\x1f\x8b": re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"), b"\x28\xb5": re.compile(rb"\x28\xb5\x2f\xfd")}
ANY = re.compile(rb"WARC/[01]\.[0-9]+\r\n(?=WARC-|Content-)|" + b"|".join(one.pattern for one in MAGIC.values()))
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r\n")


def expand(pattern: str) -> list[str]:
    """The files that a pattern matches, or the one of that name, brackets and all. Raises OSError for none."""
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not paths:
        raise FileNotFoundError(f"no file {pattern}; give files, or a pattern that finds some")
    return paths


# --- records ---

def read_archive(path, damage: Counter):
    """Yield (address, bytes, is_html) of the pages of a WARC or WET file, gzip, zstd or plain.

    HTML responses with status 200 are HTML; conversions (WET) are text already. What is no page, or no whole one, is
    counted in `damage`, and so is each place that reading could not pass.
    """
    from fastwarc.warc import WarcRecordType
    for record in records(path, damage):
        if record.record_type not in (WarcRecordType.response, WarcRecordType.conversion):
            continue
        try:
            record.parse_http(auto_decode="none")
            content = record.reader.read(MAX_PAGE_BYTES + 1)
        except OSError:
            damage["damaged"] += 1
            continue
        if record.is_http and (record.http_headers.status_code != 200
                               or "html" not in (record.http_content_type or "html").lower()):
            damage["no page"] += 1
        elif len(content) < min(record.content_length, MAX_PAGE_BYTES + 1):
            damage["truncated"] += 1
        else:
            if record.is_http:
                content = unpack(content, record.http_headers)
                if record.http_charset not in (None, "utf-8"):
                    content = decode_html(content, record.http_charset).encode("utf-8", "replace")
            if len(content) > MAX_PAGE_BYTES:
                damage["too large"] += 1
            else:
                yield record.headers.get("WARC-Target-URI") or record.record_id or "", content, record.is_http


def records(path, damage: Counter):
    """All records of a file. Where FastWARC's iterator ends, it is started again at the next one that can be found."""
    from fastwarc.warc import ArchiveIterator
    with open(path, "rb") as file:
        pattern, start, restarted, failed = MAGIC.get(file.read(2), ANY), 0, False, False
        while start is not None:
            file.seek(start)
            last = start
            try:
                for record in ArchiveIterator(file, parse_http=False):
                    if restarted:                # and there is a record, so the iterator had ended too early
                        damage["damaged"] += 1
                    restarted, failed, last = False, False, record.stream_pos
                    yield record
            except OSError:
                failed = True
            restarted, start = True, find_record(file, pattern, last + 1)
        if failed:
            damage["damaged"] += 1


def find_record(file, pattern, start: int) -> int | None:
    """Where the next record may begin, from byte `start` on; None when there is none."""
    file.seek(start)
    held = b""
    while block := file.read(SEARCH_BYTES):
        held += block
        match = pattern.search(held)
        if match:
            return file.tell() - len(held) + match.start()
        held = held[-32:]                        # a beginning may lie across two blocks
    return None


# --- what is in a record ---

def join_chunks(content: bytes) -> bytes:
    """The chunks of a body one after another; a body that is not in chunks, or no longer, as it is."""
    parts, place = [], 0
    while match := CHUNK.match(content, place):
        place = match.end() + int(match[1], 16)
        if place == match.end():                 # the last one has no bytes; what follows it is headers again
            break
        if content[place:place + 2] not in (b"\r\n", b""):
            return content
        parts.append(content[match.end():place])
        place += 2
    return b"".join(parts) or content


def unpack(content: bytes, http) -> bytes:
    """A body without the codings that its header names; those that it does not have, or no longer, are passed over."""
    from fastwarc.stream_io import BrotliReader, GzipReader, ZstdReader
    readers = {"gzip": GzipReader, "x-gzip": GzipReader, "br": BrotliReader, "zstd": ZstdReader}
    named = f"{http.get('Content-Encoding') or ''} {http.get('Transfer-Encoding') or ''}"
    for coding in reversed(named.lower().replace(",", " ").split()):         # the last one was put on last
        try:
            if coding == "chunked":
                content = join_chunks(content)
            elif coding == "deflate":            # zlib's format, as it should be, or the bare one, as some servers send
                zlibs = len(content) > 1 and content[0] & 15 == 8 and int.from_bytes(content[:2], "big") % 31 == 0
                content = zlib.decompressobj(15 if zlibs else -15).decompress(content, MAX_PAGE_BYTES + 1)
            elif coding in readers:
                content = readers[coding](io.BytesIO(content)).read(MAX_PAGE_BYTES + 1)
        except (OSError, zlib.error):
            continue
    return content


# --- the parser, in a process of its own ---

main_text = functools.partial(extract_text, main_content=True)       # without navigation, headers and footers


def answer_pages(pipe, other_end, function) -> None:
    """What the extraction process does: answer every page by (text, "") or ("", why there is none)."""
    other_end.close()                            # else the end of the other side would go unnoticed
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while page := pipe.recv_bytes():
            try:
                pipe.send((function(page), ""))
            except Exception as error:           # whatever a page does to the parser is the page's fault: counted
                pipe.send(("", f"not parsed: {type(error).__name__}"))


class Extractor:
    """Calls main_text in a process of its own: a page that hangs or crashes the parser costs that page only.

    The parser is C and cannot be interrupted: the process is killed with the page, the next page gets a new one.
    """

    def __init__(self, function=main_text, seconds: float = MAX_SECONDS):
        self.function, self.seconds, self.process = function, seconds, None

    def start(self) -> None:
        """Start the process and wait until it has imported what it needs: the first page does not pay for that."""
        # Dask's workers are daemons, which may have no children; this one's end with the archive.
        multiprocessing.current_process()._config["daemon"] = False
        # Forking is quick, and safe where no other thread may hold a lock: in an executor's processes.
        forks = sys.platform == "linux" and threading.active_count() == 1
        context = multiprocessing.get_context("fork" if forks else "spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=answer_pages, args=(other_end, self.pipe, self.function), daemon=True)
        self.process.start()
        other_end.close()
        try:
            self.pipe.recv()
        except EOFError:                         # it runs the calling script's top level, which starts a curation again
            raise RuntimeError('a script that curates needs `if __name__ == "__main__":` around it') from None

    def __call__(self, page: bytes) -> tuple[str, str]:
        """(text, ""), or ("", why there is none)."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send_bytes(page or b" ")
            if self.pipe.poll(self.seconds):
                return self.pipe.recv()
            reason = "too slow"
        except (EOFError, OSError):
            reason = "crashed"
        self.close()
        return "", reason

    def close(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.join()
        self.process = None
