"""Show what is inside an artifact: sizes, cuts, hashes, parity."""

from __future__ import annotations

from yunmin.cli import parser, print_json


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

    from yunmin.artifact import Manifest, load_artifact

    checkpoint, manifest = load_artifact(options.artifact)
    if options.json:
        print_json(manifest.model_dump())
        return 0
    config = checkpoint.config
    print(
        f"{options.artifact}: Mamba-1, {config.n_layers} layers, width {config.d_model}, vocabulary {config.n_tokens}"
    )
    for name, value in manifest.provenance.items():
        print(f"  {name:<12} {value}")
    print("\n  verified     every file matches its sha256")

    def table(record: Manifest) -> None:
        print(f"\n  {'':<22} {'before':>15} {'after':>15} {'ratio':>7}")
        for key, before in record.before.items():
            after = record.after[key]
            print(f"  {key.replace('_', ' '):<22} {before:>15,} {after:>15,} {after / before:>7.3f}")

    table(manifest)
    print("\n  layer   inner channels        states")
    for layer, cut in enumerate(manifest.cuts):
        inner, states = (f"{cut[f'{k}_after']} of {cut[f'{k}_before']}" for k in ("d_inner", "d_state"))
        print(f"  {layer:>5} {inner:>16} {states:>13}")
    print("\n  parity with the trained model, on real text")
    for precision, parity in manifest.parity.items():
        print(
            f"  {precision:<9} error {parity.max_abs_error:.3g} of logits up to {parity.largest_logit:.4g}: "
            f"{parity.relative_error:.2e}, limit {parity.tolerance:g}, {parity.tokens} tokens"
        )
    print("\n  files")
    for name, file in manifest.files.items():
        print(f"  {name:<26} {file.bytes:>12,} bytes  sha256 {file.sha256}")
    return 0
