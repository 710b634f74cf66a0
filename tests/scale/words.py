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
    """An amount of hours: 9.5 days, 12 h, 41 min, 8.2 s."""
    return seconds(amount * HOUR)


def seconds(amount: float) -> str:
    """An amount of seconds: 9.5 days, 12 h, 41 min, 8.2 s, 15 ms, 92 us."""
    for size, unit in ((24 * HOUR, "days"), (HOUR, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if amount >= size * (3 if unit == "days" else 1):
            return f"{number(amount / size, 2 if amount < 99.5 * size else 3)} {unit}"
    return f"{number(amount * 1e6, 2)} us"


def money(amount: float) -> str:
    return f"${number(amount, 2 if amount < 1000 else 3)}"


def percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.0095 or part == 0 else f"{100 * part:.1f} %"
