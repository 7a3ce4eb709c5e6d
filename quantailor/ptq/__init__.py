"""Post-training quantization: `METHODS` by name, and the driver that walks a model's blocks."""

from quantailor.ptq.autoround import AutoRound
from quantailor.ptq.gptq import GPTQ
from quantailor.ptq.method import Method
from quantailor.ptq.qronos import Qronos
from quantailor.ptq.rtn import RTN

METHODS: dict[str, Method] = {"rtn": RTN(), "gptq": GPTQ(), "qronos": Qronos(), "autoround": AutoRound()}
