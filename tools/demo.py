"""The whole system on a small scale: two requests through `cosmos-fast generate` with the model inside the package.

    python tools/demo.py [--out out/demo]

Input is a clip of a simulated table scene, with the simulator's depth and segments, that lies in examples/clips. The
first request asks the multi-control model for another colour of the object under edge, depth and segment control; the
second asks the four-step edge model. Prints where the clips are and writes a picture of each: input, controls, result.
No download, no GPU needed. With --render the input clip is made again, which needs mujoco.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from cosmos_fast import video  # noqa: E402
from cosmos_fast.cli import main as cosmos_fast  # noqa: E402

CLIPS = ROOT / "examples" / "clips"
INPUTS = {"video": "table.mp4", "depth": "table_depth.mp4", "seg": "table_seg.mp4"}
INDEX = 1_000_000
"""Scene of tools/data that the committed clip shows: the first of those that training never sees."""

FRAMES, FPS = 17, 10
SHEET_FRAMES = 4
REQUESTS = {
    "demo_multicontrol": ("multi", ("edge", "depth", "seg")),
    "demo_distilled": ("edge/distilled", ("edge",)),
}


def requests(folder: Path, steps: int) -> list[tuple[str, Path]]:
    """(model, spec file): multi-control base model, and the few-step edge model."""
    folder.mkdir(parents=True, exist_ok=True)
    told = json.loads((CLIPS / "table.json").read_text(encoding="utf-8"))
    common = {"video_path": str(CLIPS / INPUTS["video"])}
    specs = {
        "demo_multicontrol": {
            "prompt": told["other_prompt"], "num_steps": steps, "edge": {"control_weight": 0.4},
            "depth": {"control_weight": 0.3, "control_path": str(CLIPS / INPUTS["depth"])},
            "seg": {"control_weight": 0.3, "control_path": str(CLIPS / INPUTS["seg"])},
        },
        "demo_distilled": {"prompt": told["prompt"], "edge": {}},
    }  # fmt: skip
    for name, fields in specs.items():
        (folder / f"{name}.json").write_text(json.dumps(common | fields, indent=2), encoding="utf-8")
    return [(REQUESTS[name][0], folder / f"{name}.json") for name in specs]


def contact_sheet(folder: Path, name: str, controls: tuple[str, ...], path: Path) -> None:
    """Rows input, controls, result, each with its name; columns frames spread over the clip."""
    result = video.probe(folder / f"{name}.mp4")
    files = {"input": CLIPS / INPUTS["video"]}
    files |= {control: folder / f"{name}_control_{control}.mp4" for control in controls}
    files |= {"result": folder / f"{name}.mp4"}
    columns = np.linspace(0, result.frames - 1, SHEET_FRAMES).astype(int)
    rows = []
    for title, file in files.items():
        with video.Source(video.probe(file), result.size) as source:
            row = np.concatenate([source.read(int(i), int(i) + 1)[0] for i in columns], axis=1)
        label = np.full((16, row.shape[1], 3), 255, np.uint8)
        cv2.putText(label, title, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [label, row]
    # 256 colours and half the size keep the picture small enough for a README.
    sheet = cv2.resize(np.concatenate(rows), None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    write_png(path, sheet)


def write_png(path: Path, picture_HW3: np.ndarray) -> None:
    done, data = cv2.imencode(".png", picture_HW3[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise SystemExit(f"demo: {path} could not be encoded as PNG.")
    path.write_bytes(data.tobytes())


def render() -> None:
    """Make the committed input again: scene INDEX, colours, depth and segments as small mp4 files."""
    from tools.adherence import recoloured
    from tools.data.colours import PALETTE
    from tools.data.render import render_clip

    clip = render_clip(INDEX, 0, FRAMES)
    colours = list(PALETTE)
    own = clip.attributes["colour"]
    other = "blue" if own not in ("blue", "purple") else "green"
    assert other in colours
    CLIPS.mkdir(parents=True, exist_ok=True)
    told = {"prompt": clip.caption, "other_prompt": recoloured(clip.caption, own, other), "scene": INDEX,
            "colour": own, "other_colour": other}  # fmt: skip
    (CLIPS / "table.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    grey = np.repeat(clip.depth8[..., None], 3, axis=3)
    for name, frames in (("video", clip.rgb), ("depth", grey), ("seg", clip.seg)):
        write_small(CLIPS / INPUTS[name], frames)
    main = clip.labels == clip.attributes["main"]
    np.savez_compressed(
        CLIPS / "table_main.npz", main=np.packbits(main, axis=None), shape=np.array(main.shape)
    )


def write_small(path: Path, frames: np.ndarray) -> None:
    """An mp4 at constant quality, a few tens of kB, where `video.Writer` aims at a bit rate for results."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(FPS), options={"crf": "20", "preset": "veryslow"}
        )
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )  # fmt: skip
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=12, help="sampling steps of the multi-control clip")
    parser.add_argument("--render", action="store_true", help="make the input clip again; needs mujoco")
    args = parser.parse_args()
    if args.render:
        render()
        return
    start = time.time()
    recipe = "exact" if torch.cuda.is_available() else "fp32"
    for model, spec in requests(args.out / "specs", args.steps):
        try:
            cosmos_fast(["generate", str(spec), "-o", str(args.out), "--model", model, "--recipe", recipe])
        except SystemExit as done:
            if done.code:
                raise
    for name, (_, controls) in REQUESTS.items():
        contact_sheet(args.out, name, controls, args.out / f"{name}.png")
        print(f"{args.out / name}.mp4   {args.out / name}.png")
    print(f"demo: two clips with the tiny model inside the package; {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
