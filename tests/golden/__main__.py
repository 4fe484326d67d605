"""Golden values of other commits.

python -m tests.golden --against COMMIT             run this tree and COMMIT here, compare bit for bit
python -m tests.golden --against COMMIT --layouts one,tp2 --cases sft,grpo
python -m tests.golden --write COMMIT               rewrite tests/golden/values with what COMMIT computes
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.trees import checkout
from tests.golden import compare, runner


def main() -> int:
    """Exit code 1 where a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="COMMIT")
    what.add_argument("--write", metavar="COMMIT")
    parser.add_argument("--layouts", default=",".join(runner.LAYOUTS))
    parser.add_argument("--cases", default=",".join(runner.CASES))
    arguments = parser.parse_args()
    cases, num_different = tuple(arguments.cases.split(",")), 0
    with checkout(arguments.against or arguments.write) as tree:
        for layout in arguments.layouts.split(","):
            expected = runner.run(tree, layout, cases)
            if arguments.write:
                print(f"{layout}: {compare.write(layout, arguments.write, expected)}", flush=True)
                continue
            found = runner.run(runner.TREE, layout, cases)
            different = compare.differences(expected, found, exact=True)
            num_values = sum(len(row) for rows in expected.values() for row in rows)
            num_different += len(different)
            print(
                f"{layout}: {num_values} values, {len(different)} differ", *different, sep="\n  ", flush=True
            )
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
