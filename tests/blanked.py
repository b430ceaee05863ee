"""Run tests with other pages in place of ours, many times in a short time: `python tests/blanked.py < jobs`.

jobs: lines of {"folder", "words"} in JSON: where the pages lie, and what pytest is called with. torch and Triton, which
take seconds to import, are imported once here; each job is a fork of this process, in which the pages are imported
anew. It leaves failures.json in its folder, {test: why it failed}; its exit status is printed. Not on Windows.
"""
import gc
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401  an optimizer's first step imports it

if importlib.util.find_spec("triton"):
    import triton  # noqa: F401


class Failures:
    """A plugin that notes why each test failed."""

    def __init__(self):
        self.texts = {}

    def pytest_exception_interact(self, node, report):
        self.texts[node.nodeid] = str(report.longrepr)


def run(folder: str, words: list[str]) -> int:
    """The exit status of one job, in this process."""
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ["PYTHONPATH"]])      # for processes that tests start
    sys.path.insert(0, folder)
    os.chdir(folder)
    silent = os.open(os.path.join(folder, "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)
    failures = Failures()
    status = pytest.main(words, plugins=[failures])
    Path(folder, "failures.json").write_text(json.dumps(failures.texts), encoding="utf-8")
    return int(status)


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
