"""Moves chosen records from the pool to near memory, beside the computation.

In: a layer's pool rows, positions, a near buffer. Out: a ticket; waiting for it waits for this copy alone, never
for the device. One worker thread per link gathers; on a GPU it copies from pinned memory on a side stream and
leaves an event. Knows nothing of why a record was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from farkv._axes import Bool, Int, Tensor


class Ticket:
    """A fetch under way; `wait` makes its rows safe to read."""

    def __init__(self, work: Future[Any]):
        self._work = work

    def wait(self) -> None:
        """Return when the rows are there; on a GPU only the current stream waits."""
        event = self._work.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class Link:
    """The way from host to near memory: one worker thread and, on a GPU, one side stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self._worker: ThreadPoolExecutor | None = None
        self._stream: Any = None
        self._staging: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link(self.device)

    def submit(self, work: Callable[[], Any]) -> Ticket:
        """Run `work` on the link's thread."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="farkv-link")
        return Ticket(self._worker.submit(work))

    def fetch(
        self,
        rows: Tensor,
        positions: Int[Tensor, "B Hkv K"],
        valid: Bool[Tensor, "B Hkv K"] | None,
        out: Tensor,
        count: Callable[[int], None],
    ) -> Ticket:
        """Copy the rows at `positions` into `out` ([B, Hkv, >= K, W], near).

        Where `valid` is given, valid positions stand first and rows behind the longest valid run stay unread.

        Args:
            rows: the layer's pool, [B, Hkv, C, W], in host memory.
            count: is told the bytes that crossed, from the worker.

        Cost: B * Hkv * n * W elements read from the pool and written near, n the longest valid run.
        """
        if self.device.type != "cuda":
            return self.submit(lambda: self._copy(rows, positions, valid, out, count))
        ready = torch.cuda.Event()
        ready.record()
        return self.submit(lambda: self._copy_to_gpu(rows, positions, valid, out, count, ready))

    def _copy(self, rows, positions, valid, out, count) -> None:
        # `positions` is in host memory here: reading its counts waits for nothing.
        n = positions.shape[-1] if valid is None else int(valid.sum(-1).max())
        if n == 0:
            return
        batch, heads, capacity, width = rows.shape
        base = torch.arange(batch * heads).view(batch, heads, 1) * capacity
        flat = (positions[..., :n] + base).reshape(-1)
        staged = self._stage(flat.numel(), width, rows)
        torch.index_select(rows.view(-1, width), 0, flat, out=staged)
        # A deliberate copy: this is the link.
        out[:, :, :n].copy_(staged.view(batch, heads, n, width), non_blocking=True)
        count(staged.numel() * staged.element_size())

    def _copy_to_gpu(self, rows, positions, valid, out, count, ready) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            # The worker, not the decoding thread, waits for the positions: a host gather must know them.
            host = positions.to("cpu")
            host_valid = None if valid is None else valid.to("cpu")
            self._copy(rows, host, host_valid, out, count)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def _stage(self, n: int, width: int, like: Tensor) -> Tensor:
        """Return a staging area of `n` rows; pinned, and idle again, where there is a GPU."""
        key = width * 64 + like.element_size()
        area = self._staging.get(key)
        if self._stream is not None:
            # The last copy out of the staging area must be done before it is written again.
            self._stream.synchronize()
        if area is None or area.shape[0] < n or area.dtype != like.dtype:
            area = torch.empty(max(64, n + n // 4), width, dtype=like.dtype, pin_memory=like.is_pinned())
            self._staging[key] = area
        return area[:n]
