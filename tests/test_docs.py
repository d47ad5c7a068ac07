"""The documents cannot rot: what the interface has is in docs/api.md, what documents name is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import farkv
from farkv.cli.commands import app
from farkv.config import EVICT, KERNELS, QUANT
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.kernels.gpu import Gpu
from farkv.kernels.native_abi import ISAS
from farkv.methods import METHODS
from farkv.receipt import Receipt
from farkv.receipt_text import FALLBACK_WORDS

ROOT = Path(__file__).parents[1]
SOURCE = Path(farkv.__file__).parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "training/README.md"])
# These tell what was, by the names of then.
HISTORY = {"docs/log.md", "CHANGELOG.md"}
API = (ROOT / "docs/api.md").read_text()
ROOMS = "|".join(sorted(p.name for p in SOURCE.iterdir() if p.is_dir() and not p.name.startswith("_")))


def section(title: str) -> str:
    """Return what stands under a heading of docs/api.md, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", API, re.M | re.S)
    assert found is not None, f"docs/api.md has no heading {title!r}"
    return found[1]


def missing(names: list[str], text: str) -> list[str]:
    """Return the names that do not stand in a text as code, each alone: a signature explains nothing."""
    code = set(re.findall(r"`([^`]+)`", text))
    return [name for name in names if name not in code]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# --- the interface ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "function"),
    [
        ("attach", farkv.attach),
        ("new_cache", Handle.new_cache),
        ("generate", Handle.generate),
        ("load_cache", farkv.load_cache),
        ("profile", farkv.profile),
        ("allocate", farkv.allocate),
    ],
)
def test_every_argument_is_explained(title: str, function: Any) -> None:
    assert missing(parameters(function), section(title)) == []


def test_every_argument_of_a_session_is_explained() -> None:
    assert missing([*parameters(FarCache.save), "cache.token_ids"], section("The cache")) == []


def test_every_value_of_an_option_is_explained() -> None:
    said = section("attach").replace('`"', "`").replace('"`', "`")
    assert missing([*EVICT, *QUANT, *KERNELS], said) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_a_method_is_explained(name: str) -> None:
    config = METHODS[name].config
    fields = [field.name for field in dataclasses.fields(config)]
    if f"\n### {config.__name__}\n" in API:
        assert missing(fields, section(config.__name__)) == []
        return
    row = next(line for line in section("The baselines").splitlines() if line.startswith(f"| `{config.__name__}` |"))
    for field in dataclasses.fields(config):
        assert f"`{field.name}` {field.default}" in row, "with its default"


def receipt_keys(kind: Any, start: str = "") -> Iterator[str]:
    """Give the keys of a receipt, those of its parts with a dot."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        parts = [hints[field.name], *typing.get_args(hints[field.name])]
        inner = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if inner is None:
            yield start + field.name
        else:
            many = "[]" if typing.get_origin(hints[field.name]) is tuple else ""
            yield from receipt_keys(inner, f"{start}{field.name}{many}.")


def test_every_key_of_the_receipt_is_explained() -> None:
    keys = list(receipt_keys(Receipt))
    assert "quality.kl_mean" in keys
    assert "layers[].why" in keys
    assert missing(keys, section("The receipt")) == []


def find_fallbacks() -> set[str]:
    """Return the names that the source counts a fallback under."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name: ast.AST | None = None
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("add_fallback", "on_fallback"):
                name = node.args[0]
            if isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "fallbacks":
                name = node.slice
            if isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def test_every_fallback_is_explained_and_no_other() -> None:
    table = section("The receipt").split("**`fallbacks`**")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == find_fallbacks() == set(FALLBACK_WORDS)


def test_every_kernel_is_explained() -> None:
    names = ["torch-sdpa", "torch-eager", Gpu.name, *(f"native-{isa}" for isa in ISAS)]
    assert missing(names, section("The receipt")) == []


def test_every_error_is_named() -> None:
    errors = [name for name, kind in vars(import_module("farkv.errors")).items() if isinstance(kind, type)]
    assert missing(errors, section("Errors")) == []


def list_flags(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Give (section of docs/api.md, flag); the subcommands of one command share a section."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield from ((name, flag) for flag in parameter.opts)
    for inner, sub in getattr(command, "commands", {}).items():
        yield from list_flags(sub, f"farkv {inner}" if name == "The command line" else name)


def test_every_flag_is_explained_where_its_command_is() -> None:
    # What stands at the top of the chapter holds for all commands.
    short = set(re.findall(r"`(--[\w-]+)`/`(-\w)`", section("The command line")))
    flags = [(title, flag) for title, flag in list_flags(get_command(app), "The command line")]
    assert ("farkv bench", "--own-fraction") in flags
    lost = [(t, f) for t, f in flags if missing([f], section(t)) and f not in {letter for _, letter in short}]
    assert lost == []


def test_every_environment_variable_is_explained() -> None:
    used: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        used |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    assert set(re.findall(r"^\| `(\w+)` \|", section("Environment variables"), re.M)) == used


# --- names and links --------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_relative_link_resolves(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            lost.append(target)
    assert lost == []


def exists(path: str) -> bool:
    """Say whether a path is there, from the root, the package or its parent; a bare name: anywhere."""
    if "/" not in path:
        return any(
            list((ROOT / folder).rglob(path)) for folder in ("src", "tests", "benchmarks", "training", "examples")
        )
    return any((start / path).exists() for start in (ROOT, SOURCE, SOURCE.parent))


def resolves(dotted: str) -> bool:
    """Say whether a dotted name below `farkv` is a module, or something in one."""
    found: Any = farkv
    for part in dotted.removeprefix("farkv.").split("."):
        try:
            found = getattr(found, part, None) or import_module(f"{found.__name__}.{part}")
        except (ImportError, AttributeError):
            return False
    return True


@pytest.mark.parametrize("path", [p for p in DOCS if name_of(p) not in HISTORY], ids=name_of)
def test_every_path_and_module_that_is_named_exists(path: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.S))
    words = {word.rstrip(".,;:") for part in code for word in re.split(r"[\s(]", part)}
    # Files and folders, wherever they are said to be; in papers every dotted name is one of ours.
    paths = {w for w in words if re.fullmatch(r"[\w./-]+\.(?:py|h|sh)|(?:[\w-]+/)+", w)}
    paths |= {w for w in words if re.fullmatch(rf"(?:{ROOMS}|docs|tests|benchmarks)/[\w/-]+", w)}
    ours = r"[a-z_]\w*" if "papers" in path.parts else rf"farkv|{ROOMS}"
    dotted = {w for w in words - paths if re.fullmatch(rf"(?:{ours})(?:\.[a-zA-Z_]\w*)+", w)}
    lost = sorted([w for w in paths if not exists(w)] + [w for w in dotted if not resolves(w)])
    assert lost == []


def test_the_way_to_write_a_method_shows_the_example() -> None:
    example = (ROOT / "examples/new_method.py").read_text().rstrip()
    assert f"```python\n{example}\n```" in (ROOT / "docs/methods.md").read_text()


def test_the_index_is_one_screen_and_has_every_page() -> None:
    text = (ROOT / "docs/index.md").read_text()
    assert len(text.splitlines()) <= 40
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/papers").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    assert [p.name for p in pages if p.name != "index.md" and p.name not in text] == []


def test_tables_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks/tables.py"
    if not script.exists():
        pytest.skip("the benchmarks are not part of a source distribution")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
