"""Joining Ray: what both stages share of `--engine ray`. Ray is imported where it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmembed.common.errors import ConfigError, MissingPackageError, warn

ENGINES = ("local", "ray")
_ANSWER_S = 10
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_START = (
    "Start it with `ray start --head` and pass the address that this prints, or leave out "
    "--address to start Ray on this machine."
)


def check_engine(config: Any, options: Sequence[str], engines: Collection[str] = ENGINES) -> None:
    """Refuse an unknown `config.engine`, and options (fields) that only Ray heeds without it."""
    if config.engine not in engines:
        raise ConfigError.unknown("engine", config.engine, engines, "Pass one of them to --engine.")
    for field in dataclasses.fields(config):
        is_given = field.name in options and getattr(config, field.name) != field.default
        if is_given and config.engine != "ray":
            raise ConfigError(
                f"--{field.name.replace('_', '-')} is for --engine ray, and --engine is "
                f"{config.engine}. Pass both."
            )


@contextlib.contextmanager
def joined(address: str | None, n_workers: int, store_bytes: int | None = None) -> Iterator[None]:
    """Join the cluster at an address, or start one for so many workers and end it afterwards.

    `store_bytes` is the memory for results of one that is started; None is Ray's own choice. Where
    no Ray answers, or one that has no CPU, it is a `ConfigError`, where it is not installed a
    `MissingPackageError`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _ray()
    was_there = ray.is_initialized()
    if not was_there:
        with _on_loopback() if address is None else contextlib.nullcontext(), _own_sigterm():
            _init(ray, address, n_workers, store_bytes)
    try:
        _check_cpus(ray, address)
        yield
    finally:
        if not was_there:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError.of("ray", "ray", "--engine ray") from error
    return ray


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let what is started here take this machine for the whole cluster, and listen on loopback.

    That is what Ray does on Windows and macOS, by a variable that processes read when they import
    Ray; this one has imported it, and may join a real cluster afterwards.
    """
    from ray._private import ray_constants

    if _CLUSTERS in os.environ:
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        del os.environ[_CLUSTERS]
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep who handles SIGTERM: one that Ray puts there would end this process with code 1."""
    if threading.current_thread() is not threading.main_thread():  # only that one has handlers
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _init(ray: Any, address: str | None, n_workers: int, store_bytes: int | None) -> None:
    where: dict[str, Any] = {"address": address}
    if address is not None:
        _check_answers(address)
    else:
        where = {
            "address": "local",  # None would join what others have started on this machine
            "num_cpus": n_workers + 1,  # one for Ray's own tasks
            "include_dashboard": False,
            "object_store_memory": store_bytes,
        }
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        message = f"Ray cannot be joined at --address {address}: {error} {_START}"
        raise ConfigError(message) from error


def _check_cpus(ray: Any, address: str | None) -> None:
    """Refuse a Ray without a CPU, which each task takes; a cluster may still get one."""
    nodes: list[dict[str, Any]] = ray.nodes()
    if any(node["Resources"].get("CPU", 0) >= 1 for node in nodes if node["Alive"]):
        return
    lack = "no machine of Ray has a CPU, and each worker takes one"
    if address is None:
        raise ConfigError(f"{lack}. Start Ray with `--num-cpus 1` or more, or join another one.")
    warn(f"{lack}: waiting for one.")


def _check_answers(address: str) -> None:
    """Try the port first: Ray itself waits for minutes where nothing listens."""
    place = os.environ.get("RAY_ADDRESS") or address  # Ray, too, prefers the variable
    if place == "auto":
        return  # Ray looks for its own processes on this machine
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"--address {place} is neither auto nor host:port. {_START}")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray answers at --address {place}: {error}. {_START}") from error


def absolute(place: str) -> str:
    """Name a place so that a worker, which stands in another folder, finds it too."""
    return str(Path(place).absolute()) if Path(place).exists() else place
