"""Names of rewards and how a configured name becomes a callable.

A reward is named by its registered name, by ``package.module:function`` or by ``file.py:function``. The object behind
the name is a function, an async function, an object with ``__call__``, or a class that is built from the options.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import ConfigDict

from mmalign.config import Component, Options, bind
from mmalign.core.registry import Registry
from mmalign.errors import ConfigError

F = TypeVar("F")
Accepts = Literal["pil", "tensor", "any"]

ENTRY_POINT_GROUP = "mmalign.rewards"
"""Packages that register rewards list their modules under this entry-point group."""

COLUMN_ALIASES = {"solution": "answer", "ground_truth": "answer", "target": "answer"}
"""Keyword of a reward -> the data column that :mod:`mmalign.data` renames it to, tried when the keyword is absent."""


@runtime_checkable
class Reward(Protocol):
    """Anything that scores samples: ``(prompts, completions, **columns) -> list[float | None] | Tensor[B]``.

    All arguments arrive by keyword, as in TRL's GRPOTrainer: ``prompts``, ``completions`` (strings, message lists,
    images or lists of views), every data column as a list, ``completion_ids``, ``trainer_state``, ``log_extra`` and
    ``log_metric``. A function that does not end in ``**kwargs`` gets only what its signature names. ``rollout`` is
    passed to functions that name it. None for a sample means that the reward does not apply to it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Score every sample."""
        ...


@dataclass(frozen=True)
class Traits:
    """What a reward declares about itself, read from attributes of the same names."""

    name: str
    """Display name."""
    range: tuple[float, float] | None = None
    """Smallest and largest value; a value outside is an error."""
    differentiable: bool = False
    """Whether a gradient flows from the value to image tensors."""
    needs: tuple[str, ...] = ()
    """Data columns (or ``completion_ids``) without which it cannot work."""
    accepts: Accepts = "pil"
    """Form of images it takes: "pil", "tensor" (``[B, 3, H, W]`` float in [0, 1]) or "any"."""


class RewardOptions(Component, Options):
    """One item of ``rewards:``; keys beside these are keyword arguments of the reward itself."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """Registered name, ``package.module:function`` or ``file.py:function`` (relative to the configuration file)."""
    weight: float = 1.0
    """Factor in the total; 0 logs the reward without training on it."""
    label: str | None = None
    """Name in logs and tables; null takes the function's own."""
    columns: dict[str, str] = {}
    """Keyword of the function -> data column to pass under it, where the two names differ."""
    cache: bool = False
    """Remember values by content (prompt, completion and columns); only for rewards that are deterministic."""


def _populate() -> None:
    for module in (
        "text", "maths", "images", "learned", "logic", "ranking", "routing", "text_metrics", "programs", "general_points",
    ):
        importlib.import_module(f"mmalign.rewards.{module}")
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()


REWARDS: Registry[Any] = Registry("reward", populate=_populate)
"""Every registered reward; built-in modules are imported at the first look-up."""


def reward(
    name: str, *, aliases: Iterable[str] = (), range: tuple[float, float] | None = None, differentiable: bool = False,
    needs: Sequence[str] = (), accepts: Accepts = "pil",
) -> Callable[[F], F]:
    """Decorator that registers a reward function or class under ``name`` and attaches its :class:`Traits`.

    Options of a registered reward are its keyword-only parameters (a class: those of ``__init__``), so that a
    misspelt key is refused even though the function also takes ``**columns``.
    """

    def store(entry: F) -> F:
        for key, value in (
            ("reward_name", name), ("range", range), ("differentiable", differentiable), ("needs", tuple(needs)),
            ("accepts", accepts),
        ):
            setattr(entry, key, value)
        return REWARDS.register(name, aliases=aliases)(entry)

    return store


def unwrap(function: Any) -> Any:
    """The callable inside (nested) ``functools.partial`` objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def traits(function: Any) -> Traits:
    """The declared traits of any reward callable, with defaults for undeclared ones; raises ConfigError if malformed."""
    inner = unwrap(function)
    name = str(getattr(inner, "reward_name", None) or getattr(inner, "__name__", type(inner).__name__))
    limits = getattr(inner, "range", None)
    if limits is not None:
        low, high = limits
        if not low < high:
            raise ConfigError(f"reward {name!r}: range={limits!r} must be (low, high) with low < high")
        limits = (float(low), float(high))
    accepts: Any = getattr(inner, "accepts", "pil")
    if accepts not in ("pil", "tensor", "any"):
        raise ConfigError(f"reward {name!r}: accepts={accepts!r} is unknown; allowed: pil, tensor, any")
    needs = getattr(inner, "needs", ())
    return Traits(
        name, limits, bool(getattr(inner, "differentiable", False)),
        (needs,) if isinstance(needs, str) else tuple(needs), accepts,
    )


def is_async(function: Any) -> bool:
    """Whether calling ``function`` gives a coroutine: async functions, partials of them, async ``__call__``."""
    inner = unwrap(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def load_object(name: str, *, config_folder: Path | None = None, key: str = "rewards") -> Any:
    """The object named ``file.py:attribute``, ``package.module:attribute`` or by a registered name.

    Files are searched in ``config_folder`` (the folder of the configuration) and then in the working directory. Raises
    ConfigError that names ``key`` when the file, module, attribute or registered name does not exist.
    """
    location, separator, attribute = name.rpartition(":")
    if not separator:
        try:
            return REWARDS.get(name)
        except ValueError as error:
            raise ConfigError(
                f"{key}: {error}; a function of your own is written file.py:function or package.module:function"
            ) from None
    module = _load_file(location, config_folder, key) if location.endswith(".py") else _load_module(location, key)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
            raise ConfigError(f"{key}: {location} has no {attribute!r}; callables in it: {', '.join(known) or 'none'}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}: {name} is a {type(found).__name__}, not a function or class")
    return found


def _load_module(location: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(location)
    except ModuleNotFoundError as error:
        missing = "it is" if error.name == location else f"its import {error.name!r} is"
        raise ConfigError(f"{key}: module {location!r} cannot be imported: {missing} not installed") from None


def _load_file(location: str, config_folder: Path | None, key: str) -> ModuleType:
    searched = [folder / location for folder in (config_folder, Path.cwd()) if folder is not None]
    file = next((path.resolve() for path in searched if path.is_file()), None)
    if file is None:
        raise ConfigError(f"{key}: file {location!r} does not exist; looked at {', '.join(map(str, searched))}")
    # The path is part of the module's name, so that two files called rewards.py do not replace each other.
    name = f"mmalign_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))  # so that the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(file.parent))
    return module


def build(options: RewardOptions, *, config_folder: Path | None = None, key: str = "rewards") -> tuple[Any, dict[str, Any]]:
    """``(callable, constant keywords)`` of one configured reward; a class is built from its options.

    Raises ConfigError for an option that the reward does not have (with the nearest one) or for a missing one.
    """
    found = load_object(options.name, config_folder=config_folder, key=key)
    if inspect.isclass(found):
        if hasattr(found, "from_config"):
            return found.from_config(**options.arguments), {}
        arguments = bind(options, _option_signature(found), key=key, ignore=("config_folder",))
        if "config_folder" in inspect.signature(found).parameters:  # rewards that name other rewards
            arguments["config_folder"] = config_folder
        return found(**arguments), {}
    return found, bind(options, _option_signature(found, registered=":" not in options.name), key=key)


def _option_signature(found: Any, *, registered: bool = False) -> Callable[..., Any]:
    """A stand-in whose keyword-only parameters are the options of ``found``, the form that :func:`bind` reads.

    A class: every parameter of ``__init__``. A registered function: its keyword-only parameters, and nothing that
    only ``**columns`` would swallow. Another function: every parameter but prompts and completions, none required,
    because those without a default are data columns.
    """
    parameters = []
    for name, parameter in inspect.signature(found).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL or (registered and parameter.kind is not parameter.KEYWORD_ONLY):
            continue
        if parameter.kind is not parameter.VAR_KEYWORD:
            if not inspect.isclass(found):
                if name in ("prompts", "completions"):
                    continue
                if not registered and parameter.default is parameter.empty:
                    parameter = parameter.replace(default=None)
            parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters.append(parameter)

    def stand_in(**kwargs: Any) -> None:
        """Only its signature is used."""

    stand_in.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return stand_in
