"""How numbers are written in the report."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float, digits: int = 1) -> str:
    """`12.3 %`."""
    return f"{100 * share:.{digits}f} %"


def change(share: float | None) -> str:
    """`+12.3 %`; more digits where there is little to see."""
    if share is None:
        return "–"
    if share == 0:
        return "0 %"
    digits = 1 if abs(share) >= 0.01 else 2 if abs(share) >= 1e-3 else 3
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def interval(ends: tuple[float, float] | None, form: str = "percent") -> str:
    """`[+10.1 %, +14.6 %]`, or plain numbers."""
    if ends is None:
        return "–"
    low, high = (change(end) if form == "percent" else number(end) for end in ends)
    return f"[{low}, {high}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number of any sign; without digits that mean nothing where it is large."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"
    return text.replace("-", "−")


def p_value(p: float | None) -> str:
    """`0.012`, `<0.0001` or a dash."""
    if p is None:
        return "–"
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Roughly: `40 s`, `5 min`, `3.5 h`, `2.1 days`."""
    for limit, unit, name in ((90, 1, "s"), (90 * 60, 60, "min")):
        if seconds < limit:
            return f"{max(1, round(seconds / unit))} {name}"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
