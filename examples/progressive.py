"""Two bits by way of eight and four, each from the one before:   python examples/progressive.py [STEPS]"""

import sys

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
train, valid = (documents[:20] for documents in texts())
options = {"eval_data": valid[:2], "samples": 8, "context": 128}
settings = qt.Settings(steps=steps // 3, evaluations=1)
ladder = qt.train(MODEL, train, stages=[8, 4, 2], settings=settings, **options)
for stage in ladder.details["stages"]:
    print(stage["scheme"], "nats a token", stage["start"], "->", stage["best"])
direct = qt.train(MODEL, train, scheme="w2a16-g32", settings=qt.Settings(steps=steps, evaluations=1), **options)
print("8, 4, 2", qt.eval(ladder, valid[2:8]))
print("direct ", qt.eval(direct, valid[2:8]))
