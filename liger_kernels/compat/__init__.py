"""A drop-in for programs that ask for liger_kernel: opt-in, for one process, with a way back.

After install() `import liger_kernel` and the submodules of its public documentation resolve to this
package, and so do the checks that other packages make first (importlib.util.find_spec and the
version in importlib.metadata). So Trainer(use_liger_kernel=True), TRL and programs that import
apply_liger_kernel_to_* run on these kernels. The names come from public documentation alone; a name
that is not here is an ImportError, and an argument that no op has is an error that names it.

Importing this is free; torch and transformers are imported when liger_kernel is.
"""

from __future__ import annotations

from liger_kernels.compat.finder import INTERFACE_VERSION, install, uninstall

__all__ = ["INTERFACE_VERSION", "install", "uninstall"]
