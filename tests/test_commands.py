"""Claims about commands, as the README shows them."""
import doctest
import importlib
import os
import re
import signal
import subprocess
import sys

import pytest

from common import ROOT, TINY, corpus_text, python
import checkpoint
import train

PAGES = [path.stem for path in ROOT.glob("*.py") if not path.stem.startswith(("bench", "config_", "test_all"))]


def test_examples_in_docstrings_are_true():
    results = [doctest.testmod(importlib.import_module(page)) for page in PAGES]
    assert sum(result.attempted for result in results) > 5 and not any(result.failed for result in results), results


def test_importing_a_script_does_nothing_and_data_workers_start_without_torch(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import curate; assert 'torch' not in sys.modules; "
            f"import {', '.join(PAGES)}; import torch; assert not torch.cuda.is_initialized(); "
            "assert not {'matplotlib', 'tiktoken'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir()), done.stderr


def test_from_a_text_file_to_samples_by_commands(tmp_path):
    (tmp_path / "notes.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    done = python("data.py", "prepare", "notes.txt", "--vocab_size=400", cwd=tmp_path)
    assert done.returncode == 0 and "bytes per token" in done.stdout, done.stderr
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    done = python("train.py", "--data_dir=data/notes", "--out_dir=out/notes", "--max_steps=20", "--n_heads=2", *flags,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--- sample 3 ---" in done.stdout and "next: python sample.py" in done.stdout
    bits = re.search(r"val bits per byte ([\d.]+)$", done.stdout.strip().splitlines()[-1])
    assert bits and 1 < float(bits[1]) < 8
    done = python("evaluate.py", "out/notes", cwd=tmp_path)
    again = float(done.stdout.split("bits per byte")[1])
    assert again == pytest.approx(float(bits[1]), abs=2e-3), done.stdout + done.stderr
    done = python("sample.py", "out/notes", "--prompt=def é", "--seed=5", "--max_new_tokens=30", cwd=tmp_path)
    assert done.stdout.startswith("def é") and "decode 29 tokens" in done.stdout, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends a signal as a scheduler does")
def test_a_run_that_is_stopped_goes_on(corpus, tmp_path):
    flags = [f"--{key}={value}" for key, value in (TINY | {"log_every": 1, "checkpoint_every": 1}).items()]
    command = [sys.executable, str(ROOT / "train.py"), f"--data_dir={corpus}", f"--out_dir={tmp_path}/out",
               "--max_steps=100000", "--num_samples=0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().strip().startswith("25/"):
        assert process.poll() is None
    process.terminate()
    assert "--resume=true" in process.stdout.read() and process.wait(timeout=60) == 128 + signal.SIGTERM
    step = checkpoint.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert step >= 24
    done = python("sample.py", tmp_path / "out", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    done = python(*["train.py", *command[2:], f"--max_steps={step + 3}", "--resume=true"])
    assert done.returncode == 0 and f"at step {step}," in done.stdout, done.stderr
    steps = [line["step"] for line in train.read_log(tmp_path / "out" / "log.jsonl") if "loss" in line]
    assert steps == list(range(1, step + 4))


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "data", "bpe", "accounting", "scaling", "align",
                                    "practice", "compress", "convert", "serve"])
def test_help_lists_every_key(script, capsys):
    page = importlib.import_module(script)
    with pytest.raises(SystemExit) as end:
        getattr(page, "run_command_line", page.main)(["--help"])
    assert end.value.code in (0, None) and re.search(rf"{script}\.py(.|\n)+  --\w+=", capsys.readouterr().out)


def test_every_function_and_test_that_the_course_map_names_exists():
    course = (ROOT / "COURSE.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    places, names = re.findall(r"`(\w+\.py):(\w+)`", course), re.findall(r"`((?:test|check)_\w+)`", course)
    assert len(places) > 40 and len(names) > 40
    for page, name in places:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / page).read_text(encoding="utf-8"), re.M), (page, name)
    assert [name for name in names if f"def {name}(" not in tests] == []
