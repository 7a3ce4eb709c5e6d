"""From a float model to packed 4 bits, proved and read back:   python examples/quickstart.py OUT"""

import sys
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL, texts

out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-w4")
train, valid = texts()
model = qt.quantize(MODEL, "w4a16-g32", data=train, samples=32)
print(model.state.inventory)
print("float ", qt.eval(MODEL, valid))
print("packed", qt.eval(qt.pack(model), valid, reference=MODEL))
qt.save(model, out, overwrite=True)
print("parity", qt.check(out).to_json())
print(qt.generate(out, "The following functions", max_new_tokens=30))
