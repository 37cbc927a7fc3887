"""What listens, and whom it talks to: this machine, and nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from canaries import CANARY, SECRETS
from product_files import ROOT
from toy_commands import EXTRACTED, start
from watching import family, listening, told, watched

LOOPBACK = {"127.0.0.1", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
RAY = """
import json, os, sys
sys.path.insert(0, {support!r})
from watching import family, listening
from llmembed.common.cluster import joined
with joined(None, 1):
    import ray
    from ray._common.usage import usage_lib
    node = ray._private.worker._global_node
    processes = {{}}
    for pid in family(os.getpid()):
        try:
            processes[pid] = open(f"/proc/{{pid}}/cmdline").read().split(chr(0))
        except OSError:
            pass
    print(json.dumps({{
        "listening": sorted(listening(family(os.getpid()))),
        "lines": list(processes.values()),
        "dashboard": node.address_info.get("webui_url"),
        "telemetry": usage_lib.usage_stats_enabled(),
    }}))
"""


@pytest.mark.slow
@pytest.mark.fault("S6")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_server_listens_on_loopback(world: Path, tmp_path: Path) -> None:
    """Of all processes of a server, nothing listens elsewhere; 0.0.0.0 only where it is told."""
    for told_host, expected in ((), {"127.0.0.1"}), (("--host", "0.0.0.0"), {"0.0.0.0"}):  # noqa: S104
        environment = watched(tmp_path / f"watch{len(told_host)}")
        server = start("serve", "run", "--port", "0", "--json", *told_host, environment=environment)
        assert server.stdout is not None
        json.loads(server.stdout.readline())
        assert listening(family(server.pid)) == expected
        server.terminate()
        server.communicate()


@pytest.mark.slow
@pytest.mark.fault("S6")
def test_an_extraction_listens_nowhere(world: Path, tmp_path: Path) -> None:
    """Nor does a fit, and neither connects to anything: two processes talk by pipes."""
    environment = watched(tmp_path / "watch")
    given = ["--model", "toy", "--dataset", "topics", "--cache", "n.zarr", *EXTRACTED]
    for line in (
        ["extract", *given, "--devices", "2", "--device", "cpu"],
        ["fit", "--cache", "n.zarr", "--output", "n"],
        ["predict", "--run", "n", "--text", "w1"],
    ):
        process = start(*line, environment=environment)
        _, said = process.communicate()
        assert process.returncode == 0, said
    events = told(tmp_path / "watch")
    of_sockets = {(event, *what) for event, what in events if event.startswith("socket.")}
    assert of_sockets <= {("socket.bind", "::1", "0")}  # urllib3 asks whether there is IPv6


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault("S6", "S7")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_ray_shows_nothing_to_the_network(tmp_path: Path) -> None:
    """A Ray started here has no dashboard, sends no statistics, and listens on loopback alone."""
    code = RAY.format(support=str(ROOT / "tests" / "support"))
    environment = {**os.environ, **SECRETS}
    environment.pop("https_proxy")
    finished = subprocess.run(
        [sys.executable, "-Pc", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert not found["dashboard"]
    assert found["telemetry"] is False
    assert not [line for line in found["lines"] if CANARY in " ".join(line)]
    assert set(found["listening"]) <= LOOPBACK, found["listening"]


@pytest.mark.fault("S7")
def test_statistics_stay_off_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's are off from before it is imported, and a user's own word is kept."""
    for given, expected in ((None, "0"), ("1", "1"), ("0", "0")):
        code = (
            "import os, sys\n"
            "class Stop:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'ray':\n"
            "            print(os.environ['RAY_USAGE_STATS_ENABLED']); os._exit(0)\n"
            "sys.meta_path.insert(0, Stop())\n"
            "from llmembed.common.cluster import joined\n"
            "with joined(None, 1): pass\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
        environment |= {"RAY_USAGE_STATS_ENABLED": given} if given else {}
        line = [sys.executable, "-Pc", code]
        told_by = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        assert told_by.stdout == f"{expected}\n"
