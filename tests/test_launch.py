"""How ranks share clips, what is refused, and that many processes make what one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from system import ENV, ROOT, clip_of, digests, generate, generate_arguments, leftovers, write_spec
from torch.distributed import HashStore

from cosmos_fast import dispatch
from cosmos_fast.formats import DISTILLED, EnvironmentProblem, SpecError
from cosmos_fast.layout import Layout, choose
from cosmos_fast.parallel import Ranks
from cosmos_fast.solo import Solo
from cosmos_fast.team import Elsewhere, Team
from cosmos_fast.team_store import LEFT, PIECE_BYTES, Pulse, put, take

IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


def clips(count: int, guided: bool = True, model: str = "edge") -> list[Any]:
    prompts = {"prompt": "", "negative_prompt": ""} if guided else {"prompt": ""}
    return [
        SimpleNamespace(
            name=f"clip{i}", model=model, prompts=prompts, spec=SimpleNamespace(guidance=3.0 if guided else 0.0),
            tflop={"total": float(i)},
        )
        for i in range(count)
    ]  # fmt: skip


# --- layouts ---


@pytest.mark.parametrize(
    "ranks, count, context, cfg, expected",
    [
        (1, 1, None, None, (1, 1, 1)),
        (2, 1, None, None, (1, 1, 2)),
        (8, 1, None, None, (1, 4, 2)),
        (3, 1, None, None, (1, 3, 1)),
        (8, 100, None, None, (8, 1, 1)),
        (8, 3, None, None, (2, 2, 2)),
        (8, 1, 4, None, (1, 4, 2)),
        (8, 100, 4, None, (2, 4, 1)),
        (8, 1, 8, None, (1, 8, 1)),
        (8, 1, None, 1, (1, 8, 1)),
        (8, 100, None, 2, (4, 1, 2)),
        (64, 1, None, None, (2, 16, 2)),
    ],
)
def test_layouts(
    ranks: int, count: int, context: int | None, cfg: int | None, expected: tuple[int, int, int]
) -> None:
    layout = choose(ranks, clips(count), context, cfg)
    assert (layout.groups, layout.context, layout.cfg) == expected and layout.ranks == ranks
    members = [rank for group in range(layout.groups) for rank in layout.members(group)]
    assert members == list(range(ranks))


def test_clips_without_guidance_share_tokens() -> None:
    assert choose(8, clips(1, guided=False)) == Layout(1, 8, 1)
    assert choose(2, clips(1) + clips(1, guided=False)) == Layout(2, 1, 1)


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="gpus: must be a multiple of context \\* cfg, got 3 for 2 \\* 1"):
        choose(3, clips(1), context=2)
    with pytest.raises(SpecError, match="cfg: must be 1 or 2"):
        choose(3, clips(1), cfg=3)
    for model, guided, what in ((DISTILLED, False, f"model {DISTILLED}"), ("edge", False, "guidance 0")):
        with pytest.raises(SpecError) as caught:
            choose(2, clips(2, guided, model), cfg=2)
        assert len(caught.value.problems) == 2 and all(what in problem for problem in caught.value.problems)


# --- the store ---


def test_a_value_of_any_size_comes_back() -> None:
    store, value = HashStore(), os.urandom(2 * PIECE_BYTES + 1)
    put(store, "k", {"v": value})
    assert take(store, "k") == {"v": value} and int(store.get("k")) == 3


def test_a_rank_is_silent_from_its_last_sign_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    pulse = Pulse(store)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert pulse.silent_s(1) == 0.0
    store.set("beat/1", "1 network.py:5")
    assert pulse.silent_s(1) == 0.0
    now[0] += 9
    assert pulse.silent_s(1) == 9.0 and pulse.place(1) == "network.py:5"
    store.set("beat/1", "2 network.py:6")
    assert pulse.silent_s(1) == 0.0
    now[0] += 9
    store.set("beat/1", LEFT)
    assert pulse.silent_s(1) == 0.0


def teams(layout: Layout) -> list[Team]:
    store = HashStore()
    store.set("supervisor", str(os.getppid()))
    found = [Team(store, Ranks(rank, layout.ranks, rank)) for rank in range(layout.ranks)]
    for team in found:
        team._closed.set()  # no watching threads in a test's own process
        team.enter(layout)
    return found


def test_groups_take_the_longest_first_and_each_clip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "0")  # `enter` changes them
    first, second = teams(Layout(2))
    batch = clips(3) + clips(2, model="depth")
    one, two = first.order(batch), second.order(batch)
    taken = [next(one), next(two), next(two), next(one), *one, *two]
    assert [(clip.model, clip.name) for clip in taken] == [
        ("edge", "clip2"), ("edge", "clip1"), ("edge", "clip0"), ("depth", "clip1"), ("depth", "clip0"),
    ]  # fmt: skip
    assert [clip.name for clip in Solo().order(clips(2))] == ["clip0", "clip1"]


def test_what_one_rank_finds_wrong_all_end_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "0")
    first, second = teams(Layout(2))

    def wrong() -> None:
        raise SpecError("guidance: must be less")

    with pytest.raises(SpecError):
        first.share("batch", wrong)
    with pytest.raises(Elsewhere):
        second.share("batch", wrong)
    assert first.share("sizes", lambda: 7) == 7 and second.share("sizes", wrong) == 7


# --- the command ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 5)


def test_what_cannot_be_shared_is_refused_before_the_start(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_spec(tmp_path, "a", clip, **IMAGE)
    free = write_spec(tmp_path, "free", clip, **IMAGE, guidance=0)
    out = tmp_path / "out"
    table: list[tuple[list[Any], int, str]] = [
        ([spec, "--gpus", "2", "--cfg", "2", "--model", DISTILLED], 2, "cfg: must be 1 where there is no guidance"),
        ([spec, free, "--gpus", "2", "--cfg", "2"], 2, "free: cfg: must be 1 where there is no guidance, got 2 for guidance 0"),
        ([spec, "--gpus", "3", "--context", "2"], 2, "gpus: must be a multiple"),
        ([spec, "--gpus", "2", "--graphs"], 2, "graphs"),
        ([spec, "--gpus", "0"], 2, "--gpus"),
        ([spec, "--gpus", "2", "--exchange", "nccl"], 2, "exchange"),
    ]  # fmt: skip
    for arguments, code, message in table:
        run = generate(models, out, *arguments)
        assert run.code == code and message in run.err and not out.exists(), run
    if not dispatch.torch.cuda.is_available():
        run = generate(models, out, spec, "--gpus", "2", "--device", "cuda")
        assert run.code == 3 and "gpus: must be at most the GPUs of this machine, got 2" in run.err
    run = generate(models, out, spec, free, "--gpus", "4", "--dry-run")
    assert run.code == 0 and "4 ranks: 2 clips at once, each on context=2 x cfg=1, exchange auto" in run.out


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_fast.cli_parallel import open_layout

    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.torch.cuda, "device_count", lambda: 2)
    options = {"gpus": 4, "context": None, "cfg": None, "device": None}
    batch: Any = SimpleNamespace(clips=clips(1))
    with pytest.raises(
        EnvironmentProblem, match="must be at most the GPUs of this machine, got 4. .* 2 CUDA devices"
    ):
        open_layout(options, Solo(), batch)
    assert open_layout(options | {"gpus": 2}, Solo(), batch) == Layout(1, 1, 2)
    with pytest.raises(SpecError, match="device: must be cuda or cpu"):
        open_layout(options | {"gpus": 2, "device": "cuda:1"}, Solo(), batch)


def test_a_batch_over_two_ranks_is_the_batch_of_one(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    specs = [write_spec(tmp_path, name, clip, **IMAGE, seed=i, num_steps=2) for i, name in enumerate("abcd")]
    one, two = tmp_path / "one", tmp_path / "two"
    assert generate(models, one, *specs).code == 0
    (two / "b.jpg").mkdir(parents=True)  # this clip cannot be written
    run = generate(models, two, *specs, "--gpus", "2")
    assert run.code == 1 and run.paths == [two / f"{name}.jpg" for name in "acd"], run
    (two / "b.jpg").rmdir()
    again = generate(models, two, *specs, "--resume")
    assert again.code == 0 and sorted(again.paths) == [two / f"{name}.jpg" for name in "abcd"], again
    assert digests(two) == digests(one) and leftovers(two) == []
    lines = [json.loads(line) for line in (two / "manifest.jsonl").read_text().splitlines()]
    assert sorted((line["name"], line["status"]) for line in lines) == [
        ("a", "done"), ("b", "done"), ("b", "failed"), ("c", "done"), ("d", "done"),
    ]  # fmt: skip


def test_ranks_take_the_exchange_of_the_command(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = write_spec(tmp_path, "a", clip, **IMAGE, num_steps=1)
    run = generate(
        models, tmp_path / "out", spec, "--gpus", "2", "--context", "2", "--cfg", "1", "--exchange", "copies"
    )
    assert run.code == 3 and "error: exchange: copies need GPUs, got cpu, on rank 0." in run.err, run


def test_the_same_command_under_torchrun(models: Path, clip: Path, tmp_path: Path) -> None:
    spec, one, two = write_spec(tmp_path, "a", clip, **IMAGE, num_steps=2), tmp_path / "one", tmp_path / "two"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "cosmos_fast.cli",
    ]
    environment = ENV | {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else ENV
    done = subprocess.run(
        [*torchrun, *generate_arguments(models, two, spec)], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(two / "a.jpg")]
    assert generate(models, one, spec).code == 0 and digests(one) == digests(two)
