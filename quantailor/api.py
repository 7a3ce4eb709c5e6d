"""The verbs. `import quantailor as qt` offers them; the shell's commands call them.

model = qt.quantize("path/to/model", "w4a16-g32", data="calib.txt")
model = qt.train(model, data="train.txt", steps=200)
qt.save(model, "out"); print(qt.check("out"))
"""

from quantailor.environment import environment
from quantailor.nn.lora import LoRA
from quantailor.points import Points
from quantailor.qat.settings import Settings
from quantailor.qat.stages import Stage
from quantailor.recipe import Keep, Recipe, Rule
from quantailor.searching.ladder import Goal
from quantailor.searching.space import Space
from quantailor.spec import Scheme
from quantailor.verbs.adapters import (
    add_adapter,
    load_adapter,
    load_base,
    lora_size,
    merge,
    save_adapter,
    save_base,
    set_adapter,
)
from quantailor.verbs.auto_qat import search
from quantailor.verbs.benching import Bench, bench
from quantailor.verbs.converting import convert
from quantailor.verbs.exporting import export
from quantailor.verbs.fitting import FitResult, fit
from quantailor.verbs.harness import evaluate_tasks
from quantailor.verbs.in_parts import QuantizedFolder, quantize_folder
from quantailor.verbs.inventory import InventoryReport, inventory
from quantailor.verbs.judging import adequacy, check, evaluate, generate
from quantailor.verbs.mixing import Mixed, mixed
from quantailor.verbs.model import Model, Result, as_model, examples_for, load, pack, probe_of, save
from quantailor.verbs.nas import FoundArchitecture, nas
from quantailor.verbs.planning import Plan, plan
from quantailor.verbs.probing import Probe, probe
from quantailor.verbs.quantizing import pack_module, quantize, quantize_module, recipe_for
from quantailor.verbs.reporting import report
from quantailor.verbs.retasking import Retasked, retask
from quantailor.verbs.searched import Searched
from quantailor.verbs.sensitivity import Sensitivity, sensitivity
from quantailor.verbs.training import train, train_folder

__all__ = [
    "Bench",
    "FitResult",
    "FoundArchitecture",
    "Goal",
    "InventoryReport",
    "Keep",
    "LoRA",
    "Mixed",
    "Model",
    "Plan",
    "Points",
    "Probe",
    "QuantizedFolder",
    "Recipe",
    "Result",
    "Retasked",
    "Rule",
    "Scheme",
    "Searched",
    "Sensitivity",
    "Settings",
    "Space",
    "Stage",
    "add_adapter",
    "adequacy",
    "as_model",
    "bench",
    "check",
    "convert",
    "environment",
    "evaluate",
    "evaluate_tasks",
    "examples_for",
    "export",
    "fit",
    "generate",
    "inventory",
    "load",
    "load_adapter",
    "load_base",
    "lora_size",
    "merge",
    "mixed",
    "nas",
    "pack",
    "pack_module",
    "plan",
    "probe",
    "probe_of",
    "quantize",
    "quantize_folder",
    "quantize_module",
    "recipe_for",
    "report",
    "retask",
    "save",
    "save_adapter",
    "save_base",
    "search",
    "sensitivity",
    "set_adapter",
    "train",
    "train_folder",
]
