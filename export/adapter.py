"""Reading standard PEFT folders without `peft`: which weights an adapter changes, and how.

What cannot be merged exactly is refused by the name of the option, the module or the tensor that stands in the way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from yunmin.axes import PROJECTIONS, expected_shapes, layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError
from yunmin.files import sha256_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options that describe the adapter or its training and do not change what it computes, besides those read below.
_DESCRIPTIVE = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules
    feedforward_modules inference_mode init_ia3_weights init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules task_type use_rslora""".split()
)
# Other initializations ("pissa", "olora", ...) change the base weights under the adapter.
_KEEPING_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
EMBEDDINGS = "backbone.embeddings"
_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|ia3_l|base_layer\.weight)"
)


@dataclass(frozen=True)
class LoraUpdate:
    """W + scale * B A (Hu et al. 2021).

    Attributes:
        A: (r, in).
        B: (out, r).
        scale: alpha/r, or alpha/sqrt(r) for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Ia3Update:
    """Learned factors (Liu et al. 2022): of the outputs, diag(l) W and l*b, or of the inputs, W diag(l).

    Attributes:
        factors: l, (out,) or (in,).
        on_inputs: whether `peft` calls the module a feedforward one.
    """

    factors: Tensor
    on_inputs: bool


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder that fits a model.

    Attributes:
        folder: where it was read from.
        kind: "LORA" or "IA3".
        updates: by module, `backbone.layers.0.mixer.in_proj`; at least one.
        base_embedding: the base model's embedding, which `peft` saves beside an adapter of it; None where it did not.
    """

    folder: Path
    kind: str
    updates: Mapping[str, LoraUpdate | Ia3Update]
    base_embedding: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        """What a manifest records of it."""
        projections = sorted({module.rpartition(".")[2] for module in self.updates})
        return {
            "path": str(self.folder),
            "kind": self.kind,
            "modules": len(self.updates),
            "projections": projections,
            "sha256": {name: sha256_file(self.folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
        }


def read_adapter(folder: str | Path, config: MambaConfig) -> Adapter:
    """Reads a LoRA or IA3 folder as `peft` writes it.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        config: of the model that it is to be merged into.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter uses what cannot be merged exactly, or it does not
            fit the model; names the option or tensor.
    """
    folder = Path(folder)
    options = _read_options(folder)
    kind = options.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise CheckpointError(f"{folder}: peft_type must be 'LORA' or 'IA3' to be merged exactly, found {kind!r}")
    _refuse_inexact(folder, options)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_weights(folder).items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2].startswith("ia3") != (kind == "IA3"):
            raise CheckpointError(f"{folder}: unexpected tensor {name!r} in an adapter of type {kind}")
        parts.setdefault(match[1], {})[match[2].removesuffix(".weight")] = tensor
    base_embedding = parts.get(EMBEDDINGS, {}).pop("base_layer", None)
    if not parts:
        raise CheckpointError(f"{folder}: {WEIGHTS_FILE} holds no tensors")
    shapes = _adaptable_shapes(config, kind)
    updates: dict[str, LoraUpdate | Ia3Update] = {}
    for module, tensors in sorted(parts.items()):
        if module not in shapes:
            expected = (
                f"{', '.join(PROJECTIONS)} of backbone.layers.0 to {config.n_layers - 1}, and LoRA of {EMBEDDINGS}"
            )
            raise CheckpointError(f"{folder}: adapts {module!r}; what can be merged here is {expected}")
        read = _lora_update if kind == "LORA" else _ia3_update
        updates[module] = read(folder, module, tensors, options, shapes[module])
    return Adapter(folder, kind, updates, base_embedding)


def refuse_other_base(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Checks the base embedding that came with an adapter, where one did.

    Raises:
        CheckpointError: it is not this model's.
    """
    theirs = adapter.base_embedding
    if theirs is not None and not torch.equal(theirs.float(), tensors[f"{EMBEDDINGS}.weight"].float()):
        raise CheckpointError(f"{adapter.folder}: brings a base embedding that differs from this model's")


def refuse_overlaps(adapters: Iterable[Adapter], masked: Iterable[str]) -> None:
    """Checks that the adapters can be merged in any order and next to the weight masks.

    Args:
        adapters: to be merged into one model.
        masked: names of weights that have a mask, `backbone.layers.0.mixer.in_proj.weight`.

    Raises:
        CheckpointError: two adapters change one module, or a masked projection has LoRA.
    """
    owners: dict[str, Adapter] = {}
    masked_modules = {name.removesuffix(".weight") for name in masked}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            if module in owners:
                raise CheckpointError(
                    f"{adapter.folder}: adapts {module}, as does {owners[module].folder}; merge one, export, "
                    "and train the other on the result"
                )
            if isinstance(update, LoraUpdate) and module in masked_modules:
                raise CheckpointError(
                    f"{adapter.folder}: LoRA on {module}, whose weight has a mask; a merge would revive masked "
                    "weights, so a masked projection takes IA3 or nothing"
                )
            owners[module] = adapter


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: expected an adapter folder with {CONFIG_FILE}, found none") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON, {error}") from None
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(options).__name__}")
    return options


def _refuse_inexact(folder: Path, options: Mapping[str, Any]) -> None:
    for name, value in sorted(options.items()):
        if name not in _DESCRIPTIVE and value not in (None, False, "none", [], {}):
            raise CheckpointError(f"{folder}: {name} is {value!r}, which cannot be merged exactly")
    if options.get("init_lora_weights", True) not in _KEEPING_THE_BASE:
        raise CheckpointError(
            f"{folder}: init_lora_weights is {options['init_lora_weights']!r}, which changes the base weights; "
            "convert it to plain LoRA first"
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: expected {WEIGHTS_FILE}, found no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from None


def _adaptable_shapes(config: MambaConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Shape of every weight that an adapter of a kind can change, by module."""
    shapes = expected_shapes(config)
    modules = [f"{layer_prefix(i)}mixer.{p}" for i in range(config.n_layers) for p in PROJECTIONS]
    modules += [EMBEDDINGS] if kind == "LORA" else []
    return {module: shapes[f"{module}.weight"] for module in modules}


def _lora_update(
    folder: Path, module: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any], shape: tuple[int, ...]
) -> LoraUpdate:
    rank = _by_pattern(options, "rank_pattern", module, options.get("r", 8))
    alpha = _by_pattern(options, "alpha_pattern", module, options.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{folder}: the rank of {module} must be a positive integer, found {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder}: the lora_alpha of {module} must be a number, found {alpha!r}")
    scale = alpha / math.sqrt(rank) if options.get("use_rslora") else alpha / rank
    if module == EMBEDDINGS:  # peft's A looks tokens up and its B maps to the model's width: W + scale * (B A)^T
        expected = {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
        _require_parts(folder, module, tensors, expected)
        return LoraUpdate(tensors["lora_embedding_B"].T, tensors["lora_embedding_A"].T, scale)
    _require_parts(folder, module, tensors, {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)})
    return LoraUpdate(tensors["lora_A"], tensors["lora_B"], scale)


def _ia3_update(
    folder: Path, module: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any], shape: tuple[int, ...]
) -> Ia3Update:
    feedforward = options.get("feedforward_modules") or []
    if isinstance(feedforward, str):
        on_inputs = re.fullmatch(feedforward, module) is not None
    else:
        on_inputs = any(module.endswith(name) for name in feedforward)  # peft's own rule
    _require_parts(folder, module, tensors, {"ia3_l": (1, shape[1]) if on_inputs else (shape[0], 1)})
    return Ia3Update(tensors["ia3_l"].flatten(), on_inputs)


def _by_pattern(options: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as `peft` looks it up."""
    for pattern, value in (options.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _require_parts(
    folder: Path, module: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    for part, shape in expected.items():
        found = tuple(tensors[part].shape) if part in tensors else "nothing"
        if found != shape:
            raise CheckpointError(f"{folder}: {part} of {module}: expected shape {shape}, found {found}")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(f"{folder}: {module} has an unexpected tensor {unexpected[0]!r}")
