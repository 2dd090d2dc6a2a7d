"""Convolutions of the video VAE as one implicit GEMM, channels last: `conv3d`, `conv_half`, `conv_double`.

    conv3d        valid convolution over time and space, + bias, + residual: what is added is added in fp32, one rounding
    conv_half     3x3 with stride 2 on every frame, one zero column right and one zero row below
    conv_double   nearest neighbour x2 of every frame, then 3x3: four phases of 2x2 taps on the small frame

A program computes `m` pixels x (low + high) channels. Every tap is one box of m pixels that the copy engine brings from
where the tap's pixels begin, so no matrix of patches exists; what it reads outside a frame is zero, which is the zero
padding. A wide frame is cheap to read so: in `conv3d` the frames, which come with their borders, count as one long row of
pixels, a tap is a shift along it, and the pixels computed in the two border columns are not stored. Tiles then need not
fit the width. With `fold`, the three taps along a row are one box of pixels three times as deep, at a stride of one pixel.

conv_double: the four output pixels that come from one input pixel see it and its neighbours through sums of taps, 16 small
products in place of 36. The sums are made in fp32 and rounded once to the dtype of the weight: other numbers than those of
the 3x3 taps, rounded as often.

At 96 channels, 4 frames of 704x1280: 1.79 TFLOP, 2.4 ms at the 758 TFLOP/s of a large GEMM on one H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from cosmos_fast.kernels.conv_tiles import Tiles, tiles_for
from cosmos_fast.kernels.launch import on_device_of
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _finish(
    acc, steps, bias, residual, out, from_residual, to, keep, column, O, CODES: tl.constexpr, RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr, BEYOND: tl.constexpr,
):  # fmt: skip
    """Scale sums of codes, add bias and residual in fp32, round, store: piece by piece, so that few registers are needed.

    BEYOND: of the channels, so many at the end do not exist; known while compiling, because a branch here would keep
    the loop around it from being flattened.
    """
    if PARTS == 1:
        n = column + tl.arange(0, acc.shape[1])
        inside = keep[:, None] & (n < O)[None, :]
        value = acc * tl.load(steps + n, n < O, 0.0)[None, :] if CODES else acc
        value += tl.load(bias + n, n < O, 0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            value += tl.load(residual + from_residual[:, None] + n[None, :], inside, 0.0).to(tl.float32)
        tl.store(out + to[:, None] + n[None, :], value.to(out.dtype.element_ty), inside)
    else:
        ROWS: tl.constexpr = acc.shape[0]
        HALF: tl.constexpr = acc.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        LEFT: tl.constexpr = BEYOND - HALF if BEYOND > HALF else 0
        _finish(
            low, steps, bias, residual, out, from_residual, to, keep, column, O, CODES, RESIDUAL, PARTS // 2, LEFT
        )  # fmt: skip
        if BEYOND < HALF:
            _finish(
                high, steps, bias, residual, out, from_residual, to, keep, column + HALF, O, CODES, RESIDUAL,
                PARTS // 2, BEYOND,
            )  # fmt: skip


# Not compiled anew for a single frame, or for sides that 16 divides: nothing here is faster for knowing it.
@triton.jit(do_not_specialize=["frames", "lines", "line", "pitch", "H", "W"])
def _conv_kernel(
    x, w_low, w_high, steps, bias, residual, out, frames, lines, line, pitch, H, W, O, residual_f, residual_h, residual_w,
    out_f, out_h, out_w, C: tl.constexpr, CODES: tl.constexpr, TIME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TIME_STRIDE: tl.constexpr, STRIDE: tl.constexpr, PHASES: tl.constexpr, FLAT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    BEYOND: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`lines` lines of `line` pixels each are cut into tiles; FLAT: one line, of rows that are `pitch` pixels apart.

    x is seen as (frames, rows, column parity, columns, channels), w as (PHASES * O, taps * C).
    """
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    cuts, blocks = tl.cdiv(line, BLOCK_M), tl.cdiv(O, LOW + HIGH)
    # Channels first, then phases and frames: programs that run together read the same pixels, from L2.
    for tile in tl.range(
        tl.program_id(0), blocks * PHASES * frames * lines * cuts, tl.num_programs(0), flatten=FLATTEN
    ):
        column = tile % blocks * (LOW + HIGH)
        phase = tile // blocks % PHASES
        frame = tile // (blocks * PHASES) % frames
        place = tile // (blocks * PHASES) // frames
        start = place % cuts * BLOCK_M
        top = place // cuts
        low = tl.zeros((BLOCK_M, LOW), tl.float32)
        if HIGH > 0:
            high = tl.zeros((BLOCK_M, HIGH), tl.float32)
        for step in range(TIME * ROWS * COLUMNS * STEPS):
            tap, k = step // STEPS, step % STEPS * BLOCK_K
            t, i, j = tap // (ROWS * COLUMNS), tap // COLUMNS % ROWS, tap % COLUMNS
            if FLAT:
                row, parity, col = 0, 0, start + i * pitch + j
            elif STRIDE == 2:
                row, parity, col = 2 * top + i, j % 2, start + j // 2
            else:  # the phases of conv_double: rows and columns -1 and 0, or 0 and 1
                row, parity, col = top + i + phase // 2 - 1, 0, start + j + phase % 2 - 1
            pixels = x.load([frame * TIME_STRIDE + t, row, parity, col, k]).reshape(BLOCK_M, BLOCK_K)
            taps = w_low.load([phase * O + column, tap * C + k])
            low = tl.dot(pixels, taps.T, low, input_precision=PRECISION)
            if HIGH > 0:
                more = w_high.load([phase * O + column + LOW, tap * C + k])
                high = tl.dot(pixels, more.T, high, input_precision=PRECISION)
        at = start + tl.arange(0, BLOCK_M)
        if FLAT:
            h, w = at // pitch, at % pitch
        else:
            h, w = tl.zeros_like(at) + top, at
        keep = (h < H) & (w < W)
        if PHASES == 4:
            h, w = 2 * h + phase // 2, 2 * w + phase % 2
        to = frame.to(tl.int64) * out_f + h.to(tl.int64) * out_h + w * out_w
        from_residual = frame.to(tl.int64) * residual_f + h.to(tl.int64) * residual_h + w * residual_w
        _finish(
            low,
            steps,
            bias,
            residual,
            out,
            from_residual,
            to,
            keep,
            column,
            O,
            CODES,
            RESIDUAL,
            PARTS,
            BEYOND,
        )
        if HIGH > 0:
            _finish(
                high, steps, bias, residual, out, from_residual, to, keep, column + LOW, O, CODES, RESIDUAL, 1, 0
            )  # fmt: skip


@triton.jit
def _fold_kernel(w, out, count, C, BLOCK: tl.constexpr):
    """w (O, 3, 3, C) -> out (4, O, 2, 2, C): for phase (p, q) the sums of the taps that fall on the same small pixel.

    Of three taps in a row, p = 0 puts {0} on the pixel before and {1, 2} on the pixel itself; p = 1 puts {0, 1} on the
    pixel itself and {2} on the one after.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    c, b, a, o = at % C, at // C % 2, at // (2 * C) % 2, at // (4 * C)
    for phase in tl.static_range(4):
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                # Tap i of output row 2h + p is on input row h + (p + i - 1) // 2; the first of the two is h + p - 1.
                inside = ((phase // 2 + i + 1) // 2 - phase // 2 == a) & (
                    (phase % 2 + j + 1) // 2 - phase % 2 == b
                )
                total += tl.load(w + ((o * 3 + i) * 3 + j) * C + c, keep & inside, 0.0).to(tl.float32)
        tl.store(out + phase * count + at, total.to(out.dtype.element_ty), keep)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _last(x: Tensor, channels: int) -> Tensor:
    """Channels moved to the end and zeros added up to `channels`, in a layout that the copy engine can read.

    (C, F, H, W) or (O, C, ...) with dimension of the channels 0 or 1 are given as views with the channels last already.
    """
    if x.shape[-1] != channels:
        padded = x.new_zeros(*x.shape[:-1], channels)
        padded[..., : x.shape[-1]] = x
        return padded
    unit = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % unit == 0 for s in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _weights(weight: Tensor, channels: int) -> Tensor:
    """(O, C, ...) -> (O, ..., channels), contiguous: a view of a weight that is stored channels last."""
    return _last(weight.movedim(1, -1), channels).contiguous()


def _channels(x: Tensor) -> int:
    unit = 16 // x.element_size()
    return -(-x.shape[1] // unit) * unit


def _frames(x: Tensor, O: int, F: int, H: int, W: int, kind: torch.dtype | None = None) -> Tensor:  # noqa: E741
    """An uninitialised (B, O, F, H, W), channels last."""
    return x.new_empty(x.shape[0], F, H, W, O, dtype=kind or x.dtype).permute(0, 4, 1, 2, 3)


@dataclass(frozen=True)
class _Job:
    """How the frames of one clip are cut into lines of pixels, and which taps meet them."""

    view: tuple[tuple[int, ...], tuple[int, ...]]
    lines: int
    line: int
    depth: int
    taps: tuple[int, int, int]
    pitch: int = 1
    time_stride: int = 1
    stride: int = 1
    phases: int = 1


def _launch(
    job: _Job,
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    size: tuple[int, int],
    t: Tiles,
    steps: Tensor | None = None,
) -> None:
    """One clip: x (F, H, W, C), w (PHASES * O, taps * C), out and residual (F', H', W', O); `size` pixels to compute."""
    O = bias.shape[0]  # noqa: E741
    frames = out.shape[0]
    count = triton.cdiv(O, t.low + t.high) * job.phases * frames * job.lines * triton.cdiv(job.line, t.m)
    most = t.programs * _multiprocessors(x.device) if x.is_cuda else 3
    other = out if residual is None else residual
    time, rows, columns = job.taps
    with on_device_of(x):
        _conv_kernel[(min(count, most),)](
            TensorDescriptor(x, list(job.view[0]), list(job.view[1]), [1, 1, 1, t.m, t.k]),
            TensorDescriptor.from_tensor(w, [t.low, t.k]), TensorDescriptor.from_tensor(w, [t.high or 16, t.k]),
            bias if steps is None else steps, bias, other, out, frames, job.lines, job.line, job.pitch, *size, O, *other.stride()[:3], *out.stride()[:3],
            C=job.depth, CODES=steps is not None, TIME=time, ROWS=rows, COLUMNS=columns, TIME_STRIDE=job.time_stride, STRIDE=job.stride,
            PHASES=job.phases, FLAT=job.stride == job.phases == 1, RESIDUAL=residual is not None, BLOCK_M=t.m, LOW=t.low,
            HIGH=t.high, BLOCK_K=t.k, PARTS=t.parts, BEYOND=max(t.low - O, 0), FLATTEN=t.flatten,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, time_stride: int, *, tiles: Tiles | None = None
) -> Tensor:  # fmt: skip
    """Valid convolution, (B, C, F, H, W) -> (B, O, F', H', W'), stride in time only, + bias + residual."""
    O, _, time, rows, columns = weight.shape  # noqa: E741
    if O <= 4 and time == 3 and time_stride == 1 and x.shape[2] % 2 == 0 and residual is None:
        return _together(x, weight, bias, 4 if x.shape[2] % 4 == 2 else 2, tiles)
    return _valid(x, weight, None, bias, residual, time_stride, x.dtype, tiles)


def conv3d_fp8(
    x: Tensor, weight: Tensor, steps: Tensor, bias: Tensor, residual: Tensor | None, out: torch.dtype, *,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`conv3d` of e4m3 codes; steps (O,) fp32: what one of each output channel's sums is worth. Sums of some 14 bits."""
    return _valid(x, weight, steps, bias, residual, 1, out, tiles)


def _valid(
    x: Tensor, weight: Tensor, steps: Tensor | None, bias: Tensor, residual: Tensor | None, time_stride: int,
    kind: torch.dtype, tiles: Tiles | None,
) -> Tensor:  # fmt: skip
    O, _, time, rows, columns = weight.shape  # noqa: E741
    (B, _, F, H, W), C = x.shape, _channels(x)
    frames, height, width = (F - time) // time_stride + 1, H - rows + 1, W - columns + 1
    out = _frames(x, O, frames, height, width, kind)
    if out.numel() == 0:
        return out
    t = tiles or tiles_for(time * rows * columns, C, O, x.dtype)
    # Depth of a step's box: the taps of a row side by side, or one pixel.
    fold = columns if t.fold else 1
    w = _weights(weight, C).view(O, -1)
    clips = _last(x.permute(0, 2, 3, 4, 1), C)
    if clips.stride(2) != W * clips.stride(3):
        clips = clips.contiguous()  # rows must follow each other, for a tap to be a shift
    if residual is not None:
        residual = residual.permute(0, 2, 3, 4, 1)
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    for clip in range(B):
        step, pixel = clips.stride(1), clips.stride(3)
        view = (F, 1, 1, H * W - fold + 1, fold * C), (step, step, step, pixel, 1)
        job = _Job(view, 1, height * W, fold * C, (time, rows, columns // fold), W, time_stride)
        added = None if residual is None else residual[clip]
        _launch(job, clips[clip], w, bias, added, out[clip].permute(1, 2, 3, 0), (height, width), t, steps)
    return out


def _together(x: Tensor, weight: Tensor, bias: Tensor, count: int, tiles: Tiles | None) -> Tensor:
    """`conv3d` to a few channels: those of `count` frames that follow each other are channels of one product.

    Each of their input frames is then read once for all of them, where the reading is all that takes time.
    """
    O, C, _, *sides = weight.shape  # noqa: E741
    wide = weight.new_zeros(count, O, count + 2, *sides, C).movedim(-1, 2)
    for frame in range(count):
        wide[frame, :, :, frame : frame + 3] = weight
    y = conv3d(x, wide.flatten(0, 1), bias.repeat(count), None, count, tiles=tiles)
    y = y.unflatten(1, (count, O)).permute(0, 3, 1, 4, 5, 2)
    return y.flatten(1, 2).permute(0, 4, 1, 2, 3)


def conv_half(x: Tensor, weight: Tensor, bias: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """3x3, stride 2, zeros right and below: (B, C, F, H, W) -> (B, O, F, H/2, W/2)."""
    (B, _, F, H, W), C, O = x.shape, _channels(x), weight.shape[0]  # noqa: E741
    out = _frames(x, O, F, H // 2, W // 2)
    if out.numel() == 0:
        return out
    w = _weights(weight, C).view(O, -1)
    clips = _last(x.permute(0, 2, 3, 4, 1), C)
    for clip in range(B):
        step, row, pixel = clips.stride()[1:4]
        view = (F, H, 2, W // 2, C), (step, row, pixel, 2 * pixel, 1)
        job = _Job(view, H // 2, W // 2, C, (1, 3, 3), stride=2)
        _launch(job, clips[clip], w, bias, None, out[clip].permute(1, 2, 3, 0), (H // 2, W // 2),
                tiles or tiles_for(9, C, O, x.dtype))  # fmt: skip
    return out


def conv_double(x: Tensor, weight: Tensor, bias: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """Nearest neighbour x2, then 3x3 with zero padding: (B, C, F, H, W) -> (B, O, F, 2H, 2W)."""
    (B, _, F, H, W), C, O = x.shape, _channels(x), weight.shape[0]  # noqa: E741
    out = _frames(x, O, F, 2 * H, 2 * W)
    if out.numel() == 0:
        return out
    w = fold_taps(_weights(weight, C))
    clips = _last(x.permute(0, 2, 3, 4, 1), C)
    for clip in range(B):
        step, row, pixel = clips.stride()[1:4]
        view = (F, H, 1, W, C), (step, row, pixel, pixel, 1)
        job = _Job(view, H, W, C, (1, 2, 2), phases=4)
        _launch(job, clips[clip], w.view(4 * O, -1), bias, None, out[clip].permute(1, 2, 3, 0), (H, W),
                tiles or tiles_for(4, C, O, x.dtype))  # fmt: skip
    return out


def fold_taps(w: Tensor) -> Tensor:
    """3x3 taps (O, 3, 3, C) after nearest neighbour x2 -> taps of the four phases on the small frame (4, O, 2, 2, C)."""
    O, C = w.shape[0], w.shape[3]  # noqa: E741
    out = w.new_empty(4, O, 2, 2, C)
    with on_device_of(w):
        _fold_kernel[(triton.cdiv(4 * O * C, 1024),)](w, out, 4 * O * C, C, BLOCK=1024)
    return out
