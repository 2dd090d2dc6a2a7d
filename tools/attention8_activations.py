"""How our 8-bit attention and libraries err on what layers of the embedded model give it: a section of attention8_proof."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attention8_cases import DEVICE, relative
from torch import Tensor

Attend8 = Callable[..., Tensor]
"""(q, k, v, score_step, v_step, v_mean, dtype) -> output, as in the rows of `dispatch.TABLE`."""


class Compared:
    """A `SelfAttention` that is exact and notes what each way errs by, against fp64, on what it is given."""

    def __init__(self, ways: dict[str, Attend8]) -> None:
        self.ways, self.found = ways, {name: [] for name in ("bf16", *ways)}

    def __call__(self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, step: int) -> Tensor:  # fmt: skip
        from cosmos_fast import ops, ops_attention8

        given = qkv, q_gain, k_gain, cos, sin
        q, k, v = ops.qk_norm_rope(*given)
        out, true = ops.attention(q, k, v), reference_in_fp64(q, k, v)
        self.found["bf16"].append(relative(out.view_as(true), true))
        c = ops_attention8.qkv_codes(*given, pack=True)
        operands = c.q, c.k, c.v, c.score_step, c.v_step, c.v_mean, torch.bfloat16
        for name, attend in self.ways.items():
            self.found[name].append(relative(attend(*operands).view_as(true), true))
        return out.flatten(1)


def reference_in_fp64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(1, 2) * q.shape[2] ** -0.5, -1) @ v).transpose(0, 1)


def activations(ways: dict[str, Attend8], model: str = "edge/distilled") -> Iterator[dict[str, Any]]:
    """Every layer and step of one clip of the embedded model, guided by the edges of an example."""
    from demo import CLIPS, INPUTS

    from cosmos_fast.engine import Engine
    from cosmos_fast.recipe import Plan
    from cosmos_fast.spec import Spec

    noted = Compared(ways)

    class Looking(Engine):
        def _attention(self, heads: int) -> Any:
            return noted

    told = json.loads((CLIPS / "table.json").read_text())
    spec = Spec(
        name="x", prompt=told["prompt"], video_path=CLIPS / INPUTS["video"], edge={"control_weight": 1.0}
    )
    Looking(model=model, plan=Plan(device=DEVICE)).generate(spec)
    means = {name: sum(found) / len(found) for name, found in noted.found.items() if found}
    worst = {name: max(found) for name, found in noted.found.items() if found}
    ok = means["own"] <= 1.02 * means["fa3"] if "fa3" in means else None
    yield {"section": "activations", "name": model, "layers": len(noted.found["bf16"]), "mean": means, "worst": worst, "ok": ok}  # fmt: skip
