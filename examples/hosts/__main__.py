"""`python -m examples.hosts`: the table of `examples.hosts`."""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find `examples` and `cbn`

from examples import hosts, report

if __name__ == "__main__":
    sys.exit(report.run(hosts.main))
