"""From a YAML recipe and the command line to checked arguments; a misspelt field is one line, not a default.

A recipe is either flat (one stage) or has shared fields at the top and one section a stage:

    seed: 0
    stage1:
      learning_rate: 1e-3
    stage2:
      learning_rate: 2e-3

What is given on the command line wins over the section, which wins over the top.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from training.arguments import SECTIONS

ArgumentsT = TypeVar("ArgumentsT")


class ArgumentsError(ValueError):
    """A recipe or command line that cannot be used; the message names file, section and field."""


class _OneLineParser(HfArgumentParser):
    """An `HfArgumentParser` that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentsError(message)


def parse_arguments(arguments_class: type[ArgumentsT], section: str, argv: Sequence[str] | None = None) -> ArgumentsT:
    """Arguments of one stage from `--config FILE.yaml` (optional) and `--field value` (which win).

    Args:
        arguments_class: one of the dataclasses of `training.arguments`.
        section: the recipe's section for it.
        argv: default `sys.argv[1:]`.

    Raises `ArgumentsError` (a `ValueError`) naming file, section and field, with the nearest valid name.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    config, given = split_config(given)
    parser = _OneLineParser([arguments_class], allow_abbrev=False)  # type: ignore[list-item]
    parser.add_argument("--config", default=None, help="YAML recipe; fields given on the command line win")
    _add_help(parser, arguments_class)
    values = recipe_values(config, section) if config else {}
    sources = ([f"{config}, section {section}"] if config else []) + (["command line"] if given else [])
    try:
        words = [*as_command_line(arguments_class, values), *given]
        _, unknown = parser.parse_known_args(words)
        if not unknown:
            parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
            return cast(ArgumentsT, parsed[0])
    except (ValueError, TypeError) as error:  # the parser's, or a check of the dataclass
        raise ArgumentsError(f"{' and '.join(sources) or 'arguments'}: {error}") from error
    name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
    raise ArgumentsError(f"command line: unknown field {name!r}{_nearest(name, field_names(arguments_class))}")


def split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` (or `--config=FILE`) out of `argv`; the last one counts."""
    config, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None:
                raise ArgumentsError("command line: --config needs a file")
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
    return config, rest


def recipe_values(path: str | Path, section: str, optional: bool = False) -> dict[str, Any]:
    """The fields a recipe gives for `section`: shared ones, overridden by the section's own; none if it may be absent.

    Every section is checked, not only the one asked for. Raises `ArgumentsError` naming file, line or field, or
    `FileNotFoundError` naming the file.
    """
    recipe = read_recipe(path)
    sections = {name: value for name, value in recipe.items() if name in SECTIONS}
    shared = {name: value for name, value in recipe.items() if name not in SECTIONS}
    for name, values in sections.items():
        if not isinstance(values, Mapping):
            raise ArgumentsError(f"{path}, section {name}: expected fields with values, found {values!r}")
        check_names(values, field_names(SECTIONS[name]), f"{path}, section {name}")
    if not sections:  # flat: one stage, so a field of another one is a mistake
        check_names(shared, field_names(SECTIONS[section]), str(path))
        return shared
    everywhere = sorted({name for kind in SECTIONS.values() for name in field_names(kind)})
    check_names(shared, [*everywhere, *SECTIONS], f"{path}, top level")
    if section not in sections:
        if optional:
            return {}
        raise ArgumentsError(f"{path}: no section {section!r}; the file has {', '.join(sections)}")
    own = field_names(SECTIONS[section])
    return {**{name: value for name, value in shared.items() if name in own}, **sections[section]}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML recipe as a dictionary. Raises `FileNotFoundError`, or `ArgumentsError` with line and column."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ArgumentsError(f"--config {path}: not UTF-8 text (byte {error.start})") from error
    try:
        recipe = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ArgumentsError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ArgumentsError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ArgumentsError(f"{path}: expected fields with values at the top, found {type(recipe).__name__}")
    return recipe


def as_command_line(arguments_class: type, values: Mapping[str, Any]) -> list[str]:
    """A recipe's values as command line words, so that both are converted and checked by the same parser.

    (YAML reads `1e-3` as text and a bare `no` as false.) `null` leaves a field at its default.
    """
    hints = typing.get_type_hints(arguments_class)
    words: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            yaml_no = value is False and "no" in typing.get_args(hints[name])
            words.append(f"--{name}={'no' if yaml_no else str(value).lower()}")
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            if not value:
                raise ArgumentsError(f"{name}: an empty list; leave the field out for its default")
            words.extend([f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)])
        else:
            words.append(f"--{name}={value}")
    return words


def field_names(arguments_class: type) -> list[str]:
    """Names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(arguments_class)]


def check_names(values: Iterable[Any], valid: Sequence[str], where: str) -> None:
    """Raise `ArgumentsError` for the first of `values` that is not `valid`, with the nearest name that is."""
    for name in values:
        if name not in valid:
            raise ArgumentsError(f"{where}: unknown field {str(name)!r}{_nearest(str(name), valid)}")


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(valid))}"


def _add_help(parser: HfArgumentParser, arguments_class: type) -> None:
    """Show the docstring under each field as its `--help` text."""
    texts: dict[str, str] = {}
    for kind in reversed(arguments_class.__mro__):
        if dataclasses.is_dataclass(kind):
            texts.update(_field_docstrings(kind))
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")


@functools.cache
def _field_docstrings(kind: type) -> dict[str, str]:
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            target, constant = statement.target, following.value
            if isinstance(target, ast.Name) and isinstance(constant, ast.Constant):
                texts[target.id] = str(constant.value)
    return texts
