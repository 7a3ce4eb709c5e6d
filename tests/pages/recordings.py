"""A recording made by hand for the tests of pages: fourteen layers, three norms, and as many alarms as wanted."""

from quantailor.qat.recording import Alarm, End, Head, Look, Measure, Recording

LAYERS = tuple(f"model.layers.{b}.{n}_proj" for b in range(2) for n in ("q", "k", "v", "o", "gate", "up", "down"))
NORMS = ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.norm")


def recording(alarms: int = 2, why: str = "patience=3: 3 evaluations without gain", name: str = "") -> Recording:
    """A run of 100 steps, measured every 10; the error of the last layer rises, the first norm's gain falls. `name`
    stands before each layer's."""
    layers = tuple(name + layer for layer in LAYERS)
    head, lines = Head(100, 10, layers, NORMS), []
    for step in (0, 50, 100):
        shares = (0.1 + step / 1000, 0.4 - step / 1000, 0.4, 0.1)
        lines.append(Look(step, (2.5 - step / 100,), None, tuple(shares for _ in layers)))
    for step in (1, *range(10, 101, 10)):
        rising = [0.1 + 0.01 * i + (0.3 * step / 100 if i == 13 else 0) for i in range(14)]
        tables = {
            "error": rising,
            "clip": [0.0] * 14,
            "flips": [0.01 * (1 - step / 200)] * 14,
            "range": [5.0 + i * step for i in range(14)],
            "input_clip": [None] * 13 + [0.01],
        }
        lines.append(
            Measure(step, 1.5 - step / 100, 1.0, 1e-3, 64 * step, tables, {"gain": [1 - step / 120, 1.0, 0.5]})
        )
    kinds = ("error", "norm", "rate", "range", "gradient")
    for i in range(alarms):
        where = layers[-1] if kinds[i % 5] == "error" else NORMS[0] if kinds[i % 5] == "norm" else ""
        lines.append(
            Alarm(20 + i, kinds[i % 5], where, i, None if kinds[i % 5] == "gradient" else 0.3, 0.2, "went back")
        )
    lines.sort(key=lambda line: line.step)
    return Recording(head, [*lines, End(100, why)])
