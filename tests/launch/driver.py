"""A parent of its own, for tests that kill or interrupt one: python -m tests.launch.driver TARGET FOLDER."""

import sys
from pathlib import Path

from phi4r.parallel.launch import run_ranks

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    try:
        run_ranks(f"tests.launch.targets:{sys.argv[1]}", {"folder": str(folder)}, 2, folder)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
