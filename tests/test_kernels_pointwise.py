"""gelu, patches, the solver step and pixels: known values, and the bits where they are fixed."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_fast import ops, reference, testing
from cosmos_fast.schedule import base_schedule, unipc_coefficients

testing.kernels_from_checkout()
NAN = float("nan")
GOLDEN = Path(__file__).parent / "golden"


def kernels(module: str) -> Any:
    return import_module(f"cosmos_fast.kernels.{module}")


@pytest.mark.interpret
def test_gelu_of_known_values_and_extremes() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 40.0, -40.0, math.inf, 6e4])
    y = kernels("gelu").gelu(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.84134475, -0.15865525, 40.0, 0.0, math.inf, 6e4]))
    assert kernels("gelu").gelu(torch.tensor([NAN])).isnan().all()


@pytest.mark.interpret
def test_gelu_keeps_shape_and_has_its_symmetry() -> None:
    x = torch.randn(3, 5, 7)
    y, other = kernels("gelu").gelu(x), kernels("gelu").gelu(-x)
    assert y.shape == x.shape
    torch.testing.assert_close(y - other, x)


@pytest.mark.interpret
def test_patchify_puts_every_value_in_its_place() -> None:
    C, T, H, W = 2, 3, 4, 6
    z = torch.arange(C * T * H * W).float().view(C, T, H, W)
    patches = kernels("patches").patchify(z, torch.tensor([1.0, 0.0, 1.0]))
    assert patches.shape == (T * 2 * 3, 4 * (C + 2))
    for t, h, w in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
        token = patches[(t * 2 + h) * 3 + w].view(C + 2, 2, 2)
        assert torch.equal(token[:C], z[:, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2])
        assert (token[C] == float(t != 1)).all() and (token[C + 1] == 0).all()


@pytest.mark.interpret
def test_a_nan_in_the_latent_stays_out_of_the_mask_channels() -> None:
    z = torch.full((1, 1, 2, 2), NAN)
    assert kernels("patches").patchify(z, torch.ones(1))[0, 4:].tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.interpret
def test_unpatchify_reads_features_row_column_channel() -> None:
    T, H, W, C = 2, 4, 6, 3
    y = torch.arange(T * 2 * 3 * 4 * C).float().view(-1, 4 * C)
    z = kernels("patches").unpatchify(y, T, H, W)
    for c, t, h, w in ((0, 0, 0, 0), (2, 1, 3, 5), (1, 0, 2, 3)):
        token = y[(t * 2 + h // 2) * 3 + w // 2].view(2, 2, C)
        assert z[c, t, h, w] == token[h % 2, w % 2, c]


@pytest.mark.interpret
@pytest.mark.parametrize("strip", [(1, 2, 1), (2, 4, 2), (4, 16, 4), (8, 1, 4)])
def test_every_strip_turns_the_same_values(strip: tuple[int, int, int]) -> None:
    """Rows and tokens that do not divide those of the latent, and strips larger than all of it."""
    patches = kernels("patches")
    z, mask = torch.randn(3, 3, 6, 10), torch.tensor([1.0, 0.0, 1.0])
    vectors = reference.patchify(z, mask)
    assert torch.equal(patches.patchify(z, mask, strip=patches.Strip(*strip)), vectors)
    y = torch.randn(3 * 3 * 5, 4 * 3)
    assert torch.equal(
        patches.unpatchify(y, 3, 6, 10, strip=patches.Strip(*strip)), reference.unpatchify(y, 3, 6, 10)
    )


def test_unpatchify_never_returns_its_input() -> None:
    y = torch.randn(1, 4)
    assert ops.unpatchify(y, 1, 2, 2).data_ptr() != y.data_ptr()


@pytest.mark.interpret
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("guided", [True, False])
def test_every_solver_step_has_the_bits_of_the_reference(step: int, guided: bool) -> None:
    x, c, u, m1, m2, last = torch.randn(6, 1, 16, 1, 3, 5)
    args = (x, c, u if guided else None, m1, m2, last, 3.0, unipc_coefficients(base_schedule(4))[step])
    for mine, its in zip(kernels("solver").guided_unipc(*args), reference.guided_unipc(*args), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.interpret
def test_a_tensor_without_weight_does_not_reach_the_result() -> None:
    x, c, u, nan = (
        torch.randn(1, 16, 1, 2, 2),
        *torch.randn(2, 1, 16, 1, 2, 2),
        torch.full((1, 16, 1, 2, 2), NAN),
    )
    first, *_, final = unipc_coefficients(base_schedule(4))
    for tensor in kernels("solver").guided_unipc(x, c, u, nan, nan, x, 2.0, first):
        assert torch.isfinite(tensor).all()
    x_next, m, _ = kernels("solver").guided_unipc(x, c, u, nan, nan, nan, 2.0, final)
    assert torch.equal(x_next, m) and torch.isfinite(m).all()


@pytest.mark.interpret
def test_solver_takes_velocities_of_any_strides() -> None:
    x, m1, m2, last = torch.randn(4, 1, 16, 2, 3, 4)
    c, u = torch.randn(2, 1, 16, 2, 4, 3).transpose(-1, -2)
    args = (x, c, u, m1, m2, last, 3.0, unipc_coefficients(base_schedule(9))[4])
    assert testing.faults("guided_unipc", kernels("solver").guided_unipc(*args), args) == []


def test_solver_refuses_what_does_not_fit() -> None:
    x = torch.zeros(1, 16, 1, 2, 2)
    coefficients = unipc_coefficients(base_schedule(4))[2]
    with pytest.raises(RuntimeError, match="8 coefficients, got 3"):
        ops.guided_unipc(x, x, x, x, x, x, 1.0, [1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="float32"):
        ops.guided_unipc(x, x, x, x.double(), x, x, 1.0, coefficients)
    with pytest.raises(RuntimeError, match="velocities must be"):
        ops.guided_unipc(x, x, x[:, :8], x, x, x, 1.0, coefficients)


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).repeat(3).view(4, 8, 8, 3)


@pytest.mark.interpret
def test_pixels_clamps_and_truncates_and_turns_codes_back() -> None:
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 7.0]).repeat(3).view(1, 3, 1, 1, 7)
    assert kernels("pixels").pixels(x)[0, 0, :, 0].tolist() == [0, 0, 0, 127, 254, 255, 255]
    codes = every_code()
    # A code's centre, so that no rounding decides.
    x = ((codes.float() + 0.5) / 127.5 - 1).permute(3, 0, 1, 2)[None]
    for layout in (x, x.contiguous()):
        assert torch.equal(kernels("pixels").pixels(layout), codes)
        assert torch.equal(kernels("pixels").pixels(layout[:, :, :, ::2]), codes[:, ::2])
        assert torch.equal(kernels("pixels").pixels(layout[:, :, :1, ::2]), codes[:1, ::2])


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalized_rounds_twice(dtype: torch.dtype) -> None:
    codes = every_code()
    assert torch.equal(kernels("pixels").normalized(codes, dtype), reference.normalized(codes, dtype))


def test_normalized_equals_the_published_value_of_all_256_codes() -> None:
    pinned = np.load(GOLDEN / "normalize_bf16.npz")
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.contiguous().view(1, 16, 16, 3)
    control, exact = ops.normalized(codes), ops.normalized(codes, torch.float32).bfloat16()
    assert control.dtype == exact.dtype == torch.bfloat16
    for channel in range(3):
        assert np.array_equal(control[0, channel].float().flatten().numpy(), pinned["control_bf16_then_div"])
        assert np.array_equal(exact[0, channel].float().flatten().numpy(), pinned["x0_fp32_then_bf16"])
    assert (control != exact).sum() == 3 * 128


def test_normalized_in_fp32_has_no_bf16_rounding_and_leaves_its_input() -> None:
    codes = every_code()
    out = ops.normalized(codes, torch.float32)
    turned = codes.permute(3, 0, 1, 2)[None]
    assert out.dtype == torch.float32 and out.stride() == turned.stride()
    assert torch.equal(out, turned.float() / 127.5 - 1)
    assert torch.equal(codes, every_code()), "the input must not be scaled in place"


@pytest.mark.gpu
def test_gpu_normalized_has_every_bit_in_bf16() -> None:
    codes = every_code().cuda()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(kernels("pixels").normalized(codes, dtype), reference.normalized(codes, dtype))


def test_pixels_refuses_what_is_no_clip() -> None:
    with pytest.raises(RuntimeError, match=r"\(1, 3, F, H, W\)"):
        ops.pixels(torch.zeros(2, 3, 1, 2, 2))
    with pytest.raises(RuntimeError, match="uint8"):
        ops.normalized(torch.zeros(1, 2, 2, 3))
