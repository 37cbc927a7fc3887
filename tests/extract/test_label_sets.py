"""Several labels a text, weights and groups, from a data set into the cache."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from toy_cache import tree
from toy_model import toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.stores import open_store
from llmembed.cache_format.tools import finalize, verify
from llmembed.common.errors import (
    CacheMismatchError,
    ConfigError,
    DataError,
    LLMEmbedWarning,
)
from llmembed.extract import ExtractConfig, extract
from llmembed.extract.cli import main
from llmembed.extract.dry_run import plan_extraction
from llmembed.extract.features.recheck import recheck
from llmembed.extract.texts import DatasetOptions
from llmembed.extract.texts.corpora import Corpus, Examples, load_corpus
from llmembed.extract.texts.label_sets import from_lists
from llmembed.train.reports.texts import find_texts

LABELS = ("a", "b", "c")
SETS = st.lists(st.sets(st.sampled_from(LABELS)), min_size=1, max_size=40).filter(
    lambda sets: len(set().union(*sets)) > 1
)


def write(path: Path, **columns: Any) -> Path:
    n_rows = len(next(iter(columns.values())))
    texts = [f"text {row}" for row in range(n_rows)]
    pyarrow.parquet.write_table(pa.table({"text": texts} | columns), path)
    return path


def load(path: Path, **options: Any) -> Corpus:
    return load_corpus(DatasetOptions(str(path), **options))


def sets_of(corpus: Corpus, split: str = "train") -> list[set[str]]:
    found = corpus.splits[split].label_sets
    assert found is not None
    return [{corpus.labels[k] for k in np.flatnonzero(row)} for row in found]


@pytest.mark.filterwarnings("ignore:no label of column .* holds .;. that --label-separator names")
@hypothesis_settings(deadline=None, max_examples=30)
@given(sets=SETS)
def test_every_way_of_writing_labels_is_read_alike(
    tmp_path_factory: pytest.TempPathFactory, sets: list[set[str]]
) -> None:
    """Lists in Parquet and JSON, a separator, and columns of 0 and 1 give each text its own set."""
    folder = tmp_path_factory.mktemp("ways")
    lists = [sorted(labels) for labels in sets]
    write(folder / "lists.parquet", label=lists)
    rows = ({"text": "t", "label": labels} for labels in lists)
    (folder / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder / "joined.parquet", label=["; ".join(labels) for labels in lists])
    names = sorted(set().union(*sets))
    write(folder / "columns.parquet", **{n: [int(n in labels) for labels in sets] for n in names})
    options: dict[str, dict[str, str]] = {
        "joined.parquet": {"label_separator": ";"},
        "columns.parquet": {"label_column": ",".join(names)},
    }
    for file in ("lists.parquet", "lists.jsonl", "joined.parquet", "columns.parquet"):
        corpus = load(folder / file, **options.get(file, {}))
        assert corpus.labels == tuple(names)
        assert sets_of(corpus) == sets
        assert (corpus.splits["train"].labels == -1).all()


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
        pa.list_(pa.binary()),
        pa.list_(pa.string(), 2),
        pa.list_view(pa.string()),
    ],
    ids=str,
)
def test_lists_of_any_kind_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Large, fixed and view lists, of strings, categories or bytes, in several chunks."""
    values = [["a", "b"], ["b", "c"], ["c", "a"]]
    table = pa.table({"text": list("xyz"), "label": pa.array(values, kind)})
    sliced = pa.concat_tables([table.slice(0, 1), table.slice(1, 2)])
    path = tmp_path / "t.arrow"
    with pa.ipc.new_file(str(path), sliced.schema) as file:
        file.write_table(sliced)
    assert sets_of(load(path)) == [{"a", "b"}, {"b", "c"}, {"c", "a"}]
    column = sliced["label"]  # of slices, which a file would not keep
    listed = from_lists("here", "label", column)
    assert listed.labels.to_pylist() == [label for row in values for label in row]
    assert listed.lengths.tolist() == [2, 2, 2]


@pytest.mark.parametrize("how", ["parquet", "saved", "at first"])
def test_names_of_listed_integers_come_from_their_class_label(tmp_path: Path, how: str) -> None:
    """`Sequence(ClassLabel)` names the integers of a list, however datasets wrote it down."""
    of_class = datasets.ClassLabel(names=["no", "yes", "maybe"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(of_class)}
    )
    rows = datasets.Dataset.from_dict(
        {"text": ["x", "y"], "labels": [[2, 0], []]}, features=features
    )
    path = tmp_path / "d"
    if how == "saved":
        rows.save_to_disk(path)
    else:
        path.mkdir()
        rows.to_parquet(path / "train.parquet")
    if how == "at first":
        table = pyarrow.parquet.read_table(path / "train.parquet")
        described = {"labels": [{"_type": "ClassLabel", "names": ["no", "yes", "maybe"]}]}
        about = json.dumps({"info": {"features": described}})
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"huggingface": about}), path / "train.parquet"
        )
    corpus = load(path)
    assert corpus.labels == ("no", "yes", "maybe")
    assert sets_of(corpus) == [{"maybe", "no"}, set()]


@pytest.mark.parametrize(
    ("columns", "options", "match"),
    [
        (
            {"x": [0, 2], "y": [1, 0]},
            {},
            "row 1: column 'x' holds '2', and of several label columns",
        ),
        ({"x": [0, 1], "y": [None, 0]}, {}, "row 0: column 'y' holds '', and of several label"),
        (
            {"x": [0, 1], "y": [None, 0]},
            {"unlabelled": ""},
            "row 0: column 'y' says nothing, while",
        ),
        ({"x": ["0", "yes"], "y": ["1", "0"]}, {}, "row 1: column 'x' holds 'yes'"),
        ({"x": [0.5, 1.0], "y": [0, 1]}, {}, "has the label 0.5, a float"),
        ({"x": [[0], [1]], "y": [0, 1]}, {}, "has labels of type list"),
    ],
)
def test_columns_that_are_not_of_0_and_1_are_refused(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, str], match: str
) -> None:
    """The column, the row and the value are named."""
    with pytest.raises(DataError, match=re.escape(match)):
        load(write(tmp_path / "t.parquet", **columns), label_column="x,y", **options)


def test_columns_of_0_and_1_may_be_written_in_many_ways(tmp_path: Path) -> None:
    """Numbers, truth values and words are the same; a row without any may be unlabelled."""
    (tmp_path / "t.csv").write_text("text,y,x\nq,1,true\nr,0,False\ns,TRUE,0\nt,,\n")
    corpus = load(tmp_path / "t.csv", label_column="x, y", unlabelled="")
    assert corpus.labels == ("x", "y")
    sets = corpus.splits["train"].label_sets
    assert sets is not None
    assert sets.tolist() == [[1, 1], [0, 0], [0, 1], [-1, -1]]
    path = write(tmp_path / "t.parquet", x=[True, False, None], y=[1.0, 0.0, float("nan")])
    sets = load(path, label_column="x,y", unlabelled="").splits["train"].label_sets
    assert sets is not None
    assert sets.tolist() == [[1, 1], [0, 0], [-1, -1]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_column": "x,z"}, "column 'z' does not exist"),
        ({"label_column": "x,y,x"}, "--label-column x,y,x names 'x' twice. Name each once"),
        (
            {"label_column": "x,y", "label_separator": ";"},
            "--label-separator ';' parts the labels of one column, and --label-column names 2",
        ),
        ({"label_column": "x", "weight_column": "v"}, "column 'v' does not exist"),
        ({"label_column": "x", "group_column": "autor"}, "column 'autor' does not exist"),
    ],
)
def test_columns_that_are_not_there_are_refused(
    tmp_path: Path, options: dict[str, str], match: str
) -> None:
    """What is asked for and cannot be had is named with what to do."""
    path = write(tmp_path / "t.parquet", x=[0, 1], y=[1, 0], author=["p", "q"])
    with pytest.raises(ConfigError, match=re.escape(match)):
        load(path, **options)


def test_a_blank_separator_is_refused() -> None:
    """Blanks around labels do not count, so they part nothing."""
    with pytest.raises(ConfigError, match="--label-separator is ' '; it parts the labels"):
        ExtractConfig(model="minilm", layers="1", label_separator=" ")


def test_what_looks_like_a_mistake_is_warned_of(tmp_path: Path) -> None:
    """Labels that only evaluation has, and a mark that no row has, as for single labels."""
    write(tmp_path / "train.parquet", label=[["x"], ["y"]])
    write(tmp_path / "test.parquet", label=[["x", "unknown"], ["unknown"]])
    with pytest.warns(LLMEmbedWarning, match=r"can learn them: 'unknown' \(2 rows\)"):
        load(tmp_path)
    match = "no row has the label '--' that --unlabelled names"
    with pytest.warns(LLMEmbedWarning, match=match):
        load(tmp_path / "train.parquet", unlabelled="--")


def test_a_separator_that_no_label_holds_is_warned_of(tmp_path: Path) -> None:
    """A slip of the pen in --label-separator does not go unseen; one label that holds it does."""
    write(tmp_path / "train.parquet", label=["x|y", "y", ""])
    match = "no label of column 'label' holds ';' that --label-separator names"
    with pytest.warns(LLMEmbedWarning, match=match):
        load(tmp_path / "train.parquet", label_separator=";")
    assert load(tmp_path / "train.parquet", label_separator="|").labels == ("x", "y")


def test_what_was_found_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column of lists is named, and a split without labels; the corpus counts the rest."""
    write(tmp_path / "train.parquet", label=[["x"], ["y", "x"], []], w=[1, 2, 3], g=[1, 1, 2])
    write(tmp_path / "test.parquet", label=pa.array([None, None], pa.list_(pa.string())))
    with caplog.at_level(logging.INFO, logger="llmembed"):
        corpus = load(tmp_path, weight_column="w", group_column="g")
    assert caplog.messages == [
        "Several labels a text: column 'label' holds lists.",
        "Split 'test' has no label; it is left out, --split test takes it.",
    ]
    assert corpus.notes == [
        "Split 'train': 1.00 labels a text of 2; 1 of 3 rows have none, 0 are unlabelled.",
        "Split 'train': weights from 1 to 3.",
        "Split 'train': 2 groups.",
    ]
    with caplog.at_level(logging.INFO, logger="llmembed"):
        both = load(tmp_path, weight_column="w", splits=("train", "test"))
    assert "Split 'test' has no column 'w': its rows have no weights." in caplog.messages
    assert both.splits["test"].weights is None
    sets = both.splits["test"].label_sets
    assert sets is not None
    assert (sets == -1).all()


def test_a_limit_keeps_the_share_of_rare_labels(tmp_path: Path) -> None:
    """Rows are drawn by their rarest label, so that one in ten stays one in ten."""
    rng = np.random.default_rng(0)
    lists = [["often", *(["rare"] if row % 10 == 7 else [])] for row in range(1000)]
    lists[5], lists[3] = [], ["once", "often"]
    path = write(tmp_path / "t.parquet", label=lists, w=rng.random(1000), g=np.arange(1000))
    corpus = load(path, limit=200, weight_column="w", group_column="g")
    examples = corpus.splits["train"]
    assert len(examples) == 200
    assert examples.label_sets is not None
    counts = dict(zip(corpus.labels, examples.label_sets.sum(axis=0).tolist(), strict=True))
    assert counts["rare"] in {19, 20, 21}
    assert counts["once"] == 1
    assert (examples.label_sets.sum(axis=1) == 0).sum() == 1
    rows = [int(text.removeprefix("text ")) for text in examples.batch(slice(None))]
    whole = load(path, weight_column="w", group_column="g").splits["train"]
    for name, values in examples.columns.items():
        np.testing.assert_array_equal(values, whole.columns[name][rows])


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1, -2], "row 1: the weight is -2.0"),
        ([1.0, float("nan")], "row 1: the weight is nan"),
        ([1.0, float("inf")], "row 1: the weight is inf"),
        ([1, None], "row 1: the weight in column 'w' is missing. Write a number, such as 1"),
        (["1", ""], "row 1: the weight in column 'w' is missing"),
        (["1", "heavy"], "row 1: the weight in column 'w' is 'heavy', which is no number"),
        ([True, False], "row 0: the weight in column 'w' is True, which is no number"),
        ([0, 0], "has the weight 0 in all of its 2 rows"),
        ([[1], [2]], "row 0: the weight in column 'w' is [1], which is no number"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, weights: list[Any], match: str) -> None:
    """A weight is a number from 0 on; the row, counted in the data set, is named."""
    path = write(tmp_path / "t.parquet", label=["x", "y"], w=weights)
    with pytest.raises(DataError, match=re.escape(match)):
        load(path, weight_column="w", limit=1)


@pytest.mark.parametrize(
    ("groups", "as_text"),
    [
        (["ann", "bob", "ann"], ["ann", "bob", "ann"]),
        ([3, -1, 3], ["3", "-1", "3"]),
        ([0.5, 1.5, 0.5], ["0.5", "1.5", "0.5"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array([0, 1, 0], pa.date32()), ["1970-01-01", "1970-01-02", "1970-01-01"]),
    ],
)
def test_groups_are_hashes_of_their_texts(tmp_path: Path, groups: Any, as_text: list[str]) -> None:
    """Whatever its type, the same value is the same group in every split."""
    path = write(tmp_path / "t.parquet", label=["x", "y", "x"], g=groups)
    found = load(path, group_column="g").splits["train"].groups
    assert found is not None
    assert found.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in as_text]


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (
            ["ann", None],
            "row 1: the group in column 'g' is missing. Give the row a group of its own",
        ),
        (["", "bob"], "row 0: the group in column 'g' is missing"),
        ([1.0, float("nan")], "row 1: the group in column 'g' is missing"),
        ([["a"], ["b"]], "column 'g' holds list<element: string>; a group is one value"),
    ],
)
def test_bad_groups_are_refused(tmp_path: Path, groups: list[Any], match: str) -> None:
    """A group that is missing may not become one of its own in silence."""
    path = write(tmp_path / "t.parquet", label=["x", "y"], g=groups)
    with pytest.raises(DataError, match=re.escape(match)):
        load(path, group_column="g")


@pytest.fixture
def several(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """An extraction of 150 texts with several labels, weights and groups."""
    texts = toy_texts(150)
    lists = [[label for k, label in enumerate(LABELS) if row >> k & 1] for row in range(150)]
    table = pa.table(
        {"text": texts, "labels": lists, "w": np.arange(150) / 8, "who": np.arange(150) // 4}
    )
    pyarrow.parquet.write_table(table, tmp_path / "several.parquet")
    options = {
        "dataset": str(tmp_path / "several.parquet"),
        "weight_column": "w",
        "group_column": "who",
    }
    return settings | options


def test_extraction_stores_all_of_them(several: dict[str, Any], tmp_path: Path) -> None:
    """The cache has the label sets, weights and groups of the data set; the outcome counts them."""
    result = extract(ExtractConfig(**several, cache=str(tmp_path / "c")))
    split = open_cache(result.path)["train"]
    expected = load(Path(several["dataset"]), weight_column="w", group_column="who").splits["train"]
    for name, field in {
        "label_sets": "label_sets",
        "weights": "weights",
        "groups": "groups",
    }.items():
        np.testing.assert_array_equal(getattr(split, field), getattr(expected, name))
    mean = expected.label_sets.sum(axis=1).mean() if expected.label_sets is not None else 0
    told = (
        f"Split 'train': {mean:.2f} labels a text of 3; 19 of 150 rows have none, 0 are unlabelled."
    )
    assert told in result.notes
    assert "Split 'train': 38 groups." in result.notes
    assert told in plan_extraction(ExtractConfig(**several, cache=str(tmp_path / "d"))).describe()


def test_weights_and_groups_may_come_after_the_features(
    several: dict[str, Any], tmp_path: Path
) -> None:
    """They are added to a complete cache, which is then the one that had them at once."""
    config = ExtractConfig(**several, cache=str(tmp_path / "c"))
    at_once = tree(Path(extract(ExtractConfig(**several, cache=str(tmp_path / "d"))).path))
    bare = {"weight_column": None, "group_column": None}
    extract(ExtractConfig(**several | bare, cache=str(tmp_path / "c")))
    result = extract(config)
    assert result.n_rows_computed == 0
    assert result.notes[-1] == "What is new of the data set was added to its rows."
    assert tree(tmp_path / "c") == at_once
    again = extract(ExtractConfig(**several | bare, cache=str(tmp_path / "c")))
    assert tree(tmp_path / "c") == at_once
    assert "added" not in " ".join(again.notes)


def test_other_weights_than_those_of_the_cache_are_refused(
    several: dict[str, Any], tmp_path: Path
) -> None:
    """Both values are named, and nothing is written."""
    config = ExtractConfig(**several, cache=str(tmp_path / "c"))
    before = tree(Path(extract(config).path))
    path = Path(several["dataset"])
    table = pyarrow.parquet.read_table(path)
    changed = table.set_column(2, "w", pa.array(np.arange(150) / 4))
    pyarrow.parquet.write_table(changed, path)
    with pytest.raises(
        CacheMismatchError, match=r"row 1 .* has weight 0.125, but 0.25 was given \(149"
    ):
        extract(config)
    assert tree(tmp_path / "c") == before


def test_ranks_store_them_too(several: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks and finalize make the cache of one process, weights that come later included."""
    whole = tree(Path(extract(ExtractConfig(**several, cache=str(tmp_path / "whole"))).path))
    bare = {"weight_column": None, "group_column": None}
    for options in (bare, {}):
        for rank in (0, 1):
            given = several | options
            extract(ExtractConfig(**given, cache=str(tmp_path / "c"), rank=rank, world=2))
        finalize(tmp_path / "c")
    assert tree(tmp_path / "c") == whole


def test_devices_store_them_too(several: dict[str, Any], tmp_path: Path) -> None:
    """Processes that share a machine make the cache of one process."""
    whole = tree(Path(extract(ExtractConfig(**several, cache=str(tmp_path / "whole"))).path))
    shared = ExtractConfig(**several, cache=str(tmp_path / "c"), device="cpu", devices="2")
    assert tree(Path(extract(shared).path)) == whole


def test_a_corpus_in_memory_may_have_them(settings: dict[str, Any], tmp_path: Path) -> None:
    """`extract` takes label sets, weights and groups of texts in memory."""
    sets = np.array([[1, 0], [1, 1], [-1, -1]], np.int8)
    examples = Examples(
        texts=pa.chunked_array([toy_texts(3)]),
        labels=np.full(3, -1, np.int32),
        label_sets=sets,
        weights=np.array([1, 2, 0], np.float32),
        groups=np.array([7, 7, 8], np.uint64),
    )
    corpus = Corpus(name="mine", labels=("x", "y"), splits={"train": examples}, provenance={})
    config = ExtractConfig(**settings, cache=str(tmp_path / "c"))
    split = open_cache(extract(config, corpus=corpus).path)["train"]
    np.testing.assert_array_equal(split.label_sets, sets)
    np.testing.assert_array_equal(split.weights, [1, 2, 0])
    np.testing.assert_array_equal(split.groups, [7, 7, 8])


def test_the_texts_of_such_a_cache_are_found_again(
    settings: dict[str, Any], tmp_path: Path, llama: Path
) -> None:
    """A cache records how labels were parted, so that its texts, drawn by them, are read again."""
    rows = [f"{text},{'x;y' if row % 3 else 'z'}" for row, text in enumerate(toy_texts(40))]
    (tmp_path / "t.csv").write_text("\n".join(["text,tags", *rows]))
    options = {"dataset": str(tmp_path / "t.csv"), "label_column": "tags", "label_separator": ";"}
    cache = str(tmp_path / "c")
    extract(ExtractConfig(**settings | options, cache=cache, limit=9))
    opened = open_cache(cache)
    assert opened.dataset.provenance["label_separator"] == ";"
    assert len(find_texts(opened, ["train"])["train"]) == 9
    assert recheck(cache, model=str(llama), n_rows=3).differences == ()


def test_the_command_takes_them(several: dict[str, Any], tmp_path: Path) -> None:
    """Options of the command are those of the config; a bad weight is one line."""
    given = {name.replace("_", "-"): value for name, value in several.items()}
    given["pooling"] = ",".join(given["pooling"])
    line = [f"--{name}={value}" for name, value in given.items()]
    result = CliRunner().invoke(main, [*line, f"--cache={tmp_path / 'c'}"])
    assert result.exit_code == 0, result.output
    assert verify(open_store(tmp_path / "c")).damage == ()
    line = [f"--{name}={value}" for name, value in {**given, "weight-column": "v"}.items()]
    result = CliRunner().invoke(main, [*line, f"--cache={tmp_path / 'd'}"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: column 'v' does not exist")
