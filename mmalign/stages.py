"""Stages and pipelines: everything the command line runs, with manifests, skipping of finished work, and resuming."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from mmalign.config import Options, apply_overrides, dump_yaml, parse, read_yaml, to_tree
from mmalign.core.registry import Registry, nearest
from mmalign.core.seeding import derive_seed
from mmalign.errors import ConfigError, MmalignError
from mmalign.methods.registry import METHODS, Pipeline, load_entry_point
from mmalign.training.checkpoint import write_json

STAGE_ENTRY_POINT_GROUP = "mmalign.stages"
REFERENCE = re.compile(r"\$\{([^}]*)\}")
RUN_KEYS = ("run_dir", "seed", "stages", "method", "kind", "name")
COSMETIC_KEYS = ("tracking", "checkpoint", "description")
"""Keys that change neither the result nor whether finished work can be kept."""
PACKAGES = ("mmalign", "torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "safetensors", "numpy")


@dataclass
class StageContext:
    """Where a stage runs."""

    name: str
    folder: Path
    seed: int
    config_folder: Path
    fingerprint: str = ""
    quiet: bool = False
    previous: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests of the stages before this one, by name."""
    run_seed: int = 0
    """Seed of the whole run, the same for all its stages (``seed`` is this stage's own)."""

    def say(self, text: str) -> None:
        """Print one line to the terminal."""
        if not self.quiet and is_main_process():
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class StageResult:
    """What a stage leaves behind: named output paths and final numbers."""

    outputs: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A kind of stage."""

    kind: str
    options: type[Options]
    run: Callable[[Any, StageContext], StageResult]
    outputs: tuple[str, ...]
    """Names that later stages may use as ``${stages.NAME.OUTPUT}``."""
    summary: str
    reads_run: bool = False
    """Reads the folders of all stages before it, so it runs again whenever one of them did."""
    distributed: bool = False
    """Runs on every process of a distributed launch; otherwise the first runs it and the others wait."""


def _populate() -> None:
    package = importlib.import_module("mmalign.stage_kinds")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group=STAGE_ENTRY_POINT_GROUP):
        load_entry_point(entry)


STAGES: Registry[Stage] = Registry("stage kind", populate=_populate)


def stage(
    kind: str, *, options: type[Options], outputs: tuple[str, ...], reads_run: bool = False,
) -> Callable[[Any], Any]:
    """Register a stage function ``(options, context) -> StageResult``."""

    def register(run: Callable[[Any, StageContext], StageResult]) -> Callable[[Any, StageContext], StageResult]:
        summary = (run.__doc__ or "").strip().split("\n")[0]
        STAGES.register(kind)(Stage(kind, options, run, outputs, summary, reads_run))
        return run

    return register


@dataclass
class PlannedStage:
    """A stage of a run, its tree checked but its references not filled in yet."""

    name: str
    kind: str
    tree: dict[str, Any]
    stage: Stage
    seed: int


@dataclass
class Plan:
    """A whole configuration, ready to run."""

    run_dir: Path
    seed: int
    config_folder: Path
    stages: list[PlannedStage]
    tree: dict[str, Any]
    single: bool
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Outputs of pipeline methods by name of their entry: ``OUTPUT -> STAGE.OUTPUT``."""


def load_plan(path: str | Path, overrides: Sequence[str] = (), *, run_dir: str | None = None) -> Plan:
    """Read a configuration file and check every stage of it before anything runs."""
    file = Path(path)
    tree = apply_overrides(read_yaml(file), overrides)
    if run_dir is not None:
        tree["run_dir"] = run_dir
    return make_plan(tree, config_folder=file.resolve().parent, default_name=file.stem)


def make_plan(tree: Mapping[str, Any], *, config_folder: Path, default_name: str = "run") -> Plan:
    """Check a configuration tree: stage kinds, methods, every key of every stage, and references between stages."""
    tree = dict(tree)
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed: {seed!r} is not an integer")
    run_dir = Path(str(tree.get("run_dir", f"runs/{default_name}"))).expanduser()
    single = "stages" not in tree
    if single:
        label = re.sub(r"[^A-Za-z0-9_\-]", "_", default_name)  # a file may be called sft.v2.yaml
        entries = [{"name": label, **{k: v for k, v in tree.items() if k not in ("run_dir", "seed")}}]
    else:
        unknown = [key for key in tree if key not in ("run_dir", "seed", "stages", "description")]
        if unknown:
            close = nearest(unknown[0], ("run_dir", "seed", "stages", "description"))
            raise ConfigError(f"{unknown[0]}: unknown key of a pipeline{f'; did you mean {close}?' if close else ''} "
                              "Known: run_dir, seed, stages, description; options belong to an entry of stages")
        entries = tree["stages"]
        if not isinstance(entries, list) or not entries:
            raise ConfigError("stages: must be a list with at least one stage")
    plan = Plan(run_dir, seed, config_folder, [], tree, single)
    for index, entry in enumerate(entries):
        if _is_pipeline(entry):
            _plan_pipeline(entry, index, plan)
        else:
            plan.stages.append(_plan_stage(entry, index, plan))
    return plan


def _is_pipeline(entry: Any) -> bool:
    name = entry.get("method") if isinstance(entry, dict) else None
    return isinstance(name, str) and name in METHODS and METHODS.get(name).kind == "pipeline"


def _plan_pipeline(entry: dict[str, Any], index: int, plan: Plan) -> None:
    """Replace an entry whose method is a pipeline by the stages it stands for."""
    method = METHODS.get(entry["method"])
    name = str(entry.get("name", method.name))
    where = "" if plan.single else f"stages.{name}"
    body = _resolve_outputs({k: v for k, v in entry.items() if k not in ("name", "method", "seed")}, plan)
    _check_references(body, where, plan)
    pipeline: Pipeline = method.build(parse(method.options, body, root=where))
    prefix = "" if plan.single else f"{name}-"
    plan.single = False  # the stages have folders of their own
    inner = {stage["name"] for stage in pipeline.stages}

    def rename(text: str) -> str:
        stage, _, output = text.removeprefix("stages.").partition(".")
        return f"stages.{prefix}{stage}.{output}" if text.startswith("stages.") and stage in inner else text

    for stage in pipeline.stages:
        tree = _map_references(stage, rename)
        own = {"seed": derive_seed(entry["seed"], stage["name"]) % 2**31} if "seed" in entry else {}
        plan.stages.append(_plan_stage(own | tree | {"name": prefix + stage["name"]}, index, plan))
    plan.outputs[name] = {output: prefix + target for output, target in pipeline.outputs.items()}


def _map_references(node: Any, change: Callable[[str], str]) -> Any:
    """``node`` with the inside of every ``${...}`` replaced."""
    if isinstance(node, Mapping):
        return {key: _map_references(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_map_references(value, change) for value in node]
    if isinstance(node, str):
        return REFERENCE.sub(lambda match: f"${{{change(match.group(1).strip())}}}", node)
    return node


def _resolve_outputs(node: Any, plan: Plan) -> Any:
    """References to the outputs of a pipeline method become references to the stages that make them."""

    def change(text: str) -> str:
        stage, _, output = text.removeprefix("stages.").partition(".")
        if not text.startswith("stages.") or stage not in plan.outputs:
            return text
        if output not in plan.outputs[stage]:
            raise ConfigError(f"${{{text}}}: {stage!r} has no output {output!r}; it has {', '.join(plan.outputs[stage])}")
        return f"stages.{plan.outputs[stage][output]}"

    return _map_references(node, change) if plan.outputs else node


def _plan_stage(entry: Any, index: int, plan: Plan) -> PlannedStage:
    if not isinstance(entry, dict):
        raise ConfigError(f"stages[{index}]: must be a mapping with name and method or kind")
    where = "" if plan.single else f"stages.{entry.get('name', index)}"
    name = str(entry.get("name", entry.get("method", entry.get("kind", f"stage{index}"))))
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ConfigError(f"{where or 'name'}: stage name {name!r} may hold letters, digits, - and _ only")
    if any(planned.name == name for planned in plan.stages):
        raise ConfigError(f"stages[{index}].name: {name!r} is used twice")
    if "method" not in entry and "kind" not in entry:
        raise ConfigError(f"{where + '.' if where else ''}method: required (or kind, one of {', '.join(STAGES)}); "
                          "`mmalign methods` lists the methods")
    try:
        if "method" in entry:
            chosen = method_stage(str(entry["method"]))
        else:
            chosen = STAGES.get(str(entry["kind"]))
    except ValueError as error:
        raise ConfigError(f"{where + '.' if where else ''}{'method' if 'method' in entry else 'kind'}: {error}") from None
    own = ("name", "method", "kind") if "seed" in chosen.options.model_fields else ("name", "method", "kind", "seed")
    body = _resolve_outputs({k: v for k, v in entry.items() if k not in own}, plan)
    _check_references(body, where, plan)
    parse(chosen.options, body, root=where)
    seed = entry.get("seed")
    if seed is None:
        seed = plan.seed if plan.single else derive_seed(plan.seed, name) % 2**31
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"{where}.seed: {seed!r} is not an integer")
    return PlannedStage(name, chosen.kind, body, chosen, int(seed))


def method_stage(name: str) -> Stage:
    """The stage that runs a registered method."""
    method = METHODS.get(name)
    if method.kind != "train":
        return Stage(method.name, method.options, method.build, ("model", "folder", "data", "metrics"), method.summary)

    def run(options: Any, context: StageContext) -> StageResult:
        from mmalign.methods.training import run_training

        result, outputs = run_training(
            method, options, folder=context.folder, seed=context.seed, config_folder=context.config_folder,
            fingerprint=context.fingerprint, quiet=context.quiet, name=context.name,
        )
        numbers = {k: v for k, v in result.metrics.items() if isinstance(v, (int, float))}
        return StageResult(outputs, numbers, {"seconds": result.seconds, "steps": result.step,
                                              "resumed_from": result.resumed_from})

    return Stage(method.name, method.options, run, ("model", "metrics", "folder"), method.summary, distributed=True)


def _check_references(node: Any, where: str, plan: Plan) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _check_references(value, f"{where}.{key}" if where else str(key), plan)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _check_references(value, f"{where}[{index}]", plan)
    elif isinstance(node, str):
        for inner in REFERENCE.findall(node):
            parts = inner.strip().split(".")
            if inner in ("run_dir", "seed", "config_dir"):
                continue
            planned = {stage.name: stage for stage in plan.stages}
            if len(parts) != 3 or parts[0] != "stages" or parts[1] not in planned:
                close = nearest(parts[1], planned) if len(parts) > 1 else None
                raise ConfigError(f"{where}: ${{{inner}}} names no earlier stage"
                                  f"{f'; did you mean {close!r}?' if close else ''} Known: "
                                  f"{', '.join(planned) or 'none yet'}, run_dir, seed, config_dir")
            if parts[2] not in planned[parts[1]].stage.outputs:
                raise ConfigError(f"{where}: stage {parts[1]!r} has no output {parts[2]!r}; it has "
                                  f"{', '.join(planned[parts[1]].stage.outputs)}")


def _fill(node: Any, values: Mapping[str, str]) -> Any:
    if isinstance(node, Mapping):
        return {key: _fill(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(value, values) for value in node]
    if isinstance(node, str):
        return REFERENCE.sub(lambda match: values[match.group(1).strip()], node)
    return node


def run_plan(plan: Plan, *, quiet: bool = False, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Run every stage in order; finished ones are skipped, interrupted ones resumed. Returns the manifests."""
    run_dir = plan.run_dir
    _check_writable(run_dir)
    if only is not None and only not in [stage.name for stage in plan.stages]:
        raise ConfigError(f"--only: no stage {only!r}; stages are {', '.join(stage.name for stage in plan.stages)}")
    lock = FileLock(str(run_dir / ".lock"))
    try:
        if is_main_process():
            lock.acquire(timeout=0.1)
    except Timeout:
        raise ConfigError(f"run_dir: {run_dir} is in use by another process; wait for it or choose another run_dir") from None
    try:
        if is_main_process():
            (run_dir / "config.yaml").write_text(dump_yaml(plan.tree), encoding="utf-8")
        manifests: dict[str, dict[str, Any]] = {}
        values = {"run_dir": str(run_dir), "seed": str(plan.seed), "config_dir": str(plan.config_folder)}
        for planned in plan.stages:
            folder = _stage_folder(plan, planned)
            if planned.name == only and is_main_process() and (folder / "manifest.json").is_file():
                # Its checkpoints would count as finished work, so the whole folder goes, not only the manifest.
                _move_aside(folder, plan, Console(stderr=True), reason="is run again")
            manifest = run_stage(plan, planned, values, manifests, quiet=quiet)
            manifests[planned.name] = manifest
            values |= {f"stages.{planned.name}.{key}": path for key, path in manifest["outputs"].items()}
            if planned.name == only:
                break
        return manifests
    finally:
        lock.release()


def _stage_folder(plan: Plan, planned: PlannedStage) -> Path:
    return plan.run_dir if plan.single else plan.run_dir / planned.name


def run_stage(
    plan: Plan, planned: PlannedStage, values: Mapping[str, str], manifests: dict[str, dict[str, Any]], *, quiet: bool = False,
) -> dict[str, Any]:
    """Run one stage unless its manifest says it is done with the same configuration and inputs."""
    tree = _fill(planned.tree, values)
    options = parse(planned.stage.options, tree, root="" if plan.single else f"stages.{planned.name}")
    folder = _stage_folder(plan, planned)
    inputs = _input_hashes(tree, manifests, plan.config_folder)
    if planned.stage.reads_run:
        inputs |= {f"stages.{name}": f"{m['fingerprint']} {m['finished']}" for name, m in manifests.items()}
    kept = {k: v for k, v in planned.tree.items() if k not in COSMETIC_KEYS}
    fingerprint = _hash({"kind": planned.kind, "config": kept, "seed": planned.seed, "inputs": inputs})
    manifest_path = folder / "manifest.json"
    console = Console(stderr=True)
    done = _read_json(manifest_path)
    if done and done["fingerprint"] == fingerprint and done["status"] == "done" and _outputs_exist(done):
        if not quiet:
            console.print(f"[bold]{planned.name}[/bold]: unchanged since {done['finished']}, skipped", highlight=False)
        return done
    if not is_main_process() and not planned.stage.distributed:
        return _wait_for(manifest_path, fingerprint)
    manifest: dict[str, Any] = {}
    if is_main_process():
        if done and done["fingerprint"] != fingerprint:
            _move_aside(folder, plan, console, reason="was made by another configuration")
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "name": planned.name, "kind": planned.kind, "status": "running", "fingerprint": fingerprint,
            "config": to_tree(options), "seed": planned.seed, "inputs": inputs, "versions": package_versions(),
            "git": git_commit(), "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_json(manifest_path, manifest)
    if not plan.single and not quiet:
        console.rule(f"{planned.name} ({planned.kind})", align="left")
    started = time.perf_counter()
    context = StageContext(planned.name, folder, planned.seed, plan.config_folder, fingerprint, quiet, manifests, plan.seed)
    result = planned.stage.run(options, context)
    if not is_main_process():
        return _wait_for(manifest_path, fingerprint)
    manifest |= {
        "status": "done", "outputs": result.outputs, "metrics": result.metrics, "details": result.details,
        "seconds": round(time.perf_counter() - started, 3), "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(manifest_path, manifest)
    return manifest


def _outputs_exist(manifest: Mapping[str, Any]) -> bool:
    return all(Path(path).exists() for path in manifest["outputs"].values())


def _wait_for(manifest_path: Path, fingerprint: str) -> dict[str, Any]:
    """The manifest of a stage that the first process runs; its failure ends this process through the launcher."""
    while True:
        found = _read_json(manifest_path)
        if found and found["fingerprint"] == fingerprint and found["status"] == "done":
            return found
        time.sleep(0.2)


def _move_aside(folder: Path, plan: Plan, console: Console, *, reason: str) -> None:
    """Keep what ``folder`` holds under another name: nothing already written is lost."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    console.print(f"{folder} {reason}; what it held is now in {target}", highlight=False, soft_wrap=True)
    if plan.single:
        target.mkdir()
        for item in folder.iterdir():
            if item.name not in (".lock", "config.yaml"):
                item.rename(target / item.name)
    else:
        folder.rename(target)


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {run_dir} ({error.strerror or error}); choose another run_dir") from None


def _input_hashes(tree: Any, manifests: Mapping[str, Mapping[str, Any]], config_folder: Path) -> dict[str, str]:
    """Hashes of everything a stage reads: earlier stages by fingerprint, local files by content."""
    hashes: dict[str, str] = {}
    by_output = {path: m["fingerprint"] for m in manifests.values() for path in m["outputs"].values()}
    for value in _strings(tree):
        if value in by_output:
            hashes[value] = by_output[value]
            continue
        file = value.rpartition(":")[0] if ".py:" in value else value
        for candidate in (config_folder / file, Path(file)):
            if candidate.is_file():
                hashes[value] = hashlib.sha256(candidate.read_bytes()).hexdigest()[:16]
                break
            if file and candidate.is_dir() and value not in (".", "/"):
                hashes[value] = _hash([[str(p.relative_to(candidate)), p.stat().st_size, p.stat().st_mtime_ns]
                                       for p in sorted(candidate.rglob("*"))[:10000] if p.is_file()])
                break
    return hashes


def _strings(node: Any) -> list[str]:
    if isinstance(node, Mapping):
        return [text for value in node.values() for text in _strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in _strings(value)]
    return [node] if isinstance(node, str) and 0 < len(node) < 512 and "\n" not in node else []


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) and "fingerprint" in value else None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the working directory's repository, read from its files; None outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        head = folder / ".git" / "HEAD"
        if head.is_file():
            text = head.read_text().strip()
            if not text.startswith("ref: "):
                return text
            ref = folder / ".git" / text[5:]
            return ref.read_text().strip() if ref.is_file() else None
    return None


def is_main_process() -> bool:
    """Whether this process writes files and prints (rank 0 of a distributed launch)."""
    return int(os.environ.get("RANK", "0")) == 0


def report_failure(error: MmalignError) -> str:
    """An error as the command line prints it."""
    return f"{type(error).__name__}: {error}"
