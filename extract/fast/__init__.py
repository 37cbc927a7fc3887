"""What makes extraction fast, each with a plain way beside it."""
