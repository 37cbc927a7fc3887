from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from clustered import MakeCache
from safetensors.torch import load_file

from llmembed.common.errors import (
    ConfigError,
    MissingPackageError,
    RunFormatError,
    RunLockedError,
)
from llmembed.train import FitConfig, fit
from llmembed.train.gradient import workspace
from llmembed.train.gradient.module import ClassifierModule

HANDLER = signal.getsignal(signal.SIGINT)  # ignored in what a shell runs in the background
KILLED = """
import json, os, signal, sys
from pathlib import Path
from llmembed.train import FitConfig, fit

replace, n_saved = Path.replace, 0

def kill_at_the_third(self, target):
    global n_saved
    n_saved += target.name == "last.ckpt"
    if n_saved == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = kill_at_the_third
fit(FitConfig(**json.loads(sys.argv[1])))
"""
QUICK: dict[str, Any] = {
    "epochs": 8,
    "patience": 8,
    "lr": 0.01,
    "accelerator": "cpu",
    "checkpoint_s": 0,
}


def losses(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "seed-0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_fit_goes_on_to_the_same_result(make_cache: MakeCache, tmp_path: Path) -> None:
    """After kill -9 the same options go on from the last epoch saved, to the same weights."""
    cache, output = str(make_cache()), tmp_path / "r"
    options = json.dumps({"cache": cache, "output": str(output), **QUICK})
    command = [sys.executable, "-Pc", KILLED, options]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    (saved,) = (tmp_path / ".r.partial").glob("*/last.ckpt")
    assert torch.load(saved, weights_only=True)["epoch"] == 1  # from 0: the second was the last
    resumed = fit(FitConfig(cache=cache, output=str(output), **QUICK))
    assert not (tmp_path / ".r.partial").exists()
    whole = fit(FitConfig(cache=cache, output=str(tmp_path / "whole"), **QUICK))
    weights = [load_file(run.path / "model.safetensors") for run in (resumed, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert resumed.metrics["per_seed"] == whole.metrics["per_seed"]
    assert losses(resumed.path) == losses(whole.path)
    assert [row["step"] for row in losses(resumed.path)] == [str(epoch) for epoch in range(1, 9)]


def test_a_checkpoint_that_another_process_clears_ends_no_fit(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a fit of the same run ends and clears its folder, this one goes on without it."""
    replace, cleared = Path.replace, []

    def clear_first(self: Path, target: Path) -> Path:
        if target.name == "last.ckpt" and not cleared:
            cleared.append(self)
            shutil.rmtree(self.parent)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", clear_first)
    fitted = fit(FitConfig(cache=str(make_cache()), output=str(tmp_path / "r"), **QUICK))
    assert cleared
    assert (fitted.path / "model.safetensors").exists()


@pytest.fixture
def interrupted(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FitConfig:
    """A fit that was stopped by Ctrl-C in its third epoch."""
    config = FitConfig(cache=str(make_cache()), output=str(tmp_path / "r"), **QUICK)
    step = ClassifierModule.training_step

    def stop(self: ClassifierModule, pack: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 2:
            raise KeyboardInterrupt
        step(self, pack, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierModule, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    return config


def test_ctrl_c_is_passed_on(interrupted: FitConfig, tmp_path: Path) -> None:
    """Ctrl-C ends a fit as KeyboardInterrupt, keeps the checkpoint and the handler of before."""
    assert signal.getsignal(signal.SIGINT) is HANDLER
    assert len(list((tmp_path / ".r.partial").glob("*/last.ckpt"))) == 1
    assert not interrupted.run_path.exists()


def test_other_options_start_anew(interrupted: FitConfig, tmp_path: Path) -> None:
    """A fit with other options at the same place does not go on from that checkpoint."""
    other = fit(dataclasses.replace(interrupted, lr=0.02))
    alone = fit(dataclasses.replace(interrupted, lr=0.02, output=str(tmp_path / "alone")))
    assert other.metrics["per_seed"] == alone.metrics["per_seed"]
    assert not (tmp_path / ".r.partial").exists()


def test_a_damaged_checkpoint_is_named(interrupted: FitConfig, tmp_path: Path) -> None:
    """A checkpoint that cannot be read is refused, and says what to remove."""
    (saved,) = (tmp_path / ".r.partial").glob("*/last.ckpt")
    saved.write_bytes(saved.read_bytes()[:-2000])
    with pytest.raises(RunFormatError, match=rf"the checkpoint {saved} is damaged .* Remove it"):
        fit(interrupted)


def test_a_pickle_in_place_of_a_checkpoint_is_refused(
    interrupted: FitConfig, tmp_path: Path
) -> None:
    """A checkpoint that would run code is refused, and its code does not run."""
    (saved,) = (tmp_path / ".r.partial").glob("*/last.ckpt")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"state_dict": Evil()}, saved)
    with pytest.raises(RunFormatError, match="was not written by llmembed-fit"):
        fit(interrupted)
    assert not (tmp_path / "evil").exists()


def test_losses_are_logged_by_epoch(make_cache: MakeCache, tmp_path: Path) -> None:
    """The csv of a run has a row an epoch, whose lowest validation loss is the recorded one."""
    config = FitConfig(
        cache=str(make_cache()),
        fusion="gated",
        output=str(tmp_path / "r"),
        calibrate="none",
        **QUICK,
    )
    run = fit(config)
    rows = losses(run.path)
    assert len(rows) == run.metrics["per_seed"][0]["n_epochs"] == 8
    lowest = min(float(row["val_loss"]) for row in rows)
    assert lowest == pytest.approx(run.metrics["per_seed"][0]["val_loss"], abs=2e-3)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_tensorboard(make_cache: MakeCache, tmp_path: Path) -> None:
    """`--logger tensorboard` leaves an event file with a value an epoch for each seed."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard"
    )
    config = FitConfig(
        cache=str(make_cache()),
        logger="tensorboard",
        n_seeds=2,
        output=str(tmp_path / "r"),
        **QUICK,
    )
    run = fit(config)
    for seed in (0, 1):
        events = accumulators.EventAccumulator(str(run.path / "logs" / f"seed-{seed}"))
        events.Reload()
        assert [event.step for event in events.Scalars("val_loss")] == list(range(1, 9))


def test_wandb_offline(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--logger wandb` obeys WANDB_MODE, and leaves an offline run in the run's logs."""
    pytest.importorskip("wandb", reason="extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = FitConfig(cache=str(make_cache()), logger="wandb", output=str(tmp_path / "r"), **QUICK)
    run = fit(config)
    assert len(list((run.path / "logs" / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_logger_that_is_not_installed(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger whose package is missing is refused before anything is read."""
    monkeypatch.setattr(workspace, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"--logger wandb needs wandb.*\[wandb\]"):
        fit(FitConfig(cache="missing.zarr", logger="wandb", output=str(tmp_path / "r")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logger": "mlflow"}, "logger 'mlflow' does not exist. Known: csv, tensorboard, wandb"),
        ({"devices": "2"}, "devices '2' is not one device"),
        ({"fusion": "mean", "logger": "wandb"}, "--logger would do nothing"),
        ({"fusion": "mean", "checkpoint_s": 5}, "--checkpoint-s would do nothing"),
    ],
)
def test_options_of_a_fit_by_gradient(options: dict[str, Any], message: str) -> None:
    """What does not exist, or would do nothing, is refused."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(cache="a.zarr", **options)


def test_what_lightning_refuses_is_told(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of several tasks, of which a fit uses one, is told in our words with a way out."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    where = {"cache": str(make_cache()), "output": str(tmp_path / "r"), "accelerator": "cpu"}
    config = FitConfig(**where, fusion="attention")
    with pytest.raises(ConfigError, match=r"Lightning refuses --accelerator cpu .*--ntasks.*Pass"):
        fit(config)


def test_a_second_fit_to_the_place_is_refused(tmp_path: Path) -> None:
    """It leaves what the first keeps there alone; after the first the place is free."""
    run, refused = tmp_path / "runs/r8", "another fit is making the run .*r8: .* by process"
    with workspace.open_workspace(run) as folder:
        (folder / workspace.LOGS).mkdir()
        with pytest.raises(RunLockedError, match=refused), workspace.open_workspace(run):
            pass
        assert (folder / workspace.LOGS).is_dir()
    assert not folder.exists()
    with workspace.open_workspace(run):
        pass
