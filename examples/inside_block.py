"""What a cache of 4 bits, or quantized scores, cost a model, point by point:   python examples/inside_block.py [OUT]"""

import sys
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL, texts

out = Path(sys.argv[1] if len(sys.argv) > 1 else "inside-block")
train, valid = texts()
everything = {"scores": "a8", "kv": "a4", "norm": "a8", "silu": "a8-static", "residual": "a8", "output": "a8"}
print(qt.inventory(MODEL, "w8a16", points=everything))
print("float    ", qt.eval(MODEL, valid, limit=6))
for points in ({}, {"kv": "a4"}, everything):
    model = qt.quantize(MODEL, "w8a16", data=train, samples=8, method="rtn", points=points)
    print(qt.Points.of(points) or "no points", qt.eval(model, valid, limit=6))
qt.save(model, out, overwrite=True)
print("parity", qt.check(out).to_json())
