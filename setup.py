"""What pyproject.toml cannot say: the presets in configs/ and studies/ are installed in hf_chts."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_chts", "hf_chts.*"]), "hf_chts.configs", "hf_chts.study_files"],
    package_dir={"hf_chts.configs": "configs", "hf_chts.study_files": "studies"},
)
