"""What confines a program that nobody has read, in the process that will run it: standard library and Linux calls only.

Run as a script by :mod:`mmalign.rewards.sandbox` (never imported by the trainer for its effects). Three processes::

    supervisor   own session; leaves the namespaces it can, then waits; killing it kills the rest
    init         process 1 of a new process namespace: clock, collects the program's report; its end kills all inside
    program      limits, file rules, no privileges, filtered system calls; then the code is compiled and run

Each layer is applied where the kernel offers it and *reported*; whether a missing one is acceptable is decided by the
caller before any code runs. Landlock: Salaun 2017-2025, Linux ``Documentation/userspace-api/landlock.rst``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

# unshare(2) flags.
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 4, 22, 38, 36
_SIGKILL = 9

# Numbers of system calls: (x86_64, aarch64); None where the architecture has no such call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # processes: with these refused a program is one thread for its whole life
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    # signals to others, and looking into others
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "process_madvise": (440, 440), "prlimit64": (302, 261), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    # network; vsock and sockets in the file system are outside every network namespace
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # queues that run other calls, memory that outlives or is not counted, kernel interfaces
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_setup": (206, 0),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "userfaultfd": (323, 282), "bpf": (321, 280),
    "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "inotify_init1": (294, 26), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "reboot": (169, 142),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "swapon": (167, 224),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "sethostname": (170, 161), "personality": (135, 92),
    "quotactl": (179, 60), "acct": (163, 89), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    # what the file rules do not cover: owners, modes, times, attributes
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def _call(number: int, *arguments: Any) -> int:
    """A system call by number; raises OSError."""
    result = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _LIBC.prctl(ctypes.c_int(option), *padded):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# -- namespaces --------------------------------------------------------------------------------------------------------

def leave_namespaces() -> dict[str, bool]:
    """New user, process, network, mount, IPC and host-name namespaces for this process and its children, if allowed."""
    user, group = os.geteuid(), os.getegid()
    others = _NEWPID | _NEWNET | _NEWNS | _NEWIPC | _NEWUTS
    # A user namespace first: it needs no privilege, and takes away those that a container's root has outside.
    for flags in (_NEWUSER | others, others):
        if _LIBC.unshare(ctypes.c_int(flags)):
            continue
        if flags & _NEWUSER:
            for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        return {"user": bool(flags & _NEWUSER), "pid": True, "net": True, "mount": True}
    return {"user": False, "pid": False, "net": False, "mount": False}


def private_mounts(work: str, size: int) -> bool:
    """Everything read-only, and a memory file system of ``size`` bytes on ``work``, in this mount namespace; or False."""
    def mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
        if _LIBC.mount(source, target.encode(), kind, ctypes.c_ulong(flags), data):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    try:
        mount(b"none", "/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE
        read_only = struct.pack("QQQQ", 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
        _call(442, ctypes.c_int(-100), b"/", ctypes.c_uint(0x8000), read_only, ctypes.c_size_t(len(read_only)))
        options = f"size={size},nr_inodes=1024,mode=0700".encode()
        mount(b"work", work, b"tmpfs", 2 | 4 | 8, options)  # MS_NOSUID | MS_NODEV | MS_NOEXEC
    except OSError:
        return False
    return True


# -- file rules --------------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE, _READ, _READ_FOLDER, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL


def landlock_version() -> int:
    """Version of the kernel's file rules; 0 where there are none."""
    try:
        return _call(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError:
        return 0


def restrict_files(work: str, readable: list[str]) -> bool:
    """Read ``readable``, write ``work`` and ``/dev/null``, and no other file. False where the kernel cannot.

    Versions 1 and 2 let files be cut to length 0 wherever they are, so they do not count.
    """
    version = landlock_version()
    if version < 3:
        return False
    handled = (1 << (16 if version >= 5 else 15)) - 1
    attributes = struct.pack("Q", handled)
    if version >= 4:
        attributes += struct.pack("Q", 3)  # no TCP
    if version >= 6:
        attributes += struct.pack("Q", 3)  # no abstract sockets, no signals to processes outside
    rules = _call(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    allowed = [(path, _READ | _READ_FOLDER | _EXECUTE) for path in readable]
    allowed += [(work, handled & ~_EXECUTE & ~_IOCTL), ("/dev/null", _READ | _WRITE | _TRUNCATE), ("/dev/zero", _READ),
                ("/dev/urandom", _READ), ("/dev/random", _READ)]
    for path, access in allowed:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access &= handled if os.path.isdir(path) else handled & _OF_FILES
        rule = struct.pack("=Qi", access, descriptor)
        _call(445, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(descriptor)
    _call(446, ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)
    return True


def library_folders() -> list[str]:
    """What Python needs to read: its standard library, shared libraries and time zones."""
    import sysconfig

    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__),
             os.path.join(sys.base_prefix, "lib")}
    paths |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"}
    return sorted(path for path in paths if path and os.path.exists(path))


# -- system calls and limits -------------------------------------------------------------------------------------------

def filter_calls() -> bool:
    """Refuse the calls of the table with EPERM from now on. False on an architecture without one, or an old kernel."""
    column, identity = _ARCHITECTURES.get(platform.machine(), (None, 0))
    if column is None:
        return False
    numbers = sorted({number for pair in _CALLS.values() if (number := pair[column]) is not None})
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, identity), (0x06, 0, 0, 0x80000000)]  # another architecture: killed
    code.append((0x20, 0, 0, 0))
    refuse = 0x00050000 | 1  # SECCOMP_RET_ERRNO | EPERM
    if column == 0:
        code += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, refuse)]  # the x32 numbers of the same calls
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    code.append((0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(code), ctypes.addressof(buffer))
    try:
        _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program))
    except OSError:
        return False
    return True


def drop_privileges() -> None:
    """No capabilities, none to be gained."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    column, _ = _ARCHITECTURES.get(platform.machine(), (None, 0))
    if column is not None:
        _call((126, 91)[column], struct.pack("Ii", 0x20080522, 0), bytes(24))  # capset, version 3


def set_limits(limits: dict[str, Any]) -> None:
    """CPU seconds, address space, file size, processes, descriptors, no core file: soft and hard alike."""
    seconds = max(1, int(limits["cpu_seconds"] + 0.999))
    values = {
        resource.RLIMIT_CPU: (seconds, seconds), resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2, resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2, resource.RLIMIT_CORE: (0, 0),
    }
    for name, value in values.items():
        resource.setrlimit(name, value)


def refuse_in_python(network: bool, files: bool, work: str) -> None:
    """Where the kernel enforces nothing: an audit hook, which stops honest mistakes and no determined program."""
    roots = (os.path.realpath(work), *(os.path.realpath(path) for path in library_folders()))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if network and event.startswith("socket."):
            raise PermissionError(f"{event} is not allowed here")
        if event in ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "os.kill"):
            raise PermissionError(f"{event} is not allowed here")
        if files and event == "open" and arguments and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(arguments[2], int) else True
            if not any(path == root or path.startswith(root + os.sep) for root in roots[: 1 if writes else None]):
                raise PermissionError(f"{path} is outside the program's folder")

    sys.addaudithook(hook)


def die_with_parent() -> None:
    """This process gets SIGKILL when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def confine(work: str, limits: dict[str, Any], required: set[str], spaces: dict[str, bool]) -> dict[str, str]:
    """Apply every layer of the program's process; returns what enforces each guarantee, ``""`` where nothing does.

    Raises PermissionError, before any code has run, when a ``required`` guarantee (network, files, processes) has no
    enforcement by the kernel.
    """
    _prctl(_PR_SET_DUMPABLE, 0)
    readable = library_folders()
    drop_privileges()
    set_limits(limits)
    files = restrict_files(work, readable)
    calls = filter_calls()
    processes = "system calls" if calls else "process limit" if os.geteuid() and not spaces["user"] else ""
    held = {
        "network": " and ".join(["namespace"] * spaces["net"] + ["system calls"] * calls),
        "files": "file rules" if files and (calls or spaces.get("mounts")) else "",
        "processes": " and ".join(filter(None, ["namespace"] * spaces["pid"] + [processes])) if processes else "",
        "folder": "memory file system" if spaces.get("mounts") else "",
    }
    missing = sorted(name for name in required if not held[name])
    if missing:
        raise PermissionError(f"this machine cannot enforce: {', '.join(missing)}")
    if not (held["network"] and held["files"]):
        refuse_in_python(not held["network"], not held["files"], work)
    return held
