"""Scenes of a vehicle that drives along a road, seen from a moving car or from beside the road."""

from __future__ import annotations

import numpy as np

from .colours import PALETTE
from .mjcf import (
    FPS,
    LAYOUT,
    LOOK,
    Array,
    Builder,
    Light,
    Scene,
    bearing,
    box_corners,
    choose,
    distance_for,
    document,
    geom,
    muted,
    paint,
    stream,
    tinted,
    turn,
)
from .roadside import KERB, ROAD, roadside
from .vehicles import SIZES, fixed_materials, vehicle

KINDS = ("car", "van", "truck", "bus")
PLACES = ("city street", "country road", "suburban street", "desert road")
LIGHTS = (
    Light(
        "in bright daylight", (0.68, 0.67, 0.63), (0.44, 0.44, 0.46), (0.25, 0.48, 0.85), (0.74, 0.85, 0.95)
    ),
    Light(
        "under an overcast sky", (0.32, 0.32, 0.33), (0.6, 0.6, 0.62), (0.58, 0.62, 0.68), (0.8, 0.82, 0.84)
    ),
    Light("at dusk", (0.7, 0.58, 0.46), (0.44, 0.38, 0.37), (0.28, 0.25, 0.45), (0.98, 0.6, 0.36)),
    Light("at night", (0.34, 0.37, 0.43), (0.3, 0.33, 0.38), (0.01, 0.015, 0.05), (0.07, 0.09, 0.17)),
)
FINISHES = ("matte", "shiny")
LANE, ONCOMING = -1.9, 4.3  # metres from the middle of the road
AHEAD, BEHIND = 110.0, 30.0  # metres of scenery beyond the camera's path
FOVY = 42.0


def _ground(build: Builder, look: np.random.Generator, place: str, start: float, end: float) -> None:
    city = place == "city street"
    rgb = {
        "city street": (0.42, 0.42, 0.41),
        "country road": (0.3, 0.45, 0.16),
        "suburban street": (0.28, 0.47, 0.2),
        "desert road": (0.76, 0.62, 0.42),
    }[place]
    build.assets.append(
        '<texture name="rough" type="2d" builtin="flat" rgb1="1 1 1" mark="random" random="0.12"'
        ' markrgb="0.82 0.82 0.82" width="128" height="128"/>'
    )
    soil = build.material(
        "soil",
        tinted(rgb, look.uniform(0.85, 1.1)),
        "matte",
        "rough",
        texrepeat="0.12 0.12",
        texuniform="true",
    )
    build.body("ground", geom("plane", (400, 400, 1), soil, ((start + end) / 2, 0, -0.05)))
    half, middle = (end - start) / 2, (end + start) / 2
    tar = build.material("tar", tinted((0.3, 0.3, 0.31), look.uniform(0.7, 1.15)))
    line = build.material("line", (0.85, 0.84, 0.78))
    edge = build.material("edge", choose(look, ((0.85, 0.84, 0.78), (0.82, 0.68, 0.2))))
    parts = [geom("box", (half, ROAD, 0.02), tar, (middle, 0, -0.02))]
    for x in np.arange(start, end, 6.0):
        parts.append(geom("box", (1.4, 0.07, 0.008), line, (x, 0.6, 0.004)))
    parts += [
        geom("box", (half, 0.07, 0.008), edge, (middle, side * (ROAD - 0.5), 0.004)) for side in (-1, 1)
    ]
    build.body("road", "".join(parts))
    if city or place == "suburban street":
        slab = build.material("slab", tinted((0.58, 0.57, 0.55), look.uniform(0.85, 1.1)))
        width = (KERB - ROAD) / 2
        build.body(
            "pavement",
            "".join(
                geom("box", (half, width, 0.08), slab, (middle, side * (ROAD + width), 0.02))
                for side in (-1, 1)
            ),
        )


def build(index: int, seed: int, frames: int, aspect: float, attempt: int = 0) -> Scene:
    """One street scene of F = frames; the same numbers give the same scene. aspect is width over height."""
    rng, look = stream(seed, index, LAYOUT, attempt), stream(seed, index, LOOK, attempt)
    kind, place, finish = (str(choose(rng, options)) for options in (KINDS, PLACES, FINISHES))
    light: Light = choose(look, LIGHTS)
    night = light.name == "at night"
    colour = str(choose(look, tuple(PALETTE)))
    rgb = paint(look, colour)
    times = np.arange(frames) / FPS

    speed = rng.uniform(4.0, 8.0)
    lane = LANE + rng.uniform(-0.5, 0.5)
    wave, phase = rng.uniform(0.0, 0.25), rng.uniform(0, 2 * np.pi)
    x = speed * times
    y = lane + wave * np.sin(0.9 * times + phase)
    yaw = np.arctan2(wave * 0.9 * np.cos(0.9 * times + phase), speed)
    eye, target = _camera(rng, kind, np.stack([x, y], axis=1), times, aspect)

    parts = Builder()
    fixed_materials(parts, night)
    start, end = float(eye[:, 0].min() - BEHIND), float(eye[:, 0].max() + AHEAD)
    if target[0, 0] < eye[0, 0]:
        start, end = float(eye[:, 0].min() - AHEAD), float(eye[:, 0].max() + BEHIND)
    _ground(parts, look, place, start, end)
    coat = parts.material("coat", rgb, finish)
    parts.body(kind, vehicle(parts, kind, coat, "main", rng.uniform()), moves=True)
    flat = np.zeros(frames)
    mocap = {kind: np.concatenate([np.stack([x, y, flat], axis=1), turn(yaw)], axis=1)}
    _traffic(parts, rng, look, place, mocap, times, start, end)
    roadside(parts, rng, look, place, night, start, end)

    attributes = dict(
        family="street",
        kind=kind,
        colour=colour,
        rgb=[round(value, 4) for value in rgb],
        finish=finish,
        place=place,
        light=light.name,
        action="drives along",
    )
    thing = f"{finish} {colour} {kind}"
    caption = choose(
        look,
        (
            f"A {thing} drives along a {place} {light.name}.",
            f"A moving camera follows a {thing} on a {place} {light.name}.",
            f"{light.name.capitalize()}, a {thing} drives along a {place}.",
        ),
    )
    return Scene(
        xml=document(
            parts, light, look, extent=10.0, far=400.0, fovy=FOVY, shadow_at=1.6, view=bearing(eye, target)
        ),
        labels=tuple(parts.names),
        main=kind,
        background=frozenset({"sky", "ground"}),
        mocap=mocap,
        joints={},
        eye=eye,
        target=target,
        caption=caption,
        attributes=attributes,
        pixels=parts.pixels,
        fog=True,
    )


def _camera(
    rng: np.random.Generator, kind: str, path: Array, times: Array, aspect: float
) -> tuple[Array, Array]:
    """Eye and target, (F, 3), that keep the vehicle's middle at path (F, 2) in the picture."""
    length, width, height = SIZES[kind]
    share = rng.uniform(0.10, 0.2)
    behind = rng.uniform() < 0.7
    side = rng.choice((-1.0, 1.0))
    azimuth = (np.pi if behind else 0.0) + side * np.radians(rng.uniform(8, 42))
    up = rng.uniform(1.5, 3.2)
    swing, zoom = np.radians(rng.uniform(-9, 9)), rng.uniform(-0.12, 0.12)
    offset = np.array([0.0, rng.uniform(-0.6, 0.6), height * rng.uniform(0.45, 0.75)])
    points = box_corners((length / 2, width / 2, height / 2), (0, 0, height / 2))

    def place(distance: float, turned: float = 0.0) -> tuple[Array, Array]:
        a = azimuth + turned
        # The eye stays over the road, where nothing is parked.
        across = float(np.clip(distance * np.sin(a), -1.8, 4.0))
        return np.array([np.cos(a) * distance, across, up]), offset

    distance = distance_for(share * 1.2, place, points, FOVY, aspect, length / 2 + 2.5, 40.0)
    drift = np.sin(times * np.pi / 2 / 1.6 - np.pi / 4)
    rel = np.stack([place(distance * (1 + zoom * p), swing * p)[0] for p in drift])
    ground = np.concatenate([path, np.zeros((len(path), 1))], axis=1)
    # Half of the vehicle's sway is left in the picture.
    sway = np.zeros_like(ground)
    sway[:, 1] = 0.5 * (path[:, 1] - path[:, 1].mean())
    return ground - sway + rel, ground - sway + offset


def _traffic(
    build: Builder,
    rng: np.random.Generator,
    look: np.random.Generator,
    place: str,
    mocap: dict[str, Array],
    times: Array,
    start: float,
    end: float,
) -> None:
    """Oncoming and parked vehicles in quiet colours, clear of the camera's lane."""
    frames = len(times)
    for k in range(int(rng.integers(0, 3))):
        kind = str(choose(rng, KINDS[:3]))
        coat = build.material(f"traffic{k}", muted(look, 0.25, 0.8, 0.15), "shiny")
        name = f"oncoming {kind} {k + 1}"
        build.body(name, vehicle(build, kind, coat, f"traffic{k}", rng.uniform()), moves=True)
        x = rng.uniform(22, 34) + 26 * k - rng.uniform(3, 6) * times
        where = np.stack([x, np.full(frames, ONCOMING), np.zeros(frames)], axis=1)
        mocap[name] = np.concatenate([where, np.broadcast_to(turn(np.pi), (frames, 4))], axis=1)
