"""How many CPUs a process may use."""

import os


def cpus_of_a_process(world_size: int = 1) -> int:
    """The CPUs that this process is allowed to run on, shared among the processes of this machine, at least one.

    Args:
        world_size: processes of the run; torch's elastic launch says how many of them are on this machine.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
