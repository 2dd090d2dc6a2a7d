"""tools/sanitize.py: what it selects, what it records, and that an error or an empty selection is none of its successes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import sanitize as tool_under_test  # noqa: E402

NAMES = ["tests/test_kernels_parity.py::test_gpu[gelu-small-bf16]", "tests/test_build.py::test_x"]
FAKE = """#!/bin/sh
[ "$1" = --version ] && { echo "Version 9.9.9 (build 1)"; exit 0; }
sleep $FAKE_SLEEP
echo "$@" >> $FAKE_LOG
echo "2 passed, 1 skipped in 1.20s"
echo "========= ERROR SUMMARY: $FAKE_ERRORS errors"
exit $FAKE_ERRORS
"""


@pytest.fixture
def sanitize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE)
    tool.chmod(0o755)
    log = tmp_path / "log"
    for name, value in {"FAKE_LOG": str(log), "FAKE_ERRORS": "0", "FAKE_SLEEP": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def run(*arguments: str, tests: list[str] | None = None) -> tuple[int, dict[str, Any], str]:
        """Exit status, record, and what the tool was called with; `tests` spares the seconds of collecting them."""
        if tests is not None:
            monkeypatch.setattr(tool_under_test, "selected", lambda select, part: tests)
        out = tmp_path / "deep" / "record.json"
        status = tool_under_test.main(["--out", str(out), *arguments])
        record = json.loads(out.read_text()) if out.exists() else {}
        return status, record, log.read_text() if log.exists() else ""

    return run


def test_it_runs_small_cases_of_every_kind_and_records_them(sanitize: Any) -> None:
    status, record, called = sanitize("--tool", "memcheck", "--select", "gelu or norm_rope")
    assert status == 0 and record["environment"]["sanitizer"] == "9.9.9"
    (row,) = record["rows"]
    batches = called.count("--tool memcheck")
    assert row["run"] == row["selected"] == len(record["tests"]) > 30 and row["ok"]
    assert (row["passed"], row["skipped"], row["tool_errors"]) == (2 * batches, batches, 0)
    files = {name.partition("::")[0] for name in record["tests"]}
    assert files >= {"tests/test_kernels_parity.py", "tests/test_native_norm_rope.py"}
    assert all(name in called for name in record["tests"])
    assert not any(word in called for word in ("production", "84480", "720p", "captured"))


def test_an_error_of_the_tool_is_a_failure_though_every_test_passed(
    sanitize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ERRORS", "3")
    status, record, _ = sanitize("--tool", "memcheck", tests=NAMES)
    (row,) = record["rows"]
    assert status == 1 and row["tool_errors"] == 3 and not row["ok"] and row["failures"][0]["exit"] == 3


def test_time_up_is_recorded_and_nothing_run_is_no_success(
    sanitize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLEEP", "60")
    status, record, _ = sanitize(
        "--tool", "memcheck", "--select", "test_native_norm_rope", "--seconds", "0.5"
    )
    (row,) = record["rows"]
    assert status == 1 and row["run"] == 0 < row["selected"] and not row["ok"]


def test_a_selection_without_tests_and_a_wrong_part_are_refused(
    sanitize: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record, _ = sanitize(tests=[])
    assert status == 2 and not record and "no gpu test was selected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sanitize("--part", "3/2")
    assert "I/N with 1 <= I <= N, got '3/2'" in capsys.readouterr().err
