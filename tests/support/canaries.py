"""Secrets of a user, which may turn up nowhere."""

from __future__ import annotations

from pathlib import Path

CANARY = "canary-5f3a9c"
SECRETS = {
    **{
        name: f"{CANARY}-{name.lower()}"
        for name in (
            *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
            *("WANDB_API_KEY", "GITHUB_TOKEN", "RAY_AUTH_TOKEN", "OPENAI_API_KEY"),
        )
    },
    "https_proxy": f"http://user:{CANARY}-proxy@127.0.0.1:9",
    "FSSPEC_S3_SECRET": f"{CANARY}-fsspec",
}


def files_with(folder: Path, secret: str) -> list[Path]:
    """Find the files below a folder whose bytes or names hold a text."""
    return [
        path
        for path in folder.rglob("*")
        if secret in path.name or (path.is_file() and secret.encode() in path.read_bytes())
    ]
