"""The compiled objects; everything else about the build is in pyproject.toml."""

import runpy

from setuptools import setup

setup(**runpy.run_path("r4b_kernels/build.py")["setup_options"]())
