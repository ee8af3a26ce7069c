"""What pyproject.toml cannot say: configs/, at the top of a clone, is deperceiver_jax/configs where it is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["deperceiver_jax*"]), "deperceiver_jax.configs"],
    package_dir={"deperceiver_jax.configs": "configs"},
)
