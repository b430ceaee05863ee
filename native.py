"""C pages beside the Python ones, compiled when they are first needed: bpe.c, fused.c, onetoken.c.

Why: NumPy and torch are fast where one operation takes many numbers. Where the work is a branch for every word or a
small operator for every layer, plain C of the same length is many times as fast, and reads like the formula.

The compiler is the system's `cc`; it takes a second, once, and the result stays in ~/.cache/native, named by what went
into it. Without one, which a line says, or with NATIVE=0 in the environment (for one page BPE=0, FUSED=0, ONETOKEN=0),
Python runs.
"""
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def load(page: str, flags=(), openmp: bool = False):
    """The C page of that name as a ctypes library; None: no compiler, switched off, or it would not compile.

    openmp: its loops are divided among torch's own pool of threads, in the widest vectors there are.
    """
    source, compiler = Path(__file__).with_name(f"{page}.c"), shutil.which("cc") or shutil.which("gcc")
    if "0" in (os.environ.get("NATIVE"), os.environ.get(page.upper())) or os.name != "posix":
        return None
    if compiler is None:
        print(f"no C compiler (cc) here: what {page}.c does runs in Python, slower; install one, for "
              "example gcc or clang, or set NATIVE=0 to read this no more", file=sys.stderr)
        return None
    flags = ["-O3", "-march=native", "-shared", "-fPIC", *flags]
    try:
        if openmp:
            import torch                 # here: the tokenizer's processes start without it
            for runtime in Path(torch.__file__).parent.glob("lib/libgomp*"):
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            flags += ["-fopenmp", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
        linux = platform.system() == "Linux"             # a home may be shared by machines of several kinds
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0] if linux else ""
        features = [line for line in cpu.splitlines() if line.startswith(("model", "flags", "Features"))]
        name = hashlib.sha256(repr((source.read_bytes(), flags, features)).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "native"
        path = folder / f"{page}-{name}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:     # whole or not at all, for several processes
                made = Path(scratch) / path.name
                subprocess.run([compiler, str(source), "-o", str(made), *flags, "-lm"], check=True, capture_output=True)
                os.replace(made, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None                  # no home that can be written, a flag that this compiler does not know
