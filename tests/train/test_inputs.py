"""What the classifier takes of texts, classes, seeds and layers, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning
from sklearn.utils import check_random_state
from toy_model import save_toy_model, toy_texts

from llmembed.common.errors import ConfigError, DataError
from llmembed.train import LLMEmbedClassifier
from llmembed.train.inputs.arguments import as_seed, as_texts
from llmembed.train.inputs.classes import as_classes, as_target

TEXTS = [f"w{1 + row % 2} " * 6 + text for row, text in enumerate(toy_texts(20, longest=4))]
CLASSES = ["cocoa", "trade"] * 10


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> LLMEmbedClassifier:
    folder = tmp_path_factory.mktemp("inputs")
    return LLMEmbedClassifier(
        str(save_toy_model(folder / "toy")),
        "1,2",
        fusion="mean",
        head="lda",
        pooling="mean",
        max_length=64,
        cache=str(folder / "texts.zarr"),
        device="cpu",
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def fitted(classifier: LLMEmbedClassifier) -> LLMEmbedClassifier:
    return clone(classifier).fit(TEXTS, CLASSES)


def kinds_of_texts() -> Iterator[Any]:
    column = np.array(TEXTS, dtype=object)
    yield pytest.param(tuple(TEXTS), id="tuple")
    yield pytest.param(np.array(TEXTS), id="numpy strings")
    yield pytest.param(column, id="numpy objects")
    yield pytest.param(column[:, None], id="one column of objects")
    yield pytest.param(pd.Series(TEXTS, index=range(7, 27)), id="series")
    yield pytest.param(pd.Series(TEXTS, dtype="category"), id="category")
    yield pytest.param(pd.DataFrame({"text": TEXTS}), id="frame of one column")
    yield pytest.param(pd.DataFrame({"text": TEXTS}, dtype="string"), id="frame of pandas strings")
    yield pytest.param(pa.chunked_array([TEXTS[:5], TEXTS[5:]]), id="arrow array")
    yield pytest.param(pa.table({"text": TEXTS}), id="arrow table of one column")


@pytest.mark.parametrize("texts", list(kinds_of_texts()))
def test_texts_of_any_kind(fitted: LLMEmbedClassifier, texts: Any) -> None:
    """A sequence, an array, a series and a table of one column give a prediction a row."""
    assert fitted.predict(texts).tolist() == fitted.predict(TEXTS).tolist()


def test_texts_that_come_one_by_one(classifier: LLMEmbedClassifier) -> None:
    """A generator of texts, and one of classes, are used up once."""
    fitted = clone(classifier).fit((text for text in TEXTS), (name for name in CLASSES))
    assert fitted.predict(text for text in TEXTS).tolist() == fitted.predict(TEXTS).tolist()


@pytest.mark.parametrize("dtype", [str, object, int, bool])
def test_no_texts(classifier: LLMEmbedClassifier, dtype: type) -> None:
    """No texts have no predictions, of the dtype of the classes."""
    y = np.array(CLASSES, dtype=dtype) if dtype in {str, object} else np.array([0, 1] * 10, dtype)
    fitted = clone(classifier).fit(TEXTS, y)
    predicted = fitted.predict([])
    assert (predicted.shape, predicted.dtype) == ((0,), fitted.classes_.dtype)
    assert fitted.predict_proba([]).shape == (0, 2)
    assert fitted.decision_function([]).shape == (0,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("w1", r"X must be a list of strings, and is a str\. Pass \[text\] for a single one"),
        (b"w1", "and is a bytes"),
        (3, "and is a int"),
        (None, "and is a NoneType"),
        ({"text": TEXTS}, "and is a dict"),
        (set(TEXTS), "and is a set"),
        (np.array("w1"), r"X has the shape \(\), and must be one column of texts"),
        (pd.DataFrame({"id": [1], "text": ["w1"]}), r"X has the shape \(1, 2\) \(id, text\), and "),
        (np.array([["w1", "w2"]]), r"X has the shape \(1, 2\), and must be one column of texts"),
        (sparse.csr_array(np.ones((2, 1))), r"X has the shape \(2, 1\), and must be one column"),
        (["w1", None], "row 1 holds None, which is no text. Leave the row out, or make it a str"),
        (["w1", float("nan")], "row 1 holds nan"),
        (pd.Series(["w1", None]), "row 1 holds nan"),
        (pd.Series(["w1", None], dtype="string"), "row 1 holds <NA>"),
        (pd.DataFrame({"text": [1.5, 2.5]}), "row 0 holds 1.5"),
        (["w1", b"w2"], "row 1 holds b'w2'"),
        ([["w1"], ["w2"]], r"row 0 holds \['w1'\]"),
        (["w1", "\ud800"], "text 1 holds a lone surrogate"),
    ],
)
def test_texts_that_are_refused(fitted: LLMEmbedClassifier, texts: Any, message: str) -> None:
    """What is no list of texts is refused at a prediction, with its row, and at a fit too."""
    with pytest.raises(DataError, match=message):
        fitted.predict(texts)
    with pytest.raises(DataError, match=message):
        clone(fitted).fit(texts, ["a", "b"])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([-1, 1], [-1, 1]),
        ([-1, 0], [-1, 0]),
        ([0.0, 2.0], [0.0, 2.0]),
        ([True, False], [False, True]),
        (["b", "a"], ["a", "b"]),
        ([" x", "x"], [" x", "x"]),
        (["1", "01"], ["01", "1"]),
    ],
)
@pytest.mark.parametrize("kind", [list, np.array, pd.Series, pd.Categorical, tuple])
def test_classes_of_any_kind(
    classifier: LLMEmbedClassifier, classes: list[Any], expected: list[Any], kind: Any
) -> None:
    """Strings, whole numbers, -1 among them, and booleans come back, whatever held them."""
    fitted = clone(classifier).fit(TEXTS, kind(classes * 10))
    assert fitted.classes_.tolist() == expected
    assert fitted.predict(TEXTS).tolist() == classes * 10


@pytest.mark.parametrize(
    ("y", "dtype"),
    [
        (pd.Series([1, 2], dtype="Int64"), np.dtype(np.int64)),
        (pd.Series([True, False], dtype="boolean"), np.dtype(bool)),
        (np.array([1, 2], dtype=object), np.dtype(np.int64)),
        (np.array([1, 2], dtype=np.int8), np.dtype(np.int8)),
        (pd.Series(["a", "b"], dtype="category"), np.dtype(object)),
        (["a", "b"], np.dtype("<U1")),
    ],
)
def test_dtype_of_classes(y: Any, dtype: np.dtype[Any]) -> None:
    """Numbers that are held as objects become numbers; other dtypes stay."""
    assert as_classes(y).dtype == dtype


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a", None], "y has no class in row 1, but None. Leave out the rows without a class"),
        ([1.0, float("nan")], "y has no class in row 1, but nan"),
        ([1.0, float("inf")], "y has no class in row 1, but inf"),
        (pd.Series(["a", None], dtype="category"), "y has no class in row 1, but nan"),
        (pd.Series([1, None], dtype="Int64"), "y has no class in row 1, but <NA>"),
        (pd.Series([pd.NaT, pd.Timestamp(0)]), "y has no class in row 0, but NaT"),
        (["1", 1], "y mixes strings and other values: '1' in row 0, 1 in row 1. Make all of them"),
        (np.array([1, "1"], dtype=object), "y mixes strings and other values: '1' in row 1, 1 in"),
        (None, "requires y to be passed, but the target y is None"),
        ([0.5, 0.7], "Unknown label type: continuous"),
        (
            [b"a", b"b"],
            r"Unknown label type: bytes: y holds b'a' in row 0, and a class is a string",
        ),
        (3, r"y is a int, and must be an array, a series or a list of one class a text, or of"),
        ("ab", "y is a str, and must be an array"),
        ({"a": 0, "b": 1}, "y is a dict, and must be an array"),
        ({"a", "b"}, "y is a set, and must be an array"),
        (np.array("a"), r"y is a ndarray of the shape \(\), and must be an array"),
        (np.zeros((2, 1, 1)), r"y is a ndarray of the shape \(2, 1, 1\), and must be an array"),
        (
            [1, 0.5],
            "Unknown label type: continuous: y holds 0.5 in row 1, and a class is a string, ",
        ),
        ([1j, 2j], "Unknown label type: complex: y holds 1j in row 0"),
        ([Decimal(1), Decimal(2)], r"Unknown label type: Decimal: y holds Decimal\('1'\) in row 0"),
        (
            [10**30, 1],
            "Unknown label type: int: y holds 10{30} in row 0, .* whole number of 64 bits",
        ),
        ([{"a": 1}, {"b": 1}], r"Unknown label type: dict: y holds {'a': 1} in row 0"),
        (np.ma.array([1, 2], mask=[False, True]), "y has no class in row 1, but None"),
        ([["a"], "b"], r"y mixes strings and other values: 'b' in row 1, \['a'\] in row 0"),
        (
            [["a", "b"], ["a", None]],
            "y has no class in row 1, but None. Leave out the rows without",
        ),
        ([["a"], ["b", 1]], "y mixes strings and other values: 'a' in row 0, 1 in row 1. Make all"),
        ([[], [b"b"]], "Unknown label type: bytes: y holds b'b' in row 1, and a class is a string"),
        (pd.DataFrame({"a": [1, None], "b": [0, 1]}), "y holds nan in row 1, column 0; a matrix"),
        (
            pd.DataFrame({"a": [1, None], "b": [0, 1]}, dtype="Int64"),
            "y holds <NA> in row 1, column 0; a matrix of several labels a text has 1 where",
        ),
        (np.ma.array([[1, 0], [0, 1]], mask=[[0, 0], [1, 0]]), "y holds None in row 1, column 0"),
        (
            np.array([[0.5, 1], [0, 1]]),
            r"y has the shape \(2, 2\), several .*MultiOutputClassifier",
        ),
        (
            sparse.csr_array([[0, 2], [2, 0]]),
            "y holds 2 in row 0, column 1; a matrix of several la",
        ),
        (["a", "a"], "y has 1 class, 'a', in the 2 texts whose weight is above 0; a classifier"),
        (["a"], "inconsistent numbers of samples"),
    ],
)
def test_classes_that_are_refused(classifier: LLMEmbedClassifier, y: Any, message: str) -> None:
    """Classes that are missing, mixed or no classes are refused, with the row where one is."""
    with pytest.raises((ValueError, TypeError), match=message):
        clone(classifier).fit(["w1", "w2"], y)


SETS = [["a"] if row % 2 else ["b", "c"] for row in range(20)]
MATRIX = np.array([[name in own for name in "abc"] for own in SETS], dtype=int)


def held(rows: list[Any]) -> np.ndarray:
    """Give the rows as an array of objects."""
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def kinds_of_sets() -> Iterator[Any]:
    """Labels of each text, and the matrix of the same, of many kinds, and their names."""
    names = ["a", "b", "c"]
    yield pytest.param(SETS, names, id="lists")
    yield pytest.param([set(one) for one in SETS], names, id="sets")
    yield pytest.param(pd.Series(SETS, index=range(7, 27)), names, id="series of lists")
    yield pytest.param(pd.Series([set(one) for one in SETS]), names, id="series of sets")
    yield pytest.param(pd.Series([tuple(one) for one in SETS]), names, id="series of tuples")
    yield pytest.param(held([frozenset(one) for one in SETS]), names, id="array of sets")
    yield pytest.param([np.array(one) for one in SETS], names, id="list of arrays")
    yield pytest.param(pa.array(SETS), names, id="arrow lists")
    yield pytest.param(pa.chunked_array([SETS[:5], SETS[5:]]), names, id="arrow chunks of lists")
    arrow = pd.ArrowDtype(pa.list_(pa.string()))
    yield pytest.param(pd.Series(SETS, dtype=arrow), names, id="series of Arrow lists")
    yield pytest.param(dict(enumerate(SETS)).values(), names, id="values of a dict")
    for kind in (sparse.csr_matrix, sparse.csc_array, sparse.coo_array, sparse.lil_matrix):
        yield pytest.param(kind(MATRIX), [0, 1, 2], id=kind.__name__)
    yield pytest.param(sparse.csr_array(MATRIX.astype(bool)), [0, 1, 2], id="sparse booleans")
    yield pytest.param(MATRIX.astype(bool), [0, 1, 2], id="booleans")
    yield pytest.param(MATRIX.astype(object), [0, 1, 2], id="objects")
    yield pytest.param(MATRIX.tolist(), [0, 1, 2], id="rows")
    yield pytest.param(pd.Series(MATRIX.tolist()), [0, 1, 2], id="series of rows")
    yield pytest.param(np.ma.array(MATRIX, mask=False), [0, 1, 2], id="masked nowhere")
    frame = pd.DataFrame(MATRIX, columns=names)
    yield pytest.param(frame, names, id="frame")
    yield pytest.param(frame.astype("Int64"), names, id="frame of Int64")
    yield pytest.param(frame.astype("boolean"), names, id="frame of pandas booleans")
    yield pytest.param(pa.Table.from_pandas(frame), names, id="arrow table")


@pytest.mark.parametrize(("y", "names"), list(kinds_of_sets()))
def test_several_labels_of_any_kind(y: Any, names: Any) -> None:
    """Lists of labels and matrices of 0 and 1 are taken as scikit-learn's own tools give them."""
    found, codes = as_target(y)
    assert found.tolist() == names
    np.testing.assert_array_equal(codes, MATRIX)


def test_labels_that_come_one_by_one(classifier: LLMEmbedClassifier) -> None:
    """A generator of sets, or of rows of 0 and 1, is used up once."""
    ridge = clone(classifier).set_params(head="ridge")
    by_sets = clone(ridge).fit(TEXTS, (set(one) for one in SETS))
    by_rows = clone(ridge).fit(iter(TEXTS), iter(MATRIX.tolist()))
    assert (by_sets.classes_.tolist(), by_rows.classes_.tolist()) == (["a", "b", "c"], [0, 1, 2])
    np.testing.assert_array_equal(by_sets.predict(TEXTS), by_rows.predict(TEXTS))


@pytest.mark.parametrize(
    "y",
    [
        pa.array(CLASSES),
        pa.chunked_array([CLASSES[:5], CLASSES[5:]]),
        pa.array(CLASSES).dictionary_encode(),
        pd.Series(CLASSES, dtype="string"),
        np.array(CLASSES, dtype=np.dtypes.StringDType()),
        dict(enumerate(CLASSES)).values(),
    ],
)
def test_classes_in_a_column_of_any_kind(y: Any) -> None:
    """Arrow's columns, pandas' and numpy's strings, and the values of a dict are classes."""
    names, codes = as_target(y)
    assert names.tolist() == ["cocoa", "trade"]
    assert codes.tolist() == [0, 1] * 10


def test_a_table_of_several_columns_is_no_list_of_texts(fitted: LLMEmbedClassifier) -> None:
    """The columns of an Arrow table are named, not their values."""
    table = pa.table({"id": [1], "text": ["w1"]})
    with pytest.raises(
        DataError, match=r"X has the shape \(1, 2\) \(id, text\), and must be one c"
    ):
        fitted.predict(table)


def test_a_column_of_classes(classifier: LLMEmbedClassifier) -> None:
    """Classes in a column `[N, 1]` are taken with scikit-learn's own warning."""
    with pytest.warns(DataConversionWarning, match="column-vector"):
        fitted = clone(classifier).fit(TEXTS, pd.DataFrame({"label": CLASSES}))
    assert fitted.classes_.tolist() == ["cocoa", "trade"]


def test_no_text_to_fit(classifier: LLMEmbedClassifier) -> None:
    """A fit without texts is refused."""
    with pytest.raises(DataError, match="X must be a list of strings, and holds none"):
        clone(classifier).fit([], [])


@pytest.mark.parametrize("layers", [[1, 2], (1, 2), np.array([1, 2]), range(1, 3), "1,2"])
def test_layers_as_a_list(fitted: LLMEmbedClassifier, layers: Any) -> None:
    """Layers may be a list of numbers, or the string that the command takes."""
    again = clone(fitted).set_params(layers=layers, pooling=["mean"]).fit(TEXTS, CLASSES)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


def test_one_layer(classifier: LLMEmbedClassifier) -> None:
    """A single layer may be a number."""
    one = clone(classifier).set_params(layers=2, fusion="single").fit(TEXTS, CLASSES)
    assert [feature.layer for feature in one.features_] == [2]
    with pytest.raises(ConfigError, match=r"layers is True, of type bool\. Pass a text, a whole "):
        one.set_params(layers=True).fit(TEXTS, CLASSES)


def test_parameters_of_other_packages(fitted: LLMEmbedClassifier) -> None:
    """Numbers of numpy, paths and arrays are taken, and neither a fit nor a clone changes them."""
    given = {
        "model": Path(fitted.model),
        "cache": Path(str(fitted.cache)),
        "layers": np.arange(1, 3),
        "pooling": np.array(["mean"]),
        "max_length": np.int64(64),
        "trust_remote_code": np.False_,
        "fusion": np.str_("mean"),
        "random_state": np.int64(0),
    }
    again = clone(fitted).set_params(**given).fit(TEXTS, CLASSES)
    np.testing.assert_array_equal(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    for name, value in given.items():
        assert again.get_params()[name] is value
        assert type(clone(again).get_params()[name]) is type(value)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("epochs", True, "epochs is True, of type bool. Pass a whole number or None."),
        ("max_length", 64.0, "max_length is 64.0, of type float. Pass a whole number."),
        ("prompts", [3], "prompts is [3], of type list. Pass texts: a tuple or list of texts, or "),
        ("pooling", 3, "pooling is 3, of type int. Pass names: a tuple or list of texts, or one"),
        ("cache", 3, "cache is 3, of type int. Pass a text or None."),
        ("class_weight", np.ones(2), "class_weight array([1., 1.]) is neither None, 'balanced'"),
    ],
)
def test_parameters_of_another_type_are_refused(
    classifier: LLMEmbedClassifier, parameter: str, value: Any, message: str
) -> None:
    """When it is fitted, with the value, its type, and what the parameter takes."""
    other = clone(classifier).set_params(fusion="scalar-mix", head="auto", **{parameter: value})
    with pytest.raises(ConfigError) as caught:
        other.fit(TEXTS, CLASSES)
    assert message in str(caught.value)


def test_random_state_as_scikit_learn_means_it(classifier: LLMEmbedClassifier) -> None:
    """The same int gives the same fit, and so does a generator in the same state."""
    by_gradient = clone(classifier).set_params(fusion="scalar-mix", head="auto", epochs=2)

    def probabilities(random_state: Any) -> np.ndarray:
        chosen = by_gradient.set_params(random_state=random_state)
        return chosen.fit(TEXTS, CLASSES).predict_proba(TEXTS)  # type: ignore[no-any-return]

    for same in (
        lambda: 3,
        lambda: np.int64(3),
        lambda: np.random.RandomState(3),
        lambda: np.random.default_rng(3),
    ):
        np.testing.assert_array_equal(probabilities(same()), probabilities(same()))
    state = np.random.RandomState(3)
    first, second = probabilities(state), probabilities(state)
    assert (first != second).any()


def test_random_state_none_draws_from_numpy() -> None:
    """None draws another seed each time, from numpy's own generator, as scikit-learn does."""
    numpys = check_random_state(None)
    before = numpys.get_state()
    try:
        seeds = []
        for _ in range(2):
            numpys.seed(5)
            seeds.append([as_seed(None), as_seed(np.random), as_seed(None)])
    finally:
        numpys.set_state(before)
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


@pytest.mark.parametrize("random_state", [-1, 2**32, 1.5, "0", np.random.MT19937(0)])
def test_random_states_that_are_refused(classifier: LLMEmbedClassifier, random_state: Any) -> None:
    """What draws nothing is refused with what does."""
    with pytest.raises(ConfigError, match=r"random_state .* is none of what draws: None, a number"):
        clone(classifier).set_params(random_state=random_state).fit(TEXTS, CLASSES)


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c"]])
def test_the_decision_agrees_with_the_probabilities(
    classifier: LLMEmbedClassifier, classes: list[str]
) -> None:
    """It is the log-odds of two classes, and else scores whose softmax the probabilities are."""
    fitted = clone(classifier).fit(TEXTS, (classes * 10)[:20])
    decision, proba = fitted.decision_function(TEXTS), fitted.predict_proba(TEXTS)
    if len(classes) == 2:
        np.testing.assert_allclose(decision, np.log(proba[:, 1] / proba[:, 0]), rtol=1e-6)
        assert (fitted.predict(TEXTS) == np.where(decision > 0, "b", "a")).all()
    else:
        weights = np.exp(decision - decision.max(axis=1, keepdims=True))
        np.testing.assert_allclose(proba, weights / weights.sum(axis=1, keepdims=True))


def test_texts_have_no_columns(fitted: LLMEmbedClassifier) -> None:
    """As with scikit-learn's vectorisers of texts there is no number and no name of features."""
    assert not hasattr(fitted, "n_features_in_")
    assert not hasattr(fitted, "feature_names_in_")


def test_fitting_leaves_the_input_alone(classifier: LLMEmbedClassifier) -> None:
    """Neither the frames nor the parameters that were given are changed."""
    frame, y = pd.DataFrame({"text": TEXTS}), pd.Series(CLASSES, dtype="category")
    copies, parameters = (frame.copy(), y.copy()), clone(classifier).get_params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = clone(classifier).fit(frame, y)
    pd.testing.assert_frame_equal(frame, copies[0])
    pd.testing.assert_series_equal(y, copies[1])
    assert one.get_params() == parameters
    assert as_texts(frame) == TEXTS


def test_a_path_is_no_list_of_texts(fitted: LLMEmbedClassifier, tmp_path: Path) -> None:
    """A path is refused too, rather than taken for texts."""
    with pytest.raises(DataError, match="X must be a list of strings, and is a PosixPath"):
        fitted.predict(tmp_path)
