# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import tapo_trl
from tapo_trl.benchmark import Bench, Setting, _latents_through, linear_fit, matmul_peak
from tapo_trl.cli.bench import make_bench, make_parser, settings, summarize
from tapo_trl.cli.main import main
from tapo_trl.policies.wan_experts import WanExpertsPolicy


ROOT = Path(tapo_trl.__file__).parents[1]


def make(*flags) -> Bench:
    torch.manual_seed(0)
    (args,) = make_parser().parse_args_and_config(list(flags))
    return make_bench(args)


@pytest.fixture(scope="module")
def plain_loop():
    spec = importlib.util.spec_from_file_location("plain_loop", ROOT / "benchmarks" / "plain_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.plain_loop


class TestPlainLoop:
    """One rollout with everything in batches against the algorithm as it is written."""

    @pytest.mark.parametrize(
        ("size", "side", "frames", "flags"),
        [
            ("tiny", 32, (), []),
            ("tiny", 32, (), ["--score_batch_size", "3", "--guidance_scale", "1"]),
            ("tiny_wan", 32, (5,), []),
        ],
    )
    def test_ends_in_the_same_latents(self, plain_loop, size, side, frames, flags):
        bench = make("--size", size, "--lora_r", "2", *flags)
        setting = Setting(6, 3, 3, 2, (side, side, *frames))
        sampler, embeds = bench.sampler(setting), bench.embeddings(2)
        ours = bench.rollout(sampler, embeds).final_latents
        plain = plain_loop(sampler, bench.model, embeds, bench.embeddings(1))
        assert ours.shape == plain.shape == (2, 2, *bench.policy.latent_shape(*setting.size))
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours[0], ours[1])


class TestMeasure:
    @pytest.mark.slow
    def test_forwards(self):
        bench = make("--size", "tiny", "--lora_r", "2")
        result = bench.measure(Setting(5, 2, 3, 2, (32, 32)), repeats=1, warm_up=False)
        # Guidance x (2 steps of 1 trajectory, 3 of 2); n x 2 x P; guidance x n x 2
        assert result.forwards == {"policy": 16, "reward": 12, "training": 8, "reference": 8}
        assert all(value > 0 for value in result.seconds.values()) and result.bare_seconds > 0
        flops = bench.flops((32, 32))
        assert result.flops["rollout"] == 16 * flops["policy"] + 12 * flops["reward"]
        assert 1.5 < flops["training"] / flops["policy"] < 3
        assert result.peak_bytes > 1e8

    def test_flops_of_linear_layers_and_attention(self):
        bench = make("--size", "tiny_wan", "--lora_r", "2")
        config, tokens, text = bench.policy.transformer.config, 2 * 2 * 2, 16
        dim, feed_forward = config.num_attention_heads * config.attention_head_dim, config.ffn_dim
        per_block = tokens * (6 * dim * dim + 2 * dim * feed_forward) + 2 * text * dim * dim  # products of weights
        per_block += 2 * tokens * (tokens + text) * dim  # of queries, keys and values
        at_least = 2 * config.num_layers * per_block
        assert at_least < bench.flops((32, 32, 5))["policy"] < 1.4 * at_least

    def test_update_trains_the_adapter(self):
        bench = make("--size", "tiny", "--lora_r", "2")
        sampler = bench.sampler(Setting(4, 2, 2, 1, (32, 32)))
        trained = {n: p for n, p in bench.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        pairs = bench.rollout(sampler, bench.embeddings(1))
        bench.update(pairs, torch.optim.SGD(trained.values(), lr=1.0))
        moved = {name for name, p in trained.items() if not torch.equal(p, before[name])}
        assert moved and all("lora_B" in name for name in moved)  # lora_A moves when B is no longer 0

    @pytest.mark.parametrize("flag", ["true", "false"])
    def test_updates_by_chunk_beside_their_bare_forwards(self, flag):
        bench = make("--size", "tiny", "--lora_r", "2", "--activation_checkpointing", flag)
        network = bench.policy.transformer
        with _latents_through(network) as sizes:
            rows = bench.update_by_chunk(Setting(4, 2, 2, 2, (32, 32)), [1, 4], repeats=1)
        # Two times: 2 x 2 pairs of two sides with guidance, policy and reference, in chunks; then one chunk of each size
        expected = 2 * [4] * 8 + 2 * [16] * 2 + 2 * [4] * 2 + 2 * [16] * 2
        assert sizes[-len(expected) :] == expected
        assert [row["chunk"] for row in rows] == [1, 4] and rows[0]["ideal s"] == rows[1]["ideal s"] > 0
        assert all(row["update / ideal"] == row["update s"] / row["ideal s"] for row in rows)
        assert network.is_gradient_checkpointing == (flag == "true")

    def test_share_backbone(self):
        bench = make("--size", "tiny", "--lora_r", "2", "--share_backbone", "true")
        base = bench.policy.transformer.pos_embed.proj.weight
        assert bench.slrm.transformer.pos_embed.proj.weight is base
        bench.measure(Setting(3, 1, 2, 1, (32, 32)), repeats=1, warm_up=False)

    def test_options_are_applied_as_in_a_trainer(self):
        plain = make("--size", "tiny_wan", "--lora_r", "2")
        small = make("--size", "tiny_wan", "--lora_r", "2", "--layerwise_casting", "true")
        smaller = make(
            *("--size", "tiny_wan", "--lora_r", "2", "--layerwise_casting", "true"),
            *("--reward_layerwise_casting", "true", "--attention_backend", "_native_math"),
        )
        assert 0.2 < small.weight_bytes / plain.weight_bytes < 0.9
        processors = [module.attn1.processor for module in smaller.policy.transformer.blocks]
        assert {processor._attention_backend for processor in processors} == {"_native_math"}
        smaller.measure(Setting(3, 1, 2, 1, (32, 32, 5)), repeats=1, warm_up=False)
        shared = make("--size", "tiny_wan", "--lora_r", "2", "--share_backbone", "true")
        assert shared.weight_bytes < 0.75 * plain.weight_bytes

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--reward_group_offload", "true"], "this run is on the CPU"),
            (["--share_backbone", "true", "--layerwise_casting", "true"], "cannot work"),
            (["--torch_compile", "true", "--reward_layerwise_casting", "true"], "exclude each other"),
            (["--attention_backend", "native"], "would change nothing"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, flags, message):
        with pytest.raises(ValueError, match=message):
            make("--size", "tiny", "--lora_r", "2", *flags)

    def test_peak(self):
        assert matmul_peak(torch.device("cpu"), torch.float32, budget=0.01) > 1e9


class TestReport:
    def test_linear_fit(self):
        fit = linear_fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
        assert fit == {"intercept": pytest.approx(3), "slope": pytest.approx(2), "r2": pytest.approx(1)}
        noisy = linear_fit([0.0, 1.0, 2.0], [0.0, 3.0, 2.0])
        assert noisy["slope"] == pytest.approx(1) and noisy["r2"] == pytest.approx(1 - (8 / 3) / (14 / 3))
        with pytest.raises(ValueError, match="points at two places"):
            linear_fit([1.0, 1.0], [2.0, 3.0])

    def test_settings(self):
        flags = ["--size", "wan21", "--num_sde_steps", "2", "8", "--num_candidates", "4", "--prompts", "1"]
        (args,) = make_parser().parse_args_and_config(
            [*flags, "--sweep_steps", "20", "40", "--sweep_resolutions", "256"]
        )
        assert settings(args) == [
            Setting(40, 2, 4, 1, (480, 832, 17)),
            Setting(40, 8, 4, 1, (480, 832, 17)),
            Setting(20, 2, 4, 1, (480, 832, 17)),
            Setting(40, 2, 4, 1, (256, 256, 17)),
        ]

    @pytest.mark.slow
    def test_command(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        flags = ["--height", "32", "--width", "32", "--lora_r", "2", "--num_inference_steps", "5", "--repeats", "1"]
        flags += ["--num_sde_steps", "1", "2", "3", "--num_candidates", "2", "--prompts", "1", "--warm_up", "false"]
        assert main(["bench", *flags, "--output_dir", str(tmp_path), "--chunk_sizes", "1", "2"]) == 0
        report = json.loads((tmp_path / "bench.json").read_text())
        assert [row["n"] for row in report["rows"]] == [1, 2, 3]
        assert [row["reward forwards"] for row in report["rows"]] == [4, 8, 12]
        fit = report["fits"]["seconds of a rollout against its forwards, 1 prompts"]
        assert fit.keys() == {"intercept", "slope", "r2"}
        assert report["n"]["n = 3 over 1, P = 2, 1 prompts"]["forwards"] == pytest.approx((16 + 12) / (16 + 4))
        assert [row["chunk"] for row in report["chunks"]] == [1, 2]
        text = (tmp_path / "bench.md").read_text()
        assert text.strip() in capsys.readouterr().out and "# tiny on cpu" in text and "expert" not in text
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.slow
    def test_one_of_two_experts(self, tmp_path):
        """The report says that one was measured."""
        WanExpertsPolicy.tiny().save_pretrained(tmp_path / "base")
        flags = [
            "--model_name_or_path",
            str(tmp_path / "base"),
            "--num_frames",
            "5",
            "--height",
            "32",
            "--width",
            "32",
        ]
        flags += ["--lora_r", "2", "--num_inference_steps", "3", "--num_sde_steps", "1", "--num_candidates", "2"]
        flags += ["--prompts", "1", "--repeats", "1", "--warm_up", "false", "--plot", "false", "--torch_dtype", "fp32"]
        assert main(["bench", *flags, "--output_dir", str(tmp_path / "out")]) == 0
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["machine"]["experts"] == 2
        assert "Only the expert `transformer` was measured" in (tmp_path / "out" / "bench.md").read_text()

    def test_shares_of_the_peak(self):
        bench = make("--size", "tiny", "--lora_r", "2")
        result = bench.measure(Setting(3, 1, 2, 1, (32, 32)), repeats=1, warm_up=False)
        (row,) = summarize([result], peak_flops=1e12)["rows"]
        assert row["rollout of peak"] * 1e12 * result.rollout_seconds == pytest.approx(result.flops["rollout"])
