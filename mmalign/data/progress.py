"""Progress bars that appear only when something takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds before a bar is shown."""


def track(items: Iterable[T], *, total: int, description: str) -> Iterator[T]:
    """``items``, with a bar (rate and time left) on standard error once two seconds have passed."""
    started = time.monotonic()
    source = iter(items)
    done = 0
    for item in source:
        yield item
        done += 1
        if time.monotonic() - started > PATIENCE:
            break
    else:
        return
    with _bar() as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in source:
            yield item
            progress.advance(task)


@contextmanager
def transfer(description: str, total: int) -> Iterator[Progress]:
    """A bar in bytes for a download of about ``total`` bytes; its only task has the id 0."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(description, total=total)
        yield progress


@contextmanager
def working(description: str) -> Iterator[None]:
    """A spinner with the time passed, for work without countable steps."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description} ...", markup=False)
        yield
        return
    with console.status(description):
        yield


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Silence the progress bars of transformers, which appear however short the work."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TaskProgressColumn(show_speed=True), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
