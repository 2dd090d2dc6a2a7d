"""Scenes of a robot arm that works on an object on a table."""

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
    mesh_geom,
    muted,
    paint,
    stream,
    tinted,
)

KINDS = ("cube", "ball", "cylinder", "pyramid", "mug", "bottle")
FILL = {"cube": 0.85, "ball": 0.6, "cylinder": 0.7, "pyramid": 0.55, "mug": 0.75, "bottle": 0.5}
"""About how much of its bounding box an object shows, the hand's cover taken off."""
ACTIONS = ("reaches for", "lifts", "pushes", "carries")
LIGHTS = (
    Light("bright light", (0.62, 0.61, 0.58), (0.4, 0.4, 0.41), (0.75, 0.8, 0.86), (0.9, 0.91, 0.92)),
    Light("warm light", (0.66, 0.56, 0.45), (0.4, 0.35, 0.3), (0.62, 0.5, 0.38), (0.85, 0.74, 0.6)),
    Light("cool light", (0.52, 0.59, 0.66), (0.35, 0.39, 0.44), (0.45, 0.56, 0.68), (0.7, 0.78, 0.86)),
    Light("dim light", (0.42, 0.41, 0.4), (0.27, 0.27, 0.28), (0.1, 0.1, 0.13), (0.22, 0.22, 0.25)),
)
FINISHES = ("matte", "shiny", "striped")
TABLES = ("wooden", "metal", "stone", "white")
UPPER, FORE, GRIPPER, SHOULDER_Z = 0.44, 0.40, 0.19, 0.34  # metres
FOVY = 42.0


def _band(kind: str, s: float, z: float) -> float:
    """Radius of the shape at height z over its centre, metres."""
    if kind == "ball":
        return float(np.sqrt(max(s * s - z * z, 0.0)))
    if kind == "pyramid":
        return s * (s - z) / (2 * s) * 1.15
    return {"mug": 0.85 * s, "cylinder": 0.85 * s, "bottle": 0.7 * s}.get(kind, s)


def _object(build: Builder, kind: str, s: float, material: str, stripe: str, dark: str, name: str) -> str:
    """Geoms of an object of half height s, metres, around its centre. An empty `stripe` means none."""
    if kind == "cube":
        parts = [geom("box", (s, s, s), material)]
    elif kind == "ball":
        parts = [geom("sphere", (s,), material)]
    elif kind == "cylinder":
        parts = [geom("cylinder", (0.85 * s, s), material)]
    elif kind == "pyramid":
        base = 1.15 * s
        points = [(x * base, y * base, -s) for x in (-1, 1) for y in (-1, 1)] + [(0, 0, s)]
        parts = [mesh_geom(build.mesh(f"{name}_hull", np.array(points, dtype=np.float64)), material)]
    elif kind == "mug":
        parts = [geom("cylinder", (0.85 * s, s), material)]
        parts.append(geom("cylinder", (0.74 * s, 0.004), dark, (0, 0, s - 0.002)))
        for z in (-0.45, 0.45):
            parts.append(geom("capsule", (0.11 * s, 0.25 * s), material, (1.05 * s, 0, z * s), (0, 90, 0)))
        parts.append(geom("capsule", (0.11 * s, 0.45 * s), material, (1.3 * s, 0, 0)))
    else:
        parts = [geom("cylinder", (0.7 * s, 0.65 * s), material, (0, 0, -0.35 * s))]
        parts.append(geom("ellipsoid", (0.7 * s, 0.7 * s, 0.45 * s), material, (0, 0, 0.3 * s)))
        parts.append(geom("cylinder", (0.26 * s, 0.25 * s), material, (0, 0, 0.75 * s)))
    if stripe:
        for z in (-0.5 * s, 0.05 * s) if kind != "bottle" else (-0.7 * s, -0.2 * s):
            half = 0.11 * s
            radius = max(_band(kind, s, z - half), _band(kind, s, z + half)) + 0.0015
            size = (radius, radius, half) if kind in ("cube", "pyramid") else (radius, half)
            parts.append(geom("box" if kind in ("cube", "pyramid") else "cylinder", size, stripe, (0, 0, z)))
    return "".join(parts)


def _solve(grip: Array, base: Array) -> tuple[Array, Array, Array, Array]:
    """Yaw, shoulder, elbow and wrist, (F,) radians, that put the finger tips at `grip` (F, 3), pointing down."""
    dx, dy = grip[:, 0] - base[0], grip[:, 1] - base[1]
    reach, rise = np.hypot(dx, dy), grip[:, 2] + GRIPPER - SHOULDER_Z
    span = np.clip(np.hypot(reach, rise), 0.15, UPPER + FORE - 1e-4)
    inner = np.arccos(np.clip((UPPER**2 + span**2 - FORE**2) / (2 * UPPER * span), -1, 1))
    bend = np.pi - np.arccos(np.clip((UPPER**2 + FORE**2 - span**2) / (2 * UPPER * FORE), -1, 1))
    lift = np.arctan2(rise, reach) + inner  # of the upper arm over the horizon
    # Links lie along +x at zero and a positive turn about y lowers them.
    return np.arctan2(dy, dx), -lift, bend, np.pi / 2 + lift - bend


def _arm(build: Builder, base: Array, shell: str, joint: str, tip: str) -> None:
    def hinge(name: str, axis: str) -> str:
        return f'<joint name="{name}" type="hinge" axis="{axis}"/>'

    def finger(name: str, side: int) -> str:
        inside = geom("box", (0.035, 0.012, 0.014), tip, (GRIPPER - 0.09, side * 0.012, 0))
        inside += geom("box", (0.055, 0.01, 0.018), tip, (GRIPPER - 0.055, side * 0.01, 0))
        return f'<body name="{name}"><joint name="{name}" type="slide" axis="0 {side} 0"/>{inside}</body>'

    hand = geom("cylinder", (0.042, 0.035), joint, (0.02, 0, 0), (0, 90, 0))
    hand += geom("box", (0.022, 0.11, 0.03), shell, (0.07, 0, 0)) + finger("left", 1) + finger("right", -1)
    wrist = f'<body pos="{FORE} 0 0">{hinge("wrist", "0 1 0")}{geom("cylinder", (0.05, 0.05), joint, (0, 0, 0), (90, 0, 0))}{hand}</body>'
    fore = f'<body pos="{UPPER} 0 0">{hinge("elbow", "0 1 0")}{geom("cylinder", (0.065, 0.07), joint, (0, 0, 0), (90, 0, 0))}'
    fore += geom("capsule", (0.046, FORE / 2 - 0.05), shell, (FORE / 2, 0, 0), (0, 90, 0)) + wrist + "</body>"
    upper = f'<body pos="0 0 {SHOULDER_Z}">{hinge("shoulder", "0 1 0")}{geom("cylinder", (0.08, 0.085), joint, (0, 0, 0), (90, 0, 0))}'
    upper += (
        geom("capsule", (0.058, UPPER / 2 - 0.05), shell, (UPPER / 2, 0, 0), (0, 90, 0)) + fore + "</body>"
    )
    inside = geom("cylinder", (0.12, 0.03), joint, (0, 0, 0.03))
    inside += f'<body name="column">{hinge("yaw", "0 0 1")}{geom("cylinder", (0.085, 0.13), shell, (0, 0, 0.19))}{upper}</body>'
    build.body("robot arm", inside, (base[0], base[1], 0))


def _table(build: Builder, kind: str, rng: np.random.Generator) -> None:
    parts, top = [], (0.95, 0.62)
    if kind == "wooden":
        tone = np.array(choose(rng, ((0.62, 0.42, 0.24), (0.46, 0.28, 0.15), (0.74, 0.57, 0.38))))
        for k in range(6):
            shade = tinted(tone, rng.uniform(0.86, 1.1))
            plank = build.material(f"plank{k}", shade, "matte")
            parts.append(
                geom("box", (top[0], top[1] / 6 - 0.003, 0.02), plank, (0, top[1] * (2 * k - 5) / 6, -0.02))
            )
        parts.append(geom("box", (*top, 0.012), build.material("under", tinted(tone, 0.5)), (0, 0, -0.03)))
    else:
        if kind == "stone":
            build.assets.append(
                '<texture name="stone" type="2d" builtin="flat" rgb1="0.9 0.9 0.9" mark="random" random="0.06"'
                ' markrgb="0.6 0.6 0.6" width="128" height="128"/>'
            )
        rgb = {"metal": (0.52, 0.55, 0.58), "stone": (0.4, 0.39, 0.37), "white": (0.72, 0.72, 0.71)}[kind]
        finish = "metal" if kind == "metal" else "matte"
        texture = "stone" if kind == "stone" else ""
        plate = build.material("plate", tinted(rgb, rng.uniform(0.92, 1.05)), finish, texture)
        parts.append(geom("box", (*top, 0.03), plate, (0, 0, -0.03)))
    legs = build.material("legs", muted(rng, 0.15, 0.5))
    parts += [
        geom("box", (0.04, 0.04, 0.35), legs, (x * 0.85, y * 0.52, -0.4)) for x in (-1, 1) for y in (-1, 1)
    ]
    build.body("table", "".join(parts))


def _room(build: Builder, rng: np.random.Generator) -> None:
    first, second = muted(rng, 0.3, 0.6), muted(rng, 0.4, 0.7)
    build.assets.append(
        f'<texture name="tiles" type="2d" builtin="checker" rgb1="{first[0]:.3f} {first[1]:.3f} {first[2]:.3f}"'
        f' rgb2="{second[0]:.3f} {second[1]:.3f} {second[2]:.3f}" width="64" height="64"/>'
    )
    tiles = build.material("tiles", (1, 1, 1), "matte", "tiles", texrepeat="2 2", texuniform="true")
    build.body("floor", geom("plane", (6, 6, 0.1), tiles, (0, 0, -0.75)))
    wall = build.material("wall", muted(rng, 0.45, 0.88, 0.3))
    skirting = build.material("skirting", muted(rng, 0.3, 0.9, 0.1))
    # Planes, because they cast no shadow on themselves. The camera never turns round, so three are enough.
    inside = geom("plane", (6, 2, 0.1), wall, (0, 1.65, 1.25), (90, 0, 0))
    inside += geom("plane", (2, 6, 0.1), wall, (-3.15, 0, 1.25), (0, 90, 0))
    inside += geom("plane", (2, 6, 0.1), wall, (3.15, 0, 1.25), (0, -90, 0))
    inside += geom("box", (6, 0.03, 0.06), skirting, (0, 1.65, -0.69))
    build.body("wall", inside)


def build(index: int, seed: int, frames: int, aspect: float, attempt: int = 0) -> Scene:
    """One arm scene of F = frames; the same numbers give the same scene. aspect is width over height."""
    rng, look = stream(seed, index, LAYOUT, attempt), stream(seed, index, LOOK, attempt)
    kind, action = str(choose(rng, KINDS)), str(choose(rng, ACTIONS))
    s = rng.uniform(0.075, 0.095)
    table, finish = str(choose(rng, TABLES)), str(choose(rng, FINISHES))
    light: Light = choose(look, LIGHTS)
    colour = str(choose(look, tuple(PALETTE)))
    rgb = paint(look, colour)

    parts = Builder()
    _room(parts, look)
    _table(parts, table, look)
    shell = parts.material(
        "shell", choose(look, ((0.82, 0.83, 0.84), (0.6, 0.62, 0.65), (0.25, 0.26, 0.29))), "metal"
    )
    joint = parts.material("joint", choose(look, ((0.2, 0.21, 0.24), (0.42, 0.44, 0.48))), "metal")
    tip = parts.material("tip", (0.13, 0.13, 0.15))
    side = rng.choice((-1.0, 1.0))
    base = np.array([side * rng.uniform(0.3, 0.45), rng.uniform(0.28, 0.42), 0.0])
    _arm(parts, base, shell, joint, tip)

    coat = parts.material("coat", rgb, "shiny" if finish == "shiny" else "matte")
    stripe = ""
    if finish == "striped":
        band = (0.3, 0.3, 0.32) if colour == "black" else tinted(rgb, 0.55)
        stripe = parts.material("stripe", band)
    dark = parts.material("inside", tinted(rgb, 0.35))
    spin = rng.uniform(0, 2 * np.pi) if kind != "mug" else np.radians(rng.uniform(-110, -20))
    parts.body(kind, _object(parts, kind, s, coat, stripe, dark, "main"), moves=True)

    grip, held, opening = _motion(rng, action, kind, s, frames, -side)
    taken = np.concatenate([held[:1, :2], held[-1:, :2]])
    _extras(parts, rng, look, kind, s, taken)

    yaw, shoulder, elbow, wrist = _solve(grip, base)
    eye, target = _camera(rng, held, s, FILL[kind], frames, aspect)
    attributes = dict(
        family="arm",
        kind=kind,
        colour=colour,
        rgb=[round(value, 4) for value in rgb],
        finish=finish,
        place=f"{table} table",
        light=light.name,
        action=action,
    )
    thing, where = f"{finish} {colour} {kind}", f"on a {table} table"
    caption = choose(
        look,
        (
            f"A robot arm {action} a {thing} {where}, {light.name}.",
            f"In {light.name}, a robot arm {action} a {thing} {where}.",
            f"A {thing} {where}; a robot arm {action} it, {light.name}.",
        ),
    )
    pose = np.concatenate(
        [held, np.broadcast_to([np.cos(spin / 2), 0, 0, np.sin(spin / 2)], (frames, 4))], axis=1
    )
    return Scene(
        xml=document(
            parts, light, look, extent=1.5, far=14.0, fovy=FOVY, shadow_at=0.8, view=bearing(eye, target)
        ),
        labels=tuple(parts.names),
        main=kind,
        background=frozenset({"sky", "floor", "wall"}),
        mocap={kind: pose},
        joints=dict(yaw=yaw, shoulder=shoulder, elbow=elbow, wrist=wrist, left=opening, right=opening),
        eye=eye,
        target=target,
        caption=caption,
        attributes=attributes,
    )


def _motion(
    rng: np.random.Generator, action: str, kind: str, s: float, frames: int, inward: float
) -> tuple[Array, Array, Array]:
    """Finger tips (F, 3), object centre (F, 3) and finger travel from the middle (F,), all metres."""
    period = rng.uniform(1.5, 1.9)
    ease = (0.5 - 0.5 * np.cos(np.pi * np.arange(frames) / FPS / period))[:, None]
    start = np.array([rng.uniform(-0.12, 0.12), rng.uniform(-0.2, 0.0), s])
    width = {"mug": 0.85, "cylinder": 0.85, "bottle": 0.72, "pyramid": 0.5}.get(kind, 1.0) * s
    angle = rng.uniform(0, 2 * np.pi)
    across = np.array([np.cos(angle), np.sin(angle), 0.0]) * rng.uniform(0.12, 0.2)
    still = np.broadcast_to(start, (frames, 3))
    above = np.array([0.0, 0.0, 0.35 * s])
    if action == "reaches for":
        away = np.array([inward * -rng.uniform(0.1, 0.25), rng.uniform(0.0, 0.15), rng.uniform(0.16, 0.26)])
        grip = still + above + (1 - ease) * away
        return grip, still.copy(), np.full(frames, width + 0.02)
    if action == "pushes":
        push = np.array([rng.uniform(-1, 1), -1.0, 0.0])
        push /= np.linalg.norm(push)
        # The object stays where the retreating hand leaves it.
        travel = np.maximum.accumulate(ease * rng.uniform(0.12, 0.2), axis=0)
        held = start + push * travel
        hand = start + push * np.minimum(ease * travel.max(), travel)
        return hand - push * (width + 0.05) - np.array([0, 0, 0.3 * s]), held, np.full(frames, 0.012)
    if action == "lifts":
        move = np.array([0.0, 0.0, rng.uniform(0.12, 0.2)]) * ease
    else:
        raised = np.array([0.0, 0.0, rng.uniform(0.06, 0.14)])
        move = raised + across * (ease - 0.5)
    held = start + move
    return held + above, held, np.full(frames, width + 0.002)


def _extras(
    build: Builder, rng: np.random.Generator, look: np.random.Generator, main: str, s: float, taken: Array
) -> None:
    """Small quiet things that stay clear of the main object's path."""
    for k in range(int(rng.integers(1, 4))):
        for _ in range(20):
            spot = np.array([rng.uniform(-0.6, 0.6), rng.uniform(-0.35, 0.35)])
            if np.min(np.linalg.norm(taken - spot, axis=1)) > 0.32:
                break
        else:
            continue
        taken = np.concatenate([taken, spot[None]])
        kind = str(choose(rng, [other for other in KINDS[:5] if other != main]))
        size = s * rng.uniform(0.45, 0.65)
        coat = build.material(f"extra{k}", muted(look, 0.3, 0.85, 0.35))
        name = f"{kind} {k + 1}"
        build.body(
            name,
            _object(build, kind, size, coat, "", coat, f"extra{k}"),
            (spot[0], spot[1], size),
            rng.uniform(0, 360),
        )


def _camera(
    rng: np.random.Generator, held: Array, s: float, fill: float, frames: int, aspect: float
) -> tuple[Array, Array]:
    """Eye and target, (F, 3), at the distance where the object fills a drawn share of the picture."""
    share = rng.uniform(0.10, 0.19)
    azimuth = np.radians(rng.uniform(-42, 42))
    elevation = np.radians(rng.uniform(18, 40))
    swing, climb = np.radians(rng.uniform(-13, 13)), np.radians(rng.uniform(-5, 5))
    zoom = rng.uniform(-0.12, 0.12)
    middle = held.mean(axis=0) + np.array([rng.uniform(-0.3, 0.3) * s * 2, 0.0, rng.uniform(-0.1, 0.45) * s])

    def eye_at(distance: float, turn: float, up: float) -> Array:
        a, e = azimuth + turn, elevation + up
        return middle + distance * np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])

    points = box_corners((s, s, s), held[frames // 2])
    distance = distance_for(
        share * 1.25, lambda d: (eye_at(d, 0, 0), middle), points, FOVY, aspect, 0.35, 3.0
    )
    phase = np.sin(np.arange(frames) / FPS * np.pi / 2 / 1.6 - np.pi / 4)
    eye = np.stack([eye_at(distance * (1 + zoom * p), swing * p, climb * p) for p in phase])
    follow = 0.35 * (held - held.mean(axis=0))
    return eye + follow, np.broadcast_to(middle, (frames, 3)) + follow
