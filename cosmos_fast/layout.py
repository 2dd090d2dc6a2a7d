"""How many ranks share a clip, and how many clips are made at once: decided from the batch, before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .clip_plan import ClipPlan
from .formats import DISTILLED, SpecError

MOST_CONTEXT = 16
"""Ranks that share tokens unless more are asked for: each needs an attention head, the published networks have 16."""


@dataclass(frozen=True)
class Layout:
    """`groups` clips at once, each made by context * cfg ranks. Rank r belongs to group r // size."""

    groups: int = 1
    context: int = 1
    cfg: int = 1

    @property
    def size(self) -> int:
        """Ranks that share one clip."""
        return self.context * self.cfg

    @property
    def ranks(self) -> int:
        return self.groups * self.size

    def members(self, group: int) -> range:
        """The ranks of a group; the first of them leads."""
        return range(group * self.size, (group + 1) * self.size)

    def __str__(self) -> str:
        at_once = "1 clip at a time" if self.groups == 1 else f"{self.groups} clips at once"
        return f"{self.ranks} ranks: {at_once}, each on context={self.context} x cfg={self.cfg}"


def is_guided(clip: ClipPlan) -> bool:
    """Whether every step needs two passes, which two ranks can share."""
    return "negative_prompt" in clip.prompts


def choose(
    ranks: int, clips: Sequence[ClipPlan], context: int | None = None, cfg: int | None = None
) -> Layout:
    """The layout for these clips; what is given is kept. Raises SpecError where it cannot be.

    As many clips at once as there are, for whole clips scale perfectly; what is left shares clips: first the two guidance
    passes, which exchange one velocity a step, then the tokens, which exchange every attention's operands.
    """
    for key, value in (("context", context), ("cfg", cfg)):
        if value is not None and value < 1:
            raise SpecError(f"{key}: must be 1 or more ranks, got {value}.")
    if cfg is not None and cfg > 2:
        raise SpecError(f"cfg: must be 1 or 2, for there are two guidance passes, got {cfg}.")
    groups = max((g for g in range(1, ranks + 1) if ranks % g == 0 and g <= max(1, len(clips))), default=1)
    share = ranks // groups
    if cfg is None:
        splits = all(map(is_guided, clips)) and share % (2 * (context or 1)) == 0
        cfg = 2 if splits else 1
    if context is None:
        context = max(c for c in range(1, MOST_CONTEXT + 1) if max(1, share // cfg) % c == 0)
    size = context * cfg
    if ranks % size:
        raise SpecError(
            f"gpus: must be a multiple of context * cfg, got {ranks} for {context} * {cfg}. "
            f"Take {max(1, ranks // size) * size}, or other --context and --cfg."
        )
    layout = Layout(ranks // size, context, cfg)
    if problems := cfg_problems(layout, clips):
        raise SpecError(f"{len(problems)} clips cannot be shared so", problems)
    return layout


def cfg_problems(layout: Layout, clips: Sequence[ClipPlan]) -> list[str]:
    """Why clips have no second guidance pass for a second half of the ranks."""
    if layout.cfg == 1:
        return []
    return [
        f"{clip.name}: cfg: must be 1 where there is no guidance, got {layout.cfg} for "
        + (f"model {DISTILLED}" if clip.model == DISTILLED else f"guidance {clip.spec.guidance:g}")
        + ". Use --cfg 1; --context shares such clips."
        for clip in clips
        if not is_guided(clip)
    ]
