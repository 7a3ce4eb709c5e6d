"""Before and after: what a result is worth against float, and what each step on the way to it was worth."""

from __future__ import annotations

from quantailor.pages import numbers
from quantailor.pages.document import (
    Cell,
    Column,
    Intervals,
    Mark,
    Pareto,
    Point,
    State,
    Step,
    Table,
    Text,
    say,
)
from quantailor.pages.reading import Found

LOWER_IS_BETTER = {"perplexity": True, "accuracy": False}
_METRICS = tuple(LOWER_IS_BETTER)


def metric_name(metric: str) -> Text:
    return say(f"metric.{metric}") if metric in _METRICS else metric


def loss_text(loss: float | None) -> Text:
    """A loss relative to float in words: the metric's own direction is in it already."""
    if loss is None:
        return say("not_finite")
    if loss == 0:
        return say("loss.none")
    share = (numbers.change(abs(loss)) or "").removeprefix("+")
    return say("loss.worse" if loss > 0 else "loss.better", share=share)


def fit_comparison(data: Found, steps: list[Found]) -> Table | None:
    final_name = data.object("final").text("name")
    before = next((s for s in steps if s.text("name") == "float"), Found({}))
    after = next((s for s in steps if s.text("name") == final_name), Found({}))
    metric = data.text("metric")
    rows = [_quality_row(metric_name(metric), before, after, LOWER_IS_BETTER.get(metric))]
    first, last = before.object("result"), after.object("result")
    for key, form in (("nats_per_token", 4), ("mean_loss", 4)):
        a, b = first.number(key), last.number(key)
        if a is not None and b is not None:
            rows.append(_row(say(f"metric.{key}"), f"{a:.{form}f}", f"{b:.{form}f}", numbers.signed(b - a, form)))
    if (kl := last.number("kl")) is not None:
        shown = Cell(f"{kl:.5f}", detail=_between(last.pair("kl_interval"), 5))
        rows.append((Cell(say("metric.kl")), Cell("0"), shown, Cell(""), Cell("")))
    if (same := last.number("top1_agreement")) is not None:
        rows.append(_row(say("metric.top1"), "100 %", numbers.percent(same, 1) or "", ""))
    rows += _size_rows(data)
    spent = [s.number("seconds") for s in steps]
    total = sum(s for s in spent if s is not None)
    if total:
        rows.append(_row(say("row.time"), "", numbers.seconds(total) or "", ""))
    columns = (
        Column(""),
        Column(say("column.float"), numeric=True),
        Column(data.text("scheme"), numeric=True),
        Column(say("column.change"), numeric=True),
        Column(say("column.interval"), numeric=True),
    )
    return Table(columns, tuple(rows), sortable=False, note=say("not_measured"))


def _quality_row(name: Text, before: Found, after: Found, lower_is_better: bool | None) -> tuple[Cell, ...]:
    a, b, loss = before.number("value"), after.number("value"), after.number("loss")
    interval = after.pair("change_interval")
    state: State = "neutral"
    if interval and lower_is_better is not None:  # an interval without 0 is a change that this data can show
        worse = interval[0] > 0 if lower_is_better else interval[1] < 0
        better = interval[1] < 0 if lower_is_better else interval[0] > 0
        state = "fair" if worse else "good" if better else "neutral"
    return (
        Cell(name),
        Cell(numbers.fixed(a) or say("not_finite"), detail=_between(before.object("result").pair("interval"))),
        Cell(numbers.fixed(b) or say("not_finite"), detail=_between(after.object("result").pair("interval"))),
        Cell("" if loss is None else loss_text(loss), state=state),
        Cell("" if interval is None else f"{numbers.signed(interval[0])} … {numbers.signed(interval[1])}"),
    )


def _size_rows(data: Found) -> list[tuple[Cell, ...]]:
    rows = []
    for name, before, after, form in (
        ("row.size", "float_size_bytes", "size_bytes", numbers.size),
        ("row.bits", "float_bits_per_weight", "bits_per_weight", lambda bits: f"{bits:.2f}"),
    ):
        a, b = data.number(before), data.number(after)
        if a and b:
            state: State = "good" if b < a else "fair"
            rows.append(_row(say(name), form(a) or "", form(b) or "", numbers.change(b / a - 1), state))
    return rows


def _row(name: Text, before: str, after: str, change: str | None, state: State = "neutral") -> tuple[Cell, ...]:
    return Cell(name), Cell(before), Cell(after), Cell(change or "", state=state), Cell("")


def _between(interval: tuple[float, float] | None, digits: int = 3) -> str:
    return "" if interval is None else f"{numbers.fixed(interval[0], digits)} – {numbers.fixed(interval[1], digits)}"


def steps_chart(data: Found, steps: list[Found]) -> Intervals | None:
    final, tolerance = data.object("final").text("name"), data.number("tolerance")
    base = data.object("float").number("value")
    lower = LOWER_IS_BETTER.get(data.text("metric"))
    limit = None
    if base is not None and tolerance is not None and lower is not None:
        allowed = base + abs(base) * tolerance * (1 if lower else -1)
        limit = Mark(allowed, say("mark.tolerance", tolerance=numbers.tolerance(tolerance)), "good")
    rows = []
    for step in steps[:24]:
        value, interval, loss = step.number("value"), step.object("result").pair("interval"), step.number("loss")
        if value is None:
            continue
        low, high = interval or (None, None)
        meets = loss is not None and tolerance is not None and loss <= tolerance
        state: State = "neutral" if step.text("name") == "float" else "good" if meets else "fair"
        name = step.text("name")
        shown: Text = say("step.float") if name == "float" else say("step.saved", name=name) if name == final else name
        rows.append(Step(shown, value, low, high, state))
    if len(rows) < 2:
        return None
    values = [r.value for r in rows]
    log = min(values) > 0 and max(values) / min(values) > 8
    title = say("chart.steps", metric=metric_name(data.text("metric")))
    return Intervals(title, metric_name(data.text("metric")), tuple(rows), limit, log, say("chart.steps_note"))


def time_chart(data: Found, steps: list[Found]) -> Pareto | None:
    """Loss by the seconds spent so far; with fewer than three steps there is nothing to see."""
    final, tolerance = data.object("final").text("name"), data.number("tolerance")
    spent, points = 0.0, []
    for step in steps[:24]:
        seconds, loss = step.number("seconds"), step.number("loss")
        spent += max(0.0, seconds or 0.0)
        if step.text("name") != "float" and loss is not None and seconds is not None:
            points.append(Point(step.text("name"), spent, 100 * loss, step.text("name") == final))
    if len(points) < 3:
        return None
    limit = (
        None
        if tolerance is None
        else Mark(100 * tolerance, say("mark.tolerance", tolerance=numbers.tolerance(tolerance)), "good")
    )
    return Pareto(
        say("chart.time"),
        say("axis.seconds"),
        say("axis.loss"),
        tuple(points),
        limit=limit,
        note=say("chart.time_note"),
    )


def steps_table(data: Found, steps: list[Found]) -> Table | None:
    if not steps:
        return None
    columns = (
        Column(say("column.step"), name_like=True),
        Column(metric_name(data.text("metric")), numeric=True),
        Column(say("column.loss"), numeric=True),
        Column(say("column.interval"), numeric=True),
        Column(say("column.time"), numeric=True),
        Column(say("column.why"), wide=True),
    )
    rows = []
    for step in steps[:200]:
        value, loss, interval = step.number("value"), step.number("loss"), step.pair("change_interval")
        is_float = step.text("name") == "float"
        meets = loss is not None and loss <= (data.number("tolerance") or 0)
        state: State = "neutral" if is_float else "good" if meets else "fair"
        rows.append(
            (
                Cell(step.text("name")),
                Cell(numbers.fixed(value, 4) or say("not_finite"), value),
                Cell("" if is_float else numbers.change(loss) or say("not_finite"), loss, state),
                Cell("" if interval is None else f"{numbers.signed(interval[0])} … {numbers.signed(interval[1])}"),
                Cell(numbers.seconds(step.number("seconds")) or "", step.number("seconds")),
                Cell(step.text("reason")),
            )
        )
    return Table(columns, tuple(rows), note=_recovery(data))


def _recovery(data: Found) -> Text:
    share, control = data.number("recovery"), data.number("recovery_control")
    if share is None:
        return ""
    text = say("recovery", share=numbers.percent(share))
    return text if control is None else say("recovery.control", text=text, share=numbers.percent(control))


def saved_comparison(kept: Found, files: Found, inventory: list[Found]) -> Table | None:
    """Float bytes are reckoned at 4 a weight, and the table says so."""
    small, weights = weight_bytes(files), num_weights(inventory)
    if not small or not weights:
        return None
    large = 4 * weights
    rows = (
        _row(say("row.size"), numbers.size(large) or "", numbers.size(small) or "", numbers.change(small / large - 1)),
        _row(say("row.bits"), "32.00", f"{8 * small / weights:.2f}", numbers.change(small / large - 1)),
    )
    columns = (
        Column(""),
        Column(say("column.float32"), numeric=True),
        Column(kept.text("scheme"), numeric=True),
        Column(say("column.change"), numeric=True),
    )
    return Table(columns, tuple(row[:4] for row in rows), sortable=False, note=say("not_measured.quality"))


def weight_bytes(files: Found) -> float:
    sizes = [
        files.object(name).number("size_bytes") or 0
        for name in files.value
        if isinstance(name, str) and name.endswith(".safetensors") and not name.startswith("parity")
    ]
    return sum(sizes)


def num_weights(inventory: list[Found]) -> float:
    return sum(e.number("num_weights") or 0 for e in inventory if not e.text("tied_to"))
