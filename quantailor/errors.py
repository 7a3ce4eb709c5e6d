"""Every way a command can fail on purpose, with the exit status a shell sees.

0 ok · 1 failure · 2 usage or configuration · 3 bad or untrusted model or data · 4 budget infeasible ·
5 quality gate failed · 130/143 interrupted, resumable.   One line each: the value, the rule, the way out.
"""


class QuantailorError(Exception):
    """A failure whose message is meant for the user. Raised bare: something that ran did not work (status 1)."""

    exit_code = 1


class UsageError(QuantailorError, ValueError):
    """An option, a scheme, a pattern or an output path is wrong (status 2)."""

    exit_code = 2


class UntrustedInput(QuantailorError, ValueError):
    """A model folder or a data file is missing, damaged, or asks for something it must not (status 3)."""

    exit_code = 3


class Infeasible(QuantailorError):
    """No way that was tried meets the tolerance within the budget (status 4)."""

    exit_code = 4


class QualityGateFailed(QuantailorError):
    """A result exists and was measured, but a check on it failed (status 5)."""

    exit_code = 5
