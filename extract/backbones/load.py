"""A frozen transformers model, cut above the last wanted layer, with its tokenizer.

Only the blocks that are needed are read and kept, without a language-model head: a model cut at
layer k costs k/n of the whole. What the cut model returns at its end has passed the final norm of
the whole model, which is right for the last layer alone; hooks show all others where their block
ends to whoever runs a pass, several passes at once. They are put on the blocks once, since a hook
that comes and goes while another thread is in the model would be seen there. Which layers are
shown, and to whom, belongs to the thread.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import logging
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from llmembed.common.errors import ConfigError, ModelError
from llmembed.extract.backbones.float8 import multiply_in_float8, refuse_without_float8
from llmembed.extract.backbones.models import LARGE_BYTES, ModelFiles, hash_files, user_cache_folder
from llmembed.extract.fast.attention import attention_for, use_products
from llmembed.extract.fast.cpu import is_fast_at_bfloat16, multiply_in_float32, reorder_weights

_LEARNED_OFFSET = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"}
"""Model types whose position table starts after the padding index and one more."""
_NOT_BY_LAYER = {"pos_att_type"}
"""Lists of a configuration that are not one entry a layer, whatever their length."""
_BFLOAT16_FROM = (8, 0)
"""Compute capability of the first GPUs that multiply bfloat16: Ampere."""
_LOGGER = logging.getLogger(__name__)

Show = Callable[[int, Tensor], None]
"""Takes a layer and its hidden states `[B, T, H]`."""

_shown: ContextVar[tuple[Collection[int], Show] | None] = ContextVar("shown", default=None)


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
    """A model ready to compute hidden states."""

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
    """How the blocks' weights are quantised: nf4, int8, fp8."""
    widens: bool
    """Weights rest in bfloat16, and each block's are widened to float32 for every batch."""
    shareable: bool
    """A pass on the CPU changes nothing in the model, so several may run at once."""
    first_position: int
    """Position of a text's first token."""


def resolve_device(name: str) -> torch.device:
    """Choose the device: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    n_cuda = torch.cuda.device_count()
    here = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    here += [*(["cuda"] if n_cuda else []), *(f"cuda:{index}" for index in range(n_cuda))]
    if name == "auto":
        return torch.device(next(best for best in ("cuda", "mps", "cpu") if best in here))
    if name not in here:
        raise ConfigError.unknown("device", name, ["auto", *here], "Pass one of them to --device.")
    return torch.device(name)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the arithmetic: `auto` takes what the device is fast at.

    That is bfloat16, or float16 on GPUs without it (T4, V100), whose features are refused where
    they overflow; on a CPU or MPS float32, unless the CPU multiplies bfloat16 faster.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        # Asked of this very GPU: torch's own question is about the current one. AMD's, all of
        # which multiply bfloat16, count from 9.
        capable = torch.cuda.get_device_capability(device) >= _BFLOAT16_FROM
        return torch.bfloat16 if capable else torch.float16
    fast = device.type == "cpu" and is_fast_at_bfloat16()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loader's bars, its report of layers left out, and int8's word at each product."""
    loader: Any = transformers.logging
    verbosity, bars = loader.get_verbosity(), loader.is_progress_bar_enabled()
    products = logging.getLogger("bitsandbytes.autograd._functions")
    level = products.level
    loader.set_verbosity_error()
    loader.disable_progress_bar()
    products.setLevel(logging.ERROR)
    try:
        yield
    finally:
        products.setLevel(level)
        loader.set_verbosity(verbosity)
        if bars:
            loader.enable_progress_bar()


def as_safetensors(files: ModelFiles) -> ModelFiles:
    """Convert a GGUF model, once, into the user's cache folder; others are returned as they are.

    Transformers needs 22 s for a GGUF file of 135 million parameters, and a second for the
    converted folder. Weights are kept in float32, the exact values of the de-quantised file.

    Raises:
        ModelError: the GGUF file is damaged, or of an architecture transformers cannot read.
    """
    if files.gguf is None:
        return files
    target = user_cache_folder() / "models" / f"{files.name}-{hash_files(files.weight_files)[:16]}"
    if not (target / "config.json").exists():
        _convert(files.folder, files.gguf, target)
    return dataclasses.replace(files, folder=target, gguf=None)


def _convert(folder: Path, gguf: str, target: Path) -> None:
    _LOGGER.info("converting %s to safetensors, once (about 20 s for 100 MB)", gguf)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with quiet(), _without_gguf_bar():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
            model = transformers.AutoModel.from_pretrained(
                folder, gguf_file=gguf, dtype=torch.float32
            )
            # What is saved is no longer quantised, and says so.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        partial.rename(target)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, struct.error) as error:
        raise ModelError(
            f"{folder / gguf} cannot be read as a GGUF model: {error}. Check the file, or pass the "
            "original safetensors model."
        ) from error
    except OSError:
        if not (target / "config.json").exists():  # else another process converted it meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """Silence the bar over a GGUF file's tensors, which `quiet` does not reach."""
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = module.tqdm
    module.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        module.tqdm = bar


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
        if not trust_remote_code and "trust_remote_code" in reason:
            raise _wants_code(files) from error
        raise ModelError(
            f"the configuration of {files.name} in {files.folder} cannot be read: {reason}"
        ) from error
    text = config.get_text_config()
    kind = "an encoder-decoder" if config.is_encoder_decoder else ""
    if hasattr(text, "num_hidden_groups"):
        kind = "a model of one block run many times"
    if kind:
        raise ModelError(
            f"{files.name} is {kind} ({config.model_type}); hidden states are taken from "
            "decoder-only and encoder-only models with a block for each layer. Pass such a model "
            "to --model."
        )
    positions = getattr(text, "max_position_embeddings", None)
    return ModelShape(
        config=config,
        n_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        max_positions=None if positions is None else positions - _first_position(config),
    )


def attention_of(shape: ModelShape, *, trust_remote_code: bool = False) -> str:
    """Name the attention that transformers chooses for a model, without its weights."""
    model = _without_weights(shape, trust_remote_code=trust_remote_code)
    return str(model.config._attn_implementation)  # noqa: SLF001


def says_it_sees_ahead(shape: ModelShape, *, trust_remote_code: bool = False) -> bool:
    """Tell, without its weights, whether a model says that tokens see those behind them."""
    model = _without_weights(shape, trust_remote_code=trust_remote_code)
    said = [getattr(module, "is_causal", None) for module in (*model.modules(), model.config)]
    return any(value is False for value in said)


def _without_weights(shape: ModelShape, *, trust_remote_code: bool) -> Any:
    models: Any = transformers.AutoModel
    with quiet(), torch.device("meta"):
        return models.from_config(
            _cut(shape.config, shape.n_layers, 1),
            attn_implementation=attention_for(shape.config),
            trust_remote_code=trust_remote_code,
        )


def has_token_types(config: Any) -> bool:
    """Tell whether the model embeds which text of a pair a token belongs to."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def _first_position(config: Any) -> int:
    if config.model_type not in _LEARNED_OFFSET:
        return 0
    return (config.get_text_config().pad_token_id or 0) + 1


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
        if not trust_remote_code and "trust_remote_code" in reason:
            raise _wants_code(files) from error
        raise ModelError(
            f"the tokenizer of {files.name} in {files.folder} cannot be read: {reason}. Put its "
            "tokenizer.json there."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{files.name} has a tokenizer in Python alone ({type(tokenizer).__name__}); what such "
            "code does cannot be fingerprinted. Put a tokenizer.json into its folder."
        )
    return tokenizer


def _wants_code(files: ModelFiles) -> ModelError:
    return ModelError(
        f"{files.name} in {files.folder} wants to run the code that lies beside its weights, and "
        "nothing of it was run. Pass --trust-remote-code if you trust that code, or another model."
    )


def load_backbone(
    files: ModelFiles,
    shape: ModelShape,
    *,
    n_kept: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantize: str | None = None,
    all_gpus: bool = False,
    needs_pooler: bool = False,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load the first `n_kept` blocks of a model, in evaluation mode, without gradients.

    With `all_gpus`, accelerate lays them on all GPUs that are seen; `device` is the first.

    Raises:
        ModelError: weights are damaged, missing or of another shape, there is no list of blocks, or
            the GPUs are too small for them.
        ConfigError: the device cannot multiply so.
    """
    if quantize == "fp8":
        refuse_without_float8(device)
    if shape.config.model_type == "deberta-v2" and getattr(shape.config, "conv_kernel_size", 0):
        n_kept = max(n_kept, 2)  # its convolution, part of layer 1, stands after the first block
    n_kept = max(n_kept, 1)
    if sum(path.stat().st_size for path in files.weight_files) >= LARGE_BYTES:
        n_layers, name = shape.n_layers, files.name
        _LOGGER.info("loading %d of %d blocks of %s onto %s", n_kept, n_layers, name, device)
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if all_gpus:
        placement = {"device_map": "auto"}
    model = _read_weights(
        files,
        needs_pooler=needs_pooler,
        config=_cut(shape.config, shape.n_layers, n_kept),
        dtype=compute_dtype,
        attn_implementation=attention_for(shape.config),
        trust_remote_code=trust_remote_code,
        quantization_config=_quantization(quantize, compute_dtype),
        **placement,
    )
    if all_gpus:
        _refuse_offloaded(files, model, device)
    if shape.config.get_text_config() is not shape.config:
        model = model.get_decoder()  # the parts for images and sound are not needed
    model.eval().requires_grad_(requires_grad=False)
    blocks = _find_blocks(files, model, n_kept)
    if quantize == "fp8" and not multiply_in_float8(blocks):
        raise ModelError(
            f"{files.name} ({type(model).__name__}) has no linear layers that --quantize fp8 could "
            "round. Leave it out, or pass --quantize nf4 or int8."
        )
    tap(blocks, shape.n_layers)
    on_cpu = device.type == "cpu" and quantize is None
    widens = on_cpu and compute_dtype == torch.bfloat16 and not is_fast_at_bfloat16()
    if widens:
        multiply_in_float32(model, blocks)
    elif on_cpu and compute_dtype == torch.bfloat16:
        use_products(model)
        reorder_weights(blocks)
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
        shareable=on_cpu and not (widens or all_gpus) and keeps_positions(model.config),
    )


def _refuse_offloaded(files: ModelFiles, model: Any, device: torch.device) -> None:
    """Refuse what accelerate left on the CPU or the disk for lack of GPU memory.

    Every batch would copy it to a GPU: minutes where it should be a second.
    """
    slow = {"disk"} if device.type == "cpu" else {"cpu", "disk"}
    places = getattr(model, "hf_device_map", {})
    left = sorted(name for name, place in places.items() if str(place) in slow)
    if left:
        raise ModelError(
            f"{files.name} does not fit in the memory of the GPUs that are seen "
            f"({torch.cuda.device_count()}): {len(left)} parts, such as {left[0]!r}, would lie on "
            f"the {places[left[0]]}. Give it more GPUs by --gpus-per-worker, or pass --quantize "
            "nf4 or lower --layers."
        )


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


def _quantization(quantize: str | None, compute_dtype: torch.dtype) -> Any:
    config: Any = transformers.BitsAndBytesConfig
    if quantize == "int8":
        return config(load_in_8bit=True)
    if quantize == "nf4":
        return config(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    return None


def _read_weights(files: ModelFiles, *, needs_pooler: bool, **options: Any) -> Any:
    """Read what the configuration keeps, and refuse it where a tensor is missing."""
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
        raise ModelError(
            f"the weights of {files.name} in {files.folder} cannot be loaded: {error}"
        ) from error
    missing = sorted(
        name for name in report["missing_keys"] if needs_pooler or not name.startswith("pooler.")
    )
    wrong = missing + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"the weights of {files.name} in {files.folder} lack {wrong[0]!r} or have it in "
            f"another shape ({len(wrong)} tensors in all). Fetch the model again"
            + (", or leave out --pooling pooler." if needs_pooler else ".")
        )
    return model


def _find_blocks(files: ModelFiles, model: torch.nn.Module, n_kept: int) -> torch.nn.ModuleList:
    for module in model.modules():  # outer modules come first
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_kept:
            return module
    raise ModelError(
        f"{files.name} ({type(model).__name__}) has no list of {n_kept} blocks to take layers "
        "from. Pass a decoder-only or encoder-only transformer to --model."
    )


def keeps_positions(config: Any) -> bool:
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


def tap(blocks: torch.nn.ModuleList, n_layers: int) -> None:
    """Put the hooks on.

    Layer k is what enters block k + 1, since some models work between two blocks (DeBERTa-v2 has a
    convolution after the first); above the topmost of the blocks kept it is what leaves that block.
    Layer `n_layers`, which passes the final norm, is not seen here.
    """
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(functools.partial(_entering, layer), with_kwargs=True)
    if len(blocks) < n_layers:
        blocks[-1].register_forward_hook(functools.partial(_leaving, len(blocks)))


@contextlib.contextmanager
def showing(layers: Collection[int], show: Show) -> Iterator[None]:
    """Show these layers of all passes of this thread meanwhile."""
    before = _shown.set((layers, show))
    try:
        yield
    finally:
        _shown.reset(before)


def _show(layer: int, hidden: Tensor) -> None:
    shown = _shown.get()
    if shown is not None and layer in shown[0]:
        shown[1](layer, hidden)


def _entering(layer: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _show(layer, args[0] if args else kwargs["hidden_states"])


def _leaving(layer: int, _: Any, __: Any, output: Any) -> None:
    _show(layer, output[0] if isinstance(output, tuple) else output)
