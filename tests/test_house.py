"""House rules that a machine can check: layers, file sizes, forbidden names, lean import, honest README."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cosmos_fast"
MODULES = sorted(PACKAGE.glob("*.py"))

# Layer -> (nouns, helpers). Imports go down. Inside a layer a noun never imports another noun: what two nouns share
# is a helper, a leaf that both import. Helpers may import helpers; cycles are impossible anywhere.
LAYERS: dict[int, tuple[str, str]] = {
    0: (
        "recipe spec video controls chunking checkpoint registry outputs",
        "formats config schedule stages inputs guards rules jsonc control_spec sidecar video_sniff video_decode "
        "video_probe video_write disk_cache segments network_keys vae_keys vae_rows worker checkpoint_file safe_pickle safetensors_file torch_file weight_file fp8_weights lowbit embedded resample vision_tower",
    ),
    1: ("attention attention8 codes8 convolution kernels", "reference packing reference_vae _native"),
    2: ("ops", "dispatch operands"),
    3: (
        "quant parallel",
        "self_attention self_attention8 ops_attention8 linears te_linears ops_linear8 ops_tiles ops_vae ops_exchange copies peer_memory streams",
    ),
    4: (
        "network vae text text_cache depth segmentation tiny_style style guardrails",
        "context exchange reason1 text_layers clip_maker depth_network segment_networks guardrails_text guardrails_frames guardrails_faces",
    ),
    5: ("sampler cache graphs", "vae_strips vae_fp8 readback"),
    6: (
        "engine",
        "planning clip_plan clip_parts layout inputs rooms neighbours reading vae_stage vae_split costs models makers",
    ),
    7: (
        "cli",
        "runner prompts report progress media_files cli_options cli_controls cli_guards cli_tools cli_parallel solo team team_store launch motion",
    ),
}
LAYER = {name: layer for layer, row in LAYERS.items() for names in row for name in names.split()}
NOUNS = {name for nouns, _ in LAYERS.values() for name in nouns.split()}
FREE = {
    "__init__",
    "__main__",
    "testing",
    "cases",
    "cases_vae",
    "drawn",
}  # lazy front door, entry point, and the tables of tests and bench

MAX_LINES, MAX_LINES_VAE = 400, 450

# Who may ask the machine: dispatch (which device, which candidate) and parallel (ranks).
ASKS = {"dispatch.py", "ops.py", "parallel.py", "team.py", "team_store.py", "launch.py"}
QUESTIONS = (
    "os.environ",
    "os.getenv",
    "torch.cuda.is_available",
    "get_device_capability",
    "torch.cuda.device_count",
)
# From the environment only SVT-AV1 takes its log level, and Transformer Engine where cuDNN lies.
EXCEPTIONS = {("video_write.py", "os.environ"), ("te_linears.py", "os.environ")}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: everything but `if TYPE_CHECKING:` blocks."""
    if not _is_type_checking(node):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)


def internal_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a cosmos_fast module, lazy ones included."""
    for node in walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                names = [target.split(".")[0]] if target else [alias.name for alias in node.names]
            elif target == "cosmos_fast":
                names = [alias.name for alias in node.names]
            elif target.startswith("cosmos_fast."):
                names = [target.split(".")[1]]
            else:
                continue
            yield from ((node.lineno, name) for name in names if name != "__version__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cosmos_fast."):
                    yield node.lineno, alias.name.split(".")[1]


def external_imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""


def direction_faults(path: Path) -> list[str]:
    name = path.stem
    if name in FREE:
        return []
    if name not in LAYER:
        return [f"{path.name}: not in the layer table of tests/test_house.py. Give it a place."]
    faults = []
    for line, target in internal_imports(path):
        if target not in LAYER:
            faults.append(f"{path.name}:{line}: imports {target}, which is in no layer")
        elif LAYER[target] > LAYER[name]:
            faults.append(
                f"{path.name}:{line}: layer {LAYER[name]} imports {target} of layer {LAYER[target]}"
            )
        elif LAYER[target] == LAYER[name] and target in NOUNS:
            faults.append(f"{path.name}:{line}: imports {target} of its own layer; share a helper instead")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_down(path: Path) -> None:
    assert direction_faults(path) == []


def test_imports_have_no_cycle() -> None:
    graph = {
        path.stem: {name for _, name in internal_imports(path)} for path in MODULES if path.stem not in FREE
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_direction_check_sees_upward_sideways_and_unknown(tmp_path: Path) -> None:
    cases = {
        "spec.py": [
            "from .engine import Engine",
            "def f():\n    from . import video",
            "import cosmos_fast.cli",
        ],
        "nowhere.py": [""],
    }
    for name, sources in cases.items():
        for k, source in enumerate(sources):
            path = tmp_path / str(k) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
            assert len(direction_faults(path)) == 1, source
    fine = tmp_path / "engine.py"
    fine.write_text(
        "from . import ops\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .cli import main\n"
    )
    assert direction_faults(fine) == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {
        "torch",
        "triton",
        "__future__",
        "dataclasses",
        "functools",
        "typing",
        "collections",
        "math",
        "contextlib",
    }
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for line, name in external_imports(path):
            inside = name.startswith("cosmos_fast.kernels")
            assert inside or name.split(".")[0] in allowed, f"kernels/{path.name}:{line}: imports {name}"


def tracked(*suffixes: str) -> list[Path]:
    """Files git knows or would add; all files where this is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and ".venv" not in path.parts
        ]
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.is_file() and path.suffix in suffixes]


def test_no_file_over_its_cap() -> None:
    """What ships has caps; a test file is as long as the list of cases of its stem."""
    over = {}
    for path in tracked(".py", ".cpp", ".cu", ".cuh", ".h"):
        if path.is_relative_to(ROOT / "tests"):
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        cap = 80 if path == ROOT / "setup.py" else MAX_LINES_VAE if path.name == "vae.py" else MAX_LINES
        if lines > cap:
            over[str(path.relative_to(ROOT))] = f"{lines} > {cap}"
    assert over == {}


def test_nobody_imports_top_level_kernels() -> None:
    for path in tracked(".py"):
        for line, name in external_imports(path):
            assert name.split(".")[0] != "kernels", f"{path.name}:{line}: write cosmos_fast.kernels"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "kernels").glob("*.py"))], ids=lambda p: p.stem)
def test_one_place_asks_the_machine(path: Path) -> None:
    if path.name in ASKS:
        return
    for node in walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            for question in QUESTIONS:
                if (path.name, question) not in EXCEPTIONS:
                    assert not text.endswith(question), (
                        f"{path.name}:{node.lineno}: {text} belongs in dispatch or parallel"
                    )


def test_library_neither_prints_nor_exits() -> None:
    for path in MODULES:
        if path.stem in ("cli", "cli_tools", "cli_controls", "progress", "__main__"):
            continue
        for node in walk(tree_of(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.exit", "exit", "os.chdir"), (
                    f"{path.name}:{node.lineno}: {called}"
                )


def test_nothing_swallows_every_error() -> None:
    for path in [*MODULES, *sorted((ROOT / "kernels").glob("*.py"))]:
        for node in walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler):
                where = f"{path.name}:{node.lineno}"
                assert node.type is not None, f"{where}: bare except"
                broad = ast.unparse(node.type) in ("Exception", "BaseException")
                silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
                assert not (broad and silent), f"{where}: every error disappears"


def test_import_is_lean() -> None:
    heavy = (
        "torch",
        "av",
        "cv2",
        "triton",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "pydantic",
    )
    code = (
        "import sys, time; start = time.perf_counter(); import cosmos_fast; spent = time.perf_counter() - start\n"
        f"print(spent, *[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    spent, *loaded = done.stdout.split()
    assert loaded == []
    assert float(spent) < 2.0


def test_loading_the_engine_leaves_cuda_alone() -> None:
    code = (
        "import sys, torch, cosmos_fast; cosmos_fast.Engine; cosmos_fast.Spec; import cosmos_fast.ops\n"
        "assert not torch.cuda.is_initialized(); print(*[n for n in ('triton.language', 'diffusers', 'transformers') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_private_paths_in_tracked_files() -> None:
    # Absolute paths of one person's machine: they work nowhere else.
    private = re.compile(r"(?<![\w./-])/(?:home|Users|root|work)/[\w.]")
    text = (".py", ".md", ".toml", ".txt", ".json", ".cpp", ".cu", ".cuh", ".h", ".sh", ".yml", "")
    for path in tracked(*text):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            assert not private.search(line), f"{path.relative_to(ROOT)}:{number}: absolute private path"


def test_readme_tables_come_from_the_report() -> None:
    report = ROOT / "tools" / "report.py"
    if not report.exists():
        pytest.skip("tools/report.py is not written yet")
    done = subprocess.run([sys.executable, str(report), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"README tables differ from the result files: {done.stdout}{done.stderr}"


def test_readme_has_no_number_outside_the_report() -> None:
    """A speed, or a ratio of speeds, appears in the README only between the report's markers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    outside = re.sub(r"<!-- report:(\w+) -->.*?<!-- /report:\1 -->", "", readme, flags=re.DOTALL)
    claims = re.findall(r"\d[\d.,]*\s*(?:×|x faster|times faster|TFLOP/s|TB/s|GB/s)|up to \d", outside)
    assert claims == []
