"""`pytest --benchmark` runs bench/; the option lives here so that it exists wherever pytest starts."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cosmos-fast")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ and nothing else")
    group.addoption("--benchmark-cpu", action="store_true", help="run small benchmark cases on the CPU too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        config.option.benchmark_only = True
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args[:] = ["bench"]
