# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A tiny pipeline of Wan2.2-TI2V-5B."""

from diffusers import AutoencoderKLWan, WanPipeline

from tapo_trl.policies import WanPolicy


class TI2VPolicy(WanPolicy):
    """Of [`WanPolicy`], the variant with a timestep per token, and an autoencoder of 16 x 16 pixels that patches them."""

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> WanPipeline:
        pipeline = super().tiny(seed, **{"in_channels": 8, "out_channels": 8} | transformer_config)
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=[0.1] * 8,
            latents_std=[1.5] * 8,
        )
        return WanPipeline(**pipeline.components | {"vae": vae.eval()}, expand_timesteps=True)
