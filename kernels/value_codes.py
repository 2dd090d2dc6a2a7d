"""Codes of v alone, by the kernel of `qkv_codes`, where another one makes those of q and k: csrc/qk_codes.cu."""

from __future__ import annotations

import triton
from cosmos_fast.kernels.launch import Config, on_device_of
from cosmos_fast.kernels.qkv_codes import E4M3, VALUES, v_codes_kernel
from torch import Tensor


def value_codes(
    qkv: Tensor, v_mean: Tensor, v_step: Tensor, pack: bool, *, config: Config = VALUES
) -> Tensor:
    """e4m3 codes of v (L, N, K), or packed (N, K, L up to 16). config.block: tokens of one program."""
    L, (N, K) = qkv.shape[0], v_mean.shape
    columns = triton.cdiv(L, 16) * 16
    out = qkv.new_empty((N, K, columns) if pack else (L, N, K), dtype=E4M3)
    if out.numel():
        with on_device_of(qkv):
            v_codes_kernel[(triton.cdiv(L, config.block), N)](
                qkv, v_mean, v_step, out, L, columns, N=N, K=K, TOKENS=config.block, BLOCK_K=triton.next_power_of_2(K),
                PACK=pack, HEADS=N, COLUMNS=0, PARTS=0, num_warps=config.warps,
            )  # fmt: skip
    return out
