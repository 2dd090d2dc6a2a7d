"""One denoiser call and one guided pair beside diffusers, through pytest-benchmark; the full record is tools/bench_denoiser.py.

Our weights are built once and the peer works on the same ones. A call is compute-bound: look at % of the measured GEMM peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published
import pytest
import roofline
import torch
from peers import Diffusers

from cosmos_fast import costs
from cosmos_fast.config import NetworkConfig

STEP = 10
CASES = {
    "production": {"720p": (24, 88, 160), "480p": (24, 54, 96), "image": (1, 88, 160)},
    "small": {"small": (2, 6, 10)},
}
NAMES = sorted({name for cases in CASES.values() for name in cases})


@pytest.fixture(scope="module")
def network(device: torch.device, size: str) -> Any:
    config = NetworkConfig.single() if size == "production" else NetworkConfig.tiny()
    with torch.no_grad():
        return published.build(config, published.random_state(config, 0, device), device, torch.bfloat16)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def bench_network(
    name: str, prompts: int, size: str, device: torch.device, network: Any, versus: Callable[..., Any]
) -> None:
    if name not in CASES[size]:
        pytest.skip(f"a case of another size than {size}")
    T, H, W = CASES[size][name]
    config: NetworkConfig = network.config
    given = published.inputs(config, (T, H, W), device, torch.bfloat16)
    tau = given.times[STEP].to(device) * config.timestep_scale
    peer = Diffusers(config, published.published(network))
    texts = (given.text, given.negative)[:prompts]
    with torch.no_grad():
        bound = published.bind(network, given)[prompts - 1]

    @torch.no_grad()
    def ours(z: torch.Tensor) -> Any:
        return bound(z[None], STEP)

    def theirs(z: torch.Tensor) -> Any:
        return [peer(z, given.control, text, tau) for text in texts]

    calls = {"ours": ours, "diffusers": theirs}
    if device.type == "cuda":
        compiled = Diffusers(config, published.published(network))
        compiled.compile()
        torch._dynamo.reset()  # another size is another program
        calls["diffusers_compiled"] = lambda z: [compiled(z, given.control, text, tau) for text in texts]
    flop = int(prompts * costs.network_flop(T * H * W // 4, config))
    work = roofline.Work(published.weight_bytes(network), flop)
    rows = versus("network", f"{name}-{prompts}", calls, lambda: (given.z,), work)
    assert "median_ms" in rows["ours"] and "median_ms" in rows["diffusers"]
