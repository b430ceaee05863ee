"""What machines do: the verbs of bench.py that measure steps, memory, kernels and ranks."""

VERBS = {}
