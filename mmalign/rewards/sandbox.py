"""Running untrusted Python programs: one confined process each, several at a time, every result within its bounds.

What is enforced, and by what, is measured and reported (:attr:`Sandbox.isolation`): namespaces, Landlock file rules, a
filter of system calls, resource limits. A guarantee that is required and cannot be kept refuses every program.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mmalign.config import Options
from mmalign.errors import ConfigError, RewardError
from mmalign.rewards.sandbox_worker import unpack

Status = Literal["ok", "error", "timeout", "memory", "output_limit", "killed"]

GRACE_SECONDS = 20.0
"""Time for starting an interpreter on a busy machine, beyond the program's own."""

_WORKER = Path(__file__).with_name("sandbox_worker.py")


class SandboxOptions(Options):
    """Bounds of one program, and what must be enforced around it."""

    seconds: float = 5.0
    """Wall-clock time of a program; then it is killed with everything it started."""
    cpu_seconds: float = 5.0
    """Processor time, rounded up to whole seconds."""
    memory_bytes: int = 512 * 2**20
    """Address space."""
    output_bytes: int = 2**16
    """Standard output and error together; a program that writes more is stopped."""
    file_bytes: int = 2**20
    """Largest file."""
    folder_bytes: int = 16 * 2**20
    """All its files together (kept where the kernel gives it a memory file system of its own)."""
    open_files: int = 32
    """Open file descriptors."""
    workers: int = 0
    """Programs at a time; 0 takes the number of processors, 8 at most."""
    require_network_isolation: bool = True
    """Refuse to run programs where the kernel cannot keep them off the network."""
    require_file_isolation: bool = True
    """Refuse to run programs where the kernel cannot keep them inside their folder."""
    require_process_isolation: bool = True
    """Refuse to run programs where the kernel cannot keep them from starting processes."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        for name in ("seconds", "cpu_seconds", "memory_bytes", "output_bytes", "file_bytes", "folder_bytes", "open_files"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.memory_bytes < 64 * 2**20:
            raise ValueError(f"memory_bytes must be at least {64 * 2**20}: the interpreter itself needs that, not "
                             f"{self.memory_bytes}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, not {self.workers}")

    @property
    def required(self) -> list[str]:
        """Guarantees without which nothing runs."""
        asked = {"network": self.require_network_isolation, "files": self.require_file_isolation,
                 "processes": self.require_process_isolation}
        return [name for name, needed in asked.items() if needed]


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    status: Status
    """ok: ended with code 0. error: an exception, or another code. killed: by a signal (crash, out of memory)."""
    stdout: str = ""
    """What it printed, cut at the limit."""
    stderr: str = ""
    exit_code: int | None = None
    """None when a signal or a limit ended it."""
    seconds: float = 0.0
    """Wall-clock time of the program itself."""
    value: Any = None
    """The variable that was asked for, when it held plain data."""
    has_value: bool = False
    error: str = ""
    """Name of the exception that ended it, or of the signal."""
    passed: tuple[bool, ...] = ()
    """One per test; tests that were not reached have failed."""


@dataclass
class _Output:
    limit: int
    pieces: dict[str, list[bytes]] = field(default_factory=lambda: {"stdout": [], "stderr": [], "status": []})
    written: int = 0

    def add(self, name: str, data: bytes) -> bool:
        """Keep what fits; False when the program has written more than its limit."""
        if name == "status":
            self.pieces[name].append(data)
            return True
        room = self.limit - self.written
        self.written += len(data)
        self.pieces[name].append(data[: max(0, room)])
        return self.written <= self.limit

    def text(self, name: str) -> str:
        return b"".join(self.pieces[name]).decode("utf-8", "replace")


class Sandbox:
    """Runs programs under :class:`SandboxOptions`.

    Args:
        options: bounds and requirements.
        isolate: False leaves the namespaces out (the other layers stay); for tests of machines without them.
    """

    def __init__(self, options: SandboxOptions | None = None, *, isolate: bool = True) -> None:
        if os.name != "posix" or not sys.executable:
            raise ConfigError("programs are run in confined processes of a POSIX system, which this is not")
        self.options, self.isolate = options or SandboxOptions(), isolate

    @cached_property
    def isolation(self) -> dict[str, str]:
        """Guarantee (network, files, processes, folder) -> what enforces it on this machine, "" for nothing.

        Found by running an empty program. Raises ConfigError when a required guarantee cannot be kept.
        """
        answer, _ = self._start("", None, None)
        greeting = (answer.get("ready") or [{}])[0]
        if "refused" in greeting:
            raise ConfigError(
                f"{greeting['refused']}. Programs written by a model are not run without it; use another machine or kernel "
                "(Linux 6.2 or later, with user namespaces), or set require_network_isolation, require_file_isolation or "
                "require_process_isolation to false if the whole machine may be lost")
        held = greeting.get("held")
        if held is None:
            raise ConfigError(f"a confined process could not be started: {answer.get('broken') or 'it ended at once'}")
        return dict(held)

    def run(
        self, programs: Sequence[str], *, variable: str | None = None, tests: Sequence[Sequence[str]] | None = None,
    ) -> list[ProgramResult]:
        """Run every program, ``workers`` at a time; results in the order of the programs.

        Args:
            programs: source texts.
            variable: a global variable whose value is wanted at the end, if it is made of plain data.
            tests: for each program, source texts run one after the other in another process in which the program's functions
                are called by name (or imported from ``program`` or ``solution``) with plain data. A test passes when it ends
                without an exception. The program sees neither the tests nor their verdict.
        """
        self.isolation  # noqa: B018 - raises before anything runs
        workers = self.options.workers or min(8, os.cpu_count() or 1)
        jobs = [(program, None if tests is None else list(tests[i])) for i, program in enumerate(programs)]
        if len(jobs) < 2:
            return [self._run(program, variable, checks) for program, checks in jobs]
        with ThreadPoolExecutor(min(workers, len(jobs)), thread_name_prefix="sandbox") as pool:
            return list(pool.map(lambda job: self._run(job[0], variable, job[1]), jobs))

    def _run(self, program: str, variable: str | None, tests: list[str] | None) -> ProgramResult:
        answer, output = self._start(program, variable, tests)
        return _result(answer, output, tests, self.options)

    def _start(
        self, program: str, variable: str | None, tests: list[str] | None,
    ) -> tuple[dict[str, Any], _Output]:
        folder = Path(tempfile.mkdtemp(prefix=f"mmalign-program-{os.getpid()}-"))
        try:
            (folder / "work").mkdir(mode=0o700)
            job = {
                "program": program.encode("utf-8", "replace").decode(), "variable": variable, "work": str(folder / "work"),
                "tests_file": None if tests is None else str(folder / "tests.json"), "limits": self.options.model_dump(),
                "required": self.options.required, "isolate": self.isolate,
            }
            (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
            if tests is not None:
                (folder / "tests.json").write_text(json.dumps(tests), encoding="utf-8")
            return self._watch(folder)
        finally:
            _remove(folder)

    def _watch(self, folder: Path) -> tuple[dict[str, Any], _Output]:
        read_status, write_status = os.pipe()
        output = _Output(self.options.output_bytes)
        try:
            # A new session, no inherited descriptors, nothing of the trainer's environment; the hash seed is fixed so that
            # the same program prints the same sets.
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", str(_WORKER), str(folder / "job.json"), str(write_status)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONHASHSEED": "0"},
                cwd=folder / "work", close_fds=True, pass_fds=(write_status,), start_new_session=True,
            )
        except BaseException:
            os.close(read_status)
            raise
        finally:
            os.close(write_status)
        try:
            ended = self._read(process, read_status, output)
        finally:
            _kill(process)
            os.close(read_status)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if ended:
            return {"stopped": ended}, output
        text = output.text("status")
        try:
            answer = json.loads(text.partition("\n")[0])
        except ValueError:
            answer = {"broken": output.text("stderr").strip()[-500:]}
        return answer, output

    def _read(self, process: subprocess.Popen[bytes], status: int, output: _Output) -> str:
        """Read until every stream has ended; "output_limit" or "timeout" when the program must be stopped."""
        deadline = time.monotonic() + self.options.seconds + GRACE_SECONDS
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            streams = {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(), "status": status}
            for name, descriptor in streams.items():
                selector.register(descriptor, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "timeout"
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fd)
                    elif not output.add(key.data, data):
                        return "output_limit"
        return ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the supervisor's whole session; init dies with the supervisor, and its namespace with init."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _remove(folder: Path) -> None:
    for parent, names, _ in os.walk(folder):  # a folder made without permissions would stay
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder)


def _result(answer: dict[str, Any], output: _Output, tests: list[str] | None, options: SandboxOptions) -> ProgramResult:
    texts: dict[str, Any] = {"stdout": output.text("stdout"), "stderr": output.text("stderr")}
    nothing = (False,) * len(tests or ())
    if "stopped" in answer:
        return ProgramResult(answer["stopped"], **texts, seconds=options.seconds, passed=nothing)
    greetings = answer.get("ready", [])
    refused = next((greeting["refused"] for greeting in greetings if "refused" in greeting), None)
    if "broken" in answer or refused is not None:
        raise RewardError(f"a confined process could not be started: {refused or answer['broken'] or 'it ended at once'}")
    report = [message for message in answer["report"] if isinstance(message, dict)]
    seconds, code, number = answer["seconds"], answer["exit"], answer["signal"]
    if tests is not None:
        passed = [bool(message.get("passed")) for message in report[: len(tests)]]
        passed += [False] * (len(tests) - len(passed))
        status: Status = "timeout" if answer["late"] else "ok" if all(passed) else "error"
        first = next((str(message.get("error")) for message in report if not message.get("passed")), "")
        return ProgramResult(status, **texts, exit_code=code, seconds=seconds, error=first, passed=tuple(passed))
    last = report[-1] if report else {}
    error = str(last.get("error", ""))
    if answer["late"] or (number in (signal.SIGKILL, signal.SIGXCPU) and answer["cpu"] >= 0.9 * options.cpu_seconds):
        return ProgramResult("timeout", **texts, seconds=seconds)
    if number is not None:
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return ProgramResult("killed", **texts, seconds=seconds, error=name)
    if error == "MemoryError":
        return ProgramResult("memory", **texts, exit_code=code, seconds=seconds, error=error)
    value, has_value = None, False
    if "value" in last:
        try:
            value, has_value = unpack(last["value"]), True
        except (ValueError, TypeError, RecursionError):
            has_value = False
    return ProgramResult("ok" if code == 0 else "error", **texts, exit_code=code, seconds=seconds, value=value,
                         has_value=has_value, error=error)
