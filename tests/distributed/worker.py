# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Runs trainings and writes down what they were: the file that the tests of this folder start on several processes.

    accelerate launch ... worker.py JOB.json

A job is `{"pipeline": folder, "reward": folder, "pairs": folder, "output_dir": folder, "runs": {name: run}}`, and may have
folders of pipelines of other families. A run has

- `trainer`: a name in `TRAINERS`,
- `global_batch`: examples per optimiser step, divided among the processes,
- `args`: further arguments of the configuration,
- `family`: name of another pipeline of the job, `"pipeline"` by default, and `video`: whether it makes videos,
- `rewards`: reward models of the job, and `"redness"`, one of pixels; both kinds by default,
- `num_rows`: rows of the train dataset, 12 by default,
- `lora`: whether to train LoRA, `true` by default,
- `ema`: whether to keep an average of the weights,
- `resume`: name of an earlier run whose last but one checkpoint is where this one begins, or `true` to go on from its own,
- `save_at`: a step after which to save a checkpoint,
- `dies`: a process, and the step after which it is killed,
- `signal`: name of a signal that the launcher gets after the second step, which the run does not survive,
- `bad`: process and steps in which a reward is not finite,
- `evaluate`, `generate`: whether to do so after the training,
- `refused`: whether the trainer must refuse the run, `fails`: whether the training must fail,
- `pretend_gpus`: whether FSDP may shard over CPUs, `true` by default,
- `keep_small`: whether ZeRO-3 keeps small weights whole, as it does by default.

Each leaves a folder `output_dir/name` with its checkpoints, the final model in `final` and `facts.json`.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from tapo_trl import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    EMACallback,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    OnlineDiffusionDPOConfig,
    OnlineDiffusionDPOTrainer,
    SLRMConfig,
    SLRMTrainer,
    TAPOConfig,
    TAPOTrainer,
)
from tapo_trl.trainer.base import DiffusionTrainer


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "resolution": 32,
    "max_sequence_length": 4,
    "activation_checkpointing": False,
}
TAPO = {
    "num_inference_steps": 5,
    "num_sde_steps": 3,
    "num_candidates": 2,
    "guidance_scale": 2.0,
    "transition_batch_size": 2,
    "ddp_find_unused_parameters": False,
}
NFT = {
    "num_inference_steps": 4,
    "num_generations": 3,
    "num_noise_levels": 2,
    "transition_batch_size": 2,
    "ddp_find_unused_parameters": False,
}
ONLINE_DPO = {"num_inference_steps": 4, "num_generations": 3, "num_noise_levels": 2, "transition_batch_size": 2}
GRPO = {"num_inference_steps": 4, "num_generations": 3, "num_sde_steps": 2, "transition_batch_size": 2}
TRAINERS = {  # with rollouts, and with a dataset of samples
    "tapo": (TAPOTrainer, TAPOConfig, TAPO),
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig, NFT),
    "online_dpo": (OnlineDiffusionDPOTrainer, OnlineDiffusionDPOConfig, ONLINE_DPO),
    "grpo": (FlowGRPOTrainer, FlowGRPOConfig, GRPO),
    "slrm": (SLRMTrainer, SLRMConfig, {}),
    "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig, {}),
    "sft": (DiffusionSFTTrainer, DiffusionSFTConfig, {}),
}
LORA = {"r": 4, "lora_alpha": 8}
EVAL_ROWS = 5  # two batches of 4, the last of which is filled up on several processes


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].flatten(1).mean(1) - images[:, 2].flatten(1).mean(1)  # of an image or a video


class BadRedness(TrainerCallback):
    """The same reward, but not finite on one process in some steps."""

    def __init__(self, process: int, steps: list[int]):
        self.process, self.steps, self.step = process, steps, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        is_bad = self.step in self.steps and self.process == int(os.environ.get("RANK", 0))
        return redness(images, prompts) * (torch.nan if is_bad else 1)


class SaveAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == self.step


class Die(TrainerCallback):
    def __init__(self, process: int, step: int):
        self.process, self.step = process, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == self.process:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalLauncher(TrainerCallback):
    def __init__(self, name: str):
        self.number = signal.Signals[name]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 0:
            os.kill(os.getppid(), self.number)
            graceful_stop = signal.getsignal(signal.SIGTERM).__self__
            while graceful_stop.signal is None:  # until the launcher, or its end, has passed it on
                time.sleep(0.05)


def prompts(number: int) -> Dataset:
    return Dataset.from_dict({"prompt": [f"a {chr(ord('a') + i)} on a hill" for i in range(number)]})


def let_fsdp_run_on_cpu(args: TrainingArguments) -> None:
    """accelerate takes several processes on CPUs for plain data parallelism, whatever the launcher says of FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and args.device.type == "cpu":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def let_zero3_shard_tiny_weights(args: TrainingArguments) -> None:
    """ZeRO-3 keeps weights of less than 100,000 elements whole: those of a tiny model are none but such."""
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def make_trainer(job: dict, run: dict, output_dir: Path) -> DiffusionTrainer:
    trainer_class, config_class, of_trainer = TRAINERS[run["trainer"]]
    options = COMMON | of_trainer | run["args"]
    accumulation = options.get("gradient_accumulation_steps", 1)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    options["per_device_train_batch_size"] = run["global_batch"] // world_size // accumulation
    options["per_device_eval_batch_size"] = 4 // world_size
    options |= {"output_dir": str(output_dir), "cache_dir": str(output_dir.parent / "cache")}
    args = config_class(**options)
    if run.get("pretend_gpus", True):
        let_fsdp_run_on_cpu(args)
    if not run.get("keep_small"):
        let_zero3_shard_tiny_weights(args)
    peft_config = LoraConfig(**LORA) if run.get("lora", True) else None
    num_rows = run.get("num_rows", 12)
    callbacks = [SaveAt(run["save_at"])] if "save_at" in run else []
    callbacks += [SignalLauncher(run["signal"])] if "signal" in run else []
    callbacks += [Die(**run["dies"])] if "dies" in run else []
    model = job[run.get("family", "pipeline")]
    callbacks += [EMACallback(decay=0.5)] if run.get("ema") else []
    common = {"peft_config": peft_config, "callbacks": callbacks}
    if run["trainer"] in ("slrm", "dpo", "sft"):
        rows = load_from_disk(job["video_pairs" if run.get("video") else "pairs"]).select(range(num_rows))
        if run["trainer"] == "sft":
            rows = rows.rename_column("chosen", "image").remove_columns("rejected")
        return trainer_class(model, args, rows, eval_dataset=rows.select(range(EVAL_ROWS)), **common)
    reward = BadRedness(**run["bad"]) if "bad" in run else redness
    callbacks += [reward] if "bad" in run else []
    rewards = [reward if name == "redness" else job[name] for name in run.get("rewards", ["reward", "redness"])]
    return trainer_class(model, rewards, args, prompts(num_rows), eval_dataset=prompts(EVAL_ROWS), **common)


def facts(trainer: DiffusionTrainer) -> dict:
    """What the engine of this process really is."""
    state, engine = trainer.accelerator.state, trainer.model_wrapped
    is_deepspeed = state.distributed_type == DistributedType.DEEPSPEED
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "process_index": state.process_index,
        "num_processes": state.num_processes,
        "distributed_type": state.distributed_type.value,
        "engine": type(engine).__name__,
        "zero_stage": engine.zero_optimization_stage() if is_deepspeed else 0,
        "dtensors": sum(isinstance(parameter, DTensor) for parameter in trainable),
        "empty": sum(parameter.numel() == 0 for parameter in trainable),
        "trainable": len(trainable),
    }


def last_but_one_checkpoint(folder: Path) -> Path:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2]


def refuse(job: dict, name: str) -> None:
    output_dir = Path(job["output_dir"]) / name
    try:
        make_trainer(job, job["runs"][name], output_dir)
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            output_dir.mkdir(exist_ok=True)
            (output_dir / "facts.json").write_text(json.dumps({"error": str(error)}))
    else:
        raise AssertionError(f"{name} should have been refused.")


def execute(job: dict, name: str) -> None:
    run, output_dir, start = job["runs"][name], Path(job["output_dir"]) / name, time.monotonic()
    trainer = make_trainer(job, run, output_dir)
    checkpoint = run.get("resume")
    if isinstance(checkpoint, str):
        checkpoint = last_but_one_checkpoint(output_dir.parent / run["resume"])
        if trainer.is_world_process_zero():
            shutil.copytree(checkpoint, output_dir / checkpoint.name)
        trainer.accelerator.wait_for_everyone()
        checkpoint = str(output_dir / checkpoint.name)
    error = ""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as failure:
        assert run.get("fails"), failure
        error = str(failure)
    engine = facts(trainer) | {"failure": error}
    if run.get("evaluate"):
        trainer.evaluate()
    samples = trainer.generate([prompts(1)["prompt"][0]]) if run.get("generate") else torch.zeros(0)
    averaged = torch.zeros(0)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EMACallback) and run.get("generate"):
            with callback.average_parameters():
                averaged = trainer.generate([prompts(1)["prompt"][0]])
            after = trainer.generate([prompts(1)["prompt"][0]])
            assert torch.equal(after, samples), "the average left something behind"
    trainer.save_model(str(output_dir / "final"))
    everyone = gather_object(
        [engine | {"samples": samples.flatten().tolist(), "averaged": averaged.flatten().tolist()}]
    )
    if trainer.is_world_process_zero():
        record = {"processes": everyone, "log_history": trainer.state.log_history}
        record["seconds"] = time.monotonic() - start
        (output_dir / "facts.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    for name, run in job["runs"].items():
        refuse(job, name) if run.get("refused") else execute(job, name)
    PartialState().destroy_process_group()
