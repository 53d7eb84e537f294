"""`python -m cbn`: what this build is and what it found, then a self-check; exit status 1 if that fails."""

import sys

from .config import self_check, show_config


def main() -> int:
    """Print the configuration and check every instruction set."""
    show_config()
    print()
    if self_check():
        print("\nAll kernels agree with the reference.")
        return 0
    print("\nA kernel disagrees with the reference: please report this output.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
