"""Makers of whole clips: what is missing, the cache, errors of one clip and of all, the controls command, generate."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import torch
from system import call, clip_of, fields, generate, leftovers, open_engine, request, write_spec
from test_depth import tiny_network

from cosmos_fast import controls, depth, makers
from cosmos_fast.clip_maker import ClipTask, MakerOptions, NothingFound
from cosmos_fast.clip_plan import ClipPlan
from cosmos_fast.disk_cache import DiskCache
from cosmos_fast.formats import CheckpointError, ClipError, EnvironmentProblem
from cosmos_fast.guards import Stopped
from cosmos_fast.inputs import ClipInputs
from cosmos_fast.makers import Makers
from cosmos_fast.planning import preflight
from cosmos_fast.video import Source, probe

CPU = torch.device("cpu")
SIZE = (256, 256)


class Fake:
    """A maker that shifts the source's colours; counts what it is asked."""

    def __init__(self, name: str, log: list[str], identity: str = "one") -> None:
        self.name, self.log, self.identity = name, log, f"{name} {identity}"
        self.fault: Exception | None = None

    def locate(self) -> None:
        self.log.append(f"{self.name} locate")

    def make(self, task: ClipTask, on_frame: Any) -> Iterator[np.ndarray]:
        self.log.append(f"{self.name} make {task.text}".strip())
        if self.fault is not None:
            raise self.fault
        with task.open() as source:
            for start in range(0, source.frames, 4):
                stop = min(start + 4, source.frames)
                on_frame(stop, source.frames)
                part = source.read(start, stop)
                if self.name == "mask":
                    part = np.where(np.arange(part.shape[2])[:, None] < part.shape[2] // 2, 255, 0) + 0 * part
                yield part.astype(np.uint8)

    def close(self) -> None:
        self.log.append(f"{self.name} close")


class Bench:
    """Makers of fakes over one cache folder; `fresh` stands for another process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, list[str]()
        self.fakes: dict[str, Fake] = {}

    def fresh(self, identity: str = "one", **faults: Exception) -> Makers:
        self.log.clear()
        self.fakes = {name: Fake(name, self.log, identity) for name in ("depth", "seg", "mask")}
        for name, fault in faults.items():
            self.fakes[name].fault = fault
        factories: dict[str, Any] = {
            name: (lambda device, options, fake=fake: fake) for name, fake in self.fakes.items()
        }
        return Makers(CPU, cache=DiskCache(self.folder / "cache"), factories=factories)

    @property
    def made(self) -> list[str]:
        return [line for line in self.log if " make" in line]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 9)


@pytest.fixture(scope="module")
def tiny_depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(tiny_network().state_dict(), path)
    return path


def planned(video: Path, name: str = "clip", **changes: Any) -> ClipPlan:
    return preflight([request(video, name, **changes)], chunk_lengths=(5, 1)).clips[0]


# --- what is made ---


def test_what_is_missing_and_its_words(clip: Path, bench: Bench, tmp_path: Path) -> None:
    given = clip_of(tmp_path / "given.mp4", 9)
    words = " ".join(f"word{n}" for n in range(200))
    plan = planned(
        clip, prompt=words, seg={}, depth={"mask_prompt": "a car"}, vis={"mask_prompt": "x", "mask_path": str(given)},
        edge={"mask_prompt": "a tree", "control_path": str(given)},
    )  # fmt: skip
    found = {need.label: need for need in bench.fresh().needs(plan)}
    assert set(found) == {"seg", "depth", "depth.mask_prompt", "edge.mask_prompt"}
    assert found["seg"].task.text.split() == words.split()[:128]
    assert found["edge.mask_prompt"].task.text == "a tree" and found["depth"].task.text == ""
    assert found["seg"].filter == "nearest" and found["edge.mask_prompt"].filter == controls.MASK_FILTER
    asked = planned(clip, prompt=words, seg={"control_prompt": "two cups"})
    assert bench.fresh().needs(asked)[0].task.text == "two cups"
    assert bench.fresh().needs(planned(clip, edge={}, vis={})) == []


def test_a_completed_plan_points_at_lossless_files_of_the_whole_clip(clip: Path, bench: Bench) -> None:
    plan = planned(clip, depth={}, vis={"mask_prompt": "left"}, max_frames=5)
    seen: list[tuple[str, str, int, int]] = []
    done = bench.fresh().complete(plan, lambda *what: seen.append(what))
    assert bench.fresh().needs(done) == [] and plan.controls["depth"] is None
    depth_file, mask_file = done.controls["depth"], done.masks["vis"]
    assert depth_file is not None and depth_file.frames == mask_file.frames == 9  # beyond max_frames
    assert depth_file.size == mask_file.size == SIZE
    expected = media.read(clip, size=SIZE, filter="linear")
    assert (media.read(depth_file.path) == expected).all()  # not one value lost
    assert set(np.unique(media.read(mask_file.path)[:, :, 5])) == {255}
    assert done.made == {"depth": "depth one", "vis.mask_prompt": "mask one"}
    assert [note.split(":")[0] for note in done.notes[-2:]] == ["depth", "vis.mask_prompt"]
    assert seen[-1] == ("clip", "vis.mask_prompt", 9, 9)
    assert bench.fresh().complete(done) is done


def test_odd_sizes_and_images(bench: Bench, tmp_path: Path) -> None:
    still = media.write_png(tmp_path / "a.png", media.pattern(1, (63, 47))[0])
    plan = planned(still, depth={}, num_video_frames_per_chunk=1)
    file = bench.fresh().complete(plan).controls["depth"]
    assert file is not None and file.frames == 1 and file.size == plan.model_size


def test_one_maker_at_a_time_and_weights_are_found_before_anything_is_made(clip: Path, bench: Bench) -> None:
    plans = [planned(clip, f"clip{k}", depth={}, seg={"control_prompt": f"cup {k}"}) for k in range(2)]
    bench.fresh().prepare(plans)
    assert bench.log[:2] == ["depth locate", "seg locate"]
    # The second clip's depth is the first one's; its segments are of other words.
    rest = bench.log[2:]
    assert rest.index("depth close") < rest.index("seg make cup 0") < rest.index("seg make cup 1")
    assert bench.made == ["depth make", "seg make cup 0", "seg make cup 1"]


# --- the cache ---


def test_a_hit_neither_locates_nor_makes(clip: Path, bench: Bench, tmp_path: Path) -> None:
    first = bench.fresh().complete(planned(clip, depth={}))
    assert bench.made == ["depth make"]
    again = bench.fresh().complete(planned(clip, depth={}, seed=5, num_steps=3))
    assert not bench.made and "depth locate" not in bench.log
    assert again.controls == first.controls and "from the cache" in again.notes[-1]
    with Source(first.controls["depth"]) as source:  # type: ignore[arg-type]
        assert source.read(0, 9).shape[0] == 9  # though the cache has touched the file since
    copy = tmp_path / "elsewhere.mp4"
    copy.write_bytes(clip.read_bytes())
    assert bench.fresh().complete(planned(copy, depth={})).controls == first.controls and not bench.made


def test_another_content_maker_size_or_word_is_a_miss(clip: Path, bench: Bench, tmp_path: Path) -> None:
    def make(video: Path = clip, identity: str = "one", **changes: Any) -> list[str]:
        bench.fresh(identity).complete(planned(video, **({"seg": {"control_prompt": "a"}} | changes)))
        return bench.made

    assert make() and not make()
    assert make(clip_of(tmp_path / "other.mp4", 9, shift=3))
    assert make(identity="two")
    assert make(resolution="480")
    assert make(seg={"control_prompt": "b"})
    assert not make()


def test_a_damaged_entry_is_made_again(clip: Path, bench: Bench) -> None:
    file = bench.fresh().complete(planned(clip, depth={})).controls["depth"]
    assert file is not None
    data = file.path.read_bytes()
    file.path.write_bytes(data[: len(data) // 2])
    repaired = bench.fresh().complete(planned(clip, depth={})).controls["depth"]
    assert bench.made == ["depth make"] and repaired is not None
    assert (media.read(repaired.path) == media.read(clip, size=SIZE, filter="linear")).all()


def test_nothing_half_made_stays(clip: Path, bench: Bench) -> None:
    ready = bench.fresh(depth=ClipError("depth: bad")).prepare([planned(clip, depth={})])
    assert isinstance(ready["clip"], ClipError)
    assert list((bench.folder / "cache").iterdir()) == []


def test_what_a_killed_process_left_goes_after_a_day(clip: Path, bench: Bench) -> None:
    folder = bench.folder / "cache"
    folder.mkdir()
    left = [folder / f".part-1-ab-{'0' * 64}{end}" for end in (".mkv", ".part.mkv")]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    bench.fresh().complete(planned(clip, depth={}))
    assert not any(path.exists() for path in left)


# --- what goes wrong ---


def test_nothing_found_fails_a_control_and_leaves_a_mask_out(clip: Path, bench: Bench) -> None:
    nothing = NothingFound("seg: must find 'a unicorn', got no box.")
    plans = [
        planned(clip, "seg", seg={"control_prompt": "a unicorn"}),
        planned(clip, "mask", edge={"mask_prompt": "a unicorn"}),
    ]
    ready = bench.fresh(seg=nothing, mask=nothing).prepare(plans)
    assert isinstance(ready["seg"], ClipError) and "unicorn" in str(ready["seg"])
    masked = ready["mask"]
    assert isinstance(masked, ClipPlan) and masked.masks == {}
    assert "unicorn" in masked.notes[-1] and "everywhere" in masked.notes[-1]
    with ClipInputs(masked):  # looked for in vain is not the same as not looked for
        pass
    assert bench.fresh().complete(masked) is masked
    with pytest.raises(EnvironmentProblem, match=r"edge.mask_prompt: .* 'a unicorn'. Give edge.mask_path"):
        ClipInputs(plans[1])
    # Searching in vain is remembered too.
    again = bench.fresh().prepare(plans)
    assert not bench.made and isinstance(again["seg"], ClipError) and isinstance(again["mask"], ClipPlan)


def test_one_bad_clip_costs_one_clip(clip: Path, bench: Bench, tmp_path: Path) -> None:
    gone = clip_of(tmp_path / "gone.mp4", 9, shift=1)
    plans = [planned(gone, "a", depth={}), planned(clip, "b", depth={})]
    clip_of(gone, 10, shift=2)  # changes after it was checked
    ready = bench.fresh().prepare(plans)
    assert "must not change after its probe" in str(ready["a"]) and isinstance(ready["b"], ClipPlan)
    assert "ValueError" in type(bench.fresh("x", depth=ValueError("bug")).prepare(plans[1:])["b"]).__name__


@pytest.mark.parametrize("fault", [EnvironmentProblem("no disk"), CheckpointError("no weights"), Stopped(2)])
def test_what_concerns_every_clip_is_raised_and_makers_are_freed(
    fault: Exception, clip: Path, bench: Bench
) -> None:
    with pytest.raises(type(fault)):
        bench.fresh(depth=fault).prepare([planned(clip, depth={})])
    assert bench.log[-1] == "depth close"


def test_a_maker_that_loses_frames_fails_its_clip(clip: Path, bench: Bench) -> None:
    made = bench.fresh()
    bench.fakes["depth"].make = lambda task, on_frame: iter([np.zeros((2, 64, 64, 3), np.uint8)])  # type: ignore[method-assign]
    assert "must make 9 frames, got 2" in str(made.prepare([planned(clip, depth={})])["clip"])


def test_a_missing_package_shows_before_anything_is_read(
    clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for changes in ({"seg": {}}, {"edge": {"mask_prompt": "a cup"}}):
        with pytest.raises(EnvironmentProblem, match="pip install"):
            Makers(CPU, cache=DiskCache(tmp_path)).check([planned(clip, **changes)])
    Makers(CPU, cache=DiskCache(tmp_path)).check([planned(clip, depth={})])  # needs no package


# --- the command line ---


@pytest.fixture
def small_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "_SIDE", 28)


def test_controls_command(
    models: Path,
    clip: Path,
    tiny_depth: Path,
    tmp_path: Path,
    small_side: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    spec = write_spec(tmp_path, "street", clip, edge={}, vis={}, depth={})
    arguments = [
        "controls", spec, "-o", out, "--checkpoint", models, "--device", "cpu", "--depth-model", tiny_depth, "--cache-dir", cache,
    ]  # fmt: skip
    run = call(*arguments)
    assert run.code == 0, run.err
    names = [f"street_control_{key}.mp4" for key in ("edge", "vis", "depth")]
    assert sorted(path.name for path in run.paths) == sorted(names)
    assert "street depth 9/9" in run.err and "depth: made in" in run.err and leftovers(out) == []
    for path in run.paths:
        assert media.read(path).shape == (9, *SIZE[::-1], 3)
    frames = media.read(clip, size=SIZE)
    assert media.psnr(media.read(out / names[0]), controls.edge(frames)) > 15
    assert media.psnr(media.read(out / names[1]), controls.vis(frames)) > 30
    grey = media.read(out / names[2])
    assert np.ptp(grey) > 150
    # Again: from the cache, without the weights.
    monkeypatch.setattr(depth, "load_network", lambda path: pytest.fail("loaded"))
    again = call(*arguments)
    assert again.code == 0 and "from the cache" in again.err and "depth 9/9" not in again.err
    assert (media.read(out / names[2]) == grey).all()


def test_controls_command_exit_codes(models: Path, clip: Path, tmp_path: Path, small_side: None) -> None:
    common = ["--checkpoint", models, "--device", "cpu", "--cache-dir", tmp_path / "cache"]
    spec = write_spec(tmp_path, "street", clip, edge={})
    assert call("controls", spec, *common).code == 2  # no output folder
    bad = write_spec(tmp_path, "bad", tmp_path / "nowhere.mp4", edge={})
    assert call("controls", bad, "-o", tmp_path / "out", *common).code == 2
    some = call("controls", spec, bad, "-o", tmp_path / "out", "--skip-invalid", *common)
    assert some.code == 1 and [path.name for path in some.paths] == ["street_control_edge.mp4"]
    missing = write_spec(tmp_path, "depth", clip, depth={})
    run = call("controls", missing, "-o", tmp_path / "out", "--depth-model", tmp_path / "no.pth", *common)
    assert run.code == 3 and "must be an existing path" in run.err


def test_generate_makes_depth_first_and_resume_knows_what_made_it(
    models: Path, clip: Path, tiny_depth: Path, tmp_path: Path, small_side: None
) -> None:
    out = tmp_path / "out"
    spec = write_spec(tmp_path, "street", clip, depth={}, num_video_frames_per_chunk=1)
    options = [spec, "--depth-model", tiny_depth, "--cache-dir", tmp_path / "cache"]
    run = generate(models, out, *options)
    assert run.code == 0, run.err
    assert run.err.index("street depth 9/9") < run.err.index("chunk 1/1 step 1/1")
    assert media.read(out / "street_control_depth.jpg").shape == (1, 64, 64, 3)
    record = json.loads((out / "street.json").read_text())
    assert record["made"]["depth"].startswith("video-depth-anything ")
    assert any(note.startswith("depth: made in") for note in record["notes"])
    assert "already done" in generate(models, out, *options, "--resume").err
    other = tmp_path / "other.pth"
    torch.save(tiny_network(1).state_dict(), other)
    changed = generate(
        models, out, spec, "--depth-model", other, "--cache-dir", tmp_path / "cache", "--resume"
    )
    assert "made again: maker of a control changed" in changed.err


def test_a_mask_from_words_acts_and_is_saved(
    models: Path, clip: Path, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fresh()
    monkeypatch.setattr(
        makers,
        "CLIP_MAKERS",
        {name: (lambda device, options, f=fake: f) for name, fake in bench.fakes.items()},
    )
    monkeypatch.setattr(Makers.__init__, "__kwdefaults__", None)
    monkeypatch.setattr(Makers.__init__, "__defaults__", (None, None, makers.CLIP_MAKERS, ()))
    out = tmp_path / "out"
    spec = write_spec(
        tmp_path, "street", clip, vis={"mask_prompt": "the left half"}, num_video_frames_per_chunk=1
    )
    run = generate(models, out, spec, "--cache-dir", tmp_path / "cache")
    assert run.code == 0, run.err
    mask = media.read(out / "street_mask_vis.jpg")
    assert mask.shape == (1, *SIZE[::-1], 3) and mask[:, :, :120].min() > 200 and mask[:, :, 136:].max() < 50
    shown = media.read(out / "street_control_vis.jpg")
    assert shown[:, :, 36:].max() < 40 < shown[:, :, :28].max()


def test_the_engine_makes_what_a_request_lacks(
    models: Path, clip: Path, tiny_depth: Path, tmp_path: Path, small_side: None
) -> None:
    options = MakerOptions(depth_model=tiny_depth)
    cache = DiskCache(tmp_path / "cache")
    engine = open_engine(models, "depth", clip_makers=Makers(CPU, options, cache))
    (part, *rest) = engine.stream(request(clip, depth={}))
    kept = next(iter((tmp_path / "cache").glob("*.mkv")))
    assert (part.controls["depth"] == media.read(kept)[: len(part.frames)]).all() and len(rest) == 1
    assert probe(kept).frames == 9
    assert fields(clip)["edge"] == {}
