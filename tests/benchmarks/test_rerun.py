"""The rerun of suites from cached features: found by fingerprint, compared row by row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clustered import LAYERS, clustered, write_cache
from hypothesis import given
from hypothesis import strategies as st
from regression import cases, compare, places, rerun
from regression.false_alarms import run_trial, summary, weakened
from regression.suites import FOLDER, load_suite
from scipy.stats import binomtest
from toy_model import save_toy_model, toy_texts

from llmembed.cache_format import open_cache
from llmembed.cache_format.tools import copy
from llmembed.common.errors import CacheCorruptError, CacheMismatchError, ConfigError

pytestmark = pytest.mark.slow

SUITE = """
about = "toy"
slower = 100
[sources.tiny]
layers = "{layers}"
max_length = 64
[caches.toy]
dataset = "{dataset}"
splits = {{ train = 0, test = 0 }}
fingerprint = "{fingerprint}"
[fits.mean]
fusion = "mean"
head = "ridge"
[fits.cooc]
fusion = "cooc"
epochs = 12
seeds = [0, 1]
{rest}
"""
OTHER_CACHE = """
[caches.other]
dataset = "other"
splits = { train = 0, test = 0 }
fingerprint = "ab"
"""
WriteSuite = Callable[..., str]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache whose name says nothing."""
    splits = {"train": clustered(120, 0), "test": clustered(200, 1)}
    return write_cache(tmp_path / "features" / "some-name.zarr", splits)


@pytest.fixture
def write_suite(tmp_path: Path) -> WriteSuite:
    def write(
        cache: Path, *, layers: str = "1,2", dataset: str = "toy", rest: str = "", **changed: str
    ) -> str:
        values = {"fingerprint": open_cache(cache).fingerprint, **changed}
        path = tmp_path / "toy.toml"
        path.write_text(SUITE.format(layers=layers, dataset=dataset, rest=rest, **values))
        return str(path)

    return write


def looking_in(tmp_path: Path, *others: str, **options: bool) -> places.Places:
    return places.Places(work=tmp_path / "work", others=others, **options)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=9))
def test_the_p_value_is_that_of_all_sign_flips(differences: list[int]) -> None:
    """Counting all 2^n assignments of signs gives the same p-value."""
    flips = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(np.dot(signs, differences)) for signs in flips]
    expected = np.mean(np.array(sums) >= abs(sum(differences)))
    assert compare.sign_flip_p(np.array(differences)) == pytest.approx(expected)


@pytest.mark.parametrize(("n_worse", "n_better"), [(0, 0), (3, 1), (900, 800)])
def test_with_one_seed_the_p_value_is_mcnemars(n_worse: int, n_better: int) -> None:
    """The exact sign-flip test on differences of one is the exact binomial test."""
    differences = np.repeat([-1, 1, 0], [n_worse, n_better, 5])
    n = n_worse + n_better
    expected = binomtest(n_worse, n).pvalue if n else 1.0
    assert compare.sign_flip_p(differences) == pytest.approx(expected)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_counts_of_right_seeds_survive_the_baseline_file(counts: list[int]) -> None:
    """Packing and unpacking gives the counts back, as bits or as bytes."""
    correct = np.array(counts, dtype=np.int64)
    assert cases.unpack(cases.pack(correct), len(counts)).tolist() == counts


def test_a_cache_is_found_by_its_fingerprint_whatever_its_name(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """Of two caches in a folder the one with the suite's texts, labels and sources is used."""
    write_cache(cache.parent / "a-toy.zarr", {"train": clustered(60, 3), "test": clustered(9, 4)})
    plan = load_suite(write_suite(cache)).caches["toy"]
    (cache.parent / "no-cache").mkdir()
    found = places.require_cache(plan, looking_in(tmp_path, str(cache.parent)))
    assert found == str(cache)


def test_a_cache_with_the_name_and_other_texts_is_never_used(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """The error names the fingerprint, the places, and why each cache was passed over."""
    plan = load_suite(write_suite(cache, fingerprint="ab" * 32)).caches["toy"]
    with pytest.raises(
        FileNotFoundError, match=r"abababababababab of toy lies in .*features"
    ) as error:
        places.require_cache(plan, looking_in(tmp_path, str(cache.parent)))
    assert f"{cache}: its fingerprint is" in str(error.value)
    assert "LLMEMBED_CACHES" in str(error.value)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [("1,2,3", "test/tiny lacks mean/layer_003"), ("1", "test/tiny adds mean/layer_002")],
)
def test_missing_and_surplus_layers_are_no_match(
    cache: Path, write_suite: WriteSuite, layers: str, reason: str
) -> None:
    """A fit uses all layers that it finds, so a cache must hold the suite's and no other."""
    plan = load_suite(write_suite(cache, layers=layers)).caches["toy"]
    found, passed_over = places.find_cache(plan, [str(cache.parent)])
    assert (found, passed_over[str(cache)].replace("train", "test")) == (None, reason)


def test_an_incomplete_cache_is_no_match(tmp_path: Path, write_suite: WriteSuite) -> None:
    """A cache whose writer was interrupted is passed over."""
    path = write_cache(tmp_path / "features" / "toy.zarr", finish=False)
    found, passed_over = places.find_cache(
        load_suite(write_suite(path)).caches["toy"], [str(path.parent)]
    )
    assert found is None
    assert "is incomplete" in passed_over[str(path)]


def test_a_cache_of_another_machine_is_copied_once(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """A remote cache is fetched into the work folder, and found there when the URL is gone."""
    copy(cache, "memory://elsewhere/other.zarr")
    plan = load_suite(write_suite(cache)).caches["toy"]
    fetched = places.require_cache(plan, looking_in(tmp_path, "memory://elsewhere"))
    assert Path(fetched).parent == tmp_path / "work"
    assert places.require_cache(plan, looking_in(tmp_path)) == fetched


def test_a_damaged_cache_stops_the_run(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """A flipped bit in a chunk is found before anything is fitted."""
    chunk = cache / "train" / "tiny" / "mean" / f"layer_{LAYERS[0]:03d}" / "c.0.0"
    chunk = chunk if chunk.exists() else next(chunk.parent.rglob("0"))
    content = bytearray(chunk.read_bytes())
    content[10] ^= 1
    chunk.write_bytes(bytes(content))
    plan = load_suite(write_suite(cache)).caches["toy"]
    with pytest.raises(CacheCorruptError, match="layer_001"):
        places.require_cache(plan, looking_in(tmp_path, str(cache.parent)))


def test_what_is_nowhere_is_extracted_and_must_be_what_was_named(
    cache: Path, write_suite: WriteSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of other texts than the suite's are refused, with both fingerprints."""
    monkeypatch.setenv("LLMEMBED_HOME", str(tmp_path / "home"))
    for split, n in (("train", 20), ("test", 10)):
        rows = [f"{text}\t{row % 2}" for row, text in enumerate(toy_texts(n))]
        lines = "\n".join(["text\tlabel", *rows])
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{split}.tsv").write_text(lines)
    model = str(save_toy_model(tmp_path / "tiny"))
    monkeypatch.chdir(tmp_path)  # so that the source's name, tiny, is the model's folder
    suite = load_suite(write_suite(cache, layers="1", dataset=str(tmp_path / "texts")))
    with pytest.raises(CacheMismatchError, match=r"tiny|texts and is not what the suite names"):
        places.require_cache(suite.caches["toy"], looking_in(tmp_path, may_extract=True))
    assert Path(model).name == "tiny"
    made = open_cache(tmp_path / "work" / "toy.zarr").fingerprint
    again = load_suite(write_suite(cache, layers="1", fingerprint=made))
    found = places.require_cache(again.caches["toy"], looking_in(tmp_path, may_extract=True))
    assert found == str(tmp_path / "work" / "toy.zarr")


def test_a_run_is_compared_with_the_accepted_one(
    cache: Path,
    write_suite: WriteSuite,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New figures are accepted, an equal run passes, and a fusion that loses features fails."""
    monkeypatch.setenv(places.VARIABLE, str(cache.parent))
    command = [write_suite(cache)]
    command += ["--work", str(tmp_path), "--baseline", str(tmp_path / "baseline.json")]
    assert rerun.main([*command, "--update"]) == 0
    assert rerun.main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["p_holm"] for case in document["cases"].values()] == [1.0, 1.0]
    with weakened("mean", 8):
        assert rerun.main(command) == 1
    output = capsys.readouterr().out
    assert "**Regression: toy/mean**" in output
    assert json.loads(output.splitlines()[-1])["regressions"] == ["toy/mean"]


def test_a_part_of_a_suite_leaves_the_figures_of_the_rest(
    cache: Path, write_suite: WriteSuite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What --only leaves out is not run, not gone, and stays accepted; a wrong name is refused."""
    path = write_suite(cache, rest=OTHER_CACHE)
    command = [path, "--work", str(tmp_path), "--caches", str(cache.parent), "--only", "toy"]
    command += ["--baseline", str(tmp_path / "baseline.json")]
    assert rerun.main([*command, "--update"]) == 0
    accepted = cases.read_baseline(tmp_path / "baseline.json")
    accepted["other/mean"] = accepted["toy/mean"]
    cases.write_baseline(tmp_path / "baseline.json", accepted)
    assert rerun.main([*command, "--update"]) == 0
    assert "gone" not in capsys.readouterr().out
    assert set(cases.read_baseline(tmp_path / "baseline.json")) == set(accepted)
    assert rerun.main([path, "--only", "toi"]) == 1
    assert "data set 'toi' does not exist; did you mean 'toy'?" in capsys.readouterr().err


def test_what_a_suite_expects_holds_whatever_was_accepted(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """An accuracy below the suite's own figure fails even against an equal baseline."""
    rest = "at_least = { toy = 1.01 }"
    command = [write_suite(cache, rest=rest), "--work", str(tmp_path)]
    command += ["--caches", str(cache.parent), "--baseline", str(tmp_path / "b.json"), "--update"]
    assert rerun.main(command) == 1


def test_other_seeds_raise_no_alarm_and_a_weakened_fusion_does(
    cache: Path, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """The experiment on noise and faults tells them apart at toy size."""
    suite = load_suite(write_suite(cache))
    outcomes = rerun.run_suite(suite, looking_in(tmp_path, str(cache.parent)))
    trial = run_trial(suite, outcomes, {"toy": str(cache)}, ["mean"], 8, 0)
    assert (trial.false_alarms, trial.caught) == ([], {"mean": True})
    assert summary([trial, trial])["points_lost"]["mean"] == trial.points_lost["mean"] > 5


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("[fits.max]\nfusoin = 'max'", r"key 'fusoin' does not exist; did you mean 'fusion'"),
        ("[fits.max]\nfusion = 'maxx'", r"fusion 'maxx' does not exist; did you mean 'max'"),
        ("[fits.max]\nfusion = 'max'\ncaches = ['toi']", r"cache 'toi' does not exist; did you"),
    ],
)
def test_a_suite_that_names_what_does_not_exist_is_refused(
    cache: Path, write_suite: WriteSuite, rest: str, message: str
) -> None:
    """A misspelt option, fusion or cache is an error with a close match, before any fit."""
    with pytest.raises(ConfigError, match=message):
        load_suite(write_suite(cache, rest=rest))


def test_the_key_of_stored_features_is_that_of_the_features(
    cache: Path, write_suite: WriteSuite, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other texts or layers have another key, other fits have not; the command prints it alone."""
    suite = load_suite(write_suite(cache))
    other_fit = load_suite(write_suite(cache, rest="[fits.max]\nfusion = 'max'"))
    assert other_fit.features_key == suite.features_key
    for changed in ({"layers": "1"}, {"fingerprint": "ab"}):
        path = write_suite(cache, **changed)
        assert rerun.main([path, "--key"]) == 0
        printed = capsys.readouterr().out.strip()
        assert printed == load_suite(path).features_key != suite.features_key


def test_an_unknown_suite_is_named_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says which suites there are, and exits with 1."""
    assert rerun.main(["cii", "--work", str(tmp_path)]) == 1
    assert "suite 'cii' does not exist; did you mean 'ci'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_suite_can_be_read(path: Path) -> None:
    """The suites in the repository name fits that exist, with options that exist."""
    assert list(load_suite(path.stem).cases)


def test_the_caches_in_the_repository_are_those_of_the_ci_suite() -> None:
    """Each is found by its fingerprint and sound, all take at most 20 MB, and none is spare."""
    suite = load_suite("ci")
    place = places.Places(work=places.COMMITTED)
    found = {places.require_cache(plan, place) for plan in suite.caches.values()}
    assert found == {str(path) for path in places.COMMITTED.iterdir()}
    files = [path for path in places.COMMITTED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6


def test_the_committed_baseline_is_of_the_committed_caches() -> None:
    """Every case of the CI suite has accepted figures on the rows of its cache."""
    suite = load_suite("ci")
    accepted = cases.read_baseline(cases.BASELINES / "ci.json")
    expected = {f"{plan.name}/{fit.name}": plan.fingerprint for plan, fit in suite.cases}
    assert {name: outcome.fingerprint for name, outcome in accepted.items()} == expected
