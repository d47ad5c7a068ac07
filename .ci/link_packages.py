"""Link into a new environment what it needs and this one has: nothing is downloaded, unpacked and compiled twice.

    .venv/bin/python .ci/link_packages.py NEW CONSTRAINTS farkv[test]

Linked is what the metadata of farkv asks for, and all that asks for in turn, where this environment has the version
that CONSTRAINTS pins; nothing else, so what farkv forgets to ask for is missing there. pip runs next: it installs
farkv and the rest, and checks that every requirement is met.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def find_needed(name: str) -> dict[str, Distribution]:
    """Return all that a package needs on this machine, at any depth, and is here."""
    here = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    left, seen, found = [Requirement(name)], set[str](), dict[str, Distribution]()
    while left:
        asked = left.pop()
        package = canonicalize_name(asked.name)
        if package not in here or f"{package}{sorted(asked.extras)}" in seen:
            continue
        seen.add(f"{package}{sorted(asked.extras)}")
        found[package] = distribution(package)
        needs = [Requirement(line) for line in found[package].requires or []]
        extras = {"", *asked.extras}
        left += [n for n in needs if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
    return found


def link(found: Distribution, site: Path) -> None:
    """Link a package's files, but for its commands: those name this environment's interpreter."""
    for file in found.files or []:
        old, new = Path(str(found.locate_file(file))), site / file
        if ".." not in file.parts and old.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            os.link(old, new)


def main(new: str, constraints: str, name: str) -> None:
    """Link what `name` needs into the environment `new`."""
    site = Path(sysconfig.get_path("purelib", vars={"base": new}))
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", Path(constraints).read_text(), re.MULTILINE))
    versions = {canonicalize_name(package): version for package, version in pinned.items()}
    needed = {package: found for package, found in find_needed(name).items() if package != Requirement(name).name}
    same = [d for package, d in needed.items() if d.version.split("+")[0] == versions.get(package)]
    for found in same:
        link(found, site)
    print(f"{len(same)} of {len(needed)} packages linked from {sys.prefix} into {new}")


if __name__ == "__main__":
    main(*sys.argv[1:])
