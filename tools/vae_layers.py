"""The convs of the video VAE at 93 frames of 704x1280: sizes, tiles worth trying, operands, and their error."""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from cosmos_fast.kernels import convolution as conv
from cosmos_fast.kernels.conv_tiles import Tiles, tiles_for
from torch import Tensor

from cosmos_fast import convolution as library
from cosmos_fast.vae_keys import WIDE_FRAMES

CORNER = 24
"""Rows and columns of the result that are compared at its first and at its last corner."""


@dataclass(frozen=True)
class Layer:
    """One conv: frames and sides of its input, as the VAE gives it; how often a window of decode and encode runs it."""

    kind: str
    C: int
    O: int  # noqa: E741
    F: int
    H: int
    W: int
    decode: float = 0
    encode: float = 0
    taps: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    residual: bool = False

    @property
    def name(self) -> str:
        sides = "x".join(map(str, self.taps))
        return f"{self.kind} {self.C}>{self.O} {sides} {self.F}x{self.H}x{self.W}{' + x' if self.residual else ''}"

    @property
    def key(self) -> tuple[int, int, int]:
        """Of `conv_tiles.FASTEST`: taps as they are multiplied, channels as the copy engine reads them, outputs."""
        taps = {"conv_half": 9, "conv_double": 4}.get(self.kind, self.taps[0] * self.taps[1] * self.taps[2])
        if self.kind == "conv3d" and self.O <= 4 and self.F % 2 == 0:  # frames together
            count = 2 if self.F % 4 else 4
            return taps // 3 * (count + 2), self.C, count * self.O
        return taps, -(-self.C // 8) * 8, self.O

    @property
    def flop(self) -> float:
        """Of the published conv: 9 taps per output pixel for conv_double, however they are folded."""
        if self.kind.startswith("conv3d"):
            t = (self.F - 1) // self.stride + 1
            return 2.0 * self.C * self.O * self.taps[0] * self.taps[1] * self.taps[2] * t * self.H * self.W
        return 18.0 * self.C * self.O * self.F * self.H * self.W * (4 if self.kind == "conv_double" else 0.25)


def layers() -> list[Layer]:
    wide = (4, 704, 1280), (4, 352, 640), (2, 176, 320), (1, 88, 160)
    pair = (
        (WIDE_FRAMES, 704, 1280),
        (WIDE_FRAMES, 352, 640),
    )  # in which the decoder's last stage passes a window on
    point, time3 = (1, 1, 1), (3, 1, 1)
    return [
        Layer("conv3d", 96, 96, *wide[0], 0, 4, residual=True),
        Layer("conv3d", 96, 96, *pair[0], 12, 0, residual=True),
        Layer("conv3d", 192, 192, *wide[1], 6, 3, residual=True),
        Layer("conv3d", 384, 384, *wide[2], 5, 3, residual=True),
        Layer("conv3d", 384, 384, *wide[3], 10, 8, residual=True),
        Layer("conv_double", 192, 96, *pair[1], 2, 0),
        Layer("conv_double", 384, 192, 4, 176, 320, 1, 0),
        Layer("conv3d", 96, 3, *pair[0], 2, 0),
        Layer("conv3d", 3, 96, *wide[0], 0, 1),
        Layer("conv_half", 96, 96, *wide[0], 0, 1),
        Layer("conv_half", 192, 192, *wide[1], 0, 1),
        Layer("conv3d", 96, 192, *wide[1], 0, 1),
        Layer("conv3d", 192, 384, *wide[2], 1, 1),
        Layer("conv3d", 96, 192, *wide[1], 0, 1, point),
        Layer("conv3d", 192, 384, *wide[2], 1, 1, point),
        Layer("conv3d", 384, 768, *wide[2], 1, 0, time3),
        Layer("conv_double", 384, 192, 2, 88, 160, 1, 0),
        Layer("conv3d", 384, 768, *wide[3], 1, 0, time3),
        Layer("conv_half", 384, 384, *wide[2], 0, 1),
        Layer("conv3d", 192, 192, 3, 176, 320, 0, 1, time3, 2),
        # Windows of two latent frames, where one fills the card badly.
        Layer("conv3d", 384, 384, 2, 88, 160, 0, 0, residual=True),
        Layer("conv3d", 384, 384, 4, 176, 320, 0, 0, residual=True),
    ]


def ends() -> list[Layer]:
    """The convs at latent height that are too small to sweep, but take as long to compile."""
    point, size = (1, 1, 1), (1, 88, 160)
    sides = ((16, 384), (384, 32)), ((16, 16), (32, 32))
    return [
        Layer("conv3d", C, O, *size, taps=taps)
        for taps, pairs in zip(((3, 3, 3), point), sides)
        for C, O in pairs
    ]


def in_codes(found: list[Layer]) -> list[Layer]:
    """Those that the recipe fp8_vae computes in 8 bits."""
    blocks = [
        layer
        for layer in found
        if layer.taps == (3, 3, 3) and layer.kind == "conv3d" and min(layer.C, layer.O) > 16
    ]
    return [replace(layer, kind="conv3d_fp8") for layer in blocks]


def choices(layer: Layer) -> list[Tiles]:
    wide, tall = Tiles(256, 128, 0, 64, 8, 4, 4), Tiles(256, 128, 64, 64, 8, 3, 4)
    middle, twin = Tiles(128, 128, 64, 64, 8, 4, 2), Tiles(128, 128, 0, 64, 4, 3, 4, programs=2)
    deep = replace(wide, k=32, stages=7)
    if layer.kind == "conv3d_fp8":
        return code_choices(layer.O)
    if layer.O <= 16:
        return [
            Tiles(256, 16, 0, k, 8, s, 1, programs=p) for k, s, p in ((64, 4, 1), (32, 7, 1), (64, 3, 2))
        ] + [Tiles(128, 16, 0, 64, 4, 4, 1, programs=3)]
    if layer.C <= 16:
        return [Tiles(m, 128, 0, 32, 8, 4, 4, programs=p) for m, p in ((256, 1), (128, 2))]
    if layer.kind != "conv3d":
        return {
            96: [
                wide,
                replace(wide, m=128, stages=5),
                Tiles(128, 64, 32, 64, 4, 3, 2, programs=2),
                deep,
                twin,
            ],
            192: [tall, middle, twin, wide, Tiles(256, 64, 32, 64, 8, 4, 2)],
            384: [wide, tall, twin, middle],
        }[layer.O]
    if layer.taps == (1, 1, 1):
        return [wide, middle, twin]
    if layer.O == 96:
        return [
            wide, replace(wide, stages=3), deep, replace(wide, parts=8), replace(wide, flatten=False),
            replace(deep, fold=False), Tiles(256, 64, 32, 64, 8, 4, 2), Tiles(128, 64, 32, 64, 4, 3, 2, programs=2),
            Tiles(128, 64, 32, 64, 4, 3, 2, programs=2, flatten=False), twin, replace(twin, flatten=False),
            replace(wide, m=128, stages=5),
        ]  # fmt: skip
    if layer.O == 192:
        return [
            tall, replace(tall, parts=8), replace(tall, k=32, stages=6, parts=8), replace(tall, flatten=False),
            replace(tall, fold=False), middle, replace(middle, stages=5), Tiles(128, 256, 0, 64, 8, 4, 8),
            Tiles(256, 64, 32, 64, 8, 4, 2), Tiles(128, 128, 64, 64, 4, 2, 4, programs=2), twin,
        ]  # fmt: skip
    few = [wide, tall, middle, twin]
    more = [replace(wide, flatten=False), replace(wide, stages=3), Tiles(128, 256, 128, 64, 8, 3, 8), replace(tall, flatten=False)]  # fmt: skip
    return few if layer.taps != (3, 3, 3) or layer.C != layer.O else few + more


def code_choices(O: int) -> list[Tiles]:  # noqa: E741
    """For codes: steps of as many bytes as in bf16, and of half as many where more channels of a folded step then count."""
    if O == 96:
        wide = Tiles(256, 128, 0, 64, 8, 7, 4)
        return [
            wide, replace(wide, flatten=False), replace(wide, k=128, stages=4), replace(wide, k=32, stages=10),
            replace(wide, k=128, stages=4, flatten=False), replace(wide, k=32, stages=10, fold=False),
            Tiles(128, 64, 32, 64, 4, 5, 2, programs=2), Tiles(128, 128, 0, 64, 4, 5, 4, programs=2),
        ]  # fmt: skip
    tall, wide = Tiles(256, 128, 64, 64, 8, 6, 4, flatten=False), Tiles(256, 128, 0, 128, 8, 4, 4)
    return [
        tall, replace(tall, k=128, stages=3), replace(tall, flatten=True), replace(tall, k=128, stages=3, flatten=True),
        wide, replace(wide, flatten=False), replace(wide, k=64, stages=7, flatten=False),
        Tiles(128, 128, 64, 128, 8, 4, 2), Tiles(128, 128, 0, 128, 4, 3, 4, programs=2),
    ]  # fmt: skip


def tiles_of(layer: Layer) -> Tiles:
    """The tile that the op takes for a conv in bf16, or in codes."""
    return tiles_for(*layer.key, torch.float8_e4m3fn if layer.kind == "conv3d_fp8" else torch.bfloat16)


def told(t: Tiles) -> str:
    size = f"{t.m}x{t.low}" + (f"+{t.high}" if t.high else "") + f"x{t.k}"
    extra = ("" if t.fold else " unfolded") + ("" if t.flatten else " by tile")
    return f"{size} w{t.warps} s{t.stages} p{t.parts}{f' x{t.programs}' if t.programs > 1 else ''}{extra}"


def operands(layer: Layer, device: str, random: bool) -> tuple[Any, ...]:
    """Arguments of the op, channels last; fp16 on a CPU, whose interpreter multiplies no bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def frames(*shape: int, last: bool = True) -> Tensor:
        size = (shape[0], *shape[2:], shape[1]) if last else shape
        x = torch.empty(size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float16)
        x = x.normal_(generator=generator) if random else x
        return x.movedim(-1, 1) if last else x

    C, O, (t, r, s) = layer.C, layer.O, layer.taps  # noqa: E741
    if not layer.kind.startswith("conv3d"):
        return (
            frames(1, C, layer.F, layer.H, layer.W),
            frames(O, C, 3, 3) * (9 * C) ** -0.5,
            frames(O, last=False),
        )
    ahead = layer.F + (t - 1 if layer.stride == 1 else 0)
    x = frames(1, C, ahead, layer.H + r - 1, layer.W + s - 1)
    w, b = frames(O, C, t, r, s) * (t * r * s * C) ** -0.5, frames(O, last=False)
    out = (ahead - t) // layer.stride + 1
    residual = frames(1, O, out, layer.H, layer.W) if layer.residual else None
    if layer.kind == "conv3d_fp8":
        codes, steps = (w * 256).to(torch.float8_e4m3fn), torch.full((O,), 2.0**-12, device=device)
        return (x * 16).to(torch.float8_e4m3fn), codes, steps, b, residual, b.dtype
    return x, w, b, residual, layer.stride


def corners(layer: Layer, args: tuple[Any, ...]) -> Iterator[tuple[Any, Tensor]]:
    """Where to look in the result, and what is there in fp32: the first and the last rows and columns."""
    if layer.kind == "conv3d_fp8":
        x, w, _, b, residual, _ = args
        args = (x, w.float() / 2.0**12, b, residual)
    x, w, b = (value.float() if value.numel() < 1e8 else value for value in args[:3])
    for last in (False, True):
        if layer.kind.startswith("conv3d"):
            H, W = (size - taps + 1 for size, taps in zip(x.shape[3:], w.shape[3:]))
            h, v = min(CORNER, H), min(CORNER, W)
            top, left = (H - h, W - v) if last else (0, 0)
            part = x[..., top : top + h + w.shape[3] - 1, left : left + v + w.shape[4] - 1].float()
            place = (..., slice(top, top + h), slice(left, left + v))
            y = library.conv3d(part, w, b, None, layer.stride)
            yield place, y if args[3] is None else y + args[3][place].float()
            continue
        h, v = min(CORNER, x.shape[3]) & ~1, min(CORNER, x.shape[4]) & ~1
        top, left = (x.shape[3] - h, x.shape[4] - v) if last else (0, 0)
        part = x[..., top : top + h, left : left + v].float()
        y = getattr(library, layer.kind)(part, w, b)
        # Rows and columns at the cut see zeros that are not there: two of a doubled frame, one of a halved one.
        edge, scale = (2, 2.0) if layer.kind == "conv_double" else (1, 0.5)
        first = [int(start * scale) + edge if last else 0 for start in (top, left)]
        sides = [size - edge for size in y.shape[3:]]
        place = (..., *(slice(start, start + side) for start, side in zip(first, sides)))
        yield place, y[..., edge:, edge:] if last else y[..., :-edge, :-edge]


def relative(got: Tensor, layer: Layer, args: tuple[Any, ...]) -> float:
    errors = []
    for place, exact in corners(layer, args):
        mine = got[place].float()
        errors.append(((mine - exact).norm() / exact.norm()).item())
    return max(errors)


def call(layer: Layer, args: tuple[Any, ...], tiles: Tiles) -> Tensor:
    return getattr(conv, layer.kind)(*args, tiles=tiles)


def fastest(found: list[Layer], best: dict[str, dict[str, float]]) -> dict[tuple[int, int, int], Tiles]:
    """Per key of `conv_tiles.FASTEST` the tile with the least time over the layers that share it."""
    table: dict[tuple[int, int, int], Tiles] = {}
    for key in dict.fromkeys(layer.key for layer in found):
        sums: dict[Tiles, float] = {}
        sharers = [layer for layer in found if layer.key == key and best.get(layer.name)]
        for tiles in choices(sharers[0]) if sharers else []:
            times = [best[layer.name].get(told(tiles)) for layer in sharers]
            if None not in times:
                weights = [layer.decode + layer.encode + 1e-3 for layer in sharers]
                sums[tiles] = sum(weight * (ms or 0) for weight, ms in zip(weights, times))
        if sums:
            table[key] = min(sums, key=sums.__getitem__)
    return table


def _work(todo: list[tuple[int, Layer, Tiles]], device: str, results: Any) -> None:
    for number, layer, tiles in todo:
        results.put((number, "started"))
        try:
            call(layer, operands(layer, device, False), tiles)
            if device == "cuda":
                torch.cuda.synchronize()
            results.put((number, None))
        except Exception as error:  # one choice that the card refuses must not end the others
            results.put((number, f"{type(error).__name__}: {str(error)[:200]}"))
            if device == "cuda" and "CUDA" in str(error):
                return  # the context is lost


def compiled(jobs: list[tuple[Layer, Tiles]], workers: int, device: str, deadline: float) -> dict[int, str]:
    """Runs every job once, in processes; what is wrong with each that failed or did not end. Fills Triton's cache."""
    context = mp.get_context("fork")
    results = context.Queue()
    numbered = [(i, *job) for i, job in enumerate(jobs)]
    gangs = [
        context.Process(target=_work, args=(numbered[i::workers], device, results)) for i in range(workers)
    ]
    for gang in gangs:
        gang.start()
    state: dict[int, str | None] = dict.fromkeys(range(len(jobs)), "did not start")
    while any(gang.is_alive() for gang in gangs) and time.perf_counter() < deadline:
        time.sleep(0.05)
        while not results.empty():
            number, fault = results.get()
            state[number] = fault
    for gang in gangs:
        if gang.is_alive():
            gang.terminate()
    while not results.empty():
        number, fault = results.get()
        state[number] = fault
    return {number: fault for number, fault in state.items() if fault is not None}
