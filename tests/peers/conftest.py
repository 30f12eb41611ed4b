"""A tiny model on disk, and data that both libraries read."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.data.tiny_llama import build_tiny_llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A two-layer Llama with tied weights and a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("peers") / "llama"
    build_tiny_llama(folder)
    return folder
