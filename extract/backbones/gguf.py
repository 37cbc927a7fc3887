"""GGUF files as safetensors folders, converted once into the user's cache folder.

Transformers reads GGUF by de-quantising every tensor and rebuilding the tokenizer, which took 22 s
for a model of 135 million parameters; the converted folder opens in a second. Weights are kept in
float32, the exact values of the de-quantised file.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import struct
import tempfile
from pathlib import Path

from llmembed.common.errors import ModelError
from llmembed.extract.backbones.models import ModelFiles, user_cache_folder
from llmembed.extract.backbones.weights import hash_files

_LOGGER = logging.getLogger(__name__)


def as_safetensors(files: ModelFiles) -> ModelFiles:
    """Convert a GGUF model, or find its earlier conversion; any other model is returned as it is.

    Raises:
        ModelError: the GGUF file is damaged, or of an architecture transformers cannot read.
    """
    if files.gguf is None:
        return files
    target = user_cache_folder() / "models" / f"{files.name}-{hash_files(files.weight_files)[:16]}"
    if not (target / "config.json").exists():
        _convert(files, files.gguf, target)
    return dataclasses.replace(files, folder=target, gguf=None)


def _convert(files: ModelFiles, gguf: str, target: Path) -> None:
    import torch
    import transformers

    from llmembed.extract.backbones.quiet import quiet

    _LOGGER.info("converting %s to safetensors, once (about 20 s for 100 MB)", gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, gguf_file=gguf)
            model = transformers.AutoModel.from_pretrained(
                files.folder, gguf_file=gguf, dtype=torch.float32
            )
            # What is saved is no longer quantised, and says so.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        partial.rename(target)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, struct.error) as error:
        message = (
            f"{files.folder / gguf} cannot be read as a GGUF model: {error}. Check the file, or "
            "pass the original safetensors model."
        )
        raise ModelError(message) from error
    except OSError:
        if not (target / "config.json").exists():  # else another process converted it meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
