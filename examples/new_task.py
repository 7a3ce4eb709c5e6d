"""A model for another task by two routes, from float and from 4 bits:   python examples/new_task.py"""

import quantailor as qt
from quantailor.demo import MODEL

numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
task = [" ".join(f"{a} and {b} make {b} and {a}." for b in numbers) for a in numbers * 3]
settings = qt.Settings(steps=6, evaluations=1)
model = qt.load(MODEL)
print(qt.retask(model, task, scheme="w4a16-g32", method="rtn", settings=settings, samples=8, context=64))
quantized = qt.quantize(model, "w4a16-g32", method="rtn")
print(qt.retask(quantized, task, method="rtn", settings=settings, samples=8, context=64))
