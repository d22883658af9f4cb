"""Which folders become which packages; everything else about the build is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("kernels"), *find_packages(include=["r4b_core", "r4b_core.*"]), "r4b_core.recipes"],
    package_dir={"r4b_kernels": "kernels/r4b_kernels", "r4b_core.recipes": "recipes"},
    package_data={"": ["**/*.md", "**/*.html", "**/*.j2", "**/*.css", "**/*.js", "*.yaml", "py.typed"]},
)
