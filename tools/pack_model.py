"""Pack a trained model folder into the few-bit files that ship with the package.

    python tools/pack_model.py SRC_FOLDER [cosmos_fast/data/tiny] [--bits base=6,vis=8]

SRC_FOLDER is laid out like the published files (tools/make_checkpoint.py): one network per control over one frozen
base, distilled/general/edge, a VAE, text.safetensors, model.json. The base is stored once; a branch stores what is its
own; the few-step network is stored as its difference to base and edge. Prints bytes and relative errors of every part,
reads everything back before the files get their names, and refuses a result over --most-mib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast import embedded, models  # noqa: E402
from cosmos_fast.checkpoint import load_vae_state, open_checkpoint  # noqa: E402
from cosmos_fast.config import NetworkConfig  # noqa: E402
from cosmos_fast.formats import CONTROLS  # noqa: E402
from cosmos_fast.lowbit import read_packed, write_packed  # noqa: E402
from cosmos_fast.text import TinyText  # noqa: E402

GROUP = 64
"""Values that share a scale below 8 bits; with 8 bits every row has its own."""

BITS = {"base": 6, "edge": 6, "vis": 6, "depth": 6, "seg": 6, "distilled": 4, "vae": 8, "text": 8}
"""Of every part that ships. The distilled network is stored as its difference to base and edge."""

PARTS = tuple(BITS)
CARD_KEYS = {"chunk_frames", "resolutions", "size", "defaults", "name", "licence"}
NATIVE: dict[str, Any] = {"resolutions": ["256"], "size": [320, 192]}
"""Card entries of the embedded model where model.json does not give others."""


def open_network(source: Path, model: str) -> tuple[NetworkConfig, dict[str, Tensor]]:
    found = models.locate(source, model)
    checkpoint = open_checkpoint(found.first)
    config = checkpoint.config("distilled" if model == embedded.DISTILLED else "single")
    return config, {name: tensor.load().float() for name, tensor in checkpoint.tensors.items()}


def native(card: dict[str, Any]) -> dict[str, Any]:
    """The card that ships: what the model was made for, and the values a request takes that names none."""
    kept = NATIVE | {key: value for key, value in card.items() if key in CARD_KEYS}
    frames = kept["chunk_frames"][0]
    own = {"resolution": kept["resolutions"][0], "num_video_frames_per_chunk": frames}
    return kept | {"defaults": own | kept.get("defaults", {})}


def is_branch(name: str) -> bool:
    return name.startswith("control_")


def split(
    networks: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(base, what each control adds): base tensors that a control changed are stored again with it."""
    first = networks[CONTROLS[0]]
    base = {name: tensor for name, tensor in first.items() if not is_branch(name)}
    by_content = {_digest(tensor): name for name, tensor in base.items() if tensor.ndim > 1}
    own: dict[str, dict[str, Tensor]] = {}
    for control in CONTROLS:
        own[control] = {}
        changed = [name for name in base if not torch.equal(networks[control][name], base[name])]
        if changed:
            print(
                f"note: {control} has {len(changed)} base tensors of its own, such as {changed[0]}: stored with it, and no "
                "part of the multi-control network"
            )
        for name, tensor in networks[control].items():
            if name in base and name not in changed:
                continue
            twin = by_content.get(_digest(tensor))
            if twin is not None and base[twin].shape == tensor.shape:
                own[control][f"{embedded.SAME}{name}={twin}"] = torch.empty(0)
            else:
                own[control][name] = tensor
    return base, own


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def relative(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of every tensor."""
    return {
        name: float((got[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        for name, tensor in wanted.items()
    }


def pack_model(source: Path, target: Path, bits: Mapping[str, int], most_bytes: int) -> dict[str, Any]:
    """Write all parts and the index to `target`; returns {"bytes": ..., "parts": {stem: figures}}."""
    networks, configs = {}, {}
    for model in (*CONTROLS, embedded.DISTILLED):
        configs[model], networks[model] = open_network(source, model)
    singles = {json.dumps(asdict(configs[control]), sort_keys=True) for control in CONTROLS}
    if len(singles) != 1:
        raise SystemExit("pack_model: the four control networks must have equal sizes.")
    base, own = split(networks)
    located = models.locate(source, "edge")
    vae = load_vae_state(models.locate_vae(None, located), None)
    text_path, card_path = models.beside(source, "text.safetensors"), models.beside(source, models.CARD)
    if text_path is None or card_path is None:
        raise SystemExit(f"pack_model: {source} must hold text.safetensors and {models.CARD}.")
    text = TinyText.load(text_path)
    sizes = {"vocabulary": text.vocabulary, "width": text.width, "tokens": text.tokens,
             "layers": len(text.blocks), "heads": text.heads}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)

        def write(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            group = 0 if bits[part] == 8 else GROUP
            write_packed(work / f"{part}.safetensors", tensors, bits[part], group, {"part": part})
            return read_packed(work / f"{part}.safetensors")

        stored_base = write("base", base)
        stored = {control: write(control, own[control]) for control in CONTROLS}
        edge = embedded.without_image(stored_base | embedded.branch(stored_base, stored["edge"]))
        write("distilled", {name: t - edge[name] for name, t in networks[embedded.DISTILLED].items()})
        write("vae", vae)
        write("text", text.state_dict())
        index = {
            "format": embedded.FORMAT, "name": embedded.NAME,
            "card": native(json.loads(card_path.read_text())),
            "networks": {model: asdict(config) for model, config in configs.items()}, "text": sizes,
            "files": {
                f"{part}.safetensors": {
                    "bytes": (work / f"{part}.safetensors").stat().st_size, "bits": bits[part],
                    "sha256": hashlib.sha256((work / f"{part}.safetensors").read_bytes()).hexdigest(),
                }
                for part in PARTS
            },
        }  # fmt: skip
        (work / embedded.INDEX).write_text(json.dumps(index, indent=1) + "\n")
        total = sum(path.stat().st_size for path in work.iterdir())
        errors = check(work, networks, vae, text)
        if total > most_bytes:
            raise SystemExit(
                f"pack_model: all files must fit {most_bytes / 2**20:g} MiB, got {total / 2**20:.2f}. "
                "Use fewer bits for some parts."
            )
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(work.iterdir(), key=lambda p: p.name == embedded.INDEX):
            shutil.copyfile(path, target / f".{path.name}.part")
            os.replace(target / f".{path.name}.part", target / path.name)
    sizes_of = {part: index["files"][f"{part}.safetensors"]["bytes"] for part in PARTS}
    return {"bytes": total, "files": sizes_of, "errors": errors}


def check(
    folder: Path, networks: Mapping[str, Mapping[str, Tensor]], vae: Mapping[str, Tensor], text: TinyText
) -> dict[str, dict[str, float]]:
    """What the package will read, against the source: relative L2 errors by network, over all and the worst."""
    kept, embedded.FOLDER = embedded.FOLDER, folder  # type: ignore[misc]
    try:
        read = {model: embedded.state(model)[1] for model in networks}
        embedded.state("multi")
        pairs = {model: (read[model], networks[model]) for model in networks}
        pairs["vae"] = (embedded.vae_state(), vae)
        pairs["text"] = (embedded.text_state()[1], text.state_dict())
    finally:
        embedded.FOLDER = kept  # type: ignore[misc]
    figures = {}
    for name, (got, wanted) in pairs.items():
        each = relative(got, wanted)
        worst = max(each, key=lambda key: each[key])
        off = sum(float((got[k] - t.float()).square().sum()) for k, t in wanted.items())
        all_of_it = sum(float(t.float().square().sum()) for t in wanted.values())
        figures[name] = {"all": (off / all_of_it) ** 0.5, "worst": each[worst]}
        print(f"{name:<15} relative error {figures[name]['all']:.4f}, worst {each[worst]:.4f} in {worst}")
    return figures


def parse_bits(text: str, parser: argparse.ArgumentParser) -> dict[str, int]:
    """`base=5,vis=8`."""
    bits = {}
    for pair in filter(None, text.split(",")):
        part, _, n = pair.partition("=")
        if part not in BITS or not n.isdigit():
            parser.error(f"--bits: must name parts among {', '.join(BITS)} with =N, got {pair}")
        bits[part] = int(n)
    return bits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=embedded.FOLDER)
    parser.add_argument("--bits", default="", help="PART=N,... where a part is not to have its default: "
                        + ", ".join(f"{part} {n}" for part, n in BITS.items()))  # fmt: skip
    parser.add_argument("--most-mib", type=float, default=20.0)
    parser.add_argument("--report", type=Path, help="write sizes and errors as JSON")
    args = parser.parse_args(argv)
    bits = BITS | parse_bits(args.bits, parser)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    figures = pack_model(args.source, args.target, bits, int(args.most_mib * 2**20))
    for part, size in figures["files"].items():
        print(f"{part:<15} {size / 2**20:6.2f} MiB, {bits[part]} bits")
    print(f"{'in all':<15} {figures['bytes'] / 2**20:6.2f} MiB in {args.target}")
    if args.report:
        args.report.write_text(json.dumps(figures | {"bits": bits}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
