"""`python -m cbn` prints the configuration, then runs a self-check. The exit status is 1 if the check fails."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .config import __version__, self_check, show_config, unchecked


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the configuration and check every instruction set."""
    parser = argparse.ArgumentParser(
        prog="python -m cbn",
        description="Print what this build of cbn is and what it found, then compare its kernels with the reference.",
        epilog="The exit status is 1 if a kernel disagrees.",
    )
    parser.add_argument("--version", action="version", version=f"cbn {__version__}")
    parser.parse_args(arguments)
    show_config()
    print()
    good = self_check()
    left_out = unchecked()
    for line in left_out:
        print(f"not checked: {line}")
    if not good:
        print("\nA kernel disagrees with the reference: please report this output.", file=sys.stderr)
        return 1
    which = "All kernels that were checked" if left_out else "All kernels"
    print(f"\n{which} agree with the reference.")
    return 0


def run(command: Callable[[], int | None]) -> int:
    """Run a command line and return its exit status. A reader that closes the pipe, as `head` does, is no error.

    The status is then the one of a program ended by SIGPIPE.
    """
    try:
        try:
            return command() or 0
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + 13


if __name__ == "__main__":
    sys.exit(run(main))
