"""Exit 7, saying so, unless the run of a report.json ended with a lower loss than it began with.

python scripts/check_loss_falls.py runs/demo/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    train = json.loads(Path(sys.argv[1]).read_text())["train"]
    first, final = train["first_loss"], train["final_loss"]
    if final < first:
        return 0
    print(f"the loss did not fall: {first:.3f} -> {final:.3f} in {train['steps']} steps")
    return 7


if __name__ == "__main__":
    sys.exit(main())
