"""Progress goes to stderr, lines stay, and nothing of it disturbs stdout."""

import io

from rich.console import Console

from quantailor.cli.console import ConsoleProgress, progress, sparkline, table
from quantailor.progress import Progress, Row


def test_lines_are_printed_as_they_are(capsys):
    bars = progress(quiet=False)
    bars.say("[bold]not markup[/bold] model.layers.0 " + "x" * 300)

    out, err = capsys.readouterr()
    assert out == "" and err == "[bold]not markup[/bold] model.layers.0 " + "x" * 300 + "\n"


def test_quiet_is_silent(capsys):
    bars = progress(quiet=True)
    with bars.task("working", 3) as advance, bars.counted("counting") as report:
        advance(1)
        report(1, 2)
        bars.say("a line")

    assert capsys.readouterr() == ("", "") and type(bars) is Progress


def test_bars_may_lie_in_one_another(capsys):
    bars = ConsoleProgress()
    with bars.task("outer", 2) as advance:
        with bars.counted("inner") as report:
            report(1, 4)
        with bars.task("second", 1) as inner:
            inner(1)
        advance(1)
        assert bars.bars is not None
    assert bars.bars is None and capsys.readouterr() == ("", ""), "on a pipe only lines are printed"


def test_a_bar_is_gone_after_an_error():
    bars = ConsoleProgress()
    try:
        with bars.task("work", 1):
            raise ValueError
    except ValueError:
        pass
    assert bars.bars is None


def test_rows_stand_under_the_bars_of_a_terminal_and_go_with_them():
    bars = ConsoleProgress()
    bars.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with bars.task("training", 2) as advance:
        bars.rows([Row("training loss", (3.0, 2.0, 1.0), "1.0"), Row("alarm", (), "step 10: look", "bad")])
        advance(1)
    text = bars.console.file.getvalue()
    assert "training loss" in text and "█▅▁" in text and "step 10: look" in text
    Progress().rows([Row("a", (), "b")])  # silent


def test_a_narrow_terminal_cuts_the_text_and_not_the_picture():
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(
        table([Row("error of weights", tuple(range(100)), "0.1, at most 0.2 in model.layers.0.self_attn.q_proj")])
    )
    line = narrow.file.getvalue()
    assert sparkline(range(100)) in line and "0.1, at" in line
    assert line.count("\n") == 1 and len(line.rstrip("\n")) <= 60


def test_sparklines_average_what_does_not_fit():
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"
    assert sparkline([5.0]) == "▁"
