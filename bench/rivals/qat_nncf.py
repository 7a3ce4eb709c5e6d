"""NNCF's QAT with absorbable LoRA adapters on given rows: fake quantization around W + B A; dequantized weights out.

Its recipe is that of its own example: nearest rounding to start with, KL to the float model, adapters at a rate and the
scales at a tenth of it, AdamW; here with the batches, the schedule and the steps of bench/qat_quality.py. The last
iterate is handed back. NNCF has adapters at 4 and 8 bits alone: another width ends with its error.
"""

import argparse
import copy
import json
from importlib import metadata
from pathlib import Path

import nncf
import numpy as np
import torch
from job import block_linears, groups_of
from nncf.parameters import BackupMode, CompressionFormat, CompressWeightsMode
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import SymmetricLoraQuantizer
from qat_loop import steps
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

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
model.config.use_cache = False
teacher = copy.deepcopy(model).eval()
layers = block_linears(model)
rank = min(256, *(min(m.weight.shape) for m in layers.values()))  # NNCF's own rank, or the most that all layers take
batches = torch.from_numpy(np.load(options.rows).astype(np.int64)).split(options.batch_size)
mode = {2: CompressWeightsMode.INT2_SYM, 3: CompressWeightsMode.INT3_SYM, 4: CompressWeightsMode.INT4_SYM}[options.bits]
sizes = groups_of(model, options.group_size)
for size in sorted(set(sizes.values())):
    others = [f".*{name.replace('.', '[./:]')}[./:].*" for name in layers if sizes[name] != size]
    model = nncf.compress_weights(
        model,
        mode=mode,
        group_size=size,
        dataset=nncf.Dataset([{"input_ids": batches[0][:1, :8]}]),
        backup_mode=BackupMode.NONE,
        ignored_scope=nncf.IgnoredScope(patterns=others, validate=False),
        compression_format=CompressionFormat.FQ_LORA,
        advanced_parameters=AdvancedCompressionParameters(lora_adapter_rank=rank),
    )

model.requires_grad_(False)
quantizers, adapters, scales = {}, [], []
for name, module in get_hook_storage(model).named_hooks():
    if isinstance(module, SymmetricLoraQuantizer):
        quantizers[name] = module
        module.enable_gradients()
        own = module.get_adapters()
        adapters += own.values()
        scales += [value for key, value in module.get_trainable_params().items() if key not in own]
groups = [{"params": adapters}, {"params": scales, "lr": options.learning_rate / 10}]
optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.learning_rate)
steps(model, teacher, batches, optimizer, options.task_weight)

weights = {name: p.detach().float().contiguous().clone() for name, p in teacher.named_parameters()}
done = []
with torch.no_grad():
    for key, quantizer in quantizers.items():
        name = next(n for n in layers if key.replace(":", ".").find(f"{n}.weight") >= 0)
        weights[f"{name}.weight"] = quantizer.quantize(weights[f"{name}.weight"]).float().contiguous().clone()
        done.append(name)
save_file(weights, options.out)
versions = {name: metadata.version(name) for name in ("torch", "transformers", "nncf")}
told = {
    "learning_rate": options.learning_rate,
    "task_weight": options.task_weight,
    "rank": rank,
    "groups": sorted(set(sizes.values())),
}
print(json.dumps(told | {"left_float": sorted(set(layers) - set(done)), "versions": versions}))
