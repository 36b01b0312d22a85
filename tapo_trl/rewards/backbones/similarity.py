# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The image-text similarity of CLIP, Eq. 4, on features of a diffusion transformer: its head, and a transformer that has one."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .score_stream import ScoreTransformerMixin


INITIAL_LOGIT_SCALE = math.log(100)  # CLIP's after its training


class LRMHead(nn.Module):
    """
    CLIP's similarity, in float32 whatever the model's precision. The projection of the text, which CLIP has projected
    before, starts at the identity.

    Args:
        visual_dim (`int`): width of the visual feature.
        text_dim (`int`): width of the pooled prompt embeddings.
    """

    def __init__(self, visual_dim: int, text_dim: int):
        super().__init__()
        self.visual_projection = nn.Linear(visual_dim, text_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, text_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        nn.init.eye_(self.text_projection.weight)

    def reset_parameters(self) -> None:
        self.visual_projection.reset_parameters()
        nn.init.eye_(self.text_projection.weight)
        nn.init.constant_(self.logit_scale, INITIAL_LOGIT_SCALE)

    def forward(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        r"""
        \\( e^s \cos(P_v f_v, P_t f_t) \\)

        Args:
            visual (`torch.Tensor` of shape `(batch_size, visual_dim)`): f_v.
            text (`torch.Tensor` of shape `(batch_size, text_dim)`): f_t.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`.
        """
        # On the meta device, that of dry runs, there is no autocast
        with nullcontext() if visual.is_meta else torch.autocast(visual.device.type, enabled=False):
            visual = F.linear(visual.float(), self.visual_projection.weight.float())
            text = F.linear(text.float(), self.text_projection.weight.float())
            return self.logit_scale.float().exp() * F.cosine_similarity(visual, text)


class SimilarityTransformerMixin(ScoreTransformerMixin):
    """
    Mixed into a diffusers transformer with pooled prompt embeddings. It runs unchanged, and its logit is the similarity of the
    mean image token after the last block to the pooled embedding: an SLRM without score tokens.

    Args:
        num_task_tokens (`int`, *optional*, defaults to `0`): 0.
        task_projection_rank (`int`, *optional*): must be `None`.
        transformer_config: arguments of the transformer.
    """

    def __init__(self, num_task_tokens: int = 0, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(**transformer_config)
        if num_task_tokens or task_projection_rank is not None:
            raise ValueError(
                "`num_task_tokens=0` leaves no score tokens to project: leave `task_projection_rank` unset, got "
                f"{task_projection_rank}."
            )
        self.score_head = LRMHead(self.dim, self.config.pooled_projection_dim)

    def init_score_stream(self) -> None:
        self.score_head.reset_parameters()

    def forward(self, mask_task_tokens: bool = False, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mask_task_tokens (`bool`, *optional*, defaults to `False`): without effect, since there are none.
            inputs: arguments of the transformer in diffusers, by name.

        Returns:
            `tuple`: velocity and logits of shape `(batch_size,)`, float32.
        """
        states: list[torch.Tensor] = []
        hook = self.norm_out.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        try:
            (velocity,) = self.base_class.forward(self, **inputs, return_dict=False)
        finally:
            hook.remove()
        return velocity, self.score_head(states[0].float().mean(dim=1), inputs["pooled_projections"])
