"""Findings of a check: lines with a status, collected without ever raising."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from mmalign.errors import MmalignError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding: ``fail`` would stop a run, ``warn`` would spoil it, ``ok`` is what was looked at and found right."""

    status: Status
    text: str


@dataclass
class Findings:
    """A growing list of checks."""

    checks: list[Check] = field(default_factory=list)

    def ok(self, text: str) -> None:
        """Add what is right."""
        self.checks.append(Check("ok", text))

    def warn(self, text: str) -> None:
        """Add what a run would survive."""
        self.checks.append(Check("warn", text))

    def fail(self, text: str) -> None:
        """Add what would stop a run."""
        self.checks.append(Check("fail", text))

    @property
    def failed(self) -> bool:
        """Whether anything failed so far."""
        return any(check.status == "fail" for check in self.checks)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn whatever the block raises into failed lines: ours say it all, others are introduced by ``what``."""
        try:
            yield
        except MmalignError as error:
            for line in _problems(str(error)):
                self.fail(line)
        except Exception as error:  # a checker reports; user code and damaged files may raise anything
            self.fail(f"{what}: {type(error).__name__}: {error}")


def _problems(message: str) -> list[str]:
    """The configuration layer lists one problem per line, each beginning with its key; other messages stay whole."""
    lines = message.splitlines() or [message]
    keyed = all(":" in line and " " not in line.partition(":")[0] for line in lines)
    return lines if keyed else [message]
