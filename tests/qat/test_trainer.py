"""Memory that runs out: batches are split, and gradients stay what they were."""

import copy

import pytest
import torch

from quantailor.errors import QuantailorError, UsageError
from quantailor.qat import trainer as trainer_module
from quantailor.qat.settings import Settings
from quantailor.qat.train import train
from quantailor.qat.trainer import QATTrainer, is_out_of_memory


@pytest.fixture
def run(simulated_at, lm, train_data):
    def go(examples=train_data, **settings):
        model = copy.deepcopy(simulated_at("w4a16-g32").model)
        looks = iter(range(100, 0, -1))
        options = Settings(**{"steps": 4, "batch_size": 8, "evaluations": 1, "learning_rate": 1e-3, **settings})
        report = train(model, examples, lambda m: (float(next(looks)),), options, teacher=lm.model)
        return {n: p.detach() for n, p in model.named_parameters()}, report

    return go


@pytest.fixture
def memory_for(monkeypatch):
    """memory_for(rows, error, after=n): from the n-th forward pass on, more rows at once do not fit."""

    def limit(rows, error, after=0):
        real, calls = QATTrainer.compute_loss, [0]

        def loss(self, model, inputs, *more, **others):
            calls[0] += 1
            found = real(self, model, inputs, *more, **others)
            if calls[0] > after and len(inputs["labels"]) > rows:
                raise error
            return found

        monkeypatch.setattr(QATTrainer, "compute_loss", loss)

    return limit


OUT_OF_MEMORY = [
    MemoryError("no room"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("rows", "parts"), [(4, 2), (2, 4), (1, 8)])
def test_batches_are_split_until_they_fit_and_nothing_else_changes(run, memory_for, error, rows, parts):
    expected, _ = run()
    memory_for(rows, error)
    found, report = run()
    assert [n for n in report.notes if "memory" in n] == [
        f"memory ran out: batches of 8 rows were split into {parts} parts, whose gradients are summed; a step counts "
        "as many rows as before"
    ]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=3e-5)


def test_in_the_middle_of_an_accumulated_step(run, memory_for):
    """The micro-batches that had fitted are counted once."""
    expected, _ = run(accumulate=3)
    memory_for(4, MemoryError("no room"), after=4)
    found, report = run(accumulate=3)
    assert any("split into 2 parts" in note for note in report.notes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=3e-5)


def test_parts_count_by_their_scored_positions(lm, simulated_at, train_data, tmp_path):
    """Rows of different lengths: the gradient of the parts is that of the whole."""
    from tests.qat.test_train import made

    gradients = []
    ids = torch.randint(3, 200, (4, 12))
    labels = ids.clone()
    labels[0, 3:] = labels[1] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for parts in (1, 2, 4):
        model = copy.deepcopy(simulated_at("w4a16-g32").model)
        trainer = made(model, train_data, teacher=lm.model, folder=tmp_path)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps, trainer.parts = 1, parts
        trainer.training_step(model, batch)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, whole in gradients[0].items():
            torch.testing.assert_close(other[name], whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_where_a_single_row_does_not_fit_it_ends(run, memory_for):
    memory_for(0, MemoryError("no room"))
    with pytest.raises(QuantailorError, match="out of memory with micro-batches of 1 rows; use a shorter --context"):
        run()


def test_another_error_is_not_taken_for_it(run, memory_for):
    memory_for(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()
    assert not is_out_of_memory(RuntimeError("x")) and all(map(is_out_of_memory, OUT_OF_MEMORY))


def test_eight_bit_states_say_what_to_install(run, monkeypatch):
    monkeypatch.setattr(trainer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed; pip install bitsandbytes"):
        run(optimizer="adamw-8bit")


def test_rows_of_one_length_are_not_grouped_by_it(run):
    with pytest.raises(UsageError, match="group_by_length has no effect where all rows are of one length"):
        run(group_by_length=True)


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({}, 0.0),
        ({"task_weight": 1.0}, 0.0),
        ({"dropout": True}, 0.3),
        ({"kl_weight": 0.0, "task_weight": 1.0}, 0.3),
        ({"kl_weight": 0.0, "task_weight": 1.0, "dropout": False}, 0.0),
    ],
)
def test_a_taught_student_drops_no_units(classifier, rows, simulated_at, monkeypatch, settings, dropped):
    """Unless it is asked to; without a teacher the model's own dropout stays, and it is as it was afterwards."""
    model, seen = copy.deepcopy(simulated_at("w8a8", "classification").model), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    real = QATTrainer.training_step

    def watched(self, trained, *more, **others):
        seen.append({m.p for m in trained.modules() if isinstance(m, torch.nn.Dropout)})
        return real(self, trained, *more, **others)

    monkeypatch.setattr(QATTrainer, "training_step", watched)
    options = Settings(steps=2, batch_size=4, evaluations=1, **settings)
    train(model, rows, lambda m: (1.0,), options, teacher=classifier.model)
    assert seen == [{dropped}] * 2
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
