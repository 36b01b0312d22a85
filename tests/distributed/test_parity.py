# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The same training on one process and on two, under every engine."""

import pytest
import torch
from safetensors.torch import load_file

from tapo_trl import load_policy
from tapo_trl.rewards import load_reward_model
from tapo_trl.runs.checkpoints import last_good_checkpoint
from tests.distributed.comparing import differences, read, tensor_files
from tests.distributed.conftest import FAMILY_PARITY, METHOD_PARITY, RUNS, VIDEO_PARITY, engine_param


pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


def engines_of(run: str) -> list:
    return [engine_param(engine, run=run) for engine in ENGINES if run in RUNS[engine]]


def engine_runs(*runs: str) -> list:
    return [engine_param(engine, run, run=run) for run in runs for engine in ENGINES if run in RUNS[engine]]


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LOGGED = ("loss", "grad_norm", "reward", "reward_std", "kl", "rewards/margins", "rewards/accuracies", "step_01/loss")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("engine", ENGINES)
class TestEngine:
    def test_is_what_it_says(self, results, engine):
        result = results(engine)
        for name, facts in result.facts.items():
            if "error" in facts:
                continue
            assert [process["process_index"] for process in facts["processes"]] == [0, 1]
            for process in facts["processes"]:
                assert process["num_processes"] == 2
                assert process["trainable"] > 0
                assert process.items() >= result.engine.expected.items(), name

    def test_shards_what_it_says(self, results, engine):
        for process in results(engine).facts["tapo"]["processes"]:
            assert process["empty"] == (process["trainable"] if engine == "zero3" else 0)
            assert process["dtensors"] == (process["trainable"] if engine == "fsdp2" else 0)


class TestTAPO:
    @pytest.mark.parametrize(("engine", "run"), engine_runs("tapo", "accumulate", "skipped"))
    def test_weights(self, results, engine, run):
        single, several = results("single"), results(engine)
        trained = single.weights(run)
        assert max(tensor.abs().max() for name, tensor in trained.items() if "lora_B" in name) > 1e-2
        assert largest_difference(several.weights(run), trained) < 1e-5

    @pytest.mark.parametrize(("engine", "run"), engine_runs(*FAMILY_PARITY, *VIDEO_PARITY, *METHOD_PARITY))
    def test_weights_of_other_families_and_methods(self, results, engine, run):
        single, several = results("single"), results(engine)
        trained = single.weights(run)
        assert max(tensor.abs().max() for name, tensor in trained.items() if "lora_B" in name) > 1e-2
        assert largest_difference(several.weights(run), trained) < 1e-5

    @pytest.mark.exhaustive
    def test_weights_where_zero3_keeps_small_ones_whole(self, results):
        assert (
            largest_difference(results("zero3").weights("tapo_kept_whole"), results("single").weights("tapo")) < 1e-5
        )
        assert largest_difference(results("zero3").weights("nft_kept_whole"), results("single").weights("nft")) < 1e-5

    @pytest.mark.parametrize("engine", engines_of("full"))
    def test_weights_of_full_fine_tuning(self, results, job, engine):
        single, several = results("single"), results(engine)
        trained = single.weights("full", TRANSFORMER)
        before = load_file(f"{job['pipeline']}/{TRANSFORMER}")
        assert largest_difference(trained, before) > 1e-3
        assert largest_difference(several.weights("full", TRANSFORMER), trained) < 1e-5

    @pytest.mark.parametrize(("engine", "run"), engine_runs("tapo", "accumulate", "full"))
    def test_logs(self, results, engine, run):
        single, several = results("single").facts[run], results(engine).facts[run]
        steps = [entry for entry in single["log_history"] if "loss" in entry]
        assert len(steps) == RUNS["single"][run]["args"]["max_steps"]
        for expected, found in zip(steps, several["log_history"], strict=False):
            for name in LOGGED:
                assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (name, expected["step"])

    def test_pairs_of_other_steps_on_each_process(self, results):
        single, several = results("single"), results("ddp")
        assert largest_difference(several.weights("subset"), single.weights("subset")) < 1e-5
        logs = [result.facts["subset"]["log_history"] for result in (single, several)]
        for expected, found in zip(*logs, strict=True):
            names = {name for name in expected if name.startswith("step_")}
            assert names == {name for name in found if name.startswith("step_")}
            assert {name: found[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-3
            )
        assert any(name.startswith("step_") for name in logs[0][0])

    @pytest.mark.parametrize("engine", ENGINES)
    def test_every_process_generates_the_same(self, results, engine):
        expected = torch.tensor(results("single").facts["tapo"]["processes"][0]["samples"])
        assert expected.std() > 0.01
        for process in results(engine).facts["tapo"]["processes"]:
            torch.testing.assert_close(torch.tensor(process["samples"]), expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(("engine", "run"), engine_runs("tapo", "tapo_kept_whole"))
    def test_average_of_the_weights(self, results, engine, run):
        """What is saved of it, and what it generates; `worker.py` checks that the trained weights come back."""
        single, several = results("single"), results(engine)
        file = "ema/pytorch_lora_weights.safetensors"
        expected, found = load_file(single.folder / "tapo" / file), load_file(several.folder / run / file)
        assert largest_difference(expected, single.weights("tapo")) > 1e-3
        assert largest_difference(found, expected) < 2e-6
        facts = single.facts["tapo"]["processes"][0]
        averaged, trained = torch.tensor(facts["averaged"]), torch.tensor(facts["samples"])
        assert (averaged - trained).abs().max() > 1e-3
        for process in several.facts[run]["processes"]:
            torch.testing.assert_close(torch.tensor(process["averaged"]), averaged, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("engine", engines_of("full"))
    def test_saved_files_load(self, results, job, engine):
        folder = results(engine).folder
        pipeline = load_policy(job["pipeline"]).pipeline
        pipeline.load_lora_weights(folder / "tapo" / "final")
        assert pipeline.get_active_adapters() == ["default_0"]
        transformer = type(pipeline.transformer).from_pretrained(folder / "full" / "final", subfolder="transformer")
        assert transformer.config["_class_name"] == "SD3Transformer2DModel"

    @pytest.mark.parametrize("engine", engines_of("full"))
    def test_card_names_the_class_of_diffusers(self, results, engine):
        card = (results(engine).folder / "full" / "README.md").read_text()
        assert "transformer = SD3Transformer2DModel.from_pretrained" in card


@pytest.mark.parametrize(("engine", "run"), engine_runs("tapo", "slrm", "slrm_full", "slrm_video", "dina", "lrm"))
def test_evaluation_of_a_dataset_that_is_no_multiple_of_the_batch(results, engine, run):
    """Five rows: what fills up the last batch does not count."""
    single, several = (results(name).facts[run]["log_history"][-1] for name in ("single", engine))
    names = {name for name in single if name.startswith("eval_") and "per_second" not in name} - {"eval_runtime"}
    assert len(names) > {"tapo": 20, "lrm": 5, "dina": 5}.get(run, 10)
    assert names <= several.keys()
    for name in names:
        assert several[name] == pytest.approx(single[name], rel=1e-3, abs=1e-5), name


class TestNotFinite:
    """A reward that is not finite on the second process alone."""

    @pytest.mark.parametrize("engine", engines_of("skipped"))
    def test_all_processes_skip_the_update(self, results, engine):
        for name in ("single", engine):
            steps = [entry for entry in results(name).facts["skipped"]["log_history"] if "loss" in entry]
            assert [entry["skipped_updates"] for entry in steps] == [0, 1, 0]
        assert largest_difference(results("single").weights("skipped"), results("single").weights("tapo")) > 1e-3

    @pytest.mark.parametrize("engine", engines_of("gave_up"))
    def test_all_processes_give_up(self, results, engine):
        facts, folder = results(engine).facts["gave_up"], results(engine).folder / "gave_up"
        for process in facts["processes"]:
            assert "stopped at step 3: 2 updates in a row were skipped" in process["failure"]
            assert "the reward `BadRedness` of a candidate for the prompt 'a " in process["failure"]
        assert last_good_checkpoint(folder) == folder / "checkpoint-3"
        good, last = (tensor_files(folder / f"checkpoint-{step}") for step in (1, 3))
        for name in good:  # DeepSpeed names a folder after the step
            if "safetensors" in name or name == "optimizer.pt":
                assert differences(read(good[name]), read(last[name])) == [], name
        assert any("safetensors" in name for name in good)


@pytest.mark.parametrize(("engine", "run"), engine_runs("slrm", "slrm_full", "slrm_video", "dina", "lrm"))
def test_weights_of_reward_models(results, engine, run):
    single, several = results("single").folder, results(engine).folder
    trained, found = (load_reward_model(folder / run / "final") for folder in (single, several))
    files = [sorted(path.name for path in (folder / run / "final").iterdir()) for folder in (single, several)]
    assert files[0] == files[1]
    assert trained.config["_class_name"] == found.config["_class_name"] == type(trained).__name__
    assert largest_difference(trained.state_dict(), found.state_dict()) < 1e-5


@pytest.mark.parametrize("engine", engines_of("nft"))
def test_nft_weights_and_logs(results, engine):
    single, several = results("single"), results(engine)
    trained = single.weights("nft")
    assert max(tensor.abs().max() for name, tensor in trained.items() if "lora_B" in name) > 1e-2
    assert largest_difference(several.weights("nft"), trained) < 1e-5
    logs = [[entry for entry in result.facts["nft"]["log_history"] if "loss" in entry] for result in (single, several)]
    assert len(logs[0]) == 3 and logs[0][2]["distance/old"] > 1e-6
    for expected, found in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "reward", "distance/old", "distance/ref", "error/positive"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), (name, expected["step"])


@pytest.mark.parametrize("engine", engines_of("uneven"))
def test_uneven_last_batch_is_trained_on(results, engine):
    steps = [entry for entry in results(engine).facts["uneven"]["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]


class TestRefusals:
    @pytest.mark.parametrize("engine", engines_of("lrm_refused"))
    def test_lrm_where_a_scalar_cannot_be_distributed(self, results, engine):
        assert "its temperature `head.logit_scale`" in results(engine).facts["lrm_refused"]["error"]

    def test_processes_that_do_not_know_of_each_other(self, results):
        message = results("zero2").facts["alone"]["error"]
        assert "The launcher started 2 processes, but each of them believes that they are 1" in message
        assert "use_cpu: true" in message

    def test_fsdp_that_does_not_shard(self, results):
        assert "accelerate shards nothing" in results("fsdp2").facts["not_sharded"]["error"]
