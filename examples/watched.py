"""A recorded run that heeds alarms and ends when half of the loss is won back:   python examples/watched.py [STEPS]"""

import sys

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
train, valid = (documents[:30] for documents in texts())
looks = max(1, steps // 10)
settings = qt.Settings(steps=steps, evaluations=looks, record=True, on_alarm="act", stop=("patience=4", "minutes=10"))
options = {"samples": 16, "context": 64, "method": "rtn", "settings": settings, "until": "recovery>=0.5"}
model = qt.train(MODEL, train, scheme="w2a16-g32", eval_data=valid, **options)
recording = model.training.recording
for look in recording.looks:
    print(f"step {look.step}: {look.score[0]:.3f} nats a token")
errors = dict(zip(recording.head.layers, recording.measures[-1].layers["error"]))
print("worst layer", max(errors, key=errors.get), f"{max(errors.values()):.3f}")
print("alarms", recording.alarms)
print("ended by", model.training.stopped or "its last step")
qt.save(model, "watched-w2", overwrite=True)  # recording.jsonl is in it
print(qt.report("watched-w2", "watched.html", weights=False, overwrite=True))
