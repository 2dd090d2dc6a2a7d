"""Render one clip: colours, metric depth, instance labels.

    clip = render_clip(index=7, seed=0)

One GL context per process, made at the first clip; a fork after that cannot use it, so start workers first.
"""

from __future__ import annotations

import colorsys
import importlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_fast.formats import EnvironmentProblem, SpecError

from .mjcf import PAINT, Scene, stream
from .scenes import build_scene

U8 = npt.NDArray[np.uint8]
SHARE = (0.05, 0.36)
"""Smallest and largest share of a picture that the main object may fill; other draws are thrown away."""
ATTEMPTS = 12
_context: tuple[int, int, int, Any] | None = None  # process id, width, height, GL context


@dataclass(frozen=True)
class Clip:
    """F frames of H by W pixels.

    Attributes:
        rgb: (F, H, W, 3) uint8.
        depth: (F, H, W) float32, metres along the camera's axis; the far plane where there is nothing.
        labels: (F, H, W) uint8 instance ids; names are in attributes["labels"], id 0 is the sky.
        caption: what the clip shows; always names the main object's colour.
        attributes: what was drawn, JSON types: family, kind, colour, rgb, finish, place, light, action,
            main (label id of the main object), labels (names by id), background (ids left black), seed, index.
    """

    rgb: U8
    depth: npt.NDArray[np.float32]
    labels: U8
    caption: str
    attributes: dict[str, Any]

    @property
    def depth8(self) -> U8:
        """(F, H, W) uint8 inverse depth, near is large, stretched over the clip's own range."""
        return depth_control(self.depth)

    @property
    def seg(self) -> U8:
        """(F, H, W, 3) uint8 segment painting, random colours fixed by seed and index."""
        return seg_control(
            self.labels, self.attributes["background"], self.attributes["seed"], self.attributes["index"]
        )


def depth_control(depth: npt.NDArray[np.float32]) -> U8:
    """(F, H, W) metres -> uint8 inverse depth scaled by one minimum and maximum of the whole clip, truncated."""
    inverse = 1.0 / depth.astype(np.float32)
    low, high = inverse.min(), inverse.max()
    return ((inverse - low) / (high - low + 1e-8) * 255.0).astype(np.uint8)


def seg_control(labels: U8, background: list[int], seed: int, index: int) -> U8:
    """Paint (F, H, W) labels as the published seg control: one random HSV colour per object on black, (F, H, W, 3).

    Hue in [0, 1], saturation in [0.1, 1], value in [0.2, 1]; objects draw their colours largest first.
    """
    rng = stream(seed, index, PAINT)
    counts = np.bincount(labels.ravel(), minlength=256)
    table = np.zeros((256, 3), dtype=np.uint8)
    for label in sorted(np.flatnonzero(counts), key=lambda k: (-counts[k], k)):
        if label not in background:
            hsv = rng.uniform(), rng.uniform(0.1, 1.0), rng.uniform(0.2, 1.0)
            table[label] = (np.array(colorsys.hsv_to_rgb(*hsv)) * 255.0).astype(np.uint8)
    return table[labels]


def _mujoco() -> Any:
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except Exception as error:  # it opens the GL library while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            raise EnvironmentProblem(
                f"rendering: needs the package mujoco, got {error}. Run: pip install mujoco"
            ) from error
        raise _no_context(error) from error
    return mujoco


def _no_context(error: Exception) -> EnvironmentProblem:
    """Each GL binding raises its own types, ImportError and AttributeError too."""
    return EnvironmentProblem(
        f"rendering: MUJOCO_GL={os.environ['MUJOCO_GL']} must open a GL context, got {type(error).__name__}: "
        f"{error}. Install libegl1 (apt-get install libegl1 libgl1) or set MUJOCO_GL=osmesa."
    )


def _context_class() -> Any:
    # By name, not from mujoco.gl_context: that one reads MUJOCO_GL when mujoco is imported, which may be too early.
    backend = os.environ["MUJOCO_GL"].lower()
    if backend not in ("egl", "osmesa"):
        raise EnvironmentProblem(
            f"rendering: MUJOCO_GL must be egl or osmesa, got {backend!r}. Unset it for egl."
        )
    return importlib.import_module(f"mujoco.{backend}").GLContext


def open_context(width: int, height: int) -> Any:
    """This process's GL context, made current; made anew for another size.

    Raises:
        EnvironmentProblem: mujoco is missing, no GL device answers, or the context was made before a fork.
    """
    global _context
    if _context is not None and _context[0] != os.getpid():
        raise EnvironmentProblem(
            "rendering: a GL context belongs to the process that made it, got a fork of that process. "
            "Start workers with the spawn method."
        )
    _mujoco()
    if _context is None or _context[1:3] != (width, height):
        if _context is not None:
            _context[3].free()
            _context = None
        try:
            context = _context_class()(width, height)
        except EnvironmentProblem:
            raise
        except Exception as error:
            raise _no_context(error) from error
        _context = (os.getpid(), width, height, context)
    _context[3].make_current()
    return _context[3]


def render_clip(index: int, seed: int, frames: int = 17, size: tuple[int, int] = (320, 192)) -> Clip:
    """The clip of (seed, index): the same bytes each time on the same renderer.

    Args:
        index: 0 and up; see scenes.HELD_OUT for the split.
        seed: 0 and up.
        frames: F, one more than a multiple of 4.
        size: width and height in pixels.
    Raises:
        SpecError: frames, size, seed or index out of range.
        EnvironmentProblem: no mujoco or no GL.
    """
    width, height = size
    if frames < 1 or frames % 4 != 1:
        raise SpecError(
            f"frames: must be one more than a multiple of 4, got {frames}. Try {frames // 4 * 4 + 1}."
        )
    if not (16 <= width <= 4096 and 16 <= height <= 4096):
        raise SpecError(f"size: both sides must lie in 16..4096, got {width}x{height}. Try 320x192.")
    if index < 0 or seed < 0:
        raise SpecError(f"index and seed: must be 0 or more, got {index} and {seed}. Count from 0.")
    open_context(width, height)
    for attempt in range(ATTEMPTS):
        scene = build_scene(index, seed, frames, width / height, attempt)
        passes = _passes(scene, frames, width, height)
        if passes is not None:
            rgb, depth, labels = passes
            ids = {name: k for k, name in enumerate(scene.labels)}
            attributes = dict(
                scene.attributes,
                main=ids[scene.main],
                labels=list(scene.labels),
                background=sorted(ids[name] for name in scene.background),
                seed=seed,
                index=index,
            )
            return Clip(rgb, depth, labels, scene.caption, attributes)
    raise SpecError(
        f"scene {index} of seed {seed}: the main object must fill {SHARE[0]:.0%} to {SHARE[1]:.0%} of each frame, "
        f"got {ATTEMPTS} draws that do not. Use another index."
    )


def _passes(
    scene: Scene, frames: int, width: int, height: int
) -> tuple[U8, npt.NDArray[np.float32], U8] | None:
    """Colours, depth, labels; None once the main object is found too small, too large or at the border."""
    mujoco = _mujoco()
    model = mujoco.MjModel.from_xml_string(scene.xml)
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    for texture, picture in scene.pixels.items():
        slot = model.texture(texture).id
        first, size = model.tex_adr[slot], picture.size
        model.tex_data[first : first + size] = np.round(picture * 255.0).astype(np.uint8).ravel()
    data = mujoco.MjData(model)
    gl = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
    try:
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, gl)
        gl.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        return _loop(mujoco, scene, model, data, gl, frames, width, height)
    finally:
        gl.free()


def _loop(
    mujoco: Any, scene: Scene, model: Any, data: Any, gl: Any, frames: int, width: int, height: int
) -> tuple[U8, npt.NDArray[np.float32], U8] | None:
    view = mujoco.MjvScene(model, maxgeom=2000)
    options, camera, area = mujoco.MjvOption(), mujoco.MjvCamera(), mujoco.MjrRect(0, 0, width, height)
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    flags = mujoco.mjtRndFlag
    label_of = _label_table(mujoco, scene, model)
    main = scene.labels.index(scene.main)
    rgb = np.empty((frames, height, width, 3), dtype=np.uint8)
    depth = np.empty((frames, height, width), dtype=np.float32)
    labels = np.empty((frames, height, width), dtype=np.uint8)
    codes, window = np.empty((height, width, 3), dtype=np.uint8), np.empty((height, width), dtype=np.float32)
    near, far = model.vis.map.znear * model.stat.extent, model.vis.map.zfar * model.stat.extent
    # First, last and middle frame first: a bad draw shows there and costs little.
    for f in dict.fromkeys((0, frames - 1, frames // 2, *range(frames))):
        for body, pose in scene.mocap.items():
            slot = model.body(body).mocapid[0]
            data.mocap_pos[slot], data.mocap_quat[slot] = pose[f, :3], pose[f, 3:]
        for joint, value in scene.joints.items():
            data.qpos[model.joint(joint).qposadr[0]] = value[f]
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        _aim(camera, scene.eye[f], scene.target[f])
        mujoco.mjv_updateScene(model, data, options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, view)
        view.flags[flags.mjRND_REFLECTION] = False
        view.flags[flags.mjRND_SEGMENT] = view.flags[flags.mjRND_IDCOLOR] = True
        view.flags[flags.mjRND_SHADOW] = view.flags[flags.mjRND_FOG] = False
        mujoco.mjr_render(area, view, gl)
        mujoco.mjr_readPixels(codes, window, area, gl)
        # The picture carries segid + 1, which numbers the geoms of this view.
        by_code = np.zeros(view.ngeom + 1, dtype=np.uint8)
        for drawn in view.geoms[: view.ngeom]:
            if drawn.segid >= 0:
                by_code[drawn.segid + 1] = label_of[drawn.objid]
        number = (
            codes[..., 0].astype(np.int32) + codes[..., 1] * np.int32(256) + codes[..., 2] * np.int32(65536)
        )
        labels[f] = by_code[number][::-1]
        # Reversed z: the window holds near/(far - near) * (far/z - 1).
        depth[f] = (near * far / (window * (far - near) + near))[::-1]
        if not _well_placed(labels[f] == main):
            return None
        view.flags[flags.mjRND_SEGMENT] = view.flags[flags.mjRND_IDCOLOR] = False
        view.flags[flags.mjRND_SHADOW] = True
        view.flags[flags.mjRND_FOG] = scene.fog
        mujoco.mjr_render(area, view, gl)
        mujoco.mjr_readPixels(rgb[f], None, area, gl)
        rgb[f] = rgb[f, ::-1].copy()
    return rgb, depth, labels


def _label_table(mujoco: Any, scene: Scene, model: Any) -> npt.NDArray[np.uint8]:
    """Label of each geom: that of the top-level body it hangs on."""
    ids = {name: k for k, name in enumerate(scene.labels)}
    table = np.zeros(model.ngeom, dtype=np.uint8)
    for g in range(model.ngeom):
        body = int(model.geom_bodyid[g])
        while model.body_parentid[body] != 0:
            body = int(model.body_parentid[body])
        table[g] = ids[model.body(body).name]
    return table


def _aim(camera: Any, eye: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> None:
    forward = target - eye
    camera.lookat[:] = target
    camera.distance = float(np.linalg.norm(forward))
    camera.azimuth = float(np.degrees(np.arctan2(forward[1], forward[0])))
    camera.elevation = float(np.degrees(np.arcsin(forward[2] / camera.distance)))


def _well_placed(mask: npt.NDArray[np.bool_]) -> bool:
    return SHARE[0] <= float(mask.mean()) <= SHARE[1]
