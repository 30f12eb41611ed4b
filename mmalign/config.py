"""Typed configuration: pydantic models, YAML files, dotted overrides, and errors that name the nearest key.

An option is written once, as a field with its docstring; validation, ``mmalign methods NAME``, the configuration
reference and the resolved ``config.yaml`` of a run are all derived from it.
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from mmalign.errors import ConfigError

OptionsT = TypeVar("OptionsT", bound="Options")


class Options(BaseModel):
    """Base of every configuration node: unknown keys are refused, field docstrings are the documentation."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, validate_assignment=True,
        protected_namespaces=(), populate_by_name=True,
    )


class Component(BaseModel):
    """A registered object chosen by ``name`` with its own keyword arguments beside it: ``{name: ipo, beta: 0.1}``.

    Which keywords are allowed is read off the registered function (:func:`bind`), so adding a loss adds its options.
    A bare string in YAML is short for ``{name: <string>}``.
    """

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """Registered name, or an alias of it."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            lambda value: {"name": value} if isinstance(value, str) else value, handler(source)
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords given beside the name and the declared fields."""
        return dict(self.model_extra or {})


def bind(component: Component, function: Callable[..., Any], *, key: str, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """Check ``component``'s keywords against ``function``'s keyword-only parameters and return them.

    ``key`` is the configuration key of the component, used in the message; ``ignore`` names parameters that the
    caller supplies itself and that a configuration may not set. Raises ConfigError for an unknown keyword, or for
    one whose value does not have the parameter's simple type.
    """
    parameters = {
        name: parameter for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in set(ignore)
    }
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    hints = _hints(function)
    checked = {}
    for name, value in component.arguments.items():
        if name not in parameters:
            if open_ended:
                checked[name] = value
                continue
            raise ConfigError(_unknown_key(f"{key}.{name}", name, parameters))
        default = parameters[name].default
        allowed = hints.get(name)
        if typing.get_origin(allowed) is typing.Literal and value not in typing.get_args(allowed):
            raise ConfigError(f"{key}.{name}: {value!r} is not one of {', '.join(map(str, typing.get_args(allowed)))}")
        if isinstance(default, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{key}.{name}: {value!r} is not a number") from None
        elif isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{key}.{name}: {value!r} is not true or false")
        checked[name] = value
    missing = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name not in checked]
    if missing:
        raise ConfigError(f"{key}: {component.name!r} needs {', '.join(f'{key}.{name}' for name in missing)}")
    return checked


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, or of a class's constructor; {} where they cannot be read."""
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):
        return {}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (PyYAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, typing.Hashable) and key in seen:
                raise ConfigError(f"key {key!r} is written twice ({node.start_mark.name}, line {key_node.start_mark.line + 1})")
            if isinstance(key, typing.Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads the key ``on`` (and yes, no, off) as a boolean; as in YAML 1.2, only true and false are.
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# YAML 1.1 reads 1e-5 as a string; everyone who writes a learning rate means the number.
_UniqueKeyLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, source: str = "<string>") -> Any:
    """Safe-load YAML; raises ConfigError with the line for bad syntax or a repeated key."""
    loader = _UniqueKeyLoader(text)
    loader.name = source
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one configuration file into a plain tree."""
    file = Path(path)
    if not file.is_file():
        close = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {file.parent / close[0]}?" if close else ""
        raise ConfigError(f"configuration file {file} does not exist{hint}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {file} is not UTF-8 text") from None
    tree = parse_yaml(text, source=str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {file} must hold a mapping of keys, not {type(tree).__name__}")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with dotted ``key.sub=value`` assignments applied; list items by index or by their ``name``.

    Values are YAML: ``a.b=[1, 2]``, ``a.b=null``, ``a.b=1e-4``.
    """
    result = _copy_tree(tree)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"override {override!r} must have the form key.sub=value")
        _assign(result, path.strip().split("."), parse_yaml(text, source=override) if text else None, path.strip())
    return result


def _copy_tree(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copy_tree(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_tree(value) for value in node]
    return node


def _assign(node: Any, parts: list[str], value: Any, path: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = _list_index(node, part, path)
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                child = node.get(part)
                if isinstance(child, str):  # a component written by its bare name
                    child = {"name": child}
                node[part] = child if isinstance(child, (dict, list)) else {}
                node = node[part]
        else:
            raise ConfigError(f"override {path!r}: {'.'.join(parts[:depth])!r} holds a value, not a section")


def _list_index(items: list[Any], part: str, path: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == part:
            return index
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise ConfigError(f"override {path!r}: no item {part!r}; allowed: {', '.join(names)}")


def parse(options: type[OptionsT], tree: Mapping[str, Any], *, root: str = "") -> OptionsT:
    """Build ``options`` from a plain tree; raises one ConfigError that lists every problem with its full key."""
    try:
        return options.model_validate(dict(tree))
    except ValidationError as error:
        problems = [_explain(options, detail, root) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(problems)) from None


def _explain(options: type[Options], detail: ErrorDetails, root: str) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join([root, *location] if root else location)
    if detail["type"] == "extra_forbidden":
        section = _node_at(options, location[:-1])
        for name, field in (section.model_fields if section else {}).items():
            if location[-1] in _spellings(field):
                return f"{key}: another spelling of {name}, which is given as well; leave one of them out"
        return _unknown_key(key, location[-1], section.model_fields if section else {}, everywhere=key_paths(options))
    if detail["type"] == "missing":
        return f"{key}: required and not given"
    cause = detail.get("ctx", {}).get("error")
    message = str(cause) if cause is not None else detail["msg"]
    return f"{key}: {message} (got {detail['input']!r})"


def _unknown_key(key: str, name: str, known: Iterable[str], everywhere: Iterable[str] = ()) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    section = key.rpartition(".")[0]
    if close:
        return f"{key}: unknown key; did you mean {section + '.' if section else ''}{close[0]}?"
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"{key}: unknown key here; did you mean {elsewhere[0]}?"
    paths = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.6)
    hint = f"; did you mean {paths[0]}?" if paths else "."
    return f"{key}: unknown key{hint} Known in {section or 'the top level'}: {', '.join(sorted(known))}"


def _node_at(options: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    node: type[BaseModel] | None = options
    for part in location:
        if node is None or part.isdigit():
            continue
        field = node.model_fields.get(part)
        if field is None:  # a union member tag
            continue
        node = next(iter(_models_in(field.annotation)), None)
    return node


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


@dataclass(frozen=True)
class FieldDoc:
    """One documented option: dotted ``path``, ``type`` as written, ``default`` and the field's docstring."""

    path: str
    type: str
    default: str
    description: str


def document(options: type[BaseModel], prefix: str = "") -> list[FieldDoc]:
    """Every option of ``options``, nested sections included, in the order of definition."""
    rows: list[FieldDoc] = []
    for name, field in options.model_fields.items():
        path = f"{prefix}{name}"
        nested = [model for model in _models_in(field.annotation) if issubclass(model, (Options, Component))]
        default = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
        shown = "required" if default is PydanticUndefined else _short(default)
        description = plain_markup(field.description or "") + _other_spellings(name, field)
        rows.append(FieldDoc(path, _type_name(field.annotation), shown, description))
        for model in nested:
            if f"{path}." not in prefix:
                rows.extend(document(model, f"{path}."))
    return rows


def key_paths(options: type[BaseModel]) -> list[str]:
    """Every dotted key of ``options``."""
    return [row.path for row in document(options)]


def _short(value: Any) -> str:
    if isinstance(value, Component):
        given = {"name": value.name, **value.model_dump(include=value.model_fields_set - {"name"}), **value.arguments}
        return f"{{{', '.join(f'{key}: {_short(item)}' for key, item in given.items())}}}"
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, list):
        return f"[{', '.join(_short(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _type_name(annotation: Any) -> str:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return "null" if annotation is type(None) else str(annotation.__name__)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation))
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match.group(1).replace("'", "").replace(", ", " | "), text)
    return text.replace("NoneType", "null").replace("None", "null")


def plain_markup(text: str) -> str:
    """A docstring as one line: reStructuredText literals and roles become plain back-quoted words."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text.replace("``", "`"))
    return " ".join(text.split())


def _spellings(field: FieldInfo) -> list[str]:
    return [str(choice) for choice in field.validation_alias.choices] if isinstance(field.validation_alias, AliasChoices) else []


def _other_spellings(name: str, field: FieldInfo) -> str:
    others = [spelling for spelling in _spellings(field) if spelling != name]
    return f" Also written {', '.join(others)}." if others else ""


def to_tree(options: BaseModel) -> dict[str, Any]:
    """The plain tree that :func:`parse` turns back into an equal object."""
    return options.model_dump(mode="json")


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Readable YAML of a plain tree, keys in the order given."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=110)
