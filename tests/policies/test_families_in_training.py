# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What a training of each image family leaves behind: checkpoints to go on from, and a card whose code runs."""

import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

import tapo_trl
from tapo_trl.policies import FAMILIES, load_policy
from tests.data.preference_pairs import latent_pairs
from tests.policies.test_families import LENGTH, NEGATIVE, PROMPTS, lora_model, redness, train
from tests.testing_utils import save_tiny_clip


pytestmark = pytest.mark.slow

LORA_FILE = "pytorch_lora_weights.safetensors"
# The last block's text goes nowhere: what makes it has no gradient, and its queries have one of zero
NO_GRADIENT = {
    "StableDiffusion3Pipeline": r"transformer_blocks\.\d+\.attn\.add_q_proj",
    "QwenImagePipeline": r"transformer_blocks\.1\.attn\.(to_add_out|add_q_proj)",
}


IN_CI = ("StableDiffusion3Pipeline", "QwenImagePipeline")
IMAGES = [
    pytest.param(family, id=family.pipeline, marks=() if family.pipeline in IN_CI else pytest.mark.exhaustive)
    for family in FAMILIES
    if family.policy_class.modality == "image"
]


@pytest.fixture(scope="module", params=IMAGES)
def world(request):
    family = request.param
    policy = load_policy(family.policy_class.tiny())
    return SimpleNamespace(family=family, policy=policy, shape=policy.latent_shape(32, 32))


def test_every_adapter_gets_a_gradient(world):
    policy = load_policy(world.family.policy_class.tiny())
    model = lora_model(policy)
    torch.manual_seed(0)
    prompts, negative = policy.encode_prompts(PROMPTS, LENGTH), policy.encode_prompts([NEGATIVE], LENGTH)
    inputs = torch.randn(2, *world.shape), torch.tensor([0.3, 0.9]), prompts, negative, 3.0
    policy.velocity(model, *inputs).square().sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    without = {
        name.split("base_model.model.")[1] for name, p in adapters.items() if p.grad is None or not p.grad.any()
    }
    exempt = NO_GRADIENT.get(world.family.pipeline)
    if exempt is None:
        assert without == set()
    else:
        last = len(policy.transformer.transformer_blocks) - 1
        assert without and all(re.match(exempt, name) and f".{last}." in name for name in without)


# One update of a method, and its options
RUNS = {
    "TAPO": {"num_sde_steps": 2, "num_candidates": 2},
    "FlowGRPO": {"num_generations": 2},
    "OnlineDiffusionDPO": {},
    "DiffusionDPO": {},
    "SLRM": {"num_task_tokens": 2},
}


@pytest.mark.parametrize("method", RUNS)
def test_resumes_bit_for_bit(world, tmp_path, method):
    online = method in ("TAPO", "FlowGRPO", "OnlineDiffusionDPO")
    data = Dataset.from_dict({"prompt": PROMPTS * 2}) if online else latent_pairs(4, world.shape)
    rewards = [redness] if online else []
    saved = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}

    def run(folder, **options):
        trainer, _ = train(method, world.family, world, folder, data, rewards, **RUNS[method] | saved | options)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, trainer

    expected, _ = run(tmp_path / "whole", max_steps=2)
    _, stopped = run(tmp_path / "parts", max_steps=1)
    args = stopped.args
    args.max_steps = 2
    again = type(stopped)(
        world.family.policy_class.tiny(),
        *rewards,
        args=args,
        train_dataset=data,
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=world.policy.lora_target_modules),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))
    found = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert again.state.global_step == 2 and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_code_of_the_card_runs(world, tmp_path, monkeypatch):
    """In the size of a test, and with the pipeline's folder as the base."""
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer, _ = train("TAPO", world.family, world, tmp_path, data, [redness], **RUNS["TAPO"])
    trainer.save_model()
    trainer.create_model_card()
    world.policy.pipeline.save_pretrained(tmp_path / "base")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    absent = "".join(
        f", {part}=None" for part in ("text_encoder_3", "tokenizer_3") if part in world.policy.pipeline.components
    )
    code = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{tmp_path / "base"}"{absent}', code)
    code = re.sub(r'load_lora_weights\("[^"]*"', f'load_lora_weights("{tmp_path}"', code)
    code = code.replace("generator=", "height=32, width=32, num_inference_steps=2, generator=")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32) and (tmp_path / "lighthouse.png").is_file()
    loaded = dict(names["pipeline"].transformer.named_parameters())
    for name, tensor in load_file(tmp_path / LORA_FILE).items():
        own = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        torch.testing.assert_close(loaded[own].float(), tensor.to(loaded[own].dtype).float())


def test_lrm(world, tmp_path):
    """SLRM and DiNa-LRM are in `test_families.py`."""
    arguments = "SLRM", world.family, world, tmp_path, latent_pairs(2, world.shape)
    if "pooled_prompt_embeds" not in world.policy.prompt_shapes(LENGTH):
        with pytest.raises(ValueError, match="pooled prompt embeddings"):
            train(*arguments, reward_model_type="lrm")
        return
    trainer, _ = train(*arguments, reward_model_type="lrm")
    trainer.save_model()
    reward = tapo_trl.rewards.load_reward_model(str(tmp_path), base_model=world.policy.pipeline)
    prompts = world.policy.encode_prompts(PROMPTS, LENGTH)
    scores = reward.score(torch.randn(2, *world.shape), torch.tensor([0.3, 0.9]), **prompts.tensors)
    assert scores.isfinite().all() and scores.std() > 0


def test_spm(world, tmp_path):
    model = tapo_trl.SPMModel.from_policy(world.policy, save_tiny_clip(tmp_path / "clip"))
    prompts, sigma = world.policy.encode_prompts(PROMPTS, LENGTH), torch.tensor([0.3, 0.9])
    inputs = model.forward_inputs(world.policy, torch.randn(2, *world.shape), sigma, PROMPTS, prompts)
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in model.trained_in_full().values())
