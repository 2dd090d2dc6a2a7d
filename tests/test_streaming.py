"""Reading, decoding and writing at the same time: what threads do in which order, and that results stay the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import torch
from system import CHUNK, clip_of, generate, open_engine, request, write_spec
from torch import Tensor

from cosmos_fast import ops, reading
from cosmos_fast.clip_parts import Opening, Window, last_frames
from cosmos_fast.clip_plan import ClipPlan
from cosmos_fast.engine import Engine
from cosmos_fast.formats import ClipError, MediaError
from cosmos_fast.inputs import ClipInputs
from cosmos_fast.planning import preflight
from cosmos_fast.readback import IN_FLIGHT, read_back
from cosmos_fast.reading import Reader
from cosmos_fast.recipe import Plan
from cosmos_fast.stages import Stages
from cosmos_fast.video import Source, Writer, probe
from cosmos_fast.worker import Worker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 13)


# --- the worker ---


def test_a_worker_keeps_order_and_finishes() -> None:
    done: list[int] = []
    with Worker(done.append, 2, "w") as worker:
        for n in range(20):
            worker.put(n)
    assert done == list(range(20))
    worker.finish()  # once more changes nothing


def test_a_worker_lets_only_so_many_wait() -> None:
    go, began, ahead = threading.Event(), threading.Event(), threading.Event()

    def work(n: int) -> None:
        began.set()
        go.wait(10)

    with Worker(work, 2, "w") as worker:
        worker.put(0)
        began.wait(10)
        worker.put(1), worker.put(2)
        other = threading.Thread(target=lambda: (worker.put(3), ahead.set()))
        other.start()
        assert not ahead.wait(0.2)  # one at work, two waiting: the fourth has to wait
        go.set()
        assert ahead.wait(10)
        other.join()


def test_an_error_of_a_worker_reaches_who_waits_and_ends_the_work() -> None:
    done: list[int] = []
    fault = ValueError("bad")

    def work(n: int) -> None:
        done.append(n)
        if n == 1:
            raise fault

    with pytest.raises(ValueError) as caught, Worker(work, 1, "w") as worker:
        for n in range(50):  # far more than may wait: nobody hangs
            worker.put(n)
    assert caught.value is fault and done == [0, 1]
    for call in (worker.check, worker.finish):
        with pytest.raises(ValueError):
            call()


def test_an_exception_of_the_caller_drops_what_waits() -> None:
    began, done = threading.Event(), []

    def work(n: int) -> None:
        began.set()
        until = time.monotonic() + 10
        while not worker._dropped and time.monotonic() < until:
            time.sleep(0.01)
        done.append(n)

    with pytest.raises(KeyError), Worker(work, 8, "w") as worker:
        for n in range(5):
            worker.put(n)
        assert began.wait(10)
        raise KeyError
    assert done == [0]


# --- reading back ---


def windows_of(x: Tensor, launched: list[int]) -> Iterator[tuple[int, Tensor]]:
    for index in range(x.shape[2]):
        launched.append(index)
        yield index, x[:, :, index : index + 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_window_is_checked_when_its_turn_comes(bad: float) -> None:
    x = torch.rand(1, 3, 4, 6, 8) * 2 - 1
    whole = ops.pixels(x).numpy()
    x[0, 1, 2, 3, 3] = bad
    found = read_back(windows_of(x, []), CPU)
    for index in (0, 1):
        key, frames = next(found)
        assert key == index and np.array_equal(frames, whole[index : index + 1])
    with pytest.raises(ClipError, match="decode: frames must be finite"):
        next(found)


@pytest.mark.gpu
def test_the_device_works_ahead_by_one_window(device: torch.device) -> None:
    x = torch.rand(1, 3, 24, 64, 96, device=device, dtype=torch.bfloat16) * 2 - 1
    launched: list[int] = []
    found, kept = read_back(windows_of(x, launched), device), []
    for index, (key, frames) in enumerate(found):
        assert key == index and len(launched) == min(index + IN_FLIGHT, 24)
        kept.append(frames)  # kept windows must not be overwritten by later ones
    assert np.array_equal(np.concatenate(kept), ops.pixels(x).cpu().numpy())
    x[0, 0, 3, 5, 5] = torch.nan
    with pytest.raises(ClipError, match="must be finite"):
        list(read_back(windows_of(x, []), device))


# --- reading inputs ---


def planned(video: Path, **changes: Any) -> ClipPlan:
    return preflight([request(video, **changes)], "multi", chunk_lengths=(CHUNK, 9, 1)).clips[0]


def test_reading_in_windows_is_reading_at_once(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.zeros((13, 64, 64, 3), np.uint8)
    mask[:, :, 32:] = 255
    media.write(tmp_path / "mask.mkv", mask, codec="ffv1", pix_fmt="bgr0")
    np.savez(tmp_path / "guide.npz", mask[..., 0])
    media.write(tmp_path / "depth.png", mask[:1], codec="png", pix_fmt="rgb24")
    plan = planned(
        clip, edge={}, vis={"mask_path": str(tmp_path / "mask.mkv")}, guided_generation_mask=str(tmp_path / "guide.npz"),
        depth={"control_path": str(clip)}, num_video_frames_per_chunk=9, num_conditional_frames=2, max_frames=12,
    )  # fmt: skip
    with ClipInputs(plan) as inputs:
        whole = [inputs.read(chunk) for chunk in plan.chunks]
    assert len(whole) == 2
    decoders: list[int] = []
    rewind = Source._rewind
    monkeypatch.setattr(Source, "_rewind", lambda self: (decoders.append(1), rewind(self))[1])
    monkeypatch.setattr(reading, "WINDOW", 1)
    stages = Stages(CPU)
    with ClipInputs(plan) as inputs, Reader(lambda: inputs, plan.chunks, stages) as reader:
        for one, expected in zip(reader, whole, strict=True):
            given = one.whole()
            assert np.array_equal(given.frames, expected.frames)
            assert np.array_equal(one.frames(2, 7), expected.frames[2:7])
            for name in ("edge", "vis", "depth"):
                assert np.array_equal(given.controls[name], expected.controls[name])
                assert np.array_equal(one.control(name, 1, 4), expected.controls[name][1:4])
            assert np.array_equal(given.masks["vis"], expected.masks["vis"]) and not given.masks["vis"].all()
            assert np.array_equal(given.guided, expected.guided)  # type: ignore[arg-type]
    # Frames that chunks share are kept, though windows are shorter than what is shared: each file is opened once.
    assert len(decoders) == 3 and stages.beside_s["inputs"] > 0


def test_black_is_known_late_and_light_early(clip: Path, tmp_path: Path) -> None:
    dark = np.zeros((13, 64, 64, 3), np.uint8)
    media.write(tmp_path / "black.mkv", dark, codec="ffv1", pix_fmt="bgr0")
    dark[8, 3, 3] = 9
    media.write(tmp_path / "last.mkv", dark, codec="ffv1", pix_fmt="bgr0")
    plan = planned(
        clip, num_video_frames_per_chunk=9, max_frames=9, edge={},
        depth={"control_path": str(tmp_path / "black.mkv")}, seg={"control_path": str(tmp_path / "last.mkv")},
    )  # fmt: skip
    with ClipInputs(plan) as inputs, Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader:
        (one,) = reader
        assert [one.is_lit(name) for name in ("edge", "seg", "depth", "vis")] == [True, True, False, False]


def test_a_maker_of_ones_own_gets_the_whole_chunk(clip: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    class Bright:
        name = "depth"

        def make(self, frames: np.ndarray, control: Any, *, source: Any, start: int, stop: int) -> np.ndarray:
            asked.append((len(frames), start, stop))
            return 255 - frames if control is not None else frames[:1]

    plan = planned(clip, max_frames=CHUNK, depth={})
    plan = replace(plan, controls={"depth": None})
    with (
        ClipInputs(plan, {"depth": Bright()}) as inputs,
        Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader,
    ):
        (one,) = reader
        assert one.is_lit("depth") and np.array_equal(one.control("depth", 0, 1), 255 - one.frames(0, 1))
    assert asked == [(CHUNK, 0, CHUNK)]


def test_controls_are_made_while_the_next_frames_are_read(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window's controls wait here for the frames of the second: one after the other they never came."""
    monkeypatch.setattr(reading, "WINDOW", 2)
    plan, make = planned(clip, max_frames=CHUNK, edge={}), ClipInputs.make

    def late(self: ClipInputs, chunk: Any, given: Any, start: int, stop: int) -> list[str]:
        one.frames(stop, stop + 1) if stop < CHUNK else None
        return make(self, chunk, given, start, stop)

    with ClipInputs(plan) as inputs:
        expected = inputs.read(plan.chunks[0])
        monkeypatch.setattr(ClipInputs, "make", late)
        one = reading.Reading(plan.chunks[0])
        threading.Thread(
            target=one.read, args=(lambda: inputs, threading.Event(), one.take), daemon=True
        ).start()
        whole: list[Any] = []
        waits = threading.Thread(target=lambda: whole.append(one.whole()), daemon=True)
        waits.start()
        waits.join(10)
        assert whole and np.array_equal(whole[0].controls["edge"], expected.controls["edge"])


def test_what_keeps_a_chunk_from_being_read_reaches_who_waits(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read

    def fail(self: Source, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        if stop > CHUNK:
            raise MediaError("the file ends early")
        return read(self, start, stop, out)

    monkeypatch.setattr(Source, "read", fail)
    plan = planned(clip)
    with ClipInputs(plan) as inputs, Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader:
        chunks = iter(reader)
        assert next(chunks).whole().frames.shape == (CHUNK, 256, 256, 3)
        second = next(chunks)
        for ask in (second.whole, lambda: second.is_lit("edge"), lambda: second.control("edge", 4, 5)):
            with pytest.raises(MediaError, match="ends early"):
                ask()


def test_the_next_chunk_is_read_before_it_is_asked_for(clip: Path) -> None:
    plan = planned(clip)
    with ClipInputs(plan) as inputs, Reader(lambda: inputs, plan.chunks, Stages(CPU)) as reader:
        next(iter(reader)).whole()
        reader._worker.finish()
        assert inputs.source._position == 2 * (CHUNK - 1) + 1


def test_short_windows_keep_as_many_frames_as_long_ones(clip: Path) -> None:
    with Source(probe(clip), keep=4) as source:
        whole = source.read(0, 13)
    with Source(probe(clip), keep=4) as source:
        for start, stop in [(0, 1), (1, 3), (3, 4), (0, 5), (1, 6)]:
            assert np.array_equal(source.read(start, stop), whole[start:stop])
        assert np.array_equal(source._tail, whole[2:6])
        source.read(9, 10)  # frames that were passed over are not kept
        assert np.array_equal(source._tail, whole[9:10])


# --- an engine ---


def test_pieces_make_up_the_parts(models: Path, clip: Path) -> None:
    engine = open_engine(models, "edge")
    plan = engine.planned(request(clip, max_frames=11))
    pieces, parts = list(engine.pieces(plan)), list(engine.parts(plan))
    assert [type(piece) for piece in pieces].count(Opening) == len(parts) == len(plan.chunks) == 3
    at = -1
    for piece in pieces:
        if isinstance(piece, Opening):
            at, count = at + 1, 0
            assert np.array_equal(piece.source, parts[at].source) and piece.seed == parts[at].seed
            continue
        assert isinstance(piece, Window) and piece.start == count
        count += len(piece.frames)
        assert np.array_equal(piece.frames, parts[at].frames[piece.start : count])
    # The first frame of a chunk is decoded alone; behind the first chunk it is one that the clip has already.
    assert [len(p.frames) for p in pieces if isinstance(p, Window)] == [1, 4, 4, 2]


def test_batches_and_strips_of_the_vae_give_the_same_frames(models: Path, clip: Path) -> None:
    asked = request(clip, edge={}, vis={}, depth={"control_path": str(clip)}, max_frames=CHUNK)

    def frames(plan: Plan) -> np.ndarray:
        return open_engine(models, "multi", plan=plan).generate(asked).frames

    usual = frames(Plan())
    for plan in (Plan(vae_encode_batch=2), Plan(vae_strips=3)):  # up to the order of sums
        found = frames(plan)
        assert np.abs(found.astype(int) - usual).max() <= 1 and (found == usual).mean() > 0.999


def test_latents_of_frames_that_are_dropped_are_not_decoded(
    models: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = open_engine(models, "edge")
    asked: list[int] = []
    decode = engine.vae.decode_stream
    monkeypatch.setattr(engine.vae, "decode_stream", lambda z, w: (asked.append(z.shape[2]), decode(z, w))[1])
    assert len(engine.generate(request(clip, max_frames=1)).frames) == 1
    assert len(engine.generate(request(clip, max_frames=6)).frames) == 6
    assert asked == [1, 2, 2]


def test_last_frames() -> None:
    x = np.arange(9)
    assert last_frames(None, x, 3).tolist() == [6, 7, 8] and last_frames(None, x[:2], 3).tolist() == [0, 1]
    assert last_frames(x[:4], x[4:6], 3).tolist() == [3, 4, 5] and len(last_frames(x, x, 0)) == 0


def test_controls_are_written_before_the_result_and_the_result_in_windows(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int, str]] = []
    write, finish = Writer.write, Writer.finish

    def told(self: Writer, frames: np.ndarray) -> None:
        written.append((self.path.stem, len(frames), threading.current_thread().name))
        write(self, frames)

    def ended(self: Writer) -> None:
        written.append((self.path.stem, 0, threading.current_thread().name))
        finish(self)

    monkeypatch.setattr(Writer, "write", told)
    monkeypatch.setattr(Writer, "finish", ended)
    run = generate(models, tmp_path / "out", write_spec(tmp_path, "a", clip, max_frames=9))
    assert run.code == 0, run.err
    by_thread = [row[:2] for row in written if row[2] == "writer"]
    assert by_thread == [
        ("a_control_edge", 5), ("a", 1), ("a", 4), ("a_control_edge", 4), ("a_control_edge", 0), ("a", 4),
    ]  # fmt: skip


# --- what the record says ---


def test_stages_count_what_the_caller_waits_for_and_what_goes_beside() -> None:
    stages = Stages(CPU)

    def slowly() -> Iterator[int]:
        for n in range(3):
            threading.Event().wait(0.02)
            yield n

    for _ in stages.through("decode", slowly()):
        with stages.waiting("write"):
            threading.Event().wait(0.01)
    with stages.beside("write"), stages.beside("inputs"):
        threading.Event().wait(0.03)
    record = stages.record()
    assert list(record) == ["decode", "write", "inputs"]
    assert 0.06 <= record["decode"]["seconds"] and record["decode"]["peak_bytes"] is None  # type: ignore[operator]
    assert 0.03 <= record["write"]["seconds"] and 0.03 <= record["write"]["beside_s"]  # type: ignore[operator]
    assert record["inputs"]["seconds"] == 0 and "beside_s" not in record["decode"]
    stages.reset()
    assert stages.record() == {}
