# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
How much the logits of pairs scatter by beta and by the size of the latents D, against docs/beta.md.

    python benchmarks/beta_law.py

Samples pairs with the base, ranked by a reward that is drawn at random, moves the policy by random LoRA weights, and compares the logits
with 2 beta sqrt(k / D) for sampling steps (TAPO), and beta sqrt(2 q rho^2 / D) for velocity errors (online DPO).
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import OnlineDiffusionDPOConfig, OnlineDiffusionDPOTrainer, TAPOConfig, TAPOTrainer, load_policy
from tapo_trl.losses import logit_noise
from tapo_trl.policies import FlowPolicy


BETA = 100.0


def random_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.rand(len(prompts))


def trainer_of(trainer_class, config_class, policy: FlowPolicy, resolution: int, folder: str, **options):
    torch.manual_seed(0)
    args = config_class(
        output_dir=f"{folder}/out",
        cache_dir=f"{folder}/cache",
        resolution=resolution,
        max_sequence_length=1,
        guidance_scale=1.0,
        beta=BETA,
        per_device_train_batch_size=8,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    prompts = Dataset.from_dict({"prompt": ["cat", "tree", "sun", "key", "fish", "hat", "bee", "car"]})
    return trainer_class(policy, random_reward, args, prompts, peft_config=LoraConfig(r=4, lora_alpha=4))


@torch.no_grad()
def measure(trainer, std: float, num_rollouts: int) -> tuple[float, float, float]:
    """
    Pairs of some rollouts by the base, for a policy that was moved by LoRA weights of this size.

    Returns:
        `tuple[float, float, float]`: standard deviation of the logits; KL divergence, or product of the mean squares of the velocity's
        change and of the reference's error; and the standard deviation by the law.
    """
    trainer.model.eval()
    lora = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    num_dims, logits, changes = torch.Size(trainer.latent_shape).numel(), [], []
    for index in range(num_rollouts):
        for parameter in lora:
            parameter.zero_()
        rollout = trainer.rollout(list(trainer.train_dataset), seed_step=index)
        generator = torch.Generator().manual_seed(index)
        for parameter in lora:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for chunk in rollout.transitions(rollout.num_examples, [""] * 8, None, keep_reference=False):
            _, _, metrics = trainer.transition_losses(trainer.model, chunk)
            logits.append(metrics["rewards/margins"])
            changes.append(metrics["kl"] if "kl" in metrics else _change_of_velocity(trainer, chunk))
    change = torch.cat(changes).mean().item()
    is_step = isinstance(trainer, TAPOTrainer)
    law = logit_noise(BETA, num_dims, change) if is_step else BETA * (2 * change / num_dims) ** 0.5
    return torch.cat(logits).std().item(), change, law


def _change_of_velocity(trainer, chunk) -> torch.Tensor:
    noisy, target = chunk.noisy_latents.flatten(0, 1), chunk.velocities.flatten(0, 1)
    arguments = (noisy, chunk.sigmas.repeat(2), chunk.prompt_embeds.repeat(2))
    velocity = trainer.policy.velocity(trainer.model, *arguments)
    with trainer.reference(trainer.model) as reference:
        ref_velocity = trainer.policy.velocity(reference, *arguments)
    change, error = ((v).square().flatten(1).mean(1) for v in (velocity - ref_velocity, ref_velocity - target))
    return change * error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="examples/emoji/pipeline")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--lora_std", type=float, default=0.03, help="Size of the LoRA weights that move the policy.")
    parser.add_argument("--num_rollouts", type=int, default=8)
    args = parser.parse_args()
    steps = {"num_inference_steps": 10, "num_sde_steps": 4, "num_candidates": 2}
    losses = {
        "TAPO": (TAPOTrainer, TAPOConfig, steps),
        "SPO's pairs": (TAPOTrainer, TAPOConfig, steps | {"pairing": "spo", "pair_threshold": [0.0]}),
        "online DPO": (OnlineDiffusionDPOTrainer, OnlineDiffusionDPOConfig, {"num_inference_steps": 10}),
    }
    print("| loss | D | KL, or q rho^2 | standard deviation of the logits | by the law |\n|---|---|---|---|---|")
    for name, (trainer_class, config_class, options) in losses.items():
        for resolution in args.resolutions:
            with tempfile.TemporaryDirectory() as folder:
                policy = load_policy(args.model_name_or_path)
                trainer = trainer_of(trainer_class, config_class, policy, resolution, folder, **options)
                std, change, law = measure(trainer, args.lora_std, args.num_rollouts)
            num_dims = torch.Size(trainer.latent_shape).numel()
            print(f"| {name} | {num_dims} | {change:.2g} | {std:.2f} | {law:.2f} |", flush=True)


if __name__ == "__main__":
    main()
