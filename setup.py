"""Packaging of megatron_medha. `pip install -e .[dev]` for a working copy."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Without the picture, which is a file of the repository.
README = re.sub(r"^!\[.*\n\n", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "megatron_medha/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None

# kernels/ and conf/ stand at the top of the tree but install inside the package: a top-level
# package called "kernels" would shadow a Hugging Face package of that name, and "conf" belongs to nobody.
nested = {
    "megatron_medha.kernels": "kernels",
    "megatron_medha.conf": "conf",
    "megatron_medha.grafana": "tools/grafana",  # what `medha grafana` prints
}
kernels = [f"megatron_medha.kernels.{name}" for name in find_packages("kernels")]

setup(
    name="megatron_medha",
    version=VERSION[1],
    description="Serving for Megatron models under traffic that mixes short chats with million-token documents",
    long_description=README,
    long_description_content_type="text/markdown",
    author="the megatron_medha authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="llm inference serving megatron openai scheduler simulator long-context",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["megatron_medha", "megatron_medha.*"]), *nested, *kernels],
    package_dir=nested,
    package_data={
        "megatron_medha.conf": ["**/*.yaml"],
        "megatron_medha.grafana": ["*.json"],
        "megatron_medha.cli.parts": ["*.toml"],
        "megatron_medha.cli.reports": ["*.j2"],
        "megatron_medha.models": ["*.toml"],
        "megatron_medha.server.observe": ["*.html"],
        # C++ sources, built on first use: kernels/native_build.py says why not here.
        "megatron_medha.kernels": ["native/*"],
    },
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "packaging>=24.2",
        "megatron-core==0.16.1",
        "deepspeed==0.19.8",
        "einops>=0.8",  # used by megatron-core's HyperCommGrid, which does not declare it
        "hydra-core==1.3.8",  # for -m, and words of its grammar that are rare
        "omegaconf>=2.3,<2.4",
        "pyyaml>=6",  # conf/, and run_config.yaml of Megatron-Bridge; omegaconf brings it too
        "aiohttp>=3.10,<4",  # the client of medha bench: an event reaches it sooner than through httpx
        "starlette>=0.46,<2",
        "uvicorn>=0.34,<1",
        "httptools>=0.6",
        "uvloop>=0.21; sys_platform != 'win32'",
        "pyzmq>=26",
        "msgspec>=0.19",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "huggingface-hub>=1.0,<3",  # medha serve ORG/NAME; tokenizers brings it too
        # Structured output. No torch, no other packages, 3 MB, one wheel for every Python; xgrammar needs torch and
        # transformers, which the front process must not load. 1.6 takes one end token only, models have several.
        "llguidance>=1.9.1,<2",
        "jinja2>=3.1.6",
        "prometheus-client>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": [
            "triton>=3.6",
            "transformer-engine[core_cu13,pytorch]==2.20.2",
            "flash-attn==2.8.3.post2",
        ],
        "tracking": ["wandb==0.31.0"],
        "otel": ["opentelemetry-sdk>=1.30,<2", "opentelemetry-exporter-otlp-proto-http>=1.30,<2"],
        "plots": ["matplotlib>=3.9"],
        "compile": ["mypy>=1.13", "setuptools>=77"],
        "parquet": ["pyarrow>=18"],
        "gguf": ["gguf>=0.17,<0.20"],  # floats out of GGUF files
        "sentencepiece": ["sentencepiece>=0.2,<0.3"],  # encodes for tokenizer.model files
        # Search and parallel jobs for -m. The sweeper is made for optuna 2; it brings 2.10.
        "sweep": ["hydra-optuna-sweeper==1.3.0", "hydra-joblib-launcher==1.2.0"],
        "slurm": ["hydra-submitit-launcher==1.2.0"],
        "ray": ["hydra-ray-launcher==1.2.2"],  # apart from "sweep": it wants an older cloudpickle than joblib
        # For tools/mutants.py, which asks it for mutation operators: a part of it that may change with any release.
        "mutants": ["mutmut>=3.8.1,<3.9"],
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3",
            "hypothesis==6.170.15",  # which cases tests try depends on it
            "httpx>=0.27",
            "openai>=1.66",  # the first with responses
            "jsonschema>=4.20",
            "transformers>=5.0,<6",
            "gguf>=0.17,<0.20",
            "sentencepiece>=0.2,<0.3",
            "tiktoken>=0.9,<0.15",  # for comparison
            "matplotlib>=3.9",
            # With upper bounds: a new release finds new things to say of old code.
            "ruff>=0.8,<0.18",
            "mypy>=1.13,<2.5",
        ],
    },
    entry_points={"console_scripts": ["medha = megatron_medha.cli.medha:main"]},
)
