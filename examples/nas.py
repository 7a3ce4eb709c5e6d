"""A smaller network for fewer bits, found in a supernet:   python examples/nas.py OUT [SUPERNET_STEPS]"""

import sys
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL, texts

out = Path(sys.argv[1] if len(sys.argv) > 1 else "nas")
train, valid = texts()
found = qt.nas(
    MODEL,
    train[:60],
    out=out,
    eval_data=valid[:20],
    max_bytes=900_000,
    space={"depth": (4, 3), "bits": (4, 3)},
    supernet_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 100,
    candidates=3,
    settings=qt.Settings(steps=4, batch_size=4, evaluations=1),
    samples=16,
    context=64,
)
print(found.text())
