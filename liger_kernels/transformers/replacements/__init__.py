"""Classes that run ops in place of the forwards of stock modules.

table.py has a row for each form that recognise finds; norms.py, mlps.py, experts.py and
attention.py hold the forwards. subclasses.py makes the classes and swaps them, calls.py decides
whether an op serves a call, and recompute.py saves recipes instead of tensors for backward.
"""
