"""Progress goes to stderr, lines stay, and nothing of it disturbs stdout."""

from quantailor.cli.console import ConsoleProgress, progress
from quantailor.progress import Progress


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
