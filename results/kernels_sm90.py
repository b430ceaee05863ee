"""What the compiler makes of each kernel for a Hopper GPU (sm_90), with none at hand: Triton and ptxas need no GPU.

    python results/kernels_sm90.py > results/kernels_sm90.txt           (4 minutes)
    python results/kernels_sm90.py only=attention,matmul D=64 dtypes=bfloat16 tiles=1

tiles: only the first so many of those that the autotuner would time. Each kernel and tile gets a line: registers a
thread and bytes of them spilled to memory, shared memory a program (TOO LARGE over a Hopper's 227 KB: such a tile is
dropped there), which matrix instruction, instructions in the shortest loop that has one (the tiles without a mask), and
SERIALISED where ptxas says that the asynchronous products wait for each other, which costs much of their speed.
Not shown, because it needs the GPU: how long anything takes.
"""
import collections
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import kernels  # noqa: E402


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def tool(name, *arguments):
    """What one of the programs that Triton brings along prints."""
    command = [getattr(triton.knobs.nvidia, name).path, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return out.stdout + out.stderr


def innermost(sass):
    """Instructions of the shortest backward jump's body that holds a matrix product, counted by name."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    index, loops = {address: i for i, (address, _) in enumerate(code)}, []
    for i, (address, text) in enumerate(code):
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) in index and int(target[1], 16) < address:
            body = code[index[int(target[1], 16)]:i + 1]
            names = (re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for _, text in body)
            loops.append(collections.Counter(names))
    loops = [loop for loop in loops if loop["HGMMA"] + loop["HMMA"]]
    return min(loops, key=lambda loop: loop.total(), default=collections.Counter())


def describe(name, tile, compiled):
    """Print the line of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = os.path.join(folder, "k.ptx"), os.path.join(folder, "k.cubin")
        with open(ptx, "w", encoding="utf-8") as file:
            file.write(compiled.asm["ptx"])
        said = tool("ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin)
        loop = innermost(tool("cuobjdump", "-sass", cubin))
    registers, spilled = re.search(r"Used (\d+) registers", said)[1], re.search(r"(\d+) bytes spill stores", said)[1]
    kilobytes = compiled.metadata.shared / 1024
    line = f"{name:54}{tile:18}{registers:>4} registers {spilled:>5} B spilled {kilobytes:6.1f} KB"
    line += f"  {'wgmma' if loop['HGMMA'] else 'mma':6}{loop.total():4} in the loop" if loop else ""
    print(line + "  TOO LARGE" * (kilobytes > 227) + "  SERIALISED" * ("serialized" in said), flush=True)


def main(only: str = "", D: str = "64,128", dtypes: str = "bfloat16,float32", tiles: int | None = None):
    """Call every kernel as the benchmark does, and attention with a window and grouped heads, but only compile them."""
    triton.runtime.driver.set_active(Hopper())
    kernels.use_triton = lambda x: True
    seen = set()

    def compile_instead(kernel, grid, x, *arguments, **constants):
        """In place of kernels.launch: each tile's kernel is compiled and described, nothing runs."""
        configs = [None]
        if hasattr(kernel, "configs"):
            configs = kernels.fitting(kernel.configs, {}, **constants)[:tiles]
            kernel = kernel.fn
        name = f"{kernel.__name__[1:]} {str(x.dtype)[6:]}" + (f" D={constants['D']}" if "D" in constants else "")
        name += " residual" * constants.get("RESIDUAL", False) + " window" * constants.get("WINDOW", False)
        name += f" group={constants['GROUP']}" if constants.get("GROUP", 1) > 1 and "D" in constants else ""
        for config in configs:
            tile, more = "", {}
            if config is not None:
                tile = f"{'x'.join(map(str, config.kwargs.values()))} w{config.num_warps} s{config.num_stages}"
                more = config.all_kwargs()
            if (name, tile) not in seen:
                seen.add((name, tile))
                describe(name, tile, kernel.warmup(*arguments, grid=(1,), **constants, **more))

    kernels.launch = compile_instead
    print(f"torch {torch.__version__}, triton {triton.__version__}, {tool('ptxas', '--version').split()[-1]}")
    for dtype in dtypes.split(","):
        for width in map(int, D.split(",")):
            works = kernels.workloads("cpu", getattr(torch, dtype), 256, width, 1, 4, 4, 768, 1024)
            q, k, v = works[0].inputs
            works.append(kernels.Work("window", lambda q, k, v: kernels.flash_attention(q, k, v, window=99), None,
                                      (q, k[:, :1], v[:, :1]), 3, None, None))
            names = [work.name for work in works]
            if wrong := set(filter(None, only.split(","))) - set(names):
                raise SystemExit(f"only={','.join(wrong)} is none of {', '.join(names)}")
            for work in works:
                if not only or work.name in only.split(","):
                    work.runner(work.ours, work.inputs, work.wanted > 0)()


if __name__ == "__main__":
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if wrong := options.keys() - {"only", "D", "dtypes", "tiles"}:
        raise SystemExit(f"{', '.join(wrong)}: give only=, D=, dtypes= or tiles=\n{__doc__}")
    main(**options | ({"tiles": int(options["tiles"])} if "tiles" in options else {}))
