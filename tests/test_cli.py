"""The command line from spec to files: exit codes, streams, overrides, resume, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import media
import pytest
import torch
from system import (
    ENV,
    ROOT,
    call,
    clip_of,
    digests,
    fields,
    generate,
    generate_arguments,
    leftovers,
    write_spec,
)

from cosmos_fast.sidecar import SIDECAR_KEYS

IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 9)


def record_of(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def manifest(out: Path) -> list[tuple[str, str]]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [(line["name"], line["status"]) for line in map(json.loads, lines)]


# --- one clip ---


def test_generate_writes_everything_that_was_promised(models: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompt = "A busy street in the evening, photorealistic."
    spec = write_spec(tmp_path, "street", clip, edge={}, vis={"control_weight": 0.5}, seed=3, prompt=prompt)
    run = generate(models, out, spec)
    assert run.code == 0, run.err
    assert run.out == f"{out / 'street.mp4'}\n"  # stdout is results and nothing else
    assert "street: done" in run.err and "chunk 2/2 step 1/1" in run.err
    written = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert written == {
        "street.mp4", "street.json", "street.txt", "street_control_edge.mp4", "street_control_vis.mp4",
        "manifest.jsonl", "run.json",
    }  # fmt: skip
    for name in ("street", "street_control_edge", "street_control_vis"):
        assert media.read(out / f"{name}.mp4").shape == (9, 64, 64, 3)
    record = record_of(out, "street")
    assert set(record) == set(SIDECAR_KEYS)
    assert record["spec"]["edge"]["control_weight"] == 1.0 and record["spec"]["seed"] == 3
    assert record["model"] == "multi" and set(record["checkpoint"]) == {"edge", "vis", "depth", "seg", "vae"}
    assert len(record["seeds"]) == len(record["chunks"]) == 2
    assert record["output"]["sha256"] == digests(out)["street.mp4"]
    assert record["output"]["frames"] == 9 and record["output"]["fps"] == "25"
    assert manifest(out) == [("street", "done")] and leftovers(out) == []
    assert (out / "street.txt").read_text() == prompt
    cut = "prompt: the first 8 of 9 words and marks are read."
    assert cut in record["notes"] and f"street: {cut}" in run.err


def test_image_mode_tiles_and_output_dir_of_the_spec(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path, "still", clip, **IMAGE, output_dir="results", show_input=True, show_control_condition=True
    )
    arguments = generate_arguments(models, tmp_path, spec)
    run = call("generate", *arguments[3:])  # without -o
    out = tmp_path / "results"
    assert run.code == 0 and run.out == f"{out / 'still.jpg'}\n", run.err
    assert media.read(out / "still.jpg").shape == (1, 64, 3 * 64, 3)
    assert media.read(out / "still_control_edge.jpg").shape == (1, 64, 64, 3)


def test_output_folder_must_be_named_somewhere(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    run = call("generate", spec, "--checkpoint", models)
    assert run.code == 2 and "output folder: must be given with -o" in run.err and not run.out


def test_quiet_and_model_size_output(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    run = generate(models, tmp_path / "out", spec, "-q", "--no-keep-input-resolution")
    assert run.code == 0 and "step" not in run.err
    assert media.read(tmp_path / "out" / "still.jpg").shape == (1, 256, 256, 3)


# --- a batch ---


def test_a_clip_is_the_same_alone_and_in_a_mixed_batch(models: Path, clip: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "a_edge": {"edge": {}},
        "b_vis": {"vis": {"control_weight": 0.4}},
        "c_both": {"edge": {}, "vis": {"control_weight": 0.4}},
        "d_edge": {"edge": {"preset_edge_threshold": "low"}},
    }
    specs = [write_spec(tmp_path, name, clip, **IMAGE, **controls) for name, controls in kinds.items()]
    for options, expected in (
        ((), ["edge", "vis", "multi", "edge"]),
        (("--model", "multi"), ["multi", "multi", "multi", "multi"]),
    ):
        batch, alone = tmp_path / f"batch{len(options)}", tmp_path / f"alone{len(options)}"
        run = generate(models, batch, *specs, *options)
        assert run.code == 0 and len(run.paths) == 4, run.err
        assert [record_of(batch, name)["model"] for name in kinds] == expected
        for spec in specs:
            assert generate(models, alone, spec, *options).code == 0
        assert digests(batch) == digests(alone)
        assert len(set(digests(batch).values())) > 6


def test_skip_invalid_runs_the_rest(models: Path, clip: Path, tmp_path: Path) -> None:
    good = write_spec(tmp_path / "specs", "good", clip, **IMAGE)
    write_spec(tmp_path / "specs", "bad", clip, guidance=9)
    write_spec(tmp_path / "specs", "gone", tmp_path / "no.mp4")
    out = tmp_path / "out"
    strict = generate(models, out, good.parent)
    assert strict.code == 2 and not strict.out and not out.exists()
    dry = generate(models, out, good.parent, "--skip-invalid", "--dry-run")
    assert dry.code == 1 and not out.exists()
    loose = generate(models, out, good.parent, "--skip-invalid")
    assert loose.code == 1 and loose.paths == [out / "good.jpg"]
    assert "guidance" in loose.err and "no.mp4" in loose.err


# --- checks without work ---


def test_dry_run_and_plan_make_nothing(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "street", clip, edge={}, vis={})
    dry = generate(models, tmp_path / "out", spec, "--dry-run")
    assert dry.code == 0 and "street" in dry.out and "2 x 5" in dry.out and not (tmp_path / "out").exists()
    run = call("plan", spec, "--json", "--checkpoint", models)
    assert run.code == 0
    (planned,) = json.loads(run.out)["clips"]
    assert planned["model"] == "multi" and planned["chunks"] == [[0, 5], [4, 9]] and planned["frames"] == 9
    assert planned["model_size"] == [256, 256] and planned["network_calls"] == 4


def test_plan_with_published_sizes_needs_no_weights(clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "street", clip, num_video_frames_per_chunk=93, resolution="720", num_steps=35)
    run = call("plan", spec, "--checkpoint", "published")
    assert run.code == 0 and "1 x 93" in run.out and "960x960" in run.out


def test_schema_takes_what_generate_takes(clip: Path) -> None:
    import jsonschema  # here, so that a machine without it runs the rest of this file

    schema = json.loads(call("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(fields(str(clip)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(fields(str(clip), dept={}), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(fields(str(clip), guidance=8), schema)


def test_info_is_json_with_every_op() -> None:
    record = json.loads(call("info", "--json", "--device", "cpu").out)
    assert record["device"] == "cpu" and "libx264" in record["codecs"]
    assert {op["op"] for op in record["ops"]["float32"]} >= {"attention", "adaln"}
    assert "ops on cpu in bfloat16" in call("info", "--device", "cpu").out


def test_info_tells_where_downloads_lie_and_keeps_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there yet"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for token, answer in (("hf_secret", "found"), ("", "none; for gated weights: hf auth login")):
        monkeypatch.setenv("HF_TOKEN", token)
        told = call("info", "--json", "--device", "cpu").out
        assert "hf_secret" not in told
        record = json.loads(told)
        assert record["hub token"] == answer and record["cache"].startswith(
            str(tmp_path / "not" / "there yet")
        )
        assert "GiB free" in record["cache"]


def test_unknown_key_and_control_are_named(clip: Path, tmp_path: Path) -> None:
    plan = ("plan", "--checkpoint", "published")
    run = call(*plan, write_spec(tmp_path, "street", clip, dept={}))
    assert run.code == 2 and "dept" in run.err and "depth" in run.err and not run.out
    run = call(*plan, write_spec(tmp_path, "street", clip), "--set", "edge.control_wait=1")
    assert run.code == 2 and "control_weight" in run.err
    run = call(*plan, write_spec(tmp_path, "street", clip), "--set", "edge")
    assert run.code == 2 and "CONTROL.FIELD=VALUE" in run.err
    assert call(*plan, tmp_path / "no.json").code == 2
    assert call(*plan).code == 2
    assert call("generate", "--no-such-option").code == 2


def test_overrides_replace_keys(clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "street", clip, seed=1)
    changed = call(
        "plan", spec, "--seed", "8", "--prompt", "42", "--num-steps", "9", "--max-frames", "3",
        "--set", "edge.control_weight=0.25", "--set", "vis.control_weight=0.5", "--json",
        "--num-video-frames-per-chunk", "93", "--checkpoint", "published",
    )  # fmt: skip
    assert changed.code == 0, changed.err
    (planned,) = json.loads(changed.out)["clips"]
    assert planned["steps"] == 9 and planned["frames"] == 3 and planned["model"] == "multi"
    assert call("plan", spec, "--seed", "1.5", "--checkpoint", "published").code == 2


@pytest.mark.parametrize("option, rule", [(("--recipe", "int4"), "preset must be one of"), (("--vae-window", "3"), "vae_encode_window"), (("--model", "blur"), "model: must be auto or one of"), (("--device", "tpu"), "device"), (("--codec", "h264"), "libx264")])  # fmt: skip
def test_bad_options_start_nothing(
    models: Path, clip: Path, tmp_path: Path, option: tuple[str, str], rule: str
) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    run = generate(models, tmp_path / "out", spec, *option)
    assert run.code == 2 and rule in run.err and not (tmp_path / "out").exists()


# --- checkpoints ---


def test_inspect_and_convert_round_trip(models: Path, clip: Path, tmp_path: Path) -> None:
    (source,) = (models / "general" / "edge").iterdir()
    target = tmp_path / "edge.safetensors"
    assert "single" in call("checkpoint", "inspect", source).out
    gone = call("checkpoint", "inspect", tmp_path / "gone.pt")
    assert gone.code == 3 and gone.out == "" and "no such file" in gone.err
    assert call("checkpoint", "convert", source, target).code == 0
    seen = call("checkpoint", "inspect", target, "--finite")
    assert seen.code == 0 and "safetensors" in seen.out and "config" in seen.out
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    assert generate(models, tmp_path / "a", spec).code == 0
    more = ("--model", "edge", "--vae", models / "tokenizer.pth", "--num-video-frames-per-chunk", "1")
    shutil.copy(models / "text.safetensors", tmp_path)
    run = generate(target, tmp_path / "b", spec, *more)
    assert run.code == 0, run.err
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# --- resume ---


def test_resume_keeps_what_is_done_and_redoes_what_changed(models: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    specs = [write_spec(tmp_path, name, clip, **IMAGE) for name in ("one", "two")]

    def resumed(*options: str) -> tuple[int, list[str]]:
        run = generate(models, out, *specs, "--resume", *options)
        assert run.paths and {path.name for path in run.paths} == {"one.jpg", "two.jpg"}
        return run.code, [line for line in run.err.splitlines() if line.startswith(("one: ", "two: "))]

    assert resumed()[0] == 0
    before = digests(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.jpg")}
    code, lines = resumed()
    assert code == 0 and lines == ["one: already done", "two: already done"]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.jpg")} == stamps

    with open(out / "one.jpg", "ab") as file:
        file.write(b"edited")
    lines = resumed()[1]
    assert (
        "one: made again: one.jpg is not the file that was written" in lines and "two: already done" in lines
    )
    assert digests(out) == before

    write_spec(tmp_path, "two", clip, **IMAGE, seed=9)
    lines = resumed()[1]
    assert "one: already done" in lines and "two: made again: spec changed since it was made" in lines
    assert digests(out)["two.jpg"] != before["two.jpg"]

    lines = resumed("--recipe", "exact")[1]
    assert "one: made again: recipe changed since it was made" in lines
    shutil.copy(clip, tmp_path / "same_name.mp4")
    write_spec(tmp_path, "two", tmp_path / "same_name.mp4", **IMAGE)
    resumed("--recipe", "exact")
    clip_of(tmp_path / "same_name.mp4", 9, shift=2)
    lines = resumed("--recipe", "exact")[1]
    assert "one: already done" in lines and "two: made again: input file changed since it was made" in lines
    (out / "one.json").unlink()
    assert [line for line in resumed("--recipe", "exact")[1] if line.startswith("one: done")]


def test_resume_notices_other_weights(models: Path, clip: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    spec, out = write_spec(tmp_path, "one", clip, **IMAGE), tmp_path / "out"
    assert generate(mine, out, spec).code == 0
    for path in (next((mine / "general" / "edge").iterdir()), mine / "tokenizer.pth"):
        assert "already done" in generate(mine, out, spec, "--resume").err
        os.utime(path, ns=(1, 1))  # replaced by a file of the same size
        assert "made again: checkpoint changed" in generate(mine, out, spec, "--resume").err


# --- signals ---


@pytest.fixture(scope="module")
def unstopped(
    models: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], dict[str, str]]:
    """Two requests, and the digests of what a run makes of them that nobody stops."""
    folder = tmp_path_factory.mktemp("unstopped")
    specs = [write_spec(folder, "a", clip, **IMAGE), write_spec(folder, "b", clip, num_steps=2)]
    assert generate(models, folder / "out", *specs).code == 0
    return specs, digests(folder / "out")


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["term", "int", "kill"],
)
def test_a_stopped_run_resumes_to_the_same_bytes(
    models: Path, unstopped: tuple[list[Path], dict[str, str]], tmp_path: Path, number: int, code: int
) -> None:
    (specs, whole), out = unstopped, tmp_path / "out"
    command = [sys.executable, "-m", "cosmos_fast.cli", *generate_arguments(models, out, *specs)]
    env = ENV | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "chunk 1/2 step 2/2" in line:
                    break
            else:
                pytest.fail("the run ended before its second clip")
            time.sleep(0.2)  # into the decoder of the first chunk
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(timeout=30) == code
        finally:
            process.kill()
    assert not (out / "b.mp4").exists() and not (out / "b.json").exists()
    assert (out / "a.jpg").exists() and manifest(out) == [("a", "done")]
    if number != signal.SIGKILL:
        assert "stopped on request" in rest and leftovers(out) == []
    again = generate(models, out, *specs, "--resume")
    assert again.code == 0 and "a: already done" in again.err, again.err
    assert leftovers(out) == [] and manifest(out) == [("a", "done"), ("b", "done")]
    assert digests(out) == whole
