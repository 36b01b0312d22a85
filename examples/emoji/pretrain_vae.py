# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trains the tiny `AutoencoderKL` (SD3 form: 8x downsampling, 16 latent channels) of the emoji pipeline.

    OMP_NUM_THREADS=2 python examples/emoji/pretrain_vae.py --work_dir /tmp/pretrain --minutes 12

The scaling and the shift are set from the latents of the data, so that these have zero mean and unit variance.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from common import HERE, load_images, replace_folder, save_grid
from diffusers import AutoencoderKL


def build_vae() -> AutoencoderKL:
    """Builds the untrained autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def edges(images: torch.Tensor) -> torch.Tensor:
    """The horizontal and vertical differences of neighbouring pixels, as one flat vector per image."""
    across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    return torch.cat([across.flatten(1), down.flatten(1)], dim=1)


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float, noise: float) -> tuple:
    """L1 + L2 + edge + KL loss; the decoder sees latents with up to `noise` standard deviations of extra noise."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample().float()
        level = noise * torch.rand(len(images), 1, 1, 1) * latents.detach().std()
        output = vae.decode(latents + level * torch.randn_like(latents)).sample
    output = output.float()
    difference = output - images
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edge = (edges(output) - edges(images)).abs().mean()
    loss = difference.abs().mean() + difference.square().mean() + 0.5 * edge + kl_weight * kl
    return loss, difference.abs().mean().item(), kl.item()


@torch.no_grad()
def finish(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sets the scaling and shift factors from the data; returns the PSNR in dB and the reconstructions."""
    vae.eval()
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    output = torch.cat([vae.decode(batch).sample for batch in latents.split(64)])
    vae.train()
    mse = ((output.clamp(-1, 1) - images) / 2).square().mean().item()
    return -10 * math.log10(mse), output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "data" / "emoji.parquet")
    parser.add_argument("--work_dir", type=Path, required=True, help="Receives `vae/`, the log and picture grids.")
    parser.add_argument("--minutes", type=float, default=12.0, help="The learning rate falls to zero at this time.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-3)
    parser.add_argument("--latent_noise", type=float, default=0.15)
    parser.add_argument("--decoder_only", action="store_true", help="Go on from `WORK_DIR/vae`, encoder kept.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images = load_images(args.data)[0] * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae") if args.decoder_only else build_vae()
    vae.encoder.requires_grad_(not args.decoder_only)
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, start, last_report = 0, time.time(), time.time()
    print(f"{sum(p.numel() for p in vae.parameters())} parameters, {len(images)} images", flush=True)
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = args.learning_rate * min(1.0, (step + 1) / 100) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = images[torch.randint(len(images), (args.batch_size,))]
        loss, l1, kl = vae_loss(vae, batch, args.kl_weight, args.latent_noise)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            message = f"step {step} {time.time() - start:.0f}s loss {loss.item():.4f} l1 {l1:.4f} kl {kl:.3f}"
            print(f"{message} norm {norm:.2f} lr {rate:.1e}", flush=True)
        if time.time() - last_report > 120:
            last_report = time.time()
            psnr, output = finish(vae, images[:60])
            save_grid(torch.stack([images[:60], output], 1).flatten(0, 1) / 2 + 0.5, args.work_dir / "vae.png", 12)
            print(f"PSNR {psnr:.2f} dB", flush=True)

    psnr, output = finish(vae, images)
    save_grid(torch.stack([images[:60], output[:60]], 1).flatten(0, 1) / 2 + 0.5, args.work_dir / "vae.png", 12)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.work_dir / "vae.new")
    replace_folder(args.work_dir / "vae.new", args.work_dir / "vae")
    factors = f"scaling {vae.config.scaling_factor}, shift {vae.config.shift_factor}"
    print(f"done: {step} steps, PSNR {psnr:.2f} dB, {factors}")


if __name__ == "__main__":
    main()
