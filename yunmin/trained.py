"""The model as it was trained: fixed gates, masks and adapters applied in forward, nothing merged or cut.

This is what an export is verified against, so it shares no arithmetic with `export`: adapters act through `peft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor, nn

from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.errors import CheckpointError, MissingExtraError
from yunmin.gated import FixedGate, GatedMixer, MaskedLinear
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders, load_pillars

if TYPE_CHECKING:
    from peft import PeftConfig


def build_trained(
    checkpoint: Checkpoint, pillars: Pillars, adapters: Mapping[str, Path], *, shares_memory: bool = False
) -> MambaLM:
    """A checkpoint with its pillars in place.

    Args:
        checkpoint: weights in their starting order and shape.
        pillars: gates and masks to apply.
        adapters: PEFT folders by name; each name keeps its adapters apart.
        shares_memory: whether the weights are the checkpoint's own, not to be written to; else they are copies.

    Raises:
        CheckpointError: an adapter is damaged or does not fit.
        MissingExtraError: there are adapters and `peft` is not installed.
    """
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, mixer=GatedMixer, shares_memory=shares_memory)
    set_fixed_gates(model, pillars)
    set_fixed_masks(model, pillars.weight_masks)
    for name, folder in adapters.items():
        inject_adapter(model, name, folder)
    if adapters:
        _activate(model)
    return model.eval()


def load_trained(source: str | Path) -> tuple[MambaLM, Checkpoint]:
    """The trained model of a run folder, a checkpoint of it, or any plain checkpoint."""
    checkpoint = load_checkpoint(source)
    pillars = load_pillars(checkpoint.folder, checkpoint.config)
    return build_trained(checkpoint, pillars, adapter_folders(checkpoint.folder)), checkpoint


def set_fixed_gates(model: MambaLM, pillars: Pillars) -> None:
    """Puts fixed gates into a model built with `GatedMixer`; modifies the model."""
    for layer in range(model.config.n_layers):
        mixer: nn.Module = model.get_submodule(f"{layer_prefix(layer)}mixer")
        mixer.channel_gate = FixedGate(pillars.channel_gates[layer])
        mixer.state_gate = FixedGate(pillars.state_gates[layer])


def set_fixed_masks(model: MambaLM, masks: Mapping[str, Tensor]) -> None:
    """Puts fixed masks, by weight name, into a model in place of learned ones or of none; modifies the model."""
    for name, mask in masks.items():
        mixer, projection = name.rsplit(".", 2)[:2]
        parent: nn.Module = model.get_submodule(mixer)
        masked = MaskedLinear(getattr(parent, projection), FixedGate(mask.to(model.device)))
        setattr(parent, projection, masked)


def adapter_host(model: MambaLM) -> nn.Module:
    """A shell around the backbone, for `peft` to inject adapters into.

    It keeps peft from refusing LoRA on `out_proj` (fused kernels elsewhere bypass it; ours calls it as a module) and
    from accepting adapters on the head, which no export merges.
    """
    host = nn.Module()
    host.backbone = model.backbone
    return host


def inject_adapter(model: MambaLM, name: str, folder: Path, *, is_trainable: bool = False) -> PeftConfig:
    """Adds an adapter from a standard PEFT folder to a model, in place.

    Args:
        model: gets the adapter on its projections.
        name: of the adapter; adapters of different names stay apart.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        is_trainable: whether its parameters take gradients.

    Returns:
        The adapter's configuration.

    Raises:
        CheckpointError: the adapter is damaged or does not fit.
        MissingExtraError: `peft` is not installed.
    """
    try:
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights
    except ModuleNotFoundError:
        raise MissingExtraError("peft", "export", f"the adapter {folder}") from None
    host = adapter_host(model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not is_trainable
        weights = load_peft_weights(str(folder), device="cpu")
        inject_adapter_in_model(config, host, adapter_name=name)
        result = set_peft_model_state_dict(host, weights, adapter_name=name)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the adapter does not load: {reason}") from None
    if result.unexpected_keys:
        raise CheckpointError(f"{folder}: the adapter has an unexpected tensor {result.unexpected_keys[0]!r}")
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if missing:
        raise CheckpointError(f"{folder}: the adapter lacks the tensor {missing[0]!r}")
    return config


def _activate(model: MambaLM) -> None:
    """Switches on every adapter: injecting a second one of a kind leaves only the newest active in all modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            holders = [getattr(module, name) for name in module.adapter_layer_names]
            module.set_adapter(sorted({name for holder in holders for name in holder}))
