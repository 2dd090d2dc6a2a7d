"""Clock, power and temperature of the GPU while something runs, sampled beside it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

PERIOD_S = 0.1
FIELDS = ("sm_mhz", "power_w", "temperature_c")
Sample = tuple[float, float, float]


def _pynvml() -> Callable[[], Sample] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None
    return lambda: (
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _nvidia_smi() -> Callable[[], Sample] | None:
    if shutil.which("nvidia-smi") is None:
        return None

    def sample() -> Sample:
        query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
        )
        clock, power, heat = (float(v) for v in done.stdout.splitlines()[0].split(","))
        return clock, power, heat

    return sample


class Watch:
    """Samples in a thread; `with watch(label):` says what is running. Without a GPU it records nothing."""

    def __init__(self, read: Callable[[], Sample] | None = None) -> None:
        self._read = read or _pynvml() or _nvidia_smi()
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

    def summary(self, label: str) -> dict[str, dict[str, float]]:
        """Median, least and greatest of each quantity while `label` ran; empty where nothing was sampled."""
        samples = self._samples.get(label, [])
        columns = zip(FIELDS, zip(*samples, strict=True), strict=True) if samples else ()
        return {name: {"median": median(c), "min": min(c), "max": max(c)} for name, c in columns}

    def close(self) -> None:
        self._stop.set()
