"""Names of devices."""

import re


def device_error(name: str) -> str | None:
    """What is wrong with the name of a device; whether this machine has it is another question."""
    known = re.fullmatch(r"cpu|cuda(:\d+)?", name)
    return None if known else f"is {name!r}, but must be cpu, cuda, or one of several GPUs such as cuda:1"
