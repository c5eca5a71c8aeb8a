"""Prints the signatures of a real TensorRT module as JSON. It is a separate program, because one
process cannot load two such modules.

    python signatures.py MODULE MEMBERS

MEMBERS is JSON: a class to the members of it that we use.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any


def parameters(member: Any, name: str) -> list[list[str]]:
    """The parameters' names of every overload, parsed from pybind11's docstring."""
    text = " ".join((member.__doc__ or "").split())
    found = re.findall(rf"{name}\(self: [^,)]+(?:, (.*?))?\) ->", text)
    return [re.findall(r"(\w+): ", arguments) for arguments in found]


def main() -> None:
    trt = importlib.import_module(sys.argv[1])
    said: dict[str, Any] = {"version": trt.__version__, "members": {}, "enums": {}}
    for kind, names in json.loads(sys.argv[2]).items():
        owner: Any = getattr(trt, kind, None)
        if hasattr(owner, "__members__"):
            said["enums"][kind] = {n: int(v) for n, v in owner.__members__.items()}
            continue
        for name in names:
            member = getattr(owner, name, None)
            if member is None:
                said["members"][f"{kind}.{name}"] = None
            elif isinstance(member, property) or not callable(member):
                said["members"][f"{kind}.{name}"] = "property"
            else:
                said["members"][f"{kind}.{name}"] = parameters(member, name)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
