"""Finds faces (RetinaFace with a ResNet-50) and replaces each by a mosaic of 5 x 5 blocks.

Tensor names are those of the published file, read strictly. The network needs torch alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import CheckpointError
from .weight_file import open_tensors

MIN_SCORE: Final = 0.7
MAX_OVERLAP: Final = 0.4
MAX_CANDIDATES: Final = 5000
MAX_FACES: Final = 750
MIN_SIDE: Final = 20
"""Pixels; smaller faces stay as they are."""

BLOCKS: Final = 5
STRIDES: Final = (8, 16, 32)
ANCHORS: Final = ((16, 32), (64, 128), (256, 512))
"""Sides of the two square anchors at every position of each stride."""

VARIANCE: Final = (0.1, 0.2)
MEAN_BGR: Final = (104.0, 117.0, 123.0)


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, as in ResNet-50; the 3x3 one carries the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


class _Body(nn.Module):
    """ResNet-50 without its classifier; gives the last three stages, at strides 8, 16 and 32."""

    def __init__(self, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage, depth in enumerate(depths):
            inner = width << stage
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(_Bottleneck(inputs, inner, 2 if stage and not index else 1))
                inputs = 4 * inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        stages = []
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
            stages.append(x)
        return stages[1:]


def _conv(inputs: int, outputs: int, kernel: int, leak: float | None) -> nn.Sequential:
    """Convolution and norm; then a ReLU of negative slope `leak`, unless None."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    ]  # fmt: skip
    return nn.Sequential(*layers, *([] if leak is None else [nn.LeakyReLU(leak)]))


class _Pyramid(nn.Module):
    def __init__(self, inputs: Sequence[int], width: int, leak: float) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (_conv(n, width, 1, leak) for n in inputs)
        self.merge1, self.merge2 = _conv(width, width, 3, leak), _conv(width, width, 3, leak)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        fine, middle, coarse = self.output1(stages[0]), self.output2(stages[1]), self.output3(stages[2])
        middle = self.merge2(middle + F.interpolate(coarse, middle.shape[2:], mode="nearest"))
        fine = self.merge1(fine + F.interpolate(middle, fine.shape[2:], mode="nearest"))
        return [fine, middle, coarse]


class _Context(nn.Module):
    """Fields of view of 3, 5 and 7 pixels, side by side."""

    def __init__(self, width: int, leak: float) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.conv3X3 = _conv(width, half, 3, None)
        self.conv5X5_1, self.conv5X5_2 = _conv(width, quarter, 3, leak), _conv(quarter, quarter, 3, None)
        self.conv7X7_2, self.conv7x7_3 = _conv(quarter, quarter, 3, leak), _conv(quarter, quarter, 3, None)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5X5_1(x)
        wide = self.conv7x7_3(self.conv7X7_2(shared))
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(shared), wide], 1))


class _Head(nn.Module):
    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.values = values
        self.conv1x1 = nn.Conv2d(width, 2 * values, 1)  # two anchors at every position

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.values))


class RetinaFace(nn.Module):
    """x (B, 3, H, W) BGR less MEAN_BGR -> boxes (B, P, 4) relative to P anchors, scores (B, P) of being a face.

    width and depths: 64 and (3, 4, 6, 3) in the published file; features: channels of the pyramid, 256.
    """

    def __init__(self, width: int = 64, features: int = 256, depths: Sequence[int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        leak = 0.1 if features <= 64 else 0.0
        self.body = _Body(width, depths)
        self.fpn = _Pyramid([8 * width, 16 * width, 32 * width], features, leak)
        self.ssh1, self.ssh2, self.ssh3 = (_Context(features, leak) for _ in STRIDES)
        self.ClassHead = nn.ModuleList(_Head(features, 2) for _ in STRIDES)
        self.BboxHead = nn.ModuleList(_Head(features, 4) for _ in STRIDES)
        self.LandmarkHead = nn.ModuleList(_Head(features, 10) for _ in STRIDES)  # in the file; not used

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.fpn(self.body(x))
        levels = [ssh(level) for ssh, level in zip((self.ssh1, self.ssh2, self.ssh3), levels)]
        boxes = torch.cat([head(level) for head, level in zip(self.BboxHead, levels)], 1)
        classes = torch.cat([head(level) for head, level in zip(self.ClassHead, levels)], 1)
        return boxes, classes.softmax(-1)[..., 1]


def anchors(height: int, width: int) -> Tensor:
    """(P, 4) centre x, centre y, width, height of every anchor as shares of the frame, finest stride first."""
    levels = []
    for stride, sides in zip(STRIDES, ANCHORS):
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        centres = torch.stack([x * stride / width, y * stride / height], -1)[:, :, None].expand(-1, -1, 2, -1)
        shape = torch.tensor([[side / width, side / height] for side in sides]).expand(rows, columns, 2, 2)
        levels.append(torch.cat([centres, shape], -1).reshape(-1, 4))
    return torch.cat(levels)


def decode(offsets_P4: Tensor, anchors_P4: Tensor) -> Tensor:
    """(P, 4) left, top, right, bottom: centres move by anchor sizes, sizes grow exponentially."""
    centre = anchors_P4[:, :2] + offsets_P4[:, :2] * VARIANCE[0] * anchors_P4[:, 2:]
    side = anchors_P4[:, 2:] * torch.exp(offsets_P4[:, 2:] * VARIANCE[1])
    corner = centre - side / 2
    return torch.cat([corner, corner + side], 1)


def strongest(boxes_P4: np.ndarray, scores_P: np.ndarray) -> np.ndarray:
    """(n, 4) pixel boxes over MIN_SCORE, best first, without those that overlap a better one by MAX_OVERLAP."""
    order = np.flatnonzero(scores_P > MIN_SCORE)
    order = order[scores_P[order].argsort()[::-1]][:MAX_CANDIDATES]
    boxes, kept = boxes_P4[order], []
    # Sides count their last pixel too, as in the published rule.
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    rest = np.arange(len(boxes))
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.maximum(high - low + 1, 0).prod(1)
        rest = rest[shared / (areas[best] + areas[rest] - shared) <= MAX_OVERLAP]
    return boxes[kept[:MAX_FACES]]


def pixelate(frame_HW3: np.ndarray, boxes_N4: np.ndarray) -> int:
    """Replace the inside of every box (pixels) by 5 x 5 blocks, in place; returns how many were large enough."""
    import cv2

    count, (height, width) = 0, frame_HW3.shape[:2]
    for box in boxes_N4:
        left, top, right, bottom = (int(edge) for edge in box)
        if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
            continue
        face = frame_HW3[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
        if face.size == 0:  # wholly outside
            continue
        small = cv2.resize(face, (BLOCKS, BLOCKS), interpolation=cv2.INTER_LINEAR)
        face[:] = cv2.resize(small, face.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        count += 1
    return count


class FaceFilter:
    """Pixelates faces, frame by frame: memory is bounded by one frame whatever the length of the clip."""

    name = "face filter"

    def __init__(self, file: Path, device: torch.device) -> None:
        found = {n.removeprefix("module."): t for n, t in open_tensors(file).tensors.items()}
        try:
            width, features = found["body.conv1.weight"].shape[0], found["ssh1.conv3X3.0.weight"].shape[1]
            depths = [
                next(n for n in itertools.count() if f"body.layer{stage}.{n}.conv1.weight" not in found)
                for stage in (1, 2, 3, 4)
            ]
            with torch.device("meta"):
                self._net = RetinaFace(width, features, depths)
            state = {
                name: t.load().to(device, torch.float32 if t.dtype.is_floating_point else t.dtype, copy=True)
                for name, t in found.items()
            }
            self._net.load_state_dict(state, strict=True, assign=True)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"guardrails: {file} must hold a RetinaFace network on ResNet, got: {str(error)[:300]}"
            ) from None
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise CheckpointError(f"guardrails: {file} must be finite, got NaN or infinity.")
        self._net = self._net.eval().requires_grad_(False)
        self._device = device
        self._anchors: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def boxes(self, frame_HW3: np.ndarray) -> np.ndarray:
        """(n, 4) faces of one RGB frame (H, W, 3) uint8: left, top, right, bottom in pixels."""
        height, width = frame_HW3.shape[:2]
        x = torch.from_numpy(np.ascontiguousarray(frame_HW3[..., ::-1])).to(self._device, torch.float32)
        x = (x - torch.tensor(MEAN_BGR, device=self._device)).permute(2, 0, 1)[None]
        offsets, scores = self._net(x)
        if (height, width) not in self._anchors:
            self._anchors = {(height, width): anchors(height, width).to(self._device)}
        found = decode(offsets[0], self._anchors[height, width])
        found *= torch.tensor([width, height, width, height], device=self._device)
        return strongest(found.cpu().numpy(), scores[0].cpu().numpy())

    def cover(self, frames_FHW3: np.ndarray) -> list[int]:
        """Pixelate every face of the frames in place; returns the number of faces of each frame."""
        return [pixelate(frame, self.boxes(frame)) for frame in frames_FHW3]
