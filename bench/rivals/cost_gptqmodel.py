"""GPTQModel's GPTQ on one layer, its Hessian given: activation order, static groups, its range search."""

import copy

import torch
from cost_job import BITS, GROUP, HESSIAN, TOKENS, WEIGHT, serve
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

settings = {"desc_act": True, "static_groups": True, "act_group_aware": False, "sym": False, "mse": 2.4}
config = QuantizeConfig(bits=BITS, group_size=GROUP, **settings)
layer = torch.nn.Linear(WEIGHT.shape[1], WEIGHT.shape[0], bias=False)


def prepare() -> GPTQ:
    layer.weight.data.copy_(WEIGHT)
    solver = GPTQ(copy.deepcopy(layer), config)
    solver.quantizer.configure(perchannel=True)
    solver.H, solver.nsamples = 2 * HESSIAN / TOKENS, TOKENS
    solver.finalize_hessian = lambda target_device=None: solver.H
    return solver


def solve(solver: GPTQ) -> torch.Tensor:
    with torch.inference_mode():
        return solver.quantize()[0]


serve("gptqmodel", settings, prepare, solve)
