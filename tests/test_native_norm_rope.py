"""The CUDA C++ head_norm and qk_norm_rope: head widths and counts beyond the case table, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch

from cosmos_fast import _native, testing

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not _native.available("qk_norm_rope_cuda"), reason=str(_native.reason("qk_norm_rope_cuda"))
    ),
]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("L", "N", "K"),
    [
        (84480, 16, 128),  # the published heads: no bound checks
        (7, 3, 128),  # a part of the heads in flight, a part of the last block
        (9, 5, 96),  # lanes without features
        (5, 3, 256),  # the widest
        (3, 33, 16),  # the narrowest, several turns
        (1, 1, 64),
    ],
)
def test_cuda_norm_rope_matches_the_reference(L: int, N: int, K: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(L, 3 * N * K, device="cuda").to(dtype)
    q_gain, k_gain = (torch.randn(K, device="cuda") for _ in "qk")
    angles = 3 * torch.randn(L, K // 2, device="cuda")
    # A gain may be fp32 under bf16 heads; the two gains may differ in type.
    args = (qkv, q_gain.to(dtype), k_gain, angles.cos(), angles.sin(), 1e-6)
    before = qkv.clone()
    assert testing.faults("qk_norm_rope", torch.ops.cosmos_fast.qk_norm_rope_cuda(*args), args) == []
    assert torch.equal(qkv, before)
    args = (qkv[:, N * K :], q_gain.to(dtype), 1e-6)
    assert testing.faults("head_norm", torch.ops.cosmos_fast.head_norm_cuda(*args), args) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_gain": (40,), "k_gain": (40,)}, "the head width K must be a multiple of 16 up to 256, got 40"),
        ({"q_gain": (512,), "k_gain": (512,)}, "multiple of 16 up to 256, got 512"),
        ({"k_gain": (32,)}, "k_gain must be contiguous (64,)"),
        ({"qkv": (4, 100)}, "x must be (L, 3 * N * 64)"),
        ({"cos": (4, 31)}, "cos must be float32 (4, 32)"),
        ({"sin": (3, 32)}, "sin must be float32 (4, 32)"),
    ],
)
def test_cuda_norm_rope_refuses_what_does_not_fit(change: dict[str, tuple[int, ...]], words: str) -> None:
    shapes = {"qkv": (4, 384), "q_gain": (64,), "k_gain": (64,), "cos": (4, 32), "sin": (4, 32), **change}
    args = {name: torch.ones(shape, device="cuda") for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.ops.cosmos_fast.qk_norm_rope_cuda(**args, eps=1e-6)


def test_cuda_norm_rope_refuses_a_row_off_16_bytes() -> None:
    x = torch.randn(4, 132, device="cuda", dtype=BF16)
    with pytest.raises(RuntimeError, match="must start on 16 bytes"):
        torch.ops.cosmos_fast.head_norm_cuda(x[:, :128], torch.ones(64, device="cuda"), 1e-6)
