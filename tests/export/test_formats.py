"""Other people's formats: round trips with a strict load, refusals before any work, nothing left after a failure."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.formats import FORMATS, FormatKind, check_format, check_format_destination, write_format
from tests.export.fixtures import TEXT, small_config, write_source
from tests.export.mamba_ssm_mirror import MambaLMHeadModel
from tests.models import random_ids, random_tensors
from tests.quantization.fixtures import write_quantized
from yunmin.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, CheckpointError, ConfigError, VerificationError
from yunmin.model import MambaLM
from yunmin.tokenizer import Tokenizer

CUT = {"d_inner": (24, 24), "d_state": (5, 5)}  # narrower than 2 * d_model, and odd


def source(folder: Path, config: MambaConfig) -> Checkpoint:
    """With a tokenizer that leaves a few rows as padding."""
    write_source(folder, config, tokenizer=False)
    Tokenizer.train([TEXT], config.vocab_size - 5).save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return load_checkpoint(folder)


@torch.inference_mode()
def our_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    return torch.as_tensor(MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)(ids))


def assert_same_model(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    ids = random_ids(expected.config, 2, 7)
    assert torch.equal(our_logits(found, ids), our_logits(expected, ids))
    assert found.config.n_tokens == expected.config.n_tokens
    assert found.config.eos_token_ids == expected.config.eos_token_ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("widths", [{}, CUT], ids=["full", "cut"])
def test_hf_folder_loads_strictly_in_transformers_with_the_same_logits_and_comes_back(
    tmp_path: Path, tied: bool, widths: dict[str, tuple[int, ...]]
) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = source(tmp_path / "source", small_config(tied=tied).with_widths(**widths))
    write_format("hf", tmp_path / "hf", checkpoint)
    model, info = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    assert isinstance(raw["expand"], int)
    assert raw["intermediate_size"] == checkpoint.config.d_inner[0]

    ids = random_ids(checkpoint.config, 2, 7)
    with torch.inference_mode():
        theirs = model.eval()(ids).logits
    ours = our_logits(checkpoint, ids)
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())

    model.save_pretrained(tmp_path / "back")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "back")
    assert_same_model(load_checkpoint(tmp_path / "back"), checkpoint)


def test_transformers_generates_from_an_hf_folder_and_never_a_padding_id(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = source(tmp_path / "source", small_config(tied=False))
    checkpoint.tensors["lm_head.weight"][checkpoint.config.n_tokens :] *= 50  # would win nearly every time
    write_format("hf", tmp_path / "hf", checkpoint)
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    found = model.generate(torch.tensor([[5, 9, 250]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    network = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    ids = [5, 9, 250]
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(network(torch.tensor([ids]))[0, -1, : checkpoint.config.n_tokens].argmax()))
    assert found[0].tolist() == ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mamba_ssm_folder_fills_that_packages_modules_strictly_and_comes_back(
    tmp_path: Path, tied: bool, bias: bool
) -> None:
    config = small_config(tied=tied, bias=bias).with_widths(d_inner=(48, 48), d_state=(5, 5))
    checkpoint = source(tmp_path / "source", config)
    write_format("mamba_ssm", tmp_path / "ssm", checkpoint)
    theirs = MambaLMHeadModel(**json.loads((tmp_path / "ssm/config.json").read_text()))
    state = torch.load(tmp_path / "ssm/pytorch_model.bin", weights_only=True)
    theirs.load_state_dict(state, strict=True)
    assert torch.equal(theirs.lm_head.weight, state["lm_head.weight"])
    found = load_checkpoint(tmp_path / "ssm")
    assert_same_model(found, checkpoint)
    assert found.config.n_tokens == 295
    # the tied head is stored once
    size = (tmp_path / "ssm/pytorch_model.bin").stat().st_size
    assert size < sum(tensor.nbytes for tensor in checkpoint.tensors.values()) + 20_000


@pytest.mark.parametrize(
    ("n_tokens", "rows", "multiple"), [(50277, 50280, 8), (300, 300, 1), (295, 300, 6), (299, 307, 307)]
)
def test_padding_of_the_vocabulary_is_said_as_a_multiple(n_tokens: int, rows: int, multiple: int) -> None:
    from export.formats.mamba_ssm import config_of

    raw = config_of(MambaConfig.create(vocab_size=rows, n_tokens=n_tokens, d_model=16, n_layers=1))
    assert (raw["vocab_size"], raw["pad_vocab_size_multiple"]) == (n_tokens, multiple)
    assert MambaConfig.from_dict(raw).vocab_size == rows


def test_a_published_config_is_written_as_it_was_published() -> None:
    """mamba-130m's, whose empty `ssm_cfg` stands for the values that are spelled out here."""
    from export.formats.mamba_ssm import config_of

    config = MambaConfig.create(vocab_size=50280, n_tokens=50277, d_model=768, n_layers=24)
    assert config_of(config) == {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 48, "conv_bias": True, "bias": False},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("hf", small_config(uniform=False), "layer 1: transformers' Mamba has one d_inner for all layers, found 20"),
        ("hf", small_config().with_widths(d_state=(6, 4)), "layer 1: .* one d_state for all layers, found 4 beside 6"),
        ("mamba_ssm", small_config(uniform=False), "layer 1: mamba_ssm has one d_inner for all layers"),
        ("mamba_ssm", small_config().with_widths(**CUT), "a multiple of d_model 16, found 24: .* fractional expand"),
        ("mamba_ssm", small_config().with_widths(d_state=(300, 300)), "d_state must be at most 256"),
        (
            "mamba_ssm",
            MambaConfig.create(vocab_size=300, d_model=16, n_layers=1, norm_eps=1e-6),
            "norm_eps is always 1e-05 there, found 1e-06",
        ),
        ("gguf", small_config(), "no biases on in_proj and out_proj"),
        ("gguf", small_config(bias=False).with_widths(**CUT), "layer 0: llama.cpp's mamba takes d_inner = 2"),
        ("onnx", small_config(), "format: expected one of hf, mamba_ssm, gguf, found 'onnx'"),
    ],
)
def test_what_a_format_cannot_say_is_refused_with_the_reason(
    tmp_path: Path, kind: FormatKind, config: MambaConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_format(kind, config, None)
    write_source(tmp_path / "source", config)
    with pytest.raises(ConfigError, match=message):
        write_format(kind, tmp_path / "out", load_checkpoint(tmp_path / "source"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unknown_gguf_type_is_refused_early() -> None:
    with pytest.raises(ConfigError, match="GGUF type: expected one of F32, F16, Q8_0, Q4_0, found 'q5_k'"):
        check_format("gguf", MambaConfig.create(vocab_size=300, d_model=16, n_layers=1), None, gguf_type="q5_k")


@pytest.mark.parametrize("kind", FORMATS)
def test_integer_weights_are_refused(tmp_path: Path, kind: FormatKind) -> None:
    config = MambaConfig.create(vocab_size=320, d_model=32, n_layers=2, d_state=6)
    folder = write_quantized(tmp_path / "source", config, "int8")
    with pytest.raises(CheckpointError, match="expected float32 weights, found int8 ones"):
        write_format(kind, tmp_path / "out", load_checkpoint(folder, quantized=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_export_replaces_the_first_only_when_forced_and_never_anything_else(
    tmp_path: Path, kind: FormatKind
) -> None:
    config = MambaConfig.create(vocab_size=300, d_model=16, n_layers=2, d_state=6, dt_rank=3)
    first, second = source(tmp_path / "a", config), source(tmp_path / "b", config)
    second.tensors.update(random_tensors(config, seed=7))
    out = tmp_path / "out"
    write_format(kind, out, first, gguf_type="f32")
    with pytest.raises(ArtifactError, match="exists already; --force replaces"):
        write_format(kind, out, second, gguf_type="f32")
    write_format(kind, out, second, gguf_type="f32", force=True)
    if kind == "gguf":
        from export.gguf_readback import checkpoint_tensors

        read = checkpoint_tensors(out)
        assert torch.equal(read["backbone.layers.1.mixer.D"], second.tensors["backbone.layers.1.mixer.D"])
        (tmp_path / "other").write_text("a letter")
    else:
        assert_same_model(load_checkpoint(out), second)
        (tmp_path / "other").mkdir()
        (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="--force replaces only"):
        check_format_destination(kind, tmp_path / "other", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "other", "out"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("out", [".", ".."])
def test_a_folder_without_a_name_of_its_own_is_refused_before_any_work(
    tmp_path: Path, kind: FormatKind, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty working folder may not give way: who stands in it would stand in one that is gone."""
    (tmp_path / "empty/empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty/empty")
    with pytest.raises(ArtifactError, match=r"^\.\.?: expected "):
        check_format_destination(kind, out)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_left_when_what_was_read_back_differs(
    tmp_path: Path, kind: FormatKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = source(
        tmp_path / "source", MambaConfig.create(vocab_size=300, d_model=16, n_layers=2, d_state=6, dt_rank=3)
    )
    spoiled = "backbone.layers.1.mixer.dt_proj.bias"

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, spoiled: tensors[spoiled] + 1e-3}

    if kind == "hf":
        from export.formats import hf

        monkeypatch.setattr(
            hf, "write_checkpoint", lambda folder, config, t: write_checkpoint(folder, config, damage(t))
        )
    elif kind == "mamba_ssm":
        from export.formats import mamba_ssm

        names = mamba_ssm.state_dict_of
        monkeypatch.setattr(mamba_ssm, "state_dict_of", lambda config, t: names(config, damage(t)))
    else:
        from export import gguf

        stored = gguf.gguf_tensors
        monkeypatch.setattr(gguf, "gguf_tensors", lambda config, t, type_: stored(config, damage(t), type_))
    with pytest.raises(VerificationError, match=f"out: read back, tensor '{spoiled}'"):
        write_format(kind, tmp_path / "out", checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_one_line_and_what_was_there_before_stays(tmp_path: Path, kind: FormatKind) -> None:
    config = MambaConfig.create(vocab_size=300, d_model=16, n_layers=2, d_state=6, dt_rank=3)
    checkpoint = source(tmp_path / "source", config)
    write_format(kind, tmp_path / "out", checkpoint, gguf_type="f32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))  # bytes of a file: the tokenizer fits
    try:
        with pytest.raises(ArtifactError, match="out: cannot be written: "):
            write_format(kind, tmp_path / "out", checkpoint, gguf_type="f32", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    if kind != "gguf":
        assert_same_model(load_checkpoint(tmp_path / "out"), checkpoint)


def test_a_weight_beyond_the_range_of_f16_is_refused(tmp_path: Path) -> None:
    checkpoint = source(
        tmp_path / "source", MambaConfig.create(vocab_size=300, d_model=16, n_layers=2, d_state=6, dt_rank=3)
    )
    checkpoint.tensors["backbone.layers.0.mixer.in_proj.weight"][3, 3] = 7e4
    with pytest.raises(VerificationError, match=r"in_proj.weight' as F16 is off by inf.*largest weight is 7e\+04"):
        write_format("gguf", tmp_path / "out.gguf", checkpoint, gguf_type="f16")
    assert not (tmp_path / "out.gguf").exists()


def test_gguf_file_has_the_chat_template_and_both_ends_of_text(tmp_path: Path) -> None:
    from dataclasses import replace

    import gguf

    checkpoint = source(
        tmp_path / "source", MambaConfig.create(vocab_size=300, d_model=16, n_layers=2, d_state=6, dt_rank=3)
    )
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, eos_token_ids=(7, 0)))
    write_format("gguf", tmp_path / "out.gguf", checkpoint)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    keys = ("chat_template", "ggml.eos_token_id", "ggml.eot_token_id")
    fields = [reader.get_field(f"tokenizer.{key}") for key in keys]
    assert [field.contents() for field in fields if field] == ["{{ messages[0].content }}", 0, 7]
