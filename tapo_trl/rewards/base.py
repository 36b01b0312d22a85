# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Reward models that read noisy latents: [`LatentRewardModel`]."""

from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..networks.sharing import base_fingerprint
from ..policies import FAMILIES, FlowPolicy, PromptEmbeddings
from ..policies.base import cast_inputs
from ..policies.loading import family_of_transformer
from .backbones.base import RewardBackboneMixin
from .step_reward import StepRewardModel


class LatentRewardModel(StepRewardModel):
    """
    A reward model of noisy latents on the transformer of a policy. Make one with [`~LatentRewardModel.from_policy`] or
    [`~LatentRewardModel.from_pretrained`]; train it with [`SLRMTrainer`]; rate latents with [`~LatentRewardModel.score`].

    A subclass has the backbone in `transformer`, and further modules and buffers beside it.

    Args:
        transformer_class (`str`): class name of the policy's transformer in diffusers.
        transformer_config (`dict`): arguments that rebuild it.
        base_subfolder (`str`, *optional*, defaults to `"transformer"`): folder of the pipeline that it is in.

    The others are those of [`StepRewardModel`].

    Attributes:
        backbone_kind (`str`): which backbone of [`~policies.loading.Family`], `"score"` or `"features"`.
        unsupported (`str`): message where a family has none.
    """

    backbone_kind: ClassVar[Literal["score", "features"]] = "features"
    unsupported: ClassVar[str]

    transformer: RewardBackboneMixin

    @property
    def backbone(self) -> RewardBackboneMixin:
        return self.transformer

    @classmethod
    def backbone_class(cls, transformer_class: str) -> type[RewardBackboneMixin]:
        """
        What `transformer` is on a policy whose transformer has this class.

        Raises:
            ValueError: if this kind of reward model cannot be made of such a transformer.
        """
        family = family_of_transformer(transformer_class)
        backbone_class = None if family is None else family.backbone_class(cls.backbone_kind)
        if backbone_class is None:
            supported = (f"`{family.transformer}`" for family in FAMILIES if getattr(family, cls.backbone_kind))
            raise ValueError(
                f"{cls.unsupported.format(transformer_class)}. Supported backbones: {', '.join(dict.fromkeys(supported))}."
            )
        return backbone_class

    @classmethod
    def without_weights(cls, policy: FlowPolicy, **config) -> "LatentRewardModel":
        """The model for a policy on the meta device, see [`~LatentRewardModel.from_policy`]."""
        facts = cls._facts(policy)
        backbone_class = cls.backbone_class(policy.transformer_class)
        transformer_config = backbone_class.base_config(policy.transformer)
        with torch.device("meta"):
            return cls(transformer_config=transformer_config, **facts | config)

    @classmethod
    def _facts(cls, policy: FlowPolicy) -> dict[str, Any]:
        if len(policy.experts) > 1:
            raise ValueError(
                f"A {cls.label} starts from one transformer, but `{policy.name_or_path}` has two experts: set `expert` of "
                "`SLRMConfig` to `high` or `low`, by the noise levels that it will score, or pass `policy.only(...)` of it."
            )
        return super()._facts(policy) | {"base_subfolder": policy.subfolder}

    @classmethod
    def from_policy(cls, policy: FlowPolicy, **config) -> "LatentRewardModel":
        """
        Copy the policy's transformer and add to the copy what rates latents.

        Args:
            policy ([`FlowPolicy`]): the policy whose latents will be rated.
            config: fields of the configuration that do not follow from the policy.

        Returns:
            [`LatentRewardModel`]: in evaluation mode, on the transformer's device and in its dtype.

        Raises:
            ValueError: if this kind of reward model cannot be made of the policy's transformer.
        """
        model = cls.without_weights(policy, vae_fingerprint=policy.vae_fingerprint(), **config)
        model.register_to_config(base_fingerprint=base_fingerprint(policy.transformer))
        model._attach_base(policy.transformer)
        return model.eval()

    @property
    def policy_class(self) -> type[FlowPolicy]:
        """The family's policy, which knows what the backbone reads."""
        return family_of_transformer(self.config.transformer_class).policy_class

    def _run_backbone(
        self, latents: torch.Tensor, sigma: float | torch.Tensor, prompts: PromptEmbeddings, **kwargs
    ) -> Any:
        """What the backbone returns for noisy latents."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        inputs = self.policy_class.model_inputs(self.transformer.config, latents, sigma, prompts)
        inputs = cast_inputs(inputs, self.transformer.backbone_dtype, self.policy_class.float32_inputs)
        return self.transformer(**inputs, **kwargs)

    def score(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        velocity_target: torch.Tensor | None = None,
        **prompts: torch.Tensor,
    ) -> torch.Tensor:
        """
        Rate noisy latents. Higher is better; only differences between latents of the same prompt at the same noise level
        have a meaning.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`):
                normalised latents at noise level `sigma`, as the transformer sees them.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): see [`PromptEmbeddings`].
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
                pooled embeddings, for the families that have them.
            velocity_target (`torch.Tensor` of the shape of `latents`, *optional*):
                for [`SLRMModel`] alone: an estimate of x1 - x0, to which the model's own velocity is compared, Eq. 8.
            prompts: further tensors of [`PromptEmbeddings`].

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32. Gradients flow unless you disable them.

        Raises:
            ValueError: if `velocity_target` has another shape than `latents`, or nothing is compared to it.
        """
        if velocity_target is not None and velocity_target.shape != latents.shape:
            raise ValueError(
                f"`velocity_target` has shape {tuple(velocity_target.shape)}, but the latents have shape "
                f"{tuple(latents.shape)}."
            )
        output = self(latents, sigma, prompt_embeds, pooled_prompt_embeds, **prompts)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        return self.score_output(output, sigma, velocity_target)

    def check_compatible(self, policy: FlowPolicy, max_sequence_length: int | None = None) -> None:
        trained_on = {"transformer class": self.config.transformer_class}
        found = {"transformer class": policy.transformer_class}
        if trained_on == found:
            for name in type(self.transformer).interface_fields:
                trained_on[f"transformer's `{name}`"] = _plain(self.config.transformer_config[name])
                found[f"transformer's `{name}`"] = _plain(policy.transformer.config[name])
            trained_on["VAE (fingerprint)"] = self.config.vae_fingerprint
            found["VAE (fingerprint)"] = policy.vae_fingerprint()
        if max_sequence_length is not None:
            trained_on["`max_sequence_length`"] = self.config.max_sequence_length
            found["`max_sequence_length`"] = max_sequence_length
        self._check_same(policy, trained_on, found)

    def forward_inputs(
        self,
        policy: FlowPolicy,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
    ) -> dict[str, torch.Tensor]:
        return {"latents": latents, "sigma": sigma, **prompt_embeds.tensors}

    @classmethod
    def lora_target_modules(cls, policy: FlowPolicy) -> list[str]:
        return policy.lora_target_modules

    def _cast_backbone(self, dtype: torch.dtype) -> None:
        self.transformer.cast_weights(dtype)

    def _load_base(
        self, base_model: str | DiffusionPipeline | FlowPolicy | None, dtype: torch.dtype, **kwargs
    ) -> ModelMixin:
        if base_model is None:
            base_model, kwargs = self.config.base_model_name_or_path, self.base_files() | kwargs
        if base_model == "":
            raise ValueError(
                f"This {self.label} was trained with LoRA on a model in memory, whose name was not known: pass "
                "`base_model`."
            )
        base_class = type(self.transformer).base_class
        if isinstance(base_model, str):
            transformer = base_class.from_pretrained(
                base_model, subfolder=self.config.base_subfolder, dtype=dtype, use_safetensors=True, **kwargs
            )
        else:
            transformer = self.base_network(base_model)
        expected = dict(self.config.transformer_config)
        found = type(self.transformer).base_config(transformer)
        different = [name for name, value in expected.items() if _plain(found[name]) != _plain(value)]
        if different:
            raise ValueError(
                f"`base_model` is not the model that this {self.label} was trained from: its transformer differs in "
                f"{different}."
            )
        return transformer

    def base_network(self, base_model: DiffusionPipeline | FlowPolicy) -> ModelMixin:
        """
        The network of a pipeline or policy that the backbone was made of.

        Raises:
            ValueError: if it has none of this name.
        """
        networks = base_model.experts if isinstance(base_model, FlowPolicy) else base_model.components
        name = self.config.base_subfolder
        if networks.get(name) is None:
            raise ValueError(
                f"This {self.label} was made of the expert `{name}` of `{self.config.base_model_name_or_path}`, which the model "
                f"that it is to be loaded on does not have."
            )
        return networks[name]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
