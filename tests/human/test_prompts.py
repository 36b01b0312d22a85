# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from tapo_trl.cli.main import main
from tapo_trl.human.elements import Elements
from tapo_trl.human.prompts import SimilarPrompts, clean_answer, find_fault, import_prompts, write_prompts
from tapo_trl.human.study import Study
from tapo_trl.human.writers import EndpointWriter, TemplateWriter


ELEMENTS = """
elements:
  subject: [a fox, an owl, a whale]
  place: {in a field: 3, on a roof: 1}
  style: [photograph, drawing, oil painting, film]
templates: ["{style} of {subject} {place}"]
"""


@pytest.fixture
def elements(tmp_path):
    (tmp_path / "elements.yaml").write_text(ELEMENTS)
    return Elements.load(tmp_path / "elements.yaml")


@pytest.fixture
def study(tmp_path):
    study = Study()
    study.save(tmp_path / "study")
    return study


class Writer:
    """Answers as it is told, and counts how often it is asked."""

    name = "told"

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def write(self, combinations, seed):
        self.asked += combinations
        return [self.answer(values, len(self.asked)) for values in combinations]


class TestElements:
    def test_the_shares_of_values(self, elements):
        rows = [values for values, _ in zip(elements.sample(12, 0), range(12), strict=False)]
        assert len({tuple(row.values()) for row in rows}) == 12
        first = Elements.load()
        rows = [values for values, _ in zip(first.sample(960, 0), range(960), strict=False)]
        for element, values in first.values.items():
            counts = Counter(row[element] for row in rows)
            assert max(counts.values()) - min(counts.values()) <= 2 and len(counts) == len(values)
        assert len(first.values) == 8

    def test_weights(self, elements):
        assert elements.num_combinations == 24
        counts = Counter(values["place"] for values, _ in zip(elements.sample(8, 0), range(8), strict=False))
        assert counts == {"in a field": 6, "on a roof": 2}

    def test_all_combinations_and_no_more(self, elements):
        rows = {tuple(values.values()) for values in elements.sample(5, 0)}
        assert len(rows) >= 20

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("elements: [a]", "mapping"),
            ("elements: {a: {x: -1}}", "positive"),
            ("elements: {a: []}", "list of values"),
            ("elements: {a: [x]}\ntemplates: ['{b}']", "cannot be filled"),
            ("elements: {a: [x]", "not valid YAML"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        (tmp_path / "e.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Elements.load(tmp_path / "e.yaml")


class TestAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            '"A fox."',
            "A fox.",
            '{"prompt": "A fox."}',
            '["A fox."]',
            "1. A fox.\n2. An owl.",
            "Here is a prompt:\n- A fox.",
        ],
    )
    def test_the_prompt_in_an_answer(self, answer):
        assert clean_answer(answer) == "A fox."

    def test_faults(self):
        values = {"subject": "a red fox"}
        assert find_fault("A fox in the snow", values, 10) is None
        assert find_fault("An owl in the snow", values, 10) == "without its subject"
        assert find_fault("I'm sorry, I cannot write of a fox", values, 10) == "a refusal"
        assert find_fault("fox " * 11, values, 10) == "longer than 10 words"
        assert find_fault(" ", values, 10) == "empty"

    def test_similar_prompts(self):
        similar = SimilarPrompts()
        similar.add("a fox in a field at dawn, soft light, photograph")
        assert similar.find("A fox in a field at dawn; soft light: photograph!") == "a duplicate"
        assert similar.find("a fox in a field at dawn, soft light, drawing") == "too similar to another"
        assert similar.find("an owl on a roof at night") is None


class TestWriting:
    def test_templates(self, study, elements):
        report = write_prompts(study, elements, TemplateWriter(elements), 10)
        rows = study.read_prompts()
        assert report["kept"] == len(rows) == 10
        assert all(row["prompt"] == "{style} of {subject} {place}".format(**row["meta"]) for row in rows)

    def test_more_than_there_are(self, study, elements):
        report = write_prompts(study, elements, TemplateWriter(elements), 100)
        assert 0 < report["kept"] <= 24
        assert report["kept"] + sum(report["dropped"].values()) <= 24

    def test_faults_are_asked_for_again_and_then_written_by_a_template(self, study, elements):
        answers = Writer(
            lambda values, call: (
                "" if values["subject"] == "a fox" else f"look, {values['subject']} number {call} {call * 7}"
            )
        )
        report = write_prompts(study, elements, answers, 6, batch_size=3, attempts=2)
        rows = study.read_prompts()
        foxes = [row for row in rows if row["meta"]["subject"] == "a fox"]
        assert report["from_templates"] == len(foxes) > 0
        assert all(row["backend"] == ("template" if row in foxes else "told") for row in rows)
        assert sum(values["subject"] == "a fox" for values in answers.asked) == 2 * len(foxes)

    def test_a_restart_asks_for_nothing_twice(self, study, elements):
        writer = Writer(lambda values, call: f"{values['subject']} {values['place']} {values['style']} {call}")
        write_prompts(study, elements, writer, 4, batch_size=2)
        first = study.read_prompts()
        write_prompts(study, elements, writer, 8, batch_size=2)
        assert study.read_prompts()[:4] == first
        combinations = [tuple(values.values()) for values in writer.asked]
        assert len(combinations) == len(set(combinations))

    def test_an_interrupted_run_keeps_what_it_has(self, study, elements):
        def answer(values, call):
            if call > 4:
                raise KeyboardInterrupt
            return f"{values['subject']} {values['place']} {values['style']} {call}"

        with pytest.raises(KeyboardInterrupt):
            write_prompts(study, elements, Writer(answer), 8, batch_size=2)
        assert len(study.read_prompts()) == 4

    def test_own_prompts(self, study):
        assert import_prompts(study, ["one", "two", "one"]) == 2
        assert import_prompts(study, ["two", "three"]) == 1
        assert [row["prompt"] for row in study.read_prompts()] == ["one", "two", "three"]


class Endpoint(BaseHTTPRequestHandler):
    requests: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append((self.path, self.headers["authorization"], body))
        content = body["messages"][0]["content"]
        subject = content.split("- subject: ")[1].splitlines()[0]
        answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f'"{subject} {len(self.requests)}"'}}],
                  "created": 0, "id": "", "model": "m", "system_fingerprint": "", "usage": {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}}  # fmt: skip
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.requests = []
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


class TestEndpoint:
    def test_an_openai_compatible_server(self, study, elements, endpoint):
        writer = EndpointWriter(endpoint, "small", "images", 20, 0.7, "key")
        write_prompts(study, elements, writer, 3, batch_size=3)
        path, key, body = Endpoint.requests[0]
        assert path == "/v1/chat/completions"
        assert key == "Bearer key"
        assert (body["model"], body["temperature"]) == ("small", 0.7)
        assert "makes images" in body["messages"][0]["content"] and "20 words" in body["messages"][0]["content"]
        assert {row["backend"] for row in study.read_prompts()} == {"small"}
        assert len({request[2]["seed"] for request in Endpoint.requests}) == 3

    def test_no_key_and_no_model(self, endpoint, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")  # is of the Hub, and of no business of others
        EndpointWriter(endpoint, None, "images", 20, 0.7).write([{"subject": "a fox"}], 0)
        _, key, body = Endpoint.requests[0]
        assert key is None and "model" not in body

    def test_no_server(self, study, elements):
        writer = EndpointWriter("http://127.0.0.1:9/v1", "small", "images", 20, 0.7)
        with pytest.raises(RuntimeError, match="gave no answer"):
            write_prompts(study, elements, writer, 3)


class TestCommand:
    def test_templates_and_a_figure(self, tmp_path, capsys):
        main(["prompts", str(tmp_path / "study"), "--num", "20"])
        output = capsys.readouterr().out
        assert "20 prompts" in output and (tmp_path / "study/elements.png").stat().st_size > 10_000
        assert Study.load(tmp_path / "study").dimension_names == [
            "visual_quality",
            "motion_consistency",
            "text_alignment",
        ]

    def test_contradictions(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["prompts", str(tmp_path), "--prompts", "a", "--llm", "b"])
        assert "leave one of the two out" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["prompts"])
        assert "`folder` is missing" in capsys.readouterr().err
