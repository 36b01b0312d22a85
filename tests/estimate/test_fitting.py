# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from tapo_trl.cli.main import main
from tapo_trl.estimate.fitting import Chunks, fitting_lines
from tapo_trl.estimate.memory import Activations


GIB = 2**30


def make_chunks(**kwargs):
    """Of 20 blocks, whose activations are 1 GiB per latent, and 0.1 + 0.05 GiB with recomputation; an example has two latents."""
    values = {"activations": Activations(GIB, GIB // 10, 20), "latents": 2, "option": "transition_batch_size"}
    values |= {"number": 2, "most": None, "is_recomputing": True, "other": 3 * GIB}
    return Chunks(**values | kwargs)


class TestLargest:
    @pytest.mark.parametrize("recomputes", [True, False])
    @pytest.mark.parametrize("available", [-GIB, 0, 5 * GIB, 17 * GIB])
    def test_is_the_last_one_that_fits(self, available, recomputes):
        chunks = make_chunks()
        number = chunks.largest(available, recomputes)
        assert number == 0 or chunks.bytes_of(number, recomputes) <= available
        assert chunks.bytes_of(number + 1, recomputes) > available
        assert make_chunks(most=2).largest(available, recomputes) == min(number, 2)


class TestLines:
    @pytest.mark.parametrize(
        ("device_memory", "kwargs", "expected"),
        [
            # 0.9 x 8 - 3 = 4.2 GiB are left: 2 examples of 2 GiB, or 14 of 0.3 GiB
            (
                8.0,
                {},
                [
                    "       2 largest",
                    "      14 largest",
                    "true) fits",
                    "not needed: set activation_checkpointing: false",
                ],
            ),
            (8.0, {"number": 4}, ["true) fits", "not needed with transition_batch_size: 2. Which is faster"]),
            (8.0, {"number": 4, "is_recomputing": False}, ["4, activation_checkpointing: false) does not fit"]),
            (8.0, {"is_recomputing": False}, ["false) fits", "Recomputation is not needed."]),
            (8.0, {"most": 12}, ["      12 largest"]),
            # 1.5 GiB are left
            (5.0, {"number": 8}, ["       0 largest", "does not fit", "is needed: keep", "up to 5."]),
            (5.0, {"is_recomputing": False}, ["false) does not fit", "is needed: set activation_checkpointing: true"]),
            (3.5, {}, ["does not fit", "Not a single example fits: 3.00 GiB are taken by all but"]),
        ],
    )
    def test_of_a_device(self, device_memory, kwargs, expected):
        text = "\n".join(fitting_lines(make_chunks(**kwargs), device_memory))
        assert all(part in text for part in expected), text


class TestCommand:
    model = ("--model_name_or_path", "stabilityai/stable-diffusion-3.5-medium", "--use_peft", "--torch_dtype", "bf16")

    def test_says_what_fits(self, tmp_path, capsys):
        # 0.9 x 80 GiB less 4.60 of the policy, 0.71 of the LoRA and 0.16 of the VAE; a sample of 512 x 512 is one latent
        flags = (
            "--dataset_name",
            "images.parquet",
            "--output_dir",
            str(tmp_path),
            "--height",
            "512",
            "--width",
            "512",
        )
        assert main(["sft", *self.model, *flags, "--dry_run", "--device_memory", "80"]) == 0
        text = capsys.readouterr().out
        before, after = text.split("A device of 80 GiB, of which 10% is left for what is not estimated:")
        assert "activations: one block, recomputed" in before
        kept, recomputed = (int(line.split()[0].replace(",", "")) for line in after.splitlines()[1:3])
        assert 20 < kept < 40 and 6 * kept < recomputed < 20 * kept
        assert "per_device_train_batch_size without recomputation" in after

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--device_memory", "24"], "`device_memory=24` has no effect without `dry_run=True`"),
            (["--device_memory", "0", "--dry_run"], "`device_memory` must be a positive number"),
            (["--device_memory", "nan", "--dry_run"], "device_memory"),
        ],
    )
    def test_errors(self, tmp_path, capsys, flags, message):
        with pytest.raises(SystemExit):
            main(["tapo", *self.model, "--output_dir", str(tmp_path), *flags])
        assert message in capsys.readouterr().err

    def test_activations_that_are_not_estimated(self, tmp_path):
        flags = (
            "--reward_model",
            "judges:aesthetics",
            "--output_dir",
            str(tmp_path),
            "--dry_run",
            "--device_memory",
            "80",
        )
        with pytest.raises(ValueError, match="what fits is not known"):
            main(["refl", *self.model, *flags])
