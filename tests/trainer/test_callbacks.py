# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tapo_trl.callbacks.base import PolicyCallback, TAPOCallback
from tapo_trl.callbacks.ema import EMACallback
from tapo_trl.callbacks.reward_curve import HELD_OUT_REWARD
from tapo_trl.callbacks.reward_guard import RewardHackingGuardCallback, detect_reward_hacking
from tapo_trl.callbacks.samples import SampleGridCallback
from tapo_trl.trainer.policy_setup import make_config_trackable
from tests.testing_utils import tiny_sd3_pipeline


PROMPTS = ["a red square", "a blue square", "a green square"]


class LinearModel(ModelMixin, ConfigMixin):
    """One trainable vector, one frozen one."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.trainable = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)


class StubTrainer(Trainer):
    """What callbacks see of [`TAPOTrainer`]: `policy`, `generate` and `_metrics`. It fits the weights to a target."""

    sample_shape = (3, 8, 8)

    def __init__(self, model, args, callbacks, policy=None, rewards=None):
        self.policy = policy
        self._metrics = {"train": defaultdict(list)}
        self.rewards = rewards
        self.generated = []
        if isinstance(model, ModelMixin):
            make_config_trackable(model)
        super().__init__(
            model=model, args=args, train_dataset=[{"x": float(i)} for i in range(64)], callbacks=callbacks
        )
        for callback in callbacks:
            if isinstance(callback, TAPOCallback):
                callback.attach(self)

    def compute_loss(self, model, inputs, **kwargs):
        if self.rewards is not None:
            self._metrics["train"]["reward"].append(torch.tensor(float(self.rewards[self.state.global_step])))
        return sum((p - 5.0).square().sum() for p in model.parameters() if p.requires_grad)

    def log(self, logs, start_time=None):
        averages = {name: torch.stack(values).mean().item() for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        super().log({**logs, **averages}, start_time)

    def generate(self, prompts, seed=0, num_inference_steps=None, guidance_scale=None):
        weight = next(p for p in self.model.parameters() if p.requires_grad).detach().flatten()[0]
        self.generated.append((self.state.global_step, weight.item()))
        noise = [
            torch.rand(self.sample_shape, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(prompts))
        ]
        return (torch.stack(noise) * torch.sigmoid(weight / 4)).clamp(0, 1)


def collate(rows):
    return {"x": torch.tensor([row["x"] for row in rows])}


def training_args(folder, **kwargs):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": 6,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**options, **kwargs})


def run(folder, callbacks, model=None, resume=None, **kwargs):
    rewards, policy = kwargs.pop("rewards", None), kwargs.pop("policy", None)
    trainer = StubTrainer(model or LinearModel(), training_args(folder, **kwargs), callbacks, policy, rewards)
    trainer.data_collator = collate
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class RecordWeights(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.trainable.detach().clone())


class TestTAPOCallback:
    def test_unattached_names_the_fix(self):
        with pytest.raises(RuntimeError, match=r"TAPOTrainer\(callbacks=.* `DiffusionDPOTrainer\(callbacks="):
            _ = SampleGridCallback(PROMPTS, every_n_steps=1).trainer

    def test_is_the_callback_of_every_policy_trainer(self):
        assert TAPOCallback is PolicyCallback


@pytest.fixture
def video_trainer(monkeypatch):
    monkeypatch.setattr(StubTrainer, "sample_shape", (3, 5, 8, 8))
    monkeypatch.setattr(TrainingArguments, "fps", 5, raising=False)


class TestSampleGridCallback:
    def test_a_single_prompt_is_not_split_into_letters(self):
        assert SampleGridCallback("a cat", 1).prompts == ["a cat"]

    def test_grids_at_start_every_k_steps_and_end(self, tmp_path):
        run(tmp_path, [SampleGridCallback(PROMPTS, every_n_steps=4)], max_steps=6)
        names = sorted(path.name for path in (tmp_path / "samples").glob("*.png"))
        assert names == ["step_000000.png", "step_000004.png", "step_000006.png"]
        assert (tmp_path / "samples" / "prompts.txt").read_text().splitlines() == PROMPTS

    def test_no_second_grid_when_the_end_is_due_anyway(self, tmp_path):
        trainer = run(tmp_path, [SampleGridCallback(PROMPTS, every_n_steps=3)], max_steps=6)
        assert [step for step, _ in trainer.generated] == [0, 3, 6]

    def test_same_seed_same_weights_same_grid(self, tmp_path):
        pixels = []
        for name, seed, learning_rate in (("a", 0, 0.0), ("b", 0, 0.1), ("c", 1, 0.0)):
            callback = SampleGridCallback(PROMPTS, every_n_steps=2, seed=seed)
            run(tmp_path / name, [callback], max_steps=2, learning_rate=learning_rate)
            pixels.append(
                [np.asarray(Image.open(tmp_path / name / "samples" / f"step_{step:06d}.png")) for step in (0, 2)]
            )
        frozen, trained, reseeded = pixels
        assert (frozen[0] == frozen[1]).all(), "nothing was trained, so nothing may change"
        assert (frozen[0] == trained[0]).all(), "the same weights and seeds"
        assert (trained[0] != trained[1]).any(), "the weights changed"
        assert (frozen[0] != reseeded[0]).any(), "the seed changed"

    def test_draws_with_the_average(self, tmp_path):
        ema = EMACallback(decay=0.9)
        plain, averaged = SampleGridCallback(PROMPTS, 6), SampleGridCallback(PROMPTS, 6, ema=ema)
        trainer = run(tmp_path, [ema, plain, averaged])
        (_, trained), (_, average) = trainer.generated[-2:]
        assert trained == trainer.model.trainable[0].item()
        assert average == ema.ema.shadow_params[0][0].item()
        assert average != trained

    def test_resumed_run_does_not_repeat_the_first_grid(self, tmp_path):
        run(tmp_path, [SampleGridCallback(PROMPTS, 3)], max_steps=3, save_strategy="steps", save_steps=3)
        trainer = run(tmp_path, [SampleGridCallback(PROMPTS, 3)], resume=str(tmp_path / "checkpoint-3"))
        assert [step for step, _ in trainer.generated] == [6]

    def test_other_processes_generate_but_do_not_write(self, tmp_path):
        callback = SampleGridCallback(PROMPTS, every_n_steps=1)
        trainer = StubTrainer(LinearModel(), training_args(tmp_path), [callback])
        callback.on_step_end(
            trainer.args, TrainerState(global_step=1, is_world_process_zero=False), TrainerControl(), model=None
        )
        assert len(trainer.generated) == 1
        assert not (tmp_path / "samples").exists()

    def test_goes_to_tensorboard(self, tmp_path):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        run(tmp_path, [SampleGridCallback(PROMPTS, every_n_steps=3)], report_to="tensorboard")
        folder = next(tmp_path.rglob("samples/events.out*")).parent
        steps = []
        for file in sorted(folder.iterdir()):
            events = event_accumulator.EventAccumulator(str(file)).Reload()
            steps += [image.step for image in events.Images("samples")]
        assert sorted(steps) == [0, 3, 6]

    def test_videos_side_by_side_and_a_strip_of_their_frames(self, tmp_path, video_trainer):
        av = pytest.importorskip("av")
        run(tmp_path, [SampleGridCallback(PROMPTS, every_n_steps=6)])
        files = sorted(path.name for path in (tmp_path / "samples").iterdir())
        assert files == ["prompts.txt", "step_000000.mp4", "step_000000.png", "step_000006.mp4", "step_000006.png"]
        with av.open(str(tmp_path / "samples" / "step_000006.mp4")) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.average_rate == 5
        assert len(frames) == 5
        assert frames[0].shape == (256, 256, 3), "three videos of 8 x 8 in a 2 x 2 grid, enlarged"
        assert np.asarray(Image.open(tmp_path / "samples" / "step_000006.png")).shape == (3 * 128, 5 * 128, 3)

    def test_videos_go_to_tensorboard(self, tmp_path, video_trainer):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        pytest.importorskip("av")
        run(tmp_path, [SampleGridCallback(PROMPTS, every_n_steps=3)], report_to="tensorboard")
        folder = next(tmp_path.rglob("samples/events.out*")).parent
        seen = {"samples": [], "samples_video": []}
        for file in sorted(folder.iterdir()):
            events = event_accumulator.EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["images"]:
                seen[tag] += [(image.step, image.encoded_image_string[:4]) for image in events.Images(tag)]
        assert sorted(seen["samples"]) == [(step, b"\x89PNG") for step in (0, 3, 6)]
        assert sorted(seen["samples_video"]) == [(step, b"GIF8") for step in (0, 3, 6)]

    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_videos_go_to_other_trackers(self, tmp_path, video_trainer, monkeypatch, name):
        pytest.importorskip("av")
        logged = []
        tracker = SimpleNamespace(
            Image=lambda picture: ("image", picture.size),
            Video=lambda path, format: ("video", Path(path).name, format),
            log=logged.append,
        )
        monkeypatch.setitem(sys.modules, name, tracker)
        callback = SampleGridCallback(PROMPTS, every_n_steps=6)
        trainer = StubTrainer(LinearModel(), training_args(tmp_path), [callback])
        trainer.args.report_to = [name]
        callback.on_train_begin(trainer.args, TrainerState(), TrainerControl())
        assert logged == [
            {
                "samples": ("image", (5 * 128, 3 * 128)),
                "samples_video": ("video", "step_000000.mp4", "mp4"),
                "train/global_step": 0,
            }
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"prompts": []}, "`prompts`"), ({"every_n_steps": 0}, "`every_n_steps` must be at least 1")],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            SampleGridCallback(**{"prompts": PROMPTS, "every_n_steps": 1, **options})


class TestEMACallback:
    def test_value_follows_the_formula(self, tmp_path):
        ema, record = EMACallback(decay=0.3), RecordWeights()
        run(tmp_path, [ema, record])
        average = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        for step, weight in enumerate(record.weights, start=1):
            decay = min(0.3, step / (9 + step)) if step > 1 else 0.0
            average = decay * average + (1 - decay) * weight.double()
        torch.testing.assert_close(ema.ema.shadow_params[0].double(), average, rtol=1e-6, atol=1e-6)
        assert len(ema.ema.shadow_params) == 1, "the frozen vector is not averaged"

    def test_average_of_bf16_weights_is_float32(self, tmp_path):
        model = LinearModel().to(torch.bfloat16)
        ema = EMACallback(decay=0.9)
        run(tmp_path, [ema], model=model)
        assert ema.ema.shadow_params[0].dtype == torch.float32
        assert model.trainable.dtype == torch.bfloat16

    def test_context_manager_restores_the_weights(self, tmp_path):
        ema = EMACallback(decay=0.9)
        trainer = run(tmp_path, [ema])
        trained = trainer.model.trainable.detach().clone()
        with pytest.raises(KeyError), ema.average_parameters():
            assert torch.equal(trainer.model.trainable, ema.ema.shadow_params[0])
            assert not torch.equal(trainer.model.trainable, trained)
            raise KeyError
        assert torch.equal(trainer.model.trainable, trained)

    def test_resume_is_exact(self, tmp_path):
        whole, first, second = EMACallback(0.9), EMACallback(0.9), EMACallback(0.9)
        run(tmp_path / "whole", [whole])
        run(tmp_path / "parts", [first], max_steps=3, save_strategy="steps", save_steps=3)
        assert (tmp_path / "parts" / "checkpoint-3" / "ema.safetensors").is_file()
        run(tmp_path / "parts", [second], resume=str(tmp_path / "parts" / "checkpoint-3"))
        assert second.ema.optimization_step == whole.ema.optimization_step == 6
        assert torch.equal(second.ema.shadow_params[0], whole.ema.shadow_params[0])

    def test_resume_from_another_folder(self, tmp_path):
        first = EMACallback(0.9)
        run(tmp_path / "old", [first], max_steps=3, save_strategy="steps", save_steps=3)
        checkpoint = str(tmp_path / "old" / "checkpoint-3")
        with pytest.raises(FileNotFoundError, match="`resume_from`"):
            run(tmp_path / "new", [EMACallback(0.9)], resume=checkpoint)
        second = EMACallback(0.9, resume_from=checkpoint)
        run(tmp_path / "new", [second], resume=checkpoint)
        assert second.ema.optimization_step == 6

    def test_resume_with_other_shapes(self, tmp_path):
        ema = EMACallback(0.9)
        trainer = run(tmp_path, [ema], max_steps=3, save_strategy="steps", save_steps=3)
        trainer.model.trainable = torch.nn.Parameter(torch.zeros(7))
        with pytest.raises(ValueError, match="does not fit"):
            ema._load(tmp_path / "checkpoint-3" / "ema.safetensors")

    def test_writes_loadable_lora_weights_at_the_end(self, tmp_path, tiny_sd3_policy):
        policy = tiny_sd3_policy
        model = get_peft_model(
            policy.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights="gaussian")
        )
        ema = EMACallback(0.9)
        make_config_trackable(policy.transformer)
        run(tmp_path, [ema], model=model, policy=policy)
        weights = load_file(tmp_path / "ema" / "pytorch_lora_weights.safetensors")
        with ema.average_parameters():
            averaged = {
                name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
            }
        assert set(averaged) == {name for name in averaged if "lora" in name}
        assert len(weights) == len(averaged) > 2
        for name, value in averaged.items():
            key = name.replace("base_model.model.", "transformer.").replace(".default", "")
            assert torch.equal(weights[key], value)
        pipeline = tiny_sd3_pipeline()
        pipeline.load_lora_weights(str(tmp_path / "ema"))
        layer = pipeline.transformer.transformer_blocks[0].attn.to_q
        assert next(iter(layer.scaling.values())) == 3.0

    def test_writes_the_transformer_of_a_full_run(self, tmp_path, tiny_sd3_policy):
        policy = tiny_sd3_policy
        ema = EMACallback(0.9)
        run(tmp_path, [ema], model=policy.transformer, policy=policy)
        loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "ema" / "transformer")
        with ema.average_parameters():
            for name, value in policy.transformer.named_parameters():
                assert torch.equal(loaded.get_parameter(name), value), name

    def test_other_processes_write_nothing(self, tmp_path):
        ema = EMACallback(0.9)
        trainer = StubTrainer(LinearModel(), training_args(tmp_path), [ema])
        state = TrainerState(global_step=0, is_world_process_zero=False)
        optimizer = SimpleNamespace(step_was_skipped=False)
        for event in (ema.on_train_begin, ema.on_step_end, ema.on_save, ema.on_train_end):
            event(trainer.args, state, TrainerControl(), optimizer=optimizer)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("decay", [-0.1, 1.0])
    def test_bad_decay(self, decay):
        with pytest.raises(ValueError, match="`decay` must be in"):
            EMACallback(decay=decay)


def history(held_out, rewards):
    """Log history with a check at step 0 and one after every reward."""
    entries = [{"step": 0, HELD_OUT_REWARD: held_out[0]}]
    for step, (check, reward) in enumerate(zip(held_out[1:], rewards, strict=True), start=1):
        entries += [{"step": 10 * step - 5, "reward": reward}, {"step": 10 * step, HELD_OUT_REWARD: check}]
    return entries


class TestDetectRewardHacking:
    @pytest.mark.parametrize(
        ("held_out", "rewards", "verdict"),
        [
            pytest.param([1.0, 1.2, 1.1, 1.0], [1, 2, 3], True, id="falls while the training reward rises"),
            pytest.param([1.0, 1.2, 1.1], [1, 2], False, id="one bad check is within the patience"),
            pytest.param([1.0, 1.2, 1.1, 1.3], [1, 2, 3], False, id="recovered"),
            pytest.param([1.0, 1.1, 1.2, 1.3], [1, 2, 3], False, id="both rise"),
            pytest.param([1.0, 1.2, 1.1, 1.0], [3, 2, 1], False, id="both fall: training fails, nothing is exploited"),
            pytest.param([1.0, 0.9, 0.8, 0.7], [1, 2, 3], True, id="falls from the start"),
            pytest.param([1.0, 1.2, 1.19, 1.18], [1, 2, 3], False, id="smaller than min_drop"),
            pytest.param([1.0], [], False, id="first check"),
            pytest.param([1.2, 1.0, 1.3, 1.0, 1.3, 1.0], [1, 2, 3, 4, 5], False, id="never twice in a row"),
        ],
    )
    def test_verdict(self, held_out, rewards, verdict):
        assert detect_reward_hacking(history(held_out, rewards), patience=2, min_drop=0.05) is verdict

    def test_training_reward_is_the_mean_between_checks(self):
        entries = [{HELD_OUT_REWARD: 1.0}, {"reward": 0.0}, {"reward": 4.0}, {HELD_OUT_REWARD: 1.1}]
        assert not detect_reward_hacking([*entries, {"reward": 1.5}, {HELD_OUT_REWARD: 0.5}], 1, 0.0)
        assert detect_reward_hacking([*entries, {"reward": 2.5}, {HELD_OUT_REWARD: 0.5}], 1, 0.0)


class TestRewardHackingGuardCallback:
    def guard(self, scores, **kwargs):
        scores = iter(scores)
        return RewardHackingGuardCallback(
            lambda images, prompts: torch.full((len(prompts),), next(scores)), PROMPTS, every_n_steps=2, **kwargs
        )

    def test_stops_when_the_held_out_reward_falls(self, tmp_path):
        guard = self.guard([1.0, 2.0, 1.5, 1.0, 0.5, 0.0], action="stop")
        trainer = run(tmp_path, [guard], max_steps=10, rewards=range(10))
        assert trainer.state.global_step == 6, "the second bad check in a row is that of step 6"

    def test_warning_lets_the_run_go_on(self, tmp_path, monkeypatch):
        messages = []
        monkeypatch.setattr("tapo_trl.trainer.callbacks.logger.warning", messages.append)
        trainer = run(tmp_path, [self.guard([3.0, 2.0, 1.0, 0.5])], rewards=range(6))
        assert trainer.state.global_step == 6
        assert len(messages) == 1
        assert messages[0].startswith("Step 6: the held-out reward has fallen to 0.5 while")

    @pytest.mark.parametrize(
        ("scores", "rewards"),
        [([1.0, 1.1, 1.2, 1.3], range(6)), ([3.0, 2.0, 1.0, 0.5], range(6, 0, -1))],
        ids=["held-out reward rises", "training reward falls too"],
    )
    def test_stays_silent(self, tmp_path, monkeypatch, scores, rewards):
        monkeypatch.setattr("tapo_trl.trainer.callbacks.logger.warning", lambda message: pytest.fail(message))
        trainer = run(tmp_path, [self.guard(scores, action="stop")], rewards=rewards)
        assert trainer.state.global_step == 6

    def test_logs_every_check_beside_the_training_reward(self, tmp_path):
        trainer = run(tmp_path, [self.guard([1.0, 1.1, 1.2, 1.3])], rewards=range(6), logging_steps=100)
        checks = [entry for entry in trainer.state.log_history if HELD_OUT_REWARD in entry]
        assert [entry["step"] for entry in checks] == [0, 2, 4, 6]
        assert [entry[HELD_OUT_REWARD] for entry in checks] == pytest.approx([1.0, 1.1, 1.2, 1.3])
        assert [entry["reward"] for entry in checks[1:]] == [0.5, 2.5, 4.5]

    def test_verdict_survives_a_resume(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 4, "rewards": range(10)}
        run(tmp_path, [self.guard([2.0, 2.5, 1.5], action="stop")], max_steps=4, **options)
        trainer = run(
            tmp_path,
            [self.guard([1.0], action="stop")],
            resume=str(tmp_path / "checkpoint-4"),
            max_steps=10,
            **options,
        )
        assert trainer.state.global_step == 6, "one bad check before the resume, one after"

    @pytest.mark.parametrize(
        ("scores", "message"),
        [(torch.zeros(2), "one score per image"), (torch.tensor([0.0, float("nan"), 1.0]), "must be finite")],
    )
    def test_bad_scores(self, tmp_path, scores, message):
        guard = RewardHackingGuardCallback(lambda images, prompts: scores, PROMPTS, every_n_steps=2)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, [guard])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": []}, "`prompts`"),
            ({"every_n_steps": 0}, "`every_n_steps`"),
            ({"patience": 0}, "`patience`"),
            ({"min_drop": -1.0}, "`min_drop`"),
            ({"action": "halt"}, "`action`"),
        ],
    )
    def test_bad_options(self, options, message):
        defaults = {"reward_fn": lambda images, prompts: [0.0], "prompts": PROMPTS, "every_n_steps": 1}
        with pytest.raises(ValueError, match=message):
            RewardHackingGuardCallback(**{**defaults, **options})
