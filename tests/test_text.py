"""Text encoders: files of embeddings, the small trainable encoder, and the tool that writes random ones."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_fast.formats import CheckpointError, SpecError
from cosmos_fast.spec import NEGATIVE_PROMPT
from cosmos_fast.text import FileText, TextEncoder, TinyText, prompt_key, unread, write_embeddings

ROOT = Path(__file__).resolve().parent.parent


def test_file_round_trip(tmp_path):
    torch.manual_seed(0)
    shared = torch.randn(4, 6, dtype=torch.bfloat16)
    table = {"A robot.": shared, "": shared, "é\n": torch.randn(6, 4, dtype=torch.bfloat16).T}
    write_embeddings(tmp_path / "e.safetensors", table, metadata={"content": "test"})
    text = FileText(tmp_path / "e.safetensors")
    assert isinstance(text, TextEncoder) and (text.tokens, text.width) == (4, 6)
    assert text.metadata["content"] == "test"
    found = text.encode(["é\n", "A robot.", "é\n", ""])
    assert len(found) == 4 and all(tensor.dtype == torch.bfloat16 for tensor in found)
    for prompt, tensor in zip(["é\n", "A robot.", "é\n", ""], found):
        assert torch.equal(tensor, table[prompt])
    assert "A robot." in text and "A robot" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "e.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_prompt_key_is_the_sha256_of_utf8():
    assert prompt_key("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_an_unknown_prompt_is_named(tmp_path):
    path = tmp_path / "e.safetensors"
    write_embeddings(path, {"a": torch.zeros(1, 2)})
    with pytest.raises(SpecError) as caught:
        FileText(path).encode(["a", "x" * 59 + "yz"])
    message = str(caught.value)
    assert "x" * 59 + "y'" in message and str(path) in message and "tools/make_embeddings.py" in message


def test_bad_embedding_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "e.safetensors"
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        FileText(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="must be a safetensors file"):
        FileText(path)
    for tensors, found in (
        ({}, "no tensors"),
        ({"a": torch.zeros(3)}, r"\(3,\)"),
        ({"a": torch.zeros(1, 2), "b": torch.zeros(2, 1)}, r"\[\(1, 2\), \(2, 1\)\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=found):
            FileText(path)
    for tensor, found in (
        (torch.full((1, 2), float("nan")), "NaN"),
        (torch.ones(1, 2, dtype=torch.int64), "int64"),
    ):
        save_file({prompt_key("a"): tensor}, path)
        with pytest.raises(CheckpointError, match=found):
            FileText(path).encode(["a"])


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({}, "at least one prompt"),
        ({"a": torch.zeros(3)}, r"\(S, E\), got \(3,\)"),
        ({"a": torch.zeros(0, 3)}, r"\(S, E\)"),
        ({"a": torch.zeros(1, 3), "b": torch.zeros(3, 1)}, "share one shape and dtype"),
        ({"a": torch.zeros(1, 3), "b": torch.zeros(1, 3).half()}, "share one shape and dtype"),
        ({"a": torch.full((1, 3), float("inf"))}, "finite"),
        ({"a": torch.tensor([[0.0, -float("inf"), 1.0]])}, "finite"),
        ({"a": torch.tensor([[0.0, float("nan"), 1.0]]).half()}, "finite"),
        ({"a": torch.zeros(1, 3, dtype=torch.int32)}, "finite floats"),
    ],
)
def test_bad_embeddings_are_not_written(tmp_path, table, found):
    with pytest.raises(ValueError, match=found):
        write_embeddings(tmp_path / "e.safetensors", table)
    assert list(tmp_path.iterdir()) == []


def test_two_fresh_tiny_encoders_agree_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = TinyText()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = TinyText()
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[key]), key
    assert not torch.equal(first.embed.weight, TinyText(seed=1).embed.weight)
    prompts = ["A robot arm.", "", "x " * 99]
    for a, b in zip(first.encode(prompts), second.encode(prompts)):
        assert a.shape == (32, 256) and a.dtype == torch.float32 and torch.equal(a, b)
        assert bool(a.isfinite().all()) and 0.5 < float(a.std()) < 2


def test_tiny_encoder_reads_words_and_order():
    text = TinyText(width=64, tokens=8)
    assert isinstance(text, TextEncoder) and (text.tokens, text.width) == (8, 64)
    base, upper, swapped, other = text.encode(
        ["red car, fast", "RED  car , Fast", "car red, fast", "blue car, fast"]
    )
    assert torch.equal(base, upper)
    assert not torch.allclose(base, swapped) and not torch.allclose(base, other)
    assert torch.equal(text.tokenize("a b c d e f g h"), text.tokenize("a b c d e f g h i"))
    assert torch.equal(
        text.encode(["one", "two"])[1], text.encode(["two"])[0]
    )  # bits do not depend on the batch


def test_what_is_not_read_of_a_prompt_is_told():
    encoder = TinyText(tokens=4)
    assert unread(encoder, {"prompt": "a red cube.", "negative_prompt": "dark"}) == []
    told = unread(encoder, {"prompt": "a red cube, on a table", "negative_prompt": "dark"})
    assert told == ["prompt: the first 4 of 7 words and marks are read."]
    long = " ".join("abcdefg")
    assert torch.equal(encoder.tokenize(long), encoder.tokenize(" ".join("abcd")))
    assert unread(SimpleNamespace(), {"prompt": long}) == []  # an encoder that does not tell beforehand


def test_tiny_buckets_do_not_change():
    """Trained weights depend on the hash: these are its values, not what it happens to return."""
    tokens = TinyText(tokens=6).tokenize("A robot, arm")
    assert tokens.dtype == torch.int64 and tokens.tolist() == [3279, 3499, 3597, 3990, 0, 0]


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=80))
def test_any_prompt_has_buckets_in_range(prompt):
    tokens = TINY.tokenize(prompt)
    assert tokens.shape == (5,) and 0 <= int(tokens.min()) and int(tokens.max()) < 7


TINY = TinyText(vocabulary=7, width=4, tokens=5, heads=2)


def test_tiny_encoder_can_be_trained_saved_and_loaded(tmp_path):
    text = TinyText(vocabulary=50, width=32, tokens=4, layers=2, heads=2)
    tokens = torch.stack([text.tokenize("red"), text.tokenize("blue")])
    optimiser = torch.optim.Adam(text.parameters(), 1e-2)
    target = torch.tensor([1.0, -1.0])
    losses = []
    for _ in range(20):
        loss = (text(tokens)[:, 0, 0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(weight.grad is not None for weight in text.parameters())
    text.save(tmp_path / "t.safetensors")
    again = TinyText.load(tmp_path / "t.safetensors")
    assert (again.vocabulary, again.width, again.tokens, len(again.blocks), again.heads) == (50, 32, 4, 2, 2)
    assert torch.equal(again.encode(["red"])[0], text.encode(["red"])[0])
    write_embeddings(tmp_path / "e.safetensors", {"a": torch.zeros(1, 2)})
    with pytest.raises(CheckpointError, match="must be a TinyText file"):
        TinyText.load(tmp_path / "e.safetensors")


def test_bf16_weights_still_give_float32():
    assert TinyText(width=16).bfloat16().encode(["a"])[0].dtype == torch.float32


@pytest.mark.parametrize(
    "sizes", [{"vocabulary": 1}, {"width": 10, "heads": 4}, {"tokens": 0}, {"layers": 0}]
)
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="TinyText: sizes"):
        TinyText(**sizes)


def tool(*arguments: str) -> int:
    """Exit status of tools/make_embeddings.py, run in this process: torch loads slowly."""
    try:
        return runpy.run_path(str(ROOT / "tools/make_embeddings.py"))["main"](list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def test_the_tool_writes_labelled_noise(tmp_path, capsys):
    (tmp_path / "in.mp4").touch()
    (tmp_path / "s.json").write_text(
        '{"prompt": "P", "negative_prompt": "N", "video_path": "in.mp4", "edge": {}}'
    )
    out = tmp_path / "e.safetensors"
    sizes = ("--width", "512", "--tokens", "3")
    assert tool(str(out), "--prompt", "A", "--spec", str(tmp_path / "s.json"), *sizes, "--random", "5") == 0
    streams = capsys.readouterr()
    assert streams.out.strip() == str(out) and "3 RANDOM embeddings" in streams.err
    text = FileText(out)
    assert text.metadata["content"] == "random" and (text.tokens, text.width) == (3, 512)
    a, p, n = text.encode(["A", "P", "N"])
    assert a.dtype == torch.bfloat16 and not torch.equal(a, p) and not torch.equal(p, n)
    for tensor in (a, p, n):
        rows = tensor.double()
        assert float(rows.mean(1).abs().max()) < 0.01 and float((rows.std(1) - 1).abs().max()) < 0.01
    other = tmp_path / "b.safetensors"
    assert tool(str(other), "--prompt", "A", *sizes, "--random", "5", "--default-negative") == 0
    assert torch.equal(FileText(other).encode(["A"])[0], a)  # prompt and seed alone decide
    assert NEGATIVE_PROMPT in FileText(other)
    assert tool(str(other), "--prompt", "A", *sizes, "--random", "6") == 0
    assert not torch.equal(FileText(other).encode(["A"])[0], a)


def test_the_tool_refuses_bad_requests(tmp_path, capsys):
    out = str(tmp_path / "e.safetensors")
    for arguments, found in (
        (("--random", "1"), "at least one --prompt"),
        (("--spec", str(tmp_path / "no.json"), "--random", "1"), "no.json"),
        (("--prompt", "A", "--width", "1", "--random", "1"), "width must be"),
        (("--prompt", "A", "--random", "-1"), "must be 0 or more"),
    ):
        assert tool(out, *arguments) == 2
        assert found in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
