"""The engines of tools/fidelity.py: of a recipe, with the latents it made; and one that lets others see what it sees.

`start` of adherence_jobs says where things lie; `look` notes the error of every layer and call at some steps of one clip.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "train"), str(ROOT / "bench")]

import adherence_jobs as jobs  # noqa: E402
import fp8_budget  # noqa: E402
from evaluate_model import mean  # noqa: E402
from fidelity_layers import Layers  # noqa: E402
from fidelity_products import Products, watched  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast.engine import Engine  # noqa: E402
from cosmos_fast.network import Pair, Single  # noqa: E402
from cosmos_fast.recipe import Plan, Recipe  # noqa: E402
from cosmos_fast.self_attention8 import fp8  # noqa: E402

RECIPES: dict[str, dict[str, Any]] = {
    "attention": {"attention": "fp8"},
    "linear": {"linear": "fp8"},
    "fp8": {"attention": "fp8", "linear": "fp8"},
    "scheduled": {"attention": "fp8", "linear": "fp8", "attention_head": 0.2, "attention_tail": 0.1},
    "te": {"linear": "fp8_te"},
}
SHARES = (0.0, 0.3, 0.6, 0.97)
"""Where in the schedule layers and calls are looked at."""


def recipe_of(name: str) -> Recipe:
    """exact, or one of RECIPES. On a CPU in fp32, but for recipes that need bf16."""
    changes = RECIPES.get(name, {})
    on_gpu = jobs._where is not None and jobs._where.device.startswith("cuda")
    dtype = "bf16" if on_gpu or "linear" in changes else "fp32"
    return Recipe(name=name, dtype=dtype, **changes)


class Kept(Engine):
    """Keeps the latents of the last chunk it made."""

    latents: Tensor

    def _sample(self, *args: Any, **kwargs: Any) -> Tensor:
        self.latents = super()._sample(*args, **kwargs)
        return self.latents


class Bound(Exception):
    """A network was bound to a chunk; it is what was wanted."""


class Watched(Engine):
    """Exact, and at some steps lets other networks see what it sees."""

    layers: Layers
    products: Products
    others: Mapping[str, Any]
    calls: dict[str, dict[str, list[float]]]
    steps: dict[str, dict[str, float]]
    guidance = 0.0
    binding = False

    def _attention(self, heads: int) -> Any:
        return self.layers

    @contextmanager
    def _as(self, network: Any) -> Iterator[None]:
        mine, self.network = self.network, network
        try:
            yield
        finally:
            self.network = mine

    def _prompts(self, *args: Any) -> Any:
        """What a prompt is to a network depends on its layers, so each reads it."""
        self.read = {}
        for name, network in self.others.items():
            with self._as(network):
                self.read[name] = super()._prompts(*args)
        return super()._prompts(*args)

    def _sample(self, clip: Any, chunk: Any, seed: int, schedule: Any, prompts: Any, *args: Any) -> Tensor:
        self.bound = {}
        for name, network in self.others.items():
            self.binding = True
            try:
                with self._as(network):
                    super()._sample(clip, chunk, seed, schedule, self.read[name], *args)
            except Bound as found:
                self.bound[name] = found.args[0]
            finally:
                self.binding = False
        return super()._sample(clip, chunk, seed, schedule, prompts, *args)

    def _graphed(self, bound: Pair | Single) -> Any:
        if self.binding:
            raise Bound(bound)
        context = bound.cond if isinstance(bound, Pair) else bound.ctx
        steps = context.tables.head.shape[0]
        seen = {round(share * (steps - 1)) for share in SHARES}
        modules = dict(self.network.named_modules())
        self.layers.names = {m.q_gain.data_ptr(): n for n, m in modules.items() if hasattr(m, "attend")}

        def call(z: Tensor, step: int) -> Any:
            for notes in (self.layers, self.products):
                notes.active, notes.step = step in seen, step
            v = bound(z, step)
            self.layers.active = self.products.active = False
            for name, other in self.bound.items() if step in seen else ():
                self._compare(name, step, v, other(z, step))
            return v

        return call

    def _compare(self, name: str, step: int, true: Any, got: Any) -> None:
        table = self.calls.setdefault(name, {})
        pairs = {"velocity": (true, got)}
        if isinstance(true, tuple):
            pairs = {"velocity": (true[0], got[0])}
            if true[1] is not None:
                guided = [c + self.guidance * (c - u) for c, u in (true, got)]
                pairs |= {"without prompt": (true[1], got[1]), "guided": (guided[0], guided[1])}
        for key, (a, b) in pairs.items():
            table.setdefault(key, []).append(fp8_budget.error(b, a))
        self.steps.setdefault(name, {})[str(step)] = table["velocity"][-1]


@cache
def engine(model: str, recipe: str) -> Kept:
    where = jobs._where
    assert where is not None
    return Kept(model=model, recipe=recipe_of(recipe), plan=Plan(device=where.device, graphs=where.graphs))


def look(model: str, names: Sequence[str], steps: int | None) -> dict[str, Any]:
    """Layers and calls of the first clip."""
    where = jobs._where
    assert where is not None
    exact_one = engine(model, "exact")
    # One that computes in the dtype of the exact one beside it: on a CPU those with 8-bit linears do not.
    engines = {name: engine(model, name) for name in names}
    others = {n: e.network for n, e in engines.items() if e.dtype == exact_one.dtype}
    for kind, pattern in fp8_budget.GROUPS.items():
        others[f"only {kind}"] = fp8_budget.only(copy.deepcopy(exact_one.network), pattern)
    Watched.layers = Layers(fp8(exact_one.device))
    Watched.others, Watched.calls, Watched.steps = others, {}, {}
    one = Watched(model=model, recipe=recipe_of("exact"), plan=Plan(device=where.device))
    one.products = watched(one.network)
    spec = jobs.spec_of(jobs.Job(model, 0, {model.partition("/")[0]: 1.0}, (0,), (), "look", steps=steps))
    Watched.guidance = spec.guidance
    one.generate(spec)
    calls = {name: {key: mean(values) for key, values in rows.items()} for name, rows in Watched.calls.items()}  # fmt: skip
    return {"layers": Watched.layers.summary(), "products": one.products.summary(), "calls": calls, "call_steps": Watched.steps}  # fmt: skip
