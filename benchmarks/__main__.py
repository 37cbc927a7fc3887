"""Start a benchmark by its name: `python benchmarks rerun ci`; without a name, list them."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOMS = ("regression", "speed", "studies")


def commands() -> dict[str, Path]:
    """Find every module of the rooms that has a `main`."""
    files = [path for room in ROOMS for path in sorted((HERE / room).glob("*.py"))]
    return {path.stem: path for path in files if "\ndef main(" in path.read_text(encoding="utf-8")}


def main() -> int:
    """Start the one that is named, with the rest of the line."""
    known = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known:
        print("usage: python benchmarks NAME [options]; NAME --help tells more\n")
        for stem, path in known.items():
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {stem:<13} {doc.splitlines()[0]}")
        return 0 if name in {"", "-h", "--help"} else 2
    sys.path[0] = str(HERE)
    sys.argv = [str(HERE / name), *sys.argv[2:]]  # Ray's workers find modules where this lies
    module = importlib.import_module(f"{known[name].parent.name}.{name}")
    return module.main() or 0


if __name__ == "__main__":
    sys.exit(main())
