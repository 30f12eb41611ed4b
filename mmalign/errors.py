"""The errors mmalign raises on purpose: each names the key, the value, what is allowed and what to do."""

from __future__ import annotations


class MmalignError(Exception):
    """Base of every error that mmalign raises about its inputs; the command line prints it without a traceback."""


class ConfigError(MmalignError, ValueError):
    """A configuration key is unknown, missing, or has a value that is not allowed."""


class DataError(MmalignError, ValueError):
    """A data set cannot be used: missing columns, no rows, rows with nothing to train on, unreadable files."""


class NoRowsLeftError(DataError):
    """Rows were read, and none of them can be used."""


class RewardError(MmalignError, ValueError):
    """A reward function raised, or returned something that is not one finite number (or None) per sample."""


class CheckpointError(MmalignError, ValueError):
    """A checkpoint or model folder is damaged, or belongs to another model or configuration."""


class ExportError(MmalignError, ValueError):
    """An export is impossible, or the exported folder does not reproduce the trained model."""


class AssetError(MmalignError, RuntimeError):
    """A built-in asset cannot be fetched, verified or built."""
