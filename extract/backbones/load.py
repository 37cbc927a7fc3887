"""A frozen transformers model, cut above the last wanted layer, with its tokenizer.

Only the blocks that are needed are read and kept, without a language-model head: a model cut at
layer k costs k/n of the whole. What the cut model returns at its end has passed the final norm of
the whole model, which is right for the last layer alone; the forward pass takes all others where
their block ends.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from llmembed.common.errors import ConfigError, ModelError
from llmembed.extract.backbones.hooks import tap
from llmembed.extract.backbones.models import ModelFiles
from llmembed.extract.backbones.quiet import quiet
from llmembed.extract.fast.attention import use_products
from llmembed.extract.fast.packed_weights import onednn_multiplies_bfloat16, pack_weights
from llmembed.extract.fast.upcast import multiply_in_float32

_LEARNED_OFFSET = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"}
"""Model types whose position table starts after the padding index and one more."""

_NOT_BY_LAYER = {"pos_att_type"}
"""Lists of a configuration that are not one entry a layer, whatever their length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the configuration alone tells of a model."""

    config: Any
    """The transformers configuration."""
    n_layers: int
    """Blocks of the whole model."""
    hidden_size: int
    """Width H of its hidden states."""
    max_positions: int | None
    """Tokens the model has positions for, where it tells."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model ready to compute hidden states up to layer `n_kept`."""

    model: torch.nn.Module
    blocks: torch.nn.ModuleList
    """The decoder or encoder blocks kept, at least one."""
    n_layers: int
    """Blocks of the whole model; layer `n_layers` is the last."""
    hidden_size: int
    causal: bool
    """Every attention is causal and says so: tokens on the right cannot influence those before."""
    device: torch.device
    compute_dtype: torch.dtype
    """Arithmetic of the blocks."""
    quantize: str | None
    """How the blocks' weights are quantised: nf4, int8."""
    widens: bool
    """Weights rest in bfloat16, and each block's are widened for every batch, see `upcast`."""
    shareable: bool
    """A pass on the CPU changes nothing in the model, so several may run at once."""
    first_position: int
    """Position of a text's first token."""


def resolve_device(name: str) -> torch.device:
    """Choose the device: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    n_cuda = torch.cuda.device_count()
    here = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    here += [*(["cuda"] if n_cuda else []), *(f"cuda:{index}" for index in range(n_cuda))]
    if name not in here:
        raise ConfigError.unknown("device", name, ["auto", *here], "Pass one of them to --device.")
    return torch.device(name)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the arithmetic: `auto` takes bfloat16 where the device is fast at it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _cpu_is_fast_at_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_is_fast_at_bfloat16() -> bool:
    # Only AMX, and AMD's AVX512-BF16 (390 against 180 GFLOP/s), beat float32. Intel's AVX512-BF16
    # without AMX is half as fast as float32: 167 against 325 GFLOP/s on two cores.
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    capable = "amx_bf16" in cpu or ("AuthenticAMD" in cpu and "avx512_bf16" in cpu)
    return capable and onednn_multiplies_bfloat16()


def read_shape(files: ModelFiles, *, trust_remote_code: bool = False) -> ModelShape:
    """Read the configuration, and refuse what the forward pass cannot serve.

    Raises:
        ModelError: unreadable configuration, remote code without the flag, or an encoder-decoder.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            files.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        message = f"the configuration of {files.name} in {files.folder} cannot be read: {reason}"
        raise ModelError(message) from error
    text = config.get_text_config()
    _refuse_architecture(files, config, text)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None:
        positions -= _first_position(config)
    return ModelShape(
        config=config,
        n_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        max_positions=positions,
    )


def _first_position(config: Any) -> int:
    if config.model_type not in _LEARNED_OFFSET:
        return 0
    return (config.get_text_config().pad_token_id or 0) + 1


def _refuse_architecture(files: ModelFiles, config: Any, text: Any) -> None:
    kind = "an encoder-decoder" if config.is_encoder_decoder else ""
    if hasattr(text, "num_hidden_groups"):
        kind = "a model of one block run many times"
    if kind:
        message = (
            f"{files.name} is {kind} ({config.model_type}); hidden states are taken from "
            "decoder-only and encoder-only models with a block for each layer. Pass such a model "
            "to --model."
        )
        raise ModelError(message)


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: the folder has no tokenizer that can be read, or only one in Python.
    """
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                files.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:
        # The tokenizers library raises Exception itself where a tokenizer.json is damaged.
        if not (type(error) is Exception or isinstance(error, OSError | ValueError | KeyError)):
            raise
        reason = " ".join(str(error).split())
        message = (
            f"the tokenizer of {files.name} in {files.folder} cannot be read: {reason}. Put its "
            "tokenizer.json there."
        )
        raise ModelError(message) from error
    if not tokenizer.is_fast:
        message = (
            f"{files.name} has a tokenizer in Python alone ({type(tokenizer).__name__}), whose "
            "doings cannot be fingerprinted. Put a tokenizer.json into its folder."
        )
        raise ModelError(message)
    return tokenizer


def load_backbone(
    files: ModelFiles,
    shape: ModelShape,
    *,
    n_kept: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantize: str | None = None,
    spread: bool = False,
    needs_pooler: bool = False,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load the first `n_kept` blocks of a model, in evaluation mode, without gradients.

    With `spread`, accelerate lays them on all GPUs that are seen; `device` is the first.

    Raises:
        ModelError: weights are damaged, missing or of another shape, or there is no list of blocks.
    """
    n_kept = max(n_kept, _fewest_blocks(shape.config))
    model, report = _read_weights(
        files,
        config=_cut(shape.config, shape.n_layers, n_kept),
        dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
        **_placement(device, compute_dtype, quantize, spread=spread),
    )
    _refuse_missing(files, report, needs_pooler=needs_pooler)
    if shape.config.get_text_config() is not shape.config:
        model = model.get_decoder()  # what sees and hears is let go
    model.eval().requires_grad_(requires_grad=False)
    tap(blocks := _find_blocks(files, model, n_kept), shape.n_layers)
    on_cpu = device.type == "cpu" and quantize is None
    widens = on_cpu and compute_dtype == torch.bfloat16 and not _cpu_is_fast_at_bfloat16()
    if on_cpu and compute_dtype == torch.bfloat16:
        _suit_cpu(model, blocks, widens=widens)
    return Backbone(
        model=model,
        blocks=blocks,
        n_layers=shape.n_layers,
        hidden_size=shape.hidden_size,
        causal=_is_causal(model),
        device=device,
        compute_dtype=torch.float32 if widens else compute_dtype,
        quantize=quantize,
        widens=widens,
        first_position=_first_position(shape.config),
        shareable=on_cpu and not (widens or spread) and _keeps_positions(model.config),
    )


def _suit_cpu(model: Any, blocks: torch.nn.ModuleList, *, widens: bool) -> None:
    """Compute in the way that is fast where weights are bfloat16."""
    if widens:
        multiply_in_float32(model, blocks)
    else:
        use_products(model)
        pack_weights(blocks)


def _read_weights(files: ModelFiles, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Read what the configuration keeps: the model, and the loader's report."""
    try:
        with quiet():
            model, report = transformers.AutoModel.from_pretrained(
                files.folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        message = f"the weights of {files.name} in {files.folder} cannot be loaded: {error}"
        raise ModelError(message) from error
    return model, report


def _cut(config: Any, n_layers: int, n_kept: int) -> Any:
    """Copy a configuration for the first `n_kept` blocks, lists with one entry a layer included."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == n_layers and name not in _NOT_BY_LAYER:
            setattr(text, name, value[:n_kept])
    text.num_hidden_layers = n_kept
    # Without it the last of `output_hidden_states` has passed the final norm, which belongs to the
    # last layer of the whole model alone; the self-check reads it.
    text.tie_last_hidden_states = n_kept == n_layers
    return config


def has_token_types(config: Any) -> bool:
    """Tell whether the model embeds which text of a pair a token belongs to."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def _fewest_blocks(config: Any) -> int:
    """Count the blocks that layer 1 needs: DeBERTa-v2's convolution stands between two of them."""
    return 2 if getattr(config, "conv_kernel_size", 0) and config.model_type == "deberta-v2" else 1


def _placement(
    device: torch.device, compute_dtype: torch.dtype, quantize: str | None, *, spread: bool
) -> dict[str, Any]:
    """Say to the loader where weights go, and how they are quantised on the way."""
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if spread:
        placement = {"device_map": "auto"}
    config: Any = transformers.BitsAndBytesConfig
    if quantize == "int8":
        placement["quantization_config"] = config(load_in_8bit=True)
    elif quantize is not None:
        placement["quantization_config"] = config(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    return placement


def _refuse_missing(files: ModelFiles, report: dict[str, Any], *, needs_pooler: bool) -> None:
    missing = sorted(
        name for name in report["missing_keys"] if needs_pooler or not name.startswith("pooler.")
    )
    wrong = missing + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if wrong:
        message = (
            f"the weights of {files.name} in {files.folder} lack {wrong[0]!r} or have it in "
            f"another shape ({len(wrong)} tensors in all). Fetch the model again"
            + (", or leave out --pooling pooler." if needs_pooler else ".")
        )
        raise ModelError(message)


def _find_blocks(files: ModelFiles, model: torch.nn.Module, n_kept: int) -> torch.nn.ModuleList:
    for _, module in model.named_modules():  # outer modules come first
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_kept:
            return module
    message = (
        f"{files.name} ({type(model).__name__}) has no list of {n_kept} blocks to take layers "
        "from. Pass a decoder-only or encoder-only transformer to --model."
    )
    raise ModelError(message)


def _keeps_positions(config: Any) -> bool:
    """Tell whether rotary positions are the same for texts of every length.

    transformers changes those of the other kinds inside the model, pass by pass.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    entries = [entry for entry in (rotary, *rotary.values()) if isinstance(entry, dict)]
    kinds = {entry.get("rope_type") for entry in entries}
    return kinds <= {None, "default", "linear", "llama3", "yarn"}


def _is_causal(model: Any) -> bool:
    if not getattr(model.config, "is_causal", True):
        return False  # a decoder made bidirectional by its configuration; its blocks do not say so
    said: list[Any] = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(said) and all(value is True for value in said)
