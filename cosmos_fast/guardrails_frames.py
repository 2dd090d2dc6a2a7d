"""Judges single frames: image features of SigLIP, then a small classifier of unsafe content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from .formats import CheckpointError
from .resample import pillow_resize
from .vision_tower import load_vision_tower
from .weight_file import open_tensors

UNSAFE: Final[Mapping[int, str]] = {
    1: "Sexual_Content", 3: "Drugs", 4: "Child_Abuse", 5: "Hate_and_Harassment", 6: "Self-Harm",
}  # fmt: skip
"""Classes that count. 0 is safe; 2 has no name in the published system and never counts there."""

CLASSES: Final = 7
MAX_SHARE: Final = 0.1
"""A clip is blocked when more than this share of all its frames is unsafe."""

BATCH: Final = 8
_PREFIX = "network.layers."


def class_name(index: int) -> str:
    return "Safe" if index == 0 else UNSAFE.get(index, f"class {index}")


def is_over(unsafe: int, frames: int) -> bool:
    """Whether so many unsafe frames block a clip of `frames`: a strict limit, in whole numbers."""
    return unsafe * 10 > frames  # MAX_SHARE without rounding


class ContentFilter:
    """Frames to classes. `tower` is a SigLIP folder, `file` the classifier; both run in fp32, as published."""

    name = "content filter"

    def __init__(self, tower: Path, file: Path, device: torch.device) -> None:
        self._tower: Any = load_vision_tower(
            tower, "siglip", has_head=True, dtype=torch.float32, device=device, extra="guardrails"
        )
        self._device, self._side = device, int(self._tower.config.image_size)
        self._classifier = self._read(file).to(device)
        width = int(self._tower.config.hidden_size)
        if self._classifier[0].in_features != width:
            raise CheckpointError(
                f"guardrails: {file} must read features of width {width} as {tower} makes them, "
                f"got {self._classifier[0].in_features}."
            )

    @staticmethod
    def _read(file: Path) -> nn.Sequential:
        """Linear, norm, ReLU twice and a last Linear, in the sizes of the file."""
        found = {n.removeprefix(_PREFIX): t for n, t in open_tensors(file).tensors.items()}
        try:
            sizes = [tuple(found[f"{index}.weight"].shape) for index in (0, 3, 6)]
            layers: list[nn.Module] = []
            for outputs, inputs in sizes:
                layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
            classifier = nn.Sequential(*layers[:-2])
            classifier.load_state_dict({name: t.load().clone() for name, t in found.items()}, strict=True)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"guardrails: {file} must hold the frame classifier, got: {str(error)[:300]}"
            ) from None
        if sizes[-1][0] != CLASSES:
            raise CheckpointError(f"guardrails: {file} must tell {CLASSES} classes, got {sizes[-1][0]}.")
        if not all(bool(tensor.isfinite().all()) for tensor in classifier.state_dict().values()):
            raise CheckpointError(f"guardrails: {file} must be finite, got NaN or infinity.")
        return classifier.float().eval().requires_grad_(False)

    def features(self, frames_FHW3: Tensor) -> Tensor:
        """(F, width) image features of unit length; frames (F, H, W, 3) uint8 on the device."""
        size = self._side, self._side  # one by one: a frame in float64 is eight times its bytes
        small = torch.cat([pillow_resize(frame[None], size, "bicubic") for frame in frames_FHW3])
        x = small.permute(0, 3, 1, 2)
        pooled = self._tower(pixel_values=(x.float() / 255 - 0.5) / 0.5).pooler_output
        return pooled / pooled.norm(dim=-1, keepdim=True)

    @torch.inference_mode()
    def classify(self, frames_FHW3: np.ndarray) -> list[int]:
        """Class of every frame (F, H, W, 3) uint8. Raises CheckpointError for scores that are not finite."""
        classes: list[int] = []
        for start in range(0, len(frames_FHW3), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(frames_FHW3[start : start + BATCH]))
            scores = self._classifier(self.features(batch.to(self._device)))
            if not bool(scores.isfinite().all()):
                raise CheckpointError("guardrails: scores of the content filter must be finite, got NaN.")
            classes += scores.argmax(-1).tolist()
        return classes
