# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel

from tapo_trl.rewards.clip_modulation import NoiseModulation, modulate, modulated_image_features
from tapo_trl.rewards.pretrained.preprocessing import clip_pixel_values
from tests.testing_utils import save_tiny_clip


@pytest.fixture
def clip(tmp_path):
    return CLIPModel.from_pretrained(save_tiny_clip(tmp_path)).eval()


def stirred(clip: CLIPModel) -> NoiseModulation:
    vision = clip.config.vision_config
    modulation = NoiseModulation(vision.hidden_size, vision.num_hidden_layers)
    with torch.no_grad():
        for parameter in modulation.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return modulation


class TestModulation:
    @pytest.fixture(autouse=True)
    def no_gradients(self):
        with torch.no_grad():
            yield

    def test_is_clip_itself_at_the_start(self, clip):
        modulation, pixel_values = NoiseModulation(16, 2), torch.randn(3, 3, 24, 24)
        features = modulated_image_features(clip, modulation, pixel_values, torch.tensor([0.1, 0.5, 0.9]))
        expected = clip.get_image_features(pixel_values, return_dict=True).pooler_output
        torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)

    def test_every_layer_and_the_output_are_told_the_noise_level(self, clip):
        pixel_values, sigma = torch.randn(2, 3, 24, 24), torch.tensor([0.2, 0.7])
        start = modulated_image_features(clip, NoiseModulation(16, 2), pixel_values, sigma)
        for part in ("layers.0", "layers.1", "output"):
            modulation = NoiseModulation(16, 2)
            linear = modulation.get_submodule(part)
            for rows in linear.weight.chunk(linear.out_features // 16):  # shift, scale, gate
                rows.normal_(std=0.5)
                features = modulated_image_features(clip, modulation, pixel_values, sigma)
                other = modulated_image_features(clip, modulation, pixel_values, sigma.flip(0))
                assert (features - start).abs().max() > 1e-4, part
                assert (features - other).abs().max() > 1e-4, part
                rows.zero_()

    def test_against_the_equations(self, clip):
        """DiT's block with CLIP's layers, written with explicit loops over the batch."""
        modulation, pixel_values, sigma = stirred(clip), torch.randn(2, 3, 24, 24), torch.tensor([0.25, 0.75])
        tower, features = clip.vision_model, []
        for image, level in zip(pixel_values, sigma, strict=True):
            angles = level * 1000 * torch.exp(-torch.arange(128) * torch.log(torch.tensor(10000.0)) / 128)
            embedded = torch.cat([angles.cos(), angles.sin()])
            embedded = modulation.embedding.linear_2(torch.nn.functional.silu(modulation.embedding.linear_1(embedded)))
            condition = torch.nn.functional.silu(embedded)
            x = tower.pre_layrnorm(tower.embeddings(image[None]))
            for layer, linear in zip(tower.encoder.layers, modulation.layers, strict=True):
                shift, scale, gate, shift_2, scale_2, gate_2 = linear(condition).chunk(6)
                x = x + (1 + gate) * layer.self_attn((1 + scale) * layer.layer_norm1(x) + shift, None)[0]
                x = x + (1 + gate_2) * layer.mlp((1 + scale_2) * layer.layer_norm2(x) + shift_2)
            shift, scale = modulation.output(condition).chunk(2)
            features.append(clip.visual_projection((1 + scale) * tower.post_layernorm(x[:, 0]) + shift))
        found = modulated_image_features(clip, modulation, pixel_values, sigma)
        torch.testing.assert_close(found, torch.cat(features), rtol=1e-4, atol=1e-5)

    def test_keeps_the_precision_of_the_tower(self):
        hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
        assert modulate(hidden, torch.randn(2, 1, 4), torch.randn(2, 1, 4)).dtype == torch.bfloat16


def test_checkpointing_changes_nothing(clip):
    modulation, pixel_values, sigma = stirred(clip), torch.randn(2, 3, 24, 24), torch.tensor([0.3, 0.6])
    calls, gradients = [], []

    def run(function, *arguments):
        calls.append(function)
        return checkpoint(function, *arguments, use_reentrant=False)

    for run_layer in (None, run):
        modulation.zero_grad()
        modulated_image_features(clip, modulation, pixel_values, sigma, run_layer).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in modulation.parameters()])
    assert len(calls) == 2
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


class TestPixelValues:
    def test_same_size_is_normalised_alone(self):
        images = torch.rand(2, 3, 8, 8)
        mean, std = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]
        found = clip_pixel_values(images, 8, mean, std)
        for channel in range(3):
            torch.testing.assert_close(found[:, channel], (images[:, channel] - mean[channel]) / std[channel])

    @pytest.mark.parametrize("size", [(48, 48), (40, 64), (57, 33)])
    def test_as_the_image_processor_of_transformers(self, size):
        from transformers import CLIPImageProcessor

        ramp = torch.linspace(0, 1, size[1]).expand(*size)
        waves = torch.sin(torch.linspace(0, 9, size[0])).view(-1, 1).expand(*size) / 2 + 0.5
        image = torch.stack([ramp, waves, ramp * waves])
        processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
        whole = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        expected = processor(whole, return_tensors="pt").pixel_values
        found = clip_pixel_values(image[None], 24, processor.image_mean, processor.image_std)
        assert found.shape == (1, 3, 24, 24)
        assert (found - expected).abs().mean() < 0.01 and (found - expected).abs().max() < 0.1
