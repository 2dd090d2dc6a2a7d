"""What an op must move and compute, and what this GPU was measured to do: never the data sheet.

Letters: L tokens, S context tokens, D width, N heads, K head width, M rows, J hints. Bytes count each operand once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

GEMM = 8192


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations of one call; `precision` picks the compute peak."""

    bytes: int
    flops: int = 0
    precision: str = "bf16"


@dataclass(frozen=True)
class Peaks:
    """Measured rates of one GPU: copy in GB/s (read + write), square GEMM in TFLOP/s. None: not measurable here."""

    copy_gb_s: float
    bf16_tflop_s: float
    fp8_tflop_s: float | None

    def floor_s(self, work: Work) -> float:
        """Least time for this work: the slower of moving the bytes and doing the arithmetic."""
        rate = self.fp8_tflop_s if work.precision == "fp8" and self.fp8_tflop_s else self.bf16_tflop_s
        return max(work.bytes / (self.copy_gb_s * 1e9), work.flops / (rate * 1e12))

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def adaln(L: int, D: int, *, element: int = 2) -> Work:
    """One read of x, one write of h; the (T, D) tables are noise."""
    return Work(2 * L * D * element, 8 * L * D)


def residual_adaln(L: int, D: int, J: int = 0, *, element: int = 2) -> Work:
    """Reads x, branch and J hints, writes x' and h."""
    return Work((4 + J) * L * D * element, (10 + 2 * J) * L * D)


def pointwise(L: int, D: int, *, reads: int = 1, writes: int = 1, element: int = 2) -> Work:
    return Work((reads + writes) * L * D * element)


def gemm(M: int, N: int, K: int, *, precision: str = "bf16") -> Work:
    """(M, K) x (K, N) with bf16 output."""
    element = 1 if precision == "fp8" else 2
    return Work((M * K + K * N) * element + 2 * M * N, 2 * M * N * K, precision)


def attention(L: int, S: int, N: int, K: int, *, precision: str = "bf16") -> Work:
    element = 1 if precision == "fp8" else 2
    return Work((L + 2 * S) * N * K * element + 2 * L * N * K, 4 * L * S * N * K, precision)


def measure_peaks(device: torch.device) -> Peaks:
    """Copy of 2 GiB, 8192-cubed GEMMs on normal data; medians of 10 timed after the clocks settled."""
    copy_s = _copy_s(device)
    a, b = (torch.randn(GEMM, GEMM, dtype=torch.bfloat16, device=device) for _ in range(2))
    bf16_s = _median_s(lambda: a @ b)
    flops = gemm(GEMM, GEMM, GEMM).flops
    fp8 = _fp8_gemm(a, b)
    return Peaks(
        2 * 2**31 / copy_s / 1e9, flops / bf16_s / 1e12, flops / _median_s(fp8) / 1e12 if fp8 else None
    )


def _copy_s(device: torch.device) -> float:
    source = torch.empty(2**30, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return _median_s(lambda: target.copy_(source))


def _fp8_gemm(a: Tensor, b: Tensor) -> Callable[[], Tensor] | None:
    if torch.cuda.get_device_capability(a.device) < (8, 9):
        return None
    one = torch.ones((), device=a.device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _median_s(call: Callable[[], object], rounds: int = 10) -> float:
    for _ in range(5):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3
