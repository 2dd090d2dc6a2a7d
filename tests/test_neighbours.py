"""Ranks of one host read a clip once: what all see is what each would have read, and whatever keeps one from reading reaches all."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import media
import numpy as np
import pytest
import ranks
import torch
from system import CHUNK, ROOT, clip_of, open_engine, request

from cosmos_fast import neighbours, reading
from cosmos_fast.clip_plan import ClipPlan
from cosmos_fast.controls import WORKERS
from cosmos_fast.formats import ClipError, EnvironmentProblem, GivenUp, MediaError
from cosmos_fast.inputs import ChunkInputs, ClipInputs
from cosmos_fast.neighbours import First, Neighbours, News, Other
from cosmos_fast.parallel import Mesh
from cosmos_fast.planning import preflight
from cosmos_fast.reading import Reader, Reading
from cosmos_fast.recipe import Plan
from cosmos_fast.rooms import SharedRooms, mapped
from cosmos_fast.stages import Stages
from cosmos_fast.video import Source

CPU = torch.device("cpu")
WAIT_S = 20.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 2 * CHUNK)


def planned(clip: Path, **fields: Any) -> ClipPlan:
    asked = {"edge": {}, "max_frames": 2 * CHUNK - 1} | fields
    return preflight([request(clip, **asked)], "multi", chunk_lengths=(CHUNK, 1)).clips[0]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- memory that others map ---


def test_memory_is_back_when_all_have_dropped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, made, new = SharedRooms(3), [], SharedRooms._new
    monkeypatch.setattr(SharedRooms, "_new", lambda self, size: (made.append(size), new(self, size))[1])
    room = rooms.take((4, 5), np.int16)
    room[:] = np.arange(20).reshape(4, 5)
    seen = [mapped(os.dup(rooms.hand_out(room, [user])), (4, 5), "<i2", user) for user in (0, 2)]
    room[1, 1] = 77  # one memory, not copies
    assert all(np.array_equal(other, room) and other.dtype == np.int16 for other in seen)
    del room
    rooms.take((4, 5), np.int16)[:] = 1
    assert len(made) == 2 and seen[0][1, 1] == seen[1][1, 1] == 77
    room = rooms.take((4, 5), np.int16)
    assert len(made) == 2  # the second, which nobody else maps
    other = mapped(os.dup(rooms.hand_out(room, [1])), (4, 5), "<i2", 1)
    part = other[1:]
    del room, other
    rooms.take((4, 5), np.int16)[:] = 2
    assert len(made) == 3 and (part == 1).all()  # a view counts
    room = rooms.take((4, 5), np.int16)
    other = mapped(os.dup(rooms.hand_out(room, [1])), (4, 5), "<i2", 1)
    del room, other
    rooms.take((4, 5), np.int16)
    assert len(made) == 3


def test_files_of_memory_go_with_it() -> None:
    before = descriptors()
    rooms = SharedRooms(1)
    for size in range(1, 40):  # no two of one size: what is back is given up
        rooms.take((size, 4096), np.uint8)[:] = 1
    assert descriptors() <= before + 4
    kept = rooms.take((3, 3), np.float32)
    other = mapped(os.dup(rooms.hand_out(kept, [0])), (3, 3), "<f4", 0)
    del rooms
    gc.collect()
    kept[:] = 5
    assert (other == 5).all()
    del kept, other
    gc.collect()
    assert descriptors() == before


# --- one who tells and two who listen, in this process ---


def linked(count: int) -> tuple[First, list[Other]]:
    world: Any = SimpleNamespace(rank=0, tell=lambda value: value)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    for pair in pairs:
        pair[1].settimeout(WAIT_S)
    first = First(world, (), SharedRooms(count), {user: pair[0] for user, pair in enumerate(pairs)})
    return first, [Other(world, (), pair[1], user) for user, pair in enumerate(pairs)]


def never() -> ClipInputs:
    raise AssertionError("a rank that listens opened files")


def telling(first: First, plan: ClipPlan) -> Reader:
    return Reader(lambda: ClipInputs(plan, rooms=first.rooms), plan.chunks, Stages(CPU), first)


def hearing(other: Other, plan: ClipPlan) -> Reader:
    return Reader(never, plan.chunks, Stages(CPU), other)


def same(here: Iterable[Reading], there: Iterable[Reading]) -> bool:
    pairs = [(own.whole(), heard.whole()) for own, heard in zip(here, there, strict=True)]
    return all(np.array_equal(own.frames, heard.frames) for own, heard in pairs)


def is_heard_whole(first: First, other: Other, plan: ClipPlan) -> bool:
    with telling(first, plan) as here, hearing(other, plan) as there:
        return same(here, there)


def test_who_listens_sees_what_was_read(clip: Path, tmp_path: Path) -> None:
    mask = np.zeros((2 * CHUNK, 64, 64, 3), np.uint8)
    mask[:, :, 32:] = 255
    half = str(media.write(tmp_path / "half.mkv", mask, codec="ffv1", pix_fmt="bgr0"))
    dark = str(media.write(tmp_path / "dark.mkv", 0 * mask, codec="ffv1", pix_fmt="bgr0"))
    plan = planned(
        clip, edge={"mask_path": half}, depth={"control_path": dark}, vis={}, guided_generation_mask=half
    )  # fmt: skip
    with ClipInputs(plan) as inputs:
        expected = [inputs.read(chunk) for chunk in plan.chunks]
    first, others = linked(2)
    for _ in range(2):  # clips
        with ExitStack() as stack:
            readers = [telling(first, plan), *(hearing(other, plan) for other in others)]
            for reader in readers:
                stack.enter_context(reader)
            for wanted, *each in zip(expected, *readers, strict=True):
                for one in each:
                    assert np.array_equal(one.frames(1, 3), wanted.frames[1:3])
                    assert np.array_equal(one.control("vis", 0, 2), wanted.controls["vis"][:2])
                    lit = {name: one.is_lit(name) for name in ("edge", "depth", "vis", "seg")}
                    assert lit == {"edge": True, "depth": False, "vis": True, "seg": False}
                    given = one.whole()
                    assert isinstance(given, ChunkInputs) and given.controls.keys() == wanted.controls.keys()
                    for name, control in wanted.controls.items():
                        assert np.array_equal(given.controls[name], control)
                    assert np.array_equal(given.masks["edge"], wanted.masks["edge"])
                    assert np.array_equal(given.guided, wanted.guided)  # type: ignore[arg-type]


def test_a_chunk_that_one_rank_keeps_is_not_written_over(clip: Path) -> None:
    plan = planned(clip)
    first, others = linked(2)
    with ClipInputs(plan) as inputs:
        expected = inputs.read(plan.chunks[0]).frames.copy()
    kept = []
    for turn in range(3):
        with (
            telling(first, plan) as here,
            hearing(others[0], plan) as keeps,
            hearing(others[1], plan) as there,
        ):
            for reader in (here, keeps, there):
                wholes = [one.whole() for one in reader]
                if turn == 0 and reader is keeps:
                    kept.append(wholes[0].frames[2:])
                del wholes
        assert np.array_equal(kept[0], expected[2:])


def test_clips_read_at_once_do_not_mix(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is left in its middle, and ends when the second has begun; a third is read beside the second."""
    monkeypatch.setattr(reading, "WINDOW", 1)
    plan, short = planned(clip), planned(clip, vis={}, max_frames=CHUNK)
    first, (other,) = linked(1)
    with ExitStack() as left:
        old = telling(first, plan), hearing(other, plan)
        for reader in old:
            left.enter_context(reader)
        assert same([next(iter(old[0]))], [next(iter(old[1]))])
        begun = telling(first, short), hearing(other, short)
    with begun[0], begun[1], telling(first, plan) as here, hearing(other, plan) as there:
        assert same(here, there) and same(*begun)


def test_a_rank_that_never_came_to_a_clip_hears_of_the_next(clip: Path) -> None:
    plan = planned(clip)
    first, (other,) = linked(1)
    with telling(first, plan) as here:
        next(iter(here)).whole()
    other._clip += 1
    assert is_heard_whole(first, other, plan)


def test_what_keeps_a_chunk_from_being_read_reaches_all(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MediaError):
        pass

    read = Source.read
    plan = planned(clip)
    first, (other,) = linked(1)
    for fault, wanted, match in (
        (MediaError("the file ends early"), MediaError, "^the file ends early$"),
        (KeyError("x"), ClipError, "^rank 0: KeyError: 'x'$"),
        (MediaError("long " * 10**5), MediaError, "^long "),
        (Own("of a class that no other process has"), MediaError, "^of a class"),
    ):

        def fail(
            self: Source, start: int, stop: int, out: Any = None, fault: Exception = fault
        ) -> np.ndarray:
            if stop > CHUNK:
                raise fault
            return read(self, start, stop, out)

        monkeypatch.setattr(Source, "read", fail)
        with telling(first, plan) as here, hearing(other, plan) as there:
            own, heard = iter(here), iter(there)
            assert same([next(own)], [next(heard)])
            with pytest.raises(type(fault)):
                next(own).whole()
            with pytest.raises(wanted, match=match):
                next(heard).whole()
    monkeypatch.setattr(Source, "read", read)
    assert is_heard_whole(first, other, plan)


def test_files_that_cannot_be_opened_reach_all(clip: Path) -> None:
    plan = planned(clip)
    first, (other,) = linked(1)

    def gone() -> ClipInputs:
        raise EnvironmentProblem("disk: is gone")

    with Reader(gone, plan.chunks, Stages(CPU), first) as here, hearing(other, plan) as there:
        for reader in (here, there):
            with pytest.raises(EnvironmentProblem, match="disk: is gone"):
                next(iter(reader)).whole()


def test_who_waits_hears_that_the_clip_was_given_up(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 1)
    plan, held = planned(clip), threading.Event()
    first, (other,) = linked(1)
    read = Source.read

    def slow(self: Source, start: int, stop: int, out: Any = None) -> np.ndarray:
        if stop > 1:
            held.wait(WAIT_S)
        return read(self, start, stop, out)

    monkeypatch.setattr(Source, "read", slow)
    left = telling(first, plan)
    with hearing(other, plan) as there:
        heard = next(iter(there))

        def give_up() -> None:
            with pytest.raises(KeyError), left:
                heard.frames(0, 1)
                threading.Timer(0.1, held.set).start()
                raise KeyError

        thread = threading.Thread(target=give_up)
        thread.start()
        with pytest.raises(GivenUp, match="must go on to its end, it gave up or is gone"):
            heard.whole()
        thread.join(WAIT_S)
    monkeypatch.setattr(Source, "read", read)
    assert is_heard_whole(first, other, plan)


def test_who_stops_listening_does_not_wait_for_more(clip: Path) -> None:
    plan = planned(clip)
    first, (other,) = linked(1)
    first.begin()
    start = time.monotonic()
    with pytest.raises(KeyError), hearing(other, plan):
        raise KeyError
    assert time.monotonic() - start < WAIT_S / 4


def test_a_rank_that_is_gone_ends_the_next_clip(clip: Path) -> None:
    first, (other,) = linked(1)
    for end in first._others.values():
        end.close()
    with pytest.raises(GivenUp):
        hearing(other, planned(clip))


def test_ranks_that_are_gone_or_leave_a_clip_keep_nobody(clip: Path) -> None:
    plan = planned(clip)
    first, (gone, leaves, well) = linked(3)
    gone._first.close()
    with telling(first, plan) as here, hearing(well, plan) as there:
        with pytest.raises(KeyError), hearing(leaves, plan):
            raise KeyError
        assert same(here, there)
    with telling(first, plan) as here, hearing(leaves, plan) as there, hearing(well, plan) as other:
        assert same(here, there)
        assert other._channel is not there._channel


def test_a_rank_that_is_late_misses_nothing() -> None:
    """More messages than its socket holds wait for it, and so does who reads."""
    first, (other,) = linked(1)
    channel, there, stop = first.begin(), other.begin(), threading.Event()
    news, held = [News((), (), n, n) for n in range(1, 400)], []

    def read(tell: Any) -> None:
        for item in news:
            tell(item)

    thread = threading.Thread(target=channel.carry, args=(0, read, lambda item: False, stop))
    thread.start()
    thread.join(2 * neighbours.POLL_S)
    assert thread.is_alive()
    there.carry(0, never, lambda item: held.append(item) or len(held) == len(news), stop)
    thread.join(WAIT_S)
    assert held == news and not thread.is_alive()
    thread = threading.Thread(target=channel.carry, args=(1, read, lambda item: False, stop))
    thread.start()
    stop.set()  # who gives up reading does not wait for it; it hears no later news without those between
    thread.join(WAIT_S)
    assert not thread.is_alive()
    held.clear()
    there.carry(1, never, lambda item: held.append(item) or isinstance(item, GivenUp), threading.Event())
    assert 0 < len(held) < len(news) and held[:-1] == news[: len(held) - 1]


def test_what_cannot_be_mapped_costs_the_clip_and_no_files(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(clip, max_frames=CHUNK, vis={})
    first, (other,) = linked(1)
    assert is_heard_whole(first, other, plan)
    gc.collect()
    before = descriptors()

    def full(*_: Any) -> np.ndarray:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(neighbours, "mapped", full)
    for _ in range(3):
        with telling(first, plan) as here, hearing(other, plan) as there:
            next(iter(here)).whole()
            with pytest.raises(OSError, match="Cannot allocate"):
                next(iter(there)).whole()
    gc.collect()
    assert descriptors() <= before + 3  # `full` closed none of those it was given
    monkeypatch.undo()
    monkeypatch.setattr(neighbours, "MESSAGE_FILES", 1)  # as where this process may have no more
    with telling(first, plan) as here, hearing(other, plan) as there:
        next(iter(here)).whole()
        with pytest.raises(EnvironmentProblem, match="ulimit"):
            next(iter(there)).whole()


def test_nothing_is_left_of_clips_and_of_an_engine(clip: Path) -> None:
    plan = planned(clip, max_frames=CHUNK)
    gc.collect()
    before, threads, after = descriptors(), threading.active_count(), []
    first, (other,) = linked(1)
    for _ in range(4):
        assert is_heard_whole(first, other, plan)
        gc.collect()
        after.append(descriptors())
    assert len(set(after)) == 1
    gone = weakref.ref(first.rooms)
    del first, other
    gc.collect()
    assert gone() is None and descriptors() == before and threading.active_count() <= threads + WORKERS


def test_a_message_of_the_most_arrays_fits() -> None:
    first, (other,) = linked(1)
    names = ("edge", "vis", "depth", "seg")
    take = first.rooms.take
    given = ChunkInputs(
        take((2, 2, 2, 3), np.uint8), {n: take((2, 2, 2, 3), np.uint8) for n in names},
        {n: take((2, 2, 2), np.bool_) for n in names}, take((2, 2, 2), np.float32),
    )  # fmt: skip
    stop, held = threading.Event(), []
    channel, there = first.begin(), other.begin()
    news = News(names, names, 93, 93, 93)
    channel.carry(0, lambda tell: (tell(given), tell(news)), lambda item: False, stop)  # type: ignore[arg-type, return-value]
    there.carry(0, never, lambda item: held.append(item) or item == news, stop)  # type: ignore[arg-type, func-returns-value]
    assert held[0].guided.dtype == np.float32 and held[0].masks.keys() == set(names) and held[1] == news


# --- ranks ---


def read_by_ranks(video: Path, bad_door: str | None) -> tuple[str, tuple[str, ...], int, list[int]]:
    """What this rank is, its notes, how many files it opened, sums of the frames of every chunk."""
    opened: list[int] = []
    rewind = Source._rewind
    Source._rewind = lambda self: (opened.append(1), rewind(self))[1]  # type: ignore[method-assign]
    size = int(os.environ["WORLD_SIZE"])
    mesh = Mesh.open(Plan(device="cpu", context=size), timeout_s=60)
    if bad_door == "closed":
        neighbours._opened = lambda: (None, "sockets must open, got none")  # type: ignore[assignment]
    if bad_door == "foreign" and mesh.ranks.rank == 1:
        neighbours._is_ours = lambda other: False  # type: ignore[assignment]
    if bad_door == "memory" and mesh.ranks.rank == 1:  # files arrive, but may not be mapped
        neighbours.mapped = lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied"))  # type: ignore[assignment]
    if bad_door == "hosts":  # of two ranks each, the last of what is left
        neighbours.host_name = lambda: f"host {mesh.ranks.rank // 2}"  # type: ignore[assignment]
    met = neighbours.meet(mesh.world)
    plan, sums = planned(video), []
    for _ in range(2):
        with Reader(lambda: ClipInputs(plan, rooms=met.rooms), plan.chunks, Stages(CPU), met) as reader:
            sums += [int(one.whole().frames.astype(np.int64).sum()) for one in reader]
        mesh.world.hear(None)
    mesh.close()
    return type(met).__name__, met.notes, len(opened), sums


@pytest.mark.parametrize(
    "size, bad_door, kinds, files, note",
    [
        (3, None, ["First", "Other", "Other"], [2, 0, 0], None),
        (2, "closed", ["Neighbours", "Neighbours"], [2, 2], "reading: rank 1 reads for itself: sockets must open, got none."),
        (3, "foreign", ["First", "Neighbours", "Other"], [2, 2, 0], "reading: rank 1 .* same user, got another"),
        (3, "memory", ["First", "Neighbours", "Other"], [2, 2, 0], "reading: rank 1 .* process to process, got PermissionError"),
        (4, "hosts", ["First", "Other"] * 2, [2, 0, 2, 0], None),
        (3, "hosts", ["First", "Other", "Neighbours"], [2, 0, 2], None),
    ],
)  # fmt: skip
def test_ranks_of_one_host_read_once(
    clip: Path, size: int, bad_door: str | None, kinds: list[str], files: list[int], note: str | None
) -> None:
    found = ranks.run(size, read_by_ranks, clip, bad_door)
    assert [kind for kind, *_ in found] == kinds and [opened for _, _, opened, _ in found] == files
    assert len({tuple(sums) for *_, sums in found}) == 1 and len(found[0][3]) == 4
    for _, notes, *_ in found:
        if note is None:
            assert notes == ()
        else:
            assert any(re.match(note, told) for told in notes), notes


def test_one_rank_shares_with_nobody(models: Path) -> None:
    assert type(open_engine(models, "edge")._neighbours) is Neighbours


def test_the_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "reading.json"
    command = [sys.executable, str(ROOT / "tools" / "bench_reading.py"), "--out", str(out), "--smoke"]
    done = subprocess.run([*command, "--ranks", "2", "--rounds", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    own, shared = (json.loads(out.read_text())["ranks"]["2"][way] for way in ("own", "shared"))
    assert len(own["rounds"]) == len(shared["rounds"]) == 2
    assert 0 < shared["first_window_s"] <= shared["seconds"] and 0 < own["cpu_s"]
