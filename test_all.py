"""One pass or fail line per claim: `python test_all.py` runs tests/ in two pytest processes, one where cores are few.

`python test_all.py bpe model` runs two pages' tests, and other arguments go to pytest: `python test_all.py -k resume`.
CPU only, offline, no timing assertions.
"""
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = ["-q", "-rs", "-p", "no:cacheprovider"]


def run_halves(files: list) -> int:
    """All files in two processes of one thread each; returns an exit status, not 0 when one of them failed."""
    halves = [[], []]
    for path in sorted(files, key=lambda path: -path.stat().st_size):
        min(halves, key=lambda half: sum(path.stat().st_size for path in half)).append(path)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    commands = [[sys.executable, "-m", "pytest", *map(str, half), *OPTIONS] for half in halves]
    with tempfile.TemporaryFile() as said:                   # the second's output comes after the first's
        second = subprocess.Popen(commands[1], env=environment, stdout=said, stderr=subprocess.STDOUT)
        first = subprocess.run(commands[0], env=environment).returncode
        status = first or second.wait()                      # a process that was killed has a negative one
        second.wait()
        said.seek(0)
        print(said.read().decode("utf-8", "replace"), flush=True)
    return status


if __name__ == "__main__":
    tests = Path(__file__).resolve().parent / "tests"
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))    # after -k is no page
    pages = [word for word in words if (tests / f"test_{word.removesuffix('.py')}.py").is_file()]
    others = [word for word in words if word not in pages] + sys.argv[1 + len(words):]
    if not pages and not others and (os.cpu_count() or 1) > 1:
        sys.exit(run_halves(list(tests.glob("test_*.py"))))
    import pytest
    sys.exit(pytest.main([*(str(tests / f"test_{page.removesuffix('.py')}.py") for page in pages), *OPTIONS, *others]
                         if pages else [str(tests), *OPTIONS, *others]))
