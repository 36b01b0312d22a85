# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""A CLIP as open_clip defines and names it, and a tokenizer of bytes."""

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 3 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(3 * width, width))

    def forward(self, x, mask=None):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageTower(nn.Module):
    def __init__(self, width, heads, layers, image_size, patch, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, dim))

    def forward(self, pixels):
        tokens = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), tokens], dim=1)
        tokens = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(tokens[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """Heads: 4 in the image tower, 2 in the text tower."""

    def __init__(self, vocab_size, context=16, image_size=24):
        super().__init__()
        self.visual = ImageTower(16, 4, 3, image_size, 8, 10)
        self.token_embedding = nn.Embedding(vocab_size, 12)
        self.positional_embedding = nn.Parameter(torch.randn(context, 12))
        self.transformer = Transformer(12, 2, 2)
        self.ln_final = nn.LayerNorm(12)
        self.text_projection = nn.Parameter(torch.randn(12, 10))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def encode_image(self, pixels):
        return F.normalize(self.visual(pixels), dim=-1)

    def encode_text(self, tokens):
        mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
        states = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        states = self.ln_final(states)[torch.arange(len(tokens)), tokens.argmax(-1)]
        return F.normalize(states @ self.text_projection, dim=-1)


def byte_tokenizer(length=16) -> CLIPTokenizer:
    """As CLIP's, without merges: bytes, and bytes that end a word. The end of the text has the largest id."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)
