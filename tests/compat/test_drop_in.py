"""Programs that import liger_kernel find this package: installing, imports, versions, the page."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import zoo
from drop_in_checks import patched_classes, rows
from transformers.utils import is_liger_kernel_available

from liger_kernels import compat
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.patching.families import FAMILIES

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter"),
    pytest.mark.skipif(
        "liger_kernel" in sys.modules or importlib.util.find_spec("liger_kernel") is not None,
        reason="the original liger_kernel is installed; the drop-in refuses then",
    ),
]


# Installing -------------------------------------------------------------------------------------


def test_installing_is_undone():
    finders, modules = list(sys.meta_path), set(sys.modules)
    assert not is_liger_kernel_available()
    for _ in range(2):
        compat.install()
        compat.install()
        assert len(sys.meta_path) == len(finders) + 1
        # A check that was made before counts for nothing.
        assert is_liger_kernel_available()
        assert importlib.import_module("liger_kernel").__version__ == compat.INTERFACE_VERSION
        importlib.import_module("liger_kernel.transformers.functional")
        for name in ("liger_kernel", "liger-kernel"):
            assert importlib.metadata.version(name) == compat.INTERFACE_VERSION
        assert importlib.metadata.packages_distributions()["liger_kernel"] == ["liger-kernel"]
        compat.uninstall()
        compat.uninstall()
        assert sys.meta_path == finders
        assert not {name for name in set(sys.modules) - modules if name.startswith("liger_kernel.")}
        assert "liger_kernel" not in sys.modules
        assert not is_liger_kernel_available()
        assert importlib.util.find_spec("liger_kernel") is None
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("liger_kernel")
        assert "liger_kernel" not in importlib.metadata.packages_distributions()


def test_the_version_is_high_enough_and_says_whose_it_is():
    version = pytest.importorskip("packaging.version")
    found = version.parse(compat.INTERFACE_VERSION)
    assert found >= version.parse("0.8.2")
    assert found.local.startswith("liger.kernels")


def test_the_original_is_refused(tmp_path, monkeypatch):
    finders = list(sys.meta_path)
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match=f"installed, at {tmp_path}.*pip uninstall"):
            compat.install()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
        with pytest.raises(ImportError, match="imported, from"):
            compat.install()
    assert sys.meta_path == finders
    importlib.invalidate_caches()


# Types for which LLaMA-Factory and axolotl document the kernels.
LAUNCHER_TYPES = (
    *("gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "glm4v", "gpt_oss", "granite"),
    *("hunyuan_v1_dense", "internvl", "llama", "llama4", "llava", "mistral", "mixtral", "mllama"),
    *("olmo2", "olmo3", "paligemma", "phi3", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3"),
    *("qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "smollm3", "falcon_h1"),
)
# What tools import, as they do it.
SNIPPETS = {
    "readme": "from liger_kernel.transformers import AutoLigerKernelForCausalLM\n"
    "from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss\n"
    "from liger_kernel.transformers import apply_liger_kernel_to_llama",
    "hf": "from liger_kernel.transformers import _apply_liger_kernel_to_instance",
    "axolotl": "from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss\n"
    "from liger_kernel.transformers.functional import liger_cross_entropy\n"
    "from liger_kernel.transformers.fused_linear_cross_entropy import (\n"
    "    LigerFusedLinearCrossEntropyLoss,\n"
    ")\n"
    "from liger_kernel.transformers.geglu import LigerGEGLUMLP\n"
    "from liger_kernel.transformers.layer_norm import LigerLayerNorm\n"
    "from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN\n"
    "from liger_kernel.transformers.rms_norm import LigerRMSNorm\n"
    "from liger_kernel.transformers.rope import liger_rotary_pos_emb\n"
    "from liger_kernel.transformers.swiglu import LigerSwiGLUMLP",
    "llamafactory": "import liger_kernel.transformers as kernels\n"
    + "\n".join(f"kernels.apply_liger_kernel_to_{family}" for family in FAMILIES),
    "llamafactory-types": "\n".join(
        f"from liger_kernel.transformers import apply_liger_kernel_to_{family}"
        for family in LAUNCHER_TYPES
    ),
    "models": "from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss\n"
    "from liger_kernel.transformers import LigerFusedAddRMSNorm\n"
    "from liger_kernel.ops.rms_norm import LigerRMSNormFunction\n"
    "from liger_kernel.ops.swiglu import LigerSiLUMulFunction\n"
    "from liger_kernel.ops.rope import LigerRopeFunction\n"
    "from liger_kernel.ops import LigerGELUMulFunction, LigerLayerNormFunction",
}


@pytest.mark.parametrize("tool", SNIPPETS)
def test_imports_of_tools(tool, alias):
    names: dict[str, Any] = {}
    exec(SNIPPETS[tool], names)
    for name, value in names.items():
        if name.startswith(("Liger", "liger_", "apply_")):
            assert value.__module__.startswith("liger_kernels."), name


def test_what_is_not_there_is_an_import_error(alias):
    with pytest.raises(ImportError, match="apply_liger_kernel_to_no_such_family"):
        exec("from liger_kernel.transformers import apply_liger_kernel_to_no_such_family")
    # Nor are the modules behind the drop-in.
    for name in ("megatron", "ops.finder", "transformers.modules", "transformers.finder"):
        assert importlib.util.find_spec(f"liger_kernel.{name}") is None
    with pytest.raises(ModuleNotFoundError, match="liger_kernel.megatron"):
        importlib.import_module("liger_kernel.megatron")


# Documentation ----------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "count"), [("migrating.md", 6), ("trl.md", 3)])
def test_the_page_runs(page, count, tmp_path, monkeypatch):
    """Every Python block of a page, one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    zoo.build("llama").save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "path": str(tmp_path),
        "model": zoo.build("llama").train(),
        "inputs": zoo.text_inputs(),
        "train_dataset": rows(4),
    }
    assert len(blocks) == count
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    finally:
        compat.uninstall()
    # That of the drop-in ends with the way back.
    assert bool(patched_classes(names["model"])) == (page == "trl.md")
