"""Clock, power and temperature of a GPU while something runs, sampled beside it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

PERIOD_S = 0.1
QUERY = ("clocks.sm", "power.draw", "temperature.gpu", "power.draw.instant")
"""What nvidia-smi calls the fields of a Sample. Older drivers do not know the last."""
POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT of nvml.h, which not every pynvml names."""


class Sample(NamedTuple):
    """One look at a GPU. power_w is the board's mean over the last second, instant_w its power now, None if unknown."""

    sm_mhz: float
    power_w: float
    temperature_c: float
    instant_w: float | None = None


Reader = Callable[[], Sample]


def reader(index: int = 0) -> Reader | None:
    """Reads one GPU by its number, with NVIDIA's library or else its command; None where there is neither."""
    return _pynvml(index) or _nvidia_smi(index)


def _pynvml(index: int) -> Reader | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError:
        return None
    return lambda: Sample(
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        _instant(pynvml, handle),
    )


def _instant(pynvml: Any, handle: Any) -> float | None:
    try:
        (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT])
    except (pynvml.NVMLError, AttributeError):  # AttributeError: a pynvml without field values
        return None
    return field.value.uiVal / 1e3 if field.nvmlReturn == 0 else None


def _nvidia_smi(index: int) -> Reader | None:
    if shutil.which("nvidia-smi") is None:
        return None

    def ask(fields: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        form = "--format=csv,noheader,nounits"
        command = ["nvidia-smi", "-i", str(index), f"--query-gpu={','.join(fields)}", form]
        return subprocess.run(command, capture_output=True, text=True)

    known = QUERY if ask(QUERY).returncode == 0 else QUERY[:3]

    def sample() -> Sample:
        done = ask(known)
        done.check_returncode()
        told = [text.strip() for text in done.stdout.splitlines()[0].split(",")]
        instant = float(told[3]) if len(told) > 3 and "N/A" not in told[3] else None
        return Sample(float(told[0]), float(told[1]), float(told[2]), instant)

    return sample


class Watch:
    """Samples in a thread; `with watch(label):` says what is running. Without a GPU it records nothing."""

    def __init__(self, read: Reader | None = None) -> None:
        self._read = read or reader()
        self._label: str | None = None
        self._samples: dict[str, list[Sample]] = {}
        self._stop = threading.Event()
        self.error: str | None = None
        if self._read is not None:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            label = self._label
            if label is None or self._read is None:
                continue
            try:
                self._samples.setdefault(label, []).append(self._read())
            except Exception as error:  # whatever a driver says: a lost sample must not end a measurement
                self.error = f"{type(error).__name__}: {error}"
                return

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        self._label = label
        try:
            yield
        finally:
            self._label = None

    def samples(self, label: str) -> list[Sample]:
        """What was seen while `label` ran, a tenth of a second apart."""
        return list(self._samples.get(label, []))

    def summary(self, label: str) -> dict[str, dict[str, float]]:
        """Median, least and greatest of each quantity while `label` ran; what was never sampled is left out."""
        samples = self.samples(label)
        columns = {name: column(samples, name) for name in Sample._fields}
        return {name: {"median": median(c), "min": min(c), "max": max(c)} for name, c in columns.items() if c}

    def close(self) -> None:
        self._stop.set()


def column(samples: list[Sample], name: str) -> list[float]:
    """One quantity of the samples that know it."""
    return [value for sample in samples if (value := getattr(sample, name)) is not None]
