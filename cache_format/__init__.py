"""What lies on disk, and nothing else: the cache's schema, writer and reader."""
