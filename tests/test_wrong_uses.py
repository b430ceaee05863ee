"""Claims about every command used wrongly: status 2, one clear line with file, setting and value, nothing left."""
import gzip
import importlib
import re
import shutil
from pathlib import Path

import pytest

from common import warc_record
import checkpoint


@pytest.fixture(scope="module")
def place(corpus, little_base, tmp_path_factory):
    """A folder of files of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(corpus, folder / "data")
    for name in ("base", "cut", "notok", "busy"):
        shutil.copytree(little_base, folder / name)
    (folder / "cut" / "ckpt.pt").write_bytes((little_base / "ckpt.pt").read_bytes()[:500])
    (folder / "notok" / "tokenizer.json").unlink()
    (folder / "busy" / "instructions.jsonl").mkdir()
    (folder / "dir").mkdir()
    (folder / "hf").mkdir()
    text, page = (corpus / "val.txt").read_text(encoding="utf-8"), b"<p>" + b"The sea is deep and the cat is old. " * 30
    files = {
        "empty": b"", "lines.txt": b"a line of text\n" * 40, "file": b"x", "text.txt": text.encode(),
        "script.py": b"print()", "shakespeare.txt": text.encode(),
        "bytes": bytes(range(256)) * 20, "list.json": b"[]", "broken.json": b'[{"prompt": ',
        "numbers.jsonl": b"5\n", "latin.jsonl": b'{"prompt": "\xe9"}\n', "hf/config.json": b"{}",
        "broken_runs.json": b'[{"n_params": 1e6}]',
        "runs.json": b'[{"n_params": 1e6, "n_tokens": 1e7, "flops": 6e13, "loss": 3}]',
        "short.csv": b"id,prompts_final\n1\n", "sft.jsonl": b'{"prompt": "cat", "response": "hat"}\n' * 12,
        "x.warc.gz": gzip.compress(warc_record("http://a", page)),
        "gold.jsonl": b'{"question": "q", "answer": "many"}\n'}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tree(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def run(script, words, place, capsys):
    """(status, what was printed to standard error) of a command in this process."""
    page = importlib.import_module(script)
    with pytest.raises(SystemExit) as end:
        getattr(page, "run_command_line", page.main)(words.replace("W/", f"{place}/").split())
    return end.value.code, capsys.readouterr().err


BPE = "data/tokenizer.json W/text.txt"
SFT = "sft --data=W/sft.jsonl --out_dir=W/out --template=plain --steps=1 "
FIT = "classify train --negative=W/lines.txt --out=W/m.npz --positive=W/"
CURATE = "curate W/x.warc.gz --out=W/out --workers=1 "
WRONG = [line.split(" | ") for line in f"""
bpe | train W/dir --out=W/t | dir
bpe | train W/text.txt --out=W/file/t --vocab_size=300 | file/t cannot be written
bpe | train W/text.txt --out=/dev/null --vocab_size=300 | /dev/null cannot be written
bpe | train W/script.py --out=W/t --vocab_size=5 | vocab_size is 5
bpe | train W/bytes --out=W/t | bytes is not UTF-8
bpe | train W/empty --out=W/t | empty is empty
bpe | encode W/list.json W/text.txt | list.json is no tokenizer.json
bpe | encode W/{BPE} --workers=0 | workers is 0
bpe | show W/text.txt word | text.txt
bpe | train W/text.txt --out=W/text.txt --vocab_size=300 | text.txt is read from
bpe | encode W/{BPE} --out=W/./text.txt | text.txt is read from
data |  | a verb is missing
data | prepare W/text.txt --data_dir=W/file | file
data | prepare W/text.txt --data_dir=W/out --tokenizer=W/none | No such file
data | prepare W/data/val.txt --data_dir=W/data | where the split itself is written
data | prepare W/shakespeare.txt | give --data_dir=FOLDER
data | {FIT}dir | no file
data | {FIT}empty | empty holds 0 texts
data | {FIT}lines.txt --out=W/lines.txt | lines.txt is read from
data | {FIT}lines.txt --out=W/m.json | m.json is read from
data | {CURATE}--quality=W/text.txt | text.txt is no classifier
data | {CURATE}--num_bands=7 | num_bands=7
data | crawl CC-MAIN-2025-18 --segments=0 --out=W/out | segments=0
sample | W/file | file/ckpt.pt
sample | W/cut | ckpt.pt is cut short
sample | W/notok | no tokenizer.json
sample | W/base --device=xpu9 | device='xpu9'
sample | W/base --quantize=int3 | int3
sample | W/base --chat=true | chat=true
sample | W/base --draft=mtp | mtp_depth=0
sample | W/base --dtype=float31 | float31
sample | W/base --prompt=\ud800 | half a surrogate pair
serve | W/cut | ckpt.pt is cut short
serve | W/base --port=99999 | port=99999
serve | W/base --draft=mtp | draft=mtp is not served
serve | W/base --host=203.0.113.7 | 203.0.113.7
compress | prune W/base | two folders
compress | quantize W/base W/busy | --overwrite=true
compress | quantize W/base W/base --overwrite=true | read from
compress | quantize W/base W/out --kind=int2 | int2
compress | prune W/base W/out --data=W/none.bin | none.bin
evaluate | W/base --data=W/dir | dir is no file
evaluate | W/base --data=W/empty | empty has 0 tokens
evaluate | W/base --data=W/data/val.bin | val.bin was made with another tokenizer
evaluate | mmlu W/base --data=W/file | no *_test.csv
evaluate | gsm8k W/base --data=W/gold.jsonl | gold.jsonl:1: no number after ####
evaluate | hellaswag W/base --data=W/numbers.jsonl | numbers.jsonl:1
evaluate | alpaca W/base --data=W/broken.json | broken.json is not JSON
evaluate | safety W/base --data=W/short.csv | short.csv
evaluate | instructions W/busy --limit=1 | instructions.jsonl cannot be written
evaluate | gsm8k W/base --data=W/gold.jsonl --shots=2 | shots=2 and shots_data=None go together
evaluate | gsm8k W/base --data=W/gold.jsonl --limit=0 | limit=0 must be at least 1
evaluate | arc W/base --data=W/x --shots=1 --shots_data=W/./x | never from the questions asked
evaluate | arc W/base --data=W/x --by=generate | --by is not a setting
evaluate | W/base | --data=FILE
convert | import W/hf W/out | hf/config.json describes no model that can be read: the architecture None
convert | export W/base W/file | file
convert | export W/base W/busy | --overwrite=true
convert | export W/base W/base | base
convert | import W/hf | import FOLDER OUT_DIR
train | --data_dir=W/data --out_dir=W/file | file
train | --max_stpes=3 | Did you mean max_steps?
train | trian | 'trian' is neither
train | plot | plot needs the folders of runs
train | --data_dir=W/data --out_dir=W/out --init_from=W/cut | cut short
align | {SFT}--base=W/dir | no checkpoint at
align | {SFT}--base=W/base --data=W/latin.jsonl | latin.jsonl:1
align | {SFT}--base=W/base --out_dir=W/base | is read from
align | {SFT}--base=W/base --beta=0.5 | --beta is not a setting
align | grpo --base=W/base --data=W/sft.jsonl --out_dir=W/out --temperature=0 | temperature=0.0 must be above 0
align | grpo --base=W/base --data=W/sft.jsonl --out_dir=W/out --baseline=x | baseline='x'
align | --lr=1 | --lr is not a setting
accounting | gpt9 | no preset 'gpt9'
accounting | gpt2 --dtype=int4 | dtype='int4'
accounting | gpt2 --device=H900 | H900
accounting | gpt2 --link_gb_per_s=0 | link_gb_per_s=0
accounting | gpt2 --tokens=0 | tokens=0
accounting | gpt2 --mfu=2 | mfu=2.0 must be above 0 and at most 1
train | --data_dir=W/data --out_dir=W/out --max_minutes=inf | max_minutes=inf must be above 0 and finite
compress | prune W/base W/out --kind=width --data=W/text.txt | text.txt
scaling | fit | one file of runs
scaling | fit W/none.json | none.json
scaling | fit W/list.json | list.json holds no runs
scaling | fit W/broken_runs.json | run 0 has n_tokens=None
scaling | fit W/runs.json --flops=0 | flops=0.0
scaling | --flops=-1 | flops=-1""".strip().splitlines()]


@pytest.mark.parametrize("script, words, message", WRONG)
def test_a_wrong_use_ends_in_one_line_and_leaves_nothing(script, words, message, place, capsys):
    before = tree(place)
    status, error = run(script, words, place, capsys)
    first, *more = error.strip().splitlines()
    assert status == 2 and first.startswith("error: ") and message in error, error
    assert "Traceback" not in error and all(re.match("  |usage|optimizers:|$", line) for line in more)
    assert tree(place) == before


FULL = {"bpe train": "train W/text.txt --out=W/out/t --vocab_size=400", "bpe encode": f"encode W/{BPE} --out=W/out/x",
        "data prepare": "prepare W/text.txt --data_dir=W/out --vocab_size=400", "data curate": CURATE,
        "data classify": FIT + "lines.txt --out=W/out/m", "evaluate": "instructions W/out --limit=60",
        "convert": "export W/base W/out", "train": "--data_dir=W/data --out_dir=W/out --overwrite=true --max_steps=1",
        "align": SFT + "--base=W/base --overwrite=true"}


@pytest.mark.parametrize("name", FULL)
def test_a_disk_that_fills_up_is_named_and_leaves_what_was_there(name, place, tmp_path, capsys):
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    script, words = name.split()[0], FULL[name].replace("W/out", f"{tmp_path}")
    if script in ("evaluate", "align", "train"):
        shutil.copytree(place / "base", tmp_path, dirs_exist_ok=True)
    before, limit = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))          # the system refuses every byte after these
    try:
        status, error = run(script, words, place, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == (1 if script == "train" else 2) and str(tmp_path) in error and "too large" in error, error
    left = {path: content for path, content in tree(tmp_path).items() if Path(path).name != "log.new.jsonl"}
    assert {path: left.get(path) for path in before} == before
    new = {Path(path).name for path in left.keys() - before.keys()}
    assert new <= {"shards", "counts", "settings.json", "x.warc.gz.jsonl", "x.warc.gz.npy"}, "where curation goes on"


@pytest.mark.parametrize("script, words", [("data", "prepare W/text.txt --vocab_size=300 --data_dir="),
                                           ("train", "--data_dir=W/data --max_steps=1 --out_dir=")])
def test_who_writes_in_a_folder_where_another_one_does_is_refused(script, words, place, tmp_path, capsys):
    pytest.importorskip("fcntl", reason="this system has no such lock")
    folder = tmp_path / "out"
    with checkpoint.only_writer(folder):
        status, error = run(script, words + str(folder), place, capsys)
        assert status == 2 and f"{folder} is being written by another process" in error and not list(folder.iterdir())
    assert not folder.exists()                                           # made for this, and still empty
    with checkpoint.only_writer(folder):                                 # and the lock has gone with it
        (folder / "x").touch()
    assert folder.exists()
