"""What the README shows is so: the example runs, the request is valid, commands exist, every file has its place."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from cosmos_fast import video
from cosmos_fast.cli import main
from cosmos_fast.spec import Spec

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


def test_the_request_in_the_readme_is_a_valid_one(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = readme.split("```json\n")[1].split("```")[0]
    for name in ("street.mp4", "street_depth.mp4"):
        (tmp_path / name).touch()  # a spec is judged by suffix and existence; planning looks inside
    (tmp_path / "spec.json").write_text(text)
    spec = Spec.load(tmp_path / "spec.json")
    assert tuple(spec.controls) == ("edge", "depth") and spec.name == "street"


def test_every_module_has_a_place_in_the_readme() -> None:
    listing = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Files\n")[1].split("\n## ")[0]
    files = [*(ROOT / "cosmos_fast").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    files += [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "tools").glob("*.py")]
    named = re.findall(r"`([\w*]+)`", listing)
    missing = {
        path.stem for path in files if not any(fnmatch(path.stem, name) for name in [*named, "__init__"])
    }
    assert missing == set()


def test_commands_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(?:cosmos-fast|python tools/\S+) .*$", readme, re.MULTILINE)
    assert len(shown) >= 8
    helped = functools.cache(lambda tool: run(tool, "--help"))
    for line in shown:
        words = line.split("  #")[0].split()
        if words[0] == "python":
            options = helped(words[1])
        else:
            command = main.commands[words[1]]
            command = command.commands[words[2]] if words[1] == "checkpoint" else command
            options = " ".join(option for parameter in command.params for option in parameter.opts)
        for word in words:
            assert not word.startswith("--") or word in options.split() or word + " " in options, line
