"""What benches see of the GPU: one class, the power now and the mean over a second kept apart."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import attention8_watch  # noqa: E402
import watch as watching  # noqa: E402
from watch import Sample, Watch, column  # noqa: E402

LOOKS = [Sample(1500, 600, 50, 690), Sample(1400, 610, 52, 700), Sample(1450, 620, 54, None)]


def looks(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch that sees LOOKS in turn, as fast as it can."""
    monkeypatch.setattr(watching, "PERIOD_S", 0.001)
    left = iter(LOOKS)
    return Watch(lambda: next(left))


def seen_all(watch: Watch, label: str) -> None:
    end = time.monotonic() + 10
    with watch(label):
        while len(watch.samples(label)) < len(LOOKS) and time.monotonic() < end:
            time.sleep(0.001)


def test_a_record_has_both_powers_and_what_it_had_before(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = looks(monkeypatch)
    seen_all(watch, "run")
    assert watch.samples("run") == LOOKS and watch.samples("another") == [] and watch.summary("another") == {}
    assert watch.summary("run") == {
        "sm_mhz": {"median": 1450, "min": 1400, "max": 1500},
        "power_w": {"median": 610, "min": 600, "max": 620},  # the mean over a second, as in older records
        "temperature_c": {"median": 52, "min": 50, "max": 54},
        "instant_w": {"median": 695, "min": 690, "max": 700},  # of the looks that know it
    }


def test_attention_records_tell_the_power_now(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention8_watch.load(LOOKS) == {"clock_mhz": 1450, "watts": 695}
    assert attention8_watch.mean_load(LOOKS) == {"clock_mhz": 1450, "watts": 695, "temperature_c": 52}
    assert attention8_watch.load([]) == {"clock_mhz": None, "watts": None}
    watch = looks(monkeypatch)
    monkeypatch.setattr(attention8_watch, "Watch", lambda: watch)
    with attention8_watch.watched() as seen:
        time.sleep(0.2)
    assert seen == LOOKS and column(seen, "power_w") == [600, 610, 620]


def test_a_lost_sample_ends_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = looks(monkeypatch)
    seen_all(watch, "run")
    with watch("run"):
        time.sleep(0.05)
    assert watch.samples("run") == LOOKS and watch.error is not None and "StopIteration" in watch.error


def library(status: int) -> ModuleType:
    """NVIDIA's library with two GPUs; `status` is what it answers to a question for the power now."""
    module = ModuleType("pynvml")
    value = SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(uiVal=701_500))
    members = {
        "NVMLError": type("NVMLError", (Exception,), {}), "NVML_CLOCK_SM": 1, "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1500 + handle,
        "nvmlDeviceGetPowerUsage": lambda handle: 650_250, "nvmlDeviceGetTemperature": lambda handle, kind: 61,
        "nvmlDeviceGetFieldValues": lambda handle, fields: [value] if fields == [186] else [],
    }  # fmt: skip
    for name, member in members.items():
        setattr(module, name, member)
    return module


def test_the_library_is_asked_for_both_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(0))
    read = watching.reader(1)
    assert read is not None and read() == Sample(1501, 650.25, 61, 701.5)
    monkeypatch.setitem(sys.modules, "pynvml", library(3))  # not supported
    read = watching.reader(0)
    assert read is not None and read() == Sample(1500, 650.25, 61, None)


@pytest.mark.parametrize(
    ("answer", "instant"),
    [("1500, 650.25, 61, 701.50", 701.5), ("1500, 650.25, 61, [N/A]", None), (None, None)],
)
def test_the_command_is_asked_where_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, instant: float | None
) -> None:
    """answer None: an old driver, which refuses the fourth field."""
    command = tmp_path / "nvidia-smi"
    refusal = 'case "$*" in *instant*) exit 2;; esac; '
    command.write_text(f"#!/bin/sh\n{'' if answer else refusal}echo {answer or '1500, 650.25, 61'!r}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read = watching.reader()
    assert read is not None and read() == Sample(1500, 650.25, 61, instant)


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "/nowhere")
    watch = Watch()
    with watch("run"):
        pass
    assert watch.summary("run") == {} and watch.error is None
