import torch

from lowmem.memory.pinned import ALIGN_BYTES, HostArena


def test_buffers_do_not_overlap_and_share_pieces() -> None:
    arena = HostArena(pinned=False, piece_bytes=4 * ALIGN_BYTES)
    buffers = [arena.take(num_bytes) for num_bytes in (1, ALIGN_BYTES, ALIGN_BYTES + 1, 10, 100 * ALIGN_BYTES, 5)]
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    assert all(bool((buffer == number).all()) for number, buffer in enumerate(buffers))
    assert all(buffer.data_ptr() % 64 == 0 for buffer in buffers)
    pieces = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert len(pieces) == 4 and arena.held_bytes == (4 + 4 + 100 + 4) * ALIGN_BYTES


def test_a_buffer_keeps_its_piece_alive() -> None:
    arena = HostArena(pinned=False, piece_bytes=ALIGN_BYTES)
    kept = arena.take(16).fill_(7)
    del arena
    torch.empty(10 * ALIGN_BYTES).fill_(0)
    assert kept.tolist() == [7] * 16
