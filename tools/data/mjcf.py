"""What both families of scenes share: the Scene record, MJCF text, lamps, meshes and camera placement."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cosmos_fast.formats import SpecError

from .colours import PALETTE

Array = npt.NDArray[np.float64]
Rgb = tuple[float, float, float]

FPS: Final = 10.0
"""Frames per second of all motion."""

LAYOUT, LOOK, PAINT = 0, 1, 2
"""Streams of random numbers. Shapes, places and motion come from LAYOUT, colours and lamps from LOOK: so nothing
that depth or segments show can tell a colour."""


def stream(seed: int, index: int, which: int, attempt: int = 0) -> np.random.Generator:
    """Random numbers that depend on these four numbers only."""
    return np.random.default_rng(np.random.SeedSequence([seed, index, which, attempt]))


@dataclass(frozen=True)
class Scene:
    """A scene and how it moves, F frames.

    Attributes:
        xml: MJCF text. Every top-level body is one instance; its name is the label's name.
        labels: label id -> body name; id 0 is what no body covers (sky).
        main: name of the main object's body.
        background: names that the segment painting leaves black.
        mocap: body -> (F, 7) position in metres and unit quaternion (w x y z).
        joints: joint -> (F,) radians or metres.
        eye, target: (F, 3) metres, camera and the point it looks at.
        pixels: texture -> (h, w, 3) picture in [0, 1] that replaces what the XML says.
        fog: whether the distance fades into the haze colour.
    """

    xml: str
    labels: tuple[str, ...]
    main: str
    background: frozenset[str]
    mocap: dict[str, Array]
    joints: dict[str, Array]
    eye: Array
    target: Array
    caption: str
    attributes: dict[str, Any]
    pixels: dict[str, Array] = field(default_factory=dict)
    fog: bool = False


@dataclass
class Builder:
    """Collects assets and bodies; the order of bodies is the order of labels."""

    assets: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: ["sky"])
    pixels: dict[str, Array] = field(default_factory=dict)

    def material(
        self, name: str, rgb: Sequence[float], finish: str = "matte", texture: str = "", **extra: Any
    ) -> str:
        """Adds a material and returns its name. Finishes: matte, shiny, metal, glow."""
        specular, shininess, emission = {
            "matte": (0.03, 0.05, 0.0),
            "shiny": (0.85, 0.75, 0.0),
            "metal": (0.7, 0.35, 0.0),
            "glow": (0.0, 0.0, 1.0),
        }[finish]
        image = f' texture="{texture}"' if texture else ""
        more = "".join(f' {key}="{value}"' for key, value in extra.items())
        self.assets.append(
            f'<material name="{name}" rgba="{numbers(rgb)} 1" specular="{specular}" shininess="{shininess}"'
            f' emission="{emission}"{image}{more}/>'
        )
        return name

    def mesh(self, name: str, vertices: Array) -> str:
        """Adds the convex hull of (N, 3) vertices; the origin stays where it is."""
        self.assets.append(f'<mesh name="{name}" inertia="shell" vertex="{numbers(vertices.ravel())}"/>')
        return name

    def body(
        self, name: str, inside: str, pos: Sequence[float] = (0, 0, 0), yaw: float = 0.0, moves: bool = False
    ) -> None:
        """Adds one instance. yaw in degrees; `moves` makes it a mocap body, posed in each frame."""
        if len(self.names) == 256:
            raise SpecError("scene: must hold at most 255 objects, got more. Ask for fewer frames.")
        self.names.append(name)
        mocap = ' mocap="true"' if moves else ""
        self.bodies.append(
            f'<body name="{name}" pos="{numbers(pos)}" euler="0 0 {yaw:.6g}"{mocap}>{inside}</body>'
        )


def numbers(values: Sequence[float] | Array) -> str:
    return " ".join(f"{float(value):.6g}" for value in values)


def geom(
    kind: str,
    size: Sequence[float],
    material: str,
    pos: Sequence[float] = (0, 0, 0),
    euler: Sequence[float] = (0, 0, 0),
) -> str:
    """A primitive: half sizes in metres, euler in degrees."""
    turn = f' euler="{numbers(euler)}"' if any(euler) else ""
    return f'<geom type="{kind}" size="{numbers(size)}" material="{material}" pos="{numbers(pos)}"{turn}/>'


def mesh_geom(mesh: str, material: str, pos: Sequence[float] = (0, 0, 0)) -> str:
    # MuJoCo moves a mesh to its centre of mass and the geom back, so vertices keep the body's coordinates.
    return f'<geom type="mesh" mesh="{mesh}" material="{material}" pos="{numbers(pos)}"/>'


def paint(rng: np.random.Generator, name: str) -> Rgb:
    """A named colour with a small change, RGB in [0, 1]."""
    spread = 0.012 if name in ("black", "white") else 0.03
    rgb = np.clip(np.array(PALETTE[name]) + rng.uniform(-spread, spread, 3), 0.02, 0.98)
    return float(rgb[0]), float(rgb[1]), float(rgb[2])


def muted(rng: np.random.Generator, low: float = 0.35, high: float = 0.8, saturation: float = 0.25) -> Rgb:
    """A quiet colour for what the caption does not name."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.0, saturation), rng.uniform(low, high))


def tinted(rgb: Sequence[float] | Array, factor: float) -> Rgb:
    r, g, b = (min(1.0, max(0.0, value * factor)) for value in rgb)
    return r, g, b


@dataclass(frozen=True)
class Light:
    """A named light: key lamp, fill from all sides, sky from zenith to horizon. All RGB."""

    name: str
    key: Rgb
    fill: Rgb
    zenith: Rgb
    horizon: Rgb


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def document(
    builder: Builder,
    light: Light,
    rng: np.random.Generator,
    extent: float,
    far: float,
    fovy: float,
    shadow_at: float,
    view: float,
) -> str:
    """MJCF of a whole scene.

    Args:
        extent: the scene's size in metres; the near plane lies at 2 % of it.
        far: far plane, metres.
        fovy: vertical field of view, degrees.
        shadow_at: half side of the area that gets shadows, in extents.
        view: where the camera looks, radians about z; the key lamp stands behind the camera.
    """
    azimuth, height = view + np.radians(rng.uniform(-65, 65)), np.radians(rng.uniform(38, 62))
    down = (np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), -np.sin(height))
    strength = rng.uniform(0.9, 1.08)
    key, fill = tinted(light.key, strength), tinted(light.fill, strength)
    return f"""<mujoco><compiler angle="degree"/>
<statistic extent="{extent}" center="0 0 0"/>
<visual><global fovy="{fovy:.6g}"/><quality shadowsize="2048" offsamples="4"/>
<map znear="0.02" zfar="{far / extent:.6g}" shadowclip="{shadow_at}" fogstart="{0.2 * far / extent:.6g}" fogend="{0.95 * far / extent:.6g}"/>
<headlight ambient="{numbers(fill)}" diffuse="0.12 0.12 0.12" specular="0 0 0"/>
<rgba fog="{numbers(light.horizon)} 1" haze="{numbers(light.horizon)} 1"/></visual>
<asset><texture type="skybox" builtin="gradient" rgb1="{numbers(light.zenith)}" rgb2="{numbers(light.horizon)}" width="64" height="384"/>
{chr(10).join(builder.assets)}</asset>
<worldbody><light name="key" type="directional" dir="{numbers(down)}" pos="{numbers([-extent * value for value in down])}" diffuse="{numbers(key)}" specular="0.5 0.5 0.5" ambient="0 0 0"/>
{chr(10).join(builder.bodies)}</worldbody></mujoco>"""


def box_corners(half: Sequence[float], centre: Sequence[float] = (0, 0, 0)) -> Array:
    """(8, 3) corners."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
    return signs * np.asarray(half) + np.asarray(centre)


def coverage(points: Array, eye: Array, target: Array, fovy: float, aspect: float) -> float:
    """Share of the picture inside the outline of (N, 3) points, not cut at its borders."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    seen = (points - eye) @ np.stack([right, np.cross(right, forward), forward]).T
    flat = seen[:, :2] / np.maximum(seen[:, 2:], 1e-3) / np.tan(np.radians(fovy) / 2)
    return _hull_area(flat) / (4.0 * aspect)


def _hull_area(points: Array) -> float:
    ordered = sorted(map(tuple, points.tolist()))

    def half(sequence: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        chain: list[tuple[float, ...]] = []
        for p in sequence:
            while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (p[1] - chain[-2][1]) <= (
                chain[-1][1] - chain[-2][1]
            ) * (p[0] - chain[-2][0]):
                chain.pop()
            chain.append(p)
        return chain[:-1]

    hull = np.array(half(ordered) + half(ordered[::-1]))
    x, y = hull[:, 0], hull[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def distance_for(
    share: float,
    place: Callable[[float], tuple[Array, Array]],
    points: Array,
    fovy: float,
    aspect: float,
    near: float,
    far: float,
) -> float:
    """Camera distance, metres, at which the points cover `share` of the picture; `place(distance)` -> eye, target."""
    for _ in range(24):
        middle = (near + far) / 2
        eye, target = place(middle)
        if coverage(points, eye, target, fovy, aspect) > share:
            near = middle
        else:
            far = middle
    return (near + far) / 2


def turn(yaw: Array | float) -> Array:
    """(..., 4) quaternion of a turn about z, radians."""
    half = np.asarray(yaw, dtype=np.float64) / 2
    return np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=-1)


def bearing(eye: Array, target: Array) -> float:
    """Where a camera looks, radians about z, at the middle of its path (F, 3)."""
    ahead = target[len(target) // 2] - eye[len(eye) // 2]
    return float(np.arctan2(ahead[1], ahead[0]))
