"""runner.waiting: which clips of a batch will be made, by what a finished clip was made with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosmos_fast.outputs import OutputFolder
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.runner import Options, hashes, waiting
from cosmos_fast.sidecar import build_sidecar

WEIGHTS = {"edge": {"checkpoint": {"id": "edge"}}, "depth": {"checkpoint": {"id": "depth"}}}


def clip(name: str, model: str = "edge", spec_hash: str = "s1") -> Any:
    spec = SimpleNamespace(name=name, hash=lambda: spec_hash)
    return SimpleNamespace(name=name, model=model, spec=spec, inputs={})


def makers(**identities: dict[str, str]) -> Any:
    """Makers that say what would make the controls of each clip, by its name."""
    return SimpleNamespace(identities=lambda clip: identities.get(clip.name, {}))


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    """Three finished clips: one of edge and one of depth, made without guardrails, and one screened, of a maker."""
    folder = OutputFolder(tmp_path / "out")
    for name, model, screened, made in (
        ("plain", "edge", False, {}), ("deep", "depth", False, {}), ("screened", "edge", True, {"depth": "maker 1"}),
    ):  # fmt: skip
        outputs = folder.clip(name)
        outputs.media(5).write_bytes(b"video")
        outputs.finish(
            build_sidecar(
                name=name, spec={"name": name}, spec_hash="s1", recipe=Recipe.exact(), plan=Plan(), model=model, seeds=[1],
                chunks=[], checks={}, checkpoint=WEIGHTS[model]["checkpoint"], weights_sha256={}, kernels={}, stages={},
                output={"frames": 5, "width": 64, "height": 32, "fps": "24"}, made=made, guardrail={"run": screened},
            )
        )  # fmt: skip
    return folder


def names(clips: list[Any]) -> list[str]:
    return [clip.name for clip in clips]


DONE = [clip("plain"), clip("deep", "depth"), clip("screened")]
RESUMED: Any = {"resume": True, "made_with": WEIGHTS.__getitem__}


def test_without_resume_all_wait_and_nothing_is_looked_up(folder: OutputFolder) -> None:
    def refuse(model: str) -> dict[str, Any]:
        raise AssertionError("weights are looked up only to compare")

    assert waiting(DONE, folder, Options(made_with=refuse)) == DONE


def test_resumed_only_new_and_changed_ones_wait_in_their_order(folder: OutputFolder) -> None:
    clips = [clip("new"), *DONE, clip("plain", spec_hash="s2")]
    assert names(waiting(clips, folder, Options(**RESUMED))) == ["new", "plain"]


def test_each_model_is_asked_once_and_compared_with_its_own_weights(folder: OutputFolder) -> None:
    asked: list[str] = []

    def made_with(model: str) -> dict[str, Any]:
        asked.append(model)
        return WEIGHTS["edge"]  # as if depth's weights were another file now

    assert names(waiting(DONE, folder, Options(resume=True, made_with=made_with))) == ["deep"]
    assert asked == ["edge", "depth"]


def test_with_guardrails_what_was_made_without_them_waits(folder: OutputFolder) -> None:
    rails: Any = object()
    assert names(waiting(DONE, folder, Options(**RESUMED, guardrails=rails))) == ["plain", "deep"]
    assert waiting(DONE, folder, Options(**RESUMED)) == [], "screened clips stay done where nothing screens"


def test_another_maker_of_a_control_makes_the_clip_wait(folder: OutputFolder) -> None:
    same = makers(screened={"depth": "maker 1"})
    assert waiting(DONE, folder, Options(**RESUMED, makers=same)) == []
    assert names(waiting(DONE, folder, Options(**RESUMED, makers=makers(screened={"depth": "maker 2"})))) == [
        "screened"
    ]
    assert names(waiting(DONE, folder, Options(**RESUMED, makers=makers(plain={"seg": "maker 3"})))) == [
        "plain"
    ]


def test_a_changed_input_file_makes_the_clip_wait(folder: OutputFolder, tmp_path: Path) -> None:
    """The request names files by path; what they hold may change under the same name."""
    video = tmp_path / "in.mp4"
    video.write_bytes(b"one")
    asked = clip("plain")
    asked.inputs = {"video_path": video}
    assert names(waiting([asked], folder, Options(**RESUMED))) == ["plain"], "made from no file that is known"
    path = folder.clip("plain").sidecar
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": hashes(asked)}))
    assert waiting([asked], folder, Options(**RESUMED)) == []
    video.touch()
    assert waiting([asked], folder, Options(**RESUMED)) == [], "another time alone is no other file"
    video.write_bytes(b"two")
    assert names(waiting([asked], folder, Options(**RESUMED))) == ["plain"]
    video.unlink()
    assert names(waiting([asked], folder, Options(**RESUMED))) == ["plain"]
