"""The Auto classes know LoTLIP after `import lotlip_hf`, in whatever order; importing it costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import lotlip_hf

LOADED = """
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer
folder = sys.argv[1]
print(*(type(auto.from_pretrained(folder)).__name__ for auto in (AutoConfig, AutoModel,
    AutoModelForZeroShotImageClassification, AutoTokenizer, AutoProcessor)))
print(type(AutoModel.from_pretrained(folder, config=AutoConfig.from_pretrained(folder).text_config)).__name__)
"""


def run(code: str, *arguments: str) -> str:
    completed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import lotlip_hf",
        "from transformers import AutoModel, AutoProcessor; import lotlip_hf",
        "import lotlip_hf.modeling.modeling_lotlip",
        pytest.param("import transformers, lotlip_hf", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoTokenizer; import lotlip_hf", marks=pytest.mark.slow),
        pytest.param("from lotlip_hf import LoTLIPModel", marks=pytest.mark.slow),
        pytest.param("import lotlip_hf.modeling.configuration_lotlip", marks=pytest.mark.slow),
        pytest.param("import lotlip_hf.modeling.processing_lotlip", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_in_a_fresh_process(first: str, official_checkpoint: Path) -> None:
    output = run(f"import sys; {first}\n{LOADED}", str(official_checkpoint))
    classes = ["LoTLIPConfig", "LoTLIPModel", "LoTLIPModel", "LoTLIPTokenizer", "LoTLIPProcessor", "LoTLIPTextModel"]
    assert output.split() == classes


def test_importing_brings_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "PIL")
    code = f"import sys, lotlip_hf, lotlip_hf.cli; print([name for name in {heavy} if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_public_names() -> None:
    assert set(lotlip_hf.__all__) == set(lotlip_hf._HOME)
    assert set(lotlip_hf.__all__) <= set(dir(lotlip_hf))
    for name in lotlip_hf.__all__:
        assert getattr(lotlip_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lotlip_hf.nothing
