"""Scratch memory is used again for the same use, never shared between uses or threads, and fresh where it is large."""

import threading

import torch

from defocus_mllm.scratch_defocus import _BYTES_KEPT, scratch

CPU = torch.device("cpu")


def test_the_same_use_gets_the_same_memory_and_another_one_another():
    first = scratch("a test", (4, 5), torch.float32, CPU)
    assert first.shape == (4, 5)
    assert scratch("a test", (2, 3), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert scratch("another test", (4, 5), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert scratch("a test", (4, 5), torch.float64, CPU).dtype == torch.float64


def test_threads_do_not_share_it():
    places = []
    ours = scratch("a test", (8,), torch.float32, CPU)
    thread = threading.Thread(target=lambda: places.append(scratch("a test", (8,), torch.float32, CPU)))
    thread.start()
    thread.join()
    assert places[0].data_ptr() != ours.data_ptr()


def test_what_is_too_large_to_keep_is_fresh():
    shape = (_BYTES_KEPT // 4 + 1,)
    first, second = (scratch("a large test", shape, torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_memory_asked_for_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        scratch("an inference test", (3,), torch.float32, CPU)
    memory = scratch("an inference test", (3,), torch.float32, CPU)
    assert not memory.is_inference()
    torch.add(torch.ones(3), 1, out=memory)
