"""States move, fork and survive a file unchanged; a state of another model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import yunmin
from tests.models import random_ids, random_model, small_config, write_model
from yunmin.errors import StateError
from yunmin.generate import Generation
from yunmin.sampling import SamplingParams
from yunmin.state import MambaState, Snapshot


def equal(a: MambaState, b: MambaState) -> bool:
    return all(map(torch.equal, a.conv + a.ssm, b.conv + b.ssm))


def test_gather_scatter_and_copy_move_whole_rows() -> None:
    model = random_model(small_config(d_inner=(40, 24), d_state=(5, 8)))
    with torch.no_grad():
        _, state = model.prefill(random_ids(model.config, 4, 6))
    forked = state.gather([2, 2, 0])
    assert forked.batch_size == 3
    assert equal(forked.gather([0]), forked.gather([1]))
    assert equal(forked.gather([2]), state.gather([0]))
    pool = model.new_state(5)
    pool.scatter_([4, 1], state.gather([3, 0]))
    assert equal(pool.gather([4, 1]), state.gather([3, 0]))
    assert equal(pool.gather([0, 2, 3]), model.new_state(3))
    copy = state.copy()
    copy.ssm[0].zero_()
    assert not equal(copy, state)
    assert state.nbytes == 4 * 4 * (40 * (3 + 5) + 24 * (3 + 8))


@pytest.mark.parametrize("seed", [None, 11])
def test_a_saved_state_continues_identically(model_folder: Path, tmp_path: Path, seed: int | None) -> None:
    model = yunmin.load(model_folder)
    params = SamplingParams(max_tokens=40, temperature=0.0 if seed is None else 1.3, seed=seed, repetition_penalty=1.2)
    ids = model.encode("The quick")

    def run(generation: Generation, logits: torch.Tensor, state: MambaState, n: int) -> tuple[list[int], Snapshot]:
        first = len(generation.token_ids)
        for _ in range(n):
            piece = generation.advance(logits)
            assert piece.token_id is not None
            logits, state = model.step(piece.token_id, state)
        new = generation.token_ids[first:]
        return new, Snapshot(state, logits, (*ids, *generation.token_ids), generation.sampler.state())

    logits, state = model.prefill(ids)
    whole, _ = run(Generation(params, ids, model.config, model.tokenizer), logits, state, 20)
    head, snapshot = run(Generation(params, ids, model.config, model.tokenizer), logits, state, 8)
    model.save_state(tmp_path / "s.safetensors", snapshot)
    loaded = yunmin.load(model_folder).load_state(tmp_path / "s.safetensors")
    assert equal(loaded.state, snapshot.state)
    assert loaded.token_ids == snapshot.token_ids
    assert torch.equal(loaded.logits, snapshot.logits)
    continued = Generation(params, loaded.token_ids, model.config, model.tokenizer, loaded.sampler_state)
    tail, _ = run(continued, loaded.logits, loaded.state, 12)
    assert head + tail == whole


def test_a_state_file_holds_the_state_and_little_more(model_folder: Path, tmp_path: Path) -> None:
    model = yunmin.load(model_folder)
    snapshot = model.snapshot(list(range(1, 250)))
    model.save_state(tmp_path / "s.safetensors", snapshot)
    size = (tmp_path / "s.safetensors").stat().st_size
    assert size < snapshot.state.nbytes + snapshot.logits.nbytes + 8 * 249 + 2000


def test_a_state_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = yunmin.load(model_folder)
    model.save_state(tmp_path / "s.safetensors", model.snapshot("abc"))
    for name, other in {
        "weights": write_model(tmp_path / "weights", seed=1),
        "config": write_model(tmp_path / "config", small_config(norm_eps=1e-6)),
    }.items():
        with pytest.raises(StateError, match="belongs to another model") as caught:
            yunmin.load(other).load_state(tmp_path / "s.safetensors")
        assert "s.safetensors" in str(caught.value), name


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("missing", "found no such file"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("folder", "damaged"),
        ("format", "expected format"),
        ("no_tensor", "'ssm.1': expected floats of shape .* found nothing"),
        ("shape", r"'conv.0': .* found torch.float32 \(1, 2\)"),
        ("dtype", "'logits': expected floats"),
        ("ids", "'token_ids': ids must lie in 0..299"),
        ("ids_dtype", "'token_ids': expected int64 ids"),
        ("sampler", "'sampler_state' is no state"),
    ],
)
def test_a_damaged_state_is_refused(model_folder: Path, tmp_path: Path, damage: str, named: str) -> None:
    model = yunmin.load(model_folder)
    path = tmp_path / "s.safetensors"
    model.save_state(path, model.snapshot("abc"))
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-8])
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "format":
            save_file(tensors, path, metadata=metadata | {"format": "yunmin-state-9"})
        case "no_tensor":
            save_file({n: t for n, t in tensors.items() if n != "ssm.1"}, path, metadata=metadata)
        case _:
            changed = {
                "shape": {"conv.0": torch.zeros(1, 2)},
                "dtype": {"logits": torch.zeros(300, dtype=torch.int64)},
                "ids": {"token_ids": torch.tensor([1, 300])},
                "ids_dtype": {"token_ids": torch.tensor([1.0])},
                "sampler": {"sampler_state": torch.zeros(3, dtype=torch.uint8)},
            }[damage]
            save_file(tensors | changed, path, metadata=metadata)
    with pytest.raises(StateError, match=named) as caught:
        model.load_state(path)
    assert str(path) in str(caught.value)


def test_a_snapshot_of_two_sequences_is_not_written(model_folder: Path, tmp_path: Path) -> None:
    model = yunmin.load(model_folder)
    with pytest.raises(StateError, match="holds one sequence, got 2"):
        model.save_state(tmp_path / "s", Snapshot(model.runtime.new_state(2), torch.zeros(300), (1,)))
    assert not (tmp_path / "s").exists()
