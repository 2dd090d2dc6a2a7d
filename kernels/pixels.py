"""Between model range and pixels: `pixels`, `normalized`.

    pixels       code = trunc(clamp(127.5 * x + 127.5, 0, 255)), fp32 inside, each step rounded
    normalized   y = round(round(code / 127.5) - 1) in the output dtype

Shapes: pixels x (1, 3, F, H, W) with one common stride along its pixels (channels first or last) -> (F, H, W, 3)
uint8; normalized uint8 of any shape, contiguous.
Bytes in bf16 at F 93, H 704, W 1280 (251 M values): 0.75 GB each, floor 0.253 ms at 2.98 TB/s, the assumed copy of
one H100. Writes of `pixels` are linear; its reads of three planes by neighbouring lanes share sectors in L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.launch import Config, on_device_of
from torch import Tensor

# block: values. 16 of them a thread, one 16-byte access on the uint8 side. Swept like adaln's.
PIXELS, NORMALIZED = Config(2048, 4), Config(4096, 8)


@triton.jit
def _pixels_kernel(x, out, count, pixel_stride, channel_stride, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first = start // 3  # one 64-bit division per program; the rest fits 32 bits
    local = (start - first * 3).to(tl.int32) + tl.arange(0, BLOCK)
    pixel, channel = local // 3, local % 3
    keep = tl.arange(0, BLOCK) < count - start
    source = x + first * pixel_stride + pixel * pixel_stride + channel.to(tl.int64) * channel_stride
    code = tl.load(source, keep, 0.0).to(tl.float32) * 127.5 + 127.5
    code = tl.minimum(tl.maximum(code, 0.0), 255.0)
    tl.store(out + start + tl.arange(0, BLOCK), code.to(tl.uint8), keep)


@triton.jit
def _normalized_kernel(codes, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    code = tl.load(codes + at, keep, 0).to(tl.float32)
    # An approximate quotient could fall on the other side of a rounding boundary.
    scaled = tl.math.div_rn(code, tl.full((BLOCK,), 127.5, tl.float32)).to(out.dtype.element_ty)
    tl.store(out + at, (scaled.to(tl.float32) - 1.0).to(out.dtype.element_ty), keep)


def pixels(x: Tensor, *, config: Config = PIXELS) -> Tensor:
    """Model range (1, 3, F, H, W) -> codes (F, H, W, 3) uint8."""
    F, H, W = x.shape[2:]
    out = torch.empty(F, H, W, 3, dtype=torch.uint8, device=x.device)
    if out.numel() == 0:
        return out
    step = x.stride(4)
    if (F > 1 and x.stride(2) != H * W * step) or (H > 1 and x.stride(3) != W * step):
        x = x.contiguous()
    with on_device_of(x):
        _pixels_kernel[(triton.cdiv(out.numel(), config.block),)](
            x, out, out.numel(), x.stride(4), x.stride(1), BLOCK=config.block, num_warps=config.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def normalized(frames: Tensor, out: torch.dtype, *, config: Config = NORMALIZED) -> Tensor:
    """Codes uint8 -> [-1, 1] in dtype `out`, same shape."""
    y = torch.empty_like(frames, dtype=out)
    count = frames.numel()
    if count:
        with on_device_of(frames):
            _normalized_kernel[(triton.cdiv(count, config.block),)](
                frames, y, count, BLOCK=config.block, num_warps=config.warps
            )
    return y
