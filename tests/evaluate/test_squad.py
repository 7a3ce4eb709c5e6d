"""SQuAD's metrics against values worked out by hand from their description, and against a slow second reading of it."""

import random
import re
import string

import pytest

from quantailor.evaluate import squad

HAND = [  # prediction, answers, exact, precision and recall of the best answer (words in common / words)
    ("the Panthers", ["Panthers"], 1.0, (1, 1)),
    ("Denver, Colorado!", ["denver colorado"], 1.0, (2 / 2, 2 / 2)),
    ("in the year 1984", ["1984", "year 1984"], 0.0, (2 / 3, 2 / 2)),
    ("cat cat dog", ["cat dog dog dog"], 0.0, (2 / 3, 2 / 4)),  # each word as often as both have it: 1 cat, 1 dog
    ("six", ["7"], 0.0, None),
    ("", ["something"], 0.0, None),
    ("the", ["a"], 1.0, None),  # both are nothing after normalization: equal, with no word in common
    ("another thing", ["another an thing"], 1.0, (1, 1)),  # "an" goes as a word, not out of "another"
    ("the.end", ["end"], 0.0, None),  # punctuation goes first: "theend" is one word
    ("half-time", ["half time"], 0.0, None),
    ("卡罗来纳黑豹队", ["卡罗来纳黑豹队"], 1.0, (1, 1)),
    ("308分", ["308 分"], 0.0, None),
    ("“308”", ["308"], 0.0, None),  # only ASCII punctuation goes
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "words"), HAND)
def test_values_worked_out_by_hand(prediction, answers, exact, words):
    assert squad.exact_match(prediction, answers) == exact
    expected = 0.0 if words is None else 2 * words[0] * words[1] / (words[0] + words[1])
    assert squad.f1(prediction, answers) == pytest.approx(expected, abs=1e-12)


def by_description(prediction, answer):
    """(exact, F1): lower, punctuation, articles, whitespace; words crossed out one by one."""

    def words(text):
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [w for w in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if w]

    ours, theirs = words(prediction), words(answer)
    left, common = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return float(ours == theirs), 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return float(ours == theirs), 2 * precision * recall / (precision + recall)


def test_random_texts_agree_with_the_description():
    draw = random.Random(0)
    words = ["a", "an", "the", "The", "cat", "Cat's", "dog", "dog,", "(1984)", "and", "...", "anthem", "é"]
    for _ in range(400):
        prediction, *answers = (
            draw.choice(["", " "]).join(draw.choices([*words, " ", "  "], k=draw.randrange(7))) for _ in range(3)
        )
        expected = [by_description(prediction, answer) for answer in answers]
        assert squad.exact_match(prediction, answers) == max(exact for exact, _ in expected)
        assert abs(squad.f1(prediction, answers) - max(f1 for _, f1 in expected)) < 1e-12
