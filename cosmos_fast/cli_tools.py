"""Commands that make nothing: the schema, this machine, weight files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .cli_options import PATHS
from .formats import SpecError

CANNOT_BE_USED = 3


@click.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    from .spec import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--device", help="Device to explain; default: a GPU when there is one, else the CPU.")
def info(as_json: bool, device: str | None) -> None:
    """Show this machine: devices, versions, codecs, and which implementation each op would use and why."""
    from .report import machine

    record = machine(device)
    click.echo(json.dumps(record, indent=2) if as_json else record_text(record))


def record_text(record: dict[str, Any]) -> str:
    lines = [f"{key}: {item}" for key, item in record.items() if key != "ops"]
    for dtype, ops in record["ops"].items():
        lines.append(f"ops on {record['device']} in {dtype}:")
        for op in ops:
            lines.append(f"  {op['op']:<16} {op['chosen']}")
            lines += [f"  {'':<16}   not {name}: {why}" for name, why in op["others"].items()]
    return "\n".join(lines)


@click.group()
def checkpoint() -> None:
    """Look into weight files, or convert them."""


@checkpoint.command()
@click.argument("path", type=PATHS)
@click.option("--finite", is_flag=True, help="Also read every tensor and look for NaN and infinities.")
def inspect(path: Path, finite: bool) -> None:
    """Say what PATH holds. Exit 3 if it cannot be used."""
    from .checkpoint import inspect as look

    report = look(path, is_finite_checked=finite)
    if report.tensors:
        click.echo(f"{report.path}: {report.format}, {report.kind}")
        click.echo(f"{report.tensors} tensors, {report.parameters:,} parameters, {report.dtypes}")
        if report.config is not None:
            click.echo(f"config: {report.config.to_json()}")
        click.echo(f"ignored: {len(report.ignored)} entries")
    for problem in report.problems:
        click.echo(f"error: {problem}", err=True)
    sys.exit(CANNOT_BE_USED if report.problems else 0)


@checkpoint.command()
@click.argument("source")
@click.argument("target", type=PATHS)
@click.option("--dtype", type=click.Choice(["bf16", "fp32", "keep"]), default="bf16", show_default=True)
@click.option(
    "--model", type=click.Choice(["single", "distilled"]), help="What the tensors alone do not tell."
)
@click.option(
    "--fp8", is_flag=True, help="Matrices of the blocks in 8 bits, for --recipe fp8: half the bytes."
)
def convert(source: str, target: Path, dtype: str, model: str | None, fp8: bool) -> None:
    """Write SOURCE (any readable form, or a published id) as one safetensors file TARGET."""
    import torch

    from . import registry
    from .checkpoint import convert as rewrite

    path = registry.resolve(source)
    if not isinstance(path, Path):
        raise SpecError(f"convert: must name one network, got {', '.join(path)} in {source}.")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}[dtype]
    report = rewrite(path, target, wanted, model=model, is_8_bit=fp8)
    click.echo(f"{target}: {report.kind}, {report.tensors} tensors")
