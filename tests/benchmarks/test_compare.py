"""What a comparison reports: ratios, limits, who is missing; from fake contestants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import RESULT_FILE, _limits_of
from benchmarks.compare_plots import plot_compare
from benchmarks.compare_tables import Listing, Table, compare_tables, lines, number, quantities
from benchmarks.contest import Plan
from benchmarks.contestants import bytes_read, gather
from benchmarks.limits import Limits, Traffic, decode_limit, measure_limits, prefill_limit
from benchmarks.models import plain_checkpoint
from benchmarks.shapes import SHAPES, shape_config
from tests.models import random_tensors, small_config, write_model
from yunmin.axes import expected_shapes
from yunmin.checkpoint import load_checkpoint
from yunmin.cli import main
from yunmin.config import MambaConfig
from yunmin.errors import RequestError, YunminError
from yunmin.language_model import load
from yunmin.quantization.layout import FLOAT32, Quantization

LIMITS = Limits(2, 1e9, {"fp32": 1e9, "bf16": 2e9, "int8": 8e9}, {"read": "a", "fp32": "b", "bf16": "c", "int8": "d"})


def entry(name: str, precision: str, summary: dict[str, float], **options: Any) -> dict[str, Any]:
    is_ours = name.startswith("ours")
    values = {"name": name, "precision": precision, "is_ours": is_ours, "summary": summary, "limits": {}, "notes": {}}
    return values | {"versions": {"package": "1.0"}} | options


def result(**options: Any) -> dict[str, Any]:
    """A comparison in which the best peer is of another precision than the like one."""
    peers = [
        entry("llama.cpp F32", "fp32", {"decode 16": 20.0, "decode 1": 4.0, "peak MB": 80.0}),
        entry("llama.cpp Q8_0", "int8", {"decode 16": 40.0, "decode 1": 8.0, "peak MB": 40.0}),
        entry("transformers", "fp32", {"decode 16": 10.0}, notes={"decode 1": "took longer than 9 s"}),
    ]
    ours = [
        entry(
            "ours fp32", "fp32", {"decode 16": 60.0, "peak MB": 20.0, "first token s": 0.5}, limits={"decode 16": 120.0}
        ),
        entry("ours int8", "int8", {"decode 16": 80.0, "decode 1": 12.0, "imports MB": 3.0}),
    ]
    values = {
        "benchmark": "compare",
        "time": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A processor", "cores_usable": 2, "load_average_1min": 0.25},
        "load_average_after": 2.5,
        "settings": {"threads": 2, "repeats": 5},
        "model": {"name": "small"},
        "limits": {
            "read_bytes_per_s": 3e10,
            "flops_per_s": {"fp32": 1.6e11},
            "best_way": {"read": "sum", "fp32": "mm"},
        },
        "reference": "ours fp32",
        "disagreement": {"ours fp32": 0.0, "llama.cpp F32": 2e-6},
        "contestants": [*ours, *peers],
        "absent": {"openvino": "the package 'optimum' does not import here"},
    }
    return values | options


def test_ratios_are_to_the_best_like_peer_the_best_peer_and_the_limit() -> None:
    found = {(line.quantity, line.ours): line for line in lines(result())}
    line = found["decode 16", "ours fp32"]
    assert (line.like, line.best, line.limit) == (("llama.cpp F32", 20.0), ("llama.cpp Q8_0", 40.0), 120.0)
    text = "\n".join(part.text() for part in compare_tables(result()))
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "decode 16, fp32 60.0 llama.cpp F32 3.00 llama.cpp Q8_0 1.50 120 0.50" in rows
    assert "decode 16, int8 80.0 llama.cpp Q8_0 2.00 llama.cpp Q8_0 2.00 – –" in rows


def test_of_memory_and_load_time_the_best_is_the_least() -> None:
    found = {(line.quantity, line.ours): line for line in lines(result())}
    assert found["peak MB", "ours fp32"].best == ("llama.cpp Q8_0", 40.0)
    assert found["first token s", "ours fp32"].best is None
    assert ("imports MB", "ours int8") not in found


def test_tables_show_every_figure_and_name_all_that_is_missing() -> None:
    parts = compare_tables(result())
    speeds = parts[0]
    assert isinstance(speeds, Table)
    assert speeds.columns == ("", "decode 1", "decode 16")
    assert speeds.rows[0] == ("ours fp32", "–", "60.0")
    assert [row[0] for row in speeds.rows] == [c["name"] for c in result()["contestants"]]
    missing = parts[-1]
    assert isinstance(missing, Listing)
    assert missing.entries == (
        ("openvino", "the package 'optimum' does not import here"),
        ("transformers, decode 1", "took longer than 9 s"),
    )
    text = "\n".join(part.text() for part in parts)
    for piece in ("30.0 GB/s", "160 GFLOP/s", "load 0.25 before and 2.5 after", "2.0e-06", "package 1.0"):
        assert piece in text


def test_quantities_come_in_the_order_of_measuring_and_by_size() -> None:
    names = ["peak MB", "depth 4096", "decode 64", "depth 0", "prefill 512", "first token s", "decode 4", "prefill 128"]
    found = quantities({"contestants": [entry("a", "fp32", dict.fromkeys(names, 1.0))]})
    assert found == [
        *("prefill 128", "prefill 512", "decode 4", "decode 64", "depth 0", "depth 4096", "first token s", "peak MB")
    ]


def test_report_prints_the_same_tables_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RESULT_FILE).write_text(json.dumps(result()))
    assert main(["bench", "compare", "--report", str(tmp_path / RESULT_FILE)]) == 0
    printed = capsys.readouterr().out
    assert "| decode 16, fp32 | 60.0 | llama.cpp F32 | 3.00 | llama.cpp Q8_0 | 1.50 | 120 | 0.50 |" in printed
    assert "- openvino: the package 'optimum' does not import here" in printed


@pytest.mark.parametrize("limits", [True, False])
def test_plots_are_drawn_whatever_is_missing(tmp_path: Path, limits: bool) -> None:
    shown = result() if limits else result(limits=None, contestants=[entry("ours fp32", "fp32", {"decode 1": 1.0})])
    plot_compare(shown, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert compare_tables(shown)


@pytest.mark.parametrize("config", [small_config(), small_config(tie_word_embeddings=True), shape_config("130m")])
def test_traffic_counts_the_products_of_projections_and_head(config: MambaConfig) -> None:
    shapes = expected_shapes(config)
    projections = sum(math.prod(shape) for name, shape in shapes.items() if "_proj.weight" in name)
    traffic = Traffic.of(config)
    assert traffic.layer_flops == 2 * projections
    assert traffic.head_flops == 2 * config.vocab_size * config.d_model


def test_bytes_of_a_step_are_those_of_the_file_without_a_separate_embedding(tmp_path: Path) -> None:
    config = small_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    assert bytes_read(config, FLOAT32) == sum(t.nbytes for t in tensors.values())
    untied = small_config(tie_word_embeddings=False)
    embedding = 4 * untied.vocab_size * untied.d_model
    assert bytes_read(untied, FLOAT32) == sum(t.nbytes for t in random_tensors(untied).values()) - embedding
    assert bytes_read(config, Quantization("int8")) < 0.5 * bytes_read(config, FLOAT32)


def test_limit_of_decode_is_reading_for_one_sequence_and_products_for_many() -> None:
    traffic = Traffic(state_bytes=1000, layer_flops=4_000_000, head_flops=1_000_000)
    weight_bytes = 10_000_000
    alone = decode_limit(LIMITS, traffic, 1, weight_bytes=weight_bytes, product="fp32")
    assert alone == pytest.approx(1e9 / (weight_bytes + 2 * 1000))
    many = decode_limit(LIMITS, traffic, 64, weight_bytes=weight_bytes, product="fp32")
    assert many == pytest.approx(1e9 / 5_000_000)
    assert decode_limit(LIMITS, traffic, 64, weight_bytes=weight_bytes, product="int8") > many


def test_limit_of_prefill_pays_for_the_head_once() -> None:
    traffic = Traffic(state_bytes=0, layer_flops=1_000_000, head_flops=1_000_000)
    assert prefill_limit(LIMITS, traffic, 1, product="fp32") == pytest.approx(500)
    assert prefill_limit(LIMITS, traffic, 9, product="bf16") == pytest.approx(1800)


def test_two_measurements_of_limits_give_the_higher_of_each() -> None:
    other = Limits(
        2, 5e8, {"fp32": 3e9, "bf16": 1e9, "int8": 9e9}, {"read": "e", "fp32": "f", "bf16": "g", "int8": "h"}
    )
    assert LIMITS.best_of(other) == Limits(
        2, 1e9, {"fp32": 3e9, "bf16": 2e9, "int8": 9e9}, {"read": "a", "fp32": "f", "bf16": "c", "int8": "h"}
    )


def test_limits_are_measured_without_changing_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.limits._WIDTH", 64)
    monkeypatch.setattr("benchmarks.limits._READ_BYTES", 2**16)
    threads, engine = torch.get_num_threads(), torch.backends.quantized.engine
    found = measure_limits(1)
    assert found.threads == 1
    assert found.read_bytes_per_s > 0
    assert all(rate > 0 for rate in found.flops_per_s.values())
    assert (torch.get_num_threads(), torch.backends.quantized.engine) == (threads, engine)


def test_shape_130m_has_the_size_it_is_named_after() -> None:
    config = shape_config("130m")
    assert (config.n_layers, config.d_model, config.vocab_size, config.d_state[0]) == (24, 768, 50280, 16)
    parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert parameters == 129_135_360
    with pytest.raises(RequestError, match=r"--shape: expected one of tiny, 130m, .*, found '7b'"):
        shape_config("7b")
    assert set(SHAPES) >= {"tiny", "370m"}


def test_random_weights_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (plain_checkpoint(None, "tiny", tmp_path / name) for name in "ab")
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_files_of_a_model_are_not_taken_for_those_of_another_of_its_name(tmp_path: Path) -> None:
    config = small_config()
    folders = [write_model(tmp_path / name / "model", config, seed=seed) for seed, name in enumerate("ab")]
    first, second = (plain_checkpoint(str(folder), None, tmp_path / "out") for folder in folders)
    assert first.folder != second.folder
    assert plain_checkpoint(str(folders[0]), None, tmp_path / "out").folder == first.folder


def test_a_model_with_gates_is_not_compared_before_its_export(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_config())
    (folder / "pillars.safetensors").touch()
    with pytest.raises(YunminError, match=r"MODEL: .* has gates: export it first"):
        plain_checkpoint(str(folder), None, tmp_path / "out")


def test_our_formats_are_made_from_the_same_weights_and_load(tmp_path: Path) -> None:
    plain = plain_checkpoint(None, "tiny", tmp_path)
    mine = f"mine={plain.folder}"
    wanted = [("ours", "fp32"), ("ours", "int8"), ("ours", "int4"), ("ours", mine)]
    field = gather(wanted, plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    assert [c.name for c in field.contestants] == ["ours fp32", "ours int8", "ours int4", "ours mine"]
    assert [c.precision for c in field.contestants] == ["fp32", "int8", "int4", "fp32"]
    assert field.absent == {}
    stored = [load_checkpoint(c.model, quantized=True).quantization.format for c in field.contestants]
    assert stored == ["none", "int8", "int4", "none"]
    again = gather(wanted, plain, tmp_path / "cache", pythons={}, say=pytest.fail)
    assert again == field


def test_graphs_are_made_of_the_same_weights_and_again_once_their_code_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_checkpoint(None, "tiny", tmp_path)
    wanted = [("onnxruntime", kind) for kind in ("fp32", "int8", "int4")]
    field = gather(wanted, plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    assert [c.name for c in field.contestants] == ["onnxruntime fp32", "onnxruntime int8", "onnxruntime int4"]
    for contestant, (_, kind) in zip(field.contestants, wanted, strict=True):
        stored = "none" if kind == "fp32" else kind
        assert contestant.is_ours
        assert load_checkpoint(contestant.model, quantized=True).quantization.format == stored
        assert contestant.weight_bytes == bytes_read(plain.config, Quantization(stored))
        assert (contestant.model / "onnx/model.onnx").is_file()
    assert gather(wanted, plain, tmp_path / "cache", pythons={}, say=pytest.fail) == field
    made: list[str] = []
    monkeypatch.setattr("benchmarks.contestant_files._digest", lambda _: "other code")
    assert gather(wanted, plain, tmp_path / "cache", pythons={}, say=made.append) == field
    assert len(made) == 3


def test_a_folder_of_ours_has_the_limits_of_its_own_widths(tmp_path: Path) -> None:
    plain = plain_checkpoint(None, "tiny", tmp_path)
    narrow = plain.config.with_widths(d_inner=(64, 96), d_state=(16, 8))
    folder = write_model(tmp_path / "narrow", narrow)
    field = gather([("ours", f"narrow={folder}")], plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    (mine,) = field.contestants
    assert (mine.config, mine.weight_bytes) == (narrow, bytes_read(narrow, FLOAT32))
    found = _limits_of(mine, Plan(1, prefill=(8,), decode=(2,), depths=()), plain, LIMITS)
    traffic = Traffic.of(narrow)
    assert found == {
        "prefill 8": prefill_limit(LIMITS, traffic, 8, product="fp32"),
        "decode 2": decode_limit(LIMITS, traffic, 2, weight_bytes=mine.weight_bytes, product="fp32"),
    }


def test_a_folder_of_ours_with_another_vocabulary_is_absent(tmp_path: Path) -> None:
    plain = plain_checkpoint(None, "tiny", tmp_path)
    folder = write_model(tmp_path / "other", small_config())
    field = gather([("ours", f"other={folder}")], plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    assert "its vocabulary of 300 ids is not that of the compared model" in field.absent["ours other"]


@pytest.mark.parametrize(("named", "prefill"), [([], (512,)), (["--prefill", "7"], (7,))])
def test_quick_changes_defaults_and_nothing_that_was_named(
    named: list[str], prefill: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def planned(plan: Plan, out: Path, **options: Any) -> dict[str, Any]:
        plans.append(plan)
        return result()

    monkeypatch.setattr("benchmarks.compare.compare", planned)
    assert main(["bench", "compare", "--shape", "tiny", "--quick", *named, "--out", str(tmp_path)]) == 0
    assert (plans[0].prefill, plans[0].decode, plans[0].repeats, plans[0].budget_s) == (prefill, (1, 16), 2, 6.0)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"benchmark": "other"}'])
@pytest.mark.parametrize("benchmark", ["compare", "train"])
def test_report_of_another_file_ends_with_one_line(
    benchmark: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(text)
    assert main(["bench", benchmark, "--report", str(tmp_path / "other.json")]) == 1
    assert capsys.readouterr().err.startswith(f"yunmin: error: --report: {tmp_path / 'other.json'}: expected a")


def test_figures_of_a_warm_up_alone_are_named() -> None:
    slow = entry("transformers", "fp32", {"prefill 2048": 9.0, "decode 1": 2.0}, warm_up_only=["prefill 2048"])
    (listed,) = [p for p in compare_tables(result(contestants=[slow])) if p.title == "Measured once, while warming up"]
    assert isinstance(listed, Listing)
    assert listed.entries == (("transformers", "prefill 2048"),)
    assert "Measured once, while warming up" not in [part.title for part in compare_tables(result())]


def test_small_figures_are_not_shown_as_nothing() -> None:
    assert [number(value) for value in (0.00342, 0.0, 0.25, 12.34, 1234.0)] == [
        "0.00342",
        "0.00",
        "0.25",
        "12.3",
        "1,234",
    ]


def test_our_quantized_folders_are_artifacts(tmp_path: Path) -> None:
    plain = plain_checkpoint(None, "tiny", tmp_path)
    field = gather([("ours", "int8")], plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    model = load(field.contestants[0].model, device="cpu")
    assert model.config.d_model == plain.config.d_model


def test_peers_that_cannot_express_a_model_are_absent_with_the_reason(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_config())  # has biases
    plain = plain_checkpoint(str(folder), None, tmp_path)
    field = gather([("llama.cpp", "Q8_0")], plain, tmp_path / "cache", pythons={}, say=lambda _: None)
    assert field.contestants == []
    assert "llama.cpp's mamba has no biases" in field.absent["llama.cpp Q8_0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL: give a folder, or --shape for random weights of a known size; one of the two"),
        (["--shape", "tiny", "--prefill", "8,4"], "--prefill: must rise and be >= 1, got '8,4'"),
        (["--shape", "tiny", "--depths", "x"], "--depths: must be integers separated by commas, got 'x'"),
        (["--shape", "tiny", "--repeats", "0"], "--repeats: must be >= 1, got 0"),
        (["--shape", "tiny", "--peers", "vllm"], "contestant: expected one of ours, llama.cpp"),
        (["--shape", "tiny", "--threads", "0"], "--threads: must be >= 1, got 0"),
        (["--shape", "tiny", "--budget", "nan"], "--budget: must be >= 0, got nan"),
        (["--shape", "tiny", "--contestants", "ours,ours:int8=x"], "contestant: two are called 'ours int8'"),
        (["--shape", "tiny", "--contestants", "ours:mine="], "contestant: expected ours:NAME=FOLDER"),
    ],
)
def test_impossible_settings_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "compare", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"yunmin: error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_model_with_adapters_is_not_compared_before_its_export(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", small_config())
    (folder / "adapters").mkdir()
    with pytest.raises(YunminError, match=r"MODEL: .* has adapters: export it first"):
        plain_checkpoint(str(folder), None, tmp_path / "out")


@pytest.mark.slow
def test_whole_comparison_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "compare", "--shape", "tiny", "--contestants", "ours:int8,onnxruntime:fp32,openvino"]
    argv += ["--python", "openvino=/nowhere/python"]
    argv += ["--prefill", "5", "--decode", "1,2", "--depths", "0,7", "--repeats", "1", "--budget", "0", "--no-limits"]
    assert main([*argv, "--threads", "1", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / RESULT_FILE).read_text())
    assert [contestant["name"] for contestant in printed["contestants"]] == ["ours int8", "onnxruntime fp32"]
    for contestant in printed["contestants"]:
        assert {"prefill 5", "decode 1", "decode 2", "depth 0", "depth 7", "first token s", "peak MB"} <= set(
            contestant["summary"]
        )
        assert contestant["notes"] == {}
    assert printed["disagreement"]["ours int8"] == 0.0
    assert 0.0 < printed["disagreement"]["onnxruntime fp32"] < 0.1
    assert set(printed["absent"]) == {"openvino"}
    assert (tmp_path / "compare.png").is_file()
