"""Write docs/models.md: the model types with a row in FAMILIES, their options and their classes.

python scripts/models_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from liger_kernels.transformers.patching.families import FAMILIES, Family

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

_HEAD = """# Model types

Made from `liger_kernels/transformers/patching/families.py` by `python scripts/models_page.py`; do
not edit.

Each type below has a function `apply_liger_kernel_to_<type>(*, <options>, model=None)`: with a
model it patches that instance, without one the models of the type that are built from then on.
Every option is on unless it says off. A type that is not listed is recognised by what its modules
compute; see [coverage.md](coverage.md).

| type | options | norms | gated MLPs and experts | attention with rotary positions |
|---|---|---|---|---|
"""


def _row(family: Family) -> str:
    options = (name if is_on else f"{name} (off)" for name, is_on in family.options.items())
    columns = (options, family.norms, family.gates, family.ropes)
    return f"| {family.model_type} | {' | '.join(', '.join(column) for column in columns)} |\n"


def page() -> str:
    """Return the text of docs/models.md."""
    return _HEAD + "".join(map(_row, FAMILIES.values()))


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
