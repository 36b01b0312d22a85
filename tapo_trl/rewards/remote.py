# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A reward that another process computes, in an environment of its own: the client of `reward_server.py`."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any, Literal
from urllib.parse import urlsplit

import safetensors.torch
import torch


LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_ANSWER = 64 * 1024 * 1024
RETRIED = (OSError, http.client.HTTPException)


class RemoteRewardError(RuntimeError):
    """A reward server that does not answer, or that answers nonsense."""


class RemoteReward:
    """
    A [`RewardFunction`] that sends images to a server on this machine, or on another one, and gets their scores back. Use it for
    a scorer that cannot be installed beside this package. The server is the file `reward_server.py` in this folder, which needs
    numpy, and nothing of this package.

    ```python
    from tapo_trl import RemoteReward, TAPOConfig, TAPOTrainer

    reward = RemoteReward("http://127.0.0.1:8100")
    trainer = TAPOTrainer("stabilityai/stable-diffusion-3.5-medium", reward, TAPOConfig("sd35-tapo"))
    ```

    A request is retried `retries` times if the server is unreachable, slow or fails (HTTP 500). Then the run stops. A
    wrong number of scores, or a NaN or infinite score, stops it at once. Missing scores are never replaced by a
    default.

    Args:
        url (`str`): address, such as `http://127.0.0.1:8100`.
        timeout (`float`, *optional*, defaults to 300): seconds for one answer.
        retries (`int`, *optional*, defaults to 3): further tries after a failure.
        wait (`float`, *optional*, defaults to 2): seconds before the first of them; each one waits twice as long.
        batch_size (`int`, *optional*, defaults to 16): images per request.
        dtype (`str`, *optional*, defaults to `"uint8"`):
            `"uint8"` sends what a picture file would hold; `"float32"` sends the pixels as they are, in [0, 1].

    Raises:
        RemoteRewardError: if the server does not answer now.
        ValueError: if an argument is unusable.
    """

    differentiable = False

    def __init__(
        self,
        url: str,
        timeout: float = 300,
        retries: int = 3,
        wait: float = 2,
        batch_size: int = 16,
        dtype: Literal["uint8", "float32"] = "uint8",
    ):
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            is_address = False
        if not is_address:
            raise ValueError(f"`url` must be an address such as `http://127.0.0.1:8100`, but it is `{url}`.")
        if batch_size < 1 or retries < 0 or timeout <= 0 or dtype not in ("uint8", "float32"):
            raise ValueError(
                "`batch_size` must be at least 1, `retries` at least 0, `timeout` more than 0, and `dtype` `uint8` or `float32`, but "
                f"they are {batch_size}, {retries}, {timeout} and {dtype!r}."
            )
        self.url, self.timeout, self.retries, self.wait = url.rstrip("/"), timeout, retries, wait
        self.batch_size, self.dtype = batch_size, dtype
        # A proxy of the environment would be asked for this machine's own address.
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(*proxies)
        self.name = str(self._ask("/", None).get("name", "remote"))

    def __call__(self, images: torch.Tensor, prompts: list[str], **columns: list[Any]) -> torch.Tensor:
        """
        Rate images or videos.

        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)` or `(N, 3, F, H, W)`): float in [0, 1].
            prompts (`list[str]`): one per image.
            columns: further columns, one value per image, which the server's function gets, too. Values must be JSON.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32, on the device of the images. NaN where pixels are not finite.

        Raises:
            RemoteRewardError: if the server fails.
        """
        readable = torch.stack([image.isfinite().all() for image in images])
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = {name: list(values[rows]) for name, values in columns.items()}
            scores += self._rate(images[rows], list(prompts[rows]), part)
        return torch.tensor(scores, device=images.device).where(readable, torch.nan)

    def _rate(self, images: torch.Tensor, prompts: list[str], columns: dict[str, list[Any]]) -> list[float]:
        pixels = images.detach().float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).movedim(1, -1).cpu()
        if self.dtype == "uint8":
            pixels = (pixels * 255).round().to(torch.uint8)
        try:
            request = json.dumps({"prompts": prompts, "columns": columns})
        except (TypeError, ValueError) as error:
            raise RemoteRewardError(
                f"The columns {sorted(columns)} cannot be sent to `{self.url}`: {error}. Remove those that are no text, numbers or "
                "lists from the dataset."
            ) from error
        body = safetensors.torch.save({"images": pixels.contiguous()}, {"request": request})
        scores = self._ask("/score", body).get("scores")
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or len(scores) != len(prompts):
            found = f"{len(scores)} scores" if numbers else f"`{str(scores)[:60]}`"
            raise RemoteRewardError(
                f"The reward server `{self.url}` must give one number for each of {len(prompts)} images, but gave {found}."
            )
        bad = [index for index, score in enumerate(scores) if not math.isfinite(score)]
        if bad:
            raise RemoteRewardError(
                f"The reward server `{self.url}` gave a score that is not finite, {scores[bad[0]]}, for the prompt "
                f"{prompts[bad[0]]!r}."
            )
        return [float(score) for score in scores]

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        """The server's answer, after at most `retries` further tries."""
        for attempt in range(self.retries + 1):
            try:
                return self._try(path, body)
            except urllib.error.HTTPError as error:
                problem = f"answered HTTP {error.code}: {_reason(error)}"
                if error.code < 500:
                    raise RemoteRewardError(f"The reward server `{self.url}` {problem}.") from error
                last = error
            except RETRIED as error:
                problem, last = f"did not answer: {error or type(error).__name__}", error
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise RemoteRewardError(
            f"The reward server `{self.url}` {problem}. It was asked {self.retries + 1} times, for up to {self.timeout:g} seconds "
            "each. Is it running? Start it again, and resume the run from its last checkpoint."
        ) from last

    def _try(self, path: str, body: bytes | None) -> dict[str, Any]:
        headers = {} if body is None else {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.url + path, body, headers)
        deadline = time.monotonic() + self.timeout
        answer = b""
        with self._opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(65536):
                answer += part
                if time.monotonic() > deadline or len(answer) > MAX_ANSWER:
                    raise TimeoutError(
                        f"its answer was not complete after {self.timeout:g} seconds or {MAX_ANSWER} bytes"
                    )
            length = response.headers.get("Content-Length")
        if length is not None and len(answer) < int(length):
            raise OSError(f"its answer stopped after {len(answer)} of {length} bytes")
        try:
            decoded = json.loads(answer)
        except ValueError:
            decoded = None
        if not isinstance(decoded, dict):
            raise RemoteRewardError(
                f"`{self.url}{path}` is no reward server: it answered {answer[:60]!r}, which is no JSON object."
            )
        return decoded


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(MAX_ANSWER))["error"]).rstrip(".")
    except (ValueError, KeyError, TypeError, *RETRIED):
        return str(error.reason)
