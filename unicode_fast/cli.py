"""Command lines from the configuration: a flag for each field, a YAML file for any fields, and presets."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

import yaml

from unicode_fast.config import (
    _TYPES,
    EXECUTION_FIELDS,
    FIELDS,
    OTHER_METHODS_FIELDS,
    RENAMED_FIELDS,
    SECTIONS,
    Config,
    check_value,
    completed,
    is_whole,
    renamed,
)
from unicode_fast.errors import Parser, UsageError, few, of_command_line, program
from unicode_fast.files.paths import expanded, with_homes
from unicode_fast.files.untrusted import BadFile, open_file
from unicode_fast.presets import PRESETS, SIZES, from_saved, preset

# Most bytes of a configuration file, twenty times the size of one with every field.
MOST_YAML = 1 << 16
# Decimal numbers only: YAML 1.1 also reads 010 as 8, 1:30 as 90 and 1_0 as 10.
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,19})")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):
    """Loader of one flat YAML mapping: each key once, no tags, no references, because these can expand without end."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node of the text."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            self.refuse("it has an anchor, an alias or a tag", event.start_mark)
        if self.depth == 3:
            self.refuse("it is nested", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node)
        elif isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS:
            kind, form = _NUMBERS[node.tag]
            if not form.fullmatch(node.value):
                self.refuse(f"{node.value:.40} is not a {kind} in decimal digits", node.start_mark)
        return node

    def check_keys(self, node: yaml.MappingNode) -> None:
        """Raise an error if a key is not text, or a duplicate."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                self.refuse(f"a key is not text, {key.value!s:.40}", key.start_mark)
            if key.value in seen:
                self.refuse(f"{key.value:.40} occurs twice, in line {seen[key.value]} and", key.start_mark)
            seen[key.value] = line

    def refuse(self, problem: str, mark: yaml.Mark | None) -> None:
        """Raise an error with its line."""
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_NUMBERS = {
    "tag:yaml.org,2002:int": ("whole number", _WHOLE),
    "tag:yaml.org,2002:float": ("number", _DECIMAL),
}

# Fields that can be a path, with `~` for a home folder.
_PATHS = ("data", "text_model", "text_whitelist")


def field_help() -> dict[str, str]:
    """One line for each field, from the `Args` sections of the dataclasses."""
    lines: dict[str, str] = {}
    for kind in SECTIONS.values():
        arguments = (kind.__doc__ or "").split("Args:")[1]
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE):
            lines[name] = " ".join(text.split())
    return lines


def make_parser(command: str, description: str) -> Parser:
    """A parser with a flag for every configuration field, `--preset`, `--size` and `--config`."""
    name = program(command)
    parser = Parser(prog=name, usage=f"{name} [--FIELD VALUE ...]", description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file that sets any of the fields below")
    parser.add_argument("--preset", help=f"rules: {', '.join(PRESETS)} [recommended]")
    parser.add_argument("--size", help=f"sizes: {', '.join(SIZES)} [small]")
    defaults = {name: preset(name).flat() for name in PRESETS}
    texts = field_help()
    for section in SECTIONS:
        group = parser.add_argument_group(f"{section} fields")
        for name, owner in FIELDS.items():
            if owner == section:
                values = [defaults[rules][name] for rules in PRESETS]
                shown = (
                    f"{values[0]}"
                    if len(set(values)) == 1
                    else "; ".join(f"{rules} {value}" for rules, value in zip(PRESETS, values, strict=True))
                )
                group.add_argument(
                    f"--{name}",
                    type=partial(from_text, name),
                    nargs="?" if _TYPES[name] is bool else None,
                    const=True if _TYPES[name] is bool else None,
                    metavar=_shown_type(name),
                    help=f"{texts[name]} [{shown}]",
                )
    for old, new in RENAMED_FIELDS.items():
        parser.add_argument(f"--{old}", type=partial(from_text, new), help=SUPPRESS)
    return parser


def _shown_type(name: str) -> str:
    """The values of a field's flag, for its help."""
    kind = _TYPES[name]
    choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
    return f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()


def with_underscores(argv: Sequence[str] | None) -> list[str]:
    """The arguments with `--batch_size` for `--batch-size` and home folders for `~`; None takes those of the process.

    Raises:
        ValueError: a home folder is unknown.
    """
    given = with_homes(argv)
    return [re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in given]


def given_fields(arguments: Namespace) -> dict[str, Any]:
    """The configuration fields that flags have set, under their present names.

    Raises:
        ValueError: a field has flags of both its names.
    """
    given = {name: getattr(arguments, name) for name in ("preset", "size", *FIELDS, *RENAMED_FIELDS)}
    with of_command_line():
        return renamed({name: value for name, value in given.items() if value is not None})


def from_text(name: str, text: str) -> Any:
    """The value of a flag in the type of its field, or the text if it has another type, for `check_value`."""
    hint = _TYPES.get(name, str)
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def read_yaml(path: str) -> dict[str, Any]:
    """The flat mapping of a configuration file.

    Raises:
        ValueError: the file cannot be read, has more than 64 KiB, is not a flat mapping without duplicate keys, or has
            an unknown field.
    """
    try:
        with open_file(path) as file:
            text = file.read(MOST_YAML + 1)
    except (OSError, BadFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"config must be a readable YAML file, got {path!r}: {reason}") from error
    if len(text) > MOST_YAML:
        raise ValueError(f"config must be a YAML file of at most {MOST_YAML} bytes, {path!r} has more")
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"config must be a readable YAML file, got {path!r}: {_fault(text, error)}") from error
    # An invalid date.
    except ValueError as error:
        raise ValueError(f"config must be a readable YAML file, got {path!r}: {error!s:.100}") from error
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"is a {type(content).__name__}"
        raise ValueError(f"config must be a mapping of fields to values, {path!r} {kind}")
    try:
        content = renamed(content)
    except ValueError as error:
        raise ValueError(f"config {path!r}: {error}") from error
    known = {"preset", "size", *FIELDS}
    unknown = sorted(str(name) for name in content if name not in known)
    if unknown:
        raise ValueError(f"config {path!r} must have configuration fields only, got {few(unknown)}")
    for name, value in content.items():
        if name in ("modalities", "probe_tasks") and isinstance(value, list):
            content[name] = ",".join(map(str, value))
        elif _TYPES.get(name) is float and isinstance(value, str):
            # YAML 1.1 reads 1e-3, without a point, as text.
            content[name] = from_text(name, value)
        elif name in _PATHS and isinstance(value, str):
            content[name] = expanded(value)
    return content


def _fault(text: bytes, error: yaml.YAMLError) -> str:
    """The YAML errors of a text with their lines."""
    if isinstance(error, yaml.MarkedYAMLError):
        faults = ((error.context, error.context_mark), (error.problem, error.problem_mark))
        return ", ".join(f"{what} in line {mark.line + 1}" for what, mark in faults if what and mark)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count(b"\n", 0, error.position) + 1
        return f"{error.reason} in line {line}"
    return str(error)


def resolve(file: str | None, flags: Mapping[str, Any], without: Collection[str] = ()) -> Config:
    """The configuration of preset, YAML file and flags; later ones override earlier ones.

    `resolve_saved` reads a file with all fields except added ones, because a run of an older version wrote it.

    Args:
        file: of fields, or None.
        flags: fields.
        without: fields of the file that are left out.

    Raises:
        ValueError: a preset, field or value is unknown, of the wrong type or out of range.
    """
    content = read_yaml(file) if file is not None else {}
    if file is not None and added_fields(content):
        return resolve_saved(file, flags)
    content = {name: value for name, value in content.items() if name not in without}
    for name, value in content.items():
        try:
            check_value(name, value) if name in FIELDS else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"config {file!r} has an invalid value: {error}") from error
    values = {**content, **flags}
    if any("epochs" in given and "steps" not in given for given in (flags, values)):
        values["steps"] = 0
    with of_command_line():
        for name in ("method", "dcid"):
            values.update({name: check_value(name, values[name])} if name in values else {})
        base = preset(
            values.pop("preset", "recommended"),
            values.pop("size", "small"),
            values.get("method", "uni-code"),
            values.get("dcid", False),
        )
        return base.replace(**values)


def resolve_methods(file: str | None, flags: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The configuration of Uni-Code, as `resolve`, and the given fields that only other methods read."""
    content = read_yaml(file) if file is not None else {}
    given = {name: value for name, value in {**content, **flags}.items() if name in OTHER_METHODS_FIELDS}
    base = resolve(file, {name: value for name, value in flags.items() if name not in given}, given)
    with of_command_line():
        others = {name: check_value(name, value) for name, value in given.items()}
    usual = base.flat()
    return base, {name: value for name, value in others.items() if value != usual[name]}


def check_read(others: Mapping[str, Any], rows: Iterable[Config]) -> None:
    """Raises UsageError if no row of a table has a field that only some methods read."""
    values = [row.flat() for row in rows]
    for name, value in others.items():
        if all(row[name] != value for row in values):
            raise UsageError(f"{name} must be a field that a row of this call reads, got {name} {value!r}")


def changed_flags(base: Config, usual: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Flags of the fields that differ from their usual values, each after a space; without seed and execution."""
    free = ("seed", *EXECUTION_FIELDS)
    changed = {name: value for name, value in base.flat().items() if name not in free and value != usual[name]}
    return "".join(f" --{name} {shown(value)}" for name, value in {**changed, **others}.items())


def shown(value: Any) -> str:
    """The value of a field as a flag takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def added_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a run's file of an older version lacks, with values of that version; {} for other files."""
    return {k: value for k, value in completed(content).items() if k not in content} if is_whole(content) else {}


def resolve_saved(file: str, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a run folder, of this version or an older one, with flags.

    Presets change between versions, so fields of the file that others switch off are accepted.

    Args:
        file: a config.yaml; missing fields take the values of ADDED_FIELDS.
        flags: fields that override those of the file.

    Raises:
        ValueError: the file cannot be read, or a field is unknown, or missing and not in ADDED_FIELDS. Or a value has
            the wrong type or is out of range.
    """
    given = dict(flags or {})
    if "epochs" in given:
        given.setdefault("steps", 0)
    content = read_yaml(file)
    try:
        saved = from_saved(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config {file!r} is of another version or damaged: {error}") from error
    names = given.pop("preset", saved.preset), given.pop("size", saved.size)
    kept = {name: value for name, value in saved.flat().items() if name in FIELDS and name not in given}
    with of_command_line():
        base = preset(*names, saved.method.method, saved.method.dcid)
        # `replace` compares flags with the preset, as for any other file.
        return base.replace_all(**kept).replace(**given)
