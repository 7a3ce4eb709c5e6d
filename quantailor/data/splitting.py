"""A held-out part that shares nothing with the rest, and a count of what two data sets share.

What is held out, and compared, is a document of a token stream or a record. Equal ones stay together, so no text is
on both sides.
"""

import hashlib

import torch
from torch import Tensor

from quantailor.data.batching import LMDataset, RecordDataset, length_of, row_digest
from quantailor.data.examples import Examples
from quantailor.data.streams import LMWindows, cut
from quantailor.errors import UntrustedInput, UsageError

MIN_DOCUMENTS = 2  # held out: one document drawn out of five is no random tenth


def split(examples: Examples, fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
    """(the rest, the held-out part): documents or records drawn at random until they make up `fraction` of the tokens.

    A stream of too few documents is cut near its end instead, and a note says so.
    Raises: UsageError unless 0 < fraction < 1; UntrustedInput if a part would stay empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction} must be between 0 and 1, such as 0.1 to hold out a tenth")
    if isinstance(examples.dataset, LMDataset):
        return _split_windows(examples, examples.dataset.windows, fraction, seed)
    digests = [row_digest(row) for row in examples.dataset.rows]
    lengths = torch.tensor([length_of(row) for row in examples.dataset.rows])
    held = _drawn(digests, lengths, fraction, seed)
    parts = [[row for row, out in zip(examples.dataset.rows, held.tolist()) if out == want] for want in (False, True)]
    if not all(parts):
        raise UntrustedInput(f"{examples.source} has {len(set(digests))} different record(s), too few to hold some out")
    rest, out = (examples.replaced(RecordDataset(rows)) for rows in parts)
    return rest, out


def overlap(a: Examples, b: Examples) -> int:
    """How many documents or records of `a` are in `b` too, token for token.

    A stream of one document (a text file without separators) has its windows compared instead. Documents cut off at
    either end of a stream count as different. Both must have been encoded by the same tokenizer.
    """
    in_b = set(_digests(b, windows=_single(a) or _single(b)))
    return sum(digest in in_b for digest in _digests(a, windows=_single(a) or _single(b)))


def _split_windows(examples: Examples, windows: LMWindows, fraction: float, seed: int) -> tuple[Examples, Examples]:
    stream, document_ids = windows.input_ids.flatten(), windows.document_ids.flatten()
    notes = []
    if windows.num_documents * fraction >= MIN_DOCUMENTS:
        lengths = torch.bincount(document_ids)
        held = _drawn(_documents(windows), lengths, fraction, seed)[document_ids]
    else:
        held = torch.arange(len(stream)) >= round(len(stream) * (1 - fraction))
        notes = [f"held out the end of the text: {windows.num_documents} document(s) are too few to draw from"]
    if min(int(held.sum()), int((~held).sum())) < 2:
        raise UntrustedInput(f"{examples.source} has {len(stream)} tokens, too few to hold {fraction:g} of them out")
    rest, out = (
        cut(stream[mask], document_ids[mask], context=windows.context, bos=windows.bos) for mask in (~held, held)
    )
    return examples.replaced(LMDataset(rest), *notes), examples.replaced(LMDataset(out), *notes)


def _drawn(digests: list[bytes], lengths: Tensor, fraction: float, seed: int) -> Tensor:
    """bool [units]: which are held out. Equal digests are drawn together."""
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    members = list(groups.values())
    held = torch.zeros(len(digests), dtype=torch.bool)
    missing = fraction * int(lengths.sum())
    for group in torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist():
        if missing <= 0:
            break
        held[members[group]] = True
        missing -= int(lengths[members[group]].sum())
    return held


def _single(examples: Examples) -> bool:
    return examples.windows is not None and examples.windows.num_documents == 1


def _digests(examples: Examples, *, windows: bool) -> list[bytes]:
    if isinstance(examples.dataset, RecordDataset):
        return [row_digest(row) for row in examples.dataset.rows]
    stream = examples.dataset.windows
    return [_digest(row) for row in stream.input_ids] if windows else _documents(stream)


def _documents(windows: LMWindows) -> list[bytes]:
    lengths = torch.bincount(windows.document_ids.flatten()).tolist()
    return [_digest(document) for document in windows.input_ids.flatten().split(lengths)]


def _digest(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.numpy().tobytes()).digest()
