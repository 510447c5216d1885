"""Stacked bars per day as inline SVG: no script, no canvas, sharp at any size, and readable in both themes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from django.utils.html import escape, format_html
from django.utils.safestring import SafeString, mark_safe

HEIGHT = 190
LEFT = 52
BOTTOM = 22
TOP = 10
COLOURS = 7
TICKS = 4
STEPS = tuple(map(Decimal, ("1", "1.2", "1.6", "2", "2.4", "3", "4", "5", "6", "8", "10")))


@dataclass(frozen=True, slots=True)
class Series:
    """One colour of the stack: a value per day, not negative."""

    name: str
    values: Sequence[Decimal]


def compute_ceiling(greatest: Decimal) -> Decimal:
    """Return the least round number, one of STEPS × 10^n, that is not below `greatest`.

    >>> [f"{compute_ceiling(Decimal(greatest)):f}" for greatest in ("37", "0.0213", "0")]
    ['40', '0.024', '1']
    """
    if greatest <= 0:
        return Decimal(1)
    unit = Decimal(1).scaleb(greatest.adjusted())
    return next(step * unit for step in STEPS if step * unit >= greatest)


def render_daily_bars(
    days: Sequence[date],
    series: Sequence[Series],
    *,
    format_value: Callable[[Decimal], str],
    format_tick: Callable[[Decimal], str],
    label: str,
    width: int,
) -> SafeString:
    """Return the chart of `series` over `days`, `width` pixels wide at its natural size.

    Each day has a tooltip that names every value, as `format_value` writes it; `label` says what the chart shows to
    those who cannot see it.
    """
    totals = [sum((one.values[i] for one in series), Decimal(0)) for i in range(len(days))]
    scale = _Scale(width, len(days), compute_ceiling(max(totals, default=Decimal(0))))
    parts = [_render_axis(scale, format_tick), _render_day_names(scale, days)]
    for i, day in enumerate(days):
        values = [(colour, one.name, one.values[i]) for colour, one in enumerate(series) if one.values[i] > 0]
        if values:
            parts.append(_render_day(scale, i, day, values, format_value))
    return format_html(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>', width, HEIGHT, label, mark_safe("".join(parts))
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where a day and a value are on the picture, in pixels."""

    width: int
    day_count: int
    ceiling: Decimal

    @property
    def step(self) -> Decimal:
        return Decimal(self.width - LEFT) / max(self.day_count, 1)

    def get_x(self, i: int) -> Decimal:
        return LEFT + self.step * i

    def get_y(self, value: Decimal) -> Decimal:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / self.ceiling)


def _render_axis(scale: _Scale, format_tick: Callable[[Decimal], str]) -> str:
    lines = []
    for tick in range(TICKS + 1):
        value = scale.ceiling * tick / TICKS
        y = scale.get_y(value)
        lines.append(
            f'<line class="tb-axis" x1="{LEFT}" x2="{scale.width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(format_tick(value))}</text>'
        )
    return "".join(lines)


def _render_day_names(scale: _Scale, days: Sequence[date]) -> str:
    """Name the Mondays, but for the outermost days, whose names would be cut."""
    named = [(i, day) for i, day in enumerate(days) if day.weekday() == 0 and 1 < i < len(days) - 2]
    return "".join(
        f'<text x="{scale.get_x(i) + scale.step / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{day:%b} {day.day}</text>"
        for i, day in named
    )


def _render_day(
    scale: _Scale, i: int, day: date, values: Sequence[tuple[int, str, Decimal]], format_value: Callable[[Decimal], str]
) -> str:
    gap = scale.step / 5
    bars = []
    lines = [f"{day:%a} {day.isoformat()}"]
    below = Decimal(0)
    for colour, name, value in values:
        top = scale.get_y(below + value)
        height = scale.get_y(below) - top
        bars.append(
            _render_box(scale.get_x(i) + gap / 2, top, scale.step - gap, height, f'class="tb-s{colour % COLOURS}"')
        )
        lines.append(f"{name}: {format_value(value)}")
        below += value
    # A transparent column over the whole height, so that short bars can be pointed at too.
    column = _render_box(scale.get_x(i), Decimal(TOP), scale.step, Decimal(HEIGHT - BOTTOM - TOP), 'fill="transparent"')
    title = escape("\n".join(lines))
    return f"<g>{''.join(bars)}{column}<title>{title}</title></g>"


def _render_box(x: Decimal, y: Decimal, width: Decimal, height: Decimal, attributes: str) -> str:
    return f'<rect {attributes} x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
