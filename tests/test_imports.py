"""No import circles between files: also not through imports in functions, or for type checkers alone."""

from __future__ import annotations

import ast
from pathlib import Path

import farkv

SOURCE = Path(farkv.__file__).parent


def name_of(path: Path) -> str:
    return ".".join(("farkv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def list_imports(text: str, files: set[str]) -> set[str]:
    """Return the files that a file imports, wherever the import stands in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            # `from farkv.hf import _compat` imports a file, `from farkv.hf._compat import x` a name of it.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & files or {node.module or ""}
    return found & files


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the largest sets of files each of which leads to each other one."""
    reached: dict[str, set[str]] = {}
    for start in imports:
        seen, open_ends = set[str](), [start]
        while open_ends:
            new = imports[open_ends.pop()] - seen
            seen |= new
            open_ends += new
        reached[start] = seen
    circles = {frozenset(b for b in reached[a] if a in reached[b]) for a in imports if a in reached[a]}
    return sorted(sorted(circle) for circle in circles)


def test_circles_are_found_in_functions_and_for_type_checkers_too() -> None:
    files = {"a", "a.b", "c", "d"}
    texts = {
        "a": "from a import b",
        "a.b": "def f():\n    import c",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import x",
        "d": "import a, c, os",
    }
    imports = {name: list_imports(text, files) for name, text in texts.items()}
    assert imports == {"a": {"a.b"}, "a.b": {"c"}, "c": {"a.b"}, "d": {"a", "c"}}
    assert find_circles(imports) == [["a.b", "c"]]
    assert find_circles({"a": {"a"}}) == [["a"]]


def test_no_file_imports_itself_round_a_corner() -> None:
    paths = {name_of(path): path for path in SOURCE.rglob("*.py")}
    imports = {name: list_imports(path.read_text(), set(paths)) for name, path in paths.items()}
    assert "farkv.session.save" in imports["farkv.hf.cache"]
    assert find_circles(imports) == []
