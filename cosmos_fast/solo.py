"""A command of one process: what `team.Team` does for many ranks, this does for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .clip_plan import ClipPlan
from .layout import Layout

T = TypeVar("T")


class Solo:
    """Leads, and nobody follows."""

    started = 1
    """Processes that were started together, this one among them."""
    layout = Layout()
    is_leader = is_first = True
    label = ""

    def enter(self, layout: Layout) -> None:
        """Take this process's place in a layout."""

    def device(self, wanted: str | None) -> str | None:
        """The device for this process's Plan."""
        return wanted

    def share(self, key: str, make: Callable[[], T]) -> T:
        """The value that one rank makes, for all ranks."""
        return make()

    def order(self, clips: Sequence[ClipPlan]) -> Iterator[ClipPlan]:
        """The clips this group makes, those of one model together so that each is loaded once."""
        for model in dict.fromkeys(clip.model for clip in clips):
            yield from (clip for clip in clips if clip.model == model)

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """This group's share of preparations that every group can do."""
        return items

    def meet(self, what: str, check: Callable[[], None]) -> None:
        """Wait until every group has prepared its share; `check` is called meanwhile and may raise."""

    def open(self, model: str) -> None:
        """Tell the followers to load a model, as the leader is about to."""

    @contextlib.contextmanager
    def making(self, clip: ClipPlan, abandon: Callable[[str], None]) -> Iterator[None]:
        """While the leader makes a clip with its followers. Raises ClipError for what happened to one of those.

        abandon: what is done with the reason if this process must end here, and nobody watches it who would.
        """
        yield

    def parts(self, parts: Iterator[T]) -> Iterator[T]:
        """`parts`, the followers going on only when the leader has used one and asks for the next."""
        return parts

    def step(self) -> None:
        """After every step that goes on. Raises ClipError if another rank has failed."""

    def told(self, clip: ClipPlan, status: str, message: str = "") -> None:
        """What became of a clip: done, skipped, elsewhere or failed."""

    def close(self, exit_code: int) -> int:
        """Leave the others; the exit code of the whole command."""
        return exit_code
