"""The model as it was trained: fixed gates, masks and adapters applied in forward, nothing merged or cut.

This is what an export is verified against, so it shares no arithmetic with `export`: adapters act through `peft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.errors import CheckpointError, MissingExtraError
from yunmin.gated import FixedGate, GatedMixer, MaskedLinear
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders, load_pillars


def build_trained(checkpoint: Checkpoint, pillars: Pillars, adapters: Mapping[str, Path]) -> MambaLM:
    """A checkpoint with its pillars in place.

    Args:
        checkpoint: weights in their starting order and shape.
        pillars: gates and masks to apply.
        adapters: PEFT folders by name; each name keeps its adapters apart.

    Raises:
        CheckpointError: an adapter is damaged or does not fit.
        MissingExtraError: there are adapters and `peft` is not installed.
    """
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, mixer=GatedMixer)
    set_fixed_gates(model, pillars)
    for name, mask in pillars.weight_masks.items():
        parent = model.get_submodule(name.rsplit(".", 2)[0])
        projection = name.rsplit(".", 2)[1]
        setattr(parent, projection, MaskedLinear(getattr(parent, projection), FixedGate(mask)))
    for name, folder in adapters.items():
        _inject(model, name, folder)
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


def _inject(model: MambaLM, name: str, folder: Path) -> None:
    try:
        from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights
    except ModuleNotFoundError:
        raise MissingExtraError("peft", "export", f"the adapter {folder}") from None
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        inject_adapter_in_model(config, model, adapter_name=name)
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the adapter does not load: {str(error).splitlines()[0]}") from None
    if result.unexpected_keys:
        raise CheckpointError(f"{folder}: the adapter has an unexpected tensor {result.unexpected_keys[0]!r}")
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if missing:
        raise CheckpointError(f"{folder}: the adapter lacks the tensor {missing[0]!r}")
