"""One pass or fail line per claim: `python test_all.py` runs pytest on this file and exits with its status.

CPU only, offline, no timing assertions. Sections stand in the order of the scripts; each piece has a
golden example worked by hand, an independent reference, a property, and its end to end.
Extra arguments go to pytest: `python test_all.py -k bpe`.
"""
import os
import sys

import numpy as np
import pytest

# --- bpe.py ---


# --- optim.py ---


# --- kernels.py ---


# --- parallel.py ---


# --- configurator.py and checkpoint.py ---


# --- model.py ---


# --- accounting.py ---


# --- convert.py ---


# --- data.py ---


# --- train.py ---


# --- sample.py ---


# --- evaluate.py ---


# --- scaling.py ---


# --- align.py ---


# --- commands, as the README shows them ---


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
