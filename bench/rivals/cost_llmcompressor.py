"""llm-compressor's GPTQ on one layer, its Hessian given: activation order with static groups, its MSE observer."""

import torch
from compressed_tensors.quantization import QuantizationArgs
from cost_job import BITS, GROUP, HESSIAN, TOKENS, WEIGHT, serve
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

settings = {"strategy": "group", "actorder": "static", "symmetric": False, "observer": "memoryless_mse"}
args = QuantizationArgs(num_bits=BITS, group_size=GROUP, **settings)


def prepare() -> None:
    return None


def solve(_: None) -> torch.Tensor:
    observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    found = observer(WEIGHT).get_qparams()
    scale, zero_point = found["scale"], found["zero_point"]
    with torch.no_grad():
        return quantize_weight(
            WEIGHT.clone()[None], (2 * HESSIAN / TOKENS)[None], scale[None], zero_point[None], None, args
        )[0][0]


serve("llmcompressor", settings, prepare, solve)
