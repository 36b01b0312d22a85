# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

from tapo_trl import get_reward
from tapo_trl.rewards import list_rewards
from tapo_trl.rewards.pretrained import REWARDS, PretrainedReward, reward_class
from tapo_trl.rewards.scoring import call_reward_function, check_reward_function, reward_name


class Brightness(PretrainedReward):
    """Mean of the pixels, times a weight; plus the length of the prompt."""

    name = "brightness"
    weights = "nobody/brightness"
    weights_file = "brightness.safetensors"
    needs = ("nobody/words",)
    license = "MIT"
    score_range = (0.0, 1.0)
    num_parameters = 1000
    default_batch_size = 4
    citation = "nobody"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.ones(()))
        self.batches = []

    @classmethod
    def load(cls, weights, torch_dtype, revision, **kwargs):
        if not str(weights).startswith("/"):
            raise OSError("no network")
        return cls(**kwargs).to(torch_dtype)

    def raw_scores(self, images, prompts):
        self.batches.append(len(images))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return self.weight * images.flatten(1).mean(1) + lengths


class VideoBrightness(Brightness):
    reads = "video"


def load(**kwargs):
    return Brightness.from_pretrained("/somewhere", **kwargs)


def test_frozen_and_in_evaluation():
    reward = load(torch_dtype="bf16")
    assert not reward.training and not reward.weight.requires_grad and reward.weight.dtype is torch.bfloat16
    assert load().weight.dtype is torch.float32
    assert Brightness.memory() == 4000 and Brightness.memory("bfloat16") == 2000


def test_gradients_reach_the_pixels():
    images = torch.rand(2, 3, 4, 5, requires_grad=True)
    load().score(images, ["a", "b"]).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 60))
    assert not load()(images, ["a", "b"]).requires_grad


def test_chunks():
    reward, images = load(batch_size=2), torch.rand(5, 3, 4, 4)
    prompts = ["a" * number for number in range(5)]
    found = reward(images, prompts)
    assert reward.batches == [2, 2, 1]
    torch.testing.assert_close(found, load().score(images, prompts))


def test_scales():
    images, prompts = torch.rand(3, 3, 4, 4), ["", "a", "bb"]
    plain = load()(images, prompts)
    torch.testing.assert_close(load(scale=0.25)(images, prompts), plain / 4)
    torch.testing.assert_close(load(standardize=(2.0, 4.0))(images, prompts), (plain - 2) / 4)
    torch.testing.assert_close(load(standardize=(2.0, 4.0)).score(images, prompts), (plain - 2) / 4)


@pytest.mark.parametrize(("frames", "read"), [("all", [0, 1, 2, 3, 4]), ("first", [0]), (3, [0, 2, 4]), (9, range(5))])
def test_frames_of_videos(frames, read):
    videos = torch.rand(2, 3, 5, 4, 4)
    expected = videos[:, :, list(read)].mean((1, 2, 3, 4)) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(load(frames=frames)(videos, ["a", "bb"]), expected)


def test_a_video_scorer_reads_videos():
    reward, videos = VideoBrightness.from_pretrained("/somewhere"), torch.rand(2, 3, 5, 4, 4)
    torch.testing.assert_close(reward(videos, ["", ""]), videos.mean((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="reads videos of shape .* but got images"):
        reward(videos[:, :, 0], ["", ""])
    with pytest.raises(ValueError, match="`frames` is for rewards of images"):
        VideoBrightness.from_pretrained("/somewhere", frames="first")


def test_pixels_that_are_not_finite():
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = torch.nan
    found = load()(images, ["", "", ""])
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], images[[0, 2]].mean((1, 2, 3)))


def test_scores_that_are_not_finite():
    reward = load()
    reward.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"`brightness` gave scores that are not finite for the images \[0, 1\] of 2"):
        reward(torch.rand(2, 3, 4, 4), ["", ""])


def test_wrong_number_of_scores():
    reward = load()
    reward.raw_scores = lambda images, prompts: images.mean()
    with pytest.raises(ValueError, match=r"one score for each of 2 images, but gave shape \(\)"):
        reward(torch.rand(2, 3, 4, 4), ["", ""])


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["", ""], "float tensors with values in .*uint8"),
        ([torch.zeros(3, 4, 4)], [""], "float tensors .* `list`"),
        (torch.zeros(2, 4, 4, 3), ["", ""], r"images of shape \(N, 3, H, W\) .* got \(2, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4), [""], "images of shape"),
        (torch.zeros(0, 3, 4, 4), [], "images of shape"),
        (torch.zeros(2, 3, 4, 4), [""], "a list of 2 prompts, but got 1"),
        (torch.zeros(2, 3, 4, 4), "ab", "a list of 2 prompts, but got a `str`"),
    ],
)
def test_bad_input(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        load()(images, prompts)
    with pytest.raises(ValueError, match=message):
        load().score(images, prompts)


def test_gradients_reach_the_frames_of_videos():
    videos = torch.rand(2, 3, 5, 4, 4, requires_grad=True)
    scores = load(frames="first").score(videos, ["a", "bb"])
    torch.testing.assert_close(scores, videos[:, :, 0].mean((1, 2, 3)) + torch.tensor([1.0, 2.0]))
    scores.sum().backward()
    assert torch.equal(videos.grad[:, :, 0], torch.full((2, 3, 4, 4), 1 / 48)) and not videos.grad[:, :, 1:].any()
    torch.testing.assert_close(load().score(videos, ["", ""]), load()(videos, ["", ""]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "`batch_size` of the reward `brightness` must be at least 1"),
        ({"frames": "last"}, '`frames` of the reward `brightness` must be "all", "first" or a number'),
        ({"frames": 0}, "`frames`"),
        ({"scale": 2.0, "standardize": (0.0, 1.0)}, "one of `scale` and `standardize`"),
        ({"standardize": (0.0, 0.0)}, "positive standard deviation"),
        ({"torch_dtype": "auto"}, "name the precision"),
        ({"batch_size": "3"}, "`batch_size` of the reward `brightness` must be at least 1, but it is '3'"),
        ({"standardize": 2.0}, "`standardize` of the reward `brightness` must be a mean and"),
        ({"scale": "2"}, "`scale` of the reward `brightness` must be a number"),
        ({"frame": 3}, "The reward `brightness` has no argument `frame`"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load(**kwargs)


def test_options_are_checked_before_the_weights_are_read():
    for options in ({"batch_size": 0}, {"frame": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Brightness.from_pretrained(**options)  # these weights are not there


@pytest.mark.parametrize("weights", ["./nothing/here", "/nothing/here/weights.pt", "~/nothing here"])
def test_a_path_that_is_not_there(weights):
    with pytest.raises(OSError, match="there is no file or folder `[^~].*nothing.here"):
        get_reward("hpsv2.1", weights=weights)


def test_missing_weights():
    command = r"`hf download nobody/brightness brightness.safetensors && hf download nobody/words`.*no network"
    with pytest.raises(OSError, match=f"`brightness` needs `nobody/brightness`.*{command}"):
        Brightness.from_pretrained()
    with pytest.raises(OSError, match="hf download me/mine --revision 1a"):
        Brightness.from_pretrained("me/mine", revision="1a")


def test_as_a_reward_function():
    reward, images = load(), torch.rand(2, 3, 4, 4)
    check_reward_function(reward, ["style"])
    found = call_reward_function(reward, images, ["", ""], {"style": ["a", "b"]})
    torch.testing.assert_close(found, images.mean((1, 2, 3)))
    assert reward_name(reward) == "brightness"


class TestNames:
    @pytest.mark.parametrize("name", REWARDS)
    def test_facts(self, name):
        scorer = reward_class(name)
        assert issubclass(scorer, PretrainedReward) and scorer.name == name and scorer.reads in ("image", "video")
        low, high = scorer.score_range
        assert low < high and scorer.num_parameters > 0 and scorer.license and scorer.citation

    def test_unknown(self):
        with pytest.raises(ValueError, match="There is no reward `CLIPP`. Did you mean `clip`?"):
            get_reward("CLIPP")
        assert list_rewards() == sorted(REWARDS)
