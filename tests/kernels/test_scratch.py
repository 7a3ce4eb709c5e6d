"""Memory that is used again: one buffer a role, grown when needed, one set a thread, given back at the end."""

import threading

import torch

from quantailor.kernels.scratch import _buffers, release, scratch

CPU = torch.device("cpu")


def test_the_same_role_gets_the_same_memory_and_another_role_its_own():
    release()
    first = scratch("a", (4, 5), torch.float32, CPU)
    assert first.shape == (4, 5) and first.is_contiguous()
    assert scratch("a", (10,), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert scratch("b", (4, 5), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert scratch("a", (4, 5), torch.bfloat16, CPU).data_ptr() != first.data_ptr()


def test_it_grows_to_the_largest_request_and_goes_when_released():
    release()
    scratch("a", (3,), torch.float32, CPU)
    large = scratch("a", (100,), torch.float32, CPU)
    assert scratch("a", (3,), torch.float32, CPU).data_ptr() == large.data_ptr()
    assert [t.numel() for t in _buffers.held.values()] == [100]
    release()
    assert not _buffers.held


def test_threads_do_not_share():
    mine, theirs = scratch("a", (8,), torch.float32, CPU).data_ptr(), []
    thread = threading.Thread(target=lambda: theirs.append(scratch("a", (8,), torch.float32, CPU).data_ptr()))
    thread.start()
    thread.join()
    assert theirs[0] != mine
