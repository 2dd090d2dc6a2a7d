"""tools/bench_fp8.py and bench_fp8_attention.py: what they record, and that what a machine lacks or has no time for costs no more."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import bench_fp8  # noqa: E402
import bench_fp8_attention  # noqa: E402
import fp8_calls  # noqa: E402
import fp8_linears  # noqa: E402
import fp8_producers  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402

from cosmos_fast import ops_linear8, te_linears  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.formats import EnvironmentProblem  # noqa: E402


def test_a_call_by_recipe_and_what_this_machine_lacks(tmp_path: Path) -> None:
    out = tmp_path / "results" / "gpu-x" / "a.json"
    out.parent.mkdir(parents=True)
    options = ("--smoke", "--skip-peers", "--rounds", "1", "--only", "call", "--out", str(out))
    assert bench_fp8.main(list(options)) == 0
    record = json.loads(out.read_text())
    assert {entry["status"] for entry in record["sections"].values()} == {"ok"}
    recipes = record["call"]["recipes"]
    assert set(record["call"]["variants"]) == {"exact", "fp8", "fp8_linear"}
    assert recipes["fp8"]["attention"] == "emulated" and "needs a cuda tensor" in recipes["fp8_fa3"]["error"]
    assert recipes["exact"]["relative_l2_to_exact"] == 0 < recipes["fp8"]["relative_l2_to_exact"] < 0.1
    assert recipes["fp8"]["weights_gib"] < 0.6 * recipes["exact"]["weights_gib"]
    assert set(record["call"]["kernels"]) == {"exact", "fp8"}
    assert report.figures(report.load(tmp_path / "results")) == {}, "a smoke run is no result"
    out.write_text(json.dumps(record | {"args": {}}))
    figures = report.figures(report.load(tmp_path / "results"))
    assert {"denoiser_call_s.fp8", "denoiser_weights_gib.fp8", "rounding_share.fp8"} <= set(figures)


def test_a_block_does_each_of_its_products_once_and_says_how_many_flop_that_is(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    without = "call libraries,call fp8_linear,call times,call kernels,te qkv,te out"
    options = ("--smoke", "--skip-peers", "--rounds", "1", "--only", "call,te", "--without", without)
    assert bench_fp8.main([*options, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert not set(without.split(",")) & set(record["sections"]) and record["call"]["variants"] == {}
    block, c = record["linears"]["block"], NetworkConfig.tiny()
    flop = 2 * 64 * (6 * c.width**2 + 2 * c.width * c.mlp_width)
    for way in ("bf16", "fp8"):
        assert block[way]["tflop_s"] * block[way]["ms"] * 1e9 == pytest.approx(flop)
    assert "needs a CUDA device" in block["te, current scaling"]["error"]
    assert block["bf16"]["relative_l2"] == 0 < block["fp8"]["relative_l2"] < 0.1
    assert record["call"]["recipes"]["fp8_te"]["error"]
    assert set(record["te_call"]["variants"]) == set(record["te_call"]["recipes"]) == {"exact", "fp8"}


def test_the_products_that_count_are_those_that_a_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(smoke=True, rounds=1)
    bench = SimpleNamespace(args=args, device=torch.device("cpu"), config=NetworkConfig.tiny())
    said: list[float] = []
    done: list[float] = []

    def counting(product: Any) -> Any:
        def counted(x: Any, weight: Tensor, *rest: Any) -> Any:
            if x.codes.shape[0] == 64:  # the proof has 200 rows
                done.append(2.0 * 64 * weight.numel())
            return product(x, weight, *rest)

        return counted

    def part(self: Any, name: str, ways: Any, flop: float, exact: Any) -> None:
        said.append(flop)
        with torch.no_grad():
            ways["fp8"]()()

    monkeypatch.setattr(fp8_linears.Linears, "part", part)
    for name in ("linear", "linear_gelu"):
        monkeypatch.setattr(ops_linear8, name, counting(getattr(ops_linear8, name)))
    fp8_linears.Linears(bench).block()  # type: ignore[arg-type]
    assert said == [sum(done)] and len(done) == 6


def test_launch_choices_are_named_as_the_constants_to_set() -> None:
    found = {"q, k": {"4/4": 1.0, "8/8": 0.995, "2/4": 2.0}, "v": {"128/8": 1.0, "64/4": 0.5}, "moments": {}}
    present = dict.fromkeys(fp8_producers.CONSTANTS, "128/8") | {"q, k": "4/4"}
    assert fp8_producers.winners(found, present) == [
        "ROTATED = Config(4, 4)  # 1.000 ms", "VALUES = Config(64, 4)  # 0.500 ms, 128/8 1.000 ms",
    ]  # fmt: skip
    from cosmos_fast import testing

    testing.kernels_from_checkout()
    source = (ROOT / "kernels" / "qkv_codes.py").read_text()
    assert all(f"\n{name} = Config(" in source for name in fp8_producers.CONSTANTS.values())


def test_attention_past_its_time_is_written_and_no_error(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert bench_fp8_attention.main([str(out), "--smoke", "--only", "errors", "--deadline-s", "1e-9"]) == 0
    assert not out.exists(), "nothing was begun"
    assert bench_fp8_attention.main([str(out), "--smoke", "--only", "attention", "--rounds", "1"]) == 0
    assert "emulated fp8" in json.loads(out.read_text())["attention"]


# --- Transformer Engine, which only a GPU has: its interface, as of 2.20 -------------------------------


class FakeLinear(nn.Module):
    """Keeps fp8 weights where it was made inside `quantized_model_init`, and asks for rows by sixteens."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: Any
    ) -> None:
        super().__init__()
        assert not bias and (state["stored"] is None or not torch.is_grad_enabled())
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=params_dtype, device=device))
        self.stored, self.told = state["stored"], []

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        assert state["inside"] is not None, "outside of a region it computes in bf16"
        assert x.shape[0] % 16 == 0 and x.is_contiguous()
        self.told.append(is_first_microbatch)
        return x @ self.weight.T


state: dict[str, Any] = {"stored": None, "inside": None}


@contextmanager
def setting(key: str, value: Any) -> Any:
    before, state[key] = state[key], value
    try:
        yield
    finally:
        state[key] = before


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    package, recipes = (
        ModuleType("transformer_engine.pytorch"),
        ModuleType("transformer_engine.common.recipe"),
    )
    package.Linear = FakeLinear  # type: ignore[attr-defined]
    package.autocast = lambda recipe=None: setting("inside", recipe)  # type: ignore[attr-defined]
    package.quantized_model_init = lambda enabled, recipe: setting("stored", recipe)  # type: ignore[attr-defined]
    recipes.Float8CurrentScaling = lambda: "current"  # type: ignore[attr-defined]
    recipes.DelayedScaling = lambda amax_history_len: f"delayed {amax_history_len}"  # type: ignore[attr-defined]
    support = ModuleType("transformer_engine.pytorch.quantization")
    support.check_fp8_support = lambda: (True, "")  # type: ignore[attr-defined]
    for module in (package, recipes, support):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(te_linears, "engine", lambda device: package)


def plain() -> nn.Linear:
    return nn.Linear(32, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)


def test_layers_of_transformer_engine_store_codes_and_take_any_number_of_rows(engine: None) -> None:
    layer = plain()
    one = te_linears.TeLinear(layer)
    x = torch.randn(21, 32, dtype=torch.bfloat16)
    assert torch.equal(one(x), layer(x)) and one.inner.stored == "current" and state["inside"] is None
    assert not one.inner.weight.requires_grad


def test_delayed_scaling_settles_before_weights_are_kept(engine: None) -> None:
    layer = plain()
    one = fp8_linears.TeDelayed(layer)
    fp8_linears.delayed_recipe.cache_clear()
    call = fp8_linears.delayed(lambda: one(torch.ones(16, 32, dtype=torch.bfloat16)))
    with torch.no_grad():
        for _ in range(6):
            call()
    assert one.inner.told == [True] * 4 + [False] * 2 and one.inner.stored is None
    fp8_linears.delayed_recipe.cache_clear()


# --- one cuDNN in a process ----------------------------------------------------------------------------

PARTS = ("adv", "cnn", "graph", "heuristic", "ops")


class Process:
    """torch beside its own cuDNN, a second one in the system, and what is loaded of them."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own, self.system = place / "site" / "nvidia" / "cudnn" / "lib", place / "system lib"
        for folder in (self.own, self.system):
            folder.mkdir(parents=True)
            for name in ("libcudnn", *(f"libcudnn_{part}" for part in PARTS)):
                (folder / f"{name}.so.9").touch()
        self.maps, self.loaded = place / "maps", []
        monkeypatch.setattr(te_linears, "MAPS", self.maps)
        monkeypatch.setattr(torch, "__file__", str(place / "site" / "torch" / "__init__.py"))
        monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: self.loaded.append((Path(path), mode)))
        for name in ("CUDNN_HOME", "CUDNN_PATH"):
            monkeypatch.delenv(name, raising=False)

    def holds(self, *libraries: Path) -> None:
        lines = (f"7f00{i:04x}-7f01{i:04x} r-xp 00000000 08:01 {i} {x}" for i, x in enumerate(libraries))
        self.maps.write_text("55aa-55ab r--p 0 08:01 3 /usr/bin/python3\n" + "\n".join(lines) + "\n7ffc-7ffd rw-p 0 00:00 0 [stack]\n")  # fmt: skip


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(tmp_path, monkeypatch)


def test_transformer_engine_finds_the_cudnn_of_torch_and_all_of_its_parts(process: Process) -> None:
    process.holds(process.own / "libcudnn.so.9", process.own / "libcudnn_graph.so.9")
    with te_linears.torchs_cudnn() as folder:
        assert folder == process.own and os.environ["CUDNN_HOME"] == str(process.own)
    assert "CUDNN_HOME" not in os.environ
    assert [path.name for path, _ in process.loaded] == [
        f"libcudnn_{part}.so.9" for part in ("graph", "adv", "cnn", "heuristic", "ops")
    ]
    assert all(path.parent == process.own and mode & ctypes.RTLD_GLOBAL for path, mode in process.loaded)


def test_a_shim_of_the_system_that_a_peer_left_behind_is_not_torchs(process: Process) -> None:
    process.holds(process.system / "libcudnn.so.9.8.0", process.own / "libcudnn.so.9")
    assert te_linears.cudnn_folder() == process.own
    process.holds(process.system / "libcudnn.so.9.8.0")
    assert te_linears.cudnn_folder() == process.system, "a torch that was built with it"


@pytest.mark.parametrize("name", ["CUDNN_HOME", "CUDNN_PATH"])
def test_where_the_user_says_where_cudnn_is_that_stands(
    process: Process, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    process.holds(process.own / "libcudnn.so.9")
    monkeypatch.setenv(name, "/elsewhere")
    with te_linears.torchs_cudnn():
        assert os.environ[name] == "/elsewhere" and len({"CUDNN_HOME", "CUDNN_PATH"} & os.environ.keys()) == 1
    assert os.environ[name] == "/elsewhere" and len(process.loaded) == len(PARTS)


def test_parts_of_two_are_named(process: Process) -> None:
    process.holds(process.own / "libcudnn.so.9", process.system / "libcudnn_heuristic.so.9.8.0")
    with pytest.raises(EnvironmentProblem, match=r"one cuDNN must be loaded, torch's, got parts from .*system lib.*CUDNN_HOME"):  # fmt: skip
        te_linears.imported()
    assert not process.loaded


def test_without_cudnn_or_maps_nothing_is_loaded(process: Process) -> None:
    for text in ("", None):
        process.maps.unlink(missing_ok=True)
        if text is not None:
            process.maps.write_text(text)
        with te_linears.torchs_cudnn() as folder:
            assert folder is None and "CUDNN_HOME" not in os.environ
    assert not process.loaded


def test_a_library_that_does_not_fit_says_what_to_set(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("/lib/libcudnn_cnn.so.9: undefined symbol: x, version libcudnn_graph.so.9")

    process.holds(process.own / "libcudnn.so.9")
    monkeypatch.setattr(te_linears, "import_module", broken)
    monkeypatch.delitem(sys.modules, "transformer_engine.pytorch", raising=False)
    with pytest.raises(EnvironmentProblem) as caught:
        te_linears.imported()
    assert f"LD_LIBRARY_PATH set to torch's cuDNN, {process.own}, or use" in str(caught.value)
    assert "CUDNN_HOME" not in os.environ


def test_peers_do_as_if_transformer_engine_were_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("engine_of_tests", "engine_of_tests.part"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kept = ModuleType("engine_of_tests_not")
    monkeypatch.setitem(sys.modules, kept.__name__, kept)
    before = {name: sys.modules[name] for name in ("engine_of_tests", "engine_of_tests.part")}
    with peers.absent("engine_of_tests"):
        assert importlib.util.find_spec("engine_of_tests") is None and sys.modules[kept.__name__] is kept
        for name in before:
            with pytest.raises(ImportError):
                importlib.import_module(name)
    assert all(sys.modules[name] is module for name, module in before.items())
    with pytest.raises(ZeroDivisionError), peers.absent("never_loaded"):
        raise ZeroDivisionError
    assert "never_loaded" not in sys.modules


def test_every_kernel_that_makes_codes_counts_as_rounding() -> None:
    """A kernel renamed or added must not leave the share of a call that codes take."""
    for file in ("qkv_codes", "value_codes", "attended_steps"):
        source = (ROOT / "kernels" / f"{file}.py").read_text(encoding="utf-8")
        launched = re.findall(r"(\w+)\[\(.*\)\]\(", source)
        assert launched and all(fp8_calls.ROUNDING.search(name) for name in launched), (file, launched)
