"""Prompt templates as GET /api/templates lists them, and what they and the files that they are read from share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

from common.loras import LoraChoice
from common.schemas import ImageFormat, PlaceholderValue, Wire

NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
PROMPT = "prompt"  # the placeholder that the request's own prompt stands for
PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]{0,31})\}")

Label = Annotated[str, StringConstraints(min_length=1, max_length=300, strip_whitespace=True)]


class Words(Wire):
    """A text for people, in English and in Chinese."""

    en: Label
    zh: Label


class Placeholder(Wire):
    """A part of a template's prompt that whoever uses it says."""

    title: Words
    default: PlaceholderValue | None = Field(default=None, description="Null: it has to be given. May be empty.")


class NamedPlaceholder(Placeholder):
    """A placeholder with the name by which `values` give its text; `prompt` is given by the request's own prompt."""

    name: str


class TemplateView(Wire):
    """A line of GET /api/templates: what a submit that names it gets, where the request says nothing else."""

    name: str
    title: Words
    description: Words
    placeholders: Sequence[NamedPlaceholder]
    prompt: str = Field(description="With its placeholders, as {product}.")
    negative_prompt: str | None
    model: str = Field(description="Its own, or the fleet's default where that is not served.")
    width: int
    height: int
    steps: int
    guidance_scale: float
    format: ImageFormat
    quality: int
    loras: Sequence[LoraChoice]


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return a text with its placeholders replaced, once: what looks like one inside a value stays as it is."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)
