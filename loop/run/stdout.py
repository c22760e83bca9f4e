"""Standard output that harms nobody: what cannot be written to it is dropped."""

from __future__ import annotations

import io
import sys
from typing import Any


class _Forgiving(io.FileIO):
    """Standard output's file, which takes what it cannot write, because its reader has gone or its disk is full."""

    def write(self, data: Any) -> int:
        """Write the bytes, or drop them."""
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def forgive_stdout() -> None:
    """Let no later print end this program, whatever becomes of standard output, and whatever it can encode."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        file: Any = _Forgiving(1, "w", closefd=False)
        encoding, by_line = sys.stdout.encoding, sys.stdout.line_buffering
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=by_line)
