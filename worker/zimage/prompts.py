"""From text to what the transformer reads of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Prompts:
    """Encodes prompts with a checkpoint's tokenizer and text encoder."""

    def __init__(self, tokenizer: Any, text_encoder: Any, *, max_tokens: int, device: str) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_tokens = max_tokens
        self._device = device

    def encode(self, text: str, what: str, warnings: list[str]) -> Tensor:
        """Return the text's embedding (tokens, text width), cut to the model's limit with a warning."""
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return self._embed(chat, what, warnings)

    def encode_pieces(self, text: str, what: str, warnings: list[str], *, pictures: int) -> tuple[Tensor, ...]:
        """Return the embeddings (tokens, text width) of a text as an Omni checkpoint reads it, beside so many pictures.

        Each picture stands between two pieces; each piece is cut to the model's limit on its own.
        """
        return tuple(self._embed(piece, what, warnings) for piece in omni_pieces(text, pictures))

    def _embed(self, chat: str, what: str, warnings: list[str]) -> Tensor:
        limit = self._max_tokens
        tokens = self._tokenizer(chat, return_tensors="pt", verbose=False).input_ids
        if (count := tokens.shape[1]) > limit:
            warnings.append(f"The {what} is {count} tokens long and this model reads {limit}; the rest was left out.")
            tokens = self._tokenizer(chat, return_tensors="pt", truncation=True, max_length=limit).input_ids
        states = self._text_encoder(tokens.to(self._device), output_hidden_states=True, use_cache=False)
        embedding: Tensor = states.hidden_states[-2][0]
        return embedding


def omni_pieces(text: str, pictures: int) -> tuple[str, ...]:
    """Return the chat around the pictures that the text is about, and around the one that is the answer."""
    answer = f"{text}<|im_end|>\n<|im_start|>assistant\n"
    if not pictures:
        return (f"<|im_start|>user\n{answer}",)
    between = ["<|vision_end|><|vision_start|>"] * (pictures - 1)
    return (
        "<|im_start|>user\n<|vision_start|>",
        *between,
        f"<|vision_end|>{answer}<|vision_start|>",
        "<|vision_end|><|im_end|>",
    )
