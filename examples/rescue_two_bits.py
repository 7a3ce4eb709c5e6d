"""Two bits ruin a model; a short QAT brings most of it back:   python examples/rescue_two_bits.py [STEPS]"""

import sys

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
train, valid = texts()
print("float", qt.eval(MODEL, valid))
ptq = qt.quantize(MODEL, "w2a16-g32", data=train, samples=32)
print("PTQ  ", qt.eval(ptq, valid))
settings = qt.Settings(steps=steps, evaluations=2)
qat = qt.train(MODEL, train, scheme="w2a16-g32", eval_data=valid, samples=32, settings=settings)
print("QAT  ", qt.eval(qat, valid))
print("best step", qat.training.best_step, "notes", qat.notes)
