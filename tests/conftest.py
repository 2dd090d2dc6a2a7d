"""Seeds, the device fixture, and the reasons why a marked test cannot run on this machine."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

with contextlib.suppress(ImportError):
    # A software renderer brings an LLVM of its own; in a process that has loaded that one, Triton's crashes on import.
    # Any file may be the first of a process, so the order is settled here.
    import triton  # noqa: F401

if not torch.cuda.is_available():
    # The networks here are too small to share out: a second thread gains nothing on idle cores, and where cores are
    # busy its waiting makes some tests take four times as long.
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too
    torch.set_num_threads(int(threads))

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.round_codes()


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _obstacle(item: pytest.Item) -> str | None:
    marks = {mark.name for mark in item.iter_markers()}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if "multigpu" in marks and _gpus() < 2:
        return f"needs two CUDA devices, this machine has {_gpus()}"
    if "gpu" in marks and _gpus() < 1:
        return "needs a CUDA device, this machine has none"
    if "interpret" in marks and not interpreted:
        return "needs TRITON_INTERPRET=1 before Triton is imported (make test-interpret)"
    return None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu`, `-m "gpu or multigpu"` or `-m interpret`: files without such a test are not even imported, which saves
    time, and a GPU machine needs no package that only they need."""
    wanted = {word for word in (config.option.markexpr or "").split() if word != "or"}
    if (
        not wanted
        or not wanted <= {"gpu", "multigpu", "interpret"}
        or not collection_path.name.startswith("test_")
    ):
        return None
    text = collection_path.read_text(encoding="utf-8")
    return None if any(f"mark.{name}" in text for name in wanted) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files are handed out in this order: none that takes long is begun when the others are done.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        reason = _obstacle(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """cuda in tests marked gpu or multigpu, cpu in all others."""
    on_gpu = any(request.node.get_closest_marker(name) for name in ("gpu", "multigpu"))
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest complete set of weights, in the published layout; read-only for tests."""
    import system

    return system.make_models(tmp_path_factory.mktemp("models"))
