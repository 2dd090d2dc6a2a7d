"""The native half: what was built answers for itself, agrees with the reference, and compiles for CUDA."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_fast import _native, reference

ROOT = Path(__file__).resolve().parents[1]
BF16, FP32 = torch.bfloat16, torch.float32

needs_native = pytest.mark.skipif(not _native.available("adaln_cpu"), reason=str(_native.reason("adaln_cpu")))


# --- what is there, and what is said when it is not -------------------------------------------------


def test_reason_and_availability_agree() -> None:
    for symbol in ("adaln_cpu", "residual_adaln_cpu", "adaln_cuda", "qk_norm_rope_cuda", "no_such_op"):
        assert _native.available(symbol) == (_native.reason(symbol) is None)
    assert "no_such_op" in str(_native.reason("no_such_op")) or "not built" in str(
        _native.reason("no_such_op")
    )


def test_build_info_names_the_mode() -> None:
    info = _native.build_info()
    if find_spec("cosmos_fast._host") is None:
        assert info["mode"] in ("none", "unknown") and "reason" in info
    else:
        assert info["mode"] in ("cpu", "cuda") and info["torch"] and info["compiler"]
        assert _native.available("adaln_cpu")
        for symbol in (
            "adaln_cuda",
            "residual_adaln_cuda",
            "head_norm_cuda",
            "qk_norm_rope_cuda",
            "qk_codes_cuda",
            "qk_codes_packed_cuda",
            "attention8_cuda",
        ):
            assert _native.available(symbol) == (info["mode"] == "cuda")
        assert bool(_native.kernel_info()) == (info["mode"] == "cuda")


def test_package_works_without_the_native_half() -> None:
    # A module that cannot be loaded, as a CUDA _C under a CPU torch: the reason is kept, nothing raises.
    code = (
        "import sys; from importlib.machinery import ModuleSpec\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return ModuleSpec(name, self) if name in ('cosmos_fast._C', 'cosmos_fast._host') else None\n"
        "    def create_module(self, spec): raise ImportError('libtorch_cuda.so: cannot open shared object file')\n"
        "    def exec_module(self, module): pass\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from cosmos_fast import _native, ops\n"
        "import torch, json\n"
        "y = ops.gelu(torch.ones(2, 2))\n"
        "print(json.dumps([_native.available('adaln_cpu'), _native.reason('adaln_cpu'), _native.build_info()['mode']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    available, reason, mode = json.loads(done.stdout)
    assert not available and "libtorch_cuda.so" in reason and mode == "unknown"


# --- the CPU kernel answers to the reference --------------------------------------------------------


def residual_inputs(
    L: int, D: int, T: int, J: int, dtype: torch.dtype, table: torch.dtype, per_token: bool
) -> tuple[Any, ...]:
    x, branch, *hints = (torch.randn(L, D).to(dtype) for _ in range(2 + J))
    gate, shift, scale = (
        torch.randn(T, 3 * D).to(table)[:, D : 2 * D] for _ in range(3)
    )  # strided, as in use
    weights = torch.rand(J, L if per_token else 1) if J else None
    return x, branch, gate, hints, weights, shift, scale


def close(out: Tensor, exact: Tensor) -> bool:
    """The ratio rule against fp64: at most twice the error of one rounding to out's type, plus fp32 noise."""
    floor = (exact.to(out.dtype).double() - exact).norm()
    return bool((out.double() - exact).norm() <= 2 * floor + 1e-6 * exact.norm() + 1e-12)


def exact_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, tokens_per_frame: int, offset: int, eps: float
) -> Tensor:
    frame = (torch.arange(x.shape[0]) + offset) // tokens_per_frame
    centred = x.double() - x.double().mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 + scale.double()[frame]) + shift.double()[frame]


@needs_native
@pytest.mark.parametrize("out", [BF16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("L", "D", "T", "J", "table", "per_token"),
    [
        (130, 2048, 5, 2, FP32, True),  # the published width, rows cross frames, per-token hint weights
        (65, 2048, 1, 4, BF16, False),  # all four branches, one frame
        (7, 50, 3, 1, BF16, False),  # a width that is no multiple of the vector length
        (1, 8, 1, 0, FP32, False),  # one token, no hints
        (0, 64, 1, 0, FP32, False),  # empty
    ],
)
def test_cpu_op_matches_the_reference(
    L: int, D: int, T: int, J: int, table: torch.dtype, per_token: bool, dtype: torch.dtype, out: torch.dtype
) -> None:
    x, branch, gate, hints, weights, shift, scale = residual_inputs(L, D, T, J, dtype, table, per_token)
    tokens_per_frame, offset = max(1, -(-(L + 3) // T)), 3 if T > 1 else 0
    rows = (tokens_per_frame, offset, 1e-6, out)
    total, h = torch.ops.cosmos_fast.residual_adaln_cpu(x, branch, gate, hints, weights, shift, scale, *rows)
    wanted, _ = reference.residual_adaln(x, branch, gate, hints, weights, shift, scale, *rows)
    assert total.dtype == dtype and h.dtype == out and total.shape == h.shape == x.shape
    torch.testing.assert_close(total, wanted, rtol=8e-3 if dtype == BF16 else 1e-6, atol=1e-6)
    assert close(h, exact_adaln(total, shift, scale, *rows[:3]))
    assert close(
        torch.ops.cosmos_fast.adaln_cpu(x, shift, scale, *rows), exact_adaln(x, shift, scale, *rows[:3])
    )


@needs_native
def test_cpu_op_ignores_a_shift_of_x_and_the_number_of_threads() -> None:
    x, shift, scale = torch.randn(300, 256), torch.randn(3, 256), torch.randn(3, 256)
    run: Callable[[Tensor], Tensor] = lambda x: torch.ops.cosmos_fast.adaln_cpu(x, shift, scale, 100, 0, 1e-6)  # noqa: E731
    torch.testing.assert_close(run(x + 64), run(x), rtol=0, atol=2e-4)  # 64 costs x 6 bits of its 24
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x)
        torch.set_num_threads(2)
        assert torch.equal(run(x), one)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_cpu_op_extremes() -> None:
    shift, scale = torch.zeros(1, 64), torch.zeros(1, 64)
    rows = torch.stack(
        [torch.zeros(64), torch.full((64,), 3e38), torch.arange(64.0) * 1e15, torch.full((64,), torch.nan)]
    )
    y = torch.ops.cosmos_fast.adaln_cpu(rows.bfloat16(), shift, scale, 4, 0, 1e-6)
    assert torch.equal(y[0], torch.zeros(64, dtype=BF16))  # a constant row has no deviation
    assert torch.isfinite(y[2]).all()
    assert torch.isnan(y[3]).all()  # NaN stays NaN through the rounding to bf16


@needs_native
@settings(max_examples=50, deadline=None)
@given(L=st.integers(1, 40), tokens_per_frame=st.integers(1, 12), offset=st.integers(0, 30))
def test_cpu_op_finds_the_frame_of_a_row(L: int, tokens_per_frame: int, offset: int) -> None:
    frames = (offset + L - 1) // tokens_per_frame + 1
    shift = torch.arange(frames, dtype=FP32)[:, None].expand(frames, 4).contiguous()
    y = torch.ops.cosmos_fast.adaln_cpu(
        torch.ones(L, 4), shift, torch.zeros(frames, 4), tokens_per_frame, offset, 1e-6
    )
    assert y[:, 0].tolist() == [(offset + row) // tokens_per_frame for row in range(L)]


@needs_native
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 3, 4)}, "x must be contiguous"),
        ({"x": torch.randn(8, 6).t()}, "x must be contiguous"),
        ({"x": torch.randn(6, 8, dtype=torch.float64)}, "x must be bfloat16 or float32, got float64"),
        ({"shift": torch.randn(1, 8)}, "shift must be (T >= 2, 8)"),
        ({"scale": torch.randn(2, 7)}, "scale must be (T >= 2, 8)"),
        ({"branch": torch.randn(5, 8)}, "branch must be"),
        ({"hints": [torch.randn(6, 8)]}, "hint_weights must be given"),
        ({"hints": [torch.randn(6, 8)], "hint_weights": torch.ones(1, 5)}, "hint_weights must be float32"),
        ({"hints": [torch.randn(6, 8)] * 9, "hint_weights": torch.ones(9, 1)}, "at most 8 hints, got 9"),
        ({"tokens_per_frame": 0}, "tokens_per_frame must be positive"),
        ({"token_offset": -1}, "token_offset not negative"),
    ],
)
def test_cpu_op_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    args: dict[str, Any] = dict(
        x=torch.randn(6, 8), branch=torch.randn(6, 8), gate=torch.randn(2, 8), hints=[], hint_weights=None,
        shift=torch.randn(2, 8), scale=torch.randn(2, 8), tokens_per_frame=3, token_offset=0, eps=1e-6,
    )  # fmt: skip
    torch.ops.cosmos_fast.residual_adaln_cpu(**args)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.ops.cosmos_fast.residual_adaln_cpu(**{**args, **change})


# --- CUDA -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("L", "D"), [(84480, 2048), (333, 2048), (65, 1024), (9, 5120), (1, 8)])
def test_cuda_op_matches_the_reference(L: int, D: int, dtype: torch.dtype) -> None:
    if not _native.available("residual_adaln_cuda"):
        pytest.skip(str(_native.reason("residual_adaln_cuda")))
    cpu = residual_inputs(L, D, 24, 2, dtype, FP32, True)
    x, branch, gate, hints, weights, shift, scale = (
        [h.cuda() for h in a] if isinstance(a, list) else a.cuda() for a in cpu
    )
    gate, shift, scale = (t.contiguous() for t in (gate, shift, scale))
    rows = (-(-(L + 5) // 24), 5, 1e-6, dtype)
    stream = torch.cuda.Stream()  # a launch on any stream but the current one would race with the fill
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        total, h = torch.ops.cosmos_fast.residual_adaln_cuda(
            x, branch, gate, hints, weights, shift, scale, *rows
        )
    stream.synchronize()
    wanted, normed = reference.residual_adaln(x, branch, gate, hints, weights, shift, scale, *rows)
    tolerance = dict(rtol=8e-3, atol=1e-5) if dtype == BF16 else dict(rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(total, wanted, **tolerance)
    error = (h.float() - normed.float()).norm() / normed.float().norm()
    assert error < (2e-3 if dtype == BF16 else 1e-5)
    plain = torch.ops.cosmos_fast.adaln_cuda(total, shift, scale, *rows)
    assert torch.equal(plain, h)  # the same row through either op


@pytest.mark.gpu
def test_kernels_stay_in_registers() -> None:
    if not _native.available("adaln_cuda"):
        pytest.skip(str(_native.reason("adaln_cuda")))
    for kernel in _native.kernel_info():
        assert kernel.get("local_bytes") == 0, kernel


needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("cmake") and shutil.which("ninja") and find_spec("pybind11")),
    reason="needs nvcc, cmake, ninja and pybind11",
)


def compile_log(folder: Path) -> str:
    """What the compiler said of the sources as they are: to `make build-cuda-objects` if it ran, else here."""
    kept = ROOT / "build" / "cuda-objects" / "log"
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]
    if kept.exists() and kept.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return kept.read_text()
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCOSMOS_FAST_COMPILE_ONLY=ON"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return built.stdout + built.stderr


@needs_nvcc
@pytest.mark.slow
def test_cuda_sources_compile_without_spills(tmp_path: Path) -> None:
    log = compile_log(tmp_path)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert len(frames) == 24 + 12 + 2 + 2 and set(frames) == {("0", "0")}, log


# --- packaging --------------------------------------------------------------------------------------


def test_every_module_is_formatted_for_the_declared_packages() -> None:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    packages = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "packages")
    folders = {"cosmos_fast", *(f"cosmos_fast.{p.parent.name}" for p in PACKAGES_BELOW)}
    assert set(packages) == folders


PACKAGES_BELOW = sorted([*ROOT.glob("cosmos_fast/*/__init__.py"), *ROOT.glob("kernels/__init__.py")])


def build_wheel(mode: str, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "*.so", "__pycache__", "tests", "bench"
    )
    shutil.copytree(ROOT, source, ignore=skip)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(
        command, env={**os.environ, "COSMOS_FAST_BUILD": mode}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(tmp_path.glob("*.whl"))


def run_from(wheel: Path, tmp_path: Path, code: str) -> str:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    env = {**os.environ, "PYTHONPATH": str(site)}
    # An editable install would answer for modules that the wheel lacks.
    hide = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    code = hide + code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pure_wheel(tmp_path: Path) -> None:
    wheel = build_wheel("none", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cosmos_fast/kernels/__init__.py" in names and not any(name.endswith(".so") for name in names)
    told = run_from(
        wheel,
        tmp_path,
        "from cosmos_fast import _native; import cosmos_fast.kernels; print(_native.reason('adaln_cpu'))",
    )
    assert "COSMOS_FAST_BUILD=none" in told


@pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("cmake") and shutil.which("ninja") and find_spec("pybind11")),
    reason="needs a C++ compiler, cmake, ninja and pybind11",
)
@pytest.mark.slow
def test_cpu_wheel(tmp_path: Path) -> None:
    wheel = build_wheel("cpu", tmp_path)
    assert "-cp310-abi3-" in wheel.name
    code = (
        "import torch; from cosmos_fast import _native; assert _native.available('adaln_cpu'), _native.reason('adaln_cpu')\n"
        "y = torch.ops.cosmos_fast.adaln_cpu(torch.randn(2, 8), torch.zeros(1, 8), torch.zeros(1, 8), 2, 0, 1e-6)\n"
        "print(_native.build_info()['mode'], round(float(y.std(unbiased=False)), 3))"
    )
    assert run_from(wheel, tmp_path, code).split() == ["cpu", "1.0"]


@pytest.mark.parametrize("mode", ["gpu", ""])
def test_unknown_build_mode_is_refused(mode: str) -> None:
    env = {**os.environ, "COSMOS_FAST_BUILD": mode}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "must be one of none, cpu, cuda, auto" in done.stderr
