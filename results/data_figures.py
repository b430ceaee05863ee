"""The figures of data.py's web stage: `python results/data_figures.py pack|pages|minhash|mix …` (see README).

    python results/data_figures.py pack FOLDER pages.warc.gz      every .html below FOLDER as a response of a WARC file
"""
import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402


def record(address: str, page: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
    return gzip.compress((f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/"
                          f"http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n").encode() + http + b"\r\n\r\n", 6)


def pack(folder: str, path: str) -> None:
    pages = sorted(Path(folder).rglob("*.html"))
    with open(path, "wb") as file:
        for page in pages:
            file.write(record(f"http://example.org/{page.relative_to(folder).as_posix()}", page.read_bytes()))
    print(f"{path}: {len(pages):,} pages, {Path(path).stat().st_size:,} bytes")


if __name__ == "__main__":
    {"pack": pack}[sys.argv[1]](*sys.argv[2:])
