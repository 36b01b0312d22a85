# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from torch.distributions import Normal

from tapo_trl import FlowGRPOConfig, FlowGRPOTrainer, GradientShareCallback
from tapo_trl.callbacks.gradient_share import gradient_share_curves
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline
from tests.testing_utils import tiny_wan_pipeline
from tests.trainer.policy_checks import (
    check_full_fine_tuning_is_saved_as_a_transformer,
    check_lora_loads_into_diffusers_exactly,
    check_resume_is_exact,
    trainable,
)
from tests.trainer.test_tapo_trainer import (
    PROMPTS,
    GradientRecorder,
    RolloutRecorder,
    make_lora,
    make_slrm,
    randomize_adapter,
    redness,
)


def make_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_inference_steps": 4,
        "num_generations": 3,
        "guidance_scale": 2.0,
        "per_device_train_batch_size": 2,
        "transition_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return FlowGRPOConfig(**defaults | kwargs)


def make_trainer(tmp_path, reward=redness, peft=True, callbacks=None, prompts=PROMPTS, eval_prompts=None, **kwargs):
    torch.manual_seed(0)
    return FlowGRPOTrainer(
        make_pipeline(),
        reward,
        make_args(tmp_path, **kwargs),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=None if eval_prompts is None else Dataset.from_dict({"prompt": eval_prompts}),
        callbacks=callbacks,
        peft_config=make_lora() if peft else None,
    )


def rows(prompts=PROMPTS):
    return [{"prompt": prompt, "tapo_row": row} for row, prompt in enumerate(prompts)]


class Reference:
    """Log-densities of the steps of a rollout in float64, one at a time, by `torch.distributions`."""

    def __init__(self, trainer, groups):
        self.args, self.groups, self.sigmas = trainer.args, groups, trainer.scheduler.sigmas.double()
        self.negative = trainer.negative_prompt_embeds
        self.model = copy.deepcopy(trainer.model).double()
        self.model.forward = type(self.model).forward.__get__(self.model)

    def distribution(self, level, row):
        """Of x' under the policy."""
        index = self.groups.step_indices[level].item()
        x, t, t_next = self.groups.latents[level, row].double(), self.sigmas[index], self.sigmas[index + 1]
        outputs = []
        for embeds, i in ((self.negative, 0), (self.groups.prompt_embeds, row)):
            outputs.append(
                self.model(
                    hidden_states=x[None],
                    timestep=(t * 1000)[None],
                    encoder_hidden_states=embeds.prompt_embeds[i : i + 1].double(),
                    pooled_projections=embeds.pooled_prompt_embeds[i : i + 1].double(),
                    return_dict=False,
                )[0][0]
            )
        v = outputs[0] + (self.args.guidance_scale if self.args.train_cfg else 1) * (outputs[1] - outputs[0])
        s = self.args.noise_level * (t / (1 - self.sigmas[max(index, 1)])).sqrt()
        mean = x - (v + s**2 / (2 * t) * (x + (1 - t) * v)) * (t - t_next)
        return Normal(mean, s * (t - t_next).sqrt())

    def examples(self):
        """Advantage, x', its distribution under the policy, and that of the sampling policy, of every step."""
        for level in range(len(self.groups.step_indices)):
            for row in range(self.groups.latents.shape[1]):
                k, b = divmod(row, len(self.groups.rewards))
                now = self.distribution(level, row)
                old = Normal(self.groups.means[level, row].double(), now.scale)
                r = self.groups.rewards[b].double()
                advantage = (r[k] - r.mean()) / (r.std() + 1e-4)
                yield advantage, self.groups.next_latents[level, row].double(), now, old, (level, row)

    def surrogate(self, advantage, x, now, old, position):
        """By the noise of the step and the difference of the means, where the trainer starts from log-ratios."""
        args, ratio = self.args, (now.log_prob(x).mean() - old.log_prob(x).mean()).exp()
        if args.loss_type == "flow_dppo":
            divergence = torch.distributions.kl_divergence(old, now).mean().item()
            moves_away = (advantage > 0) == (ratio > 1)
            return 0.0 * ratio if moves_away and divergence > args.divergence_threshold else ratio * advantage
        scale = 1.0
        if args.loss_type == "grpo_guard":
            index = self.groups.step_indices[position[0]].item()
            scale = 1 / (self.sigmas[index] - self.sigmas[index + 1])
            ratio = ((x - old.loc) / old.scale * (now.loc - old.loc)).mean().exp()
        low, high = 1 - args.epsilon, 1 + args.epsilon
        return scale * min(ratio * advantage, ratio.clamp(low, high) * advantage)

    def loss(self):
        losses = []
        for advantage, x, now, old, position in self.examples():
            surrogate = self.surrogate(advantage, x, now, old, position)
            with self.model.disable_adapter(), torch.no_grad():
                ref = self.distribution(*position)
            kl = torch.distributions.kl_divergence(now, ref).mean()
            losses.append(-surrogate + self.args.beta * kl)
        return torch.stack(losses).mean()


class TestTraining:
    @pytest.mark.parametrize("peft", [True, False])
    def test_only_what_is_trained_changes(self, tmp_path, peft):
        trainer = make_trainer(tmp_path, peft=peft)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and (not peft or all("lora_" in name for name in changed))
        if not peft:
            reference = dict(trainer.ref_model.named_parameters())
            assert all(torch.equal(reference[name], value) for name, value in before.items())

    def test_steps_are_all_but_the_last_one_by_default(self, tmp_path):
        assert make_args(tmp_path).step_indices == [0, 1, 2]
        assert FlowGRPOConfig(str(tmp_path), use_cpu=True, bf16=False).step_indices == list(range(9))
        assert make_args(tmp_path, num_sde_steps=2, t_init=1).step_indices == [1, 3]

    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [1, -1])
    def test_learns_a_preference_and_its_opposite(self, tmp_path, sign):
        """On prompts and noise that training did not see."""

        def brightness(images, prompts):
            return sign * images.mean((1, 2, 3))

        held_out = ["bee", "ant"] * 4
        trainer = make_trainer(
            tmp_path, brightness, eval_prompts=["bee", "ant"], max_steps=12, learning_rate=3e-2, num_generations=6
        )
        before = trainer.generate(held_out, seed=100).mean()
        trainer.train()
        assert sign * (trainer.generate(held_out, seed=100).mean() - before) > 2e-4

    def test_latent_and_pixel_rewards_are_weighted_and_logged(self, tmp_path):
        trainer = make_trainer(tmp_path, [make_slrm(), redness], reward_weights=[1.0, 2.0], max_steps=1)
        trainer.train()
        logs = trainer.state.log_history[0]
        expected = logs["rewards/slrm/mean"] + 2 * logs["rewards/redness/mean"]
        assert logs["reward"] == pytest.approx(expected, abs=1e-5)
        assert logs["reward_std"] > 0 and logs["frac_reward_zero_std"] == 0 and logs["advantages"] > 0.5

    def test_groups_that_are_rewarded_alike_leave_the_policy_alone(self, tmp_path):
        def constant(images, prompts):
            return torch.full((len(prompts),), 0.1)

        recorder = GradientRecorder()
        trainer = make_trainer(tmp_path, constant, callbacks=[recorder], max_steps=1)
        trainer.train()
        assert all((gradient == 0).all() for gradient in recorder.gradients.values())
        logs = trainer.state.log_history[0]
        assert logs["frac_reward_zero_std"] == 1 and logs["advantages"] == logs["loss"] == 0

    def test_without_a_kl_term_the_reference_is_not_asked(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, beta=0.0)
        monkeypatch.setattr(trainer, "reference_velocity", None)
        trainer.train()
        assert "kl" not in trainer.state.log_history[0]

    def test_videos(self, tmp_path):
        def brightness(videos, prompts):
            assert videos.shape[1:] == (3, 5, 32, 32)
            return videos.mean((1, 2, 3, 4))

        args = make_args(tmp_path, max_steps=1, num_frames=5, max_sequence_length=4)
        dataset = Dataset.from_dict({"prompt": PROMPTS})
        trainer = FlowGRPOTrainer(
            tiny_wan_pipeline(), brightness, args, train_dataset=dataset, peft_config=make_lora()
        )
        trainer.train()
        assert trainer.state.log_history[0]["ratio"] == pytest.approx(1, abs=1e-6)

    def test_share_of_each_step_in_the_gradient(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[GradientShareCallback(1)])
        trainer.train()
        plain = make_trainer(tmp_path / "plain")
        plain.train()
        curves = gradient_share_curves(trainer.state.log_history)
        assert list(curves) == ["step_00", "step_01", "step_02"]
        assert sum(curve[1] for curve in curves.values()) == pytest.approx(1, abs=1e-6)
        assert all(torch.equal(value, trainable(plain)[name]) for name, value in trainable(trainer).items())


class TestRatio:
    @pytest.mark.slow
    @pytest.mark.parametrize("precision", [{}, {"bf16": True}])
    @pytest.mark.parametrize("transition_batch_size", [1, 4, 100])
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
    def test_is_1_before_the_first_update(self, tmp_path, precision, transition_batch_size, guidance_scale):
        """
        The mean of a step comes from a batch of another size in the rollout than in the loss. On a CPU both kinds of kernel
        give the same up to the rounding of float32, in bfloat16, too; kernels of an accelerator need not.
        """
        trainer = make_trainer(
            tmp_path,
            transition_batch_size=transition_batch_size,
            guidance_scale=guidance_scale,
            per_device_train_batch_size=4,
            max_steps=1,
            self_check=False,  # which would find that it does not start from the reference
            **precision,
        )
        randomize_adapter(trainer)  # any policy agrees with itself
        ratios = []
        losses = trainer.transition_losses

        def record(*args):
            ratios.append(losses(*args)[2]["ratio"])
            return losses(*args)

        trainer.transition_losses = record
        trainer.train()
        torch.testing.assert_close(torch.cat(ratios), torch.ones(3 * 4 * 3), rtol=0, atol=1e-6)

    def test_without_guidance_is_that_of_the_noise_that_was_sampled(self, tmp_path):
        """Steps are relative to a mean that guidance has moved; the trajectories are those of the guided policy."""
        trainer = make_trainer(tmp_path, train_cfg=False, self_check=False)
        randomize_adapter(trainer, std=0.5)
        groups = trainer.rollout(rows()[:2], seed_step=0)
        metrics = trainer.transition_losses(trainer.model, next(groups.transitions(100)))[2]
        torch.testing.assert_close(metrics["ratio"], torch.ones(3 * 2 * 3), rtol=0, atol=1e-6)
        reference = Reference(trainer, groups)
        trainer.args.train_cfg = True
        with torch.no_grad():
            guided = torch.stack(
                [torch.stack([reference.distribution(step, row).loc for row in range(6)]) for step in (0, 1)]
            )
        sampled, kept = groups.latents[1:] - guided, groups.next_latents[:2] - groups.means[:2]
        torch.testing.assert_close(sampled.float(), kept, rtol=0, atol=1e-5)
        assert (groups.latents[1:] - groups.next_latents[:2]).abs().max() > 1e-2
        whole = make_trainer(tmp_path / "whole", self_check=False)
        randomize_adapter(whole, std=0.5)
        assert torch.equal(whole.rollout(rows()[:2], seed_step=0).final_latents, groups.final_latents)

    @pytest.mark.slow
    def test_leaves_1_when_a_rollout_is_used_again(self, tmp_path):
        trainer = make_trainer(tmp_path, num_iterations=2, max_steps=4, learning_rate=3e-2, epsilon=1e-5)
        trainer.train()
        logs = trainer.state.log_history[:4]
        assert [log["clip_ratio/region_mean"] > 0 for log in logs] == [False, True, False, True]
        assert [abs(log["step_02/ratio"] - 1) > 1e-6 for log in logs] == [False, True, False, True]

    def test_self_check_finds_what_is_not_the_policy_that_sampled(self, tmp_path):
        class Drift(RolloutRecorder):
            """Changes the policy between its rollout and its loss."""

            def __init__(self, trainer):
                super().__init__(trainer)
                generate = trainer.rollout

                def drift(*args, **kwargs):
                    groups = generate(*args, **kwargs)
                    randomize_adapter(trainer, std=1.0)
                    return groups

                trainer.rollout = drift

        trainer = make_trainer(tmp_path)
        Drift(trainer)
        with pytest.raises(RuntimeError, match="not 1 up to `epsilon=0.001`"):
            trainer.train()
        trainer = make_trainer(tmp_path, self_check=False)
        Drift(trainer)
        trainer.train()


class TestGradient:
    def run(self, tmp_path, **kwargs):
        recorder = GradientRecorder()
        arguments = {"max_steps": 1, "max_grad_norm": 0.0, "activation_checkpointing": False}
        trainer = make_trainer(tmp_path, callbacks=[recorder], **arguments | kwargs)
        rollouts = RolloutRecorder(trainer)
        initial = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        trainer.model.load_state_dict(initial)
        return trainer, rollouts.pairs, recorder.gradients

    def assert_close(self, gradients, expected):
        for (name, gradient), value in zip(gradients.items(), expected, strict=True):
            scale = value.abs().max().item()
            torch.testing.assert_close(gradient.double(), value, rtol=2e-3, atol=2e-3 * scale + 1e-9, msg=name)

    @pytest.mark.parametrize("train_cfg", [True, False])
    def test_is_the_policy_gradient_at_first(self, tmp_path, train_cfg):
        """Of the mean of advantage times log-density: no ratio, no clipping, and the KL term is at its minimum."""
        trainer, (groups,), gradients = self.run(tmp_path, train_cfg=train_cfg)
        reference = Reference(trainer, groups)
        objective = torch.stack([advantage * now.log_prob(x).mean() for advantage, x, now, *_ in reference.examples()])
        parameters = [p for p in reference.model.parameters() if p.requires_grad]
        self.assert_close(gradients, torch.autograd.grad(-objective.mean(), parameters))

    @pytest.mark.parametrize(
        "options",
        [
            {"epsilon": 0.9, "beta": 5.0},
            {"epsilon": 1e-3, "beta": 0.1},
            {"epsilon": 0.9, "beta": 5.0, "train_cfg": False},
            {"loss_type": "grpo_guard", "epsilon": 0.9, "beta": 0.1},
            {"loss_type": "grpo_guard", "epsilon": 1e-4, "beta": 0.1},
            {"loss_type": "flow_dppo", "divergence_threshold": 1e3, "beta": 0.1},
            {"loss_type": "flow_dppo", "divergence_threshold": 1e-5, "beta": 0.1},
        ],
    )
    def test_equals_an_independent_float64_reference_off_policy(self, tmp_path, options):
        trainer = make_trainer(tmp_path, self_check=False, **options)
        groups = trainer.rollout(rows()[:2], seed_step=0)
        randomize_adapter(trainer, std=0.5)
        (chunk,) = groups.transitions(100)
        loss = trainer.compute_loss(trainer.model, chunk)
        (clipped,) = [v.mean() for v in trainer._metrics["train"]["clip_ratio/region_mean"]]
        nothing = options.get("epsilon") == 0.9 or options.get("divergence_threshold") == 1e3
        assert (clipped == 0) == nothing and clipped < 1
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
        reference = Reference(trainer, groups)
        expected = reference.loss()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
        parameters = [p for p in reference.model.parameters() if p.requires_grad]
        self.assert_close(gradients, torch.autograd.grad(expected, parameters))

    @pytest.mark.parametrize("kwargs", [{"transition_batch_size": 1}, {"transition_batch_size": 5}])
    def test_chunking_does_not_matter(self, tmp_path, kwargs):
        _, _, expected = self.run(tmp_path / "a", transition_batch_size=100)
        _, _, gradients = self.run(tmp_path / "b", **kwargs)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())

    @pytest.mark.slow
    def test_accumulation_equals_a_larger_batch(self, tmp_path):
        _, _, expected = self.run(tmp_path / "a", per_device_train_batch_size=4)
        _, _, gradients = self.run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max())


class TestWindow:
    def test_slides_over_the_stochastic_steps(self, tmp_path):
        options = {"window_size": 2, "window_interval": 2, "max_steps": 6, "num_inference_steps": 5}
        trainer = make_trainer(tmp_path, **options)
        rollouts = RolloutRecorder(trainer)
        trainer.train()
        steps = [groups.step_indices.tolist() for groups in rollouts.pairs]
        assert steps == [[0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3]]
        assert all(groups.latents.shape[:2] == (2, 6) for groups in rollouts.pairs)
        assert "step_03/ratio" in trainer.state.log_history[4] and "step_00/ratio" not in trainer.state.log_history[4]

    def test_other_steps_follow_the_ode(self, tmp_path):
        trainer = make_trainer(tmp_path, window_size=1, num_inference_steps=5, guidance_scale=1.0)
        trainer.state.global_step = 25  # one move: step 1
        groups = trainer.rollout(rows()[:2])
        assert groups.step_indices.tolist() == [1]
        latents = groups.next_latents[0]
        for index in (2, 3, 4):
            sigma, sigma_next = trainer.scheduler.sigmas[index : index + 2]
            velocity = trainer.policy.velocity(trainer.model, latents, sigma, groups.prompt_embeds)
            latents = latents + (sigma_next - sigma) * velocity
        torch.testing.assert_close(groups.final_latents.flatten(0, 1), latents, rtol=1e-4, atol=1e-5)

    def test_a_group_that_branches_at_one_step(self, tmp_path):
        """From the same noise, a window of one step: the start of that step is the same for all, and every step has its turn."""
        options = {"window_size": 1, "window_interval": 1, "window_strategy": "cyclic", "shared_noise": True}
        trainer = make_trainer(tmp_path, num_inference_steps=4, max_steps=4, **options)
        rollouts = RolloutRecorder(trainer)
        trainer.train()  # with `self_check`: ratios are 1 at the start
        assert [groups.step_indices.tolist() for groups in rollouts.pairs] == [[0], [1], [2], [0]]
        for groups in rollouts.pairs:
            starts, ends = (x[0].unflatten(0, (-1, 2)) for x in (groups.latents, groups.next_latents))
            assert len(starts) == trainer.args.num_generations
            assert torch.equal(starts, starts[:1].expand_as(starts)) and not torch.equal(ends[0], ends[1])
            assert groups.advantages.any()

    def test_an_evaluation_uses_the_first_window(self, tmp_path):
        options = {"window_size": 1, "window_interval": 1, "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path, max_steps=3, eval_prompts=["bee", "ant"], **options)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "eval_reward" in log]
        assert len(logs) == 3 and all("eval_step_00/ratio" in log and "eval_step_01/ratio" not in log for log in logs)

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["cyclic", "random"])
    def test_resume_is_exact(self, tmp_path, strategy):
        options = {"window_strategy": strategy} | ({"window_interval": 1} if strategy == "cyclic" else {})
        check_resume_is_exact(make_trainer, tmp_path, window_size=1, **options)

    @pytest.mark.slow
    def test_share_of_each_step_in_the_gradient(self, tmp_path):
        callback = GradientShareCallback(1)
        trainer = make_trainer(
            tmp_path, callbacks=[callback], window_size=2, window_interval=1, num_iterations=2, max_steps=4
        )
        trainer.train()
        found = [{key for key in log if key.startswith("gradient_share")} for log in trainer.state.log_history[:4]]
        first, second = ({f"gradient_share/step_0{step}" for step in steps} for steps in ((0, 1), (1, 2)))
        assert found == [first, first, second, second]


class TestRollouts:
    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    def test_advantages_are_those_of_the_rewards(self, tmp_path, scale_rewards):
        trainer = make_trainer(tmp_path, scale_rewards=scale_rewards)
        groups = trainer.rollout(rows(), seed_step=0)
        deviations = groups.rewards - groups.rewards.mean(1, keepdim=True)
        std = {"group": groups.rewards.std(1, keepdim=True), "batch": groups.rewards.std(), "none": 1 - 1e-4}
        torch.testing.assert_close(groups.advantages, deviations / (std[scale_rewards] + 1e-4))

    @pytest.mark.slow
    def test_evaluation_is_repeatable_and_does_not_disturb_training(self, tmp_path):
        plain = make_trainer(tmp_path / "a", max_steps=3)
        plain.train()
        watched = make_trainer(
            tmp_path / "b", max_steps=3, eval_prompts=["bee", "ant", "fly"], eval_strategy="steps", eval_steps=1
        )
        watched.train()
        for name, value in trainable(plain).items():
            # Other memory is in use: some processors round the last bit otherwise. Other noise would show in the first digits.
            torch.testing.assert_close(trainable(watched)[name], value, rtol=0, atol=1e-6)
        first, second = watched.evaluate(), watched.evaluate()
        for name in ("eval_loss", "eval_reward", "eval_kl", "eval_step_01/ratio"):
            assert first[name] == second[name]

    def test_a_reward_that_is_not_finite_skips_the_update(self, tmp_path, caplog):
        def broken(images, prompts):
            return torch.tensor([math.nan if prompt == "fox" else 1.0 for prompt in prompts])

        trainer = make_trainer(tmp_path, broken, prompts=["fox", "owl"], max_steps=1)
        before = trainable(trainer)
        trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())
        message = next(record.message for record in caplog.records if "is skipped" in record.message)
        assert "the reward `broken` of sample 0 for the prompt 'fox' is nan (3 of 6 values)" in message


class TestSaving:
    def test_lora_loads_into_diffusers_exactly(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, "cat", tmp_path / "base")

    def test_full_fine_tuning_is_saved_as_a_transformer(self, tmp_path):
        trainer = make_trainer(tmp_path, peft=False)
        trainer.train()
        check_full_fine_tuning_is_saved_as_a_transformer(trainer)

    @pytest.mark.slow
    @pytest.mark.parametrize("peft", [True, False])
    def test_resume_is_exact(self, tmp_path, peft):
        check_resume_is_exact(make_trainer, tmp_path, peft=peft)

    def test_model_card(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "flow-grpo" in card and "liu2025flow" in card and "load_lora_weights" in card
        assert "| `epsilon` | 0.001 |" in card and str(tmp_path) not in card
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 4


class TestBadInput:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_generations": 1},
            {"noise_level": 0.0},
            {"beta": -1.0},
            {"epsilon": 0.0},
            {"scale_rewards": "prompt"},
            {"sde_type": "ddim"},
            {"logprob_reduction": "max"},
            {"num_sde_steps": 5},
            {"t_init": 2},
            {"sde_type": "cps", "num_sde_steps": 4},
            {"sync_ref_model": True, "beta": 0.0},
            {"loss_type": "ppo"},
            {"divergence_threshold": 0.0},
            {"divergence_threshold": 1e-3},
            {"epsilon": 0.1, "loss_type": "flow_dppo"},
            {"window_size": 4},
            {"window_size": 0},
            {"window_interval": 2},
            {"window_stride": 2, "window_size": 1, "window_strategy": "random"},
            {"window_strategy": "decay", "window_size": 1},
        ],
    )
    def test_configuration(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make_args(tmp_path, **kwargs)
