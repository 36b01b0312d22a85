# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What the commands of studies say of input that cannot be used, and where they write."""

import pytest

from tapo_trl.cli.main import command_module
from tapo_trl.human.votes import VoteStore

from ..human.studies import make_study, vote


def run(*words):
    module = command_module(words[0])
    (args,) = module.make_parser().parse_args_and_config([str(word) for word in words[1:]])
    module.main(args)


class TestPrompts:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "there is no file"),
            ("elements: {subject: [a fox]}\ntemplates: '{subjet}'", "cannot be filled"),
            ("elements: 3", "needs a mapping"),
        ],
    )
    def test_elements_that_cannot_be_used_make_no_study(self, tmp_path, text, message):
        file = tmp_path / "elements.yaml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit, match=f"tapo-trl prompts: error: .*{message}"):
            run("prompts", tmp_path / "study", "--elements", file)
        assert not (tmp_path / "study").exists()

    def test_one_template_may_stand_without_a_list(self, tmp_path):
        (tmp_path / "elements.yaml").write_text("elements: {subject: [a fox]}\ntemplates: '{subject} sleeps'")
        run("prompts", tmp_path / "study", "--elements", tmp_path / "elements.yaml", "--figure", "false")
        assert '"prompt": "a fox sleeps"' in (tmp_path / "study" / "prompts.jsonl").read_text()

    def test_a_file_of_prompts_that_is_not_there(self, tmp_path):
        with pytest.raises(SystemExit, match="there is no file missing.txt"):
            run("prompts", tmp_path / "study", "--prompts", "missing.txt")
        assert not (tmp_path / "study").exists()

    def test_title_and_seed_are_of_new_studies(self, tmp_path):
        flags = ["prompts", tmp_path, "--prompts", "one"]
        run(*flags, "--title", "Mine", "--seed", "3")
        run(*flags, "two", "--title", "Mine", "--seed", "3")
        run(*flags, "three")
        for flag, value in (("title", "Other"), ("seed", "4")):
            with pytest.raises(SystemExit, match=f"`{flag}` is of new studies"):
                run(*flags, f"--{flag}", value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts", "--prompts", "a", "--num", "3"], "`num` has no effect on `prompts`"),
        (["prompts", "--prompts", "a", "--max_words", "3"], "`max_words` has no effect on `prompts`"),
        (["prompts", "--prompts", "a", "--figure", "false"], "`figure` has no effect on `prompts`"),
        (["prompts", "--attempts", "5"], "`attempts` is of language models"),
        (["prompts", "--llm", "a", "--api_key_env", "KEY"], "`api_key_env` is of endpoints"),
        (["votes", "--prior", "-1"], "`prior` must be at least 0, but it is -1.0"),
        (["votes", "--prior", "nan"], "`prior`"),
        (["votes", "--min_seconds", "-1", "--output_dir", "a"], "`min_seconds` must be at least 0"),
        (["votes", "--output_dir", "a", "--splits", '{"train": -1}'], "`splits` must give a positive share"),
        (["votes", "--output_dir", "a", "--splits", '{"train": "all"}'], "`splits` must give a positive share"),
        (["votes", "--output_dir", "a", "--splits", "{}"], "`splits` must give a positive share"),
        (["votes", "--output_dir", "a", "--splits", "[1]"], "`splits` must be a mapping"),
        (["votes", "--output_dir", "a", "--splits", "{train: 1}"], "`splits` must be a mapping"),
        (["votes", "--output_dir", "a", "--dimension_weights", '{"motion": 0}'], "`dimension_weights` must give"),
        (["pairs", "--model_a", "a", "--lora_b", "b", "--same_source", "-1"], "`same_source` must be at least 0"),
        (["pairs", "--model_a", "a", "--lora_b", "b", "--fps", "0"], "`fps` must be positive"),
    ],
)
def test_options_that_cannot_be_used_are_named(capsys, words, message):
    with pytest.raises(SystemExit):
        run(words[0], "study", *words[1:])
    assert message in capsys.readouterr().err


class TestVotes:
    def test_without_votes_it_says_how_to_get_them(self, tmp_path):
        make_study(tmp_path, 1)
        with pytest.raises(SystemExit, match="has no votes: `tapo-trl annotate"):
            run("votes", tmp_path)

    def test_files_may_be_in_a_new_folder(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        with VoteStore(study.folder / "votes.jsonl") as store:
            store.append(vote("p01", "0000"))
        run("votes", study.folder, "--output_file", tmp_path / "new/votes.json", "--figure", tmp_path / "new/wins.png")
        assert {file.name for file in (tmp_path / "new").iterdir()} == {"votes.json", "wins.png"}

    def test_a_file_that_is_no_text(self, tmp_path):
        make_study(tmp_path, 1)
        (tmp_path / "votes.jsonl").write_bytes(b"\xff\xfe\n")
        for command in ("votes", "annotate"):
            with pytest.raises(SystemExit, match="votes.jsonl"):
                run(command, tmp_path)


def test_a_folder_that_is_no_study(tmp_path):
    for command in (["votes"], ["annotate"], ["study"], ["pairs", "--model_a", "a", "--model_b", "b"]):
        with pytest.raises(SystemExit, match="is no study: it has no study.yaml. `tapo-trl prompts"):
            run(command[0], tmp_path / "nothing", *command[1:])
