"""The command line. Every command builds a stage configuration and runs it; heavy libraries load inside commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mmalign.errors import MmalignError

app = typer.Typer(
    name="mmalign", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Align text, image and multimodal models: one loop, one set of losses, one command.",
)

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Dotted overrides such as steps=20 or loss.beta=0.2")]  # noqa: UP045
RunDir = Annotated[Optional[str], typer.Option("--run-dir", "-o", help="Where to write; overrides run_dir")]  # noqa: UP045


def _console() -> Any:
    from rich.console import Console

    return Console()


def _tree(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _run_tree(tree: dict[str, Any], overrides: list[str] | None, run_dir: str | None, default: str) -> None:
    from mmalign.api import execute
    from mmalign.config import apply_overrides
    from mmalign.stages import make_plan

    tree = apply_overrides({"run_dir": run_dir or f"runs/{default}", **tree}, overrides or [])
    plan = make_plan(tree, config_folder=Path.cwd(), default_name=default)
    _show_manifests(execute(plan), plan.run_dir)


def _show_manifests(manifests: dict[str, dict[str, Any]], run_dir: Path) -> None:
    """Stages with what they made, before and after of every comparison, and where the page is."""
    from rich.table import Table

    from mmalign.report.stage import results_table
    from mmalign.stages import is_main_process

    if not is_main_process():
        return
    table = Table("stage", "seconds", show_edge=False)
    table.add_column("output", overflow="fold")  # a path that is cut cannot be copied
    for name, manifest in manifests.items():
        table.add_row(name, f"{manifest['seconds']:.1f}", next(iter(manifest["outputs"].values()), ""))
    _console().print(table)
    results = results_table(run_dir)
    if results is not None and not any(manifest["kind"] == "report" for manifest in manifests.values()):
        _console().print(results)
    _console().print(f"report: {run_dir / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of a stage or a pipeline")],
    overrides: Overrides = None, run_dir: RunDir = None,
    only: Annotated[Optional[str], typer.Option(help="Run this stage again (earlier ones are kept)")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, run nothing")] = False,
    modality: Annotated[Optional[str], typer.Option(hidden=True)] = None,  # noqa: UP045
) -> None:
    """Run a configuration: any method, stage or pipeline. Finished stages are skipped, interrupted ones resumed."""
    from mmalign.api import execute
    from mmalign.stages import load_plan

    plan = load_plan(config, overrides or [], run_dir=run_dir)
    if modality is not None:
        _refuse_other_modalities([planned.kind for planned in plan.stages], modality)
    if dry_run:
        for planned in plan.stages:
            _console().print(f"{planned.name}: {planned.kind}", highlight=False)
        return
    _show_manifests(execute(plan, only=only), plan.run_dir)


def _refuse_other_modalities(kinds: list[str], modality: str) -> None:
    from mmalign.errors import ConfigError
    from mmalign.methods.registry import METHODS

    for kind in kinds:
        if kind in METHODS and METHODS.get(kind).modality != modality:
            raise ConfigError(f"method: {kind} trains {METHODS.get(kind).modality} models, this script {modality} models; use "
                              f"scripts/train_{METHODS.get(kind).modality}.py or `mmalign run`")


@app.command()
def methods(
    name: Annotated[Optional[str], typer.Argument(help="Show this method's options")] = None,  # noqa: UP045
) -> None:
    """List every method with its paper; with a NAME, its options, defaults and meaning."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from mmalign.config import document
    from mmalign.errors import ConfigError
    from mmalign.methods.registry import METHODS

    console = _console()
    if name is None:
        table = Table("method", "modality", "kind", "paper", "what it does", show_edge=False)
        for key in METHODS:
            entry = METHODS.get(key)
            table.add_row(entry.name, entry.modality, entry.kind, entry.paper, entry.summary)
        console.print(table)
        return
    try:
        entry = METHODS.get(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    console.print(f"[bold]{entry.name}[/bold] ({entry.modality}, {entry.kind})  {entry.summary}", highlight=False)
    console.print(f"{entry.paper}\n", highlight=False)
    for row in document(entry.options):
        depth = "  " * row.path.count(".")
        heading = f"{depth}[bold]{row.path}[/bold]: {escape(row.type)} = {escape(row.default)}"
        console.print(heading, highlight=False, soft_wrap=True)
        console.print(Padding(Text(row.description), (0, 0, 0, 4 + len(depth))))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Folder, hub id or asset:NAME")],
    data: Annotated[Optional[str], typer.Option(help="Prompts: file, folder, hub id or asset:NAME")] = None,  # noqa: UP045
    prompt: Annotated[Optional[list[str]], typer.Option(help="A prompt (repeatable), instead of --data")] = None,  # noqa: UP045
    n: Annotated[int, typer.Option("--n", "-n", help="Samples per prompt")] = 1,
    chat: Annotated[bool, typer.Option(help="Send --prompt as a user message through the chat template")] = True,
    overrides: Overrides = None, run_dir: RunDir = None,
) -> None:
    """Sample completions or images. With --prompt, text is printed and images are saved."""
    if prompt:
        _generate_now(model, prompt, n, chat, overrides or [], Path(run_dir or "runs/generate"))
        return
    if data is None:
        raise typer.BadParameter("give --data or at least one --prompt")
    _run_tree({"kind": "generate", "model": {"path": model}, "data": {"path": data}, "completions_per_prompt": n},
              overrides, run_dir, "generate")


def _generate_now(model: str, prompts: list[str], n: int, chat: bool, overrides: list[str], folder: Path) -> None:
    from mmalign.config import apply_overrides
    from mmalign.core.seeding import generator
    from mmalign.policies.loading import ModelOptions, load_policy
    from mmalign.stage_kinds.sampling import sampling_for

    policy = load_policy(ModelOptions(path=model))
    given: list[Any] = list(prompts)
    tokenizer = getattr(policy, "tokenizer", None)
    if chat and tokenizer is not None and tokenizer.chat_template:
        given = [[{"role": "user", "content": text}] for text in prompts]
    tree = apply_overrides({"sampling": {}, "seed": 0}, overrides)
    rollout = policy.sample(given, n, sampling_for(policy, tree["sampling"]), generator(tree["seed"], "generate"))
    for i, sample in enumerate(rollout.samples):
        if isinstance(sample, (str, list)):
            _console().print(sample if isinstance(sample, str) else sample[-1]["content"], markup=False, highlight=False)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            sample.save(folder / f"{i:03d}.png")
            _console().print(str(folder / f"{i:03d}.png"))


@app.command()
def score(
    data: Annotated[str, typer.Argument(help="Rows with prompt and completion or image")],
    reward: Annotated[list[str], typer.Option(help="Registered name, file.py:function or package.module:function")],
    overrides: Overrides = None, run_dir: RunDir = None,
) -> None:
    """Score samples on disk with one or more rewards."""
    _run_tree({"kind": "score", "data": {"path": data}, "rewards": [{"name": r} for r in reward]}, overrides, run_dir, "score")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id or asset:NAME")],
    data: Annotated[str, typer.Option(help="Held-out prompts")],
    reward: Annotated[list[str], typer.Option(help="Rewards to measure")],
    compare_with: Annotated[Optional[str], typer.Option(help="Folder of an earlier evaluation")] = None,  # noqa: UP045
    overrides: Overrides = None, run_dir: RunDir = None,
) -> None:
    """Sample held-out prompts, measure rewards with standard errors, compare with an earlier evaluation."""
    _run_tree(_tree(kind="evaluate", model={"path": model}, data={"path": data}, rewards=[{"name": r} for r in reward],
                    compare_with=compare_with), overrides, run_dir, "evaluate")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's model folder, or any model or adapter folder")],
    output: Annotated[str, typer.Argument(help="Folder to write")],
    kind: Annotated[str, typer.Option(help="auto, transformers, adapter, merged, pipeline, unet, diffusers_lora")] = "auto",
    push_to_hub: Annotated[Optional[str], typer.Option(help="Hub repository id to upload to")] = None,  # noqa: UP045
    overrides: Overrides = None,
) -> None:
    """Export a model so that transformers, peft or diffusers load it without mmalign."""
    from mmalign.config import apply_overrides, parse
    from mmalign.hub.export import ExportOptions
    from mmalign.hub.export import export as export_model

    tree = apply_overrides(_tree(model=model, output=output, kind=kind, push_to_hub=push_to_hub), overrides or [])
    report = export_model(parse(ExportOptions, tree))
    _console().print(report.summary(), highlight=False)


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="A configuration, a data set, a reward or a model folder")],
    model: Annotated[Optional[str], typer.Option(help="Data sets: model whose tokenizer shows the masks")] = None,  # noqa: UP045
    overrides: Overrides = None,
) -> None:
    """Say what would go wrong before it does: keys, batch arithmetic, masks, rewards on three samples, exports."""
    from mmalign.checks import run_checks

    lines = run_checks(target, model=model, overrides=overrides or [])
    for line in lines:
        mark = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}[line.status]
        _console().print(f"{mark} {line.text}", highlight=False, soft_wrap=True)
    if any(line.status == "fail" for line in lines):
        raise typer.Exit(1)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory")],
    output: Annotated[Optional[Path], typer.Option(help="HTML file; default report.html in the run directory")] = None,  # noqa: UP045
) -> None:
    """Write a self-contained HTML page of a run: curves, samples side by side, timing, configuration."""
    from mmalign.report import write_report

    _console().print(str(write_report(run_dir, output)))


@app.command()
def assets(
    fetch: Annotated[Optional[list[str]], typer.Argument(help="Assets to fetch or build now")] = None,  # noqa: UP045
) -> None:
    """List the small built-in models and data sets, or fetch some."""
    from rich.table import Table

    from mmalign.data.assets import fetch_asset, list_assets

    for name in fetch or []:
        _console().print(f"{name}: {fetch_asset(name)}", highlight=False, soft_wrap=True)
    if not fetch:
        table = Table("asset", "kind", "size", "what it is", show_edge=False)
        for entry in list_assets():
            table.add_row(f"asset:{entry.name}", entry.kind, entry.size, entry.description)
        _console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Console entry point (``arguments`` default to the command line's); our errors are printed and exit with status 2."""
    try:
        app(args=arguments)
    except MmalignError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def train_script(modality: str) -> None:
    """``mmalign run`` on the command line's arguments, methods of another modality refused."""
    main(["run", "--modality", modality, *sys.argv[1:]])


def run_command(name: str) -> None:
    """``mmalign NAME`` on the command line's arguments."""
    main([name, *sys.argv[1:]])


if __name__ == "__main__":
    main()
