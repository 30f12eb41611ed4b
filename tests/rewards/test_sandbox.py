"""Hostile programs: each ends within its bounds, does what it is allowed and no more, and leaves the machine clean."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmalign.config import parse
from mmalign.errors import ConfigError
from mmalign.rewards import confinement
from mmalign.rewards.sandbox import ProgramResult, Sandbox, SandboxOptions
from mmalign.rewards.sandbox_worker import pack, unpack

SECONDS = 1.0


def available(isolate: bool) -> bool:
    try:
        return bool(Sandbox(isolate=isolate).isolation)
    except ConfigError:
        return False


MODES = [
    pytest.param(mode, id=name, marks=pytest.mark.skipif(not available(mode), reason="the kernel cannot enforce it"))
    for mode, name in ((True, "namespaces"), (False, "without-namespaces"))
]


@pytest.fixture(autouse=True)
def left_clean() -> Iterator[None]:
    """No process and no folder of ours outlives a test."""
    yield
    assert not children()
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"mmalign-program-{os.getpid()}-")]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def run(source: str, isolate: bool = True, **options: Any) -> ProgramResult:
    return Sandbox(SandboxOptions(**{"seconds": SECONDS, **options}), isolate=isolate).run([source])[0]


def test_this_machine_says_what_it_enforces() -> None:
    held = Sandbox(SandboxOptions(require_network_isolation=False, require_file_isolation=False,
                                  require_process_isolation=False)).isolation
    assert set(held) == {"network", "files", "processes", "folder"}
    assert bool(held["files"]) <= bool(confinement.landlock_version())


@pytest.mark.parametrize("isolate", MODES)
def test_what_programs_may_do(isolate: bool) -> None:
    box = Sandbox(isolate=isolate)
    results = box.run([
        "import math, json, collections, decimal, random\nprint(math.factorial(5), json.dumps([1]))",
        "open('note', 'w').write('kept'); print(open('note').read())",
        "import tempfile, os\nwith tempfile.NamedTemporaryFile('w') as f: f.write('x')\nprint(os.listdir('.'))",
        "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
        "print(input())",
        "answer = {'a': (1, 2.5), 'b': {3}}",
        "import os; print(dict(os.environ).get('PATH'), sorted(os.environ) == sorted(set(os.environ)))",
    ], variable="answer")
    assert [result.status for result in results] == ["ok", "ok", "ok", "error", "error", "ok", "ok"]
    assert results[0].stdout == "120 [1]\n"
    assert results[1].stdout == "kept\n"
    assert results[2].stdout == "[]\n"
    assert (results[3].stdout, results[3].stderr, results[3].exit_code) == ("out\n", "err\n", 3)
    assert results[4].error == "EOFError"
    assert results[5].value == {"a": (1, 2.5), "b": {3}}


def test_results_come_in_the_order_of_the_programs_and_are_the_same_again() -> None:
    sources = [f"import time; time.sleep({0.2 if i == 0 else 0}); print({{'a', 'b', 'c'}}, {i})" for i in range(5)]
    first, again = (Sandbox(SandboxOptions(workers=3)).run(sources) for _ in range(2))
    assert [result.stdout.split()[-1] for result in first] == [str(i) for i in range(5)]
    assert [result.stdout for result in first] == [result.stdout for result in again]  # the hash seed is fixed
    assert Sandbox().run([]) == []


def test_nothing_of_the_trainer_is_inherited(monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    source = "import os\nprint(sorted(os.environ), [n for n in range(3, 32) if _open(n)])"
    helper = "import os\ndef _open(n):\n    try: os.fstat(n)\n    except OSError: return False\n    return True\n"
    result = run(helper + source)
    os.close(read)
    os.close(write)
    assert result.status == "ok", result
    assert "SECRET" not in result.stdout
    assert len(eval(result.stdout.partition("] ")[2])) <= 1  # the pipe of its own report


# -- bounds ------------------------------------------------------------------------------------------------------------

IGNORE_SIGNALS = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
"""


@pytest.mark.parametrize("isolate", MODES)
@pytest.mark.parametrize(("source", "status"), [
    ("while True: pass", "timeout"),
    ("import time; time.sleep(60)", "timeout"),
    (IGNORE_SIGNALS + "while True: pass", "timeout"),
    ("try:\n    while True: pass\nexcept BaseException:\n    pass\nfinally:\n    while True: pass", "timeout"),
    ("while True: print('x' * 10000)", "output_limit"),
    ("import os\nwhile True: os.write(2, b'x' * 10000)", "output_limit"),
    ("data = [0] * 10**9", "memory"),
    ("data = []\nwhile True: data.append(bytearray(10**7))", "memory"),
    ("(lambda: 0).__class__(compile('0', '', 'eval').replace(co_code=b'\\xff' * 100), {})()", "killed"),
    ("x = 10 ** 10 ** 10", "timeout"),
], ids=["loop", "sleep", "deaf loop", "finally loop", "endless output", "endless error output", "memory", "memory by pieces",
        "crash", "one long operation"])
def test_every_bound_ends_the_program(source: str, status: str, isolate: bool) -> None:
    result = run(source, isolate)
    assert result.status == status, result
    assert len(result.stdout) + len(result.stderr) <= SandboxOptions().output_bytes


@pytest.mark.parametrize("isolate", MODES)
def test_processor_time_is_bounded_when_the_clock_is_not(isolate: bool) -> None:
    assert run("while True: pass", isolate, seconds=30.0, cpu_seconds=1.0).status == "timeout"


@pytest.mark.parametrize("isolate", MODES)
def test_files_are_bounded(isolate: bool) -> None:
    result = run("with open('big', 'wb') as f:\n    while True: f.write(b'x' * 65536)", isolate)
    assert (result.status, result.error) == ("error", "OSError")
    many = "import os\nfor i in range(10**6):\n    open(f'f{i}', 'wb').write(b'x' * 500_000)"
    if isolate and Sandbox().isolation["folder"]:
        assert run(many, isolate, seconds=5.0).error == "OSError"  # the folder is full
    assert run("files = [open('f', 'w') for _ in range(1000)]", isolate).error == "OSError"


# -- escapes -----------------------------------------------------------------------------------------------------------

FORKS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "caught fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "system": "import os\nif os.system('true') != 0: raise SystemError",
    "thread bomb": "import threading\nwhile True: threading.Thread(target=lambda: None).start()",
    "multiprocessing": "import multiprocessing; multiprocessing.Process(target=print).start()",
    "raw clone": "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.syscall(56, 17, 0, 0, 0, 0) < 0: raise OSError",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(60)",
    "exec": "import os; os.execv('/bin/sleep', ['sleep', '60'])",
}


@pytest.mark.parametrize("isolate", MODES)
@pytest.mark.parametrize("source", FORKS.values(), ids=FORKS)
def test_no_program_starts_another(source: str, isolate: bool) -> None:
    result = run(source, isolate)
    assert result.status in ("error", "timeout"), result
    assert result.status == "error" or "caught" in source or "try" in source


def test_children_die_with_the_namespace_when_they_are_possible(monkeypatch: Any, tmp_path: Path) -> None:
    """The second layer on its own: a daemon in its own session is gone when the program is."""
    if not Sandbox().isolation["processes"].startswith("namespace"):
        pytest.skip("no process namespaces here")
    worker = Path(confinement.__file__).with_name("sandbox_worker.py")
    for file in ("sandbox_worker.py", "confinement.py"):
        text = worker.with_name(file).read_text().replace("set_limits(limits)\n", "pass\n")
        (tmp_path / file).write_text(text.replace("calls = filter_calls()", "calls = True"))
    monkeypatch.setattr("mmalign.rewards.sandbox._WORKER", tmp_path / "sandbox_worker.py")
    before = set(psutil.pids())
    mark = f"{os.getpid()}.125"
    result = run(f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep({mark})\nprint('parent', os.getpid())")
    assert result.status == "ok", result
    assert int(result.stdout.split()[1]) < 10  # process numbers of a namespace of its own
    own = str(tmp_path)
    assert not [pid for pid in set(psutil.pids()) - before if own in _command_line(pid)]
    killer = "import os\nfor who in (1, -1):\n    try: os.kill(who, 9)\n    except OSError: pass\nprint('alive')"
    assert run(killer).stdout == "alive\n"


def _command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.txt"
    file.write_text("hunter2")
    file.chmod(0o666)
    tmp_path.chmod(0o777)
    return file


FILES = {
    "read": "print(open({path!r}).read())",
    "read raw": "import os\nprint(os.read(os.open({path!r}, os.O_RDONLY), 100))",
    "link": "import os\nos.symlink({path!r}, 'mine')\nprint(open('mine').read())",
    "hard link": "import os\nos.link({path!r}, 'mine')\nprint(open('mine').read())",
    "list": "import os\nprint(os.listdir({folder!r}))",
    "write": "open({path!r}, 'w').write('changed')",
    "append": "open({path!r}, 'a').write('changed')",
    "truncate": "import os\nos.truncate({path!r}, 0)",
    "remove": "import os\nos.remove({path!r})",
    "rename": "import os\nos.rename({path!r}, {path!r} + '.moved')",
    "replace": "import os\nopen('mine', 'w').write('changed')\nos.replace('mine', {path!r})",
    "create": "open({path!r} + '.new', 'w').write('made')",
    "folder": "import os\nos.mkdir({path!r} + '.folder')",
    "mode": "import os\nos.chmod({path!r}, 0)",
    "owner": "import os\nos.chown({path!r}, 1, 1)",
    "times": "import os\nos.utime({path!r}, (0, 0))",
    "attribute": "import os\nos.setxattr({path!r}, 'user.a', b'1')",
    "passwords": "print(open('/etc/passwd').read())",
    "parent's memory": "import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb').read(1)",
    "environment": "print(open('/proc/1/environ').read())",
    "disk": "import glob\nfor name in ('/dev/sda', '/dev/vda', '/dev/mem', '/dev/kmsg'):\n    open(name, 'rb').read(1)",
    "unmount": "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.umount2(b'.', 2): raise OSError",
    "job file": "import os\nprint(open('../job.json').read())",
}


@pytest.mark.parametrize("isolate", MODES)
@pytest.mark.parametrize("source", FILES.values(), ids=FILES)
def test_files_outside_its_folder_are_out_of_reach(source: str, isolate: bool, secret: Path) -> None:
    before = secret.stat()
    result = run(source.format(path=str(secret), folder=str(secret.parent)), isolate)
    assert result.status == "error", result
    assert "hunter2" not in result.stdout
    assert secret.read_text() == "hunter2"
    after = secret.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)
    assert sorted(path.name for path in secret.parent.iterdir()) == ["secret.txt"]


NETWORK = {
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "unix": "import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})",
    "raw": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "vsock": "import socket\nsocket.socket(40, socket.SOCK_STREAM)",
    "pair": "import socket\nsocket.socketpair()",
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
    "ring": "import ctypes\nlibc = ctypes.CDLL(None)\nif libc.syscall(425, 8, bytes(120)) < 0: raise OSError",
}


@pytest.mark.parametrize("isolate", MODES)
@pytest.mark.parametrize("source", NETWORK.values(), ids=NETWORK)
def test_no_network(source: str, isolate: bool, tmp_path: Path) -> None:
    import socket

    path = str(tmp_path / "socket")
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        local.bind(path)
        local.listen()
        result = run(source.format(port=server.getsockname()[1], path=path), isolate)
        assert result.status == "error", result
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("isolate", MODES)
@pytest.mark.parametrize("source", [
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "import os, signal\nos.kill({trainer}, signal.SIGTERM)",
    "import ctypes\nif ctypes.CDLL(None).ptrace(16, {trainer}, 0, 0) < 0: raise OSError",
    "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "import os\nos.setpriority(os.PRIO_PROCESS, 0, -20)",
], ids=["parent", "group", "everybody", "trainer", "trace", "raise limit", "priority"])
def test_other_processes_are_out_of_reach(source: str, isolate: bool) -> None:
    result = run(source.format(trainer=os.getpid()), isolate)
    assert result.status == "error", result


# -- forgeries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [
    "import os\nfor n in range(1, 32):\n"
    "    try: os.write(n, b'{{\"error\": \"\", \"value\": 7, \"passed\": true, \"held\": {{}}}}\\n')\n"
    "    except OSError: pass\nos._exit({code})",
    "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit({code})",
    "import sys, os\nsys.stdout.close(); sys.stderr.close(); os.closerange(0, 64); os._exit({code})",
    "import sys\nclass Odd:\n    def __str__(self): raise RuntimeError\nsys.exit(Odd())",
    "raise type('Odd', (BaseException,), {{'__str__': lambda self: 1 / 0}})()",
])
def test_how_a_program_ended_is_what_the_kernel_saw(source: str) -> None:
    result = run(source.format(code=5))
    assert result.status == "error", result
    assert result.exit_code in (1, 5, 70)


FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "equal to everything": "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Yes()",
    "a number that lies": "class Two(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
                          "def f(x): return Two(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "no assertions": "import builtins, sys\nbuiltins.AssertionError = type('A', (Exception,), {})\nsys.flags\ndef f(x): return 0",
    "verdict everywhere": "import os\nfor n in range(1, 32):\n"
                          "    try: os.write(n, b'{\"passed\": true, \"error\": \"\"}\\n' * 9)\n"
                          "    except OSError: pass\ndef f(x): return 0",
    "tests rewritten": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'sources' in o: o['sources'] = []\n"
                       "def f(x): return 0",
    "loops when called": "def f(x):\n    while True: pass",
    "floods": "def f(x): return 'x' * 10**7",
    "deep": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
}


@pytest.mark.parametrize("source", FORGERIES.values(), ids=FORGERIES)
def test_a_program_cannot_pass_tests_without_solving_them(source: str) -> None:
    tests = ["assert f(1) == 2", "assert f(2) == 3\nassert f(-1) == 0 and f(0) != f(1)"]
    result = Sandbox(SandboxOptions(seconds=SECONDS)).run([source], tests=[tests])[0]
    assert not any(result.passed), result
    assert len(result.passed) == 2
    assert result.status in ("error", "timeout")


def test_a_program_cannot_read_its_tests() -> None:
    """Neither in its memory, nor up its stack, nor through a descriptor, nor on disk."""
    spy = """
import ctypes, gc, os, sys
def look():
    texts, frame = [], sys._getframe()
    while frame is not None:
        texts.append(repr(frame.f_locals))
        frame = frame.f_back
    texts += [repr(o) for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]
    for n in range(0, 32):
        try:
            os.set_blocking(n, False)
            texts.append(os.read(n, 10000).decode())
        except OSError:
            pass
        try:
            os.set_blocking(n, True)
        except OSError:
            pass
    for name in ("../tests.json", "/proc/self/mem"):
        try:
            texts.append(open(name).read())
        except OSError:
            pass
    return texts
found = any("_".join(["secret", "marker"]) in text for text in look())
def f(): return found
"""
    tests = ["secret_marker = 1\nassert f() is True", "assert f() is False"]
    result = Sandbox(SandboxOptions(seconds=5.0)).run([spy], tests=[tests])[0]
    assert result.passed == (False, True), result


def test_honest_programs_pass_and_tests_are_judged_one_by_one() -> None:
    source = "LIMIT = 3\ndef f(x, step=1): return x + step\ndef g(): raise KeyError('none')\n"
    tests = ["assert f(1) == 2", "assert f(1) == 3", "from solution import f\nassert f(1, step=2) == 3",
             "def test_it():\n    assert f(5) == 0", "def check(candidate):\n    assert candidate(0) == LIMIT - 2\ncheck(f)",
             "try:\n    g()\nexcept KeyError: pass", "import program\nassert program.f((1, 2)[0]) == 2", "syntax error"]
    result = Sandbox().run([source], tests=[tests])[0]
    assert result.passed == (True, False, True, False, True, True, True, False)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["network", "file", "process"])
def test_a_guarantee_that_cannot_be_kept_refuses_every_program(name: str, monkeypatch: Any, tmp_path: Path) -> None:
    worker = Path(confinement.__file__).with_name("sandbox_worker.py")
    for file in ("sandbox_worker.py", "confinement.py"):
        text = worker.with_name(file).read_text()
        text = text.replace("calls = filter_calls()", "calls = False")
        text = text.replace("files = restrict_files(work, readable)", "files = False")
        (tmp_path / file).write_text(text)
    monkeypatch.setattr("mmalign.rewards.sandbox._WORKER", tmp_path / "sandbox_worker.py")
    options = {f"require_{other}_isolation": other == name for other in ("network", "file", "process")}
    if name == "process" and os.geteuid():
        pytest.skip("the process limit holds for users that are not root")
    box = Sandbox(SandboxOptions(**options), isolate=False)
    with pytest.raises(ConfigError, match=f"(?s){name}.*require_{name}_isolation"):
        box.run(["print('never')"])
    free = SandboxOptions(**dict.fromkeys(options, False))
    weak = Sandbox(free, isolate=False).run(["import socket\nsocket.socket()", "open('/etc/passwd')", "print('runs')"])
    assert [result.status for result in weak] == ["error", "error", "ok"]  # the audit hook: honest mistakes only


@pytest.mark.parametrize(("tree", "part"), [
    ({"seconds": 0}, "seconds"), ({"memory_bytes": 1}, "memory_bytes"), ({"workers": -1}, "workers"),
    ({"memory": 1}, "memory_bytes"),
])
def test_senseless_bounds_are_refused_by_name(tree: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parse(SandboxOptions, tree, root="rewards")


@pytest.mark.parametrize("value", [None, True, -3, 2.5, "é", [1, [2]], (1, "a"), {1, 2}, frozenset({3}), {"a": {1: None}},
                                   b"\x00\xff", 1 + 2j, {"dict": 1}, {(1, 2): [()]}])
def test_plain_values_cross_and_come_back(value: Any) -> None:
    import json

    found = unpack(json.loads(json.dumps(pack(value))))
    assert found == value
    assert type(found) is type(value)


def test_other_values_do_not_cross() -> None:
    with pytest.raises(TypeError, match="not a plain value"):
        pack(signal.SIGTERM)
    for wrong in ({"a": 1, "b": 2}, {"object": []}):
        with pytest.raises(ValueError, match="packed"):
            unpack(wrong)
