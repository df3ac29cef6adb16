"""Residual sums with the norm that follows, in the source of a layer's forward.

A decoder layer adds to its residual stream and then normalises the sum:

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

`fuse` compiles the same source with two of these statements changed, whatever the names are:

    _normed_0, hidden_states = _add_and_norm(self, residual, hidden_states, self.post_...norm)
    residual = hidden_states
    hidden_states = _normed_0

All else stays and runs in its order, at the lines it has in its file.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple


class Form(NamedTuple):
    """What a forward does with its residual stream and with the children it calls."""

    # Attributes that are called on a sum right after it, in the order of the source.
    after_sums: tuple[str, ...] = ()
    # Attributes that are called anywhere.
    called: frozenset[str] = frozenset()
    # Whether an input, or a tensor kept under another name, is added to a later one.
    has_residual: bool = False


@functools.cache
def read_form(forward: Callable[..., Any]) -> Form:
    """Return the form of a forward, beneath its decorators; an empty one if it has no source."""
    function = inspect.unwrap(forward)
    if not inspect.isfunction(forward) or not inspect.isfunction(function):
        return Form()
    source = _read(function)
    if source is None:
        return Form()
    definition = source.definition
    after_sums = dict.fromkeys(place.norm for place in _places(definition))
    calls = (node for node in ast.walk(definition) if isinstance(node, ast.Call))
    called = frozenset(name for call in calls if (name := _method(call, _self_of(definition))))
    return Form(tuple(after_sums), called, _has_residual(definition))


def fuse(
    function: types.FunctionType, norms: Collection[str], add_and_norm: Callable[..., Any]
) -> types.FunctionType:
    """Return a copy of a forward that calls add_and_norm wherever one of these norms has its place.

    Args:
        function: A forward without decorators, whose `read_form` names the norms.
        norms: Attributes of the layer.
        add_and_norm: Called as (layer, left, right, norm); returns (norm(left + right), the sum).
    """
    source = _read(function)
    assert source is not None
    places = [place for place in _places(source.definition) if place.norm in norms]
    for index, place in enumerate(places):
        _rewrite(place, _self_of(source.definition), f"_normed_{index}")
    code = _compile(source, function, _FUNCTION)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    # Free, not global: the globals stay those of the forward's module.
    cells[_FUNCTION] = types.CellType(add_and_norm)
    fused = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    fused.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(fused, function)
    # update_wrapper points it at the function that is replaced.
    del fused.__dict__["__wrapped__"]
    return fused


_FUNCTION = "_add_and_norm"


# From source to code ----------------------------------------------------------------------------


class _Source(NamedTuple):
    """A forward as a tree of its own, with the lines and columns of its file."""

    definition: ast.FunctionDef
    # Those of its module, by which the compiler chooses between two ways of calling a.b().
    imports: list[ast.stmt]


def _read(function: types.FunctionType) -> _Source | None:
    """Return a function's source; None where there is none, or where it is not what runs."""
    code = function.__code__
    tree = _parse("".join(linecache.getlines(code.co_filename, function.__globals__)))
    if tree is None:
        return None
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first, *_ = (*node.decorator_list, node)
            if first.lineno == code.co_firstlineno:
                source = _Source(_bare(copy.deepcopy(node)), [*imports])
                return source if _is_running(function, source) else None
    return None


@functools.lru_cache(maxsize=1)
def _parse(text: str) -> ast.Module | None:
    """Return the tree of a file, which may hold several layers; nobody changes it."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _bare(definition: ast.FunctionDef) -> ast.FunctionDef:
    """Leave out what a function object has besides its code."""
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return definition


def _compile(source: _Source, function: types.FunctionType, *names: str) -> types.CodeType:
    """Return a source's code in the place of function's own, where also `names` are free."""
    code = function.__code__
    # A class around it, for names with two underscores and for super().
    class_name = (["_", *function.__qualname__.split(".")])[-2].strip("<>")
    free = ", ".join((*code.co_freevars, *names))
    (outside,) = ast.parse(f"def around({free}):\n  class {class_name}: pass").body
    assert isinstance(outside, ast.FunctionDef)
    (inside,) = outside.body
    assert isinstance(inside, ast.ClassDef)
    inside.body = [source.definition]
    module = ast.fix_missing_locations(ast.Module([*source.imports, outside], []))
    compiled = compile(module, code.co_filename, "exec", dont_inherit=True)
    for _ in (outside, inside, source.definition):
        compiled = next(c for c in compiled.co_consts if isinstance(c, types.CodeType))
    return compiled.replace(co_qualname=code.co_qualname)


def _is_running(function: types.FunctionType, source: _Source) -> bool:
    own, compiled = function.__code__, _compile(source, function)
    return all(
        getattr(own, name) == getattr(compiled, name)
        for name in ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    )


# Places -----------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A sum and the statement that normalises it, as nodes of one tree."""

    # target = left + right
    sum: ast.Assign
    # A later statement, in which the first thing to run is self.norm(target).
    reader: ast.Assign | ast.Return | ast.Expr
    # The list of statements that holds both.
    body: list[ast.stmt]
    norm: str


def _places(definition: ast.FunctionDef) -> Iterator[_Place]:
    """Yield the places of a forward, in the order of the source."""
    me = _self_of(definition)
    for node in ast.walk(definition):
        for _, body in ast.iter_fields(node):
            if not isinstance(body, list):
                continue
            for index, statement in enumerate(body):
                target = _target(statement)
                if target is None or not _is_sum(statement.value):
                    continue
                after = iter(body[index + 1 :])
                # `residual = hidden_states` may stand between.
                reader = next((s for s in after if not _is_rename(s, target)), None)
                if not isinstance(reader, (ast.Assign, ast.Return, ast.Expr)):
                    continue
                call = _first_to_run(reader.value)
                norm = _method(call, me)
                if norm is not None and _has_one_argument(call, target):
                    yield _Place(statement, reader, body, norm)


def _self_of(definition: ast.FunctionDef) -> str:
    """Return what a method calls its object; "" where it takes it as one of *args."""
    names = (*definition.args.posonlyargs, *definition.args.args)
    return names[0].arg if names else ""


def _target(statement: Any) -> str | None:
    """Return the name that a plain assignment sets."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    (target,) = statement.targets
    return target.id if isinstance(target, ast.Name) else None


def _is_sum(value: ast.expr | None) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _is_rename(statement: ast.AST, kept: str) -> bool:
    """Return whether a statement only gives a value another name, and `kept` to nothing else."""
    is_assignment = isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name)
    return is_assignment and _target(statement) not in (None, kept)


# Their parts run in the order of the fields, and all of them.
_IN_ORDER = (ast.Attribute, ast.BinOp, ast.Call, ast.Subscript, ast.Tuple, ast.keyword)


def _first_to_run(node: ast.AST | None) -> ast.AST | None:
    """Return the first call of an expression, or what may keep a call from being first."""
    if node is None or isinstance(node, (ast.Name, ast.Constant)):
        return None
    if not isinstance(node, _IN_ORDER):
        return node
    for part in ast.iter_child_nodes(node):
        first = _first_to_run(part) if isinstance(part, (ast.expr, ast.keyword)) else None
        if first is not None:
            return first
    return node if isinstance(node, ast.Call) else None


def _method(call: ast.AST | None, me: str) -> str | None:
    """Return the name in a call of me.name."""
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if owner == me:
            return name
    return None


def _has_one_argument(call: ast.AST | None, name: str) -> bool:
    match call:
        case ast.Call(args=[ast.Name(id=given)], keywords=[]):
            return given == name
    return False


def _has_residual(definition: ast.FunctionDef) -> bool:
    nodes = list(ast.walk(definition))
    kept = {argument.arg for argument in definition.args.args}
    kept |= {name for node in nodes if _is_rename(node, "") and (name := _target(node))}
    sums = (node for node in nodes if isinstance(node, ast.BinOp) and _is_sum(node))
    parts = (part for node in sums for part in (node.left, node.right))
    return any(isinstance(part, ast.Name) and part.id in kept for part in parts)


class _Put(ast.NodeTransformer):
    """Puts a name in the place of a call."""

    def __init__(self, call: ast.AST | None, name: str) -> None:
        self._call, self._name = call, name

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if node is self._call:
            return ast.copy_location(ast.Name(self._name, ast.Load()), node)
        return self.generic_visit(node)


def _rewrite(place: _Place, me: str, name: str) -> None:
    """Change the two statements of a place; `name` holds the norm's output between them."""
    total = place.sum.targets[0]
    assert isinstance(place.sum.value, ast.BinOp)
    norm = ast.Attribute(ast.Name(me, ast.Load()), place.norm, ast.Load())
    parts = [ast.Name(me, ast.Load()), place.sum.value.left, place.sum.value.right, norm]
    call = ast.Call(ast.Name(_FUNCTION, ast.Load()), parts, [])
    # fix_missing_locations gives what is new the place of what holds it.
    place.sum.value = ast.copy_location(call, place.sum.value)
    place.sum.targets = [ast.Tuple([ast.Name(name, ast.Store()), total], ast.Store())]
    _Put(_first_to_run(place.reader.value), name).visit(place.reader)
    if not isinstance(place.reader, ast.Return):
        # The output lives no longer than it does in the stock forward.
        free = ast.copy_location(ast.Delete([ast.Name(name, ast.Del())]), place.reader)
        place.body.insert(place.body.index(place.reader) + 1, free)
