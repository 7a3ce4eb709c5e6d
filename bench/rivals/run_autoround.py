"""AutoRound with its default recipe: 200 steps of sign descent a block, batches of 8; symmetric grid.

`ext` is its second version (SignRoundV2, `enable_alg_ext`).
"""

from auto_round import AutoRound
from job import Job, block_linears
from transformers import AutoTokenizer

job = Job.from_command_line()
model = job.load()
names = set(block_linears(model))
rows = job.rows()
settings = {
    "iters": 200,
    "bits": job.bits,
    "group_size": job.group_size,
    "sym": True,
    "batch_size": 8,
    "nsamples": len(rows),
    "seqlen": rows.shape[1],
    "seed": 42,
    "amp": False,  # on a CPU it would work in bfloat16, and leave every weight of the model rounded to that
    "enable_torch_compile": False,  # compiling takes longer than a model of this size
    "enable_alg_ext": job.variant == "ext",
}
rounder = AutoRound(
    model,
    AutoTokenizer.from_pretrained(job.model),
    dataset=job.batches(settings["batch_size"]),
    device_map="cpu",
    low_cpu_mem_usage=False,
    **settings,
)
with job.timed():
    quantized, config = rounder.quantize()
layers = block_linears(quantized)
weights = {name: layers[name].weight for name in layers if config.get(name, {}).get("bits", 16) < 16}
job.finish(
    weights,
    settings=settings,
    packages=["auto-round"],
    notes=[f"left float, its sizes are not multiples of 32: {n}" for n in sorted(names - set(weights))],
)
