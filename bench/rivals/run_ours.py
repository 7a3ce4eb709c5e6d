"""quantailor: the PTQ method that `--variant` names. It also measures the result, rewritten layers and all.

Run in quantailor's own environment; the other adapters never import it.
"""

import torch
from job import Job, block_linears
from judging import Judge

import quantailor as qt
from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import modules_of
from quantailor.recipe import Keep, Rule

job = Job.from_command_line()
model = job.load()
rules = []
if job.only is not None:
    kept = [n for n in block_linears(model) if n not in job.only]
    rules = [Rule(Keep("a rival leaves it float"), pattern=name) for name in kept]
scheme = f"w{job.bits}a16-g{job.group_size}"
with job.timed():
    quantized = qt.quantize_module(model, scheme, job.batches(4), method=job.variant, rules=rules)
with torch.no_grad():
    weights = {name: module.fake_weight() for name, module in modules_of(quantized, FAKE_QUANT)}
state = quantized.quantailor_state
job.finish(
    weights,
    settings={"scheme": scheme, "method": job.variant, "batch_size": 4},
    packages=["quantailor"],
    notes=state.notes,
    layers=state.layers,
    judged=Judge(job.model.name)(quantized),
)
