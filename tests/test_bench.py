"""The benchmarks run, on the CPU too, and a record says what it is a record of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    # A process of its own, not a worker of the run that this test belongs to: workers measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_benchmark_option_records_candidates_side_by_side(tmp_path: Path) -> None:
    done = run("--benchmark", "--benchmark-cpu", f"--benchmark-results={tmp_path}", "-k", "adaln and small")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*-adaln.json")
    record = json.loads(path.read_text())
    assert record["environment"]["torch"] == torch.__version__ and record["environment"]["date"]
    rows = [row for row in record["rows"] if row["op"] == "residual_adaln" and row["case"] == "small"]
    assert "reference" in {row["candidate"] for row in rows}
    for row in rows:
        assert row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["launches"] >= 7
        assert row["bytes"] == 4 * 64 * 256 * 2


def test_benchmarks_say_why_they_skip_without_a_gpu() -> None:
    if torch.cuda.is_available():
        return
    done = run("--benchmark", "-rs", "-k", "adaln")
    assert "needs a CUDA device; --benchmark-cpu" in done.stdout, done.stdout
    assert " passed" not in done.stdout


PEER = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/bench"]
import vae
for fakes in sys.argv[1:]:
    if not os.fork():  # a process for each: what one imported, the next must not find
        sys.path.insert(0, fakes)
        print(vae.import_peer(), "hidden" if "transformer_engine" in sys.modules else "open", flush=True)
        os._exit(0)
    os.wait()
"""


def imported_peers(folder: Path, *diffusers: str) -> list[str]:
    """What the import says to each of these packages of diffusers."""
    for index, text in enumerate(diffusers):
        for name, code in (("transformer_engine", "raise OSError('another cuDNN')"), ("diffusers", text)):
            (folder / str(index) / name).mkdir(parents=True)
            (folder / str(index) / name / "__init__.py").write_text(code)
    fakes = [str(folder / str(index)) for index in range(len(diffusers))]
    command = [sys.executable, "-c", PEER.format(root=str(ROOT)), *fakes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_peer_is_imported_without_what_it_does_not_need(tmp_path: Path) -> None:
    asks = "import importlib.util as u\nif u.find_spec('transformer_engine'): import transformer_engine\n"
    needs = "AutoencoderKLWan = 1; import transformer_engine"
    found = imported_peers(tmp_path, asks + "AutoencoderKLWan = 1", needs, "raise OSError('broken')")
    assert len(found) == 3
    assert found[0] == "None open"
    assert found[1].startswith("ModuleNotFound")
    assert found[2] == "OSError: broken open"
