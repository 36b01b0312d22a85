# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from tapo_trl.policies import load_policy
from tapo_trl.policies.loading import parse_dtype, pop_dtype
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SD3 and Wan in float32, SD3 as the variant `fp16`, and SD3 in a cache of the Hub."""
    folder = tmp_path_factory.mktemp("pipelines")
    tiny_sd3_pipeline().save_pretrained(folder / "sd3")
    tiny_wan_pipeline().save_pretrained(folder / "wan")
    tiny_sd3_pipeline().to(torch.float16).save_pretrained(folder / "variant", variant="fp16")
    repository, commit = folder / "cache" / "models--me--tiny", "0" * 40
    shutil.copytree(folder / "sd3", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


class TestDtype:
    @pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", "BF16", torch.bfloat16])
    def test_words(self, name):
        assert parse_dtype(name) is torch.bfloat16

    def test_others(self):
        assert (parse_dtype(None), parse_dtype("auto")) == (None, "auto")
        assert [parse_dtype(name) for name in ("fp32", "half", "float16")] == [torch.float32, *[torch.float16] * 2]

    @pytest.mark.parametrize("name", ["bfloat", "int8", torch.int8, 16])
    def test_no_precision(self, name):
        with pytest.raises(ValueError, match="`torch_dtype` must be one of .*'bf16'"):
            pop_dtype({"torch_dtype": name})

    def test_both_names(self):
        kwargs = {"torch_dtype": "bf16", "dtype": torch.bfloat16, "revision": "main"}
        assert pop_dtype(kwargs) is torch.bfloat16 and kwargs == {"revision": "main"}
        assert pop_dtype({"dtype": "fp16"}) is torch.float16
        with pytest.raises(ValueError, match="`torch_dtype=torch.float32` and `dtype=torch.bfloat16` are two names"):
            pop_dtype({"torch_dtype": "float32", "dtype": "bf16"})

    @pytest.mark.parametrize("kwargs", [{"dtype": "bf16"}, {"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}])
    def test_of_a_pipeline(self, folders, kwargs):
        policy = load_policy(str(folders / "sd3"), **kwargs)
        assert policy.transformer.dtype == policy.vae.dtype == policy.pipeline.text_encoder.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "kwargs", [{"dtype": "bf16"}, {"torch_dtype": torch.bfloat16}, {"dtype": {"default": "bf16"}}]
    )
    def test_the_vae_of_wan_stays_in_float32(self, folders, kwargs):
        policy = load_policy(str(folders / "wan"), **kwargs)
        assert (policy.transformer.dtype, policy.vae.dtype) == (torch.bfloat16, torch.float32)

    def test_auto_is_what_was_saved(self, folders):
        policy = load_policy(str(folders / "variant"), torch_dtype="auto", variant="fp16")
        assert policy.transformer.dtype == torch.float16
        assert load_policy(str(folders / "sd3"), dtype="auto").transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("revison", "Did you mean `revision`?"),
        ("text_encoder3", "Did you mean `text_encoder_3`?"),
        ("attn_implementation", r"There are \['cache_dir', .*'variant'"),
    ],
)
def test_unknown_arguments(folders, name, hint):
    with pytest.raises(ValueError, match=f"`{name}` is no argument with which this model can be loaded. {hint}"):
        load_policy(str(folders / "sd3"), **{name: None})


def test_arguments_of_diffusers(folders):
    known = {"image_encoder": None, "text_encoder_3": None, "low_cpu_mem_usage": True, "disable_mmap": False}
    assert load_policy(str(folders / "sd3"), **known).pipeline.text_encoder_3 is None


class TestHubArguments:
    @pytest.mark.parametrize("kwargs", [{}, {"local_files_only": True}, {"revision": "main"}, {"torch_dtype": "auto"}])
    def test_a_cache_elsewhere_without_a_network(self, folders, kwargs):
        policy = load_policy("me/tiny", cache_dir=str(folders / "cache"), **kwargs)
        assert (policy.name_or_path, policy.revision) == ("me/tiny", kwargs.get("revision"))

    def test_every_request_gets_them(self, folders, monkeypatch):
        seen, load_config = [], DiffusionPipeline.load_config

        def record(name, **kwargs):
            if name == "me/tiny":  # rather than the files that have been found
                seen.append(kwargs)
            return load_config(name, **kwargs)

        monkeypatch.setattr(DiffusionPipeline, "load_config", record)
        hub = {"token": "secret", "cache_dir": str(folders / "cache"), "local_files_only": True, "revision": "main"}
        load_policy("me/tiny", **hub)
        assert seen and all(hub.items() <= kwargs.items() for kwargs in seen)

    def test_variant(self, folders):
        assert load_policy(str(folders / "variant"), variant="fp16").variant == "fp16"

    def test_folders(self, folders, monkeypatch):
        monkeypatch.setenv("HOME", str(folders))
        assert load_policy("~/sd3").name_or_path == str(folders / "sd3")
        assert load_policy(str(folders), subfolder="sd3").modality == "image"
        with pytest.raises(ValueError, match="There is no folder ~/no, and"):
            load_policy("~/no")
        with pytest.raises(ValueError, match="no folder `other` .`subfolder`."):
            load_policy(str(folders), subfolder="other")
