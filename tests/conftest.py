"""Settings that must stand before any library reads them."""

from __future__ import annotations

import os

# The Hub's libraries read this once, when they are imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
