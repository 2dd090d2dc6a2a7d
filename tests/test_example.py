"""examples/generate.py does what the README says it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from cosmos_fast import video

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "A street in warm evening light."


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_writes_the_clip_it_was_asked_for(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    with video.Writer(tmp_path / "in.mp4", (96, 64), 8) as writer:
        writer.write(frames)
    request = {
        "prompt": PROMPT, "video_path": "in.mp4", "resolution": "256", "num_steps": 2, "max_frames": 1,
        "num_video_frames_per_chunk": 1, "edge": {},
    }  # fmt: skip
    spec, models, prompts = tmp_path / "spec.json", tmp_path / "models", tmp_path / "prompts.safetensors"
    spec.write_text(json.dumps(request))
    run("tools/make_checkpoint.py", models, "--kind", "edge", "--size", "tiny", "--with-vae")
    run("tools/make_embeddings.py", prompts, "--spec", spec, "--random", 0, "--width", 256, "--tokens", 32)
    said = run("examples/generate.py", spec, models, "edge", prompts, tmp_path / "out.mp4")
    made = video.probe(tmp_path / "out.mp4")
    assert made.frames == 1 and made.fps == 8 and min(made.size) % 16 == 0
    assert "chunk 1 of 1" in said and "denoise" in said


def test_readme_shows_the_library_as_the_example_uses_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "generate.py").read_text(encoding="utf-8")
    for line in (
        "engine.planned(Spec.load(",
        "for part in engine.stream(clip):",
        "writer.write(part.frames)",
    ):
        assert line in readme and line in example
