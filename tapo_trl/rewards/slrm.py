# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Score-based Latent Reward Model (SLRM): a diffusion transformer that rates noisy latents (section 3.2 of the paper)."""

import functools
import itertools
import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin, SD3Transformer2DModel, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.training_utils import cast_training_params
from diffusers.utils import BaseOutput
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from ..policies import FlowPolicy
from .score_stream import ScoreTransformerMixin
from .slrm_sd3 import SD3ScoreTransformer2DModel
from .slrm_wan import WanScoreTransformer3DModel
from .velocity_targets import MIN_SIGMA


ScoreLink = Literal["exp", "softplus"]
TrainingVelocityTarget = Literal["ground_truth", "reference", "none"]

DEFAULT_NUM_TASK_TOKENS = 8
DEFAULT_RHO = math.log(4)
DEFAULT_SCORE_LINK: ScoreLink = "exp"
DEFAULT_VELOCITY_TARGET: TrainingVelocityTarget = "reference"
DEFAULT_MAX_SEQUENCE_LENGTH = 256
DEFAULT_RESOLUTION = 512

LORA_WEIGHTS_NAME = "slrm_lora.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass
class SLRMOutput(BaseOutput):
    """
    Output of [`SLRMModel`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`):
            What the score head says, float32. log S(x_t, c) if `score_link="exp"`.
        velocity (`torch.Tensor` of shape `(batch_size, *latent_shape)`):
            The model's own velocity v(x_t, t, c, s), float32.
    """

    logits: torch.Tensor
    velocity: torch.Tensor | None = None  # never `None`; the default lets `BaseOutput` rebuild itself from a mapping


def score_distance(velocity: torch.Tensor, velocity_target: torch.Tensor) -> torch.Tensor:
    """The squared norm of Eq. 7 as a mean: d = mean over all but the batch of (v - v_target)^2, shape `(batch_size,)`."""
    return (velocity - velocity_target).square().flatten(1).mean(dim=1)


def log_score(logits: torch.Tensor, score_link: ScoreLink) -> torch.Tensor:
    """log S for S = exp(logit) or S = softplus(logit), elementwise."""
    if score_link == "exp":
        return logits
    if score_link == "softplus":
        # log(softplus(z)) tends to z: below -15 the difference is under 2e-7, and the logarithm would underflow.
        bounded = logits.clamp(min=-15.0)
        return F.softplus(bounded).log() + (logits - bounded)
    raise ValueError(f"`score_link` must be 'exp' or 'softplus', got {score_link!r}.")


def enhanced_log_score(
    logits: torch.Tensor,
    distance: torch.Tensor,
    sigma: torch.Tensor,
    rho: float = DEFAULT_RHO,
    score_link: ScoreLink = DEFAULT_SCORE_LINK,
) -> torch.Tensor:
    r"""
    Eq. 7 and 8 in the log domain: \\( \log \hat{S} = \log S - \rho d \\), and log S alone where `sigma < 0.01`.

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`): see [`SLRMOutput`].
        distance (`torch.Tensor` of shape `(batch_size,)`): see [`score_distance`].
        sigma (`torch.Tensor` of shape `(batch_size,)`): noise levels in [0, 1].
        rho (`float`, *optional*, defaults to `ln 4`): scale of the distance.
        score_link (`str`, *optional*, defaults to `"exp"`): how a logit becomes a positive score.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`
    """
    log_scores = log_score(logits, score_link)
    return torch.where(sigma >= MIN_SIGMA, log_scores - rho * distance, log_scores)


def score_transformer_class(transformer_class: str) -> type[ScoreTransformerMixin]:
    """The class that adds the score stream to transformers of this class."""
    if transformer_class == SD3Transformer2DModel.__name__:
        return SD3ScoreTransformer2DModel
    if transformer_class == WanTransformer3DModel.__name__:
        return WanScoreTransformer3DModel
    raise ValueError(
        f"SLRM has no score stream for `{transformer_class}`. Supported backbones: "
        f"`{SD3Transformer2DModel.__name__}` and `{WanTransformer3DModel.__name__}`."
    )


class SLRMModel(ModelMixin, ConfigMixin):
    """
    Score-based Latent Reward Model: a pretrained diffusion transformer with learnable score tokens, whose last states
    give a logit, and whose own velocity keeps it a judge of noisy latents.

    Make one with [`~SLRMModel.from_policy`] or [`~SLRMModel.from_pretrained`]; train it with [`SLRMTrainer`]; rate
    latents with [`~SLRMModel.score`].

    Args:
        transformer_class (`str`): class name of the backbone in diffusers.
        transformer_config (`dict`): arguments that rebuild the backbone.
        base_model_name_or_path (`str`): where the pipeline of the backbone was loaded from, `""` if from memory.
        vae_fingerprint (`str`): [`~FlowPolicy.vae_fingerprint`] of the VAE whose latents it rates.
        num_task_tokens (`int`, *optional*, defaults to `8`): number of score tokens n_s.
        task_projection_rank (`int`, *optional*):
            if set, the projections P^S of Eq. 5 are low-rank updates of the backbone's, else full matrices.
        score_link (`str`, *optional*, defaults to `"exp"`): `"exp"` or `"softplus"`, how a logit becomes S > 0.
        rho (`float`, *optional*, defaults to `ln 4`): weight of the distance in Eq. 7.
        velocity_target (`str`, *optional*, defaults to `"reference"`): v_target in training, kept as a record.
        max_sequence_length (`int`, *optional*, defaults to `256`): length at which prompts were encoded.
        resolution (`int`, *optional*, defaults to `512`): size of the images in training, in pixels.
        height, width, num_frames (`int`, *optional*): size of the videos in training, kept as a record.
        lora (`bool`, *optional*, defaults to `False`): whether the backbone was trained with LoRA.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        transformer_class: str,
        transformer_config: dict[str, Any],
        base_model_name_or_path: str = "",
        vae_fingerprint: str = "",
        num_task_tokens: int = DEFAULT_NUM_TASK_TOKENS,
        task_projection_rank: int | None = None,
        score_link: ScoreLink = DEFAULT_SCORE_LINK,
        rho: float = DEFAULT_RHO,
        velocity_target: TrainingVelocityTarget = DEFAULT_VELOCITY_TARGET,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        resolution: int = DEFAULT_RESOLUTION,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        lora: bool = False,
    ):
        super().__init__()
        score_class = score_transformer_class(transformer_class)
        self.transformer = score_class(num_task_tokens, task_projection_rank, **transformer_config)
        self._no_split_modules = score_class._no_split_modules

    @classmethod
    def from_policy(cls, policy: FlowPolicy, **config) -> "SLRMModel":
        """
        Copy the policy's transformer and add the score stream to the copy.

        Args:
            policy ([`FlowPolicy`]): the policy whose latents will be rated.
            config: `num_task_tokens`, `task_projection_rank`, `score_link`, `rho`, `velocity_target`,
                `max_sequence_length` and the size in training, see [`SLRMModel`].

        Returns:
            [`SLRMModel`]: in evaluation mode, on the transformer's device and in its dtype.

        Raises:
            ValueError: if there is no score stream for the policy's transformer.
        """
        transformer_class = type(policy.transformer).__name__
        score_class = score_transformer_class(transformer_class)
        with torch.device("meta"):
            model = cls(
                transformer_class=transformer_class,
                transformer_config=score_class.base_config(policy.transformer),
                base_model_name_or_path=policy.name_or_path,
                vae_fingerprint=policy.vae_fingerprint(),
                **config,
            )
        model._add_score_stream(policy.transformer)
        return model.eval()

    def _add_score_stream(self, transformer: ModelMixin) -> None:
        self.transformer = type(self.transformer).from_base(
            transformer, self.config.num_task_tokens, self.config.task_projection_rank
        )

    def forward(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        mask_task_tokens: bool = False,
    ) -> SLRMOutput:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents x_sigma.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): see [`PromptEmbeddings`].
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
                pooled embeddings, for the families that have them.
            mask_task_tokens (`bool`, *optional*, defaults to `False`):
                hide the score tokens from the image and the text: the velocity is then that of the backbone alone.

        Returns:
            [`SLRMOutput`]
        """
        dtype = self.transformer.backbone_dtype
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))
        prompt = {"encoder_hidden_states": prompt_embeds.to(dtype)}
        if pooled_prompt_embeds is not None:
            prompt["pooled_projections"] = pooled_prompt_embeds.to(dtype)
        with self._mixed_precision(latents.device, dtype):
            velocity, logits = self.transformer(
                hidden_states=latents.to(dtype), timestep=sigma * 1000, mask_task_tokens=mask_task_tokens, **prompt
            )
        return SLRMOutput(logits=logits.float(), velocity=velocity.float())

    def _mixed_precision(self, device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
        """Autocast where float32 weights in training meet a backbone in half precision outside of a trainer."""
        if self.transformer.task_tokens.dtype == dtype or torch.is_autocast_enabled(device.type):
            return nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    def score(
        self,
        latents: torch.Tensor,
        sigma: float | torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor | None = None,
        velocity_target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Rate noisy latents: Eq. 8 in the log domain, \\( \log \hat{S} = \log S(x_\sigma, c) - \rho d \\) with d the mean
        squared distance between the model's velocity and `velocity_target`. Higher is better; only differences
        between latents of the same prompt at the same noise level have a meaning.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`):
                normalised latents at noise level `sigma`, as the transformer sees them.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): their noise levels in [0, 1].
            prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): see [`PromptEmbeddings`].
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, pooled_dim)`, *optional*):
                pooled embeddings, for the families that have them.
            velocity_target (`torch.Tensor` of the shape of `latents`, *optional*):
                an estimate of x1 - x0. Without it, or where `sigma < 0.01`, the score is log S alone.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: log S_hat, float32. Gradients flow unless you disable them.

        Raises:
            ValueError: if `velocity_target` has another shape than `latents`.
        """
        if velocity_target is not None and velocity_target.shape != latents.shape:
            raise ValueError(
                f"`velocity_target` has shape {tuple(velocity_target.shape)}, but the latents have shape "
                f"{tuple(latents.shape)}."
            )
        output = self(latents, sigma, prompt_embeds, pooled_prompt_embeds)
        if velocity_target is None:
            return log_score(output.logits, self.config.score_link)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        distance = score_distance(output.velocity, velocity_target.float())
        return enhanced_log_score(output.logits, distance, sigma, self.config.rho, self.config.score_link)

    def check_compatible(self, policy: FlowPolicy, max_sequence_length: int | None = None) -> None:
        """
        Check that this SLRM can rate the latents and prompts of `policy`.

        Args:
            policy ([`FlowPolicy`]): the policy to be trained.
            max_sequence_length (`int`, *optional*): length at which its prompts will be encoded.

        Raises:
            ValueError: if backbone, latents, text embeddings or VAE differ from those of the SLRM's training.
        """
        trained_on = {"transformer class": self.config.transformer_class}
        found = {"transformer class": type(policy.transformer).__name__}
        if trained_on == found:
            for name in type(self.transformer).interface_fields:
                trained_on[f"transformer's `{name}`"] = _plain(self.config.transformer_config[name])
                found[f"transformer's `{name}`"] = _plain(policy.transformer.config[name])
            trained_on["VAE (fingerprint)"] = self.config.vae_fingerprint
            found["VAE (fingerprint)"] = policy.vae_fingerprint()
        if max_sequence_length is not None:
            trained_on["`max_sequence_length`"] = self.config.max_sequence_length
            found["`max_sequence_length`"] = max_sequence_length
        differences = [
            f"{name}: {value} in the SLRM, {found[name]} in the policy"
            for name, value in trained_on.items()
            if value != found[name]
        ]
        if differences:
            raise ValueError(
                f"The SLRM was trained on `{self.config.base_model_name_or_path}` and does not fit the policy "
                f"`{policy.name_or_path}`. {'; '.join(differences)}. Train an SLRM on this policy, or change what is "
                "named above."
            )

    # Training

    def add_lora(self, lora_config: LoraConfig) -> None:
        """
        Freeze the backbone, add LoRA to it, and leave the score stream trainable in full. What is trained is float32.

        Raises:
            ValueError: if there is a LoRA already, or if `lora_config` reaches into the score stream.
        """
        if self.config.lora:
            raise ValueError("This SLRM has a LoRA already: drop `peft_config` to go on training that one.")
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(lora_config)
        adapted = [name for name in self.transformer.score_parameters() if "lora_" in name]
        if adapted:
            raise ValueError(
                "`target_modules` of the LoRA must name layers of the backbone only; the score stream, which is "
                f"trained in full, has {adapted[0].split('.lora_')[0]!r}."
            )
        for parameter in self.transformer.score_parameters().values():
            parameter.requires_grad_(True)
        cast_training_params(self.transformer, dtype=torch.float32)
        self.register_to_config(lora=True)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What `Trainer` calls if `args.gradient_checkpointing`. Non-reentrant by default."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "SLRM checkpoints every block, on its device: leave `every_n_layers` and `offload` unset."
            )
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.enable_gradient_checkpointing(functools.partial(checkpoint, **kwargs))

    def activation_checkpointing_disable(self) -> None:
        self.disable_gradient_checkpointing()

    # Saving and loading

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs) -> None:
        """
        Save `config.json` and the weights. With LoRA, only what was trained: `adapter_config.json` and
        `slrm_lora.safetensors` (adapter and score stream); the backbone is then named in `config.json`.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made if it does not exist.
            safe_serialization (`bool`, *optional*, defaults to `True`): must be `True`; nothing is ever pickled.
            kwargs: further arguments of [`~diffusers.ModelMixin.save_pretrained`].
        """
        if not safe_serialization:
            raise ValueError("SLRM is only saved as safetensors: leave `safe_serialization=True`.")
        if not self.config.lora:
            super().save_pretrained(save_directory, **kwargs)
            return
        if not kwargs.get("is_main_process", True):
            return
        self.save_config(save_directory)
        self.transformer.peft_config["default"].save_pretrained(save_directory)
        weights = {name: tensor.detach().contiguous() for name, tensor in self._trained_state_dict().items()}
        save_file(weights, Path(save_directory) / LORA_WEIGHTS_NAME, metadata={"format": "pt"})

    def _trained_state_dict(self) -> dict[str, torch.Tensor]:
        return self.transformer.score_parameters() | get_peft_model_state_dict(self.transformer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: str | DiffusionPipeline | FlowPolicy | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs,
    ) -> "SLRMModel":
        """
        Load a saved SLRM, in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id.
            base_model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`], *optional*):
                for an SLRM trained with LoRA, the model it was trained from. Defaults to the one it names.
            torch_dtype (`torch.dtype`, *optional*): precision of the weights. Defaults to float32.
            kwargs: further arguments of [`~diffusers.ModelMixin.from_pretrained`], such as `revision` or `token`.

        Raises:
            ValueError: if the base model is needed and unknown, or is another than the one of the training.
        """
        config = cls.load_config(pretrained_model_name_or_path, **_only(kwargs, HUB_ARGUMENTS))
        if not config["lora"]:
            model = super().from_pretrained(
                pretrained_model_name_or_path, dtype=torch.float32, **{**kwargs, "use_safetensors": True}
            )
            model.transformer.cast_weights(torch_dtype or torch.float32)
        else:
            with torch.device("meta"):
                model = cls.from_config({**config, "lora": False})
            model._add_score_stream(model._load_base(base_model, torch_dtype or torch.float32))
            local = functools.partial(_local_file, str(pretrained_model_name_or_path), **_only(kwargs, HUB_ARGUMENTS))
            model.add_lora(LoraConfig.from_pretrained(os.path.dirname(local("adapter_config.json"))))
            model.load_trained_weights(os.path.dirname(local(LORA_WEIGHTS_NAME)))
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            # Tensors mapped from a file start anywhere, and matrix products round by the alignment of their inputs.
            tensor.data = tensor.data.clone()
        return model.eval()

    def _load_base(self, base_model: str | DiffusionPipeline | FlowPolicy | None, dtype: torch.dtype) -> ModelMixin:
        base_model = base_model if base_model is not None else self.config.base_model_name_or_path
        if base_model == "":
            raise ValueError(
                "This SLRM was trained with LoRA on a model in memory, whose name was not known: pass `base_model`."
            )
        base_class = type(self.transformer).base_class
        if isinstance(base_model, str):
            transformer = base_class.from_pretrained(
                base_model, subfolder="transformer", dtype=dtype, use_safetensors=True
            )
        else:
            transformer = base_model.transformer
        expected = dict(self.config.transformer_config)
        found = type(self.transformer).base_config(transformer)
        different = [name for name, value in expected.items() if _plain(found[name]) != _plain(value)]
        if different:
            raise ValueError(
                f"`base_model` is not the model that this SLRM was trained from: its transformer differs in {different}."
            )
        return transformer

    def load_trained_weights(self, folder: str | os.PathLike) -> None:
        """Load weights that [`~SLRMModel.save_pretrained`] wrote into this model, in place and exactly."""
        folder = Path(folder)
        if self.config.lora:
            weights = load_file(folder / LORA_WEIGHTS_NAME)
            score_names = self.transformer.score_parameters().keys()
            missing = score_names - weights.keys()
            adapter = {name: tensor for name, tensor in weights.items() if name not in score_names}
            result = set_peft_model_state_dict(self.transformer, adapter)
            self.transformer.load_state_dict({name: weights[name] for name in score_names - missing}, strict=False)
            missing |= {name for name in result.missing_keys if "lora_" in name}
            unexpected = result.unexpected_keys
        else:
            weights = {}
            for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
                weights |= load_file(file)
            missing, unexpected = self.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"The weights in `{folder}` are not those of this SLRM. Missing: {sorted(missing)[:3]}, unexpected: "
                f"{sorted(unexpected)[:3]}."
            )


def _only(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in names}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _local_file(name_or_path: str, filename: str, subfolder: str | None = None, **hub_arguments) -> str:
    if os.path.isdir(name_or_path):
        return os.path.join(name_or_path, subfolder or "", filename)
    return hf_hub_download(name_or_path, filename, subfolder=subfolder, **hub_arguments)
