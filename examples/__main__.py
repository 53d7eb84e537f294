"""All five examples, one after the other; pictures and tables go to examples/out."""

import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`

from examples import binary_logits, digits_mlp, embed, four_steps, report, sequences

ONCE = ("--seeds", "1", "--epochs", "1")
EXAMPLES = {  # with the arguments that make it short
    digits_mlp: ONCE,
    binary_logits: ONCE,
    four_steps: ONCE,
    sequences: (*ONCE, "--batches", "32", "128"),
    embed: ("--seconds", "60", "--repeats", "2"),
}


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch: to see that everything runs")
    args = parser.parse_args(argv)
    start = time.monotonic()
    for i, (example, short) in enumerate(EXAMPLES.items(), 1):
        print(f"[{i}/{len(EXAMPLES)}] {example.__doc__.splitlines()[0]}", file=sys.stderr)
        example.main(["--out", str(args.out), *(short if args.quick else ())])
    print(f"{time.monotonic() - start:.0f} s; everything above is in {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
