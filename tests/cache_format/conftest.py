"""The toy cache and a server that speaks S3, for all."""

from s3_stand_in import s3_endpoint  # noqa: F401 - a fixture of all
from toy_fixtures import same_date, toy_cache, toy_path  # noqa: F401 - fixtures of all
