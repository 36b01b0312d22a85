# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A copy of the repository's examples and recipes with small models and data, and what runs documented blocks in it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, DatasetDict, Image, load_dataset
from peft import LoraConfig
from torch.distributed.run import get_args_parser as torchrun_parser

import tapo_trl
from tapo_trl import GradientShareCallback, SLRMModel, TAPOConfig, TAPOTrainer, load_policy
from tapo_trl.cli.main import COMMANDS, command_module
from tapo_trl.human import Study, VoteStore, export_preferences
from tapo_trl.human.prompts import import_prompts
from tapo_trl.policies.flux import FluxPolicy
from tapo_trl.rewards.pretrained.clip import CLIPReward, PickScoreReward
from tests.data.preference_pairs import color_pairs
from tests.data.video_files import grey_clip, write_video
from tests.documentation.substitutions import AFTER, BEFORE, LARGEST, SCRIPTS, SMALL, VARIABLES, replace_text
from tests.human.studies import make_study, vote
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline, tiny_wan_pipeline


ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
CONFIGS = (
    "SLRMConfig",
    "TAPOConfig",
    "DiffusionDPOConfig",
    "OnlineDiffusionDPOConfig",
    "FlowGRPOConfig",
    "ReFLConfig",
    "DiffusionNFTConfig",
    "DiffusionSFTConfig",
)


@dataclass(frozen=True)
class Block:
    """
    A code block of a page.

    Args:
        language (`str`): what is written behind its fence.
        text (`str`): what is in it, without its indentation.
    """

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        return [Block("python", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def commands_of(block: str) -> Iterator[list[str]]:
    """The words of its commands, as a shell reads them. Of a job script, those that it starts."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("export "):
            continue
        read = ["bash", "-c", f"set -- {line}\nprintf '%s\\0' \"$@\""]
        output = subprocess.run(read, env=os.environ | VARIABLES, capture_output=True, text=True, check=True).stdout
        words = output.split("\0")[:-1]
        while words and re.match(r"\w+=", words[0]):  # variables of the environment
            words = words[1:]
        if words[:3] == ["srun", "bash", "-c"]:
            yield from commands_of(words[3])
        elif any(words):
            yield words


# The sandbox


def build(folder: Path) -> None:
    """Fill `folder` with all that the documentation's blocks read."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("examples", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("pairs", "__pycache__"))
    few_captions(folder / "examples/emoji/data/emoji.parquet", folder / "pictures.parquet")
    (folder / "scratch/emoji_all").mkdir(parents=True)
    shutil.copy(folder / "examples/emoji/data/emoji.parquet", folder / "scratch/emoji_all")
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        copy = folder / recipe.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(replace_text(recipe.read_text(encoding="utf-8")), encoding="utf-8")

    torch.manual_seed(0)
    save_tiny_clip(folder / "tiny" / "clip")
    (folder / "samples").mkdir()
    for row, pair in enumerate(color_pairs(2)):
        pair["chosen"].save(folder / "samples" / f"{row}.png")
    (folder / "prompts.txt").write_text("a fox\na boat\n")
    for file, text in benchmark_files().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    color_pairs(8).to_parquet(folder / "pairs.parquet")
    color_pairs(100).rename_column("chosen", "image").to_parquet(folder / "images.parquet")
    pick_a_pic(color_pairs(8)).save_to_disk(folder / "tiny" / "pick_a_pic")
    video_pairs(folder).to_parquet(folder / "video_pairs.parquet")
    video_pairs(folder).to_csv(folder / "pairs.csv")
    human_studies(folder)
    genai_bench(video_pairs(folder)).save_to_disk(folder / "tiny" / "genai_bench")
    videogen_rewardbench(video_pairs(folder)).to_csv(folder / "VideoGen-RewardBench" / "videogen-rewardbench.csv")
    reward_places = ("slrm", "sd35-slrm", "outputs/sd35-slrm")
    train(
        tiny_sd3_pipeline(),
        folder,
        "tiny/sd3",
        reward_places,
        ("aligned", "sd35-tapo", "outputs/sd35-tapo", "sd35-sft"),
        {"resolution": 32},
    )
    FluxPolicy.tiny().save_pretrained("tiny/flux1")
    size = {"height": 32, "width": 32, "num_frames": 5}
    train(tiny_wan_pipeline(), folder, "tiny/wan", ("outputs/wan21-slrm",), ("wan21-tapo",), size)
    reward_model("examples/emoji/pipeline", {"resolution": 64, "max_sequence_length": 1}).save_pretrained(
        "runs/emoji/slrm"
    )
    with_lora = reward_model("tiny/sd3", {"resolution": 32})
    with_lora.add_lora(LoraConfig(r=2, target_modules=with_lora.lora_target_modules(load_policy("tiny/sd3"))))
    with_lora.save_pretrained("outputs/sd35-slrm-24gb")
    shutil.copytree(folder / "outputs/sd35-tapo", folder / "outputs/sd35-tapo-long")
    run_command(["python", "examples/emoji/make_pairs.py"])


def few_captions(file: Path, scratch: Path) -> None:
    """Keep two captions of each split, and those that the moving emoji show."""
    pictures = load_dataset("parquet", data_files=str(file), split="train").cast_column("image", Image(decode=False))
    kept = {split: sorted({row["prompt"] for row in pictures if row["split"] == split})[:2] for split in SPLITS}
    moving = runpy.run_path(str(ROOT / "examples/moving_emoji/clips.py"))["SUBJECTS"]
    rows = [row for row, value in enumerate(pictures) if value["prompt"] in (*kept[value["split"]], *moving)]
    pictures.select(rows).cast_column("image", Image()).to_parquet(scratch)
    scratch.replace(file)


def train(pipeline, folder: Path, base: str, rewards: tuple[str, ...], aligned: tuple[str, ...], size: dict) -> None:
    """A base model, a reward model on it and what TAPO makes of both, each in all the folders that the pages name."""
    pipeline.save_pretrained(folder / base)
    for place in rewards:
        reward_model(base, size).save_pretrained(place)
    args = small_config(TAPOConfig)(aligned[0], save_strategy="no", logging_steps=1, **size)
    prompts = Dataset.from_dict({"prompt": ["a fox", "a boat"]})
    lora, callbacks = LoraConfig(r=2, init_lora_weights="gaussian"), [GradientShareCallback(every_n_steps=1)]
    trainer = TAPOTrainer(base, rewards[0], args, prompts, callbacks=callbacks, peft_config=lora)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    for place in aligned[1:]:
        shutil.copytree(aligned[0], place)


def reward_model(base: str, size: dict) -> SLRMModel:
    policy = load_policy(base)
    options = {"num_task_tokens": 2, "max_sequence_length": policy.max_sequence_length}
    return SLRMModel.from_policy(policy, **options | size)


def pick_a_pic(pairs: Dataset) -> DatasetDict:
    """The pairs in that data set's columns."""
    pairs = pairs.rename_columns({"prompt": "caption", "chosen": "jpg_0", "rejected": "jpg_1"})
    pairs = pairs.add_column("label_0", [1.0, 1.0, 0.5, 1.0] * 2).add_column("label_1", [0.0, 0.0, 0.5, 0.0] * 2)
    pairs = pairs.add_column("has_label", [True] * 8)
    return DatasetDict({"train": pairs, "validation_unique": pairs})


def video_pairs(folder: Path) -> Dataset:
    rows = {"prompt": ["a fox", "a boat"], "chosen": [], "rejected": []}
    for row in range(2):
        for side in ("chosen", "rejected"):
            file = folder / "videos" / f"{side}-{row}.mp4"
            file.parent.mkdir(exist_ok=True)
            write_video(file, grey_clip(12), fps=4)
            rows[side].append(str(file))
    return Dataset.from_dict(rows)


def genai_bench(pairs: Dataset) -> DatasetDict:
    """The pairs in that data set's columns."""
    pairs = pairs.rename_columns({"chosen": "left_video", "rejected": "right_video"})
    return DatasetDict({"test": pairs.add_column("vote_type", ["leftvote", "tievote"])})


def videogen_rewardbench(pairs: Dataset) -> Dataset:
    """The pairs in that data set's columns."""
    pairs = pairs.rename_columns({"chosen": "path_A", "rejected": "path_B"})
    for name in ("Overall", "VQ", "MQ", "TA"):
        pairs = pairs.add_column(name, ["A", "same"])
    return pairs


def benchmark_files() -> dict[str, str]:
    """Prompts of the benchmarks, and results of their tools, in the official layouts."""
    geneval = "\n".join(json.dumps({"tag": tag, "prompt": tag, "correct": True}) for tag in ("counting", "colors"))
    return {
        "geneval/prompts/evaluation_metadata.jsonl": geneval,
        "geneval-samples/results.jsonl": geneval,
        "flow_grpo/dataset/geneval/train_metadata.jsonl": geneval,
        "T2I-CompBench/examples/dataset/color_val.txt": "a blue cup\n",
        "compbench-samples/color/annotation_blip/vqa_result.json": '[{"question_id": 0, "answer": "0.5"}]',
        "VBench/vbench/VBench_full_info.json": '[{"prompt_en": "a cup turns", "dimension": ["scene"]}]',
        "vbench-samples/evaluation_results/scene_eval_results.json": '{"scene": [0.5, []]}',
        "parti/PartiPrompts.tsv": "Prompt\tCategory\na cup\tThings\n",
    }


def human_studies(folder: Path) -> None:
    """A study with votes and its export, and one that has only prompts; the methods that docs/annotation.md compares."""
    study = make_study(folder / "study", 12)
    with VoteStore(folder / "study" / "votes.jsonl") as store:
        for pair in study.read_pairs():
            for annotator in ("p01", "p02"):
                store.append(vote(annotator, pair.pair_id, int(pair.pair_id) % 2))
    export_preferences(study, folder / "preferences", store.rows)
    prompted = Study()
    prompted.save(folder / "prompted")
    import_prompts(prompted, ["a fox", "a boat"])
    blocks = blocks_of(ROOT / "docs" / "annotation.md")
    methods = next(block.text for block in blocks if block.language == "yaml" and "methods:" in block.text)
    (folder / "methods.yaml").write_text(replace_text(methods))


# Running


def use_tiny_scorers() -> None:
    """Pretrained rewards without the Hub."""
    CLIPReward.weights = PickScoreReward.weights = "tiny/clip"


def run_command(words: list[str]) -> None:
    """Run a documented command in this process, with small values. Launchers check their flags, and run one process."""
    use_tiny_scorers()
    words = replace_text("\n".join(words)).split("\n")
    if words[0] == "make":  # what it would do, but for the installation
        # The same from a shell and below a `make` with variables of its own
        dry_run = [*words, "-n", "-o", "install", "--no-print-directory", "VENV=.venv"]
        recipe = subprocess.run(dry_run, capture_output=True, text=True, check=True).stdout
        for command in commands_of(recipe.replace(".venv/bin/", "")):
            run_command(command)
        return
    if words[0] in ("echo", "mkdir"):
        return
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        words = [*(["-m"] if args.module else []), args.training_script, *args.training_script_args]
    elif words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        words = [args.training_script, *args.training_script_args]
    elif words[0] == "python":
        words = words[1:]
    if words[0] == "tapo-trl":
        words = ["-m", "tapo_trl.cli", *words[1:]]

    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    sys.argv += small_flags(sys.argv) + SCRIPTS.get(Path(words[0]).name, [])
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def small_flags(argv: list[str]) -> list[str]:
    """Flags that make the command small: fields that it has, unless it takes none of them."""
    name = argv[1] if argv[0] == "tapo_trl.cli" else re.sub(r"_(sd35|wan21)\.py$", "", Path(argv[0]).name)
    if name not in COMMANDS:
        return []
    parser = command_module(name).make_parser()
    given = {word for word in argv if word.startswith("--")}
    if "--config" in given:
        recipe = Path(argv[argv.index("--config") + 1])
        given |= {f"--{key}" for key in yaml.safe_load(recipe.read_text(encoding="utf-8"))}
    values = small_values({flag.removeprefix("--") for flag in given})
    if name != "bench":  # where they are a number
        values.pop("prompts", None)
    if name == "diagnose" and "--trajectories" not in given:  # whose fields the others are
        values = {
            key: value
            for key, value in values.items()
            if key not in ("num_inference_steps", "num_sde_steps", "num_candidates")
        }
    return [part for key, value in values.items() if key in parser._field_names() for part in (f"--{key}", str(value))]


def small_values(given: Container[str]) -> dict:
    """What is changed of the fields that are given, and what is added."""
    size = {} if "height" in given or "resolution" in given else {"resolution": LARGEST["resolution"]}
    return SMALL | size | {key: value for key, value in LARGEST.items() if key in given}


def run_python(blocks: list[str], page: str) -> None:
    """Run the blocks of a page one after the other, as a reader would, with configurations that are small."""
    for name in CONFIGS:
        setattr(tapo_trl, name, small_config(getattr(tapo_trl, name)))
    use_tiny_scorers()
    namespace = {}
    exec(BEFORE.get(page, ""), namespace)
    for block in blocks:
        exec(compile(replace_text(block), page, "exec"), namespace)
    exec(AFTER.get(page, ""), namespace)


def small_config(config_class: type):
    names = {field.name for field in fields(config_class)}

    def make(*args, **kwargs):
        values = kwargs | small_values(kwargs)
        return config_class(*args, **{key: value for key, value in values.items() if key in names or key in kwargs})

    return make
