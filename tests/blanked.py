"""Run tests with other pages in place of ours, many times in a short time: `python tests/blanked.py < jobs`.

jobs: lines of {"folder", "tests"} in JSON: where the pages lie, and FILE::TEST of tests/. torch and Triton, which take
seconds to import, are imported once here; each job is a fork of this process, in which the pages are imported anew.
What pytest says is left in said.txt in the folder; its exit status is printed. Not on Windows.
"""
import gc
import importlib.util
import json
import os
import sys

import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401  an optimizer's first step imports it

if importlib.util.find_spec("triton"):
    import triton  # noqa: F401

HERE = os.path.dirname(os.path.abspath(__file__))
# Plain asserts, as rewriting a file of tests takes longer than running one of them; no collection of garbage after.
OPTIONS = ["-q", "--maxfail=1", "--assert=plain", "-p", "no:unraisableexception", "-p", "no:cacheprovider"]


def run(folder: str, tests: list[str]) -> int:
    """The exit status of one job, in this process."""
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ["PYTHONPATH"]])      # for processes that tests start
    sys.path.insert(0, folder)
    os.chdir(folder)
    silent = os.open(os.path.join(folder, "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)
    return int(pytest.main([*OPTIONS, *(os.path.join(HERE, test) for test in tests)]))


if __name__ == "__main__":
    gc.freeze()                  # else a fork's first collection would touch, and so copy, all of torch
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = run(**json.loads(line))
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
