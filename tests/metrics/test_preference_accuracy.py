# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from tapo_trl.data.prompts import PromptCache
from tapo_trl.data.videos import VideoReader
from tapo_trl.metrics import (
    PairScores,
    PreferenceAccuracy,
    accuracy_by_level,
    accuracy_with_ties_by_level,
    calibrated_tie_threshold,
    evaluate_preference_accuracy,
    videoalign_accuracy_with_ties,
)
from tapo_trl.metrics.preference_accuracy import pair_accuracies
from tapo_trl.rewards.slrm import SLRMModel
from tapo_trl.seeding import seeded_generator
from tests.data.preference_pairs import latent_pairs
from tests.data.video_files import color_videos


class TestPreferenceAccuracy:
    def test_accuracy(self):
        result = PreferenceAccuracy().compute(predictions=[0.5, -0.2, 0.1, 3.0], references=[1, 1, 0, 1])
        assert result == {"accuracy": 0.5, "accuracy_with_ties": 0.5, "num_pairs": 4}

    def test_equal_scores_count_one_half(self):
        result = PreferenceAccuracy().compute(predictions=[0.0, 1.0], references=[1, 1])
        assert result["accuracy"] == 0.75

    def test_ties_of_people(self):
        result = PreferenceAccuracy().compute(
            predictions=[0.5, 0.05, -0.05, -0.5], references=[1, 0.5, 1, 0.5], tie_threshold=0.1
        )
        assert result["accuracy"] == 0.5  # the first and the third pair
        assert result["accuracy_with_ties"] == 0.5  # the first and the second

    def test_by_noise_level(self):
        result = PreferenceAccuracy().compute(
            predictions=[1.0, -1.0, 1.0, 1.0], references=[1, 1, 1, 0.5], sigmas=[0.1, 0.1, 0.9, 0.9]
        )
        assert result["by_sigma"] == {0.1: 0.5, 0.9: 1.0}

    def test_by_range_of_timesteps(self):
        result = PreferenceAccuracy().compute(
            predictions=[1.0, -1.0, 1.0, 0.1, -1.0],
            references=[1, 1, 1, 0.5, 1],
            sigmas=[0.0, 0.001, 0.5, 0.501, 0.999],
            tie_threshold=0.1,
        )
        assert result["by_range"] == {
            "clean": {"accuracy": 1.0, "accuracy_with_ties": 1.0, "num_pairs": 1},
            "1-500": {"accuracy": 0.5, "accuracy_with_ties": 0.5, "num_pairs": 2},
            "501-1000": {"accuracy": 0.0, "accuracy_with_ties": 0.5, "num_pairs": 2},
        }

    def test_ranges_without_pairs_are_left_out(self):
        result = PreferenceAccuracy().compute(predictions=[1.0], references=[1], sigmas=[0.2])
        assert list(result["by_range"]) == ["1-500"]

    def test_ties_alone(self):
        result = PreferenceAccuracy().compute(predictions=[0.1], references=[0.5])
        assert math.isnan(result["accuracy"]) and result["accuracy_with_ties"] == 0

    def test_batches(self):
        metric = PreferenceAccuracy()
        metric.add_batch(predictions=[1.0, 1.0], references=[1, 1])
        metric.add_batch(predictions=[-1.0], references=[1])
        assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


class TestVideoAlign:
    """The counts of VideoAlign's `calc_accuracy.py`, from its definition."""

    def walk(self, margins, labels):
        """Call one pair after the other a tie, from the smallest margin on, and count each time."""
        order = sorted(range(len(margins)), key=lambda index: abs(margins[index]))
        best = 0
        for number in range(1, len(order) + 1):
            tied = set(order[:number])
            right = 0
            for index, (margin, label) in enumerate(zip(margins, labels, strict=True)):
                wins = {1.0: margin > 0, 0.0: margin < 0, 0.5: False}[label]
                right += label == 0.5 if index in tied else wins
            best = max(best, right)
        return best / len(margins)

    @pytest.mark.parametrize("decimals", [0, 1, 6])
    def test_with_ties(self, decimals):
        generator = torch.Generator().manual_seed(decimals)
        for _ in range(5):
            margins = torch.randn(40, generator=generator, dtype=torch.float64).round(decimals=decimals)
            labels = torch.randint(0, 3, (40,), generator=generator) / 2
            expected = self.walk(margins.tolist(), labels.tolist())
            result = PreferenceAccuracy().compute(
                predictions=margins.tolist(), references=labels.tolist(), tie_threshold="videoalign"
            )
            assert result["accuracy_with_ties"] == pytest.approx(expected)
            best = PreferenceAccuracy().compute(
                predictions=margins.tolist(),
                references=labels.tolist(),
                tie_threshold=calibrated_tie_threshold(margins, labels),
            )["accuracy_with_ties"]
            # a threshold may call no pair a tie; the walk may stop between equal margins
            assert expected >= best - 1 / 40 and (decimals < 6 or expected <= best)

    def test_no_threshold_attains_it(self):
        margins, labels = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 1.0, 1.0])
        assert videoalign_accuracy_with_ties(margins, labels) == 1
        assert videoalign_accuracy_with_ties(margins, labels.flip(0)) == pytest.approx(1 / 3)  # the order matters
        accuracies = [
            PreferenceAccuracy().compute(
                predictions=margins.tolist(), references=labels.tolist(), tie_threshold=threshold
            )["accuracy_with_ties"]
            for threshold in (0.0, 1.0)
        ]
        assert accuracies == pytest.approx([2 / 3, 1 / 3])

    def test_margins_of_zero(self):
        pairs = {"predictions": [0.0, 1.0, 0.0, -1.0], "references": [1, 1, 0.5, 0], "sigmas": [0.1, 0.1, 0.9, 0.9]}
        half = PreferenceAccuracy().compute(**pairs)
        wrong = PreferenceAccuracy().compute(**pairs, zero_margin="wrong")
        assert half["accuracy"] == pytest.approx(2.5 / 3) and wrong["accuracy"] == pytest.approx(2 / 3)
        assert half["by_sigma"] == {0.1: 0.75, 0.9: 1.0} and wrong["by_sigma"] == {0.1: 0.5, 0.9: 1.0}
        assert wrong["by_range"]["1-500"]["accuracy"] == 0.5
        assert half["accuracy_with_ties"] == wrong["accuracy_with_ties"]

    def test_by_range(self):
        result = PreferenceAccuracy().compute(
            predictions=[1.0, 1.0, 1.0, 2.0],
            references=[0.5, 1, 1, 1],
            sigmas=[0.1, 0.1, 0.1, 0.9],
            tie_threshold="videoalign",
        )
        assert result["by_range"]["1-500"]["accuracy_with_ties"] == 1
        assert result["by_range"]["501-1000"]["accuracy_with_ties"] == 0  # the only pair is called a tie

    @pytest.mark.parametrize("options", [{"zero_margin": "right"}, {"tie_threshold": "best"}])
    def test_unknown_options(self, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            PreferenceAccuracy().compute(predictions=[1.0], references=[1], **options)


def test_pair_accuracies():
    margins = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0])
    assert pair_accuracies(margins).tolist() == [1, 0, 0.5, 1, 0]
    assert pair_accuracies(margins, torch.tensor([1, 1, 1, 0, 0])).tolist() == [1, 0, 0.5, 0, 1]


class TestCalibratedTieThreshold:
    def test_against_every_threshold(self):
        margins = torch.randn(60).round(decimals=1)
        labels = torch.tensor([1.0, 0.5, 0.0] * 20)
        best, threshold = 0, None
        for candidate in [0.0, *sorted(margins.abs().tolist())]:
            accuracy = PreferenceAccuracy().compute(
                predictions=margins.tolist(), references=labels.tolist(), tie_threshold=candidate
            )["accuracy_with_ties"]
            if accuracy > best:
                best, threshold = accuracy, candidate
        assert calibrated_tie_threshold(margins, labels) == threshold

    def test_without_ties_nothing_is_predicted_as_one(self):
        assert calibrated_tie_threshold(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 1.0])) == 0

    def test_small_margins_of_ties(self):
        margins, labels = torch.tensor([0.5, -0.25, 0.125, 2.0]), torch.tensor([1.0, 0.5, 0.5, 1.0])
        assert calibrated_tie_threshold(margins, labels) == 0.25


class TestEvaluatePreferenceAccuracy:
    def slrm(self, policy):
        return SLRMModel.from_policy(policy, num_task_tokens=2, max_sequence_length=16, resolution=32)

    def test_against_a_loop_over_single_images(self, tiny_sd3_policy, tmp_path):
        slrm, pairs = self.slrm(tiny_sd3_policy), latent_pairs(7)
        pairs = pairs.add_column("label", [1.0] * 6 + [0.5])
        sigmas, rules = (0.0, 0.3, 0.8), ("ground_truth", "reference", "none")
        result = evaluate_preference_accuracy(
            slrm, tiny_sd3_policy, pairs, sigmas, rules, batch_size=3, seed=5, cache_dir=tmp_path
        )

        prompts = PromptCache(tiny_sd3_policy, tmp_path, 16)
        for rule in rules:
            for sigma in sigmas:
                wins = []
                for row, pair in enumerate(pairs.select(range(6))):
                    noise = torch.randn(1, 4, 8, 8, generator=seeded_generator("evaluation", 5, row))
                    embeds = prompts.load([pair["prompt"]])
                    scores = []
                    for side in ("chosen", "rejected"):
                        clean = torch.tensor([pair[side]])
                        noisy = (1 - sigma) * clean + sigma * noise
                        target = {"ground_truth": noise - clean, "none": None}.get(rule, None)
                        if rule == "reference":
                            target = tiny_sd3_policy.velocity(tiny_sd3_policy.transformer, noisy, sigma, embeds)
                        args = (noisy, sigma, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
                        scores.append(slrm.score(*args, velocity_target=target).item())
                    wins.append(scores[0] > scores[1])
                assert result[rule][sigma] == pytest.approx(sum(wins) / 6), (rule, sigma)
        assert list(result) == list(rules) and list(result["none"]) == list(sigmas)

    def test_videos(self, tiny_wan_policy, tmp_path):
        slrm = SLRMModel.from_policy(
            tiny_wan_policy, num_task_tokens=2, max_sequence_length=16, height=32, width=48, num_frames=5
        )
        pairs = color_videos(tmp_path, 3)
        result = evaluate_preference_accuracy(
            slrm, tiny_wan_policy, pairs, (0.4,), ("reference",), batch_size=2, cache_dir=tmp_path
        )
        wins = []
        for row, pair in enumerate(pairs):
            noise = torch.randn(1, 4, 2, 4, 6, generator=seeded_generator("evaluation", 0, row))
            embeds = tiny_wan_policy.encode_prompts([pair["prompt"]], 16)
            scores = []
            for side in ("chosen", "rejected"):
                clean = tiny_wan_policy.encode(VideoReader(32, 48, 5, 16).load(pair[side])[None])
                noisy = 0.6 * clean + 0.4 * noise
                target = tiny_wan_policy.velocity(tiny_wan_policy.transformer, noisy, 0.4, embeds)
                scores.append(slrm.score(noisy, 0.4, embeds.prompt_embeds, velocity_target=target).item())
            wins.append(scores[0] > scores[1])
        assert result["reference"][0.4] == pytest.approx(sum(wins) / 3)

    def test_same_result_for_every_batch_size_and_mode_is_kept(self, tiny_sd3_policy, tmp_path):
        slrm, pairs = self.slrm(tiny_sd3_policy).train(), latent_pairs(5)
        results = [
            evaluate_preference_accuracy(slrm, tiny_sd3_policy, pairs, batch_size=size, cache_dir=tmp_path)
            for size in (2, 5)
        ]
        assert results[0] == results[1]
        assert slrm.training

    def test_unknown_rule(self, tiny_sd3_policy, tmp_path):
        with pytest.raises(ValueError, match="Unknown rule 'magic'"):
            evaluate_preference_accuracy(
                self.slrm(tiny_sd3_policy), tiny_sd3_policy, latent_pairs(2), rules=["magic"], cache_dir=tmp_path
            )


class TestTies:
    labels = torch.tensor([1.0, 1.0, 0.5, 0.0])
    margins = torch.tensor([[0.5, 0.0, 0.1, -0.2], [-0.5, 0.3, 0.0, 0.2]])

    def scores(self):
        return PairScores((0.1, 0.9), self.labels, {"none": self.margins}, {"none": torch.zeros(2, 4)})

    def test_equal_scores(self):
        assert accuracy_by_level(self.scores()) == {"none": {0.1: pytest.approx(2.5 / 3), 0.9: pytest.approx(1 / 3)}}
        assert accuracy_by_level(self.scores(), "wrong")["none"][0.1] == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("threshold", "expected"),
        [(0.0, (0.5, 0.5)), (0.15, (0.75, 0.5)), ("best", (0.75, 0.5)), ("videoalign", (0.75, 0.5))],
    )
    def test_accuracy_with_ties(self, threshold, expected):
        found = accuracy_with_ties_by_level(self.scores(), threshold)
        assert found == {"none": dict(zip((0.1, 0.9), expected, strict=True))}
