"""Every measured figure of the README, one verb each: `python bench.py VERB [--key=value …]`; --help lists them."""
import sys

import bench_align
import bench_course
import bench_data
import bench_decode
import bench_gpu
import bench_serve
import bench_step
import bench_systems

# Each takes the words after it.
VERBS = {
    "decode": bench_decode.decode, "compress": bench_decode.compress_table,
    "profile": bench_step.profile, "memory": bench_step.memory, "sizes": bench_step.sizes,
    "checkpoints": bench_step.checkpoints, "kernels": bench_systems.kernels, "attention": bench_systems.attention,
    "parallel": bench_systems.bench_parallel, "gpu": bench_gpu.gpu, "bpe": bench_data.bench_bpe,
    "tokenizers": bench_data.tokenizers, "web": bench_data.web, "pages": bench_data.pages,
    "minhash": bench_data.minhash, "toy": bench_course.toy, "sweeps": bench_course.sweeps,
    "ngrams": bench_course.ngrams, "precision": bench_course.precision, "intervals": bench_course.intervals,
    "align": bench_align.align_bench, "serve": bench_serve.serve}


def main(argv: list[str]) -> None:
    """Run one verb, or list them all with the first line of what each says of itself."""
    if not argv or argv[0] not in VERBS:
        print("usage: python bench.py VERB [--key=value ...]; VERB is one of")
        for name, function in VERBS.items():
            print(f"  {name:<12} {(function.__doc__ or '').strip().splitlines()[0]}")
        sys.exit(0 if argv and argv[0] in ("--help", "-h") else 2)
    VERBS[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
