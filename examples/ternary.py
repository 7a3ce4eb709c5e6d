"""BitNet b1.58 from a trained model, ternary weights coming in by and by:   python examples/ternary.py OUT [STEPS]"""

import sys
from pathlib import Path

import quantailor as qt
from quantailor.demo import MODEL, texts

out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
train, valid = (documents[:20] for documents in texts())
# absmean scales, 8-bit tokens, lambda = min(2 step / steps, 1)
settings = qt.Settings(steps=steps, gradient="bitnet", blend=0.5, evaluations=1)
model = qt.train(MODEL, train, scheme="w1.58a8", eval_data=valid[:2], settings=settings, context=128)
qt.save(model, out, overwrite=True)
print("start", model.training.start, "best", model.training.best)
print("packed", qt.eval(out, valid[2:8], reference=MODEL))
print("parity", qt.check(out).to_json())
print(qt.generate(out, "The following functions", max_new_tokens=20))
