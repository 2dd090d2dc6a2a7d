"""Published ids, local layouts and downloads. The hub is replaced: no test touches the network."""

from __future__ import annotations

import builtins
import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from cosmos_fast import registry
from cosmos_fast.formats import CONTROLS, CheckpointError, EnvironmentProblem

EDGE, DISTILLED, VAE = (registry.find(name) for name in ("edge", "edge/distilled", "vae"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the download; records the calls and raises `hub.error` when one is set."""

    class Hub:
        calls: list[tuple] = []
        error: Exception | None = None

        def download(self, repo, file, **options):
            self.calls.append((repo, file, options))
            if self.error is not None:
                raise self.error
            return str(tmp_path / "cache" / Path(file).name)

    fake = Hub()
    fake.calls = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.download)
    return fake


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_table():
    """Written out from the published model page, not from the code."""
    rows = {
        "edge": ("general/edge/61f5694b-0ad5-4ecd-8ad7-c8545627d125_ema_bf16.pt", "b67b64abda38"),
        "depth": ("general/depth/626e6618-bfcd-4d9a-a077-1409e2ce353f_ema_bf16.pt", "dea7737ca29d"),
        "vis": ("general/blur/ba2f44f2-c726-4fe7-949f-597069d9b91c_ema_bf16.pt", "eb5325b77d35"),
        "seg": ("general/seg/5136ef49-6d8d-42e8-8abf-7dac722a304a_ema_bf16.pt", "23057a4167b8"),
        "edge/distilled": (
            "distilled/general/edge/41f07f13-f2e4-4e34-ba4c-86f595acbc20_ema_bf16.pt",
            "bbaeedb2b57c",
        ),
        "edge/older": ("general/edge/ecd0ba00-d598-4f94-aa09-e8627899c431_ema_bf16.pt", "bd963eabcfc2"),
        "seg/older": ("general/seg/fcab44fe-6fe7-492e-b9c6-67ef8c1a52ab_ema_bf16.pt", "bd963eabcfc2"),
        "vis/older": ("general/blur/20d9fd0b-af4c-4cca-ad0b-f9b45f0805f1_ema_bf16.pt", "bd963eabcfc2"),
        "depth/older": ("general/depth/0f214f66-ae98-43cf-ab25-d65d09a7e68f_ema_bf16.pt", "bd963eabcfc2"),
    }
    for name, (file, revision) in rows.items():
        item = registry.find(name)
        assert (item.repo, item.file, item.revision[:12]) == ("nvidia/Cosmos-Transfer2.5-2B", file, revision)
        assert registry.find(item.uuid) is item
        assert bool(item.note) == ("/" in name)
    assert (VAE.repo, VAE.file, VAE.revision[:12]) == (
        "nvidia/Cosmos-Predict2.5-2B",
        "tokenizer.pth",
        "f176dc95b4a7",
    )
    assert registry.find("blur") is registry.find("vis")
    assert all(re.fullmatch("[0-9a-f]{40}", item.revision) for item in registry.PUBLISHED)
    assert len(registry.PUBLISHED) == len(rows) + 1


def test_ids_are_downloaded_at_the_pinned_revision(hub, tmp_path):
    path = registry.resolve("edge", cache_dir=tmp_path, token="t", progress=False)
    assert path.name == Path(EDGE.file).name
    assert hub.calls == [
        (EDGE.repo, EDGE.file, {"revision": EDGE.revision, "cache_dir": tmp_path, "token": "t"})
    ]
    assert registry.resolve(DISTILLED.uuid).name.startswith("41f07f13")
    four = registry.resolve("multi")
    assert list(four) == list(CONTROLS)
    assert [call[1].split("/")[1] for call in hub.calls[-4:]] == ["edge", "blur", "depth", "seg"]
    registry.resolve("hf://org/repo/a/b.pt")
    registry.resolve("hf://org/repo@v1/b.pt")
    assert [(c[0], c[1], c[2]["revision"]) for c in hub.calls[-2:]] == [
        ("org/repo", "a/b.pt", "main"),
        ("org/repo", "b.pt", "v1"),
    ]


def test_progress_bars_are_put_back(hub):
    from huggingface_hub.utils import are_progress_bars_disabled

    hub.error = ConnectionError("no")
    with pytest.raises(EnvironmentProblem):
        registry.resolve("edge", progress=False)
    assert not are_progress_bars_disabled()


def http(cls: type[Exception], status: int) -> Exception:
    return cls("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


class ReadTimeout(Exception):
    """Stands for whatever the HTTP library of the day raises."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http(errors.GatedRepoError, 401), "needs a Hugging Face token.*hf auth login"),
        (http(errors.GatedRepoError, 403), "licence.*https://huggingface.co/nvidia/Cosmos-Transfer2.5-2B"),
        (http(errors.RepositoryNotFoundError, 401), "without a valid Hugging Face token"),
        (http(errors.RepositoryNotFoundError, 404), "no such repository"),
        (http(errors.RevisionNotFoundError, 404), "no such revision"),
        (http(errors.RemoteEntryNotFoundError, 404), "no such file"),
        (errors.LocalEntryNotFoundError("offline"), "hub cannot be reached.*local copy"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("reset"), "hub cannot be reached"),
        (http(errors.HfHubHTTPError, 403), r"refused \(HTTP 403\)"),
        (http(errors.HfHubHTTPError, 503), r"server's side \(HTTP 503\)"),
        (OSError(errno.ENOSPC, "No space left on device"), "does not fit on the disk.*HF_HOME"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written.*HF_HOME"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error.*Run again"),
        (ReadTimeout("slow"), "ReadTimeout: slow.*run again"),
    ],
)
def test_download_faults_say_what_to_do(hub, error, message):
    hub.error = error
    with pytest.raises(EnvironmentProblem, match=message) as raised:
        registry.resolve("edge")
    assert EDGE.file in str(raised.value) and EDGE.revision[:12] in str(raised.value)


def test_missing_package(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvironmentProblem, match="pip install huggingface_hub"):
        registry.resolve("vae")


def test_meaningless_names(hub):
    with pytest.raises(CheckpointError, match=r"published id, got 'egde'.*Published ids: edge, vis"):
        registry.resolve("egde")
    for uri in ("hf://org/repo", "hf://org//x.pt", "hf://org/repo/../x.pt"):
        with pytest.raises(CheckpointError, match="must have the form hf://"):
            registry.resolve(uri)
    assert not hub.calls


def test_local_layouts(hub, tmp_path):
    edge = touch(tmp_path / EDGE.file)
    assert registry.resolve(edge) == edge
    assert registry.resolve(tmp_path) == {"edge": edge}
    assert registry.resolve("edge", local_dir=tmp_path) == edge
    touch(tmp_path / DISTILLED.file)  # not one of the four controls, found by its id alone
    assert registry.resolve("edge/distilled", local_dir=tmp_path) == tmp_path / DISTILLED.file
    seg = touch(tmp_path / "general" / "seg" / "my_finetune.pt")
    assert registry.resolve(tmp_path) == {"edge": edge, "seg": seg}
    converted = touch(edge.with_suffix(".safetensors"))
    assert registry.resolve("edge", local_dir=tmp_path) == converted
    touch(seg.with_name("other.pt"))
    with pytest.raises(CheckpointError, match="expected one weight file, got 2"):
        registry.resolve("seg", local_dir=tmp_path)
    assert not hub.calls
    registry.resolve("vis", local_dir=tmp_path)  # not there: downloaded
    assert len(hub.calls) == 1
    with pytest.raises(CheckpointError, match="local_dir: must be a folder"):
        registry.resolve("vis", local_dir=tmp_path / "absent")


def test_older_file_is_not_taken_for_the_current_one(hub, tmp_path):
    older = registry.find("edge/older")
    touch(tmp_path / older.file)
    assert registry.find_local(tmp_path, EDGE) is None
    assert registry.resolve("edge/older", local_dir=tmp_path) == tmp_path / older.file


def test_an_id_comes_before_a_folder_of_that_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edge").mkdir()
    assert registry.resolve("edge").name == Path(EDGE.file).name
    assert registry.resolve("./edge") == Path("edge")
