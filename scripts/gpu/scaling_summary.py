"""Put the files of scripts/gpu/scaling.sh beside the estimates: a table, and scaling.json.

python scripts/gpu/scaling_summary.py DIR
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Return a row for each measured number of processes, with what the estimate says of it."""
    rows = []
    for path in sorted(directory.glob("bench-*-*.json")):
        match = re.fullmatch(r"bench-(.+)-(patched|eager)", path.stem)
        if match is None:
            continue
        name, side = match.groups()
        for found in read(path)["rows"]:
            row = {"row": name, "side": side, **found}
            estimate = read(directory / f"estimate-{name}-{found['nproc']}.json")
            if estimate and side == "patched":
                row["estimated_peak"] = estimate["peak"]
                sizes = estimate["ranks"] or {}
                for time in estimate["times"]:
                    if time["dp_shard_size"] == sizes.get("dp_shard_size"):
                        row["estimated_efficiency"] = time["efficiency"]
            rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    exposed = "" if row["exposed"] is None else f", exposed {row['exposed']:.1%}"
    text = f"{row['row']} {row['side']} on {row['nproc']}: {row['tokens_per_s']:.0f} tokens/s, "
    text += f"efficiency {row['efficiency']:.3f}{exposed}"
    if "estimated_efficiency" in row:
        text += f" (estimate {row['estimated_efficiency']:.3f})"
    peak = row["peak_memory_bytes"]
    text += f", {peak / 1e9:.1f} GB"
    if row.get("estimated_peak") and peak:
        text += f" (estimate {row['estimated_peak'] / peak - 1:+.1%})"
    return text


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    parts = {name: read(folder / f"{name}.json") for name in ("saves", "resume", "kill")}
    report = {"rows": rows_of(folder), **parts}
    (folder / "scaling.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in map(show, report["rows"]):
        print(line)
    for part, values in parts.items():
        print(f"{part}: {json.dumps(values)}")
