"""Settings that must stand before any library reads them."""

from __future__ import annotations

import os

from hypothesis import settings

# The Hub's libraries read this once, when they are imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# No example may fail for the time it takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# `--hypothesis-profile=thousand` looks longer for what a property does not hold of.
settings.register_profile("thousand", max_examples=1000, deadline=None)
