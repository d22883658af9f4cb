"""Which folders become which packages, and what is compiled; everything else about the build is in pyproject.toml."""

import runpy

from setuptools import find_packages, setup

build = runpy.run_path("kernels/r4b_kernels/build.py")

setup(
    packages=[*find_packages("kernels"), *find_packages(include=["r4b_core", "r4b_core.*"]), "r4b_core.recipes"],
    package_dir={"r4b_kernels": "kernels/r4b_kernels", "r4b_core.recipes": "recipes"},
    package_data={
        "": ["**/*.md", "**/*.html", "**/*.j2", "**/*.css", "**/*.js", "*.yaml", "py.typed"],
        "r4b_kernels": ["csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.h", "csrc/**/*.cuh"],
    },
    **build["setup_options"](),
)
