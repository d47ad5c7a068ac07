"""Copies chosen records from the pool to near memory, concurrently with computation.

In: a layer's pool rows, positions, a near buffer. Out: a ticket; waiting for it waits for this copy alone, never
for the device. One worker thread per link gathers; on a GPU it copies from pinned memory on a side stream and
records an event. Knows nothing of how records were chosen.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from farkv._axes import Bool, Int, Tensor
from farkv.store.far.page_rows import PagedRows
from farkv.store.far.rows import Rows, spread_heads
from farkv.store.memory import Fetcher
from farkv.store.near.pinned import Pinned
from farkv.store.near.recently_used import RecentlyUsed
from farkv.store.worker import Worker


class Ticket:
    """A pending fetch; after `wait`, its rows are safe to read.

    Args:
        end: called once it was waited for, however that went.
    """

    def __init__(self, work: Future[Any], end: Callable[[], None] | None = None):
        self._work, self._end = work, end

    def wait(self) -> None:
        """Wait for the rows; on a GPU only the current stream waits."""
        try:
            event = self._work.result()
        finally:
            if self._end is not None:
                self._end()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def result(self) -> Any:
        """Wait for the work and return its result."""
        return self._work.result()


# Host rows of so few bytes are copied at once where the worker is idle: waking it takes longer than the copy. On two
# cores with four layers of 32 KiB a step takes 0.8 of the time (docs/log.md).
INLINE_BYTES = 64 << 10


class FetchJob(NamedTuple):
    """One fetch: the arguments of `Link.fetch`."""

    rows: Rows | PagedRows
    positions: Tensor
    valid: Tensor | None
    out: Tensor
    report: Callable[[int], None]
    # Records that are near already, and are not fetched.
    near: Pinned | RecentlyUsed | None


class Link:
    """The path from host to near memory: a worker thread and, on a GPU, one side stream.

    Args:
        worker: of the attached model; None: a thread of its own, where one is needed.
    """

    def __init__(self, device: torch.device, worker: Worker | None = None):
        self.device, self._worker = device, worker
        self._process = os.getpid()
        # The work that was submitted last: when it is done, so is all before it.
        self._latest: Future[Any] | None = None
        self._stream: Any = None
        # Host tensors that the GPU may still be reading, each with the event that ends the read.
        self._reading: deque[tuple[Any, Tensor]] = deque()
        self._staging: dict[tuple[int, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link(self.device, self._worker)

    def submit(self, work: Callable[[], Any], end: Callable[[], None] | None = None) -> Ticket:
        """Run `work` on the link's thread; `end` follows on the thread that waits for it."""
        if self._worker is None:
            self._worker = Worker()
        self._latest, self._process = self._worker.submit(work), os.getpid()
        return Ticket(self._latest, end)

    def _is_idle(self) -> bool:
        """Say whether all that was submitted is done; what a forked process was waiting for will never be."""
        return self._latest is None or self._latest.done() or self._process != os.getpid()

    def _run(self, work: Callable[[], Any], n_bytes: int) -> Ticket:
        """Run `work`, which copies `n_bytes`: here if that is little and the worker is idle, else on its thread."""
        if n_bytes > INLINE_BYTES or not self._is_idle():
            return self.submit(work)
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except Exception as error:  # raised where the ticket is waited for, as the worker's are
            done.set_exception(error)
        return Ticket(done)

    def drain(self) -> None:
        """Wait for all submitted work, so that the next choice sees the effects of every read."""
        if self._latest is not None and self._worker is not None and self._process == os.getpid():
            # Errors are raised where a ticket is waited for. The thread lets go of its last work when it gets more.
            self._worker.submit(int).result()
        self._latest = None

    def fetch(
        self,
        rows: Rows | PagedRows,
        positions: Int[Tensor, "B Hkv K"],
        valid: Bool[Tensor, "B Hkv K"] | None,
        out: Tensor,
        count: Callable[[int], None],
        near: Pinned | RecentlyUsed | None = None,
    ) -> Ticket:
        """Copy the rows at `positions` into `out` ([B, Hkv, >= K, W], near).

        Where `valid` is given, valid positions come first, and columns in which no head has one are not read.

        Args:
            rows: the layer's pool: in host memory, or on disk with a page cache.
            count: called with the bytes that were copied, on the worker thread.
            near: records that are near already, and are not fetched; a recently used set stores those that are.

        Cost: B * Hkv * n * W elements read from the pool and written near, n the most valid positions of any head.
        """
        job = FetchJob(rows, positions, valid, out, count, near)
        if self.device.type != "cuda":
            if isinstance(rows, PagedRows):
                return self._fetch_pages(job, rows)
            return self._run(lambda: self._copy(job), positions.numel() * rows.width * rows.dtype.itemsize)
        ready = torch.cuda.Event()
        ready.record()
        if isinstance(rows, Rows) and isinstance(rows.mover, Fetcher) and valid is None and near is None:
            return self._launch(job, rows.mover, ready)
        return self.submit(lambda: self._copy_to_gpu(job, ready))

    def _fetch_pages(self, job: FetchJob, rows: PagedRows) -> Ticket:
        """Decide now which pages are read into which slots, and read them on the worker's thread."""
        if job.near is not None:
            return self.submit(lambda: self._copy(job))
        heads, positions, at = spread_heads(job.positions), job.positions.reshape(-1), None
        if job.valid is not None:
            # What is not valid must cause no page reads.
            at, chosen = job.valid.nonzero(), job.valid.flatten()
            heads, positions = heads[chosen], positions[chosen]
        if len(positions) == 0:
            return self._run(lambda: None, 0)
        coming = rows.plan(heads, positions)

        def bring() -> None:
            # Both are deliberate copies: this is the link.
            staged = self._stage(len(positions), rows)
            rows.bring(coming, staged)
            if at is None:
                place = job.out[:, :, : job.positions.shape[-1]]
                place.copy_(staged.view(place.shape))
            else:
                job.out.index_put_(tuple(at.unbind(1)), staged)
            job.report(staged.numel() * staged.element_size())

        return self.submit(bring, lambda: rows.end(coming))

    def _launch(self, job: FetchJob, fetcher: Fetcher, ready: torch.cuda.Event) -> Ticket:
        """Let the GPU itself read the rows over the link, on the side stream; no thread waits."""
        n, data = job.positions.shape[-1], job.rows.data if isinstance(job.rows, Rows) else None
        assert data is not None
        stream = self._find_stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            fetcher.fetch(data, job.positions, job.out, torch.zeros(1, dtype=torch.int64, device=self.device))
            # Its memory must not be reused before the side stream has read it.
            job.positions.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        # A reference: where the pool grows meanwhile, its old pinned memory would be reused at once.
        self._reading.append((done, data))
        while self._reading[0][0].query() and len(self._reading) > 1:
            self._reading.popleft()
        job.report(job.out[:, :, :n].numel() * job.out.element_size())
        arrived: Future[Any] = Future()
        arrived.set_result(done)
        return Ticket(arrived)

    def _find_stream(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def _copy(self, job: FetchJob) -> None:
        rows, positions, valid, out, count, near = job
        # `positions` and `valid` are in host memory here: reading counts needs no sync.
        n = positions.shape[-1] if valid is None else int(valid.sum(-1).max())
        if n == 0:
            return
        if isinstance(near, RecentlyUsed):
            with near.lock:
                if near.is_open:
                    self._copy_through(job, near, n)
                    return
            # Another cache needed its memory.
            near = None
        slots = None if near is None else near.find(positions[..., :n])
        if near is not None and slots is not None:
            self._copy_missing(job._replace(positions=positions[..., :n]), near.rows.view(), slots)
            return
        if valid is not None and isinstance(rows, PagedRows):
            # Invalid rows must cause no page reads.
            self._bring(job, (torch.arange(n) < valid.sum(-1, keepdim=True)).nonzero())
            return
        place, positions = out[:, :, :n], positions[..., :n]
        # Both are deliberate copies: this is the link.
        if isinstance(rows, Rows) and place.device == rows.device:
            rows.take_each(positions, place)
        else:
            staged = self._stage(positions.numel(), rows)
            rows.take(spread_heads(positions), positions.reshape(-1), staged)
            place.copy_(staged.view(place.shape), non_blocking=True)
        count(place.numel() * place.element_size())

    def _copy_through(self, job: FetchJob, near: RecentlyUsed, n: int) -> None:
        """Fetch what the recently used set lacks and store it there, then copy all from it."""
        place, positions = job.out[:, :, :n], job.positions[..., :n].flatten(0, 1)
        wanted = near.find(positions, None if job.valid is None else job.valid[..., :n].flatten(0, 1))
        head, column = wanted.missing
        staged = self._stage(len(head), job.rows)
        # A deliberate copy: this is the link. On a GPU the rows briefly take near memory of their own.
        if len(head):
            job.rows.take(head, positions[head, column], staged)
            job.report(staged.numel() * staged.element_size())
        fetched = staged.to(place.device, non_blocking=True)
        near.take_in(wanted, fetched)
        near.read(wanted, place)
        if wanted.enter is not None:
            left = ~wanted.enter
            at = head[left].to(place.device), column[left].to(place.device)
            place.view(len(positions), n, -1).index_put_(at, fetched[left.to(place.device)])

    def _bring(self, job: FetchJob, missing: Int[Tensor, "N 3"]) -> None:
        """Fetch the rows at some entries (sequence, head, column) of the job's positions."""
        if len(missing) == 0:
            return
        b, h, j = missing.unbind(1)
        staged = self._stage(len(missing), job.rows)
        job.rows.take(b * job.positions.shape[1] + h, job.positions[b, h, j], staged)
        # A deliberate copy: this is the link. On a GPU the rows briefly take near memory of their own.
        at = missing.to(job.out.device).unbind(1)
        job.out.index_put_(at, staged.to(job.out.device, non_blocking=True))
        job.report(staged.numel() * staged.element_size())

    def _copy_missing(self, job: FetchJob, near: Tensor, slots: Tensor) -> None:
        """Fetch only what is not pinned; pinned records are copied near to near."""
        # Slots are in host memory here: testing them needs no sync.
        missing, here = (slots < 0).nonzero(), (slots >= 0).nonzero()
        self._bring(job, missing)
        out = job.out
        at = here.to(out.device).unbind(1)
        pinned = slots[here.unbind(1)].to(out.device)
        out.index_put_(at, near[at[0], at[1], pinned])

    def _copy_to_gpu(self, job: FetchJob, ready: torch.cuda.Event) -> Any:
        stream = self._find_stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            # The worker, not the decoding thread, waits for the positions, which a gather in host memory needs.
            valid = None if job.valid is None else job.valid.to("cpu")
            self._copy(job._replace(positions=job.positions.to("cpu"), valid=valid))
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def _stage(self, n: int, like: Rows | PagedRows) -> Tensor:
        """Return a staging area of `n` rows; for a GPU in pinned memory, and no longer in use."""
        key = (like.width, like.dtype)
        area = self._staging.get(key)
        if self._stream is not None:
            # The last copy from the staging area must be done before it is overwritten.
            self._stream.synchronize()
        if area is None or area.shape[0] < n:
            pin = self.device.type == "cuda"
            area = torch.empty(max(64, n + n // 4), like.width, dtype=like.dtype, pin_memory=pin)
            self._staging[key] = area
        return area[:n]
