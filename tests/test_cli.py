"""The command line, and pipelines of cheap stages: what is imported, refused, skipped, resumed and set aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmalign.cli import main, train_script
from mmalign.config import Options
from mmalign.errors import ConfigError, DataError
from mmalign.stages import StageContext, StageResult, load_plan, make_plan, run_plan, stage
from run_folders import write_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
CALLS: list[str] = []


class ToyOptions(Options):
    """Options of the toy stage."""

    value: int = 1
    """A number."""
    source: str | None = None
    """A file whose number is added."""
    fail: bool = False
    """Raise after half of the work."""
    tracking: dict[str, Any] = {}
    """Changes no result."""


@stage("toy_add", options=ToyOptions, outputs=("number", "folder"))
def toy_add(options: ToyOptions, context: StageContext) -> StageResult:
    """Add numbers."""
    CALLS.append(context.name)
    half = context.folder / "half.txt"
    resumed = half.is_file()
    half.write_text("done")
    if options.fail and not resumed:
        raise DataError("data: broken on purpose")
    total = options.value + (int(Path(options.source).read_text()) if options.source else 0)
    (context.folder / "number.txt").write_text(str(total))
    return StageResult({"number": str(context.folder / "number.txt"), "folder": str(context.folder)},
                       {"total": float(total), "seed": float(context.seed), "resumed": float(resumed)})


@pytest.fixture(autouse=True)
def forget_calls() -> None:
    CALLS.clear()


def pipeline(run_dir: Path, *stages: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"run_dir": str(run_dir), "stages": [{"kind": "toy_add", **entry} for entry in stages], **top}


def write(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def execute(tree: dict[str, Any], **options: Any) -> dict[str, dict[str, Any]]:
    return run_plan(make_plan(tree, config_folder=Path.cwd()), quiet=True, **options)


def command(*arguments: str) -> int:
    """Exit status of a command line run in this process."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def loaded_by(code: str) -> set[str]:
    """Top-level modules of a fresh process after ``code``."""
    listing = "print('\\n', *{m.partition('.')[0] for m in sys.modules})"
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{listing}"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "diffusers", "datasets", "accelerate", "peft", "open_clip", "matplotlib", "numpy", "PIL"}


# -- what is imported ----------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("import mmalign") & (HEAVY | {"pydantic", "yaml", "typer", "rich"}) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "--help"]])
def test_help_loads_no_model_library(arguments: list[str]) -> None:
    assert loaded_by(f"from mmalign.cli import main; main({arguments!r})") & HEAVY == set()


def test_a_report_needs_no_model_library(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "run")
    assert loaded_by(f"from mmalign.cli import main; main(['report', {str(tmp_path / 'run')!r}])") & (HEAVY - {"PIL"}) == set()
    assert (tmp_path / "run" / "report.html").is_file()


# -- refusals and exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "expected"), [
    (["valeu=3"], "valeu: unknown key; did you mean value?"),
    (["value=many"], "value: Input should be a valid integer"),
    (["value"], "must have the form key.sub=value"),
    (["kind=toy_ad"], "kind: unknown stage kind 'toy_ad'; did you mean 'toy_add'"),
    (["seed=x"], "seed: 'x' is not an integer"),
])
def test_wrong_keys_and_values_exit_with_2_and_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str,
) -> None:
    path = write(tmp_path, {"kind": "toy_add", "run_dir": str(tmp_path / "run")})
    assert command("run", path, *overrides) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # refused before anything is written


@pytest.mark.parametrize(("text", "expected"), [
    ("kind: toy_add\nkind: toy_add\n", "written twice"), ("kind: [", "is not valid YAML"), ("- 1\n", "must hold a mapping"),
    ("stages: []\n", "at least one stage"), ("value: 1\n", "method: required"),
    ("method: spft\n", "did you mean 'sft'"),
    ("stages: [{kind: toy_add, name: a b}]\n", "may hold letters"),
    ("staged: 1\nstages: [{kind: toy_add}]\n", "did you mean stages"),
    ("stages: [{kind: toy_add, name: a}, {kind: toy_add, name: a}]\n", "used twice"),
])
def test_malformed_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert command("run", str(tmp_path / "bad.yaml")) == 2
    assert expected in capsys.readouterr().err


def test_a_missing_file_names_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"kind": "toy_add"}, "pipeline.yaml")
    assert command("run", str(tmp_path / "pipelin.yaml")) == 2
    assert "pipeline.yaml" in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run") == 2
    assert command("nonsense") == 2
    assert command("generate", "asset:tiny_llama") == 2
    assert "--data" in capsys.readouterr().err


def test_check_exits_with_1_when_something_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", write(tmp_path, {"kind": "toy_add", "value": 2})) == 0
    assert command("check", write(tmp_path, {"kind": "toy_add", "valu": 2})) == 1
    assert "did you mean value?" in capsys.readouterr().out


def test_a_failing_stage_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"kind": "toy_add", "fail": True, "run_dir": str(tmp_path / "run")})
    assert command("run", path) == 2
    assert "broken on purpose" in capsys.readouterr().err


def test_scripts_refuse_methods_of_another_modality(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(REPOSITORY / "configs" / "diffusion" / "ddpo.yaml")
    monkeypatch.setattr(sys, "argv", ["train_text.py", config, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        train_script("text")
    assert ended.value.code == 2
    assert "ddpo trains diffusion models" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train_script("diffusion")
    assert ended.value.code == 0


# -- running -------------------------------------------------------------------------------------------------------------


def test_run_applies_overrides_and_writes_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, pipeline(tmp_path / "x", {"name": "a", "value": 2}), "two.words.yaml")
    assert command("run", path, "stages.a.value=40", "seed=7", "-o", str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "a" / "number.txt").read_text() == "40"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["stages"][0]["value"] == 40
    manifest = json.loads((tmp_path / "run" / "a" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["config"]["value"] == 40
    assert {"torch", "transformers"} <= set(manifest["versions"])
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "x").exists()
    assert "number.txt" in capsys.readouterr().out.replace("\n", "").replace(" ", "").replace("│", "")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("run", write(tmp_path, pipeline(tmp_path / "run", {"name": "a"})), "--dry-run") == 0
    assert "a: toy_add" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_single_stage_takes_the_name_of_its_file(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, {"kind": "toy_add"}, "my.first run.yaml"))
    assert (plan.single, plan.stages[0].name, plan.run_dir.name) == (True, "my_first_run", "my.first run")


def test_finished_stages_are_skipped_and_changed_ones_take_their_dependants_along(tmp_path: Path) -> None:
    def tree(first: int, third: int = 5) -> dict[str, Any]:
        return pipeline(tmp_path / "run", {"name": "a", "value": first}, {"name": "b", "source": "${stages.a.number}"},
                        {"name": "c", "value": third})

    assert execute(tree(2))["b"]["metrics"]["total"] == 3
    assert execute(tree(2))["b"]["metrics"]["total"] == 3
    assert CALLS == ["a", "b", "c"]
    CALLS.clear()
    assert execute(tree(10))["b"]["metrics"]["total"] == 11
    assert CALLS == ["a", "b"]
    assert (tmp_path / "run" / "a.previous-1" / "number.txt").read_text() == "2"  # nothing is lost
    CALLS.clear()
    execute(tree(10, third=6))
    assert CALLS == ["c"]


def test_cosmetic_keys_do_not_make_a_stage_run_again(tmp_path: Path) -> None:
    execute(pipeline(tmp_path / "run", {"name": "a"}))
    execute(pipeline(tmp_path / "run", {"name": "a", "tracking": {"quiet": True}}))
    assert CALLS == ["a"]


def test_the_contents_of_a_file_count_not_its_name_or_age(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    tree = pipeline(tmp_path / "run", {"name": "a", "source": str(source)})
    source.write_text("4")
    execute(tree)
    os.utime(source, (time.time() + 100, time.time() + 100))
    execute(tree)
    assert CALLS == ["a"]
    source.write_text("5")
    assert execute(tree)["a"]["metrics"]["total"] == 6


def test_a_missing_output_makes_its_stage_run_again(tmp_path: Path) -> None:
    tree = pipeline(tmp_path / "run", {"name": "a"})
    (Path(execute(tree)["a"]["outputs"]["number"])).unlink()
    execute(tree)
    assert CALLS == ["a", "a"]


def test_an_interrupted_stage_resumes_in_its_folder_and_later_ones_wait(tmp_path: Path) -> None:
    tree = pipeline(tmp_path / "run", {"name": "a"}, {"name": "b", "fail": True}, {"name": "c"})
    with pytest.raises(DataError):
        execute(tree)
    assert CALLS == ["a", "b"]
    assert json.loads((tmp_path / "run" / "b" / "manifest.json").read_text())["status"] == "running"
    manifests = execute(tree)
    assert CALLS == ["a", "b", "b", "c"]
    assert manifests["b"]["metrics"]["resumed"] == 1


def test_only_runs_one_stage_again_from_the_start(tmp_path: Path) -> None:
    tree = pipeline(tmp_path / "run", {"name": "a"}, {"name": "b"}, {"name": "c"})
    execute(tree)
    CALLS.clear()
    manifests = execute(tree, only="b")
    assert CALLS == ["b"]
    assert list(manifests) == ["a", "b"]
    assert manifests["b"]["metrics"]["resumed"] == 0
    assert (tmp_path / "run" / "b.previous-1").is_dir()
    with pytest.raises(ConfigError, match="no stage 'd'"):
        execute(tree, only="d")


def test_seeds_of_stages_are_their_own_stable_and_may_be_set(tmp_path: Path) -> None:
    first = execute(pipeline(tmp_path / "1", {"name": "a"}, {"name": "b"}, {"name": "c", "seed": 5}))
    second = execute(pipeline(tmp_path / "2", {"name": "b"}, {"name": "a"}))
    other = execute(pipeline(tmp_path / "3", {"name": "a"}, seed=1))
    seeds = {name: manifest["metrics"]["seed"] for name, manifest in first.items()}
    assert seeds["a"] != seeds["b"]
    assert seeds["c"] == 5
    assert {name: seeds[name] for name in "ab"} == {n: m["metrics"]["seed"] for n, m in second.items()}
    assert other["a"]["metrics"]["seed"] != seeds["a"]


@pytest.mark.parametrize(("reference", "expected"), [
    ("${stages.aa.number}", "did you mean 'a'"), ("${stages.a.model}", "has no output 'model'; it has number, folder"),
    ("${stages.b.number}", "names no earlier stage"), ("${rundir}", "names no earlier stage"),
])
def test_references_are_checked_before_anything_runs(tmp_path: Path, reference: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.b\.source") as raised:
        make_plan(pipeline(tmp_path, {"name": "a"}, {"name": "b", "source": reference}), config_folder=tmp_path)
    assert expected in str(raised.value)


def test_a_report_stage_follows_its_pipeline(tmp_path: Path) -> None:
    def tree(value: int) -> dict[str, Any]:
        return pipeline(tmp_path / "run", {"name": "a", "value": value}, {"name": "page", "kind": "report"})

    execute(tree(1))
    page = tmp_path / "run" / "report.html"
    first = page.stat().st_mtime_ns
    execute(tree(1))
    assert page.stat().st_mtime_ns == first  # nothing changed, nothing done
    execute(tree(2))
    assert page.stat().st_mtime_ns > first  # although its own options did not change
    with pytest.raises(ConfigError, match="run_dir"):
        execute({"kind": "report", "run_dir": str(tmp_path / "alone")})


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(str(tmp_path / "run" / ".lock")), pytest.raises(ConfigError, match="in use"):
        execute(pipeline(tmp_path / "run", {"name": "a"}))


def test_other_processes_of_a_launch_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is not training runs once; the manifests of all processes are the same."""
    tree = pipeline(tmp_path / "run", {"name": "a", "value": 3}, {"name": "b", "source": "${stages.a.number}"})
    code = ("import sys, json; sys.path.insert(0, 'tests'); import test_cli\n"
            f"manifests = test_cli.execute({tree!r})\n"
            "print(json.dumps([manifests, test_cli.CALLS]))")
    environment = {**os.environ, "RANK": "1", "PYTHONPATH": str(REPOSITORY)}
    waiting = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    mine = execute(tree)
    theirs, calls = json.loads(waiting.communicate(timeout=120)[0])
    assert waiting.returncode == 0
    assert calls == []
    assert theirs == json.loads(json.dumps(mine))


# -- the other commands --------------------------------------------------------------------------------------------------


def test_methods_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    from mmalign.config import document
    from mmalign.methods.registry import METHODS

    assert command("methods") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("sft", "dpo", "grpo", "ddpo"))
    assert command("methods", "dpo") == 0
    shown = capsys.readouterr().out
    assert all(f"{row.path}:" in shown for row in document(METHODS.get("dpo").options))
    assert command("methods", "dpoo") == 2
    assert "did you mean 'dpo'" in capsys.readouterr().err


def test_assets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("assets") == 0
    assert "arithmetic" in capsys.readouterr().out
    assert command("assets", "arithmetik") == 2


def test_python_runs_the_same_thing(tmp_path: Path) -> None:
    import mmalign

    manifests = mmalign.run(pipeline(tmp_path / "run", {"name": "a", "value": 2}), ["stages.a.value=9"], quiet=True)
    assert manifests["a"]["metrics"]["total"] == 9
    assert (tmp_path / "run" / "report.html").is_file()
