"""The language-model branch: methods for text, composed from mmalign's floors."""

from __future__ import annotations


def register() -> None:
    """Import every method module, which registers it (called through the ``mmalign.methods`` entry point)."""
    import importlib
    import pkgutil

    import text_llm

    for module in pkgutil.walk_packages(text_llm.__path__, "text_llm."):
        importlib.import_module(module.name)
