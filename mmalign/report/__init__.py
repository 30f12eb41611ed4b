"""A run as one self-contained HTML page: results, curves, samples side by side, time, configuration, versions.

The page needs no network and no script; everything that a model wrote is escaped. Charts are SVG written by
:mod:`mmalign.report.charts`, so that they follow the reader's light or dark setting.
"""

from __future__ import annotations

from mmalign.report.page import write_report

__all__ = ["write_report"]
