"""Checks of model folders: what users of the plain Hugging Face libraries would stumble over."""

from __future__ import annotations

from mmalign.checks.findings import Check, Findings
from mmalign.hub.check import check_export
from mmalign.policies.loading import resolve_model_path


def check_model(target: str, findings: Findings) -> None:
    """Check a model folder or model asset (:func:`mmalign.hub.check.check_export`)."""
    for found in check_export(resolve_model_path(target, key="model")):
        findings.checks.append(Check(found.status, found.text))
