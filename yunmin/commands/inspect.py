"""Show what is inside an artifact: sizes, cuts, hashes, parity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from yunmin.cli import parser, print_json

_CLAIMS = {
    "float64": "trained model, both in fp64",
    "float32": "trained model, as written",
    "stepwise": "own whole sequences, by steps",
    "layers": "same layer in plain torch, worst",
    "quantized": "own integers in plain torch",
    "cut": "model that was cut further, fp64",
    "onnx": "same in torch, ONNX graph",
    "onnx_steps": "same in torch, ONNX, by steps",
    "onnx_int8_activations": "same in torch, ONNX, as served",
}
_BEFORE = {"float32": "trained model, before storing"}  # where the artifact itself is not exact any more


def main(argv: list[str]) -> int:
    """`yunmin inspect ARTIFACT`."""
    arguments = parser(
        "inspect",
        "Verifies an artifact against its manifest and shows what is inside, what was cut, and how it was proven.",
        ["yunmin inspect artifact/", "yunmin inspect artifact/ --json"],
    )
    arguments.add_argument("artifact", help="folder written by yunmin export")
    arguments.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    options = arguments.parse_args(argv)

    from yunmin.artifact import load_artifact

    checkpoint, manifest = load_artifact(options.artifact)
    if options.json:
        print_json({"artifact": options.artifact, **manifest.model_dump()})
        return 0
    config = checkpoint.config
    print(
        f"{options.artifact}: Mamba-1, {config.n_layers} layers, width {config.d_model}, vocabulary {config.n_tokens}"
    )
    print(f"format {manifest.format_version}, quantization {manifest.quantization}, every file matches its sha256")
    print("\nprovenance")
    search = manifest.provenance.get("search", {})
    facts = list(_flattened({key: value for key, value in manifest.provenance.items() if key != "search"}))
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"  {name:<{width}}  {value}")
    print(f"\n{'size':<24} {'before':>17} {'after':>17} {'ratio':>7}")
    for key, before in manifest.before.items():
        after = manifest.after[key]
        print(f"  {key.replace('_', ' '):<22} {before:>17,} {after:>17,} {after / before:>7.3f}")
    if manifest.perplexity:
        trained, stored = (manifest.perplexity[key] for key in ("before", "after"))
        ratio = stored.token_perplexity / trained.token_perplexity
        print(
            f"  {'perplexity':<22} {trained.token_perplexity:>17,.3f} {stored.token_perplexity:>17,.3f} {ratio:>7.4f}\n"
            f"  (per token on {stored.tokens:,} tokens of {stored.source}; window {stored.window}, "
            f"stride {stored.stride})"
        )
    if search:
        print(f"\n{'searched':<24} {'width':>17} {'bytes':>17} {'perplexity':>11}   within {search['limit']:.3f}")
        for point in search["curve"]:
            print(
                f"  {point['precision']:<22} {point['width']:>17} {point['bytes']:>17,} {point['perplexity']:>11.3f}   "
                f"{'yes' if point['passes'] else 'no'}"
            )
    print("\nlayer     inner channels           states")
    for layer, cut in enumerate(manifest.cuts):
        inner, states = (f"{cut[f'{k}_after']} of {cut[f'{k}_before']}" for k in ("d_inner", "d_state"))
        print(f"{layer:>5} {inner:>18} {states:>16}")
    print(f"\n{'logits equal those of the':<32} {'error / largest':>15} {'limit':>8} {'largest':>10} {'positions':>9}")
    claims = _CLAIMS | _BEFORE if {"quantized", "cut"} & set(manifest.parity) else _CLAIMS
    for name, parity in manifest.parity.items():
        print(
            f"  {claims.get(name, name):<30} {parity.relative_error:>15.2e} {parity.tolerance:>8.0e} "
            f"{parity.largest_logit:>10.4g} {parity.tokens:>9}"
        )
    print("\nfiles")
    for name, file in manifest.files.items():
        print(f"  {name:<24} {file.bytes:>14,} bytes  {file.sha256}")
    return 0


def _flattened(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines: `gates.zero`, `adapters.0.kind`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, str(value)
    elif not value:
        yield name, "none"
    elif isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        yield name, ", ".join(map(str, value))
    else:
        for key, item in items:
            yield from _flattened(item, f"{name}.{key}" if name else str(key))
