"""The procedural clips of tools/data: repeatable, captioned truthfully, with true depth and labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cosmos_fast.formats import EnvironmentProblem, SpecError  # noqa: E402
from tools.data import mjcf, render, scenes  # noqa: E402
from tools.data.colours import PALETTE, nearest_colour, region_colour  # noqa: E402

FRAMES, SIZE, SEED = 5, (160, 96), 3


@pytest.fixture(scope="module")
def renderer() -> None:
    """Skips where nothing can be rendered."""
    try:
        render.open_context(*SIZE)
    except EnvironmentProblem as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def clips(renderer: None) -> list[render.Clip]:
    """Four clips, both families, small."""
    return [render.render_clip(index, SEED, FRAMES, SIZE) for index in range(4)]


def ids(clip: render.Clip, *names: str) -> list[int]:
    return [clip.attributes["labels"].index(name) for name in names]


# ------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize("name", PALETTE)
@pytest.mark.parametrize("lamp", [(1, 1, 1), (0.45, 0.45, 0.45), (1, 0.84, 0.68), (0.5, 0.56, 0.65)])
def test_palette_keeps_its_names_under_every_lamp(name: str, lamp: tuple[float, float, float]) -> None:
    assert nearest_colour(np.array(PALETTE[name]) * lamp) == name


def test_nearest_colour_takes_bytes_and_refuses_nonsense() -> None:
    assert nearest_colour(np.array([200, 30, 25], dtype=np.uint8)) == "red"
    assert nearest_colour((240, 240, 240)) == "white" and nearest_colour((12, 12, 12)) == "black"
    assert nearest_colour((0.9, 0.05, 0.2)) == "red"  # hue just below 360 degrees
    for bad in ((1.2, 0.0, 0.0), (300, 0, 0), (0.1, 0.2), (float("nan"), 0.0, 0.0)):
        with pytest.raises(ValueError, match="nearest_colour"):
            nearest_colour(bad)


def test_region_colour_looks_at_the_region_only() -> None:
    rgb = np.full((2, 4, 4, 3), 250, dtype=np.uint8)
    mask = np.zeros((2, 4, 4), dtype=bool)
    mask[:, 1:3, 1:3] = True
    rgb[mask] = (20, 40, 210)
    assert region_colour(rgb, mask) == "blue" and region_colour(rgb, ~mask) == "white"
    with pytest.raises(ValueError, match="empty mask"):
        region_colour(rgb, np.zeros_like(mask))
    with pytest.raises(ValueError, match="shape"):
        region_colour(rgb, mask[0])


# ------------------------------------------------------------------------------------------ scenes, no renderer


def test_layout_is_blind_to_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depth and labels come from is the same whatever colours and lamps were drawn."""
    plain = [scenes.build_scene(index, SEED, FRAMES, 5 / 3) for index in range(6)]
    original = mjcf.stream

    def other_look(seed: int, index: int, which: int, attempt: int = 0) -> np.random.Generator:
        return original(seed + 1000 * (which == mjcf.LOOK), index, which, attempt)

    for module in (sys.modules["tools.data.arm"], sys.modules["tools.data.street"]):
        monkeypatch.setattr(module, "stream", other_look)
    other = [scenes.build_scene(index, SEED, FRAMES, 5 / 3) for index in range(6)]
    assert any(a.attributes["colour"] != b.attributes["colour"] for a, b in zip(plain, other, strict=True))
    for a, b in zip(plain, other, strict=True):
        assert geometry(a.xml) == geometry(b.xml) and a.labels == b.labels
        np.testing.assert_array_equal(a.eye, b.eye)
        np.testing.assert_array_equal(a.target, b.target)
        for name in a.mocap:
            np.testing.assert_array_equal(a.mocap[name], b.mocap[name])


def geometry(xml: str) -> list[tuple[str | None, ...]]:
    """Every body, joint and geom with what shapes it."""
    from xml.etree import ElementTree

    keys = ("name", "type", "size", "pos", "euler", "axis", "mesh")
    root = ElementTree.fromstring(xml)
    meshes = [(mesh.get("name"), mesh.get("vertex"), mesh.get("face")) for mesh in root.iter("mesh")]
    nodes = [node for node in root.find("worldbody").iter() if node.tag in ("body", "joint", "geom")]  # type: ignore[union-attr]
    return meshes + [(node.tag, *(node.get(key) for key in keys)) for node in nodes]


def test_captions_tell_what_was_drawn() -> None:
    seen = set()
    for index in range(60):
        scene = scenes.build_scene(index, SEED, FRAMES, 5 / 3)
        told = scene.attributes
        for key in ("kind", "colour", "finish", "place"):
            assert told[key] in scene.caption, (scene.caption, key)
        assert told["light"].lower() in scene.caption.lower()
        assert [name for name in PALETTE if f" {name} {told['kind']}" in scene.caption] == [told["colour"]]
        assert nearest_colour(told["rgb"]) == told["colour"]
        seen.add((told["family"], told["colour"]))
    assert len(seen) > 12  # of 16


def test_motion_does_not_depend_on_the_length_of_the_clip() -> None:
    for index in range(2):
        short, long = (scenes.build_scene(index, SEED, frames, 5 / 3) for frames in (17, 93))
        assert len(long.labels) <= 256 and len(long.eye) == 93
        moved = np.abs(np.diff(short.eye - short.target, axis=0)).max()
        again = np.abs(np.diff(long.eye - long.target, axis=0)).max()
        assert again < 3 * moved  # no jump later on


# ------------------------------------------------------------------------------------------ rendering


def test_shapes_and_types(clips: list[render.Clip]) -> None:
    F, (W, H) = FRAMES, SIZE
    for clip in clips:
        assert clip.rgb.shape == clip.seg.shape == (F, H, W, 3)
        assert clip.depth.shape == clip.depth8.shape == clip.labels.shape == (F, H, W)
        assert clip.rgb.dtype == clip.seg.dtype == clip.depth8.dtype == clip.labels.dtype == np.uint8
        assert clip.depth.dtype == np.float32 and np.isfinite(clip.depth).all()
        assert clip.rgb.std() > 15 and 35 < clip.rgb.mean() < 215  # neither flat nor badly exposed
        assert json.loads(json.dumps(clip.attributes)) == clip.attributes
    assert {clip.attributes["family"] for clip in clips} == {"arm", "street"}


def test_same_index_gives_the_same_bytes(clips: list[render.Clip]) -> None:
    for index in (1, 2):  # not in the order of the fixture: nothing may carry over from clip to clip
        again = render.render_clip(index, SEED, FRAMES, SIZE)
        first = clips[index]
        assert (again.caption, again.attributes) == (first.caption, first.attributes)
        for name in ("rgb", "depth", "labels", "seg"):
            assert getattr(again, name).tobytes() == getattr(first, name).tobytes(), name
    assert clips[0].rgb.tobytes() != clips[2].rgb.tobytes()


def test_main_object_is_seen_in_its_colour(clips: list[render.Clip]) -> None:
    for clip in clips:
        mask = clip.labels == clip.attributes["main"]
        for frame in mask:
            assert 0.03 < frame.mean() < 0.4, clip.caption
        assert region_colour(clip.rgb, mask) == clip.attributes["colour"], clip.caption


def test_something_moves_between_frames_and_not_too_much(clips: list[render.Clip]) -> None:
    for clip in clips:
        steps = np.abs(np.diff(clip.rgb.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
        assert (steps > 0.3).all() and (steps < 30).all(), clip.caption


def test_depth_is_metric_and_ordered(clips: list[render.Clip]) -> None:
    for clip in clips:
        main = clip.labels == clip.attributes["main"]
        behind = ids(clip, *({"arm": ("wall",), "street": ("sky",)}[clip.attributes["family"]]))
        far = np.isin(clip.labels, behind)
        assert far.any()
        assert np.median(clip.depth[main]) < 0.8 * np.median(clip.depth[far]), clip.caption
        assert clip.depth8[main].mean() > clip.depth8[far].mean()
        assert clip.depth8.min() == 0 and clip.depth8.max() >= 254
        limits = {"arm": (0.1, 1.6), "street": (3.0, 30.0)}[clip.attributes["family"]]
        assert limits[0] < clip.depth[main].min() and np.median(clip.depth[main]) < limits[1]


def test_depth_agrees_with_the_camera(renderer: None) -> None:
    """The distance of a wall that faces the camera squarely is what the scene says."""
    build = mjcf.Builder()
    wall = build.material("grey", (0.5, 0.5, 0.5))
    build.body("wall", mjcf.geom("box", (9, 0.5, 9), wall, (0, 5.5, 0)))
    build.body("cube", mjcf.geom("box", (0.35, 0.5, 0.35), wall, (0, 2.5, 0)))
    light = mjcf.Light("plain", (0.5,) * 3, (0.3,) * 3, (0.1,) * 3, (0.2,) * 3)  # type: ignore[arg-type]
    scene = mjcf.Scene(
        xml=mjcf.document(build, light, np.random.default_rng(0), 2.0, 50.0, 45.0, 1.0, np.pi / 2),
        labels=tuple(build.names),
        main="cube",
        background=frozenset({"sky"}),
        mocap={},
        joints={},
        eye=np.array([[0.0, 0.0, 0.0]]),
        target=np.array([[0.0, 1.0, 0.0]]),
        caption="",
        attributes={},
    )
    passes = render._passes(scene, 1, *SIZE)
    assert passes is not None
    _, depth, labels = passes
    np.testing.assert_allclose(depth[labels == 1], 5.0, rtol=1e-4)
    np.testing.assert_allclose(depth[labels == 2], 2.0, rtol=1e-4)
    assert set(np.unique(labels)) == {1, 2}


def test_labels_and_painting(clips: list[render.Clip]) -> None:
    for clip in clips:
        found = np.unique(clip.labels)
        assert len(found) >= 4 and found.max() < len(clip.attributes["labels"])
        assert len(set(clip.attributes["labels"])) == len(clip.attributes["labels"])
        assert clip.attributes["labels"][clip.attributes["main"]] == clip.attributes["kind"]
        painted = clip.seg.any(axis=-1)
        np.testing.assert_array_equal(~painted, np.isin(clip.labels, clip.attributes["background"]))
        for label in found:
            assert len(np.unique(clip.seg[clip.labels == label], axis=0)) == 1


def test_painting_draws_colours_largest_first() -> None:
    labels = np.zeros((1, 4, 4), dtype=np.uint8)
    labels[0, 0, :1], labels[0, 2:] = 1, 2
    swapped = np.choose(labels, [0, 2, 1]).astype(np.uint8)
    first, second = render.seg_control(labels, [0], 5, 6), render.seg_control(swapped, [0], 5, 6)
    np.testing.assert_array_equal(first, second)  # the large one gets the first colour, whatever its number
    assert (first[0, 0, 0] != first[0, 3, 0]).any() and not first[0, 1].any()
    assert (render.seg_control(labels, [0], 5, 7) != first).any()


def test_depth_control_is_inverse_and_spans_the_clip() -> None:
    depth = np.array([[[1.0, 2.0]], [[4.0, 400.0]]], dtype=np.float32)
    scaled = render.depth_control(depth)
    wanted = (1 / depth - 1 / 400) / (1 - 1 / 400) * 255
    assert np.abs(scaled - wanted).max() <= 1.0 and scaled[0, 0, 0] >= 254 and scaled[1, 0, 1] == 0


def test_bad_requests_are_refused() -> None:
    for arguments in (dict(frames=16), dict(frames=0), dict(size=(8, 96)), dict(index=-1), dict(seed=-2)):
        with pytest.raises(SpecError, match="got"):
            render.render_clip(**{"index": 0, "seed": 0, **arguments})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ shards


def test_command_writes_resumes_and_refuses(
    clips: list[render.Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.data import make_dataset

    # Two shards of a clip by two processes; spawned processes see no patched SHARD, the shard's size travels.
    monkeypatch.setattr(make_dataset, "SHARD", 1)
    arguments = [str(tmp_path), "--clips", "2", "--seed", str(SEED), "--workers", "2", "--size", "160x96"]
    assert make_dataset.main([*arguments, "--frames", "5"]) == 0
    shards = list(make_dataset.read_shards(tmp_path))
    assert [len(arrays["rgb"]) for arrays, _ in shards] == [1, 1]
    for (arrays, told), clip in zip(shards, clips):
        assert arrays["rgb"][0].tobytes() == clip.rgb.tobytes()  # also across processes
        assert arrays["depth"][0].tobytes() == clip.depth8.tobytes()
        assert arrays["labels"][0].tobytes() == clip.labels.tobytes()
        assert told[0] == {"caption": clip.caption, **clip.attributes}
    first, second = (make_dataset.shard_path(tmp_path, k) for k in range(2))
    kept, lost = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    assert make_dataset.main([*arguments, "--frames", "5"]) == 0
    assert first.stat().st_mtime_ns == kept and second.read_bytes() == lost
    assert make_dataset.main([*arguments, "--frames", "9"]) == 2  # another set's folder


def test_command_refuses_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.data import make_dataset

    assert make_dataset.main([str(tmp_path / "a"), "--clips", "0"]) == 2
    across = ["--clips", "2", "--first", str(scenes.HELD_OUT - 1)]
    assert make_dataset.main([str(tmp_path / "b"), *across]) == 2
    assert "one side" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    with pytest.raises(SpecError, match="shard"):
        next(make_dataset.read_shards(tmp_path))


def test_script_starts_from_anywhere(tmp_path: Path) -> None:
    script = ROOT / "tools" / "data" / "make_dataset.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--workers" in done.stdout


def test_a_context_of_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_context", (-1, *SIZE, object()))
    with pytest.raises(EnvironmentProblem, match="fork"):
        render.open_context(*SIZE)


@pytest.mark.parametrize("backend", ["osmesa", "egl"])
def test_a_machine_without_gl_is_told_what_to_install(tmp_path: Path, backend: str) -> None:
    """mujoco imports its GL binding, which fails in its own way where there is no library or no device."""
    (tmp_path / "mujoco").mkdir()
    (tmp_path / "mujoco" / "__init__.py").write_text("raise AttributeError('no attribute eglQueryString')\n")
    code = (
        "from cosmos_fast.formats import EnvironmentProblem\nfrom tools.data import render\n"
        "try:\n    render.open_context(8, 8)\nexcept EnvironmentProblem as error:\n    print(error)\n"
    )
    env = dict(os.environ, MUJOCO_GL=backend, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"MUJOCO_GL={backend} must open a GL context, got AttributeError" in done.stdout, done.stderr
    assert "libegl1" in done.stdout
