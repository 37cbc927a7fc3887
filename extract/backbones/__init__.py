"""Which model a name means, how it is loaded, and how it treats a text."""
