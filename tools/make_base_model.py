"""Trains the small text-to-image model that ships in `assets/base_model/`, from nothing.

An autoencoder first, then a text encoder and a UNet together, on openly licensed emoji with their
names for captions (`emoji_dataset.py` says where they come from).

    python tools/make_base_model.py --icons node_modules/@iconify-json --out output/base_model

A GPU is used where there is one. On CPUs a process a core is fastest, and doesn't stall when other
programs run:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 tools/make_base_model.py --icons … --out …

`--out` gets the model in the diffusers layout, and every `--snapshot_every` steps the model so far.
Same seed, steps and processes on the same machine: same weights. `docs/base-model.md` has the
figures; `score_base_model.py` measures them.
"""

import argparse
import copy
import os
import random
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from base_model_parts import (
    MAX_TOKENS,
    load_tokenizer,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    save_pipeline,
)
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from emoji_dataset import Picture, load_training_pictures
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import CLIPTextModel


class Workers:
    """The processes of a `torchrun` launch (or just this one), and this one's device."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.rank) if cuda else torch.device("cpu")
        if self.count > 1:
            dist.init_process_group("nccl" if cuda else "gloo")

    def average_gradients(self, parameters: list[Parameter]) -> None:
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        means = (flat / self.count).split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)]
        )

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def log(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)

    def for_training(self, module: Any) -> None:
        """To the device; on CPUs with plain attention: the fused one's backward is slow there."""
        if self.device.type == "cpu":
            if isinstance(module, CLIPTextModel):
                module.set_attn_implementation("eager")
            else:
                module.set_attn_processor(AttnProcessor())
        module.to(self.device).train()


class AveragedWeights:
    """Exponential moving average of the weights: smoother than any single step's."""

    def __init__(self, module: Module, decay: float) -> None:
        self.weights = [p.detach().clone() for p in module.parameters()]
        self.parameters = list(module.parameters())
        self.decay = decay

    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.parameters], 1 - decay)

    def copy_to(self, module: Module) -> None:
        for parameter, weight in zip(module.parameters(), self.weights, strict=True):
            parameter.data.copy_(weight)


def batches(count: int, size: int, workers: Workers, seed: int) -> Iterator[list[int]]:
    """Endless batches of this worker's share of indices; every epoch in a fresh order."""
    rng = random.Random(seed)
    pending: list[int] = []
    while True:
        while len(pending) < size:
            pending += rng.sample(range(count), count)
        batch, pending = pending[:size], pending[size:]
        yield batch[workers.rank :: workers.count]


def optimize(
    module: Module,
    loss_of_batch: Callable[[int], Tensor],
    steps: int,
    lr: float,
    workers: Workers,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW; the rate rises over 200 steps, stays, and falls to zero over the last third."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 200, (steps - step) / (steps / 3))
    )
    losses, start = torch.zeros(50), time.monotonic()
    for step in range(steps):
        loss = loss_of_batch(step)
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses[step % 50] = loss.detach()
        if step % 50 == 49:
            seconds = time.monotonic() - start
            workers.log(f"  {step + 1:6}/{steps}  loss {losses.mean():.4f}  {seconds:.0f} s")
        after_step(step + 1)


# --- the autoencoder ---


def recolour(pictures: Tensor) -> Tensor:
    """Random colours for `[n, 3, h, w]` pictures in [-1, 1]; white stays white.

    The autoencoder is to serve other pictures than the emoji: half of them get their channels
    mixed, a quarter become grey drawings of high contrast.
    """
    n = len(pictures)
    ink = (1 - pictures) / 2
    mixing = torch.softmax(3 * torch.randn(n, 3, 3), dim=2).to(ink.device)
    mixed = torch.einsum("nij,njhw->nihw", mixing, ink)
    grey = (ink.mean(1, keepdim=True) * 6 - 2).clamp(0, 1).expand_as(ink)
    choice = torch.rand(n, 1, 1, 1).to(ink.device)
    return 1 - 2 * torch.where(choice < 0.25, grey, torch.where(choice < 0.5, mixed, ink))


def random_crops(pictures: Tensor, size: int) -> Tensor:
    corners = torch.randint(pictures.shape[-1] - size + 1, (len(pictures), 2)).tolist()
    return torch.stack(
        [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corners, strict=True)]
    )


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=2), pictures.diff(dim=3)


def train_vae(pictures: Tensor, steps: int, batch_size: int, workers: Workers) -> AutoencoderKL:
    """`pictures`: `[n, 3, 64, 64]` uint8. The scaling factor is set so that latents have std 1.

    Three quarters of the steps see quarters of the pictures: four times cheaper, nearly as good.
    """
    vae = make_vae()
    workers.for_training(vae)
    torch.manual_seed(workers.rank)
    index = batches(len(pictures), batch_size, workers, seed=1)

    def loss_of_batch(step: int) -> Tensor:
        batch = pictures[next(index)]
        if step < 0.75 * steps:
            batch = random_crops(batch, 32)
        true = recolour(batch.to(workers.device).float() / 127.5 - 1)
        with torch.autocast(workers.device.type, torch.bfloat16):
            posterior = vae.encode(true).latent_dist
            drawn = vae.decode(posterior.sample()).sample
        difference = drawn.float() - true
        loss = difference.abs().mean() + difference.square().mean()
        for drawn_edges, true_edges in zip(edges(drawn.float()), edges(true), strict=True):
            loss = loss + 0.5 * F.l1_loss(drawn_edges, true_edges)
        return loss + 2e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    optimize(vae, loss_of_batch, steps, 1.5e-3, workers)
    vae.eval()
    vae.register_to_config(scaling_factor=1 / encode(vae, pictures, workers).std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, workers: Workers) -> Tensor:
    """`[n, 3, 64, 64]` uint8 → `[n, 4, 16, 16]` unscaled latents, on the device."""
    parts = (p.to(workers.device).float() / 127.5 - 1 for p in pictures.split(64))
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


# --- text encoder and UNet ---


def vary_caption(caption: str, rng: random.Random) -> str:
    """The caption as the model is to meet it: mostly itself.

    Empty for classifier-free guidance; without its style, or with a made-up style word, so that
    a word the model never saw leaves the picture alone.
    """
    name, style = caption.rsplit(", ", 1)
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.15:
        return name
    if kind < 0.2:
        made_up = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))
        return f"{name}, {made_up} style"
    return f"{name}, {style}"


def timestep_shares(alphas_cumprod: Tensor) -> Tensor:
    """Probability of each timestep: proportional to SNR^-½, clamped.

    Uniform timesteps spend the effort on the nearly clean pictures, where any model denoises well;
    what a caption looks like is decided in the noisy ones. Drawing those more often does what
    weighting their loss would, with less variance.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    shares = snr.pow(-0.5).clamp(0.15, 6)
    return shares / shares.sum()


def draw_timesteps(shares: Tensor, count: int) -> Tensor:
    """`count` timesteps, one from each of `count` equally likely ranges, in random order.

    A batch then holds every level of noise (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    position = (torch.randperm(count) + torch.rand(1)) / count
    return torch.searchsorted(shares.cumsum(0), position).clamp(max=len(shares) - 1)


def train_diffusion(
    vae: AutoencoderKL,
    pictures: list[Picture],
    pixels: Tensor,
    args: argparse.Namespace,
    workers: Workers,
) -> None:
    """Trains text encoder and UNet on the latents; writes the averaged weights."""
    captions = [picture.caption for picture in pictures]
    if workers.rank == 0:
        make_tokenizer(captions, args.out / "tokenizer")
    workers.wait()
    tokenizer = load_tokenizer(args.out / "tokenizer")
    if args.init:
        unet = UNet2DConditionModel.from_pretrained(args.init / "unet", dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(
            args.init / "text_encoder", dtype=torch.float32
        )
    else:
        unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    model = torch.nn.ModuleList([unet, text_encoder])
    for part in model:
        workers.for_training(part)
    average = AveragedWeights(model, decay=0.999)
    torch.manual_seed(1000 * args.seed + workers.rank)

    latents = encode(vae, pixels, workers) * vae.config["scaling_factor"]
    schedule: Any = make_scheduler()
    alphas_cumprod = schedule.alphas_cumprod.to(workers.device)
    shares = timestep_shares(schedule.alphas_cumprod)
    index = batches(len(pictures), args.batch_size, workers, seed=2 + args.seed)
    rng = random.Random(1000 * args.seed + workers.rank)

    def loss_of_batch(step: int) -> Tensor:
        chosen = next(index)
        text = [vary_caption(captions[i], rng) for i in chosen]
        tokens = tokenizer(text, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        clean = latents[chosen]
        t = draw_timesteps(shares, len(chosen)).to(workers.device)
        noise = torch.randn(clean.shape).to(workers.device)
        alpha = alphas_cumprod[t, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast(workers.device.type, torch.bfloat16):
            context = text_encoder(tokens.input_ids.to(workers.device))[0]
            predicted = unet(noisy, t, context).sample
        return F.mse_loss(predicted.float(), noise)

    def save(folder: Path) -> None:
        averaged = copy.deepcopy((unet, text_encoder))
        average.copy_to(torch.nn.ModuleList(averaged))
        save_pipeline(folder, vae, *averaged, tokenizer)

    def after_step(step: int) -> None:
        average.update(step)
        if workers.rank == 0 and args.snapshot_every and step % args.snapshot_every == 0:
            save(args.out / "snapshot")

    optimize(model, loss_of_batch, args.steps, 1.2e-3, workers, after_step)
    if workers.rank == 0:
        save(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the base model that ships with the project."
    )
    parser.add_argument(
        "--icons", type=Path, required=True, help="the folder node_modules/@iconify-json"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--vae", type=Path, help="take this trained autoencoder instead of training one"
    )
    parser.add_argument("--init", type=Path, help="go on from this model's text encoder and UNet")
    parser.add_argument("--vae_steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--batch_size", type=int, default=32, help="over all processes; half for the autoencoder"
    )
    parser.add_argument("--snapshot_every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="another for a run with --init")
    args = parser.parse_args()

    workers = Workers()
    pictures = load_training_pictures(args.icons)
    pixels = torch.from_numpy(np.stack([p.rgb for p in pictures])).permute(0, 3, 1, 2).contiguous()
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae).to(workers.device)
    else:
        workers.log(f"autoencoder: {len(pictures)} pictures")
        torch.manual_seed(args.seed)  # all processes begin with the same weights
        vae = train_vae(pixels, args.vae_steps, args.batch_size // 2, workers)
        if workers.rank == 0:
            vae.save_pretrained(args.out / "vae")
    workers.log("text encoder and UNet")
    torch.manual_seed(args.seed)
    train_diffusion(vae, pictures, pixels, args, workers)


if __name__ == "__main__":
    main()
