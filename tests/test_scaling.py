"""The arithmetic of tools/scaling.py, and what a trace says of exchanges that are hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import bench_rank  # noqa: E402
import report  # noqa: E402
import report_scaling  # noqa: E402
import scaling  # noqa: E402
import scaling_ranks  # noqa: E402
import scaling_trace  # noqa: E402
from scaling import Rates, clip_s, exchange_bytes, exchange_s, send_s, step  # noqa: E402

from cosmos_fast import peer_memory  # noqa: E402

RATES = Rates(
    attention_s=2.7,
    product_s=0.45,
    pointwise_s=0.07,
    gaps_s=0.002,
    pair_s=6.26,
    encode_s=2.0,
    decode_s=4.0,
    read_s=0.6,
    fixed_s=1.0,
)


def test_bytes_of_an_exchange() -> None:
    assert exchange_bytes(1) == (0, 0)
    assert sum(exchange_bytes(2)) == 84480 * 2048 * 2  # half of q, k, v and the result of half of the tokens
    assert round(sum(exchange_bytes(8)) / 1e6) == 151
    for context in (2, 8):
        (wide, back), (codes, back8) = exchange_bytes(context), exchange_bytes(context, 1)
        assert (codes, back8) == (wide / 2, back / 2)


def test_sending_is_as_slow_as_the_slower_of_both_ways() -> None:
    rates = Rates(1, 1, 1, 0, 6, link=100, network=10)
    assert send_s(7e9, 0, 0, rates) == 0.0
    assert send_s(7e9, 7, 7, rates) == pytest.approx(0.07)
    assert send_s(15e9, 15, 7, rates) == pytest.approx(0.8)  # eight of fifteen parts leave the host


def test_an_exchange_hides_under_the_attention_of_another_part() -> None:
    whole = sum(exchange_bytes(2)) / (RATES.link * 1e9)
    hidden, exposed = exchange_s(2, RATES)
    assert hidden == pytest.approx(3 * whole / 4) and exposed == pytest.approx(whole / 4)
    assert exchange_s(2, RATES) == exchange_s(2, RATES, parts=4)
    assert exchange_s(8, RATES) == exchange_s(8, RATES, parts=2)  # a rank has two heads
    assert exchange_s(2, RATES, parts=1) == (0.0, pytest.approx(whole))
    # On a link so slow that attention ends first, only the attention of one part is there to hide under.
    slow = Rates(2.7, 0.45, 0.07, 0.002, 6.26, link=1)
    hidden, exposed = exchange_s(2, slow, parts=2)
    assert hidden == pytest.approx(2.7 / 32 / 2 / 2)
    assert hidden + exposed == pytest.approx(sum(exchange_bytes(2)) / 1e9)
    assert exchange_s(1, RATES) == (0.0, 0.0)


def test_codes_move_half_of_the_bytes_and_wait_for_their_means() -> None:
    rates = RATES.in_8_bits({"attention": 0.7, "gemm": 0.53, "pointwise": 2.2})
    assert rates.call_s < RATES.call_s and rates.pair_s / RATES.pair_s == pytest.approx(
        rates.call_s / RATES.call_s
    )
    for context in (2, 4, 8):
        (wide, narrow) = (sum(exchange_s(context, r)) for r in (RATES, rates))
        means = 48 * 2048 * (context - 1) / (rates.link * 1e9)
        assert narrow == pytest.approx(wide / 2 + means)
        assert exchange_s(context, rates)[1] > exchange_s(context, RATES)[1] / 2
    assert step(2, 1, rates).total_s < step(2, 1, RATES).total_s


def test_a_step_alone_is_what_was_measured() -> None:
    assert step(1, 1, RATES).total_s == pytest.approx(RATES.pair_s)
    assert step(1, 1, RATES, guided=False).total_s == pytest.approx(RATES.call_s)
    assert clip_s(1, 1, RATES) == pytest.approx(35 * 6.26 + 7.0)
    assert clip_s(1, 1, RATES, guided=False) == pytest.approx(4 * 3.222 + 7.0)


def test_strips_of_the_vae_overlap_and_encoding_waits_for_frames() -> None:
    shares = [scaling.vae_shares(ranks) for ranks in (1, 2, 4, 8, 16)]
    assert shares[0] == (1.0, 1.0) and all(one > 1 / 2**i for i, row in enumerate(shares) for one in row if i)
    assert [row[0] for row in shares] == sorted((row[0] for row in shares), reverse=True)
    assert shares[1] == pytest.approx((0.540, 0.539), abs=1e-3)  # as counted for decision 009
    left = clip_s(8, 1, RATES) - 35 * step(8, 1, RATES).total_s - RATES.fixed_s
    assert left == pytest.approx(0.6 + 4.0 * shares[3][1])  # 2.0 * 0.195 is less than reading


def test_two_halves_share_nothing_and_exchange_a_velocity() -> None:
    one = step(1, 2, RATES)
    assert one.compute_s == pytest.approx(RATES.call_s - RATES.gaps_s)
    assert one.exposed_s == pytest.approx(scaling.VELOCITY_BYTES / 350e9)
    assert 1.9 < RATES.pair_s / one.total_s < 2
    across = step(8, 2, RATES)  # the halves on two hosts
    assert across.exposed_s == pytest.approx(32 * exchange_s(8, RATES)[1] + scaling.VELOCITY_BYTES / 45e9)


def test_more_ranks_are_faster_and_never_more_than_so_many_times() -> None:
    for guided in (True, False):
        alone = step(1, 1, RATES, guided=guided).total_s
        seen = [alone / step(context, 1, RATES, guided=guided).total_s for context in (2, 4, 8, 16)]
        assert seen == sorted(seen) and all(
            gain < ranks for gain, ranks in zip(seen, (2, 4, 8, 16), strict=True)
        )
    assert (
        step(16, 1, RATES).exposed_s > step(8, 1, RATES).exposed_s
    )  # the second host is behind a slower link


def test_a_record_gives_rates_and_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record: dict[str, Any] = {
        "kind": "scaling", "environment": {"date": "2026-01-01"}, "args": {},
        "trace": {"ours": {"classes_ms": {"attention": 2700, "gemm": 450, "pointwise": 69, "copy": 1}, "idle_ms": 2}},
        "loops": {"one": {"step_s": 6.26}, "context2": {"step_s": 3.2}}, "link": {"all_to_all_gb_s": 400.0},
        "distilled": {"one": {"seconds": 20.0, "stages": {"text": 0.5, "encode": 2.0, "denoise": 13.0, "decode": 4.0},
                              "beside_s": {"inputs": 0.7}}},
    }  # fmt: skip
    rates = scaling.rates_of(record)
    assert rates is not None
    assert (rates.attention_s, rates.pointwise_s, rates.link) == (2.7, pytest.approx(0.07), 400.0)
    assert (rates.encode_s, rates.decode_s, rates.read_s, rates.fixed_s) == (2.0, 4.0, 0.7, 0.5)
    assert scaling.steps_of(record) == {(True, 1, 1): 6.26, (True, 2, 1): 3.2}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))
    assert scaling.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "link measured" in shown and "3.200" in shown and "20.000" in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[1:2] == ["2"]]
    assert [row[0] for row in rows] == ["2", "4", "2"] and rows[0][
        10
    ] == "3.200"  # (2, 1) and (2, 2) guided, (2, 1) not
    predicted = step(2, 1, rates).total_s
    assert rows[0][11] == f"{100 * (predicted / 3.2 - 1):.1f}"
    hosts = [line.split()[0] for line in shown.splitlines() if line.split()[:1] in (["8"], ["16"])]
    assert hosts == ["8", "8", "16", "16", "8", "16"]
    assert scaling.main([str(path), "--recipe", "fp8"]) == 0
    eight = capsys.readouterr().out
    assert "recipe fp8" in eight and "3.200" not in eight  # what was measured was exact
    record["loops"] |= {"fp8_one": {"step_s": 4.4}, "fp8_context2": {"step_s": 2.345}}
    record["copies"] = {"all_to_all_gb_s": 401.0}
    path.write_text(json.dumps(record))
    assert scaling.main([str(path), "--recipe", "fp8"]) == 0
    eight = capsys.readouterr().out
    assert "2.345" in eight and "401 GB/s" in eight  # ranks of one host exchange by copies
    assert scaling.rates_of({"args": {}}) is None
    path.write_text(json.dumps({"environment": {}}))
    assert scaling.main([str(path)]) == 2


def test_ratios_of_8_bits_are_of_the_newest_record_that_traced_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(date: str, **of: float) -> dict[str, Any]:
        classes = {
            name: {"classes_ms": dict.fromkeys(("attention", "gemm", "pointwise"), ms)}
            for name, ms in of.items()
        }
        return {"kind": "fp8", "environment": {"date": date}, "call": {"kernels": classes}}

    old, new = record("2026-01-01", exact=10, fp8=9), record("2026-01-02", exact=10, fp8=7)
    assert scaling.ratios_of([new, old, record("2026-01-03", exact=10), {"kind": "other"}]) == dict.fromkeys(
        ("attention", "gemm", "pointwise"), 0.7
    )
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    assert scaling.main(["--recipe", "fp8"]) == 2 and "bench_fp8.py" in capsys.readouterr().err


def test_a_record_without_rates_lends_its_link_and_steps_to_one_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = {
        "ours": {"classes_ms": {"attention": 2700, "gemm": 450, "pointwise": 70, "copy": 0}, "idle_ms": 2}
    }
    rated = {
        "kind": "other",
        "environment": {"date": "2026-01-01"},
        "args": {},
        "trace": trace,
        "loops": {"one": {"step_s": 6.26}},
    }
    several = {"kind": "scaling", "environment": {"date": "2026-01-02"}, "args": {}, "link": {"all_to_all_gb_s": 222.0},
               "loops": {"cfg2": {"step_s": 3.3}}, "distilled": {"context2": {"seconds": 8.5}}}  # fmt: skip
    older = several | {"environment": {"date": "2025-01-02"}, "loops": {"cfg2": {"step_s": 9.9}}}
    dry = older | {"environment": {"date": "2027-01-02"}, "args": {"smoke": "True"}}
    folder = tmp_path / "gpu"
    folder.mkdir()
    for name, record in {"a": rated, "b": several, "c": older, "d": dry}.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    assert scaling.main(["--json"]) == 0
    rows = {
        (r["guided"], r["context"], r["cfg"]): r
        for r in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert rows[True, 1, 2]["measured_s"] == 3.3 and rows[False, 2, 1]["measured_clip_s"] == 8.5
    assert rows[True, 1, 2]["exposed_s"] == pytest.approx(scaling.VELOCITY_BYTES / 222e9)
    results = report.load(tmp_path)
    assert results and not any(
        key.startswith("scaling.") for key in report.figures(results)
    )  # nothing to compare with
    loops = {"one": {"step_s": 6.2}, "cfg2": {"step_s": 3.1}, "context2": {"step_s": 3.2}}
    clips = {"one": {"seconds": 17.0}, "context2": {"seconds": 8.5}}
    (folder / "b.json").write_text(json.dumps(several | {"loops": loops, "distilled": clips}))
    found = report.figures(report.load(tmp_path))
    gained = {key: row["value"] for key, row in found.items() if key.startswith("scaling.")}
    assert gained == {
        "scaling.cfg2": 2.0,
        "scaling.context2": pytest.approx(1.9375),
        "scaling.distilled2": 2.0,
    }


# --- traces ---


def event(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}


def test_overlap_counts_no_moment_twice() -> None:
    events = [
        event("attention", 0, 1000), event("gemm", 900, 2000), event("ncclDevKernel_SendRecv", 500, 1500),
        event("ncclDevKernel_SendRecv", 2500, 3000), event("cudaLaunchKernel", 0, 9000, "cuda_runtime"),
        event("Memcpy", 3100, 3200, "gpu_memcpy"),
    ]  # fmt: skip
    found = scaling_trace.overlap(events)
    assert [(row["name"], row["count"], row["ms"]) for row in found.pop("kernels")] == [
        ("ncclDevKernel_SendRecv", 2, 1.5), ("gemm", 1, 1.1), ("attention", 1, 1.0), ("Memcpy", 1, 0.1),
    ]  # fmt: skip
    assert found == {
        "compute_ms": 2.1, "attention_ms": 1.0, "communication_ms": 1.5, "hidden_ms": 1.0, "under_attention_ms": 0.5,
        "exposed_ms": 0.5, "idle_ms": 0.6, "span_ms": 3.2,
    }  # fmt: skip
    assert scaling_trace.overlap([]) == {}


def test_gains_and_their_table() -> None:
    loops: dict[str, Any] = {"one": {"step_s": 6.0}, "cfg2": {"step_s": 3.0, "sent_bytes_per_step": 2e9}}
    clips: dict[str, Any] = {"one": {"seconds": 9.0}}
    record = {"loops": loops, "distilled": clips, "overlap": {"cfg2": {"hidden_ms": 1.0}}}
    assert report_scaling.gains(record) == {"cfg2": 2.0}
    clips["context2"] = {"seconds": 4.5, "gpus": [{"sm_mhz": {"median": 1500.0}}, {}]}
    assert report_scaling.gains(record) == {"cfg2": 2.0, "distilled2": 2.0}
    rows = report_scaling.rows(record)
    assert all(len(row) == len(report_scaling.HEAD) for row in rows) and len(rows) == 4
    assert rows[1][1:6] == ["3.000", "2.00", "100", "2.00", "1.0"]
    assert rows[2][2] == "–" and rows[3][2] == "2.00" and rows[3][-1] == "1500"


# --- ranks of a bench ---

FAKE = """
import json, os, sys, time
from pathlib import Path
def write(path, record):
    path.with_suffix(".new").write_text(json.dumps(record))
    path.with_suffix(".new").replace(path)
out, left, rank = Path(sys.argv[1]), sys.argv[-1].split(","), int(os.environ["RANK"])
assert os.environ["NCCL_NVLS_ENABLE"] == "0" and os.environ["WORLD_SIZE"] == "2"
record = json.loads(out.read_text())
for name in left:
    if rank == 0:
        record["sections"][name] = {"status": "begun"}
        write(out, record)
        record["found"].append(name)
    time.sleep(0.3)
    if name == "dies" and rank == 1:
        out.with_name(f".{out.name}.fault{rank}").write_text("rank 1: RuntimeError: broken link")
        os._exit(1)
    if name == "hangs" or (name == "dies" and rank == 0):
        time.sleep(60)
    if rank == 0:
        record["sections"][name] = {"status": "ok"}
        write(out, record)
"""


def test_a_section_that_fails_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    script, out = tmp_path / "fake.py", tmp_path / "r.json"
    script.write_text(FAKE)
    scaling_ranks.write(out, {"sections": {}, "found": []})
    limits = {"first": 9.0, "dies": 9.0, "between": 9.0, "hangs": 1.0, "last": 9.0}
    parent = scaling_ranks.Parent([str(script), str(out)], out, limits, time.monotonic() + 100)
    assert parent.run() == 1
    record = scaling_ranks.read(out)
    status = {name: entry["status"] for name, entry in record["sections"].items()}
    assert status == {"first": "ok", "dies": "failed", "between": "ok", "hangs": "failed", "last": "ok"}
    assert record["found"] == ["first", "between", "last"]  # what was measured before a fault stays
    assert (
        "exit codes" in record["sections"]["dies"]["error"]
        and "broken link" in record["sections"]["dies"]["error"]
    )
    assert "longer than 1 s" in record["sections"]["hangs"]["error"]
    assert {path.name for path in tmp_path.iterdir()} == {"fake.py", "r.json"}


def test_without_time_sections_are_skipped(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    scaling_ranks.write(out, {"sections": {"done": {"status": "ok"}}})
    assert scaling_ranks.Parent(["none.py"], out, {"done": 1.0, "left": 1.0}, time.monotonic()).run() == 1
    assert scaling_ranks.read(out)["sections"]["left"]["status"] == "skipped"


def test_the_bench_runs_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench_scaling.py"),
        "--out",
        str(out),
        "--smoke",
        "--rounds",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", "link,loops,trace,exchange"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert {row["status"] for row in record["sections"].values()} == {"ok"}
    assert record["equal"]["bitwise"]["cfg2"] and record["equal"]["relative_l2"]["context2"] < 0.05
    assert record["loops"]["cfg2"]["sent_bytes_per_step"] == 16 * 3 * 8 * 12 * 4  # one velocity in fp32
    wide, narrow = (record["loops"][name]["sent_bytes_per_step"] for name in ("context2", "fp8_context2"))
    assert 0.4 * wide < narrow < 0.7 * wide  # codes, and the sums that their steps are made of
    assert record["equal"]["bitwise"]["fp8_context2"]
    assert record["exchange"]["in 2 parts"]["bitwise"] and record["exchange"]["fp8, in 2 parts"]["bitwise"]
    assert (
        record["overlap"] == {"context2": {}, "cfg2": {}, "fp8_context2": {}}
        and record["trace"]["ours"]["kernels"]
    )
    assert scaling.rates_of(record) is None  # a dry run says nothing of a GPU


def test_the_bench_of_one_rank_runs(tmp_path: Path) -> None:
    out = tmp_path / "rank.json"
    command = [sys.executable, str(ROOT / "tools" / "bench_rank.py"), "--out", str(out), "--smoke"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--ranks", "2", "--rounds", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads(out.read_text())["rows"]
    assert (one["ranks"], two["ranks"]) == (1, 2) and len(two["runs_s"]) == 1
    assert two["stages"]["denoise"] < one["stages"]["denoise"]  # half of the tokens


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_rank_puts_for_a_stand_in_is_what_it_gets_from_it(size: int) -> None:
    """Slots and flags of each peer are its own, and both ends of a pipe are one."""
    rank = size // 2
    mirror = object.__new__(bench_rank.Mirror)
    mirror.rank, mirror.size, mirror.slots, mirror.slot_bytes = rank, size, 2, 64
    memory = torch.zeros(peer_memory.FLAGS + (size - 1) * 2 * 64, dtype=torch.uint8)
    mirror._all = [memory] * size
    others = [peer for peer in range(size) if peer != rank]
    places = [(peer, slot) for peer in others for slot in range(2)]
    assert len({mirror.outbox(*place).data_ptr() for place in places}) == len(places)
    told = [mirror._flag(peer, rank, flag, slot) for peer, slot in places for flag in (0, 1)]
    awaited = [mirror._flag(rank, peer, flag, slot) for peer, slot in places for flag in (0, 1)]
    assert told == awaited and len(set(told)) == len(told)
    for place in places:
        assert mirror.inbox(*place).data_ptr() == mirror.outbox(*place).data_ptr()
