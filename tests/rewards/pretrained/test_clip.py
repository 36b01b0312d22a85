# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.clip import AestheticReward, linear_head
from tapo_trl.rewards.pretrained.preprocessing import clip_pixel_values
from tests.testing_utils import save_tiny_clip


PROMPTS = ["a cat", "a dog", "a cat", "bird"]
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # those of `save_tiny_clip`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def make_images(size=(40, 30), number=4):
    return torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["clip", "pickscore"])
class TestSimilarity:
    def test_is_that_of_transformers(self, folder, name):
        reward, images = get_reward(name, weights=folder), make_images()
        clip = CLIPModel.from_pretrained(folder)
        inputs = reward.tokenizer(PROMPTS, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = clip(inputs.input_ids, clip_pixel_values(images, 24, MEAN, STD))
        logits = output.logits_per_image.diagonal()
        cosine = logits / clip.logit_scale.detach().exp()
        assert cosine.std() > 0.02 and (cosine < 0).any() and (cosine > 0).any()
        expected = logits if name == "pickscore" else 100 * cosine.clamp(min=0)
        torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=1e-5)

    def test_does_not_depend_on_the_batch(self, folder, name):
        reward, images = get_reward(name, weights=folder, batch_size=3), make_images()
        whole = reward.score(images, PROMPTS)
        alone = torch.cat([reward.score(images[index : index + 1], [PROMPTS[index]]) for index in range(4)])
        torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(whole, reward(images, PROMPTS), atol=1e-4, rtol=1e-5)

    def test_gradients_reach_the_pixels(self, folder, name):
        reward, images = get_reward(name, weights=folder), make_images().requires_grad_()
        scores = reward.score(images, PROMPTS)
        scores.sum().backward()
        reached = images.grad.flatten(1).abs().sum(1) > 0
        assert reached.tolist() == [True] * 4 if name == "pickscore" else reached.equal(scores > 0)
        assert all(parameter.grad is None for parameter in reward.parameters())

    def test_half_precision(self, folder, name):
        full, half = (get_reward(name, weights=folder, torch_dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert half.clip.visual_projection.weight.dtype is torch.bfloat16
        assert half.clip.logit_scale.dtype is torch.float32
        images = make_images()
        torch.testing.assert_close(half(images, PROMPTS), full(images, PROMPTS), atol=1.5, rtol=0.05)

    def test_long_prompts_are_cut(self, folder, name):
        reward, images = get_reward(name, weights=folder), make_images(number=2)
        words = "abcdefghijklmnop"
        cut, whole = reward(images, [words, words]), reward(images, [words[:6], words[:6] + "z"])
        assert cut.shape == whole.shape == (2,) and cut.isfinite().all()


class TestAesthetic:
    @pytest.fixture(scope="class")
    @classmethod
    def files(cls, tmp_path_factory):
        """A CLIP, and a head in the layout of the published file."""
        torch.manual_seed(0)
        root = tmp_path_factory.mktemp("aesthetic")
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            projection_dim=12,
        )
        CLIPVisionModelWithProjection(config).save_pretrained(root / "clip")
        published = nn.Module()
        published.layers = nn.Sequential(
            nn.Linear(12, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
        torch.save(published.state_dict(), root / "aesthetic-model.pth")
        return root, published.eval()

    def test_is_the_head_on_normalised_embeddings(self, files):
        root, published = files
        images = make_images()
        reward = get_reward("aesthetic", weights=root, clip=root / "clip")
        tower = CLIPVisionModelWithProjection.from_pretrained(root / "clip")
        with torch.no_grad():
            embeds = tower(clip_pixel_values(images, 24)).image_embeds
            expected = published.layers(embeds / embeds.norm(dim=-1, keepdim=True)).squeeze(1)
        assert expected.std() > 1e-4
        torch.testing.assert_close(reward(images, PROMPTS), expected)
        torch.testing.assert_close(reward(images, ["other"] * 4), expected)
        by_file = get_reward("aesthetic", weights=root / "aesthetic-model.pth", clip=root / "clip")
        torch.testing.assert_close(by_file(images, PROMPTS), expected)

    def test_gradients_and_batches(self, files):
        root, _ = files
        reward, images = get_reward("aesthetic", weights=root, clip=root / "clip", batch_size=3), make_images()
        whole = reward.score(images.requires_grad_(), PROMPTS)
        whole.sum().backward()
        assert (images.grad.flatten(1).abs().sum(1) > 0).all()
        torch.testing.assert_close(whole.detach(), reward(images.detach(), PROMPTS))

    def test_number_of_parameters(self):
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            patch_size=14,
            projection_dim=768,
        )
        with torch.device("meta"):
            reward = AestheticReward(CLIPVisionModelWithProjection(config), linear_head(768))
        assert sum(parameter.numel() for parameter in reward.parameters()) == AestheticReward.num_parameters

    def test_head_is_affine(self):
        head, first, second = linear_head(5), *torch.randn(2, 3, 5)
        torch.testing.assert_close(head((first + second) / 2), (head(first) + head(second)) / 2)


def test_missing_clip(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="`pickscore` needs `yuvalkirstain/PickScore_v1`.*hf download yuvalkirstain"):
        get_reward("pickscore", weights=None)
    with pytest.raises(OSError, match=f"could not be loaded from `{tmp_path}`"):
        get_reward("clip", weights=tmp_path)
