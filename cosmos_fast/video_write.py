"""Write clips and images so that a file under its final name is always complete.

A clip grows under `<stem>.part<suffix>`. On close it is reopened, its frames are counted, each known to decode, size
and rate are compared, it is flushed to disk and only then renamed. A killed process leaves at most the part
file, which the next writer of that name removes.

H.264 is decoded while it is encoded, so at the end the file need only be read: its packets must be those that
decoded. Files of other codecs, whose packets a container may change, are decoded once they are finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from .formats import EnvironmentProblem, MediaError
from .video_decode import NO_LIMITS, Decoder, even_size

_BT709, _LIMITED, _FULL = 1, 1, 2
_YUV_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_IMAGE_QUALITY = 85
_FRAME_THREADS = 8
"""Frames libx264 works on at once, the same on every machine because its bytes depend on the number. PyAV's default cuts
each frame into slices instead, as many as the machine has cores for. There is no `bufsize`: with one, libx264 spends bits
by what its threads have spent so far, so the bytes depend on which comes first, slices or frames alike (docs/log.md)."""
_X264 = (
    ("profile", "high"),
    ("preset", "faster"),  # half the time of "medium" at the same PSNR and SSIM (docs/log.md)
    ("rc-lookahead", "10"),  # a clip waits at its end for the frames that are looked ahead
    ("x264-params", "annexb=0"),  # packets as an mp4, mov or mkv file holds them: see `_Decoded`
)
_DECODER_THREADS = 4


@dataclass(frozen=True)
class _Codec:
    pixel_format: str
    suffixes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    lossless: bool = False


CODECS = {
    "libx264": _Codec("yuv420p", (".mp4", ".mov", ".mkv"), _X264),
    "libsvtav1": _Codec("yuv420p", (".mp4", ".mkv"), (("preset", "8"),)),
    "ffv1": _Codec("bgr0", (".mkv",), (("level", "3"),), lossless=True),
    "libx265": _Codec("yuv420p", (".mp4", ".mov", ".mkv"), (("x265-params", "log-level=none"),)),
}
"""Encoders a Writer accepts; ffv1 keeps RGB exactly, the others are 4:2:0."""


class _Decoded:
    """An H.264 stream decoded while it is encoded: `frames` and `sizes` so far, and what its packets were.

    encoder: open, and making packets as files hold them, with lengths in place of start codes (ISO 14496-15).
    Raises EnvironmentProblem for an FFmpeg that cannot, and for packets that do not decode.
    """

    def __init__(self, path: Path, encoder: Any) -> None:
        self.path, self.header = path, bytes(encoder.extradata or b"")
        if self.header[:1] != b"\x01":  # the version of the header that such files have
            found = ".".join(map(str, av.library_versions["libavcodec"]))
            raise EnvironmentProblem(
                f"{path}: libx264 must make packets with lengths, got none from libavcodec {found}. Use PyAV 14 or newer."
            )
        self._codec = av.CodecContext.create("h264", "r")
        self._codec.extradata = self.header
        self._codec.thread_type, self._codec.thread_count = "FRAME", _DECODER_THREADS
        self._packets: list[bytes] = []
        self.frames, self.sizes = 0, set[tuple[int, int]]()

    def take(self, packets: Iterable[av.Packet]) -> None:
        """Decode the next packets, before they are muxed."""
        for packet in packets:
            self._packets.append(hashlib.sha256(packet).digest())
            self._decode(packet)

    def finish(self) -> None:
        self._decode(None)

    def close(self) -> None:
        """Wait for the decoder's threads. One that reports damage needs the interpreter, which who drops a decoder holds."""
        self._codec.flush_buffers()

    def _decode(self, packet: av.Packet | None) -> None:
        try:
            found = self._codec.decode(packet)
        except av.FFmpegError as error:
            at = f"packet {len(self._packets)}"
            raise EnvironmentProblem(
                f"{self.path}: what is written must decode, got {at}: {error}."
            ) from error
        if any(frame.is_corrupt for frame in found):
            raise EnvironmentProblem(f"{self.path}: what is written must decode, got a damaged frame.")
        self.frames += len(found)
        self.sizes |= {(frame.width, frame.height) for frame in found}

    def check_held(self, decoder: Decoder) -> None:
        """Raise EnvironmentProblem unless the reopened file holds this stream: its header and every packet."""
        held = [
            hashlib.sha256(packet).digest()
            for packet in decoder.container.demux(decoder.stream)
            if packet.size
        ]
        if bytes(decoder.stream.codec_context.extradata or b"") != self.header or held != self._packets:
            same = sum(a == b for a, b in zip(held, self._packets))
            raise EnvironmentProblem(
                f"{self.path}: the written file must hold the {len(self._packets)} packets that were encoded, "
                f"got {len(held)}, {same} of them unchanged. Check the disk."
            )


def bit_rate(size: tuple[int, int], fps: Fraction) -> int:
    """Bits per second: 8 Mbit/s or 0.1 bit per pixel, whichever is more."""
    return max(8_000_000, int(size[0] * size[1] * fps / 10))


class Writer:
    """Encode frames to `path` at exactly `fps`; the name appears only when `close` has checked the file.

    size: (width, height), both even (see `even_size`). fps: int or Fraction. codec: a key of CODECS.
    Leaving the `with` block closes, or aborts if an exception passes through.
    Raises MediaError for a request that cannot be written, EnvironmentProblem for what the machine lacks.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: Fraction | int,
        *,
        codec: str = "libx264",
    ) -> None:
        self.path = Path(path)
        self.size = (int(size[0]), int(size[1]))
        self.codec = codec
        self.frames = 0
        self._container: Any = None
        self._decoded: _Decoded | None = None
        self._is_finished = False
        if codec not in CODECS:
            raise MediaError(f"Writer: codec must be one of {', '.join(CODECS)}, got {codec!r}.")
        if not isinstance(fps, (int, Fraction)) or not 0 < fps <= 1000:
            raise MediaError(f"Writer: fps must be an int or Fraction above 0 and at most 1000, got {fps!r}.")
        self.fps = Fraction(fps)
        if even_size(self.size) != self.size:
            raise MediaError(
                f"Writer: width and height must be even, got {size[0]}x{size[1]}. Use even_size."
            )
        if self.path.suffix.lower() not in CODECS[codec].suffixes:
            allowed = ", ".join(CODECS[codec].suffixes)
            raise MediaError(f"{self.path}: {codec} must be written to {allowed}, got {self.path.suffix!r}.")
        _check_encoder(codec)
        self._part = _part_of(self.path)
        self._reformatter = VideoReformatter()
        try:
            self._open()
        except (av.FFmpegError, OSError, ValueError) as error:
            self.abort()
            asked = f"{codec} at {self.size[0]}x{self.size[1]}, {self.fps} fps"
            raise EnvironmentProblem(
                f"{self.path}: must be writable with {asked}, got: {error}. Other codecs: {_others(codec)}."
            ) from error

    def _open(self) -> None:
        spec = CODECS[self.codec]
        container_format = {".mkv": "matroska", ".mov": "mov"}.get(self.path.suffix.lower(), "mp4")
        self._container = av.open(f"file:{os.path.abspath(self._part)}", "w", format=container_format)
        stream = self._container.add_stream(self.codec, rate=self.fps)
        stream.width, stream.height = self.size
        stream.pix_fmt = spec.pixel_format
        codec = stream.codec_context
        codec.time_base = 1 / self.fps
        options = dict(spec.options)
        if not spec.lossless:
            codec.bit_rate = bit_rate(self.size, self.fps)
            if self.codec == "libx264":
                codec.thread_type, codec.thread_count = "FRAME", _FRAME_THREADS
            codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
            codec.color_range = _LIMITED
        codec.options = options
        if self.codec == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # the encoder prints 20 lines a clip to stderr otherwise
        codec.open()  # a size or rate the encoder refuses fails here, before any frame is made
        self._stream = stream
        if self.codec == "libx264":
            self._decoded = _Decoded(self.path, codec)

    def write(self, frames_FHW3: np.ndarray) -> None:
        """Append frames, uint8 RGB (F, H, W, 3) or one frame (H, W, 3), at the writer's size."""
        if self._container is None:
            raise MediaError(f"{self.path}: frames must come before close, got a closed writer.")
        if frames_FHW3.ndim == 3:
            frames_FHW3 = frames_FHW3[None]
        width, height = self.size
        if frames_FHW3.dtype != np.uint8 or frames_FHW3.shape[1:] != (height, width, 3):
            raise MediaError(
                f"{self.path}: frames must be (F, {height}, {width}, 3) uint8, "
                f"got {frames_FHW3.shape} {frames_FHW3.dtype}."
            )
        with self._or_abort():
            for frame_HW3 in frames_FHW3:
                self._mux(self._stream.encode(self._encodable(frame_HW3)))
                self.frames += 1

    def _mux(self, packets: list[av.Packet]) -> None:
        if self._decoded is not None:
            self._decoded.take(packets)
        self._container.mux(packets)

    def _encodable(self, frame_HW3: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), "rgb24")
        spec = CODECS[self.codec]
        if spec.lossless:
            frame = self._reformatter.reformat(frame, format=spec.pixel_format)
        else:
            frame = self._reformatter.reformat(
                frame,
                format=spec.pixel_format,
                dst_colorspace=_BT709,
                src_color_range=_FULL,
                dst_color_range=_LIMITED,
                interpolation=_YUV_FLAGS,
            )
            frame.colorspace, frame.color_range = _BT709, _LIMITED
        frame.pts = self.frames
        frame.time_base = 1 / self.fps
        return frame

    def finish(self) -> None:
        """End the file and check it, still under its part name: what is left to `close` is quick. Once is enough."""
        if self._container is None:
            return
        if self.frames == 0:
            self.abort()
            raise MediaError(f"{self.path}: a video must have frames, got none written.")
        with self._or_abort():
            self._mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            self._verify()
            self._is_finished = True

    def close(self) -> None:
        """Finish, check and publish the file. A second call does nothing."""
        self.finish()
        if self._is_finished:
            self._is_finished = False
            with self._or_abort():
                _publish(self._part, self.path)

    @contextlib.contextmanager
    def _or_abort(self) -> Iterator[None]:
        """Nothing stays of a file that an error ends; trouble with the disk or the encoder is the machine's."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise EnvironmentProblem(f"{self.path}: must be writable, got: {error}.") from error
        except BaseException:
            self.abort()
            raise

    def _verify(self) -> None:
        """Reopen the finished part and compare it with what was written."""
        demuxer = "matroska" if self.path.suffix.lower() == ".mkv" else "mov"
        try:
            with Decoder(self._part, demuxer, NO_LIMITS) as decoder:
                frames, sizes = self._found(decoder)
                rate = decoder.stream.average_rate
                fps = Fraction(rate.numerator, rate.denominator) if rate else Fraction(0)
        except MediaError as error:
            raise EnvironmentProblem(
                f"{self.path}: the written file must open again, got: {error}"
            ) from error
        close = abs(fps / self.fps - 1) < (Fraction(1, 1000) if demuxer == "matroska" else Fraction(1, 10**9))
        if frames != self.frames or sizes != {self.size} or not close:
            raise EnvironmentProblem(
                f"{self.path}: the written file must have {self.frames} frames of {self.size} at {self.fps}, "
                f"got {frames} of {sorted(sizes)} at {fps}."
            )

    def _found(self, decoder: Decoder) -> tuple[int, set[tuple[int, int]]]:
        """Frames of the reopened file that decode, -1 after an error, and their sizes."""
        if self._decoded is None:
            sizes = {(frame.width, frame.height) for frame in decoder if not frame.is_corrupt}
            return decoder.packets if not decoder.errors else -1, sizes
        self._decoded.finish()
        self._decoded.check_held(decoder)
        context = decoder.stream.codec_context  # the size that the container tells
        return self._decoded.frames, self._decoded.sizes | {(context.width, context.height)}

    def abort(self) -> None:
        """Drop everything written so far; the final name is left as it was."""
        container, self._container, self._is_finished = self._container, None, False
        if self._decoded is not None:
            self._decoded.close()
        if container is not None:
            try:
                container.close()
            except (av.FFmpegError, OSError):
                pass  # the file is thrown away
        if getattr(self, "_part", None) is not None:
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.close() if kind is None else self.abort()


def write_image(path: str | os.PathLike[str], frame_HW3: np.ndarray) -> None:
    """Write one uint8 RGB frame (H, W, 3) as JPEG (quality 85) or PNG, by suffix; complete or not at all."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".jpg", ".jpeg", ".png"):
        raise MediaError(f"{path}: an image must be .jpg, .jpeg or .png, got {path.suffix!r}.")
    if frame_HW3.dtype != np.uint8 or frame_HW3.ndim != 3 or frame_HW3.shape[2] != 3 or 0 in frame_HW3.shape:
        raise MediaError(f"{path}: a frame must be (H, W, 3) uint8, got {frame_HW3.shape} {frame_HW3.dtype}.")
    parameters = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, _IMAGE_QUALITY]
    done, data = cv2.imencode(suffix, cv2.cvtColor(frame_HW3, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise EnvironmentProblem(f"{path}: OpenCV must encode {suffix}, got a refusal.")
    part = _part_of(path)
    try:
        part.write_bytes(data.tobytes())
        _publish(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise EnvironmentProblem(f"{path}: must be writable, got: {error}.") from error


def _part_of(path: Path) -> Path:
    """The part file's path, with anything left there by a killed run removed; links are refused."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: its folder must exist, got none.")
    for place in (path, part):
        if place.is_symlink():
            raise MediaError(f"{place}: an output must not be a link, got one to {os.readlink(place)}.")
        if place.exists() and not place.is_file():
            raise MediaError(f"{place}: an output must be a regular file, got something else there.")
    try:
        part.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{part}: must be removable, got: {error.strerror}.") from error
    return part


def _publish(part: Path, path: Path) -> None:
    """Flush `part` to disk, give it its final name, and flush the folder."""
    for place in (part, None):
        if place is None:
            os.replace(part, path)
        descriptor = os.open(place or path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_encoder(name: str) -> None:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        raise EnvironmentProblem(
            f"Writer: {name} must be in this PyAV's FFmpeg, got no such encoder. Other codecs: {_others(name)}."
        ) from None


def _others(name: str) -> str:
    return ", ".join(other for other in CODECS if other != name and _has_encoder(other)) or "none"


def _has_encoder(name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        return False
    return True
