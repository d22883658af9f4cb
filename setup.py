"""Which folders become which packages, and what is compiled; everything else about the build is in pyproject.toml."""

import runpy

from setuptools import find_namespace_packages, find_packages, setup

packages = [
    *find_packages("kernels"),
    *find_namespace_packages("kernels", include=["r4b_kernels.csrc", "r4b_kernels.csrc.*"]),
    *find_packages(include=["r4b_core", "r4b_core.*"]),
    "r4b_core.recipes",
]
pages = ["**/*.md", "**/*.html", "**/*.j2", "**/*.css", "**/*.js"]
data = [*pages, "**/*.txt", "**/*.jsonl", "*.yaml", "curate/*.yaml", "py.typed", "*.cpp", "*.cu", "*.h", "*.cuh"]

setup(
    packages=packages,
    package_dir={"r4b_kernels": "kernels/r4b_kernels", "r4b_core.recipes": "recipes"},
    package_data={"": data},
    **runpy.run_path("kernels/r4b_kernels/build.py")["setup_options"](),
)
