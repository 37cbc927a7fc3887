"""Names and links of what is foreign lead to no place outside of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors import safe_open
from toy_commands import EXTRACTED, done, refused

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.fit import fit_main

Tries = Callable[[int], None]
OUTSIDE = ("..", "../x", "../../x", "/etc/x", "a/../../x", ".", "a/b", "x\0", "~root", "C:\\x", "")


@pytest.mark.fault("S3")
def test_names_lead_nowhere_else(world: Path, tries: Tries) -> None:
    """Names of sources and splits that are paths are refused, and nothing is written outside."""
    before = {str(path) for path in world.parent.rglob("*")}
    number = 0
    for name in OUTSIDE:
        given = ["--model", "toy", "--dataset", "topics", "--cache", "x.zarr", *EXTRACTED]
        if name:
            refused(extract_main, *given, "--source", name)
            refused(extract_main, *given, "--split", name)
            refused(fit_main, "--cache", "topics.zarr", "--source", name, "--output", "r")
            refused(fit_main, "--cache", "topics.zarr", "--eval-split", name, "--output", "r")
            number += 4
    left = {str(path) for path in world.parent.rglob("*")} - before
    assert not [path for path in left if not path.startswith(str(world / "x.zarr"))]
    tries(number)


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", [one for one in OUTSIDE if one != "a/b"])
def test_a_foreign_cache_names_no_place_outside(world: Path, name: str) -> None:
    """A split or a source of the header that is a path is refused before anything is opened."""
    header = world / "topics.zarr" / "zarr.json"
    text = header.read_text(encoding="utf-8")
    for key in ("train", "toy"):
        changed = text.replace(f'"{key}":', f"{json.dumps(name)}:")
        changed = changed.replace(f'"name": "{key}"', f'"name": {json.dumps(name)}')
        changed = changed.replace(f'"name":"{key}"', f'"name":{json.dumps(name)}')
        assert changed != text
        header.write_text(changed, encoding="utf-8")
        refused(cache_main, "verify", "topics.zarr")
        refused(fit_main, "--cache", "topics.zarr", "--output", "r")
        refused(cache_main, "copy", "topics.zarr", "copied.zarr")


@pytest.mark.fault("S3")
def test_shards_of_a_model_lie_in_its_folder(world: Path, tries: Tries) -> None:
    """An index of weights that names a file outside the folder is refused."""
    (world / "toy" / "model.safetensors").rename(world / "outside.safetensors")
    given = ["--model", "toy", "--dataset", "topics", "--cache", "x.zarr", *EXTRACTED]
    index = world / "toy" / "model.safetensors.index.json"
    places = [
        "../outside.safetensors",
        str(world / "outside.safetensors"),
        "./../outside.safetensors",
    ]
    for place in places:
        with safe_open(world / "outside.safetensors", "pt") as file:
            weights = dict.fromkeys(file.keys(), place)
        index.write_text(json.dumps({"metadata": {}, "weight_map": weights}), encoding="utf-8")
        message = refused(extract_main, *given)
        assert "safetensors" in message
    tries(len(places))


def _external(file: h5py.File, key: str) -> None:
    file[key] = h5py.ExternalLink("other.h5", "/secret")


def _soft(file: h5py.File, key: str) -> None:
    file[key] = h5py.SoftLink("/elsewhere")


def _virtual(file: h5py.File, key: str) -> None:
    layout = h5py.VirtualLayout((160,), "<i4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (160,))
    file.create_virtual_dataset(key, layout)


def _stored_elsewhere(file: h5py.File, key: str) -> None:
    file.create_dataset(key, (160,), "<i4", external=[("secret.bin", 0, 640)])


def _reference(file: h5py.File, key: str) -> None:
    file.create_dataset(key, (160,), h5py.ref_dtype)


def _named_type(file: h5py.File, key: str) -> None:
    file[key] = np.dtype("<i4")


@pytest.mark.fault("S4")
@pytest.mark.parametrize(
    "link", [_external, _soft, _virtual, _stored_elsewhere, _reference, _named_type]
)
def test_links_of_hdf5_are_refused(world: Path, link: Callable[..., None], tries: Tries) -> None:
    """In place of any data set or group: refused before it is read, and no cache is made."""
    done(cache_main, "convert", "topics.zarr", "c.h5")
    secret = np.full(160, 7_777_777, "<i4")
    secret.tofile(world / "secret.bin")
    with h5py.File("other.h5", "w") as file:
        file["secret"] = secret
    keys: list[str] = []
    with h5py.File("c.h5") as file:
        file.visit(keys.append)
    for number, key in enumerate(keys):
        shutil.copy("c.h5", "spoiled.h5")
        with h5py.File("spoiled.h5", "a") as file:
            file["elsewhere"] = file[key]
            del file[key]
            link(file, key)
        message = refused(cache_main, "convert", "spoiled.h5", f"{number}.zarr")
        assert "spoiled.h5" in message
        assert not Path(f"{number}.zarr").exists()
    assert len(keys) > 8
    tries(len(keys))
