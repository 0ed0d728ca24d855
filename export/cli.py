"""Turn a run or a checkpoint into a compact artifact that is proven to compute the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from yunmin.cli import parser, print_json

if TYPE_CHECKING:
    from export.options import Options


def main(argv: list[str]) -> int:
    """`yunmin export SOURCE OUT`."""
    arguments = parser(
        "export",
        "Merges adapters, folds gates, cuts what is gated off, bakes the scan order, verifies the result against the "
        "model as it was trained, and writes an artifact.",
        [
            "yunmin export training_outputs/my-run artifact/",
            "yunmin export training_outputs/my-run/checkpoint-500 artifact/ --force",
            "yunmin export path/to/mamba-130m-hf artifact/ --adapter my-lora/ --data held-out.txt --json",
            "yunmin export training_outputs/my-run small/ --quantize int8",
            "yunmin export training_outputs/my-run small/ --quantize int4 --calibrate text/ --order quantization",
            "yunmin export training_outputs/my-run small/ --max-perplexity-increase 2% --data held-out.txt",
            "yunmin export training_outputs/my-run artifact/ --onnx --onnx-precision int8",
            "yunmin export training_outputs/my-run artifact/ --onnx --triton repository/",
            "yunmin export training_outputs/my-run again/ --triton repo/ --triton-initial-state support.safetensors",
            "yunmin export training_outputs/my-run model.gguf --format gguf --gguf-type f16",
        ],
    )
    arguments.add_argument("source", help="run folder, a checkpoint of it, any Mamba checkpoint, or a Hub id")
    arguments.add_argument("out", help="folder, or GGUF file, to write; appears whole or not at all")
    arguments.add_argument(
        "--adapter", action="append", default=[], metavar="DIR", help="a LoRA or IA3 folder to merge, too; repeatable"
    )
    arguments.add_argument(
        "--data", metavar="SOURCE", help="held-out text to verify and measure perplexity on (the standard library's)"
    )
    arguments.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="store weights in int8, one scale per row, or int4, one per 32 inputs",
    )
    arguments.add_argument(
        "--calibrate",
        metavar="SOURCE",
        help="text that int4 weights are rounded for (GPTQ), orders are solved on, and approximate cuts go by",
    )
    arguments.add_argument(
        "--order",
        choices=("trained", "identity", "random", "correlation", "quantization"),
        default="trained",
        help="of the channels, which changes no function; 'quantization' lowers the error of int4 groups (%(default)s)",
    )
    arguments.add_argument(
        "--max-perplexity-increase",
        metavar="SHARE",
        help="find the smallest precision and width whose perplexity rises by no more, like 2%%; cuts are approximate",
    )
    arguments.add_argument(
        "--tokens", type=int, default=16384, metavar="N", help="measure perplexity on so many tokens (%(default)s)"
    )
    arguments.add_argument(
        "--calibration-tokens", type=int, default=32768, metavar="N", help="calibrate on so many tokens (%(default)s)"
    )
    arguments.add_argument("--onnx", action="store_true", help="write an ONNX graph into the artifact, proven likewise")
    arguments.add_argument(
        "--onnx-flavour",
        choices=("ort", "portable"),
        help="ONNX Runtime's fused operators where they are faster (ort, the default), or standard ones only",
    )
    arguments.add_argument(
        "--onnx-precision", choices=("fp32", "fp16", "int8", "int4"), help="of the graph's weights (the artifact's own)"
    )
    arguments.add_argument(
        "--triton", metavar="REPO", help="write a model repository for Triton from the artifact, too"
    )
    arguments.add_argument(
        "--triton-initial-state",
        action="append",
        default=[],
        metavar="STATE",
        help="a file of `yunmin state build`, after which sequences of one more model there begin; repeatable",
    )
    arguments.add_argument(
        "--format",
        choices=("artifact", "hf", "mamba_ssm", "gguf"),
        default="artifact",
        help="write for other people's runtimes instead: a transformers or mamba_ssm folder, or a GGUF file",
    )
    arguments.add_argument(
        "--gguf-type", choices=("f32", "f16", "q8_0", "q4_0"), help="how a GGUF file stores matrices (q8_0)"
    )
    arguments.add_argument("--force", action="store_true", help="replace an artifact that is at OUT")
    arguments.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    options = arguments.parse_args(argv)

    from export.options import Options
    from export.search import parse_increase

    wanted = Options(
        data=options.data,
        quantize=options.quantize or "none",
        calibrate=options.calibrate,
        order=options.order,
        max_increase=(
            None if options.max_perplexity_increase is None else parse_increase(options.max_perplexity_increase)
        ),
        measured_tokens=options.tokens,
        calibration_tokens=options.calibration_tokens,
        onnx=options.onnx,
        onnx_flavour=options.onnx_flavour,
        onnx_precision=options.onnx_precision,
        triton=options.triton,
        triton_initial_states=tuple(options.triton_initial_state),
        format=options.format,
        gguf_type=options.gguf_type,
    )

    def progress(stage: str) -> None:
        print(f"{stage} ...", file=sys.stderr, flush=True)

    if wanted.format != "artifact":
        return _other_format(options, wanted, progress)
    return _artifact(options, wanted, progress)


def _artifact(options: argparse.Namespace, wanted: Options, progress: Callable[[str], None]) -> int:
    from export.card import parity_rows, perplexity_rows, perplexity_terms, plain_table, size_rows
    from export.curve_plot import CURVE_FILE, can_plot
    from export.pipeline import export
    from export.search import CURVE_HEADER, curve_rows

    manifest = export(
        options.source,
        options.out,
        adapters=options.adapter,
        options=wanted,
        force=options.force,
        progress=progress,
    )
    if options.json:
        repository = {} if wanted.triton is None else {"triton": wanted.triton}
        print_json({"artifact": options.out, **repository, **manifest.model_dump()})
        return 0
    search = manifest.provenance.get("search")
    if search is not None:
        print(plain_table(CURVE_HEADER, curve_rows(search["curve"], manifest.perplexity["before"].token_perplexity)))
        plotted = f"plotted in {CURVE_FILE}" if can_plot() else "not plotted: matplotlib is not installed"
        print(f"  (the smallest within {100 * search['max_perplexity_increase']:g} % was taken; {plotted})\n")
    print(f"{options.out}: written and verified on {manifest.provenance['verified_on']}\n")
    rows = size_rows(manifest.before, manifest.after) + perplexity_rows(manifest.perplexity)
    print(plain_table(("size", "before", "after", "ratio"), rows))
    if manifest.perplexity:
        print(f"  (perplexity {perplexity_terms(manifest.perplexity)})")
    print()
    header = ("logits compared", "error / largest", "limit", "positions")
    print(plain_table(header, parity_rows(manifest.parity)))
    if "onnx" in manifest.provenance:
        graph = manifest.provenance["onnx"]
        print(f"\n{options.out}/{graph['file']}: {graph['flavour']}, {graph['precision']}, {graph['bytes']:,} bytes")
        if graph["change"]:
            print(f"rounding takes its logits up to {graph['change']:.1e} of the largest from the artifact's weights'")
    if wanted.triton is not None:
        print(f"\n{wanted.triton}: model repository for Triton")
    print(f"\nnext:\n  yunmin inspect {options.out}\n  yunmin serve {options.out}")
    return 0


def _other_format(options: argparse.Namespace, wanted: Options, progress: Callable[[str], None]) -> int:
    from export.card import parity_rows, plain_table
    from export.other_format import export_format

    proof = export_format(
        options.source, options.out, adapters=options.adapter, options=wanted, force=options.force, progress=progress
    )
    if options.json:
        parity = {name: claim.model_dump() for name, claim in proof.parity.items()}
        print_json({"out": options.out, "format": wanted.format, "parity": parity})
        return 0
    print(f"{options.out}: written as {wanted.format}, read back and compared\n")
    header = ("logits compared", "error / largest", "limit", "positions")
    print(plain_table(header, parity_rows(proof.parity)))
    return 0
