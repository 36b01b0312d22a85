# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Z-Image."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from .base import Defaults, PromptEmbeddings
from .flux import FLUX_VAE
from .image import ImagePolicy, linear_sigmas


class ZImagePolicy(ImagePolicy):
    """
    [`~diffusers.ZImagePipeline`] as a policy: Z-Image, and models with its architecture.

    The guided velocity is `c + w (c - u)`: `guidance_scale=0` turns guidance off, and 4 is what other pipelines call 5. The
    pipeline's `cfg_normalization` and `cfg_truncation` are not supported, which are off by default. The transformer reads
    `1 - sigma` and returns the velocity with the other sign, and takes each prompt at its own length.
    """

    max_sequence_length = 512
    guidance_off = 0.0
    text_encoder_names = ["text_encoder"]
    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    licenses = {"Tongyi-MAI/Z-Image": ("apache-2.0", None)}
    known_configs = {
        # The defaults of the transformer's class in diffusers, but for the length of its table of positions. That, the
        # autoencoder of FLUX.1 and the shift are recalled from the released repository, and not compared with it.
        "Tongyi-MAI/Z-Image": {
            "transformer": ("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
            "vae": ("AutoencoderKL", FLUX_VAE),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
        },
    }

    @property
    def defaults(self) -> Defaults:
        return Defaults(height=1024, width=1024, num_inference_steps=50, guidance_scale=5.0)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], max_sequence_length: int | None = None) -> PromptEmbeddings:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),  # which it changes
            self.encoder_device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
        )
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return PromptEmbeddings(pad(rows, batch_first=True), prompt_embeds_mask=mask)

    def prompt_shapes(self, max_sequence_length):
        return {"prompt_embeds": (max_sequence_length, self.transformer.config.cap_feat_dim)}

    def sigmas(self, num_inference_steps):
        return linear_sigmas(num_inference_steps)

    @staticmethod
    def model_inputs(config, latents, sigma, prompts, guidance_scale=None):
        mask, rows = prompts.tensors.get("prompt_embeds_mask"), list(prompts.prompt_embeds)
        if mask is not None:
            rows = [row[:length] for row, length in zip(rows, mask.sum(1).tolist(), strict=True)]
        return {"x": list(latents.unsqueeze(2)), "t": 1 - sigma, "cap_feats": rows}

    @staticmethod
    def velocity_of(config, output, latents):
        return -torch.stack(list(output)).squeeze(2)

    def guide(self, conditional, unconditional, guidance_scale):
        return conditional + guidance_scale * (conditional - unconditional)

    @classmethod
    def tiny(cls, seed: int = 0, **transformer_config) -> ZImagePipeline:
        """Z-Image's architecture: refiners of image and prompt, and one stream behind them."""
        from .tiny import spread, tiny_byte_tokenizer, tiny_flux_vae, tiny_qwen3

        torch.manual_seed(seed)
        tokenizer = tiny_byte_tokenizer()
        transformer = ZImageTransformer2DModel(
            **{
                "in_channels": 4,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": [8, 4, 4],
                "axes_lens": [512, 32, 32],
            }
            | transformer_config
        )
        spread(transformer)
        return ZImagePipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=tiny_flux_vae(),
            text_encoder=tiny_qwen3(tokenizer),
            tokenizer=tokenizer,
        )
