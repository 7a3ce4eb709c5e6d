"""Brevitas: `gptq`, `gpfq`, `qronos` or `magr+qronos`, by falling activation, symmetric grid with searched ranges.

The layers are taken by whole passes of the model: its faster walk over blocks sends everything to `cuda`.
"""

import torch
from brevitas.graph.quantize import layerwise_quantize
from brevitas_examples.common.generative.quantize import generate_quant_maps, generate_quantizers
from brevitas_examples.llm.llm_quant.gpxq import apply_gpfq, apply_gptq, apply_magr, apply_qronos
from job import Job, block_linears

job = Job.from_command_line()
model = job.load()
model.config.use_cache = False
names = set(block_linears(model))
batches = job.batches(16)
settings = {
    "weight_bit_width": job.bits,
    "weight_param_method": "mse",
    "weight_scale_precision": "float_scale",
    "weight_quant_type": "sym",
    "weight_quant_granularity": "per_group",
    "weight_group_size": job.group_size,
    "quantize_weight_zero_point": False,
}
solve = {"gptq": apply_gptq, "gpfq": apply_gpfq, "qronos": apply_qronos}[job.variant.removeprefix("magr+")]
magr_alpha = 0.01
with job.timed(), torch.no_grad():
    if job.variant.startswith("magr+"):
        apply_magr(model, batches, create_weight_orig=True, alpha=magr_alpha)
    quantizers = generate_quantizers(**settings, input_scale_precision="float_scale")
    maps = generate_quant_maps(**quantizers, dtype=torch.float32, device="cpu", quantize_embedding=False)
    kept = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in names]
    model = layerwise_quantize(model=model, compute_layer_map=maps, name_blacklist=kept).eval()
    model(**batches[0])  # sets the scales
    solve(model, batches, act_order=True)
modules = dict(model.named_modules())
weights = {name: modules[name].quant_weight().value for name in names}
job.finish(
    weights,
    settings=settings | {"act_order": True} | ({"magr_alpha": magr_alpha} if "magr" in job.variant else {}),
    packages=["brevitas"],
)
