"""Lines of progress: what a step takes and when the batch ends, told by steps alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cosmos_fast import progress
from cosmos_fast.clip_parts import Step
from cosmos_fast.progress import Progress


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def clips(count: int, chunks: int, steps: int) -> list[Any]:
    return [SimpleNamespace(name=f"c{i}", chunks=range(chunks), steps=steps) for i in range(count)]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_what_comes_before_a_chunk_is_not_the_pace_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Progress(clips(1, 2, 4)) as shown:
        clock.now += 60  # weights, encoding
        shown.step(Step("c0", "denoise", 0, 2, 1, 4))
        assert lines(capsys) == ["clip 1/1 c0 chunk 1/2 step 1/4"]  # nothing tells the pace yet
        for step in (2, 3, 4):
            clock.now += 2
            shown.step(Step("c0", "denoise", 0, 2, step, 4))
        assert lines(capsys) == ["clip 1/1 c0 chunk 1/2 step 4/4, 2.00 s/step, ETA 66 s"]
        clock.now += 40
        shown.step(Step("c0", "denoise", 1, 2, 1, 4))
        assert lines(capsys) == ["clip 1/1 c0 chunk 2/2 step 1/4, 2.00 s/step, ETA 6 s"]


def test_clips_of_one_step_and_several_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Progress(clips(6, 1, 1), label="[group 1] ", workers=2) as shown:
        clock.now += 8
        shown.step(Step("c1", "denoise", 0, 1, 1, 1))
        assert lines(capsys) == ["[group 1] clip 2/6 c1 chunk 1/1 step 1/1, 8.00 s/step, ETA 16 s"]


def test_quiet_says_nothing_but_what_became_of_a_clip(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(clips(1, 1, 1), quiet=True) as shown:
        shown.step(Step("c0", "denoise", 0, 1, 1, 1))
        shown.made("c0", "depth", 9, 9)
        shown.line("c0: done")
    assert lines(capsys) == ["c0: done"]
