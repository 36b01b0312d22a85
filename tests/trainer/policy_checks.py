# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What must hold for every trainer of a policy."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from tapo_trl.policies import SD3Policy
from tests.testing_utils import tiny_sd3_pipeline


def trainable(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def check_lora_loads_into_diffusers_exactly(trainer, prompt: str, base_folder: Path) -> None:
    """After a training of the tiny SD3 pipeline."""
    trainer.save_model()
    tiny_sd3_pipeline().save_pretrained(base_folder)
    loaded = StableDiffusion3Pipeline.from_pretrained(base_folder, text_encoder_3=None, tokenizer_3=None)
    loaded.load_lora_weights(trainer.args.output_dir)
    inputs = (torch.randn(1, 4, 8, 8), 0.6, trainer.prompt_cache.load([prompt]))
    expected = trainer.policy.velocity(trainer.model.eval(), *inputs)
    base = SD3Policy(tiny_sd3_pipeline())
    assert torch.equal(SD3Policy(loaded).velocity(loaded.transformer, *inputs), expected)
    assert not torch.equal(base.velocity(base.transformer, *inputs), expected)


def check_full_fine_tuning_is_saved_as_a_transformer(trainer) -> None:
    trainer.save_model()
    loaded = type(trainer.model).from_pretrained(f"{trainer.args.output_dir}/transformer")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def check_resume_is_exact(make_trainer: Callable, tmp_path: Path, **kwargs) -> None:
    kwargs |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(tmp_path / "a", **kwargs)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    for name, value in trainable(resumed).items():
        assert torch.equal(value, trainable(unbroken)[name]), name
