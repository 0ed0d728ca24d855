"""Snapshots survive as bytes unchanged, and whatever else the bytes are is refused in one line."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import yunmin
from tests.models import small_config, write_model
from yunmin.config import MambaConfig
from yunmin.errors import StateError
from yunmin.language_model import LanguageModel
from yunmin.snapshots import max_snapshot_bytes, snapshot_from_bytes, snapshot_metadata, snapshot_to_bytes
from yunmin.state import MambaState, Snapshot

MARK = "f" * 64
CONFIG = small_config(d_inner=(40, 24), d_state=(5, 8))


def snapshot_of(config: MambaConfig = CONFIG, *, tokens: int = 7, seed: int = 0) -> Snapshot:
    rng = torch.Generator().manual_seed(seed)
    empty = MambaState.zeros(config, 1)
    state = MambaState(
        tuple(torch.randn(t.shape, generator=rng) for t in empty.conv),
        tuple(torch.randn(t.shape, generator=rng) for t in empty.ssm),
    )
    ids = torch.randint(0, config.n_tokens, (tokens,), generator=rng)
    return Snapshot(state, torch.randn(config.vocab_size, generator=rng), tuple(ids.tolist()), rng.get_state())


def equal(a: Snapshot, b: Snapshot) -> bool:
    tensors = zip(a.state.conv + a.state.ssm + (a.logits,), b.state.conv + b.state.ssm + (b.logits,), strict=True)
    same_draws = (a.sampler_state is None) == (b.sampler_state is None)
    if a.sampler_state is not None and b.sampler_state is not None:
        same_draws = torch.equal(a.sampler_state, b.sampler_state)
    return all(torch.equal(x, y) for x, y in tensors) and a.token_ids == b.token_ids and same_draws


def tensors_of(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    return safetensors.torch.load(data), snapshot_metadata("test", data)


@pytest.mark.parametrize("runtime", ["native", "torch"])
def test_bytes_give_the_snapshot_back_whatever_memory_its_tensors_are_views_of(
    model_folder: Path, runtime: str
) -> None:
    model: LanguageModel = yunmin.load(model_folder, device="cpu", runtime=runtime)  # type: ignore[arg-type]
    snapshot = replace(model.snapshot("The quick"), sampler_state=torch.Generator().get_state())
    data = snapshot_to_bytes(snapshot, model.fingerprint)
    assert data == snapshot_to_bytes(snapshot, model.fingerprint)
    assert equal(snapshot_from_bytes("test", data, model.config, model.fingerprint), snapshot)


def test_the_library_reads_the_bytes_and_we_read_its() -> None:
    snapshot = snapshot_of()
    tensors, metadata = tensors_of(snapshot_to_bytes(snapshot, MARK, name="few-shot"))
    assert metadata["name"] == "few-shot"
    assert torch.equal(tensors["ssm.1"], snapshot.state.ssm[1])
    assert equal(snapshot_from_bytes("test", safetensors.torch.save(tensors, metadata), CONFIG, MARK), snapshot)


def test_a_snapshot_read_is_the_readers_own() -> None:
    data = snapshot_to_bytes(snapshot_of(), MARK)
    first = snapshot_from_bytes("test", data, CONFIG, MARK)
    first.state.ssm[0].zero_()
    assert equal(snapshot_from_bytes("test", data, CONFIG, MARK), snapshot_of())


@pytest.mark.parametrize("tokens", [1, 1000])
@pytest.mark.parametrize("config", [CONFIG, small_config(d_conv=2, d_inner=(16,), d_state=(1,))])
def test_no_snapshot_is_larger_than_its_limit_and_the_limit_is_near(config: MambaConfig, tokens: int) -> None:
    size = len(snapshot_to_bytes(snapshot_of(config, tokens=tokens), MARK, name="n" * 64))
    assert size <= max_snapshot_bytes(config, tokens) < size + 32_768


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["ssm.1", "conv.0", "logits"])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(value: float, where: str) -> None:
    tensors, metadata = tensors_of(snapshot_to_bytes(snapshot_of(), MARK))
    tensors[where].view(-1)[3] = value
    with pytest.raises(StateError, match=rf"^upload: tensor '{where}': expected finite numbers"):
        snapshot_from_bytes("upload", safetensors.torch.save(tensors, metadata), CONFIG, MARK)
    snapshot = snapshot_of()
    spoilt = {"ssm.1": snapshot.state.ssm[1], "conv.0": snapshot.state.conv[0], "logits": snapshot.logits}
    spoilt[where].view(-1)[3] = value
    with pytest.raises(StateError, match=rf"tensor '{where}': expected finite numbers"):
        snapshot_to_bytes(snapshot, MARK)


def test_numbers_whose_sum_overflows_are_finite_all_the_same() -> None:
    snapshot = snapshot_of()
    snapshot.state.ssm[0].fill_(3e38)
    assert equal(snapshot_from_bytes("test", snapshot_to_bytes(snapshot, MARK), CONFIG, MARK), snapshot)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"extra": torch.zeros(1)}, "'extra' does not belong"),
        ({"token_ids": torch.zeros(0, dtype=torch.int64)}, "at least one"),
        ({"token_ids": torch.tensor([-1])}, "ids must lie in"),
        ({"ssm.0": torch.zeros(1, 40, 5, dtype=torch.float16)}, "'ssm.0': expected floats"),
        ({"ssm.0": torch.zeros(1, 5, 40)}, "'ssm.0': expected floats"),
        ({"logits": torch.zeros(300, dtype=torch.complex64)}, "'logits': expected floats"),
        ({"sampler_state": torch.zeros(5056, dtype=torch.uint8)}, "'sampler_state' is no state"),
        ({"sampler_state": torch.zeros(1)}, "'sampler_state' is no state"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changed: dict[str, Tensor], named: str) -> None:
    tensors, metadata = tensors_of(snapshot_to_bytes(snapshot_of(), MARK))
    with pytest.raises(StateError, match=f"^upload: .*{named}"):
        snapshot_from_bytes("upload", safetensors.torch.save(tensors | changed, metadata), CONFIG, MARK)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"format": 3}}',
        b'{"__metadata__": {}}',
        b'{"x": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999999999999999]}}',
        b'{"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_a_malformed_header_is_refused_in_one_line(header: bytes) -> None:
    for length in (len(header), 2**63, 2**64 - 1):
        with pytest.raises(StateError, match=r"^upload: expected") as caught:
            snapshot_from_bytes("upload", struct.pack("<Q", length) + header, CONFIG, MARK)
        assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_changed_anywhere_are_refused_or_another_whole_snapshot(data: st.DataObject) -> None:
    whole = bytearray(snapshot_to_bytes(snapshot_of(), MARK))
    (header,) = struct.unpack_from("<Q", whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 8 + header), st.integers(0, len(whole) - 1)))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    try:
        read = snapshot_from_bytes("upload", bytes(whole[:cut]), CONFIG, MARK)
    except StateError:
        return
    assert cut == len(whole)
    assert len(read.token_ids) == 7
    assert all(bool(torch.isfinite(t).all()) for t in (*read.state.conv, *read.state.ssm, read.logits))


def test_another_models_bytes_are_refused_before_their_tensors_are_looked_at(tmp_path: Path) -> None:
    model = yunmin.load(write_model(tmp_path / "other", small_config(d_state=(8, 8))))
    with pytest.raises(
        StateError, match=f"belongs to another model: expected {MARK[:12]}, found {model.fingerprint[:12]}"
    ):
        snapshot_from_bytes("x", snapshot_to_bytes(model.snapshot([1, 2]), model.fingerprint), CONFIG, MARK)


def test_the_header_is_one_json_object_with_aligned_data() -> None:
    data = snapshot_to_bytes(snapshot_of(), MARK)
    (length,) = struct.unpack_from("<Q", data)
    assert (8 + length) % 64 == 0
    assert list(json.loads(data[8 : 8 + length]))[:3] == ["__metadata__", "token_ids", "logits"]
