"""HQQ: half-quadratic fit of a float zero point, without data. Its grid is asymmetric; groups run along the input."""

import hqq.core.quantize as hqq
import torch
from job import Job, block_linears

job = Job.from_command_line()
model = job.load()
settings = {"nbits": job.bits, "group_size": job.group_size, "axis": 1, "optimize": True, "sym": False}
config = hqq.BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
layers = block_linears(model)
done, notes = {}, ["asymmetric grid with a float zero point a group: more storage than the symmetric grids"]
with job.timed():
    for name, layer in layers.items():
        done[name] = hqq.HQQLinear(layer, config, del_orig=False, compute_dtype=torch.float32, device="cpu")
if any(layer.in_features % job.group_size for layer in layers.values()):
    notes.append("where the group size does not divide the inputs, its groups run on over the ends of rows")
weights = {name: layer.dequantize() for name, layer in done.items()}
job.finish(weights, settings=settings, packages=["hqq"], notes=notes)
