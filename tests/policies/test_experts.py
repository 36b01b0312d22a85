# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Wan2.2-T2V-A14B: two transformers, trained as one network."""

import copy
import json
import re

import pytest
import torch
from datasets import Dataset
from diffusers import WanPipeline
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors.torch import load_file

import tapo_trl
from tapo_trl.cli.main import main
from tapo_trl.policies import WanPolicy, load_policy
from tapo_trl.policies.wan_experts import WanExpertsPolicy
from tapo_trl.runs.hub import collect_upload
from tapo_trl.trainer.policy_setup import leave_out_experts, load_trained_policy
from tests.data.preference_pairs import latent_pairs


PROMPTS, LENGTH = ["red cat", "a blue dog that runs"], 24
SIZE = {"height": 32, "width": 32, "num_frames": 5}
FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors")
# Those that are trained on are at 0.95 and 0.69: one for each expert
STEPS = {"num_inference_steps": 8, "num_sde_steps": 2, "num_candidates": 2, "t_init": 1}


def redness(samples, prompts):
    return (samples[:, 0] - samples[:, 1]).flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline."""
    path = tmp_path_factory.mktemp("a14b")
    WanExpertsPolicy.tiny().save_pretrained(path)
    return str(path)


def options(tmp_path, **changed):
    shared = {
        **SIZE,
        "max_steps": 1,
        "max_sequence_length": LENGTH,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "cache_dir": str(tmp_path / "cache"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return shared | changed


def tapo(model, tmp_path, rewards=redness, name="tapo", lora=True, callbacks=None, **changed):
    config = tapo_trl.TAPOConfig(
        str(tmp_path / name), **options(tmp_path, guidance_scale=3.0, beta=1.0, **STEPS | changed)
    )
    data = Dataset.from_dict({"prompt": PROMPTS})
    peft_config = LoraConfig(r=2, lora_alpha=6) if lora else None
    return tapo_trl.TAPOTrainer(
        model, rewards, config, train_dataset=data, peft_config=peft_config, callbacks=callbacks
    )


def slrm(model, tmp_path, name="slrm", **changed):
    args = tapo_trl.SLRMConfig(str(tmp_path / name), **options(tmp_path, num_task_tokens=2, **changed))
    data = latent_pairs(2, (4, 2, 4, 4))
    peft_config = LoraConfig(r=2) if name == "slrm" else None  # others go on
    trainer = tapo_trl.SLRMTrainer(model, args=args, train_dataset=data, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    return args.output_dir


def changed_experts(trainer):
    """Names of the experts whose LoRA is no longer zero."""
    matrices = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    return {name.split(".")[2] for name, parameter in matrices.items() if parameter.any()}


class TestNetwork:
    def test_samples_of_both_experts_in_one_batch(self, folder):
        policy = load_policy(folder)
        assert type(policy) is WanExpertsPolicy and policy.transformer.boundary == 875
        torch.manual_seed(0)
        latents, sigma = torch.randn(4, 4, 2, 4, 4), torch.tensor([0.9, 0.5, 0.875, 0.1])
        prompts = policy.encode_prompts(PROMPTS * 2, LENGTH)
        both = policy.velocity(policy.transformer, latents, sigma, prompts)
        for rows, expert in (([0, 2], "high"), ([1, 3], "low")):
            one = policy.only(expert)
            (name,) = one.experts
            assert type(one) is WanPolicy and policy.uses_expert(name, sigma).nonzero().flatten().tolist() == rows
            alone = one.velocity(one.transformer, latents[rows], sigma[rows], prompts[rows])
            torch.testing.assert_close(both[rows], alone, rtol=0, atol=2e-6)
        both.sum().backward()
        assert all(p.grad is not None for p in policy.transformer.parameters())

    def test_a_guidance_scale_for_each_expert(self, folder):
        policy = load_policy(folder)
        policy.configure_experts(guidance_scale_2=2.0)
        shape, generators = policy.latent_shape(**SIZE), [torch.Generator().manual_seed(seed) for seed in range(2)]
        latents = policy.sample(
            policy.transformer,
            policy.encode_prompts(PROMPTS, LENGTH),
            policy.encode_prompts([""], LENGTH),
            latent_shape=shape,
            num_inference_steps=6,
            guidance_scale=3.0,
            generators=generators,
        )
        pipeline = policy.pipeline
        pipeline.scheduler = policy.build_scheduler(6, shape)
        arguments = {**SIZE, "num_inference_steps": 6, "max_sequence_length": LENGTH, "output_type": "latent"}
        expected, other = (
            pipeline(
                PROMPTS,
                guidance_scale=3.0,
                guidance_scale_2=scale,
                generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
                **arguments,
            ).frames
            for scale in (2.0, 3.0)
        )
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(latents, other, atol=1e-2)

    def test_no_second_scale_without_guidance(self, folder, tmp_path):
        args = tapo_trl.TAPOConfig(str(tmp_path), **options(tmp_path, guidance_scale=1.0, guidance_scale_2=3.0))
        with pytest.raises(ValueError, match="`guidance_scale_2=3` has no effect with `guidance_scale=1`"):
            load_trained_policy(folder, args, LoraConfig(r=2))

    def test_only_for_models_with_two_experts(self, tmp_path):
        policy = load_policy(WanPolicy.tiny())
        for changed in ({"expert": "high"}, {"guidance_scale_2": 3.0}):
            with pytest.raises(ValueError, match=f"`{next(iter(changed))}=.* has one transformer"):
                tapo(policy, tmp_path, **changed)
        with pytest.raises(ValueError, match="no expert `high` to choose"):
            slrm(policy, tmp_path, expert="high")
        with pytest.raises(ValueError, match="`expert` must be one of"):
            tapo_trl.TAPOConfig(str(tmp_path), **options(tmp_path, expert="middle"))


class TestTraining:
    def test_both_experts(self, folder, tmp_path):
        trainer = tapo(folder, tmp_path, callbacks=[tapo_trl.EMACallback(decay=0.5)])
        assert trainer.step_indices == [1, 5]
        trainer.train()
        trainer.save_model()
        assert changed_experts(trainer) == {"transformer", "transformer_2"}
        out = tmp_path / "tapo"
        for files in (out, out / "ema"):
            assert sorted(path.name for path in files.glob("pytorch*")) == sorted(FILES)
        weights = load_file(out / FILES[1])
        assert all(name.startswith("transformer.blocks.") for name in weights)

        # The card's calls
        lines = re.findall(r"^pipeline.load_lora_weights.*$", (out / "README.md").read_text(), re.MULTILINE)
        assert len(lines) == 2
        pipeline = WanPipeline.from_pretrained(folder)
        for line in lines:
            exec(line.replace("path/to/tapo", str(out)), {"pipeline": pipeline})
        loaded, prompts = load_policy(pipeline), trainer.prompt_cache.load(PROMPTS)
        inputs = (torch.randn(2, 4, 2, 4, 4), torch.tensor([0.9, 0.5]), prompts)
        with torch.no_grad():
            expected = trainer.policy.velocity(trainer.model.eval(), *inputs)
            assert torch.equal(loaded.velocity(loaded.transformer, *inputs), expected)
        prompt = tmp_path / "samples"
        command = ["sample", "--prompts", "a cat", "--model_name_or_path", folder, "--lora", str(out), "--output_dir"]
        size = [f"--{name}={value}" for name, value in SIZE.items()]
        assert main([*command, str(prompt), "--num_inference_steps=2", "--guidance_scale_2=2", *size]) == 0

    @pytest.mark.parametrize(("expert", "component"), [("high", "transformer"), ("low", "transformer_2")])
    def test_one_expert(self, folder, tmp_path, expert, component):
        trainer = tapo(folder, tmp_path, expert=expert)
        trained = {name.split(".")[2] for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained == {component} and trainer.step_indices == [1 if expert == "high" else 5]
        trainer.train()
        trainer.save_model()
        file = FILES[("high", "low").index(expert)]
        assert [path.name for path in (tmp_path / "tapo").glob("pytorch*")] == [file]
        card = (tmp_path / "tapo" / "README.md").read_text()
        assert card.count("load_lora_weights") == 1 and ("load_into_transformer_2" in card) == (expert == "low")
        policy = load_policy(folder)
        policy.load_lora_weights(str(tmp_path / "tapo"))
        adapted = {name for name, own in policy.experts.items() if hasattr(own, "peft_config")}
        assert adapted == {component}
        with pytest.raises(ValueError, match="has no LoRA weights"):
            policy.load_lora_weights(str(tmp_path))

    def test_a_file_that_cannot_be_reached_is_no_missing_one(self, folder, monkeypatch):
        def local_file(name, file):
            raise {FILES[0]: EntryNotFoundError, FILES[1]: LocalEntryNotFoundError}[file]("no network")

        monkeypatch.setattr("tapo_trl.policies.wan_experts.local_file", local_file)
        with pytest.raises(LocalEntryNotFoundError, match="no network"):
            load_policy(folder).load_lora_weights("someone/lora")

    def test_one_lora_configuration_for_both_in_turn(self, folder):
        policy, peft_config = load_policy(folder), LoraConfig(r=2)
        for expert, left_out in (("high", "transformer_2"), ("low", "transformer")):
            policy.configure_experts(expert)
            assert leave_out_experts(policy, peft_config).exclude_modules == rf"({left_out})\..*"
        assert peft_config.exclude_modules is None

    def test_engines_that_need_the_same_layers_in_each_process(self, folder, tmp_path):
        for expert in (None, "high"):
            args = tapo_trl.TAPOConfig(str(tmp_path), **options(tmp_path, fsdp="full_shard", expert=expert))
            if expert is None:
                with pytest.raises(ValueError, match="set `expert`, or use DDP"):
                    load_trained_policy(folder, args, LoraConfig(r=2))
            else:
                load_trained_policy(folder, args, LoraConfig(r=2))

    def test_steps_that_do_not_reach_an_expert(self, folder, tmp_path, caplog):
        tapo(folder, tmp_path, num_sde_steps=1)
        assert "No step of the training reaches the expert `transformer_2`" in caplog.text
        with pytest.raises(ValueError, match="`transformer_2`.* 0.948 to 0.948.*would not be trained"):
            tapo(folder, tmp_path, num_sde_steps=1, expert="low")

    @pytest.mark.slow
    @pytest.mark.parametrize("expert", ["high", "low"])
    @pytest.mark.parametrize(
        "method", ["OnlineDiffusionDPO", "FlowGRPO", "DiffusionDPO", "dense_reward", "inversion_dpo"]
    )
    def test_one_expert_by_other_methods(self, folder, tmp_path, method, expert):
        """At the noise levels of that expert alone."""
        changed = {"num_inference_steps": 8, "expert": expert, "guidance_scale": 3.0, "max_steps": 2}
        if "DPO" not in method or method == "OnlineDiffusionDPO":
            changed |= {"num_generations": 2} if method in ("OnlineDiffusionDPO", "FlowGRPO") else {"variant": method}
        method = method if method in ("OnlineDiffusionDPO", "FlowGRPO") else "DiffusionDPO"
        offline = method == "DiffusionDPO"
        trainer = getattr(tapo_trl, f"{method}Trainer")(
            folder,
            *([] if offline else [redness]),
            args=getattr(tapo_trl, f"{method}Config")(str(tmp_path / "out"), **options(tmp_path, **changed)),
            train_dataset=latent_pairs(2, (4, 2, 4, 4)) if offline else Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=LoraConfig(r=2, lora_alpha=6),
        )
        levels, velocity = [], trainer.policy.velocity
        trainer.policy.velocity = lambda model, latents, sigma, *args: (
            (levels.append(torch.as_tensor(sigma)) if torch.is_grad_enabled() else None)
            or velocity(model, latents, sigma, *args)
        )
        trainer.train()
        assert all(((level >= 0.875) == (expert == "high")).all() for level in levels) and len(levels) >= 2
        if offline:
            assert min(trainer.args.eval_sigmas) < 0.7 and max(trainer.args.eval_sigmas) >= 0.9
            evaluated = trainer.sigmas[trainer.eval_steps]
            assert ((evaluated >= 0.875) == (expert == "high")).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("changed", "steps"), [({"num_grad_steps": 1}, None), ({"estimate_range": [1, 5]}, "1, 2")]
    )
    def test_refl_through_the_other_expert(self, folder, tmp_path, changed, steps):
        message = "would not be trained" if steps is None else rf"keep to its steps, \[{steps}"
        with pytest.raises(ValueError, match=message):
            tapo_trl.ReFLTrainer(
                folder,
                redness,
                tapo_trl.ReFLConfig(
                    str(tmp_path), **options(tmp_path, expert="high", num_inference_steps=8, **changed)
                ),
                train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
                peft_config=LoraConfig(r=2),
            )

    @pytest.mark.slow
    @pytest.mark.parametrize("lora", [True, False])
    def test_resumed_bit_for_bit(self, folder, tmp_path, lora):
        saving = {"lora": lora, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
        whole = tapo(folder, tmp_path, **saving)
        whole.train()
        again = tapo(folder, tmp_path, name="again", **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "tapo" / "checkpoint-1"))
        for (name, first), (_, second) in zip(
            whole.model.named_parameters(), again.model.named_parameters(), strict=True
        ):
            assert torch.equal(first, second), name
        if not lora:
            names = {path.parent.name for path in (tmp_path / "tapo" / "checkpoint-2").glob("*/config.json")}
            assert names == {"transformer", "transformer_2"}

    @pytest.mark.slow
    def test_full_fine_tuning_of_one_expert(self, folder, tmp_path):
        trainer = tapo(folder, tmp_path, lora=False, expert="high")
        before = copy.deepcopy(trainer.model)
        trainer.train()
        for name in ("transformer", "transformer_2"):
            pairs = zip(getattr(trainer.model, name).parameters(), getattr(before, name).parameters(), strict=True)
            assert any(not torch.equal(*pair) for pair in pairs) == (name == "transformer")
        trainer.save_model()
        card = (tmp_path / "tapo" / "README.md").read_text()
        assert "transformer=transformer, transformer_2=transformer_2, " in card
        collect_upload(tmp_path / "upload", tmp_path / "tapo", tmp_path / "tapo", is_final=True)
        uploaded = (tmp_path / "upload").rglob("*.safetensors")
        assert {path.parent.name for path in uploaded} == {"transformer", "transformer_2"}


class TestRewardModels:
    def test_two_experts_are_no_base(self, folder, tmp_path):
        with pytest.raises(ValueError, match="starts from one transformer.*set `expert`"):
            slrm(folder, tmp_path)
        with pytest.raises(ValueError, match="starts from one transformer"):
            tapo_trl.DiNaModel.from_policy(load_policy(folder))

    @pytest.mark.parametrize(("expert", "component"), [("high", "transformer"), ("low", "transformer_2")])
    def test_an_slrm_on_one_expert_shares_its_weights(self, folder, tmp_path, expert, component):
        reward = slrm(folder, tmp_path, expert=expert)
        assert json.loads((tmp_path / "slrm" / "config.json").read_text())["base_subfolder"] == component
        trainer = tapo(folder, tmp_path, [reward], share_backbone=True, velocity_target="parent")
        shared = trainer.reward.rewards[0].model.transformer.blocks[0].attn1.to_q.base_layer.weight
        assert shared is trainer.policy.experts[component].blocks[0].attn1.to_q.base_layer.weight
        trainer.train()
        with pytest.raises(ValueError, match=f"`expert=.* was made of the expert `{expert}`"):
            slrm(reward, tmp_path, "other", expert={"high": "low", "low": "high"}[expert])
        slrm(reward, tmp_path, "more")
        with pytest.raises(ValueError, match="which the model that it is to be loaded on does not have"):
            one = load_policy(folder).only({"high": "low", "low": "high"}[expert])
            tapo_trl.SLRMModel.from_pretrained(reward, base_model=one)

    def test_one_on_wan21_fits_by_its_vae(self, folder):
        policy = load_policy(folder)
        wan21 = load_policy(WanPolicy.tiny())
        wan21.pipeline.vae = policy.vae
        tapo_trl.SLRMModel.from_policy(wan21, num_task_tokens=2).check_compatible(policy)


@pytest.mark.slow
def test_dry_run_without_weights(capsys):
    arguments = ["--model_name_or_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--dry_run", "true"]
    arguments += ["--torch_dtype", "bfloat16", "--use_peft", "true", "--num_frames", "5"]
    reward = ["--reward_model", "outputs/none", "--share_backbone", "true"]
    assert main(["tapo", *arguments, *reward]) == 0
    both = capsys.readouterr().out
    assert main(["tapo", *arguments, *reward, "--expert", "high"]) == 0
    one = capsys.readouterr().out
    lora = [int(re.search(r"([\d,]+) LoRA\n", text)[1].replace(",", "")) for text in (both, one)]
    assert lora[0] == 2 * lora[1]
