"""The harness's own runs, with its Hugging Face model and with ours, on local tasks."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from farkv.account import Account, LayerCount
from farkv.demo import MODEL_PATH
from farkv.errors import CacheStateError, ConfigError, InputError
from tests.models import make_model

MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'farkv[lm-eval]' accelerate"),
    # Theirs, of the harness and what it imports.
    pytest.mark.filterwarnings("ignore"),
]
TASKS = {
    "far_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}print({{name}})  # ",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
    "far_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}print({{name}})  #",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "metric_list": [{"metric": "acc"}],
    },
    "far_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text[:70]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def write_tasks(folder: Path) -> Path:
    rng, lines = random.Random(0), []
    words = ["red", "blue", "tall", "cold", "wide", "deep"]
    for _ in range(2):
        names = [f"{a}_{b}" for a in rng.sample(words, 2) for b in ("stone", "leaf")]
        values = [str(n) for n in rng.sample(range(1000, 10_000), 4)]
        filler = "def add_{}(x):\n    return x + {}\n"
        text = "".join(
            f"{n} = {v}\n{filler.format(rng.randint(0, 99), rng.randint(0, 99))}"
            for n, v in zip(names, values, strict=True)
        )
        lines.append(json.dumps({"text": text, "name": names[2], "answer": values[2], "choices": values[1:3]}))
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, "test_split": "test", **task}))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", vocab_size=2048, num_hidden_layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_PATH / name, folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    with pytest.MonkeyPatch.context() as patch:
        # Read when `datasets` is imported: nothing is looked for, nothing is left behind.
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def evaluate(folder: Path, model: str, pretrained: str, **arguments: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import farkv.evals.lm_eval  # noqa: F401

    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": pretrained, "dtype": "float32", "device": "cpu", **arguments},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


def responses(results: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [r[0] for s in samples for r in s["resps"]]


@pytest.fixture(scope="module")
def reference(tasks: Path, pretrained: str) -> dict[str, Any]:
    return evaluate(tasks, "hf", pretrained, batch_size=4)


@pytest.fixture(scope="module")
def plain(pretrained: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(pretrained)


def score_step_by_step(plain: tuple[Any, Any], context: list[int], tokens: list[int]) -> float:
    """Hugging Face's own cache, its own decode steps."""
    model, cache = plain[0], DynamicCache()
    if context[:-1]:
        model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache)
    logs = []
    for given, goal in zip([context[-1], *tokens[:-1]], tokens, strict=True):
        logits = model(input_ids=torch.tensor([[given]]), past_key_values=cache).logits[:, -1]
        logs.append(logits.log_softmax(-1)[:, goal])
    return float(torch.cat(logs).sum())


@torch.no_grad()
def scores_step_by_step(plain: tuple[Any, Any], results: dict[str, Any]) -> dict[str, list[float]]:
    encode, found = plain[1].encode, {"far_choice": [], "far_text": []}
    for sample in sorted(results["samples"]["far_choice"], key=lambda s: s["doc_id"]):
        for context, continuation in sample["arguments"]:
            before = encode(context)
            found["far_choice"].append(score_step_by_step(plain, before, encode(context + continuation)[len(before) :]))
    for sample in sorted(results["samples"]["far_text"], key=lambda s: s["doc_id"]):
        found["far_text"].append(score_step_by_step(plain, [0], encode(sample["arguments"][0][0])))
    return found


def logs_of(results: dict[str, Any]) -> dict[str, list[float]]:
    return {
        "far_choice": [r[0] for r in responses(results, "far_choice")],
        "far_text": list(responses(results, "far_text")),
    }


@pytest.mark.parametrize("arguments", [{"method": "full"}, {"method": "infinigen", "fraction": 1.0}], ids=str)
def test_a_whole_cache_answers_as_their_own_model_does(
    tasks: Path, pretrained: str, reference: dict[str, Any], plain: tuple[Any, Any], arguments: dict[str, Any]
) -> None:
    ours = evaluate(tasks, "farkv", pretrained, **arguments)
    assert responses(ours, "far_answer") == responses(reference, "far_answer")
    for task, metric in [("far_answer", "exact_match,none"), ("far_choice", "acc,none")]:
        assert ours["results"][task][metric] == reference["results"][task][metric]
    assert [r[1] for r in responses(ours, "far_choice")] == [r[1] for r in responses(reference, "far_choice")]
    theirs, steps, logs = logs_of(reference), scores_step_by_step(plain, reference), logs_of(ours)
    for task in logs:
        # Their batched pass and their own decode steps differ by this much; ours are those steps.
        error = max(abs(a - b) for a, b in zip(theirs[task], steps[task], strict=True))
        assert error < 1e-3
        assert max(abs(a - b) for a, b in zip(logs[task], theirs[task], strict=True)) <= 2 * error
        assert max(abs(a - b) for a, b in zip(logs[task], steps[task], strict=True)) <= error
    assert ours["config"]["farkv"]["read_fraction"] == 1.0


def test_a_small_fraction_shows_in_every_kind_of_request(
    tasks: Path, pretrained: str, reference: dict[str, Any]
) -> None:
    ours = evaluate(tasks, "farkv", pretrained, method="infinigen", fraction=0.05)
    theirs, logs = logs_of(reference), logs_of(ours)
    for task in logs:
        assert all(abs(a - b) > 0.01 for a, b in zip(logs[task], theirs[task], strict=True))
    assert responses(ours, "far_answer") != responses(reference, "far_answer")
    read = ours["config"]["farkv"]
    # Of a text's first tokens one record is more than the fraction.
    assert 0 < read["read_fraction"] < 0.25
    assert read["requests"] == 2 + 4 + 2
    assert read["unproven"] == read["dense_tokens"] == 0


# --- requests, without tasks ------------------------------------------------------------------------------------


@pytest.fixture
def make_lm(tasks: Path, pretrained: str) -> Any:
    from farkv.evals.lm_eval import FarKVLM

    return lambda **given: FarKVLM(**{"pretrained": pretrained, "dtype": "float32", **given})


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


TEXT = "".join(f"name_{i} = {i * 37 % 1000}\n" for i in range(8))


def test_windows_and_cut_contexts_are_theirs(make_lm: Any, pretrained: str) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(pretrained=pretrained, dtype="float32", device="cpu", max_length=25)
    pairs = requests("loglikelihood", (TEXT, "name_3 ="), ("", TEXT[:20]), (TEXT, " 7"), (TEXT, " 37"))
    texts = requests("loglikelihood_rolling", (TEXT,), ("",))
    for given in ({}, {"rolling_prefill": 0.6}):
        ours = make_lm(method="full", max_length=25, **given)
        for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
            assert one == (pytest.approx(other[0], abs=1e-3), other[1])
        assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=2e-3)
        assert (ours.tally.dense_tokens > 0) == bool(given)
    answers = requests("generate_until", (TEXT, {"until": ["\n"], "max_gen_toks": 9}))
    assert ours.generate_until(answers) == theirs.generate_until(answers)


@pytest.mark.parametrize("method", ["infinigen", "xkv", "h2o", "random"])
def test_continuations_of_one_context_do_not_meet(make_lm: Any, method: str) -> None:
    from farkv.evals.lm_eval.score import score_continuations

    lm = make_lm(method=method, fraction=0.3)
    prompt = lm.tok_encode(TEXT)
    choices = [lm.tok_encode(s) for s in ("name_3 = 111\n", "name_5 = 185\n", " 7")]
    copied = [s[:2] for s in score_continuations(lm.far, prompt, choices, copies=True)]
    anew = [s[:2] for s in score_continuations(lm.far, prompt, choices, copies=False)]
    alone = [next(score_continuations(lm.far, prompt, [c], copies=True))[:2] for c in choices]
    assert copied == anew == alone


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("method", ["infinigen", "xkv", "snapkv", "pyramidkv", "h2o"])
def test_every_token_of_a_window_is_scored_once(make_lm: Any, method: str, share: float) -> None:
    lm = make_lm(method=method, fraction=0.3, rolling_prefill=share)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    n = len(lm.tok_encode(TEXT))
    assert lm.tally.dense_tokens == int(share * n)
    # A cache's first token has nothing to read.
    assert lm.tally.steps == n - max(1, int(share * n))
    assert lm.tally.to_dict()["read_fraction"] < 0.5


def test_a_limit_holds_for_each_request(make_lm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = requests("loglikelihood", (TEXT, "name_3 ="), (TEXT, "name_4 ="))
    whole = make_lm(method="full").loglikelihood(pairs)
    lm = make_lm(method="full", near="8MiB", host="8MiB")
    assert not lm.arguments.copies
    assert [r[0] for r in lm.loglikelihood(pairs)] == pytest.approx([r[0] for r in whole], abs=1e-4)
    assert "farkv full: read fraction 1.0000" in capsys.readouterr().err


def test_a_conversation_is_written_in_the_model_s_template(make_lm: Any) -> None:
    lm = make_lm()
    system = [{"role": "system", "content": "Be brief."}]
    asked = [{"role": "user", "content": "Who?"}]
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert lm.apply_chat_template(asked) == "<user>Who?<assistant>"
    assert lm.apply_chat_template(system + asked) == "<user>Who?<assistant>"
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert "/" not in lm.tokenizer_name


def test_reading_everything_is_an_error_where_less_was_promised() -> None:
    from farkv.evals.lm_eval.tally import Tally

    whole = Account(layers={0: LayerCount(read=10.0, held=10.0)}, context_tokens=100, decode_steps=2)
    with pytest.raises(CacheStateError, match="expected decode steps to read less"):
        Tally(is_sparse=True).add(whole)
    tally = Tally(is_sparse=False)
    tally.add(whole)
    assert tally.unproven == 0
    tally = Tally(is_sparse=True)
    tally.add(Account(layers=whole.layers, context_tokens=20, decode_steps=2))
    tally.add(Account(context_tokens=100))
    assert tally.unproven == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fractoin": 0.1}, "unknown fractoin; expected some of pretrained, method, fraction"),
        ({"pretrained": ""}, "expected pretrained=MODEL"),
        ({"batch_size": 4}, "expected 1 or auto, because each text has its own cache, got 4"),
        ({"method": "magic"}, "method: expected one of full"),
        ({"fraction": 1.5}, "expected a number in"),
        ({"rolling_prefill": 1.0}, "expected a fraction"),
        ({"max_length": 0}, "max_length: expected a number of tokens, got 0"),
        ({"plan": "p.json", "method": "window"}, "with method infinigen or xkv"),
        ({"method": "infinigen-far"}, "add near=2GiB"),
        ({"device": "abacus"}, "device: expected auto"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_clear_error(make_lm: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_lm(**given)


def test_the_harness_s_own_default_device_is_any(make_lm: Any) -> None:
    lm = make_lm(device="cuda:0", batch_size="auto", max_batch_size=64, profile=None)
    assert lm.batch_size == 1
    assert lm.device == lm.far.device


def test_requests_that_cannot_be_answered_say_why(make_lm: Any) -> None:
    lm = make_lm(max_length=20)
    with pytest.raises(InputError, match="continuation of 1 to 20 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("a", TEXT)))
    with pytest.raises(InputError, match="fewer than 20 tokens to generate"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 30})))
    with pytest.raises(ConfigError, match="num_beams expected 1"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 3, "num_beams": 2})))
    with pytest.raises(InputError, match="at least one token"):
        lm.generate_until(requests("generate_until", ("", {"max_gen_toks": 3})))


def test_sampling_is_seeded_and_short_texts_are_unproven(make_lm: Any) -> None:
    lm, said = make_lm(method="window", fraction=0.5), []
    asked = requests("generate_until", ("x = 1\n", {"max_gen_toks": 5, "do_sample": True, "temperature": 1.5}))
    for _ in range(2):
        torch.manual_seed(3)
        said += lm.generate_until(asked)
    assert said[0] == said[1]
    lm = make_lm(method="xkv", fraction=0.5)
    lm.generate_until(requests("generate_until", ("x =", {"max_gen_toks": 2})))
    assert lm.tally.unproven == 1


# --- the command line -------------------------------------------------------------------------------------------


def test_the_plug_in_group_names_the_model() -> None:
    from farkv.evals.lm_eval import FarKVLM

    (point,) = entry_points(group="lm_eval.models", name="farkv")
    assert point.load() is FarKVLM
    # The harness lets a class take the place of a plug-in's name only where both say the same.
    assert point.value == f"{FarKVLM.__module__}:{FarKVLM.__name__}"


@pytest.mark.slow
def test_the_command_line_runs_a_task(tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "farkv.evals.lm_eval", "--model", "farkv", "--tasks", "far_choice"]
    command += ["--model_args", "pretrained=demo,method=infinigen,fraction=0.1", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path), "--limit", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "far_choice" in done.stdout
    assert "farkv infinigen: read fraction 0." in done.stderr
    (written,) = tmp_path.glob("*/results_*.json")
    read = json.loads(written.read_text())["config"]["farkv"]
    assert read["requests"] == 2
    assert 0 < read["read_fraction"] <= 0.1
