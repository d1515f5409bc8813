"""One writer for a file at a time: a lock that names its owner, and that a dead process cannot keep.

The lock is ``flock`` on ``.NAME.lock`` beside the file; the kernel releases it when its process ends, however it ends.
Its content, the owner's pid and host, is only for the message. Files themselves are replaced atomically
(``_document.save``), so the lock keeps two long runs from working for the same path, and no reader needs it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BusyError, DocumentError

NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""A file system without locks: the replacement of the file is still atomic."""
LOST_RACES = 1000
"""Whoever loses this often does not race: some folders, such as those in ``/proc``, answer "not found" to ``mkdir``."""


@contextmanager
def only_writer(path: str | Path) -> Iterator[None]:
    """Be the only process that writes ``path`` while the block runs; leave no lock file and no empty folder behind.

    Raises:
        BusyError: another process is writing it; the message names its pid.
        DocumentError: the folder cannot be written.
    """
    path = Path(path).absolute()
    lock = path.with_name(f".{path.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        handle = _held(lock, path)
    except BusyError:
        raise
    except OSError as error:
        raise DocumentError(
            f"cannot write there: {error.strerror or error}", where=str(path), action="choose another path"
        ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is released: whoever waits for this file notices that it has gone
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty: it holds the result
            for folder in made:
                folder.rmdir()


def _held(lock: Path, path: Path) -> int:
    """The open lock file, locked. Tries again when its owner before took the file, or its empty folder, away."""
    for losses_left in reversed(range(LOST_RACES)):
        try:
            handle = _opened(lock)
        except (FileNotFoundError, FileExistsError):
            if not losses_left or (os.path.lexists(path.parent) and not path.parent.is_dir()):
                raise  # no race: nothing can be made there, or a file stands where the folder should be
            continue
        try:
            if _take(handle, path) and _is_at(handle, lock):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise BusyError(
        f"other processes took the lock {LOST_RACES} times in a row",
        expected="one writer at a time",
        where=str(path),
        action="wait for them, end them, or choose another --out",
    )


def _opened(lock: Path) -> int:
    """The lock file, open, its folder made; whoever made that folder takes it away when it is empty."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _take(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS_HERE:
            return True
        if not isinstance(error, BlockingIOError):
            raise
        pid, _, host = os.pread(handle, 200, 0).decode(errors="replace").strip().partition(" ")
        raise BusyError(
            f"another process is writing it: pid {pid or '?'}{f' on {host}' if host else ''}",
            expected="one writer at a time",
            where=str(path),
            action="wait for it, end it, or choose another --out",
        ) from None
    return True


def _is_at(handle: int, lock: Path) -> bool:
    """Whether the file that was locked is still the one at the path (its owner before takes it away)."""
    try:
        return os.path.samestat(os.fstat(handle), lock.lstat())
    except FileNotFoundError:
        return False
