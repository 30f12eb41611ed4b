"""Registration of methods: built-in ones, those of ``text_llm``, and third-party ones through entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from mmalign.config import Options
from mmalign.core.registry import Registry
from mmalign.errors import ConfigError

ENTRY_POINT_GROUP = "mmalign.methods"
BuilderT = TypeVar("BuilderT", bound=Callable[..., Any])


@dataclass(frozen=True)
class Pipeline:
    """What a method of ``kind: pipeline`` stands for: entries as one would write them under ``stages:``.

    ``${stages.INNER.OUTPUT}`` inside an entry means a stage of the same pipeline. In a run the stages are called
    ``METHOD-INNER``, or ``INNER`` when the whole run is the method.
    """

    stages: list[dict[str, Any]]
    outputs: dict[str, str]
    """Outputs of the method as a whole, each as ``INNER.OUTPUT``; ``model`` by convention is the final model."""


def as_given(options: Options) -> dict[str, Any]:
    """What a configuration said of a node, without defaults: a stage entry takes its own."""
    tree: dict[str, Any] = options.model_dump(exclude_unset=True)
    return tree


def model_of_stage(model: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The ``model:`` node for what the inner ``stage`` made: ``model``'s precision, device and the like, with other weights."""
    kept = {key: value for key, value in model.items() if key not in ("path", "adapter", "gguf_file", "revision")}
    return {**kept, "path": f"${{stages.{stage}.model}}"}


@dataclass(frozen=True)
class Method:
    """A registered method."""

    name: str
    options: type[Options]
    """Configuration class: every option with its docstring."""
    build: Callable[..., Any]
    """``(options, context) -> TrainingParts`` for ``kind: train``; ``(options) -> Pipeline`` for ``kind: pipeline``; a
    stage function ``(options, context) -> StageResult`` otherwise."""
    modality: str
    kind: str
    paper: str
    """Authors, year, arXiv id."""
    summary: str
    rollout: bool = False
    """Whether it samples from the policy while training."""


def load_entry_point(entry: EntryPoint) -> Any:
    """The object behind an entry point; raises ConfigError naming the package when it cannot be imported."""
    try:
        return entry.load()
    except ImportError as error:
        raise ConfigError(f"the entry point {entry.name!r} ({entry.value}) of group {entry.group} cannot be imported: "
                          f"{error}. Repair or uninstall the package that declares it") from error


def _populate() -> None:
    import mmalign.methods as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name != __name__:
            importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        loaded = load_entry_point(entry)
        if callable(loaded):
            loaded()


METHODS: Registry[Method] = Registry("method", populate=_populate)


def method(
    name: str, *, options: type[Options], modality: str, paper: str, kind: str = "train", rollout: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[BuilderT], BuilderT]:
    """Register a builder as a method; its docstring's first line is the summary shown by ``mmalign methods``."""

    def register(build: BuilderT) -> BuilderT:
        summary = (build.__doc__ or "").strip().split("\n")[0]
        METHODS.register(name, aliases=aliases)(Method(name, options, build, modality, kind, paper, summary, rollout))
        return build

    return register
