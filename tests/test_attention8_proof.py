"""tools/attention8_proof.py: what a version must show is shown by the reference and by no version with a fault."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import attention8_activations  # noqa: E402
import attention8_proof as proof  # noqa: E402
from attention8_rungs import RUNGS  # noqa: E402

from cosmos_fast import reference  # noqa: E402
from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.ops_attention8 import Codes  # noqa: E402

RUNG = next(rung for rung in RUNGS if rung.name == "three_lean_sparse")


class Computed(proof.Version):
    """A version in fp64 on the CPU, but for one fault."""

    fault: str = ""

    def launch(self, codes: Codes, out: Tensor, lse: Tensor, tiles: Any = None, counts: Any = None) -> None:
        c, L, S = codes, codes.q.shape[0], codes.k.shape[0]
        keep = torch.ones(c.q.shape[1], L, S, dtype=torch.bool)
        if tiles is not None:
            kept = torch.zeros(*tiles.shape[:2], -(-S // RUNG.keys), dtype=torch.bool)
            for n in range(tiles.shape[0]):
                for row in range(tiles.shape[1]):
                    listed = tiles[n, row, : int(counts[n, row])].long()
                    kept[n, row, listed[1:] if self.fault == "list" else listed] = True
            keep = kept.repeat_interleave(RUNG.queries, 1)[:, :L].repeat_interleave(RUNG.keys, 2)[..., :S]
        if self.fault == "tail":
            keep[..., S // 16 * 16 :] = False
        exact, sums, _ = proof.rows_in_fp64(c, torch.arange(L), keep)
        mean = 0.0 if self.fault == "mean" else c.v_mean
        rows = L - 1 if self.fault == "unwritten" else L
        out[:rows].copy_((exact + mean)[:rows].to(out.dtype))
        lse.copy_(sums + (0.1 if self.fault == "lse" else 0.0))


def version(fault: str = "") -> Computed:
    made = Computed(RUNG, lambda args: None)
    object.__setattr__(made, "fault", fault)
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "DEVICE", "cpu")
    monkeypatch.setattr(proof, "LENGTHS", ((1, 1), (2, 33), (200, 97)))
    monkeypatch.setattr(proof, "POISONED", ((5, 37, 2),))
    monkeypatch.setattr(proof, "MASKED", (200, 400))
    monkeypatch.setattr(proof, "HEADS", 1)
    monkeypatch.setattr(proof, "timed", lambda run, seconds: (run(), (1.0, 3))[1])


def verdicts(records: Any) -> list[bool]:
    return [record["ok"] for record in records if "section" in record]


def test_a_right_version_passes() -> None:
    assert all(verdicts(proof.lengths(version()))) and all(verdicts(proof.memory(version())))
    rows = [r for r in proof.sparse(version(), version(), 385, 0.1) if "section" in r]
    assert all(r["ok"] for r in rows if r["name"].startswith(("masked", "all tiles")))
    shares = {r["name"]: r["kept"] for r in rows if r["name"].endswith("%") and r["ascending"]}
    # Of five tiles; the times are all alike here, so only a share of all would be proportional.
    assert shares["50%"] == pytest.approx(0.4) and shares["2%"] == pytest.approx(0.2)
    assert not any(r["ok"] for r in rows if r["name"].endswith("%"))


@pytest.mark.parametrize("fault", ["tail", "mean", "lse", "unwritten"])
def test_a_version_with_a_fault_at_some_length_does_not(fault: str) -> None:
    assert not all(verdicts(proof.lengths(version(fault))))


def test_what_nobody_wrote_is_found() -> None:
    (row,) = (r for r in proof.memory(version("unwritten")) if "section" in r)
    assert not row["ok"] and "values that nobody wrote" in row["faults"] and "zeros before" in row["faults"]


def test_a_version_that_leaves_out_a_listed_tile_does_not_pass() -> None:
    rows = [r for r in proof.sparse(version("list"), version(), 385, 0.1) if "section" in r]
    assert not any(r["ok"] for r in rows if r["name"].startswith(("masked", "all tiles")))


def test_operands_reach_the_kernel_as_its_header_says() -> None:
    seen: list[Any] = []
    c = proof.codes_of(5, 37, 2)
    plain = replace(c, v=reference.unpacked(c.v, 37))
    tiles, counts, flags = proof.tile_lists(5, 37, 2, RUNG, 1.0, True)
    proof.Version(RUNG, seen.append)(plain, tiles, counts)
    (args,) = seen
    assert (args.num_queries, args.num_keys, args.num_heads, args.v_row) == (5, 37, 2, 48)
    assert (args.q_row, args.k_row, args.out_row, args.q_head) == (256, 256, 256, 128)
    assert args.k_scale is None and args.q_scale_head == 0 and args.softmax_scale == 1.0
    assert args.key_capacity == 1 and flags.all() and int(counts.sum()) == 2


def test_a_section_that_fails_is_recorded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such thing")
        yield

    monkeypatch.setattr(proof, "memory", broken)
    options = argparse.Namespace(length=385, commit=None, sections="memory,lengths", long=0.1)
    rows = [r for r in proof.prove(version(), None, options, 60) if "section" in r]
    assert rows[0]["fault"] == "RuntimeError: no such thing" and not rows[0]["ok"]
    assert [r["section"] for r in rows[1:]] == ["memory", *["lengths"] * 4]
    late = [r for r in proof.prove(version(), None, options, -1) if "section" in r]
    assert [r["fault"] for r in late] == ["no time left"] * 2


def test_activations_are_what_a_clip_of_the_embedded_model_gives_to_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(engine: Engine, spec: Any) -> None:
        attend, width = engine.network.blocks[0].attend, engine.network.config.head_width
        gains, tables = torch.ones(2, width), torch.randn(2, 3, width // 2).sin()
        attend(torch.randn(3, 3 * 2 * width), *gains, *tables, 0)

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(attention8_activations, "DEVICE", "cpu")
    own = lambda q, k, v, *rest: reference.attention_fp8(q, k, v, *rest)  # noqa: E731
    (row,) = attention8_activations.activations({"own": own, "fa3": own})
    assert (
        row["layers"] == 1 and row["ok"] and 0.005 < row["mean"]["own"] < 0.1 and row["mean"]["bf16"] < 1e-5
    )


@pytest.mark.parametrize("fault", ["", "lse"])
def test_versions_in_turns_must_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    import attention8_turns

    for name in ("DEVICE", "HEADS", "timed"):
        monkeypatch.setattr(attention8_turns, name, getattr(proof, name))
    monkeypatch.setattr(attention8_turns, "watched", lambda: nullcontext([]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rungs = {rung.name: rung for rung in RUNGS}
    versions = []
    for name in ("three_lean", "three_late", "three_lean_sparse", "three_sparse"):
        versions.append(Computed(rungs[name], lambda args: None))
        object.__setattr__(versions[-1], "fault", "" if "lean" in name else fault)
    rows = [r for r in attention8_turns.in_turns(versions, 385, 2, 0.1) if "section" in r]
    same = {(r["name"], r["lists"]): r["ok"] for r in rows if r["name"].startswith("bits")}
    assert len(same) == 6 and all(ok == ("lean" in name or not fault) for (name, _), ok in same.items())
    times = {(r["name"], r["share"]): r for r in rows if "ms" in r}
    assert len(times) == 2 + 2 * 3
    assert times["three_sparse", 0.2]["over_proportional"] == pytest.approx(5)
    assert {r["ok"] for r in rows if r["name"].startswith("three_lean ") and "ok" in r} == {True}
