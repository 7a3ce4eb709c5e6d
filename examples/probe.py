"""Would QAT pay? A short run, and what it forecasts of the long one:   python examples/probe.py"""

import quantailor as qt
from quantailor.demo import MODEL, texts

train, valid = ([t[:2500] for t in part[:8]] for part in texts())
settings = qt.Settings(steps=100)
found = qt.probe(
    MODEL,
    train,
    scheme="w2a16-g32",
    eval_data=valid[:2],
    samples=40,
    epochs=2,
    settings=settings,
    method="rtn",
    context=64,
)
print(found)
print("worth it:", found.worthwhile, "- share of PTQ's loss taken back:", found.recovery(found.full.value))
