"""The rows of a plan or a report for a person: repeated layers folded, as a list or as a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["FoldedRow", "TreeLine", "fold_modules", "module_tree", "others_text", "tree_text"]

# One module with one op: name, class, op, status, backend, reason, source.
Row = Mapping[str, str | None]

_FIELDS = ("class", "op", "status", "backend", "reason", "source")
# A part of a name that is a number; longer ones count no layers.
_NUMBER = re.compile(r"((?:(?<=\.)|^)[0-9]{1,9}(?=\.|$))")
_ROOT = "(model)"
# Of a name with more parts the rest is one: nothing nests its modules as deep.
_MAX_PARTS = 60


@dataclass(frozen=True)
class FoldedRow:
    """Rows that differ only in the layer numbers of their names, as one."""

    name: str
    num_modules: int
    module_class: str
    op: str
    status: str
    backend: str
    reason: str
    source: str


@dataclass(frozen=True)
class TreeLine:
    """A line of a tree: a name, indented and without its parent's, and the row of its module."""

    label: str
    # None where the name only holds others.
    row: FoldedRow | None = None


def fold_modules(rows: Iterable[Row]) -> list[FoldedRow]:
    """Return the rows with repeated layers folded: 'model.layers.0-29.mlp', 30 modules.

    Where two numbers vary, as in layers of experts, each range is given for itself; the count says
    how many modules there are.
    """
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[list[int]]] = {}
    for row in rows:
        # Every second part is a number.
        parts = _NUMBER.split(row["name"] or _ROOT)
        numbers = [int(number) for number in parts[1::2]]
        groups.setdefault((tuple(parts[::2]), _fields(row)), []).append(numbers)
    folded = []
    for (texts, fields), members in groups.items():
        ranges = [_ranges(position) for position in zip(*members, strict=True)]
        name = texts[0] + "".join(map(str.__add__, ranges, texts[1:]))
        folded.append(FoldedRow(name, len(members), *fields))
    return folded


def module_tree(rows: Iterable[Row]) -> list[TreeLine]:
    """Return the rows as a tree by layer, in which layers with equal rows are folded.

    Layers that differ anywhere below are lines of their own: 'layers.0-2,4' and 'layers.3'.
    """
    root = _Node()
    for row in rows:
        node = root
        for part in (row["name"] or "").split(".", _MAX_PARTS) if row["name"] else ():
            node = node.children.setdefault(part, _Node())
        node.rows.append(_fields(row))
    lines = [TreeLine(_ROOT, FoldedRow(_ROOT, 1, *fields)) for fields in root.rows]
    for name, child, count in root.folded():
        lines += child.lines(name, name, count, 0)
    return lines


def tree_text(rows: Iterable[Row]) -> str:
    """Return the tree as plain text in columns: module, count, class, op, status, why."""
    header = ("module", "", "class", "op", "status", "why")
    cells = [header]
    for line in module_tree(rows):
        if (row := line.row) is None:
            cells.append((line.label, "", "", "", "", ""))
        else:
            count = f"x{row.num_modules}" if row.num_modules > 1 else ""
            cells.append((line.label, count, row.module_class, row.op, row.status, row.reason))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(texts)


def others_text(others: Mapping[str, int]) -> str:
    """Return how many modules run the kernels of each other package; "" where none does."""
    counts = (f"{owner} in {n} module{'s' if n > 1 else ''}" for owner, n in others.items())
    return f"kernels of others: {', '.join(counts)}" if others else ""


@dataclass
class _Node:
    """A name with its rows, and the names below it."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def folded(self) -> list[tuple[str, _Node, int]]:
        """Return the children as (name, node, how many are like it), equal layers as one."""
        groups: dict[object, list[str]] = {}
        for name, child in self.children.items():
            key = child.signature() if _is_number(name) else name
            groups.setdefault(key, []).append(name)
        folded = []
        for names in groups.values():
            ranges = _ranges(map(int, names)) if _is_number(names[0]) else names[0]
            folded.append((ranges, self.children[names[0]], len(names)))
        return sorted(folded, key=lambda entry: _first_number(entry[0]))

    def signature(self) -> object:
        """Return a value that is equal for layers that are folded into one line."""
        below = sorted((name, child.signature()) for name, child in self.children.items())
        return (tuple(self.rows), tuple(below))

    def lines(self, label: str, name: str, count: int, depth: int) -> Iterator[TreeLine]:
        """Yield the lines of this name and those below it.

        Args:
            label: The shown part of the name.
            name: The whole of it.
            count: The number of modules that are folded into it.
            depth: The level of indentation.
        """
        below = self.folded()
        # A list of layers says nothing that its layers do not.
        if not self.rows and (len(below) == 1 or all(_is_range(part) for part, _, _ in below)):
            for part, child, more in below:
                yield from child.lines(f"{label}.{part}", f"{name}.{part}", count * more, depth)
            return
        shown = "  " * depth + label
        for fields in self.rows:
            yield TreeLine(shown, FoldedRow(name, count, *fields))
        if not self.rows:
            yield TreeLine(shown)
        for part, child, more in below:
            yield from child.lines(f".{part}", f"{name}.{part}", count * more, depth + 1)


def _fields(row: Row) -> tuple[str, ...]:
    return tuple(row.get(key) or "" for key in _FIELDS)


def _first_number(name: str) -> int:
    """Return the number to sort a name by: its first layer, or -1 to keep the order it came in."""
    return int(name.split("-")[0].split(",")[0]) if _is_range(name) else -1


def _is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None


def _is_range(name: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}([-,][0-9]{1,9})*", name) is not None


def _ranges(numbers: Iterable[int]) -> str:
    """'0-4,6,8-9' for {0, 1, 2, 3, 4, 6, 8, 9}."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
