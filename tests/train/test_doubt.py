"""When a prediction is trusted: by rows that were held out, in every form of output."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from clustered import MakeCache, clustered, load
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llmembed.common.errors import ConfigError, LLMEmbedWarning, RunFormatError
from llmembed.train import FitConfig, Run, fit, load_run
from llmembed.train.cli.predict import predict_main
from llmembed.train.inputs import Feature, data_in_memory
from llmembed.train.linear.domain import Domain
from llmembed.train.measures import HeldOutRows
from llmembed.train.measures.doubt import abstain_below, label_sets, largest_accuracy, set_threshold
from llmembed.train.runs.held_out import DOMAIN_FILE, HELD_OUT_FILE, as_bytes
from llmembed.train.verbs.fitting import train

GOLDEN = Path(__file__).parent.parent / "golden/run_format_1"


def drawn(n: int, seed: int, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right as often as they say, and the classes drawn from them."""
    generator = np.random.default_rng(seed)
    proba = generator.dirichlet(np.full(n_classes, 0.2), size=n)
    labels = (generator.random(n)[:, None] > proba.cumsum(axis=1)).sum(axis=1)
    return proba, labels.clip(max=n_classes - 1)


def invoke(run: Path, *options: str) -> Any:
    return CliRunner().invoke(predict_main, ["--run", str(run), *options])


@pytest.fixture(scope="module")
def doubting(texts_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of real texts with 200 made-up held-out rows."""
    folder = tmp_path_factory.mktemp("doubt") / "run"
    shutil.copytree(texts_run.path, folder)
    (folder / HELD_OUT_FILE).write_bytes(as_bytes(HeldOutRows.of(*drawn(200, 0, 2))))
    return folder


@given(
    st.lists(st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.booleans()), max_size=40),
    st.sampled_from([0.5, 0.6, 0.75, 0.9]),
)
def test_as_many_rows_as_can_be_are_answered(rows: list[Any], accuracy: float) -> None:
    """Above the threshold wrong rows, one more and their deviation are few; none is lower."""
    held_out = HeldOutRows.of(
        np.array([[p, 1 - p] for p, _ in rows]).reshape(-1, 2),
        np.array([0 if right else 1 for _, right in rows], dtype=np.int64),
    )

    def keeps(threshold: float) -> bool:
        told = held_out.top >= threshold
        n_wrong = int((told & ~held_out.right).sum())
        counted = n_wrong + 1 + np.sqrt(n_wrong + 1)
        return bool(counted <= (1 - accuracy) * int(told.sum()) + 1e-9)

    expected = [float(p) for p in np.unique(held_out.top) if keeps(p)]
    assert abstain_below(held_out, accuracy) == (expected[0] if expected else None)
    most = largest_accuracy(held_out)
    assert most == 0 or abstain_below(held_out, most) is not None
    assert abstain_below(held_out, most + 0.001) is None


@pytest.mark.parametrize("accuracy", [0.85, 0.9, 0.95])
def test_answers_are_right_as_often_as_promised(accuracy: float) -> None:
    """Of new rows of the same kind the answered ones are right with the share, or a point more."""
    found = []
    for seed in range(40):
        held_out = HeldOutRows.of(*drawn(1000, seed))
        proba, labels = drawn(4000, 1000 + seed)
        told = proba.max(axis=1) >= abstain_below(held_out, accuracy)
        assert told.any()
        found.append((proba.argmax(axis=1) == labels)[told].mean())
    assert accuracy <= np.mean(found) < accuracy + 0.015


def test_what_cannot_be_promised_is_not_answered() -> None:
    """Where even the surest are right less often, few of many training sets answer anything."""
    generator = np.random.default_rng(0)
    answered = []
    for _ in range(200):
        top = generator.uniform(0.5, 1, 1500)
        right = generator.random(1500) < 0.85 * top  # 85 % at most
        held_out = HeldOutRows.of(np.stack([top, 1 - top], axis=1), np.where(right, 0, 1))
        answered.append(abstain_below(held_out, 0.9) is not None)
    assert np.mean(answered) < 0.1


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=30),
    st.sampled_from([0.1, 0.5, 0.75, 0.9]),
)
def test_a_new_row_is_in_its_set_whatever_its_rank(true: list[float], coverage: float) -> None:
    """Of n + 1 rows, each in turn the new one, the sets hold enough; a smaller set would not."""
    values = np.array(true, dtype=np.float32)
    thresholds = [set_threshold(np.delete(values, k), coverage) for k in range(len(values))]
    assert np.mean(values >= thresholds) >= coverage - 1e-9
    distinct = np.linspace(0.1, 0.9, 20, dtype=np.float32)
    kept = distinct[1:] >= [set_threshold(np.delete(distinct, k), coverage) for k in range(1, 20)]
    assert kept.mean() <= coverage + 1 / 20 + 1 / 19


@pytest.mark.parametrize("by_class", [False, True])
def test_sets_hold_the_right_label_as_often_as_promised(*, by_class: bool) -> None:
    """Of new rows the sets hold the label with the share; by class, of the rows of each class."""
    hits = np.zeros((3, 2))
    for seed in range(60):
        (proba, labels), (new, truth) = drawn(300, seed), drawn(1000, 500 + seed)
        proba[labels == 0, 0] /= 2  # what is said of one class is less than it should be
        new[truth == 0, 0] /= 2
        sets = label_sets(HeldOutRows.of(proba, labels), new, 0.8, by_class=by_class)
        for k in range(3):
            hits[k] += sets[truth == k, k].sum(), (truth == k).sum()
    of_class = hits[:, 0] / hits[:, 1]
    assert abs(hits[:, 0].sum() / hits[:, 1].sum() - 0.8) < 0.01
    assert (np.abs(of_class - 0.8) < 0.02).all() == by_class


@pytest.mark.parametrize("fusion", ["cooc", "auto"])
def test_a_share_out_of_reach_is_told_with_what_is_in_reach(fusion: str, tmp_path: Path) -> None:
    """What the message names is taken; of a fit by gradient, that auto holds out all rows."""
    folder = shutil.copytree(GOLDEN / fusion, tmp_path / "run")
    proba = np.repeat([[0.9, 0.1, 0], [0.6, 0.4, 0]], [30, 10], axis=0)
    held_out = HeldOutRows.of(proba, np.array([0] * 35 + [1] * 5))
    (folder / HELD_OUT_FILE).write_bytes(as_bytes(held_out))
    run = load_run(folder)
    way = "fit on more rows, or with --fusion auto, which holds every training row out."
    way = f"Pass a smaller share, or {way if fusion == 'cooc' else 'fit on more rows.'}"
    for share, told in {
        0.96: "has 35 of 40 right, and the surest of them show 0.933 at most, and 0.96 takes 50 r",
        0.94: "has 35 of 40 right, and the surest of them show 0.933 at most. Pass a smaller sh",
    }.items():
        with pytest.raises(ConfigError) as caught:
            run.abstain_below(share)
        assert f"of the rows held out of its training it {told}" in str(caught.value)
        assert str(caught.value).endswith(way)
    assert run.abstain_below(0.933) == pytest.approx(0.9)
    with pytest.raises(ConfigError) as caught:
        run.check_sets(0.98, by_class=True)
    told = (
        "keeps fewer of any class, by class: 40 in all, of which 35 of one class, which reach 0.97"
    )
    assert told in str(caught.value)
    assert str(caught.value).endswith(way)
    assert run.check_sets(0.972, by_class=True) is run.held_out


def test_label_sets_are_told_in_every_form(doubting: Path, tmp_path: Path) -> None:
    """A list of labels, likeliest first: as JSON, in a csv as JSON, on the terminal, in parquet."""
    held = np.array([[0.1, 0.9]] * 40)
    (doubting / HELD_OUT_FILE).write_bytes(as_bytes(HeldOutRows.of(held, np.zeros(40, dtype=int))))
    run, texts = load_run(doubting), ["w1 w2", "w3 " * 30]
    proba = run.predict_proba(texts)
    expected = [
        [run.labels[k] for k in row if p[k] >= 0.1]
        for row, p in zip((-proba).argsort(axis=1), proba, strict=True)
    ]
    assert run.label_sets(proba, 0.9) == expected
    options = [part for text in texts for part in ("--text", text)] + ["--conformal", "0.9"]
    rows = json.loads(invoke(doubting, *options, "--json").stdout)
    assert [row["label_set"] for row in rows] == expected
    lines = invoke(doubting, *options).stdout.splitlines()
    assert [line.split("\t")[3] for line in lines] == [
        f"label_set={json.dumps(e)}" for e in expected
    ]
    for suffix in (".csv", ".parquet"):
        invoke(doubting, *options, "--output", str(tmp_path / f"out{suffix}"))
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [json.loads(row["label_set"]) for row in csv.DictReader(file)] == expected
    assert pq.read_table(tmp_path / "out.parquet")["label_set"].to_pylist() == expected
    with pytest.warns(LLMEmbedWarning, match="1 of 2 classes have too few held-out rows"):
        by_class = run.label_sets(proba, 0.9, by_class=True)
    assert all(run.labels[1] in one for one in by_class)
    result = invoke(doubting, *options[:-1], "0.99")
    assert "--conformal 0.99 takes 99 held-out rows, and the run" in result.stderr
    assert "of all classes: 40 in all, which reach 0.975 at most. Pass a sm" in result.stderr
    assert (result.exit_code, result.stdout) == (1, "")
    result = invoke(doubting, *options[:-1], "nan")
    assert "--conformal is nan, and the share of sets" in result.stderr
    assert invoke(doubting, *options, "--conformal-by", "x").exit_code == 2
    assert invoke(doubting, "--text", "w1", "--conformal-by", "class").exit_code == 2


def test_few_rows_are_held_out_by_folds_that_leave_enough() -> None:
    """Sets are within a point of what was asked for; by five folds, of 480 of 600 rows, not."""
    assert coverage_of_fits(FitConfig(cache="none", fusion="concat", head="lda")) < 0.81
    assert coverage_of_fits(FitConfig(cache="none", fusion="concat", head="lda", folds=5)) > 0.81


def coverage_of_fits(config: FitConfig) -> float:
    """How often sets of 80 % hold the label of a new row, on the mean of 40 training sets."""
    plan, found = config.plan(), []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        y = generator.integers(0, 3, 2600)
        x = torch.from_numpy(generator.standard_normal((2600, 150), dtype=np.float32))
        x[np.arange(2600), y] += 1.5
        features = [Feature("some", "mean", 1, 150)]
        data = data_in_memory(plan.reading, x[:600].clone(), y[:600], ["a", "b", "c"], features)
        trained = train(plan, data).best
        logits = trained.classifier.logits_all(data.standardiser(x[600:]))
        assert trained.held_out is not None
        sets = label_sets(trained.held_out, logits.softmax(dim=1).numpy(), 0.8)
        found.append(sets[np.arange(2000), y[600:]].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("fusion", ["concat", "auto", "cooc"])
def test_rows_are_judged_by_who_has_not_seen_them(make_cache: MakeCache, fusion: str) -> None:
    """With labels drawn by lot the held-out rows are right by chance, those trained on are not."""
    features, _ = clustered(150, 0)
    labels = np.random.default_rng(5).integers(0, 3, 150).astype(np.int32)
    cache = str(make_cache({"train": (features, labels), "test": clustered(60, 1)}))
    options = {"val_fraction": 0.3, "epochs": 5} if fusion == "cooc" else {}
    run = fit(FitConfig(cache=cache, fusion=fusion, baseline="none", **options))
    assert run.held_out is not None
    n, right = len(run.held_out.right), run.held_out.right.mean()
    assert n == (150 if fusion != "cooc" else 45)
    assert right < 1 / 3 + 4 * np.sqrt(2 / 9 / n)
    if fusion != "cooc":
        assert right == pytest.approx(run.metrics["per_seed"][0]["held_out_accuracy"])
    assert run.metrics["abstain"]["n_held_out"] == n


def test_the_evaluation_rows_decide_nothing(make_cache: MakeCache) -> None:
    """Other labels of the evaluation split leave what a run keeps of held-out rows as it is."""
    features, labels = clustered(60, 1)
    kept = []
    for name, shift in (("a", 0), ("b", 1)):
        splits = {"train": clustered(90, 0), "test": (features, (labels + shift) % 3)}
        cache = str(make_cache(splits, name=f"{name}.zarr"))
        run = fit(FitConfig(cache=cache, fusion="concat", output=f"{cache}-run", baseline="none"))
        kept.append((run.path / HELD_OUT_FILE).read_bytes())
        loaded = load_run(run.path).held_out
        assert loaded is not None
        assert as_bytes(loaded) == kept[-1]
    assert kept[0] == kept[1]
    told = run.metrics["abstain"]["at"]["0.9"]
    assert set(told) == {"threshold", "coverage", "eval_coverage", "eval_accuracy"}
    assert told["eval_accuracy"] < 0.5 < told["coverage"]


def test_what_is_refused_is_said_in_every_form(doubting: Path, tmp_path: Path) -> None:
    """A text below the threshold has the label of --unknown and is marked, as no other is."""
    run, texts = load_run(doubting), ["w1 w2", "w3 " * 30, "w7 w8 w9 w1 w5 w6 w2 w3 w4 w1 w9", "w5"]
    proba = run.predict_proba(texts)
    top, names = proba.max(axis=1), [run.labels[k] for k in proba.argmax(axis=1)]
    middle = float(np.sort(top)[1:3].mean())
    labels = np.zeros(100, dtype=np.int64)
    held = np.array([[middle + 1e-4, 1 - middle]] * 50 + [[0.5, 0.5]] * 50)
    labels[50:] = 1
    (doubting / HELD_OUT_FILE).write_bytes(as_bytes(HeldOutRows.of(held, labels)))
    run = load_run(doubting)
    told = top >= middle
    expected = [name if tells else "other" for name, tells in zip(names, told, strict=True)]
    assert 0 < told.sum() < 4
    assert run.predict(texts, abstain=0.95, unknown="other") == expected
    assert run.predict(texts) == names
    options = [part for text in texts for part in ("--text", text)]
    options += ["--abstain", "0.95"]
    rows = json.loads(invoke(doubting, *options, "--unknown", "other", "--json").stdout)
    assert [row["label"] for row in rows] == expected
    assert [row["abstained"] for row in rows] == (~told).tolist()
    lines = invoke(doubting, *options).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [e.replace("other", "") for e in expected]
    said = ["abstained=false" if tells else "abstained=true" for tells in told]
    assert [line.split("\t")[3] for line in lines] == said
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"out{suffix}"
        assert invoke(doubting, *options, "--output", str(path)).exit_code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["abstained"] for row in csv.DictReader(file)] == [str(not t) for t in told]
    assert pq.read_table(tmp_path / "out.parquet")["abstained"].to_pylist() == (~told).tolist()


def relative_distances(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The definition: to the nearest class by the shared covariance, less to all by that of all."""

    def inverse(rows: np.ndarray) -> np.ndarray:
        covariance = rows.T @ rows / len(rows)
        unit = np.eye(len(covariance)) * (0.1 * np.diag(covariance).mean() + 1e-6)
        return np.linalg.inv(0.9 * covariance + unit)

    means = np.stack([x[y == k].mean(axis=0) for k in np.unique(y)])
    within, overall = inverse(x - means[np.searchsorted(np.unique(y), y)]), inverse(x - x.mean(0))
    of_class = [np.einsum("nk,kl,nl->n", z - m, within, z - m) for m in means]
    of_all = np.einsum("nk,kl,nl->n", z - x.mean(0), overall, z - x.mean(0))
    return np.min(of_class, axis=0) - of_all


def test_the_distance_is_the_published_one(make_cache: MakeCache) -> None:
    """Shares are those of the formula, in float64, with held-out distances of the folds."""
    data = load(FitConfig(cache=str(make_cache()), fusion="concat"))
    domain = Domain.of(data, 3)
    x, y = data.x.double().numpy(), data.y.numpy()
    z = np.random.default_rng(0).normal(size=(200, x.shape[1])).astype(np.float32) * 1.5
    far = relative_distances(x, y, z.astype(np.float64))
    held_out = domain.distances.numpy()
    expected = [(1 + (held_out >= one).sum()) / (len(x) + 1) for one in far]
    np.testing.assert_allclose(domain.shares_as_far(torch.from_numpy(z)), expected, atol=0.012)
    seen = np.sort(relative_distances(x, y, x))
    assert np.median(held_out) > np.median(seen)  # which rows that the moments know are not
    assert len(held_out) == len(x)


def test_shares_are_as_likely_as_they_say(make_cache: MakeCache) -> None:
    """Of new rows of the same kind a tenth have 0.1 or less; of a class never seen nearly all."""
    splits = {"train": clustered(600, 0), "test": clustered(2000, 1)}
    data = load(FitConfig(cache=str(make_cache(splits)), fusion="concat"))
    domain = Domain.of(data, 0)
    shares = domain.shares_as_far(data.x_eval)
    for share in (0.05, 0.1, 0.5):
        assert (shares <= share).mean() == pytest.approx(share, abs=0.035)
    features, labels = clustered(400, 2, n_classes=4)
    other = torch.from_numpy(np.concatenate([*features], axis=1)[labels == 3]).float()
    assert (domain.shares_as_far(data.standardiser(other)) <= 0.1).mean() > 0.5


def test_wide_features_are_projected(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more columns than the limit the directions of most difference stay; the seed draws."""
    monkeypatch.setattr("llmembed.train.linear.domain.WIDTH", 12)
    splits = {"train": clustered(600, 0), "test": clustered(2000, 1)}
    data = load(FitConfig(cache=str(make_cache(splits)), fusion="concat"))
    domain, again = Domain.of(data, 0), Domain.of(data, 0)
    assert domain.projection.shape == (32, 12)
    assert (domain.projection == again.projection).all()
    kept = (data.x @ domain.projection).square().sum()
    best = torch.linalg.svdvals(data.x)[:12].square().sum()
    assert kept > 0.9 * best
    assert (domain.shares_as_far(data.x_eval) <= 0.1).mean() == pytest.approx(0.1, abs=0.035)
    assert (domain.shares_as_far(6 * data.x_eval.flip(1)) <= 0.1).mean() > 0.5


def test_few_rows_of_wide_features_are_not_in_their_own_projection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth of new rows have 0.1 or less; a projection that held a row would keep all of it."""
    monkeypatch.setattr("llmembed.train.linear.domain.WIDTH", 40)
    plan, found = FitConfig(cache="none", fusion="concat").plan(), []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        y = generator.integers(0, 3, 1120)
        x = torch.from_numpy(generator.standard_normal((1120, 200), dtype=np.float32))
        x[:, 5] = x[:, 4]
        x[np.arange(1120), y] += 3
        features = [Feature("some", "mean", 1, 200)]
        new = x[120:].clone()
        data = data_in_memory(plan.reading, x[:120].clone(), y[:120], ["a", "b", "c"], features)
        shares = Domain.of(data, seed).shares_as_far(data.standardiser(new))
        found.append([(shares <= 0.1).mean(), (shares <= 0.5).mean()])
    np.testing.assert_allclose(np.mean(found, axis=0), [0.1, 0.5], atol=0.06)


def test_a_run_keeps_how_wide_features_are_projected(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is what was fitted, in whatever order the numbers lay in memory."""
    for module in ("linear.domain", "runs.held_out"):
        monkeypatch.setattr(f"llmembed.train.{module}.WIDTH", 12)
    run = fit(FitConfig(cache=str(make_cache()), fusion="concat", baseline="none"))
    loaded = load_run(run.path).domain
    assert run.domain is not None
    assert loaded is not None
    assert run.domain.projection.shape == (32, 12)
    for name, one in vars(run.domain).items():
        assert torch.equal(getattr(loaded, name), one), name


def test_a_run_tells_texts_of_another_domain(texts_run: Run, tmp_path: Path) -> None:
    """--ood gives the share and the note, those of Python; what is damaged or missing is told."""
    run = load_run(texts_run.path)
    texts = ["w1 w2", "w3 " * 300]
    with pytest.warns(LLMEmbedWarning, match="cut at 64 tokens"):
        shares = run.out_of_domain(texts)
    assert ((shares > 0) & (shares <= 1)).all()
    options = [part for text in (*texts, " ") for part in ("--text", text)]
    rows = json.loads(invoke(run.path, *options, "--ood", "--json").stdout)
    assert [row["out_of_domain"] for row in rows[:2]] == pytest.approx(shares.tolist(), abs=0.02)
    assert [row["note"] for row in rows] == ["", "truncated", "empty"]
    folder = shutil.copytree(run.path, tmp_path / "run")
    arrays = load_file(folder / DOMAIN_FILE)
    for change in ({"centre": arrays["centre"][1:]}, {"distances": arrays["distances"] * np.nan}):
        save_file(arrays | change, folder / DOMAIN_FILE)
        with pytest.raises(RunFormatError, match=r"domain\.safetensors is damaged"):
            load_run(folder)
    (folder / DOMAIN_FILE).unlink()
    with pytest.raises(ConfigError, match="does not keep what --ood needs"):
        load_run(folder).out_of_domain(["w1"])


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_share_that_no_rule_keeps_is_refused(doubting: Path, share: str) -> None:
    """0, 1, what lies beyond, and NaN are told with the value and what is allowed."""
    result = invoke(doubting, "--text", "w1", "--abstain", share)
    assert result.exit_code == 1
    assert f"--abstain is {share}, and the share of answers that are to be right" in result.stderr
    assert "lies between 0 and 1, both excluded" in result.stderr


def test_a_share_that_is_out_of_reach_is_refused(doubting: Path, tmp_path: Path) -> None:
    """One held-out row promises nothing; an old run has none; both are a sentence."""
    folder = shutil.copytree(doubting, tmp_path / "run")
    one = HeldOutRows.of(np.array([[1.0, 0.0]]), np.array([0]))
    (folder / HELD_OUT_FILE).write_bytes(as_bytes(one))
    told = (
        r"--abstain 0\.6 is more than .* has 1 of 1 right, .* for any share.*rows or more\. Fit on"
    )
    with pytest.raises(ConfigError, match=told):
        load_run(folder).predict(["w1"], abstain=0.6)
    with pytest.raises(ConfigError, match="keeps no held-out rows, which --abstain needs"):
        load_run(GOLDEN / "auto").predict(["w1"], abstain=0.6)
    result = invoke(folder, "--text", "w1", "--unknown", "x")
    assert result.exit_code == 2
    assert "--unknown is for texts that --abstain leaves" in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"top": None},
        {"label": np.array([0, 9], dtype=np.int32)},
        {"top": np.array([0.5, np.nan], dtype=np.float32)},
        {"true": np.array([0.5], dtype=np.float32)},
        {"right": np.array([1, 0], dtype=np.int32)},
    ],
)
def test_damage_is_told(doubting: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Missing arrays, other types or lengths, and values out of range are refused as damage."""
    path = shutil.copytree(doubting, tmp_path / "run") / HELD_OUT_FILE
    path.write_bytes(as_bytes(HeldOutRows.of(*drawn(2, 0, 2))))
    arrays = load_file(path) | change
    save_file({name: array for name, array in arrays.items() if array is not None}, path)
    with pytest.raises(RunFormatError, match=r"held_out\.safetensors is damaged"):
        load_run(path.parent)
    path.write_bytes(b"no")
    with pytest.raises(RunFormatError, match=r"held_out\.safetensors is damaged"):
        load_run(path.parent)
