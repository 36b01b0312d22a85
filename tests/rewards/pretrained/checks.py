# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What every scorer that can be differentiated must show."""

import torch

from .fixtures.recipes import as_pixels, picture


def pictures(height: int, width: int, number: int = 3) -> torch.Tensor:
    """Pixels of different smooth pictures, float32, of shape `(number, 3, height, width)`."""
    return torch.stack([as_pixels(picture(height, width, 50 + seed)) for seed in range(number)])


def check_scorer(reward, images: torch.Tensor, prompts: list[str], atol: float = 1e-5) -> torch.Tensor:
    """
    Scores do not depend on the batch, chunks give the same as the whole, and each score has gradients to its own pixels and to
    no others. Returns the scores.
    """
    pixels = images.clone().requires_grad_()
    scores = reward.score(pixels, prompts)
    assert scores.shape == (len(images),) and scores.dtype is torch.float32
    assert scores.detach().std() > 100 * atol  # or the comparisons below would not say much
    scores[0].backward()
    reached = pixels.grad.flatten(1).abs().amax(1)
    assert reached[0] > 0 and not reached[1:].any() and pixels.grad.isfinite().all()

    whole = scores.detach()
    alone = [reward.score(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    torch.testing.assert_close(torch.cat(alone).detach(), whole, atol=atol, rtol=0)
    reward.batch_size = 2
    torch.testing.assert_close(reward(images, prompts), whole, atol=atol, rtol=0)
    assert not reward(images, prompts).requires_grad
    return whole
