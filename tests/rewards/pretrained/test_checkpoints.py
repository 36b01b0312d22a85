# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tapo_trl.rewards.pretrained.checkpoints import (
    load_converted,
    pretrained_from_state_dict,
    read_sharded,
    read_state_dict,
    weights_file,
)


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8}
CONFIG = CLIPVisionConfig(**TINY, patch_size=4)


def test_files(tmp_path):
    (tmp_path / "a.json").write_text("")
    (tmp_path / "weights.pt").write_text("")
    assert weights_file(str(tmp_path), "a.json") == tmp_path / "a.json"
    assert weights_file(str(tmp_path / "weights.pt"), "a.json") == tmp_path / "a.json"
    with pytest.raises(OSError, match="has no file `b.json`"):
        weights_file(str(tmp_path), "b.json")


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    assert read_state_dict(tmp_path / "good.pt")["a"].tolist() == [1, 1]
    torch.save({"a": print}, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match="cannot be read as tensors: Unsupported global: GLOBAL .*print, which is"
    ) as error:
        read_state_dict(tmp_path / "bad.pt")
    assert isinstance(error.value.__cause__, pickle.UnpicklingError)


def test_shards(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    torch.save({"c": torch.zeros(1)}, tmp_path / "pytorch_model.bin")  # the same weights in another format
    assert sorted(read_sharded(str(tmp_path))) == ["a", "b"]


def test_models_of_transformers():
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in CLIPVisionModel(CONFIG).state_dict().items()}
    model = pretrained_from_state_dict(CLIPVisionModel, CONFIG, dict(state), "here", torch.bfloat16)
    assert model.dtype is torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].bfloat16()), name
    assert torch.equal(model(torch.ones(1, 3, 8, 8).bfloat16()).pooler_output.isfinite().all(), torch.tensor(True))


def test_names_and_shapes_that_do_not_fit():
    state = CLIPVisionModel(CONFIG).state_dict()
    first, second, *_ = state

    def load(weights):
        return pretrained_from_state_dict(CLIPVisionModel, CONFIG, weights, "here", torch.float32)

    wrong = {**state, "more": torch.ones(1)}
    del wrong[first]
    with pytest.raises(
        ValueError, match=f"`here` is no checkpoint of this scorer: {first} is missing; more is not known"
    ):
        load(wrong)
    with pytest.raises(ValueError, match="`here` is no checkpoint"):
        load({**state, second: torch.ones(3)})
    with pytest.raises(ValueError, match="and .* more"):
        load({})
    load({**state, "embeddings.position_ids": torch.arange(5)})  # a buffer that older versions saved


def test_modules():
    weights = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    linear = load_converted(torch.nn.Linear(2, 1), weights, "here", torch.bfloat16)
    assert linear.weight.dtype is torch.bfloat16 and linear.bias == 1
    with pytest.raises(ValueError, match="`here` is no checkpoint of this scorer: (?s:.)*mismatch for weight"):
        load_converted(torch.nn.Linear(3, 1), weights, "here", torch.float32)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("<html>")
    with pytest.raises(ValueError, match=f"{name}` cannot be read as tensors"):
        read_state_dict(tmp_path / name)


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds a `list`"):
        read_state_dict(tmp_path / "weights.pt")
