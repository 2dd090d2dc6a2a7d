"""The networks of bench_scaling.py's loops: one set of weights, run by one GPU and by two in several ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import published
import torch
from torch import Tensor

from cosmos_fast import quant
from cosmos_fast.config import NetworkConfig
from cosmos_fast.exchange import Exchanged
from cosmos_fast.network import Network, Single
from cosmos_fast.network_keys import to_ours
from cosmos_fast.parallel import Group, Halves
from cosmos_fast.self_attention import SelfAttention
from cosmos_fast.self_attention8 import fp8


def bound(
    wanted: list[str], config: NetworkConfig, given: published.Inputs, device: torch.device, cfg: Group,
    tokens: Group, by_copies: Group | None,
) -> dict[str, Any]:  # fmt: skip
    """Name -> call of both passes; "single": one pass of one GPU. What cannot run here is left out.

    cfg, tokens: groups that share the passes, the tokens. by_copies: `tokens` with the exchange by copies, which is the
    default where there is one.
    """
    default, other = (tokens, None) if by_copies is None else (by_copies, tokens)
    with torch.no_grad():
        state = published.random_state(config, 0, device)
        alone = published.build(config, state, device, torch.bfloat16)
        single, pair = published.bind(alone, given)
        calls = {"one": pair, "single": single}
        calls["cfg2"] = Halves(Single(alone, (pair.cond, pair.uncond)[cfg.rank]), cfg)
        for name, group in (("context2", default), ("collectives2", other)):
            if group is not None:
                with torch.device("meta"):
                    shared = Network(config, Exchanged(group), group)
                    shared.load_state_dict(alone.state_dict(), strict=True, assign=True)
                calls[name] = published.bind(shared.eval().requires_grad_(False), given)[1]
        if any(name.startswith("fp8") for name in wanted):
            for name, network in _in_8_bits(config, state, device, default):
                calls[name] = published.bind(network, given)[1]
    return calls


def _in_8_bits(
    config: NetworkConfig, state: dict[str, Tensor], device: torch.device, tokens: Group
) -> Iterator[tuple[str, Network]]:
    """The recipe fp8: linear layers and attention. EnvironmentProblem without a fast library."""
    ways: list[tuple[str, SelfAttention, tuple[Group, ...]]] = [
        ("fp8_one", fp8(device), ()), ("fp8_context2", Exchanged.fp8(tokens, config.heads), (tokens,)),
    ]  # fmt: skip
    for name, attention, group in ways:
        with torch.device("meta"):
            network = Network(config, attention, *group)
        yield name, quant.loaded(network, to_ours(state, config, torch.bfloat16, device), "fp8")
