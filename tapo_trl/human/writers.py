# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Who writes a prompt from its meta elements: templates, a language model here, or one behind an endpoint."""

import json
import urllib.request
from collections.abc import Sequence
from typing import Any, Protocol

from .elements import Elements


INSTRUCTION = (
    "You write prompts for a model that makes {media} from text. Write one prompt of at most {words} words that shows all of the "
    "following, in natural words of your own and in an order of your own. Answer with the prompt alone, without quotation marks.\n"
)


SECONDS = 300  # that an endpoint may take for a prompt


class Writer(Protocol):
    """Writes prompts."""

    name: str

    def write(self, combinations: Sequence[dict[str, str]], seed: int) -> list[str]:
        """A text for each combination of values; an empty one if none came."""


class TemplateWriter:
    """
    Fills the templates of the elements, in turn.

    Args:
        elements ([`Elements`]): Elements with templates.
    """

    name = "template"

    def __init__(self, elements: Elements):
        self.templates = elements.templates

    def write(self, combinations: Sequence[dict[str, str]], seed: int) -> list[str]:
        return [
            self.templates[(seed + index) % len(self.templates)].format(**values)
            for index, values in enumerate(combinations)
        ]


def instruction(values: dict[str, str], media: str, max_words: int) -> str:
    """What a language model is asked."""
    lines = (f"- {element.replace('_', ' ')}: {value}" for element, value in values.items())
    return INSTRUCTION.format(media=media, words=max_words) + "\n".join(lines)


class PipelineWriter:
    """
    A chat model of `transformers` on this machine.

    Args:
        model (`str`): Hub id or folder.
        media (`str`): `"images"` or `"videos"`.
        max_words (`int`): Longest prompt.
        temperature (`float`): Temperature of sampling.
    """

    def __init__(self, model: str, media: str, max_words: int, temperature: float):
        from transformers import pipeline

        self.name, self.media, self.max_words, self.temperature = model, media, max_words, temperature
        self.pipeline = pipeline("text-generation", model=model, dtype="auto", device_map=None)
        if self.pipeline.tokenizer.chat_template is None:
            raise ValueError(f"`llm={model}` is no chat model: its tokenizer has no chat template.")
        if self.pipeline.tokenizer.pad_token_id is None:
            self.pipeline.tokenizer.pad_token_id = self.pipeline.tokenizer.eos_token_id

    def write(self, combinations: Sequence[dict[str, str]], seed: int) -> list[str]:
        from transformers import set_seed

        set_seed(seed)
        chats = [
            [{"role": "user", "content": instruction(values, self.media, self.max_words)}] for values in combinations
        ]
        outputs = self.pipeline(
            chats,
            return_full_text=False,
            do_sample=True,
            temperature=self.temperature,
            max_new_tokens=3 * self.max_words,
            batch_size=len(chats),
        )
        return [output[0]["generated_text"].strip() for output in outputs]


class EndpointWriter:
    """
    A chat model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, a provider.

    Args:
        endpoint (`str`): Address, such as `http://127.0.0.1:8000/v1`.
        model (`str`, *optional*): Its name there.
        media (`str`): `"images"` or `"videos"`.
        max_words (`int`): Longest prompt.
        temperature (`float`): Temperature of sampling.
        api_key (`str`, *optional*): Key.
    """

    def __init__(
        self,
        endpoint: str,
        model: str | None,
        media: str,
        max_words: int,
        temperature: float,
        api_key: str | None = None,
    ):
        self.name, self.endpoint, self.media = model or endpoint, endpoint, media
        self.max_words, self.temperature = max_words, temperature
        # `InferenceClient` of huggingface_hub would refuse a server of one's own with HF_HUB_OFFLINE=1
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self.options: dict[str, Any] = {} if model is None else {"model": model}

    def write(self, combinations: Sequence[dict[str, str]], seed: int) -> list[str]:
        texts = []
        for index, values in enumerate(combinations):
            body = {
                "messages": [{"role": "user", "content": instruction(values, self.media, self.max_words)}],
                "seed": seed + index,
                "temperature": self.temperature,
                "max_tokens": 3 * self.max_words,
                **self.options,
            }
            address = self.endpoint.rstrip("/") + "/chat/completions"
            request = urllib.request.Request(address, json.dumps(body).encode(), self.headers)
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as response:
                    answer = json.load(response)["choices"][0]["message"]["content"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise RuntimeError(
                    f"`endpoint={self.endpoint}` gave no answer ({error!r}). The prompts so far are saved: run the command again to go on."
                ) from error
            texts.append((answer or "").strip())
        return texts
