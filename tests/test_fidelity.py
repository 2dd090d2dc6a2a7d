"""tools/fidelity.py and what it stands on: notes that are right, goals that can be missed, failures that stay apart."""

from __future__ import annotations

import argparse
import json
import re
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import fidelity  # noqa: E402
import fidelity_engines  # noqa: E402
import fp8_budget  # noqa: E402
import published  # noqa: E402
import report  # noqa: E402
import report_fidelity  # noqa: E402
from fidelity_products import watched  # noqa: E402

from cosmos_fast import quant  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.fp8_weights import is_computed, is_stored  # noqa: E402
from cosmos_fast.network import Network  # noqa: E402
from cosmos_fast.recipe import Plan  # noqa: E402

TINY, GRID = NetworkConfig.tiny(), (2, 4, 6)


def network() -> Network:
    return published.build(TINY, published.random_state(TINY), "cpu", torch.float32)


@torch.no_grad()
def velocity(net: Network) -> Tensor:
    given = published.inputs(TINY, GRID, "cpu", torch.float32)
    return published.bind(net, given)[0](given.z[None], 10)


# --- layers ----------------------------------------------------------------------------------------


def test_a_watched_network_computes_the_same_and_notes_every_layer_that_is_called() -> None:
    net = network()
    plain = velocity(net)
    notes = watched(net)
    notes.active, notes.step = True, 7
    assert torch.equal(velocity(net), plain)
    found = notes.summary()
    layers = set(found["as it runs"]["by_layer"])
    assert {
        n for n, m in net.named_modules() if isinstance(m, torch.nn.Linear) and is_computed(n)
    } - layers == {n for n in map(str, dict(net.named_modules())) if n.endswith("image_q")}, (
        "without a reference image nobody asks for its queries"
    )
    assert found["as it runs"]["by_step"].keys() == {"7"}
    own, rows, weights = (found[way]["mean"] for way in ("as it runs", "rows alone", "weights alone"))
    assert 0.02 < own < 0.06 and max(rows, weights) < own < rows + weights


def test_one_step_for_a_tensor_is_what_an_outlier_spoils() -> None:
    net = network()
    layer = net.blocks[0].qkv
    notes = watched(net, ["blocks.0.qkv"])
    notes.active = True
    rows = torch.randn(64, TINY.width, generator=torch.Generator().manual_seed(0))
    rows[3] *= 1e5
    notes.note("outlier", rows[:, : layer.in_features], layer.weight)
    found = notes.summary()
    assert found["largest value over rms"]["worst"] > 8
    rest = notes.found["as it runs"]["outlier"][0]
    assert rest < 0.06


def test_only_the_kind_that_was_named_is_in_8_bits() -> None:
    plain = velocity(network())
    for kind, pattern in fp8_budget.GROUPS.items():
        net = fp8_budget.only(network(), pattern)
        changed = {n for n, m in net.named_modules() if isinstance(m, quant._Matrix | fp8_budget.Rounded)}
        assert changed and all(re.fullmatch(pattern, name) for name in changed)
        assert all(is_computed(n) or is_stored(n) for n in changed) == (
            not kind.startswith("not in the rule")
        ), kind
        assert 0 < fp8_budget.error(velocity(net), plain) < 0.1, kind
    with pytest.raises(ValueError, match="budget: some layer must fit"):
        fp8_budget.only(network(), "nothing")


# --- clips -----------------------------------------------------------------------------------------


def done(clip: int, tag: str, decibels: float, value: float, exact: float = 0.5) -> dict[str, Any]:
    row = {
        "psnr_db": decibels,
        "worst_frame_db": decibels - 3,
        "ssim": 0.99,
        "latent": 0.01,
        "measures": {"edge_f1": value},
    }
    return {"clip": clip, "tag": tag, "failed": {}, "used": {}, "rows": {"exact": {"measures": {"edge_f1": exact}}, "fp8": row}}  # fmt: skip


def test_goals_are_of_means_and_the_few_step_model_has_its_own() -> None:
    every = [done(0, "edge", 40, 0.505), done(1, "edge", 34, 0.499), done(0, "edge_distilled", 33, 0.4)]
    found = fidelity.summary(every, {})
    rows = fidelity.goals(found, ["fp8", "absent"], {}, ["edge", "edge_distilled"])
    goals = {goal["metric"]: goal for goal in rows}
    assert goals["psnr_db.fp8"]["value"] == 37 and goals["psnr_db.fp8"]["passed"]
    assert (
        goals["metric_change.fp8"]["value"] == pytest.approx(0.004) and goals["metric_change.fp8"]["passed"]
    )
    assert not goals["psnr_db.fp8.distilled"]["passed"] and goals["psnr_db.fp8.distilled"]["value"] == 33
    assert not goals["metric_change.fp8.distilled"]["passed"] and len(goals) == 4
    # Clips change by +0.005 and -0.001 of 0.5: 0.004 apart from none on average, which is within its error.
    change = goals["metric_change.fp8"]
    assert change["of"] == "edge" and change["clips"] == 2 and change["error"] == pytest.approx(0.006)
    assert goals["metric_change.fp8.distilled"]["error"] is None, "one clip cannot tell"


def test_a_recipe_that_failed_for_some_requests_has_no_figures_and_meets_no_goal() -> None:
    whole, broken = done(0, "edge", 60, 0.5), done(1, "edge", 60, 0.5)
    broken["rows"].pop("fp8")
    broken["failed"] = {"fp8": "RuntimeError: no"}
    for d in (whole, broken):
        d["rows"]["linear"] = done(0, "edge", 50, 0.5)["rows"]["fp8"]
    without = fidelity.withheld([whole, broken], {})
    assert without == {"fp8": "1 of 2 requests failed, the first with RuntimeError: no"}
    found = fidelity.summary([whole, broken], without)
    assert found.keys() == {"linear"}
    goals = fidelity.goals(found, ["fp8", "linear"], without, ["edge"])
    assert [(g["metric"], g["value"], g["passed"]) for g in goals] == [
        ("psnr_db.fp8", None, False), ("metric_change.fp8", None, False),
        ("psnr_db.linear", 50.0, True), ("metric_change.linear", 0.0, True),
    ]  # fmt: skip
    assert "Not measured: psnr_db.fp8, metric_change.fp8." in report_fidelity.verdict(goals)
    # A request of which nothing came is missing from every recipe.
    assert fidelity.withheld([whole], {"clip 1 vis": "CheckpointError: x"}).keys() == {"fp8", "linear"}


def test_figures_of_two_implementations_are_of_neither() -> None:
    one, two = (done(k, "edge", 40, 0.5) | {"used": {"attention_fp8": [n], "adaln": [n]}} for k, n in enumerate(("own", "triton")))  # fmt: skip
    assert fidelity.withheld([one, two], {}) == {"fp8": "attention_fp8 ran as own and as triton"}
    assert fidelity.ran([one, two]) == {"adaln": ["own", "triton"], "attention_fp8": ["own", "triton"]}
    assert fidelity.withheld([one, one], {}) == {}


def test_every_worker_gets_clips_and_a_model_stays_with_its_own() -> None:
    for workers in (1, 3, 5, 8, 10):
        places = [[fidelity.place(m, k, 5, workers) for k in range(8)] for m in range(5)]
        assert {w for row in places for w in row} == set(range(workers))
        if workers >= 5:
            assert all(w % 5 == m for m, row in enumerate(places) for w in row)


def settled(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    elif value is not None:
        future.set_result(value)
    return future


def measured(tmp_path: Path, *answers: Any) -> tuple[dict[str, Any], Path]:
    """The record of a run of two clips, of two requests each, that go like this; the look at layers is the first."""
    coming = map(settled, answers)
    pools = SimpleNamespace(submit=lambda *_: next(coming))
    edge, few = (SimpleNamespace(model="edge", clip=0, tag=tag) for tag in ("edge", "edge_distilled"))
    args = argparse.Namespace(device="cpu", other_library=None, steps=2)
    about = {
        "gpu": "GPU X",
        "torch": "2.11",
        "cuda": "13.0",
        "commit": "abcdef0123",
        "date": "2026-01-01T00:00:00",
    }
    record: dict[str, Any] = {"kind": "fidelity", "environment": about, "model": "edge", "failures": {}}
    out = tmp_path / "results" / "gpu-x" / "a.json"
    out.parent.mkdir(parents=True)
    fidelity.measure(pools, [[edge, few], [edge, few]], ["fp8"], args, 0.0, record, out)  # type: ignore[arg-type, list-item]
    assert json.loads(out.read_text()) == record
    return record, out


def test_what_fails_or_is_late_costs_no_other_clip(tmp_path: Path) -> None:
    """And tools/report.py reads what is left."""
    record, _ = measured(
        tmp_path, RuntimeError("no such library"), done(0, "edge", 41, 0.5) | {"failed": {"te": "absent"}},
        done(0, "edge_distilled", 44, 0.5), done(1, "edge", 39, 0.5), None,
    )  # fmt: skip
    assert record["clips"] == 2 and record["late"] == ["clip 1 edge_distilled"]
    assert record["failures"].keys() == {"look", "clip 0 edge te"} and record["withheld"].keys() == {"te"}
    assert record["fidelity"]["fp8"]["by_request"]["edge"]["psnr_db"] == 40
    results = report.load(tmp_path / "results")
    figure = report.figures(results)["psnr_db.fp8"]
    assert figure["value"] == pytest.approx(124 / 3) and figure["file"] == "bench/results/gpu-x/a.json"
    text = report.fill("<!-- report:fidelity -->\n<!-- /report:fidelity -->", results)
    assert "| both | 41.3 | 39.0 | 36.0 | 0.9900 | 1.0e-02 | 0.00 |" in text
    assert "Met: psnr_db.fp8 40 (>= 35), metric_change.fp8 0 (<= 0.02)" in text and "Missed" not in text
    assert "absent" in fidelity.verdict(record) and "no figures: te" in fidelity.verdict(record)


def test_a_request_of_which_nothing_came_leaves_no_figure_to_report(tmp_path: Path) -> None:
    record, _ = measured(
        tmp_path, RuntimeError("look"), done(0, "edge", 41, 0.5), ValueError("broken"),
        done(1, "edge", 39, 0.5), done(1, "edge_distilled", 44, 0.5),
    )  # fmt: skip
    assert record["withheld"] == {"fp8": "1 of 4 requests failed, the first with ValueError: broken"}
    assert record["fidelity"] == {} and not any(goal["passed"] for goal in record["goals"])
    assert "psnr_db.fp8" not in report.figures(report.load(tmp_path / "results"))
    assert "MISSED  psnr_db.fp8" in fidelity.verdict(record)


def test_the_engine_that_looks_on_puts_its_own_attention_in_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(fidelity_engines.Watched, "layers", looked.append, raising=False)
    one = fidelity_engines.Watched(model="edge/distilled", plan=Plan(device="cpu"))
    blocks = [*one.network.blocks, *(block for branch in one.network.control for block in branch.blocks)]
    assert len(blocks) > 6 and all(block.attend == looked.append for block in blocks)
