"""Settings of a recipe with the overrides of the command line, checked.

Lightning's parser refuses a bad setting with a page of usage. Here the settings are checked first, so that the refusal
is one line with the nearest known name, and one argument of one callback in the recipe's list can be overridden.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lowrank_lit._recipes import load_recipe, nearest, read_value, resolve_paths
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import RecipeError
from lowrank_lit.module import LowRankModule

Override = tuple[str, str]

_GROUPS: dict[str, type] = {"trainer": pl.Trainer, "model": LowRankModule, "data": TextDataModule}
# Where a class may be named without its module.
_CLASS_HOMES = (
    "lowrank_lit.callbacks",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
# Settings that take a class by its short name, or a plain word such as `ddp`.
_CLASS_SETTINGS = ("trainer.logger", "trainer.profiler", "trainer.strategy", "trainer.plugins")


def read_settings(path: Path, overrides: Iterable[Override]) -> dict[str, Any]:
    """Settings of a recipe with overrides applied, every key and every class's arguments checked.

    Args:
        path: The recipe.
        overrides: Dotted name and text of each value, in order.

    Raises:
        RecipeError: One line, naming the setting and the nearest known one.
    """
    settings = load_recipe(path)
    known = _known_settings()
    given = list(overrides)
    _normalise_callbacks(settings)
    for name, text in given:
        _apply(settings, name, text, known)
        _normalise_callbacks(settings)
    _check_group(settings, "", known, f"{path} with the options given" if given else str(path))
    return settings


def callback_entry(settings: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The entry of the callback class ``name`` (without its module) in ``trainer.callbacks``, if there is one."""
    for entry in settings.get("trainer", {}).get("callbacks") or []:
        if _short_name(entry) == name:
            return typing.cast("dict[str, Any]", entry)
    return None


def drop_callback(settings: dict[str, Any], name: str) -> None:
    """Take every callback of the class ``name`` out of ``trainer.callbacks``."""
    trainer = settings.setdefault("trainer", {})
    trainer["callbacks"] = [entry for entry in trainer.get("callbacks") or [] if _short_name(entry) != name]


def callback_help(settings: dict[str, Any], name: str) -> str:
    """What a callback takes, from its docstring.

    Raises:
        RecipeError: If neither the recipe nor this package nor Lightning has such a callback.
    """
    entry = callback_entry(settings, name)
    cls = _import_class(entry["class_path"] if entry else name, f"--{name}.help")
    parser, _ = _arguments_of(cls, name)
    parser.usage = f"lowrank-lit run RECIPE [--{name}.ARGUMENT=VALUE ...]"
    # The parser offers a file for the whole class; the recipe is that file.
    return re.sub(rf" +--{name} CONFIG\s+Path to a configuration file\.\n", "", str(parser.format_help()))


def short(message: str) -> str:
    """The parser's explanation of a bad value, of many lines, as one line: key, what was expected, what was given.

    Examples:
        >>> short('Parser key "trainer.max_steps":\\n  Expected a <class \\'int\\'>. Got value: abc')
        "trainer.max_steps='abc' is refused: expected int"
    """
    keys = list(re.finditer(r'Parser key "([^"]+)":', message))
    if not keys:
        missing = re.search(r"arguments? (?:are|is) required: (.+)", message)
        return f"missing {missing.group(1)}" if missing else one_line(message)
    key, rest = keys[-1].group(1), message[keys[-1].end() :]  # the innermost key says most
    given = re.search(r"Given value: (.*)", rest) or re.search(r"Got value: (.*)", rest)
    expected = re.search(r"Subtypes: \[(.*)\]", rest) or re.search(r"Expected an? (.*?)\. Got value", rest)
    if given is None or expected is None:
        return f"{key}: {one_line(rest)}"
    kinds = re.sub(r"<class '([^']+)'>", r"\1", expected.group(1)).replace("typing.", "").replace("NoneType", "null")
    value = given.group(1).strip()
    quoted = value if value[:1] in "[{'\"" else f"'{value}'"
    return f"{key}={_clip(quoted, 80)} is refused: expected {_clip(kinds, 160)}"


def one_line(text: str) -> str:
    """The text with its white space made single spaces, cut at 300 characters.

    Of the parser's list of what went wrong with each form that a setting may have, the first: the recipes' form; a
    name is passed over where it was a class, such as a strategy, that has refused its own settings.
    """
    passed = r"(?:Expected a <class 'str'>\s*- (?!Expected|Not ))?"
    refused = re.search(rf"Errors:\s*- {passed}(.*?)(?=\n\s*- |\n\s*Given value|\Z)", text, re.DOTALL)
    return _clip(" ".join((refused.group(1) if refused else text).split()), 300)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _known_settings() -> set[str]:
    """Dotted names of every setting of a recipe."""
    parser = LightningArgumentParser(exit_on_error=False)
    for group, cls in _GROUPS.items():
        parser.add_lightning_class_args(cls, group)
    return {"seed_everything", "ckpt_path", *parser.get_defaults().keys()}


def _arguments_of(cls: type, name: str) -> tuple[ArgumentParser, set[str]]:
    """A parser for the arguments of a class under ``name``, and the arguments' names."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(cls, name, fail_untyped=False, sub_configs=True)
    return parser, {key.partition(".")[2] for key in parser.get_defaults().keys()}  # noqa: SIM118 (no mapping)


def _short_name(entry: Any) -> str:
    return str(entry.get("class_path", "")).rpartition(".")[2] if isinstance(entry, dict) else ""


def _normalise_callbacks(settings: dict[str, Any]) -> None:
    """Every callback as a mapping with ``class_path`` and ``init_args``; a recipe may write the class alone."""
    trainer = settings.get("trainer")
    if not isinstance(trainer, dict) or not trainer.get("callbacks"):
        return
    entries = trainer["callbacks"] if isinstance(trainer["callbacks"], list) else [trainer["callbacks"]]
    trainer["callbacks"] = [{"class_path": entry} if isinstance(entry, str) else entry for entry in entries]


def _import_class(class_path: str, where: str) -> Any:
    """The class of a dotted path, or of a short name in one of the usual places."""
    module_name, _, name = class_path.rpartition(".")
    homes = (module_name,) if module_name else _CLASS_HOMES
    candidates: list[str] = []
    for home in homes:
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            raise RecipeError(f"{where}: '{class_path}' cannot be imported ({error})") from error
        if hasattr(module, name):
            return getattr(module, name)
        candidates += [item for item in dir(module) if inspect.isclass(getattr(module, item))]
    close = nearest(name, candidates)
    hint = f"did you mean '{module_name + '.' if module_name else ''}{close}'?" if close else "name an existing class"
    raise RecipeError(f"{where}: class '{class_path}' does not exist; {hint}")


def _unknown(where: str, kind: str, name: str, known: Iterable[str], prefix: str = "") -> RecipeError:
    close = nearest(name, known)
    hint = (
        f"did you mean '{prefix}{close}'?" if close else f"'{prefix}{name}' is no setting; see lowrank-lit run --help"
    )
    return RecipeError(f"{where}unknown {kind} '{prefix}{name}'; {hint}")


def _groups_of(known: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in known if "." in name}


def _check_group(value: dict[str, Any], prefix: str, known: set[str], where: str) -> None:
    """Refuse a key that is no setting; look into classes."""
    groups = _groups_of(known)
    for key, item in value.items():
        name = f"{prefix}{key}"
        if name in known:
            if name in _CLASS_SETTINGS and isinstance(item, str) and item[:1].isupper():
                item = value[key] = {"class_path": item}
            _check_classes(item, name, where)
        elif name not in groups:
            raise _unknown(f"{where}: ", "key", name, known | groups)
        elif not isinstance(item, dict):
            raise RecipeError(
                f"{where}: {name}={item!r} is refused: expected settings below it, such as {name}.KEY: VALUE"
            )
        else:
            _check_group(item, f"{name}.", known, where)


def _check_classes(value: Any, name: str, where: str) -> None:
    """Wherever a class is named, refuse an unknown one, an unknown argument of it, or one of the wrong type."""
    if isinstance(value, list):
        for item in value:
            _check_classes(item, name, where)
    elif isinstance(value, dict) and "class_path" in value:
        _check_entry(value, name, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_classes(item, f"{name}.{key}", where)


def _check_entry(entry: dict[str, Any], name: str, where: str) -> None:
    for key in entry.keys() - {"class_path", "init_args", "dict_kwargs"}:
        raise _unknown(f"{where}: ", "key", str(key), ("class_path", "init_args", "dict_kwargs"), f"{name}.")
    cls = _import_class(str(entry["class_path"]), f"{where}: {name}")
    if "." not in str(entry["class_path"]):
        entry["class_path"] = f"{cls.__module__}.{cls.__name__}"  # the parser would take any class of that name
    if not inspect.isclass(cls):
        return  # a function that makes the object: the parser knows what to do with it
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise RecipeError(f"{where}: {name}.init_args={arguments!r} is refused: expected ARGUMENT: VALUE below it")
    parser, known = _arguments_of(cls, cls.__name__)
    for key, item in arguments.items():
        if key not in known | _groups_of(known):
            raise _unknown(f"{where}: ", "key", str(key), known, f"{cls.__name__}.")
        _check_classes(item, f"{cls.__name__}.{key}", where)
    try:
        parser.parse_object({cls.__name__: arguments})
    except argparse.ArgumentError as error:
        raise RecipeError(f"{where}: {short(error.message or str(error))}") from error


def _apply(settings: dict[str, Any], name: str, text: str, known: set[str]) -> None:
    """Write one override into the settings."""
    plain = name.removesuffix("+")
    parts = plain.split(".")
    home = next(
        (".".join(parts[:count]) for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in known), None
    )
    if home is not None:
        value = _value(text, _hint_of(home, plain))
        _set(settings, home.split("."), parts[len(home.split(".")) :], value, append=name.endswith("+"))
    elif plain in _groups_of(known):
        raise RecipeError(f"option '--{name}' names a group; give one setting of it, as in --{name}.KEY=VALUE")
    else:
        _apply_to_callback(settings, name, parts, text, known)


def _apply_to_callback(settings: dict[str, Any], name: str, parts: list[str], text: str, known: set[str]) -> None:
    present = [_short_name(entry) for entry in settings.get("trainer", {}).get("callbacks") or []]
    if parts[0] not in present:
        if parts[0][:1].isupper() and parts[0] not in _GROUPS:
            has = f"the recipe has {', '.join(present)}" if present else "the recipe has no callbacks"
            close = nearest(parts[0], present)
            hint = f"did you mean '--{'.'.join([close, *parts[1:]])}'? ({has})" if close else has
            raise RecipeError(f"option '--{name}': no callback '{parts[0]}'; {hint}")
        meant = [f"'--{key}'" for key in _ending_in(settings, name.removesuffix("+"), known)]
        if meant:
            raise RecipeError(f"unknown option '--{name}'; did you mean {' or '.join(meant)}?")
        raise _unknown("", "option", name, known | _groups_of(known), "--")
    if present.count(parts[0]) > 1:
        raise RecipeError(
            f"option '--{name}': the recipe has several {parts[0]}; change the one you mean in the recipe"
        )
    entry = callback_entry(settings, parts[0])
    assert entry is not None
    cls = _import_class(entry["class_path"], parts[0])
    arguments = sorted(_arguments_of(cls, parts[0])[1])
    if len(parts) < 2 or parts[1] not in {argument.partition(".")[0] for argument in arguments}:
        close = nearest(".".join(parts[1:]), arguments)
        hint = (
            f"did you mean '--{parts[0]}.{close}'?"
            if close
            else f"{parts[0]} takes {', '.join(arguments) or 'nothing'}"
        )
        raise RecipeError(f"unknown option '--{name}'; {hint}")
    value = _value(text, _hints(cls).get(parts[1]) if len(parts) == 2 else None)
    _set(entry, ["init_args", parts[1]], parts[2:], value, append=name.endswith("+"))


def _ending_in(settings: dict[str, Any], argument: str, known: set[str]) -> list[str]:
    """Settings and arguments of the recipe's callbacks that are called ``argument`` in their own group."""
    found = {name for name in known if name.rpartition(".")[2] == argument}
    for entry in settings.get("trainer", {}).get("callbacks") or []:
        name = _short_name(entry)
        if argument in _arguments_of(_import_class(entry["class_path"], name), name)[1]:
            found.add(f"{name}.{argument}")
    return sorted(found)


def _set(settings: dict[str, Any], home: list[str], below: list[str], value: Any, *, append: bool) -> None:
    """Set ``home`` (a setting) or an item below it; below a class, that is one of the class's arguments."""
    target = settings
    path = [*home, *below]
    for depth, part in enumerate(path[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        elif isinstance(target[part], str) and depth >= len(home) and path[0] == "trainer":
            target[part] = {"class_path": target[part]}
        if not isinstance(target[part], dict):
            name = ".".join(path[:depth])
            raise RecipeError(
                f"option '--{'.'.join(path)}': {name}={target[part]!r} has nothing below it; set --{name} as a whole"
            )
        target = target[part]
        if (
            "class_path" in target
            and depth >= len(home)
            and path[depth] not in ("class_path", "init_args", "dict_kwargs")
        ):
            target = target.setdefault("init_args", {})
    if append:
        old = target.get(path[-1]) or []
        value = [*(old if isinstance(old, list) else [old]), *(value if isinstance(value, list) else [value])]
    target[path[-1]] = value


def _value(text: str, hint: Any) -> Any:
    """Value of an override: text where only text is possible, else YAML; a path from here becomes absolute."""
    kinds = set(typing.get_args(hint) or (hint,))
    only_text = str in kinds and all(kind in (str, NoneType) or _is_path(kind) for kind in kinds)
    if only_text and not (NoneType in kinds and text in ("null", "None")):
        return resolve_paths(text, Path.cwd())
    value = read_value(text)
    if list[str] in kinds and isinstance(value, str):
        # Shell patterns are no YAML: [*.mlp.*] would have to be quoted twice.
        value = [item.strip(" '\"") for item in text.removeprefix("[").removesuffix("]").split(",")]
    return resolve_paths(value, Path.cwd())


def _is_path(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Path)


def _hint_of(home: str, name: str) -> Any:
    """Type of a setting; of an item below one that maps names to text, text."""
    group, _, argument = home.partition(".")
    hint = _hints(_GROUPS[group]).get(argument) if argument else None
    if name == home:
        return hint
    return str if hint == dict[str, str] else None


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # a name that exists for type checkers alone: the value is then read as YAML
        return {}


def several(option: str, given: Sequence[str]) -> list[str]:
    """Values of an option that may be repeated, and holds several separated by commas; each once, in order.

    Raises:
        RecipeError: If there is none.
    """
    values = [part.strip() for text in given for part in text.split(",") if part.strip()]
    if not values:
        raise RecipeError(f"option '--{option}' is empty; give one value or several separated by commas")
    return list(dict.fromkeys(values))
