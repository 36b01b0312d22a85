# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import logging

import pytest
import torch
from datasets import Dataset

from tapo_trl.data import PromptCache, default_prompts
from tapo_trl.data import prompts as prompts_module
from tapo_trl.data.prompts import ROW_COLUMN, prepare_prompts
from tapo_trl.policies import SD3Policy, load_policy
from tests.testing_utils import tiny_sd3_pipeline as make_pipeline


PROMPTS = ["a red fox", "cat", "cat", ""]


class Processor:
    """Without the attributes that a tokenizer has."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


class TestPromptCache:
    def test_gives_back_what_the_encoders_said_after_they_are_gone(self, tiny_sd3_policy, tmp_path):
        cache = PromptCache(tiny_sd3_policy, tmp_path, max_sequence_length=3)
        expected = tiny_sd3_policy.encode_prompts(["a red fox", "cat", ""], 3)
        cache.encode(PROMPTS)
        tiny_sd3_policy.unload_text_encoders()
        embeds = cache.load(["cat", "a red fox"])
        torch.testing.assert_close(embeds.prompt_embeds, expected.prompt_embeds[[1, 0]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embeds.pooled_prompt_embeds, expected.pooled_prompt_embeds[[1, 0]])
        with pytest.raises(KeyError, match="owl"):
            cache.load(["owl"])

    def test_every_prompt_is_encoded_once(self, tiny_sd3_policy, tmp_path, monkeypatch):
        seen, encode = [], SD3Policy.encode_prompts

        def record(self, prompts, *args):
            seen.extend(prompts)
            return encode(self, prompts, *args)

        monkeypatch.setattr(SD3Policy, "encode_prompts", record)
        PromptCache(tiny_sd3_policy, tmp_path, 3).encode(PROMPTS)
        assert seen == ["a red fox", "cat", ""]
        PromptCache(tiny_sd3_policy, tmp_path, 3).encode([*PROMPTS, "owl"])
        assert seen[3:] == ["owl"]
        assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}

    def test_says_what_many_prompts_take(self, tiny_sd3_policy, tmp_path, monkeypatch, caplog):
        cache = PromptCache(tiny_sd3_policy, tmp_path, 3)
        cache.encode(PROMPTS)
        assert "GB" not in caplog.text
        (size,) = {path.stat().st_size // 1000 for path in cache.folder.iterdir()}  # in kB
        monkeypatch.setattr(prompts_module, "LARGE_CACHE", 40 * 1000 * size)
        cache.encode([f"prompt {index}" for index in range(39)])
        assert "GB" not in caplog.text
        cache.encode([f"another {index}" for index in range(60)])
        assert f"of 60 prompts will take about 0.0 GB in {cache.folder}: 0.0 MB each" in caplog.text

    def test_a_short_tokenizer_is_not_warned_about(self, tmp_path, caplog):
        policy = SD3Policy(make_pipeline())
        policy.pipeline.tokenizer.model_max_length = 2
        library = logging.getLogger("transformers.tokenization_utils_base")
        library.addHandler(caplog.handler)
        try:
            PromptCache(policy, tmp_path, 3)
            assert not caplog.text
            policy.pipeline.tokenizer("a red fox")
            assert "longer than the specified maximum" in caplog.text
        finally:
            library.removeHandler(caplog.handler)

    def test_half_precision_halves_the_files_and_leaves_half_precision_alone(self, tmp_path):
        policy = SD3Policy(make_pipeline())
        full, half = (PromptCache(policy, tmp_path, 3, dtype) for dtype in (None, torch.bfloat16))
        for cache in (full, half):
            cache.encode(["a red fox"])
        expected, embeds = full.load(["a red fox"]), half.load(["a red fox"])
        assert expected.prompt_embeds.dtype == torch.float32
        assert torch.equal(embeds.prompt_embeds, expected.prompt_embeds.bfloat16())
        assert torch.equal(embeds.pooled_prompt_embeds, expected.pooled_prompt_embeds.bfloat16())
        assert full.folder != half.folder
        half = PromptCache(SD3Policy(make_pipeline().to(torch.float16)), tmp_path, 3, torch.bfloat16)
        half.encode(["a red fox"])
        assert half.load(["a red fox"]).prompt_embeds.dtype == torch.float16

    def test_zeros_that_fill_up_a_prompt_are_not_stored(self, tiny_wan_policy, tmp_path):
        cache = PromptCache(tiny_wan_policy, tmp_path, 512)
        cache.encode(["a red fox"])
        (file,) = cache.folder.iterdir()
        expected = tiny_wan_policy.encode_prompts(["a red fox"], 512).prompt_embeds
        assert file.stat().st_size < expected.nbytes / 10
        assert torch.equal(cache.load(["a red fox"]).prompt_embeds, expected)
        assert cache.load(["a red fox"]).pooled_prompt_embeds is None

    def test_other_encoders_and_lengths_have_folders_of_their_own(self, tiny_sd3_policy, tmp_path):
        folders = {
            PromptCache(tiny_sd3_policy, tmp_path, 3).folder,
            PromptCache(tiny_sd3_policy, tmp_path, 4).folder,
            PromptCache(SD3Policy(make_pipeline(seed=1)), tmp_path, 3).folder,
            PromptCache(SD3Policy(make_pipeline().to(torch.float16)), tmp_path, 3).folder,
            PromptCache(tiny_sd3_policy, tmp_path, 3, torch.bfloat16).folder,
        }
        assert len(folders) == 5
        assert PromptCache(SD3Policy(make_pipeline()), tmp_path, 3).folder in folders

    def test_all_that_embeddings_depend_on_has_folders_of_its_own(self, tmp_path):
        def swap_two_tokens(pipeline):
            vocabulary = pipeline.tokenizer.get_vocab()
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            pipeline.tokenizer = type(pipeline.tokenizer)(vocab=vocabulary, merges=[], model_max_length=8)

        def shorten(pipeline):
            pipeline.tokenizer_2.model_max_length = 7

        def pad_with_another_token(pipeline):
            pipeline.tokenizer.pad_token = "a"

        def pad_before(pipeline):
            pipeline.tokenizer_2.padding_side = "left"

        def change_one_token(pipeline):
            pipeline.text_encoder.get_input_embeddings().weight.data[40, 7] += 1e-3

        def change_activation(pipeline):
            pipeline.text_encoder_2.config.hidden_act = "gelu"

        def leave_one_out(pipeline):
            pipeline.text_encoder_2 = None

        def change_nothing(pipeline):
            pipeline.transformer.proj_out.weight.data += 1

        changes = (
            swap_two_tokens,
            shorten,
            pad_with_another_token,
            pad_before,
            change_one_token,
            change_activation,
            leave_one_out,
            change_nothing,
        )
        folders = []
        for change in changes:
            pipeline = make_pipeline()
            change(pipeline)
            folders.append(PromptCache(SD3Policy(pipeline), tmp_path, 3).folder)
        assert len(set(folders)) == len(changes)
        assert folders[-1] == PromptCache(SD3Policy(make_pipeline()), tmp_path, 3).folder
        wider = make_pipeline(joint_attention_dim=40)
        assert PromptCache(SD3Policy(wider), tmp_path, 3).folder not in folders

    def test_a_tokenizer_may_be_in_a_processor(self, tiny_wan_policy, tmp_path, monkeypatch):
        folder, tokenizer = PromptCache(tiny_wan_policy, tmp_path).folder, tiny_wan_policy.pipeline.tokenizer
        monkeypatch.setattr(tiny_wan_policy.pipeline, "tokenizer", Processor(tokenizer))
        assert PromptCache(tiny_wan_policy, tmp_path).folder == folder

    def test_a_pipeline_from_a_folder_finds_what_one_in_memory_left(self, tmp_path):
        make_pipeline().save_pretrained(tmp_path / "pipeline")
        loaded = PromptCache(load_policy(str(tmp_path / "pipeline")), tmp_path, 3)
        assert loaded.folder == PromptCache(SD3Policy(make_pipeline()), tmp_path, 3).folder
        loaded.encode(["a red fox"])  # truncation and padding, which a tokenizer remembers, do not matter
        assert PromptCache(loaded.policy, tmp_path, 3).folder == loaded.folder


class TestPrompts:
    def test_the_package_has_prompts(self):
        prompts = default_prompts()["prompt"]
        assert len(prompts) > 200 and len(set(prompts)) == len(prompts) and all(prompts)

    def test_rows_are_numbered(self):
        dataset = prepare_prompts(Dataset.from_dict({"prompt": ["a", "b"], "label": [3, 4]}), "train_dataset")
        assert dataset[ROW_COLUMN] == [0, 1] and dataset["label"] == [3, 4]
        assert prepare_prompts(dataset, "train_dataset")[ROW_COLUMN] == [0, 1]

    @pytest.mark.parametrize("format", ["torch", "numpy", "pandas", "arrow"])
    def test_the_format_does_not_matter(self, format):
        dataset = Dataset.from_dict({"prompt": ["a", "b"], "label": [3, 4]})
        plain = prepare_prompts(dataset, "train_dataset")
        for formatted in (dataset.with_format(format), dataset.with_format(format, columns=["label"])):
            rows = [prepare_prompts(formatted, "train_dataset")[row] for row in range(2)]
            assert rows == [plain[0], plain[1]] and type(rows[1][ROW_COLUMN]) is int

    @pytest.mark.parametrize("rows", [[2, 0], [1, 2], [2, 0, 2]])
    def test_selected_rows_are_numbered_and_not_copied(self, rows, monkeypatch):
        if len(set(rows)) == len(rows):
            monkeypatch.setattr(Dataset, "flatten_indices", lambda *args, **kwargs: pytest.fail("rows were copied"))
        selected = Dataset.from_dict({"prompt": ["a", "b", "c"], "tapo_row": [7, 8, 9]}).select(rows)
        prepared = prepare_prompts(selected, "train_dataset")
        assert list(prepared) == [{"prompt": "abc"[row], ROW_COLUMN: index} for index, row in enumerate(rows)]

    def test_a_transform_is_refused(self):
        dataset = Dataset.from_dict({"prompt": ["a"]}).with_transform(lambda rows: {"prompt": ["b"]})
        with pytest.raises(ValueError, match=r"`train_dataset` has a transform .*`train_dataset.map\(...\)`"):
            prepare_prompts(dataset, "train_dataset")
