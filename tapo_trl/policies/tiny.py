# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Parts of tiny pipelines with random weights, of the same classes as the real ones."""

import string

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
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


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Move every parameter a little: adaLN starts at values that make a random transformer nearly linear in its input."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
