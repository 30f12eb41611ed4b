"""Tiny models as a training run would leave them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "policies"))  # the tiny diffusion pipelines are shared with those tests



@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tied Llama with a ChatML tokenizer whose template has generation marks."""
    from mmalign.data.tiny_llama import build_tiny_llama

    folder = tmp_path_factory.mktemp("llama") / "base"
    build_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion pipeline with a licence in its card."""
    from tiny_diffusion import save_tiny_sd

    folder = save_tiny_sd(tmp_path_factory.mktemp("sd") / "base")
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# base\n")
    return folder
