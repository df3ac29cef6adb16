"""Decide which modules run an op, swap their classes, and undo it.

From apply_liger_kernel(model) to the record, in order:

1. selection.py: resolve_ops turns ops="auto,-rope" into an OpSelection.
2. candidates.py: find_candidates walks the modules. recognise probes the form of each class,
   families.py holds the form that is expected of a listed model type, third_party.py finds kernels
   of other packages.
3. plan.py: build_plan makes a Patch or a Skip with its reason of each candidate. For "auto",
   self_check.py first tries the op on the model's device, in the form that the module has.
4. engine.py: apply swaps the class of each module for the one that replacements/table.py gives
   (lazy_logits/head.py for the head) and returns the PatchRecord: coverage, count_calls(), undo().

render.py shows the rows of a plan to a person. upstream_fixes.py mends classes that a release of
transformers broke; loaders call it before anything is patched.
"""
