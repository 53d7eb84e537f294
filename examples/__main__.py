"""All examples, one after the other; pictures and tables go to examples/out.

The last three need MPI or PyTorch, and are left out where that is not installed.
"""

import importlib.util
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

from examples import (
    adaptation,
    binary_logits,
    digits_mlp,
    embed,
    federated,
    four_steps,
    hosts,
    lengths,
    pipeline,
    producer,
    ranks,
    recalibration,
    report,
    sequences,
    tiny_batches,
    torch_training,
)

ONCE = ("--seeds", "1", "--epochs", "1")
EXAMPLES = {  # with the arguments that make it short
    digits_mlp: ONCE,
    binary_logits: ONCE,
    four_steps: ONCE,
    sequences: (*ONCE, "--batches", "32", "128"),
    lengths: ONCE,
    recalibration: (*ONCE, "--draws", "2"),
    tiny_batches: ONCE,
    adaptation: ONCE,
    producer: ("--rounds", "2"),
    federated: ("--seeds", "1", "--rounds", "2"),
    embed: ("--seconds", "60", "--repeats", "2"),
    hosts: ("--quick",),
}
OPTIONAL = {  # with the package that they need, and how to install it
    ranks: (ONCE, "mpi4py", ranks.NEEDED),
    pipeline: (("--epochs", "1", "--rounds", "1", "--milliseconds", "5"), "torch", pipeline.PEERS),
    torch_training: (("--rounds", "1"), "torch", pipeline.PEERS),
}


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch: to see that everything runs")
    args = parser.parse_args(argv)
    start = time.monotonic()

    def run(example, short, label):
        print(f"[{label}] {example.__doc__.splitlines()[0]}", file=sys.stderr)
        example.main(["--out", str(args.out), *(short if args.quick else ())])

    for i, (example, short) in enumerate(EXAMPLES.items(), 1):
        run(example, short, f"{i}/{len(EXAMPLES)}")
    for example, (short, package, command) in OPTIONAL.items():
        if importlib.util.find_spec(package):
            run(example, short, f"with {package}")
        else:
            print(f"left out: {Path(example.__file__).name}, which needs {package}: {command}", file=sys.stderr)
    print(f"{time.monotonic() - start:.0f} s; everything above is in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(report.run(main))
