"""What pyproject.toml cannot say: the presets in configs/ are installed as hf_chts/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_chts", "hf_chts.*"]), "hf_chts.configs"],
    package_dir={"hf_chts.configs": "configs"},
)
