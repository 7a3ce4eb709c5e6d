"""One model in three formats, each read again by its own library and held against the model: the same integers in all.

python examples/export_everywhere.py [FLOAT_MODEL_FOLDER]        (default: the package's built-in model)
"""

import sys
import tempfile
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
model = qt.quantize(folder, "w4a16-g32", method="rtn")
with tempfile.TemporaryDirectory() as work:
    for receipt in qt.export(model, Path(work) / "out", ["hf", "onnx", "gguf"]):
        if receipt.refused:
            print(f"{receipt.format}: refused, because {receipt.refused}")
            continue
        integers = "the same integers" if receipt.integers_equal else "OTHER INTEGERS"
        apart = f"logits {receipt.max_logit_difference:.1e} apart"
        print(f"{receipt.format}: {receipt.layers} layers, {integers}, {apart}")
        for note in receipt.notes:
            print("   ", note)
