"""Packaging. The floors are the versions this was tested with; constraints.txt pins them all."""

import re
from pathlib import Path

from setuptools import find_packages, setup

source = (Path(__file__).parent / "unic_ds" / "__init__.py").read_text()
version = re.findall(r'__version__ = "(.+)"', source)[0]

setup(
    name="unic_ds",
    version=version,
    description="Distil several frozen vision models into one ViT by UNIC, on DeepSpeed",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["unic_ds", "unic_ds.*"]), "unic_kernels"],
    package_dir={"unic_kernels": "kernels/unic_kernels"},
    python_requires=">=3.11",
    install_requires=[
        "deepspeed>=0.19.8",
        "fire>=0.7.1",
        "huggingface_hub>=2.4",
        "matplotlib>=3.11",
        "ninja>=1.13",  # DeepSpeed builds its C++ operators with it
        "numpy>=2.4",
        "nvidia-dali-cuda130>=2.4",  # `nvidia-dali` without a suffix is a decoy; torch's CUDA is 13
        "open_clip_torch>=3.3",
        "pillow>=13.0",
        "pyyaml>=6.0",
        "rich>=15.0",
        "safetensors>=0.8",
        "scikit-learn>=1.9",
        "tensorboard>=2.21",
        "timm>=1.0.31",
        "torchao>=0.18",
        "torch>=2.14.1",
        "torchvision>=0.29.1",
        "triton>=3.8",
    ],
    extras_require={
        "quickstart": ["onnx>=1.23"],
        "dev": [
            "hypothesis>=6.170",
            "mypy>=2.4",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "webdataset>=1.0",
        ],
    },
    entry_points={"console_scripts": ["unic-ds = unic_ds.cli:main"]},
)
