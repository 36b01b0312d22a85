# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from tapo_trl import RemoteReward
from tapo_trl.rewards import remote, reward_server
from tapo_trl.rewards.remote import RemoteRewardError
from tapo_trl.rewards.scoring import call_reward_function, check_reward_function, reward_name


SCORER = """
import os, signal
import numpy as np

def brightness(images, prompts, **columns):
    assert "torch" not in __import__("sys").modules and "tapo_trl" not in __import__("sys").modules
    if "die" in prompts:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raise" in prompts:
        raise RuntimeError("out of luck")
    if "one too many" in prompts:
        return [0.0] * (len(prompts) + 1)
    if "nan" in prompts:
        return [float("nan")] * len(prompts)
    scores = images.reshape(len(images), -1).mean(1) + np.array([len(prompt) for prompt in prompts])
    return scores + np.array(columns.get("bonus", [0] * len(prompts)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The server's file on its own and a scorer, as a user has them in another environment."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "reward_server.py").write_bytes(Path(reward_server.__file__).read_bytes())
    (folder / "scorer.py").write_text(SCORER)
    return folder


def start(folder, *options):
    """Start a server as a process of its own, and wait for the line that says where it is."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    command = [sys.executable, "reward_server.py", "scorer:brightness", "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, process.stdout.readline().split()[-1]


@pytest.fixture(scope="module")
def server(folder):
    process, url = start(folder)
    yield url
    process.kill()
    process.communicate()


@pytest.fixture
def fake():
    """A server in this process that answers what a test tells it to: a list of functions, one per request."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            send(self, {"name": "fake"})

        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            answers.pop(0)(self)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    server.url, server.answers, server.asked = f"http://127.0.0.1:{server.server_address[1]}", answers, asked
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def send(handler, content, status=200, length=None):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def images(number=3):
    return torch.rand(number, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def test_scores_of_a_server(server):
    reward, pixels = RemoteReward(server, batch_size=2), images()
    rounded = (pixels * 255).round()
    expected = rounded.mean((1, 2, 3)) + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(reward(pixels, ["a", "bb", "ccc"]), expected)
    expected += torch.tensor([5.0, 6.0, 7.0])
    torch.testing.assert_close(reward(pixels, ["a", "bb", "ccc"], bonus=[5, 6, 7]), expected)
    exact = RemoteReward(server, dtype="float32")
    torch.testing.assert_close(exact(pixels, ["", "", ""]), pixels.mean((1, 2, 3)))


def test_videos(server):
    videos = torch.rand(2, 3, 5, 4, 6)
    torch.testing.assert_close(RemoteReward(server, dtype="float32")(videos, ["", ""]), videos.mean((1, 2, 3, 4)))


def test_as_a_reward_function(server):
    reward = RemoteReward(server, dtype="float32")
    check_reward_function(reward, ["bonus"])
    found = call_reward_function(reward, images(2), ["", ""], {"bonus": [1, 2]})
    torch.testing.assert_close(found, images(2).mean((1, 2, 3)) + torch.tensor([1.0, 2.0]))
    assert reward_name(reward) == "brightness"


def test_pixels_that_are_not_finite(server):
    pixels = images()
    pixels[1, 0, 0, 0] = torch.nan
    assert RemoteReward(server)(pixels, ["", "", ""]).isnan().tolist() == [False, True, False]


def test_the_request_is_safetensors(fake):
    fake.answers.append(lambda handler: send(handler, {"scores": [1, 2.5]}))
    assert RemoteReward(fake.url)(images(2), ["é", "b"], tag=["x", None]).tolist() == [1, 2.5]
    pixels, prompts, columns = reward_server.read_request(fake.asked[0])
    assert pixels.dtype == "uint8" and (prompts, columns) == (["é", "b"], {"tag": ["x", None]})
    expected = (images(2) * 255).round().movedim(1, -1)
    assert torch.equal(torch.from_numpy(pixels).float(), expected)


class TestFaults:
    def test_dead_from_the_start(self):
        with pytest.raises(RemoteRewardError, match=r"did not answer: .*refused.* asked 3 times.*resume the run"):
            RemoteReward(f"http://127.0.0.1:{free_port()}", retries=2, wait=0)

    def test_killed_in_the_middle(self, folder):
        process, url = start(folder)
        reward = RemoteReward(url, retries=2, wait=0)
        assert len(reward(images(), ["a", "b", "c"])) == 3
        with pytest.raises(RemoteRewardError, match=r"did not answer: .*asked 3 times"):
            reward(images(), ["a", "die", "c"])
        assert process.wait(timeout=60) == -signal.SIGKILL
        process.communicate()

    def test_started_again(self, fake):
        """A failure that passes costs a retry, and no score."""
        fake.answers += [
            lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
            lambda handler: send(handler, {"error": "busy"}, 503),
            lambda handler: send(handler, {"scores": [1, 2, 3]}),
        ]
        assert RemoteReward(fake.url, wait=0)(images(), ["", "", ""]).tolist() == [1, 2, 3]
        assert len(fake.asked) == 3 and fake.asked[0] == fake.asked[2]

    def test_slow(self, fake):
        released = threading.Event()
        fake.answers += [lambda handler: released.wait(60)] * 2
        reward = RemoteReward(fake.url)
        reward.timeout, reward.retries, reward.wait = 0.05, 0, 0
        try:
            with pytest.raises(
                RemoteRewardError, match=r"did not answer: .*timed out.* 1 times, for up to 0.05 seconds"
            ):
                reward(images(), ["", "", ""])
        finally:
            released.set()

    def test_answer_in_drops(self, fake, monkeypatch):
        """Each part comes in time, and the whole does not."""
        clock = iter(range(0, 10000, 7))
        monkeypatch.setattr(remote.time, "monotonic", lambda: next(clock))
        fake.answers.append(lambda handler: send(handler, {"scores": [1, 2, 3]}))
        reward = RemoteReward(fake.url, timeout=8)
        reward.timeout, reward.retries = 5, 0
        with pytest.raises(RemoteRewardError, match="not complete after 5 seconds"):
            reward(images(), ["", "", ""])

    def test_internal_error(self, server):
        with pytest.raises(
            RemoteRewardError, match=r"answered HTTP 500: RuntimeError: out of luck. It was asked 2 times"
        ):
            RemoteReward(server, retries=1, wait=0)(images(), ["a", "raise", "c"])

    @pytest.mark.parametrize("prompt", ["one too many", "nan"])
    def test_the_server_checks_its_scorer(self, server, prompt):
        problem = {"one too many": "returned 4 scores for 3 images", "nan": "score that is not finite"}[prompt]
        with pytest.raises(RemoteRewardError, match=f"answered HTTP 500: .*{problem}"):
            RemoteReward(server, retries=0)(images(), ["a", prompt, "c"])

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ({"scores": [1, 2]}, "one number for each of 3 images, but gave 2 scores"),
            ({"scores": [1, 2, 3, 4]}, "gave 4 scores"),
            ({"scores": [1, 2, None]}, "but gave `.1, 2, None.`"),
            ({"scores": [1, 2, "3"]}, "but gave `"),
            ({"scores": [1, 2, True]}, "but gave `"),
            ({"scores": 3}, "but gave `3`"),
            ({}, "but gave `None`"),
            ({"scores": [1, float("nan"), 3]}, "a score that is not finite, nan, for the prompt 'b'"),
            ({"scores": [1, 2, float("-inf")]}, "a score that is not finite, -inf, for the prompt 'c'"),
            (b"<html>", "is no reward server: it answered b'<html>'"),
            ([1, 2, 3], "is no reward server"),
        ],
    )
    def test_nonsense_stops_at_once(self, fake, answer, message):
        fake.answers.append(lambda handler: send(handler, answer))
        with pytest.raises(RemoteRewardError, match=message):
            RemoteReward(fake.url, wait=0)(images(), ["a", "b", "c"])
        assert len(fake.asked) == 1

    def test_an_answer_that_breaks_off(self, fake):
        fake.answers += [lambda handler: send(handler, {"scores": [1, 2, 3]}, length=1000)] * 2
        with pytest.raises(RemoteRewardError, match="stopped after 21 of 1000 bytes"):
            RemoteReward(fake.url, retries=1, wait=0)(images(), ["a", "b", "c"])

    def test_refused(self, fake):
        fake.answers.append(lambda handler: send(handler, {"error": "too large"}, 413))
        with pytest.raises(RemoteRewardError, match=r"answered HTTP 413: too large\.$"):
            RemoteReward(fake.url, wait=0)(images(), ["a", "b", "c"])

    def test_waits_twice_as_long_each_time(self, fake, monkeypatch):
        waited = []
        monkeypatch.setattr(remote.time, "sleep", waited.append)
        fake.answers += [lambda handler: send(handler, {}, 500)] * 4
        with pytest.raises(RemoteRewardError, match="HTTP 500"):
            RemoteReward(fake.url, retries=3, wait=2)(images(), ["a", "b", "c"])
        assert waited == [2, 4, 8]

    def test_columns_that_are_no_json(self, fake):
        with pytest.raises(RemoteRewardError, match=r"The columns \['picture'\] cannot be sent"):
            RemoteReward(fake.url)(images(1), ["a"], picture=[object()])


def test_proxies_are_not_asked_for_this_machine(fake, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert RemoteReward(fake.url, retries=0).name == "fake"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:8100",), "must be an address such as"),
        (("file:///etc/passwd",), "must be an address such as"),
        (("http://127.0.0.1:abc",), "must be an address such as"),
        (("http://127.0.0.1:99999",), "must be an address such as"),
        (("http://127.0.0.1:1", 0), "`timeout` more than 0"),
        (("http://127.0.0.1:1", 1, -1), "`retries` at least 0"),
        (("http://127.0.0.1:1", 1, 1, 1, 0), "`batch_size` must be at least 1"),
        (("http://127.0.0.1:1", 1, 1, 1, 1, "int8"), "`dtype`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(*arguments)
