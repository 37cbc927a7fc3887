"""Files and words by the thousand, damaged at random: a value, or one sentence of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from fuzzing import fuzz
from toy_cache import write_toy

from llmembed.cache_format.tools import convert
from llmembed.common.errors import CacheFormatError, ConfigError, DataError
from llmembed.extract import ExtractConfig
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import load_corpus
from llmembed.extract.texts.templates import template_fields


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


@pytest.mark.fault("Z2")
def test_an_object_of_hdf5_that_h5py_cannot_open_is_told(tmp_path: Path) -> None:
    """A broken object header ends in h5py's KeyError, and in our sentence."""
    write_toy(tmp_path / "toy.zarr", 70)
    convert(tmp_path / "toy.zarr", tmp_path / "toy.h5")
    with h5py.File(tmp_path / "toy.h5") as file:
        at = h5py.h5o.get_info(file["llmembed_documents"].id).addr
    content = bytearray((tmp_path / "toy.h5").read_bytes())
    content[at] ^= 0x40  # the version of the header
    (tmp_path / "toy.h5").write_bytes(content)
    with pytest.raises(CacheFormatError, match=r"is not a readable HDF5 file: .*Convert the cache"):
        convert(tmp_path / "toy.h5", tmp_path / "back.zarr")


@pytest.mark.fault("Z3")
def test_lists_of_labels_that_are_all_empty_are_told(tmp_path: Path) -> None:
    """Without a single label there is no class."""
    (tmp_path / "toy.jsonl").write_text('{"text": "a", "labels": []}\n' * 2)
    with pytest.raises(DataError, match="no row of any split has a label"):
        load_corpus(DatasetOptions(str(tmp_path / "toy.jsonl")))


@pytest.mark.fault("Z4")
def test_a_mark_that_is_the_only_label_is_told(tmp_path: Path) -> None:
    """Where every text has what --unlabelled names, no class is left."""
    (tmp_path / "toy.csv").write_text("text,labels\na,?\nb,?\n")
    options = DatasetOptions(str(tmp_path / "toy.csv"), label_separator=";", unlabelled="?")
    with pytest.raises(DataError, match="no row of any split has a label"):
        load_corpus(options)


@pytest.mark.fault("Z4")
def test_options_that_are_no_unicode_are_told() -> None:
    """Bytes of a terminal that are not UTF-8 reach Python as lone surrogates."""
    asked = {"model": "m", "dataset": "d", "layers": "1"}
    with pytest.raises(ConfigError, match=r"--label-separator is '\\udcff'"):
        ExtractConfig(**asked, label_separator="\udcff")
    with pytest.raises(ConfigError, match=r"template .* holds a lone surrogate"):
        template_fields("{text}\udcff")


def test_no_error_has_a_second_line() -> None:
    """What a library says may have many."""
    assert str(DataError("line\nforged\x1b[2J\r")) == r"line\nforged\x1b[2J\r"
