"""The two networks behind segmentation, from transformers' folders: Grounding DINO finds, SAM 2 follows.

Their processors are not used: the one for video needs torchvision, and all that they would do here is one resize.

Letters: H W pixels of the source, h w of the tracker's logits, Q candidate boxes, S text tokens, N objects, P = 2
corners of a box.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import CheckpointError, ClipError, EnvironmentProblem
from .segments import detector_size

PACKAGE: Final = "pip install 'transformers>=5'"
DETECTOR_FILES: Final = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
TRACKER_FILES: Final = ("config.json", "model.safetensors")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UPSAMPLED_BYTES: Final = 256 << 20


class Detector:
    """Grounding DINO from a local folder: words and a frame to candidate boxes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        self._network = _network(folder, "grounding-dino", "GroundingDinoForObjectDetection", device)
        self._tokenizer = _tokenizer(folder)
        settings = _json(folder / "preprocessor_config.json")
        try:
            self._sides = (int(settings["size"]["shortest_edge"]), int(settings["size"]["longest_edge"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{folder}/preprocessor_config.json: size must have shortest_edge and longest_edge, "
                f"got {settings.get('size')!r}."
            ) from None

    @torch.inference_mode()
    def __call__(self, frame_HW3: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q,) and boxes (Q, 4) of one frame, fp32; see `segments.pick_boxes`.

        The text goes in as it is. A score is the best match over all tokens; tokens past the network's limit
        (256 as published) are not read. Raises ClipError for scores that are not finite.
        """
        words = self._tokenizer(text, return_tensors="pt", return_token_type_ids=True)
        limit = self._network.config.max_text_len
        words_1S = {key: value[:, :limit].to(self._device) for key, value in words.items()}
        height, width = frame_HW3.shape[:2]
        pixels = _pixels(frame_HW3, detector_size((width, height), *self._sides), self._device)
        with _precision(self._device):
            found = self._network(pixel_values=pixels, **words_1S)
        scores_Q = found.logits[0].float().sigmoid().amax(dim=-1)
        boxes_Q4 = found.pred_boxes[0].float()
        if not bool(scores_Q.isfinite().all() & boxes_Q4.isfinite().all()):
            raise ClipError("segmentation: boxes must be finite, got NaN or infinity from the detector.")
        return scores_Q.cpu().numpy(), boxes_Q4.cpu().numpy()


class _OneFrame(dict[int, Tensor]):
    """What a session holds as its video: one frame, but as long as the clip, which scales pointers' positions."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def __len__(self) -> int:
        return self.frames


class Tracks:
    """Objects of one clip, followed by SAM 2 frame after frame; the same masks as with the whole clip in memory.

    size: (width, height) of the source. Objects that are added on the same frame share a session; objects never
    see each other, so those added later leave the earlier ones' masks as they were.
    """

    def __init__(self, network: Any, size: tuple[int, int], frames: int, device: torch.device) -> None:
        self._network, self._size, self._device = network, size, device
        self._video = _OneFrame(frames)
        self._sessions: list[Any] = []
        self._index = -1
        self._frame_HW3: np.ndarray | None = None
        self.objects = 0

    def advance(self, frame_HW3: np.ndarray) -> dict[int, np.ndarray]:
        """Go on to the next frame, (H, W, 3) uint8; masks (H, W) bool of all objects so far, by id."""
        self._index += 1
        self._video.clear()
        self._frame_HW3 = frame_HW3
        return self._run(self._sessions)

    def add(self, boxes_N4: np.ndarray) -> dict[int, np.ndarray]:
        """Follow what is in these boxes of the current frame from here on; their masks in it, by new ids."""
        if len(boxes_N4) == 0:
            return {}
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        width, height = self._size
        session = Sam2VideoInferenceSession(
            video_height=height,
            video_width=width,
            inference_device=self._device,
            inference_state_device=self._device,
            video_storage_device=self._device,
            dtype=torch.float32,
        )
        session.processed_frames = self._video
        if self._sessions:
            session.cache = self._sessions[0].cache  # features of the frame are computed once
        side = self._network.config.image_size
        scale = torch.tensor([side / width, side / height])
        for corners_11P2 in torch.from_numpy(boxes_N4).reshape(-1, 1, 1, 2, 2) * scale:
            labels = torch.tensor([[[2, 3]]], dtype=torch.int32)  # top left and bottom right of a box
            session.add_point_inputs(
                session.obj_id_to_idx(self.objects), self._index,
                {"point_coords": corners_11P2, "point_labels": labels},
            )  # fmt: skip
            self.objects += 1
        session.obj_with_new_inputs = list(session.obj_ids)
        self._sessions.append(session)
        return self._run([session])

    def _run(self, sessions: list[Any]) -> dict[int, np.ndarray]:
        masks: dict[int, np.ndarray] = {}
        if sessions and self._index not in self._video.keys():
            assert self._frame_HW3 is not None
            side = self._network.config.image_size
            self._video[self._index] = _pixels(self._frame_HW3, (side, side), self._device)[0]
        for session in sessions:
            with _precision(self._device):
                found = self._network(session, frame_idx=self._index)
            masks.update(zip(session.obj_ids, self._upsampled(found.pred_masks), strict=True))
            self._forget(session)
        return masks

    def _upsampled(self, logits_N1hw: Tensor) -> Iterator[np.ndarray]:
        """Masks (H, W) bool: where the logits, enlarged to the source's size, are above 0."""
        if not bool(logits_N1hw.isfinite().all()):
            raise ClipError("segmentation: masks must be finite, got NaN or infinity from the tracker.")
        width, height = self._size
        for part in logits_N1hw.float().split(max(1, _UPSAMPLED_BYTES // (4 * width * height))):
            large = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
            yield from (large[:, 0] > 0).cpu().numpy()

    def _forget(self, session: Any) -> None:
        """Drop what no later frame looks at; SAM 2's session would keep all of it, 6 MB per object and frame."""
        config = self._network.config
        pointers_from = self._index + 2 - config.max_object_pointers_in_encoder
        memories_from = self._index + 2 - config.num_maskmem
        for held in session.output_dict_per_obj.values():
            past = held["non_cond_frame_outputs"]
            for index in [i for i in past if i < min(pointers_from, memories_from)]:
                del past[index]
            for index, out in past.items():
                if index < memories_from:
                    out.pop("maskmem_features", None)
                    out.pop("maskmem_pos_enc", None)
            for out in (past.get(self._index), held["cond_frame_outputs"].get(self._index)):
                if out is not None:
                    del out["high_res_masks"], out["pred_masks"]
        for seen in session.frames_tracked_per_obj.values():
            seen.clear()


def _precision(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU, as published; fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _pixels(frame_HW3: np.ndarray, size: tuple[int, int], device: torch.device) -> Tensor:
    """(1, 3, height, width) fp32: resized to size (height, width), antialiased, as bytes, then ImageNet's scale."""
    frame = torch.from_numpy(frame_HW3).to(device).permute(2, 0, 1)[None].float()
    if frame.shape[2:] != size:
        frame = F.interpolate(frame, size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (_MEAN, _STD))
    return (frame.round().clamp(0, 255) / 255 - mean) / std


# --- loading ---


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"got {type(value).__name__}")
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: must be a JSON object, got: {error}. Download it again.") from None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises plain Exception for a damaged file
        raise CheckpointError(
            f"{folder}/tokenizer.json: must be a tokenizer, got: {_line(error)}. Download it again."
        ) from error


def load_tracker(folder: Path, device: torch.device) -> Any:
    """The Sam2VideoModel of a local folder, for `Tracks`."""
    return _network(folder, "sam2_video", "Sam2VideoModel", device)


def _network(folder: Path, kind: str, class_name: str, device: torch.device) -> Any:
    """A transformers model of `folder` in fp32, every weight of it from the file."""
    import transformers
    from safetensors import SafetensorError

    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise EnvironmentProblem(
            f"segmentation: {class_name} must be in transformers, got {transformers.__version__}. Run: {PACKAGE}"
        )
    found = _json(folder / "config.json").get("model_type")
    if found != kind:
        raise CheckpointError(
            f"{folder}: must hold a {kind} model, got {found!r}. Check which folder is which."
        )
    try:
        with _quiet(transformers):
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: must hold a readable {kind} model, got: {_line(error)}. Download it again."
        ) from error
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder}: must hold all weights of the {kind} model, got {len(missing)} too few: "
            f"{', '.join(missing[:5])}. Download it again."
        )
    return model.eval().requires_grad_(False).to(device)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar of the loader between our own lines."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
