"""torchao's QAT on given rows: fake-quantized weights in groups, AdamW, cosine; dequantized weights out.

The loss, the batches, the schedule and the steps are those of bench/qat_quality.py; the gradient and the scales are
torchao's (straight-through, min-max at each step). Groups must divide the inputs: where they do not, a layer gets
the next wider ones that do. The last iterate is handed back.
"""

import argparse
import copy
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from job import groups_of
from qat_loop import steps
from safetensors.torch import save_file
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoModelForCausalLM

sys.path.insert(1, str(Path(__file__).parents[1]))
from attention import use

parser = argparse.ArgumentParser()
for name in ("model", "rows", "out"):
    parser.add_argument(f"--{name}", type=Path, required=True)
parser.add_argument("--bits", type=int, required=True)
parser.add_argument("--group-size", type=int, default=32)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--task-weight", type=float, default=0.0)
parser.add_argument("--learning-rate", type=float, required=True)
options = parser.parse_args()

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
attention = use(model)
teacher = copy.deepcopy(model).eval()
sizes = groups_of(model, options.group_size)
for size in sorted(set(sizes.values())):
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{options.bits}"), group_size=size, is_symmetric=True)
    prepare = QATConfig(weight_config=config, step="prepare")
    quantize_(model, prepare, filter_fn=lambda module, name, size=size: sizes.get(name) == size)
batches = torch.from_numpy(np.load(options.rows).astype(np.int64)).split(options.batch_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
steps(model, teacher, batches, optimizer, options.task_weight, 1.0)

weights = {}
for name, module in model.named_modules():
    quantizer = getattr(module, "weight_fake_quantizer", None)
    if quantizer is not None:
        weights[f"{name}.weight"] = quantizer(module.weight).detach().float().contiguous().clone()
for name, parameter in model.named_parameters():
    weights.setdefault(name, parameter.detach().float().contiguous().clone())
save_file(weights, options.out)
versions = {name: metadata.version(name) for name in ("torch", "transformers", "torchao")}
told = {"learning_rate": options.learning_rate, "task_weight": options.task_weight, "attention": attention}
print(json.dumps(told | {"groups": sorted(set(sizes.values())), "left_float": [], "versions": versions}))
