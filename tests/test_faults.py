"""Real faults, each with a few seeds: a right answer or an error in words, and nothing lost that was there before.

`benchmarks/faults.py` injects the same ones many times.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.methods import H2O, XKV, InfiniGen, PyramidKV, SnapKV
from tests.models import forward, make_model, make_prompt, plain_cache

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
from fault_stage import Stage  # noqa: E402
from faults import FAULTS, run_fault  # noqa: E402

# What can only be refused, whatever the seed; what a run swallows itself; what needs another process.
REFUSED = {"full_disk_while_saving", "permission_denied", "no_memory"}
RAISES = {"exception_in_a_hook": ValueError, "cancelled_request": KeyboardInterrupt, "exception_in_the_worker": OSError}
FORKS = {
    "killed_while_saving", "two_processes_on_one_disk", "two_processes_on_one_session", "forked", "no_memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    folder.chmod(0o755)
    with torch.no_grad():
        yield Stage(folder, 0)


# A child that is forked while threads run is what these two are about.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_never_a_wrong_answer(stage: Stage, fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    fork = os.fork

    class Noted(suppress):
        def __exit__(self, kind: Any, *rest: Any) -> bool:
            happened.append(kind)
            return super().__exit__(kind, *rest)

    def fork_noted() -> int:
        happened.append("fork")
        return fork()

    monkeypatch.setitem(FAULTS[fault].__globals__, "suppress", Noted)
    monkeypatch.setattr(os, "fork", fork_noted)
    assert run_fault(stage, fault, seed) in ({"refused"} if fault in REFUSED else {"correct", "refused"})
    # A fault that was never reached proves nothing.
    assert fault not in RAISES or RAISES[fault] in happened
    assert fault not in FORKS or "fork" in happened


@pytest.mark.parametrize(
    "fault", ["full_disk_under_pages", "flipped_bit_in_a_session", "cut_session", "flipped_bit_in_pages"]
)
def test_damage_is_noticed(stage: Stage, fault: str) -> None:
    """Not by every run: a bit may be in what nobody reads."""
    assert "refused" in (run_fault(stage, fault, seed) for seed in range(12))


class Stop(Exception):
    """Stands for whatever a user's hook raises."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_stopped_pass_leaves_every_layer_as_it_was(family: str, error: type[BaseException]) -> None:
    """Sliding layers too, which cannot step back by themselves; and what is known of the tokens and the index."""
    model, text = make_model(family), make_prompt(1, tokens=30)["input_ids"]
    other = make_prompt(1, tokens=9, seed=5)["input_ids"]

    def fail(module: Any, args: Any, out: Any) -> None:
        raise error

    def stop(block: int, ids: torch.Tensor, cache: Any) -> None:
        hook = model.model.layers[block].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            forward(model, ids, cache)
        hook.remove()

    with farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        calm, cache = far.new_cache(), far.new_cache()
        stop(2, other, cache)
        expected, got = forward(model, text, calm), forward(model, text, cache)
        assert torch.equal(expected, got)
        for token in other.split(1, 1):
            stop(3, token, cache)
            assert torch.equal(forward(model, token, cache), forward(model, token, calm))
        # The decoder alone, after a pass of the whole model was stopped.
        stop(1, other, cache)
        far.decoder(input_ids=other, past_key_values=cache)
        far.decoder(input_ids=other, past_key_values=calm)
        assert torch.equal(forward(model, other[:, :1], cache), forward(model, other[:, :1], calm))
        assert torch.equal(cache.token_ids, calm.token_ids)
        assert cache.token_ids.tolist() == torch.cat([text, other, other, other[:, :1]], 1)[0].tolist()
        one, two = far.receipt(calm), far.receipt(cache)
        assert (one.context_tokens, one.generated_tokens) == (two.context_tokens, two.generated_tokens)


def test_a_stopped_pass_is_forgotten_by_reset_save_and_crop(tmp_path: Path) -> None:
    model, text = make_model("gemma3"), make_prompt(1, tokens=30)["input_ids"]

    def fail(module: Any, args: Any, out: Any) -> None:
        raise KeyboardInterrupt

    def stop(cache: Any) -> None:
        hook = model.model.layers[2].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            forward(model, text, cache)
        hook.remove()

    plain = plain_cache(model)
    forward(model, text, plain)
    expected = forward(model, text[:, :1], plain)
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache()
        forward(model, text, cache)
        stop(cache)
        cache.save(tmp_path / "a")
        assert torch.equal(forward(model, text[:, :1], farkv.load_cache(tmp_path / "a", model)), expected)
        stop(cache)
        cache.reset()
        forward(model, text, cache)
        assert torch.equal(forward(model, text[:, :1], cache), expected)


def test_what_cannot_be_taken_back_is_said() -> None:
    model, prompt = make_model("qwen3_next"), make_prompt(1)["input_ids"]

    def fail(module: Any, args: Any, out: Any) -> None:
        raise Stop

    with farkv.attach(model, InfiniGen(fraction=0.5)) as far:
        cache = far.new_cache()
        hook = model.model.layers[3].register_forward_hook(fail)
        with pytest.raises(Stop):
            forward(model, prompt, cache)
        hook.remove()
        for _ in range(2):
            with pytest.raises(CacheStateError, match=r"layer 0 \(.*\) cannot step back.*start a new cache"):
                forward(model, prompt, cache)
        cache.reset()
        forward(model, prompt, cache)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["drain", "cut", "restore"])
@pytest.mark.parametrize("n_new", [1, 9])
def test_a_take_back_that_fails_is_refused_until_it_succeeds(
    where: str, error: type[BaseException], n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make_model("llama"), make_prompt(1, tokens=30)["input_ids"]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with farkv.attach(model, InfiniGen(fraction=0.4), near="1MiB") as far:
        calm, cache = far.new_cache(), far.new_cache()
        for each in (calm, cache):
            forward(model, text, each)
        engine = cache.engine
        owner: Any = {"drain": engine.store.link, "cut": farkv.engine.undo, "restore": engine.selector}[where]
        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with monkeypatch.context() as patch:
            patch.setattr(owner, "cut_layer" if where == "cut" else where, fail)
            try:
                with pytest.raises(error):
                    forward(model, text[:, :n_new], cache)
            finally:
                hook.remove()
            for ids in (text[:, :1], text):
                with pytest.raises((CacheStateError, KeyboardInterrupt)) as said:
                    forward(model, ids, cache)
                if error is RuntimeError:
                    assert "cannot be taken back" in str(said.value)
            assert cache.get_seq_length() == 30, "of a pass that is not over nothing counts"
        for ids in (text[:, :n_new], text[:, :1]):
            assert torch.equal(forward(model, ids, cache), forward(model, ids, calm))


@pytest.mark.parametrize("method", [SnapKV(), PyramidKV(), H2O(), XKV(fraction=0.3), InfiniGen(fraction=0.4)], ids=repr)
@pytest.mark.parametrize("where", ["prompt", "chunk", "step"])
def test_a_stopped_pass_has_evicted_nothing(method: Any, where: str) -> None:
    model, text = make_model("llama"), make_prompt(1, tokens=150)["input_ids"]
    pieces = text.split([70, 40, *[1] * 40], 1)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with farkv.attach(model, method) as far:
        calm, cache = far.new_cache(), far.new_cache()
        for each in (calm, cache):
            each.engine.announce_prompt(110, 2048)
        for i, ids in enumerate(pieces):
            if i == {"prompt": 0, "chunk": 1}.get(where, i if i > 1 else -1):
                hook = model.model.layers[i % 4].register_forward_hook(fail)
                with pytest.raises(KeyboardInterrupt):
                    forward(model, ids, cache)
                hook.remove()
            assert torch.equal(forward(model, ids, cache), forward(model, ids, calm)), i
        assert far.receipt(cache).evicted_records == far.receipt(calm).evicted_records


def test_layers_that_hold_different_tokens_refuse_to_go_on() -> None:
    model, text = make_model("llama"), make_prompt(1, tokens=30)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        cache = far.new_cache()
        forward(model, text, cache)
        cache.layers[2].crop(-1)
        with pytest.raises(CacheStateError, match="layer 0 holds 30 and layer 2 holds 29; start a new cache"):
            forward(model, text[:, :1], cache)


def test_a_full_pool_stays_of_use_after_a_stopped_pass() -> None:
    model, text = make_model("llama"), make_prompt(1, tokens=400)["input_ids"]

    def fail(module: Any, args: Any, out: Any) -> None:
        raise Stop

    with farkv.attach(model, InfiniGen(fraction=0.3), host="150KiB", evict="lru") as far:
        cache = far.new_cache()
        for i, piece in enumerate(text.split(50, 1)):
            hook = model.model.layers[i % 4].register_forward_hook(fail)
            with pytest.raises(Stop):
                forward(model, piece, cache)
            hook.remove()
            assert forward(model, piece, cache).isfinite().all()
        assert cache.get_seq_length() == 400
        assert far.receipt(cache).kv_bytes.host_peak <= 150 * 1024
        assert far.receipt(cache).evicted_records > 0


def test_a_verified_step_that_fails_is_compared_with_nothing() -> None:
    model, prompt = make_model("llama"), make_prompt(1)["input_ids"]

    def fail(module: Any, args: Any, out: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Stop

    calls: list[int] = []
    with farkv.attach(model, InfiniGen(fraction=0.4)) as far:
        cache = far.new_cache(verify=1)
        forward(model, prompt, cache)
        hook = model.model.layers[3].register_forward_hook(fail)
        # The dense pass goes well, the step itself does not.
        with pytest.raises(Stop):
            forward(model, prompt[:, :1], cache)
        hook.remove()
        forward(model, prompt[:, :1], cache)
        assert far.receipt(cache).quality is None
        assert far.receipt(cache).time.tokens_per_s > 0
