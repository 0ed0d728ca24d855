"""The pillars together: what each phase puts into a model, and that checkpoints hold all of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import random_ids, random_model, small_config
from training.adapters import allocate
from training.adaptive import AdaptiveModel
from training.config import TrainingConfig
from training.config_file import parse_config
from training.gating import mixers_of
from training.gradients import GradientWatch
from training.importance import ImportanceProbe
from training.observation import ScanOrders
from training.optimization import parameter_groups
from training.phases import Phase, plan_phases
from yunmin.checkpoint import load_checkpoint, write_checkpoint
from yunmin.errors import ConfigError, TrainingError
from yunmin.gated import GatedMixer
from yunmin.n_of_m_order import retained_magnitude
from yunmin.pillars import adapter_folders, load_pillars, save_pillars
from yunmin.trained import load_trained


def small_run(**options: Any) -> TrainingConfig:
    values: dict[str, Any] = {"channel_multiple": 8, "gate_block_size": 8, "scan_update_frequency": 3}
    values |= {"importance": "gradient", "lora_init": "random"}
    values |= {"target_state_sparsity": 0.5, "state_ranking": "learned", "learning_rate": 3e-3, "peft_dropout": 0.0}
    return parse_config(values | options)


class Run:
    """A training loop of the least kind: one batch, all phases."""

    def __init__(self, config: TrainingConfig, seed: int = 0) -> None:
        self.config = config
        self.model = random_model(small_config(), mixer=GatedMixer)
        self.adaptive = AdaptiveModel(self.model, config, torch.Generator().manual_seed(seed))
        self.ids = random_ids(self.model.config, 4, 17)
        self.lines: list[str] = []

    def phase(self, phase: Phase, steps: int = 12) -> None:
        self.lines += self.adaptive.enter(phase, ([self.loss()] for _ in itertools.count()))
        self.steps(steps)

    def steps(self, steps: int) -> None:
        groups = [
            {k: v for k, v in g.items() if k != "param_names"}
            for g in parameter_groups(self.model, self.adaptive.phase, self.config)
        ]
        optimizer = torch.optim.AdamW(groups)
        self.model.train()
        for step in range(steps):
            self.adaptive.before_step(step / (steps - 1))
            loss = self.loss() + self.adaptive.penalty()
            optimizer.zero_grad()
            loss.backward()
            self.adaptive.after_backward()
            optimizer.step()
            self.lines += self.adaptive.after_step()

    def loss(self) -> torch.Tensor:
        logits = self.model(self.ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())

    def logits(self) -> torch.Tensor:
        with self.adaptive.evaluation(), torch.no_grad():
            return self.model(self.ids)

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder, self.model.config, self.model.tensors())
        save_pillars(folder, self.adaptive.pillars())
        self.adaptive.adapters().save(folder / "adapters")


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


@pytest.mark.parametrize("start", ["activation", "equal"])
def test_blocks_that_are_learned_from_the_start_form_in_an_order_of_what_channels_carry(start: str) -> None:
    options = {"scan_objective": "saliency", "dense_share": 0, "scan_update_frequency": 2, "gate_start": start}
    run = Run(small_run(channel_gates="block", **options))
    run.phase(Phase.GATES, steps=0)
    assert run.lines == ["scan order updated in layers 0, 1"]
    order = run.adaptive.scan_order
    assert not torch.equal(order[0], torch.arange(40))
    logits = run.adaptive.pillars().training["logits.channel.0"]
    if start == "activation":
        assert torch.equal(logits.argsort(descending=True), torch.arange(5))  # the first blocks carry most
    run.steps(6)
    assert all(torch.equal(a, b) for a, b in zip(order, run.adaptive.scan_order, strict=True))  # closed gates hide


def test_without_a_batch_gates_do_not_start() -> None:
    with pytest.raises(TrainingError, match="there is no batch to start from"):
        Run(small_run()).adaptive.enter(Phase.GATES)


def test_order_updates_happen_while_gates_are_learned() -> None:
    run = Run(small_run())
    run.phase(Phase.DENSE)
    run.adaptive.enter(Phase.GATES, ([run.loss()] for _ in itertools.count()))
    started = run.adaptive.scan_order
    run.steps(12)
    assert any(not torch.equal(a, b) for a, b in zip(started, run.adaptive.scan_order, strict=True))


def test_orders_are_closed_once_gates_are_fixed() -> None:
    run = Run(small_run())
    for phase in (Phase.DENSE, Phase.GATES, Phase.RECOVER):
        run.phase(phase)
    orders = run.adaptive.scan_order
    run.phase(Phase.ADAPTERS)
    assert all(torch.equal(a, b) for a, b in zip(orders, run.adaptive.scan_order, strict=True))
    assert all(mixer.observe is None for mixer in mixers_of(run.model))


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


def test_importance_of_a_projection_is_its_output_times_its_gradient() -> None:
    model = random_model(small_config())
    name = "backbone.layers.1.mixer.x_proj"
    module = model.get_submodule(name)
    seen: dict[str, torch.Tensor] = {}

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        seen["output"] = output

    handle = module.register_forward_hook(keep)
    ids = random_ids(model.config, 2, 9)
    model(ids).square().mean().backward()
    gradient = seen["output"].grad
    assert gradient is not None
    expected = (seen["output"] * gradient).sum((0, 1)).abs().mean()
    handle.remove()
    with torch.no_grad():
        plain = model(ids)
    probe = ImportanceProbe({name: module})
    probe.attach()
    logits = model(ids)
    assert torch.equal(logits.detach(), plain)  # multiplying by one changes no bit
    logits.square().mean().backward()
    probe.collect()
    assert probe.means()[name] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_allocation_follows_importance_and_spares_masked_projections() -> None:
    names = [f"backbone.layers.{i}.mixer.{p}" for i in range(5) for p in ("in_proj", "out_proj")]
    scores = {name: float(10 - rank) for rank, name in enumerate(names)}
    masked = {names[2]}
    allocation = allocate(
        scores, parse_config({"lora_share": 0.2, "ia3_share": 0.3, "lora_targets": "in_proj"}), masked
    )
    assert allocation.lora == (names[0], names[4])  # out_proj is no LoRA target, names[2] is masked
    assert allocation.ia3 == (names[1], names[2], names[3])
    assert allocation.frozen == tuple(names[5:])


def test_tied_importance_is_told() -> None:
    run = Run(small_run(importance="probability"))
    for phase in Phase:
        run.phase(phase)
    assert any("scores tie" in line for line in run.lines)


@pytest.mark.parametrize("options", [{"enable_masking": False}, {"target_sparsity": 0.0}])
def test_a_measure_of_gates_is_refused_where_there_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="importance=magnitude is a measure of channel gates, and there are none"):
        small_run(importance="magnitude", **options)


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, "quantization"),
        ({"weight_mask": "n:m"}, "n:m"),
        ({"weight_mask": "n:m", "enable_masking": False}, "quantization"),
        ({"weight_mask": "n:m", "mask_targets": "in_proj"}, "quantization"),
        ({"channel_gates": "block"}, "saliency"),
        ({"channel_gates": "block", "weight_mask": "n:m"}, "n:m"),
        ({"channel_gates": "block", "scan_objective": "correlation"}, "correlation"),
    ],
)
def test_orders_are_solved_for_what_the_masks_need(options: dict[str, Any], objective: str) -> None:
    assert small_run(**options).order_objective == objective


def test_a_saliency_order_sorts_by_what_channels_add_to_the_output() -> None:
    run = Run(small_run(scan_objective="saliency", scan_mode="static"))
    seen: dict[int, torch.Tensor] = {}
    for layer, mixer in enumerate(mixers_of(run.model)):
        mixer.out_proj.register_forward_pre_hook(lambda _, inputs, layer=layer: seen.update({layer: inputs[0]}))
    orders = ScanOrders(run.model, run.config, torch.Generator())
    orders.observe(wanted=True)
    run.model(run.ids)
    orders.update()
    assert orders.solve() == list(range(run.model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        out_proj = mixers_of(run.model)[layer].out_proj.weight
        added = seen[layer].square().mean((0, 1)) * out_proj.square().sum(0)
        assert torch.equal(order, torch.argsort(added, descending=True))


def test_gradients_weigh_nothing_but_correlations() -> None:
    with pytest.raises(ConfigError, match="it needs scan_objective=correlation"):
        small_run(scan_gradient_weighted=True)


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


def test_groups_of_masks_form_among_the_channels_that_are_kept() -> None:
    config = small_run(scan_objective="n:m", weight_mask="n:m", channel_gates="channel", channel_multiple=8)
    model = random_model(mixer=GatedMixer)
    orders = ScanOrders(model, config, torch.Generator())
    gates = [(torch.arange(d) % 2).float() for d in model.config.d_inner]
    assert orders.solve_among(gates) == list(range(model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        half = order.numel() // 2
        assert gates[layer][order].tolist() == [1.0] * half + [0.0] * half
        weight = model.get_parameter(f"backbone.layers.{layer}.mixer.out_proj.weight").detach()
        assert retained_magnitude(weight[:, order[:half]], 2, 4) > retained_magnitude(weight[:, gates[layer] > 0], 2, 4)
    assert orders.solve_among([torch.ones(d) for d in model.config.d_inner]) == []


def test_scales_are_shared_among_the_channels_that_are_kept() -> None:
    run = Run(small_run())
    orders = ScanOrders(run.model, run.config, torch.Generator())
    gates = [(torch.arange(d) % 2).float() for d in run.model.config.d_inner]
    orders.observe(wanted=True)
    run.model(run.ids)
    orders.update()
    orders.solve()
    saved = orders.tensors()
    assert orders.solve_among(gates) == list(range(run.model.config.n_layers))
    for layer, order in enumerate(orders.orders):
        half = order.numel() // 2
        assert gates[layer][order].tolist() == [1.0] * half + [0.0] * half
    again = ScanOrders(run.model, run.config, torch.Generator())
    again.load_tensors(saved)
    again.solve_among(gates)
    assert all(torch.equal(a, b) for a, b in zip(again.orders, orders.orders, strict=True))


def test_parameter_without_gradient_stops_the_run_by_name() -> None:
    module = torch.nn.Linear(3, 3)
    watch = GradientWatch(module, "dense")
    module.weight.grad = torch.ones(3, 3)
    with pytest.raises(TrainingError, match="'bias' is trainable and has no gradient"):
        watch.check()


def test_gradient_that_stays_zero_stops_the_run_at_the_tenth_step() -> None:
    module = torch.nn.Linear(3, 3)
    watch = GradientWatch(module, "adapters")
    module.weight.grad, module.bias.grad = torch.zeros(3, 3), torch.ones(3)
    for _ in range(9):
        watch.check()
    with pytest.raises(TrainingError, match="gradient of 'weight' was zero for 10 steps"):
        watch.check()


def test_phases_cover_all_steps_in_order() -> None:
    config = parse_config({})
    for total in (4, 7, 100, 1001):
        spans = plan_phases(config, total)
        assert [s.phase for s in spans] == list(Phase)
        assert spans[0].start == 0
        assert spans[-1].stop == total
        assert all(a.stop == b.start and a.stop > a.start for a, b in itertools.pairwise(spans))
    assert (spans[0].progress(spans[0].start), spans[0].progress(spans[0].stop - 1)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"enable_masking": False}, [Phase.DENSE, Phase.ADAPTERS]),
        ({"enable_peft": False}, [Phase.DENSE, Phase.GATES, Phase.RECOVER]),
        ({"enable_masking": False, "enable_peft": False}, [Phase.DENSE]),
        ({"dense_share": 0.0, "recover_share": 0.0}, [Phase.GATES, Phase.ADAPTERS]),
    ],
)
def test_disabled_pillars_have_no_phase(options: dict[str, Any], expected: list[Phase]) -> None:
    spans = plan_phases(parse_config(options), 50)
    assert [s.phase for s in spans] == expected
    assert spans[-1].stop == 50


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        ({}, 3, "3 steps cannot hold the 4 phases"),
        ({"gate_share": 0.0}, 100, "gate_share"),
        ({"adapter_share": 0.0}, 100, "adapter_share"),
        ({"dense_share": 0.0, "enable_masking": False, "enable_peft": False}, 100, "dense_share"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_phases(parse_config(options), total)


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
