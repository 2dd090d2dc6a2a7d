"""`pytest --benchmark` runs bench/; its options live here so that they exist wherever pytest starts."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cosmos-fast")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ and nothing else")
    group.addoption("--benchmark-cpu", action="store_true", help="run the small benchmark cases on the CPU")
    group.addoption("--benchmark-commit", help="commit to record where the code is a copy without git")
    group.addoption(
        "--benchmark-results",
        type=Path,
        help="where records go (default: bench/results on a GPU, nowhere on a CPU)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        config.option.benchmark_only = True
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args[:] = [str(ROOT / "bench")]
