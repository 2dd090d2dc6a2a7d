"""Depth of a whole clip, as a control: relative inverse depth, near is white, one scale for all frames.

    frames, 32 at a time -> network -> windows -> one scale by least squares -> one range over the clip -> uint8

The default, Video Depth Anything, looks at 32 frames at once and stays steady over time. A folder of the
transformers layout (Depth Anything) is run frame by frame and flickers. A clip is never held: depth waits in a
scratch file until its range over the whole clip is known.

Shape letters: F frames, H W pixels.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from torch import Tensor

from . import registry
from .checkpoint_file import checked
from .clip_maker import ClipTask, MakerOptions, OnFrame
from .depth_network import PATCH, WINDOW, DepthConfig, DepthNetwork
from .formats import CheckpointError, ClipError, EnvironmentProblem
from .network_keys import check_names
from .outputs import sha256
from .video import Source
from .weight_file import open_tensors

PUBLISHED: Final = "hf://depth-anything/Video-Depth-Anything-Small/video_depth_anything_vits.pth"
PUBLISHED_SHA256: Final = "13379300b739e659f076a59d52e9801bd8d38c541a7e71f73bbca4dcfb013609"
"""The repository has no releases; the file is pinned by its content."""

STEP: Final = 22
"""Frames by which windows advance: 32 less the 10 that every window shares with the one before."""

KEYFRAMES: Final = (0, 12, *range(24, WINDOW))
"""Frames of a window's input that stand in for the first 10 of the next."""

_ALIGNED: Final = 2
"""Of the shared frames, those that only fix scale and shift; over the other 8 the windows cross-fade."""

_SIDE: Final = 518
_WIDEST: Final = 1.78
_MEAN: Final = np.array([0.485, 0.456, 0.406])
_DEVIATION: Final = np.array([0.229, 0.224, 0.225])
_AT_ONCE: Final = 8
"""Frames read, run alone, or written at a time where windows do not decide it."""


def network_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which the network sees a frame: the shorter side near 518, both multiples of 14.

    Frames wider than 16:9 are seen smaller, since memory goes with the longer side.
    """
    ratio, side = max(width, height) / min(width, height), _SIDE
    if ratio > _WIDEST:
        side = max(PATCH, round(int(side * 1.777 / ratio) / PATCH) * PATCH)
    scale = max(side / width, side / height)

    def fit(length: int) -> int:
        near = int(np.round(scale * length / PATCH)) * PATCH
        return near if near >= side else int(np.ceil(scale * length / PATCH)) * PATCH

    return fit(width), fit(height)


def prepared(frames_FHW3: np.ndarray) -> Tensor:
    """Frames uint8 -> (F, 3, H, W) fp32 at the network's size, normalised."""
    size = network_size(frames_FHW3.shape[2], frames_FHW3.shape[1])
    parts = [
        (cv2.resize(frame.astype(np.float32) / 255, size, interpolation=cv2.INTER_CUBIC) - _MEAN) / _DEVIATION
        for frame in frames_FHW3
    ]
    return torch.from_numpy(np.stack(parts).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------- windows over a clip


def input_windows(source: Source) -> Iterator[Tensor]:
    """Input (32, 3, H, W) of each window. Each frame is read once; the last is repeated to fill a window."""
    window: Tensor | None = None
    for start in range(0, source.frames, STEP):
        first = start if window is None else start + WINDOW - STEP
        stop = min(start + WINDOW, source.frames)
        new = prepared(source.read(first, stop)) if first < stop else window[-1:]  # type: ignore[index]
        missing = start + WINDOW - max(first, stop) - (first >= stop)
        new = torch.cat([new, new[-1:].expand(missing, -1, -1, -1)])
        window = new if window is None else torch.cat([window[list(KEYFRAMES)], new])
        yield window


def scale_and_shift(depth: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """(a, b) that minimise |a * depth + b - target|; (1, 0) where depth is flat and says nothing."""
    x, y = depth.ravel().astype(np.float64), target.ravel().astype(np.float64)
    spread = x - x.mean()
    variance = spread @ spread
    if variance <= 1e-12 * (x @ x) or variance == 0:
        return 1.0, 0.0
    scale = float(spread @ y / variance)
    return scale, float(y.mean() - scale * x.mean())


def stitched(windows_FHW: Iterable[np.ndarray], frames: int) -> Iterator[np.ndarray]:
    """Depth of the clip frame by frame, (H, W) fp32, from its windows (32, H, W).

    Every window is brought to the scale of the first by the two frames they share in full, then cross-faded with
    the one before over eight frames. What the scale makes negative is 0.
    """
    done, waiting, anchors = 0, np.empty((0, 0, 0), np.float32), np.empty((0, 0, 0), np.float32)
    for window in windows_FHW:
        shared = len(KEYFRAMES)
        if len(waiting) == 0:
            anchors = window[list(KEYFRAMES[:_ALIGNED])]
            ready, waiting = window[: KEYFRAMES[_ALIGNED]], window[KEYFRAMES[_ALIGNED] :]
        else:
            scale, shift = scale_and_shift(window[:_ALIGNED], anchors)
            window = np.maximum(window * np.float32(scale) + np.float32(shift), 0)
            fade = np.linspace(0, 1, shared - _ALIGNED, dtype=np.float32)[:, None, None]
            faded = waiting * (1 - fade) + window[_ALIGNED:shared] * fade
            # The first frame of the clip is the first of every window: its depth is settled once.
            anchors = np.stack([anchors[0], window[KEYFRAMES[1]]])
            ready = np.concatenate([faded, window[shared : KEYFRAMES[_ALIGNED]]])
            waiting = window[KEYFRAMES[_ALIGNED] :]
        yield from ready[: frames - done]
        done += min(len(ready), frames - done)
    yield from waiting[: frames - done]


def as_control(
    depth_HW: Iterable[np.ndarray], frames: int, size: tuple[int, int], on_frame: OnFrame
) -> Iterator[np.ndarray]:
    """Windows (n, H, W, 3) uint8 at `size`: the range of the whole clip is 0 to 255, rounded down."""
    width, height = size
    low, high = np.inf, -np.inf
    try:
        with tempfile.TemporaryFile() as scratch:
            for index, depth in enumerate(depth_HW):
                if not np.isfinite(depth).all():
                    raise ClipError(f"depth: must be finite, got NaN or infinity in frame {index}.")
                low, high = min(low, float(depth.min())), max(high, float(depth.max()))
                scratch.write(cv2.resize(depth, size, interpolation=cv2.INTER_LINEAR).tobytes())
                on_frame(index + 1, frames)
            scratch.seek(0)
            while data := scratch.read(_AT_ONCE * width * height * 4):
                part = np.frombuffer(data, np.float32).reshape(-1, height, width)
                grey = ((part - np.float32(low)) / np.float32(high - low + 1e-8) * 255).clip(0, 255)
                yield grey.astype(np.uint8)[..., None].repeat(3, axis=3)
    except OSError as error:
        need = frames * width * height * 4
        raise EnvironmentProblem(
            f"depth: needs {need / 1e9:.3g} GB of scratch space in {tempfile.gettempdir()}, got: {error}. "
            "Free space, or set TMPDIR to a folder on a larger disk."
        ) from error


# -------------------------------------------------------------------------------------------- makers


class VideoDepth:
    """Depth by Video Depth Anything: windows of 32 frames. A ClipMaker.

    weights: a .pth or safetensors file, 'hf://org/repo/file', or None for the published small model.
    """

    def __init__(self, device: torch.device, weights: str | Path | None = None) -> None:
        self.device, self._weights = device, weights
        self._path: Path | None = None
        self._network: DepthNetwork | None = None
        self._digest = PUBLISHED_SHA256 if weights is None else None

    @property
    def identity(self) -> str:
        if self._digest is None:
            self.locate()
        precision = "fp16" if self.device.type == "cuda" else "fp32"
        return f"video-depth-anything {self._digest} {precision} 1"

    def locate(self) -> None:
        if self._path is not None:
            return
        found = registry.resolve(PUBLISHED if self._weights is None else self._weights)
        if not isinstance(found, Path):
            raise CheckpointError(f"depth model: must be one file, got several: {', '.join(found)}.")
        digest = sha256(found)
        if self._weights is None and digest != PUBLISHED_SHA256:
            raise CheckpointError(
                f"{found}: must have the SHA-256 {PUBLISHED_SHA256}, got {digest}. "
                "Delete it to download it again, or pass --depth-model FILE to use another."
            )
        self._path, self._digest = found, digest

    def make(self, task: ClipTask, on_frame: OnFrame) -> Iterator[np.ndarray]:
        network = self._load()
        with task.open() as source:
            size = (source.size[1], source.size[0])
            windows = (self._depth(network, window, size) for window in input_windows(source))
            depth = stitched(windows, source.frames)
            yield from as_control(depth, source.frames, task.size, on_frame)

    def close(self) -> None:
        self._network = None
        _free(self.device)

    def _load(self) -> DepthNetwork:
        if self._network is None:
            self.locate()
            assert self._path is not None
            self._network = load_network(self._path).to(self.device)
        return self._network

    @torch.inference_mode()
    def _depth(self, network: DepthNetwork, window: Tensor, size: tuple[int, int]) -> np.ndarray:
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            depth = network(window.to(self.device))
        return _at_size(depth, size)


class FrameDepth:
    """Depth by a Depth Anything model of transformers, each frame by itself. A ClipMaker."""

    def __init__(self, device: torch.device, model: str | Path) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise EnvironmentProblem(
                f"depth model: {model} needs the package transformers, which is not installed. "
                "Run: pip install transformers"
            )
        self.device, self._model = device, model
        self._folder: Path | None = None
        self._digest = ""
        self._network: Any = None

    @property
    def identity(self) -> str:
        self.locate()
        return f"depth-anything {self._digest} fp32 1"

    def locate(self) -> None:
        if self._folder is None:
            self._folder = registry.resolve_folder(self._model, ("config.json", "model.safetensors"))
            self._digest = sha256(self._folder / "model.safetensors")

    def make(self, task: ClipTask, on_frame: OnFrame) -> Iterator[np.ndarray]:
        network = self._load()
        with task.open() as source:
            size = (source.size[1], source.size[0])
            parts = (
                self._depth(network, source.read(start, min(start + _AT_ONCE, source.frames)), size)
                for start in range(0, source.frames, _AT_ONCE)
            )
            yield from as_control((d for part in parts for d in part), source.frames, task.size, on_frame)

    def close(self) -> None:
        self._network = None
        _free(self.device)

    def _load(self) -> Any:
        if self._network is None:
            from transformers import DepthAnythingForDepthEstimation

            self.locate()
            try:
                network = DepthAnythingForDepthEstimation.from_pretrained(self._folder, local_files_only=True)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise CheckpointError(
                    f"{self._folder}: must hold a Depth Anything model of transformers, got: {error}"
                ) from error
            self._network = network.eval().to(self.device)
        return self._network

    @torch.inference_mode()
    def _depth(self, network: Any, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return _at_size(network(pixel_values=prepared(frames).to(self.device)).predicted_depth, size)


def open_depth(device: torch.device, options: MakerOptions) -> VideoDepth | FrameDepth:
    """The depth maker of the options; see ClipMaker for when what is loaded."""
    model = options.depth_model
    if model is None:
        return VideoDepth(device)
    is_folder = (Path(model).expanduser() / "config.json").is_file()
    if is_folder or registry.find_folder(str(model)) is not None:
        return FrameDepth(device, str(model))
    return VideoDepth(device, str(model))


def load_network(path: Path) -> DepthNetwork:
    """Video Depth Anything with the weights of `path`, on the CPU in fp32; CheckpointError for other content."""
    tensors = open_tensors(path).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config = DepthConfig.of(shapes)
    with torch.device("meta"):
        network = DepthNetwork(config)
    check_names(str(path), shapes, {name: tuple(t.shape) for name, t in network.state_dict().items()})
    state = {
        name: checked(str(path), name, tensor, True).load().to(torch.float32, copy=True)
        for name, tensor in tensors.items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _at_size(depth_FHW: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(F, H, W) fp32 on the host at (rows, columns), a frame at a time: a window of 4K is a gigabyte."""
    out = np.empty((len(depth_FHW), *size), np.float32)
    for index, depth in enumerate(depth_FHW.float()):
        fit = torch.nn.functional.interpolate(
            depth[None, None], size=size, mode="bilinear", align_corners=True
        )
        out[index] = fit[0, 0].cpu().numpy()
    return out


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
