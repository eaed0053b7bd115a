"""From text to what the transformer reads of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor

COUNTS = 4096  # texts whose number of tokens is remembered


class Embedded(NamedTuple):
    """A text that the text encoder has read."""

    states: Tensor  # (tokens, text width), on the device
    length: int  # of the whole text's tokens, more than there are states where it was cut


class Prompts:
    """Encodes prompts with a checkpoint's tokenizer and text encoder, and keeps what it has encoded."""

    def __init__(self, tokenizer: Any, text_encoder: Any, *, max_tokens: int, device: str, max_bytes: int = 0) -> None:
        """`text_encoder` ends with the layer that the transformer reads; see skeletons.empty_text_encoder.

        Keep up to `max_bytes` of embeddings, those used last; runs that hold an older one go on holding it.
        """
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_tokens = max_tokens
        self._device = device
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Embedded] = OrderedDict()  # by the text's SHA-256: no prompt stays in memory
        self._bytes = 0
        self._counts: OrderedDict[bytes, int] = OrderedDict()  # tokens, by the text's SHA-256
        self._hits = 0
        self._misses = 0

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

    def count(self, text: str) -> int:
        """Return how many tokens of a bare text count, up to the model's limit."""
        key = _digest(text)
        if key not in self._counts:
            self._counts[key] = min(len(self._tokenizer(text, verbose=False).input_ids), self._max_tokens)
            if len(self._counts) > COUNTS:
                self._counts.popitem(last=False)
        return self._counts[key]

    def evict(self) -> None:
        """Forget all embeddings; runs hold theirs themselves."""
        self._kept.clear()
        self._bytes = 0

    def counters(self) -> dict[str, float]:
        """Return how often a text was found encoded, how often not, and the bytes that are kept now."""
        return {"embeds_hits": self._hits, "embeds_misses": self._misses, "embeds_bytes": self._bytes}

    def _embed(self, chat: str, what: str, warnings: list[str]) -> Tensor:
        key = _digest(chat)
        if key in self._kept:
            self._hits += 1
            self._kept.move_to_end(key)
            embedded = self._kept[key]
        else:
            self._misses += 1
            embedded = self._read(chat)
            self._keep(key, embedded)
        if (count := embedded.length) > (limit := self._max_tokens):
            warnings.append(f"The {what} is {count} tokens long and this model reads {limit}; the rest was left out.")
        return embedded.states

    def _keep(self, key: bytes, embedded: Embedded) -> None:
        if embedded.states.nbytes > self._max_bytes:
            return
        self._kept[key] = embedded
        self._bytes += embedded.states.nbytes
        while self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.states.nbytes

    def _read(self, chat: str) -> Embedded:
        tokens = self._tokenizer(chat, return_tensors="pt", verbose=False).input_ids
        if (count := tokens.shape[1]) > (limit := self._max_tokens):
            tokens = self._tokenizer(chat, return_tensors="pt", truncation=True, max_length=limit).input_ids
        return Embedded(self._text_encoder(tokens.to(self._device), use_cache=False).last_hidden_state[0], count)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


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
