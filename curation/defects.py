"""Known defects of inputs, and the reject rows they become."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from curation.inputs import uris
from schemas.errors import VideoDecodeError
from schemas.rows import Reject

TRANSIENT = frozenset({"fetch_timeout", "unreachable", "server_error", "io_error"})
"""Reasons that say nothing about the file itself: it counts as failed and is tried again."""

_ERRNO_REASONS = {
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.ELOOP: "symlink_loop",
    errno.EISDIR: "not_a_file",
}


def os_reject(error: OSError, stage: str, uri: str) -> Reject:
    """The reject row of a file or folder that the system does not give us."""
    reason = _ERRNO_REASONS.get(error.errno or 0, "io_error")
    detail = error.strerror or type(error).__name__
    return Reject(uri, stage, reason, detail, uri, failed=reason in TRANSIENT)


def defect(error: VideoDecodeError, record_id: str, stage: str, uri: str) -> Reject:
    """The reject row of a known defect of an input."""
    detail = error.what if error.found is None else f"{error.what}: {error.found}"
    return Reject(
        record_id,
        stage,
        error.reason,
        uris.printable(detail),
        uri,
        failed=error.reason in TRANSIENT,
    )


def open_plain(path: Path) -> None:
    """Check that a path is a regular file we may read; a pipe would block whoever opens it.

    Raises:
        OSError: It is not there, not readable, or no regular file (``EISDIR``).
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise IsADirectoryError(errno.EISDIR, "not a regular file")
    with path.open("rb"):
        pass
