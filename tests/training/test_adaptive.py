"""The pillars together: what each phase puts into a model, and that checkpoints hold all of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop import Run, small_run
from training.gating import mixers_of
from training.optimization import parameter_groups
from training.phases import Phase, plan_phases
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import ConfigError, TrainingError
from yunmin.pillars import adapter_folders, load_pillars
from yunmin.trained import load_trained

VARIANTS: list[dict[str, Any]] = [
    {},
    {"channel_gates": "block", "gate_estimator": "hard_concrete", "weight_mask": "n:m", "scan_objective": "n:m"},
    {"weight_mask": "element", "mask_targets": ("in_proj", "x_proj"), "scan_mode": "static"},
    {"scan_mode": "none", "uniform_widths": False, "scan_start": "random", "lora_targets": ("out_proj", "in_proj")},
    {"enable_masking": False, "scan_objective": "correlation", "scan_gradient_weighted": True},
    {"scan_objective": "quantization", "channel_gates": "block"},
    {"scan_objective": "saliency", "channel_gates": "block"},
    {"state_ranking": "activation"},
    {"importance": "probability", "target_state_sparsity": 0.0, "enable_ia3": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_phase_computes_what_its_checkpoint_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    run = Run(small_run(**options))
    for span in plan_phases(run.config, 100):
        run.phase(span.phase)
        run.write(tmp_path / span.phase)
        restored, _ = load_trained(tmp_path / span.phase)
        with torch.no_grad():
            assert torch.equal(restored(run.ids), run.logits()), span.phase


@pytest.mark.parametrize("phase", list(Phase))
def test_restored_phase_goes_on_exactly(tmp_path: Path, phase: Phase) -> None:
    whole = Run(small_run(weight_mask="element"))
    for earlier in Phase:
        whole.phase(earlier, steps=6)
        if earlier is phase:
            break
    whole.write(tmp_path)
    resumed = Run(small_run(weight_mask="element"))
    checkpoint = load_checkpoint(tmp_path)
    with torch.no_grad():
        for name, tensor in resumed.model.tensors().items():
            tensor.copy_(checkpoint.tensors[name])
    resumed.adaptive.restore(phase, load_pillars(tmp_path, checkpoint.config), tmp_path)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    for run, generator in zip((whole, resumed), generators, strict=True):
        run.adaptive._generator = generator
        run.adaptive.before_step(0.5)
        run.model.train()
        (run.model(run.ids).square().mean() + run.adaptive.penalty()).backward()
        run.adaptive.after_step()
    for (name, ours), (other, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert resumed.adaptive.trainable_parameters() == whole.adaptive.trainable_parameters()
    again, pillars = resumed.adaptive.pillars(), whole.adaptive.pillars()
    assert set(again.training) == set(pillars.training)
    for name, tensor in pillars.training.items():
        assert torch.equal(again.training[name], tensor), name


@pytest.mark.parametrize(("start", "alike"), [("equal", True), ("activation", False)])
def test_gates_start_from_what_the_first_batches_show_or_alike(start: str, alike: bool) -> None:
    run = Run(small_run(gate_start=start, channel_gates="channel"))
    before = {name: tensor.clone() for name, tensor in run.model.tensors().items()}
    taken = itertools.count()
    noise = torch.get_rng_state()
    losses: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        losses.append(run.loss())
        return losses[-1]

    run.adaptive.enter(Phase.GATES, ([loss()] for _ in taken))
    assert not any(loss.requires_grad for loss in losses)
    assert torch.equal(noise, torch.get_rng_state())
    logits = run.adaptive.pillars().training["logits.channel.0"].clone()
    assert (len(logits.unique()) == 1) == alike
    assert next(taken) == (0 if alike else 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.tensors().items())
    if not alike:
        outputs: list[torch.Tensor] = []
        mixer = mixers_of(run.model)[0]
        mixer.state_gate.logits.data.fill_(9.0)  # type: ignore[operator]
        mixer.channel_gate.logits.data.fill_(9.0)  # type: ignore[operator]
        mixer.out_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].detach().double()))
        run.loss()
        added = outputs[0].square().sum((0, 1)) * mixer.out_proj.weight.detach().double().square().sum(0)
        assert torch.equal(logits.argsort(), added.argsort())


def test_without_a_batch_gates_do_not_start() -> None:
    with pytest.raises(TrainingError, match="there is no batch to start from"):
        Run(small_run()).adaptive.enter(Phase.GATES)


def test_only_adapters_train_in_the_last_phase() -> None:
    run = Run(small_run())
    for phase in (Phase.DENSE, Phase.GATES, Phase.RECOVER):
        run.phase(phase)
    before = {n: p.detach().clone() for n, p in run.model.tensors().items()}
    run.phase(Phase.ADAPTERS)
    assert all(torch.equal(before[n], p) for n, p in run.model.tensors().items())
    moved = [p for n, p in run.model.named_parameters() if "lora_B" in n or "ia3_l" in n]
    assert moved
    assert all((p != 0).any() for p in moved)
    trainable, everything = run.adaptive.trainable_parameters()
    assert 0 < trainable < everything


def test_decay_spares_norms_biases_and_the_recurrence() -> None:
    run = Run(small_run())
    plain = next(g for g in parameter_groups(run.model, run.adaptive.phase, run.config) if g["name"] == "plain")
    names = {n.removeprefix("backbone.layers.0.") for n in plain["param_names"] if "layers.0." in n}
    biases = {f"mixer.{m}.bias" for m in ("in_proj", "conv1d", "dt_proj", "out_proj")}
    assert names == biases | {"mixer.A_log", "mixer.D", "norm.weight"}
    assert plain["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"channel_multiple": 64}, "at most the inner width 40"),
        ({"channel_gates": "block", "gate_block_size": 16, "channel_multiple": 8}, "multiple of gate_block_size 16"),
        ({"channel_gates": "block", "gate_block_size": 16, "channel_multiple": 32}, "must divide the inner width 40"),
        ({"mask_m": 5}, "mask_m: 5 does not divide the [0-9]+ input channels of in_proj"),
        ({"mask_m": 5, "mask_targets": "out_proj"}, "input channels of out_proj"),
        ({"mask_m": 7, "mask_targets": "dt_proj"}, "input channels of dt_proj"),
        ({"mask_m": 20, "mask_targets": "x_proj"}, "does not divide the 32 input channels of x_proj"),
        ({"mask_m": 20, "mask_targets": "x_proj", "uniform_widths": False}, "does not divide the 8 input channels"),
        (
            {"mask_m": 16, "mask_targets": "x_proj", "uniform_widths": False},
            "does not divide the 40 input channels of x_proj",
        ),
    ],
)
def test_widths_that_do_not_fit_are_refused_before_training(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Run(small_run(weight_mask="n:m", **options))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # two adapters are meant
def test_adapters_load_onto_transformers_with_the_same_logits(tmp_path: Path) -> None:
    """Where transformers lets adapters act (not dt_proj), its own loader gives the model as trained."""
    transformers = pytest.importorskip("transformers")
    run = Run(small_run(enable_masking=False, lora_targets=("in_proj",), lora_share=0.25, ia3_share=0.5))
    run.phase(Phase.DENSE)
    run.adaptive._allotment.probe.scores = torch.tensor([9.0, 5.0, 1.0, 6.0] * 2, dtype=torch.float64)  # dt_proj last
    run.phase(Phase.ADAPTERS)
    run.write(tmp_path)
    folders = adapter_folders(tmp_path)
    assert set(folders) == {"lora", "ia3"}
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    for name, folder in folders.items():
        theirs.load_adapter(str(folder), adapter_name=name)
    theirs.set_adapter(["lora", "ia3"])
    with torch.no_grad():
        difference = (theirs.eval()(run.ids).logits - run.logits()).abs().max()
    assert float(difference) < 1e-4
