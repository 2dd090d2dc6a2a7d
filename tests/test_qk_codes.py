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

from cosmos_fast import _native, codes8, ops_attention8, ops_exchange, reference, testing
from cosmos_fast.dispatch import TABLE, use
from cosmos_fast.drawn import Case
from cosmos_fast.formats import cuts

ROOT = Path(__file__).resolve().parents[1]
BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
FLIPPED = 2e-4
"""Share of codes that may lie on the other side of a rounding than the reference's: 2e-5 do, by sums in another order."""

testing.kernels_from_checkout()
Args = tuple[Any, ...]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The lanes of csrc/qk_codes_lane.h, 32 of them a warp, for the CPU."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("qk_codes") / "warp.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]  # fmt: skip
    source = ROOT / "tests" / "qk_codes_warp.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(call: Any, given: tuple[Tensor, ...], eps: float, *rest: int | Tensor) -> None:
    """A function of the library over operands in the order of `qk_codes_cuda`."""
    qkv, q_gain, k_gain, *others = given
    held = [x.contiguous() for x in (qkv, q_gain.float(), k_gain.float(), *others)]
    sizes = ctypes.c_int64(len(qkv)), ctypes.c_int64(others[2].shape[0])
    more = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x) for x in rest]
    call(*(ctypes.c_void_p(x.data_ptr()) for x in held), ctypes.c_float(eps), *sizes, *more)


@pytest.fixture(scope="module")
def on_host(library: ctypes.CDLL) -> Callable[..., tuple[Tensor, Tensor]]:
    """`qk_codes_cuda` on the CPU."""

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        *given, eps = args
        q, k = (torch.empty(len(given[0]), given[5].shape[0], 128, dtype=E4M3) for _ in "qk")
        run(library.qk_codes, tuple(given), eps, q, k)
        return q, k

    return call


@pytest.fixture(scope="module")
def packed_on_host(library: ctypes.CDLL) -> Callable[..., None]:
    """`qk_codes_packed_cuda` on the CPU."""

    def call(*args: Any) -> None:
        *given, columns, parts, eps, out = args
        own = given[5].shape[0] // columns
        run(library.qk_codes_packed, tuple(given), eps, columns, min(parts, own), out)

    return call


def operands(L: int, N: int = 16, K: int = 128, device: str = "cpu", dtype: torch.dtype = BF16) -> Args:
    case = Case("", "", "", {"L": L, "N": N, "K": K, "rotate": 1})
    return testing.inputs("qkv_codes", case, device, dtype)


def of_kernel(args: Args) -> Args:
    """Those of the arguments of `qkv_codes` that its q and k need."""
    return *args[:6], args[8], args[11]


LAYOUTS = [(1, 1), (1, 5), (2, 2), (2, 3), (4, 3), (8, 4), (16, 1)]
"""Columns and parts of 16 heads: even and uneven parts, more parts than heads of a column."""


def unpacked(packed: Tensor, L: int, N: int, columns: int, parts: int) -> list[Tensor]:
    """q, k and v (L, N, 128) from where they travel from."""
    pieces = ops_exchange.split(packed, (L, N, 128), columns, parts)
    heads = torch.cat([x.view(torch.uint8) for x in pieces], dim=3)  # (columns, L, 3, heads of a column, 128)
    return [x.transpose(0, 1).flatten(1, 2) for x in heads.unbind(2)]


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


@pytest.mark.parametrize(("columns", "parts"), LAYOUTS)
def test_codes_go_to_where_they_travel_from_and_nowhere_else(
    on_host: Any, packed_on_host: Any, columns: int, parts: int
) -> None:
    *given, eps = of_kernel(operands(5))
    packed = torch.full((5 * 3 * 16 * 128,), 0x55, dtype=torch.uint8)
    packed_on_host(*given, columns, parts, eps, packed)
    q, k, v = unpacked(packed.view(E4M3), 5, 16, columns, parts)
    for mine, its in zip((q, k), on_host(*given, eps), strict=True):
        assert torch.equal(mine, its.view(torch.uint8))
    assert (v == 0x55).all()


@pytest.mark.parametrize("L", [1, 84480, 1 << 33])
def test_a_place_is_where_the_exchange_looks(library: ctypes.CDLL, L: int) -> None:
    """For any number of tokens: those of 2^33 do not fit in 32 bits."""
    for N in (16, 48):
        for columns in (c for c in (1, 2, 3, 4, 16) if N % c == 0):
            for parts in range(1, N // columns + 1):
                found, begin, wanted = (ctypes.c_int64 * 2)(), 0, {}
                for cut in cuts(N // columns, parts):
                    apart = (cut.stop - cut.start) * 128
                    for column in range(columns):
                        for i, head in enumerate(range(cut.start, cut.stop)):
                            wanted[column * (N // columns) + head] = (
                                begin + column * L * 3 * apart + i * 128,
                                apart,
                            )
                    begin += columns * L * 3 * apart
                for head in range(N):
                    library.qk_place(head, ctypes.c_int64(L), N, columns, parts, found)
                    assert tuple(found) == wanted[head], (N, columns, parts, head)


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


def test_the_proof_of_what_travels_takes_the_kernel_and_no_other(packed_on_host: Any) -> None:
    assert codes8.proven_packed(packed_on_host, "cpu") is packed_on_host

    def other_parts(*args: Any) -> None:
        packed_on_host(*args[:8], 2, *args[9:])

    def over_v(*args: Any) -> None:
        packed_on_host(*args)
        args[-1].view(-1, 3, 128 * 2)[:, 2] = 1.0

    for kernel in (other_parts, over_v, lambda *args: None):
        with pytest.raises(RuntimeError, match="relative error of what travels"):
            codes8.proven_packed(kernel, "cpu")


def test_what_travels_is_the_kernels_where_it_takes_it(
    packed_on_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def kernel(*args: Any) -> None:
        asked.append("own")
        packed_on_host(*args)

    def twin(*args: Any) -> Tensor:
        asked.append("twin")
        return reference.codes_packed(*args)

    def write_values(
        qkv: Tensor, v_mean: Tensor, v_step: Tensor, packed: Tensor, columns: int, parts: int
    ) -> None:
        L, (N, K) = len(qkv), v_mean.shape
        v = ((qkv.chunk(3, 1)[2].unflatten(1, (N, K)).float() - v_mean) / v_step).clamp(-448, 448).to(E4M3)
        pieces = ops_exchange.split(packed, (L, N, K), columns, parts)
        for cut, piece in zip(cuts(N // columns, parts), pieces, strict=True):
            piece[:, :, 2] = v.unflatten(1, (columns, -1))[:, :, cut].transpose(0, 1)

    monkeypatch.setattr(codes8, "_proven_packed_kernel", lambda: kernel)
    call = codes8.load_own_packed(twin, write_values)
    *given, rotate, _, eps = operands(9)
    for columns, parts in LAYOUTS:
        args = *given, rotate, columns, parts, eps
        assert testing.faults("codes_packed", call(*args), args) == []
    assert asked == ["own"] * len(LAYOUTS)
    asked.clear()
    call(*given, False, 2, 2, eps)
    assert asked == ["twin"]


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
    packed, *others = TABLE["codes_packed"].candidates
    assert [c.name for c in others] == ["triton", "composed", "reference"] and packed.name == "cuda"
    assert (packed.symbol, packed.dtypes, packed.capability, packed.packages, packed.device) == (
        "qk_codes_packed_cuda", own.dtypes, own.capability, own.packages, own.device,
    )  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("pack", [False, True])
def test_values_alone_are_those_made_beside_q_and_k(pack: bool) -> None:
    from cosmos_fast.kernels.qkv_codes import qkv_codes, value_codes

    *given, _, eps = operands(131, 2, 32, dtype=torch.float16)
    alone = value_codes(given[0], *given[6:8], pack)
    assert torch.equal(alone.view(torch.uint8), qkv_codes(*given, pack, eps)[2].view(torch.uint8))


@pytest.mark.interpret
@pytest.mark.parametrize(("columns", "parts"), [(1, 1), (2, 3)])
def test_values_are_written_to_where_they_travel_from(columns: int, parts: int) -> None:
    from cosmos_fast.kernels import qkv_codes

    *given, _, eps = operands(37, 6, 32, dtype=torch.float16)
    whole = qkv_codes.codes_packed(*given, columns, parts, eps)
    packed = torch.full((37 * 3 * 6 * 32,), 0x55, dtype=torch.uint8)
    qkv_codes.write_packed_values(given[0], *given[6:8], packed.view(E4M3), columns, parts)
    for piece, its in zip(
        *(ops_exchange.split(x.view(torch.uint8), (37, 6, 32), columns, parts) for x in (packed, whole))
    ):
        assert torch.equal(piece[:, :, 2], its[:, :, 2]) and (piece[:, :, :2] == 0x55).all()


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
@pytest.mark.parametrize(("columns", "parts"), LAYOUTS)
@pytest.mark.parametrize(("L", "N"), [(2113, 16), (1, 16), (37, 48)])
def test_gpu_codes_travel_with_the_bits_of_one_rank(L: int, N: int, columns: int, parts: int) -> None:
    *given, rotate, _, eps = operands(L, N, device="cuda")
    with use(codes_packed="cuda", qkv_codes="cuda"):
        packed = torch.ops.cosmos_fast.codes_packed(*given, rotate, columns, parts, eps)
        alone = torch.ops.cosmos_fast.qkv_codes(*given, rotate, False, eps)
    assert testing.faults("codes_packed", packed, (*given, rotate, columns, parts, eps)) == []
    for mine, its in zip(unpacked(packed, L, N, columns, parts), alone, strict=True):
        assert torch.equal(mine, its.view(torch.uint8))


@gpu
@pytest.mark.parametrize("case", testing.CASES["codes_packed"], ids=lambda case: case.name)
def test_gpu_every_case_of_what_travels(case: Case) -> None:
    """Those that the kernel does not take come from its twin."""
    args = testing.inputs("codes_packed", case, "cuda", BF16)
    with use(codes_packed="cuda"):
        assert testing.faults("codes_packed", torch.ops.cosmos_fast.codes_packed(*args), args) == []


@gpu
def test_gpu_writes_past_two_and_four_gigabytes() -> None:
    L = 1_000_000  # 6.1 GB of codes, 12.3 of what they are made of
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    qkv, angles = torch.randn(1000, 6144, device="cuda").to(BF16), torch.rand(1000, 64, device="cuda")
    gains, mean = torch.ones(2, 128, device="cuda"), torch.zeros(16, 128, device="cuda")
    few = qkv, *gains, angles.cos(), angles.sin(), mean, torch.ones(3, device="cuda") / 32
    many = [x.repeat(L // 1000, 1) if len(x) == 1000 else x for x in few]
    packed = torch.empty(L * 6144, dtype=E4M3, device="cuda")
    torch.ops.cosmos_fast.qk_codes_packed_cuda(*many, 2, 3, 1e-6, packed)
    q, k = torch.ops.cosmos_fast.qk_codes_cuda(*few, 1e-6)
    for piece, cut in zip(ops_exchange.split(packed, (L, 16, 128), 2, 3), cuts(8, 3), strict=True):
        for column in range(2):
            heads = slice(8 * column + cut.start, 8 * column + cut.stop)
            for which, alone in enumerate((q, k)):
                rows = piece[column, :, which].unflatten(0, (-1, 1000)).view(torch.uint8)
                assert (rows == alone[:, heads].view(torch.uint8)).all()


@gpu
def test_gpu_packed_kernel_refuses_what_does_not_fit() -> None:
    *given, eps = of_kernel(operands(4, device="cuda"))
    out = torch.empty(4 * 6144, dtype=E4M3, device="cuda")
    packed = torch.ops.cosmos_fast.qk_codes_packed_cuda
    for columns, parts in ((0, 1), (3, 1), (2, 0)):
        with pytest.raises(RuntimeError, match="columns must divide the 16 heads and parts be positive"):
            packed(*given, columns, parts, eps, out)
    for other in (out[1:], out.view(torch.uint8), out.view(-1, 2)[:, 0], out.cpu()):
        with pytest.raises(RuntimeError, match="out must be 24576 contiguous e4m3 codes"):
            packed(*given, 2, 2, eps, other)


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
