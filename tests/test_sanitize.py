"""tools/sanitize.py: what it runs and records, and that an error, a wrong result or an empty selection is none of its successes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import sanitize as tool_under_test  # noqa: E402
import sanitize_cases  # noqa: E402

from cosmos_fast.reference import norm_silu  # noqa: E402

NAMES = ["gelu/triton/small/bfloat16", "gelu/triton/tail/bfloat16", "linear_gelu/triton/small/bfloat16"]

DRIVER = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--part", default="1/1"), parser.add_argument("--select", default="")
parser.add_argument("--filled", action="store_true")
args = parser.parse_args()
told = {key: os.environ["FAKE_" + key].split(",") for key in ("NAMES", "ERROR", "SKIPPED", "WRONG")}
index, count = map(int, args.part.split("/"))
rules = [word.strip() for word in args.select.split(" and ") if word.strip()]
names = [n for n in told["NAMES"] if all((r.removeprefix("not ") in n) != r.startswith("not ") for r in rules)]
names = names[index - 1 :: count]
for name in names:
    print(json.dumps({"case": name}), flush=True)
    time.sleep(float(os.environ["FAKE_SLEEP"]))
    if name in told["ERROR"] and os.environ.get("FAKE_TOOL") == "initcheck" and not args.filled:
        print("========= Uninitialized __global__ memory read of size 4 bytes")
        print("=========     at kernel+0x10")
    result = {"skipped": "not built"} if name in told["SKIPPED"] else {"faults": ["off"] if name in told["WRONG"] else []}
    print(json.dumps({"case": name, **result}), flush=True)
sys.exit(2 if not names else int(any(n in told["WRONG"] for n in names)))
"""

SANITIZER = """#!/bin/sh
[ "$1" = --version ] && { echo "Version 9.9.9 (build 1)"; exit 0; }
echo "$@" >> $FAKE_LOG
tool=$2
shift 6
[ "$1" = --show-backtrace ] && shift 4
out=$(FAKE_TOOL=$tool "$@"); code=$?
echo "$out"
errors=$(echo "$out" | grep -c "^========= U")
echo "========= ERROR SUMMARY: $errors errors"
[ $errors -gt 0 ] && exit 99
exit $code
"""


@pytest.fixture
def sanitize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the tool with a compute-sanitizer and cases that only say what they are told to."""
    tool, driver, log = tmp_path / "compute-sanitizer", tmp_path / "driver.py", tmp_path / "log"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    driver.write_text(DRIVER)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(tool_under_test, "DRIVER", driver)
    for name in ("ERROR", "SKIPPED", "WRONG"):
        monkeypatch.setenv(f"FAKE_{name}", "")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_SLEEP", "0")

    def run(*arguments: str, cases: list[str] = NAMES) -> tuple[int, dict[str, Any], str]:
        """Exit status, record, and what compute-sanitizer was called with."""
        monkeypatch.setenv("FAKE_NAMES", ",".join(cases))
        monkeypatch.setattr(tool_under_test, "names", lambda select: cases)
        out = tmp_path / "deep" / "record.json"
        status = tool_under_test.main(["--out", str(out), "--jobs", "2", *arguments])
        record = json.loads(out.read_text()) if out.exists() else {}
        return status, record, log.read_text() if log.exists() else ""

    return run


def test_all_cases_run_without_a_tool_and_then_under_each(sanitize: Any) -> None:
    status, record, called = sanitize()
    assert status == 0 and record["environment"]["sanitizer"] == "9.9.9"
    assert [row["tool"] for row in record["rows"]] == ["none", "memcheck", "synccheck", "initcheck"]
    for row in record["rows"]:
        assert (
            row["ok"]
            and row["run"] == row["selected"] == 3
            and row["not_run"] == []
            and row["tool_errors"] == 0
        )
    assert called.count("--tool memcheck") == 2, "one process a job"


def test_an_error_of_the_tool_is_a_failure_though_every_result_is_right(
    sanitize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ERROR", NAMES[1])
    status, record, _ = sanitize("--tool", "initcheck")
    row = record["rows"][-1]
    assert status == 1 and row["tool_errors"] == 1 and not row["ok"]
    assert row["suspects"][NAMES[1]]["first"].startswith("Uninitialized __global__ memory read")


def test_what_the_copy_engine_writes_is_proven_and_not_left_out(
    sanitize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ERROR", NAMES[2])
    status, record, called = sanitize("--tool", "initcheck")
    row = record["rows"][-1]
    assert status == 0 and row["ok"] and row["run"] == 3
    proof = row["filled_before"]["linear_gelu/triton"]
    assert (proof["cases_filled"], proof["errors_filled"], proof["errors_unfilled"]) == (1, 0, 1) and proof[
        "why"
    ]
    assert "--filled" in called and called.count("--print-limit") == 1, (
        "details where errors are not expected"
    )


def test_a_wrong_result_fails_and_a_kernel_that_cannot_run_is_named(
    sanitize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SKIPPED", NAMES[0])
    status, record, _ = sanitize("--tool", "memcheck")
    assert status == 0 and record["rows"][-1]["skipped"] == {NAMES[0]: "not built"}
    monkeypatch.setenv("FAKE_WRONG", NAMES[1])
    status, record, _ = sanitize("--tool", "memcheck")
    assert status == 1 and record["rows"][-1]["wrong"] == {NAMES[1]: ["off"]}


def test_time_up_says_which_cases_did_not_run(sanitize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLEEP", "60")
    status, record, _ = sanitize("--tool", "memcheck", "--seconds", "0.5")
    row = record["rows"][-1]
    assert status == 1 and row["run"] == 0 and row["not_run"] == sorted(NAMES) and not row["ok"]


def test_a_selection_without_cases_is_refused(sanitize: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, record, _ = sanitize(cases=[])
    assert status == 2 and not record and "no case was selected" in capsys.readouterr().err


# --- the cases -------------------------------------------------------------------------------------


def test_every_kernel_of_ours_has_cases_and_no_library_has() -> None:
    names = [job.name for job in sanitize_cases.jobs()]
    kernels = {tool_under_test.kernel_of(name) for name in names}
    assert kernels >= {
        "adaln/triton",
        "adaln/cuda",
        "qk_norm_rope/cuda",
        "linear_gelu/triton",
        "patchify/triton",
    }
    assert not any(
        kernel.endswith(("/reference", "/composed", "/cudnn", "/fa3", "/cpp")) for kernel in kernels
    )
    assert set(sanitize_cases.BULK) <= kernels and len(set(names)) == len(names)
    assert not any("720p" in name or "slice" in name for name in names)
    some = sanitize_cases.jobs("gelu/triton/ and not linear and bfloat16")
    assert some and all(job.op.startswith("gelu") and job.dtype == torch.bfloat16 for job in some)


def test_operands_move_as_the_views_that_they_are() -> None:
    base = torch.arange(24.0).view(4, 6)
    views = [base[:, 2:], base.t(), [base[1]], 3, None, torch.empty(0, 5)]
    seen: dict[int, torch.Tensor] = {}
    a, b, (c,), *plain, empty = sanitize_cases.moved(views, torch.device("cpu"), seen)
    for mine, its in ((a, views[0]), (b, views[1]), (c, views[2][0])):
        assert torch.equal(mine, its) and mine.stride() == its.stride() and mine.data_ptr() != its.data_ptr()
    assert plain == [3, None] and empty.shape == (0, 5)
    a.zero_()
    assert float(b.sum()) == float(base[:, :2].sum()), "views of one storage stay views of one storage"


def test_bytes_of_a_result_whose_last_axis_has_any_stride() -> None:
    odd = torch.arange(8.0).bfloat16().as_strided((2, 4, 1), (4, 1, 5))
    assert sanitize_cases.as_bytes(odd).shape == (16,)
    assert sanitize_cases.as_bytes(torch.empty(0, 3, 4).transpose(1, 2)).shape == (0,)


def test_an_operand_is_updated_as_the_reference_does_or_left_alone() -> None:
    (job, *_) = sanitize_cases.jobs("norm_silu/triton/small and bfloat16")

    def forgets(x: Any, gamma: Any, past: Any, keep: Any) -> torch.Tensor:
        return norm_silu(x, gamma, past, None)

    def spoils(x: Any, gamma: Any, past: Any, keep: Any) -> torch.Tensor:
        out = norm_silu(x, gamma, past, keep)
        past.add_(1)
        return out

    for call, faults in (
        (norm_silu, []),
        (forgets, ["norm_silu[1]: relative error"]),
        (spoils, ["past: written"]),
    ):
        candidate: Any = SimpleNamespace(name="triton", load=lambda call=call: call)
        tried = sanitize_cases.Job(job.op, candidate, job.case, job.dtype)
        found = sanitize_cases.run(tried, torch.device("cpu"), filled=False)["faults"]
        assert len(found) == len(faults)
        assert all(fault.startswith(word) for fault, word in zip(found, faults))


@pytest.mark.interpret
@pytest.mark.parametrize("filled", [False, True])
def test_interpreted_cases_are_right(filled: bool) -> None:
    wanted = [
        j
        for j in sanitize_cases.jobs("triton and float32 and not conv")
        if j.op in ("gelu", "adaln", "patchify")
    ]
    told = dict(sanitize_cases.results(wanted, torch.device("cpu"), filled))
    assert len(told) == 3 and all(result == {"faults": []} for result in told.values())


def test_a_value_left_out_and_a_write_outside_are_faults() -> None:
    job = next(
        j for j in sanitize_cases.jobs("gelu/triton/small") if j.op == "gelu" and j.dtype == torch.float32
    )

    def lazy(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[1:] = torch.nn.functional.gelu(x[1:])
        return out

    def wild(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out.copy_(torch.nn.functional.gelu(x))
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)
        return out

    for call, word in ((lazy, "relative error"), (wild, "outside of its results")):
        candidate: Any = SimpleNamespace(name="triton", load=lambda call=call: call)
        broken = sanitize_cases.Job(job.op, candidate, job.case, job.dtype)
        (fault, *_) = sanitize_cases.run(broken, torch.device("cpu"), filled=True)["faults"]
        assert word in fault
