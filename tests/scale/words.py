"""Numbers as words of docs/scale.md: three digits at most, and a unit that a person would use."""

from __future__ import annotations

HOUR = 3600.0


def number(amount: float, digits: int = 3) -> str:
    """So many digits, without an exponent: 1,230,000, 45.6, 0.0123."""
    if amount == 0:
        return "0"
    rounded = float(f"{amount:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.{digits}g}"


def scaled(amount: float, unit: str) -> str:
    """Bytes and the like in powers of a thousand: 13.8 GB, 41 MB/s."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= power * 0.9995:
            return f"{number(amount / power)} {prefix}{unit}"
    return f"{number(amount)} {unit}"


def hours(amount: float) -> str:
    """9.5 days, 12 h, 41 min, 8.2 s."""
    if amount >= 72:
        return f"{number(amount / 24, 2 if amount < 2400 else 3)} days"
    if amount >= 1:
        return f"{number(amount, 2)} h"
    return f"{number(amount * 60, 2)} min" if amount >= 1 / 60 else f"{number(amount * HOUR, 2)} s"


def seconds(amount: float) -> str:
    """As `hours`, and down to milliseconds."""
    if amount >= 120:
        return hours(amount / HOUR)
    return f"{number(amount, 2)} s" if amount >= 1 else f"{number(amount * 1000, 2)} ms"


def money(amount: float) -> str:
    return f"${number(amount, 2 if amount < 1000 else 3)}"


def percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.0095 or part == 0 else f"{100 * part:.1f} %"
