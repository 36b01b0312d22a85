# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Interface of reward models of samples at a noise level: [`StepRewardModel`]."""

import functools
import inspect
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils import BaseOutput
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from ..files import local_file
from ..method_card import MethodCard
from ..networks.sharing import all_tensors, base_fingerprint, check_base_stays
from ..policies import FlowPolicy, PromptEmbeddings
from ..policies.loading import AUTO, check_arguments, only, pop_dtype
from ..policies.loading import HUB_ARGUMENTS as EVERY_REQUEST


HUB_ARGUMENTS = (*EVERY_REQUEST, "subfolder")
DEFAULT_MAX_SEQUENCE_LENGTH = 256
DEFAULT_RESOLUTION = 512
BASE_ARGUMENTS = tuple(name for name in EVERY_REQUEST if name != "revision")  # the base is in another repository


@dataclass
class RewardOutput(BaseOutput):
    """
    Output of a [`StepRewardModel`].

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`): what the model says of each latent, float32. Higher is better.
    """

    logits: torch.Tensor


class StepRewardModel(ModelMixin, ConfigMixin, ABC):
    """
    A reward model of the states of a sampling trajectory. Make one with [`~StepRewardModel.from_policy`] or
    [`~StepRewardModel.from_pretrained`] and train it with [`SLRMTrainer`]. A [`LatentRewardModel`] reads the noisy latents
    themselves; an [`SPMModel`] reads the image that they would become.

    A subclass has a pretrained network, its backbone, and further modules and buffers beside it.

    Args:
        base_model_name_or_path (`str`): where the policy's pipeline was loaded from, `""` if from memory.
        vae_fingerprint (`str`): [`~FlowPolicy.vae_fingerprint`] of the policy's VAE.
        max_sequence_length (`int`, *optional*, defaults to `256`): length at which prompts were encoded.
        resolution (`int`, *optional*, defaults to `512`): size of the images in training, in pixels.
        height, width, num_frames (`int`, *optional*): size of the samples in training, kept as a record.
        lora (`bool`, *optional*, defaults to `False`): whether the backbone was trained with LoRA.
        base_revision, base_variant (`str`, *optional*): revision and variant of the base that were asked for.
        base_fingerprint (`str`, *optional*): hash of the backbone's weights before the training, `""` if it is not known.
        trained (`bool`, *optional*, defaults to `True`): whether the values above are those of a training.

    Attributes:
        kind (`str`): the word for it, as in `reward_model_type` of [`SLRMConfig`].
        label (`str`): its name in messages.
        trained_part (`str`): what is trained in full beside a LoRA, in messages.
        card ([`~method_card.MethodCard`]): what model cards say about it.
        uses_velocity_target (`bool`): whether the score compares a velocity of its own to a target, see [`SLRMModel`].
        scores_x0_prediction (`bool`):
            whether it reads the decoded one-step estimate, for which the policy predicts a velocity and its VAE decodes.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    trained_part: ClassVar[str]
    card: ClassVar[MethodCard]
    uses_velocity_target: ClassVar[bool] = False
    scores_x0_prediction: ClassVar[bool] = False

    _supports_gradient_checkpointing = True

    @property
    @abstractmethod
    def backbone(self) -> torch.nn.Module:
        """The pretrained network, on which LoRA is put."""

    @classmethod
    @abstractmethod
    def without_weights(cls, policy: FlowPolicy, **config) -> "StepRewardModel":
        """The model for a policy on the meta device, see [`~StepRewardModel.from_policy`]."""

    @classmethod
    @abstractmethod
    def from_policy(cls, policy: FlowPolicy, **config) -> "StepRewardModel":
        """
        A model for the latents of a policy that is untrained, but for its backbone.

        Args:
            policy ([`FlowPolicy`]): the policy whose samples will be rated.
            config: fields of the configuration that do not follow from the policy.

        Returns:
            [`StepRewardModel`]: in evaluation mode.
        """

    @abstractmethod
    def check_compatible(self, policy: FlowPolicy, max_sequence_length: int | None = None) -> None:
        """
        Check that this model can rate the samples of `policy`.

        Args:
            policy ([`FlowPolicy`]): the policy to be trained.
            max_sequence_length (`int`, *optional*):
                length at which its prompts will be encoded. Without meaning for a model that reads them with its own tokenizer.

        Raises:
            ValueError: if it was trained for another one: what it reads of transformer, VAE and prompts must be the same.
        """

    @classmethod
    def _facts(cls, policy: FlowPolicy) -> dict[str, Any]:
        """Fields of the configuration of an untrained model that follow from the policy."""
        return {
            "transformer_class": policy.transformer_class,
            "base_model_name_or_path": policy.name_or_path,
            "base_revision": policy.revision,
            "base_variant": policy.variant,
            "trained": False,
        }

    def _check_same(self, policy: FlowPolicy, trained_on: dict[str, Any], found: dict[str, Any]) -> None:
        """Refuse a policy whose facts, by name, are not those of the training."""
        differences = [
            f"{name}: {value} in the {self.label}, {found[name]} in the policy"
            for name, value in trained_on.items()
            if value != found[name]
        ]
        if differences:
            raise ValueError(
                f"The {self.label} was trained on `{self.config.base_model_name_or_path}` and does not fit the policy "
                f"`{policy.name_or_path}`. {'; '.join(differences)}. Train a reward model on this policy, or change what "
                "is named above."
            )

    @abstractmethod
    def forward_inputs(
        self,
        policy: FlowPolicy,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        prompts: list[str],
        prompt_embeds: PromptEmbeddings,
    ) -> dict[str, torch.Tensor]:
        """
        Arguments of the forward for noisy latents, by name, without gradients.

        Args:
            policy ([`FlowPolicy`]): the base model, whose transformer is frozen; on the device of the latents.
            latents (`torch.Tensor` of shape `(batch_size, *latent_shape)`): noisy latents, float32.
            sigma (`torch.Tensor` of shape `(batch_size,)`): their noise levels in [0, 1], float32.
            prompts (`list[str]`): one prompt per latent, and `prompt_embeds`, their embeddings.
        """

    @classmethod
    @abstractmethod
    def lora_target_modules(cls, policy: FlowPolicy) -> list[str]:
        """Layers of the backbone that get a LoRA unless told otherwise."""

    @abstractmethod
    def _cast_backbone(self, dtype: torch.dtype) -> None:
        """Cast the weights of the backbone, but for those that lose too much."""

    @abstractmethod
    def _attach_base(self, base: torch.nn.Module, share: bool = False) -> None:
        """Make the backbone a copy of its base, or let it share the base's weights, and initialise all else."""

    @abstractmethod
    def _load_base(self, base_model: Any, dtype: torch.dtype, **kwargs) -> torch.nn.Module:
        """The base that a LoRA was trained on: `base_model` or, if `None`, the one that the configuration names."""

    def base_files(self) -> dict[str, str]:
        """Which files of the base's repository the model was made of: arguments of `from_pretrained`."""
        files = {"revision": self.config.base_revision, "variant": self.config.base_variant}
        return {name: value for name, value in files.items() if value is not None}

    def check_base(self, base: torch.nn.Module) -> None:
        """
        Check that a LoRA comes back on the weights that it was trained on, in any precision. Folders without a fingerprint
        are not checked.

        Raises:
            ValueError: if they are others.
        """
        expected = self.config.base_fingerprint
        if expected and base_fingerprint(base) != expected:
            files = "".join(f", {name} `{value}`" for name, value in self.base_files().items())
            raise ValueError(
                f"The base's weights are not those that this {self.label} was trained on, those of "
                f"`{self.config.base_model_name_or_path}`{files}: another revision, a merged LoRA or another fine-tuning? Pass "
                "the right one as `base_model`."
            )

    @abstractmethod
    def trained_in_full(self) -> dict[str, torch.Tensor]:
        """What is trained and saved beside a LoRA of the backbone, and buffers that belong to it, by name."""

    def score_output(
        self, output: RewardOutput, sigma: torch.Tensor, velocity_target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores, of shape `(batch_size,)`, of what the forward returned for latents at `sigma`, see [`~SLRMModel.score`]."""
        if velocity_target is not None:
            raise ValueError(f"A {self.label} predicts no velocity to compare `velocity_target` to: leave it out.")
        return output.logits

    def rollout_target(self, velocity_target: str | None) -> str:
        """
        The inference-time target with which candidates of a rollout are scored, from what the user asks for.

        Raises:
            ValueError: if the model compares no velocities.
        """
        if velocity_target not in (None, "none"):
            raise ValueError(
                f"`velocity_target={velocity_target!r}` is for SLRMs, but the reward model is a {self.label}, which predicts "
                "no velocity: leave it unset."
            )
        return "none"

    @property
    def latents_per_score(self) -> int:
        """Latents that go through the backbone for one score."""
        return 1

    # Training

    def add_lora(self, lora_config: LoraConfig) -> None:
        """
        Freeze the backbone, add LoRA to it, and leave all else trainable in full. What is trained is float32.

        Raises:
            ValueError: if there is a LoRA already, or if `lora_config` reaches into what is trained in full.
        """
        if self.config.lora:
            raise ValueError(
                f"This {self.label} has a LoRA already: drop `peft_config` (`use_peft`) to go on training that one."
            )
        self.backbone.requires_grad_(False)
        inject_adapter_in_model(lora_config, self.backbone)  # `add_adapter` of transformers pins a version of PEFT
        adapted = [name for name in self.trained_in_full() if "lora_" in name]
        if adapted:
            raise ValueError(
                f"`target_modules` of the LoRA must name layers of the backbone only; the {self.trained_part}, which is "
                f"trained in full, has {adapted[0].split('.lora_')[0]!r}."
            )
        self._train_in_full()
        self._freeze_unused()
        cast_training_params(self, dtype=torch.float32)
        self.register_to_config(lora=True)

    def train_whole(self) -> None:
        """Make every weight that the score depends on trainable, in float32."""
        self.float().requires_grad_(True)
        self._freeze_unused()

    def freeze_backbone(self) -> None:
        """Leave nothing trainable but what is beside the backbone."""
        self.backbone.requires_grad_(False)
        self._train_in_full()

    def _freeze_unused(self) -> None:
        """Freeze what no score depends on: DDP expects a gradient of all that is trainable. Nothing, by default."""

    def _train_in_full(self) -> None:
        for tensor in self.trained_in_full().values():
            if isinstance(tensor, torch.nn.Parameter):
                tensor.requires_grad_(True)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What `Trainer` calls if `args.gradient_checkpointing`. Non-reentrant by default."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"{self.label} checkpoints every block, on its device: leave `every_n_layers` and `offload` unset."
            )
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        self.enable_gradient_checkpointing(functools.partial(checkpoint, **kwargs))

    def activation_checkpointing_disable(self) -> None:
        self.disable_gradient_checkpointing()

    # Saving and loading

    @classmethod
    def lora_weights_name(cls) -> str:
        """File of what was trained with a LoRA."""
        return f"{cls.kind}_lora.safetensors"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> None:
        """
        Save `config.json` and the weights. With LoRA, only what was trained: `adapter_config.json` and
        `<kind>_lora.safetensors` (the adapter and what was trained in full); the backbone is then named in `config.json`.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made if it does not exist.
            safe_serialization (`bool`, *optional*, defaults to `True`): must be `True`; nothing is ever pickled.
            state_dict (`dict[str, torch.Tensor]`, *optional*): all weights, where this process has a part of them only.
            kwargs: further arguments of [`~diffusers.ModelMixin.save_pretrained`].
        """
        if not safe_serialization:
            raise ValueError(f"{self.label} is only saved as safetensors: leave `safe_serialization=True`.")
        model = self if state_dict is None else self._copy_with(state_dict)
        if not self.config.lora:
            ModelMixin.save_pretrained(model, save_directory, **kwargs)
            return
        if not kwargs.get("is_main_process", True):
            return
        model.save_config(save_directory)
        model.backbone.peft_config["default"].save_pretrained(save_directory)
        weights = model.trained_in_full() | get_peft_model_state_dict(model.backbone)
        weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        save_file(weights, Path(save_directory) / self.lora_weights_name(), metadata={"format": "pt"})

    def _copy_with(self, state_dict: dict[str, torch.Tensor]) -> "StepRewardModel":
        """A model of the same configuration that has the tensors of `state_dict` for weights."""
        with torch.device("meta"):
            model = type(self).from_config({**self.config, "lora": False})
            if self.config.lora:
                model.add_lora(self.backbone.peft_config["default"])
        model.load_state_dict(state_dict, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: Any = None,
        torch_dtype: torch.dtype | str | None = None,
        share_base: bool = False,
        **kwargs,
    ) -> "StepRewardModel":
        """
        Load a saved reward model of this class, in evaluation mode. [`load_reward_model`] finds the class out.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id.
            base_model (`str`, [`~diffusers.DiffusionPipeline`] or [`FlowPolicy`], *optional*):
                for one that was trained with LoRA, the model it was trained from; of an [`SPMModel`], the CLIP. Defaults to
                the one it names.
            torch_dtype (`torch.dtype` or `str`, *optional*):
                precision of the backbone's weights, such as `"bfloat16"`; `dtype` is another name for it. Defaults to float32,
                or to that of a `base_model` in memory.
            share_base (`bool`, *optional*, defaults to `False`):
                for a [`LatentRewardModel`] that was trained with LoRA, take the frozen weights of `base_model`, which must be
                in memory, themselves in place of copies. They must not be trained.
            kwargs: further arguments of [`~diffusers.ModelMixin.from_pretrained`], such as `revision` or `token`.

        Raises:
            ValueError: if there is a model of another class, or if the base model is needed and unknown, or is another
                than the one of the training, or if there is nothing to share.
        """
        torch_dtype = pop_dtype(kwargs := {"torch_dtype": torch_dtype, **kwargs})
        if torch_dtype == AUTO or isinstance(torch_dtype, dict):
            raise ValueError(f"`torch_dtype={torch_dtype!r}` is for pipelines: name the precision of a reward model.")
        pretrained_model_name_or_path = os.path.expanduser(pretrained_model_name_or_path)
        config = cls.load_config(pretrained_model_name_or_path, **only(kwargs, HUB_ARGUMENTS))
        if config["_class_name"] != cls.__name__:
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds a `{config['_class_name']}`, not a `{cls.__name__}`: load it "
                "with `load_reward_model`, which finds the class out."
            )
        if share_base and (not config["lora"] or base_model is None or isinstance(base_model, str)):
            raise ValueError(
                f"`share_base=True` needs a {cls.label} that was trained with LoRA, whose backbone is that of its base model, "
                f"and that one in memory as `base_model`, but `{pretrained_model_name_or_path}` has `lora: "
                f"{str(config['lora']).lower()}` and `base_model` is {base_model!r}."
            )
        check_arguments(kwargs, ["subfolder", *([] if config["lora"] else inspect.signature(cls.__init__).parameters)])
        shared = set()
        if not config["lora"]:
            model = super().from_pretrained(
                pretrained_model_name_or_path, dtype=torch.float32, **{**kwargs, "use_safetensors": True}
            )
            model._cast_backbone(torch_dtype or torch.float32)
        else:
            with torch.device("meta"):
                model = cls.from_config({**config, "lora": False})
            base = model._load_base(base_model, torch_dtype or torch.float32, **only(kwargs, BASE_ARGUMENTS))
            model.check_base(base)
            model._attach_base(base, share_base)
            shared = {id(tensor) for _, tensor in all_tensors(base)} if share_base else set()
            local = functools.partial(local_file, pretrained_model_name_or_path, **only(kwargs, HUB_ARGUMENTS))
            lora_config = LoraConfig.from_pretrained(os.path.dirname(local("adapter_config.json")))
            if share_base:
                check_base_stays(lora_config, f"the {cls.label} `{pretrained_model_name_or_path}`")
            model.add_lora(lora_config)
            model.load_trained_weights(os.path.dirname(local(cls.lora_weights_name())))
        for _, tensor in all_tensors(model):
            # Tensors mapped from a file start anywhere, and matrix products round by the alignment of their inputs.
            if id(tensor) not in shared:
                tensor.data = tensor.data.clone()
        return model.eval()

    def load_trained_weights(self, folder: str | os.PathLike) -> None:
        """Load weights that [`~StepRewardModel.save_pretrained`] wrote into this model, in place and exactly."""
        folder = Path(folder)
        if self.config.lora:
            weights = load_file(folder / self.lora_weights_name())
            own = self.trained_in_full()
            missing = own.keys() - weights.keys()
            adapter = {name: tensor for name, tensor in weights.items() if name not in own}
            result = set_peft_model_state_dict(self.backbone, adapter)
            with torch.no_grad():
                for name in own.keys() - missing:
                    own[name].copy_(weights[name])
            missing |= {name for name in result.missing_keys if "lora_" in name}
            unexpected = result.unexpected_keys
        else:
            weights = {}
            for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
                weights |= load_file(file)
            missing, unexpected = self.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"The weights in `{folder}` are not those of this {self.label}. Missing: {sorted(missing)[:3]}, unexpected: "
                f"{sorted(unexpected)[:3]}."
            )
