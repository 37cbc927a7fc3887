"""What is done to whole caches: verify, convert, finalize, merge, copy, remove, describe."""
