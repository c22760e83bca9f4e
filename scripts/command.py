"""What every command has in common: flags read by tyro from a dataclass, and errors that end in one line."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, Protocol, cast, get_type_hints

import tyro

from loop.config import InputError
from loop.run.launch import launched_rank


class Main(Protocol):
    """A command: takes its command line, by default the process's, and returns the exit code."""

    def __call__(self, args: Sequence[str] | None = None) -> int:
        """Run it."""


def command(run: Callable[..., int | None]) -> Main:
    """Return the command whose flags are the fields of `run`'s argument, a dataclass; their docstrings are the help.

    A second argument of `run` takes the flags that are not known. The usage is the docstring of `run`'s module. An
    InputError ends the command with its text, from one rank, and exit code 2; Ctrl-C with 130.
    """
    takes_others = len(signature(run).parameters) > 1

    @functools.wraps(run)
    def main(args: Sequence[str] | None = None) -> int:
        module = sys.modules[run.__module__]
        name = str(module.__spec__.name if module.__spec__ else module.__name__).removesuffix(".__main__")
        reports_errors, read = launched_rank() == 0, cast(Any, tyro.cli)
        try:
            flags = read(
                get_type_hints(run)["flags"],
                prog=f"python -m {name}",
                description=module.__doc__,
                args=args,
                console_outputs=reports_errors,
                return_unknown_args=takes_others,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            return (run(*flags) if takes_others else run(flags)) or 0
        except InputError as error:
            if reports_errors:
                print(f"{name}: error: {error}", file=sys.stderr)
            else:
                time.sleep(1)  # a launcher ends the other ranks as soon as one has failed
            return 2
        except KeyboardInterrupt:
            return 130

    return main
