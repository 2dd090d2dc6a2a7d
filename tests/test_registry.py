"""The op table as a whole: every op has cases, a true fake, and implementations that agree with its reference."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_fast import testing
from cosmos_fast.dispatch import TABLE, Candidate, use
from cosmos_fast.testing import CASES, MAKERS, Case, as_tuple

testing.kernels_from_checkout()

GROUPS = ("production", "small", "odd", "empty")
SMALL = [
    pytest.param(op, case, id=f"{op}-{case.name.replace(' ', '_')}")
    for op in TABLE
    for case in CASES.get(op, ())
    if case.group != "production"
]
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def overload(op: str) -> Any:
    return getattr(torch.ops.cosmos_fast, op).default


def runnable(op: str, device: str, dtype: torch.dtype) -> list[Candidate]:
    """Candidates that this machine can run on tensors of this device and dtype of the first argument."""
    return [c for c in TABLE[op].candidates if c.obstacle(torch.device(device), dtype) is None]


@pytest.mark.parametrize("op", TABLE)
def test_every_op_has_cases_of_every_group(op: str) -> None:
    cases = CASES.get(op, ())
    assert {case.group for case in cases} == set(GROUPS), f"{op}: needs rows of each group in testing.CASES"
    assert all(case.why for case in cases)
    assert len({case.name for case in cases}) == len(cases)


def test_the_table_has_no_cases_of_ops_that_are_gone() -> None:
    assert set(CASES) == set(MAKERS) == set(TABLE)


@pytest.mark.parametrize("op", TABLE)
def test_reference_is_the_last_resort_and_runs_anywhere(op: str) -> None:
    last = TABLE[op].candidates[-1]
    assert last.name == "reference"
    assert last.obstacle(torch.device("cpu"), torch.float32) is None
    names = [candidate.name for candidate in TABLE[op].candidates]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", TABLE)
def test_every_candidate_has_a_reason_or_loads(op: str) -> None:
    for candidate in TABLE[op].candidates:
        obstacle = candidate.obstacle(torch.device("cpu"), torch.float32)
        assert obstacle or callable(candidate.load()), candidate.name


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_opcheck(op: str, case: Case) -> None:
    args = testing.inputs(op, case, "cpu", torch.float32)
    tests = ["test_schema", "test_faketensor"]  # inference only: there is no autograd to check
    if any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in args):
        # It compares inputs by a product, which torch does not have for codes on a CPU.
        tests.remove("test_schema")
    torch.library.opcheck(overload(op), args, test_utils=tests)


@pytest.mark.parametrize("op", TABLE)
def test_opcheck_under_aot_dispatch(op: str) -> None:
    case = next(c for c in CASES[op] if c.group == "small")
    args = testing.inputs(op, case, "cpu", torch.bfloat16)
    torch.library.opcheck(overload(op), args, test_utils="test_aot_dispatch_dynamic")


@DTYPE
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_fake_has_the_metadata_of_every_candidate(op: str, case: Case, dtype: torch.dtype) -> None:
    args = testing.inputs(op, case, "cpu", dtype)
    with FakeTensorMode() as mode:
        given = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
        fakes = as_tuple(overload(op)(*given))
    for candidate in runnable(op, "cpu", args[0].dtype):
        for fake, real in zip(fakes, as_tuple(candidate.load()(*args)), strict=True):
            assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device), (
                candidate.name
            )
            assert strides(fake) == strides(real), candidate.name


def strides(tensor: Tensor) -> list[int]:
    """Of the axes where a stride means something; none in an empty tensor."""
    return [
        step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()
    ]


def check_candidates(op: str, args: tuple[Any, ...], device: str) -> None:
    for candidate in runnable(op, device, args[0].dtype):
        with use(**{op: candidate.name}):
            given = testing.own_copies(op, args)
            before = [value.clone() if isinstance(value, Tensor) else value for value in given]
            outputs = as_tuple(overload(op)(*given))
        written = testing.written(op, given)
        assert testing.faults(op, (*outputs, *written), args, candidate.name) == [], candidate.name
        for old, new in zip(before, given, strict=True):
            allowed = not isinstance(old, Tensor) or any(new is tensor for tensor in written)
            assert allowed or torch.equal(old, new), f"{candidate.name} wrote to its input"


@DTYPE
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_candidates_agree_with_the_reference(op: str, case: Case, dtype: torch.dtype) -> None:
    check_candidates(op, testing.inputs(op, case, "cpu", dtype), "cpu")


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_gpu_candidates_agree_with_the_reference(op: str, case: Case, dtype: torch.dtype) -> None:
    check_candidates(op, testing.inputs(op, case, "cuda", dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op", TABLE)
def test_gpu_candidates_run_on_a_side_stream_and_in_a_graph(op: str) -> None:
    case = next(c for c in CASES[op] if c.group == "small")
    args = testing.inputs(op, case, "cuda", torch.bfloat16)
    for candidate in runnable(op, "cuda", args[0].dtype):
        with use(**{op: candidate.name}):
            expected = as_tuple(overload(op)(*args))
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                outputs = as_tuple(overload(op)(*args))
            side.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), candidate.name
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = as_tuple(overload(op)(*args))
            for tensor in outputs:
                tensor.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), candidate.name


# --- the yardstick itself --------------------------------------------------------------------------


def small_args(op: str, dtype: torch.dtype) -> tuple[Any, ...]:
    case = next(c for c in CASES[op] if c.group == "small")
    return testing.inputs(op, case, "cpu", dtype)


@pytest.mark.parametrize("op", TABLE)
def test_faults_sees_a_wrong_value_shape_and_nan(op: str) -> None:
    args = small_args(op, torch.bfloat16)
    outputs = testing.eager(op, args)
    assert testing.faults(op, outputs, args) == []
    for i, output in enumerate(outputs):
        wrong = output.clone(memory_format=torch.contiguous_format)
        last = wrong.view(-1)[-1].float()
        wrong.view(-1)[-1] = last + 16 if wrong.dtype.itemsize > 1 else 240 - last  # codes end at 448
        swapped = lambda tensor, i=i: (*outputs[:i], tensor, *outputs[i + 1 :])  # noqa: E731
        assert testing.faults(op, swapped(wrong), args)
        assert testing.faults(op, swapped(output[..., :-1]), args)
        if output.is_floating_point():
            wrong.view(-1)[-1] = float("nan")
            assert testing.faults(op, swapped(wrong), args)


def test_faults_takes_an_infinity_where_the_reference_has_it_and_nowhere_else() -> None:
    empty = next(c for c in CASES["qkv_sums"] if c.group == "empty")
    args = testing.inputs("qkv_sums", empty, "cpu", torch.float32)
    sums, ends = testing.eager("qkv_sums", args)
    assert ends.isinf().all() and testing.faults("qkv_sums", (sums, ends), args) == []
    assert testing.faults("qkv_sums", (sums, -ends), args) and testing.faults(
        "qkv_sums", (sums, ends.sign()), args
    )
    assert testing.faults("qkv_sums", (sums + torch.inf, ends), args)


def test_faults_sees_bf16_statistics() -> None:
    """The ratio rule is sharp enough to tell fp32 statistics from bf16 ones."""
    x, shift, scale, *rest = small_args("adaln", torch.bfloat16)
    mean = x.mean(-1, keepdim=True)
    sloppy = (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift
    assert testing.faults("adaln", sloppy, (x, shift, scale, *rest))


def gelu_codes() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Arguments of gelu_fp8 and their codes before rounding."""
    x = torch.linspace(-8, 8, 4096)[None].contiguous()
    step = torch.tensor([0.1])
    return (x, step), torch.nn.functional.gelu(x) / step


def test_faults_takes_a_code_from_either_side_of_a_boundary_and_no_further() -> None:
    args, exact = gelu_codes()
    for off in (1.0 + 1e-6, 1.0 - 1e-6):
        assert testing.faults("gelu_fp8", (exact * off).to(torch.float8_e4m3fn), args) == []
    for off in (1.01, 0.99):
        assert testing.faults("gelu_fp8", (exact * off).to(torch.float8_e4m3fn), args)
    one_off = exact.to(torch.float8_e4m3fn).view(torch.uint8)
    one_off[0, 77] ^= 1
    assert testing.faults("gelu_fp8", one_off.view(torch.float8_e4m3fn), args)


def test_faults_sees_codes_of_another_gelu_and_of_another_rounding() -> None:
    args, exact = gelu_codes()
    tanh = torch.nn.functional.gelu(args[0], approximate="tanh") / args[1]
    assert testing.faults("gelu_fp8", tanh.to(torch.float8_e4m3fn), args)
    nearest = exact.to(torch.float8_e4m3fn)
    down = nearest.view(torch.uint8) - (nearest.float().abs() > exact.abs()).to(torch.uint8)
    assert testing.faults("gelu_fp8", down.view(torch.float8_e4m3fn), args)
    assert testing.faults("gelu_fp8", (exact * -1).to(torch.float8_e4m3fn), args)


def test_beyond_is_the_distance_to_what_rounds_to_the_code() -> None:
    codes = torch.tensor([0.0, 2.0**-9, 1.0, -1.0, 448.0, 16.0]).to(torch.float8_e4m3fn)
    exact = torch.tensor([-(2.0**-10), 2.0**-8, 0.96875, -1.5, 1e4, 15.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 2.0**-10, 0.0, 0.4375, 0.0, 0.5], dtype=torch.float64)
    assert torch.equal(testing.beyond(codes, exact), expected)


def test_faults_looks_at_what_the_schema_lets_an_op_write() -> None:
    args = small_args("norm_silu", torch.float32)
    given = testing.own_copies("norm_silu", args)
    outputs = as_tuple(overload("norm_silu")(*given))
    (keep,) = testing.written("norm_silu", given)
    assert keep is given[3] and not torch.equal(keep, args[3])
    assert testing.faults("norm_silu", (*outputs, keep), args) == []
    assert testing.faults("norm_silu", (*outputs, args[3]), args)
    assert testing.faults("norm_silu", (*outputs, keep, keep), args)


def test_a_forced_candidate_that_cannot_run_is_an_error() -> None:
    args = small_args("adaln", torch.float32)
    with use(adaln="triton"), pytest.raises(Exception, match="triton.*needs a cuda tensor"):
        overload("adaln")(*args)


def test_inputs_are_the_same_on_every_call() -> None:
    first, second = small_args("adaln", torch.float32), small_args("adaln", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [("gellu=reference", "no op named gellu"), ("gelu", "must be one of"), ("gelu=turbo", "must be one of")],
)
def test_a_typo_in_the_environment_is_an_error_at_the_first_call(setting: str, message: str) -> None:
    code = "import torch; from cosmos_fast import ops; ops.gelu(torch.zeros(2, 2))"
    env = {**os.environ, "COSMOS_FAST_OPS": setting}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr
