"""Files that are written whole or not at all, whatever crashes, fills up or writes too; locks that die with their holder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ganomaly_plugin.errors import InvalidInput

_LITTER = 3600.0  # seconds after which a part of a file is nobody's work any more


def as_path(path: object) -> Path:
    """`path` as a Path; `~` at its start is the home folder, which not every shell says: `--out=~/results`.

    Raises:
        InvalidInput: It is neither text nor a Path, or there is no such home folder.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInput(f"A path must be text or a Path, got {path!r}.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidInput(f"There is no home folder {Path(path).parts[0]} for {path}. Write the folder out.") from error


def atomic_write(path: Path, content: bytes) -> None:
    """Write `path` so that a reader, or a crash, sees the old content or the new, never a part, and the new once this returns.

    Several writers on several machines may write the same path at once: each has a partial file of its own, and the last
    rename wins.

    Raises:
        OSError: The disk is full, read-only, or gone; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a full disk it says what, and not where
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, on systems where a folder can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(path: Path) -> None:
    """See that the file `path`, the --out of a command, could be written now.

    Raises:
        InvalidInput: There is no folder for it, it is no file, or nothing can be written there.
    """
    if not path.parent.is_dir():
        raise InvalidInput(f"There is no folder {path.parent} to write {path.name} into. Make it, or give another --out.")
    if not path.name or (path.exists() and not path.is_file()):  # a device would be replaced, not written to
        raise InvalidInput(f"Cannot write {path}: it is not a file. Give --out a file in a folder that exists.")
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InvalidInput(f"Cannot write {path}: {error.strerror or error}. Give another --out.") from error


def time_of(folder: Path) -> float:
    """The time of the file system of `folder`, which is what the ages of its files are measured by.

    Raises:
        OSError: Nothing can be written there.
    """
    probe = folder / f".now.{secrets.token_hex(4)}.tmp"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def sweep_out(folder: Path) -> None:
    """Remove parts of files in `folder` that writers who were killed left behind, where that can be done."""
    partials = list(folder.glob(".*.tmp"))
    with contextlib.suppress(OSError):
        now = time_of(folder) if partials else 0.0
        for partial in partials:
            with contextlib.suppress(OSError):
                if now - partial.stat().st_mtime > _LITTER:
                    partial.unlink()


@contextlib.contextmanager
def locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[None]:
    """Hold a lock on the file `path`, so that of many processes one goes on and the others wait for it.

    Where the file system has no locks, or the system no fcntl, nothing waits: what is locked must then be merely repeated.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when it is closed, by the end of its process too
        yield
    finally:
        os.close(handle)


def locked_folder(path: Path) -> contextlib.AbstractContextManager[None]:
    """Likewise on a folder, which must exist: FileNotFoundError otherwise."""
    return locked(path, os.O_RDONLY)
