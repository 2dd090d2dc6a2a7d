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
from cosmos_fast.formats import ClipError, EnvironmentProblem, MediaError
from cosmos_fast.inputs import ChunkInputs, ClipInputs
from cosmos_fast.neighbours import Alone, Listener, News, Teller
from cosmos_fast.parallel import Mesh
from cosmos_fast.planning import preflight
from cosmos_fast.reading import Reader
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


def linked(count: int) -> tuple[Teller, list[Listener]]:
    world: Any = SimpleNamespace(rank=0, tell=lambda value: value)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    for here, there in pairs:
        here.settimeout(neighbours.SEND_S)
        there.settimeout(0.02)
    teller = Teller(world, (), {user: pair[0] for user, pair in enumerate(pairs)}, count)
    return teller, [Listener(world, (), pair[1], user) for user, pair in enumerate(pairs)]


def never() -> ClipInputs:
    raise AssertionError("a rank that listens opened files")


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
    teller, listeners = linked(2)
    for _ in range(2):  # clips
        readers = [
            Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller),
            *(Reader(never, plan.chunks, Stages(CPU), listener) for listener in listeners),
        ]
        for number, each in enumerate(zip(*readers, strict=True)):
            wanted = expected[number]
            for one in each:
                assert np.array_equal(one.frames(1, 3), wanted.frames[1:3])
                assert np.array_equal(one.control("vis", 0, 2), wanted.controls["vis"][:2])
                assert [one.is_lit(name) for name in ("edge", "depth", "vis", "seg")] == [
                    True,
                    False,
                    True,
                    False,
                ]
                given = one.whole()
                assert isinstance(given, ChunkInputs) and given.controls.keys() == wanted.controls.keys()
                for name, control in wanted.controls.items():
                    assert np.array_equal(given.controls[name], control)
                assert np.array_equal(given.masks["edge"], wanted.masks["edge"])
                assert np.array_equal(given.guided, wanted.guided)  # type: ignore[arg-type]
        for reader in readers:
            reader.__exit__(None, None, None)


def test_a_chunk_that_one_listener_keeps_is_not_written_over(clip: Path) -> None:
    plan = planned(clip)
    teller, (first, second) = linked(2)
    with ClipInputs(plan) as inputs:
        expected = inputs.read(plan.chunks[0]).frames.copy()
    kept = []
    for turn in range(3):
        readers = [
            Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller),
            *(Reader(never, plan.chunks, Stages(CPU), listener) for listener in (first, second)),
        ]
        for reader in readers:
            wholes = [one.whole() for one in reader]
            if turn == 0 and reader is readers[1]:
                kept.append(wholes[0].frames[2:])
            del wholes
        for reader in readers:
            reader.__exit__(None, None, None)
        assert np.array_equal(kept[0], expected[2:])


def test_what_keeps_a_chunk_from_being_read_reaches_all(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(MediaError):
        pass

    read = Source.read
    plan = planned(clip)
    teller, (listener,) = linked(1)
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
        with (
            Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller) as here,
            Reader(never, plan.chunks, Stages(CPU), listener) as there,
        ):
            own, heard = iter(here), iter(there)
            assert np.array_equal(next(own).whole().frames, next(heard).whole().frames)
            with pytest.raises(type(fault)):
                next(own).whole()
            with pytest.raises(wanted, match=match):
                next(heard).whole()
    monkeypatch.setattr(Source, "read", read)
    with (  # what the failed clips left in the socket is passed over
        Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller) as here,
        Reader(never, plan.chunks, Stages(CPU), listener) as there,
    ):
        for own_chunk, heard_chunk in zip(here, there, strict=True):
            assert np.array_equal(own_chunk.whole().frames, heard_chunk.whole().frames)


def test_files_that_cannot_be_opened_reach_all(clip: Path) -> None:
    plan = planned(clip)
    teller, (listener,) = linked(1)

    def gone() -> ClipInputs:
        raise EnvironmentProblem("disk: is gone")

    with (
        Reader(gone, plan.chunks, Stages(CPU), teller) as here,
        Reader(never, plan.chunks, Stages(CPU), listener) as there,
    ):
        for reader in (here, there):
            with pytest.raises(EnvironmentProblem, match="disk: is gone"):
                next(iter(reader)).whole()


def test_who_waits_hears_that_the_clip_was_given_up(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 1)
    plan, held = planned(clip), threading.Event()
    teller, (listener,) = linked(1)
    read = Source.read

    def slow(self: Source, start: int, stop: int, out: Any = None) -> np.ndarray:
        if stop > 1:
            held.wait(WAIT_S)
        return read(self, start, stop, out)

    monkeypatch.setattr(Source, "read", slow)
    with Reader(never, plan.chunks, Stages(CPU), listener) as there:
        heard = next(iter(there))

        def give_up() -> None:
            with pytest.raises(KeyError), Reader(
                lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller
            ):  # fmt: skip
                heard.frames(0, 1)
                threading.Timer(0.1, held.set).start()
                raise KeyError

        thread = threading.Thread(target=give_up)
        thread.start()
        with pytest.raises(ClipError, match="rank 0 must go on to the end, it gave up"):
            heard.whole()
        thread.join(WAIT_S)
    monkeypatch.setattr(Source, "read", read)
    with (
        Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller) as here,
        Reader(never, plan.chunks, Stages(CPU), listener) as there,
    ):
        assert np.array_equal(next(iter(here)).whole().frames, next(iter(there)).whole().frames)


def test_who_stops_listening_does_not_wait_for_more(clip: Path) -> None:
    plan = planned(clip)
    _, (listener,) = linked(1)
    start = time.monotonic()
    with pytest.raises(KeyError), Reader(never, plan.chunks, Stages(CPU), listener):
        raise KeyError
    assert time.monotonic() - start < WAIT_S / 4


def test_a_reader_that_is_gone_ends_the_clip(clip: Path) -> None:
    plan = planned(clip)
    teller, (listener,) = linked(1)
    for other in teller._others.values():
        other.close()
    with Reader(never, plan.chunks, Stages(CPU), listener) as there:
        with pytest.raises(ClipError, match="must live to its end, it is gone"):
            next(iter(there)).whole()


def test_a_listener_that_is_gone_or_stuck_keeps_nobody(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(clip)
    teller, (gone, stuck, well) = linked(3)
    gone._first.close()
    teller._others[1].settimeout(0.05)
    try:
        while True:
            teller._others[1].send(b"x" * 60000)
    except TimeoutError:
        pass
    with (
        Reader(lambda: ClipInputs(plan, rooms=teller.rooms), plan.chunks, Stages(CPU), teller) as here,
        Reader(never, plan.chunks, Stages(CPU), well) as there,
    ):
        for own, heard in zip(here, there, strict=True):
            assert np.array_equal(own.whole().frames, heard.whole().frames)
    assert list(teller._others) == [2]


def test_a_message_of_the_most_arrays_fits() -> None:
    teller, (listener,) = linked(1)
    names = ("edge", "vis", "depth", "seg")
    take = teller.rooms.take
    given = ChunkInputs(
        take((2, 2, 2, 3), np.uint8), {n: take((2, 2, 2, 3), np.uint8) for n in names},
        {n: take((2, 2, 2), np.bool_) for n in names}, take((2, 2, 2), np.float32),
    )  # fmt: skip
    teller._tell(0, given)
    teller._tell(0, News(names, names, 93, 93, 93))
    heard = listener._hear()
    assert heard is not None and isinstance(heard[2], ChunkInputs) and heard[2].guided.dtype == np.float32
    assert listener._hear() == (0, 0, News(names, names, 93, 93, 93)) and listener._hear() is None


# --- ranks ---


def read_by_ranks(video: Path, bad_door: str | None) -> tuple[str, tuple[str, ...], int, list[int]]:
    """What this rank is, its notes, how many files it opened, sums of the frames of every chunk."""
    opened: list[int] = []
    rewind = Source._rewind
    Source._rewind = lambda self: (opened.append(1), rewind(self))[1]  # type: ignore[method-assign]
    size = int(os.environ["WORLD_SIZE"])
    mesh = Mesh.open(Plan(device="cpu", context=size), timeout_s=60)
    if bad_door == "closed":
        neighbours._door = lambda: (None, "sockets must open, got none")  # type: ignore[assignment]
    if bad_door == "foreign" and mesh.ranks.rank == 1:
        neighbours._is_ours = lambda other: False  # type: ignore[assignment]
    if bad_door == "hosts":  # two hosts of two ranks
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
        (3, None, ["Teller", "Listener", "Listener"], [2, 0, 0], None),
        (2, "closed", ["Alone", "Alone"], [2, 2], "reading: rank 1 reads for itself: sockets must open, got none."),
        (3, "foreign", ["Teller", "Alone", "Listener"], [2, 2, 0], "reading: rank 1 .* same user, got another"),
        (4, "hosts", ["Teller", "Listener"] * 2, [2, 0, 2, 0], None),
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
    assert type(open_engine(models, "edge")._neighbours) is Alone


def test_the_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "reading.json"
    command = [sys.executable, str(ROOT / "tools" / "bench_reading.py"), "--out", str(out), "--smoke"]
    done = subprocess.run([*command, "--ranks", "2", "--rounds", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    own, shared = (json.loads(out.read_text())["ranks"]["2"][way] for way in ("own", "shared"))
    assert len(own["rounds"]) == len(shared["rounds"]) == 2
    assert 0 < shared["first_window_s"] <= shared["seconds"] and 0 < own["cpu_s"]
