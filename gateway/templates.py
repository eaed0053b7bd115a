"""Prompt templates: read from their files at start, and put into the requests that name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.errors import ConfigurationError, FieldError, InvalidRequest
from common.models import Catalogue, ModelSpec, load_catalogue
from common.schemas import PROMPT_MAX_CHARS, VALUES_MAX_ENTRIES, GenerateRequest, Prompt
from common.settings import Settings
from common.templates import (
    NAME,
    PLACEHOLDER,
    PROMPT,
    NamedPlaceholder,
    Placeholder,
    TemplateView,
    Words,
    filled,
)
from common.tomlfile import TomlFile
from gateway import fields, sizes, submission

SHIPPED = Path(__file__).parent / "prompts"

TUNED = ("steps", "guidance_scale", "cfg_normalization", "cfg_truncation", "loras")  # to one model, and no other
FIELDS = ("model", "width", "height", "negative_prompt", "format", "quality", *TUNED)  # of a request, in a file
KNOWN = ("title", "description", "prompt", "placeholders", *FIELDS)  # in a file
PROMPTS = {"prompt", "negative_prompt"}  # placeholders stand in these


class Template(BaseModel):
    """What one file says. `request` has the fields that it sets, and its prompt with the placeholders as they stand."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    title: Words
    description: Words
    prompt: Prompt = Field(min_length=1)
    placeholders: dict[str, Placeholder] = Field(default_factory=dict, max_length=VALUES_MAX_ENTRIES)
    request: GenerateRequest

    def defaults(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the fields that it sets with this model: what is tuned to its own, only for that; a size that fits."""
        own = spec.name == self.request.model
        kept = [name for name in FIELDS if name in self.request.model_fields_set and (own or name not in TUNED)]
        width, height = self.request.width or spec.width, self.request.height or spec.height
        width, height = sizes.fitted(width, height, spec, spec.max_pixels)
        return {name: getattr(self.request, name) for name in kept} | {
            "model": spec.name,
            "width": width,
            "height": height,
        }

    def texts(self, request: GenerateRequest) -> tuple[dict[str, str], list[FieldError]]:
        """Return what stands for each placeholder in this request, and what is wrong with that. Blank is not given."""
        given = {name: text for name, text in request.values.items() if text.strip() and name != PROMPT}
        given |= {PROMPT: request.prompt} if request.prompt is not None else {}
        texts = {name: given.get(name, one.default) for name, one in self.placeholders.items()}
        known = ", ".join(map(place, self.placeholders)) or "none"
        unknown = f"unknown placeholder; template {self.name} has: {known}"
        missing = [name for name, text in texts.items() if text is None]
        errors = [FieldError(place(name), f"is required by template {self.name}") for name in missing]
        errors += [FieldError(f"values.{name}", unknown) for name in request.values if name not in self.placeholders]
        if PROMPT in self.placeholders and PROMPT in request.values:
            errors.append(FieldError(f"values.{PROMPT}", f"is what {PROMPT} itself says; give it there"))
        if PROMPT not in self.placeholders and PROMPT in given:
            errors.append(FieldError(PROMPT, f"template {self.name} has no place for it; it has: {known}"))
        return {name: text for name, text in texts.items() if text is not None}, errors


class Templates(Mapping[str, Template]):
    """The templates of this fleet by name, for the models that it serves."""

    def __init__(self, found: Mapping[str, Template], catalogue: Catalogue) -> None:
        self._found = dict(sorted(found.items()))
        self._served = dict(catalogue)
        self._default = catalogue.default

    def __getitem__(self, name: str) -> Template:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def fill(self, request: GenerateRequest) -> tuple[GenerateRequest, list[FieldError]]:
        """Return a request with what its template says where it says nothing itself, and what is wrong with it.

        One with which nothing is wrong has a prompt.
        """
        if request.template is None:
            wrong = FieldError("values", "needs template, whose placeholders it fills")
            return request, [wrong] if request.values else []
        template = self.get(request.template)
        if template is None:
            there = ", ".join(self) or "none"
            return request, [FieldError("template", f"is not installed here; there are: {there}")]
        texts, errors = template.texts(request)
        more = self._defaults(template, request)
        if not errors:
            more["prompt"] = template.prompt
            for field in PROMPTS & more.keys():
                more[field] = filled(more[field], texts)
                if len(more[field]) > PROMPT_MAX_CHARS:
                    most = f"at most {PROMPT_MAX_CHARS}, not {len(more[field])}"
                    errors.append(FieldError("values", f"the {field} may have {most} characters with them"))
        return request.model_copy(update=more), errors

    def views(self) -> list[TemplateView]:
        """Return the templates as clients see them."""
        return [self._view(template) for template in self._found.values()]

    def _defaults(self, template: Template, request: GenerateRequest) -> dict[str, Any]:
        """Return what a template adds to a request; nothing where that names a model that is not served."""
        spec = self._spec(template) if request.model is None else self._served.get(request.model)
        if spec is None:
            return {}
        more = template.defaults(spec)
        scale = more.get("guidance_scale", spec.guidance_scale)
        if (scale if request.guidance_scale is None else request.guidance_scale) <= 0:
            more.pop("negative_prompt", None)  # without an effect, each task would warn of it
        return {name: value for name, value in more.items() if not _says(request, name)}

    def _spec(self, template: Template) -> ModelSpec:
        """Return the model of a request that names none: the fleet's default where the template's is not served."""
        return self._served.get(template.request.model or "", self._default)

    def _view(self, template: Template) -> TemplateView:
        spec = self._spec(template)
        resolved = submission.resolve(GenerateRequest(prompt=template.prompt, **template.defaults(spec)), spec)
        return TemplateView(
            name=template.name,
            title=template.title,
            description=template.description,
            placeholders=[NamedPlaceholder(name=name, **dict(one)) for name, one in template.placeholders.items()],
            **resolved.model_dump(include=set(TemplateView.model_fields) - set(Template.model_fields) | PROMPTS),
        )


def load(settings: Settings) -> Templates:
    """Return the templates that ship with this program and the operator's own, which replace those of the same name.

    Raises ConfigurationError with the file and the line of what is wrong.
    """
    files = _files(SHIPPED)
    found = {name: read(file, load_catalogue()) for name, file in files.items()}
    if (folder := settings.templates_dir) is not None:
        if not folder.is_dir():
            raise ConfigurationError(f"ZFLEET_TEMPLATES_DIR: {folder} is no folder")
        own, models = _files(folder), load_catalogue(settings.models_file)
        files |= own
        found |= {name: read(file, models) for name, file in own.items()}
    _check_titles(files, found)
    return Templates(found, settings.catalogue())


def read(path: Path, models: Catalogue) -> Template:
    """Return the template of one file, for one of these models; raises ConfigurationError with the file and line."""
    file = TomlFile.read(path)
    if not re.fullmatch(NAME, path.stem):
        raise ConfigurationError(f"{path}: its name must be 1 to 64 of a-z 0-9 - _, the first a letter or digit")
    for field in file.values:
        if field not in KNOWN:
            file.refuse([field], f"unknown field; known are {', '.join(KNOWN)}")
    asked = {name: value for name, value in file.values.items() if name in (*FIELDS, "prompt")}
    said = {name: value for name, value in file.values.items() if name not in FIELDS}
    try:
        request = fields.read(GenerateRequest, asked)
        template = fields.read(Template, {**said, "name": path.stem, "request": request})
        submission.check(request, Catalogue([_model(file, request.model, models)]))
    except InvalidRequest as error:
        (loc, msg), *_ = error.errors
        file.refuse([int(part) if part.isdecimal() else part for part in loc.split(".")], msg)
    _check_placeholders(file, template)
    return template


def place(name: str) -> str:
    """Return how a request says a placeholder."""
    return PROMPT if name == PROMPT else f"values.{name}"


def _check_placeholders(file: TomlFile, template: Template) -> None:
    """Raise ConfigurationError unless a template's prompts use just the placeholders that it declares."""
    texts = {"prompt": template.prompt, "negative_prompt": template.request.negative_prompt or ""}
    for field, text in texts.items():
        for name in PLACEHOLDER.findall(text):
            if name not in template.placeholders:
                file.refuse([field], f"{{{name}}} is not declared; add [placeholders.{name}]", f"{{{name}}}")
        for brace in "{}":
            rest = PLACEHOLDER.sub("", text)
            if brace in rest:
                near = next(line for line in rest.split("\n") if brace in line)
                file.refuse([field], f"{near.strip()!r}: a brace belongs to a placeholder, as {{name}} of a-z 0-9 _")
    for name in template.placeholders:
        if not any(f"{{{name}}}" in text for text in texts.values()):
            file.refuse(["placeholders", name], f"is not used; put {{{name}}} into the prompt")
    least = {name: "x" if one.default is None else one.default for name, one in template.placeholders.items()}
    if not filled(template.prompt, least).strip():
        file.refuse(["prompt"], "must say something when every placeholder has its default")


def _check_titles(files: Mapping[str, Path], found: Mapping[str, Template]) -> None:
    """Raise ConfigurationError where people could not tell two templates apart."""
    seen: dict[tuple[str, str], str] = {}
    for name, template in found.items():
        for language, title in template.title:
            other = seen.setdefault((language, title), name)
            if other != name:
                remedy = f"say another, or call the file {other}.toml to replace that"
                message = f"{title!r} is the title of template {other} too; {remedy}"
                TomlFile.read(files[name]).refuse(["title", language], message)


def _model(file: TomlFile, name: str | None, models: Catalogue) -> ModelSpec:
    if name is None or name not in list(models):
        what = "is required" if name is None else f"{name!r} is in no catalogue"
        file.refuse(["model"], f"{what}; there are: {', '.join(models)}")
    return models[name]


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.toml")) if not path.name.startswith(".")}


def _says(request: GenerateRequest, field: str) -> bool:
    return field in request.model_fields_set and getattr(request, field) is not None
