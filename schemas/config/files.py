"""Configs as files: commented YAML out; YAML plus ``--set`` in, one clear line per mistake."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config.presets import preset
from schemas.config.root import TriptychConfig
from schemas.errors import ConfigError


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML, each field under its description; :func:`load_config` reads it back."""
    return "\n".join(_lines(config, 0)) + "\n"


def _lines(model: BaseModel, depth: int) -> list[str]:
    pad = "  " * depth
    lines: list[str] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if depth == 0 and lines:
            lines.append("")
        lines.append(f"{pad}# {field.description}")
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_lines(value, depth + 1)]
        else:
            plain = model.model_dump(mode="json")[name]
            # width: one line per value, however long, so that the comment above stays next to it
            text = (
                yaml.safe_dump(plain, default_flow_style=True, width=10_000)
                .removesuffix("...\n")
                .strip()
            )
            lines.append(f"{pad}{name}: {text}")
    return lines


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), base: TriptychConfig | None = None
) -> TriptychConfig:
    """A config from a YAML file (or a preset), with ``a.b=value`` overrides applied in order.

    Args:
        path: YAML file; it may name only the keys that differ from the base.
        overrides: ``section.key=value``, the value in YAML syntax.
        base: What unnamed keys keep; default: the ``tiny`` preset.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown (with the nearest valid
        one), or a value
            has the wrong type or is out of range. One line per mistake.
    """
    values: dict[str, Any] = (base or preset("tiny")).model_dump(mode="json")
    if path is not None:
        _merge(values, _read_yaml(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                "--set needs KEY=VALUE", found=text, expected="for example training.sft.steps=100"
            )
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError("the value of --set is not YAML", where=key, found=value) from error
        for part in reversed(key.strip().split(".")):
            parsed = {part: parsed}
        _merge(values, cast("dict[str, Any]", parsed))
    try:
        return TriptychConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cast("dict[str, Any]", e)) for e in error.errors()]
        raise ConfigError(
            "the configuration is not valid:\n  " + "\n  ".join(lines),
            where=path,
            do="`triptych config tiny` prints every key with its meaning and range",
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            "configuration file not found",
            where=path,
            do="make one with `triptych config tiny > my.yaml`",
        )
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError("the configuration file is not YAML", where=path, found=error) from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ConfigError(
            "the configuration file is not a mapping",
            where=path,
            found=type(read).__name__,
            expected="key: value",
        )
    return cast("dict[str, Any]", read)


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        here = into.get(key)
        if isinstance(here, dict) and isinstance(value, dict):
            _merge(cast("dict[str, Any]", here), cast("dict[str, Any]", value))
        else:
            into[key] = value


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: the key, what was found, what was expected."""
    location = [str(p) for p in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = nearest_key(key)
        return f"{key}: unknown key" + (f"; did you mean {near}?" if near else "")
    found = error.get("input")
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(found, dict) else f" (found {found!r})"
    return f"{key or 'config'}: {message[0].lower()}{message[1:]}{shown}"


def all_keys(model: type[BaseModel] = TriptychConfig, prefix: str = "") -> list[str]:
    """Every key of a config model in dotted form, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += all_keys(annotation, f"{prefix}{name}.")
        elif typing.get_origin(annotation) is not None:
            continue
    return keys


def nearest_key(key: str) -> str | None:
    """The valid key most like ``key``: first within its section, then by its last word anywhere."""
    keys = all_keys()
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_name = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    named = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_name, n=1, cutoff=0.7)
    return by_name[named[0]] if named else None
