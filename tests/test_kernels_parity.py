"""Every Triton kernel against its reference on every case: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fence import SENTINEL, Fenced
from torch import Tensor

from cosmos_fast import testing
from cosmos_fast.dispatch import TABLE, use
from cosmos_fast.testing import CASES, Case, as_tuple

testing.kernels_from_checkout()

pytestmark = pytest.mark.slow
KERNELS = sorted(op for op, row in TABLE.items() if any(c.name == "triton" for c in row.candidates))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = ("small", "odd", "empty")


def kernel(op: str) -> Callable[..., Any]:
    return next(c for c in TABLE[op].candidates if c.name == "triton").load()


def rows(*groups: str) -> list[Any]:
    return [
        pytest.param(op, case, id=f"{op}-{case.name.replace(' ', '_')}")
        for op in KERNELS
        for case in CASES[op]
        if case.group in groups
    ]


def test_only_products_are_left_to_libraries() -> None:
    assert set(TABLE) - set(KERNELS) <= {"attention", "attention_fp8", "linear_fp8"}


# --- interpreted -----------------------------------------------------------------------------------

# The interpreter truncates to bf16 where a GPU rounds to nearest; fp16 is exact there.
INTERPRETED = pytest.mark.parametrize("dtype", ["fp32", "fp16"])


@pytest.mark.interpret
@INTERPRETED
@pytest.mark.parametrize(("op", "case"), rows(*SIZES))
def test_interpreted(op: str, case: Case, dtype: str) -> None:
    args = testing.inputs(op, case, "cpu", DTYPES[dtype])
    assert testing.faults(op, kernel(op)(*args), args) == []


@pytest.mark.interpret
@pytest.mark.parametrize(("op", "case"), rows("odd"))
def test_interpreted_writes_all_of_its_outputs_and_nothing_else(op: str, case: Case) -> None:
    check_fences(op, case, "cpu", torch.float32)


def check_fences(op: str, case: Case, device: str, dtype: torch.dtype) -> None:
    args = testing.inputs(op, case, device, dtype)
    with Fenced() as fenced:
        outputs = as_tuple(kernel(op)(*args))
    assert len(fenced.buffers) >= len(outputs) and fenced.broken() == 0
    assert testing.faults(op, outputs, args) == []


def test_a_fence_notices_a_write_outside_and_a_value_left_out() -> None:
    with Fenced(fence=64) as fenced:
        x = torch.empty(3, 5)
    assert (x.flatten().view(torch.uint8) == SENTINEL).all() and fenced.broken() == 0
    x.as_strided((1,), (1,), x.storage_offset() + 15).fill_(1.0)
    assert 1 <= fenced.broken() <= 4


# --- compiled --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), rows(*SIZES))
def test_gpu(op: str, case: Case, dtype: str) -> None:
    args = testing.inputs(op, case, "cuda", DTYPES[dtype])
    assert testing.faults(op, kernel(op)(*args), args) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), rows("production"))
def test_gpu_production(op: str, case: Case) -> None:
    args = testing.inputs(op, case, "cuda", torch.bfloat16)
    assert testing.faults(op, kernel(op)(*args), args) == []
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), rows("odd"))
def test_gpu_writes_all_of_its_outputs_and_nothing_else(op: str, case: Case) -> None:
    check_fences(op, case, "cuda", torch.bfloat16)


@pytest.fixture
def small(op: str) -> Iterator[tuple[Any, ...]]:
    case = next(c for c in CASES[op] if c.group == "small")
    yield testing.inputs(op, case, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNELS)
def test_gpu_runs_on_the_current_stream(op: str, small: tuple[Any, ...]) -> None:
    """Inputs are ready on the side stream only after a long sleep; a launch elsewhere would read what is stale."""
    expected = as_tuple(kernel(op)(*small))
    ready = [value.clone() if isinstance(value, Tensor) else value for value in small]
    stale = [torch.zeros_like(v) if isinstance(v, Tensor) else v for v in small]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(stale, ready, strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
        outputs = as_tuple(kernel(op)(*stale))
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNELS)
def test_gpu_can_be_captured(op: str, small: tuple[Any, ...]) -> None:
    expected = as_tuple(kernel(op)(*small))  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = as_tuple(kernel(op)(*small))
    for tensor in outputs:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNELS)
def test_gpu_twice_gives_the_same_bits(op: str, small: tuple[Any, ...]) -> None:
    first, second = (as_tuple(kernel(op)(*small)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.multigpu
@pytest.mark.parametrize("op", KERNELS)
def test_gpu_runs_on_the_device_of_its_tensors(op: str) -> None:
    case = next(c for c in CASES[op] if c.group == "small")
    args = testing.inputs(op, case, "cuda:1", torch.bfloat16)
    assert torch.cuda.current_device() == 0
    outputs = as_tuple(kernel(op)(*args))
    assert all(tensor.device == torch.device("cuda:1") for tensor in outputs)
    assert torch.cuda.current_device() == 0
    assert testing.faults(op, outputs, args) == []


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNELS)
def test_gpu_is_the_choice_and_compiles_without_a_break(op: str, small: tuple[Any, ...]) -> None:
    call = getattr(torch.ops.cosmos_fast, op)
    torch._dynamo.reset()  # every op is one more recompilation of the same lambda, and those are limited
    with use(**{op: "triton"}):
        compiled = torch.compile(lambda *args: call(*args), fullgraph=True)
        outputs = as_tuple(compiled(*small))
    assert testing.faults(op, outputs, small) == []


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["guided_unipc"])
def test_gpu_rounds_as_the_reference_does(op: str) -> None:
    """The solver step is not fused into multiply-adds, so a sampler gives the same latents with either."""
    for case in CASES[op]:
        args = testing.inputs(op, case, "cuda", torch.float32)
        for mine, its in zip(as_tuple(kernel(op)(*args)), testing.eager(op, args), strict=True):
            assert torch.equal(mine, its), case.name
