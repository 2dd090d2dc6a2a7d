"""Published models by id: where they are, at which revision, and how to get them onto this disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cosmos_fast.formats import CONTROLS, CheckpointError, EnvironmentProblem

TRANSFER: Final = "nvidia/Cosmos-Transfer2.5-2B"
PREDICT: Final = "nvidia/Cosmos-Predict2.5-2B"


@dataclass(frozen=True)
class Published:
    """One published file: `file` within `repo` at the pinned `revision`. `note` is for the user."""

    name: str
    uuid: str
    repo: str
    file: str
    revision: str
    note: str = ""


def _network(name: str, folder: str, uuid: str, revision: str, note: str = "") -> Published:
    return Published(name, uuid, TRANSFER, f"{folder}/{uuid}_ema_bf16.pt", revision, note)


_OLDER: Final = "bd963eabcfc2d61dc4ea365cacf41d45ac480aa5"
_OLDER_NOTE: Final = "first release, without image context; kept for comparison"

PUBLISHED: Final[tuple[Published, ...]] = (
    _network(
        "edge",
        "general/edge",
        "61f5694b-0ad5-4ecd-8ad7-c8545627d125",
        "b67b64abda3801a9aceddbff2bdb86126c06db74",
    ),
    _network(
        "vis",
        "general/blur",
        "ba2f44f2-c726-4fe7-949f-597069d9b91c",
        "eb5325b77d358944da58a690157dd2b8071bbf85",
    ),
    _network(
        "depth",
        "general/depth",
        "626e6618-bfcd-4d9a-a077-1409e2ce353f",
        "dea7737ca29dd8d9086413c6dc5724b8250a0bb4",
    ),
    _network(
        "seg",
        "general/seg",
        "5136ef49-6d8d-42e8-8abf-7dac722a304a",
        "23057a4167b89de89a4a397fdbf3887994d115eb",
    ),
    _network(
        "edge/distilled",
        "distilled/general/edge",
        "41f07f13-f2e4-4e34-ba4c-86f595acbc20",
        "bbaeedb2b57cc8b14a44653099e2551adb69dcc7",
        "few-step network: 4 steps, no guidance, no image context",
    ),
    _network("edge/older", "general/edge", "ecd0ba00-d598-4f94-aa09-e8627899c431", _OLDER, _OLDER_NOTE),
    _network("vis/older", "general/blur", "20d9fd0b-af4c-4cca-ad0b-f9b45f0805f1", _OLDER, _OLDER_NOTE),
    _network("depth/older", "general/depth", "0f214f66-ae98-43cf-ab25-d65d09a7e68f", _OLDER, _OLDER_NOTE),
    _network("seg/older", "general/seg", "fcab44fe-6fe7-492e-b9c6-67ef8c1a52ab", _OLDER, _OLDER_NOTE),
    Published(
        "vae",
        "685afcaa-4de2-42fe-b7b9-69f7a2dee4d8",
        PREDICT,
        "tokenizer.pth",
        "f176dc95b4a70f53ce01c4b302851595e7322b00",
        "Wan 2.1 video VAE",
    ),
)
MULTI: Final = "multi"
"""Id of the multi-control network, which is assembled from the four single-control files."""


@dataclass(frozen=True)
class PublishedFolder:
    """A model that is more than one file: `files` (or patterns of them) of one `repo` at one `revision`."""

    name: str
    repo: str
    revision: str
    files: tuple[str, ...]
    note: str = ""


_WEIGHTS: Final = ("config.json", "model.safetensors")
_ANY: Final = ("*.json", "*.safetensors")
_WITH_WORDS: Final = (*_WEIGHTS, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")

REASON1: Final = PublishedFolder(
    "reason1",
    "nvidia/Cosmos-Reason1-7B",
    "3210bec0495fdc7a8d3dbb8d58da5711eab4b423",
    ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors*"),
    "prompt encoder",
)

FOLDERS: Final[tuple[PublishedFolder, ...]] = (
    REASON1,
    PublishedFolder(
        "grounding-dino-base",
        "IDEA-Research/grounding-dino-base",
        "12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
        _WITH_WORDS,
        "finds objects by words",
    ),
    PublishedFolder(
        "sam2.1-hiera-large",
        "facebook/sam2.1-hiera-large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        _WEIGHTS,
        "follows objects through a clip",
    ),
    PublishedFolder(
        "sam2-hiera-large",
        "facebook/sam2-hiera-large",
        "main",
        _WEIGHTS,
        "the older tracker, which the published system runs; not pinned there either",
    ),
    PublishedFolder(
        "depth-anything-v2-small",
        "depth-anything/Depth-Anything-V2-Small-hf",
        "main",
        _WEIGHTS,
        "depth of single frames; flickers over a clip",
    ),
    PublishedFolder("style", "google/siglip2-so400m-patch16-naflex", "main", _ANY, "style images"),
    PublishedFolder(
        "guardrail",
        "nvidia/Cosmos-Guardrail1",
        "d6d4bfa899a71454a700907664f3e88f503950cf",
        (
            "blocklist/*",
            "video_content_safety_filter/safety_filter.pt",
            "face_blur_filter/Resnet50_Final.pth",
        ),
        "word lists, frame classifier, face detector; gated",
    ),
    PublishedFolder(
        "guardrail-prompts", "Qwen/Qwen3Guard-Gen-0.6B", "main", (*_ANY, "*.txt", "*.jinja"), "judges prompts"
    ),
    PublishedFolder(
        "guardrail-frames", "google/siglip-so400m-patch14-384", "main", _ANY, "sees frames for the classifier"
    ),
)

_BY_ID: Final = {key: item for item in PUBLISHED for key in (item.name, item.uuid)} | {
    "blur": next(item for item in PUBLISHED if item.name == "vis")
}


def find(name: str) -> Published | None:
    """The published file of an id or uuid, None when it is neither."""
    return _BY_ID.get(name)


def resolve(
    name_or_path: str | Path,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    progress: bool = True,
    *,
    local_dir: str | Path | None = None,
) -> Path | dict[str, Path]:
    """Path of a model on this disk, downloading it when needed; for several controls a path for each.

    Takes a published id or uuid ('edge', 'edge/distilled', 'vae', 'multi' for all four), a local file or
    folder, or 'hf://org/repo[@revision]/file'. An id comes before a folder of that name; write './edge' for
    the folder. A folder laid out like the published repository gives {control: path} of what it holds. Ids are
    looked for in `local_dir`, laid out likewise, before anything is downloaded. Raises CheckpointError
    for a name that means nothing and EnvironmentProblem, with the one thing to do, when a download fails.
    """
    name = str(name_or_path)
    if name == MULTI:
        return {control: _get(_BY_ID[control], cache_dir, token, progress, local_dir) for control in CONTROLS}
    if published := find(name):
        return _get(published, cache_dir, token, progress, local_dir)
    if name.startswith("hf://"):
        return _download(*_parse_uri(name), cache_dir, token, progress)
    path = Path(name).expanduser()
    if not path.exists():
        ids = ", ".join((*(item.name for item in PUBLISHED), MULTI))
        raise CheckpointError(
            f"checkpoint: must be an existing path, hf://org/repo/file or a published id, got {name!r}. "
            f"Published ids: {ids}."
        )
    if path.is_dir():
        found = {control: find_local(path, _BY_ID[control]) for control in CONTROLS}
        if held := {control: file for control, file in found.items() if file is not None}:
            return held
    return path


def find_local(root: str | Path, published: Published) -> Path | None:
    """A published file below a folder laid out like its repository, also converted to safetensors.

    Falls back to the only weight file of the right folder, since a fine-tuned model has a uuid of its own.
    """
    relative = PurePosixPath(published.file)
    folder = Path(root).joinpath(*relative.parent.parts)
    for suffix in (".safetensors", relative.suffix):
        path = folder / (relative.stem + suffix)
        if path.is_file():
            return path
    if len(relative.parts) == 1 or published.name.endswith("/older") or not folder.is_dir():
        return None
    known = {item.uuid for item in PUBLISHED}
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".pt", ".safetensors") and path.is_file() and path.name[:36] not in known
    ]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:10])
        raise CheckpointError(
            f"{folder}: expected one weight file, got {len(files)} ({names}). Name the file."
        )
    return files[0] if files else None


def find_folder(name: str | Path) -> PublishedFolder | None:
    """The published folder of an id such as 'grounding-dino-base', or of its repository; None when it is neither."""
    return next((folder for folder in FOLDERS if str(name) in (folder.name, folder.repo)), None)


def fetch(published: PublishedFolder, file: str) -> Path:
    """One file of a published folder on this disk, downloaded when needed. EnvironmentProblem when that fails."""
    return _download(published.repo, published.revision, file, None, None, True)


def resolve_folder(
    name_or_path: str | Path,
    needed: tuple[str, ...],
    cache_dir: str | Path | None = None,
    token: str | None = None,
    progress: bool = True,
) -> Path:
    """Folder on this disk with a model of the transformers layout, its files downloaded when it is a published id.

    A local folder must hold the files `needed`. Raises CheckpointError and EnvironmentProblem as `resolve` does.
    """
    if published := find_folder(name_or_path):
        if any("*" in file for file in published.files):
            return _snapshot(published, cache_dir, token, progress)
        paths = [
            _download(published.repo, published.revision, file, cache_dir, token, progress)
            for file in published.files
        ]
        return paths[0].parent
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        ids = ", ".join(folder.name for folder in FOLDERS)
        raise CheckpointError(
            f"model: must be an existing folder or one of {ids}, got {str(name_or_path)!r}. Check the path."
        )
    if missing := [file for file in needed if not (path / file).is_file()]:
        raise CheckpointError(f"{path}: must hold {', '.join(needed)}, got no {', '.join(missing)}.")
    return path


def _get(
    published: Published,
    cache_dir: str | Path | None,
    token: str | None,
    progress: bool,
    local_dir: str | Path | None,
) -> Path:
    if local_dir is not None:
        if not Path(local_dir).is_dir():
            raise CheckpointError(f"local_dir: must be a folder, got {str(local_dir)!r}.")
        if (path := find_local(local_dir, published)) is not None:
            return path
    return _download(published.repo, published.revision, published.file, cache_dir, token, progress)


def _parse_uri(uri: str) -> tuple[str, str, str]:
    parts = uri.removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not all(parts) or ".." in PurePosixPath(parts[2]).parts:
        raise CheckpointError(f"checkpoint: must have the form hf://org/repo[@revision]/file, got {uri!r}.")
    repo, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{repo}", revision or "main", parts[2]


def _download(
    repo: str, revision: str, file: str, cache_dir: str | Path | None, token: str | None, progress: bool
) -> Path:
    with _hub(repo, file, revision, progress) as hub:
        # The hub client resumes partial files, waits for a rival download and honours HF_HUB_OFFLINE.
        return Path(hub.hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir, token=token))


def _snapshot(item: PublishedFolder, cache_dir: str | Path | None, token: str | None, progress: bool) -> Path:
    """The last part of the path is the commit."""
    options = {"revision": item.revision, "allow_patterns": list(item.files)}
    with _hub(item.repo, "files", item.revision, progress) as hub:
        return Path(hub.snapshot_download(item.repo, **options, cache_dir=cache_dir, token=token))


@contextmanager
def _hub(repo: str, file: str, revision: str, progress: bool) -> Iterator[Any]:
    """The hub client; whatever goes wrong inside becomes one EnvironmentProblem with the one thing to do."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise EnvironmentProblem(
            f"download: {repo}/{file} needs the package huggingface_hub, which is not installed. "
            "Run: pip install huggingface_hub"
        ) from None

    what = f"download: {repo}/{file} at revision {revision[:12]}"
    page = f"https://huggingface.co/{repo}"
    try:
        with _progress(progress):
            yield huggingface_hub
        return
    except errors.GatedRepoError as error:
        if _status(error) == 401:
            problem = "needs a Hugging Face token, got none. Run: hf auth login"
        else:
            problem = f"needs the licence to be accepted for your account. Open {page}, accept it, run again."
    except errors.RepositoryNotFoundError as error:
        if _status(error) == 401:
            problem = "was refused without a valid Hugging Face token. Run: hf auth login"
        else:
            problem = f"is not there: no such repository, or it is private to others. Check {page}"
    except errors.RevisionNotFoundError:
        problem = f"is not there: the repository has no such revision. Look for the file at {page}/tree/main"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        problem = (
            "is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set). "
            "Connect once, or give the path of a local copy."
        )
    except errors.EntryNotFoundError:
        problem = f"is not there: this revision has no such file. See {page}/tree/{revision}"
    except errors.HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            problem = f"was refused (HTTP {status}). Run 'hf auth login' with a token that may read {page}"
        else:
            problem = f"failed on the server's side (HTTP {status}). Run again; what has arrived is kept."
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "does not fit on the disk. Free space, or point HF_HOME at a larger disk."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem = f"cannot be written to the cache ({error}). Point HF_HOME at a folder you may write."
        else:
            problem = f"failed ({error}). Run again; what has arrived is kept."
    except errors.HFValidationError as error:
        raise CheckpointError(f"checkpoint: not a valid repository name, got {repo!r} ({error}).") from None
    except Exception as error:
        # Transport errors come from whichever HTTP library the hub client of the day is built on.
        problem = f"failed ({type(error).__name__}: {error}). Check the connection and run again."
    raise EnvironmentProblem(f"{what} {problem}")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _progress(is_shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if is_shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
