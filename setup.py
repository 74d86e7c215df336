"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "abkd_megatron/__init__.py").read_text(), re.MULTILINE)
assert version is not None

plots = ["matplotlib>=3.8", "tensorboard>=2.16", "plotly>=6", "jinja2>=3.1"]
rouge = ["rouge-score>=0.1.2"]
bench = [*plots, "nvidia-modelopt>=0.40"]
sft = ["datasets>=3", "transformers>=4.40"]
test = [
    *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "hypothesis>=6.100", "spmd_types>=0.3.1,<0.4"),
    *plots,
    *sft,
    *rouge,
]

setup(
    name="abkd-megatron",
    version=version[1],
    description="Distill a large teacher into a smaller student inside Megatron-Core's own training loop",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="knowledge distillation, Megatron, NeMo, tensor parallel, pretraining, ABKD, ToDi",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["abkd_megatron", "abkd_megatron.*"]),
    # So that an editable install is a path: the folder of a clone, seen from beside it, would hide a finder's package.
    package_dir={"": "."},
    package_data={"abkd_megatron": ["py.typed", "kernels/*.cpp", "tools/report.html"]},
    python_requires=">=3.12",
    install_requires=[
        # megatron-core 0.19 has no upper bound, and cannot read its own checkpoints with torch 2.15.
        "torch>=2.6,<2.15",
        "megatron-core[training]>=0.19,<0.20",
        "sentencepiece>=0.2",
        "safetensors>=0.4",
        "pyyaml>=6",
        "rich>=13",
        # Megatron's checkpoint writer hangs without a word when it is missing.
        "psutil>=5.9",
    ],
    extras_require={
        "plots": plots,
        "rouge": rouge,
        "test": test,
        "sft": sft,
        "bench": bench,
        "dev": [*test, "ruff>=0.14", "mypy>=1.18", "types-PyYAML", "types-psutil"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "bridge": ["megatron-bridge>=0.6,<0.7"],
    },
    entry_points={"console_scripts": ["abkd-megatron = abkd_megatron.__main__:main"]},
)
