"""Read and write clips: probe a file completely, stream its frames window by window, write results safely.

Frames are uint8 RGB (F, H, W, 3), upright, with square pixels. Reading, probing and writing live in
`video_decode`, `video_probe` and `video_write`; this module is what the rest of the package imports.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import av
import numpy as np

from .formats import MediaError
from .video_decode import FILTERS, Decoder, Limits, RGBConverter, even_size, resize_frame
from .video_probe import Probe, probe
from .video_sniff import stat_regular
from .video_write import CODECS, Writer, bit_rate, write_image

__all__ = [
    "CODECS",
    "FILTERS",
    "Limits",
    "Probe",
    "Source",
    "Writer",
    "bit_rate",
    "even_size",
    "probe",
    "resize",
    "write_image",
]


CONVERTERS: Final = min(4, os.cpu_count() or 1)
"""Threads that turn decoded frames of a file into pixels, while the next ones are decoded."""


class Source:
    """Frames of a probed file, streamed in windows and resized as they are decoded.

    size: (width, height) or None for the display size. filter: "area", "linear" or "nearest".
    max_frames: only the first so many frames exist. `keep` frames at the end of each window are held for the
    next one, so windows may overlap by that many at no cost; any other window is right too, but decodes the
    file again from its start.
    """

    def __init__(
        self,
        probe: Probe,
        size: tuple[int, int] | None = None,
        filter: str = "area",
        max_frames: int | None = None,
        *,
        keep: int = 16,
    ) -> None:
        if filter not in FILTERS:
            raise ValueError(f"Source: filter must be one of {', '.join(FILTERS)}, got {filter!r}.")
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"Source: max_frames must be at least 1, got {max_frames}.")
        self.probe = probe
        self._path = probe.path
        width, height = size if size is not None else probe.size
        self.size = (int(width), int(height))
        if min(self.size) < 1:
            raise ValueError(f"Source: size must be positive, got {self.size}.")
        self.frames = min(probe.frames, max_frames or probe.frames)
        self.fps = probe.fps
        self._keep = keep
        background = 255 if probe.kind == "image" else 0
        self._convert = RGBConverter(probe.orientation, self.size, filter, background)
        self._converters: ThreadPoolExecutor | None = None
        self._decoder: Decoder | None = None
        self._tail = self._nothing()
        self._stream: Iterator[av.VideoFrame] = iter(())
        self._rewind()

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Frames start..stop-1 as uint8 RGB (stop-start, H, W, 3), in `out` or an array that is the caller's own."""
        if not 0 <= start < stop <= self.frames:
            raise ValueError(f"Source.read: needs 0 <= start < stop <= {self.frames}, got {start}, {stop}.")
        self._check_unchanged()
        if self._decoder is None or start < self._position - len(self._tail):
            self._rewind()
        if out is None:
            out = np.empty((stop - start, self.size[1], self.size[0], 3), np.uint8)
        first_kept = self._position - len(self._tail)
        held = (
            self._tail[start - first_kept : stop - first_kept] if start < self._position else self._tail[:0]
        )
        out[: len(held)] = held
        if stop <= self._position:
            return out
        before = self._tail if start <= self._position else self._tail[:0]
        self._decode(start, stop, out)
        if len(out) < self._keep:  # short windows one after the other keep as much as a long one
            out_and_before = np.concatenate((before, out[len(held) :]))
            self._tail = out_and_before[max(0, len(out_and_before) - self._keep) :]
        else:
            self._tail = out[len(out) - self._keep :].copy()
        return out

    def _decode(self, start: int, stop: int, out: np.ndarray) -> None:
        """Go on to frame `stop`, what is behind `start` into its place in `out`."""
        under_way: deque[Future[None]] = deque()
        try:
            while self._position < stop:
                frame = next(self._stream, None)
                if frame is None:
                    raise MediaError(
                        f"{self._path}: must have {self.probe.frames} frames as probed, got {self._position}."
                    )
                # Frames before the window are decoded, since later ones depend on them, but not converted.
                if self._position >= start:
                    under_way.append(self._converting(frame, out[self._position - start]))
                if len(under_way) > 2 * CONVERTERS:
                    under_way.popleft().result()
                self._position += 1
        finally:
            wait(under_way)
        for done in under_way:
            done.result()

    def _converting(self, frame: av.VideoFrame, out_HW3: np.ndarray) -> Future[None]:
        if self._converters is None:
            self._converters = ThreadPoolExecutor(CONVERTERS, "convert")
        return self._converters.submit(self._convert, frame, out_HW3)

    def close(self) -> None:
        """Release the file; a later read opens it again."""
        if self._decoder is not None:
            self._decoder.close()
        if self._converters is not None:
            self._converters.shutdown()
        self._decoder = self._converters = None
        self._tail = self._nothing()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _nothing(self) -> np.ndarray:
        return np.empty((0, self.size[1], self.size[0], 3), np.uint8)

    def _rewind(self) -> None:
        self.close()
        self._check_unchanged()
        found = self.probe
        self._decoder = Decoder(self._path, found.demuxer, found.limits, found.threaded)
        self._stream = iter(self._decoder)
        self._position = 0

    def _check_unchanged(self) -> None:
        info = stat_regular(self._path)
        time = self.probe.mtime_ns and info.st_mtime_ns
        if (info.st_size, time) != (self.probe.file_bytes, self.probe.mtime_ns):
            raise MediaError(f"{self._path}: must not change after its probe, got another size or time.")


def resize(frames_FHW3: np.ndarray, size: tuple[int, int], filter: str = "area") -> np.ndarray:
    """Frames (F, H, W, 3) uint8 at size (width, height), one by one with OpenCV.

    filter: "area", "linear", "nearest" or "lanczos". Returns a new contiguous array, or the input if it fits.
    """
    if filter not in FILTERS:
        raise ValueError(f"resize: filter must be one of {', '.join(FILTERS)}, got {filter!r}.")
    if frames_FHW3.ndim != 4 or frames_FHW3.shape[3] != 3 or frames_FHW3.dtype != np.uint8:
        raise ValueError(
            f"resize: frames must be (F, H, W, 3) uint8, got {frames_FHW3.shape} {frames_FHW3.dtype}."
        )
    if frames_FHW3.shape[1:3] == (size[1], size[0]):
        return frames_FHW3
    out = np.empty((len(frames_FHW3), size[1], size[0], 3), np.uint8)
    for index, frame in enumerate(frames_FHW3):
        out[index] = resize_frame(frame, size, filter)
    return out
