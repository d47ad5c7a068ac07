"""Executes the shapes in farkv's signatures: jaxtyping and beartype check the first calls of what has one.

In every test anew, so each test checks all that it calls; a loop's thousandth call, which costs as much again as the
call itself, is not checked. `JAXTYPING_DISABLE=1` leaves all unchecked, `make test-all` checks every call.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, ClassVar

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGE = "farkv"
SOURCES = {"jaxtyping", f"{PACKAGE}._axes"}  # where array types are imported from
HOOK = "__check_shapes__"
# An int is a float, as in PEP 484.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


class Calls:
    """Counts what is still to be checked in this test."""

    limit = 8
    functions: ClassVar[set[Callable[..., Any]]] = set()  # all that are checked
    made: ClassVar[dict[Callable[..., Any], int]] = {}

    @classmethod
    def take(cls, function: Callable[..., Any]) -> bool:
        n = cls.made.get(function, 0)
        cls.made[function] = n + 1
        return n < cls.limit


def check(function: Any) -> Any:
    """Check the first calls of a function in each test, and every instance of a dataclass."""
    if isinstance(function, type):
        return jaxtyping.jaxtyped(function, typechecker=typechecker)

    @functools.cache
    def checked() -> Callable[..., Any]:
        # Not before it is called: then the names in its annotations are known, those further down in its file too.
        return jaxtyping.jaxtyped(function, typechecker=typechecker)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (checked() if Calls.take(function) else function)(*args, **kwargs)

    Calls.functions.add(function)
    return call


class Decorate(ast.NodeTransformer):
    """Puts the hook on every function and class that has shapes in its annotations."""

    def __init__(self, tree: ast.Module) -> None:
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in SOURCES]
        self.types = {alias.name for n in imports for alias in n.names}

    def has_shape(self, annotation: ast.AST | None) -> bool:
        found = [n.value for n in ast.walk(annotation) if isinstance(n, ast.Subscript)] if annotation else []
        return any(isinstance(name, ast.Name) and name.id in self.types for name in found)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if any(self.has_shape(a.annotation) for a in arguments) or self.has_shape(node.returns):
            # Innermost: a decorator above (property, cache) may take the annotations away.
            node.decorator_list.append(ast.Name(HOOK, ast.Load()))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if any(isinstance(line, ast.AnnAssign) and self.has_shape(line.annotation) for line in node.body):
            # Outermost: a dataclass is one below its decorator.
            node.decorator_list.insert(0, ast.Name(HOOK, ast.Load()))
        return node


class Loader(SourceFileLoader):
    """Compiles from the source, whatever compiled file lies beside it."""

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        return compile(ast.fix_missing_locations(Decorate(tree).visit(tree)), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, HOOK, check)
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds farkv's modules and has them loaded with the hook."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname.split(".", maxsplit=1)[0] == PACKAGE else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """Check what is imported from now on."""
    if not jaxtyping.config.jaxtyping_disable:
        sys.meta_path.insert(0, Finder())
