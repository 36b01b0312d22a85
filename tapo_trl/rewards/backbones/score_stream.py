# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Score tokens: their projections, their head, and making a transformer with score tokens from a plain one."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import nn

from ...networks.float32 import Float32LayerNorm, Readout
from .base import RewardBackboneMixin


class LowRankUpdate(nn.Module):
    """`x -> up(down(x))`, zero at the start."""

    def __init__(self, dim: int, rank: int, out_dim: int | None = None):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim or dim, bias=False)

    def reset_parameters(self) -> None:
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))


class ScoreProjections(nn.Module):
    """
    P^S of one block: the query, key and value projections of the score tokens. They start at the block's own
    projections of another stream, the sources.

    Args:
        dim (`int`): width of the transformer.
        rank (`int`, *optional*): if set, P^S is the sources plus an update of this rank, instead of matrices of its own.
    """

    def __init__(self, dim: int, rank: int | None):
        super().__init__()
        self.rank = rank
        self.query, self.key, self.value = (
            nn.Linear(dim, dim) if rank is None else LowRankUpdate(dim, rank) for _ in range(3)
        )

    def init_from(self, sources: Sequence[nn.Linear]) -> None:
        for projection, source in zip((self.query, self.key, self.value), sources, strict=True):
            if self.rank is None:
                projection.load_state_dict(source.state_dict())
            else:
                projection.reset_parameters()

    def forward(
        self, score_tokens: torch.Tensor, sources: Sequence[nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        projected = (self.query(score_tokens), self.key(score_tokens), self.value(score_tokens))
        if self.rank is None:
            return projected
        return tuple(update + source(score_tokens) for update, source in zip(projected, sources, strict=True))


class ScoreLinear(nn.Linear):
    """
    A projection of which some rows are score tokens and have weights of their own: P^S without an attention processor. The
    names of the base's parameters stay, so that its weights are copied or shared, and its LoRA goes on to the other rows.

    Args:
        base (`nn.Linear`): the projection.
        num_task_tokens (`int`): number of score tokens.
        rank (`int`, *optional*): if set, their weights are the projection's plus an update of this rank.
        width (`int`, *optional*): outputs that have weights of their own, the first ones. Defaults to all.

    Attributes:
        start (`int`): row of the first score token; counted from the end if negative.
    """

    start: int = 0

    def __init__(self, base: nn.Linear, num_task_tokens: int, rank: int | None = None, width: int | None = None):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.num_task_tokens, self.rank, self.width = num_task_tokens, rank, width or base.out_features
        if rank is None:
            self.score_projections = nn.Linear(base.in_features, self.width, base.bias is not None)
        else:
            self.score_projections = LowRankUpdate(base.in_features, rank, self.width)

    def init_from_base(self) -> None:
        if self.rank is None:
            own = self.named_parameters(recurse=False)
            self.score_projections.load_state_dict({name: parameter[: self.width] for name, parameter in own})
        else:
            self.score_projections.reset_parameters()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        start = self.start % hidden_states.shape[1]
        rows = [start, start + self.num_task_tokens]
        before, shared, behind = super().forward(hidden_states).tensor_split(rows, dim=1)
        own = self.score_projections(hidden_states[:, rows[0] : rows[1]])
        if self.rank is not None:
            own = own + shared[..., : self.width]
        return torch.cat([before, torch.cat([own, shared[..., self.width :]], dim=-1), behind], dim=1)


class ScoreHead(nn.Module):
    """Norm, mean over the score tokens and a linear layer: the logit, in float32 whatever the model's precision."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Float32LayerNorm(dim, bias=False)  # the bias of `linear` is the one offset
        self.linear = Readout(dim)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, score_tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(score_tokens).mean(dim=1))


class ScoreTransformerMixin(RewardBackboneMixin):
    """
    Mixed into a diffusers transformer, whose forward then returns the velocity and one logit per sample.

    Attributes:
        base_class (`type`): the transformer without the score stream.
        interface_fields (`tuple[str, ...]`): fields of its configuration that latents and prompts depend on.
        task_tokens (`torch.nn.Parameter` of shape `(1, n_s, text_dim)`): score tokens in the text embeddings' width.
        score_head ([`ScoreHead`]): reads the logit out of the score tokens after the last block.
        without_tokens (`type`, *optional*): the transformer for `num_task_tokens=0`, if there is one.
    """

    without_tokens: type["ScoreTransformerMixin"] | None = None

    def _add_score_stream(self, num_task_tokens: int, text_dim: int, make_block: Callable[[int], nn.Module]) -> None:
        """Put blocks with score tokens in the place of the base's, and the tokens and their head beside them."""
        self.task_tokens = nn.Parameter(torch.empty(1, num_task_tokens, text_dim))
        (name,) = self.blocks_names
        setattr(self, name, nn.ModuleList(make_block(index) for index in range(self.config.num_layers)))
        self.score_head = ScoreHead(self.dim)

    def init_score_stream(self) -> None:
        """
        Set every parameter that the base transformer does not have: score tokens at random, as `nn.Embedding` does, and
        projections at those of the stream that they start from.
        """
        nn.init.normal_(self.task_tokens)
        for block in self.block_list:
            block.score_projections.init_from(block.score_sources)
        self.score_head.reset_parameters()

    @classmethod
    def from_base(
        cls,
        transformer: ModelMixin,
        num_task_tokens: int,
        task_projection_rank: int | None = None,
        share: bool = False,
    ) -> "ScoreTransformerMixin":
        """Copy `transformer`, each weight in its precision, or share its weights, and add the score stream."""
        with torch.device("meta"):
            model = cls(num_task_tokens, task_projection_rank, **cls.base_config(transformer))
        model._fill(transformer, added=set(model.score_parameters()), unused=set(), share=share)
        with torch.no_grad():
            model.init_score_stream()
        return model

    def score_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the base transformer does not have, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if any(part in name for part in ("task_tokens", "score_projections", "score_output", "score_head"))
        }


class TextScoreTransformerMixin(ScoreTransformerMixin):
    """
    Mixed into a diffusers transformer that attends to text and image in one sequence. Score tokens are the first rows of it,
    go through the text's layers, and have projections of their own by [`ScoreLinear`].

    Args:
        num_task_tokens (`int`): number of score tokens n_s, learned in the width `score_width`.
        task_projection_rank (`int`, *optional*): see [`ScoreLinear`].
        transformer_config: arguments of the transformer.

    Attributes:
        score_width (`int`): width in which the score tokens are learned.
    """

    score_width: int

    def __init__(self, num_task_tokens: int, task_projection_rank: int | None = None, **transformer_config):
        super().__init__(**transformer_config)
        self.task_tokens = nn.Parameter(torch.empty(1, num_task_tokens, self.score_width))
        for name in self.score_projection_names():
            base = self.get_submodule(name)
            width = min(
                base.out_features, 3 * self.dim
            )  # q, k and v come first where other layers are fused with them
            self.set_submodule(name, ScoreLinear(base, num_task_tokens, task_projection_rank, width))
        self.score_head = ScoreHead(self.dim)

    @abstractmethod
    def score_projection_names(self) -> list[str]:
        """The query, key and value projections that the score tokens go through."""

    def init_score_stream(self) -> None:
        nn.init.normal_(self.task_tokens)
        self.score_head.reset_parameters()
        for name in self.score_projection_names():
            self.get_submodule(name).init_from_base()

    def score_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The score tokens of each sample, in the precision of `tokens`."""
        return self.task_tokens.expand(len(tokens), -1, -1).to(tokens.dtype)

    @contextmanager
    def score_states(self, block: nn.Module) -> Iterator[list[torch.Tensor]]:
        """A list that holds the score tokens after `block`, once a forward has run through it."""
        states: list[torch.Tensor] = []

        def read(module: nn.Module, args: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            states.append(tokens[:, : self.task_tokens.shape[1]])

        hook = block.register_forward_hook(read)
        try:
            yield states
        finally:
            hook.remove()
