"""llama.cpp as a peer: the cost of a decode step's attention, with its fastest KV cache setting.

In: a shape, layers, a context, threads. Out: seconds of attention per layer and token; or, of a GGUF file, whole steps.

A random-weight model with the shape's attention is written and loaded, its KV cache is filled by restoring a saved
sequence, one token is decoded after it and removed again. The time of a decode after BASE_TOKENS is subtracted:

    attention = (t(context) - t(BASE_TOKENS)) / layers

llama.cpp attends to at least PAD_TOKENS cells, masked or not, so this omits PAD_TOKENS / context of its time.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from farkv.bench.fill import require_memory
from farkv.bench.llama_files import SETTINGS, VOCABULARY, KVSetting, StateLayout, draw_state, write_model
from farkv.bench.shapes import ModelShape, format_tokens
from farkv.bench.timing import MOST_TOKENS
from farkv.errors import ConfigError

BASE_TOKENS = 64
PAD_TOKENS = 256
LEAST_TOKENS = 4 * PAD_TOKENS
# Rounds for finding the fastest setting; a setting whose first round takes HOPELESS times the best median is dropped.
SCREEN_ROUNDS = 5
HOPELESS = 2.0

_log: deque[str] = deque(maxlen=4)
# Kept alive here: the library only holds a raw pointer.
_callback: Any = None


def require_llama_cpp() -> Any:
    """Return the llama_cpp package, with its log redirected away from the terminal.

    Raises:
        ConfigError: llama_cpp or gguf is not installed.
    """
    global _callback  # noqa: PLW0603
    try:
        library, _ = import_module("llama_cpp"), import_module("gguf")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            "--peer llama.cpp: expected the packages llama-cpp-python and gguf, got "
            f"{type(error).__name__} ({error}); install them with: pip install 'farkv[peer]', or drop the peer"
        ) from error
    if _callback is None:
        _callback = library.llama_log_callback(lambda level, text, data: _log.append(text.decode(errors="replace")))
    library.llama_log_set(_callback, ctypes.c_void_p(0))
    return library


def refuse(what: str) -> ConfigError:
    """Return the error for a failure in llama.cpp, with the last lines of its log."""
    log = " ".join(line.strip() for line in _log if line.strip())
    return ConfigError(f"--peer llama.cpp: {what}; its log ends with: {log!r}; drop the peer, or lower --contexts")


class LlamaModel(NamedTuple):
    """A loaded model."""

    library: Any
    handle: Any
    layers: int
    width: int


@contextmanager
def load_model(shape: ModelShape, layers: int) -> Iterator[LlamaModel]:
    """Load a random-weight model with a shape's attention, as `load_file`."""
    with TemporaryDirectory(prefix="farkv-bench-") as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, shape, layers)
        with load_file(path, shape, layers) as model:
            yield model


@contextmanager
def load_file(path: Path, shape: ModelShape, layers: int) -> Iterator[LlamaModel]:
    """Load a GGUF file of a shape, and free it on exit; close its sequences before that."""
    library = require_llama_cpp()
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    # Read into memory: what is measured has no page of the file to wait for.
    params.use_mmap = False
    handle = library.llama_model_load_from_file(str(path).encode(), params)
    if not handle:
        raise refuse(f"could not load {path.name}")
    try:
        yield LlamaModel(library, handle, layers, shape.kv_heads * shape.head_dim)
    finally:
        library.llama_model_free(handle)


class LlamaSequence:
    """One sequence with room for `room` tokens, with one KV cache setting."""

    def __init__(self, model: LlamaModel, setting: KVSetting, room: int, threads: int):
        self.model, self.setting, self.library = model, setting, model.library
        params = self.library.llama_context_default_params()
        params.n_ctx = -(-room // PAD_TOKENS) * PAD_TOKENS
        params.n_batch = params.n_ubatch = params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k, params.type_v, params.flash_attn_type = setting.type_k, setting.type_v, int(setting.flash)
        params.offload_kqv = params.op_offload = False
        self.handle = self.library.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise refuse(f"could not allocate a KV cache of {format_tokens(room)} tokens as {setting.name}")
        self.memory = self.library.llama_get_memory(self.handle)
        self.token = (ctypes.c_int32 * 1)()

    def decode(self, token: int) -> float:
        """Decode a token and return the seconds it takes."""
        self.token[0] = token % VOCABULARY
        start = time.perf_counter()
        failed = self.library.llama_decode(self.handle, self.library.llama_batch_get_one(self.token, 1))
        self.library.llama_synchronize(self.handle)
        seconds = time.perf_counter() - start
        if failed:
            raise refuse(f"decoding a token after {len(self)} failed with error {failed}")
        return seconds

    def __len__(self) -> int:
        return self.library.llama_memory_seq_pos_max(self.memory, 0) + 1

    def cut(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self.library.llama_memory_seq_rm(self.memory, 0, tokens, -1)

    def save(self) -> np.ndarray:
        """Return the sequence's state, uint8."""
        state = np.empty(self.library.llama_state_seq_get_size(self.handle, 0), dtype=np.uint8)
        self.library.llama_state_seq_get_data(self.handle, point_to(state), state.size, 0)
        return state

    def load(self, state: np.ndarray, tokens: int) -> None:
        """Replace the sequence with a state of `tokens` tokens.

        Raises:
            ConfigError: this version of llama.cpp does not accept it.
        """
        read = self.library.llama_state_seq_set_data(self.handle, point_to(state), state.size, 0)
        if read != state.size or len(self) != tokens:
            raise refuse(
                f"expected it to restore {tokens} tokens ({state.size} bytes), it restored {len(self)} ({read} bytes)"
            )

    def learn_layout(self, tokens: int) -> StateLayout:
        """Return the layout of a state of `tokens` tokens, including the header that this version writes.

        Raises:
            ConfigError: this version of llama.cpp uses an unknown layout.
        """
        self.decode(0)
        real = self.save()
        self.cut(0)
        layout = StateLayout(self.setting, self.model.layers, 1, self.model.width)
        expected = draw_state(layout).size
        n = real.size - expected
        # One stream, one token.
        if n < 0 or real[n : n + 8].view("<u4").tolist() != [1, 1]:
            raise refuse(f"expected a state of {expected} bytes and a header, got {real.size} bytes")
        return layout._replace(tokens=tokens, header=real[:n].tobytes())

    def fill(self, tokens: int) -> None:
        """Fill the sequence with `tokens` random tokens. Cost: twice their bytes, temporarily."""
        self.load(draw_state(self.learn_layout(tokens)), tokens)

    def close(self) -> None:
        """Free the sequence."""
        self.library.llama_free(self.handle)


def point_to(array: np.ndarray) -> Any:
    """Return a C pointer to the array's bytes."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class LlamaPair:
    """A sequence of the whole context and a short one, with one KV cache setting."""

    def __init__(self, model: LlamaModel, setting: KVSetting, context: int, threads: int):
        self.layers, self.sequences = model.layers, []
        for tokens in (context, BASE_TOKENS):
            sequence = LlamaSequence(model, setting, tokens + 1, threads)
            self.sequences.append((sequence, tokens))
            sequence.fill(tokens)
        # Warm-up: the first decode causes page faults.
        self.measure()

    def measure(self) -> float:
        """Return the seconds of attention per layer and token of one round; both sequences are left unchanged."""
        seconds = []
        for sequence, tokens in self.sequences:
            seconds.append(sequence.decode(tokens))
            sequence.cut(tokens)
        return (seconds[0] - seconds[1]) / self.layers

    def close(self) -> None:
        """Free both sequences."""
        for sequence, _ in self.sequences:
            sequence.close()


def measure_llama_cpp(shape: ModelShape, layers: int, context: int, threads: int, rounds: int) -> list[float]:
    """Return each round's seconds of attention per layer and token, with the fastest KV cache setting.

    Raises:
        ConfigError: a package is missing or incompatible, or the context is too short.
        CapacityError: the context does not fit in memory.
    """
    if context < LEAST_TOKENS:
        raise ConfigError(
            f"--peer llama.cpp: expected --contexts of at least {LEAST_TOKENS}, got {context}: it pads to "
            f"{PAD_TOKENS} tokens, so the time of a short context cannot be measured"
        )
    # The cache, and the state it is restored from.
    require_memory(2 * layers * shape.layer_bytes(context), f"llama.cpp at {format_tokens(context)} tokens")
    with load_model(shape, layers) as model:
        fastest = find_fastest(lambda setting: LlamaPair(model, setting, context, threads))
        with closing(LlamaPair(model, fastest, context, threads)) as pair:
            return [pair.measure() for _ in range(rounds)]


def find_fastest(start: Callable[[KVSetting], LlamaPair | LlamaSteps]) -> KVSetting:
    """Return the KV cache setting of the smallest median."""
    medians: dict[KVSetting, float] = {}
    for setting in SETTINGS:
        best = min(medians.values(), default=float("inf"))
        with closing(start(setting)) as one:
            seconds = [one.measure()]
            while len(seconds) < SCREEN_ROUNDS and seconds[0] < HOPELESS * best:
                seconds.append(one.measure())
        medians[setting] = median(seconds)
    return min(medians, key=medians.__getitem__)


class LlamaSteps:
    """Whole decode steps after a context of random records, timed as the other methods are."""

    name = "llama.cpp"
    n_layers = least_tokens = 1

    def __init__(self, model: LlamaModel, setting: KVSetting, context: int, threads: int):
        self.setting, self.context = setting, context
        self.sequence = LlamaSequence(model, setting, context + MOST_TOKENS, threads)
        self.sequence.fill(context)
        # Warm-up: the first decode causes page faults.
        self.measure()

    def step(self, layer: int) -> None:
        """Decode a token."""
        self.sequence.decode(len(self.sequence))

    def restore(self) -> None:
        """Forget the round's tokens."""
        self.sequence.cut(self.context)

    def measure(self) -> float:
        """Return the seconds of one token, which is forgotten."""
        seconds = self.sequence.decode(self.context)
        self.restore()
        return seconds

    def close(self) -> None:
        """Free the sequence."""
        self.sequence.close()
