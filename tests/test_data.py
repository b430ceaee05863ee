"""Claims about data.py."""
import gzip
import hashlib
import http.server
import json
import shutil
import threading

import pytest

from common import corpus_text
import bpe
import data


def test_markdown_becomes_a_printed_play():
    markdown = "# Hamlet\n\n_Enter *Ghost*_\n\n**HAMLET**  \n_\\[Aside]_  \n\\--I'll go on.\n\n\n\n**ALL**  \nHo!"
    assert data.strip_markdown(markdown) == "Hamlet\n\nEnter Ghost\n\nHAMLET\n[Aside]\n--I'll go on.\n\nALL\nHo!\n"


def test_documents_are_split_whole_and_a_few_near_nine_tenths(tmp_path):
    def split(text):
        (tmp_path / "x").write_bytes(text.encode())
        n = data.split_file(tmp_path / "x", tmp_path / "train", tmp_path / "val")
        return n, *((tmp_path / name).read_bytes().decode() for name in ("train", "val"))
    documents = [f"document {i}\r\nends é{data.SEPARATOR}" + "\n" * (i % 3) for i in range(23)] + ["without an end"]
    n, train, val = split("".join(documents))
    assert n == 24 and [f"document {i}\r" in val for i in range(23)] == [i % 10 == 4 for i in range(23)]
    assert len(train + val) == len("".join(documents)) and sorted(train + val) == sorted("".join(documents))
    for text in ("".join(f"line {i}\n" for i in range(100)), "one line " * 100):
        n, train, val = split(text)
        assert train + val == text and (train[-1] == "\n" or "\n" not in text) and 0.89 < len(train) / len(text) < 0.92


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b"caf\xe9 " * 500, "is not UTF-8"), (b" " * 5000, "of x.txt has .*fewer than one context"),
    (("a text " * 500).encode("utf-16-le"), "UTF-16.*iconv -f utf-16 -t"), (gzip.compress(b"a" * 99), "gunzip")])
def test_a_preparation_that_fails_says_why_and_leaves_nothing(corpus, tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    good = shutil.copytree(corpus, tmp_path / "good")
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    for folder in (tmp_path / "data", good):
        with pytest.raises(ValueError, match=words) as caught:
            data.prepare(tmp_path / "x.txt", vocab_size=300, data_dir=folder)
        assert "x.txt" in str(caught.value)
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "x.txt"]


def test_prepare_writes_what_the_design_names_and_takes_a_tokenizer_byte_for_byte(corpus, tmp_path, capsys):
    run, text, mine = tmp_path / "run", tmp_path / "mine.py", tmp_path / "mine"
    run.mkdir()
    written = json.loads((corpus / "tokenizer.json").read_text(encoding="utf-8"))
    (run / "tokenizer.json").write_text(json.dumps(written, indent=3), encoding="utf-8")     # not as ours would save it
    (run / "ckpt.pt").touch()
    text.write_text("to be or not to be, é\n" * 400, encoding="utf-8")
    for path in (run, run / "tokenizer.json"):
        data.main(["prepare", str(text), f"--tokenizer={path}", f"--data_dir={mine}"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("next: python train.py ") and f"--data_dir={mine} --out_dir=out/mine" in last
        assert (f"--init_from={run}" in last) == (path == run)
    written = (mine / "tokenizer.json").read_bytes()
    meta = json.loads((mine / "meta.json").read_text(encoding="utf-8"))
    assert written == (run / "tokenizer.json").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(written).hexdigest()
    assert (meta["dtype"], meta["vocab_size"], meta["source"]) == ("uint16", 512, "mine.py"), "a script is text, too"
    for split in ("train", "val"):
        ids, split_text = data.open_tokens(mine, split), (mine / f"{split}.txt").read_bytes()
        assert bpe.Tokenizer.load(mine / "tokenizer.json").decode_bytes(ids) == split_text
        assert (meta[f"{split}_tokens"], meta[f"{split}_bytes"]) == (len(ids), len(split_text))
    with open(shutil.copytree(corpus, tmp_path / "odd") / "tokenizer.json", "a", encoding="utf-8") as file:
        file.write("\n")                                                # its meta.json names another one
    for tokenizer, vocab_size, words in ((run, 300, "vocab_size=300.*512"), (tmp_path / "odd", None, "another tok")):
        with pytest.raises(ValueError, match=words):
            data.prepare(text, vocab_size, tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves `files` by name with ranges and cuts the connection after `cut` bytes of every reply."""
    files, cut, ranges, busy = {}, 10**9, [], 0

    def do_GET(self):
        start, content = int(self.headers["Range"][6:].split("-")[0]), self.files.get(self.path[1:])
        Flaky.ranges.append(start)
        Flaky.busy -= 1
        if content is None or Flaky.busy >= 0 or start >= len(content):
            return self.send_error(404 if content is None else 429 if Flaky.busy >= 0 else 416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:start + self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    Flaky.ranges, Flaky.cut, Flaky.busy = [], 10**9, 0
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_cut_download_goes_on_where_it_stopped_or_says_what_to_do(server, tmp_path):
    content = bytes(range(256)) * 400
    Flaky.files, Flaky.cut, Flaky.busy = dict.fromkeys("abc", content), 30_000, 2    # "too many requests" is not final
    data.download(f"{server}/a", tmp_path / "a")
    assert Flaky.ranges == [0, 0, 0, 30_000, 60_000, 90_000]
    (tmp_path / "b.part").write_bytes(content[:50_000])                  # left by an earlier process
    (tmp_path / "c.part").write_bytes(content + b"too long")             # from another file of that name
    for name in "bc":
        data.download(f"{server}/{name}", tmp_path / name)
    assert all((tmp_path / name).read_bytes() == content and not (tmp_path / f"{name}.part").exists() for name in "abc")
    (tmp_path / "x.gz").write_bytes(gzip.compress(content)[:-8] + bytes(8))               # its CRC is wrong
    with pytest.raises(OSError, match="x.gz is damaged .*delete it"):
        data.fetch_split(f"{server}/x.gz", tmp_path / "x.txt")
    Flaky.files, Flaky.cut = {"d": content}, 0
    for name, words in (("d", "cut"), ("missing", r"404.*put it at .*missing")):
        with pytest.raises(OSError, match=words):
            data.download(f"{server}/{name}", tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["tinystories", "owt"])
def test_hosted_corpora_come_through_the_mirror(server, tmp_path, monkeypatch, name):
    text = corpus_text().encode()[:60_000].decode(errors="ignore").encode()
    packed = gzip.compress(text) if name == "owt" else text
    Flaky.files = {url.rsplit("/", 1)[-1]: packed for url in data.HOSTED[name]}
    monkeypatch.setenv("DATA_MIRROR", server)
    meta = data.prepare(name, vocab_size=300, data_dir=tmp_path)
    assert meta["train_bytes"] == meta["val_bytes"] == len(text) and (tmp_path / "train.txt").read_bytes() == text


def test_crawl_fetches_what_is_not_there(server, tmp_path, monkeypatch):
    files = {f"a/{i}.warc.gz": bytes([i]) * 9000 for i in range(3)}
    Flaky.files = files | {"crawl-data/CC-MAIN-2025-18/warc.paths.gz": gzip.compress("\n".join(files).encode())}
    monkeypatch.setattr(data, "COMMON_CRAWL", server)
    config = data.CrawlConfig(segments=2, out=str(tmp_path))
    paths = data.crawl("CC-MAIN-2025-18", config)
    assert [path.read_bytes() for path in paths] == [files["a/0.warc.gz"], files["a/1.warc.gz"]]
    asked = len(Flaky.ranges)
    assert data.crawl("CC-MAIN-2025-18", config) == paths and len(Flaky.ranges) == asked
