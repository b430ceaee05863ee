"""Claims about data.py."""
import gzip
import hashlib
import http.server
import json
import shutil
import os
import threading

import numpy as np
import pytest

from common import corpus_text
import bpe
import data


def test_markdown_becomes_a_printed_play():
    markdown = "# Hamlet\n\n## ACT I\n\n_Enter *Ghost*_\n\n**HAMLET**  \n_\\[Aside]_  \n\\--I'll go on.\n\n\n\n**ALL**  \nHo!"
    assert data.strip_markdown(markdown) == (
        "Hamlet\n\nACT I\n\nEnter Ghost\n\nHAMLET\n[Aside]\n--I'll go on.\n\nALL\nHo!\n")


def test_documents_are_split_whole(tmp_path):
    documents = [f"document {i}\r\nends é{data.SEPARATOR}" + "\n" * (i % 3) for i in range(23)] + ["without an end"]
    (tmp_path / "x").write_bytes("".join(documents).encode())
    assert data.split_file(tmp_path / "x", tmp_path / "train", tmp_path / "val") == 24
    train, val = ((tmp_path / name).read_bytes().decode() for name in ("train", "val"))
    assert [f"document {i}\r" in val for i in range(23)] == [i % 10 == 4 for i in range(23)]
    assert len(train + val) == len("".join(documents)) and sorted(train + val) == sorted("".join(documents))


@pytest.mark.parametrize("text", ["".join(f"line {i}\n" for i in range(100)), "one line " * 100])
def test_few_documents_are_cut_near_nine_tenths(tmp_path, monkeypatch, text):
    monkeypatch.setattr(data, "CHUNK_CHARS", 7)
    (tmp_path / "x").write_bytes(text.encode())
    data.split_file(tmp_path / "x", tmp_path / "train", tmp_path / "val")
    train, val = ((tmp_path / name).read_text(encoding="utf-8") for name in ("train", "val"))
    assert train + val == text and (train[-1] == "\n" or "\n" not in text) and 0.89 < len(train) / len(text) < 0.92


def test_prepare_writes_what_the_design_names(corpus):
    meta = json.loads((corpus / "meta.json").read_text(encoding="utf-8"))
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 512 and meta["source"] == "text.txt"
    assert meta["tokenizer_sha256"] == hashlib.sha256((corpus / "tokenizer.json").read_bytes()).hexdigest()
    tokenizer = bpe.Tokenizer.load(corpus / "tokenizer.json")
    for split in ("train", "val"):
        ids = np.fromfile(corpus / f"{split}.bin", dtype="<u2")
        text = (corpus / f"{split}.txt").read_bytes()
        assert tokenizer.decode_bytes(ids) == text
        assert (meta[f"{split}_tokens"], meta[f"{split}_bytes"]) == (len(ids), len(text))
    assert (corpus / "train.txt").stat().st_size > 4 * (corpus / "val.txt").stat().st_size


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"caf\xe9 " * 500, "is not UTF-8"), (b" " * 5000, "split of x.txt has .*fewer than one context"),
    (("a text " * 500).encode("utf-16-le"), "UTF-16; .*iconv -f utf-16 -t"), (gzip.compress(b"a" * 99), "gunzip")])
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
    run, text = tmp_path / "run", tmp_path / "mine.txt"
    run.mkdir()
    written = json.loads((corpus / "tokenizer.json").read_text(encoding="utf-8"))
    (run / "tokenizer.json").write_text(json.dumps(written, indent=3), encoding="utf-8")     # not as ours would save it
    (run / "ckpt.pt").touch()
    text.write_text("to be or not to be, é\n" * 400, encoding="utf-8")
    path = run if given == "folder" else run / "tokenizer.json"
    data.main(["prepare", str(text), f"--tokenizer={path}", f"--data_dir={tmp_path / 'mine'}"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: python train.py ") and f"--data_dir={tmp_path / 'mine'} --out_dir=out/mine" in last
    assert (f"--init_from={run}" in last) == (given == "folder")
    assert (tmp_path / "mine" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    ids = data.open_tokens(tmp_path / "mine", "train")
    assert bpe.Tokenizer.load(run / "tokenizer.json").decode_bytes(ids) == (tmp_path / "mine" / "train.txt").read_bytes()
    with open(shutil.copytree(corpus, tmp_path / "odd") / "tokenizer.json", "a", encoding="utf-8") as file:
        file.write("\n")                                                # its meta.json names another one
    for tokenizer, vocab_size, words in ((path, 300, "vocab_size=300.*512"), (tmp_path, None, "there is no file"),
                                         (tmp_path / "odd", None, "another tokenizer")):
        with pytest.raises(ValueError, match=words):
            data.prepare(text, vocab_size, tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


def test_torchrun_is_sent_to_prepare_first(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="python data.py prepare shakespeare --data_dir="):
        data.prepare("shakespeare", data_dir=tmp_path / "data")


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges and cuts the connection after `cut` bytes of every reply."""
    content, cut, ranges, busy = b"", 10**9, [], 0

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        Flaky.ranges.append(start)
        if self.path.endswith("missing.txt"):
            return self.send_error(404)
        if Flaky.busy:
            Flaky.busy -= 1
            return self.send_error(429)
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
    Flaky.content, Flaky.cut, Flaky.busy = bytes(range(256)) * 400, 30_000, 2      # "too many requests" is not final
    data.download(f"{server}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == Flaky.content and Flaky.ranges == [0, 0, 0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "a.bin.part").exists()
    (tmp_path / "b.bin.part").write_bytes(Flaky.content[:50_000])        # left by an earlier process
    data.download(f"{server}/b.bin", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == Flaky.content
    (tmp_path / "c.bin.part").write_bytes(Flaky.content + b"too long")   # from another file of that name
    data.download(f"{server}/c.bin", tmp_path / "c.bin")
    assert (tmp_path / "c.bin").read_bytes() == Flaky.content


def test_a_download_that_fails_says_what_to_do(server, tmp_path):
    Flaky.content = b"x" * 1000
    with pytest.raises(OSError, match=r"404.*put it at .*missing.txt"):
        data.download(f"{server}/missing.txt", tmp_path / "missing.txt")
    Flaky.cut = 0
    with pytest.raises(OSError, match="cut"):
        data.download(f"{server}/b.txt", tmp_path / "b.txt")
    assert not any((tmp_path / name).exists() for name in ("missing.txt", "b.txt"))


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_hosted_corpora_come_through_the_mirror(server, tmp_path, monkeypatch, name):
    text = corpus_text().encode()[:60_000].decode(errors="ignore").encode()
    Flaky.content, Flaky.cut = (gzip.compress(text) if name == "owt" else text), 5_000
    monkeypatch.setenv("DATA_MIRROR", server)
    meta = data.prepare(name, vocab_size=300, data_dir=tmp_path)
    assert meta["train_bytes"] == meta["val_bytes"] == len(text) and (tmp_path / "train.txt").read_bytes() == text


def test_crawl_fetches_and_goes_on(server, tmp_path, monkeypatch):
    files = {f"a/{i}.warc.gz": os.urandom(9000) for i in range(3)}
    files["crawl-data/CC-MAIN-2025-18/warc.paths.gz"] = gzip.compress("\n".join(files).encode())
    serve = Flaky.do_GET
    monkeypatch.setattr(data, "COMMON_CRAWL", server)
    monkeypatch.setattr(Flaky, "do_GET", lambda self: (setattr(Flaky, "content", files[self.path[1:]]), serve(self)))
    (tmp_path / "1.warc.gz.part").write_bytes(files["a/1.warc.gz"][:5000])             # left by a kill
    Flaky.cut, config = 3000, data.CrawlConfig(segments=2, out=str(tmp_path))                    # downloads break
    found = data.crawl("CC-MAIN-2025-18", config)
    assert [path.read_bytes() for path in found] == [files["a/0.warc.gz"], files["a/1.warc.gz"]]
    asked = len(Flaky.ranges)
    assert Flaky.ranges[-2:] == [5000, 8000]
    assert data.crawl("CC-MAIN-2025-18", config) == found and len(Flaky.ranges) == asked
    with pytest.raises(ValueError, match="give a name like"):
        data.crawl("CC-2025", config)
