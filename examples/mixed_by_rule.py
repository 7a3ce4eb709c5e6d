"""Different bits for different layers, by rules:   python examples/mixed_by_rule.py"""

import quantailor as qt
from quantailor.demo import MODEL, texts

train, valid = texts()
rules = [
    qt.Rule(qt.Scheme.parse("w8a16"), pattern="*.down_proj"),  # the most sensitive kind of layer
    qt.Rule(qt.Keep("first block stays float"), pattern="model.layers.0.*"),
]
for name, chosen in (("3 bits everywhere", []), ("with rules", rules)):
    model = qt.quantize(MODEL, "w3a16-g32", data=train, samples=32, rules=chosen)
    print(f"{name}: {qt.eval(model, valid)}")
print(model.state.inventory)
