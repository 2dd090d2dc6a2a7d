"""The whole system on one page: a request goes in, decoded frames come out chunk by chunk.

    spec -> inputs (frames, controls, masks) -> latents -> Context -> sampling loop -> decoded frames

An Engine holds one loaded model and makes any number of clips with it. Letters: B C T H W are latent axes,
F video frames, S text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import controls, graphs, models, neighbours, quant, sampler, vae_fp8
from .chunking import Chunk, conditional_latents, guided_map, seed_chain, weight_maps, weight_vector
from .clip_parts import Opening, Part, Piece, Progress, Result, Step, Window, joined, last_frames, screened
from .clip_plan import ClipPlan
from .context import Context
from .exchange import Exchanged
from .formats import CONTROLS, SPATIAL, EnvironmentProblem, latent_frames
from .guardrails import Guardrails, Watch, screening
from .inputs import ChunkInputs, ClipInputs, style_image
from .makers import Makers
from .network import Network, Pair, Prompt, Single
from .parallel import Halves, Mesh
from .planning import Files, preflight
from .reading import Reader, Reading
from .recipe import Plan, Recipe
from .self_attention import SelfAttention, exact
from .self_attention8 import fp8, precise, scheduled
from .spec import Spec
from .stages import Stages
from .text import FileText, TextEncoder
from .text_cache import published_text
from .vae import VAE, VAEConfig, channels_last_
from .vae_split import SharedVAEStage
from .vae_stage import Request, VAEStage

__all__ = ["Engine", "Opening", "Part", "Piece", "Progress", "Result", "Step", "StyleEncoder", "Window"]


class StyleEncoder(Protocol):
    """Turns a style image into the features the image-context network attends to."""

    def encode(self, image_HW3: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(H, W, 3) uint8 -> (image_tokens, image_width); size is the working (width, height)."""
        ...


class Engine:
    """Loads a model once; `generate` and `stream` make clips with it.

    checkpoint: a path, a published id such as "edge", "multi" or "edge/distilled", four paths by control
    name, or nothing for the tiny model inside the package. model: which of those ids to load, where the
    checkpoint does not tell; of the tiny one by default "multi". vae: path or id of the video VAE, by default
    the one beside the checkpoint, else the published one. text: a TextEncoder, or the path of an embeddings
    file; by default the encoder beside the checkpoint, else `text_cache.published_text()`. makers: for
    controls that this package does not make itself. style: a StyleEncoder, or the folder of a published one;
    by default what goes with the checkpoint. chunk_lengths: frames per chunk that the model was trained for,
    by default what its card says, else 93 and 1. guardrails: yours, or whether to screen at all; by default on
    for published ids and off for other weights. clip_makers: what computes from the whole clip what neither a file
    nor `makers` gives; by default the published models. mesh: the ranks that share the work as `plan` says, by default
    opened here; all of them make the same calls, and the first one alone has the screened frames. Raises
    CheckpointError or EnvironmentProblem.
    """

    def __init__(
        self,
        checkpoint: str | Path | Mapping[str, str | Path] | None = None,
        *,
        model: str | None = None,
        vae: str | Path | None = None,
        text: TextEncoder | str | Path | None = None,
        recipe: Recipe | None = None,
        plan: Plan | None = None,
        makers: Mapping[str, controls.ControlMaker] = controls.MAKERS,
        style: StyleEncoder | str | Path | None = None,
        chunk_lengths: tuple[int, ...] | None = None,
        guardrails: Guardrails | bool | None = None,
        clip_makers: Makers | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.recipe, self.plan = recipe or Recipe.exact(), plan or Plan()
        self.mesh = mesh or Mesh.open(self.plan)
        self.device = self.mesh.device
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.recipe.dtype]
        self.stages, self._probed = Stages(self.device), Files()
        self._neighbours = neighbours.meet(self.mesh.world)
        self.makers = makers
        self.clip_makers = clip_makers or Makers(self.device, without=makers)
        self.limits = models.limits(checkpoint) | ({"chunk_lengths": chunk_lengths} if chunk_lengths else {})
        self.text = self._open_text(text, checkpoint, self.device)
        with self.stages("load"):
            source = models.locate(checkpoint, model)
            vae_path = models.locate_vae(vae, source)
            self.model, self.files = source.model, source.record(vae_path)
            self.guardrails, self.unguarded = screening(
                guardrails, models.is_published(checkpoint), self.plan.device
            )
            self.network, notes = self._load_network(source)
            self.notes = (*notes, *self._neighbours.notes)
            self._precise = precise(self.network, self.recipe, self._full_attention())
            self.style = models.open_style(style, source, self.network.config, self.plan.device)
            self.vae = self._load_vae(vae_path)
            given = self.vae, self.plan, self.device, self.dtype
            world = self.mesh.world
            self._vae = VAEStage(*given) if world.size == 1 else SharedVAEStage(*given, world)
        # Reading 5 GB again takes seconds; it happens beside the first clip, which takes longer.
        self._hashes = ThreadPoolExecutor(1).submit(models.hashes, self.files)
        self._check_text()

    # --- making clips ---

    def generate(self, spec: Spec | ClipPlan, on_step: Progress | None = None) -> Result:
        """Make one clip and return all of it."""
        clip = self.mesh.world.first(partial(self.planned, spec))
        parts = [part.frames for part in self.stream(clip, on_step)]
        frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Result(clip, frames, self.stages.record())

    def stream(self, spec: Spec | ClipPlan, on_step: Progress | None = None) -> Iterator[Part]:
        """Make one clip chunk by chunk; each Part is yielded as soon as its frames are decoded and screened.

        Raises Refused where guardrails block: for frames at the part that is one too many, so a caller who gets it
        must drop the parts before.
        """
        world = self.mesh.world
        clip = world.first(partial(self.planned, spec))
        watch = world.by_first(partial(self.watch, clip), None)
        clip = world.first(partial(self.clip_makers.complete, clip))
        for part in self.parts(clip, on_step):
            yield world.by_first(partial(screened, part, watch), part)

    def watch(self, clip: ClipPlan) -> Watch | None:
        """Screens the clip's prompts, and gives what screens its frames; None without guardrails. Raises Refused."""
        if self.guardrails is None:
            return None
        return self.guardrails.watch(clip.frames, self.guardrails.admit(clip.prompts))

    def parts(self, clip: ClipPlan, on_step: Progress | None = None) -> Iterator[Part]:
        """`stream` without guardrails: for who screens the finished pictures itself, with `watch`."""
        return joined(self.pieces(clip, on_step))

    @property
    def plan_record(self) -> dict[str, Any]:
        """The plan for records, with the exchange that was taken."""
        return self.plan.to_dict() | {"exchange": self.mesh.exchange}

    @property
    def clip_notes(self) -> list[str]:
        """What was changed on the way while the last clip was made."""
        return list(self._vae.notes)

    @torch.inference_mode()  # as a decorator: between pieces the caller's own mode holds
    def pieces(self, clip: ClipPlan, on_step: Progress | None = None) -> Generator[Piece, None, None]:
        """`parts` as they come: what is known of one before its frames are made, then its frames window by window.

        Whoever is done with a window before it asks for the next works while the device decodes.
        """
        self.stages.reset()
        self._vae.notes.clear()
        seeds = seed_chain(clip.spec.seed, len(clip.chunks))
        schedule = self.schedule(clip)
        tail: np.ndarray | None = None
        inputs = partial(ClipInputs, clip, self.makers, self._neighbours.rooms)
        with Reader(inputs, clip.chunks, self.stages, self._neighbours) as reader:
            with self.stages("text"):
                prompts = self._prompts(clip)
            for reading, seed in zip(reader, seeds, strict=True):
                chunk = reading.chunk
                with self.stages("encode"):
                    known, guide, latents = self._latents(clip, reading, tail)
                with self.stages.waiting("inputs"):
                    given = reading.whole()
                yield Opening.of(chunk, seed, given)
                with self.stages("denoise"):
                    x0 = self._sample(
                        clip, chunk, seed, schedule, prompts, latents, given, known, guide, on_step
                    )
                self.mesh.world.check_same(x0, "latents")
                decoded, tail = 0, None
                for frames in self.stages.through("decode", self._vae.decode(x0, chunk.drop + chunk.keep)):
                    tail = last_frames(tail, frames, clip.spec.num_conditional_frames)
                    start = decoded - chunk.drop
                    if start + len(frames) > 0:
                        yield Window(max(start, 0), frames[max(-start, 0) :])
                    decoded += len(frames)

    def planned(self, spec: Spec | ClipPlan) -> ClipPlan:
        """The checked plan of a request for the loaded model; SpecError lists everything wrong with it."""
        if isinstance(spec, ClipPlan):
            return spec
        makers = (*self.makers, *self.clip_makers.factories, *(["style"] if self.style is not None else []))
        batch = preflight(
            [spec], self.model, makers=makers, configs={self.model: self.network.config}, recipe=self.recipe,
            plan=self.plan, files=self._probed, **self.limits,
        )  # fmt: skip
        self.clip_makers.check(batch.clips)
        return batch.clips[0]

    def schedule(self, clip: ClipPlan) -> sampler.Schedule:
        """The noise levels and times of every chunk of this clip."""
        return (
            sampler.distilled_schedule(clip.steps) if self.is_distilled else sampler.base_schedule(clip.steps)
        )

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of every weight file, by its key in `files`; a folder counts as its files in order of name."""
        return self._hashes.result()

    @property
    def is_distilled(self) -> bool:
        return self.network.config.timestep_scale == 1.0

    # --- one stage each ---

    def _prompts(self, clip: ClipPlan) -> list[Prompt]:
        """The prompt, and the negative one where there is guidance."""
        alone = self.is_distilled or clip.spec.guidance == 0
        texts = [clip.spec.prompt] if alone else [clip.spec.prompt, clip.spec.negative_prompt]
        features: list[Tensor | None] = [None] * len(texts)
        if clip.style is not None:
            if self.style is None:
                raise EnvironmentProblem("style image: needs an encoder, got none. Pass style= to Engine.")
            encode = self.style.encode
            seen = self.mesh.world.first(lambda: encode(style_image(clip), clip.model_size).cpu())
            wanted = (self.network.config.image_tokens, self.network.config.image_width)
            if tuple(seen.shape) != wanted:
                raise EnvironmentProblem(
                    f"style image: features must be {wanted} for this network, got {tuple(seen.shape)}. "
                    "Use the encoder that the network was trained with."
                )
            features[0] = seen.to(self.device, self.dtype)
        world = self.mesh.world
        nothing: list[Tensor | None] = [None] * len(texts)
        made = world.by_first(lambda: self._embedded(texts), nothing)
        # From device to device: by the host, 103 MB a prompt would take a quarter of a second.
        embedded = [world.broadcast(text, 0, self.device) for text in made]
        return [
            self.network.read_prompt(text, feature) for text, feature in zip(embedded, features, strict=True)
        ]

    def _embedded(self, texts: list[str]) -> list[Tensor | None]:
        return [text.to(self.device, self.dtype) for text in self.text.encode(texts)]

    def _latents(
        self, clip: ClipPlan, reading: Reading, tail: np.ndarray | None
    ) -> tuple[sampler.Known | None, sampler.Guide | None, list[Tensor | None]]:
        """What the network is shown besides noise, encoded while it is read.

        Known frames: shared with the chunk before; latent 0 sees the first of them alone. Controls: one (C, T, H, W) per
        branch, None where it is absent or all black, which the network treats alike.
        """
        chunk, names = reading.chunk, self._branches(clip)
        count = conditional_latents(chunk.index, clip.spec.num_conditional_frames)
        shared = None if tail is None or count == 0 else tail[:1]
        height, width = clip.model_size[::-1]
        whole = (chunk.length, height, width)
        # Told: an error must not reach ranks at different places.
        lit = self.mesh.world.first(lambda: [name for name in names if reading.is_lit(name)])
        most = self.plan.vae_encode_batch
        batches = [
            [partial(reading.control, name) for name in lit[first : first + most]]
            for first in range(0, len(lit), most)
        ]
        *found, anchor, gt = self._vae.encode_all(
            [
                *(Request(batch, whole) for batch in batches),
                # Scaled in fp32 and rounded once, unlike controls and known frames: so it was published.
                Request([reading.frames], whole, torch.float32) if clip.guided else None,
                None if shared is None else Request([lambda *_: shared], (1, height, width)),
            ]
        )
        latents = dict(zip(lit, (z for batch in found if batch is not None for z in batch), strict=True))
        known = None if gt is None else sampler.Known(gt.float())
        guide = None
        if anchor is not None and (mask := reading.whole().guided) is not None:
            weight = guided_map(mask).to(self.device)
            guide = sampler.Guide(anchor, weight, clip.spec.guided_generation_step_threshold)
        return known, guide, [latents.get(name) for name in names]

    def _sample(
        self,
        clip: ClipPlan,
        chunk: Chunk,
        seed: int,
        schedule: sampler.Schedule,
        prompts: list[Prompt],
        latents: list[Tensor | None],
        given: ChunkInputs,
        known: sampler.Known | None,
        guide: sampler.Guide | None,
        on_step: Progress | None,
    ) -> Tensor:
        """Latents (1, C, T, H, W) fp32 of one chunk."""
        network, (width, height) = self.network, clip.model_size
        grid = (latent_frames(chunk.length), height // SPATIAL, width // SPATIAL)
        shape = (1, network.config.latent_channels, *grid)
        n_known = known.frames if known is not None and grid[0] > 1 else 0
        mask = (torch.arange(grid[0], device=self.device) < n_known).to(self.dtype)
        held = network.read_controls(latents, self._weights(clip, given), grid, mask)
        if self.is_distilled:
            times = sampler.distilled_times(schedule, grid[0], n_known)
        else:
            times = sampler.base_times(schedule)
        contexts = network.prepare(prompts, held, network.tabulate(times), grid, mask)

        def told(index: int, total: int) -> None:
            if on_step is not None:
                on_step(Step(clip.spec.name, "denoise", chunk.index, len(clip.chunks), index + 1, total))

        if self.is_distilled:
            noise = sampler.distilled_noise(seed, shape, self.device)
            single = self._graphed(Single(network, contexts[0]))
            return sampler.sample_distilled(
                single, noise, schedule, known=known, dtype=self.dtype, on_step=told
            )
        return sampler.sample(
            self._pair(contexts), sampler.noise(seed, shape).to(self.device), schedule,
            guidance=clip.spec.guidance, known=known, guide=guide, dtype=self.dtype, on_step=told,
        )  # fmt: skip

    def _pair(self, contexts: list[Context]) -> sampler.Pair:
        """Both velocities on every rank, however many passes each computes."""
        cfg = self.mesh.cfg
        if cfg.size == 1 or len(contexts) == 1:
            return self._graphed(Pair(self.network, *contexts))
        return Halves(self._graphed(Single(self.network, contexts[cfg.rank])), cfg)

    def _graphed(self, bound: Pair | Single) -> Any:
        """The bound network, in CUDA graphs if the plan asks for that or it pays; the recipe's steps in full precision."""
        asked = graphs.pays(bound) if self.plan.graphs is None else self.plan.graphs
        record = graphs.Graphed if asked else lambda whole: whole
        return scheduled(bound, self._precise, self.recipe, record)

    def _weights(self, clip: ClipPlan, given: ChunkInputs) -> list[float] | Tensor:
        names = self._branches(clip)
        weights = {name: control.control_weight for name, control in clip.spec.controls.items()}
        maps = weight_maps(given.masks, weights, names)
        return weight_vector(names, weights) if maps is None else maps

    def _branches(self, clip: ClipPlan) -> tuple[str, ...]:
        """Which control each branch of the loaded network takes."""
        return CONTROLS if self.network.config.branches > 1 else tuple(clip.spec.controls)

    # --- loading ---

    def _load_network(self, source: models.Located) -> tuple[Network, tuple[str, ...]]:
        loaded = models.network_state(source, self.dtype, self.device)
        # Not on meta: libraries prove themselves on an example.
        attention = self._attention(loaded.config.heads)
        with torch.device("meta"):
            network = Network(loaded.config, attention, self.mesh.context)
        return quant.loaded(network, loaded.state, self.recipe.linear), loaded.notes

    def _attention(self, heads: int) -> SelfAttention:
        if self.recipe.attention == "bf16":
            return self._full_attention()
        kept, ranks = (self.recipe.attention_share, self.recipe.attention_mass), self.mesh.context
        alone = fp8(self.device, *kept)  # raises where it would be slow; ranks run the same implementation
        return alone if ranks.size == 1 else Exchanged.fp8(ranks, heads, *kept)

    def _full_attention(self) -> SelfAttention:
        return exact if self.mesh.context.size == 1 else Exchanged(self.mesh.context)

    def _load_vae(self, path: Path) -> VAE:
        if self.recipe.vae == "fp8":
            vae_fp8.prove(self.device)
        state = models.vae_state(path, self.dtype, self.device)
        with torch.device("meta"):
            vae = VAE(VAEConfig(base=state["encoder.conv1.weight"].shape[0]))
        vae.load_state_dict(state, strict=True, assign=True)
        vae = vae.eval().requires_grad_(False)
        vae = channels_last_(vae) if self.device.type == "cuda" else vae
        return vae_fp8.in_8_bits(vae) if self.recipe.vae == "fp8" else vae

    @staticmethod
    def _open_text(
        text: TextEncoder | str | Path | None, checkpoint: Any, device: torch.device
    ) -> TextEncoder:
        if isinstance(text, (str, Path)):
            return FileText(text)
        own = models.own_text(checkpoint) if text is None else text
        return published_text(device=device) if own is None else own

    def _check_text(self) -> None:
        width = self.network.config.text_width
        if self.text.width != width:
            raise EnvironmentProblem(
                f"text: the network reads embeddings of width {width}, got {self.text.width}. "
                "Use embeddings made for this checkpoint."
            )
