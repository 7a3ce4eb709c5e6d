"""A small trained model, its quantized twin, and data for both."""

import pytest

from quantailor import api
from tests.formats.making import quantized, records, texts, trained


@pytest.fixture(scope="session")
def lm(tmp_path_factory, tiny_lm) -> api.Model:
    return api.load(trained(tiny_lm, tmp_path_factory.mktemp("trained") / "model"))


@pytest.fixture(scope="session")
def classifier(tiny_bert) -> api.Model:
    return api.load(tiny_bert)


@pytest.fixture(scope="session")
def train_data(lm):
    return api.examples_for(lm, texts(40, seed=21), context=32)


@pytest.fixture(scope="session")
def held_out(lm):
    return api.examples_for(lm, texts(8, seed=22), context=32)


@pytest.fixture(scope="session")
def rows(classifier):
    return api.examples_for(classifier, records(48, seed=23))


@pytest.fixture(scope="session")
def simulated_at(lm, classifier):
    """simulated_at(scheme, task) -> a calibrated model; copy it before training."""
    made = {}

    def make(scheme: str, task: str = "lm") -> api.Model:
        if (scheme, task) not in made:
            made[scheme, task] = quantized(lm if task == "lm" else classifier, scheme)
        return made[scheme, task]

    return make
