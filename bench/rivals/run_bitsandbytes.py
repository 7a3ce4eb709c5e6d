"""bitsandbytes: NF4 in blocks of 64 with float scales, its own rounding, without data."""

import bitsandbytes as bnb
from job import Job, block_linears

job = Job.from_command_line()
if job.bits != 4:
    raise SystemExit(f"bitsandbytes has no {job.bits}-bit weight-only grid; NF4 and FP4 have 4 bits")
model = job.load()
done = {}
with job.timed():
    for name, layer in block_linears(model).items():
        done[name] = bnb.functional.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
weights = {name: bnb.functional.dequantize_4bit(packed, state) for name, (packed, state) in done.items()}
job.finish(
    weights,
    settings={"quant_type": "nf4", "blocksize": 64, "double_quant": False},
    packages=["bitsandbytes"],
    notes=["NF4 levels and blocks of 64 over the flattened weight: another grid, with fewer scales"],
)
