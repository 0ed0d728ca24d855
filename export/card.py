"""The model card, `README.md`, and the table that the command line prints; both from one set of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.search import CURVE_HEADER, curve_rows
from yunmin.artifact import Parity, PerplexityRecord
from yunmin.config import MambaConfig
from yunmin.cost import Cost
from yunmin.quantization.layout import Format

_STORED = {
    "int8": "Projections, embedding and head are stored in int8, with one scale per row.",
    "int4": "Projections are stored in int4, with one scale per 32 inputs; step sizes, embedding and head in int8.",
}
_QUANTITIES = {
    "parameters": "parameters",
    "weight_bytes": "weight bytes",
    "flops_per_token": "FLOPs per token",
    "state_bytes": "state bytes per sequence",
}
_CLAIMS = {
    "float32": "the artifact's weights against the trained model, fp32",
    "float64": "the same export computed in fp64",
    "stepwise": "its prefill and steps against its own whole sequences",
    "layers": "the runtime on the integers of one layer at a time against plain torch, the worst",
    "quantized": "the runtime on its integers against plain torch on them",
    "cut": "its weights against the model that was cut further, fp64",
    "onnx_embedding": "what the ONNX graph looks up for every id, against the embedding",
    "onnx": "the ONNX graph in onnxruntime against plain torch on its weights",
    "onnx_steps": "its single steps, in a batch, likewise",
    "onnx_int8_activations": "the ONNX graph with its activations rounded to int8 likewise",
}
_EXACT_PART = {  # where the artifact itself is not exact any more
    "float32": "the weights before they were changed further against the trained model, fp32",
    "float64": "the same computed in fp64",
}


def size_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, str, str, str]]:
    """Quantity, before, after and ratio, as text."""
    return [
        (label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.3f}")
        for key, label in _QUANTITIES.items()
    ]


def parity_rows(parity: Mapping[str, Parity]) -> list[tuple[str, str, str, str]]:
    """Claim, error relative to the largest logit, limit and positions compared, as text."""
    claims = _CLAIMS | _EXACT_PART if "quantized" in parity or "cut" in parity else _CLAIMS
    return [
        (claims[name], f"{p.relative_error:.1e}", f"{p.tolerance:.0e}", str(p.tokens)) for name, p in parity.items()
    ]


def perplexity_rows(perplexity: Mapping[str, PerplexityRecord]) -> list[tuple[str, str, str, str]]:
    """Perplexity before, after and ratio, as text; no row where it was not measured."""
    if not perplexity:
        return []
    before, after = (perplexity[key].token_perplexity for key in ("before", "after"))
    return [("perplexity", f"{before:,.3f}", f"{after:,.3f}", f"{after / before:.4f}")]


def perplexity_terms(perplexity: Mapping[str, PerplexityRecord]) -> str:
    """On what, and how, it was measured."""
    record = perplexity["after"]
    return f"per token on {record.tokens:,} tokens of {record.source}; window {record.window}, stride {record.stride}"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        f"  {line[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def model_card(
    name: str,
    *,
    config: MambaConfig,
    is_untied: bool,
    quantization: Format,
    before: Cost,
    after: Cost,
    parity: Mapping[str, Parity],
    perplexity: Mapping[str, PerplexityRecord],
    provenance: Mapping[str, Any],
    has_tokenizer: bool,
) -> str:
    """The card of an artifact, in Markdown with the front matter that the Hugging Face Hub reads."""
    rows = size_rows(before.to_dict(), after.to_dict()) + perplexity_rows(perplexity)
    sizes = _markdown_table(("", "before", "after", "ratio"), rows)
    terms = f"\n\nPerplexity {perplexity_terms(perplexity)}." if perplexity else ""
    is_for_transformers = config.is_uniform and quantization == "none"
    proof = _markdown_table(("", "error / largest logit", "limit", "positions"), parity_rows(parity))
    merged = ", ".join(f"{a['kind']} on {' and '.join(a['projections'])}" for a in provenance["adapters"]) or "none"
    prompt = "'Once upon a time'" if has_tokenizer else "1,2,3"
    option = "--prompt" if has_tokenizer else "--token-ids"
    widths = f"{_widths('inner channels', config.d_inner)} {_widths('states per channel', config.d_state)}"
    untied = (
        "\nAn adapter changed the embedding alone: the head, tied to it before, has its own weights."
        if is_untied
        else ""
    )
    terms += _search_section(provenance, perplexity) + _graph_section(provenance)
    notes = untied + ("" if quantization == "none" else f"\n{_STORED[quantization]}")
    return f"""---
library_name: {"transformers" if is_for_transformers else "yunmin"}
pipeline_tag: text-generation
tags: [mamba, yunmin]
---

# {name}

A Mamba-1 language model of {config.n_layers} layers and width {config.d_model}, exported by `yunmin` from
`{provenance["source"]}`. {widths}
Adapters merged into the weights: {merged}. The channels lie in scan order; nothing is reordered at run time.{notes}

## Sizes

{sizes}{terms}

## Proof

Before it was published, this artifact's logits were compared with those of the model as it was trained (gates, masks
and adapters applied in forward), on {provenance["verified_on"]}.

{proof}

## Use

```sh
yunmin inspect .
yunmin generate . {option} {prompt} --max-tokens 64
yunmin serve .
```

{_python_usage(config, quantization, has_tokenizer)}

## License

Not stated here: the license of the model that this one was derived from applies. Name it before you publish this
folder.
"""


def _search_section(provenance: Mapping[str, Any], perplexity: Mapping[str, PerplexityRecord]) -> str:
    """What was tried, where precision and width were searched for, and what was given up."""
    if "search" not in provenance:
        return ""
    search, cut = provenance["search"], provenance.get("approximate_cut")
    curve = _markdown_table(CURVE_HEADER, curve_rows(search["curve"], perplexity["before"].token_perplexity))
    share = search["max_perplexity_increase"]
    text = f"\n\nThis is the smallest of these whose perplexity rises by at most {100 * share:g} %:\n\n{curve}"
    if cut is not None:
        text += (
            f"\n\nThe cut to {cut['inner_width']} of {cut['of']} inner channels is approximate: it removed channels "
            f"that training had not closed, ranked by {cut['ranked_by']} on {cut['ranked_on']['source']}."
        )
        fitted = " and ".join(f"`{projection}`" for projection in cut["fitted"])
        text += fitted and f" To make up for them, {fitted} {'were' if len(cut['fitted']) > 1 else 'was'} fitted there."
    return text


def _graph_section(provenance: Mapping[str, Any]) -> str:
    """What ONNX graph lies beside the weights."""
    if "onnx" not in provenance:
        return ""
    graph = provenance["onnx"]
    domains = {
        "ort": "operators of ONNX Runtime (`com.microsoft`) among them",
        "portable": "standard operators only",
    }
    text = (
        f"\n\n## ONNX\n\n`{graph['file']}` reads any batch and any number of tokens, states "
        f"going in and out: weights in {graph['precision']}, {graph['bytes']:,} bytes, opset {graph['opset']}, "
        f"{domains[graph['flavour']]}."
    )
    if graph["change"]:
        text += (
            f" Rounding of weights or activations takes its logits up to {graph['change']:.1e} of the largest from "
            "those of the artifact's weights, where both were compared."
        )
    return text


def _widths(what: str, widths: tuple[int, ...]) -> str:
    if len(set(widths)) == 1:
        return f"Every layer has {widths[0]} {what}."
    return f"{what.capitalize()} by layer: {', '.join(map(str, widths))}."


def _python_usage(config: MambaConfig, quantization: Format, has_tokenizer: bool) -> str:
    if quantization != "none":
        return f"The weights are in {quantization}, which `transformers` does not know: load the folder with `yunmin`."
    if not config.is_uniform:
        return "The widths differ between layers, which `transformers` does not know: load the folder with `yunmin`."
    lines = ["All layers have the same widths, so `transformers` loads the folder as it is:", "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained(".")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained(".")'] if has_tokenizer else []
    return "\n".join([*lines, "```"])


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
