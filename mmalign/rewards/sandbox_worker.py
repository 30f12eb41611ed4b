"""The script that :mod:`mmalign.rewards.sandbox` starts for every program: supervisor, clock, program, and its tests.

``python -S -B sandbox_worker.py JOB_FILE STATUS_FD``; standard library only. Nothing that the program prints or writes is
believed: how it ended comes from the kernel, and tests run in a process of their own that sees plain values only.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import select
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

if __package__:
    from mmalign.rewards import confinement
else:  # run as a script, beside its sibling
    import confinement  # type: ignore[import-not-found,no-redef]

# -- plain values ------------------------------------------------------------------------------------------------------


def pack(value: Any) -> Any:
    """``value`` as JSON if it is made of numbers, text, bytes, None and plain containers; raises TypeError otherwise."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [pack(item) for item in value]}
    if kind is dict:
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"{kind.__name__} is not a plain value")


def unpack(value: Any) -> Any:
    """Inverse of :func:`pack`; raises ValueError for what it did not write."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("not a packed value")
    (kind, content), = value.items()
    if kind in ("tuple", "set", "frozenset"):
        made: Any = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return made(unpack(item) for item in content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    raise ValueError(f"not a packed value: {kind}")


def _send(descriptor: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data):]


# -- the program -------------------------------------------------------------------------------------------------------


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the program may have closed or replaced it
            stream.flush()
    os._exit(code)


def _guarded(function: Callable[[], None]) -> tuple[int, str]:
    """Run what a program asks for; its exit code, and the name of the exception that ended it."""
    try:
        function()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0) & 0xFF, ""
        sys.stderr.write(f"{stop.code}\n")
        return 1, "SystemExit"
    except MemoryError:
        return 1, "MemoryError"
    except BaseException as error:
        try:
            inner = error.__traceback__  # without the frames of this script
            while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
                inner = inner.tb_next
            traceback.print_exception(type(error), error, inner, limit=-8)
        except Exception:  # one that cannot even be printed
            return 1, type(error).__name__
        return 1, type(error).__name__
    return 0, ""


def _namespace(name: str) -> dict[str, Any]:
    return {"__name__": name, "__builtins__": builtins}


def run_program(job: dict[str, Any], report: int) -> NoReturn:
    """Run the code, then report how it ended and the variable that was asked for."""
    namespace = _namespace("__main__")
    code, error = _guarded(lambda: exec(compile(job["program"], "program.py", "exec"), namespace))
    message: dict[str, Any] = {"error": error}
    if job["variable"] is not None and job["variable"] in namespace:
        try:
            message["value"] = pack(namespace[job["variable"]])
        except (TypeError, ValueError, RecursionError):
            message["type"] = type(namespace[job["variable"]]).__name__
    with contextlib.suppress(OSError, ValueError, RecursionError):
        _send(report, message)
    _end(code)


def serve_program(job: dict[str, Any], calls: int, answers: int) -> NoReturn:
    """Run the code, then call its functions for the tests until nobody asks any more."""
    namespace = _namespace("program")
    code, error = _guarded(lambda: exec(compile(job["program"], "program.py", "exec"), namespace))
    own = {name: value for name, value in namespace.items() if not name.startswith("__")}
    values = {}
    for name, value in own.items():
        try:
            values[name] = pack(value)
        except (TypeError, ValueError, RecursionError):
            continue
    _send(answers, {"error": error, "functions": [n for n, v in own.items() if callable(v)], "values": values})
    with os.fdopen(calls, "rb") as stream:
        for line in stream:
            name, arguments, keywords = unpack(json.loads(line))
            try:
                reply = {"value": pack(own[name](*arguments, **keywords))}
            except BaseException as raised:
                reply = {"raised": type(raised).__name__, "message": str(raised)[:500]}
            _send(answers, reply)
    _end(code)


class _Caller:
    """Functions of the program, called across a pipe with plain values."""

    def __init__(self, calls: int, answers: int, most: int) -> None:
        self.calls, self.stream, self.most = calls, os.fdopen(answers, "rb"), most
        hello = self._read()
        self.error = hello.get("error")
        self.names = {str(name): self._function(str(name)) for name in hello.get("functions", ())}
        self.names |= {str(name): unpack(value) for name, value in hello.get("values", {}).items()}

    def _read(self) -> dict[str, Any]:
        line = self.stream.readline(self.most)
        if not line.endswith(b"\n"):
            raise RuntimeError("the program ended, or answered with more than the limit")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise RuntimeError("the program gave no proper answer")
        return message

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            _send(self.calls, pack([name, list(arguments), keywords]))
            reply = self._read()
            if "raised" in reply:
                kind = getattr(builtins, str(reply["raised"]), RuntimeError)
                if not (isinstance(kind, type) and issubclass(kind, Exception)):
                    kind = RuntimeError
                raise kind(reply.get("message", ""))
            return unpack(reply.get("value"))

        call.__name__ = call.__qualname__ = name
        return call


def run_tests(job: dict[str, Any], report: int, calls: int, answers: int, tests: int) -> NoReturn:
    """Run every test against the program's functions; one line of the report per test."""
    with os.fdopen(tests, encoding="utf-8") as stream:
        sources = json.load(stream)
    try:
        names = _Caller(calls, answers, job["limits"]["output_bytes"]).names
    except Exception:
        names = {}
    for module in ("program", "solution"):
        made = types.ModuleType(module)
        made.__dict__.update(names)
        sys.modules[module] = made
    for source in sources:
        namespace = {**names, **_namespace("tests")}

        def run(source: str = source, namespace: dict[str, Any] = namespace) -> None:
            exec(compile(source, "tests.py", "exec"), namespace)
            for name, value in list(namespace.items()):
                if name.startswith("test") and isinstance(value, types.FunctionType) and value.__code__.co_argcount == 0 \
                        and value.__code__.co_filename == "tests.py":
                    value()

        try:
            run()
            passed, error = True, ""
        except BaseException as raised:
            passed, error = False, type(raised).__name__
        _send(report, {"passed": passed, "error": error})
    os._exit(0)


# -- init and supervisor -----------------------------------------------------------------------------------------------


def _spawn(body: Callable[[], NoReturn], keep: tuple[int, ...]) -> int:
    """A child that holds standard streams and ``keep`` only, and runs ``body``."""
    child = os.fork()
    if child:
        return child
    try:
        for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else map(str, range(256)):
            if int(name) > 2 and int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        body()
    except BaseException:
        os._exit(70)


def _confined(job: dict[str, Any], spaces: dict[str, bool], ready: int, body: Callable[[], NoReturn]) -> NoReturn:
    try:
        held = confinement.confine(job["work"], job["limits"], set(job["required"]), spaces)
    except BaseException as error:
        _send(ready, {"refused": str(error) or type(error).__name__})
        os._exit(71)
    _send(ready, {"held": held})
    os.close(ready)
    body()


def _collect(report: int, child: int, seconds: float, most: int) -> tuple[bytes, int | None, float, bool]:
    """The report of a child up to ``most`` bytes, its wait status, its CPU seconds, and whether the time was up."""
    deadline, data, listening = time.monotonic() + seconds, b"", True
    while True:
        left = deadline - time.monotonic()
        if listening and select.select([report], [], [], max(0.0, min(left, 0.05)))[0]:
            piece = os.read(report, 65536)
            listening = bool(piece)
            data = (data + piece)[:most]
        elif not listening:
            time.sleep(max(0.0, min(left, 0.002)))
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done == child:
            while listening and select.select([report], [], [], 0)[0] and (piece := os.read(report, 65536)):
                data = (data + piece)[:most]
            return data, status, usage.ru_utime + usage.ru_stime, False
        if left <= 0:
            os.kill(child, 9)
            _, status, usage = os.wait4(child, 0)
            return data, status, usage.ru_utime + usage.ru_stime, True


def _lines(data: bytes) -> list[Any]:
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def _init(job: dict[str, Any], spaces: dict[str, bool], status: int) -> NoReturn:
    """Process 1 of the new process namespace (an ordinary process where there is none)."""
    confinement.die_with_parent()
    tests = -1
    if job["tests_file"] is not None:
        # Opened here and read by the process of the tests only: no other ever has them in its memory.
        tests = os.open(job["tests_file"], os.O_RDONLY)
        os.unlink(job["tests_file"])
    if spaces["mount"]:
        spaces["mounts"] = confinement.private_mounts(job["work"], job["limits"]["folder_bytes"])
        os.chdir(job["work"])  # the file system that is mounted there now, not the folder below it
    ready_read, ready = os.pipe()
    report_read, report = os.pipe()
    others = []
    started = time.monotonic()
    if tests < 0:
        child = _spawn(lambda: _confined(job, spaces, ready, lambda: run_program(job, report)), (ready, report))
    else:
        calls_read, calls = os.pipe()
        answers_read, answers = os.pipe()
        others.append(_spawn(lambda: _confined(job, spaces, ready, lambda: serve_program(job, calls_read, answers)),
                             (ready, calls_read, answers)))
        nothing = os.open("/dev/null", os.O_WRONLY)

        def test() -> NoReturn:
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            _confined(job, spaces, ready, lambda: run_tests(job, report, calls, answers_read, tests))

        child = _spawn(test, (ready, report, calls, answers_read, nothing, tests))
        for descriptor in (calls_read, calls, answers_read, answers, nothing, tests):
            os.close(descriptor)
    os.close(ready)
    os.close(report)
    for stream in (1, 2):  # so that the trainer sees the end of the output when the program ends
        os.dup2(os.open("/dev/null", os.O_WRONLY), stream)
    data, code, cpu, late = _collect(report_read, child, job["limits"]["seconds"], job["limits"]["output_bytes"])
    for other in others:
        try:
            os.kill(other, 9)
            os.wait4(other, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
    greeting = _lines(os.read(ready_read, 4096))
    _send(status, {
        "ready": greeting, "report": _lines(data), "late": late, "cpu": cpu, "seconds": time.monotonic() - started,
        "exit": os.WEXITSTATUS(code) if code is not None and os.WIFEXITED(code) else None,
        "signal": os.WTERMSIG(code) if code is not None and os.WIFSIGNALED(code) else None,
    })
    os._exit(0)


def supervise(job_file: str, status: int) -> None:
    """Read the job, leave what namespaces can be left, and wait for init."""
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    os.unlink(job_file)
    confinement.die_with_parent()
    os.chdir(job["work"])
    os.environ.clear()
    os.environ.update({"HOME": job["work"], "TMPDIR": job["work"], "LANG": "C.UTF-8", "PATH": ""})
    spaces = confinement.leave_namespaces() if job["isolate"] else dict.fromkeys(("user", "pid", "net", "mount"), False)
    child = os.fork()
    if child == 0:
        try:
            _init(job, spaces, status)
        except BaseException as error:
            _send(status, {"broken": f"{type(error).__name__}: {error}"})
            os._exit(72)
    os.close(status)
    for stream in (1, 2):
        os.dup2(os.open("/dev/null", os.O_WRONLY), stream)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path and os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]
    supervise(sys.argv[1], int(sys.argv[2]))
