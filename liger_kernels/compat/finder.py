"""Makes `import liger_kernel` resolve to liger_kernels.compat, and takes it back."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import liger_kernels

if TYPE_CHECKING:
    from liger_kernels.compat.patching import Patching

_NAME = "liger_kernel"
_DISTRIBUTION = "liger-kernel"
# What callers compare: transformers asks for 0.3.0, TRL for 0.8.2. The rest says who answers.
INTERFACE_VERSION = f"0.8.2+liger.kernels.{liger_kernels.__version__}"

# The submodules of liger_kernel that documentation and tools name, and their contents; functional
# has all functional forms, monkey_patch the patching functions, ops its functions.
_HOMES: dict[str, tuple[str, ...]] = {
    "chunked_loss": (
        *("LigerFusedLinearCPOLoss", "LigerFusedLinearDPOLoss", "LigerFusedLinearGRPOLoss"),
        *("LigerFusedLinearJSDLoss", "LigerFusedLinearKTOLoss", "LigerFusedLinearORPOLoss"),
        "LigerFusedLinearSimPOLoss",
    ),
    "ops": (),
    "ops.backends": (),
    "ops.backends.registry": ("IMPL_REGISTRY",),
    "ops.cross_entropy": ("LigerCrossEntropyFunction",),
    "ops.fused_add_rms_norm": ("LigerFusedAddRMSNormFunction",),
    "ops.fused_linear_cross_entropy": ("LigerFusedLinearCrossEntropyFunction",),
    "ops.geglu": ("LigerGELUMulFunction",),
    "ops.grpo_loss": ("fused_selective_log_softmax",),
    "ops.layer_norm": ("LigerLayerNormFunction",),
    "ops.rms_norm": ("LigerRMSNormFunction",),
    "ops.rope": ("LigerRopeFunction",),
    "ops.swiglu": ("LigerSiLUMulFunction",),
    "ops.utils": (
        *("calculate_settings", "compare_version"),
        *("ensure_contiguous", "torch_to_triton_dtype"),
    ),
    "transformers": (),
    "transformers.cross_entropy": ("CrossEntropyOutput", "LigerCrossEntropyLoss"),
    "transformers.functional": (),
    "transformers.fused_add_rms_norm": ("LigerFusedAddRMSNorm",),
    "transformers.fused_linear_cross_entropy": (
        "CrossEntropyOutput",
        "LigerFusedLinearCrossEntropyLoss",
    ),
    "transformers.geglu": ("LigerGEGLUMLP",),
    "transformers.grpo_loss": ("fused_selective_log_softmax",),
    "transformers.layer_norm": ("LigerLayerNorm",),
    "transformers.model": (),
    "transformers.model.loss_utils": ("LigerForCausalLMLoss",),
    "transformers.monkey_patch": (),
    "transformers.rms_norm": (
        *("LigerRMSNorm", "LigerRMSNormForGemma", "LigerRMSNormForGemma2"),
        *("LigerRMSNormForGemma3", "LigerRMSNormForGemma4", "LigerRMSNormForGlm4"),
        *("LigerRMSNormForOlmo2", "LigerRMSNormForQwen3Next"),
    ),
    "transformers.rope": ("liger_rotary_pos_emb",),
    "transformers.swiglu": (
        *("LigerBlockSparseTop2MLP", "LigerPhi3SwiGLUMLP", "LigerQwen3MoeSwiGLUMLP"),
        "LigerSwiGLUMLP",
    ),
    "transformers.trainer": (),
    "transformers.trainer.orpo_trainer": ("_FSDPForwardRedirection",),
    "utils": ("PEFT_AVAILABLE", "is_npu_available"),
}
# Names of these modules that have no place here, and what does their work.
_ELSEWHERE = {
    "LigerFusedLinearCosineSimilarityLoss": "no op computes the cosine of two sides' logits; "
    "LigerFusedLinearJSDLoss, ops.fused_linear_divergence and `liger train --objective distill` "
    "learn from a teacher's distribution",
    "triton_grpo_loss": "it takes whole logits; LigerFusedLinearGRPOLoss takes hidden states, and "
    "TRL's GRPOTrainer trains on a patched model",
}
_PACKAGES = (
    _NAME,
    *(f"{_NAME}.{name}" for name in _HOMES if any(k.startswith(f"{name}.") for k in _HOMES)),
)
_MODULES = (_NAME, *(f"{_NAME}.{name}" for name in _HOMES))


def install() -> None:
    """Make `import liger_kernel` resolve to this package until uninstall(); twice is once.

    Raises:
        ImportError: The original liger_kernel is installed or has been imported.
    """
    if _installed() is not None:
        return
    _refuse_original()
    sys.meta_path.append(AliasFinder())
    _tell_transformers(True)


def uninstall() -> None:
    """Undo install(): liger_kernel is not found any more, and no class mode is left on.

    Models that were patched stay so until liger_kernels.transformers.restore(model).
    """
    finder = _installed()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name in _MODULES:
        sys.modules.pop(name, None)
    if finder.patching is not None:
        finder.patching.undo()
    _tell_transformers(False)


def _installed() -> AliasFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, AliasFinder)), None)


def _find_name(module: str, name: str) -> Any:
    """Import a submodule that is read as an attribute, or say what does the work of a name.

    Raises:
        AttributeError: There is no such name.
        ImportError: The work of the name is done elsewhere.
    """
    if f"{module}.{name}" in _MODULES:
        return importlib.import_module(f"{module}.{name}")
    if name in _ELSEWHERE:
        raise ImportError(f"{name} is not in the drop-in: {_ELSEWHERE[name]}", name=module)
    raise AttributeError(f"{module} of the drop-in has no {name!r}", name=name)


def _refuse_original() -> None:
    where: Any = None
    if _NAME in sys.modules:
        where = f"imported, from {getattr(sys.modules[_NAME], '__file__', None)}"
    elif (spec := importlib.util.find_spec(_NAME)) is not None:
        where = f"installed, at {spec.origin or list(spec.submodule_search_locations or ())}"
    if where is not None:
        raise ImportError(
            f"liger_kernels.compat.install() stands in for {_NAME}, which is {where}: uninstall it "
            f"(pip uninstall {_DISTRIBUTION}), or use liger_kernels under its own name",
            name=_NAME,
        )


def _tell_transformers(is_there: bool) -> None:
    """Correct the cached answer of transformers: 5 keeps a cache, 4 a flag."""
    checks: Any = sys.modules.get("transformers.utils.import_utils")
    if checks is None:
        return
    if hasattr(checks.is_liger_kernel_available, "cache_clear"):
        checks.is_liger_kernel_available.cache_clear()
    if hasattr(checks, "_liger_kernel_available"):
        checks._liger_kernel_available = is_there


class AliasFinder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """Finds liger_kernel, its submodules and its version; loads each module with our names.

    It stands last in sys.meta_path and holds what an installation has of state.
    """

    def __init__(self) -> None:
        self.patching: Patching | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of the drop-in."""
        if fullname not in _MODULES:
            return None
        spec = ModuleSpec(fullname, self, origin=__file__, is_package=fullname in _PACKAGES)
        # With a file: a package without one passes for a folder that happens to have the name.
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to Python to make the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put our names into a module."""
        vars(module)["__getattr__"] = functools.partial(_find_name, module.__name__)
        if module.__name__ == _NAME:
            vars(module)["__version__"] = INTERFACE_VERSION
            return
        names = self._names(module.__name__.removeprefix(f"{_NAME}."))
        vars(module).update(names, __all__=sorted(names))

    def _names(self, home: str) -> dict[str, Any]:
        from liger_kernels.compat import families, functional, functions, losses, modules, utils
        from liger_kernels.compat.chunked_loss import distillation, pairs, policy, unpaired
        from liger_kernels.compat.loss_results import CrossEntropyOutput
        from liger_kernels.compat.patching import Patching

        self.patching = self.patching or Patching()
        of_ops = _public(functions)
        names = {
            "CrossEntropyOutput": CrossEntropyOutput,
            "liger_rotary_pos_emb": functional.liger_rope,
            **_public(modules),
            **_public(families),
            **self.patching.names,
        }
        whole = {
            "ops": of_ops,
            "transformers": names,
            "transformers.functional": {
                "CrossEntropyOutput": CrossEntropyOutput,
                **_public(functional),
                **_public(losses),
            },
            "transformers.monkey_patch": self.patching.names,
        }
        if home in whole:
            return whole[home]
        chunked = [_public(each) for each in (pairs, unpaired, policy, distillation)]
        names |= {
            **of_ops,
            **_public(utils),
            **{name: value for part in chunked for name, value in part.items()},
            # One implementation, so there is none to choose.
            "IMPL_REGISTRY": {},
            "LigerForCausalLMLoss": functions.LigerForCausalLMLoss,
            "_FSDPForwardRedirection": utils.FSDPForwardRedirection,
        }
        if "torch_to_triton_dtype" in _HOMES[home]:
            names["torch_to_triton_dtype"] = utils.torch_to_triton_dtype()
        return {name: names[name] for name in _HOMES[home]}

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the distribution whose version callers compare."""
        name = None if context is None else context.name
        # Asked for no name, all distributions are wanted.
        if name is None or name.lower().replace("_", "-") == _DISTRIBUTION:
            return [_AliasDistribution()]
        return []


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


class _AliasDistribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": (
                f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {INTERFACE_VERSION}\n"
                "Summary: Stand-in by liger-kernels\n"
            ),
            "top_level.txt": f"{_NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path
