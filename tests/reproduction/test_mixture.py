# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.mixture import methods, quality, report, seconds, study, world
from tapo_trl import FlowMatchSDEScheduler
from tapo_trl.rewards.scoring import PixelReward, WeightedReward
from tapo_trl.rollouts import FlowGRPOSampler


class TestTrueReward:
    mixture = world.Mixture(channels=2)
    labels = torch.arange(8).repeat(50)

    def test_reads_the_style_and_the_prompt_off_the_data(self):
        samples = self.mixture.sample(self.labels, torch.Generator().manual_seed(0))
        judged = self.mixture.judge(samples, self.labels)
        assert judged["accuracy"].min() == 1 and judged["excess"].mean() < 0.1
        assert judged["style"].mean().item() == pytest.approx(0, abs=0.07)
        assert judged["style"].std().item() == pytest.approx(world.STYLE_STD, rel=0.1)
        torch.testing.assert_close(judged["reward"], judged["style"] + judged["log_p"] - judged["excess"])

    def test_rises_with_style_and_falls_with_noise_and_with_another_prompt(self):
        samples = self.mixture.sample(self.labels, torch.Generator().manual_seed(0))
        styled = samples + self.mixture.patterns[8].view(self.mixture.shape)
        noisy = samples + 0.2 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
        reward = self.mixture.judge(samples, self.labels)["reward"].mean().item()
        assert self.mixture.judge(styled, self.labels)["reward"].mean().item() == pytest.approx(
            reward + 0.96, abs=0.05
        )
        assert self.mixture.judge(noisy, self.labels)["excess"].mean().item() == pytest.approx(1, abs=0.1)
        assert self.mixture.judge(samples, (self.labels + 1) % 8)["reward"].mean() < reward - 10

    @pytest.mark.parametrize("channels", [1, 2, 16])
    def test_patterns_are_orthogonal_at_every_size(self, channels):
        patterns = world.Mixture(channels).patterns
        expected = 64 * channels * torch.eye(len(patterns))
        torch.testing.assert_close(patterns @ patterns.T, expected, atol=1e-2 * channels, rtol=0)


def test_pairs_by_their_ends_are_the_best_and_the_worst_trajectory_of_each_group():
    policy = world.MixturePolicy(world.new_pipeline(2))
    prompts = world.PROMPTS[:3]
    embeds = policy.encode_prompts(prompts, max_sequence_length=1)
    scheduler = FlowMatchSDEScheduler.from_config(policy.pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    options = {
        "policy": policy,
        "scheduler": scheduler,
        "reward": WeightedReward([PixelReward(study.true_reward(world.Mixture(2)), policy)]),
        "latent_shape": (2, 8, 8),
        "step_indices": [0, 3],
        "num_generations": 4,
    }
    rollouts = []
    for sampler in (FlowGRPOSampler(**options), methods.EndPairsSampler(**options)):
        generators = [torch.Generator().manual_seed(row) for row in range(3)]
        rollouts.append(sampler.sample(policy.transformer, prompts, embeds, None, generators))
    groups, pairs = rollouts
    for prompt in range(3):
        rewards = groups.rewards[prompt].tolist()
        for side, wanted in enumerate((max(rewards), min(rewards))):
            row = rewards.index(wanted) * 3 + prompt
            assert pairs.pair_rewards[:, side, prompt].tolist() == [wanted] * 2
            torch.testing.assert_close(pairs.latents[:, side, prompt], groups.latents[:, row], atol=0, rtol=0)
            torch.testing.assert_close(
                pairs.next_latents[:, side, prompt], groups.next_latents[:, row], atol=0, rtol=0
            )
    assert pairs.weights.tolist() == [[1.0] * 3] * 2


def test_correlation_of_ranks_is_a_mean_over_groups():
    first = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 9.0]])
    second = torch.tensor([[10.0, 20.0, 1000.0], [3.0, 2.0, 1.0]])
    assert quality.correlation(first[:1], second[:1]) == pytest.approx(1)
    assert quality.correlation(first, second) == pytest.approx(0, abs=1e-6)
    assert quality.correlation(first[:1], torch.tensor([[1.0, 3.0, 2.0]])) == pytest.approx(0.5)


@pytest.mark.slow
def test_pretraining_search_seeds_and_report(tmp_path, monkeypatch):
    """Of two methods, with few steps each."""
    work, runs = tmp_path / "work", tmp_path / "runs.jsonl"
    monkeypatch.setattr(study, "RUNS", runs)
    world.pretrain(study.CHANNELS, work / "base", num_steps=3, batch_size=8)
    loaded = world.load(work / "base")
    pairs = study.preference_pairs(*loaded, num_pairs=16, seed=0)
    study.train_reward(loaded[1], pairs, work / "slrm-0", seed=0, num_steps=1)
    for name in ("TAPO", "Diffusion-DPO"):
        method = study.METHODS[name]
        monkeypatch.setitem(study.METHODS, name, replace(method, values=method.values[:1], rates=method.rates[:1]))
    monkeypatch.setattr(study, "BUDGET", 1500)
    monkeypatch.setattr(study, "NUM_TRIALS", 2)
    monkeypatch.setattr(study, "SEARCH_SEEDS", (0,))
    for name in ("TAPO", "Diffusion-DPO"):
        study.search(name, work)
        study.make([replace(study.best(name), seed=0)], work, split=1)
    rows = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["TAPO"] * 3 + ["Diffusion-DPO"] * 3
    assert all(len(row["curve"]) == study.NUM_POINTS + 1 and row["curve"][0]["distance"] == 0 for row in rows)
    assert len({row["curve"][0]["reward"] for row in rows}) == 2  # the base, on the noise of each split
    study.make([replace(study.best("TAPO"), seed=0)], work, split=1)
    assert len(runs.read_text().splitlines()) == 6  # what is there is not made again
    names = ["TAPO", "Diffusion-DPO"]
    assert seconds.finished() == names
    monkeypatch.setattr(seconds, "NUM_ROWS", 1500)
    monkeypatch.setattr(seconds, "NUM_ROUNDS", 1)
    monkeypatch.setattr(report, "FILE", tmp_path / "seconds.json")
    assert "not measured" in report.write_report(names, tmp_path / "report.md")
    seconds.measure(names, work, report.FILE)
    assert {name: len(values) for name, values in json.loads(report.FILE.read_text()).items()} == {
        "TAPO": 1,
        "Diffusion-DPO": 1,
    }
    assert min(seconds.read_seconds(report.FILE).values()) > 0
    text = report.write_report(names, tmp_path / "report.md")
    assert "not measured" not in text
    assert "TAPO above Diffusion-DPO" in text and "nan" not in text.lower()
    report.plot(["TAPO", "Diffusion-DPO"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
