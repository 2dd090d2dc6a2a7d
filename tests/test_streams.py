"""Calls in turns on two streams: order and results, and on a GPU that nothing is read too early or freed too soon."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import streams
from cosmos_fast.streams import in_turns


def test_on_a_cpu_calls_are_made_one_after_the_other() -> None:
    made: list[int] = []
    assert in_turns(
        [partial(lambda i: made.append(i) or i * i, i) for i in range(4)], torch.device("cpu")
    ) == [0, 1, 4, 9]
    assert made == [0, 1, 2, 3]


class Fakes:
    """torch.cuda as far as turns use it: what every stream waits for and is given, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self.made("main")

    def made(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.log.append(f"{name} awaits {other.name}")
        )

    def stream(self, wanted: Any) -> Any:
        outer, fakes = self, self.current

        class Within:
            def __enter__(self) -> None:
                outer.current = wanted

            def __exit__(self, *_: object) -> None:
                outer.current = fakes

        return Within()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fake = Fakes()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(streams, "_side", lambda device: fake.made("side"))
    return fake


def test_every_second_call_is_on_the_side_which_begins_and_ends_with_the_caller(fakes: Fakes) -> None:
    calls = [partial(lambda i: fakes.log.append(f"{i} on {fakes.current.name}"), i) for i in range(3)]
    in_turns(calls, torch.device("cuda", 0))
    assert fakes.log == ["side awaits main", "0 on main", "1 on side", "2 on main", "main awaits side"]


def test_the_caller_waits_for_the_side_where_a_call_fails_too(fakes: Fakes) -> None:
    def fail() -> None:
        raise ValueError("made on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        in_turns([lambda: None, fail], torch.device("cuda", 0))
    assert fakes.log[-1] == "main awaits side" and fakes.current.name == "main"


@pytest.mark.gpu
def test_results_are_those_of_one_stream() -> None:
    device = torch.device("cuda")

    def grown(x: Tensor, by: int) -> Tensor:
        for _ in range(20):
            x = x @ x.softmax(0) + by  # memory is taken and given back on the way
        return x

    for turn in range(20):
        x = torch.rand(512, 512, device=device) + turn  # late on this stream
        found = in_turns([partial(grown, x, i) for i in range(4)], device)
        together = torch.stack(found)
        assert torch.equal(together, torch.stack([grown(x, i) for i in range(4)]))
