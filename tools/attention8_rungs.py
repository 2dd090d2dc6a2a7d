"""Versions of the 8-bit attention kernel for `bench_attention8.py`: what each is, how it is compiled and called.

A rung is csrc/attention8_rung.cu with the members of `Config` that it changes, compiled alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


PROBES = {
    "no_exponentials": "NoExponentials",
    "no_maxima": "NoMaxima",
    "no_softmax": "NoSoftmax",
}
"""Work left out to learn what it costs: timed, never checked."""
FLAGS = ("turns", "q_registers", "sparse", "max3", "vote", "late_sums", "lean")


@dataclass(frozen=True)
class Rung:
    """One version: the members of Config that differ, as C++ and as the shapes that a caller must know."""

    name: str
    schedule: str = "Serial"
    warpgroups: int = 2
    keys: int = 128
    stages: int = 4
    turns: bool = False
    poly: int = 0
    promote: int = 0
    q_registers: bool = False
    sparse: bool = False
    max3: bool = False
    vote: bool = False
    late_sums: bool = False
    lean: bool = False
    cluster: int = 1
    probe: str = "None"
    extra: bool = False
    """Not run unless asked for by name."""

    @property
    def queries(self) -> int:
        return 64 * self.warpgroups

    def source(self) -> str:
        numbers = {
            n: getattr(self, n) for n in ("warpgroups", "keys", "stages", "poly", "promote", "cluster")
        }
        flags = {n: str(getattr(self, n)).lower() for n in FLAGS}
        members = [f"static constexpr int {n} = {v};" for n, v in numbers.items()]
        members += [f"static constexpr bool {n} = {v};" for n, v in flags.items()]
        members.append(f"static constexpr Schedule schedule = Schedule::k{self.schedule};")
        members.append(f"static constexpr Probe probe = Probe::k{self.probe};")
        return f'#define COSMOS_FAST_RUNG {" ".join(members)}\n#include "attention8_rung.cu"\n'


THREE: dict[str, Any] = {"schedule": "Overlap", "warpgroups": 3, "keys": 96, "turns": True}
"""Three consumers with tiles of 96 keys: the fastest of the first ladder."""

LEAN: dict[str, Any] = THREE | {"vote": True, "late_sums": True, "lean": True}

RUNGS = (
    Rung("three", **THREE),
    Rung("three_vote", **THREE, vote=True),
    Rung("three_late", **THREE, vote=True, late_sums=True),
    Rung("three_lean", **LEAN),
    Rung("three_lean_cluster", **LEAN, cluster=2),
    Rung("three_lean_free", **LEAN | {"turns": False}),
    Rung("three_lean_sparse", **LEAN, sparse=True),
    Rung("three_cluster", **THREE, cluster=2),
    Rung("three_cluster_6", **THREE, cluster=2, stages=6),
    Rung("three_max3", **THREE, max3=True),
    Rung("three_poly1", **THREE, poly=1),
    Rung("three_poly2", **THREE, poly=2),
    Rung("three_max3_poly1", **THREE, max3=True, poly=1, extra=True),
    Rung("three_max3_cluster", **THREE, max3=True, cluster=2),
    Rung("three_all", **THREE, max3=True, poly=1, cluster=2, stages=6),
    Rung("three_free", **THREE | {"turns": False}, max3=True, cluster=2, extra=True),
    Rung("deep", "Deep"),
    Rung("deep_turns", "Deep", turns=True),
    Rung("deep_cluster", "Deep", cluster=2),
    Rung("deep_poly1", "Deep", poly=1),
    Rung("overlap_turns", "Overlap", turns=True),
    Rung("overlap_160", "Overlap", keys=160, turns=True, max3=True),
    Rung("overlap_160_cluster", "Overlap", keys=160, turns=True, max3=True, cluster=2, extra=True),
    Rung("overlap_160_q", "Overlap", keys=160, turns=True, max3=True, q_registers=True),
    Rung("three_promote", **THREE, promote=16, extra=True),
    Rung("three_sparse", **THREE, sparse=True),
    *(Rung(f"probe_{name}", **THREE, probe=probe) for name, probe in PROBES.items()),
    Rung("serial", extra=True),
    Rung("overlap", "Overlap", extra=True),
    Rung("deep_64", "Deep", keys=64, extra=True),
    Rung("deep_sparse", "Deep", sparse=True, extra=True),
    Rung("overlap_192_turns", "Overlap", keys=192, stages=3, turns=True, extra=True),
    Rung("overlap_sparse", "Overlap", sparse=True, turns=True, extra=True),
    Rung("serial_3", warpgroups=3, extra=True),
    Rung("overlap_3_64", "Overlap", warpgroups=3, keys=64, extra=True),
    Rung("overlap_3_96", **THREE | {"turns": False}, extra=True),
)


class Args(ctypes.Structure):
    """Attention8Args of csrc/attention8.h, member for member."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "q_scale", "k_scale", "v_scale")),
        *((name, ctypes.c_void_p) for name in ("v_mean", "out_step", "key_tiles", "key_counts")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_queries", "num_keys", "q_row", "q_head", "k_row", "k_head")
        ),
        *((name, ctypes.c_int64) for name in ("v_row", "out_row", "out_head")),
        *((name, ctypes.c_int) for name in ("num_heads", "q_scale_head", "k_scale_head", "q_scale_rows")),
        ("k_scale_blocks", ctypes.c_bool),
        ("key_capacity", ctypes.c_int),
        ("softmax_scale", ctypes.c_float),
    ]


# --- building ------------------------------------------------------------------------------------------


def library(rung: Rung, folder: Path) -> Path:
    return folder / f"{rung.name}.so"


def fresh(rung: Rung, folder: Path) -> bool:
    source, built = folder / f"{rung.name}.cu", library(rung, folder)
    if not built.exists() or not source.exists() or source.read_text() != rung.source():
        return False
    try:
        ctypes.CDLL(str(built))  # built on another system, it may not load on this one
    except OSError:
        return False
    stamp = folder / f"{rung.name}.stamp"
    return stamp.exists() and stamp.read_text() == stamp_of_sources()


def stamp_of_sources() -> str:
    """What the sources are, by content: times do not survive a copy of the tree."""
    csrc = ROOT / "csrc"
    names = ("attention8.h", "attention8_rung.cu", "hopper.cuh", "kernel_info.h")
    paths = [*csrc.glob("attention8*.cuh"), *(csrc / name for name in names)]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def compile_rung(rung: Rung, folder: Path) -> str | None:
    """None, or what the compiler said."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{rung.name}.cu"
    source.write_text(rung.source())
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or f"{home}/bin/nvcc"
    command = [
        nvcc, "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr",
        "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-cudart", "static", "-shared",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-static-libstdc++,-static-libgcc",
        "-o", str(library(rung, folder)), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    (folder / f"{rung.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        return (done.stdout + done.stderr)[-400:]
    (folder / f"{rung.name}.stamp").write_text(stamp_of_sources())
    return None


def remarks(rung: Rung, folder: Path) -> str:
    """What the compiler's report says of spills and of products that it made wait for each other."""
    text = (folder / f"{rung.name}.log").read_text()
    spills = [line.split(",")[1].strip() for line in text.splitlines() if "bytes spill stores" in line]
    return " ".join([*spills[:1], *(["serialized"] if "serialized" in text else [])])


def build(rungs: tuple[Rung, ...], folder: Path, workers: int) -> None:
    stale = [rung for rung in rungs if not fresh(rung, folder)]
    with ThreadPoolExecutor(workers) as pool:
        for rung, fault in zip(stale, pool.map(lambda r: compile_rung(r, folder), stale), strict=True):
            print(f"built {rung.name}: {fault or remarks(rung, folder)}", flush=True)


# --- calling -------------------------------------------------------------------------------------------


def caller(rung: Rung, folder: Path) -> Callable[[Args], None]:
    import torch

    shared = ctypes.CDLL(str(library(rung, folder)))
    shared.attention8_error.restype = ctypes.c_char_p

    def call(args: Args) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = shared.attention8_rung(ctypes.byref(args), stream)
        if code != 0:
            raise RuntimeError(f"launch: {shared.attention8_error(code).decode()}")

    return call
