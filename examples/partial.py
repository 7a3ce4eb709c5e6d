"""Quantize by size, train the upper half: what is kept, and why, is in the inventory:   python examples/partial.py"""

import quantailor as qt
from quantailor.demo import MODEL, texts

float_model = qt.load(MODEL)
train, valid = ([t[:3000] for t in part[:6]] for part in texts())
small = qt.Rule(qt.Keep("fewer than 20,000 weights: little to win"), fewer_than=20_000)
model = qt.quantize(float_model, "w2a16-g32", data=train, samples=8, context=64, rules=[small])
print(model.state.inventory)
print("partly quantized  ", qt.eval(model, valid, context=64, limit=16))
settings = qt.Settings(steps=8, evaluations=1, freeze_lower=0.5)
trained = qt.train(model, train, eval_data=valid[:2], teacher=float_model, settings=settings, context=64)
print("upper half trained", qt.eval(trained, valid, context=64, limit=16))
print(f"{trained.training.trainable:,} of {sum(p.numel() for p in trained.model.parameters()):,} numbers trained")
