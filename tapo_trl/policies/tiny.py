# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Parts of tiny pipelines with random weights, of the same classes as the real ones."""

import string

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


def tiny_clip_tokenizer(model_max_length: int = 8) -> CLIPTokenizer:
    letters = list(string.ascii_lowercase + string.digits)
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def tiny_clip(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    return T5Tokenizer(vocab=[(piece, 0.0 if index < 3 else -2.0) for index, piece in enumerate(pieces)], extra_ids=0)


def tiny_umt5(tokenizer: T5Tokenizer, hidden_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // 2,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config).eval()


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content if message.content is string else "
    "message.content | map(attribute='text') | join }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LANGUAGE_MODEL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def tiny_byte_tokenizer(prefix: str = "", prefix_length: int = 0) -> Qwen2Tokenizer:
    """A token per byte; but `prefix`, the start of a template that a pipeline cuts off again, has `prefix_length` of them."""
    special = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    vocab = ["<|endoftext|>", *special, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(vocab)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = _CHAT
    if prefix:  # as many letters as are too many become one token
        start, surplus = prefix.index("\n") + 1, len(tokenizer(prefix).input_ids) - prefix_length
        tokenizer.add_tokens([prefix[start : start + surplus + 1]])
    return tokenizer


def _qwen25_text(tokenizer: Qwen2Tokenizer, num_layers: int) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    return {**_LANGUAGE_MODEL, "num_hidden_layers": num_layers, "vocab_size": len(tokenizer), "rope_parameters": rope}


def tiny_qwen25_text(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen25_text(tokenizer, 4))).eval()


def tiny_llama(tokenizer: Qwen2Tokenizer) -> LlamaModel:
    return LlamaModel(LlamaConfig(**_LANGUAGE_MODEL, num_hidden_layers=4, vocab_size=len(tokenizer))).eval()


def tiny_qwen25_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = _qwen25_text(tokenizer, 2)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def tiny_qwen3(
    tokenizer: Qwen2Tokenizer, num_layers: int = 3, model_class: type[PreTrainedModel] = Qwen3Model
) -> PreTrainedModel:
    sizes = {**_LANGUAGE_MODEL, "num_hidden_layers": num_layers, "head_dim": 8, "vocab_size": len(tokenizer)}
    return model_class(Qwen3Config(**sizes)).eval()


class TinyProcessor(ProcessorMixin):
    """What the processor of a Qwen3-VL does with text. That one needs torchvision, for images."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def __call__(self, text: list[str], **kwargs):
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, messages: list[dict], **kwargs) -> list[list[int]]:
        return [self.tokenizer.apply_chat_template(messages, **kwargs)]


def tiny_qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    text = _qwen25_text(tokenizer, 2) | {"head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def tiny_mistral3(tokenizer: Qwen2Tokenizer, num_layers: int) -> Mistral3ForConditionalGeneration:
    sizes = {**_LANGUAGE_MODEL, "num_hidden_layers": num_layers, "head_dim": 8, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"model_type": "pixtral", "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config={"model_type": "mistral", **sizes}, vision_config=vision)
    return Mistral3ForConditionalGeneration(config).eval()


def tiny_flux_vae() -> AutoencoderKL:
    """FLUX.1's autoencoder with 4 channels: 8 x 8 pixels per position."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Move every parameter a little: adaLN starts at values that make a random transformer nearly linear in its input."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
