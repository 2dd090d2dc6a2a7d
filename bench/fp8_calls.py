"""What tools/bench_fp8.py measures of whole calls of the denoiser: one recipe after the other, then all in turns.

Every network is made by itself, from weights drawn again, so that what it holds and what it takes more during a call is
its own. A way that this machine lacks is a row with its reason.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from trace import trace
from typing import Any

import fp8_budget
import published
import torch
from denoiser import STEP, Bench
from fp8_linears import Call, forced
from published import gib, relative_l2
from torch import Tensor, nn

from cosmos_fast import quant
from cosmos_fast.dispatch import TABLE
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.network import Network, Single
from cosmos_fast.network_keys import to_ours
from cosmos_fast.self_attention import SelfAttention, exact
from cosmos_fast.self_attention8 import SLOW, fp8

ROUNDING = re.compile(
    r"quantise|codes_kernel|moments|sums|restored|attended_steps|cast|amax|scale_update", re.IGNORECASE
)
"""Kernels that make codes, or what codes need. Normalisation that gives codes on the way is none of them."""
INSTEAD_OF = re.compile(r"qk_norm_rope")
"""Kernels of the exact recipe whose work those that make codes of q and k do as well."""
SETTLE_CALLS, LEAST_ROUNDS = 1, 2


class Calls:
    """Networks that have been made and the call of each. key: where the record keeps what is found of them."""

    def __init__(self, b: Bench, key: str = "call") -> None:
        self.b, self.key = b, key
        self.grid = b.grids["720"]
        self.calls: dict[str, Call] = {}
        self.velocity: Tensor | None = None  # of the exact recipe
        self.resident: dict[str, float] = {}

    @property
    def out(self) -> dict[str, Any]:
        found: dict[str, Any] = self.b.record.setdefault(
            self.key, {"grid": self.grid, "recipes": {}, "variants": {}}
        )
        return found

    def given(self) -> published.Inputs:
        return published.inputs(self.b.config, self.grid, self.b.device, torch.bfloat16)

    def network(self, linear: str, attend: SelfAttention = exact) -> Network:
        with torch.device("meta"):
            net = Network(self.b.config, attend)
        state = published.random_state(self.b.config, 0, self.b.device)
        return quant.loaded(net, to_ours(state, self.b.config, torch.bfloat16, self.b.device), linear)

    def bound(self, net: Network) -> Single:
        return published.bind(net, self.given())[0]

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """The row of a way; what this machine lacks for it is said there and is no failure."""
        row: dict[str, Any] = {}
        self.out["recipes"][name] = row
        try:
            yield row
        except EnvironmentProblem as error:
            row |= {"error": str(error)[:500]}
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            raise
        finally:
            print(f"call {name}: {row}", flush=True)

    # --- ways ---

    def recipe(self, name: str, linear: str, attention: str = "bf16") -> None:
        """Make a network and call it: seconds of the first call, GiB, and how far its velocity is from the exact one."""
        with self.row(name) as row:
            before = self.held()
            net = self.network(linear, exact if attention == "bf16" else fp8(self.b.device))
            row["weights_gib"] = gib(held_bytes(net))
            single, z = self.bound(net), self.given().z[None]
            self.measured(name, lambda: single(z, STEP), row, before)
            if attention == "fp8":
                row["attention"] = TABLE["attention_fp8"].chosen[self.b.device.type, torch.float8_e4m3fn][0]
            if name == "exact":
                self.b.network = net  # the peer computes with its weights

    def libraries(self, of: str = "fp8") -> None:
        """The recipe's network with its self-attention by every other library that runs here."""
        for candidate in TABLE["attention_fp8"].candidates:
            if candidate.name not in (*SLOW, "triton", self.out["recipes"].get(of, {}).get("attention")):
                with self.row(f"{of}_{candidate.name}") as row:
                    if of not in self.calls:
                        raise EnvironmentProblem(f"{of}: its network is needed, got none. It was not made.")
                    call = forced(self.calls[of], attention_fp8=candidate.name)
                    self.measured(
                        f"{of}_{candidate.name}", call, row, self.held() - self.resident.get(of, 0.0)
                    )
                    row["attention"] = candidate.name

    def measured(self, name: str, call: Call, row: dict[str, Any], before: float | None = None) -> None:
        start = self.b.sync()
        v = call()
        row["first_call_s"] = self.b.sync() - start
        self.velocity = v if name == "exact" else self.velocity
        if self.velocity is not None:
            row["relative_l2_to_exact"] = relative_l2(v, self.velocity)
        start = self.b.sync()
        row |= self.b.memory(call)
        row["second_call_s"] = self.b.sync() - start
        if "peak_gib" in row and before is not None:
            row |= {f"own_{key}": row[key] - before for key in ("resident_gib", "peak_gib")}
            self.resident[name] = row["own_resident_gib"]
        self.calls[name] = call

    def compiled(self) -> None:
        """diffusers on the exact network's weights, every block compiled."""
        name, given = "diffusers_compiled", self.given()
        with self.row(name) as row:
            if "exact" not in self.calls:
                raise EnvironmentProblem(f"{name}: the exact network is needed for its weights, got none.")
            call = self.b.peer_calls(given)[name]
            # It computes with our exact weights, which count as its own.
            self.measured(name, call, row, self.held() - self.out["recipes"]["exact"]["weights_gib"])

    # --- in turns ---

    def times(
        self, names: Iterable[str] | None = None, rounds: int | None = None, end_s: float = float("inf"),
        key: str | None = None,
    ) -> None:  # fmt: skip
        """Every way in turns, as often as fits in the time, at most `rounds` times. key: another place in the record."""
        chosen = {n: c for n, c in self.calls.items() if names is None or n in names}
        if not chosen:
            raise RuntimeError("times: some way must have run, got none.")
        first = next(iter(chosen.values()))
        for _ in range(SETTLE_CALLS if self.b.device.type == "cuda" else 0):
            first()
        each = sum(self.out["recipes"][n]["second_call_s"] for n in chosen)
        left = end_s - (time.perf_counter() - self.b.started)
        wanted = rounds or self.b.args.rounds
        count = min(wanted, max(LEAST_ROUNDS, int(left / each))) if left < float("inf") else wanted
        rows = self.b.interleave(chosen, count, "call", settle_s=0.0)
        if key is None or key == self.key:
            self.out["variants"] |= rows
        else:
            known = {name: self.out["recipes"][name] for name in chosen}
            self.b.record[key] = {"grid": self.grid, "recipes": known, "variants": rows}
        for name, row in rows.items():
            clock = {key: round(value["median"]) for key, value in row["gpu"].items()}
            print(f"call {name:20s} {row['median_s']:8.4f} s  iqr {row['iqr_s']:.4f}  {clock}", flush=True)

    def kernels(self, names: Iterable[str]) -> None:
        """Kernels of one call, by class, and the share of those that are there for codes alone."""
        out = self.out.setdefault("kernels", {})
        replaced = 0.0  # ms of what the exact recipe does in place of codes, where its call was traced before
        for name in names:
            if name not in self.calls:
                continue
            found = trace(self.calls[name], self.b.device)
            made = sum(r.ms for r in found.rows if ROUNDING.search(r.name))
            if name == "exact":
                replaced = sum(r.ms for r in found.rows if INSTEAD_OF.search(r.name))
            rounding = max(0.0, made - replaced) if name != "exact" else made
            out[name] = found.as_dict() | {
                "codes_ms": made,
                "rounding_ms": rounding,
                "rounding_share": rounding / found.span_ms,
            }
            out[name]["kernels"] = out[name]["kernels"][:40]
            print(
                f"\n== kernels: {name}, rounding {100 * rounding / found.span_ms:.2f} %\n{found.table(16)}",
                flush=True,
            )

    # --- what each kind of layer costs ---

    def budget(self, steps: Iterable[int]) -> None:
        """Error of the velocity with one kind of layer in 8 bits and the others exact; of all, at several steps."""
        found: dict[str, dict[str, float]] = {}
        self.b.record["budget"] = {"grid": self.grid, "relative_l2": found}
        z, steps, failed = self.given().z[None], list(steps), []
        net: Network | None = self.network("bf16")
        bound: Single | None = self.bound(net)
        true = {step: bound(z, step) for step in steps}
        net = bound = None
        ways: dict[str, Callable[[], tuple[Network, list[int]]]] = {
            "all": lambda: (self.network("fp8", fp8(self.b.device)), steps),
            "self-attention": lambda: (self.network("bf16", fp8(self.b.device)), [STEP]),
        }
        ways |= {name: partial(self._only, pattern) for name, pattern in fp8_budget.GROUPS.items()}
        for name, make in ways.items():
            if self.b.is_late():
                break
            self.b.clear()
            try:
                net, at = make()
                bound = self.bound(net)
                found[name] = {str(step): relative_l2(bound(z, step), true[step]) for step in at}
            except Exception as error:  # a kind of layer that fails must not hide the others
                found[name] = {}
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(f"budget {name:28s} {found[name] or failed[-1]}", flush=True)
            net = bound = None
        if failed:
            raise RuntimeError("budget: " + "; ".join(failed))

    def _only(self, pattern: str) -> tuple[Network, list[int]]:
        return fp8_budget.only(self.network("bf16"), pattern), [STEP]

    def held(self) -> float:
        gc.collect()
        return gib(torch.cuda.memory_allocated()) if self.b.device.type == "cuda" else 0.0


def held_bytes(net: nn.Module) -> int:
    """Bytes of parameters and buffers; of Transformer Engine's those of the codes, not of what they stand for."""
    total = 0
    for tensor in chain(net.parameters(), net.buffers()):
        parts = [getattr(tensor, name, None) for name in ("_data", "_transpose", "_scale_inv")]
        parts = [p for p in parts if p is not None] or [tensor]
        total += sum(p.numel() * p.element_size() for p in parts)
    return total
