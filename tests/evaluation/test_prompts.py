# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import hashlib
import json
import logging

import pytest

from tapo_trl.evaluation import BENCHMARKS, load_prompts


# Made-up rows in the layouts of the official files
FILES = {
    "geneval": json.dumps({"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}) + "\n",
    "compbench/color": "a blue cup\n\na red cat",
    "drawbench": 'Prompts,Category\n"a cup, on a cat",Colors\n',
    "partiprompts": "Prompt\tCategory\tChallenge\tNote\na cup\tAbstract\tBasic\t\n",
    "ocr": 'a sign with "CUP"\n',
    "spo": json.dumps([{"caption": "a cup", "trainset_idx": 3}, {"caption": "a cat", "trainset_idx": 1}]),
    "vbench": json.dumps([{"prompt_en": "a cup turns", "dimension": ["color", "scene"]}]),
}


def write(tmp_path, name, text=None):
    file = tmp_path / BENCHMARKS[name].file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FILES[name] if text is None else text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", FILES)
class TestEveryBenchmark:
    def test_reads_a_clone_and_its_file(self, tmp_path, name):
        file = write(tmp_path, name)
        assert load_prompts(name, tmp_path).to_list() == load_prompts(name, file).to_list()

    def test_says_where_a_missing_file_is_found(self, tmp_path, name):
        with pytest.raises(FileNotFoundError) as error:
            load_prompts(name, tmp_path)
        assert BENCHMARKS[name].source in str(error.value)

    def test_warns_of_another_file_than_the_official_one(self, tmp_path, name, caplog):
        logging.getLogger("transformers").propagate = True
        load_prompts(name, write(tmp_path, name))
        assert "is not the official file" in caplog.text

    def test_does_not_warn_of_the_official_one(self, tmp_path, name, caplog, monkeypatch):
        logging.getLogger("transformers").propagate = True
        file = write(tmp_path, name)
        digest, count = hashlib.sha256(file.read_bytes()).hexdigest(), len(load_prompts(name, file))
        official = dataclasses.replace(BENCHMARKS[name], sha256=digest, num_prompts=count)
        monkeypatch.setitem(BENCHMARKS, name, official)
        caplog.clear()
        load_prompts(name, file)
        assert caplog.text == ""

    def test_an_empty_file_is_an_error(self, tmp_path, name):
        with pytest.raises(ValueError):
            load_prompts(name, write(tmp_path, name, ""))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("geneval", {"prompt": "two cups", "tag": "counting", "metadata": FILES["geneval"].strip()}),
        ("compbench/color", {"prompt": "a blue cup"}),
        ("drawbench", {"prompt": "a cup, on a cat", "category": "Colors"}),
        ("partiprompts", {"prompt": "a cup", "category": "Abstract"}),
        ("ocr", {"prompt": 'a sign with "CUP"'}),
        ("spo", {"prompt": "a cup"}),
        ("vbench", {"prompt": "a cup turns", "dimension": ["color", "scene"]}),
    ],
)
def test_first_row(tmp_path, name, row):
    assert load_prompts(name, write(tmp_path, name))[0] == row


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("geneval", '{"prompt": "two cups"}\n'),
        ("geneval", "two cups\n"),
        ("vbench", '{"prompt_en": "a cup"}'),
        ("spo", '[{"prompt": "a cup"}]'),
        ("spo", '["a cup"]'),
        ("drawbench", "Text,Kind\na cup,Colors\n"),
        ("partiprompts", "Prompt\tCategory\na cup\tAbstract\tmore\n"),
        ("partiprompts", "Prompt\tCategory\na cup\n"),
    ],
)
def test_another_layout_is_an_error_that_names_the_file(tmp_path, name, text):
    file = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=file.name):
        load_prompts(name, file)


@pytest.mark.parametrize(
    ("name", "near"), [("gen-eval", "geneval"), ("compbench", "compbench/color"), ("vbensh", "vbench")]
)
def test_an_unknown_name_offers_the_nearest(name, near):
    with pytest.raises(ValueError, match=near):
        load_prompts(name, "anywhere")


def test_the_tool_of_complex_prompts_makes_the_results_that_it_combines():
    command = BENCHMARKS["compbench/complex"].next_step
    scripts = ["BLIP_vqa.py", "2D_spatial_eval.py", "CLIP_similarity.py", "3_in_1.py"]
    assert sorted(scripts, key=command.index) == scripts
    assert command.count("--complex=True") == 2 and command.count("{folder}") == 4


def test_a_table_that_a_spreadsheet_wrote(tmp_path):
    file = write(tmp_path, "drawbench", "\ufeffPrompts,Category\na cup,Colors\n")
    assert load_prompts("drawbench", file)[0] == {"prompt": "a cup", "category": "Colors"}
