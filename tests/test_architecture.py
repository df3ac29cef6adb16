"""The direction of imports, and who may know what: the rules of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for package in ("liger_kernels", "liger_cli") for path in (ROOT / package).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


# The packages of each tree from the bottom to the top. A module imports what is below its package,
# and its own package. Modules at the root of a tree stand where their name does.
PROGRAM = ("errors", "common", "config", "data", "training", "report", "commands", "app")
LIBRARY = ("nearest", "ops", "compare", "preferences", "transformers", "compat")
PATCHER = (
    *("wrappers", "attention", "recognise", "replacements", "lazy_logits", "patching"),
    *("logprobs", "divergence", "options", "api", "loading", "class_mode", "hub_layers"),
)
ORDERS = {"liger_cli": PROGRAM, "liger_kernels": LIBRARY, "liger_kernels.transformers": PATCHER}

# A package (prefix) and the foreign packages that it must not import.
FOREIGN = {
    "liger_kernels": ("typer", "click", "rich", "accelerate", "liger_cli"),
    "liger_kernels.ops": ("transformers",),
    "liger_kernels.compare": ("transformers",),
    "liger_kernels.transformers.patching.engine": ("transformers",),
    "liger_cli.common": ("typer", "rich"),
    "liger_cli.config": ("rich",),
    "liger_cli.data": ("typer", "rich"),
    "liger_cli.training": ("typer", "rich"),
    "liger_cli.report": ("typer",),
}


def place(name: str, tree: str) -> int | None:
    """Return how high a module of a tree stands, or None for a module of another tree."""
    if not starts(name, tree) or name == tree:
        return None
    part = name.removeprefix(tree + ".").split(".")[0]
    order = ORDERS[tree]
    assert part in order or part == "__main__", f"{name}: {part} has no place in {order}"
    return order.index(part) if part in order else len(order)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for tree in ORDERS:
        if (own := place(name, tree)) is None:
            continue
        above = [module for module in imports(path) if (place(module, tree) or 0) > own]
        assert not above, f"{name} imports {', '.join(sorted(above))}, against the arrows"
    for prefix, banned in FOREIGN.items():
        if starts(name, prefix):
            found = sorted(module for module in imports(path) if starts(module, *banned))
            assert not found, f"{name} imports {', '.join(found)}"


def modules() -> dict[str, set[str]]:
    """Return what of ours each module imports, by its name; of a package, the modules named."""
    names = {module_name(path): path for path in FILES}

    def imported(path: Path) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= parts & names.keys() or {str(node.module)}
        return found & names.keys()

    return {name: imported(path) - {name} for name, path in names.items()}


def test_no_module_imports_itself_by_way_of_others():
    graph = modules()
    for start in graph:
        seen, rest = set(), list(graph[start])
        while rest:
            name = rest.pop()
            if name not in seen:
                seen.add(name)
                rest += graph[name]
        assert start not in seen, f"{start} is in a cycle of imports"


def test_no_two_packages_import_each_other():
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}

    def package(name: str) -> str:
        return name if name in packages else name.rpartition(".")[0]

    arrows = {
        (package(name), package(other)) for name, found in modules().items() for other in found
    }
    for one, other in sorted(arrows):
        is_inside = starts(one, other) or starts(other, one)
        assert is_inside or (other, one) not in arrows, f"{one} and {other} import each other"


def test_no_command_imports_another():
    def command(name: str) -> str | None:
        parts = name.split(".")
        return parts[2] if parts[:2] == ["liger_cli", "commands"] and len(parts) > 2 else None

    for name, found in modules().items():
        for other in found:
            is_other = command(name) and command(other) and command(name) != command(other)
            assert not is_other, f"{name} imports {other}"


def test_only_transformers_folder_imports_transformers():
    for path in FILES:
        name = module_name(path)
        if starts(name, "liger_kernels") and not starts(name, "liger_kernels.transformers"):
            assert not any(starts(module, "transformers") for module in imports(path)), name


def test_only_families_spells_class_names():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    heads = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    stems = {name.removesuffix("ForCausalLM") for name in heads if name.endswith("ForCausalLM")}
    spelled = {stem + part for stem in stems for part in ("RMSNorm", "MLP", "Attention", "Experts")}
    for path in FILES:
        if path.name == "families.py":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & spelled, f"{path.name} spells {strings & spelled}"


def test_only_measure_reads_memory_statistics():
    readers = (
        "max_memory_allocated",
        "memory_allocated",
        "memory_reserved",
        "memory_info",
        "ru_maxrss",
    )
    for path in FILES:
        if path.name == "measure.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in readers, f"{path}:{node.lineno} reads {node.attr}"


def test_every_command_has_a_folder_and_short_flags():
    from liger_cli.app import COMMANDS

    commands = ROOT / "liger_cli" / "commands"
    folders = {path.name for path in commands.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(COMMANDS)
    for path in commands.rglob("cli.py"):
        assert len(path.read_text().splitlines()) <= 80, f"{path}: move logic out of it"


def test_kernels_read_no_plain_globals():
    """case 28: a module constant inside a kernel is a NameError in Inductor and newer Triton."""
    for path in (ROOT / "liger_kernels" / "ops").rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and "constexpr" not in ast.dump(node.value)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.dump(decorator) for decorator in node.decorator_list
            ):
                used = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
                assert not used & constants, f"{path.name}:{node.name} reads {used & constants}"


@pytest.mark.parametrize(
    ("blocked", "module"),
    [
        ("transformers", "liger_kernels.ops.registry"),
        ("triton", "liger_kernels.ops.registry"),
        ("triton", "liger_kernels.transformers"),
        ("accelerate", "liger_kernels.transformers"),
    ],
)
def test_case_75_106_imports_without(blocked, module):
    """The library imports where a package is missing (case 75: transformers, case 106: triton)."""
    code = f"import sys; sys.modules[{blocked!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
