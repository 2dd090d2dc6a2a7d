"""Decode one file frame by frame, counting damage, and turn any frame into upright 8-bit RGB.

One demuxer, chosen from the content, opens this file and nothing else, whatever the file points to.
Shape letters: H rows, W columns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from .formats import MediaError
from .video_sniff import IMAGE_FORMATS, VIDEO_FORMATS, image_facts

FILTERS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "nearest": cv2.INTER_NEAREST,
    "lanczos": cv2.INTER_LANCZOS4,
}

DECODERS = min(8, os.cpu_count() or 1)
"""Threads that decode a file: fewer than FFmpeg would take, since several processes of a host may read at once."""

_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_ATTACHED_PICTURE = 0x400
# swscale knows these matrices by the same number as the H.273 tag; 6 is another name of 5 and 10 of 9.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_BT601, _LIMITED, _FULL = 5, 1, 2
_PYAV = int(av.__version__.split(".")[0])
# Up to PyAV 18 a tag that is not UTF-8 keeps the file from opening; PyAV 19 replaces it by itself.
_OPEN_OPTIONS = {"metadata_errors": "replace"} if _PYAV < 19 else {}
# From PyAV 17 on a frame is converted by as many threads as there are cores: waking 32 costs more than the work.
_ONE_THREAD = {"threads": 1} if _PYAV >= 17 else {}
_EXPAND_GREY = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
_RGB_FLAGS = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Limits:
    """What one input file may cost. The defaults hold 5,000 frames of 1080p."""

    frames: int = 5000
    side: int = 8192
    """Largest width or height in pixels, coded or displayed."""
    total_bytes: int = 40 * 10**9
    """Largest width x height x 3 x frames."""

    def check(self, path: Path, width: int, height: int, frames: int) -> None:
        """Raise MediaError if `frames` frames of width x height are over a limit."""
        if max(width, height) > self.side:
            raise MediaError(f"{path}: sides must be at most {self.side} pixels, got {width}x{height}.")
        if frames > self.frames:
            raise MediaError(
                f"{path}: must have at most {self.frames} frames, got {frames} or more. Cut the clip first."
            )
        total = width * height * 3 * frames
        if total > self.total_bytes:
            raise MediaError(
                f"{path}: must decode to at most {self.total_bytes / 1e9:.3g} GB, got {total / 1e9:.3g} GB "
                f"({frames} frames of {width}x{height}). Cut or shrink the clip first."
            )


NO_LIMITS = Limits(frames=10**9, side=1 << 20, total_bytes=1 << 62)
"""For files this package has just written."""


@dataclass(frozen=True)
class Orientation:
    """How decoded pixels become upright: transpose first, then mirror left-right and top-bottom."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @staticmethod
    def from_exif(value: int) -> Orientation:
        """Orientation of an EXIF tag, 1 to 8."""
        bits = {1: 0b000, 2: 0b010, 3: 0b011, 4: 0b001, 5: 0b100, 6: 0b110, 7: 0b111, 8: 0b101}.get(value, 0)
        return Orientation(bool(bits & 4), bool(bits & 2), bool(bits & 1))

    def apply(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Upright view of a frame; H and W swap if `transpose`."""
        if self.transpose:
            frame_HWC = frame_HWC.transpose(1, 0, 2)
        return frame_HWC[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]

    def __bool__(self) -> bool:
        return self.transpose or self.mirror_x or self.mirror_y

    def __str__(self) -> str:
        turned = {(0, 1): "270", (1, 0): "90"} if self.transpose else {(1, 1): "180"}
        angle = turned.get((int(self.mirror_x), int(self.mirror_y)))
        return f"rotated by {angle} degrees clockwise" if angle else "mirrored"


@dataclass
class Decoder:
    """One pass over the video stream of one file, tolerant of damage but counting it.

    Iterating yields av.VideoFrame in display order. Close it, or use it as a context manager.
    """

    path: Path
    demuxer: str
    limits: Limits = field(default_factory=Limits)
    threaded: bool = True
    """Decode several frames at once. Concealment of damage then depends on timing; sound files do not."""
    packets: int = 0
    """Packets handed to the decoder."""
    errors: list[str] = field(default_factory=list)
    """Packets that could not be read or decoded, one reason each."""

    def __post_init__(self) -> None:
        if self.demuxer in IMAGE_FORMATS:  # opening one decodes it, so its size must be known before
            facts = image_facts(self.path, self.demuxer)
            self.limits.check(self.path, facts.width, facts.height, 1)
        # `file:` and the white lists keep FFmpeg from following anything a file may point to.
        options = {"protocol_whitelist": "file", "format_whitelist": self.demuxer}
        if self.demuxer == "mov":
            options |= {"enable_drefs": "0", "use_absolute_path": "0"}
        try:
            address = f"file:{os.path.abspath(self.path)}"
            self.container = av.open(address, format=self.demuxer, options=options, **_OPEN_OPTIONS)
        except (av.FFmpegError, OSError, ValueError) as error:
            name = (IMAGE_FORMATS | VIDEO_FORMATS)[self.demuxer]
            hint = "The file may be cut off or still being written."
            raise MediaError(
                f"{self.path}: {name} must open, got 0 readable frames ({_reason(error)}). {hint}"
            ) from None
        try:
            self._choose_stream()
        except BaseException:
            self.container.close()
            raise

    def _choose_stream(self) -> None:
        streams = list(self.container.streams.video)
        self.pictures = [s for s in streams if int(s.disposition) & _ATTACHED_PICTURE]
        self.videos = [s for s in streams if s not in self.pictures]
        if not self.videos:
            others = (
                ", ".join(sorted({s.type for s in self.container.streams if s not in streams}))
                or "no streams"
            )
            others += " and cover art" if self.pictures else ""
            raise MediaError(f"{self.path}: must have a video stream, got {others} only.")
        self.stream = self.videos[0]
        codec = self.stream.codec_context
        if codec is None:
            hint = "The file is cut off, damaged, or of an unknown codec."
            raise MediaError(f"{self.path}: must describe its video codec, got none known. {hint}")
        self.limits.check(self.path, codec.width, codec.height, max(self.frames_stated(), 1))
        # Also holds where the bitstream is larger than the header said.
        codec.options = {"max_pixels": str(min(self.limits.side**2, 2**31 - 1))}
        if self.demuxer in IMAGE_FORMATS:
            codec.options |= {"err_detect": "explode"}
        codec.thread_type = "AUTO"
        codec.thread_count = DECODERS if self.threaded else 1

    def frames_stated(self) -> int:
        """Frames the header promises, 0 if it does not say; a Matroska header tells it as a duration."""
        rate, duration = self.stream.average_rate, self.container.duration
        if self.stream.frames or self.demuxer != "matroska" or not rate or not duration:
            return self.stream.frames
        return int(duration * rate.numerator / (rate.denominator * 10**6))

    def __iter__(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # empty packets stand for "repeat" in AVI and for the end everywhere
                    self.packets += 1
                    yield from self._decode(packet)
        except (av.FFmpegError, OSError, IndexError) as error:
            # IndexError: PyAV's own, when damage makes the demuxer find a stream that was not there at first.
            self.errors.append(_reason(error))
        yield from self._decode(None)  # the frames the decoder still holds

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self.stream.decode(packet)
        except av.EOFError:
            return []
        except (av.FFmpegError, OSError) as error:
            self.errors.append(_reason(error))
            return []

    def close(self) -> None:
        # PyAV frees a codec with the GIL held, and a decoding thread that is still at work may want it: FFmpeg's
        # messages go through Python once anything in the process turned av.logging on (torchvision.io does). Each
        # then waits for the other for ever. A flush waits for the threads with the GIL released, so none is at work.
        self.stream.codec_context.flush_buffers()
        self.container.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def orientation_of(path: Path, frame: av.VideoFrame) -> Orientation:
    """Orientation from a frame's display matrix; only right angles and mirrors are accepted."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 cannot list side data of a type newer than itself, such as EXIF
        turn = {0: 1, -90: 6, 90: 8, 180: 3, -180: 3}.get(round(frame.rotation), 1)
        return Orientation.from_exif(turn)
    if data is None:
        return Orientation()
    # 16.16 fixed point: x' = a x + c y, y' = b x + d y, with y down.
    a, b, _, c, d = (float(v) for v in np.frombuffer(bytes(data), "<i4")[:5])
    small = 1e-3 * max(abs(a), abs(b), abs(c), abs(d), 1.0)
    if abs(b) < small and abs(c) < small and a and d:
        return Orientation(False, a < 0, d < 0)
    if abs(a) < small and abs(d) < small and b and c:
        return Orientation(True, c < 0, b < 0)
    raise MediaError(
        f"{path}: its display matrix must be a multiple of 90 degrees or a mirror, got {(a, b, c, d)}. "
        "Re-encode the clip upright."
    )


def check_transfer(path: Path, transfer: int) -> None:
    """Refuse HDR transfer curves: shown as SDR they would be wrong, not merely flat."""
    if transfer in _HDR_TRANSFERS:
        curve = _HDR_TRANSFERS[transfer]
        raise MediaError(f"{path}: must be standard dynamic range, got {curve}. Tone-map it to BT.709 first.")


def has_alpha(frame: av.VideoFrame) -> bool:
    """Whether the pixel format can carry transparency (palettes can)."""
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether any pixel of the frame is not opaque."""
    return has_alpha(frame) and bool(
        (VideoReformatter().reformat(frame, format="rgba").to_ndarray()[..., 3] < 255).any()
    )


def is_full_range(frame: av.VideoFrame) -> bool:
    return frame.color_range == _FULL or frame.format.name.startswith("yuvj") or frame.format.is_rgb


class RGBConverter:
    """Turn decoded frames into upright uint8 RGB (H, W, 3) at one size.

    The matrix and range tags of each frame are honoured; without a tag BT.601 limited range is read, as the
    published system does. Transparency is laid over `background` (0 black, 255 white). Several threads may call it.
    """

    def __init__(
        self, orientation: Orientation, size: tuple[int, int], filter: str = "area", background: int = 0
    ) -> None:
        self.orientation = orientation
        self.size = size
        self.filter = filter
        self.background = background
        self._own = threading.local()  # a reformatter serves one frame at a time

    def __call__(self, frame: av.VideoFrame, out_HW3: np.ndarray) -> None:
        """Write the pixels of a frame to out_HW3, which has the size."""
        alpha = has_alpha(frame)
        source_range = _FULL if is_full_range(frame) else _LIMITED
        if not hasattr(self._own, "reformatter"):
            self._own.reformatter = VideoReformatter()
        rgb = self._own.reformatter.reformat(
            frame,
            format="rgba" if alpha else "rgb24",
            src_colorspace=_MATRICES.get(frame.colorspace, _BT601),
            src_color_range=source_range,
            dst_color_range=_FULL,
            interpolation=_RGB_FLAGS,
            **_ONE_THREAD,
        )
        pixels = rgb.to_ndarray()
        if frame.color_range == _LIMITED and frame.format.name.startswith("gray"):
            pixels = _EXPAND_GREY[pixels]  # swscale takes all grey as full range
        if alpha:
            pixels = _over(pixels, self.background)
        upright = self.orientation.apply(pixels)
        if upright.shape[:2] == out_HW3.shape[:2]:
            out_HW3[:] = upright
        else:
            cv2.resize(
                np.ascontiguousarray(upright), tuple(self.size), out_HW3, interpolation=FILTERS[self.filter]
            )


def _over(pixels_HW4: np.ndarray, background: int) -> np.ndarray:
    alpha = pixels_HW4[..., 3:].astype(np.uint16)
    mixed = pixels_HW4[..., :3] * alpha + background * (255 - alpha) + 127
    return (mixed // 255).astype(np.uint8)


def resize_frame(frame_HWC: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """One frame at size (width, height); the frame itself if it has that size already."""
    if (frame_HWC.shape[1], frame_HWC.shape[0]) == tuple(size):
        return frame_HWC
    return cv2.resize(frame_HWC, tuple(size), interpolation=FILTERS[filter])


def display_size(width: int, height: int, sar: Fraction, orientation: Orientation) -> tuple[int, int]:
    """Upright size with square pixels: the coded width is scaled by the pixel aspect `sar`, then turned."""
    width = max(1, int(width * sar + Fraction(1, 2)))
    return (height, width) if orientation.transpose else (width, height)


def even_size(size: tuple[int, int]) -> tuple[int, int]:
    """Largest (width, height) of even numbers within `size`, at least 2x2: what 4:2:0 video can hold."""
    return max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2)
