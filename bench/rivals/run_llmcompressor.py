"""llm-compressor: `gptq` (static activation order), `awq` or `rtn`, and after a dash how the range is found.

`-mse` and `-imatrix` search it, the latter weighted by the energy of the inputs; without either it is min-max. Layers
that the group size does not divide are refused by it, and left float here.
"""

import torch
from compressed_tensors.quantization import fake_quantize
from job import Job, block_linears
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

job = Job.from_command_line()
model = job.load()
layers = block_linears(model)
ragged = [n for n, m in layers.items() if m.in_features % job.group_size]
method, _, observer = job.variant.partition("-")
grid = {
    "num_bits": job.bits,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": job.group_size,
    "observer": {"mse": "memoryless_mse", "imatrix": "imatrix_mse", "": "memoryless_minmax"}[observer],
}
common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}}, "ignore": ["lm_head", *ragged]}
if method == "gptq":
    recipe = [GPTQModifier(**common, actorder="static", dampening_frac=0.01)]
else:
    # A mapping onto layers that stay float would end in a division by zero.
    pairs = [m for m in AWQ_MAPPING_REGISTRY["LlamaForCausalLM"] if not (ragged and "down_proj" in str(m))]
    awq = [AWQModifier(mappings=pairs)] if method == "awq" else []
    recipe = [*awq, QuantizationModifier(**common)]
IntermediatesCache.pin_memory = lambda self, index: None  # AWQ calls it always, and without an accelerator it stops
before = {n: p.detach().clone() for n, p in model.named_parameters()}
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.rows()]
with job.timed():
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        dataset=DataLoader(rows, batch_size=16),
        recipe=recipe,
        num_calibration_samples=len(rows),
    )
quantized = {n: m for n, m in layers.items() if getattr(m, "quantization_scheme", None) is not None}
weights = {  # after GPTQ the weight is on its grid already, which this leaves as it is
    n: fake_quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights)
    for n, m in quantized.items()
}
also = {
    n: p
    for n, p in model.named_parameters()
    if n in before and n.removesuffix(".weight") not in quantized and not p.equal(before[n])
}
job.finish(
    weights,
    also=also,
    settings={"recipe": str(recipe)},
    packages=["llmcompressor", "compressed-tensors"],
    notes=[f"left float, the group size does not divide the inputs: {n}" for n in ragged],
)
