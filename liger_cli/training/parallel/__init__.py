"""Sharded training on several processes: layout, groups, wrapping, loading and collectives.

`mesh.py` decides the layout, `loading.py` loads a model in it, `engine.py` is what a session asks.
"""
