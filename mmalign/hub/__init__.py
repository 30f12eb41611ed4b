"""From a trained model to a folder that others load with their own libraries: export, checks, model card, upload."""

from __future__ import annotations
