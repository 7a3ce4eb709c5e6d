"""GPTQModel: GPTQ by falling activation with static groups, its range search, symmetric grid.

Variants: `gptq`, and `gptaq` (asymmetric calibration against the float model).
"""

import os

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from job import Job, block_linears

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its default is 1, and it stops for want of a second
job = Job.from_command_line()
settings = {
    "bits": job.bits,
    "group_size": job.group_size,
    "sym": True,
    "desc_act": True,
    "act_group_aware": False,
    "static_groups": True,
    "mse": 2.4,
    "offload_to_disk": False,
    "format": "gptq_v2",  # the older layout keeps zero points less by one, and these layers would dequantize so
}
ragged = [  # what it cannot pack
    n
    for n, m in block_linears(job.load()).items()
    if m.in_features % job.group_size or (job.bits == 3 and m.out_features % 32)
]
config = QuantizeConfig(
    **settings,
    dynamic={f"-:{name.replace('.', chr(92) + '.')}$": {} for name in ragged} or None,
    gptaq=GPTAQConfig() if job.variant == "gptaq" else None,
)
model = GPTQModel.load(str(job.model), config, dtype=torch.float32, device="cpu")
rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.rows()]
with job.timed():
    model.quantize(rows, batch_size=16, calibration_sort=None, backend=BACKEND.TORCH)
weights = {
    name: layer.dequantize_weight().T
    for name, layer in model.model.named_modules()
    if hasattr(layer, "dequantize_weight") and hasattr(layer, "qweight")
}
job.finish(
    weights,
    settings=settings,
    packages=["gptqmodel"],
    notes=[f"left float, its sizes cannot be packed: {n}" for n in ragged],
)
