"""The result of `yunmin bench serve` as tables and a plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.compare_tables import Listing, Table, number

# (part, streams) -> what the project wants at least
_HTTP_TARGETS = {"1": 0.90, "16": 0.85}
_STALL_TARGET = 3.0
_SESSIONS_TARGET_S = 60.0
_RESTORE_TARGET = 50.0
_GROWTH_TARGET = 0.05

Result = dict[str, Any]


def serve_tables(result: Result) -> list[Table | Listing]:
    """Every table that has something to show."""
    parts, name = result["parts"], result["model"]["name"]
    found: list[Table | Listing] = []
    if throughput := parts.get("throughput"):
        found.append(_throughput(throughput, name, result["settings"]["new_tokens"]))
    rows = [row for part, rows_of in _ROWS.items() if part in parts for row in rows_of(parts[part])]
    found.append(Table(f"States, prompts and load, {name}", ("", "measured", "target"), tuple(rows)))
    if peers := parts.get("peers"):
        found.append(_peers(peers, name))
        found.append(Listing("Not measured", tuple(peers["absent"].items())))
    if soak := parts.get("soak"):
        found.append(Listing("Mixed load, against expectation", tuple(_failures(soak))))
    found.append(Listing("Failed", tuple(result["failed"].items())))
    found.append(Listing("This machine", (("", _machine(result)),)))
    return [part for part in found if not part.is_empty]


def _throughput(part: Result, name: str, new_tokens: int) -> Table:
    rows = tuple(
        (
            count,
            number(found["engine_tokens_per_s"]),
            number(found["http_tokens_per_s"]),
            f"{found['ratio']:.3f}",
            f">= {_HTTP_TARGETS[count]:.2f}" if count in _HTTP_TARGETS else "–",
            f"{1e3 * found['first_token_s']:.1f}",
            f"{found['client_cpu_share']:.1%}",
        )
        for count, found in part.items()
    )
    columns = ("streams", "engine tokens/s", "HTTP tokens/s", "HTTP / engine", "target", "first token ms", "client CPU")
    note = f"{new_tokens} tokens each; client CPU: of one core, which the client takes from the server"
    return Table(f"Tokens per second over HTTP and of the engine alone, {name}", columns, rows, (note,))


def _stall_rows(part: Result) -> Iterable[tuple[str, str, str]]:
    streams, tokens = part["streams"], part["prompt_tokens"]
    yield f"gap between tokens of {streams} streams, median", _ms(part["median_before_s"]), ""
    yield f"the same, p99, while {tokens:,} tokens are read", _ms(part["p99_during_s"]), ""
    yield "  ratio", number(part["ratio"]), f"< {_STALL_TARGET:g}"
    yield f"reading {tokens:,} tokens beside them", f"{part['read_s']:.2f} s", ""


def _prefix_rows(part: Result) -> Iterable[tuple[str, str, str]]:
    tokens = part["prefix_tokens"]
    yield f"first token after a prefix of {tokens:,} tokens, cold", _ms(part["cold_s"]), ""
    yield "  another prompt with it, the second", _ms(part["second_s"]), ""
    yield "  every later one", _ms(part["hit_s"]), ""
    yield "  cold / later, of which tokens reused", f"{part['ratio']:.1f}, {part['cached_tokens']:,.0f}", ""


def _session_rows(part: Result) -> Iterable[tuple[str, str, str]]:
    target = f"<= {_SESSIONS_TARGET_S:g} s" if part["sessions"] == 1000 else ""
    yield f"{part['sessions']:,} sessions created and used once", f"{part['seconds']:.1f} s", target
    yield "  on disk", f"{part['stored_bytes'] / 1e6:,.0f} MB", ""
    tokens = part["session_tokens"]
    yield f"first token of a session of {tokens:,} tokens, restarted", _ms(part["restored_s"]), ""
    yield "  of a prompt as long", _ms(part["recomputed_s"]), ""
    yield "  ratio", f"{part['ratio']:.0f}", f">= {_RESTORE_TARGET:g}"


def _soak_rows(part: Result) -> Iterable[tuple[str, str, str]]:
    count = sum(part["counts"].values())
    yield f"mixed load of {part['minutes']:g} minutes, conversations", f"{count:,}", ""
    yield "  errors that were not intended", f"{len(part['failures'])}", "0"
    if part["memory_growth"] is not None:
        yield "  memory after warm-up", f"{part['memory_warm_bytes'] / 1e6:,.0f} MB", ""
        yield "  memory at the end, growth", f"{part['memory_growth']:+.1%}", f"<= {_GROWTH_TARGET:.0%}"


_ROWS = {"stall": _stall_rows, "prefix": _prefix_rows, "sessions": _session_rows, "soak": _soak_rows}


def _peers(part: Result, name: str) -> Table:
    servers = part["servers"]
    counts = list(dict.fromkeys(count for found in servers.values() for count in found))
    ours = servers.get("ours", {})
    rows = []
    for server, found in servers.items():
        for count in counts:
            if count not in found:
                continue
            sample, own = found[count], ours.get(count)
            is_ours = server == "ours" or own is None
            rows.append(
                (
                    server,
                    count,
                    number(sample["tokens_per_s"]),
                    "" if is_ours else f"{own['tokens_per_s'] / sample['tokens_per_s']:.2f}",
                    f"{1e3 * sample['first_token_s']:,.0f}",
                    "" if is_ours else f"{sample['first_token_s'] / own['first_token_s']:.2f}",
                )
            )
    columns = ("server", "streams", "tokens/s", "ours / theirs", "mean first token ms", "theirs / ours")
    notes = (
        f"text prompts, {part['new_tokens']} tokens each, one client; llama.cpp reads the same weights as GGUF",
        "llama-cpp-python answers one request after the other, by its design",
    )
    return Table(f"Against llama.cpp's servers, {name}", columns, tuple(rows), notes)


def _failures(soak: Result) -> Iterable[tuple[str, str]]:
    if not soak["alive"]:
        yield "the server", "its process has ended"
    for text in soak["failures"]:
        kind, _, reason = text.partition(": ")
        yield kind, reason


def _machine(result: Result) -> str:
    machine = result["machine"]
    load = f"load {machine['load_average_1min']:g} before and {result['load_average_after']:g} after"
    threads = result["settings"]["threads"]
    return f"{machine['cpu']}, {machine['cores_usable']} cores, {threads} threads, {load}; {result['time']}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def plot_serve(result: Result, path: Path) -> None:
    """What was measured, a panel per part that has one, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [(name, draw) for name, draw in _PANELS.items() if name in result["parts"]]
    figure, grid = pyplot.subplots(1, max(1, len(panels)), figsize=(4.5 * max(1, len(panels)), 4), squeeze=False)
    for axes, (name, draw) in zip(grid[0], panels, strict=False):
        draw(axes, result["parts"][name])
    figure.suptitle(f"{result['model']['name']}, {_machine(result)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_throughput(axes: Any, part: Result) -> None:
    for offset, (key, label) in enumerate((("engine_tokens_per_s", "engine alone"), ("http_tokens_per_s", "HTTP"))):
        axes.bar([i + 0.4 * offset for i in range(len(part))], [p[key] for p in part.values()], 0.4, label=label)
    axes.set_xticks([i + 0.2 for i in range(len(part))], list(part))
    axes.set(title="Throughput", xlabel="streams", ylabel="tokens per second")
    axes.legend(fontsize="small")


def _plot_stall(axes: Any, part: Result) -> None:
    for key, label in (("before_s", "before"), ("during_s", "while it is read")):
        gaps = sorted(1e3 * gap for gap in part[key])
        axes.plot(gaps, [(rank + 1) / len(gaps) for rank in range(len(gaps))], label=label)
    axes.set(title=f"{part['prompt_tokens']:,} tokens beside {part['streams']} streams", ylim=(0, 1))
    axes.set(xlabel="milliseconds between tokens", ylabel="share of gaps")
    axes.legend(fontsize="small")


def _plot_peers(axes: Any, part: Result) -> None:
    counts = list(dict.fromkeys(count for found in part["servers"].values() for count in found))
    width = 0.8 / max(1, len(counts))
    for offset, count in enumerate(counts):
        heights = [found.get(count, {}).get("tokens_per_s", 0.0) for found in part["servers"].values()]
        axes.bar([i + width * offset for i in range(len(heights))], heights, width, label=f"{count} streams")
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(part["servers"]))], list(part["servers"]), fontsize="small")
    axes.set(title="Servers", ylabel="tokens per second")
    axes.legend(fontsize="small")


def _plot_soak(axes: Any, part: Result) -> None:
    axes.plot([moment / 60 for moment, _ in part["memory"]], [size / 1e6 for _, size in part["memory"]])
    axes.set(title="Mixed load", xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))


_PANELS = {"throughput": _plot_throughput, "stall": _plot_stall, "peers": _plot_peers, "soak": _plot_soak}
