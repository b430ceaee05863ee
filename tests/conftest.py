"""The fixtures that tests of several pages ask for by name."""
from common import bpe_trained, kernels, corpus, questions, little_base  # noqa: F401
