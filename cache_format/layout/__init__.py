"""What a cache consists of: its documents, arrays, columns and commit records."""
