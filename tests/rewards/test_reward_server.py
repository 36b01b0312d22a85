# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import ast
import http.client
import json
import socket
import sys
import threading
from http.server import HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tapo_trl.rewards import reward_server
from tapo_trl.rewards.reward_server import BadRequest, checked_scores, main, make_handler, read_request


CODE = Path(reward_server.__file__).read_text()


def test_runs_on_python_3_8():
    """No newer syntax, no annotations that are evaluated, and no newer modules."""
    tree = ast.parse(CODE, feature_version=(3, 8))
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    known = {"argparse", "http.server", "importlib", "json", "math", "os", "sys", "traceback", "numpy"}
    assert imported == known
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None and not any(argument.annotation for argument in node.args.args)
    newer = ("removeprefix", "removesuffix", "strict=True", "math.prod", " match ")
    assert not [word for word in newer if word in CODE]


def body(images, **request):
    return save({"images": images}, {"request": json.dumps(request)})


def test_requests():
    pixels = torch.randint(0, 255, (2, 3, 4, 3), dtype=torch.uint8)
    images, prompts, columns = read_request(body(pixels, prompts=["a", "b"], columns={"x": [1, 2]}))
    assert np.array_equal(images, pixels.numpy()) and prompts == ["a", "b"] and columns == {"x": [1, 2]}
    images[0] = 0  # a scorer may write
    floats = torch.rand(1, 2, 3, 4, 3)
    images, _, _ = read_request(body(floats, prompts=["a"], columns={}))
    assert images.dtype == np.float32 and np.array_equal(images, floats.numpy())


def test_requests_that_cannot_be_read():
    good = body(torch.zeros(1, 2, 2, 3), prompts=["a"], columns={})
    bad = {
        "cannot be read": [b"", b"\x80\x04pickle", good[:-5], good[:30], (2**62).to_bytes(8, "little") + good[8:]],
        "do not fit": [
            body(torch.zeros(2, 2, 2, 3), prompts=["a"], columns={}),
            body(torch.zeros(1, 3, 2, 2), prompts=["a"], columns={}),
            body(torch.zeros(1, 2, 2), prompts=["a"], columns={}),
        ],
    }
    bad["cannot be read"].append(body(torch.zeros(1, 2, 2, 3), prompts=5, columns={}))
    bad["cannot be read"].append(body(torch.zeros(1, 2, 2, 3), prompts=["a"], columns=5))
    bad["cannot be read"].append(body(torch.zeros(1, 2, 2, 3, dtype=torch.int64), prompts=["a"], columns={}))
    bad["cannot be read"].append(save({"images": torch.zeros(1, 2, 2, 3)}))
    for message, requests in bad.items():
        for request in requests:
            with pytest.raises(BadRequest, match=message):
                read_request(request)


def test_scores():
    assert checked_scores(torch.tensor([1.0, 2.0], requires_grad=True), 2) == [1.0, 2.0]
    assert checked_scores(np.array([1, 2], dtype=np.float16), 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="returned 1 scores for 2 images"):
        checked_scores([1], 2)
    with pytest.raises(ValueError, match="not finite"):
        checked_scores([1, float("inf")], 2)
    with pytest.raises(TypeError):
        checked_scores([[1, 2]], 1)


@pytest.fixture
def ask(request):
    """Sends a request to a server in this process; returns status and answer."""
    timeout = getattr(request, "param", 30)
    handler = make_handler(lambda images, prompts: [1.0] * len(prompts), "ones", 10_000, timeout)
    handler.log_message = lambda *arguments: None
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def send(method, content=b"", **headers):
        connection = http.client.HTTPConnection(*server.server_address, timeout=20)
        connection.request(method, "/", content, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    send.address = server.server_address
    yield send
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers(ask):
    assert ask("GET") == (200, {"name": "ones"})
    good = body(torch.zeros(2, 2, 2, 3), prompts=["a", "b"], columns={})
    assert ask("POST", good) == (200, {"scores": [1.0, 1.0]})
    status, answer = ask("POST", b"nonsense")
    assert status == 400 and "cannot be read" in answer["error"]
    status, answer = ask("POST", bytes(10_001))
    assert status == 400 and "10001 bytes" in answer["error"]
    status, answer = ask("POST", **{"Content-Length": "much"})
    assert status == 400
    unknown = body(torch.zeros(1, 2, 2, 3), prompts=["a"], columns={"x": [1]})
    status, answer = ask("POST", unknown)
    assert status == 500 and "unexpected keyword argument 'x'" in answer["error"]
    assert ask("POST", good)[0] == 200  # it goes on


@pytest.mark.parametrize("ask", [0.05], indirect=True)
@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nContent-", b"POST / HTTP/1.1\r\nContent-Length: 9000\r\n\r\nabc"]
)
def test_a_stalled_client_does_not_keep_others_waiting(ask, sent):
    """It came first, and never sends the rest. Without a limit, the second would give up after 20 seconds."""
    with socket.create_connection(ask.address) as stalled:
        stalled.sendall(sent)
        assert ask("GET") == (200, {"name": "ones"})
        stalled.settimeout(20)
        assert stalled.recv(1) == b""  # hung up
    assert ask("POST", body(torch.zeros(1, 2, 2, 3), prompts=["a"], columns={})) == (200, {"scores": [1.0]})


def test_command_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "my_scorer_of_nothing.py").write_text("def score(images, prompts):\n    return [0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    servers = []

    def serve(server):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(HTTPServer, "serve_forever", serve)
    main(["my_scorer_of_nothing:score", "--port", "0"])
    assert "my_scorer_of_nothing:score at http://127.0.0.1:" in capsys.readouterr().out
    assert servers[0].server_address[0] == "127.0.0.1"  # this machine only, unless `--host` says otherwise
    with pytest.raises(SystemExit):
        main(["my_scorer_of_nothing"])
    assert "must be module:function" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["my_scorer_of_nothing:score", "--client-timeout", "0"])
    assert "must be more than 0" in capsys.readouterr().err
