"""The table of methods: a name, a configuration class, and a builder that composes the floors below."""

from __future__ import annotations

from mmalign.methods.registry import METHODS, Method, method

__all__ = ["METHODS", "Method", "method"]
