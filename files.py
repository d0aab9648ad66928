"""Files that are there wholly or not at all."""

import contextlib
import errno
import os
from pathlib import Path


def write_file(path, data):
    """Write bytes so that the file is either the old one or wholly the new one, never half of it.
    Raises OSError, also for a device or a pipe, which would become a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EEXIST, "neither a file nor a new name", str(path))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):      # nothing is there, or nothing can be taken away
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)          # a full disk does not say whose file it was
        raise
    if os.name == "posix":              # the new name, too, has to reach the disk
        with contextlib.suppress(OSError):                      # some file systems cannot do this
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
