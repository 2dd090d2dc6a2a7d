"""Time segmentation at its published sizes: random weights, so the masks mean nothing, but the work is the same.

    python tools/bench_segmentation.py --objects 1 10 40 --frames 12      # on a GPU: under two minutes

Prints one line per number of objects: detection once, tracking per frame, peak device memory, memory held per
object. Boxes are spread over the frame at the seam between detector and tracker.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from cosmos_fast import segment_networks  # noqa: E402
from cosmos_fast.dispatch import pick_device  # noqa: E402
from cosmos_fast.segment_networks import Tracks  # noqa: E402
from cosmos_fast.segments import detector_size  # noqa: E402


def tracker() -> torch.nn.Module:
    """SAM 2.1 hiera-large: 224 M parameters."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=144, num_attention_heads=2, blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152], num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8], global_attention_blocks=[23, 33, 43],
    )  # fmt: skip
    vision = dict(
        model_type="sam2_vision_model", backbone_config=backbone, backbone_channel_list=[1152, 576, 288, 144]
    )
    model = Sam2VideoModel(Sam2VideoConfig(vision_config=vision))
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10)  # objects stay visible
    return model


def detector() -> torch.nn.Module:
    """Grounding DINO base: 233 M parameters."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    backbone = dict(
        model_type="swin", image_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32],
        window_size=12, out_indices=[2, 3, 4],
    )  # fmt: skip
    return GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=backbone))


def grid(objects: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes (objects, 4) side by side."""
    columns = int(np.ceil(np.sqrt(objects)))
    x, y = np.arange(objects) % columns, np.arange(objects) // columns
    step = np.array(size, np.float32) / columns
    corner = np.stack([x * step[0], y * step[1]], 1)
    return np.concatenate([corner, corner + 0.9 * step], 1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 10, 40])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--device")
    parser.add_argument("--no-detector", action="store_true")
    given = parser.parse_args()
    device, size = pick_device(given.device), tuple(given.size)
    on_gpu = device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    record: dict[str, object] = {"size": size, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    torch.manual_seed(0)
    if not given.no_detector:
        network = detector().eval().to(device)  # it makes some of its weights without asking for a device
        pixels = segment_networks._pixels(frame, detector_size(size, 800, 1333), device)
        ids = torch.randint(1100, 30000, (1, 12), device=device)
        ids[0, 0], ids[0, -1] = 101, 102
        for _ in range(2):
            start = now()
            with torch.inference_mode(), segment_networks._precision(device):
                boxes = network(pixel_values=pixels, input_ids=ids).pred_boxes
            record["detect_ms"] = round(1000 * (now() - start), 1)
        assert boxes.shape == (1, 900, 4)
        del network
    network = tracker().eval().requires_grad_(False).to(device)
    for objects in given.objects:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        tracks, seconds = Tracks(network, size, given.frames, device), []
        for index in range(given.frames):
            start = now()
            masks = tracks.advance(frame)
            if index == 0:
                masks |= tracks.add(grid(objects, size))
            seconds.append(now() - start)
        assert len(masks) == objects and next(iter(masks.values())).shape == (size[1], size[0])
        steady = np.median(seconds[min(8, given.frames - 1) :])  # from frame 8 on all memories are in use
        row = {**record, "objects": objects, "first_ms": round(1000 * seconds[0], 1)}
        row["frame_ms"] = round(1000 * float(steady), 1)
        if on_gpu:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            row["held_mb_per_object"] = round((torch.cuda.memory_allocated() - before) / 1e6 / objects, 1)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
