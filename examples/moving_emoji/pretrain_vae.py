# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Trains the tiny `AutoencoderKLWan` (8x in space, 4x in time, 16 latent channels) of the moving-emoji pipeline.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/moving_emoji/pretrain_vae.py --work_dir /tmp/moving

`latents_mean` and `latents_std` of its configuration are measured on clips of all prompts and kinds.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from clips import HERE, random_batch, save_strips
from diffusers import AutoencoderKLWan
from parallel import all_average, start_processes


sys.path.append(str(HERE.parent / "emoji"))

from common import replace_folder  # noqa: E402


@torch.no_grad()
def initialise(vae: AutoencoderKLWan) -> None:
    """
    Starts from an image autoencoder that maps white to zero: unit-scale weights on the newest frame only, and biases
    that cancel the white background. With the default weights the colours take several times as long.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            weight, spatial = module.weight, module.weight.ndim == 5 and module.kernel_size[1] == 3
            inputs = weight[0, :, -1].numel() if spatial else weight[0].numel()
            torch.nn.init.normal_(weight, std=(1.5 if spatial else 1.0) / inputs**0.5)
            torch.nn.init.zeros_(module.bias)
            if spatial and module.kernel_size[0] == 3:
                weight[:, :, :2] = 0
    vae.encoder.conv_in.bias.copy_(-vae.encoder.conv_in.weight.sum(dim=(1, 2, 3, 4)))
    vae.quant_conv.weight[vae.z_dim :] = 0
    vae.quant_conv.bias[vae.z_dim :] = -5.0  # a narrow posterior, or else the KL term would switch it off
    torch.nn.init.normal_(vae.decoder.conv_in.bias, std=0.5)
    vae.decoder.conv_out.weight *= 0.1
    torch.nn.init.ones_(vae.decoder.conv_out.bias)


def build_vae() -> AutoencoderKLWan:
    """Builds the untrained autoencoder."""
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    initialise(vae)
    return vae


def edges(clips: torch.Tensor) -> torch.Tensor:
    """The differences of neighbouring pixels, across and down, as one flat vector per clip."""
    across, down = clips[..., 1:] - clips[..., :-1], clips[..., 1:, :] - clips[..., :-1, :]
    return torch.cat([across.flatten(1), down.flatten(1)], dim=1)


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which stops every gradient where a white pixel comes out too bright."""
    vae.clear_cache()
    hidden, parts = vae.post_quant_conv(latents), []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frame = hidden[:, :, i : i + 1]
        parts.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(parts, dim=2)


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor, kl_weight: float, noise: float) -> tuple:
    """L1 + L2 + colour + edge + KL loss; the decoder sees latents with up to `noise` standard deviations of extra noise."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(clips).latent_dist
        latents = posterior.sample().float()
        level = noise * torch.rand(len(clips), 1, 1, 1, 1) * latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        output = decode_unclamped(vae, latents + level * torch.randn_like(latents))
    output = output.float()
    difference = output - clips
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edge = (edges(output) - edges(clips)).abs().mean()
    # Emoji are mostly orange; without more weight on the hue, and on red against green, these are learnt last.
    hue = difference - difference.mean(dim=1, keepdim=True)
    hue = torch.cat([hue, difference[:, :1] - difference[:, 1:2]], dim=1)
    loss = difference.abs().mean() + difference.square().mean() + 0.5 * edge + kl_weight * kl
    loss = loss + 2 * hue.abs().mean() + 4 * hue.square().mean()
    return loss, difference.abs().mean().item(), kl.item()


@torch.no_grad()
def finish(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Sets the latents' mean and deviation from the clips; returns the PSNR in dB and the reconstructions."""
    vae.eval()
    with torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in clips.split(8)]).float()
        output = torch.cat([vae.decode(batch).sample for batch in latents.split(8)]).float()
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in latents.mean(dim=(0, 2, 3, 4)).tolist()],
        latents_std=[round(value, 4) for value in latents.std(dim=(0, 2, 3, 4)).tolist()],
    )
    vae.train()
    mse = ((output.clamp(-1, 1) - clips) / 2).square().mean().item()
    return -10 * math.log10(mse), output


def save(vae: AutoencoderKLWan, folder: Path) -> None:
    """Saves the autoencoder in the place of an earlier one."""
    vae.save_pretrained(folder.with_name(folder.name + ".new"))
    replace_folder(folder.with_name(folder.name + ".new"), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Receives `vae/` and pictures of clips.")
    parser.add_argument("--minutes", type=float, default=20.0, help="The learning rate falls to zero at this time.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--image_share", type=float, default=0.2, help="The share of the time on single frames.")
    parser.add_argument("--kl_weight", type=float, default=1e-4)
    parser.add_argument("--latent_noise", type=float, default=0.05)
    parser.add_argument("--resume", action="store_true", help="Go on from `WORK_DIR/vae`.")
    parser.add_argument("--decoder_only", action="store_true", help="Go on from `WORK_DIR/vae`, encoder kept.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rank, processes = start_processes()
    torch.manual_seed(args.seed)
    rng = random.Random(f"{args.seed} {rank}")
    vae = AutoencoderKLWan.from_pretrained(args.work_dir / "vae") if args.resume or args.decoder_only else build_vae()
    vae.encoder.requires_grad_(not args.decoder_only)
    vae.quant_conv.requires_grad_(not args.decoder_only)
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, start, last_report, elapsed = 0, time.time(), time.time(), 0.0
    torch.manual_seed(1000 * args.seed + rank)
    print(f"{sum(p.numel() for p in vae.parameters())} parameters", flush=True)
    while (progress := elapsed / (60 * args.minutes)) < 1:
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = args.learning_rate * min(1.0, (step + 1) / 30) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Single frames cost little and teach the look of the subjects; whole clips teach the motion.
        if (progress < args.image_share and not args.resume) or step % 3 == 0:
            clips = random_batch(2 * args.batch_size, rng)[0]
            frame = rng.randrange(clips.shape[2])
            clips = clips[:, :, frame : frame + 1]
        elif step % 3 == 1:
            first = rng.choice((0, 4))
            clips = random_batch(args.batch_size, rng)[0][:, :, first : first + 5]
        else:
            clips = random_batch(args.batch_size // 2, rng)[0]
        loss, l1, kl = vae_loss(vae, clips, args.kl_weight, args.latent_noise)
        optimizer.zero_grad()
        loss.backward()
        elapsed = time.time() - start
        if processes > 1:
            elapsed = all_average(list(vae.parameters()), elapsed)
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 and rank == 0:
            message = f"step {step} {elapsed:.0f}s loss {loss.item():.4f} l1 {l1:.4f} kl {kl:.3f}"
            print(f"{message} norm {norm:.2f} lr {rate:.1e}", flush=True)
        if time.time() - last_report > 120 and rank == 0:
            last_report = time.time()
            clips = random_batch(16, random.Random(1))[0]
            psnr, output = finish(vae, clips)
            save_strips(torch.stack([clips, output], 1).flatten(0, 1), args.work_dir / "vae.png", 2)
            save(vae, args.work_dir / "vae")
            print(f"PSNR {psnr:.2f} dB", flush=True)

    if processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    clips = random_batch(192, random.Random(1))[0]
    psnr, output = finish(vae, clips)
    save_strips(torch.stack([clips[:16], output[:16]], 1).flatten(0, 1), args.work_dir / "vae.png", 2)
    save(vae, args.work_dir / "vae")
    print(f"done: {step} steps, PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    main()
