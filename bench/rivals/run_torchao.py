"""torchao: weight-only integers, `rtn` (min-max) or `hqq` (its scale-only half-quadratic fit), without data."""

import torch
from job import Job, block_linears
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm, MappingType

job = Job.from_command_line()
model = job.load()
algorithm = {"rtn": IntxChooseQParamsAlgorithm.AFFINE, "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}[job.variant]
config = IntxWeightOnlyConfig(
    weight_dtype=getattr(torch, f"int{job.bits}"),
    granularity=PerGroup(job.group_size),
    mapping_type=MappingType.SYMMETRIC,
    intx_choose_qparams_algorithm=algorithm,
)
layers = block_linears(model)
fitting = {n for n, m in layers.items() if m.in_features % job.group_size == 0}
with job.timed():
    quantize_(model, config, filter_fn=lambda module, name: name in fitting)
job.finish(
    {name: layers[name].weight.dequantize() for name in fitting},
    settings={"config": repr(config)},
    packages=["torchao"],
    notes=[f"left float, the group size does not divide the inputs: {n}" for n in sorted(set(layers) - fitting)],
)
