"""The toy cache for all."""

from toy_fixtures import same_date, toy_cache, toy_path  # noqa: F401 - fixtures of all
