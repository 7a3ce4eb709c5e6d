"""Numbers as people read them; the same in every language."""

from __future__ import annotations

import math

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def plain(value: float | None) -> str | None:
    """Four significant digits, thousands apart; None stays None.

    >>> plain(12.3456), plain(0.000123456), plain(1234567.0), plain(0.0), plain(100.0)
    ('12.35', '0.0001235', '1,234,567', '0', '100')
    """
    if value is None or not math.isfinite(value):
        return None
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -5:
        return f"{value:.2e}"
    if size >= 15:
        return f"{value:.3e}"
    text = f"{value:,.{max(0, 3 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and float(value).is_integer() else text


def fixed(value: float | None, digits: int = 3) -> str | None:
    """For a column: the same number of digits below each other, fewer for large numbers.

    >>> fixed(8.1234), fixed(4642.3), fixed(1e9), fixed(None)
    ('8.123', '4,642', '1.00e+09', None)
    """
    if value is None or not math.isfinite(value):
        return None
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.{digits if abs(value) < 1000 else 0}f}"


def change(share: float | None) -> str | None:
    """A relative change with its sign; a real minus.

    >>> change(0.0123), change(-0.5), change(0.0), change(30.5), change(1e-6)
    ('+1.23 %', '−50.0 %', '±0 %', '+3,050 %', '+0.00 %')
    """
    if share is None or not math.isfinite(share):
        return None
    percent = 100 * share
    if percent == 0:
        return "±0 %"
    digits = 2 if abs(percent) < 10 else 1 if abs(percent) < 100 else 0
    return f"{percent:+,.{digits}f} %".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str | None:
    """
    >>> percent(0.02), percent(0.9876, 1), percent(0.005, 1)
    ('2 %', '98.8 %', '0.5 %')
    """
    if share is None or not math.isfinite(share):
        return None
    return f"{100 * share:,.{digits}f} %".replace("-", "−")


def tolerance(share: float | None) -> str | None:
    """
    >>> tolerance(0.02), tolerance(0.005), tolerance(0.0125)
    ('2 %', '0.5 %', '1.25 %')
    """
    return None if share is None or not math.isfinite(share) else f"{100 * share:.4g} %"


def signed(value: float | None, digits: int = 3) -> str | None:
    """
    >>> signed(0.5), signed(-0.25), signed(None)
    ('+0.500', '−0.250', None)
    """
    text = fixed(value, digits)
    return None if text is None else (text.replace("-", "−") if text.startswith("-") else f"+{text}")


def size(count: float | None) -> str | None:
    """Bytes in decimal units.

    >>> size(0), size(999), size(1234), size(3_721_344), size(7.5e12)
    ('0 B', '999 B', '1.23 kB', '3.72 MB', '7.50 TB')
    """
    if count is None or not math.isfinite(count) or count < 0:
        return None
    power = 0 if count < 1000 else min(len(_UNITS) - 1, int(math.log10(count) // 3))
    number = count / 1000**power
    return (
        f"{number:.0f} B"
        if power == 0
        else f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {_UNITS[power]}"
    )


def times(ratio: float | None) -> str | None:
    """
    >>> times(6.13), times(0.5), times(12.34)
    ('6.1×', '0.50×', '12×')
    """
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return None
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 10 else 0}f}×"


def seconds(value: float | None) -> str | None:
    """
    >>> seconds(0.256), seconds(59.4), seconds(125), seconds(7260), seconds(200_000)
    ('0.26 s', '59.4 s', '2 min 5 s', '2 h 1 min', '2.3 d')
    """
    if value is None or not math.isfinite(value) or value < 0:
        return None
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min" if value < 172_800 else f"{value / 86_400:.1f} d"


def whole(value: float | None) -> str | None:
    """
    >>> whole(90624)
    '90,624'
    """
    return None if value is None or not math.isfinite(value) else f"{round(value):,}"
