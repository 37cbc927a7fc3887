"""A run's folder from anywhere: whatever its files are, loading it ends at once, in a known way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clustered import write_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmembed.common.errors import LLMEmbedError, RunFormatError, RunNotFoundError
from llmembed.train import FitConfig, Run, fit, load_run

FILES = ("config.json", "metrics.json", "model.safetensors")
IRREGULAR: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
}
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([10**400, 2**63, 0, -1])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fitted")
    cache = write_cache(folder / "tiny.zarr")
    return fit(FitConfig(cache=str(cache), fusion="concat", output=str(folder / "run")))


@pytest.fixture
def run(fitted: Run, tmp_path: Path) -> Run:
    return dataclasses.replace(fitted, path=shutil.copytree(fitted.path, tmp_path / "run"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_refused(run: Run, name: str, kind: str) -> None:
    """A FIFO, a folder or a device in place of a file is named, and never waited for."""
    (run.path / name).unlink()
    IRREGULAR[kind](run.path / name)
    with pytest.raises(RunFormatError, match=rf"{name} is a {kind}, not a regular file"):
        load_run(run.path)


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1e400}', "the number 1e400 is not finite"),
        ('{"a": NaN}', "the number NaN is not finite"),
        ('{"a": -Infinity}', "the number -Infinity is not finite"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"a": ' * 100_000, "recursion|Expecting"),
        ("[]", "it holds no object"),
    ],
)
def test_json_that_no_run_has(run: Run, name: str, text: str, message: str) -> None:
    """Numbers beyond all bounds and deep nesting are refused in one sentence."""
    (run.path / name).write_text(text)
    with pytest.raises(RunFormatError, match=rf"(?s){name} is damaged.*{message}"):
        load_run(run.path)


def test_a_file_of_a_terabyte_is_not_read(run: Run) -> None:
    """A record with a hole of a terabyte takes no more memory than the bound."""
    with (run.path / "metrics.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmembed.train.runs.record._MAX_BYTES", 1 << 20)
        with pytest.raises(RunFormatError, match="has more than 1,048,576 bytes"):
            load_run(run.path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("architecture", "widths", 0), 1e300, "disagree"),
        (("architecture", "n_classes"), 2**62, "n_classes lies outside of"),
        (("architecture", "n_classes"), True, "n_classes is of type bool"),
        (("architecture", "fusion"), ["concat"], "fusion is of type list"),
        (("architecture", "dropout"), 2, "dropout lies outside of"),
        (("features", 0, "layer"), -1, "layer lies outside of"),
        (("features", 0, "hidden_size"), 2**40, "hidden_size lies outside of"),
        (("features", 0, "source"), "nobody", "source 'nobody' of a feature is not among"),
        (("labels", 0), 5, "a label is of type int"),
        (("sources", "tiny", "recipe"), None, "recipe is of type NoneType"),
        (("cache",), [], "cache is of type list"),
        (("features",), [], "it has 0 features"),
        (("labels",), "abc", "labels is of type str"),
    ],
)
def test_values_that_no_record_has(
    run: Run, where: tuple[Any, ...], value: object, message: str
) -> None:
    """A value of another type or beyond its bounds is named."""
    config = json.loads((run.path / "config.json").read_text())
    _set(config, where, value)
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFormatError, match=rf"config\.json is damaged.*{message}"):
        load_run(run.path)


@pytest.mark.parametrize("part", ["fusion", "head"])
def test_a_package_that_is_missing_is_named(run: Run, part: str) -> None:
    """A run whose fusion or head a package brings says which, where it is not installed."""
    config = json.loads((run.path / "config.json").read_text())
    config["architecture"][part] = "nonesuch"
    config["brought_by"] = {part: "loud 1.0"}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFormatError, match=rf"{part} 'nonesuch' of the package loud 1\.0, which"):
        load_run(run.path)


FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.data())
def test_any_record_loads_or_is_a_known_error(run: Run, data: st.DataObject) -> None:
    """Whatever a part of config.json is replaced by, nothing outside the tree of errors comes."""
    with contextlib.suppress(LLMEmbedError):
        loaded = load_run(_changed(run.path, data, ()))
        assert loaded.labels
        assert loaded.features
        loaded.predict(["a text"])


@pytest.mark.filterwarnings("ignore::llmembed.common.errors.LLMEmbedWarning")
@FUZZ
@given(data=st.data())
def test_any_recipe_predicts_or_is_a_known_error(
    texts_run: Run, tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever a part of a recipe, a fingerprint or the features is replaced by, the same holds."""
    path = shutil.copytree(texts_run.path, tmp_path / "run", dirs_exist_ok=True)
    part = data.draw(st.sampled_from(["sources", "features", "architecture"]))
    with contextlib.suppress(LLMEmbedError):
        assert load_run(_changed(path, data, (part,))).predict(["w1 w2", ""])


def _changed(path: Path, data: st.DataObject, within: tuple[Any, ...]) -> Path:
    """Replace something in the record of a run by anything; the next example begins anew."""
    file, original = path / "config.json", path / "original.json"
    if not original.exists():
        shutil.copy(file, original)
    config = json.loads(original.read_text())
    places = [place for place in _places(config) if place[: len(within)] == within]
    _set(config, data.draw(st.sampled_from(places)), data.draw(VALUES))
    file.write_text(json.dumps(config))
    return path


def _places(value: object, at: tuple[Any, ...] = ()) -> Any:
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for key, part in parts:
        yield (*at, key)
        yield from _places(part, (*at, key))


def _set(document: Any, where: tuple[Any, ...], value: object) -> None:
    for key in where[:-1]:
        document = document[key]
    document[where[-1]] = value


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\x1b[2J"])
def test_paths_that_cannot_be(path: str) -> None:
    """A path with NUL, of 5,000 characters or with control characters is no run, and is escaped."""
    with pytest.raises(RunNotFoundError, match="is not a folder, so there is no run") as caught:
        load_run(path)
    assert str(caught.value).isprintable()


def test_weights_of_another_type(run: Run) -> None:
    """Weights that are no float32 are refused."""
    from safetensors.torch import load_file, save_file

    path = run.path / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path)
    with pytest.raises(RunFormatError, match=r"is of type torch\.float16"):
        load_run(run.path)
