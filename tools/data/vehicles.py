"""Cars, vans, trucks and buses of boxes, cylinders and convex hulls."""

from __future__ import annotations

import numpy as np

from .mjcf import Builder, geom, mesh_geom

SIZES = {"car": (4.3, 1.8, 1.45), "van": (4.9, 1.95, 2.1), "truck": (6.6, 2.3, 2.9), "bus": (8.5, 2.45, 3.0)}
"""Length, width and height, metres."""


def fixed_materials(build: Builder, night: bool) -> None:
    """Materials that vehicles and the roadside share; lamps glow at night."""
    build.material("glass", (0.10, 0.13, 0.17), "shiny")
    build.material("rubber", (0.06, 0.06, 0.065))
    build.material("rim", (0.5, 0.51, 0.53), "metal")
    build.material("tail", (0.75, 0.05, 0.05), "glow" if night else "matte")
    build.material("head", (1.0, 0.97, 0.85), "glow")
    build.material("plate", (0.85, 0.85, 0.8))
    build.material("bark", (0.33, 0.23, 0.15))
    build.material("steel", (0.35, 0.36, 0.38), "metal")
    build.material("lamp", (1.0, 0.92, 0.7), "glow" if night else "matte")


def _hull(build: Builder, name: str, profile: list[tuple[float, float]], low: float, high: float) -> str:
    """Mesh of an (x, z) outline across the width: half width `low` at its lowest points, `high` at its highest."""
    bottom, top = min(z for _, z in profile), max(z for _, z in profile)
    points = [
        (x, side * (low + (high - low) * (z - bottom) / (top - bottom)), z)
        for x, z in profile
        for side in (-1, 1)
    ]
    return build.mesh(name, np.array(points, dtype=np.float64))


def vehicle(build: Builder, kind: str, coat: str, name: str, style: float) -> str:
    """Geoms of a vehicle that faces +x, its middle over the origin, wheels on z = 0. style in [0, 1] varies the shape."""
    length, width, height = SIZES[kind]
    a, w = length / 2, width / 2
    parts = []
    if kind == "car":
        boot = -a * (0.62 + 0.3 * style)  # saloon to hatchback
        lower = [(-a, 0.35), (-a, 0.72), (-a + 0.12, 0.86), (a - 0.5, 0.82), (a, 0.62), (a, 0.35), (0, 0.26)]
        parts.append(mesh_geom(_hull(build, f"{name}_low", lower, w, w * 0.95), coat))
        glass = [(boot, 0.82), (boot + 0.35, height - 0.1), (0.15 * a, height - 0.1), (0.55 * a, 0.82)]
        parts.append(mesh_geom(_hull(build, f"{name}_cabin", glass, w * 0.9, w * 0.74), "glass"))
        roof = [
            (boot + 0.3, height - 0.12),
            (boot + 0.45, height),
            (0.1 * a, height),
            (0.2 * a, height - 0.12),
        ]
        parts.append(mesh_geom(_hull(build, f"{name}_roof", roof, w * 0.77, w * 0.72), coat))
        pillar = (boot + 0.35 + 0.15 * a) / 2
        parts.append(geom("box", (0.05, w * 0.835, 0.28), coat, (pillar, 0, 1.08)))
        lamp = 0.68
    elif kind == "van":
        shape = [
            (-a, 0.3),
            (-a, height - 0.1),
            (-a + 0.1, height),
            (a * 0.5, height),
            (a * 0.82, 1.1),
            (a, 0.95),
            (a, 0.3),
        ]
        parts.append(mesh_geom(_hull(build, f"{name}_hull", shape, w, w * 0.9), coat))
        front = [(a * 0.56, height - 0.12), (a * 0.8, 1.2), (a * 0.3, 1.25), (a * 0.3, height - 0.12)]
        parts.append(mesh_geom(_hull(build, f"{name}_glass", front, w * 0.96, w * 0.93), "glass"))
        screen = [(a * 0.54, height - 0.14), (a * 0.79, 1.2), (a * 0.82, 1.2), (a * 0.58, height - 0.14)]
        parts.append(mesh_geom(_hull(build, f"{name}_screen", screen, w * 0.85, w * 0.8), "glass"))
        parts.append(geom("box", (0.01, w * 0.7, 0.25), "glass", (-a, 0, height - 0.55)))
        lamp = 0.8
    elif kind == "truck":
        cab = a * 0.56
        shape = [(cab, 0.45), (cab, 2.4), (a - 0.35, 2.4), (a, 1.5), (a, 0.45)]
        parts.append(mesh_geom(_hull(build, f"{name}_cab", shape, w * 0.94, w * 0.9), coat))
        glass = [(a - 0.36, 2.25), (a - 0.02, 1.52), (a + 0.02, 1.52), (a - 0.3, 2.25)]
        parts.append(mesh_geom(_hull(build, f"{name}_glass", glass, w * 0.84, w * 0.8), "glass"))
        parts.append(geom("box", (0.3, w * 0.935, 0.3), "glass", (a - 0.75, 0, 1.85)))
        parts.append(
            geom(
                "box",
                ((a + cab) / 2 - 0.08, w, (height - 0.85) / 2),
                coat,
                ((cab - a) / 2 - 0.06, 0, (height + 0.85) / 2),
            )
        )
        parts.append(geom("box", (a * 0.97, w * 0.5, 0.14), "rubber", (0, 0, 0.68)))
        lamp = 0.75
    else:
        shape = [
            (-a, 0.35),
            (-a, height - 0.15),
            (-a + 0.15, height),
            (a - 0.25, height),
            (a, height - 0.35),
            (a, 0.35),
        ]
        parts.append(mesh_geom(_hull(build, f"{name}_hull", shape, w, w * 0.95), coat))
        for k in range(5):
            parts.append(
                geom(
                    "box",
                    (length * 0.078, w * 0.995, 0.34),
                    "glass",
                    (-a + length * (0.14 + 0.18 * k), 0, 1.95),
                )
            )
        parts.append(geom("box", (0.03, w * 0.85, 0.5), "glass", (a - 0.01, 0, 1.9)))
        parts.append(geom("box", (0.02, w * 0.75, 0.35), "glass", (-a, 0, 2.2)))
        lamp = 0.8
    radius = {"car": 0.33, "van": 0.36}.get(kind, 0.48)
    for x in (-0.6 * a, 0.62 * a):
        for side in (-1, 1):
            parts.append(
                geom("cylinder", (radius, 0.12), "rubber", (x, side * (w - 0.08), radius), (90, 0, 0))
            )
            parts.append(
                geom("cylinder", (radius * 0.55, 0.128), "rim", (x, side * (w - 0.08), radius), (90, 0, 0))
            )
    for side in (-1, 1):
        parts.append(geom("box", (0.03, 0.17, 0.07), "tail", (-a, side * (w - 0.24), lamp)))
        parts.append(geom("box", (0.03, 0.18, 0.07), "head", (a, side * (w - 0.26), lamp - 0.03)))
    parts.append(geom("box", (0.02, 0.26, 0.06), "plate", (-a - 0.01, 0, lamp - 0.2)))
    return "".join(parts)
