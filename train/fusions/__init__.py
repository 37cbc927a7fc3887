"""How several features become one vector, and what stands on it."""
