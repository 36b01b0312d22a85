# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""VQAScore with CLIP-FlanT5: how likely a model answers that an image shows its prompt."""

import json

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from .base import PretrainedReward
from .checkpoints import load_converted, pretrained_from_state_dict, read_sharded, under, weights_file
from .preprocessing import CLIP_MEAN, clip_pixel_values, pad_to_square


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
ANSWER = "Yes"
VISION = "openai/clip-vit-large-patch14-336"
BACKGROUND = tuple(int(255 * mean) / 255 for mean in CLIP_MEAN)
TOWER = "vision_tower.vision_tower.vision_model."
PROJECTOR = "mm_projector."


class VQAScoreReward(PretrainedReward):
    r"""
    VQAScore: \( \sqrt{P(\text{Yes}) \, P(\text{end} \mid \text{Yes})} \) as the answer to whether the figure shows the prompt,
    the exponential of the mean log-likelihood of the two tokens of the answer. Images are padded to squares, not cropped.

    Args:
        language ([`~transformers.T5ForConditionalGeneration`]): Flan-T5.
        vision ([`~transformers.CLIPVisionModel`]): CLIP's image encoder, of which the last layer but one is read.
        projector (`nn.Module`): from image tokens to word embeddings.
        tokenizer (`Callable`): tokenizer of the T5.
        question (`str`, *optional*): question, with `{}` where the prompt goes.
        answer (`str`, *optional*, defaults to `"Yes"`): answer whose likelihood is the score.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "vqascore"
    weights = "zhiqiulin/clip-flant5-xxl"
    tokenizers = {4096: "google/flan-t5-xxl", 2048: "google/flan-t5-xl"}  # by the width of the T5
    needs = (f'{tokenizers[4096]} --include "*.json" spiece.model', VISION)
    license = "Apache-2.0"
    score_range = (0.0, 1.0)
    num_parameters = 11_459_819_520
    default_dtype = torch.bfloat16
    default_batch_size = 4
    citation = "Lin et al., 2024, arXiv:2404.01291"

    def __init__(
        self, language, vision, projector, tokenizer, question: str = QUESTION, answer: str = ANSWER, **kwargs
    ):
        super().__init__(**kwargs)
        check_question(question)
        self.language, self.vision, self.projector, self.tokenizer = language, vision, projector, tokenizer
        self.question = question
        self.answer_ids = tokenizer(answer).input_ids

    @classmethod
    def load(cls, weights, torch_dtype, revision, vision_model: str = VISION, tokenizer=None, **kwargs):
        facts = json.loads(weights_file(weights, "config.json", revision).read_text())
        config = T5Config.from_dict({**facts, "model_type": "t5"})
        state = read_sharded(weights, revision)
        vision, projector = under(state, TOWER), under(state, PROJECTOR)
        if tokenizer is None:
            if config.d_model not in cls.tokenizers:
                raise ValueError(
                    f"`{weights}` is no CLIP-FlanT5 that is known: pass its `tokenizer=`, a Hub id or folder."
                )
            tokenizer = cls.tokenizers[config.d_model]
        of_vision = CLIPVisionConfig.from_pretrained(vision_model)
        return cls(
            load_language(config, state, weights, torch_dtype),
            pretrained_from_state_dict(CLIPVisionModel, of_vision, vision, weights, torch_dtype)
            if vision
            else CLIPVisionModel.from_pretrained(vision_model, dtype=torch_dtype),
            load_converted(make_projector(of_vision.hidden_size, config.d_model), projector, weights, torch_dtype),
            AutoTokenizer.from_pretrained(tokenizer),
            **kwargs,
        )

    def image_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Word embeddings of an image, of shape `(N, patches, dim)`."""
        square = pad_to_square(images.clamp(0, 1), BACKGROUND)
        pixel_values = clip_pixel_values(square, self.vision.config.image_size).to(self.vision.dtype)
        layers = self.vision(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        return self.projector(layers[-2][:, 1:])

    def raw_scores(self, images, prompts):
        embed, device = self.language.get_input_embeddings(), images.device
        before, after = (
            [torch.tensor(ids, device=device) for ids in self.tokenizer(texts).input_ids]
            for texts in self.texts(prompts)
        )
        rows = [
            torch.cat([embed(first), image, embed(second)])
            for first, image, second in zip(before, self.image_tokens(images), after, strict=True)
        ]
        mask = pad_sequence([torch.ones(len(row), device=device) for row in rows], batch_first=True)
        labels = torch.tensor([self.answer_ids] * len(rows), device=device)
        logits = self.language(
            inputs_embeds=pad_sequence(rows, batch_first=True), attention_mask=mask.long(), labels=labels
        ).logits[..., : len(self.tokenizer)]
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        return (-losses.mean(1)).exp()

    def texts(self, prompts: list[str]) -> tuple[list[str], list[str]]:
        """The conversations before and after the image. Each part is tokenised with an end token of its own."""
        after = [f"\n{self.question.format(prompt)} ASSISTANT: " for prompt in prompts]
        return [f"{SYSTEM} USER: "] * len(prompts), after


def check_question(question: str) -> None:
    """
    Raises:
        ValueError: if there is not one place where the prompt goes.
    """
    try:
        has_prompt = question.format("a cat") != question.format("a dog")
    except (KeyError, IndexError, ValueError, AttributeError):
        has_prompt = False
    if not has_prompt:
        raise ValueError(
            f"`question` of the reward `vqascore` must have `{{}}` where the prompt goes, but is {question!r}."
        )


def load_language(
    config: T5Config, state: dict[str, torch.Tensor], source: str, dtype: torch.dtype
) -> T5ForConditionalGeneration:
    """
    The T5 of a checkpoint. Its output layer is not the embeddings, but transformers ties both whatever the configuration says.

    Raises:
        ValueError: if the checkpoint has no output layer of its own.
    """
    others = (TOWER, PROJECTOR)
    copies = ("embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    own = {name: value for name, value in state.items() if not name.startswith(others) and name not in copies}
    if "lm_head.weight" not in own:
        raise ValueError(f"`{source}` has no `lm_head.weight`: a CLIP-FlanT5 has an output layer of its own.")
    config.vocab_size = len(own["lm_head.weight"])
    config.tie_word_embeddings = False  # `T5Config` says `True` whatever it is given
    own |= dict.fromkeys(copies[1:], own["shared.weight"])
    language = pretrained_from_state_dict(T5ForConditionalGeneration, config, own, source, dtype)
    language.set_input_embeddings(language.shared)  # one copy of them
    if language.lm_head.weight is language.shared.weight:
        raise RuntimeError(
            "transformers has tied the output layer of the T5 to its embeddings, which gives wrong scores."
        )
    return language


def make_projector(image_width: int, width: int) -> nn.Sequential:
    """From image tokens to word embeddings."""
    return nn.Sequential(nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width))
