"""Turn a run or a checkpoint into a compact artifact that is proven to compute the same."""

from __future__ import annotations

import sys

from yunmin.cli import parser, print_json


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
        ],
    )
    arguments.add_argument("source", help="run folder, a checkpoint of it, any Mamba checkpoint, or a Hub id")
    arguments.add_argument("out", help="folder to write; appears whole or not at all")
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
        "--calibrate", metavar="SOURCE", help="text that int4 weights are rounded for (GPTQ), and orders are solved on"
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
    arguments.add_argument("--force", action="store_true", help="replace an artifact that is at OUT")
    arguments.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    options = arguments.parse_args(argv)

    from export.card import parity_rows, perplexity_rows, perplexity_terms, plain_table, size_rows
    from export.curve_plot import CURVE_FILE, can_plot
    from export.options import Options
    from export.pipeline import export
    from export.search import CURVE_HEADER, curve_rows, parse_increase

    manifest = export(
        options.source,
        options.out,
        adapters=options.adapter,
        options=Options(
            data=options.data,
            quantize=options.quantize or "none",
            calibrate=options.calibrate,
            order=options.order,
            max_increase=(
                None if options.max_perplexity_increase is None else parse_increase(options.max_perplexity_increase)
            ),
            measured_tokens=options.tokens,
            calibration_tokens=options.calibration_tokens,
        ),
        force=options.force,
        progress=lambda stage: print(f"{stage} ...", file=sys.stderr, flush=True),
    )
    if options.json:
        print_json({"artifact": options.out, **manifest.model_dump()})
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
    print(f"\nnext:\n  yunmin inspect {options.out}\n  yunmin serve {options.out}")
    return 0
