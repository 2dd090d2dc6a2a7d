"""Memory of chunks comes back when its last user drops it, and is given to nobody else before."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from system import CHUNK, clip_of, open_engine, request

from cosmos_fast import planning, video
from cosmos_fast.clip_parts import Opening, Piece, Window, joined
from cosmos_fast.clip_plan import ClipPlan
from cosmos_fast.controls import FrameMaker
from cosmos_fast.formats import ClipError, MediaError, SpecError
from cosmos_fast.inputs import ClipInputs
from cosmos_fast.planning import preflight
from cosmos_fast.reading import Reader
from cosmos_fast.rooms import Rooms
from cosmos_fast.stages import Stages

SHAPE, CPU = (4, 8, 3), torch.device("cpu")


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def free_bytes(rooms: Rooms) -> int:
    return sum(memory.size for many in rooms._free.values() for memory in many)


@pytest.mark.parametrize(
    "hold",
    [
        lambda room: room,
        lambda room: room[1:3],
        lambda room: room[2:, ::2].transpose(1, 0, 2),
        lambda room: room[1:2].view(np.bool_).reshape(-1),
        lambda room: torch.from_numpy(room[1:]),
        lambda room: torch.from_numpy(room)[0].view(-1),
        lambda room: memoryview(room),
    ],
    ids=["itself", "slice", "strides", "dtype", "tensor", "view of a tensor", "buffer"],
)
def test_memory_comes_back_when_its_last_user_drops_it(hold) -> None:  # type: ignore[no-untyped-def]
    rooms = Rooms()
    room = rooms.take(SHAPE, np.uint8)
    room[:] = 7
    where, user = address(room), hold(room)
    del room
    gc.collect()
    assert free_bytes(rooms) == 0
    other = rooms.take(SHAPE, np.uint8)
    other[:] = 1
    assert address(other) != where and (np.asarray(user).view(np.uint8) == 7).all()
    del user
    gc.collect()
    assert free_bytes(rooms) == 96
    assert address(rooms.take(SHAPE, np.uint8)) == where


def test_no_more_is_held_than_was_in_use_at_once() -> None:
    rooms = Rooms()
    many = [rooms.take(SHAPE, np.uint8) for _ in range(3)]
    masks = rooms.take(SHAPE[:2], np.bool_)
    assert masks.dtype == np.bool_ and masks.shape == SHAPE[:2]
    del many, masks
    assert free_bytes(rooms) == 3 * 96 + 32
    again = [rooms.take(SHAPE, np.uint8) for _ in range(3)], rooms.take(SHAPE[:2], np.bool_)
    assert free_bytes(rooms) == 0
    del again
    depth = rooms.take(SHAPE, np.float32)  # of no size that is there: clips have another shape now
    assert free_bytes(rooms) == 0 and depth.nbytes == 4 * 96


def test_rooms_may_go_before_their_arrays_and_threads_may_drop_them() -> None:
    rooms = Rooms()
    kept, gone = rooms.take(SHAPE, np.uint8), weakref.ref(rooms)
    held = [rooms.take(SHAPE, np.uint8)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert free_bytes(rooms) == 96
    kept[:] = 3
    del rooms
    assert (kept == 3).all()
    del kept
    gc.collect()
    assert gone() is None


# --- chunks in rooms ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 2 * CHUNK)


def planned(clip: Path, **fields: Any) -> ClipPlan:
    return preflight([request(clip, **{"edge": {}} | fields)], chunk_lengths=(CHUNK, 1)).clips[0]


def test_clips_read_into_used_memory_are_the_same(clip: Path) -> None:
    plan, rooms = planned(clip, max_frames=2 * CHUNK - 1), Rooms()
    with ClipInputs(plan) as inputs:
        fresh = [inputs.read(chunk) for chunk in plan.chunks]
    assert len(fresh) == 2
    places = []
    for _ in range(3):
        with (
            ClipInputs(plan, rooms=rooms) as inputs,
            Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader,
        ):
            given = [one.whole() for one in reader]  # both chunks are held: neither may be written over
        for one, wanted in zip(given, fresh, strict=True):
            assert np.array_equal(one.frames, wanted.frames)
            assert np.array_equal(one.controls["edge"], wanted.controls["edge"])
        places.append(sorted(address(x) for one in given for x in (one.frames, one.controls["edge"])))
        del one, given
        gc.collect()
    assert places[0] == places[1] == places[2] and len(set(places[0])) == 4
    assert free_bytes(rooms) == 4 * fresh[0].frames.nbytes


def test_reading_begins_before_it_is_asked_for_and_lets_go_of_its_files(clip: Path) -> None:
    plan = planned(clip, max_frames=CHUNK)
    with ClipInputs(plan) as inputs, Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader:
        reader._worker.finish()
        assert inputs.source._position == CHUNK and inputs.source._decoder is None
        (one,) = reader
        assert one.whole().frames.shape[0] == CHUNK


def test_what_a_converting_thread_raises_is_raised_by_read(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, seen = video.RGBConverter.__call__, []

    def fail(self: Any, frame: Any, out: np.ndarray) -> None:
        seen.append(frame)
        if len(seen) == 3:
            raise MediaError("frame 3 is bad")
        convert(self, frame, out)

    monkeypatch.setattr(video.RGBConverter, "__call__", fail)
    with video.Source(video.probe(clip)) as source, pytest.raises(MediaError, match="frame 3"):
        source.read(0, CHUNK)


def test_a_maker_of_frames_must_fill_what_it_is_given(clip: Path) -> None:
    def other(frames: np.ndarray, preset: str, out: np.ndarray | None) -> np.ndarray:
        return 255 - frames  # an array of its own serves as well

    def short(frames: np.ndarray, preset: str, out: np.ndarray | None) -> np.ndarray:
        return frames[:1, :8]

    plan = planned(clip, max_frames=CHUNK)
    for function, fault in ((other, None), (short, "one control frame for each frame")):
        makers = {"edge": FrameMaker("edge", "preset_edge_threshold", function)}
        with ClipInputs(plan, makers) as inputs:
            if fault is None:
                given = inputs.read(plan.chunks[0])
                assert np.array_equal(given.controls["edge"], 255 - given.frames)
            else:
                with pytest.raises(ClipError, match=fault):
                    inputs.read(plan.chunks[0])


def test_a_part_takes_each_window_when_it_comes(clip: Path) -> None:
    """The memory of a window may be used again as soon as the next one is asked for."""
    plan = planned(clip, max_frames=CHUNK)
    (chunk,) = plan.chunks
    window = np.zeros((1, 4, 4, 3), np.uint8)

    def pieces() -> Iterator[Piece]:
        for seed in (1, 2):
            yield Opening(chunk, seed, window, {}, {}, None)
            for start in range(chunk.keep):
                window[:] = 10 * seed + start
                yield Window(start, window)

    parts = list(joined(pieces()))
    assert [part.seed for part in parts] == [1, 2]
    for part in parts:
        assert part.frames[:, 0, 0, 0].tolist() == [10 * part.seed + i for i in range(chunk.keep)]


def test_an_engine_probes_a_file_again_only_when_it_changed(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real, probed = open_engine(models, "edge"), planning.probe, []

    def count(path: Path, on_corrupt: Any) -> Any:
        probed.append(path)
        return real(path, on_corrupt)

    monkeypatch.setattr(planning, "probe", count)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    before = engine.planned(request(copy))
    assert engine.planned(request(copy)) == before and len(probed) == 1
    clip_of(copy, 3)
    assert engine.planned(request(copy)).frames == 3 and len(probed) == 2
    spec = request(copy)
    copy.unlink()
    with pytest.raises(SpecError, match="must exist, got no such file"):
        engine.planned(spec)


def test_a_result_of_one_chunk_is_its_part(models: Path, clip: Path) -> None:
    engine = open_engine(models, "edge")
    asked = request(clip, max_frames=CHUNK)
    (part,) = engine.stream(asked)
    assert np.array_equal(engine.generate(asked).frames, part.frames)
    long = engine.generate(request(clip, max_frames=CHUNK + 2)).frames
    assert len(long) == CHUNK + 2 and np.array_equal(long[:1], part.frames[:1])
