"""The 8-bit attention kernels: the Triton twin interpreted, the layouts of the CUDA one, and both on a GPU."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_fast import _native, attention8, ops_attention8, reference, self_attention, testing
from cosmos_fast.dispatch import TABLE, use
from cosmos_fast.exchange import Exchanged, fp8_attend, fp8_operands
from cosmos_fast.operands import STARTS
from cosmos_fast.ops_linear8 import quantised
from cosmos_fast.packing import PACK, packed, unpacked
from cosmos_fast.parallel import ALONE
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.self_attention8 import Fp8, SparseFp8

testing.kernels_from_checkout()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def twin() -> Any:
    from cosmos_fast.kernels import attention8

    return attention8


def operands(L: int, S: int, N: int, K: int, device: str = "cpu", packed: bool = True) -> tuple[Tensor, ...]:
    """q, k, v, score_step, v_step, v_mean: scores up to about 5."""
    draw = torch.Generator().manual_seed(L + 7 * S)
    q, k, v = ((torch.randn(n, N, K, generator=draw) * 30).to(torch.float8_e4m3fn) for n in (L, S, S))
    v_step, v_mean = torch.rand(N, K, generator=draw) + 0.5, torch.randn(N, K, generator=draw)
    step = torch.full((1,), 1.5 * K**-0.5 / 900)
    given = q, k, reference.packed(v) if packed else v, step, v_step, v_mean
    return tuple(x.to(device) for x in given)


def exact(given: tuple[Tensor, ...], keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp64 output and lse over the keys where keep (N, L, S) is true; v_mean and -inf without any."""
    q, k, v, step, v_step, v_mean = given
    rows = v if v.shape == k.shape else reference.unpacked(v, k.shape[0])
    score = q.double().transpose(0, 1) @ k.double().permute(1, 2, 0) * step.double()
    if keep is not None:
        score = score.masked_fill(~keep, -math.inf)
    lse = score.logsumexp(-1)
    weights = torch.nan_to_num((score - lse[..., None]).exp())
    values = weights @ (rows.double() * v_step.double()).transpose(0, 1) + v_mean.double()[:, None]
    return values.transpose(0, 1), lse


def lists(L: int, S: int, N: int, share: float, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """key_tiles in random order with rubbish behind their ends, key_counts, and the kept keys as flags (N, L, S)."""
    tile_q, tile_k = twin().TILE
    rows, columns = -(-L // tile_q), -(-S // tile_k)
    draw = torch.Generator().manual_seed(L + S)
    kept = torch.rand(N, rows, columns, generator=draw) < share
    kept[0, 0] = False  # a query tile without keys
    if N > 1:
        kept[1, 0] = True
    order = torch.where(kept, torch.rand(kept.shape, generator=draw), 2.0).argsort(-1).int()
    counts = kept.sum(-1).int()
    order[torch.arange(columns) >= counts[..., None]] = 10**6
    flags = kept.repeat_interleave(tile_q, 1)[:, :L].repeat_interleave(tile_k, 2)[..., :S]
    return order.contiguous().to(device), counts.to(device), flags.to(device)


def agree(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], mean: Tensor) -> None:
    """Outputs less the mean, which would hide an error, to what rounding of the weights costs; lse to 5e-3."""
    (out, lse), (out_64, lse_64) = got, wanted
    assert testing.rel_error(out.double() - mean, out_64 - mean) < 0.04
    assert torch.equal(torch.isfinite(lse), torch.isfinite(lse_64))
    seen = torch.isfinite(lse_64)
    assert float((lse.double() - lse_64)[seen].abs().max()) < 5e-3


# --- the twin, interpreted ---


@pytest.mark.parametrize("S", [1, 16, 37])
def test_values_are_packed_in_groups_of_sixteen_in_the_order_of_pack(S: int) -> None:
    v = torch.randn(S, 3, 4)
    room = torch.cat((v, torch.zeros(-S % 16, 3, 4)))
    places = [first + token for first in range(0, len(room), 16) for token in PACK]
    assert torch.equal(packed(v), room[places].permute(1, 2, 0)) and torch.equal(unpacked(packed(v), S), v)


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("L", "S", "N", "K"), [(1, 1, 1, 32), (70, 65, 2, 64), (40, 300, 1, 128), (5, 17, 3, 96)]
)
def test_twin_is_attention(L: int, S: int, N: int, K: int, packed: bool) -> None:
    given = operands(L, S, N, K, packed=packed)
    for tiling in (twin().DENSE, twin().Tiling(32, 64, 4, 1)):
        agree(twin().attention_fp8_tiles(*given, torch.float32, tiling=tiling), exact(given), given[5])


@pytest.mark.interpret
def test_twin_sees_the_tiles_of_its_lists_and_no_others() -> None:
    L, S, N = 200, 500, 2
    given, (tiles, counts, keep) = operands(L, S, N, 64), lists(L, S, N, 0.5)
    out, lse = twin().attention_fp8_tiles(*given, torch.float32, tiles, counts)
    agree((out, lse), exact(given, keep), given[5])
    assert torch.equal(out[:192, 0], given[5][0].expand(192, -1)) and torch.isinf(lse[0, :192]).all()


@pytest.mark.interpret
def test_parts_merge_by_their_sums() -> None:
    given = operands(192, 400, 1, 32)
    every = torch.arange(-(-400 // twin().TILE[1]), dtype=torch.int32).view(1, 1, -1)
    first, rest = every[..., :2].contiguous(), every[..., 2:].contiguous()
    run = lambda part: twin().attention_fp8_tiles(  # noqa: E731
        *given, torch.float32, part, torch.full((1, 1), part.shape[2], dtype=torch.int32)
    )
    (a, a_lse), (b, b_lse) = run(first), run(rest)
    lse = torch.logaddexp(a_lse, b_lse)
    merged = a * (a_lse - lse).exp().T[..., None] + b * (b_lse - lse).exp().T[..., None]
    agree((merged, lse), exact(given), given[5])


@pytest.mark.interpret
def test_steps_without_a_key_change_nothing() -> None:
    """A tile of 96 is three steps of 32; of the last tile of 100 keys two lie past the end."""
    given = operands(3, 100, 1, 32)
    tiles, counts = torch.tensor([[[1, 0]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    agree(twin().attention_fp8_tiles(*given, torch.float32, tiles, counts), exact(given), given[5])


# --- what a kernel may rely on ---


def demands() -> dict[str, int]:
    """Bytes on which csrc/attention8.cpp wants each operand to start."""
    source = (ROOT / "csrc" / "attention8.cpp").read_text()
    default = re.search(r"void check_on\([^)]*int alignment = (\d+)\)", source)
    found = re.findall(r"= (?:codes|floats|ints)_of\(\*?(\w+), q, \"\w+\", (.*)\);", source)
    fixed = {"sizeof(float)": 4}
    return {
        name: next((size for text, size in fixed.items() if text in rest), int(default[1]) if default else 16)
        for name, rest in found
    }


class Strict:
    """Our kernel as far as its checks go: refuses what that would, then computes in plain torch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *given: Any) -> Tensor:
        *tensors, out = given
        for (name, start), x in zip(demands().items(), tensors, strict=False):  # lists of tiles come last
            assert x.data_ptr() % start == 0, (name, start, x.data_ptr() % 16)
            apart = name in "qk" and x.stride()[1:] == (x.shape[2], 1) and x.stride(0) % 16 == 0
            assert x.is_contiguous() or apart, (name, x.stride())
        q, k, v, score_step, v_step, v_mean = tensors
        assert v.shape == (*k.shape[1:], -(-k.shape[0] // 16) * 16)
        rows = reference.unpacked(v, k.shape[0])
        self.calls += 1
        return (attention8.emulated(q, k, rows, score_step, torch.float32) * v_step + v_mean).to(out)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Strict:
    """In place of our kernel, and chosen as it is on a GPU, so that producers give what they give there."""
    kernel = Strict()
    chosen = {("cpu", torch.float8_e4m3fn): ("own", kernel)}
    monkeypatch.setattr(TABLE["attention_fp8"], "chosen", chosen)
    return kernel


def test_the_kernel_demands_no_more_than_every_call_is_checked_for() -> None:
    found = demands()
    assert found.keys() == STARTS.keys()
    assert all(STARTS[name] % start == 0 for name, start in found.items()), found


def projection(L: int, N: int, K: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(L)
    angle = torch.rand(L, K // 2, generator=draw)
    return torch.randn(L, 3 * N * K, generator=draw), torch.ones(K), torch.ones(K), angle.cos(), angle.sin()


@pytest.mark.parametrize("L", [1, 15, 33, 64])
@pytest.mark.parametrize("K", [32, 128])
def test_the_kernel_takes_what_a_layer_makes(strict: Strict, L: int, K: int) -> None:
    given = projection(L, 3, K)
    out = Fp8()(*given, 0)
    assert strict.calls == 1 and testing.rel_error(out, self_attention.exact(*given, 0)) < 0.08


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("L", [1, 33])
def test_the_kernel_takes_what_ranks_exchange(strict: Strict, L: int, parts: int) -> None:
    """Codes side by side in rows of bytes, heads part by part, steps and means cut from those of all heads."""
    given = projection(L, 3, 128)
    out = Exchanged(ALONE, fp8_operands, fp8_attend, parts=parts)(*given, 0)
    assert strict.calls == parts and testing.rel_error(out, self_attention.exact(*given, 0)) < 0.08


def test_an_operand_that_starts_where_no_kernel_reads_is_refused_on_any_device() -> None:
    given = list(operands(4, 5, 1, 32))
    aside = torch.empty(4 * 32 + 8, dtype=torch.float8_e4m3fn)[8:].view(4, 1, 32).copy_(given[0])
    with pytest.raises(RuntimeError, match="q must start on 16 bytes of its storage, got 8"):
        torch.ops.cosmos_fast.attention_fp8(aside, *given[1:], torch.float32)
    given[3] = torch.cat((given[3], given[3], given[3]))[2:]
    assert torch.ops.cosmos_fast.attention_fp8(*given, torch.float32).isfinite().all()


def test_libraries_prove_themselves_inside_a_context_of_another_device() -> None:
    with torch.device("meta"):
        assert attention8.proven("plain", attention8.emulated, "cpu") is attention8.emulated


def test_an_engine_chooses_its_attention_outside_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, every example fails, and the first implementation without one is taken in silence."""
    from cosmos_fast import engine

    seen: list[torch.device] = []
    monkeypatch.setattr(engine, "fp8", lambda *_: seen.append(torch.get_default_device()) or Fp8())
    engine.Engine(
        model="edge", recipe=Recipe(name="a", dtype="fp32", attention="fp8"), plan=Plan(device="cpu")
    )
    assert seen and {device.type for device in seen} == {"cpu"}


# --- the layouts of the CUDA kernel ---


def header(name: str) -> str:
    return (ROOT / "csrc" / name).read_text()


def test_the_order_of_packed_values_is_the_kernels() -> None:
    order = re.search(r"kAttention8Order\[16\] = \{([^}]*)\}", header("attention8.h"))
    assert order is not None
    assert tuple(int(x) for x in order[1].split(",")) == tuple(PACK)


def test_scores_become_the_operand_of_the_second_product() -> None:
    """`pack` of attention8.cuh on numbered registers, by the layouts that hopper.cuh states."""
    keys = 96
    score = np.arange(8 * keys).reshape(8, keys)  # the rows of a quad each, g = 0..7
    operand = np.full((8, keys), -1)
    for g in range(8):
        for t in range(4):
            # d[4 j + e]: column 8 j + 2 t + e % 2 of row g + 8 (e / 2); of row g, e is 0 or 1.
            held = {4 * j + e: score[g, 8 * j + 2 * t + e] for j in range(keys // 8) for e in (0, 1)}
            for k in range(keys // 32):
                for a in (0, 2):  # registers of row g: 16 columns apart, bytes 4 t .. 4 t + 3
                    at = 16 * k + 8 * (a // 2) + 2 * (a % 2)
                    first = 32 * k + 16 * (a // 2) + 4 * t
                    operand[g, first : first + 4] = [held[at], held[at + 1], held[at + 4], held[at + 5]]
    # Column c of the operand meets column c of V, which holds key PACK[c % 16] of its group of 16.
    wanted = score.reshape(8, -1, 16)[..., list(PACK)].reshape(8, keys)
    assert np.array_equal(operand, wanted)


def in_thirteen_bits(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """q k^T as Hopper sums it: 32 products and the sum before them, cut off 13 bits below the largest."""
    total = np.zeros((len(q), len(k)))
    for at in range(0, q.shape[1], 32):
        terms = q[:, None, at : at + 32] * k[None, :, at : at + 32]
        terms = np.concatenate((terms, total[..., None]), -1)
        unit = np.exp2(np.floor(np.log2(np.abs(terms).max(-1, keepdims=True) + 1e-30)) - 13)
        total = np.trunc(terms / unit).sum(-1) * unit[..., 0]
    return total


@pytest.mark.parametrize("double", [1.0, 4.0])
def test_the_bound_of_the_sums_is_that_of_thirteen_bits(double: float) -> None:
    """Scores in steps of 1 and of 4 (both operands' blocks doubled): as far off as the tensor cores, no further."""
    from attention8_cases import lse_allowed

    draw = np.random.default_rng(0)
    codes = [
        torch.from_numpy(draw.standard_normal((n, 128)) * 100).to(torch.float8_e4m3fn) for n in (160, 513)
    ]
    q, k = (x.double().numpy() for x in codes)
    step = double * 128**-0.5 / 1e4
    scores, cut = q @ k.T * step, in_thirteen_bits(q, k) * step
    log = lambda x: np.log(np.exp(x).sum(-1))  # noqa: E731
    off, allowed = np.abs(log(scores) - log(cut)).max(), lse_allowed(float(np.abs(scores).max()))
    assert allowed / 50 < off < allowed
    scores[:, -1] = -np.inf  # a key left out
    flat = np.abs(log(q @ k.T * step * 1e-3) - log(scores * 1e-3)).max()
    assert flat > 1.9e-3  # what the check of exact data, whose scores are small, sees


# --- rows of codes ---


def layer(L: int = 70, N: int = 3, K: int = 128, spread: float = 1.0) -> tuple[Tensor, ...]:
    """What a layer gives its attention, v around a mean that is not zero; spread: of the sizes of its channels."""
    qkv, *rest = projection(L, N, K)
    v = qkv[:, 2 * N * K :]
    v += 2 * torch.randn(N * K, generator=torch.Generator().manual_seed(1))
    v *= torch.logspace(0, math.log10(spread), N * K)
    return qkv, *rest


@pytest.mark.parametrize("name", ["reference", "emulated"])
@pytest.mark.parametrize("L", [1, 70])
def test_rows_of_codes_are_the_result_rounded_once_more(name: str, L: int) -> None:
    given = layer(L)
    with use(attention_fp8=name):
        rows, wide = Fp8().quantised(*given, 0), Fp8()(*given, 0)
    assert rows.codes.shape == wide.shape and rows.codes.is_contiguous() and rows.dtype == given[0].dtype
    assert rows.steps.shape == (L,) and rows.steps.is_contiguous() and len(rows.steps.unique()) == 1
    assert torch.frexp(rows.steps).mantissa.eq(0.5).all()
    restored = rows.codes.float() * rows.steps[:, None]
    # What libraries give is rounded to bf16 before the mean joins it.
    atol = float(rows.steps[0]) * 2**-9 + (4e-3 if name == "emulated" else 0)
    torch.testing.assert_close(restored, wide, rtol=1 / 14, atol=atol)


def test_no_queries_are_no_rows() -> None:
    codes = ops_attention8.qkv_codes(*layer())
    rows = ops_attention8.attention_rows(replace(codes, q=codes.q[:0]), torch.bfloat16)
    assert rows.codes.shape == (0, 384) and rows.steps.shape == (0,)


def test_one_step_for_all_rows_is_as_good_as_one_each() -> None:
    """Also where the channel that sets it is a hundred times as large as the others."""
    for spread in (1.0, 100.0):
        given = layer(200, spread=spread)
        exact = Fp8()(*given, 0)
        rows, each = Fp8().quantised(*given, 0), quantised(exact)
        errors = [
            testing.rel_error(x.codes.double() * x.steps[:, None], exact.double()) for x in (rows, each)
        ]
        assert errors[0] < 1.05 * errors[1] < 0.035, errors


def test_no_result_passes_the_largest_code() -> None:
    """A query that sees one key alone gets v of that key, the largest a channel has: the step must reach so far."""
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        q = k = (30 * torch.eye(64)).to(torch.float8_e4m3fn)[:, None].contiguous()
        v = (torch.rand(64, 1, 64, generator=draw) * 896 - 448).to(torch.float8_e4m3fn)
        v_step, v_mean = torch.rand(1, 64, generator=draw), torch.randn(1, 64, generator=draw)
        codes = ops_attention8.Codes(q, k, v, torch.ones(1), v_step, v_mean)
        rows = ops_attention8.attention_rows(codes, torch.float32)
        wanted = (v.float() * v_step + v_mean).flatten(1)
        torch.testing.assert_close(rows.codes.float() * rows.steps[:, None], wanted, rtol=1 / 15, atol=1e-2)
        assert rows.codes.float().abs().max() > 448 / 4  # and no further than it must


def test_a_nan_is_in_the_codes_too() -> None:
    qkv, *rest = layer()
    qkv[7, -1] = math.nan
    assert Fp8().quantised(qkv, *rest, 0).codes.float()[:, -1].isnan().all()


def test_lists_give_rows_of_codes_as_well() -> None:
    given = layer(200)
    sparse = SparseFp8(share=0.5)
    rows, wide = sparse.quantised(*given, 0), sparse(*given, 0)
    torch.testing.assert_close(
        rows.codes.float() * rows.steps[:, None], wide, rtol=1 / 14, atol=float(rows.steps[0]) * 2**-9
    )


def test_what_is_no_output_of_codes_is_named() -> None:
    given, step, e4m3 = operands(4, 5, 1, 32), torch.ones(1), torch.float8_e4m3fn
    call = torch.ops.cosmos_fast.attention_fp8
    assert call(*given, e4m3, step).dtype == e4m3
    for out, out_step in ((e4m3, None), (torch.bfloat16, step)):
        with pytest.raises(RuntimeError, match="e4m3 with an out_step and only then"):
            call(*given, out, out_step)
    with pytest.raises(RuntimeError, match=r"out_step must be \(1,\) float32"):
        call(*given, e4m3, step.double())


# --- how the CUDA kernel is chosen ---


def kernel_on_cpu(fault: str) -> Any:
    """attention8_cuda as documented, but for one fault."""

    def attention8_cuda(q: Tensor, k: Tensor, v: Tensor, step: Tensor, v_step: Tensor, v_mean: Tensor, tiles: Any, counts: Any, out_step: Any) -> Any:  # fmt: skip
        assert v.shape == (*k.shape[1:], -(-k.shape[0] // 16) * 16)
        rows = reference.unpacked(v, k.shape[0])
        if fault == "order":
            rows = v.permute(2, 0, 1)[: k.shape[0]].contiguous()
        v_step = torch.ones_like(v_step) if fault == "step" else v_step
        v_mean = v_mean * (fault != "mean")
        if fault == "tail":
            k, rows = k[: k.shape[0] // 96 * 96], rows[: k.shape[0] // 96 * 96]
        kind = torch.bfloat16 if out_step is None else torch.float8_e4m3fn
        out = reference.attention_fp8(q, k, rows, step, v_step, v_mean, kind, out_step)
        if fault == "columns" and out_step is not None:  # of 16, two pairs swapped
            out = out.view(*q.shape[:2], -1, 16)[..., [0, 1, 4, 5, 2, 3, *range(6, 16)]].reshape(q.shape)
        return out, None

    return attention8_cuda


@pytest.mark.parametrize("fault", ["", "order", "step", "mean", "tail", "columns"])
def test_a_kernel_that_computes_something_else_is_not_chosen(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = attention8.proven
    monkeypatch.setattr(attention8, "proven", lambda name, attend: proven(name, attend, "cpu"))
    monkeypatch.setattr(torch.ops.cosmos_fast, "attention8_cuda", kernel_on_cpu(fault), raising=False)
    attention8.load_own.cache_clear()
    try:
        if fault:
            with pytest.raises(RuntimeError, match="own( as codes)?: relative error of a small example"):
                attention8.load_own()
        else:
            given = operands(9, 37, 2, 128)
            plain = operands(9, 37, 2, 128, packed=False)
            got = [attention8.load_own()(*each, torch.float32) for each in (given, plain)]
            assert torch.equal(*got)
            agree((got[0], exact(given)[1]), exact(given), given[5])
    finally:
        attention8.load_own.cache_clear()


def test_values_come_packed_where_the_chosen_kernel_reads_them_so() -> None:
    on_cpu = torch.device("cpu")
    assert not ops_attention8.wants_packed(on_cpu)
    order = [candidate.name for candidate in TABLE["attention_fp8"].candidates]
    assert order == ["own", "fa3", "cudnn", "triton", "emulated", "reference"]
    qkv, gain, still = torch.randn(21, 3 * 64), torch.ones(64), (torch.ones(21, 32), torch.zeros(21, 32))
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.append(v)
        return q.float()

    for name in ("own", "triton"):
        with use():
            TABLE["attention_fp8"].chosen[on_cpu.type, torch.float8_e4m3fn] = name, attend
            Fp8()(qkv, gain, gain, *still, 0)
    assert [tuple(v.shape) for v in seen] == [(1, 64, 32)] * 2


# --- the CUDA kernel ---

SIZES = [(1, 1), (63, 65), (192, 96), (193, 97), (200, 1000), (1, 4113), (1000, 4113), (4113, 513)]


def own(*given: Any) -> tuple[Tensor, Tensor]:
    if not _native.available("attention8_cuda"):
        pytest.skip(str(_native.reason("attention8_cuda")))
    return torch.ops.cosmos_fast.attention8_cuda(*given)


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "S"), SIZES)
def test_cuda_kernel_is_attention_at_any_length(L: int, S: int) -> None:
    given = operands(L, S, 3, 128, "cuda")
    agree(own(*given), exact(given), given[5])


@pytest.mark.gpu
def test_cuda_kernel_takes_codes_as_they_are_made() -> None:
    """Steps of a layer lie in one tensor, so that of the scores starts on 4 bytes, not on 16."""
    if not _native.available("attention8_cuda"):
        pytest.skip(str(_native.reason("attention8_cuda")))
    L, N, K = 300, 2, 128
    generator = torch.Generator("cuda").manual_seed(5)
    qkv = torch.randn(L, 3 * N * K, generator=generator, device="cuda", dtype=torch.bfloat16)
    gain = torch.ones(K, device="cuda", dtype=torch.bfloat16)
    still = torch.ones(L, K // 2, device="cuda"), torch.zeros(L, K // 2, device="cuda")
    codes = ops_attention8.qkv_codes(qkv, gain, gain, *still, pack=True)
    assert codes.score_step.data_ptr() % 16
    with use(attention_fp8="own"):
        got = ops_attention8.attention_fp8(codes)
    wanted = exact((codes.q, codes.k, codes.v, codes.score_step, codes.v_step, codes.v_mean))
    agree((got, wanted[1]), wanted, codes.v_mean)


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "S"), [*SIZES, (84480, 300)])
def test_cuda_kernel_writes_codes_as_the_reference_does(L: int, S: int) -> None:
    """Those of its own result: rounded to bf16 on the way one in 30 is off by one code, without it next to none."""
    given = operands(L, S, 3, 128, "cuda")
    step = reference.attended_steps(given[4], given[5], 1)
    codes, lse = own(*given, None, None, step)
    wide, same = own(*given)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == wide.shape and torch.equal(lse, same)
    ranks = [
        torch.where(bits < 128, bits.int(), 128 - bits.int())
        for bits in (x.view(torch.uint8) for x in (codes, reference._codes(wide.float(), step)))
    ]
    away = (ranks[0] - ranks[1]).abs()
    assert int(away.max()) <= 1 and float((away > 0).float().mean()) < 0.05
    wanted = reference.attention_fp8(*given, torch.float32) if L * S < 10**7 else wide
    close = (codes.float() * step - wanted.float()).norm() / wanted.float().norm()
    assert float(close) < 0.045
    given[1].view(torch.uint8).fill_(0x7F)  # keys that are no number
    assert own(*given, None, None, step)[0].float().isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("L", "S"), [(1000, 4113), (193, 97)])
def test_cuda_kernel_sees_its_lists(L: int, S: int, share: float) -> None:
    given, (tiles, counts, keep) = operands(L, S, 2, 128, "cuda"), lists(L, S, 2, share, "cuda")
    for got in (
        own(*given, tiles, counts),
        twin().attention_fp8_tiles(*given, torch.bfloat16, tiles, counts),
    ):
        agree(got, exact(given, keep), given[5])
    step = reference.attended_steps(given[4], given[5], 1)
    codes, lse = own(*given, tiles, counts, step)
    agree((codes.float() * step, lse), exact(given, keep), 0 * given[5])


@pytest.mark.gpu
def test_cuda_kernel_repeats_itself_and_reads_nothing_past_its_operands() -> None:
    given = operands(1000, 4113, 3, 128, "cuda")
    first, _ = own(*given)
    filled = [
        torch.full((x.numel() + 8192,), 0x7E, dtype=torch.uint8, device="cuda") for x in given[:3]
    ]  # 448
    parts = []
    for x, room in zip(given[:3], filled, strict=True):
        room[: x.numel()] = x.flatten().view(torch.uint8)
        parts.append(room[: x.numel()].view(torch.float8_e4m3fn).view(x.shape))
    for _ in range(3):
        assert torch.equal(own(*parts, *given[3:])[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])
def test_compiled_twin_is_attention(K: int) -> None:
    for L, S in ((63, 65), (1000, 1113)):
        given = operands(L, S, 2, K, "cuda")
        agree(twin().attention_fp8_tiles(*given, torch.bfloat16), exact(given), given[5])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({2: torch.float32}, "v must be float8_e4m3fn"),
        ({3: torch.float64}, "score_step must be 1 float32"),
    ],
)
def test_cuda_op_refuses_what_does_not_fit(change: dict[int, torch.dtype], words: str) -> None:
    given = list(operands(5, 20, 2, 128, "cuda"))
    own(*given)
    for at, kind in change.items():
        given[at] = given[at].to(kind)
    with pytest.raises(RuntimeError, match=words):
        own(*given)
