"""Claims about curate.py."""
import gzip
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from common import ROOT, warc_record
import data


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Three WARC files of English pages, one in four of them with something that a rule is there for."""
    folder, rng = tmp_path_factory.mktemp("warc"), random.Random(0)
    english = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if word.isalpha()]
    pages = [". ".join(" ".join(rng.choices(english, k=12)) + "\n" for _ in range(15)) for _ in range(48)]
    odd = ["欢迎来到我们的网站。" * 30, "too short", "the same again " * 60, "",
           "mail a@b.com or 283-182-3829 from 10.0.0.1. " + pages[42]]
    for i in range(0, 40, 8):
        pages[i], pages[i + 2] = pages[i + 1] + " changed", odd[i // 8]
    records = [gzip.compress(warc_record(f"http://x/{i}", ("<p>" + page.replace("\n", "<p>")).encode()))
               for i, page in enumerate(pages)]
    for i in range(3):
        (folder / f"{i}.warc.gz").write_bytes(b"".join(records[i::3]) + records[0][:-20] * (i == 2))
    return folder


def curated(archives, out, **more):
    report = data.curate([archives / "*.warc.gz"], out, **dict(vocab_size=300) | more)
    return report, {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_curate_counts_resumes_and_gives_the_same_bytes_by_any_executor(archives, tmp_path):
    report, files = curated(archives, tmp_path / "1", workers=1)
    assert {step: documents for step, (documents, _) in report["funnel"].items()} == {
        "archive": 48, "text": 47, "language": 46, "masks": 46, "gopher": 45, "repetition": 44,
        "near duplicates": 38, "lines": 38} and report["damage"] == {"truncated": 1, "no text": 1}
    assert set(report["masked"].values()) == {1} and report["clusters"] == 6
    assert b"repetition: dropped" in files["report.html"] and {"train.bin", "val.bin", "meta.json"} <= files.keys()
    with ProcessPoolExecutor(2) as processes:                  # forked while the folder is held, alive when it is not
        assert curated(archives, tmp_path / "4", executor=processes)[1] == files
        assert curated(archives, tmp_path / "4")[1] == files
    before = (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns
    for name in ("counts/1.warc.gz.json", "documents.jsonl", "train.bin", "report.json"):      # as after a kill
        (tmp_path / "4" / name).unlink()
    assert curated(archives, tmp_path / "4")[1] == files
    assert (tmp_path / "4" / "counts" / "0.warc.gz.json").stat().st_mtime_ns == before
    assert curated(archives, tmp_path / "4", vocab_size=310)[1]["train.bin"] != files["train.bin"]
    for out, more, words in (("4", dict(seed=1), "other settings"), ("5", dict(vocab_size=100), "vocab_size=100"),
                             ("5", dict(languages="de, eng"), "'eng' is no language")):
        with pytest.raises(ValueError, match=words):
            curated(archives, tmp_path / out, **more)


def test_an_input_of_which_nothing_can_be_read_is_named(archives, tmp_path):
    good = tmp_path / "wiki[1].warc.gz"                                    # a name, not a pattern
    good.write_bytes((archives / "0.warc.gz").read_bytes())
    for name, content in (("text.warc.gz", b"no archive at all" * 50), ("empty.warc.gz", b"")):
        (tmp_path / name).write_bytes(content)
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(ValueError, match=r"empty.warc.gz: no page.*text.warc.gz: no page"):
            data.curate(str(tmp_path / "*.warc.gz"), tmp_path / "out", executor=threads)
        report = data.curate([good], tmp_path / "out", executor=threads)           # it is done all the same
    assert report["funnel"]["archive"][0] == 16


def test_curate_on_a_dask_cluster(archives, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        files = curated(archives, tmp_path / "dask", scheduler=cluster.scheduler_address)[1]
    assert files == curated(archives, tmp_path / "1")[1]
