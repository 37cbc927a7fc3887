"""How blocks of rows get into a cache."""
