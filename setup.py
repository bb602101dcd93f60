"""Packaging. constraints-oldest.txt pins the floors, constraints.txt the newest that are tested."""

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
    packages=[*find_packages(include=["unic_ds", "unic_ds.*"]), *find_packages("kernels")],
    package_dir={"unic_kernels": "kernels/unic_kernels"},
    package_data={"unic_ds.report": ["templates/*"]},
    python_requires=">=3.11",
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    install_requires=[
        "deepspeed>=0.19.8",  # 0.18 skips the all-reduce between ranks on a CPU
        "fire>=0.7",
        "huggingface_hub>=0.34",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ninja>=1.11",  # DeepSpeed builds its C++ operators with it
        "numpy>=1.26",
        "open_clip_torch>=3.1",
        "packaging>=24.2",
        "pillow>=10.4",
        "psutil>=7.2",
        "pyyaml>=6.0",
        "rich>=13.9",
        "safetensors>=0.5",
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "tensorboard>=2.18",
        "timm>=1.0.31",
        "torchao>=0.18",
        # a0: what a container builds from a release's branch is that release
        "torch>=2.11.0a0",
        "torchvision>=0.26.0a0",
        "triton>=3.6",
    ],
    extras_require={
        # DALI for the CUDA that torch was built for; `nvidia-dali` without a suffix is a decoy
        "cuda12": ["nvidia-dali-cuda120>=2.4"],
        "cuda13": ["nvidia-dali-cuda130>=2.4"],
        "quickstart": ["onnx>=1.17"],
        # What `unic-ds eval` needs beyond kNN: --protocol unic, detection
        "eval": ["faster-coco-eval>=1.8", "optuna>=5.0"],
        # Services that a run can be logged to: --run.track
        "track": ["mlflow-skinny>=3.17", "wandb>=0.31"],
        # Formats of `unic-ds export`: hf, onnx
        "export": [
            "onnx>=1.17",
            "onnxruntime>=1.32",
            "onnxscript>=0.7",
            "transformers>=4.57",
        ],
        "dev": [
            "faiss-cpu>=1.15",
            "hypothesis>=6.120",
            "mypy>=2.4",
            "playwright>=1.65",
            "pycocotools>=2.0.11",
            "pytest>=8.3",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "torchmetrics>=1.9",
            "webdataset>=0.2.111",
            "zensical>=0.0.73",
        ],
    },
    entry_points={"console_scripts": ["unic-ds = unic_ds.cli:main"]},
)
