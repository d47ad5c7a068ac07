"""How much of a model is loaded, told while transformers loads it. In: a path. Out: bytes, of how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from farkv.hf import _compat

# Of a folder: transformers takes the first kind that is there.
KINDS = ("model*.safetensors", "pytorch_model*.bin")


@contextmanager
def telling_bytes(path: str, on_load: Callable[[int, int | None], None]) -> Iterator[None]:
    """Tell at once how many bytes are to be loaded, and meanwhile how many are, by the share of tensors that are.

    Args:
        path: a folder or a GGUF file; of a hub id the number is not known.
    """
    total = count_bytes(Path(path)) or None
    on_load(0, total)
    with watching(lambda done, n: on_load((total or 0) * done // max(1, n), total)):
        yield


def count_bytes(path: Path) -> int:
    """Return the bytes of a model's weight files; 0 where it has none here."""
    files = next((found for kind in KINDS if (found := list(path.glob(kind)))), [path] if path.is_file() else [])
    return sum(file.stat().st_size for file in files)


@contextmanager
def watching(tell: Callable[[int, int], None]) -> Iterator[None]:
    """Tell how many of how many tensors are loaded, by the progress bars that transformers would draw.

    The first that has a length is followed: of a GGUF file, its tensors; what comes then takes no time.
    """
    watched = False

    def follow(rows: Any) -> Iterator[Any]:
        for n, row in enumerate(rows):
            tell(n, len(rows))
            yield row
        tell(len(rows), len(rows))

    def watch(rows: Any, plain: Callable[[], Any]) -> Any:
        nonlocal watched
        if watched or not hasattr(rows, "__len__"):
            return plain()
        watched = True
        return follow(rows)

    def hook(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return watch(args[0] if args else None, lambda: make(*args, **kwargs))

    before, bar = transformers.utils.logging.set_tqdm_hook(hook), _compat.set_gguf_bar(None)
    if bar is not None:
        _compat.set_gguf_bar(lambda rows, **kwargs: watch(rows, lambda: bar(rows, **kwargs)))
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)
        _compat.set_gguf_bar(bar)
