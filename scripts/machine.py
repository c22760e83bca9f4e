"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from loop.run.folder import installed


def hardware() -> str:
    """Return the cores and the processor in words, such as "2 cores of an AMD EPYC"."""
    model = processor()
    return f"{os.cpu_count()} cores of {'an' if model[0] in 'AEIOU' else 'a'} {model}"


def processor() -> str:
    """Return the processor's name."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed, and Python's."""
    found = {package: installed(package) for package in packages}
    return {**{name: its for name, its in found.items() if its}, "python": platform.python_version()}
