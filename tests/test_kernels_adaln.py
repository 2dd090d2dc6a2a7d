"""adaln, residual and residual_adaln: properties of the formula, and rows that break a careless kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import ops, testing
from cosmos_fast.formats import Rows
from cosmos_fast.ops import EPS, Pending

testing.kernels_from_checkout()


def kernels() -> Any:
    from cosmos_fast.kernels import adaln

    return adaln


def tables(rows: int, D: int) -> Tensor:
    return torch.randn(3, rows, D)


@pytest.mark.interpret
def test_a_shift_of_the_row_changes_nothing() -> None:
    x, (shift, scale, _) = torch.randn(3, 64), tables(1, 64)
    plain = kernels().adaln(x, shift, scale, 3, 0, EPS, torch.float32)
    moved = kernels().adaln(x + 100.0, shift, scale, 3, 0, EPS, torch.float32)
    torch.testing.assert_close(moved, plain, rtol=0, atol=2e-4)


@pytest.mark.interpret
@pytest.mark.parametrize("value", [0.0, 5.0, 3e4])
def test_a_constant_row_becomes_the_shift(value: float) -> None:
    x, (shift, scale, _) = torch.full((2, 96), value), tables(1, 96)
    assert torch.equal(kernels().adaln(x, shift, scale, 2, 0, EPS, torch.float32), shift.expand(2, -1))


@pytest.mark.interpret
def test_one_huge_row_leaves_its_neighbours_alone() -> None:
    x, (shift, scale, _) = torch.randn(3, 64), tables(1, 64)
    x[1] *= 1e15
    wild = kernels().adaln(x, shift, scale, 3, 0, EPS, torch.float32)
    tame = kernels().adaln(x[::2].contiguous(), shift, scale, 3, 0, EPS, torch.float32)
    assert torch.equal(wild[::2], tame) and torch.isfinite(wild).all()


@pytest.mark.interpret
def test_a_nan_stays_in_its_row() -> None:
    x, (shift, scale, _) = torch.randn(3, 64), tables(1, 64)
    x[1, 5] = float("nan")
    h = kernels().adaln(x, shift, scale, 3, 0, EPS, torch.float32)
    assert h[1].isnan().all() and torch.isfinite(h[::2]).all()


@pytest.mark.interpret
@pytest.mark.parametrize(("tokens_per_frame", "offset"), [(1, 0), (2, 0), (3, 0), (3, 2), (4, 7), (100, 99)])
def test_each_token_takes_the_row_of_its_frame(tokens_per_frame: int, offset: int) -> None:
    L, D = 6, 32
    rows = (offset + L - 1) // tokens_per_frame + 1
    shift = torch.arange(rows).float()[:, None].expand(rows, D).contiguous()
    h = kernels().adaln(
        torch.zeros(L, D), shift, torch.zeros(rows, D), tokens_per_frame, offset, EPS, torch.float32
    )
    assert h[:, 0].tolist() == [(offset + i) // tokens_per_frame for i in range(L)]


@pytest.mark.interpret
def test_no_gate_no_hint_is_the_identity_and_statistics_see_the_rounded_sum() -> None:
    x, branch = (torch.randn(5, 64).half() for _ in range(2))
    zero = torch.zeros(1, 64).half()
    assert torch.equal(kernels().residual(x, branch, zero, [], None, 5, 0), x)
    gate = torch.randn(1, 64).half()
    total, h = kernels().residual_adaln(x, branch, gate, [], None, zero, zero, 5, 0, EPS, torch.float32)
    assert torch.equal(h, kernels().adaln(total, zero, zero, 5, 0, EPS, torch.float32))


@pytest.mark.interpret
def test_hints_add_up_with_their_weights() -> None:
    x, hints = torch.zeros(4, 32), [torch.full((4, 32), 10.0**j) for j in range(4)]
    gate = torch.zeros(1, 32)
    weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    total = kernels().residual(x, x, gate, hints, weights, 4, 0)
    assert (total == 4321.0).all()
    per_token = weights * torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    total = kernels().residual(x, x, gate, hints, per_token, 4, 0)
    assert total[:, 0].tolist() == [0.0, 4321.0, 0.0, 8642.0]
    # Weights may be a strided view, such as the tokens of one context rank.
    wide = torch.zeros(4, 9)
    wide[:, 3:7] = per_token
    assert torch.equal(kernels().residual(x, x, gate, hints, wide[:, 3:7], 4, 0), total)


@pytest.mark.interpret
def test_five_hints_are_refused() -> None:
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match="at most 4 hints, got 5"):
        kernels().residual(x, x, x[:1], [x] * 5, torch.ones(5, 1), 2, 0)


@pytest.mark.interpret
def test_tables_may_be_fp32_beside_a_half_stream() -> None:
    x = torch.randn(4, 64).half()
    shift, scale, _ = tables(2, 64)
    args = (x, shift, scale, 2, 0, EPS, torch.float16)
    assert testing.faults("adaln", kernels().adaln(*args), args) == []


def test_public_functions_pass_their_arguments_on() -> None:
    x, branch, hint = (torch.randn(4, 32) for _ in range(3))
    gate, shift, scale = (torch.randn(2, 32) for _ in range(3))
    rows, pending = Rows(2), Pending(branch, gate, (hint,), torch.full((1, 1), 0.5))
    total, h = ops.residual_adaln(x, pending, shift, scale, rows)
    expected = x + gate.repeat_interleave(2, 0) * branch + 0.5 * hint
    torch.testing.assert_close(total, expected)
    assert torch.equal(ops.residual(x, pending, rows), total)
    assert torch.equal(ops.adaln(total, shift, scale, rows), h)
    same, h = ops.residual_adaln(x, None, shift, scale, rows)
    assert same is x and torch.equal(h, ops.adaln(x, shift, scale, rows))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"x": torch.zeros(4, 64)[:, ::2]}, "x must be contiguous"),
        ({"shift": torch.zeros(1, 32)}, "T >= 2"),
        ({"scale": torch.zeros(2, 33)}, "with unit stride"),
        ({"rows": Rows(0)}, "positive"),
    ],
)
def test_wrong_operands_are_named(change: dict[str, Any], rule: str) -> None:
    given = {
        "x": torch.zeros(4, 32),
        "shift": torch.zeros(2, 32),
        "scale": torch.zeros(2, 32),
        "rows": Rows(2),
    }
    with pytest.raises(RuntimeError, match=rule):
        ops.adaln(**(given | change))
