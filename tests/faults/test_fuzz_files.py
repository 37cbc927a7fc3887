"""Files and words by the thousand, damaged at random: a value, or one sentence of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzzing import fuzz


@pytest.mark.fault("Z2")
@pytest.mark.parametrize("target", ["hdf5", "cooc", "auto", "fresh"])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_import_is_refused_in_a_sentence(
    target: str, tries: Callable[[int], None]
) -> None:
    """HDF5, and every file of a run: records, weights, what it held out."""
    assert min(fuzz("fuzzed_files", target, 20_000).values()) > 0
    tries(20_000)


@pytest.mark.fault("Z3")
@pytest.mark.parametrize("target", [".csv", ".tab", ".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_damaged_file_of_texts_is_refused_in_a_sentence(
    target: str, tries: Callable[[int], None]
) -> None:
    """Whatever the bytes, rows come out with a text each, or the reason why not."""
    assert min(fuzz("fuzzed_files", target, 50_000).values()) > 0
    tries(50_000)


@pytest.mark.fault("Z4")
@pytest.mark.parametrize("target", ["layers", "templates", "prompts", "labels", "names"])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_typed_is_understood_or_refused_in_a_sentence(
    target: str, tries: Callable[[int], None]
) -> None:
    """The small languages of options have no third way."""
    assert min(fuzz("fuzzed_words", target, 100_000).values()) > 0
    tries(100_000)


@pytest.mark.fault("Z2", "Z3")
def test_a_few_damaged_files_are_refused_in_a_sentence(tries: Callable[[int], None]) -> None:
    """Imports and texts of every kind in turn."""
    assert min(fuzz("fuzzed_files", "hdf5,auto,.csv,.jsonl,.parquet,.arrow", 300).values()) > 0
    tries(300)


@pytest.mark.fault("Z4")
def test_a_few_words_are_understood_or_refused_in_a_sentence(tries: Callable[[int], None]) -> None:
    """Layers, templates, prompts, labels and names in turn."""
    assert min(fuzz("fuzzed_words", "layers,templates,prompts,labels,names", 3_000).values()) > 0
    tries(3_000)
