"""Package map and native build: COSMOS_FAST_BUILD = none | cpu | cuda | auto (default). CMake does the work.

auto is cuda if torch has CUDA and nvcc links against libcudart, else none; the choice is printed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("none", "cpu", "cuda", "auto")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def cuda_problem() -> str | None:
    """Why a CUDA build cannot be made here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable while building; use pip install --no-build-isolation"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    nvcc = find_nvcc()
    if nvcc is None or not Path(nvcc).exists():
        return "nvcc not found; set CUDA_HOME"
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "t.cu").write_text("int main() { return cudaFree(0) != cudaSuccess; }\n")
        link = subprocess.run(
            [nvcc, "-cudart", "shared", "-o", f"{tmp}/t", f"{tmp}/t.cu"], capture_output=True
        )
    return None if link.returncode == 0 else f"{nvcc} cannot link libcudart; set CUDA_HOME"


def mode() -> str:
    asked = os.environ.get("COSMOS_FAST_BUILD", "auto")
    if asked not in MODES:
        raise SystemExit(f"COSMOS_FAST_BUILD: must be one of {', '.join(MODES)}, got {asked!r}.")
    problem = cuda_problem() if asked in ("cuda", "auto") else None
    if asked == "cuda" and problem:
        raise SystemExit(f"COSMOS_FAST_BUILD=cuda: {problem}.")
    chosen = ("none" if problem else "cuda") if asked == "auto" else asked
    print(f"cosmos-fast: native build {chosen}" + (f" ({problem})" if problem else ""), file=sys.stderr)
    return chosen


class CMakeBuild(build_ext):
    def run(self) -> None:
        if not self.extensions:
            return
        out = ROOT / "cosmos_fast" if self.inplace else Path(self.build_lib).resolve() / "cosmos_fast"
        build = ROOT / "build" / f"{MODE}-{sys.implementation.cache_tag}"
        flags = [f"-DCOSMOS_FAST_CUDA={'ON' if MODE == 'cuda' else 'OFF'}", f"-DCOSMOS_FAST_OUT={out}"]
        flags += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        if MODE == "cuda":
            flags.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *flags], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


MODE = mode()
native = [] if MODE == "none" else [Extension("cosmos_fast._C", [], py_limited_api=True)]
setup(
    packages=["cosmos_fast", "cosmos_fast.kernels"],
    package_dir={"cosmos_fast": "cosmos_fast", "cosmos_fast.kernels": "kernels"},
    package_data={"cosmos_fast": ["data/tiny/*"]},
    ext_modules=native,
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
