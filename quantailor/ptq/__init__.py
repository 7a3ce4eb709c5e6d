"""Post-training quantization: `METHODS` by name, and the driver that walks a model's blocks."""

from typing import Any

from quantailor.ptq.adaround import AdaRound
from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.awq import AWQ
from quantailor.ptq.bias import BiasCorrection
from quantailor.ptq.blockap import BlockAP
from quantailor.ptq.chain import Chain, parse_method
from quantailor.ptq.clip import Clip
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.hqq import HQQ
from quantailor.ptq.magr import MagR
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.rotate import Rotate
from quantailor.ptq.rtn import RTN
from quantailor.ptq.smoothquant import SmoothQuant

# What `method=` may name, alone or joined by "+". ptq/method.py says what a part is.
METHODS: dict[str, Any] = {
    "rtn": RTN(),
    "gptq": GPTQ(),
    "qronos": Qronos(),
    "autoround": AutoRound(),
    "blockap": BlockAP(),
    "smoothquant": SmoothQuant(),
    "awq": AWQ(),
    "clip": Clip(),
    "rotate": Rotate(),
    "magr": MagR(),
    "hqq": HQQ(),
    "adaround": AdaRound(),
    "bias": BiasCorrection(),
}


def method(text: str) -> Chain:
    """The method or chain of methods that `text` names. Raises: UsageError."""
    return parse_method(text, METHODS)
