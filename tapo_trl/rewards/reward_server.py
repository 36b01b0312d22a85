# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Serves a scorer of images to `tapo_trl.RemoteReward`. Copy this file into the scorer's own environment: it needs Python 3.8 or
newer and numpy, and nothing of tapo_trl.

    python reward_server.py my_scorer:score --port 8100

`score(images, prompts, **columns)` of `my_scorer.py` gets `images`, an array of shape (N, height, width, 3), or (N, frames,
height, width, 3) for videos, of uint8 values or of float32 values in [0, 1], a list of N prompts and the further columns of
the dataset, and returns N numbers. If it raises an exception, the client gets HTTP 500 with its message.
"""

import argparse
import importlib
import json
import math
import os
import sys
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np


DTYPES = {"U8": np.uint8, "F32": np.float32}


class BadRequest(Exception):
    """What the client sent cannot be read: HTTP 400."""


def read_request(body):
    """Images, prompts and columns from the bytes of a safetensors file, whose metadata holds what is not an array."""
    try:
        length = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + length].decode("utf-8"))
        request = json.loads(header["__metadata__"]["request"])
        facts = header["images"]
        start, end = (8 + length + offset for offset in facts["data_offsets"])
        if not 8 + length <= start <= end <= len(body):
            raise ValueError("the images are not inside of the file")
        # a copy, which the scorer may change
        images = np.frombuffer(body[start:end], dtype=DTYPES[facts["dtype"]]).reshape(facts["shape"]).copy()
        prompts, columns = list(request["prompts"]), dict(request["columns"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadRequest(f"the request cannot be read: {type(error).__name__}: {error}") from error
    if images.ndim not in (4, 5) or images.shape[-1] != 3 or len(images) != len(prompts):
        raise BadRequest(f"images of shape {images.shape} do not fit to {len(prompts)} prompts")
    return images, prompts, columns


def checked_scores(scores, number):
    """Scores as a list of `number` finite floats, or a ValueError."""
    if hasattr(scores, "detach"):  # a tensor
        scores = scores.detach().cpu()
    scores = [float(score) for score in scores]
    if len(scores) != number:
        raise ValueError(f"the scorer returned {len(scores)} scores for {number} images")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"the scorer returned a score that is not finite: {scores}")
    return scores


def make_handler(function, name, max_bytes, client_timeout=30):
    """
    A request handler that calls `function`. It hangs up on a client that sends or reads nothing for `client_timeout` seconds, so
    that others get their turn: one request is answered after the other.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = client_timeout

        def do_GET(self):
            self.answer(200, {"name": name})

        def do_POST(self):
            try:
                length = int(self.headers.get("Content-Length", -1))
                if not 0 <= length <= max_bytes:
                    raise BadRequest(f"the request has {length} bytes; `--max-mb` allows {max_bytes}")
                images, prompts, columns = read_request(self.rfile.read(length))
            except (BadRequest, ValueError) as error:
                return self.answer(400, {"error": str(error)})
            try:
                scores = checked_scores(function(images, prompts, **columns), len(prompts))
            except Exception as error:
                traceback.print_exc()
                return self.answer(500, {"error": f"{type(error).__name__}: {error}"})
            return self.answer(200, {"scores": scores})

        def answer(self, status, content):
            body = json.dumps(content).encode("utf-8")
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError as error:  # the client did not wait
                self.log_message("no answer was sent: %s", error)

    return Handler


def main(arguments=None):
    """Parse the command line and serve until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorer", help="module:function; the folder you are in is searched, too")
    parser.add_argument("--port", type=int, default=8100, help="port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address; other than 127.0.0.1 it is open to your network")
    parser.add_argument("--name", help="name in logs; the function's own by default")
    parser.add_argument("--max-mb", type=int, default=2048, help="largest request, in MiB")
    parser.add_argument(
        "--client-timeout", type=float, default=30, help="seconds that a client may stall, while others wait"
    )
    options = parser.parse_args(arguments)
    module, colon, attribute = options.scorer.partition(":")
    if not colon:
        parser.error(f"the scorer must be module:function, but it is {options.scorer}")
    sys.path.insert(0, os.getcwd())
    if not options.client_timeout > 0:
        parser.error(f"--client-timeout must be more than 0, but it is {options.client_timeout}")
    function = getattr(importlib.import_module(module), attribute)
    handler = make_handler(function, options.name or attribute, options.max_mb * 2**20, options.client_timeout)
    server = HTTPServer((options.host, options.port), handler)
    print(f"{options.scorer} at http://{options.host}:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
