"""Weights by PTQ, the rest by training: ranges alone, chosen layers alone, one epoch:   python examples/hybrid.py"""

import quantailor as qt
from quantailor.demo import MODEL, texts

model = qt.load(MODEL)
train, valid = ([t[:3000] for t in part[:6]] for part in texts())
print("float", qt.eval(model, valid, context=64, limit=16))
ptq = qt.quantize(model, "w4a4-static", data=train, samples=8, context=64, method="rtn")
print("PTQ  ", qt.eval(ptq, valid, context=64, limit=16))
ways = {
    "activation ranges trained": qt.Settings(steps=5, trains="ranges", scale_learning_rate=0.03, evaluations=1),
    "one kind of layer trained": qt.Settings(steps=5, train_only=("*.down_proj",), evaluations=1),
    "everything, for one epoch": qt.Settings(epochs=1, evaluations=1),
}
for name, settings in ways.items():
    trained = qt.train(ptq, train, eval_data=valid[:2], teacher=model, settings=settings, context=64)
    print(f"{name}: {trained.training.steps} steps, {qt.eval(trained, valid, context=64, limit=16)}")
