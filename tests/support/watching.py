"""What a command and every Python process below it start, bind and connect to, from within.

Python tells of these itself (`sys.addaudithook`), so that nothing is missed for being brief.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HOOK = """
import json, os, sys
_LOG = os.environ.get("WATCHED")
def _tell(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        told = args[1]
    elif event == "os.system":
        told = [args[0]]
    elif event in ("socket.bind", "socket.connect"):
        told = args[1]
    else:
        return
    told = list(told) if isinstance(told, (list, tuple)) else [told]
    line = json.dumps([event, [os.fsdecode(one) if isinstance(one, bytes) else str(one)
                               for one in told]]) + "\\n"
    file = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, line.encode("utf-8", "backslashreplace"))
    os.close(file)
if _LOG:
    sys.addaudithook(_tell)
"""


def watched(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Make an environment whose processes tell, and the file that they tell it to."""
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    return {
        **environment,
        "PYTHONPATH": str(folder / "hook"),
        "WATCHED": str(folder / "watched.jsonl"),
    }


def told(folder: Path) -> list[tuple[str, list[str]]]:
    """Give what was told: the event, and a command line or an address."""
    file = folder / "watched.jsonl"
    lines: list[Any] = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(event, what) for event, what in map(json.loads, lines)]


def family(pid: int) -> set[int]:
    """Number a process and all below it, as Linux knows them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, new = {pid}, [pid]
    while new:
        new = [child for one in new for child in children.get(one, ())]
        found |= {*new}
    return found


def listening(pids: set[int]) -> set[str]:
    """Give the addresses, IPv4 as `127.0.0.1` and IPv6 in hex, at which processes listen."""
    held = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                held.add(os.readlink(file))  # noqa: PTH115 - it points to no path
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in held:
                host = local.partition(":")[0]
                is_4 = table == "tcp"
                found.add(".".join(map(str, bytes.fromhex(host)[::-1])) if is_4 else host)
    return found
