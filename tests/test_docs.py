"""The documentation: generated pages are current, examples run, configurations parse, links and option names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.config import key_paths, parse_yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, content) of every fenced block."""
    return [(info.strip(), body) for info, body in FENCE.findall(page.read_text(encoding="utf-8"))]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_generated_pages_are_current() -> None:
    # A process of its own: other tests register methods and losses.
    result = run(["scripts/docs.py", "--check"], REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


WITH_PYTHON = [page for page in PAGES if any(info == "python" for info, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page are one program, run beside the repository's configurations."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "page.py").write_text("\n".join(body for info, body in blocks(page) if info == "python"))
    result = run(["page.py"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_block_is_marked_in_a_way_that_nothing_checks() -> None:
    known = {"", "bash", "python", "python no-run", "yaml", "yaml config", "toml"}
    found = {(name_of(page), info) for page in PAGES for info, _ in blocks(page)}
    assert {pair for pair in found if pair[1] not in known} == set()


CONFIGS = [(page, body) for page in PAGES for info, body in blocks(page) if info == "yaml config"]


@pytest.mark.parametrize(("page", "body"), CONFIGS, ids=[f"{name_of(page)}-{i}" for i, (page, _) in enumerate(CONFIGS)])
def test_configurations_are_accepted(page: Path, body: str, tmp_path: Path) -> None:
    from mmalign.stages import make_plan

    assert make_plan(parse_yaml(body), config_folder=tmp_path).stages


def test_other_yaml_is_yaml() -> None:
    fragments = [body for page in PAGES for info, body in blocks(page) if info == "yaml"]
    assert fragments
    assert all(isinstance(parse_yaml(body), dict) for body in fragments)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {slug(re.sub(r"[`*]", "", heading)) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_method_has_a_page_with_its_configurations_and_existing_options() -> None:
    """The option tables of the method pages name real keys; arguments of components count by their component."""
    code = "from mmalign.methods.registry import METHODS; print(*METHODS.names())"
    names = run(["-c", code], REPOSITORY).stdout.split()
    assert {"sft", "dpo", "grpo", "diffusion_sft", "diffusion_dpo", "ddpo"} <= set(names)
    from mmalign.methods.registry import METHODS

    for name in names:
        page = DOCS / "methods" / f"{name}.md"
        assert page.is_file(), f"docs/methods/{name}.md is missing"
        text = page.read_text(encoding="utf-8")
        for config in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (REPOSITORY / config).is_file(), f"{name}: {config} does not exist"
        assert "configs/" in text
        known = set(key_paths(METHODS.get(name).options))
        table = re.search(r"\| key \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
        assert table, f"{name}: no option table"
        for row in table.group(1).splitlines():
            for key in re.findall(r"`([\w.]+)`", row.split("|")[1]):
                parent = key.rpartition(".")[0]
                assert key in known or f"{parent}.name" in known, f"{name}: {key} is no option"


def test_commands_of_the_documentation_exist() -> None:
    from typer.main import get_command

    from mmalign.cli import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = {word for page in PAGES for info, body in blocks(page) if info in ("bash", "")
            for word in re.findall(r"^\s*(?:accelerate launch -m )?mmalign (\w+)", body, re.MULTILINE)}
    assert len(used) > 5
    assert used - {"COMMAND"} <= commands
