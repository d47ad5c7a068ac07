"""The logic of `benchmarks/matrix_all.py`: configurations made small, models judged, rows made a table.

Its models run in CI by themselves, a tenth every day (`.ci/run`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, GptOssConfig, LlamaConfig, Qwen3NextConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import matrix_models  # noqa: E402
import matrix_play  # noqa: E402
import matrix_table  # noqa: E402
from matrix_all import choose_part, run_child, write_rows  # noqa: E402


def test_sizes_are_made_small_by_their_names() -> None:
    small = matrix_models.shrink(LlamaConfig(eos_token_id=2))
    assert (small["hidden_size"], small["num_hidden_layers"], small["vocab_size"]) == (64, 4, matrix_models.VOCAB)
    assert small["num_attention_heads"] == small["num_key_value_heads"] == 4, "as many as the large one has"
    assert matrix_models.shrink(LlamaConfig(num_key_value_heads=8))["num_key_value_heads"] == 2
    assert small["rms_norm_eps"] == LlamaConfig().rms_norm_eps
    assert matrix_models.LAST <= small["eos_token_id"] < matrix_models.VOCAB, "no prompt has it"


@pytest.mark.parametrize("config", [GptOssConfig(), Qwen3NextConfig()])
def test_a_tiny_model_has_a_layer_of_each_kind_and_two_of_full_attention(config: Any) -> None:
    small = matrix_models.shrink(config)
    assert set(small["layer_types"]) == set(config.layer_types)
    assert small["layer_types"].count("full_attention") >= 2
    assert len(small["layer_types"]) == small["num_hidden_layers"]


def test_the_parts_of_a_configuration_are_made_small_too() -> None:
    small = matrix_models.shrink(Gemma3Config())
    assert small["text_config"]["hidden_size"] == small["vision_config"]["hidden_size"] == 64


def test_numbers_of_layers_become_those_of_the_tiny_model() -> None:
    config = LlamaConfig(num_hidden_layers=8)
    config.layer_types = ["a", "b", "b", "b", "b", "b", "b", "full_attention"]
    chosen = matrix_models.choose_layers(config)
    assert chosen == [0, 1, 2, 7]
    assert matrix_models.lists_layers([0, 3, 5]) and not matrix_models.lists_layers([2, 2])


def test_ten_seeds_in_a_row_are_all_models() -> None:
    names = matrix_models.list_names()
    parts = [choose_part(names, 10, seed) for seed in range(330, 340)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert choose_part(names, 10, 330) != choose_part(names, 10, 340)
    assert choose_part(names, 1, 7) == choose_part(names, 1, 7)


@pytest.fixture(scope="module")
def llama() -> Any:
    return matrix_models.make_model("llama")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda made: made, "equal"),
        (lambda made: [*made[:-1], made[-1] + 1], "FAULT: calls: off by 1"),
        (lambda made: made[:-1], "FAULT: calls: off by 0"),
        (lambda made: "plain: no: cannot", "plain: no: cannot"),
    ],
)
def test_another_number_is_a_fault(llama: Any, change: Any, word: str) -> None:
    plain = matrix_play.play("calls", llama, DynamicCache(config=llama.config))
    found = matrix_play.judge("calls", llama, lambda: DynamicCache(config=llama.config), change(plain))
    assert found.startswith(word)


def test_another_error_than_ours_is_a_fault(llama: Any) -> None:
    plain = [torch.ones(1)]
    assert matrix_play.judge("calls", llama, lambda: 1 / 0, plain).startswith("FAULT: calls: ZeroDivisionError")

    def refuse() -> None:
        raise matrix_play.FarKVError("no")

    assert matrix_play.judge("calls", llama, refuse, plain) == "refused: FarKVError: no"


def test_a_cache_that_was_passed_over_is_a_fault(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = matrix_play.play("calls", llama, None)
    monkeypatch.setitem(matrix_play.PLAYS, "calls", lambda *_: plain)
    with matrix_play.farkv.attach(llama, matrix_play.Full()) as far:
        found = matrix_play.judge("calls", llama, far.new_cache, plain)
    assert found == "FAULT: calls: layers hold [0, 0, 0, 0] tokens of 29"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_ends_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import matrix_all

    monkeypatch.setattr(matrix_all, "make_row", lambda name, attention: matrix_all.os._exit(3))
    row = run_child("llama")
    assert row == {"model": "llama", "crash": "the child ended with 3"}
    assert matrix_table.judge_row(row) == "FAULT"
    monkeypatch.setattr(matrix_all, "make_row", lambda name, attention: matrix_all.time.sleep(60))
    assert run_child("llama", limit_s=0.2)["crash"].startswith("took more than")
    monkeypatch.setattr(matrix_all, "make_row", lambda name, attention: {"model": name, "built": "equal"})
    assert run_child("llama")["built"] == "equal"


def make_row(model: str, **cells: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(matrix_table.COLUMNS, "equal")
    more = {"transformers": "5.0.0", "torch": "2.0", "revision": "abc"}
    return {"model": model, "built": "equal", "kinds": {"managed": 2, "conv": 1}, "managed": 2, **row, **cells, **more}


def test_rows_become_a_table_with_counts(tmp_path: Path) -> None:
    rows = [
        make_row("b"),
        make_row("a", full="refused: CacheStateError: no", beams="FAULT: beams: off by 1"),
        {**make_row("c"), **dict.fromkeys(matrix_table.COLUMNS[1:], "refused: X: no | never")},
        {
            "model": "d",
            "built": "plain: no: ImportError: timm",
            "transformers": "5.0.0",
            "torch": "2.0",
            "revision": "x",
        },
    ]
    assert [matrix_table.judge_row(row) for row in rows] == ["equal", "FAULT", "refused", "plain: no"]
    summary = matrix_table.format_summary(rows)
    assert summary.startswith(
        "4 configurations: 1 equal to the plain model, bit for bit (1 of them with managed layers)"
    )
    assert "1 refused in words, 1 of which the plain model itself" in summary and "1 faults" in summary
    lines = matrix_table.format_table(rows).splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == ["a", "b", "c", "d"]
    assert lines[0].startswith("| `a` | 2; 1 conv left | equal | refused | equal | equal | equal | FAULT |")
    assert "X: no / never" in lines[2] and "plain: no: ImportError: timm" in lines[3]
    path = tmp_path / "out" / "5.0.0.jsonl"
    write_rows(path, rows[:2])
    write_rows(path, [make_row("a"), rows[2]])
    assert [matrix_table.judge_row(row) for row in matrix_table.read_rows(path)] == ["equal", "equal", "refused"]
