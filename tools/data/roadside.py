"""What stands beside the road."""

from __future__ import annotations

import numpy as np

from .mjcf import Array, Builder, choose, geom, mesh_geom, muted, numbers, tinted

ROAD, KERB = 5.6, 8.6  # metres: half width of the road, outer edge of the pavement
CELL = 16  # pixels of one window with its piece of wall


def _facade(build: Builder, name: str, size: tuple[float, float, float], material: str) -> str:
    """Box of half sizes with one window per 2.2 by 3 metres on its sides; texture coordinates need faces."""
    x, y, h = size
    vertices: list[tuple[float, float, float]] = []
    texture: list[tuple[float, float]] = []
    faces: list[tuple[int, int, int]] = []
    sides = (((-x, -y), (x, -y)), ((x, -y), (x, y)), ((x, y), (-x, y)), ((-x, y), (-x, -y)))
    for (ax, ay), (bx, by) in sides:
        across, up = round(np.hypot(bx - ax, by - ay) / 2.2), round(2 * h / 3)
        first = len(vertices)
        vertices += [(ax, ay, 0.0), (bx, by, 0.0), (bx, by, 2 * h), (ax, ay, 2 * h)]
        texture += [(0, 0), (across, 0), (across, up), (0, up)]
        faces += [(first, first + 1, first + 2), (first, first + 2, first + 3)]
    first = len(vertices)
    vertices += [(-x, -y, 2 * h), (x, -y, 2 * h), (x, y, 2 * h), (-x, y, 2 * h)]
    vertices += [(-x, -y, 0.0), (-x, y, 0.0), (x, y, 0.0), (x, -y, 0.0)]
    texture += [(0.0, 0.0)] * 8
    faces += [(first + k, first + k + 1, first + k + 2) for k in (0, 4)]
    faces += [(first + k, first + k + 2, first + k + 3) for k in (0, 4)]
    flat = [numbers(np.array(values, dtype=np.float64).ravel()) for values in (vertices, texture, faces)]
    build.assets.append(
        f'<mesh name="{name}" inertia="shell" vertex="{flat[0]}" texcoord="{flat[1]}" face="{flat[2]}"/>'
    )
    return mesh_geom(name, material)


def _walls(build: Builder, look: np.random.Generator, night: bool) -> list[str]:
    """Facade materials: a grid of windows in a wall."""
    names = []
    for k in range(5):
        wall = muted(look, 0.4, 0.8, 0.4)
        glass = (0.95, 0.8, 0.45) if night and k % 2 else tinted((0.3, 0.38, 0.48), look.uniform(0.5, 1.1))
        build.assets.append(
            f'<texture name="wall{k}" type="2d" builtin="flat" rgb1="{numbers(wall)}" rgb2="{numbers(glass)}"'
            f' mark="none" width="{CELL}" height="{CELL}"/>'
        )
        names.append(build.material(f"facade{k}", (1, 1, 1), "matte", f"wall{k}"))
        build.pixels[f"wall{k}"] = _window(wall, glass)
    return names


def _window(wall: tuple[float, float, float], glass: tuple[float, float, float]) -> Array:
    """(CELL, CELL, 3) picture of one window in its piece of wall, values in [0, 1]."""
    picture = np.empty((CELL, CELL, 3))
    picture[:] = wall
    picture[4:13, 4:12] = glass
    picture[12:14, 3:13] = np.minimum(np.array(wall) * 1.2, 1.0)
    return picture


def roadside(
    build: Builder,
    rng: np.random.Generator,
    look: np.random.Generator,
    place: str,
    night: bool,
    start: float,
    end: float,
) -> None:
    """Buildings, trees, lamps, rocks and hills on both sides of the road between start and end, metres."""
    leaves = [
        build.material(
            f"leaf{k}",
            tinted(
                choose(look, ((0.16, 0.4, 0.12), (0.27, 0.46, 0.14), (0.42, 0.44, 0.14))),
                look.uniform(0.8, 1.15),
            ),
        )
        for k in range(3)
    ]
    built, counts = place in ("city street", "suburban street"), {"n": 0}

    def add(what: str, inside: str, x: float, y: float, yaw: float = 0.0) -> None:
        counts["n"] += 1
        build.body(f"{what} {counts['n']}", inside, (x, y, 0), yaw)

    walls = _walls(build, look, night) if built else []
    for side in (-1, 1):
        if built:
            x = start
            while x < end:
                if place == "city street":
                    a, b, h = rng.uniform(5, 9), rng.uniform(5, 7), rng.uniform(3, 9)
                    gap = rng.uniform(0.3, 3.0)
                    roof = ""
                else:
                    a, b, h = rng.uniform(4, 6), rng.uniform(3.5, 5), rng.uniform(1.6, 2.9)
                    gap = rng.uniform(4, 9)
                    hull = [(px, py, 0.0) for px in (-a - 0.4, a + 0.4) for py in (-b - 0.4, b + 0.4)] + [
                        (-a, 0, 2.2),
                        (a, 0, 2.2),
                    ]
                    tiles = build.material(
                        f"roof{counts['n']}", tinted((0.42, 0.26, 0.2), look.uniform(0.6, 1.2))
                    )
                    roof = mesh_geom(build.mesh(f"roof{counts['n']}", np.array(hull)), tiles, (0, 0, 2 * h))
                body = (
                    _facade(build, f"facade{counts['n']}", (a, b, h), walls[int(look.integers(len(walls)))])
                    + roof
                )
                back = KERB + b + (0.3 if place == "city street" else rng.uniform(2.0, 4.5))
                add("building", body, x + a, side * back)
                x += 2 * a + gap
        step = {"city street": 15.0, "country road": 6.5, "suburban street": 10.0, "desert road": 9.0}[place]
        for x in np.arange(start, end, step):
            x = float(x + rng.uniform(-0.3, 0.3) * step)
            if place == "desert road":
                y, r = side * rng.uniform(9, 34), rng.uniform(0.5, 1.6)
                if rng.uniform() < 0.5:
                    rock = build.material(
                        f"rock{counts['n']}", tinted((0.55, 0.4, 0.28), look.uniform(0.7, 1.2))
                    )
                    add(
                        "rock",
                        geom("ellipsoid", (r * 1.4, r, r * 0.8), rock, (0, 0, 0.2 * r)),
                        x,
                        y,
                        rng.uniform(0, 180),
                    )
                else:
                    arms = geom("capsule", (0.28, 1.3 + r / 2), leaves[0], (0, 0, 1.3)) + geom(
                        "capsule", (0.18, 0.35), leaves[0], (0.6, 0, 1.7), (0, 90, 0)
                    )
                    add(
                        "cactus",
                        arms + geom("capsule", (0.18, 0.45), leaves[0], (0.95, 0, 2.1)),
                        x,
                        y,
                        rng.uniform(0, 180),
                    )
                continue
            y = side * (
                KERB - 0.9
                if place == "city street"
                else rng.uniform(KERB + 0.2, KERB + (2.0 if built else 22.0))
            )
            h, r, leaf = rng.uniform(1.1, 1.9), rng.uniform(1.1, 1.9), leaves[int(look.integers(3))]
            tree = geom("cylinder", (0.16, h), "bark", (0, 0, h))
            if rng.uniform() < 0.6:
                tree += geom("ellipsoid", (r, r, r * 1.2), leaf, (0, 0, 2 * h + r * 0.5)) + geom(
                    "sphere", (r * 0.7,), leaf, (r * 0.6, 0.3, 2 * h)
                )
            else:
                base = [(r * np.cos(t), r * np.sin(t), 0.0) for t in np.linspace(0, 2 * np.pi, 9)[:-1]]
                mesh = build.mesh(f"fir{counts['n']}", np.array([*base, (0, 0, 3.2 * r)], dtype=np.float64))
                tree += mesh_geom(mesh, leaf, (0, 0, h * 0.8))
            add("tree", tree, x, y, rng.uniform(0, 360))
        if built:
            for x in np.arange(start + 9 * (side > 0), end, 22.0):
                pole = geom("cylinder", (0.07, 2.6), "steel", (0, 0, 2.6)) + geom(
                    "box", (0.06, 0.7, 0.05), "steel", (0, -side * 0.6, 5.2)
                )
                add(
                    "lamp",
                    pole + geom("box", (0.16, 0.3, 0.08), "lamp", (0, -side * 1.2, 5.12)),
                    float(x),
                    side * (ROAD + 0.5),
                )
    if not built:
        hill = build.material(
            "hill",
            tinted(
                (0.3, 0.42, 0.22) if place == "country road" else (0.62, 0.45, 0.32), look.uniform(0.7, 1.1)
            ),
        )
        for k in range(7):
            angle = np.radians(rng.uniform(-65, 65) + 180 * (k % 2))
            x, y = (start + end) / 2 + 190 * np.cos(angle), 150 * np.sin(angle)
            y += np.copysign(45, y)
            add(
                "hill",
                geom(
                    "ellipsoid",
                    (rng.uniform(30, 60), rng.uniform(25, 45), rng.uniform(8, 24)),
                    hill,
                    (0, 0, -2),
                ),
                x,
                y,
            )
