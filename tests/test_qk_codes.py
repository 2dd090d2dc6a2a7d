"""The CUDA kernel for codes of rotated q and k: its lanes run on the host, when it is asked, and the kernel on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import _native, codes8, ops_attention8, reference, testing
from cosmos_fast.dispatch import TABLE, use
from cosmos_fast.drawn import Case

ROOT = Path(__file__).resolve().parents[1]
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
FLIPPED = 2e-4
"""Share of codes that may lie on the other side of a rounding than the reference's: 2e-5 do, by sums in another order."""

testing.kernels_from_checkout()
Args = tuple[Any, ...]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, Tensor]]:
    """`qk_codes_cuda` on the CPU: the lanes of csrc/qk_codes_lane.h, 32 of them a warp."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("qk_codes") / "warp.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]  # fmt: skip
    source = ROOT / "tests" / "qk_codes_warp.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).qk_codes

    def call(qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, k_mean: Tensor, steps: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        L, N = qkv.shape[0], k_mean.shape[0]
        q, k = (torch.empty(L, N, 128, dtype=E4M3) for _ in "qk")
        given = [qkv, *(x.float() for x in (q_gain, k_gain)), cos, sin, k_mean, steps]
        held = [x.contiguous() for x in given]
        read, written = ([ctypes.c_void_p(x.data_ptr()) for x in some] for some in (held, (q, k)))
        run(*read, ctypes.c_float(eps), ctypes.c_int64(L), ctypes.c_int64(N), *written)
        return q, k

    return call


def operands(L: int, N: int = 16, K: int = 128, device: str = "cpu", dtype: torch.dtype = BF16) -> Args:
    case = Case("", "", "", {"L": L, "N": N, "K": K, "rotate": 1})
    return testing.inputs("qkv_codes", case, device, dtype)


def of_kernel(args: Args) -> Args:
    """Those of the arguments of `qkv_codes` that its q and k need."""
    return *args[:6], args[8], args[11]


def flipped(codes: tuple[Tensor, ...], args: Args) -> list[float]:
    """Share of the codes of q and of k that are not the reference's; NaN must be where its NaN are."""
    shares = []
    for mine, its in zip(codes, reference.qkv_codes(*args)[:2], strict=True):
        a, b = mine.float(), its.float()
        assert torch.equal(a.isnan(), b.isnan())
        shares.append(float((a != b).logical_and(~a.isnan()).float().mean()))
    return shares


# --- the lanes, on the host --------------------------------------------------------------------------


@pytest.mark.parametrize(("L", "N"), [(64, 16), (9, 48), (1, 16)])
def test_a_warp_makes_the_codes_of_the_reference(on_host: Any, L: int, N: int) -> None:
    args = operands(L, N)
    codes = on_host(*of_kernel(args))
    assert max(flipped(codes, args)) <= FLIPPED
    assert testing.faults("qkv_codes", (*codes, reference.qkv_codes(*args)[2]), args) == []


def test_where_nothing_is_rounded_every_code_is_the_references(on_host: Any) -> None:
    """Heads of one feature of 1 in turn, not rotated: rows of the Hadamard matrix, in place and with its signs."""
    args = list(operands(128))
    qkv = torch.eye(128).repeat_interleave(16, 0).view(128, 1, 16, 128).expand(-1, 3, -1, -1)
    args[0] = qkv.flatten(1).to(BF16)
    args[1], args[2] = torch.ones(128), torch.ones(128)
    args[3], args[4], args[5] = torch.ones(128, 64), torch.zeros(128, 64), torch.zeros(16, 128)
    args[8] = torch.tensor([1.0, 1.0, 1.0])
    q, k = on_host(*of_kernel(tuple(args)))
    signs = reference.hadamard(128).sign().float()[:, None].expand(-1, 16, -1)
    assert torch.equal(q.float(), signs) and torch.equal(k.float(), signs)


def _zeros(qkv: Tensor) -> None:
    qkv[2] = 0


def _nan(qkv: Tensor) -> None:
    qkv[1, 5 * 128 + 77] = torch.nan
    qkv[3, (16 + 9) * 128] = torch.nan


def _infinite(qkv: Tensor) -> None:
    qkv[1, 3] = torch.inf
    qkv[2, (16 + 15) * 128 + 127] = -torch.inf


def _outlier(qkv: Tensor) -> None:
    qkv[:, 64::128] *= 3000


def _tiny(qkv: Tensor) -> None:
    qkv *= 1e-20


@pytest.mark.parametrize("change", [_zeros, _nan, _infinite, _outlier, _tiny])
@pytest.mark.parametrize("steps", [(0.03, 0.06), (2.0**-5, 2.0**-4), (2.0**-12, 2.0**-12), (2.0**30, 1e-30)])
def test_a_warp_follows_the_reference_at_the_edges(
    on_host: Any, change: Callable[[Tensor], None], steps: tuple[float, float]
) -> None:
    args = operands(5)
    change(args[0])
    args[8][:2] = torch.tensor(steps)
    assert max(flipped(on_host(*of_kernel(args)), args)) <= 10 * FLIPPED


@pytest.mark.parametrize("gain", [0.0, 1e-30, 1e4, 3e38, torch.inf, torch.nan])
def test_a_warp_follows_the_reference_with_any_gain(on_host: Any, gain: float) -> None:
    args = operands(4)
    args[1][17], args[2][100] = gain, -gain
    args[8].copy_(reference.qkv_moments(*(*args[:5], args[11]))[3])
    assert max(flipped(on_host(*of_kernel(args)), args)) <= 10 * FLIPPED


def test_a_nan_stays_in_its_head(on_host: Any) -> None:
    args = operands(3)
    before = on_host(*of_kernel(args))
    args[0][1, 4 * 128] = torch.nan
    after = on_host(*of_kernel(args))
    assert after[0][1, 4].float().isnan().all()
    same = after[0].view(torch.uint8) == before[0].view(torch.uint8)
    assert int((~same).sum()) == 128 and torch.equal(after[1].view(torch.uint8), before[1].view(torch.uint8))


# --- when it is asked --------------------------------------------------------------------------------


def test_the_proof_takes_the_kernel_and_no_other(on_host: Any) -> None:
    assert codes8.proven(on_host, "cpu") is on_host
    wrong: dict[str, Callable[..., Any]] = {
        "relative error of q": lambda *given: on_host(*given)[::-1],
        "relative error of k": lambda *given: (on_host(*given)[0], on_host(*given)[1].roll(1, 0)),
        "got nan": lambda *given: tuple(torch.full((37, 16, 128), torch.nan).to(E4M3) for _ in "qk"),
    }
    for words, kernel in wrong.items():
        with pytest.raises(RuntimeError, match=words):
            codes8.proven(kernel, "cpu")


def test_what_the_kernel_does_not_take_goes_to_its_twin(
    on_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def kernel(*given: Any) -> Any:
        asked.append("own")
        return on_host(*given)

    def twin(*args: Any) -> Any:
        asked.append("twin")
        return reference.qkv_codes(*args)

    def values(qkv: Tensor, v_mean: Tensor, v_step: Tensor, pack: bool) -> Tensor:
        like = torch.ones(128), torch.ones(128), *args[3:5], args[5]
        given = (qkv, *like, v_mean, v_step, args[8], False, pack, 1e-6)
        return reference.qkv_codes(*given)[2]

    monkeypatch.setattr(codes8, "_proven_kernel", lambda: kernel)
    call = codes8.load_own(twin, values)
    args = operands(19)
    for pack in (False, True):
        given = *args[:10], pack, args[11]
        assert testing.faults("qkv_codes", call(*given), given) == []
    assert asked == ["own", "own"]
    off = torch.empty(args[0].numel() + 1, dtype=BF16)[1:].view(args[0].shape).copy_(args[0])
    for other in (
        operands(3, dtype=FP32), operands(3, K=64), operands(3, N=8), (*args[:9], False, *args[10:]), (off, *args[1:]),
        (args[0], args[1].half(), *args[2:]), (*args[:3], args[3].repeat(1, 2)[:, ::2], *args[4:]),
    ):  # fmt: skip
        asked.clear()
        call(*other)
        assert asked == ["twin"]


def test_the_kernel_comes_first_and_its_twin_behind_it() -> None:
    own, twin, last = TABLE["qkv_codes"].candidates
    assert (own.name, twin.name, last.name) == ("cuda", "triton", "reference")
    assert own.symbol == "qk_codes_cuda" and own.dtypes == (BF16,)


@pytest.mark.interpret
@pytest.mark.parametrize("pack", [False, True])
def test_values_alone_are_those_made_beside_q_and_k(pack: bool) -> None:
    from cosmos_fast.kernels.qkv_codes import qkv_codes, value_codes

    *given, _, eps = operands(131, 2, 32, dtype=torch.float16)
    alone = value_codes(given[0], *given[6:8], pack)
    assert torch.equal(alone.view(torch.uint8), qkv_codes(*given, pack, eps)[2].view(torch.uint8))


# --- the kernel --------------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _native.available("qk_codes_cuda"), reason=str(_native.reason("qk_codes_cuda"))),
]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize(
    ("L", "N"), [(84480, 16), (10560, 16), (7, 16), (1, 16), (4097, 48), (3, 32), (2113, 16)]
)
def test_gpu_kernel_matches_the_reference(L: int, N: int) -> None:
    args = operands(L, N, device="cuda")
    before = args[0].clone()
    q, k = torch.ops.cosmos_fast.qk_codes_cuda(*of_kernel(args))
    with use(qkv_codes="triton"):
        its = torch.ops.cosmos_fast.qkv_codes(*args)
    assert testing.faults("qkv_codes", (q, k, its[2]), args) == [] and torch.equal(args[0], before)
    for mine, other in zip((q, k), its):
        assert float((mine.view(torch.uint8) != other.view(torch.uint8)).float().mean()) <= FLIPPED


@gpu
def test_gpu_kernel_is_the_warp_on_the_host(on_host: Any) -> None:
    args = operands(300, device="cuda")
    found = torch.ops.cosmos_fast.qk_codes_cuda(*of_kernel(args))
    wanted = on_host(*(x.cpu() if isinstance(x, Tensor) else x for x in of_kernel(args)))
    for mine, its in zip(found, wanted, strict=True):
        assert float((mine.cpu().view(torch.uint8) != its.view(torch.uint8)).float().mean()) <= FLIPPED


@gpu
def test_gpu_kernel_takes_gains_of_either_type_rows_that_lie_apart_and_nan() -> None:
    args = list(operands(21, device="cuda"))
    args[1] = args[1].float()
    args[3], args[4] = torch.cat(args[3:5], 1).split(64, 1)  # halves of one table
    args[0][3, 130] = torch.nan
    found = torch.ops.cosmos_fast.qk_codes_cuda(*of_kernel(tuple(args)))
    assert max(flipped(found, tuple(args))) <= 10 * FLIPPED
    assert torch.equal(found[0].float().isnan().flatten(1).sum(1).cpu(), 128 * (torch.arange(21) == 3))


@gpu
def test_gpu_kernel_gives_the_same_bits_every_time_and_in_a_graph() -> None:
    args = of_kernel(operands(5000, device="cuda"))
    first = torch.ops.cosmos_fast.qk_codes_cuda(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second = torch.ops.cosmos_fast.qk_codes_cuda(*args)
    for x in second:
        x.view(torch.uint8).fill_(0)
    graph.replay()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@gpu
def test_gpu_chooses_the_kernel() -> None:
    args = operands(40, device="cuda")
    with use(qkv_codes="cuda"):
        codes = ops_attention8.qkv_codes(*args[:5], pack=True)
        assert TABLE["qkv_codes"].chosen["cuda", BF16][0] == "cuda"
    moments = reference.qkv_moments(*(*args[:5], 1e-6))
    given = (*args[:5], *moments, True, True, 1e-6)
    assert testing.faults("qkv_codes", (codes.q, codes.k, codes.v), given) == []


@gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": (4, 3 * 8 * 128)}, "N a multiple of 16"),
        ({"q_gain": (64,)}, "q_gain must be contiguous (128,)"),
        ({"cos": (3, 64)}, "cos must be float32 (4, 64)"),
        ({"k_mean": (15, 128)}, "k_mean must be 2048 contiguous float32"),
    ],
)
def test_gpu_kernel_refuses_what_does_not_fit(change: dict[str, tuple[int, ...]], words: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "qkv": (4, 6144), "q_gain": (128,), "k_gain": (128,), "cos": (4, 64), "sin": (4, 64), "k_mean": (16, 128),
        "steps": (3,),
    }  # fmt: skip
    args = {name: torch.ones(shape, device="cuda") for name, shape in (shapes | change).items()}
    args["qkv"] = args["qkv"].to(BF16)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.ops.cosmos_fast.qk_codes_cuda(**args, eps=1e-6)
