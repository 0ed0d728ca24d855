"""Gates, masks and adapters take effect, each where it says, and wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import random_ids, random_pillars, random_tensors, small_config, write_adapters, write_model
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import CheckpointError
from yunmin.gated import FixedGate, GatedMixer, MaskedLinear
from yunmin.model import MambaLM
from yunmin.pillars import Pillars
from yunmin.trained import build_trained, load_trained

CONFIG = small_config()


def merged_by_hand(tensors: dict[str, Tensor], adapters: dict[str, Path]) -> dict[str, Tensor]:
    """The definition of both adapters, applied to plain weights."""
    merged = {name: t.double() for name, t in tensors.items()}
    lora = load_file(adapters["lora"] / "adapter_model.safetensors")
    for name, down in lora.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            up = lora[name.replace("lora_A", "lora_B")]
            merged[target] = merged[target] + (5 / 3) * up.double() @ down.double()
    for name, scale in load_file(adapters["ia3"] / "adapter_model.safetensors").items():
        target = name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        merged[f"{target}.weight"] = scale.double() * merged[f"{target}.weight"]
        if f"{target}.bias" in merged:
            merged[f"{target}.bias"] = scale[:, 0].double() * merged[f"{target}.bias"]
    return merged


def test_both_adapters_take_effect_together_exactly(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG)
    adapters = write_adapters(tmp_path, CONFIG)
    model, checkpoint = load_trained(tmp_path)
    expected = MambaLM.from_tensors(CONFIG, merged_by_hand(checkpoint.tensors, adapters))
    plain = MambaLM.from_tensors(CONFIG, {n: t.double() for n, t in checkpoint.tensors.items()})
    ids = random_ids(CONFIG, 2, 9)
    with torch.no_grad():
        logits = model.double()(ids)
        torch.testing.assert_close(logits, expected(ids), rtol=0, atol=1e-11)
        assert (logits - plain(ids)).abs().max() > 0.5
        for alone in ("lora", "ia3"):  # each of the two matters
            one = build_trained(checkpoint, Pillars.identity(CONFIG), {alone: adapters[alone]}).double()
            assert (logits - one(ids)).abs().max() > 0.1


def test_a_models_own_weights_are_read_through_adapters_and_masks(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG, pillars=random_pillars(CONFIG, masked=True))
    write_adapters(tmp_path, CONFIG, ia3=r".*\.1\.mixer\.(in_proj|x_proj)")
    model, checkpoint = load_trained(tmp_path)
    tensors = model.tensors()
    assert set(tensors) == set(checkpoint.tensors)
    assert all(torch.equal(tensors[n], checkpoint.tensors[n]) for n in tensors)


def test_masked_and_scaled_projection_is_the_scaled_masked_product(tmp_path: Path) -> None:
    pillars = random_pillars(CONFIG, masked=True)
    write_model(tmp_path, CONFIG)
    adapters = write_adapters(tmp_path, CONFIG)  # IA3 on the masked out_proj of layer 0
    checkpoint = load_checkpoint(tmp_path)
    model = build_trained(checkpoint, pillars, adapters).double()
    tensors = dict(checkpoint.tensors)
    for name, mask in pillars.weight_masks.items():
        tensors[name] = tensors[name] * mask
    expected = MambaLM.from_tensors(CONFIG, merged_by_hand(tensors, adapters), mixer=GatedMixer)
    for layer in range(2):
        mixer: nn.Module = expected.get_submodule(f"backbone.layers.{layer}.mixer")
        mixer.channel_gate = FixedGate(pillars.channel_gates[layer])
        mixer.state_gate = FixedGate(pillars.state_gates[layer])
    ids = random_ids(CONFIG, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected(ids), rtol=0, atol=1e-11)


def test_masked_linear_multiplies_its_weight_and_shares_it() -> None:
    linear = nn.Linear(3, 2)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    masked = MaskedLinear(linear, FixedGate(mask))
    x = torch.randn(4, 3)
    torch.testing.assert_close(masked(x), x @ (linear.weight * mask).T + linear.bias)
    assert masked.weight is linear.weight
    assert set(masked.state_dict()) == {"weight", "bias"}  # the mask is not a weight


def test_gates_are_not_part_of_the_weights() -> None:
    model = MambaLM.from_tensors(CONFIG, random_tensors(CONFIG), mixer=GatedMixer)
    assert not [name for name in model.state_dict() if "gate" in name]


@pytest.mark.parametrize("damage", ["shape", "missing", "unexpected", "target", "json", "truncated", "no_weights"])
def test_a_wrong_adapter_is_refused_with_its_folder(tmp_path: Path, damage: str) -> None:
    write_model(tmp_path, CONFIG)
    folder = write_adapters(tmp_path, CONFIG)["lora"]
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    first = next(iter(tensors))
    match damage:
        case "shape":
            save_file(tensors | {first: torch.zeros(3, 99)}, weights)
        case "missing":
            save_file({n: t for n, t in tensors.items() if n != first}, weights)
        case "unexpected":
            save_file(tensors | {first.replace("layers.0", "layers.1"): tensors[first].clone()}, weights)
        case "target":
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_modules": ["q_proj"]}))
        case "json":
            settings.write_text("{")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:100])
        case _:
            weights.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_trained(tmp_path)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
