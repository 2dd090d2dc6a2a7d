"""From the averaged weights of the stages to the folder that `Engine` loads.

Layout as published: one file per control, the few-step edge network, the VAE, the text encoder and a card. The
four control files share one base; multi-control is these four files.
"""

from __future__ import annotations

import json
from pathlib import Path

import base_stage
import control_stage
import distill_stage
import torch
from recording import Run
from torch import Tensor
from vae_stage import trained

from cosmos_fast import checkpoint
from cosmos_fast.formats import CONTROLS
from cosmos_fast.registry import find
from cosmos_fast.safetensors_file import write_safetensors


def export(run: Run, out: Path) -> list[Path]:
    """Write all that is trained so far below `out`; returns the files."""
    sizes, written = run.sizes, []
    vae = {name: weight.contiguous() for name, weight in trained(run).cpu().state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    written.append(write_safetensors(out / "tokenizer.safetensors", vae, {"format": "pt"}))
    card = {"chunk_frames": [sizes.frames, 1], "sizes": sizes.record()}
    (out / "model.json").write_text(json.dumps(card, indent=1) + "\n")
    written.append(out / "model.json")
    if not (run.keep / "control.pt").exists():
        return written
    base, text = base_stage.load(run)
    text.cpu().save(out / "text.safetensors")
    written.append(out / "text.safetensors")
    branches = control_stage.load_branches(run, base)
    shared = {name: w for name, w in base.state_dict().items() if not name.startswith("control.")}
    for name in CONTROLS:
        branch = {f"control.0.{key}": w for key, w in branches[name].state_dict().items()}
        written.append(_write(out, name, shared | branch, run))
    if (run.keep / "distill.pt").exists():
        written.append(_write(out, "distilled", distill_stage.load(run).state_dict(), run))
    return written


def _write(out: Path, name: str, state: dict[str, Tensor], run: Run) -> Path:
    published = find("edge/distilled" if name == "distilled" else name)
    assert published is not None
    config = run.sizes.network("distilled" if name == "distilled" else "single")
    path = (out / published.file).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: weight.detach().to("cpu", torch.bfloat16).contiguous() for key, weight in state.items()}
    return checkpoint.save(path, tensors, config)
