"""Stub libraries that replace full TensorRT's, so that its Python bindings can be imported.

The wheels `tensorrt-cu1x-bindings` hold only the pybind module, which links libnvinfer and two
other libraries that need a download from NVIDIA. The stubs define every needed function to return
null, which is enough to read the classes.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_WANTED = re.compile(
    r"create\w+_INTERNAL|get\w*(PluginRegistry|ParserVersion)|initLibNvInferPlugins"
    r"|getInferLib\w+|getLogger|createNv\w+|get\w+"
)


def make_stand_ins(binding: Path, place: Path) -> None:
    """Write the stub libraries of a pybind module into `place`."""
    place.mkdir(parents=True, exist_ok=True)
    dump = _output("objdump", "-p", str(binding))
    needed = [name for name in re.findall(r"NEEDED\s+(\S+)", dump) if name.startswith("libnv")]
    undefined = _output("nm", "-D", "--undefined-only", str(binding))
    names = {
        name
        for name in re.findall(r"\s[Uw]\s+(\S+)", undefined)
        if _WANTED.fullmatch(name) and "@" not in name
    }
    functions = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(names))
    for number, library in enumerate(needed):
        source = place / f"{number}.c"
        source.write_text("" if number else functions)
        command = ["gcc", "-shared", "-fPIC", "-o", str(place / library), str(source)]
        subprocess.run([*command, f"-Wl,-soname,{library}"], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
