"""What a new process pays before its first denoiser call, printed as one line of JSON.

    TRITON_CACHE_DIR=empty python bench/first_call.py --grid 1,88,160     cold: Triton compiles
    TRITON_CACHE_DIR=empty python bench/first_call.py --grid 1,88,160     warm: what the process before left on disk is used

Seconds: `import`, `context` (of the device), `build` (random weights on the device), `prepare` (prompts, controls, tables), `first_call`, `call` (the
second), `capture` (both prompts as a CUDA graph, None on a CPU). `compile` is first_call - call. Which kernels are compiled
depends on no size that --grid changes, so a small grid is as good as a large one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEP = 10


def measure(grid: tuple[int, int, int], smoke: bool) -> dict[str, Any]:
    """Run in a process that has imported nothing yet."""
    start = time.perf_counter()
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]
    import published
    import torch

    from cosmos_fast import testing
    from cosmos_fast.config import NetworkConfig
    from cosmos_fast.dispatch import pick_device
    from cosmos_fast.graphs import Graphed

    testing.kernels_from_checkout()
    device = pick_device("cpu" if smoke else "cuda")
    marks: dict[str, Any] = {"import": time.perf_counter() - start}

    def timed(name: str, call: Any) -> Any:
        begin = time.perf_counter()
        out = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks[name] = time.perf_counter() - begin
        return out

    config = NetworkConfig.tiny() if smoke else NetworkConfig.single()
    with torch.no_grad():
        timed("context", lambda: torch.zeros(1, device=device))
        network = timed(
            "build",
            lambda: published.build(
                config, published.random_state(config, 0, device), device, torch.bfloat16
            ),
        )
        given = published.inputs(config, grid, device, torch.bfloat16)
        single, pair = timed("prepare", lambda: published.bind(network, given))
        z = given.z[None]
        timed("first_call", lambda: single(z, STEP))
        timed("call", lambda: single(z, STEP))
        marks["capture"] = None
        if device.type == "cuda":
            graphed = Graphed(pair)
            timed("first_pair_graph", lambda: graphed(z, STEP))
            marks["capture"] = graphed.capture_s
    return marks | {"compile": marks["first_call"] - marks["call"], "grid": grid}


def cold_and_warm(grid: tuple[int, int, int], folder: Path, smoke: bool = False) -> dict[str, Any]:
    """Two processes after one another, with one cache of compiled kernels that is empty at first: {cold, warm}."""
    command = [sys.executable, __file__, "--grid", ",".join(map(str, grid)), *(["--smoke"] if smoke else [])]
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "CUDA_CACHE_PATH": str(folder / "cuda")}
    found = {}
    for name in ("cold", "warm"):
        start = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"first_call: the {name} process failed: {done.stderr[-1500:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--grid", default="1,88,160", help="T,H,W of the latent")
    parser.add_argument("--smoke", action="store_true", help="tiny network on the CPU")
    options = parser.parse_args()
    T, H, W = map(int, options.grid.split(","))
    print(json.dumps(measure((T, H, W), options.smoke)))
