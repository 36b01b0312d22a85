# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The training loop of both worlds' `pretrain_transformer.py`: by the clock, with averaged weights, and resumable."""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import replace_folder, save_atomically
from diffusers import DiffusionPipeline


def training_parser(description: str, output_dir: Path, **defaults) -> argparse.ArgumentParser:
    """The options of [`train_flow`] and of the pipeline's size. `defaults` may be others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=output_dir)
    parser.add_argument("--work_dir", type=Path, required=True, help="Holds `vae/`; receives the state and pictures.")
    parser.add_argument("--minutes", type=float, default=60.0, help="The learning rate falls to zero at this time.")
    parser.add_argument("--export_minutes", type=float, default=10.0)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="The share of empty prompts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


class FlowTraining:
    """
    Models of a pipeline with their optimizer and averaged weights, from `args.work_dir / "state.pt"` if it is there.

    Args:
        pipeline: pipeline.
        names: components that are trained.
        args: see [`training_parser`].
    """

    def __init__(self, pipeline: DiffusionPipeline, names: Sequence[str], args: argparse.Namespace):
        self.pipeline, self.args, self.step, self.elapsed = pipeline, args, 0, 0.0
        self.models = {name: getattr(pipeline, name).train() for name in names}
        self.parameters = [parameter for model in self.models.values() for parameter in model.parameters()]
        self.averages = {name: copy.deepcopy(model.state_dict()) for name, model in self.models.items()}
        self.averaged = [
            self.averages[name][key] for name, model in self.models.items() for key, _ in model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        models = {**self.models, "vae": pipeline.vae}
        counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        print(f"parameters {counts}, {sum(counts.values())} in all; vocabulary {len(pipeline.tokenizer)}", flush=True)
        if (args.work_dir / "state.pt").exists():
            state = torch.load(args.work_dir / "state.pt")
            for name, model in self.models.items():
                model.load_state_dict(state["models"][name])
            for average, saved in zip(self.averaged, state["averages"], strict=True):
                average.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = state["step"], state["elapsed"]
            print(f"resumed at step {self.step}", flush=True)

    @property
    def progress(self) -> float:
        """The share of the time that is over."""
        return self.elapsed / (60 * self.args.minutes)

    def update(self, loss: torch.Tensor, average_gradients: Callable[[list, float], float] | None) -> str:
        """One step of the optimizer and of the average. Returns its numbers, for the log."""
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        rate = self.args.learning_rate * min(1.0, (self.step + 1) / 300) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        if average_gradients is not None:  # of the clock, too: all agree about the learning rate and the end
            self.elapsed = average_gradients(self.parameters, self.elapsed)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.step += 1
        return f"norm {norm:.2f} lr {rate:.1e}"

    def save(self) -> None:
        state = {"models": {name: model.state_dict() for name, model in self.models.items()}, "step": self.step}
        state |= {"averages": self.averaged, "optimizer": self.optimizer.state_dict(), "elapsed": self.elapsed}
        save_atomically(state, self.args.work_dir / "state.pt")

    @torch.no_grad()
    def export(self) -> DiffusionPipeline:
        """Saves the averaged weights, the large models in half precision; returns the pipeline in single precision."""
        pipeline_class, folder = type(self.pipeline), self.args.output_dir
        averaged = pipeline_class(**copy.deepcopy(self.pipeline.components))
        for name, weights in self.averages.items():
            getattr(averaged, name).load_state_dict(weights)
            getattr(averaged, name).eval()
        half = pipeline_class(**copy.deepcopy(averaged.components))
        half.transformer.half(), half.vae.half()  # text encoders load in their saved precision, and stay single
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(folder.name + ".new")
        half.save_pretrained(aside)
        replace_folder(aside, folder)
        return averaged


def train_flow(
    training: FlowTraining,
    num_rows: int,
    loss_of: Callable[[torch.Tensor, bool], torch.Tensor],
    show: Callable[[DiffusionPipeline, Path], None],
    rank: int = 0,
    processes: int = 1,
    average_gradients: Callable[[list, float], float] | None = None,
) -> None:
    """
    Train until the time is over.

    Args:
        training: what is trained.
        num_rows: number of rows of the data.
        loss_of: the loss of some rows, and whether the texts of this batch, a small one, are long.
        show: draws samples of the averaged pipeline into a file.
        rank, processes: number of this process, and how many there are.
        average_gradients: averages gradients and a number over the processes.
    """
    args, batch_size = training.args, training.args.batch_size // processes
    last_export, losses, order = training.elapsed, [], []
    done = False
    while not done:
        start = time.time()
        # Now and then a small batch with many zero tokens, so that the pipeline's default length works as well.
        is_long = training.step % 16 == 15
        size = batch_size // 8 if is_long else batch_size
        if len(order) < size:
            order = torch.randperm(num_rows).tolist()
        rows, order = torch.tensor(order[:size]), order[size:]
        loss = loss_of(rows, is_long)
        numbers = training.update(loss, average_gradients)
        done = training.progress >= 1  # by the clock of all processes
        training.elapsed += time.time() - start
        losses = [*losses[-199:], loss.item()]
        if rank != 0:
            continue
        if training.step % 100 == 0:
            seen = training.step * args.batch_size * (1 - 7 / 128) / num_rows
            mean = sum(losses) / len(losses)
            print(
                f"step {training.step} {training.elapsed:.0f}s seen {seen:.0f} loss {mean:.4f} {numbers}", flush=True
            )
        if done or training.elapsed - last_export > 60 * args.export_minutes:
            last_export = training.elapsed
            training.save()
            show(training.export(), args.work_dir / f"step{training.step}.png")
            print(f"exported step {training.step} to {args.output_dir}", flush=True)
