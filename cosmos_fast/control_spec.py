"""The four control objects of a spec: what steers the picture, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from . import rules

Preset = Literal["very_low", "low", "medium", "high", "very_high"]
Text = Annotated[str, AfterValidator(rules.text)]
MediaFile = Annotated[Path, BeforeValidator(rules.media_file)]


class Control(BaseModel):
    """One control signal. An empty object means: computed from the input video, at full strength."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    control_path: MediaFile | None = Field(
        None, description="Ready-made control video or image; null computes it from the input video."
    )
    control_weight: Annotated[float, BeforeValidator(rules.number)] = Field(
        1.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Strength of this control from 0 to 1, not normalised.",
    )
    mask_path: MediaFile | None = Field(
        None, description="Video that is white where this control applies and black elsewhere."
    )
    mask_prompt: Text | None = Field(
        None, description="What to segment for the mask; has no effect when mask_path is set."
    )


class EdgeControl(Control):
    """Canny edges."""

    preset_edge_threshold: Preset = Field("medium", description="Canny thresholds for edges computed here.")


class VisControl(Control):
    """A blurred copy of the video."""

    preset_blur_strength: Preset = Field("medium", description="Blur strength for a copy computed here.")


class DepthControl(Control):
    """Relative inverse depth."""


class SegControl(Control):
    """Coloured segments."""

    control_prompt: Text | None = Field(
        None, description="What to segment; null takes the first 128 words of the prompt."
    )


MODELS: Final[dict[str, type[Control]]] = {
    "edge": EdgeControl,
    "vis": VisControl,
    "depth": DepthControl,
    "seg": SegControl,
}
