"""The command `metatutor`: whatever goes wrong ends it with one line and a status. `commands.py` has its commands."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from typing import Any

from metatutor.allocator import let_threads_sleep
from metatutor.files import one_line

LONGEST = 4096  # characters of an argument that makes sense
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells have them: 128 and the number of the signal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake ends it with one line and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files and classes that the terminal cannot show
    try:
        try:
            _run(given)
        finally:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
    except BrokenPipeError:
        _end(BROKEN_PIPE)
    except KeyboardInterrupt as interrupt:
        _end(INTERRUPTED, str(interrupt) or "interrupted")
    except OSError as error:
        _end(2, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:  # those of PyTorch are RuntimeErrors
        _end(2, str(error).partition("\n")[0] or type(error).__name__)


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        from metatutor import __version__

        print(f"metatutor {__version__}")
        return
    longest = max(map(len, arguments), default=0)
    if longest > LONGEST:
        raise ValueError(f"an argument has {longest:,} characters; none that makes sense has more than {LONGEST:,}")
    let_threads_sleep()
    commands, box = _commands(), io.StringIO()
    import tyro

    try:
        with redirect_stderr(box):
            config = (tyro.conf.CascadeSubcommandArgs,)
            asked = commands.app.cli(prog="metatutor", description=commands.__doc__, config=config, args=arguments)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_line(box.getvalue())) from None
    asked()


def _line(box: str) -> str:
    """What is wrong, from tyro's box around it, what may have been meant, and where to read more."""
    rows = "\n".join(row.strip("│ ") for row in box.splitlines()[1:])
    parts = [" ".join(part.split()) for part in re.split(r"(?m)^[─╰╯-]*$", rows)]  # between rules
    message = re.sub(r"^Error parsing __tyro\S+: ", "", next(filter(None, parts), "not understood"))
    meant = re.search(r"Perhaps you meant: (--\S+)", " ".join(parts))
    help_ = re.search(r"metatutor[\w :.-]* --help$", " ".join(parts).rstrip())
    hint = f"; did you mean {meant.group(1)}?" if meant else f"; see {help_.group() if help_ else 'metatutor --help'}"
    return message + hint


def _commands() -> Any:
    """The module of commands; Ctrl-C during the seconds that importing PyTorch takes ends the process at once."""

    def leave(*_: Any) -> None:
        os.write(2, b"metatutor: interrupted\n")
        os._exit(INTERRUPTED)  # half a module helps nobody

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    before = signal.signal(signal.SIGINT, leave) if in_main else None
    try:
        from metatutor import commands
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
    return commands


def _end(status: int, message: str = "") -> None:
    """Exit with a status, after one line if there is something to say."""
    try:
        sys.stdout.flush()
    except OSError:  # nobody is reading, or the disk is full: the rest must not be tried again at exit
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        with suppress(OSError):
            print(f"metatutor: {one_line(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(status)
