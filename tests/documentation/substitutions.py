# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What stands in for the models, data and sizes of the documentation, so that every block of it runs in seconds on a CPU."""

import re


# In every block: models and data of the Hub become folders of the sandbox, launch configurations the one for a CPU
TEXT = {
    r'(StableDiffusion3Pipeline\.from_pretrained\(\s*"stabilityai[^"]*")': r"\1, text_encoder_3=None, tokenizer_3=None",
    r'load_dataset\("TIGER-Lab/GenAI-Bench".*\)': "Dataset.from_dict(VOTES)",
    r'load_dataset\("liuhuohuo2/pick-a-pic-v2", split="(\w+)"(, streaming=True)?\)': (
        r'__import__("datasets").load_from_disk("tiny/pick_a_pic")["\1"]'
    ),
    r"TIGER-Lab/GenAI-Bench": "tiny/genai_bench",
    r'\.to\("cuda"\)': '.to("cpu")',
    r"height=512, width=512": "height=32, width=32",
    # Rewards whose weights the sandbox lacks
    r"aesthetic\n(clip\npickscore)": r"\1",
    r"(pickscore)\nhpsv2\.1\nhpsv3\n(mps|vqascore)\nimagereward": r"\1",
    r"from diffusers.utils import export_to_video.*\n": "",
    r"export_to_video\(.*\)": "",
    r"num_frames=81, guidance_scale=5.0\)": "height=32, width=32, num_frames=5, num_inference_steps=2)",
    r"stabilityai/stable-diffusion-3\.5-medium": "tiny/sd3",
    r"stabilityai/stable-diffusion-xl-base-1\.0": "tiny/sd3",
    r'{"num_inference_steps": (50|12), ': '{"num_inference_steps": 2, ',
    r"black-forest-labs/FLUX\.1-dev": "tiny/flux1",
    r"Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers": "tiny/wan",
    r'load_dataset\("my-name/pairs"': 'load_dataset("parquet", data_files="pairs.parquet"',
    r'load_dataset\("my-name/images"': 'load_dataset("parquet", data_files="images.parquet"',
    r"yuvalkirstain/pickapic_v1|liuhuohuo2/pick-a-pic-v2": "tiny/pick_a_pic",
    r"path/to/pairs\.parquet": "video_pairs.parquet",
    r"recipes/accelerate/\w+\.yaml": "recipes/accelerate/cpu.yaml",
    r"--accelerate_config\n\w+": "--accelerate_config\ncpu",
    r"/tmp/": "scratch/",
    r"--(\w*minutes)\n[\d.]+": r"--\1\n0.01",  # words stand in lines of their own
    r"(pairs|study)\nstudy\n(--model_a|--methods)": r"\1\nprompted\n\2",  # a study without votes
    r'"height": 480, "width": 832, "num_frames": 81': '"height": 32, "width": 32, "num_frames": 5',
    r"latent_shape\(512, 512\)": "latent_shape(32, 32)",
    r"torch\.randn\(1, 16, 64, 64\)": "torch.randn(1, 4, 8, 8)",
}

# What a scheduler sets
VARIABLES = {"RANK": "0", "FIRST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}

# Fields of commands and configurations that are changed wherever they exist
SMALL = {
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_accumulation_steps": 1,
    "num_sde_steps": 1,
    "num_candidates": 2,
    "num_inference_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "dataloader_num_workers": 0,
    "torch_dtype": "float32",
    "group_offload": False,
    "layerwise_casting": False,
}
# And the largest values of those that are set
LARGEST = {
    "resolution": 32,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "fps": 4,
    "lora_r": 2,
    "num_task_tokens": 2,
    "save_steps": 1,
    "sample_every_steps": 1,
    "num_generations": 2,
    "prompts": 1,
    "seeds": 1,
    "repeats": 1,
    "samples_per_prompt": 1,
    "num": 33,
    "same_source": 2,
    "gold": 2,
}

# Flags of other scripts
SCRIPTS = {
    "report.py": ["--seeds", "1", "--num_inference_steps", "2"],
    "train_clip.py": ["--minutes", "0.01"],
    "beta_law.py": ["--num_rollouts", "1", "--resolutions", "16"],
    "plain_loop.py": ["--num_inference_steps", "4", "--num_sde_steps", "2", "--num_candidates", "2"],
}

# What the blocks of Python of a page need before the first, and what uses what they define
BEFORE = {
    "docs/slrm_trainer.md": """
from datasets import Dataset
VOTES = {"prompt": ["a fox"], "left_video": ["a.mp4"], "right_video": ["b.mp4"], "vote_type": ["leftvote"]}
""",
    "docs/annotation.md": """
import json
given = [{"from_name": name, "value": {"choices": ["left"]}} for name in ("visual_quality", "text_alignment")]
task = {"data": {"pair_id": "0000"}, "annotations": [{"id": 1, "completed_by": 7, "result": given}]}
open("label_studio.json", "w").write(json.dumps([task]))
open("votes.csv", "w").write("annotator,pair_id,visual_quality,text_alignment\\np08,0001,0.5,0\\n")
""",
    "docs/reproduction.md": "def judge(samples, prompts): return {}",
    "examples/emoji/README.md": """
import sys, torch
sys.path.insert(0, "examples/emoji")
images, prompts = torch.rand(2, 3, 64, 64), ["red apple"] * 2
""",
    "examples/moving_emoji/README.md": """
import sys, torch
sys.path.insert(0, "examples/moving_emoji")
clips, prompts = 2 * torch.rand(2, 3, 9, 48, 48) - 1, ["panda face moving left"] * 2
""",
}
AFTER = {
    "docs/annotation.md": """
added = read_events("study/votes.jsonl", study.dimension_names)[-2:]
assert [(vote["annotator"], vote["labels"]) for vote in added] == [
    ("p7", {"visual_quality": 1.0, "text_alignment": 1.0}), ("p08", {"visual_quality": 0.5, "text_alignment": 0.0})
]
""",
    "docs/diagnostics.md": "diagnose('outputs/sd35-slrm', 'tiny/sd3', 'pairs.parquet'); curve('outputs/sd35-tapo')",
    "docs/rewards.md": "trainer.train()",
    "docs/callbacks.md": "trainer.train()",
}

# Why a command or a block of Python cannot run here. The first words or lines of it decide
EXEMPT = {
    r'(?s)from tapo_trl import load_policy, load_reward_model\n.*"liuhuohuo/DiNa-LRM': (
        "downloads weights; tests/rewards/test_dina_released.py loads a tiny checkpoint"
    ),
    r"python examples/check_reward\.py": "downloads weights; tests/examples/test_check_reward.py runs it",
    r"make (install|test|lint|format)": "what runs these tests",
    r"tapo-trl rewards --prepare": "downloads; tests/rewards/pretrained/test_instructions.py",
    r"python reward_server\.py": "serves until it is stopped; tests/rewards/test_remote.py starts it",
    r"tapo-trl annotate": "serves until it is stopped; tests/human/test_browser.py starts it",
    r"tapo-trl rounds": "people vote in it; tests/human/test_rounds.py runs a loop",
    r"tapo-trl online_dpo .*--reward_model human": "waits for people; tests/human/test_live.py has some",
    r"tapo-trl prompts .*--(llm|endpoint)": "needs a language model; tests/human/test_prompts.py has a tiny one",
    r"tapo-trl tapo .*http://": "needs a server; tests/trainer/test_remote_reward.py trains with one",
    r"git clone ": "downloads",
    r"tapo-trl grpo .*--reward_model geneval": "needs weights; tests/rewards/pretrained/test_geneval.py trains with tiny ones",
    r"tapo-trl evaluate .*--reward_model videoreward": "needs weights; tests/rewards/pretrained/test_videoreward.py scores tiny ones",
    r"python examples/words/pretrain\.py": "needs fonts of Debian",
    r"tapo-trl online_dpo .*--guard_reward report:": "needs Tesseract; tests/examples/test_words.py reads with it",
    r"python examples/words/report\.py": "needs Tesseract and two trainings; tests/examples/test_words.py measures with it",
    r"pip install ": "installs; `.ci/run` does it in a new environment",
    r"hf ": "needs an account",
    r"tapo-trl bench .*--device cuda": "needs an NVIDIA GPU",
    r"benchmarks/gpu/(pack|run)\.sh": "downloads, or needs an NVIDIA GPU; tests/gpu/test_rehearsal.py rehearses",
    r"tapo-trl reproduce": "trains for hours; tests/reproduction runs it in a small world",
    r"tapo-trl tapo .*--push_to_hub": "needs an account; tests/trainer/test_hub.py pushes to a Hub of its own",
    r'trainer\.dataset_name = "my-name/pairs"': "needs an account; tests/trainer/test_hub.py",
    r"python examples/emoji/build_dataset\.py": "downloads packages",
    r"python examples/moving_emoji/report\.py": "needs two trainings; `make demo-video` runs it",
    r"(python|torchrun .*) examples/(moving_)?emoji/pretrain_transformer\.py": "rates hundreds of samples at its end, for minutes",
    r"python examples/moving_emoji/train_judges\.py": "rates thousands of clips for minutes",
}


def replace_text(text: str) -> str:
    for pattern, replacement in TEXT.items():
        text = re.sub(pattern, replacement, text)
    return text


def reason_not_to_run(text: str) -> str | None:
    return next((reason for pattern, reason in EXEMPT.items() if re.match(pattern, text)), None)
