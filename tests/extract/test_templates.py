from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmembed.common.errors import ConfigError, ModelError
from llmembed.extract.backbones.recipe import Recipe
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts import SEPARATOR, fill

RECORD = {"model": "m", "max_length": 8, "compute_dtype": "float32", "dtype": "float16"}


@pytest.mark.parametrize(
    "template",
    [
        "{text:>1000000000}",
        "{text:d}",
        "{text!x}",
        "{text!r}",
        "{text:{text}}",
        "{text.__class__}",
        "{text[0]}",
        "{0}",
        "{}",
        "{text} {text}",
        "{text_a}",
        "{text_a} {text_b!s}",
        "no place",
        "{{text}}",
    ],
)
def test_a_field_that_is_not_bare_is_refused(template: str) -> None:
    """Widths, conversions, attributes and other names, in options and in foreign records."""
    message = re.escape(f"template {template!r} has the fields ")
    with pytest.raises(ConfigError, match=message + ".*it must have {text}, once and alone"):
        ExtractConfig(model="m", layers="1", template=template)
    with pytest.raises(ModelError, match=message):
        Recipe.from_record({**RECORD, "template": template})


@pytest.mark.parametrize("template", ["{text", "text}", "{text!}"])
def test_a_brace_alone_is_refused(template: str) -> None:
    """What is no format string says how a brace is written."""
    with pytest.raises(ConfigError, match=r"is not a format string .* twice, as in {{, and the"):
        ExtractConfig(model="m", layers="1", template=template)


def test_a_recorded_template_that_is_no_text_is_refused() -> None:
    """A foreign cache may record anything."""
    with pytest.raises(ModelError, match="template 7 is not a format string"):
        Recipe.from_record({**RECORD, "template": 7})


@given(
    st.text(string.ascii_letters + "{}! ", max_size=9),
    st.text(string.ascii_letters + "{}! ", max_size=9),
    st.text(max_size=20),
    st.booleans(),
)
def test_braces_written_twice_stay(before: str, after: str, text: str, pair: bool) -> None:
    """Whatever stands around the fields stands around the texts, and texts are never formatted."""
    wrapped = [part.replace("{", "{{").replace("}", "}}") for part in (before, after)]
    field = "{text_a}|{text_b}" if pair else "{text}"
    template = field.join(wrapped)
    ExtractConfig(model="m", layers="1", template=template)
    text = text.replace(SEPARATOR, "")
    given_text, filled = (f"{text}{SEPARATOR}{text}", f"{text}|{text}") if pair else (text, text)
    assert fill(template, [given_text], text_pair=pair) == [[f"{before}{filled}{after}"]]
    Recipe.from_record({**RECORD, "template": template, "text_pair": pair})
