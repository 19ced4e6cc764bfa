"""Two processes on one machine, for tests of what several ranks do together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import fsdp as lightning_fsdp
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig, FullStateDictConfig
from torch.distributed.fsdp.wrap import enable_wrap

from tests import forked

WORLD = 2
TIMEOUT = timedelta(seconds=60)


def launch(work: Callable[[Path], object], folder: Path, timeout: float = 600.0) -> list[Any]:
    """Call a function of a module on each rank; returns what the ranks returned, in their order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD)]
    processes = [
        forked.start(_call, work, folder, log=log, LOCAL_RANK=str(rank), **common)
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert codes == [0] * WORLD, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _call(work: Callable[[Path], object], folder: Path) -> None:
    torch.save(work(folder), folder / f"rank{rank()}.pt")


def full_state_on_the_cpu(module, world_size, rank0_only=True):
    """Lightning's own, without the offload, which crashes and mixes up moments on a CPU."""
    state = FullStateDictConfig(rank0_only=rank0_only, offload_to_cpu=False)
    moments = FullOptimStateDictConfig(rank0_only=rank0_only, offload_to_cpu=False)
    kind = StateDictType.FULL_STATE_DICT
    return FullyShardedDataParallel.state_dict_type(module, kind, state, moments)


lightning_fsdp._get_full_state_dict_context = full_state_on_the_cpu


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on a CPU, which Lightning refuses; offloading a full state there fails in torch."""

    def __init__(self, state_dict_type="full", **options) -> None:
        options["state_dict_type"] = state_dict_type
        super().__init__(device_id=torch.device("cpu"), **options)

    def model_sharded_context(self):
        options = {"sharding_strategy": self.sharding_strategy, **self.kwargs}
        return enable_wrap(wrapper_cls=FullyShardedDataParallel, **options)

    def _setup_model(self, model):
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        return FullyShardedDataParallel(
            module=model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )


def ddp(**options) -> DDPStrategy:
    return DDPStrategy(**{"find_unused_parameters": True, "timeout": TIMEOUT, **options})


def fsdp(**options) -> FSDPStrategy:
    return CPUFSDPStrategy(timeout=TIMEOUT, **options)


def fsdp2(**options) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=WORLD, tensor_parallel_size=1, timeout=TIMEOUT, **options
    )


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])
