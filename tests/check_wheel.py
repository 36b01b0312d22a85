# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the wheel alone must do. `make test-wheel` runs this in a new environment, outside of the checkout."""

import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

import tapo_trl


CHECKOUT = Path(__file__).resolve().parents[1]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name("tapo-trl"), *arguments], capture_output=True, text=True)


def main() -> None:
    assert Path(tapo_trl.__file__).resolve().parent != CHECKOUT / "tapo_trl", "this is the checkout, not the wheel"
    for name in tapo_trl.__all__:
        getattr(tapo_trl, name)
    assert command("--version").stdout.strip() == tapo_trl.__version__
    for help_of in (
        [],
        *(
            [name]
            for name in (
                "slrm",
                "tapo",
                "dpo",
                "online_dpo",
                "grpo",
                "nft",
                "sft",
                "sample",
                "evaluate",
                "diagnose",
                "bench",
            )
        ),
    ):
        run = command(*help_of, "--help")
        assert run.returncode == 0 and "usage: tapo-trl" in run.stdout, run.stderr

    run = command("reproduce", "table1")
    assert run.returncode == 2 and "need a checkout" in run.stderr, run.stderr

    from tapo_trl.policies import SD3Policy

    args = tapo_trl.TAPOConfig(
        "tapo",
        max_steps=1,
        resolution=32,
        num_inference_steps=4,
        num_sde_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        cache_dir="cache",
    )
    prompts = Dataset.from_dict({"prompt": ["a red cat", "a blue dog"]})
    policy = SD3Policy(SD3Policy.tiny())
    trainer = tapo_trl.TAPOTrainer(
        policy, brightness, args, prompts, peft_config=LoraConfig(r=2, init_lora_weights="gaussian")
    )
    trainer.train()
    trainer.save_model()
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= {path.name for path in Path("tapo").iterdir()}
    print(f"the wheel of tapo_trl {tapo_trl.__version__} works")


if __name__ == "__main__":
    main()
