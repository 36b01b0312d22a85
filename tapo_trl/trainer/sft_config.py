# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass

from trl.trainer.base_config import _BaseConfig

from ..field_types import option
from ..runs.checks import check_without_effect
from ..schedulers.noise_levels import TIMESTEP_SAMPLINGS
from .base_config import PolicyConfig
from .preference_config import MediaDataConfig


@dataclass
class DiffusionSFTConfig(MediaDataConfig, PolicyConfig, _BaseConfig):
    r"""
    Configuration class for the [`DiffusionSFTTrainer`].

    This class includes only the parameters that are specific to supervised fine-tuning. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`]. Further parameters are those of
    [`MediaDataConfig`], [`PolicyConfig`] and [`DiffusionConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the noise level before the pipeline's shift: `"logit_normal"`, as in the training of SD3, or
            `"uniform"`.
        prompt_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that `negative_prompt` takes the place of a prompt, so that the unconditional half of
            classifier-free guidance is trained, too. 0.1 is usual.
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    timestep_sampling: str = option(
        "Distribution of the noise level before the pipeline's shift.",
        "logit_normal",
        choices=list(TIMESTEP_SAMPLINGS),
    )
    prompt_dropout: float = option("Probability that `negative_prompt` takes the place of a prompt.", 0.0)

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(timestep_sampling=TIMESTEP_SAMPLINGS)
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"`prompt_dropout` must be in [0, 1), got {self.prompt_dropout}.")
        check_without_effect(self, ["self_check"], "in supervised fine-tuning, which has no reference")
