"""One pass or fail line per claim: `python test_all.py` runs tests/ with pytest, `python test_all.py bpe model` two pages' tests.

CPU only, offline, no timing assertions. Other arguments go to pytest: `python test_all.py -k resume`.
"""
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    tests = Path(__file__).resolve().parent / "tests"
    pages = [word for word in sys.argv[1:] if (tests / f"test_{word.removesuffix('.py')}.py").is_file()]
    files = [str(tests / f"test_{page.removesuffix('.py')}.py") for page in pages] or [str(tests)]
    others = [word for word in sys.argv[1:] if word not in pages]
    sys.exit(pytest.main([*files, "-q", "-rs", "-p", "no:cacheprovider", *others]))
