"""The GPU of one instance of Triton's model: Triton makes an instance for every GPU, each in a process of its own.

CUDA's current device belongs to a thread, and TensorRT, CUDA and we use several. So the process is shown its own GPU
alone, which then is number 0 for all of them; that holds only before CUDA is first used.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def show_own_device(arguments: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Let this process see the GPU alone that Triton chose for the instance.

    Args:
        arguments: of `initialize`: `model_instance_kind`, and `model_instance_device_id`, which counts the GPUs that
            the server sees.
        environment: of the process.
    """
    number = arguments.get("model_instance_device_id", "")
    if arguments.get("model_instance_kind") != "GPU" or not number.isdecimal():
        return
    seen = [name.strip() for name in environment.get(_VISIBLE, "").split(",") if name.strip()]
    environment[_VISIBLE] = seen[int(number)] if int(number) < len(seen) else number
