"""Controls and masks that are computed from a whole clip, before any network is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch

from .clip_maker import ClipMaker, MakerOptions

Factory = Callable[[torch.device, MakerOptions], ClipMaker]


def _depth(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import depth

    return depth.open_depth(device, options)


def _seg(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import segmentation

    return segmentation.open_seg(device, options)


def _mask(device: torch.device, options: MakerOptions) -> ClipMaker:
    from . import segmentation

    return segmentation.open_mask(device, options)


CLIP_MAKERS: Final[Mapping[str, Factory]] = MappingProxyType({"depth": _depth, "seg": _seg, "mask": _mask})
"""What makes a control, or a mask from words, out of a whole clip."""
