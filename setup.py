"""Builds the native CPU library where there is a C++ compiler; pyproject.toml says all the rest."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))
from native.cpu.build import kept  # the checkout is not on the path of a build


class BuildLibrary(build_ext):
    """A plain shared library, called through ctypes: it serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return "/".join([*package, f"{name}.so"])

    def build_extension(self, ext: Any) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # another build's must not pass for this one's
        try:
            built = kept(os.environ.get("CXX", "c++"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
        except (OSError, RuntimeError) as error:
            raise CompileError(
                f"the native CPU library was not built, ONNX Runtime will do its work: {error}"
            ) from error


class TagWheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("deeptalk_edge.libdeeptalk_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
