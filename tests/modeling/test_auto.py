"""The Auto classes know LoTLIP after `import lotlip_hf`, whatever was imported before."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel, AutoProcessor; import lotlip_hf",
        "import lotlip_hf.modeling.modeling_lotlip",
        # imported in the middle of what ours need, and after an import that failed
        """
import lotlip_hf
try:
    import transformers.models.bert.nothing
except ImportError:
    pass
from transformers import Trainer
""",
    ],
)
def test_auto_classes_in_a_fresh_process(first: str, official_checkpoint: Path) -> None:
    output = run(f"import sys; {first}\n{LOADED}", str(official_checkpoint))
    classes = ["LoTLIPConfig", "LoTLIPModel", "LoTLIPModel", "LoTLIPTokenizer", "LoTLIPProcessor", "LoTLIPTextModel"]
    assert output.split() == classes


@pytest.mark.slow
def test_only_those_who_use_peft_import_it() -> None:
    """And with it bitsandbytes, which prints at its import that it lacks a kernel."""
    modules = "lotlip_hf.search, lotlip_hf.embed, lotlip_hf.training.loop, lotlip_hf.evaluation.evaluate"
    assert run(f"import sys, {modules}; print({{'peft', 'bitsandbytes'}} & sys.modules.keys())") == "set()\n"


def test_public_names() -> None:
    assert lotlip_hf._MODULES.keys() >= set(lotlip_hf.__all__) <= set(dir(lotlip_hf))
    for name in lotlip_hf.__all__:
        assert getattr(lotlip_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lotlip_hf.nothing
