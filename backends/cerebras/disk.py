"""A file for HDF5 to write that never fails it.

HDF5 keeps what it could not write and tries again whenever it closes something, at the latest in its exit handler: on
a full disk each try is an error that nobody catches, and the process ends with a segmentation fault. So a write that
fails is kept here as the error that it was, and HDF5 is told that it was done. The error is raised by
`expect_written`, and at the latest when the `with` block ends; what lies on the disk by then is to be thrown away.
"""

from __future__ import annotations

import io
from pathlib import Path


class Disk(io.RawIOBase):
    """The file at `path`, made anew; for h5py.File's `fileobj` driver."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb+", buffering=0)
        self._error: OSError | None = None

    def expect_written(self) -> None:
        """Raise the OSError that the first failed write was."""
        if self._error is not None:
            raise self._error

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self.close()
        if kind is None:
            self.expect_written()

    def write(self, data) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        return size

    def readinto(self, buffer) -> int:
        got = 0 if self._error else self._file.readinto(buffer)
        if self._error:  # what HDF5 believes to have written
            buffer[:] = bytes(len(buffer))
        return len(buffer) if self._error else got

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
