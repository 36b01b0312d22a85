# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What model cards say about a method: [`MethodCard`]."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodCard:
    """
    What the model card says about the method of a training. It belongs to the trainer, the pairing, the variant or the reward
    model that is the method.

    Args:
        name (`str`): short name, such as `"TAPO"`.
        tags (`tuple[str, ...]`): tags on the Hub.
        paper (`str`): BibTeX entry of its paper, or the key of one in `runs/templates/references.bib`.
        title (`str`): its name in the first sentence of the card, in Markdown.
        text (`str`): what it does, in a few sentences.
        from_pairs (`bool`, *optional*, defaults to `False`):
            whether a policy learns from preference pairs, and not from prompts and a reward.
        from_samples (`bool`, *optional*, defaults to `False`):
            whether a policy learns from images or videos alone, without preferences or a reward.
    """

    name: str
    tags: tuple[str, ...]
    paper: str
    title: str
    text: str
    from_pairs: bool = False
    from_samples: bool = False
