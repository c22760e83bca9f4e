"""Standard output and standard error that never raise: what cannot be written to them is dropped."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any


class _Forgiving(io.FileIO):
    """A stream's file, which takes what it cannot write, because its reader has gone or its disk is full."""

    def write(self, data: Any) -> int:
        """Write the bytes, or drop them."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def forgive_streams() -> None:
    """Make prints safe: neither a closed stream, nor a full disk, nor an encoding ends the program."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began, and not to be taken by a file that it opens
            setattr(sys, name, Path(os.devnull).open("w"))
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            file: Any = _Forgiving(descriptor, "w", closefd=False)
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(file), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, wrapped)
