"""Scratch memory is used again, kept within bounds, and freed when asked to."""

import copy

import torch
from optimizers import drawn, parameters

from library.custom_hina_adaptive_adamw_optimizer import AdaptiveHinaAdamW
from library.optim.scratch import ScratchPool

INTERVAL = 3


def buffers(pool: ScratchPool) -> list[int]:
    return [buffer.data_ptr() for free in pool._free.values() for buffer in free]


def test_scratch_memory_is_used_again_and_can_be_freed():
    params = parameters(*drawn((50, 40), (40, 30), (60, 70)))
    optimizer = AdaptiveHinaAdamW(params, lr=1e-3, relationship_discovery_interval=INTERVAL)

    def steps(count: int) -> None:
        for _ in range(count):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()

    steps(INTERVAL - 1)
    assert optimizer.get_buffer_pool_stats()["total_buffers"] == 0
    steps(1)
    stats = optimizer.get_buffer_pool_stats()
    held = buffers(optimizer.scratch)
    # 2000 and 1200 elements share a buffer of 2048; 4200 need one of 8192.
    assert stats == {
        "total_buffer_types": 2,
        "total_buffers": 2,
        "estimated_memory_mb": 4 * (2048 + 8192) / 2**20,
        "message": "",
    }
    steps(2 * INTERVAL)
    assert buffers(optimizer.scratch) == held
    assert optimizer.get_buffer_pool_stats() == stats
    optimizer.clear_buffer_pool()
    freed = optimizer.get_buffer_pool_stats()
    assert freed["message"]
    assert {value for key, value in freed.items() if key != "message"} == {0}
    steps(INTERVAL)
    assert optimizer.get_buffer_pool_stats() == stats
    assert copy.deepcopy(optimizer).get_buffer_pool_stats()["total_buffers"] == 0


def test_a_pool_keeps_three_buffers_of_a_kind():
    pool, device = ScratchPool(), torch.device("cpu")

    def hold(count: int) -> None:
        with pool.take((10, 20), device) as buffer:
            buffer.fill_(count)
            if count > 1:
                hold(count - 1)
            assert (buffer == count).all()  # nobody else has it

    hold(5)
    assert pool.stats() == {
        "total_buffer_types": 1,
        "total_buffers": 3,
        "estimated_memory_mb": 3 * 4 * 256 / 2**20,
    }
    held = set(buffers(pool))
    hold(3)
    assert set(buffers(pool)) == held
    for shape in ((), (0, 4), (1,), (3, 5, 7), (256,), (257,)):
        with pool.take(shape, device) as buffer:
            assert buffer.shape == shape
            assert buffer.dtype == torch.float32
            pool.clear()  # what is in use goes with its user
    assert pool.stats()["total_buffers"] == 0
