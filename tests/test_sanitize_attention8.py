"""tools/sanitize_attention8.py: an error, a hazard, a wrong result or an early end under any tool is a failure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import sanitize  # noqa: E402
import sanitize_attention8 as tool  # noqa: E402

FAKE = """#!/bin/sh
echo 'checked []'
[ "$2" = {under} ] && {{ {says}; exit 1; }}
[ "$2" = racecheck ] && {{ echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'; exit 0; }}
echo '========= ERROR SUMMARY: 0 errors'
"""
FAULTS = {
    "": ("nothing", "true", 0),
    "error": ("memcheck", "echo '========= Invalid __shared__ read of size 4'; echo '========= ERROR SUMMARY: 1 error'", 1),
    "hazard": ("racecheck", "echo '========= Error: Race reported'; echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'", 1),
    "warning": ("racecheck", "echo '========= RACECHECK SUMMARY: 1 hazards displayed (0 errors, 1 warning)'", 1),
    "no summary": ("synccheck", "true", 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_tool_finds_is_the_exit_status(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under, says, status = FAULTS[fault]
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(under=under, says=says))
    fake.chmod(0o755)
    (tmp_path / "three.so").touch()
    monkeypatch.setattr(sanitize, "find", lambda: str(fake))
    monkeypatch.setattr(sanitize, "versions", lambda path: {})
    arguments = ["--rungs", "three", "--folder", str(tmp_path), "--tools", "memcheck,synccheck,racecheck"]
    assert tool.main(arguments) == status


def test_a_wrong_result_and_an_early_end_are_found() -> None:
    assert tool.read('checked ["three 1 x 1"]\n', "none")["wrong"] == ["three 1 x 1"]
    assert tool.read("checked []\n", "none") | {"reports": []} == {
        "tool": "none", "found": 0, "reports": [], "wrong": [], "whole": True,
    }  # fmt: skip
    for output in ("", "========= ERROR SUMMARY: 0 errors\n"):
        assert not tool.read(output, "memcheck")["whole"]


def test_rungs_must_be_built(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--rungs", "three,four", "--folder", str(tmp_path)])
    assert "must be built, got ['three', 'four']" in capsys.readouterr().err
