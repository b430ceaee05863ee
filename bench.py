"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value ...]`. No other page imports this one.

Verbs for machines (profile, memory, kernels, parallel, gpu) stand in bench_systems.py and are reached from here too.
"""
import sys

import bench_systems

# --- the verbs: each takes the words after it ---

VERBS = {}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    verbs = VERBS | bench_systems.VERBS
    if not argv or argv[0] not in verbs:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in verbs.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    verbs[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
