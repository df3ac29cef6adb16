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


# A module (prefix) and what it must not import. Read as: arrows point down only.
FORBIDDEN = {
    "liger_kernels": ("typer", "click", "rich", "accelerate", "liger_cli"),
    "liger_kernels.ops": ("transformers", "liger_kernels.transformers", "liger_kernels.compare"),
    "liger_kernels.compare": ("transformers", "liger_kernels.transformers"),
    "liger_kernels.transformers.engine": ("transformers",),
    "liger_kernels.transformers.recognise": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.families": (
        "liger_kernels.transformers.replace",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.calls": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.recompute": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.replace": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.residual": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.rotary": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.swap": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.repair": (
        "liger_kernels.transformers.families",
        "liger_kernels.transformers.plan",
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    "liger_kernels.transformers.plan": (
        "liger_kernels.transformers.engine",
        "liger_kernels.transformers.api",
    ),
    **dict.fromkeys(
        (
            "liger_kernels.transformers.selection",
            "liger_kernels.transformers.survey",
            "liger_kernels.transformers.origin",
            "liger_kernels.transformers.fold",
            "liger_kernels.transformers.trials",
            "liger_kernels.transformers.head_patch",
        ),
        ("liger_kernels.transformers.engine", "liger_kernels.transformers.api"),
    ),
    "liger_cli.training": (
        "liger_cli.commands",
        "liger_cli.report",
        "liger_cli.bench",
        "liger_cli.app",
        "typer",
    ),
    "liger_cli.data": (
        "liger_cli.training",
        "liger_cli.commands",
        "liger_cli.report",
        "liger_cli.bench",
        "liger_cli.app",
        "typer",
    ),
    "liger_cli.report": ("liger_cli.commands", "liger_cli.training", "liger_cli.app", "typer"),
    "liger_cli.config": ("liger_cli.commands", "liger_cli.training", "liger_cli.report"),
}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for prefix, banned in FORBIDDEN.items():
        if starts(name, prefix):
            back = sorted(module for module in imports(path) if starts(module, *banned))
            assert not back, f"{name} imports {', '.join(back)}, against the arrows"


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


def test_commands_are_short():
    for path in (ROOT / "liger_cli" / "commands").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, f"{path.name}: move logic out of it"


def test_kernels_read_no_plain_globals():
    """case 28: a module constant inside a kernel is a NameError in Inductor and newer Triton."""
    for path in (ROOT / "liger_kernels" / "ops").glob("*.py"):
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
