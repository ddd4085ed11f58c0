"""From captions to what the UNet attends to.

CLIP reads 77 tokens: start, 75 of text, end. A longer caption is cut in chunks of 75 that are
encoded one by one, each with a start and an end of its own, and joined again between one start and
one end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.training.options import Options
from library.training.prompt_weights import parse_weights

if TYPE_CHECKING:
    from library.training.models import DiffusionModel

TEXT_TOKENS = 75
MAX_CHUNKS = 3


@dataclass
class TextEmbeddings:
    """The text side of a batch."""

    context: Tensor  # [B, chunks·75 + 2, D]: for cross attention
    pooled: Tensor | None = None  # [B, P]: SDXL's second text encoder, projected


def encode_captions(
    model: DiffusionModel, captions: Sequence[str], options: Options
) -> TextEmbeddings:
    """Embed training captions, differentiable in the text encoders.

    `max_token_length` sets the number of chunks, `clip_skip` the layer (SD 1.x and 2.x; SDXL always
    takes the last but one), `weighted_captions` whether `(word:1.2)` multiplies embeddings.
    """
    chunks = (options.max_token_length or TEXT_TOKENS) // TEXT_TOKENS
    return _encode(model, captions, options, chunks, options.weighted_captions)


def encode_prompts(
    model: DiffusionModel, prompts: Sequence[str], options: Options
) -> TextEmbeddings:
    """Embed prompts to draw from, positive and negative ones in one call.

    All get as many chunks as the longest needs (three at most), so that they can be guided against
    one another. Weights always count, in the way they do in training: embeddings are multiplied and
    not scaled back to their former mean, which may be near 0.
    """
    longest = max(
        len(tokens)
        for tokenizer in model.tokenizers
        for prompt in prompts
        for tokens, _ in [_weighted_tokens(tokenizer, prompt, True)]
    )
    chunks = min(MAX_CHUNKS, max(1, -(-longest // TEXT_TOKENS)))
    return _encode(model, prompts, options, chunks, weighted=True)


class TextEncoding:
    """The text side of training: captions in, embeddings out.

    Text encoders that are not trained run without gradients, and with `cache_text_encoder_outputs`
    once a caption: its embeddings are kept in memory.
    """

    def __init__(self, model: DiffusionModel, options: Options, trains_text_encoder: bool) -> None:
        self.model = model
        self.options = options
        self.trains_text_encoder = trains_text_encoder
        self.cached = options.cache_text_encoder_outputs and not trains_text_encoder
        self._known: dict[str, TextEmbeddings] = {}

    def __call__(self, captions: Sequence[str]) -> TextEmbeddings:
        if self.trains_text_encoder:
            return encode_captions(self.model, captions, self.options)
        with torch.no_grad():
            if not self.cached:
                return encode_captions(self.model, captions, self.options)
            self.remember(captions)
        return self._recall(captions)

    def remember(self, captions: Sequence[str]) -> None:
        """Encode those captions that are not known yet."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._known))
        if not new:
            return
        with torch.no_grad():
            text = encode_captions(self.model, new, self.options)
        for row, caption in enumerate(new):
            pooled = None if text.pooled is None else text.pooled[row].cpu()
            self._known[caption] = TextEmbeddings(text.context[row].cpu(), pooled)

    def _recall(self, captions: Sequence[str]) -> TextEmbeddings:
        device = next(self.model.unet.parameters()).device
        rows = [self._known[caption] for caption in captions]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextEmbeddings(
            torch.stack([row.context for row in rows]).to(device),
            torch.stack(pooled).to(device) if pooled else None,
        )


def final_layer_norm(text_encoder: nn.Module) -> nn.Module:
    """The norm after the last layer; transformers 5 took `CLIPTextModel.text_model` away."""
    text_model: Any = getattr(text_encoder, "text_model", text_encoder)
    norm: nn.Module = text_model.final_layer_norm
    return norm


def _encode(
    model: DiffusionModel,
    captions: Sequence[str],
    options: Options,
    chunks: int,
    weighted: bool,
) -> TextEmbeddings:
    contexts: list[Tensor] = []
    pooled: Tensor | None = None
    for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        tokens, weights = tokenize(tokenizer, text_encoder, captions, chunks, weighted)
        output = text_encoder(
            tokens.flatten(0, 1).to(next(text_encoder.parameters()).device),
            output_hidden_states=model.kind == "sdxl" or options.clip_skip is not None,
        )
        states = _chosen_layer(output, text_encoder, model.kind, options.clip_skip)
        states = _join_chunks(states.unflatten(0, tokens.shape[:2]))
        if weighted:
            states = _apply_weights(states, weights.to(states.device, states.dtype))
        contexts.append(states)
        text_embeds = getattr(output, "text_embeds", None)
        if text_embeds is not None:
            pooled = text_embeds[::chunks]  # the first chunk speaks for the whole caption
    return TextEmbeddings(torch.cat(contexts, dim=-1), pooled)


def _chosen_layer(output: Any, text_encoder: nn.Module, kind: str, clip_skip: int | None) -> Tensor:
    states: Tensor
    if kind == "sdxl":
        states = output.hidden_states[-2]
    elif clip_skip is None:
        states = output.last_hidden_state
    else:
        states = final_layer_norm(text_encoder)(output.hidden_states[-clip_skip])
    return states


def tokenize(
    tokenizer: Any,
    text_encoder: Any,
    captions: Sequence[str],
    chunks: int,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Token ids [B, chunks, 77] and the factors of the text's tokens [B, chunks·75] (float32).

    The end of a caption is marked once; what follows is padding. A chunk that the text runs through
    gets an end of its own, one that holds padding only begins with an end, as in stock.
    """
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings) - 2
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids: list[list[list[int]]] = []
    factors: list[list[float]] = []
    for caption in captions:
        tokens, weights = _weighted_tokens(tokenizer, caption, weighted)
        tokens, weights = tokens[: chunks * length], weights[: chunks * length]
        factors.append(weights + [1.0] * (chunks * length - len(weights)))
        text = [*tokens, end]
        text += [padding] * (chunks * length + 1 - len(text))
        if chunks == 1:
            ids.append([[begin, *text]])
            continue
        last = text[-1]
        caption_ids = []
        for start in range(0, chunks * length, length):
            chunk = text[start : start + length]
            closing = last if chunk[-1] in (end, padding) else end
            if chunk[0] == padding:
                chunk[0] = end
            caption_ids.append([begin, *chunk, closing])
        ids.append(caption_ids)
    return torch.tensor(ids), torch.tensor(factors)


def _weighted_tokens(tokenizer: Any, caption: str, weighted: bool) -> tuple[list[int], list[float]]:
    """The caption's tokens without start and end, and the factor of each."""
    if not weighted:
        tokens = _bare_tokens(tokenizer, caption)
        return tokens, [1.0] * len(tokens)
    tokens, weights = [], []
    for stretch in parse_weights(caption):
        piece = _bare_tokens(tokenizer, stretch.text)
        tokens += piece
        weights += [stretch.weight] * len(piece)
    return tokens, weights


def _bare_tokens(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokens


def _join_chunks(states: Tensor) -> Tensor:
    """[B, chunks, 77, D] to [B, chunks·75 + 2, D]: first start, all the texts, last end."""
    start = states[:, 0, :1]
    end = states[:, -1, -1:]
    return torch.cat([start, states[:, :, 1:-1].flatten(1, 2), end], dim=1)


def _apply_weights(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the embeddings [B, T, D] of the text's tokens by their weights [B, T−2]."""
    ones = weights.new_ones(len(weights), 1)
    return states * torch.cat([ones, weights, ones], dim=1).unsqueeze(-1)
