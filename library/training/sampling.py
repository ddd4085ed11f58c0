"""Sample pictures during training, drawn with diffusers' own pipelines.

A picture is that of a plain diffusers call with the same seed, prompt and scheduler: the initial
noise comes from a CPU generator with the prompt's seed, and training's own generators, modes and
devices are as before when drawing is done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from library.training.accelerator import weight_dtype
from library.training.files import write_atomically
from library.training.grids import extend_grid
from library.training.options import Options
from library.training.prompts import Prompt, read_prompts
from library.training.samplers import make_scheduler
from library.training.text import encode_prompts

if TYPE_CHECKING:
    from library.training.models import DiffusionModel

__all__ = ["Prompt", "Sample", "Sampler", "read_prompts", "should_sample"]

log = logging.getLogger(__name__)

# Latent cells drawn at once: one 512×512 picture of SD 1.x. Drawing then needs no more memory than
# stock's one by one, while small pictures go through the UNet together.
CELLS_AT_ONCE = 64 * 64

TextArguments = dict[str, Tensor]  # the pipeline's names for embeddings of one prompt, [1, …] each


@dataclass(frozen=True)
class Sample:
    """A picture that was drawn: `seed` is the one really used, `epoch` None within an epoch."""

    prompt: Prompt
    seed: int
    epoch: int | None
    step: int
    path: Path


def should_sample(options: Options, epoch: int | None, step: int) -> bool:
    """Whether pictures are due after `step` steps, by stock's rules.

    `epoch` is the number of the epoch that has just ended, None anywhere else. With
    `--sample_every_n_epochs`, `--sample_every_n_steps` is not looked at.
    """
    if step == 0:
        return options.sample_at_first
    if options.sample_every_n_epochs:
        return epoch is not None and epoch % options.sample_every_n_epochs == 0
    if options.sample_every_n_steps:
        return epoch is None and step % options.sample_every_n_steps == 0
    return False


class Sampler:
    """Draws a run's prompts into `<output_dir>/sample/`. For the main process only.

    The adapter that is applied to the model takes part: put it in eval mode before drawing.
    A prompt without a seed gets the run's seed plus its index, the same at every step.
    """

    def __init__(
        self,
        model: DiffusionModel,
        options: Options,
        prompts: Sequence[Prompt],
        output_dir: str | Path,
        output_name: str,
        start_step: int = 0,
        tell: Callable[[Sequence[Sample]], None] | None = None,
    ) -> None:
        """`start_step` is the step a resumed run starts from; from 0 the grids are begun anew.

        `tell` is called with the pictures of every drawing.
        """
        self.model = model
        self.options = options
        self.prompts = list(prompts)
        self.folder = Path(output_dir) / "sample"
        self.prefix = f"{output_name}_" if output_name else ""
        self.tell = tell
        self.history: list[Sample] = []
        self._grids_of_another_run = start_step == 0

    def draw(self, epoch: int | None, step: int) -> list[Path]:
        """Draw every prompt and return the files, in the prompts' order."""
        log.info("drawing %d sample picture(s) at step %d", len(self.prompts), step)
        drawn: list[Sample] = []
        if self._grids_of_another_run:
            for prompt in self.prompts:
                self._grid(prompt).unlink(missing_ok=True)
            self._grids_of_another_run = False
        with torch.no_grad(), ready_to_draw(self.model):
            pipeline: Any = self.model.pipeline()
            pipeline.set_progress_bar_config(disable=True)
            for batch in self._batches():
                for (prompt, _), latent in zip(batch, self._draw(pipeline, batch), strict=True):
                    drawn.append(self._save(prompt, self._decode(pipeline, latent), epoch, step))
        drawn.sort(key=lambda sample: sample.prompt.index)
        self.history.extend(drawn)
        if self.tell is not None:
            self.tell(drawn)
        return [sample.path for sample in drawn]

    def seed(self, prompt: Prompt) -> int:
        """The seed of the prompt's noise."""
        if prompt.seed is not None:
            return prompt.seed
        return (self.options.seed or 0) + prompt.index

    def _batches(self) -> Iterator[list[tuple[Prompt, TextArguments]]]:
        """Prompts that one pipeline call can draw together, no more than memory allows."""
        groups: dict[tuple[Any, ...], list[tuple[Prompt, TextArguments]]] = {}
        for prompt in self.prompts:
            # One by one: together, all would be padded to the longest one's length.
            text = self._embed(prompt)
            length = text["prompt_embeds"].shape[1]
            size = (prompt.width, prompt.height)
            alike = (*size, prompt.steps, prompt.scale, self._sampler_name(prompt), length)
            groups.setdefault(alike, []).append((prompt, text))
        for group in groups.values():
            together = max(1, CELLS_AT_ONCE // math.prod(self._latent_size(group[0][0])))
            for first in range(0, len(group), together):
                yield group[first : first + together]

    def _embed(self, prompt: Prompt) -> TextArguments:
        """The pipeline's arguments for the texts. Without guidance there is no negative side."""
        sides = ["", "negative_"] if prompt.scale > 1 else [""]
        captions = [prompt.text, prompt.negative][: len(sides)]
        with self._autocast():
            # Each alone, as diffusers does, unless one has to be padded to the other's length.
            texts = [encode_prompts(self.model, [text], self.options) for text in captions]
            contexts = [text.context for text in texts]
            if len({context.shape[1] for context in contexts}) > 1:
                together = encode_prompts(self.model, captions, self.options)
                contexts = list(together.context.split(1))
        arguments = {}
        for side, text, context in zip(sides, texts, contexts, strict=True):
            arguments[f"{side}prompt_embeds"] = context
            if text.pooled is not None:
                arguments[f"{side}pooled_prompt_embeds"] = text.pooled
        return arguments

    def _draw(self, pipeline: Any, batch: list[tuple[Prompt, TextArguments]]) -> list[Tensor]:
        """The latents of a batch, one [1, C, h, w] a prompt."""
        prompts = [prompt for prompt, _ in batch]
        first = prompts[0]
        pipeline.scheduler = make_scheduler(
            self._sampler_name(first),
            self.model.scheduler_config,
            self.model.prediction_type,
            self.options.zero_terminal_snr,
        )
        generators = [torch.Generator().manual_seed(self.seed(prompt)) for prompt in prompts]
        shape = (1, self.model.unet.config.in_channels, *self._latent_size(first))
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        with self._autocast():
            latents: Tensor = pipeline(
                **{name: torch.cat([text[name] for _, text in batch]) for name in batch[0][1]},
                latents=torch.cat(noise).to(self._device),
                generator=generators,
                width=first.width,
                height=first.height,
                num_inference_steps=first.steps,
                guidance_scale=first.scale,
                output_type="latent",
            ).images
        return list(latents.split(1))

    def _sampler_name(self, prompt: Prompt) -> str:
        return prompt.sampler or self.options.sample_sampler

    def _latent_size(self, prompt: Prompt) -> tuple[int, int]:
        """Height and width in latent cells."""
        return prompt.height // self.model.vae_factor, prompt.width // self.model.vae_factor

    @property
    def _device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    def _autocast(self) -> torch.autocast:
        on = self.options.mixed_precision != "no"
        return torch.autocast(self._device.type, weight_dtype(self.options), enabled=on)

    def _decode(self, pipeline: Any, latent: Tensor) -> Image.Image:
        """Outside autocast, in the VAE's own precision, one by one: decoding needs most memory."""
        vae: Any = self.model.vae
        with _safe_precision(vae):
            pixels = vae.decode(latent.to(vae.dtype) / vae.config.scaling_factor).sample
        if not torch.isfinite(pixels).all():
            log.warning("a sample picture is not finite; with an fp16 model try --no_half_vae")
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image

    def _save(self, prompt: Prompt, image: Image.Image, epoch: int | None, step: int) -> Sample:
        seed = self.seed(prompt)
        moment = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        clock = time.strftime("%Y%m%d%H%M%S")
        name = f"{self.prefix}{moment}_{prompt.index:02d}_{clock}_{seed}.png"
        path = write_atomically(self.folder / name, image.save)
        extend_grid(self._grid(prompt), image, step)
        return Sample(prompt, seed, epoch, step, path)

    def _grid(self, prompt: Prompt) -> Path:
        return self.folder / f"{self.prefix}prompt{prompt.index:02d}_grid.png"


@contextmanager
def ready_to_draw(model: DiffusionModel) -> Iterator[None]:
    """All parts in eval mode on the UNet's device; each back where and how it was afterwards."""
    device = next(model.unet.parameters()).device
    parts: list[nn.Module] = [model.unet, model.vae, *model.text_encoders]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    devices = [next(part.parameters()).device for part in parts]
    for part in parts:
        part.eval().to(device)
    try:
        yield
    finally:
        for part, former in zip(parts, devices, strict=True):
            part.to(former)
        for module, training in modes:
            module.training = training


@contextmanager
def _safe_precision(vae: Any) -> Iterator[None]:
    """SDXL's VAE overflows in float16 (its config says `force_upcast`)."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.float()
    yield
    if upcast:
        vae.half()
