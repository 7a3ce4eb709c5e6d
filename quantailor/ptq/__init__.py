"""Post-training quantization: `METHODS` by name, and the driver that walks a model's blocks."""

from typing import Any

from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.chain import Chain, parse_method
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.rtn import RTN

# What `method=` may name, alone or joined by "+". ptq/method.py says what a part is.
METHODS: dict[str, Any] = {"rtn": RTN(), "gptq": GPTQ(), "qronos": Qronos(), "autoround": AutoRound()}


def method(text: str) -> Chain:
    """The method or chain of methods that `text` names. Raises: UsageError."""
    return parse_method(text, METHODS)
