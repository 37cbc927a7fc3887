"""Files of texts as Arrow tables."""
