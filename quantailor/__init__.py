"""quantailor fits Transformers to fewer bits, and proves what it did.

    import quantailor as qt
    model = qt.quantize("path/to/model", "w4a16-g32", data="calib.txt")
    qt.save(model, "out")
    print(qt.check("out"))

Names are looked up on first use, so that importing this package costs nothing.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Goal",
    "Keep",
    "LoRA",
    "Model",
    "Points",
    "Recipe",
    "Rule",
    "Scheme",
    "Settings",
    "Space",
    "Stage",
    "add_adapter",
    "adequacy",
    "check",
    "convert",
    "eval",
    "evaluate_tasks",
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
    "quantize",
    "quantize_folder",
    "quantize_module",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantailor' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module

    api = import_module("quantailor.api")
    # `quantailor.evaluate` is the package that measures; the verb has the shell's name.
    return getattr(api, "evaluate" if name == "eval" else name)
