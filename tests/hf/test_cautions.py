"""What is said before a text is read: positions that a model has not, a chat template that is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from farkv.demo import MODEL_PATH
from farkv.errors import InputError
from farkv.hf.cautions import check_positions, check_template
from tests.models import make_model


def test_a_context_beyond_the_positions_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")  # of 512 positions
    check_positions(model, 500, 12)
    assert not caplog.records
    check_positions(model, 1500, 13)
    (record,) = caplog.records
    assert record.getMessage().startswith("context: 1,500 tokens of prompt and up to 13 of answer, and the model was")
    assert "made for 512 (max_position_embeddings)" in record.getMessage()


def test_a_table_of_positions_ends_where_it_ends() -> None:
    model = make_model("opt")
    check_positions(model, 500, 12)
    with pytest.raises(InputError, match="the model's table of positions has 512; expected no more together"):
        check_positions(model, 500, 13)


@pytest.mark.parametrize(
    ("template", "name", "said"), [(None, "x/y", 1), ("", "", 1), ("{{ 1 }}", "x/y", 0), (None, str(MODEL_PATH), 0)]
)
def test_a_missing_template_is_said_but_of_the_demo(
    template: str | None, name: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    check_template(SimpleNamespace(chat_template=template, name_or_path=name))
    assert len(caplog.records) == said
    assert all("continued as plain text" in record.getMessage() for record in caplog.records)
