"""The prompt encoder in a batch: chosen, run before the network is loaded, remembered on disk, written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from system import Run, call, clip_of, digests, generate, write_spec

from cosmos_fast import engine, reason1
from cosmos_fast.formats import EnvironmentProblem, SpecError
from cosmos_fast.prompts import text_encoder
from cosmos_fast.spec import NEGATIVE_PROMPT
from cosmos_fast.text import FileText
from cosmos_fast.text_cache import published_text

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
}  # fmt: skip
IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 5)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of width 2 x 32, which the smallest networks read."""
    config = language.CONFIG | SIZES
    folder = tmp_path_factory.mktemp("language")
    return language.write(folder, language.plain_model(config=config), config=config)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened, in order: loading and closing the prompt encoder, loading a network."""
    happened: list[str] = []

    def record(owner: Any, name: str, what: str) -> None:
        plain = getattr(owner, name)

        def told(self: Any, *given: Any, **options: Any) -> Any:
            happened.append(what)
            return plain(self, *given, **options)

        monkeypatch.setattr(owner, name, told)

    record(reason1.Reason1, "load", "encoder")
    record(reason1.Reason1, "close", "freed")
    record(engine.Engine, "_load_network", "network")
    return happened


def run(models: Path, out: Path, encoder: Path | str, cache: Path, *more: str | Path) -> Run:
    return generate(models, out, *more, "--text-encoder", encoder, "--cache-dir", cache)


def test_prompts_of_the_batch_are_encoded_first_and_once(
    models: Path, language_model: Path, clip: Path, tmp_path: Path, order: list[str]
) -> None:
    specs = [
        write_spec(tmp_path, "one", clip, **IMAGE),
        write_spec(tmp_path, "two", clip, prompt="An empty street.", **IMAGE),
    ]
    done = run(models, tmp_path / "out", language_model, tmp_path / "cache", *specs)
    assert done.code == 0, done.err
    assert order == ["encoder", "freed", "network"]
    assert "encoding 3 prompts" in done.err  # two, and the negative one that both share
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 3
    order.clear()
    again = run(models, tmp_path / "again", language_model, tmp_path / "cache", *specs)
    assert again.code == 0 and order == ["network"] and "encoding" not in again.err
    assert digests(tmp_path / "out") == digests(tmp_path / "again")
    assert digests(tmp_path / "out")["one.jpg"] != digests(tmp_path / "out")["two.jpg"]
    order.clear()
    specs.append(write_spec(tmp_path, "three", clip, prompt="New.", **IMAGE))
    more = run(models, tmp_path / "out", language_model, tmp_path / "empty", *specs, "--resume")
    assert more.code == 0 and "encoding 2 prompts" in more.err  # of the one clip that is not done


def test_offload_and_int8_on_the_command_line(
    models: Path, language_model: Path, clip: Path, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    for mode in ("bf16", "offload", "int8"):
        done = run(models, tmp_path / mode, language_model, tmp_path / "cache", spec, "--text-mode", mode)
        assert done.code == 0, done.err
        assert ("encoding 2 prompts" in done.err) == (mode != "offload")  # bf16 and offload share entries


def test_a_long_prompt_is_told(models: Path, language_model: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "still", clip, prompt="street " * 100, **IMAGE)
    done = run(models, tmp_path / "out", language_model, tmp_path / "cache", spec)
    assert done.code == 0 and "only the first 512" in done.err


def test_an_encoder_of_another_width_is_refused_before_it_is_loaded(
    models: Path, clip: Path, tmp_path: Path, order: list[str]
) -> None:
    folder = language.write(tmp_path / "language", language.plain_model())
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    done = run(models, tmp_path / "out", folder, tmp_path / "cache", spec)
    assert done.code == 3 and "reads embeddings of width 64, got 144" in done.err
    assert order == [] and not (tmp_path / "out").exists()


def test_requests_that_contradict_themselves(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    out, cache = tmp_path / "out", tmp_path / "cache"
    both = run(models, out, "reason1", cache, spec, "--text-embeddings", "e.safetensors")
    assert both.code == 2 and "either --text-embeddings or --text-encoder" in both.err
    unknown = run(models, out, "org/repo", cache, spec)
    assert unknown.code == 3 and "must be 'reason1' or an existing folder, got 'org/repo'" in unknown.err
    assert not out.exists()
    for key, given in (("text_encoder", "reason1"), ("text_embeddings", Path("e.safetensors"))):
        options = {"checkpoint": None, "text_encoder": None, "text_embeddings": None, key: given}
        with pytest.raises(SpecError, match=f"{key.replace('_', '-')}: the tiny model reads prompts itself"):
            text_encoder(options)


def test_prompts_of_published_networks_are_read_by_the_published_encoder(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network connection both end in one sentence; what makes pictures is asked for first."""
    from huggingface_hub import errors

    asked = []

    def offline(repo: str, file: str, **_: Any) -> str:
        asked.append(repo)
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    text = published_text(device="cpu", folder=tmp_path / "cache")
    assert text.width == 100352 and text.record["encoder"] == "nvidia/Cosmos-Reason1-7B" and asked == []
    with pytest.raises(EnvironmentProblem, match="Cosmos-Reason1-7B.*hub cannot be reached"):
        text.encode(["a"])
    assert asked == ["nvidia/Cosmos-Reason1-7B"]
    asked.clear()
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    done = call(
        "generate", spec, "-o", tmp_path / "out", "--checkpoint", "edge", "--device", "cpu", "--no-guardrails"
    )
    assert done.code == 3 and "hub cannot be reached" in done.err
    assert asked[0] != "nvidia/Cosmos-Reason1-7B"


def test_the_sidecar_names_the_encoder(
    models: Path, language_model: Path, clip: Path, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert run(models, out, language_model, cache, spec, "--text-mode", "offload").code == 0
    text = json.loads((out / "still.json").read_text())["text"]
    assert text["encoder"] == str(language_model) and len(text["revision"]) == 64
    assert (text["mode"], text["precision"]) == ("offload", "bfloat16")
    kept = run(models, out, language_model, cache, spec, "--text-mode", "auto", "--resume")
    assert "already done" in kept.err
    other = run(models, out, language_model, cache, spec, "--text-mode", "int8", "--resume")
    assert other.code == 0 and "text changed since it was made" in other.err
    assert generate(models, out, spec, "--resume").code == 0  # with the encoder beside the checkpoint
    assert json.loads((out / "still.json").read_text())["text"] == {"encoder": "TinyText"}


# --- the tool ---


def tool(*arguments: str | Path) -> int:
    import runpy

    main = runpy.run_path(str(ROOT / "tools/make_embeddings.py"))["main"]
    return main([str(argument) for argument in arguments])


def test_the_tool_writes_what_the_encoder_says(language_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "prompts.safetensors"
    options = ("--text-encoder", language_model, "--device", "cpu", "--cache-dir", tmp_path / "cache")
    assert tool(out, "--prompt", "A", "--default-negative", *options) == 0
    text = FileText(out)
    assert (text.tokens, text.width) == (512, 64) and text.metadata["encoder"] == str(language_model)
    expected = reason1.Reason1(language_model, device="cpu").encode(["A", NEGATIVE_PROMPT])
    for found, tensor in zip(text.encode(["A", NEGATIVE_PROMPT]), expected, strict=True):
        assert torch.equal(found, tensor)


def test_the_tool_reports_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(tmp_path / "o.safetensors", "--prompt", "A", "--text-encoder", tmp_path / "none") == 3
    assert "must be 'reason1' or an existing folder" in capsys.readouterr().err
