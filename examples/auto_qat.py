"""The best recipe within three budgets, found and trained:   python examples/auto_qat.py OUT [MINUTES]"""

import sys
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL, texts

out = Path(sys.argv[1] if len(sys.argv) > 1 else "auto-qat")
train, valid = texts()
space = qt.Space(bits=(4,), group=(32,), scales=("learned",), learning_rate=(1.0, 2.0), steps=(4,), frozen=(0.0,))
found = qt.search(
    MODEL,
    train[:40],
    out=out,
    eval_data=valid[:20],
    accuracy="80%",  # of the float model's perplexity
    latency_ms=0.035,  # of reading the weights once at 30 GB/s
    bandwidth=30.0,
    minutes=float(sys.argv[2]) if len(sys.argv) > 2 else 5.0,
    trials=2,
    space=space,
    samples=32,
    context=64,
)
print(found.text())
