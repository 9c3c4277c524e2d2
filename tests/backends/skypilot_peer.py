"""SkyPilot's own parser applied to the output of --backend=skypilot.

btx submit --backend=skypilot ... --dry-run --out=DIR python tests/backends/skypilot_peer.py DIR
# in an environment with skypilot==0.14.1
"""

import sys
from pathlib import Path

import sky


def main(folder: Path) -> None:
    files = sorted(folder.glob("*.yaml"))
    assert files, f"no task files in {folder}"
    for file in files:
        task = sky.Task.from_yaml(str(file))
        print(file.name, task.name, next(iter(task.resources)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
